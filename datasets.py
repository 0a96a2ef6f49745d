"""The data: HDF5 layout, quality gate, index, patient split and `TPP_PPG_dataset`.

    index = create_dataset_index(path="data/icu.h5")            # the default quality gate
    parts = split_index(index, split_seed=0)                    # train, tune, test by patient
    train = TPP_PPG_dataset(parts["train"], "segment", ["ppg", "map", "dbp", "hr", "tpp"])
    ppg, map_, dbp, hr, tpp = train[np.arange(256)]             # loaders.py makes batches

Can be copied out alone; needs NumPy, h5py and PyTorch.
"""
import glob
import hashlib
import math
import os
import re
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Dict, List, NamedTuple, Optional

import h5py
import numpy as np
import torch
from torch.utils.data import Dataset

FS, SEGMENT_SECONDS = 60, 60            # Hz, s
SEGMENT_SAMPLES = FS * SEGMENT_SECONDS
LARGE_BYTES = 10 ** 9                   # the index of larger data is kept next to them
ENCODED = -1                            # in place of a byte offset: only h5py can read the field
PARTS = ("train", "tune", "test")


class Field(NamedTuple):
    dtype: str
    unit: str
    role: str                       # 'waveform' (N, 3600); 'vital', 'label', 'quality', 'time' (N,)
    low: Optional[float] = None     # plausible range of a vital, limits included
    high: Optional[float] = None


# Any vital listed here can be an input of the network. Its range is wider than the limits at which
# Sun et al. 2006 (signal abnormality index) call an arterial line abnormal (MAP 30 to 200, DBP 20,
# SBP 300, PP 20, HR 20 to 200): it admits shock and tachycardia, not sensor faults.
FIELDS: Dict[str, Field] = {
    "ppg": Field("f4", "monitor scale", "waveform"),
    "abp": Field("f4", "mmHg", "waveform"),
    "map": Field("f4", "mmHg", "vital", 20, 200),
    "sbp": Field("f4", "mmHg", "vital", 30, 300),
    "dbp": Field("f4", "mmHg", "vital", 10, 200),
    "pp": Field("f4", "mmHg", "vital", 5, 200),
    "hr": Field("f4", "beats/min", "vital", 20, 250),
    "tpp": Field("f4", "mmHg", "label"),
    "p_crit": Field("f4", "mmHg", "label"),
    "r2": Field("f4", "", "quality"),
    "fit_rmse": Field("f4", "mmHg", "quality"),
    "p_crit_se": Field("f4", "mmHg", "quality"),
    "n_beats": Field("i4", "beats", "quality"),
    "reason": Field("u4", "bit mask", "quality"),
    "start_s": Field("f8", "s", "time"),
    "ppg_delay_s": Field("f4", "s", "quality"),
    "p_crit_true": Field("f4", "mmHg", "quality"),
    "beat_irregularity": Field("f4", "", "quality"),
    "upstroke_s": Field("f4", "s", "quality"),
    "ppg_hr": Field("f4", "beats/min", "quality"),
    "ppg_quality": Field("f4", "", "quality"),
    "ppg_skewness": Field("f4", "", "quality"),
}
WAVEFORMS, VITALS, LABELS = (tuple(key for key, field in FIELDS.items() if field.role == role)
                             for role in ("waveform", "vital", "label"))
WINDOW = {"fs": FS, "seconds": SEGMENT_SECONDS,         # for recordings.read_windows
          "limits": {key: (FIELDS[key].low, FIELDS[key].high) for key in VITALS}}
DIFFERENCES = {"tpp": ("map", "p_crit"), "p_crit": ("map", "tpp"), "pp": ("sbp", "dbp")}
SCALING = {"gain": 1, "scale_factor": 1, "add_offset": 0}   # attributes, and their neutral values


class DataError(ValueError):
    """A data file, an index or a request for data that cannot be used; the message is one line."""


def vitals_of(keys: List[str]) -> List[str]:
    """The vitals among a network's keys (inputs, then the label). Raises DataError."""
    vitals = [key for key in keys[:-1] if key != "ppg"]
    for key in set(vitals) - set(VITALS):
        raise DataError(f"{key!r} cannot be an input: expected ppg, {', '.join(VITALS)}")
    return vitals


