"""recordings.py: what is read from files of every format, and how it is resampled."""
import csv
import gzip
import inspect
import os
import subprocess
import sys

import h5py
import numpy as np
import pytest
from scipy import signal

import labels
import recordings
from recordings import Channel, RecordingError, choose_channel, find_recordings, read_recording

SHARED = os.path.join(os.path.dirname(__file__), "..", "..", "shared", "data")
needs_shared = pytest.mark.skipif(not os.path.isdir(SHARED), reason="no ../shared/data here")


def write_wfdb(folder, name, samples, fs=125, units="mmHg", name_of_signal="ABP", gain=100):
    """A one-signal WFDB record in format 16, NaN included, without the wfdb package."""
    digital = np.where(np.isfinite(samples), np.rint(np.nan_to_num(samples) * gain), -32768)
    digital.astype("<i2").tofile(os.path.join(folder, name + ".dat"))
    with open(os.path.join(folder, name + ".hea"), "w") as file:
        file.write(f"{name} 1 {fs} {len(samples)}\n"
                   f"{name}.dat 16 {gain}/{units} 16 0 0 0 0 {name_of_signal}\n")
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
    ("SNUADC/PLETH", "ppg"), ("waves/abp", "abp"), ("AR1", "abp"), ("NOM_PRESS_BLD_ART_ABP", "abp"),
    ("MDC_PRESS_BLD_ART", "abp"), ("Bx50/IBP1", "abp"), ("NOM_PULS_OXIM_PLETH", "ppg"),
    ("Solar8000/ART_MBP", "map"), ("ABP Mean", "map"), ("ABPm [mmHg]", "map"), ("ART_DBP", "dbp"),
    ("ABP Dias", "dbp"), ("ABPd [mmHg]", "dbp"), ("NOM_PRESS_BLD_ART_ABP_DIA", "dbp"),
    ("ABP Sys", "sbp"), ("Solar8000/ART_SBP", "sbp"), ("NBP Sys", "sbp"), ("NIBP_MBP", "map"),
    ("HR [bpm]", "hr"), ("Solar8000/HR", "hr"), ("NOM_ECG_CARD_BEAT_RATE", "hr"),
])
def test_usual_names_are_recognised(name, kind):
    for other in recordings.CHANNEL_ALIASES:
        expected = name if other == kind else None
        assert choose_channel(["II", name, "RESP"], other) == expected


def test_numbers_of_the_arterial_line_go_before_those_of_the_cuff():
    names = ["NBP Mean", "NIBP_MBP", "Solar8000/ART_MBP"]
    assert choose_channel(names, "map") == "Solar8000/ART_MBP"
    assert choose_channel(names[:2], "map") == "NBP Mean"


@pytest.mark.parametrize("name", [
    "ABP Mean", "ART_MBP", "SpO2", "PLETH_HR", "PAP", "CVP", "RAP", "P1"])
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
    ("time,abp\n0,80\n1,81\n2,82\n1e9,83\n", "line 5: jumps in time of over a week"),
    ("time,abp\n" + "".join(f"{i + 0.4 * (i > 50) * (i - 50)},80\n" for i in range(99)),
     "not evenly spaced"),
])
def test_a_bad_csv_gets_one_line_that_says_where(tmp_path, text, complaint):
    path = write_csv(tmp_path / "bad.csv", text)
    for read in (read_recording, lambda path: recordings.Windows(path).read(0, 600)):
        with pytest.raises(RecordingError) as caught:
            read(path)
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


def test_a_header_may_leave_the_length_to_the_data_file(tmp_path):
    pytest.importorskip("wfdb")
    path = write_wfdb(tmp_path, "r", 80 + np.arange(500) / 10)
    header = (tmp_path / "r.hea").read_text()
    (tmp_path / "r.hea").write_text(header.replace("r 1 125 500", "r 1 125"))
    np.testing.assert_allclose(read_recording(path).channels["ABP"].samples,
                               80 + np.arange(500) / 10)


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


