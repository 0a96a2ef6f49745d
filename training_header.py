"""What every experiment needs: device, normalised model, losses, `training_loop`, prediction.

    from training_header import *           # and with it models, datasets and checkpoints

    train, tune = (TPP_PPG_dataset(parts[name], "segment", keys) for name in ("train", "tune"))
    model = NormalisedModel(MyNet(), keys, fit_normaliser(train, keys[1:]))
    model, trajectories = training_loop(model, make_loader(train, 64, shuffle=True),
                                        make_loader(tune, 64), total_epochs=10, lr=1e-3)
    save_checkpoint("runs/mine.pth", model)
    tpp = predict_dataset(load_model("runs/mine.pth", network=MyNet()), tune)     # [N] mmHg

A network is any `nn.Module` with `forward(ppg [B, 1, 3600], *vitals [B]) -> [B, 1]`; a loss is any
callable `(prediction [B], label [B])` that returns [B] or a scalar. Needs anchor.py, checkpoint.py,
models.py, kernels.py, cuda_graph.py, datasets.py, loaders.py and tk_utils.py.
"""
# ruff: noqa: F401, I001 - imported names are exported for `from training_header import *`
import math
import os
import random
import signal
import threading
import time
from contextlib import contextmanager, nullcontext
from functools import partial
from itertools import islice
from types import SimpleNamespace
from typing import Callable, Dict, List, NamedTuple, Optional, Tuple

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import (
    CosineAnnealingLR, LinearLR, OneCycleLR, ReduceLROnPlateau, StepLR)

import kernels
from anchor import (
    blend, cross_validate, fit_anchor, fit_rows, kept_shares, predict_with_anchor,
    pulse_statistics, read_columns, read_pulse, shown_share, subsample)
from checkpoint import (
    CheckpointError, build_network, hash_patients, load_by_name, load_checkpoint, load_tensors,
    read_salt, save_checkpoint, save_tensors)
from datasets import (
    FS, PARTS, SEGMENT_SAMPLES, DataError, TPP_PPG_dataset, create_dataset_index, fit_normaliser,
    load_dataset_index, split_index, vitals_of)
from loaders import make_loader
from models import (
    MODELS, ConvBlock, MyFirstResNet, ResBlockV1, ResBlockV2, ResBlockV3, get_model_v3)
from tk_utils import one_line, printable, progress, reset_all_seeds


class TrainingError(ValueError):
    """Training cannot continue; the message is one line."""


class NonFiniteLoss(TrainingError):
    """The loss of a step is not finite: in `epoch`, in one of `batches` (their numbers)."""

    def __init__(self, message, epoch, batches):
        super().__init__(message)
        self.epoch, self.batches = epoch, batches


class Interrupted(Exception):
    """Training was asked to stop and has saved its state; the message is one line."""


# ------------------------------------------------------------------------------------------- device

def choose_device(name=None) -> torch.device:
    """The device with a name such as 'cuda:1' (None: CUDA if present). Raises TrainingError."""
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with one_line(f"device {str(name)!r}", TrainingError):
        return torch.zeros(1, device=name).device


