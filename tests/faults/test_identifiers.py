"""Files that may be shared, and the console, hold no patient's name and no path of this machine.

Patients are called MRN000…, encounters and records CSN0000…: a leak is found by these letters.
"""
import os
import platform
import re

import h5py
import numpy as np
import pytest
from conftest import ROOT, make_file, run
from test_damaged_files import write_wfdb

pytestmark = pytest.mark.usefixtures("small")
PRIVATE = re.compile(r".*(\.h5|\.salt|\.index\.npz|_problems\.csv|run\.json|records/.*|who\.csv)")
NAME = re.compile(rb"(MRN|CSN)\d{3}")
TRAIN = ["--data", "d.h5", "--name", "x", "--epochs", 1, "--batch-size", 8]


def check_folder(folder):
    """Search the files that may be shared; others must be marked private. Returns the former."""
    words = [str(folder), os.path.realpath(folder), os.path.expanduser("~") + "/", ROOT]
    words += [path.read_text().strip() for path in folder.glob("*.salt")]
    words += [platform.node()] if len(platform.node()) > 3 else []
    names = [str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()]
    shared = sorted(name for name in names if not PRIVATE.fullmatch(name))
    for name in shared:
        content = (folder / name).read_bytes().replace(b"\0", b"")      # UTF-16 as well
        found = NAME.findall(content) + [word for word in words if word.encode() in content]
        assert not found and not NAME.search(name.encode()), name
    for name in names:
        if name.endswith(("_problems.csv", "run.json")):
            assert re.search("private", (folder / name).read_text()[:200], re.I), name
    return shared


def quiet(done, *codes):
    """The console of a command, which must name nobody."""
    text = done.stdout + done.stderr
    assert done.returncode in codes and not re.search("Traceback|MRN|CSN", text), text
    return text


def test_training_and_evaluating_leave_no_name_and_no_path(tmp_path):
    make_file(tmp_path / "d.h5", 12, 1, 6)
    for script, *arguments in (["train_resnet.py", *TRAIN],
                               ["evaluate.py", "runs/x.pth", "--json", "all.json",
                                "--report", "all.html", "--split", "all"]):
        assert str(tmp_path) not in quiet(run(script, *arguments, cwd=tmp_path), 0)
    shared = check_folder(tmp_path)
    assert {"runs/x.pth", "runs/x/metrics.json", "runs/x/log.csv", "all.json", "all.html",
            "figures_resnet/x_loss_lr_plot.png"} <= set(shared)


@pytest.mark.parametrize("finite", [True, False])
def test_messages_on_a_bad_file_name_nobody(tmp_path, finite):
    make_file(tmp_path / "d.h5", 12, 1, 6)
    with h5py.File(tmp_path / "d.h5", "r+") as file:
        if finite:
            del file["MRN003/CSN0030/ppg"]
        else:
            for patient, encounters in file.items():
                encounters[f"CSN{patient[3:]}0/ppg"][2:] = np.inf
    text = quiet(run("train_resnet.py", *TRAIN, cwd=tmp_path), 2, 0)
    if finite:                          # where, and how to look up the name
        assert "patient 3" in text and "--who 3" in text
    check_folder(tmp_path)


def test_preparing_names_records_only_in_its_private_file(tmp_path):
    pytest.importorskip("wfdb")
    for name in ("CSN0001", "CSN0002", "CSN0003"):
        (tmp_path / "records" / name).mkdir(parents=True)
        write_wfdb(tmp_path / "records" / name, name)
    (tmp_path / "records/CSN0002/CSN0002.dat").unlink()
    (tmp_path / "records/CSN0003/CSN0003.csv").write_text(      # a name in a column, and in a cell
        "time_s,abp\x1b[2J (MRN4711),pleth\n0,MRN4711,1\n0.01,oops,1\n")
    (tmp_path / "who.csv").write_text("record,split_group\nCSN0001,MRN001\nCSN0002,MRN002\n")
    quiet(run("prepare.py", "records", "--list-channels", cwd=tmp_path), 0, 1)
    text = quiet(run("prepare.py", "records", "--out", "o.h5", "--groups", "who.csv",
                     "--report", "o.html", cwd=tmp_path), 1)
    assert "missing" in text and str(tmp_path) not in text and "\x1b" not in text
    assert "CSN0002" in (tmp_path / "o_problems.csv").read_text()
    assert "o.html" in check_folder(tmp_path)
