"""Commands that are killed and repeated end in the same weights or the same file.

    python tests/faults/test_kills.py 99 30 0       # kills of training, of the others; seed

SIGKILL arrives at a random moment of a real run (start, training, saving, scoring, drawing; or
simulating, preparing, predicting), again and again, until a run ends by itself. Training saves its
state after each step. Every second run also syncs slowly, so that many kills fall inside a write.
Half of the kills of a single training process arrive at a call that changes files.
"""
# ruff: noqa: I001
import contextlib
import functools
import hashlib
import itertools
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path[:0] = [os.path.dirname(HERE)]
from conftest import (  # noqa: E402
    KEYS, children, fork, fork_ranks, little_work, make_file, needs_children, printed_by)

import predict  # noqa: E402
import prepare  # noqa: E402
import simulate  # noqa: E402
import tk_utils  # noqa: E402
import train_resnet  # noqa: E402
import training_header as header  # noqa: E402

OPTIONS = ["--data", "../d.h5", "--epochs", "3", "--batch-size", "4", "--device", "cpu"]
TRAINING = {"one process": [], "workers": ["--workers", "2"], "two ranks": []}
COMMANDS = {        # outside TRAINING, the last argument is the file that is compared
    **{kind: [train_resnet, *OPTIONS, *more] for kind, more in TRAINING.items()},
    "simulating": [simulate, "--patients", "16", "--segments", "2", "--out", "out.h5"],
    "preparing": [prepare, "../records", "--workers", "2", "--out", "out.h5"],
    "predicting": [predict, "../m.pth", "../records", "--out", "out.csv"]}


def work(kind, slow, kill_at):
    """Run a command; kill it at the `kill_at`-th of its calls that change files (0: never)."""
    module, *sys.argv[1:] = COMMANDS[kind]
    fsync, calls = os.fsync, itertools.count(1)

    def slow_fsync(file):
        time.sleep(0.05)
        fsync(file)

    def killed(function):
        def call(*arguments, **options):
            if next(calls) == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments, **options)
        return call

    if slow:
        os.fsync = slow_fsync
    for name in ("fsync", "replace", "remove", "makedirs", "open", "rename", "unlink"):
        setattr(os, name, killed(getattr(os, name)))
    header.training_loop.__kwdefaults__["checkpoint_minutes"] = 0       # after each step
    with little_work():
        return tk_utils.run_script(module.main, ValueError)


def start(folder, kind, slow=False, kill_at=0):
    """The processes of a run."""
    doing = functools.partial(work, kind, slow, kill_at)
    return fork_ranks(doing, folder) if kind == "two ranks" else [fork(doing, folder)]


def fingerprint(folder, kind):
    """A hash of the final weights, normaliser and trajectories, or of the file that was made."""
    if kind in TRAINING:
        saved = torch.load(folder / "runs/M1.5.pth", weights_only=True)
        weights = [values.numpy().tobytes() for values in saved["model"].values()]
        made = repr((weights, sorted(saved["normaliser"].items()))).encode()
        made += (folder / "runs/M1.5/trajectory.pth").read_bytes()
    else:
        made = (folder / COMMANDS[kind][-1]).read_bytes()
    return hashlib.sha256(made).hexdigest()


def kill(pid):
    """Kill a process and all that it started, as if the machine lost power."""
    os.kill(pid, signal.SIGSTOP)                # so that it starts no more meanwhile
    started = children(pid)
    os.kill(pid, signal.SIGKILL)
    for child in started:
        with contextlib.suppress(OSError):      # it has ended by itself
            kill(child)


@functools.lru_cache(maxsize=None)
def reference(base, kind):
    """(the fingerprint of an unbroken run, the seconds that it takes)."""
    folder = base / f"unbroken {kind}"
    folder.mkdir()
    begun = time.monotonic()
    printed_by(start(folder, kind), folder, seconds=600)
    return fingerprint(folder, kind), time.monotonic() - begun


def check_files(folder):
    """Check that every visible file is complete; returns how many there are."""
    paths = [path for path in folder.rglob("[!.]*") if path.is_file()]      # no locks, temporaries
    for path in paths:
        if path.suffix == ".pth":
            torch.load(path, weights_only=True)
        elif path.suffix == ".json":
            json.loads(path.read_text())
        elif path.suffix == ".png":
            assert path.read_bytes()[-8:-4] == b"IEND", path
        elif path.suffix == ".csv":
            assert path.read_text().endswith("\n"), path
    return len(paths)


def killed_runs(base, kind, kills, rng):
    """Kill runs of a kind until there were `kills` kills: (kills, completed runs)."""
    # workers do not change a bit of the result
    expected, usual_s = reference(base, "one process" if kind == "workers" else kind)
    done = completed = 0
    while done < kills:
        folder = base / f"{kind} {completed}"
        folder.mkdir()
        while done < kills:
            at_call = kind == "one process" and done % 4 >= 2
            processes = start(folder, kind, done % 2 == 1, rng.randint(1, 150) if at_call else 0)
            processes[0].join(None if at_call else rng.uniform(0.0, 1.1 * usual_s))
            if processes[0].exitcode is None:
                for process in processes:
                    kill(process.pid)
            for process in processes:
                process.join()
            if processes[0].exitcode != -signal.SIGKILL:
                printed_by(processes[:1], folder)
                break
            done += 1
            check_files(folder)
        else:                           # no kill is left
            printed_by(start(folder, kind), folder, seconds=600)
        assert check_files(folder) > (5 if kind in TRAINING else 0)
        assert fingerprint(folder, kind) == expected, f"{kind}: another result after {done} kills"
        for leftover in ("*tmp*", "*.partial*", "*resume.pth*"):
            assert not list(folder.rglob(leftover))
        shutil.rmtree(folder)
        completed += 1
    return done, completed


def make_inputs(folder):
    """A folder with data to train on, recordings, and a model that predicts."""
    make_file(folder / "d.h5", patients=6, encounters=1, rows=8)
    (folder / "records").mkdir()
    for number in range(4):
        fields = simulate.simulate_patient(5, number, 2, keep_abp=True)
        pd.DataFrame({"time_s": np.arange(7200) / 60, "abp": fields["abp"].ravel(),
                      "ppg": fields["ppg"].ravel()}).to_csv(
                          folder / "records" / f"{number}.csv", index=False)
    model = header.NormalisedModel(header.get_model_v3(3, widths=(4, 4, 8)), KEYS, {
        key: {"mean": 60.0, "sd": 10.0} for key in KEYS[1:]})
    header.save_checkpoint(folder / "m.pth", model)
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_inputs(tmp_path_factory.mktemp("kills"))


@needs_children
@pytest.mark.parametrize("kind", TRAINING)
def test_a_killed_run_ends_in_the_same_weights_to_the_last_bit(kind, base):
    kills = 2 if kind == "one process" else 1
    assert killed_runs(base, kind, kills, random.Random(len(kind)))[0] == kills


def main(kills, others, seed):
    rng = random.Random(seed)
    with tempfile.TemporaryDirectory() as folder:
        base = make_inputs(Path(folder))
        for kind in COMMANDS:
            share = (kills if kind in TRAINING else others) // 3
            done, completed = killed_runs(base, kind, share, rng)
            print(f"{kind}: {done} kills, {completed} runs completed, all with the result of the "
                  "unbroken run, no half-written file", flush=True)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
