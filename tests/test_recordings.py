"""recordings.py: what is read from WFDB and CSV files, and how it is resampled."""
import os
import subprocess
import sys

import numpy as np
import pytest

import recordings
from recordings import Channel, RecordingError, choose_channel, find_recordings, read_recording

SHARED = os.path.join(os.path.dirname(__file__), "..", "..", "shared", "data")
needs_shared = pytest.mark.skipif(not os.path.isdir(SHARED), reason="no ../shared/data here")


def write_wfdb(folder, name, samples, fs=125, units="mmHg", signal="ABP", gain=100):
    """A one-signal WFDB record in format 16, NaN included, without the wfdb package."""
    digital = np.where(np.isfinite(samples), np.rint(np.nan_to_num(samples) * gain), -32768)
    digital.astype("<i2").tofile(os.path.join(folder, name + ".dat"))
    with open(os.path.join(folder, name + ".hea"), "w") as file:
        file.write(f"{name} 1 {fs} {len(samples)}\n"
                   f"{name}.dat 16 {gain}/{units} 16 0 0 0 0 {signal}\n")
    return os.path.join(folder, name + ".hea")


def write_csv(path, text):
    path.write_text(text)
    return str(path)


def wave(t):
    """Band-limited, pulse-like, known at any time."""
    return (85 + 20 * np.sin(2 * np.pi * 1.3 * t) + 6 * np.sin(2 * np.pi * 5.2 * t + 1)
            + 2 * np.sin(2 * np.pi * 11 * t))


# -------------------------------------------------------------------------------------- resample

@pytest.mark.parametrize("fs", [62.4725, 124.945, 125.0013742, 250, 500])
def test_the_resampled_signal_is_right_to_the_sample_after_hours_at_any_rate(fs):
    hours = 3
    t = np.arange(int(hours * 3600 * fs)) / fs
    out = recordings.resample(Channel(wave(t), fs, ""), 60, hours * 3600 * 60)
    late = np.arange(out.size - 3600 * 5, out.size - 120)
    # A tenth of a sample late would be an error of up to 0.4 here.
    assert np.abs(out[late] - wave(late / 60)).max() < 0.01
    assert np.abs(out - wave(np.arange(out.size) / 60)).max() < 0.5  # the two ends
    assert np.isfinite(out).all()


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
    gap = (t > 50) & (t < 52)
    x[gap] = np.nan
    x[int(80 * fs)] = np.nan
    out = recordings.resample(Channel(x, fs, ""), 60, 7200)
    k = np.arange(7200) / 60
    missing = ~np.isfinite(out)
    assert missing[(k > 50) & (k < 52)].all()
    assert missing[np.abs(k - t[int(80 * fs)]) < 0.5 / fs].all()
    far = (np.abs(k - 51) > 1 + 3 / 60) & (np.abs(k - 80) > 3 / 60)
    assert not missing[far].any()
    assert np.nanmax(np.abs(out - wave(k))) < 0.7  # no ringing beside the gap


def test_a_channel_that_starts_late_is_placed_by_its_start():
    fs, start_s = 125, 7.3137
    t = start_s + np.arange(60 * fs) / fs
    out = recordings.resample(Channel(wave(t), fs, "", start_s=start_s), 60, 3600)
    k = np.arange(3600) / 60
    assert not np.isfinite(out[k < start_s - 0.01]).any()
    assert np.abs(out - wave(k))[k > start_s + 0.5].max() < 0.01


def test_a_60_hz_recording_is_passed_through_unchanged():
    x = np.random.default_rng(1).normal(size=7200).astype(np.float32)
    out = recordings.resample(Channel(x.astype(float), 60.0, ""), 60, 7200)
    assert np.array_equal(out, x)


# ------------------------------------------------------------------------------------------ names

