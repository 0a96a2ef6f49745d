"""What helps a network that has few real patients? A table of docs/real-recordings.md.

    python benchmarks/few_patients.py data/real.h5          # about 25 minutes a variant on one core
    python benchmarks/few_patients.py data/real.h5 --only pretrained --test
    python benchmarks/few_patients.py data/real.h5 --only virtual --virtual runs/M1.5.pth

Each variant is trained in every fold as train_resnet.py would (recipe small, one --seed). On the
tune patients of all folds it is compared with what the model stands on, the ridge on vitals and its
share of the pulse statistics (which comes partly from these tune patients). --test also scores the
test patients, as benchmarks/real.py does; use it only for the variant that you have chosen. Each
fold is kept in runs/ and not trained again.

The variant `pretrained` also learns from the labelled minutes that the gate refuses: the network
first learns to predict from the PPG what the arterial line shows: how its beats vary
(`anchor.pulse_statistics` of the pressure), systolic and pulse pressure.
`virtual` begins with the network of --virtual, trained on virtual patients.
"""
import argparse
import os

import common  # noqa: F401 (the path)
import numpy as np
import real
import torch

import anchor
import checkpoint
import datasets
import evaluate
import kernels
import metrics
import tk_utils
import train_resnet
import training_header as header

NARROW = {"widths": [16, 16, 32, 32, 64]}
VARIANTS = {            # name: (arguments of the network, changes of the recipe)
    "plain": ({}, {}),
    "dropout": ({"dropout": 0.3}, {}),
    "narrow": (NARROW, {}),
    "augmented": ({}, {}),              # see `augment`
    "narrow_augmented_12_epochs": (NARROW, {"epochs": 12}),
    "pretrained": ({}, {"lr": 5e-4}),   # a quarter of the recipe's rate
    "virtual": ({}, {"lr": 5e-4}),
    "no_anchor": ({}, {"anchor": False}),
}
PRETRAIN_EPOCHS, PRETRAIN_RATE = 6, 2e-3


def augment(ppg):
    """Normalised PPG [B, 1, L] begun elsewhere (its end joined to its beginning), with slow waves
    below breathing and noise added. Its gain is normalised anyway; a stretch would change HR."""
    count, length = len(ppg), ppg.shape[-1]
    shift = torch.randint(length, (count, 1, 1))
    ppg = ppg.gather(2, (torch.arange(length) + shift) % length)
    times = torch.arange(length) / datasets.FS
    rate, phase = 0.02 + 0.08 * torch.rand(count, 1, 1), 6.28 * torch.rand(count, 1, 1)
    wander = 0.3 * torch.rand(count, 1, 1) * torch.sin(6.28 * rate * times + phase)
    return ppg + wander + 0.1 * torch.rand(count, 1, 1) * torch.randn_like(ppg)


