"""The data: HDF5 layout, quality gate, index, patient split, `TPP_PPG_dataset` and its loaders.

    from datasets import create_dataset_index, split_index, TPP_PPG_dataset, make_loader
    index = create_dataset_index(path="data/icu.h5")            # the default quality gate
    parts = split_index(index, split_seed=0)                    # train, tune, test by patient
    train = TPP_PPG_dataset(parts["train"], "segment", ["ppg", "map", "dbp", "hr", "tpp"])
    for ppg, map_, dbp, hr, tpp in make_loader(train, 256, shuffle=True): ...

    python datasets.py FILE --who 17/2 3f2a…    # whom a message means, for your eyes alone

A file holds /<patient>/<encounter>/<field>, one row for each 60-s segment (`FIELDS` below). Files
of the published system are read as they are. This module needs NumPy, h5py and PyTorch alone.

Reading is the hot path. Where PPG rows lie in the file as plain float32 (contiguous, or one row a
chunk), a whole batch is one gather from a memory map of the file; all else goes through h5py.
"""
import argparse
import difflib
import hashlib
import os
import re
import signal
import sys
import zipfile
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import lru_cache

import h5py
import numpy as np

if __name__ == "__main__":          # --who needs no PyTorch, and does not wait for it
    DataLoader = Dataset = Sampler = object
else:
    import torch
    from torch.utils.data import DataLoader, Dataset, Sampler

FS = 60                             # Hz
SEGMENT_SECONDS = 60
SEGMENT_SAMPLES = FS * SEGMENT_SECONDS
ROW_BYTES = 4 * SEGMENT_SAMPLES
LAYOUT_VERSION = 1                  # of the HDF5 files
INDEX_VERSION = 1                   # of a saved index

FIELDS = {  # name: (dtype, unit); waveforms are (N, 3600), all else (N,)
    "ppg": ("f4", "monitor scale"), "abp": ("f4", "mmHg"),
    "map": ("f4", "mmHg"), "sbp": ("f4", "mmHg"), "dbp": ("f4", "mmHg"), "pp": ("f4", "mmHg"),
    "hr": ("f4", "beats/min"), "p_crit": ("f4", "mmHg"), "tpp": ("f4", "mmHg"),
    "r2": ("f4", ""), "fit_rmse": ("f4", "mmHg"), "p_crit_se": ("f4", "mmHg"),
    "n_beats": ("i4", "beats"), "reason": ("u4", "bit mask"), "start_s": ("f8", "s"),
    "ppg_delay_s": ("f4", "s"), "p_crit_true": ("f4", "mmHg"),
    "beat_irregularity": ("f4", ""), "upstroke_s": ("f4", "s"), "ppg_hr": ("f4", "beats/min"),
    "ppg_quality": ("f4", ""), "ppg_skewness": ("f4", ""),
}
WAVEFORMS = ("ppg", "abp")
DIFFERENCES = {"tpp": ("map", "p_crit"), "p_crit": ("map", "tpp"), "pp": ("sbp", "dbp")}
ENCODED, ABSENT = -1, -2            # instead of a byte offset: h5py has to read it; not there
BLOCK_ROWS = 8192                   # of compressed data, decoded and shuffled at a time: 118 MB
LARGEST_CHUNK = 2 ** 28             # bytes of a chunk, which is decoded as a whole
LARGEST_RATIO = 1100                # of compression: deflate, the best of HDF5's, reaches 1032


class DataError(ValueError):
    """A data file, an index or a request for data that cannot be used; the message is one line."""


# ------------------------------------------------------------------------------------------ writing

class LayoutWriter:
    """Writes one file of the layout, an encounter at a time.

        with LayoutWriter(path, "recordings", "published", "foot", labels.REASONS) as out:
            out.write("patient 1", "encounter 1", {"ppg": ppg, "reason": reason, "map": map_, ...})

    Datasets are contiguous and uncompressed, so that a row is read at memory speed; `compression`
    ('gzip', 'lzf') makes chunks of 64 rows and costs a shuffled reader most of its speed.
    """

    def __init__(self, path, origin, label_method, beats, reasons, compression=None, **attributes):
        self.path, self.compression = os.fspath(path), compression
        self.file = h5py.File(path, "w")
        self.file.attrs.update(
            layout_version=LAYOUT_VERSION, fs=FS, segment_seconds=SEGMENT_SECONDS, origin=origin,
            label_method=label_method, beats=beats, reasons=",".join(reasons),
            created_with=f"tpp-ppg, h5py {h5py.__version__}, numpy {np.__version__}", **attributes)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.file.close()

    def write(self, patient, encounter, fields):
        """Writes the N rows of one encounter, {field: [N] or [N, 3600]}, or raises DataError."""
        names = [str(patient), str(encounter)]
        if any(name in ("", ".") or "/" in name for name in names):
            raise DataError("expected names of patient and encounter without '/', and not empty")
        if "/".join(names) in self.file:
            raise DataError("this patient's encounter has been written before; expected it once")
        rows = len(fields["ppg"])
        for key, values in fields.items():
            expected = (rows, SEGMENT_SAMPLES) if key in WAVEFORMS else (rows,)
            if key not in FIELDS or np.shape(values) != expected:
                raise DataError(f"field {key!r} of shape {np.shape(values)}: expected one of "
                                f"{', '.join(FIELDS)}, of shape {expected}")
        arrays = {key: np.asarray(values, FIELDS[key][0]) for key, values in fields.items()}
        if not np.isfinite(arrays["ppg"][arrays["reason"] == 0]).all():
            raise DataError("field 'ppg' has non-finite samples in a segment without a reason")
        group = self.file.create_group("/".join(names))
        for key, values in arrays.items():
            packed = self.compression and key in WAVEFORMS and rows
            group.create_dataset(key, data=values, compression=self.compression if packed else None,
                                 chunks=(min(64, rows), SEGMENT_SAMPLES) if packed else None)


# --------------------------------------------------------------------------------------------- gate

@dataclass(frozen=True)
class Gate:
    """Which segments are used: open ranges (field, low, high), where a bound is a number, another
    field's name, or None, and a least length of the encounter. Segments with a non-finite vital or
    label, non-finite PPG or a `reason` are refused by every gate."""
    ranges: tuple = ()
    min_minutes: int = 0


