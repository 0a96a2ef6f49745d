"""A checkpoint and data -> scores with intervals, baselines, the histogram, one JSON file.

    python evaluate.py runs/M1.5.pth                        # the run's own data, its test patients
    python evaluate.py runs/M1.5.pth --data FILE…           # other data: all its unseen patients
    python evaluate.py runs/M1.5.pth --split tune --json scores.json

TPP = MAP - Pcrit and MAP is an input, so the error of TPP is the error of Pcrit, while R² of TPP is
lifted by the spread of MAP: read R² of Pcrit, and the skill over the baselines.
"""
import argparse
import glob
import json
import os
import sys

import numpy as np

from tk_utils import histogram_plot, print_table, run_script, write_json

SPLITS = ("test", "tune", "train", "all")
SCORED = ["map", "p_crit", "tpp"]           # fields without which there are no scores
FIELDS_OF_BASELINES = ("map", "sbp", "dbp", "pp", "hr", "tpp", "p_crit")


def parse_args(arguments=None):
    parser = argparse.ArgumentParser(allow_abbrev=False, description=__doc__.split("\n\n")[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("checkpoint", help="runs/<name>.pth, as train_resnet.py writes it")
    parser.add_argument("--data", nargs="+", metavar="FILE",
                        help="HDF5 files; default: those of the run, from runs/<name>_run.json")
    parser.add_argument("--split", choices=SPLITS,
                        help="patients to score; default: test on the run's data, else all")
    parser.add_argument("--condition", help="quality gate; default: the one of the run")
    parser.add_argument("--json", metavar="FILE", help="also write the scores here")
    parser.add_argument("--figure", metavar="FILE", help="also draw the 2-D histogram here")
    parser.add_argument("--salt-file", metavar="FILE",
                        help="the project's salt; default: the run's, else beside the data")
    parser.add_argument("--batch-size", type=int, default=256, help="segments at a time")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, …; default: CUDA where present")
    parser.add_argument("--workers", type=int, default=0, help="loader processes")
    return parser.parse_args(arguments)


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
        raise DataError(f"{missing[0]}: no such file")
    return found


def patient_parts(index, checkpoint, salt_file):
    """The part of the run in which each patient of an index was: [P] of 'train', …, or None.

    By the checkpoint's salted hashes, so that it holds for any file. None and a loud line where
    there is no salt to compare by, or not the run's.
    """
    from training_header import hash_patients, read_salt, salt_mark
    there = os.path.exists(salt_file)
    if not there or salt_mark(read_salt(salt_file)) != checkpoint["provenance"].get("salt"):
        print(f"WARNING: {salt_file}: {'not the salt of this run' if there else 'no such file'} "
              "(--salt-file), so whether these patients were trained on COULD NOT BE CHECKED",
              file=sys.stderr)
        return None
    known = {h: part for part, hashes in checkpoint["split"].items() for h in hashes}
    return np.array([known.get(h) for h in hash_patients(index.patients.tolist(),
                                                         read_salt(salt_file))], dtype=object)


def choose_patients(parts, split, own_data):
    """Mask [P] of the patients to score, and a warning or None. parts: as `patient_parts` gives."""
    from training_header import DataError
    seen = np.isin(parts, ["train", "tune"])
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
    there = [k for k in keys if k in stored
             or k not in fields and set(DIFFERENCES.get(k, "?")) <= stored]
    return {k: dataset.column(k).numpy().astype(np.float64) for k in there}


def rounded(interval):
    return f"{interval[0]:.2f} to {interval[1]:.2f}"


def scores_with_intervals(truth, prediction, patients):
    """`metrics.scores` without the count, and their 95 % intervals over patients as `ci95`."""
    import metrics
    found = metrics.scores(truth, prediction)
    found.pop("n")
    return dict(found, ci95=metrics.confidence_intervals(patients, truth, prediction))


def score_predictions(fields, patients, tpp):
    """Scores of predicted TPP [N] (mmHg), with 95 % intervals over patients, as in the JSON."""
    import metrics
    found = {"n_patients": len(np.unique(patients)), "n_segments": len(tpp)}
    for name, truth, prediction in (("tpp", fields["tpp"], tpp),
                                    ("p_crit", fields["p_crit"], fields["map"] - tpp)):
        found[name] = scores_with_intervals(truth, prediction, patients)
    if "p_crit_true" in fields:
        true_tpp = fields["map"] - fields["p_crit_true"]
        label = metrics.scores(true_tpp, fields["tpp"])
        found["true"] = scores_with_intervals(true_tpp, tpp, patients)
        p_crit = metrics.scores(fields["p_crit_true"], fields["map"] - tpp)
        found["true"]["p_crit_r2"] = p_crit["r2"]
        found["true"]["label"] = {k: label[k] for k in ("rmse", "mae", "mead", "bias", "sd")}
    return found


def compare_baselines(fields, patients, tpp, train, train_patients, tune, vitals):
    """Baselines fitted on the train patients, scored beside the model: (baselines, skill)."""
    import metrics
    left_out = metrics.left_out_baselines(vitals, train, tune, fields)
    for name, reason in left_out.items():
        print(f"baseline {name} left out: {reason}")
    fitted = metrics.fit_baselines(train, train_patients, vitals, left_out)
    best = metrics.choose_best(fitted, tune)
    predictions = {name: baseline.predict(fields) for name, baseline in fitted.items()}
    found = {}
    for name, prediction in predictions.items():
        found[name] = scores_with_intervals(fields["tpp"], prediction, patients)
        p_crit = metrics.scores(fields["p_crit"], fields["map"] - prediction)
        found[name]["p_crit_r2"] = p_crit["r2"]
        found[name]["skill"] = metrics.skill(fields["tpp"], tpp, prediction, patients)
        if "p_crit_true" in fields:
            true_tpp = fields["map"] - fields["p_crit_true"]
            found[name]["true_rmse"] = metrics.scores(true_tpp, prediction)["rmse"]
    return found, dict(found[best]["skill"], over=best)


def evaluate(checkpoint_path, data=None, split=None, condition=None, salt_file=None, batch_size=256,
             device=None, workers=0):
    """Scores a checkpoint: (results for the JSON, {'truth', 'prediction', 'patients'} for figures).

    data: files, or None for those of the run. Raises DataError and CheckpointError as one line.
    """
    from training_header import (
        DataError,
        TPP_PPG_dataset,
        choose_device,
        create_dataset_index,
        load_checkpoint,
        load_model,
        predict_dataset,
    )
    device = choose_device(device)
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

    index = create_dataset_index(condition=condition, path=data)
    parts = patient_parts(index, checkpoint, salt_file)
    if parts is None:
        if own_data or split not in (None, "all"):
            raise DataError(f"{salt_file}: without the run's salt nobody can tell its "
                            f"{split or 'test'} patients (--salt-file)")
        chosen = np.ones(index.n_patients, bool)
        warning = "overlap with the training data NOT CHECKED"
        split = "all"
    else:
        split = split or ("test" if own_data else "all")
        chosen, warning = choose_patients(parts, split, own_data)
    if warning:
        print(f"WARNING: {warning}", file=sys.stderr)
    if not chosen.any():
        raise DataError(f"no {split} patient of the checkpoint has a segment in these data")
    keys = checkpoint["keys"]
    scored = TPP_PPG_dataset(index.select(chosen[index.encounter_patient]), "segment", keys)
    TPP_PPG_dataset(scored.index, "segment", SCORED)        # raises where one of them is absent
    fields_needed = tuple(dict.fromkeys(FIELDS_OF_BASELINES + tuple(keys[1:-1])))
    fields = fields_of(scored, fields_needed + ("p_crit_true",))
    patients = scored.index.segment_patients()
    prediction = predict_dataset(model, scored, batch_size, device, workers).astype(np.float64)
    tpp = fields["map"] - prediction if keys[-1] == "p_crit" else prediction

    origins = origin_of(data)
    results = {"checkpoint": os.path.basename(checkpoint_path), "split": split,
               "condition": condition, "origin": origins, "warning": warning, "keys": keys,
               **score_predictions(fields, patients, tpp)}
    simulated = "simulated" in origins
    results["simulated"] = simulated
    results["note"] = simulated_note(origins, checkpoint["provenance"]["origin"])
    train_index, train_parts = index, parts
    if not own_data and run.get("data") and all(map(os.path.exists, run["data"])):
        train_index = create_dataset_index(condition=checkpoint["config"]["condition"],
                                           path=run["data"])
        train_parts = patient_parts(train_index, checkpoint, run["salt_file"])
    if train_parts is not None and np.isin(["train", "tune"], train_parts.tolist()).all():
        of_encounters = train_parts[train_index.encounter_patient]
        train, tune = (TPP_PPG_dataset(train_index.select(of_encounters == part), "segment", keys)
                       for part in ("train", "tune"))
        results["baselines"], results["skill"] = compare_baselines(
            fields, patients, tpp, fields_of(train, fields_needed),
            train.index.segment_patients(), fields_of(tune, fields_needed), keys[1:-1])
    else:
        print("baselines left out: the train patients' data are not here")
        results["baselines"], results["skill"] = {}, None
    return results, {"truth": fields["tpp"], "prediction": tpp, "patients": patients}


def beside(path):
    """Where the project's salt lies: in the folder of its data."""
    return os.path.join(os.path.dirname(os.path.realpath(path)), "tpp_ppg.salt")


def origin_of(data):
    """The files' origins, joined: 'simulated', 'recordings', … ('unknown' in published files)."""
    from datasets import open_file
    found = []
    for path in data:
        with open_file(path) as file:
            found.append(str(file.attrs.get("origin", "unknown")))
    return ", ".join(sorted(set(found)))


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
    few = results["n_patients"] < metrics.FEW_PATIENTS
    print(f"{results['n_segments']:,} segments of {results['n_patients']:,} {results['split']} "
          f"patients ({results['origin']}); 95 % intervals over patients"
          + (f" (too narrow below {metrics.FEW_PATIENTS} patients)" if few else ""))
    rows = [["model", *model_row(results["tpp"], results["p_crit"]["r2"]), None]]
    for name, scores in results["baselines"].items():
        skill = scores["skill"]
        rows.append([name, *model_row(scores, scores["p_crit_r2"]),
                     f"{skill['value']:.2f} ({rounded((skill['low'], skill['high']))})"])
    print_table(rows, ["TPP, mmHg", "RMSE", "95 %", "MAE", "MeAD", "bias", "SD", "R2",
                       "R2 of Pcrit", "model's skill over it"])
    if results["skill"]:
        skill = results["skill"]
        print(f"skill over {skill['over']} (best on the tune patients): {skill['value']:.3f}, "
              f"95 % {skill['low']:.3f} to {skill['high']:.3f}"
              + ("" if skill["low"] > 0 else " - NOT above 0"))
    if "true" in results:
        true = results["true"]
        print(f"against the simulator's true TPP: RMSE {true['rmse']:.2f} "
              f"({rounded(true['ci95']['rmse'])}), bias {true['bias']:+.2f}; the label itself is "
              f"off by RMSE {true['label']['rmse']:.2f}, bias {true['label']['bias']:+.2f}")


def model_row(scores, p_crit_r2):
    return [scores["rmse"], rounded(scores["ci95"]["rmse"]), scores["mae"], scores["mead"],
            scores["bias"], scores["sd"], scores["r2"], p_crit_r2]


def draw_histogram(results, arrays, path):
    box = dict(results["tpp"], n_patients=results["n_patients"], p_crit_r2=results["p_crit"]["r2"])
    histogram_plot(arrays["truth"], arrays["prediction"], path, box, results["note"])


def main():
    options = parse_args()
    results, arrays = evaluate(options.checkpoint, options.data, options.split,
                               options.condition, options.salt_file, options.batch_size,
                               options.device, options.workers)
    print_results(results)
    if options.json:
        write_json(options.json, results)
    if options.figure:
        draw_histogram(results, arrays, options.figure)


if __name__ == "__main__":
    from training_header import CheckpointError, DataError, TrainingError
    sys.exit(run_script(main, CheckpointError, DataError, TrainingError))
