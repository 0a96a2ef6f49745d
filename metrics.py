"""Scores, confidence intervals over patients, and baselines; imports nothing of ours.

    from metrics import scores, confidence_intervals, fit_baselines, choose_best, skill

All pressures in mmHg. The unit that repeats is the patient, not the 60-s segment: every interval
comes from a bootstrap over patients, and every cross-validation leaves out whole patients.
"""
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

SCORES = ("rmse", "mae", "mead", "r2", "bias", "sd")

# Percentile intervals of RMSE cover 77, 88, 92 and 93 % instead of 95 % at 10, 30, 100 and 300
# patients (our simulation): below this number a report should call them too narrow.
FEW_PATIENTS = 30

# Labels are float32: values closer together than this are one value, and R² has no meaning.
LEAST_VARIANCE = 1e-9                           # mmHg²


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
        bad = len(values) - np.count_nonzero(np.isfinite(values))
        if bad or not len(values):
            raise ValueError(f"{name}: {bad} of {len(values)} values are not finite" if bad
                             else f"{name}: there are no values to score")
        if ready and len(values) != len(ready[0]):
            raise ValueError(f"{name}: {len(values)} values, expected {len(ready[0])} as in "
                             f"{next(iter(arrays))}")
        ready.append(values)
    return ready


# ---------------------------------------------------------------- intervals over patients

