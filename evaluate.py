"""A checkpoint and data -> scores with intervals, baselines, JSON; the report, figures, model card.

    python evaluate.py runs/M1.5.pth                        # the run's own data, its test patients
    python evaluate.py runs/M1.5.pth --report report.html   # everything, as one page
    python evaluate.py runs/M1.5.pth --data FILE…           # other data: all its unseen patients
    python evaluate.py runs/M1.5.pth --compare runs/no_ppg.pth --report report.html
    python evaluate.py runs/M1.5_seed*.pth                  # several runs: each, mean ± SD, all

TPP = MAP - Pcrit and MAP is an input, so the error of TPP is the error of Pcrit, while R² of TPP is
lifted by the spread of MAP: read R² of Pcrit, and the skill over the baselines.
"""
import argparse
import glob
import json
import os
import sys
from dataclasses import dataclass

import numpy as np

import tk_utils
from tk_utils import print_table, run_script, write_json

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
    parser = argparse.ArgumentParser(allow_abbrev=False, description=__doc__.split("\n\n")[0])
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
        from training_header import DataError
        raise DataError(f"{path}: not the record of a run; remove it and name the data with "
                        "--data") from None


def find_files(names):
    """The files of names and globs, each of which must be there."""
    from training_header import DataError
    found = [path for name in names for path in sorted(glob.glob(name)) or [name]]
    missing = [path for path in found if not os.path.exists(path)]
    if missing:
        raise DataError(f"{missing[0]}: no such file (prepare.py makes one from recordings, "
                        "simulate.py from virtual patients)")
    return found


def patient_parts(index, checkpoint, salt_file):
    """The part of the run in which each patient of an index was: [P] of 'train', …, or None.

    By the checkpoint's salted hashes, so that it holds for any file. None and a loud line where
    there is no salt to compare by, or not the run's.
    """
    from training_header import hash_patients, read_salt, salt_mark
    salt = read_salt(salt_file) if os.path.exists(salt_file) else None
    if salt is None or salt_mark(salt) != checkpoint["provenance"].get("salt"):
        print(f"WARNING: {salt_file}: {'not the salt of this run' if salt else 'no such file'} "
              "(--salt-file), so whether these patients were trained on COULD NOT BE CHECKED",
              file=sys.stderr)
        return None
    known = {h: part for part, hashes in checkpoint["split"].items() for h in hashes}
    hashes = hash_patients(index.patients.tolist(), salt)
    return np.array([known.get(h) for h in hashes], dtype=object)


def choose_patients(parts, split, own_data):
    """Mask [P] of the patients to score, and a warning or None. parts: as `patient_parts` gives."""
    from training_header import DataError
    seen = np.isin(parts, ["train", "tune", "ancestors"])
    if split in ("train", "tune"):
        return parts == split, f"these are {split} patients of this checkpoint: no test of it"
    if split == "test":
        if not (parts == "test").any():
            raise DataError("none of the checkpoint's test patients is in these data; "
                            "--split all takes every patient")
        return parts == "test", None
    warning = None
    if seen.any():
        warning = (f"{int(seen.sum())} of {len(parts)} patients WERE SEEN IN TRAINING this "
                   "checkpoint; these scores flatter it" + (" (--split test)" if own_data else ""))
    return np.ones(len(parts), bool), warning


def fields_of(dataset, keys):
    """{field: [N] float64} of a dataset's segments, those of `keys` that every encounter has."""
    from datasets import ABSENT, DIFFERENCES
    fields = dataset.index.fields
    stored = {k for k, offsets in zip(fields, dataset.index.stored) if (offsets != ABSENT).all()}
    there = [k for k in keys if k in stored or set(DIFFERENCES.get(k, "?")) <= stored]
    return {k: dataset.column(k).numpy().astype(np.float64) for k in there}


@dataclass
class Part:
    """The segments of some patients: dataset, fields {name: [N] float64} and patients [N]."""
    dataset: object
    fields: dict
    patients: np.ndarray
    series: np.ndarray          # [N] the number of each segment's encounter

    def __len__(self):
        return len(self.patients)


def read_part(index, keys, most=None):
    """The `Part` of an index: what baselines, strata and scores need, PPG features included.

    most: take so many segments at random where there are more.
    """
    import metrics
    from training_header import TPP_PPG_dataset
    share = 100 if most is None or len(index) <= most else 100 * most / len(index)
    dataset = TPP_PPG_dataset(index, "segment", keys, share)
    segments = np.arange(len(index)) if dataset.items is None else dataset.items
    wanted = dict.fromkeys((*FIELDS_OF_BASELINES, *FIELDS_OF_STRATA, *vitals_of(keys)))
    fields = {key: values[segments] for key, values in fields_of(dataset, wanted).items()}
    pulse = [metrics.ppg_features(dataset.waveform("ppg", segments[a:a + 512]))
             for a in tk_utils.progress(range(0, len(segments), 512), desc="PPG features",
                                        leave=False)]
    fields.update({name: np.concatenate([one[name] for one in pulse]) for name in pulse[0]})
    encounters = index.per_segment(np.arange(len(index.encounters)))
    return Part(dataset, fields, index.segment_patients()[segments], encounters[segments])


