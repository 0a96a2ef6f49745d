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
DICROTIC_SECONDS, DICROTIC_RISE_SHARE = 0.45, 0.6
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
    """A block of segments [N, samples]. Places in it are rows and times (in samples), flat arrays;
    `foot` and `row` are those of the feet of its beats."""
    abp: np.ndarray         # mmHg, finite
    bad: np.ndarray         # [N, samples] mask of what must be in no beat
    fs: float

    def __post_init__(self):
        self.foot, self.row = find_feet(self.abp, self.fs)
        self.area = np.zeros_like(self.abp)     # integral of the linear interpolation
        np.cumsum(0.5 * (self.abp[:, 1:] + self.abp[:, :-1]), axis=1, out=self.area[:, 1:])

    def at(self, row, time):
        """Pressure at the times of the rows, between samples by straight lines."""
        low = np.clip(time.astype(int), 0, self.abp.shape[1] - 2)
        p0, p1 = self.abp[row, low], self.abp[row, low + 1]
        return p0 + (time - low) * (p1 - p0)

    def integral(self, row, time):
        """Of the pressure, from the row's first sample to the times, in mmHg times samples."""
        low = np.clip(time.astype(int), 0, self.abp.shape[1] - 2)
        part = time - low
        p0, p1 = self.abp[row, low], self.abp[row, low + 1]
        return self.area[row, low] + part * (p0 + 0.5 * part * (p1 - p0))

    def mean(self, row, begin, end):
        return (self.integral(row, end) - self.integral(row, begin)) / (end - begin)

    def is_clean(self, row, begin, end):
        """Which stretches, from begin to end, hold no bad sample."""
        before = np.zeros((len(self.bad), self.bad.shape[1] + 1), dtype=np.int32)
        np.cumsum(self.bad, axis=1, out=before[:, 1:])
        first = np.clip(begin.astype(int), 0, self.bad.shape[1])
        last = np.clip(end.astype(int) + 1, 0, self.bad.shape[1])
        return before[row, last] == before[row, first]


def label_segments(abp, fs, beats="foot", method="published"):
    """Labels of the segments `abp` [N, samples] (or one of them, [samples]) in mmHg at `fs` Hz.

    Returns a dict of (N,) arrays: the FIELDS (mmHg; `hr` in beats/min; float32; NaN where the
    segment is refused), `n_beats` (int32, those that the fit used) and `reason` (uint32).
    """
    if not fs >= MIN_FS_HZ:
        raise ValueError(f"the ABP must be sampled at {MIN_FS_HZ} Hz or more, not at {fs}")
    if beats not in ("foot", "peak"):
        raise ValueError(f"beats must be 'foot' or 'peak', not {beats!r}")
    if method not in METHODS:
        raise ValueError(f'method must be one of {", ".join(METHODS)}, not {method!r}')
    return _in_blocks(lambda block: _label_block(block, fs, beats, METHODS[method]), abp=abp)


