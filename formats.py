"""One reader for each format of recorded files. Used by recordings.py; needs no other file of ours.

A reader is opened with (path, file_fs) and has
    channels    {name: Channel without samples}, names unique and printable
    end_s       the recording's length; start_time (datetime or None); notes [str]
    read(names, start_s, stop_s) -> {name: Channel} with the samples of that span, where there are
                any; start_s must not be less than in the call before
Files are expected to be damaged now and then, not forged. WFDB headers open nothing outside their
own folder, and nothing larger than a file of its size can hold is read.
"""
import contextlib
import datetime
import gzip
import io
import os
import re
import tempfile
import zlib
from dataclasses import dataclass, replace
from typing import List, NamedTuple

import h5py
import numpy as np

PRESSURE = {"mmhg": 1.0, "torr": 1.0, "kpa": 7.50062, "cmh2o": 0.735559, "hpa": 0.750062,
            "mbar": 0.750062, "psi": 51.7149, "pa": 0.00750062, "bar": 750.062}
RATE = {"bpm": 1.0, "/min": 1.0, "1/min": 1.0, "min-1": 1.0, "beats/min": 1.0, "beat/min": 1.0,
        "beatpermin": 1.0, "beatsperminute": 1.0, "hz": 60.0, "1/s": 60.0, "/s": 60.0}
NO_UNIT = ("nu", "au", "arb", "arbunits", "mv", "v", "uv", "µv", "%", "adc", "adu", "counts",
           "raw", "1", "nd", "-")
MIN_WAVE_HZ = 40        # below it the upstroke of a beat has too few samples to time it
MAX_GAPS_S = 7 * 86400.0    # in one file; more is a slip in its times, not a recording
JITTER_S = 0.01         # by which a block's time stamp may be off: no gap
NUMERICS_FS = 1.0       # Hz: of a .vital file's numbers, which come when the monitor has a new one
# The samples that a file may promise per channel: 2**25 (3 days at 125 Hz, gaps included), and 32
# for each of its bytes (8 bits compressed 32-fold).
FREE_SAMPLES, SAMPLES_PER_BYTE = 1 << 25, 32
MAX_OBJECTS = 10000     # looked at in an HDF5 file


# What stands in brackets and is no unit: the kind of number, and the site.
NUMBER_WORDS = ("mean", "m", "mbp", "map", "avg", "average", "sys", "s", "sbp", "systolic", "syst",
                "dias", "dia", "d", "dbp", "diastolic", "diast", "hr", "pr", "rate", "max", "min",
                "pp", "wave", "waveform")
IN_NAMES = (*NUMBER_WORDS, "left", "right", "l", "r", "a", "b", "radial", "rad", "femoral", "fem",
            "brachial", "aortic", "umbilical", "finger", "ear", "toe", "ir", "red", "green",
            "invasive", "arterial", "art", "abp", "ibp", "ppg", "pleth")


class RecordingError(ValueError):
    """Something is wrong with a recorded file, in one line.

    `what` names nothing from inside the file and no path; `detail` may.
    """

    def __init__(self, path, what, detail=""):
        super().__init__(path, what, detail)    # all three are args, so that it can be pickled
        self.path, self.what, self.detail = path, what, printable(detail)

    def __str__(self):
        return printable(f"{self.path}: {self.what}" + (f" ({self.detail})" if self.detail else ""))


@dataclass
class Channel:
    samples: np.ndarray     # [n] float64, NaN where nothing was recorded; empty if only listed
    fs: float               # Hz; NaN if not known
    unit: str
    start_s: float = 0.0    # time of sample number 0
    first: int = 0          # number of samples[0]


def printable(text) -> str:
    """In one line, without what a terminal would take for a command."""
    return "".join(c if c.isprintable() else "?" for c in " ".join(str(text).split()))


def plain_unit(text) -> str:
    """'[mm Hg]' -> 'mmhg', 'NOM_DIM_MMHG' -> 'mmhg', 'cmH₂O' -> 'cmh2o', 'Beats/min' unchanged."""
    text = re.sub(r"[\s\[\]()._]", "", str(text).lower().replace("₂", "2").replace("⁻¹", "-1"))
    return re.sub(r"^(nom|mdc)dimx?", "", text).replace("μ", "µ")


