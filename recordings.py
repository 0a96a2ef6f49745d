"""Read one recorded file of any format into channels with their rates and gaps.

    from recordings import find_recordings, read_recording
    for found in find_recordings(['records/']):
        recording = read_recording(found.path)
        recording.channels['ABP'].samples, recording.channels['ABP'].fs

Formats: WFDB (single- and multi-segment records; needs the wfdb package) and CSV with a header.
One reader function per format, chosen by the file's name in `reader_of`: a new format is a new
function there. What the monitor did not give is NaN and stays NaN, also in `resample`.
"""

import csv
import importlib
import os
import re
from array import array
from dataclasses import dataclass
from typing import Dict, List, NamedTuple, Optional

import numpy as np

# Names monitors and archives give to the two waveforms, best first. They are compared as
# `plain_name` makes them: lower case, letters and digits only, no device prefix, no unit.
CHANNEL_ALIASES = {
    "abp": ("abp", "art", "art1", "ibp", "ibp1", "aobp", "ao", "radial", "rad", "artrad", "radart",
            "abprad", "radabp", "artradial", "radialart", "art2", "fap", "fem", "bap", "uap",
            "arterialpressure", "arterialbloodpressure", "invasivebloodpressure"),
    "ppg": ("pleth", "ppg", "plethr", "plethl", "spo2wave", "spo2waveform", "spo2pleth",
            "plethspo2", "spo2ppg", "ppgfinger", "fingerppg", "plethysmogram",
            "photoplethysmogram"),
}
TIME_NAMES = ("times", "time", "t", "seconds", "sec", "timesec", "timeseconds")  # plain names
MISSING_CELLS = ("", "nan", "na", "n/a", "null", "none", "-", "--")
LONGEST_GAPS_S = 7 * 86400.0  # in one file; more is a slip in its times, not a recording
GAP_MARGIN_S = 1 / 60  # beside a gap: what a low-passed, continued signal is least sure of
SHORTEST_STRETCH_S = 0.25  # between two gaps; a shorter one holds no beat
BLOCK = 36000  # samples resampled at a time, to bound memory
INSTALL_LINE = "pip install -r requirements-extra.txt"


class RecordingError(ValueError):
    """Something is wrong with a recorded file, in one line.

    `what` names no file and no person; `detail` (a library's own words) may.
    """

    def __init__(self, path, what, detail=""):
        super().__init__(path, what, detail)  # all three are args, so that it can be pickled
        self.path, self.what, self.detail = path, what, " ".join(str(detail).split())

    def __str__(self):
        return f"{self.path}: {self.what}" + (f" ({self.detail})" if self.detail else "")


@dataclass
class Channel:
    samples: np.ndarray  # [n] float64, NaN where nothing was recorded; empty if only listed
    fs: float  # Hz
    unit: str
    start_s: float = 0.0  # time of samples[0] after the recording's start


@dataclass
class Recording:
    name: str
    channels: Dict[str, Channel]


class Found(NamedTuple):
    path: str
    typed: str  # what the user typed: `path` itself, or the folder that holds it


def find_recordings(inputs) -> List[Found]:
    """Recordings named by `inputs` (files, WFDB record names, folders), each folder's sorted.

    Headers that are the segments of a multi-segment record are part of that record.
    """
    found, seen = [], set()
    for typed in inputs:
        typed = os.fspath(typed)
        if os.path.isdir(typed):
            paths = _recordings_in(typed)
            if not paths:
                raise RecordingError(typed, "no WFDB header (.hea) and no .csv file in this folder")
        else:
            path = typed[:-4] + ".hea" if typed.lower().endswith(".dat") else typed
            if not os.path.isfile(path) and os.path.isfile(typed + ".hea"):
                path = typed + ".hea"
            if not os.path.isfile(path):
                raise RecordingError(typed, "no such file, WFDB record or folder")
            reader_of(path)  # an ending that no reader takes is an error here and now
            paths = [path]
        for path in paths:
            identity = os.path.realpath(path)
            if identity not in seen:
                seen.add(identity)
                found.append(Found(path, typed))
    return found


def _recordings_in(folder):
    paths = []
    for parent, folders, files in os.walk(folder):
        folders.sort()
        segments = set()
        for file in files:
            if file.lower().endswith(".hea"):
                try:
                    segments.update(_read_header(os.path.join(parent, file)).segments)
                except RecordingError:
                    continue  # it stays in the list; reading it will say what is wrong
        paths += [
            os.path.join(parent, file)
            for file in sorted(files)
            if os.path.splitext(file)[1].lower() in (".hea", ".csv")
            and not file.startswith(".")
            and not file.endswith("_problems.csv")  # prepare.py's own
            and file[:-4] not in segments
        ]
    return paths


