"""layout.py on real files: gate, what is read and what is refused, the writer."""
import os
import subprocess
import sys

import h5py
import numpy as np
import pytest
from conftest import ROOT, make_file

from datasets import create_dataset_index
from layout import (
    LABELS,
    PUBLISHED_CONDITION,
    VITALS,
    DataError,
    Gate,
    LayoutWriter,
    gate_report,
    get_gate,
    vitals_of,
)


@pytest.fixture
def published(tmp_path):
    return make_file(tmp_path / "published.h5")


def test_the_default_gate_is_the_published_one_without_its_100_minutes():
    published, default = get_gate(PUBLISHED_CONDITION), get_gate("default")
    assert published.comparisons == default.comparisons and len(default.comparisons) == 6
    assert (published.min_minutes, default.min_minutes) == (100, 0)
    assert str(default) == "default" and str(published) == "default, minutes >= 100"
    other = get_gate("rmse_lt_3_and_pcrit_gt_0_pcrit_lt_map_pp_gt_10")
    assert other.comparisons[0] == ("fit_rmse", "<", 3) and other.min_minutes == 100


@pytest.mark.parametrize("condition, text", [
    (["r2 > 0.5", "p_crit<map"], "r2 > 0.5, p_crit < map"), ("any", "any"),
    (["default", "p_crit_se <= 5.5"], "default, p_crit_se <= 5.5"), ("r2_gt_5", "r2 > 0.5"),
    ("p_crit_se < 5, p_crit > 5, ppg_quality >= -1e-1",         # names that begin like another's
     "p_crit_se < 5, p_crit > 5, ppg_quality >= -0.1"), (Gate((("hr", "<", 90.0),)), "hr < 90")])
def test_a_gate_is_written_as_comparisons_and_reads_its_own_text(condition, text):
    gate = get_gate(condition)
    assert str(gate) == text and get_gate(text) == gate


@pytest.mark.parametrize("wrong", ["", "r2 >", "r2 = 1", "r2 > 0.5x", "sodium > 3", "ppg > 0",
                                   "r2 > nan", "r2_gt_6", "minutes < 5", "r2 > 0.5 map < 3", []])
def test_a_condition_that_cannot_be_read_names_the_fields(wrong):
    with pytest.raises(DataError, match="such as 'r2 > 0.5' .* map, sbp, .* p_crit, r2"):
        get_gate(wrong)


@pytest.mark.parametrize("sign, kept", [(">", 2), (">=", 3), ("<", 7), ("<=", 8)])
def test_bounds_are_open_or_closed_as_written(tmp_path, sign, kept):
    path = make_file(tmp_path / "f.h5", 1, 1, 10)
    with h5py.File(path, "r+") as file:
        file["MRN000/CSN0000/hr"][:] = 60 + np.arange(10)
    assert len(create_dataset_index(path=path, condition=f"hr {sign} 67")) == kept


def test_roles_say_what_is_an_input_and_what_must_be_finite():
    assert VITALS == ("map", "sbp", "dbp", "pp", "hr") and LABELS == ("tpp", "p_crit")
    assert vitals_of(["ppg", "map", "hr", "tpp"]) == ["map", "hr"]
    with pytest.raises(DataError, match="'r2' cannot be an input: expected ppg, map"):
        vitals_of(["ppg", "r2", "tpp"])


@pytest.mark.parametrize("key, value", [("map", -32768), ("hr", 0), ("hr", 8388607), ("dbp", 95),
                                        ("sbp", 65), ("pp", 2)])
def test_vitals_that_no_person_has_are_refused_by_every_gate(tmp_path, key, value):
    path = make_file(tmp_path / "f.h5", 1, 1, 10)
    with h5py.File(path, "r+") as file:
        file["MRN000/CSN0000"][key][3] = value
    rows = create_dataset_index(path=path, condition="any").rows
    assert rows.tolist() == [0, 1, 2, *range(4, 10)]
    assert {rule: broken for rule, broken, _ in gate_report(path, "any")}["plausible vitals"] == 1


def test_each_rule_refuses_its_segments_and_the_report_counts_them(tmp_path):
    path = make_file(tmp_path / "f.h5", patients=3, encounters=1, rows=10)
    wrong = {0: ("r2", 0.5), 1: ("p_crit", -1), 2: ("p_crit", 95), 3: ("pp", 10), 4: ("map", 120),
             5: ("hr", np.nan), 7: ("sbp", np.inf)}
    with h5py.File(path, "r+") as file:
        group = file["MRN001/CSN0010"]
        for row, (key, value) in wrong.items():
            group[key][row] = value
        group["ppg"][6, 0, 1234] = np.inf
        group["sbp"][4] = 125
    index = create_dataset_index(path=path)
    assert len(index) == 30 - 8
    report = {rule: (broken, left) for rule, broken, left in gate_report(path)}
    assert report["all segments"] == (0, 30)
    assert report["finite PPG"] == (1, 29)
    assert report["finite vitals and label"] == (2, 27)
    assert report["plausible vitals"] == (1, 27)                # infinite pressure, again
    assert report["r2 > 0.5"] == (1, 26) and report["p_crit > 0"] == (1, 25)
    assert report["p_crit < map"] == (1, 24) and report["p_crit < 100"][1] == 22
    with pytest.raises(DataError, match="no segment passes"):
        create_dataset_index(path=path, condition=PUBLISHED_CONDITION)
    assert len(create_dataset_index(path=path, condition="map > 70")) == 27


