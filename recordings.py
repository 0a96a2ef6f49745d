"""Read one recorded file of any format into channels with their rates and gaps.

    from recordings import find_recordings, read_recording
    for found in find_recordings(['records/']):
        recording = read_recording(found.path)
        recording.channels['ABP'].samples, recording.channels['ABP'].fs
    recording, ended = Windows(path).read(0, 600)       # days of it, ten minutes at a time

Formats: WFDB (records of one or many segments), VitalDB (.vital), EDF and EDF+ (also with gaps),
CSV, Parquet and HDF5 with plain waveforms. `READERS`, at the end, has a function for each ending
and the package that it needs; a new format is one more line there. What the monitor did not give is
NaN and stays NaN, also in `resample`. Files are not trusted: nothing outside a record's own folder
is opened, and nothing larger than a file of its size can hold is allocated.
"""

import contextlib
import csv
import gzip
import importlib
import io
import os
import re
import zlib
from array import array
from dataclasses import dataclass, replace
from typing import Dict, List, NamedTuple, Optional

import numpy as np

# Names monitors and archives give to waveforms and numerics, best first. They are compared as
# `plain_name` makes them: lower case, letters and digits only, no device prefix, no unit. Sources:
# the signals of MIMIC-III and -IV (physionet.org), VitalDB's track list (vitaldb.net/dataset), the
# pressure labels of Philips IntelliVue (Data Export manual; ABP, ART, Ao, FAP, BAP, UAP), GE's
# numbered ones (ART1, AR1), IEEE 11073 codes (MDC_PRESS_BLD_ART_ABP; NOM_... in Philips' exports).
# P1 to P4 are absent on purpose: a monitor calls any unlabelled pressure so, a venous one as well.
ARTERIAL = ("abp", "art", "artabp", "art1", "ar1", "ibp", "ibp1", "aobp", "ao", "aort", "radial",
            "rad", "artrad", "radart", "abprad", "radabp", "artradial", "radialart", "art2", "ar2",
            "fap", "fem", "bap", "uap", "artumb", "arterialpressure", "arterialbloodpressure",
            "invasivebloodpressure")
CUFF = ("nbp", "nibp", "noninv")  # looked for after the arterial line


def _numerics(endings, names):
    arterial, cuff = ([site + ending for site in sites for ending in endings]
                      for sites in (ARTERIAL, CUFF))
    return (*arterial, *names, *cuff)


CHANNEL_ALIASES = {
    "abp": ARTERIAL,
    "ppg": ("pleth", "ppg", "plethr", "plethl", "plethwave", "spo2wave", "spo2waveform",
            "spo2pleth", "plethspo2", "spo2ppg", "ppgfinger", "fingerppg", "plethysmogram",
            "photoplethysmogram"),
    "map": _numerics(("mean", "m", "mbp", "map"), ("map", "mbp", "mabp", "meanbp")),
    "sbp": _numerics(("sys", "s", "sbp", "systolic"), ("sbp", "sys", "systolic", "systolicbp")),
    "dbp": _numerics(("dias", "dia", "d", "dbp", "diastolic"),
                     ("dbp", "dias", "dia", "diastolic", "diastolicbp")),
    "hr": ("hr", "heartrate", "ecghr", "hrecg", "ecgcardbeatrate", "pulse", "pulserate", "pr",
           "abphr", "arthr", "plethhr", "plethpulserate", "spo2hr", "spo2pr"),
}
MMHG_PER_UNIT = {"mmhg": 1.0, "kpa": 7.50062}
TIME_NAMES = ("times", "time", "t", "seconds", "sec", "timesec", "timeseconds")  # plain names
MISSING_CELLS = ("", "nan", "na", "n/a", "null", "none", "-", "--")
LONGEST_GAPS_S = 7 * 86400.0  # in one file; more is a slip in its times, not a recording
JITTER_S = 0.01  # by which a block's time stamp may be off: no gap
GAP_MARGIN_S = 1 / 60  # beside a gap: what a low-passed, continued signal is least sure of
SHORTEST_STRETCH_S = 0.25  # between two gaps; a shorter one holds no beat
# Beyond both ends of a window, with which `resample` gives the window what it gives the whole
# recording (to float32): over its filter's half-length, 0.65 s at 40 Hz, and its spline's.
WINDOW_MARGIN_S = 2.0
TABLE_BYTES, TABLE_ROWS = 1 << 22, 1 << 16  # of a table, read at a time
NUMERICS_FS = 1.0  # Hz: of a .vital file's numbers, which come when the monitor has a new one
BLOCK = 36000  # samples resampled at a time, to bound memory
# The samples that a file may promise per channel: 2**25 (256 MB, 3 days at 125 Hz, gaps included),
# and 32 for each of its bytes (8 bits compressed 32-fold).
FREE_SAMPLES, SAMPLES_PER_BYTE = 1 << 25, 32
MOST_OBJECTS = 10000  # looked at in an HDF5 file
INSTALL_LINE = "pip install -r requirements-extra.txt"


class RecordingError(ValueError):
    """Something is wrong with a recorded file, in one line.

    `what` names no file and no person; `detail` (a library's own words) may.
    """

    def __init__(self, path, what, detail=""):
        super().__init__(path, what, detail)  # all three are args, so that it can be pickled
        self.path, self.what, self.detail = path, what, _printable(detail)

    def __str__(self):
        return f"{self.path}: {self.what}" + (f" ({self.detail})" if self.detail else "")


@dataclass
class Channel:
    samples: np.ndarray  # [n] float64, NaN where nothing was recorded; empty if only listed
    fs: float  # Hz; NaN if only listed and not known
    unit: str
    start_s: float = 0.0  # time of samples[0] after the recording's start
    end_s: float = np.nan  # where the whole channel ends, if only a span of it was read


@dataclass
class Recording:
    name: str
    channels: Dict[str, Channel]


class Found(NamedTuple):
    path: str
    typed: str  # what the user typed: `path` itself, or the folder or list that holds it


