"""Recordings -> one HDF5 file of labelled 60-s segments, ready for train_resnet.py.

    python prepare.py records/ --out data/icu.h5 --workers 4 --groups patients.csv --report icu.html
    python prepare.py night.csv 3141595_0001.hea --out data/two.h5 --align
    python prepare.py records/ --list-channels

Each record is read minute by minute at 60 Hz, every minute is labelled from its own arterial
pressure, and the record is stored as one piece in the hidden folder .<out>.parts. When all pieces
are there, they are joined. After an interruption, the same command continues.

Needs recordings, signals, labels, datasets, quality, report, tk_utils and templates/ beside it.
"""

import argparse
import contextlib
import hashlib
import json
import os
import pathlib
import re
import shutil
import sys
import traceback
from collections import Counter
from functools import partial
from typing import List, NamedTuple, Sequence

import numpy as np
import pandas as pd
from scipy import ndimage

import datasets
import labels
import quality
import recordings
import signals
import tk_utils
from datasets import DataError
from recordings import RecordingError
from tk_utils import counted

EXIT_CODES = """\
exit codes: 0 all records are prepared; 1 the output was written, but some records could not be used
(each has a line on stderr and a row in the private <out>_problems.csv); 2 no output written."""

SHAPING = ("label_method", "align", "abp_channel", "ppg_channel", "fs", "unit")  # shape the rows


