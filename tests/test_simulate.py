"""Virtual patients: the same for every number of workers, with honest labels and physics."""
import os
import re
import subprocess
import sys

import h5py
import numpy as np
import pytest
from conftest import ROOT, call, make_file, run

import datasets
import labels
import simulate

sys.path.append(os.path.join(ROOT, "benchmarks"))

import label_error


@pytest.mark.parametrize("method", labels.METHODS)
def test_the_file_holds_the_labels_of_the_pressure_for_any_number_of_workers(tmp_path, method):
    simulate.simulate_file(tmp_path / "1.h5", 2, 2, seed=7, label_method=method)
    options = ["--patients", 2, "--segments", 2, "--seed", 7, "--label-method", method]
    done = call(simulate, "--out", tmp_path / "2.h5", "--workers", 2, *options, check=0)
    assert (tmp_path / "1.h5").read_bytes() == (tmp_path / "2.h5").read_bytes()
    assert "r2 > 0.5" in done.stdout
    abp = simulate.simulate_patient(7, 0, 2, keep_abp=True)["abp"]
    again = labels.label_segments(abp, 60, method)
    with h5py.File(tmp_path / "1.h5", "r") as file:
        assert [file.attrs[name] for name in ("origin", "beats", "label_method")] == [
            "simulated", "foot", method]
        assert list(file) == ["sim7-000000", "sim7-000001"]
        first, second = (file[name]["1/ppg"][()] for name in file)
        for name in labels.FIELDS:
            np.testing.assert_array_equal(file["sim7-000000/1"][name][()], again[name])
    assert first.shape == (2, 3600) and not np.array_equal(first, second)
    assert not np.array_equal(first, simulate.simulate_patient(8, 0, 2)["ppg"])


def test_gated_segments_look_like_the_published_cohort_with_the_labels_usual_error():
    patients = [simulate.simulate_patient(3, k, 3) for k in range(40)]
    fields = {name: np.concatenate([p[name] for p in patients]) for name in patients[0]}
    gate = label_error.passes(fields, "default")
    assert gate.mean() > 0.6
    for name, mean, within in (("map", 76.7, 5), ("sbp", 118, 10), ("dbp", 56, 7), ("pp", 62.5, 8),
                               ("hr", 77, 8), ("p_crit", 40.5, 7)):
        assert fields[name][gate].mean() == pytest.approx(mean, abs=within), name
    assert 9 < fields["p_crit"][gate].std() < 20
    error = (fields["p_crit"] - fields["p_crit_true"])[gate]
    assert 0 < error.mean() < 6 and error.std() < 8
    assert np.corrcoef(fields["p_crit"][gate], fields["p_crit_true"][gate])[0, 1] > 0.85
    assert fields["p_crit_true"].reshape(40, 3).std(1).mean() > 1       # it drifts
    assert set(np.diff(fields["start_s"].reshape(40, 3)).ravel()) > {60}


def test_a_stroke_is_ejected_in_full_and_without_a_heart_beat_the_pressure_falls_to_pcrit():
    settings = simulate.Settings(fibrillation_share=0, ectopic_share=0)
    patient = simulate.draw_patient(np.random.default_rng(0), settings)
    patient.update(heart_rate=70.0, stroke_volume=60.0, resistance=0.4)
    t = np.arange(60 * simulate.FS_SIM) / simulate.FS_SIM
    flow = simulate.ventricle(np.random.default_rng(1), t, 2 * np.pi * 0.25 * t, patient, settings)
    assert flow.mean() == pytest.approx(70.0, rel=0.05)         # mL/s
    flow, beating = np.append(flow, np.zeros(2400)), slice(1200, len(t))
    closing = np.full(len(flow), 35.0)
    straight = simulate.windkessel(flow, closing, patient)
    assert straight[beating].mean() == pytest.approx(35 + 0.4 * flow[beating].mean(), abs=0.5)
    hardly, bent = (label_error.bent_windkessel(flow, closing, patient, bend, np.inf)
                    for bend in (1e9, 120.0))
    np.testing.assert_allclose([straight[-1], bent[-1]], 35, atol=1e-3)
    np.testing.assert_allclose(hardly[beating], straight[beating], atol=0.05)   # in two ways
    assert np.ptp(bent[beating]) > np.ptp(straight[beating]) + 1        # stiffer at the top


@pytest.mark.parametrize("option, value", [
    ("--label-method", "guess"), ("--patients", "0"), ("--segments", "-1"), ("--seed", "-1"),
    ("--workers", "0"), ("--persons", "3")])
def test_wrong_options_are_named(option, value):
    assert option in call(simulate, "--out", "a.h5", option, value, check=2).stderr


@pytest.mark.parametrize("name", ["notes.txt", "icu.h5", "notes.txt/a.h5"])
def test_an_output_that_is_not_simulated_or_cannot_be_written_gives_one_line(tmp_path, name):
    (tmp_path / "notes.txt").write_text("mine")
    make_file(tmp_path / "icu.h5", 1, 1, 1)
    before = [path.read_bytes() for path in sorted(tmp_path.iterdir())]
    options = ["--out", tmp_path / name, "--patients", 1, "--workers", 1]
    assert re.fullmatch("error: .*\n", call(simulate, *options, check=2).stderr)
    assert before == [path.read_bytes() for path in sorted(tmp_path.iterdir())]


def test_a_full_disk_gives_one_line_and_leaves_no_file(tmp_path):
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=40k", "tmpfs", tmp_path]).returncode:
        pytest.skip("cannot mount a small file system here")        # needs root
    try:
        done = run("simulate.py", "--out", "a.h5", "--workers", 1, cwd=tmp_path, check=2)
        assert done.stderr.splitlines()[-1].startswith("error: ") and "space" in done.stderr
        assert os.listdir(tmp_path) == []
    finally:
        subprocess.run(["umount", tmp_path], check=True)


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


def test_the_study_of_recordings_compares_methods_and_averages(tmp_path):
    with datasets.LayoutWriter(tmp_path / "a.h5", "simulated", "published", "foot", ()) as out:
        for number in range(5):
            out.write(str(number), "1", simulate.simulate_patient(2, number, 5, keep_abp=True))
    own, balance, *_ = label_error.agreement_table(tmp_path / "a.h5").itertuples()
    assert own.minutes == 25 and own.minus_published == 0 and own.pairs > 5
    assert 0.5 < balance.r_with_published < 1 and balance.minute_to_minute_sd > 0
    one, two, *_ = label_error.averages_table(tmp_path / "a.h5").itertuples()
    assert (one.averaged, one.averages, two.averaged) == (1, own.kept, 2)
    assert one.skill == one.skill_single_minutes and 5 <= two.averages < one.averages
    simulate.simulate_file(tmp_path / "no_abp.h5", 1, 1, seed=2)
    with pytest.raises(datasets.DataError, match="abp"):
        label_error.agreement_table(tmp_path / "no_abp.h5")
