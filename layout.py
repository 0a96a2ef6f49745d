"""The HDF5 layout: its fields, the writer, the quality gate, and the scan of a file.

    from layout import FIELDS, LayoutWriter, gate_report
    gate_report("data/icu.h5", ["default", "p_crit_se < 5"])    # what each rule refuses

Can be copied out alone; needs NumPy and h5py. A file holds /<patient>/<encounter>/<field>, one row
per 60-s segment; files of the published system are read as they are. Everything here is also in
`datasets`, which builds on it.
"""
import argparse
import errno
import glob
import hashlib
import os
import re
import sys
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache
from typing import Dict, List, NamedTuple, Optional

import h5py
import numpy as np

FS, SEGMENT_SECONDS = 60, 60        # Hz, s
SEGMENT_SAMPLES = FS * SEGMENT_SECONDS
LAYOUT_VERSION = 1                  # of the HDF5 files
SPARE_BYTES = 2 ** 16               # for metadata, when disk space is claimed ahead


class Field(NamedTuple):
    dtype: str
    unit: str
    role: str                       # 'waveform' (N, 3600); 'vital', 'label', 'quality', 'time' (N,)
    low: Optional[float] = None     # plausible range of a vital, limits included
    high: Optional[float] = None


# A vital becomes a possible input of the network by its line here. The ranges are wider than those
# beyond which Sun et al. 2006 (signal abnormality index) call an arterial line abnormal (MAP 30 to
# 200, DBP 20, SBP 300, PP 20, HR 20 to 200): they admit shock and tachycardia, not sensor faults.
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
ENCODED, ABSENT = -1, -2            # in place of a byte offset: h5py has to read it; not there


class DataError(ValueError):
    """A data file, an index or a request for data that cannot be used; the message is one line."""


def vitals_of(keys: List[str]) -> List[str]:
    """The vitals among a network's keys (inputs, then the label). Raises DataError for an input
    that is neither the PPG nor a vital."""
    vitals = [key for key in keys[:-1] if key != "ppg"]
    for key in set(vitals) - set(VITALS):
        raise DataError(f"{key!r} cannot be an input: expected ppg, {', '.join(VITALS)}")
    return vitals