def _label_block(abp, fs, beats_kind, method):
    abp, missing = _fill_missing(abp, *ABP_RANGE_MMHG)
    n, samples = abp.shape
    flat = _runs(np.abs(np.diff(abp, axis=1)) < FLAT_MMHG_PER_S / fs, FLAT_SECONDS, fs)
    flat &= ~missing                            # a bridged gap is missing, not flat
    near_top = abp >= abp.max(1, keepdims=True) - CLIP_MMHG
    clipped = _runs(near_top[:, 1:] & near_top[:, :-1], CLIP_SECONDS, fs)
    wave = Wave(abp, missing | flat | clipped, fs)
    boundaries = (wave.foot, wave.row) if beats_kind == "foot" else _peaks(wave)
    beats = _measure_beats(wave, *boundaries)

    flush_mmhg = _quantile(beats.max, beats.segment, n) + FLUSH_MMHG
    flushed = abp > flush_mmhg[:, None]         # compares False where there are no beats
    wave.bad |= flushed
    beats = beats.select(beats.max <= flush_mmhg[beats.segment])

    count = np.bincount(beats.segment, minlength=n)
    valid_s = np.bincount(beats.segment, beats.interval_s, n)
    out = {"map": np.bincount(beats.segment, beats.map * beats.interval_s, n) / valid_s,
           "sbp": _quantile(beats.max, beats.segment, n),
           "dbp": _quantile(beats.min, beats.segment, n),
           "hr": 60.0 / _quantile(beats.interval_s, beats.segment, n)}
    out["pp"] = out["sbp"] - out["dbp"]
    out.update(method(beats, n, wave))
    out["tpp"] = out["map"] - out["p_crit"]

    pp_low, pp_high = PP_RANGE_MMHG
    few = (count < MIN_BEATS) | (valid_s < MIN_COVER * samples / fs)
    reason = reason_mask(n, {
        "abp_missing": _is_bad(missing),
        "abp_flat": _is_bad(flat),
        "abp_clipped": _is_bad(clipped),
        "abp_flush": _is_bad(flushed),
        "abp_range": ((out["sbp"] > SBP_MAX_MMHG) | (out["dbp"] < DBP_MIN_MMHG)
                      | (out["pp"] < pp_low) | (out["pp"] > pp_high)),
        "few_beats": few,
        "no_fit": ~few & ~np.isfinite(out["p_crit"]),
        "abp_saturated": _is_bad(_runs(_at_ends(abp, CLIP_MMHG), SATURATED_SECONDS, fs)),
    })
    labels = {name: np.where(reason == 0, out[name], np.nan).astype(np.float32) for name in FIELDS}
    return {**labels, "n_beats": out["n_beats"].astype(np.int32), "reason": reason}


def reason_mask(n, found):
    """(n,) uint32 from a dict of reason name -> (n,) booleans."""
    mask = np.zeros(n, dtype=np.uint32)
    for name, where in found.items():
        mask |= where.astype(np.uint32) << np.uint32(REASONS.index(name))
    return mask


def reason_names(mask):
    """The names of the reasons in one segment's `reason`."""
    return [name for bit, name in enumerate(REASONS) if int(mask) >> bit & 1]