class LayoutWriter(AbstractContextManager):
    """Write a file of the layout, one encounter at a time. Raises OSError when the disk is full.

        with LayoutWriter(path, "recordings", "published", "foot", signals.REASONS) as out:
            out.write("patient 1", "encounter 1", {"ppg": ppg, "reason": reason, "map": map_, ...})
    """

    def __init__(self, path, origin, label_method, beats, reasons, **attributes):
        self.file = h5py.File(path, "w")
        self.file.attrs.update(
            layout_version=1, fs=FS, segment_seconds=SEGMENT_SECONDS, origin=origin,
            label_method=label_method, beats=beats, reasons=",".join(reasons),
            created_with=f"tpp-ppg, h5py {h5py.__version__}, numpy {np.__version__}", **attributes)

    def __exit__(self, *error):
        self.file.flush()       # then give back what `write` has reserved and not used
        os.ftruncate(self.file.id.get_vfd_handle(), self.file.id.get_filesize())
        self.file.close()

    def write(self, patient: str, encounter: str, fields: Dict[str, np.ndarray]) -> None:
        """Write the N rows of one encounter, {field: [N] or [N, 3600]}; 'ppg' and 'reason' are
        required. Raises DataError before anything of the encounter is written."""
        if any(name in ("", ".") or "/" in name for name in (patient, encounter)):
            raise DataError("expected non-empty names of patient and encounter, without '/'")
        if f"{patient}/{encounter}" in self.file or not {"ppg", "reason"} <= set(fields):
            raise DataError("expected each encounter once, with the fields 'ppg' and 'reason'")
        arrays, rows = {}, len(fields["ppg"])
        for key, values in fields.items():
            expected = (rows, SEGMENT_SAMPLES) if key in WAVEFORMS else (rows,)
            if key not in FIELDS or np.shape(values) != expected:
                raise DataError(f"field {key!r} of shape {np.shape(values)}: expected one of "
                                f"{', '.join(FIELDS)}, of shape {expected}")
            arrays[key] = np.asarray(values, FIELDS[key].dtype)
        if not np.isfinite(arrays["ppg"][arrays["reason"] == 0]).all():
            raise DataError("field 'ppg' has non-finite samples in a segment without a reason")
        if hasattr(os, "posix_fallocate"):      # HDF5 crashes when it cannot write while closing
            size = 2 ** 16 + sum(values.nbytes for values in arrays.values())
            try:
                os.posix_fallocate(self.file.id.get_vfd_handle(), self.file.id.get_filesize(), size)
            except OSError as error:
                raise OSError(error.errno, os.strerror(error.errno), self.file.filename) from None
        for key, values in arrays.items():      # contiguous: a row is read at memory speed
            self.file[f"{patient}/{encounter}/{key}"] = values


# --------------------------------------------------------------------------------------------- gate

SIGNS = {">": np.greater, ">=": np.greater_equal, "<": np.less, "<=": np.less_equal}
COMPARISON = re.compile(r"(\w+)\s*(>=|<=|>|<)\s*([\w.+-]+)")
DEFAULT_CONDITION = "default"       # the published condition without its rule of 100 minutes
DEFAULT = "r2 > 0.5, p_crit > 0, p_crit < map, pp > 10, map < 120, p_crit < 100"
PUBLISHED_CONDITION = "r2_gt_5_and_pcrit_gt_0_pcrit_lt_map_pp_gt_10_map_lt_120_pcrit_lt_100"
ALIASES = {
    "default": DEFAULT, PUBLISHED_CONDITION: f"{DEFAULT}, minutes >= 100",
    "rmse_lt_3_and_pcrit_gt_0_pcrit_lt_map_pp_gt_10":
        "fit_rmse < 3, p_crit > 0, p_crit < map, pp > 10, minutes >= 100",
    "r2_gt_5": "r2 > 0.5", "pcrit_gt_0": "p_crit > 0", "pp_gt_10": "pp > 10",
    "rmse_lt_1": "fit_rmse < 1", "rmse_lt_2": "fit_rmse < 2", "rmse_lt_3": "fit_rmse < 3",
    "map_lt_120": "map < 120", "pcrit_lt_map": "p_crit < map", "pcrit_lt_100": "p_crit < 100",
    # Ours, on `signals.signal_quality`; 0.15 s separates most simulated damped lines from others.
    "regular_rhythm": "beat_irregularity < 0.1", "not_damped": "upstroke_s < 0.15",
}


