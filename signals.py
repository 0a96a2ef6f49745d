"""Beats and signal quality of arterial pressure (ABP) and photoplethysmogram (PPG).

    from signals import find_feet, signal_quality
    foot, row = find_feet(abp, fs=60)           # abp [N, samples] in mmHg, finite
    quality = signal_quality(abp, ppg, fs=60)   # 'reason' of the PPG and the pair, QUALITY_FIELDS

One beat detector serves both signals. The beats of all segments are flat arrays in time order, with
the row of each; the `segment_` functions summarise each row's beats. It needs only NumPy and SciPy.
"""
from typing import Callable, Dict, List, NamedTuple, Tuple

import numpy as np
from scipy.ndimage import gaussian_filter1d, grey_opening
from scipy.signal import butter, find_peaks, sosfiltfilt
from scipy.stats import skew

# Why a segment is refused (docs/labels.md): bits of `reason`, stored in files; add new ones last.
REASONS = (
    "abp_missing", "abp_flat", "abp_clipped", "abp_flush", "abp_range", "few_beats", "no_fit",
    "ppg_missing", "ppg_flat", "ppg_clipped", "ppg_no_pulse", "abp_saturated", "ppg_saturated",
    "rate_mismatch")
QUALITY_FIELDS = ("beat_irregularity", "upstroke_s", "ppg_hr", "ppg_quality", "ppg_skewness")

MIN_FS_HZ = 40            # below it the upstroke has too few samples to time a beat
BLOCK_SAMPLES = 1_000_000  # processed at once: bounds memory, fits the cache
SLOPE_SUM_SECONDS = 0.128  # rise within this time: Zong, Moody, Mark, Computers in Cardiology 2003
SMOOTH_SECONDS = 0.0166   # Gaussian with -3 dB at 8 Hz: keeps the upstroke, removes line ringing
MIN_BEAT_SECONDS, MAX_BEAT_SECONDS = 0.27, 2.4  # 222 and 25 beats/min; longer: a gap in the pulse
MIN_RISE_MMHG = 4.0       # smaller upstrokes are noise; the published gate requires PP > 10
MIN_RISE_SHARE = 0.25     # of the segment's usual largest rise; weak beats of AF lie above it
# A dicrotic wave follows its beat within the ejection time (0.2-0.4 s) and rises less than it did.
DICROTIC_SECONDS, DICROTIC_RISE_SHARE = 0.45, 0.6
FOOT_SEARCH_SECONDS = 0.2  # from foot to steepest upstroke; 0.1 s is usual, damped lines are slower
MIN_BEATS, MIN_DELAY_BEATS = 10, 20     # ten beats define a line
ABP_RANGE_MMHG = (-30.0, 330.0)  # transducers end at 300 or 320; values outside are not pressures
CLIP_SECONDS = 0.067      # 4 steps at 60 Hz; a natural top stays within 0.25 mmHg for 0.02-0.04 s
SATURATED_SECONDS = 0.5   # longer than any clipped beat
MAX_BAD_SHARE = 0.1       # of the segment, for each kind of bad sample
PPG_FLAT_SECONDS = 1.0    # longer than the flat end of diastole in a slow pulse
PPG_FLAT_SHARE = 1e-4     # of the range, per 1/60 s: smaller changes are flat
PPG_CLIP_SHARE = 1e-3     # of the range: samples closer to an extreme are clipped
PPG_PULSE_HZ = (0.5, 8.0)  # from 30 beats/min to the third harmonic of 160/min
# Least share of the pulse band in the power above 0.5 Hz (white noise has 0.25) and in all but the
# mean (a random walk has 0.01-0.1); 893 real minutes exceed 0.97 and 0.15. Elgendi, Bioengineering
# 2016.
MIN_PULSE_SHARE_FAST, MIN_PULSE_SHARE = 0.8, 0.1
RATE_TOLERANCE_SHARE, RATE_TOLERANCE_BPM = 0.10, 5.0    # the larger: AAMI EC13
# The largest range in 2.4 s over the usual range: above it a spike outweighs the pulses. In 3,081
# real minutes without a quality flag it is 6.8 at most.
MAX_SPAN_RATIO = 10.0
ARRHYTHMIC = 0.1          # RMSSD / mean interval, as for fibrillation in Dash, Ann Biomed Eng 2009
PULSE_DEFICIT = 0.5       # share of weak beats that may not reach the finger in arrhythmia
PPG_HEIGHT_MMHG = 60.0    # the PPG's pulse is scaled to this height for `find_feet`
TEMPLATE_SAMPLES = 40     # of a beat, for `ppg_quality`
MIN_SLOPE_SKEWNESS, POLARITY_SECONDS = 0.4, 10.0    # at 0.3, 1 of 766 records would turn
DELAY_RANGE_S = (-0.25, 1.75)   # of the PPG behind the ABP: real monitors show 0.06 to 1.0 s
DELAY_STEP_S, DELAY_BLUR_S, OTHER_BEAT_S = 0.0025, 0.01, 0.25   # further apart: another beat
SURE_DELAY = 0.05         # strength; in 1,350 synthetic rhythms a beat was lost only below 0.02