def _in_blocks(work, **signals):
    """What `work` gives for blocks of rows of the signals [N, samples], joined: {name: (N,)}."""
    arrays = [np.atleast_2d(np.asarray(signal)) for signal in signals.values()]
    shapes = [array.shape for array in arrays]
    if len(set(shapes)) > 1 or len(shapes[0]) != 2:
        raise ValueError(f"{' and '.join(signals)} must be [segments, samples], not "
                         f"{' and '.join(map(str, shapes))}")
    n, samples = shapes[0]
    rows = max(1, BLOCK_SAMPLES // max(1, samples))
    with np.errstate(invalid="ignore", divide="ignore"):    # NaN: what a row without beats gives
        blocks = [work(*(array[i:i + rows] for array in arrays)) for i in range(0, max(1, n), rows)]
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
    segment, mean, slope, length_s, _ = _diastoles(wave, wave.foot, np.ones(n, dtype=bool))
    x = np.stack([mean * length_s, length_s], 1)        # the integral, and the time
    y = slope * length_s
    count = np.bincount(segment, minlength=n)
    fit, inverse, residual = _least_squares(x, y, segment, n, count > 3, collinear=1e-9)
    p_crit = -fit[:, 1] / fit[:, 0]
    reach = np.stack([-p_crit, -np.ones(n)], 1) / fit[:, :1]     # d p_crit / d fit
    variance = residual / (count - 2) * np.einsum("ij,ijk,ik->i", reach, inverse, reach)
    return {"p_crit": np.where(fit[:, 0] < 0, p_crit, np.nan),   # pressure falls, or no fit
            "p_crit_se": np.sqrt(variance),
            **_fit_quality(y, residual, segment, n), "n_beats": count}


def waveform_balance(beats, n, wave):
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
    first = _followed(wave.row)
    first = first[foot[first + 1] > foot[first]]
    segment, begin, end = wave.row[first], foot[first], foot[first + 1]
    interval_s = (end - begin) / fs
    level = LEVEL_SECONDS * fs
    a, b = (second * fs for second in SYSTOLE_SECONDS)
    fine = ((interval_s >= MIN_BEAT_SECONDS) & (interval_s <= MAX_BEAT_SECONDS)
            & (begin >= level) & (end <= samples - 1) & (begin + b <= samples - 1)
            & wave.is_clean(segment, begin - level, end))
    segment, begin, end, interval_s = (v[fine] for v in (segment, begin, end, interval_s))
    before, after = (wave.mean(segment, at - level, at) for at in (begin, end))
    height = wave.mean(segment, begin + a, begin + b) - before
    irregular = _irregularity(interval_s, segment, n) > ARRHYTHMIC
    noise = _noise_variance(wave, begin, segment, n)

    # rows of the fit: whole beats (unknowns Pcrit, k, tau, two of the breath), then diastoles
    per_s = 1.0 / interval_s
    kept = _within_percentiles(height * per_s, segment, n)
    of, begin, end, per_s, height, change = (v[kept] for v in (
        segment, begin, end, per_s, height, after - before))
    time_s = 0.5 * (begin + end) / fs
    hz = _breathing_hz(time_s, height, of, n)

    def design(seg, time, flow, change):
        phase = 2 * np.pi * hz[seg] * time
        return np.stack([np.ones(len(seg)), flow, -change, np.sin(phase), np.cos(phase)], 1)

    x, y = design(of, time_s, height * per_s, change * per_s), wave.mean(of, begin, end)
    late, mean, slope, length_s, middle_s = _diastoles(wave, foot, irregular)
    x_late = design(late, middle_s, np.zeros(len(late)), slope)

    # sums, and what noise adds to them on average: means over windows of white noise
    xx, xy = (_sum(x[:, :, None] * x[:, None, :], of, n), _sum(x * y[:, None], of, n))
    xx_late = _sum(x_late[:, :, None] * x_late[:, None, :], late, n)
    xy_late = _sum(x_late * mean[:, None], late, n)
    noise_xx, noise_xy, noise_late = np.zeros((n, 5, 5)), np.zeros((n, 5)), np.zeros((n, 5, 5))
    squares = noise * np.bincount(of, per_s ** 2, n)
    noise_xx[:, 1:3, 1:3] = squares[:, None, None] * np.array(
        [[1 / (b - a) + 1 / level, -1 / level], [-1 / level, 2 / level]])
    noise_xy[:, 1:3] = (squares / fs)[:, None] * np.array([1.0, -1.0])
    noise_late[:, 2, 2] = noise * np.bincount(late, 2 / (END_SECONDS * fs) / length_s ** 2, n)

    tau, tau_sd = TAU_S
    prior = np.diag([0, 0, tau_sd ** -2, BREATH_MMHG ** -2, BREATH_MMHG ** -2])
    pull = prior @ np.array([0, 0, tau, 0, 0])
    count, count_late = np.bincount(of, minlength=n), np.bincount(late, minlength=n)
    weight = 5 * count / np.bincount(of, (y - _mean(y, of, n)[of]) ** 2, n)
    enough = ((count >= MIN_BEATS) & np.isfinite(weight) & np.isfinite(noise)
              & (np.abs(np.linalg.det(xx[:, :2, :2])) > 1e-12 * count * xx[:, 1, 1]))
    xx[~enough] = np.eye(5)
    for values in (noise_xx, noise_xy, xx_late, noise_late):
        values[~enough] = 0.0
    weight = np.where(enough, weight, 1.0)
    weight_late = np.where(enough & (count_late >= MIN_BEATS), weight, 0.0)
    for _ in range(5):                      # weights of beats and diastoles by their residuals
        w, w_late = weight[:, None], weight_late[:, None]
        exact = w[:, None] * xx + w_late[:, None] * xx_late + prior
        noisy = w[:, None] * noise_xx + w_late[:, None] * noise_late
        correct = np.minimum(1.0, MAX_NOISE_SHARE / _noise_share(exact, noisy))[:, None]
        inverse = np.linalg.inv(exact - correct[:, None] * noisy)
        fit = np.einsum("ijk,ik->ij", inverse,
                        w * (xy - correct * noise_xy) + w_late * xy_late + pull)
        rest, rest_late = y - (x * fit[of]).sum(1), mean - (x_late * fit[late]).sum(1)
        residual = np.bincount(of, rest ** 2, n) + 1e-6 * count     # an exact fit is no wonder
        residual_late = np.bincount(late, rest_late ** 2, n) + 1e-6 * count_late
        weight = np.where(enough, (count - 5) / residual, 1.0)
        weight_late = np.where(weight_late > 0, count_late / residual_late, 0.0)
    # what noise did to the sums is part of their variance, and so are residuals that follow one
    # another (an effective number of beats)
    at = _followed(of)
    serial = np.clip(np.bincount(of[at], rest[at + 1] * rest[at], n) / residual, 0.0, MAX_SERIAL)
    spread = (((1 + serial) / (1 - serial) * weight)[:, None, None] * xx
              + weight_late[:, None, None] * xx_late + prior)
    variance = np.einsum("ij,ijk,ik->i", inverse[:, 0], spread, inverse[:, 0])
    out = {"p_crit": fit[:, 0], "p_crit_se": np.sqrt(variance + MODEL_ERROR_MMHG ** 2),
           **_fit_quality(y, residual, of, n)}
    return {**{name: np.where(enough, value, np.nan) for name, value in out.items()},
            "n_beats": count}


# name -> function(beats: Beats, n segments, wave: Wave) -> dict of (n,) arrays p_crit, p_crit_se,
# r2, fit_rmse, n_beats; the name is what a file's attribute `label_method` holds. The last two find
# their own boundaries in the beats: for them, `beats` is about MAP, SBP, DBP, PP and HR only.
METHODS = {"published": published, "beat_balance": beat_balance, "diastolic": diastolic,
           "waveform_balance": waveform_balance}


def _diastoles(wave, foot, wanted):
    """The late diastoles between the feet (times in samples) of the `wanted` (n,) segments: their
    segment, mean pressure, slope in mmHg/s, length and middle in s. Levels at their ends are means
    over END_SECONDS."""
    fs, samples = wave.fs, wave.abp.shape[1]
    half = 0.5 * END_SECONDS * fs
    first = _followed(wave.row)
    segment = wave.row[first]
    begin, end = foot[first] + DIASTOLE_SECONDS * fs, foot[first + 1] - half
    fine = (wanted[segment] & (end - begin >= MIN_DIASTOLE_SECONDS * fs)
            & (end - begin <= MAX_BEAT_SECONDS * fs) & (foot[first] >= 0)
            & (end + half <= samples - 1) & wave.is_clean(segment, begin - half, end + half))
    segment, begin, end = segment[fine], begin[fine], end[fine]
    level = [wave.mean(segment, at - half, at + half) for at in (begin, end)]
    length_s = (end - begin) / fs
    return (segment, wave.mean(segment, begin, end), (level[1] - level[0]) / length_s, length_s,
            0.5 * (begin + end) / fs)


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
                & wave.is_clean(row, time[:, 0], time[:, -1]))
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
    return foot + _quantile(wave.foot - foot, row, n)[row]


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
    return _quantile((rest ** 2).sum(1) / free, segment, n) / (1 - 2 / (9 * free)) ** 3


