"""Arterial pressure waveform -> critical closing pressure (Pcrit), TPP and their standard error.

    from labels import label_segments
    labels = label_segments(abp, fs=60)         # abp [N, samples] in mmHg, any rate >= 40 Hz
    labels['tpp']                               # [N] mmHg, NaN where labels['reason'] != 0
    label_segments(abp, 60, method='waveform_balance')      # the smallest error: docs/labels.md

Copy signals.py with it. The published method (Chandrasekhar et al., Nat Med 2023, doi
10.1038/s41591-023-02474-6): over one minute, MAP = Pcrit + R * flow with flow ~ k * PP * HR. Each
beat gives MAP (its time mean), PP (maximum minus minimum) and HR (60 / interval); beats whose
PP * HR lies outside the 5th-95th percentile are dropped; the intercept of the least-squares line of
MAP on PP * HR is Pcrit; TPP = MAP - Pcrit. The paper's beats run from peak to peak, ours from foot
to foot, which is less biased.
"""
from typing import Dict, NamedTuple, Optional

import numpy as np

import signals
from signals import Beats, Wave, segment_mean, segment_quantile, segment_sum

FIELDS = ("map", "sbp", "dbp", "pp", "hr", "p_crit", "tpp", "r2", "fit_rmse", "p_crit_se")
BEATS = "foot"            # where beats begin and end; a file's attribute `beats`
SBP_MAX_MMHG, DBP_MIN_MMHG = 300.0, 10.0
PP_RANGE_MMHG = (5.0, 200.0)
FLAT_SECONDS, FLAT_MMHG_PER_S = 0.5, 0.5    # diastole falls faster unless the heart stops
CLIP_MMHG = 0.25          # samples that stay this close to the highest value are clipped
FLUSH_MMHG = 60.0         # above SBP, beyond any post-ectopic beat: the line is being flushed
MIN_COVER = 0.5           # share of the segment that valid beats must cover
# `waveform_balance`; times are from a beat's foot.
LEVEL_SECONDS = 0.12      # the level at a foot is the mean over this time
ALIGN_SECONDS = (-0.1, 0.25)
SYSTOLE_SECONDS = (0.05, 0.25)  # ejection lasts 0.20-0.36 s; its mean follows the stroke volume
DIASTOLE_SECONDS = 0.5    # from here on ejection, the valve's closure and most reflections are over
MIN_DIASTOLE_SECONDS, NOISE_SECONDS = 0.15, 0.15
END_SECONDS = 0.1         # over which the levels at the ends of a diastole are averaged
TAU_S = (0.5, 0.35)       # mean and SD of RC, wide: 0.45-0.7 s is usual (Maas et al. 2012, and C)
BREATH_HZ = (0.12, 0.5)   # 7 to 30 breaths/min
BREATH_MMHG = 0.2         # SD of the sine and cosine parts of the chest's own pressure swing
MAX_SERIAL = 0.5          # correlation of successive residuals that the standard error allows for
MODEL_ERROR_MMHG = 1.0    # part of every standard error, seen on simulated patients
MAX_NOISE_SHARE = 0.7     # upper bound on the noise that is subtracted from a slope's variance


def label_segments(abp: np.ndarray, fs: float, method: str = "published") -> Dict[str, np.ndarray]:
    """Labels of the segments `abp` [N, samples] (or [samples]) in mmHg at `fs` Hz: a dict of (N,)
    FIELDS (mmHg; `hr` in beats/min; NaN where refused), `n_beats` in the fit, and `reason` (bits of
    signals.REASONS). Raises ValueError for a rate below MIN_FS_HZ or an unknown method."""
    if not fs >= signals.MIN_FS_HZ:         # also refuses NaN
        raise ValueError(f"the ABP must be sampled at {signals.MIN_FS_HZ} Hz or more, not at {fs}")
    if method not in METHODS:
        raise ValueError(f'method must be one of {", ".join(METHODS)}, not {method!r}')
    return signals.in_blocks(lambda block: _label_block(block, fs, METHODS[method]), abp=abp)


