"""Tables (CSV, Parquet) as recordings: their dialect, their time column, their rate and gaps.

    from tables import Table
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
import re
from collections import Counter
from dataclasses import replace

import numpy as np
import pandas as pd

import formats
from formats import MIN_WAVE_HZ, RecordingError, check_size, plain_unit, span, unit_in_name

TIME = {"s": 1.0, "sec": 1.0, "secs": 1.0, "second": 1.0, "seconds": 1.0, "ms": 1e-3, "msec": 1e-3,
        "millisecond": 1e-3, "milliseconds": 1e-3, "us": 1e-6, "µs": 1e-6, "microseconds": 1e-6,
        "ns": 1e-9, "nanoseconds": 1e-9, "min": 60.0, "mins": 60.0, "minute": 60.0, "minutes": 60.0,
        "h": 3600.0, "hour": 3600.0, "hours": 3600.0, "d": 86400.0, "day": 86400.0, "days": 86400.0}
TIME_NAMES = ("time", "t", "elapsed", "elapsedtime", "relativetime", "reltime", "timestamp",
              "datetime", "dateandtime", "datetimestamp", "sampletime", "clock", "clocktime",
              "timeofday", *TIME, "date")
UNITS = {*formats.PRESSURE, *formats.RATE, *TIME, *formats.NO_UNIT}
MISSING = ("", "-", "--", "---", "----", "?", ".", "*", "***", "none", "missing", "invalid", "nan",
           "na", "n/a", "#n/a", "n.a.", "null", "inf", "-inf")
MISSING_CELLS = [form(word) for word in MISSING for form in (str.lower, str.title, str.upper)]
MAGIC = {b"PK\x03\x04": "a ZIP or Excel file", b"\xd0\xcf\x11\xe0": "an Excel file",
         b"\x1f\x8b": "a gzip file", b"\x89HDF": "an HDF5 file", b"PAR1": "a Parquet file"}
COMMENT = r"(?:#|%|//)"
NUMBER = r"[+-]?(?:\d[\d\s'.,]*|[.,]\d+)(?:[eE][+-]?\d+)?"
DATE = r"\d{1,4}[-/.](?:\d{1,2}|[A-Za-z]{3})[-/.]\d{2,4}"
CLOCK = (rf"^(?:(?P<date>{DATE})(?:[T ]+|$))?(?P<clock>\d+:\d+(?::\d+)?(?:[.,]\d*)?)?"
         r"(?: ?(?P<half>[AaPp])\.?[Mm]\.?)? ?(?P<zone>Z|UTC|GMT|[+-]\d\d:?\d\d)?"
         rf"(?: (?P<late>{DATE}))?$")
DATES = ("%Y-%m-%d", "%d-%b-%Y", "%d-%m-%Y", "%m-%d-%Y", "%d-%m-%y", "%m-%d-%y")
HEAD_CHARS, HEAD_LINES = 1 << 18, 300
TABLE_CHARS, TABLE_ROWS, MAX_LINE = 1 << 20, 1 << 16, 100000   # read at a time
MAX_GAP_S = 7 * 86400.0         # more is a slip in the times, not a gap
NEAR_ROWS, FAR_ROWS = 3, 8      # whose stamps tell a missing row from jitter
RATE_BLOCK_S = 10.0             # the rate must be the same in blocks of this length, ...
MAX_RATE_ERROR = 0.05           # ... to this share
# pandas 3 reads numbers exactly without being asked, and warns about the question.
EXACT = {} if int(pd.__version__.split(".")[0]) >= 3 else {"float_precision": "round_trip"}
GIVE_RATE = "if the rows are evenly spaced: --fs HZ"


class Csv:
    """names of the columns, units {name: unit}, numbers and texts (names of such columns), notes;
    frames(columns) yields DataFrames, part after part, with the lines' numbers as index."""

    def __init__(self, path):
        self.path, self.notes = path, []
        with open(path, "rb") as file:
            start = file.read(4096)
        for magic, what in MAGIC.items():
            if start.startswith(magic):
                raise RecordingError(path, f"this is {what}, not a CSV; export it as CSV")
        self.encoding = _encoding(start)
        with self._open() as file:
            head = file.read(HEAD_CHARS) + self._line(file)
        odd = sum(not c.isprintable() and c not in "\t\n" for c in head[:4096])
        if "\x00" in head or odd > 0.05 * len(head[:4096]):
            raise RecordingError(path, "not text, but binary data; export it as CSV")
        self._sniff(head.split("\n")[:HEAD_LINES])

    def _open(self):
        return open(self.path, encoding=self.encoding, errors="replace")

    def _line(self, file):
        line = file.readline(MAX_LINE)
        if len(line) == MAX_LINE:
            raise RecordingError(self.path, f"a line of over {MAX_LINE:,} characters: not a table "
                                            "with a row a sample")
        return line

    def _sniff(self, lines):
        """Finds the separator, the header, the row of units, the first row, the marks of numbers.
        """
        given = re.match(r'(?i)\ufeff?"?sep=(.)"?\s*$', lines[0])
        full = [line for line in lines if line.strip()] or [""]
        self.separator = given.group(1) if given else _separator(full[-200:-1] or full)
        self.empty = re.compile(rf'(?m)^(?:[ \t"{re.escape(self.separator)}]*|\s*{COMMENT}.*)$\n?')
        rows = [(i, re.sub(rf"^\s*{COMMENT}+\s*", "", line)) for i, line in enumerate(lines)
                if i >= bool(given) and line.strip(" \t,;|")]
        rows = [(i, [cell.strip() for row in self._rows(line) for cell in row]) for i, line in rows]
        data = [(i, row) for i, row in rows if _share(row, _is_value) > 0.5]
        widths = Counter(len(row) for _, row in data).most_common(1)
        begin = next((i for i, row in data if len(row) == widths[0][0]), len(lines))
        above = [(i, row) for i, row in rows if i < begin and _share(row, _is_value) <= 0.5]
        if not above:
            raise RecordingError(self.path, "no header line with column names")
        units = []
        if len(above) > 1 and _share(above[-1][1], _is_unit) > 0.5 and (
                len(above[-1][1]) == len(above[-2][1])):
            units = above.pop()[1]
        names, row_names = [name.strip("'\" ") for name in above[-1][1]], []
        data = [row for i, row in data if i >= begin]
        self.first_line, self.width = begin, widths[0][0] if data else len(names)
        same = [row for row in data if len(row) == self.width]
        if self.width == len(names) + 1 and not any(row[-1] for row in same):
            names, units = [*names, ""], [*units, ""]       # a separator at each row's end
        elif self.width == len(names) + 1 and (
                all(row[0].isdigit() for row in same) or lines[begin].startswith('"')):
            names, units, row_names = ["", *names], ["", *units], [""]      # as R writes them
        elif self.width < len(names) and not any(names[self.width:]):
            names = names[:self.width]
        elif self.width != len(names):
            raise self._bad_width(begin + 1, self.width, len(names))
        self.names = formats.unique(names)
        units = dict(zip(self.names, [*units, *[""] * self.width]))
        self.units = {name: units[name].strip("'\"[]() ") or unit_in_name(name)
                      for name in self.names}
        cells = {name: [row[i] for row in data if i < len(row) and row[i].lower() not in MISSING]
                 for i, name in enumerate(self.names)}
        self.texts = [name for name in cells if cells[name] and not _is_number(cells[name][0])]
        self.numbers = [name for name in self.names if name not in ["", *self.texts, *row_names]]
        self.dates = [name for name in self.texts if name == self.names[0]
                      and re.match(CLOCK, cells[name][0].strip("'\"[] "))]
        self._number_format([cell for column in cells.values() for cell in column])

    def _number_format(self, cells):
        """How the numbers among the first rows are written: decimal mark, thousands separator."""
        cells = [cell for cell in cells if _is_number(cell)]
        comma, dot = ([cell for cell in cells if mark in cell] for mark in ",.")
        both = [cell for cell in comma if "." in cell]
        self.decimal, self.thousands = ("," if comma else "."), None
        for mark in "' ":
            grouped = rf"[+-]?\d{{1,3}}({mark}\d{{3}})+([.,]\d*)?"
            if any(re.fullmatch(grouped, cell) for cell in cells):
                self.thousands = mark
        if both and all(cell.rindex(",") > cell.rindex(".") for cell in both):
            self.thousands = "."
        elif comma and dot:
            self.decimal, self.thousands = ".", ","
            if not all(re.fullmatch(r"[+-]?\d{1,3}(,\d{3})+(\.\d*)?", cell) for cell in comma):
                raise RecordingError(self.path, "decimal commas and decimal points in one file; "
                                                "export it with one of them")

    def _bad_width(self, line, width, n_names):
        advice = ("decimal commas between commas? export it with semicolons"
                  if self.separator == "," and width > n_names else
                  "each row needs as many cells as the header")
        return RecordingError(self.path, f"line {line} has {width} cells, the header names "
                                         f"{n_names} columns; {advice}")

    def _plain(self, text):
        """Text with usual blanks, and single ones where they separate cells."""
        text = text.replace("\u00a0", " ").replace("\u202f", " ")
        if self.separator == " ":
            text = re.sub(r"(?m)^[ \t]+|[ \t]+$", "", text)
            text = re.sub(r"[ \t]+", " ", text)
        return text

    def _rows(self, text):
        return csv.reader(io.StringIO(self._plain(text)), delimiter=self.separator,
                          skipinitialspace=True)

    def frames(self, columns):
        at = [self.names.index(name) for name in columns]
        texts = {i: str for i in at if self.names[i] in self.texts}
        n_lines, tail = self.first_line, " "
        with self._open() as file:
            for _ in range(self.first_line):
                self._line(file)
            while tail:
                part = file.read(TABLE_CHARS)
                tail = self._line(file)
                part += tail
                body, lines = self._body(part, n_lines, is_last=not tail)
                if body:
                    frame = pd.read_csv(
                        io.StringIO(body), sep=self.separator, header=None, index_col=False,
                        names=range(self.width), usecols=sorted(set(at)), decimal=self.decimal,
                        thousands=self.thousands, na_values=MISSING_CELLS, low_memory=False,
                        skipinitialspace=True, dtype=texts, **EXACT)[at]
                    frame.index = lines
                    yield self._checked(frame, texts).set_axis(list(columns), axis=1)
                n_lines += part.count("\n")

    def _body(self, part, n_lines, is_last):
        """(the rows of a part of the file, the numbers of their lines); each has `width` cells."""
        part = self._plain(part).rstrip("\n") + "\n"
        body = self.empty.sub("", part)
        lines = range(n_lines + 1, n_lines + 1 + part.count("\n"))
        if body.count("\n") != len(lines):
            lines = [i for i, line in zip(lines, part.split("\n"))
                     if not self.empty.fullmatch(line)]
        if set(map(len, self._rows(body))) <= {self.width}:
            return body, lines
        for line, row in zip(lines, self._rows(body)):
            if is_last and line == lines[-1] and len(row) < self.width:
                self.notes.append("the last row is cut short; left out")
                return body[:body.rstrip("\n").rfind("\n") + 1], lines[:-1]
            if len(row) < self.width or any(row[self.width:]):
                raise self._bad_width(line, len(row), self.width)
        return body, lines

    def _checked(self, frame, texts):
        for i in frame.columns.difference(list(texts)):
            numbers = pd.to_numeric(frame[i], errors="coerce")
            wrong = frame.index[numbers.isna() & frame[i].notna()]
            if len(wrong):
                raise RecordingError(
                    self.path, f"line {wrong[0]}, column {i + 1}: expected a number",
                    f"{self.names[i]}: {str(frame[i][wrong[0]])[:40]!r}")
            frame[i] = numbers
        return frame

    def time_columns(self):
        """[name] of the time column, [date, clock time] where two hold it, [] if there is none."""
        plain = {}
        for name in filter(None, self.names):
            unit = unit_in_name(name, TIME)
            without = name[:name.rindex(unit)] if unit else name
            plain[name] = re.sub(r"[^a-zµ]", "", without.lower()) or plain_unit(unit)
        found = [name for known in TIME_NAMES for name in plain if plain[name] == known]
        days = [name for name in found if plain[name] == "date" and name in self.texts]
        if days and found[0] in self.texts and found[0] != days[0]:
            return [days[0], found[0]]
        return (found or self.dates)[:1]