@dataclass(frozen=True)
class Gate:
    """Which segments are used: comparisons (field, sign, number or field) and the minimum length of
    an encounter. Every gate also refuses segments with a quality flag (`reason`), a non-finite
    PPG, vital or label, or implausible vitals."""
    comparisons: tuple = ()
    min_minutes: int = 0

    def __str__(self):
        """The canonical text, which `get_gate` reads."""
        texts = [f"{key} {sign} {bound if isinstance(bound, str) else format(bound, '.12g')}"
                 for key, sign, bound in self.comparisons]
        texts += [f"minutes >= {self.min_minutes}"] * (self.min_minutes > 0)
        text = ", ".join(texts) or "any"
        return re.sub(f"^{re.escape(DEFAULT)}(?=,|$)", "default", text)


def get_gate(condition) -> Gate:
    """The `Gate` of a condition: 'any', a name of `ALIASES`, or comparisons such as "r2 > 0.5" and
    "p_crit < map", as a list or separated by commas. 'minutes' is the length of the encounter, as
    in 'minutes >= 100'. Raises DataError."""
    names = ",".join([condition] if isinstance(condition, str) else condition).split(",")
    parts = ", ".join(ALIASES.get(name.strip(), name.strip()) for name in names).split(", ")
    scalars, comparisons, min_minutes = [key for key in FIELDS if key not in WAVEFORMS], [], 0
    for part in parts:
        match = COMPARISON.fullmatch(part)
        key, sign, bound = match.groups() if match else (None, None, "")
        with suppress(ValueError):
            bound = float(bound)
        number = isinstance(bound, float) and np.isfinite(bound)
        if key == "minutes" and sign == ">=" and number:
            min_minutes = max(min_minutes, math.ceil(bound))
        elif key in scalars and (number or bound in scalars):
            comparisons.append((key, sign, bound))
        elif part != "any":
            raise DataError(f"condition {part!r}: expected 'default', 'any', or comparisons such "
                            f"as 'r2 > 0.5' or 'p_crit < map' of the fields {', '.join(scalars)}, "
                            "or 'minutes >= 100'")
    return Gate(tuple(dict.fromkeys(comparisons)), min_minutes)


def gate_rules(gate, values, ppg_finite):
    """Yield (rule as text, mask [N] of the rows that pass it) in the order of application.
    values: function from a field's name to its [N] values, or None if absent; ppg_finite: [N].
    Raises DataError if the gate compares an absent field."""
    every, reason = np.ones(len(ppg_finite), bool), values("reason")
    if reason is not None:
        yield "no quality flag set", reason == 0
    yield "finite PPG", ppg_finite
    found = {key: values(key) for key in VITALS + LABELS if values(key) is not None}
    yield "finite vitals and label", np.all([every, *map(np.isfinite, found.values())], axis=0)
    wrong = [(found[key] < low) | (found[key] > high)
             for key, (low, high) in WINDOW["limits"].items() if key in found]
    wrong += [found[low] > found[high] for low, high in (("dbp", "map"), ("map", "sbp"))
              if low in found and high in found]
    yield "plausible vitals", ~np.any([~every, *wrong], axis=0)
    for key, sign, bound in gate.comparisons:
        left, right = values(key), values(bound) if isinstance(bound, str) else bound
        if left is None or right is None:
            raise DataError(f"no field {key if left is None else bound!r}, which the gate needs; "
                            "use another condition")
        yield str(Gate(((key, sign, bound),))), SIGNS[sign](left, right)
    if gate.min_minutes:
        yield (f"at least {gate.min_minutes} minutes in the encounter",
               every & (len(every) >= gate.min_minutes))


def passes_gate(gate, values, ppg_finite) -> np.ndarray:
    """[N] mask of the rows that pass all `gate_rules`."""
    return np.logical_and.reduce([kept for _, kept in gate_rules(gate, values, ppg_finite)])


def gate_report(path, condition=DEFAULT_CONDITION):
    """[(rule, segments that break it, segments left after it)] of one or several files."""
    counts, gate = {}, get_gate(condition)
    for file in as_paths(path):
        for *_, fields, where in scan(file):
            left = np.ones(len(fields["ppg"]), bool)
            for text, kept in [("all segments", left), *apply_gate(gate, fields, where)]:
                left = left & kept
                count = counts.setdefault(text, np.zeros(2, int))
                count += (~kept).sum(), left.sum()
    return [(text, *count.tolist()) for text, count in counts.items()]


# -------------------------------------------------------------------------------------------- files

