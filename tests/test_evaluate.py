"""The evaluation: which patients are scored, checks of honesty, calibration, own networks, runs."""
import json
import os
import shutil

import h5py
import numpy as np
import pytest
import torch
from conftest import make_file

import baselines
import evaluate
import metrics
from checkpoint import (
    hash_split,
    load_checkpoint,
    patient_parts,
    read_salt,
    salt_mark,
    save_checkpoint,
)
from datasets import DataError, TPP_PPG_dataset, create_dataset_index, fit_normaliser, split_index
from models import get_model_v3
from training_header import NormalisedModel, load_model, predict_dataset

KEYS = ["ppg", "map", "dbp", "hr", "tpp"]
BASELINES = {"mean_tpp", "map_minus_mean_pcrit", "ridge", "gradient_boosting",
             "gradient_boosting_ppg", "ridge_all", "gradient_boosting_all"}


class MyNet(torch.nn.Module):
    """A network of one's own, without features()."""

    def __init__(self, num_discrete=3):
        super().__init__()
        self.layer = torch.nn.Linear(1 + num_discrete, 1)

    def forward(self, ppg, *vitals):
        return self.layer(torch.stack([ppg.std(-1)[:, 0], *vitals], 1))


class ManyUnits(MyNet):
    """A network that has gone wrong: thousands of mmHg."""

    def forward(self, ppg, *vitals):
        return super().forward(ppg, *vitals) + 1e5


def save_run(folder, data, name="a", network=None, calibrated=True, seed=0):
    """A run's files as train_resnet.py writes them, of an untrained network; its checkpoint."""
    index = create_dataset_index(path=str(data))
    parts, salt_path = split_index(index), folder / "tpp_ppg.salt"
    salt = read_salt(salt_path)
    sets = {part: TPP_PPG_dataset(parts[part], "segment", KEYS) for part in ("train", "tune")}
    torch.manual_seed(seed)
    model = NormalisedModel(network or get_model_v3(3), KEYS, fit_normaliser(sets["train"],
                                                                            KEYS[1:]))
    calibration = evaluate.make_calibration(model, *sets.values()) if calibrated else {}
    os.makedirs(folder / "runs" / name, exist_ok=True)
    (folder / "runs" / name / "run.json").write_text(json.dumps(
        {"data": [os.path.realpath(data)], "salt_file": str(salt_path)}))
    path = str(folder / "runs" / f"{name}.pth")
    save_checkpoint(path, model, calibration=calibration, split=hash_split(parts, salt),
                    provenance={"origin": "simulated", "salt": salt_mark(salt)})
    return path


@pytest.fixture(scope="module", autouse=True)
def few_rounds():
    """Few rounds of boosting: from some dozen segments nothing more is learned in 200."""
    before, baselines.BOOSTING_ROUNDS = baselines.BOOSTING_ROUNDS, 10
    yield
    baselines.BOOSTING_ROUNDS = before


@pytest.fixture(scope="module")
def data(simulated, tmp_path_factory):
    """A folder with the simulated patients' file and its salt."""
    folder = tmp_path_factory.mktemp("evaluated")
    return shutil.copy(simulated, folder / "s.h5")


@pytest.fixture(scope="module")
def folder(data):
    from pathlib import Path
    return Path(data).parent


@pytest.fixture(scope="module")
def run_a(folder, data):
    return save_run(folder, data)


@pytest.fixture(scope="module")
def scored(run_a):
    return evaluate.evaluate_with_arrays(run_a, full=True)


# ---------------------------------------------------------------- what is in the results

def test_the_results_hold_every_score_with_its_interval(scored):
    results, _ = scored
    assert set(results["baselines"]) == BASELINES
    assert set(results["per_patient"]["tpp"]) == set(metrics.BY_PATIENT)
    assert {"tpp", "p_crit"} == set(results["trend"]) == set(results["within_patient"])
    assert {"sensitivity", "specificity", "auc"} <= set(results["detection"])
    assert {row["of"] for row in results["strata"]} >= {"TPP", "MAP", "Heart rate"}
    good = results["good_signal"]
    assert good["n_segments"] >= results["n_segments"] and 0 < good["share_kept_by_gate"] <= 1
    assert results["checks"]["shared_seconds"] == {"train": 0, "tune": 0}
    assert results["checks"]["overlapping_windows"] == 0
    assert results["note"].startswith("SIMULATED PATIENTS") and results["split"] == "test"
    json.dumps(results, default=lambda value: value.item())


