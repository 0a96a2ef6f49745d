"""How far labels are from the truth on virtual patients, and how methods agree on real ones.

    python benchmarks/label_error.py [--patients 200] [--seed 2]        # docs/label_report.png
    python benchmarks/label_error.py --data data/icu.h5                 # recordings, prepare.py

Both print a table and write it to --out as CSV; the first also draws a figure. The virtual patients
come in REGIMES that each strain the label in one way; their true Pcrit is known. In recordings
nothing is known, so the table shows the minutes and patients that each method keeps, the difference
from the published label, and how much the label changes from one minute to the next. A second table
shows averages over several minutes, and how well vitals and pulse statistics estimate them.
"""
import math
import os
import sys
from dataclasses import replace
from functools import partial

import common  # noqa: F401 (puts the repository on the path)
import numpy as np
import pandas as pd
import torch
from sklearn.model_selection import GroupKFold

import anchor
import datasets
import labels
import metrics
import report
import signals
import simulate
import tk_utils
from simulate import DEFAULT, Uniform

NONE = Uniform(0.0, 0.0)
# Vessels that do not change within the minute and a regular rhythm, as the equation of the balance
# assumes. Stroke volume varies with the breath, slowly and at random, as in simulate.Settings.
CONSTANT = replace(DEFAULT, fibrillation_share=0.0, ectopic_share=0.0, flush_share=0.0,
                   damped_share=0.0, motion_share=0.0, vasomotion_mmhg=NONE, reflection=NONE)


def bent_windkessel(flow, p_crit, p, compliance_bend=120.0, resistance_bend=200.0):
    """`simulate.windkessel` by Heun's steps, where C and R fall as exp(-(P - mean P) / bend).

    The bends, in mmHg, are assumed, not measured. Together they raise the published intercept by
    about as much as it lies above stop-flow measurements (about 40 against 26.5 mmHg).
    """
    mean = p_crit.mean() + p["resistance"] * flow.mean()
    conductance, elastance = 1.0 / p["resistance"], 1.0 / (simulate.FS_SIM * p["compliance"])

    def step(pressure, q, closing):
        above = pressure - mean
        outflow = (pressure - closing) * conductance * math.exp(above / resistance_bend)
        return elastance * math.exp(above / compliance_bend) * (q - outflow)

    pressure, stored = mean, []
    inflow, closing = flow.tolist(), p_crit.tolist()
    for k in range(len(inflow)):
        stored.append(pressure)
        first = step(pressure, inflow[k], closing[k])
        after = min(k + 1, len(inflow) - 1)
        pressure += 0.5 * (first + step(pressure + first, inflow[after], closing[after]))
    return np.array(stored)


STIFFENING = replace(CONSTANT, windkessel=partial(bent_windkessel, resistance_bend=np.inf))
BENT = replace(CONSTANT, windkessel=bent_windkessel)
FIBRILLATION = {"fibrillation_share": 1.0, "reflection": DEFAULT.reflection}
# name: (settings, seconds of a segment)
REGIMES = {
    "slow": (replace(CONSTANT, slow_stroke_volume=Uniform(0.05, 0.15),
                     respiratory_stroke_volume=NONE, respiratory_interval=NONE), 60),
    "respiratory": (replace(CONSTANT, slow_stroke_volume=NONE, slow_interval=NONE), 60),
    "mixed": (CONSTANT, 60),
    "mixed, 30 s": (CONSTANT, 30),
    "mixed, 120 s": (CONSTANT, 120),
    "reflection": (replace(CONSTANT, reflection=DEFAULT.reflection), 60),
    # up to three times the noise of the default cohort
    "noise": (replace(CONSTANT, abp_noise_mmhg=Uniform(0.5, 1.5)), 60),
    "damped line": (replace(CONSTANT, damped_share=1.0), 60),
    "fibrillation": (replace(CONSTANT, **FIBRILLATION), 60),
    "C(P)": (STIFFENING, 60),
    "C(P), R(P)": (BENT, 60),
    "fibrillation, C(P), R(P)": (replace(BENT, **FIBRILLATION), 60),
    "default cohort": (DEFAULT, 60),
}
RECOMMENDED = ("waveform_balance", "default, p_crit_se < 5.5")
SHOWN = (("published", "default"), ("waveform_balance", "default"), RECOMMENDED)


