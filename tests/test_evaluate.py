"""The evaluation: patients that are scored, checks, calibration, own networks, several runs."""
import json
import os
import shutil

import h5py
import numpy as np
import pandas as pd
import pytest
import torch
from conftest import KEYS, call, make_file

import checkpoint as checkpoints
import evaluate
import metrics
import models
import simulate
from checkpoint import CheckpointError, load_checkpoint
from datasets import DataError, TPP_PPG_dataset, create_dataset_index, fit_normaliser, split_index
from training_header import NormalisedModel, load_model, predict_dataset

pytestmark = pytest.mark.usefixtures("small")
BASELINES = {"mean_tpp", "map_minus_mean_pcrit", "ridge", "gradient_boosting",
             "ridge_ppg", "gradient_boosting_ppg", "ridge_all", "gradient_boosting_all"}


class MyNet(torch.nn.Module):
    """Without features()."""

    def __init__(self, offset=0.0):
        super().__init__()
        self.layer, self.offset = torch.nn.Linear(4, 1), offset

    def forward(self, ppg, *vitals):
        return self.layer(torch.stack([ppg.std(-1)[:, 0], *vitals], 1)) + self.offset


def save_run(data, name="a", network=None, calibrated=True, seed=0):
    """A run's files as train_resnet.py writes them, of an untrained network; its checkpoint."""
    parts = split_index(create_dataset_index(path=str(data)))
    train, tune = (TPP_PPG_dataset(parts[part], "segment", KEYS) for part in ("train", "tune"))
    torch.manual_seed(seed)
    model = NormalisedModel(network or models.MODELS["resnet_v3"](3), KEYS,
                            fit_normaliser(train, KEYS[1:]))
    calibration = evaluate.make_calibration(model, tune) if calibrated else {}
    folder = data.parent / "runs" / name
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "run.json").write_text(json.dumps(
        {"data": [os.path.realpath(data)], "salt_file": str(data.parent / "tpp_ppg.salt")}))
    checkpoints.save_checkpoint(f"{folder}.pth", model, calibration=calibration, split=parts)
    return f"{folder}.pth"


@pytest.fixture(scope="module")
def data(simulated, tmp_path_factory):
    """The simulated patients' file, in a folder of its own."""
    return shutil.copy(simulated, tmp_path_factory.mktemp("evaluated") / "s.h5")


@pytest.fixture(scope="module")
def run_a(data):
    return save_run(data)


def test_the_results_hold_every_score_of_the_test_patients(run_a, data):
    results, segments = evaluate.evaluate_with_arrays(run_a, full=True)
    assert set(results["baselines"]) == BASELINES
    assert set(results["per_patient"]["tpp"]) == set(metrics.BY_PATIENT)
    assert results["checks"]["shared_seconds"] == {"train": 0, "tune": 0}
    assert results["note"].startswith("SIMULATED PATIENTS") and results["split"] == "test"
    strata = pd.DataFrame(results["strata"]).groupby("of")["n_segments"].sum()
    assert {"TPP", "MAP", "Heart rate"} <= set(strata.index)
    assert (strata == results["n_segments"]).all()      # together they hold every segment once
    parts = split_index(create_dataset_index(path=str(data)))
    found = predict_dataset(load_model(run_a), TPP_PPG_dataset(parts["test"], "segment", KEYS))
    assert segments.tpp == pytest.approx(found.astype(float))
    assert results["n_train_patients"] == parts["train"].n_patients


def test_training_passes_its_parts_and_gets_the_same_numbers(run_a, data):
    parts, fitted = split_index(create_dataset_index(path=str(data))), {}
    alone = evaluate.evaluate(run_a)
    for _ in range(2):
        found = evaluate.evaluate(run_a, parts["test"], split="test", train=parts["train"],
                                  tune=parts["tune"], fitted=fitted)
        for key, values in alone.items():
            assert str(found[key]) == str(values), key      # NaN equals NaN in text
    assert len(fitted) == 2                                 # the baselines, and the results


def test_a_network_of_ones_own_is_scored_in_memory_and_from_its_checkpoint(data):
    index = create_dataset_index(path=str(data))
    model = NormalisedModel(MyNet(), KEYS, fit_normaliser(
        TPP_PPG_dataset(index, "segment", KEYS), KEYS[1:]))
    results = evaluate.evaluate(model, index)
    assert results["n_segments"] == len(index) and results["skill"] is None
    assert results["uncertainty"] == {"levels": {}} and results["n_train_patients"] is None
    path = save_run(data, "own", MyNet())
    assert evaluate.evaluate(path, network=MyNet)["uncertainty"]["levels"]
    with pytest.raises(CheckpointError, match="--model"):
        evaluate.evaluate(path)
    path = save_run(data, "absurd", MyNet(1e5), calibrated=False)
    with pytest.raises(DataError, match="the network predicts .* are beyond ± 500"):
        evaluate.evaluate(path, network=lambda: MyNet(1e5))


