"""prepare.py: recordings in, one file of the layout out; quality.py: the page about it."""
import contextlib
import csv
import io
import multiprocessing
import os
import random
import re
import shutil
import signal
import time
from dataclasses import replace
from typing import NamedTuple

import filelock
import h5py
import numpy as np
import pytest

import datasets
import labels
import prepare
import signals
import simulate
import tk_utils
from datasets import DataError
from recordings import RecordingError

ROOT = os.path.dirname(os.path.abspath(prepare.__file__))
SHARED = os.path.join(ROOT, "..", "shared", "data")
needs_shared = pytest.mark.skipif(not os.path.isdir(SHARED), reason="no ../shared/data here")


class Done(NamedTuple):
    returncode: int
    stdout: str
    stderr: str


def run(*arguments):
    """In this process: a subprocess takes seconds to import PyTorch."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = tk_utils.run_script(
                lambda: prepare.main([str(a) for a in arguments]), DataError, RecordingError)
        except SystemExit as stop:  # argparse
            code = stop.code
    return Done(code, out.getvalue(), err.getvalue())


def pulse(t, delay_s=0.0):
    """A pressure-like wave, 72 beats/min, amplitude varying slowly; steep rise, slow decay."""
    t = t - delay_s
    phase = 2 * np.pi * 1.2 * t
    amplitude = 25 + 6 * np.sin(2 * np.pi * 0.03 * t)
    return 80 + amplitude * (np.sin(phase) + 0.4 * np.sin(2 * phase - 0.8))


def write_csv(path, minutes, fs=100, columns=("time_s", "ABP", "PLETH"), gap_s=(0, 0)):
    t = np.arange(int(minutes * 60 * fs)) / fs
    keep = (t < gap_s[0]) | (t >= gap_s[1])
    with open(path, "w") as file:
        file.write(",".join(columns) + "\n")
        for row in zip(t[keep], pulse(t)[keep], pulse(t, 0.2)[keep]):
            file.write("{:.4f},{:.3f},{:.3f}\n".format(*row))
    return path


def read(path):
    """{(patient, encounter): {field: array}} of a layout file."""
    with h5py.File(path, "r") as file:
        return {(patient, name): {key: item[:] for key, item in group.items()}
                for patient in file for name, group in file[patient].items()}


def assert_same_content(a, b):
    """Group by group, dataset by dataset, attribute by attribute."""
    with h5py.File(a, "r") as one, h5py.File(b, "r") as two:
        names = [[], []]
        one.visit(names[0].append)
        two.visit(names[1].append)
        assert names[0] == names[1] and len(names[0]) > 20
        for name in ["/"] + names[0]:
            x, y = one[name], two[name]
            assert sorted(x.attrs) == sorted(y.attrs)
            for key in x.attrs:
                np.testing.assert_array_equal(x.attrs[key], y.attrs[key])
            if isinstance(x, h5py.Dataset):
                assert x.dtype == y.dtype
                np.testing.assert_array_equal(x[:], y[:])


@pytest.fixture(scope="module")
def minute(tmp_path_factory):
    """A CSV of a little over a minute, to be copied under any name."""
    return write_csv(tmp_path_factory.mktemp("minute") / "minute.csv", minutes=1.05, fs=60)


def many(folder, minute, n):
    """`n` records in `folder`."""
    folder.mkdir(parents=True)
    for i in range(n):
        shutil.copy(minute, folder / f"MRN{i:04d}.csv")
    return folder


def test_a_new_minute_begins_after_a_gap_and_lies_at_its_own_time(tmp_path):
    write_csv(tmp_path / "one.csv", minutes=5.6, gap_s=(121, 179))
    done = run(tmp_path / "one.csv", "--out", tmp_path / "o.h5")
    assert (done.returncode, done.stderr.count("Traceback")) == (0, 0), done.stderr
    fields = read(tmp_path / "o.h5")[("one", "one")]
    assert fields["ppg"].shape == fields["abp"].shape == (4, 3600)
    np.testing.assert_allclose(fields["start_s"], [0, 60, 179, 239], atol=0.1)
    assert not fields["reason"].any() and np.isfinite(fields["ppg"]).all()
    t = fields["start_s"][:, None] + np.arange(3600) / 60
    inside = slice(60, 3540)
    np.testing.assert_allclose(fields["abp"][:, inside], pulse(t)[:, inside], atol=0.05)
    np.testing.assert_allclose(fields["ppg"][:, inside], pulse(t, 0.2)[:, inside], atol=0.05)
    assert "1.6 minutes dropped" in done.stdout and "note: times: 100 rows/s, 1 gap" in done.stderr


def test_labels_are_those_of_the_stored_pressure(tmp_path):
    write_csv(tmp_path / "one.csv", minutes=3, fs=124.945)
    for method in labels.METHODS:
        done = run(tmp_path / "one.csv", "--out", tmp_path / "o.h5", "--label-method", method)
        assert done.returncode == 0, done.stderr
        fields = read(tmp_path / "o.h5")[("one", "one")]
        again = labels.label_segments(fields["abp"], 60, method=method)
        for key in ("map", "sbp", "dbp", "pp", "hr", "p_crit", "tpp", "r2", "n_beats"):
            np.testing.assert_array_equal(fields[key], again[key])
        with h5py.File(tmp_path / "o.h5", "r") as file:
            assert file.attrs["label_method"] == method and file.attrs["origin"] == "recordings"
            assert file.attrs["beats"] == labels.METHODS[method].beats


def test_groups_keep_the_records_of_a_patient_together(tmp_path):
    for name in ("r1", "r2", "r3"):
        write_csv(tmp_path / f"{name}.csv", minutes=1.1)
    groups = tmp_path / "groups.csv"  # lies in the folder, and is not taken for a recording
    groups.write_text("record,split_group,age\nr1,ann,50\nr2.csv,ann,50\n")
    done = run(tmp_path, "--groups", groups, "--out", tmp_path / "out" / "o.h5")
    assert done.returncode == 0, done.stderr
    assert sorted(read(tmp_path / "out" / "o.h5")) == [("ann", "r1"), ("ann", "r2"), ("r3", "r3")]
    assert "1 of 3 records not in" in done.stderr


def test_records_of_one_name_are_told_apart_by_their_paths(tmp_path, minute):
    for folder in ("p1/a", "p1/b", "p2/a"):
        (tmp_path / "in" / folder).mkdir(parents=True)
        shutil.copy(minute, tmp_path / "in" / folder / "waves.csv")
    assert run(tmp_path / "in", "--out", tmp_path / "o.h5").returncode == 0
    names = ["p1:a:waves", "p1:b:waves", "p2:a:waves"]
    assert sorted(read(tmp_path / "o.h5")) == [(name, name) for name in names]
    groups = tmp_path / "groups.csv"
    groups.write_text("record,split_group\np1/a/waves,P1\np1/b/waves,P1\np2/a/waves,P2\n")
    done = run(tmp_path / "in", "--groups", groups, "--out", tmp_path / "o.h5")
    assert done.returncode == 0, done.stderr
    assert sorted(read(tmp_path / "o.h5")) == list(zip(["P1", "P1", "P2"], names))
    groups.write_text("record,split_group\nwaves,P1\n")
    done = run(tmp_path / "in", "--groups", groups, "--out", tmp_path / "o.h5")
    assert done.returncode == 2 and "line 2: several recordings have this name" in done.stderr


@pytest.mark.parametrize("text, complaint", [
    ("name,split_group\n", "expected a CSV file with the columns record,split_group"),
    ("record,split_group\nr1,\n", "line 2: expected a record and a group"),
    ("record,split_group\nr1,a/b\n", "line 2: expected a record and a group"),
    ("record,split_group\nr1,a\nr1,b\n", "line 3: this record has two groups"),
])
def test_a_bad_groups_file_gets_one_line(tmp_path, minute, text, complaint):
    (tmp_path / "groups").write_text(text)
    done = run(minute, "--groups", tmp_path / "groups", "--out", tmp_path / "o.h5")
    assert done.returncode == 2
    assert complaint in done.stderr and done.stderr.count("\n") == 1
    assert os.listdir(tmp_path) == ["groups"]


def test_a_broken_record_costs_one_line_and_a_private_row_and_the_rest_goes_on(tmp_path):
    records = tmp_path / "records"
    records.mkdir()
    write_csv(records / "MRN1111.csv", minutes=2)
    write_csv(records / "MRN2222.csv", minutes=2, columns=("time_s", "II", "PLETH"))
    write_csv(records / "MRN3333.csv", minutes=0.5)
    (records / "MRN4444.csv").write_text("time_s,ABP MRN4,PLETH\n0,80,1\n0.01,x,2\n")
    with h5py.File(records / "MRN5555.h5", "w") as file:  # a message too long for a CSV cell
        for i in range(3000):
            file[f"d{i:05d}" + "y" * 60] = np.ones(2)
    done = run(records, "--out", tmp_path / "o.h5")
    assert done.returncode == 1
    assert list(read(tmp_path / "o.h5")) == [("MRN1111", "MRN1111")]
    lines = [line for line in done.stderr.splitlines() if line.startswith(str(records))]
    assert len(lines) == 4 and "no ABP: no channel with a usual name" in lines[0]
    assert "lasts 30.0 s" in lines[1] and "MRN" not in done.stderr + done.stdout
    again = run(records, "--out", tmp_path / "o.h5")  # they are not tried again, but remembered
    assert again.returncode == 1 and "nothing to do" in again.stdout
    assert "4 records could not be used" in again.stderr and "records:" not in again.stderr
    with open(tmp_path / "o_problems.csv") as file:
        assert "private" in file.readline()
        rows = list(csv.DictReader(file))
    assert [row["record"] for row in rows] == ["MRN2222", "MRN3333", "MRN4444", "MRN5555"]
    assert all(row["kind"] == "error" for row in rows)
    # Mended and run again: the list of problems goes.
    os.remove(records / "MRN5555.h5")
    for name in ("MRN2222", "MRN3333", "MRN4444"):
        shutil.copy(records / "MRN1111.csv", records / f"{name}.csv")
    done = run(records, "--out", tmp_path / "o.h5")
    assert done.returncode == 0 and "records: 3 new, 0 gone, 0 changed" in done.stdout
    assert "3/3" in done.stderr and len(read(tmp_path / "o.h5")) == 4
    assert not os.path.exists(tmp_path / "o_problems.csv")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes here")
def test_what_is_no_file_is_skipped_and_a_closed_folder_is_counted(tmp_path, minute):
    records = many(tmp_path / "records", minute, 1)
    os.mkfifo(records / "x.csv")
    shutil.copy(minute, records / os.fsdecode(b"caf\xe9.csv"))
    done = run(records, "--out", tmp_path / "o.h5")
    assert done.returncode == 0 and "2 of 2 records prepared" in done.stdout, done.stderr
    assert "not a regular file" in (tmp_path / "o_problems.csv").read_text()
    many(records / "closed", minute, 1).chmod(0)
    if os.access(records / "closed", os.R_OK):
        pytest.skip("root opens every folder")
    done = run(records, "--out", tmp_path / "o.h5")
    (records / "closed").chmod(0o700)
    assert done.returncode == 1 and "1 folder could not be opened" in done.stderr


def test_where_nothing_is_usable_the_old_file_stays_and_the_exit_code_is_2(tmp_path, minute):
    shutil.copy(minute, tmp_path / "a.csv")
    assert run(tmp_path / "a.csv", "--out", tmp_path / "o.h5").returncode == 0
    before = (tmp_path / "o.h5").read_bytes()
    write_csv(tmp_path / "a.csv", minutes=2, columns=("time_s", "II", "PLETH"))
    done = run(tmp_path / "a.csv", "--out", tmp_path / "o.h5")
    assert done.returncode == 2
    assert "none of the records could be used" in done.stderr.splitlines()[-1]
    assert (tmp_path / "o.h5").read_bytes() == before
    assert sorted(os.listdir(tmp_path)) == ["a.csv", "o.h5", "o_problems.csv"]


def test_what_prepare_did_not_write_is_never_replaced(tmp_path, minute):
    shutil.copy(minute, tmp_path / "a.csv")
    shutil.copy(minute, tmp_path / "a.html")  # an input need not look like one
    (tmp_path / "notes.h5").write_text("mine")
    (tmp_path / "mine_problems.csv").write_text("mine")
    with h5py.File(tmp_path / "theirs.h5", "w") as file:
        file["abp"] = np.zeros(9)
    before = {name: (tmp_path / name).read_bytes() for name in os.listdir(tmp_path)}
    for outputs in (["notes.h5"], ["theirs.h5"], ["a.csv"], ["mine.h5"],
                    ["o.h5", "--report", "a.csv"], ["o.h5", "--report", "x.pdf"], ["."]):
        paths = [one if one.startswith("--") else tmp_path / one for one in outputs]
        done = run(tmp_path / "a.csv", "--out", *paths)
        assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert {name: (tmp_path / name).read_bytes() for name in os.listdir(tmp_path)} == before


@pytest.mark.parametrize("arguments", [
    [], ["--workers", "0"], ["--fs", "-3"], ["--what"], ["--unit", "kPa"], ["README.md"]])
def test_a_bad_command_line_ends_with_code_2_and_without_a_traceback(arguments):
    done = run("absent.csv", "--out", "o.h5", *arguments)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert not os.path.exists(os.path.join(ROOT, "o.h5"))


def test_channels_can_be_listed_and_named(tmp_path):
    write_csv(tmp_path / "a.csv", minutes=1.2, columns=("time_s", "P4 [mmHg]", "finger"))
    listed = run(tmp_path / "a.csv", "--list-channels")
    assert listed.returncode == 0 and "P4 [mmHg]" in listed.stdout and "100 Hz" in listed.stdout
    assert "no ABP: no channel with a usual name" in listed.stdout
    names = ["--abp-channel", "P4 [mmHg]", "--ppg-channel", "FINGER"]
    listed = run(tmp_path / "a.csv", "--list-channels", *names)
    assert re.search(r"finger +100 Hz +PPG +--ppg-channel", listed.stdout), listed.stdout
    assert run(tmp_path / "a.csv", "--out", tmp_path / "o.h5", *names).returncode == 0


def test_kilopascals_are_converted_and_units_can_be_stated(tmp_path):
    t = np.arange(6000) / 100
    lines = [f"{s:.2f},{p / 7.50062:.5f},{p:.3f}\n" for s, p in zip(t, pulse(t))]
    for column, more in (("ABP (kPa)", []), ("ABP", ["--unit", "ABP=kPa"])):
        (tmp_path / "kpa.csv").write_text(f"time_s,{column},PLETH\n" + "".join(lines))
        done = run(tmp_path / "kpa.csv", "--out", tmp_path / "o.h5", *more)
        assert done.returncode == 0, done.stderr
        abp = read(tmp_path / "o.h5")[("kpa", "kpa")]["abp"][0]
        np.testing.assert_allclose(abp[60:-60], pulse(np.arange(60, 3540) / 60), atol=0.05)


@needs_shared
def test_all_shared_records_go_through_and_their_delays_are_those_of_their_monitors(tmp_path):
    pytest.importorskip("wfdb")
    groups = os.path.join(SHARED, "recordings.csv")
    arguments = [os.path.join(SHARED, "wfdb"), "--groups", groups, "--out", tmp_path / "real.h5"]
    done = run(*arguments)
    assert (done.returncode, done.stderr.count("Traceback")) == (0, 0), done.stderr
    assert "77 of 77 records" in done.stdout
    fields = read(tmp_path / "real.h5")
    assert len(fields) == 77
    index = datasets.create_dataset_index(path=str(tmp_path / "real.h5"))
    assert re.search(rf"{len(index):,} of \d+ segments pass", done.stdout)
    assert len(index) > 100 and index.n_patients > 10
    for one in fields.values():  # nothing is refused without a reason
        assert (np.isfinite(one["tpp"]) | (one["reason"] != 0)).all()

    with open(groups) as file:
        source = {row["record"]: row["dataset"] for row in csv.DictReader(file)}
    with h5py.File(tmp_path / "real.h5", "r") as file:
        delays = {name: group.attrs["ppg_delay_s"] for patient in file.values()
                  for name, group in patient.items()}
    challenge = np.array([s for name, s in delays.items() if "Challenge" in source[name]])
    others = np.array([s for name, s in delays.items() if "Challenge" not in source[name]])
    assert ((others > 0.06) & (others < 0.4)).all()
    late = (challenge > 0.8) & (challenge < 1.1)
    # Wrong by a beat's length would be any other number. A few come from another vendor's monitor.
    assert late.mean() > 0.85 and ((challenge[~late] > 0.25) & (challenge[~late] < 0.35)).all()


def test_a_recording_without_one_beat_is_stored_as_refused(tmp_path):
    t = np.arange(7000) / 100
    with open(tmp_path / "flat.csv", "w") as file:
        file.write("time_s,ABP,PLETH\n")
        file.writelines(f"{s:.2f},80,1\n" for s in t)
    done = run(tmp_path / "flat.csv", "--out", tmp_path / "o.h5", "--report", tmp_path / "o.html")
    assert done.returncode == 0, done.stderr
    assert "0 of 1 segments pass" in done.stdout
    assert read(tmp_path / "o.h5")[("flat", "flat")]["reason"].all()


# ------------------------------------- Continuing where a run stopped


def start(*arguments):
    """Runs prepare in a process of its own (a fork, which needs no seconds of importing)."""
    child = multiprocessing.get_context("fork").Process(
        target=lambda: os._exit(run(*arguments).returncode))
    child.start()
    return child


def kill(process):
    """Whether it had not finished yet."""
    process.kill()
    process.join()
    assert process.exitcode in (0, -signal.SIGKILL)
    return process.exitcode != 0


def test_a_second_run_does_nothing_and_says_so_in_a_line(tmp_path, minute):
    records = many(tmp_path / "records", minute, 3)
    arguments = [records, "--out", records / "o.h5"]  # the output may lie among the inputs
    assert run(*arguments).returncode == 0
    before = os.stat(records / "o.h5")
    done = run(*arguments, "--workers", 2)
    assert (done.returncode, done.stdout.count("\n"), done.stderr) == (0, 1, "")
    assert done.stdout.startswith("nothing to do: ") and "3 of 3 records" in done.stdout
    after = os.stat(records / "o.h5")
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    assert sorted(os.listdir(records)) == ["MRN0000.csv", "MRN0001.csv", "MRN0002.csv", "o.h5"]


def test_a_run_killed_at_any_moment_and_restarted_gives_the_same_file(tmp_path, minute):
    records = many(tmp_path / "records", minute, 6)
    begin = time.monotonic()
    assert run(records, "--out", tmp_path / "whole.h5").returncode == 0
    whole_s = time.monotonic() - begin
    moments, n_killed = random.Random(0), 0
    for trial in range(4):
        out, killed = tmp_path / f"killed{trial}.h5", True
        while killed:
            process = start(records, "--out", out)
            process.join(moments.uniform(0, whole_s))
            killed = kill(process)
            n_killed += killed
        assert_same_content(tmp_path / "whole.h5", out)
    assert n_killed > 0
    assert not [name for name in os.listdir(tmp_path) if name.startswith(".")]


def test_a_killed_run_keeps_what_it_has_prepared_and_leaves_no_litter(tmp_path, minute):
    records, parts = many(tmp_path / "records", minute, 30), tmp_path / ".o.h5.parts"
    process = start(records, "--out", tmp_path / "o.h5")
    while not parts.is_dir() or len(os.listdir(parts)) < 6:
        time.sleep(0.005)
    assert kill(process)
    kept = [name for name in os.listdir(parts) if name.endswith(".h5")]
    (parts / ".0123.h5.0123456789ab.tmp").write_text("a killed writer's")
    write_csv(records / "MRN0000.csv", minutes=2.05, fs=60)
    done = run(records, "--out", tmp_path / "o.h5")
    assert f"has prepared {len(kept) - 1} of 30 records; 1 more are out of date" in done.stdout
    assert f"{31 - len(kept)}/{31 - len(kept)}" in done.stderr
    fields = read(tmp_path / "o.h5")
    assert len(fields) == 30 and len(fields["MRN0000", "MRN0000"]["ppg"]) == 2
    assert sorted(os.listdir(tmp_path)) == ["o.h5", "records"]


def test_worker_processes_give_the_same_file(tmp_path, minute):
    records = many(tmp_path / "records", minute, 6)
    assert run(records, "--out", tmp_path / "o.h5", "--workers", 2).returncode == 0
    assert run(records, "--out", tmp_path / "one.h5").returncode == 0
    assert_same_content(tmp_path / "o.h5", tmp_path / "one.h5")


def test_a_changed_input_or_option_is_noticed_and_said(tmp_path, minute):
    records = many(tmp_path / "records", minute, 3)
    arguments = [records, "--out", tmp_path / "o.h5"]
    assert run(*arguments).returncode == 0
    write_csv(records / "MRN0001.csv", minutes=2.05, fs=60)
    os.remove(records / "MRN0002.csv")
    done = run(*arguments)
    assert "records: 0 new, 1 gone, 1 changed" in done.stdout and "1/1" in done.stderr
    assert [len(one["ppg"]) for one in read(tmp_path / "o.h5").values()] == [1, 2]
    done = run(*arguments, "--label-method", "published_peaks")
    assert "was made with another --label-method; all is prepared again" in done.stdout
    assert run(*arguments, "--label-method", "published_peaks").stdout.startswith("nothing to do")


def test_two_runs_do_not_write_one_output_at_a_time(tmp_path, minute):
    (tmp_path / ".o.h5.parts").mkdir()
    with filelock.FileLock(str(tmp_path / ".o.h5.parts" / "lock")):
        done = run(minute, "--out", tmp_path / "o.h5")
    assert done.returncode == 2 and "another run is preparing it now" in done.stderr
    assert run(minute, "--out", tmp_path / "o.h5").returncode == 0


# ------------------------------------- Time: delay, drift, gaps


def test_the_delay_of_simulated_patients_is_found():
    found, true, minutes = [], [], []
    settings = replace(simulate.DEFAULT, late_monitor_share=0.5)
    for number in range(6):
        fields = simulate.simulate_patient(3, number, 6, keep_abp=True, settings=settings)
        delay_s, strength, rows = signals.ppg_delay(fields["abp"], fields["ppg"], 60)
        assert strength >= signals.SURE_DELAY
        found.append(delay_s)
        true.append(fields["ppg_delay_s"][0])
        minutes.append(np.nanmax(np.abs(rows - delay_s)))
    assert np.ptp(true) > 0.5
    # The foot of the finger's pulse is itself a little later than the radial line's.
    np.testing.assert_allclose(np.array(found) - true, 0.0, atol=0.03)
    assert np.median(minutes) < 0.02


def test_alignment_shifts_the_ppg_alone_and_says_by_how_much(tmp_path):
    t = np.arange(int(3.05 * 6000)) / 100
    t += 0.05 * np.sin(0.3 * t)  # a rhythm that breathes
    with open(tmp_path / "late.csv", "w") as file:
        file.write("ABP,PLETH\n")
        file.writelines(f"{p:.3f},{q:.3f}\n" for p, q in zip(pulse(t), pulse(np.interp(
            np.arange(t.size) - 95, np.arange(t.size), t))))
    options = [tmp_path / "late.csv", "--fs", 100, "--out"]
    assert run(*options, tmp_path / "as_is.h5").returncode == 0
    done = run(*options, tmp_path / "aligned.h5", "--align")
    assert done.returncode == 0, done.stderr
    as_is = read(tmp_path / "as_is.h5")["late", "late"]
    aligned = read(tmp_path / "aligned.h5")["late", "late"]
    np.testing.assert_allclose(as_is["ppg_delay_s"], 0.95, atol=0.01)
    np.testing.assert_allclose(aligned["ppg_delay_s"], 0.0, atol=0.01)
    for key in ("abp", "start_s", "p_crit", "tpp", "r2"):
        np.testing.assert_array_equal(as_is[key], aligned[key])
    np.testing.assert_allclose(
        aligned["ppg"].ravel()[200:10000], aligned["abp"].ravel()[200:10000], atol=0.6)
    with h5py.File(tmp_path / "aligned.h5", "r") as file:
        assert abs(file["late/late"].attrs["ppg_shift_s"] - 0.95) < 0.01


# ------------------------------------- The quality page


def test_the_page_stands_alone_is_repeatable_and_names_nobody(tmp_path):
    records = tmp_path / "MRN777"
    records.mkdir()
    for number in range(2):
        fields = simulate.simulate_patient(5, number, 3, keep_abp=True)
        rows = list(zip(fields["abp"].ravel(), fields["ppg"].ravel()))
        with open(records / f"MRN1{number}11.csv", "w") as file:
            file.write("ABP,PLETH\n")  # pressure flat for most of the second minute
            file.writelines(f"{80 if 3700 < i < 7000 else a:.3f},{p:.5f}\n"
                            for i, (a, p) in enumerate(rows))
    (records / "MRN2222.csv").write_text("ABP,PLETH\n80,1\n")
    out, page = tmp_path / "MRN888.h5", tmp_path / "report.html"
    arguments = [records, "--out", out, "--report", page, "--fs", 60, "--abp-channel", "abp"]
    done = run(*arguments)
    assert done.returncode == 1 and page.is_file(), done.stderr
    text = page.read_text(encoding="utf-8")
    assert not re.search(r"MRN\d{3}", text) and str(tmp_path) not in text
    assert not re.search(r"<(script|link)|src=\"(?!data:)|https?://", text)
    for part in ("arterial pressure flat", "p_crit &lt; map", "published cohort", "PPG behind ABP",
                 "lasts 0.0 s", "Refused: arterial pressure flat", "Largest patient"):
        assert part in text, part
    n_drawn = [int(n) for n in re.findall(r"(\d+) random segment", text)]
    assert len(n_drawn) == 2 and sum(n_drawn) == 6 and min(n_drawn) >= 2
    assert text.count("<img") == 9 and len(text) < 3e6
    first = page.read_bytes()
    page.unlink()  # asked for again, it is made again from what is there
    done = run(*arguments)
    assert done.stdout.startswith("nothing to do") and page.read_bytes() == first
    with h5py.File(out, "r") as file:
        attributes = [str(dict(file.attrs))]
        file.visititems(lambda _, item: attributes.append(str(dict(item.attrs))))
    assert "MRN" not in "".join(attributes) and "abp-channel" not in "".join(attributes)