class LayoutWriter:
    """Writes one file of the layout, an encounter at a time. Raises OSError when the disk is full.

        with LayoutWriter(path, "recordings", "published", "foot", signals.REASONS) as out:
            out.write("patient 1", "encounter 1", {"ppg": ppg, "reason": reason, "map": map_, ...})

    Datasets are contiguous and uncompressed, so that a row is read at memory speed; `compression`
    ('gzip', 'lzf') makes chunks of 64 rows, which cost a shuffled reader most of its speed.
    """

    def __init__(self, path, origin, label_method, beats, reasons, compression=None, **attributes):
        self.path, self.compression = os.fspath(path), compression
        with open(path, "wb") as empty:         # raises OSError while HDF5 is not yet involved
            empty.write(bytes(SPARE_BYTES))
        self.file = h5py.File(path, "w")
        self._reserve(0)
        self.file.attrs.update(
            layout_version=LAYOUT_VERSION, fs=FS, segment_seconds=SEGMENT_SECONDS, origin=origin,
            label_method=label_method, beats=beats, reasons=",".join(reasons),
            created_with=f"tpp-ppg, h5py {h5py.__version__}, numpy {np.__version__}", **attributes)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.file.flush()
        if hasattr(os, "posix_fallocate"):
            os.ftruncate(self.file.id.get_vfd_handle(), self.file.id.get_filesize())
        self.file.close()

    def _reserve(self, n_bytes):
        """Claims disk space ahead: HDF5 crashes when it cannot write while closing a file."""
        if hasattr(os, "posix_fallocate"):
            handle, end = self.file.id.get_vfd_handle(), self.file.id.get_filesize()
            try:
                os.posix_fallocate(handle, end, n_bytes + SPARE_BYTES)
            except OSError as error:
                raise OSError(error.errno, os.strerror(error.errno), self.path) from None

    def write(self, patient: str, encounter: str, fields: Dict[str, np.ndarray]) -> None:
        """Writes the N rows of one encounter, {field: [N] or [N, 3600]}, of which 'ppg' and
        'reason' are required. Raises DataError before anything of the encounter is written."""
        name = f"{patient}/{encounter}"
        if any(str(part) in ("", ".") or "/" in str(part) for part in (patient, encounter)):
            raise DataError("expected names of patient and encounter without '/', and not empty")
        if name in self.file:
            raise DataError("this patient's encounter has been written before; expected it once")
        if not {"ppg", "reason"} <= set(fields):
            raise DataError("expected the fields 'ppg' and 'reason' in every encounter")
        rows = len(fields["ppg"])
        for key, values in fields.items():
            expected = (rows, SEGMENT_SAMPLES) if key in WAVEFORMS else (rows,)
            if key not in FIELDS or np.shape(values) != expected:
                raise DataError(f"field {key!r} of shape {np.shape(values)}: expected one of "
                                f"{', '.join(FIELDS)}, of shape {expected}")
        arrays = {key: np.asarray(values, FIELDS[key].dtype) for key, values in fields.items()}
        if not np.isfinite(arrays["ppg"][arrays["reason"] == 0]).all():
            raise DataError("field 'ppg' has non-finite samples in a segment without a reason")
        self._reserve(sum(values.nbytes for values in arrays.values()))
        for key, values in arrays.items():
            packed = self.compression and key in WAVEFORMS and rows
            self.file.create_dataset(
                f"{name}/{key}", data=values, compression=self.compression if packed else None,
                chunks=(min(64, rows), SEGMENT_SAMPLES) if packed else None)


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
    """Which segments are used: comparisons (field, sign, number or field), and the minimum length
    of an encounter. Every gate also refuses segments with a quality flag (`reason`), with
    non-finite PPG, vitals or label, and with vitals that are not plausible for a person."""
    comparisons: tuple = ()
    min_minutes: int = 0

    def __str__(self):
        """The canonical text, which `get_gate` reads."""
        texts = [f"{key} {sign} {bound if isinstance(bound, str) else f'{bound:.12g}'}"
                 for key, sign, bound in self.comparisons]
        texts += [f"minutes >= {self.min_minutes}"] * (self.min_minutes > 0)
        text = ", ".join(texts) or "any"
        return "default" + text[len(DEFAULT):] if (text + ",").startswith(DEFAULT + ",") else text


def get_gate(condition) -> Gate:
    """The `Gate` of a condition: 'any', a name of `ALIASES`, or comparisons such as "r2 > 0.5" or
    "p_crit < map" of a field with a number or a field; several as a list or with commas. 'minutes
    >= 100' is the length of the encounter. Raises DataError."""
    if isinstance(condition, Gate):
        return condition
    parts = ", ".join([condition] if isinstance(condition, str) else map(str, condition)).split(",")
    parts = [one for part in parts for one in ALIASES.get(part.strip(), part.strip()).split(", ")]
    scalars, comparisons, min_minutes = set(FIELDS) - set(WAVEFORMS), [], 0
    for part in parts:
        match = COMPARISON.fullmatch(part)
        key, sign, bound = match.groups() if match else (None, None, None)
        with suppress(ValueError, TypeError):
            bound = float(bound)
        number = isinstance(bound, float) and np.isfinite(bound)
        if key == "minutes" and sign == ">=" and number:
            min_minutes = max(min_minutes, int(bound))
        elif key in scalars and (number or bound in scalars):
            comparisons.append((key, sign, bound))
        elif part != "any":
            raise DataError(f"condition {part!r}: expected 'default', 'any', or comparisons such "
                            "as 'r2 > 0.5' or 'p_crit < map' of the fields "
                            + ", ".join(key for key in FIELDS if key in scalars))
    return Gate(tuple(dict.fromkeys(comparisons)), min_minutes)


