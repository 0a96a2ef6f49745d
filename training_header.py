"""What every experiment needs: device, normalised model, checkpoint, `training_loop`.

    from training_header import *           # and with it models.py and datasets.py

`load_model(path)` gives a network that takes raw units and returns mmHg; evaluating, predicting and
exporting go through it and nothing else.
"""
import ctypes
import hashlib
import io
import math
import os
import pickle
import random
import re
import signal
import sys
import threading
import time
import warnings
import zipfile
from collections import OrderedDict
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import numpy as np
import torch
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, ReduceLROnPlateau, StepLR

from datasets import (
    DEFAULT_CONDITION,
    FIELDS,
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
    hash_patients,
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
from tk_utils import atomic_file, atomic_path, progress, reset_all_seeds, write_json

__all__ = [      # noqa: F822 - DEVICE comes from __getattr__
    "DEFAULT_CONDITION", "DEVICE", "FS", "PARTS", "SEGMENT_SAMPLES", "SEGMENT_SECONDS",
    "CheckpointError", "ConvBlock", "CosineAnnealingLR", "DataError", "DatasetIndex",
    "Interrupted", "MyFirstResNet", "NonFiniteLoss", "NormalisedModel", "ReduceLROnPlateau",
    "ResBlockV1", "ResBlockV2", "ResBlockV3", "StepLR", "TPP_PPG_dataset", "TrainingError",
    "atomic_file", "atomic_path", "choose_device", "compile_or_not", "create_dataset_index",
    "fit_normaliser", "get_gate", "get_model_v3", "hash_patients", "init_steady",
    "kept_dataset_index", "load_checkpoint", "load_dataset_index", "load_model", "make_loader",
    "predict_dataset", "predict_with_spread", "progress", "read_salt", "receptive_field",
    "reset_all_seeds", "salt_mark", "save_checkpoint", "save_tensors", "split_index",
    "split_patients", "training_loop", "watch_features", "write_json"]


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the message is one line."""


class TrainingError(ValueError):
    """Training cannot go on; the message is one line."""


# ------------------------------------------------------------------------------------------- device

def choose_device(name=None):
    """The `torch.device` of a name such as 'cpu' or 'cuda:1' (or of itself); None: CUDA where there
    is one."""
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

LEAST_SPREAD = 0.01         # of the label's SD: a spread of nothing would weigh without bound


class NormalisedModel(nn.Module):
    """Raw units in, mmHg out: `model(ppg [B, 1, L] in any scale, *vitals [B]) -> [B, 1]`.

    keys: as given to `TPP_PPG_dataset`, the PPG first (or absent, with a network of no channels)
    and the label last. normaliser: {key: {'mean', 'sd', …}} of vitals and label over the train
    split (`fit_normaliser`). Each PPG segment is normalised by its own mean and SD: monitors differ
    in scale, and the network's zero padding would turn an offset into an edge. A network of two
    outputs gives [B, 2]: the estimate and its spread (SD), mmHg.
    """

    def __init__(self, network, keys, normaliser):
        super().__init__()
        self.with_ppg = keys[0] == "ppg"
        if len(keys) != self.with_ppg + network.num_discrete + 1:
            raise DataError(f"keys {', '.join(keys)}: expected ppg, {network.num_discrete} vitals "
                            "and a label")
        self.network, self.keys, self.normaliser = network, list(keys), normaliser
        # Not persistent: the network's own state dict keeps the published names and nothing else.
        for name, part in (("vital", keys[self.with_ppg:-1]), ("label", keys[-1:])):
            for what in ("mean", "sd"):
                values = torch.tensor([normaliser[k][what] for k in part], dtype=torch.float32)
                self.register_buffer(f"{name}_{what}", values, persistent=False)

    def forward(self, *inputs):
        normalised = [(v - self.vital_mean[i]) / self.vital_sd[i]
                      for i, v in enumerate(inputs[self.with_ppg:])]
        if self.with_ppg:
            ppg = inputs[0] - inputs[0].mean(-1, keepdim=True)
            # a flat segment stays flat instead of dividing by nothing
            normalised.insert(0, ppg / ppg.pow(2).mean(-1, keepdim=True).sqrt().clamp_min(1e-12))
        out = self.network(*normalised)
        estimate = out[:, :1] * self.label_sd + self.label_mean
        if out.shape[1] == 1:
            return estimate
        spread = nn.functional.softplus(out[:, 1:]) + LEAST_SPREAD
        return torch.cat([estimate, spread * self.label_sd], 1)


def save_tensors(path, obj):
    """`torch.save`, whole or not at all; a full disk is an OSError (torch's own is none)."""
    buffer = io.BytesIO()
    torch.save(obj, buffer)
    with atomic_file(path, "wb") as file:
        file.write(buffer.getbuffer())


def save_checkpoint(path, model, model_args, config, split, provenance, metrics=None,
                    calibration=None):
    """Writes a `NormalisedModel` and what it takes to understand it later, whole or not at all."""
    weights = model.network.state_dict()
    save_tensors(path, {
        "model": {k: v.detach().cpu().contiguous() for k, v in weights.items()},
        "model_args": model_args, "keys": model.keys, "normaliser": model.normaliser,
        "config": config, "split": split, "provenance": provenance, "metrics": metrics or {},
        "calibration": calibration or {}})


LARGEST_PICKLE = 2 ** 25        # bytes of all that is not weights; a million hashed patients fit in


class StorageCheck(pickle._Unpickler):
    """Goes through the pickle of a file of torch.save and builds nothing; raises ValueError where
    it names anything but tensors, or a tensor larger than what the file holds for it.

    It is the unpickler in Python: the one in C allocates whatever a damaged file asks for.
    """
    item_bytes = {"DoubleStorage": 8, "LongStorage": 8, "FloatStorage": 4, "IntStorage": 4,
                  "HalfStorage": 2, "BFloat16Storage": 2, "ShortStorage": 2, "CharStorage": 1,
                  "ByteStorage": 1, "BoolStorage": 1}

    def __init__(self, archive, folder):
        super().__init__(io.BytesIO(archive.read(f"{folder}/data.pkl")))
        self.archive, self.folder = archive, folder
        self.left = sum(one.file_size for one in archive.infolist())

    def find_class(self, module, name):
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return self.check_tensor
        if module == "torch" and name in self.item_bytes:
            return name
        raise ValueError(f"it asks for {module}.{name}, which no checkpoint needs")

    def persistent_load(self, saved):
        _, kind, key, _, count = saved
        size = self.archive.getinfo(f"{self.folder}/data/{key}").file_size
        if size != count * self.item_bytes[kind]:
            raise ValueError(f"a storage of {size} bytes, expected {count} numbers")
        return count, self.item_bytes[kind]

    def check_tensor(self, storage, offset, shape, strides, *_):
        count, item_bytes = storage
        last = offset + sum((n - 1) * step for n, step in zip(shape, strides))
        self.left -= math.prod(shape) * item_bytes      # no storage counts twice
        if (len(shape) != len(strides) or min((offset,) + shape + strides) < 0
                or math.prod(shape) and last >= count or self.left < 0):
            raise ValueError(f"a tensor {shape} larger than its storage")


def load_tensors(path):
    """What torch.save wrote to a file, if that is tensors and plain values; nothing in it is run.

    PyTorch sees it only after its zip entries (uncompressed, as long as they say, check sums right,
    which PyTorch does not look at) and its pickle have been found to be harmless. Raises
    CheckpointError.
    """
    if not os.path.exists(path):
        raise CheckpointError(f"{path}: no such checkpoint (python train_resnet.py makes one)")
    if not os.path.isfile(path):
        raise CheckpointError(f"{path}: not a checkpoint (expected a file)")
    if torch_version() < (2, 6):
        print(f"WARNING: PyTorch {torch.__version__}: before 2.6 loading a checkpoint from others "
              "can run code (CVE-2025-32434); it is checked first, but do upgrade", file=sys.stderr)
    clean = io.BytesIO()
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            names = {one.filename.lower() for one in entries}
            pickles = [name for name in archive.namelist() if name.endswith("/data.pkl")]
            if (len(names) < len(entries) or len(pickles) != 1
                    or any(one.compress_type or one.file_size != one.compress_size
                           for one in entries)
                    or sum(one.file_size for one in entries) > os.path.getsize(path)
                    or archive.getinfo(pickles[0]).file_size > LARGEST_PICKLE):
                raise ValueError("its entries are not those of torch.save")
            if archive.testzip() is not None:
                raise ValueError("damaged: a check sum is wrong")
            # In a forged file PyTorch's reader may find other entries than Python's: it gets a
            # fresh one, of what was checked.
            with zipfile.ZipFile(clean, "w") as copy:
                for one in entries:
                    copy.writestr(one.filename, archive.read(one))
        with zipfile.ZipFile(clean) as archive:
            StorageCheck(archive, os.path.dirname(pickles[0])).load()
        clean.seek(0)
        return torch.load(clean, map_location="cpu", weights_only=True)
    except zipfile.BadZipFile:
        raise CheckpointError(f"{path}: not a checkpoint (expected a zip file of torch.save)") \
            from None
    except Exception as error:  # noqa: BLE001 - a foreign file fails in the unpickler in many ways
        reason = "".join(c if c.isprintable() else " " for c in str(error)[:200])
        raise CheckpointError(f"{path}: not a checkpoint ({type(error).__name__}: "
                              f"{reason})") from None


def check_plain(value):
    """Raises ValueError unless a value is numbers, printable text, and lists and dictionaries of
    them, of sensible number and depth (they could hold themselves)."""
    waiting, count = [(value, 0)], 0
    while waiting:
        one, depth = waiting.pop()
        count += 1
        if depth > 10 or count > 10 ** 7:
            raise ValueError("settings too deep or too many")
        if isinstance(one, (dict, list, tuple)):
            parts = list(one) + list(one.values()) if isinstance(one, dict) else one
            waiting += [(part, depth + 1) for part in parts]
        elif isinstance(one, str):
            if len(one) > 10000 or not one.isprintable():
                raise ValueError("text with control characters, or too long")
        elif one is not None and not isinstance(one, (bool, int, float)):
            raise ValueError(f"a {type(one).__name__} among the settings")


def check_settings(saved):
    """Raises ValueError where a checkpoint's settings are not those of a network for our data."""
    check_plain({part: value for part, value in saved.items() if part != "model"})
    keys, normaliser = saved["keys"], saved["normaliser"]
    if (len(keys) < 2 or "ppg" in keys[1:] or keys[-1] not in ("tpp", "p_crit")
            or len(set(keys)) < len(keys) or not set(keys) <= set(FIELDS)):
        raise ValueError("keys: expected ppg, vitals and tpp or p_crit")
    for key in keys[keys[0] == "ppg":]:
        mean, sd = (normaliser[key][what] for what in ("mean", "sd"))
        if not (isinstance(mean, float) and isinstance(sd, float) and 0 < sd < math.inf
                and -math.inf < mean < math.inf):
            raise ValueError(f"normaliser of {key}: mean {mean}, sd {sd}")
    if not all(isinstance(h, str) for hashes in saved["split"].values() for h in hashes):
        raise ValueError("split: expected lists of hashed patients")
    calibration = saved.get("calibration")
    if calibration:     # metrics.fit_calibration and, for inputs unlike training's, fit_novelty
        shape = np.shape(calibration["novelty"]["mean"])
        if not (len(calibration["levels"]) == len(calibration["half_widths"])
                and len(calibration["error_quantiles"]) > 1 and len(shape) == 1
                and np.asarray(calibration["novelty"]["precision"], float).shape == shape * 2):
            raise ValueError("calibration: lists that do not fit one another")
    if not (isinstance(saved["config"].get("condition"), str)
            and isinstance(saved["provenance"].get("origin"), str)):
        raise ValueError("no condition or origin of the data")
    for name, weights in saved["model"].items():
        if not (isinstance(name, str) and isinstance(weights, torch.Tensor)
                and weights.dtype == torch.float32 and torch.isfinite(weights).all()):
            raise ValueError(f"weights {name!r:.80}: expected finite float32")


def load_checkpoint(path):
    """The dictionary of a checkpoint, checked; only tensors and plain values are ever unpickled.

    Raises CheckpointError for a missing file and for one that is no checkpoint of this project.
    """
    checkpoint = load_tensors(path)
    expected = {"model": dict, "model_args": dict, "keys": list, "normaliser": dict, "config": dict,
                "split": dict, "provenance": dict, "metrics": dict}
    for key, kind in expected.items():
        if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get(key), kind):
            raise CheckpointError(f"{path}: not a checkpoint of this project (no {kind.__name__} "
                                  f"{key!r})")
    for check, what in ((check_settings, "not a checkpoint of this project"),
                        (check_network, "the saved weights and settings do not fit")):
        try:
            check(checkpoint)
        except (ValueError, TypeError, LookupError, AttributeError, RuntimeError, ArithmeticError,
                AssertionError) as error:       # of what stands where something else should
            reason = " ".join(str(error).split())[:200]
            raise CheckpointError(f"{path}: {what} ({reason})") from None
    return checkpoint


def check_network(saved):
    """Raises what PyTorch raises, or ValueError, where weights, settings and keys do not make a
    network for our segments. No memory is taken for it: settings alone could ask for any amount."""
    for key, value in saved["model_args"].items():
        numbers = value if isinstance(value, (list, tuple)) else [value]
        kind, least = ((int, float), 0) if key == "dropout" else (
            int, key not in ("num_discrete", "in_channels"))
        if len(numbers) > 100 or any(isinstance(n, bool) or not isinstance(n, kind)
                                     or not least <= n < 1e6 for n in numbers):
            raise ValueError(f"{key}: expected numbers up to a million")
    with torch.device("meta"):
        network = get_model_v3(**saved["model_args"])
    if network.in_channels != (saved["keys"][0] == "ppg"):
        raise ValueError(f"{network.in_channels} channels for the keys {saved['keys']}")
    if network.min_samples > SEGMENT_SAMPLES:
        raise ValueError(f"needs {network.min_samples} samples, a segment has {SEGMENT_SAMPLES}")
    outputs = network.mlp[-1].out_features
    with_spread = saved.get("calibration", {}).get("spread", outputs == 2)
    if outputs > 2 or with_spread != (outputs == 2):
        raise ValueError(f"{outputs} outputs: expected an estimate, or it and its spread")
    expected = {key: tuple(weights.shape) for key, weights in network.state_dict().items()}
    if expected != {key: tuple(weights.shape) for key, weights in saved["model"].items()}:
        raise ValueError("weights of other names or shapes than the settings say")
    NormalisedModel(network, saved["keys"], saved["normaliser"])


def load_model(path, device=None):
    """The model of a checkpoint (a path, or what `load_checkpoint` gave), ready to predict.

    Returns a `NormalisedModel` in evaluation mode: raw units in, mmHg out.
    """
    checkpoint = path if isinstance(path, dict) else load_checkpoint(path)
    network = get_model_v3(**checkpoint["model_args"])
    network.load_state_dict(checkpoint["model"], strict=True)
    model = NormalisedModel(network, checkpoint["keys"], checkpoint["normaliser"])
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


class Interrupted(Exception):
    """Training was asked to stop and has saved its state; the message is one line."""


class NonFiniteLoss(TrainingError):
    """The loss of a step is not finite; `epoch` and `batches` (their numbers) say which."""

    def __init__(self, message, epoch, batches):
        super().__init__(message)
        self.epoch, self.batches = epoch, batches


@contextmanager
def stop_signals():
    """A list that holds the SIGINT or SIGTERM received so far; a second SIGINT ends us at once."""
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
def plain_errors():
    """Turns what PyTorch raises when memory, a loader worker or another process is gone into one
    line that says what to do."""
    advice = (
        (r"out of memory|can't allocate memory|bad allocation", "out of memory: a smaller "
         "--batch-size with as many times --accumulate needs less and computes the same"),
        (r"DataLoader worker .* (exited|is killed)", "a loader worker was ended from outside (out "
         "of memory?): lower --workers"),
        (r"gloo|nccl|[Cc]onnection (closed|reset)|Broken pipe", "another process of this run has "
         "ended; its own message says why"))
    try:
        yield
    except MemoryError:
        raise TrainingError(advice[0][1]) from None
    except RuntimeError as error:
        for pattern, line in advice:
            if re.search(pattern, str(error), re.IGNORECASE):
                raise TrainingError(line) from error
        raise


def rng_state():
    """The states of all random generators that a training step may draw from, as plain values."""
    numpy_state = np.random.get_state()
    return {"python": random.getstate(), "torch": torch.get_rng_state(),
            "numpy": [numpy_state[0], numpy_state[1].tolist(), *numpy_state[2:]],
            "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []}


def set_rng_state(state):
    random.setstate(state["python"])
    np.random.set_state(tuple(state["numpy"]))
    torch.set_rng_state(state["torch"])
    if len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])


