"""recordings.py: finding records, choosing channels, units and vitals, windows of one minute."""
import gzip
import os
import sys
import tracemalloc

import h5py
import numpy as np
import pandas as pd
import pytest
from test_formats import write_wfdb

import recordings
from recordings import CHANNELS, Channel, RecordingError, check_vitals, find_recordings, plain_name

LIMITS = {"map": (20, 200), "sbp": (30, 300), "dbp": (10, 200), "pp": (5, 200), "hr": (20, 250)}


def windows(path, **options):
    return recordings.read_windows(str(path), fs=60, seconds=60, limits=LIMITS, **options)


def pressure(t):
    """Pulses of 75 a minute: MAP about 86, DBP 62, SBP 122."""
    return 86 + 24 * np.sin(2 * np.pi * 1.25 * t) + 9 * np.sin(2 * np.pi * 2.5 * t + 1)


def light(t):
    return 1 + 0.4 * np.sin(2 * np.pi * 1.25 * t - 1)


def write_csv(path, seconds=130.0, fs=60, columns=None, keep=None):
    """columns: {name: function of time}; keep: function of time that selects rows."""
    t = np.arange(int(round(seconds * fs))) / fs
    columns = columns or {"ABP": pressure, "PPG": light}
    table = pd.DataFrame({"time_s": t, **{name: column(t) for name, column in columns.items()}})
    path.parent.mkdir(parents=True, exist_ok=True)
    (table if keep is None else table[keep(t)]).round(5).to_csv(path, index=False)
    return path


def number(every_s, value):
    """A column with a number every `every_s` seconds and empty cells between."""
    return lambda t: np.where(np.abs(t / every_s - np.rint(t / every_s)) < 1e-6,
                              value(np.rint(t / every_s)) if callable(value) else value, np.nan)


def wave(t):
    """A band-limited, pulse-like signal."""
    return (85 + 20 * np.sin(2 * np.pi * 1.3 * t) + 6 * np.sin(2 * np.pi * 5.2 * t + 1)
            + 2 * np.sin(2 * np.pi * 11 * t))


@pytest.mark.parametrize("fs, start_s", [(62.4725, 0), (124.945, 0), (125.0013742, 0), (250, 0),
                                         (500, 0), (125, 7.3137)])
def test_resampling_is_exact_to_the_sample_after_an_hour_at_any_rate(fs, start_s):
    x = wave(start_s + np.arange(int(3600 * fs)) / fs)
    out, k = recordings.resample(Channel(x, fs, "", start_s), 60, 3600 * 60), np.arange(216000) / 60
    # A tenth of a sample late would be an error of up to 0.4 here.
    assert np.abs(out - wave(k))[(k > 3300) & (k < 3598)].max() < 0.01
    assert np.abs(out - wave(k))[k > start_s + 0.01].max() < 0.5    # the two ends
    assert not np.isfinite(out[k < start_s - 0.01]).any()


@pytest.mark.parametrize("frequency, left", [(20, 1), (31, 0), (50, 0), (70, 0), (110, 0)])
def test_frequencies_above_30_hz_are_removed_before_they_alias(frequency, left):
    x = np.sin(2 * np.pi * frequency * np.arange(60 * 250) / 250)
    out = recordings.resample(Channel(x, 250, ""), 60, 3600)
    expected = left * np.sin(2 * np.pi * frequency * np.arange(3600) / 60)
    assert np.abs(out - expected)[300:-300].max() < (1e-2 if left else 1e-3)


@pytest.mark.parametrize("fs", [60, 124.945, 250])
def test_a_span_is_resampled_bit_for_bit_like_the_whole(fs):
    x = wave(np.arange(int(480 * fs)) / fs)
    whole = recordings.resample(Channel(x, fs, ""), 60, 480 * 60)
    first, end = int(118 * fs), int(362 * fs)
    span = recordings.resample(Channel(x[first:end], fs, "", 0.0, first), 60, 14400, 7200)
    assert np.array_equal(span, whole[7200:7200 + 14400])
    assert fs != 60 or np.array_equal(whole, x.astype(np.float32))


