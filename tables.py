"""Tables (CSV, Parquet) as recordings: their dialect, their time column, their rate and gaps.

    from tables import Table, open_table
    Table('night.csv').read(['ABP', 'PPG'], 0, 600)     # a reader, as formats.py describes it

Needs formats.py. CSV is read in whatever form instruments and spreadsheets write it: comma,
semicolon, tab, bar or blanks between cells; decimal commas and thousands separators; UTF-8, UTF-16
or Windows' code page; lines above the header, a row of units, comments, blank rows, row names.
What is not certain is refused in a line that says what the file is and what to do.
"""
import contextlib
import csv
import datetime
import io
import os
import re
from collections import Counter
from dataclasses import replace

import numpy as np
import pandas as pd

import formats
from formats import MIN_WAVE_HZ, PRESSURE, RATE, RecordingError, check_size, plain_unit, span

TIME = {"s": 1.0, "sec": 1.0, "secs": 1.0, "second": 1.0, "seconds": 1.0, "ms": 1e-3, "msec": 1e-3,
        "millisecond": 1e-3, "milliseconds": 1e-3, "us": 1e-6, "µs": 1e-6, "microseconds": 1e-6,
        "ns": 1e-9, "nanoseconds": 1e-9, "min": 60.0, "mins": 60.0, "minute": 60.0, "minutes": 60.0,
        "h": 3600.0, "hour": 3600.0, "hours": 3600.0, "d": 86400.0, "day": 86400.0, "days": 86400.0}
TIME_NAMES = ("time", "t", "elapsed", "elapsedtime", "relativetime", "reltime", "timestamp",
              "datetime", "dateandtime", "datetimestamp", "sampletime", "clock", "clocktime",
              "timeofday", *TIME, "date")
MISSING_CELLS = ["-", "--", "---", "----", "?", ".", "*", "***", "none", "None", "NONE", "missing",
                 "invalid", "Invalid", "INVALID", "n.a.", "NAN", "Nan", "Na", "inf", "-inf"]
MAGIC = {b"PK\x03\x04": "a ZIP or Excel file", b"\xd0\xcf\x11\xe0": "an Excel file",
         b"\x1f\x8b": "a gzip file", b"\x89HDF": "an HDF5 file", b"PAR1": "a Parquet file",
         b"%PDF": "a PDF"}
COMMENT = r"(?:#|%|//)"
NUMBER = r"[+-]?(?:\d[\d\s'.,]*|[.,]\d+)(?:[eE][+-]?\d+)?"
DATE = r"\d{1,4}[-/.](?:\d{1,2}|[A-Za-z]{3})[-/.]\d{2,4}"
CLOCK = (rf"^(?:(?P<date>{DATE})(?:[T ]+|$))?(?P<clock>\d+:\d+(?::\d+)?(?:[.,]\d*)?)?"
         r"(?: ?(?P<half>[AaPp])\.?[Mm]\.?)? ?(?P<zone>Z|UTC|GMT|[+-]\d\d:?\d\d)?"
         rf"(?: (?P<late>{DATE}))?$")
DATES = ("%Y-%m-%d", "%d-%b-%Y", "%d-%m-%Y", "%m-%d-%Y", "%d-%m-%y", "%m-%d-%y")
HEAD_CHARS, HEAD_LINES = 1 << 18, 300
TABLE_CHARS, TABLE_ROWS, MAX_LINE = 1 << 20, 1 << 16, 100000   # read at a time
NEAR_ROWS, FAR_ROWS = 3, 8      # whose stamps tell a missing row from jitter
RATE_BLOCK_S = 10.0             # the rate must be the same in blocks of this length, ...
MAX_RATE_ERROR = 0.05           # ... to this share
# pandas 3 reads numbers exactly without being asked, and warns about the question.
EXACT = {} if int(pd.__version__.split(".")[0]) >= 3 else {"float_precision": "round_trip"}
GIVE_RATE = "if the rows are evenly spaced: --fs HZ"


# -------------------------------------------------------------------------------------- the dialect

def open_table(path):
    """An object with names, units {name: unit}, numbers (names of columns of numbers), notes, and
    frames(columns), which yields (lines before it, DataFrame)."""
    return (ParquetFile if path.lower().endswith(".parquet") else CsvFile)(path)