def likelihood_loss(estimate, spread, label, weight=None):
    """Gaussian negative log likelihood of labels [B] (without its constant), and their weights.

    Weighed by twice the variance, which is taken as given: so the estimate learns as with the
    squared error and is not neglected where the spread is wide (Seitzer et al. 2022, arXiv
    2203.09168, with beta 1).
    """
    each = spread.log() + 0.5 * ((label - estimate) / spread) ** 2
    variance = 2 * spread.detach() ** 2
    return each, variance if weight is None else variance * weight


def mean_losses(sums, rows, device):
    """(mean over the segments of all processes, [each batch's]) of batches' summed losses, rows."""
    totals = reduce_sum(torch.tensor([float(sum(sums)), sum(rows)], dtype=torch.float64,
                                     device=device))
    return float(totals[0] / totals[1]), (torch.stack(sums).cpu() / torch.tensor(rows)).tolist()


def begin_epoch(loader, epoch, first_batch=0):
    """Tells a loader, if it wants to know, which epoch comes; ours begins it at any batch."""
    if hasattr(loader.sampler, "first_batch"):
        loader.sampler.set_epoch(epoch, first_batch)
    elif hasattr(loader.sampler, "set_epoch"):
        loader.sampler.set_epoch(epoch)


LOSSES = {"mse": nn.functional.mse_loss, "l1": nn.functional.l1_loss}
AUTOCAST = {None: None, "bf16": torch.bfloat16, "fp16": torch.float16}


