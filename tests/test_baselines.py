"""Baselines: what their names say, chosen by patients, and left out where a field is missing."""
import numpy as np
import pytest

import baselines
import metrics
from anchor import PULSE_STATISTICS, estimate, fit_rows

PPG = "gradient_boosting_ppg"
NAMES = ["mean_tpp", "map_minus_mean_pcrit", "ridge", "gradient_boosting", "ridge_ppg", PPG,
         "ridge_all", "gradient_boosting_all"]
BOOSTING = {"gradient_boosting", "gradient_boosting_all", PPG}


@pytest.fixture(autouse=True)
def few_rounds(monkeypatch):
    monkeypatch.setattr(baselines, "BOOSTING_ROUNDS", 30)


def cohort(n_patients=40, per_patient=4, seed=0, noise=1.0):
    """patients and fields whose Pcrit is linear in MAP, DBP and HR, plus noise."""
    rng = np.random.default_rng(seed)
    n = n_patients * per_patient
    normal = {"map": (77, 11), "dbp": (56, 10), "hr": (77, 17)}
    fields = {name: rng.normal(mean, sd, n) for name, (mean, sd) in normal.items()}
    fields["sbp"] = fields["dbp"] + rng.normal(60, 15, n)
    fields["pp"] = fields["sbp"] - fields["dbp"]
    fields["p_crit"] = (10 + 0.3 * fields["map"] + 0.2 * fields["dbp"] - 0.1 * fields["hr"]
                        + rng.normal(0, noise, n))
    fields["tpp"] = fields["map"] - fields["p_crit"]
    fields.update({name: rng.normal(size=n) for name in PULSE_STATISTICS})
    return np.repeat(np.arange(n_patients), per_patient), fields


def rmse_of(fitted, fields):
    return {name: metrics.scores(fields["tpp"], baseline.predict(fields))["rmse"]
            for name, baseline in fitted.items()}


def test_baselines_recover_a_linear_truth_on_unseen_patients():
    (patients, train), (_, test) = cohort(seed=1), cohort(seed=2)
    fitted = baselines.fit_baselines(train, patients, ["map", "dbp", "hr"])
    rmse = rmse_of(fitted, test)
    assert rmse["ridge"] < 1.2 and rmse["ridge_all"] < 1.2      # the noise is 1 mmHg
    assert rmse["ridge"] < rmse["gradient_boosting"] < 0.6 * rmse["mean_tpp"]
    assert rmse[baselines.choose_best(fitted)] < 1.05 * min(rmse.values())
    assert all(abs(rmse[name] / one.cv_rmse - 1) < 0.3 for name, one in fitted.items())
    assert rmse == rmse_of(baselines.fit_baselines(train, patients, ["map", "dbp", "hr"]), test)


def test_each_linear_baseline_is_what_its_name_says():
    patients, train = cohort(noise=0.01)
    fitted = baselines.fit_baselines(train, patients, ["map", "dbp", "hr"], BOOSTING)
    np.testing.assert_allclose(fitted["mean_tpp"].predict(train), train["tpp"].mean())
    map_minus_pcrit = fitted["map_minus_mean_pcrit"].predict(train)
    np.testing.assert_allclose(map_minus_pcrit, train["map"] - train["p_crit"].mean())
    train["tpp"] = 0.005 * train["pp"] * train["hr"]
    rmse = rmse_of(baselines.fit_baselines(train, patients, ["map", "pp", "hr"], BOOSTING), train)
    assert rmse["ridge_all"] < 0.2 < 0.3 < rmse["ridge"]        # it sees the product of PP and HR


def test_the_ridges_are_those_that_a_model_stands_on():
    # clipped pulse statistics and a fixed penalty; a penalty chosen on few patients was at random
    (patients, train), (_, test) = cohort(12, 2, seed=5), cohort(seed=6)
    test["kurtosis"][:5] = 40.0
    fitted = baselines.fit_baselines(train, patients, ["map", "hr"], BOOSTING)
    vitals, pulse = ([np.stack([fields[name] for name in names], 1) for fields in (train, test)]
                     for names in (("map", "hr"), PULSE_STATISTICS))
    for name, of_train, of_test in (("ridge", None, None), ("ridge_ppg", *pulse)):
        anchor = fit_rows(["map", "hr"], vitals[0], train["tpp"], of_train)
        assert np.allclose(fitted[name].predict(test), estimate(anchor, vitals[1], of_test))


def test_rounds_are_chosen_by_patients_not_by_segments():
    # MAP tells the patient, Pcrit is chance: only folds over patients show that nothing is learnt
    rng = np.random.default_rng(0)
    patients = np.repeat(np.arange(40), 30)
    fields = {"map": np.repeat(rng.permutation(np.linspace(50, 110, 40)), 30),
              "tpp": np.repeat(rng.normal(36, 10, 40), 30)}
    by_patient = baselines.fit_baselines(fields, patients, ["map"])["gradient_boosting"]
    by_segment = baselines.fit_baselines(fields, np.arange(1200), ["map"])["gradient_boosting"]
    assert np.std(by_patient.predict(fields)) < 0.5 * np.std(by_segment.predict(fields))


@pytest.mark.parametrize("n_patients, per_patient", [(10, 2), (2, 10), (1, 2)])
def test_a_small_train_part_still_gives_finite_baselines(n_patients, per_patient):
    patients, train = cohort(n_patients, per_patient)
    fitted = baselines.fit_baselines(train, patients, ["map", "dbp", "hr"])
    assert list(fitted) == NAMES
    assert all(np.isfinite(baseline.predict(train)).all() for baseline in fitted.values())


def test_a_baseline_whose_field_is_absent_or_not_finite_in_a_part_is_left_out_with_its_reason():
    (patients, train), vitals = cohort(), ["map", "hr"]
    absent, gap = (cohort(seed=1)[1] for _ in range(2))
    del absent["pp"]
    gap["hr"][:3] = np.nan
    assert baselines.left_out_baselines(vitals, train, absent) == dict.fromkeys(
        ["ridge_all", "gradient_boosting_all"], "pp is not in the data")
    reasons = baselines.left_out_baselines(vitals, train, gap)
    assert reasons == dict.fromkeys(NAMES[2:], "hr is not finite in 3 segments")
    assert list(baselines.fit_baselines(train, patients, vitals, reasons)) == NAMES[:2]
    assert baselines.left_out_baselines([], train) == dict.fromkeys(
        ["ridge", "gradient_boosting"], "the network gets no vitals")
    with pytest.raises(ValueError, match="hr: 3 of 160 values are not finite"):
        baselines.fit_baselines(gap, patients, vitals, left_out=BOOSTING)


def test_the_baselines_on_pulse_statistics_use_them():
    patients, train = cohort(seed=4)
    train["tpp"] = 10 * np.sin(train["kurtosis"]) + 5 * train["slow waves"] + train["hr"] / 10
    rmse = rmse_of(baselines.fit_baselines(train, patients, ["map", "hr"]), train)
    assert rmse[PPG] < 0.5 * rmse["gradient_boosting"] and rmse[PPG] < rmse["ridge_ppg"]
    assert rmse["ridge_ppg"] < 0.9 * rmse["ridge"]