def _breathing_hz(time_s, height, segment, n):
    """(n,) frequency at which the height of the beats swings most (a tapered periodogram)."""
    hz = np.linspace(*BREATH_HZ, 100)
    t, h = (value - _mean(value, segment, n)[segment] for value in (time_s, height))
    trend = np.bincount(segment, t * h, n) / np.bincount(segment, t * t, n)
    span = np.zeros(n)
    np.maximum.at(span, segment, np.abs(t))
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
    half = 0.5 * (left[:, 1, 1] * noise[:, 0, 0] + left[:, 0, 0] * noise[:, 1, 1]
                  - 2 * left[:, 0, 1] * noise[:, 0, 1]) / size
    product = (noise[:, 0, 0] * noise[:, 1, 1] - noise[:, 0, 1] ** 2) / size
    return np.where(size > 0, half + np.sqrt(np.maximum(half ** 2 - product, 0.0)), np.inf)


def _within_percentiles(value, segment, n):
    """Which beats lie within their segment's 5th-95th percentile (below 5 beats: all)."""
    low, high = (_quantile(value, segment, n, share)[segment] for share in (0.05, 0.95))
    few = np.bincount(segment, minlength=n) < 5
    return ((value >= low) & (value <= high)) | few[segment]


def _fit_plane(columns, y, segment, n):
    """Ordinary least squares of y on the columns within each segment, from centred sums; the value
    where all columns are 0 is Pcrit."""
    count = np.bincount(segment, minlength=n)
    x = np.stack(columns, 1)
    k = x.shape[1]
    x_mean, y_mean = _sum(x, segment, n) / count[:, None], _mean(y, segment, n)
    dx, dy = x - x_mean[segment], y - y_mean[segment]
    # a column constant to rounding, or no degree of freedom left: no plane
    enough = (count > k + 1) & (_sum(dx ** 2, segment, n)[:, 0] > 1e-12 * count * x_mean[:, 0] ** 2)
    slope, inverse, residual = _least_squares(dx, dy, segment, n, enough, collinear=1e-12)
    variance = residual / (count - k - 1)
    reach = np.einsum("ij,ijk,ik->i", x_mean, inverse, x_mean)
    return {"p_crit": y_mean - (slope * x_mean).sum(1),
            "p_crit_se": np.sqrt(variance * (1.0 / count + reach)),
            **_fit_quality(y, residual, segment, n), "n_beats": count}


