"""train_resnet.py as its users run it, on small real files."""
import contextlib
import csv
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import zipfile

import h5py
import numpy as np
import pytest
import torch
from conftest import ROOT, children, make_file, needs_children
from small_train_resnet import small_models

import baselines
import models
import train_resnet
from checkpoint import CheckpointError, load_checkpoint, read_salt
from datasets import DataError, TPP_PPG_dataset, create_dataset_index, hash_patients, split_index
from tk_utils import run_script
from training_header import TrainingError, load_model

SCRIPT = os.path.join(ROOT, "tests", "small_train_resnet.py")
KEYS = ["ppg", "map", "dbp", "hr", "tpp"]
OPTIONS = ["--epochs", "2", "--batch-size", "8", "--device", "cpu"]
ONE_THREAD = dict(os.environ, OMP_NUM_THREADS="1", MPLBACKEND="agg")
SIDE_FILES = {"trajectory.pth", "log.csv", "metrics.json", "run.json", "card.md"}
FIGURES = {f"figures_resnet/{name}_plot.png" for name in (
    "M1.5_loss_lr", "M1.5_histogram", "loss_lr", "histogram")}
OUTPUTS = {"runs/M1.5.pth", *FIGURES, *(f"runs/M1.5/{name}" for name in SIDE_FILES)}
SCORES = {"rmse", "mae", "mead", "r2", "bias", "sd"}


def tree(folder):
    """The files below a folder, as relative paths, without hidden ones (locks)."""
    return {os.path.relpath(os.path.join(place, name), folder).replace(os.sep, "/")
            for place, _, names in os.walk(folder) for name in names if not name.startswith(".")}


def read_json(path):
    with open(path, encoding="utf-8") as file:
        return json.load(file)


def weights_of(path):
    return torch.load(path, weights_only=True)["model"]


def same_weights(one, other):
    one, other = weights_of(one), weights_of(other)
    return all(torch.equal(one[key], other[key]) for key in one)


def train(folder, *options, check=None):
    """Runs the script on d.h5 in a process of its own."""
    done = subprocess.run([sys.executable, SCRIPT, "--data", "d.h5", *OPTIONS, *options],
                          cwd=folder, capture_output=True, text=True, timeout=300, env=ONE_THREAD)
    if check is not None:
        assert done.returncode == check, done.stdout + done.stderr
    return done


@pytest.fixture(scope="module", autouse=True)
def small_networks():
    """In this process as in those that run SCRIPT."""
    with pytest.MonkeyPatch.context() as patch:
        for name, builder in small_models().items():
            patch.setitem(models.MODELS, name, builder)
        yield


@pytest.fixture
def call(monkeypatch, capsys):
    """call(*arguments, cwd=folder) -> (exit code, stdout, stderr), in this process.

    With few rounds of boosting: from some dozen segments nothing is learned in 200 either.
    """
    monkeypatch.setattr(baselines, "BOOSTING_ROUNDS", 5)

    def run_here(*arguments, cwd):
        monkeypatch.chdir(cwd)
        monkeypatch.setattr(sys, "argv", ["train_resnet.py", *map(str, arguments)])
        capsys.readouterr()
        try:
            code = run_script(train_resnet.main, CheckpointError, DataError, TrainingError)
        except SystemExit as end:       # argparse
            code = end.code
        return (code, *capsys.readouterr())
    return run_here


@pytest.fixture
def folder(tmp_path):
    make_file(tmp_path / "d.h5", patients=5, encounters=1, rows=6)
    return tmp_path


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished")
    make_file(folder / "d.h5", patients=5, encounters=1, rows=6)
    train(folder, check=0)
    return folder


@pytest.fixture(scope="module")
def trained(simulated, run, tmp_path_factory):
    """(folder, what it printed) of a run on simulated patients: data/s.h5 and the run's outputs."""
    folder = tmp_path_factory.mktemp("trained")
    os.mkdir(folder / "data")
    shutil.copy(simulated, folder / "data/s.h5")
    done = run(SCRIPT, "--data", "data/s.h5", "--epochs", 2, "--batch-size", 16,
               "--recipe", "M1.5", "--device", "cpu", cwd=folder, check=0)
    return folder, done.stdout


# ---------------------------------------------------------------------------- what training makes

def test_training_makes_the_files_that_it_promises_and_no_others(trained):
    assert tree(trained[0]) == OUTPUTS | {"data/s.h5", "data/tpp_ppg.salt"}
    for figure in FIGURES:
        assert (trained[0] / figure).read_bytes()[:4] == b"\x89PNG"


