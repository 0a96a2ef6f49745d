"""Virtual patients: the same for every number of workers, with honest labels and physics."""
import csv
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


def run(*arguments):
    return subprocess.run([sys.executable, "simulate.py", *map(str, arguments)], cwd=ROOT,
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE, universal_newlines=True)


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


def test_the_file_does_not_depend_on_the_number_of_workers(tmp_path):
    simulate.simulate_file(tmp_path / "1.h5", 5, 2, seed=7, workers=1, quiet=True)
    done = run("--out", tmp_path / "2.h5", "--patients", 5, "--segments", 2, "--seed", 7,
               "--workers", 2)
    assert done.returncode == 0, done.stderr
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


@pytest.mark.parametrize("beats", ["foot", "peak"])
def test_the_labels_are_those_of_the_stored_arterial_pressure(tmp_path, beats):
    path = tmp_path / "a.h5"
    simulate.simulate_file(path, 2, 3, seed=1, quiet=True, beats=beats, keep_abp=True)
    with h5py.File(path, "r") as file:
        assert file.attrs["beats"] == beats
        for group in (file["sim1-000000/1"], file["sim1-000001/1"]):
            again = labels.label_segments(group["abp"][()], 60, beats=beats)
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


def test_another_label_method_is_another_label_of_the_same_patients(tmp_path):
    made = {}
    for method in ("published", "waveform_balance"):
        simulate.simulate_file(tmp_path / method, 2, 2, seed=4, quiet=True, label_method=method)
        made[method] = content(tmp_path / method)
        assert made[method]["attributes"]["label_method"] == method
        del made[method]["attributes"]
    published, other = made.values()
    differ = {name.split("/")[-1] for name in published if other[name] != published[name]}
    assert differ == {"p_crit", "tpp", "r2", "fit_rmse", "p_crit_se", "n_beats"}


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


def errors(regime, seed=17, patients=40):
    """{(method, condition): [segments, kept %, bias, SD, r, within 2 SE %]} on unseen patients."""
    truth, made = simulate.report_patients(regime, seed, range(patients))
    return {(method, condition): simulate.label_errors(
        made[method, "foot"], truth, simulate.passes(made[method, "foot"], condition))
        for method in labels.METHODS for condition in simulate.REPORT_CONDITIONS}


RECOMMENDED = (simulate.RECOMMENDED_METHOD, simulate.RECOMMENDED_CONDITION)
# of 40 patients the SD of the error is known to 11 %, the share kept to a few per cent
UNSURE_SD, UNSURE_KEPT = 1.15, 5.0


@pytest.mark.parametrize("regime", ["mixed", "reflection", "noise"])
def test_with_constant_vessels_the_recommended_label_is_close_to_the_truth(regime):
    found = errors(regime)
    _, kept, bias, sd, r, within = found[RECOMMENDED]
    _, published_kept, published_bias, published_sd, _, _ = found["published", "default"]
    assert abs(bias) <= 2 and sd <= 3 * UNSURE_SD and r >= 0.95
    assert kept >= published_kept - UNSURE_KEPT
    assert abs(bias) < abs(published_bias) and sd < published_sd
    assert within > 80                          # its standard error says how far off it is


def test_in_fibrillation_the_recommended_label_is_close_and_kept():
    _, kept, bias, sd, r, _ = errors("fibrillation")[RECOMMENDED]
    assert kept >= 90 - UNSURE_KEPT and sd <= 5 and abs(bias) <= 2


@pytest.mark.parametrize("regime", ["C(P)", "C(P), R(P)"])
def test_with_vessels_that_bend_no_label_is_right_and_the_recommended_not_the_worse(regime):
    found = errors(regime, patients=25)
    _, kept, bias, sd, r, _ = found[RECOMMENDED]
    _, published_kept, published_bias, published_sd, published_r, _ = found["published", "default"]
    assert published_bias > 5 and bias > 3
    assert bias <= published_bias and sd <= published_sd * UNSURE_SD
    assert kept >= published_kept - UNSURE_KEPT and r >= published_r - 0.02


def test_the_report_of_virtual_patients_has_a_table_and_a_figure(tmp_path, capsys):
    regimes = ("slow", "mixed, 30 s")
    simulate.label_report(tmp_path / "report", 12, 5, 1, regimes)
    with open(tmp_path / "report" / "label_report.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == (len(regimes) * len(labels.METHODS) * len(simulate.REPORT_BEATS)
                         * len(simulate.REPORT_CONDITIONS))
    slow = next(row for row in rows if row["regime"] == "slow" and row["gate"] == "default"
                and row["method"] == "waveform_balance" and row["beats"] == "foot")
    assert float(slow["kept_percent"]) == 100 and abs(float(slow["bias_mmhg"])) < 3
    assert (tmp_path / "report" / "label_report.png").read_bytes().startswith(b"\x89PNG")
    assert "mixed, 30 s" in capsys.readouterr().out


def test_the_report_of_recordings_says_how_the_methods_agree(tmp_path):
    simulate.simulate_file(tmp_path / "a.h5", 6, 5, seed=2, quiet=True, keep_abp=True)
    simulate.agreement_report(tmp_path / "a.h5", tmp_path / "report")
    with open(tmp_path / "report" / "label_agreement.csv", newline="") as file:
        rows = {(row["rhythm"], row["method"], row["beats"], row["gate"]): row
                for row in csv.DictReader(file)}
    own = rows["all", "published", "foot", "default"]
    assert float(own["minutes"]) == 30 and float(own["minus_published"]) == 0
    assert float(own["r_with_published"]) == 1 and int(own["pairs"]) > 5
    other = rows["all", "waveform_balance", "foot", "default"]
    assert 0.5 < float(other["r_with_published"]) < 1 and float(other["minute_to_minute_sd"]) > 0


def test_a_file_without_arterial_pressure_has_no_agreement(tmp_path):
    simulate.simulate_file(tmp_path / "a.h5", 1, 1, seed=2, quiet=True)
    done = run("--label-report", tmp_path / "a.h5", "--out-dir", tmp_path / "report")
    assert done.returncode == 2 and not (tmp_path / "report").exists()
    assert "abp" in done.stderr and len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("arguments, word", [
    (["--label-method", "guess"], "label-method"),
    (["--patients", 0], "patients"), (["--segments", -1], "segments"), (["--seed", -1], "seed"),
    (["--workers", 0], "workers"), (["--beats", "middle"], "beats"), (["--persons", 3], "persons"),
])
def test_wrong_options_are_named(capsys, arguments, word):
    with pytest.raises(SystemExit) as stop:
        simulate.parse_args(["--out", "a.h5", *map(str, arguments)])
    assert stop.value.code == 2
    assert word in capsys.readouterr().err


def test_a_file_or_a_report_must_be_asked_for(capsys):
    with pytest.raises(SystemExit):
        simulate.parse_args([])
    assert "--label-report" in capsys.readouterr().err


def test_an_output_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").write_text("not a folder")
    done = run("--out", tmp_path / "file" / "a.h5", "--patients", 1, "--segments", 1,
               "--workers", 1)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and len(done.stderr.splitlines()) == 1
