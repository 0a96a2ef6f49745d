"""The scripts at the command line: quick help, plain output, dry runs, following a run, spawn."""
import os
import re
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT, read_terminal

SCRIPTS = ["train_resnet.py", "evaluate.py", "predict.py", "prepare.py", "simulate.py"]
SLOW = {"torch", "scipy", "sklearn", "matplotlib", "h5py", "pandas", "wfdb"}
ESCAPE = "\x1b"


@pytest.fixture(scope="module")
def trained(tmp_path_factory, simulated, run):
    """A folder with a finished run of one epoch, followed with --tensorboard."""
    pytest.importorskip("tensorboard", reason="the package tensorboard is not installed")
    folder = tmp_path_factory.mktemp("trained")
    run("train_resnet.py", "--data", simulated, "--epochs", 1, "--batch-size", 16, "--name", "a",
        "--tensorboard", cwd=folder, check=0)
    return folder


# ------------------------------------------------------------------------------------------- help

@pytest.mark.parametrize("script", SCRIPTS)
def test_help_comes_within_half_a_second(script, tmp_path):
    resource = pytest.importorskip("resource", reason="processor times of children are of POSIX")

    def seconds():
        """Of the processor: other work on this machine does not count."""
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, os.path.join(ROOT, script), "--help"], cwd=tmp_path,
                       check=True, stdout=subprocess.DEVNULL)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    assert min(seconds() for _ in range(3)) < 0.5


def test_help_of_the_look_up_of_names_waits_for_nothing_slow_either(tmp_path):
    done = subprocess.run([sys.executable, "-X", "importtime", os.path.join(ROOT, "datasets.py"),
                           "--help"], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert not re.search(r"\| +torch$", done.stderr, re.M)


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_imports_nothing_slow(script, tmp_path):
    done = subprocess.run([sys.executable, "-X", "importtime", os.path.join(ROOT, script),
                           "--help"], cwd=tmp_path, capture_output=True, text=True, check=True)
    imported = set(re.findall(r"\| +(\w+)$", done.stderr, re.M))
    assert "argparse" in imported
    assert not imported & SLOW


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_groups_the_options_and_explains_each(script, run, tmp_path):
    text = run(script, "--help", cwd=tmp_path, check=0).stdout
    groups = re.findall(r"^([a-z][\w -]+):$", text, re.M)
    assert len(set(groups) - {"options", "optional arguments", "positional arguments"}) >= 2
    options = re.split(r"^  (?=-)", text, flags=re.M)[1:]
    for option in options:
        head, *_ = option.split("\n\n")
        words = re.sub(r"\{.*?\}|\[.*?\]", "", head.replace("\n", " ")).split()
        assert len([word for word in words if word.islower()]) >= 1, f"{script}: {head!r}"
    assert "(default: None)" not in text


def test_a_wrong_option_is_an_error_of_one_line_and_exit_code_2(run, tmp_path):
    for script in SCRIPTS:
        done = run(script, "--no-such-option", cwd=tmp_path, check=2)
        line, = done.stderr.splitlines()
        assert line.startswith("error: ") and line.endswith("(--help lists the options)")
        assert "Traceback" not in done.stderr


# --------------------------------------------------------------------------- output and exit codes

def test_errors_name_the_next_command(run, tmp_path, simulated):
    for script, arguments, advice in (
            ("evaluate.py", ["runs/none.pth"], "python train_resnet.py"),
            ("train_resnet.py", ["--plot-log", "--name", "none"], "python train_resnet.py --name"),
            ("train_resnet.py", ["--data", "none.h5"], "prepare.py")):
        done = run(script, *arguments, cwd=tmp_path, check=2)
        assert len(done.stderr.splitlines()) == 1 and advice in done.stderr
    assert not (tmp_path / "runs").exists() or not list((tmp_path / "runs").glob("*.pth"))


def test_output_into_a_file_holds_no_bars_and_no_colours(run, tmp_path):
    done = run("simulate.py", "--out", "s.h5", "--patients", 2, "--segments", 1, "--workers", 1,
               cwd=tmp_path, check=0)
    assert "simulating: 100%" in done.stderr
    for text in (done.stdout, done.stderr):
        assert ESCAPE not in text and "\r" not in text and "█" not in text


@pytest.mark.skipif(os.name != "posix", reason="pseudo-terminals are of POSIX")
def test_no_color_is_heeded_in_a_terminal(tmp_path):
    import pty
    main, terminal = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, os.path.join(ROOT, "simulate.py"), "--out", "s.h5", "--patients", "2",
         "--segments", "1", "--workers", "1"], cwd=tmp_path, stdout=terminal, stderr=terminal,
        env=dict(os.environ, NO_COLOR="1", TERM="xterm-256color"))
    os.close(terminal)
    seen = read_terminal(main)
    assert process.wait() == 0
    assert "simulating" in seen.decode() and not re.search("\x1b\\[[0-9;]*m", seen.decode())