def distributed() -> Tuple[int, int]:
    """(rank, number of processes) under torchrun, else (0, 1)."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return 0, 1


def reduce_sum(tensor: torch.Tensor) -> torch.Tensor:
    """The sum of a tensor over all processes."""
    if distributed()[1] > 1:
        torch.distributed.all_reduce(tensor)
    return tensor


# ------------------------------------------------------------------------------------------- losses

class Loss(NamedTuple):
    """What training minimises: function(prediction [B], label [B]) -> [B] or a scalar.

    unit: of the mean loss, for messages; label: for the plot. outputs: with 2 the prediction is
    [B, 2], the estimate and its spread (SD). power: the gradient grows with the label's SD to this
    power; used to scale clipping.
    """
    function: Callable
    unit: str
    label: str
    outputs: int = 1
    power: int = 2


def likelihood_loss(prediction: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
    """Gaussian negative log likelihood [B] (without its constant) of an estimate and its spread.

    Its gradient is weighted by twice the variance, so that the estimate learns as with the squared
    error, also where the spread is wide (Seitzer et al. 2022, arXiv 2203.09168, beta 1).
    """
    estimate, spread = prediction.unbind(1)
    each = spread.log() + 0.5 * ((label - estimate) / spread) ** 2
    weighted = each * (2 * spread.detach() ** 2)
    return weighted + (each - weighted).detach()        # value of `each`, gradient of `weighted`


LOSSES = {
    "mse": Loss(partial(F.mse_loss, reduction="none"), "mmHg²", "Loss, MSE (mmHg²)"),
    "l1": Loss(partial(F.l1_loss, reduction="none"), "mmHg", "Loss, mean absolute error (mmHg)",
               power=1),
    # squared up to 5 mmHg, about the network's error; linear beyond, for outliers
    "huber": Loss(partial(F.huber_loss, reduction="none", delta=5.0), "mmHg²",
                  "Loss, Huber, δ = 5 mmHg (mmHg²)"),
    "nll": Loss(likelihood_loss, "nats", "Loss, −log likelihood (nats)", outputs=2),
}


def choose_loss(criterion) -> Loss:
    """The `Loss` for a name in LOSSES, 'my_losses.py:name', or any callable."""
    found = criterion if isinstance(criterion, Loss) else load_by_name(criterion, LOSSES, "--loss")
    name = getattr(found, "__name__", type(found).__name__)
    if isinstance(found, type):
        raise TrainingError(f"loss {name}: expected a function (prediction, label); got a class: "
                            f"give an instance of it, such as {name}()")
    return found if isinstance(found, Loss) else Loss(found, "", f"Loss, {name}")


# ------------------------------------------------------------------------------------------- model

MIN_SPREAD = 0.01       # lower bound on the predicted SD, which divides; in SDs of the label


def segment_normalised(ppg: torch.Tensor) -> torch.Tensor:
    """[B, 1, L], each segment by its own mean and SD; a flat segment stays flat. Monitors differ in
    gain and offset, and the network's zero padding would turn an offset into an edge."""
    ppg = ppg - ppg.mean(-1, keepdim=True)
    return ppg / ppg.pow(2).mean(-1, keepdim=True).sqrt().clamp_min(1e-12)


# Chosen by name; the checkpoint stores the name.
PPG_NORMALISATIONS = {"segment": segment_normalised, "none": lambda ppg: ppg}