def test_the_metrics_are_those_of_the_checkpoint_and_name_the_test_patients(trained):
    found = read_json(trained[0] / "runs/M1.5/metrics.json")
    assert found["origin"] == "simulated" and found["split"] == "test"
    assert found["n_patients"] == 3 and 3 <= found["n_segments"] <= 12
    assert set(found["tpp"]) >= SCORES and set(found["p_crit"]) >= SCORES
    assert set(found["skill"]) >= {"value", "low", "high", "over"}
    saved = load_checkpoint(trained[0] / "runs/M1.5.pth")
    assert saved["metrics"]["tpp"]["rmse"] == found["tpp"]["rmse"]
    # TPP = MAP - Pcrit, and MAP is known: the two errors are one.
    assert found["tpp"]["rmse"] == pytest.approx(found["p_crit"]["rmse"])


def test_simulated_data_are_called_so_on_console_in_json_and_in_figures(trained, finished):
    folder, printed = trained
    found = read_json(folder / "runs/M1.5/metrics.json")
    assert "SIMULATED" in printed and "SIMULATED" in found["note"] and found["simulated"] is True
    assert all(has_red_field(folder / figure) for figure in FIGURES)
    found = read_json(finished / "runs/M1.5/metrics.json")
    assert found["note"] is None and found["simulated"] is False
    assert not any(has_red_field(finished / figure) for figure in FIGURES)


def has_red_field(path):
    """Whether a figure has the red field that a note stands in."""
    from matplotlib.image import imread
    r, g, b = np.moveaxis(imread(path)[..., :3], 2, 0)
    red = (abs(r - 0.70) < 0.02) & (abs(g - 0.15) < 0.02) & (abs(b - 0.12) < 0.02)
    return bool(red.sum() > 500)


def test_the_log_has_a_row_per_epoch_and_agrees_with_the_trajectory(trained):
    with open(trained[0] / "runs/M1.5/log.csv") as file:
        rows = list(csv.DictReader(file))
    seen = torch.load(trained[0] / "runs/M1.5/trajectory.pth", weights_only=True)
    assert [row["epoch"] for row in rows] == ["1", "2"]
    for column, curve in (("train_loss", "epoch_train_loss"), ("tune_loss", "epoch_val_loss"),
                          ("lr", "lr")):
        assert [float(row[column]) for row in rows] == pytest.approx(seen[curve].tolist(), rel=1e-4)


def test_the_checkpoint_says_how_it_was_made(trained):
    saved = load_checkpoint(trained[0] / "runs/M1.5.pth")
    recipe = {**train_resnet.RECIPES["M1.5"], "epochs": 2, "batch_size": 16, "recipe": "M1.5",
              "seed": 0, "split_seed": 0, "condition": "default", "keys": KEYS, "processes": 1,
              "loss": "mse", "model": "resnet_v3"}
    assert {k: saved["config"][k] for k in recipe} == recipe
    assert saved["model_args"]["num_discrete"] == 3 and saved["spec"] == "resnet_v3"
    assert torch.__version__.startswith(saved["provenance"]["versions"]["torch"].split("+")[0])
    assert len(saved["provenance"]["data_fingerprint"]) == 64 and saved["calibration"]


def test_patients_are_split_by_hash_and_normalised_by_the_train_patients_alone(trained):
    saved = load_checkpoint(trained[0] / "runs/M1.5.pth")
    index = create_dataset_index(path=trained[0] / "data/s.h5")
    salt, split = read_salt(trained[0] / "data/tpp_ppg.salt"), saved["split"]
    parts = split_index(index, 0)
    assert len(set(sum(split.values(), []))) == sum(map(len, split.values())) == index.n_patients
    for name, part in parts.items():
        assert split[name] == hash_patients(part.patients.tolist(), salt)
    column = TPP_PPG_dataset(parts["train"], "segment", ["ppg", "tpp"]).column("tpp").double()
    assert saved["normaliser"]["tpp"]["mean"] == pytest.approx(column.mean().item())
    assert saved["normaliser"]["tpp"]["sd"] == pytest.approx(column.std(unbiased=False).item())


def test_no_path_no_patient_and_no_salt_is_in_what_leaves_the_hospital(trained):
    folder = trained[0]
    with h5py.File(folder / "data/s.h5", "r") as file:
        names = [name.encode() for name in file]
    secrets = [str(folder).encode(), b"s.h5", os.path.expanduser("~").encode() + b"/",
               ROOT.encode(), read_salt(folder / "data/tpp_ppg.salt").encode(), *names]
    with zipfile.ZipFile(folder / "runs/M1.5.pth") as archive:
        members = [name.encode() + archive.read(name) for name in archive.namelist()]
    members.append((folder / "runs/M1.5.pth").read_bytes())
    members += [(folder / "runs/M1.5" / name).read_bytes() for name in SIDE_FILES - {"run.json"}]
    for secret in secrets:
        assert not any(secret in member for member in members), secret
    private = read_json(folder / "runs/M1.5/run.json")
    assert "PRIVATE" in private["_"] and private["data"] == [str(folder / "data/s.h5")]


