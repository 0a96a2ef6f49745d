"""What every experiment needs: device, normalised model, checkpoint, `training_loop`.

    from training_header import *           # and with it models.py and datasets.py

`load_model(path)` gives a network that takes raw units and returns mmHg; evaluating, predicting and
exporting go through it and nothing else.
"""
import ctypes
import hashlib
import math
import os
import zipfile
from contextlib import nullcontext

import numpy as np
import torch
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, ReduceLROnPlateau, StepLR

from datasets import (
    DEFAULT_CONDITION,
    FS,
    PARTS,
    SEGMENT_SAMPLES,
    SEGMENT_SECONDS,
    DataError,
    DatasetIndex,
    TPP_PPG_dataset,
    create_dataset_index,
    fit_normaliser,
    get_gate,
    kept_dataset_index,
    load_dataset_index,
    make_loader,
    split_index,
    split_patients,
)
from models import (
    ConvBlock,
    MyFirstResNet,
    ResBlockV1,
    ResBlockV2,
    ResBlockV3,
    get_model_v3,
    init_steady,
    receptive_field,
)
from tk_utils import atomic_path, progress, reset_all_seeds, write_json

__all__ = [      # noqa: F822 - DEVICE comes from __getattr__
    "DEFAULT_CONDITION", "DEVICE", "FS", "PARTS", "SEGMENT_SAMPLES", "SEGMENT_SECONDS",
    "CheckpointError", "ConvBlock", "CosineAnnealingLR", "DataError", "DatasetIndex",
    "MyFirstResNet", "NormalisedModel", "ReduceLROnPlateau", "ResBlockV1", "ResBlockV2",
    "ResBlockV3", "StepLR", "TPP_PPG_dataset", "TrainingError", "atomic_path", "choose_device",
    "compile_or_not", "create_dataset_index", "fit_normaliser", "get_gate", "get_model_v3",
    "hash_patients", "init_steady", "kept_dataset_index", "load_checkpoint",
    "load_dataset_index", "load_model", "make_loader", "predict_dataset", "progress", "read_salt",
    "receptive_field", "reset_all_seeds", "salt_mark", "save_checkpoint", "split_index",
    "split_patients", "training_loop", "write_json",
]


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the message is one line."""


class TrainingError(ValueError):
    """Training cannot go on; the message is one line."""


# ------------------------------------------------------------------------------------------- device

def choose_device(name=None):
    """The `torch.device` of a name such as 'cpu' or 'cuda:1'; None: CUDA where there is one."""
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:     # torch without CUDA asserts
        reason = (str(error).splitlines() or ["not available"])[0]
        raise TrainingError(f"device {name!r} cannot be used here ({reason})") from None
    return device


def __getattr__(name):
    if name == "DEVICE":        # computed when it is first asked for: importing touches no GPU
        globals()["DEVICE"] = choose_device()
        return globals()["DEVICE"]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def torch_version():
    """(major, minor) of PyTorch."""
    return tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])


def keep_freed_memory():
    """On CPU with glibc: freed activations stay with the process, not returned to the system.

    A training step frees and takes the same few hundred megabytes again; by default each is
    unmapped and faulted in anew, a quarter of the step's time. (mallopt's parameters: malloc.h.)
    """
    m_trim_threshold, m_mmap_max = -1, -4
    libc = ctypes.CDLL(None) if os.name == "posix" else None
    if libc is not None and hasattr(libc, "gnu_get_libc_version"):
        libc.mallopt(m_mmap_max, 0)
        libc.mallopt(m_trim_threshold, 2 ** 31 - 1)


# ----------------------------------------------------------------------------- model and checkpoint

class NormalisedModel(nn.Module):
    """Raw units in, mmHg out: `model(ppg [B, 1, L] in any scale, *vitals [B]) -> [B, outputs]`.

    keys: as given to `TPP_PPG_dataset`, the PPG first and the label last. normaliser: {key:
    {'mean', 'sd', …}} of vitals and label over the train split (`fit_normaliser`). Each PPG segment
    is normalised by its own mean and SD: monitors differ in scale, and the network's zero padding
    would turn an offset into an edge.
    """

    def __init__(self, network, keys, normaliser):
        super().__init__()
        if keys[0] != "ppg" or len(keys) != network.num_discrete + 2:
            raise DataError(f"keys {', '.join(keys)}: expected ppg, {network.num_discrete} vitals "
                            "and a label")
        self.network, self.keys, self.normaliser = network, list(keys), normaliser
        # Not persistent: the network's own state dict keeps the published names and nothing else.
        for name, part in (("vital", keys[1:-1]), ("label", keys[-1:])):
            for what in ("mean", "sd"):
                values = torch.tensor([normaliser[k][what] for k in part], dtype=torch.float32)
                self.register_buffer(f"{name}_{what}", values, persistent=False)

    def forward(self, ppg, *vitals):
        ppg = ppg - ppg.mean(-1, keepdim=True)
        # a flat segment stays flat instead of dividing by nothing
        ppg = ppg / ppg.pow(2).mean(-1, keepdim=True).sqrt().clamp_min(1e-12)
        vitals = [(v - self.vital_mean[i]) / self.vital_sd[i] for i, v in enumerate(vitals)]
        return self.network(ppg, *vitals) * self.label_sd + self.label_mean


def save_checkpoint(path, model, model_args, config, split, provenance, metrics=None):
    """Writes a `NormalisedModel` and what it takes to understand it later, whole or not at all."""
    weights = model.network.state_dict()
    with atomic_path(path) as temporary:
        torch.save({
            "model": {k: v.detach().cpu().contiguous() for k, v in weights.items()},
            "model_args": model_args, "keys": model.keys, "normaliser": model.normaliser,
            "config": config, "split": split, "provenance": provenance, "metrics": metrics or {},
        }, temporary)


def load_checkpoint(path):
    """The dictionary of a checkpoint; only tensors and plain values are ever unpickled.

    Raises CheckpointError for a missing file and for one that is no checkpoint of this project.
    """
    if not os.path.exists(path):
        raise CheckpointError(f"{path}: no such checkpoint (python train_resnet.py makes one)")
    if not zipfile.is_zipfile(path):
        raise CheckpointError(f"{path}: not a checkpoint (expected a zip file of torch.save)")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # noqa: BLE001 - a foreign file fails in the unpickler in many ways
        reason = (str(error).splitlines() or [""])[0][:200]
        raise CheckpointError(f"{path}: not a checkpoint ({type(error).__name__}: "
                              f"{reason})") from None
    expected = {"model": dict, "model_args": dict, "keys": list, "normaliser": dict, "config": dict,
                "split": dict, "provenance": dict, "metrics": dict}
    for key, kind in expected.items():
        if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get(key), kind):
            raise CheckpointError(f"{path}: not a checkpoint of this project (no {kind.__name__} "
                                  f"{key!r})")
    return checkpoint


def load_model(path, device=None):
    """The model of a checkpoint (a path, or what `load_checkpoint` gave), ready to predict.

    Returns a `NormalisedModel` in evaluation mode: raw units in, mmHg out.
    """
    checkpoint = path if isinstance(path, dict) else load_checkpoint(path)
    name = "the checkpoint" if isinstance(path, dict) else path
    try:
        network = get_model_v3(**checkpoint["model_args"])
        network.load_state_dict(checkpoint["model"], strict=True)
        model = NormalisedModel(network, checkpoint["keys"], checkpoint["normaliser"])
    except (RuntimeError, TypeError, ValueError, KeyError, AttributeError, IndexError) as error:
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(f"{name}: the saved weights and settings do not fit "
                              f"({reason})") from None
    return model.to(device or "cpu").eval()


def read_salt(path):
    """The project's salt for hashing patients; made on first use, readable by the owner alone."""
    try:
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(handle, "w") as out:
            out.write(os.urandom(16).hex() + "\n")
    except FileExistsError:
        pass
    with open(path, encoding="ascii", errors="replace") as saved:
        salt = saved.read().strip()
    if len(salt) != 32:
        raise DataError(f"{path}: expected a salt of 32 characters")
    return salt


