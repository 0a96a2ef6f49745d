"""A trained network on disk, and whose data it has seen.

    save_checkpoint("runs/mine.pth", model)             # a NormalisedModel; the rest is optional
    checkpoint = load_checkpoint("runs/mine.pth")       # a checked dictionary
    network = build_network(checkpoint)                 # with its weights

A checkpoint holds tensors and plain values, never code. A network of your own is stored as
'my_net.py:MyNet' with its arguments; loading it asks for the same --model (from Python: network=).
Patients are stored as salted hashes; the salt stays with the data.

Needs models.py, datasets.py and tk_utils.py.
"""
import hashlib
import importlib.util
import inspect
import io
import math
import os
import re
import sys
import zipfile
from typing import Callable, List, Optional, Set, Tuple

import filelock
import numpy as np
import torch
from torch import nn

from datasets import LABELS, DataError, hash_patients
from models import MODELS, ConvBlock, MyFirstResNet, SpreadResNet
from tk_utils import atomic_file, atomic_path, printable


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the message is one line."""


# ----------------------------------------------------------------------------------------- tensors

def save_tensors(path, obj) -> None:
    """Atomic `torch.save`; raises OSError when the disk is full."""
    buffer = io.BytesIO()
    torch.save(obj, buffer)
    with atomic_file(path, "wb") as file:
        file.write(buffer.getbuffer())


def load_tensors(path):
    """What `torch.save` wrote, if it is tensors and plain values. Raises CheckpointError."""
    if not os.path.exists(path):
        raise CheckpointError(f"{path}: no such checkpoint (python train_resnet.py makes one)")
    if not os.path.isfile(path):
        raise CheckpointError(f"{path}: not a checkpoint (expected a file)")
    if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 6):
        print(f"WARNING: with PyTorch {torch.__version__}, below 2.6, a checkpoint from a stranger "
              "can run code when it is loaded (CVE-2025-32434)", file=sys.stderr)
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()         # PyTorch does not look at the check sums
        if damaged is not None:
            raise ValueError(f"damaged: wrong check sum of {damaged}")
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # noqa: BLE001 - a foreign file fails in the unpickler in many ways
        raise CheckpointError(f"{path}: not a checkpoint ({type(error).__name__}: "
                              f"{printable(error)[:200]})") from None


# -------------------------------------------------------------------------------------- checkpoint

def save_checkpoint(path, model, *, spec: Optional[str] = None, model_args: Optional[dict] = None,
                    config: Optional[dict] = None, split: Optional[dict] = None,
                    provenance: Optional[dict] = None, metrics: Optional[dict] = None,
                    calibration: Optional[dict] = None) -> dict:
    """Write a `NormalisedModel` and what it takes to understand it later, atomically.

    spec, model_args: the network's name ('resnet_v3' or 'my_net.py:MyNet') and arguments; by
    default as the model was loaded, or read off the network. config: options of the run; split:
    {part: [hashed patients]}; provenance: origin of the data, versions, seeds. Returns the
    dictionary, which `model.checkpoint` then is, too.
    """
    if not hasattr(model, "normaliser"):
        raise CheckpointError(f"{path}: expected NormalisedModel(network, keys, normaliser), got "
                              f"a {type(model).__name__}")
    if spec is None:
        known = model.checkpoint or {}
        spec, model_args = known.get("spec"), known.get("model_args")
    if spec is None:
        spec, model_args = describe_network(model.network)
    weights = model.network.state_dict()
    model.checkpoint = {
        "model": {k: v.detach().cpu().clone().contiguous() for k, v in weights.items()},
        "spec": spec, "model_args": model_args or {}, "keys": list(model.keys),
        "normaliser": model.normaliser, "ppg_normalisation": model.ppg_normalisation,
        "anchor": model.anchor, "config": {"condition": "default", **(config or {})},
        "split": split or {}, "provenance": {"origin": "unknown", **(provenance or {})},
        "metrics": metrics or {}, "calibration": calibration or {}}
    save_tensors(path, model.checkpoint)
    return model.checkpoint


def load_checkpoint(path) -> dict:
    """The dictionary of a checkpoint, checked. Raises CheckpointError."""
    checkpoint = load_tensors(path)
    expected = {"model": dict, "spec": str, "model_args": dict, "keys": list, "normaliser": dict,
                "ppg_normalisation": str, "config": dict, "split": dict, "provenance": dict,
                "metrics": dict, "calibration": dict}
    for key, kind in expected.items():
        if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get(key), kind):
            raise CheckpointError(f"{path}: not a checkpoint of this project (no {kind.__name__} "
                                  f"{key!r}; those written before October 2026 do not load)")
    try:
        check_schema(checkpoint)
    except (ValueError, TypeError, LookupError, AttributeError) as error:
        raise CheckpointError(f"{path}: {printable(error)[:300]}") from None
    return checkpoint


def check_schema(saved: dict) -> None:
    """Raise ValueError, TypeError or KeyError where a checkpoint's parts do not fit."""
    keys, normaliser = saved["keys"], saved["normaliser"]
    if len(keys) < 2 or "ppg" in keys[1:] or keys[-1] not in LABELS or len(set(keys)) < len(keys):
        raise ValueError(f"keys {keys}: expected ppg, vitals and {' or '.join(LABELS)}")
    for key in keys[keys[0] == "ppg":]:
        mean, sd = normaliser[key]["mean"], normaliser[key]["sd"]
        if not (math.isfinite(mean) and 0 < sd < math.inf):
            raise ValueError(f"normaliser of {key}: mean {mean}, SD {sd}")
    for name, weights in saved["model"].items():
        if not isinstance(weights, torch.Tensor) or not torch.isfinite(weights).all():
            raise ValueError(f"weights {name}: expected finite numbers")
    for part, hashes in saved["split"].items():
        if not all(isinstance(one, str) for one in hashes):
            raise ValueError(f"split {part}: expected hashed patients")