def test_without_data_small_default_patients_are_simulated_once_and_called_so(
        call, monkeypatch, tmp_path):
    path = "data/simulated_12x2_seed3.h5"
    monkeypatch.setattr(train_resnet, "SIMULATED", {"patients": 12, "segments": 2, "seed": 3})
    monkeypatch.setattr(train_resnet, "SIMULATED_FILE", path)
    code, out, err = call("--epochs", 1, "--device", "cpu", cwd=tmp_path)
    assert code == 0, err
    assert "training on SIMULATED patients" in out and "recipe small (for" in out
    assert tree(tmp_path) == OUTPUTS | {path, "data/tpp_ppg.salt"}
    before = (tmp_path / path).stat().st_mtime_ns
    assert train_resnet.find_data(train_resnet.parse_args([]), rank=0) == [path]
    assert (tmp_path / path).stat().st_mtime_ns == before


def test_a_network_of_pcrit_without_vitals_is_scored_as_tpp(call, tmp_path):
    make_file(tmp_path / "p.h5", patients=10, encounters=1, rows=3)
    code, out, err = call("--data", "p.h5", "--epochs", 1, "--batch-size", 8, "--keys", "ppg",
                          "p_crit", "--name", "P", "--device", "cpu", cwd=tmp_path)
    assert code == 0, err
    found = read_json(tmp_path / "runs/P/metrics.json")
    assert found["tpp"]["rmse"] == pytest.approx(found["p_crit"]["rmse"])
    assert load_model(tmp_path / "runs/P.pth").keys == ["ppg", "p_crit"]
    assert not (tmp_path / "figures_resnet/loss_lr_plot.png").exists()      # only the default run


# --------------------------------------------------------------------------------------- recipes

@pytest.mark.parametrize("arguments, segments, expected", [
    ([], 3000, {"recipe": "small", "batch_size": 16}),
    ([], 10 ** 6, {"recipe": "large", "batch_size": 256}),
    (["--recipe", "M1.5", "--lr", "0.01"], 30, {"recipe": "M1.5", "lr": 0.01, "epochs": 10,
                                                "l1": 1e-4, "model": "resnet_v3"}),
    (["--epochs", "3", "--weight-decay", "0"], 30, {"epochs": 3, "weight_decay": 0.0})])
def test_the_recipe_follows_the_size_of_the_data_and_the_command_line(arguments, segments,
                                                                      expected):
    found = train_resnet.choose_recipe(train_resnet.parse_args(arguments), segments)
    assert {key: found[key] for key in expected} == expected


class Model:
    scale = torch.tensor([2.0])         # mmHg for each unit of the network's output


@pytest.mark.parametrize("changes, expected", [
    ({}, {"optimizer_type": torch.optim.Adam, "batch_cosine": False, "average_weights": 0.0,
          "gradient_clipping": None, "warmup_epochs": 0, "early_stopping": -1}),
    ({"schedule": ["step", 3, 0.2]}, {"scheduler_and_args": [
        torch.optim.lr_scheduler.StepLR, {"step_size": 3, "gamma": 0.2}]}),
    ({"schedule": ["cosine", 0.01], "warmup_epochs": 1, "epochs": 4}, {
        "batch_cosine": True, "warmup_epochs": 1, "scheduler_and_args": [
            torch.optim.lr_scheduler.CosineAnnealingLR, {"T_max": 30, "eta_min": 1e-5}]}),
    ({"optimizer": "adamw", "clip": 1.0, "average_last": 0.3, "early_stopping": 5}, {
        "optimizer_type": torch.optim.AdamW, "gradient_clipping": 4.0, "average_weights": 0.3,
        "early_stopping": 5})])
def test_a_recipe_becomes_arguments_of_the_loop(changes, expected):
    recipe = {**train_resnet.RECIPES["M1.5"], **changes}
    found = train_resnet.loop_arguments(recipe, range(10), Model)
    assert {key: found[key] for key in expected} == expected