def recording_name(path):
    """The file's name without folder and ending: the record's name."""
    return os.path.splitext(os.path.basename(path))[0]


def plain_name(name):
    """'SNUADC/ART' -> 'art', 'abp_mmhg' -> 'abp', 'Pleth [NU]' -> 'pleth'."""
    name = re.sub(r"[\[(].*?[\])]", "", name.rsplit("/", 1)[-1].lower())
    name = re.sub(r"[^a-z0-9]", "", name)
    return name[:-4] if name.endswith("mmhg") else name


def choose_channel(names, kind, wanted=None) -> Optional[str]:
    """The name in `names` that holds `kind` ('abp' or 'ppg'); None if there is none.

    `wanted` overrides the aliases: that exact name or, failing that, the same in another case.
    """
    if wanted is not None:
        alike = [name for name in names if name.lower() == wanted.lower()]
        return wanted if wanted in names else alike[0] if alike else None
    for alias in CHANNEL_ALIASES[kind]:
        for name in names:
            if plain_name(name) == alias:
                return name
    return None


def reader_of(path):
    """The function that reads this file: `reader(path, wanted, csv_rate) -> {name: Channel}`.

    `wanted(names)` returns those of the names whose samples are to be read.
    """
    ending = os.path.splitext(path)[1].lower()
    if ending == ".hea":
        return _read_wfdb
    if ending == ".csv":
        return _read_csv
    raise RecordingError(path, "neither a WFDB header (.hea) nor a .csv file")


def check_readers(paths):
    """Raise now if a package that one of these files needs is missing."""
    wfdb_paths = [path for path in paths if reader_of(path) is _read_wfdb]
    if wfdb_paths:
        _import_reader("wfdb", wfdb_paths[0])


def list_channels(path, csv_rate=None):
    """{name: Channel without samples} of a recording."""
    return reader_of(path)(path, lambda names: [], csv_rate)


def read_recording(path, wanted=None, csv_rate=None) -> Recording:
    """Read a recording; `wanted(names)` chooses the channels to read (default: all of them).

    `csv_rate` (Hz) says that the rows of a CSV are evenly spaced; its time column is then not used.
    """
    channels = reader_of(path)(path, wanted or list, csv_rate)
    return Recording(recording_name(path), {n: c for n, c in channels.items() if c.samples.size})


def resample(channel, fs_out, n_out):
    """[n_out] float32: the channel at k / fs_out seconds after the recording's start; gaps are NaN.

    Any ratio of rates, without drift: an integer oversampling (to at least 4 x fs_out) with a
    linear-phase low-pass, then a cubic spline at the very times. The low-pass is flat up to 0.8 of
    the lower Nyquist frequency and closed (80 dB) at it. Every stretch between gaps is treated
    alone, continued beyond its ends by odd reflection, and gives up GAP_MARGIN_S beside each gap;
    a stretch shorter than SHORTEST_STRETCH_S is dropped.
    """
    from scipy import ndimage, signal

    out = np.full(n_out, np.nan, dtype=np.float32)
    fs, samples = channel.fs, channel.samples
    known = np.flatnonzero(np.diff(np.concatenate(([0], np.isfinite(samples), [0]))))
    up = int(np.ceil(4 * fs_out / fs))
    nyquist = min(fs, fs_out) / 2
    n_taps, beta = signal.kaiserord(80, 0.2 * nyquist / (fs * up / 2))
    half = n_taps // 2 + 1
    taps = signal.firwin(2 * half + 1, 0.9 * nyquist, window=("kaiser", beta), fs=fs * up)
    same_grid = fs == fs_out and float(channel.start_s * fs).is_integer()
    pad = half // up + 4  # samples: the filter's half-length and a little for the spline
    for first, end in known.reshape(-1, 2):
        if (end - first) / fs < SHORTEST_STRETCH_S:
            continue
        # A sample stands for half a period on either side.
        start_s = channel.start_s + (first - 0.5) / fs + (GAP_MARGIN_S if first else 0)
        end_s = channel.start_s + (end - 0.5) / fs - (GAP_MARGIN_S if end < samples.size else 0)
        k_start = max(0, int(np.ceil(start_s * fs_out - 1e-6)))
        k_end = min(n_out, int(np.ceil(end_s * fs_out - 1e-6)))
        for k in range(k_start, k_end, BLOCK):
            times = np.arange(k, min(k + BLOCK, k_end)) / fs_out - channel.start_s
            at = times * fs  # in samples of the channel
            if same_grid:
                out[k:k + at.size] = samples[np.rint(at).astype(np.int64)]
                continue
            left = max(first, int(at[0]) - 2 * pad)
            right = min(end, int(at[-1]) + 2 * pad + 1)
            padded = np.pad(samples[left:right], pad, mode="reflect", reflect_type="odd")
            fine = signal.upfirdn(up * taps, padded, up)[half:]  # zero phase
            at = (at - left + pad) * up
            out[k:k + at.size] = ndimage.map_coordinates(fine, [at], order=3, mode="mirror")
    return out