class CsvFile:
    def __init__(self, path):
        self.path, self.notes = path, []
        with open(path, "rb") as file:
            start = file.read(4096)
        for magic, what in MAGIC.items():
            if start.startswith(magic):
                raise RecordingError(path, f"this is {what}, not a CSV; export it as CSV")
        self.encoding = _encoding(start)
        with self._text() as file:
            head = file.read(HEAD_CHARS) + file.readline(MAX_LINE)
        if "\x00" in head or sum(not c.isprintable() for c in head[:4096]) > (
                sum(map(head[:4096].count, "\n\t")) + 0.05 * len(head[:4096])):
            raise RecordingError(path, "not text, but binary data; export it as CSV")
        lines = head.split("\n")[:HEAD_LINES]
        self._check_line(max(lines, key=len))
        self._dialect(lines)
        self._header(lines)

    def _text(self):
        return open(self.path, encoding=self.encoding, errors="replace")

    def _check_line(self, line):
        if len(line) >= MAX_LINE:
            raise RecordingError(self.path, f"a line of over {MAX_LINE:,} characters: not a table "
                                            "with a row a sample")

    def cells(self, line):
        if self.separator == r"\s+":
            return line.split()
        return [cell.strip() for cell in next(csv.reader([line], delimiter=self.separator), [])]

    def _dialect(self, lines):
        given = re.match(r'"?sep=(.)"?\s*$', lines[0].strip("\ufeff"), re.IGNORECASE)
        full = [line for line in lines if line.strip()][-200:]
        full = full[:-1] or full            # the last may be cut
        self.separator = given.group(1) if given else ","
        if not given:
            for one in ("\t", ";", "|"):
                counts = Counter(line.count(one) for line in full)
                if counts.most_common(1) and counts.most_common(1)[0][0] and (
                        counts.most_common(1)[0][1] >= 0.6 * len(full)):
                    self.separator = one
                    break
            else:
                blanks = [line for line in full if "," not in line and len(line.split()) > 1]
                if len(blanks) > 0.6 * len(full):
                    self.separator = r"\s+"
        self.first_line = 1 if given else 0

    def _header(self, lines):
        """Finds the header, the row of units, the first row of data, and how numbers are written.
        """
        rows = [(i, self.cells(re.sub(rf"^\s*{COMMENT}+\s*", "", line)))
                for i, line in enumerate(lines) if i >= self.first_line and line.strip(" \t,;|")]
        data = [(i, row) for i, row in rows if _share(row, _is_value) > 0.5]
        widths = Counter(len(row) for _, row in data)
        width = widths.most_common(1)[0][0] if widths else len(rows[-1][1]) if rows else 0
        begin = next((i for i, row in data if len(row) == width), len(lines))
        above = [(i, row) for i, row in rows if i < begin and _share(row, _is_value) <= 0.5]
        if not above:
            raise RecordingError(self.path, "no header line with column names")
        units = []
        if len(above) > 1 and _share(above[-1][1], _is_unit) > 0.5 and (
                len(above[-1][1]) == len(above[-2][1])):
            units = above.pop()[1]
        names, rows = above[-1][1], [row for i, row in data if i >= begin]
        names = [name.strip("'\" ") for name in names]
        self.first_line = min(begin, len(lines)) if data else above[-1][0] + 1 + bool(units)
        skip = 0
        if rows and width == len(names) + 1:
            if all(not row[-1] for row in rows if len(row) == width):
                names, units = [*names, ""], [*units, ""]       # a separator at each row's end
            elif all(re.fullmatch(r"\d+", row[0]) for row in rows if len(row) == width) or (
                    names[0] == "" or '"' in lines[begin][:1]):
                names, units, skip = ["", *names], ["", *units], 1      # R's row names
            else:
                self._refuse_width(begin + 1, width, len(names))
        elif rows and width < len(names) and not any(names[width:]):
            names = names[:width]
        elif rows and width != len(names):
            self._refuse_width(begin + 1, width, len(names))
        self.width, self.names = len(names), formats.unique(names)
        self.numbers = [name for name in self.names[skip:] if name]
        units = dict(zip(self.names, [*units, *[""] * self.width]))
        self.units = {name: units[name].strip("'\"[]() ") or formats.unit_in_name(name)
                      for name in self.names}
        self.sample = {name: [row[i] for row in rows if i < len(row) and row[i]]
                       for i, name in enumerate(self.names)}
        self._number_format([cell for cells in self.sample.values() for cell in cells
                             if _is_number(cell)])

    def _number_format(self, cells):
        comma, dot = ([cell for cell in cells if one in cell] for one in ",.")
        both = [cell for cell in comma if "." in cell]
        self.decimal, self.thousands = ".", None
        if both and all(cell.rindex(",") > cell.rindex(".") for cell in both):
            self.decimal, self.thousands = ",", "."
        elif both or comma and dot:
            grouped = all(re.fullmatch(r"[+-]?\d{1,3}(,\d{3})+(\.\d*)?", cell) for cell in comma)
            if not grouped or any(cell.rindex(",") > cell.rindex(".") for cell in both):
                raise RecordingError(self.path, "decimal commas and decimal points in one file; "
                                                "export it with one of them")
            self.thousands = ","
        elif comma:
            self.decimal = ","
        for one in "' \u00a0\u202f":
            grouped = rf"[+-]?\d{{1,3}}({one}\d{{3}})+([.,]\d*)?"
            if any(re.fullmatch(grouped, cell) for cell in cells):
                self.thousands = self.thousands or one

    def _refuse_width(self, line, width, n_names):
        raise RecordingError(
            self.path, f"line {line} has {width} cells, the header names {n_names} columns" + (
                "; decimal commas between commas? export it with semicolons"
                if self.separator == "," and width > n_names else
                "; each row needs as many cells as the header"))

    def time_columns(self):
        """[name] of the time column, [date, clock time] where two hold it, [] if there is none."""
        time_units = {name: formats.unit_in_name(name, TIME) for name in self.names if name}
        plain = {name: re.sub(r"[^a-zµ]", "", _without(name, unit).lower()) or plain_unit(unit)
                 for name, unit in time_units.items()}
        found = [name for known in TIME_NAMES for name in plain if plain[name] == known]
        text = [name for name in found if self.is_text(name)]
        dates = [name for name in text if plain[name] == "date"]
        if not found:
            found = [name for name in self.names[:1] if self.is_text(name)
                     and re.match(CLOCK, self.sample[name][0].strip("'\"[] "))]
        if found and found[0] in text and dates and dates[0] != found[0]:
            return [dates[0], found[0]]
        return found[:1]

    def time_unit(self, name):
        return formats.unit_in_name(name, TIME) or self.units.get(name, "")

    def is_text(self, name):
        return bool(self.sample[name]) and not _is_number(self.sample[name][0])

    def frames(self, columns):
        at = [self.names.index(name) for name in columns]
        order = sorted(set(at))
        text = [i for i in at if self.is_text(self.names[i])]
        separator = "" if self.separator == r"\s+" else re.escape(self.separator)
        empty = re.compile(rf'(?m)^(?:[ \t{separator}"]*|\s*{COMMENT}.*)$\n?')
        n_lines, ended = self.first_line, False
        with self._text() as file:
            for _ in range(self.first_line):
                file.readline(MAX_LINE)
            while not ended:
                part = file.read(TABLE_CHARS)
                tail = file.readline(MAX_LINE)
                self._check_line(tail)
                part, ended = part + tail, not tail
                body = empty.sub("", part)
                body = self._whole_rows(body, part, n_lines, empty, ended)
                if body:
                    with contextlib.suppress(pd.errors.EmptyDataError):
                        frame = pd.read_csv(
                            io.StringIO(body), sep=self.separator, header=None, usecols=order,
                            names=range(self.width), decimal=self.decimal, index_col=False,
                            thousands=self.thousands, na_values=MISSING_CELLS, low_memory=False,
                            skipinitialspace=True, **EXACT,
                            dtype=dict.fromkeys(text, str))[at]
                        self._check(frame, part, n_lines, empty, text)
                        frame.columns = list(columns)
                        yield n_lines, frame
                n_lines += part.count("\n")

    def _whole_rows(self, body, part, n_lines, empty, ended):
        """`body` without a last row that was cut; raises if another row has other cells."""
        if self.separator == r"\s+":
            return body
        if '"' in body:
            counts = np.array([len(row) for row in csv.reader(io.StringIO(body, newline=""),
                                                              delimiter=self.separator)])
        else:
            raw = np.frombuffer(body.encode(), np.uint8)
            ends = np.flatnonzero(raw == 10)
            ends = ends if body.endswith("\n") else np.append(ends, raw.size)
            cells = np.flatnonzero(raw == ord(self.separator))
            counts = np.diff(np.searchsorted(cells, ends), prepend=0) + 1
        wrong = np.flatnonzero(counts != self.width)
        if ended and wrong.size == 1 and wrong[0] == len(counts) - 1 and counts[-1] < self.width:
            self.notes.append("the last row is cut short; left out")
            return body.rstrip("\n")[:body.rstrip("\n").rfind("\n") + 1]
        if wrong.size:
            lines = body.split("\n")
            for row in wrong:       # blank cells too many are no harm
                extra = self.cells(lines[row])[self.width:] if '"' not in body else [1]
                if counts[row] < self.width or any(extra):
                    self._refuse_width(_line(part, n_lines, empty, row), counts[row], self.width)
                lines[row] = self.separator.join(lines[row].split(self.separator)[:self.width])
            body = "\n".join(lines)
        return body

    def _check(self, frame, part, n_lines, empty, text):
        for i in frame.columns:
            if i in text or pd.api.types.is_numeric_dtype(frame[i]):
                continue
            wrong = pd.to_numeric(frame[i], errors="coerce").isna() & frame[i].notna()
            if wrong.any():
                row = int(wrong.to_numpy().argmax())
                raise RecordingError(
                    self.path, f"line {_line(part, n_lines, empty, row)}, column {i + 1}: expected "
                    "a number", f"{self.names[i]}: {str(frame[i].iloc[row])[:40]!r}")
            frame[i] = pd.to_numeric(frame[i])


