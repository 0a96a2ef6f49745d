"""Damaged files, cut or with flipped bits, give a result or a message of one line.

Patients are called MRN000…, encounters CSN0000…: messages must not contain these letters.
"""
import re
import shutil

import h5py
import numpy as np
import pytest
import torch
from conftest import KEYS, fork, make_file, run
from test_prepare import light, pulse, write_csv

import checkpoint
import datasets
import models
import training_header
from loaders import make_loader


def outcome(work, folder, *expected):
    """Run `work` in a fork (a library may crash on damaged bytes): 'fine', 'refused', or what went
    wrong."""
    def work_and_tell():
        try:
            work()
            print("\nfine")
        except expected as error:
            assert "MRN" not in str(error) and "\n" not in str(error), error
            print("\nrefused")
    process = fork(work_and_tell, folder)
    process.join()
    text = (folder / ".printed").read_text()
    return f"exit code {process.exitcode}: {text}" if process.exitcode else text.splitlines()[-1]


def damage(path, rng, where=None):
    """Cut the file, or flip a bit in some bytes, at positions `where` (default: anywhere)."""
    data = bytearray(path.read_bytes())
    at = rng.choice(len(data) if where is None else where, int(rng.choice([1, 5, 50])))
    if rng.random() < 0.3:
        data = data[:at[0]]
    else:
        for i in at:
            data[i] ^= 1 << int(rng.integers(8))
    path.write_bytes(data)


def check_damaged(work, whole, expected, where=None):
    """`work` on each of 30 damaged copies of a file gives a result or an error of one line."""
    path = whole.with_name(f"copy{whole.suffix}")
    for seed in range(30):
        shutil.copy(whole, path)
        damage(path, np.random.default_rng(seed), where)
        found = outcome(lambda: work(path), path.parent, expected)
        assert found in ("fine", "refused"), (seed, found)


def read_all(path):
    index = datasets.create_dataset_index(path=str(path))
    list(make_loader(datasets.TPP_PPG_dataset(index, "segment", KEYS), 8))


def test_a_damaged_data_file_gives_a_result_or_one_line(tmp_path):
    whole = tmp_path / "whole.h5"
    make_file(whole, 4, 1, 4)
    data = np.frombuffer(whole.read_bytes(), "u1")
    # near zeros: metadata, not the waveforms, which are most of the file
    names = np.flatnonzero(np.lib.stride_tricks.sliding_window_view(data == 0, 64).any(1))
    check_damaged(read_all, whole, datasets.DataError, names)


def test_a_damaged_checkpoint_gives_one_line(tmp_path):
    torch.manual_seed(0)
    model = training_header.NormalisedModel(
        models.get_model_v3(num_discrete=3, widths=(4, 4, 4)), KEYS,
        {key: {"mean": 70.0, "sd": 10.0, "unit": ""} for key in KEYS[1:]})
    checkpoint.save_checkpoint(tmp_path / "whole.pth", model)
    check_damaged(training_header.load_model, tmp_path / "whole.pth", checkpoint.CheckpointError)


def write_wfdb(folder, name):
    t = np.arange(70 * 125) / 125
    np.stack([100 * pulse(t), 100 * light(t)], 1).astype("<i2").tofile(folder / f"{name}.dat")
    (folder / f"{name}.hea").write_text(
        f"{name} 2 125 {t.size}\n{name}.dat 16 100/mmHg 16 0 0 0 0 ABP\n"
        f"{name}.dat 16 100/NU 16 0 0 0 0 PLETH\n")


def prepare_quietly(folder):
    done = run("prepare.py", folder / "in", "--out", folder / "o.h5")
    assert done.returncode in (0, 1, 2), done.stderr
    assert not re.search("Traceback|a bug|MRN", done.stderr), done.stderr
    assert (folder / "o.h5").exists() == (done.returncode < 2)


@pytest.mark.parametrize("ending", [".hea", ".dat", ".csv", ".h5"])
def test_a_damaged_recording_gives_a_result_or_one_line(tmp_path, ending):
    pytest.importorskip("wfdb")
    for seed in range(4):
        folder = tmp_path / str(seed)
        (folder / "in").mkdir(parents=True)
        write_wfdb(folder / "in", "MRN001")
        if ending == ".csv":
            write_csv(folder / "in" / "MRN001.csv", 70, fs=50)
        elif ending == ".h5":
            with h5py.File(folder / "in" / "MRN001.h5", "w") as file:
                t = np.arange(70 * 50) / 50
                file["ABP"], file["PLETH"], file.attrs["fs"] = pulse(t), light(t), 50.0
        damage(folder / "in" / f"MRN001{ending}", np.random.default_rng(seed))
        found = outcome(lambda folder=folder: prepare_quietly(folder), folder)
        assert found == "fine", (seed, found)
