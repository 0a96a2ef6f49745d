"""A checkpoint and data -> scores with intervals, baselines, JSON; the report, figures, model card.

    python evaluate.py runs/M1.5.pth                        # the run's own data, its test patients
    python evaluate.py runs/M1.5.pth --report report.html   # everything, as one page
    python evaluate.py runs/M1.5.pth --data FILE…           # other data: all its unseen patients
    python evaluate.py runs/M1.5.pth --compare runs/other.pth --report report.html
    python evaluate.py runs/M1.5_seed?.pth                  # several runs: each, mean ± SD, all

TPP = MAP - Pcrit and MAP is an input, so the error of TPP is the error of Pcrit, while R² of TPP is
lifted by the spread of MAP: read R² of Pcrit, and the skill over the baselines.
"""
import glob
import json
import os
import sys
from dataclasses import dataclass, replace

import numpy as np

import metrics
import tk_utils
from tk_utils import print_table, run_script, write_json

datasets = tk_utils.lazy_module("datasets")             # they bring PyTorch, for which --help does
header = tk_utils.lazy_module("training_header")        # not wait

SPLITS = ("test", "tune", "train", "all")
SCORED = ["map", "p_crit", "tpp"]           # fields without which there are no scores
FIELDS_OF_BASELINES = ("map", "sbp", "dbp", "pp", "hr", "tpp", "p_crit")
FIELDS_OF_STRATA = ("r2", "beat_irregularity", "ppg_quality", "start_s", "p_crit_true")
MOST_FITTED = 100_000                       # train segments for the baselines: more adds nothing
MOST_WATCHED = 20_000                       # train segments that tell what is usual
MOST_HASHED = 200_000                       # segments of a part searched for shared seconds
LEAST_CHANGE = 0.01                         # mmHg; outputs that vary by less are constant
# Runs that train_resnet.py --ablate trained beside one, by the endings of their names.
ABLATIONS = {"_no_ppg": "network without the PPG", "_no_vitals": "network without vitals"}


def parse_args(arguments=None):
    parser = tk_utils.ScriptParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("checkpoints", nargs="+", metavar="checkpoint",
                        help="runs/<name>.pth, as train_resnet.py writes it; several (seeds, "
                             "folds): each, mean ± SD, and all together")
    add = parser.add_argument_group("what is scored").add_argument
    add("--data", nargs="+", metavar="FILE",
        help="HDF5 files; default: those of the run, from runs/<name>_run.json")
    add("--split", choices=SPLITS,
        help="patients to score; default: test on the run's data, else all")
    add("--condition", metavar="GATE", help="quality gate; default: the one of the run")
    add("--compare", nargs="+", default=[], metavar="CHECKPOINT",
        help="runs of the same split to list beside this one; those of --ablate are anyway")
    add("--salt-file", metavar="FILE",
        help="the project's salt; default: the run's, else beside the data")
    add = parser.add_argument_group("output").add_argument
    add("--json", metavar="FILE", help="also write the scores here")
    add("--figure", metavar="FILE", help="also draw the 2-D histogram here")
    add("--report", metavar="FILE.html",
        help="write the whole evaluation as one page, its figures as PNG and PDF into "
             "figures_resnet/, and the model card runs/<name>_card.md")
    add = parser.add_argument_group("running").add_argument
    add("--batch-size", type=int, default=256, metavar="N", help="segments at a time; default 256")
    add("--device", help="cpu, cuda, cuda:1, …; default: CUDA where present")
    add("--workers", type=int, default=0, metavar="N", help="loader processes; default 0")
    add("--keep-index", action="store_true",
        help="keep the index beside the data (<file>.index.npz), as train_resnet.py --keep-index "
             "does, and use it again")
    options = parser.parse_args(arguments)
    if len(options.checkpoints) > 1 and (options.report or options.compare):
        parser.error("--report and --compare go with one checkpoint")
    return options


def read_run(checkpoint_path):
    """What is private to this machine about a run (where its data lie), or {} if there is none."""
    path = os.path.splitext(checkpoint_path)[0] + "_run.json"
    if not os.path.exists(path):
        return {}
    try:
        with open(path, encoding="utf-8") as file:
            return dict(json.load(file))
    except (ValueError, TypeError):
        raise header.DataError(f"{path}: not the record of a run; remove it and name the data with "
                               "--data") from None


def find_files(names):
    """The files of names and globs, each of which must be there."""
    found = [path for name in names for path in sorted(glob.glob(name)) or [name]]
    for path in found:
        if not os.path.exists(path):
            raise header.DataError(f"{path}: no such file (prepare.py makes one from recordings, "
                                   "simulate.py from virtual patients)")
    return found


def beside(path):
    """Where the project's salt lies: in the folder of its data."""
    return os.path.join(os.path.dirname(path), "tpp_ppg.salt")


def origin_of(data, name="origin"):
    """The files' origins, joined: 'simulated', 'recordings', … ('unknown' in published files); or
    another of their attributes."""
    found = set()
    for path in data:
        with datasets.open_file(path) as file:
            found.add(str(datasets.attribute(file, name, "unknown")))
    return ", ".join(sorted(found))


def vitals_of(keys):
    """Those of a network's keys that are neither the PPG nor the label."""
    return [key for key in keys[:-1] if key != "ppg"]


def simulated_note(origin, trained_on):
    """What console, figures and JSON must say when simulated data are in play, or None."""
    if "simulated" in origin:
        return "SIMULATED PATIENTS: says nothing about real ones"
    if "simulated" in trained_on:
        return "MODEL TRAINED ON SIMULATED PATIENTS"
    return None


# ---------------------------------------------------------------- what is scored

def patient_parts(index, checkpoint, salt_file):
    """The part of the run in which each patient of an index was: [P] of 'train', …, or None.

    By the checkpoint's salted hashes, so that it holds for any file. None and a loud line where
    there is no salt to compare by, or not the run's.
    """
    salt = header.read_salt(salt_file) if os.path.exists(salt_file) else None
    if salt is None or header.salt_mark(salt) != checkpoint["provenance"].get("salt"):
        print(f"WARNING: {salt_file}: {'not the salt of this run' if salt else 'no such file'} "
              "(--salt-file), so whether these patients were trained on COULD NOT BE CHECKED",
              file=sys.stderr)
        return None
    known = {h: part for part, hashes in checkpoint["split"].items() for h in hashes}
    hashes = header.hash_patients(index.patients.tolist(), salt)
    return np.array([known.get(h) for h in hashes], dtype=object)


def choose_patients(parts, split, own_data):
    """Mask [P] of the patients to score, and a warning or None. parts: as `patient_parts` gives."""
    seen = np.isin(parts, ["train", "tune", "ancestors"])
    if split in ("train", "tune"):
        return parts == split, f"these are {split} patients of this checkpoint: no test of it"
    if split == "test":
        if not (parts == "test").any():
            raise header.DataError("none of the checkpoint's test patients is in these data; "
                                   "--split all takes every patient")
        return parts == "test", None
    warning = None
    if seen.any():
        warning = (f"{int(seen.sum())} of {len(parts)} patients WERE SEEN IN TRAINING this "
                   "checkpoint; these scores flatter it" + (" (--split test)" if own_data else ""))
    return np.ones(len(parts), bool), warning


@dataclass
class Chosen:
    """The segments to score, and those that the run was trained and tuned on."""
    files: list
    scored: object              # their `DatasetIndex`
    fitted: dict                # {'train': index, 'tune': index}, or {} where they are not here
    held_out: bool              # whether the scored patients are meant to be others than these
    split: str
    condition: str
    warning: str                # or None