def unit_in_name(name, known=None) -> str:
    """The unit in a name: 'abp_mmhg', 'ABP [mmHg]', 'pressure (kPa)', 'HR, bpm'; '' if none. Other
    text in brackets is a unit, too, which nobody knows, unless it is in IN_NAMES. known: the units
    to look for (default: of pressures and rates)."""
    only_known, known = known is not None, known or {**PRESSURE, **RATE, **dict.fromkeys(NO_UNIT)}
    inside = re.findall(r"[\[(](.*?)[\])]?(?=\s*[\[(]|$)", name)[::-1]
    for text in inside:
        if plain_unit(text) in known:
            return text.strip()
    tail = re.split(r"[\s_,.:]+|(?<=\w)\s*/\s*(?=mm|kpa)", name.strip())[-1]
    if tail != name.strip() and plain_unit(tail) in known and plain_unit(tail) not in NO_UNIT:
        return tail
    if name.lower().endswith("mmhg"):
        return name[-4:]
    unknown = [text for text in inside if re.fullmatch(r"[^\s\d][^\s]{0,11}", text)
               and text.lower().strip(".") not in IN_NAMES]
    return unknown[0] if unknown and not only_known else ""


def listed(fs, unit="", start_s=0.0):
    return Channel(np.empty(0), float(fs), printable(unit), start_s)


def unique(names) -> List[str]:
    """Printable names; a second 'ABP' becomes 'ABP#2'."""
    names = [printable(name).strip() for name in names]
    return [name if name not in names[:i] else f"{name}#{names[:i].count(name) + 1}"
            for i, name in enumerate(names)]


def check_size(path, n_samples, n_bytes):
    limit = FREE_SAMPLES + SAMPLES_PER_BYTE * n_bytes
    if n_samples > limit:
        raise RecordingError(path, f"promises {n_samples:,} samples; a file of its size may hold "
                                   f"{limit:,} at most")


def span(start_s, stop_s, fs, n):
    """(first, end) of the samples 0 to n that lie in start_s <= t < stop_s."""
    return tuple(int(np.clip(np.ceil(t * fs - 1e-6), 0, n)) for t in (start_s, stop_s))


# --------------------------------------------------------------------------------------------- WFDB

class Header(NamedTuple):
    fs: float               # Hz, of the frames
    units: List[str]        # of the signals; '' if none is stated, 'uncalibrated' without a gain
    formats: List[str]
    data_files: List[str]
    segments: List[tuple]   # (name, frames)
    frames: int             # 0 if the header does not say


def read_header(path) -> Header:
    """What a WFDB header says, checked: it names nothing but files in its own folder.
    https://www.physionet.org/physiotools/wag/header-5.htm"""
    with open(path, encoding="utf-8", errors="replace") as file:
        text = file.read(1 << 24)   # 16 MB of header is a multi-segment record of years
    lines = [line.split("#")[0].split() for line in text.splitlines()]
    record, *others = [words for words in lines if words] or [[]]
    if len(record) < 2:
        raise RecordingError(path, "not a WFDB header: no record line")
    if any(words[0] in (".", "..") or re.search(r"[/\\:\x00]", words[0]) for words in others):
        raise RecordingError(path, "this WFDB header names a data file outside its own folder")
    try:
        fs = float(re.split(r"[/(]", record[2])[0]) if len(record) > 2 else 250.0
        frames = int(record[3]) if len(record) > 3 else 0
        n_lines = int((record[0].split("/") + record[1:])[1])   # segments or signals
        if not 0 < fs < 1e6 or frames < 0 or n_lines != len(others):
            raise ValueError
        if "/" in record[0]:
            segments = [(words[0], max(0, int(words[1]))) for words in others]
            return Header(fs, [], [], [], segments, sum(n for _, n in segments))
        formats = [re.match(r"\d+", words[1]).group() for words in others]
    except (ValueError, IndexError, AttributeError):
        raise RecordingError(path, "not a WFDB header: unreadable number of signals, frequency, "
                                   "length or format") from None
    gains = [words[2] if len(words) > 2 else "0" for words in others]
    units = ["uncalibrated" if re.match(r"0*\.?0*([(/]|$)", gain) else
             gain.partition("/")[2] for gain in gains]
    files = sorted({words[0] for words in others if words[0] != "~"})
    return Header(fs, units, formats, files, [], frames)


