"""How many patients does it take? Error on unseen virtual patients against the number of patients
trained on, the network beside every baseline: docs/training.md's figure.

    python benchmarks/patients.py --patients 300 1000 3000 --segments 3 --seeds 3
    python benchmarks/patients.py --patients 10000 --segments 3 --seeds 1      # adds to the file
    python benchmarks/patients.py --draw docs/patients.png

Each seed draws its own patients from one simulated cohort and trains on them as train_resnet.py
would (its recipe for the number of segments, 8 of 10 patients for training, one for tuning). All
are scored on the same further patients, of another seed of the simulator. Results are kept after
each run in --out, and what is there is not run again.
"""
import argparse
import json
import os
import sys

import numpy as np

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import torch

import evaluate
import report
import simulate
import tk_utils
import train_resnet
import training_header as header

UNSEEN = {"patients": 1000, "segments": 1, "seed": 1}       # the seed is the simulator's
SHOWN = {"network": "C3", "ridge": "C7", "ridge_ppg": "C0", "gradient_boosting_ppg": "C2",
         "ridge_all": "C1"}


def simulated(patients, segments, seed):
    """The path of a simulated file, made if it is not there."""
    path = f"data/simulated_{patients}x{segments}_seed{seed}.h5"
    if not os.path.exists(path):
        workers = (os.cpu_count() or 1) if patients > 100 else 1
        simulate.simulate_file(path, patients, segments, seed, workers=workers)
    return path


def draw_patients(index, patients, segments, seed):
    """The index of so many patients, drawn at random, and of the first minutes of each."""
    chosen = np.random.default_rng(seed).permutation(index.n_patients)[:patients]
    few = index.select(np.isin(index.encounter_patient, chosen))
    return few.select_segments(few.rows < segments)


def run(index, unseen, seed, options):
    """{predictor: RMSE of TPP on the unseen patients, mmHg}, of one seed and its patients."""
    parts = header.split_index(index)
    sets = {name: header.TPP_PPG_dataset(parts[name], "segment", train_resnet.KEYS, seed=seed)
            for name in ("train", "tune")}
    run_options = train_resnet.parse_args(["--seed", str(seed), *options.settings])
    if run_options.threads:
        torch.set_num_threads(run_options.threads)
    recipe = train_resnet.choose_recipe(run_options, len(sets["train"]))
    model, _ = train_resnet.build(run_options, recipe, sets["train"], None)
    loaders = train_resnet.make_loaders(run_options, recipe, sets)
    tune_rmse = []
    model, _ = header.training_loop(
        model, *loaders, precision=run_options.precision, device=run_options.device,
        on_epoch=lambda log: tune_rmse.append(log[-1]["tune_loss"] ** 0.5),
        **train_resnet.loop_arguments(recipe, loaders[0], model))
    if model.anchor:
        header.fit_blend(model, sets["train"], sets["tune"])
        header.refit_anchor(model, sets["train"], sets["tune"])
    results = evaluate.evaluate(model, unseen, train=parts["train"], tune=parts["tune"])
    found = {name: one["rmse"] for name, one in results["baselines"].items()}
    return {"recipe": recipe["recipe"], "n_train_patients": parts["train"].n_patients,
            "n_train_segments": len(parts["train"]), "tune_rmse": tune_rmse,
            "rmse": {"network": results["tpp"]["rmse"], **found}}


def draw(results, path):
    """RMSE against the number of train patients: a line for each predictor, a dot for each run."""
    figure = tk_utils.new_figure(7, 4.5)
    axes, n_segments = figure.subplots(), sorted({row["segments"] for row in results})
    for name, colour in SHOWN.items():
        for style, segments in zip(("-", "--", ":"), reversed(n_segments)):
            rows = [row for row in results if row["segments"] == segments]
            sizes = sorted({row["patients"] for row in rows})
            points = [(row["n_train_patients"], row["rmse"][name]) for row in rows]
            axes.plot(*np.transpose(points), ".", color=colour, ms=4, alpha=0.5)
            means = [np.mean([(row["n_train_patients"], row["rmse"][name]) for row in rows
                              if row["patients"] == size], axis=0) for size in sizes]
            label = "the model" if name == "network" else report.named(name)
            minutes = tk_utils.counted(segments, "minute")
            axes.plot(*np.transpose(means), style, color=colour, lw=1.5,
                      label=f"{label}, {minutes} of each" if len(n_segments) > 1 else label)
    axes.set(xscale="log", xlabel="Train patients (simulated)",
             ylabel="RMSE of TPP on unseen patients (mmHg)", ylim=(0, None))
    axes.set_xticks([size for size, _ in means])
    axes.minorticks_off()
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.legend(frameon=False, fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    tk_utils.save_figure(figure, path)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--patients", nargs="+", type=int, default=[300, 1000, 3000])
    parser.add_argument("--segments", nargs="+", type=int, default=[3], help="of each patient")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--cohort", nargs=2, type=int, metavar=("PATIENTS", "SEGMENTS"),
                        help="from which patients are drawn; default: the largest asked for")
    parser.add_argument("--unseen", type=int, default=UNSEEN["patients"], help="patients to score")
    parser.add_argument("--out", default="patients.json")
    parser.add_argument("--draw", metavar="PNG")
    parser.add_argument("settings", nargs="*", help="after --, options of train_resnet.py")
    options = parser.parse_args()
    results = []
    if os.path.exists(options.out):
        with open(options.out, encoding="utf-8") as file:
            results = json.load(file)
    if options.draw:
        return draw(results, options.draw)
    cohort = options.cohort or (max(options.patients), max(options.segments))
    index = header.create_dataset_index(path=simulated(*cohort, seed=0))
    unseen = header.create_dataset_index(
        path=simulated(**{**UNSEEN, "patients": options.unseen}))
    for patients in options.patients:
        for segments in options.segments:
            for seed in range(options.seeds):
                one = {"patients": patients, "segments": segments, "seed": seed,
                       "settings": options.settings, "cohort": list(cohort)}
                if any(all(row[key] == value for key, value in one.items()) for row in results):
                    continue
                some = draw_patients(index, patients, segments, seed)
                results.append({**one, **run(some, unseen, seed, options)})
                tk_utils.write_json(options.out, results)
                print(results[-1], flush=True)
    names = list(results[0]["rmse"])
    tk_utils.print_table(
        [[row["patients"], row["segments"], row["seed"], row["recipe"],
          *(row["rmse"].get(name) for name in names)] for row in results],
        ["patients", "minutes", "seed", "recipe", *names])
    return None


if __name__ == "__main__":
    main()