# ---------------------------------------------------------------- what the model says

def predict_tpp(model, part, how, novelty=None):
    """(TPP [N], the network's own spread [N] or None, distance from training inputs [N] or None).

    In mmHg; how: arguments of `predict_dataset`; novelty: of the checkpoint's calibration.
    """
    import metrics
    from training_header import predict_with_spread, watch_features
    distance = []
    with watch_features(model, lambda features: distance.append(
            metrics.novelty(features, novelty)) if novelty else None):
        found, spread = predict_with_spread(model, part.dataset, **how)
    tpp = found.astype(np.float64)
    if model.keys[-1] == "p_crit":
        tpp = part.fields["map"] - tpp
    return tpp, spread, np.concatenate(distance) if novelty else None


def predict_with_swapped_ppg(model, part, how):
    """TPP [N] where each segment has its own vitals and the PPG of another patient.

    (NumPy's order with a fixed seed: the same each time.) None where one patient has more than half
    of the segments.
    """
    from training_header import TPP_PPG_dataset
    count, most = len(part), np.bincount(part.patients).max()
    if 2 * most > count:
        return None
    order = np.random.default_rng(0).permutation(count)
    order = order[np.argsort(part.patients[order], kind="stable")]
    donor = np.empty(count, np.int64)
    donor[order] = np.roll(order, most)     # by patient, moved on by the longest: always another

    class SwappedPPG(TPP_PPG_dataset):
        def waveform(self, key, segments):
            return super().waveform(key, donor[segments])

    swapped = SwappedPPG(part.dataset.index, "segment", part.dataset.keys_to_load)
    return predict_tpp(model, Part(swapped, part.fields, part.patients, part.series), how)[0]


def make_calibration(model, train, tune, batch_size=256, device=None, workers=0):
    """What a checkpoint keeps to say how sure a prediction is, as plain numbers and lists.

    train, tune: `TPP_PPG_dataset`s. `metrics.fit_calibration` of the TPP's errors on the tune
    patients and, under 'novelty', `metrics.fit_novelty` of the inputs of the train patients.
    """
    import metrics
    from training_header import (
        TPP_PPG_dataset,
        choose_device,
        predict_dataset,
        predict_with_spread,
        watch_features,
    )
    how = {"batch_size": batch_size, "device": choose_device(device), "workers": workers}
    of_train, of_tune = [], []
    with watch_features(model, of_tune.append):
        found, spread = predict_with_spread(model, tune, **how)
    error = found - tune.column(model.keys[-1]).numpy()
    share = min(100, 100 * MOST_WATCHED / len(train.index))
    some = TPP_PPG_dataset(train.index, "segment", model.keys, share)
    with watch_features(model, of_train.append):
        predict_dataset(model, some, **how)
    patients = tune.index.segment_patients()
    calibration = metrics.fit_calibration(-error if model.keys[-1] == "p_crit" else error,
                                          patients, spread)
    return dict(calibration, novelty=metrics.fit_novelty(
        np.concatenate(of_train), np.concatenate(of_tune), patients))


# ---------------------------------------------------------------- scores

def scores_with_intervals(truth, prediction, patients):
    """`metrics.scores` without the count, and their 95 % intervals over patients as `ci95`."""
    import metrics
    found = metrics.scores(truth, prediction)
    found.pop("n")
    return dict(found, ci95=metrics.confidence_intervals(patients, truth, prediction))


def score_predictions(part, tpp, bootstrap):
    """Scores of predicted TPP [N] (mmHg), with 95 % intervals over patients, as in the JSON."""
    import metrics
    fields = part.fields
    truth, p_crit = fields["tpp"], fields["map"] - tpp
    found = {
        "n_patients": bootstrap.n_patients, "n_segments": len(part),
        "tpp": scores_with_intervals(truth, tpp, bootstrap),
        "p_crit": scores_with_intervals(fields["p_crit"], p_crit, bootstrap),
        "per_patient": {
            "tpp": metrics.patient_scores(bootstrap, truth, tpp),
            "p_crit_r2": metrics.patient_scores(bootstrap, fields["p_crit"], p_crit)["r2"]},
        "within_patient": {
            "tpp": metrics.within_patient_correlation(bootstrap, truth, tpp),
            "p_crit": metrics.within_patient_correlation(bootstrap, fields["p_crit"], p_crit)},
        "trend": {
            "tpp": metrics.trend_concordance(part.patients, truth, tpp, part.series),
            "p_crit": metrics.trend_concordance(part.patients, fields["p_crit"], p_crit,
                                                part.series)},
        "detection": metrics.detection(bootstrap, truth, tpp),
        "standards": metrics.standards(bootstrap, truth, tpp),
        "bland_altman": metrics.bland_altman(bootstrap, truth, tpp)}
    if "p_crit_true" in fields:
        true_tpp = fields["map"] - fields["p_crit_true"]
        label = metrics.scores(true_tpp, truth)
        found["true"] = scores_with_intervals(true_tpp, tpp, bootstrap)
        found["true"]["p_crit_r2"] = metrics.scores(fields["p_crit_true"], p_crit)["r2"]
        found["true"]["label"] = {k: label[k] for k in ("rmse", "mae", "mead", "bias", "sd")}
    return found