def as_paths(path) -> List[str]:
    return list(map(os.fspath, path if isinstance(path, (list, tuple)) else [path]))


@contextmanager
def reading(where):
    """Turn any error into a one-line DataError without h5py's text, which may name patients."""
    try:
        yield
    except DataError as error:
        raise DataError(f"{where}: {error}") from None
    except Exception as error:  # noqa: BLE001 - h5py raises nearly every kind for damaged files
        raise DataError(f"{where}: cannot be read ({type(error).__name__})") from None


def open_file(path):
    """An h5py.File for reading. Raises DataError."""
    if not os.path.isfile(path):        # opening a pipe would block
        raise DataError(f"{path}: no such file (prepare.py makes one from recordings, simulate.py "
                        "from virtual patients)")
    with reading(f"{path}: not a readable HDF5 file"):
        return h5py.File(path, "r")


def origin_of(paths, name: str = "origin") -> str:
    """The origins of files, joined: 'simulated', 'recordings', … or 'unknown' (published files).
    name: another attribute to read."""
    found = set()
    for path in paths:
        with open_file(path) as file, reading(path):
            found.add(str(np.asarray(file.attrs.get(name, "unknown")).astype(str)))  # str or bytes
    return ", ".join(sorted(found))


def place_text(path, patient, encounter):
    """For messages: a place in a file, by numbers, and how to look up the names."""
    return (f"{path}: patient {patient}, encounter {encounter} "
            f"(names: python checkpoint.py {path} --who {patient}/{encounter})")


def groups_of(parent):
    """[(number, name, group)] of the groups in an h5py group; links would duplicate a patient."""
    return [(number, name, item) for number, (name, item) in enumerate(parent.items())
            if isinstance(item, h5py.Group)
            and parent.get(name, getclass=True, getlink=True) is h5py.HardLink]


def scan(path, wanted=None):
    """Yield (patient, encounter, their numbers, {field: h5py dataset}, `place_text`) for each
    encounter of a file, or of wanted {patient: encounters}. Groups without fields are skipped."""
    with open_file(path) as file:
        with reading(path):
            if any(file.attrs.get(name, 60) != 60 for name in ("fs", "segment_seconds")):
                raise DataError(f"expected segments of {SEGMENT_SECONDS} s at {FS} Hz")
            encounters = [(patient, name, (i, j), group) for i, patient, groups in groups_of(file)
                          for j, name, group in groups_of(groups)]
        for patient, name, numbers, group in encounters:
            if wanted is None or name in wanted.get(patient, ()):
                where = place_text(path, *numbers)
                with reading(where):
                    fields = find_fields(group)
                if fields:
                    yield patient, name, numbers, fields, where


def find_fields(group):
    """The checked {field: h5py dataset} of an encounter; {} if the group holds no fields."""
    found = {key: item for key, item in group.items() if key in FIELDS}
    if found and "ppg" not in found:
        raise DataError("no field 'ppg'")
    for key, item in found.items():
        rows = len(found["ppg"])
        shapes = [(rows,)] if key not in WAVEFORMS else [
            (rows, SEGMENT_SAMPLES), (rows, 1, SEGMENT_SAMPLES)]
        if item.shape not in shapes or item.dtype.kind not in "iuf":
            raise DataError(f"field {key!r}: {item.dtype} of shape {item.shape}, expected numbers "
                            f"of shape {shapes[0]}")
        if rows and not item.id.get_storage_size():
            raise DataError(f"field {key!r}: never written; it would be read as zeros")
        for name in set(SCALING).intersection(item.attrs):
            if np.any(item.attrs[name] != SCALING[name]):
                raise DataError(f"field {key!r}: scaled by its attribute {name!r}; store the "
                                "scaled values as float32, without that attribute")
    return found


def apply_gate(gate, fields, where):
    """The `gate_rules` of {field: h5py dataset}, as a list."""
    @lru_cache(maxsize=None)
    def values(key):
        if key in fields:
            return fields[key][:].astype(np.float32)
        parts = [values(part) for part in DIFFERENCES.get(key, ()) if part in fields]
        return parts[0] - parts[1] if len(parts) == 2 else None

    with reading(where):
        finite = np.ones(len(fields["ppg"]), bool)
        if "reason" not in fields:          # LayoutWriter has checked files with reasons
            for a in range(0, len(finite), 256):
                block = fields["ppg"][a:a + 256].astype(np.float32)
                finite[a:a + 256] = np.isfinite(block).reshape(len(block), -1).all(1)
        return list(gate_rules(gate, values, finite))


