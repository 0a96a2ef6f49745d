"""Arterial pressure waveform -> beats -> critical closing pressure, TPP and fit quality.

    from labels import label_segments
    labels = label_segments(abp, fs=60)             # abp [N, samples] in mmHg, any rate >= 40 Hz
    labels['tpp']                                   # [N] mmHg, NaN where labels['reason'] != 0

The method (Chandrasekhar et al., Nat Med 2023, doi 10.1038/s41591-023-02474-6): over one minute,
MAP = Pcrit + R * flow with flow ~ k * PP * HR. Each beat gives MAP (its time mean), PP (maximum
minus minimum) and HR (60 / interval); beats whose PP * HR lies outside the 5th-95th percentile are
dropped; the intercept of the least-squares line of MAP on PP * HR is Pcrit; TPP = MAP - Pcrit.
The published beats run from peak to peak (`beats='peak'`). Foot to foot is the default, because it
is less biased when stroke volume varies with respiration.

Everything is computed for all beats of all segments at once: a beat is an element of flat arrays,
`segment` says which row it belongs to, and sums over a row's beats are `np.bincount`.
"""
from dataclasses import dataclass

import numpy as np
from scipy.ndimage import gaussian_filter1d
from scipy.signal import find_peaks

# Why a segment has no label or a poor signal: bit i of `reason` is REASONS[i]. The order is frozen
# (files store the bits); new reasons go at the end.
REASONS = (
    "abp_missing",   # too many samples are not finite, or outside any pressure range
    "abp_flat",      # too long without any change
    "abp_clipped",   # the tops of the beats are cut off at the end of the scale
    "abp_flush",     # the line was flushed or closed: long stretches far above systole
    "abp_range",     # SBP, DBP or PP that no arterial line shows: wrong channel or unit
    "few_beats",     # valid beats cover too little of the segment
    "no_fit",        # the regression has no solution (PP * HR does not vary)
    "ppg_missing",   # any sample that is not finite: the network cannot take it
    "ppg_flat",      # too long without any change
    "ppg_clipped",   # too much of the signal lies on its highest or lowest value
    "ppg_no_pulse",  # noise or drift, but little power where a pulse has it
)
FIELDS = ("map", "sbp", "dbp", "pp", "hr", "p_crit", "tpp", "r2", "fit_rmse", "p_crit_se")

MIN_FS_HZ = 40            # below it the upstroke has too few samples to time a beat
BLOCK_SAMPLES = 1_000_000  # samples worked on at once: bounds memory, and stays near the cache

# Beat detection. The slope sum (rise within a short window) and its length: Zong, Moody and Mark,
# "An open-source algorithm to detect onset of arterial blood pressure pulses", CinC 2003.
SMOOTH_SECONDS = 0.0166   # Gaussian with -3 dB at 8 Hz: keeps the upstroke, drops line ringing
SLOPE_SUM_SECONDS = 0.128
MIN_BEAT_SECONDS = 0.27   # 222 beats/min
MAX_BEAT_SECONDS = 2.4    # 25 beats/min; longer is a gap in the pulse: flush, damping, lost signal
MIN_RISE_MMHG = 4.0       # smaller upstrokes are noise; the published gate wants PP > 10
MIN_RISE_SHARE = 0.25     # of the segment's usual largest rise; weak beats of AF lie above it
# A dicrotic wave follows its beat within the ejection time (0.2-0.4 s) and rises less than it did.
DICROTIC_SECONDS = 0.45
DICROTIC_RISE_SHARE = 0.6
FOOT_SEARCH_SECONDS = 0.2  # from foot to steepest upstroke; 0.1 s is usual, damped lines are slower

