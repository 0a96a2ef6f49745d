"""Labels: the regressions, their errors, and what is refused."""
import warnings

import numpy as np
import pytest
from scipy import stats
from test_signals import FS, REAL_FS, real_minutes, windkessel

import labels
import signals


@pytest.mark.parametrize("fs", [40, 60, 250])
@pytest.mark.parametrize("method, within", [("published", 0.5), ("waveform_balance", 0.1)])
def test_each_method_finds_the_true_closing_pressure_at_any_rate(method, within, fs):
    truth, hr = [25, 40, 55], [60, 70, 80]
    abp = np.stack([windkessel(p, hr[i], fs, seed=i) for i, p in enumerate(truth)])
    out = labels.label_segments(abp, fs, method)
    assert not out["reason"].any()
    np.testing.assert_allclose(out["n_beats"], 0.9 * np.array(hr), atol=3)
    np.testing.assert_allclose(out["p_crit"], truth, atol=within)
    assert (np.abs(out["p_crit"] - truth) < 5 * out["p_crit_se"] + 1).all()
    assert (out["r2"] > 0.85).all() and (out["fit_rmse"] < 2).all()
    np.testing.assert_allclose(out["hr"], hr, atol=0.3)
    np.testing.assert_allclose(out["map"], abp.mean(1), atol=0.5)
    np.testing.assert_allclose(out["tpp"], out["map"] - out["p_crit"], atol=1e-4)
    np.testing.assert_allclose(out["pp"], out["sbp"] - out["dbp"], atol=1e-4)


def test_the_regression_equals_one_segment_at_a_time_with_numpy_and_scipy():
    rng = np.random.default_rng(1)
    segment, low = np.sort(rng.integers(0, 20, 900)), rng.uniform(40, 70, 900)
    beats = signals.Beats(segment, rng.uniform(0.6, 1.1, 900), low + rng.uniform(10, 30, 900),
                          low + rng.uniform(30, 90, 900), low, low)
    with np.errstate(all="ignore"):             # of the segment without beats
        fit = labels.published(beats, 21)
    for i in range(20):
        x, y = beats.flow[segment == i], beats.map[segment == i]
        keep = (x >= np.percentile(x, 5)) & (x <= np.percentile(x, 95))
        line = stats.linregress(x[keep], y[keep])
        rest = y[keep] - line.intercept - line.slope * x[keep]
        assert fit["n_beats"][i] == keep.sum()
        assert fit["p_crit"][i] == pytest.approx(line.intercept, rel=1e-9)
        assert fit["p_crit_se"][i] == pytest.approx(line.intercept_stderr, rel=1e-9)
        assert fit["r2"][i] == pytest.approx(line.rvalue ** 2, rel=1e-6, abs=1e-12)
        assert fit["fit_rmse"][i] == pytest.approx(np.sqrt(np.mean(rest ** 2)), rel=1e-9)
    assert np.isnan(fit["p_crit"][20])
    same = signals.Beats(*(np.full(30, value) for value in (0, 0.8, 80.0, 120.0, 60.0, 1.0)))
    assert np.isnan(labels.published(same, 1)["p_crit"][0])


def published_steps(row):
    """(Pcrit, number of beats) by the published steps as the paper has them, but foot to foot."""
    feet = signals.find_feet(row[None], REAL_FS)[0].round().astype(int)
    flow, pressure = [], []
    for first, last in zip(feet[:-1], feet[1:]):
        beat = row[first:last]
        flow.append((beat.max() - beat.min()) * 60 * REAL_FS / (last - first))
        pressure.append(beat.mean())
    flow, pressure = np.array(flow), np.array(pressure)
    keep = (flow >= np.percentile(flow, 5)) & (flow <= np.percentile(flow, 95))
    return np.polyfit(flow[keep], pressure[keep], 1)[1], keep.sum()


