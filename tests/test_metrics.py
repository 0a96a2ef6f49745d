"""Scores, intervals over patients and prediction intervals against independent implementations."""
import json

import numpy as np
import pytest
from scipy import special, stats
from sklearn import metrics as sklearn_metrics

import metrics


def noisy_predictions(n_patients=12, seed=0, between=3.0, within=5.0):
    """patients, truth, prediction: unequal numbers of segments, each patient with its own bias."""
    rng = np.random.default_rng(seed)
    patients = np.repeat(np.arange(n_patients), rng.integers(3, 25, n_patients))
    truth = rng.normal(36, 14, len(patients))
    error = rng.normal(0, between, n_patients)[patients] + rng.normal(0, within, len(patients))
    return patients, truth, truth + error


def independent_scores(truth, prediction, weight=None):
    return {"rmse": sklearn_metrics.mean_squared_error(truth, prediction,
                                                       sample_weight=weight) ** 0.5,
            "mae": sklearn_metrics.mean_absolute_error(truth, prediction, sample_weight=weight),
            "r2": sklearn_metrics.r2_score(truth, prediction, sample_weight=weight),
            "bias": np.average(prediction - truth, weights=weight)}


def test_every_score_equals_an_independent_implementation():
    patients, truth, prediction = noisy_predictions()
    expected = {"n": len(truth), "sd": stats.tstd(prediction - truth),
                "mead": sklearn_metrics.median_absolute_error(truth, prediction),
                **independent_scores(truth, prediction)}
    found = metrics.scores(truth, prediction)
    assert {name: found[name] for name in expected} == pytest.approx(expected, rel=1e-12)
    found = metrics.confidence_intervals(patients, truth, prediction, by_patient=True)
    expected = independent_scores(truth, prediction, 1 / np.bincount(patients)[patients])
    assert {name: one["value"] for name, one in found.items()} == pytest.approx(expected, rel=1e-9)


def test_what_is_undefined_is_nan():
    found = metrics.scores([30.0, 30.0], [31.0, 33.0])
    assert np.isnan(found["r2"]) and found["bias"] == 2.0
    assert np.isnan(metrics.scores([30.0], [31.0])["sd"])
    found = metrics.detection(range(6), np.full(6, 50.), np.full(6, 40.))
    assert found["n_low"] == 0 and found["specificity"]["value"] == 1
    assert all(np.isnan(found[name]["value"]) for name in ("sensitivity", "ppv", "auc"))
    series, tpp = np.array([0, 0, 1]), np.array([30.0, 31, 50])
    found = metrics.trend_concordance(series, tpp, tpp, series)
    assert found["n"] == 0 and found["n_changes"] == 1 and np.isnan(found["value"])
    patients, truth, prediction = noisy_predictions(9)
    means = np.array([truth[patients == p].mean() for p in range(9)])[patients]
    assert np.isnan(metrics.within_patient_correlation(patients, truth, means)["value"])
    assert np.isnan(metrics.skill(truth, prediction, truth, patients)["value"])
    assert metrics.skill(truth, truth, prediction, patients)["low"] == 1.0


@pytest.mark.parametrize("score, arguments, message", [
    (metrics.scores, ([1, 2, 3], [1, -np.inf, 3]), "prediction: not all of the 3 values"),
    (metrics.confidence_intervals, ([0, 0, 1], [1, np.nan, 3], [1, 2, 3]), "truth: not all"),
    (metrics.fit_calibration, ([1, np.nan, 3], [0, 0, 1]), "errors: not all"),
    (metrics.scores, ([], []), "0 sample"), (metrics.scores, ([1, 2, 3], [1, 2]), "inconsistent")])
def test_values_not_finite_missing_or_unequal_in_number_are_refused(score, arguments, message):
    with pytest.raises(ValueError, match=message):
        score(*arguments)


def test_a_score_added_to_the_table_has_its_value_and_interval_everywhere(monkeypatch):
    patients, truth, prediction = noisy_predictions(20)
    monkeypatch.setitem(metrics.SCORES, "new", metrics.Score(
        lambda truth, prediction: np.mean(np.abs(truth - prediction) < 5), "within 5 mmHg",
        "share"))
    bootstrap = metrics.PatientBootstrap(patients, 200)
    expected = bootstrap.share(np.abs(truth - prediction) < 5)
    found = metrics.confidence_intervals(bootstrap, truth, prediction)["new"]
    assert found == pytest.approx(expected)
    assert metrics.scores(truth, prediction)["new"] == pytest.approx(expected["value"])


