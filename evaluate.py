"""A trained network and data -> scores with intervals, baselines, JSON, report page, model card.

    python evaluate.py runs/M1.5.pth                        # the run's own data, its test patients
    python evaluate.py runs/M1.5.pth --report report.html   # everything, as one page
    python evaluate.py runs/M1.5.pth --data FILE…           # other data: all patients not seen
    python evaluate.py runs/icu_fold?.pth --report icu.html # several runs: each, and all together
    python evaluate.py runs/M1.5.pth --calibrate FILE…      # prediction intervals for other data

From Python: `evaluate(model_or_path, index)` returns the results as a dictionary.

TPP = MAP - Pcrit and MAP is an input, so the error of TPP is the error of Pcrit, while R² of TPP is
inflated by the spread of MAP: read R² of Pcrit, and the skill over the baselines.

Needs training_header.py and what that needs, metrics.py, baselines.py, signals.py, report.py and
templates/.
"""
import json
import os
import sys
import time
from dataclasses import dataclass, field
from typing import Any, Dict, List, Optional, Tuple

import numpy as np
import pandas as pd

import baselines
import datasets
import metrics
import report
import tk_utils
from checkpoint import (
    CheckpointError,
    default_salt_path,
    load_checkpoint,
    patient_parts,
    read_salt,
    save_tensors,
)
from datasets import DataError, DatasetIndex, TPP_PPG_dataset, create_dataset_index
from report import percent
from signals import PPG_FEATURES, ppg_features
from tk_utils import counted
from training_header import (
    LOSSES,
    TrainingError,
    choose_device,
    load_model,
    predict_with_spread,
)

SPLITS = ("test", "tune", "train", "all")
SCORED = ["map", "p_crit", "tpp"]           # fields without which there are no scores
MAX_BASELINE_SEGMENTS = 100_000             # train segments for the baselines: more adds nothing
MAX_NOVELTY_SEGMENTS = 20_000               # train segments that define usual inputs
MAX_HASHED_SEGMENTS = 200_000               # segments of a part searched for shared seconds
MAX_TPP_MMHG = 500                          # a network that exceeds this is broken
MIN_CHANGE_MMHG = 0.01                      # predictions that vary by less are constant
# Runs that train_resnet.py --ablate trains in addition, by the endings of their names.
ABLATIONS = {"_no_ppg": "network without the PPG", "_no_vitals": "network without vitals"}
EACH_BEST = "each run's best baseline"
STRATA = (      # fields (the first that is there), name, unit, inner edges or None for quarters
    (("tpp",), "TPP", "mmHg", (20, 34, 50)), (("map",), "MAP", "mmHg", (65, 74, 90)),
    (("hr",), "Heart rate", "/min", (60, 80, 100)),
    (("pp",), "Pulse pressure", "mmHg", (40, 60, 80)),
    (("r2",), "Label's r²", "", (0.7, 0.8, 0.9)),
    (("ppg_quality", "pulse_quality"), "PPG quality", "", None),
    (("beat_irregularity", "pulse_irregularity"), "Beat irregularity", "", (0.05, 0.1, 0.2)),
    (("distance",), "Distance from training inputs", "", None),
    (("spread",), "Network's own SD", "mmHg", None))


def parse_args(arguments=None):
    parser = tk_utils.ScriptParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("checkpoints", nargs="+", metavar="checkpoint",
                        help="runs/<name>.pth, as train_resnet.py writes it; several (seeds, "
                             "folds): each, mean ± SD, and all predictions together")
    add = parser.add_argument_group("what is scored").add_argument
    add("--data", nargs="+", metavar="FILE",
        help="HDF5 files; default: those of the run, from runs/<name>/run.json")
    add("--split", choices=SPLITS,
        help="patients to score; default: test on the run's data, else all")
    add("--condition", nargs="+", metavar="GATE", help="quality gate; default: that of the run")
    add("--model", metavar="FILE.py:NAME", help="your own network, as in train_resnet.py --model")
    add("--calibrate", nargs="+", metavar="FILE",
        help="fit the prediction intervals on the patients of these files and store them in the "
             "checkpoint; needed where the data are not like those of training")
    add = parser.add_argument_group("output").add_argument
    add("--json", metavar="FILE.json", help="also write the scores here")
    add("--report", metavar="FILE.html",
        help="write the whole evaluation as one page, its figures as PNG and PDF into "
             "figures_resnet/, and the model card runs/<name>/card.md")
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
        report.print_results(results)
    if options.report:
        report.write_report(results, segments, options.report,
                            {path: load_checkpoint(path) for path in paths})
    if options.json:
        tk_utils.write_json(options.json, results)


