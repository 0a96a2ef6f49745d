"""The main script: trains a network, scores it on the test patients and draws the figures.

    python train_resnet.py                                  # simulates patients and uses them
    python train_resnet.py --data my.h5 --name mine         # your own data
    python train_resnet.py --data my.h5 --folds 5           # cross-validation over patients
    python train_resnet.py --data my.h5 --seeds 3 --ablate  # three seeds; without PPG or vitals
    python train_resnet.py --model my_net.py:MyNet --loss my_losses.py:my_loss
    torchrun --nproc_per_node=2 train_resnet.py …           # several GPUs or processes

Writes runs/<name>.pth (the checkpoint), runs/<name>/ and figures_resnet/<name>_*.png. If a run is
killed, the same command continues it from its last saved state and ends in the same weights.
"""
import argparse
import contextlib
import importlib.util
import itertools
import os
import re
import shutil
import signal
import sys

import numpy as np
import pandas as pd
import torch

import checkpoint
import datasets
import evaluate
import report
import simulate
import tk_utils
import training_header as header
from tk_utils import RunFiles, counted

# ------------------------------------------------------------------------------------- settings
# What a recipe does not set. A new entry must not change finished runs. Reasons: docs/training.md.
NEUTRAL = {
    "model": "resnet_v3",           # a name in models.MODELS
    "optimizer": "adam",            # 'adam' (weight decay as L2) or 'adamw' (decoupled)
    "weight_decay": 0.0, "l1": 0.0,
    "schedule": ["step", 1000, 1.0],    # or ["onecycle", share of rising steps, first rate / lr]
    "clip": None,                   # largest norm of the gradient, for a label of SD 1
    "average_last": 0.0,            # share of the steps, at the end, whose weights are averaged
    "anchor": False,                # learn what the PPG adds to the ridge regression on the vitals
    "ppg_normalisation": "segment"}     # a name in training_header.PPG_NORMALISATIONS
STEADY = {**NEUTRAL, "model": "resnet_spread", "lr": 2e-3, "schedule": ["onecycle", 0.3, 0.04],
          "optimizer": "adamw", "weight_decay": 0.01, "clip": 1.0, "average_last": 0.2,
          "anchor": True}
RECIPES = {
    # Small batches, so that few segments make enough steps. Eight epochs do no better on tune.
    "small": {**STEADY, "epochs": 6, "batch_size": 16},
    "large": {**STEADY, "epochs": 10, "batch_size": 256},
    # As published, for a cohort of 64 million segments.
    "M1.5": {**NEUTRAL, "epochs": 10, "batch_size": 256, "lr": 1e-3, "schedule": ["step", 3, 0.2],
             "weight_decay": 0.1, "l1": 1e-4}}
SMALL_SEGMENTS = 50_000         # fewer train segments make under 2,000 steps of 256: recipe small
MIN_PART_PATIENTS = 10          # tune or test patients, below which a single split says little
# The default data: many patients with few segments, as the segments of a patient differ little.
SIMULATED = {"patients": 1200, "segments": 3, "seed": 0}
SIMULATED_FILE = "data/simulated_{patients}x{segments}_seed{seed}.h5".format(**SIMULATED)
KEYS = ["ppg", "map", "dbp", "hr", "tpp"]
DEFAULT_NAME = "M1.5"


