"""prepare.py: from recordings to one file of the layout and a quality page."""
import os
import re
import shutil
import time

import filelock
import h5py
import numpy as np
import pandas as pd
import pytest
from conftest import call, fork

import datasets
import labels
import prepare
import recordings
import simulate


def run(*arguments, code=0):
    """Run prepare.py, which must end with this exit code."""
    return call(prepare, *arguments, check=code)


def pulse(t):
    """Pressure in mmHg: 72 beats/min, level and height vary slowly; steep rise, slow decay."""
    phase, slow = 2 * np.pi * 1.2 * t, 2 * np.pi * t / 500
    return 80 + 5 * np.sin(slow) + (25 + 6 * np.sin(15 * slow)) * (
        np.sin(phase) + 0.4 * np.sin(2 * phase - 0.8))


def light(t):
    """The PPG: 0.2 s behind the pressure, in a unit of its own."""
    return pulse(t - 0.2) / 20


def write_csv(path, seconds, fs=100, columns=("ABP", "PLETH"), numbers=None, gap_s=(0, 0)):
    """columns: the names of pressure and PPG; numbers: {name: function of time}, every 2 s."""
    t = np.arange(int(seconds * fs)) / fs
    table = pd.DataFrame({"time_s": t, columns[0]: pulse(t), columns[1]: light(t)})
    for name, value in (numbers or {}).items():
        table[name] = [value(s) if i % (2 * fs) == 0 else np.nan for i, s in enumerate(t)]
    table[(t < gap_s[0]) | (t >= gap_s[1])].round(4).to_csv(path, index=False)
    return path


def read(path):
    """{(patient, encounter): {field: array, '@attribute': value}} of a layout file."""
    with h5py.File(path, "r") as file:
        return {(patient, name): {**{key: item[:] for key, item in group.items()},
                                  **{"@" + key: value for key, value in group.attrs.items()}}
                for patient in file for name, group in file[patient].items()}


@pytest.fixture(scope="module")
def minute(tmp_path_factory):
    return write_csv(tmp_path_factory.mktemp("minute") / "minute.csv", 63, fs=60)


def many(folder, minute, n):
    """`n` records in `folder`."""
    folder.mkdir(parents=True)
    for i in range(n):
        shutil.copy(minute, folder / f"MRN{i:04d}.csv")
    return folder


def test_a_new_minute_begins_after_a_gap_and_keeps_its_time(tmp_path):
    write_csv(tmp_path / "one.csv", 336, gap_s=(121, 179))
    done = run(tmp_path / "one.csv", "--out", tmp_path / "o.h5")
    fields = read(tmp_path / "o.h5")[("one", "one")]
    np.testing.assert_allclose(fields["start_s"], [0, 60, 179, 239], atol=0.1)
    assert not fields["reason"].any() and np.isfinite(fields["ppg"]).all()
    t = fields["start_s"][:, None] + np.arange(3600) / 60
    np.testing.assert_allclose(fields["abp"][:, 60:-60], pulse(t)[:, 60:-60], atol=0.05)
    np.testing.assert_allclose(fields["ppg"][:, 60:-60], light(t)[:, 60:-60], atol=0.003)
    assert "1.6 minutes left over at ends" in done.stdout and "rows/s; gaps: 1, " in done.stderr


def test_labels_come_from_the_stored_pressure(tmp_path):
    write_csv(tmp_path / "one.csv", 66, fs=124.945)
    for method in labels.METHODS:
        run(tmp_path / "one.csv", "--out", tmp_path / "o.h5", "--label-method", method)
        fields = read(tmp_path / "o.h5")[("one", "one")]
        again = labels.label_segments(fields["abp"], 60, method=method)
        for key in ("map", "sbp", "dbp", "pp", "hr", "p_crit", "tpp", "r2", "n_beats"):
            np.testing.assert_array_equal(fields[key], again[key])
        assert datasets.origin_of([tmp_path / "o.h5"], "label_method") == method


