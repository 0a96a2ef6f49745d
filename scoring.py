"""Predictions of segments -> everything that is said about them: the numbers of the JSON.

    scored = Segments(fields, patients, series, names, tpp=predictions)
    results = score_all(scored)

Needs metrics.py and report.py (with tk_utils.py and templates/).
"""
from dataclasses import dataclass, field
from typing import Any, Dict, List, Optional

import numpy as np

import metrics
from report import percent
from tk_utils import counted

MIN_CHANGE_MMHG = 0.01                      # predictions that vary by less are constant
EACH_BEST = "each run's best baseline"
STRATA = (      # field, name, unit, inner edges or None for quarters
    ("tpp", "TPP", "mmHg", (20, 34, 50)), ("map", "MAP", "mmHg", (65, 74, 90)),
    ("hr", "Heart rate", "/min", (60, 80, 100)), ("pp", "Pulse pressure", "mmHg", (40, 60, 80)),
    ("r2", "Label's r²", "", (0.7, 0.8, 0.9)), ("quality", "PPG quality", "", None),
    ("irregularity", "Beat irregularity", "", (0.05, 0.1, 0.2)),
    ("distance", "Distance from training inputs", "", None),
    ("spread", "Network's own SD", "mmHg", None))


@dataclass
class Segments:
    """N segments and what is predicted of them, in mmHg; what is not known stays empty.

    fields {name: [N] float64}; patients, series [N]: numbers of patient and encounter; names [N]:
    patients, to recognise them in several runs, never written; dataset: to read their PPG. tpp:
    predictions [N]; spread: the network's own SD [N]; baselines, compared {name: [N]}, best: name
    of the baseline that was best on the tune patients; intervals {level: (low [N], high [N]) or the
    reason why there is none}; distance from the training inputs, unusual, low_probability, swapped
    (the PPG of another patient): [N].
    """
    fields: Dict[str, np.ndarray]
    patients: np.ndarray
    series: np.ndarray
    names: np.ndarray
    dataset: Any = None
    tpp: Optional[np.ndarray] = None
    spread: Optional[np.ndarray] = None
    baselines: Dict[str, np.ndarray] = field(default_factory=dict)
    compared: Dict[str, np.ndarray] = field(default_factory=dict)
    best: Optional[str] = None
    intervals: Dict[float, Any] = field(default_factory=dict)
    distance: Optional[np.ndarray] = None
    unusual: Optional[np.ndarray] = None
    low_probability: Optional[np.ndarray] = None
    swapped: Optional[np.ndarray] = None
    good: Optional["Segments"] = None       # of the same patients, all of good signal (gate 'any')

    def __len__(self):
        return len(self.patients)

    @property
    def truth(self) -> np.ndarray:
        return self.fields["tpp"]

    def waveform(self, rows) -> np.ndarray:
        """PPG [rows, samples]."""
        return self.dataset.waveform("ppg", rows).reshape(len(rows), -1)


def score_all(scored: Segments, full: bool = False) -> dict:
    """Everything that follows from the predictions. full: also what only the page shows."""
    bootstrap = metrics.PatientBootstrap(scored.patients)
    found = {**score_predictions(scored, bootstrap),
             **{key: {name: score_other(scored, prediction, bootstrap)
                      for name, prediction in getattr(scored, key).items()}
                for key in ("baselines", "compared")},
             "uncertainty": uncertainty_summary(scored, bootstrap),
             "checks": check_predictions(scored, bootstrap)}
    found.update(skills(found["baselines"], scored.best))
    if full:
        found["strata"] = strata(scored)
        found["patients"] = spread_over_patients(scored.patients, scored.tpp - scored.truth)
        if scored.swapped is not None:
            found["swapped_ppg"] = score_other(scored, scored.swapped, bootstrap)
        if scored.good is not None:
            found["good_signal"] = score_good_signal(scored)
    return found


def scores_with_intervals(truth, prediction, patients) -> dict:
    """`metrics.scores` without the count, and their 95 % intervals over patients as `ci95`."""
    found = metrics.scores(truth, prediction)
    found.pop("n")
    return dict(found, ci95=metrics.confidence_intervals(patients, truth, prediction))


def score_predictions(scored: Segments, bootstrap) -> dict:
    """Scores of the predictions, with 95 % intervals over patients."""
    fields, truth, tpp = scored.fields, scored.truth, scored.tpp
    both = {"tpp": (truth, tpp), "p_crit": (fields["p_crit"], fields["map"] - tpp)}
    found = {
        "n_patients": bootstrap.n_patients, "n_segments": len(scored),
        **{key: scores_with_intervals(*pair, bootstrap) for key, pair in both.items()},
        "per_patient": {"tpp": metrics.patient_scores(bootstrap, truth, tpp),
                        "p_crit_r2": metrics.patient_scores(bootstrap, *both["p_crit"])["r2"]},
        "within_patient": {key: metrics.within_patient_correlation(bootstrap, *pair)
                           for key, pair in both.items()},
        "trend": {key: metrics.trend_concordance(scored.patients, *pair, scored.series)
                  for key, pair in both.items()},
        "detection": metrics.detection(bootstrap, truth, tpp),
        "standards": metrics.standards(bootstrap, truth, tpp),
        "bland_altman": metrics.bland_altman(bootstrap, truth, tpp)}
    if "p_crit_true" in fields:
        true_tpp = fields["map"] - fields["p_crit_true"]
        label = metrics.scores(true_tpp, truth)
        found["true"] = dict(
            scores_with_intervals(true_tpp, tpp, bootstrap),
            p_crit_r2=metrics.scores(fields["p_crit_true"], fields["map"] - tpp)["r2"],
            label={key: label[key] for key in ("rmse", "mae", "mead", "bias", "sd")})
    return found


