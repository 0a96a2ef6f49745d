"""formats.py: WFDB, VitalDB, EDF and HDF5, whole and in spans; damaged files get one line."""
import gzip
import inspect
import os
import re
from contextlib import nullcontext

import h5py
import numpy as np
import pandas as pd
import pytest

import recordings
from formats import RecordingError

RATES = {"ABP": 250, "PLETH": 125}
ROUNDING = {"wfdb": 0.005, "edf": 400 / 65535, "edf+c": 400 / 65535, "vital": 1e-4, "csv": 5e-4,
            "packed.vital": 1e-4, "parquet": 1e-9, "hdf5": 1e-9}    # a step or half of one


def opened(path, file_fs=None):
    return recordings.open_reader(str(path), file_fs)


def whole(path, file_fs=None):
    """{name: Channel} of a file."""
    reader = opened(path, file_fs)
    return reader.read(list(reader.channels), 0, np.inf)


def write_wfdb(folder, name, samples, fs=125, unit="/mmHg", signal="ABP", gain=100):
    """Write a one-signal WFDB record in format 16, with NaN, without the wfdb package."""
    digital = np.where(np.isfinite(samples), np.rint(np.nan_to_num(samples) * gain), -32768)
    digital.astype("<i2").tofile(folder / f"{name}.dat")
    (folder / f"{name}.hea").write_text(
        f"{name} 1 {fs} {len(samples)}\n{name}.dat 16 {gain}{unit} 16 0 0 0 0 {signal}\n")


@pytest.fixture(scope="module")
def signals():
    """200 s of pulses at two rates, with a gap."""
    made = {}
    for name, fs in RATES.items():
        t = np.arange(200 * fs) / fs
        made[name] = 90 + 25 * np.sin(8 * t) + t / 9
        made[name][85 * fs:92 * fs] = np.nan
    return made


def write_edf(path, signals):
    """Write EDF+ by pyedflib; turn it into EDF+D by dropping the empty data records (of 1 s)."""
    pyedflib = pytest.importorskip("pyedflib")
    with pyedflib.EdfWriter(str(path), len(signals), file_type=pyedflib.FILETYPE_EDFPLUS) as file:
        for i, name in enumerate(signals):
            file.setSignalHeader(i, {
                "label": name, "dimension": {"ABP": "mmHg"}.get(name, "NU"),
                "sample_frequency": RATES[name], "physical_min": -50, "physical_max": 350,
                "digital_min": -32768, "digital_max": 32767, "transducer": "", "prefilter": ""})
        file.writeSamples([np.nan_to_num(samples) for samples in signals.values()])
    data = path.read_bytes()
    size = 256 * (2 + len(signals))
    body = np.frombuffer(data[size:], np.uint8).reshape(int(data[236:244]), -1)
    kept = np.isfinite(signals["ABP"].reshape(len(body), -1)).all(axis=1)
    if not kept.all():
        header = data[:192] + b"EDF+D" + data[197:236] + b"%-8d" % kept.sum() + data[244:size]
        path.write_bytes(header + body[kept].tobytes())


def write_vital(path, signals, packed, start=1.6e9 + 0.123, drift=0.0):
    """Write blocks of 1 s, as monitors send them, and a heart rate every 2 s."""
    vitaldb = pytest.importorskip("vitaldb")
    file = vitaldb.VitalFile()
    file.dtstart = file.dtend = start
    for name, samples in signals.items():
        blocks = [{"dt": start + i * (1 + drift), "val": block.astype(np.float32)}
                  for i, block in enumerate(samples.reshape(-1, RATES[name]))
                  if np.isfinite(block).all()]
        file.add_track("SNUADC/" + name, blocks, srate=RATES[name],
                       unit={"ABP": "mmHg"}.get(name, ""))
    file.add_track("Solar8000/HR", [{"dt": start + 2.0 * i, "val": 60.0 + i} for i in range(100)])
    can_pack = "packed" in inspect.signature(file.to_vital).parameters  # vitaldb 1.6
    file.to_vital(str(path), **({"packed": packed} if can_pack else {}))


