"""The reference on real patients: docs/real-recordings.md's protocol in one command.

    python benchmarks/real.py --records ../shared/data/wfdb ../shared/data/patients/wfdb \\
        --groups groups.csv --seeds 5           # 15 minutes a seed and label on one quiet core
    python benchmarks/real.py --data data/real.h5 --seeds 1 --folds 5           # prepared before
    python benchmarks/real.py --data data/p?.h5 --each-file --seeds 1       # tests whole files

For each label method it prepares the recordings (once) and trains train_resnet.py's recipe with
every fold and seed; after a kill, run the same command again. It prints two tables and writes them
to --out as JSON: unseen patients, against every baseline, by minute and with patients weighted
equally; and CALIBRATED patients, whose first KNOWN labelled minutes are known and whose later
minutes are predicted. --each-file instead tests each file with a network trained on the others:
hospitals, or parts of a data set whose patients are an estimate (ignore the warning that these runs
differ in their data).
"""
import argparse
import os
import subprocess
import sys

import common
import numpy as np
from sklearn.linear_model import RidgeCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

import datasets
import evaluate
import labels
import metrics
import report
import tk_utils

# The gate of each label method: docs/labels.md says why.
GATES = {"published": ["default"], "waveform_balance": ["default", "p_crit_se < 5.5"]}
KNOWN = 5           # labelled minutes of each patient in the calibrated setting
VITALS = ("map", "dbp", "hr")


def script(name, *arguments, check=True):
    """Runs a script of the repository."""
    subprocess.run([sys.executable, os.path.join(common.ROOT, name), *map(str, arguments)],
                   check=check)


def train(options, name, gate, *arguments):
    """Runs train_resnet.py with every seed; returns the names of the runs (without the fold)."""
    repeats = ["--seeds", options.seeds] if options.seeds > 1 else []
    script("train_resnet.py", *arguments, "--condition", *gate, "--name", name, *repeats,
           *options.settings)
    return [f"{name}_seed{seed}" for seed in range(options.seeds)] if repeats else [name]


def prepare(options):
    """{label method: prepared file}, from --data or made from --records."""
    if options.data:
        return {datasets.origin_of([path], "label_method"): path for path in options.data}
    files = {method: f"data/real_{method}.h5" for method in options.methods}
    for method, path in files.items():
        if not os.path.exists(path):
            groups = ["--groups", options.groups] if options.groups else []
            # some recordings of an archive are unusable; prepare.py lists them and exits with 1
            script("prepare.py", *options.records, "--out", path, "--label-method", method,
                   "--workers", os.cpu_count() or 1, *groups, check=False)
    return files


def estimates(truth, prediction, other, patients):
    """[RMSE by minute, by patient, skill of `prediction` over `other` by minute, by patient]."""
    found = [metrics.confidence_intervals(patients, truth, other, by_patient=by)["rmse"]
             for by in (False, True)]
    return found + [metrics.skill(truth, prediction, other, patients, by_patient=by)
                    for by in (False, True)]


def unseen_rows(segments):
    """Rows of the table of unseen patients: the model, then each baseline."""
    patients, truth, tpp = segments.patients, segments.truth, segments.tpp
    rows = [["model", *estimates(truth, tpp, tpp, patients)[:2], None, None]]
    return rows + [[report.named(name), *estimates(truth, tpp, one, patients)]
                   for name, one in segments.baselines.items()]


def changes(segments):
    """For the minutes after each patient's first KNOWN ones: (their numbers, the change of each
    vital from its mean over the known minutes [later, vitals], the number of the last known one
    [later], the means of the known [later] for any column)."""
    order = np.argsort(segments.patients, kind="stable")    # encounters and rows are in time order
    owner = segments.patients[order]
    place = np.arange(len(order)) - np.searchsorted(owner, owner)
    later, known = order[place >= KNOWN], order[place < KNOWN]
    last = order[np.searchsorted(owner, segments.patients[later]) + KNOWN - 1]

    def mean(column):
        sums = np.bincount(segments.patients[known], column[known])
        return (sums / KNOWN)[segments.patients[later]]

    vitals = [segments.fields[key] for key in VITALS]
    return later, np.stack([one[later] - mean(one) for one in vitals], 1), last, mean


def follow(segments, train):
    """(truth, {predictor: TPP}, patients) of the later minutes of calibrated patients."""
    later, moved, last, mean = changes(segments)
    of_train, moved_train, _, mean_train = changes(train)
    ridge = make_pipeline(StandardScaler(), RidgeCV(10.0 ** np.arange(-2, 7))).fit(
        moved_train, train.truth[of_train] - mean_train(train.truth))
    base = mean(segments.truth)
    found = {"last known minute": segments.truth[last],
             "mean of the known minutes": base,
             "mean + change of MAP": base + moved[:, 0],
             "ridge on changes of vitals": base + ridge.predict(moved),
             "model, shifted": base + segments.tpp[later] - mean(segments.tpp)}
    return segments.truth[later], found, segments.names[later]