def rows_of_draws(bootstrap, patients):
    """(rows, patients) of each draw, the naive way: a patient drawn twice is two patients."""
    for draw in bootstrap.drawn:
        rows = [np.flatnonzero(patients == name) for name in np.repeat(np.unique(patients), draw)]
        yield np.concatenate(rows), np.repeat(np.arange(len(rows)), list(map(len, rows)))


PLAIN, LOG, SHARE = (np.array, np.array), (np.log, np.exp), (special.logit, special.expit)
UNEXPLAINED = (lambda x: np.log1p(-np.array(x)), lambda x: -np.expm1(x))


@pytest.mark.parametrize("score, scale", [
    *((lambda *a, name=name: metrics.confidence_intervals(*a)[name], scale) for name, scale in zip(
        ("rmse", "mae", "mead", "r2", "bias", "sd"), (LOG, LOG, LOG, UNEXPLAINED, PLAIN, LOG))),
    (lambda *a: metrics.confidence_intervals(*a, by_patient=True)["rmse"], LOG),
    (lambda p, y, x: metrics.rmse(p, x - y), LOG),
    (lambda p, y, x: metrics.skill(y, x, np.full_like(y, 36), p), UNEXPLAINED),
    (lambda p, y, x: metrics.skill(y, x, np.full_like(y, 36), p, by_patient=True), UNEXPLAINED),
    (metrics.within_patient_correlation, (np.arctanh, np.tanh)),
    (lambda *a: metrics.bland_altman(*a)["upper"], PLAIN),
    (lambda *a: metrics.detection(*a)["sensitivity"], SHARE),
    (lambda *a: metrics.detection(*a)["auc"], SHARE),
    (lambda p, y, x: metrics.coverage(p, y, x - 6, x + 6)["segments"], SHARE),
    (lambda p, y, x: metrics.coverage(p, y, x - 6, x + 6)["patients"], SHARE)])
def test_every_interval_is_made_of_the_scores_of_the_draws_segment_by_segment(score, scale):
    patients, truth, prediction = noisy_predictions(20, seed=11)
    bootstrap, (to, back) = metrics.PatientBootstrap(patients, 60, seed=5), scale
    found = score(bootstrap, truth, prediction)
    draws = [score(metrics.PatientBootstrap(drawn, 1), truth[rows], prediction[rows])["value"]
             for rows, drawn in rows_of_draws(bootstrap, patients)]
    reach = stats.t.ppf(0.975, 19) * np.sqrt(20 / 19) * np.std(to(draws))
    assert sorted((found["low"], found["high"])) == pytest.approx(
        sorted(back(to(found["value"]) + np.array([-reach, reach]))), rel=1e-9)


def test_where_the_scale_cannot_hold_a_draw_the_interval_is_made_of_percentiles():
    bootstrap = metrics.PatientBootstrap(np.arange(40), 1000)
    hit = np.r_[np.ones(39), 0]                     # a third of the draws has every patient right
    found = bootstrap.share(hit)
    draws = bootstrap.drawn @ hit / 40
    reach = stats.t.ppf(0.975, 39) * np.sqrt(40 / 39)
    np.testing.assert_array_equal(
        bootstrap.drawn, np.random.default_rng(0).multinomial(40, np.full(40, 1 / 40), 1000))
    assert (draws == 1).mean() > 0.2 and found["value"] == 39 / 40
    assert (found["low"], found["high"]) == pytest.approx(
        tuple(np.quantile(draws, stats.norm.cdf([-reach, reach]))))


def test_the_median_of_each_draw_is_exact_with_ties_and_with_few_values():
    rng = np.random.default_rng(1)
    for n, n_patients in ((1, 1), (2, 2), (7, 3), (500, 20), (3001, 4)):
        patients, values = rng.integers(0, n_patients, n), rng.integers(0, 30, n) / 2
        bootstrap = metrics.PatientBootstrap(patients, 50, seed=3)
        expected = [np.median(values[rows]) for rows, _ in rows_of_draws(bootstrap, patients)]
        np.testing.assert_array_equal(bootstrap.medians(values), expected)


