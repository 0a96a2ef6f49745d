"""Scores, intervals over patients and prediction intervals against independent implementations."""
import numpy as np
import pytest
from scipy import special, stats
from scipy.spatial.distance import mahalanobis
from sklearn import metrics as sklearn_metrics
from sklearn.covariance import LedoitWolf

import metrics


def noisy_predictions(n_patients=12, seed=0, between=3.0, within=5.0):
    """patients, truth, prediction: unequal numbers of segments, each patient with its own bias."""
    rng = np.random.default_rng(seed)
    patients = np.repeat(np.arange(n_patients), rng.integers(3, 25, n_patients))
    truth = rng.normal(36, 14, len(patients))
    error = rng.normal(0, between, n_patients)[patients] + rng.normal(0, within, len(patients))
    return patients, truth, truth + error


# ---------------------------------------------------------------- scores

def test_every_score_equals_an_independent_implementation():
    _, truth, prediction = noisy_predictions()
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


def test_what_is_undefined_is_nan():
    found = metrics.scores([30.0, 30.0], [31.0, 33.0])
    assert np.isnan(found["r2"]) and found["bias"] == 2.0
    assert np.isnan(metrics.scores([30.0], [31.0])["sd"])
    found = metrics.detection(range(6), np.full(6, 50.), np.full(6, 40.))
    assert found["n_low"] == 0 and found["specificity"]["value"] == 1
    assert all(np.isnan(found[name]["value"]) for name in ("sensitivity", "ppv", "auc"))
    found = metrics.trend_concordance(*map(np.array, ([0, 0, 1], [30., 31, 50], [30., 31, 50],
                                                      [0, 0, 1])))
    assert found["n"] == 0 and found["n_changes"] == 1 and np.isnan(found["value"])
    patients, truth, prediction = noisy_predictions(9)
    means = np.array([truth[patients == p].mean() for p in range(9)])[patients]
    assert np.isnan(metrics.within_patient_correlation(patients, truth, means)["value"])
    assert np.isnan(metrics.skill(truth, prediction, truth, patients)["value"])
    assert metrics.skill(truth, truth, prediction, patients)["low"] == 1.0


@pytest.mark.parametrize("bad", [np.nan, -np.inf])
def test_values_that_are_not_finite_missing_or_unequal_in_number_are_refused(bad):
    with pytest.raises(ValueError, match="prediction: not all of the 3 values"):
        metrics.scores([1, 2, 3], [1, bad, 3])
    with pytest.raises(ValueError, match="truth: not all"):
        metrics.confidence_intervals([0, 0, 1], [1, bad, 3], [1, 2, 3])
    with pytest.raises(ValueError, match="errors: not all"):
        metrics.fit_calibration([1, bad, 3], [0, 0, 1])
    for truth in ([], [1, 2, 3]):
        with pytest.raises(ValueError):
            metrics.scores(truth, truth[:-1])


def test_a_score_added_to_the_table_has_its_value_and_interval_everywhere(monkeypatch):
    patients, truth, prediction = noisy_predictions(20)
    monkeypatch.setitem(metrics.SCORES, "within_5", metrics.Score(
        lambda truth, prediction: np.mean(np.abs(truth - prediction) < 5), "", "within 5 mmHg",
        "share"))
    inside = np.abs(truth - prediction) < 5
    bootstrap = metrics.PatientBootstrap(patients, 200)
    expected = bootstrap.share(inside)
    assert metrics.scores(truth, prediction)["within_5"] == pytest.approx(expected["value"])
    assert metrics.confidence_intervals(bootstrap, truth, prediction)["within_5"] == pytest.approx(
        expected)


# ---------------------------------------------------------------- bootstrap

def segments_of_each_draw(bootstrap, patients):
    """The naive way: the row numbers of the drawn patients' segments, patient by patient."""
    names = np.unique(patients)
    for weights in bootstrap.weights():
        for draw in weights.astype(int):
            drawn = np.repeat(names, draw)
            yield np.concatenate([np.flatnonzero(patients == name) for name in drawn])