def test_swapping_gives_each_segment_the_ppg_of_another_patient_and_keeps_its_vitals(published):
    segments = evaluate.read_segments(create_dataset_index(path=published), KEYS)

    class Sum(torch.nn.Module):
        def forward(self, ppg, map_):       # sample 0 of a row is its own number
            return ppg[:, :, 0] + map_[:, None]

    identity = {key: {"mean": 0.0, "sd": 1.0} for key in ("map", "tpp")}
    model = NormalisedModel(Sum(), ["ppg", "map", "tpp"], identity, "none")
    evaluate.predict_with_swapped_ppg(model, segments, None)
    donors = (segments.fields["swapped"] - segments.fields["map"]).round().astype(int)
    assert sorted(donors) == list(range(96))
    assert (segments.patients[donors] != segments.patients).all()


def test_calibrating_on_data_gives_intervals_there_and_takes_them_away_elsewhere(data, capsys):
    path = save_run(data, "calibrated")
    real = make_file(data.parent / "real.h5", patients=40, encounters=1, rows=4, seed=1)
    results = evaluate.evaluate(path, data=[real])
    levels = results["uncertainty"]["levels"]
    assert levels["90 %"]["refused"] == "too few tune patients (3): a 90 % interval needs 9"
    refused = levels["50 %"]["refused"]
    assert "calibrated on simulated data, not on data of unknown origin" in refused
    assert "--calibrate DATA" in refused
    assert "90 % prediction interval: none" in evaluate.report.interval_text(results)
    evaluate.calibrate(path, [real])
    assert "40 patients (unknown)" in capsys.readouterr().out
    assert len(load_checkpoint(path)["split"]["calibration"]) == 40
    results = evaluate.evaluate(path, data=[real])
    assert results["uncertainty"]["levels"]["90 %"]["patients"]["value"] >= 0.9
    assert "not a test of it" in evaluate.report.interval_text(results)     # the same patients
    assert "refused" in evaluate.evaluate(path)["uncertainty"]["levels"]["90 %"]
    with pytest.raises(DataError, match="intervals need patients that this run has not used"):
        evaluate.calibrate(path, [str(data)])


def test_labels_of_another_method_than_in_training_are_reported(data, tmp_path):
    simulate.simulate_file(tmp_path / "b.h5", 4, 2, 3, label_method="waveform_balance")
    results = evaluate.evaluate(save_run(data, "methods"), data=[str(tmp_path / "b.h5")])
    assert ("labels by the method waveform_balance, but the model was trained on published"
            in results["problems"])


def test_a_checkpoint_without_calibration_is_calibrated_on_the_tune_patients(data):
    path = save_run(data, "uncalibrated", calibrated=False)
    parts = split_index(create_dataset_index(path=str(data)))
    tune = TPP_PPG_dataset(parts["tune"], "segment", KEYS)
    found = evaluate.make_calibration(load_model(path), tune)
    error = predict_dataset(load_model(path), tune) - tune.column("tpp").numpy()
    expected = metrics.fit_calibration(error, tune.index.segment_patients())
    assert found["half_widths"] == expected["half_widths"] and found["origin"] == "simulated"
    assert "half_width" in evaluate.evaluate(path)["uncertainty"]["levels"]["50 %"]
    model = load_model(path)
    model.anchor = {"refitted": True}       # to the tune patients: their errors are too small
    found = evaluate.evaluate(model, parts["test"], train=parts["train"], tune=parts["tune"])
    assert found["uncertainty"]["levels"] == {}


def test_a_constant_output_and_one_that_ignores_the_ppg_are_reported():
    patients = np.repeat(np.arange(20), 10)
    map_, tpp = np.random.default_rng(0).normal([[78], [36]], 10, (2, 200))
    fields = {"map": map_, "tpp": tpp, "p_crit": map_ - tpp, "swapped": tpp}
    segments = evaluate.Segments(fields, patients, patients, patients.astype(str))
    for segments.tpp, said in ((tpp + 1, ""), (tpp, "IGNORES THE PPG"),
                               (np.full(200, 41.0), "CONSTANT OUTPUT")):
        found = evaluate.problem_lines(evaluate.score_all(segments, full=True)["checks"])
        assert len(found) == bool(said) and said in " ".join(found)


def test_patients_in_two_parts_of_a_checkpoint_are_counted():
    for train, tune, ancestors, expected in (("ab", "b", "", 1), ("a", "c", "dx", 1),
                                             ("a", "c", "ac", 0)):
        split = {"train": train, "tune": tune, "test": "d", "ancestors": ancestors}
        found = evaluate.check_parts(split, None, None, None)
        assert found == {"patients_in_two_parts": expected}
        assert len(evaluate.problem_lines(found)) == expected


