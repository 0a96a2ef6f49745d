"""Does it help to learn from all minutes, not only from those with a label? On real patients.

    python benchmarks/pretrain.py data/real.h5          # about 8 minutes a fold on one quiet core
    python benchmarks/pretrain.py data/real.h5 --pretrain-epochs 0      # from random weights

Every minute has an arterial line. On all minutes of the train patients, gate or no gate, the
network first learns to say from the PPG what the line says: how its beats vary
(`anchor.pulse_statistics` of the pressure), systolic and pulse pressure. From these weights it is
then trained for TPP as train_resnet.py would, at a quarter of the rate. Each fold is kept in runs/
and not trained again; at the end all are scored together as benchmarks/real.py scores its own.
"""
import argparse
import os

import common  # noqa: F401 (the path)
import numpy as np
import real
import torch

import anchor
import datasets
import evaluate
import kernels
import train_resnet
import training_header as header

RATE = 2e-3             # of pre-training, as train_resnet.py's recipes


def read_line(dataset):
    """(PPG [N, 1, 3600], what the arterial line says [N, 14]), normalised, of the minutes of a
    dataset whose line has no gap."""
    ppg, line = (torch.from_numpy(dataset.waveform(key, np.arange(len(dataset)))).unsqueeze(1)
                 for key in ("ppg", "abp"))
    whole = line.isfinite().all(2)[:, 0]
    says = torch.cat([anchor.pulse_statistics(line[whole]), *(
        dataset.column(key)[whole].float().log().unsqueeze(1) for key in ("sbp", "pp"))], 1)
    low, high = torch.quantile(says, torch.tensor([0.005, 0.995]), dim=0)
    says = says.clamp(low, high)
    ppg = header.PPG_NORMALISATIONS["segment"](ppg[whole])
    return ppg, (says - says.mean(0)) / says.std(0)


def pretrain(network, dataset, epochs, batch_size=16):
    """Trains the features of a network of three vitals (here 0) to say what the line says."""
    ppg, says = read_line(dataset)
    head = torch.nn.Sequential(network.projection, torch.nn.ReLU(),
                               torch.nn.Linear(128, says.shape[1]))
    fast, steps = kernels.accelerate(network), epochs * (len(ppg) // batch_size)
    parameters = [*network.layers.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=RATE, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps)
    vitals = [torch.zeros(batch_size)] * network.num_discrete
    for epoch in range(epochs):
        losses = []
        for rows in torch.randperm(len(ppg))[:steps // epochs * batch_size].split(batch_size):
            optimizer.zero_grad()
            loss = ((head(fast.features(ppg[rows], *vitals)) - says[rows]) ** 2).mean()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
        print(f"pre-training, epoch {epoch + 1}/{epochs}: {np.mean(losses):.3f} of the line's "
              "variance is not explained", flush=True)


def train_fold(path, index, everything, fold, options):
    """Trains and saves one fold."""
    parts = header.split_index(index, 0, fold, options.folds)
    sets = {name: header.TPP_PPG_dataset(parts[name], "segment", train_resnet.KEYS)
            for name in ("train", "tune")}
    settings = train_resnet.parse_args(["--seed", str(fold), "--recipe", "small"])
    recipe = train_resnet.choose_recipe(settings, len(sets["train"]))
    model, described = train_resnet.build(settings, recipe, sets["train"], None)
    if options.pretrain_epochs:
        kept_out = np.concatenate([parts[name].patients for name in ("tune", "test")])
        known = everything.select(~np.isin(everything.patients, kept_out)[
            everything.encounter_patient])
        print(f"fold {fold}: {len(known):,} minutes of {known.n_patients} patients, "
              f"{len(sets['train']):,} of them with a label")
        pretrain(model.network, datasets.TPP_PPG_dataset(known, "segment", train_resnet.KEYS),
                 options.pretrain_epochs)
        recipe["lr"] /= 4
    loaders = train_resnet.make_loaders(settings, recipe, sets)
    model, _ = header.training_loop(model, *loaders,
                                    **train_resnet.loop_arguments(recipe, loaders[0], model))
    header.fit_blend(model, sets["train"], sets["tune"])
    calibration = evaluate.make_calibration(model, sets["tune"])
    header.refit_anchor(model, sets["train"], sets["tune"])
    header.save_checkpoint(path, model, **described, split=parts, calibration=calibration,
                           config={**recipe, "fold": fold, "folds": options.folds})


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("data", help="real patients, made by prepare.py")
    parser.add_argument("--pretrain-epochs", type=int, default=6)
    parser.add_argument("--folds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    index = header.create_dataset_index(path=options.data)
    everything = header.create_dataset_index(path=options.data, condition=["map > 0"])
    os.makedirs("runs", exist_ok=True)
    paths = [f"runs/pretrained{options.pretrain_epochs}_fold{fold}.pth"
             for fold in range(options.folds)]
    for fold, path in enumerate(paths):
        if not os.path.exists(path):
            train_fold(path, index, everything, fold, options)
    _, segments = evaluate.compare_runs(paths, data=[options.data], split="test")
    real.print_estimates(real.unseen_rows(segments))


if __name__ == "__main__":
    main()