RULES = {   # as they are spelled in the names of the published conditions
    "r2_gt_5": ("r2", 0.5, None), "pcrit_gt_0": ("p_crit", 0, None), "pp_gt_10": ("pp", 10, None),
    "rmse_lt_1": ("fit_rmse", None, 1), "rmse_lt_2": ("fit_rmse", None, 2),
    "rmse_lt_3": ("fit_rmse", None, 3), "map_lt_120": ("map", None, 120),
    "pcrit_lt_map": ("p_crit", None, "map"), "pcrit_lt_100": ("p_crit", None, 100),
    # Ours, on the labels' standard error and the measures of labels.signal_quality; 0.15 s parts
    # most simulated damped lines from the others, the sources of 0.1 and 0.86 are given there.
    "pcrit_se_lt_5.5": ("p_crit_se", None, 5.5), "regular_rhythm": ("beat_irregularity", None, 0.1),
    "not_damped": ("upstroke_s", None, 0.15), "ppg_quality_gt_86": ("ppg_quality", 0.86, None),
}
PUBLISHED_CONDITION = "r2_gt_5_and_pcrit_gt_0_pcrit_lt_map_pp_gt_10_map_lt_120_pcrit_lt_100"
DEFAULT_CONDITION = "default"       # the published condition without its rule of 100 minutes


def get_gate(condition):
    """The `Gate` of a name: 'default', 'any' (whatever has a label), 'default_and_' and rules, or
    rules alone joined by '_' or '_and_', which carry the published rule that an encounter has at
    least 100 minutes."""
    if isinstance(condition, Gate):
        return condition
    if condition == "any":
        return Gate()
    names = re.sub("^default(?=$|_and_)", PUBLISHED_CONDITION, str(condition))
    rule = "|".join(map(re.escape, RULES))
    if not re.fullmatch(f"({rule})(_(and_)?({rule}))*", names):
        raise DataError(f"condition {condition!r}: expected 'default', 'any', or any of "
                        f"{', '.join(RULES)} joined by '_and_'")
    return Gate(tuple(RULES[name] for name in re.findall(rule, names)),
                min_minutes=100 if names == condition else 0)


def gate_rules(gate, values, ppg_finite):
    """Yields (rule as text, mask [N] of the rows that keep it), in the order of application.
    values: a function from a field's name to its [N] values, or None where it is absent."""
    reason = values("reason")
    if reason is not None:
        yield "no reason against it", np.nan_to_num(reason, nan=1) == 0
    yield "finite PPG", ppg_finite
    finite = np.ones(len(ppg_finite), bool)
    for key in ("map", "sbp", "dbp", "pp", "hr", "p_crit", "tpp"):
        if values(key) is not None:
            finite &= np.isfinite(values(key))
    yield "finite vitals and label", finite
    for key, low, high in gate.ranges:
        for sign, bound, holds in ((">", low, np.greater), ("<", high, np.less)):
            if bound is not None:
                limit = values(bound) if isinstance(bound, str) else bound
                with np.errstate(invalid="ignore"):
                    kept = holds(values(key), limit)
                yield f"{key} {sign} {bound}", kept
    if gate.min_minutes:
        yield (f"at least {gate.min_minutes} minutes in the encounter",
               np.full(len(ppg_finite), len(ppg_finite) >= gate.min_minutes))


def passes_gate(gate, values, ppg_finite):
    """[N] mask of the rows that keep all `gate_rules`."""
    return np.logical_and.reduce([kept for _, kept in gate_rules(gate, values, ppg_finite)])


def gate_report(path, condition=DEFAULT_CONDITION):
    """[(rule, segments that break it, segments left after it)] of one file or several."""
    counts = {"all segments": (0, 0)}
    for one in as_paths(path):
        for encounter, rules in scan(one, condition):
            alive = np.ones(encounter.n_rows, bool)
            for text, mask in [("all segments", alive.copy()), *rules]:
                alive &= mask
                broken, left = counts.get(text, (0, 0))
                counts[text] = broken + int((~mask).sum()), left + int(alive.sum())
    return [(text, broken, left) for text, (broken, left) in counts.items()]


# --------------------------------------------------------------------------------- opening and scan

@dataclass
class Encounter:
    """What a scan finds in one encounter."""
    patient: str
    name: str
    n_rows: int
    passed: np.ndarray              # int32: the rows that the gate lets through
    stored: dict                    # {field: byte offset of row 0, or ENCODED}
    shifts: np.ndarray              # int32: `DatasetIndex.row_shifts` of `passed`, or one 0
    chunk_rows: int                 # rows that one read of the PPG decodes
    address: int                    # of the PPG's header in the file


def as_paths(path):
    return [os.fspath(p) for p in (path if isinstance(path, (list, tuple)) else [path])]


def as_text(name):
    return name.decode() if isinstance(name, bytes) else str(name)


def open_file(path):
    if not os.path.isfile(path):        # a pipe would wait for ever
        raise DataError(f"{path}: no such file")
    try:
        return h5py.File(path, "r")
    except OSError as error:
        reason = str(error).splitlines()[0]
        raise DataError(f"{path}: not a readable HDF5 file ({reason})") from None


@contextmanager
def reading(where):
    """Makes one line of what h5py raises on damaged files; its own words may name patients.
    where: text or, if it takes time to find out, a function that returns it."""
    try:
        yield
    except DataError:
        raise
    except (OSError, LookupError, RuntimeError, TypeError, ValueError, MemoryError) as error:
        where = where() if callable(where) else where
        raise DataError(f"{where} cannot be read ({type(error).__name__})") from None


def printable(text):
    """Text from a file, fit for a terminal and a log: one line without control characters."""
    return "".join(c if c.isprintable() else "?" for c in text[:255])


def attribute(file, name, default):
    """An attribute of a file if it is a number or text, else the default."""
    with reading(f"{file.filename}: attribute {name!r}"):
        value = file.attrs.get(name, default)
    if isinstance(value, (str, bytes)):
        return printable(value if isinstance(value, str) else value.decode(errors="replace"))
    return value if isinstance(value, (int, float, np.number)) else default


def place(path, *position):
    """Where in a file: patient and encounter by their numbers in it, and how to get the names."""
    text = ", ".join(f"{kind} {n}" for kind, n in zip(("patient", "encounter"), position))
    return f"{path}: {text} (names: python datasets.py {path} --who {'/'.join(map(str, position))})"


def member_names(group):
    """The names in a group, in the file's order."""
    names = list(group)
    if any(not 0 < len(name) < 256 or "/" in name or name == "." for name in names):
        raise DataError(f"{group.file.filename}: expected names of patients and encounters of "
                        "1 to 255 characters without '/'")
    return names


def member(group, name, kind):
    """Member `name` of an h5py group, or None if it is a link, or not of that kind."""
    link = group.id.links.get_info(name.encode(errors="surrogateescape"))
    item = group[name] if link.type == h5py.h5l.TYPE_HARD else None
    return item if isinstance(item, kind) else None


