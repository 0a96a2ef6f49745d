"""Which recipe trains steadily, and why the published one stands still: docs/training.md's numbers.

    python benchmarks/training.py --seeds 5 --out training.json         # all candidates
    python benchmarks/training.py --seeds 1 --only published decay_off  # some of them
    python benchmarks/training.py --draw training.json docs/training.png

Each candidate is a network and changes to a recipe of train_resnet.py, trained on the default data
(simulated once) and scored on its tune patients after each epoch; the test patients are not read.
After each epoch it also measures, on tune segments: the RMS of the convolutions' weights, the
gradient of the loss beside that of the weight decay, the variance in front of the norms beside
their eps, and how much the pooled features differ between segments.
"""
import argparse
import json
import os
import sys

import numpy as np

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import torch
from torch import nn

import tk_utils
import train_resnet
import training_header as header

OLD = {"epochs": 8, "batch_size": 16, "lr": 1e-3, "schedule": ["step", 7, 0.2], "weight_decay": 0.1,
       "l1": 1e-4, "optimizer": "adam", "clip": None, "average_last": 0.0, "anchor": False}
NEW = {**OLD, "lr": 2e-3, "schedule": ["onecycle", 0.3, 0.04], "weight_decay": 0.01, "l1": 0.0,
       "optimizer": "adamw", "clip": 1.0, "average_last": 0.2}
CANDIDATES = {      # name: (network, recipe)
    "published": ("resnet_v3", OLD),
    "decay_off": ("resnet_v3", {**OLD, "weight_decay": 0.0, "l1": 0.0}),
    "adamw_onecycle": ("resnet_v3", NEW),
    "adamw_onecycle_anchor": ("resnet_v3", {**NEW, "anchor": True}),
    "spread": ("resnet_spread", NEW),
    "spread_anchor": ("resnet_spread", {**NEW, "anchor": True}),
    "spread_anchor_6_epochs": ("resnet_spread", {**NEW, "anchor": True, "epochs": 6}),
}
SEGMENTS = 128          # of the tune part, for the measures


def measures(model, batch, decay):
    """Numbers that say whether the network learns: {name: float}."""
    network, found = model.network, {}
    convolutions = [m for m in network.modules() if isinstance(m, nn.Conv1d)]
    weights = torch.cat([m.weight.detach().flatten() for m in convolutions])
    found["weight_rms"] = float(weights.pow(2).mean().sqrt())
    variances, handles = [], []
    for norm in (m for m in network.modules() if isinstance(m, nn.InstanceNorm1d)):
        handles.append(norm.register_forward_pre_hook(
            lambda _, x: variances.append(x[0].detach().var(2).median())))
    model.zero_grad(set_to_none=True)
    *inputs, label = batch
    normalised = model.normalise(inputs)
    features = network.features(*normalised)        # of models.py itself, where the norms are
    estimate = model.to_mmhg(network.mlp(network.projection(features)), inputs, normalised)[:, 0]
    for handle in handles:
        handle.remove()
    ((estimate - label) ** 2).mean().backward()          # in mmHg², as the loop's loss
    gradient = torch.cat([m.weight.grad.flatten() for m in convolutions])
    found["gradient_rms"] = float(gradient.pow(2).mean().sqrt())
    found["decay_rms"] = decay * found["weight_rms"]
    found["variance_before_norms"] = float(torch.stack(variances).median())
    n_vitals = len(inputs) - 1
    found["feature_sd"] = float(features.detach()[:, :features.shape[1] - n_vitals].std(0).mean())
    model.zero_grad(set_to_none=True)
    return found


def run(name, seed, data_set, epochs=None):
    """The log of one run: a dictionary for each epoch."""
    network, changes = CANDIDATES[name]
    recipe = {**train_resnet.NEUTRAL, "model": network, **changes,
              **({"epochs": epochs} if epochs else {})}
    options = train_resnet.parse_args(["--seed", str(seed)])
    _, datasets = data_set.split(options)
    model, _ = train_resnet.build(options, recipe, datasets["train"], None)
    loaders = train_resnet.make_loaders(options, recipe, datasets)
    some = datasets["tune"][np.arange(min(SEGMENTS, len(datasets["tune"])))]
    log = []

    def on_epoch(rows):
        device = next(model.parameters()).device
        decay = recipe["weight_decay"] if recipe["optimizer"] == "adam" else 0.0
        log.append({"tune_rmse": rows[-1]["tune_loss"] ** 0.5,
                    **measures(model, [t.to(device) for t in some], decay)})

    header.training_loop(model, *loaders, on_epoch=on_epoch,
                         **train_resnet.loop_arguments(recipe, loaders[0], model))
    return log


def summary(runs):
    """A row of the table: [mean, SD, worst of the last epoch; largest rise in the second half]."""
    curves = np.array([[row["tune_rmse"] for row in log] for log in runs])
    last, half = curves[:, -1], curves.shape[1] // 2
    rises = np.diff(curves, axis=1)[:, half - 1:].max(initial=0.0)
    return [last.mean(), last.std(ddof=1) if len(last) > 1 else None, last.max(), rises]


def draw(results, path):
    """Tune RMSE by epoch of each candidate, all seeds thin, their mean thick."""
    figure = tk_utils.new_figure(7, 4)
    axes = figure.subplots()
    for number, (name, runs) in enumerate(results.items()):
        curves = np.array([[row["tune_rmse"] for row in log] for log in runs])
        epochs = np.arange(1, curves.shape[1] + 1)
        axes.plot(epochs, curves.T, color=f"C{number}", lw=0.5, alpha=0.5)
        axes.plot(epochs, curves.mean(0), color=f"C{number}", lw=2, label=name.replace("_", " "))
    axes.set(xlabel="Epoch", ylabel="RMSE of TPP, tune patients (mmHg)")
    axes.legend(frameon=False, fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    tk_utils.save_figure(figure, path)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--only", nargs="+", choices=tuple(CANDIDATES), default=tuple(CANDIDATES))
    parser.add_argument("--epochs", type=int, help="not each candidate's own (for a quick look)")
    parser.add_argument("--data", nargs="+", metavar="FILE", help="not the default data")
    parser.add_argument("--out", default="training.json")
    parser.add_argument("--draw", nargs=2, metavar=("JSON", "PNG"))
    options = parser.parse_args()
    if options.draw:
        with open(options.draw[0], encoding="utf-8") as file:
            return draw(json.load(file), options.draw[1])
    standard = train_resnet.parse_args(["--data", *options.data] if options.data else [])
    data_set = train_resnet.DataSet(standard, train_resnet.find_data(standard))
    results = {}
    for name in options.only:
        results[name] = [run(name, seed, data_set, options.epochs) for seed in range(options.seeds)]
        tk_utils.write_json(options.out, results)
        tk_utils.print_table([[name, *summary(results[name])]], [
            "candidate", "tune RMSE", "SD", "worst", "largest rise, 2nd half"])
        tk_utils.print_table(
            [[epoch + 1, row["tune_rmse"], *(f"{row[key]:.2g}" for key in (
                "weight_rms", "gradient_rms", "decay_rms", "variance_before_norms", "feature_sd"))]
             for epoch, row in enumerate(results[name][0])],
            ["epoch", "tune RMSE", "weights", "gradient", "decay", "variance before norms",
             "SD of features"])
    return None


if __name__ == "__main__":
    main()
