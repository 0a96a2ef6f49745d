"""Score a trained network: scores with intervals, baselines, JSON, report page, model card.

    python evaluate.py runs/M1.5.pth                        # the run's own data, its test patients
    python evaluate.py runs/M1.5.pth --report report.html   # everything, as one page
    python evaluate.py runs/M1.5.pth --data FILE…           # other data: all patients
    python evaluate.py runs/icu_fold?.pth --report icu.html # several runs: each, and all together
    python evaluate.py runs/M1.5.pth --calibrate FILE…      # prediction intervals for other data

From Python: `evaluate(model_or_path, index)` returns the results as a dictionary. MAP is an input
and part of TPP, so TPP has the same error as Pcrit, and R² of TPP is inflated. Needs metrics.py,
baselines.py, report.py, templates/, training_header.py and what that needs.
"""
import json
import os
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Dict, List, Optional, Tuple

import joblib
import numpy as np

import baselines
import checkpoint as checkpoints
import datasets
import metrics
import report
import tk_utils
from anchor import PULSE_STATISTICS, kept_shares, read_pulse, subsample
from datasets import DataError, DatasetIndex, TPP_PPG_dataset, create_dataset_index
from report import percent
from tk_utils import counted
from training_header import LOSSES, TrainingError, choose_device, load_model, predict_with_spread

SCORED = ["map", "p_crit", "tpp"]           # fields that scoring needs
MAX_BASELINE_SEGMENTS = 100_000             # of each part, to fit baselines to: more adds nothing
MAX_HASHED_SEGMENTS = 200_000               # of each part, to search for shared seconds
MIN_CHANGE_MMHG = 0.01                      # predictions that vary by less are constant
# Runs that train_resnet.py --ablate trains in addition, by the endings of their names.
ABLATIONS = {"_no_ppg": "model without the PPG", "_no_vitals": "model without vitals"}
PROBLEMS = {    # messages of failed checks
    "patients_in_two_parts": "{:,} patients are in two parts of the split: these scores are leaked",
    "constant_output": "CONSTANT OUTPUT: the model predicts the same TPP for every segment",
    "ignores_ppg": "IGNORES THE PPG: it predicts the same with another patient's PPG"}
MAY_DIFFER = ("seed", "split_seed", "fold", "folds", "processes", "keys")   # between repeats
STRATA = (      # field, name, unit, inner edges (None: quartiles)
    ("tpp", "TPP", "mmHg", (20, 34, 50)), ("map", "MAP", "mmHg", (65, 74, 90)),
    ("hr", "Heart rate", "/min", (60, 80, 100)), ("pp", "Pulse pressure", "mmHg", (40, 60, 80)),
    ("r2", "Label's r²", "", (0.7, 0.8, 0.9)), ("ppg_quality", "PPG quality", "", None),
    ("beat_irregularity", "Beat irregularity", "", (0.05, 0.1, 0.2)),
    ("spread", "Network's own SD", "mmHg", None))


def parse_args(arguments=None):
    parser = tk_utils.ScriptParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("checkpoints", nargs="+", metavar="checkpoint",
                        help="runs/<name>.pth; several (seeds, folds): scored each and together")
    add = parser.add_argument_group("what is scored").add_argument
    add("--data", nargs="+", metavar="FILE",
        help="HDF5 files; default: the run's own, from runs/<name>/run.json")
    add("--split", choices=("test", "tune", "train", "all"),
        help="patients to score; default: test on the run's data, else all")
    add("--condition", nargs="+", metavar="GATE", help="quality gate; default: the run's own")
    add("--model", metavar="FILE.py:NAME", help="your own network, as in train_resnet.py --model")
    add("--calibrate", nargs="+", metavar="FILE",
        help="fit the prediction intervals to the patients here that the run has not used, and "
             "store them in the checkpoint")
    add = parser.add_argument_group("output").add_argument
    add("--json", metavar="FILE.json", help="also write the scores here")
    add("--report", metavar="FILE.html",
        help="write everything as one page, with figures_resnet/ and runs/<name>/card.md")
    options = parser.parse_args(arguments)
    for path, suffix in ((options.report, ".html"), (options.json, ".json")):
        if path and not path.lower().endswith(suffix):
            parser.error(f"{path}: expected a file name that ends in {suffix}")
    return options


