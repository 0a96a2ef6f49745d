"""Beats, signal quality, delay, features and polarity of ABP and PPG."""
import pathlib
from dataclasses import replace

import numpy as np
import pytest
from scipy import signal

import signals
import simulate
from datasets import FS, WINDOW
from recordings import read_windows

REAL_FS = 125


def windkessel(p_crit=40.0, hr=75.0, fs=FS, seed=0):
    """ABP of the simulator's Windkessel, driven by half sines of slowly varying stroke volume."""
    rng = np.random.default_rng(seed)
    impedance, ejection, lead = 0.05, 0.28, 6
    t = np.arange((60 + lead) * simulate.FS_SIM) / simulate.FS_SIM
    beat = (t * hr / 60).astype(int)
    phase = (t - beat * 60 / hr) / ejection
    stroke = 65 * (1 + 0.15 * np.sin(2 * np.pi * 0.03 * beat * 60 / hr)
                   + 0.005 * rng.normal(size=beat[-1] + 1)[beat])
    flow = np.sin(np.pi * np.clip(phase, 0, 1)) * stroke * np.pi / 2 / ejection
    pressure = simulate.windkessel(flow, np.full(len(t), p_crit),
                                   {"resistance": 0.45, "compliance": 1.2})
    return np.interp(lead + np.arange(60 * fs) / fs, t, pressure + impedance * flow)


def pulses(hr, dicrotic=0.4, seconds=60, jitter=0.02, seed=0):
    """(pressure, number of beats): sharp systolic waves with a large dicrotic wave on a decay."""
    rng = np.random.default_rng(seed)
    interval = 60 / hr * (1 + jitter * rng.normal(size=int(seconds * hr / 60) + 4))
    onset = np.cumsum(interval) - 60 / hr
    since = np.arange(seconds * FS) / FS - onset[:, None]       # [beats, samples]
    width = min(0.06, 0.12 * 60 / hr)
    wave = (25.0 * np.exp(-since.clip(0) / 0.6) * (since > 0)   # diastole falls
            + 60.0 * np.exp(-0.5 * (since / width - 2.5) ** 2)
            + dicrotic * 60.0 * np.exp(-0.5 * (since / width - 7.5) ** 2))
    return 60.0 + wave.sum(0), int(((onset > 0) & (onset < seconds - 60 / hr)).sum())


def real_minutes(folder, pattern="[abtv]*.hea"):
    """Yield (abp, ppg), [N, samples] each, of the real recordings at REAL_FS."""
    pytest.importorskip("wfdb")
    for path in sorted(pathlib.Path(folder, "wfdb").glob(pattern)):
        for minutes in read_windows(path, **{**WINDOW, "fs": REAL_FS}):
            yield minutes.abp, minutes.ppg


@pytest.mark.parametrize("hr", [35, 50, 75, 100, 140, 180])
def test_every_beat_counts_once_at_any_rate_with_or_without_a_dicrotic_wave(hr):
    for pressure, beats in (pulses(hr, dicrotic=0), pulses(hr, dicrotic=0.45)):
        feet, _ = signals.find_feet(pressure[None], FS)
        assert abs(len(feet) - beats) <= 2
        assert 60 * FS / np.median(np.diff(feet)) == pytest.approx(hr, rel=0.02)


def test_a_ppg_in_any_unit_is_fine_and_its_faults_are_named():
    ppg = windkessel() - 80
    rng = np.random.default_rng(0)
    gap, flat, stuck = ppg.copy(), ppg.copy(), ppg.copy()
    gap[7], flat[100:700], stuck[1000:1500] = np.nan, 5.0, ppg.max()
    faulty = {"ppg_missing": gap, "ppg_flat": flat, "ppg_clipped": np.clip(ppg, -10, 10),
              "ppg_no_pulse": rng.normal(size=3600), "ppg_saturated": stuck}
    for mask, name in zip(signals.ppg_reasons(np.stack(list(faulty.values())), FS), faulty):
        assert name in signals.reason_names(mask)
    assert not signals.ppg_reasons(np.stack([40 + 3 * ppg, 1e-3 * ppg]), FS).any()
    spike = ppg.copy()
    spike[1800:1806] += 30 * np.ptp(ppg)
    assert signals.reason_names(signals.ppg_reasons(spike[None], FS)[0]) == ["ppg_no_pulse"]
    dead = np.stack([np.zeros(3600), np.full(3600, np.nan), np.cumsum(rng.normal(size=3600))])
    assert signals.ppg_reasons(dead, FS).all()


