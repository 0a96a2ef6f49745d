"""Recordings -> one HDF5 file of labelled 60-s segments, ready for train_resnet.py.

    python prepare.py records/ --out data/icu.h5 --workers 4 --groups patients.csv --report icu.html
    python prepare.py night.csv 3141595_0001.hea --out data/two.h5 --align
    python prepare.py records/ --list-channels

Each record is cut into minutes at 60 Hz and each minute is labelled from its own arterial pressure.
The record is stored as a piece in the hidden folder .<out>.parts; at the end, all are joined. After
an interruption, the same command continues. A record that cannot be used gets a line on stderr and
a row in the private file <out>_problems.csv.

Needs recordings, formats, tables, signals, labels, datasets, report, metrics, tk_utils and
templates/ in the same folder.
"""

import argparse
import contextlib
import csv
import hashlib
import os
import pathlib
import re
import shutil
import sys
import traceback
from collections import Counter, defaultdict
from functools import partial
from typing import Dict, List, NamedTuple

import numpy as np
import pandas as pd
from scipy import ndimage

import datasets
import labels
import recordings
import report
import signals
import tk_utils
from datasets import DataError
from recordings import PRIVATE_LINE, RecordingError, public_name
from tk_utils import counted

MAX_CELL = 1000     # characters of a message in the problems file
# With a record's files, these determine its rows: a change of any prepares the record again.
SHAPING_OPTIONS = ("label_method", "align", "abp_channel", "ppg_channel", "fs", "unit")
SHAPING_MODULES = ("prepare", "recordings", "formats", "tables", "signals", "labels", "datasets")


