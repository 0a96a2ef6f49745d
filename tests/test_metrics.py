"""Scores, intervals over patients and baselines against independent implementations."""
import numpy as np
import pytest
from scipy import stats
from sklearn import metrics as sklearn_metrics
from sklearn.linear_model import LinearRegression

import metrics

NAMES_THAT_NEED_EVERY_FIELD = {"ridge_all", "gradient_boosting_all"}
BOOSTING = {"gradient_boosting", "gradient_boosting_all"}      # slow: left out where it has no part


def noisy_predictions(n_patients=12, seed=0, between=3.0, within=5.0):
    """patients, truth, prediction: unequal numbers of segments, each patient with its own bias."""
    rng = np.random.default_rng(seed)
    patients = np.repeat(np.arange(n_patients), rng.integers(3, 25, n_patients))
    truth = rng.normal(36, 14, len(patients))
    error = rng.normal(0, between, n_patients)[patients] + rng.normal(0, within, len(patients))
    return patients, truth, truth + error


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
    return np.repeat(np.arange(n_patients), per_patient), fields


# ---------------------------------------------------------------- scores

@pytest.mark.parametrize("seed", range(5))
def test_every_score_equals_an_independent_implementation(seed):
    _, truth, prediction = noisy_predictions(seed=seed)
    found = metrics.scores(truth, prediction)
    expected = {
        "n": len(truth),
        "rmse": np.sqrt(sklearn_metrics.mean_squared_error(truth, prediction)),
        "mae": sklearn_metrics.mean_absolute_error(truth, prediction),
        "mead": sklearn_metrics.median_absolute_error(truth, prediction),
        "r2": sklearn_metrics.r2_score(truth, prediction),
        "bias": stats.describe(prediction - truth).mean,
        "sd": np.sqrt(stats.describe(prediction - truth, ddof=1).variance)}
    assert found == pytest.approx(expected, rel=1e-12)


def test_float32_predictions_are_scored_in_double_precision():
    _, truth, prediction = noisy_predictions()
    truth, prediction = truth.astype(np.float32), prediction.astype(np.float32)
    assert metrics.scores(truth, prediction) == metrics.scores(
        truth.astype(np.float64), prediction.astype(np.float64))


def test_r2_of_a_constant_truth_and_sd_of_one_segment_are_nan_not_a_number_out_of_the_air():
    found = metrics.scores([30.0, 30.0], [31.0, 33.0])
    assert np.isnan(found["r2"]) and found["bias"] == 2.0
    found = metrics.scores([30.0], [31.0])
    assert np.isnan(found["sd"]) and found["rmse"] == 1.0


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_value_that_is_not_finite_is_refused_by_name(bad):
    with pytest.raises(ValueError, match="prediction: 1 of 3 values are not finite"):
        metrics.scores([1, 2, 3], [1, bad, 3])
    with pytest.raises(ValueError, match="truth: 1 of 3"):
        metrics.confidence_intervals([0, 0, 1], [1, bad, 3], [1, 2, 3])
    with pytest.raises(ValueError, match="baseline_prediction: 1 of 3"):
        metrics.skill([1, 2, 3], [1, 2, 3], [1, bad, 3], [0, 0, 1])


def test_empty_and_unequal_arrays_are_refused():
    with pytest.raises(ValueError, match="no values"):
        metrics.scores([], [])
    with pytest.raises(ValueError, match="2 values, expected 3"):
        metrics.scores([1, 2, 3], [1, 2])


# ---------------------------------------------------------------- bootstrap

def segments_of_each_draw(bootstrap, patients):
    """The naive way: the row numbers of the drawn patients' segments, patient by patient."""
    names = np.unique(patients)
    for weights in bootstrap.weights():
        for draw in weights.astype(int):
            drawn = np.repeat(names, draw)
            yield np.concatenate([np.flatnonzero(patients == name) for name in drawn])


