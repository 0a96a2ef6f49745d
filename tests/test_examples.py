"""The examples run from top to bottom, shortened by their own options, as their first lines say."""
import glob
import json
import os
import re
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT

EXAMPLES = os.path.join(ROOT, "examples")


def run_example(name, *arguments, cwd):
    done = subprocess.run([sys.executable, os.path.join(EXAMPLES, name), *map(str, arguments)],
                          cwd=cwd, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture
def empty_folder_with_models(tmp_path):
    shutil.copy(os.path.join(ROOT, "models.py"), tmp_path)
    return tmp_path


def test_models_alone_train_on_ones_own_arrays_in_an_empty_folder(empty_folder_with_models):
    import numpy as np
    rng = np.random.default_rng(0)
    np.savez(empty_folder_with_models / "mine.npz", ppg=rng.normal(size=(40, 3600)) * 7 + 100,
             vitals=rng.normal(80, 10, (40, 3)), target=rng.normal(40, 9, 40),
             patient=np.repeat(np.arange(10), 4))
    shutil.copy(os.path.join(EXAMPLES, "own_arrays.py"), empty_folder_with_models)
    done = subprocess.run([sys.executable, "own_arrays.py", "--arrays", "mine.npz", "--epochs",
                           "1"], cwd=empty_folder_with_models, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert re.search(r"epoch 1: RMSE [\d.]+ mmHg on 8 held-out segments", done.stdout)
    assert (empty_folder_with_models / "own_arrays.pth").exists()


def test_the_notebook_runs_from_top_to_bottom(empty_folder_with_models):
    with open(os.path.join(EXAMPLES, "own_arrays.ipynb"), encoding="utf-8") as file:
        notebook = json.load(file)
    assert notebook["nbformat"] == 4
    cells = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    shorter = [cell.replace("SEGMENTS, EPOCHS = 800, 5", "SEGMENTS, EPOCHS = 60, 1")
               for cell in cells]
    assert shorter != cells
    program = f"names = {{}}\nfor cell in {shorter!r}:\n    exec(cell, names)\n"
    done = subprocess.run([sys.executable, "-c", program], cwd=empty_folder_with_models,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert re.search(r"epoch 1: RMSE [\d.]+ mmHg", done.stdout)
    assert (empty_folder_with_models / "own_arrays.pth").exists()


def test_the_notebook_and_its_script_are_the_same_program():
    with open(os.path.join(EXAMPLES, "own_arrays.ipynb"), encoding="utf-8") as file:
        cells = [cell for cell in json.load(file)["cells"] if cell["cell_type"] == "code"]
    assert all(not cell["outputs"] and cell["execution_count"] is None for cell in cells)
    with open(os.path.join(EXAMPLES, "own_arrays.py"), encoding="utf-8") as file:
        script = file.read().replace("options.epochs", "EPOCHS")
    for line in "\n".join("".join(cell["source"]) for cell in cells[2:-1]).splitlines():
        assert line in script


def test_a_custom_network_trains_beside_the_published_one(tmp_path, simulated):
    out = run_example("custom_network.py", simulated, "--networks", "published", "short",
                      "--epochs", 1, cwd=tmp_path)
    weights = re.findall(r"^(published|short) +([\d,]+)", out, re.M)
    assert weights[0] == ("published", "2,565,825") and len(weights) == 2


def test_a_simulated_checkpoint_is_fine_tuned_on_another_hospital(tmp_path, simulated, run):
    run("train_resnet.py", "--data", simulated, "--epochs", 1, "--batch-size", 16, "--name",
        "parent", cwd=tmp_path, check=0)
    out = run_example("fine_tune.py", "runs/parent.pth", "--patients", 20, "--epochs", 1,
                      cwd=tmp_path)
    table = re.findall(r"^(parent as it is|fine-tuned|from scratch) +([\d.]+) \(", out, re.M)
    assert [name for name, _ in table] == ["parent as it is", "fine-tuned", "from scratch"]
    assert len({rmse for _, rmse in table}) == 3


def test_a_sweep_ends_in_a_table_and_is_not_repeated(tmp_path, simulated):
    short = ("--data", simulated, "--epochs", 1, "--batch-size", 16, "--seeds", 1, "--settings", 2)
    out = run_example("sweep.py", *short, cwd=tmp_path)
    assert re.search(r"^recipe +[\d.]+ ± nan", out, re.M)
    assert re.search(r"^a third of the rate +--lr 3e-4 +[\d.]+ ± nan", out, re.M)
    times = {path: os.stat(path).st_mtime_ns for path in glob.glob(str(tmp_path / "runs" / "*"))}
    assert len(times) >= 10
    again = run_example("sweep.py", *short, cwd=tmp_path)
    assert again.splitlines()[-4:] == out.splitlines()[-4:]
    assert times == {path: os.stat(path).st_mtime_ns for path in times}


@pytest.mark.parametrize("path", sorted(glob.glob(os.path.join(EXAMPLES, "*.py"))))
def test_each_example_fits_on_a_page(path):
    with open(path, encoding="utf-8") as file:
        assert len(file.readlines()) <= 70