def choose_segments(checkpoint_path, checkpoint, data, split, condition, salt_file, keep_index):
    """What to score, as `Chosen`. The arguments are those of `evaluate`."""
    run = read_run(checkpoint_path)
    if data is None and "data" not in run:
        raise header.DataError(f"{checkpoint_path}: no record here of the data it was trained on; "
                               "name them with --data")
    files, trained_with = find_files(data or run["data"]), checkpoint["config"]["condition"]
    own_data = data is None or list(map(os.path.realpath, files)) == run.get("data")
    condition = condition or trained_with
    salt_file = salt_file or run.get("salt_file") or beside(files[0])
    make_index = header.kept_dataset_index if keep_index else header.create_dataset_index
    index = make_index(condition=condition, path=files)
    parts = patient_parts(index, checkpoint, salt_file)
    if parts is None:
        if own_data or split not in (None, "all"):
            raise header.DataError(f"{salt_file}: without the run's salt nobody can tell its "
                                   f"{split or 'test'} patients (--salt-file)")
        split, chosen = "all", np.ones(index.n_patients, bool)
        warning = "overlap with the training data NOT CHECKED"
    else:
        split = split or ("test" if own_data else "all")
        chosen, warning = choose_patients(parts, split, own_data)
    if not chosen.any():
        raise header.DataError(f"no {split} patient of the checkpoint has a segment in these data")
    scored = index.select(chosen[index.encounter_patient])
    header.TPP_PPG_dataset(scored, "segment", SCORED)       # raises where one of them is absent
    if not own_data and run.get("data") and all(map(os.path.exists, run["data"])):
        index = header.create_dataset_index(condition=trained_with, path=run["data"])
        parts = patient_parts(index, checkpoint, run["salt_file"])
    fitted = {}
    if parts is not None and np.isin(["train", "tune"], parts.tolist()).all():
        fitted = {name: index.select((parts == name)[index.encounter_patient])
                  for name in ("train", "tune")}
    return Chosen(files, scored, fitted, split == "test" or not own_data, split, condition, warning)


@dataclass
class Part:
    """The segments of some patients: dataset, fields {name: [N] float64} and patients [N]."""
    dataset: object
    fields: dict
    patients: np.ndarray
    series: np.ndarray          # [N] the number of each segment's encounter

    def __len__(self):
        return len(self.patients)


def at_most(most, index, keys):
    """A `TPP_PPG_dataset` of so many segments of an index, at random where there are more."""
    return header.TPP_PPG_dataset(index, "segment", keys, min(100, 100 * most / len(index)))


def read_part(index, keys, most=np.inf):
    """The `Part` of an index: what baselines, strata and scores need, PPG features included."""
    dataset = at_most(most, index, keys)
    index, fields = dataset.index, {}
    for key in dict.fromkeys((*FIELDS_OF_BASELINES, *FIELDS_OF_STRATA, *vitals_of(keys))):
        try:
            index.sources(key)
        except header.DataError:        # an encounter lacks it
            continue
        fields[key] = dataset.column(key).numpy().astype(np.float64)
    segments = np.arange(len(index))
    pulse = [metrics.ppg_features(dataset.waveform("ppg", segments[a:a + 512]))
             for a in tk_utils.progress(range(0, len(index), 512), desc="PPG features",
                                        leave=False)]
    fields.update({name: np.concatenate([one[name] for one in pulse]) for name in pulse[0]})
    return Part(dataset, fields, index.segment_patients(),
                index.per_segment(np.arange(len(index.encounters))))


# ---------------------------------------------------------------- what the model says

def predict_tpp(model, part, how, novelty=None):
    """(TPP [N], the network's own spread [N] or None, distance from training inputs [N] or None).

    In mmHg; how: arguments of `predict_dataset`; novelty: of the checkpoint's calibration.
    """
    distance = []
    with header.watch_features(model, lambda features: distance.append(
            metrics.novelty(features, novelty)) if novelty else None):
        found, spread = header.predict_with_spread(model, part.dataset, **how)
    tpp = found.astype(np.float64)
    if model.keys[-1] == "p_crit":
        tpp = part.fields["map"] - tpp
    return tpp, spread, np.concatenate(distance) if novelty else None


def predict_with_swapped_ppg(model, part, how):
    """TPP [N] where each segment has its own vitals and the PPG of another patient.

    (NumPy's order with a fixed seed: the same each time.) None where one patient has more than half
    of the segments.
    """
    count, most = len(part), np.bincount(part.patients).max()
    if 2 * most > count:
        return None
    order = np.random.default_rng(0).permutation(count)
    order = order[np.argsort(part.patients[order], kind="stable")]
    donor = np.empty(count, np.int64)
    donor[order] = np.roll(order, most)     # by patient, moved on by the longest: always another

    class SwappedPPG(header.TPP_PPG_dataset):
        def waveform(self, key, segments):
            return super().waveform(key, donor[segments])

    swapped = SwappedPPG(part.dataset.index, "segment", part.dataset.keys_to_load)
    return predict_tpp(model, replace(part, dataset=swapped), how)[0]


def make_calibration(model, train, tune, batch_size=256, device=None, workers=0):
    """What a checkpoint keeps to say how sure a prediction is, as plain numbers and lists.

    train, tune: `TPP_PPG_dataset`s. `metrics.fit_calibration` of the TPP's errors on the tune
    patients and, under 'novelty', `metrics.fit_novelty` of the inputs of the train patients.
    """
    how = {"batch_size": batch_size, "device": device, "workers": workers}
    of_train, of_tune = [], []
    with header.watch_features(model, of_tune.append):
        found, spread = header.predict_with_spread(model, tune, **how)
    error = found - tune.column(model.keys[-1]).numpy()
    with header.watch_features(model, of_train.append):
        header.predict_dataset(model, at_most(MOST_WATCHED, train.index, model.keys), **how)
    patients = tune.index.segment_patients()
    calibration = metrics.fit_calibration(-error if model.keys[-1] == "p_crit" else error,
                                          patients, spread)
    return dict(calibration, novelty=metrics.fit_novelty(
        np.concatenate(of_train), np.concatenate(of_tune), patients))


# ---------------------------------------------------------------- scores

def scores_with_intervals(truth, prediction, patients):
    """`metrics.scores` without the count, and their 95 % intervals over patients as `ci95`."""
    found = metrics.scores(truth, prediction)
    found.pop("n")
    return dict(found, ci95=metrics.confidence_intervals(patients, truth, prediction))


def score_predictions(part, tpp, bootstrap):
    """Scores of predicted TPP [N] (mmHg), with 95 % intervals over patients, as in the JSON."""
    fields, truth = part.fields, part.fields["tpp"]
    both = {"tpp": (truth, tpp), "p_crit": (fields["p_crit"], fields["map"] - tpp)}
    found = {
        "n_patients": bootstrap.n_patients, "n_segments": len(part),
        **{key: scores_with_intervals(*one, bootstrap) for key, one in both.items()},
        "per_patient": {"tpp": metrics.patient_scores(bootstrap, truth, tpp),
                        "p_crit_r2": metrics.patient_scores(bootstrap, *both["p_crit"])["r2"]},
        "within_patient": {key: metrics.within_patient_correlation(bootstrap, *one)
                           for key, one in both.items()},
        "trend": {key: metrics.trend_concordance(part.patients, *one, part.series)
                  for key, one in both.items()},
        "detection": metrics.detection(bootstrap, truth, tpp),
        "standards": metrics.standards(bootstrap, truth, tpp),
        "bland_altman": metrics.bland_altman(bootstrap, truth, tpp)}
    if "p_crit_true" in fields:
        true_tpp = fields["map"] - fields["p_crit_true"]
        label = metrics.scores(true_tpp, truth)
        found["true"] = dict(
            scores_with_intervals(true_tpp, tpp, bootstrap),
            p_crit_r2=metrics.scores(fields["p_crit_true"], fields["map"] - tpp)["r2"],
            label={k: label[k] for k in ("rmse", "mae", "mead", "bias", "sd")})
    return found


