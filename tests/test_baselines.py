"""Baselines: what their names say, chosen by patients, and left out where a field is missing."""
import numpy as np
import pytest
from sklearn.linear_model import LinearRegression

import baselines
import metrics
from signals import PPG_FEATURES

NAMES_THAT_NEED_EVERY_FIELD = {"ridge_all", "gradient_boosting_all"}
PPG = "gradient_boosting_ppg"
BOOSTING = {"gradient_boosting", "gradient_boosting_all", PPG}


def cohort(n_patients=40, per_patient=8, seed=0, noise=1.0):
    """patients and fields whose Pcrit is linear in MAP, DBP and HR, plus noise."""
    rng = np.random.default_rng(seed)
    n = n_patients * per_patient
    fields = {"map": rng.normal(77, 11, n), "dbp": rng.normal(56, 10, n),
              "hr": rng.normal(77, 17, n)}
    fields["sbp"] = fields["dbp"] + rng.normal(60, 15, n)
    fields["pp"] = fields["sbp"] - fields["dbp"]
    fields["p_crit"] = (10 + 0.3 * fields["map"] + 0.2 * fields["dbp"] - 0.1 * fields["hr"]
                        + rng.normal(0, noise, n))
    fields["tpp"] = fields["map"] - fields["p_crit"]
    fields.update({name: rng.normal(size=n) for name in PPG_FEATURES})
    return np.repeat(np.arange(n_patients), per_patient), fields


def test_baselines_recover_a_linear_truth_on_unseen_patients():
    patients, train = cohort(seed=1)
    _, test = cohort(seed=2)
    fitted = baselines.fit_baselines(train, patients, ["map", "dbp", "hr"])
    rmse = {name: metrics.scores(test["tpp"], baseline.predict(test))["rmse"]
            for name, baseline in fitted.items()}
    assert list(rmse) == ["mean_tpp", "map_minus_mean_pcrit", "ridge", "gradient_boosting",
                          PPG, "ridge_all", "gradient_boosting_all"]
    assert rmse["ridge"] < 1.1 and rmse["ridge_all"] < 1.1      # the noise is 1 mmHg
    assert rmse["gradient_boosting"] < 2.5
    assert rmse["ridge"] < rmse["gradient_boosting"] < rmse["mean_tpp"]
    assert baselines.choose_best(fitted, test) == min(rmse, key=rmse.get)


def test_the_simple_baselines_are_what_their_names_say():
    patients, train = cohort()
    fitted = baselines.fit_baselines(train, patients, [], BOOSTING | {"ridge"})
    new = {"map": np.array([60.0, 90.0])}
    assert fitted["mean_tpp"].predict(new) == pytest.approx([train["tpp"].mean()] * 2)
    assert fitted["map_minus_mean_pcrit"].predict(new) == pytest.approx(
        new["map"] - train["p_crit"].mean())


def test_the_baselines_on_all_inputs_see_the_product_of_pp_and_hr():
    patients, train = cohort(seed=3)
    train["tpp"] = 0.005 * train["pp"] * train["hr"]
    fitted = baselines.fit_baselines(train, patients, ["map", "pp", "hr"], BOOSTING)
    error = {name: metrics.scores(train["tpp"], fitted[name].predict(train))["rmse"]
             for name in ("ridge", "ridge_all")}
    assert error["ridge_all"] < 0.01 < 0.3 < error["ridge"]


def test_no_patient_is_on_both_sides_of_a_fold():
    patients = np.random.default_rng(0).permutation(np.repeat([f"p{i}" for i in range(17)], 9))
    folds = baselines._patient_folds(patients)
    assert len(folds) == 5
    for fit_rows, left_rows in folds:
        assert not set(patients[fit_rows]) & set(patients[left_rows])
    assert sorted(np.concatenate([left for _, left in folds])) == list(range(len(patients)))


def test_penalty_and_rounds_are_chosen_by_patients_not_by_segments():
    # MAP is the patient's fingerprint and its Pcrit is pure chance: who cross-validates over
    # segments learns the patients by heart, who does so over patients learns next to nothing.
    rng = np.random.default_rng(0)
    patients = np.repeat(np.arange(40), 30)
    fields = {"map": np.repeat(rng.permutation(np.linspace(50, 110, 40)), 30),
              "tpp": np.repeat(rng.normal(36, 10, 40), 30)}
    by_patient = baselines.fit_baselines(fields, patients, ["map"])["gradient_boosting"]
    by_segment = baselines.fit_baselines(fields, np.arange(1200), ["map"])["gradient_boosting"]
    assert np.std(by_patient.predict(fields)) < 0.5 * np.std(by_segment.predict(fields))