def _least_squares(x, y, segment, n, enough, collinear):
    """(fit [n, k], inverse of the normal equations [n, k, k], sum of squared residuals [n]) of y on
    x [beats, k] within each segment; NaN where not `enough` or where the columns are collinear."""
    xx = _sum(x[:, :, None] * x[:, None, :], segment, n)
    fine = enough & (np.linalg.det(xx) > collinear * np.einsum("ijj->ij", xx).prod(1))
    inverse = np.linalg.inv(np.where(fine[:, None, None], xx, np.eye(x.shape[1])))
    inverse[~fine] = np.nan
    fit = np.einsum("ijk,ik->ij", inverse, _sum(x * y[:, None], segment, n))
    return fit, inverse, np.bincount(segment, (y - (x * fit[segment]).sum(1)) ** 2, n)


def _fit_quality(y, residual, segment, n):
    """r2 and fit_rmse of a fit to the beats' y, of its sum of squared residuals."""
    squares = np.bincount(segment, (y - _mean(y, segment, n)[segment]) ** 2, n)
    return {"r2": 1.0 - residual / squares,
            "fit_rmse": np.sqrt(residual / np.bincount(segment, minlength=n))}


# ------------------------------------------------------------ sums over the beats of each segment

def _followed(row):
    """Indices of the elements that the next one follows in the same row."""
    return np.flatnonzero(row[1:] == row[:-1])


def _mean(value, segment, n):
    """(n,) means of the beats of each segment, NaN where it has none."""
    return np.bincount(segment, value, n) / np.bincount(segment, minlength=n)