def parse_arguments(arguments=None):
    parser = tk_utils.ScriptParser(description=__doc__,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("inputs", nargs="+", metavar="INPUT",
                        help="a recording (a WFDB record, a CSV with a header, ...) or a folder")
    add = parser.add_argument_group("output").add_argument
    add("--out", metavar="FILE", help="the HDF5 file to write")
    add("--report", metavar="HTML", help="also write a quality page")
    add("--workers", type=int, default=1, metavar="N", help="processes (default: 1)")
    add = parser.add_argument_group("patients and labels").add_argument
    add("--groups", metavar="CSV",
        help="columns record (a file's name, or the end of its path: p1/night) and split_group "
             "(its patient; default: each record is its own patient)")
    add("--label-method", choices=tuple(labels.METHODS), default="published",
        help="how Pcrit is estimated (docs/labels.md; default: published)")
    add("--align", action="store_true",
        help="shift each record's PPG by its delay behind the ABP (default: only report it)")
    add = recordings.add_channel_options(parser)
    add("--list-channels", action="store_true",
        help="print the channels of each input and which would be used, and why; prepare nothing")
    options = parser.parse_args(arguments)
    if not (options.list_channels or options.out):
        parser.error("--out FILE is required")
    if options.report and not options.report.lower().endswith((".html", ".htm")):
        parser.error("--report: expected a name that ends in .html")
    return options


def main(arguments=None):
    options = parse_arguments(arguments)
    found = recordings.find_recordings(options.inputs)
    own = {os.path.realpath(path) for path in (options.groups, options.out) if path}
    found = [item for item in found     # the groups file and the output may lie in the folder
             if not item.in_folder or os.path.realpath(item.path) not in own]
    if options.list_channels:
        return print_channels(found, options)
    groups = read_groups(options.groups, found) if options.groups else {}
    records = plan(found, groups, options)
    problems = Problems(records, options.out)
    for number, record in enumerate(records):
        if options.groups and number not in groups:
            problems.add("note", record, "not in the groups file: treated as its own patient")
    inputs = [path for item in found for path in recordings.files_of(item.path)]
    for path in filter(None, (options.out, problems.path, options.report)):
        tk_utils.check_writable(path, [*inputs, options.groups])
    with work_folder(options.out) as parts:
        prepare_missing(records, problems, options, parts)
        problems.write()
        usable = [record for record in records if record.key not in problems.failed]
        if not usable:
            raise DataError(f'{", ".join(options.inputs)}: none of the records could be used')
        prepared = find_prepared(options.out, parts)
        in_output = {key for key, path in prepared.items() if path == options.out}
        is_new = in_output != {record.key for record in usable}
        if is_new:
            write_output(usable, prepared, options)
    count = f"{len(usable)} of {counted(len(records), 'record')}"
    contents = read_contents(options.out) if is_new or options.report else {}
    if is_new:
        print(f"{count} prepared")
        report.print_quality(contents)
        print(f"written: {options.out}")
    else:
        print(f"nothing to do: {options.out} holds {count}, prepared with these options from these "
              "files")
    if options.report:
        report.write_quality(options.report, contents, [
            ("Input", [("recordings found", len(records)), ("label method", options.label_method),
                       ("PPG shifted by its delay", "yes" if options.align else "no")], ("", "")),
            ("Recordings that could not be used", problems.kinds("error"), ("why", "records")),
            ("Notes", problems.kinds("note"), ("what", "records"))])
        print(f"written: {options.report}")
    return int(bool(problems.failed))


# ----------------------------------------------------------------------------------------- planning

class Record(NamedTuple):
    """A recording and its place in the output. The key is a hash of everything that determines its
    rows: the options, this program, the sizes and times of its files. A finished piece is called
    <key>.h5, and the record's group in the output has the attribute `key`."""
    path: str
    public_name: str
    group_names: tuple      # (patient, name)
    key: str


def plan(found, groups, options) -> List[Record]:
    """A Record for each recording; those without a group are their own patients."""
    folder = pathlib.Path(__file__).parent
    made_with = [getattr(options, name) for name in SHAPING_OPTIONS] + [
        digest((folder / f"{name}.py").read_bytes()) for name in SHAPING_MODULES]
    records = []
    for number, (item, name) in enumerate(zip(found, record_names(found))):
        group_names = (groups.get(number, name), name)
        files = [os.stat(path) for path in recordings.files_of(item.path)]
        key = digest([group_names, os.path.abspath(item.path), made_with,
                      [(file.st_size, file.st_mtime_ns) for file in files]])
        records.append(Record(item.path, public_name(found, number), group_names, key))
    return records


def digest(value) -> str:
    """A hash, because what the user typed may name a patient and must not be stored as it is."""
    return hashlib.blake2b(repr(value).encode(), digest_size=10).hexdigest()


def record_names(found) -> List[str]:
    """A unique name for each recording, fit for an HDF5 group: the file's name without its ending;
    where that repeats, the path below the typed folder ('p1:night', 'p2:night')."""
    names = [os.path.basename(item.name) for item in found]
    for longer in ([item.name for item in found], [os.path.relpath(item.path) for item in found]):
        repeated = {name for name, n in Counter(names).items() if n > 1}
        names = [path if name in repeated else name for name, path in zip(names, longer)]
    return [re.sub(r"[/\\]", ":", name).encode("utf-8", "backslashreplace").decode()
            for name in names]


def read_groups(path, found) -> Dict[int, str]:
    """{number of a recording: its group} from the groups file."""
    try:
        table = pd.read_csv(path, dtype=str, keep_default_na=False, encoding="utf-8-sig",
                            usecols=["record", "split_group"], skip_blank_lines=False,
                            index_col=False)
    except ValueError as error:  # also bytes that are not UTF-8, and pandas' ParserError
        raise RecordingError(path, "expected a CSV file with the columns record,split_group",
                             error) from None
    known_as = defaultdict(set)     # {end of a path, with or without ending: recordings' numbers}
    for number, item in enumerate(found):
        words = os.path.abspath(item.path).split(os.sep)
        for end in ("/".join(words[n:]) for n in range(len(words))):
            known_as[end].add(number)
            known_as[os.path.splitext(end)[0]].add(number)
    groups = {}
    for line, (record, group) in enumerate(zip(table["record"], table["split_group"]), 2):
        record, group, wrong = record.strip().replace("\\", "/"), group.strip(), None
        numbers = known_as.get(record, ())
        if not record or group in ("", ".") or "/" in group:
            wrong = "expected a record and a group without /"
        elif len(numbers) > 1:
            wrong = "several recordings have this name; give the end of the path, as in folder/name"
        elif any(groups.setdefault(number, group) != group for number in numbers):
            wrong = "this record has two groups"
        if wrong:
            raise RecordingError(path, f"line {line}: {wrong}")
    if not groups:
        raise RecordingError(path, "none of its records is one of these recordings")
    return groups


def find_prepared(out, parts):
    """{key: file that holds the record's group}: the output, or a piece of an unfinished run."""
    prepared = {path.stem: str(path) for path in pathlib.Path(parts).glob("*.h5")}
    if os.path.lexists(out):
        with datasets.open_file(out) as file, datasets.reading(out):
            if "prepared_with" not in file.attrs:
                raise DataError("was not written by prepare.py; give another --out, or remove it")
            prepared.update((group.attrs["key"], out) for groups in file.values()
                            for group in groups.values())
    return prepared


@contextlib.contextmanager
def work_folder(out):
    """The hidden folder for the pieces of one run at a time; removed when the run has finished."""
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


# --------------------------------------------------------------------------------------- one record

def prepare_missing(records, problems, options, parts):
    """Write the pieces that are missing; add the problems found."""
    prepared = find_prepared(options.out, parts)
    missing = [record for record in records
               if record.key not in prepared and record.key not in problems.failed]
    if missing:
        print(f"reading {counted(len(missing), 'record')}", flush=True)
    results = tk_utils.in_processes(partial(prepare_record, options=options, parts=parts), missing,
                                    options.workers)
    for record, rows in tk_utils.progress(results, total=len(missing), desc="records",
                                          unit="record", disable=not missing):
        if isinstance(rows, tk_utils.ProcessDied):
            rows = [("error", str(rows), "")]
        for kind, what, detail in rows:
            problems.add(kind, record, what, detail, record.key)


def prepare_record(record, options, parts) -> list:
    """Write the piece of one record. Returns [('note' or 'error', what, detail)], of which only the
    detail may identify the record. Raises OSError if the piece cannot be written."""
    rows = []
    try:
        fields, attributes = read_segments(record.path, options, rows)
    except RecordingError as error:
        return [*rows, ("error", error.what, error.detail)]
    except MemoryError:
        return [*rows, ("error", "not enough memory; fewer --workers leave more for each", "")]
    except Exception as error:  # noqa: BLE001 - one record in an archive must not end the run
        return [("error", f"{type(error).__name__}, a bug in this program: please report what the "
                 "problems file says", traceback.format_exc())]
    with tk_utils.atomic_path(os.path.join(parts, record.key + ".h5")) as temporary, \
            writing(temporary, options) as writer:
        writer.write(*record.group_names, fields)
        writer.file["/".join(record.group_names)].attrs.update(attributes, key=record.key)
    return rows


def writing(path, options, **attributes):
    return datasets.LayoutWriter(path, "recordings", options.label_method, labels.BEATS,
                                 signals.REASONS, **attributes)


def read_segments(path, options, rows):
    """(fields of the layout, attributes of the encounter) of a recording; adds notes to `rows`."""
    recorded = open_recording(path, options)
    for kind in ("abp", "ppg"):
        if kind not in recorded.chosen:
            raise RecordingError(path, f"no {kind.upper()}: {recorded.reasons[kind]}; see "
                                       f"--list-channels and --{kind}-channel",
                                 "it has " + (", ".join(recorded.channels) or "no channels"))
    blocks = list(recorded)
    unknown = [f"--unit {name}: no such channel" for name in recorded.unknown_units]
    rows += [("note", note, "") for note in recorded.notes + unknown]
    if not blocks:
        raise RecordingError(path, f"lasts {recorded.left_over_s:.1f} s, with no uninterrupted "
                                   f"{datasets.SEGMENT_SECONDS} s of PPG")
    start_s, abp, ppg = (np.concatenate([getattr(minutes, name) for minutes in blocks])
                         for name in ("start_s", "abp", "ppg"))
    delay_s, strength, delays_s = signals.ppg_delay(abp, ppg, datasets.FS)
    shift_s = delay_s if options.align and strength >= signals.SURE_DELAY else 0.0
    if shift_s:
        ppg = shifted(ppg, start_s, shift_s)
    elif options.align:
        rows.append(("note", "the PPG's delay is uncertain: not aligned", ""))
    fields = {"abp": abp, "ppg": ppg, "start_s": start_s, "ppg_delay_s": delays_s - shift_s,
              **labels.label_segments(abp, datasets.FS, method=options.label_method)}
    for key in datasets.VITALS:
        if key in recorded.chosen and key not in fields:        # a monitor's numbers
            held = np.concatenate([np.where(
                minutes.number_age_s[key] <= recordings.MAX_AGE_S, minutes.numbers[key], np.nan)
                for minutes in blocks])
            if np.isfinite(held).any():
                fields[key] = held
    quality = signals.signal_quality(abp, ppg, datasets.FS)
    quality["reason"] |= fields["reason"]
    return {**fields, **quality}, {
        "ppg_delay_s": delay_s, "ppg_delay_strength": strength, "ppg_shift_s": shift_s,
        "left_over_s": recorded.left_over_s}


def open_recording(path, options):
    return recordings.read_windows(path, **datasets.WINDOW, **recordings.channel_options(options),
                                   polarity=signals.ppg_polarity)


def shifted(ppg, start_s, shift_s):
    """ppg [N, samples] moved `shift_s` earlier, across consecutive minutes; NaN where samples are
    missing."""
    out = np.full_like(ppg, np.nan)
    new = np.flatnonzero(np.diff(start_s) != datasets.SEGMENT_SECONDS) + 1
    for rows in np.split(np.arange(len(ppg)), new):
        wave, gap = map(np.ravel, signals.fill_missing(ppg[rows].reshape(1, -1)))
        at = np.arange(wave.size) + shift_s * datasets.FS
        moved = ndimage.map_coordinates(wave, [at], order=5, mode="nearest")
        neighbours = np.clip([np.floor(at), np.ceil(at)], 0, wave.size - 1).astype(int)
        moved[gap[neighbours].any(0) | (at < 0) | (at > wave.size - 1)] = np.nan
        out[rows] = moved.reshape(len(rows), -1)
    return out


def write_output(records, prepared, options):
    """Join the records' groups in a new output, atomically."""
    with tk_utils.atomic_path(options.out) as temporary, \
            writing(temporary, options, prepared_with="prepare.py") as writer:
        for record in records:
            with datasets.open_file(prepared[record.key]) as source:
                group = source["/".join(record.group_names)]
                writer.write(*record.group_names, {key: item[:] for key, item in group.items()})
                writer.file[group.name].attrs.update(group.attrs)


# ---------------------------------------------------------------------------------------- reporting

def read_contents(path) -> dict:
    """What report.print_quality and write_quality need of a prepared file."""
    records, tables, gate = [], [], datasets.get_gate(datasets.DEFAULT_CONDITION)
    with datasets.open_file(path) as file:
        for patient, groups in file.items():
            for name, group in groups.items():
                records.append(dict(group.attrs))
                scalars = {key: item[:] for key, item in group.items() if item.ndim == 1}
                passed = datasets.passes_gate(gate, scalars.get, np.ones(len(group["ppg"]), bool))
                tables.append(pd.DataFrame({**scalars, "patient": patient, "name": name,
                                            "passed": passed}))
    records = pd.DataFrame(records)
    segments = pd.concat(tables).rename_axis("row").reset_index()
    segments["reasons"] = segments["reason"].map({
        mask: [name.replace("_", " ").replace("abp", "ABP").replace("ppg", "PPG")
               for name in signals.reason_names(mask)] for mask in segments["reason"].unique()})
    waves, titles = [], []              # of 3 random segments that pass and 3 that do not
    examples = segments.sample(frac=1, random_state=0).groupby("passed").head(3)
    with datasets.open_file(path) as file:
        for row in examples.sort_values("passed", ascending=False, kind="stable").itertuples():
            group = file[row.patient][row.name]
            waves += [group["abp"][row.row], group["ppg"][row.row]]
            titles += [f"ABP: MAP {row.map:.0f}, Pcrit {row.p_crit:.0f} mmHg, r² {row.r2:.2f}, "
                       + ("passes" if row.passed else "refused"), f"PPG {', '.join(row.reasons)}"]
    return {"segments": segments, "gate": datasets.gate_report(path), "n_records": len(records),
            "delays_s": records["ppg_delay_s"][records["ppg_delay_strength"] >= signals.SURE_DELAY],
            "minutes_dropped": records["left_over_s"].sum() / 60, "waves": waves, "titles": titles}


class Problems:
    """Errors and notes on records: with names in a private file, without names on stderr.

    A record that could not be used is not tried again while its key is in the file.
    """

    COLUMNS = ("kind", "record", "path", "what", "detail", "key")

    def __init__(self, records, out):
        self.path = os.path.splitext(os.path.normpath(out))[0] + "_problems.csv"
        self.earlier, self.lines = [], []
        if os.path.lexists(self.path):
            with open(self.path, encoding="utf-8", errors="replace", newline="") as file:
                if file.readline().rstrip("\r\n") != PRIVATE_LINE:
                    raise DataError(f"{self.path}: was not written by prepare.py, which needs this "
                                    "name; rename it, or give another --out")
                self.earlier = list(map(tuple, csv.reader(file)))[1:]
        keys = {record.key for record in records}       # a changed record has a new key
        self.rows = [row for row in self.earlier if row[-1] in keys]
        self.failed = {row[-1] for row in self.rows if row[0] == "error"}

    def add(self, kind, record, what, detail="", key=""):
        """Add a row. A later run keeps it if it has the record's key."""
        name = os.path.splitext(os.path.basename(record.path))[0]
        self.rows.append(tuple(map(safe_cell, (kind, name, record.path, what, detail, key))))
        if kind == "error":
            self.failed.add(key)
            self.lines.append(f"{record.public_name}: {tk_utils.printable(what)}")

    def write(self):
        """Print the new errors on stderr, write all rows to the file; without rows, remove it."""
        self.rows.sort()
        is_new = self.rows != self.earlier
        if is_new and self.rows:
            with tk_utils.atomic_file(self.path, newline="") as file:
                file.write(PRIVATE_LINE + "\n")
                csv.writer(file, lineterminator="\n").writerows([self.COLUMNS, *self.rows])
        elif is_new:
            os.remove(self.path)
        for line in self.lines:
            print(line, file=sys.stderr)
        if self.failed:
            print(f"{counted(len(self.failed), 'record')} could not be used; named in {self.path}, "
                  "which is private (remove it to try them again)", file=sys.stderr)
        for text, n in self.kinds("note") if is_new else ():
            print(f"note: {text} ({counted(n, 'record')}, see {self.path})", file=sys.stderr)

    def kinds(self, kind):
        """[(what, number of records)]; '#' stands for the numbers in texts that differ."""
        texts = [row[3] for row in self.rows if row[0] == kind]
        if len(set(texts)) > 1:
            texts = [re.sub(r"\d[\d.,]*", "#", text) for text in texts]
        return Counter(texts).most_common()


def safe_cell(text):
    """Text in one line that fits in a cell and that a spreadsheet does not take for a formula."""
    text = tk_utils.printable(text)[:MAX_CELL]
    return "'" + text if text.startswith(("=", "+", "-", "@")) else text


def print_channels(found, options):
    """Print the channels of each recording and which are used, and why; returns the exit code."""
    code = 0
    for number, item in enumerate(found):
        try:
            recorded = open_recording(item.path, options)
        except RecordingError as error:
            print(f"{public_name(found, number)}: {error.what}", file=sys.stderr)
            code = 1
            continue
        print(f"{public_name(found, number)}: {counted(len(recorded.channels), 'channel')}")
        rows = []
        for name, channel in recorded.channels.items():
            kinds = [kind for kind, taken in recorded.chosen.items() if taken == name]
            why = dict.fromkeys(recorded.reasons[kind] for kind in kinds)   # each once
            rows.append((name, f"{channel.fs:g} Hz" if channel.fs > 0 else "", channel.unit,
                         " ".join(kinds).upper(), "; ".join(why)))
        tk_utils.print_table(rows, ("channel", "rate", "unit", "taken as", "why"))
        for kind, why in recorded.reasons.items():
            if kind not in recorded.chosen:
                print(f"no {kind.replace('_', ' ').upper()}: {why}")
    return code


if __name__ == "__main__":
    sys.exit(tk_utils.run_script(main, DataError, RecordingError, MemoryError))