# Bytes per sample (https://www.physionet.org/physiotools/wag/signal-5.htm); FLAC's are not known.
WFDB_BYTES = {"8": 1, "16": 2, "24": 3, "32": 4, "61": 2, "80": 1, "160": 2, "212": 1.5,
              "310": 4 / 3, "311": 4 / 3}


class Wfdb:
    """WFDB records of one or many segments, joined here: wfdb 4.3 fails on gaps with several rates.
    """

    def __init__(self, path, file_fs=None):
        import wfdb

        self.path, self.notes, self.kept = path, [], {}
        folder = os.path.dirname(path)
        header = read_header(path)
        self.parts, start = [], 0       # (path of a header, first frame, frames)
        for name, frames in header.segments or [(path, None)]:
            segment = os.path.join(folder, name + ".hea") if header.segments else path
            if name != "~":
                if not os.path.isfile(segment):
                    raise RecordingError(path, "the header of one of its segments is missing", name)
                self.parts.append([segment, start, frames])
            start += frames or 0
        self.fs, self.frames, self.channels, self.start_time = header.fs, start, {}, None
        self.names, n_bytes = [], 0
        for part in self.parts:
            inner, record = self._check(part[0]), wfdb.rdheader(self._base(part[0]))
            self.start_time = self.start_time or record.base_datetime
            names = unique(record.sig_name or [])
            self.names.append(names)
            for name, per_frame, unit in zip(names, record.samps_per_frame or [], inner.units):
                self.channels.setdefault(name, listed(self.fs * per_frame, unit))
                if self.channels[name].fs != self.fs * per_frame:
                    raise RecordingError(path, "a channel's rate changes between segments", name)
                self.channels[name].unit = self.channels[name].unit or unit
            for file in inner.data_files:
                size = os.path.getsize(os.path.join(folder, file))
                needed = inner.frames * sum(
                    WFDB_BYTES.get(form, 0) * per_frame for form, per_frame, own in
                    zip(record.fmt, record.samps_per_frame, record.file_name) if own == file)
                if size < int(needed):
                    raise RecordingError(path, "its data file is shorter than its header promises: "
                                               f"{size:,} of {int(needed):,} bytes", file)
                n_bytes += size
            if part[2] is None:     # one segment, whose length the header may leave to its data
                whole = record if record.sig_len else wfdb.rdrecord(
                    self._base(part[0]), sampto=None, physical=False, smooth_frames=False)
                part[2] = self.frames = int(whole.sig_len)
        if not self.channels:
            raise RecordingError(path, "this WFDB record has no signals")
        per_frame = max(channel.fs for channel in self.channels.values()) / self.fs
        check_size(path, int(self.frames * per_frame), n_bytes)
        self.end_s = self.frames / self.fs

    def _check(self, path):
        header = read_header(path)
        if header.segments:
            raise RecordingError(self.path, "a segment of this record has segments itself")
        for name in header.data_files:
            file = os.path.join(os.path.dirname(path), name)
            if not os.path.isfile(file):
                raise RecordingError(self.path, "its data file is missing, or not a regular file",
                                     name)
        return header

    def _base(self, path):
        """The record's name for wfdb: absolute, so that it never looks in the network."""
        if path.endswith(".hea"):
            return os.path.abspath(path)[:-4]
        if not hasattr(self, "folder"):     # wfdb knows .hea alone
            self.folder = tempfile.TemporaryDirectory()
        for name in os.listdir(os.path.dirname(path) or "."):
            link = os.path.join(self.folder.name, re.sub(r"(?i)\.hea$", ".hea", name))
            if not os.path.lexists(link):
                os.symlink(os.path.abspath(os.path.join(os.path.dirname(path), name)), link)
        return os.path.join(self.folder.name, os.path.splitext(os.path.basename(path))[0])

    def read(self, names, start_s, stop_s):
        first, end = span(start_s, stop_s, self.fs, self.frames)
        out = {}
        for name in names:
            per_frame = round(self.channels[name].fs / self.fs)
            out[name] = replace(self.channels[name], first=first * per_frame,
                                samples=np.full((end - first) * per_frame, np.nan))
        for (path, start, frames), in_part in zip(self.parts, self.names):
            a, b = max(start, first), min(start + frames, end)
            wanted = [name for name in names if name in in_part]
            if a < b and wanted:
                for name, samples in self._part(path, in_part, wanted, a - start, b - start,
                                                frames).items():
                    per_frame = round(self.channels[name].fs / self.fs)
                    if len(samples) != (b - a) * per_frame:
                        raise RecordingError(self.path, "a segment, or its data file, is shorter "
                                                        "than the header promises")
                    at = (a - first) * per_frame
                    out[name].samples[at:at + len(samples)] = samples
        return out

    def _part(self, path, in_part, wanted, a, b, frames):
        """{name: samples of the frames a to b of a segment}, in the unit of the channel."""
        import wfdb

        header = read_header(path)
        numbers = [in_part.index(name) for name in wanted]
        # wfdb reads no part of a record whose header states no length, and of these formats a wrong
        # one: 8 holds differences, which it sums up from where it begins to read.
        whole = not header.frames or {"8", "310", "311"}.intersection(header.formats)
        key = (path, tuple(wanted))
        if not whole or key not in self.kept:
            record = wfdb.rdrecord(     # smooth_frames=True would average fast channels away
                self._base(path), 0 if whole else a, None if whole else b, channels=numbers,
                smooth_frames=False)
            read = {}
            for name, i, samples in zip(wanted, numbers, record.e_p_signal):
                read[name] = np.asarray(samples, np.float64) * self._per_unit(
                    name, header.units[i])
            if not whole:
                return read
            self.kept = {key: read}
        per_frame = {name: round(self.channels[name].fs / self.fs) for name in wanted}
        return {name: samples[a * per_frame[name]:b * per_frame[name]]
                for name, samples in self.kept[key].items()}

    def _per_unit(self, name, unit):
        """From a segment's unit to the channel's."""
        unit, target = (plain_unit(text) for text in (unit, self.channels[name].unit))
        if unit == target or not unit:
            return 1.0
        if unit in PRESSURE and target in PRESSURE:
            return PRESSURE[unit] / PRESSURE[target]
        if unit in PRESSURE or target in PRESSURE:
            raise RecordingError(self.path, "a channel's unit changes between segments", name)
        return 1.0


