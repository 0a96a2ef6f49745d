"""tables.py: how CSV and Parquet files are written, their time column, their rate and gaps."""
import datetime

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


HEADER = ["time_s", "ABP", "PPG"]
ROWS = [[0, 80.5, 1], [0.01, 81.25, 2], [0.02, 82, 3], [0.03, 83, 4]]


def written(separator=",", header=HEADER, lines=ROWS, end="\n"):
    return end.join(separator.join(map(str, line)) for line in [header, *lines]) + end


def rows(times, *columns, header="time_s,abp", form="{:.3f}".format):
    """The text of a CSV with these columns (default: 80 + row number)."""
    columns = columns or (80 + np.arange(len(times)),)
    return written(header=[header], lines=zip(map(form, times), *columns))


@pytest.mark.parametrize("text", [
    *map(written, (",", ", ", ";", "\t", "|", " ")), written(end="\r\n"), written(end="\r"),
    written(";").replace(".", ","), written("\t").replace(".", ","),
    "sep=;\n" + written(";"), "sep=\t\r\n" + written("\t", end="\r\n"),
    "# of monitor 3\n\n# at 100 Hz\n" + written(), "# " + written(),  # np.savetxt's header
    "Patient;Müller;\nWard;7\n" + written(";"),
    "Export of bed 7\nStart,2020-01-01 10:00\n\n" + written(),
    written(lines=[["s", "mmHg", "NU"], *ROWS]), written(lines=[["[s]", "(mmHg)", ""], *ROWS]),
    written(lines=[*ROWS, ["", "", ""], ["", "", ""]]) + "\n\n",
    written(lines=[*ROWS[:2], ["", "", ""], "#", *ROWS[2:]]),
    written(header=['"time_s"', '"ABP"', '"PPG"'],          # R's write.csv and write.table
            lines=[[f'"{i + 1}"', *row] for i, row in enumerate(ROWS)]),
    written(" ", lines=[[i + 1, *row] for i, row in enumerate(ROWS)]),
    written("   ", header=["  time_s", *HEADER[1:]]),
    written(header=["", *HEADER], lines=[[i, *row] for i, row in enumerate(ROWS)]),
    written(lines=[[*row, ""] for row in ROWS]),            # a comma at each row's end
    written(header=[*HEADER, ""]), written(lines=[[f'"{cell}"' for cell in row] for row in ROWS]),
    written(header=["'Elapsed time'", "'ABP'", "'PPG'"],    # WFDB's rdsamp -v -pe
            lines=[["'hh:mm:ss.mmm'", "'mmHg'", "'NU'"],
                   *(["'0:00.0" + str(int(100 * row[0])) + "0'", *row[1:]] for row in ROWS)])])
def test_a_table_is_read_in_any_usual_form(tmp_path, text):
    for encoding in ("utf-8", "utf-8-sig", "utf-16", "cp1252"):
        read = table(tmp_path / "a.csv", text, encoding)
        assert read.fs == 100
        np.testing.assert_array_equal(whole(read)["ABP"], [80.5, 81.25, 82, 83])
        np.testing.assert_array_equal(whole(read)["PPG"], [1, 2, 3, 4])


@pytest.mark.parametrize("cell", ["", "NaN", "n/a", "NULL", "None", "---", "*", "?", "invalid",
                                  "inf"])
def test_cells_without_a_number_are_missing_and_columns_without_one_no_channels(tmp_path, cell):
    lines = [[0, cell, 1, "a"], [*ROWS[1], cell], [0.02, cell, 3, "b"], [*ROWS[3], "c"]]
    samples = whole(table(tmp_path / "a.csv", written(header=[*HEADER, "note"], lines=lines)))
    np.testing.assert_array_equal(samples["ABP"], [np.nan, 81.25, np.nan, 83])
    np.testing.assert_array_equal(samples["PPG"], [1, 2, 3, 4])
    assert len(samples) == 2


def test_units_come_from_the_header_or_the_row_below_it(tmp_path):
    lines = [["ms", "cmH2O", ""], *([1000 * row[0], *row[1:]] for row in ROWS)]
    read = table(tmp_path / "a.csv", written(header=["time", "ABP", "PPG [V]"], lines=lines))
    assert read.fs == 100
    assert [channel.unit for channel in read.channels.values()] == ["cmH2O", "V"]


