"""recordings.py: finding records, choosing channels, units and vitals, windows of one minute."""
import csv
import gzip
import os
import stat
import subprocess
import sys

import h5py
import numpy as np
import pytest

import recordings
from recordings import (
    Channel,
    RecordingError,
    check_vitals,
    find_recordings,
    plain_name,
    read_vitals,
    read_windows,
)

SHARED = os.path.join(os.path.dirname(__file__), "..", "..", "shared", "data")
needs_shared = pytest.mark.skipif(not os.path.isdir(SHARED), reason="no ../shared/data here")
LIMITS = {"map": (20, 200), "sbp": (30, 300), "dbp": (10, 200), "pp": (5, 200), "hr": (20, 250)}


def windows(path, **options):
    return read_windows(str(path), **{"fs": 60, "seconds": 60, "limits": LIMITS, **options})


def joined(recorded):
    """The blocks of a recording as one Minutes."""
    blocks = list(recorded)
    parts = [[{"": part} if isinstance(part, np.ndarray) else part for part in field]
             for field in zip(*blocks)]
    whole = [{key: np.concatenate([part[key] for part in field]) for key in field[0]}
             for field in parts]
    return recordings.Minutes(*(field.get("", field) for field in whole))


def pressure(t):
    """Pulses of 75 a minute: MAP about 86, DBP 62, SBP 122."""
    return 86 + 24 * np.sin(2 * np.pi * 1.25 * t) + 9 * np.sin(2 * np.pi * 2.5 * t + 1)


def light(t):
    return 1 + 0.4 * np.sin(2 * np.pi * 1.25 * t - 1)


def write_csv(path, seconds=130.0, fs=60, header="time_s,ABP,PPG", columns=(pressure, light),
              keep=None):
    """columns: functions of time, or of (time, row) for text cells."""
    t = np.arange(int(round(seconds * fs))) / fs
    made = []
    for column in columns:
        values = column(t)
        made.append([cell if isinstance(cell, str) else f"{cell:.4f}" for cell in values])
    rows = [",".join(cells) for cells in zip([f"{x:.5f}" for x in t], *made)]
    rows = rows if keep is None else [row for row, kept in zip(rows, keep(t)) if kept]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(header + "\n" + "\n".join(rows) + "\n")
    return path


def numbers(every_s, value):
    """A column with `value(k)` at every k x every_s seconds, and empty cells between."""
    return lambda t: ["" if abs(x / every_s - round(x / every_s)) > 1e-6
                      else str(value(round(x / every_s))) for x in t]


def write_wfdb(folder, name, samples, fs=125, signal="ABP", unit="/mmHg"):
    np.rint(np.asarray(samples) * 100).astype("<i2").tofile(os.path.join(folder, name + ".dat"))
    with open(os.path.join(folder, name + ".hea"), "w") as file:
        file.write(f"{name} 1 {fs} {len(samples)}\n{name}.dat 16 100{unit} 16 0 0 0 0 {signal}\n")


# ----------------------------------------------------------------------------------------- resample

def wave(t):
    """Band-limited, pulse-like, known at any time."""
    return (85 + 20 * np.sin(2 * np.pi * 1.3 * t) + 6 * np.sin(2 * np.pi * 5.2 * t + 1)
            + 2 * np.sin(2 * np.pi * 11 * t))


@pytest.mark.parametrize("fs", [62.4725, 124.945, 125.0013742, 250, 500])
def test_the_resampled_signal_is_right_to_the_sample_after_hours_at_any_rate(fs):
    t = np.arange(int(3 * 3600 * fs)) / fs
    out = recordings.resample(Channel(wave(t), fs, ""), 60, 3 * 3600 * 60)
    late = np.arange(out.size - 3600 * 5, out.size - 120)
    # A tenth of a sample late would be an error of up to 0.4 here.
    assert np.abs(out[late] - wave(late / 60)).max() < 0.01
    assert np.abs(out - wave(np.arange(out.size) / 60)).max() < 0.5  # the two ends