# --------------------------------------------------------------------------------------- dry run

def test_a_dry_run_says_what_would_happen_and_writes_nothing(run, tmp_path, simulated):
    before = set(os.listdir(os.path.dirname(simulated)))
    done = run("train_resnet.py", "--data", simulated, "--dry-run", "--batch-size", 16, "--name",
               "planned", "--epochs", 7, "--keep-index", cwd=tmp_path, check=0)
    assert re.search(r"^train: \d+ segments of \d+ patients$", done.stdout, re.M)
    assert f"{os.path.getsize(simulated) / 1e6:,.1f}" in done.stdout
    assert re.search(r"2\.57 M weights on \w+: 7 epochs of \d+ steps of 16, \d+ ms each "
                     r"\(5 steps timed\), so about [\d.]+ min", done.stdout)
    for file in ("runs/planned.pth", "runs/planned_resume.pth", "runs/planned_log.csv",
                 "figures_resnet/loss_lr_plot.png"):
        assert re.search(rf"^{re.escape(file)} ", done.stdout, re.M)
    assert os.listdir(tmp_path) == [] and set(os.listdir(os.path.dirname(simulated))) == before


def test_a_dry_run_without_data_says_that_it_would_simulate(run, tmp_path):
    done = run("train_resnet.py", "--dry-run", cwd=tmp_path, check=0)
    assert "would simulate 1,200 patients of 3 segments first" in done.stdout
    assert "python simulate.py --out data/simulated_1200x3_seed0.h5" in done.stdout
    assert os.listdir(tmp_path) == []


# --------------------------------------------------------------------------------- following a run

def test_tensorboard_gets_losses_rate_scores_speed_and_figures(trained):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    events = EventAccumulator(str(trained / "runs" / "a_tensorboard"))
    events.Reload()
    assert set(events.Tags()["scalars"]) == {
        "loss/train", "loss/tune", "learning rate", "train segments per second", "tune/rmse",
        "tune/mae", "tune/mead", "tune/bias", "tune/sd", "tune/r2", "tune/p_crit_r2"}
    assert events.Tags()["images"] == ["tune"]
    log = np.genfromtxt(trained / "runs" / "a_log.csv", delimiter=",", names=True)
    loss, = events.Scalars("loss/tune")
    assert loss.step == 1 and loss.value == pytest.approx(float(log["tune_loss"]), rel=1e-4)
    rmse, = events.Scalars("tune/rmse")
    assert rmse.value ** 2 == pytest.approx(loss.value, rel=1e-4)


def test_following_a_run_does_not_change_it(trained, run, simulated):
    import torch
    run("train_resnet.py", "--data", simulated, "--epochs", 1, "--batch-size", 16, "--name", "b",
        cwd=trained, check=0)
    followed, plain = (torch.load(trained / "runs" / f"{name}.pth", weights_only=True)
                       for name in "ab")
    assert followed["config"] == plain["config"]
    assert all(torch.equal(followed["model"][key], plain["model"][key]) for key in plain["model"])


def test_without_the_package_tensorboard_the_install_line_is_named(tmp_path, simulated):
    program = ("import importlib.util, runpy, sys\n"
               "find = importlib.util.find_spec\n"
               "importlib.util.find_spec = lambda name, *more: "
               "None if name == 'tensorboard' else find(name, *more)\n"
               f"sys.path.insert(0, {ROOT!r})\n"
               f"sys.argv = ['train_resnet.py', '--data', {simulated!r}, '--tensorboard']\n"
               f"runpy.run_path({os.path.join(ROOT, 'train_resnet.py')!r}, run_name='__main__')\n")
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True,
                          text=True)
    assert done.returncode == 2 and "pip install tensorboard" in done.stderr
    assert os.listdir(tmp_path) == []