def _label_block(abp, fs, method):
    abp, missing = signals.fill_missing(abp, *signals.ABP_RANGE_MMHG)
    n, samples = abp.shape
    still = np.abs(np.diff(abp, axis=1)) < FLAT_MMHG_PER_S / fs
    flat = signals.runs(still, FLAT_SECONDS, fs) & ~missing     # a bridged gap is missing, not flat
    near_top = abp >= abp.max(1, keepdims=True) - CLIP_MMHG
    clipped = signals.runs(near_top[:, 1:] & near_top[:, :-1], signals.CLIP_SECONDS, fs)
    wave = Wave(abp, missing | flat | clipped, fs)
    beats = signals.measure_beats(wave)
    flush_mmhg = segment_quantile(beats.max, beats.segment, n) + FLUSH_MMHG
    flushed = abp > flush_mmhg[:, None]         # False where there are no beats (NaN)
    wave.bad |= flushed
    beats = beats.select(beats.max <= flush_mmhg[beats.segment])

    valid_s = np.bincount(beats.segment, beats.interval_s, n)
    out = {"map": np.bincount(beats.segment, beats.map * beats.interval_s, n) / valid_s,
           "sbp": segment_quantile(beats.max, beats.segment, n),
           "dbp": segment_quantile(beats.min, beats.segment, n),
           "hr": 60.0 / segment_quantile(beats.interval_s, beats.segment, n)}
    out["pp"] = out["sbp"] - out["dbp"]
    out.update(method(beats, n, wave))
    out["tpp"] = out["map"] - out["p_crit"]
    few = np.bincount(beats.segment, minlength=n) < signals.MIN_BEATS
    few |= valid_s < MIN_COVER * samples / fs
    reason = signals.reason_mask({
        "abp_missing": missing, "abp_flat": flat, "abp_clipped": clipped, "abp_flush": flushed,
        "abp_saturated": signals.runs(
            signals.at_extremes(abp, CLIP_MMHG), signals.SATURATED_SECONDS, fs),
        "abp_range": ((out["sbp"] > SBP_MAX_MMHG) | (out["dbp"] < DBP_MIN_MMHG)
                      | (out["pp"] < PP_RANGE_MMHG[0]) | (out["pp"] > PP_RANGE_MMHG[1])),
        "few_beats": few, "no_fit": ~few & ~np.isfinite(out["p_crit"])})
    labels = {name: np.where(reason == 0, out[name], np.nan).astype(np.float32) for name in FIELDS}
    return {**labels, "n_beats": out["n_beats"].astype(np.int32), "reason": reason}


def published(beats: Beats, n: int, wave: Optional[Wave] = None) -> Dict[str, np.ndarray]:
    """The published regression: MAP of each beat on its PP * HR; the intercept is Pcrit."""
    beats = beats.select(_within_percentiles(beats.flow, beats.segment, n))
    segment, x, y = beats.segment, beats.flow, beats.map
    count = np.bincount(segment, minlength=n)
    x_mean, y_mean = segment_mean(x, segment, n), segment_mean(y, segment, n)
    dx, dy = x - x_mean[segment], y - y_mean[segment]
    xx = segment_sum(dx ** 2, segment, n)
    # no line without a degree of freedom left, or where flow is constant to rounding
    xx[(count <= 2) | ~(xx > 1e-12 * count * x_mean ** 2)] = np.nan
    slope = (1.0 / xx) * segment_sum(dx * dy, segment, n)
    residual = np.bincount(segment, (dy - dx * slope[segment]) ** 2, n)
    return {"p_crit": y_mean - slope * x_mean,
            "p_crit_se": np.sqrt(
                residual / (count - 2) * (1.0 / count + x_mean * (1.0 / xx) * x_mean)),
            **_fit_quality(y, residual, segment, n), "n_beats": count}


