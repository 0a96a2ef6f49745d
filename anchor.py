"""The ridge of the label on vitals and pulse statistics, to which the network's output is added.

    anchor = fit_anchor(train, keys)                    # train: a TPP_PPG_dataset
    statistics = pulse_statistics(ppg)                  # [B, 1, 3600] -> [B, 12]

`NormalisedModel` adds the network to an anchor. After training, `fit_blend` (both are in
training_header.py) chooses how much of each to keep (docs/real-recordings.md). Needs datasets.py.
"""
from typing import List, Optional

import numpy as np
import torch
from sklearn.linear_model import Ridge
from sklearn.model_selection import GroupKFold
from sklearn.preprocessing import StandardScaler
from torch.nn import functional as F

from datasets import FS, DataError, TPP_PPG_dataset, vitals_of

MAX_ANCHOR_SEGMENTS = 50_000    # to which anchor and blend are fitted

PULSE_STATISTICS = (    # of the beats of a minute; variations and loudness as logarithms
    "variation of height x rate", "variation of height", "variation of rate", "variation of mean",
    "variation of foot", "variation of peak", "correlation of rate and mean",
    "correlation of rate and height", "mean between foot and peak", "slow waves",
    "variation of loudness", "kurtosis")
MAX_BEATS, POINTS = 200, 24     # beats in a minute, samples taken of each
# Samples at 60 Hz: SLOPE_SUM_SECONDS, MIN_BEAT_SECONDS and FOOT_SEARCH_SECONDS of signals.py.
SLOPE_SUM, APART, FOOT_SEARCH = 8, 16, 12
SHORTEST, LONGEST = 0.27 * FS, 2.4 * FS     # beats, in samples, as there
MIN_RISE_SHARE = 0.4            # of the usual largest rise; the PPG is smoother than the pressure
FOLDS = 10                      # of the train patients, for `cross_validate`


def pulse_statistics(ppg: torch.Tensor) -> torch.Tensor:
    """PPG [B, 1, L] at 60 Hz, in any scale -> [B, 12]: the `PULSE_STATISTICS`, nothing learned.

    The label is a line fitted to a minute's beats, MAP against PP x HR. How much the beats vary
    says how far that line reaches, and instance norms and the mean over time remove just this.
    A variation is the distance from the 16th to the 84th percentile, relative to the median, or
    for levels (mean, foot, peak) to the mean height.
    """
    with torch.no_grad():
        x = ppg[:, 0].float()
        x = x - x.mean(1, keepdim=True)
        x = x / x.pow(2).mean(1, keepdim=True).sqrt().clamp_min(1e-9)
        foot = find_pulse_feet(x)
        begin, samples = foot[:, :-1], foot[:, 1:] - foot[:, :-1]               # [B, beats]
        valid = (begin >= 0) & (samples >= SHORTEST) & (samples <= LONGEST)
        count = valid.sum(1, keepdim=True).clamp_min(1)
        phase = torch.arange(POINTS, device=x.device) / POINTS
        at = (begin.unsqueeze(2) + samples.unsqueeze(2) * phase).round().long()
        at = at.clamp(0, x.shape[1] - 1)                                        # [B, beats, 24]

        def beats(signal):
            return signal.gather(1, at.flatten(1)).view(at.shape)

        mean = beats(x).mean(2)
        top = beats(F.max_pool1d(x.unsqueeze(1), 7, 1, 3)[:, 0]).amax(2)
        bottom = -beats(F.max_pool1d(-x.unsqueeze(1), 7, 1, 3)[:, 0]).amax(2)
        height, rate = (top - bottom).clamp_min(1e-3), FS / samples.clamp_min(SHORTEST)

        def average(value):
            return (value * valid).sum(1, keepdim=True) / count

        def variation(value, relative_to=None):
            ordered = value.masked_fill(~valid, 1e9).sort(1)[0]
            low, middle, high = (ordered.gather(1, ((count - 1) * share).round().long())
                                 for share in (0.16, 0.5, 0.84))
            return ((high - low) / (middle if relative_to is None else relative_to) + 0.006).log()

        def correlation(a, b):
            a, b = a - average(a), b - average(b)
            return average(a * b) / (average(a * a) * average(b * b) + 1e-12).sqrt()

        usual = average(height).clamp_min(1e-3)
        slow = moving_mean(moving_mean(x, FS), FS)                    # [B, L]
        fast = (x - slow) ** 2
        power = fast.mean(1, keepdim=True) + 1e-6
        loudness = (moving_mean(moving_mean(fast, FS), FS) + 0.01).log()
        return torch.cat([
            variation(height * rate), variation(height), variation(rate), variation(mean, usual),
            variation(bottom, usual), variation(top, usual), correlation(rate, mean),
            correlation(rate, height), average((mean - bottom) / height),
            (slow.pow(2).mean(1, keepdim=True) / power + 1e-3).log(),
            (loudness.std(1, keepdim=True) + 0.01).log(),
            ((fast ** 2).mean(1, keepdim=True) / power ** 2 + 0.1).log()], 1)


