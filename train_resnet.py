"""The main script: data -> trained network -> scores and figures.

    python train_resnet.py                                  # simulates its data, trains, evaluates
    python train_resnet.py --data my.h5 --name mine         # one's own data, the M1.5 recipe
    python train_resnet.py --data my.h5 --dry-run           # what that would read, train and write
    python train_resnet.py --data my.h5 --folds 5 --seeds 3 # cross-validated, repeated
    python train_resnet.py --ablate                         # also without the PPG, without vitals
    python train_resnet.py --plot-log --name mine           # the figures again, at any time
    torchrun --nproc_per_node=2 train_resnet.py …           # several GPUs or processes

Writes runs/<name>.pth (the checkpoint), runs/<name>_trajectory.pth, runs/<name>_log.csv,
runs/<name>_metrics.json, runs/<name>_run.json (private: where the data lie),
figures_resnet/loss_lr_plot.png and figures_resnet/histogram_plot.png.

Interrupted or killed, the same command goes on where it was saved (runs/<name>_resume.pth) and ends
in the same weights. Exit codes: 0 done, 2 an error in one line, 3 interrupted and saved.
"""
import argparse
import hashlib
import importlib.util
import itertools
import math
import os
import sys
import threading
import time
from contextlib import contextmanager, nullcontext

import numpy as np

import metrics
import tk_utils
from evaluate import (
    SCORED,
    beside,
    compare_runs,
    draw_histogram,
    evaluate,
    find_files,
    make_calibration,
    origin_of,
    print_results,
    simulated_note,
    vitals_of,
)
from tk_utils import print_table, run_script, write_json

# It brings PyTorch, for which --help does not wait.
header = tk_utils.lazy_module("training_header")

# The published M1.5 recipe: Adam with StepLR; the defaults for `--data`.
M1_5 = {"epochs": 10, "batch_size": 256, "lr": 1e-3, "lr_step": 3, "lr_gamma": 0.2,
        "weight_decay": 0.1, "l1": 1e-4}
# The default data set has a ten-thousandth of the cohort's segments: at batch 256 ten epochs would
# be a hundred steps. Many patients of few segments: what differs between segments of a patient is
# little beside what differs between patients. Chosen by the tune patients' loss and the clock.
SIMULATED = {"patients": 1200, "segments": 3, "seed": 0}
SIMULATED_RECIPE = {"epochs": 8, "batch_size": 16, "lr_step": 7}
SIMULATED_FILE = "data/simulated_{patients}x{segments}_seed{seed}.h5".format(**SIMULATED)
KEYS = ["ppg", "map", "dbp", "hr", "tpp"]
LABELS = ("tpp", "p_crit")
NO_VITALS = {"abp", "tpp", "p_crit", "p_crit_true"}      # waveforms, and the answer itself

INTERRUPTED = 3         # exit code: stopped by SIGINT or SIGTERM, state saved
FIGURES = ("figures_resnet/loss_lr_plot.png", "figures_resnet/histogram_plot.png")
ENDINGS = (".pth", "_resume.pth", "_trajectory.pth", "_log.csv", "_metrics.json", "_run.json")
FEW_STEPS = 200         # in all: the network has hardly left its initial weights
TIMED_STEPS = 5         # of --dry-run, after one that warms up


def files_of(options):
    """{ending: file} of a run."""
    return {ending: f"runs/{options.name}{ending}" for ending in ENDINGS}


