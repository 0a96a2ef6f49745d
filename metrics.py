"""Scores, intervals over patients, baselines, prediction intervals; imports nothing of ours.

    from metrics import scores, confidence_intervals, fit_baselines, choose_best, skill
    from metrics import fit_calibration, interval           # how sure is a single prediction?

All pressures in mmHg; error = prediction - truth. The unit that repeats is the patient, not the
60-s segment: every interval comes from a bootstrap over patients, every cross-validation leaves out
whole patients, and prediction intervals take patients, not segments, to be exchangeable. A score
with its 95 % interval is a dict {'value', 'low', 'high'} (`confidence_intervals`: the bounds).
"""
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np

SCORES = ("rmse", "mae", "mead", "r2", "bias", "sd")

# Below it a report should call its intervals too narrow: the 95 % ones hold the truth in 91 to 95 %
# of synthetic data sets of 10 patients, 93.5 to 95.3 % of 300 (benchmarks/evaluation.py coverage).
FEW_PATIENTS = 30
LEAST_PATIENTS = 5                              # fewer say nothing about others: no intervals

# Labels are float32: values closer together than this are one value, and R² has no meaning.
LEAST_VARIANCE = 1e-9                           # mmHg²

# A cut-off of risk of the published system (TPP < 34 mmHg), and the least change of TPP that counts
# as one: about what the label itself varies from minute to minute (SD 5 mmHg on real recordings).
LOW_TPP = 34.0
TREND_ZONE = 5.0


# ---------------------------------------------------------------- scores

def scores(truth, prediction):
    """Scores of `prediction` against `truth`, both [N] in mmHg; error = prediction - truth.

    rmse, mae; mead: median absolute deviation of prediction from truth, median |error|; r2: 1 -
    sum(error²) / sum((truth - mean truth)²), NaN where the truth does not vary; bias: mean error;
    sd: standard deviation of the errors, ddof 1, NaN for a single segment; n: number of segments.
    """
    truth, prediction = _finite(truth=truth, prediction=prediction)
    error = prediction - truth
    n = len(error)
    mse = np.mean(error ** 2)
    variance = np.var(truth)
    return {"n": n, "rmse": float(np.sqrt(mse)), "mae": float(np.mean(np.abs(error))),
            "mead": float(np.median(np.abs(error))),
            "r2": float(1 - mse / variance) if variance > LEAST_VARIANCE else float("nan"),
            "bias": float(np.mean(error)),
            "sd": float(np.std(error, ddof=1)) if n > 1 else float("nan")}


def _finite(**arrays):
    """The arrays as float64 [N], or a ValueError that names the one that is unfit."""
    ready = []
    for name, values in arrays.items():
        values = np.asarray(values, dtype=np.float64).ravel()
        bad = _count_bad(values)
        if bad or not len(values):
            raise ValueError(f"{name}: {bad} of {len(values)} values are not finite" if bad
                             else f"{name}: there are no values to score")
        if ready and len(values) != len(ready[0]):
            raise ValueError(f"{name}: {len(values)} values, expected {len(ready[0])} as in "
                             f"{next(iter(arrays))}")
        ready.append(values)
    return ready


def _count_bad(values):
    return int(np.count_nonzero(~np.isfinite(values)))


# ---------------------------------------------------------------- intervals over patients

# The scale on which each statistic's draws lie about symmetrically: logarithms of spreads, of what
# R² and skill leave unexplained, Fisher's z of correlations, log-odds of shares.
SCALES = {
    "plain": (lambda x: x, lambda x: x),
    "log": (np.log, np.exp),
    "unexplained": (lambda x: np.log(1 - x), lambda x: 1 - np.exp(x)),
    "correlation": (np.arctanh, np.tanh),
    "share": (lambda x: np.log(x / (1 - x)), lambda x: 1 / (1 + np.exp(-x))),
}