@pytest.mark.parametrize("n_patients", [2, 5, 40])
def test_intervals_equal_a_loop_that_scores_the_same_draws_segment_by_segment(n_patients):
    patients, truth, prediction = noisy_predictions(n_patients, seed=n_patients)
    found = metrics.confidence_intervals(patients, truth, prediction, n_boot=200, seed=7)
    draws = [metrics.scores(truth[rows], prediction[rows]) for rows in
             segments_of_each_draw(metrics.PatientBootstrap(patients, 200, 7), patients)]
    assert list(found) == list(metrics.SCORES)
    for name, interval in found.items():
        expected = np.percentile([draw[name] for draw in draws], [2.5, 97.5])
        assert interval == pytest.approx(expected, rel=1e-9, abs=1e-9), name


def test_the_median_of_each_draw_is_exact_with_ties_and_with_few_values():
    rng = np.random.default_rng(1)
    for n, n_patients in ((1, 1), (2, 2), (7, 3), (500, 20), (3001, 4)):
        patients = rng.integers(0, n_patients, n)
        values = rng.integers(0, 30, n) / 2
        bootstrap = metrics.PatientBootstrap(patients, 50, seed=3)
        expected = [np.median(values[rows]) for rows in
                    segments_of_each_draw(bootstrap, patients)]
        np.testing.assert_array_equal(bootstrap.medians(values), expected)


def test_draws_do_not_depend_on_the_order_of_the_segments_nor_on_the_kind_of_identifier():
    patients, truth, prediction = noisy_predictions()
    order = np.random.default_rng(0).permutation(len(truth))
    found = metrics.confidence_intervals(patients, truth, prediction, 100)
    shuffled = metrics.confidence_intervals(
        np.array([f"p{patient:04d}" for patient in patients])[order], truth[order],
        prediction[order], 100)
    for name in metrics.SCORES:
        assert found[name] == pytest.approx(shuffled[name], rel=1e-12)


def test_blocks_of_draws_are_the_same_draws_as_one_block():
    bootstrap = metrics.PatientBootstrap(np.arange(30_000), n_boot=340, seed=2)
    blocks = list(bootstrap.weights())
    assert len(blocks) > 1
    assert sum(map(len, blocks)) == 340
    assert all((block.sum(axis=1) == 30_000).all() for block in blocks)
    rng = np.random.default_rng(2)
    whole = rng.multinomial(30_000, np.full(30_000, 1 / 30_000), size=len(blocks[0]) + 1)
    np.testing.assert_array_equal(blocks[1][0], whole[-1])


def test_one_patient_gives_no_interval_instead_of_one_of_width_zero():
    interval = metrics.confidence_intervals([4, 4, 4], [30., 31., 35.], [31., 30., 33.], 50)
    assert all(np.isnan(bounds).all() for bounds in interval.values())


def test_intervals_see_patients_not_segments():
    # All errors are the patients' own: 50 segments of each tell no more than one does.
    rng = np.random.default_rng(5)
    bias = rng.normal(0, 5, 30)
    truth = rng.normal(36, 14, 30)
    once = metrics.confidence_intervals(np.arange(30), truth, truth + bias, 500)
    often = metrics.confidence_intervals(np.repeat(np.arange(30), 50), np.repeat(truth, 50),
                                         np.repeat(truth + bias, 50), 500)
    for name in ("rmse", "mae", "bias"):
        assert once[name] == pytest.approx(often[name], rel=1e-9)


def test_intervals_of_synthetic_patients_cover_the_truth_about_as_often_as_they_say():
    true_rmse = np.hypot(3.0, 5.0)
    covered = 0
    for seed in range(150):
        rng = np.random.default_rng(1000 + seed)
        patients = np.repeat(np.arange(100), 10)
        truth = rng.normal(36, 14, 1000)
        error = rng.normal(0, 3.0, 100)[patients] + rng.normal(0, 5.0, 1000)
        bootstrap = metrics.PatientBootstrap(patients, 300, seed)
        n, squares = bootstrap.sums(np.ones(1000), (truth + error - truth) ** 2)
        low, high = bootstrap.interval(np.sqrt(squares / n))
        covered += low <= true_rmse <= high
    assert 0.87 <= covered / 150 <= 0.99


