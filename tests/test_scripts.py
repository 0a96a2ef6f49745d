"""train_resnet.py and evaluate.py as their users run them, on small real files."""
import csv
import json
import os
import shutil
import subprocess
import sys
import zipfile

import h5py
import numpy as np
import pytest
import torch
from conftest import ROOT, make_file

import evaluate
import metrics
import train_resnet
from tk_utils import run_script
from training_header import (
    CheckpointError,
    DataError,
    TPP_PPG_dataset,
    TrainingError,
    create_dataset_index,
    hash_patients,
    load_checkpoint,
    load_model,
    predict_dataset,
    read_salt,
    split_index,
)

CPU = torch.device("cpu")
SCORES = {"rmse", "mae", "mead", "r2", "bias", "sd"}
BASELINES = {"mean_tpp", "map_minus_mean_pcrit", "ridge", "gradient_boosting", "ridge_all",
             "gradient_boosting_all", "gradient_boosting_ppg"}
OUTPUTS = {"runs/M1.5.pth", "runs/M1.5_trajectory.pth", "runs/M1.5_log.csv",
           "runs/M1.5_metrics.json", "runs/M1.5_run.json", "figures_resnet/loss_lr_plot.png",
           "figures_resnet/histogram_plot.png"}


def tree(folder):
    """The files below a folder, as relative paths."""
    return {os.path.relpath(os.path.join(place, name), folder).replace(os.sep, "/")
            for place, _, names in os.walk(folder) for name in names}


def read_json(path):
    with open(path, encoding="utf-8") as file:
        return json.load(file)


@pytest.fixture
def call(monkeypatch, capsys):
    """call(module, *arguments, cwd=folder) -> (exit code, stdout, stderr), in this process.

    With few rounds of boosting: of some dozen segments nothing is learned in 200 either.
    """
    monkeypatch.setattr(metrics, "BOOSTING_ROUNDS", 5)

    def run_here(module, *arguments, cwd):
        monkeypatch.chdir(cwd)
        monkeypatch.setattr(sys, "argv", [module.__name__, *map(str, arguments)])
        capsys.readouterr()
        try:
            code = run_script(module.main, CheckpointError, DataError, TrainingError)
        except SystemExit as end:       # argparse
            code = end.code
        return (code, *capsys.readouterr())
    return run_here


@pytest.fixture(scope="module")
def trained(simulated, run, tmp_path_factory):
    """(folder, what it printed) of a run on simulated patients: data/s.h5 and the run's outputs."""
    folder = tmp_path_factory.mktemp("trained")
    os.mkdir(folder / "data")
    shutil.copy(simulated, folder / "data/s.h5")
    done = run("train_resnet.py", "--data", "data/s.h5", "--epochs", 2, "--batch-size", 16,
               "--device", "cpu", cwd=folder, check=0)
    return folder, done.stdout


@pytest.fixture(scope="module")
def published(run, tmp_path_factory):
    """A run on a published-style file, without vitals and on Pcrit, where wfdb is not installed."""
    folder = tmp_path_factory.mktemp("published")
    make_file(folder / "p.h5", patients=10, encounters=1, rows=3)
    done = run("train_resnet.py", "--data", "p.h5", "--epochs", 1, "--batch-size", 2, "--keys",
               "ppg", "p_crit", "--name", "P", "--device", "cpu", cwd=folder, check=0,
               **without_readers(tmp_path_factory.mktemp("stubs")))
    return folder, done.stdout


def without_readers(folder):
    """An environment in which the optional readers cannot be imported."""
    for name in ("wfdb", "vitaldb", "pyedflib"):
        (folder / f"{name}.py").write_text(f"raise ModuleNotFoundError(name='{name}')\n")
    return {"PYTHONPATH": str(folder)}


# ---------------------------------------------------------------------------- what training makes

def test_training_makes_the_files_that_it_promises_and_no_others(trained):
    assert tree(trained[0]) == OUTPUTS | {"data/s.h5", "data/tpp_ppg.salt"}
    for figure in ("loss_lr_plot", "histogram_plot"):
        assert (trained[0] / f"figures_resnet/{figure}.png").read_bytes()[:4] == b"\x89PNG"