@pytest.mark.parametrize("text, complaint", [
    ("", "no header line"), ("0,80,1\n0.1,81,2\n", "no header line"),
    ("time_s,abp\n", "no rows"), ("time_s,abp\n0,80\n", "fewer than two rows"),
    ("when,abp\n0,80\n1,81\n", "no time column"),
    ("time,abp\n0,80\n0.1,8o\n0.2,82\n", "row 2, column 2: expected a number"),
    ("time,abp\n0,80\n0.1,81\n0.2,82\n0.3,83\n-700,84\n-699.9,85\n-699.8,84\n",
     "row 5: time does not increase, but goes back by 700.4 s"),
    ("t,abp\n3.2,80\n0.4,81\n6.6,82\n7.6,83\n", "do not increase on the whole"),
    ("time,abp\n0,80\n,81\n0.2,82\n", "row 2: no readable time"),
    ("time,abp\n0,80\n1,81\n2,82\n1e9,83\n1000000001,83\n", "row 4: jumps in time of over a week"),
    (rows([i + 0.4 * max(i - 50, 0) for i in range(99)]), "not evenly spaced"),
    ("time abp ppg\n0 80 1\n1 81\n2 82 1\n3 80 1\n", "row 2 has 2 cells, the header names 3"),
    ("time,abp\n" + "".join(f"0,{i}0,80,5\n" for i in range(9)), "with semicolons"),
    ("t\n" + "".join(f"{i // 5},{i}\n" for i in range(9)), "row 1 has 2 cells, the header names 1"),
    ('time_s,abp\n0.00,"1,080.5"\n0.01,"1,081"\n', "thousands separators"),
    ("time_s;abp\n" + "".join(f"0,{i:03};80,5\n" for i in range(400)) + "0,4;1.080,5\n0,401;80\n",
     "row 401, column 2"),              # below the lines that the dialect is taken from
    ("time,abp\n0,80,7\n0.1,81\n0.2,82\n", "row 1 has 3 cells, the header names 2"),
    ("time_s;abp\n0,00;1 080,5\n0,01;1 081\n", "thousands separators"),
    ("PK\x03\x04 and so on\n", "a ZIP or Excel file"), ("a,b\n\x00\x01\n", "binary data"),
    ("time,abp\n0,80\n1," + "8" * (tables.MAX_LINE + tables.TABLE_CHARS) + "\n", "a line of over")])
def test_an_ambiguous_or_damaged_table_is_refused_in_one_line(tmp_path, text, complaint):
    with pytest.raises(RecordingError) as caught:
        whole(table(tmp_path / "bad.csv", text))
    assert complaint in str(caught.value) and "\n" not in str(caught.value)
    assert "bad.csv" not in caught.value.what and "abp" not in caught.value.what


def test_a_last_row_that_is_cut_short_is_left_out_with_a_note(tmp_path):
    read = table(tmp_path / "a.csv", written() + "0.04,8")
    assert whole(read)["ABP"].size == 4 and "cut short" in read.notes[0]


@pytest.mark.parametrize("fs, jitter_ms, has_gaps", [
    (50, 0, False), (60, 0, True), (62.4725, 0, False), (124.945, 0, True), (1000, 0, False),
    (60, 3, False), (100, 2, False), (125, 1.5, False), (250, 0.5, False), (60, 0.7, True),
    (250, 0.7, True)])
def test_rows_lie_where_they_were_sampled_though_stamps_jitter(tmp_path, fs, jitter_ms, has_gaps):
    rng, n = np.random.default_rng(3), int(60 * fs)
    keep = np.ones(n, bool)
    for first, length in ((1000, 1), (1010, 1), (2000, 2), (2500, 300), (2803, 50), (n - 500, 1)):
        keep[first:first + length] = not has_gaps
    times = np.round(np.arange(n) / fs + rng.normal(0, jitter_ms / 1000, n), 3)
    read = table(tmp_path / "a.csv", rows(times[keep], 80 + np.flatnonzero(keep)))
    assert read.fs == pytest.approx(fs, abs=0.1 * fs / n)
    assert read.end_s == pytest.approx(n / fs, abs=0.1 / fs)
    np.testing.assert_array_equal(whole(read)["abp"], np.where(keep, 80.0 + np.arange(n), np.nan))
    gaps = f"times: {fs:.6g} rows/s; gaps: 6, together {355 / fs:.6g} s (355 rows missing)"
    assert read.notes == [gaps] * has_gaps