# ---------------------------------------------------------------- the data

@dataclass
class Segments:
    """N segments and what is predicted of them, in mmHg; what is not known stays None or empty."""
    fields: Dict[str, np.ndarray]           # {name: [N] float64}
    patients: np.ndarray                    # [N] numbers
    series: np.ndarray                      # [N] numbers of the encounters
    names: np.ndarray                       # [N] patients' names, to recognise them in several runs
    dataset: Any = None                     # to read their PPG
    tpp: Optional[np.ndarray] = None        # [N] predictions
    spread: Optional[np.ndarray] = None     # [N] the network's own SD
    baselines: Dict[str, np.ndarray] = field(default_factory=dict)      # {name: [N]}
    compared: Dict[str, np.ndarray] = field(default_factory=dict)       # of --ablate, {name: [N]}
    best: Optional[str] = None              # the baseline that was best on the tune patients
    intervals: Dict[float, Any] = field(default_factory=dict)   # by level: (low, high), or why not
    distance: Optional[np.ndarray] = None   # [N] from the training inputs
    unusual: Optional[np.ndarray] = None    # [N] bool
    swapped: Optional[np.ndarray] = None    # [N] predictions from the PPG of another patient
    good: Optional["Segments"] = None       # of the same patients, all of good signal (gate 'any')
    runs: Tuple["Segments", ...] = ()       # of several runs together: theirs

    def __len__(self):
        return len(self.patients)

    @property
    def truth(self) -> np.ndarray:
        return self.fields["tpp"]

    def waveform(self, rows) -> np.ndarray:
        """PPG [rows, samples]."""
        if not self.runs:
            return self.dataset.waveform("ppg", rows).reshape(len(rows), -1)
        ends = np.cumsum([len(run) for run in self.runs])
        which = np.searchsorted(ends, rows, side="right")
        return np.concatenate([self.runs[k].waveform(np.array([row - ends[k] + len(self.runs[k])]))
                               for k, row in zip(which, rows)])


@dataclass
class Fitted:
    """What several evaluations share, so that nothing is done twice: pass the same object to each.

    Indexes by files and gate, PPG features by a segment's PPG, baselines by train patients, results
    by checkpoint.
    """
    indexes: dict = field(default_factory=dict)
    features: dict = field(default_factory=dict)
    baselines: dict = field(default_factory=dict)
    results: dict = field(default_factory=dict)

    def index(self, files, condition) -> DatasetIndex:
        key = (tuple(files), str(condition))
        if key not in self.indexes:
            self.indexes[key] = create_dataset_index(condition=condition, path=list(files))
        return self.indexes[key]


@dataclass
class Chosen:
    """The segments to score, and those that the run was trained and tuned on (None: not here)."""
    scored: DatasetIndex
    split: str
    train: Optional[DatasetIndex] = None
    tune: Optional[DatasetIndex] = None
    held_out: bool = True           # the scored patients are meant to be others than these
    calibrated: int = 0             # of the scored patients: in the calibration of --calibrate
    warning: Optional[str] = None


def choose_segments(path, checkpoint, data, split, condition, fitted) -> Chosen:
    """What to score of the files `data`, or of the run's own where it is None."""
    run = read_run(path)
    if data is None and "data" not in run:
        raise DataError(f"{path}: no record here of the data it was trained on; name them with "
                        "--data")
    files = datasets.find_files(data or run["data"])
    trained_with = checkpoint["config"].get("condition", "default")
    own_data = data is None or list(map(os.path.realpath, files)) == run.get("data")
    salt_path = run.get("salt_file") or default_salt_path(files[0])
    index = fitted.index(files, condition or trained_with)
    parts = patient_parts(index, checkpoint, salt_path)
    if parts is None:
        if own_data or split not in (None, "all"):
            raise DataError(f"{salt_path}: cannot identify the {split or 'test'} patients without "
                            "this run's salt")
        chosen = np.ones(index.n_patients, bool)
        found = Chosen(index, "all", warning="overlap with the training data NOT CHECKED")
    else:
        split = split or ("test" if own_data else "all")
        chosen, warning = choose_patients(parts, split, own_data)
        found = Chosen(index, split, held_out=split == "test" or not own_data, warning=warning,
                       calibrated=int((parts[chosen] == "calibration").sum()))
    if not chosen.any():
        raise DataError(f"no {split} patient of the checkpoint has a segment in these data")
    found.scored = index.select(chosen[index.encounter_patient])
    TPP_PPG_dataset(found.scored, "segment", SCORED)        # raises where one of them is absent
    if not own_data and run.get("data") and all(map(os.path.exists, run["data"])):
        index = fitted.index(run["data"], trained_with)
        parts = patient_parts(index, checkpoint, run["salt_file"])
    if parts is not None and np.isin(["train", "tune"], parts.tolist()).all():
        found.train, found.tune = (index.select((parts == name)[index.encounter_patient])
                                   for name in ("train", "tune"))
    return found