# ------------------------------------------------------------------------------------------ VitalDB

class Vital:
    """.vital files, which are compressed as a whole and so read at once, kept in float32."""

    def __init__(self, path, file_fs=None):
        self.path, self.notes, self.kept = path, [], {}
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
        file = self._file(header_only=True)
        self.start_s, self.start_time = file.dtstart, None
        with contextlib.suppress(ValueError, OverflowError, OSError):
            self.start_time = datetime.datetime.fromtimestamp(file.dtstart)
        self.tracks = dict(zip(unique(file.trks), file.trks))
        self.channels = {
            name: listed(file.trks[own].srate if file.trks[own].type == 1 else NUMERICS_FS,
                          file.trks[own].unit)
            for name, own in self.tracks.items() if file.trks[own].type in (1, 2)}
        self.end_s = max(0.0, float(file.dtend - file.dtstart))

    def _file(self, **options):
        import vitaldb

        with contextlib.redirect_stdout(io.StringIO()) as printed:
            file = vitaldb.VitalFile(os.path.abspath(self.path), **options)     # never a URL
        if printed.getvalue():  # it prints what goes wrong, and goes on with what it has
            raise RecordingError(self.path, "vitaldb cannot read this file", printed.getvalue())
        return file

    def read(self, names, start_s, stop_s):
        missing = [name for name in names if name not in self.kept]
        if missing:
            file = self._file(track_names=[self.tracks[name] for name in missing])
            self.kept.update((name, self._join(file, name)) for name in missing)
            ends = [c.start_s + c.samples.size / c.fs for c in self.kept.values() if c.samples.size]
            self.end_s = max(ends, default=0.0)
        out = {}
        for name in names:
            channel = self.kept[name]
            first, end = span(start_s - channel.start_s, stop_s - channel.start_s, channel.fs,
                               channel.samples.size)
            out[name] = replace(channel, first=first,
                                samples=channel.samples[first:end].astype(np.float64))
        return out

    def _join(self, file, name):
        track, channel = file.trks[self.tracks[name]], self.channels[name]
        starts_s = np.array([record["dt"] for record in track.recs]) - self.start_s
        blocks = [np.atleast_1d(record["val"]) for record in track.recs]
        if not blocks:
            return channel
        if not 1e-3 < channel.fs < 1e6:
            raise RecordingError(self.path, "a track has no sampling rate", name)
        if track.type == 2:
            starts_s = np.rint(starts_s * NUMERICS_FS) / NUMERICS_FS
        elif track.fmt > 2:     # integers; in "packed" files an extreme one stands for a gap
            limits = np.iinfo(blocks[0].dtype)
            gap = (limits.min or limits.max) if getattr(file, "packed", False) else None
            blocks = [np.where(block == gap, np.nan, block * track.gain + track.offset)
                      for block in blocks]
        samples, fs = join_blocks(self.path, starts_s, blocks, channel.fs)
        start_s = float(starts_s.min())
        if not 0 <= start_s <= MAX_GAPS_S:
            raise RecordingError(self.path, "a channel starts more than a week from the recording")
        return replace(channel, samples=samples.astype(np.float32), fs=fs, start_s=start_s)


