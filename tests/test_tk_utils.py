"""The toolkit: files that are whole or absent, exit codes, progress in a log file, figures."""
import json
import os
import re
import shutil
import signal
import stat
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import read_terminal

import tk_utils

ROOT = Path(__file__).resolve().parents[1]
RED = (0xb3, 0x26, 0x1e)


def python(code, **options):
    """Run `code` in a new interpreter that finds our modules."""
    environment = dict(os.environ, PYTHONPATH=str(ROOT))
    return subprocess.run([sys.executable, "-c", code], env=environment, timeout=60,
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)


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


def test_a_writer_killed_in_the_middle_leaves_the_old_file_and_nothing_a_glob_would_take(tmp_path):
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


def test_two_writers_of_one_file_do_not_share_a_temporary_and_the_last_one_wins(tmp_path):
    path = tmp_path / "x.json"
    with tk_utils.atomic_path(path) as second:
        with tk_utils.atomic_path(path) as first:
            Path(first).write_text("first")
            Path(second).write_text("second")
            assert first != second
        assert path.read_text() == "first"
    assert path.read_text() == "second"


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


@pytest.mark.skipif(os.name != "posix", reason="file modes of POSIX")
def test_a_new_file_gets_the_mode_that_any_new_file_gets(tmp_path):
    (tmp_path / "ordinary").write_text("")
    tk_utils.write_json(tmp_path / "x.json", {})
    assert (tmp_path / "x.json").stat().st_mode == (tmp_path / "ordinary").stat().st_mode


def test_a_very_long_name_can_be_written(tmp_path):
    path = tmp_path / ("n" * 250 + ".json")
    tk_utils.write_json(path, {})
    assert path.exists()


def test_json_has_sorted_keys_plain_numbers_and_null_for_what_is_not_finite(tmp_path):
    path = tmp_path / "m.json"
    tk_utils.write_json(path, {
        "b": np.float32(0.5), "a": [np.nan, float("inf"), np.int64(3)], 2: np.array([1.0, np.nan]),
        "c": (True, None, "mmHg²")})
    text = path.read_text(encoding="utf-8")
    assert json.loads(text) == {"2": [1.0, None], "a": [None, None, 3], "b": 0.5,
                                "c": [True, None, "mmHg²"]}
    assert re.findall(r'^  "(\w)"', text, re.M) == ["2", "a", "b", "c"]


def test_what_is_no_json_is_an_error_and_not_half_a_file(tmp_path):
    path = tmp_path / "m.json"
    with pytest.raises(TypeError):
        tk_utils.write_json(path, {"a": 1, "b": object()})
    assert os.listdir(tmp_path) == []


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
    assert "error: [Errno 28] No space left on device" in ended.stderr


def test_a_table_is_aligned_with_its_numbers_to_the_right(capsys):
    tk_utils.print_table([["ridge", 6.2, 1200, "0.42 [0.30, 0.50]"],
                          ["mean TPP", float("nan"), None, "\u22120.1"]],
                         ["baseline", "RMSE", "n", "skill"])
    assert capsys.readouterr().out.splitlines() == [
        "baseline  RMSE      n              skill",
        "--------  ----  -----  -----------------",
        "ridge     6.20  1,200  0.42 [0.30, 0.50]",
        "mean TPP   nan                      \u22120.1"]


def test_a_table_without_rows_shows_its_headers(capsys):
    tk_utils.print_table([], ["rule", "segments"])
    assert capsys.readouterr().out.splitlines() == ["rule  segments", "----  --------"]


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


def test_progress_yields_every_item_of_a_generator_of_unknown_length():
    ended = python("import tk_utils\n"
                   "print(sum(tk_utils.progress(i for i in range(10))))\n")
    assert ended.stdout == "45\n"
    assert ended.stderr.startswith("10it")


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


def test_versions_name_the_packages_and_neither_host_nor_user():
    import getpass
    import platform

    import torch
    found = tk_utils.versions()
    assert set(found) == {"python", "platform", "torch", "numpy", "h5py", "sklearn", "scipy"}
    assert found["numpy"] == np.__version__
    assert torch.__version__.startswith(found["torch"].split("+")[0])
    text = " ".join(map(str, found.values())).split()
    assert platform.node() not in text and getpass.getuser() not in text


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


def test_the_module_imports_alone_and_without_the_heavy_packages(tmp_path):
    shutil.copy(ROOT / "tk_utils.py", tmp_path)
    ended = subprocess.run(
        [sys.executable, "-c", 'import tk_utils, sys\n'
         'print([name for name in ("torch", "matplotlib", "sklearn", "tqdm") '
         'if name in sys.modules])'],
        cwd=tmp_path, stdout=subprocess.PIPE, text=True, timeout=60)
    assert ended.stdout == "[]\n"


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


def test_the_loss_figure_takes_tensors(tmp_path):
    import torch
    tensors = {key: torch.as_tensor(value) for key, value in trajectory().items()}
    tk_utils.loss_lr_plot(tensors, tmp_path / "tensors.png")
    tk_utils.loss_lr_plot(trajectory(), tmp_path / "arrays.png")
    np.testing.assert_array_equal(pixels(tmp_path / "tensors.png"), pixels(tmp_path / "arrays.png"))


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
    assert "3 patients    5,000 segments (1 beyond the axes)" in text
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
    assert path.read_bytes().startswith(b"%PDF")