def parse_arguments(arguments=None):
    parser = tk_utils.ScriptParser(
        description=__doc__, epilog=EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("inputs", nargs="+", metavar="INPUT",
                        help="a recording (a WFDB record or its .hea, a CSV with a header, ...), "
                             "or a folder")
    add = parser.add_argument_group("output").add_argument
    add("--out", metavar="FILE", help="the HDF5 file to write")
    add("--report", metavar="HTML", help="also write a quality page")
    add("--workers", type=int, default=1, metavar="N", help="processes (default: 1)")
    add = parser.add_argument_group("patients and labels").add_argument
    add("--groups", metavar="CSV",
        help="columns record,split_group: which records belong to one patient (default: each is "
             "its own patient); a record is its file's name or the end of its path, p1/night")
    add("--label-method", choices=tuple(labels.METHODS), default="published",
        help="how Pcrit is estimated, docs/labels.md (default: published)")
    add("--align", action="store_true",
        help="shift each record's PPG by its delay behind the ABP (default: only report it)")
    add = recordings.add_channel_options(parser)
    add("--list-channels", action="store_true",
        help="print the channels of each input, which would be taken, and why; prepare nothing")
    options = parser.parse_args(arguments)
    for fine, message in (
            (options.list_channels or options.out, "--out FILE is required"),
            (options.workers > 0, "--workers must be 1 or more"),
            (not options.report or options.report.lower().endswith((".html", ".htm")),
             "--report: expected a name that ends in .html")):
        if not fine:
            parser.error(message)
    return options


def main(arguments=None):
    options = parse_arguments(arguments)
    found = recordings.find_recordings(options.inputs)
    skipped = found.skipped
    found = without_own_files(found, options)
    if options.list_channels:
        return print_channels(found, options)
    recordings.check_readers(found)
    problems = Problems(found, options.out)
    recordings.check_outputs([options.out, problems.path, options.report], found, [options.groups])
    unopened = problems.add_skipped(skipped)
    with work_folder(options.out) as parts:
        made_with = fingerprints(options)
        held = read_output(options.out, made_with)
        records = plan(found, options.groups, problems, made_with)
        problems.recall(records)
        print_changes(options.out, held, records, problems.failed)
        clean_up(parts, records)
        prepare_missing(records, held, problems, options, parts)
        problems.write()
        usable = [record for record in records if record.key not in problems.failed]
        if not usable:
            raise DataError(f'{", ".join(options.inputs)}: none of the records could be used')
        written = write_output(usable, held, options, made_with, parts)
    if not written:
        print(f"nothing to do: {options.out} holds {len(usable)} of "
              f"{counted(len(records), 'record')}, prepared with these options from these files")
    new_page = options.report and (written or not os.path.isfile(options.report))
    if written or new_page:
        contents = quality.read_contents(options.out)
    if written:
        print(f"{len(usable)} of {counted(len(records), 'record')} prepared")
        quality.print_summary(contents)
        print(f"written: {options.out}")
    if new_page:
        quality.write_page(options.report, contents, {
            "recordings found": len(records), "label method": options.label_method,
            "PPG shifted by its delay": "yes" if options.align else "no"}, [
                ("Recordings that could not be used", problems.kinds("error"), ("why", "records")),
                ("Notes", problems.kinds("note"), ("what", "records"))])
        print(f"written: {options.report}")
    return int(bool(problems.failed) or unopened)


# ----------------------------------------------------------------------------------------- planning

# A record's key is a hash of everything that shapes its rows: sizes and times of its files, the
# options, this program. A piece with that name is finished, and so is a group of the output with
# that key. All other records are to be prepared.

class Record(NamedTuple):
    number: int  # in the list of recordings found
    path: str
    patient: str
    name: str
    key: str


def without_own_files(found, options):
    """The recordings found, without the groups file and the output, which may lie among them."""
    own = {os.path.realpath(path) for path in (options.groups, options.out) if path}
    return [item for item in found
            if not item.in_folder or os.path.realpath(item.path) not in own]


def fingerprints(options):
    """{option: hash of its value}; hashes, because what was typed may name a patient."""
    made_with = {name: getattr(options, name) for name in SHAPING}
    made_with["program"] = b"".join(
        pathlib.Path(module.__file__).read_bytes()
        for module in (labels, recordings, signals, sys.modules[__name__]))
    return {name: digest(value) for name, value in made_with.items()}


def digest(value):
    return hashlib.blake2b(repr(value).encode(), digest_size=10).hexdigest()


def plan(found, groups_path, problems, made_with):
    """A Record for each recording found."""
    names = record_names(found)
    patients = assign_patients(found, names, groups_path, problems)
    records = []
    for number, (item, patient, name) in enumerate(zip(found, patients, names)):
        stats = [os.stat(path) for path in recordings.files_of(item.path) if os.path.exists(path)]
        key = digest([patient, name, os.path.abspath(item.path), made_with,
                      [(one.st_size, one.st_mtime_ns) for one in stats]])
        records.append(Record(number, item.path, patient, name, key))
    return records


def record_names(found) -> List[str]:
    """A unique name for each recording, fit for an HDF5 group: the file's name without its ending;
    where that repeats, the path below the typed folder ('p1:night', 'p2:night')."""
    names = [os.path.basename(item.name) for item in found]
    for longer in ([item.name for item in found], [os.path.relpath(item.path) for item in found]):
        repeated = {name for name, n in Counter(names).items() if n > 1}
        names = [path if name in repeated else name for name, path in zip(names, longer)]
    names = [re.sub(r"[/\\]", ":", name).encode("utf-8", "backslashreplace").decode()
             for name in names]
    return [name if len(name.encode()) <= 200 else f"{name[:40]}-{digest(name)}" for name in names]


def assign_patients(found, names, groups_path, problems):
    """The patient of each recording: its split group, or a patient of its own."""
    groups = read_groups(groups_path) if groups_path else {}
    patients, line_used = [None] * len(found), {}
    for number, item in enumerate(found):
        words = os.path.splitext(os.path.abspath(item.path))[0].split(os.sep)
        ends = ["/".join(words[-n:]) for n in range(len(words), 0, -1)]
        ends += [end + os.path.splitext(item.path)[1] for end in ends]
        end = next((end for end in ends if end in groups), None)
        if end is None:
            if groups_path:
                problems.add(number, "note", "not in the groups file: taken as its own patient")
            patients[number] = names[number]
            continue
        patients[number], line = groups[end]
        if line_used.setdefault(line, number) != number:
            raise RecordingError(
                groups_path, f"line {line}: several recordings have this name; give the end of "
                "each one's path, such as folder/name")
    alone = len(found) - len(line_used)
    if groups_path and alone:
        print(f"{alone} of {counted(len(found), 'record')} not in {groups_path}: each is taken as "
              f"its own patient (named in {problems.path})", file=sys.stderr)
    return patients


def read_groups(path):
    """{record: (patient, line)} of a CSV with the columns record and split_group."""
    try:
        table = pd.read_csv(path, dtype=str, keep_default_na=False, encoding="utf-8-sig",
                            usecols=["record", "split_group"], skip_blank_lines=False)
    except ValueError as error:  # also of bytes that are not UTF-8 and of pandas' parser
        raise RecordingError(path, "expected a CSV file with the columns record,split_group",
                             error) from None
    groups = {}
    for line, (record, group) in enumerate(zip(table["record"], table["split_group"]), 2):
        record, group = record.strip().replace("\\", "/"), group.strip()
        if not record and not group:
            continue
        if not record or not re.fullmatch(r"[^/\x00]{1,200}", group) or group in (".", ".."):
            raise RecordingError(path, f"line {line}: expected a record and a group without /")
        if groups.setdefault(record, (group, line))[0] != group:
            raise RecordingError(path, f"line {line}: this record has two groups")
    return groups


def read_output(out, made_with):
    """{(patient, name): key} of the records that the output holds; None if it was made with other
    options or by another version of the program."""
    if not os.path.lexists(out):
        return {}
    with datasets.open_file(out) as file, datasets.reading(out):
        before = json.loads(file.attrs.get("prepared_with", "{}"))
        if datasets.attribute(file, "origin", "") != "recordings" or not before:
            raise DataError(f"{out}: was not written by prepare.py; give another --out, or "
                            "remove it")
        changed = sorted(key for key in made_with if before.get(key) != made_with[key])
        if changed:
            names = ["program version" if key == "program" else "--" + key.replace("_", "-")
                     for key in changed]
            print(f"{out} was made with another {', '.join(names)}; all is prepared again")
            return None
        return {(patient, name): group.attrs["key"]
                for patient, groups in file.items() for name, group in groups.items()}


def print_changes(out, held, records, failed):
    """Says how the records differ from those in the output."""
    now = {(record.patient, record.name): record.key for record in records
           if record.key not in failed}
    before = held or {}
    counts = {"new": len(now.keys() - before.keys()), "gone": len(before.keys() - now.keys()),
              "changed": sum(key != before.get(place, key) for place, key in now.items())}
    if before and any(counts.values()):
        print(f"since {out} was written, records: "
              + ", ".join(f"{n} {what}" for what, n in counts.items()))


@contextlib.contextmanager
def work_folder(out):
    """The hidden folder with the pieces of an unfinished run, for one run at a time; removed when
    the run has finished."""
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


def clean_up(parts, records):
    """Removes what killed runs left: pieces that are incomplete or no longer of use."""
    keys = {record.key + ".h5" for record in records}
    pieces = [name for name in os.listdir(parts) if name.endswith(".h5")]
    if pieces:
        n_good = sum(name in keys for name in pieces)
        print(f"an unfinished run has prepared {n_good} of {len(records)} records"
              + (f"; {len(pieces) - n_good} more are out of date" if n_good < len(pieces) else ""))
    for name in os.listdir(parts):
        if name != "lock" and name not in keys:
            os.remove(os.path.join(parts, name))


# --------------------------------------------------------------------------------------- one record

class Result(NamedTuple):
    problem: str = ""  # does not identify the record; `detail` may
    detail: str = ""
    notes: Sequence[str] = ()  # lines for the private problems file


def prepare_missing(records, held, problems, options, parts):
    """Makes the pieces that are not there yet."""
    missing = [record for record in records if record.key not in problems.failed
               and (held or {}).get((record.patient, record.name)) != record.key
               and not os.path.exists(piece_path(parts, record))]
    results = tk_utils.in_processes(partial(prepare_record, options=options, parts=parts), missing,
                                    options.workers)
    for record, result in tk_utils.progress(results, total=len(missing), desc="records",
                                            unit="record", disable=not missing):
        if isinstance(result, tk_utils.ProcessDied):
            result = Result("its process was killed (out of memory?)")
        for note in result.notes:
            problems.add(record.number, "note", note, key=record.key)
        if result.problem:
            problems.add(record.number, "error", result.problem, result.detail, record.key)


def prepare_record(record, options, parts) -> Result:
    """Writes the piece of one record. Raises OSError if it cannot be written."""
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
        with writing(temporary, options) as writer:
            writer.write(record.patient, record.name, fields)
            group = writer.file[record.patient][record.name]
            group.attrs.update(attributes, key=record.key)
    return Result(notes=tuple(notes))


def piece_path(parts, record):
    return os.path.join(parts, record.key + ".h5")


def writing(path, options, **attributes):
    return datasets.LayoutWriter(
        path, origin="recordings", label_method=options.label_method,
        beats=labels.METHODS[options.label_method].beats, reasons=signals.REASONS, **attributes)


def read_segments(path, options, notes):
    """(the layout's fields, the encounter's attributes) of one recording; adds to `notes`."""
    recorded = open_recording(path, options)
    for kind in ("abp", "ppg"):
        if kind not in recorded.chosen:
            raise RecordingError(path, f"no {kind.upper()}: {recorded.reasons[kind]}; see "
                                       f"--list-channels and --{kind}-channel",
                                 "it has " + (", ".join(recorded.channels) or "no channels"))
    blocks = [(minutes.start_s, minutes.abp, minutes.ppg) for minutes in recorded]
    notes += recorded.notes
    if not blocks:
        raise RecordingError(path, f"lasts {recorded.left_over_s:.1f} s, with no uninterrupted "
                                   f"{datasets.SEGMENT_SECONDS} s of PPG")
    start_s, abp, ppg = map(np.concatenate, zip(*blocks))
    delay_s, strength, rows = signals.ppg_delay(abp, ppg, datasets.FS)
    sure = strength >= signals.SURE_DELAY
    shift_s = delay_s if options.align and sure else 0.0
    if shift_s:
        ppg = shifted(ppg, start_s, shift_s)
    elif options.align:
        notes.append("the PPG's delay is uncertain: not aligned")
    measures = signals.signal_quality(abp, ppg, datasets.FS)
    fields = {"abp": abp, "ppg": ppg, "start_s": start_s, "ppg_delay_s": rows - shift_s,
              **labels.label_segments(abp, datasets.FS, method=options.label_method)}
    reason = fields["reason"] | measures.pop("reason")
    fields.update(measures, reason=reason)
    return fields, {"ppg_delay_s": delay_s, "ppg_delay_strength": strength, "ppg_shift_s": shift_s,
                    "left_over_s": recorded.left_over_s}


def open_recording(path, options):
    return recordings.read_windows(path, **datasets.WINDOW, **recordings.channel_options(options),
                                   polarity=signals.ppg_polarity)


def shifted(ppg, start_s, shift_s):
    """ppg [N, samples] moved `shift_s` earlier; across minutes that follow one another. NaN where
    the samples are missing."""
    out = np.full_like(ppg, np.nan)
    new = np.flatnonzero(np.diff(start_s) != datasets.SEGMENT_SECONDS) + 1
    for rows in np.split(np.arange(len(ppg)), new):
        wave = ppg[rows].ravel().astype(np.float64)
        at = np.arange(wave.size) + shift_s * datasets.FS
        gap = ~np.isfinite(wave)
        if gap.all():
            continue
        wave[gap] = np.interp(np.flatnonzero(gap), np.flatnonzero(~gap), wave[~gap])
        moved = ndimage.map_coordinates(wave, [at], order=5, mode="nearest")
        beside = np.clip([np.floor(at), np.ceil(at)], 0, wave.size - 1).astype(int)
        moved[gap[beside].any(0) | (at < 0) | (at > wave.size - 1)] = np.nan
        out[rows] = moved.reshape(len(rows), -1)
    return out


def write_output(records, held, options, made_with, parts):
    """Joins pieces, and records that the output held before, into a new output, atomically.
    Returns False if the output is complete already."""
    if held is not None and held == {(one.patient, one.name): one.key for one in records}:
        return False
    pieces = [piece_path(parts, record) for record in records]
    needed = sum(os.path.getsize(path) for path in pieces if os.path.exists(path))
    if shutil.disk_usage(parts).free < needed:
        raise OSError(28, f"no space left on the device, {needed / 1e6:,.0f} MB needed",
                      options.out)
    with tk_utils.atomic_path(options.out) as temporary:
        with writing(temporary, options, prepared_with=json.dumps(made_with)) as writer:
            for record, piece in zip(records, pieces):
                source_path = piece if os.path.exists(piece) else options.out
                with datasets.open_file(source_path) as source:
                    source.copy(source[record.patient][record.name],
                                writer.file.require_group(record.patient), record.name)
    return True


# ---------------------------------------------------------------------------------------- reporting

class Problems:
    """Errors and notes per record: named in a private file, unnamed on stderr.

    File names of recordings are often patients' numbers, and stderr ends up in logs. A path that
    the user typed is shown as typed; a file found in a typed folder, by its number. A record that
    could not be used is not tried again while its key is in the file.
    """

    COLUMNS = ["kind", "record", "path", "what", "detail", "key"]

    def __init__(self, found, out):
        self.found, self.path = found, os.path.splitext(os.path.normpath(out))[0] + "_problems.csv"
        self.rows, self.failed, self.lines, self.is_new = [], set(), [], False
        self.earlier = pd.DataFrame(columns=self.COLUMNS, dtype=str)
        if not os.path.lexists(self.path):
            return
        with open(self.path, encoding="utf-8", errors="replace") as file:
            if file.readline().rstrip("\r\n") != recordings.PRIVATE_LINE:
                raise DataError(f"{self.path}: was not written by prepare.py, which needs this "
                                "name; rename it, or give another --out")
            with contextlib.suppress(ValueError):  # damaged: the records are tried again
                earlier = pd.read_csv(file, dtype=str, keep_default_na=False)
                if list(earlier.columns) == self.COLUMNS:
                    self.earlier = earlier

    def add(self, number, kind, text, detail="", key="", is_new=True):
        path = self.found[number].path
        cells = (kind, recordings.recording_name(path), path, text, detail, key)
        self.rows.append((number, *(recordings.safe_cell(cell) for cell in cells)))
        self.is_new |= is_new
        if kind == "error":
            self.failed.add(key)
            if is_new:
                self.lines.append(
                    f"{recordings.shown(self.found, number)}: {tk_utils.printable(text)}")

    def add_skipped(self, skipped):
        """Notes for what find_recordings skipped; returns whether a folder could not be opened."""
        for path, why, _ in skipped:
            if not why.startswith("prepared by this project"):
                self.rows.append((-1, *map(recordings.safe_cell, ("note", "", path, why, "", ""))))
        unopened = sum(problem for _, _, problem in skipped)
        if unopened:
            print(f"{counted(unopened, 'folder')} could not be opened and skipped; named in "
                  f"{self.path}, which is private", file=sys.stderr)
        return unopened > 0

    def recall(self, records):
        """What an earlier run wrote about these records, if they have not changed."""
        numbers = {record.key: record.number for record in records}
        for row in self.earlier.itertuples(index=False):
            if row.key in numbers:
                self.add(numbers[row.key], row.kind, row.what, row.detail, row.key, is_new=False)

    def write(self):
        """The new errors as lines to stderr, all rows to the file; without rows, no file."""
        table = pd.DataFrame([row[1:] for row in sorted(self.rows)], columns=self.COLUMNS)
        if not len(table):
            if os.path.lexists(self.path):
                os.remove(self.path)
            return
        if not table.equals(self.earlier):
            with tk_utils.atomic_file(self.path, newline="") as file:
                file.write(recordings.PRIVATE_LINE + "\n")
                table.to_csv(file, index=False, lineterminator="\n")
        for line in self.lines:
            print(line, file=sys.stderr)
        n_errors = int((table["kind"] == "error").sum())
        if n_errors:
            print(f"{counted(n_errors, 'record')} could not be used; named in {self.path}, which "
                  "is private (remove it to try them again)", file=sys.stderr)
        if self.is_new:
            for text, n in self.kinds("note"):
                print(f"note: {text} ({counted(n, 'record')}, see {self.path})", file=sys.stderr)

    def kinds(self, kind):
        """[(what, number of records)]; numbers in the text are left out where records differ."""
        texts = Counter(row[4] for row in self.rows if row[1] == kind)
        plain = Counter()
        for text, n in texts.items():
            plain[text if len(texts) == 1 else re.sub(r"\d[\d.,]*", "#", text)] += n
        return plain.most_common()


def print_channels(found, options):
    """What --list-channels prints: the channels of each recording, what is taken, and why."""
    unreadable = 0
    for number, item in enumerate(found):
        try:
            recorded = open_recording(item.path, options)
        except RecordingError as error:
            print(f"{recordings.shown(found, number)}: {error.what}", file=sys.stderr)
            unreadable += 1
            continue
        print(f"{recordings.shown(found, number)}: {counted(len(recorded.channels), 'channel')}")
        rows = []
        for name, channel in recorded.channels.items():
            kinds = [kind for kind, taken in recorded.chosen.items() if taken == name]
            rate = f"{channel.fs:g} Hz" if channel.fs > 0 else ""
            rows.append((name, rate, channel.unit, " ".join(kinds).upper(),
                         "; ".join(dict.fromkeys(recorded.reasons[kind] for kind in kinds))))
        tk_utils.print_table(rows, ("channel", "rate", "unit", "taken as", "why"))
        for kind, why in recorded.reasons.items():
            if kind in ("abp", "ppg") and kind not in recorded.chosen:
                print(f"no {kind.upper()}: {why}")
    return int(unreadable > 0)


if __name__ == "__main__":
    sys.exit(tk_utils.run_script(main, DataError, RecordingError, MemoryError))
