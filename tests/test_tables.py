"""tables.py: how CSV and Parquet files are written, their time column, their rate and gaps."""
import io

import numpy as np
import pandas as pd
import pytest

import tables
from formats import RecordingError
from tables import Table, read_readings


def table(path, text, encoding="utf-8", **options):
    path.write_bytes(text.encode(encoding))
    return Table(str(path), **options)


def whole(reader):
    return {name: channel.samples
            for name, channel in reader.read(list(reader.channels), 0, np.inf).items()}


def rows(times, *columns, header="time_s,abp", form="{:.3f}"):
    """The text of a CSV with these columns (default: 80 + row number)."""
    columns = columns or (80 + np.arange(len(times)),)
    out = io.StringIO()
    out.write(header + "\n")
    for t, *values in zip(times, *columns):
        out.write(",".join([t if isinstance(t, str) else form.format(t), *map(str, values)]) + "\n")
    return out.getvalue()


# ----------------------------------------------------------------------------------------- dialects

HEADER = ["time_s", "ABP", "PPG"]
ROWS = [[0, 80.5, 1], [0.01, 81.25, 2], [0.02, 82, 3], [0.03, 83, 4]]


def written(separator=",", header=HEADER, lines=ROWS, end="\n"):
    return end.join(separator.join(map(str, line)) for line in [header, *lines]) + end


@pytest.mark.parametrize("text, encoding", [
    (written(), "utf-8"), (written(), "utf-8-sig"), (written(), "utf-16"), (written(), "utf-16-le"),
    (written(end="\r\n"), "utf-8"), (written(end="\r"), "utf-8"), (written(";"), "utf-8"),
    (written("\t"), "utf-8"), (written("|"), "utf-8"), (written(" "), "utf-8"),
    (written(", "), "utf-8"),
    (written(";").replace(".", ","), "utf-8"), (written("\t").replace(".", ","), "utf-8"),
    ("sep=;\n" + written(";"), "utf-8"), ("sep=\t\r\n" + written("\t", end="\r\n"), "utf-8"),
    ("# of monitor 3\n\n# at 100 Hz\n" + written(), "utf-8"),
    ("# " + written(), "utf-8"),                             # np.savetxt's header
    ("Patient;Müller;\nWard;7\n" + written(";"), "cp1252"),
    ("Export of bed 7\nStart,2020-01-01 10:00\n\n" + written(), "utf-8"),
    (written(lines=[["s", "mmHg", "NU"], *ROWS]), "utf-8"),
    (written(lines=[["[s]", "(mmHg)", ""], *ROWS]), "utf-8"),
    (written(lines=[*ROWS, ["", "", ""], ["", "", ""]]) + "\n\n", "utf-8"),
    (written(lines=[*ROWS[:2], ["", "", ""], "#", *ROWS[2:]]), "utf-8"),
    (written(header=['"time_s"', '"ABP"', '"PPG"'],          # R's write.csv and write.table
             lines=[[f'"{i + 1}"', *row] for i, row in enumerate(ROWS)]), "utf-8"),
    (written(" ", lines=[[i + 1, *row] for i, row in enumerate(ROWS)]), "utf-8"),
    (written(header=["", *HEADER], lines=[[i, *row] for i, row in enumerate(ROWS)]), "utf-8"),
    (written(lines=[[*row, ""] for row in ROWS]), "utf-8"),  # a comma at each row's end
    (written(header=[*HEADER, ""], lines=[[*row, ""] for row in ROWS]), "utf-8"),
    (written(header=[*HEADER, ""]), "utf-8"),
    (written(lines=[[f'"{cell}"' for cell in row] for row in ROWS]), "utf-8"),
    (written(header=["'Elapsed time'", "'ABP'", "'PPG'"],    # WFDB's rdsamp -v -pe
             lines=[["'hh:mm:ss.mmm'", "'mmHg'", "'NU'"],
                    *(["'0:00.0" + str(int(100 * row[0])) + "0'", *row[1:]] for row in ROWS)]),
     "utf-8"),
])
def test_a_table_is_read_in_whatever_form_it_was_written(tmp_path, text, encoding):
    read = table(tmp_path / "a.csv", text, encoding)
    assert read.fs == 100
    np.testing.assert_array_equal(whole(read)["ABP"], [80.5, 81.25, 82, 83])
    np.testing.assert_array_equal(whole(read)["PPG"], [1, 2, 3, 4])