def parse_args(arguments=None):
    parser = tk_utils.ScriptParser(description=__doc__.split("\n\n")[0])
    add = parser.add_argument_group("data").add_argument
    add("--data", nargs="+", metavar="FILE", help="HDF5 files; default: simulated patients")
    add("--keys", nargs="+", default=KEYS, help="ppg, vitals, label; default " + " ".join(KEYS))
    add("--condition", nargs="+", default=["default"], help="quality gate (docs/labels.md)")
    add("--split-seed", type=int, default=0, help="which patients train, tune and test; default 0")
    add = parser.add_argument_group("training").add_argument
    add("--recipe", choices=tuple(RECIPES), help="hyper-parameters; default: by size of the data")
    add("--epochs", type=int, help="passes over the train segments, instead of the recipe's")
    add("--batch-size", type=int, help="segments per step and process, instead of the recipe's")
    add("--lr", type=float, help="(largest) learning rate, instead of the recipe's")
    add("--weight-decay", type=float, help="weight decay, instead of the recipe's")
    add("--model", help=f"network: {', '.join(header.MODELS)}, or my_net.py:MyNet")
    add("--loss", default="mse", help=f"{', '.join(header.LOSSES)}, or my_losses.py:name")
    add("--init-from", metavar="CHECKPOINT", help="fine-tune these weights on the data")
    add("--seed", type=int, default=0, help="of the initial weights and the order; default 0")
    add("--precision", choices=("tf32", "float32", "bf16"), help="of training; bf16 is fastest")
    add = parser.add_argument_group("repeating").add_argument
    add("--seeds", type=int, metavar="K", help="K runs, <name>_seed<n>, with seeds from --seed on")
    add("--folds", type=int, metavar="K", help="K runs, <name>_fold<n>, each tests other patients")
    add("--ablate", action="store_true", help="first train <name>_no_ppg and <name>_no_vitals")
    add = parser.add_argument_group("running").add_argument
    add("--name", default=DEFAULT_NAME, help="of the files in runs/; default " + DEFAULT_NAME)
    add("--device", help="cpu, cuda, cuda:1, …; default: CUDA if present")
    add("--workers", type=int, help="loader processes; default: 0 on CPU, 4 on CUDA")
    add("--threads", type=int, help="threads on CPU; default: PyTorch's choice")
    add("--device-cache", choices=("auto", "off"), default="auto", help="keep data in GPU memory")
    add("--fresh", action="store_true", help="start again even if a run of this name exists")
    add("--tensorboard", action="store_true", help="also log to runs/<name>/tensorboard")
    options = parser.parse_args(arguments)
    if options.lr is not None and not options.lr > 0:
        parser.error(f"--lr {options.lr}: expected more than 0")
    for name, least in (("epochs", 1), ("batch_size", 1), ("weight_decay", 0), ("seed", 0),
                        ("workers", 0), ("threads", 1), ("seeds", 2), ("folds", 3)):
        value = getattr(options, name)
        if value is not None and not value >= least:
            parser.error(f"--{name.replace('_', '-')} {value}: expected at least {least}")
    vitals, label = datasets.vitals_of(options.keys), options.keys[-1]
    if len(options.keys) < 2 or label not in datasets.LABELS or "ppg" in options.keys[1:]:
        parser.error(f"--keys: expected ppg, then vitals, then {' or '.join(datasets.LABELS)}")
    if options.ablate and (options.keys[0] != "ppg" or not vitals or options.init_from):
        parser.error("--ablate: expected --keys with ppg and vitals, and no --init-from")
    if not re.fullmatch(r"[\w.+-]*\w", options.name):
        parser.error(f"--name {options.name!r}: expected letters, digits and any of . _ + -")
    if options.tensorboard and importlib.util.find_spec("tensorboard") is None:
        parser.error("--tensorboard needs a package: pip install tensorboard")
    options.own_network = None if options.model in (None, *header.MODELS) else options.model
    options.inputs, options.files = options.keys[:-1], RunFiles(f"runs/{options.name}")
    options.fold, options.position = None, ""       # `main` sets them if there are several runs
    return options


def main():
    options = parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)   # as Ctrl-C
    if options.threads:
        torch.set_num_threads(options.threads)
    header.choose_loss(options.loss)        # a wrong name is an error before the data are read
    header.load_by_name(options.model or NEUTRAL["model"], header.MODELS, "--model")
    files = find_data(options)
    if "RANK" in os.environ:                # set by torchrun
        join_processes(options.device)
    data = DataSet(options, files)
    note = tk_utils.simulated_note(data.provenance["origin"], "")
    if note and is_first():
        print(f"*** {note} ***")
    runs = list_runs(options)
    for number, run in enumerate(runs, 1):
        run.position = f" ({number} of {len(runs)})" if len(runs) > 1 else ""
        train_and_score(run, data)
    if (options.seeds or options.folds) and is_first():
        summarise(options, [run for run in runs if run.keys == options.keys], data)
    elif options.ablate and is_first():
        show(options)