# ----------------------------------------------------------------------------- the other formats

RATES = {"ABP": 250, "PLETH": 125}
GAP_S = (85, 92)
ROUNDING = {"wfdb": 0.005, "edf": 400 / 65535, "vital": 1e-4, "packed.vital": 1e-4, "csv": 5e-4,
            "parquet": 1e-9, "hdf5": 1e-9}  # a step or half of one, in each file's own unit


@pytest.fixture(scope="module")
def signals():
    """200 s of a Windkessel's pressure and of a smoother PPG, at two rates, with a gap."""
    rng, fs = np.random.default_rng(5), 250
    flow = np.zeros(200 * fs)
    t = 0.3
    while t < 199:
        n = int(0.28 * fs)  # ejection
        stroke_ml = 65 * (1 + 0.12 * np.sin(2 * np.pi * 0.04 * t) + 0.02 * rng.normal())
        flow[int(t * fs):int(t * fs) + n] += stroke_ml * np.pi / 2 / 0.28 * np.sin(
            np.pi * np.arange(n) / n)
        t += 0.8 + 0.01 * rng.normal()
    r, c, p_crit = 0.5, 1.2, 40
    decay = np.exp(-1 / fs / (r * c))
    abp = p_crit + signal.lfilter([1 - decay], [1, -decay], r * flow, zi=[decay * 40])[0]
    ppg = 50 + signal.filtfilt(*signal.butter(2, 4, fs=fs), abp - 80)
    made = {"ABP": abp, "PLETH": ppg[::2].copy()}
    for name, samples in made.items():
        samples[GAP_S[0] * RATES[name]:GAP_S[1] * RATES[name]] = np.nan
    return made


def write_edf(path, signals):
    """EDF+D: what pyedflib writes, without the data records (of 1 s) in which there is nothing."""
    pyedflib = pytest.importorskip("pyedflib")
    with pyedflib.EdfWriter(str(path), len(signals), file_type=pyedflib.FILETYPE_EDFPLUS) as file:
        for i, name in enumerate(signals):
            file.setSignalHeader(i, {
                "label": name, "dimension": {"ABP": "mmHg"}.get(name, "NU"),
                "sample_frequency": RATES[name], "physical_min": -50, "physical_max": 350,
                "digital_min": -32768, "digital_max": 32767, "transducer": "", "prefilter": ""})
        file.writeSamples([np.nan_to_num(samples) for samples in signals.values()])
    whole = path.read_bytes()
    size = 256 * (2 + len(signals))
    n = int(whole[236:244])
    body = np.frombuffer(whole[size:], np.uint8).reshape(n, -1)
    abp = signals["ABP"].reshape(n, -1)
    kept = np.isfinite(abp).all(axis=1)
    if not kept.all():
        header = whole[:192] + b"EDF+D" + whole[197:236] + b"%-8d" % kept.sum() + whole[244:size]
        path.write_bytes(header + body[kept].tobytes())


def write_vital(path, signals, packed, start=1.6e9 + 0.123, drift=0.0):
    """Blocks of 1 s, as monitors send them; heart rates every 2 s."""
    vitaldb = pytest.importorskip("vitaldb")
    file = vitaldb.VitalFile()
    file.dtstart = file.dtend = start
    for name, samples in signals.items():
        fs = RATES[name]
        blocks = [{"dt": start + i * (1 + drift), "val": block.astype(np.float32)}
                  for i, block in enumerate(samples.reshape(-1, fs)) if np.isfinite(block).all()]
        file.add_track("SNUADC/" + name, blocks, srate=fs, unit={"ABP": "mmHg"}.get(name, ""))
    file.add_track("Solar8000/HR", [{"dt": start + 2.0 * i, "val": 60.0 + i} for i in range(100)])
    can_pack = "packed" in inspect.signature(file.to_vital).parameters  # vitaldb 1.6
    file.to_vital(str(path), **({"packed": packed} if can_pack else {}))