# -------------------------------------------------------------------------------------------- index

@dataclass
class DatasetIndex:
    """The segments that passed the gate, as flat arrays: P patients, E encounters, S segments.
    Encounter e holds the segments starts[e]:starts[e+1]; segment s is row rows[s] of it."""
    paths: list
    stamps: np.ndarray              # [files, 2] int64: `stamp` of each
    condition: str                  # the gate's canonical text
    patients: np.ndarray            # [P] str (MRNs)
    encounters: np.ndarray          # [E] str (CSNs)
    places: np.ndarray              # [E, 2] int32: numbers in the file, for `place_text`
    encounter_patient: np.ndarray   # [E] int32, ascending
    encounter_file: np.ndarray      # [E] int32
    fields: np.ndarray              # [K] str: fields that all encounters have
    stored: np.ndarray              # [K, E] int64: byte offset of row 0 in the file, or ENCODED
    starts: np.ndarray              # [E + 1] int64
    rows: np.ndarray                # [S] int32

    def __len__(self):
        return len(self.rows)

    @property
    def n_patients(self):
        return len(self.patients)

    def per_segment(self, of_encounters):
        """[E] -> [S]: repeat a value of each encounter for all of its segments."""
        return np.repeat(of_encounters, np.diff(self.starts))

    def segment_patients(self):
        """[S] int32: the number of each segment's patient."""
        return self.per_segment(self.encounter_patient)

    def select(self, keep):
        """The index of some encounters only; keep: [E] bool."""
        return self.select_segments(self.per_segment(keep))

    def select_segments(self, keep):
        """The index of some segments only; keep: [S] bool. Encounters and patients without a
        segment are dropped, the others renumbered in the same order."""
        counts = np.add.reduceat(keep, self.starts[:-1], dtype=np.int64)
        left = counts > 0
        patients, numbers = np.unique(self.encounter_patient[left], return_inverse=True)
        return replace(
            self, patients=self.patients[patients], encounters=self.encounters[left],
            places=self.places[left], encounter_patient=numbers.astype(np.int32),
            encounter_file=self.encounter_file[left], stored=self.stored[:, left],
            starts=np.append(0, np.cumsum(counts[left])), rows=self.rows[keep])

    def sources(self, key):
        """The fields that `key` is read from: itself or, if absent, two fields to subtract."""
        for fields in ((key,), DIFFERENCES.get(key, (key,))):
            if set(fields) <= set(self.fields):
                return fields
        raise DataError(f"{self.paths[0]}: no field {key!r} in some or all encounters")

    def save(self, savename):
        """Write the index as one `.npz` of plain arrays, atomically. It holds names, so only its
        owner can read it. Raises DataError if another kind of file is in its place."""
        savename = os.fspath(savename)
        if os.path.exists(savename):
            with open(savename, "rb") as file:
                if b"tpp_ppg_index" not in file.read(64):
                    raise DataError(f"{savename}: not a saved index; not overwritten")
        for leftover in glob.glob(glob.escape(savename) + ".*.partial"):    # of killed processes
            os.remove(leftover)
        temporary = f"{savename}.{os.getpid()}.partial"
        paths = [os.path.abspath(path) for path in self.paths]
        with open(temporary, "wb", opener=lambda *name: os.open(*name, 0o600)) as file:
            np.savez(file, **{"tpp_ppg_index": repr(FIELDS), **vars(self), "paths": paths})
        os.replace(temporary, savename)


def load_dataset_index(savename) -> DatasetIndex:
    """Load a saved index. Raises DataError for other files, or if its data are gone or changed."""
    with reading(f"{savename}: not a saved index of this version"):
        with np.load(savename, allow_pickle=False) as saved:
            values = {key: saved[key] for key in saved.files}
        if str(values.pop("tpp_ppg_index")) != repr(FIELDS):    # the gate depends on them
            raise DataError("made with other fields")
        values.update(paths=values["paths"].tolist(), condition=str(values["condition"]))
        index = DatasetIndex(**values)
    check_unchanged(index)
    return index


