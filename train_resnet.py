"""The main script: data -> trained network -> scores and figures.

    python train_resnet.py                                  # simulates its data, trains, evaluates
    python train_resnet.py --data my.h5 --name mine         # your own data
    python train_resnet.py --data my.h5 --folds 5           # cross-validated over patients
    python train_resnet.py --data my.h5 --seeds 3 --ablate  # repeated; without PPG, without vitals
    python train_resnet.py --model my_net.py:MyNet --loss my_losses.py:my_loss
    torchrun --nproc_per_node=2 train_resnet.py …           # several GPUs or processes

Writes runs/<name>.pth (the checkpoint); log, trajectory, metrics and model card in runs/<name>/,
with run.json (private: where the data are); figures_resnet/<name>_loss_lr_plot.png and
figures_resnet/<name>_histogram_plot.png.

Interrupted or killed, the same command goes on where the run was saved and ends in the same
weights. Exit codes: 0 done, 2 an error in one line, 3 interrupted and saved.
"""
import argparse
import csv
import importlib.util
import os
import shutil
import signal
import sys
import time
from contextlib import nullcontext

import numpy as np
import torch

import evaluate
import metrics
import report
import simulate
import tk_utils
import training_header as header
from checkpoint import (
    CheckpointError,
    default_salt_path,
    hash_split,
    load_tensors,
    new_network,
    salt_mark,
    seen_by,
    weights_fingerprint,
)
from datasets import (
    LABELS,
    DataError,
    check_unchanged,
    find_files,
    fingerprint,
    origin_of,
    vitals_of,
)
from tk_utils import counted, run_files, simulated_note
from training_header import TrainingError

# ------------------------------------------------------------------------- hyper-parameters

# What a recipe leaves out: neutral, so that a new entry changes no finished run.
NEUTRAL = {
    "model": "resnet_v3",       # a name in models.MODELS
    "optimizer": "adam",        # 'adam' (weight decay as L2) or 'adamw' (decoupled)
    "weight_decay": 0.0, "l1": 0.0,
    # [name, numbers]: 'step' (epochs between reductions, factor), 'cosine' (rate at the end, as a
    # share), 'onecycle' (share of the steps that rise, first rate as a share); these two by batch
    "schedule": ["step", 1000, 1.0],
    "warmup_epochs": 0,         # the rate rises linearly from a tenth
    "clip": None,               # largest norm of the gradient, for a label of SD 1
    "average_last": 0.0,        # share of all steps, the last ones, whose weights are averaged
    "early_stopping": -1,       # epochs without improvement; -1: never
    "anchor": False,            # learn what the PPG adds to the ridge regression on the vitals
    "dropout": 0.0,             # of the pooled features
}
# What each entry is for, with its figures: docs/training.md.
STEADY = {**NEUTRAL, "model": "resnet_spread", "lr": 2e-3, "schedule": ["onecycle", 0.3, 0.04],
          "optimizer": "adamw", "weight_decay": 0.01, "clip": 1.0, "average_last": 0.2,
          "anchor": True}
RECIPES = {
    # Few segments: small batches make enough steps. Six epochs score like eight on tune patients.
    "small": {**STEADY, "epochs": 6, "batch_size": 16},
    "large": {**STEADY, "epochs": 10, "batch_size": 256},
    # As published, for a cohort of 64 million segments.
    "M1.5": {**NEUTRAL, "epochs": 10, "batch_size": 256, "lr": 1e-3, "schedule": ["step", 3, 0.2],
             "weight_decay": 0.1, "l1": 1e-4},
}
SMALL_SEGMENTS = 50_000         # train segments below which batches of 256 make under 2,000 steps
OPTIMIZERS = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}
RECIPE_OPTIONS = ("epochs", "batch_size", "lr", "weight_decay", "model")    # also options

# The default data. Many patients of few segments: segments of a patient differ little.
SIMULATED = {"patients": 1200, "segments": 3, "seed": 0}
SIMULATED_FILE = "data/simulated_{patients}x{segments}_seed{seed}.h5".format(**SIMULATED)
KEYS = ["ppg", "map", "dbp", "hr", "tpp"]
DEFAULT_NAME = "M1.5"