def test_repeated_backward_and_wrong_stamps_shift_no_row(tmp_path):
    times = np.round(np.arange(6000) / 60, 3)
    wrong, values = times.copy(), 80 + np.arange(6000)
    wrong[1000], wrong[2000] = times[999], times[2000] - 0.05
    wrong[3000] += 500
    wrong[4000:4002] += 1e7             # the clock was not set
    read = table(tmp_path / "a.csv", rows(wrong, values))
    np.testing.assert_array_equal(whole(read)["abp"], values)
    assert read.fs == 60 and "times: 3 rows with odd stamps" in read.notes[0]
    twice = np.sort(np.append(np.arange(6000), 2500))   # a whole row twice
    read = table(tmp_path / "a.csv", rows(times[twice], values[twice]))
    np.testing.assert_array_equal(whole(read)["abp"], values)
    assert "1 rows repeat" in read.notes[0]


def test_stamps_in_whole_seconds_still_give_the_rate(tmp_path):
    times = np.floor(np.arange(125 * 90) / 125)
    kept = np.flatnonzero((times <= 40) | (times >= 48))
    read = table(tmp_path / "a.csv", rows(times[kept], kept))
    missing = np.isnan(whole(read)["abp"])
    assert read.fs == pytest.approx(125, rel=1e-3)
    np.testing.assert_allclose([missing.size, missing.sum()],
                               [times.size, times.size - kept.size], atol=3)


@pytest.mark.parametrize("start_s, fs", [(0, 100), (20, 100), (50, 62.5)])
def test_stamps_in_whole_minutes_give_the_rate_where_two_begin(tmp_path, start_s, fs):
    times = (start_s + np.arange(int(190 * fs)) / fs) // 60 * 60
    assert table(tmp_path / "a.csv", rows(times)).fs == pytest.approx(fs, rel=1e-3)
    with pytest.raises(RecordingError, match="steps of 60 s, too few"):
        table(tmp_path / "a.csv", rows(times[times < 120][-7000:]))


def test_spans_join_to_the_whole_and_can_be_read_again(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "TABLE_CHARS", 1000)
    monkeypatch.setattr(tables, "TABLE_ROWS", 50)
    keep = np.setdiff1d(np.arange(3000), [*range(2000, 2600), 700, 710, 2990])
    read = table(tmp_path / "a.csv", rows(keep / 60, keep))
    together = whole(read)["abp"]
    np.testing.assert_array_equal(together[keep], keep)
    assert np.isnan(together).sum() == 3000 - keep.size
    for _ in range(2):
        parts = [read.read(["abp"], a, a + 10)["abp"] for a in range(0, 50, 10)]
        assert [part.first for part in parts] == list(range(0, 3000, 600))
        np.testing.assert_array_equal(np.concatenate([part.samples for part in parts]), together)


def test_a_slower_channel_has_a_cell_in_every_second_row(tmp_path):
    n = np.arange(4000)
    cells = np.where(n % 2, n.astype(str), "")
    read = table(tmp_path / "a.csv", rows(n / 250, n, cells, header="t,abp,ppg"))
    ppg = read.read(["ppg"], 2.0, 10.0)["ppg"]
    assert (ppg.fs, ppg.start_s) == (125, 1 / 250)
    np.testing.assert_array_equal(ppg.samples, 2 * np.arange(ppg.first, ppg.first + 1000) + 1)


def test_a_given_rate_replaces_the_times_with_a_note_if_they_differ(tmp_path):
    read = table(tmp_path / "a.csv", "date,abp\n12:00,80\n12:00,81\n12:00,82\n", file_fs=50)
    assert (read.fs, read.end_s) == (50, 0.06)
    np.testing.assert_array_equal(whole(read)["abp"], [80, 81, 82])
    for fs, notes in ((50, ["--fs 50, though its times say 100 rows/s"]), (100, [])):
        assert table(tmp_path / "a.csv", rows(np.arange(500) / 100), file_fs=fs).notes == notes


@pytest.mark.parametrize("header, form", [
    ("Time (ms)", lambda t: f"{1000 * t:.3f}"), ("t_ms", lambda t: f"{1000 * t:.0f}"),
    ("time [min]", lambda t: f"{t / 60:.9f}"), ("elapsed_us", lambda t: f"{1e6 * t:.0f}"),
    ("Elapsed time", lambda t: f"{t:.4f}"), ("Seconds", lambda t: f"{t:.3f}"),      # since 1970:
    ("timestamp", lambda t: f"{1.6e9 + t:.4f}"), ("timestamp", lambda t: f"{1.6e18 + 1e9 * t:.0f}"),
    ("time", lambda t: f"{44000 + t / 86400:.10f}"),             # Excel's days
    ("time", lambda t: f"10:{t // 60:02.0f}:{t % 60:06.3f}"),
    ("Time", lambda t: f"{t // 60:.0f}:{t % 60:06.3f}"),         # minutes and seconds
    ("Time", lambda t: f"11:{t // 60:02.0f}:{t % 60:06.3f} PM"),
    ("Timestamp", lambda t: f"2023-06-05 10:{t // 60:02.0f}:{t % 60:06.3f}+02:00"),
    ("date_time", lambda t: f"5.6.2023 10:{t // 60:02.0f}:{t % 60:06.3f}"),
    ("Date/Time", lambda t: f"6/5/2023 10:{t // 60:02.0f}:{t % 60:06.3f}"),
    ("time", lambda t: f"05-Jun-2023 10:{t // 60:02.0f}:{t % 60:06.3f}"),
    ("", lambda t: f"2023-06-05 10:{t // 60:02.0f}:{t % 60:09.6f}")])  # a pandas index