def gate_rules(gate, values, ppg_finite):
    """Yields (rule as text, mask [N] of the rows that keep it), in the order of application.

    values: a function from a field's name to its [N] values, or None where it is absent.
    ppg_finite: [N] bool. Raises DataError where the gate compares an absent field.
    """
    for key in sorted({one for rule in gate.comparisons for one in rule[::2]} & set(FIELDS)):
        if values(key) is None:
            raise DataError(f"no field {key!r}, which the gate needs; use another condition")
    every, reason = np.ones(len(ppg_finite), bool), values("reason")
    if reason is not None:
        yield "no quality flag set", np.nan_to_num(reason, nan=1) == 0
    yield "finite PPG", ppg_finite
    there = {key: values(key) for key in VITALS + LABELS if values(key) is not None}
    yield "finite vitals and label", np.all([every, *map(np.isfinite, there.values())], axis=0)
    with np.errstate(invalid="ignore"):
        wrong = [(there[key] < low) | (there[key] > high)
                 for key, (low, high) in WINDOW["limits"].items() if key in there]
        wrong += [there[a] > there[b] for a, b in (("dbp", "map"), ("map", "sbp"))
                  if a in there and b in there]
        yield "plausible vitals", ~np.any([~every, *wrong], axis=0)
        for key, sign, bound in gate.comparisons:
            limit = values(bound) if isinstance(bound, str) else bound
            yield str(Gate(((key, sign, bound),))), SIGNS[sign](values(key), limit)
    if gate.min_minutes:
        yield (f"at least {gate.min_minutes} minutes in the encounter",
               every & (len(every) >= gate.min_minutes))


def passes_gate(gate, values, ppg_finite) -> np.ndarray:
    """[N] mask of the rows that keep all `gate_rules`."""
    return np.logical_and.reduce([kept for _, kept in gate_rules(gate, values, ppg_finite)])


def gate_report(path, condition=DEFAULT_CONDITION):
    """[(rule, segments that break it, segments left after it)] of one file or several."""
    counts = {"all segments": (0, 0)}
    for one in as_paths(path):
        for _, rules in scan(one, get_gate(condition)):
            alive = np.ones(len(rules[0][1]), bool)
            for text, mask in [("all segments", alive.copy()), *rules]:
                alive &= mask
                broken, left = counts.get(text, (0, 0))
                counts[text] = broken + int((~mask).sum()), left + int(alive.sum())
    return [(text, *numbers) for text, numbers in counts.items()]


# --------------------------------------------------------------------------------- opening and scan

def as_paths(path) -> List[str]:
    return [os.fspath(p) for p in (path if isinstance(path, (list, tuple)) else [path])]


def as_text(name):
    return name.decode() if isinstance(name, bytes) else str(name)


def find_files(names) -> List[str]:
    """The files of names and globs ('~' is expanded), each of which must be there."""
    names = [os.path.expanduser(name) for name in names]
    found = [path for name in names for path in sorted(glob.glob(name)) or [name]]
    for path in found:
        if not os.path.exists(path):
            raise DataError(f"{path}: no such file (prepare.py makes one from recordings, "
                            "simulate.py from virtual patients)")
    return found


def open_file(path):
    """An h5py.File for reading. Raises DataError."""
    if not os.path.isfile(path):        # a pipe would wait for ever
        raise DataError(f"{path}: no such file, or not a regular one")
    try:
        return h5py.File(path, "r")
    except OSError as error:
        hint = "; raise `ulimit -n`, or use fewer workers" * (error.errno == errno.EMFILE)
        raise DataError(f"{path}: not a readable HDF5 file ({str(error).splitlines()[0]}{hint})"
                        ) from None


@contextmanager
def reading(where):
    """Turns errors of damaged files into one line without h5py's words, which may name patients."""
    try:
        yield
    except DataError:
        raise
    except (OSError, LookupError, RuntimeError, TypeError, ValueError, AttributeError,
            MemoryError) as error:
        raise DataError(f"{where} cannot be read ({type(error).__name__})") from None


def printable(text):
    """Text from a file, fit for a terminal and a log: one line without control characters."""
    return "".join(c if c.isprintable() else "?" for c in text[:255])


def attribute(file, name, default):
    """An attribute of a file if it is a number or text, else the default."""
    with reading(f"{file.filename}: attribute {name!r}"):
        value = file.attrs.get(name, default)
        value = value.decode(errors="replace") if isinstance(value, bytes) else value
    if isinstance(value, str):
        return printable(value)
    return value if isinstance(value, (int, float, np.number)) else default