class TrainingRun:
    """A call of `training_loop`: `how` holds its arguments, everything else how far it is."""

    SAVED = ("epoch", "batches", "done", "best_loss", "best_epoch", "best_weights", "seconds",
             "log", "trajectories")

    def __init__(self, how):
        if how.criterion not in (*LOSSES, "nll"):
            raise TrainingError(f"criterion {how.criterion!r}: expected 'mse', 'l1' or 'nll'")
        if how.amp not in AUTOCAST:
            raise TrainingError(f"amp {how.amp!r}: expected 'bf16' or 'fp16'")
        if how.batch_cosine and (how.scheduler_and_args or [None])[0] is not CosineAnnealingLR:
            raise TrainingError("batch_cosine needs scheduler_and_args=[CosineAnnealingLR, {…}]")
        if len(how.train_loader) == 0 or len(how.val_loader) == 0:
            raise TrainingError("the train or the tune loader is empty")
        if how.total_epochs < 1:
            raise TrainingError(f"total_epochs {how.total_epochs}: expected at least 1")
        self.how = how
        self.rank, self.world = distributed()
        self.set_up_model()
        self.set_up_optimizer()
        self.epoch, self.batches = 0, 0     # epochs that are done, batches of the one under way
        self.sums, self.rows = [], []       # the summed loss and the segments of each of these
        self.bad_batch = torch.full((), -1, dtype=torch.int64, device=self.device)
        self.done = False                   # stopped early
        self.best_loss, self.best_epoch, self.best_weights = math.inf, 0, None
        self.log = []                       # a dictionary for each epoch
        self.trajectories = {name: [] for name in (
            "batch_train_loss", "epoch_train_loss", "batch_val_loss", "epoch_val_loss", "lr")}
        self.resumable = hasattr(how.train_loader.sampler, "first_batch")       # inside an epoch
        self.started = self.saved_at = time.monotonic()
        self.load()

    def set_up_model(self):
        self.model, self.device = self.how.model, choose_device(self.how.device)
        if self.device.type == "cpu":
            keep_freed_memory()
        else:
            torch.set_float32_matmul_precision("high")      # TF32
            torch.backends.cudnn.allow_tf32 = True
        self.forward, self.no_sync = self.model.to(self.device), nullcontext
        if self.world > 1:
            self.forward = nn.parallel.DistributedDataParallel(self.model)
            self.no_sync = self.forward.no_sync
            # weight gradients come channels-last: a copy of a few MB a step, not worth a line each
            warnings.filterwarnings("ignore", message="Grad strides do not match bucket view")
        if self.how.compiled:
            self.forward = compile_or_not(self.forward)

    def set_up_optimizer(self):
        how, on_cuda = self.how, self.device.type == "cuda"
        self.weights = [p for p in self.model.parameters() if p.requires_grad]
        # one kernel for all parameters, where PyTorch has it: everywhere on CUDA, from 2.4 on CPU
        fused = how.optimizer_type is None and (on_cuda or torch_version() >= (2, 4))
        self.optimizer = (how.optimizer_type or torch.optim.Adam)(
            self.weights, lr=how.lr, weight_decay=how.weight_decay,
            **({"fused": True} if fused else {}))
        self.scheduler = self.warmup = None
        if how.scheduler_and_args:
            self.scheduler = how.scheduler_and_args[0](self.optimizer, **how.scheduler_and_args[1])
        if how.warmup_epochs:
            self.warmup = LinearLR(self.optimizer, 0.1, 1.0, how.warmup_epochs)
        # without fp16 it passes on what it gets (before PyTorch 2.3 it stands elsewhere)
        scaler = getattr(torch.amp, "GradScaler", None) or torch.cuda.amp.GradScaler
        self.scaler = scaler(enabled=how.amp == "fp16" and on_cuda)

    def parts(self):
        """{name: what has a state of its own}."""
        parts = {"model": self.model, "optimizer": self.optimizer, "scheduler": self.scheduler,
                 "warmup": self.warmup, "scaler": self.scaler if self.scaler.is_enabled() else None}
        return {name: part for name, part in parts.items() if part is not None}

    def seconds_so_far(self):
        return time.monotonic() - self.started

    def save(self):
        if self.how.resume_path is None:
            return
        own = {"rng": rng_state(), "sums": torch.stack(self.sums).cpu() if self.sums else None,
               "rows": self.rows}
        ranks = [own] * self.world
        if self.world > 1:
            torch.distributed.all_gather_object(ranks, own)
        self.seconds, self.saved_at = self.seconds_so_far(), time.monotonic()
        if self.rank == 0:
            save_tensors(self.how.resume_path, {
                "run": {name: getattr(self, name) for name in self.SAVED}, "ranks": ranks,
                "parts": {name: part.state_dict() for name, part in self.parts().items()},
                "experiment": self.how.experiment})

    def load(self):
        """Goes on from the saved state, if there is one."""
        path, saved = self.how.resume_path, [None]
        if self.rank == 0 and path is not None and os.path.exists(path):
            saved = [load_tensors(path)]
        if self.world > 1:
            torch.distributed.broadcast_object_list(saved)
        saved = saved[0]
        if saved is None:
            return
        try:
            vars(self).update({name: saved["run"][name] for name in self.SAVED})
            own = saved["ranks"][self.rank]
            self.sums = [] if own["sums"] is None else list(own["sums"].to(self.device))
            self.rows = own["rows"]
            for name, part in self.parts().items():
                part.load_state_dict(saved["parts"][name])
            set_rng_state(own["rng"])
            self.started -= self.seconds
        except (KeyError, IndexError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            raise TrainingError(f"{path}: not the state of this run "
                                f"({' '.join(str(error).split())[:200]})") from None

    def goes_on(self):
        return self.epoch < self.how.total_epochs and not self.done

    def agreed(self, *flags):
        """Each flag, or that of any other process: so that all of them do the same."""
        flags = torch.tensor([float(one) for one in flags], device=self.device)
        return (reduce_sum(flags) > 0).tolist()

    def interrupted(self, where, saved=True):
        return Interrupted(f"interrupted {where}; " + (
            "nothing was saved" if self.how.resume_path is None else
            "saved: the same command goes on from here" if saved else
            "the same command goes on from the start of the epoch"))

    def loss(self, network, batch, weigh=None):
        """The summed loss of a batch, and the same with weights, which is what is minimised."""
        *inputs, label = (t.to(self.device, non_blocking=True) for t in batch)
        weight = weigh(inputs.pop()) if weigh else None
        short = AUTOCAST[self.how.amp]
        with torch.autocast(self.device.type, short) if short else nullcontext():
            out = network(*inputs).to(label.dtype)
        if self.how.criterion == "nll":
            each, weight = likelihood_loss(*out.unbind(1), label, weight)
        else:
            each = LOSSES[self.how.criterion](out[:, 0], label, reduction="none")
        total = each.sum()
        return total, total if weight is None else (each * weight).sum()

    def step(self, group):
        """One step of the optimiser, for the mean loss over a group of batches as if they were one.

        The losses stay on the device: reading them would make the host wait.
        """
        how, count = self.how, sum(len(batch[-1]) for batch in group)
        if self.world > 1:
            count = reduce_sum(torch.tensor(float(count), device=self.device))
        for number, batch in enumerate(group, 1):
            # processes exchange gradients once a step, and average them
            with self.no_sync() if number < len(group) else nullcontext():
                total, weighted = self.loss(self.forward, batch, how.weigh)
                self.scaler.scale(weighted * self.world / count).backward()
            self.sums.append(total.detach())
            self.rows.append(len(batch[-1]))
        self.batches += len(group)
        bad = ~torch.isfinite(sum(self.sums[-len(group):]))
        self.bad_batch = torch.where((self.bad_batch < 0) & bad, self.batches - 1, self.bad_batch)
        self.scaler.unscale_(self.optimizer)
        if how.gradient_clipping is not None:
            nn.utils.clip_grad_norm_(self.weights, how.gradient_clipping)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        if how.l1_reg:
            shrink_weights(self.weights, self.optimizer.param_groups[0]["lr"] * how.l1_reg)
        if how.batch_cosine and self.epoch >= how.warmup_epochs:
            for _ in group:
                self.scheduler.step()

    def check_finite(self):
        """Raises NonFiniteLoss, in all processes, where the loss of a step was not finite."""
        worst = self.bad_batch.clone()
        if self.world > 1:
            torch.distributed.all_reduce(worst, torch.distributed.ReduceOp.MAX)
        last = int(worst)
        if last >= 0:
            first = last - last % self.how.gradient_accumulation
            raise NonFiniteLoss(f"the training loss is not finite at epoch {self.epoch + 1}, "
                                f"batch {last + 1}; a lower --lr or clipping may help",
                                self.epoch, list(range(first, last + 1)))

    def train_epoch(self, signals):
        """Trains for what is left of an epoch; its mean loss.

        Between steps it saves when that is due; after a signal, saves and raises Interrupted.
        """
        how, n_batches = self.how, len(self.how.train_loader)
        group, steps, shown = [], 0, None
        read_every = 1 if self.device.type == "cpu" else 50     # reading a loss makes the host wait
        begin_epoch(how.train_loader, self.epoch, self.batches)
        self.model.train()
        with progress(how.train_loader, desc=f"epoch {self.epoch + 1}/{how.total_epochs}",
                      total=n_batches, initial=self.batches, disable=self.rank > 0) as bar:
            for number, batch in enumerate(bar, self.batches + 1):
                group.append(batch)
                if len(group) < how.gradient_accumulation and number < n_batches:
                    continue
                self.step(group)
                group, steps = [], steps + 1
                if steps % read_every and number < n_batches:
                    continue
                self.check_finite()
                loss = float(self.sums[-1]) / max(1, self.rows[-1])
                shown = loss if shown is None else (how.pbar_momentum * shown
                                                    + (1 - how.pbar_momentum) * loss)
                bar.set_postfix_str(f"loss {shown:.4g}", refresh=False)
                if number == n_batches:         # the end of the epoch saves and stops
                    continue
                due = time.monotonic() - self.saved_at > 60 * how.checkpoint_minutes
                due, stop = self.agreed(due, len(signals))
                if self.resumable and (due or stop):
                    self.save()
                if stop:
                    raise self.interrupted(f"at epoch {self.epoch + 1}, batch {number} of "
                                           f"{n_batches}", self.resumable)
        loss, batches = mean_losses(self.sums, self.rows, self.device)
        self.trajectories["batch_train_loss"] += batches
        self.sums, self.rows, self.batches = [], [], 0
        return loss

    def tune_epoch(self):
        """Mean loss over the tune segments, and over `repeat_val` passes."""
        losses = []
        self.model.eval()
        for repeat in range(self.how.repeat_val):
            begin_epoch(self.how.val_loader, self.epoch + self.how.total_epochs * repeat)
            sums, rows = [], []
            with torch.no_grad():
                for batch in self.how.val_loader:
                    sums.append(self.loss(self.model, batch)[0])
                    rows.append(len(batch[-1]))
            mean, batches = mean_losses(sums, rows, self.device)
            losses.append(mean)
            self.trajectories["batch_val_loss"] += batches
        loss = float(np.mean(losses))
        if not math.isfinite(loss):
            raise TrainingError(f"the tune loss is {loss} after epoch {self.epoch + 1}")
        return loss

    def end_epoch(self, train_loss, tune_loss):
        """Notes an epoch's losses, and the weights if they are the best; sets the next rate."""
        how, rate = self.how, self.optimizer.param_groups[0]["lr"]
        for name, value in (("epoch_train_loss", train_loss), ("epoch_val_loss", tune_loss),
                            ("lr", rate)):
            self.trajectories[name].append(value)
        if tune_loss < self.best_loss:
            self.best_loss, self.best_epoch = tune_loss, self.epoch
            self.best_weights = {k: v.detach().clone() for k, v in self.model.state_dict().items()}
        if self.epoch < how.warmup_epochs:
            self.warmup.step()
        elif isinstance(self.scheduler, ReduceLROnPlateau):
            self.scheduler.step(tune_loss)
        elif self.scheduler is not None and not how.batch_cosine:
            self.scheduler.step()
        self.done = 0 < how.early_stopping <= self.epoch - self.best_epoch
        self.epoch += 1
        self.log.append({"epoch": self.epoch, "train_loss": train_loss, "tune_loss": tune_loss,
                         "lr": rate, "best_epoch": self.best_epoch + 1,
                         "seconds": round(self.seconds_so_far(), 2)})


def training_loop(model, train_loader, val_loader, total_epochs, lr, weight_decay=0, l1_reg=0,
                  early_stopping=-1, scheduler_and_args=None, warmup_epochs=0,
                  gradient_accumulation=1, optimizer_type=None, criterion="mse", batch_cosine=False,
                  checkpoints_name=None, verbose=False, gradient_clipping=None, pbar_momentum=0.95,
                  device=None, repeat_val=1, *, amp=None, compiled=False, on_epoch=None,
                  weigh=None, resume_path=None, experiment=None, checkpoint_minutes=10):
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
    anew). criterion: 'mse', 'l1', or 'nll' for a model of two outputs, estimate and spread
    (`likelihood_loss`). amp: 'bf16' or 'fp16' autocast. compiled: through `torch.compile`. weigh:
    the train loader's batches hold one more tensor [B] before the label, and this function makes it
    the segments' weights, about 1 on average. on_epoch: called with a list of dictionaries, one for
    each epoch so far.
    resume_path: the whole state is kept in this file after each epoch, every checkpoint_minutes,
    and when SIGINT or SIGTERM arrive (then raises Interrupted); if the file is there, training goes
    on from it as if it had never stopped, to the last bit on CPU (inside an epoch with our loaders,
    from its start with others). experiment: kept in the file, for the caller to compare.
    Trajectories are arrays: batch_train_loss, epoch_train_loss, batch_val_loss, epoch_val_loss, lr.
    Under torchrun each process passes its own share of the segments; gradients and losses are those
    of all. Raises NonFiniteLoss, and TrainingError for what cannot be trained.
    """
    run = TrainingRun(SimpleNamespace(**locals()))
    with plain_errors(), stop_signals() as signals:
        while run.goes_on():
            train_loss = run.train_epoch(signals)
            run.end_epoch(train_loss, run.tune_epoch())
            run.save()
            if run.rank == 0:
                if checkpoints_name is not None:
                    save_tensors(f"{checkpoints_name}_{run.epoch}.pth", model.state_dict())
                if on_epoch is not None:
                    on_epoch(run.log)
                if verbose:
                    print(f"epoch {run.epoch}/{total_epochs}: train loss {train_loss:.4g}, tune "
                          f"loss {run.log[-1]['tune_loss']:.4g}, best {run.best_loss:.4g} (epoch "
                          f"{run.best_epoch + 1})", flush=True)
            if run.agreed(len(signals))[0] and run.goes_on():
                raise run.interrupted(f"after epoch {run.epoch}")
    model.load_state_dict(run.best_weights)
    return model.cpu(), {name: np.array(values) for name, values in run.trajectories.items()}


@contextmanager
def watch_features(model, keep):
    """Meanwhile, `keep` gets what a `NormalisedModel`'s last layers see of each batch: pooled
    features and vitals, [B, features]."""
    hook = model.network.projection.register_forward_pre_hook(
        lambda _, inputs: keep(inputs[0].detach().cpu().numpy()))
    try:
        yield
    finally:
        hook.remove()


def predict_dataset(model, dataset, batch_size=256, device=None, workers=0):
    """Estimates in mmHg, [N] float32, for the segments of a dataset in its order."""
    return predict_with_spread(model, dataset, batch_size, device, workers)[0]


def predict_with_spread(model, dataset, batch_size=256, device=None, workers=0):
    """(estimates [N], the network's own spread [N] or None), mmHg, float32, in a dataset's order.

    Raises DataError where an answer is not finite.
    """
    device = choose_device(device)
    if device.type == "cpu":
        keep_freed_memory()
    model.to(device).eval()
    loader = make_loader(dataset, batch_size, workers=workers, pin_memory=device.type == "cuda")
    out = []
    with torch.no_grad():
        for batch in progress(loader, desc="predicting", leave=False):
            inputs = [t.to(device, non_blocking=True) for t in batch[:len(model.keys) - 1]]
            out.append(model(*inputs))
    estimates, *spread = torch.cat(out).cpu().numpy().T
    wrong = np.flatnonzero(~np.isfinite(estimates))
    if len(wrong):
        raise DataError(f"{dataset.place(wrong[0])}: the model's answer is {estimates[wrong[0]]} "
                        f"({len(wrong)} of {len(estimates)} segments; damaged PPG or vitals?)")
    return estimates, spread[0] if spread else None
