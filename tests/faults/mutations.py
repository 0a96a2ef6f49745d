"""Broken and hostile files, each a function of its number: HDF5, checkpoints, WFDB records.

    hdf5_mutant(number, path), checkpoint_mutant(number, path), wfdb_mutant(number, folder)

Each writes one file (or record) and returns what was done to it. Patients and encounters have the
names of `make_file` in conftest.py (MRN…, CSN…), so that a leaked name is found by its letters.
"""
import functools
import io
import os
import pickle
import struct
import tempfile
import zipfile
import zlib

import h5py
import numpy as np
import torch
from conftest import make_file

from datasets import LayoutWriter
from models import get_model_v3
from training_header import NormalisedModel, save_checkpoint

PATIENTS, ROWS = 12, 4
FLOATS = (np.nan, np.inf, -np.inf, 0.0, -1.0, 1e30, 1e300, 3.4e38, 5e-324)
SIZES = (0, 1, -1, 2 ** 31 - 1, 2 ** 31, 2 ** 32, 2 ** 40, 2 ** 62, 10 ** 12, 10 ** 30)
EVIL_TEXTS = ("", ".", "..", "../../etc/passwd", "/etc/passwd", "a/b", "a\nb", "\x1b[2J\x1b[31m",
              "\u202eabc", "x" * 300, "x" * 60000, "nan", "%s%n", "\udcff", "C:\\x")


# ---------------------------------------------------------------------------------------- any bytes

def spoil_bytes(data, rng, where=None):
    """Truncated, flipped, overwritten, shifted or lengthened bytes, at positions of `where`."""
    data = bytearray(data)
    where = np.arange(len(data)) if where is None else where
    how = rng.choice(["cut", "flip", "flip", "set", "set", "block", "insert", "delete", "append"])
    at = int(rng.choice(where))
    if how == "cut":
        return bytes(data[:int(rng.integers(len(data)))]), how
    if how == "insert":
        data[at:at] = rng.bytes(int(rng.integers(1, 64)))
    elif how == "delete":
        del data[at:at + int(rng.integers(1, 64))]
    elif how == "append":
        data += rng.bytes(int(rng.integers(1, 4096)))
    elif how == "block":
        length = int(rng.choice([4, 8, 64, 512, 4096]))
        fill = rng.choice(["zeros", "ones", "noise"])
        block = {"zeros": bytes(length), "ones": b"\xff" * length, "noise": rng.bytes(length)}[fill]
        data[at:at + length] = block[:len(data) - at]
    else:
        for at in rng.choice(where, int(rng.choice([1, 1, 2, 5, 20]))):
            data[at] = (data[at] ^ 1 << int(rng.integers(8)) if how == "flip"
                        else int(rng.choice([0, 1, 127, 128, 255])))
    return bytes(data), how


# --------------------------------------------------------------------------------------------- HDF5

@functools.lru_cache(None)
def h5_base(kind, rank):
    """(bytes, those of metadata) of a whole file in one of the storages: published style, ours, or
    the newest HDF5 format."""
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "f.h5")
        write_base(path, kind, rank)
        with open(path, "rb") as file:
            return file.read(), metadata_of(path)


def write_base(path, kind, rank):
    layout = kind if kind in ("rows", "lzf", "gzip") else "contiguous"
    make_file(path, PATIENTS, 1, ROWS, layout=layout, ppg_rank=rank)
    if kind in ("latest", "ours"):
        os.replace(path, f"{path}.plain")
        with h5py.File(f"{path}.plain", "r") as source:
            if kind == "latest":
                with h5py.File(path, "w", libver="latest") as target:
                    for patient in source:
                        source.copy(patient, target)
            else:
                with LayoutWriter(path, "recordings", "published", "foot", ("a", "b")) as out:
                    for patient, encounters in source.items():
                        for name, group in encounters.items():
                            fields = {key: item[:].reshape(ROWS, -1).squeeze()
                                      for key, item in group.items()}
                            out.write(patient, name, dict(fields, reason=np.zeros(ROWS, "u4")))
        os.remove(f"{path}.plain")