@pytest.mark.parametrize("n_patients", [5, 40])
def test_intervals_equal_a_loop_that_scores_the_same_draws_segment_by_segment(n_patients):
    patients, truth, prediction = noisy_predictions(n_patients, seed=n_patients)
    bootstrap = metrics.PatientBootstrap(patients, 100, seed=7)
    found = metrics.confidence_intervals(bootstrap, truth, prediction)
    draws = [metrics.scores(truth[rows], prediction[rows])
             for rows in segments_of_each_draw(bootstrap, patients)]
    value = metrics.scores(truth, prediction)
    assert list(found) == list(metrics.SCORES)
    reach = (stats.t.ppf(0.975, n_patients - 1) * np.sqrt(n_patients / (n_patients - 1))
             * np.array([-1, 1]))
    for name, interval in found.items():
        values = np.array([draw[name] for draw in draws])
        if name == "bias":
            expected = value[name] + reach * np.std(values)
        elif name == "r2":
            expected = 1 - (1 - value[name]) * np.exp(-reach * np.std(np.log(1 - values)))
        else:
            expected = value[name] * np.exp(reach * np.std(np.log(values)))
        assert (interval["low"], interval["high"]) == pytest.approx(tuple(expected), rel=1e-9,
                                                                    abs=1e-9), name


def test_where_the_scale_cannot_hold_a_draw_the_interval_is_made_of_percentiles():
    bootstrap = metrics.PatientBootstrap(np.arange(40), 1000)
    hit = np.r_[np.ones(39), 0]                     # a third of the draws has every patient right
    found = bootstrap.share(hit)
    draws = np.concatenate(list(bootstrap.weights())) @ hit / 40
    reach = stats.t.ppf(0.975, 39) * np.sqrt(40 / 39)
    assert (draws == 1).mean() > 0.2 and found["value"] == 39 / 40
    assert (found["low"], found["high"]) == pytest.approx(
        tuple(np.quantile(draws, stats.norm.cdf([-reach, reach]))))


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
    found = metrics.confidence_intervals(patients, truth, prediction)
    named = np.array([f"p{patient:04d}" for patient in patients])[order]
    shuffled = metrics.confidence_intervals(named, truth[order], prediction[order])
    for name in metrics.SCORES:
        assert found[name] == pytest.approx(shuffled[name], rel=1e-12)


def test_blocks_of_draws_are_the_same_draws_as_one_block():
    bootstrap = metrics.PatientBootstrap(np.arange(3000), n_boot=7, seed=2)
    blocks = list(bootstrap.weights(3_000_000))
    assert [len(block) for block in blocks] == [3, 3, 1]
    whole = np.random.default_rng(2).multinomial(3000, np.full(3000, 1 / 3000), size=7)
    np.testing.assert_array_equal(np.concatenate(blocks), whole)


@pytest.mark.parametrize("patients", [[4, 4, 4, 4], [0, 1, 2, 3]])
def test_too_few_patients_give_no_interval_instead_of_an_absurd_one(patients):
    interval = metrics.confidence_intervals(patients, [30., 31., 35., 36], [31., 30., 33., 35])
    assert all(np.isnan([one["low"], one["high"]]).all() for one in interval.values())


def drawn_patients(bootstrap, patients):
    """(rows, patients) of each draw: a patient drawn twice is two patients."""
    for weights in bootstrap.weights():
        for draw in weights.astype(int):
            rows = [np.flatnonzero(patients == name) for name in np.repeat(np.unique(patients),
                                                                           draw)]
            yield np.concatenate(rows), np.repeat(np.arange(len(rows)), list(map(len, rows)))


@pytest.mark.parametrize("score, to, back", [
    (metrics.within_patient_correlation, np.arctanh, np.tanh),
    (lambda *a: metrics.bland_altman(*a)["upper"], np.array, np.array),
    (lambda *a: metrics.detection(*a)["sensitivity"], special.logit, special.expit),
    (lambda *a: metrics.detection(*a)["auc"], special.logit, special.expit),
    (lambda *a: metrics.confidence_intervals(*a, by_patient=True)["mae"], np.log, np.exp),
    (lambda p, y, x: metrics.coverage(p, y, x - 6, x + 6)["patients"], special.logit,
     special.expit),
    (lambda p, y, x: metrics.skill(y, x, np.full_like(y, 36), p, by_patient=True),
     lambda x: np.log1p(-np.array(x)), lambda x: -np.expm1(x))])
def test_every_other_interval_is_made_of_the_scores_of_its_draws(score, to, back):
    patients, truth, prediction = noisy_predictions(20, seed=11)
    bootstrap = metrics.PatientBootstrap(patients, 60, seed=5)
    found = score(bootstrap, truth, prediction)
    draws = [score(metrics.PatientBootstrap(drawn, 1), truth[rows], prediction[rows])["value"]
             for rows, drawn in drawn_patients(bootstrap, patients)]
    reach = stats.t.ppf(0.975, 19) * np.sqrt(20 / 19) * np.std(to(draws))
    assert sorted((found["low"], found["high"])) == pytest.approx(
        sorted(back(to(found["value"]) + np.array([-reach, reach]))), rel=1e-9)


# ---------------------------------------------------------------- skill