def _import_reader(package, path):
    try:
        return importlib.import_module(package)
    except ModuleNotFoundError as error:
        what = f"reading it needs the package {error.name}: {INSTALL_LINE}"
        raise RecordingError(path, what) from None


# ---------------------------------------------------------------------------------------------
# WFDB


# Bytes per sample of each storage format (https://www.physionet.org/physiotools/wag/signal-5.htm);
# 0 is no file at all; FLAC (508, 516, 524) packs a constant block of 4096 samples in a few bytes.
WFDB_BYTES = {"0": 0, "8": 1, "16": 2, "24": 3, "32": 4, "61": 2, "80": 1, "160": 2, "212": 1.5,
              "310": 4 / 3, "311": 4 / 3, "508": 1 / 4096, "516": 1 / 4096, "524": 1 / 4096}


class _Header(NamedTuple):
    data_files: List[str]
    segments: List[str]
    n_bytes: float  # that the data files must have at least; 0 if not told


def _read_header(path):
    """The files that a header names, checked: nothing but plain names in the header's own folder.

    wfdb opens what a header names, wherever it lies, and takes what it cannot parse for absent; so
    this is read before wfdb sees it. https://www.physionet.org/physiotools/wag/header-5.htm
    """
    try:
        with open(path, encoding="ascii", errors="replace") as file:
            text = file.read(1 << 24)  # 16 MB of header is a multi-segment record of years
    except OSError as error:
        raise RecordingError(path, f"cannot be read: {error.strerror}") from None
    lines = [line.split("#")[0].split() for line in text.splitlines()]
    lines = [fields for fields in lines if fields]
    if not lines or len(lines[0]) < 2:
        raise RecordingError(path, "not a WFDB header: no record line")
    record_line, others = lines[0], lines[1:]
    for fields in others:
        if fields[0] in (".", "..") or re.search(r"[/\\:\x00]", fields[0]):
            raise RecordingError(path, "this WFDB header names a data file outside its own folder")
    files = [fields[0] for fields in others if fields[0] != "~"]
    try:
        fs = float(record_line[2].split("/")[0].split("(")[0]) if len(record_line) > 2 else 250.0
        frames = int(record_line[3]) if len(record_line) > 3 else 0
        n_lines = int((record_line[0].split("/") + record_line[1:])[1])  # segments or signals
        if not 0 < fs < 1e6 or frames < 0 or n_lines != len(others):
            raise ValueError
        if "/" in record_line[0]:
            gaps_s = sum(int(fields[1]) for fields in others if fields[0] == "~") / fs
        else:
            formats = [re.match(r"(\d+)(?:x(\d+))?", fields[1]).groups() for fields in others]
            per_frame = sum(WFDB_BYTES[name] * int(count or 1) for name, count in formats)
    except (ValueError, IndexError, KeyError, AttributeError):
        raise RecordingError(
            path, "not a WFDB header: unreadable number of signals, frequency, length or format"
        ) from None
    if "/" not in record_line[0]:
        return _Header(files, [], frames * per_frame)
    if gaps_s > LONGEST_GAPS_S:
        raise RecordingError(path, f"gaps of {gaps_s / 86400:.3g} days together")
    return _Header([], files, 0)