class NormalisedModel(nn.Module):
    """Raw units in, mmHg out: `model(ppg [B, 1, L] in any scale, *vitals [B]) -> [B, 1]`.

    network: any nn.Module for normalised inputs. keys: as given to `TPP_PPG_dataset`, the PPG first
    (or absent) and the label last. normaliser: {key: {'mean', 'sd', …}} of vitals and label over
    the train split (`fit_normaliser`). anchor: see `fit_anchor`; the network then learns what the
    PPG adds to it. inputs: those of the network, if it takes more than the keys give; the others
    are 0 (a flat PPG, the mean vital). A network with two outputs gives [B, 2]: estimate and spread
    (SD), mmHg. Attributes: the arguments, with_ppg, outputs (1 or 2), checkpoint. Raises DataError.
    """

    def __init__(self, network: nn.Module, keys: List[str], normaliser: Dict[str, dict],
                 ppg_normalisation: str = "segment", anchor: Optional[dict] = None,
                 inputs: Optional[List[str]] = None):
        super().__init__()
        if not isinstance(network, nn.Module):
            raise DataError(f"network: expected an instance of nn.Module, got {network!r:.100}")
        if ppg_normalisation not in PPG_NORMALISATIONS:
            raise DataError(f"PPG normalisation {ppg_normalisation!r}: expected "
                            f"{' or '.join(PPG_NORMALISATIONS)}")
        self.network, self.keys, self.normaliser = network, list(keys), normaliser
        self.ppg_normalisation, self.checkpoint = ppg_normalisation, None
        self.with_ppg, self.inputs = keys[0] == "ppg", list(inputs or keys[:-1])
        missing = [key for key in keys[self.with_ppg:] if key not in normaliser]
        if missing:
            raise DataError(f"normaliser lacks {', '.join(missing)}; pass them to fit_normaliser")
        self.set_anchor(anchor)
        self.outputs = self.try_network()

    def set_anchor(self, anchor: Optional[dict]) -> None:
        """Set the anchor; without one, the network learns the difference from the mean label.

        estimate = output * scale + offset + slopes @ normalised vitals + pulse statistics' part
        """
        vitals, label = vitals_of(self.keys), self.normaliser[self.keys[-1]]
        mean, sd = (np.array([self.normaliser[key][what] for key in vitals])
                    for what in ("mean", "sd"))
        ridge = anchor or {"coefficients": dict.fromkeys(vitals, 0.0), "intercept": label["mean"],
                           "sd": label["sd"]}
        weights = np.array([ridge["coefficients"][key] for key in vitals])
        offset = ridge["intercept"] + sum(weights * mean)
        pulse = ridge.get("statistics", {"low": [], "high": [], "coefficients": []})
        self.anchor, device = anchor, next(self.network.parameters(), torch.zeros(1)).device
        # Not persistent, so that the state dict has the published names and no others.
        buffers = {"vital_mean": mean, "vital_sd": sd, "slopes": weights * sd,
                   "scale": [ridge["sd"]], "offset": [offset],
                   **{f"pulse_{key}": values for key, values in pulse.items()}}
        for name, values in buffers.items():
            self.register_buffer(name, torch.tensor(values, dtype=torch.float32, device=device),
                                 persistent=False)

    def try_network(self) -> int:
        """The number of outputs, found by passing two flat segments through the network."""
        flat, training = torch.zeros(2, device=self.scale.device), self.network.training
        name, inputs = type(self.network).__name__, ", ".join(self.inputs)
        with one_line(f"inputs {inputs}: {name} does not take them", DataError), torch.no_grad():
            out = self.network.eval()(*self.complete({}, flat))
        self.network.train(training)
        shape = tuple(out.shape) if isinstance(out, torch.Tensor) else None
        if shape not in ((2, 1), (2, 2)):
            kind = f"shape {shape}" if shape else f"type {type(out).__name__}"
            raise DataError(f"{name}: an output of {kind} for two segments; expected a tensor "
                            "[B, 1], or [B, 2] with a spread")
        return shape[1]

    def normalise(self, inputs) -> List[torch.Tensor]:
        n_ppg = int(self.with_ppg)
        ppg, vitals = inputs[:n_ppg], inputs[n_ppg:]
        return ([PPG_NORMALISATIONS[self.ppg_normalisation](one) for one in ppg]
                + [(v - self.vital_mean[i]) / self.vital_sd[i] for i, v in enumerate(vitals)])

    def complete(self, given: Dict[str, torch.Tensor], zeros) -> List[torch.Tensor]:
        """The network's inputs: the given tensors, and zeros [B] for the others."""
        flat = zeros.view(-1, 1, 1).repeat(1, 1, SEGMENT_SAMPLES)
        return [given.get(key, flat if key == "ppg" else zeros) for key in self.inputs]

    def to_mmhg(self, out, inputs, normalised):
        estimate = out[:, :1] * self.scale + self.offset
        if self.anchor:
            for slope, vital in zip(self.slopes, normalised[int(self.with_ppg):]):
                estimate = estimate + slope * vital.view(-1, 1)
            if len(self.pulse_low):
                found = pulse_statistics(inputs[0]).clamp(self.pulse_low, self.pulse_high)
                estimate = estimate + (found * self.pulse_coefficients).sum(1, keepdim=True)
        if out.shape[1] == 1:
            return estimate
        return torch.cat([estimate, (F.softplus(out[:, 1:]) + MIN_SPREAD) * self.scale], 1)

    def forward(self, *inputs):
        given = normalised = self.normalise(inputs)
        if len(self.inputs) > len(inputs):
            zeros = torch.zeros_like(inputs[0][:, 0, 0] if self.with_ppg else inputs[0])    # [B]
            given = self.complete(dict(zip(self.keys, normalised)), zeros)
        return self.to_mmhg(kernels.accelerate(self.network)(*given), inputs, normalised)


def load_model(path_or_checkpoint, device=None, network=None) -> NormalisedModel:
    """The model of a checkpoint (a path, or the result of `load_checkpoint`), in evaluation mode.

    network: your own module, its class, or 'my_net.py:MyNet'. Raises CheckpointError.
    """
    saved, path = path_or_checkpoint, ""
    if not isinstance(saved, dict):
        saved, path = load_checkpoint(saved), f"{saved}: "
    try:
        model = NormalisedModel(build_network(saved, network), saved["keys"], saved["normaliser"],
                                saved["ppg_normalisation"], saved["anchor"], saved.get("inputs"))
    except (CheckpointError, DataError, KeyError) as error:
        raise CheckpointError(f"{path}{error}") from None
    model.checkpoint = saved
    return model.to(device or "cpu").eval()