def choose_patients(parts, split, own_data) -> Tuple[np.ndarray, Optional[str]]:
    """Mask [P] of the patients to score, and a warning or None. parts: as `patient_parts` gives."""
    if split in ("train", "tune"):
        return parts == split, f"these are {split} patients of this checkpoint: not a test of it"
    if split == "test":
        if not (parts == "test").any():
            raise DataError("none of the checkpoint's test patients is in these data; --split all "
                            "takes every patient")
        return parts == "test", None
    seen, warning = int(np.isin(parts, ["train", "tune", "ancestors"]).sum()), None
    if seen:
        warning = (f"{seen:,} of {counted(len(parts), 'patient')} WERE SEEN IN TRAINING this "
                   "checkpoint; these scores flatter it" + (" (--split test)" if own_data else ""))
    return np.ones(len(parts), bool), warning


def run_of(path) -> tk_utils.RunFiles:
    return tk_utils.RunFiles(os.path.splitext(os.fspath(path))[0])


def read_run(path) -> dict:
    """What is private to this machine about a checkpoint's run (where its data are), or {}."""
    if not os.path.exists(run_of(path).run):
        return {}
    with open(run_of(path).run, encoding="utf-8") as file:
        return json.load(file)


def subsample(most: float, index: DatasetIndex, keys) -> TPP_PPG_dataset:
    """A dataset of at most so many segments of an index, drawn at random if there are more."""
    return TPP_PPG_dataset(index, "segment", keys, min(100, 100 * most / len(index)))


def read_segments(index: DatasetIndex, keys, fitted: Fitted, most=np.inf) -> Segments:
    """The fields of an index that baselines, strata and scores need, PPG features included."""
    dataset = subsample(most, index, keys)
    index, fields = dataset.index, {}
    of_strata = ("r2", "beat_irregularity", "ppg_quality", "start_s", "p_crit_true")
    for key in dict.fromkeys((*datasets.VITALS, *datasets.LABELS, *of_strata,
                              *datasets.vitals_of(keys))):
        try:
            index.sources(key)
        except DataError:           # an encounter lacks it
            continue
        fields[key] = dataset.column(key).numpy().astype(np.float64)
    fields.update(read_ppg_features(dataset, fitted.features))
    patients = index.segment_patients()
    return Segments(fields, patients, index.per_segment(np.arange(len(index.encounters))),
                    index.patients[patients], dataset)


def blocks_of(count: int) -> List[np.ndarray]:
    return [np.arange(start, min(start + 512, count)) for start in range(0, count, 512)]


def read_ppg_features(dataset: TPP_PPG_dataset, known: dict) -> Dict[str, np.ndarray]:
    """{name: [N]} of PPG_FEATURES. known: {hash of a segment's PPG: its features}, for later."""
    hashes = []
    for rows in tk_utils.progress(blocks_of(len(dataset)), desc="PPG features", leave=False):
        ppg = dataset.waveform("ppg", rows)
        of_rows = [hash(wave.tobytes()) for wave in ppg]
        new = [n for n, one in enumerate(of_rows) if one not in known]
        if new:
            found = ppg_features(ppg[new], datasets.FS)
            known.update(zip([of_rows[n] for n in new], zip(*found.values())))
        hashes += of_rows
    return dict(zip(PPG_FEATURES, np.array([known[one] for one in hashes]).T))


# ---------------------------------------------------------------- what the network predicts

def predict_tpp(model, dataset, device=None, features=False):
    """(TPP [N], the network's own SD [N] or None, its features [N, F] or None), in mmHg."""
    estimate, spread, found = predict_with_spread(model, dataset, device=device,
                                                  collect_features=features)
    tpp = estimate.astype(np.float64)
    if model.keys[-1] == "p_crit":
        tpp = dataset.column("map").numpy().astype(np.float64) - tpp
    absurd = np.flatnonzero(~(np.abs(tpp) <= MAX_TPP_MMHG))
    if len(absurd):
        raise DataError(f"{dataset.place(absurd[0])}: the network predicts a TPP of "
                        f"{tpp[absurd[0]]:.4g} mmHg ({len(absurd):,} of {len(tpp):,} segments are "
                        f"beyond ± {MAX_TPP_MMHG}); its training or its inputs went wrong")
    return tpp, spread, found