def test_the_metrics_hold_the_keys_that_the_readme_names(trained):
    found = read_json(trained[0] / "runs/M1.5_metrics.json")
    assert found["origin"] == "simulated" and found["split"] == "test"
    assert found["n_patients"] == 3 and 3 <= found["n_segments"] <= 12
    assert set(found["tpp"]) >= SCORES and set(found["p_crit"]) >= SCORES
    assert set(found["true"]) >= SCORES and SCORES - {"r2"} <= set(found["true"]["label"])
    assert set(found["baselines"]) == BASELINES
    assert all(scores["rmse"] > 0 for scores in found["baselines"].values())
    assert set(found["skill"]) == {"value", "low", "high", "over"}
    assert found["skill"]["over"] in BASELINES
    # TPP = MAP - Pcrit, and MAP is known: the two errors are one.
    assert found["tpp"]["rmse"] == pytest.approx(found["p_crit"]["rmse"])
    assert found["tpp"]["bias"] == pytest.approx(-found["p_crit"]["bias"])
    assert found["tpp"]["rmse"] ** 2 == pytest.approx(
        found["tpp"]["bias"] ** 2 + found["tpp"]["sd"] ** 2 * (1 - 1 / found["n_segments"]))


def test_simulated_data_are_called_so_on_console_in_json_and_in_figures(trained, published):
    folder, printed = trained
    found = read_json(folder / "runs/M1.5_metrics.json")
    assert "SIMULATED" in printed and "SIMULATED" in found["note"] and found["simulated"] is True
    assert red_pixels(folder) == [True, True]
    folder, printed = published
    found = read_json(folder / "runs/P_metrics.json")
    assert "SIMULATED" not in printed and found["note"] is None and found["simulated"] is False
    assert red_pixels(folder) == [False, False]


def red_pixels(folder):
    """Whether each figure has the red field that a note stands in."""
    from matplotlib.image import imread
    found = []
    for name in ("loss_lr_plot", "histogram_plot"):
        r, g, b = np.moveaxis(imread(folder / f"figures_resnet/{name}.png")[..., :3], 2, 0)
        found.append(bool(((abs(r - 0.70) < 0.02) & (abs(g - 0.15) < 0.02)
                           & (abs(b - 0.12) < 0.02)).sum() > 500))
    return found


def test_the_log_has_a_row_per_epoch_and_agrees_with_the_trajectory(trained):
    with open(trained[0] / "runs/M1.5_log.csv") as file:
        rows = list(csv.DictReader(file))
    seen = torch.load(trained[0] / "runs/M1.5_trajectory.pth", weights_only=True)
    assert [row["epoch"] for row in rows] == ["1", "2"]
    assert set(seen) == {"batch_train_loss", "epoch_train_loss", "batch_val_loss",
                         "epoch_val_loss", "lr"}
    assert [float(r["train_loss"]) for r in rows] == pytest.approx(
        seen["epoch_train_loss"].tolist(), rel=1e-4)
    assert [float(r["tune_loss"]) for r in rows] == pytest.approx(
        seen["epoch_val_loss"].tolist(), rel=1e-4)
    assert seen["lr"].tolist() == [1e-3, 1e-3]


def test_the_checkpoint_says_how_it_was_made(trained):
    saved = load_checkpoint(trained[0] / "runs/M1.5.pth")
    assert saved["keys"] == ["ppg", "map", "dbp", "hr", "tpp"]
    recipe = {"epochs": 2, "batch_size": 16, "lr": 1e-3, "lr_step": 3, "lr_gamma": 0.2,
              "weight_decay": 0.1, "l1": 1e-4, "seed": 0, "split_seed": 0, "condition": "default",
              "keys": saved["keys"], "processes": 1}
    assert {k: saved["config"][k] for k in recipe} == recipe
    assert saved["provenance"]["origin"] == "simulated"
    assert torch.__version__.startswith(saved["provenance"]["versions"]["torch"].split("+")[0])
    metrics = read_json(trained[0] / "runs/M1.5_metrics.json")
    assert saved["metrics"]["tpp"]["rmse"] == metrics["tpp"]["rmse"]
    assert set(saved["normaliser"]) == {"map", "dbp", "hr", "tpp"}