@pytest.mark.parametrize("n_patients, per_patient", [(10, 2), (2, 10), (1, 20), (1, 2)])
def test_a_small_train_part_still_gives_finite_baselines(n_patients, per_patient):
    patients, train = cohort(n_patients, per_patient)
    fitted = baselines.fit_baselines(train, patients, ["map", "dbp", "hr"])
    assert len(fitted) == 7
    assert all(np.isfinite(baseline.predict(train)).all() for baseline in fitted.values())


def test_baselines_are_the_same_each_time():
    patients, train = cohort(10, 5, seed=6)
    first, second = (baselines.fit_baselines(train, patients, ["map", "hr"], seed=1)
                     for _ in range(2))
    for name in first:
        np.testing.assert_array_equal(first[name].predict(train), second[name].predict(train))


def test_a_baseline_whose_field_is_absent_or_not_finite_is_left_out_with_its_reason():
    patients, train = cohort()
    del train["sbp"]
    reasons = baselines.left_out_baselines(["map", "hr"], train)
    assert reasons == dict.fromkeys(NAMES_THAT_NEED_EVERY_FIELD, "sbp is not in the data")
    assert set(baselines.fit_baselines(train, patients, ["map", "hr"])) == {
        "mean_tpp", "map_minus_mean_pcrit", "ridge", "gradient_boosting", PPG}

    _, test = cohort()
    test["hr"][:3] = np.nan
    reasons = baselines.left_out_baselines(["map", "hr"], test)
    assert set(reasons) == NAMES_THAT_NEED_EVERY_FIELD | {"ridge", "gradient_boosting", PPG}
    assert reasons["ridge"] == "hr is not finite in 3 segments"


def test_a_field_that_only_the_test_part_lacks_leaves_the_baseline_out_as_well():
    patients, train = cohort()
    _, test = cohort(seed=1)
    del test["pp"]
    reasons = baselines.left_out_baselines(["map", "hr"], train, test)
    assert set(reasons) == NAMES_THAT_NEED_EVERY_FIELD
    fitted = baselines.fit_baselines(train, patients, ["map", "hr"], left_out=reasons)
    assert all(np.isfinite(baseline.predict(test)).all() for baseline in fitted.values())


def test_without_vitals_the_baselines_on_the_networks_vitals_are_left_out():
    patients, train = cohort()
    assert set(baselines.fit_baselines(train, patients, [])) == {
        "mean_tpp", "map_minus_mean_pcrit", PPG, "ridge_all", "gradient_boosting_all"}
    assert baselines.left_out_baselines([], train)["ridge"] == "the network gets no vitals"


def test_predicting_from_a_field_with_a_gap_is_refused_by_its_name():
    patients, train = cohort()
    ridge = baselines.fit_baselines(train, patients, ["map", "hr"], BOOSTING)["ridge"]
    with pytest.raises(ValueError, match="hr: 1 of 2 values are not finite"):
        ridge.predict({"map": [70, 80], "hr": [np.nan, 80]})


def test_the_baseline_on_ppg_features_uses_them_and_takes_segments_without_beats():
    patients, train = cohort(seed=4)
    train["tpp"] = 10 * np.sin(train["pulse_rise_s"]) + train["hr"] / 10
    fitted = baselines.fit_baselines(train, patients, ["map", "hr"], {"ridge_all", "ridge"})
    error = {name: metrics.scores(train["tpp"], fitted[name].predict(train))["rmse"]
             for name in ("gradient_boosting", PPG)}
    assert error[PPG] < 0.5 * error["gradient_boosting"]
    without_beats = dict(train, pulse_rise_s=np.full(len(patients), np.nan))
    assert np.isfinite(fitted[PPG].predict(without_beats)).all()
    assert not baselines.left_out_baselines(["map", "hr"], without_beats)


@pytest.mark.parametrize("n_patients", [40, 1])
def test_fit_ridge_is_the_ridge_baseline_as_plain_numbers(n_patients):
    patients, train = cohort(n_patients, per_patient=320 // n_patients)
    inputs = np.stack([train["map"], train["hr"]], axis=1)
    found = baselines.fit_ridge(inputs, train["tpp"], patients)
    expected = baselines.fit_baselines(train, patients, ["map", "hr"], BOOSTING)["ridge"]
    np.testing.assert_allclose(inputs @ found["coefficients"] + found["intercept"],
                               expected.predict(train), rtol=1e-9)
    assert all(type(value) is float for value in [found["intercept"], *found["coefficients"]])


def test_ridge_is_least_squares_when_the_truth_is_linear_and_data_are_many():
    patients, train = cohort(n_patients=100, noise=0.01)
    inputs = np.stack([train["map"], train["hr"], train["dbp"]], axis=1)
    expected = LinearRegression().fit(inputs, train["tpp"])
    found = baselines.fit_ridge(inputs, train["tpp"], patients)
    np.testing.assert_allclose(found["coefficients"], expected.coef_, atol=1e-3)
    assert found["intercept"] == pytest.approx(expected.intercept_, abs=0.05)