def test_what_lies_above_30_hz_is_filtered_out_before_it_can_fold_back():
    t = np.arange(60 * 250) / 250
    for frequency in (31, 50, 70, 110):
        out = recordings.resample(Channel(np.sin(2 * np.pi * frequency * t), 250, ""), 60, 3600)
        assert np.abs(out[300:-300]).max() < 1e-3
    out = recordings.resample(Channel(np.sin(2 * np.pi * 20 * t), 250, ""), 60, 3600)
    assert np.abs(out - np.sin(2 * np.pi * 20 * np.arange(3600) / 60))[300:-300].max() < 1e-2


@pytest.mark.parametrize("fs", [60, 124.945, 250])
def test_a_gap_stays_a_gap_and_leaves_its_surroundings_untouched(fs):
    t = np.arange(int(120 * fs)) / fs
    x = wave(t)
    x[(t > 50) & (t < 52)] = np.nan
    x[int(80 * fs)] = np.nan
    out = recordings.resample(Channel(x, fs, ""), 60, 7200)
    k = np.arange(7200) / 60
    missing = ~np.isfinite(out)
    assert missing[(k > 50) & (k < 52)].all()
    assert missing[np.abs(k - t[int(80 * fs)]) < 0.5 / fs].all()
    assert not missing[(np.abs(k - 51) > 1 + 3 / 60) & (np.abs(k - 80) > 3 / 60)].any()
    assert np.nanmax(np.abs(out - wave(k))) < 0.7  # no ringing next to the gap


@pytest.mark.parametrize("fs", [60, 124.945, 250])
def test_a_span_is_resampled_to_the_bit_as_the_whole_is(fs):
    x = wave(np.arange(int(480 * fs)) / fs)
    whole = recordings.resample(Channel(x, fs, ""), 60, 480 * 60)
    first, end = int(118 * fs), int(362 * fs)
    span = recordings.resample(Channel(x[first:end], fs, "", 0.0, first), 60, 14400, 7200)
    assert np.array_equal(span, whole[7200:7200 + 14400])


def test_a_channel_that_starts_late_is_placed_by_its_start():
    fs, start_s = 125, 7.3137
    t = start_s + np.arange(60 * fs) / fs
    out = recordings.resample(Channel(wave(t), fs, "", start_s), 60, 3600)
    k = np.arange(3600) / 60
    assert not np.isfinite(out[k < start_s - 0.01]).any()
    assert np.abs(out - wave(k))[k > start_s + 0.5].max() < 0.01


def test_a_60_hz_recording_is_passed_through_unchanged():
    x = np.random.default_rng(1).normal(size=7200).astype(np.float32)
    assert np.array_equal(recordings.resample(Channel(x.astype(float), 60.0, ""), 60, 7200), x)


# ------------------------------------------------------------------------------- names and channels

@pytest.mark.parametrize("name, kind", [
    ("ABP", "abp"), ("ART", "abp"), ("art1", "abp"), ("AOBP", "abp"), ("abp_mmhg", "abp"),
    ("SNUADC/ART", "abp"), ("ABP [mmHg]", "abp"), ("Radial", "abp"), ("ART_RAD", "abp"),
    ("abp_kpa", "abp"), ("ABP (mm Hg)", "abp"), ("ABP / mmHg", "abp"), ("ABP, mmHg", "abp"),
    ("PLETH", "ppg"), ("Pleth", "ppg"), ("ppg", "ppg"), ("SpO2 wave", "ppg"), ("Pleth [NU]", "ppg"),
    ("SNUADC/PLETH", "ppg"), ("waves/abp", "abp"), ("AR1", "abp"), ("NOM_PRESS_BLD_ART_ABP", "abp"),
    ("MDC_PRESS_BLD_ART", "abp"), ("Bx50/IBP1", "abp"), ("NOM_PULS_OXIM_PLETH", "ppg"),
    ("Solar8000/ART_MBP", "map"), ("ABP Mean", "map"), ("ABPm [mmHg]", "map"), ("ART(M)", "map"),
    ("ABP (Mean)", "map"), ("ARTm", "map"), ("ART(M) [kPa]", "map"), ("Mean ABP", "map"),
    ("ART_DBP", "dbp"), ("ART (D)", "dbp"), ("ABP Dias", "dbp"), ("ABPd [mmHg]", "dbp"),
    ("NOM_PRESS_BLD_ART_ABP_DIA", "dbp"), ("ABP Sys", "sbp"), ("Solar8000/ART_SBP", "sbp"),
    ("NBP Sys", "cuff_sbp"), ("NIBP_MBP", "cuff_map"), ("NBP (Mean)", "cuff_map"),
    ("NIBP Dias [mmHg]", "cuff_dbp"), ("HR [bpm]", "hr"), ("HR [beats/min]", "hr"),
    ("Solar8000/HR", "hr"), ("NOM_ECG_CARD_BEAT_RATE", "hr"),
])
def test_usual_names_are_recognised_with_their_units(name, kind):
    kinds = [other for other, aliases in recordings.CHANNELS.items() if plain_name(name) in aliases]
    assert kinds == [kind]


