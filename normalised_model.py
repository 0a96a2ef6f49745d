"""A network in the units of the ward: raw PPG and vitals in, mmHg out; loading and predicting.

    model = NormalisedModel(MyNet(), keys, fit_normaliser(train, keys[1:]))
    model = load_model("runs/M1.5.pth")                 # any saved one
    tpp = predict_dataset(model, dataset)               # [N] mmHg

Needs checkpoint.py, models.py, kernels.py, cuda_graph.py, datasets.py and tk_utils.py.
"""
import os
from typing import Dict, List, Optional

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

import kernels
from checkpoint import CheckpointError, build_network, load_checkpoint
from datasets import SEGMENT_SAMPLES, DataError, make_loader, vitals_of
from models import MyFirstResNet
from tk_utils import progress


class TrainingError(ValueError):
    """Training cannot go on; the message is one line."""


# ------------------------------------------------------------------------------------------- device

def choose_device(name=None) -> torch.device:
    """The `torch.device` of a name such as 'cpu' or 'cuda:1' (or of itself); None: CUDA if present.

    Raises TrainingError for a device that is not here.
    """
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:     # torch without CUDA asserts
        reason = (str(error).splitlines() or ["not available"])[0]
        raise TrainingError(f"device {name!r} cannot be used here ({reason})") from None
    return device


def limit_threads(count: Optional[int] = None) -> None:
    """Use `count` threads on CPU. None: PyTorch's choice, and a hint where the machine is busy."""
    if count is not None:
        torch.set_num_threads(count)
    elif hasattr(os, "getloadavg") and torch.get_num_threads() > 1:
        load, cores = os.getloadavg()[0], os.cpu_count() or 1
        if load > cores:
            print(f"other programs are busy here (load {load:.1f} on {cores} cores): --threads 1 "
                  f"may be faster than {torch.get_num_threads()} threads")


# -------------------------------------------------------------------------------------------- model

MIN_SPREAD = 0.01       # of the label's SD: lower bound on the predicted SD, as divisor


def segment_normalised(ppg: torch.Tensor) -> torch.Tensor:
    """Each segment by its own mean and SD: monitors differ in gain and offset, and the network's
    zero padding would turn an offset into an edge. A flat segment stays flat. [B, 1, L]."""
    ppg = ppg - ppg.mean(-1, keepdim=True)
    return ppg / ppg.pow(2).mean(-1, keepdim=True).sqrt().clamp_min(1e-12)


# Chosen by name, which the checkpoint stores.
PPG_NORMALISATIONS = {"segment": segment_normalised, "none": lambda ppg: ppg}