def predict_segments(model, segments: Segments, calibration, device) -> Segments:
    """Add predictions to segments, with intervals and the flag for unusual inputs."""
    novelty = calibration.get("novelty")
    segments.tpp, segments.spread, features = predict_tpp(
        model, segments.dataset, device, features=bool(novelty))
    for level in calibration.get("levels", ()):
        refusal = report.domain_refusal(calibration, **domain_of(segments.dataset.index))
        try:
            segments.intervals[level] = refusal or metrics.interval(
                segments.tpp, calibration, level, segments.spread)
        except ValueError as reason:
            segments.intervals[level] = str(reason)
    if novelty and features is not None:
        segments.distance = metrics.novelty(features, novelty)
        if novelty["threshold"] is not None:
            segments.unusual = segments.distance > novelty["threshold"]
    return segments


def predict_with_swapped_ppg(model, segments: Segments, device=None) -> Optional[np.ndarray]:
    """TPP [N] where each segment keeps its vitals and gets the PPG of another patient.

    In a fixed random order. None where one patient has more than half of the segments.
    """
    count, most = len(segments), np.bincount(segments.patients).max()
    if 2 * most > count:
        return None
    order = np.random.default_rng(0).permutation(count)
    order = order[np.argsort(segments.patients[order], kind="stable")]
    donor = np.empty(count, np.int64)
    donor[order] = np.roll(order, most)     # sorted by patient and shifted by the longest of them

    class SwappedPPG(TPP_PPG_dataset):
        def waveform(self, key, segments):
            return super().waveform(key, donor[segments])

    return predict_tpp(model, SwappedPPG(segments.dataset.index, "segment", model.keys), device)[0]


def predict_ablations(path, checkpoint, index, device) -> Dict[str, np.ndarray]:
    """{name in tables: TPP [N]} of the runs that --ablate trained in addition to this one."""
    found = {}
    for ending, name in ABLATIONS.items():
        other = run_of(path).base + ending + ".pth"
        if os.path.exists(other) and load_checkpoint(other)["split"] == checkpoint["split"]:
            model = load_model(other, device)
            dataset = TPP_PPG_dataset(index, "segment", model.keys)
            found[name] = predict_tpp(model, dataset, device)[0]
    return found


def predict_good_signal(model, index, fit, best, fitted, device) -> Segments:
    """Predictions of the same patients' segments of good signal, whatever their label's quality."""
    good = fitted.index(index.paths, "any")
    good = good.select(np.isin(good.patients, index.patients)[good.encounter_patient])
    segments = predict_segments(model, read_segments(good, model.keys, fitted), {}, device)
    if best:
        segments.best = best
        segments.baselines = {best: fit[best].predict(segments.fields)}
    return segments


# ---------------------------------------------------------------- calibration

def domain_of(index: DatasetIndex) -> Dict[str, str]:
    """Where the data of an index come from: prediction intervals hold only for such data."""
    return {"origin": datasets.origin_of(index.paths),
            "label_method": datasets.origin_of(index.paths, "label_method")}


def make_calibration(model, train, tune, batch_size=256, device=None, workers=0) -> dict:
    """What a checkpoint keeps for prediction intervals and unusual inputs: plain numbers and lists.

    train, tune: `TPP_PPG_dataset`s with the model's keys. `metrics.fit_calibration` of the errors
    on the tune patients, the origin and label method of their data and, if the network has
    features(), under 'novelty' `metrics.fit_novelty` of the inputs of the train patients.
    """
    options = {"batch_size": batch_size, "device": device, "workers": workers,
               "collect_features": True}
    estimate, spread, features = predict_with_spread(model, tune, **options)
    error = estimate - tune.column(model.keys[-1]).numpy()
    patients = tune.index.segment_patients()
    found = metrics.fit_calibration(-error if model.keys[-1] == "p_crit" else error, patients,
                                    spread)
    found.update(domain_of(tune.index))
    if features is not None:
        usual = subsample(MAX_NOVELTY_SEGMENTS, train.index, model.keys)
        usual = metrics.fit_novelty(predict_with_spread(model, usual, **options)[2])
        found["novelty"] = metrics.novelty_threshold(usual, features, patients)
    return found


