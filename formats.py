"""Readers of recorded files, one class for each format. Needs no other file of this project.

A reader is opened with (path, file_fs) and has
    channels    {name: Channel without samples}; names are unique and printable
    end_s       length of the recording; start_time (datetime or None); notes [str]
    read(names, start_s, stop_s) -> {name: Channel} with the samples of that span, where there are
                any; start_s must not decrease from call to call
Files may be damaged, but are not forged.
"""
import contextlib
import datetime
import functools
import gzip
import io
import os
import re
import tempfile
import zlib
from dataclasses import dataclass, replace
from typing import NamedTuple

import h5py
import numpy as np

PRESSURE = {"mmhg": 1.0, "torr": 1.0, "kpa": 7.50062, "cmh2o": 0.735559, "hpa": 0.750062,
            "mbar": 0.750062, "psi": 51.7149, "pa": 0.00750062, "bar": 750.062}
RATE = {"bpm": 1.0, "/min": 1.0, "1/min": 1.0, "min-1": 1.0, "beats/min": 1.0, "beat/min": 1.0,
        "beatpermin": 1.0, "beatsperminute": 1.0, "hz": 60.0, "1/s": 60.0, "/s": 60.0}
NO_UNIT = ("nu", "au", "arb", "arbunits", "mv", "v", "uv", "µv", "%", "adc", "adu", "counts",
           "raw", "1", "nd", "-")
# Words for the kind of a number, and for sites: in brackets they are not units.
ENDINGS = {"map": ("mean", "m", "mbp", "map", "avg", "average"),
           "sbp": ("sys", "s", "sbp", "systolic", "syst"),
           "dbp": ("dias", "dia", "d", "dbp", "diastolic", "diast")}
NUMBER_WORDS = (*ENDINGS["map"], *ENDINGS["sbp"], *ENDINGS["dbp"], "hr", "pr", "rate", "max", "min",
                "pp", "wave", "waveform", "ambient")
IN_NAMES = (*NUMBER_WORDS, "left", "right", "l", "r", "a", "b", "radial", "rad", "femoral", "fem",
            "brachial", "aortic", "umbilical", "finger", "ear", "toe", "ir", "red", "green",
            "invasive", "arterial", "art", "abp", "ibp", "ppg", "pleth")
MIN_WAVE_HZ = 40        # below it the upstroke of a beat has too few samples to time it
JITTER_S = 0.01         # error of a block's time stamp that is not a gap
EDF_GAP_S = 0.5         # by which a data record of EDF+C must be late to come after a gap
NUMERICS_FS = 1.0       # Hz; a .vital file's numbers come at any time
# A file may promise this many samples per channel (3 days at 125 Hz, gaps included) ...
FREE_SAMPLES, SAMPLES_PER_BYTE = 1 << 25, 32    # ... and per byte (8 bits compressed 32-fold)


class RecordingError(ValueError):
    """What is wrong with a recorded file, in one line. `what` contains no path and no text from
    inside the file; `detail` may."""

    def __init__(self, path, what, detail=""):
        super().__init__(path, what, detail)    # all three, so that it can be pickled
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


def listed(fs, unit):
    return Channel(np.empty(0), float(fs), printable(unit))


def printable(text) -> str:
    """One line of printable characters: text from a file must not control the terminal."""
    return "".join(c if c.isprintable() else "?" for c in " ".join(str(text).split()))


def unique(names) -> list:
    """Printable names; a second 'ABP' becomes 'ABP#2'."""
    names = [printable(name).strip() for name in names]
    return [name if name not in names[:i] else f"{name}#{names[:i].count(name) + 1}"
            for i, name in enumerate(names)]


def plain_unit(text) -> str:
    """'[mm Hg]' -> 'mmhg', 'NOM_DIM_MMHG' -> 'mmhg', 'cmH₂O' -> 'cmh2o', 'Beats/min' unchanged."""
    text = re.sub(r"[\s\[\]()._]", "", str(text).lower().replace("₂", "2").replace("⁻¹", "-1"))
    return re.sub(r"^(nom|mdc)dimx?", "", text).replace("μ", "µ")