class PatientBootstrap:
    """Draws of patients with replacement: the same draws for every statistic that is asked of it.

    Works on sums per patient, so that a draw costs no pass over the segments: a million segments of
    2,000 patients take seconds. Any statistic that is a function of sums is an `estimate`.

    patients: [N], any sortable identifiers. Two objects with the same patients, n_boot and seed
    make the same draws, whatever the order of the segments.
    """

    def __init__(self, patients, n_boot=2000, seed=0):
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

    def per_patient(self, column):
        """[n_patients]: the sums of a column [N] over each patient's segments."""
        return np.bincount(self.owner, column, self.n_patients)

    def sums_of_patients(self, *columns):
        """Their sums over the patients of each draw: [n_boot] of each column [n_patients]."""
        columns = np.stack(columns, axis=1)
        return list(np.concatenate([weights @ columns for weights in self.weights()]).T)

    def estimate(self, function, columns, scale="plain", by_patient=False):
        """A function of sums with its 95 % interval: {'value', 'low', 'high'}.

        function: takes the sums of the columns, each a number or [n_boot]. columns: [N] each, or
        with by_patient [n_patients].
        """
        if not by_patient:
            columns = [self.per_patient(column) for column in columns]
        with np.errstate(divide="ignore", invalid="ignore"):
            value = float(function(*[column.sum() for column in columns]))
            draws = function(*self.sums_of_patients(*columns))
        low, high = self.interval(value, draws, scale)
        return {"value": value, "low": low, "high": high}

    def ratio(self, part, whole=None, scale="share", by_patient=False):
        """The sum of a column over that of another (default: their number), as an estimate."""
        part = np.asarray(part, np.float64)
        whole = np.ones_like(part) if whole is None else np.asarray(whole, np.float64)
        return self.estimate(
            lambda part, whole: np.where(whole > 0, part / np.where(whole > 0, whole, 1), np.nan),
            (part, whole), scale, by_patient)

    def levels_in_draws(self, values, *masks):
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

    def medians(self, values):
        """The median of `values` [N] over the segments of each draw: [n_boot]."""
        # Levels are needed where draws have their medians: within ten standard errors and more.
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

    def areas_under_roc(self, event, score):
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

    def interval(self, value, draws, scale="plain"):
        """(low, high) of a statistic from its value and its values in the draws [n_boot].

        On the scale named (`SCALES`): value ± t x SD of the draws, Student's t with n_patients - 1
        degrees of freedom, the SD times sqrt(n / (n - 1)): with few patients percentiles cover too
        little. Where the scale cannot hold a draw (a share of 0 or 1, no error at all): their
        percentiles, at the levels that t asks for (Hesterberg 2015, doi
        10.1080/00031305.2015.1089789). Draws in which the statistic has no value (NaN) are left
        out; (NaN, NaN) when these are more than a tenth, and below LEAST_PATIENTS.
        """
        from scipy.special import ndtr, stdtrit
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


def _estimates(bootstrap, truth, prediction, by_patient):
    """The scores but mead with their intervals; by_patient: each patient weighs the same."""
    error, one = prediction - truth, np.ones_like(truth)
    weight = 1 / bootstrap.counts if by_patient else 1

    def sums(column):
        return weight * bootstrap.per_patient(column)

    y = truth - sums(truth).sum() / sums(one).sum()     # or squares lose digits to the mean
    columns = [sums(x) for x in (one, error, error ** 2, np.abs(error), y, y ** 2)]

    def r2(n, e, ee, ae, y, yy):
        spread = yy - y ** 2 / n
        return np.where(spread > LEAST_VARIANCE * n, 1 - ee / spread, np.nan)

    return {name: bootstrap.estimate(function, columns, scale, by_patient=True)
            for name, scale, function in (
                ("rmse", "log", lambda n, e, ee, *_: np.sqrt(ee / n)),
                ("mae", "log", lambda n, e, ee, ae, *_: ae / n),
                ("r2", "unexplained", r2),
                ("bias", "plain", lambda n, e, *_: e / n),
                ("sd", "log", lambda n, e, ee, *_: np.sqrt(
                    np.maximum(ee - e ** 2 / n, 0) / (n if by_patient else n - 1))))}


