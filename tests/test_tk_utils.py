"""The toolkit: atomic files, exit codes, tables, progress, processes, figures."""
import contextlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, children, fork, needs_children, printed_by

import tk_utils

WITH_ROOT = dict(os.environ, PYTHONPATH=ROOT)


def python(*arguments, **options):
    """Run a new interpreter that finds our modules."""
    options = {"env": WITH_ROOT, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options}
    return subprocess.run([sys.executable, *arguments], timeout=120, text=True, **options)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_a_file_appears_complete_or_not_at_all_and_no_temporary_is_left(tmp_path, error):
    path = tmp_path / "new folder" / "log.csv"
    with tk_utils.atomic_path(path) as temporary:
        Path(temporary).write_text("all of it")
        assert Path(temporary).parent == path.parent and not path.exists()
    with pytest.raises(error), tk_utils.atomic_path(path) as temporary:
        Path(temporary).write_text("half")
        raise error
    assert path.read_text() == "all of it" and os.listdir(path.parent) == ["log.csv"]


def test_a_writer_killed_in_the_middle_leaves_the_old_file_and_the_next_one_cleans_up(tmp_path):
    path = tmp_path / "runs" / "data.h5"
    tk_utils.write_json(path, "old")

    def write_half():
        with tk_utils.atomic_file(path) as file:
            file.write("half")
            os.kill(os.getpid(), signal.SIGKILL)

    fork(write_half, tmp_path).join()
    assert json.loads(path.read_text()) == "old" and list(path.parent.glob("*.h5")) == [path]
    left, = set(os.listdir(path.parent)) - {"data.h5"}
    assert left.startswith(".data.h5.") and left.endswith(".tmp")
    tk_utils.write_json(path, "new")
    assert json.loads(path.read_text()) == "new" and os.listdir(path.parent) == ["data.h5"]


def test_a_private_file_stays_private_and_a_link_stays_a_link(tmp_path):
    target, link = tmp_path / "far.json", tmp_path / "run.json"
    target.touch(0o600)
    link.symlink_to(target)
    tk_utils.write_json(link, {"a": 1})
    assert link.is_symlink() and json.loads(target.read_text()) == {"a": 1}
    assert target.stat().st_mode & 0o777 == 0o600


def test_json_has_sorted_keys_plain_numbers_and_null_for_nan_and_infinity(tmp_path):
    tk_utils.write_json(tmp_path / "m.json", {
        "b": np.float32(0.5), "a": [np.nan, float("inf"), np.int64(3)], 2: np.array([1.0, np.nan])})
    text = (tmp_path / "m.json").read_text(encoding="utf-8")
    assert list(json.loads(text).items()) == [
        ("2", [1.0, None]), ("a", [None, None, 3]), ("b", 0.5)]


def test_an_output_that_cannot_be_written_is_refused_and_nothing_is_made(tmp_path):
    path = tmp_path / "new" / "a.json"
    tk_utils.check_writable(path, ["other.json", None])
    assert not os.listdir(tmp_path)
    for bad, inputs in ((tmp_path, ()), (path, [str(path)]), ("/proc/version/a.json", ())):
        with pytest.raises(OSError):
            tk_utils.check_writable(bad, inputs)


def test_a_lock_keeps_others_out_until_its_holder_is_killed(tmp_path):
    def lock_and_die():
        with tk_utils.locked(tmp_path / "runs" / "lock", "busy"):
            os.kill(os.getpid(), signal.SIGKILL)

    with tk_utils.locked(tmp_path / "runs" / "lock", "busy"):
        assert "BlockingIOError: busy" in printed_by([fork(lock_and_die, tmp_path)], tmp_path, 1)
    for _ in range(2):
        printed_by([fork(lock_and_die, tmp_path)], tmp_path, -signal.SIGKILL)


SCRIPT = """import os, signal, sys, tk_utils
class DataError(ValueError): pass
def main():
    {body}
sys.exit(tk_utils.run_script(main, DataError))"""


def test_a_console_of_ascii_gets_plain_characters():
    assert "4 ± 1 mmHg² … Ж".encode("ascii", "plain_characters") == b"4 +/- 1 mmHg2 ... \\u0416"