def find_fields(group, where, file_size):
    """{field: h5py dataset} of an encounter, checked; what is not in `FIELDS` is left alone."""
    there = set(group)                  # to ask for what is absent costs as much
    found = {key: member(group, key, h5py.Dataset) for key in FIELDS if key in there}
    found = {key: item for key, item in found.items() if item is not None}
    if "ppg" not in found:
        raise DataError(f"{where}: no field 'ppg'")
    rows = found["ppg"].shape[0] if found["ppg"].shape else 0
    for key, item in found.items():
        waves = [(rows, SEGMENT_SAMPLES), (rows, 1, SEGMENT_SAMPLES)]
        shapes = waves if key in WAVEFORMS else [(rows,)]
        if item.shape not in shapes:
            raise DataError(f"{where}, field {key!r}: shape {item.shape}, expected {shapes[0]}")
        plist, kind = item.id.get_create_plist(), item.id.get_type().get_class()
        if (kind not in (h5py.h5t.INTEGER, h5py.h5t.FLOAT) or item.dtype.itemsize > 8
                or plist.get_layout() == h5py.h5d.VIRTUAL or plist.get_external_count()):
            raise DataError(f"{where}, field {key!r}: expected plain numbers stored in this file")
        if not is_stored(item, plist, file_size):
            raise DataError(f"{where}, field {key!r}: {rows} rows, but this file holds fewer")
    return found