def main() -> None:
    options = parse_args()
    paths = options.checkpoints
    for path in filter(None, (options.report, options.json)):
        tk_utils.check_writable(path)
    if options.calibrate:
        for path in paths:
            calibrate(path, options.calibrate, options.condition, options.model)
        if not options.data:
            return
    settings = {"data": options.data, "split": options.split, "condition": options.condition,
                "network": options.model, "full": bool(options.report)}
    if len(paths) > 1:
        results, segments = compare_runs(paths, **settings)
    else:
        results, segments = evaluate_with_arrays(paths[0], **settings)
    if options.json:        # before anything that a closed pipe (`| head`) could end
        tk_utils.write_json(options.json, results)
    if len(paths) == 1:
        report.print_results(results)
    if options.report:
        report.write_report(results, segments, options.report,
                            {path: checkpoints.load_checkpoint(path) for path in paths})


# ---------------------------------------------------------------- the data

@dataclass
class Segments:
    """N segments and their predictions: arrays [N], in mmHg."""
    fields: Dict[str, np.ndarray]           # also 'spread' (predicted SD), 'swapped' (other PPG)
    patients: np.ndarray                    # numbers
    series: np.ndarray                      # numbers of uninterrupted series of minutes
    names: np.ndarray                       # patients' names, the same in all runs
    dataset: Any = None
    tpp: Optional[np.ndarray] = None        # predictions of the model
    baselines: Dict[str, np.ndarray] = field(default_factory=dict)      # predictions, by name
    compared: Dict[str, np.ndarray] = field(default_factory=dict)       # of the runs of --ablate
    best: Optional[str] = None              # name of the best baseline, by cross-validation
    minutes: Optional[np.ndarray] = None    # numbers, if several runs may predict the same minute
    intervals: Dict[float, Any] = field(default_factory=dict)   # by level: (low, high) or a reason

    def __len__(self):
        return len(self.patients)

    @property
    def truth(self) -> np.ndarray:
        return self.fields["tpp"]

    def count(self, rows) -> int:
        """The number of different minutes in rows, a mask [N]."""
        return int(rows.sum()) if self.minutes is None else len(np.unique(self.minutes[rows]))


def choose_segments(path, checkpoint, data, split, condition):
    """([index to score, index of the train patients, index of the tune patients], {'split',
    'problems'}, number of patients that --calibrate used). The last two indices are None if the
    run's data are not here. data: the files; None: those of the run."""
    run, problems = read_run(path), []
    if data is None and not run:
        raise DataError(f"{path}: no record here of its data; name them with --data")
    files = tk_utils.find_files(data or run["data"])
    own_data = data is None or {*map(os.path.realpath, files)} == {*run.get("data", ())}
    index, parts, salt_path = read_parts(path, checkpoint, files, condition)
    split = split or ("test" if own_data else "all")
    if parts is None:
        if own_data or split != "all":
            raise DataError(f"{salt_path}: cannot identify the patients without this run's salt")
        problems = ["overlap with the training data NOT CHECKED"]
        parts = np.full(index.n_patients, "")
    chosen = (parts == split) | (split == "all")
    if not chosen.any():
        raise DataError(f"no {split} patient of the checkpoint is in these data; try --split all")
    seen = int(np.isin(parts[chosen], checkpoints.SEEN).sum())
    if seen:
        problems = [f"{seen:,} of {counted(np.sum(chosen), 'patient')} WERE SEEN IN TRAINING this "
                    "checkpoint: these scores are too good, and not a test of it"]
    scored, train, tune = index.select(chosen[index.encounter_patient]), None, None
    TPP_PPG_dataset(scored, "segment", SCORED)              # raises if one of them is absent
    calibrated = int(np.sum(parts[chosen] == "calibration"))
    if not own_data and run and all(map(os.path.exists, run["data"])):
        index, parts, _ = read_parts(path, checkpoint, run["data"])
    if parts is not None and np.isin(["train", "tune"], parts.tolist()).all():
        train, tune = (index.select((parts == name)[index.encounter_patient])
                       for name in ("train", "tune"))
    return [scored, train, tune], {"split": split, "problems": problems}, calibrated


