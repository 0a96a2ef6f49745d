"""The toolkit: atomic files, exit codes, tables, progress in a log file, processes, figures."""
import json
import os
import re
import shutil
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import children, needs_children, read_terminal

import tk_utils

ROOT = Path(__file__).resolve().parents[1]
RED = (0xb3, 0x26, 0x1e)


def python(code, **environment):
    """Run `code` in a new interpreter that finds our modules."""
    environment = dict(os.environ, PYTHONPATH=str(ROOT), **environment)
    return subprocess.run([sys.executable, "-c", code], env=environment, timeout=60,
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


# ---------------------------------------------------------------- files

def test_a_file_appears_whole_and_leaves_no_temporary(tmp_path):
    path = tmp_path / "new folder" / "M1.5.pth"
    with tk_utils.atomic_path(path) as temporary:
        Path(temporary).write_text("all of it")
        assert not path.exists()
        assert Path(temporary).parent == path.parent
    assert path.read_text() == "all of it"
    assert os.listdir(path.parent) == ["M1.5.pth"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_after_an_error_the_old_file_is_there_and_the_temporary_is_not(tmp_path, error):
    path = tmp_path / "log.csv"
    path.write_text("old")
    with pytest.raises(error), tk_utils.atomic_path(path) as temporary:
        Path(temporary).write_text("half")
        raise error
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["log.csv"]


def test_a_writer_killed_in_the_middle_leaves_the_old_file_and_the_next_one_cleans_up(tmp_path):
    path = tmp_path / "data.h5"
    path.write_text("old")
    child = subprocess.Popen(
        [sys.executable, "-c", 'import sys, time, tk_utils\n'
         'with tk_utils.atomic_path(sys.argv[1]) as temporary:\n'
         '    file = open(temporary, "w"); file.write("half"); file.flush()\n'
         '    print("writing", flush=True); time.sleep(60)', str(path)],
        env=dict(os.environ, PYTHONPATH=str(ROOT)), stdout=subprocess.PIPE, text=True)
    with child:
        assert child.stdout.readline() == "writing\n"
        child.kill()
    assert child.returncode == -signal.SIGKILL
    assert path.read_text() == "old"
    assert list(tmp_path.glob("*.h5")) == [path]
    left = [name for name in os.listdir(tmp_path) if name != "data.h5"]
    assert len(left) == 1 and left[0].startswith(".data.h5.") and left[0].endswith(".tmp")
    with tk_utils.atomic_file(tmp_path / "data.h5") as file:        # the next one cleans up
        file.write("new")
    assert os.listdir(tmp_path) == ["data.h5"]


def test_a_writer_that_writes_nothing_is_an_error_and_keeps_the_old_file(tmp_path):
    path = tmp_path / "x.json"
    path.write_text("old")
    with pytest.raises(FileNotFoundError), tk_utils.atomic_path(path):
        pass
    assert path.read_text() == "old"


def test_a_folder_in_the_place_of_the_file_is_refused_before_any_work(tmp_path):
    with pytest.raises(IsADirectoryError, match="is a folder"), tk_utils.atomic_path(tmp_path):
        pytest.fail("the body ran")


@pytest.mark.skipif(os.name != "posix", reason="file modes and links of POSIX")
def test_a_private_file_stays_private_and_a_link_stays_a_link(tmp_path):
    target = tmp_path / "far" / "run.json"
    target.parent.mkdir()
    target.write_text("{}")
    target.chmod(0o600)
    link = tmp_path / "run.json"
    link.symlink_to(target)
    tk_utils.write_json(link, {"a": 1})
    assert link.is_symlink()
    assert json.loads(target.read_text()) == {"a": 1}
    assert stat.S_IMODE(target.stat().st_mode) == 0o600


def test_json_has_sorted_keys_plain_numbers_and_null_for_what_is_not_finite(tmp_path):
    path = tmp_path / "m.json"
    tk_utils.write_json(path, {
        "b": np.float32(0.5), "a": [np.nan, float("inf"), np.int64(3)], 2: np.array([1.0, np.nan]),
        "c": (True, None, "mmHg²")})
    text = path.read_text(encoding="utf-8")
    assert json.loads(text) == {"2": [1.0, None], "a": [None, None, 3], "b": 0.5,
                                "c": [True, None, "mmHg²"]}
    assert re.findall(r'^  "(\w)"', text, re.M) == ["2", "a", "b", "c"]


def test_what_cannot_be_written_is_found_before_the_work(tmp_path):
    tk_utils.check_writable(tmp_path / "new" / "a.json")
    with pytest.raises(IsADirectoryError):
        tk_utils.check_writable(tmp_path)
    with pytest.raises(OSError):
        tk_utils.check_writable("/proc/version/a.json")


def test_a_lock_keeps_others_out_until_its_holder_ends_however(tmp_path):
    path = tmp_path / "runs" / "lock"
    child = subprocess.Popen(
        [sys.executable, "-c", "import sys, time, tk_utils\n"
         "with tk_utils.locked(sys.argv[1], 'busy'):\n"
         "    print('locked', flush=True); time.sleep(60)", str(path)],
        env=dict(os.environ, PYTHONPATH=str(ROOT)), stdout=subprocess.PIPE, text=True)
    with child:
        assert child.stdout.readline() == "locked\n"
        with pytest.raises(BlockingIOError, match="busy"), tk_utils.locked(path, "busy"):
            pytest.fail("locked twice")
        child.kill()
    with tk_utils.locked(path, "busy"):
        pass


def test_the_files_of_a_run_lie_in_its_folder_and_its_checkpoint_beside_it():
    files = tk_utils.run_files("a")
    assert (files.checkpoint, files.resume, files.log) == (
        "runs/a.pth", "runs/a/resume.pth", "runs/a/log.csv")
    assert files.histogram == "figures_resnet/a_histogram_plot.png"
    with pytest.raises(AttributeError):
        files.nothing  # noqa: B018


# ---------------------------------------------------------------- scripts

SCRIPT = """
import os, signal, sys, tk_utils
class DataError(ValueError): pass
def main():
    {body}
sys.exit(tk_utils.run_script(main, DataError))
"""


@pytest.mark.parametrize("body, code, stderr", [
    ('print("done")', 0, ""),
    ("return 3", 3, ""),
    ('raise DataError("a.h5: p1/e1: hr:\\n  13 values, expected 12")', 2,
     "error: a.h5: p1/e1: hr: 13 values, expected 12\n"),
    ('open("not/there.h5")', 2, "error: not/there.h5: No such file or directory\n"),
    ('raise OSError("truncated file")', 2, "error: truncated file\n"),
    ("signal.signal(signal.SIGINT, signal.default_int_handler); os.kill(os.getpid(), 2)", 130,
     "interrupted\n"),
])
def test_a_script_ends_with_its_exit_code_and_at_most_one_line(body, code, stderr):
    ended = python(SCRIPT.format(body=body))
    assert (ended.returncode, ended.stderr) == (code, stderr)


def test_a_bug_keeps_its_traceback():
    ended = python(SCRIPT.format(body='raise ValueError("not announced")'))
    assert ended.returncode == 1
    assert "Traceback" in ended.stderr and "not announced" in ended.stderr


@pytest.mark.skipif(os.name != "posix", reason="pipes of POSIX")
@pytest.mark.parametrize("lines", [1, 100_000])
def test_a_reader_that_closes_the_pipe_ends_the_script_with_one_line(lines):
    read_end, write_end = os.pipe()
    os.close(read_end)
    ended = subprocess.run(
        [sys.executable, "-c", SCRIPT.format(body=f"[print(i) for i in range({lines})]")],
        env=dict(os.environ, PYTHONPATH=str(ROOT)), stdout=write_end, stderr=subprocess.PIPE,
        text=True, timeout=60)
    os.close(write_end)
    assert (ended.returncode, ended.stderr) == (2, "error: [Errno 32] Broken pipe\n")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk_behind_the_output_is_told():
    with open("/dev/full", "w") as full:
        ended = subprocess.run(
            [sys.executable, "-c", SCRIPT.format(body='print("scores")')], stdout=full,
            env=dict(os.environ, PYTHONPATH=str(ROOT)), stderr=subprocess.PIPE, text=True)
    assert ended.returncode != 0
    assert "error: [Errno 28] No space left on device (free some disk space" in ended.stderr


def table(rows, headers, **environment):
    """What print_table shows, in another process."""
    ended = python(f"import tk_utils; tk_utils.print_table({rows!r}, {headers!r})".replace(
        "nan", "float('nan')"), **environment)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout.splitlines()


def test_a_table_is_aligned_with_its_numbers_to_the_right_and_shows_no_nan():
    assert table([["ridge", 6.2, 1200, "0.42 [0.30, 0.50]"],
                  ["mean TPP", float("nan"), None, "\u22120.1"]],
                 ["baseline", "RMSE", "n", "skill"]) == [
        "baseline  RMSE      n              skill",
        "--------  ----  -----  -----------------",
        "ridge     6.20  1,200  0.42 [0.30, 0.50]",
        "mean TPP     –                      \u22120.1"]
    assert table([], ["rule", "segments"]) == ["rule  segments", "----  --------"]


@pytest.mark.parametrize("columns", [100, 80, 60])
def test_no_table_is_wider_than_the_terminal_and_nothing_of_it_is_lost(columns):
    words = "gradient boosting on vitals and classical features of the waveform"
    lines = table([[words, *range(1000, 1012), "text " * 9] for _ in range(3)],
                  ["predictor", *[f"score {n}" for n in range(12)], "remark"], COLUMNS=str(columns))
    assert max(map(len, lines)) <= columns
    text = " ".join(lines)
    assert all(text.count(f"{n:,}") == 3 for n in range(1000, 1012))
    assert all(word in text for word in words.split()) and text.count("text") == 27


def test_a_table_can_be_shown_without_unicode_and_obeys_no_control_characters():
    lines = table([["A\x1b[31m\nB ± ² \udcff", 1.0]], ["R² of “x”", "n"],
                  PYTHONIOENCODING="ascii")
    assert lines[2].startswith("A\\x1b[31m B +/- 2 \\udcff") and "R2 of ?x?" in lines[0]


def test_counts_have_their_singular():
    assert [tk_utils.counted(n, "patient") for n in (0, 1, 1200)] == [
        "0 patients", "1 patient", "1,200 patients"]
    assert tk_utils.counted(2, "series", "series") == "2 series"


# ---------------------------------------------------------------- progress

def test_progress_into_a_log_file_is_a_line_at_the_end_and_no_bar():
    ended = python('import tk_utils\n'
                   'bar = tk_utils.progress(range(1000), desc="epoch 1")\n'
                   'for i in bar: bar.set_postfix(loss=i / 3)\n')
    assert ended.returncode == 0
    assert len(ended.stderr.splitlines()) == 1
    assert "\r" not in ended.stderr and "\x1b" not in ended.stderr
    assert ended.stderr.startswith("epoch 1: 100%") and "loss=333" in ended.stderr


def test_progress_into_a_log_file_speaks_now_and_then():
    ended = python("import time, tk_utils\n"
                   "tk_utils.SECONDS_BETWEEN_LINES = 0.2\n"
                   "with tk_utils.progress(total=30, leave=False) as bar:\n"
                   "    for _ in range(30): time.sleep(0.02); bar.update()\n")
    lines = ended.stderr.splitlines()
    assert 1 <= len(lines) <= 4
    assert "/30" in lines[0]


@pytest.mark.skipif(os.name != "posix", reason="pseudo-terminals of POSIX")
def test_progress_in_a_terminal_is_a_bar_that_overwrites_itself():
    pty = pytest.importorskip("pty")
    master, slave = pty.openpty()
    child = subprocess.Popen(
        [sys.executable, "-c", "import time, tk_utils\n"
         "for _ in tk_utils.progress(range(5)): time.sleep(0.15)"],
        env=dict(os.environ, PYTHONPATH=str(ROOT), TERM="xterm"), stderr=slave)
    os.close(slave)
    shown = read_terminal(master)
    assert child.wait(timeout=60) == 0
    assert shown.count(b"\r") > 2 and b"5/5" in shown


# ---------------------------------------------------------------- what a run was made with

def test_the_same_seed_gives_the_same_random_numbers_everywhere():
    import random

    import torch

    def draw(seed):
        tk_utils.reset_all_seeds(seed)
        return random.random(), np.random.rand(), torch.rand(1).item()

    assert draw(3) == draw(3)
    assert all(a != b for a, b in zip(draw(3), draw(4)))
    assert draw(2 ** 33) == draw(2 ** 33)


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_the_git_revision_is_that_of_the_files_own_checkout_or_none(tmp_path):
    shutil.copy(ROOT / "tk_utils.py", tmp_path)
    environment = dict(os.environ, GIT_CEILING_DIRECTORIES=str(tmp_path.parent))
    environment.pop("PYTHONPATH", None)

    def git(*arguments):
        return subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=a@b", *arguments],
                              cwd=tmp_path, check=True, stdout=subprocess.PIPE, text=True,
                              env=environment).stdout.strip()

    def revision():
        code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); sys.dont_write_bytecode = True"
        return subprocess.run(
            [sys.executable, "-c", code + "\nimport tk_utils; print(tk_utils.git_revision())"],
            cwd="/", env=environment, check=True, stdout=subprocess.PIPE, text=True,
            timeout=60).stdout.strip()

    assert revision() == "None"
    git("init", "-q")
    git("add", ".")
    git("commit", "-q", "--no-verify", "-m", "first")
    assert revision() == git("rev-parse", "--short", "HEAD")
    with open(tmp_path / "tk_utils.py", "a") as file:
        file.write("# edited\n")
    assert revision() == git("rev-parse", "--short", "HEAD") + "-dirty"