def calibrate(path, data, condition=None, network=None, device=None) -> dict:
    """Fit the prediction intervals of a checkpoint on the patients of `data`, and store them in it.

    Patients that it was trained or tested on are left out. Returns the new calibration.
    """
    saved, files = load_checkpoint(path), datasets.find_files(data)
    model = load_model(saved, device, network)
    index = create_dataset_index(condition=condition or saved["config"].get("condition", "default"),
                                 path=files)
    salt_path = read_run(path).get("salt_file") or default_salt_path(files[0])
    parts, split = patient_parts(index, saved, salt_path), dict(saved["split"])
    if parts is not None:
        free = ~np.isin(parts, ["train", "ancestors", "test"])
        if not free.any():
            raise DataError(f"{files[0]}: all of these patients are train or test patients of the "
                            "checkpoint; intervals need others")
        split["calibration"] = datasets.hash_patients(
            index.patients[free & (parts != "tune")].tolist(), read_salt(salt_path))
        index = index.select(free[index.encounter_patient])
    dataset = TPP_PPG_dataset(index, "segment", model.keys)
    novelty = saved["calibration"].get("novelty")
    tpp, spread, features = predict_tpp(model, dataset, device, features=bool(novelty))
    truth = TPP_PPG_dataset(index, "segment", SCORED).column("tpp").numpy()
    patients = index.segment_patients()
    found = dict(metrics.fit_calibration(tpp - truth, patients, spread), **domain_of(index))
    if novelty and features is not None:
        found["novelty"] = metrics.novelty_threshold(novelty, features, patients)
    save_tensors(path, dict(saved, calibration=found, split=split))
    unit = " x the network's own SD" if found["spread"] else " mmHg"
    print(f"{path}: intervals calibrated on {counted(found['n_segments'], 'segment')} of "
          f"{counted(found['n_patients'], 'patient')} ({found['origin']}): " + ", ".join(
              f"{percent(level)} " + ("too few patients" if half is None else f"± {half:.2f}{unit}")
              for level, half in zip(found["levels"], found["half_widths"])))
    return found


# ---------------------------------------------------------------- the evaluation

def evaluate(model_or_path, index=None, **options) -> dict:
    """Score a model: a dictionary for the JSON. Arguments: see `evaluate_with_arrays`.

        results = evaluate("runs/M1.5.pth")
        results["tpp"]["rmse"], results["skill"]
    """
    return evaluate_with_arrays(model_or_path, index, **options)[0]


def evaluate_with_arrays(model_or_path, index=None, *, data=None, split=None, condition=None,
                         train=None, tune=None, fitted: Optional[Fitted] = None, device=None,
                         full=False, network=None) -> Tuple[dict, Segments]:
    """Score a model: (results for the JSON, the scored segments for figures).

    model_or_path: a `NormalisedModel` or the path of a checkpoint (network: its architecture where
    it is your own). index: the segments to score, as `DatasetIndex` or dataset; without it, the
    patients `split` of the files `data` (default: of the run) that pass the gate `condition`.
    train, tune: the run's own segments, for baselines, calibration and checks, where the caller has
    them. fitted: shared between calls. full: also what only the report shows.
    Raises DataError and CheckpointError, in one line.
    """
    fitted, device = fitted or Fitted(), choose_device(device)
    path = None if hasattr(model_or_path, "keys") else os.fspath(model_or_path)
    model = load_model(path, device, network) if path else model_or_path
    checkpoint = getattr(model, "checkpoint", None) or {}
    if index is not None:
        index, train, tune = (getattr(one, "index", one) for one in (index, train, tune))
        chosen = Chosen(index, split or "given", train, tune)
    elif path:
        chosen = choose_segments(path, checkpoint, data, split, condition, fitted)
    else:
        raise DataError("a model in memory needs the index of the segments to score")

    calibration = checkpoint.get("calibration") or {}
    if not calibration and chosen.train is not None:
        calibration = make_calibration(
            model, *(TPP_PPG_dataset(one, "segment", model.keys)
                     for one in (chosen.train, chosen.tune)), device=device)
    segments = read_segments(chosen.scored, model.keys, fitted)
    predict_segments(model, segments, calibration, device)
    fit, segments.best = fit_or_reuse_baselines(chosen, segments.fields, model.keys, fitted)
    segments.baselines = {name: one.predict(segments.fields) for name, one in fit.items()}
    if path:
        segments.compared = predict_ablations(path, checkpoint, chosen.scored, device)
    if full:
        if model.with_ppg:
            segments.swapped = predict_with_swapped_ppg(model, segments, device)
        segments.good = predict_good_signal(model, chosen.scored, fit, segments.best, fitted,
                                            device)

    origin, split = domain_of(chosen.scored)["origin"], checkpoint.get("split")
    loss = checkpoint.get("config", {}).get("loss", "mse")
    results = {
        "checkpoint": os.path.basename(path) if path else "model in memory",
        "date": time.strftime("%Y-%m-%d"), "split": chosen.split, "keys": list(model.keys),
        "condition": chosen.scored.condition, "origin": origin, "simulated": "simulated" in origin,
        "note": tk_utils.simulated_note(origin, checkpoint.get("provenance", {}).get("origin", "")),
        "warning": chosen.warning,
        "loss_label": getattr(LOSSES.get(loss), "label", f"Loss, {loss}"),
        "n_train_patients": len(split["train"]) if split and "train" in split else
        chosen.train.n_patients if chosen.train is not None else None,
        **score_all(segments, full)}
    if split:
        results["checks"]["patients_in_two_parts"] = patients_in_two_parts(split)
    if chosen.train is not None and chosen.held_out:
        results["checks"]["shared_seconds"] = shared_seconds(
            chosen.scored, {"train": chosen.train, "tune": chosen.tune})
    if calibration:
        results["uncertainty"].update(
            n_calibration_patients=calibration["n_patients"],
            has_features="novelty" in calibration, n_patients_of_calibration=chosen.calibrated)
    results["problems"] = problems(results)
    for line in report.warning_lines(results):
        print(f"WARNING: {line}", file=sys.stderr)
    if path:
        fitted.results[path, full] = results, segments
    return results, segments