def hash_patients(patients, salt):
    """Patients' names as salted hashes, which may leave the hospital."""
    return [hashlib.sha256(f"{salt}/{patient}".encode()).hexdigest()[:16] for patient in patients]


def salt_mark(salt):
    """Tells whether two salts are the same without giving them away: kept in the checkpoint."""
    return hashlib.sha256(f"salt {salt}".encode()).hexdigest()[:16]


# ----------------------------------------------------------------------------------------- training

def distributed():
    """(rank, number of processes) under torchrun, else (0, 1)."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return 0, 1


def reduce_sum(tensor):
    """The sum of a tensor over all processes."""
    if distributed()[1] > 1:
        torch.distributed.all_reduce(tensor)
    return tensor


def shrink_weights(parameters, amount):
    """The proximal step of an L1 penalty: weights move towards zero by `amount` and stop there.

    Biases and norms (one-dimensional) are left alone.
    """
    with torch.no_grad():
        for p in parameters:
            if p.dim() > 1:
                p.copy_(torch.nn.functional.softshrink(p, amount))


def compile_or_not(model):
    """A function like `model`, compiled when first called.

    Where no compiler works, it says so in a line and goes on with the model as it is.
    """
    compiled = []

    def forward(*inputs):
        if not compiled:
            try:
                compiled.append(torch.compile(model))
                return compiled[0](*inputs)
            except Exception as error:  # noqa: BLE001 - a missing compiler shows in many ways
                reason = (str(error).splitlines() or [""])[0][:120]
                print(f"--compile does not work here ({type(error).__name__}: {reason}); "
                      "going on without", flush=True)
                compiled[:] = [model]
        return compiled[0](*inputs)

    return forward


def backward_group(forward, group, device, loss_sum, amp_context, scaler):
    """Gradients of the mean loss over the batches of a group, as if they were one batch.

    Returns each batch's summed loss (on the device: reading it would make the host wait) and rows.
    """
    _, world = distributed()
    count = sum(len(batch[-1]) for batch in group)
    if world > 1:
        count = reduce_sum(torch.tensor(float(count), device=device))
    sums = []
    for i, batch in enumerate(group):
        *inputs, label = [t.to(device, non_blocking=True) for t in batch]
        wait = world > 1 and i < len(group) - 1         # processes exchange gradients once a step
        with forward.no_sync() if wait else nullcontext():
            with amp_context():
                out = forward(*inputs)
            loss = loss_sum(out[:, 0].to(label.dtype), label)
            share = loss * world / count                # processes' gradients are averaged
            (scaler.scale(share) if scaler else share).backward()
        sums.append(loss.detach())
    return sums, [len(batch[-1]) for batch in group]


def mean_losses(sums, rows, device):
    """(mean over the segments of all processes, [each batch's]) of batches' summed losses, rows."""
    totals = reduce_sum(torch.tensor([float(sum(sums)), sum(rows)], dtype=torch.float64,
                                     device=device))
    return float(totals[0] / totals[1]), (torch.stack(sums).cpu() / torch.tensor(rows)).tolist()


def run_epoch(forward, loader, device, loss_sum, amp_context):
    """Mean loss over a loader's segments, and each batch's, without gradients."""
    sums, rows = [], []
    with torch.no_grad():
        for batch in loader:
            *inputs, label = [t.to(device, non_blocking=True) for t in batch]
            with amp_context():
                out = forward(*inputs)
            sums.append(loss_sum(out[:, 0].to(label.dtype), label))
            rows.append(len(label))
    return mean_losses(sums, rows, device)


def training_loop(model, train_loader, val_loader, total_epochs, lr, weight_decay=0, l1_reg=0,
                  early_stopping=-1, scheduler_and_args=None, warmup_epochs=0,
                  gradient_accumulation=1, optimizer_type=None, criterion="mse", batch_cosine=False,
                  checkpoints_name=None, verbose=False, gradient_clipping=None, pbar_momentum=0.95,
                  device=None, repeat_val=1, *, amp=None, compiled=False, on_epoch=None):
    """Trains `model` and returns (the model with its best weights, trajectories).

    Loaders yield (ppg [B, 1, L], vitals [B]…, label [B]); `model(ppg, *vitals)` gives [B, 1].
    The best epoch is the one of the lowest tune loss. Options beside the obvious:
    l1_reg: after each step weights (not biases or norms) shrink by lr * l1_reg and stop at zero.
    early_stopping: stop after so many epochs without improvement; -1 never.
    scheduler_and_args: [class, {arguments}] of StepLR, CosineAnnealingLR (stepped by batch with
    batch_cosine) or ReduceLROnPlateau. warmup_epochs: the rate rises linearly from a tenth first.
    gradient_accumulation: one step for so many batches, equal to one batch of their size; clipping
    acts on the accumulated gradient. checkpoints_name: also save each epoch's state dict as
    `<checkpoints_name>_<epoch>.pth`. repeat_val: passes over the tune loader (level 'patient' draws
    anew). amp: 'bf16' or 'fp16' autocast. compiled: through `torch.compile`. on_epoch: called with
    a dictionary after each epoch.
    Trajectories are arrays: batch_train_loss, epoch_train_loss, batch_val_loss, epoch_val_loss, lr.
    Under torchrun each process passes its own share of the segments; gradients and losses are those
    of all. Raises TrainingError when the loss is not finite.
    """
    losses = {"mse": nn.MSELoss(reduction="sum"), "l1": nn.L1Loss(reduction="sum")}
    if criterion not in losses:
        raise TrainingError(f"criterion {criterion!r}: expected 'mse' or 'l1'")
    if batch_cosine and (not scheduler_and_args or scheduler_and_args[0] is not CosineAnnealingLR):
        raise TrainingError("batch_cosine needs scheduler_and_args=[CosineAnnealingLR, {…}]")
    if len(train_loader) == 0 or len(val_loader) == 0:
        raise TrainingError("the train or the tune loader is empty")
    if total_epochs < 1:
        raise TrainingError(f"total_epochs {total_epochs}: expected at least 1")
    loss_sum = losses[criterion]
    device = device if isinstance(device, torch.device) else choose_device(device)
    if device.type == "cpu":
        keep_freed_memory()
    else:
        torch.set_float32_matmul_precision("high")      # TF32
        torch.backends.cudnn.allow_tf32 = True
    rank, world = distributed()
    model.to(device)
    forward = compile_or_not(model) if compiled and world == 1 else model
    if world > 1:
        forward = nn.parallel.DistributedDataParallel(torch.compile(model) if compiled else model)
    parameters = [p for p in model.parameters() if p.requires_grad]
    # one kernel for all parameters, where PyTorch has it: everywhere on CUDA, from 2.4 on CPU
    fused = optimizer_type is None and (device.type == "cuda" or torch_version() >= (2, 4))
    optimizer = (optimizer_type or torch.optim.Adam)(
        parameters, lr=lr, weight_decay=weight_decay, **({"fused": True} if fused else {}))
    scheduler = None
    if scheduler_and_args:
        scheduler = scheduler_and_args[0](optimizer, **scheduler_and_args[1])
    warmup = LinearLR(optimizer, 0.1, 1.0, warmup_epochs) if warmup_epochs else None
    dtypes = {None: None, "bf16": torch.bfloat16, "fp16": torch.float16}
    if amp not in dtypes:
        raise TrainingError(f"amp {amp!r}: expected 'bf16' or 'fp16'")
    scaler = torch.cuda.amp.GradScaler() if amp == "fp16" and device.type == "cuda" else None

    def amp_context():
        return torch.autocast(device.type, dtypes[amp]) if amp else nullcontext()

    trajectories = {name: [] for name in ("batch_train_loss", "epoch_train_loss", "batch_val_loss",
                                          "epoch_val_loss", "lr")}
    best_loss, best_epoch, best_weights = math.inf, 0, None
    read_every = 1 if device.type == "cpu" else 50          # reading a loss makes the host wait
    for epoch in range(total_epochs):
        for loader in (train_loader, val_loader):
            if hasattr(loader.sampler, "set_epoch"):
                loader.sampler.set_epoch(epoch)
        model.train()
        sums, rows, group, steps, shown = [], [], [], 0, None
        bar = progress(train_loader, desc=f"epoch {epoch + 1}/{total_epochs}", disable=rank > 0)
        for number, batch in enumerate(bar, 1):
            group.append(batch)
            if len(group) < gradient_accumulation and number < len(train_loader):
                continue
            group_sums, group_rows = backward_group(forward, group, device, loss_sum, amp_context,
                                                    scaler)
            sums += group_sums
            rows += group_rows
            if scaler:
                scaler.unscale_(optimizer)
            if gradient_clipping is not None:
                nn.utils.clip_grad_norm_(parameters, gradient_clipping)
            scaler.step(optimizer) if scaler else optimizer.step()
            if scaler:
                scaler.update()
            optimizer.zero_grad(set_to_none=True)
            if l1_reg:
                shrink_weights(parameters, optimizer.param_groups[0]["lr"] * l1_reg)
            if batch_cosine and epoch >= warmup_epochs:
                for _ in group:
                    scheduler.step()
            group, steps = [], steps + 1
            if steps % read_every == 0 or number == len(train_loader):
                loss_now = float(sums[-1]) / max(1, rows[-1])
                if not math.isfinite(loss_now):
                    raise TrainingError(f"the training loss is {loss_now} at epoch {epoch + 1}, "
                                        f"batch {number}; a lower --lr or clipping may help")
                shown = loss_now if shown is None else (pbar_momentum * shown
                                                        + (1 - pbar_momentum) * loss_now)
                bar.set_postfix_str(f"loss {shown:.4g}", refresh=False)
        train_loss, batches = mean_losses(sums, rows, device)
        trajectories["batch_train_loss"] += batches

        model.eval()
        val_losses = []
        for repeat in range(repeat_val):
            if repeat and hasattr(val_loader.sampler, "set_epoch"):
                val_loader.sampler.set_epoch(epoch + total_epochs * repeat)
            mean, batches = run_epoch(model, val_loader, device, loss_sum, amp_context)
            val_losses.append(mean)
            trajectories["batch_val_loss"] += batches
        val_loss = float(np.mean(val_losses))
        if not math.isfinite(val_loss):
            raise TrainingError(f"the tune loss is {val_loss} after epoch {epoch + 1}")
        trajectories["epoch_train_loss"].append(train_loss)
        trajectories["epoch_val_loss"].append(val_loss)
        trajectories["lr"].append(optimizer.param_groups[0]["lr"])
        if val_loss < best_loss:
            best_loss, best_epoch = val_loss, epoch
            best_weights = {k: v.detach().clone() for k, v in model.state_dict().items()}
        if epoch < warmup_epochs:
            warmup.step()
        elif isinstance(scheduler, ReduceLROnPlateau):
            scheduler.step(val_loss)
        elif scheduler is not None and not batch_cosine:
            scheduler.step()
        if rank == 0:
            if checkpoints_name is not None:
                with atomic_path(f"{checkpoints_name}_{epoch + 1}.pth") as temporary:
                    torch.save(model.state_dict(), temporary)
            if on_epoch is not None:
                on_epoch({"epoch": epoch + 1, "train_loss": train_loss, "tune_loss": val_loss,
                          "lr": trajectories["lr"][-1], "best_epoch": best_epoch + 1})
            if verbose:
                print(f"epoch {epoch + 1}/{total_epochs}: train loss {train_loss:.4g}, tune loss "
                      f"{val_loss:.4g}, best {best_loss:.4g} (epoch {best_epoch + 1})", flush=True)
        if 0 < early_stopping <= epoch - best_epoch:
            break
    model.load_state_dict(best_weights)
    return model.cpu(), {name: np.array(values) for name, values in trajectories.items()}


def predict_dataset(model, dataset, batch_size=256, device=None, workers=0):
    """Predictions in mmHg, [N] float32, for the segments of a dataset in its order."""
    device = device or choose_device()
    if device.type == "cpu":
        keep_freed_memory()
    model.to(device).eval()
    loader = make_loader(dataset, batch_size, workers=workers, pin_memory=device.type == "cuda")
    out = []
    with torch.no_grad():
        for batch in progress(loader, desc="predicting"):
            inputs = [t.to(device, non_blocking=True) for t in batch[:len(model.keys) - 1]]
            out.append(model(*inputs)[:, 0])
    return torch.cat(out).cpu().numpy()