def list_runs(options):
    """The options of each run that --seeds, --folds and --ablate ask for, in order."""
    ppg, *vitals, label = options.keys
    variants = [("", options.keys)]         # (ending of the name, keys)
    if options.ablate:      # first, because the table of the run itself lists them
        variants = [("_no_ppg", [*vitals, label]), ("_no_vitals", [ppg, label]), *variants]
    seeds = range(options.seed, options.seed + (options.seeds or 1))
    folds = range(options.folds) if options.folds else [None]
    runs = []
    for seed, fold, (ending, keys) in itertools.product(seeds, folds, variants):
        name = options.name + (f"_seed{seed}" if options.seeds else "")
        name += (f"_fold{fold}" if options.folds else "") + ending
        runs.append(argparse.Namespace(**{**vars(options), "name": name, "seed": seed, "fold": fold,
                                          "keys": keys, "files": RunFiles(f"runs/{name}")}))
    return runs


def train_and_score(options, data):
    """Train one network and score it; show the scores if that is done already."""
    files = options.files
    taken = f"{files.base}: another process is training under this name; use another --name"
    with tk_utils.locked(files.lock, taken) if is_first() else contextlib.nullcontext():
        parts, sets = data.split(options)
        recipe = choose_recipe(options, len(sets["train"]))
        if is_first() and not options.position:
            print(", ".join(f"{name}: {counted(len(part), 'segment')} of " + counted(
                part.n_patients, "patient") for name, part in parts.items()))
            if min(parts[name].n_patients for name in ("tune", "test")) < MIN_PART_PATIENTS:
                print("*** few patients: --folds 5 tests each of them once ***")
            print("recipe {recipe}: batch size {batch_size}, epochs {epochs}".format(**recipe),
                  flush=True)
        parent = open_parent(options, data, parts) if options.init_from else None
        model, network = build(options, recipe, sets["train"], parent)
        description = describe(options, recipe, data, parts, network, parent)
        finished = [is_first() and is_finished(options, description)]
        if header.distributed()[1] > 1:         # the first process tells the others
            torch.distributed.broadcast_object_list(finished)
        if finished[0]:
            return
        loaders = make_loaders(options, recipe, sets)
        try:
            model, trajectory = train(options, recipe, model, loaders, description)
            if is_first():
                description["calibration"] = fit_blend_and_intervals(options, model, sets)
                save(options, model, trajectory, description, parts, data)
                show(options)
        except (header.Interrupted, KeyboardInterrupt):
            if not os.path.exists(files.resume):
                raise
            print("interrupted; saved: the same command continues from here", file=sys.stderr)
            sys.exit(3)
        except header.NonFiniteLoss as problem:
            raise header.TrainingError(
                f"{problem}. {patients_of(loaders[0], problem, data.salt)}") from None


# --------------------------------------------------------------------------------- setup and data
def find_data(options):
    """The data files: those named (globs expanded), or the default file, simulated once."""
    if options.data:
        return tk_utils.find_files(options.data)
    if is_first():
        print("no --data: training on SIMULATED patients")
        if not os.path.exists(SIMULATED_FILE):
            simulate.simulate_file(SIMULATED_FILE, workers=os.cpu_count() or 1, **SIMULATED)
    return [SIMULATED_FILE]


def is_first() -> bool:
    """Whether this process prints and writes: the only process, or torchrun's rank 0."""
    return os.environ.get("RANK", "0") == "0"


def join_processes(device):
    """Join the other processes of torchrun (nccl on CUDA, gloo on CPU)."""
    tk_utils.exit_when_parent_dies()            # else it would wait for the others forever
    on_cuda = torch.cuda.is_available() and device != "cpu"
    if on_cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    torch.distributed.init_process_group("nccl" if on_cuda else "gloo")


class DataSet:
    """The data of a command, indexed once for all of its runs."""

    def __init__(self, options, files):
        self.files, self.salt_path = files, checkpoint.default_salt_path(files[0])
        self.index = header.create_dataset_index(condition=options.condition, path=files)
        # Raises if a field is missing, even a field that only the scores of test patients need.
        header.TPP_PPG_dataset(self.index, "segment", [*options.keys, *evaluate.SCORED])
        self.salt = header.read_salt(self.salt_path)
        self.baselines = {}         # fitted once for each set of train patients
        self.provenance = {
            **checkpoint.domain_of(self.index), "beats": datasets.origin_of(files, "beats"),
            "data_fingerprint": checkpoint.fingerprint(self.index, options.keys),
            "n_patients": self.index.n_patients, "n_segments": len(self.index),
            "salt": checkpoint.salt_mark(self.salt), "versions": tk_utils.versions(),
            "git_revision": tk_utils.git_revision()}

    def split(self, options):
        """({part: index}, {'train', 'tune': dataset}) of one run."""
        parts = header.split_index(self.index, options.split_seed, options.fold, options.folds)
        sets = {name: header.TPP_PPG_dataset(parts[name], "segment", options.keys,
                                             seed=options.seed) for name in ("train", "tune")}
        return parts, sets


