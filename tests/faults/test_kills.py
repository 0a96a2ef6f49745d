"""Runs that are killed: started again with the same command, they end in the same weights.

    python tests/faults/test_kills.py 100 0         # so many kills, seed; prints what happened

SIGKILL arrives at a random moment of a real run (start, training, saving, scoring, drawing), again
and again, until the run ends by itself. The state is saved after each step; every second run also
writes slowly (each sync waits), so that many kills fall inside a write.
"""
import contextlib
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time

import pytest
import torch

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path[:0] = [os.path.dirname(HERE)]
from conftest import ROOT, children, make_file, needs_children  # noqa: E402

SCRIPT = """
import os, sys, time
sys.path[:0] = [{root!r}]
import train_resnet, tk_utils, training_header
training_header.training_loop.__kwdefaults__["checkpoint_minutes"] = 0      # after each step
if {slow}:
    fsync = os.fsync
    os.fsync = lambda file: (time.sleep(0.05), fsync(file))[1]
sys.exit(tk_utils.run_script(train_resnet.main, ValueError))
"""
OPTIONS = ["--data", "../d.h5", "--epochs", "3", "--batch-size", "4", "--device", "cpu"]
KINDS = {
    "one process": ([], []),
    "workers": ([], ["--workers", "2"]),
    "two ranks": (["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"], []),
}


def start(folder, kind, slow=False):
    launcher, options = KINDS[kind]
    script = os.path.join(os.path.dirname(folder), f"train_{'slowly' if slow else 'fast'}.py")
    with open(script, "w") as file:
        file.write(SCRIPT.format(root=ROOT, slow=slow))
    return subprocess.Popen([sys.executable, *launcher, script, *OPTIONS, *options], cwd=folder,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                            start_new_session=True,
                            env=dict(os.environ, OMP_NUM_THREADS="1", MPLBACKEND="agg"))


def fingerprint(folder):
    """Of the final weights, the normaliser and the trajectories, to the last bit."""
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
    """The seconds that a run takes, unless it has ended before. Raises for a failed run."""
    begun = time.monotonic()
    process = start(folder, kind)
    output = process.communicate(timeout=600)[0]
    assert process.returncode == 0, output
    return time.monotonic() - begun


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
    reference = os.path.join(base, "reference")
    os.makedirs(reference)
    usual_s = run_to_the_end(reference, kind)
    expected, done, completed = fingerprint(reference), 0, 0
    while done < kills:
        folder = os.path.join(base, f"run{completed}")
        os.makedirs(folder)
        while True:
            process = start(folder, kind, slow=done % 2 == 1)
            try:
                output = process.communicate(timeout=rng.uniform(0.0, 1.1 * usual_s))[0]
                assert process.returncode == 0, output
                break
            except subprocess.TimeoutExpired:
                kill(process.pid)
                process.communicate()
                done += 1
                check_files(folder)
                if done >= kills:
                    run_to_the_end(folder, kind)
                    break
        assert check_files(folder) > 5
        assert fingerprint(folder) == expected, f"{kind}: other weights after {done} kills"
        left = [name for _, _, names in os.walk(folder) for name in names if "tmp" in name]
        assert not left and not os.path.exists(os.path.join(folder, "runs/M1.5/resume.pth")), left
        shutil.rmtree(folder)
        completed += 1
    return done, completed


@needs_children
@pytest.mark.parametrize("kind", KINDS)
def test_a_killed_run_ends_in_the_same_weights_to_the_last_bit(kind, tmp_path):
    make_file(tmp_path / "d.h5", patients=6, encounters=1, rows=8)
    kills = 2 if kind == "one process" else 1
    assert killed_runs(str(tmp_path), kind, kills, random.Random(len(kind)))[0] == kills


def main(kills, seed):
    rng = random.Random(seed)
    for number, kind in enumerate(KINDS):
        share = kills // 2 if number == 0 else (kills + 3) // 4
        with tempfile.TemporaryDirectory() as base:
            make_file(os.path.join(base, "d.h5"), patients=6, encounters=1, rows=8)
            done, completed = killed_runs(base, kind, share, rng)
            print(f"{kind}: {done} kills, {completed} runs completed, all with the weights of the "
                  "unbroken run, 0 half-written files", flush=True)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