INTERRUPTED = 3         # exit code: stopped by SIGINT or SIGTERM, state saved


def parse_args(arguments=None):
    parser = tk_utils.ScriptParser(
        description=__doc__.split("\n\n")[0],
        epilog="exit codes: 0 done; 2 an error, in one line; 3 interrupted and saved")
    add = parser.add_argument_group("data").add_argument
    add("--data", nargs="+", metavar="FILE",
        help="HDF5 files of the layout, or globs; default: simulate "
             f"{SIMULATED['patients']:,} patients into {SIMULATED_FILE} once")
    add("--keys", nargs="+", default=KEYS, metavar="FIELD",
        help="ppg (may be absent), vitals, label (tpp or p_crit); default " + " ".join(KEYS))
    add("--condition", nargs="+", default=["default"], metavar="GATE",
        help='quality gate: a name, or comparisons such as "r2 > 0.5" (docs/labels.md)')
    add("--split-seed", type=int, default=0, metavar="N",
        help="which patients are train, tune, test; default 0")
    add = parser.add_argument_group("training").add_argument
    add("--recipe", choices=tuple(RECIPES),
        help=f"hyper-parameters; default: small, large from {SMALL_SEGMENTS:,} train segments on; "
             "M1.5 is the published one")
    add("--epochs", type=int, metavar="N", help="passes over the train segments, not the recipe's")
    add("--batch-size", type=int, metavar="N",
        help="segments in one step of each process, not the recipe's")
    add("--lr", type=float, metavar="RATE", help="(largest) learning rate, not the recipe's")
    add("--weight-decay", type=float, metavar="X", help="weight decay, not the recipe's")
    add("--model", metavar="NAME",
        help=f"network: {', '.join(header.MODELS)}, or my_net.py:MyNet; default: the recipe's")
    add("--loss", default="mse", metavar="NAME",
        help=f"{', '.join(header.LOSSES)} (nll: the network also predicts its own spread), or "
             "my_losses.py:name; default mse")
    add("--init-from", metavar="CHECKPOINT",
        help="fine-tune these weights, with their normalisation, on the data")
    add("--seed", type=int, default=0, metavar="N", help="of initial weights and order; default 0")
    add("--precision", choices=("tf32", "float32", "bf16"),
        help="of products: bf16 is fastest on CUDA; default tf32 on CUDA, float32 on CPU")
    add = parser.add_argument_group("repeating").add_argument
    add("--seeds", type=int, metavar="K", help="K runs, <name>_seed<n>, of seeds from --seed on")
    add("--folds", type=int, metavar="K",
        help="cross-validate over patients: K runs, <name>_fold<n>; each patient is tested once")
    add("--ablate", action="store_true",
        help="first train <name>_no_ppg and <name>_no_vitals, to compare with")
    add = parser.add_argument_group("running").add_argument
    add("--name", default=DEFAULT_NAME, help="of the files in runs/; default " + DEFAULT_NAME)
    add("--device", help="cpu, cuda, cuda:1, …; default: CUDA if present")
    add("--workers", type=int, metavar="N", help="loader processes; default: 0 on CPU, 4 on CUDA")
    add("--threads", type=int, metavar="N", help="threads on CPU; default: PyTorch's choice")
    add("--device-cache", choices=("auto", "off"), default="auto",
        help="keep the data in the GPU's memory if they fit in half of it; default auto")
    add("--fresh", action="store_true",
        help="start again where a run of this name is unfinished or finished")
    add("--tensorboard", action="store_true",
        help="also log losses, rate, tune scores, speed and figures to runs/<name>/tensorboard")
    options = parser.parse_args(arguments)
    options.fold = None
    options.condition = (options.condition[0] if len(options.condition) == 1
                         else options.condition)
    check_options(options, parser.error)
    return options