def _sum(values, segment, n):
    """(n, ...) sums of the values (beats, ...) of each segment; `segment` ascends."""
    out = np.zeros((n,) + values.shape[1:])
    if len(values):
        present, first = np.unique(segment, return_index=True)
        out[present] = np.add.reduceat(values, first, axis=0)
    return out


def _quantile(value, segment, n, share=0.5):
    """(n,) quantile of the beats of each segment (linear interpolation), NaN where it has none."""
    out = np.full(n, np.nan)
    count = np.bincount(segment, minlength=n)
    some = count > 0
    position = (np.cumsum(count) - count + share * (count - 1))[some]
    ordered = value[np.lexsort((value, segment))]
    below, above = (ordered[rounded(position).astype(int)] for rounded in (np.floor, np.ceil))
    out[some] = below + (position % 1) * (above - below)
    return out


# ------------------------------------------------------------------------------------------ beats

def find_feet(abp, fs):
    """Feet of the beats in `abp` [N, samples], finite: (time in samples, row), flat, in time order.

    A beat is a peak of the slope sum; its foot is where the tangent at the steepest point of the
    upstroke meets the level of the minimum before it, which is finer than the sampling interval.
    """
    from scipy.ndimage import gaussian_filter1d  # here: a script's --help does without
    from scipy.signal import find_peaks

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


def _peaks(wave):
    """The pressure maximum that follows each foot: (time in samples, row), as `find_feet`."""
    first, start, end = _beat_samples(wave.foot, wave.row)
    row, abp = wave.row[first], wave.abp
    peak = start + np.array([abp[i, a:b].argmax() for i, a, b in zip(row, start, end)], dtype=int)
    # a parabola through the highest sample and its neighbours times the peak between samples
    left, middle, right = abp[row, peak - 1], abp[row, peak], abp[row, peak + 1]
    bend = left - 2 * middle + right
    shift = np.where(bend < 0, 0.5 * (left - right) / bend, 0.0)
    return peak + np.clip(shift, -0.5, 0.5), row


def _beat_samples(boundary, row):
    """Beats between successive boundaries (times in samples) of a row: index of the boundary at
    which each begins, its first sample, and one past its last."""
    first = _followed(row)
    start, end = (np.ceil(boundary[at]).astype(int) for at in (first, first + 1))
    some = end > start
    return first[some], start[some], end[some]


def _over_beats(function, signal, row, start, end):
    """np.maximum or np.minimum over the samples of each beat, of a signal [N, samples]."""
    ends = row[:, None] * signal.shape[1] + np.stack([start, end], 1)
    return function.reduceat(signal.ravel(), ends.ravel())[::2]


def _measure_beats(wave, boundary, row):
    """The valid beats between successive boundaries (times in samples) of each row."""
    index, start, end = _beat_samples(boundary, row)
    segment, first, last = row[index], boundary[index], boundary[index + 1]
    half = LEVEL_SECONDS / 2 * wave.fs          # the level at a boundary: noise averaged out
    end_of_row = wave.abp.shape[1] - 1.0
    before, after = (wave.mean(segment, np.maximum(at - half, 0.0),
                               np.minimum(at + half, end_of_row)) for at in (first, last))
    interval_s = (last - first) / wave.fs
    top, bottom = (_over_beats(function, wave.abp, segment, start, end)
                   for function in (np.maximum, np.minimum))
    beats = Beats(segment, interval_s, wave.mean(segment, first, last), top, bottom, after - before)
    return beats.select((interval_s >= MIN_BEAT_SECONDS) & (interval_s <= MAX_BEAT_SECONDS)
                        & wave.is_clean(segment, start, end - 1))


# ----------------------------------------------------------------------------------- signal quality