def regime_labels(regime, seed, numbers):
    """(true Pcrit [N], {method: labels}) of one segment of each of N patients."""
    settings, seconds = REGIMES[regime]
    truth, abp = [], []
    for number in numbers:
        rng = np.random.default_rng([seed, number])
        patient = simulate.draw_patient(rng, settings)
        state = {name: values[0]
                 for name, values in simulate.drift(rng, patient, 1, settings).items()}
        abp.append(simulate.simulate_segment(rng, {**patient, **state}, settings, seconds)[0])
        truth.append(state["p_crit"])
    return np.array(truth), label_all(np.array(abp))


def label_all(abp):
    """{method: labels} of abp [N, samples]."""
    return {method: labels.label_segments(abp, datasets.FS, method) for method in labels.METHODS}


def passes(fields, condition):
    """[N] mask of the minutes that pass the gate, assuming that every PPG is usable."""
    return datasets.passes_gate(datasets.get_gate(condition), fields.get,
                                np.ones(len(fields["map"]), bool))


def label_errors(fields, truth, kept):
    """{column: value} of estimated against true Pcrit [N] over the minutes that are kept."""
    error, standard_error = fields["p_crit"][kept] - truth[kept], fields["p_crit_se"][kept]
    return {"segments": len(kept), "kept_percent": 100.0 * kept.mean(),
            "bias_mmhg": if_enough(np.mean, error), "sd_mmhg": if_enough(np.std, error),
            "r": if_enough(correlation, fields["p_crit"][kept], truth[kept]),
            "within_2_se_percent": 100.0 * if_enough(np.mean, np.abs(error) < 2 * standard_error)}


def if_enough(function, *values):
    """The function of the values, NaN where there are fewer than 3."""
    return float(function(*values)) if len(values[0]) > 2 else float("nan")


def correlation(a, b):
    return np.corrcoef(a, b)[0, 1]