def check_options(options, refuse):
    """Calls `refuse` with one line on options that make no sense."""
    for name, least in (("epochs", 1), ("batch_size", 1), ("weight_decay", 0), ("seed", 0),
                        ("workers", 0), ("threads", 1), ("seeds", 2), ("folds", 3)):
        value = getattr(options, name)
        if value is not None and not value >= least:
            refuse(f"--{name.replace('_', '-')} {value}: expected at least {least}")
    if options.lr is not None and not options.lr > 0:
        refuse(f"--lr {options.lr}: expected more than 0")
    vitals, label = vitals_of(options.keys), options.keys[-1]
    if len(options.keys) < 2 or label not in LABELS or "ppg" in options.keys[1:]:
        refuse(f"--keys {' '.join(options.keys)}: expected ppg, then vitals, then "
               f"{' or '.join(LABELS)}")
    if options.ablate and (options.keys[0] != "ppg" or not vitals):
        refuse("--ablate: expected --keys with ppg and vitals, to leave out either")
    if options.ablate and options.init_from:
        refuse("--ablate does not go with --init-from: its runs start from fresh weights")
    separators = [s for s in (os.sep, os.altsep, "/", "\\") if s]
    if (options.name in ("", ".", "..") or any(s in options.name for s in separators)
            or not options.name.isprintable()):
        refuse(f"--name {options.name!r}: expected a printable name, not a path")
    if options.tensorboard and importlib.util.find_spec("tensorboard") is None:
        refuse("--tensorboard needs a package: pip install tensorboard")


# ------------------------------------------------------------------------- outline

def main() -> int:
    options = parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)   # as Ctrl-C
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    rank = join_processes(options.device)
    data = find_data(options, rank)
    data_set = DataSet(options, data, rank)
    runs, fitted = list_runs(options), evaluate.Fitted()
    for number, one in enumerate(runs, 1):
        place = f" ({number} of {len(runs)})" if len(runs) > 1 else ""
        code = train_and_score(one, data_set, fitted, rank, place)
        if code:
            return code
    if (options.seeds or options.folds) and rank == 0:
        summarise(options, [one for one in runs if one.keys == options.keys], fitted)
    return 0


def list_runs(options):
    """The options of each run that --seeds, --folds and --ablate ask for, in order."""
    runs = [options]
    if options.seeds:
        seeds = range(options.seed, options.seed + options.seeds)
        runs = [with_options(one, f"_seed{n}", seed=n) for one in runs for n in seeds]
    if options.folds:
        runs = [with_options(one, f"_fold{n}", fold=n) for one in runs
                for n in range(options.folds)]
    if options.ablate:      # before the run itself, whose table lists them (evaluate.ABLATIONS)
        ppg, *vitals, label = options.keys
        runs = [with_options(one, suffix, keys=keys) for one in runs for suffix, keys in (
            ("_no_ppg", [*vitals, label]), ("_no_vitals", [ppg, label]), ("", options.keys))]
    return runs


def own_network(options):
    """The --model if it is your own, which loading its checkpoint asks for; else None."""
    return None if options.model in (None, *header.MODELS) else options.model


def with_options(options, suffix, **values):
    return argparse.Namespace(**dict(vars(options), name=options.name + suffix, **values))


def train_and_score(options, data_set, fitted, rank, place="") -> int:
    """Trains and scores one network; the exit code. place: of several runs, ' (2 of 5)'; then it
    prints one line instead of tables."""
    started, files = time.time(), run_files(options.name)
    taken = f"{files.base}: another process is training under this name; use another --name"
    with tk_utils.locked(files.lock, taken) if rank == 0 else nullcontext():
        parts, datasets = data_set.split(options)
        recipe = choose_recipe(options, len(datasets["train"]))
        if rank == 0 and (not place or place.startswith(" (1 of")):
            print_plan(options, recipe, parts)
        parent = open_parent(options, data_set, parts, rank)
        model, network = build(options, recipe, datasets["train"], parent)
        description = describe(options, recipe, data_set, parts, network, parent, rank)
        if finished_before(options, description, rank, place):
            return 0
        loaders = make_loaders(options, recipe, datasets)
        try:
            model, trajectory = train(options, recipe, model, loaders, description, rank, place)
            if rank == 0:
                description["provenance"]["wall_seconds"] = round(time.time() - started, 1)
                save_and_report(options, model, trajectory, description, parts, datasets,
                                data_set, fitted, place)
        except header.Interrupted as interruption:
            if rank == 0:
                print(interruption, file=sys.stderr)
            return INTERRUPTED
        except KeyboardInterrupt:
            if not os.path.exists(files.resume):
                raise
            print("interrupted; saved: the same command goes on from here", file=sys.stderr)
            return INTERRUPTED
        except header.NonFiniteLoss as problem:
            raise TrainingError(
                f"{problem}. {describe_batches(loaders[0], problem, data_set.salt)}") from None
    return 0