def test_the_predictions_are_those_of_the_network_on_the_test_patients(scored, run_a, folder, data):
    results, segments = scored
    index = create_dataset_index(path=data)
    parts = patient_parts(index, load_checkpoint(run_a), folder / "tpp_ppg.salt")
    test = index.select((parts == "test")[index.encounter_patient])
    found = predict_dataset(load_model(run_a), TPP_PPG_dataset(test, "segment", KEYS))
    assert segments.tpp == pytest.approx(found.astype(float))
    assert results["n_train_patients"] == (parts == "train").sum()


def test_strata_together_hold_every_segment_once(scored):
    results, _ = scored
    for name in {row["of"] for row in results["strata"]}:
        assert sum(row["n_segments"] for row in results["strata"]
                   if row["of"] == name) == results["n_segments"]


def test_training_hands_over_its_parts_and_gets_the_same_numbers(run_a, data):
    parts, fitted = split_index(create_dataset_index(path=data)), evaluate.Fitted()
    alone = evaluate.evaluate(run_a)
    for found in (evaluate.evaluate(run_a, parts["test"], split="test", train=parts["train"],
                                    tune=parts["tune"], fitted=fitted) for _ in range(2)):
        for key, values in alone.items():
            assert str(found[key]) == str(values), key      # NaN equals NaN in text
    assert len(fitted.baselines) == 1 and not fitted.indexes


# ---------------------------------------------------------------- any network

def test_a_network_of_ones_own_is_scored_in_memory_and_from_its_checkpoint(folder, data):
    model = NormalisedModel(MyNet(), KEYS, fit_normaliser(
        TPP_PPG_dataset(create_dataset_index(path=data), "segment", KEYS), KEYS[1:]))
    index = create_dataset_index(path=data)
    results = evaluate.evaluate(model, index)
    assert results["n_segments"] == len(index) and results["skill"] is None
    assert results["uncertainty"] is None and results["n_train_patients"] is None
    path = save_run(folder, data, "own", MyNet())
    results = evaluate.evaluate(path, network=MyNet)
    assert not results["uncertainty"]["has_features"] and "novelty" not in results["uncertainty"]
    assert "no features()" in evaluate.report.novelty_text(results)
    with pytest.raises(evaluate.CheckpointError, match="--model"):
        evaluate.evaluate(path)


def test_absurd_predictions_are_refused(folder, data):
    path = save_run(folder, data, "absurd", ManyUnits(), calibrated=False)
    with pytest.raises(DataError, match="predicts a TPP of .* are beyond ± 500"):
        evaluate.evaluate(path, network=ManyUnits)


def test_swapping_gives_each_segment_the_ppg_of_another_patient(data):
    index = create_dataset_index(path=data)
    segments = evaluate.read_segments(index, KEYS, evaluate.Fitted())
    seen = []

    class Spy(torch.nn.Module):
        def forward(self, ppg, map_):
            seen.append(ppg.clone())
            return map_[:, None]

    identity = {key: {"mean": 0.0, "sd": 1.0} for key in ("map", "tpp")}
    model = NormalisedModel(Spy(), ["ppg", "map", "tpp"], identity, "none")
    swapped = evaluate.predict_with_swapped_ppg(model, segments)
    assert swapped == pytest.approx(segments.fields["map"], rel=1e-6)   # the vitals stay
    ppg = torch.cat(seen)[-len(segments):, 0].numpy()
    own = segments.waveform(np.arange(len(segments)))
    donors = [segments.patients[np.flatnonzero((own == row).all(1))[0]] for row in ppg]
    assert (np.array(donors) != segments.patients).all()
    assert len(np.unique(ppg[:, :99], axis=0)) == len(segments)         # each is used once


# ---------------------------------------------------------------- calibration

def test_the_intervals_of_simulated_patients_are_not_shown_for_real_ones(run_a, folder, capsys):
    real = make_file(folder / "real.h5", patients=24, encounters=1, rows=4)
    results = evaluate.evaluate(run_a, data=[real])
    level = results["uncertainty"]["levels"]["90 %"]
    assert "calibrated on data of origin 'simulated'" in level["refused"]
    assert "--calibrate DATA" in level["refused"]
    assert "90 % prediction interval: none" in evaluate.report.interval_text(results)