class Beats(NamedTuple):
    """Beats of a block of segments: flat arrays of equal length, in time order."""
    segment: np.ndarray     # row of the block
    interval_s: np.ndarray
    map: np.ndarray         # mmHg, time mean over the beat
    max: np.ndarray         # mmHg
    min: np.ndarray         # mmHg
    steepest: np.ndarray    # mmHg/s, largest rise

    @property
    def flow(self) -> np.ndarray:
        """PP * HR in mmHg/min: the published surrogate of cardiac output."""
        return (self.max - self.min) * 60.0 / self.interval_s

    def select(self, keep: np.ndarray) -> "Beats":
        return Beats(*(column[keep] for column in self))


class Wave:
    """A block of segments: `abp` [N, samples] in mmHg, finite; a mask `bad` of samples that no beat
    may contain; the feet of its beats, `foot` (time in samples) and `row`, flat arrays. The methods
    take rows and times (in samples) of equal length."""

    def __init__(self, abp: np.ndarray, bad: np.ndarray, fs: float):
        self.abp, self.bad, self.fs = abp, bad, fs
        self.foot, self.row = find_feet(abp, fs)
        self.first = np.flatnonzero(self.row[1:] == self.row[:-1])  # feet with another in their row
        self.area = np.pad(np.cumsum(0.5 * (abp[:, 1:] + abp[:, :-1]), axis=1), ((0, 0), (1, 0)))

    def interpolate(self, row: np.ndarray, time: np.ndarray, integral: bool = False) -> np.ndarray:
        """Pressure, or its integral from the row's first sample, linear between samples."""
        low = np.clip(time.astype(int), 0, self.abp.shape[1] - 2)
        flat, part = row * self.abp.shape[1] + low, time - low
        here = self.abp.take(flat)
        rise = part * (self.abp.take(flat + 1) - here)
        return self.area.take(flat) + part * (here + 0.5 * rise) if integral else here + rise

    def mean(self, row: np.ndarray, begin: np.ndarray, end: np.ndarray) -> np.ndarray:
        before, after = (self.interpolate(row, time, integral=True) for time in (begin, end))
        return (after - before) / (end - begin)

    def is_clean(self, row: np.ndarray, begin: np.ndarray, end: np.ndarray) -> np.ndarray:
        """Whether no sample from begin to end is bad."""
        count = np.pad(np.cumsum(self.bad, axis=1, dtype=np.int32), ((0, 0), (1, 0)))
        first, last = (np.clip(time.astype(int), 0, self.bad.shape[1]) for time in (begin, end + 1))
        return count[row, first] == count[row, last]