def fit_or_reuse_baselines(chosen: Chosen, fields, keys, fitted: Fitted):
    """({name: Baseline} of the run's train patients, name of the best on the tune patients), or
    ({}, None) where their data are not here."""
    if chosen.train is None or chosen.tune is None:
        print("no baselines: the data of the train patients are not here")
        return {}, None
    vitals = datasets.vitals_of(keys)
    key = (tuple(vitals), tuple(sorted(fields)), *(
        (tuple(index.paths), index.encounters.tobytes(), index.rows.tobytes())
        for index in (chosen.train, chosen.tune)))
    if key not in fitted.baselines:
        train = read_segments(chosen.train, keys, fitted, MAX_BASELINE_SEGMENTS)
        tune = read_segments(chosen.tune, keys, fitted)
        left_out = baselines.left_out_baselines(vitals, train.fields, tune.fields, fields)
        for name, reason in left_out.items():
            print(f"baseline {name} left out: {reason}")
        found = baselines.fit_baselines(train.fields, train.patients, vitals, left_out)
        fitted.baselines[key] = found, baselines.choose_best(found, tune.fields)
    return fitted.baselines[key]


# ---------------------------------------------------------------- scores

def score_all(scored: Segments, full: bool = False) -> dict:
    """Everything that follows from the predictions. full: also what only the page shows."""
    patients = metrics.PatientBootstrap(scored.patients)
    fields, truth, tpp = scored.fields, scored.truth, scored.tpp
    both = {"tpp": (truth, tpp), "p_crit": (fields["p_crit"], fields["map"] - tpp)}
    by_patient = {key: metrics.confidence_intervals(patients, *pair, by_patient=True)
                  for key, pair in both.items()}
    found = {
        "n_patients": patients.n_patients, "n_segments": len(scored),
        **{key: scores_with_intervals(patients, *pair) for key, pair in both.items()},
        "per_patient": {"tpp": by_patient["tpp"], "p_crit_r2": by_patient["p_crit"]["r2"]},
        "within_patient": {key: metrics.within_patient_correlation(patients, *pair)
                           for key, pair in both.items()},
        "trend": {key: metrics.trend_concordance(scored.patients, *pair, scored.series)
                  for key, pair in both.items()},
        "detection": metrics.detection(patients, truth, tpp),
        "standards": metrics.standards(patients, truth, tpp),
        "bland_altman": metrics.bland_altman(patients, truth, tpp)}
    if "p_crit_true" in fields:
        true_tpp = fields["map"] - fields["p_crit_true"]
        found["true"] = dict(scores_with_intervals(patients, true_tpp, tpp),
                             label=metrics.scores(true_tpp, truth))
    for key in ("baselines", "compared"):
        found[key] = {name: score_other(scored, prediction, patients)
                      for name, prediction in getattr(scored, key).items()}
    found["uncertainty"] = uncertainty_summary(scored, patients)
    found["checks"] = check_predictions(scored, patients)
    found["skill"] = None
    if scored.best is not None:
        best, others = found["baselines"][scored.best], found["baselines"]
        here = min(others, key=lambda name: others[name]["rmse"])
        found.update(skill=dict(best["skill"], over=scored.best),
                     skill_per_patient=dict(best["skill_per_patient"], over=scored.best),
                     skill_in_hindsight=dict(others[here]["skill"], over=here))
    if full:
        found["strata"] = strata(scored)
        squares = patients.per_patient((tpp - truth) ** 2)
        found["patients"] = {"rmse_quantiles": {
            percent(share): float(np.quantile(np.sqrt(squares / patients.counts), share))
            for share in (0.05, 0.25, 0.5, 0.75, 0.95)}}
        if scored.swapped is not None:
            found["swapped_ppg"] = score_other(scored, scored.swapped, patients)
        if scored.good is not None:
            found["good_signal"] = score_good_signal(scored)
    return found