# -------------------------------------------------------------------------------------- the network

def load_by_name(name, table: dict, option: str) -> Callable:
    """An entry of a table, or of your own file: 'my_net.py:MyNet'. A callable is returned as it is.

    Raises CheckpointError. option: e.g. '--model', for the message.
    """
    if callable(name):
        return name
    if name in table:
        return table[name]
    path, colon, attribute = name.rpartition(":")
    if not colon or not path.endswith(".py"):
        raise CheckpointError(f"{option} {name}: expected {', '.join(table)} or file.py:Name")
    if not os.path.exists(path):
        raise CheckpointError(f"{option} {name}: {path}: no such file")
    folder = os.path.dirname(os.path.abspath(path))
    if folder not in sys.path:
        sys.path.append(folder)         # for modules that the file imports from its own folder
    module_name = os.path.splitext(os.path.basename(path))[0]
    known = sys.modules.get(module_name)
    if known is None or os.path.realpath(known.__file__ or "") != os.path.realpath(path):
        source = importlib.util.spec_from_file_location(module_name, path)
        known = importlib.util.module_from_spec(source)
        if module_name not in sys.modules:
            sys.modules[module_name] = known
        source.loader.exec_module(known)
    if not callable(getattr(known, attribute, None)):
        raise CheckpointError(f"{option} {name}: {path} has no {attribute}")
    return getattr(known, attribute)


def new_network(name, **wanted) -> Tuple[nn.Module, str, dict]:
    """(network, spec, arguments) of --model NAME or file.py:Name, with fresh weights.

    wanted: arguments such as num_discrete, passed where the builder accepts them.
    """
    builder = load_by_name(name, MODELS, "--model")
    parameters = inspect.signature(builder).parameters
    takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    arguments = {k: v for k, v in wanted.items() if takes_all or k in parameters}
    spec = name if name in MODELS else f"{os.path.basename(name.rpartition(':')[0])}:" \
        f"{name.rpartition(':')[2]}"
    network = builder(**arguments)
    if not isinstance(network, nn.Module):
        raise CheckpointError(f"--model {name}: expected an nn.Module, got a "
                              f"{type(network).__name__}")
    return network, spec, arguments


def describe_network(network: nn.Module) -> Tuple[str, dict]:
    """(spec, arguments) of a network, read off its layers where it is one of models.py."""
    spec = {MyFirstResNet: "resnet_v3", SpreadResNet: "resnet_spread"}.get(type(network))
    if spec is None:
        kind = type(network)
        file = os.path.basename(getattr(sys.modules.get(kind.__module__), "__file__", "") or "")
        return f"{file or 'your.py'}:{kind.__name__}", {}
    arguments = {"num_discrete": network.num_discrete, "in_channels": network.in_channels,
                 "num_outputs": network.mlp[-1].out_features, "dropout": network.dropout.p}
    if len(network.layers):
        first, *blocks = network.layers
        convolutions = [layer.conv if isinstance(layer, ConvBlock) else layer.conv1.conv
                        for layer in (first, *blocks)]
        arguments.update(widths=[conv.out_channels for conv in convolutions],
                         kernel_sizes=[conv.kernel_size[0] for conv in convolutions],
                         strides=[conv.stride[0] for conv in convolutions[1:]])
    return spec, arguments