def parse_args(arguments=None):
    def default(name):
        """The recipe's value, and that for the default data where it is another."""
        other = SIMULATED_RECIPE.get(name)
        return f"default {M1_5[name]}" + (f" ({other} on the default data)" if other else "")

    parser = tk_utils.ScriptParser(
        description=__doc__.split("\n\n")[0],
        epilog="exit codes: 0 done; 2 an error, in one line; 3 interrupted and saved")
    add = parser.add_argument_group("data").add_argument
    add("--data", nargs="+", metavar="FILE",
        help="HDF5 files of the layout, or globs; default: simulate "
             f"{SIMULATED['patients']} patients into {SIMULATED_FILE} once")
    add("--keys", nargs="+", default=KEYS, metavar="FIELD",
        help="ppg (may be absent), vitals, label (tpp or p_crit); default " + " ".join(KEYS))
    add("--condition", default="default", metavar="GATE",
        help="quality gate (docs/labels.md); default 'default'")
    add("--split-seed", type=int, default=0, metavar="N",
        help="which patients are train, tune, test; default 0")
    add("--salt-file", metavar="FILE",
        help="salt of the patients' hashes; default: tpp_ppg.salt beside the data")
    add("--keep-index", action="store_true",
        help="keep the index beside the data (<file>.index.npz) and use it again while the data do "
             "not change")
    add = parser.add_argument_group("training").add_argument
    add("--epochs", type=int, metavar="N",
        help=f"passes over the train segments; {default('epochs')}")
    add("--batch-size", type=int, metavar="N",
        help=f"segments in one step of each process; {default('batch_size')}")
    add("--accumulate", type=int, default=1, metavar="N", help="batches in one step; default 1")
    add("--lr", type=float, metavar="RATE", help=f"Adam's learning rate; {default('lr')}")
    add("--lr-step", type=int, metavar="EPOCHS",
        help=f"epochs between reductions of the rate; {default('lr_step')}")
    add("--lr-gamma", type=float, metavar="FACTOR",
        help=f"factor of each reduction; {default('lr_gamma')}")
    add("--weight-decay", type=float, metavar="X",
        help=f"Adam's L2 weight decay; {default('weight_decay')}")
    add("--l1", type=float, metavar="X", help=f"L1 penalty on weights; {default('l1')}")
    add("--init", choices=("steady", "pytorch"), default="steady",
        help="initial kernels (models.init_steady); default steady")
    add("--init-from", metavar="CHECKPOINT",
        help="fine-tune these weights, with their normalising, on the data")
    add("--seed", type=int, default=0, metavar="N", help="of initial weights and order; default 0")
    add("--early-stopping", type=int, default=-1, metavar="EPOCHS",
        help="stop after so many epochs without improvement; default: never")
    add("--spread", action="store_true",
        help="the network also predicts its own spread (Gaussian likelihood)")
    add("--amp", choices=("bf16", "fp16"), help="autocast to a shorter float")
    add("--weight-labels", action="store_true",
        help="weigh each train segment by the standard error of its Pcrit")
    add = parser.add_argument_group("repeating").add_argument
    add("--seeds", type=int, metavar="K",
        help="train K runs, <name>_seed<n>, of the seeds from --seed on")
    add("--folds", type=int, metavar="K",
        help="cross-validate over patients: K runs, <name>_fold<n>; each patient is tested once, "
             "the patients of each file are dealt evenly")
    add("--ablate", action="store_true",
        help="first train <name>_no_ppg and <name>_no_vitals, listed beside the run")
    add = parser.add_argument_group("running").add_argument
    add("--name", default="M1.5", help="of the files in runs/; default M1.5")
    add("--device", help="cpu, cuda, cuda:1, …; default: CUDA where present")
    add("--workers", type=int, metavar="N", help="loader processes; default: 0 on CPU, 4 on CUDA")
    add("--compile", action="store_true", dest="compiled",
        help="torch.compile the network (needs a C++ compiler; measure it first: "
             "benchmarks/train_step.py)")
    add("--checkpoint-minutes", type=float, default=10, metavar="MINUTES",
        help="save the state so often, beside after each epoch; default 10")
    add("--fresh", action="store_true",
        help="begin anew where a run of this name is unfinished or finished")
    add = parser.add_argument_group("following").add_argument
    add("--tensorboard", action="store_true",
        help="also write losses, rate, tune scores, speed and figures of each epoch to "
             "runs/<name>_tensorboard (needs the package tensorboard)")
    add("--dry-run", action="store_true",
        help="say what would be read, trained and written, time a few steps, stop")
    add("--plot-log", action="store_true",
        help="draw the figures again from the files of the run --name, finished or not; train "
             "nothing")
    options = parser.parse_args(arguments)
    options.fold = None
    for name, value in {**M1_5, **({} if options.data else SIMULATED_RECIPE)}.items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    check_options(options, parser.error)
    return options


