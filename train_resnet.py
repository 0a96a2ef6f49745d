"""The main script: data -> trained network -> scores and figures.

    python train_resnet.py                                  # simulates its data, trains, evaluates
    python train_resnet.py --data my.h5 --name mine         # your own data
    python train_resnet.py --data my.h5 --folds 5           # cross-validated over patients
    python train_resnet.py --data my.h5 --seeds 3 --ablate  # repeated; without PPG, without vitals
    python train_resnet.py --model my_net.py:MyNet --loss my_losses.py:my_loss
    torchrun --nproc_per_node=2 train_resnet.py …           # several GPUs or processes

Writes runs/<name>.pth (the checkpoint), runs/<name>/ and figures_resnet/<name>_*.png. After a kill
the same command goes on where the run was saved, and ends in the same weights.
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
# What a recipe leaves out (a new entry changes no finished run); reasons: docs/training.md.
NEUTRAL = {
    "model": "resnet_v3",           # a name in models.MODELS
    "optimizer": "adam",            # 'adam' (weight decay as L2) or 'adamw' (decoupled)
    "weight_decay": 0.0, "l1": 0.0,
    "schedule": ["step", 1000, 1.0],    # or ["onecycle", share of the steps that rise, first rate]
    "clip": None,                   # largest norm of the gradient, for a label of SD 1
    "average_last": 0.0,            # share of all steps, the last ones, whose weights are averaged
    "anchor": False,                # learn what the PPG adds to the ridge regression on the vitals
    "ppg_normalisation": "segment"}     # a name in training_header.PPG_NORMALISATIONS
STEADY = {**NEUTRAL, "model": "resnet_spread", "lr": 2e-3, "schedule": ["onecycle", 0.3, 0.04],
          "optimizer": "adamw", "weight_decay": 0.01, "clip": 1.0, "average_last": 0.2,
          "anchor": True}
RECIPES = {
    # Few segments: small batches make enough steps. Six epochs score like eight on tune patients.
    "small": {**STEADY, "epochs": 6, "batch_size": 16},
    "large": {**STEADY, "epochs": 10, "batch_size": 256},
    # As published, for a cohort of 64 million segments.
    "M1.5": {**NEUTRAL, "epochs": 10, "batch_size": 256, "lr": 1e-3, "schedule": ["step", 3, 0.2],
             "weight_decay": 0.1, "l1": 1e-4}}
SMALL_SEGMENTS = 50_000         # train segments below which batches of 256 make under 2,000 steps
# The default data. Many patients of few segments: segments of a patient differ little.
SIMULATED = {"patients": 1200, "segments": 3, "seed": 0}
SIMULATED_FILE = "data/simulated_{patients}x{segments}_seed{seed}.h5".format(**SIMULATED)
KEYS = ["ppg", "map", "dbp", "hr", "tpp"]
DEFAULT_NAME = "M1.5"


def parse_args(arguments=None):
    parser = tk_utils.ScriptParser(description=__doc__.split("\n\n")[0])
    add = parser.add_argument_group("data").add_argument
    add("--data", nargs="+", metavar="FILE", help="HDF5 files; default: simulated ones")
    add("--keys", nargs="+", default=KEYS, help="ppg, vitals, label; default " + " ".join(KEYS))
    add("--condition", nargs="+", default=["default"], help="quality gate (docs/labels.md)")
    add("--split-seed", type=int, default=0, help="who is train, tune and test; default 0")
    add = parser.add_argument_group("training").add_argument
    add("--recipe", choices=tuple(RECIPES), help="hyper-parameters; default: by size of the data")
    add("--epochs", type=int, help="passes over the train segments, instead of the recipe's")
    add("--batch-size", type=int, help="segments per step and process, instead of the recipe's")
    add("--lr", type=float, help="(largest) learning rate, instead of the recipe's")
    add("--weight-decay", type=float, help="weight decay, instead of the recipe's")
    add("--model", help=f"network: {', '.join(header.MODELS)}, or my_net.py:MyNet")
    add("--loss", default="mse", help=f"{', '.join(header.LOSSES)}, or my_losses.py:name")
    add("--init-from", metavar="CHECKPOINT", help="fine-tune these weights on the data")
    add("--seed", type=int, default=0, help="of initial weights and order; default 0")
    add("--precision", choices=("tf32", "float32", "bf16"), help="of products: bf16 for speed")
    add = parser.add_argument_group("repeating").add_argument
    add("--seeds", type=int, metavar="K", help="K runs, <name>_seed<n>, of seeds from --seed on")
    add("--folds", type=int, metavar="K", help="K runs, <name>_fold<n>, each tests other patients")
    add("--ablate", action="store_true", help="first train <name>_no_ppg and <name>_no_vitals")
    add = parser.add_argument_group("running").add_argument
    add("--name", default=DEFAULT_NAME, help="of the files in runs/; default " + DEFAULT_NAME)
    add("--device", help="cpu, cuda, cuda:1, …; default: CUDA if present")
    add("--workers", type=int, help="loader processes; default: 0 on CPU, 4 on CUDA")
    add("--threads", type=int, help="threads on CPU; default: PyTorch's choice")
    add("--device-cache", choices=("auto", "off"), default="auto", help="data in the GPU's memory")
    add("--fresh", action="store_true", help="start again where a run of this name is there")
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
    options.fold, options.inputs = None, options.keys[:-1]
    return options


def main():
    options = parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)   # as Ctrl-C
    if options.threads:
        torch.set_num_threads(options.threads)
    header.choose_loss(options.loss)        # whether these can be loaded, before the data are read
    header.load_by_name(options.model or NEUTRAL["model"], header.MODELS, "--model")
    files = find_data(options)
    if "RANK" in os.environ:            # torchrun's
        join_processes(options.device)
    data = DataSet(options, files)
    note = tk_utils.simulated_note(data.provenance["origin"], "")
    if note and is_first():
        print(f"*** {note} ***")
    runs, fitted = list_runs(options), {}
    for number, one in enumerate(runs, 1):
        nth = f" ({number} of {len(runs)})" if len(runs) > 1 else ""
        train_and_score(one, data, fitted, nth)
    if (options.seeds or options.folds) and is_first():
        summarise(options, [one for one in runs if one.keys == options.keys], fitted)
    elif options.ablate and is_first():
        show(options, RunFiles(f"runs/{options.name}"), "")


def train_and_score(options, data, fitted, nth):
    """Trains and scores one network. nth: of several runs, ' (2 of 5)', else ''."""
    files = RunFiles(f"runs/{options.name}")
    taken = f"{files.base}: another process is training under this name; use another --name"
    with tk_utils.locked(files.lock, taken) if is_first() else contextlib.nullcontext():
        parts, sets = data.split(options)
        recipe = choose_recipe(options, len(sets["train"]))
        if is_first() and not nth:
            print(", ".join(f"{name}: {counted(len(part), 'segment')} of " + counted(
                part.n_patients, "patient") for name, part in parts.items()))
            print("recipe {recipe}: batch size {batch_size}, epochs {epochs}".format(**recipe),
                  flush=True)
        parent = open_parent(options, data, parts) if options.init_from else None
        model, network = build(options, recipe, sets["train"], parent)
        description = describe(options, recipe, data, parts, network, parent)
        finished = [is_first() and show_if_finished(options, files, description, nth)]
        if header.distributed()[1] > 1:         # the first process tells the others
            torch.distributed.broadcast_object_list(finished)
        if finished[0]:
            return
        loaders = make_loaders(options, recipe, sets)
        try:
            model, trajectory = train(options, recipe, model, loaders, files, description, nth)
            if is_first():
                save(options, model, trajectory, files, description, parts, sets, data, fitted)
                show(options, files, nth)
        except (header.Interrupted, KeyboardInterrupt):
            if not os.path.exists(files.resume):
                raise
            print("interrupted; saved: the same command goes on from here", file=sys.stderr)
            sys.exit(3)
        except header.NonFiniteLoss as problem:
            raise header.TrainingError(
                f"{problem}. {patients_of(loaders[0], problem, data.salt)}") from None


def list_runs(options):
    """The options of each run that --seeds, --folds and --ablate ask for, in order."""
    ppg, *vitals, label = options.keys
    once = [("", {})]                   # (ending of the name, what differs)
    seeds = [(f"_seed{options.seed + n}", {"seed": options.seed + n})
             for n in range(options.seeds or 0)]
    folds = [(f"_fold{n}", {"fold": n}) for n in range(options.folds or 0)]
    # before the run itself, whose table lists them (evaluate.ABLATIONS)
    ablations = [("_no_ppg", {"keys": [*vitals, label]}), ("_no_vitals", {"keys": [ppg, label]})]
    runs = []
    for differences in itertools.product(seeds or once, folds or once,
                                         ablations + once if options.ablate else once):
        run = argparse.Namespace(**vars(options))
        for ending, changes in differences:
            vars(run).update(changes, name=run.name + ending)
        runs.append(run)
    return runs


# --------------------------------------------------------------------------------- setup and data
def find_data(options):
    """The data files: those named (globs expanded), or the default ones, simulated once."""
    if options.data:
        return tk_utils.find_files(options.data)
    if os.environ.get("RANK", "0") == "0":      # torchrun's other processes wait to be joined
        print("no --data: training on SIMULATED patients")
        if not os.path.exists(SIMULATED_FILE):
            simulate.simulate_file(SIMULATED_FILE, workers=os.cpu_count() or 1, **SIMULATED)
    return [SIMULATED_FILE]


def join_processes(device):
    """Joins the other processes of the run (nccl on CUDA, gloo on CPU)."""
    tk_utils.exit_when_parent_dies()            # it would wait for the others forever
    on_cuda = torch.cuda.is_available() and device != "cpu"
    if on_cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    torch.distributed.init_process_group("nccl" if on_cuda else "gloo")


def is_first() -> bool:
    """Whether this process is the only one of the run, or the one that prints and writes."""
    return header.distributed()[0] == 0


class DataSet:
    """The data of a command, indexed once for all of its runs."""

    def __init__(self, options, files):
        self.files, self.salt_path = files, checkpoint.default_salt_path(files[0])
        self.index = header.create_dataset_index(condition=options.condition, path=files)
        # A field that only scoring needs, or only a test patient lacks, is missed before training.
        header.TPP_PPG_dataset(self.index, "segment", [*options.keys, *evaluate.SCORED])
        self.salt = header.read_salt(self.salt_path)
        self.provenance = {
            "origin": datasets.origin_of(files), "beats": datasets.origin_of(files, "beats"),
            "label_method": datasets.origin_of(files, "label_method"),
            "data_fingerprint": checkpoint.fingerprint(self.index, options.keys),
            "n_patients": self.index.n_patients, "n_segments": len(self.index),
            "salt": checkpoint.salt_mark(self.salt), "versions": tk_utils.versions(),
            "git_revision": tk_utils.git_revision()}

    def split(self, options):
        """({part: index}, {'train', 'tune': dataset}) of one run."""
        parts = header.split_index(self.index, options.split_seed, options.fold, options.folds)
        return parts, {name: header.TPP_PPG_dataset(parts[name], "segment", options.keys,
                                                    seed=options.seed)
                       for name in ("train", "tune")}


def choose_recipe(options, n_segments) -> dict:
    """The recipe of a run, with the command line's changes."""
    name = options.recipe or ("small" if n_segments < SMALL_SEGMENTS else "large")
    changes = {key: value for key, value in vars(options).items()
               if key in RECIPES[name] and value is not None}
    return {"recipe": name, **RECIPES[name], **changes}


