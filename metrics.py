"""Scores, confidence intervals over patients, and prediction intervals.

    from metrics import scores, confidence_intervals, skill     # how good is a model?
    from metrics import fit_calibration, interval               # how sure is one prediction?

All pressures are in mmHg; error = prediction - truth. The independent unit is the patient, not the
60-s segment: confidence intervals come from a bootstrap over patients, and prediction intervals
treat patients, not segments, as exchangeable. An estimate with its 95 % confidence interval is a
dict {'value', 'low', 'high'}. The module can be copied out alone.
"""
from functools import partial
from typing import Callable, Dict, NamedTuple, Optional

import numpy as np
from scipy.optimize import brentq
from scipy.special import expit, logit, ndtr, stdtrit
from sklearn.covariance import LedoitWolf
from sklearn.metrics import (
    mean_absolute_error,
    mean_squared_error,
    median_absolute_error,
    r2_score,
    roc_auc_score,
)

# Below it a report should call its intervals too narrow: the 95 % intervals cover 91 to 95 % of
# synthetic data sets of 10 patients, 93.5 to 95.3 % of 300 (benchmarks/evaluation.py coverage).
FEW_PATIENTS = 30
LEAST_PATIENTS = 5                              # no confidence interval below it

# Labels are float32: truths that vary less than this are constant, and R² is undefined.
MIN_VARIANCE = 1e-9                             # mmHg²

# The published system's cut-off for risk (TPP < 34 mmHg), and the smallest change of TPP that
# counts: about the label's own variation from minute to minute (SD 5 mmHg on real recordings).
LOW_TPP = 34.0
TREND_ZONE = 5.0


# ---------------------------------------------------------------- scores

class Score(NamedTuple):
    """A score of predictions, an entry of SCORES.

    function: (truth [N], prediction [N]) -> float. scale: one of SCALES, on which its bootstrap
    draws are about symmetric. of_sums: the same score from the sums over segments that `_sums`
    makes, which makes its interval fast; without it each draw is scored, and the score that weighs
    each patient the same is the mean of the patients' own. draws: a faster way to its values in the
    draws, (bootstrap, truth, prediction) -> [n_boot].
    """
    function: Callable
    unit: str
    title: str
    scale: str
    of_sums: Optional[Callable] = None
    draws: Optional[Callable] = None


def _r2(truth, prediction):
    return r2_score(truth, prediction) if np.var(truth) > MIN_VARIANCE else float("nan")


def _r2_of_sums(s):
    spread = s.yy - s.y ** 2 / s.n
    return np.where(spread > MIN_VARIANCE * s.n, 1 - s.ee / spread, np.nan)


# Add a score here: console, JSON and page follow.
SCORES = {
    "rmse": Score(lambda truth, prediction: mean_squared_error(truth, prediction) ** 0.5,
                  "mmHg", "RMSE", "log", lambda s: np.sqrt(s.ee / s.n)),
    "mae": Score(mean_absolute_error, "mmHg", "MAE", "log", lambda s: s.ae / s.n),
    "mead": Score(median_absolute_error, "mmHg", "MeAD", "log",
                  draws=lambda bootstrap, truth, prediction: bootstrap.medians(
                      np.abs(prediction - truth))),
    "r2": Score(_r2, "", "R²", "unexplained", _r2_of_sums),
    "bias": Score(lambda truth, prediction: np.mean(prediction - truth),
                  "mmHg", "bias", "plain", lambda s: s.e / s.n),
    "sd": Score(lambda truth, prediction: np.std(prediction - truth, ddof=1)
                if len(truth) > 1 else float("nan"), "mmHg", "SD", "log",
                lambda s: np.sqrt(np.maximum(s.ee - s.e ** 2 / s.n, 0) / (s.n - s.lost))),
}


def scores(truth: np.ndarray, prediction: np.ndarray) -> Dict[str, float]:
    """SCORES of `prediction` against `truth`, both [N] in mmHg, and `n`, the number of segments.

    rmse, mae; mead: median |error|; r2: NaN where the truth is constant; bias: mean error; sd: of
    the errors, ddof 1, NaN for a single segment. Raises ValueError for values that are not finite.
    """
    truth, prediction = _finite(truth=truth, prediction=prediction)
    return {"n": len(truth),
            **{name: float(score.function(truth, prediction)) for name, score in SCORES.items()}}