def find_feet(abp: np.ndarray, fs: float) -> Tuple[np.ndarray, np.ndarray]:
    """Feet of the beats in `abp` [N, samples] (finite): flat (time in samples, row), in time order.

    A beat is a peak of the slope sum. Its foot is where the tangent at the steepest point of the
    upstroke meets the level of the minimum before it, which is finer than the sampling interval.
    An upstroke that began before the row has no foot.
    """
    n, samples = abp.shape
    smooth = gaussian_filter1d(abp, SMOOTH_SECONDS * fs, axis=1, mode="nearest")
    rise = np.diff(smooth, axis=1, prepend=smooth[:, :1])
    climbed = np.cumsum(np.maximum(rise, 0.0), axis=1)
    window = max(2, int(round(SLOPE_SUM_SECONDS * fs)))
    slope_sum = climbed - np.pad(climbed, ((0, 0), (window, 0)))[:, :samples]
    # The segment's usual largest rise: median of the maxima of 2-s pieces, each with a beat in it.
    piece = min(int(2 * fs), samples)
    pieces = samples // piece
    usual = np.median(slope_sum[:, :pieces * piece].reshape(n, pieces, piece).max(2), axis=1)
    # All rows as one signal, so far apart that no peak hides a peak of the next row.
    apart = int(np.ceil(MIN_BEAT_SECONDS * fs))
    joined = np.pad(slope_sum, ((0, 0), (0, apart)), constant_values=-1.0)
    threshold = np.repeat(np.maximum(MIN_RISE_SHARE * usual, MIN_RISE_MMHG), samples + apart)
    peak, _ = find_peaks(joined.ravel(), height=threshold, distance=MIN_BEAT_SECONDS * fs)
    row = peak // (samples + apart)
    peak -= row * apart
    height = slope_sum.ravel()[peak]
    for _ in range(2):              # a second, smaller dicrotic wave shows once the first is gone
        dicrotic = np.zeros(len(peak), dtype=bool)
        dicrotic[1:] = ((row[1:] == row[:-1]) & (np.diff(peak) < DICROTIC_SECONDS * fs)
                        & (height[1:] < DICROTIC_RISE_SHARE * height[:-1]))
        peak, row, height = peak[~dicrotic], row[~dicrotic], height[~dicrotic]

    def before(position, length):   # [beats, length] indices that end at position, within the row
        return np.maximum(position[:, None] + np.arange(1 - length, 1), (row * samples)[:, None])

    smooth, rise, upstroke = smooth.ravel(), rise.ravel(), before(peak, window + 1)
    beat = np.arange(len(peak))
    steepest = upstroke[beat, rise[upstroke].argmax(1)]
    search = before(steepest, int(round(FOOT_SEARCH_SECONDS * fs)))
    lowest = search[beat, smooth[search].argmin(1)]
    # rise[i] is the slope half a sample before i; there the pressure is the mean of i and i - 1
    middle = smooth[steepest] - 0.5 * rise[steepest]
    foot = steepest - row * samples - 0.5 - (middle - smooth[lowest]) / rise[steepest]
    whole = (foot >= 0) & (foot <= samples - 1) & (lowest > row * samples)
    return foot[whole], row[whole]


def measure_beats(wave: Wave, with_invalid: bool = False) -> Beats:
    """The valid beats of a block of segments, or all, from foot to foot."""
    # without beats that hold no sample
    first = wave.first[np.ceil(wave.foot[wave.first + 1]) > np.ceil(wave.foot[wave.first])]
    row, begin, end = wave.row[first], wave.foot[first], wave.foot[first + 1]
    interval_s = (end - begin) / wave.fs
    bounds = row[:, None] * wave.abp.shape[1] + np.ceil(np.stack([begin, end], 1)).astype(int)
    rise = np.diff(wave.abp, axis=1, append=wave.abp[:, -1:]) * wave.fs
    bounds, abp = bounds.ravel(), wave.abp.ravel()
    beats = Beats(row, interval_s, wave.mean(row, begin, end),
                  np.maximum.reduceat(abp, bounds)[::2], np.minimum.reduceat(abp, bounds)[::2],
                  np.maximum.reduceat(rise.ravel(), bounds)[::2])
    valid = ((interval_s >= MIN_BEAT_SECONDS) & (interval_s <= MAX_BEAT_SECONDS)
             & wave.is_clean(row, np.ceil(begin), np.ceil(end) - 1))
    return beats if with_invalid else beats.select(valid)


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


def segment_quantile(value: np.ndarray, segment: np.ndarray, n: int, share=0.5) -> np.ndarray:
    """(n,) quantiles over each segment's beats (linear interpolation), NaN where it has none."""
    count = np.bincount(segment, minlength=n)
    position = np.cumsum(count) - count + share * (count - 1)
    ordered = np.append(value[np.lexsort((value, segment))], np.nan)
    below, above = ordered[np.floor(position).astype(int)], ordered[np.ceil(position).astype(int)]
    return np.where(count > 0, below + (position % 1) * (above - below), np.nan)