def check_options(options, refuse):
    """Calls `refuse` with a line on options that make no sense."""
    for name, least in (("epochs", 1), ("batch_size", 1), ("accumulate", 1), ("lr_step", 1),
                        ("lr_gamma", 0), ("weight_decay", 0), ("l1", 0), ("seed", 0),
                        ("workers", 0), ("seeds", 2), ("folds", 3)):
        value = getattr(options, name)
        if value is not None and not value >= least:
            refuse(f"--{name.replace('_', '-')} {value}: expected at least {least}")
    if not options.lr > 0:
        refuse(f"--lr {options.lr}: expected more than 0")
    vitals, label = vitals_of(options.keys), options.keys[-1]
    if (len(options.keys) < 2 or label not in LABELS or "ppg" in options.keys[1:]
            or set(vitals) & NO_VITALS):
        refuse(f"--keys {' '.join(options.keys)}: expected ppg, then vitals, then "
               f"{' or '.join(LABELS)}; never the label or a waveform among the vitals")
    if options.ablate and (options.keys[0] != "ppg" or not vitals):
        refuse("--ablate: expected --keys with ppg and vitals, to leave out either")
    if options.ablate and options.init_from:
        refuse("--ablate does not go with --init-from: its runs begin anew")
    if not options.name or os.path.basename(options.name) != options.name:
        refuse(f"--name {options.name!r}: expected a name, not a path")
    if options.tensorboard and importlib.util.find_spec("tensorboard") is None:
        refuse("--tensorboard needs a package: pip install tensorboard")
    if options.dry_run and "RANK" in os.environ:
        refuse("--dry-run: one process is enough, without torchrun")


def repeats(options):
    """The options of each run that --seeds, --folds and --ablate ask for, in order."""
    runs = [options]
    if options.seeds:
        seeds = range(options.seed, options.seed + options.seeds)
        runs = [changed(one, f"_seed{n}", seed=n) for one in runs for n in seeds]
    if options.folds:
        runs = [changed(one, f"_fold{n}", fold=n) for one in runs for n in range(options.folds)]
    if options.ablate:      # before the run itself, whose table lists them (evaluate.ABLATIONS)
        ppg, *vitals, label = options.keys
        runs = [changed(one, suffix, keys=keys) for one in runs for suffix, keys in (
            ("_no_ppg", [*vitals, label]), ("_no_vitals", [ppg, label]), ("", options.keys))]
    return runs


def changed(options, suffix, **values):
    return argparse.Namespace(**dict(vars(options), name=options.name + suffix, **values))


def main():
    options = parse_args()
    if options.plot_log:
        return plot_log(options)
    if options.dry_run:
        return dry_run(repeats(options))
    runs, first = repeats(options), os.environ.get("RANK", "0") == "0"
    for number, one in enumerate(runs, 1):
        if len(runs) > 1 and first:
            print(f"\n{one.name}: run {number} of {len(runs)}", flush=True)
        code = run(one)
        if code:
            return code
    if (options.seeds or options.folds) and first:
        summarise([f"runs/{one.name}.pth" for one in runs if one.keys == options.keys], options)
    return 0


def summarise(checkpoints, options):
    """The table of several runs, runs/<name>_summary.json, and the histogram of all together."""
    print(f"\n{options.name}: {len(checkpoints)} runs")
    results, arrays = compare_runs(checkpoints, device=options.device,
                                   keep_index=options.keep_index)
    write_json(f"runs/{options.name}_summary.json", results)
    draw_histogram(results["together"], arrays, FIGURES[1])
    print(f"wrote runs/{options.name}_summary.json and {FIGURES[1]}")


def run(options):
    """Trains and scores one network; the exit code."""
    started = time.time()
    rank = join_processes(options.device)
    with only_run(options) if rank == 0 else nullcontext():
        data = find_data(options, rank)
        index, parts, datasets, origin = open_data(options, data, rank)
        salt_file = options.salt_file or beside(data[0])
        parent = open_parent(options, parts, salt_file, rank)
        description = None
        if rank == 0:
            description = describe(options, index, parts, datasets, origin, salt_file, parent)
        if finished_before(options, description, rank):
            return 0
        model, loaders = build(options, datasets, parent)
        try:
            model, trajectory = train(options, model, loaders, description)
        except header.Interrupted as interruption:
            if rank == 0:
                print(interruption, file=sys.stderr)
            return INTERRUPTED
        except header.NonFiniteLoss as problem:
            raise header.TrainingError(
                f"{problem}. {what_was_in(loaders[0], problem, salt_file)}") from None
        if rank == 0:
            description["provenance"]["wall_seconds"] = round(time.time() - started, 1)
            save_and_report(options, model, trajectory, description, datasets, data, salt_file)
    return 0