def test_units_dates_and_clock_times_of_the_time_column(tmp_path, header, form):
    read = table(tmp_path / "a.csv", rows(np.arange(4200) / 60, header=header + ",abp", form=form))
    assert read.fs == pytest.approx(60, abs=0.1 * 60 / 4200)
    np.testing.assert_array_equal(whole(read)["abp"], 80 + np.arange(4200))
    assert "2023" not in form(0) or (read.start_time.year, read.start_time.minute) == (2023, 0)


@pytest.mark.parametrize("start, form, zone", [
    ("1970-01-01 23:59", "%H:%M:%S.%f", "UTC"),                 # goes on past midnight
    ("2023-06-05 23:59", "%d.%m.%Y;%H:%M:%S.%f", "UTC"),        # in two columns
    ("2023-03-26 00:59", "%Y-%m-%d %H:%M:%S.%f", "Europe/Berlin"),      # summer time begins,
    ("2023-10-29 00:59", "%Y-%m-%d %H:%M:%S.%f", "Europe/Berlin")])      # and ends
def test_midnight_and_daylight_saving_time_shift_no_row(tmp_path, start, form, zone):
    stamps = pd.date_range(start, periods=6000, freq="20ms", tz="UTC").tz_convert(zone)
    header = "Date;Time;abp" if ";" in form else "time;abp"
    lines = zip(stamps.strftime(form), range(6000))
    read = table(tmp_path / "a.csv", written(";", header=[header], lines=lines))
    assert (read.fs, read.end_s) == (50, 120)
    np.testing.assert_array_equal(whole(read)["abp"], np.arange(6000))
    assert any("daylight" in note for note in read.notes) == (zone != "UTC")
    # after a change, start time plus seconds would no longer be the clock's time
    assert read.start_time == (stamps[0].replace(tzinfo=None) if zone == "UTC" else None)


def test_parquet_holds_dates_numbers_and_texts_as_times(tmp_path):
    pytest.importorskip("pyarrow")
    frame = pd.DataFrame({"abp": np.arange(600.0), "note": "x"})
    elapsed = pd.to_timedelta(np.arange(600) * 10, "ms")
    dates = pd.Timestamp("2020-01-01") + elapsed
    for name, times in {"time": dates, "t": elapsed, "time_ms": np.arange(600) * 10,
                        "Time": dates.tz_localize("Europe/Rome"), "clock": dates.astype(str),
                        "any": dates}.items():
        frame.assign(**{name: times}).to_parquet(tmp_path / "a.parquet")
        read = Table(str(tmp_path / "a.parquet"))
        assert (read.fs, list(read.channels)) == (100, ["abp"])
        np.testing.assert_array_equal(whole(read)["abp"], np.arange(600))


def test_readings_at_any_times(tmp_path):
    path = tmp_path / "v.csv"
    path.write_text("time (min),MAP (kPa),note\n0,10.67,a\n2,,b\n7.5,12,c\n")
    times, frame, units = read_readings(str(path))
    np.testing.assert_allclose(times, [0, 120, 450])
    assert list(frame.columns) == ["MAP (kPa)"] and units["MAP (kPa)"] == "kPa"
    utc = table(tmp_path / "a.csv", rows(1686009000 + np.arange(99) / 60)).start_time
    start = datetime.datetime(2023, 6, 5, 23, 50)
    for clock, own, other in (("2023-06-05 23:5{}", start, utc), ("23:5{}", start, utc),
                              ("23:5{}:00", start, utc), ("2023-06-06 01:5{}+02:00", utc, start)):
        path.write_text(f"time,map\n{clock.format(5)},80\n{clock.format(8)},80\n")
        np.testing.assert_allclose(read_readings(str(path), own)[0], [300, 480])
        for wrong, message in ((other, "times of no time zone"), (None, "seconds from its start")):
            with pytest.raises(RecordingError, match=message):
                read_readings(str(path), wrong)
