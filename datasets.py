"""The data: index, patient split, `TPP_PPG_dataset` and its loaders, on files of `layout`.

    from datasets import create_dataset_index, split_index, TPP_PPG_dataset, make_loader
    index = create_dataset_index(path="data/icu.h5")            # the default quality gate
    parts = split_index(index, split_seed=0)                    # train, tune, test by patient
    train = TPP_PPG_dataset(parts["train"], "segment", ["ppg", "map", "dbp", "hr", "tpp"])
    for ppg, map_, dbp, hr, tpp in make_loader(train, 256, shuffle=True): ...

    python datasets.py FILE --who 17/2 3f2a…    # look up the patient behind a message (private)

To copy it out, take layout.py along; both need only NumPy, h5py and PyTorch. Where PPG rows lie in
a file as plain float32, a batch is one gather from a memory map; all else is read by h5py.
"""
import difflib
import glob
import hashlib
import os
import signal
import sys
import zipfile
import zlib
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Dict, List

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from layout import (  # noqa: F401 - all of the layout is part of this module's interface
    ABSENT,
    DEFAULT_CONDITION,
    DIFFERENCES,
    ENCODED,
    FIELDS,
    FS,
    LABELS,
    PUBLISHED_CONDITION,
    SEGMENT_SAMPLES,
    SEGMENT_SECONDS,
    VITALS,
    WAVEFORMS,
    WINDOW,
    DataError,
    Gate,
    LayoutWriter,
    as_paths,
    as_text,
    attribute,
    find_files,
    gate_report,
    gate_rules,
    get_gate,
    hash_patients,
    look_up,
    narrow,
    open_file,
    origin_of,
    passes_gate,
    place,
    reading,
    scan,
    vitals_of,
)

ROW_BYTES = 4 * SEGMENT_SAMPLES
INDEX_MARK = "tpp_ppg_index_3"      # first array of a saved index; the number is its version
LARGE_BYTES = 10 ** 9               # the index of data above this size is kept next to them
MAX_OPEN = 200                      # files open at once in a process, as maps and by h5py each
BLOCK_ROWS = 8192                   # compressed rows decoded and shuffled at a time: 118 MB


# -------------------------------------------------------------------------------------------- index

@dataclass
class DatasetIndex:
    """The segments that passed the gate, as flat arrays: P patients, E encounters, S segments.

    Encounter e holds the segments starts[e]:starts[e+1]; segment s is row rows[s] of it. Row r of
    its PPG begins at byte stored[ppg, e] + ROW_BYTES * r. 64 million segments take 256 MB.
    """
    paths: list
    sizes: np.ndarray               # [files] bytes; when these or the times change, we are stale
    mtimes: np.ndarray              # [files] ns
    condition: str                  # the gate's canonical text
    patients: np.ndarray            # [P] str (MRNs)
    encounters: np.ndarray          # [E] str (CSNs)
    places: np.ndarray              # [E, 2] int32: `Encounter.place`
    encounter_patient: np.ndarray   # [E] int32, ascending
    encounter_file: np.ndarray      # [E] int32
    fields: list                    # [K] names
    stored: np.ndarray              # [K, E] int64: byte offset of row 0, ENCODED or ABSENT
    chunk_rows: np.ndarray          # [E] int32: rows of PPG that are decoded together
    starts: np.ndarray              # [E + 1] int64
    rows: np.ndarray                # [S] int32

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
        counts = np.add.reduceat(keep, self.starts[:-1], dtype=np.int64)
        some = counts > 0
        patients, numbers = np.unique(self.encounter_patient[some], return_inverse=True)
        return replace(
            self, patients=self.patients[patients], encounters=self.encounters[some],
            places=self.places[some], encounter_patient=numbers.astype(np.int32),
            encounter_file=self.encounter_file[some], stored=self.stored[:, some],
            chunk_rows=self.chunk_rows[some], rows=self.rows[keep],
            starts=np.append(0, np.cumsum(counts[some])))

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

    def place(self, encounter):
        """For messages: where in its file encounter e is, without names."""
        return place(self.paths[self.encounter_file[encounter]], *self.places[encounter])

    def check_file(self, number):
        """Raises DataError if a file is gone, or its size or time is not what it was."""
        try:
            stat = os.stat(self.paths[number])
            same = (stat.st_size, stat.st_mtime_ns) == (self.sizes[number], self.mtimes[number])
        except OSError:
            same = False
        if not same:
            raise DataError(f"{self.paths[number]}: gone or changed since the index was made; make "
                            "the index again")

    def save(self, savename):
        """Writes the index as one `.npz` of plain arrays, atomically and readable by its owner
        alone, as it holds names. Raises DataError where a file of another kind is in its place."""
        savename = os.fspath(savename)
        if os.path.lexists(savename):
            with reading(savename), open(savename, "rb") as file:
                if INDEX_MARK[:-1].encode() not in file.read(64):
                    raise DataError(f"{savename}: not a saved index; not overwritten")
        for leftover in glob.glob(glob.escape(savename) + ".*.partial"):    # of killed processes
            os.remove(leftover)
        temporary = f"{savename}.{os.getpid()}.partial"
        arrays = dict(vars(self), paths=[os.path.abspath(path) for path in self.paths])
        try:
            with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as out:
                np.savez(out, **{INDEX_MARK: repr(FIELDS), **arrays})
                out.flush()
                os.fsync(out.fileno())
            os.replace(temporary, savename)
        finally:
            with suppress(FileNotFoundError):
                os.remove(temporary)