def scores_with_intervals(patients, truth, prediction) -> dict:
    """`metrics.scores` without the count, and their 95 % intervals over patients as `ci95`."""
    found = metrics.scores(truth, prediction)
    found.pop("n")
    intervals = metrics.confidence_intervals(patients, truth, prediction)
    return dict(found, ci95={name: (one["low"], one["high"]) for name, one in intervals.items()})


def score_other(scored: Segments, prediction, patients) -> dict:
    """Scores of another prediction of the same segments, and the network's skill over it."""
    fields, truth, tpp = scored.fields, scored.truth, scored.tpp
    return dict(
        scores_with_intervals(patients, truth, prediction),
        p_crit_r2=metrics.scores(fields["p_crit"], fields["map"] - prediction)["r2"],
        skill=metrics.skill(truth, tpp, prediction, patients),
        skill_per_patient=metrics.skill(truth, tpp, prediction, patients, by_patient=True))


def uncertainty_summary(scored: Segments, patients) -> Optional[dict]:
    """Coverage and width of the intervals, unusual inputs."""
    if not scored.intervals:
        return None
    levels = {}
    for level, bounds in scored.intervals.items():
        if isinstance(bounds, str):
            levels[percent(level)] = {"refused": bounds}
        else:
            held = metrics.coverage(patients, scored.truth, *bounds)
            levels[percent(level)] = dict(held, half_width=held["mean_width"] / 2)
    found = {"levels": levels}
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
    error, interval, found = scored.tpp - scored.truth, scored.intervals.get(0.9), []
    held = None
    if isinstance(interval, tuple):
        held = (interval[0] <= scored.truth) & (scored.truth <= interval[1])
    for keys, name, unit, edges in STRATA:
        values = next((fields[key] for key in keys if fields.get(key) is not None), None)
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


def score_good_signal(scored: Segments) -> dict:
    """Scores of the same patients' segments of good signal, whatever the quality of the label.

    The default gate's conditions on r² and Pcrit need the arterial line, and they narrow the range
    of what is predicted.
    """
    good, patients = scored.good, metrics.PatientBootstrap(scored.good.patients)
    network = score_other(good, good.tpp, patients)
    found = {"n_segments": len(good), "n_patients": patients.n_patients,
             "share_kept_by_gate": len(scored) / len(good), "tpp": network,
             "p_crit_r2": network["p_crit_r2"]}
    if good.best is not None:
        found["baseline"] = dict(score_other(good, good.baselines[good.best], patients),
                                 name=good.best)
    return found


# ---------------------------------------------------------------- checks

def check_predictions(scored: Segments, patients) -> dict:
    """Checks of the predictions alone; `problems` puts what is wrong into words."""
    found = {"constant_output": len(scored) > 1 and bool(np.ptp(scored.tpp) < MIN_CHANGE_MMHG)}
    if "start_s" in scored.fields:
        _, gap = metrics.changes(scored.series, scored.fields["start_s"])
        found["overlapping_windows"] = int(np.sum(np.abs(gap) < datasets.SEGMENT_SECONDS - 0.01))
    if scored.best is not None:
        mixed = np.random.default_rng(0).permutation(len(scored))
        found["skill_with_shuffled_labels"] = metrics.skill(
            scored.truth[mixed], scored.tpp, scored.baselines[scored.best][mixed], patients)
    if scored.swapped is not None:
        found["ignores_ppg"] = bool(np.abs(scored.tpp - scored.swapped).max() < MIN_CHANGE_MMHG)
    return found


def patients_in_two_parts(split: Dict[str, list]) -> int:
    train, tune, test, older = (set(split.get(name, ()))
                                for name in ("train", "tune", "test", "ancestors"))
    return len((train & tune) | (test & (train | tune | older)))