def test_the_module_imports_alone(tmp_path):
    shutil.copy(ROOT / "tk_utils.py", tmp_path)
    subprocess.run([sys.executable, "-c", "import tk_utils, sys\n"
                    "assert 'matplotlib' not in sys.modules"], cwd=tmp_path, check=True, timeout=60)


# ---------------------------------------------------------------- processes

POOL = """
import os, sys, time, tk_utils
def work(n):
    if n == {killed}:
        os.kill(os.getpid(), 9)
    if n == {sleeps}:
        time.sleep(60)
    return n * n
if __name__ == "__main__":
    for job, result in tk_utils.in_processes(work, range(9), 2):
        print(job, result, flush=True)
"""


def test_results_come_in_order_and_only_the_job_that_is_killed_is_lost(tmp_path):
    (tmp_path / "pool.py").write_text(POOL.format(killed=4, sleeps=None))
    ended = subprocess.run([sys.executable, tmp_path / "pool.py"], stdout=subprocess.PIPE,
                           env=dict(os.environ, PYTHONPATH=str(ROOT)), text=True, timeout=120)
    expected = [f"{n} {n * n}" for n in range(9)]
    expected[4] = "4 its process was killed (out of memory?)"
    assert ended.stdout.splitlines() == expected
    assert list(tk_utils.in_processes(abs, [-1, 2])) == [(-1, 1), (2, 2)]


