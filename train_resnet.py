"""The main script: data -> trained network -> scores and figures.

    python train_resnet.py                                  # simulates its data, trains, evaluates
    python train_resnet.py --data my.h5 --name mine         # one's own data, the M1.5 recipe
    torchrun --nproc_per_node=2 train_resnet.py …           # several GPUs or processes

Writes runs/<name>.pth (the checkpoint), runs/<name>_trajectory.pth, runs/<name>_log.csv,
runs/<name>_metrics.json, runs/<name>_run.json (private: where the data lie),
figures_resnet/loss_lr_plot.png and figures_resnet/histogram_plot.png.

Interrupted or killed, the same command goes on where it was saved (runs/<name>_resume.pth) and ends
in the same weights. Exit codes: 0 done, 2 an error in one line, 3 interrupted and saved.
"""
import argparse
import hashlib
import os
import sys
import time
from contextlib import contextmanager, nullcontext

import numpy as np

from evaluate import (
    SCORED,
    beside,
    draw_histogram,
    evaluate,
    find_files,
    make_calibration,
    origin_of,
    print_results,
    simulated_note,
)
from tk_utils import (
    atomic_path,
    git_revision,
    locked,
    loss_lr_plot,
    remove_leftovers,
    run_script,
    versions,
    write_json,
)

# The published M1.5 recipe: Adam with StepLR; the defaults for `--data`.
M1_5 = {"epochs": 10, "batch_size": 256, "lr": 1e-3, "lr_step": 3, "lr_gamma": 0.2,
        "weight_decay": 0.1, "l1": 1e-4}
# The default data set has a ten-thousandth of the cohort's segments: at batch 256 ten epochs would
# be a hundred steps. Many patients of few segments: what differs between segments of a patient is
# little beside what differs between patients. Chosen by the tune patients' loss and the clock.
SIMULATED = {"patients": 1200, "segments": 3, "seed": 0}
SIMULATED_RECIPE = {"epochs": 9, "batch_size": 16, "lr_step": 7}
KEYS = ["ppg", "map", "dbp", "hr", "tpp"]
LABELS = ("tpp", "p_crit")
NO_VITALS = {"ppg", "abp", "tpp", "p_crit", "p_crit_true"}      # waveforms, and the answer itself


INTERRUPTED = 3         # exit code: stopped by SIGINT or SIGTERM, state saved
FIGURES = ("figures_resnet/loss_lr_plot.png", "figures_resnet/histogram_plot.png")
ENDINGS = (".pth", "_resume.pth", "_trajectory.pth", "_log.csv", "_metrics.json", "_run.json")


def resume_path(options):
    return f"runs/{options.name}_resume.pth"