@pytest.fixture(scope="module")
def files(tmp_path_factory, signals):
    """{format: path} of one recording in every format."""
    folder = tmp_path_factory.mktemp("formats")
    frames = np.column_stack([signals["ABP"].reshape(-1, 2), signals["PLETH"]])
    digital = np.where(np.isfinite(frames), np.rint(np.nan_to_num(frames) * 100), -32768)
    digital.astype("<i2").tofile(folder / "r.dat")
    (folder / "r.hea").write_text(f"r 2 125 {len(frames)}\nr.dat 16x2 100/mmHg 16 0 0 0 0 ABP\n"
                                  "r.dat 16 100/NU 16 0 0 0 0 PLETH\n")
    write_edf(folder / "r.edf", signals)
    (folder / "c.edf").write_bytes((folder / "r.edf").read_bytes().replace(b"EDF+D", b"EDF+C"))
    write_vital(folder / "r.vital", signals, packed=False)
    write_vital(folder / "p.vital", signals, packed=True)
    with h5py.File(folder / "r.h5", "w") as file:
        for name, samples in signals.items():
            file[f"waves/{name}"] = samples
            file[f"waves/{name}"].attrs["fs"] = RATES[name]
    slow = np.full(signals["ABP"].size, np.nan)
    slow[::2] = signals["PLETH"]  # in every second row
    table = pd.DataFrame({"time_s": np.arange(slow.size) / 250, "ABP": signals["ABP"],
                          "PLETH": slow})[np.isfinite(signals["ABP"])]
    table.to_csv(folder / "r.csv", index=False, float_format="%.3f")
    table["time"] = pd.Timestamp("2020-01-01") + pd.to_timedelta(table.time_s, "s")
    table.drop(columns="time_s").to_parquet(folder / "r.parquet")
    names = {"wfdb": "r.hea", "packed.vital": "p.vital", "hdf5": "r.h5", "edf+c": "c.edf"}
    return {form: str(folder / names.get(form, f"r.{form}")) for form in ROUNDING}


@pytest.mark.parametrize("form", sorted(ROUNDING))
def test_every_format_gives_the_same_samples_and_times_whole_and_in_spans(files, signals, form):
    reader = opened(files[form])
    names = [next(own for own in reader.channels if own.endswith(name)) for name in RATES]
    together = reader.read(names, 0, np.inf)
    parts = [reader.read(names, a, a + 13.337) for a in np.arange(0, 200, 13.337)]
    assert reader.end_s == pytest.approx(200, abs=1e-6)
    for name, own in zip(RATES, names):
        channel = together[own]
        assert (channel.fs, channel.start_s, channel.first) == (RATES[name], 0, 0)
        np.testing.assert_allclose(channel.samples, signals[name], rtol=1e-6, atol=ROUNDING[form])
        got = [part[own].samples for part in parts]
        np.testing.assert_array_equal(np.concatenate(got), channel.samples)
        ends = np.cumsum([samples.size for samples in got])
        assert [part[own].first for part in parts] == [0, *ends[:-1]]


@pytest.mark.parametrize("form", ["wfdb", "edf", "vital", "parquet", "hdf5", "csv"])
def test_a_damaged_file_gives_samples_or_a_one_line_error(tmp_path, files, form):
    """Files that are cut or have changed bytes raise nothing but RecordingError."""
    path, rng, complaints = files[form], np.random.default_rng(3), 0
    with (gzip.open if form == "vital" else open)(path, "rb") as file:  # gzip notices by itself
        data = file.read()
    if form == "wfdb":
        os.link(os.path.splitext(path)[0] + ".dat", tmp_path / "r.dat")
    target = tmp_path / os.path.basename(path)
    for trial in range(15):
        damaged = np.frombuffer(data, np.uint8).copy()
        if trial % 3 == 0:
            damaged = damaged[:rng.integers(len(data))]
        else:
            damaged[rng.integers(min(len(data), 3000), size=6)] = rng.integers(256, size=6)
        target.write_bytes(gzip.compress(damaged, 1) if form == "vital" else damaged)
        try:
            list(recordings.read_windows(str(target), fs=60, seconds=60, limits={}))
        except RecordingError as error:
            complaints += 1
            assert "\n" not in str(error) and str(tmp_path) not in error.what
    assert complaints