def irregularity(interval: np.ndarray, segment: np.ndarray, n: int) -> np.ndarray:
    """(n,) RMSSD / mean of the intervals of each segment's beats."""
    at = np.flatnonzero(segment[1:] == segment[:-1])
    change = segment_mean((interval[at + 1] - interval[at]) ** 2, segment[at], n)
    return np.sqrt(change) / segment_mean(interval, segment, n)


def in_blocks(work: Callable, **signals: np.ndarray) -> Dict[str, np.ndarray]:
    """Apply `work` to blocks of rows of the signals [N, samples] and join its {name: (N,)} results.
    Raises ValueError when the signals are not two-dimensional or differ in shape."""
    arrays = [np.atleast_2d(signal) for signal in signals.values()]
    shapes = [array.shape for array in arrays]
    if len(set(shapes)) > 1 or len(shapes[0]) != 2:
        raise ValueError(f"{' and '.join(signals)} must be [segments, samples], not "
                         f"{' and '.join(map(str, shapes))}")
    n, samples = shapes[0]
    rows = max(1, BLOCK_SAMPLES // max(1, samples))
    with np.errstate(invalid="ignore", divide="ignore"):    # NaN is the result without beats
        blocks = [work(*(array[i:i + rows] for array in arrays)) for i in range(0, max(1, n), rows)]
    return {name: np.concatenate([block[name] for block in blocks]) for name in blocks[0]}


def reason_mask(found: Dict[str, np.ndarray]) -> np.ndarray:
    """(N,) uint32 from {reason: mask}, each (N,), or [N, samples] of which some may be set."""
    mask = np.uint32(0)
    for name, where in found.items():
        where = where.mean(1) > MAX_BAD_SHARE if where.ndim == 2 else where
        mask = mask | (where.astype(np.uint32) << np.uint32(REASONS.index(name)))
    return mask


def reason_names(mask: int) -> List[str]:
    """The names of the reasons in one segment's `reason`."""
    return [name for bit, name in enumerate(REASONS) if int(mask) >> bit & 1]


def fill_missing(signal: np.ndarray, low=-np.inf, high=np.inf) -> Tuple[np.ndarray, np.ndarray]:
    """(float64 signal with its gaps bridged by straight lines, mask of the gaps): [N, samples].
    Samples that are not finite or outside [low, high] are gaps. The bridges are for filters."""
    signal = np.array(signal, dtype=np.float64)
    missing = ~(np.isfinite(signal) & (signal >= low) & (signal <= high))
    for i in np.flatnonzero(missing.any(1)):
        there, gap = np.flatnonzero(~missing[i]), np.flatnonzero(missing[i])
        signal[i, gap] = np.interp(gap, there, signal[i, there]) if len(there) else 0.0
    return signal, missing


def runs(condition: np.ndarray, seconds: float, fs: float) -> np.ndarray:
    """[N, samples] mask of the samples in runs of at least `seconds` in which `condition`
    [N, samples - 1], about the step from each sample to the next, holds throughout."""
    steps = max(3, int(round(seconds * fs)))
    long = grey_opening(condition, (1, steps), mode="constant")     # False beyond the ends
    return np.pad(long, ((0, 0), (0, 1))) | np.pad(long, ((0, 0), (1, 0)))


def at_extremes(signal: np.ndarray, within: np.ndarray) -> np.ndarray:
    """[N, samples - 1] mask of the steps between samples that both lie within `within` of the
    segment's highest or lowest value."""
    extreme = ((signal >= signal.max(1, keepdims=True) - within)
               | (signal <= signal.min(1, keepdims=True) + within))
    return extreme[:, 1:] & extreme[:, :-1]


def signal_quality(abp: np.ndarray, ppg: np.ndarray, fs: float) -> Dict[str, np.ndarray]:
    """Quality of the pairs `abp` (mmHg) and `ppg` (any unit), both [N, samples] at `fs` Hz: a dict
    of (N,) `reason` (uint32; of the PPG and the pair) and float32 measures, NaN with few beats.

    beat_irregularity: RMSSD / mean interval of the ABP's beats. upstroke_s: median PP over steepest
    rise, over the square root of the interval (Bazett); damped lines have 0.13 s or more. ppg_hr:
    beats/min. ppg_quality: mean correlation of the beats with their mean, good from 0.86 on
    (Orphanidou, IEEE J Biomed Health Inform 2015). ppg_skewness: Elgendi, Bioengineering 2016."""
    return in_blocks(lambda *blocks: _quality_block(*blocks, fs), abp=abp, ppg=ppg)


def _quality_block(abp, ppg, fs):
    arterial = Wave(*fill_missing(abp, *ABP_RANGE_MMHG), fs)
    filled, missing = fill_missing(ppg)
    finger = Wave(_as_pressure(filled), missing, fs)
    (hr, irregular), (ppg_hr, _) = _rhythm(arterial), _rhythm(finger)
    beats = measure_beats(arterial, with_invalid=True)
    beats = beats.select(beats.steepest > 0)
    upstroke_s = segment_quantile((beats.max - beats.min) / beats.steepest, beats.segment, len(abp))
    measures = (irregular, upstroke_s * np.sqrt(hr / 60.0), ppg_hr, _template_match(finger),
                skew(finger.abp, axis=1))
    tolerance = np.maximum(RATE_TOLERANCE_SHARE * hr, RATE_TOLERANCE_BPM)
    missed = np.where(irregular > ARRHYTHMIC, PULSE_DEFICIT * hr, tolerance)
    mismatch = np.isfinite(hr) & ~((ppg_hr <= hr + tolerance) & (ppg_hr >= hr - missed))
    return {"reason": ppg_reasons(ppg, fs) | reason_mask({"rate_mismatch": mismatch}),
            **{name: of.astype(np.float32) for name, of in zip(QUALITY_FIELDS, measures)}}


def _as_pressure(ppg):
    """The finite `ppg` [N, samples], scaled so that `find_feet` finds its beats."""
    low, high = np.percentile(ppg, [5, 95], axis=1, keepdims=True)
    return (ppg - low) * (PPG_HEIGHT_MMHG / np.where(high > low, high - low, np.inf))


def _rhythm(wave):
    """(rate in beats/min, RMSSD / mean interval), each (N,), NaN where there are too few beats."""
    n, beats = len(wave.abp), measure_beats(wave)
    few = np.bincount(beats.segment, minlength=n) < MIN_BEATS
    return (np.where(few, np.nan, 60.0 / segment_quantile(beats.interval_s, beats.segment, n)),
            np.where(few, np.nan, irregularity(beats.interval_s, beats.segment, n)))


def _template_match(wave):
    """(N,) mean correlation of a segment's beats, stretched to one length, with their mean."""
    n, segment, begin = len(wave.abp), wave.row[wave.first], wave.foot[wave.first]
    length = wave.foot[wave.first + 1] - begin
    time = begin[:, None] + np.linspace(0, 1, TEMPLATE_SAMPLES) * length[:, None]
    beat = wave.interpolate(segment[:, None], time)
    beat -= beat.mean(1, keepdims=True)
    norm = np.linalg.norm(beat, axis=1, keepdims=True)
    beat /= np.where(norm > 0, norm, 1.0)
    template = segment_sum(beat, segment, n)
    template /= np.linalg.norm(template, axis=1, keepdims=True)
    match = segment_mean((beat * template[segment]).sum(1), segment, n)
    return np.where(np.bincount(segment, minlength=n) < MIN_BEATS, np.nan, match)


def ppg_reasons(ppg: np.ndarray, fs: float) -> np.ndarray:
    """(N,) uint32 reasons of `ppg` [N, samples] alone, in any unit at `fs` Hz."""
    ppg, missing = fill_missing(ppg)
    span = np.ptp(ppg, axis=1)[:, None]
    still = np.abs(np.diff(ppg, axis=1)) <= PPG_FLAT_SHARE * span * 60.0 / fs
    extreme = at_extremes(ppg, PPG_CLIP_SHARE * span)
    tapered = (ppg - ppg.mean(1, keepdims=True)) * np.hanning(ppg.shape[1])
    power, hz = np.abs(np.fft.rfft(tapered)) ** 2, np.fft.rfftfreq(ppg.shape[1], 1.0 / fs)
    low, high = PPG_PULSE_HZ
    fast, total = power[:, hz >= low].sum(1), power[:, 1:].sum(1)
    pulse = power[:, (hz >= low) & (hz <= high)].sum(1)
    has_pulse = (pulse > MIN_PULSE_SHARE_FAST * fast) & (pulse > MIN_PULSE_SHARE * total)
    n = max(1, int(ppg.shape[1] / (MAX_BEAT_SECONDS * fs)))     # pieces of a beat or more
    spans = np.stack([np.ptp(piece, axis=1) for piece in np.array_split(ppg, n, axis=1)])
    has_pulse &= spans.max(0) <= MAX_SPAN_RATIO * np.median(spans, axis=0)
    return reason_mask({
        "ppg_missing": missing.any(1), "ppg_no_pulse": ~has_pulse,
        "ppg_flat": runs(still, PPG_FLAT_SECONDS, fs) & ~missing,
        "ppg_clipped": runs(extreme, CLIP_SECONDS, fs),
        "ppg_saturated": runs(extreme, SATURATED_SECONDS, fs)})


def ppg_delay(abp: np.ndarray, ppg: np.ndarray, fs: float) -> Tuple[float, float, np.ndarray]:
    """Delay of the PPG's beats behind the ABP's: (s of the record, strength, [N] s of each minute),
    NaN where unknown; trust it where strength is SURE_DELAY or more.

    [N, samples]: the minutes of one record. The intervals from each foot in the ABP to all feet in
    the PPG near it are pooled. The true delay is the same for all beats; a delay that is off by a
    beat varies with the rhythm. Strength is 1 - second highest peak / highest peak.
    """
    low, high = DELAY_RANGE_S
    abp_feet, row = _foot_times(abp, fs, np.asarray)
    ppg_feet, _ = _foot_times(ppg, fs, _as_pressure)
    first, end = np.searchsorted(ppg_feet, [abp_feet + low, abp_feet + high])
    row = np.repeat(row, end - first)
    delay = np.concatenate([np.zeros(0), *(
        ppg_feet[i:j] - foot for i, j, foot in zip(first, end, abp_feet))])
    edges = np.arange(low, high + DELAY_STEP_S, DELAY_STEP_S)
    density = gaussian_filter1d(
        np.histogram(delay, edges)[0].astype(float), DELAY_BLUR_S / DELAY_STEP_S, mode="constant")
    best, (peaks, _) = density.argmax(), find_peaks(density)
    near = np.abs(delay - edges[best]) < OTHER_BEAT_S / 2
    if near.sum() < MIN_DELAY_BEATS:
        return np.nan, 0.0, np.full(len(abp), np.nan, np.float32)
    others = peaks[np.abs(edges[peaks] - edges[best]) > OTHER_BEAT_S]
    strength = 1.0 - density[others].max(initial=0.0) / density[best]
    minutes = segment_quantile(delay[near], row[near], len(abp))
    return float(np.median(delay[near])), float(strength), minutes.astype(np.float32)


def _foot_times(signal, fs, scale):
    """(times in s, rows) of the feet; rows are set so far apart that no delay spans two rows."""
    apart_s, times = signal.shape[1] / fs + 2 * max(DELAY_RANGE_S), [np.zeros(0)]
    for row in range(len(signal)):
        filled, missing = fill_missing(signal[row:row + 1])
        foot, _ = find_feet(scale(filled), fs)
        foot = foot[~missing[0, np.rint(foot).astype(int)]]
        times.append(foot / fs + row * apart_s)
    rows = np.repeat(np.arange(-1, len(signal)), [len(foot) for foot in times])
    return np.concatenate(times), rows


def ppg_polarity(ppg: np.ndarray, fs: float) -> int:
    """1 where a recording's PPG, [samples] or [N, samples], is upright (more blood, larger value),
    -1 inverted, 0 unsure. A pulse rises faster than it falls: the slope is skewed to the right."""
    ppg, missing = fill_missing(np.atleast_2d(ppg))
    band = butter(2, PPG_PULSE_HZ, "bandpass", fs=fs, output="sos")
    slope = np.diff(sosfiltfilt(band, ppg - ppg.mean(1, keepdims=True), axis=1), axis=1)
    n = max(1, round(slope.shape[1] / (POLARITY_SECONDS * fs)))
    pieces = zip(np.array_split(slope, n, axis=1), np.array_split(missing, n, axis=1))
    found = np.concatenate([skew(piece[gap.mean(1) <= 0.5], axis=1) for piece, gap in pieces])
    middle = np.median(found[np.isfinite(found)]) if np.isfinite(found).any() else 0.0
    return int(np.sign(middle)) if abs(middle) >= MIN_SLOPE_SKEWNESS else 0