def find_recordings(inputs) -> List[Found]:
    """Recordings named by `inputs`: files, WFDB record names, folders, lists (RECORDS files).

    A folder is walked, with all folders in it, in sorted order. The lines of a list name records
    or folders beside it. Not recordings of their own: segments of a WFDB record, and the numerics
    that MIMIC keeps beside a waveform record.
    """
    found = {}
    for typed in map(os.fspath, inputs):
        if os.path.isdir(typed):
            paths = _recordings_in(typed)
            if not paths:
                raise RecordingError(typed, f"no recording in this folder ({', '.join(READERS)})")
        elif os.path.basename(typed).startswith("RECORDS") and os.path.isfile(typed):
            paths = _listed_in(typed)
        else:
            path = typed[:-4] + ".hea" if typed.lower().endswith(".dat") else typed
            path = path if os.path.isfile(path) else typed + ".hea"
            if not os.path.isfile(path):
                raise RecordingError(typed, "no such file, WFDB record or folder")
            reader_of(path)  # an ending that no reader takes is an error here and now
            paths = [path]
        for path in paths:
            found.setdefault(os.path.realpath(path), Found(path, typed))
    return list(found.values())


def _recordings_in(folder):
    paths = []
    for parent, folders, files in os.walk(folder):
        folders.sort()
        paths += [os.path.join(parent, file) for file in sorted(files)
                  if os.path.splitext(file)[1].lower() in READERS and not file.startswith(".")
                  and not file.endswith("_problems.csv")]  # prepare.py's own
    return [path for path in _whole_records(paths) if not _is_prepared(path)]


def _listed_in(path):
    """The recordings that a list names, like MIMIC's RECORDS: a record or folder in each line."""
    paths = []
    with open(path, encoding="utf-8", errors="replace") as file:
        for number, entry in enumerate(map(str.strip, file), 1):
            if os.path.isabs(entry) or re.search(r"(^|[/\\])\.\.([/\\]|$)|[:\x00]", entry):
                raise RecordingError(
                    path, f"line {number} names a record outside the list's folder")
            target = os.path.join(os.path.dirname(path), entry)
            if entry and os.path.isdir(target):
                paths += _recordings_in(target)
            elif entry:
                known = os.path.splitext(entry)[1].lower() in READERS
                paths.append(target if known else target + ".hea")
    if not paths:
        raise RecordingError(path, "this list names no recording")
    return _whole_records(paths)


def _whole_records(paths):
    """`paths` without the WFDB headers that are parts of others among them."""
    headers, parts = {}, set()
    for path in paths:
        if path.lower().endswith(".hea"):
            with contextlib.suppress(RecordingError, OSError):  # reading it will say what is wrong
                headers[path] = _read_header(path)
    for path, header in headers.items():
        folder = os.path.dirname(path)
        parts.update(os.path.join(folder, name + ".hea") for name, _ in header.segments)
        # 3000003n holds the numbers (at most one a second) beside the waveforms of 3000003.
        if path[-5] == "n" and path[:-5] + ".hea" in headers and header.fs < 1.5:
            parts.add(path)
    return [path for path in paths if path not in parts]


def _is_prepared(path):
    """An HDF5 file that prepare.py or simulate.py made."""
    if os.path.splitext(path)[1].lower() not in (".h5", ".hdf5"):
        return False
    import h5py

    with contextlib.suppress(OSError, RuntimeError), h5py.File(path, "r") as file:
        return "layout_version" in file.attrs
    return False


def recording_name(path):
    """The file's name without folder and ending: the record's name."""
    return os.path.splitext(os.path.basename(path))[0]


def plain_name(name):
    """'SNUADC/ART' -> 'art', 'abp_mmhg' -> 'abp', 'Pleth [NU]' -> 'pleth', 'ABP Mean' -> 'abpmean',
    'NOM_PRESS_BLD_ART_ABP' -> 'artabp'."""
    name = re.sub(r"[\[(].*?[\])]", "", name.rsplit("/", 1)[-1].lower())
    name = re.sub(r"[^a-z0-9]", "", name)
    name = re.sub(r"^(nls)?(nom|mdc)(pressbld|pulsoxim)?", "", name)
    return name[:-4] if name.endswith("mmhg") else name


def choose_channel(names, kind, wanted=None) -> Optional[str]:
    """The name in `names` that holds `kind`, a key of CHANNEL_ALIASES; None if there is none.

    `wanted` overrides the aliases: that exact name or, failing that, the same in another case.
    """
    if wanted is not None:
        alike = [name for name in names if name.lower() == wanted.lower()]
        return wanted if wanted in names else alike[0] if alike else None
    plain = {}
    for name in names:
        plain.setdefault(plain_name(name), name)
    return next((plain[alias] for alias in CHANNEL_ALIASES[kind] if alias in plain), None)


def reader_of(path):
    """(package, function) for this file. The function, called with a Windows and (start, stop in s;
    None: the whole recording), returns {name: Channel}, with samples where `Windows.wanted(names)`
    returned the name."""
    try:
        return READERS[os.path.splitext(path)[1].lower()]
    except KeyError:
        raise RecordingError(path, f"not a recording ({', '.join(READERS)})") from None


def check_readers(paths):
    """Raise now if a package that one of these files needs is missing."""
    for package, path in {reader_of(path)[0]: path for path in paths}.items():
        try:
            importlib.import_module(package)
        except ModuleNotFoundError as error:
            what = f"reading it needs the package {error.name}: {INSTALL_LINE}"
            raise RecordingError(path, what) from None


def list_channels(path, csv_rate=None, hdf5=None):
    """{name: Channel without samples} of a recording."""
    return Windows(path, lambda names: [], csv_rate, hdf5).channels(None)