def join_blocks(path, starts_s, blocks, fs):
    """(samples, fs): blocks of samples, nominally at fs, at their times; NaN between them.

    Time stamps are rounded and jitter, clocks drift: blocks that follow one another are counted,
    their mean over all gives the true rate, and only the first block after a gap is placed by its
    stamp. Where the clock is unsteady, each block is placed by its own.
    """
    lengths = np.array([len(block) for block in blocks])
    order = np.argsort(starts_s, kind="stable")
    starts_s, lengths = np.asarray(starts_s, np.float64)[order], lengths[order]
    if not np.isfinite(starts_s).all():
        raise RecordingError(path, "a time stamp is not a number")
    before, steps, period = np.cumsum(lengths) - lengths, np.diff(starts_s), 1 / fs
    jumps = steps - lengths[:-1] * period > max(JITTER_S, 1.5 / fs)
    gaps_s = float(steps[jumps].sum())
    if gaps_s > MAX_GAPS_S:
        raise RecordingError(path, f"jumps in time of {gaps_s / 86400:.3g} days together")
    if not jumps.all():
        measured = steps[~jumps].sum() / lengths[:-1][~jumps].sum()
        late = abs(measured / period - 1) * (before[-1] + lengths[-1])  # samples, at the end
        if late > 0.1 and measured > period / 2:
            period = measured
    first = np.concatenate(([0], np.flatnonzero(jumps) + 1))    # of every run
    places = np.rint((starts_s[first] - starts_s[0]) / period).astype(np.int64)
    positions = np.repeat(places - before[first], np.diff(np.append(first, starts_s.size))) + before
    late_s = np.abs(positions * period - (starts_s - starts_s[0]))
    measured = float(f"{1 / period:.10g}")
    if abs(fs / measured - 1) > 1e-3 or late_s.max() > 2 * JITTER_S + 2 / fs:
        measured, positions = fs, np.rint((starts_s - starts_s[0]) * fs).astype(np.int64)
    n = int((positions + lengths).max())
    check_size(path, n, os.path.getsize(path))
    samples = np.full(n, np.nan)
    for position, i in zip(positions, order):
        samples[position:position + len(blocks[i])] = blocks[i]
    return samples, measured


# ---------------------------------------------------------------------------------------------- EDF

# First byte and width of a signal's label, unit, physical and digital limits, samples per record.
EDF_FIELDS = ((0, 16), (96, 8), (104, 8), (112, 8), (120, 8), (128, 8), (216, 8))