def metadata_of(path):
    """The bytes of an HDF5 file that are not the samples of a waveform."""
    mask = np.ones(os.path.getsize(path), bool)

    def leave_out(_, item):
        if isinstance(item, h5py.Dataset) and item.shape[-1] == 3600:
            if item.chunks is None:
                spans = [(item.id.get_offset(), item.id.get_storage_size())]
            else:
                chunks = map(item.id.get_chunk_info, range(item.id.get_num_chunks()))
                spans = [(chunk.byte_offset, chunk.size) for chunk in chunks]
            for start, size in spans:
                mask[start + 8:start + size - 8] = False

    with h5py.File(path, "r") as file:
        file.visititems(leave_out)
    return np.flatnonzero(mask)


def replaced(group, key, **how):
    if key in group:
        del group[key]
    return group.create_dataset(key, **how)


def mistype(group, key, rng):
    shape = group[key].shape if key in group else (ROWS,)
    kinds = ["S5", h5py.string_dtype(), h5py.ref_dtype, h5py.regionref_dtype, "c8", "V7", "?",
             np.dtype([("a", "f4"), ("b", "i4")]), h5py.vlen_dtype("f4"), np.dtype(("f4", (3,))),
             h5py.enum_dtype({"a": 0, "b": 1}), "longdouble", ">f4", "f8", "f2", "i1", "u8", "i8",
             "opaque", "bitfield", "odd float", "named"]
    kind = kinds[rng.integers(len(kinds))]
    if kind in ("opaque", "bitfield", "odd float"):
        made = {"opaque": lambda: h5py.h5t.create(h5py.h5t.OPAQUE, 9),
                "bitfield": h5py.h5t.STD_B32LE.copy, "odd float": h5py.h5t.IEEE_F32LE.copy}[kind]()
        if kind == "odd float":
            made.set_ebias(200)
        if key in group:
            del group[key]
        h5py.h5d.create(group.id, key.encode(), made, h5py.h5s.create_simple(shape))
    elif kind == "named":
        replaced(group, key, shape=shape, dtype="f4")
        del group[key]
        group[key] = np.dtype("f4")
    else:
        data = replaced(group, key, shape=shape, dtype=kind)
        if np.dtype(kind).kind in "fiu" and isinstance(kind, str):
            data[...] = rng.integers(0, 100, shape)
    return f"{key} is {kind}"


def reshape(group, key, rng):
    wave = key in ("ppg", "abp")
    n = int(rng.choice([0, 1, ROWS - 1, ROWS + 1, 100]))
    shapes = [(), (n,), (n, 3600), (n, 1, 3600), (n, 3599), (3600, n), (n, 2, 3600), (n, 1), (1, n),
              (n, 3600, 1), (1,) * 32, (0,), (n, 0)]
    shape = shapes[rng.integers(len(shapes))]
    if rng.random() < 0.1:
        replaced(group, key, data=h5py.Empty("f4"))
        return f"{key} is empty"
    replaced(group, key, data=np.ones(shape, "f4"))
    return f"{'wave' if wave else 'vital'} {key} has shape {shape}"


def absurd(group, key, rng):
    """More rows than the file has bytes."""
    rows = int(rng.choice([2 ** 20, 2 ** 31, 2 ** 32 + 1, 2 ** 40, 2 ** 48]))
    options = [{"chunks": 1}, {"chunks": 4096}, {"chunks": 64, "compression": "gzip"},
               {"chunks": 64, "compression": "lzf", "fletcher32": True},
               {"chunks": 64, "fillvalue": 3}]
    how = options[rng.integers(len(options))]
    keys = list(group) if rng.random() < 0.6 else [key]
    for one in keys:
        wave = one in ("ppg", "abp")
        chunk = (min(how["chunks"], 64), 3600) if wave else (how["chunks"],)
        data = replaced(group, one, shape=(rows, 3600) if wave else (rows,), dtype="f4",
                        **dict(how, chunks=chunk))
        if rng.random() < 0.5:
            data[:1] = 1
    return f"{len(keys)} fields of {rows} rows"