PPG_FLAT_SECONDS = 1.0    # longer than diastole's flat end in a slow pulse
PPG_FLAT_SHARE = 1e-4     # of the segment's range, per sample at 60 Hz
PPG_CLIP_SHARE = 1e-3     # of the range: what counts as on the highest or lowest value
SATURATED_SECONDS = 0.5   # beats that are clipped stay at the end of the scale for less
PPG_PULSE_HZ = (0.5, 8.0)  # from 30 beats/min to the third harmonic of 160/min
# Least share of the pulse band in the power from 0.5 Hz on (white noise: 0.25) and in all of it but
# the mean (a random walk: 0.01-0.1): relative power as a quality index, Elgendi, Bioengineering
# 2016. All of 893 real minutes, most of them in atrial fibrillation, have more than 0.97 and 0.15.
MIN_PULSE_SHARE_FAST, MIN_PULSE_SHARE = 0.8, 0.1
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
    return _in_blocks(lambda *blocks: _quality_block(*blocks, fs), abp=abp, ppg=ppg)


def _quality_block(abp, ppg, fs):
    arterial = Wave(*_fill_missing(abp, *ABP_RANGE_MMHG), fs)
    ppg, missing = _fill_missing(ppg)
    reason = _ppg_block(ppg, missing, fs)
    scaled = Wave(ppg_as_pressure(ppg), missing, fs)
    hr, irregularity = _rhythm(arterial)
    ppg_hr, _ = _rhythm(scaled)
    deviation = scaled.abp - scaled.abp.mean(1, keepdims=True)
    measures = (irregularity, _upstroke_s(arterial) * np.sqrt(hr / 60.0), ppg_hr,
                _template_match(scaled),
                (deviation ** 3).mean(1) / (deviation ** 2).mean(1) ** 1.5)
    tolerance = np.maximum(RATE_TOLERANCE_SHARE * hr, RATE_TOLERANCE_BPM)
    missed = np.where(irregularity > ARRHYTHMIC, PULSE_DEFICIT * hr, tolerance)
    mismatch = np.isfinite(hr) & ~((ppg_hr <= hr + tolerance) & (ppg_hr >= hr - missed))
    return {"reason": reason | reason_mask(len(abp), {"rate_mismatch": mismatch}),
            **{name: of.astype(np.float32) for name, of in zip(QUALITY_FIELDS, measures)}}


def ppg_as_pressure(ppg):
    """The finite `ppg` [N, samples] on a scale on which `find_feet` finds its beats."""
    low, high = np.percentile(ppg, [5, 95], axis=1, keepdims=True)
    return (ppg - low) * (PPG_HEIGHT_MMHG / np.where(high > low, high - low, np.inf))


def _rhythm(wave):
    """(rate in beats/min, RMSSD / mean interval), each (N,), NaN where there are too few beats."""
    n = len(wave.abp)
    beats = _measure_beats(wave, wave.foot, wave.row)
    few = np.bincount(beats.segment, minlength=n) < MIN_BEATS
    return (np.where(few, np.nan, 60.0 / _quantile(beats.interval_s, beats.segment, n)),
            np.where(few, np.nan, _irregularity(beats.interval_s, beats.segment, n)))


def _irregularity(interval, segment, n):
    """(n,) RMSSD / mean of the intervals of each segment's beats."""
    at = _followed(segment)
    change = _mean((interval[at + 1] - interval[at]) ** 2, segment[at], n)
    return np.sqrt(change) / _mean(interval, segment, n)


def _upstroke_s(wave):
    """(N,) height of a beat over its steepest rise, the median of the beats."""
    first, start, end = _beat_samples(wave.foot, wave.row)
    row, rise = wave.row[first], np.diff(wave.abp, axis=1, append=wave.abp[:, -1:]) * wave.fs
    top, bottom, steepest = (_over_beats(*of, row, start, end) for of in (
        (np.maximum, wave.abp), (np.minimum, wave.abp), (np.maximum, rise)))
    some = steepest > 0
    return _quantile((top - bottom)[some] / steepest[some], row[some], len(wave.abp))


