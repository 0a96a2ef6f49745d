"""Recorded files of any format -> one-minute windows of PPG, arterial pressure and numbers.

    from recordings import find_recordings, read_windows
    for found in find_recordings(['records/']):
        recorded = read_windows(found.path, fs=60, seconds=60, limits={'map': (20, 200)})
        for minutes in recorded:            # blocks of at most `block_minutes` windows
            minutes.start_s, minutes.ppg, minutes.abp, minutes.numbers['map']

Needs formats.py and tables.py, which hold the readers: WFDB, VitalDB (.vital), EDF and EDF+, HDF5;
CSV and Parquet. A new format is a reader, as formats.py describes it, and an entry in `READERS`.

`Recorded`, what read_windows returns:
    name, path      the file's name without ending; the file
    channels        {channel name: Channel without samples (fs, unit)}, all that the file holds
    chosen          {kind: channel name}; kinds: ppg, abp (waveforms), map, sbp, dbp, hr (numbers of
                    the arterial line or the monitor), cuff_map, cuff_sbp, cuff_dbp (of a cuff)
    reasons         {kind: why that channel was taken, or none}
    start_time      datetime.datetime or None
    notes           [str], for the user; they name nothing from inside the file
    left_over_s     after iterating: seconds of the recording that are in no window
    gaps, gap_s     after iterating: how often, and for how many seconds, the PPG was missing
Iterating yields `Minutes` with n >= 1 windows:
    start_s         [n] float64, seconds after the recording's start, multiples of 1/fs
    ppg             [n, samples] float32, upright where `polarity` could tell
    abp             [n, samples] float32, mmHg; all NaN without an arterial line
    numbers         {kind: [n] float32}, the mean of the window's readings in mmHg or beats/min;
                    where it has none, the last reading before it; NaN before the first
    number_age_s    {kind: [n] float32}, from that last reading to the window's start; 0 where the
                    window has readings of its own
    refused         {kind: [n] int32}, readings in the window that `check_vital` refused

Windows follow one another from the first sample on. A window never spans a gap of the PPG: the next
one begins where the PPG is back. Where more than MAX_MISSING of a window lack arterial pressure,
the window moves on to where the pressure is back, if a full window of both follows; otherwise it
stays where it is. Missing samples are NaN and stay NaN.
"""
import argparse
import contextlib
import importlib
import math
import os
import re
import stat
import tempfile
import warnings
from dataclasses import dataclass, replace
from typing import Callable, Dict, Iterator, List, NamedTuple, Optional

import h5py
import numpy as np
from scipy import ndimage, signal

import formats
from formats import MIN_WAVE_HZ, PRESSURE, RATE, Channel, RecordingError, plain_unit, printable
from tables import Table, read_readings

# Names monitors and archives give to waveforms and numbers, best first, as `plain_name` makes them.
# Sources: the signals of MIMIC-III and -IV (physionet.org), VitalDB's track list
# (vitaldb.net/dataset), Philips IntelliVue (Data Export manual), GE (ART1, AR1), IEEE 11073 codes.
# P1 to P4 are absent on purpose: a monitor calls any unlabelled pressure so, a venous one as well.
ARTERIAL = ("abp", "art", "artabp", "art1", "ar1", "ibp", "ibp1", "aobp", "ao", "aort", "radial",
            "rad", "artrad", "radart", "abprad", "radabp", "artradial", "radialart", "art2", "ar2",
            "fap", "fem", "bap", "uap", "artumb", "arterialpressure", "arterialbloodpressure",
            "arterialbp", "invasivebloodpressure", "systemic")
CUFF = ("nbp", "nibp", "noninv", "noninvasive", "noninvasivebloodpressure", "cuff")
ENDINGS = {"map": ("mean", "m", "mbp", "map", "avg", "average"),
           "sbp": ("sys", "s", "sbp", "systolic", "syst"),
           "dbp": ("dias", "dia", "d", "dbp", "diastolic", "diast")}
ALONE = {"map": ("map", "mbp", "mabp", "meanbp", "meanarterialpressure", "bpmean"),
         "sbp": ("sbp", "sys", "systolic", "systolicbp", "bpsys", "systolicbloodpressure"),
         "dbp": ("dbp", "dias", "dia", "diastolic", "diastolicbp", "diastolicbloodpressure")}


def _numbers(kind, sites):
    return (*(site + ending for site in sites for ending in ENDINGS[kind]),
            *(ending + site for site in sites for ending in ENDINGS[kind] if len(ending) > 2))


