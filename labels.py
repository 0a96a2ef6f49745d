"""Arterial pressure waveform -> beats -> critical closing pressure, TPP and fit quality.

    from labels import label_segments, signal_quality
    labels = label_segments(abp, fs=60)             # abp [N, samples] in mmHg, any rate >= 40 Hz
    labels['tpp']                                   # [N] mmHg, NaN where labels['reason'] != 0
    label_segments(abp, 60, method='waveform_balance')          # the least error: see METHODS
    quality = signal_quality(abp, ppg, fs=60)       # 'reason' of PPG and pair, and QUALITY_FIELDS

The method (Chandrasekhar et al., Nat Med 2023, doi 10.1038/s41591-023-02474-6): over one minute,
MAP = Pcrit + R * flow with flow ~ k * PP * HR. Each beat gives MAP (its time mean), PP (maximum
minus minimum) and HR (60 / interval); beats whose PP * HR lies outside the 5th-95th percentile are
dropped; the intercept of the least-squares line of MAP on PP * HR is Pcrit; TPP = MAP - Pcrit.
The published beats run from peak to peak (`beats='peak'`). Foot to foot is the default, because it
is less biased when stroke volume varies with respiration. How far each method is off, on virtual
patients whose Pcrit is known: `python simulate.py --label-report`.

Everything is computed for all beats of all segments at once: a beat is an element of flat arrays,
`segment` says which row it belongs to, and sums over a row's beats are `np.bincount` or `_sum`.
"""
from dataclasses import dataclass

import numpy as np

# Why a segment has no label or a poor signal: bit i of `reason` is REASONS[i]. The order is frozen
# (files store the bits); new reasons go at the end. Each refuses the segment. What a user may want
# to keep (arrhythmia, a damped line, a PPG of middling quality) is no reason but a measure, in
# QUALITY_FIELDS, for a rule of the gate.
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
    "abp_saturated",  # stuck at the upper or lower end of the scale, longer than a beat's top lasts
    "ppg_saturated",  # the same of the PPG's amplifier
    "rate_mismatch",  # the PPG's rate is not the ABP's: another pulse than the label's, or none
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

# The methods that average the waveform; times are from a beat's foot.
LEVEL_SECONDS = 0.12      # the level at a foot is the mean of so long
ALIGN_SECONDS = (-0.1, 0.25)
SYSTOLE_SECONDS = (0.05, 0.25)  # ejection lasts 0.20-0.36 s; its mean follows the stroke volume
DIASTOLE_SECONDS = 0.5    # from here on ejection, the valve's closure and most reflections are over
MIN_DIASTOLE_SECONDS = 0.15
END_SECONDS = 0.1         # of a diastole, over which the levels at its ends are taken
NOISE_SECONDS = 0.15
TAU_S = (0.5, 0.35)       # mean and SD of RC, wide: 0.45-0.7 s is usual (Maas et al. 2012, and C)
BREATH_HZ = (0.12, 0.5)   # 7 to 30 breaths/min
BREATH_MMHG = 0.2         # SD of either part (sine, cosine) of the chest's own swing in the artery
MAX_SERIAL = 0.5          # correlation of successive residuals that the standard error allows for
MODEL_ERROR_MMHG = 1.0    # part of every standard error: seen on simulated patients, however long
MAX_NOISE_SHARE = 0.7     # of the variance that is left for a slope; more is not taken out
# `bend_aware`: what it tries, and the prior SD of the bend (0.013 in the regimes of simulate.py).
BEND_P_CRIT_MMHG = np.arange(-20.0, 100.0)
BEND_PER_MMHG = np.arange(0.0, 0.03, 0.001)
BEND_SD_PER_MMHG = 0.006

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
    stored: np.ndarray      # mmHg, change of the pressure from the beat's begin to its end

    @property
    def flow(self):
        """PP * HR in mmHg/min: the published surrogate of cardiac output."""
        return (self.max - self.min) * 60.0 / self.interval_s

    def select(self, keep):
        return Beats(**{name: column[keep] for name, column in vars(self).items()})


@dataclass
class Wave:
    """A block of segments [N, samples] as the methods see it that use more than `Beats`."""
    abp: np.ndarray         # mmHg, finite
    bad: np.ndarray         # [N, samples] mask of what must be in no beat
    foot: np.ndarray        # times (in samples) of all feet, flat, and their rows
    row: np.ndarray
    fs: float

    def __post_init__(self):
        self.area = np.zeros_like(self.abp)     # integral of the linear interpolation
        np.cumsum(0.5 * (self.abp[:, 1:] + self.abp[:, :-1]), axis=1, out=self.area[:, 1:])

    def at(self, row, time):
        """Pressure at the times (in samples) of the rows, between samples by straight lines."""
        low = np.clip(time.astype(int), 0, self.abp.shape[1] - 2)
        p0, p1 = self.abp[row, low], self.abp[row, low + 1]
        return p0 + (time - low) * (p1 - p0)

    def integral(self, row, time):
        low = np.clip(time.astype(int), 0, self.abp.shape[1] - 2)
        part = time - low
        p0, p1 = self.abp[row, low], self.abp[row, low + 1]
        return self.area[row, low] + part * (p0 + 0.5 * part * (p1 - p0))

    def mean(self, row, begin, end):
        return (self.integral(row, end) - self.integral(row, begin)) / (end - begin)


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
    return _in_blocks(lambda block: _label_block(block, fs, beats, METHODS[method]), abp)


