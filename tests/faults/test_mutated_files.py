"""Broken and hostile files through the command line: a normal result, or one line and exit code 2.

The full numbers: `python tests/faults/commands.py hdf5 1000`, `checkpoint 150`, `wfdb 150`.
"""
import io
import os
import pickle
import shutil
import struct
import subprocess
import sys
import zipfile

import h5py
import numpy as np
import pytest
import torch
from commands import TRIALS, Commands
from conftest import ROOT, make_file
from mutations import KEYS, SMALL, Payload, checkpoint_base, hdf5_mutant, hostile_pickle

from training_header import CheckpointError, load_checkpoint, load_model


@pytest.fixture(scope="module")
def commands():
    pytest.importorskip("wfdb", reason="wfdb is not installed (requirements-extra.txt)")
    with Commands() as server:
        yield server


@pytest.mark.parametrize("kind, numbers", [
    ("hdf5", range(1, 13)), ("checkpoint", range(15)), ("wfdb", range(20))])
def test_each_mutant_ends_in_a_result_or_in_one_line(commands, tmp_path, kind, numbers):
    for number in numbers:
        folder = tmp_path / "one"
        folder.mkdir()
        what, done, found = TRIALS[kind](commands, number, str(folder))
        assert found in ("normal", "refused"), f"{kind} {number} ({what}): {found}\n{done['err']}"
        shutil.rmtree(folder)


def test_the_verdict_knows_what_is_wrong():
    """The judge of the tests above, on what it must not let pass."""
    from commands import judge, verdict
    fine = {"code": 0, "out": "", "err": "", "seconds": 1, "megabytes": 90}
    refused = dict(fine, code=2, err="error: m.h5: no\n")
    assert (verdict(fine), verdict(refused)) == ("normal", "refused")
    for changes in ({"code": -11}, {"code": 1}, {"code": 2}, {"megabytes": 2000},
                    {"err": "Traceback (most recent call last):\n"}, {"out": "MRN001"},
                    {"out": "\x1b[2J"}, {"err": "x.py:7: RuntimeWarning: overflow\n"}):
        assert verdict(dict(fine, **changes)) not in ("normal", "refused"), changes
    assert verdict(dict(refused, err=refused["err"] * 2)) not in ("normal", "refused")
    assert judge(refused, {"runs/x.pth"}, {"runs/x.pth"}) not in ("normal", "refused")
    assert judge(fine, set(), {"m.json"}) not in ("normal", "refused")


def test_a_fresh_interpreter_does_the_same(run, tmp_path):
    hdf5_mutant(1011, str(tmp_path / "m.h5"))       # a field in a chunk of 134 MB
    (tmp_path / "m.pth").write_bytes(b"PK\x05\x06")
    done = run("evaluate.py", "m.pth", "--data", "m.h5", cwd=tmp_path, check=2)
    assert done.stderr.count("error: ") == 1 and "m.pth: not a checkpoint" in done.stderr


# ------------------------------------------------------------------------------- hostile HDF5 files

def absurd(group):
    for key, shape in (("ppg", (2 ** 40, 3600)), ("map", (2 ** 40,))):
        del group[key]
        group.create_dataset(key, shape, "f4", chunks=(64,) + shape[1:], compression="gzip")


def never_written(group):
    del group["map"]
    group.create_dataset("map", (8,), "f4")


def half_written(group):
    del group["map"]
    group.create_dataset("map", (8,), "f4", chunks=(4,), compression="gzip")[:4] = 80


def wide_chunk(group):
    del group["map"]
    group.create_dataset("map", (8,), "f4", chunks=(2 ** 28,), maxshape=(None,),
                         compression="gzip").id.write_direct_chunk((0,), b"x")


def same_ppg(group):
    group.file["MRN9/CSN9"] = group


def virtual(group):
    layout = h5py.VirtualLayout((8,), "f4")
    layout[...] = h5py.VirtualSource(".", "/MRN001/CSN0011/map", (8,))
    del group["map"]
    group.create_virtual_dataset("map", layout)


def soft_link(group):
    del group["map"]
    group["map"] = h5py.SoftLink("/MRN001/CSN0011/map")


def long_name(group):
    group.file.move("MRN002", "x" * 60000)


def no_numbers(dtype):
    def change(group):
        del group["map"]
        group.create_dataset("map", (8,), dtype)
    return change