@pytest.mark.parametrize("kind, names", [
    ("abp", ["Bx50/IBP1", "ART", "art1", "AOBP", "SNUADC/ART", "Radial", "ART_RAD", "ABP (mm Hg)",
             "ABP / mmHg", "ABP, mmHg", "AR1", "NOM_PRESS_BLD_ART_ABP", "MDC_PRESS_BLD_ART"]),
    ("ppg", ["Pleth", "ppg", "SpO2 wave", "Pleth [NU]", "SNUADC/PLETH", "NOM_PULS_OXIM_PLETH"]),
    ("map", ["Solar8000/ART_MBP", "ABP Mean", "ABPm [mmHg]", "ART(M)", "ABP (Mean)", "ARTm",
             "ART(M) [kPa]", "Mean ABP"]),
    ("dbp", ["ART_DBP", "ART (D)", "ABP Dias", "ABPd [mmHg]", "NOM_PRESS_BLD_ART_ABP_DIA"]),
    ("sbp", ["ABP Sys", "Solar8000/ART_SBP"]),
    ("hr", ["HR [bpm]", "HR [beats/min]", "Solar8000/HR", "NOM_ECG_CARD_BEAT_RATE", "PLETH_HR"]),
    ("cuff_map", ["NIBP_MBP", "NBP (Mean)"]), ("cuff_sbp", ["NBP Sys"]),
    ("cuff_dbp", ["NIBP Dias [mmHg]"]),
    ("", ["PAP", "CVP", "RAP", "P1", "ICP", "ART(MAX)", "PPG (ambient)"])])
def test_usual_names_are_recognised_with_their_units(kind, names):
    for name in names:
        kinds = [other for other in CHANNELS if plain_name(name) in CHANNELS[other]]
        assert kinds == [kind] * bool(kind), name


@pytest.mark.parametrize("columns, chosen", [
    ({"ART(M)": number(1, 86), "ART": pressure, "PPG": light},
     {"abp": "ART", "ppg": "PPG", "map": "ART(M)"}),
    ({"ABP": lambda t: 87 + np.floor(t / 7) % 3, "ABP wave": pressure, "PPG": light,
      "Pulse": light}, {"abp": "ABP wave", "ppg": "PPG"}),
    ({"ABP": lambda t: 0 * t, "ABP#2": pressure, "PPG": light}, {"abp": "ABP#2", "ppg": "PPG"}),
    ({"MAP": pressure, "PPG": light, "HR": lambda t: 75 + np.floor(t / 7) % 3},
     {"abp": "MAP", "ppg": "PPG", "hr": "HR"})])
def test_waveforms_and_numbers_are_told_apart_by_content_in_any_order(tmp_path, columns, chosen):
    recorded = windows(write_csv(tmp_path / "a.csv", columns=columns))
    assert recorded.chosen == chosen
    assert recorded.reasons["abp"].startswith("named like a number") == (chosen["abp"] == "MAP")


def test_channels_can_be_named_or_left_out_and_a_wrong_name_is_an_error(tmp_path):
    path = write_csv(tmp_path / "a.csv", columns={
        "ABP": pressure, "P4": pressure, "PPG": light, "red": light})
    assert windows(path, channels={"abp": "p4"}).chosen == {"abp": "P4", "ppg": "PPG"}
    assert windows(path, channels={"abp": "none", "ppg": "red"}).chosen == {"ppg": "red"}
    with pytest.raises(RecordingError, match="--abp-channel") as caught:
        windows(path, channels={"abp": "P5"})
    assert "P4" in caught.value.detail and "P4" not in caught.value.what
    slow = write_csv(tmp_path / "b.csv", fs=10)
    with pytest.raises(RecordingError, match="under 40 samples/s"):
        windows(slow, channels={"ppg": "PPG"})
    with pytest.raises(RecordingError, match="no PPG: numbers at 10 samples/s.*--ppg-channel"):
        list(windows(slow))