def test_plot_log_draws_the_same_figures_from_files(trained, run):
    folder = trained / "figures_resnet"
    before = {name: (folder / name).read_bytes() for name in os.listdir(folder)}
    for name in before:
        (folder / name).unlink()
    run("train_resnet.py", "--plot-log", "--name", "a", cwd=trained, check=0)
    assert set(os.listdir(folder)) == {"loss_lr_plot.png", "histogram_plot.png"}
    assert (folder / "histogram_plot.png").read_bytes() == before["histogram_plot.png"]
    os.rename(trained / "runs" / "a_log.csv", trained / "moved.csv")    # the trajectory is enough
    run("train_resnet.py", "--plot-log", "--name", "a", cwd=trained, check=0)
    os.rename(trained / "moved.csv", trained / "runs" / "a_log.csv")


# ------------------------------------------------------------------------- spawn (macOS, Windows)

def test_loader_workers_started_by_spawn_give_the_same_batches(tmp_path, simulated):
    """As on macOS and Windows, and from Python 3.14 on nearly so on Linux (forkserver)."""
    program = f"""
import multiprocessing, sys
sys.path.insert(0, {ROOT!r})
from training_header import *

def batches(workers):
    index = create_dataset_index(path={simulated!r})
    data = TPP_PPG_dataset(index, "segment", ["ppg", "map", "dbp", "hr", "tpp"])
    loader = make_loader(data, 16, shuffle=True, seed=3, workers=workers)
    return [[tensor.clone() for tensor in batch] for epoch in range(2) for batch in loader]

if __name__ == "__main__":
    multiprocessing.set_start_method("spawn")
    plain, spawned = batches(0), batches(2)
    assert len(plain) == len(spawned) > 4
    for ours, theirs in zip(plain, spawned):
        assert len(ours) == 5 and all(map(lambda a, b: a.equal(b), ours, theirs))
    print("the same", len(plain))
"""
    (tmp_path / "program.py").write_text(program)
    done = subprocess.run([sys.executable, "program.py"], cwd=tmp_path, capture_output=True,
                          text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("the same")


def test_processes_of_simulate_and_prepare_are_spawned_and_change_nothing(tmp_path, run):
    import h5py
    for workers in (1, 2):
        run("simulate.py", "--out", f"s{workers}.h5", "--patients", 3, "--segments", 2, "--abp",
            "--workers", workers, cwd=tmp_path, check=0)
    with h5py.File(tmp_path / "s1.h5") as one, h5py.File(tmp_path / "s2.h5") as two:
        assert list(one) == list(two)
        for number, name in enumerate(one):
            waves = {key: one[name]["1"][key][()].ravel() for key in ("abp", "ppg")}
            assert np.array_equal(waves["ppg"], two[name]["1"]["ppg"][()].ravel())
            table = np.column_stack([np.arange(7200) / 60, waves["abp"], waves["ppg"]])
            np.savetxt(tmp_path / f"r{number}.csv", table, delimiter=",", comments="",
                       header="time_s,abp_mmhg,ppg", fmt="%.7g")
    inputs = [f"r{number}.csv" for number in range(3)]
    for workers in (1, 2):
        run("prepare.py", *inputs, "--out", f"p{workers}.h5", "--workers", workers, cwd=tmp_path,
            check=0)
    with h5py.File(tmp_path / "p1.h5") as one, h5py.File(tmp_path / "p2.h5") as two:
        found = [[(place, item[()]) for place, item in walk(file)] for file in (one, two)]
    assert [place for place, _ in found[0]] == [place for place, _ in found[1]]
    for (_, ours), (_, theirs) in zip(*found):
        np.testing.assert_array_equal(ours, theirs)


def walk(file):
    import h5py
    found = []
    file.visititems(lambda place, item: found.append((place, item))
                    if isinstance(item, h5py.Dataset) else None)
    return found
