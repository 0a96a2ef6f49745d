"""Coverage of the evaluation's intervals, and the cost of an evaluation.

    python benchmarks/evaluation.py coverage [--repeats 1000]   # of 95 % intervals over patients
    python benchmarks/evaluation.py conformal                   # of prediction intervals
    python benchmarks/evaluation.py scale                       # cost of 1 million predictions
"""
import argparse
import os
import resource
import sys
import time

import numpy as np

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import evaluate
import metrics
import report
from tk_utils import print_table

SHOWN = ("rmse", "mae", "mead", "r2", "bias", "sd", "skill", "limit", "within", "auc", "found")


def virtual_patients(rng, n_patients):
    """patients, truth, prediction, baseline. Each patient has its own level, bias and spread."""
    patients = np.repeat(np.arange(n_patients), rng.integers(3, 25, n_patients))
    n, spread = len(patients), 5 * np.exp(rng.normal(0, 0.4, n_patients))
    truth = rng.normal(36, 8, n_patients)[patients] + rng.normal(0, 9, n)
    error = rng.normal(1, 3, n_patients)[patients] + rng.normal(size=n) * spread[patients]
    worse = rng.normal(0, 6, n_patients)[patients] + rng.normal(0, 6, n)
    return patients, truth, truth + error, truth + worse


def every_score(patients, truth, prediction, baseline, n_boot):
    """{score: estimate} of the scores whose coverage is tabulated."""
    bootstrap = metrics.PatientBootstrap(patients, n_boot)
    detection = metrics.detection(bootstrap, truth, prediction)
    return dict(metrics.confidence_intervals(bootstrap, truth, prediction),
                skill=metrics.skill(truth, prediction, baseline, bootstrap),
                limit=metrics.bland_altman(bootstrap, truth, prediction)["upper"],
                within=metrics.within_patient_correlation(bootstrap, truth, prediction),
                auc=detection["auc"], found=detection["sensitivity"])


def coverage(options):
    truth = every_score(*virtual_patients(np.random.default_rng(0), 40_000), n_boot=2)
    rows = []
    for n_patients in (5, 10, 30, 100, 300):
        held, seen = dict.fromkeys(SHOWN, 0), dict.fromkeys(SHOWN, 0)
        for repeat in range(options.repeats):
            rng = np.random.default_rng([n_patients, repeat])
            found = every_score(*virtual_patients(rng, n_patients), n_boot=options.draws)
            for name in SHOWN:
                seen[name] += np.isfinite(found[name]["low"])
                held[name] += found[name]["low"] <= truth[name]["value"] <= found[name]["high"]
        rows.append([n_patients, *(f"{100 * held[name] / max(seen[name], 1):.1f}"
                                   for name in SHOWN)])
    print(f"% of {options.repeats} synthetic data sets in which the 95 % interval holds the truth")
    print_table(rows, ["patients", *SHOWN])


def conformal(options):
    rows = []
    for n_tune in (9, 19, 30, 100, 300):
        held = {level: [] for level in metrics.LEVELS}
        for repeat in range(min(options.repeats, 200)):
            rng = np.random.default_rng([n_tune, repeat])
            patients, truth, prediction, _ = virtual_patients(rng, n_tune + 300)
            tune = patients < n_tune
            calibration = metrics.fit_calibration((prediction - truth)[tune], patients[tune])
            for level, half in zip(metrics.LEVELS, calibration["half_widths"]):
                if half is not None:
                    inside = (np.abs(prediction - truth) <= half)[~tune]
                    new = metrics.PatientBootstrap(patients[~tune])
                    held[level].append(np.mean(new.per_patient(inside) / new.counts))
        rows.append([n_tune, *(f"{100 * np.mean(held[level]):.1f}" if held[level] else "none"
                               for level in metrics.LEVELS)])
    print("% of a new patient's segments in the prediction interval, mean over 200 data sets")
    print_table(rows, ["tune patients", *(f"{level:.0%}" for level in metrics.LEVELS)])


class Waves:
    """Stand-in for a dataset: figures show the waveforms of a few segments."""

    def waveform(self, key, segments):
        return np.sin(np.arange(3600) / 8 + np.asarray(segments)[:, None]).astype(np.float32)


def scale(options):
    """All scores, intervals and figures of many predictions, 500 per patient."""
    rng = np.random.default_rng(0)
    patients = np.repeat(np.arange(max(40, options.predictions // 500)), 500)
    n = len(patients)
    fields = {"map": rng.normal(78, 10, n), "tpp": rng.normal(36, 12, n), "r2": rng.random(n),
              "hr": rng.normal(80, 15, n), "pp": rng.normal(60, 15, n),
              "pulse_quality": rng.random(n), "pulse_irregularity": rng.random(n) / 3}
    fields["p_crit"] = fields["map"] - fields["tpp"]
    tpp = fields["tpp"] + rng.normal(0, 3, n // 500)[patients] + rng.normal(0, 5, n)
    scored = evaluate.Segments(
        fields, patients, patients, patients.astype(str), Waves(), tpp, best="baseline 0",
        baselines={f"baseline {i}": fields["tpp"] + rng.normal(0, 7 + i, n) for i in range(7)})
    wall, processor = time.perf_counter(), time.process_time()
    few = slice(0, n // 2)
    calibration = metrics.fit_calibration((tpp - fields["tpp"])[few], patients[few])
    scored.intervals = {level: metrics.interval(tpp, calibration, level)
                        for level in metrics.LEVELS}
    results = {**evaluate.score_all(scored, full=True), "note": None, "simulated": False}
    in_scores = time.process_time() - processor
    for draw in report.FIGURES.values():
        drawn = draw(results, scored)
        if drawn:
            drawn[0].savefig(os.devnull, format="png", dpi=200)
    used = time.process_time() - processor
    print(f"{n:,} predictions of {n // 500:,} patients, {len(scored.baselines)} baselines: "
          f"{used:.1f} s of processor time, "
          f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6:.2f} GB at most; "
          f"scores {in_scores:.1f} s, figures {used - in_scores:.1f} s, "
          f"by the clock {time.perf_counter() - wall:.1f} s")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("what", choices=("coverage", "conformal", "scale"))
    parser.add_argument("--repeats", type=int, default=1000, help="number of synthetic data sets")
    parser.add_argument("--predictions", type=int, default=1_000_000, help="for scale")
    parser.add_argument("--draws", type=int, default=1000, help="bootstrap draws of each data set")
    options = parser.parse_args()
    {"coverage": coverage, "conformal": conformal, "scale": scale}[options.what](options)


if __name__ == "__main__":
    main()