@contextmanager
def only_run(options):
    """Holds the lock of this run's name, and removes what a killed one left half-written."""
    taken = (f"runs/{options.name}: another process is training under this name; --name OTHER "
             "trains beside it")
    with tk_utils.locked(f"runs/.{options.name}.lock", taken):
        for path in files_of(options).values():
            tk_utils.remove_leftovers(path)
        for path in FIGURES:            # all runs write these
            tk_utils.remove_leftovers(path, older_than_s=600)
        yield


def join_processes(device):
    """This process's rank; under torchrun joins the others (nccl on CUDA, gloo on CPU)."""
    if "RANK" not in os.environ:
        return 0
    import torch
    if torch.distributed.is_initialized():      # by the run before this one
        return torch.distributed.get_rank()
    if "TORCHELASTIC_RUN_ID" in os.environ:
        threading.Thread(target=end_with, args=(os.getppid(),), daemon=True).start()
    on_cuda = torch.cuda.is_available() and device != "cpu"
    torch.distributed.init_process_group("nccl" if on_cuda else "gloo")
    if on_cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    return torch.distributed.get_rank()


def end_with(torchrun):
    """Ends this process when torchrun is gone (killed): it would wait for the others for ever."""
    while os.getppid() == torchrun:
        time.sleep(1)
    os._exit(1)


def share(values):
    """Rank 0's list of plain values, in all processes."""
    import torch
    if "RANK" in os.environ:
        torch.distributed.broadcast_object_list(values)
    return values


def find_data(options, rank):
    """The data files: those named (globs expanded), or the default ones, simulated once."""
    if options.data:
        return find_files(options.data)
    path = SIMULATED_FILE
    if rank == 0:
        changes = [f"{k} {v} instead of M1.5's {M1_5[k]}" for k, v in SIMULATED_RECIPE.items()
                   if getattr(options, k) == v]
        print(f"no --data: training on SIMULATED patients. {', '.join(changes)}"
              " (the default data set is small: M1.5's batches would make too few steps)")
        tk_utils.remove_leftovers(path, older_than_s=60)
        if not os.path.exists(path):
            from simulate import simulate_file
            simulate_file(path, workers=os.cpu_count() or 1, **SIMULATED)
    share([None])                       # the others wait for the file
    return [path]


def open_data(options, data, rank):
    """Index, its parts, train and tune `TPP_PPG_dataset`s, and where the data came from."""
    origin = origin_of(data)
    make_index = (header.kept_dataset_index if options.keep_index else
                  header.create_dataset_index)
    index = make_index(condition=options.condition, path=data)
    parts = header.split_index(index, options.split_seed, fold=options.fold, folds=options.folds)
    # A field that only scoring needs, or only a test patient lacks, is missed before training.
    header.TPP_PPG_dataset(index, "segment", options.keys + SCORED)
    if rank == 0:
        if simulated_note(origin, origin):
            print(f"*** {simulated_note(origin, origin)} ***")
        for name, part in parts.items():
            print(f"{name}: {len(part):,} segments of {part.n_patients:,} patients")
        if index.n_patients < 100:
            print("fewer than 100 patients: who is in which part changes when patients are "
                  "added; --folds 5 tests each patient once")
    *inputs, label = options.keys
    of_train = [*inputs, "p_crit_se", label] if options.weight_labels else options.keys
    datasets = {name: header.TPP_PPG_dataset(parts[name], "segment", keys, seed=options.seed)
                for name, keys in (("train", of_train), ("tune", options.keys))}
    return index, parts, datasets, origin


def open_parent(options, parts, salt_file, rank):
    """The checkpoint of --init-from, or None; none of its patients may be tuned or tested on."""
    if rank == 0:
        salt = header.read_salt(salt_file)      # where it cannot be made, say so before training
    if options.init_from is None:
        return None
    parent = header.load_checkpoint(options.init_from)
    if parent["keys"] != options.keys:
        raise header.DataError(f"{options.init_from}: trained on {' '.join(parent['keys'])}, not "
                               f"on {' '.join(options.keys)} (--keys)")
    if (parent["model_args"].get("num_outputs", 1) == 2) != options.spread:
        its, with_it = ("no", "without") if options.spread else ("its", "with")
        raise header.DataError(f"{options.init_from}: predicts {its} spread ({with_it} --spread it "
                               "goes on)")
    if rank > 0:
        return parent
    if parent["provenance"].get("salt") != header.salt_mark(salt):
        print(f"WARNING: {options.init_from}: made with another salt (--salt-file), so whether "
              "tune and test patients were trained on COULD NOT BE CHECKED", file=sys.stderr)
        return parent
    seen = seen_by(parent)
    held_out = parts["tune"].patients.tolist() + parts["test"].patients.tolist()
    n_seen = len(seen.intersection(header.hash_patients(held_out, salt)))
    if n_seen:
        raise header.DataError(f"{options.init_from}: {n_seen} of the {len(held_out)} tune and "
                               "test patients were trained or tuned on by it; the --split-seed of "
                               "that run keeps them apart")
    return parent