def read_recording(path, wanted=None, csv_rate=None, hdf5=None) -> Recording:
    """Read a recording; `wanted(names)` chooses the channels to read (default: all of them).

    `csv_rate` (Hz) says that the rows of a CSV or Parquet file are evenly spaced; its time column
    is then not used. `hdf5` = {'abp': dataset, 'ppg': dataset, 'fs': Hz}, each may be None, says
    where an HDF5 file holds the waveforms, which are then its channels ABP and PPG, and their rate.
    Without it, all one-dimensional datasets are channels, with their rate in the attribute fs or
    sampling_rate.
    """
    return _recording(path, Windows(path, wanted, csv_rate, hdf5).channels(None))


def _recording(path, channels):
    channels = {name: channel for name, channel in channels.items() if channel.samples.size}
    for channel in channels.values():
        channel.samples[np.isinf(channel.samples)] = np.nan
        if not 0 <= channel.start_s <= LONGEST_GAPS_S:
            raise RecordingError(path, "a channel starts more than a week from the recording")
    return Recording(recording_name(path), channels)


def mmhg_per_unit(unit):
    """What to multiply a pressure with; 1 where the unit is none (WFDB's default is mV)."""
    return MMHG_PER_UNIT.get(unit.lower(), 1.0)


class Windows:
    """A recording in windows one after another, so that days of it take the memory of minutes.

    Arguments as for `read_recording`. WFDB, EDF and HDF5 are read where the window lies, tables
    (CSV, Parquet) row by row; .vital files, which are compressed as a whole, at once. growing: the
    file (CSV, or WFDB of format 16) is still being written; what it holds now is read.
    """

    def __init__(self, path, wanted=None, csv_rate=None, hdf5=None, growing=False):
        self.path, self.wanted, self.growing = path, wanted or list, growing
        self.csv_rate, self.hdf5 = csv_rate, hdf5
        self.kept = None  # what the file's reader keeps from one window to the next
        if growing and os.path.splitext(path)[1].lower() not in GROWING:
            raise RecordingError(path, f"a growing file is read as {' or '.join(GROWING)} alone; "
                                       "for whole files, name their folder")

    def read(self, start_s, stop_s):
        """(Recording of start_s <= t < stop_s, whether the file ends there); start_s must not be
        less than in the call before."""
        channels = self.channels((start_s, stop_s))
        ends_s = [channel.end_s for channel in channels.values() if not np.isnan(channel.end_s)]
        return _recording(self.path, channels), max(ends_s, default=0.0) <= stop_s

    def channels(self, span):
        """{name: Channel} of a span (start, stop in s) or the whole (None); those that are not
        wanted without samples. Whatever goes wrong in a package becomes a RecordingError."""
        check_readers([self.path])
        package, reader = reader_of(self.path)
        try:
            channels = reader(self, span)
        except RecordingError:
            raise
        except OSError as error:
            raise RecordingError(self.path, "cannot be read", error.strerror or error) from None
        except Exception as error:  # noqa: BLE001 - packages raise a dozen kinds for malformed files
            what = f"{package} cannot read this file ({type(error).__name__})"
            raise RecordingError(self.path, what, error) from None
        for channel in channels.values():
            channel.unit = _printable(channel.unit)
        return {_printable(name): channel for name, channel in channels.items()}


def _span(span, fs, n, start_s=0.0):
    """(first, end): the samples, of n from start_s on, in span (start, stop in s; None: all)."""
    if span is None:
        return 0, n
    return tuple(int(np.clip(np.ceil((t - start_s) * fs - 1e-6), 0, n)) for t in span)


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
            fine = (signal.oaconvolve(padded, taps) if up == 1 else  # by FFT: many taps
                    signal.upfirdn(up * taps, padded, up))[half:]  # zero phase
            at = (at - left + pad) * up
            out[k:k + at.size] = ndimage.map_coordinates(fine, [at], order=3, mode="mirror")
    return out


def _printable(text):
    """In one line, without what a terminal would take for a command."""
    return "".join(c if c.isprintable() else "?" for c in " ".join(str(text).split()))


def _check_size(path, n_samples, n_bytes):
    """Raise if a file of n_bytes cannot hold n_samples, before memory is taken for them."""
    if n_samples > FREE_SAMPLES + SAMPLES_PER_BYTE * n_bytes:
        raise RecordingError(
            path, f"promises {n_samples:,} samples, more than a file of its size can hold")


def _unique(names):
    """A second 'ABP' becomes 'ABP#2'."""
    return [
        name if name not in names[:i] else f"{name}#{names[:i].count(name) + 1}"
        for i, name in enumerate(names)
    ]


def _positions(path, starts_s, lengths, period, slack_s):
    """(samples/s, position of every block on a grid of them, seconds that it is off its stamp).

    Time stamps are rounded and jitter, clocks drift: blocks that follow one another (to slack_s)
    are counted, their mean over all gives the true period, and only the first block after a gap is
    placed by its stamp.
    """
    before = np.cumsum(lengths) - lengths
    steps = np.diff(starts_s)
    jumps = steps - lengths[:-1] * period > slack_s
    gaps_s = float(steps[jumps].sum())
    if gaps_s > LONGEST_GAPS_S:
        raise RecordingError(
            path, f"jumps in time of {gaps_s / 86400:.3g} days together; is time in seconds?")
    if not jumps.all():
        measured = steps[~jumps].sum() / lengths[:-1][~jumps].sum()
        late = abs(measured / period - 1) * (before[-1] + lengths[-1])  # samples, at the end
        if late > 0.1 and measured > period / 2:
            period = measured
    first = np.concatenate(([0], np.flatnonzero(jumps) + 1))  # of every run
    places = np.rint((starts_s[first] - starts_s[0]) / period).astype(np.int64)
    positions = np.repeat(places - before[first], np.diff(np.append(first, starts_s.size))) + before
    late_s = np.abs(positions * period - (starts_s - starts_s[0]))
    return float(f"{1 / period:.10g}"), positions, late_s


