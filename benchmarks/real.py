"""Does what the PPG shows improve on the vitals, on real recordings? Cross-validated by patient.

    python prepare.py ../shared/data/wfdb --groups ../shared/data/recordings.csv --out data/real.h5
    python train_resnet.py --seeds 5
    python benchmarks/real.py data/real.h5 runs/M1.5_seed?.pth
    python benchmarks/real.py data/real.h5 runs/M1.5_seed?.pth --shuffle 3    # labels of others

The networks were trained on virtual patients and stay as they are; what is fitted here are small
regressions of Pcrit. Each patient in turn is left out (outer fold). Among the others, all but one
in turn (inner folds), each candidate's setting is chosen, then the best of VITALS and the best of
WITH_PPG. The outer folds are scored once, for that pair. Skill = 1 - MSE / MSE(best of VITALS).

Each patient weighs the same, in the fits, the choices and the primary score: one of them has four
fifths of the segments. The same predictions scored by segment are secondary. What each candidate
alone would have reached is shown, too: knowing it is hindsight, nothing was chosen by it.

Attempts, declared before the first outer score: (1) as above, published label and default gate:
skill -0.06 (-0.22 to 0.07); (2) --label-method waveform_balance --condition
"default, p_crit_se < 5.5": -0.06 (-0.43 to 0.21); (3) as 1, --step-s 15: 0.04
(-0.13 to 0.19); (4) as 1 with networks trained on virtual PPGs made as rough as real ones: not
carried out. docs/real-recordings.md tells all attempts.
"""
import argparse
import os
import sys
from collections import Counter, defaultdict

import h5py
import numpy as np

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import datasets
import labels
import metrics
import signals
import tk_utils

V, SHAPE = ("map", "dbp", "hr"), ("ppg_flow", "pulse_irregularity")
VITALS = {                                  # candidate: regression, columns, columns of the PPG
    "MAP - mean TPP": ("mean", (), ()),
    "mean Pcrit": ("ridge", (), ()),
    "ridge": ("ridge", V, ()),
    "ridge and flow": ("ridge", (*V, "flow"), ()),
    "boosting": ("boosting", V, ())}
WITH_PPG = {
    "ridge, network": ("ridge", V, ("network",)),
    "ridge, mean of the networks": ("ridge", V, ("networks",)),
    "ridge, network's features": ("ridge", V, ("features",)),
    "ridge, flow by the PPG's shape": ("ridge", V, SHAPE),
    "ridge, PPG as a pressure": ("ridge", V, ("ppg_p_crit",)),
    "ridge, classical features": ("ridge", V, signals.PPG_FEATURES),
    "kernel ridge, network and shape": ("kernel", V, ("network", *SHAPE)),
    "boosting, classical features": ("boosting", V, signals.PPG_FEATURES)}
AVERAGES = {"average of these": VITALS, "average of these, with PPG": WITH_PPG}
ARTERIAL_LINE = {"ridge on all of the line": ("ridge", (*V, "sbp", "pp", "pp*hr"), ())}    # to see
PENALTIES = (0.3, 1.0, 3.0, 10.0, 30.0, 100.0)  # beside a weight of 1 for each patient
PPG_SCALES = (0.1, 0.3, 1.0)                # of the PPG's columns: the smaller, the more shrunk
ROUNDS = (10, 25, 50)
GAMMA = 0.1                                 # of the Gaussian kernel, columns of SD 1
COMPONENTS = 8                              # of the pooled features
MOST_FITTED = 40                            # segments of a patient, evenly spaced; all are scored