def _check_wfdb_files(path):
    """Raise unless every file that this record needs is there and about as long as promised."""
    folder, header = os.path.dirname(path), _read_header(path)
    for segment in header.segments:
        segment_path = os.path.join(folder, segment + ".hea")
        if not os.path.isfile(segment_path):
            raise RecordingError(path, "the header of one of its segments is missing", segment)
        if _read_header(segment_path).segments:
            raise RecordingError(path, "a segment of a multi-segment record has segments itself")
        _check_wfdb_files(segment_path)
    files = [os.path.join(folder, name) for name in set(header.data_files)]
    for file in files:
        if not os.path.isfile(file):
            raise RecordingError(path, "its data file is missing", os.path.basename(file))
    # wfdb allocates what the header promises.
    if files and int(header.n_bytes) > sum(map(os.path.getsize, files)):
        raise RecordingError(path, "its data file is shorter than its header promises")


def _read_wfdb(path, wanted, csv_rate):
    wfdb = _import_reader("wfdb", path)
    _check_wfdb_files(path)
    folder = os.path.dirname(os.path.abspath(path))  # absolute, no pn_dir: never from the network
    try:
        record = wfdb.rdheader(os.path.join(folder, recording_name(path)))
        # [(name, frames)]; a single-segment record is its own only segment
        segments = [(recording_name(path), record.sig_len)]
        if isinstance(record, wfdb.MultiRecord):
            segments = list(zip(record.seg_name, record.seg_len))
        # The first that is not a gap; in a variable-layout record it has all signals and no samples
        first = next((name for name, _ in segments if name != "~"), None)
        layout = wfdb.rdheader(os.path.join(folder, str(first)))
        names = _unique(layout.sig_name or [])
        channels = {
            name: Channel(np.empty(0), float(layout.fs * per_frame), unit or "")
            for name, per_frame, unit in zip(names, layout.samps_per_frame, layout.units)
        } if names else {}
        chosen = {name: [] for name in wanted(names)}
        if chosen:
            for segment, n_frames in segments:
                _read_wfdb_segment(wfdb, path, folder, segment, n_frames, layout, chosen)
    except RecordingError:
        raise
    except OSError as error:
        raise RecordingError(path, "cannot be read", error.strerror or error) from None
    except Exception as error:  # noqa: BLE001 - wfdb raises a dozen kinds for malformed files
        raise RecordingError(
            path, f"wfdb cannot read this record ({type(error).__name__})", error
        ) from None
    if not channels:
        raise RecordingError(path, "this WFDB record has no signals")
    for name, pieces in chosen.items():
        channels[name].samples = np.concatenate(pieces) if len(pieces) > 1 else pieces[0]
    return channels


def _read_wfdb_segment(wfdb, path, folder, segment, n_frames, layout, chosen):
    """Append a segment's samples (NaN where it lacks the signal) to the lists in `chosen`.

    Segments are joined here, because wfdb 4.3's own joining fails on gaps with several rates.
    """
    base, present, values = os.path.join(folder, segment), [], {}
    if segment != "~" and n_frames != 0:
        header = wfdb.rdheader(base)
        present = _unique(header.sig_name or [])
        read = [present.index(name) for name in chosen if name in present]
        if read:
            # smooth_frames=True, wfdb's default, would average the faster channels' samples away.
            signals = wfdb.rdrecord(base, channels=read, smooth_frames=False).e_p_signal
            values = {present[i]: np.asarray(x, np.float64) for i, x in zip(read, signals)}
    names = _unique(layout.sig_name)
    for name, pieces in chosen.items():
        per_frame = layout.samps_per_frame[names.index(name)]
        if name in values:
            if header.samps_per_frame[present.index(name)] * header.fs != per_frame * layout.fs:
                raise RecordingError(path, f"the sampling rate of {name} changes between segments")
            pieces.append(values[name])
        else:
            pieces.append(np.full((n_frames or 0) * per_frame, np.nan))


def _unique(names):
    """A second 'ABP' becomes 'ABP#2'."""
    return [
        name if name not in names[:i] else f"{name}#{names[:i].count(name) + 1}"
        for i, name in enumerate(names)
    ]


# ---------------------------------------------------------------------------------------------
# CSV


