"""Recorded files of any format -> one-minute windows of PPG, arterial pressure and numbers.

    from recordings import find_recordings, read_windows
    for found in find_recordings(["records/"]):
        for minutes in read_windows(found.path, fs=60, seconds=60, limits={"map": (20, 200)}):
            minutes.start_s, minutes.ppg, minutes.abp, minutes.numbers["map"]

The steps: find files, open a reader, choose channels by name and content, check the vitals,
resample, cut windows. Needs formats.py and tables.py, the readers of WFDB, VitalDB (.vital), EDF
and EDF+, HDF5, CSV and Parquet.
"""
import contextlib
import os
import re
import warnings
from dataclasses import replace
from typing import Callable, Dict, Iterator, List, NamedTuple, Optional

import numpy as np
from scipy import ndimage, signal

import formats
from formats import ENDINGS, MIN_WAVE_HZ, PRESSURE, RATE, Channel, RecordingError, plain_unit
from tables import Table, read_readings

# file ending -> reader (formats.py describes its interface)
READERS = {".hea": formats.Wfdb, ".vital": formats.Vital, ".edf": formats.Edf, ".h5": formats.Hdf5,
           ".hdf5": formats.Hdf5, ".csv": Table, ".parquet": Table}

# Names that monitors and archives give to waveforms and numbers, best first, in the form that
# `plain_name` returns: MIMIC-III and -IV (physionet.org), VitalDB (vitaldb.net/dataset), Philips
# IntelliVue (Data Export manual), GE, IEEE 11073. P1 to P4 may be any pressure, so are left out.
ARTERIAL = ("abp", "art", "artabp", "art1", "ar1", "ibp", "ibp1", "aobp", "ao", "aort", "radial",
            "rad", "artrad", "radart", "abprad", "radabp", "artradial", "radialart", "art2", "ar2",
            "fap", "fem", "bap", "uap", "artumb", "arterialpressure", "arterialbloodpressure",
            "arterialbp", "invasivebloodpressure", "systemic")
CUFF = ("nbp", "nibp", "noninv", "noninvasive", "noninvasivebloodpressure", "cuff")


def _numbers(kind, sites):
    return [*(site + ending for site in sites for ending in ENDINGS[kind]),
            *(ending + site for site in sites for ending in ENDINGS[kind] if len(ending) > 2)]


CHANNELS = {
    "ppg": ["pleth", "ppg", "plethr", "plethl", "plethwave", "spo2wave", "spo2waveform",
            "spo2pleth", "plethspo2", "spo2ppg", "ppgfinger", "fingerppg", "plethysmogram",
            "photoplethysmogram", "plethysmograph", "bvp", "bloodvolumepulse"],
    "abp": [site + ending for ending in ("", "wave", "waveform") for site in ARTERIAL],
    "map": [*_numbers("map", ARTERIAL), "map", "mbp", "mabp", "meanbp", "meanarterialpressure",
            "bpmean"],
    "sbp": [*_numbers("sbp", ARTERIAL), "sbp", "sys", "systolic", "systolicbp", "bpsys",
            "systolicbloodpressure"],
    "dbp": [*_numbers("dbp", ARTERIAL), "dbp", "dias", "dia", "diastolic", "diastolicbp",
            "diastolicbloodpressure"],
    "pp": ["pp", "pulsepressure"],
    "hr": ["hr", "heartrate", "ecghr", "hrecg", "ecgcardbeatrate", "pulse", "pulserate", "pr",
           "abphr", "arthr", "plethhr", "plethpulserate", "spo2hr", "spo2pr"],
    **{f"cuff_{kind}": _numbers(kind, CUFF) for kind in ENDINGS},
}
# Those read from recordings; PP is SBP - DBP.
NUMBERS = tuple(kind for kind in CHANNELS if kind not in ("ppg", "abp", "pp"))
SENTINELS = tuple(float(v) for n in (16, 24, 32) for v in (-2 ** (n - 1), 2 ** (n - 1) - 1))
MAX_MISSING = 0.1       # share of a window's arterial pressure; with more the window moves on
GAP_MARGIN_S = 1 / 60   # dropped next to a gap, where the filter sees an extrapolated signal
COPY_CORRELATION = 0.999    # of PPG and ABP; at most 0.83 in 766 real records
MIN_STRETCH_S = 0.25    # between two gaps; anything shorter holds no beat
PIECE = 36000           # output samples that are read at a time, to bound memory
MAX_AGE_S = 30 * 60.0   # how long a reading or a monitor's number may be held
MARGIN_S = 2.0          # read beyond a piece's ends: over twice the filter's half-length, 0.65 s
PROBE_S = 600.0         # read of each candidate, to tell waveforms from numbers
BLOCK_WINDOWS = 30      # per `Minutes`
UNIT_HINT = "if the unit is another: --unit {}=UNIT, such as --unit {}=kPa"
PRIVATE_LINE = "# private: contains true record names and paths; do not share"