def test_groups_keep_a_patients_records_together_and_equal_names_apart(tmp_path, minute):
    for folder in ("p1/a", "p1/b", "p2/a"):
        (tmp_path / "in" / folder).mkdir(parents=True)
        shutil.copy(minute, tmp_path / "in" / folder / "waves.csv")
    arguments = [tmp_path / "in", "--out", tmp_path / "o.h5"]
    copies = "1 minute in the recordings of several patients"
    assert copies in run(*arguments).stdout
    names = ["p1:a:waves", "p1:b:waves", "p2:a:waves"]
    assert sorted(read(tmp_path / "o.h5")) == [(name, name) for name in names]
    groups = tmp_path / "in" / "groups.csv"     # in the folder, but not taken for a recording
    groups.write_text("record,split_group,age\np1/a/waves,P1,50\np1/b/waves.csv,P1,50\n")
    done = run(*arguments, "--groups", groups)
    assert "not in the groups file" in done.stderr and copies in done.stdout
    assert sorted(read(tmp_path / "o.h5")) == list(zip(["P1", "P1", names[2]], names))
    groups.write_text(groups.read_text() + "p2/a/waves,P1,50\n")
    assert copies not in run(*arguments, "--groups", groups).stdout     # all of one patient
    for text, complaint in (
            ("record,split_group\nwaves,P1\n", "line 2: several recordings have this name"),
            ("name,split_group\n", "expected a CSV file with the columns record,split_group"),
            ("record,split_group\nnobody,P1\n", "none of its records is one of these"),
            ("record,split_group\nr1,a/b\n", "line 2: expected a record and a group"),
            ("record,split_group\nb/waves,P\nb/waves.csv,Q\n", "line 3: this record has two")):
        groups.write_text(text)
        line, = run(*arguments, "--groups", groups, code=2).stderr.splitlines()
        assert complaint in line


def test_a_broken_record_gets_a_line_and_a_private_row_and_the_rest_is_prepared(tmp_path, minute):
    records = many(tmp_path / "records", minute, 1)
    shutil.copy(minute, records / os.fsdecode(b"caf\xe9.csv"))
    write_csv(records / "MRN2222.csv", 60, columns=("II", "PLETH"))
    write_csv(records / "MRN3333.csv", 30)
    with h5py.File(records / "MRN5555.h5", "w") as file:  # a message too long for a CSV cell
        for i in range(300):
            file[f"d{i:05d}" + "y" * 60] = np.ones(2)
    done = run(records, "--out", tmp_path / "o.h5", code=1)
    assert list(read(tmp_path / "o.h5")) == [("MRN0000",) * 2, ("caf\\udce9",) * 2]
    lines = [line for line in done.stderr.splitlines() if line.startswith(str(records))]
    assert len(lines) == 3 and "no ABP: no channel with a usual name" in lines[0]
    assert "lasts 30.0 s" in lines[1] and "MRN" not in done.stderr + done.stdout
    again = run(records, "--out", tmp_path / "o.h5", code=1)    # not tried again, but remembered
    assert again.stdout.startswith("nothing to do")
    assert again.stderr.startswith("3 records could not be used")
    assert "private" in (tmp_path / "o_problems.csv").read_text().splitlines()[0]
    errors = pd.read_csv(tmp_path / "o_problems.csv", skiprows=1).query("kind == 'error'")
    assert list(errors["record"]) == ["MRN2222", "MRN3333", "MRN5555"]
    os.remove(records / "MRN5555.h5")   # once all are mended, the problems file goes
    for name in ("MRN2222", "MRN3333"):
        shutil.copy(minute, records / f"{name}.csv")
    assert "reading 2 records" in run(records, "--out", tmp_path / "o.h5").stdout
    assert len(read(tmp_path / "o.h5")) == 4
    assert not os.path.exists(tmp_path / "o_problems.csv")


def test_if_nothing_is_usable_the_old_file_stays_and_the_exit_code_is_2(tmp_path):
    (tmp_path / "a.csv").write_text("ABP,PLETH\n" + "80,1\n" * 7000)   # usable, though flat
    options = [tmp_path / "a.csv", "--fs", 100, "--out", tmp_path / "o.h5"]
    assert "0 of 1 segments pass" in run(*options, "--report", tmp_path / "o.html").stdout
    assert read(tmp_path / "o.h5")[("a", "a")]["reason"].all()
    before = (tmp_path / "o.h5").read_bytes()
    (tmp_path / "a.csv").write_text("time_s,II,PLETH\n0,1,1\n")
    done = run(*options, code=2)
    assert "none of the records could be used" in done.stderr.splitlines()[-1]
    assert (tmp_path / "o.h5").read_bytes() == before
    assert sorted(os.listdir(tmp_path)) == ["a.csv", "o.h5", "o.html", "o_problems.csv"]


def test_a_file_that_prepare_did_not_write_is_never_replaced(tmp_path, minute):
    shutil.copy(minute, tmp_path / "a.csv")
    shutil.copy(minute, tmp_path / "a.html")  # an input need not look like one
    (tmp_path / "notes.h5").write_text("mine")
    (tmp_path / "mine_problems.csv").write_text("mine")
    with h5py.File(tmp_path / "theirs.h5", "w") as file:
        file["abp"] = np.zeros(9)
    before = {name: (tmp_path / name).read_bytes() for name in os.listdir(tmp_path)}
    for outputs in (["notes.h5"], ["theirs.h5"], ["a.csv"], ["mine.h5"],
                    ["o.h5", "--report", "a.csv"], ["o.h5", "--report", "x.pdf"], ["."]):
        paths = [word if word.startswith("--") else tmp_path / word for word in outputs]
        assert run(tmp_path / "a.csv", "--out", *paths, code=2).stderr.count("\n") == 1
    assert {name: (tmp_path / name).read_bytes() for name in os.listdir(tmp_path)} == before


