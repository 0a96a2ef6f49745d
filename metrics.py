"""Scores, confidence intervals over patients, and prediction intervals.

    from metrics import scores, confidence_intervals, skill     # how good is a model?
    from metrics import fit_calibration, interval               # how sure is one prediction?

Pressures are in mmHg; error = prediction - truth. The independent unit is the patient, not the 60-s
segment, in confidence and in prediction intervals. `patients` are identifiers [N] or a
`PatientBootstrap` of them, which keeps its draws for the next score. An *estimate* is a score with
its 95 % interval, {'value', 'low', 'high'}. The module can be copied out alone.
"""
from functools import cached_property
from typing import Callable, Dict, NamedTuple, Optional

import numpy as np
import sklearn.metrics as sk
from scipy.optimize import brentq
from scipy.sparse import coo_matrix
from scipy.special import expit, logit, ndtr, stdtrit
from sklearn.utils import check_consistent_length

FEW_PATIENTS = 30       # below it intervals are too narrow (benchmarks/evaluation.py coverage)
LEAST_PATIENTS = 5      # no confidence interval below it
MIN_VARIANCE = 1e-9     # mmHg²; float32 truths that vary less are constant, and R² is undefined
LOW_TPP = 34.0          # mmHg, the published system's cut-off for risk
MAX_TPP = 500.0         # mmHg; a larger answer is not a perfusion pressure
TREND_ZONE = 5.0        # mmHg, smaller changes do not count: the label's own SD between minutes


# ---------------------------------------------------------------- scores

class Score(NamedTuple):
    """An entry of SCORES. scale: of SCALES, on which its bootstrap draws are about symmetric."""
    function: Callable                          # (truth [N], prediction [N]) -> float
    title: str                                  # with its unit
    scale: str
    of_sums: Optional[Callable] = None          # the same from sums over segments: fast
    draws: Optional[Callable] = None            # (bootstrap, truth, prediction) -> [n_boot]: fast


def _r2(truth, prediction):
    return sk.r2_score(truth, prediction) if np.var(truth) > MIN_VARIANCE else float("nan")


def _r2_of_sums(n, e, ee, ae, y, yy):
    spread = yy - y ** 2 / n
    return np.where(spread > MIN_VARIANCE * n, 1 - ee / spread, np.nan)


# Add a score here: console, JSON and page follow. Without of_sums or draws, each draw of the
# bootstrap is scored from its segments, which is slow. of_sums takes the sums n, e, ee, ae, y, yy
# of 1, error, error², |error|, y and y², y = truth - mean.
SCORES = {
    "rmse": Score(lambda truth, prediction: sk.mean_squared_error(truth, prediction) ** 0.5,
                  "RMSE, mmHg", "log", lambda n, e, ee, *_: np.sqrt(ee / n)),
    "mae": Score(sk.mean_absolute_error, "MAE, mmHg", "log", lambda n, e, ee, ae, *_: ae / n),
    "mead": Score(sk.median_absolute_error, "MeAD, mmHg", "log",
                  draws=lambda bootstrap, truth, prediction: bootstrap.medians(
                      np.abs(prediction - truth))),
    "r2": Score(_r2, "R²", "unexplained", _r2_of_sums),
    "bias": Score(lambda truth, prediction: np.mean(prediction - truth),
                  "bias, mmHg", "plain", lambda n, e, *_: e / n),
    "sd": Score(lambda truth, prediction: np.std(prediction - truth, ddof=1)
                if len(truth) > 1 else float("nan"), "SD, mmHg", "log",
                lambda n, e, ee, *_: np.sqrt(np.maximum(ee - e ** 2 / n, 0) / (n - 1))),
}
BY_PATIENT = ("rmse", "mae", "r2", "bias")      # also with each patient weighing the same


def scores(truth: np.ndarray, prediction: np.ndarray) -> Dict[str, float]:
    """SCORES and `n`, the number of segments; arrays [N] in mmHg. NaN where undefined."""
    truth, prediction = _finite(truth=truth, prediction=prediction)
    return {"n": len(truth),
            **{name: float(score.function(truth, prediction)) for name, score in SCORES.items()}}


