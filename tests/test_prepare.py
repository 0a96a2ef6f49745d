"""prepare.py: recordings in, one file of the layout out."""
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

import h5py
import numpy as np
import pytest

import datasets
import labels
import prepare
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
    """A pressure-like wave, 72 beats/min, amplitude varying slowly."""
    t = t - delay_s
    phase = 2 * np.pi * 1.2 * t
    amplitude = 25 + 6 * np.sin(2 * np.pi * 0.03 * t)
    return 80 + amplitude * (np.sin(phase) + 0.4 * np.sin(2 * phase - 0.8))


def write_csv(path, minutes, fs=100, start_minute=0.0, columns=("time_s", "ABP", "PLETH"),
              gap_s=(0, 0)):
    t = np.arange(int(minutes * 60 * fs)) / fs
    abp, ppg = pulse(t), pulse(t, 0.2)
    keep = (t < gap_s[0]) | (t >= gap_s[1])
    with open(path, "w") as file:
        file.write(",".join(columns) + "\n")
        for row in zip(t[keep] + 60 * start_minute, abp[keep], ppg[keep]):
            file.write("{:.4f},{:.3f},{:.3f}\n".format(*row))


def read(*paths):
    """{(patient, encounter): {field: array}} of a layout file, or of several."""
    found = {}
    for path in paths:
        with h5py.File(path, "r") as file:
            for patient in file:
                for encounter, group in file[patient].items():
                    assert (patient, encounter) not in found
                    found[patient, encounter] = {key: item[:] for key, item in group.items()}
    return found


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
    path = tmp_path_factory.mktemp("minute") / "minute.csv"
    write_csv(path, minutes=1.05, fs=60)
    return path


def many(folder, minute, n):
    """`n` records in `folder`."""
    folder.mkdir()
    for i in range(n):
        shutil.copy(minute, folder / f"MRN{i:04d}.csv")
    return folder


def test_minutes_are_cut_from_the_start_and_a_missing_minute_is_stored_as_refused(tmp_path):
    write_csv(tmp_path / "one.csv", minutes=5.6, start_minute=3, gap_s=(121, 179))
    done = run(tmp_path / "one.csv", "--out", tmp_path / "o.h5")
    assert (done.returncode, "Traceback" in done.stderr) == (0, False), done.stderr
    fields = read(tmp_path / "o.h5")[("one", "one")]
    assert fields["ppg"].shape == fields["abp"].shape == (5, 3600)
    np.testing.assert_array_equal(fields["start_s"], [0, 60, 120, 180, 240])
    np.testing.assert_array_equal(fields["reason"] != 0, [0, 0, 1, 0, 0])
    assert np.isnan(fields["abp"][2, 60:-60]).all() and np.isnan(fields["tpp"][2])
    missing = {labels.REASONS.index("abp_missing"), labels.REASONS.index("ppg_missing")}
    assert missing <= {bit for bit in range(32) if fields["reason"][2] >> bit & 1}
    # The minute after the gap lies at its own time, not where the gap was.
    k = np.arange(60, 3540)
    np.testing.assert_allclose(fields["abp"][3, k], pulse(180 + k / 60), atol=0.05)
    np.testing.assert_allclose(fields["ppg"][3, k], pulse(180 + k / 60, 0.2), atol=0.05)
    assert "0.6 minutes" in done.stdout
    assert not os.path.exists(tmp_path / "o_problems.csv")


def test_labels_are_those_of_the_stored_pressure(tmp_path):
    write_csv(tmp_path / "one.csv", minutes=3, fs=124.945)
    for beats in ("foot", "peak"):
        done = run(tmp_path / "one.csv", "--out", tmp_path / "o.h5", "--beats", beats)
        assert done.returncode == 0
        fields = read(tmp_path / "o.h5")[("one", "one")]
        again = labels.label_segments(fields["abp"], 60, beats=beats)
        for key in ("map", "sbp", "dbp", "pp", "hr", "p_crit", "tpp", "r2", "n_beats"):
            np.testing.assert_array_equal(fields[key], again[key])
        with h5py.File(tmp_path / "o.h5", "r") as file:
            assert file.attrs["beats"] == beats and file.attrs["origin"] == "recordings"
            assert file.attrs["label_method"] == "published"