def _label_block(abp, fs, beats_kind, method):
    abp, missing = _fill_missing(np.asarray(abp, dtype=np.float64))
    n, samples = abp.shape
    flat = _flat_samples(abp, fs) & ~missing       # a bridged gap is missing, not flat
    clipped = _clipped_samples(abp, fs)
    bad = missing | flat | clipped
    wave = Wave(abp, bad, *find_feet(abp, fs), fs)
    boundary, row = wave.foot, wave.row
    if beats_kind == "peak":
        boundary, row = _peaks_between(abp, boundary, row, fs)
    beats = _measure_beats(wave, boundary, row)

    sbp_all = _segment_median(beats.max, beats.segment, n)
    flushed = abp > (sbp_all + FLUSH_MMHG)[:, None]   # compares False where there are no beats
    beats = beats.select(beats.max <= (sbp_all + FLUSH_MMHG)[beats.segment])
    wave.bad = bad | flushed

    count = np.bincount(beats.segment, minlength=n)
    valid_s = np.bincount(beats.segment, beats.interval_s, n)
    with np.errstate(invalid="ignore", divide="ignore"):
        out = {"map": np.bincount(beats.segment, beats.map * beats.interval_s, n) / valid_s,
               "sbp": _segment_median(beats.max, beats.segment, n),
               "dbp": _segment_median(beats.min, beats.segment, n),
               "hr": 60.0 / _segment_median(beats.interval_s, beats.segment, n)}
    out["pp"] = out["sbp"] - out["dbp"]
    out.update(method(beats, n, wave))
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
        "abp_saturated": _is_saturated(abp, CLIP_MMHG, fs),
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


def reason_names(mask):
    """The names of the reasons in one segment's `reason`."""
    return [name for bit, name in enumerate(REASONS) if int(mask) >> bit & 1]