def open_parent(options, data, parts):
    """The checkpoint of --init-from; none of its patients may be tuned or tested on."""
    parent = header.load_checkpoint(options.init_from)
    if parent["keys"] != options.keys:
        raise header.DataError(f"{options.init_from}: its --keys are {' '.join(parent['keys'])}")
    for name in ("tune", "test"):       # a warning where the parent's salt is not here
        known = checkpoint.patient_parts(parts[name], parent, data.salt_path)
        if np.isin(known, checkpoint.SEEN).any():
            raise header.DataError(f"{options.init_from}: trained or tuned on patients that would "
                                   f"be {name} patients here; fine-tuning needs --data of others")
    return parent


def describe(options, recipe, data, parts, network, parent):
    """What the checkpoint says of the run: options, hashed split, provenance; no paths or names."""
    config = {**recipe, **{name: getattr(options, name) for name in (
        "keys", "split_seed", "fold", "folds", "seed", "precision")},
        "condition": data.index.condition, "model": network["spec"],
        "loss": os.path.basename(options.loss), "processes": header.distributed()[1]}
    split = checkpoint.hash_split(parts, data.salt)
    if parent:
        split["ancestors"] = sorted(checkpoint.seen_by(parent))
    return {**network, "config": config, "split": split, "provenance": {
        **data.provenance, "parent": checkpoint.weights_fingerprint(parent) if parent else None}}