def error_table(patients, seed, workers, regimes=tuple(REGIMES)):
    """A row for each regime and entry of SHOWN: the label's error in Pcrit."""
    jobs = [(name, seed, numbers) for name in regimes
            for numbers in np.array_split(np.arange(patients), -(-patients // 25))]
    found = {name: [] for name in regimes}
    done = tk_utils.in_processes(_regime_labels, jobs, workers)
    for job, result in tk_utils.progress(done, total=len(jobs), desc="regimes"):
        found[job[0]].append(result)
    rows = []
    for regime, results in found.items():
        truth = np.concatenate([p_crit for p_crit, _ in results])
        for method, condition in SHOWN:
            fields = {key: np.concatenate([made[method][key] for _, made in results])
                      for key in results[0][1][method]}
            rows.append({"regime": regime, "method": method, "gate": condition,
                         **label_errors(fields, truth, passes(fields, condition))})
    return pd.DataFrame(rows)


def _regime_labels(job):
    return regime_labels(*job)


def draw_errors(table):
    """Bias ± SD of each label and the share of minutes kept, by regime."""
    figure = tk_utils.new_figure(9, 6.5)
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=(2.2, 1))
    regimes = list(dict.fromkeys(table["regime"]))
    for place, (method, condition) in enumerate(SHOWN):
        rows = table[(table["method"] == method) & (table["gate"] == condition)]
        y = np.arange(len(regimes)) + 0.18 * (place - (len(SHOWN) - 1) / 2)
        name = method + ("" if condition == "default" else ", standard error < 5.5")
        left.errorbar(rows["bias_mmhg"], y, xerr=rows["sd_mmhg"], fmt="o", markersize=4,
                      elinewidth=1.2, label=name)
        right.plot(rows["kept_percent"], y, "o", markersize=4)
    left.axvline(0, color="0.6", linewidth=0.8)
    left.set(xlabel="error of Pcrit, mmHg: mean ± SD", yticks=range(len(regimes)),
             yticklabels=regimes)
    left.invert_yaxis()
    left.grid(axis="x", alpha=0.3)
    right.grid(axis="x", alpha=0.3)
    right.set(xlabel="minutes that pass the gate, %", xlim=(0, 103))
    figure.legend(*left.get_legend_handles_labels(), loc="outside upper center", ncols=2)
    return figure


def agreement_table(path):
    """A row for each rhythm, method and gate: minutes and patients kept, Pcrit, agreement with the
    published label, and repeatability from minute to minute (SD of the change / sqrt 2)."""
    minutes = list(read_abp(path))
    if not minutes:
        raise datasets.DataError(f"{path}: no encounter has the field 'abp'; prepare.py stores it")
    patient, abp, _, next_is_next_minute, reason, irregular = map(np.concatenate, zip(*minutes))
    made = label_all(abp)
    for fields in made.values():
        fields["reason"] |= reason
    standard = made["published"]["p_crit"]
    standard_kept = passes(made["published"], "default")
    kept_by_all = standard_kept & passes(made["waveform_balance"], "default")
    rows = []
    for rhythm, chosen in (("all", np.ones(len(abp), bool)), ("regular", ~irregular),
                           ("arrhythmic", irregular)):
        both = chosen & kept_by_all
        pairs = np.flatnonzero((next_is_next_minute & both)[:-1] & both[1:])
        for method, condition in SHOWN:
            p_crit = made[method]["p_crit"].astype(float)
            kept = chosen & passes(made[method], condition)
            shared = kept & standard_kept
            change = p_crit[pairs + 1] - p_crit[pairs]
            change = change[np.isfinite(change)]
            rows.append({
                "rhythm": rhythm, "method": method, "gate": condition,
                "minutes": int(chosen.sum()), "kept": int(kept.sum()),
                "patients": len(np.unique(patient[kept])),
                "p_crit_mean": if_enough(np.mean, p_crit[kept]),
                "p_crit_sd": if_enough(np.std, p_crit[kept]),
                "minus_published": if_enough(np.mean, (p_crit - standard)[shared]),
                "r_with_published": if_enough(correlation, p_crit[shared], standard[shared]),
                "minute_to_minute_sd": if_enough(np.std, change) / 2 ** 0.5, "pairs": len(change)})
    return pd.DataFrame(rows)


def averages_table(path):
    """A row for each entry of SHOWN and number of minutes that are averaged: the repeatability of
    Pcrit and `estimated`, and, as most patients have no uninterrupted minutes, the skill of
    `estimated` also for the single minutes of the same averages."""
    patient, abp, ppg, follows, reason, _ = map(np.concatenate, zip(*read_abp(path)))
    pulse = np.concatenate([anchor.pulse_statistics(torch.from_numpy(part).unsqueeze(1)) for part
                            in np.array_split(np.nan_to_num(ppg), -(-len(ppg) // 256))])
    made, rows = label_all(abp), []
    for method, condition in SHOWN:
        fields = {**made[method], "reason": made[method]["reason"] | reason}
        kept = passes(fields, condition)
        vitals = np.stack([fields[key] for key in ("map", "dbp", "hr")], 1)
        columns = fields["p_crit"], vitals, pulse, patient
        place = np.zeros(len(kept), int)    # of a kept minute in its uninterrupted series
        for i in range(1, len(kept)):
            place[i] = place[i - 1] + 1 if follows[i - 1] and kept[i - 1] and kept[i] else 0
        for minutes in (1, 2, 3, 5):
            last = np.flatnonzero(kept & (place % minutes == minutes - 1))
            of_block = last[:, None] - np.arange(minutes)
            averages = [values[of_block].mean(1) for values in columns]
            after = np.flatnonzero((np.diff(last) == minutes) & (place[last[1:]] >= minutes))
            change = averages[0][after + 1] - averages[0][after]
            rmse, skill = estimated(*averages)
            rows.append({
                "method": method, "gate": condition, "averaged": minutes, "averages": len(last),
                "patients": len(np.unique(patient[last])), "p_crit_sd": averages[0].std(),
                "repeatability_sd": if_enough(np.std, change) / 2 ** 0.5, "rmse_vitals": rmse,
                "skill": skill, "skill_single_minutes": estimated(
                    *(values[of_block.ravel()] for values in columns))[1]})
    return pd.DataFrame(rows)


def estimated(p_crit, vitals, pulse, patients):
    """Of patients left out of the fit (10 folds), each with the same weight: the RMSE of the ridge
    on MAP, DBP and HR, and the skill over it of the ridge on these and the pulse statistics."""
    by_vitals, by_pulse, names = p_crit.copy(), p_crit.copy(), ["map", "dbp", "hr"]
    n_patients = len(np.unique(patients))
    if n_patients < 3:
        return np.nan, ""
    for fit, left in GroupKFold(min(10, n_patients)).split(vitals, groups=patients):
        plain = anchor.fit_rows(names, vitals[fit], p_crit[fit])
        full = anchor.fit_rows(names, vitals[fit], p_crit[fit], pulse[fit])
        by_vitals[left] = anchor.estimate(plain, vitals[left])
        by_pulse[left] = anchor.estimate(full, vitals[left], pulse[left])
    rmse = metrics.confidence_intervals(patients, p_crit, by_vitals, by_patient=True)["rmse"]
    return rmse["value"], report.shown(metrics.skill(p_crit, by_pulse, by_vitals, patients,
                                                     by_patient=True))


def read_abp(path):
    """Yield, for every encounter that has `abp`: the patient's number, abp and PPG [N, 3600],
    whether the next row is the next minute, reason of the PPG and the pair, whether arrhythmic."""
    with datasets.open_file(path) as file:
        for number, patient in enumerate(file.values()):
            for group in patient.values():
                if "abp" in group:
                    abp, ppg = (group[key][()].reshape(len(group[key]), -1)
                                for key in ("abp", "ppg"))
                    start = (group["start_s"][()] if "start_s" in group
                             else datasets.SEGMENT_SECONDS * np.arange(len(abp)))
                    quality = signals.signal_quality(abp, ppg, datasets.FS)
                    yield (np.full(len(abp), number), abp, ppg,
                           np.append(np.diff(start) == datasets.SEGMENT_SECONDS, False),
                           quality["reason"], quality["beat_irregularity"] > signals.ARRHYTHMIC)


def main():
    parser = tk_utils.ScriptParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", metavar="FILE", help="recordings with their ABP (prepare.py)")
    parser.add_argument("--patients", type=int, default=200, help="virtual ones of each regime")
    parser.add_argument("--seed", type=int, default=2)
    parser.add_argument("--out", metavar="FOLDER", default="label_report")
    options = parser.parse_args()
    if options.data:
        tables = {"label_agreement": agreement_table(options.data),
                  "label_averages": averages_table(options.data)}
    else:
        tables = {"label_report": error_table(options.patients, options.seed, os.cpu_count())}
        tk_utils.save_figure(draw_errors(tables["label_report"]),
                             os.path.join(options.out, "label_report.png"))
    for name, table in tables.items():
        path = os.path.join(options.out, f"{name}.csv")
        with tk_utils.atomic_file(path, newline="") as file:
            table.to_csv(file, index=False, float_format="%.4g")
        tk_utils.print_table(table.round(2).itertuples(index=False), list(table))
        print(f"wrote {path}")


if __name__ == "__main__":
    sys.exit(tk_utils.run_script(main, datasets.DataError))
