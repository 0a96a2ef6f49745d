"""Run each example as its docstring says, shortened by its own options."""
import glob
import json
import os
import re

import numpy as np
import pytest
from conftest import KEYS, ROOT, SHARED, read_ours, run

import simulate
import training_header as tpp

pytestmark = pytest.mark.usefixtures("small")


def run_example(name, *arguments, cwd):
    return run(f"examples/{name}", *arguments, cwd=cwd, check=0).stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Fifteen virtual patients of two minutes, s.h5, and fresh weights, runs/parent.pth."""
    folder = tmp_path_factory.mktemp("examples")
    path = str(folder / "s.h5")
    simulate.simulate_file(path, 15, 2, seed=1)
    dataset = tpp.TPP_PPG_dataset(tpp.create_dataset_index(path=path), "segment", KEYS)
    os.mkdir(folder / "runs")
    tpp.save_checkpoint(folder / "runs" / "parent.pth", tpp.NormalisedModel(
        tpp.MODELS["resnet_spread"](3), KEYS, tpp.fit_normaliser(dataset, KEYS[1:])))
    return folder


def test_own_arrays_trains_a_network(tmp_path):
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "mine.npz", ppg=rng.normal(size=(40, 3600)) * 7 + 100,
             vitals=rng.normal(80, 10, (40, 3)), target=rng.normal(40, 9, 40),
             patient=np.repeat(np.arange(10), 4))
    out = run_example("own_arrays.py", "--arrays", "mine.npz", "--epochs", 1, cwd=tmp_path)
    assert re.search(r"epoch 1: RMSE [\d.]+ mmHg on 8 held-out segments", out)
    assert (tmp_path / "own_arrays.pth").exists()


@pytest.mark.filterwarnings("ignore")
def test_the_notebook_runs_from_top_to_bottom(tmp_path, monkeypatch, capsys):
    notebook = json.loads(read_ours("examples/own_arrays.ipynb"))
    assert notebook["nbformat"] == 4
    cells = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    shorter = [cell.replace("PATIENTS, MINUTES, EPOCHS = 200, 3, 6",
                            "PATIENTS, MINUTES, EPOCHS = 15, 2, 1") for cell in cells]
    record = os.path.join(SHARED, "wfdb", "a171l.hea")
    if os.path.exists(record):                  # else virtual patients are used
        shorter = [cell.replace("RECORDING = None ", f"RECORDING = {record!r}") for cell in shorter]
        assert sum(record in cell for cell in shorter) == 1
    assert shorter != cells
    monkeypatch.chdir(tmp_path)
    names = {}
    for cell in shorter:
        exec(cell, names)
    assert "epoch 1/1: train loss" in capsys.readouterr().out
    assert (tmp_path / "runs" / "own_arrays.pth").exists()


def test_a_custom_network_and_loss_train_score_predict_and_export_in_forty_lines(folder):
    pytest.importorskip("onnxruntime", reason="the package onnxruntime is not installed")
    pytest.importorskip("onnx", reason="the package onnx is not installed")
    phase = np.arange(2 * 3600) / 60
    np.savetxt(folder / "r.csv", np.column_stack([phase, 80 + 20 * np.sin(8 * phase),
                                                  np.sin(8 * phase - 1)]),
               delimiter=",", comments="", header="time_s,abp_mmhg,ppg")
    out = run_example("custom_network.py", "s.h5", "r.csv", cwd=folder)
    assert "epoch 10/10" in out and re.search(r"^(model|network) +[\d.]+", out, re.M)
    assert re.search(r"^1 +60.0 +[-\d.NaN]+", out, re.M)
    assert "written: two_blocks.onnx" in out
    out = run_example("onnx_predict.py", "two_blocks.onnx", "--map", 80, cwd=folder)
    assert re.search(r"^tpp: [-\d.]+ mmHg$", out, re.M) and "latency of one segment" in out
    code = read_ours("examples/custom_network.py").split('"""', 2)[2]
    code = code.split("import make_calibration", 1)[-1]
    lines = [line for line in code.splitlines() if line.strip() and '"""' not in line]
    assert len(lines) <= 40


def test_a_checkpoint_is_fine_tuned_on_other_patients(folder, scripts_here):
    out = run_example("fine_tune.py", "runs/parent.pth", "s.h5", "--epochs", 1, cwd=folder)
    table = re.findall(r"^(parent as it is|fine-tuned|from scratch) +([\d.]+) +[-\d.]+$", out, re.M)
    assert "below 5 test patients there are no intervals" in out and "nan" not in out
    assert [name for name, _ in table] == ["parent as it is", "fine-tuned", "from scratch"]
    assert len({rmse for _, rmse in table}) == 3


def test_a_sweep_prints_a_table(folder, scripts_here):
    out = run_example("sweep.py", "--data", "s.h5", "--epochs", 1, "--settings", 1, cwd=folder)
    assert re.search(r"^recipe +[\d.]+ ± [\d.]+$", out, re.M)
    assert re.search(r"the best, 'recipe', on the test patients: RMSE [\d.]+ mmHg", out)


@pytest.mark.parametrize("path", sorted(glob.glob(f"{ROOT}/examples/*.py")))
def test_each_example_fits_on_a_page(path):
    assert len(read_ours(path).splitlines()) <= 75
