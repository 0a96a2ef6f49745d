"""Recorded waveforms -> one HDF5 file of labelled 60-s segments, ready for train_resnet.py.

    python prepare.py records/ --out data/icu.h5 --workers 4 --groups patients.csv
    python prepare.py night.csv 3141595_0001.hea --out data/two.h5 --beats peak
    python prepare.py records/ --list-channels

Per record: read, resample ABP and PPG to 60 Hz on one clock, cut minutes from the record's start,
label each minute from the very ABP that is stored, and write it, refused minutes included.
"""

import argparse
import csv
import multiprocessing
import os
import re
import sys
from collections import Counter, deque
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np

import datasets
import labels
import recordings
from datasets import FS, SEGMENT_SAMPLES, SEGMENT_SECONDS, DataError
from recordings import RecordingError
from tk_utils import atomic_path, print_table, progress, run_script

LABEL_METHOD = "published"
MMHG_PER_UNIT = {"mmhg": 1.0, "kpa": 7.50062}
PRIVATE_LINE = "# private: contains true record names and paths; do not share"
EXIT_CODES = """\
exit codes: 0 all records were prepared; 1 the file was written, but some records could not be used
(each has a line on stderr and a row in the private <out>_problems.csv); 2 no HDF5 file written."""

# Mean and SD in the published cohort, in mmHg and beats/min: constants of the published PPG system
# (Chandrasekhar et al., Nat Med 2023, and its companion code).
PUBLISHED_COHORT = {
    "map": (76.7, 11.2), "sbp": (118.1, 19.5), "dbp": (56.1, 10.2), "pp": (62.5, 18.5),
    "hr": (77.0, 17.3), "p_crit": (40.5, 15.5),
}