def predict_dataset(model, dataset, batch_size=256, device=None, workers=0) -> np.ndarray:
    """Estimates in mmHg, [N] float32, for the segments of a dataset, in its order."""
    return predict_with_spread(model, dataset, batch_size, device, workers)[0]


def predict_with_spread(model, dataset, batch_size=256, device=None, workers=0):
    """(estimates [N], the network's SD [N] or None), mmHg, float32. DataError if not finite."""
    device = choose_device(device)
    kernels.prepare_device(device)      # always in TF32: the same scores in every process
    model.to(device).eval()
    loader = make_loader(dataset, batch_size, workers=workers, pin_memory=device.type == "cuda")
    n_inputs = len(model.keys) - 1
    outputs, predict = [], model
    with torch.no_grad():
        for batch in kernels.feed(progress(loader, desc="predicting", leave=False), device):
            if not outputs and len(loader) > 1:
                predict = kernels.capture_inference(predict, batch[:n_inputs])
            outputs.append(predict(*batch[:n_inputs]).float())
    estimates, *spread = torch.cat(outputs).cpu().numpy().T
    wrong = np.flatnonzero(~np.isfinite(estimates))
    if len(wrong):
        raise DataError(f"{dataset.place(wrong[0])}: the model's prediction is "
                        f"{estimates[wrong[0]]} ({len(wrong)} of {len(estimates)} segments; "
                        "damaged PPG or vitals?)")
    return estimates, spread[0] if spread else None


def fit_blend(model, train, tune, device=None) -> float:
    """Set the anchor to keep only as much of the pulse statistics and the network as helps.

    `shown_share` finds both shares, 0 to 1: first for the ridge on vitals and `pulse_statistics`,
    then for the network. The network's is found on the tune dataset, the statistics' also on train
    patients who are left out of the fit in turn. Return the network's share.
    """
    train, tune = subsample(train), subsample(tune)
    label, patients = tune.column(model.keys[-1]).numpy(), tune.index.segment_patients()
    plain = with_pulse = fit_anchor(train, model.keys)
    base, pulse_share = predict_with_anchor(plain, tune), 0.0
    if model.with_ppg:
        pulse = read_pulse(train)
        with_pulse = fit_anchor(train, model.keys, pulse)
        added = predict_with_anchor(with_pulse, tune) - base
        of_train = cross_validate(train, model.keys, pulse)
        of_tune = label - base, added, train.index.n_patients + patients    # after train patients
        pulse_share = shown_share(*map(np.concatenate, zip(of_train, of_tune)))
        base = base + pulse_share * added
    network = predict_dataset(model, tune, device=device).astype(np.float64)
    share = shown_share(label - base, network - base, patients)
    model.set_anchor(blend(model.anchor, plain, with_pulse, pulse_share, share))
    return share


def refit_anchor(model, train, tune) -> None:
    """Fit the ridges of `fit_blend` again, with the tune patients as well; keep the shares.

    Call it after `evaluate.make_calibration`: intervals need patients left out of the fit.
    """
    sets, blended = [subsample(train), subsample(tune)], model.anchor
    label, vitals = map(np.concatenate, zip(*(read_columns(one, model.keys) for one in sets)))
    pulses = [None, np.concatenate([read_pulse(one) for one in sets]) if model.with_ppg else None]
    ridges = (fit_rows(vitals_of(model.keys), vitals, label, pulse) for pulse in pulses)
    model.set_anchor({"refitted": True, **blend(
        blended["trained_on"], *ridges, blended["pulse_share"], blended["blend"])})


# ---------------------------------------------------------------------- training: parts of the loop