class Found(NamedTuple):
    path: str
    typed: str          # what the user typed: `path` itself, or the folder that holds it
    name: str           # without ending, below the typed folder: 'patient1/waves'
    in_folder: bool


def find_recordings(inputs) -> List[Found]:
    """The recordings that `inputs` (files, WFDB records, folders) name, each once. Folders are
    searched recursively, through links. A closed folder is in the list; reading it raises."""
    finds = {}
    for typed in map(os.fspath, inputs):
        root = os.path.expanduser(typed)
        in_folder = os.path.isdir(root)
        names = (re.sub(r"(?i)\.dat$", ".hea", root), root, root + ".hea")
        paths = _recordings_in(root) if in_folder else list(filter(os.path.exists, names))[:1]
        if not paths:
            raise RecordingError(typed, "no such file or WFDB record, or no recording in this "
                                        f"folder ({', '.join(READERS)})")
        folder = root if in_folder else os.path.dirname(root)
        for path in paths:
            name = os.path.splitext(os.path.relpath(path, folder or "."))[0].replace(os.sep, "/")
            finds.setdefault(os.path.realpath(path), Found(path, typed, name, in_folder))
    return list(finds.values())


def _recordings_in(folder):
    paths, closed, seen = [], [], set()
    for parent, folders, files in os.walk(folder, onerror=closed.append, followlinks=True):
        if os.path.realpath(parent) in seen:
            folders.clear()
            continue
        seen.add(os.path.realpath(parent))
        folders.sort()
        paths += [os.path.join(parent, file) for file in sorted(files)
                  if os.path.splitext(file)[1].lower() in READERS and not file.startswith(".")
                  and not file.endswith(("_problems.csv", "_recordings.csv"))]      # ours
    # Not recordings: segments of WFDB records, and MIMIC's 3000003n, the numbers of 3000003.
    parts = {part for path in paths for part in files_of(path) if part != path}
    parts.update(path[:-len(".hea")] + "n.hea" for path in paths
                 if re.search(r"(\d{7}|-\d\d-\d\d)\.hea$", path))
    return [path for path in paths if path not in parts] + [error.filename for error in closed]


def files_of(path) -> List[str]:
    """The files of a recording: a WFDB header names data files and segments in its folder."""
    files = [path]
    for file in files:      # grows
        if file.lower().endswith(".hea") and os.path.isfile(file):
            with contextlib.suppress(RecordingError, OSError):  # reported when it is read
                header = formats.read_header(file)
                names = header.files + [name + ".hea" for name, _ in header.segments]
                files += [os.path.join(os.path.dirname(path), name) for name in names]
    return sorted(filter(os.path.exists, set(files)))


def public_name(found, number) -> str:
    """A recording's name in messages and logs: file names in folders often identify patients."""
    item, number_of = found[number], f" (recording {number + 1} of {len(found)})"
    return item.typed + number_of if item.in_folder else item.typed