class Augmented(header.NormalisedModel):
    """A model whose PPG is augmented while it is trained."""

    def normalise(self, inputs):
        ppg, *vitals = super().normalise(inputs)
        return [augment(ppg) if self.training else ppg, *vitals]


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
    """Trains the features of a network (its vitals are 0) to say what the line says."""
    ppg, says = read_line(dataset)
    head = torch.nn.Sequential(network.projection, torch.nn.ReLU(),
                               torch.nn.Linear(128, says.shape[1]))
    fast, steps = kernels.accelerate(network), epochs * (len(ppg) // batch_size)
    parameters = [*network.layers.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=PRETRAIN_RATE, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, PRETRAIN_RATE, total_steps=steps)
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


def datasets_of(index, fold, options):
    """({part: index}, {part: dataset}) of a fold."""
    parts = header.split_index(index, 0, fold, options.folds)
    return parts, {name: header.TPP_PPG_dataset(parts[name], "segment", train_resnet.KEYS)
                   for name in ("train", "tune")}


def train_fold(path, variant, index, fold, options):
    """Trains and saves one fold of a variant."""
    arguments, changes = VARIANTS[variant]
    parts, sets = datasets_of(index, fold, options)
    settings = train_resnet.parse_args(["--recipe", "small", "--seed", str(options.seed)])
    recipe = {**train_resnet.choose_recipe(settings, len(sets["train"])), **changes,
              **({"epochs": options.epochs} if options.epochs else {})}
    header.reset_all_seeds(settings.seed)
    network, spec, arguments = checkpoint.new_network(
        recipe["model"], num_discrete=3, num_outputs=1, in_channels=1, **arguments)
    model = (Augmented if "augmented" in variant else header.NormalisedModel)(
        network, train_resnet.KEYS, header.fit_normaliser(sets["train"], train_resnet.KEYS[1:]),
        anchor=header.fit_anchor(sets["train"], train_resnet.KEYS) if recipe["anchor"] else None)
    if variant == "virtual":
        network.load_state_dict(header.load_checkpoint(options.virtual)["model"])
    if variant == "pretrained":
        everything = header.create_dataset_index(path=options.data, condition=["map > 0"])
        kept_out = np.concatenate([parts[name].patients for name in ("tune", "test")])
        known = everything.select(~np.isin(everything.patients, kept_out)[
            everything.encounter_patient])
        print(f"fold {fold}: {len(known):,} minutes of {known.n_patients} patients, "
              f"{len(sets['train']):,} of them pass the gate")
        pretrain(model.network, header.TPP_PPG_dataset(known, "segment", train_resnet.KEYS),
                 options.epochs or PRETRAIN_EPOCHS)
    loaders = train_resnet.make_loaders(settings, recipe, sets)
    model, _ = header.training_loop(model, *loaders,
                                    **train_resnet.loop_arguments(recipe, loaders[0], model))
    if recipe["anchor"]:
        header.fit_blend(model, sets["train"], sets["tune"])
    calibration = evaluate.make_calibration(model, sets["tune"])
    if recipe["anchor"]:
        header.refit_anchor(model, sets["train"], sets["tune"])
    header.save_checkpoint(path, model, spec=spec, model_args=arguments, split=parts,
                           calibration=calibration,
                           config={**recipe, "fold": fold, "folds": options.folds})


def on_tune_patients(path, index, fold, options):
    """[N, 3] (label, the blended ridges, network alone), patients [N] of the tune patients."""
    sets, model = datasets_of(index, fold, options)[1], header.load_model(path)
    train, tune, blended = sets["train"], sets["tune"], model.anchor or {"pulse_share": 1.0}
    ridge, with_pulse = (header.predict_with_anchor(
        header.fit_anchor(train, model.keys, pulse), tune)
        for pulse in (None, header.read_pulse(train)))
    model.set_anchor(blended.get("trained_on"))
    return np.stack([tune.column("tpp").numpy(),
                     ridge + blended["pulse_share"] * (with_pulse - ridge),
                     header.predict_dataset(model, tune)], 1), tune.index.patients[
                         tune.index.segment_patients()]


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("data", help="real patients, made by prepare.py")
    parser.add_argument("--only", nargs="+", choices=tuple(VARIANTS),
                        default=[name for name in VARIANTS if name != "virtual"])
    parser.add_argument("--virtual", metavar="CHECKPOINT", help="a network of virtual patients")
    parser.add_argument("--test", action="store_true", help="also score the test patients")
    parser.add_argument("--epochs", type=int, help="not each variant's own (for a quick look)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    if "virtual" in options.only and not options.virtual:
        parser.error("the variant virtual needs --virtual CHECKPOINT")
    torch.set_num_threads(options.threads)
    index, rows = header.create_dataset_index(path=options.data), []
    os.makedirs("runs", exist_ok=True)
    for variant in options.only:
        of = (f"_{options.epochs}_epochs" * bool(options.epochs)
              + f"_seed{options.seed}" * bool(options.seed))
        paths = [f"runs/few_{variant}{of}_fold{fold}.pth" for fold in range(options.folds)]
        for fold, path in enumerate(paths):
            if not os.path.exists(path):
                train_fold(path, variant, index, fold, options)
        found = [on_tune_patients(path, index, fold, options) for fold, path in enumerate(paths)]
        truth, ridges, network = np.concatenate([values for values, _ in found]).T
        patients = np.concatenate([names for _, names in found])
        shares = [(header.load_checkpoint(path)["anchor"] or {}).get("blend", 1.0)
                  for path in paths]
        rows.append([variant, *(real.report.shown(metrics.skill(
            truth, network, ridges, patients, by_patient=one)) for one in (False, True)),
            " ".join(f"{share:.2f}" for share in shares)])
        tk_utils.print_table(rows, ["variant", "network's skill over the ridges, tune patients",
                                    "patients weighted equally", "share kept in each fold"])
        if options.test:
            _, segments = evaluate.compare_runs(paths, data=[options.data], split="test")
            real.print_estimates(real.unseen_rows(segments))


if __name__ == "__main__":
    main()