def create_dataset_index(mrn_to_csns=None, condition=DEFAULT_CONDITION, savename=None,
                         path=None) -> DatasetIndex:
    """Index the segments of HDF5 files (`path`, one or several) that pass a gate (`get_gate`).

    mrn_to_csns: {MRN: [CSN, …]} to take only these. savename: also write the index to this `.npz`.
    Without both, the index of data above 1 GB is kept in `<first file>.index.npz`, if that can be
    written, until the files or the condition change.
    """
    gate, paths = get_gate(condition), as_paths(path)
    size = sum(map(os.path.getsize, filter(os.path.isfile, paths)))
    keep = mrn_to_csns is None and savename is None and size > LARGE_BYTES
    if keep:
        savename = paths[0] + ".index.npz"
        with suppress(DataError):       # absent or stale: make it again
            index = load_dataset_index(savename)
            if (index.condition, index.paths) == (str(gate), list(map(os.path.abspath, paths))):
                return replace(index, paths=paths)
    index = index_files(paths, gate, mrn_to_csns)
    if savename is not None:
        with suppress(*[DataError, OSError] if keep else []):
            index.save(savename)
    return index


def index_files(paths, gate, mrn_to_csns):
    """Scan files for a `DatasetIndex`."""
    wanted = mrn_to_csns and {str(mrn): set(map(str, csns)) for mrn, csns in mrn_to_csns.items()}
    stamps, found = [], []
    for number, path in enumerate(paths):
        open_file(path).close()             # raises DataError if there is no such file
        stamps.append(stamp(path))          # before the scan, to notice a change during it
        before = len(found)
        for patient, encounter, place, fields, where in scan(path, wanted):
            passed = np.logical_and.reduce([kept for _, kept in apply_gate(gate, fields, where)])
            offsets = {key: item.id.get_offset() if item.dtype == "<f4" else None
                       for key, item in fields.items()}     # no offset: chunked or compact
            found.append((patient, encounter, place, number, offsets, np.flatnonzero(passed)))
        if wanted is None and len(found) == before:
            raise DataError(f"{path}: expected /<patient>/<encounter>/<field>, found no encounter")
    where = paths[0] + (f" and {len(paths) - 1} more" if len(paths) > 1 else "")
    if len({(patient, encounter) for patient, encounter, *_ in found}) < len(found):
        raise DataError(f"{where}: the same patient and encounter are in two of the files")
    if wanted and len(found) < sum(map(len, wanted.values())):
        raise DataError(f"{where}: only {len(found)} of the encounters asked for were found")
    found = [each for each in found if len(each[-1])]       # with rows that passed
    if not found:
        raise DataError(f"{where}: no segment passes the quality gate {str(gate)!r}")
    found.sort(key=lambda each: each[0])    # by patient; files and encounters stay in order
    patients, encounters, places, files, offsets, rows = zip(*found)
    names, numbers = np.unique(patients, return_inverse=True)
    fields = sorted(set.intersection(*map(set, offsets)))
    return DatasetIndex(
        paths, np.array(stamps), str(gate), names, np.array(encounters),
        np.array(places, np.int32), numbers.astype(np.int32), np.array(files, np.int32),
        np.array(fields), np.array([[each[key] or ENCODED for each in offsets] for key in fields]),
        np.cumsum([0, *map(len, rows)], dtype=np.int64), np.concatenate(rows).astype(np.int32))


def stamp(path):
    """(size in bytes, time of the last change in ns) of a file."""
    found = os.stat(path)
    return found.st_size, found.st_mtime_ns


def check_unchanged(index: DatasetIndex, files=None) -> None:
    """Raise DataError if a file is gone or has changed since it was indexed. files: numbers."""
    for number in range(len(index.paths)) if files is None else files:
        path = index.paths[number]
        if not os.path.exists(path) or stamp(path) != tuple(index.stamps[number]):
            raise DataError(f"{path}: gone or changed since the index was made; make it again")


# -------------------------------------------------------------------------------------------- split

def split_hash(patients, split_seed):
    """[P] in [0, 1): a pseudo-random position of each patient, a function of name and seed only."""
    digests = [hashlib.blake2b(f"{split_seed}/{patient}".encode(), digest_size=8).digest()
               for patient in patients]
    return np.array([int.from_bytes(digest, "big") / 2.0 ** 64 for digest in digests])