def test_draws_do_not_depend_on_the_order_of_the_segments_nor_on_the_kind_of_identifier():
    patients, truth, prediction = noisy_predictions()
    order = np.random.default_rng(0).permutation(len(truth))
    found = metrics.confidence_intervals(patients, truth, prediction)
    named = np.char.mod("p%04d", patients[order])
    shuffled = metrics.confidence_intervals(named, truth[order], prediction[order])
    assert all(found[name] == pytest.approx(shuffled[name], rel=1e-12) for name in found)


@pytest.mark.parametrize("patients", [[4, 4, 4, 4], [0, 1, 2, 3]])
def test_too_few_patients_give_no_interval_instead_of_an_absurd_one(patients):
    interval = metrics.confidence_intervals(patients, [30., 31., 35., 36], [31., 30., 33., 35])
    assert all(np.isnan([one["low"], one["high"]]).all() for one in interval.values())


def test_shuffled_labels_show_no_skill_over_the_mean():
    rng = np.random.default_rng(0)
    patients, truth, prediction = noisy_predictions(60, seed=1)
    mean = np.full_like(truth, truth.mean())
    assert metrics.skill(truth, prediction, mean, patients)["low"] > 0.5
    for _ in range(9):
        assert metrics.skill(rng.permutation(truth), prediction, mean, patients)["low"] <= 0


def by_patient(text):
    """(patients, values) of a table: patients parted by |."""
    rows = [list(map(float, row.split())) for row in text.split("|")]
    return np.repeat(np.arange(len(rows)), list(map(len, rows))), np.concatenate(rows)


def test_within_patient_correlation_is_the_published_one_of_ph_and_paco2():
    # Bland & Altman 1995, doi 10.1136/bmj.310.6977.446; r as R's rmcorr prints it
    patients, ph = by_patient(
        "6.68 6.53 6.43 6.33|6.85 7.06 7.13 7.17|7.40 7.42 7.41 7.37 7.34 7.35 7.28 7.30 7.34|"
        "7.36 7.33 7.29 7.30 7.35|7.35 7.30 7.30 7.37 7.27 7.28 7.32 7.32|"
        "7.38 7.30 7.29 7.33 7.31 7.33|6.86 6.94 6.92|7.19 7.29 7.21 7.25 7.20 7.19 6.77 6.82")
    _, paco2 = by_patient(
        "3.97 4.12 4.09 3.97|5.27 5.37 5.41 5.44|5.67 3.64 4.32 4.73 4.96 5.04 5.22 4.82 5.07|"
        "5.67 5.10 5.53 4.75 5.51|4.28 4.44 4.32 3.23 4.46 4.72 4.75 4.99|"
        "4.78 4.73 5.12 4.93 5.03 4.93|6.85 6.44 6.52|5.28 4.56 4.34 4.32 4.41 3.69 6.09 5.58")
    found = metrics.within_patient_correlation(patients, ph, paco2)
    assert found["value"] == pytest.approx(-0.5067697, abs=1e-7)


def test_trend_concordance_counts_changes_beyond_the_zone_within_a_series():
    series = np.array([0, 0, 0, 0, 1, 1, 1])
    truth = np.array([30., 36, 33, 20, 50, 58, 50])         # changes + 6, - 3, - 13; + 8, - 8
    prediction = np.array([31., 35, 34, 40, 50, 51, 49])    # changes + 4, - 1, + 6; + 1, - 2
    patients = metrics.PatientBootstrap(series * 2)
    found = metrics.trend_concordance(patients, truth, prediction, series)
    assert (found["n"], found["n_changes"], found["zone"]) == (4, 5, 5.0)
    assert found["value"] == 3 / 4


@pytest.mark.parametrize("digits", [9, 0])              # 0: many ties
def test_detection_equals_scikit_learn(digits):
    patients, truth, prediction = noisy_predictions(14, seed=7)
    prediction = prediction.round(digits)
    event, alarm = truth < 34, prediction < 34
    found = metrics.detection(patients, truth, prediction)
    expected = {
        "prevalence": event.mean(), "sensitivity": sklearn_metrics.recall_score(event, alarm),
        "specificity": sklearn_metrics.recall_score(~event, ~alarm),
        "ppv": sklearn_metrics.precision_score(event, alarm),
        "npv": sklearn_metrics.precision_score(~event, ~alarm),
        "auc": sklearn_metrics.roc_auc_score(event, -prediction)}
    assert {name: found[name]["value"] for name in expected} == pytest.approx(expected, rel=1e-12)
    assert found["n_low"] == event.sum()
    bootstrap = metrics.PatientBootstrap(patients, 60, seed=1)
    areas = [sklearn_metrics.roc_auc_score(event[rows], -prediction[rows])
             for rows, _ in rows_of_draws(bootstrap, patients)]
    assert bootstrap.areas_under_roc(event, -prediction) == pytest.approx(areas, abs=1e-9)