def create_dataset_index(mrn_to_csns=None, condition=DEFAULT_CONDITION, savename=None,
                         path=None) -> DatasetIndex:
    """Indexes the segments of one or several HDF5 files (`path`) that pass a quality gate.

    mrn_to_csns: {MRN: [CSN, …]} to take only these. condition: see `get_gate`. savename: also write
    the index to this `.npz`. Without both, the index of data above 1 GB is kept next to the first
    file (`<file>.index.npz`, if that can be written) until the files or the condition change.
    """
    if path is None:
        raise DataError("create_dataset_index needs path=, one HDF5 file or several")
    gate, paths = get_gate(condition), as_paths(path)
    plain = mrn_to_csns is None and savename is None
    if plain and sum(os.path.getsize(one) for one in paths if os.path.isfile(one)) > LARGE_BYTES:
        savename = paths[0] + ".index.npz"
        with suppress(DataError):       # none yet, or stale: it is made again
            index = load_dataset_index(savename)
            if index.condition == str(gate) and index.paths == list(map(os.path.abspath, paths)):
                return replace(index, paths=paths)
    index = scan_files(paths, gate, mrn_to_csns)
    if savename is not None:
        with suppress(*(DataError, OSError) * plain):
            index.save(savename)
    return index


def scan_files(paths, gate, mrn_to_csns=None):
    """The `DatasetIndex` of files."""
    wanted = None if mrn_to_csns is None else {
        as_text(patient): set(map(as_text, csns)) for patient, csns in mrn_to_csns.items()}
    stats, found = [], []
    for number, one in enumerate(paths):
        open_file(one).close()
        stats.append(os.stat(one))          # before the scan: a change during it shows as well
        found += [(number, encounter) for encounter, _ in scan(one, gate, wanted)]
    found.sort(key=lambda item: item[1].patient)    # stable: files and encounters keep their order
    where = paths[0] + (f" and {len(paths) - 1} more" if len(paths) > 1 else "")
    if len({(e.patient, e.name) for _, e in found}) < len(found):
        raise DataError(f"{where}: the same patient and encounter are in two of the files")
    asked = len(found) if wanted is None else sum(map(len, wanted.values()))
    if len(found) < asked:
        raise DataError(f"{where}: {len(found)} of the {asked} encounters asked for are there")
    found = [(number, e) for number, e in found if len(e.passed)]
    if not found:
        raise DataError(f"{where}: no segment passes the quality gate {str(gate)!r}")
    files, encounters = zip(*found)
    patients, patient_numbers = np.unique([e.patient for e in encounters], return_inverse=True)
    fields = sorted({key for e in encounters for key in e.stored})
    return DatasetIndex(
        paths=paths, sizes=np.array([s.st_size for s in stats]),
        mtimes=np.array([s.st_mtime_ns for s in stats]), condition=str(gate), patients=patients,
        encounters=np.array([e.name for e in encounters]),
        places=np.array([e.place for e in encounters], np.int32),
        encounter_patient=patient_numbers.astype(np.int32),
        encounter_file=np.array(files, np.int32), fields=fields,
        stored=np.array([[e.stored.get(key, ABSENT) for e in encounters] for key in fields]),
        chunk_rows=np.array([e.chunk_rows for e in encounters], np.int32),
        starts=np.cumsum([0] + [len(e.passed) for e in encounters], dtype=np.int64),
        rows=np.concatenate([e.passed for e in encounters]))