def test_the_quality_of_a_pair_names_a_ppg_of_another_pulse():
    abp = np.stack([pulses(75)[0]] * 3)
    ppg = np.stack([0.02 * pulses(75, dicrotic=0.2)[0], 0.02 * pulses(95)[0],
                    np.random.default_rng(0).normal(size=3600)])
    out = signals.signal_quality(abp, ppg, FS)
    assert out["reason"][0] == 0
    assert "rate_mismatch" in signals.reason_names(out["reason"][1] & out["reason"][2])
    assert out["ppg_hr"][:2] == pytest.approx([75, 95], rel=0.02)
    assert list(out) == ["reason", *signals.QUALITY_FIELDS]
    for name, value in signals.signal_quality(abp[0], ppg[0], FS).items():     # alone
        np.testing.assert_array_equal(value, out[name][:1])


def test_a_pulse_deficit_in_an_arrhythmic_minute_is_no_mismatch():
    abp = pulses(90, jitter=0.25)[0]
    weak = signal.find_peaks(np.diff(pulses(90, jitter=0.25, dicrotic=0)[0]), height=1)[0]
    ppg = abp.copy()
    for at in weak[::5]:                        # every fifth pulse does not reach the finger
        ppg[at - 6:at + 30] = ppg[max(at - 7, 0)]
    steady, deficit = signals.signal_quality(np.stack([pulses(90)[0], abp]),
                                            np.stack([pulses(70)[0], ppg]), FS)["reason"]
    assert signals.reason_names(steady) == ["rate_mismatch"] and deficit == 0


def test_the_measures_show_arrhythmia_a_damped_line_and_a_moved_finger():
    sharp, arrhythmic, clean = pulses(75)[0], pulses(90, jitter=0.2)[0], windkessel()
    damped = signal.sosfiltfilt(signal.butter(1, 1.5, fs=FS, output="sos"), sharp)
    motion = signal.sosfilt(signal.butter(2, [0.3, 4], "bandpass", fs=FS, output="sos"),
                            np.random.default_rng(0).normal(size=3600))
    abp = np.stack([sharp, arrhythmic, damped, clean])
    out = signals.signal_quality(abp, np.stack([*abp[:3], clean + 30 * motion]), FS)
    assert out["beat_irregularity"][0] < 0.05 < signals.ARRHYTHMIC < out["beat_irregularity"][1]
    assert out["upstroke_s"][0] < 0.15 < out["upstroke_s"][2]
    assert out["ppg_quality"][0] > 0.99 and out["ppg_quality"][3] < 0.86


def test_real_beats_are_counted_once_with_strong_dicrotic_waves(recordings):
    for record, hr in (("v166s", 88), ("b659l", 39), ("a363l", 133)):
        (abp, _), = real_minutes(recordings, f"{record}.hea")
        feet, _ = signals.find_feet(abp[2:3], REAL_FS)
        assert 60 * REAL_FS / np.median(np.diff(feet)) == pytest.approx(hr, abs=4)


def test_no_segments_give_no_results_and_a_pair_of_unequal_length_is_refused():
    none = np.zeros((0, 3600))
    assert all(len(value) == 0 for value in signals.signal_quality(none, none, FS).values())
    with pytest.raises(ValueError, match=r"abp and ppg .* \(1, 600\) and \(1, 601\)"):
        signals.signal_quality(np.zeros(600), np.zeros(601), FS)