def summarise(options, runs, fitted):
    """The table of several runs, runs/<name>/summary.json, and the histogram of all together."""
    results, arrays = evaluate.compare_runs([run_files(one.name).checkpoint for one in runs],
                                            device=options.device, fitted=fitted,
                                            network=own_network(options))
    files = run_files(options.name)
    path = os.path.join(files.base, "summary.json")
    tk_utils.write_json(path, results)
    report.draw_histogram(results["together"], arrays, files.histogram)
    print(f"wrote {path} and {files.histogram}")


# ------------------------------------------------------------------------- processes and data

def join_processes(device) -> int:
    """This process's rank; under torchrun joins the others (nccl on CUDA, gloo on CPU)."""
    if "RANK" not in os.environ:
        return 0
    if "TORCHELASTIC_RUN_ID" in os.environ:
        tk_utils.exit_when_parent_dies()        # it would wait for the others forever
    on_cuda = torch.cuda.is_available() and device != "cpu"
    if on_cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    torch.distributed.init_process_group("nccl" if on_cuda else "gloo")
    return torch.distributed.get_rank()


def from_rank_0(value):
    """Rank 0's value, in all processes; they wait for it."""
    values = [value]
    if header.distributed()[1] > 1:
        torch.distributed.broadcast_object_list(values)
    return values[0]


def find_data(options, rank):
    """The data files: those named (globs expanded), or the default ones, simulated once."""
    if options.data:
        return find_files(options.data)
    if rank == 0:
        print("no --data: training on SIMULATED patients")
        if not os.path.exists(SIMULATED_FILE):
            simulate.simulate_file(SIMULATED_FILE, workers=os.cpu_count() or 1, **SIMULATED)
    from_rank_0(None)
    return [SIMULATED_FILE]


class DataSet:
    """The data of a command, indexed once for all of its runs."""

    def __init__(self, options, files, rank):
        self.files, self.rank, self.origin = files, rank, origin_of(files)
        self.index = header.create_dataset_index(condition=options.condition, path=files)
        # A field that only scoring needs, or only a test patient lacks, is missed before training.
        header.TPP_PPG_dataset(self.index, "segment", [*options.keys, *evaluate.SCORED])
        self.salt_path, self.salt = default_salt_path(files[0]), None
        if rank == 0:
            self.salt = header.read_salt(self.salt_path)
            self.fingerprint = fingerprint(self.index, options.keys)
            if simulated_note(self.origin, self.origin):
                print(f"*** {simulated_note(self.origin, self.origin)} ***")
            if self.index.n_patients < 100 and not options.folds:
                print("fewer than 100 patients: who is in which part changes when patients are "
                      "added; --folds 5 tests each patient once")

    def split(self, options):
        """({part: index}, {'train', 'tune': dataset}) of one run."""
        parts = header.split_index(self.index, options.split_seed, fold=options.fold,
                                   folds=options.folds)
        return parts, {name: header.TPP_PPG_dataset(parts[name], "segment", options.keys,
                                                    seed=options.seed)
                       for name in ("train", "tune")}


def choose_recipe(options, n_segments) -> dict:
    """The recipe of a run, with the command line's changes."""
    name = options.recipe or ("small" if n_segments < SMALL_SEGMENTS else "large")
    changes = {key: getattr(options, key) for key in RECIPE_OPTIONS
               if getattr(options, key) is not None}
    return {"recipe": name, **RECIPES[name], **changes}