@pytest.mark.parametrize("form", ["8", "16", "24", "32", "212"])
def test_windows_of_every_storage_format_equal_the_whole(tmp_path, form):
    wfdb = pytest.importorskip("wfdb")
    x = np.rint(400 * np.sin(np.arange(20006) / 9)).astype(int)
    if form == "8":         # differences; the header may leave the length to the data file
        np.diff(x, prepend=x[0]).astype("i1").tofile(tmp_path / "r.dat")
        (tmp_path / "r.hea").write_text(f"r 1 125\nr.dat 8 2/mmHg 16 0 {x[0]} 0 0 ABP\n")
    else:
        wfdb.wrsamp("r", 125, ["mmHg"], ["ABP"], d_signal=x[:, None], fmt=[form],
                    adc_gain=[2.0], baseline=[0], write_dir=str(tmp_path))
    reader = opened(tmp_path / "r.hea")
    got = np.concatenate([reader.read(["ABP"], a, a + 31.7)["ABP"].samples
                          for a in np.arange(0, len(x) / 125, 31.7)])
    np.testing.assert_allclose(got, x / 2)


@pytest.mark.parametrize("gain, unit", [(100, ""), (100, "(0)"), (0, ""), (0, "(0)/mmHg")])
def test_pressure_without_a_unit_is_mmhg_and_without_a_gain_is_refused(tmp_path, gain, unit):
    write_wfdb(tmp_path, "r", np.full(9000, 80.0), gain=gain, unit=unit)
    with nullcontext() if gain else pytest.raises(RecordingError, match="unit is not known"):
        recorded = recordings.read_windows(str(tmp_path / "r.hea"), fs=60, seconds=60, limits={})
        assert recorded.chosen == {"abp": "ABP"}


@pytest.mark.parametrize("layout", ["fixed", "variable"])
def test_segments_are_joined_their_gaps_are_nan_and_channels_and_units_may_differ(tmp_path, layout):
    first, last = 80 + np.arange(500) / 10, 90 + np.arange(250) / 10
    write_wfdb(tmp_path, "m_1", first)
    write_wfdb(tmp_path, "m_2", last / 7.50062, unit="/kPa", gain=2000)
    write_wfdb(tmp_path, "m_3", np.full(100, 3.0), signal="PLETH", unit="/NU")
    segments = ["m_1 500", "~ 250", "m_2 250", "m_3 100"]
    if layout == "variable":
        (tmp_path / "m_layout.hea").write_text(
            "m_layout 2 125 0\n~ 0 100/mmHg 16 0 0 0 0 ABP\n~ 0 1/NU 16 0 0 0 0 PLETH\n")
        segments.insert(0, "m_layout 0")
    (tmp_path / "m.hea").write_text(f"m/{len(segments)} 2 125 1100\n" + "\n".join(segments) + "\n")
    channels = whole(tmp_path / "m.hea")
    gap, end = np.full(250, np.nan), np.full(100, np.nan)
    np.testing.assert_allclose(channels["ABP"].samples, np.concatenate([first, gap, last, end]),
                               atol=0.01)
    np.testing.assert_array_equal(channels["PLETH"].samples[-101:], [np.nan, *np.full(100, 3.0)])
    write_wfdb(tmp_path, "m_2", last, unit="/mV")
    with pytest.raises(RecordingError, match="unit changes between segments"):
        whole(tmp_path / "m.hea")


def test_a_record_with_upper_case_endings_is_read(tmp_path):
    write_wfdb(tmp_path, "R", np.arange(100.0))
    (tmp_path / "R.HEA").write_text((tmp_path / "R.hea").read_text().replace("R.dat", "R.DAT"))
    os.remove(tmp_path / "R.hea")
    os.rename(tmp_path / "R.dat", tmp_path / "R.DAT")
    (found,) = recordings.find_recordings([tmp_path])
    np.testing.assert_allclose(whole(found.path)["ABP"].samples, np.arange(100))


@pytest.mark.parametrize("header, complaint", [
    ("", "not a readable WFDB header"), ("r 1 125 100\n", "not a readable WFDB header"),
    ("r 1 x 100\nr.dat 16\n", "not a readable WFDB header"),
    ("r 1 125 100\nabsent.dat 16\n", "data file is missing"),
    ("r 1 125 900\nr.dat 16\n", "data file is too short"),
    ("r/1 1 125 100\nr 100\n", "has segments itself"),
    ("r 1 125 100\n../s.dat 16\n", "outside its own folder"),
    ("m/1 1 125 100\n/etc/passwd 100\n", "outside its own folder")])