class Edf:
    """EDF, EDF+C and EDF+D (https://www.edfplus.info/specs/edfplus.html).

    Read here, as a matrix of int16: pyedflib refuses a whole file for one odd field of a channel
    that nobody wants, and EDF+D at all (https://github.com/holgern/pyedflib/issues/63).
    """

    def __init__(self, path, file_fs=None):
        self.path, self.notes, self.start_time = path, [], None
        with open(path, "rb") as file:
            header = file.read(256)
            if header[:1] == b"\xff":
                raise RecordingError(path, "a BDF file (24 bits); export it as EDF")
            try:
                n_records, self.seconds, n = (int(header[236:244]), float(header[244:252]),
                                              int(header[252:256]))
                text = file.read(256 * max(n, 0))
                fields = [[text[first * n + width * i:first * n + width * (i + 1)].decode(
                    "latin-1").strip() for i in range(n)] for first, width in EDF_FIELDS]
                sizes = np.array(fields[6], float).astype(np.int64)
                if n < 1 or not 0 <= self.seconds < 1e6 or (sizes < 0).any():
                    raise ValueError
            except ValueError:
                raise RecordingError(path, "not an EDF file: unreadable header") from None
        day = re.match(rb"(\d\d)\D(\d\d)\D(\d\d)(\d\d)\D(\d\d)\D(\d\d)", header[168:184])
        if day:
            d, m, y, *clock = map(int, day.groups())
            with contextlib.suppress(ValueError):
                self.start_time = datetime.datetime(y + (1900 if y > 84 else 2000), m, d, *clock)
        held = (os.path.getsize(path) - 256 * (1 + n)) // max(1, 2 * int(sizes.sum()))
        if n_records < 0:       # while it is being written
            n_records = held
        if held < n_records:
            raise RecordingError(path, "this EDF file is shorter than its header promises: "
                                       f"{held} of {n_records} data records")
        self.records = np.memmap(path, "<i2", "r", 256 * (1 + n), (n_records, int(sizes.sum()))
                                 ) if n_records else np.empty((0, int(sizes.sum())), "<i2")
        ends = np.cumsum(sizes)
        notes = [i for i in range(n) if fields[0][i] in ("EDF Annotations", "BDF Annotations")]
        waves = [i for i in range(n) if i not in notes and sizes[i]]
        if not waves or not self.seconds or not n_records:
            raise RecordingError(path, "this EDF file holds no signals")
        self.channels, self.columns = {}, {}
        for name, i in zip(unique(fields[0][i] for i in waves), waves):
            self.channels[name] = listed(sizes[i] / self.seconds, fields[1][i])
            self.columns[name] = (slice(int(ends[i] - sizes[i]), int(ends[i])),
                                  [field[i] for field in fields[2:6]])
        self.starts_s = self.seconds * np.arange(n_records)
        if header[192:197] == b"EDF+D":
            stamps = [re.match(rb"[+-]\d+(\.\d*)?(?=[\x14\x15])", row.tobytes())
                      for row in self.records[:, int(ends[notes[0]] - sizes[notes[0]]):]
                      ] if notes else [None]
            if not all(stamps):
                raise RecordingError(path, "this EDF+D file has a data record without its time")
            self.starts_s = np.array([float(stamp.group()) for stamp in stamps])
            self.starts_s -= self.starts_s.min()
            if np.ptp(self.starts_s) > n_records * self.seconds + MAX_GAPS_S:
                raise RecordingError(path, "gaps of more than a week")
        self.end_s = float(self.starts_s.max()) + self.seconds

    def read(self, names, start_s, stop_s):
        out = {}
        here = np.flatnonzero((self.starts_s > start_s - self.seconds) & (self.starts_s < stop_s))
        for name in names:
            channel, (column, limits) = self.channels[name], self.columns[name]
            try:
                low, high, code_low, code_high = map(float, limits)
                slope = (high - low) / (code_high - code_low)
            except (ValueError, ZeroDivisionError):
                raise RecordingError(self.path, "the physical or digital limits of a wanted "
                                                "channel are unreadable", name) from None
            first, end = span(start_s, stop_s, channel.fs, round(self.end_s * channel.fs))
            samples = np.full(end - first, np.nan)
            size = column.stop - column.start
            for i in here:
                at = int(round(self.starts_s[i] * channel.fs)) - first
                a, b = max(at, 0), min(at + size, end - first)
                if a < b:
                    samples[a:b] = self.records[i, column][a - at:b - at]
            out[name] = replace(channel, first=first, samples=low + (samples - code_low) * slope)
        return out