def choose_recipe(options, n_segments) -> dict:
    """The recipe of a run, changed as the command line asks."""
    name = options.recipe or ("small" if n_segments < SMALL_SEGMENTS else "large")
    changes = {key: value for key, value in vars(options).items()
               if key in RECIPES[name] and value is not None}
    return {"recipe": name, **RECIPES[name], **changes}


def open_parent(options, data, parts):
    """The checkpoint of --init-from. Raises if its patients would be tuned or tested on here."""
    parent = header.load_checkpoint(options.init_from)
    if parent["keys"] != options.keys:
        raise header.DataError(f"{options.init_from}: needs --keys {' '.join(parent['keys'])}")
    for name in ("tune", "test"):       # without the parent's salt this only warns
        known = checkpoint.patient_parts(parts[name], parent, data.salt_path)
        if np.isin(known, checkpoint.SEEN).any():
            raise header.DataError(f"{options.init_from}: trained or tuned on patients that would "
                                   f"be {name} patients here; fine-tuning needs --data of others")
    return parent


def describe(options, recipe, data, parts, network, parent):
    """What the checkpoint records about the run: options, hashed split, provenance; no names."""
    config = {**recipe, **{name: getattr(options, name) for name in (
        "keys", "split_seed", "fold", "folds", "seed", "precision")},
        "condition": data.index.condition, "model": network["spec"],
        "loss": os.path.basename(options.loss), "processes": header.distributed()[1]}
    split = checkpoint.hash_split(parts, data.salt)
    if parent:
        split["ancestors"] = sorted(checkpoint.seen_by(parent))
    return {**network, "config": config, "split": split, "provenance": {
        **data.provenance, "parent": checkpoint.weights_fingerprint(parent) if parent else None}}


def is_finished(options, description) -> bool:
    """Whether this very run is finished; then shows its scores. Raises if its options differ."""
    path, resume = options.files.checkpoint, options.files.resume
    saved = header.load_checkpoint(path) if os.path.exists(path) else None  # raises if not ours
    if options.fresh:
        with contextlib.suppress(FileNotFoundError):
            os.remove(resume)
        return False
    if os.path.exists(resume):
        path, saved = resume, header.load_tensors(resume)["experiment"]
    if saved is None:
        return False
    # An option or setting that is newer than the saved run had its default value in it.
    had = {**vars(parse_args([])), **NEUTRAL, **saved["config"], **saved["provenance"]}
    now = {**description["config"], "parent": description["provenance"]["parent"]}
    other = [f"{name.replace('_', '-')} {had.get(name)} (now {value})"
             for name, value in now.items() if had.get(name) != value]
    if had.get("data_fingerprint") != description["provenance"]["data_fingerprint"]:
        other.append("other data")
    elif had["salt"] == description["provenance"]["salt"] and any(
            saved["split"][part] != description["split"][part] for part in header.PARTS):
        other.append("other train, tune or test patients")
    if other:
        raise header.DataError(f"{path}: a run with other options: {', '.join(other)}. --fresh "
                               "replaces it, --name OTHER keeps both")
    if path == resume:
        print(f"continuing from {path}", flush=True)
        return False
    print("this run is finished; --fresh trains it again, --name OTHER keeps both. Its scores:")
    show(options)
    return True