def calibrated_rows(runs, index, folds):
    """Rows of the calibrated table. runs: [(fold, scored segments)]."""
    train_of, parts = {}, []
    for fold, segments in runs:
        if fold not in train_of:
            test = datasets.split_index(index, 0, fold, folds)["test"].patients
            known = index.select(~np.isin(index.patients, test)[index.encounter_patient])
            train_of[fold] = evaluate.read_segments(known, ["map", "dbp", "hr", "tpp"])
        if all(np.bincount(one.patients).max() > KNOWN for one in (segments, train_of[fold])):
            parts.append(follow(segments, train_of[fold]))
    if not parts:
        return 0, []
    truth, patients = (np.concatenate([part[i] for part in parts]) for i in (0, 2))
    found = {name: np.concatenate([part[1][name] for part in parts]) for name in parts[0][1]}
    network = found["model, shifted"]
    return len(np.unique(patients)), [
        [name, *estimates(truth, network, one, patients)[:2 if one is network else 4]]
        for name, one in found.items()]


def each_file(options):
    """The table of patients of files, by networks trained and tuned on 9 of 10 patients of the
    other files."""
    gate = GATES.get(datasets.origin_of(options.data, "label_method"), ["default"])
    paths, fitted = [], {}
    for number, path in enumerate(options.data):
        name, others = f"without_file{number}", [one for one in options.data if one != path]
        for run in train(options, name, gate, "--data", *others):
            paths.append(f"runs/{run}.pth")
            evaluate.evaluate_with_arrays(paths[-1], data=[path], fitted=fitted)
    scored, segments = evaluate.compare_runs(paths, fitted=fitted)
    rows = unseen_rows(segments)
    print_estimates(rows)
    tk_utils.write_json(options.out, {"each_file": rows, "together": scored["together"]})


def print_estimates(rows):
    tk_utils.print_table(
        [[row[0], *(report.shown(one) for one in [*row[1:], None, None][:4])] for row in rows],
        ["TPP, mmHg", "RMSE by minute", "by patient", "model's skill by minute", "by patient"])


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--records", nargs="+", help="folders of recordings")
    parser.add_argument("--groups", help="CSV: record, split_group (prepare.py --groups)")
    parser.add_argument("--data", nargs="+", metavar="FILE", help="prepared files, one a label")
    parser.add_argument("--each-file", action="store_true", help="test each file, train on others")
    parser.add_argument("--methods", nargs="+", choices=tuple(labels.METHODS),
                        default=tuple(labels.METHODS))
    parser.add_argument("--folds", type=int, default=5)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--out", help="default: real.json or each_file.json")
    parser.add_argument("settings", nargs="*", help="after --, options of train_resnet.py")
    options = parser.parse_args()
    if not (options.data or options.records and not options.each_file):
        parser.error("--records or --data is required; with --each-file, --data")
    options.out = options.out or ("each_file.json" if options.each_file else "real.json")
    if options.each_file:
        return each_file(options)
    results = {}
    for method, path in prepare(options).items():
        gate = GATES.get(method, ["default"])
        names = train(options, f"real_{method}", gate, "--data", path, "--folds", options.folds)
        runs = [(fold, f"runs/{name}_fold{fold}.pth")
                for name in names for fold in range(options.folds)]
        fitted = {}
        scored, segments = evaluate.compare_runs([path for _, path in runs], fitted=fitted)
        index = datasets.create_dataset_index(condition=gate, path=path)
        unseen = unseen_rows(segments)
        n_followed, followed = calibrated_rows(
            [(fold, fitted[path, False][1]) for fold, path in runs], index, options.folds)
        print(f"\nLabel {method}, gate {index.condition}: {len(index):,} minutes of "
              f"{index.n_patients:,} unseen patients; {options.folds} folds, "
              f"{tk_utils.counted(options.seeds, 'seed')}")
        print_estimates(unseen)
        print(f"\nCALIBRATED: the first {KNOWN} labelled minutes of each of {n_followed} patients "
              "are known, the later minutes predicted")
        if followed:
            print_estimates(followed)
        results[method] = {"unseen": unseen, "calibrated": followed, "n_segments": len(index),
                           "n_patients": index.n_patients, "together": scored["together"]}
        tk_utils.write_json(options.out, results)
    return None


if __name__ == "__main__":
    main()