def seen_by(checkpoint):
    """The hashes of the patients that a checkpoint, or one before it, was trained or tuned on."""
    split = checkpoint["split"]
    return set().union(*(hashes for part, hashes in split.items() if part != "test"))


def finished_before(options, description, rank):
    """Whether this very run is finished (then prints its scores). All processes get one answer.

    Raises DataError where the name belongs to a run of other options, finished or not.
    """
    answer = [False]
    done, unfinished = (files_of(options)[ending] for ending in (".pth", "_resume.pth"))
    if rank == 0 and options.fresh:
        if os.path.exists(unfinished):
            os.remove(unfinished)
    elif rank == 0 and os.path.exists(unfinished):
        saved = header.load_tensors(unfinished)
        refuse_other_options(unfinished, saved.get("experiment"), description)
        print(f"going on from {unfinished}, epoch {saved['run']['epoch'] + 1}, batch "
              f"{saved['run']['batches'] + 1}", flush=True)
    elif rank == 0 and os.path.exists(done):
        saved = header.load_checkpoint(done)
        refuse_other_options(done, saved, description)
        if not saved["metrics"]:
            raise header.DataError(f"{done}: finished, but without scores (python evaluate.py "
                                   f"{done})")
        print_results(saved["metrics"])
        print(f"{done}: this run is finished; --fresh trains it anew, --name OTHER beside it")
        answer = [True]
    return share(answer)[0]


def refuse_other_options(path, saved, now):
    """Raises DataError unless a saved run had the options and data of this one."""
    saved = {"config": {}, "provenance": {}, **(saved or {})}
    other = [f"--{name.replace('_', '-')} {saved['config'].get(name)} (now {value})"
             for name, value in now["config"].items() if saved["config"].get(name) != value]
    other += [words for what, words in (("data_fingerprint", "other data"),
                                        ("parent", "--init-from"))
              if saved["provenance"].get(what) != now["provenance"].get(what)]
    if other:
        raise header.DataError(f"{path}: a run with other options: {', '.join(other)}. --fresh "
                               "replaces it, --name OTHER trains beside it")


def what_was_in(loader, problem, salt_file):
    """The patients (hashed) and the ranges of the fields of a batch, in a sentence."""
    dataset, order, items = loader.dataset, loader.sampler, []
    for number in problem.batches:
        order.set_epoch(problem.epoch, number)
        items.append(next(iter(order)))
    segments = dataset.segments(np.concatenate(items))
    patients = dataset.index.patients[np.unique(dataset.index.segment_patients()[segments])]
    hashes = header.hash_patients(patients.tolist(), header.read_salt(salt_file))
    ranges = []
    for key, values in zip(dataset.keys_to_load, dataset.read(segments)):
        bad = int((~values.isfinite()).sum())
        ranges.append(f"{key} {float(values.min()):.4g} to {float(values.max()):.4g}"
                      + (f" ({bad} not finite)" if bad else ""))
    return (f"Its {len(segments)} segments: {', '.join(ranges)}; of the patients "
            f"{', '.join(hashes[:20])}{' …' if len(hashes) > 20 else ''} "
            "(python datasets.py FILE --who HASH names them)")


def model_args(options):
    """The arguments of `get_model_v3`, those that are not its defaults."""
    return {"num_discrete": len(vitals_of(options.keys)),
            **({} if options.keys[0] == "ppg" else {"in_channels": 0}),
            **({"num_outputs": 2} if options.spread else {})}


