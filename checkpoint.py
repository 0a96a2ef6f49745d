"""A trained network on disk, and which patients it has seen.

    save_checkpoint("runs/mine.pth", model)             # a NormalisedModel; the rest is optional
    network = build_network(load_checkpoint("runs/mine.pth"))

    python checkpoint.py FILE --who 17/2 3f2a…  # look up the patient behind a message (private)

A checkpoint holds tensors and plain values, no code. Patients are stored as salted hashes; the
salt stays with the data. Needs models.py, datasets.py and tk_utils.py.
"""
import copy
import hashlib
import importlib.util
import inspect
import io
import os
import re
import sys
import zipfile
from contextlib import suppress
from typing import Callable, List, NamedTuple, Optional, Set, Tuple

import filelock
import numpy as np
import torch
from torch import nn

import datasets
from datasets import LABELS, DataError, DatasetIndex
from models import MODELS
from tk_utils import ScriptParser, atomic_file, one_line, printable, run_script

SEEN = ["train", "tune", "ancestors"]       # parts of a split that shaped the weights


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the message is one line."""


def save_tensors(path, obj) -> None:
    """Atomic `torch.save`; raises OSError when the disk is full."""
    buffer = io.BytesIO()
    torch.save(obj, buffer)
    with atomic_file(path, "wb") as file:
        file.write(buffer.getbuffer())


def load_tensors(path):
    """Load a file of `torch.save` with tensors and plain values only. Raises CheckpointError."""
    if not os.path.isfile(path):
        raise CheckpointError(f"{path}: no such checkpoint (python train_resnet.py makes one)")
    if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 6):
        print(f"WARNING: with PyTorch {torch.__version__}, below 2.6, a checkpoint from a stranger "
              "can run code when it is loaded (CVE-2025-32434)", file=sys.stderr)
    with one_line(f"{path}: not a checkpoint", CheckpointError):
        with zipfile.ZipFile(path) as archive:
            if archive.testzip() is not None:       # PyTorch does not verify the check sums
                raise ValueError("damaged: wrong check sum")
        return torch.load(path, map_location="cpu", weights_only=True)


def save_checkpoint(path, model, *, spec: Optional[str] = None, model_args: Optional[dict] = None,
                    config=None, split=None, provenance=None, metrics=None,
                    calibration=None) -> dict:
    """Write a `NormalisedModel` atomically; return the dictionary and set `model.checkpoint` to it.

    spec, model_args: the network's name ('resnet_v3' or 'my_net.py:MyNet') and arguments; by
    default those it was loaded with, or `describe_network`. config: options of the run. split: the
    result of `split_index` (tells `evaluate.py` which patients the model has seen), or {part:
    [hashed patients]}. provenance, metrics, calibration: dictionaries.
    """
    if not hasattr(model, "normaliser"):
        raise CheckpointError(f"{path}: expected NormalisedModel(network, keys, normaliser), got "
                              f"a {type(model).__name__}")
    if spec is None and model.checkpoint:
        spec, model_args = model.checkpoint["spec"], model.checkpoint["model_args"]
    elif spec is None:
        spec, model_args = describe_network(model.network)
    config, provenance = config or {}, provenance or {}
    if split and all(isinstance(part, DatasetIndex) for part in split.values()):
        index = next(iter(split.values()))
        salt = read_salt(default_salt_path(index.paths[0]))
        split, config = hash_split(split, salt), {"condition": index.condition, **config}
        provenance = {**domain_of(index), "salt": salt_mark(salt), **provenance}
    weights = model.network.state_dict()
    model.checkpoint = {
        "model": {k: v.detach().cpu().clone().contiguous() for k, v in weights.items()},
        "spec": spec, "model_args": model_args or {}, "keys": list(model.keys),
        "inputs": model.inputs, "normaliser": model.normaliser, "anchor": model.anchor,
        "ppg_normalisation": model.ppg_normalisation, "split": split or {},
        "config": {"condition": "default", **config},
        "provenance": {"origin": "unknown", **provenance},
        "metrics": metrics or {}, "calibration": calibration or {}}
    save_tensors(path, model.checkpoint)
    return model.checkpoint


def load_checkpoint(path) -> dict:
    """Load and check the dictionary of a checkpoint. Raises CheckpointError."""
    checkpoint = load_tensors(path)
    for key in ("model", "spec", "model_args", "keys", "normaliser", "ppg_normalisation", "anchor",
                "config", "split", "provenance", "metrics", "calibration"):
        if not isinstance(checkpoint, dict) or key not in checkpoint:
            raise CheckpointError(f"{path}: not a checkpoint of this project (no {key!r}; "
                                  "checkpoints from before October 2026 do not load)")
    keys, normaliser = checkpoint["keys"], checkpoint["normaliser"]
    if len(keys) < 2 or "ppg" in keys[1:] or keys[-1] not in LABELS:
        raise CheckpointError(f"{path}: keys {keys}: expected ppg, vitals, {' or '.join(LABELS)}")
    for key in [key for key in keys if key != "ppg"]:
        if not 0 < normaliser.get(key, {"sd": 0})["sd"] < np.inf:
            raise CheckpointError(f"{path}: normaliser of {key}: expected a positive SD")
    for name, weights in checkpoint["model"].items():
        if not torch.isfinite(weights).all():
            raise CheckpointError(f"{path}: weights {name}: expected finite numbers")
    return checkpoint


class Run(NamedTuple):
    """What a checkpoint says about its run; the defaults apply to a model in memory."""
    condition: str = "default"          # the quality gate
    loss: str = "mse"
    origin: str = "unknown"             # of the data, see `datasets.origin_of`
    label_method: str = "unknown"
    split: dict = {}                    # {part: hashed patients}
    calibration: dict = {}              # of the prediction intervals


def run_of(checkpoint: Optional[dict]) -> Run:
    """The `Run` of a checkpoint, or of a model without one."""
    if checkpoint is None:
        return Run()
    found = {**checkpoint["config"], **checkpoint["provenance"], **checkpoint}
    return Run(**{name: found[name] for name in Run._fields if name in found})


def _module(path):
    """The module of a file, executed once, even if that file is the running script."""
    running = sys.modules["__main__"]
    if os.path.realpath(getattr(running, "__file__", None) or "") == path:
        return running
    if path not in sys.modules:
        sys.path.append(os.path.dirname(path))  # so that it can import files of its own folder
        name = os.path.splitext(os.path.basename(path))[0]
        source = importlib.util.spec_from_file_location(name, path)
        sys.modules[path] = module = importlib.util.module_from_spec(source)
        sys.modules.setdefault(name, module)
        try:
            source.loader.exec_module(module)
        except BaseException:
            del sys.modules[path]
            raise
    return sys.modules[path]


def load_by_name(name, table: dict, option: str) -> Callable:
    """An entry of a table, or of your own file: 'my_net.py:MyNet'. A callable is returned as it is.
    option: named in messages, such as '--model'. Raises CheckpointError."""
    if callable(name):
        return name
    if name in table:
        return table[name]
    path, _, attribute = str(name).rpartition(":")
    if not path.endswith(".py") or not os.path.exists(path):
        raise CheckpointError(f"{option} {name}: expected {', '.join(table)} or file.py:Name of an "
                              "existing file")
    with one_line(f"{option} {name}: {path} fails", CheckpointError):
        found = getattr(_module(os.path.realpath(path)), attribute, None)
    if not callable(found):
        raise CheckpointError(f"{option} {name}: {path} has no class or function {attribute}")
    return found


def new_network(name, **wanted) -> Tuple[nn.Module, str, dict]:
    """(network with fresh weights, spec, arguments) of --model NAME or file.py:Name. wanted:
    arguments such as num_discrete; those that the builder accepts are passed."""
    builder = load_by_name(name, MODELS, "--model")
    expected = f"--model {name}: expected a class of nn.Module, or a function that returns one"
    if isinstance(builder, nn.Module):
        raise CheckpointError(f"{expected}; got an instance of {type(builder).__name__}")
    parameters = inspect.signature(builder).parameters
    takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    arguments = {k: v for k, v in wanted.items() if takes_all or k in parameters}
    with one_line(f"{expected}; fails, given {', '.join(arguments) or 'nothing'}", CheckpointError):
        network = builder(**arguments)
    if not isinstance(network, nn.Module):
        raise CheckpointError(f"{expected}; got a {type(network).__name__}")
    return network, os.path.basename(name), arguments


def describe_network(network: nn.Module) -> Tuple[str, dict]:
    """(spec, arguments) of a network; arguments are known only for networks of models.MODELS."""
    kind = type(network)
    if vars(kind).get("entry") in MODELS:
        return kind.entry, network.arguments
    file = getattr(sys.modules.get(kind.__module__), "__file__", None) or "your.py"
    return f"{os.path.basename(file)}:{kind.__name__}", {}


def build_network(checkpoint: dict, network=None) -> nn.Module:
    """The checkpoint's network with its weights. network: your own module, its class or
    'my_net.py:MyNet', if it is not in models.MODELS. Raises CheckpointError."""
    spec = checkpoint["spec"]
    if network is None and spec not in MODELS:
        raise CheckpointError(f"trained with a network of your own: --model {spec} (with the path "
                              "of that file; from Python: network=) loads it")
    with one_line(f"saved with {spec}, whose settings do not fit", CheckpointError):
        network = copy.deepcopy(network) if isinstance(network, nn.Module) else load_by_name(
            network or spec, MODELS, "--model")(**checkpoint["model_args"])
    with one_line(f"saved with {spec}, given {describe_network(network)[0]}: its parameters have "
                  "other names or shapes", CheckpointError):
        network.load_state_dict(checkpoint["model"], strict=True)
    return network


def default_salt_path(data_path) -> str:
    """Where the project's salt is: in the folder of its data."""
    return os.path.join(os.path.dirname(data_path), "tpp_ppg.salt")