def test_thousands_separators(tmp_path):
    for text in ('time_s,abp\n0.00,"1,080.5"\n0.01,"1,081"\n0.02,"82"\n',
                 "time_s;abp\n0,00;1.080,5\n0,01;1.081,0\n0,02;82\n",
                 "time_s;abp\n0,00;1 080,5\n0,01;1 081\n0,02;82\n",
                 "time_s,abp\n0.00,1'080.5\n0.01,1'081\n0.02,82\n"):
        read = table(tmp_path / "a.csv", text)
        np.testing.assert_array_equal(whole(read)["abp"], [1080.5, 1081, 82])


@pytest.mark.parametrize("cell", ["", "NaN", "nan", "NA", "n/a", "null", "None", "-", "--", "---",
                                  "*", "?", "invalid", "inf"])
def test_an_empty_cell_and_the_words_for_it_are_missing_values(tmp_path, cell):
    text = written(lines=[*ROWS[:2], [0.02, cell, 3], ROWS[3]])
    samples = whole(table(tmp_path / "a.csv", text))
    np.testing.assert_array_equal(samples["ABP"], [80.5, 81.25, np.nan, 83])
    np.testing.assert_array_equal(samples["PPG"], [1, 2, 3, 4])


def test_units_come_from_the_header_or_the_row_below_it(tmp_path):
    text = written(header=["Time (ms)", "ABP [kPa]", "pleth"])
    assert table(tmp_path / "a.csv", text).channels["ABP [kPa]"].unit == "kPa"
    text = written(lines=[["ms", "cmH2O", ""], *([1000 * row[0], *row[1:]] for row in ROWS)])
    read = table(tmp_path / "a.csv", text.replace("time_s", "time"))
    assert (read.fs, read.channels["ABP"].unit, read.channels["PPG"].unit) == (100, "cmH2O", "")


@pytest.mark.parametrize("text, complaint", [
    ("", "no header line"),
    ("0,80,1\n0.1,81,2\n", "no header line"),
    ("time_s,abp\n", "no rows"),
    ("time_s,abp\n0,80\n", "fewer than two rows"),
    ("when,abp\n0,80\n1,81\n", "no time column"),
    ("time,abp\n0,80\n0.1,8o\n0.2,82\n", "line 3, column 2: expected a number"),
    ("time,abp\n0,80\n0.1,81\n0.2,82\n0.3,83\n-700,84\n-699.9,85\n-699.8,84\n",
     "line 6: time does not increase, but goes back by 700.4 s"),
    ("time,abp\n0,80\n,81\n0.2,82\n", "line 3: no time"),
    ("time,abp\n0,80\n1,81\n2,82\n1e9,83\n1000000001,83\n", "line 5: jumps in time of over a week"),
    ("time,abp\n" + "".join(f"{i + 0.4 * (i > 50) * (i - 50)},80\n" for i in range(99)),
     "not evenly spaced"),
    ("time,abp\n0,80\n0.1,81,82\n0.2,82\n0.3,80\n", "line 3 has 3 cells, the header names 2"),
    ("time,abp,ppg\n0,80,1\n1,81\n2,82,1\n3,80,1\n", "line 3 has 2 cells, the header names 3"),
    ("time,abp,ppg\n0,80\n0.1,81\n0.2,82\n", "line 2 has 2 cells, the header names 3"),
    ("time,abp\n" + "".join(f"0,{i}0,80,5\n" for i in range(9)), "export it with semicolons"),
    ("time;abp\n0.1;80,5\n0.2;81,5\n", "decimal commas and decimal points"),
    ("PK\x03\x04 and so on\n", "a ZIP or Excel file"),
    ("time,abp\n0,80\n1," + "8" * (tables.MAX_LINE + tables.TABLE_CHARS) + "\n", "a line of over"),
])
def test_what_is_not_certain_is_refused_in_one_line(tmp_path, text, complaint):
    with pytest.raises(RecordingError) as caught:
        whole(table(tmp_path / "bad.csv", text))
    assert complaint in str(caught.value)
    assert "bad.csv" not in caught.value.what and "abp" not in caught.value.what
    assert "\n" not in str(caught.value)


def test_a_binary_file_named_csv_gets_one_line(tmp_path):
    (tmp_path / "x.csv").write_bytes(np.random.default_rng(0).bytes(5000))
    with pytest.raises(RecordingError, match="binary"):
        Table(str(tmp_path / "x.csv"))