def test_segments_shared_between_parts_are_found_also_where_windows_overlap(tmp_path):
    rng = np.random.default_rng(0)
    record, clean, flat = rng.normal(size=14400), rng.normal(size=(3, 3600)), rng.normal(size=3600)
    clean[0, 600:1200] = flat[600:1200] = 0.5           # ten flat seconds are no match
    patients = {"p": record.reshape(4, 3600), "duplicate": record[None, :3600],
                "overlapping": record[None, 1800:5400], "clean": clean, "flat": flat[None]}
    with h5py.File(tmp_path / "d.h5", "w") as file:     # of the published kind
        for name, ppg in patients.items():
            file[f"{name}/1/ppg"] = ppg.astype("f4")
            for key, value in (("map", 80), ("p_crit", 40), ("tpp", 40), ("r2", 0.9), ("pp", 50)):
                file[f"{name}/1/{key}"] = np.full(len(ppg), value, "f4")
    index = create_dataset_index(path=str(tmp_path / "d.h5"))
    part = {name: index.select((index.patients == name)[index.encounter_patient])
            for name in patients}
    for names, train, tune in ((("p", "duplicate", "overlapping"), 1, 2),
                               (("clean", "flat", "p"), 0, 0)):
        found = evaluate.check_parts(None, *(part[name] for name in names))
        assert found == {"shared_seconds": {"train": train, "tune": tune}}
    assert "3 segments with seconds of PPG that are also in train" in evaluate.problem_lines(
        {"shared_seconds": {"train": 3, "tune": 0}})[0]


def test_patients_seen_in_training_and_missing_salts_are_reported(run_a, data, tmp_path, capsys):
    results = evaluate.evaluate(run_a, split="all")
    assert "WERE SEEN IN TRAINING" in results["problems"][0]
    assert "WARNING: " + results["problems"][0] in capsys.readouterr().err
    os.makedirs(tmp_path / "runs")
    alone = shutil.copy(run_a, tmp_path / "runs")
    with pytest.raises(DataError, match="name them with --data"):
        evaluate.evaluate(str(alone))
    other = [str(shutil.copy(data, tmp_path / "s.h5"))]     # a folder without the run's salt
    results = evaluate.evaluate(str(alone), data=other)
    assert "NOT CHECKED" in results["problems"][0] and results["skill"] is None
    with pytest.raises(DataError, match="without this run's salt"):
        evaluate.evaluate(str(alone), data=other, split="test")


def test_several_runs_are_scored_each_and_together(data, run_a):
    save_run(data, "b", seed=1)
    save_run(data, "a_no_ppg", seed=2)
    out = call(evaluate, run_a, "runs/b.pth", "--json", "all.json", cwd=data.parent, check=0).stdout
    assert "these runs differ" not in out and "SIMULATED" in out and "\nSD " in out
    assert max(map(len, out.splitlines())) <= 100 and "nan" not in out
    found = json.loads((data.parent / "all.json").read_text())
    first, second, pooled = *found["runs"], found["together"]
    biases = [one["tpp"]["bias"] for one in (first, second)]
    assert pooled["tpp"]["bias"] == pytest.approx(np.mean(biases)) and len(set(biases)) == 2
    assert pooled["n_patients"] == first["n_patients"]
    assert pooled["n_segments"] == first["n_segments"] == pooled["n_predictions"] / 2
    assert f"Scored on {first['n_segments']} minutes of " in out
    assert "each predicted by 2 runs" in " ".join(out.split())
    assert "model without the PPG" in first["compared"]       # of --ablate, listed


def test_differences_between_runs_other_than_seed_and_fold_are_reported(data):
    paths = [save_run(data, name) for name in "rq"]
    config = {"epochs": 40, "seed": 0, "fold": 0, "keys": KEYS, "l1": 0.0}
    saved = dict(load_checkpoint(paths[0]), config=config)
    checkpoints.save_tensors(paths[0], saved)
    other = dict(config, seed=1, fold=1)
    for changes, names in (({"config": other}, None), ({"spec": "mine.py:Net"}, "model"),
                           ({"keys": KEYS[1:], "config": dict(other, epochs=1)}, "inputs, epochs"),
                           ({"config": dict(other, lr=1.0)}, "lr")):
        checkpoints.save_tensors(paths[1], dict(saved, **changes))
        said = [f"these runs differ in {names}: their mean says nothing about any of them"]
        assert evaluate.differences(paths) == (said if names else [])
    assert said[0] in evaluate.compare_runs(paths)[0]["together"]["problems"]


def test_the_command_line_refuses_before_any_work(data):
    for arguments, said in ((["runs/a.pth", "--report", "x.pdf"], "ends in .html"),
                            (["runs/a.pth", "--json", "runs/a.pth"], "ends in .json"),
                            (["runs/a.pth", "--json", "/proc/version/a.json"], "/proc/version"),
                            (["runs/none.pth"], "no such checkpoint")):
        assert said in call(evaluate, *arguments, cwd=data.parent, check=2).stderr


def test_a_series_of_minutes_ends_at_a_refused_minute_and_at_a_gap_in_time(tmp_path):
    path = make_file(tmp_path / "f.h5", 3, 1, 8)
    with h5py.File(path, "r+") as file:
        file["MRN001/CSN0010/r2"][3] = 0.1
        for patient in file.values():
            for encounter in patient.values():
                encounter["start_s"] = 60.0 * np.arange(8) + 3600 * (np.arange(8) >= 6)
    segments = evaluate.read_segments(create_dataset_index(path=path), KEYS)
    assert np.bincount(segments.series).tolist() == [6, 2, 3, 2, 2, 6, 2]