def test_calibrating_on_data_gives_intervals_there_and_takes_them_away_elsewhere(folder, data,
                                                                                 capsys):
    path = save_run(folder, data, "calibrated")
    real = make_file(folder / "more.h5", patients=40, encounters=1, rows=4, seed=1)
    evaluate.calibrate(path, [real])
    assert "40 patients (unknown)" in capsys.readouterr().out
    saved = load_checkpoint(path)
    assert saved["calibration"]["origin"] == "unknown" and len(saved["split"]["calibration"]) == 40
    results = evaluate.evaluate(path, data=[real])
    level = results["uncertainty"]["levels"]["90 %"]
    assert level["patients"]["value"] >= 0.9        # the very patients of the calibration: it says
    assert results["uncertainty"]["n_patients_of_calibration"] == 40
    assert "not a test of it" in evaluate.report.interval_text(results)
    assert "refused" in evaluate.evaluate(path)["uncertainty"]["levels"]["90 %"]


def test_test_patients_are_not_calibrated_on(folder, data):
    path = save_run(folder, data, "spared")
    found = evaluate.calibrate(path, [data])
    assert found["n_patients"] == len(load_checkpoint(path)["split"]["tune"])
    assert load_checkpoint(path)["split"]["calibration"] == []


def test_a_checkpoint_without_calibration_is_calibrated_on_the_tune_patients(folder, data):
    path = save_run(folder, data, "uncalibrated", calibrated=False)
    parts = split_index(create_dataset_index(path=data))
    model = load_model(path)
    train, tune = (TPP_PPG_dataset(parts[name], "segment", KEYS) for name in ("train", "tune"))
    found = evaluate.make_calibration(model, train, tune)
    error = predict_dataset(model, tune) - tune.column("tpp").numpy()
    expected = metrics.fit_calibration(error, tune.index.segment_patients())
    assert {key: found[key] for key in expected} == expected
    assert found["origin"] == "simulated" and found["label_method"] == "published"
    assert len(found["novelty"]["mean"]) == 256 + 3     # what the last layers see
    assert evaluate.evaluate(path)["uncertainty"]["n_calibration_patients"] == expected[
        "n_patients"]


# ---------------------------------------------------------------- honesty

def fake_segments(n_patients=20, each=10, seed=0, **fields):
    rng = np.random.default_rng(seed)
    n = n_patients * each
    values = {"map": rng.normal(78, 10, n), "tpp": rng.normal(36, 12, n)}
    values["p_crit"] = values["map"] - values["tpp"]
    values.update(fields)
    patients = np.repeat(np.arange(n_patients), each)
    return evaluate.Segments(values, patients, patients, patients.astype(str),
                             tpp=values["tpp"] + 1, baselines={"ridge": np.full(n, 36.0)},
                             best="ridge")


def checks_of(segments):
    results = evaluate.score_all(segments)
    return results["checks"], evaluate.problems(results)


def test_a_constant_output_and_one_that_ignores_the_ppg_are_named():
    segments = fake_segments()
    assert checks_of(segments)[1] == []
    segments.swapped = segments.tpp.copy()
    assert "IGNORES THE PPG" in checks_of(segments)[1][0]
    segments.tpp = np.full(len(segments), 41.0)
    assert "CONSTANT OUTPUT" in checks_of(segments)[1][0]


def test_patients_in_two_parts_of_a_checkpoint_are_counted():
    for split, expected in (
            ({"train": ["a", "b"], "tune": ["b"], "test": ["d"]}, 1),
            ({"train": ["a"], "tune": ["c"], "test": ["d"], "ancestors": ["d", "x"]}, 1),
            ({"train": ["a"], "tune": ["c"], "test": ["d"], "ancestors": ["a", "c"]}, 0)):
        assert evaluate.patients_in_two_parts(split) == expected


def test_shuffled_labels_show_no_skill_whatever_the_model():
    for seed in range(5):
        skill = checks_of(fake_segments(seed=seed))[0]["skill_with_shuffled_labels"]
        assert skill["low"] <= 0


def test_overlapping_windows_of_an_encounter_are_counted():
    start = np.tile(np.arange(10) * 60.0, 20)
    assert checks_of(fake_segments(start_s=start))[0]["overlapping_windows"] == 0
    start[5] -= 30
    assert checks_of(fake_segments(start_s=start))[0]["overlapping_windows"] == 1


def write_ppg(path, **patients):
    """{patient: index} of a file of the published kind, one encounter a patient, PPG as given."""
    with h5py.File(path, "w") as file:
        for name, ppg in patients.items():
            group = file.create_group(f"{name}/1")
            group["ppg"] = ppg.astype("f4")
            for key, value in (("map", 80), ("p_crit", 40), ("tpp", 40), ("r2", 0.9), ("pp", 50)):
                group[key] = np.full(len(ppg), value, "f4")
    index = create_dataset_index(path=str(path))
    return {name: index.select((index.patients == name)[index.encounter_patient])
            for name in patients}