def test_a_row_that_was_cut_at_the_file_s_end_is_left_out_and_said(tmp_path):
    read = table(tmp_path / "a.csv", written() + "0.04,8")
    assert whole(read)["ABP"].size == 4
    assert any("cut short" in note for note in read.notes)


# ------------------------------------------------------------------------------------ rate and gaps

@pytest.mark.parametrize("fs", [50, 60, 62.4725, 100, 124.945, 125, 240, 250, 500, 1000])
def test_the_rate_is_exact_though_stamps_are_rounded_to_milliseconds(tmp_path, fs):
    n = int(90 * fs)
    read = table(tmp_path / "a.csv", rows(np.arange(n) / fs))
    assert read.fs == pytest.approx(fs, abs=0.1 * fs / n)
    assert whole(read)["abp"].size == n and np.isfinite(whole(read)["abp"]).all()
    assert read.end_s == pytest.approx(n / fs, abs=0.1 / fs)


@pytest.mark.parametrize("fs, jitter_ms", [(60, 3), (100, 1), (100, 2), (125, 1), (125, 1.5),
                                           (250, 0.5)])
def test_jitter_is_no_gap_and_does_not_move_the_rate(tmp_path, fs, jitter_ms):
    rng = np.random.default_rng(int(fs + 10 * jitter_ms))
    n = int(240 * fs)
    times = np.arange(n) / fs + rng.normal(0, jitter_ms / 1000, n)
    read = table(tmp_path / "a.csv", rows(times, form="{:.6f}"))
    assert (read.fs, read.end_s) == (fs, 240)
    np.testing.assert_array_equal(whole(read)["abp"], 80 + np.arange(n))


@pytest.mark.parametrize("fs", [60, 125, 250])
@pytest.mark.parametrize("jitter_ms", [0, 0.7])
def test_missing_rows_and_gaps_are_found_where_they_are_and_no_others(tmp_path, fs, jitter_ms):
    rng, n = np.random.default_rng(3), int(600 * fs)
    keep = np.ones(n, bool)
    for first, length in ((1000, 1), (1010, 1), (2000, 2), (3000, 300), (3303, 50), (n - 500, 1)):
        keep[first:first + length] = False
    times = np.round(np.arange(n) / fs + rng.normal(0, jitter_ms / 1000, n), 3)
    read = table(tmp_path / "a.csv", rows(times[keep], 80 + np.flatnonzero(keep)))
    samples = whole(read)["abp"]
    expected = np.where(keep, 80.0 + np.arange(n), np.nan)
    assert read.fs == fs
    np.testing.assert_array_equal(np.isnan(samples[[1000, 1010, 2000, 2001]]), True)
    np.testing.assert_array_equal(samples, expected)
    assert any("gaps" in note for note in read.notes)


def test_a_long_gap_is_placed_to_the_sample_and_its_length_is_said(tmp_path):
    fs = 124.945
    times = np.concatenate((np.arange(20000), 20000 + 450000 + np.arange(20000)))
    read = table(tmp_path / "a.csv", rows(times / fs, times))
    got = read.read(["abp"], 0, np.inf)["abp"].samples
    np.testing.assert_array_equal(got[times], times)
    assert np.isnan(got).sum() == 450000
    assert f"{450000 / fs:.6g} s" in read.notes[0]


def test_a_repeated_row_a_backward_stamp_and_a_wrong_one_shift_nothing(tmp_path):
    times = np.round(np.arange(6000) / 60, 3)
    values = 80 + np.arange(6000)
    times[1000] = times[999]            # a repeated stamp
    times[2000] -= 0.05                 # a step back
    times[3000] += 500                  # a slip
    read = table(tmp_path / "a.csv", rows(times, values))
    np.testing.assert_array_equal(whole(read)["abp"], values)
    times[4000:4002] += 1e7             # two from a clock that was not set
    read = table(tmp_path / "a.csv", rows(times, values))
    np.testing.assert_array_equal(whole(read)["abp"], values)
    assert read.fs == 60 and "times: 3 stamps do not fit those around them" in read.notes[0]
    times = np.round(np.arange(6000) / 60, 3)
    twice = np.sort(np.append(np.arange(6000), 2500))   # a whole row twice
    read = table(tmp_path / "a.csv", rows(times[twice], values[twice]))
    np.testing.assert_array_equal(whole(read)["abp"], values)
    assert "1 rows repeat" in read.notes[0]