def test_hdf5_of_several_patients_is_not_mixed_up(tmp_path):
    t, path = np.arange(9000) / 125, tmp_path / "w.h5"
    with h5py.File(path, "w") as file:
        for offset, patient in enumerate("ab"):
            file[f"{patient}/abp"], file[f"{patient}/ppg"] = pressure(t) + offset, light(t)
    with pytest.raises(RecordingError, match="named like the PPG; .*--ppg-channel PATH"):
        windows(path, file_fs=125)
    recorded = windows(path, file_fs=125, channels={"abp": "/b/abp", "ppg": "b/ppg"})
    assert next(iter(recorded)).abp.mean() == pytest.approx(87, abs=0.1)


@pytest.mark.parametrize("name, factor, unit", [
    ("ABP", 1, None), ("ABP [mmHg]", 1, None), ("ABP (kPa)", 7.50062, None), ("ABP", 1, "Torr"),
    ("abp_kpa", 7.50062, None), ("ABP [cmH2O]", 0.735559, None), ("abp_cmh2o", 0.735559, None),
    ("ABP [hPa]", 0.750062, None), ("ABP", 7.50062, "kPa"), ("ABP [furlong]", 0.735559, "cmH2O"),
    ("ABP [furlong]", None, None), ("ABP (mV)", None, None), ("ABP [au]", None, None)])
def test_the_pressure_is_converted_to_mmhg_or_its_unit_is_asked_for(tmp_path, name, factor, unit):
    path = write_csv(tmp_path / "a.csv", 70, columns={
        name: lambda t: pressure(t) / (factor or 1), "PPG": light})
    if factor:
        for stated in {name, "ABP"}:        # --unit may give the whole name or the plain one
            recorded = windows(path, units={stated: unit} if unit else None)
            assert next(iter(recorded)).abp.mean() == pytest.approx(86, abs=0.02)
            assert not recorded.unknown_units
        return
    with pytest.raises(RecordingError, match="--unit CHANNEL=UNIT") as caught:
        windows(path)
    assert name not in caught.value.what and name in caught.value.detail


@pytest.mark.parametrize("key, factor, raw, fine", [
    ("map", 7.50062, 11.5, 86.26), ("cuff_dbp", 1, 60, 60), ("hr", 60, 1.25, 75),
    ("spo2", 1, 98, 98)])
def test_implausible_values_are_refused(key, factor, raw, fine):
    wrong = [0, -1, -5, 300, 999, -32768, 32767, 65535, 2**23 - 1, -2**23, 2**31 - 1, np.inf]
    reading = np.arange(14.0), np.array([raw, *wrong, raw]), factor
    readings, refused, implausible = check_vitals({key: reading}, {**LIMITS, "spo2": (70, 100)})
    assert not implausible
    np.testing.assert_allclose(readings[key], [[0, 13], [fine, fine]], rtol=1e-3)
    assert refused[key].tolist() == list(range(1, 13))


@pytest.mark.parametrize("prefix", ["", "cuff_"])
def test_readings_that_contradict_each_other_are_both_refused(prefix):
    def check(**pairs):
        readings = {prefix + key: (*np.array(pair, float), 1) for key, pair in pairs.items()}
        _, refused, implausible = check_vitals(readings, LIMITS)
        return [times.tolist() for times in refused.values()], implausible

    t, dbp, sbp = [0, 1, 2, 3], [60, 95, 60, 5], [120, 120, 70, 120]
    for map_times, expected in (([9, 10, 11, 12], [[3], [], []]), (t, [[1, 3], [1, 2], [2]])):
        refused, _ = check(dbp=(t, dbp), map=(map_times, [80, 80, 80, 80]), sbp=(t, sbp))
        assert refused == expected
    refused, implausible = check(dbp=([10], [90]), map=([0, 11], [95, 70]))
    assert refused == [[10], [11]]      # also one that comes later
    assert list(implausible) == [prefix + "dbp"]
    assert "(median 90, expected" in implausible[prefix + "dbp"]