def unit_in_name(name, known=None) -> str:
    """The unit in a name: 'abp_mmhg', 'ABP [mmHg]', 'pressure (kPa)', 'HR, bpm'; '' if none.

    known: the units to look for. Default: those of pressures and rates, NO_UNIT, and other text in
    brackets, as an unknown unit, unless it is in IN_NAMES."""
    units, name = known or {**PRESSURE, **RATE, **dict.fromkeys(NO_UNIT)}, name.strip()
    in_brackets = re.findall(r"[\[(](.*?)[\])]?(?=\s*[\[(]|$)", name)[::-1]
    found = [text.strip() for text in in_brackets if plain_unit(text) in units]
    tail = re.split(r"(?i)[\s_,.:]+|(?<=\w)\s*/\s*(?=mm|kpa)|(?=mmhg$)", name)[-1]
    if tail != name and plain_unit(tail) in units and plain_unit(tail) not in NO_UNIT:
        found.append(tail)
    if not known:
        found += [text for text in in_brackets if re.fullmatch(r"[^\s\d][^\s]{0,11}", text)
                  and text.lower().strip(".") not in IN_NAMES]
    return found[0] if found else ""


def check_size(path, n_samples):
    limit = FREE_SAMPLES + SAMPLES_PER_BYTE * os.path.getsize(path)
    if n_samples > limit:
        raise RecordingError(path, f"promises {n_samples:,.0f} samples; a file of this size may "
                                   f"hold {limit:,} at most")


def span(start_s, stop_s, fs, n):
    """(first, end) of the samples 0 to n that lie in start_s <= t < stop_s."""
    return tuple(int(np.clip(np.ceil(t * fs - 1e-6), 0, n)) for t in (start_s, stop_s))


class Header(NamedTuple):
    fs: float       # Hz, of the frames
    units: list     # of the signals; '' if none is stated, 'uncalibrated' without a gain
    files: list     # with data
    segments: list  # (record name, or '~' for a gap; frames)


def read_header(path) -> Header:
    """Parse a WFDB header (https://www.physionet.org/physiotools/wag/header-5.htm). Its files must
    be in its own folder."""
    with open(path, encoding="utf-8", errors="replace") as file:
        lines = [line.split("#")[0].split() for line in file]
    try:
        record, *others = [words for words in lines if words]
        fs = float(re.split(r"[/(]", record[2])[0]) if len(record) > 2 else 250.0
        n_lines = int((record[0].split("/") + record[1:])[1])   # segments or signals
        segments = [(words[0], int(words[1])) for words in others] if "/" in record[0] else []
        if not 0 < fs < 1e6 or n_lines != len(others) or any(n < 0 for _, n in segments):
            raise ValueError
    except (ValueError, IndexError):
        raise RecordingError(path, "not a readable WFDB header") from None
    names = {words[0] for words in others} - {"~"}
    if any(re.search(r"[/\\:\x00]|^\.\.?$", name) for name in names):
        raise RecordingError(path, "this WFDB header names a data file outside its own folder")
    gains = [words[2] if len(words) > 2 else "0" for words in others]
    units = ["uncalibrated" if re.match(r"0*\.?0*([(/]|$)", gain) else gain.partition("/")[2]
             for gain in gains]
    return Header(fs, units, [] if segments else sorted(names), segments)