def build(options, datasets, parent):
    """The normalised network, fresh or the parent's, and the train and tune loaders."""
    header.reset_all_seeds(options.seed)
    if parent:
        model = header.load_model(parent)
    else:
        network = header.get_model_v3(**model_args(options))
        if options.init == "steady":
            header.init_steady(network)
        normalised = vitals_of(options.keys) + options.keys[-1:]
        model = header.NormalisedModel(network, options.keys,
                                       header.fit_normaliser(datasets["train"], normalised))
    rank, world = header.distributed()
    if rank == 0:
        warn_of_few_steps(options, len(datasets["train"]), world)
    on_cuda = header.choose_device(options.device).type == "cuda"
    workers = (4 if on_cuda else 0) if options.workers is None else options.workers
    return model, [
        header.make_loader(datasets[name], options.batch_size * world, shuffle=name == "train",
                           seed=options.seed, workers=workers, pin_memory=on_cuda, rank=rank,
                           world=world) for name in ("train", "tune")]


def warn_of_few_steps(options, n_segments, world):
    """A line where M1.5's batches are too large for the data to learn anything from."""
    def steps(batch_size):
        return options.epochs * math.ceil(n_segments / (batch_size * world * options.accumulate))

    small = SIMULATED_RECIPE["batch_size"]
    if steps(options.batch_size) < FEW_STEPS and options.batch_size > small:
        print(f"{steps(options.batch_size):,} steps in all are few to learn in: --batch-size "
              f"{small} makes {steps(small):,}")


def recipe_of(options, dataset):
    """The arguments of `training_loop` that shape the weights. dataset: of the train part."""
    weigh = None
    if options.weight_labels:
        se = dataset.column("p_crit_se")
        usual = se.median() ** 2        # beside it: no label weighs more than twice the usual one
        mean = (1 / (usual + se ** 2)).mean()

        def weigh(se):
            return 1 / (usual.to(se.device) + se ** 2) / mean.to(se.device)

    return {"lr": options.lr, "weight_decay": options.weight_decay, "l1_reg": options.l1,
            "scheduler_and_args": [header.StepLR, {"step_size": options.lr_step,
                                                   "gamma": options.lr_gamma}],
            "gradient_accumulation": options.accumulate, "weigh": weigh, "amp": options.amp,
            "criterion": "nll" if options.spread else "mse", "compiled": options.compiled,
            "early_stopping": options.early_stopping, "device": options.device}


def train(options, model, loaders, description):
    """(the model with its best weights, trajectories); a line and a row of the log each epoch."""
    add_to_board = None
    if options.tensorboard and header.distributed()[0] == 0:
        add_to_board = tensorboard(options, model, loaders, description["provenance"]["origin"])

    def on_epoch(log):
        with tk_utils.atomic_file(files_of(options)["_log.csv"]) as file:
            file.write(",".join(log[0]) + "\n")
            file.writelines(",".join(f"{v:.6g}" for v in row.values()) + "\n" for row in log)
        row = log[-1]
        left = row["seconds"] / row["epoch"] * (options.epochs - row["epoch"])
        if add_to_board:
            add_to_board(log)
        losses = (f"-log likelihood train {row['train_loss']:.3f}, tune {row['tune_loss']:.3f}"
                  if options.spread else f"RMSE train {row['train_loss'] ** 0.5:.2f}, tune "
                  f"{row['tune_loss'] ** 0.5:.2f} mmHg")
        print(f"epoch {row['epoch']}/{options.epochs}: {losses} (best: epoch {row['best_epoch']}), "
              f"{row['seconds'] / 60:.1f} min, {left / 60:.1f} min left", flush=True)

    return header.training_loop(
        model, *loaders, options.epochs, **recipe_of(options, loaders[0].dataset),
        on_epoch=on_epoch, resume_path=files_of(options)["_resume.pth"], experiment=description,
        checkpoint_minutes=options.checkpoint_minutes)


def tensorboard(options, model, loaders, origin):
    """A function that adds the newest epoch of the log to runs/<name>_tensorboard."""
    from torch.utils.tensorboard import SummaryWriter
    tune = loaders[1].dataset       # all of it, also under torchrun
    truth, p_crit = (tune.column(key).numpy() for key in (options.keys[-1], "p_crit"))
    writer = None

    def add(log):
        nonlocal writer
        row, epoch = log[-1], log[-1]["epoch"]
        if writer is None:      # a run that goes on replaces what came after its saved state
            writer = SummaryWriter(f"runs/{options.name}_tensorboard", purge_step=epoch)
        predicted = header.predict_dataset(model, tune, options.batch_size, options.device)
        found = dict(metrics.scores(truth, predicted), n_patients=tune.index.n_patients,
                     p_crit_r2=metrics.scores(p_crit, p_crit + predicted - truth)["r2"])
        seconds = row["seconds"] - (log[-2]["seconds"] if epoch > 1 else 0)
        values = {"loss/train": row["train_loss"], "loss/tune": row["tune_loss"],
                  "learning rate": row["lr"],
                  "train segments per second": len(loaders[0].dataset) / seconds,
                  **{f"tune/{key}": found[key]
                     for key in ("rmse", "mae", "mead", "bias", "sd", "r2", "p_crit_r2")}}
        for name, value in values.items():
            writer.add_scalar(name, value, epoch)
        writer.add_figure("tune", tk_utils.histogram_figure(
            truth, predicted, found, simulated_note(origin, origin), options.keys[-1]), epoch)
        writer.flush()

    return add