@pytest.mark.parametrize("body, code, stderr", [
    ('print("done")', 0, ""),
    ("return 3", 3, ""),
    ('raise DataError("a.h5: p1/e1: hr:\\n  13 values, expected 12")', 2,
     "error: a.h5: p1/e1: hr: 13 values, expected 12\n"),
    ('open("not/there.h5")', 2, "error: not/there.h5: No such file or directory\n"),
    ('raise OSError("truncated file")', 2, "error: truncated file\n"),
    ("signal.signal(signal.SIGINT, signal.default_int_handler); os.kill(os.getpid(), 2)", 130,
     "interrupted\n"),
    ('raise ValueError("a bug")', 1, "ValueError: a bug\n")])
def test_a_script_ends_with_its_exit_code_and_one_line_unless_it_has_a_bug(body, code, stderr):
    ended = python("-c", SCRIPT.format(body=body))
    assert ended.returncode == code and ended.stderr.endswith(stderr)
    assert len(ended.stderr.splitlines()) == bool(stderr) or code == 1


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_closed_pipe_and_a_full_disk_behind_the_output_end_the_script_with_one_line():
    read_end, write_end = os.pipe()
    os.close(read_end)
    ended = python("-c", SCRIPT.format(body="[print(i) for i in range(100_000)]"), stdout=write_end)
    os.close(write_end)
    assert (ended.returncode, ended.stderr) == (2, "error: [Errno 32] Broken pipe\n")
    with open("/dev/full", "w") as full:
        ended = python("-c", SCRIPT.format(body='print("scores")'), stdout=full)
    assert ended.returncode and "No space left on device (free some disk space" in ended.stderr


def table(capsys, rows, headers):
    tk_utils.print_table(rows, headers)
    return capsys.readouterr().out.splitlines()


def test_a_table_is_aligned_with_its_numbers_to_the_right_and_shows_no_nan(capsys):
    assert table(capsys, [["ridge", 6.2, 1200, "0.42 [0.30, 0.50]"],
                          ["mean\x1b[31m", float("nan"), None, "\u22120.1"]],
                 ["baseline", "RMSE", "n", "skill"]) == [
        "baseline      RMSE      n              skill",
        "------------  ----  -----  -----------------",
        "ridge         6.20  1,200  0.42 [0.30, 0.50]",
        "mean\\x1b[31m     –                      \u22120.1"]
    assert table(capsys, [], ["rule", ""]) == ["rule", "----  -"]


@pytest.mark.parametrize("columns", [100, 80])
def test_no_table_is_wider_than_the_terminal_and_nothing_is_lost(columns, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(columns))
    words = "gradient boosting on vitals and classical features of the waveform"
    lines = table(capsys, [[words, *range(1000, 1006), "text " * 9] for _ in range(3)],
                  ["predictor", *[f"score {n}" for n in range(6)], "remark"])
    text = " ".join(lines)
    assert max(map(len, lines)) <= columns and text.count("text") == 27
    assert all(text.count(word) == 3 for word in (*words.split(), *map("1,00{}".format, range(6))))


def test_progress_is_a_bar_in_a_terminal_and_silent_at_first_in_a_log_file():
    pty, fcntl, termios = map(pytest.importorskip, ("pty", "fcntl", "termios"))
    main, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, np.array([24, 80, 0, 0], "u2").tobytes())
    code = "import time, tk_utils\nfor _ in tk_utils.progress(range(5)): time.sleep(0.15)"
    assert python("-c", code, stderr=slave).returncode == 0
    os.close(slave)
    shown = b""
    with contextlib.suppress(OSError), os.fdopen(main, "rb", 0) as terminal:    # at its end
        while piece := terminal.read(4096):
            shown += piece
    assert shown.count(b"\r") > 2 and b"5/5" in shown
    assert python("-c", code).stderr == ""


POOL = """import os, sys, time, tk_utils
def work(n):
    if n == {killed}:
        os.kill(os.getpid(), 9)
    if n == {sleeps}:
        time.sleep(60)
    return n * n
if __name__ == "__main__":
    for job, result in tk_utils.in_processes(work, range(9), 2):
        print(job, result, flush=True)"""


def test_results_come_in_order_and_only_the_job_that_is_killed_is_lost(tmp_path):
    (tmp_path / "pool.py").write_text(POOL.format(killed=4, sleeps=None))
    ended = python(tmp_path / "pool.py")
    expected = [f"{n} {n * n}" for n in range(9)]
    expected[4] = "4 its process was killed (out of memory?)"
    assert ended.stdout.splitlines() == expected
    assert list(tk_utils.in_processes(abs, [-1, 2])) == [(-1, 1), (2, 2)]