@pytest.mark.parametrize("name", ["SpO2", "PLETH_HR", "PAP", "CVP", "RAP", "P1", "ICP", "ART(MAX)"])
def test_other_names_are_not_taken_for_a_waveform(name):
    assert plain_name(name) not in recordings.CHANNELS["abp"] + recordings.CHANNELS["ppg"]


def test_a_mean_next_to_the_waveform_is_not_taken_for_it_whatever_the_order(tmp_path):
    path = write_csv(tmp_path / "a.csv", header="time_s,ART(M),ART,PPG",
                     columns=(numbers(1, lambda k: 86), pressure, light))
    recorded = windows(path)
    assert (recorded.chosen["abp"], recorded.chosen["map"]) == ("ART", "ART(M)")


def test_waveforms_and_numbers_are_told_apart_by_content_where_names_mislead(tmp_path):
    held = lambda t: 75 + np.floor(t / 7) % 3       # a number, repeated in every row
    path = write_csv(tmp_path / "a.csv", header="time_s,ABP,ABP wave,PPG,Pulse",
                     columns=(lambda t: 86 + held(t) / 75, pressure, light, light))
    recorded = windows(path)
    assert recorded.chosen["abp"] == "ABP wave" and "hr" not in recorded.chosen
    path = write_csv(tmp_path / "b.csv", header="time_s,MAP,PPG,HR",
                     columns=(pressure, light, held))
    recorded = windows(path)
    assert recorded.chosen == {"abp": "MAP", "ppg": "PPG", "hr": "HR"}
    assert "named like a number" in recorded.reasons["abp"]
    np.testing.assert_allclose(joined(recorded).numbers["hr"], 76, atol=0.2)


def test_channels_can_be_named_or_left_out_and_a_wrong_name_is_an_error(tmp_path):
    path = write_csv(tmp_path / "a.csv", header="time_s,ABP,P4,PPG,red",
                     columns=(pressure, pressure, light, light))
    recorded = windows(path, channels={"abp": "p4", "ppg": "red"})
    assert recorded.chosen == {"abp": "P4", "ppg": "red"}
    assert "abp" not in windows(path, channels={"abp": "none"}).chosen
    with pytest.raises(RecordingError, match="--abp-channel") as caught:
        windows(path, channels={"abp": "P5"})
    assert "P4" in caught.value.detail and "P4" not in caught.value.what
    slow = write_csv(tmp_path / "b.csv", fs=10)
    assert "10 samples/s" in windows(slow).reasons["ppg"]
    with pytest.raises(RecordingError, match="under 40 samples/s"):
        windows(slow, channels={"ppg": "PPG"})
    with pytest.raises(RecordingError, match="no PPG: numbers at 10 samples/s.*--ppg-channel"):
        list(windows(slow))


def test_hdf5_of_several_patients_is_not_mixed_up(tmp_path):
    with h5py.File(tmp_path / "w.h5", "w") as file:
        for patient in "ab":
            file[f"{patient}/abp"] = pressure(np.arange(9000) / 125) + (patient == "b")
            file[f"{patient}/ppg"] = light(np.arange(9000) / 125)
    with pytest.raises(RecordingError, match="named like the PPG; .*--ppg-channel PATH"):
        windows(tmp_path / "w.h5", file_fs=125)
    recorded = windows(tmp_path / "w.h5", file_fs=125, channels={"abp": "/b/abp", "ppg": "b/ppg"})
    assert joined(recorded).abp.mean() == pytest.approx(87, abs=0.1)