def read_parts(path, checkpoint, files, condition=None):
    """(index of the files, the part of the run that each patient was in or None, the salt)."""
    condition = condition or checkpoints.run_of(checkpoint).condition
    index = create_dataset_index(condition=condition, path=files)
    salt_path = read_run(path).get("salt_file") or checkpoints.default_salt_path(files[0])
    return index, checkpoints.patient_parts(index, checkpoint, salt_path), salt_path


def read_run(path) -> dict:
    """The record of a checkpoint's run on this machine (private: where its data are), or {}."""
    record = Path(tk_utils.RunFiles(os.path.splitext(path)[0]).run)
    return json.loads(record.read_text(encoding="utf-8")) if record.exists() else {}


def read_segments(index: DatasetIndex, keys, most=np.inf) -> Segments:
    """Read what baselines, strata and scores need, including the pulse statistics."""
    dataset = subsample(TPP_PPG_dataset(index, "segment", keys), most)
    index, fields = dataset.index, {}
    for key in dict.fromkeys((*datasets.VITALS, *datasets.LABELS, *datasets.vitals_of(keys),
                              *(row[0] for row in STRATA), "p_crit_true")):
        try:
            index.sources(key)
        except DataError:           # an encounter lacks it
            continue
        fields[key] = dataset.column(key).numpy().astype(np.float64)
    fields.update(zip(PULSE_STATISTICS, read_pulse(dataset).T))
    patients = index.segment_patients()
    encounter = index.per_segment(np.arange(len(index.encounters)))
    start_s = (dataset.column("start_s").numpy() if "start_s" in index.fields
               else index.rows * datasets.SEGMENT_SECONDS)
    follows = (np.diff(encounter) == 0) & (np.diff(index.rows) == 1) & (
        np.diff(start_s) < 2 * datasets.SEGMENT_SECONDS)
    return Segments(fields, patients, np.append(0, np.cumsum(~follows)), index.patients[patients],
                    dataset)


def joined(dicts: List[Dict[str, np.ndarray]]) -> Dict[str, np.ndarray]:
    """Concatenate the arrays whose key is in all dictionaries."""
    return {key: np.concatenate([arrays[key] for arrays in dicts]) for key in dicts[0]
            if all(key in arrays for arrays in dicts)}


# ---------------------------------------------------------------- what the network predicts

def predict_tpp(model, dataset, device=None):
    """(TPP [N], predicted SD [N] or None), in mmHg."""
    estimate, spread = predict_with_spread(model, dataset, device=device)
    tpp = estimate.astype(np.float64)
    if model.keys[-1] == "p_crit":
        tpp = dataset.column("map").numpy().astype(np.float64) - tpp
    absurd = np.flatnonzero(~(np.abs(tpp) <= metrics.MAX_TPP))
    if len(absurd):
        raise DataError(f"{dataset.place(absurd[0])}: the network predicts {tpp[absurd[0]]:.4g} "
                        f"mmHg; {len(absurd):,} of {len(tpp):,} are beyond ± {metrics.MAX_TPP:g}")
    return tpp, spread