def _line(part, n_lines, empty, row):
    """The number of the line that holds a row of a part."""
    kept = [i for i, line in enumerate(part.split("\n")) if not empty.fullmatch(line)]
    return n_lines + kept[row] + 1


def _encoding(start):
    if start.startswith((b"\xff\xfe", b"\xfe\xff")):
        return "utf-16"
    if start[1:2] == b"\x00" or start[:1] == b"\x00":
        return "utf-16-le" if start[1:2] == b"\x00" else "utf-16-be"
    try:
        start[:start.rfind(b"\n") + 1].decode("utf-8")
    except UnicodeDecodeError:
        return "cp1252"
    return "utf-8-sig"


def _share(row, test):
    full = [cell for cell in row if cell]
    return sum(map(test, full)) / len(full) if full else 0.0


def _is_number(cell):
    return bool(re.fullmatch(NUMBER, cell)) and not re.fullmatch(DATE, cell)


def _is_value(cell):
    cell = cell.strip("'\"[] ")
    return bool(re.fullmatch(NUMBER, cell) or re.match(CLOCK, cell)
                or cell.lower() in ("nan", "na", "n/a", "null", *MISSING_CELLS))


def _is_unit(cell):
    cell = plain_unit(cell.strip("'\""))
    return cell in {**PRESSURE, **RATE, **TIME} or cell in formats.NO_UNIT or "hh:mm" in cell