# ------------------------------------------------------------------------------------ units, vitals

@pytest.mark.parametrize("header, factor, unit", [
    ("ABP", 1, None), ("ABP [mmHg]", 1, None), ("ABP (kPa)", 7.50062, None),
    ("abp_kpa", 7.50062, None), ("ABP [cmH2O]", 0.735559, None), ("abp_cmh2o", 0.735559, None),
    ("ABP [hPa]", 0.750062, None),
    ("ABP [Torr]", 1, None), ("ABP", 7.50062, "kPa"), ("ABP [furlong]", 0.735559, "cmH2O"),
])
def test_the_pressure_is_converted_to_mmhg(tmp_path, header, factor, unit):
    path = write_csv(tmp_path / "a.csv", header=f"time_s,{header},PPG",
                     columns=(lambda t: pressure(t) / factor, light))
    recorded = windows(path, units={header: unit} if unit else None)
    assert joined(recorded).abp.mean() == pytest.approx(86, abs=0.02)


@pytest.mark.parametrize("header", ["ABP [furlong]", "ABP (mV)", "ABP [au]"])
def test_an_unknown_unit_of_the_pressure_is_an_error_that_names_the_option(tmp_path, header):
    path = write_csv(tmp_path / "a.csv", header=f"time_s,{header},PPG")
    with pytest.raises(RecordingError, match="--unit CHANNEL=UNIT") as caught:
        windows(path)
    assert header not in caught.value.what and header in caught.value.detail


def test_what_no_patient_has_is_refused():
    wrong = [0, -1, -5, 300, 999, -32768, 32767, 65535, 2**23 - 1, -2**23, 2**31 - 1, np.inf]
    times = np.arange(14.0)
    for key, factor, raw, fine in (("map", 7.50062, 11.5, 86.26), ("cuff_dbp", 1, 60, 60),
                                   ("hr", 60, 1.25, 75), ("spo2", 1, 98, 98)):
        readings, refused = check_vitals({key: (times, np.array([raw, *wrong, raw]), factor)},
                                         dict(LIMITS, spo2=(70, 100)))
        np.testing.assert_allclose(readings[key][1], [fine, fine], rtol=1e-3)
        assert readings[key][0].tolist() == [0, 13]
        assert refused[key].tolist() == list(range(1, 13))


@pytest.mark.parametrize("prefix", ["", "cuff_"])
def test_readings_that_contradict_each_other_are_both_refused(prefix):
    t = np.arange(4.0)
    readings = {"dbp": (t, np.array([60.0, 95, 60, 5]), 1), "map": (t + 9, np.full(4, 80.0), 1),
                "sbp": (t, np.array([120.0, 120, 70, 120]), 1)}
    readings = {prefix + key: reading for key, reading in readings.items()}
    _, refused = check_vitals(readings, LIMITS)
    assert refused[prefix + "dbp"].tolist() == [3]      # no MAP at that time
    readings[prefix + "map"] = t, *readings[prefix + "map"][1:]
    _, refused = check_vitals(readings, LIMITS)
    assert {key: times.tolist() for key, times in refused.items()} == {
        prefix + "dbp": [1, 3], prefix + "map": [1, 2], prefix + "sbp": [2]}


@pytest.mark.parametrize("wrong", [0, -1, 300, 8388607, -32768, 250])
def test_numbers_are_averaged_over_the_minute_without_what_is_refused(tmp_path, wrong):
    path = write_csv(tmp_path / "a.csv", 190, header="time_s,PPG,ABP Mean,ABP Dias,HR", columns=(
        light, numbers(1, lambda k: wrong if k % 3 == 0 else 86), numbers(1, lambda k: 68),
        numbers(2, lambda k: 75)))
    minutes = joined(windows(path))
    np.testing.assert_allclose(minutes.numbers["map"], [86, 86, 86])
    np.testing.assert_allclose(minutes.numbers["hr"], [75, 75, 75])
    assert minutes.refused["map"].tolist() == [20, 20, 20]
    assert minutes.refused["dbp"].tolist() == [0, 0, 0]