def test_skill_and_its_interval_equal_a_paired_loop():
    patients, truth, prediction = noisy_predictions(20)
    baseline, bootstrap = np.full_like(truth, 36.0), metrics.PatientBootstrap(patients, 100, seed=4)
    found = metrics.skill(truth, prediction, baseline, bootstrap)

    def unexplained(rows):
        return (sklearn_metrics.mean_squared_error(truth[rows], prediction[rows])
                / sklearn_metrics.mean_squared_error(truth[rows], baseline[rows]))

    draws = [unexplained(rows) for rows in segments_of_each_draw(bootstrap, patients)]
    value, reach = unexplained(slice(None)), stats.t.ppf(0.975, 19) * np.sqrt(20 / 19)
    assert found["value"] == pytest.approx(1 - value, rel=1e-12)
    assert (found["low"], found["high"]) == pytest.approx(tuple(
        1 - value * np.exp([reach * np.std(np.log(draws)), -reach * np.std(np.log(draws))])))


def test_shuffled_labels_show_no_skill_over_the_mean():
    rng = np.random.default_rng(0)
    patients, truth, prediction = noisy_predictions(60, seed=1)
    mean = np.full_like(truth, truth.mean())
    assert metrics.skill(truth, prediction, mean, patients)["low"] > 0.5
    for _ in range(20):
        assert metrics.skill(rng.permutation(truth), prediction, mean, patients)["low"] <= 0


# ---------------------------------------------------------------- patients, changes, low TPP

def test_scores_by_patient_equal_weighted_ones():
    patients, truth, prediction = noisy_predictions(15, seed=3)
    weight = 1 / np.bincount(patients)[patients]
    found = metrics.confidence_intervals(patients, truth, prediction, by_patient=True)
    weighted = {"sample_weight": weight}
    assert {name: one["value"] for name, one in found.items()} == pytest.approx({
        "rmse": np.sqrt(sklearn_metrics.mean_squared_error(truth, prediction, **weighted)),
        "mae": sklearn_metrics.mean_absolute_error(truth, prediction, **weighted),
        "r2": sklearn_metrics.r2_score(truth, prediction, **weighted),
        "bias": np.average(prediction - truth, weights=weight)}, rel=1e-9)


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


def test_trend_concordance_equals_a_loop_over_the_segments():
    patients, truth, prediction = noisy_predictions(12, seed=6)
    series = patients * 2 + (np.arange(len(patients)) % 7 > 3)
    order = np.argsort(series, kind="stable")
    patients, series, truth, prediction = (x[order] for x in (patients, series, truth, prediction))
    right, counted, everything = np.zeros(12), np.zeros(12), 0
    for i in range(1, len(truth)):
        if series[i] == series[i - 1]:
            a, b = truth[i] - truth[i - 1], prediction[i] - prediction[i - 1]
            everything += 1
            if abs(a) >= 5 or abs(b) >= 5:
                counted[patients[i]] += 1
                right[patients[i]] += a * b > 0
    found = metrics.trend_concordance(patients, truth, prediction, series)
    assert (found["n"], found["n_changes"], found["zone"]) == (counted.sum(), everything, 5.0)
    assert found["value"] == pytest.approx(right.sum() / counted.sum())
    weights = np.concatenate(list(metrics.PatientBootstrap(patients).weights()))
    draws = special.logit(weights @ right / (weights @ counted))
    reach = stats.t.ppf(0.975, 11) * np.sqrt(12 / 11) * np.std(draws) * np.array([-1, 1])
    assert (found["low"], found["high"]) == pytest.approx(
        tuple(special.expit(special.logit(found["value"]) + reach)), rel=1e-9)


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
             for rows in segments_of_each_draw(bootstrap, patients)]
    assert bootstrap.areas_under_roc(event, -prediction) == pytest.approx(areas, abs=1e-9)


# ---------------------------------------------------------------- borrowed standards

def test_the_limit_of_criterion_2_is_the_printed_one():
    # the table of ISO 81060-2 at mean errors of 0 to 5 mmHg; its last value is not quite the rule's
    for mean_error, printed in enumerate((6.95, 6.87, 6.65, 6.25, 5.64)):
        assert metrics.aami_limit(-mean_error) == pytest.approx(printed, abs=0.0051)
    assert metrics.aami_limit(5) == pytest.approx(4.79, abs=0.02)
    for mean_error in (0, 1.3, -4, 9):
        normal = stats.norm(mean_error, metrics.aami_limit(mean_error))
        assert normal.cdf(10) - normal.cdf(-10) == pytest.approx(0.85, abs=1e-9)
    assert metrics.aami_limit(12) == 0