def test_groups_keep_the_records_of_a_patient_together(tmp_path):
    for name in ("r1", "r2", "r3"):
        write_csv(tmp_path / f"{name}.csv", minutes=1.1)
    groups = tmp_path / "groups.csv"  # lies in the folder, and is not taken for a recording
    groups.write_text("record,split_group,age\nr1,ann,50\nr2,ann,50\n")
    done = run(tmp_path, "--groups", groups, "--out", tmp_path / "out" / "o.h5")
    assert done.returncode == 0, done.stderr
    assert sorted(read(tmp_path / "out" / "o.h5")) == [("ann", "r1"), ("ann", "r2"), ("r3", "r3")]
    assert "1 of 3 records are not in" in done.stderr


@pytest.mark.parametrize("text, complaint", [
    ("name,split_group\n", "no column record"),
    ("record,split_group\nr1,\n", "line 2: expected a record and a group"),
    ("record,split_group\nr1,a/b\n", "line 2: expected a record and a group"),
    ("record,split_group\nr1,a\nr1,b\n", "line 3: this record has two groups"),
])
def test_a_bad_groups_file_gets_one_line(tmp_path, text, complaint):
    write_csv(tmp_path / "r1.csv", minutes=1.1)
    (tmp_path / "groups").write_text(text)
    done = run(tmp_path / "r1.csv", "--groups", tmp_path / "groups", "--out", tmp_path / "o.h5")
    assert done.returncode == 2
    assert complaint in done.stderr and done.stderr.count("\n") == 1
    assert not os.path.exists(tmp_path / "o.h5")


def test_two_inputs_of_one_name_and_patient_are_refused_naming_both(tmp_path):
    for folder in ("x", "y"):
        (tmp_path / folder).mkdir()
        write_csv(tmp_path / folder / "r.csv", minutes=1.1)
    inputs = tmp_path / "x" / "r.csv", tmp_path / "y" / "r.csv"
    done = run(*inputs, "--out", tmp_path / "o.h5")
    assert done.returncode == 2 and not os.path.exists(tmp_path / "o.h5")
    assert all(str(path) in done.stderr for path in inputs)


def test_a_broken_record_costs_one_line_and_a_private_row_and_the_rest_goes_on(tmp_path):
    records = tmp_path / "records"
    records.mkdir()
    write_csv(records / "MRN1111.csv", minutes=2)
    write_csv(records / "MRN2222.csv", minutes=2, columns=("time_s", "II", "PLETH"))
    write_csv(records / "MRN3333.csv", minutes=0.5)
    (records / "MRN4444.csv").write_text("time_s,ABP,PLETH\n0,80,1\n0.01,x,2\n")
    done = run(records, "--out", tmp_path / "o.h5")
    assert done.returncode == 1
    assert list(read(tmp_path / "o.h5")) == [("MRN1111", "MRN1111")]
    lines = [line for line in done.stderr.splitlines() if line.startswith(str(records))]
    assert len(lines) == 3 and "no ABP channel" in lines[0] and "30.0 s" in lines[1]
    assert "line 3, column ABP" in lines[2]
    assert "MRN" not in done.stderr + done.stdout
    again = run(records, "--out", tmp_path / "o.h5")  # they are not tried again, but remembered
    assert again.returncode == 1 and "nothing to do" in again.stdout
    assert "3 records could not be used" in again.stderr and "records:" not in again.stderr
    with open(tmp_path / "o_problems.csv") as file:
        assert "private" in file.readline()
        rows = list(csv.DictReader(file))
    assert [row["record"] for row in rows] == ["MRN2222", "MRN3333", "MRN4444"]
    assert all(row["kind"] == "error" for row in rows)
    # Mended and run again: the list of problems goes.
    for name in ("MRN2222", "MRN3333", "MRN4444"):
        shutil.copy(records / "MRN1111.csv", records / f"{name}.csv")
    done = run(records, "--out", tmp_path / "o.h5")
    assert done.returncode == 0 and "records: 3 new, 0 gone, 0 changed" in done.stdout
    assert "3/3" in done.stderr and len(read(tmp_path / "o.h5")) == 4
    assert not os.path.exists(tmp_path / "o_problems.csv")


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
    (tmp_path / "notes.h5").write_text("mine")
    with h5py.File(tmp_path / "theirs.h5", "w") as file:
        file["abp"] = np.zeros(9)
    for name in ("notes.h5", "theirs.h5", "a.csv"):
        before = (tmp_path / name).read_bytes()
        done = run(tmp_path / "a.csv", "--out", tmp_path / name)
        assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
        assert (tmp_path / name).read_bytes() == before
    assert sorted(os.listdir(tmp_path)) == ["a.csv", "notes.h5", "theirs.h5"]