def show_if_finished(options, files, description, nth) -> bool:
    """Whether this very run is finished; then shows its scores. Refuses a run of other options."""
    path = files.checkpoint             # read also with --fresh: raises where it is not ours
    saved = header.load_checkpoint(path) if os.path.exists(path) else None
    if options.fresh:
        with contextlib.suppress(FileNotFoundError):
            os.remove(files.resume)
        return False
    if os.path.exists(files.resume):
        path, saved = files.resume, header.load_tensors(files.resume)["experiment"]
    if saved is None:
        return False
    # an option or entry that is newer than the saved run was at its default
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
    if path == files.resume:
        print(f"going on from {path}", flush=True)
        return False
    show(options, files, nth)
    print("this run is finished; --fresh trains it again, --name OTHER keeps both")
    return True


# ------------------------------------------------------------------------------------- the model
def build(options, recipe, train, parent):
    """(the normalised model, fresh or the parent's; what the checkpoint says of its network)."""
    loss = header.choose_loss(options.loss)
    header.reset_all_seeds(options.seed)
    if parent:
        model = header.load_model(parent, network=options.own_network)
        model.set_anchor((model.anchor or {}).get("trained_on", model.anchor))  # before its blend
        described = {key: parent[key] for key in ("spec", "model_args")}
    else:
        vitals = datasets.vitals_of(options.keys)
        # without an input (--ablate), your own network gets zeros; others are built without it
        inputs = options.inputs if options.own_network else options.keys[:-1]
        network, spec, arguments = checkpoint.new_network(
            recipe["model"], num_discrete=len(inputs) - ("ppg" in inputs),
            num_outputs=loss.outputs, in_channels=int("ppg" in inputs))
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
    """Train and tune loaders."""
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
    kind, *numbers = recipe["schedule"]
    if kind == "step":
        scheduler = [header.StepLR, {"step_size": numbers[0], "gamma": numbers[1]}]
    else:
        scheduler = [header.OneCycleLR, {
            "max_lr": recipe["lr"], "total_steps": recipe["epochs"] * len(loader) + 1,
            "pct_start": numbers[0], "div_factor": 1 / numbers[1], "final_div_factor": 1e4,
            "cycle_momentum": False}]
    optimizers = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}
    clip = recipe["clip"] and recipe["clip"] * float(model.scale) ** loss.power
    return {"total_epochs": recipe["epochs"], "lr": recipe["lr"],
            "weight_decay": recipe["weight_decay"], "l1_reg": recipe["l1"],
            "optimizer_type": optimizers[recipe["optimizer"]], "scheduler_and_args": scheduler,
            "batch_cosine": kind == "onecycle", "average_weights": recipe["average_last"],
            "gradient_clipping": clip}