def confidence_intervals(patients, truth, prediction, n_boot=2000, seed=0):
    """95 % intervals of the scores, from a bootstrap over patients: {score: (low, high)}.

    patients: [N], or a `PatientBootstrap` of them; truth, prediction: [N]. See FEW_PATIENTS.
    """
    truth, prediction = _finite(truth=truth, prediction=prediction)
    bootstrap, size = _bootstrap(patients, n_boot, seed), np.abs(prediction - truth)
    found = {name: (one["low"], one["high"])
             for name, one in _estimates(bootstrap, truth, prediction, by_patient=False).items()}
    found["mead"] = bootstrap.interval(np.median(size), bootstrap.medians(size), "log")
    return {name: found[name] for name in SCORES}


def _bootstrap(patients, n_boot=2000, seed=0):
    return (patients if isinstance(patients, PatientBootstrap)
            else PatientBootstrap(patients, n_boot, seed))


def rmse(patients, error):
    """RMSE of errors [N] with its 95 % interval."""
    return _bootstrap(patients).estimate(lambda n, ee: np.sqrt(ee / n),
                                         (np.ones_like(error), error ** 2), "log")


def skill(truth, prediction, baseline_prediction, patients, n_boot=2000, seed=0, by_patient=False):
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

def patient_scores(patients, truth, prediction):
    """The scores with each patient weighing the same, whatever the number of its segments.

    {score: {'value', 'low', 'high'}}, as in `scores` with weight 1 / (segments of the patient), sd
    without the n - 1; mead: the mean of the patients' medians.
    """
    truth, prediction = _finite(truth=truth, prediction=prediction)
    bootstrap = _bootstrap(patients)
    found = _estimates(bootstrap, truth, prediction, by_patient=True)
    size = np.abs(prediction - truth)[np.argsort(bootstrap.owner, kind="stable")]
    medians = [np.median(own) for own in np.split(size, np.cumsum(bootstrap.counts)[:-1])]
    return dict(found, mead=bootstrap.ratio(medians, scale="log", by_patient=True))


def within_patient_correlation(patients, truth, prediction):
    """Correlation of what is left when each patient's mean is taken off, with its interval.

    The repeated-measures correlation (Bland & Altman 1995, doi 10.1136/bmj.310.6977.446): does the
    prediction follow a patient's ups and downs? NaN where no patient has two segments.
    """
    truth, prediction = _finite(truth=truth, prediction=prediction)
    bootstrap = _bootstrap(patients)
    x, y = (values - (bootstrap.per_patient(values) / bootstrap.counts)[bootstrap.owner]
            for values in (truth, prediction))

    def correlation(sum_xy, sum_xx, sum_yy):
        return np.where((sum_xx > LEAST_VARIANCE) & (sum_yy > LEAST_VARIANCE),
                        sum_xy / np.sqrt(sum_xx * sum_yy), np.nan)

    return bootstrap.estimate(correlation, (x * y, x * x, y * y), "correlation")


def changes(series, *columns):
    """(rows that follow on a row of the same series, the columns' changes at these rows).

    series: [N], such as the number of the encounter, segments in the order of time.
    """
    series = np.asarray(series)
    later = np.flatnonzero(series[1:] == series[:-1]) + 1
    return (later, *[np.asarray(column)[later] - np.asarray(column)[later - 1]
                     for column in columns])


def trend_concordance(patients, truth, prediction, series=None, zone=TREND_ZONE):
    """Four-quadrant concordance: the share of changes that the prediction has the right way round.

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


def detection(patients, truth, prediction, threshold=LOW_TPP):
    """How well prediction < threshold tells truth < threshold: shares and the ROC area.

    {'prevalence', 'sensitivity', 'specificity', 'ppv', 'npv', 'auc': {'value', 'low', 'high'}};
    NaN where no segment allows it. The curve runs over the cut-off of the prediction.
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