def test_stamps_in_whole_seconds_still_give_the_rate(tmp_path):
    times = np.floor(np.arange(125 * 90) / 125)
    gone = (times > 40) & (times < 48)
    read = table(tmp_path / "a.csv", rows(times[~gone], np.arange(125 * 90)[~gone], form="{:.0f}"))
    assert read.fs == pytest.approx(125, rel=1e-3)
    assert whole(read)["abp"].size == pytest.approx(125 * 90, abs=3)
    assert np.isnan(whole(read)["abp"]).sum() == pytest.approx(gone.sum(), abs=3)


def test_a_table_is_read_in_spans_as_in_one_and_twice_over(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "TABLE_CHARS", 1000)
    monkeypatch.setattr(tables, "TABLE_ROWS", 50)
    keep = np.setdiff1d(np.arange(9000), np.arange(4000, 4600))
    keep = np.setdiff1d(keep, [700, 710, 8990])
    read = table(tmp_path / "a.csv", rows(keep / 60, keep))
    together = whole(read)["abp"]
    np.testing.assert_array_equal(together[keep], keep)
    assert np.isnan(together).sum() == 9000 - keep.size
    for _ in range(2):
        parts = [read.read(["abp"], a, a + 10)["abp"] for a in range(0, 150, 10)]
        assert [part.first for part in parts] == list(range(0, 9000, 600))
        np.testing.assert_array_equal(np.concatenate([part.samples for part in parts]), together)


def test_a_slower_channel_has_a_cell_in_every_second_row(tmp_path):
    n = np.arange(4000)
    slow = ["" if i % 2 == 0 else str(i) for i in n]
    read = table(tmp_path / "a.csv", rows(n / 250, n, slow, header="t,abp,ppg"))
    ppg = read.read(["ppg"], 2.0, 10.0)["ppg"]
    assert (ppg.fs, ppg.start_s) == (125, 1 / 250)
    np.testing.assert_array_equal(ppg.samples, 2 * np.arange(ppg.first, ppg.first + 1000) + 1)


def test_a_given_rate_replaces_the_time_column(tmp_path):
    text = "date,abp,ppg\n12:00,80,1\n12:00,81,2\n12:00,82,3\n"
    read = table(tmp_path / "a.csv", text, file_fs=50)
    assert (read.fs, read.end_s) == (50, 0.06)
    np.testing.assert_array_equal(read.read(["abp"], 0, 1)["abp"].samples, [80, 81, 82])


# ------------------------------------------------------------------------------------- time columns

@pytest.mark.parametrize("header, form", [
    ("Time (ms)", lambda t: f"{1000 * t:.3f}"), ("t_ms", lambda t: f"{1000 * t:.0f}"),
    ("time [min]", lambda t: f"{t / 60:.9f}"), ("elapsed_us", lambda t: f"{1e6 * t:.0f}"),
    ("Elapsed time", lambda t: f"{t:.4f}"), ("Seconds", lambda t: f"{t:.3f}"),
    ("Time (h)", lambda t: f"{t / 3600:.10f}"),
    ("timestamp", lambda t: f"{1.6e9 + t:.4f}"),                 # since 1970, in s,
    ("timestamp", lambda t: f"{1.6e12 + 1000 * t:.0f}"),         # ms
    ("timestamp", lambda t: f"{1.6e18 + 1e9 * t:.0f}"),          # and ns
    ("time", lambda t: f"{44000 + t / 86400:.10f}"),             # Excel's days
    ("time", lambda t: f"10:{t // 60:02.0f}:{t % 60:06.3f}"),
    ("Time", lambda t: f"{t // 60:.0f}:{t % 60:06.3f}"),         # minutes and seconds
    ("Time", lambda t: f"11:{t // 60:02.0f}:{t % 60:06.3f} PM"),
    ("datetime", lambda t: f"2023-06-05T10:{t // 60:02.0f}:{t % 60:06.3f}Z"),
    ("Timestamp", lambda t: f"2023-06-05 10:{t // 60:02.0f}:{t % 60:06.3f}+02:00"),
    ("date_time", lambda t: f"5.6.2023 10:{t // 60:02.0f}:{t % 60:06.3f}"),
    ("Date/Time", lambda t: f"6/5/2023 10:{t // 60:02.0f}:{t % 60:06.3f}"),
    ("time", lambda t: f"05-Jun-2023 10:{t // 60:02.0f}:{t % 60:06.3f}"),
    ("", lambda t: f"2023-06-05 10:{t // 60:02.0f}:{t % 60:09.6f}"),  # a pandas index
])
def test_units_dates_and_clock_times_of_the_time_column(tmp_path, header, form):
    text = rows([form(i / 60) for i in range(7200)], header=header + ",abp")
    read = table(tmp_path / "a.csv", text)
    assert read.fs == pytest.approx(60, abs=0.1 * 60 / 7200)
    assert whole(read)["abp"].size == 7200 and np.isfinite(whole(read)["abp"]).all()
    assert read.end_s == pytest.approx(120, abs=2e-3)
    if "2023" in form(0):
        assert (read.start_time.year, read.start_time.minute) == (2023, 0)


