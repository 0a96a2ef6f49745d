"""What every experiment needs: device, normalised model, losses, `training_loop`, prediction.

    from training_header import *           # and with it models, datasets and checkpoints

    train, tune = (TPP_PPG_dataset(parts[name], "segment", keys) for name in ("train", "tune"))
    model = NormalisedModel(MyNet(), keys, fit_normaliser(train, keys[1:]))
    model, trajectories = training_loop(model, make_loader(train, 64, shuffle=True),
                                        make_loader(tune, 64), total_epochs=10, lr=1e-3)
    save_checkpoint("runs/mine.pth", model)
    tpp = predict_dataset(load_model("runs/mine.pth", network=MyNet()), tune)

A network is any `nn.Module` with `forward(ppg [B, 1, 3600], *vitals [B]) -> [B, 1]`, a loss any
callable `(prediction [B], label [B]) -> [B]` or a scalar.

Needs normalised_model.py, checkpoint.py, models.py, kernels.py, cuda_graph.py, datasets.py
and tk_utils.py.
"""
import math
import os
import random
import signal
import threading
import time
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Callable, Dict, NamedTuple, Optional, Tuple

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

import kernels

# What follows is re-exported, too, for `from training_header import *`.
# isort: off
from torch.optim.lr_scheduler import (
    CosineAnnealingLR, LinearLR, OneCycleLR, ReduceLROnPlateau, StepLR)
from checkpoint import (
    CheckpointError, load_by_name, load_checkpoint, load_tensors, read_salt, save_checkpoint,
    save_tensors)
from datasets import (
    FS, PARTS, SEGMENT_SAMPLES, SEGMENT_SECONDS, DataError, DatasetIndex, TPP_PPG_dataset,
    create_dataset_index, fit_normaliser, hash_patients, load_dataset_index, make_loader,
    split_index)
from models import (
    MODELS, ConvBlock, MyFirstResNet, ResBlockV1, ResBlockV2, ResBlockV3, get_model_v3)
from normalised_model import (
    PPG_NORMALISATIONS, NormalisedModel, TrainingError, choose_device, fit_anchor, fit_blend,
    limit_threads, load_model, predict_dataset, predict_with_spread)
from tk_utils import atomic_file, atomic_path, progress, reset_all_seeds, write_json
# isort: on

__all__ = [      # noqa: F822 - DEVICE comes from __getattr__
    "DEVICE", "FS", "LOSSES", "MODELS", "PARTS", "PPG_NORMALISATIONS", "SEGMENT_SAMPLES",
    "SEGMENT_SECONDS", "CheckpointError", "ConvBlock", "CosineAnnealingLR", "DataError",
    "DatasetIndex", "Interrupted", "Loss", "MyFirstResNet", "NonFiniteLoss", "NormalisedModel",
    "OneCycleLR", "ReduceLROnPlateau", "ResBlockV1", "ResBlockV2", "ResBlockV3", "StepLR",
    "TPP_PPG_dataset", "TrainingError", "atomic_file", "atomic_path", "choose_device",
    "create_dataset_index", "fit_anchor", "fit_blend", "fit_normaliser", "get_model_v3",
    "hash_patients", "limit_threads", "load_checkpoint", "load_dataset_index", "load_model",
    "make_loader", "predict_dataset", "predict_with_spread", "progress", "read_salt",
    "reset_all_seeds", "save_checkpoint", "save_tensors", "split_index",
    "training_loop", "write_json"]


class Interrupted(Exception):
    """Training was asked to stop and has saved its state; the message is one line."""


class NonFiniteLoss(TrainingError):
    """The loss of a step is not finite; `epoch` and `batches` (their numbers) say which."""

    def __init__(self, message, epoch, batches):
        super().__init__(message)
        self.epoch, self.batches = epoch, batches


def __getattr__(name):
    if name == "DEVICE":        # computed at its first use: importing touches no GPU
        globals()["DEVICE"] = choose_device()
        return globals()["DEVICE"]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