def batch_loss(network, batch, loss: Loss, bf16=False) -> torch.Tensor:
    """The loss summed over the segments of a batch (ppg, *vitals, label)."""
    *inputs, label = batch
    if len(label) == 0:     # this process's share of a short batch: gradients of 0 keep it in step
        return 0 * batch_loss(network, [t.new_zeros(1, *t.shape[1:]) for t in batch], loss, bf16)
    alone = distributed()[1] == 1       # if not, another process may have ended
    explain = one_line("the network fails on a batch", TrainingError) if alone else nullcontext()
    cast = torch.autocast(label.device.type, torch.bfloat16) if bf16 else nullcontext()
    with explain, cast:
        out = network(*inputs).to(label.dtype)
    if out.shape[:1] != label.shape or out.numel() != len(label) * loss.outputs:
        raise TrainingError(f"an output of shape {tuple(out.shape)}; expected [B, {loss.outputs}]")
    if torch.is_grad_enabled() and not out.requires_grad:
        raise TrainingError("the network's output does not depend on its parameters (detached?)")
    with one_line("the loss fails on a batch", TrainingError):
        each = loss.function(out.flatten() if loss.outputs == 1 else out, label)
    if not isinstance(each, torch.Tensor) or torch.is_grad_enabled() and not each.requires_grad:
        raise TrainingError(f"the loss, a {type(each).__name__}, has no gradient; expected a tensor"
                            " from the network's output, without detach(), item() or numpy()")
    if each.dim() and each.numel() != len(label):
        raise TrainingError(f"the loss has shape {tuple(each.shape)}; expected [B] or a scalar")
    return each.sum() if each.dim() else each * len(label)


def shrink_weights(parameters, amount) -> None:
    """The proximal step of an L1 penalty: move weights (not biases or norms, which have one
    dimension) towards zero by `amount`, a number or a tensor, and stop at zero."""
    with torch.no_grad():
        for p in parameters:
            if p.dim() > 1:
                p.sub_(p.clamp(-amount, amount))


def mean_loss(losses: torch.Tensor) -> float:
    """The mean over the segments of all processes; losses [2, batches]: sums and segment counts."""
    total, count = reduce_sum(losses.sum(1))
    return float(total / count)


def check_finite(losses: torch.Tensor, epoch: int, group_size: int) -> None:
    """Raise NonFiniteLoss, in all processes, if the loss of a batch is not finite."""
    bad = torch.nonzero(reduce_sum((~torch.isfinite(losses[0])).double())).flatten().tolist()
    if bad:
        start = bad[0] // group_size * group_size
        batches = list(range(start, min(start + group_size, losses.shape[1])))
        raise NonFiniteLoss(f"the training loss is not finite at epoch {epoch + 1}, batch "
                            f"{batches[-1] + 1}; a lower --lr or clipping may help", epoch, batches)


def losses_of(network, loader, loss: Loss, device, bf16) -> torch.Tensor:
    """The losses [2, batches] of one pass without training."""
    losses = torch.zeros(2, len(loader), dtype=torch.float64, device=device)
    with torch.no_grad():
        for number, batch in enumerate(kernels.feed(loader, device)):
            losses[0, number] = batch_loss(network, batch, loss, bf16)
            losses[1, number] = len(batch[-1])
    return losses


def begin_epoch(loader, epoch: int, first_batch: int = 0) -> None:
    """Tell a loader the epoch, if it can be told; our loaders can begin at any batch."""
    sampler = getattr(loader, "sampler", None)
    if hasattr(sampler, "first_batch"):
        sampler.set_epoch(epoch, first_batch)
    elif hasattr(sampler, "set_epoch"):
        sampler.set_epoch(epoch)


@contextmanager
def errors_in_one_line():
    """Raise TrainingError if memory is full or another process of the run has ended."""
    try:
        yield
    except (MemoryError, torch.cuda.OutOfMemoryError):
        raise TrainingError("out of memory: a smaller --batch-size needs less") from None
    except RuntimeError as error:
        if distributed()[1] == 1:
            raise
        raise TrainingError("this process cannot continue; if another process of the run ended, "
                            f"its message says why ({printable(error)[:200]})") from error