def waveform_balance(beats: Beats, n: int, wave: Wave) -> Dict[str, np.ndarray]:
    """Balance of flow in, flow out and storage, on averages of the waveform; finds its own beats.

    Over a beat, inflow = outflow + storage: SV = (MAP - Pcrit) T / R + C dP, so that with H, the
    mean of SYSTOLE_SECONDS above the level F before the foot, as the measure of SV:
        MAP = Pcrit + k H / T - tau dF / T + breath
    A row of the fit is x = [1, H / T, -dF / T, sine, cosine], its answer [Pcrit, k, tau, the
    breath's two parts] solves (sum of w x x' - noise + prior) fit = sum of w x MAP - noise + pull.
    - Beats are timed by the shift of the whole upstroke and levels are means, which reduces noise.
    - Noise that is left in H and dF flattens the slopes and raises Pcrit. Its variance is estimated
      in late diastole and subtracted from the normal equations (errors in variables: Fuller,
      Measurement Error Models, 1987).
    - `breath`: the chest's own pressure swing, which is not flow, is a wave at the breathing rate.
      Priors (ridge) keep its amplitude near BREATH_MMHG and tau = RC near TAU_S.
    - In an arrhythmic minute, late diastoles join the fit: without inflow, mean P = Pcrit -
      tau dP / dt over each. (With a regular rhythm they say more about reflected waves.)
    """
    whole, late, noise = _balance_rows(wave, n)
    (xx, xy), (xx_late, xy_late) = (
        (segment_sum(rows.x[:, :, None] * rows.x[:, None, :], rows.segment, n),
         segment_sum(rows.x * rows.y[:, None], rows.segment, n)) for rows in (whole, late))
    noise_xx, noise_xy, noise_late = _noise_sums(wave, whole, late, noise, n)
    prior = np.diag([0, 0, TAU_S[1] ** -2, BREATH_MMHG ** -2, BREATH_MMHG ** -2])
    pull = prior @ np.array([0, 0, TAU_S[0], 0, 0])
    of, y = whole.segment, whole.y
    count, count_late = np.bincount(of, minlength=n), np.bincount(late.segment, minlength=n)
    weight = 5 * count / np.bincount(of, (y - segment_mean(y, of, n)[of]) ** 2, n)
    enough = ((count >= signals.MIN_BEATS) & np.isfinite(weight) & np.isfinite(noise)
              & (np.abs(np.linalg.det(xx[:, :2, :2])) > 1e-12 * count * xx[:, 1, 1]))
    xx[~enough] = np.eye(5)
    for values in (noise_xx, noise_xy, xx_late, noise_late):
        values[~enough] = 0.0
    weight = np.where(enough, weight, 1.0)
    weight_late = np.where(enough & (count_late >= signals.MIN_BEATS), weight, 0.0)
    for _ in range(5):                      # beats and diastoles are weighted by their residuals
        w, w_late = weight[:, None], weight_late[:, None]
        exact = w[:, None] * xx + w_late[:, None] * xx_late + prior
        noisy = w[:, None] * noise_xx + w_late[:, None] * noise_late
        correct = np.minimum(1.0, MAX_NOISE_SHARE / _noise_share(exact, noisy))[:, None]
        inverse = np.linalg.inv(exact - correct[:, None] * noisy)
        fit = np.einsum("ijk,ik->ij", inverse,
                        w * (xy - correct * noise_xy) + w_late * xy_late + pull)
        rest, rest_late = (rows.y - (rows.x * fit[rows.segment]).sum(1) for rows in (whole, late))
        residual = np.bincount(of, rest ** 2, n) + 1e-6 * count     # keeps the variance positive
        residual_late = np.bincount(late.segment, rest_late ** 2, n) + 1e-6 * count_late
        weight = np.where(enough, (count - 5) / residual, 1.0)
        weight_late = np.where(weight_late > 0, count_late / residual_late, 0.0)
    # a sandwich: noise is part of the sums in its middle; correlated residuals count as fewer beats
    at = np.flatnonzero(of[1:] == of[:-1])
    serial = np.clip(np.bincount(of[at], rest[at + 1] * rest[at], n) / residual, 0.0, MAX_SERIAL)
    middle = (((1 + serial) / (1 - serial) * weight)[:, None, None] * xx
              + weight_late[:, None, None] * xx_late + prior)
    variance = np.einsum("ij,ijk,ik->i", inverse[:, 0], middle, inverse[:, 0])
    out = {"p_crit": fit[:, 0], "p_crit_se": np.sqrt(variance + MODEL_ERROR_MMHG ** 2),
           **_fit_quality(y, residual, of, n)}
    return {**{name: np.where(enough, value, np.nan) for name, value in out.items()},
            "n_beats": count}


# (beats, n segments, wave) -> {p_crit, p_crit_se, r2, fit_rmse, n_beats: each (n,)}. Files store
# the names, so they must not change.
METHODS = {"published": published, "waveform_balance": waveform_balance}


class Rows(NamedTuple):
    """Rows of the balance's regression: whole beats or late diastoles."""
    segment: np.ndarray     # [rows]
    x: np.ndarray           # [rows, 5]: Pcrit, k, tau, and the sine and cosine of the breath
    y: np.ndarray           # [rows], mmHg
    length_s: np.ndarray    # [rows]


