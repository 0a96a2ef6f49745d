"""Labels: the regressions, their errors, and what is refused."""
import warnings

import numpy as np
import pytest
from scipy import signal, stats
from test_signals import FS, has, pulses, real_minutes, windkessel

import labels
import signals


@pytest.fixture(scope="module")
def clean():
    return windkessel()


def test_slow_stroke_volume_variation_gives_the_true_closing_pressure(clean):
    out = labels.label_segments(clean, FS)
    assert out["reason"][0] == 0
    assert out["p_crit"][0] == pytest.approx(40, abs=3)
    assert out["r2"][0] > 0.85
    assert out["hr"][0] == pytest.approx(75, abs=0.3)
    assert out["map"][0] == pytest.approx(clean.mean(), abs=0.5)
    assert out["tpp"][0] == pytest.approx(out["map"][0] - out["p_crit"][0], abs=1e-4)
    assert out["pp"][0] == pytest.approx(out["sbp"][0] - out["dbp"][0], abs=1e-4)


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
    beats = signals.Beats(segment, rng.uniform(0.6, 1.1, 900), low + rng.uniform(10, 30, 900),
                          low + rng.uniform(30, 90, 900), low)
    with np.errstate(all="ignore"):             # of the segment without beats
        fit = labels.published(beats, 21)
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
    ours = labels.label_segments(abp, FS, method="published_peaks")
    literal = np.array([published_steps(row, FS) for row in abp])
    assert np.corrcoef(ours["p_crit"], literal[:, 0])[0, 1] > 0.99
    np.testing.assert_allclose(ours["p_crit"], literal[:, 0], atol=2)
    np.testing.assert_allclose(ours["n_beats"], literal[:, 2], atol=2)


def test_peak_to_peak_labels_of_real_segments_agree_with_the_literal_published_steps():
    ours, literal = [], []
    for minutes, fs in real_minutes("ABP"):
        minutes = minutes[::2]
        made = labels.label_segments(minutes, fs, method="published_peaks")
        for i in np.flatnonzero((made["reason"] == 0) & (made["r2"] > 0.5)
                                & np.isfinite(minutes).all(1)):
            if signals.signal_quality(minutes[i], minutes[i], fs)["beat_irregularity"] > 0.1:
                continue
            p_crit, r2, beats = published_steps(minutes[i], fs)
            if r2 > 0.5 and abs(beats - made["n_beats"][i]) <= 2:     # clean for both
                ours.append(made["p_crit"][i])
                literal.append(p_crit)
    assert len(ours) >= 10
    assert np.corrcoef(ours, literal)[0, 1] > 0.99


@pytest.mark.parametrize("method, within", [("published", 3), ("waveform_balance", 1)])
def test_each_method_finds_the_truth_without_noise(method, within):
    truth = [25, 40, 55]
    abp = np.stack([windkessel(p, hr=60 + 10 * i, seed=i) for i, p in enumerate(truth)])
    out = labels.label_segments(abp, FS, method=method)
    np.testing.assert_allclose(out["p_crit"], truth, atol=within)
    assert (np.abs(out["p_crit"] - truth) < 5 * out["p_crit_se"] + 1).all()
    for name in ("r2", "fit_rmse", "p_crit_se"):
        assert np.isfinite(out[name]).all()
    assert (out["n_beats"] > 50).all()


@pytest.mark.parametrize("method", labels.METHODS)
def test_no_signal_stops_a_method(method):
    rng = np.random.default_rng(0)
    t = np.arange(3600) / FS
    odd = np.stack([np.zeros(3600), np.full(3600, np.nan), 80 + 20 * rng.normal(size=3600),
                    80 + 40 * np.sin(2 * np.pi * 1.2 * t), np.cumsum(rng.normal(size=3600)),
                    np.where(t % 0.8 < 0.15, 120.0, 60.0)])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for rows in (odd, odd[:, :600], odd[:, :30], odd[:0]):
            out = labels.label_segments(rows, FS, method)
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
    beats = signals.Beats(np.zeros(30, int), np.full(30, 0.8), np.full(30, 80.0),
                          np.full(30, 120.0), np.full(30, 60.0))
    assert np.isnan(labels.published(beats, 1)["p_crit"][0])


@pytest.mark.parametrize("arguments, word", [
    ((np.zeros((2, 3, 600)), 60), "abp must be"),
    ((np.zeros((2, 600)), 30), "40 Hz"),
    ((np.zeros((2, 600)), float("nan")), "40 Hz"),
    ((np.zeros((2, 600)), 60, "published", "middle"), "beats"),
    ((np.zeros((2, 600)), 60, "guess"), "method"),
])
def test_bad_arguments_are_named(arguments, word):
    with pytest.raises(ValueError, match=word):
        labels.label_segments(*arguments)


def test_no_segments_give_no_labels():
    out = labels.label_segments(np.zeros((0, 3600)), FS)
    assert all(len(value) == 0 for value in out.values())
