"""No patient's name, and no path of this machine, in anything that is meant to be shared.

Patients are called MRN000…, encounters and records CSN0000…: a leak is found by these letters.
"""
import os
import platform
import re

import h5py
import numpy as np
import pytest
from commands import Commands, files_below
from conftest import make_file
from mutations import wfdb_base

PRIVATE = re.compile(r".*(\.h5|\.salt|\.index\.npz|_problems\.csv|_run\.json|records/.*|who\.csv)")


@pytest.fixture(scope="module")
def commands():
    pytest.importorskip("wfdb", reason="wfdb is not installed (requirements-extra.txt)")
    with Commands() as server:
        yield server


NAME = re.compile(rb"(MRN|CSN)\d{3}")


def leaks(content, words):
    """The names, and the words, in some bytes, in any encoding that our files use."""
    narrow = content.replace(b"\0", b"")        # UTF-16 and UTF-32 as well
    return NAME.findall(narrow) + [word for word in words if word.encode() in narrow]


def check_folder(folder):
    """Greps what may be shared, and sees that what may not says so; returns what was grepped."""
    words = [str(folder), os.path.realpath(folder)]
    words += [platform.node()] if len(platform.node()) > 3 else []
    shared = sorted(name for name in files_below(folder) if not PRIVATE.fullmatch(name))
    for name in shared:
        with open(folder / name, "rb") as file:
            assert leaks(file.read(), words) == [], name
        assert leaks(name.encode(), words) == []
    for name in files_below(folder):
        if name.endswith(("_problems.csv", "_run.json")):
            with open(folder / name, encoding="utf-8") as file:
                assert re.search("private", file.read(100), re.I), f"{name} does not say it"
    return shared


def quiet(done, *codes):
    """A command's console, which must name nobody, and nothing but what was typed."""
    text = done["out"] + done["err"]
    assert done["code"] in codes and "Traceback" not in text, text
    assert not re.search("MRN|CSN", text), text
    return text


def test_training_and_evaluating_leave_no_name_and_no_path(commands, tmp_path):
    make_file(tmp_path / "d.h5", 12, 1, 6)
    for arguments in (["train_resnet.py", "--data", "d.h5", "--name", "x", "--epochs", 1,
                       "--batch-size", 8, "--device", "cpu", "--keep-index"],
                      ["evaluate.py", "runs/x.pth", "--json", "all.json", "--figure", "all.png",
                       "--report", "all.html", "--split", "all"]):
        text = quiet(commands.run(*arguments, cwd=tmp_path), 0)
        assert str(tmp_path) not in text
    shared = check_folder(tmp_path)
    assert {"runs/x.pth", "runs/x_metrics.json", "runs/x_log.csv", "all.json", "all.png",
            "all.html", "figures_resnet/loss_lr_plot.png"} <= set(shared)


def spoil(path, how):
    with h5py.File(path, "r+") as file:
        group = file["MRN003/CSN0030"]
        if how == "no label":
            del group["tpp"], group["p_crit"]
        elif how == "no ppg":
            del group["ppg"]
        elif how == "a text":
            del group["map"]
            group["map"] = np.array([b"CSN"] * 6)
        elif how == "a note":
            file["MRN003/CSNnote"] = "CSN"
        elif how == "infinite ppg":
            for patient in file.values():
                for encounter in patient.values():
                    encounter["reason"] = np.zeros(6, "u4")
                    encounter["ppg"][2:] = np.inf
        elif how == "wild vitals":
            for patient in file.values():
                for encounter in patient.values():
                    encounter["hr"][::2] = 3e38


@pytest.mark.parametrize("how", ["no label", "no ppg", "a text", "a note", "infinite ppg",
                                 "wild vitals"])
def test_what_is_said_of_a_bad_file_names_nobody(commands, tmp_path, how):
    make_file(tmp_path / "d.h5", 12, 1, 6)
    spoil(tmp_path / "d.h5", how)
    done = commands.run("train_resnet.py", "--data", "d.h5", "--name", "x", "--epochs", 1,
                        "--batch-size", 8, "--device", "cpu", cwd=tmp_path)
    text = quiet(done, 2, *([0] if how == "wild vitals" else []))
    if how in ("no ppg", "a text", "a note"):       # where, and how to get at the name
        assert "d.h5: patient 3" in text and "python datasets.py d.h5 --who 3" in text
    check_folder(tmp_path)


def test_preparing_names_records_in_its_private_file_alone(commands, tmp_path):
    rng = np.random.default_rng(0)
    for name in ("CSN0001", "CSN0002", "CSN0003"):
        folder = tmp_path / "records" / name
        folder.mkdir(parents=True)
        while wfdb_base(folder, rng) == "segments":
            pass
        for ending in ("hea", "dat"):
            content = (folder / f"rec.{ending}").read_bytes()
            (folder / f"{name}.{ending}").write_bytes(content.replace(b"rec", name.encode())
                                                      if ending == "hea" else content)
        for file in folder.iterdir():
            if file.name[:3] != "CSN":
                file.unlink()
    (tmp_path / "records/CSN0002/CSN0002.dat").unlink()
    (tmp_path / "who.csv").write_text("record,split_group\nCSN0001,MRN001\nCSN0002,MRN002\n")
    quiet(commands.run("prepare.py", "records", "--list-channels", cwd=tmp_path), 0, 1)
    text = quiet(commands.run("prepare.py", "records", "--out", "o.h5", "--groups", "who.csv",
                              "--report", "o.html", cwd=tmp_path), 1)
    assert "missing" in text and str(tmp_path) not in text
    with open(tmp_path / "o_problems.csv") as file:
        assert "CSN0002" in file.read()
    assert "o.html" in check_folder(tmp_path)