def score_beside(part, tpp, prediction, bootstrap):
    """Scores of another prediction of the same segments, and the model's skill over it."""
    import metrics
    fields = part.fields
    found = scores_with_intervals(fields["tpp"], prediction, bootstrap)
    p_crit = fields["map"] - prediction
    found["p_crit_r2"] = metrics.scores(fields["p_crit"], p_crit)["r2"]
    found["auc"] = metrics.roc_area(fields["tpp"] < metrics.LOW_TPP, -prediction)
    found["skill"] = metrics.skill(fields["tpp"], tpp, prediction, bootstrap)
    found["skill_per_patient"] = metrics.skill(fields["tpp"], tpp, prediction, bootstrap,
                                               by_patient=True)
    if "p_crit_true" in fields:
        true_tpp = fields["map"] - fields["p_crit_true"]
        found["true_rmse"] = metrics.scores(true_tpp, prediction)["rmse"]
    return found


def fit_baselines(part, train, tune, vitals):
    """Baselines fitted on the train patients: ({name: Baseline}, name of the best on tune)."""
    import metrics
    left_out = metrics.left_out_baselines(vitals, train.fields, tune.fields, part.fields)
    for name, reason in left_out.items():
        print(f"baseline {name} left out: {reason}")
    fitted = metrics.fit_baselines(train.fields, train.patients, vitals, left_out)
    return fitted, metrics.choose_best(fitted, tune.fields)


def intervals_of(tpp, spread, calibration):
    """{level: (low [N], high [N]), or why there is none} of the prediction intervals."""
    import metrics
    found = {}
    for level in calibration["levels"]:
        try:
            found[level] = metrics.interval(tpp, calibration, level, spread)
        except ValueError as reason:
            found[level] = str(reason)
    return found


def coverages(truth, intervals, bootstrap):
    """Coverage and mean half width of `intervals_of`, by level, as in the JSON."""
    import metrics
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
    import metrics
    truth = part.fields["tpp"]
    low = metrics.low_probability(tpp, calibration, spread=spread)
    found = {"n_tune_patients": calibration["n_patients"], "own_spread": spread is not None,
             "levels": coverages(truth, intervals, bootstrap),
             "reliability": metrics.reliability(bootstrap, truth < metrics.LOW_TPP, low)}
    threshold = calibration.get("novelty", {}).get("threshold")
    if distance is not None and threshold is not None:
        new = distance > threshold
        found["novelty"] = {"expected": 1 - calibration["novelty"]["level"], "rate": float(
            new.mean()), "rmse_new": None, "rmse_usual": None}
        for name, mask in (("rmse_new", new), ("rmse_usual", ~new)):
            if mask.any():
                found["novelty"][name] = metrics.rmse(part.patients[mask], (tpp - truth)[mask])
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
    import metrics
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

def second_hashes(dataset):
    """[S, 60] uint64: a hash of each second of PPG, bit for bit, 0 where the second is flat.

    At most MOST_HASHED segments, at random. Windows that overlap by whole seconds share hashes.
    """
    count = len(dataset.index)
    segments = np.arange(count)
    if count > MOST_HASHED:
        segments = np.sort(np.random.default_rng(0).choice(count, MOST_HASHED, replace=False))
    factors = np.random.default_rng(1).integers(1, 2 ** 63, 60).astype(np.uint64) * 2 + 1
    hashes = np.empty((len(segments), 60), np.uint64)
    for a in range(0, len(segments), 512):
        ppg = np.ascontiguousarray(dataset.waveform("ppg", segments[a:a + 512]), np.float32)
        bits = ppg.view(np.uint32).reshape(len(ppg), 60, -1)
        flat = (bits == bits[..., :1]).all(axis=2)
        hashes[a:a + 512] = np.where(flat, 0, (bits * factors).sum(axis=2))
    return hashes


def shared_seconds(part, others):
    """{name: segments of the part that share a second of PPG with another part's segments}."""
    ours = second_hashes(part.dataset)
    return {name: int((np.isin(ours, second_hashes(other.dataset)) & (ours != 0)).any(1).sum())
            for name, other in others.items()}