def _encoding(start):
    if start.startswith((b"\xff\xfe", b"\xfe\xff")):
        return "utf-16"
    if b"\x00" in start[:2]:
        return "utf-16-le" if start[1:2] == b"\x00" else "utf-16-be"
    try:
        start[:start.rfind(b"\n") + 1].decode("utf-8")
    except UnicodeDecodeError:
        return "cp1252"
    return "utf-8-sig"


def _separator(lines):
    for one in "\t;|":
        count, times = Counter(line.count(one) for line in lines).most_common(1)[0]
        if count and times >= 0.6 * len(lines):
            return one
    blanks = [line for line in lines if "," not in line and len(line.split()) > 1]
    return " " if len(blanks) > 0.6 * len(lines) else ","


def _share(row, test):
    full = [cell for cell in row if cell]
    return sum(map(test, full)) / len(full) if full else 0.0


def _is_number(cell):
    return bool(re.fullmatch(NUMBER, cell)) and not re.fullmatch(DATE, cell)


def _is_value(cell):
    cell = cell.strip("'\"[] ")
    return cell.lower() in MISSING or bool(re.fullmatch(NUMBER, cell) or re.match(CLOCK, cell))


def _is_unit(cell):
    return plain_unit(cell.strip("'\"")) in UNITS or "hh:mm" in cell


