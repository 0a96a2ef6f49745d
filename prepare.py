"""Recorded waveforms -> HDF5 of labelled 60-s segments, ready for train_resnet.py.

    python prepare.py records/ --out data/icu.h5 --workers 4 --groups patients.csv --report icu.html
    python prepare.py archive/ --out data/shards --shards 16 --workers 32
    python prepare.py night.csv 3141595_0001.hea --out data/two.h5 --beats peak --align
    python prepare.py records/ --list-channels

Per record: read, resample ABP and PPG to 60 Hz on one clock, find how late the PPG is, cut minutes
from the record's start, label each minute from the very ABP that is stored, and write them, refused
minutes included, as one piece into the hidden folder .<out>.parts. When all pieces are there, they
are joined. A run that was killed goes on where it stopped when the same command is given again.
"""

import argparse
import contextlib
import csv
import hashlib
import io
import json
import multiprocessing
import os
import pathlib
import re
import shutil
import signal
import sys
import threading
import traceback
from collections import Counter, deque
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import numpy as np

import labels
import recordings
import tk_utils
from recordings import RecordingError
from tk_utils import html_figure, html_table, html_text

datasets = tk_utils.lazy_module("datasets")  # it brings PyTorch, for which --help does not wait

# Where PPG may lie against ABP: real monitors show it 0.06 to 1.0 s late.
DELAY_RANGE_S = (-0.25, 1.75)
DELAY_STEP_S, DELAY_BLUR_S = 0.0025, 0.01
OTHER_BEAT_S = 0.25
FEWEST_BEATS = 20  # near the delay that is found
ROWS_AT_ONCE = 256
# Of 1,350 made-up rhythms (SD of the interval 1-30 ms) whole beats were mistaken only below 0.02.
SURE_DELAY = 0.05
PRIVATE_LINE = "# private: contains true record names and paths; do not share"
EXIT_CODES = """\
exit codes: 0 all records are prepared; 1 the output was written, but some records could not be used
(each has a line on stderr and a row in the private <out>_problems.csv); 2 no output written."""

# Mean and SD in the published cohort, in mmHg and beats/min: constants of the published PPG system
# (Chandrasekhar et al., Nat Med 2023, and its companion code). Then the range that a figure shows.
PUBLISHED_COHORT = {
    "map": (76.7, 11.2, (30, 130)), "sbp": (118.1, 19.5, (50, 200)), "dbp": (56.1, 10.2, (20, 110)),
    "pp": (62.5, 18.5, (0, 140)), "hr": (77.0, 17.3, (30, 160)), "p_crit": (40.5, 15.5, (0, 100)),
}


# The options that shape a record's rows.
SHAPING = ("label_method", "beats", "align", "abp_channel", "ppg_channel", "csv_rate", "abp", "ppg",
           "fs", "shards")


