"""datasets.py on real files: layout, gate, every storage, index, split, loaders."""
import multiprocessing
import os
import shutil
import stat
import subprocess
import sys

import h5py
import numpy as np
import pytest
import torch
from conftest import ROOT, make_file
from torch.utils.data import DataLoader

import datasets
from datasets import (
    LABELS,
    PUBLISHED_CONDITION,
    VITALS,
    BatchOrder,
    DataError,
    LayoutWriter,
    TPP_PPG_dataset,
    check_unchanged,
    create_dataset_index,
    fingerprint,
    fit_normaliser,
    gate_report,
    get_gate,
    load_dataset_index,
    make_loader,
    split_index,
    split_patients,
    vitals_of,
)

KEYS = ["ppg", "map", "dbp", "hr", "tpp"]


@pytest.fixture
def published(tmp_path):
    return make_file(tmp_path / "published.h5")


# ---------------------------------------------------------------------------------- layout and gate

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
     "p_crit_se < 5, p_crit > 5, ppg_quality >= -0.1")])
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
    ("short vital", r"field 'map': float32 of shape \(3,\), expected .*\(8,\)"),
    ("wrong ppg", r"field 'ppg': .* shape \(8, 3000\)"),
    ("text", "field 'map': .* expected numbers"),
    ("scaled", "field 'map': scaled by its attribute 'scale_factor'"),
    ("not written", "field 'map': never written"),
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
    position = TPP_PPG_dataset(index, "segment", KEYS).place(0).split("--who ")[1].split(")")[0]
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
from datasets import LayoutWriter
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


# ------------------------------------------------------------------------------------------ reading

def rows_of(path):
    """Every row of a file in the index's order, read plainly: {key: [S, …]}."""
    found = {key: [] for key in KEYS}
    with h5py.File(path, "r") as file:
        for patient in file.values():
            for encounter in patient.values():
                rows = len(encounter["ppg"])
                for key in KEYS:
                    found[key].append(encounter[key][:].reshape(rows, -1).squeeze())
    return {key: np.concatenate(values) for key, values in found.items()}


@pytest.mark.parametrize("rank", [2, 3])
@pytest.mark.parametrize("layout", ["contiguous", "rows", "lzf", "gzip"])
def test_every_storage_and_both_ppg_shapes_give_the_rows_that_h5py_gives(tmp_path, layout, rank):
    path = make_file(tmp_path / "f.h5", layout=layout, ppg_rank=rank)
    dataset = TPP_PPG_dataset(create_dataset_index(path=path), "segment", KEYS)
    expected = rows_of(path)
    shuffled = np.random.default_rng(0).permutation(len(dataset))
    batch = dataset[shuffled]
    assert batch[0].shape == (len(dataset), 1, 3600) and batch[0].dtype == torch.float32
    for key, got in zip(KEYS, batch):
        assert np.array_equal(got.squeeze().numpy(), expected[key][shuffled])


def test_an_item_is_a_tuple_of_float32_tensors_in_the_order_of_the_keys(published):
    dataset = TPP_PPG_dataset(create_dataset_index(path=published), "segment", ["hr", "ppg", "tpp"])
    hr, ppg, tpp = dataset[3]
    assert (hr.shape, ppg.shape, tpp.shape) == ((), (1, 3600), ())
    assert {t.dtype for t in (hr, ppg, tpp)} == {torch.float32}
    assert dataset[95][1][0, 0] == len(dataset) - 1
    with pytest.raises(IndexError):
        dataset[len(dataset)]


def test_an_experiments_own_dataloader_works_as_published(published):
    dataset = TPP_PPG_dataset(create_dataset_index(path=published), "segment", KEYS)
    loader = DataLoader(dataset, batch_size=32, shuffle=True, num_workers=2, drop_last=True)
    batches = list(loader)
    assert len(batches) == 3 and len(batches[0]) == 5
    assert batches[0][0].shape == (32, 1, 3600) and batches[0][4].shape == (32,)