def describe(options, index, parts, datasets, origin, salt_file, parent):
    """What the checkpoint says of the run: options, hashed split, provenance; no paths or names."""
    left_out = ("data", "salt_file", "name", "device", "workers", "keep_index", "init_from",
                "fresh", "checkpoint_minutes", "tensorboard", "dry_run", "plot_log", "seeds",
                "ablate")
    salt = header.read_salt(salt_file)
    fingerprint, parent_print, ancestors = hashlib.sha256(), None, {}
    if parent:
        parent_print = hashlib.sha256()
        for weights in parent["model"].values():
            parent_print.update(weights.numpy().tobytes())
        parent_print = parent_print.hexdigest()
        ancestors = {"ancestors": sorted(seen_by(parent))}
    for one in (index.rows, index.starts, datasets["train"].column(options.keys[-1]).numpy()):
        fingerprint.update(one.tobytes())
    return {
        "model_args": parent["model_args"] if parent else model_args(options),
        "config": dict({k: v for k, v in vars(options).items() if k not in left_out},
                       processes=header.distributed()[1]),
        "split": {**ancestors, **{name: header.hash_patients(part.patients.tolist(), salt)
                                  for name, part in parts.items()}},
        "provenance": {
            "origin": origin, "label_method": origin_of(index.paths, "label_method"),
            "beats": origin_of(index.paths, "beats"), "data_fingerprint": fingerprint.hexdigest(),
            "parent": parent_print, "salt": header.salt_mark(salt), "n_patients": index.n_patients,
            "n_segments": len(index),
            "versions": tk_utils.versions(), "git_revision": tk_utils.git_revision(),
            "seeds": {"seed": options.seed, "split_seed": options.split_seed}}}


def save_and_report(options, model, trajectory, description, datasets, data, salt_file):
    """Writes the checkpoint, scores it on the test patients as `evaluate.py` does, and draws."""
    from torch import from_numpy
    files = files_of(options)
    path = files[".pth"]
    write_json(files["_run.json"], {
        "_": "PRIVATE: paths of this machine; do not share",
        "data": [os.path.realpath(p) for p in data], "salt_file": os.path.realpath(salt_file)})
    header.save_tensors(files["_trajectory.pth"],
                        {name: from_numpy(values) for name, values in trajectory.items()})
    calibration = make_calibration(model, datasets["train"], datasets["tune"],
                                   device=options.device)
    header.save_checkpoint(path, model, **description, calibration=calibration)
    results, arrays = evaluate(path, device=options.device, keep_index=options.keep_index)
    header.save_checkpoint(path, model, **description, calibration=calibration, metrics=results)
    write_json(files["_metrics.json"], results)
    tk_utils.loss_lr_plot(trajectory, FIGURES[0], results["note"])
    draw_histogram(results, arrays, FIGURES[1])
    print_results(results)
    os.remove(files["_resume.pth"])     # last: until here the same command would go on
    print(f"wrote {path}, its trajectory, log and metrics beside it, and figures_resnet/*.png")