def test_every_entry_of_a_recipe_at_once(call, folder, monkeypatch):
    recipe = {"epochs": 2, "batch_size": 4, "lr": 1e-3, "optimizer": "adamw", "l1": 1e-2,
              "weight_decay": 0.1, "schedule": ["onecycle", 0.3, 0.04], "warmup_epochs": 0,
              "clip": 0.01, "average_last": 0.5, "early_stopping": 3,
              "model": "resnet_v3", "anchor": True, "dropout": 0.5}
    assert set(recipe) == set(train_resnet.RECIPES["M1.5"])
    monkeypatch.setitem(train_resnet.RECIPES, "small", recipe)
    code, out, err = call("--data", "d.h5", "--device", "cpu", cwd=folder)
    assert code == 0, err
    saved = load_checkpoint(folder / "runs/M1.5.pth")
    assert {key: saved["config"][key] for key in recipe} == recipe
    assert set(saved["anchor"]["coefficients"]) == {"map", "dbp", "hr"}
    assert saved["model_args"]["dropout"] == 0.5


# ----------------------------------------------------------------- a network and a loss of your own

MY_NET = """
import torch
from torch import nn

class MyNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.ppg, self.out = nn.Conv1d(1, 8, 15, 4), nn.LazyLinear(1)

    def forward(self, ppg, *vitals):
        return self.out(torch.cat([self.ppg(ppg).relu().mean(2), torch.stack(vitals, 1)], 1))

def my_loss(prediction, label):
    return torch.nn.functional.smooth_l1_loss(prediction, label)
"""


def test_a_network_and_a_loss_of_your_own_go_all_the_way(call, folder):
    mine = folder / "mine"
    mine.mkdir()
    (mine / "my_net.py").write_text(MY_NET)
    own = ["--model", "mine/my_net.py:MyNet", "--loss", "mine/my_net.py:my_loss"]
    folds = ["--data", "d.h5", *OPTIONS, "--folds", "3", "--name", "own"]
    code, out, err = call(*folds, *own, cwd=folder)
    assert code == 0, err
    saved = load_checkpoint(folder / "runs/own_fold0.pth")
    assert saved["spec"] == "my_net.py:MyNet" and saved["config"]["loss"] == "my_net.py:my_loss"
    with pytest.raises(CheckpointError, match="a network of your own: --model my_net.py:MyNet"):
        load_model(folder / "runs/own_fold0.pth")
    assert load_model(folder / "runs/own_fold0.pth", network=str(mine / "my_net.py") + ":MyNet")
    assert read_json(folder / "runs/own/summary.json")["together"]["n_patients"] == 5
    code, out, err = call(*folds, cwd=folder)
    assert code == 2 and "model my_net.py:MyNet (now resnet_" in err


# --------------------------------------------------------------------- resumed, refused, fine-tuned

def started(folder, *options, launcher=(), until="epoch 1/"):
    """A run, once it has printed a line that begins with `until`."""
    process = subprocess.Popen(
        [sys.executable, *launcher, SCRIPT, "--data", "d.h5", *OPTIONS, "--epochs", "500",
         *options], cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=ONE_THREAD, start_new_session=True)
    for line in process.stdout:
        if line.startswith(until):
            return process
    raise AssertionError(process.communicate()[1])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_ends_with_exit_code_3(folder, number):
    process = started(folder)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 3, out + err
    assert "the same command goes on from here" in err and "Traceback" not in err
    assert os.path.exists(folder / "runs/M1.5/resume.pth")
    refused = train(folder, "--lr", "0.01", check=2)
    assert "epochs 500 (now 2)" in refused.stderr and "(now 0.01)" in refused.stderr
    assert "--fresh" in refused.stderr and "--name" in refused.stderr
    train(folder, "--fresh", check=0)
    assert not os.path.exists(folder / "runs/M1.5/resume.pth")


def test_a_signal_while_baselines_are_fitted_ends_with_exit_code_3_too(folder):
    process = started(folder, "--epochs", "1")
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 3, out + err
    assert "the same command goes on from here" in err and "Traceback" not in err
    train(folder, "--epochs", "1", check=0)


def test_a_second_sigint_ends_at_once(folder):
    process = started(folder)
    os.kill(process.pid, signal.SIGSTOP)        # so that both wait for it when it goes on
    process.send_signal(signal.SIGINT)
    os.kill(process.pid, signal.SIGCONT)
    time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=30)
    assert process.returncode in (-signal.SIGINT, 3)


def test_two_runs_cannot_write_one_name(folder):
    process = started(folder)
    try:
        second = train(folder, check=2)
        assert "another process is training under this name" in second.stderr
        assert "--name" in second.stderr
    finally:
        process.kill()
        process.communicate()


def test_a_finished_run_is_never_overwritten(finished):
    before = (finished / "runs/M1.5.pth").read_bytes()
    same = train(finished, check=0)
    assert "this run is finished" in same.stdout and "R²" in same.stdout
    other = train(finished, "--seed", "3", check=2)
    assert "seed 0 (now 3)" in other.stderr
    assert "--fresh" in other.stderr and "--name" in other.stderr
    assert (finished / "runs/M1.5.pth").read_bytes() == before


