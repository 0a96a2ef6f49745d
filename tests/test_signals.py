"""Beats, signal quality, delay, features and polarity of ABP and PPG."""
import pathlib
from dataclasses import replace

import numpy as np
import pytest
from scipy import signal, stats

import signals
import simulate

FS = 60
RECORDINGS = pathlib.Path(__file__).resolve().parents[2] / "shared" / "data"


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


def real_minutes(channel, folder="wfdb", pattern="[abtv]*.hea"):
    """Yield (minutes [N, samples], rate in Hz) of the shared recordings of up to 400 s; skips the
    test without them."""
    wfdb = pytest.importorskip("wfdb")
    if not RECORDINGS.exists():
        pytest.skip("the shared recordings are not here")
    for header in sorted((RECORDINGS / folder).glob(pattern)):
        name = str(header.with_suffix(""))
        record = wfdb.rdheader(name)
        if channel in (record.sig_name or []) and record.sig_len <= 400 * record.fs:
            read = wfdb.rdrecord(name, smooth_frames=False, channel_names=[channel])
            fs = int(read.fs * read.samps_per_frame[0])
            values = np.asarray(read.e_p_signal[0])
            yield values[:len(values) // (60 * fs) * 60 * fs].reshape(-1, 60 * fs), fs


def has(reason, name):
    return (reason >> signals.REASONS.index(name)) & 1 == 1


@pytest.fixture(scope="module")
def clean():
    return windkessel()


@pytest.mark.parametrize("hr", [35, 50, 75, 100, 140, 180])
@pytest.mark.parametrize("dicrotic", [0.0, 0.45])
def test_every_beat_counts_once_whatever_the_rate_and_the_dicrotic_wave(hr, dicrotic):
    pressure, beats = pulses(hr, dicrotic)
    feet, _ = signals.find_feet(pressure[None], FS)
    assert abs(len(feet) - beats) <= 2
    assert 60 * FS / np.median(np.diff(feet)) == pytest.approx(hr, rel=0.02)


def test_a_pair_of_unequal_length_is_refused():
    with pytest.raises(ValueError, match=r"abp and ppg .* \(1, 600\) and \(1, 601\)"):
        signals.signal_quality(np.zeros(600), np.zeros(601), FS)


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
    masks = signals.ppg_reasons(np.stack(list(rows.values())), FS)
    assert masks[0] == 0
    for mask, name in zip(masks[1:], list(rows)[1:]):
        assert has(mask, name), name
    assert signals.ppg_reasons(1e-3 * ppg, FS)[0] == 0
    for dead in (np.zeros(3600), np.full(3600, np.nan), np.cumsum(rng.normal(size=3600))):
        assert signals.ppg_reasons(dead, FS)[0] != 0


def test_the_quality_of_a_pair_names_a_ppg_of_another_pulse():
    abp = np.stack([pulses(75)[0]] * 3)
    ppg = np.stack([0.02 * pulses(75, dicrotic=0.2)[0], 0.02 * pulses(95)[0],
                    np.random.default_rng(0).normal(size=3600)])
    out = signals.signal_quality(abp, ppg, FS)
    assert out["reason"][0] == 0
    assert has(out["reason"][1], "rate_mismatch") and has(out["reason"][2], "rate_mismatch")
    assert out["ppg_hr"][:2] == pytest.approx([75, 95], rel=0.02)
    assert set(out) == {"reason", *signals.QUALITY_FIELDS}
    for name in signals.QUALITY_FIELDS:
        assert out[name].dtype == np.float32 and out[name].shape == (3,)
    alone = signals.signal_quality(abp[1], ppg[1], FS)
    for name, value in alone.items():
        np.testing.assert_array_equal(value, out[name][1:2])


def test_a_pulse_deficit_in_an_arrhythmic_minute_is_no_mismatch():
    abp = pulses(90, jitter=0.25)[0]
    weak = signal.find_peaks(np.diff(pulses(90, jitter=0.25, dicrotic=0)[0]), height=1)[0]
    ppg = abp.copy()
    for at in weak[::5]:                        # every fifth pulse does not reach the finger
        ppg[at - 6:at + 30] = ppg[max(at - 7, 0)]
    steady, deficit = signals.signal_quality(np.stack([pulses(90)[0], abp]),
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
    out = signals.signal_quality(abp, ppg, FS)
    assert out["beat_irregularity"][0] < 0.05 < signals.ARRHYTHMIC < out["beat_irregularity"][1]
    assert out["upstroke_s"][0] < 0.15 < out["upstroke_s"][2]
    assert out["ppg_quality"][0] > 0.99 and out["ppg_quality"][3] < 0.86


def test_the_template_match_ranks_segments_as_neurokit_does(clean):
    neurokit = pytest.importorskip("neurokit2")
    rng = np.random.default_rng(0)
    band = signal.butter(2, [0.3, 4], "bandpass", fs=FS, output="sos")
    ppg = np.stack([clean + size * signal.sosfilt(band, rng.normal(size=3600))
                    for size in np.linspace(0, 60, 6)])
    ours = signals.signal_quality(np.stack([clean] * 6), ppg, FS)["ppg_quality"]
    theirs = []
    for row in ppg:
        wave = neurokit.ppg_clean(row, sampling_rate=FS)
        peaks = neurokit.ppg_findpeaks(wave, sampling_rate=FS)["PPG_Peaks"]
        theirs.append(np.nanmean(neurokit.ppg_quality(wave, peaks, sampling_rate=FS,
                                                      method="templatematch")))
    assert stats.spearmanr(ours, theirs)[0] > 0.9


@pytest.mark.parametrize("record, hr", [("v166s", 88), ("b659l", 39), ("a363l", 133),
                                        ("v248s", 76)])
def test_real_beats_are_counted_once_with_strong_dicrotic_waves(record, hr):
    for minutes, fs in real_minutes("ABP", pattern=f"{record}.hea"):
        feet, _ = signals.find_feet(minutes[2:3], fs)
        assert 60 * fs / np.median(np.diff(feet)) == pytest.approx(hr, abs=4)


def test_no_segments_give_no_results():
    none = np.zeros((0, 3600))
    assert len(signals.ppg_reasons(none, FS)) == 0
    for found in (signals.signal_quality(none, none, FS), signals.ppg_features(none, FS)):
        assert all(len(value) == 0 for value in found.values())


def test_runs_are_those_of_a_loop():
    rng = np.random.default_rng(0)
    condition = rng.random((20, 99)) < 0.8
    expected = np.zeros((20, 100), bool)
    for row, steps in zip(expected, condition):
        for begin in range(99):
            end = begin
            while end < 99 and steps[end]:
                end += 1
            if end - begin >= 6:                # 0.1 s at 60 Hz
                row[begin:end + 1] = True
    np.testing.assert_array_equal(signals.runs(condition, 0.1, FS), expected)


def test_reasons_are_named_from_their_bits():
    mask = signals.reason_mask(2, {"abp_flat": np.array([True, False]),
                                   "rate_mismatch": np.array([True, False])})
    assert [signals.reason_names(one) for one in mask] == [["abp_flat", "rate_mismatch"], []]


# ------------------------------------------------------------------------------------------- delay

def pulse(t, delay_s=0.0):
    """A pressure-like wave, 72 beats/min, amplitude varying slowly."""
    t = t - delay_s
    phase = 2 * np.pi * 1.2 * t
    amplitude = 25 + 6 * np.sin(2 * np.pi * 0.03 * t)
    return 80 + amplitude * (np.sin(phase) + 0.4 * np.sin(2 * phase - 0.8))


def test_the_delay_of_simulated_patients_is_found():
    found, true, minutes = [], [], []
    settings = replace(simulate.DEFAULT, late_monitor_share=0.5)
    for number in range(10):
        fields = simulate.simulate_patient(3, number, 6, keep_abp=True, settings=settings)
        delay_s, strength, rows = signals.ppg_delay(fields["abp"], fields["ppg"], 60)
        assert strength >= signals.SURE_DELAY
        found.append(delay_s)
        true.append(fields["ppg_delay_s"][0])
        minutes.append(np.nanmax(np.abs(rows - delay_s)))
    assert np.ptp(true) > 0.5
    # The foot of the finger's pulse is itself a little later than the radial line's.
    np.testing.assert_allclose(np.array(found) - true, 0.0, atol=0.03)
    assert np.median(minutes) < 0.02


def test_a_rhythm_without_variation_leaves_a_beat_open_and_that_is_said():
    t = np.arange(6 * 3600) / 60

    def wave(late_s, wobble_s):
        s = t - late_s
        return pulse(s + wobble_s * np.sin(2 * np.pi * 0.013 * s)).reshape(6, 3600)

    for late_s in (0.25, 0.95):
        delay_s, strength, _ = signals.ppg_delay(wave(0, 0.3), wave(late_s, 0.3), 60)
        assert abs(delay_s - late_s) < 0.01 and strength > 0.3
    assert signals.ppg_delay(wave(0, 0), wave(0.25, 0), 60)[1] < signals.SURE_DELAY
    delay_s, strength, rows = signals.ppg_delay(wave(0, 0.3), np.full((6, 3600), np.nan), 60)
    assert np.isnan(delay_s) and strength == 0 and np.isnan(rows).all()


# ---------------------------------------------------------------------------------------- features

def regular_pulses(rate, seconds=60, fs=60, jitter=0.0, seed=0):
    """[1, samples]: a pulse wave of `rate` beats/min with a dicrotic wave; rhythm off by jitter."""
    rng = np.random.default_rng(seed)
    intervals = 60 / rate * np.exp(jitter * rng.normal(size=300))
    beats = np.append(0, np.cumsum(intervals))
    t = np.arange(seconds * fs) / fs
    beat = np.searchsorted(beats, t, side="right") - 1
    phase = (t - beats[beat]) / intervals[beat]
    wave = np.exp(-((phase - 0.2) / 0.09) ** 2) + 0.35 * np.exp(-((phase - 0.55) / 0.1) ** 2)
    return wave[None]


@pytest.mark.parametrize("rate", [50, 75, 130, 180])    # at 40 the dicrotic wave comes too late
def test_pulse_features_find_rate_and_rhythm_whatever_gain_and_offset_are(rate):
    wave = regular_pulses(rate)
    found = signals.ppg_features(np.concatenate([wave, 40 + 3000 * wave]))
    assert found["pulse_rate"] == pytest.approx([rate, rate], rel=0.03)
    assert (found["pulse_irregularity"] < 0.06).all() and (found["pulse_quality"] > 0.97).all()
    irregular = signals.ppg_features(regular_pulses(rate, jitter=0.15))
    assert irregular["pulse_irregularity"] > 0.1
    for name, (plain, scaled) in found.items():
        assert plain == pytest.approx(scaled, rel=1e-6, abs=1e-9), name


def test_a_slow_rise_and_a_wide_pulse_show_in_the_features():
    wave = regular_pulses(75)
    narrow, wide = (signals.ppg_features(one) for one in (wave, wave ** 0.5))
    assert wide["pulse_width_50_s"] > 1.2 * narrow["pulse_width_50_s"]
    assert wide["pulse_area"] > narrow["pulse_area"]
    assert narrow["pulse_harmonic_2"] > wide["pulse_harmonic_2"]


def test_without_beats_the_features_have_no_value():
    found = signals.ppg_features(np.stack([np.zeros(3600), np.linspace(0, 1, 3600)]))
    assert all(np.isnan(values[0]) for name, values in found.items())
    assert set(found) == set(signals.PPG_FEATURES)


# ---------------------------------------------------------------------------------------- polarity

def test_inverted_ppgs_of_virtual_patients_are_told_from_upright_ones():
    ppg = [simulate.simulate_patient(3, number, 2)["ppg"] for number in range(12)]
    for sign in (1, -1):
        assert [signals.ppg_polarity(sign * one, FS) for one in ppg] == [sign] * 12
        assert [signals.ppg_polarity(5 + sign * one[0], FS) for one in ppg] == [sign] * 12


@pytest.mark.parametrize("folder, pattern", [("wfdb", "[abtv]*.hea"),
                                             ("patients/wfdb", "b00[0-4]*.hea")])
def test_inverted_ppgs_of_real_recordings_are_told_from_upright_ones(folder, pattern):
    found = [(signals.ppg_polarity(minutes, fs), signals.ppg_polarity(-minutes, fs))
             for minutes, fs in real_minutes("PLETH", folder, pattern) if len(minutes)]
    upright, inverted = np.array(found).T
    assert len(found) > 20 and (upright >= 0).all() and (inverted <= 0).all()
    assert (upright == 1).mean() > 0.9 and (inverted == -1).mean() > 0.9


def test_noise_a_sine_and_nothing_have_no_polarity():
    t = np.arange(3600) / FS
    for wave in (np.random.default_rng(0).normal(size=(3, 3600)), np.sin(2 * np.pi * 1.2 * t),
                 np.zeros(3600), np.full((2, 3600), np.nan), np.zeros((0, 3600))):
        assert signals.ppg_polarity(wave, FS) == 0