def test_no_patient_is_in_two_parts_of_the_checkpoint(trained):
    split = load_checkpoint(trained[0] / "runs/M1.5.pth")["split"]
    index = create_dataset_index(path=trained[0] / "data/s.h5")
    salt = read_salt(trained[0] / "data/tpp_ppg.salt")
    assert set(split) == {"train", "tune", "test"}
    assert len(set(sum(split.values(), []))) == sum(map(len, split.values())) == index.n_patients
    for name, part in split_index(index, 0).items():
        assert split[name] == hash_patients(part.patients.tolist(), salt)


def test_vitals_and_label_are_normalised_by_the_train_patients_alone(trained):
    saved = load_checkpoint(trained[0] / "runs/M1.5.pth")
    train = split_index(create_dataset_index(path=trained[0] / "data/s.h5"), 0)["train"]
    column = TPP_PPG_dataset(train, "segment", ["ppg", "tpp"]).column("tpp").double()
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
    members += [(folder / "runs" / name).read_bytes()
                for name in ("M1.5_metrics.json", "M1.5_trajectory.pth", "M1.5_log.csv")]
    for secret in secrets:
        assert not any(secret in member for member in members), secret
    private = read_json(folder / "runs/M1.5_run.json")
    assert "PRIVATE" in private["_"] and private["data"] == [str(folder / "data/s.h5")]


def test_without_data_small_default_patients_are_simulated_once_and_called_so(
        call, monkeypatch, tmp_path):
    monkeypatch.setattr(train_resnet, "SIMULATED", {"patients": 12, "segments": 2, "seed": 3})
    monkeypatch.setattr(train_resnet, "SIMULATED_FILE", "data/simulated_12x2_seed3.h5")
    code, out, err = call(train_resnet, "--epochs", 1, "--device", "cpu", cwd=tmp_path)
    assert code == 0, err
    first = next(line for line in out.splitlines() if "training on SIMULATED patients" in line)
    assert "batch_size 16 instead of" in first and "epochs" not in first    # --epochs was given
    data = tmp_path / "data/simulated_12x2_seed3.h5"
    assert tree(tmp_path) == OUTPUTS | {"data/simulated_12x2_seed3.h5", "data/tpp_ppg.salt"}
    before = data.stat().st_mtime_ns
    assert train_resnet.find_data(train_resnet.parse_args([]), rank=0) == [
        "data/simulated_12x2_seed3.h5"]
    assert data.stat().st_mtime_ns == before


# -------------------------------------------------------------------------------------- evaluating

def test_evaluate_gives_the_scores_that_training_wrote(trained, run, tmp_path):
    done = run("evaluate.py", trained[0] / "runs/M1.5.pth", "--json", "again.json", "--figure",
               "f.png", "--batch-size", 5, "--device", "cpu", cwd=tmp_path, check=0)
    assert tree(tmp_path) == {"again.json", "f.png"} and "SIMULATED" in done.stdout
    expected, found = (flat(read_json(path)) for path in (trained[0] / "runs/M1.5_metrics.json",
                                                          tmp_path / "again.json"))
    assert set(found) == set(expected)
    for key, value in expected.items():
        assert found[key] == (pytest.approx(value, rel=1e-3, abs=1e-3)
                              if isinstance(value, float) else value), key


def flat(obj, name=""):
    if isinstance(obj, dict):
        return {k: v for key, value in obj.items() for k, v in flat(value, f"{name}.{key}").items()}
    if isinstance(obj, list):
        return flat(dict(enumerate(obj)), name)
    return {name: obj}