def test_a_bad_wfdb_record_gets_a_one_line_error(tmp_path, header, complaint):
    np.zeros(100, "<i2").tofile(tmp_path / "r.dat")
    (tmp_path / "r.hea").write_text(header)
    with pytest.raises(RecordingError, match=complaint) as caught:
        whole(tmp_path / "r.hea")
    assert "\n" not in str(caught.value) and str(tmp_path) not in caught.value.what


def test_a_drifting_clock_of_a_vital_file_shifts_no_late_samples_and_no_numbers(tmp_path, signals):
    hour = {"ABP": np.tile(signals["ABP"][:80 * 250], 45)}
    write_vital(tmp_path / "d.vital", hour, packed=False, drift=50e-6)
    pulse, rate = map(whole(tmp_path / "d.vital").get, ("SNUADC/ABP", "Solar8000/HR"))
    assert np.isfinite(pulse.samples).all() and pulse.samples.size == hour["ABP"].size
    assert pulse.fs == pytest.approx(250 / (1 + 50e-6), rel=1e-7)
    np.testing.assert_array_equal(rate.samples[::2], 60 + np.arange(100))
    assert rate.fs == 1 and np.isnan(rate.samples[1::2]).all()


def test_integer_tracks_of_a_vital_file_are_scaled_and_their_gaps_are_nan(tmp_path):
    vitaldb = pytest.importorskip("vitaldb")
    file = vitaldb.VitalFile()
    file.dtstart = file.dtend = 1.6e9
    file.dgmt = -540                    # recorded in Seoul, read anywhere
    blocks = [{"dt": 1.6e9 + i, "val": np.arange(100, dtype="<i2")} for i in (0, 1, 3)]
    track = file.add_track("Bx50/IBP1", blocks, srate=100, unit="mmHg")
    track.fmt, track.gain, track.offset = 5, 0.5, 10  # 16-bit
    file.to_vital(str(tmp_path / "i.vital"))
    expected = np.tile(10 + 0.5 * np.arange(100), 4)
    expected[200:300] = np.nan
    np.testing.assert_allclose(whole(tmp_path / "i.vital")["Bx50/IBP1"].samples, expected)
    assert opened(tmp_path / "i.vital").start_time == pd.Timestamp("2020-09-13 21:26:40")


@pytest.fixture
def edf(tmp_path, signals):
    """A continuous EDF+ file of 80 s."""
    path = tmp_path / "c.edf"
    write_edf(path, {name: samples[:80 * RATES[name]] for name, samples in signals.items()})
    overwrite(path, 168, b"31.12.8523.59.01")
    return path


def overwrite(path, first, text):
    with open(path, "r+b") as file:
        file.seek(first)
        file.write(text)


@pytest.mark.parametrize("first, text", [
    (168, b"00.00.00"), (176, b"10:20:30"), (8, b"M\xfcller, J\xf6rg"), (8, b"\x00\x00\x00"),
    (236, b"-1      "), (256 + 3 * 96 + 8, b"\xb5V      "),
    (256 + 3 * 104 + 8, b"0       0       "), (256 + 3 * 120 + 16, b"-       ")])
def test_odd_header_fields_that_are_not_needed_are_ignored(edf, first, text):
    expected = whole(edf)["ABP"].samples
    overwrite(edf, first, text)
    reader, start = opened(edf), "1985-12-31 10:20:30" if first == 176 else "1985-12-31 23:59:01"
    np.testing.assert_array_equal(reader.read(["ABP"], 0, np.inf)["ABP"].samples, expected)
    assert reader.start_time == (None if first == 168 else pd.Timestamp(start))


def test_a_clock_that_drifts_makes_no_gaps_in_an_edf_c_file(edf):
    expected, data = whole(edf)["ABP"].samples, edf.read_bytes()
    drifting = re.sub(rb"\+(\d+)\x14\x14\x00{5}", lambda stamp: (
        b"+%.2f\x14\x14" % (1.02 * int(stamp[1]))).ljust(len(stamp[0]), b"\0"), data)
    edf.write_bytes(drifting)
    assert drifting != data and np.array_equal(whole(edf)["ABP"].samples, expected)