def _join(path, starts_s, blocks, fs):
    """(samples, fs): blocks of samples, nominally at fs, at their times; NaN between them."""
    lengths = np.array([len(block) for block in blocks])
    order = np.argsort(starts_s, kind="stable")
    starts_s, lengths = np.asarray(starts_s, np.float64)[order], lengths[order]
    if not np.isfinite(starts_s).all():
        raise RecordingError(path, "a time stamp is not a number")
    measured, positions, late_s = _positions(path, starts_s, lengths, 1 / fs,
                                             max(JITTER_S, 1.5 / fs))
    if abs(fs / measured - 1) > 1e-3 or late_s.max() > 2 * JITTER_S + 2 / fs:
        measured = fs  # an unsteady clock: each block by its own stamp
        positions = np.rint((starts_s - starts_s[0]) * fs).astype(np.int64)
    n = int((positions + lengths).max())
    _check_size(path, n, os.path.getsize(path))
    samples = np.full(n, np.nan)
    for position, i in zip(positions, order):
        samples[position:position + len(blocks[i])] = blocks[i]
    return samples, measured


# --------------------------------------------------------------------------------------------- WFDB

# Bytes per sample of each storage format (https://www.physionet.org/physiotools/wag/signal-5.htm);
# 0 is no file at all; FLAC (508, 516, 524) packs a constant block of 4096 samples in a few bytes.
WFDB_BYTES = {"0": 0, "8": 1, "16": 2, "24": 3, "32": 4, "61": 2, "80": 1, "160": 2, "212": 1.5,
              "310": 4 / 3, "311": 4 / 3, "508": 1 / 4096, "516": 1 / 4096, "524": 1 / 4096}


class _Header(NamedTuple):
    fs: float  # Hz, of the frames
    data_files: List[str]
    segments: List[tuple]  # (name, frames)
    frames: int
    n_samples: int  # of all signals; 0 where there are segments
    n_bytes: float  # that the data files must have at least


def _read_header(path):
    """The files that a header names, checked: nothing but plain names in the header's own folder.

    wfdb opens what a header names, wherever it lies, and takes what it cannot parse for absent; so
    this is read before wfdb sees it. https://www.physionet.org/physiotools/wag/header-5.htm
    """
    with open(path, encoding="ascii", errors="replace") as file:
        text = file.read(1 << 24)  # 16 MB of header is a multi-segment record of years
    lines = [line.split("#")[0].split() for line in text.splitlines()]
    record_line, *others = [fields for fields in lines if fields] or [[]]
    if len(record_line) < 2:
        raise RecordingError(path, "not a WFDB header: no record line")
    if any(fields[0] in (".", "..") or re.search(r"[/\\:\x00]", fields[0]) for fields in others):
        raise RecordingError(path, "this WFDB header names a data file outside its own folder")
    per_frame = n_bytes = 0
    try:
        fs = float(record_line[2].split("/")[0].split("(")[0]) if len(record_line) > 2 else 250.0
        frames = int(record_line[3]) if len(record_line) > 3 else 0
        n_lines = int((record_line[0].split("/") + record_line[1:])[1])  # segments or signals
        if not 0 < fs < 1e6 or frames < 0 or n_lines != len(others):
            raise ValueError
        if "/" in record_line[0]:
            segments = [(fields[0], max(0, int(fields[1]))) for fields in others]
            return _Header(fs, [], segments, frames, 0, 0)
        for fields in others:
            name, count = re.match(r"(\d+)(?:x(\d+))?", fields[1]).groups()
            per_frame += int(count or 1)
            n_bytes += frames * int(count or 1) * WFDB_BYTES[name]
    except (ValueError, IndexError, KeyError, AttributeError):
        raise RecordingError(
            path, "not a WFDB header: unreadable number of signals, frequency, length or format"
        ) from None
    files = [fields[0] for fields in others if fields[0] != "~"]
    return _Header(fs, files, [], frames, frames * per_frame, n_bytes)


def _check_wfdb_files(path, header):
    """The bytes of the data files; raise unless all are there and as long as promised."""
    n_bytes = 0
    for name in sorted(set(header.data_files)):
        file = os.path.join(os.path.dirname(path), name)
        if not os.path.isfile(file):
            raise RecordingError(path, "its data file is missing", name)
        n_bytes += os.path.getsize(file)
    # wfdb allocates what the header promises.
    if header.data_files and int(header.n_bytes) > n_bytes:
        raise RecordingError(path, "its data file is shorter than its header promises")
    _check_size(path, header.n_samples, n_bytes)
    return n_bytes


def _read_wfdb(source, span):
    import wfdb

    path, header = source.path, _read_header(source.path)
    if header.segments:
        if source.growing:
            raise RecordingError(path, "a growing WFDB record cannot be one of segments")
        return _read_wfdb_segments(source, header, span)
    growing = source.growing or span is not None and not header.frames  # its length is not stated
    if not growing:
        _check_wfdb_files(path, header)
    base = os.path.abspath(path)[:-4]  # absolute, no pn_dir: never from the network
    record = wfdb.rdheader(base)
    if not record.sig_name:
        raise RecordingError(path, "this WFDB record has no signals")
    names = _unique(record.sig_name)
    channels = {
        name: Channel(np.empty(0), float(record.fs * per_frame), unit or "")
        for name, per_frame, unit in zip(names, record.samps_per_frame, record.units)
    }
    chosen = list(source.wanted(names))
    if growing:
        return _read_growing_wfdb(path, record, channels, chosen, span)
    first, end = _span(span, header.fs, header.frames)
    for channel in channels.values() if span else ():
        channel.start_s, channel.end_s = first / header.fs, header.frames / header.fs
    if chosen and (span is None or first < end):
        # smooth_frames=True, wfdb's default, would average the faster channels' samples away.
        with np.errstate(all="ignore"):  # a damaged gain: infinite samples are gaps
            record = wfdb.rdrecord(base, first, end if span else None, smooth_frames=False,
                                   channels=[names.index(name) for name in chosen])
        for name, samples in zip(chosen, record.e_p_signal):
            channels[name].samples = np.asarray(samples, np.float64)
    return channels