# ------------------------------------------------------------------------------------- the model
def build(options, recipe, train, parent):
    """(the normalised model, new or the parent's; how the checkpoint describes its network)."""
    loss = header.choose_loss(options.loss)
    header.reset_all_seeds(options.seed)
    if parent:
        model = header.load_model(parent, network=options.own_network)
        model.set_anchor((model.anchor or {}).get("trained_on", model.anchor))  # before its blend
        described = {key: parent[key] for key in ("spec", "model_args")}
    else:
        vitals = datasets.vitals_of(options.keys)
        # with --ablate, your own network gets zeros for an input; others are built without it
        inputs = options.inputs if options.own_network else options.keys[:-1]
        network, spec, arguments = checkpoint.new_network(
            recipe["model"], num_discrete=len(inputs) - ("ppg" in inputs),
            num_outputs=loss.outputs, in_channels=int("ppg" in inputs))
        if "ppg" not in inputs and "in_channels" not in arguments:
            inputs = options.inputs     # it cannot be built without the PPG, so it gets zeros
        described = {"spec": spec, "model_args": arguments}
        anchor = header.fit_anchor(train, options.keys) if recipe["anchor"] and vitals else None
        normaliser = header.fit_normaliser(train, [*vitals, options.keys[-1]])
        model = header.NormalisedModel(network, options.keys, normaliser,
                                       recipe["ppg_normalisation"], anchor, inputs)
    if model.outputs != loss.outputs:
        raise header.TrainingError(f"the network has {counted(model.outputs, 'output')}, --loss "
                                   f"{options.loss} needs {loss.outputs}")
    return model, described


def make_loaders(options, recipe, sets):
    """The train and the tune loader."""
    rank, world = header.distributed()
    device = header.choose_device(options.device)
    on_cuda = device.type == "cuda"
    workers = (4 if on_cuda else 0) if options.workers is None else options.workers
    loaders = [header.make_loader(
        sets[name], recipe["batch_size"] * world, shuffle=name == "train", seed=options.seed,
        workers=workers, pin_memory=on_cuda, rank=rank, world=world,
        device_cache=device if on_cuda and options.device_cache == "auto" else None)
        for name in ("train", "tune")]
    if rank == 0 and loaders[0].device is not None:
        print("the data are kept in the GPU's memory (--device-cache off reads them each time)")
    return loaders


# -------------------------------------------------------------------------------------- training
def loop_arguments(recipe, loader, model, loss=header.LOSSES["mse"]) -> dict:
    """The arguments of `training_loop` that a recipe stands for."""
    kind, first, second = recipe["schedule"]
    scheduler = [header.StepLR, {"step_size": first, "gamma": second}]
    if kind == "onecycle":
        scheduler = [header.OneCycleLR, {
            "max_lr": recipe["lr"], "total_steps": recipe["epochs"] * len(loader) + 1,
            "pct_start": first, "div_factor": 1 / second, "final_div_factor": 1e4,
            "cycle_momentum": False}]
    optimizers = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}
    clip = recipe["clip"] and recipe["clip"] * float(model.scale) ** loss.power
    return {"total_epochs": recipe["epochs"], "lr": recipe["lr"],
            "weight_decay": recipe["weight_decay"], "l1_reg": recipe["l1"],
            "optimizer_type": optimizers[recipe["optimizer"]], "scheduler_and_args": scheduler,
            "batch_cosine": kind == "onecycle", "average_weights": recipe["average_last"],
            "gradient_clipping": clip}


def train(options, recipe, model, loaders, description):
    """(the model with its best weights, the trajectories). Writes the log after each epoch."""
    loss = header.choose_loss(options.loss)

    def on_epoch(log):
        for loader in loaders:
            datasets.check_unchanged(loader.dataset.index)
        with tk_utils.atomic_file(options.files.log, newline="") as file:
            pd.DataFrame(log).to_csv(file, index=False, float_format="%.6g")
        if options.tensorboard:
            log_to_tensorboard(options.files.tensorboard, recipe, loss, log)
        busy = hasattr(os, "getloadavg") and os.getloadavg()[0] > os.cpu_count() + 0.5
        if busy and len(log) == 1 and torch.get_num_threads() > 1 and not options.position:
            print("other programs keep this machine's cores busy: --threads 1 may be faster")

    return header.training_loop(
        model, *loaders, criterion=loss, device=options.device, precision=options.precision,
        on_epoch=on_epoch, resume_path=options.files.resume, experiment=description,
        verbose=not options.position, **loop_arguments(recipe, loaders[0], model, loss))


def log_to_tensorboard(folder, recipe, loss, log):
    """Log the last epoch's losses and rate, the loss figure and, at the end, the recipe."""
    from torch.utils.tensorboard import SummaryWriter
    epoch, row = len(log), log[-1]
    curves = pd.DataFrame(log).rename(columns={"train_loss": "epoch_train_loss",
                                               "tune_loss": "epoch_val_loss"})
    with SummaryWriter(folder, purge_step=epoch) as writer:
        for name in ("train_loss", "tune_loss", "lr", "seconds"):
            writer.add_scalar(name, row[name], epoch)
        writer.add_figure("losses", tk_utils.loss_lr_figure(curves, loss_label=loss.label), epoch)
        if epoch == recipe["epochs"]:
            writer.add_hparams({name: str(value) for name, value in recipe.items()},
                               {"hparam/tune_loss": row["tune_loss"]}, run_name=".")