def check_honesty(part, tpp, checkpoint, baseline, bootstrap):
    """Checks that need no further reading: what they found, and loud lines on what is wrong."""
    import metrics
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
    import metrics
    from training_header import (
        DataError,
        TPP_PPG_dataset,
        choose_device,
        create_dataset_index,
        kept_dataset_index,
        load_checkpoint,
        load_model,
    )
    device = choose_device(device)
    how = {"batch_size": batch_size, "device": device, "workers": workers}
    checkpoint = load_checkpoint(checkpoint_path)
    model = load_model(checkpoint, device)
    run = read_run(checkpoint_path)
    if data is None and "data" not in run:
        raise DataError(f"{checkpoint_path}: no record here of the data it was trained on; "
                        "name them with --data")
    own_data = data is None or list(map(os.path.realpath, find_files(data))) == run.get("data")
    data = find_files(data or run["data"])
    condition = condition or checkpoint["config"]["condition"]
    salt_file = salt_file or run.get("salt_file") or beside(data[0])

    make_index = kept_dataset_index if keep_index else create_dataset_index
    index = make_index(condition=condition, path=data)
    parts = patient_parts(index, checkpoint, salt_file)
    if parts is None:
        if own_data or split not in (None, "all"):
            raise DataError(f"{salt_file}: without the run's salt nobody can tell its "
                            f"{split or 'test'} patients (--salt-file)")
        split, chosen = "all", np.ones(index.n_patients, bool)
        warning = "overlap with the training data NOT CHECKED"
    else:
        split = split or ("test" if own_data else "all")
        chosen, warning = choose_patients(parts, split, own_data)
    if not chosen.any():
        raise DataError(f"no {split} patient of the checkpoint has a segment in these data")
    keys = checkpoint["keys"]
    scored = index.select(chosen[index.encounter_patient])
    TPP_PPG_dataset(scored, "segment", SCORED)              # raises where one of them is absent
    train, tune = read_training_parts(checkpoint, run, own_data, index, parts, keys)
    calibration = checkpoint.get("calibration")
    if not calibration and train is not None:
        calibration = make_calibration(model, train.dataset, tune.dataset, **how)

    part = read_part(scored, keys)
    bootstrap = metrics.PatientBootstrap(part.patients)
    tpp, spread, distance = predict_tpp(model, part, how, (calibration or {}).get("novelty"))
    origins = origin_of(data)
    results = {"checkpoint": os.path.basename(checkpoint_path), "split": split,
               "condition": condition, "origin": origins, "warning": warning, "keys": keys,
               "simulated": "simulated" in origins,
               "note": simulated_note(origins, checkpoint["provenance"]["origin"]),
               **score_predictions(part, tpp, bootstrap), "baselines": {}, "skill": None,
               "uncertainty": None}
    fitted, best, baseline, others, intervals = {}, None, None, {}, {}
    if train is not None:
        fitted, best = fit_baselines(part, train, tune, vitals_of(keys))
        others = {name: one.predict(part.fields) for name, one in fitted.items()}
        beside_it = {name: score_beside(part, tpp, prediction, bootstrap)
                     for name, prediction in others.items()}
        here = min(others, key=lambda name: beside_it[name]["rmse"])
        results["baselines"], baseline = beside_it, others[best]
        results["skill"] = dict(beside_it[best]["skill"], over=best)
        results["skill_per_patient"] = dict(beside_it[best]["skill_per_patient"], over=best)
        results["skill_in_hindsight"] = dict(beside_it[here]["skill"], over=here)
    else:
        print("baselines left out: the train patients' data are not here")
    if calibration:
        intervals = intervals_of(tpp, spread, calibration)
        results["uncertainty"] = how_sure(part, tpp, spread, intervals, calibration, distance,
                                          bootstrap)
    compared = {name: predict_with(path, part, checkpoint, how)
                for name, path in runs_beside(checkpoint_path, checkpoint, compare).items()}
    results["compared"] = {name: score_beside(part, tpp, prediction, bootstrap)
                           for name, prediction in compared.items()}
    results["checks"], problems = check_honesty(part, tpp, checkpoint, baseline, bootstrap)
    results["problems"] = problems
    if train is not None and (split == "test" or not own_data):
        shared = shared_seconds(part, {"train": train, "tune": tune})
        results["checks"]["shared_seconds"] = shared
        problems += [f"{number} of {len(part)} segments share seconds of PPG with {name} "
                     "segments: these scores are leaked"
                     for name, number in shared.items() if number]
    arrays = {"truth": part.fields["tpp"], "prediction": tpp, "part": part, "intervals": intervals,
              "patients": scored.patients[part.patients], "baselines": others, "best": baseline,
              "compared": compared}
    if full:
        swapped = predict_with_swapped_ppg(model, part, how) if model.with_ppg else None
        if swapped is not None:
            results["swapped_ppg"] = score_beside(part, tpp, swapped, bootstrap)
            if np.abs(tpp - swapped).max() < LEAST_CHANGE:
                problems.append("IGNORES THE PPG: with another patient's PPG it says the same")
        results["strata"] = strata(part, tpp, spread, intervals.get(0.9), distance)
        results["patients"] = spread_over_patients(part.patients, tpp - part.fields["tpp"])
        results["good_signal"] = score_good_signal(model, data, scored, how, fitted.get(best))
        arrays["worst"] = worst_segments(part, tpp)
    for line in [warning, *problems]:
        if line:
            print(f"WARNING: {line}", file=sys.stderr)
    return results, arrays


