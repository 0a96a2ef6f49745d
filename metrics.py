"""Scores, confidence intervals over patients, and prediction intervals.

    from metrics import scores, confidence_intervals, skill     # of a model
    from metrics import fit_calibration, interval               # of one prediction

Pressures are in mmHg; error = prediction - truth. All intervals treat the patient, not the 60-s
segment, as the independent unit. `patients` are identifiers [N] or a `PatientBootstrap` of them,
which keeps its draws for the next score. An *estimate* is a score with its 95 % interval:
{'value', 'low', 'high'}. This module can be copied out alone.
"""
from functools import cached_property
from typing import Callable, Dict, NamedTuple, Optional

import numpy as np
import sklearn.metrics as sk
from scipy.optimize import brentq
from scipy.special import expit, logit, ndtr, stdtrit
from sklearn.utils import check_consistent_length

FEW_PATIENTS = 30       # intervals of fewer are too narrow (benchmarks/evaluation.py coverage)
MIN_PATIENTS = 5      # no confidence interval for fewer
MIN_VARIANCE = 1e-9     # mmHg²; truths (float32) that vary less are constant: R² is undefined
LOW_TPP = 34.0          # mmHg, the published system's cut-off for risk
MAX_TPP = 500.0         # mmHg; a larger prediction is not a perfusion pressure
TREND_ZONE = 5.0        # mmHg; smaller changes are ignored: the label's own SD between minutes


# ---------------------------------------------------------------- scores

class Score(NamedTuple):
    """An entry of SCORES."""
    function: Callable                          # (truth [N], prediction [N]) -> float
    title: str                                  # with its unit
    scale: str                                  # a key of SCALES
    of_sums: Optional[Callable] = None          # the same from sums over segments, faster
    draws: Optional[Callable] = None            # (bootstrap, truth, prediction) -> [n_boot], faster


def _r2(truth, prediction):
    return sk.r2_score(truth, prediction) if np.var(truth) > MIN_VARIANCE else float("nan")


def _r2_of_sums(n, e, ee, ae, y, yy):
    spread = yy - y ** 2 / n
    return np.where(spread > MIN_VARIANCE * n, 1 - ee / spread, np.nan)


# A score added here appears on the console, in the JSON and on the page. Without of_sums or draws,
# each draw of the bootstrap is scored segment by segment, which is slow. of_sums takes the sums
# n, e, ee, ae, y, yy of 1, error, error², |error|, y and y², where y = truth - mean.
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
BY_PATIENT = ("rmse", "mae", "r2", "bias")      # also computed with equal weight per patient


def scores(truth: np.ndarray, prediction: np.ndarray) -> Dict[str, float]:
    """All SCORES, and `n`, the number of segments. Arrays [N] in mmHg; NaN where undefined."""
    truth, prediction = _finite(truth=truth, prediction=prediction)
    return {"n": len(truth),
            **{name: float(score.function(truth, prediction)) for name, score in SCORES.items()}}


def _finite(**arrays):
    """The arrays [N] as float64. Raises ValueError if one of them is not finite."""
    check_consistent_length(*arrays.values())
    for name, values in arrays.items():
        arrays[name] = np.asarray(values, np.float64)
        if not np.isfinite(arrays[name]).all():
            raise ValueError(f"{name}: not all of the {len(values)} values are finite")
    return arrays.values()


# ---------------------------------------------------------------- intervals over patients

# Scales on which the draws of a statistic are about symmetric: logarithms of spreads and of what R²
# and skill leave unexplained, Fisher's z of correlations, log-odds of shares.
SCALES = {
    "plain": (lambda x: x, lambda x: x),
    "log": (np.log, np.exp),
    "unexplained": (lambda x: np.log(1 - x), lambda x: 1 - np.exp(x)),
    "correlation": (np.arctanh, np.tanh),
    "share": (logit, expit),
}