@pytest.mark.parametrize("n", [1, 40, 20_000])          # points; of many their density
def test_the_figures_of_the_report_are_drawn_from_few_segments_and_many(tmp_path, n):
    import metrics
    rng = np.random.default_rng(0)
    truth = rng.normal(36, 12, n)
    prediction, patients = truth + rng.normal(0, 5, n), np.arange(n) % 50
    agreement = metrics.bland_altman(patients, truth, prediction)
    found = metrics.detection(patients, truth, prediction)
    reliability = metrics.reliability(patients, truth < 34, rng.random(n))
    figures = {
        "intervals": tk_utils.intervals_figure([("ridge", 7, 6, 8), ("mean", 9, 8, 11)],
                                               "RMSE (mmHg)", "SIMULATED DATA", line=7),
        "agreement": tk_utils.bland_altman_figure(truth, prediction, agreement, "SIMULATED DATA"),
        "detection": tk_utils.detection_figure(truth < 34, -prediction, found, reliability,
                                               "SIMULATED DATA"),
        "trend": tk_utils.trend_figure(truth[1:], prediction[1:], 5, "SIMULATED DATA"),
        "waves": tk_utils.waveforms_figure(rng.normal(size=(2, 3600)), ["a", "b"], 60,
                                           title_note="SIMULATED DATA")}
    for name, figure in figures.items():
        tk_utils.save_figure(figure, tmp_path / f"{name}.png")
        assert pixels(tmp_path / f"{name}.png").std() > 5
        assert red_pixels(tmp_path / f"{name}.png") > 1000, name


def test_the_roc_curve_passes_through_ties_as_one_step(tmp_path):
    event, score = np.array([True, False, True, False]), np.array([2.0, 1.0, 1.0, 0.0])
    found = {"auc": {"value": 0.875, "low": 0.5, "high": 1.0}, "threshold": 34,
             "sensitivity": {"value": 0.5}, "specificity": {"value": 1.0}}
    curve = tk_utils.detection_figure(event, score, found).axes[0].lines[0]
    assert curve.get_xdata().tolist() == [0, 0, 0.5, 1]
    assert curve.get_ydata().tolist() == [0, 0.5, 1, 1]


# ---------------------------------------------------------------- the page

def test_a_page_escapes_every_text_and_is_written_whole(tmp_path):
    bad = "<script>alert('&')</script>"
    body = (tk_utils.html_text(bad, "p", "note")
            + tk_utils.html_table([[bad, 1.5]], [bad, "n"], bad)
            + tk_utils.html_figure(tk_utils.new_figure(1, 1), f'"{bad}', bad))
    tk_utils.html_page(tmp_path / "new folder" / "p.html", bad, body)
    text = (tmp_path / "new folder" / "p.html").read_text(encoding="utf-8")
    assert "<script" not in text and text.count("&lt;script&gt;") >= 7
    assert 'alt="&quot;' in text and '<html lang="en">' in text and 'charset="utf-8"' in text
    assert os.listdir(tmp_path / "new folder") == ["p.html"]


def test_a_page_may_load_and_run_nothing(tmp_path):
    tk_utils.html_page(tmp_path / "p.html", "a {b} %s", "<p>{c}</p>")
    text = (tmp_path / "p.html").read_text(encoding="utf-8")
    assert "default-src 'none'" in text and "<title>a {b} %s</title>" in text and "{c}" in text
    assert "http://" not in text and "https://" not in text and "url(" not in text


def test_a_table_in_a_page_scrolls_in_its_box_and_aligns_numbers_right():
    text = tk_utils.html_table([["ridge", 6.254, 1200, "4.72 (4.27 to 5.21)"],
                                ["mean", None, 7, "9.00 (8.00 to 9.50)"]],
                               ["", "RMSE", "n", "95 %"])
    assert text.startswith("<div class=table role=region tabindex=0 aria-label=")
    assert "<td>ridge</td><td class=right>6.25</td><td class=right>1,200</td>" in text
    assert "<td class=right>4.72 (4.27 to 5.21)</td>" in text and "<td class=right></td>" in text
    assert "<th scope=col class=right>RMSE</th>" in text


def test_a_picture_in_a_page_is_embedded_with_its_size_and_needs_words():
    import base64
    figure = tk_utils.new_figure(4, 2)
    figure.subplots()
    text = tk_utils.html_figure(figure, "what it shows", "caption")
    data = base64.b64decode(re.search(r"base64,([^\"]+)", text).group(1))
    assert data.startswith(b"\x89PNG") and 'alt="what it shows"' in text
    width, height = map(int, re.search(r"width=(\d+) height=(\d+)", text).groups())
    assert 1.5 < width / height < 2.5 and "<figcaption>caption</figcaption>" in text
    with pytest.raises(ValueError, match="alt"):
        tk_utils.html_figure(figure, "")