class PatientBootstrap:
    """Draws of patients with replacement: the same draws for every statistic that is asked of it.

    Works on sums per patient, so that a draw costs no pass over the segments: a million segments of
    2,000 patients take seconds. Any statistic that is a function of sums can be built on `sums`.

    patients: [N], any sortable identifiers. Two objects with the same patients, n_boot and seed
    make the same draws, whatever the order of the segments.
    """

    def __init__(self, patients, n_boot=2000, seed=0):
        names, self.owner = np.unique(np.asarray(patients).ravel(), return_inverse=True)
        self.owner = self.owner.ravel()
        self.n_patients, self.n_boot, self.seed = len(names), n_boot, seed

    def weights(self):
        """Yield how often each patient was drawn, in blocks [draws, n_patients] of float64."""
        rng = np.random.default_rng(self.seed)
        share = np.full(self.n_patients, 1 / self.n_patients)
        block = max(1, 10_000_000 // self.n_patients)       # 80 MB at most
        for start in range(0, self.n_boot, block):
            size = min(block, self.n_boot - start)
            yield rng.multinomial(self.n_patients, share, size=size).astype(np.float64)

    def sums(self, *columns):
        """Sums over the segments of each draw: a list of [n_boot], one for each column [N]."""
        per_patient = np.stack([np.bincount(self.owner, column, self.n_patients)
                                for column in columns], axis=1)
        return list(np.concatenate([weights @ per_patient for weights in self.weights()]).T)

    def medians(self, values):
        """The median of `values` [N] over the segments of each draw, exactly: [n_boot].

        Sorted once and cut into blocks; the blocks' counts are sums, and only the block that holds
        the median is looked at value by value.
        """
        order = np.argsort(values, kind="stable")
        values, owner = np.asarray(values)[order], self.owner[order]
        n_blocks = int(np.clip(np.sqrt(len(values)), 1, 1 + 20_000_000 // self.n_patients))
        length = -(-len(values) // n_blocks)
        block_of = np.arange(len(values)) // length
        counts = np.bincount(owner * n_blocks + block_of, minlength=self.n_patients * n_blocks)
        counts = counts.reshape(self.n_patients, n_blocks).astype(np.float64)

        def value_at(rank, upto, weights):
            block = np.searchsorted(upto, rank, side="right")
            inside = slice(block * length, (block + 1) * length)
            before = upto[block - 1] if block else 0
            reached = before + np.cumsum(weights[owner[inside]])
            return values[inside][np.searchsorted(reached, rank, side="right")]

        medians = []
        for weights in self.weights():
            for upto, draw in zip(np.cumsum(weights @ counts, axis=1), weights):
                n = upto[-1]
                medians.append((value_at((n - 1) // 2, upto, draw)
                                + value_at(n // 2, upto, draw)) / 2)
        return np.array(medians)

    def interval(self, draws, level=0.95):
        """(low, high): the percentile interval of a statistic's values [n_boot].

        Draws in which the statistic has no value (NaN) are left out; (NaN, NaN) when these are more
        than a tenth, or with a single patient, where nothing is known about others.
        """
        draws = draws[np.isfinite(draws)]
        if self.n_patients < 2 or len(draws) < 0.9 * self.n_boot:
            return float("nan"), float("nan")
        low, high = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2])
        return float(low), float(high)


def confidence_intervals(patients, truth, prediction, n_boot=2000, seed=0):
    """95 % intervals of the scores, from a bootstrap over patients: {score: (low, high)}.

    patients, truth, prediction: [N]. Percentile intervals; see FEW_PATIENTS.
    """
    truth, prediction = _finite(truth=truth, prediction=prediction)
    bootstrap = PatientBootstrap(patients, n_boot, seed)
    error = prediction - truth
    centred = truth - truth.mean()              # or the squares lose digits to the mean
    n, sum_e, sum_ee, sum_abs, sum_y, sum_yy = bootstrap.sums(
        np.ones_like(error), error, error ** 2, np.abs(error), centred, centred ** 2)
    with np.errstate(divide="ignore", invalid="ignore"):
        spread = sum_yy - sum_y ** 2 / n
        draws = {
            "rmse": np.sqrt(sum_ee / n), "mae": sum_abs / n,
            "mead": bootstrap.medians(np.abs(error)),
            "r2": np.where(spread > LEAST_VARIANCE * n, 1 - sum_ee / spread, np.nan),
            "bias": sum_e / n,
            "sd": np.sqrt(np.maximum(sum_ee - sum_e ** 2 / n, 0) / (n - 1))}
    return {name: bootstrap.interval(draws[name]) for name in SCORES}


def skill(truth, prediction, baseline_prediction, patients, n_boot=2000, seed=0):
    """1 - MSE / MSE(baseline), with its 95 % interval: {'value', 'low', 'high'}.

    0: no better than the baseline; 1: perfect. All [N]. The bootstrap over patients is paired: each
    draw scores both on the same patients. NaN where the baseline is free of error.
    """
    truth, prediction, baseline_prediction = _finite(
        truth=truth, prediction=prediction, baseline_prediction=baseline_prediction)
    ours, theirs = (prediction - truth) ** 2, (baseline_prediction - truth) ** 2

    def value(sum_ours, sum_theirs):
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.where(sum_theirs > 0, 1 - sum_ours / sum_theirs, np.nan)

    bootstrap = PatientBootstrap(patients, n_boot, seed)
    low, high = bootstrap.interval(value(*bootstrap.sums(ours, theirs)))
    return {"value": float(value(ours.sum(), theirs.sum())), "low": low, "high": high}


# ---------------------------------------------------------------- baselines

# What the label's own regression sees of a segment; pp*hr is its regressor, k·CO (Chandrasekhar et
# al., Nat Med 2023, doi 10.1038/s41591-023-02474-6).
ALL_INPUTS = ("map", "sbp", "dbp", "pp", "hr", "pp*hr")

RIDGE_PENALTIES = tuple(10.0 ** power for power in range(-2, 7))
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
            "ridge_all": ALL_INPUTS, "gradient_boosting_all": ALL_INPUTS}


def left_out_baselines(vitals, *parts):
    """{baseline: reason} for those that cannot be had: a field is absent or not finite in a part.

    vitals: the fields that the network gets. parts: dicts of fields [N], such as train, tune, test.
    """
    reasons = {}
    for name, inputs in _baseline_inputs(vitals).items():
        if not inputs and name != "mean_tpp":
            reasons[name] = "the network gets no vitals"
        for field in dict.fromkeys(part for column in inputs for part in column.split("*")):
            absent = [part for part in parts if field not in part]
            bad = sum(np.count_nonzero(~np.isfinite(part[field])) for part in parts
                      if field in part)
            if name not in reasons and (absent or bad):
                reasons[name] = (f"{field} is not in the data" if absent
                                 else f"{field} is not finite in {bad} segments")
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
        if name == "mean_tpp":
            function = _constant(target.mean())
        elif name == "map_minus_mean_pcrit":
            function = _map_minus(np.mean(_columns(train, inputs)[:, 0] - target))
        elif name.startswith("ridge"):
            function = _fit_ridge(_columns(train, inputs), target, patients).predict
        else:
            function = _fit_boosting(_columns(train, inputs), target, patients, seed).predict
        baselines[name] = Baseline(name, inputs, function)
    return baselines


def choose_best(baselines, tune):
    """The name of the baseline with the lowest RMSE on the tune patients (dict of fields [N])."""
    return min(baselines,
               key=lambda name: scores(tune["tpp"], baselines[name].predict(tune))["rmse"])


def _columns(fields, inputs):
    """[N, inputs] float64; a name like pp*hr is the product of two fields."""
    columns = [np.prod(_finite(**{field: fields[field] for field in name.split("*")}), axis=0)
               for name in inputs]
    return np.stack(columns, axis=1) if columns else np.empty((len(next(iter(fields.values()))), 0))


def _constant(mean_tpp):
    return lambda columns: np.full(len(columns), mean_tpp)


def _map_minus(mean_p_crit):
    return lambda columns: columns[:, 0] - mean_p_crit


def _patient_folds(patients):
    """[(fit rows, left-out rows)]: up to FOLDS parts, no patient in two; none for one patient."""
    from sklearn.model_selection import GroupKFold
    patients = np.unique(patients, return_inverse=True)[1].ravel()
    n_folds = min(FOLDS, patients.max() + 1)
    if n_folds < 2:
        return []
    return list(GroupKFold(n_folds).split(patients, groups=patients))


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