@pytest.fixture(scope="module")
def files(tmp_path_factory, signals):
    """{format: path} of one recording in every format."""
    pandas, folder = pytest.importorskip("pandas"), tmp_path_factory.mktemp("formats")
    frames = np.column_stack([signals["ABP"].reshape(-1, 2), signals["PLETH"]])
    digital = np.where(np.isfinite(frames), np.rint(np.nan_to_num(frames) * 100), -32768)
    digital.astype("<i2").tofile(folder / "r.dat")
    (folder / "r.hea").write_text(f"r 2 125 {len(frames)}\nr.dat 16x2 100/mmHg 16 0 0 0 0 ABP\n"
                                  "r.dat 16 100/NU 16 0 0 0 0 PLETH\n")
    write_edf(folder / "r.edf", signals)
    write_vital(folder / "r.vital", signals, packed=False)
    write_vital(folder / "p.vital", signals, packed=True)
    with h5py.File(folder / "r.h5", "w") as file:
        for name, samples in signals.items():
            file[f"waves/{name}"] = samples
            file[f"waves/{name}"].attrs["fs"] = RATES[name]
    slow = np.full(signals["ABP"].size, np.nan)
    slow[::2] = signals["PLETH"]  # in every second row
    table = pandas.DataFrame({"time_s": np.arange(slow.size) / 250, "ABP": signals["ABP"],
                              "PLETH": slow})[np.isfinite(signals["ABP"])]
    table.to_csv(folder / "r.csv", index=False, float_format="%.3f")
    table["time"] = pandas.Timestamp("2020-01-01") + pandas.to_timedelta(table.time_s, "s")
    table.drop(columns="time_s").to_parquet(folder / "r.parquet")
    names = {"wfdb": "r.hea", "packed.vital": "p.vital", "hdf5": "r.h5"}
    return {form: str(folder / names.get(form, f"r.{form}")) for form in ROUNDING}


def read_as(kind, path):
    names = list(recordings.list_channels(path))
    name = choose_channel(names, kind)
    return read_recording(path, lambda names: [name]).channels[name]


@pytest.mark.parametrize("form", sorted(ROUNDING))
def test_every_format_gives_the_same_samples_at_the_same_times(files, signals, form):
    for kind, name in (("abp", "ABP"), ("ppg", "PLETH")):
        channel = read_as(kind, files[form])
        assert (channel.fs, channel.start_s) == (RATES[name], 0)
        np.testing.assert_allclose(channel.samples, signals[name], rtol=1e-6, atol=ROUNDING[form])


@pytest.mark.parametrize("form", sorted(ROUNDING))
def test_every_format_gives_the_same_segments_and_labels(files, signals, form):
    expected = {name: recordings.resample(Channel(signals[name], RATES[name], ""), 60, 3 * 3600)
                for name in signals}
    for kind, name in (("abp", "ABP"), ("ppg", "PLETH")):
        segments = recordings.resample(read_as(kind, files[form]), 60, 3 * 3600)
        np.testing.assert_allclose(segments, expected[name], rtol=1e-5, atol=3 * ROUNDING[form])
        if kind == "abp":
            got = labels.label_segments(segments.reshape(3, 3600), 60)
    truth = labels.label_segments(expected["ABP"].reshape(3, 3600), 60)
    assert np.isfinite(truth["tpp"][[0, 2]]).all()
    assert np.array_equal(got["reason"], truth["reason"])
    for key in ("map", "sbp", "dbp", "pp", "p_crit", "tpp"):
        np.testing.assert_allclose(got[key], truth[key], atol=0.5)