@pytest.mark.parametrize("arguments", [
    ["absent.csv", "--out", "o.h5"], ["--out", "o.h5"], ["README.md", "--out", "o.h5"],
    ["absent.csv"], ["absent.csv", "--out", "o.h5", "--workers", "0"],
    ["absent.csv", "--out", "o.h5", "--csv-rate", "-3"], ["absent.csv", "--out", "o.h5", "--what"],
])
def test_a_bad_command_line_ends_with_code_2_and_without_a_traceback(arguments):
    done = run(*arguments)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert not os.path.exists(os.path.join(ROOT, "o.h5"))


def test_channels_can_be_listed_and_named(tmp_path):
    write_csv(tmp_path / "a.csv", minutes=1.2, columns=("time_s", "P4 [mmHg]", "finger"))
    listed = run(tmp_path / "a.csv", "--list-channels")
    assert listed.returncode == 0
    assert "P4 [mmHg] (100 Hz mmHg)" in listed.stdout
    assert "no ABP found; no PPG found" in listed.stdout
    names = ["--abp-channel", "P4 [mmHg]", "--ppg-channel", "FINGER"]
    listed = run(tmp_path / "a.csv", "--list-channels", *names)
    assert "-> ABP" in listed.stdout and "finger (100 Hz) -> PPG" in listed.stdout
    assert run(tmp_path / "a.csv", "--out", tmp_path / "o.h5", *names).returncode == 0


def test_a_numeric_channel_of_the_right_name_is_refused_and_kilopascals_are_converted(tmp_path):
    write_csv(tmp_path / "slow.csv", minutes=2, fs=10)
    done = run(tmp_path / "slow.csv", "--out", tmp_path / "o.h5")
    assert done.returncode == 2 and "10 samples/s" in done.stderr
    t = np.arange(6000) / 100
    with open(tmp_path / "kpa.csv", "w") as file:
        file.write("time_s,ABP (kPa),PLETH\n")
        file.writelines(f"{s:.2f},{p / 7.50062:.5f},{p:.3f}\n" for s, p in zip(t, pulse(t)))
    assert run(tmp_path / "kpa.csv", "--out", tmp_path / "o.h5").returncode == 0
    abp = read(tmp_path / "o.h5")[("kpa", "kpa")]["abp"][0]
    np.testing.assert_allclose(abp[60:-60], pulse(np.arange(60, 3540) / 60), atol=0.05)


def test_signals_of_different_rates_are_aligned_in_time(tmp_path):
    pytest.importorskip("wfdb")
    minutes, fs = 40, 62.4725
    n = int(minutes * 60 * fs)
    abp = np.rint(100 * pulse(np.arange(2 * n) / (2 * fs))).astype("<i2")
    ppg = np.rint(100 * pulse(np.arange(n) / fs)).astype("<i2")
    np.column_stack([abp.reshape(-1, 2), ppg]).tofile(tmp_path / "r.dat")
    (tmp_path / "r.hea").write_text(
        f"r 2 {fs} {n}\nr.dat 16x2 100/mmHg 16 0 0 0 0 ABP\nr.dat 16 100/NU 16 0 0 0 0 PLETH\n")
    assert run(tmp_path / "r", "--out", tmp_path / "o.h5").returncode == 0
    fields = read(tmp_path / "o.h5")[("r", "r")]
    truth = pulse(np.arange(minutes * 3600)[-3600:-60] / 60)
    np.testing.assert_allclose(fields["abp"][-1][:-60], truth, atol=0.1)
    np.testing.assert_allclose(fields["ppg"][-1][:-60], truth, atol=0.1)