def test_channels_can_be_listed_and_named(tmp_path):
    path = write_csv(tmp_path / "a.csv", 72, columns=("P4 [mmHg]", "finger"))
    pd.read_csv(path).assign(Pulse=lambda table: table["finger"]).to_csv(path, index=False)
    listed = run(tmp_path / "a.csv", "--list-channels", "--ppg-channel", "FINGER")
    assert re.search(r"finger +100 Hz +PPG +--ppg-channel", listed.stdout), listed.stdout
    assert "no ABP: no channel with a usual name" in listed.stdout
    assert "no HR: a channel with a usual name varies like a waveform" in listed.stdout
    run(tmp_path / "a.csv", "--out", tmp_path / "o.h5", "--abp-channel", "P4 [mmHg]",
        "--ppg-channel", "FINGER")


def test_real_records_are_prepared_and_their_delays_suit_their_monitors(tmp_path, recordings):
    pytest.importorskip("wfdb")
    groups = os.path.join(recordings, "recordings.csv")
    source = pd.read_csv(groups, index_col="record", dtype=str)["dataset"].to_dict()
    records = [os.path.join(recordings, "wfdb", record) for record in sorted(source)[::6]]
    run(*records, "--groups", groups, "--out", tmp_path / "real.h5")
    found = read(tmp_path / "real.h5")
    assert len(found) == len(records) > 10
    for (_, name), fields in found.items():
        assert (np.isfinite(fields["tpp"]) | (fields["reason"] != 0)).all()
        delay_s, is_late = fields["@ppg_delay_s"], "Challenge" in source[name]
        # Any other number would be wrong by a beat's length. Not all Challenge monitors are late.
        assert 0.06 < delay_s < 0.4 or is_late and 0.8 < delay_s < 1.1


def test_a_second_run_prepares_only_what_has_changed(tmp_path, minute):
    records = many(tmp_path / "records", minute, 3)
    arguments = [records, "--out", records / "o.h5"]  # the output may lie among the inputs
    run(*arguments)
    before = os.stat(records / "o.h5")
    done = run(*arguments, "--workers", 2)
    assert re.fullmatch("nothing to do: .*3 of 3 records.*\n", done.stdout) and not done.stderr
    assert os.stat(records / "o.h5") == before
    write_csv(records / "MRN0001.csv", 123, fs=60)
    os.remove(records / "MRN0002.csv")
    assert "reading 1 record\n" in run(*arguments).stdout
    assert [len(fields["ppg"]) for fields in read(records / "o.h5").values()] == [1, 2]
    assert "reading 2 records" in run(*arguments, "--label-method", "waveform_balance").stdout
    assert sorted(os.listdir(records)) == ["MRN0000.csv", "MRN0001.csv", "o.h5"]


def test_a_killed_run_continues_and_gives_the_same_file(tmp_path, minute):
    records = many(tmp_path / "records", minute, 4)
    begin = time.monotonic()
    run(records, "--out", tmp_path / "one.h5")
    whole_s, whole = time.monotonic() - begin, read(tmp_path / "one.h5")
    run(records, "--out", tmp_path / "two.h5", "--workers", 2)
    np.testing.assert_equal(read(tmp_path / "two.h5"), whole)
    n_kept, parts = 0, tmp_path / ".killed.h5.parts"
    for trial in range(5):
        process = fork(lambda: run(records, "--out", tmp_path / "killed.h5"), records)
        process.join(trial / 5 * whole_s)
        process.kill()
        process.join()
        n_left = 4 - len(list(parts.glob("*.h5")))
        if n_left < 4:
            (parts / ".0123.h5.0123456789ab.tmp").write_text("a killed writer's")
        done = run(records, "--out", tmp_path / "killed.h5")
        assert n_left in (0, 4) or f"reading {n_left} record" in done.stdout
        np.testing.assert_equal(read(tmp_path / "killed.h5"), whole)
        (tmp_path / "killed.h5").unlink()
        n_kept += 4 - n_left
    assert n_kept and not [name for name in os.listdir(tmp_path) if name.startswith(".")]