def roc_area(event, score):
    """Area under the ROC curve, ties counted half (Mann & Whitney); NaN without both classes."""
    from scipy.stats import rankdata
    hits = np.count_nonzero(event)
    others = len(event) - hits
    if not hits or not others:
        return float("nan")
    return float((rankdata(score)[event].sum() - hits * (hits + 1) / 2) / (hits * others))


def reliability(patients, event, probability, bins=10):
    """Do events happen as often as predicted? Brier score, mean predicted, observed, and by bins.

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


# ---------------------------------------------------------------- borrowed standards

AAMI_MEAN, AAMI_SD = 5.0, 8.0                   # ISO 81060-2, criterion 1
AAMI_ERROR, AAMI_SHARE = 10.0, 0.85             # ISO 81060-2, tolerable error and its probability
BHS_LIMITS = (5, 10, 15)                        # mmHg
BHS_GRADES = {"A": (60, 85, 95), "B": (50, 75, 90), "C": (40, 65, 85)}     # cumulative %
IEEE_1708_GRADES = {"A": 5, "B": 6, "C": 7}     # mean absolute difference up to, mmHg; below 7


def aami_limit(mean_error):
    """Criterion 2: the largest SD of patients' mean errors at which 85 % lie within 10 mmHg.

    6.95 mmHg at a mean error of 0, 4.8 at 5 (the standard prints 4.79); 0 beyond 10.
    """
    from scipy.optimize import brentq
    from scipy.special import ndtr
    mean_error = abs(mean_error)
    if mean_error >= AAMI_ERROR:
        return 0.0
    return float(brentq(lambda sd: ndtr((AAMI_ERROR - mean_error) / sd)
                        - ndtr((-AAMI_ERROR - mean_error) / sd) - AAMI_SHARE, 1e-6, 20))


def standards(patients, truth, prediction):
    """Criteria made for blood pressure, borrowed (none exists for TPP): numbers, pass or grade."""
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


def bland_altman(patients, truth, prediction):
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


def summarise(runs):
    """Mean and SD (ddof 1) of each number in several runs' scores: {name: {'mean', 'sd', 'runs'}}.

    runs: two or more dicts, as `<name>_metrics.json` holds them; inner names are joined by dots.
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


# ---------------------------------------------------------------- how sure is one prediction

LEVELS = (0.5, 0.8, 0.9, 0.95)
QUANTILES = 201                                 # of the calibration errors, for probabilities
NOVELTY_LEVEL = 0.95                            # segments like those of training lie below


def patient_quantile(values, patients, level):
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


def fit_calibration(errors, patients, spread=None):
    """Prediction intervals from the errors of patients not trained on (conformal): a plain dict.

    errors: [N] mmHg, of the tune patients. spread: [N] mmHg, where the network predicts its own: it
    is then the unit of the intervals. Below 9 patients there is no 90 % interval, below 19 no 95 %
    (`patient_quantile`): its half width is None. Numbers and lists alone, to lie in a checkpoint.
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


def interval(prediction, calibration, level=0.9, spread=None):
    """(low, high), mmHg, [N] each: holds the truth of a new patient's segment with `level`.

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


def low_probability(prediction, calibration, threshold=LOW_TPP, spread=None):
    """Probability, [N], that the true value lies below threshold, from the calibration errors."""
    quantiles = np.asarray(calibration["error_quantiles"])
    shares = (np.arange(len(quantiles)) + 0.5) / len(quantiles)
    needed = (np.asarray(prediction, np.float64) - threshold) / _spread(calibration, spread)
    return 1 - np.interp(needed, quantiles, shares)