def score_other(scored: Segments, prediction, bootstrap) -> dict:
    """Scores of another prediction of the same segments, and the network's skill over it."""
    fields, truth, tpp = scored.fields, scored.truth, scored.tpp
    found = dict(
        scores_with_intervals(truth, prediction, bootstrap),
        p_crit_r2=metrics.scores(fields["p_crit"], fields["map"] - prediction)["r2"],
        auc=metrics.roc_area(truth < metrics.LOW_TPP, -prediction),
        skill=metrics.skill(truth, tpp, prediction, bootstrap),
        skill_per_patient=metrics.skill(truth, tpp, prediction, bootstrap, by_patient=True))
    if "p_crit_true" in fields:
        true_tpp = fields["map"] - fields["p_crit_true"]
        found["true_rmse"] = metrics.scores(true_tpp, prediction)["rmse"]
    return found


def skills(others: Dict[str, dict], best: Optional[str]) -> dict:
    """The network's skill over the best baseline, and over the one that turns out best here."""
    if best is None:
        return {"skill": None}
    here = min(others, key=lambda name: others[name]["rmse"])
    return {"skill": dict(others[best]["skill"], over=best),
            "skill_per_patient": dict(others[best]["skill_per_patient"], over=best),
            "skill_in_hindsight": dict(others[here]["skill"], over=here)}


def uncertainty_summary(scored: Segments, bootstrap) -> Optional[dict]:
    """Coverage and width of the intervals, reliability of P(TPP low), unusual inputs."""
    if not scored.intervals:
        return None
    levels = {}
    for level, bounds in scored.intervals.items():
        if isinstance(bounds, str):
            levels[percent(level)] = {"refused": bounds}
        else:
            held = metrics.coverage(bootstrap, scored.truth, *bounds)
            levels[percent(level)] = dict(held, half_width=held["mean_width"] / 2)
    found = {"own_spread": scored.spread is not None, "levels": levels}
    if scored.low_probability is not None:
        found["reliability"] = metrics.reliability(
            bootstrap, scored.truth < metrics.LOW_TPP, scored.low_probability)
    if scored.unusual is not None:
        error = scored.tpp - scored.truth
        found["novelty"] = {
            "expected": 1 - metrics.NOVELTY_LEVEL, "rate": float(scored.unusual.mean()),
            **{name: metrics.rmse(scored.patients[mask], error[mask]) if mask.any() else None
               for name, mask in (("rmse_new", scored.unusual), ("rmse_usual", ~scored.unusual))}}
    return found


def strata(scored: Segments) -> List[dict]:
    """RMSE, bias and coverage of the 90 % interval by ranges of the fields."""
    fields = dict(scored.fields, distance=scored.distance, spread=scored.spread)
    fields["quality"] = fields.get("ppg_quality", fields.get("pulse_quality"))
    fields["irregularity"] = fields.get("beat_irregularity", fields.get("pulse_irregularity"))
    error, interval, found = scored.tpp - scored.truth, scored.intervals.get(0.9), []
    held = None
    if isinstance(interval, tuple):
        held = (interval[0] <= scored.truth) & (scored.truth <= interval[1])
    for key, name, unit, edges in STRATA:
        values = fields.get(key)
        if values is None or not np.isfinite(values).any():
            continue
        if edges is None:
            edges = np.unique(np.nanquantile(values, (0.25, 0.5, 0.75)))
        bounds = [-np.inf, *edges, np.inf]
        for low, high in zip(bounds[:-1], bounds[1:]):
            inside = (values >= low) & (values < high)
            if not inside.any():
                continue
            text = (f"< {high:.4g}" if low == -np.inf else f"≥ {low:.4g}" if high == np.inf
                    else f"{low:.4g} to {high:.4g}")
            found.append({
                "of": name, "range": f"{text} {unit}".strip(), "n_segments": int(inside.sum()),
                "n_patients": len(np.unique(scored.patients[inside])),
                "rmse": metrics.rmse(scored.patients[inside], error[inside]),
                "bias": float(error[inside].mean()),
                "coverage_90": None if held is None else float(np.mean(held[inside]))})
    return found