def build_network(checkpoint: dict, network=None) -> nn.Module:
    """The checkpoint's network with its weights. Raises CheckpointError.

    network: for one of your own, the module itself, its class, or 'my_net.py:MyNet'.
    """
    spec = checkpoint["spec"]
    if network is None and spec not in MODELS:
        raise CheckpointError(f"trained with a network of your own: --model {spec} (with the path "
                              "of that file; from Python: network=) loads it")
    try:
        if not isinstance(network, nn.Module):
            network = load_by_name(network or spec, MODELS, "--model")(**checkpoint["model_args"])
        network.load_state_dict(checkpoint["model"], strict=True)
    except (TypeError, ValueError, RuntimeError, ZeroDivisionError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError("the saved weights and settings do not fit "
                              f"({printable(error)[:200]})") from None
    return network


# --------------------------------------------------------------------------- whose data it has seen

def default_salt_path(data_path) -> str:
    """The project's salt: in the folder of its data."""
    return os.path.join(os.path.dirname(data_path), "tpp_ppg.salt")


def read_salt(path) -> str:
    """The project's salt for hashing patients; made on first use, readable by its owner only.

    An empty or half-written file, which a killed process of an older version left, is made again.
    """
    if _saved_salt(path) is None:
        folder, name = os.path.split(os.path.abspath(path))
        with filelock.FileLock(os.path.join(folder, f".{name}.lock")):
            if _saved_salt(path) is None:       # no other process has made it meanwhile
                with atomic_path(path) as temporary:
                    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
                    with os.fdopen(descriptor, "w") as file:
                        file.write(os.urandom(16).hex() + "\n")
                os.chmod(path, 0o600)
    return _saved_salt(path)


def _saved_salt(path) -> Optional[str]:
    """The salt in a file; None where there is none yet. Raises DataError for anything else."""
    try:
        with open(path, encoding="ascii", errors="replace") as file:
            text = file.read(100)
    except FileNotFoundError:
        return None
    if re.fullmatch("[0-9a-f]{32}\n?", text):
        return text.strip()
    if re.fullmatch("[0-9a-f]{0,31}", text):        # cut off in the only write
        return None
    raise DataError(f"{path}: expected a salt, 32 hexadecimal characters")


def salt_mark(salt: str) -> str:
    """Shows whether two salts are the same without giving them away; kept in the checkpoint."""
    return hashlib.sha256(f"salt {salt}".encode()).hexdigest()[:16]


def hash_split(parts: dict, salt: str) -> dict:
    """{part: hashed patients} of {part: DatasetIndex}."""
    return {name: hash_patients(part.patients.tolist(), salt) for name, part in parts.items()}


def seen_by(checkpoint: dict) -> Set[str]:
    """Hashes of the patients that a checkpoint or its ancestors were trained or tuned on."""
    return set().union(*(hashes for part, hashes in checkpoint["split"].items() if part != "test"))


def patient_parts(index, checkpoint: dict, salt_path) -> Optional[np.ndarray]:
    """The part of the run in which each patient of an index was: [P] of 'train', …, or None.

    By the checkpoint's salted hashes, so it holds for any file. Returns None, with a warning, where
    the run's salt is not at `salt_path`.
    """
    salt = read_salt(salt_path) if os.path.exists(salt_path) else None
    if salt is None or salt_mark(salt) != checkpoint["provenance"].get("salt"):
        print(f"WARNING: {salt_path}: {'not the salt of this run' if salt else 'no such file'}, so "
              "whether these patients were trained on COULD NOT BE CHECKED", file=sys.stderr)
        return None
    known = {one: part for part, hashes in checkpoint["split"].items() for one in hashes}
    hashes: List[str] = hash_patients(index.patients.tolist(), salt)
    return np.array([known.get(one) for one in hashes], dtype=object)


def weights_fingerprint(checkpoint: dict) -> str:
    """Identifies a parent's weights in the checkpoint of a fine-tuned network."""
    found = hashlib.sha256()
    for weights in checkpoint["model"].values():
        found.update(weights.numpy().tobytes())
    return found.hexdigest()