def coverage(patients, truth, low, high):
    """Share of the truths [N] inside [low, high]: of all, and with patients weighing the same.

    {'segments', 'patients': {'value', 'low', 'high'}, 'lowest_tenth': what a tenth of the patients
    does not reach, 'mean_width': mmHg}.
    """
    truth, low, high = _finite(truth=truth, low=low, high=high)
    bootstrap = _bootstrap(patients)
    inside = (low <= truth) & (truth <= high)
    shares = bootstrap.per_patient(inside) / bootstrap.counts
    return {"segments": bootstrap.ratio(inside),
            "patients": bootstrap.ratio(shares, by_patient=True),
            "lowest_tenth": float(np.quantile(shares, 0.1)),
            "mean_width": float(np.mean(high - low))}


def fit_novelty(train, tune, tune_patients):
    """What inputs unlike those of training look like: a plain dict for the checkpoint.

    train, tune: [N, features], what the network's last layers see (pooled waveform features and
    vitals). The distance is Mahalanobis', covariance shrunk (Ledoit & Wolf); above the tune
    patients' 95 % `patient_quantile` a segment is called new, so one in twenty is by design. No
    threshold (None) below 19 tune patients.
    """
    from sklearn.covariance import LedoitWolf
    fitted = LedoitWolf().fit(np.asarray(train, np.float64))
    found = {"mean": fitted.location_.tolist(), "precision": fitted.precision_.tolist(),
             "level": NOVELTY_LEVEL}
    threshold = patient_quantile(novelty(tune, found), tune_patients, NOVELTY_LEVEL)
    return dict(found, threshold=threshold if np.isfinite(threshold) else None)


def novelty(features, fitted):
    """Distance [N] of features [N, features] from the training ones (`fit_novelty`)."""
    away = np.asarray(features, np.float64) - np.asarray(fitted["mean"])
    squared = np.einsum("ij,ij->i", away @ np.asarray(fitted["precision"]), away)
    return np.sqrt(np.maximum(squared, 0))


# ---------------------------------------------------------------- baselines

# What the label's own regression sees of a segment; pp*hr is its regressor, k·CO (Chandrasekhar et
# al., Nat Med 2023, doi 10.1038/s41591-023-02474-6).
ALL_INPUTS = ("map", "sbp", "dbp", "pp", "hr", "pp*hr")

RIDGE_PENALTIES = tuple(10.0 ** power for power in range(-2, 7))
# Of the PPG, classical: rate, rhythm, shape of the mean beat, harmonics (`ppg_features`).
PPG_FEATURES = (
    "pulse_rate", "pulse_irregularity", "pulse_rise_s", "pulse_width_25_s", "pulse_width_50_s",
    "pulse_width_75_s", "pulse_area", "pulse_b_a", "pulse_skewness", "pulse_kurtosis",
    "pulse_amplitude_variation", "pulse_baseline_variation", "pulse_harmonic_2", "pulse_harmonic_3",
    "pulse_quality")

BOOSTING_ROUNDS = 200                           # at most; the number is chosen by cross-validation
FOLDS = 5


@dataclass
class Baseline:
    """A fitted predictor of TPP: `inputs` are the names of its columns, [N, inputs] -> [N] mmHg."""
    name: str
    inputs: tuple
    function: Callable

    def predict(self, fields):
        """TPP in mmHg, [N], from a dict of fields [N] (pp*hr is made of pp and hr)."""
        return np.asarray(self.function(_columns(fields, self.inputs)), dtype=np.float64)


def _baseline_inputs(vitals):
    """{baseline: names of its input columns}, in the order in which tables show them."""
    return {"mean_tpp": (), "map_minus_mean_pcrit": ("map",),
            "ridge": tuple(vitals), "gradient_boosting": tuple(vitals),
            "gradient_boosting_ppg": tuple(vitals) + PPG_FEATURES,
            "ridge_all": ALL_INPUTS, "gradient_boosting_all": ALL_INPUTS}