CHANNELS = {
    "ppg": ("pleth", "ppg", "plethr", "plethl", "plethwave", "spo2wave", "spo2waveform",
            "spo2pleth", "plethspo2", "spo2ppg", "ppgfinger", "fingerppg", "plethysmogram",
            "photoplethysmogram", "plethysmograph"),
    "abp": (*ARTERIAL, *(site + "wave" for site in ARTERIAL),
            *(site + "waveform" for site in ARTERIAL)),
    **{kind: (*_numbers(kind, ARTERIAL), *ALONE[kind]) for kind in ENDINGS},
    "pp": ("pp", "pulsepressure"),
    "hr": ("hr", "heartrate", "ecghr", "hrecg", "ecgcardbeatrate", "pulse", "pulserate", "pr",
           "abphr", "arthr", "plethhr", "plethpulserate", "spo2hr", "spo2pr"),
    **{f"cuff_{kind}": _numbers(kind, CUFF) for kind in ENDINGS},
}
NUMBERS = ("map", "sbp", "dbp", "hr", "cuff_map", "cuff_sbp", "cuff_dbp")  # read from recordings
SENTINELS = tuple(float(v) for n in (16, 24, 32) for v in (-2 ** (n - 1), 2 ** (n - 1) - 1))
MAX_MISSING = 0.1       # of a window's arterial pressure, before the window moves on
GAP_MARGIN_S = 1 / 60   # next to a gap: what a low-passed, continued signal is least sure of
MIN_STRETCH_S = 0.25    # between two gaps; a shorter one holds no beat
BLOCK = 36000           # samples resampled at a time, to bound memory
# Read beyond both ends of a block, so that `resample` gives the block what it gives the whole
# recording, to the bit: twice its filter's half-length, 0.65 s at 40 Hz, and its spline's.
MARGIN_S = 2.0
PROBE_S = 600.0         # of each candidate, to tell waveforms from numbers


@dataclass
class Minutes:
    start_s: np.ndarray
    ppg: np.ndarray
    abp: np.ndarray
    numbers: Dict[str, np.ndarray]
    number_age_s: Dict[str, np.ndarray]
    refused: Dict[str, np.ndarray]


class Readings(dict):
    """{vital: (times_s [n], values [n])}; `refused`: {vital: times_s of the refused readings}."""
    refused: Dict[str, np.ndarray]


# ------------------------------------------------------------------------------- finding recordings

class Found(NamedTuple):
    path: str
    typed: str          # what the user typed: `path` itself, or the folder or list that holds it
    name: str           # without ending, below the typed folder: 'patient1/waves'
    in_folder: bool     # found in a folder or list


class Finds(List[Found]):
    """What find_recordings returns; `skipped`: [(path, why, whether it is a problem)]."""
    skipped: List[tuple]


def find_recordings(inputs) -> Finds:
    """Recordings named by `inputs`: files, WFDB record names, folders, lists (RECORDS files).

    A folder is walked in sorted order with all folders in it, links to folders included, each once.
    The lines of a list name records or folders next to it. Not recordings of their own: segments of
    a WFDB record, the numerics that MIMIC keeps next to a waveform record. Skipped, and noted in
    `.skipped`: folders that cannot be opened (a problem), files of this project, devices and pipes.
    """
    finds, known = Finds(), set()
    finds.skipped = []
    for typed in map(os.fspath, inputs):
        root = os.path.expanduser(typed)
        if os.path.isdir(root):
            paths = _recordings_in(root, finds.skipped)
            if not paths:
                closed = sum(problem for _, _, problem in finds.skipped)
                raise RecordingError(
                    typed, f"no recording in this folder ({', '.join(READERS)})"
                    + f"; {closed} folders in it could not be opened" * bool(closed))
        elif os.path.basename(root).startswith("RECORDS") and os.path.isfile(root):
            paths = _listed_in(root, finds.skipped)
        else:
            paths = [path for path in (re.sub(r"(?i)\.dat$", ".hea", root), root, root + ".hea",
                                       root + ".HEA") if os.path.exists(path)][:1]
            if not paths:
                raise RecordingError(typed, "no such file, WFDB record or folder")
            reader_of(paths[0])     # an ending that no reader takes is an error here and now
        in_folder = os.path.isdir(root) or os.path.basename(root).startswith("RECORDS")
        folder = root if os.path.isdir(root) else os.path.dirname(root)
        for path in paths:
            real = os.path.realpath(path)
            if real not in known:
                known.add(real)
                name = os.path.splitext(os.path.relpath(path, folder or "."))[0]
                finds.append(Found(path, typed, name.replace(os.sep, "/"), in_folder))
    return finds


def _recordings_in(folder, skipped):
    paths, seen = [], set()
    for parent, folders, files in os.walk(folder, followlinks=True, onerror=lambda error: (
            skipped.append((error.filename, "folder cannot be opened", True)))):
        real = os.path.realpath(parent)
        folders[:] = [] if real in seen else sorted(folders)
        for file in () if real in seen else sorted(files):
            path = os.path.join(parent, file)
            if (os.path.splitext(file)[1].lower() not in READERS or file.startswith(".")
                    or file.endswith(("_problems.csv", "_recordings.csv"))):    # this project's
                continue
            if not os.path.isfile(path):
                skipped.append((path, "not a regular file", False))
            elif _is_prepared(path):
                skipped.append((path, "prepared by this project already", False))
            else:
                paths.append(path)
        seen.add(real)
    return _whole_records(paths)