def test_every_storage_is_right_within_one_batch_and_after_select(tmp_path):
    """Each patient has an encounter in each of five files of different storage."""
    paths, serials = [], []
    layouts = (("rows", {}), ("lzf", {}), ("contiguous", {}), ("rows", {"userblock_size": 512}),
               ("contiguous", {"libver": "latest"}))       # 'latest' does not align data to 4 bytes
    for number, (storage, options) in enumerate(layouts):
        plain = make_file(tmp_path / "plain.h5", 3, layout=storage, seed=number)
        with h5py.File(plain, "r") as source, \
                h5py.File(tmp_path / f"{number}.h5", "w", **options) as target:
            for patient in source:
                for name in source[patient]:
                    copy = target.create_group(f"{patient}/{name}-{number}")
                    for key in (KEYS + ["p_crit", "pp", "r2"])[::-1]:
                        data = source[patient][name][key]
                        copy.create_dataset(key, data=data[:], chunks=data.chunks,
                                            compression=data.compression)
            paths.append(target.filename)
    for path in paths:
        with h5py.File(path, "r") as file:
            serials.append({p: np.concatenate([e["ppg"][:, 0] for e in g.values()])
                            for p, g in file.items()})
    index = create_dataset_index(path=paths, savename=tmp_path / "index.npz")
    expected = np.concatenate([one[p] for p in index.patients for one in serials])
    assert index.encounter_patient.tolist() == sorted(index.encounter_patient)
    order = np.random.default_rng(0).permutation(len(index))
    got = TPP_PPG_dataset(load_dataset_index(tmp_path / "index.npz"), "segment", KEYS)[order]
    assert np.array_equal(got[0][:, 0].numpy(), expected[order])
    keep = np.arange(len(index.encounters)) % 3 > 0
    some = TPP_PPG_dataset(index.select(keep), "segment", KEYS)
    mask = index.per_segment(keep)
    assert np.array_equal(some[np.arange(len(some))][0][:, 0].numpy(), expected[mask])
    loader = make_loader(some, 7, shuffle=True, drop_last=False)
    seen = np.sort(torch.cat([batch[0][:, 0, 5] for batch in loader]).numpy())
    assert np.array_equal(seen, np.sort(expected[mask][:, 5]))


def test_a_field_that_some_encounters_lack_is_made_from_others_or_refused(tmp_path):
    path = make_file(tmp_path / "f.h5")
    with h5py.File(path, "r+") as file:
        del file["MRN001/CSN0010/tpp"], file["MRN002/CSN0020/hr"]
    dataset = TPP_PPG_dataset(create_dataset_index(path=path), "segment", ["tpp", "map", "p_crit"])
    tpp, map_, p_crit = dataset[np.arange(96)]
    assert torch.equal(tpp, map_ - p_crit)
    with pytest.raises(DataError, match="f.h5: no field 'hr' in some"):
        TPP_PPG_dataset(create_dataset_index(path=path), "segment", ["hr", "tpp"])


def test_a_damaged_chunk_is_an_error_that_names_its_file(tmp_path):
    path = make_file(tmp_path / "f.h5", layout="gzip")
    dataset = TPP_PPG_dataset(create_dataset_index(path=path), "segment", ["ppg", "tpp"])
    with h5py.File(path, "r") as file:
        chunk = file["MRN000/CSN0000/ppg"].id.get_chunk_info(0)
    with open(path, "r+b") as file:
        file.seek(chunk.byte_offset + 50)
        file.write(bytes(200))
    os.utime(path, ns=(0, int(dataset.index.stamps[0, 1])))        # as when the disk, not a program
    with pytest.raises(DataError, match=r"f.h5: patient 0, encounter 0 .*'ppg': cannot be read"):
        dataset[0]


def read_in_child(dataset, queue):
    queue.put(float(dataset[np.array([7, 3])][0][1, 0, 0]))


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_a_dataset_opened_before_a_fork_or_spawn_reads_in_the_child(published, method):
    dataset = TPP_PPG_dataset(create_dataset_index(path=published), "segment", KEYS)
    assert dataset[3][0][0, 0] == 3
    context = multiprocessing.get_context(method)
    queue = context.Queue()
    child = context.Process(target=read_in_child, args=(dataset, queue))
    child.start()
    assert queue.get(timeout=60) == 3
    child.join()