def errors_as_predictions(error, patients=None):
    truth = np.full(len(error), 40.0)
    return metrics.standards(range(len(error)) if patients is None else patients, truth,
                             truth + np.asarray(error, float))


def test_standards_on_errors_that_were_counted_by_hand():
    error = [4] * 60 + [9] * 25 + [14] * 10 + [20] * 5
    found = errors_as_predictions(error)
    assert found["bhs"] == {"within_5": 0.6, "within_10": 0.85, "within_15": 0.95, "grade": "A"}
    assert found["aami_esh_iso"] == {"within_10": 0.85, "passed": True}
    assert found["ieee_1708"] == {"mad": pytest.approx(7.05), "grade": "D"}
    assert found["aami_1"]["mean"] == pytest.approx(7.05) and not found["aami_1"]["passed"]
    assert errors_as_predictions([4] * 59 + [9] * 26 + [14] * 10 + [20] * 5)["bhs"]["grade"] == "B"
    assert errors_as_predictions([14] * 10)["bhs"]["grade"] == "D"
    for mad, grade in ((5, "A"), (5.5, "B"), (6, "B"), (6.9, "C"), (7, "D")):
        assert errors_as_predictions([mad, -mad])["ieee_1708"]["grade"] == grade


def test_criterion_2_is_about_patients_means():
    rng = np.random.default_rng(0)
    patients, within = np.repeat(np.arange(85), 40), rng.normal(0, 7.5, 3400)
    assert errors_as_predictions(within, patients)["aami_2"]["passed"]
    own = rng.normal(0, 7.5, 85)[patients]
    found = errors_as_predictions(own, patients)
    assert not found["aami_2"]["passed"]
    assert found["aami_2"]["sd"] == pytest.approx(stats.tstd(own[::40]))


def test_limits_of_agreement_are_those_of_the_variance_components():
    import pandas
    from statsmodels.formula.api import ols
    from statsmodels.stats.anova import anova_lm
    patients, truth, prediction = noisy_predictions(13, seed=9)
    error = prediction - truth
    table = anova_lm(ols("e ~ C(p)", pandas.DataFrame({"e": error, "p": patients})).fit())
    within, between = table.mean_sq["Residual"], table.mean_sq["C(p)"]
    n = np.bincount(patients)
    mean_n = (n.sum() - (n ** 2).sum() / n.sum()) / (len(n) - 1)
    variance = within + max((between - within) / mean_n, 0)
    found = metrics.bland_altman(patients, truth, prediction)
    assert found["bias"]["value"] == pytest.approx(error.mean())
    assert found["sd_within"] == pytest.approx(np.sqrt(within), rel=1e-9)
    reach = stats.norm.ppf(0.975) * np.sqrt(variance)
    assert (found["lower"]["value"], found["upper"]["value"]) == pytest.approx(
        (error.mean() - reach, error.mean() + reach), rel=1e-9)
    assert found["lower"]["low"] < found["lower"]["value"] < found["lower"]["high"]


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


# ---------------------------------------------------------------- how sure is one prediction

