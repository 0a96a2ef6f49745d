"""Virtual patients: the same for every number of workers, with honest labels and physics."""
import csv
import os
import pathlib
import subprocess
import sys

import h5py
import numpy as np
import pytest

import datasets
import labels
import simulate

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "benchmarks"))

import label_error  # noqa: E402


def content(path):
    found = {}
    with h5py.File(path, "r") as file:
        found["attributes"] = dict(file.attrs)
        file.visititems(lambda name, item: found.update({name: item[()].tobytes()})
                        if isinstance(item, h5py.Dataset) else None)
    return found


@pytest.fixture(scope="module")
def cohort():
    """All fields of 60 patients of 4 minutes, concatenated, with the ABP and the gate."""
    patients = [simulate.simulate_patient(3, k, 4, keep_abp=True) for k in range(60)]
    fields = {name: np.concatenate([p[name] for p in patients]) for name in patients[0]}
    with np.errstate(invalid="ignore"):
        gate = ((fields["reason"] == 0) & (fields["r2"] > 0.5) & (fields["p_crit"] > 0)
                & (fields["p_crit"] < fields["map"]) & (fields["pp"] > 10) & (fields["map"] < 120)
                & (fields["p_crit"] < 100))
    return fields, gate


def test_the_file_does_not_depend_on_the_number_of_workers(tmp_path, run):
    simulate.simulate_file(tmp_path / "1.h5", 5, 2, seed=7, workers=1, quiet=True)
    done = run("simulate.py", "--out", "2.h5", "--patients", 5, "--segments", 2, "--seed", 7,
               "--workers", 2, cwd=tmp_path, check=0)
    assert content(tmp_path / "1.h5") == content(tmp_path / "2.h5")
    with h5py.File(tmp_path / "1.h5", "r") as file:
        assert file.attrs["origin"] == "simulated"
        assert list(file) == [f"sim7-{k:06d}" for k in range(5)]
        assert file["sim7-000000/1/ppg"].shape == (2, 3600)
    assert "r2 > 0.5" in done.stdout


def test_another_seed_and_another_patient_are_another_person():
    first = simulate.simulate_patient(1, 0, 1)["ppg"]
    np.testing.assert_array_equal(first, simulate.simulate_patient(1, 0, 1)["ppg"])
    assert not np.array_equal(first, simulate.simulate_patient(2, 0, 1)["ppg"])
    assert not np.array_equal(first, simulate.simulate_patient(1, 1, 1)["ppg"])


@pytest.mark.parametrize("method", labels.METHODS)
def test_the_labels_are_those_of_the_stored_arterial_pressure(tmp_path, method):
    path = tmp_path / "a.h5"
    simulate.simulate_file(path, 2, 3, seed=1, quiet=True, keep_abp=True, label_method=method)
    with h5py.File(path, "r") as file:
        assert file.attrs["label_method"] == method
        assert file.attrs["beats"] == "foot"
        for group in (file["sim1-000000/1"], file["sim1-000001/1"]):
            again = labels.label_segments(group["abp"][()], 60, method)
            for name in labels.FIELDS:
                np.testing.assert_array_equal(group[name][()], again[name])


def test_gated_segments_look_like_the_published_cohort(cohort):
    fields, gate = cohort
    assert gate.mean() > 0.6
    for name, mean, within in (("map", 76.7, 5), ("sbp", 118, 10), ("dbp", 56, 7), ("pp", 62.5, 8),
                               ("hr", 77, 8), ("p_crit", 40.5, 7)):
        assert fields[name][gate].mean() == pytest.approx(mean, abs=within), name
    assert 9 < fields["p_crit"][gate].std() < 20


def test_the_label_follows_the_truth_with_the_error_that_the_method_has(cohort):
    fields, gate = cohort
    error = (fields["p_crit"] - fields["p_crit_true"])[gate]
    assert 0 < error.mean() < 6
    assert error.std() < 8
    assert np.corrcoef(fields["p_crit"][gate], fields["p_crit_true"][gate])[0, 1] > 0.85