def predict_segments(model, segments: Segments, calibration, device) -> None:
    """Add predictions and their intervals to segments."""
    refusal = report.domain_refusal(calibration, **checkpoints.domain_of(segments.dataset.index))
    segments.tpp, spread = predict_tpp(model, segments.dataset, device)
    if spread is not None:
        segments.fields["spread"] = spread
    for level in calibration.get("levels", ()):
        try:
            found = metrics.interval(segments.tpp, calibration, level, spread)
            segments.intervals[level] = refusal or found
        except ValueError as reason:
            segments.intervals[level] = str(reason)


def predict_with_swapped_ppg(model, segments: Segments, device) -> None:
    """Add 'swapped' to the fields: predictions from each segment's vitals and another patient's
    PPG. Does nothing if one patient has more than half of the segments."""
    count, most = len(segments), np.bincount(segments.patients).max()
    if 2 * most > count:
        return
    order = np.random.default_rng(0).permutation(count)
    order = order[np.argsort(segments.patients[order], kind="stable")]
    donor = np.empty(count, np.int64)
    # in an order sorted by patient, this shift always reaches another patient
    donor[order] = np.roll(order, most)

    class SwappedPPG(TPP_PPG_dataset):
        def waveform(self, key, segments):
            return super().waveform(key, donor[segments])

    dataset = SwappedPPG(segments.dataset.index, "segment", model.keys)
    segments.fields["swapped"] = predict_tpp(model, dataset, device)[0]


def predict_ablations(path, split, index, device, network) -> Dict[str, np.ndarray]:
    """{name in tables: TPP [N]} by the runs that --ablate trained on the same split."""
    found = {}
    for ending, name in ABLATIONS.items():
        other = os.path.splitext(path)[0] + ending + ".pth"
        saved = checkpoints.load_checkpoint(other) if os.path.exists(other) else None
        theirs = checkpoints.run_of(saved).split
        if theirs and all(theirs[part] == split.get(part) for part in datasets.PARTS):
            model = load_model(saved, device, network)
            dataset = TPP_PPG_dataset(index, "segment", model.keys)
            found[name] = predict_tpp(model, dataset, device)[0]
    return found


def make_calibration(model, tune, device=None) -> dict:
    """Calibration of the prediction intervals, to store in a checkpoint: plain numbers and lists.
    tune: a `TPP_PPG_dataset` with the model's keys."""
    estimate, spread = predict_with_spread(model, tune, device=device)
    error = estimate - tune.column(model.keys[-1]).numpy()      # TPP and Pcrit: same size
    found = metrics.fit_calibration(error, tune.index.segment_patients(), spread)
    return dict(found, **checkpoints.domain_of(tune.index))


def calibrate(path, data, condition=None, network=None, device=None) -> dict:
    """Fit a checkpoint's prediction intervals to the patients of `data` that it was neither trained
    nor tested on, and store them in it. Returns the new calibration."""
    saved, files = checkpoints.load_checkpoint(path), tk_utils.find_files(data)
    model, split = load_model(saved, device, network), dict(checkpoints.run_of(saved).split)
    index, parts, salt_path = read_parts(path, saved, files, condition)
    if parts is not None:
        free = ~np.isin(parts, [*checkpoints.SEEN, "test"])
        if not free.any():
            raise DataError(f"{files[0]}: intervals need patients that this run has not used "
                            "(to train, tune or test)")
        split["calibration"] = checkpoints.hash_patients(
            index.patients[free].tolist(), checkpoints.read_salt(salt_path))
        index = index.select(free[index.encounter_patient])
    found = make_calibration(model, TPP_PPG_dataset(index, "segment", model.keys), device)
    checkpoints.save_tensors(path, dict(saved, calibration=found, split=split))
    print(f"{path}: intervals calibrated on {counted(found['n_segments'], 'segment')} of "
          f"{counted(found['n_patients'], 'patient')} ({found['origin']})")
    return found


# ---------------------------------------------------------------- the evaluation

