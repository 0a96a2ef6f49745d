"""Tables (CSV, Parquet) as recordings: their dialect, their time column, their rate and gaps.

    from tables import Table
    Table('night.csv').read(['ABP', 'PPG'], 0, 600)     # a reader, as formats.py describes it

Needs formats.py. CSV is read in whatever form instruments and spreadsheets write it: comma,
semicolon, tab, bar or blanks between cells; decimal commas; UTF-8, UTF-16 or Windows' code page;
lines above the header, a row of units, comments, blank rows, row names. An ambiguous file is
refused, in one line that says what is wrong and what to do.
"""
import contextlib
import csv
import datetime
import io
import re
import statistics
from dataclasses import replace

import numpy as np
import pandas as pd

import formats
from formats import MIN_WAVE_HZ, RecordingError, check_size, plain_unit, span, unit_in_name

TIME = {name: seconds for seconds, names in (
    (1.0, "s sec secs second seconds"), (1e-3, "ms msec millisecond milliseconds"),
    (1e-6, "us µs microseconds"), (1e-9, "ns nanoseconds"), (60.0, "min mins minute minutes"),
    (3600.0, "h hour hours"), (86400.0, "d day days")) for name in names.split()}
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
MAX_GAP_S = 7 * 86400.0         # a longer gap is an error in the times
NEAR_ROWS, FAR_ROWS = 3, 8      # numbers of rows that distinguish a missing row from jitter
RATE_BLOCK_S = 10.0             # the rate in blocks of this length ...
MAX_RATE_ERROR = 0.05           # ... may differ by this share
# pandas 3 parses floats exactly by default and warns about the option.
EXACT = {} if int(pd.__version__.split(".")[0]) >= 3 else {"float_precision": "round_trip"}
EPOCH = datetime.datetime(1970, 1, 1)
GIVE_RATE = "if the rows are evenly spaced: --fs HZ"


