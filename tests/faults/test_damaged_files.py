"""Damaged files: cut, with flipped bytes, of another shape. Each gives a result or one line.

Patients are called MRN000…, encounters CSN0000…: messages must not contain these letters.
"""
import contextlib
import io
import os
import shutil
import zipfile

import h5py
import numpy as np
import pytest
import torch
from conftest import make_file

import checkpoint
import datasets
import models
import prepare
import tk_utils
import training_header
from loaders import make_loader
from recordings import RecordingError

KEYS = ["ppg", "map", "dbp", "hr", "tpp"]


def outcome(work, *expected):
    """What `work` did, in a fork (a library may crash on damaged bytes): 'fine', 'refused' or what
    is wrong."""
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                work()
            text = "fine"
        except expected as error:
            text = "refused" if "MRN" not in str(error) and "\n" not in str(error) else str(error)
        except BaseException as error:  # noqa: BLE001 - what the test looks for
            text = repr(error)
        os.write(writing, text.encode()[:4000])
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        text = pipe.read().decode()
    _, status = os.waitpid(child, 0)
    return text or f"ended with status {status}"


def damage(path, rng, where=None):
    """Cuts the file, or changes some bytes, at positions `where` (default: anywhere)."""
    with open(path, "rb") as file:
        data = bytearray(file.read())
    at = rng.choice(len(data) if where is None else where, int(rng.choice([1, 5, 50])))
    if rng.random() < 0.3:
        data = data[:at[0]]
    else:
        for one in at:
            data[one] ^= 1 << int(rng.integers(8))
    with open(path, "wb") as file:
        file.write(data)


# --------------------------------------------------------------------------------------------- HDF5

def read_all(path):
    index = datasets.create_dataset_index(path=str(path))
    dataset = datasets.TPP_PPG_dataset(index, "segment", KEYS)
    for batch in make_loader(dataset, 8):
        assert len(batch) == 5


def test_a_damaged_data_file_gives_a_result_or_one_line(tmp_path):
    make_file(tmp_path / "whole.h5", 4, 1, 4)
    with open(tmp_path / "whole.h5", "rb") as file:
        data = np.frombuffer(file.read(), "u1")
    # bytes of metadata: far from the waveforms, which are most of the file
    names = np.flatnonzero(np.lib.stride_tricks.sliding_window_view(data == 0, 64).any(1))
    for seed in range(30):
        shutil.copy(tmp_path / "whole.h5", tmp_path / "f.h5")
        damage(tmp_path / "f.h5", np.random.default_rng(seed), names)
        found = outcome(lambda: read_all(tmp_path / "f.h5"), datasets.DataError)
        assert found in ("fine", "refused"), (seed, found)


def spoil_hdf5(group, how):
    if how == "no ppg":
        del group["ppg"]
    elif how == "a text":
        del group["map"]
        group["map"] = np.array([b"MRN"] * 8)
    elif how == "fewer rows":
        values = group["map"][:5]
        del group["map"]
        group["map"] = values
    elif how == "another length":
        del group["ppg"]
        group["ppg"] = np.zeros((8, 3000), "f4")
    elif how == "rows never written":
        del group["map"]
        group.create_dataset("map", (8,), "f4")
    elif how == "a link out of the file":
        del group["map"]
        group["map"] = h5py.ExternalLink("other.h5", "/map")


@pytest.mark.parametrize("how", ["no ppg", "a text", "fewer rows", "another length",
                                 "rows never written", "a link out of the file"])
def test_a_field_that_does_not_fit_is_refused_by_position(tmp_path, how):
    path = make_file(tmp_path / "f.h5", 3)
    with h5py.File(path, "r+") as file:
        spoil_hdf5(file["MRN001/CSN0010"], how)
    with pytest.raises(datasets.DataError, match="patient 1, encounter 0|no field|map") as error:
        read_all(path)
    assert "MRN" not in str(error.value) and "\n" not in str(error.value)


# -------------------------------------------------------------------------------------- checkpoints

def write_checkpoint(path):
    torch.manual_seed(0)
    normaliser = {key: {"mean": 70.0, "sd": 10.0, "unit": ""} for key in KEYS[1:]}
    network = models.get_model_v3(num_discrete=3, widths=(4, 4, 4))
    checkpoint.save_checkpoint(path, training_header.NormalisedModel(network, KEYS, normaliser))
    return path