def _without(name, unit):
    return name[:name.rindex(unit)] if unit and unit in name else name


class ParquetFile(CsvFile):
    def __init__(self, path):
        from pyarrow import parquet, types

        self.path, self.notes, self.sample = path, [], {}
        with open(path, "rb") as file:      # a name that is not UTF-8 is no path for pyarrow
            opened = parquet.ParquetFile(file)
            schema = opened.schema_arrow
            self.n_rows = opened.metadata.num_rows
            check_size(path, self.n_rows, os.path.getsize(path))
        self.names, fields = list(schema.names), list(schema)
        self.numbers = [one.name for one in fields if types.is_integer(one.type)
                        or types.is_floating(one.type) or types.is_decimal(one.type)]
        self.dates = [one.name for one in fields if types.is_temporal(one.type)]
        self.texts = [one.name for one in fields if types.is_string(one.type)
                      or types.is_large_string(one.type)]
        self.units = {name: formats.unit_in_name(name) for name in self.names}
        self.sample = {name: [""] for name in self.names}

    def is_text(self, name):
        return name in self.dates + self.texts

    def time_columns(self):
        times = [name for name in super().time_columns()
                 if name in self.numbers + self.dates + self.texts]
        return times or self.dates[:1]

    def frames(self, columns):
        from pyarrow import parquet

        n_lines = 0
        with open(self.path, "rb") as file:
            for batch in parquet.ParquetFile(file).iter_batches(TABLE_ROWS, columns=list(columns)):
                frame = batch.to_pandas(ignore_metadata=True)[list(columns)]
                yield n_lines, frame
                n_lines += len(frame)