def score_beside(part, tpp, prediction, bootstrap):
    """Scores of another prediction of the same segments, and the model's skill over it."""
    fields, truth = part.fields, part.fields["tpp"]
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


def skills(baselines, best):
    """The model's skill over a baseline, and over the one that turns out best, as in the JSON."""
    here = min(baselines, key=lambda name: baselines[name]["rmse"])
    return {"skill": dict(baselines[best]["skill"], over=best),
            "skill_per_patient": dict(baselines[best]["skill_per_patient"], over=best),
            "skill_in_hindsight": dict(baselines[here]["skill"], over=here)}


def fit_baselines(part, train, tune, vitals):
    """Baselines fitted on the train patients: ({name: Baseline}, name of the best on tune)."""
    left_out = metrics.left_out_baselines(vitals, train.fields, tune.fields, part.fields)
    for name, reason in left_out.items():
        print(f"baseline {name} left out: {reason}")
    fitted = metrics.fit_baselines(train.fields, train.patients, vitals, left_out)
    return fitted, metrics.choose_best(fitted, tune.fields)


def intervals_of(tpp, spread, calibration):
    """{level: (low [N], high [N]), or why there is none} of the prediction intervals."""
    found = {}
    for level in calibration["levels"]:
        try:
            found[level] = metrics.interval(tpp, calibration, level, spread)
        except ValueError as reason:
            found[level] = str(reason)
    return found


def coverages(truth, intervals, bootstrap):
    """Coverage and mean half width of `intervals_of`, by level, as in the JSON."""
    found = {}
    for level, one in intervals.items():
        if isinstance(one, str):
            found[percent(level)] = {"refused": one}
        else:
            one = metrics.coverage(bootstrap, truth, *one)
            found[percent(level)] = dict(one, half_width=one["mean_width"] / 2)
    return found


def how_sure(part, tpp, spread, intervals, calibration, distance, bootstrap):
    """Coverage and width of the prediction intervals, probability of low TPP, unusual inputs."""
    truth = part.fields["tpp"]
    low = metrics.low_probability(tpp, calibration, spread=spread)
    found = {"n_tune_patients": calibration["n_patients"], "own_spread": spread is not None,
             "levels": coverages(truth, intervals, bootstrap),
             "reliability": metrics.reliability(bootstrap, truth < metrics.LOW_TPP, low)}
    threshold = calibration.get("novelty", {}).get("threshold")
    if distance is not None and threshold is not None:
        new = distance > threshold
        found["novelty"] = {
            "expected": 1 - calibration["novelty"]["level"], "rate": float(new.mean()),
            **{name: metrics.rmse(part.patients[mask], (tpp - truth)[mask]) if mask.any() else None
               for name, mask in (("rmse_new", new), ("rmse_usual", ~new))}}
    return found


# ---------------------------------------------------------------- where it is good and where not

STRATA = (      # field, name, unit, inner edges or None for quarters
    ("tpp", "TPP", "mmHg", (20, 34, 50)), ("map", "MAP", "mmHg", (65, 74, 90)),
    ("hr", "Heart rate", "/min", (60, 80, 100)), ("pp", "Pulse pressure", "mmHg", (40, 60, 80)),
    ("r2", "Label's r²", "", (0.7, 0.8, 0.9)), ("quality", "PPG quality", "", None),
    ("irregularity", "Beat irregularity", "", (0.05, 0.1, 0.2)),
    ("distance", "Distance from training inputs", "", None),
    ("spread", "Network's own spread", "mmHg", None))


def strata(part, tpp, spread, interval, distance):
    """RMSE, bias and coverage of the 90 % interval by range of fields: a list of dicts.

    interval: (low [N], high [N]), or anything else where there is none.
    """
    fields = dict(part.fields, distance=distance, spread=spread)
    fields["quality"] = fields.get("ppg_quality", fields["pulse_quality"])
    fields["irregularity"] = fields.get("beat_irregularity", fields["pulse_irregularity"])
    error, found = tpp - fields["tpp"], []
    held = None
    if isinstance(interval, tuple):
        held = (interval[0] <= fields["tpp"]) & (fields["tpp"] <= interval[1])
    for field, name, unit, edges in STRATA:
        values = fields.get(field)
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
                "n_patients": len(np.unique(part.patients[inside])),
                "rmse": metrics.rmse(part.patients[inside], error[inside]),
                "bias": float(error[inside].mean()),
                "coverage_90": None if held is None else float(np.mean(held[inside]))})
    return found


def spread_over_patients(patients, error):
    """Quantiles over the patients of each one's own RMSE, and the share of those below 5 mmHg."""
    _, owner, counts = np.unique(patients, return_inverse=True, return_counts=True)
    own = np.sqrt(np.bincount(owner.ravel(), error ** 2) / counts)
    shares = (0.05, 0.25, 0.5, 0.75, 0.95)
    return {"rmse_quantiles": {percent(share): float(np.quantile(own, share)) for share in shares},
            "share_below_5": float(np.mean(own < 5))}


# ---------------------------------------------------------------- honesty

def second_hashes(index):
    """[S, 60] uint64: a hash of each second of PPG, bit for bit, 0 where the second is flat.

    At most MOST_HASHED segments, at random. Windows that overlap by whole seconds share hashes.
    """
    dataset = at_most(MOST_HASHED, index, ["ppg"])
    factors = np.random.default_rng(1).integers(1, 2 ** 63, 60).astype(np.uint64) * 2 + 1
    hashes = np.empty((len(dataset), 60), np.uint64)
    for a in range(0, len(hashes), 512):
        ppg = dataset.waveform("ppg", np.arange(a, min(a + 512, len(hashes))))
        bits = np.ascontiguousarray(ppg).view(np.uint32).reshape(len(ppg), 60, -1)
        flat = (bits == bits[..., :1]).all(axis=2)
        hashes[a:a + 512] = np.where(flat, 0, (bits * factors).sum(axis=2))
    return hashes


def shared_seconds(index, others):
    """{name: segments of an index that share a second of PPG with those of another}."""
    ours = second_hashes(index)
    return {name: int((np.isin(ours, second_hashes(other)) & (ours != 0)).any(1).sum())
            for name, other in others.items()}


def check_honesty(part, tpp, checkpoint, baseline, bootstrap):
    """Checks that need no further reading: what they found, and loud lines on what is wrong."""
    train, tune, test, older = (set(checkpoint["split"].get(name, ()))
                                for name in ("train", "tune", "test", "ancestors"))
    both = len((train & tune) | (test & (train | tune | older)))
    found, problems = {"patients_in_two_parts": both}, []
    if both:
        problems.append(f"{both} patients are in two parts of the split: these scores are leaked")
    found["constant_output"] = bool(np.ptp(tpp) < LEAST_CHANGE)
    if found["constant_output"] and len(tpp) > 1:
        problems.append(f"CONSTANT OUTPUT: the model says {tpp[0]:.1f} mmHg for every segment")
    if "start_s" in part.fields:
        _, gap = metrics.changes(part.series, part.fields["start_s"])
        found["overlapping_windows"] = int(np.sum(np.abs(gap) < 59.99))
    if baseline is not None:
        mixed = np.random.default_rng(0).permutation(len(tpp))
        truth = part.fields["tpp"]
        found["skill_with_shuffled_labels"] = metrics.skill(truth[mixed], tpp, baseline[mixed],
                                                            bootstrap)
    return found, problems


