"""Beats, signal quality and features of arterial pressure (ABP) and photoplethysmogram (PPG).

    from signals import find_feet, ppg_delay, ppg_features, ppg_polarity, signal_quality
    foot, row = find_feet(abp, fs=60)           # abp [N, samples] in mmHg, finite
    quality = signal_quality(abp, ppg, fs=60)   # 'reason' of the PPG and the pair, QUALITY_FIELDS
    features = ppg_features(ppg, fs=60)         # {name: [N]}, PPG_FEATURES
    ppg_polarity(ppg, fs=125)                   # 1 upright, -1 inverted, 0 unsure

One beat detector, `find_feet`, serves both signals; a PPG is first scaled to the height of a
pressure pulse. All segments are processed at once: the beats of all rows are flat arrays in time
order, `segment` holds the row of each beat, and `segment_sum`, `segment_mean` and
`segment_quantile` summarise the beats of each row. The module needs only NumPy and SciPy.
"""
from dataclasses import dataclass
from functools import cached_property
from typing import Callable, Dict, List, Tuple

import numpy as np
from scipy.ndimage import gaussian_filter1d, label
from scipy.signal import butter, find_peaks, sosfiltfilt
from scipy.stats import skew

# Why a segment has no label or an unusable PPG: bit i of `reason` is REASONS[i]. The order is
# frozen because files store the bits; add new reasons at the end. Every reason excludes the
# segment. Properties that a study may want to keep (arrhythmia, a damped line, a mediocre PPG) are
# measures in QUALITY_FIELDS instead, which gate conditions can use.
REASONS = (
    "abp_missing",   # too many samples are not finite, or outside any pressure range
    "abp_flat",      # too long without any change
    "abp_clipped",   # the tops of the beats are cut off at the end of the scale
    "abp_flush",     # the line was flushed or closed: long stretches far above systole
    "abp_range",     # implausible SBP, DBP or PP: wrong channel or unit
    "few_beats",     # valid beats cover too little of the segment
    "no_fit",        # the regression has no solution (PP * HR does not vary)
    "ppg_missing",   # any sample that is not finite: the network cannot take it
    "ppg_flat",      # too long without any change
    "ppg_clipped",   # too much of the signal lies on its highest or lowest value
    "ppg_no_pulse",  # noise or drift, with little power in the pulse band
    "abp_saturated",  # stuck at the upper or lower end of the scale for longer than a beat's top
    "ppg_saturated",  # the same for the PPG
    "rate_mismatch",  # the pulse rate of the PPG differs from that of the ABP
)

MIN_FS_HZ = 40            # below it the upstroke has too few samples to time a beat
BLOCK_SAMPLES = 1_000_000  # samples processed at once: bounds memory, fits the cache

# Beat detection. The slope sum (rise within a short window) and its length: Zong, Moody and Mark,
# "An open-source algorithm to detect onset of arterial blood pressure pulses", CinC 2003.
SMOOTH_SECONDS = 0.0166   # Gaussian with -3 dB at 8 Hz: keeps the upstroke, removes line ringing
SLOPE_SUM_SECONDS = 0.128
MIN_BEAT_SECONDS = 0.27   # 222 beats/min
MAX_BEAT_SECONDS = 2.4    # 25 beats/min; longer is a gap in the pulse: flush, damping, lost signal
MIN_RISE_MMHG = 4.0       # smaller upstrokes are noise; the published gate requires PP > 10
MIN_RISE_SHARE = 0.25     # of the segment's usual largest rise; weak beats of AF lie above it
# A dicrotic wave follows its beat within the ejection time (0.2-0.4 s) and rises less than it did.
DICROTIC_SECONDS, DICROTIC_RISE_SHARE = 0.45, 0.6
FOOT_SEARCH_SECONDS = 0.2  # from foot to steepest upstroke; 0.1 s is usual, damped lines are slower

# Bad samples.
ABP_RANGE_MMHG = (-30.0, 330.0)  # transducers end at 300 or 320; anything outside is no pressure
CLIP_SECONDS = 0.067      # 4 steps at 60 Hz; a natural top stays within CLIP_MMHG for 0.02-0.04 s
SATURATED_SECONDS = 0.5   # clipped beats stay at the end of the scale for less
MAX_BAD_SHARE = 0.1       # of the segment, for each kind of bad sample
MIN_BEATS = 10            # fewer do not define a line (a 30-s segment at 35/min has 17)