def evaluate(model_or_path, index=None, **options) -> dict:
    """The results of `evaluate_with_arrays`. Prints its problems as warnings on stderr."""
    results = evaluate_with_arrays(model_or_path, index, **options)[0]
    for line in results["problems"]:
        print(f"WARNING: {line}", file=sys.stderr)
    return results


def evaluate_with_arrays(model_or_path, index=None, *, data=None, split=None, condition=None,
                         train=None, tune=None, fitted: Optional[dict] = None, device=None,
                         full=False, network=None) -> Tuple[dict, Segments]:
    """Score a model: (results for the JSON, scored segments for the figures).

    model_or_path: a `NormalisedModel` or the path of a checkpoint (network: its architecture, if it
    is your own). index: the segments to score, a `DatasetIndex` or dataset; by default the patients
    `split` of the files `data` (default: of the run) that pass the gate `condition`. train, tune:
    the run's own parts, for baselines, calibration and checks. fitted: a dict that caches baselines
    and results; pass the same one to several calls. full: also compute what only the report shows.
    """
    fitted, device = {} if fitted is None else fitted, choose_device(device)
    path = None if hasattr(model_or_path, "keys") else os.fspath(model_or_path)
    model = load_model(path, device, network) if path else model_or_path
    run = checkpoints.run_of(model.checkpoint)
    if index is not None:
        parts = [getattr(part, "index", part) for part in (index, train, tune)]
        about, calibrated = {"split": split or "given", "problems": []}, 0
    elif path:
        parts, about, calibrated = choose_segments(path, model.checkpoint, data, split, condition)
    else:
        raise DataError("a model in memory needs the index of the segments to score")
    scored, train, tune = parts
    calibration = run.calibration
    if not calibration and train is not None and not (model.anchor or {}).get("refitted"):
        calibration = make_calibration(model, TPP_PPG_dataset(tune, "segment", model.keys), device)
    segments = read_segments(scored, model.keys)
    add_baselines(segments, train, tune, model.keys, fitted)
    predict_segments(model, segments, calibration, device)
    if path:
        segments.compared = predict_ablations(path, run.split, scored, device, network)
    if full and model.with_ppg:
        predict_with_swapped_ppg(model, segments, device)

    origin, method = checkpoints.domain_of(scored).values()
    if len({*run.label_method.split(", "), *method.split(", ")} - {"unknown"}) > 1:
        about["problems"].append(
            f"labels by the method {method}, but the model was trained on {run.label_method}")
    results = {
        "checkpoint": os.path.basename(path) if path else "model in memory", **about,
        "date": time.strftime("%Y-%m-%d"), "keys": list(model.keys),
        "condition": scored.condition, "origin": origin, "simulated": "simulated" in origin,
        "note": tk_utils.simulated_note(origin, run.origin),
        "loss_label": getattr(LOSSES.get(run.loss), "label",
                              f"Loss, {run.loss.rpartition(':')[2]}"),
        "shares": kept_shares(model.anchor),
        "n_train_patients": len(run.split["train"]) if run.split else train and train.n_patients,
        "n_tune_patients": len(run.split["tune"]) if run.split else tune and tune.n_patients,
        **score_all(segments, full)}
    results["checks"].update(check_parts(run.split, scored, train, tune))
    if calibration:
        results["uncertainty"].update(
            n_calibration_patients=calibration["n_patients"], n_patients_of_calibration=calibrated)
    results["problems"] += problem_lines(results["checks"], results["shares"])
    if path:
        fitted[path, full] = results, segments
    return results, segments