# --------------------------------------------------------------------------------------------- HDF5

class Hdf5:
    """One-dimensional datasets of numbers ([1, n], too, as MATLAB writes them), named by their
    paths. The rate is an attribute fs or sampling_rate of the dataset or a group above it, or
    file_fs; integers may have the attributes scale_factor and add_offset, gain and offset (or
    baseline), and _FillValue."""

    def __init__(self, path, file_fs=None):
        self.path, self.notes, self.start_time = path, [], None
        self.channels, self.scales = {}, {}
        with h5py.File(path, "r") as file:
            if "layout_version" in file.attrs:
                raise RecordingError(path, "holds prepared segments of this project, no recording")
            found, met = {}, []

            def look(name, item):   # visititems follows hard links only, each object once
                met.append(name)
                if (isinstance(item, h5py.Dataset) and item.shape and item.dtype.kind in "fiu"
                        and item.size == max(item.shape) > 0
                        and not item.external and not item.is_virtual):
                    found[name] = item
                return len(met) > MAX_OBJECTS or None   # anything but None ends the visit

            if file.visititems(look):
                raise RecordingError(path, f"more than {MAX_OBJECTS} objects: not one recording")
            if not found:
                raise RecordingError(path, "no one-dimensional dataset of numbers")
            self.places = dict(zip(unique(found), found))
            self.sizes = {}
            for name, place in self.places.items():
                item = found[place]
                rate = file_fs or _attribute(item, "fs", "sampling_rate", "sample_rate", above=True)
                unit = _attribute(item, "unit", "units")
                self.channels[name] = listed(rate or np.nan, "" if unit is None else unit)
                self.sizes[name] = int(item.size)
                self.scales[name] = self._scale(item)
                n_chunk = np.prod(item.chunks or 0, dtype=float)    # is unpacked as a whole
                check_size(path, int(max(item.size, n_chunk)), item.id.get_storage_size())
        self.end_s = max((self.sizes[name] / channel.fs for name, channel in self.channels.items()
                          if channel.fs > 0), default=0.0)

    def _scale(self, item):
        """(factor, offset, divide): value = raw * factor + offset, or (raw - offset) / factor."""
        fill = _attribute(item, "_FillValue", "missing_value")
        factor, offset = _attribute(item, "scale_factor"), _attribute(item, "add_offset")
        divide = False
        if factor is None and offset is None:
            offset = _attribute(item, "offset", "baseline", "adc_zero")
            factor = _attribute(item, "gain", "adc_gain", "adu_per_unit")
            divide = factor is not None and (
                _attribute(item, "gain") is None or abs(float(factor)) >= 1)
        if item.dtype.kind == "f" or factor is None and offset is None:
            return fill, None
        return fill, (float(1 if factor is None else factor), float(offset or 0), divide)

    def read(self, names, start_s, stop_s):
        out = {}
        with h5py.File(self.path, "r") as file:
            for name in names:
                channel, item = self.channels[name], file[self.places[name]]
                if not 0 < channel.fs < 1e6:
                    raise RecordingError(self.path, "a dataset has no attribute fs or "
                                                    "sampling_rate; give the rate: --fs HZ", name)
                first, end = span(start_s, stop_s, channel.fs, self.sizes[name])
                part = tuple(slice(first, end) if n == item.size else 0 for n in item.shape)
                raw = np.asarray(item[part if item.size > 1 else ()]).reshape(-1)
                fill, scale = self.scales[name]
                samples = raw.astype(np.float64)
                if scale:
                    factor, offset, divide = scale
                    samples = (samples - offset) / factor if divide else samples * factor + offset
                if fill is not None:
                    samples[raw == fill] = np.nan
                out[name] = replace(channel, first=first, samples=samples)
        return out


def _attribute(item, *names, above=False):
    """A single number or text; None if there is none. above: of the groups above, too."""
    while True:
        for name in names:
            if name in item.attrs and item.attrs.get_id(name).shape in ((), (1,)):
                value = np.ravel(item.attrs[name])[0]
                return value.decode("utf-8", "replace") if isinstance(value, bytes) else value
        if not above or item.name == "/":
            return None
        item = item.parent