def test_two_runs_cannot_write_one_output_at_a_time(tmp_path, minute):
    (tmp_path / ".o.h5.parts").mkdir()
    with filelock.FileLock(str(tmp_path / ".o.h5.parts" / "lock")):
        done = run(minute, "--out", tmp_path / "o.h5", code=2)
    assert "another run is preparing it now" in done.stderr
    run(minute, "--out", tmp_path / "o.h5")


def test_alignment_shifts_only_the_ppg_and_stores_by_how_much(tmp_path):
    t = np.arange(int(3.05 * 6000)) / 100
    t += 0.05 * np.sin(0.3 * t)  # the rhythm follows the breath
    late = pulse(np.interp(np.arange(t.size) - 95, np.arange(t.size), t))
    pd.DataFrame({"ABP": pulse(t), "PLETH": late}).to_csv(tmp_path / "late.csv", index=False)
    options = [tmp_path / "late.csv", "--fs", 100, "--out"]
    run(*options, tmp_path / "as_is.h5")
    run(*options, tmp_path / "aligned.h5", "--align")
    as_is = read(tmp_path / "as_is.h5")["late", "late"]
    aligned = read(tmp_path / "aligned.h5")["late", "late"]
    np.testing.assert_allclose(as_is["ppg_delay_s"], 0.95, atol=0.01)
    np.testing.assert_allclose(aligned["ppg_delay_s"], 0.0, atol=0.01)
    assert abs(aligned["@ppg_shift_s"] - 0.95) < 0.01
    for key in ("abp", "start_s", "p_crit", "tpp", "r2"):
        np.testing.assert_array_equal(as_is[key], aligned[key])
    np.testing.assert_allclose(
        aligned["ppg"].ravel()[200:10000], aligned["abp"].ravel()[200:10000], atol=0.6)


def test_a_vital_of_your_own_is_read_and_stored(tmp_path, monkeypatch):
    monkeypatch.setitem(datasets.FIELDS, "spo2", datasets.Field("f4", "%", "vital", 50, 100))
    monkeypatch.setattr(datasets, "VITALS", (*datasets.VITALS, "spo2"))
    monkeypatch.setitem(recordings.CHANNELS, "spo2", ["spo2", "sao2"])
    monkeypatch.setattr(recordings, "NUMBERS", [*recordings.NUMBERS, "spo2"])
    write_csv(tmp_path / "a.csv", 121, numbers={"SpO2": lambda t: 97 if t < 60 else 93})
    run(tmp_path / "a.csv", "--out", tmp_path / "d.h5")
    assert read(tmp_path / "d.h5")["a", "a"]["spo2"].tolist() == [97, 93]


def test_the_page_stands_alone_is_repeatable_and_names_nobody(tmp_path):
    records, out, page = tmp_path / "MRN777", tmp_path / "MRN888.h5", tmp_path / "report.html"
    records.mkdir()
    for number in range(2):
        fields = simulate.simulate_patient(5, number, 3, keep_abp=True)
        abp = np.array(fields["abp"]).ravel()
        abp[3700:7000] = 80                     # flat for most of the second minute
        pd.DataFrame({"ABP": abp, "PLETH": fields["ppg"].ravel()}).to_csv(
            records / f"MRN1{number}11.csv", index=False)
    (records / "MRN2222.csv").write_text("ABP,PLETH\n80,1\n")
    arguments = [records, "--out", out, "--report", page, "--fs", 60, "--abp-channel", "abp"]
    run(*arguments, code=1)
    text = page.read_text(encoding="utf-8")
    assert not re.search(r"MRN\d{3}", text) and str(tmp_path) not in text and len(text) < 3e6
    assert not re.search(r"<(script|link)|src=\"(?!data:)|https?://", text)
    for part in ("ABP flat", "p_crit &lt; map", "published cohort", "PPG behind ABP",
                 "lasts 0.0 s", "the largest gives", "refused", "passes"):
        assert part in text, part
    first = page.read_bytes()
    done = run(*arguments, code=1)
    assert done.stdout.startswith("nothing to do") and page.read_bytes() == first
    with h5py.File(out, "r") as file:
        attributes = str([dict(file.attrs), *read(out).values()])
    assert "MRN" not in attributes and "abp-channel" not in attributes


def test_a_record_that_needs_too_much_memory_fails_alone(tmp_path, minute, monkeypatch):
    def little_memory(path, *rest):
        if "MRN0001" in path:
            raise MemoryError
        return read_segments(path, *rest)
    read_segments = prepare.read_segments
    monkeypatch.setattr(prepare, "read_segments", little_memory)
    run(many(tmp_path / "records", minute, 3), "--out", tmp_path / "d.h5", code=1)
    assert len(read(tmp_path / "d.h5")) == 2
    assert "not enough memory" in (tmp_path / "d_problems.csv").read_text()