class PatientBootstrap:
    """Draws of patients with replacement; the same patients, n_boot and seed give the same draws.

    patients: [N], any sortable identifiers. Most scores follow from sums per patient. Medians and
    ROC areas pass over the segments in every draw: for a million segments, 3 and 7 seconds.
    """

    def __init__(self, patients, n_boot: int = 2000, seed: int = 0):
        # owner: [N], the number of each segment's patient; counts: segments of each patient
        names, self.owner, self.counts = np.unique(
            np.asarray(patients), return_inverse=True, return_counts=True)
        self.n_patients, self.n_boot, self.seed = len(names), n_boot, seed

    @cached_property
    def drawn(self) -> np.ndarray:
        """How often each patient is drawn: [n_boot, n_patients]."""
        share = np.full(self.n_patients, 1 / self.n_patients)
        rng, drawn = np.random.default_rng(self.seed), np.empty((self.n_boot, len(share)), np.int32)
        for draw in drawn:
            draw[:] = rng.multinomial(self.n_patients, share)
        return drawn

    def per_patient(self, column: np.ndarray) -> np.ndarray:
        """[n_patients]: the sums of a column [N] over each patient's segments."""
        return np.bincount(self.owner, column, self.n_patients)

    def estimate(self, function: Callable, columns, scale: str = "plain",
                 by_patient: bool = False) -> Dict[str, float]:
        """A function of the sums of columns, as an estimate. Columns: [N] each, or [n_patients]
        with by_patient. The function takes the sums as numbers, and those of the draws, [n_boot].
        """
        if not by_patient:
            columns = [self.per_patient(column) for column in columns]
        columns = np.stack(columns, axis=1)
        with np.errstate(divide="ignore", invalid="ignore"):
            value = float(function(*[column.sum() for column in columns.T]))
            blocks = np.array_split(self.drawn, 1 + self.drawn.size // 10 ** 7)     # bounds memory
            draws = function(*np.concatenate([block @ columns for block in blocks]).T)
        return self.with_interval(value, draws, scale)

    def share(self, part, whole=None, by_patient: bool = False) -> Dict[str, float]:
        """The sum of `part` over the sum of `whole` (default: all ones), as an estimate."""
        whole = np.ones(len(part)) if whole is None else whole
        return self.estimate(np.divide, (part, whole), "share", by_patient)

    def of_each_draw(self, function: Callable, *columns: np.ndarray) -> np.ndarray:
        """Any function of columns [N], called with the segments of each draw: [n_boot]. Slow."""
        rows = (np.repeat(np.arange(len(self.owner)), draw[self.owner]) for draw in self.drawn)
        return np.array([function(*(column[drawn] for column in columns)) for drawn in rows])

    def medians(self, values: np.ndarray) -> np.ndarray:
        """The median of values [N] over the segments of each draw: [n_boot]."""
        order = np.argsort(values)
        values, owner = values[order], self.owner[order]
        medians = []
        for draw in self.drawn:
            upto = np.cumsum(draw[owner], dtype=np.int32)       # segments up to each value
            middle = (upto[-1] - 1) // 2, upto[-1] // 2
            medians.append(values[np.searchsorted(upto, middle, "right")].mean())
        return np.array(medians)

    def areas_under_roc(self, event: np.ndarray, score: np.ndarray) -> np.ndarray:
        """The area under the ROC curve of a score [N] for an event [N] (bool) in each draw: the
        share of pairs in which the event has the higher score, ties counted half."""
        order = np.argsort(score)
        event, score, owner = event[order], score[order], self.owner[order]
        first, last = (np.searchsorted(score[~event], score[event], side)
                       for side in ("left", "right"))
        of_hits, of_others, areas = owner[event], owner[~event], []
        for draw in self.drawn:
            hits = draw[of_hits]
            others = np.cumsum(np.append(0, draw[of_others]), dtype=np.int64)
            with np.errstate(invalid="ignore"):
                areas.append(hits @ (others[first] + others[last]) / (2 * hits.sum() * others[-1]))
        return np.array(areas)

    def with_interval(self, value: float, draws: np.ndarray, scale: str) -> Dict[str, float]:
        """The estimate of a statistic from its value and its values in the draws [n_boot].

        On its scale: value ± Student's t x SD of the draws x sqrt(n / (n - 1)). If a draw is
        infinite on that scale (a share of 0 or 1): percentiles of the draws at the levels that
        correspond to t (Hesterberg 2015, doi 10.1080/00031305.2015.1089789).
        """
        draws = np.asarray(draws)[~np.isnan(draws)]
        if self.n_patients < MIN_PATIENTS or len(draws) < 0.9 * self.n_boot or np.isnan(value):
            return {"value": value, "low": float("nan"), "high": float("nan")}
        to, back = SCALES[scale]
        reach = (stdtrit(self.n_patients - 1, 0.975)
                 * np.sqrt(self.n_patients / (self.n_patients - 1)))
        with np.errstate(divide="ignore", invalid="ignore"):
            scaled = to(np.append(value, draws))
        if np.isfinite(scaled).all():
            width = reach * np.std(scaled[1:])
            low, high = sorted((back(scaled[0] - width), back(scaled[0] + width)))
        else:
            low, high = np.quantile(draws, [ndtr(-reach), ndtr(reach)])
        return {"value": value, "low": float(low), "high": float(high)}


def bootstrap_of(patients) -> PatientBootstrap:
    return patients if isinstance(patients, PatientBootstrap) else PatientBootstrap(patients)


def confidence_intervals(patients, truth, prediction, by_patient: bool = False) -> Dict[str, dict]:
    """The SCORES as estimates, {score: {'value', 'low', 'high'}}. truth, prediction: [N] mmHg.

    by_patient: only those of BY_PATIENT, with equal weight for each patient.
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
    """1 - MSE / MSE(baseline), as an estimate; all [N]. 0: no gain; 1: perfect.

    The bootstrap is paired: each draw scores both on the same patients. by_patient: with equal
    weight for each patient. NaN if the baseline has no error.
    """
    truth, prediction, baseline_prediction = _finite(
        truth=truth, prediction=prediction, baseline_prediction=baseline_prediction)
    bootstrap = bootstrap_of(patients)
    columns = [bootstrap.per_patient((tpp - truth) ** 2) / (bootstrap.counts if by_patient else 1)
               for tpp in (prediction, baseline_prediction)]
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
    """(rows that follow another row of their series [N], the changes of columns [N] there)."""
    later = np.flatnonzero(series[1:] == series[:-1]) + 1
    return (later, *[column[later] - column[later - 1] for column in columns])


def trend_concordance(patients, truth, prediction, series) -> dict:
    """Four-quadrant concordance: the share of changes whose direction is predicted correctly.

    Of the 'n_changes' from one segment of a series to the next, it counts the 'n' that exceed
    TREND_ZONE in truth or prediction (Critchley 2010, doi 10.1213/ANE.0b013e3181f08a5b).
    """
    later, true_change, change = changes(series, truth, prediction)
    counted = np.maximum(np.abs(true_change), np.abs(change)) >= TREND_ZONE
    right = (true_change * change > 0)[counted]
    owner = bootstrap_of(patients).owner
    found = (PatientBootstrap(owner[later[counted]]).share(right) if counted.any()
             else dict.fromkeys(("value", "low", "high"), float("nan")))
    return dict(found, n=int(counted.sum()), n_changes=len(later), zone=TREND_ZONE)


def detection(patients, truth, prediction) -> dict:
    """Detection of truth < LOW_TPP by prediction < LOW_TPP: estimates, NaN where undefined."""
    bootstrap = bootstrap_of(patients)
    event, alarm = truth < LOW_TPP, prediction < LOW_TPP
    shares = {"prevalence": (event,), "sensitivity": (event & alarm, event),
              "specificity": (~event & ~alarm, ~event), "ppv": (event & alarm, alarm),
              "npv": (~event & ~alarm, ~alarm)}
    area = float(sk.roc_auc_score(event, -prediction)) if 0 < event.sum() < len(event) else np.nan
    areas = bootstrap.areas_under_roc(event, -prediction)
    return {"threshold": LOW_TPP, "n_low": int(event.sum()),
            **{name: bootstrap.share(*pair) for name, pair in shares.items()},
            "auc": bootstrap.with_interval(area, areas, "share")}


# Standards for blood pressure
STANDARD_PATIENTS = 85      # minimum of ISO 81060-2, BHS 1993 and IEEE 1708a-2019
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
    """Criteria for blood pressure monitors (there are none for TPP): numbers, and 'passed' or
    'grade', which are None below STANDARD_PATIENTS."""
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
    """The `level` quantile of values [N], where each of the K patients has weight 1 / (K + 1).

    The remaining weight stands for the next patient, whose values may be arbitrarily large: they
    are at or below the quantile with probability `level` or more (Lee, Barber & Willett 2023, arXiv
    2306.06342).
    """
    bootstrap, order = bootstrap_of(patients), np.argsort(values, kind="stable")
    reached = np.cumsum(1 / bootstrap.counts[bootstrap.owner[order]]) / (bootstrap.n_patients + 1)
    first = np.searchsorted(reached, level - 1e-9)
    return float(values[order[first]]) if first < len(values) else float("inf")


def fit_calibration(errors: np.ndarray, patients, spread: Optional[np.ndarray] = None) -> dict:
    """Conformal prediction intervals from the errors of patients not trained on: a plain dict.

    errors: [N] mmHg. spread: [N] mmHg, the SD that the network predicts, if it does; half widths
    are then in units of it. A half width is None if there are too few patients.
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
    """(low, high), [N] mmHg each: holds the truth of a new patient's segment with probability
    `level`. Raises ValueError if the calibration had too few patients for that level."""
    half = calibration["half_widths"][calibration["levels"].index(level)]
    if half is None:
        needed = np.ceil(level / (1 - level) - 1e-9)
        raise ValueError(f"too few tune patients ({calibration['n_patients']}): a "
                         f"{100 * level:.0f} % interval needs {needed:.0f}")
    if calibration["spread"]:
        half = half * np.asarray(spread, np.float64)
    prediction = np.asarray(prediction, np.float64)
    return prediction - half, prediction + half


def coverage(patients, truth, low, high) -> dict:
    """Share of the truths [N] inside [low, high], by segment and with equal weight per patient."""
    bootstrap, inside = bootstrap_of(patients), (low <= truth) & (truth <= high)
    shares = bootstrap.per_patient(inside) / bootstrap.counts
    return {"segments": bootstrap.share(inside),
            "patients": bootstrap.share(shares, by_patient=True),
            "lowest_tenth": float(np.quantile(shares, 0.1)),
            "half_width": float(np.mean(high - low)) / 2}