@needs_shared
def test_csv_and_wfdb_versions_of_a_recording_give_the_same_segments_and_labels(tmp_path):
    pytest.importorskip("wfdb")
    name = "waveformtools_sample_record"
    done = run(os.path.join(SHARED, "theatre_10min.csv"), os.path.join(SHARED, "wfdb", name),
               "--out", tmp_path / "o.h5")
    assert done.returncode == 0, done.stderr
    both = read(tmp_path / "o.h5")
    table, record = both[("theatre_10min", "theatre_10min")], both[(name, name)]
    assert len(table["ppg"]) == 10 and len(record["ppg"]) == 32
    for key in ("abp", "ppg"):
        # The last second of the CSV does not know how the recording goes on.
        a, b = table[key].reshape(-1)[:-60], record[key].reshape(-1)[:36000 - 60]
        np.testing.assert_allclose(a, b, atol=0.01)
    np.testing.assert_array_equal(table["reason"], record["reason"][:10])
    tolerances = {"map": 0.02, "pp": 0.05, "hr": 0.05, "p_crit": 0.5, "tpp": 0.5}
    for key, tolerance in tolerances.items():
        np.testing.assert_allclose(table[key], record[key][:10], atol=tolerance)


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
    assert f"{len(index):,} of 915 segments pass" in done.stdout
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
    # By a beat's length wrong would be any other number. A few come from another vendor's monitor.
    assert late.mean() > 0.85 and ((challenge[~late] > 0.25) & (challenge[~late] < 0.35)).all()

    again = run(*arguments)
    assert again.returncode == 0 and again.stdout.startswith("nothing to do: ")


def test_a_recording_without_one_beat_is_stored_as_refused(tmp_path):
    t = np.arange(7000) / 100
    with open(tmp_path / "flat.csv", "w") as file:
        file.write("time_s,ABP,PLETH\n")
        file.writelines(f"{s:.2f},80,1\n" for s in t)
    done = run(tmp_path / "flat.csv", "--out", tmp_path / "o.h5")
    assert done.returncode == 0
    assert "0 of 1 segments pass" in done.stdout
    assert read(tmp_path / "o.h5")[("flat", "flat")]["reason"].all()


# ---------------------------------------------------------------------------------------------
# Going on where a run stopped


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
    arguments = [records, "--shards", 2, "--out"]
    begin = time.monotonic()
    assert run(*arguments, tmp_path / "whole").returncode == 0
    whole_s = time.monotonic() - begin
    moments, n_killed = random.Random(0), 0
    for trial in range(4):
        out, killed = tmp_path / f"killed{trial}", True
        while killed:
            process = start(*arguments, out)
            process.join(moments.uniform(0, whole_s))
            killed = kill(process)
            n_killed += killed
            if out.is_dir():  # a shard is complete or absent
                read(*(out / name for name in os.listdir(out) if name.endswith(".h5")))
        assert sorted(os.listdir(out)) == ["0000.h5", "0001.h5"]
        for name in os.listdir(out):
            assert_same_content(tmp_path / "whole" / name, out / name)
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
    (tmp_path / ".o.h5.0123456789ab.tmp").write_text("a killed writer's")
    write_csv(records / "MRN0000.csv", minutes=2.05, fs=60)
    done = run(records, "--out", tmp_path / "o.h5")
    assert f"has prepared {len(kept) - 1} of 30 records; 1 more have changed" in done.stdout
    assert f"{31 - len(kept)}/{31 - len(kept)}" in done.stderr
    fields = read(tmp_path / "o.h5")
    assert len(fields) == 30 and len(fields["MRN0000", "MRN0000"]["ppg"]) == 2
    assert sorted(os.listdir(tmp_path)) == ["o.h5", "records"]