def test_the_limit_of_criterion_2_is_the_printed_one():
    # the table of ISO 81060-2 at mean errors of 0 to 5 mmHg; its last value is not quite the rule's
    for mean_error, printed in enumerate((6.95, 6.87, 6.65, 6.25, 5.64)):
        assert metrics.aami_limit(-mean_error) == pytest.approx(printed, abs=0.0051)
    assert metrics.aami_limit(5) == pytest.approx(4.79, abs=0.02)
    assert metrics.aami_limit(12) == 0


def errors_as_predictions(error, patients=None):
    truth = np.full(len(error), 40.0)
    return metrics.standards(range(len(error)) if patients is None else patients, truth,
                             truth + np.asarray(error, float))


def test_standards_on_errors_that_were_counted_by_hand():
    found = errors_as_predictions([4] * 60 + [9] * 25 + [14] * 10 + [20] * 5)
    assert found["bhs"] == {"within_5": 0.6, "within_10": 0.85, "within_15": 0.95, "grade": "A"}
    assert found["aami_esh_iso"] == {"within_10": 0.85, "passed": True}
    assert found["ieee_1708"] == {"mad": pytest.approx(7.05), "grade": "D"}
    assert found["aami_1"]["mean"] == pytest.approx(7.05) and not found["aami_1"]["passed"]
    assert errors_as_predictions([4] * 59 + [9] * 26 + [14] * 10 + [20] * 5)["bhs"]["grade"] == "B"
    assert errors_as_predictions([14] * 100)["bhs"]["grade"] == "D"
    for mad, grade in ((5, "A"), (5.5, "B"), (6, "B"), (6.9, "C"), (7, "D")):
        assert errors_as_predictions([mad, -mad] * 43)["ieee_1708"]["grade"] == grade


def test_there_is_no_verdict_below_the_85_patients_that_the_standards_ask_for():
    for n, passed, grade in ((84, None, None), (85, True, "A")):
        found = errors_as_predictions([0.1, 0.2, 0.3] * n, np.repeat(np.arange(n), 3))
        assert {found[one]["passed"] for one in ("aami_1", "aami_2", "aami_esh_iso")} == {passed}
        assert found["bhs"]["grade"] == found["ieee_1708"]["grade"] == grade


def test_criterion_2_is_about_patients_means():
    rng = np.random.default_rng(0)
    patients, within = np.repeat(np.arange(85), 40), rng.normal(0, 7.5, 3400)
    assert errors_as_predictions(within, patients)["aami_2"]["passed"]
    own = rng.normal(0, 7.5, 85)[patients]
    found = errors_as_predictions(own, patients)["aami_2"]
    assert not found["passed"] and found["sd"] == pytest.approx(stats.tstd(own[::40]))