def origin_of(paths, name: str = "origin") -> str:
    """The files' origins, joined: 'simulated', 'recordings', … ('unknown' in published files); or
    another of their attributes."""
    found = set()
    for path in paths:
        with open_file(path) as file:
            found.add(str(attribute(file, name, "unknown")))
    return ", ".join(sorted(found))


def place(path, patient, *encounter):
    """Where in a file: patient and encounter by their numbers in it, and how to get the names."""
    who = "/".join(map(str, (patient, *encounter)))
    text = ", ".join([f"patient {patient}", *(f"encounter {number}" for number in encounter)])
    return f"{path}: {text} (names: python datasets.py {path} --who {who})"


def members(group, kind):
    """[(number, name, member or None)] of an h5py group; None for links and other kinds."""
    found = []
    for number, name in enumerate(group):
        link = group.id.links.get_info(name.encode(errors="surrogateescape"))
        item = group[name] if link.type == h5py.h5l.TYPE_HARD else None
        found.append((number, name, item if isinstance(item, kind) else None))
    return found


def find_fields(group, where, file_size):
    """{field: h5py dataset} of an encounter, checked; {} where a group holds no fields."""
    there = {name: item for _, name, item in members(group, h5py.Dataset) if item is not None}
    found = {key: there[key] for key in FIELDS if key in there}
    if found and "ppg" not in found:
        raise DataError(f"{where}: no field 'ppg'")
    rows = found["ppg"].shape[0] if found and found["ppg"].shape else 0
    for key, item in found.items():
        here, plist = f"{where}, field {key!r}", item.id.get_create_plist()
        shapes = [(rows,)]
        if key in WAVEFORMS:
            shapes = [(rows, SEGMENT_SAMPLES), (rows, 1, SEGMENT_SAMPLES)]
        if item.shape not in shapes:
            raise DataError(f"{here}: shape {item.shape}, expected {shapes[0]}")
        if (item.dtype.kind not in "iuf" or plist.get_layout() == h5py.h5d.VIRTUAL
                or plist.get_external_count()):
            raise DataError(f"{here}: expected plain numbers stored in this file")
        if item.chunks is not None:
            chunks = np.prod([-(-n // m) for n, m in zip(item.shape, item.chunks)])
            stored = item.id.get_num_chunks() >= chunks
        else:       # no offset: nothing is written, or the header itself holds the data
            end = (item.id.get_offset() or 0) + item.nbytes
            stored = item.nbytes <= item.id.get_storage_size() and end <= file_size
        if not stored:          # what was never written would read as zeros
            raise DataError(f"{here}: {rows} rows, but this file holds fewer")
        for name in set(SCALING) & set(item.attrs) if h5py.h5a.get_num_attrs(item.id) else ():
            if np.any(item.attrs[name] != SCALING[name]):
                raise DataError(f"{here}: scaled by its attribute {name!r}; store the numbers that "
                                "are meant, as float32 without that attribute")
    return found


class Encounter(NamedTuple):
    patient: str
    name: str
    place: tuple                    # its patient's number in the file, its number in the patient
    passed: np.ndarray              # int32: the rows that the gate lets through
    stored: dict                    # {field: byte offset of row 0, or ENCODED}
    chunk_rows: int                 # rows of PPG that are decoded together


def scan(path, gate, wanted=None):
    """Yields (`Encounter`, its `gate_rules`) for each encounter of a file, or of {MRN: CSNs}.
    Datasets, links, and groups that hold no fields are ignored, at both levels."""
    size, empty = os.path.getsize(path) if os.path.isfile(path) else 0, True
    with open_file(path) as file:
        seconds = attribute(file, "segment_seconds", SEGMENT_SECONDS)
        if attribute(file, "fs", FS) != FS or seconds != SEGMENT_SECONDS:
            raise DataError(f"{path}: expected segments of {SEGMENT_SECONDS} s at {FS} Hz")
        with reading(f"{path}: its list of patients"):
            patients = members(file, h5py.Group)
        for i, patient, group in patients:
            with reading(place(path, i)):
                groups = [] if group is None else members(group, h5py.Group)
            for j, name, encounter in groups:
                with reading(place(path, i, j)):
                    found = {} if encounter is None else find_fields(encounter, place(path, i, j),
                                                                     size)
                    empty = empty and not found
                    if not found or wanted is not None and name not in wanted.get(patient, ()):
                        continue
                    rules = scan_encounter(found, place(path, i, j), gate)
                    passed = np.flatnonzero(np.all([mask for _, mask in rules], axis=0))
                    plain = {key for key, item in found.items() if item.chunks is None
                             and item.dtype == "<f4" and item.id.get_offset() is not None}
                    stored = {key: item.id.get_offset() if key in plain else ENCODED
                              for key, item in found.items()}
                    chunks = found["ppg"].chunks or (1,)
                yield Encounter(patient, name, (i, j), passed.astype(np.int32), stored,
                                chunks[0]), rules
    if empty:
        raise DataError(f"{path}: expected /<patient>/<encounter>/<field>, found no encounter")


def narrow(values):
    """As float32, as numbers are used; what is too large becomes infinite, and is refused."""
    with np.errstate(over="ignore", invalid="ignore"):
        return values.astype(np.float32, copy=False)


def scan_encounter(found, where, gate):
    """The `gate_rules` of {field: h5py dataset}."""
    @lru_cache(maxsize=None)
    def values(key):
        if key in found:
            return narrow(found[key][:])
        parts = [narrow(found[part][:]) for part in DIFFERENCES.get(key, ()) if part in found]
        return parts[0] - parts[1] if len(parts) == 2 else None

    finite = np.ones(len(found["ppg"]), bool)
    if "reason" not in found:               # ours were checked when they were written
        for a in range(0, len(finite), 256):
            block = narrow(found["ppg"][a:a + 256]).reshape(-1, SEGMENT_SAMPLES)
            finite[a:a + 256] = np.isfinite(block).all(1)
    try:
        return list(gate_rules(gate, values, finite))
    except DataError as error:
        raise DataError(f"{where}: {error}") from None


# ------------------------------------------------------------------------------------ who is meant

def hash_patients(patients, salt) -> List[str]:
    """Patients' names as salted hashes, which may leave the hospital."""
    return [hashlib.sha256(f"{salt}/{patient}".encode()).hexdigest()[:16] for patient in patients]


def look_up() -> int:
    """`python datasets.py FILE --who …`: prints names; returns the exit code."""
    parser = argparse.ArgumentParser(
        allow_abbrev=False, description="Names of the patients and encounters that messages give "
        "by number or by hash. Private: for those who may see the data.")
    parser.add_argument("file", help="an HDF5 file of the layout")
    parser.add_argument("--who", nargs="+", required=True, metavar="WHO", help="17 (patient), 17/2 "
                        "(patient/encounter) or 3f2a… (a patient's hash, by the file's salt)")
    options = parser.parse_args()
    salt_path = os.path.join(os.path.dirname(options.file), "tpp_ppg.salt")
    try:
        with open_file(options.file) as file, reading(options.file):
            names = list(file)
            for who in options.who:
                if re.fullmatch(r"\d{1,7}(/\d{1,7})?", who):
                    patient, *encounter = map(int, who.split("/"))
                    found = names[patient:patient + 1]
                    for n in encounter:
                        found = [f"{one}/{name}" for one in found
                                 for name in list(file[one])[n:n + 1]]
                elif os.path.isfile(salt_path):
                    with open(salt_path, encoding="ascii", errors="replace") as saved:
                        hashes = hash_patients(names, saved.read().strip())
                    found = [name for name, one in zip(names, hashes) if one.startswith(who)]
                else:
                    raise DataError(f"{salt_path}: no such file; it is needed to look up a hash")
                print(f"{who}: {', '.join(map(printable, found)) or 'not in this file'}")
    except (DataError, OSError) as problem:
        print(f"error: {problem}", file=sys.stderr)
        return 2
    return 0