class Csv:
    """A CSV file: column names, units {name: unit}, numbers and texts (names of the columns of each
    kind), notes; frames(columns) yields it in parts, as DataFrames indexed by row number from 1."""

    def __init__(self, path):
        self.path, self.notes = path, []
        with open(path, "rb") as file:
            start = file.read(4096)
        self.encoding, what = _encoding(start), [MAGIC[m] for m in MAGIC if start.startswith(m)]
        if what or b"\x00" in start and self.encoding != "utf-16":
            raise RecordingError(path, f"this is {[*what, 'binary data'][0]}, not a CSV; export it "
                                       "as CSV")
        with self._open() as file:
            self._sniff(self._read(file, HEAD_CHARS).split("\n")[:HEAD_LINES])

    def _open(self):
        return open(self.path, encoding=self.encoding, errors="replace")

    def _read(self, file, size):
        """`size` characters and the rest of the last line."""
        text, tail = file.read(size), file.readline(MAX_LINE)
        if len(tail) == MAX_LINE:
            raise RecordingError(self.path, f"a line of over {MAX_LINE:,} characters: not a table")
        return text + tail

    def _rows(self, text):
        return csv.reader(io.StringIO(text), delimiter=self.separator, skipinitialspace=True)

    def _sniff(self, lines):
        """Find the dialect, from the first lines: separator, header, units, kinds of columns."""
        stated = re.match(r'(?i)"?sep=(.)"?\s*$', lines[0])    # Excel's line above the header
        self.separator = stated.group(1) if stated else _separator(lines)
        self.empty = re.compile(rf'(?m)^(?:[ \t"{re.escape(self.separator)}]*|\s*{COMMENT}.*)$\n?')
        rows = []
        for i, line in enumerate(lines):
            line = re.sub(rf"^\s*{COMMENT}+\s*", "", self._plain(line))
            if i >= bool(stated) and line.strip(" \t,;|"):
                rows.append((i, [cell.strip("'\" ") for cell in next(self._rows(line))]))
        data = [(i, row) for i, row in rows if _share(row, _is_value) > 0.5]
        if len(rows) > 1 and not data:
            raise RecordingError(self.path, "no row of numbers; cells such as '75 mmHg' or "
                                            "'120/80' are text: export a number in each cell")
        begin, names, units = self._find_header(lines, rows, data)
        self.names, self.width, self.first_line = formats.unique(names), len(names), begin
        self.units = {name: unit.strip("[]() ") or unit_in_name(name)
                      for name, unit in zip(self.names, [*units, *[""] * self.width])}
        self._find_kinds([row for i, row in data if i >= begin])

    def _find_header(self, lines, rows, data):
        """(number of the first line of data, column names, units). rows: [(line number, cells)];
        data: those of numbers."""
        width = statistics.mode(len(row) for _, row in data) if data else 0
        begin = next((i for i, row in data if len(row) == width), len(lines))
        above = [(i, row) for i, row in rows if i < begin and (i, row) not in data]
        if not above:
            raise RecordingError(self.path, "no header line with column names")
        header, names = above.pop()
        begin = next((i for i, _ in data if i > header), begin)     # even if its width is wrong
        units = []
        if above and len(above[-1][1]) == len(names) and _share(names, _is_unit) > 0.5:
            units, names = names, above[-1][1]
        while names and not names[-1]:
            names.pop()
        data = [row for i, row in data if i >= begin]
        if width == len(names) + 1 and any(row[-1] for row in data) and (
                lines[begin].startswith('"') or _counts_up([row[0] for row in data])):
            names, units = ["", *names], ["", *units]       # R's row names have no header
        return begin, names, units

    def _find_kinds(self, data):
        """Find the columns of numbers, texts and dates, and the decimal mark, in rows of cells."""
        cells = {name: [row[i] for row in data if i < len(row) and row[i].lower() not in MISSING]
                 for i, name in enumerate(self.names)}
        self.texts = [name for name in cells if cells[name] and not _is_number(cells[name][0])]
        self.numbers = [name for name in self.names if name and name not in self.texts]
        self.dates = [name for name in self.texts[:1] if name == self.names[0]
                      and re.match(CLOCK, cells[name][0].strip("[] "))]
        numbers = "\n".join(cell for some in cells.values() for cell in some if _is_number(cell))
        self.decimal = "," if "," in numbers else "."
        if "," in numbers and "." in numbers or re.search(r"\d[^\S\n]|'", numbers):
            raise RecordingError(self.path, "decimal commas and points, or thousands separators; "
                                            "export it with decimal points alone")

    def _plain(self, text):
        """`text` with single blanks, if blanks separate the cells."""
        return text if self.separator != " " else re.sub(
            r"(?m)^[ \t]+|[ \t]+$|(?<=[ \t])[ \t]+", "", text).replace("\t", " ")

    def frames(self, columns):
        at = [self.names.index(name) for name in columns]
        texts = {i: str for i in at if self.names[i] in self.texts}
        n_rows, part = 0, None
        with self._open() as file:
            for _ in range(self.first_line):
                file.readline()
            while part != "":
                part = self._read(file, TABLE_CHARS)
                body = self.empty.sub("", self._plain(part.rstrip("\n") + "\n"))
                body = self._whole_rows(body, n_rows, is_last=len(part) < TABLE_CHARS)
                if not body:
                    continue
                frame = pd.read_csv(
                    io.StringIO(body), sep=self.separator, header=None, names=range(self.width),
                    usecols=sorted(set(at)), index_col=False, decimal=self.decimal, dtype=texts,
                    na_values=MISSING_CELLS, skipinitialspace=True, low_memory=False, **EXACT)[at]
                frame.index += n_rows + 1
                n_rows += len(frame)
                for i in set(at).difference(texts):
                    cells = frame[i]
                    if self.decimal == "," and not pd.api.types.is_numeric_dtype(cells):
                        cells = cells.astype(str).str.translate(str.maketrans(",.", ".x"))
                    numbers = pd.to_numeric(cells, errors="coerce")
                    for row in frame.index[numbers.isna() & frame[i].notna()]:
                        raise RecordingError(
                            self.path, f"row {row}, column {i + 1}: expected a number",
                            f"{self.names[i]}: {str(frame[i][row])[:40]!r}")
                    frame[i] = numbers
                yield frame.set_axis(list(columns), axis=1)

    def _whole_rows(self, body, n_rows, is_last):
        """Drop a last row that was cut short; raise if any other row has a wrong width."""
        wrong = [(i, len(row)) for i, row in enumerate(self._rows(body), 1)
                 if len(row) < self.width or any(row[self.width:])]     # extra cells may be empty
        if not wrong:
            return body
        number, n = wrong[0]
        if is_last and number == body.count("\n") and n < self.width:
            self.notes.append("the last row is cut short; left out")
            return body[:body.rstrip("\n").rfind("\n") + 1]
        raise RecordingError(
            self.path, f"row {n_rows + number} has {n} cells, the header names {self.width} columns"
            "; export it with a cell for each, and with semicolons if there are decimal commas")