def is_stored(item, plist, file_size):
    """Whether all of a dataset is in its file, by sizes alone: no rows that were never written and
    would read as zeros, none that would take memory for which the file's size gives no reason."""
    n_bytes, stored = item.size * item.dtype.itemsize, item.id.get_storage_size()
    if item.chunks is None:
        offset = item.id.get_offset() or 0      # None where the header itself holds the data
        return n_bytes <= stored and offset + n_bytes <= file_size
    if item.dtype.itemsize * np.prod(item.chunks, dtype=float) > LARGEST_CHUNK:
        return False
    if not plist.get_nfilters():
        return n_bytes <= stored <= file_size
    chunks = np.prod([-(-n // m) for n, m in zip(item.shape, item.chunks)], dtype=float)
    return n_bytes <= LARGEST_RATIO * min(stored, file_size) and chunks <= item.id.get_num_chunks()


def find_storage(key, item):
    """Where rows lie in the file: (byte offset of row 0, [N] `DatasetIndex.row_shifts`)."""
    if item.dtype != np.dtype("<f4"):
        return ENCODED, None
    if item.chunks is None:
        offset = item.id.get_offset()       # None before anything is written
        return (ENCODED if offset is None else offset), None
    # With a user block (MATLAB's files have one), HDF5 before 2.0 gives chunks' offsets without it.
    if (key != "ppg" or item.chunks != (1,) + item.shape[1:] or item.file.userblock_size
            or item.id.get_create_plist().get_nfilters()
            or not item.id.get_num_chunks() == len(item) > 0
            or not hasattr(item.id, "chunk_iter")):     # h5py < 3.8; asking by number is quadratic
        return ENCODED, None
    offsets = np.full(len(item), -1)
    item.id.chunk_iter(lambda chunk: offsets.__setitem__(chunk.chunk_offset[0], chunk.byte_offset))
    shifts = offsets - offsets[0] - ROW_BYTES * np.arange(len(item))
    mapped = offsets.min() >= 0 and np.abs(shifts).max() < 2 ** 31
    return (offsets[0], shifts) if mapped else (ENCODED, None)


def scan(path, condition, wanted=None):
    """Yields (`Encounter`, its `gate_rules`) for each encounter of a file, or of {MRN: CSNs}."""
    gate, seen = get_gate(condition), {}
    with open_file(path) as file:
        seconds = attribute(file, "segment_seconds", SEGMENT_SECONDS)
        if attribute(file, "fs", FS) != FS or seconds != SEGMENT_SECONDS:
            raise DataError(f"{path}: expected segments of {SEGMENT_SECONDS} s at {FS} Hz")
        with reading(f"{path}: its list of patients"):
            patients = member_names(file)
        for i, patient in enumerate(patients):
            with reading(place(path, i)):
                group = member(file, patient, h5py.Group)
                if group is None:
                    raise DataError(f"{path}: expected /<patient>/<encounter>/<field>, "
                                    "found no group at the top")
                names = member_names(group)
            for j, name in enumerate(names):
                if wanted is None or name in wanted.get(patient, ()):
                    where = place(path, i, j)
                    with reading(where):
                        found = scan_encounter(group, where, gate, patient, name)
                    # By hard links one recording could be two patients', of train and of test.
                    first = seen.setdefault(found[0].address, (i, j))
                    if first != (i, j):
                        raise DataError(f"{where}: its PPG is that of patient {first[0]}, "
                                        f"encounter {first[1]}")
                    yield found


def narrow(values):
    """As float32, as numbers are used; what is too large becomes infinite, and is refused."""
    with np.errstate(over="ignore", invalid="ignore"):
        return values.astype(np.float32, copy=False)


def scan_encounter(encounters, where, gate, patient, name):
    """(`Encounter`, its `gate_rules`) of one group of fields."""
    group = member(encounters, name, h5py.Group)
    if group is None:
        raise DataError(f"{where}: expected a group of fields")
    found = find_fields(group, where, os.path.getsize(group.file.filename))
    rows = len(found["ppg"])

    @lru_cache(maxsize=None)
    def values(key):
        if key in found:
            return narrow(found[key][:])
        parts = [narrow(found[part][:]) for part in DIFFERENCES.get(key, ()) if part in found]
        return parts[0] - parts[1] if len(parts) == 2 else None

    for key in sorted({k for rule in gate.ranges for k in rule if isinstance(k, str)}):
        if values(key) is None:
            raise DataError(f"{where}: no field {key!r}, which the quality gate needs; "
                            "choose another condition")
    finite = np.ones(rows, bool)
    if "reason" not in found:               # ours were checked when they were written
        for a in range(0, rows, 256):
            block = narrow(found["ppg"][a:a + 256]).reshape(-1, SEGMENT_SAMPLES)
            finite[a:a + 256] = np.isfinite(block).all(1)
    rules = list(gate_rules(gate, values, finite))
    passed = np.flatnonzero(np.all([mask for _, mask in rules], axis=0)).astype(np.int32)
    storage = {key: find_storage(key, item) for key, item in found.items()}
    shifts = storage["ppg"][1]
    return Encounter(
        patient, name, rows, passed, stored={key: offset for key, (offset, _) in storage.items()},
        shifts=np.zeros(1, np.int32) if shifts is None else shifts[passed].astype(np.int32),
        chunk_rows=found["ppg"].chunks[0] if found["ppg"].chunks else 1,
        address=h5py.h5o.get_info(found["ppg"].id).addr), rules


# -------------------------------------------------------------------------------------------- index

@dataclass
class DatasetIndex:
    """The segments that passed the gate, as flat arrays: P patients, E encounters, S segments.

    Segments are numbered 0..S-1 in the order of patients, encounters and rows: encounter e holds
    the segments starts[e]:starts[e+1], segment s is row rows[s] of it. Row r of its PPG begins at
    byte stored[ppg, e] + ROW_BYTES * r + row_shifts[s]. 64 million segments take 256 MB (512 MB
    where each row is a chunk).
    """
    paths: list
    sizes: np.ndarray               # [files] bytes; when these or the times change, we are stale
    mtimes: np.ndarray              # [files] ns
    condition: str
    patients: np.ndarray            # [P] str (MRNs)
    encounters: np.ndarray          # [E] str (CSNs)
    encounter_patient: np.ndarray   # [E] int32, ascending
    encounter_file: np.ndarray      # [E] int32
    fields: list                    # [K] names
    stored: np.ndarray              # [K, E] int64: byte offset of row 0, ENCODED or ABSENT
    chunk_rows: np.ndarray          # [E] int32: rows that one read of the PPG decodes
    starts: np.ndarray              # [E + 1] int64
    rows: np.ndarray                # [S] int32
    row_shifts: np.ndarray          # [S] int32, or [0] where they all are 0

    def __len__(self):
        return len(self.rows)

    @property
    def n_patients(self):
        return len(self.patients)

    def per_segment(self, of_encounters):
        """[E] -> [S]: what belongs to an encounter, for each of its segments."""
        return np.repeat(of_encounters, np.diff(self.starts))

    def segment_patients(self):
        """[S] int32: the number of each segment's patient."""
        return self.per_segment(self.encounter_patient)

    def select(self, keep):
        """The index of some encounters alone, keep [E] bool."""
        return self.select_segments(self.per_segment(keep))

    def select_segments(self, keep):
        """The index of some segments alone, keep [S] bool: of the encounters and patients that
        still have one, renumbered in the same order."""
        starts = self.starts.tolist()
        counts = np.array([np.count_nonzero(keep[a:b]) for a, b in zip(starts, starts[1:])])
        some = counts > 0
        patients, numbers = np.unique(self.encounter_patient[some], return_inverse=True)
        return replace(
            self, patients=self.patients[patients], encounters=self.encounters[some],
            encounter_patient=numbers.astype(np.int32), encounter_file=self.encounter_file[some],
            stored=self.stored[:, some], chunk_rows=self.chunk_rows[some], rows=self.rows[keep],
            starts=np.append(0, np.cumsum(counts[some])).astype(np.int64),
            row_shifts=self.row_shifts[keep] if len(self.row_shifts) else self.row_shifts)

    def sources(self, key):
        """The fields that `key` is read from: itself or, if it is absent, two to subtract."""
        absent = {one: offsets == ABSENT for one, offsets in zip(self.fields, self.stored)}
        for fields in ((key,), DIFFERENCES.get(key, (key,))):
            if not any(absent.get(one, np.True_).any() for one in fields):
                return fields
        missing = absent.get(key, np.ones(len(self.encounters), bool))
        alike = difflib.get_close_matches(key, self.fields, 1)
        raise DataError(f"{self.paths[self.encounter_file[missing.argmax()]]}: no field {key!r} "
                        f"in {missing.sum()} of {len(missing)} encounters"
                        + (f" (did you mean {alike[0]!r}?)" if alike and missing.all() else ""))

    def place(self, encounter, row=None):
        """For messages: where in its file encounter e (or a row of it) is, without names."""
        path = self.paths[self.encounter_file[encounter]]
        patient = self.patients[self.encounter_patient[encounter]]
        with reading(path), open_file(path) as file:
            found = place(path, list(file).index(patient),
                          list(file[patient]).index(self.encounters[encounter]))
        return found if row is None else f"{found}, row {row}"

    def check_file(self, number, times=False):
        """Raises DataError if a file is gone or is not the one that was indexed."""
        path, size = self.paths[number], self.sizes[number]
        try:
            stat = os.stat(path)
        except OSError:
            raise DataError(
                f"{path}: no such file (it was there when the index was made)") from None
        if stat.st_size != size:
            raise DataError(f"{path}: {stat.st_size} bytes, {size} when the index was made; "
                            "make the index again")
        if times and stat.st_mtime_ns != self.mtimes[number]:
            raise DataError(f"{path}: changed since the index was made; make the index again")

    def fits(self):
        """Whether the arrays have the types and sizes of an index, and point into one another."""
        files, encounters, segments = len(self.paths), len(self.encounters), len(self.rows)
        shapes = {"sizes": (files,), "mtimes": (files,), "encounter_patient": (encounters,),
                  "encounter_file": (encounters,), "stored": (len(self.fields), encounters),
                  "chunk_rows": (encounters,), "starts": (encounters + 1,), "rows": (segments,),
                  "row_shifts": (segments if len(self.row_shifts) else 0,)}
        arrays = [(getattr(self, name), shape) for name, shape in shapes.items()]
        return (all(a.dtype.kind == "i" and a.shape == shape for a, shape in arrays)
                and self.patients.dtype.kind == self.encounters.dtype.kind == "U"
                and self.patients.ndim == self.encounters.ndim == 1 and encounters > 0
                and set(self.fields) <= set(FIELDS) and self.stored.min() >= ABSENT
                and set(self.encounter_file.tolist()) <= set(range(files))
                and np.array_equal(np.unique(self.encounter_patient), range(self.n_patients))
                and (np.diff(self.encounter_patient) >= 0).all()
                and (np.diff(self.starts) > 0).all()
                and self.starts[0] == 0 and self.starts[-1] == segments
                and self.rows.min() >= 0 and self.chunk_rows.min() > 0)

    def save(self, savename):
        """Writes the index as one `.npz` of plain arrays, complete or not at all."""
        temporary = f"{savename}.{os.getpid()}.partial"
        arrays = dict(vars(self), paths=[os.path.abspath(path) for path in self.paths])
        try:
            with open(temporary, "wb") as out:
                np.savez(out, version=INDEX_VERSION, **arrays)
                out.flush()
                os.fsync(out.fileno())
            os.replace(temporary, savename)
        finally:
            with suppress(FileNotFoundError):
                os.remove(temporary)


def create_dataset_index(mrn_to_csns=None, condition=DEFAULT_CONDITION, savename=None, path=None):
    """Indexes the segments of one or several HDF5 files (`path`) that pass a quality gate.

    mrn_to_csns: {MRN: [CSN, …]} to take only these, or None for all. condition: a name or a `Gate`
    (`get_gate`). savename: also write the index to this `.npz`.
    """
    if path is None:
        raise DataError("create_dataset_index needs path=, one HDF5 file or several")
    wanted = None if mrn_to_csns is None else {
        as_text(patient): set(map(as_text, csns)) for patient, csns in mrn_to_csns.items()}
    paths, stats, found = as_paths(path), [], []
    for number, one in enumerate(paths):
        open_file(one).close()
        stats.append(os.stat(one))          # before the scan: a change during it shows as well
        found += [(number, encounter) for encounter, _ in scan(one, condition, wanted)]
    found.sort(key=lambda item: item[1].patient)    # stable: files and encounters keep their order
    encounters, where = [encounter for _, encounter in found], ", ".join(paths)
    if len({(e.patient, e.name) for e in encounters}) < len(encounters):
        raise DataError(f"{where}: the same patient and encounter stand in two of the files")
    if wanted is not None and len(encounters) < sum(map(len, wanted.values())):
        raise DataError(f"{where}: {len(encounters)} of the {sum(map(len, wanted.values()))} "
                        "encounters that were asked for are there")
    files = [number for number, encounter in found if len(encounter.passed)]
    if not files:
        raise DataError(f"{where}: none of {sum(e.n_rows for e in encounters)} segments passes the "
                        f"quality gate {condition!r}")
    encounters = [e for e in encounters if len(e.passed)]
    patients, patient_numbers = np.unique([e.patient for e in encounters], return_inverse=True)
    fields = sorted({key for e in encounters for key in e.stored})
    row_shifts = np.zeros(0, np.int32)
    if any(e.shifts.any() for e in encounters):
        row_shifts = np.concatenate([np.broadcast_to(e.shifts, len(e.passed)) for e in encounters])
    index = DatasetIndex(
        paths=paths, sizes=np.array([s.st_size for s in stats]),
        mtimes=np.array([s.st_mtime_ns for s in stats]), condition=str(condition),
        patients=patients, encounters=np.array([e.name for e in encounters]),
        encounter_patient=patient_numbers.astype(np.int32),
        encounter_file=np.array(files, np.int32), fields=fields,
        stored=np.array([[e.stored.get(key, ABSENT) for e in encounters] for key in fields]),
        chunk_rows=np.array([e.chunk_rows for e in encounters], np.int32),
        starts=np.cumsum([0] + [len(e.passed) for e in encounters], dtype=np.int64),
        rows=np.concatenate([e.passed for e in encounters]), row_shifts=row_shifts)
    if savename is not None:
        index.save(savename)
    return index


def kept_dataset_index(condition=DEFAULT_CONDITION, path=None):
    """`create_dataset_index`, kept beside the (first) file and used again while nothing changes."""
    savename = f"{as_paths(path)[0]}.index.npz"
    with suppress(DataError):       # none yet, or stale: it is made again
        index = load_dataset_index(savename)
        same = [os.path.abspath(one) for one in as_paths(path)] == index.paths
        if same and index.condition == str(condition):
            return index
    return create_dataset_index(condition=condition, savename=savename, path=path)


def load_dataset_index(savename):
    """Reads a saved index. Raises DataError if it is none, or its files are gone or changed."""
    try:
        with zipfile.ZipFile(savename) as archive:
            sizes = [(one.file_size, one.compress_size) for one in archive.infolist()]
        if any(n != m for n, m in sizes) or sum(n for n, _ in sizes) > os.path.getsize(savename):
            raise ValueError("its arrays are larger than the file")
        with np.load(savename, allow_pickle=False) as saved:
            values = {key: saved[key] for key in saved.files}
        if values.pop("version") != INDEX_VERSION:
            raise ValueError("of another version; make it again")
        values.update(paths=values["paths"].tolist(), fields=values["fields"].tolist(),
                      condition=str(values["condition"]))
        index = DatasetIndex(**values)
        if not index.fits():
            raise ValueError("its arrays do not fit one another")
    except FileNotFoundError:
        raise DataError(f"{savename}: no such file") from None
    except (OSError, ValueError, LookupError, TypeError, AttributeError, EOFError, RuntimeError,
            MemoryError, zipfile.BadZipFile) as error:      # of foreign and of damaged files
        reason = printable((str(error).splitlines() or [""])[0])
        raise DataError(f"{savename}: not a saved index ({reason})") from None
    for number in range(len(index.paths)):
        index.check_file(number, times=True)
    return index


# -------------------------------------------------------------------------------------------- split

PARTS = ("train", "tune", "test")


def split_hash(patients, split_seed):
    """[P] in [0, 1): each patient's place in a random order, a function of it and the seed."""
    names = [f"{split_seed}/{patient}".encode() for patient in patients]
    digests = [hashlib.blake2b(name, digest_size=8).digest() for name in names]
    return np.array([int.from_bytes(digest, "big") / 2.0 ** 64 for digest in digests])


def split_patients(patients, split_seed=0):
    """The part (0 train, 1 tune, 2 test) of each patient, [P] int8.

    From 100 patients on by threshold of a hash, 80/10/10 in expectation: a function of (patient,
    split_seed) alone, so a patient's part never changes when the file grows. Below, by the hash's
    rank, so that no part is empty (stable only while the patients are the same).
    """
    if len(patients) < len(PARTS):
        raise DataError(f"{len(patients)} patients with usable segments: expected at least "
                        f"{len(PARTS)}, one for each of train, tune and test")
    position = split_hash(patients, split_seed)
    tune, test = 0.8, 0.9
    if len(patients) < 100:
        tenth = max(1, round(len(patients) / 10))
        position = np.argsort(np.argsort(position))
        tune, test = len(patients) - 2 * tenth, len(patients) - tenth
    return (position >= tune).astype(np.int8) + (position >= test)


def fold_patients(index, split_seed, folds):
    """The fold, 0 to folds - 1, in which each patient of an index is tested, [P].

    The patients of each source (the file of a patient's first encounter by name) are dealt out in
    the order of `split_hash`, each source's from the fold where the one before ended; the sources
    in the order of their first patients. So folds differ by one patient at most, also within a
    source, whatever the order of files and rows (stable only while the patients are the same).
    """
    by_name = np.lexsort((index.encounters, index.encounter_patient))
    first = by_name[np.searchsorted(index.encounter_patient, np.arange(index.n_patients))]
    source, position = index.encounter_file[first], split_hash(index.patients, split_seed)
    begin = np.ones(len(index.paths))
    np.minimum.at(begin, source, position)
    tested = np.empty(index.n_patients, np.int64)
    tested[np.lexsort((position, begin[source]))] = np.arange(index.n_patients) % folds
    return tested


def split_index(index, split_seed=0, fold=None, folds=None):
    """{'train': index, 'tune': index, 'test': index}, no patient in two of them.

    A function of the patients and split_seed alone, by `split_patients`. For cross-validation (then
    also a function of which patients share a file) by `fold_patients`: of `folds` such splits, each
    patient is in the test part of one; the tune part of split number `fold` (from 0 on) is the test
    part of the next, and that of the last is the first's.
    Raises DataError where there are too few patients, and for folds that there cannot be.
    """
    if fold is None and folds is None:
        of_patients = split_patients(index.patients.tolist(), split_seed)
    else:
        if folds is None or not len(PARTS) <= folds <= index.n_patients:
            raise DataError(f"{folds} folds of {index.n_patients} patients with usable segments: "
                            f"expected at least {len(PARTS)}, and a patient for each")
        if fold is None or not 0 <= fold < folds:
            raise DataError(f"fold {fold} of {folds}: expected 0 to {folds - 1}")
        # How many folds ahead of this one it is tested: 0 is test, 1 tune, all further ones train.
        ahead = (fold_patients(index, split_seed, folds) - fold) % folds
        of_patients = np.maximum(len(PARTS) - 1 - ahead, 0)
    part = of_patients[index.encounter_patient]
    parts = {name: index.select(part == number) for number, name in enumerate(PARTS)}
    for name, other in parts.items():
        if not len(other):
            raise DataError(f"the {name} part of {index.n_patients} patients is empty; "
                            "choose another --split-seed")
    names = [set(p.patients.tolist()) for p in parts.values()]
    assert not (names[0] & names[1] or names[0] & names[2] or names[1] & names[2])
    return parts


# ------------------------------------------------------------------------------------------ dataset

class TPP_PPG_dataset(Dataset):
    """Segments (or one random segment of each patient) as tuples of float32 tensors.

    dataset_index: a `DatasetIndex`. level: 'segment', or 'patient' for one random segment of each
    patient, drawn anew each epoch as a function of (seed, epoch, patient). keys_to_load: fields in
    the order of the tuple, the label last. percentage: a random share of the segments or patients.
    csns_to_skip: encounters to leave out. path: where the files lie now, if not where they did.

    `dataset[i]` is one item: ppg [1, 3600] and scalars. `dataset[array]` is a batch in one read:
    ppg [B, 1, 3600] and [B] each, which is what `make_loader` uses.
    Files are opened by each process when it first reads. Raises DataError for a missing field and
    when a file has changed since it was indexed.
    """

    def __init__(self, dataset_index, level, keys_to_load=None, percentage=100, csns_to_skip=None,
                 *, path=None, seed=0):
        if level not in ("segment", "patient"):
            raise DataError(f"level {level!r}: expected 'segment' or 'patient'")
        if not 0 < percentage <= 100:
            raise DataError(f"percentage {percentage}: expected more than 0 and at most 100")
        index = dataset_index
        if path is not None:
            if len(as_paths(path)) != len(index.paths):
                raise DataError(f"{len(as_paths(path))} files for an index of {len(index.paths)}")
            index = replace(index, paths=as_paths(path))
        if csns_to_skip:
            index = index.select(~np.isin(index.encounters, list(map(as_text, csns_to_skip))))
            if not len(index):
                raise DataError("csns_to_skip leaves no segment")
        self.keys_to_load = list(keys_to_load or ["ppg", "p_crit"])
        for key in self.keys_to_load:
            index.sources(key)
        self.count = len(index) if level == "segment" else index.n_patients
        if percentage < 100:
            share = max(1, round(percentage / 100 * self.count))
            chosen = np.zeros(self.count, bool)
            chosen[np.random.default_rng(seed).choice(self.count, share, replace=False,
                                                      shuffle=False)] = True
            self.count = share
            index = index.select_segments(chosen if level == "segment" else
                                          chosen[index.segment_patients()])
        self.index, self.level, self.seed = index, level, seed
        self.epoch = torch.full((1,), -1, dtype=torch.int64).share_memory_()    # workers see it
        self._columns, self._shared, self._process = {}, {}, None

    def __len__(self):
        return self.count

    def set_epoch(self, epoch):
        """Level 'patient': takes the draw of this epoch. Never called, each read draws anew."""
        self.epoch.fill_(epoch)

    def segments(self, items):
        """Item numbers [B] -> segment numbers [B] of the index: the same, or a draw of each."""
        items = np.asarray(items, np.int64)
        if items.size and (items.min() < -self.count or items.max() >= self.count):
            raise IndexError(f"items {items.min()} to {items.max()} of {self.count}")
        items = np.where(items < 0, items + self.count, items)
        if self.level == "segment":
            return items
        epoch, index = self.epoch.item(), self.index
        edges = np.searchsorted(index.encounter_patient, [items, items + 1])
        first, end = index.starts[edges]        # of each patient's segments
        if epoch < 0:
            draw = torch.rand(len(items), dtype=torch.float64).numpy()
        else:       # one number for each patient, whatever the batches are
            draw = np.random.default_rng([self.seed, epoch]).random(self.count)[items]
        return first + (draw * (end - first)).astype(np.int64)

    def place(self, item):
        """For messages: where in its file an item is, without names."""
        segment = self.segments([item])[0]
        encounter = np.searchsorted(self.index.starts, segment, "right") - 1
        return self.index.place(encounter, self.index.rows[segment])

    def __getitem__(self, item):
        if np.ndim(item):
            return self.read(self.segments(item))
        return tuple(column[0] for column in self.read(self.segments([item])))

    def __getitems__(self, items):
        """Called by a plain `DataLoader(dataset, batch_size=…)`: the items share one read."""
        return list(zip(*self.read(self.segments(items))))

    def read(self, segments):
        """Segment numbers [B] -> (ppg [B, 1, 3600], vital [B], …) in the order of the keys."""
        return tuple(torch.from_numpy(self.waveform(key, segments)).unsqueeze(1)
                     if key in WAVEFORMS else self.column(key)[torch.from_numpy(segments)]
                     for key in self.keys_to_load)

    def column(self, key):
        """[S] float32 tensor: a field of every segment of the index, read once and kept."""
        if key not in self._columns:
            sources = [self.column(one) for one in self.index.sources(key) if one != key]
            self._columns[key] = sources[0] - sources[1] if sources else self._read_column(key)
        return self._columns[key]

    def _read_column(self, key):
        self._open()
        index, values = self.index, np.empty(len(self.index), np.float32)
        offsets, starts = index.stored[index.fields.index(key)].tolist(), index.starts.tolist()
        n_bytes = (4 * index.rows[index.starts[1:] - 1].astype(np.int64) + 4).tolist()  # last row's
        for number in np.unique(index.encounter_file):
            encounters = np.flatnonzero(index.encounter_file == number).tolist()
            # Plain reads: a map would read 128 kB around each of these short stretches.
            with reading(f"{index.paths[number]}: field {key!r}"), \
                    open(index.paths[number], "rb", buffering=0) as file:
                if hasattr(os, "posix_fadvise"):    # a cold disk fetches them all, not one by one
                    for e in encounters:
                        if offsets[e] != ENCODED:
                            os.posix_fadvise(file.fileno(), offsets[e], n_bytes[e],
                                             os.POSIX_FADV_WILLNEED)
                for e in encounters:
                    if offsets[e] == ENCODED:
                        column = self._read_encoded(e, key, slice(None))
                    else:
                        file.seek(offsets[e])
                        column = np.frombuffer(file.read(n_bytes[e]), "<f4")
                    mine = slice(starts[e], starts[e + 1])
                    values[mine] = column[index.rows[mine]]
        return torch.from_numpy(values)

    def waveform(self, key, segments):
        """[B, 3600] float32 of segments [B]."""
        self._open()
        index = self.index
        encounters = np.searchsorted(index.starts, segments, "right") - 1
        rows = index.rows[segments]
        offsets = index.stored[index.fields.index(key), encounters]
        mapped = offsets != ENCODED
        offsets += ROW_BYTES * rows.astype(np.int64)
        if key == "ppg" and len(index.row_shifts):
            offsets += index.row_shifts[segments]
        files = index.encounter_file[encounters]
        used = np.unique(files)
        for number in used:         # a file cut short under its map would kill the process
            index.check_file(number)
        if len(used) == 1 and mapped.all():
            return self._gather(used[0], offsets)       # the fast path: no copy after the gather
        out = np.empty((len(segments), SEGMENT_SAMPLES), np.float32)
        for number in used:
            mine = np.flatnonzero((files == number) & mapped)
            out[mine] = self._gather(number, offsets[mine])
        for i in np.flatnonzero(~mapped):
            out[i] = self._decode(key, encounters[i], rows[i])
        return out

    def chunks(self):
        """The chunks that hold the items, in the items' order: (number of the first item [C], rows
        that are decoded for it [C]), or None where nothing has to be decoded as a whole."""
        index = self.index
        encoded = (index.stored[index.fields.index("ppg")] == ENCODED) & (index.chunk_rows > 1)
        if self.level == "patient" or not encoded.any():
            return None
        per_chunk = np.where(encoded, index.chunk_rows, 1)
        encounter = index.per_segment(np.arange(len(per_chunk), dtype=np.int32))
        chunk = index.rows // index.per_segment(per_chunk)
        begins = (encounter[1:] != encounter[:-1]) | (chunk[1:] != chunk[:-1])
        first = np.append(0, np.flatnonzero(begins) + 1)
        return first, per_chunk[encounter[first]]

    # What follows is of one process: files and maps are opened lazily and never cross a fork.

    def _open(self):
        if self._process == os.getpid():
            return
        self._files, self._maps, self._decoded = {}, {}, {}
        for number in np.unique(self.index.encounter_file):
            self.index.check_file(number)
            self._maps[number] = np.memmap(self.index.paths[number], np.uint8, "r")
        self._process = os.getpid()

    def _gather(self, number, offsets):
        """[B, 3600] float32: the rows that begin at these bytes of a file."""
        data = self._maps[number]
        # Item i of this view is the row that begins at byte i, aligned or not; nothing is copied.
        rows = np.ndarray(max(0, len(data) - ROW_BYTES + 1), f"V{ROW_BYTES}", data, strides=1)
        try:
            return rows[offsets].view("<f4").reshape(-1, SEGMENT_SAMPLES)
        except IndexError:
            raise DataError(f"{self.index.paths[number]}: shorter than its rows; make the index "
                            "again") from None

    def _read_encoded(self, encounter, key, rows):
        """Rows of a field of an encounter through h5py."""
        index, number = self.index, self.index.encounter_file[encounter]
        path = index.paths[number]
        if number not in self._files:
            self._files[number] = open_file(path)
        patient = index.patients[index.encounter_patient[encounter]]
        with reading(lambda: f"{index.place(encounter)}, field {key!r}"):
            return narrow(self._files[number][patient][index.encounters[encounter]][key][rows])

    def _decode(self, key, encounter, row):
        """[3600]: one row through h5py; the latest chunks, a block's worth, stay decoded."""
        per_chunk = int(self.index.chunk_rows[encounter])
        decoded = self._decoded.setdefault(key, {})
        chunk, row_in_chunk = divmod(int(row), per_chunk)
        if (encounter, chunk) not in decoded:
            span = slice(chunk * per_chunk, (chunk + 1) * per_chunk)
            block = self._read_encoded(encounter, key, span).reshape(-1, SEGMENT_SAMPLES)
            decoded[encounter, chunk] = block
            while len(decoded) > max(1, -(-BLOCK_ROWS // per_chunk)):
                del decoded[next(iter(decoded))]            # the oldest
        return decoded[encounter, chunk][row_in_chunk]

    def __getstate__(self):
        """For spawned workers: no handles; the segments' arrays as tensors, which PyTorch shares.
        They stay with us: freed, they would close the shared memory before a worker opens it."""
        for name in ("rows", "row_shifts"):
            self._shared.setdefault(name, torch.from_numpy(getattr(self.index, name)))
        state = {k: v for k, v in self.__dict__.items() if not k.startswith("_")}
        return dict(state, index=replace(self.index, rows=None, row_shifts=None),
                    _columns=self._columns, _shared=self._shared)

    def __setstate__(self, state):
        shared = {name: tensor.numpy() for name, tensor in state["_shared"].items()}
        self.__dict__.update(state, index=replace(state["index"], **shared), _process=None)


# ------------------------------------------------------------------------------------------ loaders

class BatchOrder(Sampler):
    """The order of an epoch as batches of item numbers: a function of (seed, epoch), whatever the
    number of workers.

    shuffle: a full permutation; of compressed data, whole chunks in random order, about BLOCK_ROWS
    rows of them at a time in random order among themselves, so that each chunk is decoded once in
    an epoch. drop_last drops an incomplete batch only behind a full one. With several processes
    (rank of world) each takes its slice of every batch, so that a step sees the segments that one
    process would have seen. Without `set_epoch`, each pass is the next epoch.
    """

    def __init__(self, dataset, batch_size, shuffle, seed=0, drop_last=False, rank=0, world=1):
        self.dataset, self.batch_size, self.shuffle, self.seed = dataset, batch_size, shuffle, seed
        self.drop_last, self.rank, self.world = drop_last, rank, world
        self.epoch, self.first_batch = 0, 0

    def set_epoch(self, epoch, first_batch=0):
        self.epoch, self.first_batch = epoch, first_batch
        self.dataset.set_epoch(epoch)

    def __len__(self):
        full, rest = divmod(len(self.dataset), self.batch_size)
        return full + (rest > 0 and not (self.drop_last and full > 0))

    def order(self):
        """[items] item numbers."""
        count = len(self.dataset)
        kind = "int32" if count < 2 ** 31 else "int64"
        rng = np.random.default_rng([self.seed, self.epoch])
        chunks = self.dataset.chunks() if self.shuffle else None
        if self.shuffle and chunks is None:     # in half of NumPy's time
            source = torch.Generator().manual_seed(int(rng.integers(2 ** 62)))
            return torch.randperm(count, dtype=getattr(torch, kind), generator=source).numpy()
        items = np.arange(count, dtype=kind)
        if not self.shuffle:
            return items
        mixed = rng.permutation(len(chunks[0]))
        sizes = np.diff(chunks[0], append=count)[mixed]
        first, decoded = chunks[0][mixed], chunks[1][mixed]
        ends = np.cumsum(sizes)
        items += np.repeat((first - (ends - sizes)).astype(kind), sizes)
        block = (np.cumsum(decoded) - decoded) // BLOCK_ROWS
        for part in np.split(items, ends[np.flatnonzero(np.diff(block))]):
            rng.shuffle(part)
        return items

    def __iter__(self):
        order = self.order()
        for batch in range(self.first_batch, len(self)):
            items = order[batch * self.batch_size:(batch + 1) * self.batch_size]
            yield np.array_split(items, self.world)[self.rank] if self.world > 1 else items
        self.epoch, self.first_batch = self.epoch + 1, 0


def make_loader(dataset, batch_size, shuffle=False, seed=0, workers=0, drop_last=None,
                pin_memory=False, rank=0, world=1):
    """A DataLoader whose batches are tuples of tensors, each read from the file in one go.

    Train (shuffle): shuffled, the last incomplete batch dropped behind a full one. Tune and test:
    every segment, in order.
    """
    if workers:
        for key in dataset.keys_to_load:
            if key not in WAVEFORMS:
                dataset.column(key)         # before the workers start: they share it with us
    order = BatchOrder(dataset, batch_size, shuffle, seed,
                       shuffle if drop_last is None else drop_last, rank, world)
    own = torch.Generator().manual_seed(seed)       # else dropout would depend on the workers
    return DataLoader(dataset, batch_size=None, sampler=order, num_workers=workers, generator=own,
                      collate_fn=tuple, pin_memory=pin_memory, persistent_workers=workers > 0,
                      worker_init_fn=leave_talking_to_parent if workers else None)


def leave_talking_to_parent(_):
    """In a loader's worker: Ctrl-C reaches all processes of a terminal, the parent acts on it; and
    where the parent has ended, it has said why: a worker adds no traceback of its connection."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    usual = sys.excepthook

    def hook(kind, error, trace):
        if not issubclass(kind, (ConnectionError, EOFError)):
            usual(kind, error, trace)

    sys.excepthook = hook


def fit_normaliser(dataset, keys):
    """{key: {'mean', 'sd', 'unit'}} over the dataset's segments (the train split's, always).

    Raises DataError for a field that does not vary or is not finite throughout.
    """
    normaliser = {}
    for key in keys:
        values = dataset.column(key).numpy()
        if not np.isfinite(values).all():
            raise DataError(f"field {key!r} is not finite in {(~np.isfinite(values)).sum()} of "
                            f"{len(values)} train segments, which the quality gate let through")
        if values.min() == values.max():
            raise DataError(f"field {key!r} has one value, {values[0]:g}, in all {len(values)} "
                            "train segments")
        mean = float(values.mean(dtype=np.float64))
        blocks = (values[a:a + 2 ** 20].astype(np.float64) for a in range(0, len(values), 2 ** 20))
        variance = sum(float(((block - mean) ** 2).sum()) for block in blocks) / len(values)
        normaliser[key] = {"mean": mean, "sd": variance ** 0.5, "unit": FIELDS[key][1]}
    return normaliser


# ----------------------------------------------------------------------------------- who is meant

def hash_patients(patients, salt):
    """Patients' names as salted hashes, which may leave the hospital."""
    return [hashlib.sha256(f"{salt}/{patient}".encode()).hexdigest()[:16] for patient in patients]


def main():
    parser = argparse.ArgumentParser(
        allow_abbrev=False, description="Names of the patients and encounters that messages give "
        "by number or by hash: private, for the eyes of those who may see the data.")
    parser.add_argument("file", help="an HDF5 file of the layout")
    parser.add_argument("--who", nargs="+", required=True, metavar="WHO",
                        help="17 (patient), 17/2 (patient/encounter) or 3f2a… (a patient's hash)")
    parser.add_argument("--salt-file", metavar="FILE",
                        help="of the hashes; default: tpp_ppg.salt beside the file")
    options = parser.parse_args()
    beside = os.path.join(os.path.dirname(options.file), "tpp_ppg.salt")
    with open_file(options.file) as file:
        with reading(f"{options.file}: its list of patients"):
            names = member_names(file)
        for who in options.who:
            if re.fullmatch(r"\d{1,7}(/\d{1,7})?", who):
                patient, *encounter = map(int, who.split("/"))
                found = names[patient:patient + 1]
                if found and encounter:
                    with reading(place(options.file, patient)):
                        group = member(file, found[0], h5py.Group)
                        inside = member_names(group) if group else []
                    found = [f"{found[0]}/{one}" for one in inside[encounter[0]:][:1]]
            else:
                with open(options.salt_file or beside, encoding="ascii", errors="replace") as saved:
                    hashes = hash_patients(names, saved.read().strip())
                found = [name for name, one in zip(names, hashes) if one.startswith(who)]
            print(f"{who}: {', '.join(map(printable, found)) or 'not in this file'}")


if __name__ == "__main__":
    try:
        main()
    except (DataError, OSError) as problem:
        print(f"error: {problem}", file=sys.stderr)
        sys.exit(2)