def test_a_million_predictions_of_two_thousand_patients_take_seconds():
    import time
    rng = np.random.default_rng(0)
    patients = np.repeat(np.arange(2000), 500)
    truth = rng.normal(36, 14, 1_000_000)
    prediction = truth + rng.normal(0, 5, 1_000_000)
    start = time.perf_counter()
    metrics.confidence_intervals(patients, truth, prediction)
    metrics.skill(truth, prediction, truth + 6, patients)
    assert time.perf_counter() - start < 15


# ---------------------------------------------------------------- skill

def test_skill_and_its_interval_equal_a_paired_loop():
    patients, truth, prediction = noisy_predictions(20)
    baseline = np.full_like(truth, 36.0)
    found = metrics.skill(truth, prediction, baseline, patients, n_boot=200, seed=4)

    def naive(rows):
        return 1 - (sklearn_metrics.mean_squared_error(truth[rows], prediction[rows])
                    / sklearn_metrics.mean_squared_error(truth[rows], baseline[rows]))

    draws = [naive(rows) for rows in
             segments_of_each_draw(metrics.PatientBootstrap(patients, 200, 4), patients)]
    assert found["value"] == pytest.approx(naive(slice(None)), rel=1e-12)
    assert (found["low"], found["high"]) == pytest.approx(
        np.percentile(draws, [2.5, 97.5]), rel=1e-9)
    assert found["low"] < found["value"] < found["high"]


def test_skill_over_oneself_is_exactly_nothing():
    patients, truth, prediction = noisy_predictions()
    assert metrics.skill(truth, prediction, prediction, patients, 100) == {
        "value": 0.0, "low": 0.0, "high": 0.0}


def test_skill_of_a_perfect_prediction_is_one_and_over_a_perfect_baseline_undefined():
    patients, truth, prediction = noisy_predictions()
    assert metrics.skill(truth, truth, prediction, patients, 100)["low"] == 1.0
    assert np.isnan(metrics.skill(truth, prediction, truth, patients, 100)["value"])


# ---------------------------------------------------------------- baselines

def test_baselines_recover_a_linear_truth_on_unseen_patients():
    patients, train = cohort(seed=1)
    _, test = cohort(seed=2)
    baselines = metrics.fit_baselines(train, patients, ["map", "dbp", "hr"])
    rmse = {name: metrics.scores(test["tpp"], baseline.predict(test))["rmse"]
            for name, baseline in baselines.items()}
    assert list(rmse) == ["mean_tpp", "map_minus_mean_pcrit", "ridge", "gradient_boosting",
                          "ridge_all", "gradient_boosting_all"]
    assert rmse["ridge"] < 1.1 and rmse["ridge_all"] < 1.1      # the noise is 1 mmHg
    assert rmse["gradient_boosting"] < 2.5
    assert rmse["ridge"] < rmse["gradient_boosting"] < rmse["mean_tpp"]
    assert metrics.choose_best(baselines, test) == min(rmse, key=rmse.get)


def test_the_simple_baselines_are_what_their_names_say():
    patients, train = cohort()
    baselines = metrics.fit_baselines(train, patients, [], BOOSTING | {"ridge"})
    new = {"map": np.array([60.0, 90.0])}
    assert baselines["mean_tpp"].predict(new) == pytest.approx([train["tpp"].mean()] * 2)
    assert baselines["map_minus_mean_pcrit"].predict(new) == pytest.approx(
        new["map"] - train["p_crit"].mean())


def test_ridge_is_least_squares_when_the_truth_is_linear_and_data_are_many():
    patients, train = cohort(n_patients=100, noise=0.01)
    ridge = metrics.fit_baselines(train, patients, ["map", "hr", "dbp"], BOOSTING)["ridge"]
    inputs = np.stack([train["map"], train["hr"], train["dbp"]], axis=1)
    expected = LinearRegression().fit(inputs, train["tpp"]).predict(inputs)
    np.testing.assert_allclose(ridge.predict(train), expected, atol=0.01)