# Signal quality.
ABP_RANGE_MMHG = (-30.0, 330.0)  # transducers end at 300 or 320; outside it a sample is no pressure
SBP_MAX_MMHG, DBP_MIN_MMHG = 300.0, 10.0
PP_RANGE_MMHG = (5.0, 200.0)
FLAT_SECONDS = 0.5
FLAT_MMHG_PER_S = 0.5     # diastole falls faster than this unless the heart stops
CLIP_SECONDS = 0.067      # 4 steps of 60 Hz; a natural top stays within CLIP_MMHG for 0.02-0.04 s
CLIP_MMHG = 0.25
FLUSH_MMHG = 60.0         # above the segment's SBP; post-ectopic beats stay below it
MAX_BAD_SHARE = 0.1       # of the segment, for each kind of bad sample
MIN_BEATS = 10            # a line through fewer points says nothing (a 30-s segment at 35/min: 17)
MIN_COVER = 0.5           # share of the segment that valid beats must cover to stand for it


@dataclass
class Beats:
    """All valid beats of a block of segments, as flat arrays of equal length, in time order."""
    segment: np.ndarray     # row of the block
    interval_s: np.ndarray
    map: np.ndarray         # mmHg, time mean over the beat
    max: np.ndarray         # mmHg
    min: np.ndarray         # mmHg

    @property
    def flow(self):
        """PP * HR in mmHg/min: the published surrogate of cardiac output."""
        return (self.max - self.min) * 60.0 / self.interval_s

    def select(self, keep):
        return Beats(**{name: column[keep] for name, column in vars(self).items()})