# ------------------------------------------------------------------------------------------- losses

class Loss(NamedTuple):
    """What training minimises: function(prediction [B], label [B]) -> [B] or a scalar.

    With outputs 2 the prediction is [B, 2]: the estimate and its spread (SD). unit: of the mean
    loss, for messages; label: for the plot.
    """
    function: Callable
    unit: str
    label: str
    outputs: int = 1


def likelihood_loss(prediction: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
    """Gaussian negative log likelihood [B] (without its constant) of an estimate and its spread.

    Its gradient is weighted by twice the variance: so the estimate learns as with the squared error
    and is not neglected where the spread is wide (Seitzer et al. 2022, arXiv 2203.09168, beta 1).
    """
    estimate, spread = prediction.unbind(1)
    each = spread.log() + 0.5 * ((label - estimate) / spread) ** 2
    weighted = each * (2 * spread.detach() ** 2)
    return weighted + (each - weighted).detach()        # the value of the one, the other's gradient


LOSSES = {
    "mse": Loss(lambda prediction, label: F.mse_loss(prediction, label, reduction="none"),
                "mmHg²", "Loss, MSE (mmHg²)"),
    "l1": Loss(lambda prediction, label: F.l1_loss(prediction, label, reduction="none"),
               "mmHg", "Loss, mean absolute error (mmHg)"),
    # squared below 5 mmHg, about the network's error; beyond, outliers count linearly
    "huber": Loss(lambda prediction, label: F.huber_loss(prediction, label, reduction="none",
                                                         delta=5.0),
                  "mmHg²", "Loss, Huber, δ = 5 mmHg (mmHg²)"),
    "nll": Loss(likelihood_loss, "nats", "Loss, −log likelihood (nats)", outputs=2),
}


def choose_loss(criterion) -> Loss:
    """A `Loss` of a name in LOSSES, 'my_losses.py:name', or any callable. Raises TrainingError."""
    if isinstance(criterion, Loss):
        return criterion
    if criterion in LOSSES:
        return LOSSES[criterion]
    try:
        function = load_by_name(criterion, LOSSES, "--loss")
    except CheckpointError as error:
        raise TrainingError(str(error)) from None
    name = getattr(function, "__name__", type(function).__name__)
    return function if isinstance(function, Loss) else Loss(function, "", f"Loss, {name}")


# ----------------------------------------------------------------------------- training: its pieces

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


def shrink_weights(parameters, amount) -> None:
    """The proximal step of an L1 penalty: weights move towards zero by `amount` and stop there.

    Biases and norms (one-dimensional) are left alone. amount: a number, or a tensor on CUDA.
    """
    with torch.no_grad():
        for p in parameters:
            if p.dim() > 1 and isinstance(amount, torch.Tensor):
                p.copy_(p.sign() * (p.abs() - amount).clamp_min(0))
            elif p.dim() > 1:
                p.copy_(F.softshrink(p, amount))


@contextmanager
def stop_signals():
    """A list that holds the SIGINT or SIGTERM received so far; a second SIGINT ends at once."""
    received = []

    def take(number, _):
        received.append(number)
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    if threading.current_thread() is not threading.main_thread():   # Python would refuse
        yield received
        return
    before = {number: signal.signal(number, take) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def errors_in_one_line(*loaders):
    """TrainingError where memory is full, or a loader worker or another rank has ended."""
    try:
        yield
    except (MemoryError, torch.cuda.OutOfMemoryError):
        raise TrainingError("out of memory: a smaller --batch-size needs less") from None
    except (RuntimeError, DataError) as error:
        iterators = [getattr(loader, "_iterator", None) for loader in loaders]
        workers = [worker for one in iterators for worker in getattr(one, "_workers", ())]
        if not all(worker.is_alive() for worker in workers):
            # PyTorch would raise again for each of the others that ends with us
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            raise TrainingError("a loader worker was ended from outside (out of memory?): use "
                                "fewer --workers") from None
        if distributed()[1] == 1 or isinstance(error, DataError):
            raise
        reason = " ".join(str(error).split())[:200]
        raise TrainingError("this process cannot go on; if another one of the run has ended, its "
                            f"message says why ({type(error).__name__}: {reason})") from error


def rng_state() -> dict:
    """The states of all random generators that a training step may draw from, as plain values."""
    numpy_state = np.random.get_state()
    return {"python": random.getstate(), "torch": torch.get_rng_state(),
            "numpy": [numpy_state[0], numpy_state[1].tolist(), *numpy_state[2:]],
            "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []}


def set_rng_state(state: dict) -> None:
    random.setstate(state["python"])
    np.random.set_state(tuple(state["numpy"]))
    torch.set_rng_state(state["torch"])
    if len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])


def begin_epoch(loader, epoch: int, first_batch: int = 0) -> None:
    """Tell a loader which epoch comes, if it wants to know; ours can begin at any batch."""
    sampler = getattr(loader, "sampler", None)
    if hasattr(sampler, "first_batch"):
        sampler.set_epoch(epoch, first_batch)
    elif hasattr(sampler, "set_epoch"):
        sampler.set_epoch(epoch)


class BatchLosses:
    """The summed loss and the number of segments of each batch of an epoch.

    The losses stay on the device: reading one makes the host wait for it.
    """

    def __init__(self, batches: int, device):
        self.sums = torch.zeros(batches, dtype=torch.float64, device=device)
        self.rows = torch.zeros(batches, dtype=torch.int64)
        self.count = self.checked = 0

    def add(self, total: torch.Tensor, rows: int) -> None:
        self.sums[self.count], self.rows[self.count] = total, rows
        self.count += 1

    def last(self) -> float:
        return float(self.sums[self.count - 1]) / max(1, int(self.rows[self.count - 1]))

    def first_bad(self) -> int:
        """The number of the first batch since the last call with a loss that is not finite;
        the number of all batches where there is none."""
        new = self.sums[self.checked:self.count]
        bad = torch.nonzero(~torch.isfinite(new))
        first = self.checked + int(bad[0]) if len(bad) else len(self.sums)
        self.checked = self.count
        return first

    def mean(self) -> float:
        """Over the segments of all processes."""
        totals = reduce_sum(torch.stack([self.sums[:self.count].sum(),
                                         self.rows[:self.count].sum().to(self.sums)]))
        return float(totals[0] / totals[1])

    def each(self) -> torch.Tensor:
        """[batches] float64: the mean loss of each batch of this process."""
        return self.sums[:self.count].cpu() / self.rows[:self.count]

    def state_dict(self) -> dict:
        return {"sums": self.sums[:self.count].cpu(), "rows": self.rows[:self.count].clone()}

    def load_state_dict(self, state: dict) -> None:
        self.count = self.checked = len(state["sums"])
        self.sums[:self.count], self.rows[:self.count] = state["sums"], state["rows"]


def faster(model: nn.Module):
    """A callable like `model`; a `NormalisedModel` already is its own fastest."""
    return model if isinstance(model, NormalisedModel) else kernels.accelerate(model)


# ------------------------------------------------------------------------------- training: the loop

CURVES = ("batch_train_loss", "epoch_train_loss", "batch_val_loss", "epoch_val_loss", "lr")


@dataclass
class Settings:
    """The arguments of `training_loop`, which explains them."""
    total_epochs: int
    lr: float
    weight_decay: float
    l1_reg: float
    early_stopping: int
    scheduler_and_args: Optional[list]
    warmup_epochs: int
    gradient_accumulation: int
    optimizer_type: Any
    batch_cosine: bool
    gradient_clipping: Optional[float]
    pbar_momentum: float
    repeat_val: int
    precision: Optional[str]
    weigh: Optional[Callable]
    resume_path: Optional[str]
    experiment: Any
    average_weights: float
    checkpoint_minutes: float

    def check(self):
        if self.precision not in (None, "float32", "tf32", "bf16"):
            raise TrainingError(f"precision {self.precision!r}: expected tf32, float32 or bf16")
        scheduler = (self.scheduler_and_args or [None])[0]
        if self.batch_cosine and scheduler in (None, ReduceLROnPlateau):
            raise TrainingError("batch_cosine needs scheduler_and_args of a scheduler that can be "
                                "stepped after each batch, such as [CosineAnnealingLR, {…}]")
        if self.total_epochs < 1:
            raise TrainingError(f"total_epochs {self.total_epochs}: expected at least 1")


class TrainingRun:
    """A call of `training_loop`, with everything that says how far it is."""

    SAVED = ("epoch", "batches", "done", "best_loss", "best_epoch", "best_weights", "seconds",
             "log", "trajectories")

    def __init__(self, model, train_loader, val_loader, loss: Loss, device, settings: Settings):
        settings.check()
        if len(train_loader) == 0 or len(val_loader) == 0:
            raise TrainingError("the train or the tune loader is empty")
        self.settings, self.loss, self.device = settings, loss, choose_device(device)
        self.train_loader, self.val_loader = train_loader, val_loader
        self.rank, self.world = distributed()
        kernels.prepare_device(self.device, settings.precision or "tf32")
        self.model, self.no_sync, self.captured = model.to(self.device), nullcontext, None
        self.forward = faster(self.model)
        if self.world > 1:
            self.forward = nn.parallel.DistributedDataParallel(self.model)
            self.no_sync = self.forward.no_sync
        # the average of the weights, once it begins
        self.average = (torch.optim.swa_utils.AveragedModel(self.model, use_buffers=True)
                        if settings.average_weights else None)
        self.set_up_optimizer()
        self.epoch, self.batches = 0, 0     # epochs that are done, batches of the current one
        self.losses = BatchLosses(len(train_loader), self.device)
        self.done = False                   # stopped early
        self.best_loss, self.best_epoch, self.best_weights = math.inf, 0, None
        self.log = []                       # a dictionary for each epoch
        self.trajectories = {name: torch.zeros(0, dtype=torch.float64) for name in CURVES}
        self.resumable = hasattr(getattr(train_loader, "sampler", None), "first_batch")
        self.started = self.saved_at = time.monotonic()
        self.load()

    def set_up_optimizer(self):
        settings, on_cuda = self.settings, self.device.type == "cuda"
        self.weights = [p for p in self.model.parameters() if p.requires_grad]
        kind = settings.optimizer_type or torch.optim.Adam
        # fused: one kernel for all parameters; on CUDA everywhere, on CPU from PyTorch 2.4
        new_enough = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 4)
        options = {}
        if kind in (torch.optim.Adam, torch.optim.AdamW) and (on_cuda or new_enough):
            options = {"fused": True, "capturable": on_cuda}
        self.optimizer = kind(self.weights, lr=settings.lr, weight_decay=settings.weight_decay,
                              **options)
        self.scheduler = self.warmup = None
        if settings.scheduler_and_args:
            scheduler, arguments = settings.scheduler_and_args
            self.scheduler = scheduler(self.optimizer, **arguments)
        if settings.warmup_epochs:
            self.warmup = LinearLR(self.optimizer, 0.1, 1.0, settings.warmup_epochs)

    def parts(self) -> dict:
        """{name: what has a state of its own}."""
        parts = {"model": self.model, "optimizer": self.optimizer, "scheduler": self.scheduler,
                 "warmup": self.warmup, "average": self.average}
        return {name: part for name, part in parts.items() if part is not None}

    def seconds_so_far(self):
        return time.monotonic() - self.started

    def save(self):
        if self.settings.resume_path is None:
            return
        own = {"rng": rng_state(), "losses": self.losses.state_dict()}
        ranks = [own] * self.world
        if self.world > 1:
            torch.distributed.all_gather_object(ranks, own)
        self.seconds, self.saved_at = self.seconds_so_far(), time.monotonic()
        if self.rank == 0:
            save_tensors(self.settings.resume_path, {
                "run": {name: getattr(self, name) for name in self.SAVED}, "ranks": ranks,
                "parts": {name: part.state_dict() for name, part in self.parts().items()},
                "experiment": self.settings.experiment})

    def load(self):
        """Continue from the saved state, if there is one."""
        path, saved = self.settings.resume_path, [None]
        if self.rank == 0 and path is not None and os.path.exists(path):
            saved = [load_tensors(path)]
        if self.world > 1:
            torch.distributed.broadcast_object_list(saved)
        saved = saved[0]
        if saved is None:
            return
        try:
            for name in self.SAVED:
                setattr(self, name, self.on_device(saved["run"][name]))
            own = saved["ranks"][self.rank]
            self.losses.load_state_dict(own["losses"])
            for name, part in self.parts().items():
                part.load_state_dict(saved["parts"][name])
            set_rng_state(own["rng"])
            self.started -= self.seconds
        except (KeyError, IndexError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            raise TrainingError(f"{path}: not the state of this run "
                                f"({' '.join(str(error).split())[:200]})") from None
        self.trajectories = {name: curve.cpu() for name, curve in self.trajectories.items()}

    def on_device(self, value):
        if isinstance(value, dict):
            return {name: one.to(self.device) if isinstance(one, torch.Tensor) else one
                    for name, one in value.items()}
        return value

    def should_continue(self):
        return self.epoch < self.settings.total_epochs and not self.done

    def any_rank(self, *flags):
        """Each flag, or that of any other process: so all of them do the same."""
        if self.world == 1:
            return [bool(one) for one in flags]
        flags = torch.tensor([float(one) for one in flags], device=self.device)
        return (reduce_sum(flags) > 0).tolist()

    def interrupted(self, where, saved=True):
        return Interrupted(f"interrupted {where}; " + (
            "nothing was saved" if self.settings.resume_path is None else
            "saved: the same command goes on from here" if saved else
            "the same command goes on from the start of the epoch"))

    def batch_loss(self, network, batch, weigh=None):
        """(the summed loss of a batch, the same with weights, which is what is minimised)."""
        if len(batch[-1]) == 0:         # this rank's share of a short batch is empty
            flat = [t.new_zeros(1, *t.shape[1:]) for t in batch]
            return tuple(0 * loss for loss in self.batch_loss(network, flat, weigh))
        *inputs, label = batch
        weight = weigh(inputs.pop()) if weigh else None
        on_bf16 = self.settings.precision == "bf16"
        with torch.autocast(self.device.type, torch.bfloat16) if on_bf16 else nullcontext():
            out = network(*inputs)
        out = out.to(label.dtype)
        prediction = out if self.loss.outputs == 2 or out.dim() == 1 else out.flatten()
        if self.loss.outputs == 2 and out.shape[1:] != (2,) or prediction.shape[:1] != label.shape:
            raise TrainingError(f"the network's output has shape {tuple(out.shape)}; expected "
                                f"[{len(label)}, {self.loss.outputs}]")
        each = self.loss.function(prediction, label)
        if each.dim() == 0:
            if weight is not None:
                raise TrainingError("weights for segments need a loss of each segment, [B]; this "
                                    "one returns a scalar")
            total = each * len(label)
            return total, total
        if each.numel() != len(label):
            raise TrainingError(f"the loss has shape {tuple(each.shape)}; expected [{len(label)}] "
                                "or a scalar")
        each = each.flatten()
        total = each.sum()
        return total, total if weight is None else (each * weight).sum()

    def backward(self, batch, count):
        """Adds a batch's share of the gradient of the mean over `count` segments; its loss."""
        total, weighted = self.batch_loss(self.forward, batch, self.settings.weigh)
        (weighted * self.world / count).backward()
        return total.detach()

    def update(self):
        """A step of the optimiser from the gradients; device code only."""
        settings = self.settings
        if settings.gradient_clipping is not None:
            nn.utils.clip_grad_norm_(self.weights, settings.gradient_clipping)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if settings.l1_reg:
            shrink_weights(self.weights, self.optimizer.param_groups[0]["lr"] * settings.l1_reg)

    def whole_step(self, *batch):
        """Forward, backward and update for one batch: what a CUDA graph replays; its loss."""
        total = self.backward(batch, len(batch[-1]))
        self.update()
        return total

    def step(self, group):
        """One step of the optimiser, for the mean loss over a group of batches as if one."""
        if len(group) == 1 and self.world == 1:
            if self.captured is None:
                self.captured = self.whole_step if self.settings.gradient_accumulation > 1 else (
                    kernels.capture_step(self.whole_step, group[0], model=self.model,
                                         optimizer=self.optimizer))
            self.losses.add(self.captured(*group[0]), len(group[0][-1]))
        else:
            count = sum(len(batch[-1]) for batch in group)
            if self.world > 1:
                count = reduce_sum(torch.tensor(float(count), device=self.device))
            for number, batch in enumerate(group, 1):
                # processes exchange gradients once a step, and average them
                with self.no_sync() if number < len(group) else nullcontext():
                    self.losses.add(self.backward(batch, count), len(batch[-1]))
            self.update()
        self.batches += len(group)
        self.average_weights()
        if self.settings.batch_cosine and self.epoch >= self.settings.warmup_epochs:
            for _ in group:
                self.scheduler.step()

    def average_weights(self):
        """Adds the weights to their average over the last `average_weights` of all steps."""
        n_batches = len(self.train_loader)
        last = (1 - self.settings.average_weights) * self.settings.total_epochs * n_batches
        if self.average is not None and self.epoch * n_batches + self.batches > last:
            self.average.update_parameters(self.model)

    def tuned_model(self):
        """The model whose tune loss counts: of the averaged weights, once there are any."""
        has_average = self.average is not None and int(self.average.n_averaged) > 0
        return self.average.module if has_average else self.model

    def check_finite(self):
        """Raises NonFiniteLoss, in all processes, where the loss of a batch was not finite."""
        first = self.losses.first_bad()
        if self.world > 1:
            worst = torch.tensor(first, device=self.device)
            torch.distributed.all_reduce(worst, torch.distributed.ReduceOp.MIN)
            first = int(worst)
        if first < len(self.train_loader):
            size = self.settings.gradient_accumulation
            begin = first - first % size
            last = min(begin + size, len(self.train_loader)) - 1
            raise NonFiniteLoss(f"the training loss is not finite at epoch {self.epoch + 1}, "
                                f"batch {last + 1}; a lower --lr or clipping may help",
                                self.epoch, list(range(begin, last + 1)))

    def train_epoch(self, signals) -> float:
        """Trains for what is left of an epoch; its mean loss.

        Saves between steps when due; after a signal, saves and raises Interrupted.
        """
        settings, n_batches = self.settings, len(self.train_loader)
        group, steps, shown, segments, begun = [], 0, None, 0, time.monotonic()
        read_every = 1 if self.device.type == "cpu" else 50     # reading a loss makes the host wait
        begin_epoch(self.train_loader, self.epoch, self.batches)
        self.model.train()
        bar = progress(total=n_batches, initial=self.batches, disable=self.rank > 0,
                       desc=f"epoch {self.epoch + 1}/{settings.total_epochs}")
        with bar:
            batches = kernels.feed(self.train_loader, self.device)
            for number, batch in enumerate(batches, self.batches + 1):
                bar.update()
                group.append(batch)
                if len(group) < settings.gradient_accumulation and number < n_batches:
                    continue
                segments += sum(len(one[-1]) for one in group) * self.world
                self.step(group)
                group, steps = [], steps + 1
                if steps % read_every and number < n_batches:
                    continue
                self.check_finite()
                loss, momentum = self.losses.last(), settings.pbar_momentum
                shown = loss if shown is None else momentum * shown + (1 - momentum) * loss
                rate = segments / (time.monotonic() - begun)
                bar.set_postfix_str(f"loss {shown:.4g}, lr {self.rate():.2g}, {rate:,.0f} "
                                    "segments/s", refresh=False)
                if number == n_batches:         # the end of the epoch saves and stops
                    continue
                due = time.monotonic() - self.saved_at > 60 * settings.checkpoint_minutes
                due, stop = self.any_rank(due, len(signals))
                if self.resumable and (due or stop):
                    self.save()
                if stop:
                    raise self.interrupted(f"at epoch {self.epoch + 1}, batch {number} of "
                                           f"{n_batches}", self.resumable)
        loss = self.losses.mean()
        self.extend("batch_train_loss", self.losses.each())
        self.losses, self.batches = BatchLosses(n_batches, self.device), 0
        return loss

    def rate(self) -> float:
        return float(self.optimizer.param_groups[0]["lr"])

    def extend(self, name, values):
        new = torch.as_tensor(values, dtype=torch.float64).reshape(-1)
        self.trajectories[name] = torch.cat([self.trajectories[name], new])

    def tune_epoch(self) -> float:
        """Mean loss over the tune segments, and over `repeat_val` passes."""
        means, model = [], self.tuned_model().eval()
        predict = faster(model)
        for repeat in range(self.settings.repeat_val):
            begin_epoch(self.val_loader, self.epoch + self.settings.total_epochs * repeat)
            losses = BatchLosses(len(self.val_loader), self.device)
            with torch.no_grad():
                for batch in kernels.feed(self.val_loader, self.device):
                    losses.add(self.batch_loss(predict, batch)[0], len(batch[-1]))
            means.append(losses.mean())
            self.extend("batch_val_loss", losses.each())
        loss = float(np.mean(means))
        if not math.isfinite(loss):
            raise TrainingError(f"the tune loss is {loss} after epoch {self.epoch + 1}")
        return loss

    def end_epoch(self, train_loss, tune_loss):
        """Notes an epoch's losses, and the weights if they are the best; sets the next rate."""
        settings, rate = self.settings, self.rate()
        for name, value in (("epoch_train_loss", train_loss), ("epoch_val_loss", tune_loss),
                            ("lr", rate)):
            self.extend(name, value)
        if tune_loss < self.best_loss:
            self.best_loss, self.best_epoch = tune_loss, self.epoch
            self.best_weights = {name: values.detach().clone() for name, values
                                 in self.tuned_model().state_dict().items()}
        if self.epoch < settings.warmup_epochs:
            self.warmup.step()
        elif isinstance(self.scheduler, ReduceLROnPlateau):
            self.scheduler.step(tune_loss)
        elif self.scheduler is not None and not settings.batch_cosine:
            self.scheduler.step()
        self.done = 0 < settings.early_stopping <= self.epoch - self.best_epoch
        self.epoch += 1
        self.log.append({"epoch": self.epoch, "train_loss": train_loss, "tune_loss": tune_loss,
                         "lr": rate, "best_epoch": self.best_epoch + 1,
                         "seconds": round(self.seconds_so_far(), 2)})

    def train(self, checkpoints_name, verbose, on_epoch):
        loaders = self.train_loader, self.val_loader
        with errors_in_one_line(*loaders), stop_signals() as signals:
            while self.should_continue():
                train_loss = self.train_epoch(signals)
                self.end_epoch(train_loss, self.tune_epoch())
                self.save()
                if self.rank == 0:
                    if checkpoints_name is not None:
                        save_tensors(f"{checkpoints_name}_{self.epoch}.pth",
                                     self.model.state_dict())
                    if on_epoch is not None:
                        on_epoch(self.log)
                    if verbose:
                        print(f"epoch {self.epoch}/{self.settings.total_epochs}: train loss "
                              f"{train_loss:.4g}, tune loss {self.log[-1]['tune_loss']:.4g}, best "
                              f"{self.best_loss:.4g} (epoch {self.best_epoch + 1})", flush=True)
                if self.any_rank(len(signals))[0] and self.should_continue():
                    raise self.interrupted(f"after epoch {self.epoch}")
        self.model.load_state_dict(self.best_weights)
        return self.model.cpu(), {name: curve.numpy() for name, curve in self.trajectories.items()}


def training_loop(model: nn.Module, train_loader, val_loader, total_epochs: int, lr: float,
                  weight_decay=0, l1_reg=0, early_stopping=-1, scheduler_and_args=None,
                  warmup_epochs=0, gradient_accumulation=1, optimizer_type=None, criterion="mse",
                  batch_cosine=False, checkpoints_name=None, verbose=False, gradient_clipping=None,
                  pbar_momentum=0.95, device=None, repeat_val=1, *, precision=None, on_epoch=None,
                  weigh=None, resume_path=None, experiment=None, average_weights=0.0,
                  checkpoint_minutes=10) -> Tuple[nn.Module, Dict[str, np.ndarray]]:
    """Trains `model` and returns (the model with its best weights, trajectories).

    Loaders yield (ppg [B, 1, L], vitals [B]…, label [B]); `model(ppg, *vitals)` gives [B, 1].
    The best epoch is the one of the lowest tune loss. Options that need a word:
    l1_reg: after each step weights (not biases or norms) shrink by lr * l1_reg and stop at zero.
    early_stopping: stop after so many epochs without improvement; -1 never.
    scheduler_and_args: [class, {arguments}] of StepLR, CosineAnnealingLR, OneCycleLR (with
    cycle_momentum False) or ReduceLROnPlateau; one step an epoch, with batch_cosine one a batch.
    warmup_epochs: first the rate rises linearly from a tenth.
    gradient_accumulation: one step for so many batches, equal to one batch of their size; clipping
    acts on the accumulated gradient. optimizer_type: Adam, or any class of torch.optim.
    criterion: a name in LOSSES, a `Loss`, or any callable (prediction [B], label [B]) -> [B] or a
    scalar. checkpoints_name: also save each epoch's state dict as `<checkpoints_name>_<epoch>.pth`.
    repeat_val: passes over the tune loader (level 'patient' draws anew).
    precision: 'float32', 'tf32' (on CUDA; the default) or 'bf16' (autocast). weigh: the train
    loader's batches hold one more tensor [B] before the label, and this function makes it the
    segments' weights, about 1 on average. average_weights: this share of all steps, the last ones,
    is averaged; the tune loss is then that of the averaged weights. on_epoch: called with a list of
    dictionaries, one for each epoch so far.
    resume_path: the whole state is kept in this file after each epoch, every checkpoint_minutes,
    and when SIGINT or SIGTERM arrive (then raises Interrupted); if the file is there, training goes
    on from it as if it had never stopped, to the last bit (inside an epoch with our loaders, from
    its start with others). experiment: kept in the file, for the caller to compare.
    Trajectories are arrays: batch_train_loss, epoch_train_loss, batch_val_loss, epoch_val_loss, lr.
    Under torchrun each process passes its own share of the segments; gradients and losses are those
    of all. Raises NonFiniteLoss, and TrainingError for what cannot be trained.
    """
    settings = Settings(
        total_epochs, lr, weight_decay, l1_reg, early_stopping, scheduler_and_args, warmup_epochs,
        gradient_accumulation, optimizer_type, batch_cosine, gradient_clipping, pbar_momentum,
        repeat_val, precision, weigh, resume_path, experiment, average_weights, checkpoint_minutes)
    run = TrainingRun(model, train_loader, val_loader, choose_loss(criterion), device, settings)
    return run.train(checkpoints_name, verbose, on_epoch)