def _in_blocks(work, *signals):
    """What `work` gives for blocks of rows of the signals [N, samples], joined: {name: (N,)}."""
    rows = max(1, BLOCK_SAMPLES // max(1, signals[0].shape[1]))
    blocks = [work(*(signal[i:i + rows] for signal in signals))
              for i in range(0, max(1, len(signals[0])), rows)]
    return {name: np.concatenate([block[name] for block in blocks]) for name in blocks[0]}


# ------------------------------------------------------------------------------------ the methods

def published(beats, n, wave=None):
    """The published regression: MAP of each beat on its PP * HR; the intercept is Pcrit."""
    beats = beats.select(_within_percentiles(beats.flow, beats.segment, n))
    return _fit_plane([beats.flow], beats.map, beats.segment, n)


def beat_balance(beats, n, wave=None):
    """MAP on PP * HR and on what the arteries store. Over a beat, inflow = outflow + storage:
    SV = (MAP - Pcrit) T / R + C dP, so that MAP = Pcrit + R SV / T - RC dP / T."""
    beats = beats.select(_within_percentiles(beats.flow, beats.segment, n))
    return _fit_plane([beats.flow, beats.stored * 60.0 / beats.interval_s], beats.map,
                      beats.segment, n)


def diastolic(beats, n, wave):
    """No flow enters in diastole: dP/dt = -(P - Pcrit) / RC. Over the late diastole of each beat,
    dP = -(integral of P - Pcrit dt) / RC: least squares over all beats of the segment."""
    segment, mean, slope, length_s = _diastoles(wave, wave.foot, wave.row)[:4]
    x = np.stack([mean * length_s, length_s], 1)        # the integral, and the time
    y = slope * length_s
    count = np.bincount(segment, minlength=n)
    with np.errstate(invalid="ignore", divide="ignore"):
        sxx = _sum(x[:, :, None] * x[:, None, :], segment, n)
        fine = (count > 3) & (np.linalg.det(sxx) > 1e-9 * sxx[:, 0, 0] * sxx[:, 1, 1])
        inverse = np.linalg.inv(np.where(fine[:, None, None], sxx, np.eye(2)))
        inverse[~fine] = np.nan
        fit = np.einsum("ijk,ik->ij", inverse, _sum(x * y[:, None], segment, n))
        p_crit = -fit[:, 1] / fit[:, 0]
        residual = np.bincount(segment, (y - (x * fit[segment]).sum(1)) ** 2, n)
        reach = np.stack([-p_crit, -np.ones(n)], 1) / fit[:, :1]     # d p_crit / d fit
        variance = residual / (count - 2) * np.einsum("ij,ijk,ik->i", reach, inverse, reach)
        y_mean = np.bincount(segment, y, n) / count
        return {"p_crit": np.where(fit[:, 0] < 0, p_crit, np.nan),   # pressure falls, or no fit
                "p_crit_se": np.sqrt(variance),
                "r2": 1.0 - residual / np.bincount(segment, (y - y_mean[segment]) ** 2, n),
                "fit_rmse": np.sqrt(residual / count),
                "n_beats": count}


def waveform_balance(beats, n, wave, with_diastoles=True):
    """The beat balance on averages of the waveform, with what spoils a regression allowed for.

    Per beat, with H the mean of SYSTOLE_SECONDS above the level F before the foot:
        MAP = Pcrit + k H / T - tau dF / T + breath
    - Beats are timed by the shift of the whole upstroke, levels are means: noise counts less.
    - What noise is left in H and dF flattens the slopes and lifts Pcrit. Its variance is seen in
      late diastole, so it is taken out of the normal equations (errors in variables: Fuller,
      Measurement Error Models, 1987).
    - `breath`: the chest adds its own pressure swing to all pressures, which is no flow; a wave at
      the breathing rate with an amplitude about BREATH_MMHG (ridge).
    - tau = RC lies about TAU_S (ridge).
    - In an arrhythmic minute, the late diastoles join the fit: no inflow, so that over each,
      mean P = Pcrit - tau dP / dt, with the same Pcrit and tau. (With a regular rhythm they hardly
      differ from one another, and say more about reflected waves than about Pcrit.)
    """
    fs, samples = wave.fs, wave.abp.shape[1]
    foot = _align_upstrokes(wave)
    row = wave.row
    last = np.flatnonzero((row[1:] == row[:-1]) & (np.diff(foot) > 0))
    segment, begin, end = row[last], foot[last], foot[last + 1]
    interval_s = (end - begin) / fs
    level = LEVEL_SECONDS * fs
    a, b = (begin + second * fs for second in SYSTOLE_SECONDS)
    fine = ((interval_s >= MIN_BEAT_SECONDS) & (interval_s <= MAX_BEAT_SECONDS)
            & (begin >= level) & (end <= samples - 1) & (b <= samples - 1)
            & _is_clean(wave.bad, segment, begin - level, end))
    segment, begin, end, interval_s, a, b = (
        value[fine] for value in (segment, begin, end, interval_s, a, b))
    before, after = (wave.mean(segment, at - level, at) for at in (begin, end))
    per_s = 1.0 / interval_s
    height = wave.mean(segment, a, b) - before
    kept = _within_percentiles(height * per_s, segment, n)
    irregular = with_diastoles & (_irregularity(interval_s, segment, n) > ARRHYTHMIC)
    noise = _noise_variance(wave, begin, segment, n)

    # rows of the fit: whole beats (unknowns Pcrit, k, tau, two of the breath), then diastoles
    time_s = 0.5 * (begin + end) / fs
    hz = _breathing_hz(time_s[kept], height[kept], segment[kept], n)

    def design(seg, time, flow, change):
        phase = 2 * np.pi * hz[seg] * time
        return np.stack([np.ones(len(seg)), flow, -change, np.sin(phase), np.cos(phase)], 1)

    of = segment[kept]
    x = design(of, time_s[kept], (height * per_s)[kept], ((after - before) * per_s)[kept])
    y = wave.mean(segment, begin, end)[kept]
    late, mean, slope, length_s, middle_s = _diastoles(wave, foot, row)
    joins = irregular[late]
    late, mean, slope, length_s, middle_s = (
        value[joins] for value in (late, mean, slope, length_s, middle_s))
    x_late = design(late, middle_s, np.zeros(len(late)), slope)

    # sums, and what noise adds to them on average: means over windows of white noise
    xx, xy = (_sum(x[:, :, None] * x[:, None, :], of, n), _sum(x * y[:, None], of, n))
    xx_late = _sum(x_late[:, :, None] * x_late[:, None, :], late, n)
    xy_late = _sum(x_late * mean[:, None], late, n)
    systole = (SYSTOLE_SECONDS[1] - SYSTOLE_SECONDS[0]) * fs
    noise_xx, noise_xy, noise_late = np.zeros((n, 5, 5)), np.zeros((n, 5)), np.zeros((n, 5, 5))
    squares = noise * np.bincount(of, per_s[kept] ** 2, n)
    noise_xx[:, 1:3, 1:3] = squares[:, None, None] * np.array(
        [[1 / systole + 1 / level, -1 / level], [-1 / level, 2 / level]])
    noise_xy[:, 1:3] = (squares / fs)[:, None] * np.array([1.0, -1.0])
    noise_late[:, 2, 2] = noise * np.bincount(late, 2 / (END_SECONDS * fs) / length_s ** 2, n)

    tau, tau_sd = TAU_S
    prior = np.diag([0, 0, tau_sd ** -2, BREATH_MMHG ** -2, BREATH_MMHG ** -2])
    pull = prior @ np.array([0, 0, tau, 0, 0])
    count, count_late = np.bincount(of, minlength=n), np.bincount(late, minlength=n)
    enough = count >= MIN_BEATS
    with np.errstate(invalid="ignore", divide="ignore"):
        y_mean = np.bincount(of, y, n) / count
        syy = np.bincount(of, (y - y_mean[of]) ** 2, n)
        weight, weight_late = 5 * count / syy, np.where(count_late >= MIN_BEATS, 5 * count / syy, 0)
        enough &= np.isfinite(weight) & np.isfinite(noise) & (
            np.abs(np.linalg.det(xx[:, :2, :2])) > 1e-12 * count * xx[:, 1, 1])
        xx[~enough] = np.eye(5)
        for values in (noise_xx, noise_xy, xx_late, noise_late):
            values[~enough] = 0.0
        weight, weight_late = np.where(enough, weight, 1.0), np.where(enough, weight_late, 0.0)
        for _ in range(5):                      # weights of beats and diastoles by their residuals
            w, w_late = weight[:, None], weight_late[:, None]
            exact = w[:, None] * xx + w_late[:, None] * xx_late + prior
            noisy = w[:, None] * noise_xx + w_late[:, None] * noise_late
            correct = np.minimum(1.0, MAX_NOISE_SHARE / _noise_share(exact, noisy))[:, None]
            inverse = np.linalg.inv(exact - correct[:, None] * noisy)
            fit = np.einsum("ijk,ik->ij", inverse,
                            w * (xy - correct * noise_xy) + w_late * xy_late + pull)
            rest = y - (x * fit[of]).sum(1)
            residual = np.bincount(of, rest ** 2, n) + 1e-6 * count     # an exact fit is no wonder
            rest_late = mean - (x_late * fit[late]).sum(1)
            weight = np.where(enough, (count - 5) / residual, 1.0)
            residual_late = np.bincount(late, rest_late ** 2, n) + 1e-6 * count_late
            weight_late = np.where(weight_late > 0, count_late / residual_late, 0.0)
        # what noise did to the sums is part of their variance, and so are residuals that follow
        # one another (an effective number of beats)
        follows = np.flatnonzero(of[1:] == of[:-1])
        serial = np.bincount(of[follows], (rest[1:] * rest[:-1])[follows], n) / residual
        serial = np.clip(serial, 0.0, MAX_SERIAL)
        spread = (((1 + serial) / (1 - serial) * weight)[:, None, None] * xx
                  + weight_late[:, None, None] * xx_late + prior)
        variance = np.einsum("ij,ijk,ik->i", inverse[:, 0], spread, inverse[:, 0])
        out = {"p_crit": fit[:, 0], "p_crit_se": np.sqrt(variance + MODEL_ERROR_MMHG ** 2),
               "r2": 1.0 - residual / syy, "fit_rmse": np.sqrt(residual / count)}
        return {**{name: np.where(enough, value, np.nan) for name, value in out.items()},
                "n_beats": count}


def bend_aware(beats, n, wave):
    """An attempt to allow for vessels that stiffen and open with pressure: not the recommendation.

    With C and R falling as exp(-P / c) and exp(-P / r), any fit made about a pressure P finds an
    intercept p that is too high by the same rule, 1 / (P - p) = 1 / (P - Pcrit) + 1 / c + 1 / r.
    The whole beats (about MAP) and the late diastoles (lower) give two such p, for two unknowns:
    Pcrit and the bend b = 1 / c + 1 / r. The result is the mean of Pcrit over their likelihood
    times a prior on b. Where the rhythm is regular a minute tells little about b, and the prior
    decides.
    """
    whole, late = waveform_balance(beats, n, wave, with_diastoles=False), diastolic(beats, n, wave)
    segment, mean = _diastoles(wave, wave.foot, wave.row)[:2]
    count = np.bincount(segment, minlength=n)
    p_crit, bend = BEND_P_CRIT_MMHG[:, None], BEND_PER_MMHG
    out = {name: whole[name].copy() for name in whole}
    with np.errstate(invalid="ignore", divide="ignore"):
        about = (np.bincount(beats.segment, beats.map, n) / np.bincount(beats.segment, minlength=n),
                 np.bincount(segment, mean, n) / count)
    for i in np.flatnonzero(np.isfinite(whole["p_crit"])):
        log = -0.5 * (bend / BEND_SD_PER_MMHG) ** 2
        for fit, level in zip((whole, late), about):
            if np.isfinite(fit["p_crit"][i]):
                above = np.maximum(level[i] - p_crit, 1.0)
                miss = level[i] - 1.0 / (1.0 / above + bend) - fit["p_crit"][i]
                log = log - 0.5 * (miss / np.hypot(fit["p_crit_se"][i], MODEL_ERROR_MMHG)) ** 2
        chance = np.exp(log - log.max())
        chance /= chance.sum()
        out["p_crit"][i] = (chance * p_crit).sum()
        out["p_crit_se"][i] = np.sqrt((chance * (p_crit - out["p_crit"][i]) ** 2).sum())
    return out


# name -> function(beats: Beats, n segments, wave: Wave) -> dict of (n,) arrays p_crit, p_crit_se,
# r2, fit_rmse, n_beats; the name is what a file's attribute `label_method` holds. The last three
# find their own boundaries in the beats: for them, `beats` is about MAP, SBP, DBP, PP and HR only.
METHODS = {"published": published, "beat_balance": beat_balance, "diastolic": diastolic,
           "waveform_balance": waveform_balance, "bend_aware": bend_aware}


def _diastoles(wave, foot, row):
    """The late diastoles between the feet (times in samples): their segment, mean pressure, slope
    in mmHg/s, length and middle in s. Levels at their ends are means over END_SECONDS."""
    fs, samples = wave.fs, wave.abp.shape[1]
    half = 0.5 * END_SECONDS * fs
    first = np.flatnonzero(row[1:] == row[:-1])
    segment = row[first]
    begin, end = foot[first] + DIASTOLE_SECONDS * fs, foot[first + 1] - half
    fine = ((end - begin >= MIN_DIASTOLE_SECONDS * fs) & (end + half <= samples - 1)
            & (foot[first] >= 0) & (end - begin <= MAX_BEAT_SECONDS * fs))
    segment, begin, end = segment[fine], begin[fine], end[fine]
    fine = _is_clean(wave.bad, segment, begin - half, end + half)
    segment, begin, end = segment[fine], begin[fine], end[fine]
    level = [wave.mean(segment, at - half, at + half) for at in (begin, end)]
    length_s = (end - begin) / fs
    return (segment, wave.mean(segment, begin, end), (level[1] - level[0]) / length_s, length_s,
            0.5 * (begin + end) / fs)


def _is_clean(bad, row, begin, end):
    """Which stretches of a row (times in samples) hold no bad sample."""
    before = np.zeros((len(bad), bad.shape[1] + 1), dtype=np.int32)
    np.cumsum(bad, axis=1, out=before[:, 1:])
    first = np.clip(begin.astype(int), 0, bad.shape[1])
    last = np.clip(end.astype(int) + 1, 0, bad.shape[1])
    return before[row, last] == before[row, first]


def _align_upstrokes(wave):
    """The feet, timed by the shift at which each upstroke fits the segment's mean upstroke: the
    noise of some 20 samples averaged, where a foot alone has that of two."""
    fs, samples = wave.fs, wave.abp.shape[1]
    foot, row = wave.foot.copy(), wave.row
    n = len(wave.abp)
    around = np.arange(int(ALIGN_SECONDS[0] * fs), int(ALIGN_SECONDS[1] * fs) + 1)
    for _ in range(3):
        time = foot[:, None] + around
        fine = ((time[:, 0] >= 0) & (time[:, -1] <= samples - 1)
                & _is_clean(wave.bad, row, time[:, 0], time[:, -1]))
        pressure = wave.at(row[fine][:, None], time[fine])
        count = np.maximum(np.bincount(row[fine], minlength=n), 1)
        mean = _sum(pressure, row[fine], n) / count[:, None]
        basis = np.stack([np.ones_like(mean), mean, np.gradient(mean, axis=1)], 1)
        gram = np.einsum("ijk,ilk->ijl", basis, basis)
        gram += 1e-9 * np.eye(3) * (1.0 + np.einsum("ijj->i", gram))[:, None, None]
        solve = np.einsum("ijk,ikl->ijl", np.linalg.inv(gram), basis)
        level, height, shift = np.einsum("ijk,ik->ji", solve[row[fine]], pressure)
        moved = -shift / np.where(np.abs(height) > 0.2, height, 1.0)
        foot[fine] += np.clip(moved, -0.05 * fs, 0.05 * fs)
    # the mean upstroke's own time is that of the feet
    return foot + _segment_median(wave.foot - foot, row, n)[row] if len(foot) else foot


def _noise_variance(wave, begin, segment, n):
    """(n,) variance of white noise in mmHg^2: what a parabola leaves of the NOISE_SECONDS before
    the foot, where pressure falls smoothly; the median over the beats."""
    length = max(6, int(NOISE_SECONDS * wave.fs))
    fine = begin >= length
    begin, segment = begin[fine].astype(int), segment[fine]
    values = wave.abp[segment[:, None], begin[:, None] + np.arange(-length, 0)]
    t = np.linspace(-1, 1, length)
    smooth, _ = np.linalg.qr(np.stack([np.ones(length), t, t * t], 1))
    rest = values - values @ smooth @ smooth.T
    # the median of chi-square over its degrees of freedom is below 1 (Wilson and Hilferty)
    free = length - 3
    return _segment_median((rest ** 2).sum(1) / free, segment, n) / (1 - 2 / (9 * free)) ** 3


def _breathing_hz(time_s, height, segment, n):
    """(n,) frequency at which the height of the beats swings most (a tapered periodogram)."""
    hz = np.linspace(*BREATH_HZ, 100)
    count = np.maximum(np.bincount(segment, minlength=n), 1)
    mean_t = np.bincount(segment, time_s, n) / count
    mean_h = np.bincount(segment, height, n) / count
    t, h = time_s - mean_t[segment], height - mean_h[segment]
    with np.errstate(invalid="ignore", divide="ignore"):
        trend = np.bincount(segment, t * h, n) / np.bincount(segment, t * t, n)
    span = np.zeros(n)
    np.maximum.at(span, segment, np.abs(t))
    with np.errstate(invalid="ignore", divide="ignore"):
        taper = 0.5 + 0.5 * np.cos(np.pi * t / span[segment])
        wave = np.exp(-2j * np.pi * t[:, None] * hz) * (taper * (h - trend[segment] * t))[:, None]
    real, imaginary = _sum(wave.real, segment, n), _sum(wave.imag, segment, n)
    return hz[(real ** 2 + imaginary ** 2).argmax(1)]


def _noise_share(xx, noise_xx):
    """(n,) largest share of noise in any mixture of the two noisy columns, the others' part taken
    out: near 1, nothing would be left to fit once the noise is subtracted."""
    noisy, exact = [1, 2], [0, 3, 4]            # of the five columns
    cross = xx[:, noisy][:, :, exact]
    left = xx[:, noisy][:, :, noisy] - cross @ np.linalg.inv(
        xx[:, exact][:, :, exact]) @ cross.transpose(0, 2, 1)
    noise = noise_xx[:, noisy][:, :, noisy]
    # the larger eigenvalue of left^-1 noise, both 2 x 2
    size = left[:, 0, 0] * left[:, 1, 1] - left[:, 0, 1] ** 2
    with np.errstate(invalid="ignore", divide="ignore"):
        half = 0.5 * (left[:, 1, 1] * noise[:, 0, 0] + left[:, 0, 0] * noise[:, 1, 1]
                      - 2 * left[:, 0, 1] * noise[:, 0, 1]) / size
        product = (noise[:, 0, 0] * noise[:, 1, 1] - noise[:, 0, 1] ** 2) / size
        share = half + np.sqrt(np.maximum(half ** 2 - product, 0.0))
    return np.where(size > 0, share, np.inf)


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


def _fit_plane(columns, y, segment, n):
    """Ordinary least squares of y on the columns within each segment, from centred sums; the value
    where all columns are 0 is Pcrit."""
    count = np.bincount(segment, minlength=n)
    x = np.stack(columns, 1)
    k = x.shape[1]
    with np.errstate(invalid="ignore", divide="ignore"):
        x_mean = _sum(x, segment, n) / count[:, None]
        y_mean = np.bincount(segment, y, n) / count
        dx, dy = x - x_mean[segment], y - y_mean[segment]
        sxx = _sum(dx[:, :, None] * dx[:, None, :], segment, n)
        syy = np.bincount(segment, dy * dy, n)
        # a column constant to rounding, or no degree of freedom left: no plane
        size = np.einsum("ijj->ij", sxx)
        fine = (count > k + 1) & (size[:, 0] > 1e-12 * count * x_mean[:, 0] ** 2)
        fine &= np.linalg.det(sxx) > 1e-12 * size.prod(1)
        inverse = np.linalg.inv(np.where(fine[:, None, None], sxx, np.eye(k)))
        inverse[~fine] = np.nan
        slope = np.einsum("ijk,ik->ij", inverse, _sum(dx * dy[:, None], segment, n))
        residual = np.bincount(segment, (dy - (slope[segment] * dx).sum(1)) ** 2, n)
        variance = residual / (count - k - 1)
        reach = np.einsum("ij,ijk,ik->i", x_mean, inverse, x_mean)
        return {"p_crit": y_mean - (slope * x_mean).sum(1),
                "p_crit_se": np.sqrt(variance * (1.0 / count + reach)),
                "r2": 1.0 - residual / syy,
                "fit_rmse": np.sqrt(residual / count),
                "n_beats": count}


def _sum(values, segment, n):
    """(n, ...) sums of the values (beats, ...) of each segment; `segment` ascends."""
    out = np.zeros((n,) + values.shape[1:])
    if len(values):
        present, first = np.unique(segment, return_index=True)
        out[present] = np.add.reduceat(values, first, axis=0)
    return out


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
    from scipy.ndimage import gaussian_filter1d  # here: a script's --help does without
    from scipy.signal import find_peaks
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


def _measure_beats(wave, boundary, row):
    """The valid beats between successive boundaries (time in samples) of each row."""
    abp, fs = wave.abp, wave.fs
    samples = abp.shape[1]
    start, end, begins = _beat_samples(boundary, row, samples)
    segment = row[begins]
    if not len(begins):
        return Beats(segment, *(np.zeros(0) for _ in range(5)))
    ends = np.stack([start, end], 1).ravel()
    # `end` may be one past the last sample, where reduceat takes no index: it gets one more
    pressure = np.append(abp.ravel(), 0.0)
    top = np.maximum.reduceat(pressure, ends)[::2]
    bottom = np.minimum.reduceat(pressure, ends)[::2]
    bad_before = np.concatenate([[0], np.cumsum(wave.bad.ravel())])
    clean = bad_before[end] == bad_before[start]
    first, last = boundary[begins], boundary[begins + 1]
    half = LEVEL_SECONDS / 2 * fs               # the level at a boundary: noise averaged out
    level = [wave.mean(segment, np.maximum(at - half, 0.0), np.minimum(at + half, samples - 1.0))
             for at in (first, last)]
    interval_s = (last - first) / fs
    valid = clean & (interval_s >= MIN_BEAT_SECONDS) & (interval_s <= MAX_BEAT_SECONDS)
    return Beats(segment, interval_s, wave.mean(segment, first, last), top, bottom,
                 level[1] - level[0]).select(valid)


# ----------------------------------------------------------------------------------- signal quality

ANY_FINITE = (-np.finfo(float).max, np.finfo(float).max)


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


# --------------------------------------------------------------------------- quality of the pair

PPG_FLAT_SECONDS = 1.0    # longer than diastole's flat end in a slow pulse
PPG_FLAT_SHARE = 1e-4     # of the segment's range, per sample at 60 Hz
PPG_CLIP_SHARE = 1e-3     # of the range: what counts as on the highest or lowest value
SATURATED_SECONDS = 0.5   # beats that are clipped stay at the end of the scale for less
PPG_PULSE_HZ = (0.5, 8.0)  # from 30 beats/min to the third harmonic of 160/min
# Least share of the pulse band in the power from 0.5 Hz on (white noise: 0.25) and in all of it but
# the mean (a random walk: 0.01-0.1): relative power as a quality index, Elgendi, Bioengineering
# 2016. All of 893 real minutes, most of them in atrial fibrillation, have more than 0.97 and 0.15.
MIN_PULSE_SHARE_FAST = 0.8
MIN_PULSE_SHARE = 0.1
# Rates agree within 10 % or 5 beats/min, whichever is more: heart rate meters (AAMI EC13).
RATE_TOLERANCE_SHARE, RATE_TOLERANCE_BPM = 0.10, 5.0
ARRHYTHMIC = 0.1          # RMSSD / mean interval, as for fibrillation in Dash, Ann Biomed Eng 2009
PULSE_DEFICIT = 0.5       # in an arrhythmic minute weak beats, up to this share, miss the finger
PPG_HEIGHT_MMHG = 60.0    # the PPG's pulse is scaled to it, so that the same detector finds beats
TEMPLATE_SAMPLES = 40     # of a PPG beat, from foot to foot
# The continuous measures of `signal_quality`. They refuse nothing by themselves: the gate's named
# rules `regular_rhythm`, `not_damped` and `ppg_quality_gt_86` (datasets.RULES) use them.
QUALITY_FIELDS = ("beat_irregularity", "upstroke_s", "ppg_hr", "ppg_quality", "ppg_skewness")


def signal_quality(abp, ppg, fs):
    """Quality of the pairs `abp` (mmHg) and `ppg` (any unit), both [N, samples] at `fs` Hz.

    Returns a dict of (N,) arrays: `reason` (uint32), those of the PPG and of the pair (the ABP's
    own are in `label_segments`'), and float32 measures, NaN where there are too few beats:
    `beat_irregularity`: RMSSD / mean of the ABP's beat intervals; arrhythmic above ARRHYTHMIC.
    `upstroke_s`: pulse pressure over steepest rise, median of the beats, over the square root of
        the interval in s (Bazett's correction): the dynamic response that is left to the line.
        Simulated lines that are damped have 0.13-0.20 s, others 0.09-0.16, real ones 0.05-0.13.
    `ppg_hr`: 60 / median interval of the PPG's beats, beats/min.
    `ppg_quality`: mean correlation of the PPG's beats with their mean beat; 0.86 and more is good
        (template matching: Orphanidou et al., IEEE J Biomed Health Inform 2015).
    `ppg_skewness`: of the PPG, the best single index in Elgendi, Bioengineering 2016.
    """
    abp, ppg = np.atleast_2d(np.asarray(abp)), np.atleast_2d(np.asarray(ppg))
    if abp.ndim != 2 or abp.shape != ppg.shape:
        raise ValueError(f"abp and ppg must both be [segments, samples], not {abp.shape} and "
                         f"{ppg.shape}")
    return _in_blocks(lambda *blocks: _quality_block(*blocks, fs), abp, ppg)


def _quality_block(abp, ppg, fs):
    n = len(abp)
    reason = _ppg_block(ppg, fs)
    abp, abp_missing = _fill_missing(np.asarray(abp, dtype=np.float64))
    ppg, ppg_missing = _fill_missing(np.asarray(ppg, dtype=np.float64), ANY_FINITE)
    out = {}
    hr, out["beat_irregularity"], out["upstroke_s"] = _rhythm(abp, abp_missing, fs)[:3]
    scaled = ppg_as_pressure(ppg)
    out["ppg_hr"], _, _, foot, row = _rhythm(scaled, ppg_missing, fs)
    out["ppg_quality"] = _template_match(scaled, foot, row)
    deviation = scaled - scaled.mean(1, keepdims=True)
    with np.errstate(invalid="ignore", divide="ignore"):
        out["ppg_skewness"] = (deviation ** 3).mean(1) / (deviation ** 2).mean(1) ** 1.5
    tolerance = np.maximum(RATE_TOLERANCE_SHARE * hr, RATE_TOLERANCE_BPM)
    with np.errstate(invalid="ignore"):
        missed = np.where(out["beat_irregularity"] > ARRHYTHMIC, PULSE_DEFICIT * hr, tolerance)
    mismatch = np.isfinite(hr) & ~((out["ppg_hr"] <= hr + tolerance)
                                   & (out["ppg_hr"] >= hr - missed))
    out = {name: out[name].astype(np.float32) for name in QUALITY_FIELDS}
    return {"reason": reason | reason_mask(n, {"rate_mismatch": mismatch}), **out}


def ppg_as_pressure(ppg):
    """The finite `ppg` [N, samples] on a scale on which `find_feet` finds its beats."""
    low, high = np.percentile(ppg, [5, 95], axis=1, keepdims=True)
    return (ppg - low) * (PPG_HEIGHT_MMHG / np.where(high > low, high - low, np.inf))


def _rhythm(signal, missing, fs):
    """(rate in beats/min, RMSSD / mean interval, corrected upstroke in s), each (N,), and the
    beats' feet and rows, of a signal [N, samples] in mmHg or scaled to it."""
    n, samples = signal.shape
    foot, row = find_feet(signal, fs)
    beats = _measure_beats(Wave(signal, missing, foot, row, fs), foot, row)
    interval, segment = beats.interval_s, beats.segment
    irregularity = _irregularity(interval, segment, n)
    rate = 60.0 / _segment_median(interval, segment, n)
    start, end, kept = _beat_samples(foot, row, samples)
    upstroke = np.full(n, np.nan)
    if len(kept):
        ends = np.stack([start, end], 1).ravel()
        flat = np.append(signal.ravel(), 0.0)
        height = np.maximum.reduceat(flat, ends)[::2] - np.minimum.reduceat(flat, ends)[::2]
        rise = np.maximum.reduceat(np.append(np.diff(signal.ravel()), [0.0, 0.0]), ends)[::2] * fs
        some = rise > 0
        upstroke = _segment_median(height[some] / rise[some], row[kept][some], n)
        upstroke *= np.sqrt(rate / 60.0)
    few = np.bincount(segment, minlength=n) < MIN_BEATS
    rate, irregularity, upstroke = (np.where(few, np.nan, x) for x in
                                    (rate, irregularity, upstroke))
    return rate, irregularity, upstroke, foot, row


def _irregularity(interval, segment, n):
    """(n,) RMSSD / mean of the intervals of each segment's beats."""
    follows = np.flatnonzero(segment[1:] == segment[:-1])
    change = np.bincount(segment[follows], np.diff(interval)[follows] ** 2, n)
    with np.errstate(invalid="ignore", divide="ignore"):
        mean = np.bincount(segment, interval, n) / np.bincount(segment, minlength=n)
        return np.sqrt(change / np.bincount(segment[follows], minlength=n)) / mean


def _template_match(signal, foot, row):
    """(N,) mean correlation of a segment's beats, stretched to one length, with their mean."""
    n, samples = signal.shape
    begins = np.flatnonzero(row[1:] == row[:-1])
    segment = row[begins]
    time = foot[begins, None] + np.linspace(0, 1, TEMPLATE_SAMPLES) * np.diff(foot)[begins, None]
    low = np.minimum(time.astype(int), samples - 2)
    value = signal[segment[:, None], low]
    beat = value + (time - low) * (signal[segment[:, None], low + 1] - value)
    beat -= beat.mean(1, keepdims=True)
    norm = np.linalg.norm(beat, axis=1, keepdims=True)
    beat /= np.where(norm > 0, norm, 1.0)
    count = np.bincount(segment, minlength=n)
    template = _sum(beat, segment, n)
    with np.errstate(invalid="ignore", divide="ignore"):
        template /= np.linalg.norm(template, axis=1, keepdims=True)
        match = np.bincount(segment, (beat * template[segment]).sum(1), n) / count
    return np.where(count < MIN_BEATS, np.nan, match)


def ppg_reasons(ppg, fs):
    """(N,) uint32 reasons of `ppg` [N, samples] (or [samples]) alone, in any unit at `fs` Hz."""
    ppg = np.atleast_2d(np.asarray(ppg))
    if ppg.ndim != 2:
        raise ValueError(f"ppg must be [segments, samples], not {ppg.shape}")
    return _in_blocks(lambda block: {"reason": _ppg_block(block, fs)}, ppg)["reason"]


def _ppg_block(ppg, fs):
    ppg = np.asarray(ppg, dtype=np.float64)
    missing = ~np.isfinite(ppg)
    if missing.any():
        ppg, _ = _fill_missing(ppg, ANY_FINITE)
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
        "ppg_saturated": _is_saturated(ppg, PPG_CLIP_SHARE * span, fs),
    })


def _is_saturated(signal, within, fs):
    """(N,) where too much of the segment is stuck within so much of its highest or lowest value."""
    edge = (signal >= signal.max(1, keepdims=True) - within) \
        | (signal <= signal.min(1, keepdims=True) + within)
    out = edge.mean(1) > MAX_BAD_SHARE          # few segments are left to look at closely
    edge = edge[out]
    stuck = _runs(edge[:, 1:] & edge[:, :-1], int(SATURATED_SECONDS * fs))
    out[out] = stuck.mean(1) > MAX_BAD_SHARE
    return out


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