# ---------------------------------------------------------------- the evaluation

def evaluate(checkpoint_path, data=None, split=None, condition=None, salt_file=None, batch_size=256,
             device=None, workers=0, keep_index=False, full=False, compare=()):
    """Scores a checkpoint: (results for the JSON, arrays of the scored segments for figures).

    data: files, or None for those of the run. full: also what the report alone shows (PPG swapped,
    strata, all segments of good signal); compare: checkpoints to list beside. Raises DataError and
    CheckpointError as one line.
    """
    how = {"batch_size": batch_size, "device": header.choose_device(device), "workers": workers}
    checkpoint = header.load_checkpoint(checkpoint_path)
    model, keys = header.load_model(checkpoint, how["device"]), checkpoint["keys"]
    chosen = choose_segments(checkpoint_path, checkpoint, data, split, condition, salt_file,
                             keep_index)
    train = tune = None
    if chosen.fitted:
        train = read_part(chosen.fitted["train"], keys, MOST_FITTED)
        tune = read_part(chosen.fitted["tune"], keys)
    calibration = checkpoint.get("calibration")
    if not calibration and train:
        calibration = make_calibration(model, train.dataset, tune.dataset, **how)

    part = read_part(chosen.scored, keys)
    bootstrap = metrics.PatientBootstrap(part.patients)
    tpp, spread, distance = predict_tpp(model, part, how, (calibration or {}).get("novelty"))
    truth, origin = part.fields["tpp"], origin_of(chosen.files)

    def beside_it(predictions):
        return {name: score_beside(part, tpp, one, bootstrap) for name, one in predictions.items()}

    fitted, best, others, intervals = {}, None, {}, {}
    if train:
        fitted, best = fit_baselines(part, train, tune, vitals_of(keys))
        others = {name: one.predict(part.fields) for name, one in fitted.items()}
    else:
        print("baselines left out: the train patients' data are not here")
    compared = predict_beside(checkpoint_path, checkpoint, compare, part, how)
    results = {"checkpoint": os.path.basename(checkpoint_path), "split": chosen.split,
               "condition": chosen.condition, "origin": origin, "warning": chosen.warning,
               "keys": keys, "simulated": "simulated" in origin,
               "note": simulated_note(origin, checkpoint["provenance"]["origin"]),
               **score_predictions(part, tpp, bootstrap), "baselines": beside_it(others),
               "skill": None, "compared": beside_it(compared), "uncertainty": None}
    if best:
        results.update(skills(results["baselines"], best))
    if calibration:
        intervals = intervals_of(tpp, spread, calibration)
        results["uncertainty"] = how_sure(part, tpp, spread, intervals, calibration, distance,
                                          bootstrap)
    results["checks"], problems = check_honesty(part, tpp, checkpoint, others.get(best), bootstrap)
    results["problems"] = problems
    if chosen.fitted and chosen.held_out:
        shared = shared_seconds(chosen.scored, chosen.fitted)
        results["checks"]["shared_seconds"] = shared
        problems += [f"{number} of {len(part)} segments share seconds of PPG with {name} "
                     "segments: these scores are leaked"
                     for name, number in shared.items() if number]
    arrays = {"truth": truth, "prediction": tpp, "part": part, "intervals": intervals,
              "patients": chosen.scored.patients[part.patients], "baselines": others,
              "best": others.get(best), "compared": compared}
    if full:
        swapped = predict_with_swapped_ppg(model, part, how) if model.with_ppg else None
        if swapped is not None:
            results["swapped_ppg"] = score_beside(part, tpp, swapped, bootstrap)
            if np.abs(tpp - swapped).max() < LEAST_CHANGE:
                problems.append("IGNORES THE PPG: with another patient's PPG it says the same")
        results["strata"] = strata(part, tpp, spread, intervals.get(0.9), distance)
        results["patients"] = spread_over_patients(part.patients, tpp - truth)
        results["good_signal"] = score_good_signal(model, chosen, how, fitted.get(best))
        arrays["worst"] = worst_segments(part, tpp)
    for line in loud_lines(results):
        print(f"WARNING: {line}", file=sys.stderr)
    return results, arrays


def predict_beside(checkpoint_path, checkpoint, compare, part, how):
    """{name in tables: TPP [N]} of a part's segments by other runs of the same split: those named,
    and those of --ablate."""
    start, found = os.path.splitext(checkpoint_path)[0], {}
    listed = {path: os.path.basename(path) for path in compare}
    for ending, name in ABLATIONS.items():
        listed.setdefault(f"{start}{ending}.pth", name)
    for path, name in listed.items():
        try:
            other = header.load_checkpoint(path)
            if other["split"] != checkpoint["split"]:
                raise header.DataError(f"{path}: trained on other patients; only runs of the same "
                                       "data and --split-seed can be compared")
        except (header.CheckpointError, header.DataError):
            if path in compare:
                raise
            continue        # of --ablate there is none, or it is not finished
        dataset = header.TPP_PPG_dataset(part.dataset.index, "segment", other["keys"])
        found[name] = predict_tpp(header.load_model(other, how["device"]),
                                  replace(part, dataset=dataset), how)[0]
    return found


def score_good_signal(model, chosen, how, baseline):
    """The same patients' segments of good signal, whatever the label's quality (gate 'any').

    The default gate's conditions on r² and Pcrit need the arterial line, and they cut the range of
    what is to be predicted. baseline: the `Baseline` to compare with, or None.
    """
    index = header.create_dataset_index(condition="any", path=chosen.files)
    index = index.select(np.isin(index.patients, chosen.scored.patients)[index.encounter_patient])
    part = read_part(index, model.keys)
    bootstrap = metrics.PatientBootstrap(part.patients)
    tpp = predict_tpp(model, part, how)[0]
    found = {"n_segments": len(part), "n_patients": bootstrap.n_patients,
             "share_kept_by_gate": len(chosen.scored) / len(part),
             "tpp": scores_with_intervals(part.fields["tpp"], tpp, bootstrap),
             "p_crit_r2": metrics.scores(part.fields["p_crit"], part.fields["map"] - tpp)["r2"]}
    if baseline is not None:
        found["baseline"] = dict(score_beside(part, tpp, baseline.predict(part.fields), bootstrap),
                                 name=baseline.name)
    return found


def worst_segments(part, tpp, count=10):
    """The segments of the largest errors, worst first: [(row, what to write above its picture)]."""
    def text(row):
        known = {"MAP": "map", "PP": "pp", "HR": "hr", "r²": "r2"}
        vitals = [f"{name} {part.fields[key][row]:.{2 if key == 'r2' else 0}f}"
                  for name, key in known.items() if key in part.fields]
        return (f"predicted {tpp[row]:.0f}, label {part.fields['tpp'][row]:.0f} mmHg "
                f"({', '.join(vitals)})")

    rows = np.argsort(-np.abs(tpp - part.fields["tpp"]), kind="stable")[:count]
    return [(int(row), text(row)) for row in rows]