@contextlib.contextmanager
def _reading(path):
    """Turn any error of a package into a RecordingError."""
    try:
        with warnings.catch_warnings(), np.errstate(all="ignore"):
            warnings.simplefilter("ignore")
            yield
    except RecordingError:
        raise
    except ModuleNotFoundError as error:
        raise RecordingError(path, f"reading such files needs the package {error.name}: "
                                   "pip install -r requirements-extra.txt") from None
    except Exception as error:  # noqa: BLE001 - packages raise a dozen kinds for malformed files
        raise RecordingError(path, f"cannot be read ({type(error).__name__})", error) from None


def open_reader(path, file_fs=None):
    """Open a file with the reader for its ending (`READERS`)."""
    if not os.path.isfile(path):
        raise RecordingError(path, "not a regular file, or a folder that cannot be opened")
    reader = READERS.get(os.path.splitext(path)[1].lower())
    if reader is None:
        raise RecordingError(path, f"not a recording ({', '.join(READERS)})")
    if file_fs is not None and not 0 < file_fs < 1e6:
        raise RecordingError(path, f"--fs {file_fs:g}: expected a number above 0")
    with _reading(path):
        return reader(path, file_fs)


def plain_name(name) -> str:
    """'SNUADC/ART' -> 'art', 'abp_mmhg' -> 'abp', 'Pleth [NU]' -> 'pleth', 'ART(M)' -> 'artm',
    'NOM_PRESS_BLD_ART_ABP' -> 'artabp'."""
    name = re.sub(r"#\d+$", "", name)          # formats.unique: the second of two 'ABP'
    unit = formats.unit_in_name(name)
    name = name[:name.rindex(unit)] if unit else name
    kept = "|".join(formats.NUMBER_WORDS)      # in brackets: 'ART(M)' is not 'ART'
    name = re.sub(rf"[\[(](?!\W*({kept})\W*([\])]|$))[^\])]*", "", name.lower()).rstrip("/_ )]")
    name = re.sub(r"[^a-z0-9]", "", name.rsplit("/", 1)[-1])
    return re.sub(r"^(nls)?(nom|mdc)(pressbld|pulsoxim)?", "", name)


def unit_factor(kind, unit, path, channel) -> float:
    """Factor from a channel's unit to mmHg or beats/min; a missing unit counts as these."""
    key, unit = kind.replace("cuff_", ""), plain_unit(unit)
    known = RATE if key == "hr" else PRESSURE if key in ("abp", "map", "sbp", "dbp", "pp") else {}
    if known and unit and unit not in known:
        raise RecordingError(
            path, f"the {kind.replace('_', ' ').upper()} channel's unit is not known; state it: "
            f"--unit CHANNEL=UNIT ({', '.join(known)})", f"{channel}: {unit}")
    return known.get(unit, 1.0)


def names_of(channels) -> set:
    """What --unit may call channels: their names in lower case, and their plain names."""
    return {name.lower() for name in channels} | {plain_name(name) for name in channels}


def stated_unit(units, name, own):
    """The unit of a channel in {name in lower case, or plain name: unit}; without one, its own."""
    return units.get(name.lower(), units.get(plain_name(name), own))