def test_numbers_of_a_vital_file_keep_their_times(files):
    path = files["vital"]
    listed = {name: channel.fs for name, channel in recordings.list_channels(path).items()}
    assert listed == {"SNUADC/ABP": 250, "SNUADC/PLETH": 125, "Solar8000/HR": 1}
    rates = read_recording(path, lambda names: [choose_channel(names, "hr")]).channels
    assert list(rates) == ["Solar8000/HR"]
    samples = rates["Solar8000/HR"].samples
    np.testing.assert_array_equal(samples[::2], 60 + np.arange(100))
    assert np.isnan(samples[1::2]).all()


def test_a_drifting_clock_of_a_vital_file_is_measured_and_does_not_shift_what_comes_late(
        tmp_path, signals):
    whole = {"ABP": np.tile(signals["ABP"][:80 * 250], 45)}  # an hour
    write_vital(tmp_path / "d.vital", whole, packed=False, drift=50e-6)
    channel = read_as("abp", str(tmp_path / "d.vital"))
    assert np.isfinite(channel.samples).all()
    assert channel.samples.size == whole["ABP"].size
    assert channel.fs == pytest.approx(250 / (1 + 50e-6), rel=1e-7)


def test_integer_tracks_of_a_vital_file_are_scaled_and_their_gaps_are_nan(tmp_path):
    vitaldb = pytest.importorskip("vitaldb")
    file = vitaldb.VitalFile()
    file.dtstart = file.dtend = 1.6e9
    blocks = [{"dt": 1.6e9 + i, "val": np.arange(100, dtype="<i2")} for i in (0, 1, 3)]
    track = file.add_track("Bx50/IBP1", blocks, srate=100, unit="mmHg")
    track.fmt, track.gain, track.offset = 5, 0.5, 10  # 16-bit
    file.to_vital(str(tmp_path / "i.vital"))
    samples = read_as("abp", str(tmp_path / "i.vital")).samples
    expected = np.tile(10 + 0.5 * np.arange(100), 4)
    expected[200:300] = np.nan
    np.testing.assert_allclose(samples, expected)


def test_a_continuous_edf_is_read_by_pyedflib_and_gives_the_same(tmp_path, signals):
    whole = {name: samples[:80 * RATES[name]] for name, samples in signals.items()}
    write_edf(tmp_path / "c.edf", whole)
    text = (tmp_path / "c.edf").read_bytes()
    (tmp_path / "d.edf").write_bytes(text[:196] + b"D" + text[197:])
    continuous, with_gaps = (read_recording(str(tmp_path / f"{name}.edf")).channels
                             for name in "cd")
    for name, samples in whole.items():
        assert continuous[name].unit == ("mmHg" if name == "ABP" else "NU")
        np.testing.assert_allclose(continuous[name].samples, samples, atol=400 / 65535)
        np.testing.assert_allclose(continuous[name].samples, with_gaps[name].samples, atol=1e-9)


def test_hdf5_waveforms_are_found_at_given_paths_with_a_given_rate(tmp_path):
    with h5py.File(tmp_path / "w.h5", "w") as file:
        for patient in ("a", "b"):
            file[f"{patient}/pressure"] = np.arange(50, dtype="f4")
            file[f"{patient}/light"] = np.arange(50, dtype="i2")[None]
    path = str(tmp_path / "w.h5")
    assert sorted(recordings.list_channels(path)) == ["a/light", "a/pressure", "b/light",
                                                      "b/pressure"]
    said = {"abp": "/b/pressure", "ppg": "b/light", "fs": 50}
    channels = read_recording(path, hdf5=said).channels
    assert {name: c.fs for name, c in channels.items()} == {"ABP": 50, "PPG": 50}
    np.testing.assert_array_equal(channels["PPG"].samples, np.arange(50))
    assert list(recordings.list_channels(path, hdf5=dict(said, ppg=None)))[0] == "ABP"
    with pytest.raises(RecordingError, match="give the rate: --fs HZ"):
        read_recording(path, hdf5=dict(said, fs=None))
    with pytest.raises(RecordingError, match="several datasets .* say which: --abp PATH"):
        read_recording(path, lambda names: ["a/pressure"])
    with pytest.raises(RecordingError, match="no one-dimensional dataset .* that was given"):
        read_recording(path, hdf5=dict(said, abp="c/pressure"))