def runs_beside(checkpoint_path, checkpoint, compare):
    """{name in tables: path} of the runs to list beside one: those named, and of --ablate."""
    from training_header import CheckpointError, load_checkpoint
    found = {os.path.basename(path): path for path in compare}
    for ending, name in ABLATIONS.items():
        path = "{}{}.pth".format(os.path.splitext(checkpoint_path)[0], ending)
        try:
            if load_checkpoint(path)["split"] == checkpoint["split"] and path not in compare:
                found[name] = path
        except CheckpointError:
            continue        # none was asked for, or it is not finished
    return found


def predict_with(path, part, checkpoint, how):
    """TPP [N] of a part's segments by another checkpoint of the same split."""
    from training_header import DataError, TPP_PPG_dataset, load_checkpoint, load_model
    other = load_checkpoint(path)
    if other["split"] != checkpoint["split"]:
        raise DataError(f"{path}: trained on other patients; only runs of the same data and "
                        "--split-seed can be compared")
    dataset = TPP_PPG_dataset(part.dataset.index, "segment", other["keys"])
    theirs = Part(dataset, part.fields, part.patients, part.series)
    return predict_tpp(load_model(other, how["device"]), theirs, how)[0]


def read_training_parts(checkpoint, run, own_data, index, parts, keys):
    """The train and tune `Part` of the run, or (None, None) where its data are not here."""
    from training_header import create_dataset_index
    if not own_data and run.get("data") and all(map(os.path.exists, run["data"])):
        index = create_dataset_index(condition=checkpoint["config"]["condition"], path=run["data"])
        parts = patient_parts(index, checkpoint, run["salt_file"])
    if parts is None or not np.isin(["train", "tune"], parts.tolist()).all():
        return None, None
    of_encounters = parts[index.encounter_patient]
    return (read_part(index.select(of_encounters == "train"), keys, MOST_FITTED),
            read_part(index.select(of_encounters == "tune"), keys))


