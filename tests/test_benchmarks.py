"""Each benchmark runs at toy size and prints its table; gpu.py: test_kernels.py."""
import json
import os
import subprocess
import sys

import pytest
from conftest import ROOT, needs_children


@pytest.fixture(scope="module")
def folder(tmp_path_factory, run):
    folder = tmp_path_factory.mktemp("benchmarks")
    run("simulate.py", "--out", "s.h5", "--patients", 12, "--segments", 7, "--workers", 1,
        cwd=folder, check=0)
    return folder


@pytest.mark.parametrize("script, arguments, printed", [
    ("evaluation.py", ["coverage", "--repeats", 2, "--draws", 20], "patients"),
    ("evaluation.py", ["conformal", "--repeats", 3], "tune patients"),
    ("evaluation.py", ["scale", "--predictions", 20_000], "20,000 predictions of 40 patients"),
    ("read.py", ["--rows", 600, "--repeats", 1], "ours"),
    ("label.py", ["--segments", 10, "--repeats", 1], "segments/s"),
    ("label_error.py", ["--patients", 1, "--out", "study"], "wrote"),
    ("training.py", ["--data", "s.h5", "--seeds", 1, "--epochs", 1, "--only",
                     "spread_anchor_6_epochs"], "features"),
    ("patients.py", ["--patients", 10, "--segments", 1, "--seeds", 1, "--cohort", 12, 2, "--unseen",
                     6, "--", "--epochs", 1, "--threads", 1], "gradient_boosting_ppg"),
    ("real.py", ["--data", "s.h5", "--folds", 3, "--seeds", 1, "--", "--epochs", 1, "--threads", 1],
     "CALIBRATED")])
def test_a_benchmark_prints_its_table(folder, script, arguments, printed):
    done = subprocess.run([sys.executable, os.path.join(ROOT, "benchmarks", script),
                           *map(str, arguments)], cwd=folder, capture_output=True, text=True,
                          timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert printed in done.stdout and "FAILED" not in done.stdout, done.stdout
    if script == "training.py":
        assert list(json.loads((folder / "training.json").read_text())) == arguments[-1:]


@needs_children       # it reads /proc
def test_the_benchmark_of_scale_runs(folder):
    done = subprocess.run([sys.executable, os.path.join(ROOT, "benchmarks", "scale.py"), "--part",
                           "wait", "--repeats", "1"], cwd=folder, capture_output=True, text=True,
                          timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