def left_out_baselines(vitals, *parts):
    """{baseline: reason} for those that cannot be had: a field is absent or not finite in a part.

    vitals: the fields that the network gets. parts: dicts of fields [N], such as train, tune, test.
    """
    reasons = {}
    for name, inputs in _baseline_inputs(vitals).items():
        if name.startswith(("ridge", "gradient")) and not inputs:
            reasons[name] = "the network gets no vitals"
        for field in dict.fromkeys(part for column in inputs for part in column.split("*")):
            there = [np.asarray(part[field]) for part in parts if field in part]
            bad = field not in PPG_FEATURES and sum(map(_count_bad, there))
            if len(there) < len(parts):
                reasons.setdefault(name, f"{field} is not in the data")
            elif bad:
                reasons.setdefault(name, f"{field} is not finite in {bad} segments")
    return reasons


def fit_baselines(train, patients, vitals, left_out=None, seed=0):
    """Fit the baselines on the train patients: {name: Baseline}, without those in `left_out`.

    train: dict of fields [N], with `tpp` (the target) and what of map, sbp, dbp, pp, hr there is.
    patients: [N]. vitals: the fields that the network gets, e.g. ['map', 'dbp', 'hr'].
    left_out: names; by default left_out_baselines(vitals, train).

    Ridge on standardised inputs; its penalty and the number of boosting rounds are chosen by
    cross-validation over patients. With MAP among the inputs, least squares on TPP is least squares
    on Pcrit (Pcrit = MAP - TPP).
    """
    target, = _finite(tpp=train["tpp"])
    if left_out is None:
        left_out = left_out_baselines(vitals, train)
    baselines = {}
    for name, inputs in _baseline_inputs(vitals).items():
        if name in left_out:
            continue
        columns = _columns(train, inputs)
        if name.startswith("ridge"):
            function = _fit_ridge(columns, target, patients).predict
        elif name.startswith("gradient"):
            function = _fit_boosting(columns, target, patients, seed).predict
        else:
            function = _sum_and_constant(columns, target)
        baselines[name] = Baseline(name, inputs, function)
    return baselines


def choose_best(baselines, tune):
    """The name of the baseline with the lowest RMSE on the tune patients (dict of fields [N])."""
    return min(baselines,
               key=lambda name: scores(tune["tpp"], baselines[name].predict(tune))["rmse"])


def _columns(fields, inputs):
    """[N, inputs] float64; a name like pp*hr is the product of two fields. PPG features may be NaN
    (no beats were found), which gradient boosting takes as it is."""
    columns = [np.asarray(fields[name], np.float64) if name in PPG_FEATURES else
               np.prod(_finite(**{field: fields[field] for field in name.split("*")}), axis=0)
               for name in inputs]
    return np.stack(columns, axis=1) if columns else np.empty((len(next(iter(fields.values()))), 0))