@needs_children
def test_the_workers_of_a_killed_parent_end(tmp_path):
    (tmp_path / "pool.py").write_text(POOL.format(killed=None, sleeps=3))
    parent = subprocess.Popen([sys.executable, tmp_path / "pool.py"], stdout=subprocess.PIPE,
                              env=dict(os.environ, PYTHONPATH=str(ROOT)), text=True)
    with parent:
        assert parent.stdout.readline() == "0 0\n"
        workers = children(parent.pid)
        parent.kill()
    assert len(workers) >= 2
    deadline = time.monotonic() + 20
    while any(map(tk_utils._is_alive, workers)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not [pid for pid in workers if tk_utils._is_alive(pid)
                and "zombie" not in Path(f"/proc/{pid}/status").read_text()]


# ---------------------------------------------------------------- figures

def trajectory(epochs=6, best=3, lr_values=6):
    tune = 40 + np.abs(np.arange(1, epochs + 1) - best)
    return {"epoch_train_loss": 35 + 400 * np.exp(-np.arange(epochs)), "epoch_val_loss": tune,
            "lr": np.geomspace(1e-3, 1e-5, lr_values)}


def drawn_text(path):
    """The texts of an SVG figure; matplotlib leaves each beside its outlines as a comment."""
    return re.findall(r"<!-- (.*?) -->", path.read_text(encoding="utf-8"), re.S)


def pixels(path):
    from matplotlib.image import imread
    return (imread(str(path))[..., :3] * 255).round().astype(int)


def red_pixels(path):
    return int(np.all(np.abs(pixels(path) - RED) <= 2, axis=-1).sum())


def test_the_loss_figure_names_its_axes_units_and_best_epoch(tmp_path):
    path = tmp_path / "loss_lr_plot.svg"
    tk_utils.loss_lr_plot(trajectory(), path, "SIMULATED DATA")
    text = drawn_text(path)
    for expected in ("Loss, MSE (mmHg²)", "Learning rate", "Epoch", "train", "tune",
                     "best: epoch 3, 40", "SIMULATED DATA"):
        assert expected in text


@pytest.mark.parametrize("given", [
    trajectory(), trajectory(lr_values=60), trajectory(epochs=1, best=1, lr_values=1),
    dict(trajectory(), epoch_val_loss=[]), trajectory(epochs=200, lr_values=200),
    dict(trajectory(), epoch_val_loss=[50, np.nan, 45, 44, 46, 47])])
def test_the_loss_figure_is_drawn_for_every_kind_of_trajectory(tmp_path, given):
    path = tmp_path / "figures_resnet" / "loss_lr_plot.png"
    tk_utils.loss_lr_plot(given, path)
    assert pixels(path).shape[0] > 600 and pixels(path).std() > 10


def test_the_histogram_shows_units_scores_and_counts(tmp_path):
    rng = np.random.default_rng(0)
    truth = rng.normal(36, 14, 1234)
    path = tmp_path / "histogram_plot.svg"
    tk_utils.histogram_plot(
        truth, truth + rng.normal(0, 5, 1234), path,
        {"rmse": 5.123, "mae": 4.0, "mead": 3.3, "bias": -0.25, "sd": 5.1, "r2": 0.87,
         "p_crit_r2": 0.8, "n_patients": 2000}, "SIMULATED DATA")
    text = "\n".join(drawn_text(path))
    for expected in ("Label TPP (mmHg)", "Predicted TPP (mmHg)", "identity", "RMSE 5.12",
                     "MAE 4.00", "MeAD 3.30", "bias -0.25 ± 5.10 mmHg", "R² 0.870",
                     "R² of Pcrit 0.800", "2,000 patients", "1,234 segments",
                     "Segments per 2 × 2 mmHg", "SIMULATED DATA"):
        assert expected in text
    assert "beyond the axes" not in text


def test_a_wild_value_does_not_shrink_the_histogram_and_is_counted(tmp_path):
    truth = np.linspace(10, 70, 5000)
    prediction = truth.copy()
    prediction[0] = 5000
    tk_utils.histogram_plot(truth, prediction, tmp_path / "h.svg", {"n_patients": 3})
    text = drawn_text(tmp_path / "h.svg")
    assert "3 patients   5,000 segments (1 beyond the axes)" in "\n".join(text)
    assert "80" in text and "5000" not in text


@pytest.mark.parametrize("truth, prediction", [
    ([36.0], [36.0]), ([30.0, 40.0], [35.0, 35.0]), (np.full(50, 36.0), np.full(50, 36.0))])
def test_the_histogram_is_drawn_from_one_segment_and_for_constant_predictions(
        tmp_path, truth, prediction):
    tk_utils.histogram_plot(truth, prediction, tmp_path / "h.png", {})
    assert pixels(tmp_path / "h.png").std() > 10


def test_a_note_is_a_red_field_in_both_figures_and_absent_without_one(tmp_path):
    for note in ("SIMULATED DATA", None):
        tk_utils.loss_lr_plot(trajectory(), tmp_path / f"loss{note}.png", note)
        tk_utils.histogram_plot([30., 40.], [31., 39.], tmp_path / f"hist{note}.png", {}, note)
    for name in ("loss", "hist"):
        assert red_pixels(tmp_path / f"{name}SIMULATED DATA.png") > 3000
        assert red_pixels(tmp_path / f"{name}None.png") == 0


def test_figures_come_as_pdf_too_and_leave_pyplot_alone(tmp_path):
    path = tmp_path / "h.pdf"
    ended = python('import sys, tk_utils\n'
                   f'tk_utils.histogram_plot([30, 40], [31, 39], {str(path)!r}, {{}})\n'
                   'print("matplotlib.pyplot" in sys.modules)')
    assert ended.stdout == "False\n", ended.stderr
    assert path.read_bytes().startswith(b"%PDF") and b"/Type3" not in path.read_bytes()