def patients_of(loader, problem, salt) -> str:
    """A sentence that names (hashed) the patients of the batches whose loss is not finite."""
    index, items = loader.dataset.index, []
    for number in problem.batches:
        loader.sampler.set_epoch(problem.epoch, number)
        items.extend(next(iter(loader.sampler)))
    patients = index.patients[np.unique(index.segment_patients()[loader.dataset.segments(items)])]
    return (f"Its patients: {', '.join(header.hash_patients(patients.tolist(), salt))} "
            "(python checkpoint.py FILE --who HASH names them)")


# --------------------------------------------------------------------------------------- results
def fit_blend_and_intervals(options, model, sets) -> dict:
    """Blend the network with the ridges; returns the calibration of the prediction intervals."""
    if model.anchor and model.outputs == 1:     # a predicted spread holds for the network alone
        header.fit_blend(model, sets["train"], sets["tune"], device=options.device)
        if not options.position:
            print(report.shares_text(header.kept_shares(model.anchor),
                                     sets["tune"].index.n_patients), flush=True)
    calibration = evaluate.make_calibration(model, sets["tune"], options.device)
    if header.kept_shares(model.anchor):
        header.refit_anchor(model, sets["train"], sets["tune"])
    return calibration


def save(options, model, trajectory, description, parts, data):
    """Score the model as `evaluate.py` does; write the checkpoint, the scores and the figures."""
    files = options.files
    tk_utils.write_json(files.run, {"_": "PRIVATE: paths of this machine; do not share",
                                    "data": [os.path.realpath(path) for path in data.files],
                                    "salt_file": os.path.realpath(data.salt_path)})
    header.save_tensors(files.trajectory, {name: torch.from_numpy(values)
                                           for name, values in trajectory.items()})
    header.save_checkpoint(files.checkpoint, model, **description)
    results, segments = evaluate.evaluate_with_arrays(
        files.checkpoint, parts["test"], split="test", train=parts["train"], tune=parts["tune"],
        fitted=data.baselines, device=options.device, network=options.own_network)
    saved = header.save_checkpoint(files.checkpoint, model, **description, metrics=results)
    tk_utils.write_json(files.metrics, results)
    with tk_utils.atomic_file(files.card) as file:
        file.write(report.model_card(results, saved))
    tk_utils.save_figure(tk_utils.loss_lr_figure(
        trajectory, results["note"], header.choose_loss(options.loss).label), files.loss_plot)
    tk_utils.save_figure(report.histogram(results, segments)[0], files.histogram)
    if options.name == DEFAULT_NAME:        # also under the published project's file names
        for path in (files.loss_plot, files.histogram):
            shutil.copyfile(path, path.replace(f"{DEFAULT_NAME}_", ""))
    os.remove(files.resume)     # last: a run that is killed before this continues from it


def show(options):
    """Print the scores of a finished run: a table, or a line if it is one of several runs."""
    files = options.files
    results = header.load_checkpoint(files.checkpoint)["metrics"]
    if options.position:
        print(f"{options.name}{options.position}: RMSE {results['tpp']['rmse']:.2f} mmHg, "
              f"{counted(results['n_patients'], 'test patient')}", flush=True)
    else:
        report.print_results(results)
        print(f"{files.checkpoint}, {files.base}/, {files.loss_plot}, {files.histogram}")


def summarise(options, runs, data):
    """Compare several runs: a table, runs/<name>/summary.json and a histogram of all of them."""
    results, segments = evaluate.compare_runs(
        [run.files.checkpoint for run in runs], device=options.device, fitted=data.baselines,
        network=options.own_network)
    summary, histogram = f"{options.files.base}/summary.json", options.files.histogram
    tk_utils.write_json(summary, results)
    tk_utils.save_figure(report.histogram(results["together"], segments)[0], histogram)
    print(f"wrote {summary} and {histogram}")


if __name__ == "__main__":
    sys.exit(tk_utils.run_script(main, header.CheckpointError, header.DataError,
                                 header.TrainingError))