def load_dataset_index(savename) -> DatasetIndex:
    """Reads a saved index. Raises DataError if it is none, or its files are gone or changed."""
    try:
        with np.load(savename, allow_pickle=False) as saved:
            values = {key: saved[key] for key in saved.files}
        if str(values.pop(INDEX_MARK)) != repr(FIELDS):     # names and limits decide what passes
            raise ValueError("of another version")
        values.update(paths=values["paths"].tolist(), fields=values["fields"].tolist(),
                      condition=str(values["condition"]))
        index = DatasetIndex(**values)
    except (OSError, ValueError, LookupError, TypeError, AttributeError, EOFError, zlib.error,
            zipfile.BadZipFile) as error:               # of foreign and of damaged files
        raise DataError(
            f"{savename}: not a saved index of this version ({type(error).__name__})") from None
    check_unchanged(index)
    return index


def check_unchanged(index: DatasetIndex) -> None:
    """Raises DataError if a file is gone, or its size or time is not what it was when indexed."""
    for number in range(len(index.paths)):
        index.check_file(number)


def fingerprint(index: DatasetIndex, keys: List[str]) -> str:
    """A checksum of what a run reads, also of copies of the files: their sizes, the index, every
    column among the keys, and 4,096 rows (59 MB) of each waveform, spread over the data."""
    found = hashlib.sha256(repr((index.sizes.tolist(), list(keys))).encode())
    for name in ("patients", "encounters", "encounter_patient", "encounter_file", "starts", "rows"):
        found.update(np.ascontiguousarray(getattr(index, name)))
    dataset = TPP_PPG_dataset(index, "segment", keys)
    sample = np.unique(np.linspace(0, len(index) - 1, 4096).astype(np.int64))
    for key in keys:
        found.update(dataset.waveform(key, sample) if key in WAVEFORMS else
                     dataset.column(key).numpy())
    return found.hexdigest()


# -------------------------------------------------------------------------------------------- split

PARTS = ("train", "tune", "test")


def split_hash(patients, split_seed):
    """[P] in [0, 1): each patient's place in a random order, a function of it and the seed."""
    digests = [hashlib.blake2b(f"{split_seed}/{patient}".encode(), digest_size=8).digest()
               for patient in patients]
    return np.array([int.from_bytes(digest, "big") / 2.0 ** 64 for digest in digests])