def _read_growing_wfdb(path, record, channels, chosen, span):
    """The samples that are there now, of format 16; wfdb reads what the header promises."""
    for name in chosen:
        i = list(channels).index(name)
        group = [k for k, file in enumerate(record.file_name) if file == record.file_name[i]]
        if record.fmt[i] != "16" or any(record.skew[k] for k in group):
            raise RecordingError(path, "a growing WFDB record must be of format 16, without skew")
        data = os.path.join(os.path.dirname(path), record.file_name[i])
        if not os.path.isfile(data):
            raise RecordingError(path, "its data file is missing", record.file_name[i])
        widths = [record.samps_per_frame[k] for k in group]
        offset, width = record.byte_offset[i] or 0, sum(widths)
        n = max(0, os.path.getsize(data) - offset) // (2 * width)
        first, end = _span(span, record.fs, n)
        channels[name].start_s, channels[name].end_s = first / record.fs, n / record.fs
        if first < end:
            raw = np.fromfile(data, "<i2", (end - first) * width, offset=offset + 2 * width * first)
            left = sum(widths[:group.index(i)])
            raw = raw.reshape(-1, width)[:, left:left + record.samps_per_frame[i]].ravel()
            channels[name].samples = np.where(
                raw == -32768, np.nan, (raw - float(record.baseline[i])) / record.adc_gain[i])
    return channels


def _read_wfdb_segments(source, header, span):
    """The segments joined, here, because wfdb 4.3's own joining fails on gaps with several rates.

    A gap's name is ~; one without frames is a layout, with the signals that any segment has.
    """
    path, n_bytes = source.path, 0
    paths = {name: os.path.join(os.path.dirname(path), name + ".hea")
             for name, _ in header.segments if name != "~"}
    for name, segment in paths.items():
        if not os.path.isfile(segment):
            raise RecordingError(path, "the header of one of its segments is missing", name)
        inner = _read_header(segment)
        if inner.segments:
            raise RecordingError(path, "a segment of this record has segments itself", name)
        n_bytes += _check_wfdb_files(segment, inner)
    if not paths:
        raise RecordingError(path, "this WFDB record has no signals")
    channels = _read_wfdb(Windows(next(iter(paths.values())), lambda names: []), None)
    chosen = {name: channels[name].fs / header.fs for name in source.wanted(list(channels))}
    n_frames = sum(frames for _, frames in header.segments)
    first, end = _span(span, header.fs, n_frames)
    for name, per_frame in chosen.items():
        _check_size(path, round(per_frame * n_frames), n_bytes)
        channels[name].samples = np.full(round(per_frame * (end - first)), np.nan)
        channels[name].start_s, channels[name].end_s = first / header.fs, n_frames / header.fs
    start = 0
    for segment, frames in header.segments if chosen else ():
        a, b = max(start, first), min(start + frames, end)
        if segment != "~" and a < b:
            # half a frame in: no rounding decides which frames these times mean
            part = span and ((a - start - 0.5) / header.fs, (b - start - 0.5) / header.fs)
            read = _read_wfdb(Windows(
                paths[segment], lambda names: [name for name in names if name in chosen]), part)
            for name in set(read).intersection(chosen):
                if read[name].fs != channels[name].fs:
                    raise RecordingError(path, "a channel's rate changes between segments", name)
                at = slice(round((a - first) * chosen[name]), round((b - first) * chosen[name]))
                if read[name].samples.size != at.stop - at.start:
                    raise RecordingError(
                        path, "a segment is not as long as the record's header says", segment)
                channels[name].samples[at] = read[name].samples
        start += frames
    return channels


# ------------------------------------------------------------------------------------------ VitalDB

def _read_vital(source, span):
    """The whole file at once, the first time (its windows in float32, to save memory)."""
    if span is None:
        return _read_whole_vital(source)
    if source.kept is None:
        source.kept = {
            name: replace(channel, samples=channel.samples.astype(np.float32))
            for name, channel in _read_whole_vital(source).items() if channel.samples.size}
    channels = {}
    for name, channel in source.kept.items():
        n = channel.samples.size
        first, end = _span(span, channel.fs, n, channel.start_s)
        channels[name] = replace(
            channel, samples=channel.samples[first:end].astype(np.float64),
            start_s=channel.start_s + first / channel.fs, end_s=channel.start_s + n / channel.fs)
    return channels


def _read_whole_vital(source):
    """Waveforms at their own rates; numbers on a grid of NUMERICS_FS, NaN where none came."""
    path = source.path
    _check_vital(path)
    file = _open_vital(path, header_only=True)
    channels = {
        name: Channel(np.empty(0), float(track.srate) if track.type == 1 else NUMERICS_FS,
                      track.unit)
        for name, track in file.trks.items() if track.type in (1, 2)
    }
    chosen = list(source.wanted(list(channels)))
    tracks = _open_vital(path, track_names=chosen).trks if chosen else {}
    if chosen and not any(tracks[name].recs for name in chosen):
        raise RecordingError(path, "vitaldb finds no samples in its tracks", ", ".join(chosen))
    for name in chosen:
        track, channel = tracks[name], channels[name]
        starts_s = np.array([record["dt"] for record in track.recs]) - file.dtstart
        blocks = [np.atleast_1d(record["val"]) for record in track.recs]
        if not blocks:
            continue
        if not 1e-3 < channel.fs < 1e6:
            raise RecordingError(path, "a track has no sampling rate", name)
        if track.type == 2:
            starts_s = np.rint(starts_s * NUMERICS_FS) / NUMERICS_FS
        elif track.fmt > 2:  # integers; in "packed" files an extreme one stands for a gap
            limits = np.iinfo(blocks[0].dtype)
            gap = (limits.min or limits.max) if getattr(file, "packed", False) else None
            blocks = [np.where(block == gap, np.nan, block * track.gain + track.offset)
                      for block in blocks]
        channel.start_s = float(starts_s.min())
        channel.samples, channel.fs = _join(path, starts_s, blocks, channel.fs)
    return channels