def test_the_patient_quantile_is_that_of_segments_repeated_until_patients_have_equally_many():
    for seed in range(30):
        rng = np.random.default_rng(seed)
        counts = rng.integers(1, 5, rng.integers(2, 40))
        patients, values = np.repeat(np.arange(len(counts)), counts), rng.normal(size=counts.sum())
        repeated = np.sort(np.r_[np.repeat(values, 12 // counts[patients]), np.full(12, np.inf)])
        for level in metrics.LEVELS:
            place = int(np.ceil(level * len(repeated) - 1e-6)) - 1
            assert metrics.patient_quantile(values, patients, level) == repeated[place]


@pytest.mark.parametrize("n_patients, known", [(8, [0.5, 0.8]), (9, [0.5, 0.8, 0.9]),
                                               (18, [0.5, 0.8, 0.9]), (19, [0.5, 0.8, 0.9, 0.95])])
def test_levels_that_need_more_tune_patients_are_refused(n_patients, known):
    rng = np.random.default_rng(1)
    found = metrics.fit_calibration(rng.normal(0, 5, 20 * n_patients),
                                    np.repeat(np.arange(n_patients), 20))
    for level in metrics.LEVELS:
        if level in known:
            low, high = metrics.interval([30., 40.], found, level)
            assert (high > low).all()
        else:
            with pytest.raises(ValueError, match=f"no {level:.0%} interval: {n_patients} tune pa"):
                metrics.interval([30.], found, level)


def test_each_tune_patient_weighs_the_same_however_many_segments_it_has():
    error, patients = np.r_[np.full(1000, 9.0), np.arange(1, 20) / 10], np.r_[np.zeros(1000),
                                                                             np.arange(1, 20)]
    found = metrics.fit_calibration(error, patients)
    assert found["half_widths"][:3] == pytest.approx([1.1, 1.7, 1.9])
    assert found["half_widths"][3] == 9.0


def test_ninety_percent_intervals_hold_for_segments_of_new_patients():
    # 200 draws of 100 calibration patients, unequal numbers of segments, unequal patients
    rng = np.random.default_rng(2)
    held = []
    for _ in range(200):
        own, spread = rng.normal(0, 4, 200), rng.gamma(4, 1.2, 200)
        patients = np.repeat(np.arange(200), rng.integers(1, 40, 200))
        error = own[patients] + rng.normal(size=len(patients)) * spread[patients]
        tune, new = patients < 100, patients >= 100
        calibration = metrics.fit_calibration(error[tune], patients[tune])
        low, high = metrics.interval(error[new], calibration, 0.9)
        held.append(metrics.coverage(metrics.PatientBootstrap(patients[new], 2),
                                     np.zeros(new.sum()), low, high)["patients"]["value"])
    assert 0.88 <= np.mean(held) <= 0.92


def test_intervals_in_units_of_a_spread_hold_as_often_and_are_narrower_where_it_is_true():
    # patients differ in how sure one can be and in bias, their segments too; 200 draws
    rng, found = np.random.default_rng(8), {"none": [], "true": [], "unrelated": []}
    for _ in range(200):
        patients = np.repeat(np.arange(200), rng.integers(1, 40, 200))
        own, n = rng.lognormal(1, 0.5, 200)[patients], len(patients)
        spread = own * rng.lognormal(0, 0.5, n)
        error = spread * (0.6 * rng.normal(size=200)[patients] + 0.8 * rng.normal(size=n))
        tune, new = patients < 100, patients >= 100
        wide = spread[new] > np.quantile(spread[new], 0.75)
        for name, known in (("none", None), ("true", spread), ("unrelated", rng.uniform(1, 9, n))):
            of_tune, of_new = ((None, None) if known is None else (known[tune], known[new]))
            calibration = metrics.fit_calibration(error[tune], patients[tune], of_tune)
            low, high = metrics.interval(error[new], calibration, 0.9, of_new)
            held = metrics.coverage(metrics.PatientBootstrap(patients[new], 2), np.zeros(new.sum()),
                                    low, high)
            where_wide = np.mean(((low <= 0) & (high >= 0))[wide])
            found[name].append((held["patients"]["value"], held["mean_width"], where_wide))
    found = {name: np.mean(values, axis=0) for name, values in found.items()}
    assert all(0.88 <= held <= 0.92 for held, _, _ in found.values())
    assert found["true"][1] < 0.9 * found["none"][1] < 0.9 * found["unrelated"][1]
    assert 0.88 <= found["true"][2] <= 0.92 and found["none"][2] < 0.75


def test_a_calibration_lies_in_a_checkpoint_that_is_safe_to_load(tmp_path):
    import torch
    rng = np.random.default_rng(5)
    calibration = dict(metrics.fit_calibration(rng.normal(size=90), np.repeat(np.arange(9), 10)),
                       novelty=metrics.novelty_threshold(
                           metrics.fit_novelty(rng.normal(size=(50, 3))), rng.normal(size=(20, 3)),
                           range(20)))
    torch.save(calibration, tmp_path / "c.pth")
    assert torch.load(tmp_path / "c.pth", weights_only=True) == calibration
    assert calibration["half_widths"][3] is None


def test_novelty_is_the_distance_of_mahalanobis_and_flags_what_is_unlike():
    rng = np.random.default_rng(6)
    mix = rng.normal(size=(5, 5))
    train, tune, new = (rng.normal(size=(n, 5)) @ mix for n in (600, 400, 2000))
    patients = np.repeat(np.arange(100), 4)
    fitted = metrics.novelty_threshold(metrics.fit_novelty(train), tune, patients)
    expected = LedoitWolf().fit(train)
    distance = metrics.novelty(new, fitted)
    assert distance[:9] == pytest.approx([mahalanobis(row, expected.location_, expected.precision_)
                                          for row in new[:9]])
    assert 0.03 < np.mean(distance > fitted["threshold"]) < 0.08
    assert np.mean(metrics.novelty(new + 8 * mix[0], fitted) > fitted["threshold"]) > 0.95
    assert metrics.novelty_threshold(fitted, tune[:18], range(18))["threshold"] is None
    assert metrics.novelty_threshold(fitted, 2 * tune, patients)["threshold"] > fitted["threshold"]
