"""Labels: beats, the published regression, and what is refused."""
import pathlib
import warnings

import numpy as np
import pytest
from scipy import signal, stats

import labels

FS = 60
RECORDINGS = pathlib.Path(__file__).resolve().parents[2] / "shared" / "data" / "wfdb"


def windkessel(p_crit=40.0, hr=75.0, slow=0.15, fs=FS, seconds=60, resistance=0.45, seed=0):
    """ABP of a three-element Windkessel by Euler steps at 2 kHz, sampled at `fs`: the simulator's
    physics by another way."""
    rng = np.random.default_rng(seed)
    compliance, impedance, ejection = 1.2, 0.05, 0.28
    fine, lead = 2000, 8
    t = np.arange((seconds + lead) * fine) / fine
    beat = (t * hr / 60).astype(int)
    phase = (t - beat * 60 / hr) / ejection
    stroke = 65 * (1 + slow * np.sin(2 * np.pi * 0.03 * beat * 60 / hr)
                   + 0.005 * rng.normal(size=beat[-1] + 1)[beat])
    wave = np.where(phase < 1, np.sin(np.pi * np.clip(phase, 0, 1)), 0)
    flow = wave * stroke * np.pi / 2 / ejection
    pressure = np.empty_like(t)
    p = p_crit + resistance * flow.mean()
    for i, q in enumerate(flow.tolist()):
        p += (q - (p - p_crit) / resistance) / compliance / fine
        pressure[i] = p
    at = lead + np.arange(seconds * fs) / fs
    return np.interp(at, t, pressure + impedance * flow)


def pulses(hr, dicrotic=0.4, pp=60.0, seconds=60, fs=FS, jitter=0.02, seed=0):
    """(pressure, number of beats): sharp systolic waves with a large dicrotic wave on a decay."""
    rng = np.random.default_rng(seed)
    interval = 60 / hr * (1 + jitter * rng.normal(size=int(seconds * hr / 60) + 4))
    onset = np.cumsum(interval) - 60 / hr
    t = np.arange(seconds * fs) / fs
    out = np.full(t.size, 60.0)
    width = min(0.06, 0.12 * 60 / hr)
    for start in onset:
        since = t - start
        out += 25.0 * np.exp(-since.clip(0) / 0.6) * (since > 0)     # diastole falls
        out += pp * np.exp(-0.5 * ((since - 2.5 * width) / width) ** 2)
        out += dicrotic * pp * np.exp(-0.5 * ((since - 2.5 * width - 5 * width) / width) ** 2)
    return out, int(((onset > 0) & (onset < seconds - 60 / hr)).sum())


@pytest.fixture(scope="module")
def clean():
    return windkessel()


def has(reason, name):
    return (reason >> labels.REASONS.index(name)) & 1 == 1


def test_slow_stroke_volume_variation_gives_the_true_closing_pressure(clean):
    out = labels.label_segments(clean, FS)
    assert out["reason"][0] == 0
    assert out["p_crit"][0] == pytest.approx(40, abs=3)
    assert out["r2"][0] > 0.85
    assert out["hr"][0] == pytest.approx(75, abs=0.3)
    assert out["map"][0] == pytest.approx(clean.mean(), abs=0.5)
    assert out["tpp"][0] == pytest.approx(out["map"][0] - out["p_crit"][0], abs=1e-4)
    assert out["pp"][0] == pytest.approx(out["sbp"][0] - out["dbp"][0], abs=1e-4)


@pytest.mark.parametrize("hr", [35, 50, 75, 100, 140, 180])
@pytest.mark.parametrize("dicrotic", [0.0, 0.45])
def test_every_beat_counts_once_whatever_the_rate_and_the_dicrotic_wave(hr, dicrotic):
    pressure, beats = pulses(hr, dicrotic)
    feet, _ = labels.find_feet(pressure[None], FS)
    assert abs(len(feet) - beats) <= 2
    assert labels.label_segments(pressure, FS)["hr"][0] == pytest.approx(hr, rel=0.02)


@pytest.mark.parametrize("fs", [40, 125, 250])
def test_labels_hardly_depend_on_the_sampling_rate(clean, fs):
    at_60, other = labels.label_segments(clean, FS), labels.label_segments(windkessel(fs=fs), fs)
    for name in ("map", "dbp", "hr"):
        assert other[name][0] == pytest.approx(at_60[name][0], abs=1)
    assert other["p_crit"][0] == pytest.approx(at_60["p_crit"][0], abs=3)