def test_an_option_that_a_finished_run_does_not_know_is_at_its_default(finished, call, tmp_path):
    shutil.copytree(finished, tmp_path / "copy")
    path = tmp_path / "copy/runs/M1.5.pth"
    saved = load_checkpoint(path)
    for key in ("dropout", "early_stopping", "precision", "loss"):
        del saved["config"][key]
    torch.save(saved, path)
    code, out, err = call("--data", "d.h5", *OPTIONS, cwd=tmp_path / "copy")
    assert code == 0 and "this run is finished" in out, err
    code, out, err = call("--data", "d.h5", *OPTIONS, "--loss", "l1", cwd=tmp_path / "copy")
    assert code == 2 and "loss mse (now l1)" in err


@pytest.mark.parametrize("key, changed", [("tpp", lambda v: v + 1), ("map", lambda v: v + 5),
                                          ("ppg", lambda v: v[..., ::-1])])
def test_changed_data_are_another_experiment(finished, call, tmp_path, key, changed):
    shutil.copytree(finished, tmp_path / "copy")
    with h5py.File(tmp_path / "copy/d.h5", "a") as file:
        for patient in file:
            for encounter in file[patient].values():
                encounter[key][...] = changed(encounter[key][...])
    code, out, err = call("--data", "d.h5", *OPTIONS, cwd=tmp_path / "copy")
    assert code == 2 and "other data" in err, out


def test_data_that_change_during_training_are_noticed(folder):
    process = started(folder)
    with h5py.File(folder / "d.h5", "a") as file:
        file["MRN000/CSN0000/tpp"][0] += 1
    out, err = process.communicate(timeout=60)
    assert process.returncode == 2 and "changed since the index was made" in err


def test_files_that_are_not_ours_are_left_alone(folder):
    (folder / "runs").mkdir()
    (folder / "runs/mine.pth").write_text("not a checkpoint")
    for options in ([], ["--fresh"]):
        done = train(folder, "--name", "mine", *options, check=2)
        assert "not a checkpoint" in done.stderr
    assert (folder / "runs/mine.pth").read_text() == "not a checkpoint"


@pytest.fixture(scope="module")
def other_patients(finished, tmp_path_factory):
    folder = tmp_path_factory.mktemp("other")
    make_file(folder / "d.h5", patients=5, encounters=1, rows=6, seed=7)
    with h5py.File(folder / "d.h5", "a") as file:
        for patient in list(file):
            file.move(patient, "new" + patient)
    shutil.copy(finished / "tpp_ppg.salt", folder)
    return folder


def test_fine_tuning_begins_with_the_parents_weights_and_remembers_its_patients(
        finished, other_patients, call, monkeypatch):
    monkeypatch.setitem(train_resnet.RECIPES, "small", {**train_resnet.RECIPES["small"], "l1": 0.0})
    parent = finished / "runs/M1.5.pth"
    code, out, err = call("--data", "d.h5", "--init-from", parent, "--lr", "1e-12", "--epochs", "1",
                          "--device", "cpu", cwd=other_patients)
    assert code == 0, err
    child, parent = load_checkpoint(other_patients / "runs/M1.5.pth"), load_checkpoint(parent)
    assert all(torch.allclose(child["model"][k], v, atol=1e-9) for k, v in parent["model"].items())
    assert child["normaliser"] == parent["normaliser"]
    seen = parent["split"]["train"] + parent["split"]["tune"]
    assert child["split"]["ancestors"] == sorted(seen)
    assert child["provenance"]["parent"] and not parent["provenance"]["parent"]


@pytest.mark.parametrize("options, message", [
    (["--loss", "nll"], "predicts no spread, which --loss nll needs"),
    (["--keys", "ppg", "map", "tpp"], "trained on ppg map dbp hr tpp, not on ppg map tpp")])
def test_a_parent_that_does_not_fit_is_refused(finished, other_patients, call, options, message):
    code, out, err = call("--data", "d.h5", "--init-from", finished / "runs/M1.5.pth", "--name",
                          "child", *options, cwd=other_patients)
    assert code == 2 and message in err


def test_fine_tuning_refuses_to_test_on_the_parents_patients(finished, call, tmp_path):
    shutil.copy(finished / "d.h5", tmp_path)
    shutil.copy(finished / "tpp_ppg.salt", tmp_path)
    for seed in range(1, 20):       # some other split tests on a patient of the parent's
        code, out, err = call("--data", "d.h5", *OPTIONS, "--epochs", 1, "--init-from",
                              finished / "runs/M1.5.pth", "--split-seed", seed, "--name",
                              f"s{seed}", cwd=tmp_path)
        if code:
            break
    assert code == 2 and "were trained or tuned on by it" in err and "--split-seed" in err