# Quality of the PPG and of the pair.
PPG_FLAT_SECONDS = 1.0    # longer than the flat end of diastole in a slow pulse
PPG_FLAT_SHARE = 1e-4     # of the segment's range, per sample at 60 Hz
PPG_CLIP_SHARE = 1e-3     # of the range: closer than this to an extreme counts as clipped
PPG_PULSE_HZ = (0.5, 8.0)  # from 30 beats/min to the third harmonic of 160/min
# Minimum share of the pulse band in the power above 0.5 Hz (white noise: 0.25) and in all power but
# the mean (a random walk: 0.01-0.1): relative power as a quality index, Elgendi, Bioengineering
# 2016. All of 893 real minutes, most of them in atrial fibrillation, exceed 0.97 and 0.15.
MIN_PULSE_SHARE_FAST, MIN_PULSE_SHARE = 0.8, 0.1
# Rates agree within 10 % or 5 beats/min, whichever is more: heart rate meters (AAMI EC13).
RATE_TOLERANCE_SHARE, RATE_TOLERANCE_BPM = 0.10, 5.0
ARRHYTHMIC = 0.1          # RMSSD / mean interval, as for fibrillation in Dash, Ann Biomed Eng 2009
PULSE_DEFICIT = 0.5       # share of weak beats that may not reach the finger in arrhythmia
PPG_HEIGHT_MMHG = 60.0    # the PPG's pulse is scaled to this height for `find_feet`
TEMPLATE_SAMPLES = 40     # of a PPG beat, from foot to foot
QUALITY_FIELDS = ("beat_irregularity", "upstroke_s", "ppg_hr", "ppg_quality", "ppg_skewness")

# Delay of the PPG behind the ABP: real monitors show 0.06 to 1.0 s.
DELAY_RANGE_S = (-0.25, 1.75)
DELAY_STEP_S, DELAY_BLUR_S = 0.0025, 0.01
OTHER_BEAT_S = 0.25       # delays further apart than this belong to different beats
MIN_DELAY_BEATS = 20      # near the delay that is found
# Strength above which the delay is sure: in 1,350 synthetic rhythms (SD of the interval 1-30 ms)
# whole beats were mistaken only below 0.02.
SURE_DELAY = 0.05


# ------------------------------------------------------------------------------------------- beats

@dataclass
class Beats:
    """The valid beats of a block of segments: flat arrays of equal length, in time order."""
    segment: np.ndarray     # row of the block
    interval_s: np.ndarray
    map: np.ndarray         # mmHg, time mean over the beat
    max: np.ndarray         # mmHg
    min: np.ndarray         # mmHg

    @property
    def flow(self) -> np.ndarray:
        """PP * HR in mmHg/min: the published surrogate of cardiac output."""
        return (self.max - self.min) * 60.0 / self.interval_s

    def select(self, keep: np.ndarray) -> "Beats":
        return Beats(**{name: column[keep] for name, column in vars(self).items()})