def read_windows(path, condition, method, step_s):
    """({field: [N]}, PPG [N, 3600], patients [N]): windows every `step_s`, labelled, that pass the
    gate. Between minutes that follow on one another a window takes from both."""
    found, gate = [], datasets.get_gate(condition)
    with h5py.File(path, "r") as file:
        for patient, encounter in ((p, e) for p, group in file.items() for e in group.values()):
            if "abp" not in encounter:
                raise datasets.DataError(f"{path}: no field abp, which prepare.py writes")
            waves = np.stack([encounter[key][:].reshape(len(encounter["ppg"]), -1)
                              for key in ("ppg", "abp")])
            breaks = np.flatnonzero(np.abs(np.diff(encounter["start_s"][:]) - 60) > 0.01) + 1
            for part in np.split(waves, breaks, axis=1):
                ppg, abp = np.lib.stride_tricks.sliding_window_view(
                    part.reshape(2, -1), datasets.SEGMENT_SAMPLES,
                    axis=1)[:, ::round(step_s * datasets.FS)]
                fields = labels.label_segments(abp, datasets.FS, method=method)
                fields["reason"] |= signals.signal_quality(abp, ppg, datasets.FS)["reason"]
                kept = datasets.passes_gate(gate, fields.get, np.isfinite(ppg).all(1))
                fields = {key: values[kept].astype(np.float64) for key, values in fields.items()}
                found.append((fields, ppg[kept], [patient] * kept.sum()))
    all_fields, ppg, patients = zip(*found)
    return ({key: np.concatenate([one[key] for one in all_fields]) for key in all_fields[0]},
            np.concatenate(ppg), np.concatenate(patients).astype(str))


def add_columns(fields, ppg):
    """Adds to the fields what candidates see of vitals and PPG without a network."""
    fields["flow"] = (fields["map"] - fields["dbp"]) * fields["hr"]
    fields["pp*hr"] = fields["pp"] * fields["hr"]
    fields.update(signals.ppg_features(ppg))
    # The mean height of the beat's shape is (MAP - DBP) / PP.
    fields["ppg_flow"] = fields["flow"] / fields["pulse_area"]
    # The label's own regression, on the PPG: as a share of MAP - DBP its result does not depend on
    # the PPG's gain and offset. (+ 40: within the range of a pressure.)
    seen = labels.label_segments(signals.ppg_as_pressure(ppg) + 40, datasets.FS)
    share = (seen["map"] - seen["p_crit"]) / (seen["map"] - seen["dbp"])
    fields["ppg_p_crit"] = np.clip(fields["map"] - share * (fields["map"] - fields["dbp"]),
                                   0, fields["map"])