# ---------------------------------------------------------------------- several runs, several ranks

def names_of(*arguments):
    return [one.name for one in train_resnet.list_runs(train_resnet.parse_args(arguments))]


def test_seeds_folds_and_ablations_multiply_and_each_run_has_its_name():
    assert names_of() == ["M1.5"]
    assert names_of("--seeds", "2", "--seed", "5", "--name", "a") == ["a_seed5", "a_seed6"]
    assert names_of("--folds", "3") == ["M1.5_fold0", "M1.5_fold1", "M1.5_fold2"]
    assert names_of("--ablate") == ["M1.5_no_ppg", "M1.5_no_vitals", "M1.5"]
    arguments = ["--seeds", "2", "--folds", "3", "--ablate"]
    assert len(set(names_of(*arguments))) == 18
    runs = train_resnet.list_runs(train_resnet.parse_args(arguments))
    one = {run.name: run for run in runs}["M1.5_seed1_fold2_no_ppg"]
    assert (one.seed, one.fold, one.keys) == (1, 2, ["map", "dbp", "hr", "tpp"])


@pytest.fixture(scope="module")
def folded(simulated, tmp_path_factory):
    """A folder with three folds and their ablations, one epoch each."""
    folder, patch = tmp_path_factory.mktemp("folded"), pytest.MonkeyPatch()
    shutil.copy(simulated, folder / "d.h5")
    patch.chdir(folder)
    patch.setattr(baselines, "BOOSTING_ROUNDS", 5)
    patch.setattr(sys, "argv", ["train_resnet.py", "--data", "d.h5", *OPTIONS, *FOLDED])
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        assert train_resnet.main() == 0
    patch.undo()
    printed = printed.getvalue()
    lines = [line for line in printed.splitlines() if line.startswith("x_fold")]
    assert [line.split(":")[0] for line in lines[:9]] == [
        f"x_fold{n}{ending} ({3 * n + k} of 9)" for n in range(3)
        for k, ending in enumerate(("_no_ppg", "_no_vitals", ""), 1)]
    assert "epoch 1/1: RMSE" not in printed and printed.count("recipe small") == 1
    return folder


FOLDED = ["--epochs", "1", "--batch-size", "32", "--folds", "3", "--ablate", "--name", "x"]


def test_each_patient_is_tested_by_one_fold_and_trained_or_tuned_on_by_the_others(folded):
    splits = [load_checkpoint(folded / f"runs/x_fold{n}.pth")["split"] for n in range(3)]
    tested = [set(split["test"]) for split in splits]
    assert sum(map(len, tested)) == len(set.union(*tested))
    for split, own in zip(splits, tested):
        assert own | set(split["train"]) | set(split["tune"]) == set.union(*tested)
        assert not own & (set(split["train"]) | set(split["tune"]))


def test_the_summary_scores_all_folds_together_and_each_run_lists_its_ablations(folded):
    found = read_json(folded / "runs/x/summary.json")
    together, runs = found["together"], found["runs"]
    assert together["n_patients"] == sum(one["n_patients"] for one in runs)
    squared = sum(one["n_segments"] * one["tpp"]["rmse"] ** 2 for one in runs)
    assert together["tpp"]["rmse"] == pytest.approx((squared / together["n_segments"]) ** 0.5)
    assert "SIMULATED" in together["note"] and os.path.exists(
        folded / "figures_resnet/x_histogram_plot.png")
    for n in range(3):
        scores = read_json(folded / f"runs/x_fold{n}/metrics.json")
        assert set(scores["compared"]) == {"network without the PPG", "network without vitals"}
        alone = read_json(folded / f"runs/x_fold{n}_no_ppg/metrics.json")
        assert alone["keys"] == ["map", "dbp", "hr", "tpp"]
        assert scores["compared"]["network without the PPG"]["rmse"] == pytest.approx(
            alone["tpp"]["rmse"], rel=1e-6)


def test_started_again_finished_runs_are_kept_and_the_missing_one_is_trained_the_same(folded, call):
    before = {path.name: path.read_bytes() for path in (folded / "runs").glob("x_fold?.pth")}
    shutil.move(folded / "runs/x_fold1.pth", folded / "first.pth")
    code, out, err = call("--data", "d.h5", *OPTIONS, *FOLDED, cwd=folded)
    assert code == 0 and out.count("finished before") == 8, err
    assert same_weights(folded / "first.pth", folded / "runs/x_fold1.pth")
    for n in (0, 2):
        assert (folded / f"runs/x_fold{n}.pth").read_bytes() == before[f"x_fold{n}.pth"]