# ----------------------------------------------------------------------------------------- the time

class TimeReader:
    """Seconds from a time column: numbers in the header's unit or since 1970, clock times, dates.

    Clock times go on past midnight, and local times over a change of daylight saving time.
    """

    def __init__(self, path, unit="", hours=False):
        self.path, self.notes, self.start_time = path, [], None
        self.hours = hours      # 10:30 is half past ten, not ten minutes and a half
        self.factor, self.zero = TIME.get(plain_unit(unit)), None
        self.last, self.shift = np.nan, 0.0

    def seconds(self, frame, n_lines=0):
        """[n] float64 of a DataFrame of one column, or of a date and a clock time; NaN is an error.
        The first call's first time is 0, and `start_time` if it is a date or a clock time."""
        column = frame.iloc[:, -1]
        if column.dtype.kind in "Mm":
            column = column.dt.tz_convert(None) if getattr(column.dt, "tz", None) else column
            values = column.to_numpy().astype(f"{column.dtype.kind}8[ns]")
            times = np.where(np.isnat(values), np.nan, values.astype(np.int64) / 1e9)
            is_date = values.dtype.kind == "M"
        elif pd.api.types.is_numeric_dtype(column):
            times = column.to_numpy(np.float64, na_value=np.nan)
            self.factor = self.factor or _guess_unit(times)
            times = times * self.factor
            is_date = times[0] > 1e8
        else:
            texts = column.astype(str)
            if frame.shape[1] == 2:
                texts = frame.iloc[:, 0].astype(str) + " " + texts
            times, is_date = self._texts(texts), True
        if not np.isfinite(times).all():
            row = int((~np.isfinite(times)).argmax())
            raise RecordingError(
                self.path, f"line {n_lines + row + 1}: no time, or one that cannot be read; "
                f"{GIVE_RATE}", str(column.iloc[row])[:40])
        if self.zero is None:
            self.zero = times[0]
            with contextlib.suppress(OverflowError, ValueError):
                if is_date:
                    self.start_time = datetime.datetime(1970, 1, 1) + datetime.timedelta(
                        seconds=round(float(times[0]), 6))
        return times - self.zero

    def _texts(self, texts):
        """Seconds since 1970 (dates), or since midnight (clock times)."""
        parts = texts.str.strip(" '\"[]").str.extract(CLOCK)
        date, half, zone = parts["date"].fillna(parts["late"]), parts["half"], parts["zone"]
        clock = parts["clock"].str.replace(",", ".", regex=False).str.split(":", expand=True)
        clock = clock.reindex(columns=range(3)).astype(float).to_numpy()
        dated = date.notna().to_numpy()
        clock[dated & np.isnan(clock).all(1)] = 0
        is_long = ~np.isnan(clock[:, 2])
        in_hours = is_long | dated | half.notna().to_numpy() | self.hours
        a, b, c = clock[:, 0], clock[:, 1], np.nan_to_num(clock[:, 2])
        a = np.where(half.notna(), a % 12 + 12 * half.str.lower().eq("p"), a)
        times = np.where(in_hours, a * 3600 + b * 60 + c, a * 60 + b)
        if dated.any():
            times = times + date.map(_days(date.dropna().unique())).to_numpy(float) * 86400
        if zone.notna().any():
            return times - zone.fillna("Z").map(_zone_s).to_numpy(float)
        raw_steps = np.diff(times, prepend=self.last)
        self.last, fix = times[-1], np.zeros(len(times))
        if not dated.any():
            fix[raw_steps < -43200] = 86400
        else:
            fix[np.abs(raw_steps + 3600) < 2] = 3600
            sunday = (times // 86400 + 4) % 7 == 0
            fix[(np.abs(raw_steps - 3600) < 2) & sunday & ((times % 3600) < 2)] = -3600
            if (fix != 0).any():
                self.notes.append("times: a change of daylight saving time; the seconds go on")
        times = times + self.shift + np.cumsum(fix)
        self.shift += fix.sum()
        return times


def _guess_unit(times):
    """Of numbers without a unit: seconds; since 1970 in s, ms, us or ns; or days (Excel)."""
    first = abs(times[0])
    for least, factor in ((1e17, 1e-9), (1e14, 1e-6), (1e11, 1e-3)):
        if first > least:
            return factor
    steps = np.diff(times[:1000])
    return 86400.0 if first > 2e4 and steps.size and 0 < np.median(steps) < 1e-5 else 1.0


def _days(dates):
    """{text: days since 1970}: of day and month first, the order that all fit and spans less."""
    best = {}
    for form in DATES:
        with contextlib.suppress(ValueError):
            days = {date: (datetime.datetime.strptime(re.sub("[/.]", "-", date), form)
                           - datetime.datetime(1970, 1, 1)).days for date in dates}
            if not best or np.ptp(list(days.values())) < np.ptp(list(best.values())):
                best = days
    return best


def _zone_s(zone):
    digits = zone.replace(":", "")
    if digits[0] not in "+-":
        return 0.0
    return (-1 if digits[0] == "-" else 1) * (3600.0 * int(digits[1:3]) + 60.0 * int(digits[3:5]))


class Stamps:
    """The rate and the gaps of rows from their time stamps, added part after part.

    Stamps are rounded, jitter and repeat; rows are missing, or there are gaps. A step counts as a
    jump where the stamps after it are late as a whole, against an even grid: by the medians of
    NEAR_ROWS and of FAR_ROWS rows on either side. The rate is that of least squares in the runs
    between jumps, made a round number where that moves the last row by less than a tenth of a row.
    """

    def __init__(self, path):
        self.path, self.notes = path, []
        self.times, self.base = np.empty(0), 0      # the last stamps; the row of the first of them
        self.period, self.coarse_s = None, 0.0      # s; what stamps are rounded to, if to > 1 row
        self.n_rows, self.done, self.run = 0, 0, 0  # rows added; looked at; first row of the run
        self.n_wild = 0         # stamps over a second from where their neighbours put them
        self.jumps = []         # (row, s by which it and all later ones are late)
        self.sums = np.zeros(2)     # of i * t and i * i about the means of parts of runs
        self.blocks = []        # (row, its time, the run): every RATE_BLOCK_S
        self.lines = [(0, 0)]   # (row, the lines before it)

    def add(self, times, n_lines):
        self.lines.append((self.n_rows, n_lines))
        self.n_rows += len(times)
        self.times = np.concatenate((self.times, times))
        if len(self.times) > 2 * TABLE_ROWS:
            self._look(self.n_rows - 2 * self._far())

    def finish(self):
        """(rows/s, [(row, rows by which it and all later ones move)], length in rows)."""
        if self.n_rows < 2:
            raise RecordingError(self.path, "fewer than two rows below the header" if self.n_rows
                                 else "no rows below the header")
        self._look(self.n_rows)
        period = self.sums[0] / self.sums[1] if self.sums[1] else self.period
        n = self.n_rows + sum(by / period for _, by in self.jumps)
        rounded = (round(1 / period, digits) for digits in range(9))
        fs = next((fs for fs in rounded if abs(fs * period - 1) * n < 0.1), 1 / period)
        jumps = [(row, round(by * fs)) for row, by in self.jumps]
        self._check_rate(fs)
        gaps = [by for _, by in jumps if by > 0]
        if gaps:
            self.notes.append(f"times: {fs:.6g} rows/s, {len(gaps)} gaps of {sum(gaps) / fs:.6g} s "
                              f"together ({sum(gaps):,} rows missing)")
        if self.n_wild:
            self.notes.append(f"times: {self.n_wild:,} stamps do not fit those around them; their "
                              "rows were placed by their neighbours")
        if len(jumps) > len(gaps):
            n_left = -sum(by for _, by in jumps if by < 0)
            self.notes.append(f"times: {n_left:,} rows repeat the time of others; left out")
        return fs, jumps, self.n_rows + sum(by for _, by in jumps)

    def line(self, row):
        first, before = max(entry for entry in self.lines if entry[0] <= row)
        return row - first + before + 1

    def _far(self):
        return int(np.clip(np.ceil(2 * self.coarse_s / (self.period or 1)), FAR_ROWS, 8192))

    def _measure(self):
        """The period, roughly, from the first part."""
        steps = np.diff(self.times)
        new = np.flatnonzero(np.append(True, steps > 0))    # rows with a stamp of their own
        w = int(np.clip(len(new) // 20, 1, 256))
        slopes = (self.times[new[w:]] - self.times[new[:-w]]) / (new[w:] - new[:-w])
        self.period = float(np.median(slopes)) if slopes.size else 0.0
        if not self.period > 0:
            raise RecordingError(
                self.path, f"line {self.line(1)}: time does not increase; {GIVE_RATE}")
        if np.mean(steps == 0) > 0.2:
            self.coarse_s = float(np.median(steps[steps > 0]))

    def _look(self, stop):
        """Finds the jumps before row `stop`."""
        if self.period is None:
            self._measure()
        p, far, least = self.period, self._far(), 0.6 * max(self.period, self.coarse_s)
        near = far if self.coarse_s else NEAR_ROWS
        steps = np.diff(self.times)
        odd = (steps > p + max(0.5 * p, self.coarse_s)) | (steps < -p)
        odd |= (steps < 0.5 * p) & (not self.coarse_s)
        for row in np.flatnonzero(odd) + 1 + self.base:
            if not self.done < row < stop:
                continue
            late_s = [self._late(row, n) for n in (near, far)]
            if min(map(abs, late_s)) < least or late_s[0] * late_s[1] < 0:
                continue
            by = late_s[0]
            if by < -max(1.0, 2 * p):
                raise RecordingError(self.path, f"line {self.line(row)}: time does not increase, "
                                                f"but goes back by {-by:.6g} s; {GIVE_RATE}")
            if by > formats.MAX_GAPS_S:
                raise RecordingError(
                    self.path, f"line {self.line(row)}: jumps in time of over a week "
                    f"({by / 86400:.3g} days); is time in seconds?")
            self._take(row)
            self.jumps.append((int(row), by))
            self.run = self.done = row
        self._take(stop)
        self.done = stop
        keep = max(0, stop - self.base - 2 * far)
        self.times, self.base = self.times[keep:], self.base + keep

    def _late(self, row, n):
        """By how many s the n rows from `row` on are later than the n rows before it announce."""
        i = row - self.base
        before, after = self.times[max(self.run - self.base, i - n, 0):i], self.times[i:i + n]
        return float(np.median(after - self.period * np.arange(len(after)))
                     - np.median(before + self.period * np.arange(len(before), 0, -1)))

    def _take(self, end):
        """Takes the rows from the last ones looked at to `end`, one run, into the rate."""
        t = self.times[self.done - self.base:end - self.base]
        if not len(t):
            return
        i = np.arange(len(t))
        late_s = t - self.period * i
        good = np.abs(late_s - np.median(late_s)) < max(1.0, 5 * self.period, 2 * self.coarse_s)
        self.n_wild += np.count_nonzero(~good)
        if good.sum() > 1:
            i = i[good] - i[good].mean()
            self.sums += i @ (t[good] - t[good].mean()), i @ i
        size = max(self._far(), int(RATE_BLOCK_S / self.period))
        self.blocks += [(self.done + at, float(np.median(
            t[at:at + FAR_ROWS] - self.period * np.arange(FAR_ROWS))), self.run)
            for at in range(0, len(t) - FAR_ROWS + 1, size)]

    def _check_rate(self, fs):
        for (row, t, run), (next_row, next_t, next_run) in zip(self.blocks, self.blocks[1:]):
            n, seconds = next_row - row, next_t - t
            if run == next_run and abs(seconds * fs - n) > (
                    MAX_RATE_ERROR * n + 0.5 + fs * self.coarse_s):
                raise RecordingError(
                    self.path, f"line {self.line(next_row)}: time is not evenly spaced: "
                    f"{n / seconds:.4g} rows/s above it, {fs:.4g} on average; {GIVE_RATE}")


class Table:
    """The reader of CSV and Parquet files: a row a sample; an empty or NaN cell is missing.

    The rate and the gaps come from the time column, in a first pass; `file_fs` says that the rows
    are evenly spaced instead.
    """

    def __init__(self, path, file_fs=None):
        self.path, self.file = path, open_table(path)
        self.start_time, self.fs, self.jumps, n = None, file_fs, [], 0
        times = [] if file_fs else self.file.time_columns()
        if not file_fs and not times:
            raise RecordingError(
                path, "no time column (time_s, Time (ms), a clock time or a date); give the "
                "sampling rate: --fs HZ", ", ".join(self.file.names))
        extra = []
        if file_fs:
            n = sum(len(frame) for _, frame in self.file.frames(self.file.names[-1:]))
            if not n:
                raise RecordingError(path, "no rows below the header")
        else:
            clock = TimeReader(path, self.file.time_unit(times[-1]))
            stamps = Stamps(path)
            for n_lines, frame in self.file.frames(times):
                stamps.add(clock.seconds(frame, n_lines), n_lines)
            self.fs, self.jumps, n = stamps.finish()
            self.start_time, extra = clock.start_time, stamps.notes + clock.notes
        self.notes = list(dict.fromkeys(self.file.notes + extra))
        check_size(path, n, os.path.getsize(path))
        self.end_s = n / self.fs
        self.channels = {name: formats.listed(self.fs, self.file.units[name])
                         for name in self.file.numbers if name not in times}
        self.every = {}     # {name: (k, phase)}: a slower channel has a cell in every k-th row
        self.names, self.begin_s = None, np.inf

    def read(self, names, start_s, stop_s):
        if list(names) != self.names or start_s < self.begin_s:     # from the first row on
            self.names, self.n_rows, self.kept = list(names), 0, []
            self.frames = iter(self.file.frames(self.names) if self.names else ())
        self.begin_s = start_s
        first, end = span(start_s, stop_s, self.fs, round(self.end_s * self.fs))
        while not (self.kept and self.kept[-1][0][-1] >= end):
            _, frame = next(self.frames, (0, None))
            if frame is None:
                break
            at = self._positions(self.n_rows + np.arange(len(frame)))
            self.n_rows += len(frame)
            self.kept.append((at, frame.to_numpy(np.float64, na_value=np.nan)))
        self.kept = [(at, values) for at, values in self.kept if at[-1] >= first]
        dense = np.full((end - first, len(self.names)), np.nan)
        for at, values in self.kept:
            here = (at >= first) & (at < end)
            dense[at[here] - first] = values[here]
        return {name: self._channel(name, dense[:, i], first) for i, name in enumerate(self.names)}

    def _positions(self, rows):
        """Where rows lie on the even grid; a row that repeats a time is overwritten by the next."""
        starts = np.array([row for row, _ in self.jumps], np.int64)
        moves = np.cumsum([0] + [by for _, by in self.jumps])
        return rows + moves[np.searchsorted(starts, rows, side="right")]

    def _channel(self, name, column, first):
        known = np.flatnonzero(np.isfinite(column)) + first
        if name not in self.every and known.size > 10:
            k = int(np.gcd.reduce(np.diff(known[:10000])))
            self.every[name] = (k, int(known[0] % k)) if self.fs / k >= MIN_WAVE_HZ else (1, 0)
        k, phase = self.every.get(name, (1, 0))
        if k > 1 and (known % k != phase).any():
            raise RecordingError(self.path, f"a column that has a cell in every {k} rows at first "
                                            "has them in other rows later", name)
        begin = -(-(first - phase) // k)
        return replace(self.channels[name], samples=column[begin * k + phase - first::k].copy(),
                       fs=self.fs / k, first=begin, start_s=phase / self.fs)


# ------------------------------------------------------------------------------- tables of readings

def read_readings(path, start_time=None):
    """(times_s [n] from the recording's start, DataFrame of the numbers, {column: unit}) of a CSV
    or Parquet file with a row a reading, at any times. Dates and clock times count from start_time.
    """
    file = open_table(path)
    names = file.time_columns()
    if not names:
        raise RecordingError(path, "no time column (time_s: seconds from the recording's start)")
    columns = [name for name in file.numbers if name not in names and not file.is_text(name)]
    clock = TimeReader(path, file.time_unit(names[-1]), hours=True)
    times, frames = [], []
    for n_lines, frame in file.frames([*names, *columns]):
        times.append(clock.seconds(frame[names], n_lines) + (0 if clock.start_time else clock.zero))
        frames.append(frame[columns])
    times = np.concatenate(times) if times else np.empty(0)
    if clock.start_time:
        if start_time is None:
            raise RecordingError(path, "has dates or clock times, but the recording has none; give "
                                       "time_s, seconds from its start")
        times = times + (clock.start_time - start_time).total_seconds()
        if 1970 in (start_time.year, clock.start_time.year):    # only a clock time
            times = times - 86400 * np.round(times[0] / 86400) if times.size else times
    return times, pd.concat(frames) if frames else pd.DataFrame(columns=columns), file.units
