"""Commands that are killed: given again, they end in the same weights or the same file.

    python tests/faults/test_kills.py 100 30 0      # kills of training, of the others, seed

SIGKILL arrives at a random moment of a real run (start, training, saving, scoring, drawing; or
simulating, preparing, predicting), again and again, until the run ends by itself. Training saves
its state after each step; every second run also writes slowly (each sync waits), so that many kills
fall inside a write; of one process, every second kill arrives at a call that changes files.
"""
# ruff: noqa: I001
import contextlib
import functools
import hashlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

import h5py
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
KINDS = {"one process": [], "workers": ["--workers", "2"], "two ranks": []}
# The last argument is the file that must come out the same.
COMMANDS = {
    "simulating": [simulate, "--patients", "16", "--segments", "2", "--out", "out.h5"],
    "preparing": [prepare, "../records", "--workers", "2", "--out", "out.h5"],
    "predicting": [predict, "../m.pth", "../records", "--out", "out.csv"]}


def work(kind, slow, kill_at):
    """What a killed process does."""
    module, *options = COMMANDS.get(kind) or [train_resnet, *OPTIONS, *KINDS[kind]]
    sys.argv = ["script.py", *options]
    if kind in COMMANDS:
        return tk_utils.run_script(module.main, ValueError)
    fsync, calls = os.fsync, []
    if slow:
        os.fsync = lambda file: (time.sleep(0.05), fsync(file))[1]

    def killed_at(function):
        def call(*arguments, **options):
            calls.append(function)
            if len(calls) == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments, **options)
        return call

    for name in ("fsync", "replace", "remove", "makedirs", "open", "rename", "unlink"):
        setattr(os, name, killed_at(getattr(os, name)))
    header.training_loop.__kwdefaults__["checkpoint_minutes"] = 0       # after each step
    with little_work():
        return tk_utils.run_script(module.main, ValueError)


def start(folder, kind, slow=False, kill_at=0):
    """The processes of a run."""
    doing = functools.partial(work, kind, slow, kill_at)
    return fork_ranks(doing, folder) if kind == "two ranks" else [fork(doing, folder)]


def fingerprint(folder, kind):
    """Of the final weights, the normaliser and the trajectories, or of the file, to the bit."""
    found = hashlib.sha256()
    if kind in COMMANDS:
        path = folder / COMMANDS[kind][-1]
        if path.suffix == ".h5":
            with h5py.File(path, "r") as file:
                file.visititems(lambda name, item: found.update(name.encode() + (
                    item[()].tobytes() if isinstance(item, h5py.Dataset) else b"")))
        else:
            found.update(path.read_bytes())
        return found.hexdigest()
    saved, trajectory = (torch.load(folder / "runs" / name, weights_only=True)
                         for name in ("M1.5.pth", "M1.5/trajectory.pth"))
    for tensors in (saved["model"], trajectory):
        for name, values in tensors.items():
            found.update(name.encode() + values.numpy().tobytes())
    found.update(repr(sorted(saved["normaliser"].items())).encode())
    return found.hexdigest()


def kill(pid):
    """A process and all that it started, as when the machine loses power."""
    os.kill(pid, signal.SIGSTOP)                # it starts no more while we look
    started = children(pid)
    os.kill(pid, signal.SIGKILL)
    for child in started:
        with contextlib.suppress(OSError):      # ended by itself
            kill(child)


def run_to_the_end(folder, kind):
    """The seconds that a run takes, unless it has ended before."""
    begun = time.monotonic()
    printed_by(start(folder, kind), folder, seconds=600)
    return time.monotonic() - begun


@functools.lru_cache(maxsize=None)
def reference(base, kind):
    """(the end of an unbroken run, its seconds)."""
    folder = base / f"unbroken {kind}"
    folder.mkdir()
    seconds = run_to_the_end(folder, kind)
    return fingerprint(folder, kind), seconds


def check_files(folder):
    """Raises where a file that a reader could find is not whole; returns how many there are."""
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
    """So many kills of runs of this kind: (kills, runs that were completed between them)."""
    # loader workers change nothing, to the bit
    expected, usual_s = reference(base, "one process" if kind == "workers" else kind)
    done = completed = 0
    while done < kills:
        folder = base / f"{kind} {completed}"
        folder.mkdir()
        while True:
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
            if done >= kills:
                run_to_the_end(folder, kind)
                break
        assert check_files(folder) > (0 if kind in COMMANDS else 5)
        assert fingerprint(folder, kind) == expected, f"{kind}: another end after {done} kills"
        left = [path for part in ("tmp", ".partial", "resume.pth")
                for path in folder.rglob(f"*{part}*")]
        assert not left, left
        shutil.rmtree(folder)
        completed += 1
    return done, completed


def make_inputs(folder):
    """Data to train on, recordings, and a model that predicts."""
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


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    base = tmp_path_factory.mktemp("kills")
    make_inputs(base)
    return base


@needs_children
@pytest.mark.parametrize("kind", KINDS)
def test_a_killed_run_ends_in_the_same_weights_to_the_last_bit(kind, base):
    kills = 2 if kind == "one process" else 1
    assert killed_runs(base, kind, kills, random.Random(len(kind)))[0] == kills


def main(kills, others, seed):
    rng = random.Random(seed)
    shares = {kind: kills // 2 if number == 0 else (kills + 3) // 4
              for number, kind in enumerate(KINDS)}
    shares.update(dict.fromkeys(COMMANDS, (others + 2) // 3))
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder)
        make_inputs(base)
        for kind, share in shares.items():
            done, completed = killed_runs(base, kind, share, rng)
            print(f"{kind}: {done} kills, {completed} runs completed, all with the end of the "
                  "unbroken run, 0 half-written files", flush=True)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