def split_patients(patients, split_seed=0):
    """The part (0 train, 1 tune, 2 test) of each patient, [P] int8.

    From 100 patients on by threshold of a hash, 80/10/10 in expectation, so that a patient's part
    never changes when the file grows. Below, by the hash's rank, so that no part is empty.
    """
    if len(patients) < len(PARTS):
        raise DataError(f"{len(patients)} patients with usable segments: expected at least "
                        f"{len(PARTS)}, one for each of train, tune and test")
    position, tune, test = split_hash(patients, split_seed), 0.8, 0.9
    if len(patients) < 100:
        tenth = max(1, round(len(patients) / 10))
        position = np.argsort(np.argsort(position))
        tune, test = len(patients) - 2 * tenth, len(patients) - tenth
    return (position >= tune).astype(np.int8) + (position >= test)


def fold_patients(index, split_seed, folds):
    """The fold, 0 to folds - 1, in which each patient of an index is tested, [P].

    The patients of each source (the file of a patient's first encounter by name) are dealt out in
    the order of `split_hash`, continuing where the source before ended, so that folds differ by one
    patient at most, also within a source, whatever the order of files and rows.
    """
    by_name = np.lexsort((index.encounters, index.encounter_patient))
    first = by_name[np.searchsorted(index.encounter_patient, np.arange(index.n_patients))]
    source, position = index.encounter_file[first], split_hash(index.patients, split_seed)
    begin = np.ones(len(index.paths))
    np.minimum.at(begin, source, position)
    tested = np.empty(index.n_patients, np.int64)
    tested[np.lexsort((position, begin[source]))] = np.arange(index.n_patients) % folds
    return tested