def break_file(path, how):
    with h5py.File(path, "r+") as file:
        group = file["MRN001/CSN0010"]
        if how == "no ppg":
            del group["ppg"]
        elif how == "no r2":
            del group["r2"]
        elif how == "short vital":
            del group["map"]
            group["map"] = np.zeros(3, "f4")
        elif how == "wrong ppg":
            del group["ppg"]
            group["ppg"] = np.zeros((8, 3000), "f4")
        elif how == "text":
            del group["map"]
            group["map"] = [b"a"] * 8
        elif how == "scaled":
            group["map"].attrs["scale_factor"] = 0.1
        elif how == "not written":
            del group["map"]
            group.create_dataset("map", (8,), "f4")
        elif how == "nothing":
            for name in list(file):
                del file[name]
        elif how == "other rate":
            file.attrs["fs"] = 125


@pytest.mark.parametrize("how, message", [
    ("no ppg", "patient 1, encounter 0.*no field 'ppg'"),
    ("no r2", "patient 1, encounter 0.*no field 'r2'"),
    ("short vital", r"field 'map': shape \(3,\), expected \(8,\)"),
    ("wrong ppg", r"field 'ppg': shape \(8, 3000\)"),
    ("text", "field 'map': expected plain numbers"),
    ("scaled", "field 'map': scaled by its attribute 'scale_factor'"),
    ("not written", "field 'map': 8 rows, but this file holds fewer"),
    ("other rate", "segments of 60 s at 60 Hz"), ("nothing", "found no encounter")])
def test_a_malformed_file_is_refused_in_one_line_without_identifiers(published, how, message):
    break_file(published, how)
    with pytest.raises(DataError, match=message) as error:
        create_dataset_index(path=published)
    assert not any(text in str(error.value) for text in ("\n", "MRN0", "CSN"))


def test_foreign_and_missing_files_are_refused(tmp_path):
    (tmp_path / "text.h5").write_text("no HDF5")
    for name, message in (("text.h5", "not a readable HDF5 file"), ("absent.h5", "no such file")):
        with pytest.raises(DataError, match=message):
            create_dataset_index(path=tmp_path / name)


def test_what_is_no_patient_beside_the_patients_is_ignored(tmp_path, published):
    other = make_file(tmp_path / "other.h5", seed=1)
    with h5py.File(published, "r+") as file:
        file["AAA notes"] = "written by hand"
        file["AAB/settings/table"] = np.zeros(3)
        file["MRN000/age"] = 71
        file["MRN000/AA/lactate"] = np.zeros(8)
        file["MRN000/CSN0000/map"].attrs.update(units="mmHg", gain=1.0)
        file["MRN1"] = h5py.SoftLink("/MRN001")             # or one patient would be two
        file["MRN2"] = h5py.ExternalLink(other, "/MRN001")
    index = create_dataset_index(path=published)
    assert len(index) == 96 and index.patients.tolist() == [f"MRN{n:03d}" for n in range(6)]
    position = index.place(0).split("--who ")[1].rstrip(")")
    done = subprocess.run([sys.executable, os.path.join(ROOT, "datasets.py"), published, "--who",
                           position, "99"], capture_output=True, text=True)
    assert done.stdout == f"{position}: MRN000/CSN0000\n99: not in this file\n"


def test_the_writer_makes_a_file_that_reads_back_and_refuses_what_does_not_fit(tmp_path):
    fields = {"ppg": np.random.default_rng(0).random((3, 3600)), "map": np.full(3, 80),
              "dbp": np.full(3, 60), "hr": np.full(3, 70), "p_crit": np.array([30, 31, np.nan]),
              "r2": np.full(3, 0.9), "pp": np.full(3, 50), "reason": np.array([0, 0, 4])}
    fields["tpp"] = fields["map"] - fields["p_crit"]
    path = tmp_path / "f.h5"
    with LayoutWriter(path, "recordings", "published", "foot", ("a", "b", "c")) as out:
        out.write("p", "e", fields)
        with pytest.raises(DataError, match="written before"):
            out.write("p", "e", fields)
        with pytest.raises(DataError, match="without '/'"):
            out.write("p", "e/4", fields)
        with pytest.raises(DataError, match="'ppg' and 'reason'"):
            out.write("p", "e2", {"ppg": fields["ppg"]})
        with pytest.raises(DataError, match="'sodium'"):
            out.write("p", "e2", dict(fields, sodium=np.zeros(3)))
        with pytest.raises(DataError, match="non-finite"):
            out.write("p", "e3", dict(fields, ppg=np.full((3, 3600), np.nan)))
        with pytest.raises(DataError, match="non-finite"), np.errstate(over="ignore"):
            out.write("p", "e4", dict(fields, ppg=np.full((3, 3600), 1e300)))    # not in float32
    index = create_dataset_index(path=path)
    assert index.rows.tolist() == [0, 1]
    with h5py.File(path, "r") as file:
        assert file.attrs["origin"] == "recordings" and file.attrs["fs"] == 60
        assert file["p/e/ppg"].chunks is None and file["p/e/reason"].dtype == np.uint32


def test_a_full_disk_is_an_error_in_one_line_and_not_a_crash(tmp_path):
    code = """
import sys
import numpy as np
from layout import LayoutWriter
try:
    with LayoutWriter(sys.argv[1], 'recordings', 'published', 'foot', ['a']) as out:
        for i in range(30):
            out.write(f'p{i}', 'e', {'ppg': np.zeros((4, 3600)), 'reason': np.zeros(4)})
except OSError as error:
    print(error)
"""
    path = str(tmp_path / "f.h5")
    done = subprocess.run(["bash", "-c", f'ulimit -f 300; exec {sys.executable} -c "$CODE" {path}'],
                          capture_output=True, text=True, cwd=ROOT, env=dict(os.environ, CODE=code))
    assert done.stdout == f"[Errno 27] File too large: {path!r}\n" and not done.stderr


def test_importing_needs_no_pytorch():
    code = "import sys, layout; print({'matplotlib', 'sklearn', 'torch'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "set()"