def label_segments(abp, fs, beats="foot", method="published"):
    """Labels of the segments `abp` [N, samples] (or one of them, [samples]) in mmHg at `fs` Hz.

    Returns a dict of (N,) arrays: the FIELDS (mmHg; `hr` in beats/min; float32; NaN where the
    segment is refused), `n_beats` (int32, those that the fit used) and `reason` (uint32).
    """
    abp = np.atleast_2d(np.asarray(abp))
    if abp.ndim != 2:
        raise ValueError(f"abp must be [segments, samples], not {abp.shape}")
    if not fs >= MIN_FS_HZ:
        raise ValueError(f"the ABP must be sampled at {MIN_FS_HZ} Hz or more, not at {fs}")
    if beats not in ("foot", "peak"):
        raise ValueError(f"beats must be 'foot' or 'peak', not {beats!r}")
    if method not in METHODS:
        raise ValueError(f'method must be one of {", ".join(METHODS)}, not {method!r}')
    rows = max(1, BLOCK_SAMPLES // max(1, abp.shape[1]))
    blocks = [_label_block(abp[i:i + rows], fs, beats, METHODS[method])
              for i in range(0, max(1, len(abp)), rows)]
    return {name: np.concatenate([block[name] for block in blocks]) for name in blocks[0]}


def _label_block(abp, fs, beats_kind, method):
    abp, missing = _fill_missing(np.asarray(abp, dtype=np.float64))
    n, samples = abp.shape
    flat = _flat_samples(abp, fs) & ~missing       # a bridged gap is missing, not flat
    clipped = _clipped_samples(abp, fs)
    bad = missing | flat | clipped
    boundary, row = find_feet(abp, fs)
    if beats_kind == "peak":
        boundary, row = _peaks_between(abp, boundary, row, fs)
    beats = _measure_beats(abp, bad, boundary, row, fs)

    sbp_all = _segment_median(beats.max, beats.segment, n)
    flushed = abp > (sbp_all + FLUSH_MMHG)[:, None]   # compares False where there are no beats
    beats = beats.select(beats.max <= (sbp_all + FLUSH_MMHG)[beats.segment])

    count = np.bincount(beats.segment, minlength=n)
    valid_s = np.bincount(beats.segment, beats.interval_s, n)
    with np.errstate(invalid="ignore", divide="ignore"):
        out = {"map": np.bincount(beats.segment, beats.map * beats.interval_s, n) / valid_s,
               "sbp": _segment_median(beats.max, beats.segment, n),
               "dbp": _segment_median(beats.min, beats.segment, n),
               "hr": 60.0 / _segment_median(beats.interval_s, beats.segment, n)}
    out["pp"] = out["sbp"] - out["dbp"]
    out.update(method(beats, n))
    out["tpp"] = out["map"] - out["p_crit"]

    pp_low, pp_high = PP_RANGE_MMHG
    out_of_range = ((out["sbp"] > SBP_MAX_MMHG) | (out["dbp"] < DBP_MIN_MMHG)
                    | (out["pp"] < pp_low) | (out["pp"] > pp_high))
    few = (count < MIN_BEATS) | (valid_s < MIN_COVER * samples / fs)
    reason = reason_mask(n, {
        "abp_missing": missing.mean(1) > MAX_BAD_SHARE,
        "abp_flat": flat.mean(1) > MAX_BAD_SHARE,
        "abp_clipped": clipped.mean(1) > MAX_BAD_SHARE,
        "abp_flush": flushed.mean(1) > MAX_BAD_SHARE,
        "abp_range": out_of_range,
        "few_beats": few,
        "no_fit": ~few & ~np.isfinite(out["p_crit"]),
    })
    n_beats = out.pop("n_beats")
    out = {name: np.where(reason == 0, out[name], np.nan).astype(np.float32) for name in FIELDS}
    return {**out, "n_beats": n_beats.astype(np.int32), "reason": reason}


def reason_mask(n, found):
    """(n,) uint32 from a dict of reason name -> (n,) booleans."""
    mask = np.zeros(n, dtype=np.uint32)
    for name, where in found.items():
        mask |= where.astype(np.uint32) << np.uint32(REASONS.index(name))
    return mask


# ------------------------------------------------------------------------------------ the methods

def published(beats, n):
    """The published regression: MAP of each beat on its PP * HR; the intercept is Pcrit."""
    beats = beats.select(_within_percentiles(beats.flow, beats.segment, n))
    return _fit_line(beats.flow, beats.map, beats.segment, n)


# name -> function(beats: Beats, n segments) -> dict of (n,) arrays p_crit, p_crit_se, r2, fit_rmse,
# n_beats; the name is what a file's attribute `label_method` holds.
METHODS = {"published": published}


def _within_percentiles(value, segment, n, low=0.05, high=0.95):
    """Which beats lie within their segment's percentiles (all, where it has fewer than 5)."""
    if not len(value):
        return np.zeros(0, dtype=bool)
    order = np.lexsort((value, segment))
    ordered = value[order]
    count = np.bincount(segment, minlength=n)
    first = np.cumsum(count) - count

    def percentile(share):  # linear interpolation, as np.percentile
        position = first + share * np.maximum(count - 1, 0)
        below = np.minimum(position.astype(int), len(value) - 1)
        above = np.minimum(below + 1, len(value) - 1)
        return ordered[below] + (position - below) * (ordered[above] - ordered[below])

    inside = (value >= percentile(low)[segment]) & (value <= percentile(high)[segment])
    return inside | (count < 5)[segment]


def _fit_line(x, y, segment, n):
    """Ordinary least squares of y on x within each segment, from centred sums."""
    count = np.bincount(segment, minlength=n)
    with np.errstate(invalid="ignore", divide="ignore"):
        x_mean = np.bincount(segment, x, n) / count
        y_mean = np.bincount(segment, y, n) / count
        dx, dy = x - x_mean[segment], y - y_mean[segment]
        sxx = np.bincount(segment, dx * dx, n)
        syy = np.bincount(segment, dy * dy, n)
        # x constant to rounding, or no degree of freedom left: no line
        sxx = np.where((count >= 3) & (sxx > 1e-12 * count * x_mean ** 2), sxx, np.nan)
        slope = np.bincount(segment, dx * dy, n) / sxx
        residual = np.bincount(segment, (dy - slope[segment] * dx) ** 2, n)
        variance = residual / (count - 2)
        return {"p_crit": y_mean - slope * x_mean,
                "p_crit_se": np.sqrt(variance * (1.0 / count + x_mean ** 2 / sxx)),
                "r2": 1.0 - residual / syy,
                "fit_rmse": np.sqrt(residual / count),
                "n_beats": count}


def _segment_median(value, segment, n):
    """(n,) median of the beats of each segment, NaN where it has none."""
    median = np.full(n, np.nan)
    if len(value):
        ordered = value[np.lexsort((value, segment))]
        count = np.bincount(segment, minlength=n)
        first = np.cumsum(count) - count
        some = count > 0
        low = ordered[(first + (count - 1) // 2)[some]]
        high = ordered[(first + count // 2)[some]]
        median[some] = 0.5 * (low + high)
    return median


# ------------------------------------------------------------------------------------------ beats

def find_feet(abp, fs):
    """Feet of the beats in `abp` [N, samples], finite: (time in samples, row), flat, in time order.

    A beat is a peak of the slope sum; its foot is where the tangent at the steepest point of the
    upstroke meets the level of the minimum before it, which is finer than the sampling interval.
    """
    n, samples = abp.shape
    smooth = gaussian_filter1d(abp, SMOOTH_SECONDS * fs, axis=1, mode="nearest")
    rise = np.diff(smooth, axis=1, prepend=smooth[:, :1])
    climbed = np.cumsum(np.maximum(rise, 0.0), axis=1)
    window = max(2, int(round(SLOPE_SUM_SECONDS * fs)))
    slope_sum = climbed.copy()
    slope_sum[:, window:] -= climbed[:, :-window]
    slope_sum[:, [0, -1]] = -1.0    # rows are searched as one long signal: no peak spans two

    # The segment's usual largest rise: median of the maxima of 2-s pieces, each with a beat in it.
    piece = min(int(2 * fs), samples)
    pieces = samples // piece
    usual = np.median(slope_sum[:, :pieces * piece].reshape(n, pieces, piece).max(2), axis=1)
    threshold = np.repeat(np.maximum(MIN_RISE_SHARE * usual, MIN_RISE_MMHG), samples)
    peak, _ = find_peaks(slope_sum.ravel(), height=threshold, distance=MIN_BEAT_SECONDS * fs)
    row, height = peak // samples, slope_sum.ravel()[peak]
    for _ in range(2):              # a second, smaller dicrotic wave shows once the first is gone
        dicrotic = np.zeros(len(peak), dtype=bool)
        dicrotic[1:] = ((row[1:] == row[:-1]) & (np.diff(peak) < DICROTIC_SECONDS * fs)
                        & (height[1:] < DICROTIC_RISE_SHARE * height[:-1]))
        peak, row, height = peak[~dicrotic], row[~dicrotic], height[~dicrotic]

    def before(position, length):   # [beats, length] indices that end at position, within the row
        index = position[:, None] + np.arange(1 - length, 1)
        return np.maximum(index, (row * samples)[:, None])

    upstroke = before(peak, window + 1)
    steepest = np.take_along_axis(
        upstroke, rise.ravel()[upstroke].argmax(1)[:, None], axis=1)[:, 0]
    level = smooth.ravel()[before(steepest, int(round(FOOT_SEARCH_SECONDS * fs)))].min(1)
    # rise[i] is the slope half a sample before i; there the pressure is the mean of i and i - 1
    middle = smooth.ravel()[steepest] - 0.5 * rise.ravel()[steepest]
    foot = steepest - 0.5 - (middle - level) / rise.ravel()[steepest] - row * samples
    inside = (foot >= 0) & (foot <= samples - 1)
    return foot[inside], row[inside]


def _peaks_between(abp, foot, row, fs):
    """The pressure maximum that follows each foot: (time in samples, row), as `find_feet`."""
    samples = abp.shape[1]
    start, end, kept = _beat_samples(foot, row, samples)
    if not len(kept):
        return foot[:0], row[:0]
    pressure = abp.ravel()
    top = np.maximum.reduceat(pressure, np.stack([start, end], 1).ravel())[::2]
    length = end - start
    at = np.repeat(start - np.cumsum(length) + length, length) + np.arange(length.sum())
    is_top = pressure[at] == np.repeat(top, length)
    beat, first = np.unique(np.repeat(np.arange(len(top)), length)[is_top], return_index=True)
    peak = at[is_top][first]
    # a parabola through the highest sample and its neighbours times the peak between samples
    inner = np.clip(peak, 1, len(pressure) - 2)
    left, middle, right = pressure[inner - 1], pressure[inner], pressure[inner + 1]
    bend = left - 2 * middle + right
    shift = np.where(bend < 0, 0.5 * (left - right) / np.where(bend < 0, bend, -1.0), 0.0)
    row = row[kept]
    time = peak - row * samples + np.clip(shift, -0.5, 0.5)
    return np.clip(time, 0, samples - 1), row


def _beat_samples(boundary, row, samples):
    """Beats between successive boundaries of a row: first flat sample, one past the last, and the
    index of the boundary at which each begins."""
    begins = np.flatnonzero(row[1:] == row[:-1])
    start = np.ceil(boundary[begins]).astype(int)
    end = np.ceil(boundary[begins + 1]).astype(int)
    some = end > start
    begins, start, end = begins[some], start[some], end[some]
    return row[begins] * samples + start, row[begins] * samples + end, begins


def _measure_beats(abp, bad, boundary, row, fs):
    """The valid beats between successive boundaries (time in samples) of each row."""
    samples = abp.shape[1]
    start, end, begins = _beat_samples(boundary, row, samples)
    segment = row[begins]
    if not len(begins):
        return Beats(segment, *(np.zeros(0) for _ in range(4)))
    ends = np.stack([start, end], 1).ravel()
    # `end` may be one past the last sample, where reduceat takes no index: it gets one more
    pressure = np.append(abp.ravel(), 0.0)
    top = np.maximum.reduceat(pressure, ends)[::2]
    bottom = np.minimum.reduceat(pressure, ends)[::2]
    bad_before = np.concatenate([[0], np.cumsum(bad.ravel())])
    clean = bad_before[end] == bad_before[start]

    # time mean by the integral of the linear interpolation between the two (fractional) boundaries
    area = np.zeros_like(abp)
    np.cumsum(0.5 * (abp[:, 1:] + abp[:, :-1]), axis=1, out=area[:, 1:])

    def integral(time):
        low = np.minimum(time.astype(int), samples - 2)
        part = time - low
        p0, p1 = abp[segment, low], abp[segment, low + 1]
        return area[segment, low] + part * (p0 + 0.5 * part * (p1 - p0))

    length = boundary[begins + 1] - boundary[begins]
    mean = (integral(boundary[begins + 1]) - integral(boundary[begins])) / length
    interval_s = length / fs
    valid = clean & (interval_s >= MIN_BEAT_SECONDS) & (interval_s <= MAX_BEAT_SECONDS)
    return Beats(segment, interval_s, mean, top, bottom).select(valid)


# ----------------------------------------------------------------------------------- signal quality

def _fill_missing(signal, valid_range=ABP_RANGE_MMHG):
    """(signal with the gaps bridged by straight lines so that it can be filtered, [N, samples] mask
    of the gaps). The mask keeps what was invented out of every beat."""
    low, high = valid_range
    with np.errstate(invalid="ignore"):
        missing = ~((signal >= low) & (signal <= high))
    signal = signal.copy()
    for i in np.flatnonzero(missing.any(1)):
        there = np.flatnonzero(~missing[i])
        gap = np.flatnonzero(missing[i])
        signal[i, gap] = np.interp(gap, there, signal[i, there]) if len(there) else 0.0
    return signal, missing


def _runs(condition, length):
    """[N, samples] mask of the samples in runs of at least `length` steps where `condition`
    [N, samples - 1], about the step from a sample to the next, holds throughout."""
    n, steps = condition.shape
    run = np.zeros((n, steps + 1), dtype=bool)
    if length > steps or not condition.any():
        return run
    edge = np.zeros((n, 1), dtype=np.int8)
    change = np.diff(condition.astype(np.int8), axis=1, prepend=edge, append=edge)
    row, first = np.nonzero(change == 1)
    _, last = np.nonzero(change == -1)          # a run covers samples first..last
    long = last - first >= length
    mark = np.zeros((n, steps + 2), dtype=np.int32)
    np.add.at(mark, (row[long], first[long]), 1)
    np.add.at(mark, (row[long], last[long] + 1), -1)
    return np.cumsum(mark, axis=1)[:, :-1] > 0


def _flat_samples(abp, fs):
    return _runs(np.abs(np.diff(abp, axis=1)) < FLAT_MMHG_PER_S / fs, int(FLAT_SECONDS * fs))


def _clipped_samples(abp, fs):
    """Samples in plateaus at the segment's highest pressure."""
    near_top = abp >= abp.max(1, keepdims=True) - CLIP_MMHG
    return _runs(near_top[:, 1:] & near_top[:, :-1], max(3, int(round(CLIP_SECONDS * fs))))


# -------------------------------------------------------------------------------------------- PPG

PPG_FLAT_SECONDS = 1.0    # longer than diastole's flat end in a slow pulse
PPG_FLAT_SHARE = 1e-4     # of the segment's range, per sample at 60 Hz
PPG_CLIP_SHARE = 1e-3     # of the range: what counts as on the highest or lowest value
PPG_PULSE_HZ = (0.5, 8.0)  # from 30 beats/min to the third harmonic of 160/min
# Least share of the pulse band in the power from 0.5 Hz on (white noise: 0.25) and in all of it but
# the mean (a random walk: 0.01-0.1): relative power as a quality index, Elgendi, Bioengineering
# 2016. All of 893 real minutes, most of them in atrial fibrillation, have more than 0.97 and 0.15.
MIN_PULSE_SHARE_FAST = 0.8
MIN_PULSE_SHARE = 0.1


def ppg_reasons(ppg, fs):
    """(N,) uint32 reasons of `ppg` [N, samples] (or [samples]) in any unit at `fs` Hz."""
    ppg = np.atleast_2d(np.asarray(ppg))
    if ppg.ndim != 2:
        raise ValueError(f"ppg must be [segments, samples], not {ppg.shape}")
    rows = max(1, BLOCK_SAMPLES // max(1, ppg.shape[1]))
    return np.concatenate([_ppg_block(ppg[i:i + rows], fs)
                           for i in range(0, max(1, len(ppg)), rows)])


def _ppg_block(ppg, fs):
    ppg = np.asarray(ppg, dtype=np.float64)
    missing = ~np.isfinite(ppg)
    if missing.any():
        ppg, _ = _fill_missing(ppg, (-np.finfo(float).max, np.finfo(float).max))
    low, high = ppg.min(1, keepdims=True), ppg.max(1, keepdims=True)
    span = high - low
    flat = _runs(np.abs(np.diff(ppg, axis=1)) <= PPG_FLAT_SHARE * span * 60.0 / fs,
                 int(PPG_FLAT_SECONDS * fs)) & ~missing
    edge = (ppg >= high - PPG_CLIP_SHARE * span) | (ppg <= low + PPG_CLIP_SHARE * span)
    clipped = _runs(edge[:, 1:] & edge[:, :-1], max(3, int(round(CLIP_SECONDS * fs))))
    return reason_mask(len(ppg), {
        "ppg_missing": missing.any(1),
        "ppg_flat": flat.mean(1) > MAX_BAD_SHARE,
        "ppg_clipped": clipped.mean(1) > MAX_BAD_SHARE,
        "ppg_no_pulse": _no_pulse(ppg, fs),
    })


def _no_pulse(ppg, fs):
    """Where the pulse band holds too little of the signal's power: noise, drift, or nothing."""
    samples = ppg.shape[1]
    tapered = (ppg - ppg.mean(1, keepdims=True)) * np.hanning(samples)
    power = np.abs(np.fft.rfft(tapered, axis=1)) ** 2
    hz = np.fft.rfftfreq(samples, 1.0 / fs)
    low, high = PPG_PULSE_HZ
    pulse = power[:, (hz >= low) & (hz <= high)].sum(1)
    fast, all_of_it = power[:, hz >= low].sum(1), power[:, 1:].sum(1)
    return ~((pulse > MIN_PULSE_SHARE_FAST * fast) & (pulse > MIN_PULSE_SHARE * all_of_it))