def train(options, recipe, model, loaders, files, description, nth):
    """(the model with its best weights, trajectories); a row of the log after each epoch."""
    loss = header.choose_loss(options.loss)

    def on_epoch(log):
        for loader in loaders:
            datasets.check_unchanged(loader.dataset.index)
        with tk_utils.atomic_file(files.log, newline="") as file:
            pd.DataFrame(log).to_csv(file, index=False, float_format="%.6g")
        if options.tensorboard:
            log_to_tensorboard(files, recipe, loss, log)
        busy = hasattr(os, "getloadavg") and os.getloadavg()[0] > os.cpu_count() + 0.5
        if busy and len(log) == 1 and torch.get_num_threads() > 1 and not nth:
            print("other programs keep this machine's cores busy: --threads 1 may be faster")

    model, trajectory = header.training_loop(
        model, *loaders, criterion=loss, device=options.device, precision=options.precision,
        on_epoch=on_epoch, resume_path=files.resume, experiment=description, verbose=not nth,
        **loop_arguments(recipe, loaders[0], model, loss))
    if model.anchor and model.outputs == 1 and is_first():  # an own spread is of what was trained
        header.fit_blend(model, *(loader.dataset for loader in loaders), device=options.device)
        if not nth:
            n_patients = loaders[1].dataset.index.n_patients
            print(report.shares_text(header.kept_shares(model.anchor), n_patients), flush=True)
    return model, trajectory