@pytest.mark.parametrize("name, kind", [
    ("ABP", "abp"), ("ART", "abp"), ("art1", "abp"), ("AOBP", "abp"), ("abp_mmhg", "abp"),
    ("SNUADC/ART", "abp"), ("ABP [mmHg]", "abp"), ("Radial", "abp"), ("ART_RAD", "abp"),
    ("PLETH", "ppg"), ("Pleth", "ppg"), ("ppg", "ppg"), ("SpO2 wave", "ppg"),
    ("SNUADC/PLETH", "ppg"),
])
def test_usual_names_are_recognised(name, kind):
    other = {"abp": "ppg", "ppg": "abp"}[kind]
    assert choose_channel(["II", name, "RESP"], kind) == name
    assert choose_channel(["II", name, "RESP"], other) is None


@pytest.mark.parametrize("name", ["ABP Mean", "ART_MBP", "SpO2", "PLETH_HR", "PAP", "CVP", "RAP"])
def test_numerics_and_other_pressures_are_not_taken_for_the_waveform(name):
    assert choose_channel([name], "abp") is None
    assert choose_channel([name], "ppg") is None


def test_a_wanted_name_overrides_the_usual_ones():
    assert choose_channel(["ABP", "P4"], "abp", "p4") == "P4"
    assert choose_channel(["ABP", "P4"], "abp", "P5") is None


# ------------------------------------------------------------------------------------------- CSV

def test_empty_and_nan_cells_are_gaps_and_a_jump_in_time_is_one(tmp_path):
    path = write_csv(tmp_path / "a.csv",
                     "Time,ABP,ppg\n0,80,1\n0.01,,2\n0.02,82,nan\n\n0.05,85,5\n")
    channels = read_recording(path).channels
    assert channels["ABP"].fs == pytest.approx(100)
    np.testing.assert_array_equal(channels["ABP"].samples, [80, np.nan, 82, np.nan, np.nan, 85])
    np.testing.assert_array_equal(channels["ppg"].samples, [1, 2, np.nan, np.nan, np.nan, 5])


def test_the_rate_is_exact_though_its_time_stamps_are_rounded_to_milliseconds(tmp_path):
    fs, rows = 124.945, 60000
    t = np.arange(rows) / fs
    keep = (t < 200) | (t > 230.5)
    text = "time_s;abp\n" + "".join(f"{s:.3f};{i}\n" for i, s in enumerate(t) if keep[i])
    channel = read_recording(write_csv(tmp_path / "a.csv", text)).channels["abp"]
    assert channel.samples.size == rows
    assert channel.samples[-1] == rows - 1
    assert abs(rows / channel.fs - rows / fs) < 0.002
    np.testing.assert_array_equal(np.isfinite(channel.samples), keep)


def test_a_given_rate_replaces_the_time_column(tmp_path):
    path = write_csv(tmp_path / "a.csv", "date,abp,ppg\n12:00,80,1\n12:00,81,2\n12:00,82,3\n")
    channel = read_recording(path, lambda names: ["abp"], csv_rate=50).channels["abp"]
    assert (channel.fs, channel.samples.tolist()) == (50, [80, 81, 82])


@pytest.mark.parametrize("text, complaint", [
    ("", "no header"),
    ("0,80,1\n0.1,81,2\n", "no header"),
    ("time_s,abp\n", "no rows"),
    ("when,abp\n0,80\n", "no time column"),
    ("time,abp\n0,80\n0.1,8o\n0.2,82\n", "line 3, column abp: expected a number"),
    ("time,abp\n0,80\n0.1,81\n0.05,82\n", "line 4: time does not increase"),
    ("time,abp\n0,80\n,81\n0.2,82\n", "line 3: no time"),
    ("time,abp\n0,80\n1,81\n2,82\n1e9,83\n", "jumps in time"),
    ("time,abp\n" + "".join(f"{i + 0.4 * (i > 50) * (i - 50)},80\n" for i in range(99)),
     "not evenly spaced"),
])
def test_a_bad_csv_gets_one_line_that_says_where(tmp_path, text, complaint):
    path = write_csv(tmp_path / "bad.csv", text)
    with pytest.raises(RecordingError) as caught:
        read_recording(path)
    assert complaint in str(caught.value)
    assert path in str(caught.value) and path not in caught.value.what
    assert "\n" not in str(caught.value)