@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="finds processes in /proc")
def test_a_killed_worker_costs_nothing_and_a_killed_parent_leaves_no_worker(tmp_path, minute):
    def command(pid):
        with contextlib.suppress(OSError), open(f"/proc/{pid}/cmdline") as file:
            return file.read()
        return ""

    def workers():
        with open(f"/proc/{process.pid}/task/{process.pid}/children") as file:
            return {int(pid) for pid in file.read().split() if "spawn_main" in command(pid)}

    def wait_until(condition):
        while not condition():
            assert time.monotonic() < deadline
            time.sleep(0.01)

    records, parts = many(tmp_path / "records", minute, 60), tmp_path / ".o.h5.parts"
    process = start(records, "--out", tmp_path / "o.h5", "--workers", 2)
    deadline = time.monotonic() + 300
    wait_until(lambda: parts.is_dir() and len(os.listdir(parts)) > 3)
    first = workers()
    os.kill(max(first), signal.SIGKILL)
    wait_until(lambda: workers() - first)  # another has taken over
    last = workers()
    assert kill(process)
    wait_until(lambda: not any(map(command, last)))
    assert run(records, "--out", tmp_path / "o.h5").returncode == 0
    assert run(records, "--out", tmp_path / "one.h5").returncode == 0
    assert_same_content(tmp_path / "o.h5", tmp_path / "one.h5")


def test_a_changed_input_or_option_is_noticed_and_told(tmp_path, minute):
    records = many(tmp_path / "records", minute, 3)
    arguments = [records, "--out", tmp_path / "o.h5"]
    assert run(*arguments).returncode == 0
    write_csv(records / "MRN0001.csv", minutes=2.05, fs=60)
    os.remove(records / "MRN0002.csv")
    done = run(*arguments)
    assert "records: 0 new, 1 gone, 1 changed" in done.stdout and "1/1" in done.stderr
    assert [len(one["ppg"]) for one in read(tmp_path / "o.h5").values()] == [1, 2]
    done = run(*arguments, "--beats", "peak")
    assert "was written, other: --beats; all is prepared again" in done.stdout
    with h5py.File(tmp_path / "o.h5", "r") as file:
        assert file.attrs["beats"] == "peak"
    assert run(*arguments, "--beats", "peak").stdout.startswith("nothing to do")