def split_index(index, split_seed=0, fold=None, folds=None) -> Dict[str, DatasetIndex]:
    """{'train': index, 'tune': index, 'test': index}, no patient in two of them.

    By `split_patients`; or number `fold` (from 0 on) of `folds` splits by `fold_patients`, in which
    each patient is tested once: the tune part is the next fold's test part. Raises DataError where
    there are too few patients, and for a fold that does not exist.
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
    if not all(map(len, parts.values())):
        raise DataError(f"a part of {index.n_patients} patients is empty; use another split seed")
    names = np.concatenate([other.patients for other in parts.values()]).tolist()
    assert len(set(names)) == len(names), "a patient in two parts"
    return parts


# ------------------------------------------------------------------------------------------ dataset

class TPP_PPG_dataset(Dataset):
    """Segments (or one random segment of each patient) as tuples of float32 tensors.

    level: 'segment', or 'patient' for one random segment of each patient, drawn anew each epoch as
    a function of (seed, epoch, patient). keys_to_load: fields in the order of the tuple, the label
    last. percentage: a random share of the segments or patients. csns_to_skip: encounters to leave
    out. path: where the files are now, if they were moved.

    `dataset[i]` is one item: ppg [1, 3600] and scalars; `dataset[array]` is a batch in one read.
    Raises DataError for a missing field and when a file has changed since it was indexed.
    """

    def __init__(self, dataset_index, level, keys_to_load=None, percentage=100, csns_to_skip=None,
                 *, path=None, seed=0):
        index, self.level, self.seed = dataset_index, level, seed
        self.keys_to_load = list(keys_to_load or ["ppg", "p_crit"])
        if level not in ("segment", "patient") or not 0 < percentage <= 100:
            raise DataError(f"level {level!r}, percentage {percentage}: expected 'segment' or "
                            "'patient', and a percentage above 0 and up to 100")
        if path is not None:
            paths = find_files(as_paths(path))
            if len(paths) != len(index.paths):
                raise DataError(f"{len(paths)} files for an index of {len(index.paths)}")
            times = np.array([os.stat(one).st_mtime_ns for one in paths])
            index = replace(index, paths=paths, mtimes=times)
        if csns_to_skip:
            index = index.select(~np.isin(index.encounters, list(map(as_text, csns_to_skip))))
            if not len(index):
                raise DataError("csns_to_skip leaves no segment")
        for key in self.keys_to_load:
            index.sources(key)
        self.count = len(index) if level == "segment" else index.n_patients
        if percentage < 100:
            chosen = np.zeros(self.count, bool)
            self.count = max(1, round(percentage / 100 * self.count))
            chosen[np.random.default_rng(seed).choice(len(chosen), self.count, replace=False,
                                                      shuffle=False)] = True
            index = index.select_segments(chosen if level == "segment" else
                                          chosen[index.segment_patients()])
        self.index, self._columns, self._process = index, {}, None
        self.epoch = torch.full((1,), -1, dtype=torch.int64)    # `make_loader` shares it

    def __len__(self):
        return self.count

    def set_epoch(self, epoch):     # never called, level 'patient' draws anew at each read
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
        return f"{self.index.place(encounter)}, row {self.index.rows[segment]}"

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
        n_rows = (index.rows[index.starts[1:] - 1] + 1).tolist()        # up to the last one used
        for number in np.unique(index.encounter_file):
            index.check_file(number)
            # Plain reads: a map would read 128 kB around each of these short stretches.
            with reading(f"{index.paths[number]}: field {key!r}"), \
                    open(index.paths[number], "rb", buffering=0) as file:
                for e in np.flatnonzero(index.encounter_file == number).tolist():
                    if offsets[e] == ENCODED:
                        column = self._read_encoded(e, key)
                    else:
                        file.seek(offsets[e])
                        column = np.frombuffer(file.read(4 * n_rows[e]), "<f4")
                    mine = slice(starts[e], starts[e + 1])
                    values[mine] = column[index.rows[mine]]
        return torch.from_numpy(values)

    def waveform(self, key, segments):
        """[B, 3600] float32 of segments [B]."""
        self._open()
        index = self.index
        encounters = np.searchsorted(index.starts, segments, "right") - 1
        rows, files = index.rows[segments], index.encounter_file[encounters]
        offsets = index.stored[index.fields.index(key), encounters]
        mapped, used = offsets != ENCODED, np.unique(files)
        offsets += ROW_BYTES * rows.astype(np.int64)
        for number in used:         # reading a file cut short under its map would kill the process
            index.check_file(number)
        if len(used) == 1 and mapped.all():
            return self._gather(used[0], offsets)       # the fast path: no copy after the gather
        out = np.empty((len(segments), SEGMENT_SAMPLES), np.float32)
        for number in used:
            mine = np.flatnonzero((files == number) & mapped)
            out[mine] = self._gather(number, offsets[mine])
        for i in np.flatnonzero(~mapped):       # the chunk is decoded, or was for a row before it
            chunk, row = divmod(int(rows[i]), int(index.chunk_rows[encounters[i]]))
            out[i] = self._chunk(int(encounters[i]), key, chunk)[row].ravel()
        return out

    def chunk_numbers(self):
        """[S] the number of the chunk that is decoded for each item's PPG, or None without any."""
        index = self.index
        if self.level == "patient" or index.chunk_rows.max() == 1:
            return None
        encounter = index.per_segment(np.arange(len(index.encounters)))
        chunk = index.rows // index.per_segment(index.chunk_rows)
        return np.cumsum((np.diff(encounter, prepend=0) != 0) | (np.diff(chunk, prepend=0) != 0))

    # Below, state of one process: files and maps are opened lazily and never cross a fork.

    def _open(self):
        if self._process != os.getpid():
            paths, most = self.index.paths, BLOCK_ROWS // int(self.index.chunk_rows.max())
            self._map = lru_cache(MAX_OPEN)(lambda number: np.memmap(paths[number], np.uint8, "r"))
            self._file = lru_cache(MAX_OPEN)(lambda number: open_file(paths[number]))
            self._chunk = lru_cache(max(2, most))(self._read_encoded)
            self._process = os.getpid()

    def _gather(self, number, offsets):
        """[B, 3600] float32: the rows that begin at these bytes of a file."""
        with reading(self.index.paths[number]):
            data = self._map(number)
            # Item i of this view is the row that begins at byte i, aligned or not; without a copy.
            rows = np.ndarray(max(0, len(data) - ROW_BYTES + 1), f"V{ROW_BYTES}", data, strides=1)
            return rows[offsets].view("<f4").reshape(-1, SEGMENT_SAMPLES)

    def _read_encoded(self, encounter, key, chunk=None):
        """A field of an encounter, or a chunk of it, through h5py."""
        index, size = self.index, int(self.index.chunk_rows[encounter])
        rows = slice(None) if chunk is None else slice(chunk * size, (chunk + 1) * size)
        patient = index.patients[index.encounter_patient[encounter]]
        with reading(f"{index.place(encounter)}, field {key!r}"):
            file = self._file(index.encounter_file[encounter])
            return narrow(file[patient][index.encounters[encounter]][key][rows])

    def __getstate__(self):
        """For spawned workers: without handles."""
        return dict(self.__dict__, _process=None, _map=None, _file=None, _chunk=None)