def test_a_binary_file_named_csv_gets_one_line(tmp_path):
    path = tmp_path / "x.csv"
    path.write_bytes(np.random.default_rng(0).bytes(5000))
    with pytest.raises(RecordingError):
        read_recording(str(path))


# ------------------------------------------------------------------------------------------ WFDB

def test_every_sample_of_channels_at_several_rates_is_kept(tmp_path):
    pytest.importorskip("wfdb")
    # Two samples of ABP (250 Hz) and one of PLETH (125 Hz) per frame.
    abp, ppg = np.arange(2000), np.arange(1000)
    frames = np.column_stack([abp.reshape(-1, 2), ppg])
    frames.astype("<i2").tofile(tmp_path / "r.dat")
    (tmp_path / "r.hea").write_text("r 2 125 1000\nr.dat 16x2 10/mmHg 16 0 0 0 0 ABP\n"
                                    "r.dat 16 1/NU 16 0 0 0 0 PLETH\n")
    channels = read_recording(str(tmp_path / "r.hea")).channels
    assert (channels["ABP"].fs, channels["PLETH"].fs) == (250, 125)
    np.testing.assert_allclose(channels["ABP"].samples, abp / 10)
    np.testing.assert_allclose(channels["PLETH"].samples, ppg)
    listed = recordings.list_channels(str(tmp_path / "r.hea"))
    assert [(c.fs, c.unit, c.samples.size) for c in listed.values()] == [
        (250, "mmHg", 0), (125, "NU", 0)]


@pytest.mark.parametrize("layout", ["fixed", "variable"])
def test_segments_of_a_record_are_joined_and_their_gaps_are_nan(tmp_path, layout):
    pytest.importorskip("wfdb")
    first, last = 80 + np.arange(500) / 10, 90 + np.arange(250) / 10
    write_wfdb(tmp_path, "m_0001", first)
    write_wfdb(tmp_path, "m_0002", last)
    segments = ["m_0001 500", "~ 250", "m_0002 250"]
    if layout == "variable":
        (tmp_path / "m_layout.hea").write_text(
            "m_layout 2 125 0\n~ 0 100/mmHg 16 0 0 0 0 ABP\n~ 0 1/NU 16 0 0 0 0 PLETH\n")
        segments.insert(0, "m_layout 0")
    (tmp_path / "m.hea").write_text(
        f'm/{len(segments)} {len(segments) - 2 if layout == "variable" else 1} 125 1000\n'
        + "\n".join(segments) + "\n")
    found = find_recordings([str(tmp_path)])
    assert [os.path.basename(item.path) for item in found] == ["m.hea"]
    abp = read_recording(found[0].path).channels["ABP"].samples
    expected = np.concatenate([first, np.full(250, np.nan), last])
    np.testing.assert_allclose(abp, expected, atol=0.01)


@pytest.mark.parametrize("name", ["../secret.dat", "/etc/passwd", "..", "c:\\x.dat", "a::b"])
def test_a_header_that_names_a_file_outside_its_folder_is_refused_unopened(tmp_path, name):
    pytest.importorskip("wfdb")
    (tmp_path / "in").mkdir()
    np.zeros(100, "<i2").tofile(tmp_path / "secret.dat")
    (tmp_path / "in" / "r.hea").write_text(f"r 1 125 100\n{name} 16 1/mmHg 16 0 0 0 0 ABP\n")
    with pytest.raises(RecordingError, match="outside its own folder"):
        read_recording(str(tmp_path / "in" / "r.hea"))
    (tmp_path / "in" / "m.hea").write_text(f"m/1 1 125 100\n{name} 100\n")
    with pytest.raises(RecordingError, match="outside its own folder"):
        read_recording(str(tmp_path / "in" / "m.hea"))


