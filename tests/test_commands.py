"""The scripts at the command line, and files that are copied out of the repository."""
import ast
import json
import os
import re
import subprocess
import sys

import pytest
from conftest import ROOT, little_work, read_ours, run

OPTIONS = {
    "train_resnet": "data keys condition split-seed epochs batch-size lr weight-decay recipe model "
                    "loss init-from seed seeds folds ablate precision name device workers threads "
                    "fresh tensorboard device-cache",
    "evaluate": "data split condition json report model calibrate",
    "predict": "out figure map dbp hr vitals abp-channel ppg-channel fs unit export model",
    "prepare": "out report workers groups label-method align list-channels abp-channel ppg-channel "
               "fs unit",
    "simulate": "out patients segments seed workers label-method"}


@pytest.mark.parametrize("module", OPTIONS)
def test_help_explains_every_option_in_words(module):
    text = run(f"{module}.py", "--help", check=0).stdout
    entries = {re.match(r"--([\w-]+)", entry).group(1): entry
               for entry in re.split(r"^  (?=-)", text, flags=re.M)[1:] if entry.startswith("--")}
    assert set(entries) == set(OPTIONS[module].split())
    for name, entry in entries.items():
        explanation = re.sub(r"(?s)\{.*?\}|\[.*?\]|[A-Z_.:]{2,}", "", entry.split("\n\n")[0])
        assert len(re.findall(r"\b[a-z]{2,}\b", explanation)) >= 2, f"--{name}"
    assert "\nexit codes: 0 done; 1 (prepare.py, predict.py) done, but some records" in text
    assert "default: None" not in text and sum(map(len, map(str.split, OPTIONS.values()))) <= 60


IMPORT = """
import random, numpy, torch
states = lambda: (torch.get_rng_state().tolist(), random.getstate(), repr(numpy.random.get_state()))
before = states()
from training_header import *
TPP_PPG_dataset, create_dataset_index, load_dataset_index, split_index, make_loader, fit_normaliser
get_model_v3, MyFirstResNet, ConvBlock, ResBlockV1, ResBlockV2, ResBlockV3, training_loop
StepLR, CosineAnnealingLR, ReduceLROnPlateau, CheckpointError, save_checkpoint, load_model, LOSSES
assert "signal" not in globals()
import evaluate, predict, sys, tk_utils, train_resnet
assert states() == before and not torch.cuda.is_initialized()
sys.argv = ["train_resnet.py", "--help"]
tk_utils.run_script(train_resnet.main)
"""


def test_importing_does_no_work_and_help_comes_without_delay(tmp_path):
    resource = pytest.importorskip("resource", reason="processor times of children are of POSIX")
    environment = dict(os.environ, PYTHONIOENCODING="ascii", PYTHONPATH=ROOT)

    def seconds():          # of processor
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run([sys.executable, "-c", IMPORT], cwd=tmp_path, env=environment,
                              capture_output=True, text=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert done.returncode == 0 and os.listdir(tmp_path) == [], done.stderr
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    assert seconds() < 8 or seconds() < 8       # at first, Python may compile the packages


@pytest.mark.parametrize("command", ["evaluate.py runs/none.pth", "predict.py none.pth r.csv"])
def test_errors_name_the_next_command(command, tmp_path):
    line, = run(*command.split(), cwd=tmp_path, check=2).stderr.splitlines()
    assert "train_resnet.py" in line and os.listdir(tmp_path) == []


def test_seeds_are_trained_and_scored_on_a_console_of_ascii(tmp_path):
    def on_ascii(*command):
        return run(*command, cwd=tmp_path, check=0, encoding="ascii").stdout

    with little_work():
        on_ascii("simulate.py", "--out", "s.h5", "--patients", 12, "--segments", 2, "--workers", 1)
        out = on_ascii("train_resnet.py", "--data", "s.h5", "--seeds", 2, "--epochs", 1,
                       "--batch-size", 8, "--name", "x")
        assert re.search(r"^x_seed0 \(1 of 2\): RMSE [\d.]+ mmHg", out, re.M)
        on_ascii("evaluate.py", "runs/x_seed0.pth", "runs/x_seed1.pth", "--json", "x.json")
    summary, scored = (json.loads((tmp_path / name).read_text())
                       for name in ("runs/x/summary.json", "x.json"))
    assert scored["together"]["tpp"] == summary["together"]["tpp"]


def needed(module):
    """Our modules that a module imports, directly or through others."""
    nodes = list(ast.walk(ast.parse(read_ours(f"{module}.py"))))
    names = {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
    names |= {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    ours = {name for name in names if os.path.exists(os.path.join(ROOT, f"{name}.py"))}
    return ours.union(*map(needed, ours))


@pytest.mark.parametrize("module, others", [
    ("models", ()), ("datasets", ()), ("signals", ()),
    ("labels", ("signals",)), ("recordings", ("formats", "tables")), ("metrics", ()),
    ("tk_utils", ()), ("checkpoint", ("models", "datasets", "tk_utils")), ("training_header", (
        "anchor", "checkpoint", "models", "datasets", "loaders", "tk_utils", "kernels",
        "cuda_graph"))])
def test_a_module_imports_only_the_modules_that_its_docstring_names(module, others):
    assert needed(module) == set(others)
    says = ast.get_docstring(ast.parse(read_ours(f"{module}.py")))
    if others:
        assert all(f"{name}.py" in says for name in others)
    else:
        assert re.search(r"\balone\b|no other file|nothing else|copy this file|needs only", says)