def print_results(results):
    """The table a person reads first."""
    if results["note"]:
        print(f"*** {results['note']} ***")
    for problem in results["problems"]:
        print(f"!!! {problem}")
    few = results["n_patients"] < metrics.FEW_PATIENTS
    print(f"{results['n_segments']:,} segments of {results['n_patients']:,} {results['split']} "
          f"patients ({results['origin']}); 95 % intervals over patients"
          + (f" (too narrow below {metrics.FEW_PATIENTS} patients, none below "
             f"{metrics.LEAST_PATIENTS})" if few else ""))
    print_table(*score_table(results))
    if results["skill"]:
        skill = results["skill"]
        print(f"skill over {skill['over']} (best on the tune patients): {shown(skill, 3)}"
              + above_zero(skill) + "; each patient weighing the same "
              + shown(results["skill_per_patient"], 3))
        hindsight = results["skill_in_hindsight"]
        if hindsight["over"] != skill["over"]:
            print(f"skill over {hindsight['over']} (best of them here): {shown(hindsight, 3)}"
                  + above_zero(hindsight))
    if "true" in results:
        print(against_true(results["true"]))
    sure = interval_90(results)
    if "segments" in sure:
        print(f"90 % prediction interval: ± {sure['half_width']:.1f} mmHg, holds "
              f"{percent(sure['segments'])} of the segments here")
    if "novelty" in (results["uncertainty"] or {}):
        print(unlike_training(results["uncertainty"]["novelty"]))
    detection = results["detection"]
    print(f"TPP < {detection['threshold']:g} mmHg: sensitivity "
          f"{percent(detection['sensitivity'])}, specificity {percent(detection['specificity'])}, "
          f"ROC area {shown(detection['auc'])}")


def loud_lines(results):
    """What is wrong with the scores, or the patients, or both."""
    return [line for line in (results["warning"], *results["problems"]) if line]


def all_scores(results):
    """(name, scores) of the network and of all that is listed beside it: baselines, other runs, the
    PPG swapped."""
    yield "network", dict(results["tpp"], p_crit_r2=results["p_crit"]["r2"], skill=None,
                          auc=results["detection"]["auc"]["value"])
    yield from results["baselines"].items()
    yield from results["compared"].items()
    if "swapped_ppg" in results:
        yield "network, PPG of another patient", results["swapped_ppg"]


def score_table(results, name_of=str):
    """(rows, headers) of `all_scores`."""
    rows = [[name_of(name), shown(of_ci95(one, "rmse")),
             *(one[key] for key in ("mae", "mead", "bias", "sd", "r2", "p_crit_r2", "auc")),
             one["skill"] and shown(one["skill"])] for name, one in all_scores(results)]
    return rows, ["TPP, mmHg", "RMSE (95 %)", "MAE", "MeAD", "bias", "SD", "R²", "R² of Pcrit",
                  "ROC area, low", "network's skill over it"]


def against_true(true):
    return (f"Against the simulator's true TPP: RMSE {shown(of_ci95(true, 'rmse'))} mmHg, bias "
            f"{true['bias']:+.2f}; the label itself is off by RMSE {true['label']['rmse']:.2f}, "
            f"bias {true['label']['bias']:+.2f}.")


def unlike_training(novelty):
    return (f"Inputs unlike those of training: {percent(novelty['rate'])} of the minutes here "
            f"({percent(novelty['expected'])} by design). RMSE {shown(novelty['rmse_new'])} mmHg "
            f"on these, {shown(novelty['rmse_usual'])} on the others.")


def rmse_of_patients(found):
    return "Each patient's own RMSE: " + ", ".join(
        f"{share} of patients below {value:.1f}"
        for share, value in found["rmse_quantiles"].items()) + " mmHg"


def above_zero(skill):
    """What is to be said of a skill's interval that does not lie above 0."""
    if np.isnan(skill["low"]):
        return f" - no interval ({metrics.LEAST_PATIENTS} patients needed), so not shown above 0"
    return "" if skill["low"] > 0 else " - NOT above 0"


def shown(estimate, digits=2, unit=""):
    """'4.72 (4.27 to 5.21)', or what there is of it."""
    if estimate is None or not np.isfinite(estimate["value"]):
        return "not known"
    text = f"{estimate['value']:.{digits}f}{unit}"
    if not np.isfinite(estimate["low"]):
        return text
    return f"{text} ({estimate['low']:.{digits}f} to {estimate['high']:.{digits}f})"


def percent(share):
    """'94 % (91 to 96)' of an estimate, '94 %' of a number."""
    if not isinstance(share, dict):
        return f"{100 * share:.0f} %"
    return shown({k: 100 * share[k] for k in ("value", "low", "high")}, 0, " %")


def of_ci95(scores, name):
    """A score of `scores_with_intervals` as an estimate."""
    low, high = scores["ci95"][name]
    return {"value": scores[name], "low": low, "high": high}


def interval_90(results):
    """What is known of the 90 % prediction interval, or {}."""
    return (results["uncertainty"] or {}).get("levels", {}).get("90 %", {})


def histogram_of(results, arrays):
    box = dict(results["tpp"], n_patients=results["n_patients"], p_crit_r2=results["p_crit"]["r2"])
    return tk_utils.histogram_figure(arrays["truth"], arrays["prediction"], box, results["note"])


def draw_histogram(results, arrays, path):
    tk_utils.save_figure(histogram_of(results, arrays), path)


# ---------------------------------------------------------------- the report

def headline(results):
    """The sentences that a clinician reads first: how far off, for whom, how sure, against what."""
    found, per_patient = results["tpp"], results["per_patient"]["tpp"]
    lines = [f"Off by {shown(of_ci95(found, 'rmse'), 1)} mmHg (RMSE, 95 % interval); half of the "
             f"estimates by less than {found['mead']:.1f}. Each patient weighing the same: "
             f"{shown(per_patient['rmse'], 1)}."]
    whom = (f"For {results['n_segments']:,} minutes of {results['n_patients']:,} "
            + ("SIMULATED patients" if results["simulated"] else "patients")
            + (", none of them seen in training" if results["split"] == "test" else
               " (all of these data)" if results["split"] == "all" else
               f" ({results['split']} patients of the run)"))
    lines.append(whom + ("." if results["n_patients"] >= metrics.FEW_PATIENTS else
                         f": too few; intervals are too narrow below {metrics.FEW_PATIENTS} "
                         "patients."))
    sure = interval_90(results)
    if "segments" in sure:
        lines.append(f"Nine in ten estimates are meant to lie within ± {sure['half_width']:.0f} "
                     f"mmHg of the label; here {percent(sure['segments'])} did.")
    else:
        lines.append("How sure a single estimate is, is not known: "
                     + sure.get("refused", "there is no calibration") + ".")
    if results["skill"]:
        skill, here = results["skill"], results["skill_in_hindsight"]
        better = ("better than" if skill["low"] > 0 else "worse than" if skill["high"] < 0 else
                  "NOT shown to be better than")
        against = (f"It is {better} {named(skill['over'])}, the best baseline on the tune "
                   f"patients: skill {shown(skill)}, where 0 is no gain and 1 is perfect.")
        if here["value"] < 0:
            lines.append(f"It does WORSE here than {named(here['over'])}: skill {shown(here)}.")
            against = against.replace("It is", "By the rule set before, it is", 1)
        elif here["over"] != skill["over"]:
            against += f" Over {named(here['over'])}, the best of them here: {shown(here)}."
        lines.append(against)
    detection = results["detection"]
    lines.append(f"Of the minutes with TPP below {detection['threshold']:g} mmHg it finds "
                 f"{percent(detection['sensitivity'])}; of the others it clears "
                 f"{percent(detection['specificity'])}.")
    return lines


NAMES = {"mean_tpp": "the train patients' mean TPP", "map_minus_mean_pcrit": "MAP - mean Pcrit",
         "ridge": "ridge on the network's vitals",
         "gradient_boosting": "gradient boosting on the network's vitals",
         "gradient_boosting_ppg": "gradient boosting on vitals and classical PPG features",
         "ridge_all": "ridge on all vitals (needs the arterial line)",
         "gradient_boosting_all": "gradient boosting on all vitals (needs the arterial line)"}