def spread_over_patients(patients, error) -> dict:
    """Quantiles over the patients of each one's own RMSE, and the share of those below 5 mmHg."""
    _, owner, counts = np.unique(patients, return_inverse=True, return_counts=True)
    own = np.sqrt(np.bincount(owner.ravel(), error ** 2) / counts)
    return {"rmse_quantiles": {percent(share): float(np.quantile(own, share))
                               for share in (0.05, 0.25, 0.5, 0.75, 0.95)},
            "share_below_5": float(np.mean(own < 5))}


def score_good_signal(scored: Segments) -> dict:
    """Scores of the same patients' segments of good signal, whatever the quality of the label.

    The default gate's conditions on r² and Pcrit need the arterial line, and they narrow the range
    of what is predicted.
    """
    good = scored.good
    bootstrap = metrics.PatientBootstrap(good.patients)
    found = {"n_segments": len(good), "n_patients": bootstrap.n_patients,
             "share_kept_by_gate": len(scored) / len(good),
             "tpp": scores_with_intervals(good.truth, good.tpp, bootstrap),
             "p_crit_r2": metrics.scores(good.fields["p_crit"],
                                         good.fields["map"] - good.tpp)["r2"]}
    if good.best is not None:
        found["baseline"] = dict(score_other(good, good.baselines[good.best], bootstrap),
                                 name=good.best)
    return found


# ---------------------------------------------------------------- checks

def check_predictions(scored: Segments, bootstrap) -> dict:
    """Checks of the predictions alone; `problems` puts what is wrong into words."""
    found = {"constant_output": len(scored) > 1 and bool(np.ptp(scored.tpp) < MIN_CHANGE_MMHG)}
    if "start_s" in scored.fields:
        _, gap = metrics.changes(scored.series, scored.fields["start_s"])
        found["overlapping_windows"] = int(np.sum(np.abs(gap) < 59.99))
    if scored.best is not None:
        mixed = np.random.default_rng(0).permutation(len(scored))
        found["skill_with_shuffled_labels"] = metrics.skill(
            scored.truth[mixed], scored.tpp, scored.baselines[scored.best][mixed], bootstrap)
    if scored.swapped is not None:
        found["ignores_ppg"] = bool(np.abs(scored.tpp - scored.swapped).max() < MIN_CHANGE_MMHG)
    return found


def problems(results: dict) -> List[str]:
    """Lines on what the checks found wrong with the scores."""
    checks, found = results["checks"], []
    if checks.get("patients_in_two_parts"):
        found.append(f"{counted(checks['patients_in_two_parts'], 'patient')} in two parts of the "
                     "split: these scores are leaked")
    if checks["constant_output"]:
        found.append("CONSTANT OUTPUT: the network predicts the same TPP for every segment")
    if checks.get("ignores_ppg"):
        found.append("IGNORES THE PPG: it predicts the same with another patient's PPG")
    return found + [f"{number:,} of {counted(results['n_segments'], 'segment')} share seconds of "
                    f"PPG with {name} segments: these scores are leaked"
                    for name, number in checks.get("shared_seconds", {}).items() if number]


# ---------------------------------------------------------------- several runs

class _Joined:
    """The datasets of several runs as one, to read waveforms from."""

    def __init__(self, runs):
        self.runs, self.begins = runs, np.cumsum([0] + [len(run) for run in runs])

    def waveform(self, key, rows):
        which = np.searchsorted(self.begins, rows, side="right") - 1
        return np.concatenate([self.runs[run].dataset.waveform(key, np.array([row - begin]))
                               for run, row, begin in zip(which, rows, self.begins[which])])


def pool(runs: List[Segments]) -> Segments:
    """The predictions of several runs as one set, in which a patient is one patient in whichever
    run: folds become all patients, seeds repeats of the same ones."""
    def joined(name):
        """{key: [all segments]} of what every run has."""
        found = [getattr(run, name) for run in runs]
        return {key: np.concatenate([one[key] for one in found])
                for key in found[0] if all(key in one for one in found)}

    def optional(name):
        found = [getattr(run, name) for run in runs]
        return None if any(one is None for one in found) else np.concatenate(found)

    names = np.concatenate([run.names for run in runs])
    begins = np.cumsum([0] + [run.series.max() + 1 for run in runs])
    pooled = Segments(
        joined("fields"), np.unique(names, return_inverse=True)[1].ravel(),
        np.concatenate([run.series + begin for run, begin in zip(runs, begins)]), names,
        _Joined(runs), baselines=joined("baselines"), compared=joined("compared"),
        **{name: optional(name) for name in ("tpp", "spread", "distance", "unusual",
                                             "low_probability", "swapped")})
    for level in runs[0].intervals:
        bounds = [run.intervals.get(level, "not calibrated") for run in runs]
        refused = [one for one in bounds if isinstance(one, str)]
        pooled.intervals[level] = (refused[0] if refused
                                   else tuple(map(np.concatenate, zip(*bounds))))
    if all(run.best is not None for run in runs):
        pooled.best = EACH_BEST
        pooled.baselines[EACH_BEST] = np.concatenate([run.baselines[run.best] for run in runs])
    if all(run.good is not None for run in runs):
        pooled.good = pool([run.good for run in runs])
    return pooled