def _open_vital(path, **options):
    import vitaldb

    with contextlib.redirect_stdout(io.StringIO()) as printed:
        file = vitaldb.VitalFile(os.path.abspath(path), **options)  # absolute: never a URL
    if printed.getvalue():  # it prints what goes wrong, and goes on with what it has
        raise RecordingError(path, "vitaldb cannot read this file", printed.getvalue())
    return file


def _check_vital(path):
    """Raise unless this is a whole .vital file, of which vitaldb would take what there is, and one
    that does not unpack to absurd amounts."""
    limit = 8 * (FREE_SAMPLES + SAMPLES_PER_BYTE * os.path.getsize(path))
    try:
        with gzip.open(path) as file:
            if file.read(4) != b"VITA":
                raise RecordingError(path, "not a .vital file")
            while file.read(1 << 20):
                if file.tell() > limit:
                    raise RecordingError(path, f"unpacks to over {limit:,} bytes: no recording")
    except (OSError, EOFError, zlib.error) as error:
        raise RecordingError(path, "not a whole .vital file", error) from None


# ---------------------------------------------------------------------------------------------- EDF

# First byte and width of a signal's label, unit, physical and digital limits, samples per record.
EDF_FIELDS = ((0, 16), (96, 8), (104, 8), (112, 8), (120, 8), (128, 8), (216, 8))


def _read_edf(source, span):
    """EDF, EDF+C and EDF+D (https://www.edfplus.info/specs/edfplus.html), each channel at its rate.

    pyedflib reads the samples; of EDF+D, whose records have gaps between them, it reads nothing
    (https://github.com/holgern/pyedflib/issues/63), so those are read here.
    """
    import pyedflib

    path = source.path
    try:
        with open(path, "rb") as file:
            header = file.read(256)
            n_records, seconds, n = int(header[236:244]), float(header[244:252]), int(header[252:])
            text = file.read(256 * max(n, 0))
        fields = [np.frombuffer(text, f"S{width}", n, n * first) for first, width in EDF_FIELDS]
        low, high, code_low, code_high, sizes = (field.astype(float) for field in fields[2:])
        ends = np.cumsum(sizes).astype(np.int64)  # of every signal in a data record
        if not (n_records > 0 and 0 < seconds < 1e6 and (sizes >= 1).all()
                and (code_low < code_high).all() and np.isfinite([low, high]).all()):
            raise ValueError
    except ValueError:
        raise RecordingError(path, "not an EDF file: unreadable header") from None
    if os.path.getsize(path) < 256 * (1 + n) + 2 * n_records * int(ends[-1]):
        raise RecordingError(path, "this EDF file is shorter than its header promises")
    labels, units = ([value.decode("latin-1").strip() for value in field] for field in fields[:2])
    is_stamps = [header[192:196] == b"EDF+" and label == "EDF Annotations" for label in labels]
    waves = [i for i in range(n) if not is_stamps[i]]
    names = _unique([labels[i] for i in waves])
    channels = {name: Channel(np.empty(0), float(sizes[i] / seconds), units[i])
                for name, i in zip(names, waves)}
    chosen = list(source.wanted(names))
    if header[192:197] != b"EDF+D":
        with pyedflib.EdfReader(path) as file:
            for name in chosen:
                channel, number = channels[name], names.index(name)
                n_samples = int(n_records * sizes[waves[number]])
                first, end = _span(span, channel.fs, n_samples)
                channel.samples = file.readSignal(number, first, end - first)
                channel.start_s, channel.end_s = first / channel.fs, n_samples / channel.fs
        return channels
    records = np.memmap(path, "<i2", "r", 256 * (1 + n), (n_records, int(ends[-1])))
    columns = [records[:, int(end - size):end] for end, size in zip(ends, sizes)]
    stamps = columns[is_stamps.index(True)] if any(is_stamps) else records[:, :0]
    starts_s = np.array([
        float((re.match(rb"[+-]\d+(\.\d*)?(?=[\x14\x15])", row.tobytes()) or [b"nan"])[0])
        for row in stamps])
    starts_s -= starts_s.min()
    here = np.ones(n_records, bool) if span is None else ~(  # NaN, too: `_join` complains of it
        (starts_s <= span[0] - seconds) | (starts_s >= span[1]))
    for name in chosen:
        i, channel = waves[names.index(name)], channels[name]
        channel.end_s = float(starts_s.max()) + seconds
        if here.any():
            blocks = low[i] + (columns[i][here] - code_low[i]) * (
                (high[i] - low[i]) / (code_high[i] - code_low[i]))
            channel.start_s = float(starts_s[here].min())
            channel.samples, channel.fs = _join(
                path, starts_s[here] - channel.start_s, blocks, channel.fs)
    return channels


# --------------------------------------------------------------------------------------------- HDF5

def _read_hdf5(source, span):
    import h5py

    path, said = source.path, source.hdf5 or {}
    with h5py.File(path, "r") as file:
        datasets = _hdf5_datasets(path, file)
        places = {kind.upper(): said[kind].strip("/") for kind in ("abp", "ppg") if said.get(kind)}
        for name in places.values():
            if name not in datasets:
                raise RecordingError(path, "no one-dimensional dataset of numbers of its own (no "
                                           "link) at the path that was given", name)
        others = {} if len(places) == 2 else datasets
        datasets = {**{name: datasets[place] for name, place in places.items()}, **others}
        channels = {
            name: Channel(np.empty(0), float(said.get("fs") or _attribute(dataset, "fs")
                                             or _attribute(dataset, "sampling_rate") or np.nan),
                          str(_attribute(dataset, "unit") or _attribute(dataset, "units") or ""))
            for name, dataset in datasets.items()
        }
        chosen = list(source.wanted(list(channels)))
        for name in chosen:
            channel, dataset = channels[name], datasets[name]
            others = (plain_name(other) for other in channels if other not in chosen)
            if name not in places and plain_name(name) in others:
                raise RecordingError(path, "several datasets are named like the chosen one; say "
                                           "which: --abp PATH --ppg PATH", name)
            if not 0 < channel.fs < 1e6:
                raise RecordingError(path, "a dataset has no attribute fs or sampling_rate; give "
                                           "the rate: --fs HZ", name)
            n_chunk = np.prod(dataset.chunks or 0, dtype=float)  # is unpacked as a whole
            _check_size(path, int(max(dataset.size, n_chunk)), dataset.id.get_storage_size())
            first, end = _span(span, channel.fs, dataset.size)
            part = tuple(slice(first, end) if n == dataset.size else 0 for n in dataset.shape)
            channel.samples = np.asarray(dataset[part if dataset.size > 1 else ()],
                                         np.float64).reshape(-1)
            channel.start_s, channel.end_s = first / channel.fs, dataset.size / channel.fs
    return channels