def add_baselines(segments: Segments, train, tune, keys, fitted: dict) -> None:
    """Add the baselines' predictions. `fitted` caches the baselines of these train and tune data.
    """
    if train is None or tune is None:
        print("no baselines: the data of the train patients are not here")
        return
    vitals = datasets.vitals_of(keys)
    key = joblib.hash((vitals, sorted(segments.fields), train, tune))
    if key not in fitted:
        known = [read_segments(part, keys, MAX_BASELINE_SEGMENTS) for part in (train, tune)]
        left_out = baselines.left_out_baselines(vitals, segments.fields,
                                                *(part.fields for part in known))
        for name, reason in left_out.items():
            print(f"baseline {name} left out: {reason}")
        fitted[key] = baselines.fit_baselines(
            joined([part.fields for part in known]),
            np.concatenate([part.names for part in known]), vitals, left_out)
    segments.best = baselines.choose_best(fitted[key])
    segments.baselines = {name: baseline.predict(segments.fields)
                          for name, baseline in fitted[key].items()}


# ---------------------------------------------------------------- scores

def score_all(scored: Segments, full: bool = False) -> dict:
    """All scores of the predictions. full: also what only the report shows."""
    patients = metrics.PatientBootstrap(scored.patients)
    fields, truth, tpp = scored.fields, scored.truth, scored.tpp
    both = {"tpp": (truth, tpp), "p_crit": (fields["p_crit"], fields["map"] - tpp)}
    own = {key: metrics.confidence_intervals(patients, *pair, by_patient=True)
           for key, pair in both.items()}
    found = {
        "n_patients": patients.n_patients, "n_predictions": len(scored),
        "n_segments": scored.count(np.full(len(scored), True)),
        **{key: scores_with_intervals(patients, *pair) for key, pair in both.items()},
        "per_patient": {"tpp": own["tpp"], "p_crit_r2": own["p_crit"]["r2"]},
        "within_patient": {key: metrics.within_patient_correlation(patients, *pair)
                           for key, pair in both.items()},
        "trend": {key: metrics.trend_concordance(scored.patients, *pair, scored.series)
                  for key, pair in both.items()},
        "detection": dict(metrics.detection(patients, truth, tpp),
                          n_low=scored.count(truth < metrics.LOW_TPP)),
        "standards": metrics.standards(patients, truth, tpp),
        "bland_altman": metrics.bland_altman(patients, truth, tpp),
        "uncertainty": {"levels": {
            percent(level): {"refused": bounds} if isinstance(bounds, str) else
            metrics.coverage(patients, truth, *bounds)
            for level, bounds in scored.intervals.items()}},
        "checks": {"constant_output": len(scored) > 1 and bool(np.ptp(tpp) < MIN_CHANGE_MMHG)},
        **{key: {name: score_other(scored, prediction, patients)
                 for name, prediction in getattr(scored, key).items()}
           for key in ("baselines", "compared")}, "skill": None}
    if "p_crit_true" in fields:
        true = fields["map"] - fields["p_crit_true"]
        found["true"] = dict(scores_with_intervals(patients, true, tpp),
                             label=metrics.scores(true, truth))
    if scored.best is not None:
        others = found["baselines"]
        here = min(others, key=lambda name: others[name]["rmse"])
        found.update(skill=dict(others[scored.best]["skill"], over=scored.best),
                     skill_in_hindsight=dict(others[here]["skill"], over=here))
    if full:
        found["strata"] = strata(scored)
        rmse = np.sqrt(patients.per_patient((tpp - truth) ** 2) / patients.counts)
        found["patients"] = {"rmse_quantiles": {percent(share): float(np.quantile(rmse, share))
                                                for share in (0.05, 0.25, 0.5, 0.75, 0.95)}}
        if "swapped" in fields:
            found["swapped_ppg"] = score_other(scored, fields["swapped"], patients)
            change = np.abs(tpp - fields["swapped"]).max()
            found["checks"]["ignores_ppg"] = bool(change < MIN_CHANGE_MMHG)
    return found


def scores_with_intervals(patients, truth, prediction) -> dict:
    """`metrics.scores`, and `ci95`, their 95 % intervals over patients."""
    found = metrics.confidence_intervals(patients, truth, prediction)
    return dict(metrics.scores(truth, prediction),
                ci95={name: (score["low"], score["high"]) for name, score in found.items()})