@needs_children
def test_the_workers_of_a_killed_parent_end(tmp_path):
    (tmp_path / "pool.py").write_text(POOL.format(killed=None, sleeps=3))
    with subprocess.Popen([sys.executable, tmp_path / "pool.py"], stdout=subprocess.PIPE,
                          env=WITH_ROOT, text=True) as parent:
        assert parent.stdout.readline() == "0 0\n"
        left = [Path(f"/proc/{pid}/status") for pid in children(parent.pid)]
        parent.kill()
    assert left
    deadline = time.monotonic() + 20
    while left and time.monotonic() < deadline:
        left = [path for path in left if path.exists() and "zombie" not in path.read_text()]
    assert not left


def test_the_same_seed_gives_the_same_random_numbers_everywhere():
    draws = []
    for seed in (3, 3, 4):
        tk_utils.reset_all_seeds(2 ** 33 + seed)
        draws.append((random.random(), np.random.rand(), torch.rand(1).item()))
    assert draws[0] == draws[1] and not set(draws[0]) & set(draws[2])


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_the_git_revision_describes_the_checkout_of_the_file_or_is_none(tmp_path, monkeypatch):
    file = tmp_path / "tk_utils.py"
    file.touch()
    monkeypatch.setattr(tk_utils, "__file__", str(file))
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert tk_utils.git_revision() is None
    subprocess.run("git init -q; git add .; git -c user.name=a -c user.email=a@b commit -q "
                   "--no-verify -m first", shell=True, check=True, cwd=tmp_path)
    clean = tk_utils.git_revision()
    file.write_text("edited")
    assert re.fullmatch("[0-9a-f]{7,}", clean) and tk_utils.git_revision() == clean + "-dirty"


SCORES = {"rmse": 5.123, "mae": 4.0, "mead": 3.3, "bias": -0.25, "sd": 5.1, "r2": 0.87,
          "p_crit_r2": 0.8, "n_patients": 2000, "n": 1234}


def drawn(figure, tmp_path):
    """(the texts of a figure, the number of its pixels in the red of a note)."""
    from matplotlib.image import imread
    for suffix in ("svg", "png", "pdf"):
        tk_utils.save_figure(figure, tmp_path / f"f.{suffix}")
    assert b"/Type3" not in (tmp_path / "f.pdf").read_bytes()       # fonts that can be edited
    pixels = (imread(tmp_path / "f.png")[..., :3] * 255).round().astype(int)
    red = np.all(np.abs(pixels - (0xb3, 0x26, 0x1e)) <= 2, axis=-1).sum()
    svg = (tmp_path / "f.svg").read_text(encoding="utf-8")
    return "\n".join(re.findall(r"<!-- (.*?) -->", svg, re.S)), red


@pytest.mark.parametrize("epochs", [1, 60])
def test_the_loss_figure_names_its_axes_units_and_best_epoch(tmp_path, epochs):
    n, best = np.arange(epochs), min(3, epochs)
    text, red = drawn(tk_utils.loss_lr_figure({
        "epoch_train_loss": 35 + 400 * np.exp(-n), "epoch_val_loss": 40 + np.abs(n + 1 - best),
        "lr": np.geomspace(1e-3, 1e-5, epochs)}, "SIMULATED DATA"), tmp_path)
    for expected in ("Loss, MSE (mmHg²)", "Learning rate", "Epoch", "train", "tune",
                     f"best: epoch {best}, 40", "SIMULATED DATA"):
        assert expected in text
    assert red > 3000


def test_the_histogram_shows_units_scores_and_counts_and_how_many_lie_outside(tmp_path):
    truth = np.random.default_rng(0).normal(36, 14, 1234)
    text, red = drawn(tk_utils.histogram_figure(truth, [5000, *truth[1:]], SCORES), tmp_path)
    for expected in ("Label TPP (mmHg)", "Predicted TPP (mmHg)", "RMSE 5.12", "MAE 4.00",
                     "MeAD 3.30", "bias -0.25 ± 5.10 mmHg", "R² 0.870", "R² of Pcrit 0.800",
                     "2,000 patients", "1,234 segments (1 beyond the axes)",
                     "Segments per 2 × 2 mmHg"):
        assert expected in text
    assert red == 0 and "5000" not in text
    drawn(tk_utils.histogram_figure([36.0], [36.0], SCORES), tmp_path)