@pytest.mark.parametrize("split, patients, warning", [
    ("tune", 3, "these are tune patients"), ("train", 23, "these are train patients"),
    ("all", 29, "WERE SEEN IN TRAINING")])
def test_patients_that_were_trained_on_are_scored_under_a_warning(trained, call, split, patients,
                                                                  warning):
    saved = load_checkpoint(trained[0] / "runs/M1.5.pth")["split"]
    expected = sum(map(len, saved.values())) if split == "all" else len(saved[split])
    code, out, err = call(evaluate, "runs/M1.5.pth", "--split", split, "--device", "cpu",
                          "--json", "split.json", cwd=trained[0])
    found = read_json(trained[0] / "split.json")
    os.remove(trained[0] / "split.json")
    assert code == 0 and "WARNING" in err and warning in err and warning in found["warning"]
    assert found["n_patients"] == expected and found["split"] == split


def test_other_data_are_scored_whole_and_by_baselines_of_the_train_patients(trained, call,
                                                                           tmp_path):
    folder = trained[0]
    other = make_file(folder / "data/other.h5", patients=4, rows=2)
    code, out, err = call(evaluate, "runs/M1.5.pth", "--data", other, "--device", "cpu", "--json",
                          tmp_path / "o.json", cwd=folder)
    with h5py.File(other, "r") as file:
        truth = np.mean([encounter["tpp"][:] for patient in file.values()
                         for encounter in patient.values()])
    os.remove(other)
    found = read_json(tmp_path / "o.json")
    assert code == 0 and "WARNING" not in err
    assert (found["n_patients"], found["n_segments"], found["split"]) == (4, 16, "all")
    assert found["origin"] == "unknown" and "true" not in found and found["simulated"] is False
    assert "TRAINED ON SIMULATED" in found["note"] and "TRAINED ON SIMULATED" in out
    # The baseline's mean comes from the train patients, not from the data that are scored.
    train = load_checkpoint(folder / "runs/M1.5.pth")["normaliser"]["tpp"]["mean"]
    assert found["baselines"]["mean_tpp"]["bias"] == pytest.approx(train - truth, abs=0.01)


def test_trained_on_patients_are_recognised_in_another_file(trained, call):
    folder = trained[0]
    with h5py.File(folder / "data/s.h5", "r") as file, \
            h5py.File(folder / "data/copy.h5", "w") as copy:
        copy.attrs.update(file.attrs)
        for name in list(file)[::2]:
            file.copy(name, copy)
        there = len(copy)
    code, out, err = call(evaluate, "runs/M1.5.pth", "--data", "data/cop*.h5", "--device", "cpu",
                          cwd=folder)
    os.remove(folder / "data/copy.h5")
    assert code == 0 and "WERE SEEN IN TRAINING" in err
    assert 0 < int(err.split("WARNING: ")[1].split(" of ")[0]) < there


def test_with_no_record_of_its_data_a_checkpoint_needs_to_be_told(trained, run, call, tmp_path):
    shutil.copy(trained[0] / "runs/M1.5.pth", tmp_path / "lone.pth")
    done = run("evaluate.py", "lone.pth", cwd=tmp_path, check=2)
    assert done.stderr.splitlines()[-1].startswith("error: lone.pth: ") \
        and "--data" in done.stderr and done.stdout == ""
    code, out, err = call(evaluate, "lone.pth", "--data", trained[0] / "data/s.h5", "--device",
                          "cpu", "--split", "test", cwd=tmp_path)
    assert code == 0 and "3 test patients" in out       # the salt lies beside the data


def test_without_the_projects_salt_overlap_is_said_to_be_unchecked(trained, call, tmp_path):
    shutil.copy(trained[0] / "runs/M1.5.pth", tmp_path / "lone.pth")
    shutil.copy(trained[0] / "data/s.h5", tmp_path / "s.h5")
    for salt in (None, "0" * 32 + "\n"):        # none there, or another project's
        if salt:
            (tmp_path / "tpp_ppg.salt").write_text(salt)
        before = tree(tmp_path)
        code, out, err = call(evaluate, "lone.pth", "--data", "s.h5", "--device", "cpu",
                              cwd=tmp_path)
        assert code == 0 and "COULD NOT BE CHECKED" in err and tree(tmp_path) == before
        code, out, err = call(evaluate, "lone.pth", "--data", "s.h5", "--split", "test",
                              cwd=tmp_path)
        assert code == 2 and "salt" in err.splitlines()[-1]