def test_a_damaged_checkpoint_gives_one_line(tmp_path):
    write_checkpoint(tmp_path / "whole.pth")
    for seed in range(30):
        shutil.copy(tmp_path / "whole.pth", tmp_path / "m.pth")
        damage(tmp_path / "m.pth", np.random.default_rng(seed))
        found = outcome(lambda: training_header.load_model(tmp_path / "m.pth"),
                        checkpoint.CheckpointError)
        assert found in ("fine", "refused"), (seed, found)


def test_a_weight_that_rotted_on_the_disk_is_noticed(tmp_path):
    """PyTorch's reader does not look at the check sums."""
    path = write_checkpoint(tmp_path / "m.pth")
    data = bytearray(path.read_bytes())
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        entry = next(one for one in archive.infolist() if one.filename.endswith("data/7"))
    names = int.from_bytes(data[entry.header_offset + 26:entry.header_offset + 28], "little")
    extra = int.from_bytes(data[entry.header_offset + 28:entry.header_offset + 30], "little")
    data[entry.header_offset + 30 + names + extra] ^= 64
    path.write_bytes(data)
    torch.load(path, weights_only=True)
    with pytest.raises(checkpoint.CheckpointError, match="m.pth"):
        checkpoint.load_checkpoint(path)


def spoil_checkpoint(saved, how):
    if how == "weights":
        saved["model"]["layers.0.conv.weight"][0, 0, 0] = float("nan")
    elif how == "normaliser of map":
        saved["normaliser"]["map"]["sd"] = 0.0
    elif how == "not a checkpoint":
        del saved["normaliser"]
    elif how == "do not fit":
        saved["model_args"]["widths"] = [4, 4, 8]
    elif how == "keys":
        saved["keys"] = ["ppg", "map", "tpp", "hr"]


@pytest.mark.parametrize("how", ["weights", "normaliser of map", "not a checkpoint", "do not fit",
                                 "keys"])
def test_parts_that_cannot_be_are_refused_by_name(tmp_path, how):
    path = write_checkpoint(tmp_path / "m.pth")
    saved = checkpoint.load_tensors(path)
    spoil_checkpoint(saved, how)
    checkpoint.save_tensors(path, saved)
    with pytest.raises(checkpoint.CheckpointError, match=how) as error:
        training_header.load_model(path)
    assert "\n" not in str(error.value)


# --------------------------------------------------------------------------------------- recordings

def write_wfdb(folder, name, fs=125, seconds=70):
    t = np.arange(seconds * fs) / fs
    wave = np.sin(2 * np.pi * 1.2 * t) + 0.4 * np.sin(4 * np.pi * 1.2 * t - 0.8)
    wave *= 1 + 0.2 * np.sin(2 * np.pi * 0.03 * t)
    both = np.stack([8000 + 2500 * wave, 500 * np.roll(wave, fs // 5)], 1)
    both.astype("<i2").tofile(folder / f"{name}.dat")
    (folder / f"{name}.hea").write_text(
        f"{name} 2 {fs} {t.size}\n{name}.dat 16 100/mmHg 16 0 0 0 0 ABP\n"
        f"{name}.dat 16 100/NU 16 0 0 0 0 PLETH\n")


def prepare_quietly(folder):
    err = io.StringIO()
    with contextlib.redirect_stderr(err):
        code = tk_utils.run_script(lambda: prepare.main(
            [str(folder / "in"), "--out", str(folder / "o.h5")]), datasets.DataError,
            RecordingError)
    text = err.getvalue()
    assert code in (0, 1, 2) and "Traceback" not in text and "a bug" not in text, text
    assert "MRN" not in text, text
    assert (folder / "o.h5").exists() == (code < 2)


@pytest.mark.parametrize("ending", [".hea", ".dat", ".csv", ".h5"])
def test_a_damaged_recording_costs_itself_alone(tmp_path, ending):
    pytest.importorskip("wfdb")
    for seed in range(12):
        folder = tmp_path / str(seed)
        (folder / "in").mkdir(parents=True)
        write_wfdb(folder / "in", "MRN001")
        if ending == ".csv":
            t = np.arange(70 * 50) / 50
            np.savetxt(folder / "in" / "MRN001.csv", np.stack([t, 80 + t % 1, t % 1], 1), "%.3f",
                       ",", header="time_s,ABP,PLETH", comments="")
        elif ending == ".h5":
            with h5py.File(folder / "in" / "MRN001.h5", "w") as file:
                for name in ("ABP", "PLETH"):
                    file[name] = np.arange(70 * 50) % 50.0
                    file[name].attrs["fs"] = 50.0
        damage(folder / "in" / f"MRN001{ending}", np.random.default_rng(seed))
        found = outcome(lambda folder=folder: prepare_quietly(folder))
        assert found == "fine", (seed, found)