def test_limits_of_agreement_are_the_published_ones_of_cardiac_output():
    # Bland & Altman 2007, doi 10.1080/10543400701329422: two methods, 12 patients, 60 pairs
    patients, rv = by_patient(
        "7.83 7.42 7.89 7.12 7.88|6.16 7.26 6.71 6.54|4.75 5.24 4.86 4.78 6.05 5.42|"
        "4.21 3.61 3.72 3.87 3.92|3.13 2.98 2.85 3.17 3.09 3.12|5.92 6.42 5.92 6.27|"
        "7.13 6.62 6.58 6.93|4.54 4.81 5.11 5.29 5.39 5.57|4.48 4.92 3.97|"
        "4.22 4.65 4.74 4.44 4.50|6.78 6.07 6.52 6.42 6.41 5.76|5.06 4.72 4.90 4.80 4.90 5.10")
    _, ic = by_patient(
        "6.57 5.62 6.90 6.57 6.35|4.06 4.29 4.26 4.09|4.71 5.50 5.08 5.02 6.01 5.67|"
        "4.14 4.20 4.61 4.68 5.04|3.03 2.86 2.77 2.46 2.32 2.43|5.90 5.81 5.70 5.76|"
        "5.09 4.63 4.61 5.09|4.72 4.61 4.36 4.20 4.36 4.20|3.17 3.12 2.96|"
        "4.35 4.62 3.16 3.53 3.53|7.20 6.09 7.00 7.10 7.40 6.80|4.50 4.20 3.80 3.80 4.20 4.50")
    found = metrics.bland_altman(patients, ic, rv)
    assert found["bias"]["value"] == pytest.approx(0.6021667, abs=1e-7)
    assert found["sd_within"] ** 2 == pytest.approx(0.170714026, abs=1e-7)
    assert np.hypot(found["sd_within"], found["sd_between"]) == pytest.approx(0.99062408, abs=1e-7)
    # the limits are printed with 1.96 for 1.95996…
    assert found["lower"]["value"] == pytest.approx(-1.3394565, abs=4e-5)
    assert found["upper"]["value"] == pytest.approx(2.5437899, abs=4e-5)


def test_the_patient_quantile_is_that_of_segments_repeated_until_patients_have_equally_many():
    for seed in range(30):
        rng = np.random.default_rng(seed)
        counts = rng.integers(1, 5, rng.integers(2, 40))
        patients, values = np.repeat(np.arange(len(counts)), counts), rng.normal(size=counts.sum())
        repeated = np.sort(np.r_[np.repeat(values, 12 // counts[patients]), np.full(12, np.inf)])
        for level in metrics.LEVELS:
            place = int(np.ceil(level * len(repeated) - 1e-6)) - 1
            assert metrics.patient_quantile(values, patients, level) == repeated[place]


@pytest.mark.parametrize("n_patients, n_known", [(8, 2), (9, 3), (18, 3), (19, 4)])
def test_levels_that_need_more_tune_patients_are_refused(n_patients, n_known):
    errors = np.random.default_rng(1).normal(0, 5, 20 * n_patients)
    found = metrics.fit_calibration(errors, np.repeat(np.arange(n_patients), 20))
    assert json.loads(json.dumps(found)) == found       # numbers and lists, for the checkpoint
    for level in metrics.LEVELS[:n_known]:
        low, high = metrics.interval([30., 40.], found, level)
        assert (high > low).all()
    for level in metrics.LEVELS[n_known:]:
        with pytest.raises(ValueError, match=rf"\({n_patients}\).*{100 * level:.0f} %"):
            metrics.interval([30.], found, level)


def test_intervals_in_units_of_a_spread_hold_as_often_and_are_narrower_where_it_is_true():
    # patients and their segments differ in spread, patients also in bias; 100 draws of 100
    rng, found = np.random.default_rng(8), {"none": [], "true": [], "unrelated": []}
    for _ in range(100):
        patients = np.repeat(np.arange(200), rng.integers(1, 40, 200))
        own, n = rng.lognormal(1, 0.5, 200)[patients], len(patients)
        spread = own * rng.lognormal(0, 0.5, n)
        error = spread * (0.6 * rng.normal(size=200)[patients] + 0.8 * rng.normal(size=n))
        tune, new = patients < 100, patients >= 100
        wide = spread[new] > np.quantile(spread[new], 0.75)
        for name, known in (("none", None), ("true", spread), ("unrelated", rng.uniform(1, 9, n))):
            of_tune, of_new = (None, None) if known is None else (known[tune], known[new])
            calibration = metrics.fit_calibration(error[tune], patients[tune], of_tune)
            low, high = metrics.interval(error[new], calibration, 0.9, of_new)
            held = metrics.coverage(metrics.PatientBootstrap(patients[new], 2), 0, low, high)
            where_wide = np.mean(((low <= 0) & (high >= 0))[wide])
            found[name].append((held["patients"]["value"], held["half_width"], where_wide))
    found = {name: np.mean(values, axis=0) for name, values in found.items()}
    assert all(0.88 <= held <= 0.92 for held, _, _ in found.values())
    assert found["true"][1] < 0.9 * found["none"][1] < 0.9 * found["unrelated"][1]
    assert 0.88 <= found["true"][2] <= 0.92 and found["none"][2] < 0.75