def named(name):
    return NAMES.get(name, name)


def make_figures(results, arrays):
    """{file name: (matplotlib Figure, what it shows)} of the report."""
    truth, tpp, note = arrays["truth"], arrays["prediction"], results["note"]
    part, detection = arrays["part"], results["detection"]
    rows = [(name, *of_ci95(one, "rmse").values()) for name, one in all_scores(results)]
    of_strata = [(f"{one['of']} {one['range']}", *(one["rmse"][k] for k in ("value", "low",
                                                                            "high")))
                 for one in results["strata"]]
    _, true_change, change = metrics.changes(part.series, truth, tpp)
    worst = [row for row, _ in arrays["worst"]]
    reliability = (results["uncertainty"] or {}).get("reliability")
    best = min((one["rmse"] for one in results["baselines"].values()), default=None)
    agreement = results["bland_altman"]
    waves = part.dataset.waveform("ppg", np.array(worst))
    return {
        "histogram_plot": (histogram_of(results, arrays), "Predicted against label TPP: RMSE "
                           f"{results['tpp']['rmse']:.1f} mmHg, R² {results['tpp']['r2']:.2f}"),
        "baselines": (tk_utils.intervals_figure(rows, "RMSE of TPP (mmHg), 95 %", note, best,
                                                 highlight=0),
                      f"RMSE of the network, {rows[0][1]:.1f} mmHg, and of what stands beside it"),
        "bland_altman": (tk_utils.bland_altman_figure(truth, tpp, agreement, note),
                         f"Bland-Altman plot: bias {agreement['bias']['value']:.1f}, limits "
                         f"{agreement['lower']['value']:.1f} and "
                         f"{agreement['upper']['value']:.1f} mmHg"),
        "detection": (tk_utils.detection_figure(truth < detection["threshold"], -tpp, detection,
                                                reliability, note),
                      f"ROC curve for low TPP, area {detection['auc']['value']:.2f}, and observed "
                      "against predicted probability"),
        "trend": (tk_utils.trend_figure(true_change, change, metrics.TREND_ZONE, note),
                  "Four-quadrant plot of changes from minute to minute, predicted against label"),
        "strata": (tk_utils.intervals_figure(of_strata, "RMSE of TPP (mmHg), 95 %", note,
                                             results["tpp"]["rmse"]),
                   "RMSE by ranges of pressure, heart rate and signal quality; numbers in the "
                   "table"),
        "worst": (tk_utils.waveforms_figure(waves, [text for _, text in arrays["worst"]], 60,
                                            title_note=note),
                  f"15 s of PPG of the {len(worst)} segments with the largest errors")}


def write_report(results, arrays, path, checkpoint_path):
    """The page, its figures as PNG and PDF in figures_resnet/; of test patients the model card."""
    checkpoint = header.load_checkpoint(checkpoint_path)
    figures = make_figures(results, arrays)
    for name, (figure, _) in figures.items():
        for suffix in ("png", "pdf"):
            tk_utils.save_figure(figure, f"figures_resnet/{name}.{suffix}")
    title = f"TPP from the PPG: {os.path.splitext(results['checkpoint'])[0]}"
    if results["simulated"]:
        title += " on SIMULATED patients"
    tk_utils.html_page(path, title, "".join(report_body(results, checkpoint, figures)))
    print(f"wrote {path} and figures_resnet/{{{','.join(figures)}}}.png and .pdf")
    if results["split"] == "test":
        card = os.path.splitext(checkpoint_path)[0] + "_card.md"
        with tk_utils.atomic_file(card) as file:
            file.write(model_card(results, checkpoint))
        print(f"wrote {card}")


def report_body(results, checkpoint, figures):
    """The pieces of the page, in order."""
    text, table = tk_utils.html_text, tk_utils.html_table

    def figure(name):
        return tk_utils.html_figure(*figures[name])

    if results["note"]:
        yield text(results["note"], kind="note")
    for line in loud_lines(results):
        yield text(line, kind="note")
    for line in headline(results):
        yield text(line, kind="lead")
    yield text("Research only. TPP = MAP - Pcrit, both from the arterial line, is the label and "
               "itself an estimate. Intervals are 95 %, over patients.", kind="small")

    yield text("Against what", "h2")
    yield figure("baselines")
    yield table(*score_table(results, named))
    yield text("Baselines are fitted on the same train patients and need no PPG unless they say "
               "so. MAP is an input and part of TPP: the error of TPP is that of Pcrit, and R² of "
               "TPP flatters. Skill = 1 - MSE / MSE of the other.", kind="small")
    if not results["compared"]:
        yield text("Not shown: the network trained without the PPG and without vitals "
                   "(train_resnet.py --ablate trains them).", kind="small")

    yield text("How far off", "h2")
    yield figure("histogram_plot")
    yield figure("bland_altman")
    yield table(error_rows(results), ["", "value (95 %)"])
    if "true" in results:
        yield text(against_true(results["true"]))
    good = results["good_signal"]
    yield text(f"The gate keeps {percent(good['share_kept_by_gate'])} of these patients' minutes "
               f"of good signal; its conditions on the label need the arterial line. On all "
               f"{good['n_segments']:,} of them: RMSE {shown(of_ci95(good['tpp'], 'rmse'))} mmHg, "
               f"R² of Pcrit {good['p_crit_r2']:.2f}"
               + (f", skill over {named(good['baseline']['name'])} "
                  f"{shown(good['baseline']['skill'])}" if "baseline" in good else "") + ".")
    yield text("Borrowed standards", "h3")
    yield table(standard_rows(results["standards"]), ["", "found", "asked", ""])
    yield text("Made for blood pressure monitors; no standard exists for TPP.", kind="small")

    yield text("Does it follow changes?", "h2")
    yield figure("trend")
    yield table(trend_rows(results), ["", "value (95 %)"])

    yield text(f"Finding TPP below {results['detection']['threshold']:g} mmHg", "h2")
    yield figure("detection")
    yield table([[name, percent(results["detection"][key])] for name, key in (
        ("minutes that are low", "prevalence"), ("sensitivity", "sensitivity"),
        ("specificity", "specificity"), ("right when it says low", "ppv"),
        ("right when it says not low", "npv"))], ["", "share (95 %)"])

    yield text("How sure is a single estimate?", "h2")
    yield from uncertainty_pieces(results["uncertainty"])

    yield text("Where it is good and where not", "h2")
    yield figure("strata")
    yield table([[one["of"], one["range"], one["n_segments"], one["n_patients"],
                  shown(one["rmse"]), one["bias"],
                  None if one["coverage_90"] is None else percent(one["coverage_90"])]
                 for one in results["strata"]],
                ["", "range", "minutes", "patients", "RMSE, mmHg (95 %)", "bias",
                 "in the 90 % interval"])
    yield text(rmse_of_patients(results["patients"]) + ".")
    yield text("The ten worst", "h3")
    yield figure("worst")

    yield text("Checks", "h2")
    yield table(check_rows(results), ["", "found"])
    yield text("Made with", "h2")
    yield table(provenance_rows(results, checkpoint), ["", ""])