def _listed_in(path, skipped):
    """The recordings that a list names, like MIMIC's RECORDS: a record or folder in each line."""
    paths = []
    with open(path, encoding="utf-8", errors="replace") as file:
        for number, entry in enumerate(map(str.strip, file), 1):
            if os.path.isabs(entry) or re.search(r"(^|[/\\])\.\.([/\\]|$)|[:\x00]", entry):
                raise RecordingError(
                    path, f"line {number} names a record outside the list's folder")
            target = os.path.join(os.path.dirname(path), entry)
            if entry and os.path.isdir(target):
                paths += _recordings_in(target, skipped)
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
        if path.lower().endswith(".hea") and os.path.isfile(path):
            with contextlib.suppress(RecordingError, OSError):  # reading it will say what is wrong
                headers[path] = formats.read_header(path)
    for path, header in headers.items():
        folder = os.path.dirname(path)
        parts.update(os.path.join(folder, name + ".hea") for name, _ in header.segments)
        # 3000003n holds the numbers (at most one a second) next to the waveforms of 3000003.
        if path[-5] == "n" and path[:-5] + ".hea" in headers and header.fs < 1.5:
            parts.add(path)
    return [path for path in paths if path not in parts]


def _is_prepared(path):
    """An HDF5 file that prepare.py or simulate.py made."""
    if os.path.splitext(path)[1].lower() not in (".h5", ".hdf5"):
        return False
    with contextlib.suppress(OSError, RuntimeError), h5py.File(path, "r") as file:
        return "layout_version" in file.attrs
    return False


def recording_name(path) -> str:
    """The file's name without folder and ending."""
    return os.path.splitext(os.path.basename(path))[0]


def files_of(path) -> List[str]:
    """The files of a recording: the lines of a WFDB header begin with their names."""
    files, waiting, folder = {path}, [path], os.path.dirname(path)
    while waiting:
        header, words = waiting.pop(), set()
        if header.lower().endswith(".hea") and os.path.isfile(header):
            with contextlib.suppress(OSError), open(header, errors="replace") as file:
                words = {os.path.basename(line.split()[0]) for line in file if line.strip()}
        named = {os.path.join(folder, word + ending) for word in words for ending in ("", ".hea")}
        waiting += [name for name in named - files if os.path.isfile(name)]
        files.update(waiting)
    return sorted(files)


def reader_of(path):
    """(package, reader class) for this file's ending."""
    try:
        return READERS[os.path.splitext(path)[1].lower()]
    except KeyError:
        raise RecordingError(path, f"not a recording ({', '.join(READERS)})") from None


def check_readers(found) -> None:
    """Raise now if a package that one of these recordings (Found or paths) needs is missing."""
    paths = [getattr(item, "path", item) for item in found]
    for ending, path in {os.path.splitext(path)[1].lower(): path for path in paths}.items():
        try:
            importlib.import_module(reader_of(path)[0])
        except ModuleNotFoundError as error:
            raise RecordingError(f"{ending} files", f"reading them needs the package {error.name}: "
                                 "pip install -r requirements-extra.txt") from None


# ------------------------------------------------------------------------------ names, units, kinds

def plain_name(name) -> str:
    """'SNUADC/ART' -> 'art', 'abp_mmhg' -> 'abp', 'Pleth [NU]' -> 'pleth', 'ART(M)' -> 'artm',
    'NOM_PRESS_BLD_ART_ABP' -> 'artabp'."""
    unit = formats.unit_in_name(name)
    name = name[:name.rindex(unit)] if unit else name

    def inside(match):
        text = re.sub(r"[^a-z0-9]", "", match.group(1))
        return text if text in formats.NUMBER_WORDS else ""    # 'ART(M)' is no 'ART'

    name = re.sub(r"[\[(]([^\])]*)(?:[\])]|$)", inside, name.lower()).rstrip("/_ ")
    name = re.sub(r"[^a-z0-9]", "", name.rsplit("/", 1)[-1])
    return re.sub(r"^(nls)?(nom|mdc)(pressbld|pulsoxim)?", "", name)


def units_of(kind) -> Dict[str, float]:
    """{plain unit: factor to mmHg or beats/min} of a kind of channel; {} where any will do."""
    kind = kind.replace("cuff_", "")
    return PRESSURE if kind in ("abp", "map", "sbp", "dbp", "pp") else RATE if kind == "hr" else {}