def log_to_tensorboard(files, recipe, loss, log):
    """Losses and rate of the last epoch, their figure so far and, at the end, the recipe."""
    from torch.utils.tensorboard import SummaryWriter
    epoch, row = len(log), log[-1]
    curves = pd.DataFrame(log).rename(columns={"train_loss": "epoch_train_loss",
                                               "tune_loss": "epoch_val_loss"})
    with SummaryWriter(files.tensorboard, purge_step=epoch) as writer:
        for name in ("train_loss", "tune_loss", "lr", "seconds"):
            writer.add_scalar(name, row[name], epoch)
        writer.add_figure("losses", tk_utils.loss_lr_figure(curves, loss_label=loss.label), epoch)
        if epoch == recipe["epochs"]:
            writer.add_hparams({name: str(value) for name, value in recipe.items()},
                               {"hparam/tune_loss": row["tune_loss"]}, run_name=".")


def patients_of(loader, problem, salt) -> str:
    """The hashed patients of the batches of a loss that is not finite, in a sentence."""
    index, items = loader.dataset.index, []
    for number in problem.batches:
        loader.sampler.set_epoch(problem.epoch, number)
        items.extend(next(iter(loader.sampler)))
    patients = index.patients[np.unique(index.segment_patients()[loader.dataset.segments(items)])]
    return (f"Its patients: {', '.join(header.hash_patients(patients.tolist(), salt))} "
            "(python checkpoint.py FILE --who HASH names them)")


# --------------------------------------------------------------------------------------- results
def save(options, model, trajectory, files, description, parts, sets, data, fitted):
    """Writes the checkpoint and the figures; the scores, as `evaluate.py` computes them."""
    tk_utils.write_json(files.run, {"_": "PRIVATE: paths of this machine; do not share",
                                    "data": [os.path.realpath(path) for path in data.files],
                                    "salt_file": os.path.realpath(data.salt_path)})
    header.save_tensors(files.trajectory, {name: torch.from_numpy(values)
                                           for name, values in trajectory.items()})
    calibration = evaluate.make_calibration(model, sets["tune"], options.device)
    if header.kept_shares(model.anchor):
        header.refit_anchor(model, sets["train"], sets["tune"])
    header.save_checkpoint(files.checkpoint, model, **description, calibration=calibration)
    results, arrays = evaluate.evaluate_with_arrays(
        files.checkpoint, parts["test"], split="test", train=parts["train"], tune=parts["tune"],
        fitted=fitted, device=options.device, network=options.own_network)
    saved = header.save_checkpoint(files.checkpoint, model, **description,
                                   calibration=calibration, metrics=results)
    tk_utils.write_json(files.metrics, results)
    with tk_utils.atomic_file(files.card) as file:
        file.write(report.model_card(results, saved))
    tk_utils.save_figure(tk_utils.loss_lr_figure(
        trajectory, results["note"], header.choose_loss(options.loss).label), files.loss_plot)
    tk_utils.save_figure(report.histogram(results, arrays)[0], files.histogram)
    if options.name == DEFAULT_NAME:        # the names that the published project gives them
        for path in (files.loss_plot, files.histogram):
            shutil.copyfile(path, path.replace(f"{DEFAULT_NAME}_", ""))
    os.remove(files.resume)     # last: until here the same command would go on


def show(options, files, nth):
    """Prints the scores of a finished run: in a line if it is one of several, else as a table."""
    results = header.load_checkpoint(files.checkpoint)["metrics"]
    if nth:
        print(f"{options.name}{nth}: RMSE {results['tpp']['rmse']:.2f} mmHg, "
              f"{counted(results['n_patients'], 'test patient')}", flush=True)
    else:
        report.print_results(results)
        print(f"{files.checkpoint}, {files.base}/, {files.loss_plot}, {files.histogram}")


def summarise(options, runs, fitted):
    """The table of several runs, runs/<name>/summary.json, and the histogram of all together."""
    files = RunFiles(f"runs/{options.name}")
    results, arrays = evaluate.compare_runs(
        [f"runs/{one.name}.pth" for one in runs], device=options.device, fitted=fitted,
        network=options.own_network)
    tk_utils.write_json(f"{files.base}/summary.json", results)
    tk_utils.save_figure(report.histogram(results["together"], arrays)[0], files.histogram)
    print(f"wrote {files.base}/summary.json and {files.histogram}")


if __name__ == "__main__":
    sys.exit(tk_utils.run_script(main, header.CheckpointError, header.DataError,
                                 header.TrainingError))