def test_a_cuff_s_reading_is_held_with_its_age_and_kept_apart_from_the_line_s(tmp_path):
    readings = {30: 100, 150: 80, 400: 90}
    cuff = lambda t: [str(readings[round(x, 4)]) if round(x, 4) in readings else "" for x in t]
    path = write_csv(tmp_path / "a.csv", 480, header="time_s,ABP,PPG,NIBP Mean,ABP Mean",
                     columns=(pressure, light, cuff, numbers(1, lambda k: 86)))
    recorded = windows(path)
    assert recorded.chosen["cuff_map"] == "NIBP Mean" and recorded.chosen["map"] == "ABP Mean"
    minutes = joined(recorded)
    assert minutes.numbers["cuff_map"].tolist() == [100, 100, 80, 80, 80, 80, 90, 90]
    assert minutes.number_age_s["cuff_map"].tolist() == [0, 30, 0, 30, 90, 150, 0, 20]
    assert set(minutes.numbers["map"]) == {86}


def test_a_vitals_table_is_checked_as_the_recording_s_numbers_are(tmp_path):
    same = {"map": ([0, 120, 360], [80, 90, 100]), "dbp": ([0, 120, 240], [60, 66, 70])}
    for text in ("time_s,map,dbp\n0,80,60\n120,90,66\n240,,70\n360,100,\n",
                 "time (min);MAP (kPa);DBP (kPa)\n0;10,6658;7,99934\n2;11,9990;8,79927\n"
                 "4;0;9,33256\n6;13,3322;\n",
                 "Time (ms),NIBP Mean [mmHg],NIBP Dias [mmHg]\n0,80,60\n120000,90,66\n"
                 "240000,8388607,70\n360000,100,-1\n"):
        (tmp_path / "v.csv").write_text(text)
        readings, refused = read_vitals(tmp_path / "v.csv", LIMITS)
        assert set(readings) == set(same)
        for key, (times, values) in same.items():
            np.testing.assert_allclose(readings[key][0], times)
            np.testing.assert_allclose(readings[key][1], values, rtol=1e-4)
    assert refused["map"].tolist() == [240] and refused["dbp"].tolist() == [360]
    (tmp_path / "v.csv").write_text("time_s,map,dbp\n0,70,90\n60,80,60\n")
    readings, refused = read_vitals(tmp_path / "v.csv", LIMITS)
    assert readings["map"][0].tolist() == [60] and refused["dbp"].tolist() == [0]


@pytest.mark.parametrize("text, complaint", [
    ("time_s,MAP [furlong]\n0,80\n60,90\n", "--unit CHANNEL=UNIT"),
    ("time_s,weight\n0,80\n60,90\n", "any of map"),
    ("time_s,map\n60,80\n0,90\n", "times of MAP do not increase"),
    ("map,dbp\n80,60\n", "no time column"),
])
def test_a_vitals_table_that_cannot_be_used_gets_one_line(tmp_path, text, complaint):
    (tmp_path / "v.csv").write_text(text)
    with pytest.raises(RecordingError, match=complaint):
        read_vitals(tmp_path / "v.csv", LIMITS)


# ------------------------------------------------------------------------------------------ windows

@pytest.mark.parametrize("fs", [60, 62.5, 100, 124.945, 125, 250, 500])
def test_no_minute_is_lost_to_rounding(tmp_path, fs):
    n = int(np.ceil(180 * fs - 1e-6))
    t = np.arange(n) / fs
    text = "".join(f"{a:.3f},{b:.3f},{c:.4f}\n" for a, b, c in zip(t, pressure(t), light(t)))
    (tmp_path / "a.csv").write_text("time_s,ABP,PPG\n" + text)
    recorded = windows(tmp_path / "a.csv")
    minutes = joined(recorded)
    assert minutes.start_s.tolist() == [0, 60, 120] and recorded.left_over_s < 0.01
    assert np.isfinite(minutes.ppg).all() and np.isfinite(minutes.abp).all()