def print_plan(options, recipe, parts):
    """One line on who is in which part, one on the recipe and why it was chosen."""
    print(", ".join(f"{name}: {counted(len(part), 'segment')} of "
                    f"{counted(part.n_patients, 'patient')}" for name, part in parts.items()))
    n_segments, batch = len(parts["train"]), recipe["batch_size"] * header.distributed()[1]
    why = "" if options.recipe else f" (for {counted(n_segments, 'train segment')})"
    said = "".join(f", {key.replace('_', ' ')} {getattr(options, key)}" for key in RECIPE_OPTIONS
                   if getattr(options, key) is not None)
    steps = recipe["epochs"] * max(1, n_segments // batch)
    print(f"recipe {recipe['recipe']}{why}{said}: {counted(steps, 'step')} of "
          f"{counted(batch, 'segment')}", flush=True)


def open_parent(options, data_set, parts, rank):
    """The checkpoint of --init-from, or None; none of its patients may be tuned or tested on."""
    if options.init_from is None:
        return None
    parent = header.load_checkpoint(options.init_from)
    if parent["keys"] != options.keys:
        raise DataError(f"{options.init_from}: trained on {' '.join(parent['keys'])}, not on "
                        f"{' '.join(options.keys)} (--keys)")
    if rank > 0:
        return parent
    if parent["provenance"].get("salt") != salt_mark(data_set.salt):
        print(f"WARNING: {options.init_from}: made with another salt than {data_set.salt_path}, so "
              "whether tune and test patients were trained on COULD NOT BE CHECKED",
              file=sys.stderr)
        return parent
    held_out = sum((hash_split({name: parts[name]}, data_set.salt)[name]
                    for name in ("tune", "test")), [])
    n_seen = len(seen_by(parent).intersection(held_out))
    if n_seen:
        raise DataError(f"{options.init_from}: {n_seen} of the {len(held_out)} tune and test "
                        "patients were trained or tuned on by it; the --split-seed of that run "
                        "keeps them apart")
    return parent


# ------------------------------------------------------------------------- the model

def build(options, recipe, train, parent):
    """(the normalised model, fresh or the parent's; (spec, arguments) of its network)."""
    loss = header.choose_loss(options.loss)
    header.reset_all_seeds(options.seed)
    if parent:
        model = header.load_model(parent, network=own_network(options))
        if model.outputs != loss.outputs:
            raise DataError(f"{options.init_from}: " + (
                "predicts its own spread; pass --loss nll to fine-tune it" if model.outputs == 2
                else f"predicts no spread, which --loss {options.loss} needs"))
        return model, (parent["spec"], parent["model_args"])
    vitals = vitals_of(options.keys)
    wanted = {"num_discrete": len(vitals), "in_channels": int(options.keys[0] == "ppg"),
              "num_outputs": loss.outputs, "dropout": recipe["dropout"]}
    network, *described = new_network(recipe["model"], **wanted)
    anchor = header.fit_anchor(train, options.keys) if recipe["anchor"] and vitals else None
    model = header.NormalisedModel(network, options.keys,
                                   header.fit_normaliser(train, [*vitals, options.keys[-1]]),
                                   anchor=anchor)
    if model.outputs != loss.outputs:
        raise TrainingError(f"--model {recipe['model']} has {counted(model.outputs, 'output')}, "
                            f"--loss {options.loss} needs {loss.outputs}")
    return model, described


def make_loaders(options, recipe, datasets):
    """Train and tune loaders."""
    rank, world = header.distributed()
    device = header.choose_device(options.device)
    on_cuda = device.type == "cuda"
    workers = (4 if on_cuda else 0) if options.workers is None else options.workers
    loaders = [header.make_loader(
        datasets[name], recipe["batch_size"] * world, shuffle=name == "train", seed=options.seed,
        workers=workers, pin_memory=on_cuda, rank=rank, world=world,
        device_cache=device if on_cuda and options.device_cache == "auto" else None)
        for name in ("train", "tune")]
    if rank == 0 and on_cuda and getattr(loaders[0], "device", None) is not None:
        print("the data are kept in the GPU's memory (--device-cache off reads them each time)")
    return loaders


def loop_arguments(recipe, loader, model) -> dict:
    """The arguments of `training_loop` that a recipe stands for."""
    clip = recipe["clip"]
    if clip is not None:        # the loss is in mmHg²
        clip *= float(model.scale) ** 2
    kind, *numbers = recipe["schedule"]
    n_steps = recipe["epochs"] * len(loader)
    after_warmup = max(1, n_steps - recipe["warmup_epochs"] * len(loader))
    if kind == "step":
        scheduler = [header.StepLR, {"step_size": numbers[0], "gamma": numbers[1]}]
    elif kind == "cosine":
        scheduler = [header.CosineAnnealingLR,
                     {"T_max": after_warmup, "eta_min": recipe["lr"] * (numbers or [0])[0]}]
    else:
        rising, first = numbers
        scheduler = [header.OneCycleLR, {
            "max_lr": recipe["lr"], "total_steps": n_steps + 1, "pct_start": rising,
            "div_factor": 1 / first, "final_div_factor": 1e4, "cycle_momentum": False}]
    return {"total_epochs": recipe["epochs"], "lr": recipe["lr"],
            "weight_decay": recipe["weight_decay"], "l1_reg": recipe["l1"],
            "optimizer_type": OPTIMIZERS[recipe["optimizer"]], "scheduler_and_args": scheduler,
            "batch_cosine": kind != "step", "warmup_epochs": recipe["warmup_epochs"],
            "gradient_clipping": clip, "average_weights": recipe["average_last"],
            "early_stopping": recipe["early_stopping"]}


def train(options, recipe, model, loaders, description, rank, place):
    """(the model with its best weights, trajectories); a row of the log after each epoch."""
    files, loss = run_files(options.name), header.choose_loss(options.loss)
    board = TensorBoard(options, recipe, model, loaders, description) \
        if options.tensorboard and rank == 0 else None

    def on_epoch(log):
        for loader in loaders:
            check_unchanged(loader.dataset.index)
        with tk_utils.atomic_file(files.log, newline="") as file:
            writer = csv.DictWriter(file, log[0], lineterminator="\n")
            writer.writeheader()
            writer.writerows({k: f"{v:.6g}" for k, v in row.items()} for row in log)
        if board:
            board.add(log)
        if not place:
            print(epoch_line(log[-1], recipe["epochs"], loss), flush=True)

    model, trajectory = header.training_loop(
        model, *loaders, criterion=loss, device=options.device, precision=options.precision,
        on_epoch=on_epoch, resume_path=files.resume, experiment=description,
        **loop_arguments(recipe, loaders[0], model))
    if model.anchor and model.outputs == 1 and rank == 0:
        share = header.fit_blend(model, loaders[1].dataset)
        if not place:
            print(f"{share:.2f} of what the network adds to the ridge on the vitals is kept "
                  "(fitted on the tune patients)")
    return model, trajectory


def epoch_line(row, epochs, loss) -> str:
    left = row["seconds"] / row["epoch"] * (epochs - row["epoch"])
    train, tune, name, unit = row["train_loss"], row["tune_loss"], "loss", loss.unit
    if loss is header.LOSSES["mse"]:
        train, tune, name, unit = train ** 0.5, tune ** 0.5, "RMSE", "mmHg"
    return (f"epoch {row['epoch']}/{epochs}: {name} train {train:.4g}, tune {tune:.4g}"
            f"{unit and ' ' + unit} (best: epoch {row['best_epoch']}), "
            f"{row['seconds'] / 60:.1f} min, {left / 60:.1f} min left")


class TensorBoard:
    """Losses, rate, tune scores, speed and figures of each epoch, and the hyper-parameters."""

    def __init__(self, options, recipe, model, loaders, description):
        self.options, self.recipe, self.model, self.loaders = options, recipe, model, loaders
        self.origin, self.writer = description["provenance"]["origin"], None

    def add(self, log):
        from torch.utils.tensorboard import SummaryWriter
        row, epoch, options = log[-1], log[-1]["epoch"], self.options
        if self.writer is None:     # a resumed run replaces what came after its saved state
            self.writer = SummaryWriter(run_files(options.name).tensorboard, purge_step=epoch)
        tune, label = self.loaders[1].dataset, options.keys[-1]
        truth, p_crit = (tune.column(key).numpy() for key in (label, "p_crit"))
        training = self.model.training
        predicted = header.predict_dataset(self.model, tune, device=options.device)
        self.model.train(training)
        found = dict(metrics.scores(truth, predicted), n_patients=tune.index.n_patients,
                     p_crit_r2=metrics.scores(p_crit, p_crit + predicted - truth)["r2"])
        seconds = row["seconds"] - (log[-2]["seconds"] if epoch > 1 else 0)
        values = {"loss/train": row["train_loss"], "loss/tune": row["tune_loss"],
                  "learning rate": row["lr"],
                  "train segments per second": len(self.loaders[0].dataset) / seconds,
                  **{f"tune/{key}": found[key]
                     for key in ("rmse", "mae", "mead", "bias", "sd", "r2", "p_crit_r2")}}
        for name, value in values.items():
            self.writer.add_scalar(name, value, epoch)
        note = simulated_note(self.origin, self.origin)
        self.writer.add_figure("tune", tk_utils.histogram_figure(truth, predicted, found, note,
                                                                 label.upper()), epoch)
        if epoch == self.recipe["epochs"]:
            self.writer.add_hparams(
                {key: value if isinstance(value, (int, float, str, bool)) else str(value)
                 for key, value in self.recipe.items()},
                {"hparam/tune_rmse": found["rmse"]}, run_name=".")
        self.writer.flush()


# ------------------------------------------------------------------------- what a run is

def describe(options, recipe, data_set, parts, network, parent, rank):
    """What the checkpoint says of the run: options, hashed split, provenance; no paths or names."""
    if rank > 0:
        return None
    spec, model_args = network
    index, ancestors = data_set.index, {}
    if parent:
        ancestors = {"ancestors": sorted(seen_by(parent))}
    own_loss = options.loss not in header.LOSSES
    config = {**recipe, "keys": options.keys, "condition": index.condition,
              "split_seed": options.split_seed, "fold": options.fold, "folds": options.folds,
              "seed": options.seed, "model": spec, "precision": options.precision,
              "loss": os.path.basename(options.loss) if own_loss else options.loss,
              "processes": header.distributed()[1]}
    return {
        "spec": spec, "model_args": model_args, "config": config,
        "split": {**ancestors, **hash_split(parts, data_set.salt)},
        "provenance": {
            "origin": data_set.origin, "label_method": origin_of(index.paths, "label_method"),
            "beats": origin_of(index.paths, "beats"), "data_fingerprint": data_set.fingerprint,
            "parent": weights_fingerprint(parent) if parent else None,
            "salt": salt_mark(data_set.salt), "n_patients": index.n_patients,
            "n_segments": len(index), "versions": tk_utils.versions(),
            "git_revision": tk_utils.git_revision(),
            "seeds": {"seed": options.seed, "split_seed": options.split_seed}}}


# Of a finished run that was written before an option existed.
DEFAULTS = {**NEUTRAL, "fold": None, "folds": None, "model": "resnet_v3", "loss": "mse",
            "precision": None, "processes": 1, "recipe": "M1.5"}


def finished_before(options, description, rank, place) -> bool:
    """Whether this very run is finished (then prints its scores). All processes get one answer.

    Raises DataError where the name belongs to a run of other options, finished or not.
    """
    files, done = run_files(options.name), False
    if rank == 0:
        saved = header.load_checkpoint(files.checkpoint) if os.path.exists(files.checkpoint) \
            else None                       # raises where the file is not ours
        if options.fresh:
            if os.path.exists(files.resume):
                os.remove(files.resume)
        elif os.path.exists(files.resume):
            state = load_tensors(files.resume)
            refuse_other_options(files.resume, state.get("experiment"), description)
            print(f"going on from {files.resume}, epoch {state['run']['epoch'] + 1}, batch "
                  f"{state['run']['batches'] + 1}", flush=True)
        elif saved:
            refuse_other_options(files.checkpoint, saved, description)
            if not saved["metrics"]:
                raise DataError(f"{files.checkpoint}: finished, but without scores (python "
                                f"evaluate.py {files.checkpoint})")
            if place:
                print(run_line(options.name + place, saved["metrics"]) + ", finished before")
            else:
                report.print_results(saved["metrics"])
                print(f"{files.checkpoint}: this run is finished; --fresh trains it again, --name "
                      "OTHER keeps both")
            done = True
    return from_rank_0(done)


def refuse_other_options(path, saved, now):
    """Raises DataError unless a saved run had the options and data of this one."""
    saved = {"config": {}, "provenance": {}, **(saved or {})}
    had = {**DEFAULTS, **saved["config"]}
    other = [f"{name.replace('_', '-')} {had.get(name)} (now {value})"
             for name, value in now["config"].items() if had.get(name) != value]
    other += [words for what, words in (("data_fingerprint", "other data"),
                                        ("parent", "--init-from"))
              if saved["provenance"].get(what) != now["provenance"].get(what)]
    if other:
        raise DataError(f"{path}: a run with other options: {', '.join(other)}. --fresh replaces "
                        "it, --name OTHER keeps both")


def describe_batches(loader, problem, salt) -> str:
    """The patients (hashed) and the ranges of the fields of a group of batches, in a sentence."""
    dataset, order, items = loader.dataset, loader.sampler, []
    for number in problem.batches:
        order.set_epoch(problem.epoch, number)
        items.append(next(iter(order)))
    segments = dataset.segments(np.concatenate(items))
    patients = dataset.index.patients[np.unique(dataset.index.segment_patients()[segments])]
    hashes = header.hash_patients(patients.tolist(), salt)
    ranges = []
    for key, values in zip(dataset.keys_to_load, dataset.read(segments)):
        bad = int((~values.isfinite()).sum())
        ranges.append(f"{key} {float(values.min()):.4g} to {float(values.max()):.4g}"
                      + (f" ({bad} not finite)" if bad else ""))
    return (f"Its {counted(len(segments), 'segment')}: {', '.join(ranges)}; of the patients "
            f"{', '.join(hashes[:20])}{' …' if len(hashes) > 20 else ''} "
            "(python datasets.py FILE --who HASH names them)")


# ------------------------------------------------------------------------- results

def save_and_report(options, model, trajectory, description, parts, datasets, data_set, fitted,
                    place):
    """Writes the checkpoint, scores it on the test patients as `evaluate.py` does, and draws."""
    files, loss = run_files(options.name), header.choose_loss(options.loss)
    tk_utils.write_json(files.run, {
        "_": "PRIVATE: paths of this machine; do not share",
        "data": [os.path.realpath(path) for path in data_set.files],
        "salt_file": os.path.realpath(data_set.salt_path)})
    header.save_tensors(files.trajectory, {name: torch.from_numpy(values)
                                           for name, values in trajectory.items()})
    calibration = evaluate.make_calibration(model, datasets["train"], datasets["tune"],
                                            device=options.device)
    header.save_checkpoint(files.checkpoint, model, **description, calibration=calibration)
    results, arrays = evaluate.evaluate_with_arrays(
        files.checkpoint, parts["test"], split="test", train=parts["train"], tune=parts["tune"],
        fitted=fitted, device=options.device, network=own_network(options))
    saved = header.save_checkpoint(files.checkpoint, model, **description,
                                   calibration=calibration, metrics=results)
    tk_utils.write_json(files.metrics, results)
    with tk_utils.atomic_file(files.card) as file:
        file.write(report.model_card(results, saved))
    tk_utils.loss_lr_plot(trajectory, files.loss_plot, results["note"], loss.label)
    report.draw_histogram(results, arrays, files.histogram)
    if options.name == DEFAULT_NAME:        # the names that the published project gives them
        for path in (files.loss_plot, files.histogram):
            with tk_utils.atomic_path(path.replace(f"{DEFAULT_NAME}_", "")) as temporary:
                shutil.copyfile(path, temporary)
    if place:
        print(run_line(options.name + place, results), flush=True)
    else:
        report.print_results(results)
        print(f"wrote {files.checkpoint}, {files.base}/, {files.loss_plot} and {files.histogram}")
    os.remove(files.resume)     # last: until here the same command would go on


def run_line(name, results) -> str:
    skill = results.get("skill")
    return (f"{name}: RMSE {results['tpp']['rmse']:.2f} mmHg, R² of Pcrit "
            f"{results['p_crit']['r2']:.2f}" + (f", skill {skill['value']:.2f}" if skill else "")
            + f" ({counted(results['n_segments'], 'segment')} of "
              f"{counted(results['n_patients'], 'patient')})")


if __name__ == "__main__":
    sys.exit(tk_utils.run_script(main, CheckpointError, DataError, TrainingError))