@pytest.mark.parametrize("change, message", [
    (absurd, "1099511627776 rows, but this file holds fewer"),
    (never_written, "'map': 8 rows, but this file holds fewer"),
    (half_written, "'map': 8 rows, but this file holds fewer"),
    (wide_chunk, "'map': 8 rows, but this file holds fewer"),
    (same_ppg, "its PPG is that of patient 1, encounter 0"),
    (virtual, "'map': expected plain numbers stored in this file"),
    (soft_link, "no field 'map'"), (long_name, "names of patients and encounters of 1 to 255"),
    *[(no_numbers(dtype), "'map': expected plain numbers stored in this file")
      for dtype in (h5py.string_dtype(), h5py.ref_dtype, h5py.vlen_dtype("f4"), "c8", "S4", "g",
                    h5py.enum_dtype({"a": 0}), np.dtype([("a", "f4")]))]])
def test_what_could_mislead_or_swallow_memory_is_refused_by_name(tmp_path, change, message):
    from datasets import DataError, create_dataset_index
    path = make_file(tmp_path / "f.h5", 3)
    with h5py.File(path, "r+") as file:
        change(file["MRN001/CSN0010"])
    with pytest.raises(DataError, match=message) as error:
        create_dataset_index(path=path)
    assert "MRN" not in str(error.value) and "\n" not in str(error.value)


# ------------------------------------------------------------------------------ hostile checkpoints

def rebuilt(path, change):
    """Writes a whole checkpoint again, each entry as `change(name, content)` gives it."""
    checkpoint_base(path)
    with zipfile.ZipFile(path) as source:
        entries = [(one.filename, source.read(one)) for one in source.infolist()]
    with zipfile.ZipFile(path, "w") as target:
        for name, content in entries:
            target.writestr(name, *change(name, content))


def in_place_of(ending, new, *how):
    return lambda name, old: (new, *how) if name.endswith(ending) else (old,)


@pytest.mark.parametrize("change, message", [
    (in_place_of("data.pkl", pickle.dumps(Payload())), "asks for (posix|nt).mkdir"),
    *[(lambda name, old, p=p: (hostile_pickle(old, p) if name.endswith("data.pkl") else old,),
       "not a checkpoint|asks for") for p in (b"cos\nsystem\n0", b"cbuiltins\neval\n0",
                                              b"ctorch.hub\nload\n0")],
    (in_place_of("data/0", bytes(2 ** 27), zipfile.ZIP_DEFLATED), "entries are not those"),
    (in_place_of("data/0", bytes(4)), "a storage of 4 bytes, expected 20 numbers"),
    (in_place_of("data/0", bytes(2 ** 20)), "a storage of 1048576 bytes")])
def test_a_payload_does_not_run_and_sizes_are_those_declared(tmp_path, monkeypatch, change,
                                                             message):
    monkeypatch.chdir(tmp_path)
    rebuilt("m.pth", change)
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint("m.pth")
    assert os.listdir(tmp_path) == ["m.pth"]


def test_a_weight_that_rotted_on_the_disk_is_noticed(tmp_path):
    """PyTorch's reader does not look at the check sums."""
    checkpoint_base(tmp_path / "m.pth")
    data = bytearray((tmp_path / "m.pth").read_bytes())
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        entry = next(one for one in archive.infolist() if one.filename.endswith("data/7"))
    name_bytes, extra_bytes = struct.unpack_from("<HH", data, entry.header_offset + 26)
    data[entry.header_offset + 30 + name_bytes + extra_bytes] ^= 64
    (tmp_path / "m.pth").write_bytes(data)
    torch.load(tmp_path / "m.pth", weights_only=True)
    with pytest.raises(CheckpointError, match="m.pth: .*a check sum is wrong"):
        load_checkpoint(tmp_path / "m.pth")


def spoil(saved, how):
    weights, settings = saved["model"], saved["model_args"]
    name = "layers.0.conv.weight"
    if how == "nan":
        weights[name][0, 0, 0] = float("nan")
    elif how == "wide view":
        weights[name] = torch.zeros(1).expand(10 ** 6, 10 ** 6)
    elif how == "double":
        weights[name] = weights[name].double()
    elif how == "settings for terabytes":
        settings["widths"] = [10 ** 5] * 50
    elif how == "too long strides":
        settings["strides"] = [64, 64]
    elif how == "sd 0":
        saved["normaliser"]["map"]["sd"] = 0.0
    elif how == "mean nan":
        saved["normaliser"]["map"]["mean"] = float("nan")
    elif how == "no mean":
        del saved["normaliser"]["tpp"]["mean"]
    elif how == "keys":
        saved["keys"][1] = "abp\x1b[2J"
    elif how == "text":
        saved["provenance"]["origin"] = "simulated\x1b[2J"
    elif how == "itself":
        saved["config"]["config"] = saved["config"]
    elif how == "split":
        saved["split"]["train"] = 7
    elif how == "condition":
        saved["config"]["condition"] = None