# ------------------------------------------------------------------------------------------ loaders

class BatchOrder(Sampler):
    """The order of an epoch as batches of item numbers: a function of (seed, epoch), whatever the
    number of workers.

    shuffle: a full permutation; of compressed data, chunks in random order, and the rows of blocks
    of them shuffled, so that each is decoded once an epoch. drop_last drops an incomplete batch
    only after a full one. With several processes (rank of world) each takes its slice of every
    batch: a step sees what one process would. Without `set_epoch`, each pass is the next epoch.
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
        if not self.shuffle:
            return np.arange(count, dtype=kind)
        chunks = self.dataset.chunk_numbers()
        if chunks is None:                      # in half of NumPy's time
            source = torch.Generator().manual_seed(int(rng.integers(2 ** 62)))
            return torch.randperm(count, dtype=getattr(torch, kind), generator=source).numpy()
        place = rng.permutation(chunks[-1] + 1)[chunks]
        items = np.argsort(place, kind="stable").astype(kind)           # chunk by chunk
        per_block = max(1, BLOCK_ROWS // self.dataset.index.chunk_rows.max())
        ends = np.searchsorted(place[items], np.arange(per_block, chunks[-1] + 1, per_block))
        for block in np.split(items, ends):
            rng.shuffle(block)
        return items

    def slices(self):
        """Yields this rank's slice of `order()` for each batch that is left of the epoch; then
        turns to the next epoch."""
        for batch in range(self.first_batch, len(self)):
            start = batch * self.batch_size
            share, rest = divmod(min(self.batch_size, len(self.dataset) - start), self.world)
            start += self.rank * share + min(self.rank, rest)
            yield slice(start, start + share + (self.rank < rest))
        self.epoch, self.first_batch = self.epoch + 1, 0

    def __iter__(self):
        order = self.order()
        for batch in self.slices():
            yield order[batch]


class WorkerLoader(DataLoader):
    """A DataLoader that raises errors of its workers as a DataError of one line."""
    device = None

    def __iter__(self):
        try:
            batches = super().__iter__()
            if self.num_workers:
                with suppress(ValueError, AttributeError):          # in a thread; on Windows
                    signal.signal(signal.SIGCHLD, signal.SIG_DFL)   # PyTorch's raises anywhere
            yield from batches
        except DataError as error:          # a worker's carries its traceback
            raise DataError(str(error).strip().splitlines()[-1].split("DataError: ")[-1]) from None
        except (RuntimeError, OSError) as error:
            if not self.num_workers:
                raise
            raise worker_error(error) from None


class DeviceLoader:
    """The batches of a WorkerLoader, gathered from a dataset that is all in a device's memory."""

    def __init__(self, sampler, device):
        self.sampler, self.dataset, self.device = sampler, sampler.dataset, device
        count = len(self.dataset.index)
        self.held = [torch.empty((count, *one.shape[1:]), device=device)
                     for one in self.dataset.read(np.arange(1))]
        for a in range(0, count, 1024):
            batch = self.dataset.read(np.arange(a, min(a + 1024, count)))
            for values, part in zip(self.held, batch):
                values[a:a + 1024] = part

    def __len__(self):
        return len(self.sampler)

    def __iter__(self):
        segments = torch.from_numpy(self.dataset.segments(self.sampler.order())).to(self.device)
        for batch in self.sampler.slices():
            yield tuple(values.index_select(0, segments[batch]) for values in self.held)