class Parquet(Csv):
    def __init__(self, path):
        from pyarrow import parquet, types

        self.path, self.notes = path, []
        with open(path, "rb") as file:      # a name that is not UTF-8 is no path for pyarrow
            opened = parquet.ParquetFile(file)
            fields = list(opened.schema_arrow)
            check_size(path, opened.metadata.num_rows)
        self.numbers = [one.name for one in fields if types.is_integer(one.type)
                        or types.is_floating(one.type) or types.is_decimal(one.type)]
        self.dates = [one.name for one in fields if types.is_temporal(one.type)]
        self.texts = [*self.dates, *(one.name for one in fields if types.is_string(one.type)
                                     or types.is_large_string(one.type))]
        self.names = [one.name for one in fields if one.name in self.numbers + self.texts]
        self.units = {name: unit_in_name(name) for name in self.names}

    def frames(self, columns):
        from pyarrow import parquet

        n_lines = 0
        with open(self.path, "rb") as file:
            for batch in parquet.ParquetFile(file).iter_batches(TABLE_ROWS, columns=list(columns)):
                frame = batch.to_pandas(ignore_metadata=True)[list(columns)]
                frame.index += n_lines + 1
                n_lines += len(frame)
                yield frame


def open_table(path):
    return (Parquet if path.lower().endswith(".parquet") else Csv)(path)