def _balance_rows(wave, n):
    """(whole beats, late diastoles of arrhythmic segments, noise variance (n,)) of the balance."""
    fs, samples = wave.fs, wave.abp.shape[1]
    foot = _align_upstrokes(wave)
    first = wave.first[foot[wave.first + 1] > foot[wave.first]]
    segment, begin, end = wave.row[first], foot[first], foot[first + 1]
    interval_s = (end - begin) / fs
    level = LEVEL_SECONDS * fs
    a, b = (second * fs for second in SYSTOLE_SECONDS)
    fine = ((interval_s >= signals.MIN_BEAT_SECONDS) & (interval_s <= signals.MAX_BEAT_SECONDS)
            & (begin >= level) & (end <= samples - 1) & (begin + b <= samples - 1)
            & wave.is_clean(segment, begin - level, end))
    segment, begin, end, interval_s = (v[fine] for v in (segment, begin, end, interval_s))
    before, after = (wave.mean(segment, at - level, at) for at in (begin, end))
    height = wave.mean(segment, begin + a, begin + b) - before
    irregular = signals.irregularity(interval_s, segment, n) > signals.ARRHYTHMIC
    noise = _noise_variance(wave, begin, segment, n)
    per_s = 1.0 / interval_s
    kept = _within_percentiles(height * per_s, segment, n)
    segment, begin, end, interval_s, per_s, height, change = (v[kept] for v in (
        segment, begin, end, interval_s, per_s, height, after - before))
    time_s = 0.5 * (begin + end) / fs
    hz = _breathing_hz(time_s, height, segment, n)

    def design(segment, time_s, flow, change):
        phase = 2 * np.pi * hz[segment] * time_s
        return np.stack([np.ones(len(segment)), flow, -change, np.sin(phase), np.cos(phase)], 1)
    whole = Rows(segment, design(segment, time_s, height * per_s, change * per_s),
                 wave.mean(segment, begin, end), interval_s)
    late, mean, slope, length_s, middle_s = _diastoles(wave, foot, irregular)
    late_x = design(late, middle_s, np.zeros(len(late)), slope)
    return whole, Rows(late, late_x, mean, length_s), noise


def _noise_sums(wave, whole, late, noise, n):
    """The expected part of white noise in the sums xx and xy of the whole beats and in xx of the
    diastoles: [n, 5, 5], [n, 5], [n, 5, 5]."""
    level = LEVEL_SECONDS * wave.fs
    a, b = (second * wave.fs for second in SYSTOLE_SECONDS)
    noise_xx, noise_xy, noise_late = np.zeros((n, 5, 5)), np.zeros((n, 5)), np.zeros((n, 5, 5))
    squares = noise * np.bincount(whole.segment, (1.0 / whole.length_s) ** 2, n)
    noise_xx[:, 1:3, 1:3] = squares[:, None, None] * np.array(
        [[1 / (b - a) + 1 / level, -1 / level], [-1 / level, 2 / level]])
    noise_xy[:, 1:3] = (squares / wave.fs)[:, None] * np.array([1.0, -1.0])
    noise_late[:, 2, 2] = noise * np.bincount(
        late.segment, 2 / (END_SECONDS * wave.fs) / late.length_s ** 2, n)
    return noise_xx, noise_xy, noise_late


def _diastoles(wave, foot, wanted):
    """The late diastoles between the feet (times in samples) of the `wanted` (n,) segments: their
    segment, mean pressure, slope in mmHg/s, length and middle in s."""
    fs, samples = wave.fs, wave.abp.shape[1]
    half = 0.5 * END_SECONDS * fs
    segment = wave.row[wave.first]
    begin, end = foot[wave.first] + DIASTOLE_SECONDS * fs, foot[wave.first + 1] - half
    fine = (wanted[segment] & (end - begin >= MIN_DIASTOLE_SECONDS * fs)
            & (end - begin <= signals.MAX_BEAT_SECONDS * fs) & (foot[wave.first] >= 0)
            & (end + half <= samples - 1) & wave.is_clean(segment, begin - half, end + half))
    segment, begin, end = segment[fine], begin[fine], end[fine]
    level = [wave.mean(segment, at - half, at + half) for at in (begin, end)]
    length_s = (end - begin) / fs
    return (segment, wave.mean(segment, begin, end), (level[1] - level[0]) / length_s, length_s,
            0.5 * (begin + end) / fs)