@pytest.mark.parametrize("how, message", [
    ("nan", "'layers.0.conv.weight': expected finite float32"), ("wide view", "larger than"),
    ("double", "expected finite float32"), ("settings for terabytes", "do not fit"),
    ("too long strides", "needs 4097 samples"),
    ("sd 0", "normaliser of map: mean 70.0, sd 0.0"), ("mean nan", "normaliser of map"),
    ("no mean", "not a checkpoint of this project .*mean"), ("keys", "control characters"),
    ("text", "control characters"), ("itself", "too deep or too many"),
    ("split", "not a checkpoint of this project"), ("condition", "no condition")])
def test_weights_and_settings_that_cannot_be_are_refused_by_name(tmp_path, how, message):
    saved = checkpoint_base(tmp_path / "m.pth")
    assert load_model(tmp_path / "m.pth").keys == KEYS and saved["model_args"] == SMALL
    spoil(saved, how)
    torch.save(saved, tmp_path / "m.pth")
    with pytest.raises(CheckpointError, match=f"m.pth: .*{message}") as error:
        load_model(tmp_path / "m.pth")
    assert "\x1b" not in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("version, lines", [("2.5.1+cu121", 1), ("2.6.0", 0), ("2.13.0+cpu", 0)])
def test_an_old_pytorch_is_named_with_its_hole(tmp_path, monkeypatch, capsys, version, lines):
    checkpoint_base(tmp_path / "m.pth")
    monkeypatch.setattr(torch, "__version__", version)
    load_checkpoint(tmp_path / "m.pth")
    told = capsys.readouterr().err.splitlines()
    assert len(told) == lines and all("CVE-2025-32434" in line for line in told)


# ------------------------------------------------------------------------------------- kept indexes

def test_a_forged_or_damaged_index_is_made_again_and_never_believed(tmp_path):
    from datasets import DataError, create_dataset_index, kept_dataset_index, load_dataset_index
    path = make_file(tmp_path / "f.h5", 3)
    made = create_dataset_index(path=path, savename=path + ".index.npz")
    with np.load(path + ".index.npz") as saved:
        arrays = dict(saved)
    for changes in ({"rows": arrays["rows"].astype("f4")}, {"rows": arrays["rows"][:-1]},
                    {"rows": -arrays["rows"]}, {"starts": arrays["starts"][::-1]},
                    {"encounter_file": arrays["encounter_file"] + 1},
                    {"encounter_patient": arrays["encounter_patient"] * 2},
                    {"stored": arrays["stored"][:1]}, {"stored": arrays["stored"] * 0 - 9},
                    {"chunk_rows": arrays["chunk_rows"] * 0}, {"patients": np.array([b"x"] * 3)},
                    {"fields": np.array(["ppg", "../x"])}, {"more": np.zeros(3)},
                    {"rows": np.array([object()] * 48)}):
        np.savez(path + ".index.npz", **dict(arrays, **changes))
        with pytest.raises(DataError, match="not a saved index"):
            load_dataset_index(path + ".index.npz")
        assert np.array_equal(kept_dataset_index(path=path).rows, made.rows)
    np.savez_compressed(path + ".index.npz", **arrays)
    with pytest.raises(DataError, match="larger than the file"):
        load_dataset_index(path + ".index.npz")


def test_an_offset_beyond_the_file_is_an_error_not_a_crash(tmp_path):
    from datasets import DataError, TPP_PPG_dataset, create_dataset_index
    index = create_dataset_index(path=make_file(tmp_path / "f.h5", 3))
    index.stored += 10 ** 9
    for keys in (["ppg"], ["map"]):
        with pytest.raises(DataError, match="f.h5"):
            TPP_PPG_dataset(index, "segment", keys)[0]


def test_deep_inside_a_file_whom_a_message_means_can_be_looked_up(tmp_path, monkeypatch):
    """The number in the message, the name from the command in it."""
    from datasets import DataError, create_dataset_index, hash_patients
    monkeypatch.chdir(tmp_path)
    with h5py.File(make_file("f.h5", 3), "r+") as file:
        del file["MRN001/CSN0011/map"]
    with pytest.raises(DataError) as error:
        create_dataset_index(path="f.h5")
    command = str(error.value).split("(names: ")[1].split(")")[0].split()
    assert command == ["python", "datasets.py", "f.h5", "--who", "1/1"]
    (tmp_path / "tpp_ppg.salt").write_text("5" * 32)
    hashed = hash_patients(["MRN002"], "5" * 32)[0]
    more = ["2", hashed, "7/0", "1/9"]
    done = subprocess.run([sys.executable, os.path.join(ROOT, "datasets.py"), *command[2:], *more],
                          cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.splitlines() == [
        "1/1: MRN001/CSN0011", "2: MRN002", f"{hashed}: MRN002", "7/0: not in this file",
        "1/9: not in this file"]
