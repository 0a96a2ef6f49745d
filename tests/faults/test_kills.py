"""Training that is killed: the same command, given again, ends in the same weights.

    python tests/faults/test_kills.py 100 0         # kills, seed

SIGKILL arrives at a random moment of a real run (start, training, saving, scoring, drawing), again
and again, until the run ends by itself. Training saves its state after each step; every second run
also writes slowly (each sync waits), so that many kills fall inside a write; of one process, every
second kill arrives at a call that changes files.
"""
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

import pytest
import torch

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path[:0] = [os.path.dirname(HERE)]
from conftest import children, fork, fork_ranks, little_work, make_file, needs_children  # noqa: E402

import tk_utils  # noqa: E402
import train_resnet  # noqa: E402
import training_header as header  # noqa: E402

OPTIONS = ["--data", "../d.h5", "--epochs", "3", "--batch-size", "4", "--device", "cpu"]
KINDS = {"one process": [], "workers": ["--workers", "2"], "two ranks": []}


def work(kind, slow, kill_at):
    """What a killed process does."""
    sys.argv = ["train_resnet.py", *OPTIONS, *KINDS[kind]]
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
        return tk_utils.run_script(train_resnet.main, ValueError)


def start(folder, kind, slow=False, kill_at=0):
    """The processes of a run."""
    doing = functools.partial(work, kind, slow, kill_at)
    return fork_ranks(doing, folder) if kind == "two ranks" else [fork(doing, folder)]


def fingerprint(folder):
    """Of the final weights, the normaliser and the trajectories, to the bit."""
    found = hashlib.sha256()
    saved, trajectory = (torch.load(os.path.join(folder, "runs", name), weights_only=True)
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
    for process in start(folder, kind):
        process.join(600)
        assert process.exitcode == 0, printed(folder)
    return time.monotonic() - begun


def printed(folder):
    with open(os.path.join(folder, ".printed")) as file:
        return file.read()


@functools.lru_cache(maxsize=None)
def reference(base, kind):
    """(the end of an unbroken run, its seconds)."""
    folder = os.path.join(base, f"unbroken {kind}")
    os.makedirs(folder)
    seconds = run_to_the_end(folder, kind)
    return fingerprint(folder), seconds


def check_files(folder):
    """Raises where a file that a reader could find is not whole; returns how many there are."""
    count = 0
    for place, _, names in os.walk(folder):
        for name in names:
            path = os.path.join(place, name)
            if name.startswith("."):        # locks, temporaries
                continue
            count += 1
            if name.endswith(".pth"):
                torch.load(path, weights_only=True)
            elif name.endswith(".json"):
                with open(path) as file:
                    json.load(file)
            elif name.endswith(".png"):
                with open(path, "rb") as file:
                    assert file.read()[-8:-4] == b"IEND", path
            elif name.endswith(".csv"):
                with open(path) as file:
                    assert file.read().endswith("\n"), path
    return count


def killed_runs(base, kind, kills, rng):
    """So many kills of runs of this kind: (kills, runs that were completed between them)."""
    # loader workers change nothing, to the bit
    expected, usual_s = reference(base, "one process" if kind == "workers" else kind)
    done = completed = 0
    while done < kills:
        folder = os.path.join(base, f"{kind} {completed}")
        os.makedirs(folder)
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
                assert processes[0].exitcode == 0, printed(folder)
                break
            done += 1
            check_files(folder)
            if done >= kills:
                run_to_the_end(folder, kind)
                break
        assert check_files(folder) > 5
        assert fingerprint(folder) == expected, f"{kind}: another end after {done} kills"
        left = [name for _, _, names in os.walk(folder) for name in names
                if "tmp" in name or ".partial" in name]
        assert not left and not os.path.exists(os.path.join(folder, "runs/M1.5/resume.pth")), left
        shutil.rmtree(folder)
        completed += 1
    return done, completed


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    base = tmp_path_factory.mktemp("kills")
    make_file(base / "d.h5", patients=6, encounters=1, rows=8)
    return str(base)


@needs_children
@pytest.mark.parametrize("kind", KINDS)
def test_a_killed_run_ends_in_the_same_weights_to_the_last_bit(kind, base):
    kills = 2 if kind == "one process" else 1
    assert killed_runs(base, kind, kills, random.Random(len(kind)))[0] == kills


def main(kills, seed):
    rng = random.Random(seed)
    with tempfile.TemporaryDirectory() as base:
        make_file(os.path.join(base, "d.h5"), patients=6, encounters=1, rows=8)
        for number, kind in enumerate(KINDS):
            share = kills // 2 if number == 0 else (kills + 3) // 4
            done, completed = killed_runs(base, kind, share, rng)
            print(f"{kind}: {done} kills, {completed} runs completed, all with the end of the "
                  "unbroken run, 0 half-written files", flush=True)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