def test_the_ppg_trails_the_pressure_by_the_stored_delay(cohort):
    fields, gate = cohort
    lag = []
    for abp, ppg in zip(fields["abp"][gate], fields["ppg"][gate]):
        slope_abp, slope_ppg = np.diff(abp - abp.mean()), np.diff(ppg - ppg.mean())
        score = [slope_abp[:3400] @ slope_ppg[k:3400 + k] / np.linalg.norm(slope_ppg[k:3400 + k])
                 for k in range(90)]
        lag.append(np.argmax(score) / 60)
    # the low-passes of finger and line add a lag of their own, nearly the same in all
    extra = np.array(lag) - fields["ppg_delay_s"][gate]
    assert np.median(np.abs(extra - np.median(extra))) < 0.03
    assert fields["ppg_delay_s"].max() > 0.9 and fields["ppg_delay_s"].min() < 0.2


def test_p_crit_drifts_and_time_goes_on():
    fields = simulate.simulate_patient(5, 2, 60)
    assert fields["p_crit_true"].std() > 1
    steps = np.diff(fields["start_s"])
    assert (steps >= datasets.SEGMENT_SECONDS).all() and (steps > datasets.SEGMENT_SECONDS).any()


def test_without_a_heart_beat_the_pressure_rests_where_the_physics_says():
    patient = simulate.draw_patient(np.random.default_rng(0), simulate.DEFAULT)
    patient["resistance"] = 0.4
    pressure = simulate.arterial_pressure(np.full(4800, 90.0), np.full(4800, 35.0), patient)
    series = patient["impedance"] * (1 + patient["reflection"])
    assert pressure[-1] == pytest.approx(35 + (0.4 + series) * 90, rel=1e-6)
    ended = simulate.arterial_pressure(np.r_[np.full(2400, 90.0), np.zeros(4800)],
                                       np.full(7200, 35.0), patient)
    assert ended[-1] == pytest.approx(35, abs=1e-3)


def test_a_stroke_is_what_the_heart_ejects():
    settings = simulate.Settings(fibrillation_share=0, ectopic_share=0)
    patient = simulate.draw_patient(np.random.default_rng(0), settings)
    patient.update(heart_rate=70.0, stroke_volume=60.0)
    t = np.arange(60 * simulate.FS_SIM) / simulate.FS_SIM
    flow = simulate.ventricle(np.random.default_rng(1), t, 2 * np.pi * 0.25 * t, patient, settings)
    assert flow.mean() == pytest.approx(70.0, rel=0.05)       # mL/s


def test_vessels_that_bend_differ_from_constant_ones_only_in_the_pressure():
    patient = simulate.draw_patient(np.random.default_rng(0), simulate.DEFAULT)
    patient["resistance"] = 0.4
    flow = simulate.ventricle(np.random.default_rng(1), np.arange(4800) / simulate.FS_SIM,
                              np.zeros(4800), {**patient, "heart_rate": 70.0},
                              simulate.DEFAULT)
    closing = np.full(4800, 35.0)
    straight = simulate.arterial_pressure(flow, closing, patient)
    hardly = simulate.arterial_pressure(flow, closing, patient, compliance_bend=1e9)
    bent = simulate.arterial_pressure(flow, closing, patient, compliance_bend=120.0)
    np.testing.assert_allclose(hardly[1200:], straight[1200:], atol=0.05)   # solved in two ways
    assert np.ptp(bent[1200:]) > np.ptp(straight[1200:]) + 1    # stiff at the top of the pulse
    still = simulate.arterial_pressure(np.full(24000, 90.0), np.full(24000, 35.0), patient,
                                       compliance_bend=120.0, resistance_bend=200.0)
    series = patient["impedance"] * (1 + patient["reflection"])
    assert still[-1] == pytest.approx(35 + (0.4 + series) * 90, abs=0.1)