def test_a_date_and_a_clock_time_in_two_columns(tmp_path):
    start = pd.Timestamp("2023-06-05 23:59:30")
    stamps = [start + pd.Timedelta(milliseconds=20 * i) for i in range(3000)]
    text = "Date;Time;abp\n" + "".join(
        f"{stamp:%d.%m.%Y};{stamp:%H:%M:%S.%f};{i},5\n" for i, stamp in enumerate(stamps))
    read = table(tmp_path / "a.csv", text)
    assert (read.fs, read.start_time) == (50, start.to_pydatetime())
    assert whole(read)["abp"].size == 3000


def test_clock_times_go_on_past_midnight(tmp_path):
    times = (86400 - 30 + np.arange(6000) / 100) % 86400
    text = rows([f"{t // 3600:02.0f}:{t % 3600 // 60:02.0f}:{t % 60:06.3f}" for t in times],
                header="time,abp")
    read = table(tmp_path / "a.csv", text)
    assert (read.fs, read.end_s) == (100, 60)
    assert np.isfinite(whole(read)["abp"]).all()


@pytest.mark.parametrize("zone, start", [("Europe/Berlin", "2023-03-26 00:59"),
                                         ("Europe/Berlin", "2023-10-29 00:59"),
                                         ("America/New_York", "2023-03-12 06:59")])
def test_a_change_of_daylight_saving_time_is_neither_a_gap_nor_a_step_back(tmp_path, zone, start):
    stamps = pd.date_range(start, periods=12000, freq="10ms", tz="UTC").tz_convert(zone)
    text = rows([f"{stamp:%Y-%m-%d %H:%M:%S.%f}" for stamp in stamps], header="time,abp")
    read = table(tmp_path / "a.csv", text)
    assert (read.fs, read.end_s) == (100, 120)
    assert np.isfinite(whole(read)["abp"]).all()
    assert any("daylight" in note for note in read.notes)


def test_parquet_holds_dates_numbers_and_texts_as_times(tmp_path):
    pytest.importorskip("pyarrow")
    frame = pd.DataFrame({"abp": np.arange(600.0), "note": "x"})
    elapsed = pd.to_timedelta(np.arange(600) * 10, "ms")
    for times in (pd.Timestamp("2020-01-01") + elapsed, elapsed, np.arange(600) * 10,
                  pd.Timestamp("2020-01-01", tz="Europe/Rome") + elapsed,
                  (pd.Timestamp("2020-01-01") + elapsed).astype(str)):
        name = "time_ms" if isinstance(times, np.ndarray) else "time"
        frame.assign(**{name: times}).to_parquet(tmp_path / "a.parquet")
        read = Table(str(tmp_path / "a.parquet"))
        assert (read.fs, list(read.channels)) == (100, ["abp"])
        np.testing.assert_array_equal(whole(read)["abp"], np.arange(600))
    frame.set_index(pd.Timestamp("2020-01-01") + elapsed).to_parquet(tmp_path / "a.parquet")
    assert Table(str(tmp_path / "a.parquet")).fs == 100


def test_readings_at_any_times(tmp_path):
    path = str(tmp_path / "v.csv")
    with open(path, "w") as file:
        file.write("time (min),MAP (kPa),note\n0,10.67,a\n2,,b\n7.5,12,c\n")
    times, frame, units = read_readings(path)
    np.testing.assert_allclose(times, [0, 120, 450])
    assert list(frame.columns) == ["MAP (kPa)"] and units["MAP (kPa)"] == "kPa"
    start = pd.Timestamp("2023-06-05 23:50").to_pydatetime()
    for first in ("2023-06-05 23:55,80", "23:55,80", "23:55:00,80"):
        with open(path, "w") as file:
            file.write("time,map\n" + first + "\n" + first.replace("23:55", "23:58") + "\n")
        np.testing.assert_allclose(read_readings(path, start)[0], [300, 480])
    with pytest.raises(RecordingError, match="seconds from its start"):
        read_readings(path)