# ----------------------------------------------------------------------------------------- the time

def read_times(file, names, hours=False):
    """(times [n] in s, whether they count from 1970 or midnight, lines [n]) of the time column, or
    of a date and a clock time. hours: 10:30 is half past ten, not ten minutes and a half.

    Numbers are in the header's unit, or s, ms, us or ns since 1970, or Excel's days. Clock times go
    on past midnight, and local times over a change of daylight saving time.
    """
    unit = TIME.get(plain_unit(unit_in_name(names[-1], TIME) or file.units[names[-1]]))
    times, dates, days, lines, is_date, zoned = [], {}, [], [], False, False
    for frame in file.frames(names):
        column = frame.iloc[:, -1]
        lines.append(frame.index)
        if pd.api.types.is_numeric_dtype(column):
            times.append(column.to_numpy(np.float64, na_value=np.nan))
        elif column.dtype.kind in "mM":
            column = column.dt.tz_convert(None) if getattr(column.dt, "tz", None) else column
            nanoseconds = column.to_numpy().astype(f"{column.dtype.kind}8[ns]")
            times.append(np.where(np.isnat(nanoseconds), np.nan, nanoseconds.astype("i8") / 1e9))
            unit, zoned, is_date = 1.0, True, column.dtype.kind == "M"
        else:
            texts = column.astype(str)
            if len(names) == 2:
                texts = frame.iloc[:, 0].astype(str) + " " + texts
            seconds, date, offset = _clock_times(texts, hours)
            times.append(seconds)
            codes, found = pd.factorize(date)
            found = [dates.setdefault(one, len(dates)) for one in found]
            days.append(np.array([*found, -1])[codes])
            unit, zoned, is_date = 1.0, zoned or offset, True
    if not times:
        raise RecordingError(file.path, "no rows below the header")
    times = np.concatenate(times)
    if unit is None:
        unit = _guess_unit(times)
    times *= unit
    if dates:
        times += 86400 * np.append(_days(list(dates)), np.nan)[np.concatenate(days)]
    if not np.isfinite(times).all():
        row = int((~np.isfinite(times)).argmax())
        raise _at_line(file.path, lines, row,
                       f"no time, or one that cannot be read; {GIVE_RATE}")
    if is_date and not zoned:
        steps, fix = np.diff(times, prepend=times[0]), np.zeros(len(times))
        if not dates:
            fix[steps < -43200] = 86400
        else:
            sunday = (times // 86400 + 4) % 7 == 0
            fix[np.abs(steps + 3600) < 2] = 3600
            fix[(np.abs(steps - 3600) < 2) & sunday & (times % 3600 < 2)] = -3600
            if fix.any():
                file.notes.append("times: a change of daylight saving time; the seconds go on")
        times += np.cumsum(fix)
    return times, is_date or times[0] > 1e8, lines


def _clock_times(texts, hours):
    """(seconds since midnight [n], dates [n] (texts, or missing), whether a zone is stated)."""
    parts = texts.str.strip(" '\"[]").str.extract(CLOCK)
    date, zones = parts["date"].fillna(parts["late"]), parts["zone"].dropna().unique()
    clock = parts["clock"].str.replace(",", ".", regex=False).str.split(":", expand=True)
    a, b, c = clock.reindex(columns=range(3)).astype(float).to_numpy().T
    dated, half = date.notna().to_numpy(), parts["half"].str.lower()
    a, b = (np.where(dated & parts["clock"].isna(), 0.0, part) for part in (a, b))
    in_hours = ~np.isnan(c) | dated | half.notna().to_numpy() | hours
    a = np.where(half.notna(), a % 12 + 12 * half.eq("p"), a)
    seconds = np.where(in_hours, a * 3600 + b * 60 + np.nan_to_num(c), a * 60 + b)
    offsets = {zone: datetime.datetime.strptime(re.sub("UTC|GMT", "Z", zone), "%z")
               .utcoffset().total_seconds() for zone in zones}
    return seconds - parts["zone"].map(offsets).fillna(0).to_numpy(float), date, len(zones) > 0


def _guess_unit(times):
    first = abs(times[0])
    for least, factor in ((1e17, 1e-9), (1e14, 1e-6), (1e11, 1e-3)):
        if first > least:
            return factor
    steps = np.diff(times[:1000])
    return 86400.0 if first > 2e4 and steps.size and 0 < np.median(steps) < 1e-5 else 1.0


def _days(dates):
    """Days since 1970 of dates: of day and month first, the order that all fit and spans less."""
    found = []
    for form in DATES:
        with contextlib.suppress(ValueError):
            days = [datetime.datetime.strptime(re.sub("[/.]", "-", date), form) for date in dates]
            found.append([(day - datetime.datetime(1970, 1, 1)).days for day in days])
    return min(found, key=np.ptp, default=[np.nan] * len(dates))


def _at_line(path, lines, row, what):
    """The error of a row; lines: the numbers of the lines of all rows, in parts."""
    for part in lines:
        if row < len(part):
            return RecordingError(path, f"line {part[row]}: {what}")
        row -= len(part)


def find_grid(path, times, lines):
    """(rows/s, [(row, rows by which it and all later ones move)], length in rows, notes).

    Stamps are rounded, jitter and repeat; rows are missing, or there are gaps. A step counts as a
    jump where the stamps after it are late as a whole, against an even grid: by the medians of
    NEAR_ROWS and of FAR_ROWS rows on either side. The rate is that of least squares in the runs
    between jumps, made a round number where that moves the last row by less than a tenth of a row.
    """
    n = len(times)
    if n < 2:
        raise RecordingError(path, "fewer than two rows below the header")
    head = times[:2 * TABLE_ROWS]
    steps = np.diff(head)
    new = np.flatnonzero(np.append(True, steps > 0))    # rows with a stamp of their own
    w = int(np.clip(len(new) // 20, 1, 256))
    slopes = (head[new[w:]] - head[new[:-w]]) / (new[w:] - new[:-w])
    period = float(np.median(slopes)) if slopes.size else 0.0
    if not period > 0:
        raise _at_line(path, lines, 1, f"time does not increase; {GIVE_RATE}")
    # what stamps are rounded to, where to more than a row
    coarse_s = float(np.median(steps[steps > 0])) if np.mean(steps == 0) > 0.2 else 0.0
    far = int(np.clip(np.ceil(2 * coarse_s / period), FAR_ROWS, 8192))
    jumps = _find_jumps(path, times, lines, period, coarse_s, far)
    runs = list(zip([0, *(row for row, _ in jumps)], [*(row for row, _ in jumps), n]))
    sums, n_wild = np.zeros(2), 0       # of i * t and i * i about the means of parts of runs
    for first, end in runs:
        for a in range(first, end, TABLE_ROWS):
            t = times[a:min(a + TABLE_ROWS, end)]
            i = np.arange(len(t))
            late_s = t - period * i
            good = np.abs(late_s - np.median(late_s)) < max(1.0, 5 * period, 2 * coarse_s)
            n_wild += np.count_nonzero(~good)
            i, t = i[good] - i[good].mean(), t[good] - t[good].mean()
            sums += i @ t, i @ i
    exact = sums[0] / sums[1] if sums[1] else period
    length = n + sum(by / exact for _, by in jumps)
    rounded = (round(1 / exact, digits) for digits in range(9))
    fs = next((fs for fs in rounded if abs(fs * exact - 1) * length < 0.1), 1 / exact)
    size = max(far, int(RATE_BLOCK_S / period))
    for first, end in runs:
        at, i = np.arange(first, end - FAR_ROWS + 1, size), np.arange(FAR_ROWS)
        seconds = np.diff(np.median(times[at[:, None] + i] - period * i, axis=1))
        wrong = np.abs(seconds * fs - size) > MAX_RATE_ERROR * size + 0.5 + fs * coarse_s
        if wrong.any():
            k = int(wrong.argmax())
            raise _at_line(path, lines, at[k + 1], "time is not evenly spaced: "
                           f"{size / seconds[k]:.4g} rows/s above it, {fs:.4g} on average; "
                           f"{GIVE_RATE}")
    moves, notes = [(row, round(by * fs)) for row, by in jumps], []
    missing = [by for _, by in moves if by > 0]
    repeated = -sum(by for _, by in moves if by < 0)
    if missing:
        notes.append(f"times: {fs:.6g} rows/s, {len(missing)} gaps of {sum(missing) / fs:.6g} s "
                     f"together ({sum(missing):,} rows missing)")
    if n_wild:
        notes.append(f"times: {n_wild:,} stamps do not fit those around them; their rows were "
                     "placed by their neighbours")
    if repeated:
        notes.append(f"times: {repeated:,} rows repeat the time of others; left out")
    return fs, moves, n + sum(missing) - repeated, notes


def _find_jumps(path, times, lines, period, coarse_s, far):
    """[(row, s by which it and all later ones are late)]."""
    near = far if coarse_s else NEAR_ROWS
    least_s = 0.6 * max(period, coarse_s)
    rows = []
    for first in range(0, len(times), TABLE_ROWS):
        steps = np.diff(times[first:first + TABLE_ROWS + 1])
        odd = (steps > period + max(0.5 * period, coarse_s)) | (steps < -period)
        rows.append(np.flatnonzero(odd | (steps < 0.5 * period) & (not coarse_s)) + first + 1)
    rows = np.concatenate(rows)
    if not coarse_s:        # jitter leaves many: look closer only where a few rows are late
        i = np.arange(NEAR_ROWS)
        after = times[np.minimum(rows[:, None] + i, len(times) - 1)] - period * i
        before = times[np.maximum(rows[:, None] - 1 - i, 0)] + period * (i + 1)
        late_s = np.abs(np.median(after, axis=1) - np.median(before, axis=1))
        inside = (rows >= NEAR_ROWS) & (rows <= len(times) - NEAR_ROWS)
        rows = rows[(late_s >= least_s) | ~inside]
    jumps, run = [], 0
    for row in rows:
        late_s = []
        for k in (near, far):       # how much later are the rows after it than those before it say?
            before, after = times[max(run, row - k):row], times[row:row + k]
            late_s.append(float(np.median(after - period * np.arange(len(after)))
                                - np.median(before + period * np.arange(len(before), 0, -1))))
        by = late_s[0]
        if min(map(abs, late_s)) < least_s or by * late_s[1] < 0:
            continue
        if by < -max(1.0, 2 * period):
            raise _at_line(path, lines, row, "time does not increase, but goes back by "
                                             f"{-by:.6g} s; {GIVE_RATE}")
        if by > MAX_GAP_S:
            raise _at_line(path, lines, row, "jumps in time of over a week "
                                             f"({by / 86400:.3g} days); is time in seconds?")
        jumps.append((int(row), by))
        run = row
    return jumps


class Table:
    """The reader of CSV and Parquet files: a row a sample; an empty or NaN cell is missing.

    The rate and the gaps come from the time column, in a first pass; `file_fs` says that the rows
    are evenly spaced instead.
    """

    def __init__(self, path, file_fs=None):
        self.path, self.file = path, open_table(path)
        self.start_time, self.fs, self.jumps, notes = None, file_fs, [], []
        names = [] if file_fs else self.file.time_columns()
        if file_fs:
            n = sum(len(frame) for frame in self.file.frames(self.file.names[-1:]))
            if not n:
                raise RecordingError(path, "no rows below the header")
        elif names:
            times, is_date, lines = read_times(self.file, names)
            self.start_time = _datetime(times[0]) if is_date else None
            times -= times[0]
            self.fs, self.jumps, n, notes = find_grid(path, times, lines)
        else:
            raise RecordingError(
                path, "no time column (time_s, Time (ms), a clock time or a date); give the "
                "sampling rate: --fs HZ", ", ".join(self.file.names))
        check_size(path, n)
        self.notes = list(dict.fromkeys(self.file.notes + notes))
        self.end_s = n / self.fs
        self.channels = {name: formats.listed(self.fs, self.file.units[name])
                         for name in self.file.numbers if name not in names}
        self.every = {}     # {name: (k, phase)}: a slower channel has a cell in every k-th row
        self.names, self.begin_s = None, np.inf

    def read(self, names, start_s, stop_s):
        if list(names) != self.names or start_s < self.begin_s:     # from the first row on
            self.names, self.n_rows, self.kept = list(names), 0, []
            self.frames = self.file.frames(self.names) if self.names else iter(())
        self.begin_s = start_s
        first, end = span(start_s, stop_s, self.fs, round(self.end_s * self.fs))
        while not (self.kept and self.kept[-1][0][-1] >= end):
            frame = next(self.frames, None)
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


def _datetime(seconds):
    with contextlib.suppress(OverflowError, ValueError):
        return datetime.datetime(1970, 1, 1) + datetime.timedelta(seconds=round(seconds, 6))


def read_readings(path, start_time=None):
    """(times_s [n] from the recording's start, DataFrame of the numbers, {column: unit}) of a CSV
    or Parquet file with a row a reading, at any times. Dates and clock times count from start_time.
    """
    file = open_table(path)
    names = file.time_columns()
    if not names:
        raise RecordingError(path, "no time column (time_s: seconds from the recording's start)")
    columns = [name for name in file.numbers if name not in names]
    times, is_date, _ = read_times(file, names, hours=True)
    if is_date:
        if start_time is None:
            raise RecordingError(path, "has dates or clock times, but the recording has none; give "
                                       "time_s, seconds from its start")
        only_clock = start_time.year == 1970 or times[0] < 86400
        times = times - (start_time - datetime.datetime(1970, 1, 1)).total_seconds()
        if only_clock:
            times = times - 86400 * np.round(times[0] / 86400)
    return times, pd.concat(file.frames(columns), ignore_index=True), file.units