def read_salt(path) -> str:
    """The project's salt for hashing patients; made on first use, readable by its owner only."""
    if saved_salt(path) is None:
        folder, name = os.path.split(os.path.abspath(path))
        with filelock.FileLock(os.path.join(folder, f".{name}.lock")):
            if saved_salt(path) is None:        # no other process has made it meanwhile
                with suppress(FileNotFoundError):
                    os.remove(path)             # incomplete, and perhaps readable by others
                with atomic_file(path, opener=lambda *name: os.open(*name, 0o600)) as file:
                    file.write(os.urandom(16).hex() + "\n")
    return saved_salt(path)


def saved_salt(path) -> Optional[str]:
    """The salt in a file; None if there is none, or only the beginning of one. Raises DataError for
    any other file."""
    if not os.path.exists(path):
        return None
    with open(path, encoding="ascii", errors="replace") as file:
        text = file.read(100)
    if not re.fullmatch("[0-9a-f]{0,31}|[0-9a-f]{32}\n?", text):
        raise DataError(f"{path}: expected a salt, 32 hexadecimal characters")
    return text.strip() if len(text) >= 32 else None


def hash_patients(patients, salt) -> List[str]:
    """Salted hashes of patients' names; these may leave the hospital."""
    return [hashlib.sha256(f"{salt}/{patient}".encode()).hexdigest()[:16] for patient in patients]