def test_a_name_inside_a_file_cannot_command_the_terminal(tmp_path):
    with h5py.File(tmp_path / "w.h5", "w") as file:
        file["a\x1b[31m\nb"] = np.arange(9.0)
        file["a\x1b[31m\nb"].attrs["units"] = "\x1b[2J"
    (name, channel), = recordings.list_channels(str(tmp_path / "w.h5")).items()
    assert (name, channel.unit) == ("a?[31m b", "?[2J")
    with pytest.raises(RecordingError) as caught:
        read_recording(str(tmp_path / "w.h5"))
    assert str(caught.value).isprintable()


def test_nothing_in_an_hdf5_file_leads_out_of_it_or_round_in_circles(tmp_path):
    with h5py.File(tmp_path / "other.h5", "w") as file:
        file["abp"] = np.arange(9.0)
    np.arange(9.0).tofile(tmp_path / "raw")
    with h5py.File(tmp_path / "w.h5", "w") as file:
        file["external"] = h5py.ExternalLink(str(tmp_path / "other.h5"), "abp")
        file["soft"] = h5py.SoftLink("/own")
        file["loop/again"] = file
        file.create_dataset("raw", (9,), "f8", external=[(str(tmp_path / "raw"), 0, 72)])
        layout = h5py.VirtualLayout((9,), "f8")
        layout[:] = h5py.VirtualSource(str(tmp_path / "other.h5"), "abp", (9,))
        file.create_virtual_dataset("virtual", layout)
        file["text"] = ["a", "b"]
        file["complex"] = np.zeros(9, complex)
        file["table"] = np.zeros((9, 9))
        file["own"] = np.arange(9.0)
    path = str(tmp_path / "w.h5")
    assert list(recordings.list_channels(path)) == ["own"]
    for name in ("external", "soft", "loop/again/own", "raw", "virtual", "text", "complex"):
        with pytest.raises(RecordingError, match="no one-dimensional dataset"):
            read_recording(path, hdf5={"abp": name, "fs": 9})


def memory_mb(code, *arguments):
    """Peak memory of a Python that runs `code`, and what it printed."""
    if not os.path.exists("/proc/self/status"):
        pytest.skip("needs Linux's /proc/self/status")
    import_path = os.path.dirname(recordings.__file__)
    run = subprocess.run(
        [sys.executable, "-c", "import sys, recordings\n" + code + """
for line in open("/proc/self/status"):       # ru_maxrss begins with what the parent had
    if line.startswith("VmHWM"):
        print(int(line.split()[1]) // 1024)""", *arguments],
        text=True, capture_output=True, cwd=import_path)
    assert run.returncode == 0, run.stderr
    *lines, peak = run.stdout.splitlines()
    return int(peak), "\n".join(lines)


def huge_hdf5(path):
    with h5py.File(path, "w") as file:
        file.create_dataset("abp", (10**12,), "f4", chunks=(10**6,)).attrs["fs"] = 125


def huge_chunk(path):
    with h5py.File(path, "w") as file:
        file.create_dataset("abp", (10,), "f4", chunks=(10**9,), maxshape=(None,),
                            compression="gzip").attrs["fs"] = 125


def huge_vital(path):
    path.write_bytes(gzip.compress(b"VITA") + 40 * gzip.compress(bytes(10 << 20)))


def huge_wfdb_gap(path):
    write_wfdb(path.parent, "s", np.zeros(100))
    path.write_text("h/3 1 125 100000200\ns 100\n~ 100000000\ns 100\n")


def huge_null_signal(path):
    path.write_text("h 1 125 99999999999\n~ 0 1/mmHg 16 0 0 0 0 ABP\n")