def score_good_signal(model, data, scored, how, baseline):
    """The same patients' segments of good signal, whatever the label's quality (gate 'any').

    The default gate's conditions on r² and Pcrit need the arterial line, and they cut the range of
    what is to be predicted. baseline: the `Baseline` to compare with, or None.
    """
    import metrics
    from training_header import create_dataset_index
    index = create_dataset_index(condition="any", path=data)
    index = index.select(np.isin(index.patients, scored.patients)[index.encounter_patient])
    part = read_part(index, model.keys)
    bootstrap = metrics.PatientBootstrap(part.patients)
    tpp = predict_tpp(model, part, how)[0]
    found = {"n_segments": len(part), "n_patients": bootstrap.n_patients,
             "share_kept_by_gate": len(scored) / len(part),
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


def beside(path):
    """Where the project's salt lies: in the folder of its data."""
    return os.path.join(os.path.dirname(path), "tpp_ppg.salt")


def origin_of(data, name="origin"):
    """The files' origins, joined: 'simulated', 'recordings', … ('unknown' in published files); or
    another of their attributes."""
    from datasets import attribute, open_file
    found = set()
    for path in data:
        with open_file(path) as file:
            found.add(str(attribute(file, name, "unknown")))
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


def print_results(results):
    """The table a person reads first."""
    import metrics
    if results["note"]:
        print(f"*** {results['note']} ***")
    for problem in results["problems"]:
        print(f"!!! {problem}")
    few = results["n_patients"] < metrics.FEW_PATIENTS
    print(f"{results['n_segments']:,} segments of {results['n_patients']:,} {results['split']} "
          f"patients ({results['origin']}); 95 % intervals over patients"
          + (f" (too narrow below {metrics.FEW_PATIENTS} patients, none below "
             f"{metrics.LEAST_PATIENTS})" if few else ""))
    rows = [["model", *model_row(results["tpp"], results["p_crit"]["r2"]), None]]
    for name, scores in rows_beside(results):
        rows.append([name, *model_row(scores, scores["p_crit_r2"]), shown(scores["skill"])])
    print_table(rows, ["TPP, mmHg", "RMSE", "95 %", "MAE", "MeAD", "bias", "SD", "R2",
                       "R2 of Pcrit", "model's skill over it"])
    if results["skill"]:
        skill = results["skill"]
        print(f"skill over {skill['over']} (best on the tune patients): {shown(skill, 3)}"
              + ("" if skill["low"] > 0 else " - NOT above 0")
              + f"; each patient weighing the same {shown(results['skill_per_patient'], 3)}")
        hindsight = results["skill_in_hindsight"]
        if hindsight["over"] != skill["over"]:
            print(f"skill over {hindsight['over']} (best of them here): {shown(hindsight, 3)}"
                  + ("" if hindsight["low"] > 0 else " - NOT above 0"))
    if "true" in results:
        true = results["true"]
        print(f"against the simulator's true TPP: RMSE {shown(of_ci95(true, 'rmse'))}, bias "
              f"{true['bias']:+.2f}; the label itself is off by RMSE {true['label']['rmse']:.2f}, "
              f"bias {true['label']['bias']:+.2f}")
    sure = (results["uncertainty"] or {}).get("levels", {}).get("90 %", {})
    if "segments" in sure:
        print(f"90 % prediction interval: ± {sure['half_width']:.1f} mmHg, holds "
              f"{percent(sure['segments'])} of the segments here")
    if "novelty" in (results["uncertainty"] or {}):
        found = results["uncertainty"]["novelty"]
        print(f"inputs unlike those of training: {percent(found['rate'])} of the segments "
              f"({percent(found['expected'])} by design)")
    detection = results["detection"]
    print(f"TPP < {detection['threshold']:g} mmHg: sensitivity "
          f"{percent(detection['sensitivity'])}, specificity {percent(detection['specificity'])}, "
          f"ROC area {shown(detection['auc'])}")


def model_row(scores, p_crit_r2):
    low, high = scores["ci95"]["rmse"]
    return [scores["rmse"], f"{low:.2f} to {high:.2f}" if np.isfinite(low) else "-", scores["mae"],
            scores["mead"], scores["bias"], scores["sd"], scores["r2"], p_crit_r2]


def rows_beside(results):
    """(name, scores) of all that is listed beside the model: baselines, other runs, swapped PPG."""
    yield from results["baselines"].items()
    yield from results["compared"].items()
    if "swapped_ppg" in results:
        yield "model, PPG of another patient", results["swapped_ppg"]


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


def draw_histogram(results, arrays, path):
    tk_utils.save_figure(histogram_of(results, arrays), path)


def histogram_of(results, arrays):
    box = dict(results["tpp"], n_patients=results["n_patients"], p_crit_r2=results["p_crit"]["r2"])
    return tk_utils.histogram_figure(arrays["truth"], arrays["prediction"], box, results["note"])


# ---------------------------------------------------------------- the report

def headline(results):
    """The sentences that a clinician reads first: how far off, for whom, how sure, against what."""
    import metrics
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
    sure = (results["uncertainty"] or {}).get("levels", {}).get("90 %", {})
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
    import metrics
    truth, tpp, note = arrays["truth"], arrays["prediction"], results["note"]
    part, detection = arrays["part"], results["detection"]
    rows = [("network", *of_ci95(results["tpp"], "rmse").values())]
    rows += [(name, *of_ci95(scores, "rmse").values()) for name, scores in rows_beside(results)]
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
    from training_header import load_checkpoint
    checkpoint = load_checkpoint(checkpoint_path)
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
    for line in [results["warning"], *results["problems"]]:
        if line:
            yield text(line, kind="note")
    for line in headline(results):
        yield text(line, kind="lead")
    yield text("Research only. TPP = MAP - Pcrit, both from the arterial line, is the label and "
               "itself an estimate. Intervals are 95 %, over patients.", kind="small")

    yield text("Against what", "h2")
    yield figure("baselines")
    rows = [["network", *in_table(results["tpp"], results["p_crit"]["r2"],
                                  results["detection"]["auc"]["value"]), None]]
    rows += [[named(name), *in_table(one, one["p_crit_r2"], one["auc"]), shown(one["skill"])]
             for name, one in rows_beside(results)]
    yield table(rows, ["", "RMSE, mmHg", "MAE", "bias", "SD", "R²", "R² of Pcrit", "ROC area, low",
                       "network's skill over it"])
    yield text("Baselines are fitted on the same train patients and need no PPG unless they say "
               "so. MAP is an input and part of TPP: the error of TPP is that of Pcrit, and R² of "
               "TPP flatters. Skill = 1 - MSE / MSE of the other.", kind="small")
    if not results["compared"]:
        yield text("Not shown: the network trained without the PPG and without vitals "
                   "(train_resnet.py --ablate trains them).", kind="small")

    yield text("How far off", "h2")
    yield figure("histogram_plot")
    yield figure("bland_altman")
    yield table(list(error_rows(results)), ["", "value (95 %)"])
    if "true" in results:
        true = results["true"]
        yield text(f"Against the simulator's true TPP the network is off by "
                   f"{shown(of_ci95(true, 'rmse'))} mmHg (RMSE), the label itself by "
                   f"{true['label']['rmse']:.2f} (bias {true['label']['bias']:+.2f}).")
    good = results["good_signal"]
    yield text(f"The gate keeps {percent(good['share_kept_by_gate'])} of these patients' minutes "
               f"of good signal; its conditions on the label need the arterial line. On all "
               f"{good['n_segments']:,} of them: RMSE {shown(of_ci95(good['tpp'], 'rmse'))} mmHg, "
               f"R² of Pcrit {good['p_crit_r2']:.2f}"
               + (f", skill over {named(good['baseline']['name'])} "
                  f"{shown(good['baseline']['skill'])}" if "baseline" in good else "") + ".")
    yield text("Borrowed standards", "h3")
    yield table(list(standard_rows(results["standards"])), ["", "found", "asked", ""])
    yield text("Made for blood pressure monitors; no standard exists for TPP.", kind="small")

    yield text("Does it follow changes?", "h2")
    yield figure("trend")
    yield table(list(trend_rows(results)), ["", "value (95 %)"])

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
                  shown(one["rmse"]), one["bias"], one["coverage_90"] and
                  percent(one["coverage_90"])] for one in results["strata"]],
                ["", "range", "minutes", "patients", "RMSE, mmHg (95 %)", "bias",
                 "in the 90 % interval"])
    spread = results["patients"]
    yield text("Each patient's own RMSE: " + ", ".join(
        f"{share} of patients below {value:.1f}" for share, value in
        spread["rmse_quantiles"].items()) + " mmHg.")
    yield text("The ten worst", "h3")
    yield figure("worst")

    yield text("Checks", "h2")
    yield table(list(check_rows(results)), ["", "found"])
    yield text("Made with", "h2")
    yield table(list(provenance_rows(results, checkpoint)), ["", ""])