def test_the_regression_equals_one_segment_at_a_time_with_numpy_and_scipy():
    rng = np.random.default_rng(1)
    segment = np.sort(rng.integers(0, 20, 900))
    low = rng.uniform(40, 70, 900)
    beats = labels.Beats(segment, rng.uniform(0.6, 1.1, 900), low + rng.uniform(10, 30, 900),
                         low + rng.uniform(30, 90, 900), low, rng.normal(size=900))
    with np.errstate(all="ignore"):             # of the segment without beats
        fit, balance = labels.published(beats, 21), labels.beat_balance(beats, 21)
    for i in range(20):
        x, y = beats.flow[segment == i], beats.map[segment == i]
        keep = (x >= np.percentile(x, 5)) & (x <= np.percentile(x, 95))
        line = stats.linregress(x[keep], y[keep])
        assert fit["n_beats"][i] == keep.sum()
        assert fit["p_crit"][i] == pytest.approx(line.intercept, rel=1e-9)
        assert fit["p_crit_se"][i] == pytest.approx(line.intercept_stderr, rel=1e-9)
        assert fit["r2"][i] == pytest.approx(line.rvalue ** 2, rel=1e-6, abs=1e-12)
        rest = y[keep] - line.intercept - line.slope * x[keep]
        assert fit["fit_rmse"][i] == pytest.approx(np.sqrt(np.mean(rest ** 2)), rel=1e-9)
    assert np.isnan(fit["p_crit"][20])
    for i in range(20):
        of = segment == i
        x, y = beats.flow[of], beats.map[of]
        stored = (beats.stored * 60 / beats.interval_s)[of]
        keep = (x >= np.percentile(x, 5)) & (x <= np.percentile(x, 95))
        design = np.stack([np.ones(keep.sum()), x[keep], stored[keep]], 1)
        plane, residual, _, _ = np.linalg.lstsq(design, y[keep], rcond=None)
        covariance = residual[0] / (keep.sum() - 3) * np.linalg.inv(design.T @ design)
        assert balance["p_crit"][i] == pytest.approx(plane[0], rel=1e-9)
        assert balance["p_crit_se"][i] == pytest.approx(covariance[0, 0] ** 0.5, rel=1e-8)


def published_steps(row, fs):
    """The published steps, literally and one beat at a time: (Pcrit, r2, beats) of a segment."""
    tall = np.percentile(row, 95) - np.percentile(row, 5)
    peaks, _ = signal.find_peaks(row, distance=0.3 * fs, prominence=0.4 * tall)
    if len(peaks) < 10:
        return np.nan, 0.0, 0
    flow, pressure = [], []
    for first, last in zip(peaks[:-1], peaks[1:]):
        beat = row[first:last]
        pulse_pressure, heart_rate = beat.max() - beat.min(), 60 * fs / (last - first)
        flow.append(pulse_pressure * heart_rate)
        pressure.append(beat.mean())
    flow, pressure = np.array(flow), np.array(pressure)
    if len(flow) >= 5:
        keep = (flow >= np.percentile(flow, 5)) & (flow <= np.percentile(flow, 95))
        flow, pressure = flow[keep], pressure[keep]
    slope, intercept = np.polyfit(flow, pressure, 1)
    rest = pressure - (intercept + slope * flow)
    return intercept, 1 - rest.var() / pressure.var(), len(flow)


def test_peak_to_peak_labels_agree_with_the_literal_published_steps():
    truth = np.linspace(20, 60, 12)
    abp = np.stack([windkessel(p, hr=60 + 4 * i, seed=i) for i, p in enumerate(truth)])
    ours = labels.label_segments(abp, FS, beats="peak")
    literal = np.array([published_steps(row, FS) for row in abp])
    assert np.corrcoef(ours["p_crit"], literal[:, 0])[0, 1] > 0.99
    np.testing.assert_allclose(ours["p_crit"], literal[:, 0], atol=2)
    np.testing.assert_allclose(ours["n_beats"], literal[:, 2], atol=2)