def domain_of(index: DatasetIndex) -> dict:
    """Origin and label method of an index: prediction intervals hold only for such data."""
    return {"origin": datasets.origin_of(index.paths),
            "label_method": datasets.origin_of(index.paths, "label_method")}


def salt_mark(salt: str) -> str:
    """A hash of the salt, kept in the checkpoint: compares two salts without revealing them."""
    return hashlib.sha256(f"salt {salt}".encode()).hexdigest()[:16]


def hash_split(parts: dict, salt: str) -> dict:
    """{part: hashed patients} of {part: DatasetIndex}."""
    return {name: hash_patients(part.patients.tolist(), salt) for name, part in parts.items()}


def seen_by(checkpoint: dict) -> Set[str]:
    """Hashes of the patients that a checkpoint or its ancestors were trained or tuned on."""
    return set().union(*(checkpoint["split"].get(part, ()) for part in SEEN))


def patient_parts(index, checkpoint: dict, salt_path) -> Optional[np.ndarray]:
    """The part of a run ('train', …, or None) to which each patient of an index belonged, [P], by
    salted hashes. Without the run's salt: None, and a warning."""
    salt = saved_salt(salt_path)
    if salt is None or salt_mark(salt) != checkpoint["provenance"].get("salt"):
        why = (f"{salt_path}: {'not the salt of this run' if salt else 'no such file'}"
               if checkpoint["split"] else "the checkpoint was saved without its split")
        print(f"WARNING: {why}, so it COULD NOT BE CHECKED whether the model was trained on these "
              "patients", file=sys.stderr)
        return None
    known = {patient: part for part, hashes in checkpoint["split"].items() for patient in hashes}
    hashes = hash_patients(index.patients.tolist(), salt)
    return np.array(list(map(known.get, hashes)), dtype=object)


def weights_fingerprint(checkpoint: dict) -> str:
    """A hash that identifies a parent's weights in the checkpoint of a fine-tuned network."""
    weights = [tensor.numpy().tobytes() for tensor in checkpoint["model"].values()]
    return hashlib.sha256(b"".join(weights)).hexdigest()


def fingerprint(index: DatasetIndex, keys: List[str]) -> str:
    """A checksum of the data that a run reads, the same for a copy of the files. It covers their
    sizes, the index, every column among the keys, and 4,096 evenly spaced rows (59 MB) of each
    waveform."""
    found = hashlib.sha256(repr((index.stamps[:, 0].tolist(), list(keys))).encode())
    for name in ("patients", "encounters", "encounter_patient", "encounter_file", "starts", "rows"):
        found.update(np.ascontiguousarray(getattr(index, name)))
    dataset = datasets.TPP_PPG_dataset(index, "segment", keys)
    sample = np.unique(np.linspace(0, len(index) - 1, 4096).astype(np.int64))
    for key in keys:
        found.update(dataset.waveform(key, sample) if key in datasets.WAVEFORMS else
                     dataset.column(key).numpy())
    return found.hexdigest()


def look_up():
    """`python checkpoint.py FILE --who …`: print the names behind numbers and hashes."""
    parser = ScriptParser(description="Private: only for people who may see the data.")
    parser.add_argument("file", help="an HDF5 file of the layout")
    parser.add_argument("--who", nargs="+", required=True, help="17 (patient), 17/2 (patient and "
                        "encounter), or a patient's hash, by tpp_ppg.salt next to the file")
    options, names = parser.parse_args(), {}
    salt = saved_salt(default_salt_path(options.file))
    with datasets.open_file(options.file) as file:
        for i, patient, group in datasets.groups_of(file):
            names.update({str(i): patient, hash_patients([patient], salt)[0]: patient})
            names.update({f"{i}/{j}": f"{patient}/{k}" for j, k, _ in datasets.groups_of(group)})
    for who in options.who:
        print(f"{who}: {printable(names.get(who, 'not in this file'))}")


if __name__ == "__main__":
    sys.exit(run_script(look_up, DataError))