def score_other(scored: Segments, prediction, patients) -> dict:
    """Scores of another prediction of the same segments, and the model's skill over it."""
    fields, truth, tpp = scored.fields, scored.truth, scored.tpp
    return dict(
        scores_with_intervals(patients, truth, prediction),
        p_crit_r2=metrics.scores(fields["p_crit"], fields["map"] - prediction)["r2"],
        skill=metrics.skill(truth, tpp, prediction, patients),
        skill_per_patient=metrics.skill(truth, tpp, prediction, patients, by_patient=True))


def strata(scored: Segments) -> List[dict]:
    """RMSE, bias and coverage of the 90 % interval by ranges of the fields."""
    error, interval, found = scored.tpp - scored.truth, scored.intervals.get(0.9), []
    held = (interval[0] <= scored.truth) & (scored.truth <= interval[1]) if isinstance(
        interval, tuple) else None
    for key, name, unit, edges in STRATA:
        values = scored.fields.get(key)
        if values is None or not np.isfinite(values).any():
            continue
        if edges is None:
            edges = np.unique(np.nanquantile(values, (0.25, 0.5, 0.75)))
        for low, high in zip([-np.inf, *edges], [*edges, np.inf]):
            inside = (values >= low) & (values < high)
            text = (f"< {high:.4g}" if low == -np.inf else f"≥ {low:.4g}" if high == np.inf
                    else f"{low:.4g} to {high:.4g}")
            if inside.any():
                found.append({
                    "of": name, "range": f"{text} {unit}".strip(),
                    "n_segments": scored.count(inside),
                    "n_patients": len(np.unique(scored.patients[inside])),
                    "rmse": metrics.rmse(scored.patients[inside], error[inside]),
                    "bias": float(error[inside].mean()),
                    "coverage_90": None if held is None else float(np.mean(held[inside]))})
    return found


def check_parts(split, scored, train, tune) -> dict:
    """Count patients in two parts of the split, and scored segments that share a second of PPG
    with train or tune segments."""
    found = {}
    if split:
        of_train, of_tune, of_test = (set(split.get(part, ())) for part in datasets.PARTS)
        seen = checkpoints.seen_by({"split": split})
        found["patients_in_two_parts"] = len(of_train & of_tune | of_test & seen)
    if train is not None:
        ours = second_hashes(scored)
        found["shared_seconds"] = {
            name: int((np.isin(ours, second_hashes(part)) & (ours != 0)).any(axis=1).sum())
            for name, part in (("train", train), ("tune", tune))}
    return found