def error_rows(results):
    found, own, agreement = results["tpp"], results["per_patient"], results["bland_altman"]
    same = "each patient weighing the same"
    return [
        *([name, shown(of_ci95(found, key))] for key, name in (
            ("rmse", "RMSE, mmHg"), ("mae", "mean absolute error, mmHg"),
            ("mead", "median absolute error, mmHg"), ("bias", "bias, mmHg"),
            ("sd", "SD of the errors, mmHg"), ("r2", "R² of TPP"))),
        ["R² of Pcrit", shown(of_ci95(results["p_crit"], "r2"))],
        *([f"{name}, {same}", shown(own["tpp"][key])] for key, name in (
            ("rmse", "RMSE"), ("mae", "mean absolute error"), ("r2", "R² of TPP"))),
        [f"R² of Pcrit, {same}", shown(own["p_crit_r2"])],
        ["lower limit of agreement, mmHg", shown(agreement["lower"])],
        ["upper limit of agreement, mmHg", shown(agreement["upper"])],
        ["SD between patients, within, mmHg",
         f"{agreement['sd_between']:.2f}, {agreement['sd_within']:.2f}"]]


def standard_rows(found):
    aami, means, share, bhs, ieee = (found[name] for name in (
        "aami_1", "aami_2", "aami_esh_iso", "bhs", "ieee_1708"))

    def met(one):
        return "met" if one["passed"] else "not met"

    return [
        ["AAMI/ISO 81060-2-style, criterion 1", f"{aami['mean']:+.1f} ± {aami['sd']:.1f} mmHg",
         "mean within 5, SD up to 8", met(aami)],
        ["criterion 2, SD of patients' means", f"{means['sd']:.1f} mmHg",
         f"up to {means['limit']:.2f}", met(means)],
        ["errors within 10 mmHg", percent(share["within_10"]), "85 % or more", met(share)],
        ["BHS-style grade, within 5, 10, 15 mmHg",
         ", ".join(percent(bhs[f"within_{bound}"]) for bound in (5, 10, 15)),
         "A: 60, 85, 95 %", bhs["grade"]],
        ["IEEE 1708-style grade, mean absolute difference", f"{ieee['mad']:.1f} mmHg",
         "A: up to 5", ieee["grade"]]]


def trend_rows(results):
    rows = []
    for key, name in (("tpp", "TPP"), ("p_crit", "Pcrit")):
        trend, within = results["trend"][key], results["within_patient"][key]
        rows += [[f"changes of {name} the right way round ({trend['n']:,} of "
                  f"{trend['n_changes']:,} outside ± {trend['zone']:g} mmHg)",
                  percent(trend) if trend["n"] else "none"],
                 [f"correlation within patients, {name}", shown(within)]]
    return rows


def uncertainty_pieces(found):
    if not found:
        yield tk_utils.html_text("Not known: the checkpoint has no calibration and the tune "
                                 "patients' data are not here.")
        return
    rows = []
    for level, one in found["levels"].items():
        if "refused" in one:
            rows.append([level, one["refused"], None, None, None])
        else:
            rows.append([level, f"± {one['half_width']:.1f}", percent(one["segments"]),
                         percent(one["patients"]), percent(one["lowest_tenth"])])
    yield tk_utils.html_table(rows, ["meant to hold", "width, mmHg", "holds of minutes",
                                     "each patient weighing the same",
                                     "a tenth of patients has less than"])
    yield tk_utils.html_text(f"Calibrated on {found['n_tune_patients']} tune patients (conformal): "
                             "right on average over patients, not for each one.", kind="small")
    if "novelty" in found:
        yield tk_utils.html_text(unlike_training(found["novelty"]))


def check_rows(results):
    found = results["checks"]
    ignored = any(line.startswith("IGNORES") for line in results["problems"])
    rows = [["patients in two parts of the split", found["patients_in_two_parts"]],
            *([f"minutes that share a second of PPG with {name} minutes", number]
              for name, number in found.get("shared_seconds", {}).items()),
            ["minutes that overlap the one before", found.get("overlapping_windows")],
            ["the output is constant", "YES" if found["constant_output"] else "no"],
            ["the output is the same with another patient's PPG",
             "YES" if ignored else "no" if "swapped_ppg" in results else "not known"],
            ["skill with shuffled labels (must not be above 0)",
             shown(found.get("skill_with_shuffled_labels"))]]
    return [row for row in rows if row[1] is not None]


def provenance_rows(results, checkpoint):
    provenance, config = checkpoint["provenance"], checkpoint["config"]
    return [
        ["checkpoint", results["checkpoint"]],
        ["inputs and label", ", ".join(results["keys"])],
        ["trained on", f"{provenance['origin']}, {provenance['n_segments']:,} segments of "
                       f"{provenance['n_patients']:,} patients (train, tune and test)"],
        ["scored on", f"{results['origin']}, {results['split']} patients"],
        ["quality gate", results["condition"]],
        ["settings", ", ".join(f"{k} {v}" for k, v in config.items() if k != "keys")],
        ["versions", ", ".join(f"{k} {v}" for k, v in provenance["versions"].items())],
        ["code", str(provenance["git_revision"])]]


# Items of TRIPOD+AI (doi 10.1136/bmj-2023-078378) that only a person can write, or complete.
FOR_A_PERSON = (
    "2 abstract", "3a-c background: healthcare context, intended use, health inequalities",
    "5a-b why these data, whom they stand for, their dates", "6a-c centres, eligibility, treatment",
    "10 why the sample is large enough", "14 fairness: error by age, sex, skin tone (not in the "
    "data)", "17 ethics approval and consent", "18a-e funding, interests, protocol, registration, "
    "how to get the data", "19 patient and public involvement", "20a-c participants: flow, "
    "characteristics, those scored beside those trained on", "25 interpretation",
    "26 further limitations", "27b-c use in care: by whom, with what expertise; next steps")