def _template_match(wave):
    """(N,) mean correlation of a segment's beats, stretched to one length, with their mean."""
    n, foot = len(wave.abp), wave.foot
    first = _followed(wave.row)
    segment, length = wave.row[first], foot[first + 1] - foot[first]
    beat = wave.at(segment[:, None],
                   foot[first, None] + np.linspace(0, 1, TEMPLATE_SAMPLES) * length[:, None])
    beat -= beat.mean(1, keepdims=True)
    norm = np.linalg.norm(beat, axis=1, keepdims=True)
    beat /= np.where(norm > 0, norm, 1.0)
    template = _sum(beat, segment, n)
    template /= np.linalg.norm(template, axis=1, keepdims=True)
    few = np.bincount(segment, minlength=n) < MIN_BEATS
    return np.where(few, np.nan, _mean((beat * template[segment]).sum(1), segment, n))


def ppg_reasons(ppg, fs):
    """(N,) uint32 reasons of `ppg` [N, samples] (or [samples]) alone, in any unit at `fs` Hz."""
    return _in_blocks(lambda block: {"reason": _ppg_block(*_fill_missing(block), fs)},
                      ppg=ppg)["reason"]


def _ppg_block(ppg, missing, fs):
    span = np.ptp(ppg, axis=1)[:, None]
    flat = _runs(np.abs(np.diff(ppg, axis=1)) <= PPG_FLAT_SHARE * span * 60.0 / fs,
                 PPG_FLAT_SECONDS, fs) & ~missing
    at_ends = _at_ends(ppg, PPG_CLIP_SHARE * span)
    return reason_mask(len(ppg), {
        "ppg_missing": missing.any(1),
        "ppg_flat": _is_bad(flat),
        "ppg_clipped": _is_bad(_runs(at_ends, CLIP_SECONDS, fs)),
        "ppg_no_pulse": _no_pulse(ppg, fs),
        "ppg_saturated": _is_bad(_runs(at_ends, SATURATED_SECONDS, fs)),
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


# ------------------------------------------------------------------------------------- bad samples

def _fill_missing(signal, low=-np.inf, high=np.inf):
    """(float64 signal with the gaps bridged by straight lines so that it can be filtered, mask of
    the gaps), both [N, samples]. The mask keeps what was invented out of every beat."""
    signal = np.array(signal, dtype=np.float64)
    missing = ~(np.isfinite(signal) & (signal >= low) & (signal <= high))
    for i in np.flatnonzero(missing.any(1)):
        there, gap = np.flatnonzero(~missing[i]), np.flatnonzero(missing[i])
        signal[i, gap] = np.interp(gap, there, signal[i, there]) if len(there) else 0.0
    return signal, missing


def _runs(condition, seconds, fs):
    """[N, samples] mask of the samples in runs of so many seconds or more where `condition`
    [N, samples - 1], about the step from a sample to the next, holds throughout."""
    change = np.diff(condition, axis=1, prepend=False, append=False)
    row, at = np.nonzero(change)
    first, last = at[::2], at[1::2]             # runs begin and end in turn
    out = np.zeros(change.shape, dtype=bool)
    for i in np.flatnonzero(last - first >= max(3, int(round(seconds * fs)))):
        out[row[2 * i], first[i]:last[i] + 1] = True
    return out


def _at_ends(signal, within):
    """[N, samples - 1] mask of the steps between samples that both lie within so much of the
    segment's highest or lowest value."""
    edge = (signal >= signal.max(1, keepdims=True) - within) \
        | (signal <= signal.min(1, keepdims=True) + within)
    return edge[:, 1:] & edge[:, :-1]


def _is_bad(samples):
    """(N,) which segments have too many of the samples in a mask."""
    return samples.mean(1) > MAX_BAD_SHARE