def second_hashes(index: DatasetIndex) -> np.ndarray:
    """[S, seconds]: a hash of each second of PPG, the same in overlapping windows; 0 if flat."""
    factors = np.random.default_rng(1).integers(1, 2 ** 63, datasets.FS).astype(np.uint64) * 2 + 1
    dataset = subsample(TPP_PPG_dataset(index, "segment", ["ppg"]), MAX_HASHED_SEGMENTS)
    hashes = []
    blocks = np.array_split(np.arange(len(dataset)), -(-len(dataset) // 512))
    for block in tk_utils.progress(blocks, desc="comparing PPG", leave=False):
        ppg = dataset.waveform("ppg", block)
        bits = np.ascontiguousarray(ppg).view(np.uint32)
        bits = bits.reshape(len(ppg), datasets.SEGMENT_SECONDS, -1)
        flat = (bits == bits[..., :1]).all(axis=2)
        hashes.append(np.where(flat, 0, (bits * factors).sum(axis=2)))
    return np.concatenate(hashes)


def problem_lines(checks: dict, shares: Optional[dict] = None) -> List[str]:
    """Messages of failed checks, and a warning if the blend left the network out."""
    return report.influence_lines(shares) + [
        text.format(checks[key]) for key, text in PROBLEMS.items() if checks.get(key)] + [
        f"{counted(number, 'segment')} with seconds of PPG that are also in {name} segments: these "
        "scores are leaked" for name, number in checks.get("shared_seconds", {}).items() if number]


# ---------------------------------------------------------------- several runs

def compare_runs(paths, **options) -> Tuple[dict, Segments]:
    """Score several runs, such as seeds or folds: ({'runs', 'together'}, all segments). options: of
    `evaluate_with_arrays`; runs that `fitted` holds are not scored again."""
    fitted, full = options.setdefault("fitted", {}), options.get("full", False)
    found = [fitted.get((path, full)) or evaluate_with_arrays(path, **options) for path in paths]
    runs = [results for results, _ in found]
    tk_utils.print_table(*report.runs_table(runs))
    segments = pool([segments for _, segments in found])
    pooled = {
        **{key: runs[0][key] for key in ("date", "split", "keys", "condition", "loss_label")},
        "checkpoint": f"{len(runs)} runs", "n_train_patients": None, "shares": None,
        "origin": ", ".join(sorted({run["origin"] for run in runs})),
        "simulated": any(run["simulated"] for run in runs),
        "note": "; ".join(sorted({run["note"] for run in runs if run["note"]})) or None,
        "problems": differences(paths) + [
            line if n == len(runs) else f"{line} ({n} of {len(runs)} runs)" for line, n in
            Counter(line for run in runs for line in run["problems"]).items()],
        **score_all(segments, full)}
    print(f"\nall predictions of the {len(runs)} runs together:")
    report.print_results(pooled)
    return {"runs": runs, "together": pooled}, segments


def differences(paths) -> List[str]:
    """[A warning that names what differs between runs, apart from seeds and folds], or []."""
    recipes = [{"inputs": saved["keys"][:-1], "label": saved["keys"][-1], "model": saved["spec"],
                "data": saved["provenance"].get("data_fingerprint"), **saved["config"]}
               for saved in map(checkpoints.load_checkpoint, paths)]
    names = [key for key in dict.fromkeys(key for recipe in recipes for key in recipe)
             if key not in MAY_DIFFER and len({str(recipe.get(key)) for recipe in recipes}) > 1]
    if not names:
        return []
    return [f"these runs differ in {', '.join(names).replace('_', ' ')}: their mean says nothing "
            "about any of them"]


def pool(runs: List[Segments]) -> Segments:
    """Put the predictions of several runs together; patients are matched by name."""
    names = np.concatenate([run.names for run in runs])
    begins = np.cumsum([0] + [run.series.max() + 1 for run in runs])
    pooled = Segments(
        joined([run.fields for run in runs]), np.unique(names, return_inverse=True)[1],
        np.concatenate([run.series + begin for run, begin in zip(runs, begins)]), names,
        tpp=np.concatenate([run.tpp for run in runs]),
        baselines=joined([run.baselines for run in runs]),
        compared=joined([run.compared for run in runs]))
    for level in runs[0].intervals:
        bounds = [run.intervals.get(level, "not calibrated") for run in runs]
        refused = [bound for bound in bounds if isinstance(bound, str)]
        pooled.intervals[level] = (refused[0] if refused else
                                   tuple(map(np.concatenate, zip(*bounds))))
    if all(run.best is not None for run in runs):
        pooled.best = "each run's best baseline"
        pooled.baselines[pooled.best] = np.concatenate([run.baselines[run.best] for run in runs])
    # the same minute in several runs: of one patient, with the same TPP and MAP
    same = np.stack([pooled.patients, pooled.truth, pooled.fields["map"]])
    pooled.minutes = np.unique(same, axis=1, return_inverse=True)[1].ravel()
    return pooled


if __name__ == "__main__":
    sys.exit(tk_utils.run_script(main, checkpoints.CheckpointError, DataError, TrainingError))