def in_table(scores, p_crit_r2, auc):
    return [shown(of_ci95(scores, "rmse")), scores["mae"], scores["bias"], scores["sd"],
            scores["r2"], p_crit_r2, auc]


def error_rows(results):
    found, agreement = results["tpp"], results["bland_altman"]
    for key, name in (("rmse", "RMSE, mmHg"), ("mae", "mean absolute error, mmHg"),
                      ("mead", "median absolute error, mmHg"), ("bias", "bias, mmHg"),
                      ("sd", "SD of the errors, mmHg"), ("r2", "R² of TPP")):
        yield name, shown(of_ci95(found, key))
    yield "R² of Pcrit", shown(of_ci95(results["p_crit"], "r2"))
    for key, name in (("rmse", "RMSE"), ("mae", "mean absolute error"), ("r2", "R² of TPP")):
        yield f"{name}, each patient weighing the same", shown(results["per_patient"]["tpp"][key])
    yield "R² of Pcrit, each patient weighing the same", shown(results["per_patient"]["p_crit_r2"])
    yield "lower limit of agreement, mmHg", shown(agreement["lower"])
    yield "upper limit of agreement, mmHg", shown(agreement["upper"])
    yield "SD between patients, within, mmHg", (f"{agreement['sd_between']:.2f}, "
                                                f"{agreement['sd_within']:.2f}")


def standard_rows(found):
    def passed(one):
        return "met" if one["passed"] else "not met"

    one = found["aami_1"]
    yield ("AAMI/ISO 81060-2-style, criterion 1", f"{one['mean']:+.1f} ± {one['sd']:.1f} mmHg",
           "mean within 5, SD up to 8", passed(one))
    one = found["aami_2"]
    yield ("criterion 2, SD of patients' means", f"{one['sd']:.1f} mmHg",
           f"up to {one['limit']:.2f}", passed(one))
    one = found["aami_esh_iso"]
    yield "errors within 10 mmHg", f"{percent(one['within_10'])}", "85 % or more", passed(one)
    one = found["bhs"]
    yield ("BHS-style grade, within 5, 10, 15 mmHg",
           ", ".join(percent(one[f"within_{bound}"]) for bound in (5, 10, 15)),
           "A: 60, 85, 95 %", one["grade"])
    one = found["ieee_1708"]
    yield ("IEEE 1708-style grade, mean absolute difference", f"{one['mad']:.1f} mmHg",
           "A: up to 5", one["grade"])