class Wfdb:
    """WFDB records. Segments are joined here: wfdb 4.3 fails on gaps with several rates."""

    def __init__(self, path, file_fs=None):
        self.path, self.notes, self.start_time, self.channels = path, [], None, {}
        self.read_part = functools.lru_cache(maxsize=1)(_read_wfdb)    # keeps the last part
        self.folder, file = os.path.split(os.path.abspath(path))
        header = read_header(path)
        self.fs, self.segments, start = header.fs, [], 0
        for name, frames in header.segments or [(None, 0)]:
            if name != "~":
                frames = self._add(name + ".hea" if name else file, start, frames)
            start += frames
        self.end_s = start / self.fs

    def _add(self, file, start, frames):
        """Add a segment; return its length: `frames`, or, if that is 0, all it holds."""
        import wfdb

        header, folder = read_header(os.path.join(self.folder, file)), self.folder
        if header.segments:
            raise RecordingError(self.path, "a segment of this record has segments itself")
        for name in header.files:
            if not os.path.isfile(os.path.join(folder, name)):
                raise RecordingError(self.path, "its data file is missing", name)
        if not file.endswith(".hea"):       # the only ending that wfdb accepts
            self.links = tempfile.TemporaryDirectory()
            for name in (file, *header.files):
                os.symlink(os.path.join(folder, name),
                           os.path.join(self.links.name, re.sub(r"(?i)\.hea$", ".hea", name)))
            folder = self.links.name
        record = os.path.join(folder, file[:-4])    # absolute: else wfdb may look on the web
        try:
            about = wfdb.rdheader(record)
            if not frames and header.files:
                frames = about.sig_len or (
                    len(self.read_part(record, (0,))[0]) // about.samps_per_frame[0])
        except ValueError as error:
            raise RecordingError(self.path, "a WFDB header with a date that is not DD/MM/YYYY, a "
                                 "length of 0, or another field that is wrong", error) from None
        self.start_time = self.start_time or about.base_datetime
        names = unique(about.sig_name or [])
        for name, per_frame, unit in zip(names, about.samps_per_frame or [], header.units):
            channel = self.channels.setdefault(name, listed(self.fs * per_frame, unit))
            channel.unit = channel.unit or unit
            if channel.fs != self.fs * per_frame:
                raise RecordingError(self.path, "a channel's rate changes between segments", name)
        # wfdb sums up the differences of format 8 from where it begins to read
        at_once = not about.sig_len or not {"8", "310", "311"}.isdisjoint(about.fmt or [])
        signals = dict(zip(names, enumerate(header.units)))
        self.segments.append((record, start, start + frames, signals, at_once))
        return frames

    def read(self, names, start_s, stop_s):
        first, end = span(start_s, stop_s, self.fs, round(self.end_s * self.fs))
        per_frame = {name: round(self.channels[name].fs / self.fs) for name in names}
        out = {name: replace(self.channels[name], first=first * n,
                             samples=np.full((end - first) * n, np.nan))
               for name, n in per_frame.items()}
        for record, start, stop, signals, at_once in self.segments:
            a, b = max(start, first), min(stop, end)
            wanted = [name for name in names if name in signals]
            if a >= b or not wanted:
                continue
            numbers, units = zip(*(signals[name] for name in wanted))
            factors = list(map(self._factor, wanted, units))
            begin, part = (start, ()) if at_once else (a, (a - start, b - start))
            try:
                read = self.read_part(record, numbers, *part)
                for name, factor, samples in zip(wanted, factors, read):
                    n = per_frame[name]
                    out[name].samples[(a - first) * n:(b - first) * n] = (
                        factor * samples[(a - begin) * n:(b - begin) * n])
            except (ValueError, IndexError):
                raise RecordingError(self.path, "its data file is too short, or damaged") from None
        return out

    def _factor(self, name, unit):
        """From a segment's unit to the channel's."""
        unit, target = plain_unit(unit), plain_unit(self.channels[name].unit)
        if unit and (unit in PRESSURE) != (target in PRESSURE):
            raise RecordingError(self.path, "a channel's unit changes between segments", name)
        return PRESSURE[unit] / PRESSURE[target] if unit in PRESSURE else 1.0


def _read_wfdb(record, numbers, a=0, b=None):
    """[samples of the frames a to b] of these signals, at the rate of each."""
    import wfdb

    return wfdb.rdrecord(record, a, b, channels=list(numbers), smooth_frames=False).e_p_signal


class Vital:
    """.vital files. They are compressed as a whole, so channels are read at once, as float32."""

    def __init__(self, path, file_fs=None):
        self.path, self.notes, self.kept = path, [], {}
        try:
            with gzip.open(path) as file:
                while file.read(1 << 20):
                    check_size(path, file.tell() / 8)
        except (OSError, EOFError, zlib.error) as error:
            raise RecordingError(path, "not a whole .vital file", error) from None
        file = self._file(header_only=True)
        self.start_s, self.end_s = file.dtstart, float(file.dtend - file.dtstart)
        self.start_time = datetime.datetime(1970, 1, 1) + datetime.timedelta(
            seconds=file.dtstart - 60 * file.dgmt)      # local time of the recorder
        self.tracks = {printable(name): name for name in file.trks}
        self.channels = {
            printable(name): listed(track.srate if track.type == 1 else NUMERICS_FS, track.unit)
            for name, track in file.trks.items() if track.type in (1, 2)}   # wave, number

    def _file(self, **options):
        import vitaldb

        with contextlib.redirect_stdout(io.StringIO()) as printed:
            file = vitaldb.VitalFile(os.path.abspath(self.path), **options)     # never a URL
        if printed.getvalue():  # it prints errors and returns what it has read
            raise RecordingError(self.path, "vitaldb cannot read this file", printed.getvalue())
        return file

    def read(self, names, start_s, stop_s):
        missing = [name for name in names if name not in self.kept]
        if missing:
            file = self._file(track_names=[self.tracks[name] for name in missing])
            self.kept.update((name, self._join(file, name)) for name in missing)
            self.end_s = max(c.start_s + c.samples.size / c.fs for c in self.kept.values())
        out = {}
        for name in names:
            channel = self.kept[name]
            first, end = span(start_s - channel.start_s, stop_s - channel.start_s, channel.fs,
                              channel.samples.size)
            out[name] = replace(channel, first=first,
                                samples=channel.samples[first:end].astype(np.float64))
        return out

    def _join(self, file, name):
        """The channel with all its samples; NaN in gaps.

        Time stamps of blocks are rounded and jitter, and clocks drift. So blocks without a gap
        between them are joined, their mean length gives the true rate, and only the first block
        after a gap is placed by its stamp. If the clock is too unsteady, every block is.
        """
        track, channel = file.trks[self.tracks[name]], self.channels[name]
        records = sorted(track.recs, key=lambda record: record["dt"])
        if not records:
            return channel
        # the blocks of samples, and the time of each from the recording's start
        blocks = [np.atleast_1d(record["val"]) for record in records]
        times, fs = np.array([record["dt"] for record in records]) - self.start_s, channel.fs
        if track.type == 2:
            times = np.rint(times * NUMERICS_FS) / NUMERICS_FS
        elif track.fmt > 2:     # integers; in "packed" files the lowest (unsigned: highest) is NaN
            limits = np.iinfo(blocks[0].dtype)
            gap = (limits.min or limits.max) if getattr(file, "packed", False) else None
            blocks = [np.where(block == gap, np.nan, block * track.gain + track.offset)
                      for block in blocks]
        check_size(self.path, times[-1] * fs)
        # a block jumps if it comes later than the block before it ends
        start_s, times = float(times[0]), times - times[0]
        lengths = np.array([len(block) for block in blocks])
        before, steps, period = np.cumsum(lengths) - lengths, np.diff(times), 1 / fs
        jumps = steps - lengths[:-1] * period > max(JITTER_S, 1.5 / fs)
        if not jumps.all():         # the true period, from the blocks that follow one another
            measured = steps[~jumps].sum() / lengths[:-1][~jumps].sum()
            late = abs(measured / period - 1) * lengths.sum()       # samples, at the end
            if late > 0.1 and measured > period / 2:
                period = measured
        # the number of each block's first sample: after a jump by its stamp, else by counting
        first = np.flatnonzero(np.append(True, jumps))
        shifts = np.rint(times[first] / period).astype(np.int64) - before[first]
        positions = before + shifts[np.cumsum(np.append(False, jumps))]
        late_s, true_fs = np.abs(positions * period - times).max(), float(f"{1 / period:.10g}")
        if abs(fs / true_fs - 1) > 1e-3 or late_s > 2 * JITTER_S + 2 / fs:
            true_fs, positions = fs, np.rint(times * fs).astype(np.int64)
        samples = np.full((positions + lengths).max(), np.nan, np.float32)
        for position, block in zip(positions, blocks):
            samples[position:position + len(block)] = block
        return replace(channel, samples=samples, fs=true_fs, start_s=start_s)


class Edf:
    """EDF, EDF+C and EDF+D (https://www.edfplus.info/specs/edfplus.html). Read here, because
    pyedflib refuses files with an odd field in an unneeded channel, and all EDF+D."""

    def __init__(self, path, file_fs=None):
        self.path, self.notes, self.start_time = path, [], None
        with open(path, "rb") as file:
            header = file.read(256)
            if header[:1] == b"\xff":
                raise RecordingError(path, "a BDF file (24 bits); export it as EDF")
            try:
                n_records, n = int(header[236:244]), int(header[252:256])
                self.seconds = float(header[244:252])       # of a data record
                labels, _, units, *limits, _, sizes = [
                    [file.read(width).decode("latin-1").strip() for _ in range(n)]
                    for width in (16, 80, 8, 8, 8, 8, 8, 80, 8)]
                sizes = np.array(sizes, int)
            except ValueError:
                raise RecordingError(path, "not an EDF file: unreadable header") from None
        with contextlib.suppress(ValueError):
            stamp = re.sub(r"\D", ".", header[168:184].decode("latin-1"))       # or 10:20:30
            self.start_time = datetime.datetime.strptime(stamp, "%d.%m.%y%H.%M.%S")
        held = max(0, os.path.getsize(path) - 256 - 256 * n) // max(1, 2 * int(sizes.sum()))
        if 0 < n_records != held:           # -1 while it is being written
            raise RecordingError(path, f"holds {held} data records, its header says {n_records}")
        ends, self.channels, self.about = np.cumsum(sizes), {}, {}
        for name, unit, size, end, *own in zip(unique(labels), units, sizes, ends, *limits):
            if size > 0 and self.seconds > 0 and not name.startswith("EDF Annotations"):
                self.channels[name] = listed(size / self.seconds, unit)
                self.about[name] = slice(end - size, end), own
        if not self.channels or not held:
            raise RecordingError(path, "this EDF file holds no signals")
        self.records = np.memmap(path, "<i2", "r", 256 + 256 * n, (held, ends[-1]))
        self.starts_s = self.seconds * np.arange(held)
        if header[192:196] == b"EDF+" and held > 1:
            self._place_records(labels, ends, sizes, has_gaps=header[192:197] == b"EDF+D")
        self.end_s = float(self.starts_s.max()) + self.seconds
        check_size(path, self.end_s * max(channel.fs for channel in self.channels.values()))

    def _place_records(self, labels, ends, sizes, has_gaps):
        """Place the data records by the time with which each begins, as text. has_gaps: EDF+D.

        EDF+C must not have gaps. If a record is late all the same, it and the later ones move; a
        clock that drifts is not a gap.
        """
        try:
            i = labels.index("EDF Annotations")
            times = self.records[:, ends[i] - sizes[i]:ends[i]]
            times_s = np.array([float(re.match(rb"[+-][\d.]+", row.tobytes()).group())
                                for row in times])
        except (ValueError, AttributeError):
            if has_gaps:
                raise RecordingError(
                    self.path, "an EDF+D file with data records without time") from None
            return
        if has_gaps:
            self.starts_s = times_s - times_s.min()
        else:
            late_s = np.diff(times_s) - np.median(np.diff(times_s))
            self.starts_s[1:] += np.cumsum(np.where(late_s > EDF_GAP_S, late_s, 0.0))

    def read(self, names, start_s, stop_s):
        out = {}
        here = np.flatnonzero((self.starts_s > start_s - self.seconds) & (self.starts_s < stop_s))
        for name in names:
            channel, (columns, limits) = self.channels[name], self.about[name]
            try:
                low, high, code_low, code_high = map(float, limits)
                step = (high - low) / (code_high - code_low)
                if step == 0:
                    raise ValueError
            except (ValueError, ZeroDivisionError):
                raise RecordingError(self.path, "unreadable or equal limits of a channel",
                                     name) from None
            first, end = span(start_s, stop_s, channel.fs, round(self.end_s * channel.fs))
            codes = self.records[here, columns]     # [records, samples of each]
            at = np.rint(self.starts_s[here] * channel.fs).astype(np.int64) - first
            at = at[:, None] + np.arange(codes.shape[1])
            inside = (at >= 0) & (at < end - first)
            samples = np.full(end - first, np.nan)
            samples[at[inside]] = low + (codes[inside] - code_low) * step
            out[name] = replace(channel, first=first, samples=samples)
        return out


class Hdf5:
    """One-dimensional datasets of numbers (also [1, n], as MATLAB writes them), named by their
    paths. The rate is an attribute fs or sampling_rate of the dataset, its group or the file, or
    file_fs. `_scaled` lists the attributes of integers."""

    def __init__(self, path, file_fs=None):
        self.path, self.notes, self.start_time, self.end_s = path, [], None, 0.0
        self.channels, self.paths = {}, {}

        def look(inside, item):     # visititems follows hard links only, and visits objects once
            if (isinstance(item, h5py.Dataset) and item.dtype.kind in "fiu"
                    and item.size == max(item.shape, default=0) > 0):
                check_size(path, item.size)
                rates = [_attribute(above, "fs", "sampling_rate", "sample_rate")
                         for above in (item, item.parent, item.file)]
                stated = next(filter(None, map(_rate, rates)), None)
                fs = file_fs or stated or np.nan
                if stated not in (None, fs):
                    self.notes = ["--fs replaces another rate that the file states"]
                name, self.end_s = printable(inside), max(self.end_s, item.size / fs)
                self.channels[name] = listed(fs, _attribute(item, "unit", "units") or "")
                self.paths[name] = inside

        with h5py.File(path, "r") as file:
            if "layout_version" in file.attrs:
                raise RecordingError(path, "holds prepared segments, not a recording")
            file.visititems(look)
        if not self.channels:
            raise RecordingError(path, "no one-dimensional dataset of numbers")

    def read(self, names, start_s, stop_s):
        out = {}
        with h5py.File(self.path, "r") as file:
            for name in names:
                channel, item = self.channels[name], file[self.paths[name]]
                if not 0 < channel.fs < 1e6:
                    raise RecordingError(self.path, "a dataset has no attribute fs or "
                                                    "sampling_rate; give the rate: --fs HZ", name)
                first, end = span(start_s, stop_s, channel.fs, item.size)
                part = tuple(slice(first, end) if n == item.size else 0 for n in item.shape)
                raw = np.ravel(item[part])
                out[name] = replace(channel, first=first, samples=_scaled(raw, item))
        return out


def _scaled(raw, item):
    """[n] float64: integers * scale_factor + add_offset, or (integers - baseline) / gain."""
    samples = raw.astype(np.float64)
    if item.dtype.kind != "f":
        factor, offset = _attribute(item, "scale_factor"), _attribute(item, "add_offset")
        if factor is None and offset is None:
            factor = _attribute(item, "gain", "adc_gain", "adu_per_unit")
            offset = _attribute(item, "offset", "baseline", "adc_zero")
            if factor is not None and (abs(float(factor)) >= 1 or "gain" not in item.attrs):
                factor, offset = 1 / float(factor), -float(offset or 0) / float(factor)
        samples = samples * float(1 if factor is None else factor) + float(offset or 0)
    fill = _attribute(item, "_FillValue", "missing_value")
    return samples if fill is None else np.where(raw == fill, np.nan, samples)


def _rate(value):
    """125.0 for 125, '125' or '125 Hz'; None if it is not a number in Hz."""
    try:
        return float(re.sub(r"(?i)\s*hz$", "", str(value)))
    except ValueError:      # also of None
        return None


def _attribute(item, *names):
    """A single number or text; None if there is none."""
    for name in names:
        values = np.ravel(item.attrs.get(name, ()))
        if values.size == 1:
            value = values[0]
            return value.decode("utf-8", "replace") if isinstance(value, bytes) else value
    return None