def test_labels_of_real_segments_agree_with_the_literal_published_steps(recordings):
    pairs = []
    for abp, ppg in real_minutes(recordings):
        made = labels.label_segments(abp, REAL_FS)
        regular = signals.signal_quality(abp, ppg, REAL_FS)["beat_irregularity"] < 0.1
        for i in np.flatnonzero((made["r2"] > 0.5) & regular & np.isfinite(abp).all(1)):
            p_crit, beats = published_steps(abp[i])
            if beats == made["n_beats"][i]:                 # all are valid
                pairs.append((made["p_crit"][i], p_crit))
    assert len(pairs) >= 20 and np.corrcoef(np.array(pairs).T)[0, 1] > 0.99


@pytest.mark.parametrize("method", labels.METHODS)
def test_no_method_fails_on_odd_signals(method):
    rng = np.random.default_rng(0)
    t = np.arange(3600) / FS
    odd = np.stack([np.zeros(3600), np.full(3600, np.nan), 80 + 20 * rng.normal(size=3600),
                    80 + 40 * np.sin(2 * np.pi * 1.2 * t), np.cumsum(rng.normal(size=3600)),
                    np.where(t % 0.8 < 0.15, 120.0, 60.0)])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for rows in (odd, odd[:, :600], odd[:, :30], odd[:0]):
            out = labels.label_segments(rows, FS, method)
            assert len(out["p_crit"]) == len(rows)
            np.testing.assert_array_equal(np.isnan(out["p_crit"]), out["reason"] != 0)


def test_a_segment_has_the_same_label_alone_and_in_several_blocks():
    rows = np.stack([windkessel(30), np.full(3600, np.nan), windkessel(50, hr=90)])
    together = labels.label_segments(np.tile(rows, (100, 1)), FS)
    for i in range(3):
        for name, value in labels.label_segments(rows[i], FS).items():
            np.testing.assert_array_equal(together[name][i::3], np.repeat(value, 100))


@pytest.mark.parametrize("gap", [np.nan, 290.0])            # no signal; a flush
def test_a_short_fault_costs_its_beats_and_not_the_label(gap):
    clean, spoiled = windkessel(), windkessel()
    spoiled[1000:1200] = gap
    out = labels.label_segments(np.stack([clean, spoiled]), FS)
    assert not out["reason"].any() and 3 <= out["n_beats"][0] - out["n_beats"][1] <= 7
    assert abs(np.diff(out["map"])) < 1 and abs(np.diff(out["p_crit"])) < 3


def test_a_bad_segment_has_its_reason_and_no_label():
    clean, bad = windkessel(), slice(500, 1500)
    noise = np.random.default_rng(0).normal(size=3600)
    rows = {f"abp_{name}": clean.copy() for name in ("missing", "flat", "flush", "saturated")}
    rows["abp_missing"][bad], rows["abp_flat"][bad] = np.nan, clean[500]
    rows["abp_flush"][bad], rows["abp_saturated"][bad] = 295 + noise[bad], clean.max() + 60
    rows.update(abp_clipped=np.minimum(clean, np.percentile(clean, 80)), few_beats=80 + noise,
                abp_range=8 + (clean - clean.mean()) * 0.67)        # a venous pressure
    out = labels.label_segments(np.stack([clean, *rows.values()]), FS)
    assert out["reason"][0] == 0 and np.isfinite([out[field][0] for field in labels.FIELDS]).all()
    for mask, name in zip(out["reason"][1:], rows):
        assert name in signals.reason_names(mask)
    assert np.isnan([out[field][1:] for field in labels.FIELDS]).all()


@pytest.mark.parametrize("arguments, word", [
    ((np.zeros((2, 3, 600)), 60), "abp must be"), ((np.zeros((2, 600)), 30), "40 Hz"),
    ((np.zeros((2, 600)), float("nan")), "40 Hz"), ((np.zeros((2, 600)), 60, "guess"), "method")])
def test_bad_arguments_are_named(arguments, word):
    with pytest.raises(ValueError, match=word):
        labels.label_segments(*arguments)