def worker_error(error):
    reason = (str(error).splitlines() or [type(error).__name__])[0][:150]
    return DataError(f"a loader worker failed ({reason}); often memory or /dev/shm is full: use "
                     "fewer --workers (0 needs no shared memory), or enlarge /dev/shm")


def fits_on(device, dataset):
    """Whether a dataset takes at most half of a device's free memory."""
    size, free = sum(one.numel() * 4 for one in dataset.read(np.arange(1))), 0
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
    elif device.type == "cpu" and "SC_AVPHYS_PAGES" in getattr(os, "sysconf_names", {}):
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return 2 * size * len(dataset.index) <= free


def make_loader(dataset, batch_size, shuffle=False, seed=0, workers=0, drop_last=None,
                pin_memory=False, rank=0, world=1, device_cache=None):
    """A loader whose batches are tuples of tensors, each read from the file in one go.

    drop_last: default as shuffle. device_cache: a device; if the data fit in half of its free
    memory, they are kept and batches made there (`loader.device` is then the device, else None).
    `loader.sampler.set_epoch(epoch, first_batch)` chooses the epoch and resumes within it.
    """
    order = BatchOrder(dataset, batch_size, shuffle, seed,
                       shuffle if drop_last is None else drop_last, rank, world)
    if device_cache is not None:
        device = torch.device(device_cache)
        if fits_on(device, dataset):
            return DeviceLoader(order, device)
        pin_memory = pin_memory or device.type == "cuda"
    if workers:
        for key in dataset.keys_to_load:
            if key not in WAVEFORMS:
                dataset.column(key)         # before the workers start: they share it with us
        try:
            dataset.epoch.share_memory_()   # so that workers see `set_epoch`
        except (RuntimeError, OSError) as error:
            raise worker_error(error) from None
    own = torch.Generator().manual_seed(seed)       # else dropout would depend on the workers
    return WorkerLoader(dataset, batch_size=None, sampler=order, num_workers=workers, generator=own,
                        collate_fn=tuple, pin_memory=pin_memory, persistent_workers=workers > 0,
                        worker_init_fn=quiet_worker if workers else None)


def quiet_worker(_):
    """In a worker: the parent acts on Ctrl-C and says why it ends; the worker adds no traceback."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    sys.excepthook = lambda kind, *error: (issubclass(kind, (ConnectionError, EOFError))
                                           or sys.__excepthook__(kind, *error))


def fit_normaliser(dataset, keys) -> Dict[str, dict]:
    """{key: {'mean', 'sd', 'unit'}} over the (train) segments. Raises DataError for a constant."""
    normaliser = {}
    for key in keys:
        values = dataset.column(key).numpy()
        wrong = (~np.isfinite(values)).sum()
        if wrong or values.min() == values.max():
            what = f"is not finite in {wrong} of" if wrong else f"has one value, {values[0]:g}, in"
            raise DataError(f"field {key!r} {what} {len(values)} train segments")
        mean = float(values.mean(dtype=np.float64))
        blocks = (values[a:a + 2 ** 20].astype(np.float64) for a in range(0, len(values), 2 ** 20))
        variance = sum(float(((block - mean) ** 2).sum()) for block in blocks) / len(values)
        normaliser[key] = {"mean": mean, "sd": variance ** 0.5, "unit": FIELDS[key].unit}
    return normaliser


if __name__ == "__main__":
    sys.exit(look_up())