def test_a_run_with_its_own_spread_says_so_in_checkpoint_and_plot(folded, call):
    code, out, err = call("--data", "d.h5", *OPTIONS, "--epochs", 1, "--loss", "nll", "--name",
                          "own", cwd=folded)
    assert code == 0 and "nats" in out, err
    saved = load_checkpoint(folded / "runs/own.pth")
    assert saved["model_args"]["num_outputs"] == 2 and saved["calibration"]["spread"]
    assert load_model(saved).outputs == 2


def test_two_processes_at_half_the_batch_do_what_one_does_and_one_writes(call, tmp_path):
    # (test_training_header.py has the loop's equality to 1e-9; here Adam amplifies rounding.)
    make_file(tmp_path / "p.h5", patients=10, encounters=1, rows=3)
    options = ["--data", "p.h5", "--epochs", "1", "--device", "cpu"]
    assert call(*options, "--batch-size", 4, "--name", "one", cwd=tmp_path)[0] == 0
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
         SCRIPT, *options, "--batch-size", "2", "--name", "two"],
        cwd=tmp_path, capture_output=True, text=True, env=ONE_THREAD)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("test: 3 segments") == done.stdout.count("epoch 1/1") == 1
    assert load_checkpoint(tmp_path / "runs/two.pth")["config"]["processes"] == 2
    one, two = (torch.load(tmp_path / f"runs/{name}/trajectory.pth", weights_only=True)
                for name in ("one", "two"))
    for name in ("epoch_train_loss", "epoch_val_loss", "lr"):
        assert two[name].tolist() == pytest.approx(one[name].tolist(), rel=3e-3), name


def test_tensorboard_gets_scalars_hyper_parameters_and_figures(folder):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    train(folder, "--tensorboard", check=0)
    found = accumulator.EventAccumulator(str(folder / "runs/M1.5/tensorboard"),
                                         size_guidance={"images": 0}).Reload()
    tags = found.Tags()
    assert {"loss/train", "loss/tune", "tune/rmse", "learning rate"} <= set(tags["scalars"])
    assert tags["images"] == ["tune"] and len(found.Scalars("loss/tune")) == 2
    assert "_hparams_/experiment" in found.summary_metadata


# ---------------------------------------------------------------------------------------- trouble

def test_a_loss_that_is_not_finite_names_the_batch_and_saves_nothing_bad(folder):
    done = train(folder, "--lr", "1e30", check=2)
    line = done.stderr.strip().splitlines()[-1]
    assert re.match(r"error: the training loss is not finite at epoch \d, batch \d", line)
    assert re.search(r"Its 8 segments: ppg \S+ to \S+, map \S+ to \S+", line)
    assert re.search(r"of the patients [0-9a-f]{16}", line) and "MRN" not in done.stderr
    assert not os.path.exists(folder / "runs/M1.5.pth")
    state = folder / "runs/M1.5/resume.pth"
    if state.exists():
        weights = torch.load(state, weights_only=True)["parts"]["model"]
        assert all(torch.isfinite(v).all() for v in weights.values())


@pytest.mark.skipif(os.name != "posix" or os.geteuid() != 0, reason="mounting a tmpfs needs root")
def test_a_full_disk_ends_in_one_line_and_the_run_goes_on_when_there_is_room(folder, finished):
    small = folder / "runs"
    small.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", small],
                             capture_output=True)
    if mounted.returncode:
        pytest.skip("no tmpfs can be mounted here")
    try:
        done = train(folder, check=2)
        assert done.stderr.strip().splitlines()[-1].startswith("error: ")
        assert "No space left on device" in done.stderr and "Traceback" not in done.stderr
        assert not [name for _, _, names in os.walk(small) for name in names
                    if name.endswith(".tmp")]
        subprocess.run(["mount", "-o", "remount,size=200m", small], check=True)
        train(folder, check=0)
        assert same_weights(small / "M1.5.pth", finished / "runs/M1.5.pth")
    finally:
        subprocess.run(["umount", small], check=True)


def test_a_data_file_that_is_cut_short_while_it_is_read_ends_in_one_line(folder):
    process = started(folder)
    os.truncate(folder / "d.h5", 2000)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 2 and "Traceback" not in err, err
    assert err.strip().splitlines()[-1].startswith("error: ") and "d.h5" in err


@needs_children
def test_a_dead_loader_worker_ends_in_one_line_that_says_what_to_do(folder):
    process = started(folder, "--workers", "2")
    os.kill(children(process.pid)[-1], signal.SIGKILL)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 2 and "Traceback" not in err, err
    assert "a loader worker" in err and "--workers" in err