def parse_args(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    group = parser.add_argument_group("data")
    group.add_argument("--data", nargs="+", metavar="FILE",
                       help="HDF5 files of the layout, or globs; default: simulate "
                            f"{SIMULATED['patients']} patients into data/ once")
    group.add_argument("--keys", nargs="+", default=KEYS, metavar="FIELD",
                       help=f"ppg, vitals, label (tpp or p_crit); default {' '.join(KEYS)}")
    group.add_argument("--condition", default="default", help="quality gate (README, 'The gate')")
    group.add_argument("--split-seed", type=int, default=0,
                       help="which patients are train, tune, test")
    group.add_argument("--salt-file", metavar="FILE",
                       help="salt of the patients' hashes; default: tpp_ppg.salt beside the data")
    group = parser.add_argument_group("training")
    group.add_argument("--epochs", type=int, help="passes over the train segments")
    group.add_argument("--batch-size", type=int, help="segments in one step of each process")
    group.add_argument("--accumulate", type=int, default=1, help="batches in one step")
    group.add_argument("--lr", type=float, help="Adam's learning rate")
    group.add_argument("--lr-step", type=int, help="epochs between reductions of the rate")
    group.add_argument("--lr-gamma", type=float, help="factor of each reduction")
    group.add_argument("--weight-decay", type=float, help="Adam's L2 weight decay")
    group.add_argument("--l1", type=float, help="L1 penalty on weights")
    group.add_argument("--init", choices=("steady", "pytorch"), default="steady",
                       help="initial kernels (models.init_steady); default steady")
    group.add_argument("--seed", type=int, default=0, help="of initial weights and order")
    group.add_argument("--early-stopping", type=int, default=-1, metavar="EPOCHS",
                       help="stop after so many epochs without improvement; default: never")
    group.add_argument("--amp", choices=("bf16", "fp16"), help="autocast to a shorter float")
    group.add_argument("--weight-labels", action="store_true",
                       help="weigh each train segment by the standard error of its Pcrit")
    group.add_argument("--init-from", metavar="CHECKPOINT",
                       help="fine-tune these weights, with their normalising, on the data")
    group = parser.add_argument_group("running")
    group.add_argument("--name", default="M1.5", help="of the files in runs/")
    group.add_argument("--device", help="cpu, cuda, cuda:1, …; default: CUDA where present")
    group.add_argument("--workers", type=int, help="loader processes; default: 0 on CPU, 4 on CUDA")
    group.add_argument("--compile", action="store_true", dest="compiled",
                       help="torch.compile the network (needs a C++ compiler; measure it first: "
                            "benchmarks/train_step.py)")
    group.add_argument("--keep-index", action="store_true",
                       help="keep the index beside the data (<file>.index.npz) and use it again "
                            "while the data do not change")
    group.add_argument("--checkpoint-minutes", type=float, default=10, metavar="MINUTES",
                       help="save the state so often, beside after each epoch; default 10")
    group.add_argument("--fresh", action="store_true",
                       help="begin anew where a run of this name is unfinished or finished")
    options = parser.parse_args(arguments)
    recipe = dict(M1_5) if options.data else dict(M1_5, **SIMULATED_RECIPE)
    for name, value in recipe.items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    for name, least in (("epochs", 1), ("batch_size", 1), ("accumulate", 1), ("lr_step", 1),
                        ("lr_gamma", 0), ("weight_decay", 0), ("l1", 0), ("seed", 0),
                        ("workers", 0)):
        value = getattr(options, name)
        if value is not None and not value >= least:
            parser.error(f"--{name.replace('_', '-')} {value}: expected at least {least}")
    if not options.lr > 0:
        parser.error(f"--lr {options.lr}: expected more than 0")
    first, *vitals, label = options.keys if len(options.keys) > 1 else (None, None)
    if first != "ppg" or label not in LABELS or set(vitals) & NO_VITALS:
        parser.error(f"--keys {' '.join(options.keys)}: expected ppg, then vitals, then "
                     f"{' or '.join(LABELS)}; never the label or a waveform among the vitals")
    if not options.name or os.path.basename(options.name) != options.name:
        parser.error(f"--name {options.name!r}: expected a name, not a path")
    return options


def main():
    from training_header import Interrupted, NonFiniteLoss, TrainingError
    options = parse_args()
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
        model, loaders, device = build(options, datasets, parent)
        try:
            model, trajectory = train(options, model, loaders, device, description)
        except Interrupted as interruption:
            if rank == 0:
                print(interruption, file=sys.stderr)
            return INTERRUPTED
        except NonFiniteLoss as problem:
            raise TrainingError(f"{problem}. {what_was_in(loaders[0], problem, salt_file)}") \
                from None
        if rank == 0:
            description["provenance"]["wall_seconds"] = round(time.time() - started, 1)
            save_and_report(options, model, trajectory, description, datasets, data, salt_file)
    return 0


@contextmanager
def only_run(options):
    """Holds the lock of this run's name, and removes what a killed one left half-written."""
    files = [f"runs/{options.name}{end}" for end in ENDINGS]
    with locked(f"runs/.{options.name}.lock", f"runs/{options.name}: another process is training "
                "under this name; --name OTHER trains beside it"):
        for path in files:
            remove_leftovers(path)
        for path in FIGURES:            # all runs write these
            remove_leftovers(path, older_than_s=600)
        yield


def join_processes(device):
    """This process's rank; under torchrun joins the others (nccl on CUDA, gloo on CPU)."""
    if "RANK" not in os.environ:
        return 0
    import torch
    on_cuda = torch.cuda.is_available() and device != "cpu"
    torch.distributed.init_process_group("nccl" if on_cuda else "gloo")
    if on_cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    return torch.distributed.get_rank()


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
    path = "data/simulated_{patients}x{segments}_seed{seed}.h5".format(**SIMULATED)
    if rank == 0:
        changes = [f"{k} {v} instead of M1.5's {M1_5[k]}" for k, v in SIMULATED_RECIPE.items()
                   if getattr(options, k) == v]
        print(f"no --data: training on SIMULATED patients. {', '.join(changes)}"
              " (the default data set is small: M1.5's batches would make too few steps)")
        remove_leftovers(path, older_than_s=60)
        if not os.path.exists(path):
            from simulate import simulate_file
            simulate_file(path, workers=os.cpu_count() or 1, **SIMULATED)
    share([None])                       # the others wait for the file
    return [path]


def open_data(options, data, rank):
    """Index, its parts, train and tune `TPP_PPG_dataset`s, and where the data came from."""
    from training_header import (
        TPP_PPG_dataset,
        create_dataset_index,
        kept_dataset_index,
        split_index,
    )
    origin = origin_of(data)
    make_index = kept_dataset_index if options.keep_index else create_dataset_index
    index = make_index(condition=options.condition, path=data)
    parts = split_index(index, options.split_seed)
    # A field that only scoring needs, or only a test patient lacks, is missed before training.
    TPP_PPG_dataset(index, "segment", options.keys + SCORED)
    if rank == 0:
        if simulated_note(origin, origin):
            print(f"*** {simulated_note(origin, origin)} ***")
        for name, part in parts.items():
            print(f"{name}: {len(part):,} segments of {part.n_patients:,} patients")
        if index.n_patients < 100:
            print("fewer than 100 patients: who is in which part changes when patients are added")
    train_keys = options.keys + []
    if options.weight_labels:
        train_keys.insert(-1, "p_crit_se")
    datasets = {name: TPP_PPG_dataset(parts[name], "segment", keys, seed=options.seed)
                for name, keys in (("train", train_keys), ("tune", options.keys))}
    return index, parts, datasets, origin


def open_parent(options, parts, salt_file, rank):
    """The checkpoint of --init-from, or None; none of its patients may be tuned or tested on."""
    from training_header import (
        DataError,
        hash_patients,
        load_checkpoint,
        load_model,
        read_salt,
        salt_mark,
    )
    if rank == 0:
        salt = read_salt(salt_file)     # where it cannot be made, say so before training
    if options.init_from is None:
        return None
    parent = load_checkpoint(options.init_from)
    load_model(parent)
    if parent["keys"] != options.keys:
        raise DataError(f"{options.init_from}: trained on {' '.join(parent['keys'])}, not on "
                        f"{' '.join(options.keys)} (--keys)")
    if rank > 0:
        return parent
    if parent["provenance"].get("salt") != salt_mark(salt):
        print(f"WARNING: {options.init_from}: made with another salt (--salt-file), so whether "
              "tune and test patients were trained on COULD NOT BE CHECKED", file=sys.stderr)
        return parent
    seen = set().union(*(hashes for part, hashes in parent["split"].items() if part != "test"))
    held_out = parts["tune"].patients.tolist() + parts["test"].patients.tolist()
    n_seen = len(seen.intersection(hash_patients(held_out, salt)))
    if n_seen:
        raise DataError(f"{options.init_from}: {n_seen} of the {len(held_out)} tune and test "
                        "patients were trained or tuned on by it; the --split-seed of that run "
                        "keeps them apart")
    return parent


def finished_before(options, description, rank):
    """Whether this very run is finished (then prints its scores). All processes get one answer.

    Raises DataError where the name belongs to a run of other options, finished or not.
    """
    from training_header import DataError, load_checkpoint, load_tensors
    answer = [False]
    if rank == 0:
        done, unfinished = f"runs/{options.name}.pth", resume_path(options)
        if options.fresh and os.path.exists(unfinished):
            os.remove(unfinished)
        elif not options.fresh and os.path.exists(unfinished):
            saved = load_tensors(unfinished)
            refuse_other_options(unfinished, saved.get("experiment"), description)
            print(f"going on from {unfinished}, epoch {saved['run']['epoch'] + 1}, batch "
                  f"{saved['run']['batches'] + 1}", flush=True)
        elif not options.fresh and os.path.exists(done):
            saved = load_checkpoint(done)
            refuse_other_options(done, saved, description)
            if not saved["metrics"]:
                raise DataError(f"{done}: finished, but without scores (python evaluate.py {done})")
            print_results(saved["metrics"])
            print(f"{done}: this run is finished; --fresh trains it anew, --name OTHER beside it")
            answer = [True]
    return share(answer)[0]


def refuse_other_options(path, saved, now):
    """Raises DataError unless a saved run had the options and data of this one."""
    from training_header import DataError
    saved_config = dict((saved or {}).get("config", {}))
    changed = [f"--{name.replace('_', '-')} {saved_config.get(name)} (now {value})"
               for name, value in now["config"].items() if saved_config.get(name) != value]
    for what in ("data_fingerprint", "parent"):
        if (saved or {}).get("provenance", {}).get(what) != now["provenance"].get(what):
            changed.append({"data_fingerprint": "other data", "parent": "--init-from"}[what])
    if changed:
        raise DataError(f"{path}: a run with other options: {', '.join(changed)}. --fresh replaces "
                        "it, --name OTHER trains beside it")


def what_was_in(loader, problem, salt_file):
    """The patients (hashed) and the ranges of the fields of a batch, in a sentence."""
    from training_header import hash_patients, read_salt
    dataset, order, items = loader.dataset, loader.sampler, []
    for number in problem.batches:
        order.set_epoch(problem.epoch, number)
        items.append(next(iter(order)))
    segments = dataset.segments(np.concatenate(items))
    patients = dataset.index.patients[np.unique(dataset.index.segment_patients()[segments])]
    hashes = hash_patients(patients.tolist(), read_salt(salt_file))
    ranges = []
    for key, values in zip(dataset.keys_to_load, dataset.read(segments)):
        bad = int((~values.isfinite()).sum())
        ranges.append(f"{key} {float(values.min()):.4g} to {float(values.max()):.4g}"
                      + (f" ({bad} not finite)" if bad else ""))
    return (f"Its {len(segments)} segments: {', '.join(ranges)}; of the patients "
            f"{', '.join(hashes[:20])}{' …' if len(hashes) > 20 else ''} "
            "(python datasets.py FILE --who HASH names them)")


def build(options, datasets, parent):
    """The normalised network (fresh, or the parent's), the loaders, the device."""
    from training_header import (
        NormalisedModel,
        choose_device,
        distributed,
        fit_normaliser,
        get_model_v3,
        init_steady,
        load_model,
        make_loader,
        reset_all_seeds,
    )
    device = choose_device(options.device)
    reset_all_seeds(options.seed)
    if parent:
        model = load_model(parent)
    else:
        network = get_model_v3(len(options.keys) - 2)
        if options.init == "steady":
            init_steady(network)
        model = NormalisedModel(network, options.keys,
                                fit_normaliser(datasets["train"], options.keys[1:]))
    rank, world = distributed()
    workers = (4 if device.type == "cuda" else 0) if options.workers is None else options.workers
    loaders = [make_loader(datasets[name], options.batch_size * world, shuffle=name == "train",
                           seed=options.seed, workers=workers, pin_memory=device.type == "cuda",
                           rank=rank, world=world) for name in ("train", "tune")]
    return model, loaders, device


def train(options, model, loaders, device, description):
    from training_header import StepLR, training_loop

    def on_epoch(log):
        with atomic_path(f"runs/{options.name}_log.csv") as temporary:
            with open(temporary, "w") as file:
                file.write(",".join(log[0]) + "\n")
                file.writelines(",".join(f"{v:.6g}" for v in row.values()) + "\n" for row in log)
        row = log[-1]
        left = row["seconds"] / row["epoch"] * (options.epochs - row["epoch"])
        print(f"epoch {row['epoch']}/{options.epochs}: RMSE train {row['train_loss'] ** 0.5:.2f}, "
              f"tune {row['tune_loss'] ** 0.5:.2f} mmHg (best: epoch {row['best_epoch']}), "
              f"{row['seconds'] / 60:.1f} min, {left / 60:.1f} min left", flush=True)

    weigh = None
    if options.weight_labels:
        se = loaders[0].dataset.column("p_crit_se")
        usual = se.median() ** 2        # beside it: no label weighs more than twice the usual one
        mean = (1 / (usual + se ** 2)).mean()

        def weigh(se):
            return 1 / (usual.to(se.device) + se ** 2) / mean.to(se.device)

    return training_loop(
        model, *loaders, total_epochs=options.epochs, lr=options.lr,
        weight_decay=options.weight_decay, l1_reg=options.l1, early_stopping=options.early_stopping,
        scheduler_and_args=[StepLR, {"step_size": options.lr_step, "gamma": options.lr_gamma}],
        gradient_accumulation=options.accumulate, device=device, amp=options.amp,
        compiled=options.compiled, on_epoch=on_epoch, weigh=weigh,
        resume_path=resume_path(options), experiment=description,
        checkpoint_minutes=options.checkpoint_minutes)


def describe(options, index, parts, datasets, origin, salt_file, parent):
    """What the checkpoint says of the run: options, hashed split, provenance; no paths or names."""
    from training_header import distributed, hash_patients, read_salt, salt_mark
    left_out = ("data", "salt_file", "name", "device", "workers", "keep_index", "init_from",
                "fresh", "checkpoint_minutes")
    salt = read_salt(salt_file)
    fingerprint, parent_print, ancestors = hashlib.sha256(), None, {}
    if parent:
        parent_print = hashlib.sha256()
        for weights in parent["model"].values():
            parent_print.update(weights.numpy().tobytes())
        parent_print = parent_print.hexdigest()
        ancestors = {"ancestors": sorted(set().union(
            *(hashes for part, hashes in parent["split"].items() if part != "test")))}
    for one in (index.rows, index.starts, datasets["train"].column(options.keys[-1]).numpy()):
        fingerprint.update(one.tobytes())
    return {
        "model_args": parent["model_args"] if parent else {"num_discrete": len(options.keys) - 2},
        "config": dict({k: v for k, v in vars(options).items() if k not in left_out},
                       processes=distributed()[1]),
        "split": {**ancestors, **{name: hash_patients(part.patients.tolist(), salt)
                                  for name, part in parts.items()}},
        "provenance": {
            "origin": origin, "data_fingerprint": fingerprint.hexdigest(),
            "parent": parent_print, "salt": salt_mark(salt), "n_patients": index.n_patients,
            "n_segments": len(index),
            "versions": versions(), "git_revision": git_revision(),
            "seeds": {"seed": options.seed, "split_seed": options.split_seed}}}


def save_and_report(options, model, trajectory, description, datasets, data, salt_file):
    """Writes the checkpoint, scores it on the test patients as `evaluate.py` does, and draws."""
    import torch

    from training_header import save_checkpoint, save_tensors
    path = f"runs/{options.name}.pth"
    write_json(f"runs/{options.name}_run.json", {
        "_": "PRIVATE: paths of this machine; do not share",
        "data": [os.path.realpath(p) for p in data], "salt_file": os.path.realpath(salt_file)})
    save_tensors(f"runs/{options.name}_trajectory.pth",
                 {k: torch.from_numpy(values) for k, values in trajectory.items()})
    calibration = make_calibration(model, datasets["train"], datasets["tune"],
                                   device=options.device)
    save_checkpoint(path, model, **description, calibration=calibration)
    results, arrays = evaluate(path, device=options.device)
    save_checkpoint(path, model, **description, calibration=calibration, metrics=results)
    write_json(f"runs/{options.name}_metrics.json", results)
    loss_lr_plot(trajectory, FIGURES[0], results["note"])
    draw_histogram(results, arrays, FIGURES[1])
    print_results(results)
    os.remove(resume_path(options))     # last: until here the same command would go on
    print(f"wrote {path}, its trajectory, log and metrics beside it, and figures_resnet/*.png")


if __name__ == "__main__":
    from training_header import CheckpointError, DataError, TrainingError
    sys.exit(run_script(main, CheckpointError, DataError, TrainingError))