class NormalisedModel(nn.Module):
    """Raw units in, mmHg out: `model(ppg [B, 1, L] in any scale, *vitals [B]) -> [B, 1]`.

    network: any nn.Module of normalised inputs. keys: as given to `TPP_PPG_dataset`, the PPG first
    (or absent) and the label last. normaliser: {key: {'mean', 'sd', …}} of vitals and label over
    the train split (`fit_normaliser`). anchor: see `fit_anchor`; the network then learns what the
    PPG adds to it. A network of two outputs gives [B, 2]: estimate and spread (SD), mmHg.
    Attributes: the arguments, with_ppg, outputs (1 or 2), checkpoint (a dictionary, or None).
    Raises DataError where network and keys do not fit.
    """

    def __init__(self, network: nn.Module, keys: List[str], normaliser: Dict[str, dict],
                 ppg_normalisation: str = "segment", anchor: Optional[dict] = None):
        super().__init__()
        vitals, label = vitals_of(keys), keys[-1]
        missing = {*vitals, label} - set(normaliser)
        if missing:
            raise DataError(f"keys {', '.join(keys)}: the normaliser lacks {', '.join(missing)}")
        if ppg_normalisation not in PPG_NORMALISATIONS:
            raise DataError(f"PPG normalisation {ppg_normalisation!r}: expected "
                            f"{' or '.join(PPG_NORMALISATIONS)}")
        self.network, self.keys, self.normaliser = network, list(keys), normaliser
        self.ppg_normalisation, self.anchor, self.checkpoint = ppg_normalisation, anchor, None
        self.with_ppg = keys[0] == "ppg"
        # label = output * scale + offset + sum of slope * normalised vital
        mean, sd = ([normaliser[key][what] for key in vitals] for what in ("mean", "sd"))
        scale, offset, slopes = normaliser[label]["sd"], normaliser[label]["mean"], [0.0] * len(sd)
        if anchor:
            weights = [anchor["coefficients"][key] for key in vitals]
            slopes = [w * one for w, one in zip(weights, sd)]
            scale = anchor["sd"]
            offset = anchor["intercept"] + sum(w * one for w, one in zip(weights, mean))
        # Not persistent: the network's own state dict keeps the published names and nothing else.
        for name, values in (("vital_mean", mean), ("vital_sd", sd), ("slopes", slopes),
                             ("scale", [scale]), ("offset", [offset])):
            self.register_buffer(name, torch.tensor(values, dtype=torch.float32), persistent=False)
        self.outputs = self.try_network()

    def try_network(self) -> int:
        """The number of outputs, found by passing two flat segments through the network."""
        like, training = next(self.network.parameters(), torch.zeros(1)), self.network.training
        example = ([like.new_zeros(2, 1, SEGMENT_SAMPLES)] * self.with_ppg
                   + [like.new_zeros(2)] * len(self.slopes))
        try:
            with torch.no_grad():
                shape = tuple(self.network.eval()(*example).shape)
        except (RuntimeError, TypeError, ValueError, IndexError, AttributeError) as error:
            raise DataError(f"keys {', '.join(self.keys)}: {type(self.network).__name__} does not "
                            f"take them ({' '.join(str(error).split())[:200]})") from error
        finally:
            self.network.train(training)
        if shape not in ((2, 1), (2, 2)):
            raise DataError(f"{type(self.network).__name__}: an output of shape {shape} for two "
                            "segments; expected [B, 1], or [B, 2] with a spread")
        return shape[1]

    def fast(self):
        """What runs the network on its device: see kernels.py."""
        device = self.scale.device
        if self.__dict__.get("fast_on") != device:      # not registered as a second network
            self.__dict__.update(fast_on=device, fast_network=kernels.accelerate(self.network))
        return self.__dict__["fast_network"]

    def normalise(self, inputs) -> List[torch.Tensor]:
        ppg, vitals = inputs[:self.with_ppg], inputs[self.with_ppg:]
        return ([PPG_NORMALISATIONS[self.ppg_normalisation](one) for one in ppg]
                + [(v - self.vital_mean[i]) / self.vital_sd[i] for i, v in enumerate(vitals)])

    def to_mmhg(self, out, normalised):
        estimate = out[:, :1] * self.scale + self.offset
        if self.anchor:
            for slope, vital in zip(self.slopes, normalised[self.with_ppg:]):
                estimate = estimate + slope * vital.view(-1, 1)
        if out.shape[1] == 1:
            return estimate
        return torch.cat([estimate, (F.softplus(out[:, 1:]) + MIN_SPREAD) * self.scale], 1)

    def forward(self, *inputs):
        normalised = self.normalise(inputs)
        return self.to_mmhg(self.fast()(*normalised), normalised)

    def features(self, *inputs) -> Optional[torch.Tensor]:
        """[B, F]: the network's features() of raw inputs; None where it has none."""
        find = getattr(self.fast(), "features", None)
        return None if find is None else find(*self.normalise(inputs))

    def with_features(self, *inputs):
        """(output, features [B, F] or None) of raw inputs; the published network: in one pass."""
        if not isinstance(self.network, MyFirstResNet):
            return self(*inputs), self.features(*inputs)
        features = self.features(*inputs)
        out = self.network.mlp(self.network.projection(features))
        return self.to_mmhg(out, self.normalise(inputs)), features


def fit_anchor(dataset, keys: List[str], alpha: float = 1.0) -> dict:
    """The ridge of the label on the vitals over a (train) dataset: `NormalisedModel(anchor=…)`.

    {'coefficients': {vital: mmHg per unit}, 'intercept': mmHg, 'sd': SD of its residuals, mmHg}.
    """
    vitals, label = vitals_of(keys), dataset.column(keys[-1]).numpy().astype(np.float64)
    inputs = np.stack([dataset.column(key).numpy().astype(np.float64) for key in vitals], 1)
    mean, sd = inputs.mean(0), inputs.std(0)
    scaled = (inputs - mean) / sd
    weights = np.linalg.solve(scaled.T @ scaled + alpha * np.eye(len(vitals)),
                              scaled.T @ (label - label.mean())) / sd
    intercept = label.mean() - weights @ mean
    return {"coefficients": dict(zip(vitals, weights.tolist())), "intercept": float(intercept),
            "sd": float(np.std(label - intercept - inputs @ weights))}