def _finite(**arrays):
    """The arrays as float64 [N], or a ValueError that names the bad one."""
    ready = []
    for name, values in arrays.items():
        values = np.asarray(values, dtype=np.float64).ravel()
        bad = np.count_nonzero(~np.isfinite(values))
        if bad or not len(values):
            raise ValueError(f"{name}: {bad} of {len(values)} values are not finite" if bad
                             else f"{name}: there are no values to score")
        if ready and len(values) != len(ready[0]):
            raise ValueError(f"{name}: {len(values)} values, expected {len(ready[0])} as in "
                             f"{next(iter(arrays))}")
        ready.append(values)
    return ready


# ---------------------------------------------------------------- intervals over patients

# The scale on which the draws of a statistic are about symmetric: logarithms of spreads and of what
# R² and skill leave unexplained, Fisher's z of correlations, log-odds of shares.
SCALES = {
    "plain": (lambda x: x, lambda x: x),
    "log": (np.log, np.exp),
    "unexplained": (lambda x: np.log(1 - x), lambda x: 1 - np.exp(x)),
    "correlation": (np.arctanh, np.tanh),
    "share": (logit, expit),
}


class PatientBootstrap:
    """Draws of patients with replacement; all statistics share the same draws.

    It works on sums per patient, so that a draw needs no pass over the segments: a million segments
    of 2,000 patients take seconds. Any function of sums has an `estimate`.

    patients: [N], any sortable identifiers. Two objects with the same patients, n_boot and seed
    make the same draws, whatever the order of the segments.
    """

    def __init__(self, patients, n_boot: int = 2000, seed: int = 0):
        names, self.owner, self.counts = np.unique(
            np.asarray(patients).ravel(), return_inverse=True, return_counts=True)
        self.owner = self.owner.ravel()
        self.n_patients, self.n_boot, self.seed = len(names), n_boot, seed
        self._kept = None

    def weights(self):
        """Yield how often each patient was drawn, in blocks [draws, n_patients] of float64."""
        block = max(1, 10_000_000 // self.n_patients)       # 80 MB at most
        if self._kept is not None:
            yield self._kept
            return
        rng = np.random.default_rng(self.seed)
        share = np.full(self.n_patients, 1 / self.n_patients)
        for start in range(0, self.n_boot, block):
            size = min(block, self.n_boot - start)
            drawn = rng.multinomial(self.n_patients, share, size=size).astype(np.float64)
            if size == self.n_boot:
                self._kept = drawn
            yield drawn

    def per_patient(self, column: np.ndarray) -> np.ndarray:
        """[n_patients]: the sums of a column [N] over each patient's segments."""
        return np.bincount(self.owner, column, self.n_patients)

    def rows_by_patient(self):
        """The row numbers of each patient's segments, a list of arrays."""
        return np.split(np.argsort(self.owner, kind="stable"), np.cumsum(self.counts)[:-1])

    def estimate(self, function: Callable, columns, scale: str = "plain",
                 by_patient: bool = False) -> Dict[str, float]:
        """A function of sums with its 95 % interval: {'value', 'low', 'high'}.

        function: takes the sums of the columns, each a number or [n_boot]. columns: [N] each, or
        with by_patient [n_patients].
        """
        if not by_patient:
            columns = [self.per_patient(column) for column in columns]
        columns = np.stack(columns, axis=1)
        with np.errstate(divide="ignore", invalid="ignore"):
            value = float(function(*[column.sum() for column in columns.T]))
            draws = function(*np.concatenate([weights @ columns for weights in self.weights()]).T)
        low, high = self.interval(value, draws, scale)
        return {"value": value, "low": low, "high": high}

    def ratio(self, part, whole=None, scale: str = "share", by_patient: bool = False
              ) -> Dict[str, float]:
        """The sum of a column over that of another (default: their number), as an estimate."""
        part = np.asarray(part, np.float64)
        whole = np.ones_like(part) if whole is None else np.asarray(whole, np.float64)
        return self.estimate(
            lambda part, whole: np.where(whole > 0, part / np.where(whole > 0, whole, 1), np.nan),
            (part, whole), scale, by_patient)

    def of_each_draw(self, function: Callable, *columns: np.ndarray) -> np.ndarray:
        """[n_boot]: a function of the drawn segments of the columns [N]; slow, for any function."""
        rows = self.rows_by_patient()
        draws = (np.concatenate([own for own, times in zip(rows, draw) for _ in range(int(times))])
                 for weights in self.weights() for draw in weights)
        return np.array([function(*(column[drawn] for column in columns)) for drawn in draws])

    def levels_in_draws(self, values: np.ndarray, *masks: np.ndarray):
        """(levels, how many segments of each mask [N] lie at each level in each draw).

        The levels are the distinct values [N]; beyond 5 million / n_patients neighbours share one.
        The counts come in blocks of draws, each a list of [draws, levels], one for each mask.
        """
        levels, level = np.unique(values, return_inverse=True)
        most = max(1, 5_000_000 // self.n_patients)
        if len(levels) > most:
            shared = np.arange(len(levels)) * most // len(levels)
            levels, level = levels[np.searchsorted(shared, np.arange(most))], shared[level]
        size = self.n_patients * len(levels)
        cell = self.owner * len(levels) + level.ravel()
        counts = [np.bincount(cell[mask], minlength=size).reshape(self.n_patients, -1).astype(float)
                  for mask in masks]
        return levels, ([some @ one for one in counts] for weights in self.weights()
                        for some in np.array_split(weights, -(-len(weights) * len(levels)
                                                              // 5_000_000)))

    def medians(self, values: np.ndarray) -> np.ndarray:
        """The median of `values` [N] over the segments of each draw: [n_boot]."""
        # Only levels near the median matter: within ten standard errors and more.
        near = np.clip(0.5 + np.array([-10, 10]) / np.sqrt(self.n_patients), 0, 1)
        levels, draws = self.levels_in_draws(np.clip(values, *np.quantile(values, near)),
                                             np.full(len(values), True))
        found = []
        for counts, in draws:
            upto = np.cumsum(counts, axis=1)
            n = upto[:, -1:]
            found.append((levels[np.sum(upto <= (n - 1) // 2, axis=1)]
                          + levels[np.sum(upto <= n // 2, axis=1)]) / 2)
        return np.concatenate(found)

    def areas_under_roc(self, event: np.ndarray, score: np.ndarray) -> np.ndarray:
        """The area under the ROC curve in each draw, [n_boot], NaN where one class is missing.

        event: bool [N]; score: [N], higher where the event is likelier. Ties count half.
        """
        areas = []
        for hits, others in self.levels_in_draws(score, event, ~event)[1]:
            below = np.cumsum(others, axis=1) - others / 2
            with np.errstate(invalid="ignore"):
                areas.append(np.sum(hits * below, axis=1)
                             / (hits.sum(axis=1) * others.sum(axis=1)))
        return np.concatenate(areas)

    def interval(self, value: float, draws: np.ndarray, scale: str = "plain"):
        """(low, high) of a statistic from its value and its values in the draws [n_boot].

        On its scale: value ± t x SD of the draws, Student's t with n_patients - 1 degrees of
        freedom, the SD times sqrt(n / (n - 1)); with few patients percentiles are too narrow. Where
        the scale cannot hold a draw (a share of 0 or 1, no error at all): percentiles of the draws
        at the levels that correspond to t (Hesterberg 2015, doi 10.1080/00031305.2015.1089789).
        Draws in which the statistic is NaN are left out; (NaN, NaN) when these are more than a
        tenth, and below LEAST_PATIENTS.
        """
        draws = np.asarray(draws)[~np.isnan(draws)]
        if self.n_patients < LEAST_PATIENTS or len(draws) < 0.9 * self.n_boot or np.isnan(value):
            return float("nan"), float("nan")
        to, back = SCALES[scale]
        reach = (stdtrit(self.n_patients - 1, 0.975)
                 * np.sqrt(self.n_patients / (self.n_patients - 1)))
        with np.errstate(divide="ignore", invalid="ignore"):
            middle, draws_there = to(np.float64(value)), to(draws)
        if np.isfinite(middle) and np.isfinite(draws_there).all():
            width = reach * np.std(draws_there)
            low, high = sorted((back(middle - width), back(middle + width)))
        else:
            low, high = np.quantile(draws, [ndtr(-reach), ndtr(reach)])
        return float(low), float(high)


def _bootstrap(patients, n_boot=2000, seed=0):
    return (patients if isinstance(patients, PatientBootstrap)
            else PatientBootstrap(patients, n_boot, seed))


class _Sums(NamedTuple):
    """Sums over segments: their number, error, error², |error|, y and y², y = truth - mean;
    `lost` is 1 where the degree of freedom of the mean counts, else 0."""
    n: np.ndarray
    e: np.ndarray
    ee: np.ndarray
    ae: np.ndarray
    y: np.ndarray
    yy: np.ndarray
    lost: int


def _estimates(bootstrap, truth, prediction, by_patient):
    """The scores that have `of_sums` as estimates; by_patient: each patient weighs the same."""
    error, one = prediction - truth, np.ones_like(truth)
    weight = 1 / bootstrap.counts if by_patient else 1

    def sums(column):
        return weight * bootstrap.per_patient(column)

    y = truth - sums(truth).sum() / sums(one).sum()     # squares of pressures would lose digits
    columns = [sums(x) for x in (one, error, error ** 2, np.abs(error), y, y ** 2)]
    lost = 0 if by_patient else 1
    return {name: bootstrap.estimate(lambda *s, f=score.of_sums: f(_Sums(*s, lost)), columns,
                                     score.scale, by_patient=True)
            for name, score in SCORES.items() if score.of_sums}


def confidence_intervals(patients, truth: np.ndarray, prediction: np.ndarray, n_boot: int = 2000,
                         seed: int = 0) -> Dict[str, tuple]:
    """95 % intervals of the SCORES, from a bootstrap over patients: {score: (low, high)}.

    patients: [N], or a `PatientBootstrap` of them; truth, prediction: [N]. See FEW_PATIENTS.
    """
    truth, prediction = _finite(truth=truth, prediction=prediction)
    bootstrap = _bootstrap(patients, n_boot, seed)
    found = {name: (one["low"], one["high"])
             for name, one in _estimates(bootstrap, truth, prediction, by_patient=False).items()}
    for name, score in SCORES.items():
        if name not in found:
            draws = (score.draws(bootstrap, truth, prediction) if score.draws
                     else bootstrap.of_each_draw(score.function, truth, prediction))
            found[name] = bootstrap.interval(score.function(truth, prediction), draws, score.scale)
    return {name: found[name] for name in SCORES}


def rmse(patients, error: np.ndarray) -> Dict[str, float]:
    """RMSE of errors [N] with its 95 % interval."""
    return _bootstrap(patients).estimate(lambda n, ee: np.sqrt(ee / n),
                                         (np.ones_like(error), error ** 2), "log")


def skill(truth, prediction, baseline_prediction, patients, n_boot: int = 2000, seed: int = 0,
          by_patient: bool = False) -> Dict[str, float]:
    """1 - MSE / MSE(baseline), with its 95 % interval: {'value', 'low', 'high'}.

    0: no better than the baseline; 1: perfect. All [N]. The bootstrap over patients is paired: each
    draw scores both on the same patients. by_patient: each patient weighs the same, whatever the
    number of its segments. NaN where the baseline is free of error.
    """
    truth, prediction, baseline_prediction = _finite(
        truth=truth, prediction=prediction, baseline_prediction=baseline_prediction)
    bootstrap = _bootstrap(patients, n_boot, seed)
    columns = [bootstrap.per_patient((one - truth) ** 2) / (bootstrap.counts if by_patient else 1)
               for one in (prediction, baseline_prediction)]
    return bootstrap.estimate(
        lambda ours, theirs: np.where(theirs > 0, 1 - ours / theirs, np.nan),
        columns, "unexplained", by_patient=True)


# ---------------------------------------------------------------- patients, changes, low TPP

def patient_scores(patients, truth: np.ndarray, prediction: np.ndarray) -> Dict[str, dict]:
    """The SCORES with each patient weighing the same, whatever the number of its segments.

    {score: {'value', 'low', 'high'}}, as in `scores` with weight 1 / (segments of the patient); sd
    without the n - 1; mead: the mean of the patients' medians.
    """
    truth, prediction = _finite(truth=truth, prediction=prediction)
    bootstrap = _bootstrap(patients)
    found = _estimates(bootstrap, truth, prediction, by_patient=True)
    rows = bootstrap.rows_by_patient()
    for name, score in SCORES.items():
        if name not in found:
            own = [score.function(truth[i], prediction[i]) for i in rows]
            found[name] = bootstrap.ratio(own, scale=score.scale, by_patient=True)
    return found


def within_patient_correlation(patients, truth, prediction) -> Dict[str, float]:
    """Correlation after subtracting each patient's mean, with its interval.

    The repeated-measures correlation (Bland & Altman 1995, doi 10.1136/bmj.310.6977.446): does the
    prediction follow a patient's ups and downs? NaN where no patient has two segments.
    """
    truth, prediction = _finite(truth=truth, prediction=prediction)
    bootstrap = _bootstrap(patients)
    x, y = (values - (bootstrap.per_patient(values) / bootstrap.counts)[bootstrap.owner]
            for values in (truth, prediction))

    def correlation(sum_xy, sum_xx, sum_yy):
        return np.where((sum_xx > MIN_VARIANCE) & (sum_yy > MIN_VARIANCE),
                        sum_xy / np.sqrt(sum_xx * sum_yy), np.nan)

    return bootstrap.estimate(correlation, (x * y, x * x, y * y), "correlation")


def changes(series, *columns):
    """(rows whose previous row is of the same series, the columns' changes at these rows).

    series: [N], such as the number of the encounter, segments in the order of time.
    """
    series = np.asarray(series)
    later = np.flatnonzero(series[1:] == series[:-1]) + 1
    return (later, *[np.asarray(column)[later] - np.asarray(column)[later - 1]
                     for column in columns])


def trend_concordance(patients, truth, prediction, series=None, zone: float = TREND_ZONE) -> dict:
    """Four-quadrant concordance: the share of changes whose direction is predicted correctly.

    Changes from one segment to the next of a series (by default the patient), without those in the
    exclusion zone, where both are below `zone` mmHg (Critchley 2010, doi
    10.1213/ANE.0b013e3181f08a5b, where above 92 % is called good for cardiac output). With 'n' and
    'n_changes', the number counted and that of all.
    """
    truth, prediction = _finite(truth=truth, prediction=prediction)
    patients = np.asarray(patients)
    later, true_change, change = changes(patients if series is None else series, truth, prediction)
    counted = np.maximum(np.abs(true_change), np.abs(change)) >= zone
    found = dict.fromkeys(("value", "low", "high"), float("nan"))
    if counted.any():
        right = true_change[counted] * change[counted] > 0
        found = PatientBootstrap(patients[later[counted]]).ratio(right)
    return dict(found, n=int(counted.sum()), n_changes=len(later), zone=zone)


def detection(patients, truth, prediction, threshold: float = LOW_TPP) -> dict:
    """How well prediction < threshold detects truth < threshold: shares and the ROC area.

    {'prevalence', 'sensitivity', 'specificity', 'ppv', 'npv', 'auc': {'value', 'low', 'high'}};
    NaN where undefined. The ROC curve runs over the cut-off of the prediction.
    """
    truth, prediction = _finite(truth=truth, prediction=prediction)
    bootstrap = _bootstrap(patients)
    event, alarm = truth < threshold, prediction < threshold
    found = {"threshold": threshold, "n_low": int(event.sum())}
    for name, part, whole in (("prevalence", event, np.ones_like(event)),
                              ("sensitivity", event & alarm, event),
                              ("specificity", ~event & ~alarm, ~event),
                              ("ppv", event & alarm, alarm), ("npv", ~event & ~alarm, ~alarm)):
        found[name] = bootstrap.ratio(part, whole)
    area = roc_area(event, -prediction)
    low, high = bootstrap.interval(area, bootstrap.areas_under_roc(event, -prediction), "share")
    return dict(found, auc={"value": area, "low": low, "high": high})


def roc_area(event: np.ndarray, score: np.ndarray) -> float:
    """Area under the ROC curve; NaN without both classes."""
    return float(roc_auc_score(event, score)) if 0 < np.sum(event) < len(event) else float("nan")


def reliability(patients, event, probability, bins: int = 10) -> dict:
    """Do events occur as often as predicted? Brier score, mean predicted, observed, and by bins.

    probability: [N], the predicted one of event [N] (bool). The bins hold equally many segments.
    """
    event, probability = _finite(event=event, probability=probability)
    bootstrap = _bootstrap(patients)
    edges = np.unique(np.quantile(probability, np.linspace(0, 1, bins + 1)))
    bin_of = np.searchsorted(edges[1:-1], probability)
    table = []
    for number in np.unique(bin_of):
        inside = bin_of == number
        table.append(dict(bootstrap.ratio(event * inside, inside), n=int(inside.sum()),
                          predicted=float(probability[inside].mean())))
    return {"brier": bootstrap.ratio((probability - event) ** 2, scale="log"),
            "observed": float(event.mean()), "predicted": float(probability.mean()), "bins": table}


# ---------------------------------------------------------------- standards for blood pressure

AAMI_MEAN, AAMI_SD = 5.0, 8.0                   # ISO 81060-2, criterion 1
AAMI_ERROR, AAMI_SHARE = 10.0, 0.85             # ISO 81060-2, tolerable error and its probability
BHS_LIMITS = (5, 10, 15)                        # mmHg
BHS_GRADES = {"A": (60, 85, 95), "B": (50, 75, 90), "C": (40, 65, 85)}     # cumulative %
IEEE_1708_GRADES = {"A": 5, "B": 6, "C": 7}     # mean absolute difference up to, mmHg; below 7


def aami_limit(mean_error: float) -> float:
    """Criterion 2: the largest SD of patients' mean errors at which 85 % lie within 10 mmHg.

    6.95 mmHg at a mean error of 0, 4.8 at 5 (the standard prints 4.79); 0 beyond 10.
    """
    mean_error = abs(mean_error)
    if mean_error >= AAMI_ERROR:
        return 0.0
    return float(brentq(lambda sd: ndtr((AAMI_ERROR - mean_error) / sd)
                        - ndtr((-AAMI_ERROR - mean_error) / sd) - AAMI_SHARE, 1e-6, 20))


def standards(patients, truth, prediction) -> Dict[str, dict]:
    """Criteria made for blood pressure (there are none for TPP): numbers, pass or grade."""
    truth, prediction = _finite(truth=truth, prediction=prediction)
    bootstrap = _bootstrap(patients)
    error = prediction - truth
    means = bootstrap.per_patient(error) / bootstrap.counts
    sd, sd_of_means = (float(np.std(x, ddof=1)) if len(x) > 1 else float("nan")
                       for x in (error, means))
    mean, mad, limit = float(error.mean()), float(np.abs(error).mean()), aami_limit(means.mean())
    within = [float(np.mean(np.abs(error) <= bound)) for bound in BHS_LIMITS]
    bhs = next((grade for grade, least in BHS_GRADES.items()
                if all(100 * share >= bound for share, bound in zip(within, least))), "D")
    ieee = next((grade for grade, most in IEEE_1708_GRADES.items() if mad <= most and mad < 7), "D")
    return {
        "aami_1": {"mean": mean, "sd": sd, "passed": abs(mean) <= AAMI_MEAN and sd <= AAMI_SD},
        "aami_2": {"mean": float(means.mean()), "sd": sd_of_means, "limit": limit,
                   "passed": sd_of_means <= limit},
        "aami_esh_iso": {"within_10": within[1], "passed": within[1] >= AAMI_SHARE},
        "bhs": dict({f"within_{x}": share for x, share in zip(BHS_LIMITS, within)}, grade=bhs),
        "ieee_1708": {"mad": mad, "grade": ieee}}


def bland_altman(patients, truth, prediction) -> dict:
    """Bias and 95 % limits of agreement for repeated measures, from variance components.

    error = bias + the patient's own + the segment's own; the components by one-way analysis of
    variance (Bland & Altman 2007, doi 10.1080/10543400701329422), limits = bias ± 1.96 sqrt(their
    sum). {'bias', 'lower', 'upper': {'value', 'low', 'high'}, 'sd_between', 'sd_within': numbers}.
    """
    truth, prediction = _finite(truth=truth, prediction=prediction)
    bootstrap = _bootstrap(patients)
    error = prediction - truth
    n, total = bootstrap.counts.astype(float), bootstrap.per_patient(error)
    columns = (np.ones_like(n), n, n ** 2, total, bootstrap.per_patient(error ** 2), total ** 2 / n)

    def components(k, n, nn, e, ee, ee_between):
        mean_n = (n - nn / n) / (k - 1)
        within = np.where(n > k, np.maximum(ee - ee_between, 0) / np.maximum(n - k, 1), 0)
        between = (ee_between - e ** 2 / n) / (k - 1)
        return e / n, np.maximum((between - within) / mean_n, 0), within

    def limit(*sums, sign):
        bias, between, within = components(*sums)
        return bias + sign * 1.959963984540054 * np.sqrt(between + within)

    found = {name: bootstrap.estimate(partial(limit, sign=sign), columns, by_patient=True)
             for name, sign in (("bias", 0), ("lower", -1), ("upper", 1))}
    with np.errstate(divide="ignore", invalid="ignore"):
        _, between, within = components(*[column.sum() for column in columns])
    return dict(found, sd_between=float(np.sqrt(between)), sd_within=float(np.sqrt(within)))


def summarise(runs) -> Dict[str, dict]:
    """Mean and SD (ddof 1) of each number in several runs' scores: {name: {'mean', 'sd', 'runs'}}.

    runs: two or more dicts, as in a run's metrics.json; inner names are joined by dots.
    """
    def flat(obj, name=""):
        for key, value in obj.items():
            if isinstance(value, dict):
                yield from flat(value, f"{name}{key}.")
            elif isinstance(value, (int, float)) and not isinstance(value, bool):
                yield name + key, float(value)

    runs = [dict(flat(run)) for run in runs]
    values = {name: [run[name] for run in runs] for name in runs[0]
              if all(name in run for run in runs)}
    return {name: {"mean": float(np.mean(one)), "sd": float(np.std(one, ddof=1)), "runs": one}
            for name, one in values.items()}


# ---------------------------------------------------------------- prediction intervals

LEVELS = (0.5, 0.8, 0.9, 0.95)
QUANTILES = 201                                 # of the calibration errors, for probabilities
NOVELTY_LEVEL = 0.95                            # share of inputs that count as usual


def patient_quantile(values: np.ndarray, patients, level: float) -> float:
    """The `level` quantile of values [N], patients weighing the same, one unknown patient allowed.

    Each of K patients weighs 1 / (K + 1), shared among its segments; the rest belongs to the next
    patient, whose values may be anything. So a segment of a new patient lies at or below it with
    probability `level` or more (hierarchical conformal prediction: Lee, Barber & Willett 2023,
    arXiv 2306.06342). Infinite where K is too small: K / (K + 1) < level.
    """
    values, = _finite(values=values)
    bootstrap, order = _bootstrap(patients), np.argsort(values, kind="stable")
    reached = np.cumsum(1 / bootstrap.counts[bootstrap.owner[order]]) / (bootstrap.n_patients + 1)
    place = np.searchsorted(reached, level - 1e-9)
    return float(values[order[place]]) if place < len(values) else float("inf")


def fit_calibration(errors: np.ndarray, patients, spread: Optional[np.ndarray] = None) -> dict:
    """Prediction intervals from the errors of patients not trained on (conformal): a plain dict.

    errors: [N] mmHg, of the tune patients. spread: [N] mmHg, the SD that the network predicts, if
    it does; it is then the unit of the intervals. Below 9 patients there is no 90 % interval, below
    19 no 95 % (`patient_quantile`): its half width is None. The dict holds only numbers and lists,
    for the checkpoint.
    """
    errors, = _finite(errors=errors)
    scaled = errors / (1.0 if spread is None else np.asarray(spread, np.float64))
    bootstrap, order = _bootstrap(patients), np.argsort(scaled)
    weight = 1 / bootstrap.counts[bootstrap.owner[order]]
    reached = (np.cumsum(weight) - weight / 2) / weight.sum()
    shares = (np.arange(QUANTILES) + 0.5) / QUANTILES
    half_widths = [patient_quantile(np.abs(scaled), bootstrap, level) for level in LEVELS]
    return {"levels": list(LEVELS), "n_patients": bootstrap.n_patients, "n_segments": len(errors),
            "half_widths": [half if np.isfinite(half) else None for half in half_widths],
            "spread": spread is not None,
            "error_quantiles": np.interp(shares, reached, scaled[order]).tolist()}


def interval(prediction: np.ndarray, calibration: dict, level: float = 0.9,
             spread: Optional[np.ndarray] = None):
    """(low, high), mmHg, [N] each: covers the truth of a new patient's segment with `level`.

    Raises ValueError where the calibration had too few patients for that level.
    """
    if level not in calibration["levels"]:
        raise ValueError(f"level {level}: expected one of {calibration['levels']}")
    half = calibration["half_widths"][calibration["levels"].index(level)]
    if half is None:
        raise ValueError(f"no {level:.0%} interval: {calibration['n_patients']} tune patients are "
                         f"too few (at least {np.ceil(level / (1 - level) - 1e-9):.0f} needed)")
    prediction = np.asarray(prediction, np.float64)
    half = half * _spread(calibration, spread)
    return prediction - half, prediction + half


def _spread(calibration, spread):
    if calibration["spread"] != (spread is not None):
        raise ValueError("the calibration was made " + ("with" if calibration["spread"] else
                                                        "without") + " the network's own spread")
    return 1.0 if spread is None else np.asarray(spread, np.float64)


def low_probability(prediction: np.ndarray, calibration: dict, threshold: float = LOW_TPP,
                    spread: Optional[np.ndarray] = None) -> np.ndarray:
    """Probability, [N], that the true value lies below threshold, from the calibration errors."""
    quantiles = np.asarray(calibration["error_quantiles"])
    shares = (np.arange(len(quantiles)) + 0.5) / len(quantiles)
    needed = (np.asarray(prediction, np.float64) - threshold) / _spread(calibration, spread)
    return 1 - np.interp(needed, quantiles, shares)


def coverage(patients, truth, low, high) -> dict:
    """Share of the truths [N] inside [low, high]: of all, and with patients weighing the same.

    {'segments', 'patients': {'value', 'low', 'high'}, 'lowest_tenth': the 10th percentile over
    patients, 'mean_width': mmHg}.
    """
    truth, low, high = _finite(truth=truth, low=low, high=high)
    bootstrap = _bootstrap(patients)
    inside = (low <= truth) & (truth <= high)
    shares = bootstrap.per_patient(inside) / bootstrap.counts
    return {"segments": bootstrap.ratio(inside),
            "patients": bootstrap.ratio(shares, by_patient=True),
            "lowest_tenth": float(np.quantile(shares, 0.1)),
            "mean_width": float(np.mean(high - low))}


def fit_novelty(train: np.ndarray, tune: np.ndarray, tune_patients) -> dict:
    """Describes the training inputs so that unlike ones can be flagged: a dict for the checkpoint.

    train, tune: [N, features], the input of the network's last layers (pooled waveform features and
    vitals). The distance is Mahalanobis', covariance shrunk (Ledoit & Wolf); segments above the
    tune patients' 95 % `patient_quantile` are flagged, so one in twenty is by design. No threshold
    (None) below 19 tune patients.
    """
    fitted = LedoitWolf().fit(np.asarray(train, np.float64))
    found = {"mean": fitted.location_.tolist(), "precision": fitted.precision_.tolist()}
    return novelty_threshold(found, tune, tune_patients)


def novelty_threshold(fitted: dict, tune: np.ndarray, tune_patients) -> dict:
    """`fitted` (from `fit_novelty`) with the threshold of other tune patients."""
    threshold = patient_quantile(novelty(tune, fitted), tune_patients, NOVELTY_LEVEL)
    return dict(fitted, level=NOVELTY_LEVEL,
                threshold=threshold if np.isfinite(threshold) else None)


def novelty(features: np.ndarray, fitted: dict) -> np.ndarray:
    """Distance [N] of features [N, features] from the training ones (`fit_novelty`)."""
    away = np.asarray(features, np.float64) - np.asarray(fitted["mean"])
    squared = np.einsum("ij,ij->i", away @ np.asarray(fitted["precision"]), away)
    return np.sqrt(np.maximum(squared, 0))