def _finite(**arrays):
    """The arrays as float64 [N]; raises ValueError with the name of one that is not finite."""
    check_consistent_length(*arrays.values())
    for name, values in arrays.items():
        arrays[name] = np.asarray(values, np.float64)
        if not np.isfinite(arrays[name]).all():
            raise ValueError(f"{name}: not all of the {len(values)} values are finite")
    return arrays.values()


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
    """Draws of patients with replacement; the same patients, n_boot and seed: the same draws.

    It works on sums per patient, so that a draw needs no pass over the segments: a million segments
    of 2,000 patients take seconds. patients: [N], any sortable identifiers.
    """

    def __init__(self, patients, n_boot: int = 2000, seed: int = 0):
        # owner: [N], the number of each segment's patient; counts: segments of each patient
        names, self.owner, self.counts = np.unique(
            np.asarray(patients), return_inverse=True, return_counts=True)
        self.n_patients, self.n_boot, self.seed = len(names), n_boot, seed

    @cached_property
    def drawn(self) -> np.ndarray:
        """How often each patient is drawn: [n_boot, n_patients]."""
        rng = np.random.default_rng(self.seed)
        share = np.full(self.n_patients, 1 / self.n_patients)
        return np.stack([rng.multinomial(self.n_patients, share).astype(np.uint16)
                         for _ in range(self.n_boot)])

    def weights(self, width: int = 0):
        """Yield `drawn` as float64, in blocks of which [draws, width] takes 80 MB at most."""
        block = max(1, 10_000_000 // max(self.n_patients, width))
        for start in range(0, self.n_boot, block):
            yield self.drawn[start:start + block].astype(np.float64)

    def per_patient(self, column: np.ndarray) -> np.ndarray:
        """[n_patients]: the sums of a column [N] over each patient's segments."""
        return np.bincount(self.owner, column, self.n_patients)

    def estimate(self, function: Callable, columns, scale: str = "plain",
                 by_patient: bool = False) -> Dict[str, float]:
        """A function of the sums of columns, [N] each or with by_patient [n_patients], as an
        estimate. It is called with numbers, and with the sums in the draws, [n_boot] each."""
        if not by_patient:
            columns = [self.per_patient(column) for column in columns]
        columns = np.stack(columns, axis=1)
        with np.errstate(divide="ignore", invalid="ignore"):
            value = float(function(*[column.sum() for column in columns.T]))
            draws = function(*np.concatenate([weights @ columns for weights in self.weights()]).T)
        return self.with_interval(value, draws, scale)

    def share(self, part, whole=None, by_patient: bool = False) -> Dict[str, float]:
        """The sum of a column over that of another (default: their number), as an estimate."""
        whole = np.ones(len(part)) if whole is None else whole
        return self.estimate(np.divide, (part, whole), "share", by_patient)

    def of_each_draw(self, function: Callable, *columns: np.ndarray) -> np.ndarray:
        """[n_boot]: a function of the drawn segments of the columns [N]; slow, for any function."""
        rows = (np.repeat(np.arange(len(self.owner)), draw[self.owner]) for draw in self.drawn)
        return np.array([function(*(column[drawn] for column in columns)) for drawn in rows])

    def counts_by_level(self, values: np.ndarray, *masks: np.ndarray):
        """(levels, [n_patients, levels] segments of each mask [N] at each level, for each mask).

        The levels are the distinct values [N]; beyond 5 million / n_patients neighbours share one.
        """
        levels, level = np.unique(values, return_inverse=True)
        most = max(1, 5_000_000 // self.n_patients)
        if len(levels) > most:
            shared = np.arange(len(levels)) * most // len(levels)
            levels, level = levels[np.searchsorted(shared, np.arange(most))], shared[level]
        shape = (self.n_patients, len(levels))
        return (levels, *[coo_matrix((mask.astype(float), (self.owner, level)), shape).toarray()
                          for mask in masks])

    def medians(self, values: np.ndarray) -> np.ndarray:
        """The median of `values` [N] over the segments of each draw: [n_boot]."""
        # Only levels near the median matter: within ten standard errors and more.
        near = np.clip(0.5 + np.array([-10, 10]) / np.sqrt(self.n_patients), 0, 1)
        levels, counts = self.counts_by_level(np.clip(values, *np.quantile(values, near)),
                                              np.full(len(values), True))
        found = []
        for weights in self.weights(len(levels)):
            upto = np.cumsum(weights @ counts, axis=1)
            n = upto[:, -1:]
            found.append((levels[np.sum(upto <= (n - 1) // 2, axis=1)]
                          + levels[np.sum(upto <= n // 2, axis=1)]) / 2)
        return np.concatenate(found)

    def areas_under_roc(self, event: np.ndarray, score: np.ndarray) -> np.ndarray:
        """The area under the ROC curve of a score [N] for an event [N] (bool) in each draw."""
        _, hits, others = self.counts_by_level(score, event, ~event)
        below = np.cumsum(others, axis=1) - others / 2
        areas = []
        for weights in self.weights(len(below.T)):
            of_hits, of_others = weights @ hits, weights @ others
            with np.errstate(invalid="ignore"):
                areas.append((of_hits * (weights @ below)).sum(axis=1)
                             / (of_hits.sum(axis=1) * of_others.sum(axis=1)))
        return np.concatenate(areas)

    def with_interval(self, value: float, draws: np.ndarray, scale: str) -> Dict[str, float]:
        """A statistic as an estimate, from its value and its values in the draws [n_boot].

        On its scale: value ± Student's t x SD of the draws x sqrt(n / (n - 1)). Where the scale
        cannot hold a draw (a share of 0 or 1): percentiles of the draws at the levels that
        correspond to t (Hesterberg 2015, doi 10.1080/00031305.2015.1089789).
        """
        draws = np.asarray(draws)[~np.isnan(draws)]
        if self.n_patients < LEAST_PATIENTS or len(draws) < 0.9 * self.n_boot or np.isnan(value):
            return {"value": value, "low": float("nan"), "high": float("nan")}
        to, back = SCALES[scale]
        reach = (stdtrit(self.n_patients - 1, 0.975)
                 * np.sqrt(self.n_patients / (self.n_patients - 1)))
        with np.errstate(divide="ignore", invalid="ignore"):
            there = to(np.append(value, draws))
        if np.isfinite(there).all():
            width = reach * np.std(there[1:])
            low, high = sorted((back(there[0] - width), back(there[0] + width)))
        else:
            low, high = np.quantile(draws, [ndtr(-reach), ndtr(reach)])
        return {"value": value, "low": float(low), "high": float(high)}


def bootstrap_of(patients) -> PatientBootstrap:
    return patients if isinstance(patients, PatientBootstrap) else PatientBootstrap(patients)


def confidence_intervals(patients, truth, prediction, by_patient: bool = False) -> Dict[str, dict]:
    """The SCORES as estimates, {score: {'value', 'low', 'high'}}. truth, prediction: [N].

    by_patient: those of BY_PATIENT, each patient weighing the same however many its segments.
    """
    truth, prediction = _finite(truth=truth, prediction=prediction)
    bootstrap, error = bootstrap_of(patients), prediction - truth
    weight = 1 / bootstrap.counts if by_patient else np.ones(bootstrap.n_patients)
    y = truth - np.sum(weight * bootstrap.per_patient(truth)) / np.sum(weight * bootstrap.counts)
    columns = [weight * bootstrap.per_patient(column)
               for column in (np.ones_like(y), error, error ** 2, np.abs(error), y, y ** 2)]
    found = {}
    for name in BY_PATIENT if by_patient else SCORES:
        score = SCORES[name]
        if score.of_sums:
            found[name] = bootstrap.estimate(score.of_sums, columns, score.scale, by_patient=True)
        else:
            draws = (score.draws(bootstrap, truth, prediction) if score.draws
                     else bootstrap.of_each_draw(score.function, truth, prediction))
            found[name] = bootstrap.with_interval(float(score.function(truth, prediction)), draws,
                                                  score.scale)
    return found


def rmse(patients, error: np.ndarray) -> Dict[str, float]:
    """RMSE of errors [N], as an estimate."""
    return bootstrap_of(patients).estimate(lambda n, ee: np.sqrt(ee / n),
                                           (np.ones_like(error), error ** 2), "log")


def skill(truth, prediction, baseline_prediction, patients, by_patient: bool = False
          ) -> Dict[str, float]:
    """1 - MSE / MSE(baseline), as an estimate; all [N]. 0: no better; 1: perfect.

    The bootstrap is paired: each draw scores both on the same patients. by_patient: each patient
    weighs the same. NaN where the baseline is free of error.
    """
    truth, prediction, baseline_prediction = _finite(
        truth=truth, prediction=prediction, baseline_prediction=baseline_prediction)
    bootstrap = bootstrap_of(patients)
    columns = [bootstrap.per_patient((one - truth) ** 2) / (bootstrap.counts if by_patient else 1)
               for one in (prediction, baseline_prediction)]
    return bootstrap.estimate(
        lambda ours, theirs: np.where(theirs > 0, 1 - ours / theirs, np.nan),
        columns, "unexplained", by_patient=True)


# ---------------------------------------------------------------- patients, changes, low TPP

def within_patient_correlation(patients, truth, prediction) -> Dict[str, float]:
    """Correlation after subtracting each patient's mean (doi 10.1136/bmj.310.6977.446)."""
    bootstrap = bootstrap_of(patients)
    x, y = (values - (bootstrap.per_patient(values) / bootstrap.counts)[bootstrap.owner]
            for values in (truth, prediction))

    def correlation(sum_xy, sum_xx, sum_yy):
        return np.where((sum_xx > MIN_VARIANCE) & (sum_yy > MIN_VARIANCE),
                        sum_xy / np.sqrt(sum_xx * sum_yy), np.nan)

    return bootstrap.estimate(correlation, (x * y, x * x, y * y), "correlation")


def changes(series, *columns):
    """(rows whose previous row is of the same series [N], the changes of columns [N] there)."""
    later = np.flatnonzero(series[1:] == series[:-1]) + 1
    return (later, *[column[later] - column[later - 1] for column in columns])


def trend_concordance(patients, truth, prediction, series) -> dict:
    """Four-quadrant concordance: the share of changes whose direction is predicted correctly.

    Of the 'n_changes' from one segment of a series to the next, the 'n' that exceed TREND_ZONE in
    truth or prediction count (Critchley 2010, doi 10.1213/ANE.0b013e3181f08a5b).
    """
    later, true_change, change = changes(series, truth, prediction)
    counted = np.maximum(np.abs(true_change), np.abs(change)) >= TREND_ZONE
    right = (true_change * change > 0)[counted]
    found = (PatientBootstrap(patients[later[counted]]).share(right) if counted.any()
             else dict.fromkeys(("value", "low", "high"), float("nan")))
    return dict(found, n=int(counted.sum()), n_changes=len(later), zone=TREND_ZONE)


def detection(patients, truth, prediction) -> dict:
    """How well prediction < LOW_TPP detects truth < LOW_TPP: estimates, NaN where undefined."""
    bootstrap = bootstrap_of(patients)
    event, alarm = truth < LOW_TPP, prediction < LOW_TPP
    shares = {"prevalence": (event, np.ones_like(event)), "sensitivity": (event & alarm, event),
              "specificity": (~event & ~alarm, ~event), "ppv": (event & alarm, alarm),
              "npv": (~event & ~alarm, ~alarm)}
    area = float(sk.roc_auc_score(event, -prediction)) if 0 < event.sum() < len(event) else np.nan
    areas = bootstrap.areas_under_roc(event, -prediction)
    return {"threshold": LOW_TPP, "n_low": int(event.sum()),
            **{name: bootstrap.share(*pair) for name, pair in shares.items()},
            "auc": bootstrap.with_interval(area, areas, "share")}


# Standards for blood pressure
STANDARD_PATIENTS = 85      # at least, in ISO 81060-2, BHS 1993 and IEEE 1708a-2019
BHS_LIMITS = (5, 10, 15)                        # mmHg
BHS_GRADES = {"A": (60, 85, 95), "B": (50, 75, 90), "C": (40, 65, 85)}     # cumulative %
IEEE_1708_GRADES = {"A": 5, "B": 6, "C": 7}     # mean absolute difference up to, mmHg; below 7


def aami_limit(mean_error: float) -> float:
    """ISO 81060-2, criterion 2: the SD of patients' means at which 85 % lie within 10 mmHg."""
    mean_error = abs(mean_error)
    if mean_error >= 10:
        return 0.0
    return float(brentq(lambda sd: ndtr((10 - mean_error) / sd) - ndtr((-10 - mean_error) / sd)
                        - 0.85, 1e-6, 20))


def standards(patients, truth, prediction) -> Dict[str, dict]:
    """Criteria made for blood pressure (there are none for TPP): numbers, and 'passed' or 'grade',
    which are None below STANDARD_PATIENTS."""
    bootstrap, error = bootstrap_of(patients), prediction - truth
    means = bootstrap.per_patient(error) / bootstrap.counts
    sd, sd_of_means = (float(np.std(x, ddof=1)) if len(x) > 1 else float("nan")
                       for x in (error, means))
    mean, mad, limit = float(error.mean()), float(np.abs(error).mean()), aami_limit(means.mean())
    within = [float(np.mean(np.abs(error) <= bound)) for bound in BHS_LIMITS]
    bhs = next((grade for grade, least in BHS_GRADES.items()
                if all(100 * share >= bound for share, bound in zip(within, least))), "D")
    ieee = next((grade for grade, most in IEEE_1708_GRADES.items() if mad <= most and mad < 7), "D")
    enough = bootstrap.n_patients >= STANDARD_PATIENTS or None
    return {
        "aami_1": {"mean": mean, "sd": sd, "passed": enough and abs(mean) <= 5 and sd <= 8},
        "aami_2": {"mean": float(means.mean()), "sd": sd_of_means, "limit": limit,
                   "passed": enough and sd_of_means <= limit},
        "aami_esh_iso": {"within_10": within[1], "passed": enough and within[1] >= 0.85},
        "bhs": dict({f"within_{x}": share for x, share in zip(BHS_LIMITS, within)},
                    grade=enough and bhs),
        "ieee_1708": {"mad": mad, "grade": enough and ieee}}


def bland_altman(patients, truth, prediction) -> dict:
    """Bias and 95 % limits of agreement, as estimates, and SD between and within patients.

    By one-way analysis of variance (Bland & Altman 2007, doi 10.1080/10543400701329422).
    """
    bootstrap, error = bootstrap_of(patients), prediction - truth
    n, total = bootstrap.counts.astype(float), bootstrap.per_patient(error)
    columns = (np.ones_like(n), n, n ** 2, total, bootstrap.per_patient(error ** 2), total ** 2 / n)

    def components(k, n, nn, e, ee, ee_between):
        within = np.where(n > k, np.maximum(ee - ee_between, 0) / np.maximum(n - k, 1), 0)
        between = (ee_between - e ** 2 / n) / (k - 1)
        between = np.maximum((between - within) / ((n - nn / n) / (k - 1)), 0)
        reach = 1.959963984540054 * np.sqrt(between + within)
        return {"bias": e / n, "lower": e / n - reach, "upper": e / n + reach,
                "sd_between": np.sqrt(between), "sd_within": np.sqrt(within)}

    found = {name: bootstrap.estimate(lambda *sums, name=name: components(*sums)[name], columns,
                                      by_patient=True)
             for name in ("bias", "lower", "upper", "sd_between", "sd_within")}
    return dict(found, **{name: found[name]["value"] for name in ("sd_between", "sd_within")})


# ---------------------------------------------------------------- prediction intervals

LEVELS = (0.5, 0.8, 0.9, 0.95)


def patient_quantile(values: np.ndarray, patients, level: float) -> float:
    """The `level` quantile of values [N], with each of the K patients weighing 1 / (K + 1).

    The last 1 / (K + 1) stands for the next patient, whose values may be arbitrarily large: so they
    lie at or below it with probability `level` or more (Lee, Barber & Willett 2023, arXiv
    2306.06342).
    """
    bootstrap, order = bootstrap_of(patients), np.argsort(values, kind="stable")
    reached = np.cumsum(1 / bootstrap.counts[bootstrap.owner[order]]) / (bootstrap.n_patients + 1)
    first = np.searchsorted(reached, level - 1e-9)
    return float(values[order[first]]) if first < len(values) else float("inf")


def fit_calibration(errors: np.ndarray, patients, spread: Optional[np.ndarray] = None) -> dict:
    """Prediction intervals from the errors of patients not trained on (conformal): a plain dict.

    errors: [N] mmHg. spread: [N] mmHg, the SD that the network predicts, if it does: the unit of
    the intervals. A half width is None where there are too few patients (`patient_quantile`).
    """
    errors, = _finite(errors=errors)
    scaled = errors / (1.0 if spread is None else np.asarray(spread, np.float64))
    bootstrap = bootstrap_of(patients)
    half_widths = [patient_quantile(np.abs(scaled), bootstrap, level) for level in LEVELS]
    return {"levels": list(LEVELS), "n_patients": bootstrap.n_patients, "n_segments": len(errors),
            "half_widths": [half if np.isfinite(half) else None for half in half_widths],
            "spread": spread is not None}


def interval(prediction: np.ndarray, calibration: dict, level: float = 0.9,
             spread: Optional[np.ndarray] = None):
    """(low, high), mmHg, [N] each: covers the truth of a new patient's segment with `level`.

    Raises ValueError where the calibration had too few patients for that level.
    """
    half = calibration["half_widths"][calibration["levels"].index(level)]
    if half is None:
        needed = np.ceil(level / (1 - level) - 1e-9)
        raise ValueError(f"{calibration['n_patients']} tune patients are too few: a "
                         f"{100 * level:.0f} % interval needs {needed:.0f}")
    if calibration["spread"]:
        half = half * np.asarray(spread, np.float64)
    prediction = np.asarray(prediction, np.float64)
    return prediction - half, prediction + half


def coverage(patients, truth, low, high) -> dict:
    """Share of the truths [N] inside [low, high], by segment and each patient weighing the same."""
    bootstrap, inside = bootstrap_of(patients), (low <= truth) & (truth <= high)
    shares = bootstrap.per_patient(inside) / bootstrap.counts
    return {"segments": bootstrap.share(inside),
            "patients": bootstrap.share(shares, by_patient=True),
            "lowest_tenth": float(np.quantile(shares, 0.1)),
            "half_width": float(np.mean(high - low)) / 2}