def huge_csv_jump(path):
    path.write_text("time,abp\n" + "".join(f"{i / 5000},80\n" for i in range(9)) + "600000,80\n")


@pytest.mark.parametrize("ending, write", [
    (".h5", huge_hdf5), (".h5", huge_chunk), (".vital", huge_vital), (".hea", huge_wfdb_gap),
    (".hea", huge_null_signal), (".csv", huge_csv_jump)])
def test_a_small_file_that_promises_absurd_amounts_is_refused_unallocated(tmp_path, ending, write):
    if ending == ".hea":
        pytest.importorskip("wfdb")
    if ending == ".vital":
        pytest.importorskip("vitaldb")
    path = tmp_path / ("h" + ending)
    write(path)
    peak, printed = memory_mb("try: recordings.read_recording(sys.argv[1])\n"
                              "except recordings.RecordingError as error: print(error)", str(path))
    assert "can hold" in printed or "unpacks to" in printed
    assert printed.count("\n") == 0
    assert peak < 700


@pytest.mark.parametrize("form", ["wfdb", "edf", "vital", "parquet", "hdf5", "csv"])
def test_a_damaged_file_gives_its_samples_or_one_line(tmp_path, files, form):
    """Cut short, or with bytes changed: never another exception, never a print."""
    path, rng = files[form], np.random.default_rng(3)
    with open(path, "rb") as file:
        whole = file.read()
    packed = form == "vital"  # damage lies inside, as gzip's own check would find it
    whole = gzip.decompress(whole) if packed else whole
    if form == "wfdb":
        os.link(os.path.splitext(path)[0] + ".dat", tmp_path / "r.dat")
    target = tmp_path / os.path.basename(path)
    complaints = 0
    for trial in range(25):
        damaged = bytearray(whole)
        if trial % 3 == 0:
            damaged = damaged[:rng.integers(len(whole))]
        else:
            for _ in range(6):
                damaged[rng.integers(min(len(whole), 3000))] = rng.integers(256)
        target.write_bytes(gzip.compress(damaged, 1) if packed else damaged)
        try:
            read_recording(str(target))
        except RecordingError as error:
            complaints += 1
            assert "\n" not in str(error) and str(tmp_path) not in error.what
    assert complaints