def _read_csv(path, wanted, csv_rate):
    """A header line; a time column in seconds or `csv_rate`; an empty or NaN cell is a gap.

    The csv module reads about a million rows per second and takes any cell; NumPy's readers are
    either slower by far (genfromtxt) or stop at an empty cell (loadtxt).
    """
    try:
        with open(path, encoding="utf-8-sig", errors="replace", newline="") as file:
            first_line = file.readline(1 << 16)
            delimiter = max(",;\t", key=first_line.count)
            cells = next(csv.reader([first_line], delimiter=delimiter), [])
            header = [cell.strip() for cell in cells]
            if not any(header) or all(_is_number(cell) for cell in header):
                raise RecordingError(path, "no header line with column names")
            names = _unique(header)
            time_column = None if csv_rate else _time_column(path, names)
            signals = [name for i, name in enumerate(names) if i != time_column and name]
            chosen = list(wanted(signals))
            columns = [names.index(name) for name in chosen]
            if time_column is not None:
                columns = [time_column] + columns
            values = _read_columns(path, csv.reader(file, delimiter=delimiter), names, columns)
    except OSError as error:
        raise RecordingError(path, f"cannot be read: {error.strerror}") from None
    except csv.Error as error:
        raise RecordingError(path, f"not a readable CSV file: {error}") from None
    if time_column is None:
        fs = float(csv_rate)
    else:
        fs, positions = _time_grid(path, values.pop(0))
        values = [_place(column, positions) for column in values]
    samples = dict(zip(chosen, values))
    return {name: Channel(samples.get(name, np.empty(0)), fs, _unit(name)) for name in signals}


def _time_column(path, names):
    for alias in TIME_NAMES:
        for i, name in enumerate(names):
            if plain_name(name) == alias:
                return i
    raise RecordingError(
        path, "no time column (time_s, time or t, in seconds); give the sampling rate: --csv-rate"
    )


def _unit(name):
    """The unit in a column's name: 'abp_mmhg', 'ABP [mmHg]', 'pressure (kPa)'."""
    if name.lower().endswith("mmhg"):
        return "mmHg"
    match = re.search(r"[\[(](.*?)[\])]\s*$", name)
    return match.group(1) if match else ""


def _read_columns(path, rows, names, columns):
    """[float64 array per column]; a row's missing cells are NaN."""
    values = [array("d") for _ in columns]
    filled = list(zip(columns, [column.append for column in values]))
    for row in rows:
        if not row:
            continue
        for i, append in filled:
            try:
                append(float(row[i]))
            except (ValueError, IndexError):
                cell = row[i].strip().lower() if i < len(row) else ""
                if cell not in MISSING_CELLS:
                    raise RecordingError(
                        path, f"line {rows.line_num + 1}, column {names[i]}: expected a number",
                        repr(row[i][:40]),
                    ) from None
                append(np.nan)
    arrays = [np.array(column) for column in values]
    if columns and not arrays[0].size:
        raise RecordingError(path, "no rows below the header")
    for column in arrays:
        column[np.isinf(column)] = np.nan
    return arrays


def _time_grid(path, times):
    """(fs, index of every row on an even grid from the first row on) of a time column.

    Stamps are often rounded to a millisecond, so the rate is the mean over all steps that are no
    jumps; a row's place within a stretch is counted, and stretches are placed by their stamps.
    """
    if not np.isfinite(times).all():
        line = int(np.flatnonzero(~np.isfinite(times))[0]) + 2
        raise RecordingError(path, f"line {line}: no time; give the sampling rate: --csv-rate")
    if times.size < 2:
        raise RecordingError(path, "fewer than two rows")
    steps = np.diff(times)
    if (steps <= 0).any():
        line = int(np.flatnonzero(steps <= 0)[0]) + 3
        raise RecordingError(
            path, f"line {line}: time does not increase; if the rows are evenly spaced: --csv-rate"
        )
    step = np.median(steps)
    jumps = steps > 1.5 * step
    gaps_s = float(steps[jumps].sum())
    if gaps_s > LONGEST_GAPS_S:
        raise RecordingError(
            path, f"jumps in time of {gaps_s / 86400:.3g} days together; is time in seconds?"
        )
    period = steps[~jumps].mean()
    starts = np.concatenate(([0], np.flatnonzero(jumps) + 1))  # first row of every stretch
    lengths = np.diff(np.append(starts, times.size))
    places = np.rint((times[starts] - times[0]) / period).astype(np.int64)
    positions = np.repeat(places - starts, lengths) + np.arange(times.size)
    late = np.abs(positions * period - (times - times[0])) / period
    if (np.diff(positions) <= 0).any() or late.max() > 2:
        raise RecordingError(
            path,
            f"line {int(late.argmax()) + 2}: time is not evenly spaced "
            f"({late.max():.1f} samples off); if the rows are: --csv-rate",
        )
    return float(f"{1 / period:.10g}"), positions


def _place(values, positions):
    grid = np.full(positions[-1] + 1, np.nan)
    grid[positions] = values
    return grid


def _is_number(cell):
    try:
        float(cell)
    except ValueError:
        return False
    return True