def parse_arguments(arguments=None):
    parser = tk_utils.ScriptParser(
        description=__doc__, epilog=EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("inputs", nargs="+", metavar="INPUT",
                        help="a recording (a WFDB record or its .hea, a CSV with a header, ...), "
                             "or a folder")
    add = parser.add_argument_group("output").add_argument
    add("--out", metavar="FILE", help="the HDF5 file to write; with --shards, a folder of them")
    add("--shards", type=int, metavar="N",
        help="split the output by patient into N files, <out>/0000.h5 and so on")
    add("--report", metavar="FILE", help="also write a quality report, one HTML page")
    add("--workers", type=int, default=1, metavar="N", help="processes (default: 1)")
    add = parser.add_argument_group("patients and labels").add_argument
    add("--groups", metavar="CSV",
        help="columns record,split_group: which records are of one patient (default: each its own)")
    add("--label-method", choices=tuple(labels.METHODS), default="published",
        help="how Pcrit is estimated, docs/labels.md (default: published)")
    add("--beats", choices=("foot", "peak"), default="foot",
        help="where a beat begins; foot is less biased, peak is the published one (default: foot)")
    add("--align", action="store_true",
        help="shift each record's PPG by its delay behind the ABP (default: only report it)")
    add = parser.add_argument_group("channels").add_argument
    add("--list-channels", action="store_true",
        help="print what each input holds and what would be chosen; prepare nothing")
    add("--abp-channel", metavar="NAME", help="the arterial pressure (default: by its usual names)")
    add("--ppg-channel", metavar="NAME", help="the PPG (default: by its usual names)")
    add("--csv-rate", type=float, metavar="HZ",
        help="the rows of every CSV are evenly spaced at this rate; time columns are not used")
    add("--abp", metavar="PATH", help="HDF5 inputs: the ABP's dataset in the file, in mmHg")
    add("--ppg", metavar="PATH", help="HDF5 inputs: the PPG's dataset in the file")
    add("--fs", type=float, metavar="HZ", help="HDF5 inputs: samples per second of both")
    options = parser.parse_args(arguments)
    rates = [rate for rate in (options.csv_rate, options.fs) if rate is not None]
    for fine, message in (
            (options.list_channels or options.out, "--out FILE is required"),
            (options.workers > 0, "--workers must be 1 or more"),
            (options.shards is None or options.shards > 0, "--shards must be 1 or more"),
            (all(0 < rate < 1e6 for rate in rates), "--csv-rate and --fs are Hz, above 0")):
        if not fine:
            parser.error(message)
    options.wanted = {"abp": options.abp_channel, "ppg": options.ppg_channel}
    options.hdf5 = {"abp": options.abp, "ppg": options.ppg, "fs": options.fs}
    return options


def main(arguments=None):
    options = parse_arguments(arguments)
    outputs = output_paths(options)
    found = find_inputs(options, outputs)
    if options.list_channels:
        return print_channels(found, options)
    problems = Problems(found, options.out)
    with work_folder(options.out) as parts:
        made_with = fingerprints(options)
        held = read_outputs(outputs, made_with, options.out)
        patients = assign_patients(found, options.groups, problems)
        records = plan(found, patients, outputs, made_with)
        problems.recall(records)
        tell_changes(options.out, held, records, problems.failed)
        clean_up(parts, records, outputs + [problems.path, options.report])
        prepare_missing(records, held, problems, options, parts)
        problems.write()
        usable = [record for record in records if record.key not in problems.failed]
        if not usable:
            raise datasets.DataError(
                f'{", ".join(options.inputs)}: none of the records could be used')
        written = write_outputs(usable, held, options, made_with, parts)
    if not written:
        print(f"nothing to do: {options.out} holds {len(usable)} of {len(records)} records, "
              "prepared with these options from these files")
    new_report = options.report and (written or not os.path.isfile(options.report))
    if written or new_report:
        contents = read_contents([path for path in outputs if os.path.exists(path)])
    if written:
        print(f"{len(usable)} of {len(records)} records prepared")
        print_summary(contents)
        print(f"written: {options.out}")
    if new_report:
        write_report(options, contents, problems, len(records))
        print(f"written: {options.report}")
    return 1 if problems.failed else 0


# ------------------------------------------------------------------------------ What there is to do

# A record's key is a hash of all that shapes its rows: the sizes and times of its files, the
# options, this program. A piece of that name is finished; so is a group of the output that has this
# key. All else is to be done, and is told apart by comparing keys.

class Record(NamedTuple):
    number: int  # in what was found
    path: str
    patient: str
    name: str
    key: str
    output: str  # the file that its rows belong into


def output_paths(options):
    if not options.out:
        return []
    if not options.shards:
        if os.path.isdir(options.out):
            raise datasets.DataError(
                f"{options.out}: is a folder; --out takes a file, or add --shards N")
        return [options.out]
    if os.path.isfile(options.out):
        raise datasets.DataError(f"{options.out}: is a file; with --shards N, --out takes a folder")
    paths = [os.path.join(options.out, f"{i:04d}.h5") for i in range(options.shards)]
    others = set(os.listdir(options.out)) if os.path.isdir(options.out) else set()
    others = {name for name in others if name.endswith(".h5")} - set(map(os.path.basename, paths))
    if others:
        raise datasets.DataError(
            f"{options.out}: holds {len(others)} .h5 files that are none of these "
            f"{options.shards} shards; give another folder, or remove them")
    return paths


def find_inputs(options, outputs):
    own = {os.path.realpath(path) for path in outputs}
    groups = os.path.realpath(options.groups) if options.groups else None
    found = [item for item in recordings.find_recordings(options.inputs)
             if os.path.realpath(item.path) != groups]  # it may lie in the folder
    for item in found:
        if os.path.realpath(item.path) in own:
            raise datasets.DataError(f"{item.typed}: is both an input and the output")
    recordings.check_readers([item.path for item in found])
    return found


def fingerprints(options):
    """{option: hash of its value}; of the values, because a typed name may say who it was."""
    made_with = {name: getattr(options, name) for name in SHAPING}
    made_with["program"] = b"".join(
        pathlib.Path(module.__file__).read_bytes()
        for module in (labels, recordings, sys.modules[__name__]))
    return {name: digest(value) for name, value in made_with.items()}


def digest(value):
    return hashlib.blake2b(repr(value).encode(), digest_size=10).hexdigest()


def plan(found, patients, outputs, made_with):
    """A Record for each recording that was found."""
    records = []
    for number, (item, patient) in enumerate(zip(found, patients)):
        stats = [os.stat(path) for path in files_of(item.path) if os.path.exists(path)]
        name = recordings.recording_name(item.path)
        key = digest([patient, name, os.path.abspath(item.path), made_with,
                      [(one.st_size, one.st_mtime_ns) for one in stats]])
        shard = int(digest(patient), 16) % len(outputs)
        records.append(Record(number, item.path, patient, name, key, outputs[shard]))
    return records


def files_of(path):
    """The files that a recording consists of: the lines of a WFDB header begin with their names."""
    files, waiting, folder = {path}, [path], os.path.dirname(path)
    while waiting:
        header, words = waiting.pop(), set()
        if header.endswith(".hea"):
            with contextlib.suppress(OSError), open(header, errors="replace") as file:
                words = {os.path.basename(line.split()[0]) for line in file if line.strip()}
        named = {os.path.join(folder, word + ending) for word in words for ending in ("", ".hea")}
        waiting += [name for name in named - files if os.path.isfile(name)]
        files.update(waiting)
    return sorted(files)


def read_outputs(outputs, made_with, out):
    """{output file: {(patient, name): key} that it holds; None if made with other options}."""
    held, changed = {}, set()
    for path in outputs:
        held[path] = {}
        if not os.path.lexists(path):
            continue
        with datasets.open_file(path) as file, datasets.reading(lambda: path):  # noqa: B023
            if datasets.attribute(file, "origin", "") != "recordings":
                raise datasets.DataError(
                    f"{path}: was not written by prepare.py; give another --out, or remove it")
            before = json.loads(file.attrs.get("prepared_with", "{}"))
            changed.update(key for key in made_with if before.get(key) != made_with[key])
            held[path] = None if before != made_with else {
                (patient, name): group.attrs["key"]
                for patient, groups in file.items() for name, group in groups.items()}
    if changed:
        print(f"since {out} was written, other: "
              + ", ".join("the program" if key == "program" else "--" + key.replace("_", "-")
                          for key in sorted(changed)) + "; all is prepared again")
    return held


def tell_changes(out, held, records, failed):
    """Says how the records differ from those in the output."""
    before = {place: key for keys in held.values() for place, key in (keys or {}).items()}
    now = {(record.patient, record.name): record.key for record in records
           if record.key not in failed}
    counts = {"new": len(now.keys() - before.keys()), "gone": len(before.keys() - now.keys()),
              "changed": sum(key != before.get(place, key) for place, key in now.items())}
    if before and any(counts.values()):
        print(f"since {out} was written, records: "
              + ", ".join(f"{n} {what}" for what, n in counts.items()))


@contextlib.contextmanager
def work_folder(out):
    """The hidden folder that keeps the pieces of an unfinished run, for one run at a time; a
    finished run leaves none."""
    folder, name = os.path.split(os.path.realpath(out))
    parts = os.path.join(folder, f".{name}.parts")
    os.makedirs(parts, mode=0o700, exist_ok=True)
    with tk_utils.locked(os.path.join(parts, "lock"), f"{out}: another run is preparing it now"):
        finished = False
        try:
            yield parts
            finished = True
        finally:
            if finished or not any(name.endswith(".h5") for name in os.listdir(parts)):
                shutil.rmtree(parts)


def clean_up(parts, records, files):
    """Removes what killed runs left: temporary files, and pieces that are of no use any more."""
    keys = {record.key + ".h5" for record in records}
    pieces = [name for name in os.listdir(parts) if name.endswith(".h5")]
    if pieces:
        n_good = sum(name in keys for name in pieces)
        print(f"an unfinished run has prepared {n_good} of {len(records)} records"
              + (f"; {len(pieces) - n_good} more have changed since, or their options"
                 if n_good < len(pieces) else ""))
    for name in os.listdir(parts):
        if name != "lock" and name not in keys:
            os.remove(os.path.join(parts, name))
    for path in filter(None, files):
        tk_utils.remove_leftovers(path)


def prepare_missing(records, held, problems, options, parts):
    """Makes the pieces that are not there yet."""
    missing = [
        record for record in records if record.key not in problems.failed
        and (held[record.output] or {}).get((record.patient, record.name)) != record.key
        and not os.path.exists(piece_path(parts, record))]
    results = run_all(partial(prepare_record, options=options, parts=parts), missing,
                      options.workers)
    for record, result in tk_utils.progress(results, total=len(missing), desc="records",
                                            unit="record", disable=not missing):
        for note in result.notes:
            problems.add(record.number, "note", note, key=record.key)
        if result.problem:
            problems.add(record.number, "error", result.problem, result.detail, record.key)


def run_all(function, records, workers):
    """Yields (record, Result) over processes; at most 2 x workers are under way.

    Where a process is ended from outside, the records under way are tried again one by one, so that
    one that takes all memory, or crashes a library, costs itself alone.
    """
    if workers == 1:
        yield from ((record, function(record)) for record in records)
        return
    waiting, under_way = deque(records), deque()
    while waiting:
        try:
            with _processes(min(workers, len(waiting))) as pool:
                try:
                    while waiting or under_way:
                        while waiting and len(under_way) < 2 * workers:
                            under_way.append((waiting[0], pool.submit(function, waiting[0])))
                            waiting.popleft()
                        result = under_way[0][1].result()
                        yield under_way.popleft()[0], result
                finally:
                    for _, future in under_way:
                        future.cancel()
        except BrokenProcessPool:
            while under_way:
                record, _ = under_way.popleft()
                yield record, _try_alone(function, record)


def _try_alone(function, record):
    try:
        with _processes(1) as pool:
            return pool.submit(function, record).result()
    except BrokenProcessPool:
        return Result("its process was ended (out of memory?)")


def _processes(n):
    context = multiprocessing.get_context("spawn")  # fork is not safe beside HDF5 and threads
    return ProcessPoolExecutor(n, mp_context=context, initializer=_end_with_parent)


def _end_with_parent():
    """In a worker: Ctrl-C is the parent's to handle, and a killed parent leaves no orphan."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    ended = multiprocessing.parent_process().sentinel
    threading.Thread(
        target=lambda: (multiprocessing.connection.wait([ended]), os._exit(1)), daemon=True
    ).start()


# --------------------------------------------------------------------------------------- One record

class Result(NamedTuple):
    problem: str = ""  # says nothing about who it was; `detail` may
    detail: str = ""
    notes: tuple = ()  # lines for the private problems file


def prepare_record(record, options, parts):
    """Writes the piece of one record and returns its Result."""
    notes = []
    try:
        fields, attributes = read_segments(record.path, options, notes)
    except RecordingError as error:
        return Result(error.what, error.detail, tuple(notes))
    except MemoryError:
        return Result("not enough memory for it; fewer --workers leave more for each")
    except Exception as error:  # noqa: BLE001 - one record in an archive must not end the run
        return Result(f"{type(error).__name__}, a bug in this program: please report what the "
                      "problems file says", traceback.format_exc())
    with tk_utils.atomic_path(piece_path(parts, record)) as temporary:
        with new_output(temporary, options) as writer:
            writer.write(record.patient, record.name, fields)
            group = writer.file[record.patient][record.name]
            group.attrs.update(attributes, key=record.key)
    return Result(notes=tuple(notes))


def piece_path(parts, record):
    return os.path.join(parts, record.key + ".h5")


def new_output(path, options, **attributes):
    return datasets.LayoutWriter(
        path, origin="recordings", label_method=options.label_method, beats=options.beats,
        reasons=labels.REASONS, **attributes)


def read_segments(path, options, notes):
    """(the layout's fields, the encounter's attributes) of one recorded file."""
    recording = recordings.read_recording(
        path, lambda names: list(choose(path, names, options.wanted).values()),
        options.csv_rate, options.hdf5)
    chosen = choose(path, recording.channels, options.wanted)
    abp, ppg = (recording.channels[chosen[kind]] for kind in ("abp", "ppg"))
    for name, channel in (("ABP", abp), ("PPG", ppg)):
        if channel.fs < labels.MIN_FS_HZ:
            raise RecordingError(path, f"its {name} channel has {channel.fs:g} samples/s; a "
                                       f"waveform needs {labels.MIN_FS_HZ} or more")
    abp = to_mmhg(abp, notes)
    duration_s = max(c.start_s + c.samples.size / c.fs for c in (abp, ppg))
    n = int((duration_s + 1e-6) // datasets.SEGMENT_SECONDS)
    if n < 1:
        raise RecordingError(path, f"lasts {duration_s:.1f} s, less than one segment")
    fields = {"abp": on_grid(abp, n), "ppg": on_grid(ppg, n),
              "start_s": np.arange(n) * float(datasets.SEGMENT_SECONDS)}
    delay_s, strength, rows = ppg_delay(fields["abp"], fields["ppg"], datasets.FS)
    shift_s = delay_s if options.align and strength >= SURE_DELAY else 0.0
    if shift_s:
        fields["ppg"] = on_grid(replace(ppg, start_s=ppg.start_s - shift_s), n)
    if options.align and strength < SURE_DELAY:
        notes.append("the PPG's delay is not known for sure: not aligned")
    fields["ppg_delay_s"] = rows - shift_s
    fields.update(labels.label_segments(
        fields["abp"], datasets.FS, beats=options.beats, method=options.label_method))
    quality = labels.signal_quality(fields["abp"], fields["ppg"], datasets.FS)
    fields["reason"] = fields["reason"] | quality.pop("reason")
    fields.update(quality)
    return fields, {"ppg_delay_s": delay_s, "ppg_delay_strength": strength,
                    "ppg_shift_s": shift_s,
                    "left_over_s": max(0.0, duration_s - n * datasets.SEGMENT_SECONDS)}


def choose(path, names, wanted):
    """{'abp': channel name, 'ppg': channel name} among `names`."""
    chosen = {kind: recordings.choose_channel(names, kind, wanted[kind]) for kind in ("abp", "ppg")}
    for kind, name in chosen.items():
        if name is None:
            looked_for = f"named {wanted[kind]}" if wanted[kind] else "with a usual name"
            raise RecordingError(
                path, f"no {kind.upper()} channel {looked_for}; see --list-channels and "
                f"--{kind}-channel", "it has " + (", ".join(names) or "none"))
    if chosen["abp"] == chosen["ppg"]:
        raise RecordingError(path, "the same channel would be both ABP and PPG")
    return chosen


def to_mmhg(channel, notes):
    """The channel in mmHg; without a unit, or with one that is no pressure (WFDB's default is mV),
    it is taken as mmHg: the labels' range check refuses what cannot be."""
    factor = recordings.MMHG_PER_UNIT.get(channel.unit.lower())
    if factor is None and channel.unit:
        notes.append(f"ABP has the unit {channel.unit!r}; taken as mmHg")
    return replace(channel, samples=channel.samples * (factor or 1.0))


def on_grid(channel, n):
    """[n, 3600] float32: n minutes of a Channel from the recording's start."""
    samples = datasets.SEGMENT_SAMPLES
    return recordings.resample(channel, datasets.FS, n * samples).reshape(n, samples)


def ppg_delay(abp, ppg, fs):
    """How late the PPG's beats begin after the ABP's: (s of the record, strength, [N] s of each
    minute) of abp (mmHg) and ppg (any unit), both [N, samples] at `fs` Hz, in one minute's rows.

    The intervals from each foot in the ABP to all feet in the PPG near it are pooled. The true one
    comes back with each beat; one that is wrong by a beat varies as the heart's rhythm does, so its
    peak in the histogram is lower. Strength is by how much (0: equal, a rhythm without variation;
    1: no other peak). A minute's delay is the median near the record's. NaN: unknown.
    """
    from scipy.ndimage import gaussian_filter1d
    from scipy.signal import find_peaks

    low, high = DELAY_RANGE_S
    abp_feet, row = _feet(abp, fs)
    ppg_feet, _ = _feet(ppg, fs, labels.ppg_as_pressure)
    first, end = np.searchsorted(ppg_feet, [abp_feet + low, abp_feet + high])
    count = end - first  # of the PPG's feet near each of the ABP's
    at = np.repeat(first - np.cumsum(count) + count, count) + np.arange(count.sum())
    delay, row = ppg_feet[at] - np.repeat(abp_feet, count), np.repeat(row, count)
    edges = np.arange(low, high + DELAY_STEP_S, DELAY_STEP_S)
    density = gaussian_filter1d(
        np.histogram(delay, edges)[0].astype(float), DELAY_BLUR_S / DELAY_STEP_S, mode="constant")
    peaks, _ = find_peaks(density)
    of_minutes = np.full(len(abp), np.nan, np.float32)
    best = peaks[density[peaks].argmax()] if len(peaks) else 0
    near = np.abs(delay - edges[best]) < OTHER_BEAT_S / 2
    if not len(peaks) or near.sum() < FEWEST_BEATS:
        return np.nan, 0.0, of_minutes
    others = peaks[np.abs(edges[peaks] - edges[best]) > OTHER_BEAT_S]
    strength = 1.0 - density[others].max(initial=0.0) / density[best]
    delay, row = delay[near], row[near]
    minutes, starts = np.unique(row, return_index=True)
    of_minutes[minutes] = [np.median(part) for part in np.split(delay, starts[1:])]
    return float(np.median(delay)), float(strength), of_minutes


def _feet(signal, fs, scale=None):
    """(times in s, rows) of the feet of the beats in `signal` [N, samples], in time order, rows set
    so far apart that no interval spans two of them. `scale`: makes it a pressure, if it is none."""
    apart_s = signal.shape[1] / fs + 2 * max(DELAY_RANGE_S)
    times, rows = [np.zeros(0)], [np.zeros(0, int)]
    for i in range(0, len(signal), ROWS_AT_ONCE):
        block = signal[i:i + ROWS_AT_ONCE].astype(np.float64)
        there = np.isfinite(block)
        if not there.any():
            continue
        gaps = np.flatnonzero(~there)
        block.ravel()[gaps] = np.interp(gaps, np.flatnonzero(there), block[there])
        if scale is not None:
            block = scale(block)
        foot, row = labels.find_feet(block, fs)
        known = there[row, np.rint(foot).astype(int)]
        times.append(foot[known] / fs + (row[known] + i) * apart_s)
        rows.append(row[known] + i)
    return np.concatenate(times), np.concatenate(rows)


# ------------------------------------------------------------------------------- Joining the pieces

def write_outputs(records, held, options, made_with, parts):
    """Writes each output that does not hold its records yet, complete or not at all, from pieces
    and from what it held before; returns the paths written or removed."""
    mine = {path: {} for path in held}
    for record in records:
        mine[record.output][record.patient, record.name] = record
    stale = [path for path, keys in held.items()
             if keys != {place: record.key for place, record in mine[path].items()}]
    for path in stale:  # shards that were made with other options must not lie beside new ones
        if os.path.exists(path) and (not mine[path] or held[path] is None and len(held) > 1):
            os.remove(path)
    for path in (path for path in stale if mine[path]):
        with tk_utils.atomic_path(path) as temporary:
            with new_output(temporary, options, prepared_with=json.dumps(made_with)) as writer:
                for (patient, name), record in mine[path].items():
                    piece = piece_path(parts, record)
                    with datasets.open_file(piece if os.path.exists(piece) else path) as source:
                        source.copy(source[patient][name], writer.file.require_group(patient), name)
    return stale


# ------------------------------------------------------------------------------- Whose record it is

def assign_patients(found, groups_path, problems):
    """The patient of each recording: its split group, or its own name."""
    groups = read_groups(groups_path) if groups_path else {}
    patients, first_of = [], {}
    for number, item in enumerate(found):
        name = recordings.recording_name(item.path)
        if groups_path and name not in groups:
            problems.add(number, "note", "not in the groups file: taken as a patient of its own")
        patients.append(groups.get(name, name))
        twin = first_of.setdefault((patients[-1], name), number)
        if twin != number:
            for one in (twin, number):
                problems.add(one, "error", "same patient and record name as another input")
            problems.write()
            raise datasets.DataError(
                f"{shown(found, twin)} and {shown(found, number)}: two recordings of one patient "
                f"with one name (see {problems.path}); rename one, or prepare them into two files")
    alone = sum(recordings.recording_name(item.path) not in groups for item in found)
    if groups_path and alone:
        print(f"{alone} of {len(found)} records are not in {groups_path}: each is taken as a "
              f"patient of its own (named in {problems.path})", file=sys.stderr)
    return patients


def read_groups(path):
    """{record name: patient} of a CSV with the columns record and split_group."""
    groups = {}
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            rows = csv.DictReader(file)
            for column in ("record", "split_group"):
                if column not in (rows.fieldnames or ()):
                    raise RecordingError(path, f"no column {column}")
            for row in rows:
                record, group = ((row[c] or "").strip() for c in ("record", "split_group"))
                if not record or not re.fullmatch(r"[^/\x00]+", group) or group in (".", ".."):
                    raise RecordingError(
                        path, f"line {rows.line_num}: expected a record and a group without /")
                if groups.setdefault(record, group) != group:
                    raise RecordingError(path, f"line {rows.line_num}: this record has two groups")
    except (UnicodeDecodeError, csv.Error) as error:
        raise RecordingError(path, "not a readable CSV file", error) from None
    return groups


# ------------------------------------------------------------------------------------- What is told

class Problems:
    """Errors and notes per record: named in a private file, unnamed on stderr.

    File names of recordings are often patients' numbers; stderr ends up in logs. A path that the
    user typed is shown as typed; a file found in a typed folder, by its number. A record that could
    not be used is not tried again while its key is in the file.
    """

    COLUMNS = ("kind", "record", "path", "what", "detail", "key")

    def __init__(self, found, out):
        self.found, self.path = found, os.path.splitext(os.path.normpath(out))[0] + "_problems.csv"
        self.rows, self.failed, self.lines, self.is_news, self.earlier = [], set(), [], False, ""
        with contextlib.suppress(FileNotFoundError), open(
                self.path, encoding="utf-8", errors="replace", newline="") as file:
            text = file.read()
            self.earlier = text if text.startswith(PRIVATE_LINE) else ""  # else it is not ours

    def add(self, number, kind, text, detail="", key="", is_new=True):
        path = self.found[number].path
        name = recordings.recording_name(path)
        self.rows.append((number, (kind, name, path, text, detail, key)))
        self.is_news |= is_new
        if kind == "error":
            self.failed.add(key)
            if is_new:
                self.lines.append(f"{shown(self.found, number)}: {text}")

    def recall(self, records):
        """What an earlier run wrote about these records as they still are."""
        numbers = {record.key: record.number for record in records}
        for row in csv.DictReader(self.earlier.splitlines(True)[1:]):
            if row.get("key") in numbers:
                self.add(numbers[row["key"]], row["kind"], row["what"], row["detail"], row["key"],
                         is_new=False)

    def write(self):
        """The new errors as lines to stderr, all rows to the file; without rows there is none."""
        text = io.StringIO(newline="")
        text.write(PRIVATE_LINE + "\n")
        csv.writer(text).writerows([self.COLUMNS] + [row for _, row in sorted(self.rows)])
        if not self.rows:
            if self.earlier:
                os.remove(self.path)
            return
        if text.getvalue() != self.earlier:
            with tk_utils.atomic_file(self.path, errors="replace", newline="") as file:
                file.write(text.getvalue())
        for line in self.lines:
            print(line, file=sys.stderr)
        n_errors = sum(row[0] == "error" for _, row in self.rows)
        if n_errors or self.is_news:
            print(f"{n_errors} records could not be used, {len(self.rows) - n_errors} notes; they "
                  f"are named in {self.path}, which is private"
                  + (" (remove it to try them again)" if n_errors else ""), file=sys.stderr)

    def kinds(self):
        """[(what, number of records)] of the errors, numbers in the text left out."""
        return Counter(re.sub(r"\d[\d.]*", "#", row[3]) for _, row in self.rows
                       if row[0] == "error").most_common()


def shown(found, number):
    item = found[number]
    if os.path.isdir(item.typed) or os.path.basename(item.typed).startswith("RECORDS"):
        return f"{item.typed} (recording {number + 1} of {len(found)})"
    return item.typed


SCALARS = ("map", "sbp", "dbp", "pp", "hr", "p_crit", "tpp", "r2", "reason")


class Contents(NamedTuple):
    """What the output holds but for its waveforms, some 50 bytes a segment."""
    encounters: list  # (file, patient, name, attributes)
    starts: np.ndarray  # [E + 1]: the first segment of each encounter
    columns: dict  # {field: [N]}
    rules: list  # of the default gate: (text, [N] whether it is kept)
    passed: np.ndarray  # [N]

    def of_encounters(self, attribute):
        return np.array([attributes[attribute] for _, _, _, attributes in self.encounters])

    def n_patients(self, segments=slice(None)):
        numbers = np.repeat(np.arange(len(self.encounters)), np.diff(self.starts))
        return len({self.encounters[e][1] for e in np.unique(numbers[segments])})


def read_contents(paths):
    encounters, columns, lengths = [], {key: [] for key in SCALARS}, [0]
    for path in paths:
        with datasets.open_file(path) as file:
            for patient, groups in file.items():
                for name, group in groups.items():
                    encounters.append((path, patient, name, dict(group.attrs)))
                    lengths.append(len(group["reason"]))
                    for key in SCALARS:
                        columns[key].append(group[key][:])
    columns = {key: np.concatenate(parts) for key, parts in columns.items()}
    rules = list(datasets.gate_rules(datasets.get_gate(datasets.DEFAULT_CONDITION), columns.get,
                                     np.ones(len(columns["reason"]), bool)))
    passed = np.logical_and.reduce([kept for _, kept in rules])
    return Contents(encounters, np.cumsum(lengths), columns, rules, passed)


def pass_line(contents):
    minutes = np.diff(contents.starts)
    least = datasets.get_gate(datasets.PUBLISHED_CONDITION).min_minutes
    strict = contents.passed & np.repeat(minutes >= least, minutes)
    return (f"{contents.passed.sum():,} of {len(contents.passed):,} segments pass the default "
            f"gate; {strict.sum():,} the published one, which asks for {least} minutes of record")


def delay_line(contents):
    sure = contents.of_encounters("ppg_delay_strength") >= SURE_DELAY
    if not sure.any():
        return "PPG behind ABP: not known for any record"
    low, middle, high = np.percentile(contents.of_encounters("ppg_delay_s")[sure], [5, 50, 95])
    return (f"PPG behind ABP, per record: median {middle:.2f} s (5th to 95th percentile {low:.2f} "
            f"to {high:.2f} s); known for sure in {sure.sum():,} of {len(sure):,} records")


def summary_tables(contents):
    """[(title, rows, headers)]: gate by gate, reasons, and labels beside the published cohort's."""
    left, gate = np.ones(len(contents.passed), bool), [("all segments", 0, len(contents.passed))]
    for text, kept in contents.rules:
        left &= kept
        gate.append((text, int((~kept).sum()), int(left.sum())))
    tables = [("The default quality gate, rule by rule", gate,
               ("rule", "segments that break it", "left"))]
    reasons = [(reason, int((contents.columns["reason"] >> bit & 1).sum()))
               for bit, reason in enumerate(labels.REASONS)]
    if any(n for _, n in reasons):
        tables.append(("Reasons against segments (a segment may have several)",
                       [row for row in reasons if row[1]], ("reason", "segments")))
    if contents.passed.any():
        rows = []
        for key in SCALARS[:-1]:
            values = contents.columns[key][contents.passed].astype(np.float64)
            cohort = PUBLISHED_COHORT.get(key)
            rows.append((key, datasets.FIELDS[key][1],
                         f"{values.mean():.2f} \u00b1 {values.std():.2f}",
                         f"{cohort[0]:.1f} \u00b1 {cohort[1]:.1f}" if cohort else ""))
        n = contents.n_patients(contents.passed)
        tables.append((f"Segments that pass, mean \u00b1 SD ({n} patients)", rows,
                       ("field", "unit", "here", "published cohort")))
    return tables


def print_summary(contents):
    print(f'{contents.of_encounters("left_over_s").sum() / 60:.1f} minutes at the records\' ends '
          f"dropped, as they fill no segment\n{delay_line(contents)}\n{pass_line(contents)}")
    for title, rows, headers in summary_tables(contents):
        print(f"\n{title}:")
        tk_utils.print_table(rows, headers)


def print_channels(found, options):
    """What --list-channels prints: one line per recording."""
    unreadable = 0
    for number, item in enumerate(found):
        try:
            channels = recordings.list_channels(item.path, options.csv_rate, options.hdf5)
        except RecordingError as error:
            print(f"{shown(found, number)}: {error.what}", file=sys.stderr)
            unreadable += 1
            continue
        chosen = {kind.upper(): recordings.choose_channel(channels, kind, name)
                  for kind, name in options.wanted.items()}
        texts = []
        for name, channel in channels.items():
            unit = channel.unit and " " + channel.unit
            use = "".join(f" -> {kind}" for kind, taken in chosen.items() if taken == name)
            texts.append(f"{name} ({channel.fs:g} Hz{unit}){use}")
        missing = "".join(f"; no {kind} found" for kind, name in chosen.items() if name is None)
        print(f'{shown(found, number)}: {", ".join(texts)}{missing}')
    return 1 if unreadable else 0


# ------------------------------------------------------------------------------- The quality report

N_EXAMPLES, EXAMPLES_SEED = 10, 0


def write_report(options, contents, problems, n_found):
    """One HTML page about the output that says nothing of who is in it."""
    came_in = [
        ("recordings found", n_found), ("recordings prepared", len(contents.encounters)),
        ("patients", contents.n_patients()), ("segments of a minute", len(contents.passed)),
        ("minutes at the ends that fill no segment",
         f'{contents.of_encounters("left_over_s").sum() / 60:.1f}'),
        ("label method", options.label_method), ("a beat begins at its", options.beats),
        ("PPG shifted by its delay", "yes" if options.align else "no")]
    body = [html_text("What came in", "h2"), html_table(came_in, ("", ""), "The input")]
    if problems.kinds():
        body.append(html_table(problems.kinds(), ("why a recording could not be used", "records")))
    body += [html_text("What passed", "h2"), html_text(pass_line(contents) + ".")]
    body += [html_table(rows, headers, title) for title, rows, headers in summary_tables(contents)]
    if contents.passed.any():
        body += [html_text("Distributions of the segments that pass", "h2"), html_figure(
            distributions_figure(contents), "Histograms of MAP, SBP, DBP, PP, HR and Pcrit",
            "Line and band: mean and SD of the published cohort (Chandrasekhar et al. 2023).")]
    body += [html_text("Delay of the PPG", "h2"), html_text(delay_line(contents) + ".")]
    body.append(html_figure(
        delays_figure(contents), "Histogram of the PPG's delay behind the ABP per record",
        "Unsure: the heart's rhythm varies so little that it may be a whole beat off."))
    rng = np.random.default_rng(EXAMPLES_SEED)
    for mask, title in ((contents.passed, "random segments that pass"),
                        (~contents.passed, "random segments that the gate refuses")):
        rows = rng.choice(np.flatnonzero(mask), min(N_EXAMPLES, mask.sum()), replace=False)
        body.append(html_text(f"{len(rows)} {title}", "h2"))
        for number, row in enumerate(rows, 1):
            fields = read_row(contents, row)
            text = "Pcrit {p_crit:.0f}, TPP {tpp:.0f}, MAP {map:.0f} mmHg, {hr:.0f} beats/min, " \
                   "r\u00b2 {r2:.2f}".format(**fields)
            if not contents.passed[row]:
                why = labels.reason_names(fields["reason"]) or [
                    "not " + rule for rule, kept in contents.rules if not kept[row]]
                text = f'Refused: {", ".join(why)}. {text}'
            body.append(html_figure(segment_figure(fields), f"ABP, PPG and fit of segment {number}",
                                    f"{number}. {text}"))
    tk_utils.html_page(options.report, "Quality of the prepared segments", "".join(body))


def read_row(contents, row):
    """{field: value} of one segment, waveforms included."""
    number = int(np.searchsorted(contents.starts, row, side="right")) - 1
    path, patient, name, _ = contents.encounters[number]
    with datasets.open_file(path) as file:
        return {key: item[row - contents.starts[number]]
                for key, item in file[patient][name].items()}


def distributions_figure(contents):
    figure = tk_utils.new_figure(9, 4.2)
    figure.subplots_adjust(hspace=0.45, wspace=0.2)
    for axes, (key, cohort) in zip(figure.subplots(2, 3).flat, PUBLISHED_COHORT.items()):
        mean, sd, limits = cohort
        values = contents.columns[key][contents.passed]
        axes.hist(values, 50, range=limits, color="#4c72b0",
                  weights=np.full(len(values), 100 / len(values)))
        axes.axvspan(mean - sd, mean + sd, color="#dd8452", alpha=0.25, lw=0)
        axes.axvline(mean, color="#dd8452")
        axes.set_xlim(limits)
        _plain_axes(axes, f"{key} ({datasets.FIELDS[key][1]})",
                    "% of segments" if key in ("map", "pp") else "")
    return figure


def delays_figure(contents):
    figure = tk_utils.new_figure(7, 1.8)
    axes = figure.subplots()
    delay_s = contents.of_encounters("ppg_delay_s")
    sure = contents.of_encounters("ppg_delay_strength") >= SURE_DELAY
    axes.hist([delay_s[sure], delay_s[~sure & np.isfinite(delay_s)]], stacked=True,
              bins=np.arange(*DELAY_RANGE_S, 0.02), color=["#4c72b0", "#b0b8c4"],
              label=["sure", "unsure"])
    axes.legend(frameon=False, fontsize=8)
    _plain_axes(axes, "PPG behind ABP (s)", "records")
    return figure


def segment_figure(fields):
    """A minute: ABP with the feet of its beats, PPG, and the beats' MAP over PP x HR with the line
    through Pcrit and their mean."""
    figure = tk_utils.new_figure(8.4, 2.1)
    grid = figure.add_gridspec(2, 2, width_ratios=(3, 1), wspace=0.2, hspace=0.12)
    above, below, right = (figure.add_subplot(at) for at in (grid[0, 0], grid[1, 0], grid[:, 1]))
    fs = datasets.FS
    abp, t = fields["abp"].astype(float), np.arange(datasets.SEGMENT_SAMPLES) / fs
    feet, _ = _feet(abp[None], fs)
    above.plot(t, abp, lw=0.6, color="#a02c2c")
    above.plot(feet, np.interp(feet, t, abp), ".", ms=3, color="black")
    below.plot(t, fields["ppg"], lw=0.6, color="#2c5aa0")
    above.tick_params(labelbottom=False)
    for axes, seconds, label in ((above, "", "ABP (mmHg)"), (below, "s", "PPG")):
        axes.set_xlim(0, datasets.SEGMENT_SECONDS)
        _plain_axes(axes, seconds, label)
    cuts = np.ceil(feet * fs).astype(int)
    beats = [abp[a:b] for a, b in zip(cuts, cuts[1:]) if a < b < a + labels.MAX_BEAT_SECONDS * fs]
    if beats:
        flow = np.array([(beat.max() - beat.min()) * 60 * fs / beat.size for beat in beats]) / 1000
        pressure = np.array([beat.mean() for beat in beats])
        right.plot(flow, pressure, ".", ms=3, color="0.3")
        if np.isfinite(fields["p_crit"]):
            slope = (np.nanmean(pressure) - fields["p_crit"]) / np.nanmean(flow)
            ends = np.array([0, np.nanmax(flow)])
            right.plot(ends, fields["p_crit"] + slope * ends, lw=1, color="#dd8452")
            right.plot(0, fields["p_crit"], "o", ms=4, color="#dd8452", clip_on=False)
        right.set_xlim(left=0)
    _plain_axes(right, "PP \u00d7 HR (mmHg/min / 1000)", "MAP of a beat (mmHg)")
    return figure


def _plain_axes(axes, x_label, y_label):
    axes.set_xlabel(x_label, fontsize=8)
    axes.set_ylabel(y_label, fontsize=8)
    axes.tick_params(labelsize=7)
    axes.spines[["top", "right"]].set_visible(False)


if __name__ == "__main__":
    sys.exit(tk_utils.run_script(main, "DataError", "RecordingError"))