@pytest.mark.parametrize("piece", [9000, 36000])
def test_a_new_window_begins_after_each_gap_and_pieces_change_nothing(tmp_path, monkeypatch, piece):
    monkeypatch.setattr(recordings, "PIECE", piece)
    monkeypatch.setattr(recordings, "BLOCK_WINDOWS", 2)
    path = write_csv(tmp_path / "a.csv", 700, keep=lambda t: ~(
        ((t > 100) & (t < 130)) | (np.abs(t - 200) < 0.001) | ((t > 290) & (t < 300))))
    recorded = windows(path)
    minutes = joined(recorded)
    starts = np.array([0, 130, 200, 300, 360, 420, 480, 540, 600])
    np.testing.assert_allclose(minutes.start_s, starts, atol=2.5 / 60)
    assert recorded.left_over_s == pytest.approx(160)
    np.testing.assert_allclose(minutes.start_s * 60, np.rint(minutes.start_s * 60), rtol=1e-12)
    t = minutes.start_s[:, None] + np.arange(3600) / 60
    np.testing.assert_allclose(minutes.abp, pressure(t), atol=1e-3)
    assert np.isfinite(minutes.ppg).all()


def test_a_gap_of_the_arterial_line_moves_a_window_only_where_that_gains_one(tmp_path):
    def line(t, *gaps):
        off = np.logical_or.reduce([(t > a) & (t < b) for a, b in gaps])
        return np.where(off, np.nan, pressure(t))

    def starts(*gaps, seconds=400):
        path = write_csv(tmp_path / "a.csv", seconds, columns=(lambda t: line(t, *gaps), light))
        return np.round(joined(windows(path)).start_s, 1).tolist()

    assert starts((10, 13)) == [0, 60, 120, 180, 240, 300]          # short
    assert starts((0, 20)) == [20, 80, 140, 200, 260, 320]
    assert starts((70, 85)) == [0, 85, 145, 205, 265, 325]
    assert starts((100, 1000)) == [0, 60, 120, 180, 240, 300]       # it does not come back
    assert starts((70, 85), (100, 130)) == [0, 60, 130, 190, 250, 310]  # not whole before 130


def test_sentinels_in_a_waveform_are_missing_samples(tmp_path):
    path = write_csv(tmp_path / "a.csv", columns=(
        lambda t: np.where(t < 3, -32768, pressure(t)),
        lambda t: np.where(t > 100, 8388607, light(t))))
    minutes = joined(windows(path))
    assert minutes.start_s.tolist() == [0] and np.isnan(minutes.abp[0, :180]).all()


