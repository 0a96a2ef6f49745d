"""Run each benchmark at toy size and check that it prints its table."""
import json
import os

import pytest
from conftest import little_work, make_file, needs_children, run

import models
import simulate


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("benchmarks")
    simulate.simulate_file(folder / "s.h5", 12, 7, 0)
    simulate.simulate_file(folder / "other.h5", 8, 2, 1)
    make_file(folder / "line.h5", 12, 1, 4)
    with little_work(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(models, "get_model_v3", lambda vitals: models.MODELS["resnet_v3"](vitals))
        yield folder


@pytest.mark.parametrize("script, arguments, said", [
    ("evaluation.py", ["coverage", "--repeats", 1, "--draws", 20], "patients"),
    ("evaluation.py", ["conformal", "--repeats", 1], "tune patients"),
    ("evaluation.py", ["scale", "--predictions", 20_000], "20,000 predictions of 40 patients"),
    ("read.py", ["--rows", 600, "--repeats", 1], "ours"),
    ("label.py", ["--segments", 10, "--repeats", 1], "segments/s"),
    ("label_error.py", ["--patients", 1, "--out", "study"], "wrote"),
    ("training.py", ["--data", "s.h5", "--seeds", 1, "--epochs", 1, "--only",
                     "spread_anchor_6_epochs"], "features"),
    ("patients.py", ["--patients", 10, "--segments", 1, "--seeds", 1, "--cohort", 12, 2, "--unseen",
                     6, "--", "--epochs", 1, "--threads", 1], "gradient_boosting_ppg"),
    ("real.py", ["--data", "s.h5", "--folds", 3, "--seeds", 1, "--", "--epochs", 1, "--threads", 1],
     "CALIBRATED"),
    ("real.py", ["--data", "s.h5", "other.h5", "--each-file", "--seeds", 1, "--", "--epochs", 1,
                 "--threads", 1], "model's skill"),
    ("few_patients.py", ["line.h5", "--folds", 3, "--epochs", 1, "--only", "augmented",
                         "pretrained", "no_anchor", "--test"], "model's skill"),
    pytest.param("scale.py", ["--part", "wait", "--repeats", 1], "loader wait",
                 marks=needs_children)])      # it reads /proc
def test_a_benchmark_prints_its_table(folder, script, arguments, said, scripts_here, monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 1)     # simulate without processes
    done = run(f"benchmarks/{script}", *arguments, cwd=folder, check=0)
    assert said in done.stdout and "FAILED" not in done.stdout, done.stdout
    if script == "training.py":
        assert list(json.loads((folder / "training.json").read_text())) == arguments[-1:]


def test_the_gpu_benchmark_runs_at_toy_size_on_cpu(folder):
    out = run("benchmarks/gpu.py", "--device", "cpu", "--json", folder / "gpu.json",
              "--ablate-kernels", check=0).stdout
    assert "FAILED" not in out and (folder / "gpu.json").exists(), out