def test_segments_shared_between_parts_are_found_also_where_windows_overlap(tmp_path):
    rng = np.random.default_rng(0)
    record = rng.normal(size=3600 * 4)
    clean = rng.normal(size=(3, 3600))
    clean[0, 600:1200] = 0.5                                    # ten flat seconds are no match
    flat = rng.normal(size=(1, 3600))
    flat[0, 600:1200] = 0.5
    parts = write_ppg(tmp_path / "d.h5", p=record.reshape(4, 3600), duplicate=record[None, :3600],
                      overlapping=record[None, 1800:5400], clean=clean, flat=flat)
    assert evaluate.shared_seconds(parts["p"], {"d": parts["duplicate"]}) == {"d": 1}
    assert evaluate.shared_seconds(parts["p"], {"o": parts["overlapping"]}) == {"o": 2}
    assert evaluate.shared_seconds(parts["clean"], {"f": parts["flat"], "p": parts["p"]}) == {
        "f": 0, "p": 0}


def test_a_duplicate_under_another_name_makes_the_results_say_leaked(tmp_path, data, capsys):
    copy = shutil.copy(data, tmp_path / "s.h5")
    path = save_run(tmp_path, copy)
    parts = split_index(create_dataset_index(path=str(copy)))
    with h5py.File(copy, "r+") as file:
        train, test = (next(iter(file[parts[name].patients[0]].values()))["ppg"]
                       for name in ("train", "test"))
        test[:1] = train[:1]
    results = evaluate.evaluate(path)
    assert results["checks"]["shared_seconds"]["train"] >= 1
    assert "share seconds of PPG with train segments" in capsys.readouterr().err


# ---------------------------------------------------------------- which patients are scored

def test_patients_seen_in_training_are_warned_of_and_missing_salts_said(run_a, data, tmp_path,
                                                                        capsys):
    results = evaluate.evaluate(run_a, split="all")
    assert "WERE SEEN IN TRAINING" in results["warning"]
    assert "not a test" in evaluate.evaluate(run_a, split="train")["warning"]
    elsewhere = tmp_path / "runs"
    os.makedirs(elsewhere)
    alone = shutil.copy(run_a, elsewhere)
    with pytest.raises(DataError, match="name them with --data"):
        evaluate.evaluate(str(alone))
    other = shutil.copy(data, tmp_path / "s.h5")        # a folder without the run's salt
    results = evaluate.evaluate(str(alone), data=[str(other)])
    assert "NOT CHECKED" in results["warning"] and results["skill"] is None
    with pytest.raises(DataError, match="without this run's salt"):
        evaluate.evaluate(str(alone), data=[str(other)], split="test")


# ---------------------------------------------------------------- several runs

def test_several_runs_are_scored_with_their_mean_and_sd_and_together(folder, data, run_a, run):
    save_run(folder, data, "b", seed=1)
    save_run(folder, data, "a_no_ppg", seed=2)
    done = run("evaluate.py", "runs/a.pth", "runs/b.pth", "--json", "all.json", cwd=folder, check=0)
    assert "SIMULATED" in done.stdout and "\nSD " in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 100 and "nan" not in done.stdout
    found = json.loads((folder / "all.json").read_text())
    values = [one["tpp"]["bias"] for one in found["runs"]]
    assert values[0] != values[1]
    assert found["summary"]["tpp.bias"]["mean"] == pytest.approx(np.mean(values))
    assert found["summary"]["tpp.bias"]["sd"] == pytest.approx(np.std(values, ddof=1))
    pooled = found["together"]
    assert pooled["n_patients"] == found["runs"][0]["n_patients"]
    assert pooled["n_segments"] == 2 * found["runs"][0]["n_segments"]
    assert "network without the PPG" in found["runs"][0]["compared"]    # of --ablate, listed


def test_the_command_line_refuses_in_one_line_before_any_work(folder, run, capsys, monkeypatch):
    monkeypatch.chdir(folder)
    for arguments, said in ((["runs/a.pth", "--report", "x.pdf"], "ends in .html"),
                            (["runs/a.pth", "--json", "runs/a.pth"], "ends in .json"),
                            (["runs/a.pth", "--json", "/proc/version/a.json"], "/proc/version")):
        monkeypatch.setattr("sys.argv", ["evaluate.py", *arguments])
        with pytest.raises((SystemExit, OSError)) as refused:
            evaluate.main()
        assert said in capsys.readouterr().err + str(refused.value)
    done = run("evaluate.py", "runs/none.pth", cwd=folder, check=2)
    assert "no such checkpoint" in done.stderr and len(done.stderr.splitlines()) == 1