def second_hashes(index: DatasetIndex) -> np.ndarray:
    """[S, seconds] uint64: a hash of each second of PPG, bit for bit, 0 where the second is flat.

    Windows that overlap by whole seconds share hashes.
    """
    dataset, hashes = subsample(MAX_HASHED_SEGMENTS, index, ["ppg"]), []
    factors = np.random.default_rng(1).integers(1, 2 ** 63, datasets.FS).astype(np.uint64) * 2 + 1
    for rows in blocks_of(len(dataset)):
        bits = np.ascontiguousarray(dataset.waveform("ppg", rows)).view(np.uint32)
        bits = bits.reshape(len(rows), datasets.SEGMENT_SECONDS, -1)
        flat = (bits == bits[..., :1]).all(axis=2)
        hashes.append(np.where(flat, 0, (bits * factors).sum(axis=2)))
    return np.concatenate(hashes)


def shared_seconds(index: DatasetIndex, others: Dict[str, DatasetIndex]) -> Dict[str, int]:
    """{name: segments of an index that share a second of PPG with those of another}."""
    ours = second_hashes(index)
    return {name: int((np.isin(ours, second_hashes(other)) & (ours != 0)).any(1).sum())
            for name, other in others.items()}


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

def compare_runs(paths, **options) -> Tuple[dict, Segments]:
    """Several runs, such as seeds or folds: ({'runs', 'summary', 'together'}, all segments).

    Prints one line for each run, their mean and SD, and the table of all predictions together.
    options: arguments of `evaluate_with_arrays`; runs already scored with the same `fitted` are not
    scored again.
    """
    fitted = options["fitted"] = options.get("fitted") or Fitted()
    full = options.get("full", False)
    found = [fitted.results.get((path, full)) or evaluate_with_arrays(path, **options)
             for path in paths]
    runs = [results for results, _ in found]
    report.print_runs(runs)
    segments = pool([one for _, one in found])
    pooled = {
        **{key: runs[0][key] for key in ("date", "split", "keys", "condition", "loss_label")},
        "checkpoint": f"{len(runs)} runs", "n_train_patients": None, "warning": None,
        "origin": ", ".join(sorted({run["origin"] for run in runs})),
        "simulated": any(run["simulated"] for run in runs),
        "note": "; ".join(sorted({run["note"] for run in runs if run["note"]})) or None,
        "problems": sorted({line for run in runs for line in report.warning_lines(run)}),
        **score_all(segments, full)}
    print(f"\nall predictions of the {len(runs)} runs together:")
    report.print_results(pooled)
    return {"runs": runs, "summary": summarise(runs), "together": pooled}, segments


def summarise(runs) -> Dict[str, dict]:
    """Mean and SD of each number that all runs' results have: {'tpp.rmse': {'mean', 'sd', 'runs'}}.

    Inner names are joined by dots.
    """
    table = pd.json_normalize(runs).select_dtypes("number").dropna(axis=1).astype(float)
    return {name: {"mean": float(np.mean(values)), "sd": float(np.std(values, ddof=1)),
                   "runs": values.tolist()} for name, values in table.items()}


def pool(runs: List[Segments]) -> Segments:
    """The predictions of several runs as one set, in which a patient is one patient in whichever
    run: folds become all patients, seeds repeats of the same ones."""
    def joined(parts):
        return None if any(part is None for part in parts) else np.concatenate(parts)

    def of_all(name):
        """The dictionary `name` of what every run has."""
        found = {key: joined([getattr(run, name).get(key) for run in runs])
                 for key in getattr(runs[0], name)}
        return {key: values for key, values in found.items() if values is not None}

    names = joined([run.names for run in runs])
    begins = np.cumsum([0] + [run.series.max() + 1 for run in runs])
    pooled = Segments(
        of_all("fields"), np.unique(names, return_inverse=True)[1],
        joined([run.series + begin for run, begin in zip(runs, begins)]), names,
        baselines=of_all("baselines"), compared=of_all("compared"), runs=tuple(runs),
        **{name: joined([getattr(run, name) for run in runs])
           for name in ("tpp", "spread", "distance", "unusual", "swapped")})
    for level in runs[0].intervals:
        bounds = [run.intervals.get(level, "not calibrated") for run in runs]
        refused = [one for one in bounds if isinstance(one, str)]
        pooled.intervals[level] = refused[0] if refused else tuple(map(joined, zip(*bounds)))
    if all(run.best is not None for run in runs):
        pooled.best = EACH_BEST
        pooled.baselines[EACH_BEST] = joined([run.baselines[run.best] for run in runs])
    if all(run.good is not None for run in runs):
        pooled.good = pool([run.good for run in runs])
    return pooled


if __name__ == "__main__":
    sys.exit(tk_utils.run_script(main, CheckpointError, DataError, TrainingError))