def nature(channel) -> str:
    """'wave', 'number' or 'unknown' (flat, empty or smooth), by rate and content."""
    if not channel.fs >= MIN_WAVE_HZ:
        return "number" if channel.fs > 0 else "unknown"
    x = channel.samples[np.isfinite(channel.samples)]
    seconds = channel.samples.size / channel.fs
    if seconds < 5 or not x.size:
        return "unknown"
    changes = np.count_nonzero(np.diff(x)) / max(x.size / channel.fs, 1.0)      # per second
    if x.size / seconds < 5 or 0 < changes < 5:
        return "number"
    n = int(2 * channel.fs)
    swings = np.ptp(x[:x.size // n * n].reshape(-1, n), axis=1)
    pulsates = swings.size and np.median(swings) > 0.25 * np.subtract(*np.percentile(x, [98, 2]))
    return "wave" if changes and pulsates else "unknown"


def choose(path, reader, wanted):
    """({kind: channel name}, {kind: reason for it, or for none}), chosen by name, then by content.
    wanted: {'abp': channel name, 'none' or None, 'ppg': …}."""
    channels, chosen, reasons = reader.channels, {}, {}
    plain = {name: plain_name(name) for name in channels}
    named = {kind: [name for alias in CHANNELS[kind] for name in channels if plain[name] == alias]
             for kind in ("ppg", "abp", *NUMBERS)}
    candidates = [name for name in set().union(*named.values()) if channels[name].fs > 0]
    with _reading(path):
        probed = reader.read(candidates, 0.0, PROBE_S)
    natures = {name: nature(probed.get(name, channel)) for name, channel in channels.items()}
    named["abp"] += [name for kind in ENDINGS for name in named[kind] if natures[name] == "wave"]
    for kind in ("ppg", "abp"):
        asked = (wanted.get(kind) or "").strip("/").lower()
        if not asked:
            name, reasons[kind] = _wave_channel(path, kind, reader, named, natures)
        else:
            reasons[kind] = option = f"--{kind}-channel"
            name = next((name for name, channel in channels.items() if name.lower() == asked
                         and not channel.fs < MIN_WAVE_HZ), None)
            if name is None and asked != "none":
                raise RecordingError(path, f"{option}: no such channel, or under {MIN_WAVE_HZ} "
                                           "samples/s; see --list-channels", ", ".join(channels))
        if name:
            chosen[kind] = name
    for kind in NUMBERS:
        names = [name for name in named[kind] if name not in chosen.values()
                 and channels[name].fs > 0]
        numbers = [name for name in names if natures[name] != "wave"]
        if numbers:
            chosen[kind], reasons[kind] = numbers[0], "usual name"
        elif names:
            reasons[kind] = "a channel with a usual name varies like a waveform"
    return chosen, reasons


def _wave_channel(path, kind, reader, named, natures):
    """(name or None, reason): pulsating channels before flat ones, then by name."""
    waves = [name for wanted in ("wave", "unknown") for name in named[kind]
             if natures[name] == wanted]
    same = [name for name in waves if plain_name(name) == plain_name(waves[0])]
    if len(same) > 1 and isinstance(reader, formats.Hdf5):      # perhaps several patients
        raise RecordingError(path, f"several datasets are named like the {kind.upper()}; name one: "
                                   f"--{kind}-channel PATH", ", ".join(same))
    if waves:
        usual = plain_name(waves[0]) in CHANNELS[kind]
        return waves[0], "usual name" if usual else "named like a number, but it pulsates"
    if not named[kind]:
        return None, "no channel with a usual name"
    return None, (f"numbers at {reader.channels[named[kind][0]].fs:g} samples/s, not a waveform "
                  f"(which needs {MIN_WAVE_HZ} or more)")


def check_vitals(readings, limits):
    """Check readings; return ({kind: (times_s, values)}, {kind: times_s of refused readings},
    {kind: what is wrong} for kinds without any plausible reading).

    readings: {kind: (times_s [n], values [n] as read, factor to mmHg or beats/min)}; limits:
    {vital: (low, high)} of patients. Refused: sentinels such as -32768 or 2**23 - 1, values outside
    their limits, and both values where the nearest within 2 s breaks DBP <= MAP <= SBP.
    """
    values, refused = {}, {}
    for kind, (_, raw, factor) in readings.items():
        low, high = limits.get(kind.replace("cuff_", ""), (-np.inf, np.inf))
        fine = np.isfinite(raw) & (raw * factor >= low) & (raw * factor <= high)
        refused[kind] = ~fine | np.isin(raw, SENTINELS)
        values[kind] = np.where(refused[kind], np.nan, raw * factor)
    for prefix in ("", "cuff_"):
        for low, high in (("dbp", "map"), ("map", "sbp"), ("dbp", "sbp")):
            low, high = prefix + low, prefix + high
            if low in readings and high in readings and len(readings[high][0]):
                t_low, t_high = readings[low][0], readings[high][0]
                near = np.searchsorted((t_high[:-1] + t_high[1:]) / 2, t_low, side="right")
                wrong = (np.abs(t_low - t_high[near]) < 2) & (values[low] > values[high][near])
                refused[low] |= wrong
                refused[high][near[wrong]] = True
    implausible = {}
    for kind, wrong in refused.items():
        if wrong.size and wrong.all():
            low, high = limits.get(kind.replace("cuff_", ""), (0, np.inf))
            median = np.median(readings[kind][1]) * readings[kind][2]
            expected = (f"{low:g} to {high:g}" if not low <= median <= high else
                        "DBP <= MAP <= SBP; are they swapped?")
            implausible[kind] = (f"implausible {kind.replace('_', ' ').upper()} (median "
                                 f"{median:.3g}, expected {expected})")
    return ({kind: (times[~refused[kind]], values[kind][~refused[kind]])
             for kind, (times, _, _) in readings.items()},
            {kind: readings[kind][0][wrong] for kind, wrong in refused.items()}, implausible)


def last_reading(times_s, values, at_s):
    """(values [n], ages in s [n]) of the last reading before each of at_s [n]; NaN if none."""
    number = np.searchsorted(times_s, at_s - 1e-6)
    return np.append(np.nan, values)[number], at_s - np.append(np.nan, times_s)[number]


def read_vitals(path, limits, units=None, start_time=None):
    """(*`check_vitals`, names of the columns in lower case) of a CSV or Parquet file with a column
    of times: numbers, or dates and clock times, which count from start_time. units: {column: unit},
    overrides the file's."""
    path = os.path.expanduser(os.fspath(path))
    with _reading(path):
        times, table, own_units = read_readings(path, start_time)
    given = {name.lower(): unit for name, unit in (units or {}).items()}
    plain = {plain_name(name): name for name in reversed(table.columns)}
    raw = {}
    for key in limits:
        aliases = CHANNELS.get(key, [key]) + CHANNELS.get(f"cuff_{key}", [])
        name = next((plain[alias] for alias in aliases if alias in plain), None)
        if name is not None:
            known = table[name].notna().to_numpy()
            if (np.diff(times[known]) <= 0).any():
                raise RecordingError(path, f"the times of {key.upper()} do not increase")
            raw[key] = (times[known], table[name].to_numpy(np.float64)[known],
                        unit_factor(key, stated_unit(given, name, own_units[name]), path, name))
    if not raw:
        raise RecordingError(path, "expected a time column (time_s: seconds from the recording's "
                                   "start) and, as numbers, any of " + ", ".join(limits))
    return (*check_vitals(raw, limits), names_of(table.columns))


class Minutes(NamedTuple):
    """n >= 1 windows. Missing samples are NaN: all of the ABP without an arterial line."""
    start_s: np.ndarray                     # [n] after the recording's start, multiples of 1/fs
    ppg: np.ndarray                         # [n, samples] float32, upright if `polarity` can tell
    abp: np.ndarray                         # [n, samples] float32, mmHg
    numbers: Dict[str, np.ndarray]          # {kind: [n] float32}: mean of the window's readings in
    # mmHg or beats/min; if it has none, the last one before it
    number_age_s: Dict[str, np.ndarray]     # {kind: [n] float32} at the window's start; 0 for means
    refused: Dict[str, np.ndarray]          # {kind: [n] int32}: number of refused readings


class Recorded:
    """An open recording. Iterating reads it and yields blocks of windows: `Minutes`.

    fs, seconds: rate and length of the windows. limits: {vital: (low, high)} in mmHg or beats/min.
    channels: {'abp': channel name or 'none', 'ppg': channel name}, instead of the usual names.
    units: {channel name: unit}, overrides the file's. file_fs: rate in Hz of a table's rows or of
    HDF5 datasets. polarity(ppg [n, samples], fs) -> -1 if the PPG is inverted, 1 if not, 0 if
    unsure; the first block with an answer decides.
    """

    def __init__(self, path, *, fs: float, seconds: float, limits, channels=None, units=None,
                 file_fs: Optional[float] = None, polarity: Optional[Callable] = None):
        self.path, self.fs, self.samples = os.fspath(path), fs, round(fs * seconds)
        self.limits, self.polarity, self.factors = limits, polarity, {}
        self.left_over_s = np.nan       # after iterating: s of the recording outside all windows
        self.reader = open_reader(self.path, file_fs)
        self.channels = self.reader.channels        # {name: Channel without samples}
        self.start_time = self.reader.start_time    # datetime or None
        self.notes = list(self.reader.notes)        # for the user, without text from the file
        self.implausible = {}   # after iterating: {kind: what is wrong} if no value is plausible
        # {kind: channel name} and {kind: reason}. Kinds: ppg, abp (waveforms), map, sbp, dbp, hr, …
        # (numbers of the arterial line or the monitor), cuff_map, cuff_sbp, cuff_dbp.
        self.chosen, self.reasons = choose(self.path, self.reader, channels or {})
        units = {name.lower(): unit for name, unit in (units or {}).items()}
        self.unknown_units = set(units) - names_of(self.channels)
        for kind, name in list(self.chosen.items()):
            unit = stated_unit(units, name, self.channels[name].unit)
            try:
                self.factors[kind] = unit_factor(kind, unit, self.path, name)
            except RecordingError:
                if kind == "abp" or "abp" not in self.chosen:
                    raise
                del self.chosen[kind]       # not needed with an arterial line
                self.notes.append(f"{kind}: not used, its unit is unknown (--unit CHANNEL=UNIT)")

    def __iter__(self) -> Iterator[Minutes]:
        if "ppg" not in self.chosen:
            raise RecordingError(self.path, f"no PPG: {self.reasons['ppg']}; see prepare.py --list-"
                                 "channels and --ppg-channel", "it has " + ", ".join(self.channels))
        with _reading(self.path):
            ppg, abp, readings = self._read()
            starts = cut(ppg, abp, self.samples)
            numbers = self._by_window(readings, starts / self.fs)
        self.left_over_s = max(0.0, self.reader.end_s - len(starts) * self.samples / self.fs)
        blocks = [slice(i, i + BLOCK_WINDOWS) for i in range(0, len(starts), BLOCK_WINDOWS)]
        if self._is_inverted(ppg, abp, [starts[block] for block in blocks]):
            ppg = -ppg
        self._check_pressure(abp)
        for block in blocks:
            rows = starts[block, None] + np.arange(self.samples)
            if block.start == 0:
                self._refuse_copy(ppg[rows], abp[rows])
            yield Minutes(starts[block] / self.fs, ppg[rows], abp[rows], *(
                {kind: values[block] for kind, values in group.items()} for group in numbers))

    def _is_inverted(self, ppg, abp, starts) -> bool:
        """Whether the PPG is inverted; notes on the polarity of both signals. starts: of blocks."""
        if not self.polarity:
            return False

        def sign(wave):     # of the first block with an answer
            signs = (self.polarity(wave[block[:, None] + np.arange(self.samples)], self.fs)
                     for block in starts)
            return next(filter(None, signs), 0)

        of_ppg, of_abp = sign(ppg), sign(abp)
        if of_ppg < 0:
            self.notes.append("the PPG is inverted (its pulses point down); turned")
        elif not of_ppg and starts:
            self.notes.append("whether the PPG is inverted cannot be told (its pulses rise as "
                              "slowly as they fall); if it is, the TPP is wrong")
        if of_abp < 0:
            self.notes.append("the ABP seems inverted (its pulses point down): check its unit, "
                              "gain and limits before you use these numbers")
        return of_ppg < 0

    def _check_pressure(self, abp):
        """Add an implausible ABP to those of the numbers, and notes on all that are needed."""
        low, high = self.limits.get("map", (-np.inf, np.inf))
        if np.isfinite(abp).any() and not low <= np.nanmedian(abp) <= high:
            self.implausible["abp"] = (f"implausible ABP (median {np.nanmedian(abp):.3g}, expected "
                                       f"{low:g} to {high:g} mmHg; see --abp-channel)")
        unneeded = (*ENDINGS, "hr") if "abp" in self.chosen else ()     # the waveform gives them
        hint = UNIT_HINT.format("CHANNEL", "ABP")
        self.notes += [f"{what}; {hint}" for kind, what in self.implausible.items()
                       if kind.replace("cuff_", "") not in unneeded]

    def _refuse_copy(self, ppg, abp):
        x, y = np.stack([ppg, abp])[:, np.isfinite(ppg) & np.isfinite(abp)]
        if y.size and np.ptp(y) > 1 and abs(np.corrcoef(x, y)[0, 1]) > COPY_CORRELATION:
            raise RecordingError(self.path, "its PPG is a copy of its ABP; see --list-channels")

    def _read(self):
        """(PPG [n], ABP [n] on the windows' grid, {kind: (times_s, values, factor)})."""
        names, reader = list(dict.fromkeys(self.chosen.values())), self.reader
        reader.read(names, 0.0, 0.0)    # .vital files know their end only then
        n = int((reader.end_s + 1e-6) * self.fs)
        waves = {kind: np.full(n, np.nan, np.float32) for kind in ("ppg", "abp")}
        numbers = {kind: [] for kind in self.chosen if kind not in waves}
        for k in range(0, n, PIECE):
            end = min(k + PIECE, n)
            read = reader.read(names, k / self.fs - MARGIN_S, end / self.fs + MARGIN_S)
            for kind, name in self.chosen.items():
                channel, x = read[name], read[name].samples
                if kind in waves:
                    x = np.where(np.isin(x, SENTINELS) | np.isinf(x), np.nan, x)
                    channel = replace(channel, samples=x * self.factors[kind])
                    waves[kind][k:end] = resample(channel, self.fs, end - k, k)
                else:
                    times = channel.start_s + (channel.first + np.arange(len(x))) / channel.fs
                    known = ~np.isnan(x) & (k <= times * self.fs) & (times * self.fs < end)
                    numbers[kind].append((times[known], x[known]))
        return waves["ppg"], waves["abp"], {
            kind: (*map(np.concatenate, zip(*pieces)), self.factors[kind])
            for kind, pieces in numbers.items() if pieces}

    def _by_window(self, readings, begin_s):
        """(numbers, number_age_s, refused) of `Minutes` for the windows that begin at begin_s."""
        numbers, ages, counts = {}, {}, {}
        edges_s = np.stack([begin_s, begin_s + self.samples / self.fs]) - 1e-6
        checked, refused, self.implausible = check_vitals(readings, self.limits)
        for kind, (times, values) in checked.items():
            counts[kind] = np.diff(np.searchsorted(refused[kind], edges_s), axis=0)[0].astype("i4")
            first, end = np.searchsorted(times, edges_s)
            total = np.append(0.0, np.cumsum(values))
            mean = (total[end] - total[first]) / np.maximum(end - first, 1)
            last, age_s = last_reading(times, values, begin_s)
            numbers[kind] = np.where(end > first, mean, last).astype("f4")
            ages[kind] = np.where(end > first, 0.0, age_s).astype("f4")
        return numbers, ages, counts


read_windows = Recorded     # for minutes in read_windows(path, …)


def cut(ppg, abp, samples):
    """[N] int64: first samples of windows of `samples`. They follow one another and never span a
    gap of the PPG. If a window lacks more than MAX_MISSING of its arterial pressure, it moves to
    where the pressure returns, provided that a full window of both follows."""
    starts, missing = [], ~np.isfinite(abp)
    for (stretch,) in ndimage.find_objects(ndimage.label(np.isfinite(ppg))[0]):
        at, end = stretch.start, stretch.stop
        while at + samples <= end:
            lacking = missing[at:at + samples]
            if not lacking[-1] and lacking.mean() > MAX_MISSING:
                back = at + np.flatnonzero(lacking)[-1] + 1     # where the pressure returns
                if back + samples <= end and missing[back:back + samples].mean() <= MAX_MISSING:
                    at = back
            starts.append(at)
            at += samples
    return np.array(starts, np.int64)


def resample(channel: Channel, fs_out: float, n_out: int, k_first: int = 0) -> np.ndarray:
    """[n_out] float32: the channel at (k_first + i) / fs_out seconds; NaN in gaps.

    Works for any ratio of rates, without drift: integer oversampling (to at least 4 x fs_out) with
    a linear-phase low-pass (flat up to 0.8 of the lower Nyquist frequency, -80 dB at it), then a
    cubic spline at the exact times. Each stretch between gaps is resampled alone, extended by odd
    reflection, and loses GAP_MARGIN_S at each gap; stretches below MIN_STRETCH_S are dropped.
    """
    out = np.full(n_out, np.nan, dtype=np.float32)
    fs, samples, offset = channel.fs, channel.samples, channel.first
    up = int(np.ceil(4 * fs_out / fs))
    nyquist = min(fs, fs_out) / 2
    n_taps, beta = signal.kaiserord(80, 0.2 * nyquist / (fs * up / 2))
    half = n_taps // 2 + 1
    taps = signal.firwin(2 * half + 1, 0.9 * nyquist, window=("kaiser", beta), fs=fs * up)
    pad = half // up + 4    # samples: half the filter, plus a few for the spline
    for (stretch,) in ndimage.find_objects(ndimage.label(np.isfinite(samples))[0]):
        first, end = stretch.start + offset, stretch.stop + offset
        # A sample extends half a period to either side.
        start_s = channel.start_s + (first - 0.5) / fs + (GAP_MARGIN_S if first else 0)
        end_s = channel.start_s + (end - 0.5) / fs - (
            GAP_MARGIN_S if end < offset + samples.size else 0)
        k = max(k_first, int(np.ceil(start_s * fs_out - 1e-6)))
        k_end = min(k_first + n_out, int(np.ceil(end_s * fs_out - 1e-6)))
        if (end - first) / fs < MIN_STRETCH_S or k >= k_end:
            continue
        at = (np.arange(k, k_end) / fs_out - channel.start_s) * fs      # in samples of the channel
        if fs == fs_out and float(channel.start_s * fs).is_integer():       # the same grid
            values = samples[np.rint(at).astype(np.int64) - offset]
        else:
            left, right = max(first, int(at[0]) - 2 * pad), min(end, int(at[-1]) + 2 * pad + 1)
            x = np.pad(samples[left - offset:right - offset], pad, "reflect", reflect_type="odd")
            fine = (signal.oaconvolve(x, taps) if up == 1 else      # by FFT: many taps
                    signal.upfirdn(up * taps, x, up))[half:]        # zero phase
            at = (at - left + pad) * up
            values = ndimage.map_coordinates(fine, [at], order=3, mode="mirror")
        out[k - k_first:k_end - k_first] = values
    return out


def add_channel_options(parser):
    """Add --abp-channel, --ppg-channel, --fs and --unit; return their group's add_argument."""
    add = parser.add_argument_group("channels").add_argument
    add("--abp-channel", metavar="NAME",
        help="arterial pressure (default: found by its usual names; none: ignore it)")
    add("--ppg-channel", metavar="NAME", help="PPG (default: found by its usual names)")
    add("--fs", type=float, metavar="HZ", help="rate of evenly spaced table rows (their times are "
        "then ignored), or of HDF5 files that do not state it")
    add("--unit", action="append", default=[], metavar="CHANNEL=UNIT",
        help="unit of a channel or of a column of --vitals, if the file states none or a wrong "
        "one; may be repeated")
    return add


def channel_options(options):
    """Arguments of `read_windows` from the options of `add_channel_options`."""
    units = dict(text.rpartition("=")[::2] for text in options.unit)
    if "" in units:
        raise RecordingError("--unit", "expected CHANNEL=UNIT, such as ABP=kPa")
    channels = {"abp": options.abp_channel, "ppg": options.ppg_channel}
    return {"channels": channels, "units": units, "file_fs": options.fs}