@pytest.mark.skipif(not RECORDINGS.exists(), reason="the shared recordings are not here")
def test_peak_to_peak_labels_of_real_segments_agree_with_the_literal_published_steps():
    wfdb = pytest.importorskip("wfdb")
    ours, literal = [], []
    for header in sorted(RECORDINGS.glob("[abtv]*.hea")):        # the records of 5 minutes
        record = wfdb.rdheader(str(header.with_suffix("")))
        if "ABP" not in (record.sig_name or []) or record.sig_len > 400 * record.fs:
            continue
        read = wfdb.rdrecord(str(header.with_suffix("")), smooth_frames=False,
                             channel_names=["ABP"])
        fs = int(read.fs * read.samps_per_frame[0])
        abp = np.asarray(read.e_p_signal[0])
        minutes = abp[:len(abp) // (60 * fs) * 60 * fs].reshape(-1, 60 * fs)[::2]
        made = labels.label_segments(minutes, fs, beats="peak")
        for i in np.flatnonzero((made["reason"] == 0) & (made["r2"] > 0.5)
                                & np.isfinite(minutes).all(1)):
            if labels.signal_quality(minutes[i], minutes[i], fs)["beat_irregularity"] > 0.1:
                continue
            p_crit, r2, beats = published_steps(minutes[i], fs)
            if r2 > 0.5 and abs(beats - made["n_beats"][i]) <= 2:     # clean for both
                ours.append(made["p_crit"][i])
                literal.append(p_crit)
    assert len(ours) >= 10
    assert np.corrcoef(ours, literal)[0, 1] > 0.99


@pytest.mark.parametrize("method, within", [("published", 3), ("beat_balance", 2),
                                            ("diastolic", 1), ("waveform_balance", 1)])
def test_each_method_finds_the_truth_without_noise(method, within):
    truth = [25, 40, 55]
    abp = np.stack([windkessel(p, hr=60 + 10 * i, seed=i) for i, p in enumerate(truth)])
    out = labels.label_segments(abp, FS, method=method)
    np.testing.assert_allclose(out["p_crit"], truth, atol=within)
    assert (np.abs(out["p_crit"] - truth) < 5 * out["p_crit_se"] + 1).all()
    for name in ("r2", "fit_rmse", "p_crit_se"):
        assert np.isfinite(out[name]).all()
    assert (out["n_beats"] > 50).all()


@pytest.mark.parametrize("beats", ["foot", "peak"])
@pytest.mark.parametrize("method", labels.METHODS)
def test_no_signal_stops_a_method(method, beats):
    rng = np.random.default_rng(0)
    t = np.arange(3600) / FS
    odd = np.stack([np.zeros(3600), np.full(3600, np.nan), 80 + 20 * rng.normal(size=3600),
                    80 + 40 * np.sin(2 * np.pi * 1.2 * t), np.cumsum(rng.normal(size=3600)),
                    np.where(t % 0.8 < 0.15, 120.0, 60.0)])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for rows in (odd, odd[:, :600], odd[:, :30], odd[:0]):
            out = labels.label_segments(rows, FS, beats, method)
            refused = out["reason"] != 0
            assert np.isnan(out["p_crit"][refused]).all()
            assert np.isfinite(out["p_crit"][~refused]).all()


def test_a_segment_has_the_same_label_alone_and_among_others():
    rows = np.stack([windkessel(30), pulses(90)[0], np.full(3600, np.nan), windkessel(50, hr=90)])
    together = labels.label_segments(np.tile(rows, (100, 1)), FS)      # several blocks
    for i in range(4):
        alone = labels.label_segments(rows[i], FS)
        for name, value in alone.items():
            np.testing.assert_array_equal(together[name][i::4], np.repeat(value, 100))


def test_a_short_gap_costs_its_beats_and_not_the_label(clean):
    gap = clean.copy()
    gap[1000:1200] = np.nan
    whole, out = labels.label_segments(clean, FS), labels.label_segments(gap, FS)
    assert out["reason"][0] == 0
    assert out["n_beats"][0] in range(whole["n_beats"][0] - 7, whole["n_beats"][0] - 2)
    assert out["p_crit"][0] == pytest.approx(whole["p_crit"][0], abs=1.5)


def test_a_short_flush_costs_its_beats_and_not_the_label(clean):
    flush = clean.copy()
    flush[1000:1150] = 290.0
    whole, out = labels.label_segments(clean, FS), labels.label_segments(flush, FS)
    assert out["reason"][0] == 0
    assert out["map"][0] == pytest.approx(whole["map"][0], abs=1)
    assert out["p_crit"][0] == pytest.approx(whole["p_crit"][0], abs=3)


def spoil(row, name):
    row = row.copy()
    if name == "abp_missing":
        row[500:1500] = np.nan
    elif name == "abp_flat":
        row[500:1500] = row[500]
    elif name == "abp_clipped":
        row = np.minimum(row, np.percentile(row, 80))
    elif name == "abp_flush":
        row[500:1500] = 295 + np.random.default_rng(0).normal(size=1000)
    elif name == "abp_range":
        row = row / 7.5                        # kPa
        row = 8 + (row - row.mean()) * 5       # a venous pressure of some amplitude
    elif name == "abp_saturated":
        row[500:1500] = row.max() + 60         # stuck at the end of the scale
    elif name == "few_beats":
        row = 80 + np.random.default_rng(0).normal(size=row.size)
    return row


@pytest.mark.parametrize("name", ["abp_missing", "abp_flat", "abp_clipped", "abp_flush",
                                  "abp_range", "few_beats", "abp_saturated"])
def test_a_bad_segment_has_its_reason_and_no_label(clean, name):
    out = labels.label_segments(np.stack([clean, spoil(clean, name)]), FS)
    assert out["reason"][0] == 0
    assert has(out["reason"][1], name)
    for field in labels.FIELDS:
        assert np.isfinite(out[field][0])
        assert np.isnan(out[field][1])


def test_identical_beats_have_no_regression():
    beats = labels.Beats(np.zeros(30, int), np.full(30, 0.8), np.full(30, 80.0), np.full(30, 120.0),
                         np.full(30, 60.0), np.zeros(30))
    assert np.isnan(labels.published(beats, 1)["p_crit"][0])


@pytest.mark.parametrize("arguments, word", [
    ((np.zeros((2, 3, 600)), 60), "abp must be"),
    ((np.zeros((2, 600)), 30), "40 Hz"),
    ((np.zeros((2, 600)), float("nan")), "40 Hz"),
    ((np.zeros((2, 600)), 60, "middle"), "beats"),
    ((np.zeros((2, 600)), 60, "foot", "guess"), "method"),
])
def test_bad_arguments_are_named(arguments, word):
    with pytest.raises(ValueError, match=word):
        labels.label_segments(*arguments)


def test_a_pair_of_unequal_length_is_refused():
    with pytest.raises(ValueError, match=r"abp and ppg .* \(1, 600\) and \(1, 601\)"):
        labels.signal_quality(np.zeros(600), np.zeros(601), FS)


def test_no_segments_give_no_labels():
    out = labels.label_segments(np.zeros((0, 3600)), FS)
    assert all(len(value) == 0 for value in out.values())
    assert len(labels.ppg_reasons(np.zeros((0, 3600)), FS)) == 0
    quality = labels.signal_quality(np.zeros((0, 3600)), np.zeros((0, 3600)), FS)
    assert all(len(value) == 0 for value in quality.values())


def test_a_ppg_in_any_unit_is_fine_and_its_faults_are_named(clean):
    ppg = (clean - clean.mean()) / clean.std()
    rng = np.random.default_rng(0)
    gap, flat, clipped = ppg.copy(), ppg.copy(), np.clip(ppg, -0.6, 0.6)
    gap[7] = np.nan
    flat[100:700] = 0.3
    stuck = ppg.copy()
    stuck[1000:1500] = ppg.max()
    rows = {"": 40 + 3 * ppg, "ppg_missing": gap, "ppg_flat": flat, "ppg_clipped": clipped,
            "ppg_no_pulse": rng.normal(size=3600), "ppg_saturated": stuck}
    masks = labels.ppg_reasons(np.stack(list(rows.values())), FS)
    assert masks[0] == 0
    for mask, name in zip(masks[1:], list(rows)[1:]):
        assert has(mask, name), name
    assert labels.ppg_reasons(1e-3 * ppg, FS)[0] == 0
    for dead in (np.zeros(3600), np.full(3600, np.nan), np.cumsum(rng.normal(size=3600))):
        assert labels.ppg_reasons(dead, FS)[0] != 0


def test_the_quality_of_a_pair_names_a_ppg_of_another_pulse():
    abp = np.stack([pulses(75)[0]] * 3)
    ppg = np.stack([0.02 * pulses(75, dicrotic=0.2)[0], 0.02 * pulses(95)[0],
                    np.random.default_rng(0).normal(size=3600)])
    out = labels.signal_quality(abp, ppg, FS)
    assert out["reason"][0] == 0
    assert has(out["reason"][1], "rate_mismatch") and has(out["reason"][2], "rate_mismatch")
    assert out["ppg_hr"][:2] == pytest.approx([75, 95], rel=0.02)
    assert set(out) == {"reason", *labels.QUALITY_FIELDS}
    for name in labels.QUALITY_FIELDS:
        assert out[name].dtype == np.float32 and out[name].shape == (3,)
    alone = labels.signal_quality(abp[1], ppg[1], FS)
    for name, value in alone.items():
        np.testing.assert_array_equal(value, out[name][1:2])


def test_a_pulse_deficit_in_an_arrhythmic_minute_is_no_mismatch():
    abp = pulses(90, jitter=0.25)[0]
    weak = signal.find_peaks(np.diff(pulses(90, jitter=0.25, dicrotic=0)[0]), height=1)[0]
    ppg = abp.copy()
    for at in weak[::5]:                        # every fifth pulse does not reach the finger
        ppg[at - 6:at + 30] = ppg[max(at - 7, 0)]
    steady, deficit = labels.signal_quality(np.stack([pulses(90)[0], abp]),
                                            np.stack([pulses(70)[0], ppg]), FS)["reason"]
    assert has(steady, "rate_mismatch") and not has(deficit, "rate_mismatch")


def test_an_arrhythmic_minute_a_damped_line_and_a_moved_finger_have_their_measures(clean):
    rng = np.random.default_rng(0)
    sharp = pulses(75)[0]
    damped = signal.sosfiltfilt(signal.butter(1, 1.5, fs=FS, output="sos"), sharp)
    shaken = clean + 30 * signal.sosfilt(
        signal.butter(2, [0.3, 4], "bandpass", fs=FS, output="sos"), rng.normal(size=3600))
    abp = np.stack([sharp, pulses(90, jitter=0.2)[0], damped, clean])
    ppg = np.stack([sharp, abp[1], damped, shaken])
    out = labels.signal_quality(abp, ppg, FS)
    assert out["beat_irregularity"][0] < 0.05 < labels.ARRHYTHMIC < out["beat_irregularity"][1]
    assert out["upstroke_s"][0] < 0.15 < out["upstroke_s"][2]
    assert out["ppg_quality"][0] > 0.99 and out["ppg_quality"][3] < 0.86


def test_the_template_match_ranks_segments_as_neurokit_does(clean):
    neurokit = pytest.importorskip("neurokit2")
    rng = np.random.default_rng(0)
    band = signal.butter(2, [0.3, 4], "bandpass", fs=FS, output="sos")
    ppg = np.stack([clean + size * signal.sosfilt(band, rng.normal(size=3600))
                    for size in np.linspace(0, 60, 6)])
    ours = labels.signal_quality(np.stack([clean] * 6), ppg, FS)["ppg_quality"]
    theirs = []
    for row in ppg:
        wave = neurokit.ppg_clean(row, sampling_rate=FS)
        peaks = neurokit.ppg_findpeaks(wave, sampling_rate=FS)["PPG_Peaks"]
        theirs.append(np.nanmean(neurokit.ppg_quality(wave, peaks, sampling_rate=FS,
                                                      method="templatematch")))
    assert stats.spearmanr(ours, theirs)[0] > 0.9


@pytest.mark.skipif(not RECORDINGS.exists(), reason="the shared recordings are not here")
@pytest.mark.parametrize("record, hr", [("v166s", 88), ("b659l", 39), ("a363l", 133),
                                        ("v248s", 76)])
def test_real_beats_are_counted_once_with_strong_dicrotic_waves(record, hr):
    wfdb = pytest.importorskip("wfdb")
    read = wfdb.rdrecord(str(RECORDINGS / record), smooth_frames=False)
    channel = read.sig_name.index("ABP")
    fs = read.fs * read.samps_per_frame[channel]
    abp = np.asarray(read.e_p_signal[channel])[2 * 60 * int(fs):3 * 60 * int(fs)]
    out = labels.label_segments(abp, fs)
    assert out["hr"][0] == pytest.approx(hr, abs=4)