def trend_rows(results):
    for key, name in (("tpp", "TPP"), ("p_crit", "Pcrit")):
        trend = results["trend"][key]
        yield (f"changes of {name} the right way round ({trend['n']:,} of {trend['n_changes']:,} "
               f"outside ± {trend['zone']:g} mmHg)", percent(trend) if trend["n"] else "none")
    for key, name in (("tpp", "TPP"), ("p_crit", "Pcrit")):
        yield f"correlation within patients, {name}", shown(results["within_patient"][key])


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
        one = found["novelty"]
        yield tk_utils.html_text(
            f"Inputs unlike those of training: {percent(one['rate'])} of the minutes here "
            f"({percent(one['expected'])} by design). RMSE {shown(one['rmse_new'])} mmHg on these, "
            f"{shown(one['rmse_usual'])} on the others.")


def check_rows(results):
    found = results["checks"]
    yield "patients in two parts of the split", found["patients_in_two_parts"]
    for name, number in found.get("shared_seconds", {}).items():
        yield f"minutes that share a second of PPG with {name} minutes", number
    if "overlapping_windows" in found:
        yield "minutes that overlap the one before", found["overlapping_windows"]
    yield "the output is constant", "YES" if found["constant_output"] else "no"
    ignored = any(line.startswith("IGNORES") for line in results["problems"])
    yield ("the output is the same with another patient's PPG",
           "YES" if ignored else "no" if "swapped_ppg" in results else "not known")
    if "skill_with_shuffled_labels" in found:
        yield ("skill with shuffled labels (must not be above 0)",
               shown(found["skill_with_shuffled_labels"]))


def provenance_rows(results, checkpoint):
    provenance, config = checkpoint["provenance"], checkpoint["config"]
    yield "checkpoint", results["checkpoint"]
    yield "inputs and label", ", ".join(results["keys"])
    yield "trained on", (f"{provenance['origin']}, {provenance['n_segments']:,} segments of "
                         f"{provenance['n_patients']:,} patients (train, tune and test)")
    yield "scored on", f"{results['origin']}, {results['split']} patients"
    yield "quality gate", results["condition"]
    yield "settings", ", ".join(f"{k} {v}" for k, v in config.items() if k not in ("keys",))
    yield "versions", ", ".join(f"{k} {v}" for k, v in provenance["versions"].items())
    yield "code", str(provenance["git_revision"])


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
        ("12c model", f"MyFirstResNet, {count_weights(checkpoint):,} weights; "
         + ", ".join(f"{k} {config[k]}" for k in ("epochs", "batch_size", "lr", "weight_decay",
                                                  "l1", "spread", "seed") if k in config)
         + "; the epoch with the least loss on the tune patients is kept"),
        ("12d clusters", "patients: intervals, weights and calibration take them as the units; "
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
        ("23b heterogeneity", "each patient's own RMSE: " + ", ".join(
            f"{share} of patients below {value:.1f}"
            for share, value in results["patients"]["rmse_quantiles"].items()) + " mmHg"),
        ("26 limitations", limitations(results)),
        ("27a poor input", "predict.py refuses minutes of poor signal and marks inputs unlike "
         "those of training")]
    lines = [f"# Model card: {os.path.splitext(results['checkpoint'])[0]}", ""]
    if results["note"]:
        lines += [f"**{results['note']}**", ""]
    lines += [f"**{line}**\n" for line in [results["warning"], *results["problems"]] if line]
    lines += ["Research only: no clinical claim, no medical device.", "",
              "| TRIPOD+AI item | |", "|---|---|"]
    lines += ["| {} | {} |".format(name, text.replace("|", "\\|")) for name, text in items]
    lines += ["", "## For a person to write", ""] + [f"- {item}" for item in FOR_A_PERSON]
    return "\n".join(lines) + "\n"


def count_weights(checkpoint):
    return sum(weights.numel() for weights in checkpoint["model"].values())


def limitations(results):
    import metrics
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
    import metrics
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
    import metrics

    def joined(name):
        """{key: [all segments]} of what every run has."""
        keys = [key for key in arrays[0][name] if all(key in one[name] for one in arrays)]
        return {key: np.concatenate([one[name][key] for one in arrays]) for key in keys}

    patients = np.unique(np.concatenate([one["patients"] for one in arrays]),
                         return_inverse=True)[1]
    bootstrap = metrics.PatientBootstrap(patients)
    fields = [one["part"].fields for one in arrays]
    fields = {key: np.concatenate([one[key] for one in fields])
              for key in (*SCORED, "p_crit_true") if all(key in one for one in fields)}
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
                         for key, prediction in joined(name).items()}
    if all(one["best"] is not None for one in arrays):
        best = np.concatenate([one["best"] for one in arrays])
        over = score_beside(part, tpp, best, bootstrap)
        results["baselines"]["each run's best"] = over
        here = min(results["baselines"], key=lambda name: results["baselines"][name]["rmse"])
        for name in ("skill", "skill_per_patient"):
            results[name] = dict(over[name], over="each run's best")
        results["skill_in_hindsight"] = dict(results["baselines"][here]["skill"], over=here)
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