def fit_blend(model, dataset) -> float:
    """The share of what the network adds to its anchor that is kept, 0 to 1; applied to `model`.

    Least squares of label - anchor on network - anchor over a (tune) dataset, each patient with the
    same weight, then shrunk by its own uncertainty over patients (James & Stein, positive part). So
    where the PPG is not shown to add anything, the model stays with the ridge it stands on.
    """
    added, scale = predict_dataset(model, dataset).astype(float), float(model.scale)
    model.scale.zero_()
    anchor = predict_dataset(model, dataset).astype(float)
    model.scale.fill_(scale)
    missing, added = dataset.column(model.keys[-1]).numpy() - anchor, added - anchor
    patients = dataset.index.segment_patients()
    weight = 1 / np.bincount(patients)[patients]
    squares = np.sum(weight * added ** 2)
    if not squares > 0:
        return 1.0
    share = np.sum(weight * added * missing) / squares
    of_patients = np.bincount(patients, weight * added * (missing - share * added))
    error = np.sqrt(np.sum(of_patients ** 2)) / squares
    share = float(np.clip(share - error ** 2 / share, 0, 1)) if share > 0 else 0.0
    model.anchor = dict(model.anchor, sd=model.anchor["sd"] * share, blend=share)
    model.scale.mul_(share)
    return share


def load_model(path_or_checkpoint, device=None, network=None) -> NormalisedModel:
    """The model of a checkpoint (a path, or what `load_checkpoint` gave), ready to predict.

    network: for a network of your own, the module, its class, or 'my_net.py:MyNet'.
    Returns a `NormalisedModel` in evaluation mode. Raises CheckpointError.
    """
    saved, path = path_or_checkpoint, ""
    if not isinstance(saved, dict):
        saved, path = load_checkpoint(saved), f"{saved}: "
    try:
        model = NormalisedModel(build_network(saved, network), saved["keys"], saved["normaliser"],
                                saved["ppg_normalisation"], saved["anchor"])
    except (CheckpointError, DataError, KeyError) as error:
        raise CheckpointError(f"{path}{error}") from None
    model.checkpoint = saved
    return model.to(device or "cpu").eval()


# --------------------------------------------------------------------------------------- prediction

def predict_dataset(model, dataset, batch_size=256, device=None, workers=0) -> np.ndarray:
    """Estimates in mmHg, [N] float32, for the segments of a dataset in its order."""
    return predict_with_spread(model, dataset, batch_size, device, workers)[0]


def predict_with_spread(model, dataset, batch_size=256, device=None, workers=0,
                        collect_features=False):
    """(estimates [N], the network's own SD [N] or None, features [N, F] or None), in mmHg, float32.

    In the order of the dataset. Features where collect_features and the network has features().
    Raises DataError where a prediction is not finite.
    """
    device = choose_device(device)
    kernels.prepare_device(device)
    model.to(device).eval()
    loader = make_loader(dataset, batch_size, workers=workers, pin_memory=device.type == "cuda")
    n_inputs = len(model.keys) - 1
    outputs, features = [], []
    with torch.no_grad():
        predict = model.with_features if collect_features else model
        for batch in kernels.feed(progress(loader, desc="predicting", leave=False), device):
            if not outputs and len(loader) > 1:
                predict = kernels.capture_inference(predict, batch[:n_inputs])
            found = predict(*batch[:n_inputs])
            out, feature = found if collect_features else (found, None)
            outputs.append(out.float())
            if feature is not None:
                features.append(feature.float().cpu())
    estimates, *spread = torch.cat(outputs).cpu().numpy().T
    wrong = np.flatnonzero(~np.isfinite(estimates))
    if len(wrong):
        raise DataError(f"{dataset.place(wrong[0])}: the model's prediction is "
                        f"{estimates[wrong[0]]} ({len(wrong)} of {len(estimates)} segments; "
                        "damaged PPG or vitals?)")
    return (estimates, spread[0] if spread else None,
            torch.cat(features).numpy() if features else None)