def find_pulse_feet(x):
    """[B, L] -> [B, 200]: feet of the beats in samples, ascending, with -1 before the first foot.

    As `signals.find_feet`: a beat is a peak of the slope sum, and its foot is where the tangent at
    the steepest point meets the level before it.
    """
    x = moving_mean(moving_mean(x, 3), 3)
    rise = F.pad(x[:, 1:] - x[:, :-1], (1, 0))
    climbed = F.pad(rise.clamp_min(0).unsqueeze(1), (SLOPE_SUM - 1, 0))
    slope_sum = F.avg_pool1d(climbed, SLOPE_SUM, 1)
    usual = F.max_pool1d(slope_sum, 2 * FS)[:, 0].sort(1)[0]   # each window holds a beat
    usual = usual[:, usual.shape[1] // 2].unsqueeze(1)
    highest = F.max_pool1d(slope_sum, 2 * APART + 1, 1, APART)[:, 0]
    slope_sum = slope_sum[:, 0]
    peak = (slope_sum == highest) & (slope_sum > MIN_RISE_SHARE * usual)
    times = torch.arange(x.shape[1], device=x.device)
    peak = (peak * times).topk(min(MAX_BEATS, x.shape[1]))[0].flip(1)

    def before(signal, at, length):         # [B, beats, length] samples that end at `at`
        places = at.unsqueeze(2) + torch.arange(1 - length, 1, device=x.device)
        return signal.gather(1, places.clamp_min(0).flatten(1)).view(places.shape)

    steepest = (peak - (SLOPE_SUM - 1) + before(rise, peak, SLOPE_SUM).argmax(2)).clamp_min(1)
    slope = rise.gather(1, steepest).clamp_min(1e-4)
    level = before(x, steepest, FOOT_SEARCH).amin(2)
    foot = steepest - 0.5 - (x.gather(1, steepest) - 0.5 * slope - level) / slope
    return torch.where(peak > 0, foot.clamp(0, x.shape[1] - 1), torch.full_like(foot, -1))


def moving_mean(x, width):
    """[B, L] -> [B, L]."""
    padded = F.pad(x.unsqueeze(1), (width // 2, width - 1 - width // 2), mode="replicate")
    return F.avg_pool1d(padded, width, 1)[:, 0]


def fit_anchor(dataset, keys: List[str], pulse: Optional[np.ndarray] = None) -> dict:
    """The ridge of the label on the vitals over a (train) dataset: `NormalisedModel(anchor=…)`.

    {'coefficients': {vital: mmHg per unit}, 'intercept': mmHg, 'sd': SD of its residuals, mmHg}.
    pulse: `read_pulse` of the dataset, to fit on these as well; this adds 'statistics': {'low',
    'high': limits to which they are clipped, 'coefficients'}. Without it, at most
    MAX_ANCHOR_SEGMENTS segments are used, drawn at random.
    """
    if not vitals_of(keys):
        raise DataError("an anchor needs a vital among the keys")
    label, vitals = read_columns(subsample(dataset) if pulse is None else dataset, keys)
    return fit_rows(vitals_of(keys), vitals, label, pulse)


def fit_rows(names, vitals, label, pulse=None) -> dict:
    """The anchor of vitals [N, names], label [N] and pulse statistics [N, 12] or None: a ridge
    (penalty 1) on standardised inputs, with coefficients per unit of each input."""
    inputs = vitals
    if pulse is not None:
        low, high = np.quantile(pulse, (0.005, 0.995), axis=0)
        inputs = np.concatenate([vitals, pulse.clip(low, high)], 1)
    scaler = StandardScaler().fit(inputs)
    ridge = Ridge(alpha=1.0).fit(scaler.transform(inputs), label)
    weights = ridge.coef_ / scaler.scale_
    found = {"coefficients": dict(zip(names, weights.tolist())),    # the vitals', which come first
             "intercept": float(ridge.intercept_ - weights @ scaler.mean_),
             "sd": float(np.std(label - inputs @ weights))}
    if pulse is not None:
        found["statistics"] = {"low": low.tolist(), "high": high.tolist(),
                               "coefficients": weights[len(names):].tolist()}
    return found


def cross_validate(train, keys: List[str], pulse: np.ndarray):
    """(missing [N], added [N], patients [N]): what the ridge on the vitals misses of the label, and
    what pulse statistics add to it, in train patients who are left out of both fits in turn."""
    label, vitals = read_columns(train, keys)
    patients = train.index.segment_patients()
    plain, full, names = label.copy(), label.copy(), vitals_of(keys)
    if train.index.n_patients > 1:
        for rows, left in GroupKFold(min(FOLDS, train.index.n_patients)).split(
                vitals, groups=patients):
            plain[left] = estimate(fit_rows(names, vitals[rows], label[rows]), vitals[left])
            full[left] = estimate(fit_rows(names, vitals[rows], label[rows], pulse[rows]),
                                  vitals[left], pulse[left])
    return label - plain, full - plain, patients


def subsample(dataset, most: float = MAX_ANCHOR_SEGMENTS) -> TPP_PPG_dataset:
    """The dataset, or `most` of its segments, drawn at random, if it has more."""
    count = len(dataset.index)
    return dataset if count <= most else TPP_PPG_dataset(
        dataset.index, "segment", dataset.keys_to_load, 100 * most / count)


def read_pulse(dataset) -> np.ndarray:
    """[N, 12] float64: the `pulse_statistics` of all segments of a dataset."""
    count = len(dataset.index)
    return np.concatenate([
        pulse_statistics(torch.from_numpy(dataset.waveform("ppg", part)).unsqueeze(1))
        for part in np.array_split(np.arange(count), -(-count // 256))]).astype(np.float64)


def read_columns(dataset, keys: List[str]):
    """(label [N], vitals [N, V]) of a dataset, float64."""
    columns = [dataset.column(key).numpy().astype(np.float64)
               for key in (keys[-1], *vitals_of(keys))]
    return columns[0], np.stack(columns[1:], 1)


def estimate(anchor: dict, vitals, pulse=None) -> np.ndarray:
    """An anchor's estimates [N], mmHg, from vitals [N, V] and pulse statistics [N, 12]."""
    found = anchor["intercept"] + vitals @ np.array(list(anchor["coefficients"].values()))
    if "statistics" in anchor:
        known = anchor["statistics"]
        found = found + pulse.clip(known["low"], known["high"]) @ known["coefficients"]
    return found


def predict_with_anchor(anchor: dict, dataset) -> np.ndarray:
    """An anchor's estimates [N], mmHg, for the segments of a dataset."""
    vitals = [dataset.column(key).numpy().astype(np.float64) for key in anchor["coefficients"]]
    pulse = read_pulse(dataset) if "statistics" in anchor else None
    return estimate(anchor, np.stack(vitals, 1), pulse)


def shown_share(missing, added, patients) -> float:
    """The share of `added` [N] that best explains `missing` [N], 0 to 1: least squares with equal
    weight for each patient, shrunk by its own uncertainty over patients (James & Stein, positive
    part). Where nothing is shown, nothing is added."""
    weight = 1 / np.bincount(patients)[patients]
    squares = np.sum(weight * added ** 2)
    if not squares > 0:
        return 0.0
    share = np.sum(weight * added * missing) / squares
    of_patients = np.bincount(patients, weight * added * (missing - share * added))
    error = np.sqrt(np.sum(of_patients ** 2)) / squares
    return float(np.clip(share - error ** 2 / share, 0, 1)) if share > 0 else 0.0


def kept_shares(anchor: Optional[dict]) -> Optional[dict]:
    """The shares of 'network' and 'pulse_statistics' that `fit_blend` kept, 0 to 1, or None."""
    if not anchor or "blend" not in anchor:
        return None
    return {"network": anchor["blend"], "pulse_statistics": anchor["pulse_share"]}


def blend(anchor: dict, plain: dict, with_pulse: dict, pulse_share: float, share: float) -> dict:
    """The anchor with which a model's estimate becomes
    share * (anchor + network) + (1 - share) * (plain + pulse_share * (with_pulse - plain)).

    anchor: the one that the network was trained on, kept as 'trained_on' for further training;
    plain, with_pulse: ridges without and with pulse statistics.
    """
    weight = (1 - share) * pulse_share
    parts = [(share, anchor), (1 - share - weight, plain), (weight, with_pulse)]
    mixed = {"intercept": sum(part * ridge["intercept"] for part, ridge in parts),
             "coefficients": {key: sum(part * ridge["coefficients"][key] for part, ridge in parts)
                              for key in anchor["coefficients"]},
             "sd": share * anchor["sd"], "pulse_share": pulse_share, "blend": share,
             "trained_on": anchor}
    if weight:
        statistics = with_pulse["statistics"]
        mixed["statistics"] = dict(statistics, coefficients=[
            weight * value for value in statistics["coefficients"]])
    return mixed