def bomb(group, key, rng):
    """A chunk that decodes to far more than is stored."""
    length = int(rng.choice([2 ** 22, 2 ** 25, 2 ** 26 + 1, 2 ** 28]))
    wave = key in ("ppg", "abp")
    shape, chunk = ((ROWS, 3600), (length // 3600, 3600)) if wave else ((ROWS,), (length,))
    if key in group:
        del group[key]
    data = group.create_dataset(key, shape, "f4", chunks=chunk, compression="gzip",
                                maxshape=(None,) + shape[1:])
    packer, packed = zlib.compressobj(1), []
    for _ in range(0, 4 * length, 2 ** 24):
        packed.append(packer.compress(bytes(2 ** 24)))
    packed.append(packer.flush())
    data.id.write_direct_chunk((0,) * len(shape), b"".join(packed))
    return f"{key} in a chunk of {4 * length} bytes"


def link(file, group, key, rng, folder):
    patient = group.name.split("/")[1]
    how = int(rng.integers(16))
    if how == 0:
        file[f"{patient}/loop"] = file[patient]
    elif how == 1:
        file["loop"] = file["/"]
    elif how == 2:
        group["loop"] = file["/"]
    elif how == 3:
        file["MRN900"] = h5py.SoftLink("/" + patient)
    elif how == 4:
        file["MRN900"] = h5py.SoftLink("/MRN900")
    elif how == 5:
        file[f"{patient}/CSN9"] = h5py.SoftLink("/nowhere")
    elif how == 6:
        file["MRN900"] = file[patient]
    elif how == 7:
        file[f"{patient}/CSN9"] = group
    elif how in (8, 9, 10):
        name = {8: "/etc/passwd", 9: os.path.basename(file.filename), 10: "other.h5"}[how]
        del group[key]
        group[key] = h5py.ExternalLink(name, f"/{patient}/{key}")
    elif how == 11:
        file["MRN900"] = h5py.ExternalLink(os.path.basename(file.filename), "/")
    elif how == 12:
        shape, dtype = (group[key].shape, group[key].dtype) if key in group else ((ROWS,), "f4")
        if key in group:
            del group[key]
        size = int(np.prod(shape)) * dtype.itemsize
        group.create_dataset(key, shape, dtype, external=[("/etc/passwd", 0, size)])
    elif how == 13:
        shape = group[key].shape
        layout = h5py.VirtualLayout(shape, "f4")
        layout[...] = h5py.VirtualSource(str(rng.choice(["/etc/passwd", "."])), "x", shape)
        del group[key]
        group.create_virtual_dataset(key, layout, fillvalue=1)
    elif how == 14:
        del group[key]
        group[key] = h5py.SoftLink(f"{group.name}/{key}")
    else:
        other = "sbp" if key != "sbp" else "dbp"
        del group[key]
        group[key] = group[other]
    return f"link {how} at {key}"


def attribute(file, rng):
    name = str(rng.choice(["fs", "segment_seconds", "origin", "reasons", "layout_version",
                           "label_method", "beats"]))
    text = EVIL_TEXTS[rng.integers(len(EVIL_TEXTS))].encode(errors="surrogateescape")
    values = [np.float32(rng.choice(FLOATS)), np.arange(5), np.zeros((0,)), b"sixty", 125, -1,
              np.bytes_(text[:5000] or b"x"), h5py.Empty("f4"), file.ref, True, 60.0, np.int8(60),
              np.array([60.0]), 60 + 0j, np.array(["a", "b"], dtype=h5py.string_dtype())]
    value = values[rng.integers(len(values))]
    file.attrs[name] = value
    return f"attribute {name} is {type(value).__name__}"


def h5_structure(path, rng):
    with h5py.File(path, "r+") as file:
        groups = [group for patient in file.values() for group in patient.values()]
        group = groups[rng.integers(len(groups))]
        key = str(rng.choice(list(group)))
        if rng.random() < 0.4:
            key = str(rng.choice(["ppg", "map", "tpp", "p_crit", "r2"]))
        chosen = groups if rng.random() < 0.3 else [group]
        how = rng.choice(["missing", "type", "type", "type", "shape", "shape", "floats", "floats",
                          "empty", "kind", "links", "links", "absurd", "bomb", "attribute",
                          "attribute", "names", "many", "extra", "reason", "damaged chunk"])
        if how == "missing":
            for one in chosen:
                del one[key]
        elif how == "type":
            state = rng.bit_generator.state
            for one in chosen:
                rng.bit_generator.state = state
                what = mistype(one, key, rng)
            return f"type: {what}"
        elif how == "shape":
            return f"shape: {reshape(group, key, rng)}"
        elif how == "floats":
            value = float(rng.choice(FLOATS))
            for one in chosen:
                data = one[key][:].astype("f8")
                data[rng.random(data.shape) < rng.choice([1e-3, 0.2, 1.0])] = value
                kind = "f8" if rng.random() < 0.5 else "f4"
                with np.errstate(over="ignore"):
                    replaced(one, key, data=data.astype(kind))
            return f"floats: {key} holds {value} in {len(chosen)}"
        elif how == "empty":
            what = rng.integers(4)
            if what == 0:
                file.create_group("MRN900")
            elif what == 1:
                group.clear()
            elif what == 2:
                file.clear()
            else:
                file.create_group("MRN900/CSN9000")
        elif how == "kind":
            what = rng.integers(4)
            if what == 0:
                file["MRN900"] = np.ones(3)
            elif what == 1:
                file["MRN900/CSN9"] = np.ones(3)
            elif what == 2:
                file["MRN900"] = np.dtype("f4")
            else:
                del group[key]
                group.create_group(key)
        elif how == "links":
            return link(file, group, key, rng, os.path.dirname(path))
        elif how == "absurd":
            return absurd(group, key, rng)
        elif how == "bomb":
            return bomb(group, key, rng)
        elif how == "attribute":
            return attribute(file, rng)
        elif how == "names":
            text = EVIL_TEXTS[rng.integers(3, len(EVIL_TEXTS))].replace("/", "_")
            text = text.encode(errors="surrogateescape")
            if rng.random() < 0.5:
                file.move(group.parent.name, b"/" + text)
            else:
                group.parent.move(group.name.split("/")[2], text)
        elif how == "many":
            for i in range(3000):
                file.create_group(f"MRN9{i:05d}")
        elif how == "extra":
            group["notes"] = "MRN4711"
            file[f"{group.parent.name}/MRNnotes"] = "CSN4711"
        elif how == "reason":
            bits = rng.integers(0, 2 ** 32, ROWS, dtype="u4")
            replaced(group, "reason", data=bits.astype(str(rng.choice(["u4", "f4", "i8", "u1"]))))
        else:
            data = replaced(group, "ppg", data=np.ones((ROWS, 3600), "f4"), chunks=(2, 3600),
                            compression="gzip", fletcher32=True)
            info = data.id.get_chunk_info(0)
            data.id.write_direct_chunk((0, 0), rng.bytes(info.size))
        return f"{how} {key if how == 'missing' else ''}"


def hdf5_mutant(number, path):
    rng = np.random.default_rng([5, number])
    kind = str(rng.choice(["contiguous", "rows", "lzf", "gzip", "latest", "ours", "ours"]))
    data, metadata = h5_base(kind, int(rng.choice([2, 3])))
    what = ""
    if number % 2 == 0:
        data, what = spoil_bytes(data, rng, metadata if rng.random() < 0.85 else None)
    with open(path, "wb") as file:
        file.write(data)
    return f"{kind}: " + (f"bytes {what}" if what else h5_structure(path, rng))


# --------------------------------------------------------------------------------------- checkpoint

KEYS = ["ppg", "map", "dbp", "hr", "tpp"]
SMALL = {"num_discrete": 3, "widths": [4, 4, 8], "kernel_sizes": 5}


class Payload:
    """Unpickled, it makes a folder: the sign that code in a checkpoint ran."""
    def __reduce__(self):
        return os.mkdir, ("PAYLOAD-RAN",)


def checkpoint_base(path):
    """A whole checkpoint of a small network; returns its dictionary."""
    torch.manual_seed(0)
    normaliser = {key: {"mean": 70.0, "sd": 9.0, "unit": "mmHg"} for key in KEYS[1:]}
    save_checkpoint(path, NormalisedModel(get_model_v3(**SMALL), KEYS, normaliser), SMALL,
                    {"condition": "default"},
                    {part: ["0" * 16] for part in ("train", "tune", "test")},
                    {"origin": "recordings", "salt": "0" * 16}, {"tpp": {"rmse": 5.0}})
    return torch.load(path, weights_only=True)


def spoil_settings(saved, rng):
    """Something else in the place of one value, at any depth, or one more or fewer of them."""
    values = [None, True, -1, 0, 1, 3.5, 10 ** 9, 10 ** 30, float("nan"), float("inf"), "", "x",
              "\x1b[2J", "a\nb", b"bytes", [], {}, [1, 2], ["ppg"], {"a": 1}, ("ppg", "tpp"),
              torch.zeros(3), torch.zeros(()), 2 ** 70, 1 + 2j, [[]] * 3, "map", "tpp", [64] * 500,
              {1: 2}, float("-inf"), 1e300, -0.5, torch.float32, "../../x"]
    value = values[rng.integers(len(values))]
    place, path = saved, []
    while True:
        keys = list(place) if isinstance(place, dict) else list(range(len(place)))
        key = keys[rng.integers(len(keys))]
        path.append(str(key))
        inside = place[key]
        if isinstance(inside, (dict, list)) and inside and rng.random() < 0.75:
            place = inside
            continue
        how = rng.integers(4)
        if how == 0:
            del place[key]
        elif how == 1 and isinstance(place, dict):
            place["another"] = value
        elif how == 1:
            place.append(value)
        else:
            place[key] = value
        return f"{'/'.join(path)} {('gone', 'and another', 'is', 'is')[how]} {value!r:.30}"


def spoil_weights(saved, rng):
    weights = saved["model"]
    name = list(weights)[rng.integers(len(weights))]
    tensor = weights[name]
    how = rng.integers(10)
    if how == 0:
        weights[name] = tensor.double() if rng.random() < 0.5 else tensor.half()
    elif how == 1:
        tensor.view(-1)[int(rng.integers(tensor.numel()))] = float(rng.choice(FLOATS[:3]))
    elif how == 2:
        weights[name] = torch.zeros(1).expand(tensor.shape)
    elif how == 3:
        weights[name] = torch.zeros(1).expand(tuple(n * 10 ** 6 for n in tensor.shape))
    elif how == 4:
        weights[name] = tensor.reshape(-1)
    elif how == 5:
        weights[name] = tensor.to_sparse()
    elif how == 6:
        weights[name] = torch.quantize_per_tensor(tensor, 0.1, 0, torch.qint8)
    elif how == 7:
        saved["model_args"]["widths"] = [10 ** 5] * 50
    elif how == 8:
        weights[name] = torch.full_like(tensor, 1e30)
    else:
        saved["model"] = {key.replace("layers", "layer"): w for key, w in weights.items()}
    return f"weights {how} of {name}"


def rewrite_zip(data, rng):
    """The same entries in another zip: compressed, doubled, with other sizes, names or contents."""
    how = int(rng.integers(12))
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as source, zipfile.ZipFile(out, "w") as target:
        names = source.namelist()
        chosen = names[rng.integers(len(names))]
        for name in names:
            content = source.read(name)
            if how == 0:
                target.writestr(name, content, zipfile.ZIP_DEFLATED)
            elif how == 1 and name == chosen:
                continue
            elif how == 2 and name.endswith("data/0"):
                target.writestr(name, bytes(2 ** 28), zipfile.ZIP_DEFLATED)
            elif how == 3 and name.endswith("data/0"):
                target.writestr(name, content[:4])
            elif how == 4 and name.endswith("data.pkl"):
                target.writestr(name, spoil_bytes(content, rng)[0])
            elif how == 5 and name.endswith("data.pkl"):
                target.writestr(name, pickle.dumps(Payload(), int(rng.integers(5))))
            elif how == 6 and name.endswith("data.pkl"):
                target.writestr(name, hostile_pickle(content, OPCODES[rng.integers(12)]))
            elif how == 7 and name.endswith("data.pkl"):
                target.writestr(name, content)
                target.writestr("other/data.pkl", pickle.dumps(Payload()))
            elif how == 8 and name == chosen:
                target.writestr("../" + name, content)
            elif how == 9 and name == chosen:
                target.writestr(name, spoil_bytes(content, rng)[0])
            else:
                target.writestr(name, content)
    data = bytearray(out.getvalue())
    if how in (10, 11):                     # sizes in the central directory
        at = data.find(b"PK\x01\x02")
        for _ in range(int(rng.integers(len(names)))):
            at = data.find(b"PK\x01\x02", at + 4)
        field = at + (20 if how == 10 else 24)
        data[field:field + 4] = struct.pack("<I", int(rng.choice([0, 1, 10 ** 6, 2 ** 32 - 1])))
    return bytes(data), f"zip {how}"


def hostile_pickle(content, opcode):
    """The checkpoint's own pickle behind opcodes that ask for memory, or for code."""
    return content[:2] + opcode + content[2:]


OPCODES = [b"cos\nsystem\nX\x10\x00\x00\x00mkdir PAYLOAD-RAN\x85R0", b"cbuiltins\neval\n0",
           b"N" + b"r" + struct.pack("<I", 2 ** 32 - 16) + b"0", b"(" * 10 ** 6, b"Pabc\n",
           b"\x8e" + struct.pack("<Q", 2 ** 62), b"\x8a\xff" + b"\xff" * 255 + b"0", b"\x82\x01",
           b"]" * 10 ** 5, b"\x8d" + struct.pack("<Q", 2 ** 40), b"ctorch.hub\nload\n0",
           b"ctorch\nload\n0"]


def checkpoint_mutant(number, path):
    rng = np.random.default_rng([6, number])
    saved = checkpoint_base(path)
    how = number % 5
    if how < 2:
        what = (spoil_settings, spoil_weights)[how](saved, rng)
        if how == 0 and rng.random() < 0.1:
            saved["config"]["itself"] = saved["config"]
            what = "holds itself"
        elif how == 0 and rng.random() < 0.1:
            saved["config"]["payload"], what = Payload(), "payload"
        torch.save(saved, path, _use_new_zipfile_serialization=bool(rng.random() < 0.9))
        return what
    with open(path, "rb") as file:
        data = file.read()
    if how == 2:
        data, what = rewrite_zip(data, rng)
    elif how == 3:
        # where the pickle and the list of entries are, not the numbers between
        marks = [i for i in range(len(data)) if data[i:i + 2] == b"PK"]
        where = np.unique(np.concatenate([np.arange(i, min(i + 80, len(data))) for i in marks]
                                         + [np.arange(4000)]))
        data, what = spoil_bytes(data, rng, where)
    else:
        data, what = spoil_bytes(data, rng)
        if rng.random() < 0.1:
            data, what = pickle.dumps(Payload()), "plain pickle"
    with open(path, "wb") as file:
        file.write(data)
    return what


# --------------------------------------------------------------------------------------------- WFDB

def waveforms(seconds=150, fs=125):
    """ABP (mmHg) and PPG [seconds * fs] of 75 beats a minute whose pulse pressure varies."""
    t = np.arange(seconds * fs) / fs
    phase = 1.25 * t % 1
    pulse = np.sin(np.pi * np.clip(phase / 0.4, 0, 1)) ** 2 + 0.3 * np.exp(-3 * phase)
    height = 45 + 12 * np.sin(2 * np.pi * 0.03 * t)
    return 40 + 0.5 * height + height * pulse, 1000 + 300 * pulse


def wfdb_base(folder, rng):
    """A whole record `rec` of format 16 or 212, or of several segments."""
    abp, ppg = waveforms()
    signals = np.stack([np.rint(abp * 100), np.rint(ppg)], 1).astype("<i2")
    lines = [f"{{dat}} {{fmt}} {gain}/{unit} 16 0 0 0 0 {name}"
             for gain, unit, name in ((100, "mmHg", "ABP"), (10, "NU", "PLETH"))]
    kind = str(rng.choice(["16", "16", "212", "segments"]))

    def write(name, samples, fmt="16"):
        if fmt == "212":
            a, b = (samples.astype(int) // 16 & 0xfff).T
            data = np.stack([a & 0xff, a >> 8 | b >> 8 << 4, b & 0xff], 1).astype("u1").tobytes()
        else:
            data = samples.tobytes()
        header = [f"{name} 2 125 {len(samples)}"] + [
            line.format(dat=f"{name}.dat", fmt=fmt) for line in lines] + ["# MRN4711"]
        with open(os.path.join(folder, f"{name}.dat"), "wb") as file:
            file.write(data)
        with open(os.path.join(folder, f"{name}.hea"), "w") as file:
            file.write("\n".join(header) + "\n")

    if kind == "segments":
        half = len(signals) // 2
        write("seg_1", signals[:half])
        write("seg_2", signals[half:])
        with open(os.path.join(folder, "rec.hea"), "w") as file:
            file.write(f"rec/3 2 125 {len(signals) + 1000}\nseg_1 {half}\n~ 1000\n"
                       f"seg_2 {len(signals) - half}\n")
    else:
        write("rec", signals, kind)
    return kind


def spoil_header(text, rng):
    """Another word, line, number or name in a header."""
    lines = text.split("\n")
    at = int(rng.integers(len(lines) - 1))
    words = lines[at].split(" ")
    which = int(rng.integers(len(words)))
    how = rng.choice(["number", "number", "name", "line", "word", "format", "gain", "long"])
    if how == "number":
        numbers = [str(n) for n in SIZES + FLOATS] + ["1e9", "x", "0x10", "1/0"]
        words[which] = str(rng.choice(numbers))
    elif how == "name":
        words[0] = str(rng.choice(["../rec.dat", "/etc/passwd", "rec", "rec.hea", "rec.dat", "~",
                                   "seg_1", ".", "a:b", "\x1b[2J", "\u202e", "-", "x" * 300,
                                   "http://127.0.0.1/x", "rec/3", "seg_1/2", "CSN4711"]))
    elif how == "word":
        words = words[:which] + words[which + 1:] if rng.random() < 0.5 else words + ["7"]
    elif how == "format":
        words = [words[0], str(rng.choice(["0", "8", "24", "32", "61", "80", "160", "212", "310",
                                           "508", "516", "524", "16x4", "16:9", "16+512", "99",
                                           "16x0", "16x1000000", "16+99999999", "16-5"]))]
        words += lines[at].split(" ")[2:]
    elif how == "gain":
        words[2:3] = [str(rng.choice(["0", "nan", "inf", "-100", "1e-320", "1e308", "100(nan)/mmHg",
                                      "100(99999999999)/mmHg", "/", "100/\x1b[2J", "100/MRN4711"]))]
    if how == "line":
        lines[at:at + 1] = [lines[at]] * int(rng.choice([0, 2, 500]))
    elif how == "long":
        lines[at] = ["rec 1000000 125 10", "#" * 10 ** 6, "7 " * 10 ** 5, "",
                     "\x00" * 9][rng.integers(5)]
    else:
        lines[at] = " ".join(words)
    return "\n".join(lines), f"header {how}: {lines[min(at, len(lines) - 1)]!r:.60}"


def wfdb_mutant(number, folder):
    rng = np.random.default_rng([7, number])
    os.makedirs(folder, exist_ok=True)
    kind = wfdb_base(folder, rng)
    headers = sorted(name for name in os.listdir(folder) if name.endswith(".hea"))
    path = os.path.join(folder, headers[rng.integers(len(headers))])
    if number % 4 < 2:
        with open(path, encoding="utf-8") as file:
            text, what = spoil_header(file.read(), rng)
        data = text.encode(errors="replace")
    else:
        if number % 4 == 3 and rng.random() < 0.7:
            path = str(rng.choice([name for name in os.listdir(folder) if name.endswith(".dat")]))
            path = os.path.join(folder, path)
            if rng.random() < 0.1:
                os.remove(path)
                return f"{kind}: data file missing"
        with open(path, "rb") as file:
            data, what = spoil_bytes(file.read(), rng)
    with open(path, "wb") as file:
        file.write(data)
    return f"{kind}: {os.path.basename(path)[-4:]} {what}"