@dataclass
class Wave:
    """A block of segments [N, samples] with the feet of its beats: `foot` (time in samples) and
    `row`, flat arrays. The methods take rows and times (in samples) of equal length."""
    abp: np.ndarray         # mmHg, finite
    bad: np.ndarray         # [N, samples] mask of samples that no beat may contain
    fs: float

    def __post_init__(self):
        self.foot, self.row = find_feet(self.abp, self.fs)

    @cached_property
    def area(self) -> np.ndarray:
        """[N, samples] integral of the linear interpolation, in mmHg times samples."""
        area = np.zeros_like(self.abp)
        np.cumsum(0.5 * (self.abp[:, 1:] + self.abp[:, :-1]), axis=1, out=area[:, 1:])
        return area

    def _place(self, row, time):
        """(index of the sample before each time in the flat block, fraction of a sample after it,
        pressure there and at the next sample)."""
        low = np.clip(time.astype(int), 0, self.abp.shape[1] - 2)
        flat, part = row * self.abp.shape[1] + low, time - low
        return flat, part, self.abp.ravel().take(flat), self.abp.ravel().take(flat + 1)

    def at(self, row: np.ndarray, time: np.ndarray) -> np.ndarray:
        """Pressure at these times, linearly interpolated between samples."""
        _, part, p0, p1 = self._place(row, time)
        return p0 + part * (p1 - p0)

    def integral(self, row: np.ndarray, time: np.ndarray) -> np.ndarray:
        """Integral of the pressure from the row's first sample, in mmHg times samples."""
        flat, part, p0, p1 = self._place(row, time)
        return self.area.ravel().take(flat) + part * (p0 + 0.5 * part * (p1 - p0))

    def mean(self, row: np.ndarray, begin: np.ndarray, end: np.ndarray) -> np.ndarray:
        """Mean pressure from begin to end."""
        return (self.integral(row, end) - self.integral(row, begin)) / (end - begin)

    def is_clean(self, row: np.ndarray, begin: np.ndarray, end: np.ndarray) -> np.ndarray:
        """Whether no sample from begin to end is bad."""
        before = np.zeros((len(self.bad), self.bad.shape[1] + 1), dtype=np.int32)
        np.cumsum(self.bad, axis=1, out=before[:, 1:])
        first = np.clip(begin.astype(int), 0, self.bad.shape[1])
        last = np.clip(end.astype(int) + 1, 0, self.bad.shape[1])
        return before[row, last] == before[row, first]


def find_feet(abp: np.ndarray, fs: float) -> Tuple[np.ndarray, np.ndarray]:
    """Feet of the beats in `abp` [N, samples] (finite): flat (time in samples, row), in time order.

    A beat is a peak of the slope sum. Its foot is where the tangent at the steepest point of the
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


def find_tops(wave: Wave) -> Tuple[np.ndarray, np.ndarray]:
    """The pressure maximum after each foot: (time in samples, row), as `find_feet`."""
    first, start, end = _beat_samples(wave.foot, wave.row)
    row, abp = wave.row[first], wave.abp
    peak = start + np.array([abp[i, a:b].argmax() for i, a, b in zip(row, start, end)], dtype=int)
    # a parabola through the highest sample and its neighbours places the peak between samples
    left, middle, right = abp[row, peak - 1], abp[row, peak], abp[row, peak + 1]
    bend = left - 2 * middle + right
    shift = np.where(bend < 0, 0.5 * (left - right) / bend, 0.0)
    return peak + np.clip(shift, -0.5, 0.5), row


def measure_beats(wave: Wave, boundary: np.ndarray, row: np.ndarray) -> Beats:
    """The valid beats between successive boundaries (times in samples) of each row."""
    index, start, end = _beat_samples(boundary, row)
    segment, first, last = row[index], boundary[index], boundary[index + 1]
    interval_s = (last - first) / wave.fs
    top, bottom = (_over_beats(function, wave.abp, segment, start, end)
                   for function in (np.maximum, np.minimum))
    beats = Beats(segment, interval_s, wave.mean(segment, first, last), top, bottom)
    return beats.select((interval_s >= MIN_BEAT_SECONDS) & (interval_s <= MAX_BEAT_SECONDS)
                        & wave.is_clean(segment, start, end - 1))


def _beat_samples(boundary, row):
    """Beats between successive boundaries (times in samples) of a row: index of the boundary at
    which each begins, its first sample, and one past its last."""
    first = followed(row)
    start, end = (np.ceil(boundary[at]).astype(int) for at in (first, first + 1))
    some = end > start
    return first[some], start[some], end[some]


def _over_beats(function, signal, row, start, end):
    """np.maximum or np.minimum over the samples of each beat, of a signal [N, samples]."""
    ends = row[:, None] * signal.shape[1] + np.stack([start, end], 1)
    return function.reduceat(signal.ravel(), ends.ravel())[::2]


# ------------------------------------------------------------ statistics of the beats of a segment

def followed(row: np.ndarray) -> np.ndarray:
    """Indices of the elements whose next element belongs to the same row."""
    return np.flatnonzero(row[1:] == row[:-1])


def segment_sum(values: np.ndarray, segment: np.ndarray, n: int) -> np.ndarray:
    """(n, ...) sums of `values` (beats, ...) over each segment's beats; `segment` ascends."""
    out = np.zeros((n,) + values.shape[1:])
    if len(values):
        present, first = np.unique(segment, return_index=True)
        out[present] = np.add.reduceat(values, first, axis=0)
    return out