@pytest.mark.parametrize("sign", [1, -1])
def test_an_inverted_ppg_is_turned_and_said(tmp_path, sign):
    path = write_csv(tmp_path / "a.csv", columns=(pressure, lambda t: sign * light(t)))
    calls = []

    def polarity(ppg, fs):
        calls.append(ppg.shape)
        return np.full(len(ppg), np.sign(ppg.mean()))

    recorded = windows(path, polarity=polarity)
    assert joined(recorded).ppg.mean() == pytest.approx(1, abs=0.01)
    assert calls == [(2, 3600)] and len(recorded.notes) == (sign < 0)


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="needs /proc/self/status")
def test_a_long_recording_is_read_in_little_more_memory_than_its_windows_need(tmp_path):
    """24 hours at 125 Hz: 173 MB as float64, which would show; 42 MB as windows."""
    t = np.arange(60 * 125) / 125
    minute = np.rint(np.stack([pressure(t), light(t)], 1) * 100).astype("<i2")
    np.tile(minute, (1440, 1)).tofile(tmp_path / "long.dat")
    (tmp_path / "long.hea").write_text(
        f"long 2 125 {1440 * 7500}\nlong.dat 16 100/mmHg 16 0 0 0 0 ABP\n"
        "long.dat 16 100/NU 16 0 0 0 0 PLETH\n")
    write_wfdb(tmp_path, "short", light(np.arange(9000) / 125), signal="PLETH", unit="")
    code = """if 1:
        import sys
        sys.path.insert(0, sys.argv[1])
        import recordings
        def peak():
            with open("/proc/self/status") as file:
                return next(int(line.split()[1]) for line in file if line.startswith("VmHWM")) >> 10
        def opened(path):
            return recordings.read_windows(path, fs=60, seconds=60, limits={})
        list(opened(sys.argv[3]))
        before, recorded = peak(), opened(sys.argv[2])
        for _ in range(2):
            print(sum(len(block.start_s) for block in recorded), peak() - before)"""
    done = subprocess.run([sys.executable, "-c", code, os.path.dirname(recordings.__file__),
                           str(tmp_path / "long.hea"), str(tmp_path / "short.hea")],
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for line in done.stdout.splitlines():
        assert int(line.split()[0]) == 1440 and int(line.split()[1]) < 120, done.stdout


# ------------------------------------------------------------------------------------------ finding

def names_of(found):
    return [os.path.basename(item.path) for item in found]


def test_a_folder_gives_its_recordings_in_sorted_order_and_none_twice(tmp_path):
    for name in ("b", "a"):
        write_wfdb(tmp_path, name, np.zeros(10))
    write_csv(tmp_path / "C.CSV", 1)
    (tmp_path / "out_problems.csv").write_text("# private\n")
    (tmp_path / "notes.txt").write_text("x")
    found = find_recordings([str(tmp_path / "b"), str(tmp_path), str(tmp_path / "a.dat")])
    assert names_of(found) == ["b.hea", "C.CSV", "a.hea"]
    assert [item.typed for item in found] == [str(tmp_path / "b"), str(tmp_path), str(tmp_path)]


def test_equal_names_in_different_folders_are_different_records(tmp_path):
    for patient in ("p1", "p2"):
        write_csv(tmp_path / patient / "waves.csv", 1)
    assert [item.name for item in find_recordings([tmp_path])] == ["p1/waves", "p2/waves"]
    assert [item.name for item in find_recordings([tmp_path / "p1" / "waves.csv"])] == ["waves"]


def test_linked_folders_are_followed_once_and_closed_ones_are_named(tmp_path):
    write_csv(tmp_path / "recs" / "a.csv", 1)
    write_csv(tmp_path / "disk" / "b.csv", 1)
    write_csv(tmp_path / "recs" / "closed" / "c.csv", 1)
    os.symlink("../disk", tmp_path / "recs" / "p2")
    os.symlink("..", tmp_path / "disk" / "round")
    os.symlink("../disk", tmp_path / "recs" / "p3")
    os.chmod(tmp_path / "recs" / "closed", 0)
    code = ("import sys; sys.path.insert(0, sys.argv[1]); import recordings as r\n"
            "found = r.find_recordings([sys.argv[2]])\n"
            "print(*(item.path for item in found), sep='\\n')\n"
            "r.read_windows(found[-1].path, fs=60, seconds=60, limits={})")
    command = [sys.executable, "-c", code, os.path.dirname(recordings.__file__), "recs"]
    drop = ["setpriv", "--bounding-set", "-dac_override,-dac_read_search"]
    try:
        done = subprocess.run(drop + command if os.geteuid() == 0 else command, cwd=tmp_path,
                              capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("setpriv is not here")
    finally:
        os.chmod(tmp_path / "recs" / "closed", stat.S_IRWXU)
    assert done.stdout.splitlines() == ["recs/a.csv", "recs/p2/b.csv", "recs/closed"]
    assert "a folder that cannot be opened" in done.stderr.splitlines()[-1]


def test_only_regular_files_are_opened_and_prepared_ones_refused(tmp_path):
    write_csv(tmp_path / "a.csv", 1)
    os.mkfifo(tmp_path / "pipe.hea")
    os.mkfifo(tmp_path / "pipe.csv")
    os.symlink("/dev/zero", tmp_path / "zero.csv")
    with h5py.File(tmp_path / "prepared.h5", "w") as file:
        file.attrs["layout_version"] = 1
    found = find_recordings([tmp_path])
    assert names_of(found) == ["a.csv", "pipe.csv", "pipe.hea", "prepared.h5", "zero.csv"]
    for item in (found[1], found[2], found[4]):
        with pytest.raises(RecordingError, match="not a regular file"):
            windows(item.path)
    with pytest.raises(RecordingError, match="prepared segments"):
        windows(tmp_path / "prepared.h5")


def test_a_name_that_is_not_utf8_is_read_and_printed(tmp_path):
    folder = os.fsencode(str(tmp_path))
    try:
        os.makedirs(os.path.join(folder, b"M\xfcller"))
    except OSError:
        pytest.skip("this file system wants UTF-8")
    path = write_csv(tmp_path / "a.csv")
    os.rename(path, os.path.join(folder, b"M\xfcller", b"a\xff.csv"))
    (found,) = find_recordings([tmp_path])
    recorded = windows(found.path)
    assert len(joined(recorded).start_s) == 2
    assert str(RecordingError(found.path, "x")).isprintable()


def test_a_tilde_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write_csv(tmp_path / "a.csv", 1)
    assert names_of(find_recordings(["~/a.csv"])) == names_of(find_recordings(["~"])) == ["a.csv"]


def test_an_input_that_is_not_there_and_an_empty_folder_are_errors(tmp_path):
    with pytest.raises(RecordingError, match="no such file"):
        find_recordings([str(tmp_path / "nothing")])
    with pytest.raises(RecordingError, match="no recording in this folder"):
        find_recordings([str(tmp_path)])
    (tmp_path / "x.txt").write_text("x")
    with pytest.raises(RecordingError, match="not a recording"):
        windows(tmp_path / "x.txt")


def test_segments_and_numerics_of_an_archive_are_no_recordings_of_their_own(tmp_path):
    """A tree like MIMIC's: records of many segments, numerics next to them."""
    for person, record in (("p001", "3000001"), ("p002", "3000002")):
        inner = tmp_path / person / record
        inner.mkdir(parents=True)
        for part in ("_0001", "_0002"):
            write_wfdb(inner, record + part, np.full(100, 80.0))
        (inner / f"{record}_layout.hea").write_text(
            f"{record}_layout 1 125 0\n~ 0 100/mmHg 16 0 0 0 0 ABP\n")
        (inner / f"{record}.hea").write_text(
            f"{record}/4 1 125 250\n{record}_layout 0\n{record}_0001 100\n~ 50\n"
            f"{record}_0002 100\n")
        write_wfdb(inner, record + "n", np.full(10, 80.0), fs=1, signal="HR")
    assert names_of(find_recordings([tmp_path])) == ["3000001.hea", "3000002.hea"]
    files = recordings.files_of(str(inner / f"{record}.hea"))
    assert [os.path.basename(file)[7:] for file in files] == [
        ".hea", "_0001.dat", "_0001.hea", "_0002.dat", "_0002.hea", "_layout.hea"]
    assert names_of(find_recordings([inner / f"{record}n"])) == [f"{record}n.hea"]


@pytest.mark.parametrize("ending, package", [(".hea", "wfdb"), (".vital", "vitaldb"),
                                             (".parquet", "pyarrow")])
def test_a_missing_package_is_named_with_its_install_line(tmp_path, monkeypatch, ending, package):
    path = tmp_path / ("DOE_JANE" + ending)
    write_wfdb(tmp_path, "DOE_JANE", np.zeros(10))
    if ending != ".hea":
        path.write_bytes(gzip.compress(b"VITA"))
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(RecordingError) as caught:
        windows(path)
    assert caught.value.what == (f"reading such files needs the package {package}: "
                                 "pip install -r requirements-extra.txt")


# ------------------------------------------------------------------------------ the real recordings

@needs_shared
def test_every_shared_recording_is_found_and_has_both_channels_at_the_rate_that_is_listed():
    with open(os.path.join(SHARED, "recordings.csv")) as file:
        rates = {row["record"]: float(row["fs_hz"]) for row in csv.DictReader(file)}
    found = find_recordings([os.path.join(SHARED, "wfdb")])
    assert {item.name for item in found} == set(rates)
    for item in found:
        recorded = windows(item.path)
        for kind in ("abp", "ppg"):
            channel = recorded.channels[recorded.chosen[kind]]
            assert channel.fs == pytest.approx(rates[item.name])


@needs_shared
def test_the_csv_holds_the_first_ten_minutes_of_the_wfdb_record():
    table = joined(windows(os.path.join(SHARED, "theatre_10min.csv")))
    record = joined(windows(os.path.join(SHARED, "wfdb", "waveformtools_sample_record.hea")))
    assert table.start_s.tolist() == record.start_s[:10].tolist()
    for name in ("abp", "ppg"):
        np.testing.assert_allclose(getattr(table, name)[:9], getattr(record, name)[:9], atol=0.02)