def split_patients(patients, split_seed=0):
    """The part (0 train, 1 tune, 2 test) of each patient, [P] int8. From 100 patients, thresholds
    on a hash give 80/10/10 in expectation; a patient's part does not change when the file grows.
    Below, the rank of the hash decides, so that no part is empty."""
    position, count, tune, test = split_hash(patients, split_seed), len(patients), 0.8, 0.9
    if count < len(PARTS):
        raise DataError(f"{count} patients with usable segments: expected at least {len(PARTS)}, "
                        "one for each of train, tune and test")
    if count < 100:
        tenth = max(1, round(count / 10))
        position, tune, test = np.argsort(np.argsort(position)), count - 2 * tenth, count - tenth
    return (position >= tune).astype(np.int8) + (position >= test)


def fold_patients(index, split_seed, folds):
    """The fold, 0 to folds - 1, in which each patient of an index is tested, [P]. Patients are
    dealt out in the order of `split_hash`, file by file (by the first encounter's name, where they
    are in several), so that folds differ by at most one patient, also within each file."""
    by_name = np.lexsort((index.encounters, index.encounter_patient))
    _, first = np.unique(index.encounter_patient[by_name], return_index=True)
    file_of_patient = index.encounter_file[by_name[first]]
    order = np.argsort(split_hash(index.patients, split_seed))
    files = dict.fromkeys(file_of_patient[order])       # in the order of their first patients
    dealt = np.concatenate([order[file_of_patient[order] == file] for file in files])
    return np.argsort(dealt) % folds        # argsort: each patient's place in the order of dealing


def split_index(index, split_seed=0, fold=None, folds=None) -> Dict[str, DatasetIndex]:
    """{'train': index, 'tune': index, 'test': index}, no patient in two of them. Without folds, by
    `split_patients`; else number `fold` (from 0) of `folds` splits that test each patient once, and
    tune on the next fold's test part. Raises DataError for too few patients or a wrong fold."""
    if fold is None and folds is None:
        of_patients = split_patients(index.patients.tolist(), split_seed)
    elif fold in range(folds or 0) and len(PARTS) <= folds <= index.n_patients:
        # each patient's fold, counted from this fold on: 0 is test, 1 tune, any other train
        ahead = (fold_patients(index, split_seed, folds) - fold) % folds
        of_patients = np.select([ahead == 0, ahead == 1], [2, 1])
    else:
        raise DataError(f"fold {fold} of {folds}, {index.n_patients} patients with usable "
                        f"segments: expected {len(PARTS)} folds or more, a patient for each")
    of_encounters = of_patients[index.encounter_patient]
    parts = {name: index.select(of_encounters == number) for number, name in enumerate(PARTS)}
    names = np.concatenate([part.patients for part in parts.values()])
    assert len(np.unique(names)) == len(names), "a patient in two parts"
    return parts


# ------------------------------------------------------------------------------------------ dataset