def unit_factor(kind, unit, path="", detail="") -> float:
    """What to multiply values of a kind with, to have mmHg or beats/min. No unit is the standard
    one; RecordingError if it is unknown."""
    known = units_of(kind)
    if not known or not plain_unit(unit):
        return 1.0
    if plain_unit(unit) in known:
        return known[plain_unit(unit)]
    raise RecordingError(
        path, f"the {kind.replace('_', ' ').upper()} channel's unit is not known; state it: "
        f"--unit CHANNEL=UNIT ({', '.join(unit for unit in known if unit)})", detail or unit)


def check_vital(key, values, unit="", limits=None):
    """(values [n] float64 in mmHg or beats/min, refused [n] bool) of readings of a vital.

    NaN where nothing was read or the reading is refused: a sentinel such as -32768 or 2**23 - 1,
    or a value outside `limits` (low, high), which no patient has. Raises RecordingError if the
    unit is unknown. Readings of pressures must pass `check_order`, too.
    """
    raw = np.asarray(values, np.float64)
    known = ~np.isnan(raw)
    values = raw * unit_factor(key, unit)
    low, high = limits or (None, None)
    fine = np.isfinite(values) & ~np.isin(raw, SENTINELS)
    fine &= (values >= (-np.inf if low is None else low)) & (
        values <= (np.inf if high is None else high))
    return np.where(fine, values, np.nan), known & ~fine


def check_order(readings) -> Dict[str, np.ndarray]:
    """{vital: [n] bool, which readings break DBP <= MAP <= SBP} of {vital: (times_s, values)}; of
    two readings within 2 s that contradict each other both are refused."""
    refused = {key: np.zeros(len(times), bool) for key, (times, _) in readings.items()}
    for low, high in (("dbp", "map"), ("map", "sbp"), ("dbp", "sbp")):
        if low in readings and high in readings and len(readings[high][0]):
            (t_low, v_low), (t_high, v_high) = readings[low], readings[high]
            j = np.maximum(np.searchsorted(t_high, t_low + 1e-3, side="right") - 1, 0)
            with np.errstate(invalid="ignore"):
                wrong = (np.abs(t_low - t_high[j]) < 2) & (v_low > v_high[j])
            refused[low][wrong] = True
            refused[high][j[wrong]] = True
    return refused