@contextmanager
def stop_signals():
    """A list to which received SIGINT and SIGTERM are added; a second SIGINT ends at once."""
    received, before = [], {}

    def take(number, _):
        received.append(number)
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    if threading.current_thread() is threading.main_thread():       # elsewhere Python refuses
        before = {number: signal.signal(number, take) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def any_rank(flag, device) -> bool:
    """Whether the flag is set in any process, so that all processes do the same."""
    return bool(reduce_sum(torch.tensor(float(flag), device=device)))


def save_state(path, run, losses, parts, experiment) -> None:
    """Save all that a run needs to continue to the same bits, with each process's own state."""
    rank, world = distributed()
    name, keys, *rest = np.random.get_state()
    own = {"losses": losses.cpu(), "python": random.getstate(),
           "numpy": [name, keys.tolist(), *rest], "torch": torch.get_rng_state(),
           "cuda": torch.cuda.get_rng_state_all()}
    ranks = [own] * world
    if world > 1:
        torch.distributed.all_gather_object(ranks, own)
    if rank == 0:
        save_tensors(path, {"run": vars(run), "ranks": ranks, "experiment": experiment,
                            "parts": {name: part.state_dict() for name, part in parts.items()}})


def load_state(path, run, losses, parts) -> None:
    """Restore the saved state, if there is one. Raises TrainingError if it does not fit."""
    rank, world = distributed()
    found = [load_tensors(path) if rank == 0 and os.path.exists(path) else None]
    if world > 1:
        torch.distributed.broadcast_object_list(found)
    saved = found[0]
    if saved is None:
        return
    with one_line(f"{path}: not the state of this run", TrainingError):
        vars(run).update(saved["run"])
        for name, part in parts.items():
            part.load_state_dict(saved["parts"][name])
        own = saved["ranks"][rank]
        losses.copy_(own["losses"])
        random.setstate(own["python"])
        np.random.set_state(tuple(own["numpy"]))
        torch.set_rng_state(own["torch"])
        if len(own["cuda"]) == torch.cuda.device_count():
            torch.cuda.set_rng_state_all(own["cuda"])


# ------------------------------------------------------------------------------- training: the loop

def training_loop(model: nn.Module, train_loader, val_loader, total_epochs: int, lr: float,
                  weight_decay=0, l1_reg=0, early_stopping=-1, scheduler_and_args=None,
                  warmup_epochs=0, gradient_accumulation=1, optimizer_type=None, criterion="mse",
                  batch_cosine=False, checkpoints_name=None, verbose=False, gradient_clipping=None,
                  pbar_momentum=0.95, device=None, repeat_val=1, *, precision=None, on_epoch=None,
                  resume_path=None, experiment=None, average_weights=0.0,
                  checkpoint_minutes=10) -> Tuple[nn.Module, Dict[str, np.ndarray]]:
    """Train `model`; return (the model with the weights of its best epoch, trajectories).

    Loaders yield (ppg [B, 1, L], vitals [B]…, label [B]); `model(ppg, *vitals)` returns [B, 1]. The
    best epoch has the lowest tune loss. Trajectories, arrays: batch_train_loss, epoch_train_loss,
    batch_val_loss, epoch_val_loss, lr. Parameters up to repeat_val are the published function's:

    l1_reg: after each step weights (not biases or norms) shrink by lr * l1_reg and stop at zero.
    early_stopping: stop after this many epochs without improvement; -1: never.
    scheduler_and_args: [class, {arguments}] of torch.optim.lr_scheduler; steps after each epoch.
    batch_cosine: the scheduler steps after each batch instead.
    warmup_epochs: the rate first rises linearly, from a tenth, over this many epochs.
    gradient_accumulation: make a step of this many batches, equal to one batch of their size.
    optimizer_type: Adam, or any class of torch.optim.
    criterion: a name in LOSSES, a `Loss`, or any callable.
    checkpoints_name: also save each epoch's state dict as <checkpoints_name>_<epoch>.pth.
    repeat_val: passes over the tune loader (level 'patient' draws anew).
    precision: 'float32', 'tf32' (on CUDA; the default) or 'bf16'.
    on_epoch: called after each epoch with the list of all rows so far, one dictionary an epoch.
    average_weights: average the weights over the last steps, this share of all; tune the average.
    resume_path: the file of the run's state, saved after each epoch, every checkpoint_minutes, and
    on SIGINT or SIGTERM (then raises Interrupted). If the file exists, training continues from it
    to the same bits (with loaders other than ours, from the start of the epoch).
    experiment: stored there, for the caller to compare.

    Under torchrun each process passes its own share of the segments; gradients and losses are those
    of all processes. Raises NonFiniteLoss and other TrainingErrors.
    """
    loss, device, (rank, world) = choose_loss(criterion), choose_device(device), distributed()
    if any(isinstance(one, torch.utils.data.Dataset) for one in (train_loader, val_loader)):
        raise TrainingError("expected a loader, make_loader(dataset, 16); got the dataset itself")
    n_batches, bf16, on_cuda = len(train_loader), precision == "bf16", device.type == "cuda"
    if precision not in (None, "float32", "tf32", "bf16"):
        raise TrainingError(f"precision {precision!r}: expected tf32, float32 or bf16")
    if n_batches == 0 or len(val_loader) == 0 or total_epochs < 1:
        raise TrainingError("nothing to train: no epochs, or the train or tune loader is empty")

    # model, optimiser, learning-rate schedule, average of the weights
    kernels.prepare_device(device, precision or "tf32")
    model = model.to(device)
    forward, no_sync = kernels.accelerate(model), nullcontext
    if world > 1:
        forward = nn.parallel.DistributedDataParallel(model)
        no_sync = forward.no_sync
    weights = [p for p in model.parameters() if p.requires_grad]
    if not weights:
        raise TrainingError("nothing to train: the network has no parameters")
    kind, options = optimizer_type or torch.optim.Adam, {}
    if kind in (torch.optim.Adam, torch.optim.AdamW) and (on_cuda or torch.__version__ >= "2.4"):
        options = {"fused": True, "capturable": on_cuda}        # one kernel for all parameters
    optimizer = kind(weights, lr=lr, weight_decay=weight_decay, **options)
    parts, scheduler, average = {"model": model, "optimizer": optimizer}, None, None
    if scheduler_and_args:
        kind, options = scheduler_and_args
        parts["scheduler"] = scheduler = kind(optimizer, **options)
    if warmup_epochs:
        parts["warmup"] = LinearLR(optimizer, 0.1, 1.0, warmup_epochs)
    if average_weights:
        parts["average"] = average = torch.optim.swa_utils.AveragedModel(model, use_buffers=True)

    def train_on(group):
        """Make an optimiser step for the mean loss over a group of batches; return their losses."""
        count, totals = sum(len(batch[-1]) for batch in group), []
        if world > 1:
            count = reduce_sum(torch.tensor(float(count), device=device))
        for number, batch in enumerate(group, 1):
            # once a step, the processes exchange their gradients and average them
            with no_sync() if number < len(group) else nullcontext():
                total = batch_loss(forward, batch, loss, bf16)
                (total * world / count).backward()
            totals.append(total.detach())
        if gradient_clipping is not None:
            nn.utils.clip_grad_norm_(weights, gradient_clipping)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if l1_reg:
            shrink_weights(weights, optimizer.param_groups[0]["lr"] * l1_reg)
        return tuple(totals)

    # the progress of the run; epoch and batches count those that are done
    run = SimpleNamespace(epoch=0, batches=0, best_loss=math.inf, best_epoch=0, best_weights=None,
                          stopped=False, seconds=0.0, log=[], train_losses=[], tune_losses=[])
    losses = torch.zeros(2, n_batches, dtype=torch.float64, device=device)
    resumable = hasattr(getattr(train_loader, "sampler", None), "first_batch")
    if resume_path:
        load_state(resume_path, run, losses, parts)
    started = time.monotonic() - run.seconds

    def saved():
        """For messages: where the same command continues."""
        if not resume_path or not (resumable or run.epoch):
            return "nothing is saved"
        return f"saved: the same command continues from {'here' if resumable else 'its last epoch'}"

    def show_progress(bar, shown, group):
        """Show the smoothed loss, the rate and the speed; returns the smoothed loss."""
        new = float(losses[0, run.batches - 1] / losses[1, run.batches - 1])
        shown = new if shown is None else pbar_momentum * shown + (1 - pbar_momentum) * new
        rate = optimizer.param_groups[0]["lr"]
        speed = (bar.format_dict["rate"] or 0) * len(group[-1][-1]) * world
        bar.set_postfix_str(f"loss {shown:.4g}, lr {rate:.2g}, {speed:,.0f} segments/s",
                            refresh=False)
        return shown

    def save_or_stop():
        """Within an epoch: save the state when due; on a signal, save and raise Interrupted."""
        seconds, stop = time.monotonic() - started, any_rank(len(signals), device)
        due = any_rank(seconds - run.seconds > 60 * checkpoint_minutes, device)
        if resume_path and resumable and (stop or due):
            run.seconds = seconds
            save_state(resume_path, run, losses, parts, experiment)
        if stop:
            raise Interrupted(f"interrupted at epoch {run.epoch + 1}, batch {run.batches} of "
                              f"{n_batches}; {saved()}")

    captured, read_every = None, 50 if on_cuda else 1       # to read a loss, the host has to wait
    with errors_in_one_line(), stop_signals() as signals:
        while run.epoch < total_epochs and not run.stopped:
            # train: an epoch, or the rest of one
            begin_epoch(train_loader, run.epoch, run.batches)
            batches, shown = kernels.feed(train_loader, device), None
            model.train()
            with progress(total=n_batches, initial=run.batches, disable=rank > 0,
                          desc=f"epoch {run.epoch + 1}/{total_epochs}") as bar:
                while group := list(islice(batches, gradient_accumulation)):
                    if gradient_accumulation == 1 and world == 1:
                        captured = captured or kernels.capture_step(
                            lambda *batch: train_on([batch]), group[0], model=model,
                            optimizer=optimizer)
                        totals = captured(*group[0])
                    else:
                        totals = train_on(group)
                    for batch, total in zip(group, totals):
                        losses[0, run.batches], losses[1, run.batches] = total, len(batch[-1])
                        run.batches += 1
                    done = run.epoch * n_batches + run.batches
                    if average and done > (1 - average_weights) * total_epochs * n_batches:
                        average.update_parameters(model)
                    if scheduler and batch_cosine and run.epoch >= warmup_epochs:
                        for _ in group:
                            scheduler.step()
                    bar.update(len(group))

                    at_end = run.batches == n_batches
                    if at_end or run.batches % read_every == 0:
                        check_finite(losses, run.epoch, gradient_accumulation)
                        shown = show_progress(bar, shown, group)
                        if not at_end:      # the end of an epoch saves below
                            save_or_stop()
            train_loss = mean_loss(losses)
            run.train_losses.append((losses[0] / losses[1]).cpu())
            run.batches = 0
            losses.zero_()

            # tune: with the averaged weights, as soon as there are any
            tuned = average.module if average and average.n_averaged > 0 else model
            network, means = kernels.accelerate(tuned.eval()), []
            for repeat in range(repeat_val):
                begin_epoch(val_loader, run.epoch + total_epochs * repeat)
                found = losses_of(network, val_loader, loss, device, bf16)
                means.append(mean_loss(found))
                run.tune_losses.append((found[0] / found[1]).cpu())
            tune_loss, rate = float(np.mean(means)), float(optimizer.param_groups[0]["lr"])
            if not math.isfinite(tune_loss):
                raise TrainingError(f"the tune loss is {tune_loss} after epoch {run.epoch + 1}")

            # keep the best weights, set the next rate, log, save
            if tune_loss < run.best_loss:
                run.best_loss, run.best_epoch = tune_loss, run.epoch
                run.best_weights = {name: values.detach().clone()
                                    for name, values in tuned.state_dict().items()}
            if run.epoch < warmup_epochs:
                parts["warmup"].step()
            elif isinstance(scheduler, ReduceLROnPlateau):
                scheduler.step(tune_loss)
            elif scheduler and not batch_cosine:
                scheduler.step()
            run.stopped = 0 < early_stopping <= run.epoch - run.best_epoch
            run.epoch, run.seconds = run.epoch + 1, time.monotonic() - started
            run.log.append({"epoch": run.epoch, "train_loss": train_loss, "tune_loss": tune_loss,
                            "lr": rate, "best_epoch": run.best_epoch + 1,
                            "seconds": round(run.seconds, 2)})
            if rank == 0 and checkpoints_name is not None:
                save_tensors(f"{checkpoints_name}_{run.epoch}.pth", model.state_dict())
            if rank == 0 and on_epoch is not None:
                on_epoch(run.log)
            if resume_path:             # last: a run killed before it repeats all of this
                save_state(resume_path, run, losses, parts, experiment)
            if rank == 0 and verbose:
                print(f"epoch {run.epoch}/{total_epochs}: train loss {train_loss:.4g}, tune loss "
                      f"{tune_loss:.4g} {loss.unit}".rstrip() + f", best epoch {run.best_epoch + 1}"
                      f", {run.seconds:.0f} s", flush=True)
            if any_rank(len(signals), device) and run.epoch < total_epochs and not run.stopped:
                raise Interrupted(f"interrupted after epoch {run.epoch}; {saved()}")
    model.load_state_dict(run.best_weights)
    log = {name: np.array([row[name] for row in run.log]) for name in run.log[0]}
    return model.cpu(), {
        "batch_train_loss": torch.cat(run.train_losses).numpy(),
        "epoch_train_loss": log["train_loss"],
        "batch_val_loss": torch.cat(run.tune_losses).numpy(),
        "epoch_val_loss": log["tune_loss"], "lr": log["lr"]}


__all__ = [name for name, value in globals().items()        # not the modules: os, signal, …
           if not name.startswith("_") and not isinstance(value, type(os))]