def _attribute(dataset, name):
    """A single number or text; None if there is none."""
    if name not in dataset.attrs or dataset.attrs.get_id(name).shape not in ((), (1,)):
        return None
    value = np.ravel(dataset.attrs[name])[0]
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else value


def _hdf5_datasets(path, file):
    """{path in the file: one-dimensional dataset of numbers}, without whatever leads out of it.

    `visititems` follows hard links only, and meets each object once, as links can make loops. A
    dataset may be [1, n], too, as MATLAB writes it.
    """
    import h5py

    datasets, met = {}, []

    def look(name, item):
        met.append(name)
        if (isinstance(item, h5py.Dataset) and item.shape and item.dtype.kind in "fiu"
                and item.size == max(item.shape) > 0
                and not item.external and not item.is_virtual):
            datasets[name] = item
        return len(met) > MOST_OBJECTS or None  # anything but None ends the visit

    if file.visititems(look):
        raise RecordingError(path, f"more than {MOST_OBJECTS} objects: not one recording")
    if not datasets:
        raise RecordingError(path, "no one-dimensional dataset of numbers")
    return datasets


# -------------------------------------------------------------------------- Tables: CSV and Parquet

def _read_table(source, span):
    """A header line; a time column in seconds or `csv_rate`; an empty or NaN cell is a gap."""
    source.kept = source.kept or _Table(source)
    return source.kept.read(span)


class _Table:
    """A CSV or Parquet file, of which the rows from the last window's beginning on are kept."""

    def __init__(self, source):
        self.path, self.csv_rate, self.growing = source.path, source.csv_rate, source.growing
        opened = open_csv if self.path.lower().endswith(".csv") else _open_parquet
        names, numbers, blocks = opened(self.path, self.growing)
        times = [name for alias in TIME_NAMES for name in names if plain_name(name) == alias]
        if not self.csv_rate and not times:
            raise RecordingError(self.path, "no time column (time_s, time or t, in seconds); give "
                                            "the sampling rate: --csv-rate")
        time = [] if self.csv_rate else times[:1]
        self.names = [name for name in numbers if name and name not in time]
        self.chosen = list(source.wanted(self.names))
        self.columns = time + self.chosen
        self.blocks, self.ended = blocks(self.columns), False
        # What is kept: seconds from the file's first row on, and the chosen columns.
        self.rows = [np.empty(0) for _ in range(1 + len(self.chosen))]
        self.n_rows, self.first_s, self.last_s = 0, None, np.nan  # of all that were read

    def read(self, span):
        """As `Windows.channels`."""
        start_s, stop_s = span or (0.0, np.inf)
        parts = [self.rows]
        while self.columns and not self.last_s >= stop_s and (self.growing or not self.ended):
            columns, self.ended = next(self.blocks)
            if columns[0].size:
                columns = self._timed(columns)
                here = columns[0] >= start_s - 1e-6
                parts.append([column[here] for column in columns])
            if self.ended:
                break
        if self.ended and not self.growing and not self.n_rows:
            raise RecordingError(self.path, "no rows below the header")
        rows = [np.concatenate(columns) for columns in zip(*parts)]
        first, end = np.searchsorted(rows[0], [start_s - 1e-6, stop_s - 1e-6])
        self.rows = [column[first:] for column in rows]
        end_s = self.last_s if self.ended and end == rows[0].size else np.inf
        channels = {name: Channel(np.empty(0), np.nan, _unit(name), end_s=end_s)
                    for name in self.names}
        if span is None or end - first > 1:
            n_before = self.n_rows - self.rows[0].size
            self._fill(channels, [column[first:end] for column in rows], n_before)
        return channels

    def _timed(self, columns):
        """The columns of the next rows, as `rows` has them."""
        if self.csv_rate:
            columns = [(self.n_rows + np.arange(columns[0].size)) / self.csv_rate, *columns]
        else:
            self.first_s = columns[0][0] if self.first_s is None else self.first_s
            columns = [columns[0] - self.first_s, *columns[1:]]
            _check_times(self.path, columns[0], self.last_s, self.n_rows)
        self.n_rows, self.last_s = self.n_rows + columns[0].size, columns[0][-1]
        return columns

    def _fill(self, channels, rows, n_before):
        """Puts rows, before which the file has n_before, into the channels."""
        times, *values = rows
        fs = self.csv_rate
        if not fs:
            fs, positions = _time_grid(self.path, times, n_before)
            _check_size(self.path, int(positions[-1]) + 1, os.path.getsize(self.path))
            for i, column in enumerate(values):
                values[i] = np.full(positions[-1] + 1, np.nan)
                values[i][positions] = column
        for channel in channels.values():
            channel.fs = float(fs)
        for name, column in zip(self.chosen, values):
            known = np.flatnonzero(np.isfinite(column))
            # A slower channel among the rows of a faster one has a cell in every k-th row.
            every = int(np.gcd.reduce(np.diff(known))) if known.size > 10 else 1
            first = int(known[0] % every) if every > 1 else 0
            channels[name].samples = column[first::every].copy()
            channels[name].fs, channels[name].start_s = fs / every, times[0] + first / fs