def nature(channel) -> str:
    """'wave', 'number' or 'unknown' (flat, empty, or smooth), by rate and content."""
    if not channel.fs >= MIN_WAVE_HZ:
        return "number" if channel.fs > 0 else "unknown"
    x = channel.samples[np.isfinite(channel.samples)]
    seconds = channel.samples.size / channel.fs
    if seconds < 5 or not x.size:
        return "unknown"
    changes = np.count_nonzero(np.diff(x)) / max(x.size / channel.fs, 1.0)
    sparse = x.size / seconds < 5 and x.size < 0.1 * channel.samples.size
    if sparse or 0 < changes < 5:
        return "number"
    if changes == 0:
        return "unknown"
    n = int(2 * channel.fs)
    swings = np.ptp(x[:x.size // n * n].reshape(-1, n), axis=1)
    spread = np.subtract(*np.percentile(x, [98, 2]))
    return "wave" if swings.size and np.median(swings) > 0.25 * spread else "unknown"


def choose(path, channels, wanted, probe):
    """({kind: channel name}, {kind: why}): by name, and by what probe(names) -> {name: Channel
    with samples} shows where a name alone does not tell."""
    plain = {}
    for name in channels:
        plain.setdefault(plain_name(name), []).append(name)
    named = {kind: [name for alias in CHANNELS[kind] for name in plain.get(alias, ())]
             for kind in ("ppg", "abp", *NUMBERS)}
    probed = probe([name for name in dict.fromkeys(sum(named.values(), []))
                    if channels[name].fs > 0])
    natures = {**dict.fromkeys(channels, "unknown"),
               **{name: nature(channel) for name, channel in probed.items()}}
    chosen, reasons = {}, {}
    for kind in ("ppg", "abp"):
        asked = wanted.get(kind)
        if (asked or "").lower() == "none" and asked not in channels:
            name, why = None, f"--{kind}-channel none"
        elif asked:
            name, why = _asked_channel(path, kind, asked, channels), f"--{kind}-channel"
        else:
            name, why = _wave_channel(path, kind, named, natures, channels)
        chosen.update({kind: name} if name else {})
        reasons[kind] = why
    for kind in NUMBERS:
        names = [name for name in named[kind] if name not in chosen.values()
                 and natures[name] != "wave" and channels[name].fs > 0]
        chosen.update({kind: names[0]} if names else {})
        if named[kind]:
            reasons[kind] = "usual name" if names else "named like a number, but it is a waveform"
    for kind, name in chosen.items():
        reasons[kind] += f", {channels[name].fs:g} samples/s" if channels[name].fs > 0 else ""
    return chosen, reasons


def _asked_channel(path, kind, asked, channels):
    alike = [name for name in channels if name.lower() == asked.strip("/").lower()]
    if not alike and asked not in channels:
        raise RecordingError(path, f"no channel has the name given with --{kind}-channel; see "
                                   "--list-channels", "it has " + ", ".join(channels))
    name = asked if asked in channels else alike[0]
    if channels[name].fs < MIN_WAVE_HZ:
        raise RecordingError(path, f"the {kind.upper()} channel has {channels[name].fs:g} "
                                   f"samples/s; a waveform needs {MIN_WAVE_HZ} or more")
    return name


def _wave_channel(path, kind, named, natures, channels):
    """(name or None, why): a pulsating one before a flat one, then by name."""
    waves = sorted((name for name in named[kind] if natures[name] != "number"),
                   key=lambda name: natures[name] != "wave")    # stable: the best name first
    if waves:
        same = [name for name in waves if plain_name(name) == plain_name(waves[0])]
        if len(same) > 1 and reader_of(path)[0] == "h5py":      # of several patients, maybe
            raise RecordingError(path, f"several datasets are named like the {kind.upper()}; say "
                                       f"which: --{kind}-channel PATH", ", ".join(same))
        return waves[0], "usual name"
    misnamed = [name for number in ENDINGS for name in named[number] if natures[name] == "wave"]
    if misnamed and kind == "abp":
        return misnamed[0], "named like a number, but it is a pulsating waveform"
    rates = [channels[name].fs for name in named[kind]]
    if rates and rates[0] < MIN_WAVE_HZ:
        return None, (f"{rates[0]:g} samples/s: numbers, not a waveform (needs {MIN_WAVE_HZ} or "
                      "more)")
    return None, ("named like a waveform, but it holds numbers" if rates
                  else "no channel with a usual name")


# ------------------------------------------------------------- what prepare.py and predict.py share

PRIVATE_LINE = "# private: contains true record names and paths; do not share"
MAX_CELL = 1000     # characters of a cell in a table of problems or predictions


def add_channel_options(parser):
    """--abp-channel, --ppg-channel, --fs and --unit; returns what adds more to their group."""
    add = parser.add_argument_group("channels").add_argument
    add("--abp-channel", metavar="NAME",
        help="the arterial pressure (default: by its usual names; none: ignore it)")
    add("--ppg-channel", metavar="NAME", help="the PPG (default: by its usual names)")
    add("--fs", type=_positive, metavar="HZ", help="samples per second: the rows of tables are "
        "evenly spaced (times are not used); for HDF5 files that do not state it")
    add("--unit", type=_channel_and_unit, action="append", default=[], metavar="CHANNEL=UNIT",
        help="the unit of a channel, where the file does not state it or is wrong")
    return add


def _positive(text):
    value = float(text)
    if not 0 < value < 1e6:
        raise argparse.ArgumentTypeError("expected a number above 0")
    return value


def _channel_and_unit(text):
    channel, equals, unit = text.rpartition("=")
    if not (channel and equals and unit):
        raise argparse.ArgumentTypeError("expected CHANNEL=UNIT, such as ABP=kPa")
    return channel, unit


def channel_options(options):
    """The options of `add_channel_options` as arguments of `read_windows`."""
    wanted = {"abp": options.abp_channel, "ppg": options.ppg_channel}
    return {"channels": {kind: name for kind, name in wanted.items() if name},
            "units": dict(options.unit), "file_fs": options.fs}


def check_outputs(outputs, found, other_inputs=()):
    """Raises RecordingError if an output is also an input, is a folder, or cannot be written."""
    inputs = {os.path.realpath(path) for item in found for path in files_of(item.path)}
    inputs.update(os.path.realpath(path) for path in other_inputs if path)
    for path in filter(None, outputs):
        folder = os.path.dirname(os.path.realpath(path))
        while not os.path.exists(folder):
            folder = os.path.dirname(folder)
        if os.path.realpath(path) in inputs:
            raise RecordingError(path, "is both an input and an output")
        if os.path.isdir(path):
            raise RecordingError(path, "expected a file to write, but this is a folder")
        try:
            tempfile.TemporaryFile(dir=folder).close()
        except OSError as error:
            raise RecordingError(path, f"cannot be written here ({error.strerror})") from None


def shown(found, number) -> str:
    """How messages name a recording: as typed, or by its number in the folder that was typed. File
    names of recordings are often patients' numbers, and messages end up in logs."""
    item = found[number]
    return item.typed + f" (recording {number + 1} of {len(found)})" * item.in_folder


def safe_cell(text) -> str:
    """One line of text that fits a cell and that no spreadsheet takes for a formula."""
    text = printable(text)
    text = text if len(text) <= MAX_CELL else text[:MAX_CELL - 3] + "..."
    return "'" + text if text.startswith(("=", "+", "-", "@")) else text


# ------------------------------------------------------------------------------------------ windows

def read_windows(path, *, fs: float, seconds: float, limits, channels=None, units=None,
                 file_fs: Optional[float] = None, block_minutes: int = 30,
                 polarity: Optional[Callable] = None) -> "Recorded":
    """Open a recording; iterating the result reads it (see the module's docstring).

    fs, seconds: rate and length of the windows. limits: {vital: (low, high)} in mmHg or beats/min.
    channels: {'abp': channel name or 'none', 'ppg': channel name}, instead of the usual names.
    units: {channel name: unit}, instead of the file's. file_fs: the rows of a table, or the samples
    of HDF5 datasets, are evenly spaced at this rate. polarity(ppg [n, samples], fs) -> -1 where the
    PPG is inverted, 1 where it is not, 0 where that is unsure, in all or for each window: the first
    block of windows in which the majority is sure decides for the rest. Raises RecordingError.
    """
    return Recorded(path, fs, seconds, dict(limits), dict(channels or {}), dict(units or {}),
                    file_fs, max(2, block_minutes), polarity)


def list_channels(path, file_fs=None) -> Dict[str, Channel]:
    return _open(path, file_fs).channels


@contextlib.contextmanager
def _reading(path):
    """Whatever goes wrong in a package becomes a RecordingError."""
    try:
        with warnings.catch_warnings(), np.errstate(all="ignore"):
            warnings.simplefilter("ignore")
            yield
    except RecordingError:
        raise
    except OSError as error:
        raise RecordingError(path, "cannot be read", error.strerror or error) from None
    except Exception as error:  # noqa: BLE001 - packages raise a dozen kinds for malformed files
        what = f"{reader_of(path)[0]} cannot read this file ({type(error).__name__})"
        raise RecordingError(path, what, error) from None


def _open(path, file_fs=None):
    """The reader of a file, opened: .channels, .start_time, .end_s, .notes, and
    read(names, start_s, stop_s) -> {name: Channel}, with start_s never less than before."""
    path = os.fspath(path)
    check_readers([path])
    with _reading(path):
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise RecordingError(path, "not a regular file")
        return reader_of(path)[1](path, file_fs)


class Recorded:
    """A recording in windows; the attributes and what iterating yields: the module's docstring."""

    def __init__(self, path, fs, seconds, limits, wanted, units, file_fs, block, polarity):
        self.path, self.name = os.fspath(path), recording_name(path)
        self._fs, self._samples, self._block = fs, round(fs * seconds), block
        self._limits, self._polarity, self._turn = limits, polarity, 0
        self.left_over_s, self.gaps, self.gap_s = math.nan, 0, 0.0
        reader = self._reader = _open(path, file_fs)
        self.channels, self.start_time = reader.channels, reader.start_time
        self.notes: List[str] = list(reader.notes)

        def probe(names):
            with _reading(path):
                return reader.read(names, 0.0, PROBE_S) if names else {}

        self.chosen, self.reasons = choose(path, self.channels, wanted, probe)
        self._factors = {}
        given = {name.lower(): unit for name, unit in units.items()}
        if set(given) - {name.lower() for name in self.channels}:
            self.notes.append("--unit: names a channel that is not in this recording")
        for kind, name in list(self.chosen.items()):
            unit = given.get(name.lower(), self.channels[name].unit)
            try:
                self._factors[kind] = unit_factor(kind, unit, path, f"{name}: {unit}")
            except RecordingError:
                if kind == "abp" or "abp" not in self.chosen:
                    raise
                del self.chosen[kind]       # with an arterial line, nobody needs it
                self.reasons[kind] = "its unit is not known (--unit CHANNEL=UNIT)"
                self.notes.append(f"{kind}: not used, {self.reasons[kind]}")

    def __iter__(self) -> Iterator[Minutes]:
        names = list(dict.fromkeys(self.chosen.values()))
        if "ppg" not in self.chosen:
            raise RecordingError(self.path, f"no PPG: {self.reasons['ppg']}; see --list-channels "
                                 "and --ppg-channel", "it has " + ", ".join(self.channels))
        reader, fs, samples = self._reader, self._fs, self._samples
        with _reading(self.path):
            reader.read(names, 0.0, 0.0)    # .vital files know their end then
        k, k_end = 0, int((reader.end_s + 1e-6) * fs)   # samples on the windows' grid
        last, n_windows = {}, 0
        while k < k_end:
            stop = min(k + self._block * samples, k_end)
            with _reading(self.path):
                read = reader.read(names, k / fs - MARGIN_S, stop / fs + MARGIN_S)
                ppg, abp = (self._wave(kind, read, k, stop - k) for kind in ("ppg", "abp"))
                starts, after = self._cut(ppg, abp, stop == k_end)
                rows = starts[:, None] + np.arange(samples)
                numbers = self._numbers(read, (k + starts) / fs, (k + after) / fs, last)
            if len(starts):
                n_windows += len(starts)
                yield Minutes((k + starts) / fs, self._upright(ppg[rows]), abp[rows], *numbers)
            k += after
        self.left_over_s = max(0.0, reader.end_s - n_windows * samples / fs)

    def _wave(self, kind, read, k, n):
        """[n] float32: samples k to k + n of the windows' grid."""
        channel = read.get(self.chosen.get(kind))
        if channel is None or not channel.samples.size:
            return np.full(n, np.nan, np.float32)
        values = np.where(np.isin(channel.samples, SENTINELS) | np.isinf(channel.samples),
                          np.nan, channel.samples) * self._factors[kind]
        return resample(replace(channel, samples=values), self._fs, n, k)

    def _cut(self, ppg, abp, is_last):
        """(index of the first sample of each window, how much of the block is done with)."""
        n, samples, starts = len(ppg), self._samples, []
        edges = np.flatnonzero(np.diff(np.concatenate(([0], np.isfinite(ppg), [0]))))
        missing = ~np.isfinite(abp)
        self.gap_s += (n - np.diff(edges.reshape(-1, 2)).sum()) / self._fs
        for at, end in edges.reshape(-1, 2):
            self.gaps += at > 0
            while at + samples <= end:
                lacking = missing[at:at + samples]
                if not lacking[-1] and lacking.mean() > MAX_MISSING:
                    back = at + np.flatnonzero(lacking)[-1] + 1     # where the pressure is whole
                    if back + samples > n and not is_last:
                        return np.array(starts, np.int64), at
                    if back + samples <= end and missing[back:back + samples].mean() <= MAX_MISSING:
                        at = back
                starts.append(at)
                at += samples
            if end == n and not is_last:
                return np.array(starts, np.int64), at
        return np.array(starts, np.int64), n

    def _upright(self, ppg):
        if self._polarity is not None and not self._turn:
            self._turn = int(np.sign(np.sum(np.sign(np.nan_to_num(self._polarity(ppg, self._fs))))))
            if self._turn < 0:
                self.notes.append("the PPG is inverted (its pulses point down); turned")
        return -ppg if self._turn < 0 else ppg

    def _numbers(self, read, begin_s, after_s, last):
        """(numbers, ages, refused) of the windows from begin_s [n] on; `last`: {kind: (time, value)
        of the last reading before this block}, moved on to after_s."""
        readings, refusals = {}, {}
        for kind in set(NUMBERS).intersection(self.chosen):
            channel, key = read[self.chosen[kind]], kind.replace("cuff_", "")
            known = np.flatnonzero(~np.isnan(channel.samples))
            times = channel.start_s + (channel.first + known) / channel.fs
            values = channel.samples[known] * self._factors[kind]
            values[np.isin(channel.samples[known], SENTINELS)] = np.inf
            values, refusals[kind] = check_vital(key, values, "", self._limits.get(key))
            readings[kind] = times, values
        for prefix in ("", "cuff_"):
            group = {kind[len(prefix):]: readings[kind] for kind in readings
                     if kind.startswith("cuff_") == bool(prefix)}
            for key, wrong in check_order(group).items():
                readings[prefix + key][1][wrong] = np.nan
                refusals[prefix + key] |= wrong
        found, ages, refused = {}, {}, {}
        edges_s = np.stack([begin_s, begin_s + self._samples / self._fs]) - 1e-6
        for kind, (times, values) in readings.items():
            count = np.append(0, np.cumsum(refusals[kind]))
            refused[kind] = np.diff(count[np.searchsorted(times, edges_s)], axis=0)[0].astype("i4")
            last_s, last_value = last.get(kind, (-np.inf, np.nan))
            fine = np.isfinite(values) & (times > last_s)
            times, values = np.append(last_s, times[fine]), np.append(last_value, values[fine])
            first, end = np.searchsorted(times, edges_s)
            first = np.maximum(first, 1)
            own, total = end > first, np.append(0.0, np.nan_to_num(values).cumsum())
            mean = (total[np.maximum(end, first)] - total[first]) / np.maximum(end - first, 1)
            found[kind] = np.where(own, mean, values[first - 1]).astype("f4")
            ages[kind] = np.where(own, 0.0, begin_s - times[first - 1]).astype("f4")
            ages[kind][np.isnan(found[kind])] = np.nan
            newest = max(int(np.searchsorted(times, after_s - 1e-6)) - 1, 0)
            last[kind] = times[newest], values[newest]
        return found, ages, refused


def resample(channel: Channel, fs_out: float, n_out: int, k_first: int = 0) -> np.ndarray:
    """[n_out] float32: the channel at (k_first + i) / fs_out seconds; gaps are NaN.

    Any ratio of rates, without drift: an integer oversampling (to at least 4 x fs_out) with a
    linear-phase low-pass, then a cubic spline at the very times. The low-pass is flat up to 0.8 of
    the lower Nyquist frequency and closed (80 dB) at it. Every stretch between gaps is treated
    alone, continued beyond its ends by odd reflection, and gives up GAP_MARGIN_S next to each gap;
    a stretch shorter than MIN_STRETCH_S is dropped.
    """
    out = np.full(n_out, np.nan, dtype=np.float32)
    fs, samples, offset = channel.fs, channel.samples, channel.first
    known = np.flatnonzero(np.diff(np.concatenate(([0], np.isfinite(samples), [0])))) + offset
    up = int(np.ceil(4 * fs_out / fs))
    nyquist = min(fs, fs_out) / 2
    n_taps, beta = signal.kaiserord(80, 0.2 * nyquist / (fs * up / 2))
    half = n_taps // 2 + 1
    taps = signal.firwin(2 * half + 1, 0.9 * nyquist, window=("kaiser", beta), fs=fs * up)
    same_grid = fs == fs_out and float(channel.start_s * fs).is_integer()
    pad = half // up + 4    # samples: the filter's half-length and a little for the spline
    for first, end in known.reshape(-1, 2):
        if (end - first) / fs < MIN_STRETCH_S:
            continue
        # A sample stands for half a period on either side.
        start_s = channel.start_s + (first - 0.5) / fs + (GAP_MARGIN_S if first else 0)
        end_s = channel.start_s + (end - 0.5) / fs - (
            GAP_MARGIN_S if end < offset + samples.size else 0)
        k_start = max(k_first, int(np.ceil(start_s * fs_out - 1e-6)))
        k_end = min(k_first + n_out, int(np.ceil(end_s * fs_out - 1e-6)))
        for k in range(k_start, k_end, BLOCK):
            times = np.arange(k, min(k + BLOCK, k_end)) / fs_out - channel.start_s
            at = times * fs     # in samples of the channel
            to = slice(k - k_first, k - k_first + at.size)
            if same_grid:
                out[to] = samples[np.rint(at).astype(np.int64) - offset]
                continue
            left = max(first, int(at[0]) - 2 * pad)
            right = min(end, int(at[-1]) + 2 * pad + 1)
            padded = np.pad(samples[left - offset:right - offset], pad, mode="reflect",
                            reflect_type="odd")
            fine = (signal.oaconvolve(padded, taps) if up == 1 else     # by FFT: many taps
                    signal.upfirdn(up * taps, padded, up))[half:]       # zero phase
            at = (at - left + pad) * up
            out[to] = ndimage.map_coordinates(fine, [at], order=3, mode="mirror")
    return out


# ---------------------------------------------------------------------------------- vitals from CSV

def read_vitals(path, *, limits, units=None, start_time=None) -> Readings:
    """{vital: (times_s [n] from the recording's start, values [n] in mmHg or beats/min)} of a CSV
    or Parquet file with a time column and any of the vitals in `limits`; cells may be empty.

    Refused readings (`check_vital`, `check_order`) are left out; their times are in `.refused`.
    units: {column: unit}, instead of the file's. Dates and clock times count from `start_time`.
    """
    path = os.path.expanduser(os.fspath(path))
    check_readers([path])
    with _reading(path):
        times, table, own_units = read_readings(path, start_time)
    given = {name.lower(): unit for name, unit in (units or {}).items()}
    plain = {}
    for name in table.columns:
        plain.setdefault(plain_name(name), name)
    readings, refused = {}, {}
    for key in limits:
        aliases = (*CHANNELS.get(key, (key,)), *CHANNELS.get(f"cuff_{key}", ()))
        name = next((plain[alias] for alias in aliases if alias in plain), None)
        if name is None:
            continue
        values = table[name].to_numpy(np.float64)
        known = ~np.isnan(values)
        if (np.diff(times[known]) <= 0).any():
            raise RecordingError(path, f"the times of {key.upper()} do not increase")
        unit = given.get(name.lower(), own_units[name])
        unit_factor(key, unit, path, f"{name}: {unit}")
        values, wrong = check_vital(key, values[known], unit, limits[key])
        readings[key], refused[key] = (times[known], values), wrong
    if not readings:
        raise RecordingError(path, "expected a time column (time_s: seconds from the recording's "
                                   "start) and any of " + ", ".join(limits))
    out = Readings()
    out.refused = {}
    for key, wrong in check_order(readings).items():
        times, values = readings[key]
        wrong = wrong | refused[key]
        out.refused[key] = times[wrong]
        if not wrong.all():
            out[key] = times[~wrong], values[~wrong]
    return out


# ending: (package, reader: see formats.py)
READERS = {".hea": ("wfdb", formats.Wfdb), ".vital": ("vitaldb", formats.Vital),
           ".edf": ("numpy", formats.Edf), ".h5": ("h5py", formats.Hdf5),
           ".hdf5": ("h5py", formats.Hdf5), ".csv": ("pandas", Table),
           ".parquet": ("pyarrow", Table)}
