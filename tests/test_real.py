"""benchmarks/real.py: what the PPG adds is found where it is, and nowhere else."""
import os
import sys

import numpy as np
import pytest
from conftest import ROOT

sys.path.insert(0, os.path.join(ROOT, "benchmarks"))

import real

import datasets
import signals
import simulate


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """A file of 5 virtual patients with the arterial line, standing in for recordings."""
    path = str(tmp_path_factory.mktemp("real") / "s.h5")
    simulate.simulate_file(path, 5, 2, 0, quiet=True, keep_abp=True)
    return path


def test_windows_of_a_minute_are_the_files_own_segments_with_their_labels(recorded):
    fields, ppg, patients = real.read_windows(recorded, "default", "published", 60)
    index = datasets.create_dataset_index(path=recorded)
    stored = datasets.TPP_PPG_dataset(index, "segment", ["ppg", "map", "tpp"])
    assert patients.tolist() == [index.patients[i] for i in index.segment_patients()]
    assert np.array_equal(ppg, stored.waveform("ppg", np.arange(len(index))))
    assert np.allclose(fields["p_crit"], stored.column("p_crit"), atol=1e-3)
    closer, _, _ = real.read_windows(recorded, "default", "published", 15)
    assert len(closer["p_crit"]) > len(patients)


def virtual_columns(rng, shares):
    """Fields and patients in which the network sees a part of Pcrit that the vitals do not show."""
    patients = np.repeat([f"p{i:02}" for i in range(len(shares))], shares)
    level = rng.normal(0, 8, len(shares))[np.unique(patients, return_inverse=True)[1]]
    fields = {name: rng.normal(size=len(patients)) for name in (
        "map", "dbp", "hr", "flow", "networks", "ppg_flow", "ppg_p_crit", "pulse_irregularity",
        "sbp", "pp", "pp*hr", *signals.PPG_FEATURES)}
    p_crit = 40 + level + 3 * fields["map"]
    return dict(fields, p_crit=p_crit, network=p_crit + rng.normal(0, 3, len(patients)),
                features=rng.normal(size=(len(patients), 20))), patients


def nested_skill(fields, patients):
    (run,) = real.every_candidate([fields], patients)
    theirs, ours = (real.best_of(average, run, fields["p_crit"], patients)[1]
                    for average in real.AVERAGES)
    return real.compare(fields["p_crit"], [ours], [theirs], patients)[2]


def test_skill_is_found_where_the_ppg_adds_and_not_with_labels_of_other_patients(monkeypatch):
    for group in (real.VITALS, real.WITH_PPG):      # boosting alone takes longer than all others
        monkeypatch.delitem(group, [name for name in group if name.startswith("boosting")][0])
    fields, patients = virtual_columns(np.random.default_rng(0), [1, 60, 2, 3, 1, 4, 2, 5, 3, 2])
    assert nested_skill(fields, patients)["low"] > 0
    mixed = real.labels_of_others(fields["p_crit"], patients, np.random.default_rng(0))
    assert nested_skill(dict(fields, p_crit=mixed), patients)["low"] <= 0


def test_ridge_with_patient_weights_is_scikit_learns():
    from sklearn.linear_model import Ridge
    from sklearn.preprocessing import StandardScaler
    fields, patients = virtual_columns(np.random.default_rng(1), [9, 3, 5, 1])
    fit, left = np.flatnonzero(patients != "p02"), np.flatnonzero(patients == "p02")
    ours = real.every_setting(real.WITH_PPG["ridge, network"], fields, patients, fit, left)
    weight = 1 / np.array([np.sum(patients == one) for one in patients[fit]])
    table = np.stack([fields[name] for name in ("map", "dbp", "hr", "network")], axis=1)
    scaler = StandardScaler().fit(table[fit], sample_weight=weight)
    ridge = Ridge(3.0).fit(scaler.transform(table[fit]), fields["p_crit"][fit], weight)
    assert np.allclose(ours[1.0, 3.0], ridge.predict(scaler.transform(table[left])), atol=1e-8)
