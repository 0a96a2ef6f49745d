"""prepare.py: recordings in, one file of the layout out."""
import contextlib
import csv
import io
import os
import subprocess
import sys
from typing import NamedTuple

import h5py
import numpy as np
import pytest

import datasets
import labels
import prepare
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


def run_process(*arguments):
    done = subprocess.run(
        [sys.executable, os.path.join(ROOT, "prepare.py"), *map(str, arguments)],
        text=True, capture_output=True, cwd=ROOT, timeout=120,
    )
    return Done(done.returncode, done.stdout, done.stderr)


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


def read(path):
    """{(patient, encounter): {field: array}} of a layout file."""
    with h5py.File(path, "r") as file:
        return {
            (patient, encounter): {key: item[:] for key, item in file[patient][encounter].items()}
            for patient in file for encounter in file[patient]
        }


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
    done = run_process(records, "--out", tmp_path / "o.h5")
    assert done.returncode == 1
    assert list(read(tmp_path / "o.h5")) == [("MRN1111", "MRN1111")]
    lines = [line for line in done.stderr.splitlines() if line.startswith(str(records))]
    assert len(lines) == 3 and "no ABP channel" in lines[0] and "30.0 s" in lines[1]
    assert "line 3, column ABP" in lines[2]
    assert "MRN" not in done.stderr + done.stdout
    with open(tmp_path / "o_problems.csv") as file:
        assert "private" in file.readline()
        rows = list(csv.DictReader(file))
    assert [row["record"] for row in rows] == ["MRN2222", "MRN3333", "MRN4444"]
    assert all(row["kind"] == "error" for row in rows)
    # Mended and run again: the list of problems goes.
    for name in ("MRN2222", "MRN3333", "MRN4444"):
        os.remove(records / f"{name}.csv")
    assert run(records, "--out", tmp_path / "o.h5").returncode == 0
    assert not os.path.exists(tmp_path / "o_problems.csv")


def test_where_nothing_is_usable_the_old_file_stays_and_the_exit_code_is_2(tmp_path):
    write_csv(tmp_path / "a.csv", minutes=2, columns=("time_s", "II", "PLETH"))
    (tmp_path / "o.h5").write_text("old")
    done = run(tmp_path / "a.csv", "--out", tmp_path / "o.h5")
    assert done.returncode == 2
    assert "none of the records could be used" in done.stderr.splitlines()[-1]
    assert (tmp_path / "o.h5").read_text() == "old"
    assert sorted(os.listdir(tmp_path)) == ["a.csv", "o.h5", "o_problems.csv"]


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


def test_one_and_several_processes_write_the_same_file(tmp_path):
    records = tmp_path / "records"
    records.mkdir()
    for i in range(5):
        write_csv(records / f"r{i}.csv", minutes=1.2 + i / 2)
    for workers in (1, 2):
        done = run(records, "--out", tmp_path / f"{workers}.h5", "--workers", workers)
        assert done.returncode == 0, done.stderr
    one, two = read(tmp_path / "1.h5"), read(tmp_path / "2.h5")
    assert list(one) == list(two)
    for key in one:
        for name in one[key]:
            np.testing.assert_array_equal(one[key][name], two[key][name])


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
def test_all_shared_records_go_through_and_can_be_indexed(tmp_path):
    pytest.importorskip("wfdb")
    groups = os.path.join(SHARED, "recordings.csv")
    done = run_process(os.path.join(SHARED, "wfdb"), "--groups", groups,
                       "--out", tmp_path / "real.h5", "--workers", 2)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    assert "77 of 77 records" in done.stdout
    assert len(read(tmp_path / "real.h5")) == 77
    index = datasets.create_dataset_index(path=str(tmp_path / "real.h5"))
    assert f"{len(index):,} of 915 segments pass" in done.stdout
    assert len(index) > 100 and index.n_patients > 10


def test_a_recording_without_one_beat_is_stored_as_refused(tmp_path):
    t = np.arange(7000) / 100
    with open(tmp_path / "flat.csv", "w") as file:
        file.write("time_s,ABP,PLETH\n")
        file.writelines(f"{s:.2f},80,1\n" for s in t)
    done = run(tmp_path / "flat.csv", "--out", tmp_path / "o.h5")
    assert done.returncode == 0
    assert "0 of 1 segments pass" in done.stdout
    assert read(tmp_path / "o.h5")[("flat", "flat")]["reason"].all()