def time_columns(table):
    """[name] of the time column, [date, clock time] if two columns hold it, [] if none."""
    plain = {}
    for name in filter(None, table.names):
        unit = unit_in_name(name, TIME)
        without = name[:name.rindex(unit)] if unit else name
        plain[name] = re.sub(r"[^a-zµ]", "", without.lower()) or plain_unit(unit)
    found = [name for known in TIME_NAMES for name in plain if plain[name] == known]
    days = [name for name in found if plain[name] == "date" and name in table.texts]
    if days and found[0] in table.texts and found[0] != days[0]:
        return [days[0], found[0]]
    return (found or table.dates)[:1]


def _encoding(start):
    if start.startswith((b"\xff\xfe", b"\xfe\xff")):
        return "utf-16"
    try:
        start[:start.rfind(b"\n") + 1].decode("utf-8")
    except UnicodeDecodeError:
        return "cp1252"
    return "utf-8-sig"


def _separator(lines):
    lines = [line for line in lines if line.strip()][-200:]
    for mark in "\t;|":
        counts = [line.count(mark) for line in lines if mark in line]
        if counts and counts.count(statistics.mode(counts)) >= 0.6 * len(lines):
            return mark
    blanks = [line for line in lines if "," not in line and len(line.split()) > 1]
    return " " if len(blanks) > 0.6 * len(lines) else ","


def _share(row, test):
    full = [cell for cell in row if cell]
    return sum(map(test, full)) / len(full) if full else 0.0


def _counts_up(cells):
    """Whether the cells are 1, 2, 3, …; the digits before decimal commas are not."""
    return all(cell.isdigit() for cell in cells) and all(
        int(b) - int(a) == 1 for a, b in zip(cells, cells[1:]))


def _is_number(cell):
    return bool(re.fullmatch(NUMBER, cell)) and not re.fullmatch(DATE, cell)


def _is_value(cell):
    return cell.lower() in MISSING or bool(
        re.fullmatch(NUMBER, cell) or re.match(CLOCK, cell.strip("[] ")))


def _is_unit(cell):
    return plain_unit(cell) in UNITS or "hh:mm" in cell


class Parquet:
    """A Parquet file, with the attributes and the `frames` of `Csv`."""

    def __init__(self, path):
        self.path, self.notes = path, []
        with self._open() as opened:
            check_size(path, opened.metadata.num_rows)
            kinds = opened.schema_arrow.empty_table().to_pandas(ignore_metadata=True)
        self.names = list(kinds)
        self.units = {name: unit_in_name(name) for name in self.names}
        self.numbers = list(kinds.select_dtypes("number", exclude="timedelta"))
        self.dates = list(kinds.select_dtypes(["datetime", "datetimetz", "timedelta"]))
        self.texts = [name for name in self.names if name not in self.numbers]

    @contextlib.contextmanager
    def _open(self):
        from pyarrow import parquet

        with open(self.path, "rb") as file:     # pyarrow opens no path that is not UTF-8
            yield parquet.ParquetFile(file)

    def frames(self, columns):
        with self._open() as opened:
            for batch in opened.iter_batches(TABLE_ROWS, columns=list(columns)):
                yield batch.to_pandas(ignore_metadata=True)[list(columns)]


def open_table(path):
    return (Parquet if path.lower().endswith(".parquet") else Csv)(path)