def segment_mean(value: np.ndarray, segment: np.ndarray, n: int) -> np.ndarray:
    """(n,) means over each segment's beats, NaN where it has none."""
    return np.bincount(segment, value, n) / np.bincount(segment, minlength=n)


def segment_quantile(value: np.ndarray, segment: np.ndarray, n: int, share: float = 0.5
                     ) -> np.ndarray:
    """(n,) quantiles over each segment's beats (linear interpolation), NaN where it has none."""
    out = np.full(n, np.nan)
    count = np.bincount(segment, minlength=n)
    some = count > 0
    position = (np.cumsum(count) - count + share * (count - 1))[some]
    ordered = value[np.lexsort((value, segment))]
    below, above = (ordered[rounded(position).astype(int)] for rounded in (np.floor, np.ceil))
    out[some] = below + (position % 1) * (above - below)
    return out


def irregularity(interval: np.ndarray, segment: np.ndarray, n: int) -> np.ndarray:
    """(n,) RMSSD / mean of the intervals of each segment's beats."""
    at = followed(segment)
    change = segment_mean((interval[at + 1] - interval[at]) ** 2, segment[at], n)
    return np.sqrt(change) / segment_mean(interval, segment, n)


# ----------------------------------------------------------------------------------------- reasons

def reason_mask(n: int, found: Dict[str, np.ndarray]) -> np.ndarray:
    """(n,) uint32 from a dict of reason name -> (n,) booleans."""
    mask = np.zeros(n, dtype=np.uint32)
    for name, where in found.items():
        mask |= where.astype(np.uint32) << np.uint32(REASONS.index(name))
    return mask


def reason_names(mask: int) -> List[str]:
    """The names of the reasons in one segment's `reason`."""
    return [name for bit, name in enumerate(REASONS) if int(mask) >> bit & 1]