class TPP_PPG_dataset(Dataset):
    """Segments as tuples of float32 tensors: `dataset[i]` is ppg [1, 3600] and scalars in the order
    of keys_to_load, the label last; `dataset[array]` is a batch, in one read. level: 'segment', or
    'patient' for one random segment of each, a function of (seed, epoch, patient). percentage: a
    random share. csns_to_skip: encounters to leave out. Raises DataError."""

    def __init__(self, dataset_index, level, keys_to_load=None, percentage=100, csns_to_skip=None,
                 *, seed=0):
        index, self.level, self.seed = dataset_index, level, seed
        self.keys_to_load = list(keys_to_load or ["ppg", "p_crit"])
        if level not in ("segment", "patient") or not 0 < percentage <= 100:
            raise DataError(f"level {level!r}, percentage {percentage}: expected 'segment' or "
                            "'patient', and a percentage above 0 and up to 100")
        if csns_to_skip:
            index = index.select(~np.isin(index.encounters, list(map(str, csns_to_skip))))
        for key in self.keys_to_load:
            index.sources(key)
        if percentage < 100:
            item = np.arange(len(index)) if level == "segment" else index.segment_patients()
            n = item[-1] + 1
            chosen = np.random.default_rng(seed).choice(
                n, max(1, round(percentage / 100 * n)), replace=False, shuffle=False)
            index = index.select_segments(np.isin(item, chosen))
        self.index, self._columns = index, {}
        self.epoch = torch.full((1,), -1, dtype=torch.int64)    # shared with loader workers

    def __len__(self):
        return len(self.index) if self.level == "segment" else self.index.n_patients

    def set_epoch(self, epoch):     # if never called, level 'patient' draws anew at each read
        self.epoch.fill_(epoch)

    def segments(self, items):
        """Item numbers [B] -> segment numbers [B] of the index: the same, or one per patient."""
        items = np.asarray(items, np.int64)
        if np.any((items < 0) | (items >= len(self))):
            raise IndexError(f"expected items from 0 to {len(self) - 1}")
        if self.level == "segment":
            return items
        edges = np.searchsorted(self.index.encounter_patient, [items, items + 1])
        first, end = self.index.starts[edges]       # of each patient's segments
        if self.epoch.item() < 0:
            draw = torch.rand(len(items), dtype=torch.float64).numpy()
        else:       # a number for every patient, so that the batches do not matter
            draw = np.random.default_rng([self.seed, self.epoch.item()]).random(len(self))[items]
        return first + (draw * (end - first)).astype(np.int64)

    def place(self, item):
        """For messages: an item's place in its file, without names."""
        segment, index = self.segments([item])[0], self.index
        encounter = np.searchsorted(index.starts, segment, "right") - 1
        path = index.paths[index.encounter_file[encounter]]
        return f"{place_text(path, *index.places[encounter])}, row {index.rows[segment]}"

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
        """[S] float32 tensor: a field of all segments of the index, read once and kept."""
        if key not in self._columns:
            first, *second = self.index.sources(key)
            if second:
                self._columns[key] = self.column(first) - self.column(*second)
            else:
                blocks = np.array_split(np.arange(len(self.index)), 1 + len(self.index) // 2 ** 20)
                self._columns[key] = torch.from_numpy(np.concatenate(
                    [self._rows(key, block, 1)[:, 0] for block in blocks]))
        return self._columns[key]

    def waveform(self, key, segments):
        """[B, 3600] float32 of segments [B]."""
        return self._rows(key, segments, SEGMENT_SAMPLES)

    def _rows(self, key, segments, samples):
        """[B, samples] float32: a field's rows of segments [B]. Plain float32 in a file is read by
        one gather from a memory map, everything else by h5py."""
        index, out = self.index, np.empty((len(segments), samples), np.float32)
        encounters = np.searchsorted(index.starts, segments, "right") - 1
        files, rows = index.encounter_file[encounters], index.rows[segments]
        first = index.stored[index.fields == key][0][encounters]
        offsets = first + 4 * samples * rows.astype(np.int64)
        for number in np.unique(files):
            check_unchanged(index, [number])    # reading a map of a truncated file is a bus error
            path, here = index.paths[number], files == number
            plain, encoded = here & (first >= 0), np.flatnonzero(here & (first < 0))
            if plain.any():
                with reading(path):
                    data = map_rows(path, *index.stamps[number], 4 * samples)
                    found = data[offsets[plain]].view("<f4").reshape(-1, samples)
                if len(found) == len(out):
                    return found
                out[plain] = found
            if len(encoded):
                with open_file(path) as file:
                    for e in np.unique(encounters[encoded]):
                        patient = index.patients[index.encounter_patient[e]]
                        with reading(f"{place_text(path, *index.places[e])}, field {key!r}"):
                            item = file[patient][index.encounters[e]][key]
                            values = item if key in WAVEFORMS else item[:]
                            for i in encoded[encounters[encoded] == e]:
                                out[i] = values[rows[i]]
        return out


@lru_cache(200)
def map_rows(path, size, time_ns, row_bytes):
    """A file as overlapping rows: item i begins at byte i, aligned or not. size, time_ns: a changed
    file is mapped again."""
    data = np.memmap(path, np.uint8, "r")
    return np.ndarray(max(0, len(data) - row_bytes + 1), f"V{row_bytes}", data, strides=1)


def fit_normaliser(dataset, keys) -> Dict[str, dict]:
    """{key: {'mean', 'sd', 'unit'}} over the (train) segments. Raises DataError for a constant."""
    normaliser = {}
    for key in keys:
        values = dataset.column(key).numpy()
        if not values.min() < values.max():
            raise DataError(f"field {key!r} is constant or not finite in the train segments")
        mean = float(values.mean(dtype=np.float64))
        blocks = (values[a:a + 2 ** 20].astype(np.float64) for a in range(0, len(values), 2 ** 20))
        variance = sum(float(((block - mean) ** 2).sum()) for block in blocks) / len(values)
        normaliser[key] = {"mean": mean, "sd": variance ** 0.5, "unit": FIELDS[key].unit}
    return normaliser