# ------------------------------------------------------------------------- published files and keys

def test_a_published_file_trains_and_evaluates_where_wfdb_is_not_installed(published):
    found = read_json(published[0] / "runs/P_metrics.json")
    assert found["origin"] == "unknown" and "true" not in found
    assert (found["n_patients"], found["n_segments"]) == (1, 3)


def test_a_network_of_pcrit_is_scored_as_tpp(published):
    folder = published[0]
    model = load_model(folder / "runs/P.pth")
    assert model.keys == ["ppg", "p_crit"] and model.network.num_discrete == 0
    test = TPP_PPG_dataset(split_index(create_dataset_index(path=folder / "p.h5"), 0)["test"],
                           "segment", ["ppg", "map", "tpp", "p_crit"])
    p_crit = predict_dataset(model, test, device=CPU)
    error = test.column("map").numpy() - p_crit - test.column("tpp").numpy()
    found = read_json(folder / "runs/P_metrics.json")
    assert found["tpp"]["rmse"] == pytest.approx(np.sqrt(np.mean(error ** 2)), rel=1e-4)
    assert found["p_crit"]["bias"] == pytest.approx(-error.mean(), rel=1e-3)


def test_without_vitals_the_vitals_baselines_are_left_out_and_said_to_be(published):
    folder, printed = published
    found = read_json(folder / "runs/P_metrics.json")
    assert "ridge" not in found["baselines"] and "ridge_all" in found["baselines"]
    assert "baseline ridge left out: the network gets no vitals" in printed


def test_a_field_that_some_encounters_lack_costs_its_baselines_not_the_run(call, tmp_path):
    path = make_file(tmp_path / "p.h5", patients=10, encounters=1, rows=2)
    with h5py.File(path, "r+") as file:
        del file["MRN003/CSN0030/sbp"], file["MRN003/CSN0030/pp"]
        file["MRN003/CSN0030/pp"] = np.full(2, 60, "f4")
    code, out, err = call(train_resnet, "--data", "p.h5", "--epochs", 1, "--device", "cpu",
                          cwd=tmp_path)
    assert code == 0, err
    assert "ridge_all left out: sbp is not in the data" in out


def test_preparing_works_without_wfdb_and_names_it_when_it_is_needed(run, tmp_path):
    environment = without_readers(tmp_path)
    done = run("prepare.py", "--help", cwd=tmp_path, check=0, **environment)
    assert "--out" in done.stdout
    (tmp_path / "r.hea").write_text("r 1 125 10\nr.dat 16 200 16 0 0 0 0 ABP\n")
    (tmp_path / "r.dat").write_bytes(bytes(20))
    done = run("prepare.py", "r.hea", "--out", "o.h5", cwd=tmp_path, **environment)
    assert done.returncode in (1, 2) and "wfdb" in done.stderr and "Traceback" not in done.stderr


# ----------------------------------------------------------------------------- several processes