def _align_upstrokes(wave):
    """The feet, each timed by the shift that best fits its upstroke to the segment's mean upstroke.
    This averages the noise of about 20 samples; a foot alone depends on two."""
    fs, row, n = wave.fs, wave.row, len(wave.abp)
    foot = wave.foot.copy()
    around = np.arange(int(ALIGN_SECONDS[0] * fs), int(ALIGN_SECONDS[1] * fs) + 1)
    for _ in range(3):
        time = foot[:, None] + around
        fine = ((time[:, 0] >= 0) & (time[:, -1] <= wave.abp.shape[1] - 1)
                & wave.is_clean(row, time[:, 0], time[:, -1]))
        pressure = wave.interpolate(row[fine][:, None], time[fine])
        count = np.maximum(np.bincount(row[fine], minlength=n), 1)
        mean = segment_sum(pressure, row[fine], n) / count[:, None]
        basis = np.stack([np.ones_like(mean), mean, np.gradient(mean, axis=1)], 1)
        gram = np.einsum("ijk,ilk->ijl", basis, basis)
        gram += 1e-9 * np.eye(3) * (1.0 + np.einsum("ijj->i", gram))[:, None, None]
        solve = np.einsum("ijk,ikl->ijl", np.linalg.inv(gram), basis)
        level, height, shift = np.einsum("ijk,ik->ji", solve[row[fine]], pressure)
        moved = -shift / np.where(np.abs(height) > 0.2, height, 1.0)
        foot[fine] += np.clip(moved, -0.05 * fs, 0.05 * fs)
    # the feet define the time of the mean upstroke
    return foot + segment_quantile(wave.foot - foot, row, n)[row]


def _noise_variance(wave, begin, segment, n):
    """(n,) variance of white noise in mmHg^2: the residual of a parabola over the NOISE_SECONDS
    before the foot, where pressure falls smoothly; the median over the beats."""
    length = max(6, int(NOISE_SECONDS * wave.fs))
    fine = begin >= length
    begin, segment = begin[fine].astype(int), segment[fine]
    values = wave.abp[segment[:, None], begin[:, None] + np.arange(-length, 0)]
    t = np.linspace(-1, 1, length)
    smooth, _ = np.linalg.qr(np.stack([np.ones(length), t, t * t], 1))
    rest = values - values @ smooth @ smooth.T
    free = length - 3           # the median of chi-square / free is below 1 (Wilson and Hilferty)
    return segment_quantile((rest ** 2).sum(1) / free, segment, n) / (1 - 2 / (9 * free)) ** 3


def _breathing_hz(time_s, height, segment, n):
    """(n,) frequency at which the height of the beats swings most (a tapered periodogram)."""
    hz = np.linspace(*BREATH_HZ, 100)
    t, h = (value - segment_mean(value, segment, n)[segment] for value in (time_s, height))
    trend = np.bincount(segment, t * h, n) / np.bincount(segment, t * t, n)
    span = np.zeros(n)
    np.maximum.at(span, segment, np.abs(t))
    taper = 0.5 + 0.5 * np.cos(np.pi * t / span[segment])
    wave = np.exp(-2j * np.pi * t[:, None] * hz) * (taper * (h - trend[segment] * t))[:, None]
    real, imaginary = segment_sum(wave.real, segment, n), segment_sum(wave.imag, segment, n)
    return hz[(real ** 2 + imaginary ** 2).argmax(1)]


def _noise_share(xx, noise_xx):
    """(n,) largest share of noise in any mixture of the two noisy columns, after regression on the
    others. Near 1, subtracting the noise would leave nothing to fit."""
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
    low, high = (segment_quantile(value, segment, n, share)[segment] for share in (0.05, 0.95))
    return ((value >= low) & (value <= high)) | (np.bincount(segment, minlength=n) < 5)[segment]


def _fit_quality(y, residual, segment, n):
    """r2 and fit_rmse from the beats' y and the fit's sum of squared residuals."""
    squares = np.bincount(segment, (y - segment_mean(y, segment, n)[segment]) ** 2, n)
    return {"r2": 1.0 - residual / squares,
            "fit_rmse": np.sqrt(residual / np.bincount(segment, minlength=n))}