@pytest.mark.parametrize("first, text, complaint", [
    (252, b"x   ", "unreadable header"), (236, b"900     ", "holds 80 data records, its "),
    (236, b"70      ", "its header says 70"),
    (256 + 3 * 104, b"5       5       5       5       ", "unreadable or equal limits"),
    (244, b"0       ", "no signals"), (256 + 3 * 104, b"x       ", "unreadable or equal limits"),
    (256 + 2 * 16, b"no times", "data records without time")])
def test_a_bad_edf_file_gets_a_one_line_error(edf, first, text, complaint):
    overwrite(edf, 192, b"EDF+D")       # each data record says when it began
    overwrite(edf, first, text)
    with pytest.raises(RecordingError, match=complaint):
        whole(edf)


def test_the_rate_of_hdf5_is_an_attribute_of_the_dataset_or_its_parents_or_given(tmp_path):
    with h5py.File(tmp_path / "w.h5", "w") as file:
        file["a/light"] = np.arange(50, dtype="i2")[None]
        file["b/light"] = np.arange(50.0)
        file["a"].attrs["sampling_rate"] = "50 Hz"
    reader = opened(tmp_path / "w.h5")
    np.testing.assert_array_equal(reader.read(["a/light"], 0, 9)["a/light"].samples, np.arange(50))
    assert reader.channels["a/light"].fs == 50
    given = opened(tmp_path / "w.h5", 25)
    assert given.channels["b/light"].fs == 25 and "another rate" in given.notes[0]
    assert not reader.notes and not opened(tmp_path / "w.h5", 50).notes
    with pytest.raises(RecordingError, match="give the rate: --fs HZ"):
        reader.read(["b/light"], 0, 9)
    with h5py.File(tmp_path / "w.h5", "a") as file:
        file["b"].attrs["fs"] = b"fast"
    assert np.isnan(opened(tmp_path / "w.h5").channels["b/light"].fs)


@pytest.mark.parametrize("attributes, shift", [
    ({"scale_factor": 0.01}, 0), ({"scale_factor": 0.01, "add_offset": 5.0}, 5),
    ({"gain": 0.01}, 0), ({"gain": np.array([0.01]), "offset": 5}, 5), ({"gain": 100.0}, 0),
    ({"adc_gain": 100, "baseline": 500}, -5), ({"gain": 100, "baseline": 500}, -5)])
def test_integers_of_hdf5_are_scaled_by_their_attributes(tmp_path, attributes, shift):
    with h5py.File(tmp_path / "w.h5", "w") as file:
        file["abp"] = np.array([8000, 8100, -32768, 8250], "<i2")
        file["abp"].attrs.update({"fs": 125, "_FillValue": np.int16(-32768), **attributes})
    got = whole(tmp_path / "w.h5")["abp"].samples
    np.testing.assert_allclose(got, np.array([80, 81, np.nan, 82.5]) + shift)


def test_only_numbers_of_the_file_are_channels_and_names_cannot_control_the_terminal(tmp_path):
    with h5py.File(tmp_path / "w.h5", "w") as file:
        file["external"] = h5py.ExternalLink("other.h5", "abp")
        file["loop/again"] = file
        file["text"], file["complex"], file["table"] = ["a"], np.zeros(9, complex), np.zeros((9, 9))
        file["a\x1b[31m\nb"] = np.arange(9.0)
        file["a\x1b[31m\nb"].attrs["units"] = "\x1b[2J"
    reader = opened(tmp_path / "w.h5")
    assert [(name, c.unit) for name, c in reader.channels.items()] == [("a?[31m b", "?[2J")]
    with pytest.raises(RecordingError) as caught:
        reader.read(["a?[31m b"], 0, 9)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("ending", ["h5", "vital", "csv"])
def test_a_small_file_that_promises_absurd_amounts_is_refused_at_a_stated_limit(tmp_path, ending):
    path = tmp_path / f"a.{ending}"
    if ending == "h5":
        with h5py.File(path, "w") as file:
            file.create_dataset("abp", (10**12,), "f4", chunks=(10**6,)).attrs["fs"] = 125
    elif ending == "vital":
        path.write_bytes(gzip.compress(b"VITA") + 40 * gzip.compress(bytes(10 << 20)))
    else:
        times = np.arange(12) / 5000 + 600000 * (np.arange(12) > 8)
        pd.DataFrame({"time": times, "abp": 80}).to_csv(path, index=False)
    with pytest.raises(RecordingError, match="may hold [0-9,]+ at most"):
        opened(path)