def test_numbers_are_averaged_over_the_minute_and_cuff_readings_are_held_with_their_age(tmp_path):
    wrong = np.array([0, -1, 300, 8388607, -32768, 250])
    recorded = windows(write_csv(tmp_path / "a.csv", 480, columns={
        "ABP": pressure, "PPG": light, "ABP Dias": number(1, 68), "HR": number(2, 75),
        "ABP Mean": number(1, lambda k: np.where(k % 3, 86, wrong[(k // 3 % 6).astype(int)])),
        "NIBP Mean": lambda t: np.select([t == 30, t == 150, t == 400], [100, 80, 90], np.nan)}))
    assert recorded.chosen["cuff_map"] == "NIBP Mean" and recorded.chosen["map"] == "ABP Mean"
    (minutes,) = recorded
    for key, value, n_refused in (("map", 86, 20), ("dbp", 68, 0), ("hr", 75, 0)):
        np.testing.assert_allclose(minutes.numbers[key], value)
        assert set(minutes.refused[key]) == {n_refused} and set(minutes.number_age_s[key]) == {0}
    assert minutes.numbers["cuff_map"].tolist() == [100, 100, 80, 80, 80, 80, 90, 90]
    assert minutes.number_age_s["cuff_map"].tolist() == [0, 30, 0, 30, 90, 150, 0, 20]


@pytest.mark.parametrize("text, refused_s", [
    ("time_s,map,dbp\n0,80,60\n120,90,66\n240,,70\n360,100,\n", {"map": [], "dbp": []}),
    ("time (min);MAP (kPa);DBP (kPa)\n0;10,6658;7,99934\n2;11,9990;8,79927\n4;0;9,33256\n"
     "6;13,3322;\n", {"map": [240], "dbp": []}),
    ("Time (ms),NIBP Mean [mmHg],NIBP Dias [mmHg]\n0,80,60\n120000,90,66\n240000,8388607,70\n"
     "360000,100,-1\n400000,50,60\n", {"map": [240, 400], "dbp": [360, 400]})])
def test_a_vitals_table_is_checked_like_the_numbers_of_a_recording(tmp_path, text, refused_s):
    (tmp_path / "v.csv").write_text(text)
    readings, refused, _, _ = recordings.read_vitals(tmp_path / "v.csv", LIMITS)
    np.testing.assert_allclose(readings["map"], [[0, 120, 360], [80, 90, 100]], rtol=1e-4)
    np.testing.assert_allclose(readings["dbp"], [[0, 120, 240], [60, 66, 70]], rtol=1e-4)
    assert {key: times.tolist() for key, times in refused.items()} == refused_s


@pytest.mark.parametrize("text, complaint", [
    ("time_s,NIBP\n0,120/80\n60,110/70\n", "no row of numbers"),
    ("time_s,MAP [furlong]\n0,80\n60,90\n", "--unit CHANNEL=UNIT"),
    ("time_s,weight\n0,80\n60,90\n", "any of map"), ("map,dbp\n80,60\n", "no time column"),
    ("time_s,map\n60,80\n0,90\n", "times of MAP do not increase")])
def test_a_vitals_table_that_cannot_be_used_gets_a_one_line_error(tmp_path, text, complaint):
    (tmp_path / "v.csv").write_text(text)
    with pytest.raises(RecordingError, match=complaint):
        recordings.read_vitals(tmp_path / "v.csv", LIMITS)


@pytest.mark.parametrize("fs", [60, 62.5, 124.945, 250])
def test_no_minute_is_lost_to_rounding(tmp_path, fs):
    path = write_csv(tmp_path / "a.csv", np.ceil(180 * fs - 1e-6) / fs, fs)
    pd.read_csv(path).round({"time_s": 3}).to_csv(path, index=False)
    recorded = windows(path)
    (minutes,) = recorded
    assert minutes.start_s.tolist() == [0, 60, 120] and recorded.left_over_s < 0.01
    assert np.isfinite(minutes.ppg).all() and np.isfinite(minutes.abp).all()


@pytest.mark.parametrize("fs, piece, error", [(60, 9000, 1e-3), (60, 36000, 1e-3),
                                              (124.945, 9000, 0.5), (250, 36000, 0.5)])
def test_a_window_begins_after_each_gap_in_any_piece(tmp_path, monkeypatch, fs, piece, error):
    monkeypatch.setattr(recordings, "PIECE", piece)
    monkeypatch.setattr(recordings, "BLOCK_WINDOWS", 2)
    recorded = windows(write_csv(tmp_path / "a.csv", 700, fs, keep=lambda t: ~(
        ((t > 120.05) & (t < 130)) | (np.abs(t - 200) < 0.5 / fs) | ((t > 290) & (t < 300)))))
    start_s, ppg, abp = map(np.concatenate, list(zip(*recorded))[:3])
    starts = np.array([0, 60, 130, 200, 300, 360, 420, 480, 540, 600])
    np.testing.assert_allclose(start_s, starts, atol=2.5 / 60)
    assert recorded.left_over_s == pytest.approx(100, abs=0.01)
    np.testing.assert_allclose(start_s * 60, np.rint(start_s * 60), rtol=1e-12)
    t = start_s[:, None] + np.arange(3600) / 60
    np.testing.assert_allclose(abp, pressure(t), atol=error)    # also next to the gaps
    assert np.isfinite(ppg).all()


@pytest.mark.parametrize("gaps, starts", [
    ([(10, 13)], [0, 60, 120, 180, 240, 300]),              # short
    ([(0, 20)], [20, 80, 140, 200, 260, 320]),
    ([(70, 85)], [0, 85, 145, 205, 265, 325]),
    ([(100, 1000)], [0, 60, 120, 180, 240, 300]),           # it does not come back
    ([(70, 85), (100, 130)], [0, 60, 130, 190, 250, 310])])  # not whole before 130
def test_a_gap_of_the_arterial_line_moves_a_window_only_if_that_helps(gaps, starts):
    t = np.arange(400 * 60) / 60
    abp = np.where(np.any([(t > a) & (t < b) for a, b in gaps], axis=0), np.nan, pressure(t))
    assert np.round(recordings.cut(light(t), abp, 3600) / 60, 1).tolist() == starts


def test_sentinels_in_a_waveform_are_missing_samples(tmp_path):
    (minutes,) = windows(write_csv(tmp_path / "a.csv", columns={
        "ABP": lambda t: np.where(t < 3, -32768, pressure(t)),
        "PPG": lambda t: np.where(t > 100, 8388607, light(t))}))
    assert minutes.start_s.tolist() == [0] and np.isnan(minutes.abp[0, :180]).all()


@pytest.mark.parametrize("sign, notes", [(1, []), (-1, ["the PPG is inverted"]),
                                         (0, ["whether the PPG is inverted cannot be told"])])
def test_a_ppg_is_turned_as_a_whole_by_its_first_sure_part(tmp_path, monkeypatch, sign, notes):
    monkeypatch.setattr(recordings, "BLOCK_WINDOWS", 1)
    path = write_csv(tmp_path / "a.csv", 190, columns={"PPG": lambda t: light(t) + (t > 60)})
    recorded = windows(path, polarity=lambda wave, fs: sign * int(wave.mean() > 1.5))
    assert [block.ppg.mean() > 0 for block in recorded] == [sign >= 0] * 3
    assert [note.partition(" (")[0] for note in recorded.notes] == notes


def test_an_inverted_abp_is_reported_and_a_ppg_that_is_a_copy_of_it_refused(tmp_path):
    path = write_csv(tmp_path / "a.csv", columns={"ABP": lambda t: -pressure(t), "PPG": light})
    recorded = windows(path, polarity=lambda wave, fs: int(np.sign(np.nan_to_num(wave).mean())))
    assert next(iter(recorded)).abp.mean() < 0 and "ABP seems inverted" in recorded.notes[0]
    path = write_csv(tmp_path / "b.csv", columns={
        "ABP": pressure, "PPG": lambda t: 3 - 0.01 * pressure(t)})
    with pytest.raises(RecordingError, match="a copy of its ABP"):
        list(windows(path))


def test_a_long_recording_is_read_in_little_more_memory_than_its_windows_need(tmp_path):
    """Two hours at 500 Hz: 58 MB as float64; 4 MB as windows, and what a piece needs."""
    ppg = np.tile(light(np.arange(500 * 60) / 500), 120)
    write_wfdb(tmp_path, "long", ppg, 500, signal="PLETH", unit="")
    recorded = windows(tmp_path / "long.hea")
    tracemalloc.start()
    for _ in range(2):      # it can be read twice
        assert sum(len(block.start_s) for block in recorded) == 120
    peak_mb = tracemalloc.get_traced_memory()[1] / 1e6
    tracemalloc.stop()
    assert peak_mb < 40


def test_a_folder_gives_its_recordings_in_sorted_order_and_none_twice(tmp_path, monkeypatch):
    for name in ("b", "a"):
        write_wfdb(tmp_path, name, np.zeros(10))
    for patient in ("p1", "p2"):
        write_csv(tmp_path / patient / "C.CSV", 1)
    (tmp_path / "out_problems.csv").write_text("# private\n")
    (tmp_path / "notes.txt").write_text("x")
    monkeypatch.setenv("HOME", str(tmp_path))
    found = find_recordings([str(tmp_path / "b"), "~", str(tmp_path / "a.dat")])
    assert [(item.typed, item.name) for item in found] == [
        (str(tmp_path / "b"), "b"), ("~", "a"), ("~", "p1/C"), ("~", "p2/C")]


def test_linked_folders_are_followed_once_and_closed_ones_are_named(tmp_path, monkeypatch):
    for place in ("recs/a.csv", "disk/b.csv", "recs/closed/c.csv"):
        write_csv(tmp_path / place, 1)
    for link, target in (("recs/p2", "../disk"), ("disk/round", ".."), ("recs/p3", "../disk")):
        os.symlink(target, tmp_path / link)
    os.chmod(tmp_path / "recs" / "closed", 0)
    os.chmod(tmp_path, 0o755)
    monkeypatch.chdir(tmp_path)
    user = os.geteuid()
    os.seteuid(user or 65534)       # to root no folder is closed
    try:
        found = find_recordings(["recs"])
        with pytest.raises(RecordingError, match="a folder that cannot be opened"):
            windows(found[-1].path)
    finally:
        os.seteuid(user)
    assert [item.path for item in found] == ["recs/a.csv", "recs/p2/b.csv", "recs/closed"]


def test_only_regular_files_are_opened_and_prepared_ones_refused(tmp_path):
    for path in (tmp_path / "nothing", tmp_path):       # an empty folder
        with pytest.raises(RecordingError, match="no such file .* or no recording in this folder"):
            find_recordings([path])
    for name in ("pipe.hea", "pipe.csv"):
        os.mkfifo(tmp_path / name)
    os.symlink("/dev/zero", tmp_path / "zero.csv")
    with h5py.File(tmp_path / "prepared.h5", "w") as file:
        file.attrs["layout_version"] = 1
    (tmp_path / "x.txt").write_text("x")
    paths = [item.path for item in find_recordings([tmp_path, tmp_path / "x.txt"])]
    assert len(paths) == 5
    for path in paths:
        with pytest.raises(RecordingError, match="not a re|prepared segments"):
            windows(path)


def test_segments_and_numerics_of_an_archive_are_not_recordings(tmp_path):
    for part in ("_0001", "_0002"):
        write_wfdb(tmp_path, "3000001" + part, np.full(100, 80.0))
    write_wfdb(tmp_path, "3000001n", np.full(10, 80.0), fs=1, signal="HR")
    (tmp_path / "3000001.hea").write_text(
        "3000001/3 1 125 250\n3000001_0001 100\n~ 50\n3000001_0002 100\n")
    for typed, name in ((tmp_path, "3000001"), (tmp_path / "3000001n", "3000001n")):
        assert [item.name for item in find_recordings([typed])] == [name]
    files = recordings.files_of(str(tmp_path / "3000001.hea"))
    assert [os.path.basename(file)[len("3000001"):] for file in files] == [
        ".hea", "_0001.dat", "_0001.hea", "_0002.dat", "_0002.hea"]


@pytest.mark.parametrize("ending, package", [(".hea", "wfdb"), (".vital", "vitaldb"),
                                             (".parquet", "pyarrow")])
def test_a_missing_package_is_named_with_its_install_line(tmp_path, monkeypatch, ending, package):
    path = tmp_path / ("DOE_JANE" + ending)
    write_wfdb(tmp_path, "DOE_JANE", np.zeros(10))
    if ending != ".hea":
        path.write_bytes(gzip.compress(b"VITA"))
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(RecordingError, match=f"needs the package {package}: pip install -r"):
        windows(path)