def ppg_features(ppg, fs=60):
    """{name: [N]} of `PPG_FEATURES` from waveforms [N, samples], any gain and offset.

    Rates in beats/min, times in s, the rest without unit; NaN where fewer than five beats are
    found or a sample is not finite. The beats run from foot to foot of the band-passed signal (0.5
    to 8 Hz, the usual band: Elgendi 2016, doi 10.3390/bioengineering3040021).
    """
    from scipy import signal, stats
    with np.errstate(invalid="ignore"):         # damaged files hold signalling NaNs
        ppg = np.asarray(ppg, np.float64).reshape(len(ppg), -1)
    ppg = np.where(np.isfinite(ppg), ppg, np.nan)
    band = signal.butter(2, (0.5, 8), "bandpass", fs=fs, output="sos")
    smooth = signal.sosfiltfilt(band, ppg - ppg.mean(axis=1, keepdims=True), axis=1)
    sd = smooth.std(axis=1, keepdims=True)
    smooth = smooth / np.where(sd > 0, sd, 1)
    skewness, kurtosis = stats.skew(smooth, axis=1), stats.kurtosis(smooth, axis=1)
    found = np.full((len(ppg), len(PPG_FEATURES)), np.nan)
    phase = np.linspace(0, 1, 64)
    for row, wave in enumerate(smooth):
        # 0.3 s: up to 200 beats/min; half the height of the high ones: no dicrotic waves.
        peaks, properties = signal.find_peaks(wave, distance=round(0.3 * fs), prominence=0.5)
        heights = properties["prominences"]
        if len(peaks):
            high = heights > 0.5 * np.quantile(heights, 0.9)
            peaks, heights = peaks[high], heights[high]
        if len(peaks) < 6:
            continue
        # The foot: the lowest point in the later half between two peaks (not the dicrotic notch).
        feet = np.array([m + np.argmin(wave[m:b])
                         for m, b in zip((peaks[:-1] + peaks[1:]) // 2, peaks[1:])])
        seconds = np.diff(feet) / fs
        at = feet[:-1, None] + phase * np.diff(feet)[:, None]
        beats = np.interp(at, np.arange(len(wave)), wave)                   # [beats, 64]
        low, high = beats.min(axis=1, keepdims=True), beats.max(axis=1, keepdims=True)
        beats = (beats - low) / (high - low)
        mean_beat = np.median(beats, axis=0)
        bend = np.gradient(np.gradient(mean_beat))
        a = np.argmax(bend[:24])
        interval_s = np.median(seconds)
        centred, template = beats - beats.mean(axis=1, keepdims=True), mean_beat - mean_beat.mean()
        power = np.abs(np.fft.rfft(mean_beat))[1:4] ** 2
        found[row] = (
            60 / interval_s, seconds.std() / seconds.mean(), np.argmax(mean_beat) / 63 * interval_s,
            *(np.mean(mean_beat > share) * interval_s for share in (0.25, 0.5, 0.75)),
            mean_beat.mean(), np.min(bend[a:a + 16]) / bend[a], skewness[row], kurtosis[row],
            np.std(heights) / np.mean(heights), np.std(wave[feet]), *power[1:] / power[0],
            np.mean(centred @ template / np.sqrt(np.sum(centred ** 2, axis=1)
                                                 * np.sum(template ** 2))))
    return dict(zip(PPG_FEATURES, found.T))


def _sum_and_constant(columns, target):
    """TPP as the sum of the inputs (of none, or MAP) and the constant that serves best."""
    constant = np.mean(target - columns.sum(axis=1))
    return lambda columns: columns.sum(axis=1) + constant


def _patient_folds(patients):
    """[(fit rows, left-out rows)]: up to FOLDS parts, no patient in two; none for one patient."""
    from sklearn.model_selection import GroupKFold
    n_folds = min(FOLDS, len(np.unique(patients)))
    return list(GroupKFold(n_folds).split(patients, groups=patients)) if n_folds > 1 else []


def _fit_ridge(columns, target, patients):
    from sklearn.linear_model import Ridge
    from sklearn.model_selection import GridSearchCV
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler
    pipeline = make_pipeline(StandardScaler(), Ridge())
    folds = _patient_folds(patients)
    if not folds:                               # one patient: nothing to choose by, penalty 1
        return pipeline.fit(columns, target)
    return GridSearchCV(pipeline, {"ridge__alpha": RIDGE_PENALTIES}, cv=folds,
                        scoring="neg_mean_squared_error").fit(columns, target)


def _fit_boosting(columns, target, patients, seed):
    """Gradient boosting with as many rounds as serve patients left out best.

    scikit-learn's own early stopping holds out random rows, segments of the patients it fits.
    """
    from sklearn.ensemble import HistGradientBoostingRegressor

    def fit(rows, rounds):
        return HistGradientBoostingRegressor(
            max_iter=rounds, learning_rate=0.1, max_leaf_nodes=15, early_stopping=False,
            random_state=seed).fit(columns[rows], target[rows])

    squared_error = np.zeros(BOOSTING_ROUNDS)
    for fit_rows, left_rows in _patient_folds(patients):
        stages = fit(fit_rows, BOOSTING_ROUNDS).staged_predict(columns[left_rows])
        squared_error += [np.sum((stage - target[left_rows]) ** 2) for stage in stages]
    rounds = int(np.argmin(squared_error)) + 1 if squared_error.any() else BOOSTING_ROUNDS
    return fit(slice(None), rounds)