def test_the_baselines_on_all_inputs_see_the_product_of_pp_and_hr():
    patients, train = cohort(seed=3)
    train["tpp"] = 0.005 * train["pp"] * train["hr"]
    baselines = metrics.fit_baselines(train, patients, ["map", "pp", "hr"], BOOSTING)
    error = {name: metrics.scores(train["tpp"], baselines[name].predict(train))["rmse"]
             for name in ("ridge", "ridge_all")}
    assert error["ridge_all"] < 0.01 < 0.3 < error["ridge"]


def test_no_patient_is_on_both_sides_of_a_fold():
    patients = np.random.default_rng(0).permutation(np.repeat([f"p{i}" for i in range(17)], 9))
    folds = metrics._patient_folds(patients)
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
    by_patient = metrics.fit_baselines(fields, patients, ["map"])["gradient_boosting"]
    by_segment = metrics.fit_baselines(fields, np.arange(1200), ["map"])["gradient_boosting"]
    assert np.std(by_patient.predict(fields)) < 0.5 * np.std(by_segment.predict(fields))


@pytest.mark.parametrize("n_patients, per_patient", [(10, 2), (2, 10), (1, 20), (1, 2)])
def test_a_small_train_part_still_gives_finite_baselines(n_patients, per_patient):
    patients, train = cohort(n_patients, per_patient)
    baselines = metrics.fit_baselines(train, patients, ["map", "dbp", "hr"])
    assert len(baselines) == 6
    assert all(np.isfinite(baseline.predict(train)).all() for baseline in baselines.values())


def test_baselines_are_the_same_each_time():
    patients, train = cohort(10, 5, seed=6)
    first, second = (metrics.fit_baselines(train, patients, ["map", "hr"], seed=1)
                     for _ in range(2))
    for name in first:
        np.testing.assert_array_equal(first[name].predict(train), second[name].predict(train))


def test_a_baseline_whose_field_is_absent_or_not_finite_is_left_out_with_its_reason():
    patients, train = cohort()
    del train["sbp"]
    reasons = metrics.left_out_baselines(["map", "hr"], train)
    assert reasons == dict.fromkeys(NAMES_THAT_NEED_EVERY_FIELD, "sbp is not in the data")
    assert set(metrics.fit_baselines(train, patients, ["map", "hr"])) == {
        "mean_tpp", "map_minus_mean_pcrit", "ridge", "gradient_boosting"}

    _, test = cohort()
    test["hr"][:3] = np.nan
    reasons = metrics.left_out_baselines(["map", "hr"], test)
    assert set(reasons) == NAMES_THAT_NEED_EVERY_FIELD | {"ridge", "gradient_boosting"}
    assert reasons["ridge"] == "hr is not finite in 3 segments"


def test_a_field_that_only_the_test_part_lacks_leaves_the_baseline_out_as_well():
    patients, train = cohort()
    _, test = cohort(seed=1)
    del test["pp"]
    reasons = metrics.left_out_baselines(["map", "hr"], train, test)
    assert set(reasons) == NAMES_THAT_NEED_EVERY_FIELD
    baselines = metrics.fit_baselines(train, patients, ["map", "hr"], left_out=reasons)
    assert all(np.isfinite(baseline.predict(test)).all() for baseline in baselines.values())


def test_without_vitals_the_baselines_on_the_networks_vitals_are_left_out():
    patients, train = cohort()
    assert set(metrics.fit_baselines(train, patients, [])) == {
        "mean_tpp", "map_minus_mean_pcrit", "ridge_all", "gradient_boosting_all"}
    assert metrics.left_out_baselines([], train)["ridge"] == "the network gets no vitals"


def test_predicting_from_a_field_with_a_gap_is_refused_by_its_name():
    patients, train = cohort()
    ridge = metrics.fit_baselines(train, patients, ["map", "hr"], BOOSTING)["ridge"]
    with pytest.raises(ValueError, match="hr: 1 of 2 values are not finite"):
        ridge.predict({"map": [70, 80], "hr": [np.nan, 80]})