def test_each_row_is_searched_alone_and_an_upstroke_cut_by_its_start_has_no_foot():
    wave, first = pulses(75, seconds=240)[0], []
    rows = wave[:75 * 192].reshape(75, 192)     # 3.2 s: the cut falls anywhere within a beat
    foot, row = signals.find_feet(rows, FS)
    for number in range(len(rows)):
        np.testing.assert_array_equal(signals.find_feet(rows[number:number + 1], FS)[0],
                                      foot[row == number])
        first.append(foot[row == number][0])
    assert min(first) >= 0.5
    whole, _ = signals.find_feet(wave[None], FS)
    nearest = np.abs(whole[:, None] - (foot + 192 * row)).min(0)
    assert nearest.max() < 0.2


def test_runs_equal_a_plain_loop():
    condition = np.random.default_rng(0).random((20, 99)) < 0.8
    expected = np.zeros((20, 100), bool)
    for row, steps in zip(expected, condition):
        for begin in range(94):
            if steps[begin:begin + 6].all():    # 0.1 s at 60 Hz
                row[begin:begin + 7] = True
    np.testing.assert_array_equal(signals.runs(condition, 0.1, FS), expected)


def test_the_delay_of_simulated_patients_is_found():
    settings, true = replace(simulate.DEFAULT, late_monitor_share=0.5), []
    for number in range(6):
        fields = simulate.simulate_patient(3, number, 6, keep_abp=True, settings=settings)
        delay_s, strength, minutes_s = signals.ppg_delay(fields["abp"], fields["ppg"], 60)
        assert strength >= signals.SURE_DELAY
        # The foot of the finger's pulse is itself a little later than the radial line's.
        assert delay_s == pytest.approx(fields["ppg_delay_s"][0], abs=0.03)
        assert np.nanmedian(np.abs(minutes_s - delay_s)) < 0.02
        true.append(fields["ppg_delay_s"][0])
    assert np.ptp(true) > 0.5


def test_the_delay_is_unsure_by_a_beat_if_the_rhythm_does_not_vary():
    (steady, _), (varied, _) = (pulses(72, seconds=361, jitter=jitter) for jitter in (0, 0.05))

    def delay(abp, late):
        minutes = [wave.reshape(6, 3600) for wave in (abp[60:], abp[60 - late:-late])]
        return signals.ppg_delay(*minutes, FS)[:2]

    for late in (15, 57):
        delay_s, strength = delay(varied, late)
        assert delay_s == pytest.approx(late / FS, abs=0.01) and strength > 0.3
    assert delay(steady, 15)[1] < signals.SURE_DELAY
    unknown = signals.ppg_delay(varied[60:].reshape(6, 3600), np.full((6, 3600), np.nan), FS)
    assert np.isnan(unknown[0]) and unknown[1] == 0 and np.isnan(unknown[2]).all()


def test_inverted_ppgs_of_virtual_patients_are_recognised():
    for number in range(8):
        ppg = simulate.simulate_patient(3, number, 2)["ppg"]
        assert signals.ppg_polarity(ppg, FS) == signals.ppg_polarity(5 + ppg[0], FS) == 1
        assert signals.ppg_polarity(-ppg, FS) == signals.ppg_polarity(5 - ppg[0], FS) == -1


def test_inverted_ppgs_of_real_recordings_are_recognised(recordings):
    found = [(signals.ppg_polarity(ppg, REAL_FS), signals.ppg_polarity(-ppg, REAL_FS))
             for _, ppg in real_minutes(recordings)]
    assert len(found) > 20 and set(found) <= {(1, -1), (0, 0)}
    assert np.mean(found, axis=0) == pytest.approx([1, -1], abs=0.1)


def test_noise_a_sine_and_nothing_have_no_polarity():
    t = np.arange(3600) / FS
    for wave in (np.random.default_rng(0).normal(size=(3, 3600)), np.sin(2 * np.pi * 1.2 * t),
                 np.zeros(3600), np.full((2, 3600), np.nan), np.zeros((0, 3600))):
        assert signals.ppg_polarity(wave, FS) == 0