@needs_children
def test_when_a_rank_dies_the_others_end_within_a_minute(folder):
    process = started(folder, launcher=("-m", "torch.distributed.run", "--standalone",
                                        "--nproc_per_node=2"))
    ranks = children(process.pid)
    os.kill(ranks[-1], signal.SIGKILL)
    begun = time.monotonic()
    process.communicate(timeout=60)
    assert process.returncode != 0 and time.monotonic() - begun < 60
    assert not any(os.path.exists(f"/proc/{pid}") for pid in ranks)


@pytest.mark.skipif(os.name != "posix", reason="an orphan is seen by its parent's number")
def test_when_torchrun_is_killed_its_ranks_end(folder):
    process = started(folder, launcher=("-m", "torch.distributed.run", "--standalone",
                                        "--nproc_per_node=2"))
    process.kill()
    try:
        process.communicate(timeout=60)     # reads until the ranks, who hold the other end, end
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise


# ------------------------------------------------------------------------------ what bad input gets

def spoil(folder, kind):
    """Writes the data file `bad.h5` of a kind of badness."""
    path = folder / "bad.h5"
    if kind == "absent":
        return
    if kind == "text":
        path.write_text("time,ppg\n0,1\n")
        return
    make_file(path, patients=2 if kind == "two patients" else 4, encounters=1, rows=2)
    with h5py.File(path, "r+") as file:
        if kind == "no hr in one":
            del file["MRN002/CSN0020/hr"]
        elif kind == "nothing good":
            for patient in file.values():
                for encounter in patient.values():
                    encounter["r2"][:] = 0.1
    if kind == "salt":
        (folder / "tpp_ppg.salt").write_text("short\n")


@pytest.mark.parametrize("kind, options, message", [
    ("absent", (), "bad.h5: no such file"),
    ("text", (), "bad.h5: not a readable HDF5 file"),
    ("no hr in one", (), "no field 'hr'"),
    ("nothing good", (), "no segment passes the quality gate"),
    ("two patients", (), "2 patients with usable segments: expected at least 3"),
    ("salt", (), "tpp_ppg.salt: expected a salt"),
    ("good", ("--keys", "ppg", "temperature", "tpp"), "'temperature' cannot be an input"),
    ("good", ("--keys", "ppg", "map", "sbp"), "--keys ppg map sbp: expected ppg, then vitals"),
    ("good", ("--keys", "ppg", "p_crit", "tpp"), "'p_crit' cannot be an input"),
    ("good", ("--keys", "map", "ppg", "tpp"), "expected ppg, then vitals"),
    ("good", ("--keys", "tpp"), "--keys tpp: expected ppg"),
    ("good", ("--condition", "very_good"), "very_good"),
    ("good", ("--device", "toaster"), "device 'toaster'"),
    ("good", ("--model", "resnet_v9"), "--model resnet_v9: expected resnet_v3"),
    ("good", ("--model", "absent.py:Net"), "--model absent.py:Net: absent.py: no such file"),
    ("good", ("--loss", "hubris"), "--loss hubris: expected mse"),
    ("good", ("--epochs", "0"), "--epochs 0: expected at least 1"),
    ("good", ("--batch-size", "-3"), "--batch-size -3: expected at least 1"),
    ("good", ("--lr", "nan"), "--lr nan: expected more than 0"),
    ("good", ("--folds", "2"), "--folds 2: expected at least 3"),
    ("good", ("--seeds", "1"), "--seeds 1: expected at least 2"),
    ("good", ("--keys", "ppg", "tpp", "--ablate"), "expected --keys with ppg and vitals"),
    ("good", ("--ablate", "--init-from", "a.pth"), "--ablate does not go with --init-from"),
    ("good", ("--init-from", "a.pth"), "a.pth: no such checkpoint"),
    ("good", ("--name", "../elsewhere"), "name, not a path"),
    ("good", ("--name", "a\\b"), "name, not a path"),
    ("good", ("--recipe", "secret"), "invalid choice: 'secret'"),
    ("good", ("--colour", "red"), "unrecognized arguments: --colour red"),
])
def test_training_refuses_bad_input_in_one_line_and_writes_nothing(call, tmp_path, kind, options,
                                                                   message):
    spoil(tmp_path, kind)
    before = tree(tmp_path)
    code, out, err = call("--data", "bad.h5", "--epochs", 1, *options, cwd=tmp_path)
    errors = [line for line in err.splitlines() if "error: " in line]
    assert code == 2 and len(errors) == 1 and message in errors[0], err
    assert "Traceback" not in err and tree(tmp_path) <= before | {"tpp_ppg.salt"}


def test_the_script_ends_with_one_line_and_exit_code_2(run, tmp_path):
    done = run("train_resnet.py", "--data", "absent.h5", cwd=tmp_path, check=2)
    assert done.stdout == "" and len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith("error: absent.h5") and tree(tmp_path) == set()