def in_blocks(work: Callable, **signals: np.ndarray) -> Dict[str, np.ndarray]:
    """Apply `work` to blocks of rows of the signals [N, samples]; join its {name: (N,)} results.

    Raises ValueError when the signals are not two-dimensional or differ in shape.
    """
    arrays = [np.atleast_2d(np.asarray(signal)) for signal in signals.values()]
    shapes = [array.shape for array in arrays]
    if len(set(shapes)) > 1 or len(shapes[0]) != 2:
        raise ValueError(f"{' and '.join(signals)} must be [segments, samples], not "
                         f"{' and '.join(map(str, shapes))}")
    n, samples = shapes[0]
    rows = max(1, BLOCK_SAMPLES // max(1, samples))
    with np.errstate(invalid="ignore", divide="ignore"):    # NaN is the result without beats
        blocks = [work(*(array[i:i + rows] for array in arrays)) for i in range(0, max(1, n), rows)]
    return {name: np.concatenate([block[name] for block in blocks]) for name in blocks[0]}


# ---------------------------------------------------------------------------------- signal quality

def signal_quality(abp: np.ndarray, ppg: np.ndarray, fs: float) -> Dict[str, np.ndarray]:
    """Quality of the pairs `abp` (mmHg) and `ppg` (any unit), both [N, samples] at `fs` Hz.

    Returns a dict of (N,) arrays: `reason` (uint32) of the PPG and the pair (`label_segments`
    returns those of the ABP), and float32 measures, NaN where there are too few beats:
    `beat_irregularity`: RMSSD / mean of the ABP's beat intervals; arrhythmic above ARRHYTHMIC.
    `upstroke_s`: pulse pressure over steepest rise, median of the beats, over the square root of
        the interval in s (Bazett's correction): the dynamic response of the line. Simulated lines
        that are damped have 0.13-0.20 s, others 0.09-0.16, real ones 0.05-0.13.
    `ppg_hr`: 60 / median interval of the PPG's beats, beats/min.
    `ppg_quality`: mean correlation of the PPG's beats with their mean beat; 0.86 and more is good
        (template matching: Orphanidou et al., IEEE J Biomed Health Inform 2015).
    `ppg_skewness`: skewness of the PPG, the best single index in Elgendi, Bioengineering 2016.
    """
    return in_blocks(lambda *blocks: _quality_block(*blocks, fs), abp=abp, ppg=ppg)


def _quality_block(abp, ppg, fs):
    arterial = Wave(*fill_missing(abp, *ABP_RANGE_MMHG), fs)
    ppg, missing = fill_missing(ppg)
    reason = _ppg_block(ppg, missing, fs)
    scaled = Wave(ppg_as_pressure(ppg), missing, fs)
    hr, irregular = _rhythm(arterial)
    ppg_hr, _ = _rhythm(scaled)
    deviation = scaled.abp - scaled.abp.mean(1, keepdims=True)
    measures = (irregular, _upstroke_s(arterial) * np.sqrt(hr / 60.0), ppg_hr,
                _template_match(scaled),
                (deviation ** 3).mean(1) / (deviation ** 2).mean(1) ** 1.5)
    tolerance = np.maximum(RATE_TOLERANCE_SHARE * hr, RATE_TOLERANCE_BPM)
    missed = np.where(irregular > ARRHYTHMIC, PULSE_DEFICIT * hr, tolerance)
    mismatch = np.isfinite(hr) & ~((ppg_hr <= hr + tolerance) & (ppg_hr >= hr - missed))
    return {"reason": reason | reason_mask(len(abp), {"rate_mismatch": mismatch}),
            **{name: of.astype(np.float32) for name, of in zip(QUALITY_FIELDS, measures)}}


def ppg_as_pressure(ppg: np.ndarray) -> np.ndarray:
    """The finite `ppg` [N, samples], scaled so that `find_feet` finds its beats."""
    low, high = np.percentile(ppg, [5, 95], axis=1, keepdims=True)
    return (ppg - low) * (PPG_HEIGHT_MMHG / np.where(high > low, high - low, np.inf))


def _rhythm(wave):
    """(rate in beats/min, RMSSD / mean interval), each (N,), NaN where there are too few beats."""
    n = len(wave.abp)
    beats = measure_beats(wave, wave.foot, wave.row)
    few = np.bincount(beats.segment, minlength=n) < MIN_BEATS
    return (np.where(few, np.nan, 60.0 / segment_quantile(beats.interval_s, beats.segment, n)),
            np.where(few, np.nan, irregularity(beats.interval_s, beats.segment, n)))


def _upstroke_s(wave):
    """(N,) height of a beat over its steepest rise, the median of the beats."""
    first, start, end = _beat_samples(wave.foot, wave.row)
    row, rise = wave.row[first], np.diff(wave.abp, axis=1, append=wave.abp[:, -1:]) * wave.fs
    top, bottom, steepest = (_over_beats(*of, row, start, end) for of in (
        (np.maximum, wave.abp), (np.minimum, wave.abp), (np.maximum, rise)))
    some = steepest > 0
    return segment_quantile((top - bottom)[some] / steepest[some], row[some], len(wave.abp))


def _template_match(wave):
    """(N,) mean correlation of a segment's beats, stretched to one length, with their mean."""
    n = len(wave.abp)
    segment, beat, _ = _stretched_beats(wave, TEMPLATE_SAMPLES)
    beat -= beat.mean(1, keepdims=True)
    norm = np.linalg.norm(beat, axis=1, keepdims=True)
    beat /= np.where(norm > 0, norm, 1.0)
    template = segment_sum(beat, segment, n)
    template /= np.linalg.norm(template, axis=1, keepdims=True)
    few = np.bincount(segment, minlength=n) < MIN_BEATS
    return np.where(few, np.nan, segment_mean((beat * template[segment]).sum(1), segment, n))


def _stretched_beats(wave, samples):
    """The beats from foot to foot, stretched to one length: (segment [beats], beats [beats,
    samples], length in samples of the wave [beats])."""
    first = followed(wave.row)
    segment, length = wave.row[first], wave.foot[first + 1] - wave.foot[first]
    time = wave.foot[first, None] + np.linspace(0, 1, samples) * length[:, None]
    return segment, wave.at(segment[:, None], time), length


def ppg_reasons(ppg: np.ndarray, fs: float) -> np.ndarray:
    """(N,) uint32 reasons of `ppg` [N, samples] (or [samples]) alone, in any unit at `fs` Hz."""
    return in_blocks(lambda block: {"reason": _ppg_block(*fill_missing(block), fs)},
                     ppg=ppg)["reason"]


def _ppg_block(ppg, missing, fs):
    span = np.ptp(ppg, axis=1)[:, None]
    flat = runs(np.abs(np.diff(ppg, axis=1)) <= PPG_FLAT_SHARE * span * 60.0 / fs,
                PPG_FLAT_SECONDS, fs) & ~missing
    extreme = at_extremes(ppg, PPG_CLIP_SHARE * span)
    return reason_mask(len(ppg), {
        "ppg_missing": missing.any(1),
        "ppg_flat": is_bad(flat),
        "ppg_clipped": is_bad(runs(extreme, CLIP_SECONDS, fs)),
        "ppg_no_pulse": _no_pulse(ppg, fs),
        "ppg_saturated": is_bad(runs(extreme, SATURATED_SECONDS, fs)),
    })


def _no_pulse(ppg, fs):
    """Where the pulse band holds too little of the signal's power: noise, drift, or nothing."""
    samples = ppg.shape[1]
    tapered = (ppg - ppg.mean(1, keepdims=True)) * np.hanning(samples)
    power = np.abs(np.fft.rfft(tapered, axis=1)) ** 2
    hz = np.fft.rfftfreq(samples, 1.0 / fs)
    low, high = PPG_PULSE_HZ
    pulse = power[:, (hz >= low) & (hz <= high)].sum(1)
    fast, total = power[:, hz >= low].sum(1), power[:, 1:].sum(1)
    return ~((pulse > MIN_PULSE_SHARE_FAST * fast) & (pulse > MIN_PULSE_SHARE * total))


# ------------------------------------------------------------------------------------- bad samples

def fill_missing(signal: np.ndarray, low: float = -np.inf, high: float = np.inf
                 ) -> Tuple[np.ndarray, np.ndarray]:
    """(float64 signal with its gaps bridged by straight lines, mask of the gaps): [N, samples].

    Samples that are not finite or outside [low, high] are gaps. The bridges make the signal fit for
    filtering; the mask keeps them out of every beat.
    """
    signal = np.array(signal, dtype=np.float64)
    missing = ~(np.isfinite(signal) & (signal >= low) & (signal <= high))
    for i in np.flatnonzero(missing.any(1)):
        there, gap = np.flatnonzero(~missing[i]), np.flatnonzero(missing[i])
        signal[i, gap] = np.interp(gap, there, signal[i, there]) if len(there) else 0.0
    return signal, missing


def runs(condition: np.ndarray, seconds: float, fs: float) -> np.ndarray:
    """[N, samples] mask of the samples in runs of at least `seconds` in which `condition`
    [N, samples - 1], about the step from each sample to the next, holds throughout."""
    number, _ = label(condition, [[0, 0, 0], [1, 1, 1], [0, 0, 0]])     # runs along a row
    steps = np.bincount(number.ravel())
    steps[:1] = 0                               # number 0: the condition does not hold
    long = (steps >= max(3, int(round(seconds * fs))))[number]
    return np.pad(long, ((0, 0), (0, 1))) | np.pad(long, ((0, 0), (1, 0)))


def at_extremes(signal: np.ndarray, within: np.ndarray) -> np.ndarray:
    """[N, samples - 1] mask of the steps between samples that both lie within `within` of the
    segment's highest or lowest value."""
    extreme = (signal >= signal.max(1, keepdims=True) - within) \
        | (signal <= signal.min(1, keepdims=True) + within)
    return extreme[:, 1:] & extreme[:, :-1]


def is_bad(mask: np.ndarray) -> np.ndarray:
    """(N,) whether too many samples of each segment are set in a mask [N, samples]."""
    return mask.mean(1) > MAX_BAD_SHARE


# -------------------------------------------------------------------------- the PPG against the ABP

def ppg_delay(abp: np.ndarray, ppg: np.ndarray, fs: float) -> Tuple[float, float, np.ndarray]:
    """Delay of the PPG's beats behind the ABP's: (s of the record, strength, [N] s of each minute).

    abp (mmHg) and ppg (any unit): [N, samples] at `fs` Hz, the minutes of one record. The intervals
    from each foot in the ABP to all feet in the PPG near it are pooled. The true delay recurs with
    every beat; a delay that is wrong by a beat varies with the rhythm, so its peak in the histogram
    is lower. Strength is by how much (0: equal, a rhythm without variation; 1: no other peak);
    trust the delay from SURE_DELAY on. A minute's delay is the median near the record's. Unknown
    delays are NaN.
    """
    low, high = DELAY_RANGE_S
    abp_feet, row = _foot_times(abp, fs)
    ppg_feet, _ = _foot_times(ppg, fs, ppg_as_pressure)
    first, end = np.searchsorted(ppg_feet, [abp_feet + low, abp_feet + high])
    count = end - first             # of the PPG's feet near each of the ABP's
    at = np.repeat(first - np.cumsum(count) + count, count) + np.arange(count.sum())
    delay, row = ppg_feet[at] - np.repeat(abp_feet, count), np.repeat(row, count)
    edges = np.arange(low, high + DELAY_STEP_S, DELAY_STEP_S)
    density = gaussian_filter1d(
        np.histogram(delay, edges)[0].astype(float), DELAY_BLUR_S / DELAY_STEP_S, mode="constant")
    peaks, _ = find_peaks(density)
    of_minutes = np.full(len(abp), np.nan, np.float32)
    best = peaks[density[peaks].argmax()] if len(peaks) else 0
    near = np.abs(delay - edges[best]) < OTHER_BEAT_S / 2
    if not len(peaks) or near.sum() < MIN_DELAY_BEATS:
        return np.nan, 0.0, of_minutes
    others = peaks[np.abs(edges[peaks] - edges[best]) > OTHER_BEAT_S]
    strength = 1.0 - density[others].max(initial=0.0) / density[best]
    of_minutes[:] = segment_quantile(delay[near], row[near], len(abp))
    return float(np.median(delay[near])), float(strength), of_minutes


def _foot_times(signal, fs, scale=None):
    """(times in s, rows) of the feet in `signal` [N, samples], in time order. Rows are set so far
    apart that no delay spans two of them. `scale` makes a PPG resemble a pressure."""
    apart_s = signal.shape[1] / fs + 2 * max(DELAY_RANGE_S)
    times, rows = [np.zeros(0)], [np.zeros(0, int)]
    at_once = max(1, BLOCK_SAMPLES // max(1, signal.shape[1]))
    for i in range(0, len(signal), at_once):
        block, missing = fill_missing(signal[i:i + at_once])
        foot, row = find_feet(block if scale is None else scale(block), fs)
        known = ~missing[row, np.rint(foot).astype(int)]
        times.append(foot[known] / fs + (row[known] + i) * apart_s)
        rows.append(row[known] + i)
    return np.concatenate(times), np.concatenate(rows)


# -------------------------------------------------------------------------------- the PPG by itself

# Skewness of the PPG's slope from which its polarity is sure; at 0.3 one of the 766 shared records
# would be turned, which looks inverted but may be not.
MIN_SLOPE_SKEWNESS = 0.4
POLARITY_SECONDS = 10.0


def ppg_polarity(ppg: np.ndarray, fs: float) -> int:
    """1 where a recording's PPG is upright (more blood, larger value), -1 inverted, 0 unsure.

    ppg: [samples] or [N, samples] of one recording, in any unit, at `fs` Hz; NaN where missing. A
    pulse rises faster than it falls, so the slope of an upright PPG is skewed to the right. The
    median over pieces of POLARITY_SECONDS decides, so that motion in some of them does no harm.
    """
    found = in_blocks(lambda block: {"skewness": _slope_skewness(*fill_missing(block), fs)},
                      ppg=ppg)["skewness"]
    middle = np.median(found[np.isfinite(found)]) if np.isfinite(found).any() else 0.0
    return int(np.sign(middle)) if abs(middle) >= MIN_SLOPE_SKEWNESS else 0


def _slope_skewness(ppg, missing, fs):
    """[N, pieces] skewness of the slope, NaN where half of the piece is missing."""
    slope = np.diff(_in_pulse_band(ppg, fs), axis=1)
    pieces = max(1, round(slope.shape[1] / (POLARITY_SECONDS * fs)))
    return np.stack([np.where(gap.mean(1) > 0.5, np.nan, skew(piece, axis=1)) for piece, gap in zip(
        np.array_split(slope, pieces, axis=1), np.array_split(missing, pieces, axis=1))], axis=1)


def _in_pulse_band(ppg, fs):
    band = butter(2, PPG_PULSE_HZ, "bandpass", fs=fs, output="sos")
    return sosfiltfilt(band, ppg - ppg.mean(1, keepdims=True), axis=1)


# Classical features: rate, rhythm, shape of the mean beat, harmonics. Rates are in beats/min, times
# in s, the rest without unit.
PPG_FEATURES = (
    "pulse_rate", "pulse_irregularity", "pulse_rise_s", "pulse_width_25_s", "pulse_width_50_s",
    "pulse_width_75_s", "pulse_area", "pulse_b_a", "pulse_skewness", "pulse_kurtosis",
    "pulse_amplitude_variation", "pulse_baseline_variation", "pulse_harmonic_2", "pulse_harmonic_3",
    "pulse_quality")
MIN_FEATURE_BEATS = 5
SHAPE_SAMPLES = 64        # of a beat from foot to foot


def ppg_features(ppg: np.ndarray, fs: float = 60) -> Dict[str, np.ndarray]:
    """{name: [N]} of PPG_FEATURES from waveforms [N, samples] of any gain and offset.

    NaN where fewer than MIN_FEATURE_BEATS beats are found or a sample is not finite.
    """
    return in_blocks(lambda block: _features_block(*fill_missing(block), fs), ppg=ppg)


def _features_block(ppg, missing, fs):
    n = len(ppg)
    smooth = _in_pulse_band(ppg, fs)
    smooth -= smooth.mean(1, keepdims=True)
    smooth /= smooth.std(1, keepdims=True)
    squared = smooth ** 2
    wave = Wave(np.nan_to_num(smooth * (PPG_HEIGHT_MMHG / 3)), missing, fs)     # 3 SD: a pulse
    segment, beat, length = _stretched_beats(wave, SHAPE_SAMPLES)       # beat [beats, 64]
    interval_s, count = length / fs, np.bincount(segment, minlength=n)
    height = np.ptp(beat, axis=1)
    foot = wave.at(wave.row, wave.foot)

    def spread(value, of):          # (n,) SD over the beats of a segment
        return np.sqrt(segment_mean((value - segment_mean(value, of, n)[of]) ** 2, of, n))

    beat = (beat - beat.min(1, keepdims=True)) / height[:, None]
    shape = segment_sum(beat, segment, n) / count[:, None]              # [n, 64], the mean beat
    duration_s = segment_quantile(interval_s, segment, n)
    bend = np.gradient(np.gradient(shape, axis=1), axis=1)
    a = bend[:, :24].argmax(1)[:, None]         # the a wave is in the upstroke, b follows it
    b_wave = np.take_along_axis(bend, a + np.arange(16), axis=1).min(1)
    power = np.abs(np.fft.rfft(shape, axis=1))[:, 1:4] ** 2
    beat -= beat.mean(1, keepdims=True)
    template = (shape - shape.mean(1, keepdims=True))[segment]
    match = (beat * template).sum(1) / np.sqrt((beat ** 2).sum(1) * (template ** 2).sum(1))
    values = (
        60.0 / duration_s, spread(interval_s, segment) / segment_mean(interval_s, segment, n),
        shape.argmax(1) / (SHAPE_SAMPLES - 1) * duration_s,
        *((shape > share).mean(1) * duration_s for share in (0.25, 0.5, 0.75)), shape.mean(1),
        b_wave / np.take_along_axis(bend, a, axis=1)[:, 0], (squared * smooth).mean(1),
        (squared ** 2).mean(1) - 3.0, spread(height, segment) / segment_mean(height, segment, n),
        spread(foot, wave.row) * (3 / PPG_HEIGHT_MMHG), power[:, 1] / power[:, 0],
        power[:, 2] / power[:, 0], segment_mean(match, segment, n))
    known = (count >= MIN_FEATURE_BEATS) & ~missing.any(1)
    return {name: np.where(known, value, np.nan) for name, value in zip(PPG_FEATURES, values)}