def plot_log(options):
    """Draws the figures again from the files of a run: of one under way or broken off, the losses;
    of a finished one, also the histogram, for which it is scored again."""
    files = files_of(options)
    if os.path.exists(files["_log.csv"]):
        log = np.atleast_1d(np.genfromtxt(files["_log.csv"], delimiter=",", names=True))
        trajectory = {"epoch_train_loss": log["train_loss"], "epoch_val_loss": log["tune_loss"],
                      "lr": log["lr"]}
    elif os.path.exists(files["_trajectory.pth"]):
        trajectory = header.load_tensors(files["_trajectory.pth"])
    else:
        raise FileNotFoundError(f"{files['_log.csv']}: no such run has finished an epoch "
                                f"(python train_resnet.py --name {options.name} trains it)")
    unfinished = os.path.exists(files["_resume.pth"])
    saved = (header.load_tensors(files["_resume.pth"])["experiment"] if unfinished
             else header.load_checkpoint(files[".pth"]))
    origin = saved["provenance"]["origin"]
    tk_utils.loss_lr_plot(trajectory, FIGURES[0], simulated_note(origin, origin))
    print(f"drawn: {FIGURES[0]}")
    if not unfinished:
        draw_histogram(*evaluate(files[".pth"], device=options.device), FIGURES[1])
        print(f"drawn: {FIGURES[1]}")


def dry_run(runs):
    """What this command would read, train and write, and how long it may take; writes nothing."""
    options = runs[-1]
    data = find_files(options.data) if options.data else [SIMULATED_FILE]
    if not os.path.exists(data[0]):
        settings = " ".join(f"--{name} {value}" for name, value in SIMULATED.items())
        megabytes = SIMULATED["patients"] * SIMULATED["segments"] * 3600 * 4 / 1e6
        print(f"would simulate {SIMULATED['patients']:,} patients of {SIMULATED['segments']} "
              f"segments first ({data[0]}, {megabytes:.0f} MB), then train on them. The rest can "
              f"be said when they are there: python simulate.py --out {data[0]} {settings}")
        return
    options.keep_index = False
    _, parts, datasets, _ = open_data(options, data, 0)
    salt_file, parent = options.salt_file or beside(data[0]), None
    if options.init_from:       # without a salt its patients cannot be compared, nor one be made
        parent = (open_parent(options, parts, salt_file, 0) if os.path.exists(salt_file)
                  else header.load_checkpoint(options.init_from))
    model, loaders = build(options, datasets, parent)
    timed = [TimedLoader(one) for one in loaders]
    header.training_loop(model, *timed, 1, **recipe_of(options, datasets["train"]))
    minutes = options.epochs * sum(one.batch_s * len(one.loader) for one in timed) / 60
    weights_mb = sum(p.numel() for p in model.parameters()) * 4 / 1e6
    print()
    print_table([[path, f"{os.path.getsize(path) / 1e6:,.1f}"] for path in data],
                ["would read", "MB"])
    print(f"\nwould train {weights_mb / 4:.2f} M weights on "
          f"{header.choose_device(options.device)}: {options.epochs} epochs of "
          f"{len(loaders[0]):,} steps of {options.batch_size}, {1000 * timed[0].batch_s:.0f} ms "
          f"each ({TIMED_STEPS} steps timed), so about {minutes:.1f} min, and the evaluation"
          + (f"; {len(runs)} runs, this one and:" if len(runs) > 1 else "") + "\n"
          + "".join(f"  {one.name}\n" for one in runs[:-1]))
    # while it runs: weights, two moments of Adam, and the best weights
    sizes = {".pth": weights_mb, "_resume.pth": 4 * weights_mb}
    files = {**files_of(options), **dict(zip(FIGURES, FIGURES))}
    print_table([[path, f"{sizes[ending]:.1f}" if ending in sizes else "small",
                  "is there" if os.path.exists(path) else ""] for ending, path in files.items()],
                ["would write", "MB", "now"])
    if os.path.exists(files[".pth"]) or os.path.exists(files["_resume.pth"]):
        print(f"\n{options.name} has been trained or begun: the same options go on or show its "
              "scores, others are refused; --fresh trains anew, --name OTHER beside it")


class TimedLoader:
    """The first batches of a loader; batch_s: seconds from one to the next, work and reading."""

    def __init__(self, loader):
        self.loader, self.sampler = loader, loader.sampler

    def __len__(self):
        return min(len(self.loader), TIMED_STEPS + 1)

    def __iter__(self):
        asked = []
        for batch in itertools.islice(self.loader, len(self)):
            asked.append(self.now())
            yield batch
        asked.append(self.now())
        seconds = np.diff(asked)
        self.batch_s = float(np.median(seconds[1:] if len(seconds) > 1 else seconds))

    def now(self):
        from torch import cuda
        if cuda.is_initialized():
            cuda.synchronize()          # it has to be done before the clock is read
        return time.monotonic()


if __name__ == "__main__":
    sys.exit(run_script(main, "CheckpointError", "DataError", "TrainingError"))