def test_two_runs_do_not_write_one_output_at_a_time(tmp_path, minute):
    fcntl = pytest.importorskip("fcntl")
    (tmp_path / ".o.h5.parts").mkdir()
    with open(tmp_path / ".o.h5.parts" / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        done = run(minute, "--out", tmp_path / "o.h5")
    assert done.returncode == 2 and "another run is preparing it now" in done.stderr
    assert run(minute, "--out", tmp_path / "o.h5").returncode == 0


def test_shards_hold_each_patient_once_and_together_what_one_file_holds(tmp_path, minute):
    records = many(tmp_path / "records", minute, 12)
    groups = tmp_path / "groups.csv"
    groups.write_text("record,split_group\n" + "".join(
        f"MRN{i:04d},p{i // 2}\n" for i in range(12)))
    options = [records, "--groups", groups, "--out"]
    assert run(*options, tmp_path / "one.h5").returncode == 0
    assert run(*options, tmp_path / "shards", "--shards", 3).returncode == 0
    paths = sorted((tmp_path / "shards").glob("*.h5"))
    patients = [{patient for patient, _ in read(path)} for path in paths]
    assert 1 < len(paths) <= 3 and sum(map(len, patients)) == 6
    one, several = read(tmp_path / "one.h5"), read(*paths)
    assert sorted(one) == sorted(several)
    for key, fields in one.items():
        for name, values in fields.items():
            np.testing.assert_array_equal(values, several[key][name])
    assert len(datasets.create_dataset_index(path=list(map(str, paths)), condition="any")) == 12
    # Another number of shards would leave patients in two of them.
    done = run(*options, tmp_path / "shards", "--shards", 1)
    assert done.returncode == 2 and ".h5 files that are none of these 1 shards" in done.stderr
    assert run(*options, tmp_path / "shards").returncode == 2
    done = run(*options, tmp_path / "shards", "--shards", 40, "--beats", "peak")
    assert "other: --beats, --shards" in done.stdout
    assert len(read(*(tmp_path / "shards").glob("*.h5"))) == 12


# ---------------------------------------------------------------------------------------------
# Time: delay, drift, gaps


def test_the_delay_of_simulated_patients_is_found():
    found, true, minutes = [], [], []
    settings = replace(simulate.DEFAULT, late_monitor_share=0.5)
    for number in range(10):
        fields = simulate.simulate_patient(3, number, 6, keep_abp=True, settings=settings)
        delay_s, strength, rows = prepare.ppg_delay(fields["abp"], fields["ppg"], 60)
        assert strength >= prepare.SURE_DELAY
        found.append(delay_s)
        true.append(fields["ppg_delay_s"][0])
        minutes.append(np.nanmax(np.abs(rows - delay_s)))
    assert np.ptp(true) > 0.5
    # The foot of the finger's pulse is itself a little later than the radial line's.
    np.testing.assert_allclose(np.array(found) - true, 0.0, atol=0.03)
    assert np.median(minutes) < 0.02


def test_a_rhythm_without_variation_leaves_a_beat_open_and_that_is_said():
    t = np.arange(6 * 3600) / 60

    def wave(late_s, wobble_s):
        s = t - late_s
        return pulse(s + wobble_s * np.sin(2 * np.pi * 0.013 * s)).reshape(6, 3600)

    for late_s in (0.25, 0.95):
        delay_s, strength, _ = prepare.ppg_delay(wave(0, 0.3), wave(late_s, 0.3), 60)
        assert abs(delay_s - late_s) < 0.01 and strength > 0.3
    assert prepare.ppg_delay(wave(0, 0), wave(0.25, 0), 60)[1] < prepare.SURE_DELAY
    delay_s, strength, rows = prepare.ppg_delay(wave(0, 0.3), np.full((6, 3600), np.nan), 60)
    assert np.isnan(delay_s) and strength == 0 and np.isnan(rows).all()


def test_alignment_shifts_the_ppg_alone_and_says_by_how_much(tmp_path):
    t = np.arange(int(3.05 * 6000)) / 100
    t += 0.05 * np.sin(0.3 * t)  # a rhythm that breathes
    with open(tmp_path / "late.csv", "w") as file:
        file.write("ABP,PLETH\n")
        file.writelines(f"{p:.3f},{q:.3f}\n" for p, q in zip(pulse(t), pulse(np.interp(
            np.arange(t.size) - 95, np.arange(t.size), t))))
    options = [tmp_path / "late.csv", "--csv-rate", 100, "--out"]
    assert run(*options, tmp_path / "as_is.h5").returncode == 0
    assert run(*options, tmp_path / "aligned.h5", "--align").returncode == 0
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


def test_after_hours_and_gaps_a_segment_is_right_to_a_sample(tmp_path):
    """A record of 124.945 Hz with gaps between its segments; the rhythm tells the time."""
    pytest.importorskip("wfdb")
    fs, hours = 124.945, 3

    def true(t):
        return 80 + 30 * np.sin(2 * np.pi * (1.2 * t + 40 * np.sin(2 * np.pi * t / 5000)))

    names, first = [], 0
    for number, length in enumerate((410_000, -77_777, 505_050, -123, 356_820)):
        if length < 0:
            names.append(f"~ {-length}")
        else:
            values = np.rint(100 * true(np.arange(first, first + length) / fs)).astype("<i2")
            np.column_stack([values, values]).tofile(tmp_path / f"r_{number}.dat")
            (tmp_path / f"r_{number}.hea").write_text(
                f"r_{number} 2 {fs} {length}\nr_{number}.dat 16 100/mmHg 16 0 0 0 0 ABP\n"
                f"r_{number}.dat 16 100/NU 16 0 0 0 0 PLETH\n")
            names.append(f"r_{number} {length}")
        first += abs(length)
    (tmp_path / "r.hea").write_text(f"r/{len(names)} 2 {fs} {first}\n" + "\n".join(names) + "\n")
    done = run(tmp_path / "r.hea", "--out", tmp_path / "o.h5")
    assert done.returncode == 0, done.stderr
    fields = read(tmp_path / "o.h5")["r", "r"]
    assert len(fields["start_s"]) == int(first / fs / 60) == hours * 60
    t = fields["start_s"][:, None] + np.arange(3600) / 60
    for key in ("abp", "ppg"):
        known = np.isfinite(fields[key])
        known[:, :9] = known[:, -9:] = False  # what lies beside a gap is a little less exact
        off = np.abs(fields[key] - true(t))[known]
        # A sample of 60 Hz late, this rhythm is off by up to 4.6 mmHg.
        assert np.percentile(off, 99.9) < 0.2 and known.mean() > 0.9
        n_missing = (~np.isfinite(fields[key])).any(1).sum()
        assert 10 <= n_missing <= 13  # the gaps of 622 s and 1 s, and no minute more


# ---------------------------------------------------------------------------------------------
# The quality report


def test_the_report_stands_alone_is_repeatable_and_names_nobody(tmp_path):
    pytest.importorskip("matplotlib")
    records = tmp_path / "MRN777"
    records.mkdir()
    for number in range(2):
        fields = simulate.simulate_patient(5, number, 3, keep_abp=True)
        rows = zip(fields["abp"].ravel(), fields["ppg"].ravel())
        with open(records / f"MRN1{number}11.csv", "w") as file:
            file.write("ABP,PLETH\n")
            file.writelines(f"{a:.3f},{p:.5f}\n" if not 3700 < i < 7000 else ",\n"
                            for i, (a, p) in enumerate(rows))
    (records / "MRN2222.csv").write_text("ABP,PLETH\n80,1\n")
    out, page = tmp_path / "MRN888.h5", tmp_path / "report.html"
    done = run(records, "--out", out, "--report", page, "--csv-rate", 60, "--abp-channel", "abp")
    assert done.returncode == 1 and page.is_file()
    text = page.read_text(encoding="utf-8")
    assert not re.search(r"MRN\d{3}", text) and str(tmp_path) not in text
    assert not re.search(r"<(script|link)|src=\"(?!data:)|https?://", text)
    for part in ("abp_missing", "p_crit &lt; map", "published cohort", "PPG behind ABP",
                 "lasts # s, less than one segment", "Refused: abp_missing, few_beats"):
        assert part in text, part
    n_drawn = [int(n) for n in re.findall(r"(\d+) random segments", text)]
    assert len(n_drawn) == 2 and sum(n_drawn) == 6 and min(n_drawn) >= 2
    assert text.count("<img") == 8 and len(text) < 3e6
    first = page.read_bytes()
    page.unlink()  # asked for again, it is made again from what is there
    done = run(records, "--out", out, "--report", page, "--csv-rate", 60, "--abp-channel", "abp")
    assert done.stdout.startswith("nothing to do") and page.read_bytes() == first
    with h5py.File(out, "r") as file:
        attributes = [str(dict(file.attrs))]
        file.visititems(lambda _, item: attributes.append(str(dict(item.attrs))))
    assert "MRN" not in "".join(attributes) and "abp-channel" not in "".join(attributes)


def test_waveforms_of_an_hdf5_file_are_prepared_where_one_says_where_they_are(tmp_path):
    t = np.arange(7000) / 100
    with h5py.File(tmp_path / "in.h5", "w") as file:
        file["waves/art"], file["waves/finger"] = pulse(t), pulse(t, 0.2)
    done = run(tmp_path / "in.h5", "--abp", "waves/art", "--ppg", "waves/finger", "--fs", 100,
               "--out", tmp_path / "o.h5")
    assert done.returncode == 0, done.stderr
    abp = read(tmp_path / "o.h5")["in", "in"]["abp"][0]
    np.testing.assert_allclose(abp[60:-60], pulse(np.arange(60, 3540) / 60), atol=0.05)