def test_two_processes_at_half_the_batch_do_what_one_does_and_one_writes(call, tmp_path):
    # (test_training.py has the loop's equality to 1e-9; here Adam amplifies float32 rounding.)
    make_file(tmp_path / "p.h5", patients=10, encounters=1, rows=3)
    options = ["--data", "p.h5", "--epochs", "1", "--device", "cpu"]
    code = call(train_resnet, *options, "--batch-size", 4, "--name", "one", cwd=tmp_path)[0]
    assert code == 0
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
         os.path.join(ROOT, "train_resnet.py"), *options, "--batch-size", "2", "--name", "two"],
        cwd=tmp_path, capture_output=True, text=True, env=dict(os.environ, OMP_NUM_THREADS="1"))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("test: 3 segments") == done.stdout.count("epoch 1/1") == 1
    assert load_checkpoint(tmp_path / "runs/two.pth")["config"]["processes"] == 2
    one, two = (torch.load(tmp_path / f"runs/{name}_trajectory.pth", weights_only=True)
                for name in ("one", "two"))
    for name in ("epoch_train_loss", "epoch_val_loss", "lr"):
        assert two[name].tolist() == pytest.approx(one[name].tolist(), rel=3e-3), name
    scores = [read_json(tmp_path / f"runs/{name}_metrics.json") for name in ("one", "two")]
    assert scores[1]["n_segments"] == scores[0]["n_segments"] == 3
    assert scores[1]["tpp"]["rmse"] == pytest.approx(scores[0]["tpp"]["rmse"], rel=0.02)


# ------------------------------------------------------------------------------ what bad input gets

def reshape(file, key, shape):
    for patient in file.values():
        for encounter in patient.values():
            del encounter[key]
            encounter[key] = np.ones(shape, "f4")


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
        if kind == "foreign":
            for name in list(file):
                del file[name]
            file["train/images"] = np.zeros((3, 3))
        elif kind == "no ppg":
            del file["MRN001/CSN0010/ppg"]
        elif kind == "no r2":
            del file["MRN001/CSN0010/r2"]
        elif kind == "no hr in one":
            del file["MRN002/CSN0020/hr"]
        elif kind == "short rows":
            reshape(file, "ppg", (2, 1, 1800))
        elif kind == "fewer labels":
            reshape(file, "tpp", (1,))
        elif kind == "two vitals a row":
            reshape(file, "map", (2, 2))
        elif kind == "nothing good":
            for patient in file.values():
                for encounter in patient.values():
                    encounter["r2"][:] = 0.1
        elif kind == "nan ppg":
            for patient in file.values():
                for encounter in patient.values():
                    encounter["ppg"][:, 0, 5] = np.nan
        elif kind == "other rate":
            file.attrs["fs"] = 125


@pytest.mark.parametrize("kind, options, message", [
    ("absent", (), "bad.h5: no such file"),
    ("text", (), "bad.h5: not a readable HDF5 file"),
    ("foreign", (), "bad.h5: patient 0, encounter 0 (names: python datasets.py bad.h5 --who 0/0)"),
    ("no ppg", (), "no field 'ppg'"),
    ("no r2", (), "no field 'r2'"),
    ("no hr in one", (), "no field 'hr'"),
    ("short rows", (), "field 'ppg': shape (2, 1, 1800), expected (2, 3600)"),
    ("fewer labels", (), "field 'tpp': shape (1,), expected (2,)"),
    ("two vitals a row", (), "field 'map': shape (2, 2), expected (2,)"),
    ("nothing good", (), "none of 8 segments passes the quality gate"),
    ("nan ppg", (), "none of 8 segments passes the quality gate"),
    ("other rate", (), "expected segments of 60 s at 60 Hz"),
    ("two patients", (), "2 patients with usable segments: expected at least 3"),
    ("good", ("--keys", "ppg", "temperature", "tpp"), "no field 'temperature'"),
    ("good", ("--keys", "ppg", "map", "sbp"), "--keys ppg map sbp: expected ppg, then vitals"),
    ("good", ("--keys", "ppg", "p_crit", "tpp"), "never the label"),
    ("good", ("--keys", "tpp"), "--keys tpp: expected ppg"),
    ("good", ("--condition", "very_good"), "condition 'very_good'"),
    ("good", ("--device", "toaster"), "device 'toaster'"),
    ("good", ("--epochs", "0"), "--epochs 0: expected at least 1"),
    ("good", ("--batch-size", "-3"), "--batch-size -3: expected at least 1"),
    ("good", ("--lr", "nan"), "--lr nan: expected more than 0"),
    ("good", ("--name", "../elsewhere"), "expected a name, not a path"),
    ("good", ("--colour", "red"), "unrecognized arguments: --colour red"),
    ("good", ("--salt-file", "bad.h5"), "bad.h5: expected a salt"),
    ("good", ("--salt-file", "bad.h5/salt"), "bad.h5/salt: Not a directory"),
])
def test_training_refuses_bad_input_in_one_line_and_writes_nothing(call, tmp_path, kind, options,
                                                                   message):
    spoil(tmp_path, kind)
    before = tree(tmp_path)
    code, out, err = call(train_resnet, "--data", "bad.h5", "--epochs", 1, *options, cwd=tmp_path)
    errors = [line for line in err.splitlines() if "error: " in line]
    assert code == 2 and len(errors) == 1 and message in errors[0], err
    assert "Traceback" not in err and tree(tmp_path) <= before | {"tpp_ppg.salt"}