def read_times(file, names, hours=False):
    """(times [n] in s, whether they count from 1970 or midnight, whether they are in UTC) of the
    time column, or of a date and a clock time. Numbers are in the header's unit, or s, ms, us or ns
    since 1970, or Excel's days. Seconds are counted on past midnight and over a change of daylight
    saving time. hours: 10:30 is half past ten, not ten minutes and a half.
    """
    unit = TIME.get(plain_unit(unit_in_name(names[-1], TIME) or file.units[names[-1]]))
    times, days, dates, is_text, zoned = [], [], {}, False, False
    for frame in file.frames(names):
        column = frame.iloc[:, -1]
        if pd.api.types.is_numeric_dtype(column):
            seconds, zoned = column, True       # since 1970, if at all
        elif column.dtype.kind in "mM":
            zone = getattr(column.dt, "tz", None)
            zero = pd.Timestamp(0, tz=zone) if column.dtype.kind == "M" else pd.Timedelta(0)
            seconds, unit, zoned = (column - zero) / pd.Timedelta("1s"), 1.0, zone is not None
        else:
            texts = column.astype(str)
            if len(names) == 2:
                texts = frame.iloc[:, 0].astype(str) + " " + texts
            seconds, date, has_zone = _clock_times(texts, hours)
            codes, found = pd.factorize(date)
            numbers = [dates.setdefault(text, len(dates)) for text in found]
            days.append(np.array([*numbers, -1])[codes])
            unit, zoned, is_text = 1.0, zoned or has_zone, True
        times.append(seconds.to_numpy(np.float64, na_value=np.nan))
    if not times:
        raise RecordingError(file.path, "no rows below the header")
    times = np.concatenate(times)
    if unit is None:
        first, step = abs(times[0]), np.median(np.diff(times[:1000])) if len(times) > 1 else 0
        unit = (1e-9 if first > 1e17 else 1e-6 if first > 1e14 else 1e-3 if first > 1e11 else
                86400.0 if first > 2e4 and 0 < step < 1e-5 else 1.0)
    times *= unit
    if dates:
        times += 86400 * np.append(_days(list(dates)), np.nan)[np.concatenate(days)]
    wrong = np.flatnonzero(~np.isfinite(times))
    if wrong.size:
        raise RecordingError(file.path, f"row {wrong[0] + 1}: no readable time; {GIVE_RATE}")
    if is_text and not zoned:
        steps, fix = np.diff(times, prepend=times[0]), np.zeros(len(times))
        if not dates:
            fix[steps < -43200] = 86400
        else:
            sunday = (times // 86400 + 4) % 7 == 0
            fix[np.abs(steps + 3600) < 2] = 3600
            fix[(np.abs(steps - 3600) < 2) & sunday & (times % 3600 < 2)] = -3600
            if fix.any():
                file.notes.append("times: a change of daylight saving time was taken out")
        times += np.cumsum(fix)
    return times, is_text or times[0] > 1e8, zoned and unit != 86400    # Excel's days are local


def _clock_times(texts, hours):
    """(seconds since midnight [n], dates [n] (text or missing), whether a time zone is stated)."""
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
    return seconds - parts["zone"].map(offsets).fillna(0).astype(float), date, len(zones) > 0


def _days(dates):
    """Days since 1970, in the format that fits all dates; of several, the shortest time span."""
    found = []
    for form in DATES:
        with contextlib.suppress(ValueError):
            days = [datetime.datetime.strptime(re.sub("[/.]", "-", date), form) for date in dates]
            found.append([(day - EPOCH).days for day in days])
    return min(found, key=np.ptp, default=[np.nan] * len(dates))


def find_grid(path, times):
    """(rows/s, [(row, rows by which it and all later rows move)], length in rows, notes).

    Time stamps may be rounded, jitter or repeat, and rows may be missing. A step is a jump if the
    stamps after it are late or early on an even grid, by the medians of both NEAR_ROWS and FAR_ROWS
    rows on either side. The rate is the least-squares fit to the runs between jumps, rounded if
    that moves the last row by less than a tenth of a row.
    """
    n = len(times)
    if n < 2:
        raise RecordingError(path, "fewer than two rows below the header")
    head = times[:2 * TABLE_ROWS]
    steps = np.diff(head)
    new = np.flatnonzero(np.append(True, steps > 0))    # first row of each stamp
    w = int(np.clip(len(new) // 20, 1, 256))
    slopes = (head[new[w:]] - head[new[:-w]]) / (new[w:] - new[:-w])
    period = float(np.median(slopes)) if slopes.size else 0.0
    if not period > 0:
        raise RecordingError(path, f"row 2: time does not increase; {GIVE_RATE}")
    # the resolution of the stamps, if coarser than a row
    coarse_s = float(np.median(steps[steps > 0])) if np.mean(steps == 0) > 0.2 else 0.0
    far = int(np.clip(np.ceil(2 * coarse_s / period), FAR_ROWS, 8192))
    jumps = _find_jumps(path, times, period, coarse_s, far)
    size = max(far, int(RATE_BLOCK_S / period))
    sums, n_wild, blocks = np.zeros(2), 0, []       # sums of i * t and i * i, centred
    ends = np.union1d([row for row, _ in jumps], np.arange(0, n, TABLE_ROWS)).astype(np.int64)
    for a, t in zip(ends, np.split(times, ends[1:])):
        i = np.arange(len(t))
        late_s = t - period * i
        good = np.abs(late_s - np.median(late_s)) < max(1.0, 5 * period, 2 * coarse_s)
        n_wild += np.count_nonzero(~good)
        good &= (np.diff(t, prepend=times[max(a - 1, 0)]) > 0) | (coarse_s == 0)
        at = np.arange(0, len(t) - FAR_ROWS + 1, size)
        at_s = np.median(late_s[at[:, None] + np.arange(FAR_ROWS)], axis=1) + period * at
        blocks.append((a + at[1:], np.diff(at_s)))
        if good.any():
            i, t = i[good] - i[good].mean(), t[good] - t[good].mean()
            sums += i @ t, i @ i
    if coarse_s and not sums[1]:
        raise RecordingError(path, f"time in steps of {coarse_s:g} s, too few of them; {GIVE_RATE}")
    exact = sums[0] / sums[1] if sums[1] else period
    length = n + sum(by / exact for _, by in jumps)
    if not exact > 0 or not length >= 1:
        raise RecordingError(path, f"the times do not increase on the whole; {GIVE_RATE}")
    rounded = (round(1 / exact, digits) for digits in range(9))
    fs = next((fs for fs in rounded if abs(fs * exact - 1) * length < 0.1), 1 / exact)
    for row, seconds in zip(*map(np.concatenate, zip(*blocks))):
        if abs(seconds * fs - size) > MAX_RATE_ERROR * size + 0.5 + fs * coarse_s:
            raise RecordingError(path, f"row {row + 1}: time is not evenly spaced: {GIVE_RATE} "
                                       f"({size / seconds:.4g} rows/s here, {fs:.4g} on average)")
    moves = [(row, round(by * fs)) for row, by in jumps]
    missing = [by for _, by in moves if by > 0]
    repeated = -sum(by for _, by in moves if by < 0)
    notes = [f"times: {fs:.6g} rows/s; gaps: {len(missing)}, together {sum(missing) / fs:.6g} s "
             f"({sum(missing):,} rows missing)"] if missing else []
    if n_wild:
        notes.append(f"times: {n_wild:,} rows with odd stamps were placed by their neighbours")
    if repeated:
        notes.append(f"times: {repeated:,} rows repeat the time of others; left out")
    return fs, moves, n + sum(missing) - repeated, notes


def _find_jumps(path, times, period, coarse_s, far):
    """[(row, s by which it and all later rows are late)]."""
    n, near, least_s = len(times), far if coarse_s else NEAR_ROWS, 0.6 * max(period, coarse_s)
    late_s, steps = times - period * np.arange(n), np.diff(times)
    odd = (steps > period + max(0.5 * period, coarse_s)) | (steps < -period)
    rows = np.flatnonzero(odd | (steps < 0.5 * period) & (not coarse_s)) + 1
    if not coarse_s:        # jitter makes many odd steps; few have several late rows after them
        i = np.arange(NEAR_ROWS)
        after = np.median(late_s[np.minimum(rows[:, None] + i, n - 1)], axis=1)
        before = np.median(late_s[np.maximum(rows[:, None] - 1 - i, 0)], axis=1)
        at_an_end = (rows < NEAR_ROWS) | (rows > n - NEAR_ROWS)
        rows = rows[(np.abs(after - before) >= least_s) | at_an_end]
    jumps, run, own_s = [], 0, steps[rows - 1] - period
    for j, row in enumerate(rows):
        by, by_far = (np.median(late_s[row:row + k]) - np.median(late_s[max(run, row - k):row])
                      for k in (near, far))
        close = rows[j:j + near] < row + near
        if (min(abs(by), abs(by_far)) < least_s or by * by_far < 0
                or np.abs(own_s[j:j + near][close] - by).argmin() > 0):     # a later step fits
            continue
        if by < -max(1.0, 2 * period) - 1e-6:
            raise RecordingError(path, f"row {row + 1}: time does not increase, but goes back by "
                                       f"{-by:.6g} s; {GIVE_RATE}")
        if by > MAX_GAP_S:
            raise RecordingError(path, f"row {row + 1}: jumps in time of over a week "
                                       f"({by / 86400:.3g} days); is time in seconds?")
        jumps.append((int(row), float(by)))
        run = row
    return jumps


class Table:
    """Reader of CSV and Parquet files with a row per sample; an empty or NaN cell is missing. Rate
    and gaps come from the time column, unless `file_fs` is given: then rows are evenly spaced."""

    def __init__(self, path, file_fs=None):
        self.path, self.file = path, open_table(path)
        self.start_time, self.fs, self.jumps, notes = None, file_fs, [], []
        names = time_columns(self.file)
        if file_fs:
            n = sum(len(frame) for frame in self.file.frames(self.file.names[-1:]))
            with contextlib.suppress(RecordingError, IndexError):   # unreadable times
                fs = find_grid(path, read_times(self.file, names)[0])[0]
                if abs(fs / file_fs - 1) > 0.02:
                    notes = [f"--fs {file_fs:g}, though its times say {fs:.4g} rows/s"]
            names = []
        elif names:
            times, is_date, zoned = read_times(self.file, names)
            if is_date and not any("daylight" in note for note in self.file.notes):
                epoch = EPOCH.replace(tzinfo=datetime.timezone.utc if zoned else None)
                self.start_time = epoch + datetime.timedelta(seconds=round(times[0], 6))
            times -= times[0]
            self.fs, self.jumps, n, notes = find_grid(path, times)
        else:
            raise RecordingError(
                path, "no time column (time_s, Time (ms), a clock time or a date); give the "
                "sampling rate: --fs HZ", ", ".join(self.file.names))
        if not n:
            raise RecordingError(path, "no rows below the header")
        check_size(path, n)
        self.notes = list(dict.fromkeys(self.file.notes + notes))
        self.end_s = n / self.fs
        self.channels = {name: formats.listed(self.fs, self.file.units[name])
                         for name in self.file.numbers if name not in names}
        self.every = {}     # {name: (k, phase)}: a slower channel has a cell in every k-th row
        self.names, self.begin_s = None, np.inf

    def read(self, names, start_s, stop_s):
        if list(names) != self.names or start_s < self.begin_s:     # start at the first row again
            self.names, self.n_rows, self.kept = list(names), 0, []
            self.frames = self.file.frames(self.names) if self.names else iter(())
        self.begin_s = start_s
        first, end = span(start_s, stop_s, self.fs, round(self.end_s * self.fs))
        while not (self.kept and self.kept[-1][0][-1] >= end):
            frame = next(self.frames, None)
            if frame is None:
                break
            rows = self.n_rows + np.arange(len(frame))
            moves = np.cumsum([0] + [by for _, by in self.jumps])
            at = rows + moves[np.searchsorted([row for row, _ in self.jumps], rows, side="right")]
            self.n_rows += len(frame)
            self.kept.append((at, frame.to_numpy(np.float64, na_value=np.nan)))
        self.kept = [(at, values) for at, values in self.kept if at[-1] >= first]
        dense = np.full((end - first, len(self.names)), np.nan)
        for at, values in self.kept:    # a row that repeats a time is overwritten by the next
            here = (at >= first) & (at < end)
            dense[at[here] - first] = values[here]
        return {name: self._channel(name, dense[:, i], first) for i, name in enumerate(self.names)}

    def _channel(self, name, column, first):
        known = np.flatnonzero(np.isfinite(column)) + first
        if name not in self.every and known.size > 10:
            k = int(np.gcd.reduce(np.diff(known[:10000])))
            self.every[name] = (k, int(known[0] % k)) if self.fs / k >= MIN_WAVE_HZ else (1, 0)
        k, phase = self.every.get(name, (1, 0))
        if k > 1 and (known % k != phase).any():
            raise RecordingError(self.path, f"a column has a cell in every {k} rows at first, and "
                                            "in other rows later", name)
        begin = -(-(first - phase) // k)
        return replace(self.channels[name], samples=column[begin * k + phase - first::k].copy(),
                       fs=self.fs / k, first=begin, start_s=phase / self.fs)


def read_readings(path, start_time=None):
    """(times_s [n] from the recording's start, DataFrame of the numbers, {column: unit}) of a CSV
    or Parquet file with a row per reading, at any times. start_time: zero of dates and clock times.
    """
    file = open_table(path)
    names = time_columns(file)
    if not names:
        raise RecordingError(path, "no time column (time_s: seconds from the recording's start)")
    columns = [name for name in file.numbers if name not in names]
    times, is_date, zoned = read_times(file, names, hours=True)
    give = "give time_s, seconds from its start"
    if is_date and start_time is None:
        raise RecordingError(path, f"has dates or clock times, but the recording has none; {give}")
    if is_date and zoned != (start_time.tzinfo is not None):
        raise RecordingError(path, "has times of no time zone, and the recording's are in UTC, or "
                                   f"the other way round; {give}")
    if is_date:
        only_clock = start_time.year == 1970 or times[0] < 86400
        times = times - (start_time.replace(tzinfo=None) - EPOCH).total_seconds()
        times -= 86400 * np.round(times[0] / 86400) * only_clock
    return times, pd.concat(file.frames(columns), ignore_index=True), file.units
