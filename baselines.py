"""Predictors of TPP that a network must beat, fitted to the train and tune patients.

    baselines = fit_baselines(fields, patients, ['map', 'dbp', 'hr'])
    best = choose_best(baselines)                               # by cross-validation over patients
    tpp = baselines[best].predict(test_fields)                  # [N] mmHg

Fields are dicts of arrays [N] with the layout's names and units, and `anchor.PULSE_STATISTICS`. The
ridges are fitted as in anchor.py; the number of boosting rounds is chosen by cross-validation.
Copy anchor.py and datasets.py with it.
"""
from dataclasses import dataclass
from typing import Callable, Dict, Iterable, Optional, Sequence, Tuple

import numpy as np
from sklearn.ensemble import HistGradientBoostingRegressor
from sklearn.model_selection import GroupKFold
from threadpoolctl import threadpool_limits

from anchor import PULSE_STATISTICS, estimate, fit_rows

# The inputs of the label's own regression; pp*hr is its regressor, k·CO (Chandrasekhar et al., Nat
# Med 2023, doi 10.1038/s41591-023-02474-6).
ALL_INPUTS = ("map", "sbp", "dbp", "pp", "hr", "pp*hr")
FOLDS = 5
BOOSTING_ROUNDS = 200     # maximum


@dataclass
class Baseline:
    """A fitted predictor of TPP."""
    inputs: Tuple[str, ...]                         # names of its columns
    function: Callable[[np.ndarray], np.ndarray]    # [N, inputs] -> [N] mmHg
    cv_rmse: float                                  # cross-validated over patients, mmHg

    def predict(self, fields: Dict[str, np.ndarray]) -> np.ndarray:
        """TPP, [N] mmHg, from a dict of fields [N]. Raises ValueError if an input is not finite."""
        return self.function(_columns(fields, self.inputs))


def _baseline_inputs(vitals):
    """{baseline: names of its input columns}, in the order in which tables list them."""
    vitals = tuple(vitals)
    return {"mean_tpp": (), "map_minus_mean_pcrit": ("map",),
            "ridge": vitals, "gradient_boosting": vitals,
            "ridge_ppg": vitals + PULSE_STATISTICS,
            "gradient_boosting_ppg": vitals + PULSE_STATISTICS,
            "ridge_all": ALL_INPUTS, "gradient_boosting_all": ALL_INPUTS}


def left_out_baselines(vitals: Iterable[str], *parts: Dict[str, np.ndarray]) -> Dict[str, str]:
    """{baseline: reason} for baselines that need a field that is absent or not finite in one of the
    `parts`, dicts of fields [N] such as train, tune and test. vitals: the network's inputs."""
    reasons = {}
    for name, inputs in _baseline_inputs(vitals).items():
        if name.startswith(("ridge", "gradient")) and not inputs:
            reasons[name] = "the network gets no vitals"
        for field in (key for key in inputs if key != "pp*hr"):
            if not all(field in part for part in parts):
                reasons.setdefault(name, f"{field} is not in the data")
            else:
                bad = sum(np.count_nonzero(~np.isfinite(part[field])) for part in parts)
                if bad:
                    reasons.setdefault(name, f"{field} is not finite in {bad} segments")
    return reasons


def fit_baselines(fields: Dict[str, np.ndarray], patients: np.ndarray, vitals: Sequence[str],
                  left_out: Optional[Iterable[str]] = None) -> Dict[str, Baseline]:
    """Fit all baselines but those in `left_out`: {name: Baseline}.

    fields: dict of fields [N] of the train and tune patients: `tpp` (the target) and, as far as
    they exist, map, sbp, dbp, pp, hr and PULSE_STATISTICS. patients: [N]. vitals: the network's
    inputs, e.g. ['map', 'dbp', 'hr']. left_out: names; default left_out_baselines(vitals, fields).
    """
    target = np.asarray(fields["tpp"], np.float64)
    if left_out is None:
        left_out = left_out_baselines(vitals, fields)
    n_folds = min(FOLDS, len(np.unique(patients)))      # no patient is on both sides of a fold
    folds = list(GroupKFold(n_folds).split(patients, groups=patients)) if n_folds > 1 else []
    baselines = {}
    for name, inputs in _baseline_inputs(vitals).items():
        if name in left_out:
            continue
        columns = _columns(fields, inputs)
        if name.startswith("gradient"):
            function, squares = _fit_boosting(columns, target, folds)
        else:
            fit = _fit_ridge if name.startswith("ridge") else _fit_constant
            function = fit(inputs, columns, target)
            squares = sum(np.sum((fit(inputs, columns[rows], target[rows])(columns[left])
                                  - target[left]) ** 2) for rows, left in folds)
        baselines[name] = Baseline(inputs, function,
                                   np.sqrt(squares / len(target)) if folds else np.nan)
    return baselines


def choose_best(baselines: Dict[str, Baseline]) -> str:
    """The name of the baseline with the lowest cross-validated RMSE. This favours boosting a bit,
    as its rounds are chosen on the same folds."""
    return min(baselines, key=lambda name: baselines[name].cv_rmse)


def _columns(fields, inputs):
    """The input columns, [N, inputs] float64; pp*hr is the product of two fields."""
    columns = np.empty((len(next(iter(fields.values()))), len(inputs)))
    for i, name in enumerate(inputs):
        columns[:, i] = np.prod([fields[field] for field in name.split("*")], axis=0, dtype=float)
        bad = np.count_nonzero(~np.isfinite(columns[:, i]))
        if bad:
            raise ValueError(f"{name}: {bad} of {len(columns)} values are not finite")
    return columns


def _fit_constant(inputs, columns, target):
    """The sum of the inputs (none, or MAP) plus the best constant."""
    constant = np.mean(target - columns.sum(axis=1))
    return lambda columns: columns.sum(axis=1) + constant


def _fit_ridge(inputs, columns, target):
    n_vitals = len([name for name in inputs if name not in PULSE_STATISTICS])
    pulse = columns[:, n_vitals:] if n_vitals < len(inputs) else None
    fitted = fit_rows(inputs[:n_vitals], columns[:, :n_vitals], target, pulse)
    return lambda columns: estimate(fitted, columns[:, :n_vitals], columns[:, n_vitals:])


def _fit_boosting(columns, target, folds):
    # scikit-learn's early stopping would hold out segments, not patients
    def fit(rows, rounds):
        return HistGradientBoostingRegressor(
            max_iter=rounds, learning_rate=0.1, max_leaf_nodes=15, early_stopping=False,
            random_state=0).fit(columns[rows], target[rows])

    def squared_errors(rows, left):                     # [rounds]
        stages = fit(rows, BOOSTING_ROUNDS).staged_predict(columns[left])
        return [np.sum((stage - target[left]) ** 2) for stage in stages]

    # on so few rows threads cost more than they gain, ten times as much on shared cores
    with threadpool_limits(1):
        errors = np.sum([squared_errors(*fold) for fold in folds], axis=0)
        rounds = int(np.argmin(errors)) + 1 if folds else BOOSTING_ROUNDS
        return fit(slice(None), rounds).predict, np.min(errors)