def look(path, fields, ppg):
    """(Pcrit [N] in mmHg, pooled features [N, F]) of a checkpoint's network."""
    import torch

    from normalised_model import load_model
    model, tpp, pooled = load_model(path), [], []
    with torch.no_grad():
        for rows in np.array_split(np.arange(len(ppg)), -(-len(ppg) // 64)):
            vitals = [torch.tensor(fields[key][rows], dtype=torch.float32)
                      for key in model.keys[1:-1]]
            answer, features = model.with_features(torch.tensor(ppg[rows][:, None]), *vitals)
            tpp.append(answer[:, 0].numpy())
            pooled.append(features.numpy()[:, :-len(vitals)])
    return fields["map"] - np.concatenate(tpp), np.concatenate(pooled)


def every_setting(candidate, fields, patients, fit, left):
    """{setting: Pcrit [left rows]} of a candidate fitted on the rows `fit` (weights: patients')."""
    from sklearn.decomposition import PCA
    from sklearn.ensemble import GradientBoostingRegressor
    from sklearn.kernel_approximation import Nystroem
    from sklearn.preprocessing import StandardScaler
    kind, vitals, pulse = candidate
    _, owner, counts = np.unique(patients[fit], return_inverse=True, return_counts=True)
    weight, target = 1 / counts[owner], fields["p_crit"][fit]
    if kind == "mean":
        tpp = fields["map"][fit] - target
        return {"": fields["map"][left] - np.average(tpp, weights=weight)}

    def columns(names):
        """Standardised on the fitted rows; a feature that could not be had is set to its mean."""
        if not names:
            return np.zeros((len(fit), 0)), np.zeros((len(left), 0))
        table = np.column_stack([fields[name] for name in names])
        scaler = StandardScaler().fit(table[fit], sample_weight=weight)
        ready = [np.nan_to_num(scaler.transform(table[rows])) for rows in (fit, left)]
        if "features" in names:
            n_components = min(COMPONENTS, len(fit))
            shorten = PCA(n_components, whiten=True, random_state=0).fit(ready[0])
            ready = [shorten.transform(one) for one in ready]
        return ready

    (fit_vitals, left_vitals), (fit_pulse, left_pulse) = columns(vitals), columns(pulse)
    if kind == "boosting":
        model = GradientBoostingRegressor(n_estimators=ROUNDS[-1], max_depth=2, min_samples_leaf=5,
                                          random_state=0)
        model.fit(np.hstack([fit_vitals, fit_pulse]), target, sample_weight=weight)
        stages = model.staged_predict(np.hstack([left_vitals, left_pulse]))
        return {rounds: one for rounds, one in enumerate(stages, 1) if rounds in ROUNDS}
    found, middle = {}, np.average(target, weights=weight)
    for scale in PPG_SCALES if pulse else (1.0,):
        ours, theirs = (np.hstack([a, scale * b]) for a, b in
                        ((fit_vitals, fit_pulse), (left_vitals, left_pulse)))
        if kind == "kernel":
            kernel = Nystroem(gamma=GAMMA, n_components=min(50, len(ours)), random_state=0)
            ours, theirs = kernel.fit_transform(ours), kernel.transform(theirs)
        u, s, v = np.linalg.svd(np.sqrt(weight)[:, None] * ours, full_matrices=False)
        along = u.T @ (np.sqrt(weight) * (target - middle))
        for penalty in PENALTIES:           # ridge, all penalties from one decomposition
            found[scale, penalty] = middle + theirs @ (v.T @ (along * s / (s ** 2 + penalty)))
    return found


def nested(candidate, fields, patients):
    """Each patient left out in turn: Pcrit [N] with the setting chosen among the others; and their
    own, each left out as well: [patients, N], NaN for the patient and what is not fitted."""
    names = np.unique(patients)
    rows = {name: np.flatnonzero(patients == name) for name in names}
    thin = {name: own[np.unique(np.linspace(0, len(own) - 1, MOST_FITTED).round().astype(int))]
            for name, own in rows.items()}
    inner, predicted = np.full((len(names), len(patients)), np.nan), np.empty(len(patients))
    for number, name in enumerate(names):
        others = [other for other in names if other != name]
        squared, of_setting = Counter(), defaultdict(dict)
        for left in others:
            fit = np.concatenate([thin[other] for other in others if other != left])
            for setting, one in every_setting(candidate, fields, patients, fit, thin[left]).items():
                squared[setting] += np.mean((one - fields["p_crit"][thin[left]]) ** 2)
                of_setting[setting][left] = one
        setting = min(squared, key=squared.get)
        for left, one in of_setting[setting].items():
            inner[number, thin[left]] = one
        fit = np.concatenate([thin[other] for other in others])
        predicted[rows[name]] = every_setting(
            candidate, fields, patients, fit, rows[name])[setting]
    return inner, predicted


def every_candidate(networks, patients):
    """[{candidate: `nested` of it}], one for each network (its fields, of `add_columns`)."""
    runs = []
    for number, fields in enumerate(networks):
        run = {}
        for name, candidate in tk_utils.progress(
                {**VITALS, **WITH_PPG, **ARTERIAL_LINE}.items(), desc=f"network {number}"):
            differs = {"network", "features"} & set(candidate[2])
            run[name] = (nested(candidate, fields, patients) if differs or not runs
                         else runs[0][name])
        for name, group in AVERAGES.items():
            run[name] = tuple(np.mean([run[one][i] for one in group], axis=0) for i in (0, 1))
        runs.append(run)
    return runs


def best_of(average, run, p_crit, patients):
    """(names of the candidates chosen inside, one for each patient left out; Pcrit [N])."""
    names = [*AVERAGES[average], average]
    _, owner = np.unique(patients, return_inverse=True)
    scored = np.isfinite(run[average][0])                       # [patients, N]
    counts = np.stack([np.bincount(owner, one, len(scored)) for one in scored])
    weight = np.where(scored, 1 / np.maximum(counts, 1)[:, owner], 0)
    scores = [np.sum(weight * np.where(scored, run[name][0] - p_crit, 0) ** 2, axis=1)
              for name in names]
    chosen = np.argmin(scores, axis=0)
    return ([names[i] for i in chosen],
            np.stack([run[name][1] for name in names])[chosen[owner], np.arange(len(owner))])


def compare(p_crit, ours, theirs, patients, by_patient=True):
    """(RMSE of theirs, of ours, skill): Pcrit [networks][N] each, all networks taken together."""
    truth, who = np.tile(p_crit, len(ours)), np.tile(patients, len(ours))
    ours, theirs = np.concatenate(ours), np.concatenate(theirs)
    return (*((metrics.patient_scores(who, truth, one) if by_patient else
               {"rmse": metrics.rmse(who, one - truth)})["rmse"] for one in (theirs, ours)),
            metrics.skill(truth, ours, theirs, who, by_patient=by_patient))


def labels_of_others(p_crit, patients, rng):
    """[N]: each patient's Pcrit drawn from those of one other patient."""
    names, mixed = rng.permutation(np.unique(patients)), np.empty(len(p_crit))
    for name, other in zip(names, np.roll(names, 1)):
        own = patients == name
        mixed[own] = rng.choice(p_crit[patients == other], own.sum())
    return mixed


def shown(one):
    return f"{one['value']:.2f} ({one['low']:.2f} to {one['high']:.2f})"


def print_results(runs, p_crit, patients):
    (picked_theirs, theirs), (picked_ours, ours) = (
        zip(*(best_of(average, run, p_crit, patients) for run in runs)) for average in AVERAGES)
    rows = []
    for title, by_patient in (("each patient the same", True), ("each segment the same", False)):
        of_each = [compare(p_crit, [a], [b], patients, by_patient)[2]["value"]
                   for a, b in zip(ours, theirs)]
        rows.append([title, *map(shown, compare(p_crit, ours, theirs, patients, by_patient)),
                     f"{np.mean(of_each):.3f} ± {np.std(of_each, ddof=len(runs) > 1):.3f}"])
    tk_utils.print_table(rows, ["weight", "best on vitals, RMSE mmHg", "best with PPG, RMSE mmHg",
                                "skill (95 %)", "mean ± SD over networks"])
    for picked in (picked_theirs, picked_ours):
        counts = Counter(name for names in picked for name in names).most_common()
        print("chosen inside: " + ", ".join(f"{n} x {name}" for name, n in counts))
    print("\nin hindsight, each candidate alone, each patient the same:")
    tk_utils.print_table([[name, *map(shown, compare(
        p_crit, [run[name][1] for run in runs], theirs, patients)[1:])] for name in runs[0]],
        ["candidate", "RMSE mmHg", "skill"])


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("data", help="recordings prepared with prepare.py")
    parser.add_argument("checkpoints", nargs="+", help="networks trained on virtual patients")
    parser.add_argument("--condition", default=datasets.DEFAULT_CONDITION)
    parser.add_argument("--label-method", default="published", choices=labels.METHODS)
    parser.add_argument("--step-s", type=float, default=60, help="seconds from window to window")
    parser.add_argument("--patients", type=int, help="only the first so many, for a quick look")
    parser.add_argument("--shuffle", type=int, default=0, metavar="N",
                        help="repeats with labels of other patients, one network")
    options = parser.parse_args()
    fields, ppg, patients = read_windows(options.data, options.condition, options.label_method,
                                         options.step_s)
    kept = np.isin(patients, np.unique(patients)[:options.patients])
    fields, ppg, patients = {k: v[kept] for k, v in fields.items()}, ppg[kept], patients[kept]
    add_columns(fields, ppg)
    seen = [look(path, fields, ppg) for path in options.checkpoints]
    mean = np.mean([p_crit for p_crit, _ in seen], axis=0)
    networks = [dict(fields, network=p_crit, features=pooled, networks=mean)
                for p_crit, pooled in seen]
    print(f"{len(patients)} segments of {len(np.unique(patients))} patients, "
          f"{len(networks)} networks")
    rng = np.random.default_rng(0)
    for repeat in range(options.shuffle):
        mixed = labels_of_others(fields["p_crit"], patients, rng)
        print(f"\nlabels of other patients, repeat {repeat}")
        print_results(every_candidate([dict(networks[0], p_crit=mixed)], patients), mixed, patients)
    if not options.shuffle:
        print_results(every_candidate(networks, patients), fields["p_crit"], patients)


if __name__ == "__main__":
    sys.exit(tk_utils.run_script(main, datasets.DataError))