@pytest.mark.parametrize("header, complaint", [
    ("", "no record line"),
    ("r 0 125 100\n", "no signals"),
    ("r 1 125 100\n", "unreadable number of signals"),
    ("r 1 x 100\nr.dat 16 1/mmHg 16 0 0 0 0 ABP\n", "unreadable number of signals, frequency"),
    ("r 1 125 100\nabsent.dat 16 1/mmHg 16 0 0 0 0 ABP\n", "data file is missing"),
    ("r 1 125 900\nr.dat 16 1/mmHg 16 0 0 0 0 ABP\n", "shorter than its header"),
    ("r 1 125 99999999999\nr.dat 16 1/mmHg 16 0 0 0 0 ABP\n", "shorter than its header"),
    ("r 1 0 100\nr.dat 16 1/mmHg 16 0 0 0 0 ABP\n", "unreadable number of signals, frequency"),
    ("r 1 125 100\nr.dat banana\n", "unreadable number of signals, frequency"),
    ("r/1 1 125 100\nabsent 100\n", "one of its segments is missing"),
    ("r/1 1 125 100\nr 100\n", "has segments itself"),
])
def test_a_bad_wfdb_record_gets_one_line(tmp_path, header, complaint):
    pytest.importorskip("wfdb")
    np.zeros(100, "<i2").tofile(tmp_path / "r.dat")
    (tmp_path / "r.hea").write_text(header)
    with pytest.raises(RecordingError, match=complaint) as caught:
        read_recording(str(tmp_path / "r.hea"))
    assert "\n" not in str(caught.value)
    assert str(tmp_path) not in caught.value.what


def test_a_missing_wfdb_package_is_named_with_its_install_line(tmp_path):
    write_wfdb(tmp_path, "r", np.zeros(100))
    code = ('import sys; sys.modules["wfdb"] = None\n'
            'import recordings\n'
            'try: recordings.read_recording(sys.argv[1])\n'
            'except recordings.RecordingError as error: print(error)')
    run = subprocess.run([sys.executable, "-c", code, str(tmp_path / "r.hea")], text=True,
                         capture_output=True, cwd=os.path.dirname(recordings.__file__))
    assert "wfdb" in run.stdout and "pip install -r requirements-extra.txt" in run.stdout


# --------------------------------------------------------------------------------------- finding

def test_a_folder_gives_its_recordings_in_sorted_order_and_none_twice(tmp_path):
    for name in ("b", "a"):
        write_wfdb(tmp_path, name, np.zeros(10))
    write_csv(tmp_path / "c.csv", "time,abp\n0,1\n")
    write_csv(tmp_path / "out_problems.csv", "# private\n")
    (tmp_path / "notes.txt").write_text("x")
    found = find_recordings([str(tmp_path / "b"), str(tmp_path), str(tmp_path / "a.dat")])
    assert [os.path.basename(item.path) for item in found] == ["b.hea", "a.hea", "c.csv"]
    assert [item.typed for item in found] == [str(tmp_path / "b"), str(tmp_path), str(tmp_path)]


def test_an_input_that_is_not_there_and_an_empty_folder_are_errors(tmp_path):
    with pytest.raises(RecordingError, match="no such file"):
        find_recordings([str(tmp_path / "nothing")])
    with pytest.raises(RecordingError, match="no WFDB header"):
        find_recordings([str(tmp_path)])


@needs_shared
def test_the_csv_holds_the_first_ten_minutes_of_the_wfdb_record():
    pytest.importorskip("wfdb")
    table = read_recording(os.path.join(SHARED, "theatre_10min.csv")).channels
    name = "waveformtools_sample_record.hea"
    record = read_recording(os.path.join(SHARED, "wfdb", name)).channels
    for a, b in (("abp_mmhg", "ABP"), ("ppg", "PLETH")):
        assert table[a].fs == record[b].fs == 125
        np.testing.assert_allclose(table[a].samples, record[b].samples[:75000], atol=0.006)


def test_a_renamed_record_is_read_from_its_own_header(tmp_path):
    pytest.importorskip("wfdb")
    write_wfdb(tmp_path, "r", np.full(100, 70.0))
    write_wfdb(tmp_path, "s", np.full(100, 90.0))
    os.rename(tmp_path / "s.hea", tmp_path / "t.hea")
    for name, value in (("r", 70), ("t", 90)):
        samples = read_recording(str(tmp_path / f"{name}.hea")).channels["ABP"].samples
        np.testing.assert_allclose(samples, value)