def test_a_file_cut_short_after_indexing_is_an_error_and_not_a_bus_error(published):
    dataset = TPP_PPG_dataset(create_dataset_index(path=published), "segment", KEYS)
    dataset[0]
    os.truncate(published, 50_000)
    with pytest.raises(DataError, match="gone or changed since"):
        dataset[90]


def test_percentage_takes_a_share_and_csns_to_skip_leaves_encounters_out(published):
    index = create_dataset_index(path=published)
    half = TPP_PPG_dataset(index, "segment", KEYS, percentage=50)
    assert len(half) == 48
    serials = half[np.arange(48)][0][:, 0, 0]
    assert len(set(serials.tolist())) == 48
    again = TPP_PPG_dataset(index, "segment", KEYS, 50)
    assert torch.equal(serials, again[np.arange(48)][0][:, 0, 0])
    fewer = TPP_PPG_dataset(index, "segment", KEYS, csns_to_skip=["CSN0000"])
    assert len(fewer) == 88 and fewer[0][0][0, 0] == 8


def test_patient_level_draws_one_segment_of_each_patient_by_seed_and_epoch(published):
    index = create_dataset_index(path=published)
    dataset = TPP_PPG_dataset(index, "patient", KEYS, seed=3)
    assert len(dataset) == 6
    draws = []
    for epoch in range(40):
        dataset.set_epoch(epoch)
        serials = dataset[np.arange(6)][0][:, 0, 0].numpy().astype(int)
        assert (serials // 16 == np.arange(6)).all()        # 16 segments a patient: always its own
        draws.append(serials[0])
    assert len(set(draws)) > 10
    dataset.set_epoch(7)
    alone = dataset[4][0][0, 0]
    dataset.set_epoch(7)
    assert dataset[np.array([1, 4])][0][1, 0, 0] == alone    # the draw does not depend on the batch


def test_patient_level_draws_follow_the_epoch_into_workers(published):
    dataset = TPP_PPG_dataset(create_dataset_index(path=published), "patient", KEYS, seed=3)
    loader = make_loader(dataset, 4, shuffle=True, workers=2)
    plain = make_loader(dataset, 4, shuffle=True)
    for epoch in (0, 1):
        loader.sampler.set_epoch(epoch)
        with_workers = torch.cat([batch[0][:, 0, 0] for batch in loader])
        plain.sampler.set_epoch(epoch)
        assert torch.equal(with_workers, torch.cat([batch[0][:, 0, 0] for batch in plain]))


# -------------------------------------------------------------------------------------------- index

def test_the_same_encounter_in_two_files_is_refused(tmp_path):
    a, b = make_file(tmp_path / "a.h5"), make_file(tmp_path / "b.h5")
    with pytest.raises(DataError, match="the same patient and encounter"):
        create_dataset_index(path=[a, b])


def test_only_the_encounters_asked_for_are_indexed(published):
    index = create_dataset_index({"MRN002": ["CSN0021"]}, path=published)
    assert index.patients.tolist() == ["MRN002"] and len(index) == 8
    with pytest.raises(DataError, match="only 0 of the encounters asked"):
        create_dataset_index({"MRN002": ["CSN9"]}, path=published)


def test_names_may_be_numbers(tmp_path):
    path = make_file(tmp_path / "f.h5", patients=3)
    with h5py.File(path, "r+") as file:
        file.move("MRN001/CSN0010", "MRN001/17")
    index = create_dataset_index({"MRN001": [17, 17], "MRN000": ["CSN0001"]}, path=path)
    assert index.encounters.tolist() == ["CSN0001", "17"]
    dataset = TPP_PPG_dataset(index, "segment", KEYS, csns_to_skip={17})
    assert dataset.index.encounters.tolist() == ["CSN0001"]


def test_empty_encounters_and_unusual_names_do_no_harm(tmp_path):
    path = make_file(tmp_path / "f.h5", patients=3)
    with h5py.File(path, "r+") as file:
        file.move("MRN001", "Jos\u00e9 \u5f20")
        empty = file.create_group("MRN002/empty")
        for key in ("ppg", "map", "dbp", "hr", "p_crit", "pp", "r2"):
            empty.create_dataset(key, (0, 3600) if key == "ppg" else (0,), "f4")
    index = create_dataset_index(path=path, savename=tmp_path / "index.npz")
    assert len(index) == 48 and "empty" not in index.encounters
    parts = split_index(load_dataset_index(tmp_path / "index.npz"))
    assert sum(map(len, parts.values())) == 48
    assert gate_report(path)[0][2] == 48
    with h5py.File(path, "r+") as file:
        file["MRN002"].move("CSN0021", b"\xff-1")           # no UTF-8: h5py cannot read it
    with pytest.raises(DataError, match="f.h5: cannot be read"):
        create_dataset_index(path=path)
    with h5py.File(tmp_path / "none.h5", "w") as file:
        file.create_dataset("p/e/ppg", (0, 3600), "f4")
    with pytest.raises(DataError, match="no segment passes"):
        create_dataset_index(path=tmp_path / "none.h5", condition="any")


def test_a_saved_index_is_an_npz_without_pickles_and_gives_the_same_rows(tmp_path):
    path = make_file(tmp_path / "f.h5")
    made = create_dataset_index(path=path, savename=tmp_path / "index.npz")
    loaded = load_dataset_index(tmp_path / "index.npz")
    assert sorted(os.listdir(tmp_path)) == ["f.h5", "index.npz"]
    with np.load(tmp_path / "index.npz", allow_pickle=False) as saved:
        assert all(saved[key].dtype.kind in "iufU" for key in saved.files)
    items = np.arange(0, len(made), 5)
    before, after = (TPP_PPG_dataset(index, "segment", KEYS)[items] for index in (made, loaded))
    assert all(torch.equal(a, b) for a, b in zip(before, after))


def test_the_index_of_large_data_is_kept_by_itself_until_file_or_gate_change(
        tmp_path, published, monkeypatch):
    kept = tmp_path / "published.h5.index.npz"
    create_dataset_index(path=published)
    assert not kept.exists()                                        # small data
    monkeypatch.setattr(datasets, "LARGE_BYTES", 0)
    (tmp_path / "published.h5.index.npz.1.partial").write_bytes(b"names")       # of a killed run
    made = create_dataset_index(path=published)
    first = kept.stat().st_mtime_ns
    assert stat.S_IMODE(kept.stat().st_mode) == 0o600
    assert sorted(os.listdir(tmp_path)) == ["published.h5", "published.h5.index.npz"]
    assert np.array_equal(create_dataset_index(path=published).rows, made.rows)
    assert kept.stat().st_mtime_ns == first                         # read, not made again
    assert len(create_dataset_index(path=published, condition="map > 80")) < len(made)
    with h5py.File(published, "r+") as file:
        file["MRN001/CSN0010/r2"][0] = 0.1
    assert len(create_dataset_index(path=published)) == len(made) - 1
    kept.write_bytes(kept.read_bytes()[:-200])                      # damaged: made again
    assert len(create_dataset_index(path=published)) == len(made) - 1
    assert len(load_dataset_index(kept)) == len(made) - 1


def test_a_file_that_is_no_index_is_never_overwritten(tmp_path, published, monkeypatch):
    monkeypatch.setattr(datasets, "LARGE_BYTES", 0)
    mine = tmp_path / "published.h5.index.npz"
    np.savez(mine, my_array=np.zeros(3))
    before = mine.read_bytes()
    assert len(create_dataset_index(path=published)) == 96
    with pytest.raises(DataError, match="not a saved index; not overwritten"):
        create_dataset_index(path=published, savename=published)
    assert mine.read_bytes() == before and len(create_dataset_index(path=published)) == 96


def test_an_index_of_an_older_table_of_fields_is_made_again(tmp_path, published, monkeypatch):
    create_dataset_index(path=published, savename=tmp_path / "index.npz")
    spo2 = dict(datasets.FIELDS, spo2=datasets.Field("f4", "%", "vital", 40, 100))
    monkeypatch.setattr(datasets, "FIELDS", spo2)
    with pytest.raises(DataError, match="not a saved index of this version"):
        load_dataset_index(tmp_path / "index.npz")


def test_a_saved_index_is_refused_when_its_file_changed_and_when_it_is_none(tmp_path, published):
    create_dataset_index(path=published, savename=tmp_path / "index.npz")
    os.utime(published, ns=(0, 0))
    with pytest.raises(DataError, match="gone or changed since"):
        load_dataset_index(tmp_path / "index.npz")
    whole = (tmp_path / "index.npz").read_bytes()
    np.save(tmp_path / "array.npy", np.zeros(3))
    np.savez(tmp_path / "other.npz", version=0)
    for name, content in (("no.npz", b"no index"), ("cut.npz", whole[:-100]), ("empty.npz", b""),
                          ("array.npy", None), ("other.npz", None)):
        if content is not None:
            (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match=f"{name}: not a saved index"):
            load_dataset_index(tmp_path / name)
    with pytest.raises(DataError, match="absent.npz: not a saved index"):
        load_dataset_index(tmp_path / "absent.npz")


@pytest.mark.parametrize("what", ["ppg", "map", "tpp", "rows"])
def test_the_fingerprint_covers_every_key_that_is_read(tmp_path, published, what):
    index = create_dataset_index(path=published)
    before = fingerprint(index, KEYS)
    copy = tmp_path / "copy.h5"
    shutil.copy(published, copy)
    assert fingerprint(create_dataset_index(path=copy), KEYS) == before
    assert fingerprint(index, KEYS[1:]) != before
    if what == "rows":
        changed = create_dataset_index(path=published, condition="r2 > 0.61")
    else:
        with h5py.File(published, "r+") as file:
            values = file["MRN003/CSN0031"][what]
            values[...] = values[:][..., ::-1].copy() if what == "ppg" else values[:] + 1
        with pytest.raises(DataError, match="changed since the index was made"):
            check_unchanged(index)
        changed = create_dataset_index(path=published)
    assert len(changed) == 96 or what == "rows"
    assert fingerprint(changed, KEYS) != before


# -------------------------------------------------------------------------------------------- split

def test_no_patient_is_in_two_parts_and_no_part_is_empty(tmp_path):
    for patients in (3, 5, 12):
        index = create_dataset_index(path=make_file(tmp_path / f"{patients}.h5", patients, 1, 2))
        parts = split_index(index, split_seed=1)
        names = [set(p.patients.tolist()) for p in parts.values()]
        assert all(names) and len(set.union(*names)) == sum(map(len, names)) == patients
        assert sum(map(len, parts.values())) == len(index)


def test_from_100_patients_on_a_patients_part_survives_growth_and_reordering():
    patients = [f"p{i}" for i in range(1000)]
    parts = dict(zip(patients, split_patients(patients, 5)))
    grown = patients[::-1] + [f"new{i}" for i in range(500)]
    assert all(parts.get(p, part) == part for p, part in zip(grown, split_patients(grown, 5)))
    shares = np.bincount(list(parts.values())) / 1000
    assert np.allclose(shares, [0.8, 0.1, 0.1], atol=0.03)
    assert list(split_patients(patients, 6)) != list(parts.values())


def test_fewer_patients_than_parts_are_refused(tmp_path):
    with pytest.raises(DataError, match="2 patients with usable segments: expected at least 3"):
        split_index(create_dataset_index(path=make_file(tmp_path / "f.h5", patients=2)))


@pytest.fixture(scope="module")
def three_sources(tmp_path_factory):
    """Three files of 7, 4 and 9 patients, one of whom has an encounter in the first as well."""
    folder, paths, first = tmp_path_factory.mktemp("sources"), [], 0
    for number, patients in enumerate((7, 4, 9)):
        plain = make_file(folder / "plain.h5", patients, 1, 3, seed=number)
        with h5py.File(plain, "r") as source, h5py.File(folder / f"{number}.h5", "w") as target:
            for i, name in enumerate(source):
                source.copy(name, target, name=f"p{first + i}")
            if number == 0:
                source.copy("MRN000/CSN0000", target.create_group("p19"), name="later")
        paths.append(folder / f"{number}.h5")
        first += patients
    return paths


def folds_of(index, split_seed, folds):
    """One {part: [patients]} for each fold."""
    splits = [split_index(index, split_seed, fold=fold, folds=folds) for fold in range(folds)]
    return [{name: part.patients.tolist() for name, part in parts.items()} for parts in splits]


@pytest.mark.parametrize("folds", [3, 5, 20])
def test_folds_test_each_patient_once_and_share_out_every_source_evenly(three_sources, folds):
    index = create_dataset_index(path=three_sources)
    splits = folds_of(index, 1, folds)
    assert sorted(sum((one["test"] for one in splits), [])) == sorted(index.patients)
    for one, following in zip(splits, splits[1:] + splits[:1]):
        assert sorted(sum(one.values(), [])) == sorted(index.patients)      # so they are disjoint
        assert one["train"] and one["tune"] == following["test"]
    for source in (range(7), range(7, 11), range(11, 20), range(20)):
        tested = [sum(int(p[1:]) in source for p in one["test"]) for one in splits]
        assert max(tested) - min(tested) <= 1


def test_folds_are_a_function_of_the_patients_and_the_split_seed(tmp_path, three_sources):
    first = folds_of(create_dataset_index(path=three_sources), 1, 4)
    assert folds_of(create_dataset_index(path=three_sources[::-1]), 1, 4) == first
    moved = []
    for path in three_sources:                      # renamed, and their encounters the other way
        moved.append(tmp_path / f"x{9 - len(moved)}.h5")
        with h5py.File(path, "r") as source, \
                h5py.File(moved[-1], "w", track_order=True) as target:
            for name in reversed(list(source)):
                source.copy(name, target)
    assert folds_of(create_dataset_index(path=moved), 1, 4) == first
    assert folds_of(create_dataset_index(path=three_sources), 2, 4) != first


@pytest.mark.parametrize("fold, folds", [(0, 2), (0, 7), (6, 6), (-1, 6), (None, 6), (1, None)])
def test_folds_that_there_cannot_be_are_refused(published, fold, folds):
    with pytest.raises(DataError, match=f"fold {fold} of {folds}, 6 patients .*3 folds or more"):
        split_index(create_dataset_index(path=published), fold=fold, folds=folds)


def test_without_folds_a_split_is_the_one_it_has_always_been(published):
    parts = split_index(create_dataset_index(path=published))
    assert [part.patients.tolist() for part in parts.values()] == [
        ["MRN000", "MRN002", "MRN003", "MRN005"], ["MRN004"], ["MRN001"]]
    first = split_patients([f"p{i}" for i in range(1000)], 5)[:22]
    assert first.tolist() == [1, 2, 0, 0, 0, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 2, 0, 2, 1, 0, 0, 1]


# ------------------------------------------------------------------------------------------ loaders

@pytest.mark.parametrize("layout", ["contiguous", "lzf"])
def test_a_shuffled_epoch_holds_every_segment_once_and_the_next_differs(tmp_path, layout):
    path = make_file(tmp_path / "f.h5", layout=layout)
    dataset = TPP_PPG_dataset(create_dataset_index(path=path), "segment", KEYS)
    loader = make_loader(dataset, 10, shuffle=True, drop_last=False)
    epochs = []
    for epoch in (0, 1, 0):
        loader.sampler.set_epoch(epoch)
        epochs.append(torch.cat([batch[0][:, 0, 0] for batch in loader]).tolist())
        assert sorted(epochs[-1]) == list(range(96))
    assert epochs[0] == epochs[2] != epochs[1]


@pytest.mark.parametrize("level", ["segment", "patient"])
def test_batches_made_on_a_device_are_those_of_the_plain_loader(published, level):
    dataset = TPP_PPG_dataset(create_dataset_index(path=published), level, KEYS)
    how = {"shuffle": True, "seed": 3, "rank": 1, "world": 2}
    plain, cached = (make_loader(dataset, 10, **how, device_cache=device)
                     for device in (None, "cpu"))
    assert plain.device is None and cached.device.type == "cpu" and len(plain) == len(cached)
    for epoch, first_batch in ((0, 0), (1, 0), (1, len(plain) - 1)):
        batches = []
        for loader in (plain, cached):
            loader.sampler.set_epoch(epoch, first_batch)
            batches.append(list(loader))
        assert len(batches[0]) == len(batches[1]) == len(plain) - first_batch
        assert all(torch.equal(a, b) for one, other in zip(*batches) for a, b in zip(one, other))


def run_here(code, path, *shell):
    """All that Python code prints in a shell with these preparations."""
    code = f"import sys; sys.path[:0] = [{ROOT!r}]\nfrom datasets import *\nP = {path!r}\n{code}"
    shell = "; ".join([*shell, f'exec {sys.executable} -c "$CODE"'])
    done = subprocess.run(["bash", "-c", shell], capture_output=True, text=True,
                          env=dict(os.environ, CODE=code))
    return (done.stdout + done.stderr).strip()


READ_ALL = """
try:
    data = TPP_PPG_dataset(create_dataset_index(path=P), 'segment', ['ppg', 'map', 'tpp'])
    loader = make_loader(data, 32, shuffle=True, drop_last=False, workers=WORKERS)
    print(sum(int(batch[0][:, 0, 0].sum()) for epoch in range(2) for batch in loader))
except DataError as error:
    print('DataError:', error)
"""


MAP_FEW = """
import datasets, functools
datasets.map_rows = functools.lru_cache(5)(datasets.map_rows.__wrapped__)
"""


def test_more_files_than_may_be_open_are_read(tmp_path):
    paths = []
    for number in range(40):
        paths.append(str(tmp_path / f"{number}.h5"))
        with h5py.File(make_file(tmp_path / "plain.h5", 1, 1, 2), "r") as source, \
                h5py.File(paths[-1], "w") as target:
            source.copy("MRN000", target, name=f"p{number}")
            if number % 2:                                  # these are read by h5py
                group = target[f"p{number}/CSN0000"]
                ppg = group["ppg"][:].astype("f8")
                del group["ppg"]
                group["ppg"] = ppg
    code = MAP_FEW + READ_ALL.replace("WORKERS", "0")
    assert run_here(code, paths, "ulimit -n 30").splitlines()[0] == "80"


def test_a_killed_worker_is_one_line(published):
    kill = """
import os, signal
data = TPP_PPG_dataset(create_dataset_index(path=P), 'segment', ['ppg', 'tpp'])
try:
    for batch in make_loader(data, 2, workers=2):
        with open(f'/proc/{os.getpid()}/task/{os.getpid()}/children') as file:
            os.kill(int(file.read().split()[-1]), signal.SIGKILL)
except DataError as error:
    print('DataError:', error)
"""
    assert run_here(kill, published, "exec 2>&1").splitlines()[0].startswith(
        "DataError: a loader worker failed")


@pytest.mark.skipif(os.getuid() != 0 or not os.path.exists("/dev/shm"), reason="needs mount")
@pytest.mark.parametrize("workers, expected", [(0, "9120"), (2, "DataError: a loader worker")])
def test_a_full_dev_shm_is_one_line_and_no_matter_without_workers(published, workers, expected):
    fill = "mount -t tmpfs -o size=4k tmpfs /dev/shm && head -c 4096 /dev/zero > /dev/shm/x"
    script = f"unshare -m bash -c '{fill}; exec {sys.executable} -c \"$CODE\"' && exit"
    if subprocess.run(["unshare", "-m", "true"]).returncode:
        pytest.skip("needs unshare")
    got = run_here(READ_ALL.replace("WORKERS", str(workers)), published, script)
    assert got.startswith(expected) and len(got.splitlines()) == 1, got


def test_without_set_epoch_each_pass_is_another_epoch(published):
    dataset = TPP_PPG_dataset(create_dataset_index(path=published), "segment", ["ppg", "tpp"])
    loader = make_loader(dataset, 32, shuffle=True)
    passes = [torch.cat([batch[0][:, 0, 0] for batch in loader]) for _ in range(2)]
    assert not torch.equal(*passes)
    loader.sampler.set_epoch(0)
    assert torch.equal(torch.cat([batch[0][:, 0, 0] for batch in loader]), passes[0])


def test_workers_change_neither_the_order_nor_the_random_numbers_of_the_network(published):
    dataset = TPP_PPG_dataset(create_dataset_index(path=published), "segment", KEYS)
    loaders = [make_loader(dataset, 10, shuffle=True, workers=n) for n in (0, 2)]
    before = torch.random.get_rng_state()
    orders = [[batch[0][:, 0, 0].tolist() for batch in loader] for loader in loaders]
    assert orders[0] == orders[1]
    assert torch.equal(before, torch.random.get_rng_state())


def test_tune_and_test_batches_are_neither_shuffled_nor_dropped(published):
    dataset = TPP_PPG_dataset(create_dataset_index(path=published), "segment", KEYS)
    loader = make_loader(dataset, 20)
    serials = torch.cat([batch[0][:, 0, 0] for batch in loader])
    assert serials.tolist() == list(range(96)) and len(loader) == 5


def test_an_incomplete_train_batch_is_dropped_only_behind_a_full_one(published):
    dataset = TPP_PPG_dataset(create_dataset_index(path=published), "segment", KEYS)
    assert [len(b[0]) for b in make_loader(dataset, 90, shuffle=True)] == [90]
    assert [len(b[0]) for b in make_loader(dataset, 100, shuffle=True)] == [96]


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_share_each_batch_without_loss_or_doubling(published, world):
    dataset = TPP_PPG_dataset(create_dataset_index(path=published), "segment", KEYS)
    one = list(BatchOrder(dataset, 20, shuffle=True))
    ranks = [list(BatchOrder(dataset, 20, shuffle=True, rank=r, world=world)) for r in range(world)]
    for whole, *shares in zip(one, *ranks):
        assert np.array_equal(np.concatenate(shares), whole)


def test_the_normaliser_is_that_of_the_segments_it_is_fitted_on(published):
    parts = split_index(create_dataset_index(path=published))
    train = TPP_PPG_dataset(parts["train"], "segment", KEYS)
    fitted = fit_normaliser(train, KEYS[1:])
    values = train[np.arange(len(train))][3].numpy().astype("f8")
    assert fitted["hr"]["mean"] == pytest.approx(values.mean(), rel=1e-9)
    assert fitted["hr"]["sd"] == pytest.approx(values.std(), rel=1e-9)
    assert fitted["hr"]["unit"] == "beats/min"


@pytest.mark.parametrize("value", [70.1, np.nan])
def test_a_field_that_cannot_be_normalised_is_refused(published, value):
    with h5py.File(published, "r+") as file:
        for patient in file.values():
            for encounter in patient.values():
                encounter["fit_rmse"][:] = value
    dataset = TPP_PPG_dataset(create_dataset_index(path=published), "segment", KEYS)
    with pytest.raises(DataError, match="constant or not finite"):
        fit_normaliser(dataset, ["fit_rmse"])


def test_shuffling_compressed_data_says_how_to_make_it_fast(tmp_path, capsys):
    for storage in ("gzip", "contiguous"):
        path = make_file(tmp_path / "f.h5", layout=storage)
        dataset = TPP_PPG_dataset(create_dataset_index(path=path), "segment", KEYS)
        make_loader(dataset, 8)
        assert not capsys.readouterr().err
        make_loader(dataset, 8, shuffle=True)
        said = f"h5repack -l CONTI -f NONE {path} NEW" in capsys.readouterr().err
        assert said == (storage == "gzip")