def open_csv(path, growing):
    """(all columns, those of numbers, function `blocks`) of a CSV with a header line.

    blocks(columns) yields ([float64 array per column], whether the file ends here), for ever if it
    grows. NumPy's loadtxt (in C from 1.23 on) reads two million rows per second. A part that it
    cannot read, or would misread (quotes), goes through the csv module, which reads one million.
    """
    with open(path, "rb") as file:
        first_line, offset = file.readline(1 << 16).decode("utf-8-sig", "replace"), file.tell()
    delimiter = max(",;\t", key=first_line.count)
    cells = next(csv.reader([first_line], delimiter=delimiter), [])
    cells = [cell.strip() for cell in cells]
    if not any(cells) or all(map(_is_number, cells)):
        raise RecordingError(path, "no header line with column names")
    names = _unique(cells)

    def blocks(columns):
        at, begin, n_lines, ended = [names.index(name) for name in columns], offset, 1, False
        quick = tuple(map(int, np.__version__.split(".")[:2])) >= (1, 23)
        while growing or not ended:
            with open(path, "rb") as file:
                if os.path.getsize(path) < begin:
                    raise RecordingError(path, "became shorter while it was read")
                file.seek(begin)
                data = file.read(TABLE_BYTES) + file.readline()
                ended = file.tell() >= os.path.getsize(path)
            if growing:
                data = data[:data.rfind(b"\n") + 1]  # its last line may not be whole yet
            begin += len(data)
            text, values = data.decode("utf-8", "replace"), None
            if quick and text.strip() and '"' not in text:
                full = text  # with a word in its empty cells
                for end in (delimiter, delimiter, "\r", "\n"):
                    full = full.replace(delimiter + end, f"{delimiter}nan{end}")
                with contextlib.suppress(ValueError, IndexError):
                    values = list(np.loadtxt(io.StringIO(full), delimiter=delimiter, usecols=at,
                                             comments=None, ndmin=2).T)
            yield values or _csv_cells(path, text, names, delimiter, at, n_lines), ended
            n_lines += text.count("\n")

    return names, names, blocks


def _csv_cells(path, text, names, delimiter, columns, n_before):
    """[float64 array per column], NaN for missing cells. n_before: lines before the text."""
    rows = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)
    values = [array("d") for _ in columns]
    filled = list(zip(columns, [column.append for column in values]))
    for row in filter(None, rows):
        for i, append in filled:
            try:
                append(float(row[i]))
            except (ValueError, IndexError):
                cell = row[i].strip().lower() if i < len(row) else ""
                if cell not in MISSING_CELLS:
                    raise RecordingError(
                        path, f"line {n_before + rows.line_num}, column {names[i]}: "
                        "expected a number", repr(row[i][:40])) from None
                append(np.nan)
    return [np.array(column) for column in values]


def _is_number(cell):
    with contextlib.suppress(ValueError):
        float(cell)
        return True
    return False


def _open_parquet(path, growing):
    """As `open_csv`; dates become s from the first one."""
    import pyarrow
    from pyarrow import parquet, types

    file = parquet.ParquetFile(path)
    _check_size(path, file.metadata.num_rows, os.path.getsize(path))
    numbers = [field.name for field in file.schema_arrow
               if types.is_integer(field.type) or types.is_floating(field.type)]

    def blocks(columns):
        first_ns = None
        for batch in file.iter_batches(TABLE_ROWS, columns=columns):
            values = []
            for column in map(batch.column, columns):
                if types.is_timestamp(column.type):
                    times_ns = np.asarray(column.cast(pyarrow.timestamp("ns")).cast("int64"))
                    first_ns = times_ns[0] if first_ns is None else first_ns
                    values.append((times_ns - first_ns) / 1e9)
                else:
                    values.append(np.asarray(column.cast("float64")))
            yield values, False
        file.close()
        yield [np.empty(0) for _ in columns], True

    return file.schema_arrow.names, numbers, blocks


def _unit(name):
    """The unit in a column's name: 'abp_mmhg', 'ABP [mmHg]', 'pressure (kPa)'."""
    if name.lower().endswith("mmhg"):
        return "mmHg"
    match = re.search(r"[\[(](.*?)[\])]\s*$", name)
    return match.group(1) if match else ""


def _check_times(path, times, last_s, n_before):
    """Raise unless a time column runs on from last_s, which n_before rows end with (NaN: none)."""
    steps = np.diff(times, prepend=last_s)
    for wrong, what in (
            (~np.isfinite(times), "no time; give the sampling rate: --csv-rate"),
            (steps <= 0, "time does not increase; if the rows are evenly spaced: --csv-rate"),
            (steps > LONGEST_GAPS_S, "jumps in time of over a week; is time in seconds?")):
        if wrong.any():
            raise RecordingError(path, f"line {np.flatnonzero(wrong)[0] + n_before + 2}: {what}")


def _time_grid(path, times, n_before):
    """(fs, index of every row on an even grid from the first row on) of a time column; n_before:
    rows before them in the file."""
    if times.size < 2:
        raise RecordingError(path, "fewer than two rows")
    step = np.median(np.diff(times))
    fs, positions, late_s = _positions(path, times, np.ones(times.size, np.int64), step, step / 2)
    if (np.diff(positions) <= 0).any() or late_s.max() > 2 / fs:
        raise RecordingError(
            path, f"line {int(late_s.argmax()) + n_before + 2}: time is not evenly spaced "
            f"({late_s.max() * fs:.1f} samples off); if the rows are: --csv-rate")
    return fs, positions


# ending: (package, reader)
READERS = {
    ".hea": ("wfdb", _read_wfdb), ".vital": ("vitaldb", _read_vital),
    ".edf": ("pyedflib", _read_edf), ".csv": ("csv", _read_table),
    ".parquet": ("pyarrow", _read_table), ".h5": ("h5py", _read_hdf5),
    ".hdf5": ("h5py", _read_hdf5),
}
GROWING = (".csv", ".hea")  # see Windows