@pytest.mark.parametrize("arguments, word", [
    (["--label-method", "guess"], "label-method"),
    (["--patients", 0], "patients"), (["--segments", -1], "segments"), (["--seed", -1], "seed"),
    (["--workers", 0], "workers"), (["--persons", 3], "persons"),
])
def test_wrong_options_are_named(capsys, arguments, word):
    with pytest.raises(SystemExit) as stop:
        simulate.parse_args(["--out", "a.h5", *map(str, arguments)])
    assert stop.value.code == 2
    assert word in capsys.readouterr().err


def test_an_output_that_cannot_be_written_is_one_line(tmp_path, run):
    (tmp_path / "file").write_text("not a folder")
    done = run("simulate.py", "--out", "file/a.h5", "--patients", 1, "--segments", 1,
               "--workers", 1, cwd=tmp_path, check=2)
    assert done.stderr.startswith("error: ") and len(done.stderr.splitlines()) == 1


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="needs root to mount")
def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path, run):
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=40k", "tmpfs", str(tmp_path)])
    if mounted.returncode:
        pytest.skip("cannot mount a small file system here")
    try:
        done = run("simulate.py", "--out", "a.h5", "--patients", 6, "--segments", 3, "--workers", 1,
                   cwd=tmp_path, check=2)
        assert done.stderr.splitlines()[-1].startswith("error: ") and "space" in done.stderr
        assert os.listdir(str(tmp_path)) == []
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


# ------------------------------------------------------------------- the study of the label's error

@pytest.mark.parametrize("regime", ["reflection", "noise", "fibrillation"])
def test_the_balance_is_closer_to_the_truth_than_the_published_label(regime):
    truth, made = label_error.regime_labels(regime, 17, range(30))
    found = {method: label_error.label_errors(made[method], truth, label_error.passes(
        made[method], condition)) for method, condition in label_error.SHOWN}
    balance, published = found["waveform_balance"], found["published"]
    assert abs(balance["bias_mmhg"]) < min(2, abs(published["bias_mmhg"]))
    assert balance["sd_mmhg"] < min(5, published["sd_mmhg"])
    assert balance["kept_percent"] >= published["kept_percent"] - 10
    assert balance["within_2_se_percent"] > 80


def test_the_study_writes_a_table_and_a_figure(tmp_path):
    table = label_error.error_table(6, 5, 1, ("slow", "mixed, 30 s"))
    assert len(table) == 2 * len(label_error.SHOWN)
    label_error.draw_errors(table).savefig(tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size > 10_000


def test_the_agreement_of_recordings_is_relative_to_the_published_label(tmp_path, run):
    simulate.simulate_file(tmp_path / "a.h5", 6, 5, seed=2, quiet=True, keep_abp=True)
    run("benchmarks/label_error.py", "--data", "a.h5", "--out", "report", cwd=tmp_path, check=0)
    with open(str(tmp_path / "report" / "label_agreement.csv"), newline="") as file:
        rows = {(row["rhythm"], row["method"], row["gate"]): row for row in csv.DictReader(file)}
    own = rows["all", "published", "default"]
    assert own["minutes"] == "30" and own["minus_published"] == "0" and int(own["pairs"]) > 5
    other = rows["all", "waveform_balance", "default"]
    assert 0.5 < float(other["r_with_published"]) < 1 and float(other["minute_to_minute_sd"]) > 0


def test_a_file_without_arterial_pressure_has_no_agreement(tmp_path, run):
    simulate.simulate_file(tmp_path / "a.h5", 1, 1, seed=2, quiet=True)
    done = run("benchmarks/label_error.py", "--data", "a.h5", cwd=tmp_path, check=2)
    assert "abp" in done.stderr and len(done.stderr.splitlines()) == 1


def test_a_file_that_is_not_simulated_is_never_replaced(run, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with datasets.LayoutWriter(tmp_path / "icu.h5", "recordings", "published", "foot", ()):
        pass
    before = (tmp_path / "icu.h5").read_bytes()
    for name in ("notes.txt", "icu.h5"):
        done = run("simulate.py", "--out", name, "--patients", 1, "--segments", 1, cwd=tmp_path)
        assert done.returncode == 2 and len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert (tmp_path / "notes.txt").read_text() == "mine"
    assert (tmp_path / "icu.h5").read_bytes() == before