def test_a_vital_file_that_ends_early_is_refused(tmp_path, files):
    with open(files["vital"], "rb") as file:
        whole = file.read()
    (tmp_path / "cut.vital").write_bytes(whole[:len(whole) // 2])
    with pytest.raises(RecordingError, match="not a whole .vital file"):
        read_recording(str(tmp_path / "cut.vital"))


@pytest.mark.parametrize("ending, package", [
    (".hea", "wfdb"), (".vital", "vitaldb"), (".edf", "pyedflib"), (".parquet", "pyarrow")])
def test_a_missing_package_is_named_with_its_install_line(tmp_path, ending, package):
    path = tmp_path / ("r" + ending)
    path.write_bytes(b"VITA")
    code = (f"sys.modules[{package!r}] = None\n"
            "for function in (lambda p: recordings.check_readers([p]), recordings.list_channels):\n"
            "    try: function(sys.argv[1])\n"
            "    except recordings.RecordingError as error: print(error)")
    _, printed = memory_mb(code, str(path))
    line = f"reading it needs the package {package}: pip install -r requirements-extra.txt"
    assert printed.splitlines()[0] == f"{path}: {line}"
    assert len(printed.splitlines()) == 2


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
    with pytest.raises(RecordingError, match="no recording in this folder"):
        find_recordings([str(tmp_path)])


def write_archive(folder):
    """Like MIMIC's: RECORDS in every folder, records of many segments, numerics beside them."""
    for person, record in (("p001", "3000001"), ("p002", "3000002")):
        inner = folder / "waves" / person / record
        inner.mkdir(parents=True)
        for part in ("_0001", "_0002"):
            write_wfdb(inner, record + part, np.full(100, 80.0))
        (inner / f"{record}_layout.hea").write_text(
            f"{record}_layout 1 125 0\n~ 0 100/mmHg 16 0 0 0 0 ABP\n")
        (inner / f"{record}.hea").write_text(
            f"{record}/4 1 125 250\n{record}_layout 0\n{record}_0001 100\n~ 50\n"
            f"{record}_0002 100\n")
        write_wfdb(inner, record + "n", np.full(10, 80.0), fs=1, name_of_signal="HR")
        (inner / "RECORDS").write_text(f"{record}_layout\n{record}_0001\n{record}_0002\n{record}\n")
        (inner.parent / "RECORDS").write_text(f"{record}/\n")
    (folder / "RECORDS").write_text("waves/p001/\nwaves/p002/\n")
    (folder / "RECORDS-waveforms").write_text("waves/p002/3000002/3000002\n\n")


def test_a_tree_with_record_lists_is_walked_and_its_lists_are_read(tmp_path):
    pytest.importorskip("wfdb")
    write_archive(tmp_path)

    def found(name):
        return [os.path.relpath(item.path, tmp_path).replace(os.sep, "/")
                for item in find_recordings([str(tmp_path / name)])]

    first, second = (f"waves/p00{i}/300000{i}/300000{i}.hea" for i in (1, 2))
    assert found("") == found("RECORDS") == [first, second]
    assert found("RECORDS-waveforms") == [second]
    assert found("waves/p001/3000001/RECORDS") == [first]
    assert found("waves/p001/3000001/3000001n") == ["waves/p001/3000001/3000001n.hea"]
    samples = read_recording(str(tmp_path / first)).channels["ABP"].samples
    np.testing.assert_array_equal(np.isfinite(samples), [True] * 100 + [False] * 50 + [True] * 100)


def test_a_listed_record_that_is_not_there_is_an_error_of_its_own(tmp_path):
    (tmp_path / "RECORDS").write_text("here\nabsent\n")
    write_wfdb(tmp_path, "here", np.zeros(100))
    found = find_recordings([str(tmp_path / "RECORDS")])
    assert [os.path.basename(item.path) for item in found] == ["here.hea", "absent.hea"]
    pytest.importorskip("wfdb")
    with pytest.raises(RecordingError, match="No such file"):
        read_recording(found[1].path)


@pytest.mark.parametrize("entry", ["../x", "/etc/x", "a/../../x", "..", "c:\\x", "http://host/x"])
def test_a_list_that_leads_out_of_its_folder_is_refused(tmp_path, entry):
    (tmp_path / "RECORDS").write_text(f"a\n{entry}\n")
    with pytest.raises(RecordingError, match="line 2 names a record outside"):
        find_recordings([str(tmp_path / "RECORDS")])


def test_a_prepared_file_is_not_a_recording_of_the_folder_it_lies_in(tmp_path):
    for name, attribute in (("waves", "comment"), ("prepared", "layout_version")):
        with h5py.File(tmp_path / f"{name}.h5", "w") as file:
            file.attrs[attribute] = 1
    found = find_recordings([str(tmp_path)])
    assert [os.path.basename(item.path) for item in found] == ["waves.h5"]


@needs_shared
def test_every_shared_recording_is_found_and_has_both_channels_at_the_rate_that_is_listed():
    pytest.importorskip("wfdb")
    with open(os.path.join(SHARED, "recordings.csv")) as file:
        rates = {row["record"]: float(row["fs_hz"]) for row in csv.DictReader(file)}
    found = find_recordings([os.path.join(SHARED, "wfdb")])
    assert {recordings.recording_name(item.path) for item in found} == set(rates)
    for item in found:
        channels = recordings.list_channels(item.path)
        for kind in ("abp", "ppg"):
            channel = channels[choose_channel(channels, kind)]
            assert channel.fs == pytest.approx(rates[recordings.recording_name(item.path)])


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