def parse_arguments(arguments=None):
    parser = argparse.ArgumentParser(
        allow_abbrev=False, description=__doc__, epilog=EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("inputs", nargs="+", metavar="INPUT",
        help="a WFDB record (or its .hea), a CSV with a header, or a folder of them")
    add("--out", metavar="FILE", help="the HDF5 file to write")
    add("--workers", type=int, default=1, metavar="N", help="processes (default: 1)")
    add("--groups", metavar="CSV",
        help="columns record,split_group: which records are of one patient (default: each its own)")
    add("--beats", choices=("foot", "peak"), default="foot",
        help="where a beat begins; foot is less biased, peak is the published one (default: foot)")
    add("--abp-channel", metavar="NAME", help="the arterial pressure (default: by its usual names)")
    add("--ppg-channel", metavar="NAME", help="the PPG (default: by its usual names)")
    add("--csv-rate", type=float, metavar="HZ",
        help="the rows of every CSV are evenly spaced at this rate; time columns are not used")
    add("--list-channels", action="store_true",
        help="print what each input holds and what would be chosen; prepare nothing")
    options = parser.parse_args(arguments)
    if not options.list_channels and not options.out:
        parser.error("--out FILE is required")
    if options.workers < 1:
        parser.error("--workers must be 1 or more")
    if options.csv_rate is not None and not 0 < options.csv_rate < 1e6:
        parser.error("--csv-rate must be a number of Hz above 0")
    return options


def main(arguments=None):
    options = parse_arguments(arguments)
    found = recordings.find_recordings(options.inputs)
    if options.groups:  # it may lie in the folder that is prepared
        found = [item for item in found if not _is_same_file(item.path, options.groups)]
    recordings.check_readers([item.path for item in found])
    if options.list_channels:
        return print_channels(found, options)
    problems = Problems(found, problems_path(options.out))
    patients = assign_patients(found, options.groups, problems)
    prepare = partial(
        prepare_record, beats=options.beats, csv_rate=options.csv_rate,
        wanted={"abp": options.abp_channel, "ppg": options.ppg_channel},
    )
    n_records, partial_s, reasons = 0, 0.0, Counter()
    with atomic_path(options.out) as temporary:
        with datasets.LayoutWriter(
            temporary, origin="recordings", label_method=LABEL_METHOD, beats=options.beats,
            reasons=labels.REASONS,
        ) as writer:
            results = progress(
                in_order(prepare, [item.path for item in found], options.workers),
                total=len(found), desc="records", unit="record",
            )
            for number, result in enumerate(results):
                for note in result.notes:
                    problems.note(number, note)
                if result.problem:
                    problems.error(number, result.problem, result.detail)
                else:
                    name = recordings.recording_name(found[number].path)
                    writer.write(patients[number], name, result.fields)
                    n_records, partial_s = n_records + 1, partial_s + result.partial_s
                    for bit, reason in enumerate(labels.REASONS):
                        reasons[reason] += int((result.fields["reason"] >> bit & 1).sum())
        problems.write()
        if not n_records:
            raise DataError(f'{", ".join(options.inputs)}: none of the records could be used')
        print(f"{n_records} of {len(found)} records prepared; {partial_s / 60:.1f} minutes at "
              "their ends dropped, as they fill no segment")
        print_summary(temporary, reasons)
    print(f"written: {options.out}")
    return 1 if problems.lines else 0


# ---------------------------------------------------------------------------------------------
# One record


@dataclass
class Result:
    fields: dict = field(default_factory=dict)  # the layout's fields; empty if there is a problem
    partial_s: float = 0.0  # at the record's end, in no segment
    notes: list = field(default_factory=list)  # lines for the private problems file
    problem: str = ""  # says nothing about who it was; `detail` may
    detail: str = ""


def prepare_record(path, beats, csv_rate, wanted):
    """Result of one recorded file; `wanted` is {'abp': channel name or None, 'ppg': ...}."""
    notes = []
    try:
        recording = recordings.read_recording(
            path, lambda names: list(choose(path, names, wanted).values()), csv_rate
        )
        chosen = choose(path, recording.channels, wanted)
        abp, ppg = (recording.channels[chosen[kind]] for kind in ("abp", "ppg"))
        for name, channel in (("ABP", abp), ("PPG", ppg)):
            if channel.fs < labels.MIN_FS_HZ:
                raise RecordingError(
                    path, f"its {name} channel has {channel.fs:g} samples/s; "
                    f"a waveform needs {labels.MIN_FS_HZ} or more")
        fields, partial_s = cut_segments(path, to_mmhg(abp, notes), ppg)
    except RecordingError as error:
        return Result(notes=notes, problem=error.what, detail=error.detail)
    fields.update(labels.label_segments(fields["abp"], FS, beats=beats, method=LABEL_METHOD))
    fields["reason"] = fields["reason"] | labels.ppg_reasons(fields["ppg"], FS)
    return Result(fields, partial_s, notes)


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
    factor = MMHG_PER_UNIT.get(channel.unit.lower())
    if factor is None and channel.unit:
        notes.append(f"ABP has the unit {channel.unit!r}; taken as mmHg")
    return replace(channel, samples=channel.samples * (factor or 1.0))


def cut_segments(path, abp, ppg):
    """({abp, ppg: [N, 3600] float32, start_s: [N]}, seconds left over) of two Channels."""
    duration_s = max(c.start_s + c.samples.size / c.fs for c in (abp, ppg))
    n = int((duration_s + 1e-6) // SEGMENT_SECONDS)
    if n < 1:
        raise RecordingError(path, f"lasts {duration_s:.1f} s, less than one segment")
    fields = {
        name: recordings.resample(channel, FS, n * SEGMENT_SAMPLES).reshape(n, SEGMENT_SAMPLES)
        for name, channel in (("abp", abp), ("ppg", ppg))
    }
    fields["start_s"] = np.arange(n) * float(SEGMENT_SECONDS)
    return fields, max(0.0, duration_s - n * SEGMENT_SECONDS)


def in_order(function, items, workers):
    """`function` of each item, in order, over processes; at most 2 x workers are under way."""
    if workers == 1:
        yield from map(function, items)
        return
    waiting = deque()
    context = multiprocessing.get_context("spawn")  # fork is not safe beside HDF5 and threads
    try:
        with ProcessPoolExecutor(min(workers, len(items)), mp_context=context) as pool:
            for item in items:
                waiting.append(pool.submit(function, item))
                if len(waiting) >= 2 * workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
    except BrokenProcessPool:
        raise DataError(
            "a worker process was ended from outside (out of memory?); lower --workers"
        ) from None


# ---------------------------------------------------------------------------------------------
# Whose record it is


def assign_patients(found, groups_path, problems):
    """The patient of each recording: its split group, or its own name."""
    groups = read_groups(groups_path) if groups_path else {}
    patients, first_of = [], {}
    for number, item in enumerate(found):
        name = recordings.recording_name(item.path)
        if groups_path and name not in groups:
            problems.note(number, "not in the groups file: taken as a patient of its own")
        patients.append(groups.get(name, name))
        twin = first_of.setdefault((patients[-1], name), number)
        if twin != number:
            problems.error(twin, "same patient and record name as another input")
            problems.error(number, "same patient and record name as another input")
            problems.write(quiet=True)
            raise DataError(
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


def _is_same_file(a, b):
    return os.path.realpath(a) == os.path.realpath(b)


# ---------------------------------------------------------------------------------------------
# What is told


def problems_path(out):
    return os.path.splitext(out)[0] + "_problems.csv"


class Problems:
    """Errors and notes per record: named in a private file, unnamed on stderr.

    File names of recordings are often patients' numbers; stderr ends up in logs. A path that the
    user typed is shown as typed; a file found in a typed folder, by its number.
    """

    def __init__(self, found, path):
        self.found, self.path, self.rows, self.lines = found, path, [], []

    def note(self, number, text):
        item = self.found[number]
        self.rows.append(("note", recordings.recording_name(item.path), item.path, text, ""))

    def error(self, number, text, detail=""):
        item = self.found[number]
        name = recordings.recording_name(item.path)
        self.rows.append(("error", name, item.path, text, detail))
        self.lines.append(f"{shown(self.found, number)}: {text}")

    def write(self, quiet=False):
        """The errors as lines to stderr, all rows to the file; an earlier run's file goes."""
        if not self.rows:
            if _first_line(self.path) == PRIVATE_LINE:
                os.remove(self.path)
            return
        with atomic_path(self.path) as temporary:
            with open(temporary, "w", encoding="utf-8", newline="") as file:
                file.write(PRIVATE_LINE + "\n")
                rows = csv.writer(file)
                rows.writerow(("kind", "record", "path", "what", "detail"))
                rows.writerows(self.rows)
        if not quiet:
            for line in self.lines:
                print(line, file=sys.stderr)
            n_notes = len(self.rows) - len(self.lines)
            print(f"{len(self.lines)} records could not be used, {n_notes} notes; they are named "
                  f"in {self.path}, which is private", file=sys.stderr)


def _first_line(path):
    if not os.path.isfile(path):
        return None
    with open(path, encoding="utf-8", errors="replace") as file:
        return file.readline().rstrip("\n")


def shown(found, number):
    item = found[number]
    if os.path.isdir(item.typed):
        return f"{item.typed} (recording {number + 1} of {len(found)})"
    return item.typed


def print_summary(path, reasons):
    """Gate by gate, reasons, and the labels beside the published cohort's."""
    report = datasets.gate_report(path)
    total, passed = report[0][2], report[-1][2]
    print("\nThe default quality gate, rule by rule:")
    print_table(report, ("rule", "segments that break it", "left"))
    strict = datasets.gate_report(path, datasets.PUBLISHED_CONDITION)[-1][2]
    print(f"{passed:,} of {total:,} segments pass it; {strict:,} the published gate, "
          "which asks for 100 minutes per encounter")
    if any(reasons.values()):
        print("\nReasons against segments (a segment may have several):")
        print_table([(reason, n) for reason, n in reasons.items() if n], ("reason", "segments"))
    if not passed:
        return
    index = datasets.create_dataset_index(path=path)
    table = datasets.TPP_PPG_dataset(index, "segment", ["ppg", "tpp"])
    rows = []
    for key in ("map", "sbp", "dbp", "pp", "hr", "p_crit", "tpp", "r2"):
        values = table.column(key).numpy().astype(np.float64)
        cohort = PUBLISHED_COHORT.get(key)
        rows.append((key, datasets.FIELDS[key][1], f"{values.mean():.2f} \u00b1 {values.std():.2f}",
                     f"{cohort[0]:.1f} \u00b1 {cohort[1]:.1f}" if cohort else ""))
    print(f"\nSegments that pass, mean \u00b1 SD ({index.n_patients} patients):")
    print_table(rows, ("field", "unit", "here", "published cohort"))


def print_channels(found, options):
    """What --list-channels prints: one line per recording."""
    wanted, unreadable = {"abp": options.abp_channel, "ppg": options.ppg_channel}, 0
    for number, item in enumerate(found):
        try:
            channels = recordings.list_channels(item.path, options.csv_rate)
        except RecordingError as error:
            print(f"{shown(found, number)}: {error.what}", file=sys.stderr)
            unreadable += 1
            continue
        chosen = {
            recordings.choose_channel(channels, kind, wanted[kind]): f" -> {kind.upper()}"
            for kind in ("abp", "ppg")
        }
        print(f"{shown(found, number)}: " + ", ".join(
            f'{name} ({channel.fs:g} Hz{channel.unit and " " + channel.unit}){chosen.get(name, "")}'
            for name, channel in channels.items()
        ) + "".join(f"; no {kind.upper()} found" for kind in ("abp", "ppg")
                    if f" -> {kind.upper()}" not in [chosen.get(name) for name in channels]))
    return 1 if unreadable else 0


if __name__ == "__main__":
    sys.exit(run_script(main, DataError, RecordingError))