def model_card(results, checkpoint):
    """The model card in Markdown: the TRIPOD+AI items that a program can fill, and the others."""
    provenance, config = checkpoint["provenance"], checkpoint["config"]
    n_weights = sum(weights.numel() for weights in checkpoint["model"].values())
    keys, counts = results["keys"], {k: len(v) for k, v in checkpoint["split"].items()}
    inputs = ", ".join(["PPG waveform"] * (keys[0] == "ppg") + vitals_of(keys))
    sure, detection = results["uncertainty"] or {}, results["detection"]
    half = sure.get("levels", {}).get("90 %", {}).get("half_width")
    usual = [f"{key} {one['mean']:.0f} ± {one['sd']:.0f}"
             for key, one in checkpoint["normaliser"].items()]
    items = [
        ("1 title", f"Development and evaluation of a network that estimates {keys[-1]} from a "
         f"minute of {inputs}" + (", on SIMULATED patients" if results["simulated"] else "")),
        ("4 objectives", "development and internal validation" if results["split"] == "test" else
         f"scores on {results['split']} patients"),
        ("5a data", f"trained on: {provenance['origin']}; scored on: {results['origin']}"),
        ("7 data preparation", f"60-s segments at 60 Hz; quality gate '{results['condition']}'"),
        ("8a outcome", "TPP = MAP - Pcrit of the same minute, mmHg; Pcrit from the arterial line "
         f"by regression over beats (labels.py, method {provenance.get('label_method', 'unknown')})"
         ": an estimate, too"),
        ("8b-c assessors, blinding", "none: the label is computed, without the prediction"),
        ("9a-b predictors", f"{inputs}, of the same minute, chosen beforehand"),
        ("9c assessors", "none: signals and numbers of monitors"),
        ("11 missing data", "segments with a missing or non-finite field are left out"),
        ("12a use of the data", f"parted by patient: {counts.get('train', 0):,} train, "
         f"{counts.get('tune', 0):,} tune, {counts.get('test', 0):,} test; split seed "
         f"{provenance['seeds']['split_seed']}"),
        ("12b handling of predictors", "each PPG segment normalised by its own mean and SD, vitals "
         "by the train patients'"),
        ("12c model", f"MyFirstResNet, {n_weights:,} weights; "
         + ", ".join(f"{k} {config[k]}" for k in ("epochs", "batch_size", "lr", "weight_decay",
                                                  "l1", "spread", "seed") if k in config)
         + "; the epoch with the least loss on the tune patients is kept"),
        ("12d clusters", "patients: split, intervals and calibration take them as the units; "
         "centres are not in the data"),
        ("12e measures", "RMSE, MAE, MeAD, R², bias, SD; R² of Pcrit; skill over baselines; "
         "detection of low TPP; coverage; 95 % intervals from a bootstrap over patients"),
        ("12f, 24 updating", "none"),
        ("12g predictions", "by evaluate.py from the checkpoint, as by predict.py"),
        ("13 class imbalance", f"{percent(detection['prevalence']['value'])} of scored "
         f"minutes have TPP < {detection['threshold']:g} mmHg; nothing was rebalanced"),
        ("15 model output", f"{keys[-1]} in mmHg, a number for each minute; 90 % interval "
         + (f"± {half:.1f} mmHg" + (" on average" if sure.get("own_spread") else "") if half else
            "not available") + f"; low below {detection['threshold']:g} mmHg, a published cut-off"),
        ("16 training versus evaluation", "same source" if results["split"] == "test" else
         "other data or patients; see 5a"),
        ("18e-f data and code", f"code revision {provenance['git_revision']}; data fingerprint "
         f"{provenance['data_fingerprint'][:16]}"),
        ("20c beside the development data", f"train patients: {', '.join(usual)}" + (
            "; inputs unlike theirs: {} of the scored minutes ({} by design)".format(
                *(percent(sure["novelty"][name]) for name in ("rate", "expected")))
            if "novelty" in sure else "")),
        ("21 numbers", f"scored: {results['n_segments']:,} segments of {results['n_patients']:,} "
         f"patients, {detection['n_low']:,} of them low; for the others see 12a"),
        ("22 specification", f"the checkpoint {results['checkpoint']}, with weights, normaliser "
         "and settings"),
        ("23a performance", " ".join(headline(results)) + " " + "; ".join(
            f"{one['of']} {one['range']}: RMSE {one['rmse']['value']:.1f}"
            for one in results["strata"])),
        ("23b heterogeneity", rmse_of_patients(results["patients"])),
        ("26 limitations", limitations(results)),
        ("27a poor input", "predict.py refuses minutes of poor signal and marks inputs unlike "
         "those of training")]
    lines = [f"# Model card: {os.path.splitext(results['checkpoint'])[0]}", ""]
    if results["note"]:
        lines += [f"**{results['note']}**", ""]
    lines += [f"**{line}**\n" for line in loud_lines(results)]
    lines += ["Research only: no clinical claim, no medical device.", "",
              "| TRIPOD+AI item | |", "|---|---|"]
    lines += ["| {} | {} |".format(name, text.replace("|", "\\|")) for name, text in items]
    lines += ["", "## For a person to write", ""] + [f"- {item}" for item in FOR_A_PERSON]
    return "\n".join(lines) + "\n"


def limitations(results):
    found = ["the label needs assumptions on the arterial tree and may be biased by several mmHg",
             f"the gate, which needs the arterial line, keeps "
             f"{percent(results['good_signal']['share_kept_by_gate'])} of the minutes of good "
             "signal"]
    if results["split"] == "test":
        found.append("no other data were scored")
    if results["note"]:
        found.append(results["note"].lower())
    if results["n_patients"] < metrics.FEW_PATIENTS:
        found.append(f"only {results['n_patients']} patients scored")
    if results["skill"] and not results["skill"]["low"] > 0:
        found.append("no gain over the best baseline was shown")
    return "; ".join(found)


def compare_runs(paths, **how):
    """Several runs, such as seeds or folds: ({'runs', 'summary', 'together'}, arrays of all).

    Prints a line for each, their mean and SD, and the table of all predictions taken together.
    how: arguments of `evaluate`.
    """
    found = [evaluate(path, **how) for path in paths]
    runs = [results for results, _ in found]
    rows = [[one["checkpoint"], one["n_patients"], one["tpp"]["rmse"], one["tpp"]["mae"],
             one["tpp"]["bias"], one["tpp"]["r2"], one["p_crit"]["r2"],
             one["skill"] and one["skill"]["value"]] for one in runs]
    columns = np.array([[np.nan if x is None else x for x in row[2:]] for row in rows])
    rows += [["mean", None, *columns.mean(0)], ["SD", None, *columns.std(0, ddof=1)]]
    print_table(rows, ["run", "patients", "RMSE", "MAE", "bias", "R2", "R2 of Pcrit", "skill"])
    pooled, arrays = together(runs, [arrays for _, arrays in found])
    print(f"\nthe {len(runs)} runs' predictions taken together:")
    print_results(pooled)
    return {"runs": runs, "summary": metrics.summarise(runs), "together": pooled}, arrays


def together(runs, arrays):
    """(results, arrays) of several runs' predictions as one set, in which a patient is one patient
    in whichever run: folds become all patients, seeds repeats of the same ones."""

    def joined(of_runs):
        """{key: [all segments]} of what every run has."""
        keys = [key for key in of_runs[0] if all(key in one for one in of_runs)]
        return {key: np.concatenate([one[key] for one in of_runs]) for key in keys}

    patients = np.unique(np.concatenate([one["patients"] for one in arrays]),
                         return_inverse=True)[1]
    bootstrap = metrics.PatientBootstrap(patients)
    fields = joined([one["part"].fields for one in arrays])
    begins = np.cumsum([0] + [len(one["part"].dataset.index.encounters) for one in arrays])
    series = [one["part"].series + begin for one, begin in zip(arrays, begins)]
    part = Part(None, fields, patients, np.concatenate(series))
    tpp = np.concatenate([one["prediction"] for one in arrays])
    notes = sorted({one["note"] for one in runs if one["note"]})
    results = {"split": runs[0]["split"], "origin": runs[0]["origin"], "note": "; ".join(notes),
               "problems": [], "skill": None, "uncertainty": None,
               **score_predictions(part, tpp, bootstrap)}
    for name in ("baselines", "compared"):
        results[name] = {key: score_beside(part, tpp, prediction, bootstrap)
                         for key, prediction in joined([one[name] for one in arrays]).items()}
    if all(one["best"] is not None for one in arrays):
        best = np.concatenate([one["best"] for one in arrays])
        results["baselines"]["each run's best"] = score_beside(part, tpp, best, bootstrap)
        results.update(skills(results["baselines"], "each run's best"))
    levels = [level for level in arrays[0]["intervals"]
              if all(isinstance(one["intervals"].get(level), tuple) for one in arrays)]
    if levels:
        results["uncertainty"] = {"levels": coverages(fields["tpp"], {
            level: tuple(map(np.concatenate, zip(*(one["intervals"][level] for one in arrays))))
            for level in levels}, bootstrap)}
    return results, {"truth": fields["tpp"], "prediction": tpp}


def main():
    options = parse_args()
    names = ("data", "split", "condition", "salt_file", "batch_size", "device", "workers",
             "keep_index")
    how = {name: getattr(options, name) for name in names}
    if len(options.checkpoints) > 1:
        results, arrays = compare_runs(options.checkpoints, **how)
    else:
        results, arrays = evaluate(options.checkpoints[0], **how, full=bool(options.report),
                                   compare=options.compare)
        print_results(results)
    if options.figure:
        draw_histogram(results.get("together", results), arrays, options.figure)
    if options.report:
        write_report(results, arrays, options.report, options.checkpoints[0])
    if options.json:
        write_json(options.json, results)


if __name__ == "__main__":
    sys.exit(run_script(main, "CheckpointError", "DataError", "TrainingError"))