def test_a_script_ends_with_one_line_and_exit_code_2(run, tmp_path):
    for script, arguments in (("train_resnet.py", ["--data", "absent.h5"]),
                              ("evaluate.py", ["absent.pth"])):
        done = run(script, *arguments, cwd=tmp_path, check=2)
        assert done.stdout == "" and len(done.stderr.splitlines()) == 1
        assert done.stderr.startswith("error: absent.") and tree(tmp_path) == set()


@pytest.mark.parametrize("change, arguments, message", [
    (None, ["absent.pth"], "absent.pth: no such checkpoint"),
    (None, ["data/s.h5"], "data/s.h5: not a checkpoint"),
    (None, ["runs/M1.5_log.csv"], "M1.5_log.csv: not a checkpoint"),
    (None, ["runs/M1.5_trajectory.pth"], "not a checkpoint of this project (no dict 'model')"),
    (None, ["runs/M1.5.pth", "--data", "absent.h5"], "absent.h5: no such file"),
    (None, ["runs/M1.5.pth", "--data", "runs/M1.5.pth"], "M1.5.pth: not a readable HDF5 file"),
    (None, ["runs/M1.5.pth", "--split", "best"], "invalid choice: 'best'"),
    (None, ["runs/M1.5.pth", "--condition", "x"], "condition 'x'"),
    (None, ["runs/M1.5.pth", "--colour", "red"], "unrecognized arguments: --colour red"),
    ("moved data", ["runs/M1.5.pth"], "data/s.h5: no such file"),
    ("spoilt record", ["runs/M1.5.pth"], "M1.5_run.json: not the record of a run"),
    ("unlabelled data", ["runs/M1.5.pth", "--data", "u.h5", "--condition", "any"],
     "u.h5: no field 'p_crit'"),
    ("no test patient", ["runs/M1.5.pth", "--data", "data/o.h5", "--split", "test"],
     "none of the checkpoint's test patients"),
])
def test_evaluating_refuses_bad_input_in_one_line_and_writes_nothing(trained, call, tmp_path,
                                                                     change, arguments, message):
    shutil.copytree(trained[0], tmp_path / "copy")
    folder = tmp_path / "copy"
    private = read_json(folder / "runs/M1.5_run.json")
    private = {k: json.loads(json.dumps(v).replace(str(trained[0]), str(folder)))
               for k, v in private.items()}
    (folder / "runs/M1.5_run.json").write_text(json.dumps(private))
    if change == "moved data":
        os.rename(folder / "data/s.h5", folder / "data/t.h5")
    elif change == "spoilt record":
        (folder / "runs/M1.5_run.json").write_text("{")
    elif change == "unlabelled data":
        make_file(folder / "u.h5", fields=("map", "dbp", "hr"))
    elif change == "no test patient":
        make_file(folder / "data/o.h5")
    before = tree(folder)
    code, out, err = call(evaluate, *arguments, "--json", "new.json", "--device", "cpu", cwd=folder)
    errors = [line for line in err.splitlines() if "error: " in line]
    assert code == 2 and len(errors) == 1 and message in errors[0], err
    assert "Traceback" not in err and tree(folder) == before
