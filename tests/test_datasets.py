"""datasets.py on real files: layout, gate, every storage, index, split."""
import os
import shutil

import h5py
import numpy as np
import pytest
import torch
from conftest import KEYS, fork, make_file, printed_by, run, serials
from torch.utils.data import DataLoader

import datasets
from checkpoint import fingerprint
from datasets import DataError, TPP_PPG_dataset, create_dataset_index, split_index


@pytest.mark.parametrize("condition, text", [
    (["r2 > 0.5", "p_crit<map"], "r2 > 0.5, p_crit < map"), ("any", "any"), ("default", "default"),
    (["default", "p_crit_se <= 5.5"], "default, p_crit_se <= 5.5"), ("r2_gt_5", "r2 > 0.5"),
    (datasets.PUBLISHED_CONDITION, "default, minutes >= 100"),
    ("r2 > 0.5, minutes >= 99.5", "r2 > 0.5, minutes >= 100"),
    ("rmse_lt_3_and_pcrit_gt_0_pcrit_lt_map_pp_gt_10",
     "fit_rmse < 3, p_crit > 0, p_crit < map, pp > 10, minutes >= 100"),
    ("p_crit_se < 5, p_crit > 5, ppg_quality >= -1e-1",         # names that are prefixes
     "p_crit_se < 5, p_crit > 5, ppg_quality >= -0.1")])
def test_a_gate_is_written_as_comparisons_and_reads_its_own_text(condition, text):
    gate = datasets.get_gate(condition)
    assert str(gate) == text and datasets.get_gate(text) == gate


@pytest.mark.parametrize("wrong", ["", "r2 >", "r2 = 1", "r2 > 0.5x", "sodium > 3", "ppg > 0",
                                   "r2 > nan", "r2_gt_6", "minutes < 5", "r2 > 0.5 map < 3", []])
def test_a_condition_that_cannot_be_read_names_the_fields(wrong):
    with pytest.raises(DataError, match="such as 'r2 > 0.5' .* map, sbp, .* p_crit, r2"):
        datasets.get_gate(wrong)


def test_each_rule_refuses_its_segments_and_the_report_counts_them(tmp_path):
    path = make_file(tmp_path / "f.h5", patients=3, encounters=1, rows=20)
    wrong = [("r2", 0.5), ("p_crit", -1), ("p_crit", 95), ("pp", 10), ("map", 120), ("hr", np.nan),
             ("sbp", np.inf), ("map", -32768), ("hr", 8388607), ("dbp", 95), ("sbp", 65), ("pp", 2)]
    with h5py.File(path, "r+") as file:
        group = file["MRN001/CSN0010"]
        for row, (key, value) in enumerate(wrong):
            group[key][row] = value
        group["ppg"][12, 0, 1234] = np.inf
        group["sbp"][4] = 125
    report = {rule: (broken, left) for rule, broken, left in datasets.gate_report(path)}
    assert report["all segments"] == (0, 60) and report["finite PPG"] == (1, 59)
    assert report["finite vitals and label"] == (2, 57)
    assert report["plausible vitals"] == (6, 52)                # the infinite SBP counts twice
    assert report["r2 > 0.5"] == (1, 51) and report["p_crit > 0"] == (1, 50)
    assert report["p_crit < map"][0] >= 1 and report["p_crit < 100"][1] == 47
    assert len(create_dataset_index(path=path)) == 47
    assert len(create_dataset_index(path=path, condition="any")) == 52
    with pytest.raises(DataError, match="no segment passes"):
        create_dataset_index(path=path, condition=datasets.PUBLISHED_CONDITION)
    for sign, kept in ((">", 2), (">=", 3), ("<", 17), ("<=", 18)):     # open or closed
        gate, hr = datasets.get_gate(f"hr {sign} 77"), np.arange(60.0, 80.0)
        assert datasets.passes_gate(gate, {"hr": hr}.get, np.isfinite(hr)).sum() == kept


@pytest.mark.parametrize("spoil, message", [
    (lambda group: group.pop("r2"), "patient 1, encounter 0.*no field 'r2'"),
    (lambda group: group.pop("ppg"), "patient 1, encounter 0.*no field 'ppg'"),
    (lambda group: group["map"].attrs.update(scale_factor=0.1),
     "patient 1, encounter 0.*field 'map': scaled by its attribute 'scale_factor'"),
    (lambda group: (group.pop("map"), group.update(map=[b"MRN0"] * 8)), "map"),
    (lambda group: group.update(map=group.pop("map")[:5]), "patient 1, encounter 0.*map"),
    (lambda group: group.update(ppg=group.pop("ppg")[..., :3000]), "patient 1, encounter 0.*ppg"),
    (lambda group: (group.pop("map"), group.update(map=h5py.ExternalLink("a.h5", "/map"))),
     "patient 1"),
    (lambda group: (group.pop("map"), group.create_dataset("map", (8,), "f4")), "map"),
    (lambda group: group.file.attrs.update(fs=125), "segments of 60 s at 60 Hz"),
    (lambda group: [group.file.pop(name) for name in list(group.file)], "found no encounter")])
def test_a_malformed_file_is_refused_in_one_line_without_identifiers(published, spoil, message):
    with h5py.File(published, "r+") as file:
        spoil(file["MRN001/CSN0010"])
    with pytest.raises(DataError, match=message) as error:
        create_dataset_index(path=published)
    assert not any(text in str(error.value) for text in ("\n", "MRN0", "CSN"))
    with open(published, "w") as file:
        file.write("no HDF5")
    with pytest.raises(DataError, match="not a readable HDF5 file"):
        create_dataset_index(path=published)


def test_items_other_than_patients_are_ignored(tmp_path, published):
    other = make_file(tmp_path / "other.h5", seed=1)
    with h5py.File(published, "r+") as file:
        file["AAA notes"] = "written by hand"
        file["AAB/settings/table"] = np.zeros(3)
        file["MRN000/age"] = 71
        file["MRN000/AA/lactate"] = np.zeros(8)
        file["MRN000/CSN0000/map"].attrs.update(units="mmHg", gain=1.0)
        file["MRN1"] = h5py.SoftLink("/MRN001")             # would duplicate a patient
        file["MRN2"] = h5py.ExternalLink(other, "/MRN001")
    index = create_dataset_index(path=published)
    assert len(index) == 96 and index.patients.tolist() == [f"MRN{n:03d}" for n in range(6)]
    position = TPP_PPG_dataset(index, "segment", KEYS).place(0).split("--who ")[1].split(")")[0]
    done = run("checkpoint.py", published, "--who", position, "99")
    assert done.stdout == f"{position}: MRN000/CSN0000\n99: not in this file\n"


def test_the_writer_makes_a_readable_file_and_refuses_wrong_input(tmp_path):
    fields = {"ppg": np.random.default_rng(0).random((3, 3600)), "map": np.full(3, 80),
              "dbp": np.full(3, 60), "hr": np.full(3, 70), "p_crit": np.array([30, 31, 32]),
              "r2": np.full(3, 0.9), "pp": np.full(3, 50), "reason": np.array([0, 0, 4])}
    fields["tpp"] = fields["map"] - fields["p_crit"]
    path = tmp_path / "f.h5"
    with datasets.LayoutWriter(path, "recordings", "published", "foot", ("a", "b", "c")) as out:
        out.write("p", "e", fields)
        for patient, encounter, wrong, message in (
                ("p", "e/4", fields, "without '/'"), ("", "e", fields, "non-empty"),
                ("p", "e", fields, "once"), ("p", "e2", {"ppg": fields["ppg"]}, "'ppg' and 'reas"),
                ("p", "e2", dict(fields, sodium=np.zeros(3)), "'sodium'"),
                ("p", "e4", dict(fields, ppg=np.full((3, 3600), 1e300)), "non-finite")):  # float32
            with pytest.raises(DataError, match=message), np.errstate(over="ignore"):
                out.write(patient, encounter, wrong)
    index = create_dataset_index(path=path)
    assert index.rows.tolist() == [0, 1]
    with h5py.File(path, "r+") as file:
        assert file.attrs["origin"] == "recordings" and file.attrs["fs"] == 60
        assert file["p/e/ppg"].chunks is None and file["p/e/reason"].dtype == np.uint32
        file.attrs["origin"] = np.bytes_("recordings")      # as other programs write it
    assert datasets.origin_of([path]) == "recordings"


def test_a_full_disk_is_an_error_in_one_line_and_not_a_crash(tmp_path):
    resource = pytest.importorskip("resource", reason="limits of a process are of POSIX")

    def write():
        resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))
        with datasets.LayoutWriter("f.h5", "recordings", "published", "foot", ["a"]) as out:
            for i in range(30):
                out.write(f"p{i}", "e", {"ppg": np.zeros((4, 3600)), "reason": np.zeros(4)})

    text = printed_by([fork(write, tmp_path)], tmp_path, code=1)
    assert text.splitlines()[-1] == "OSError: [Errno 27] File too large: 'f.h5'"


def test_items_are_tuples_of_float32_tensors_also_in_a_spawned_worker_of_a_dataloader(dataset):
    item = dataset[3]
    assert [t.shape for t in item] == [(1, 3600), (), (), (), ()]
    assert {t.dtype for t in item} == {torch.float32} and item[0][0, 0] == 3
    with pytest.raises(IndexError):
        dataset[len(dataset)]
    batches = list(DataLoader(dataset, batch_size=32, shuffle=True, num_workers=1,
                              multiprocessing_context="spawn"))
    assert [t.shape[0] for t in batches[0]] == [32] * 5
    assert sorted(serials(batches)) == list(range(96))


def test_every_storage_and_both_ppg_shapes_give_the_rows_that_h5py_gives(tmp_path):
    """Each patient has an encounter in each of six files; one batch reads all."""
    paths, layouts = [], (("rows", 3, {}), ("lzf", 2, {}), ("gzip", 3, {}), ("contiguous", 3, {}),
                          ("rows", 2, {"userblock_size": 512}),
                          ("contiguous", 2, {"libver": "latest"}))     # not aligned to 4 bytes
    for number, (storage, rank, options) in enumerate(layouts):
        plain = make_file(tmp_path / "plain.h5", 3, 1, layout=storage, ppg_rank=rank, seed=number)
        paths.append(tmp_path / f"{number}.h5")
        with h5py.File(plain, "r") as source, h5py.File(paths[-1], "w", **options) as target:
            for patient in source:
                source.copy(f"{patient}/CSN{patient[3:]}0", target.create_group(patient),
                            name=f"{number}")
    index = create_dataset_index(path=paths)
    order = np.random.default_rng(0).permutation(len(index))
    batch = TPP_PPG_dataset(index, "segment", KEYS)[order]
    assert batch[0].shape == (len(index), 1, 3600) and batch[0].dtype == torch.float32
    files = [h5py.File(path, "r") for path in paths]
    for key, got in zip(KEYS, batch):
        expected = np.concatenate([file[f"{patient}/{number}/{key}"][:].reshape(8, -1)
                                   for patient in files[0] for number, file in enumerate(files)])
        assert np.array_equal(got.reshape(len(index), -1).numpy(), expected[order])


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
    os.utime(path, ns=(0, int(dataset.index.stamps[0, 1])))        # the disk failed, nobody wrote
    with pytest.raises(DataError, match=r"f.h5: patient 0, encounter 0 .*'ppg': cannot be read"):
        dataset[0]


def test_a_file_cut_short_after_indexing_is_an_error_and_not_a_bus_error(dataset, published):
    dataset[0]
    os.truncate(published, 50_000)
    with pytest.raises(DataError, match="gone or changed since"):
        dataset[90]


def test_percentage_takes_a_random_share(dataset):
    half, again = (TPP_PPG_dataset(dataset.index, "segment", KEYS, 50) for _ in range(2))
    assert len(half) == 48 == len(set(serials([half[np.arange(48)]])))
    assert serials([half[np.arange(48)]]) == serials([again[np.arange(48)]])


def test_patient_level_draws_one_segment_of_each_patient_by_seed_and_epoch(dataset):
    patients = TPP_PPG_dataset(dataset.index, "patient", KEYS, seed=3)
    assert len(patients) == 6
    draws = []
    for epoch in range(40):
        patients.set_epoch(epoch)
        draws.append(np.array(serials([patients[np.arange(6)]]), int))
        assert (draws[-1] // 16 == np.arange(6)).all()      # 16 segments a patient: always its own
    assert len({draw[0] for draw in draws}) > 10
    patients.set_epoch(7)
    assert patients[4][0][0, 0] == draws[7][4]              # the draw does not depend on the batch


def test_only_the_encounters_asked_for_are_indexed_once_and_may_be_skipped(tmp_path, published):
    with h5py.File(published, "r+") as file:
        file.move("MRN001/CSN0010", "MRN001/17")
    index = create_dataset_index({"MRN001": [17, 17], "MRN000": ["CSN0001"]}, "any", path=published)
    assert index.encounters.tolist() == ["CSN0001", "17"]
    some = TPP_PPG_dataset(index, "segment", KEYS, csns_to_skip={"CSN0001"})
    assert serials([some[np.arange(len(some))]]) == list(range(16, 24))
    assert len(TPP_PPG_dataset(index, "segment", KEYS, csns_to_skip={17})) == 8
    with pytest.raises(DataError, match="only 0 of the encounters asked"):
        create_dataset_index({"MRN002": ["CSN9"]}, path=published)
    with pytest.raises(DataError, match="the same patient and encounter"):
        create_dataset_index(path=[published, make_file(tmp_path / "b.h5")])


def test_empty_encounters_and_unusual_names_do_no_harm(tmp_path, published):
    with h5py.File(published, "r+") as file:
        file.move("MRN001", "Jos\u00e9 \u5f20")
        empty = file.create_group("MRN002/empty")
        for key in ("ppg", "map", "dbp", "hr", "p_crit", "pp", "r2"):
            empty.create_dataset(key, (0, 3600) if key == "ppg" else (0,), "f4")
    index = create_dataset_index(path=published, savename=tmp_path / "index.npz")
    assert len(index) == 96 and "empty" not in index.encounters
    assert datasets.gate_report(published)[0][2] == 96
    parts = split_index(datasets.load_dataset_index(tmp_path / "index.npz"))
    assert sum(map(len, parts.values())) == 96
    with h5py.File(published, "r+") as file:
        file["MRN002"].move("CSN0021", b"\xff-1")           # no UTF-8: h5py cannot read it
    with pytest.raises(DataError, match="published.h5: cannot be read"):
        create_dataset_index(path=published)


def test_a_saved_index_is_plain_data_and_other_files_are_refused(tmp_path, published, monkeypatch):
    path, items = tmp_path / "index.npz", np.arange(0, 96, 5)
    made = create_dataset_index(path=published, savename=path)
    with np.load(path, allow_pickle=False) as saved:
        assert all(saved[key].dtype.kind in "iufU" for key in saved.files)
    before, after = (TPP_PPG_dataset(index, "segment", KEYS)[items]
                     for index in (made, datasets.load_dataset_index(path)))
    assert all(torch.equal(a, b) for a, b in zip(before, after))
    np.save(tmp_path / "array.npy", np.zeros(3))
    (tmp_path / "cut.npz").write_bytes(path.read_bytes()[:-100])
    (tmp_path / "empty.npz").write_bytes(b"")
    for name in ("array.npy", "cut.npz", "empty.npz", "absent.npz"):
        with pytest.raises(DataError, match=f"{name}: not a saved index"):
            datasets.load_dataset_index(tmp_path / name)
    with monkeypatch.context() as patch, pytest.raises(DataError, match="made with other fields"):
        spo2 = datasets.Field("f4", "%", "vital", 40, 100)
        patch.setattr(datasets, "FIELDS", dict(datasets.FIELDS, spo2=spo2))
        datasets.load_dataset_index(path)


def test_an_index_of_large_data_is_kept_until_file_or_gate_change(tmp_path, published, monkeypatch):
    kept = tmp_path / "published.h5.index.npz"
    create_dataset_index(path=published)
    assert not kept.exists()                                        # small data
    monkeypatch.setattr(datasets, "LARGE_BYTES", 0)
    (tmp_path / "published.h5.index.npz.1.partial").write_bytes(b"names")       # of a killed run
    made = create_dataset_index(path=published)
    first = kept.stat().st_mtime_ns
    assert kept.stat().st_mode & 0o777 == 0o600
    assert sorted(os.listdir(tmp_path)) == ["published.h5", "published.h5.index.npz"]
    create_dataset_index(path=published)
    assert kept.stat().st_mtime_ns == first                         # read, not made again
    with h5py.File(published, "r+") as file:
        file["MRN001/CSN0010/r2"][0] = 0.1
    assert len(create_dataset_index(path=published)) == len(made) - 1
    assert len(create_dataset_index(path=published, condition="map > 80")) < len(made) - 1
    kept.write_bytes(kept.read_bytes()[:-200])                      # damaged: made again
    assert len(create_dataset_index(path=published)) == len(made) - 1
    assert len(datasets.load_dataset_index(kept)) == len(made) - 1
    kept.write_bytes(b"mine")                                       # another file: left alone
    assert len(create_dataset_index(path=published)) == len(made) - 1
    assert kept.read_bytes() == b"mine"
    with pytest.raises(DataError, match="not a saved index; not overwritten"):
        create_dataset_index(path=published, savename=published)


@pytest.mark.parametrize("what", ["ppg", "map", "tpp"])
def test_the_fingerprint_covers_every_key_that_is_read(tmp_path, published, what):
    index = create_dataset_index(path=published)
    before = fingerprint(index, KEYS)
    copy = tmp_path / "copy.h5"
    shutil.copy(published, copy)
    assert fingerprint(create_dataset_index(path=copy), KEYS) == before
    assert fingerprint(index, KEYS[1:]) != before
    with h5py.File(published, "r+") as file:
        values = file["MRN003/CSN0031"][what]
        values[...] = values[:][..., ::-1].copy()
    changed = create_dataset_index(path=published)
    assert len(changed) == 96 and fingerprint(changed, KEYS) != before


def test_below_100_patients_no_part_is_empty():
    for count, sizes in ((3, [1, 1, 1]), (14, [12, 1, 1]), (99, [79, 10, 10])):
        parts = datasets.split_patients([f"p{i}" for i in range(count)], 1)
        assert np.bincount(parts).tolist() == sizes
    with pytest.raises(DataError, match="2 patients with usable segments: expected at least 3"):
        datasets.split_patients(["a", "b"])


def test_from_100_patients_on_a_patients_part_survives_growth_and_reordering():
    split, patients = datasets.split_patients, [f"p{i}" for i in range(1000)]
    parts = dict(zip(patients, split(patients, 5)))
    grown = patients[::-1] + [f"new{i}" for i in range(500)]
    assert all(parts.get(p, part) == part for p, part in zip(grown, split(grown, 5)))
    assert np.allclose(np.bincount(list(parts.values())) / 1000, [0.8, 0.1, 0.1], atol=0.03)
    assert list(split(patients, 6)) != list(parts.values())


def folds_of(index, split_seed, folds):
    """The {part: [patients]} of each fold."""
    splits = [split_index(index, split_seed, fold=fold, folds=folds) for fold in range(folds)]
    return [{name: part.patients.tolist() for name, part in parts.items()} for parts in splits]


def test_folds_test_each_patient_once_and_share_out_every_file_evenly(tmp_path):
    paths, numbers = [], (range(7), range(7, 11), range(11, 20))
    for file_numbers in numbers:
        paths.append(make_file(tmp_path / f"{file_numbers[0]}.h5", len(file_numbers), 1, 3))
        with h5py.File(paths[-1], "r+") as file:
            for number, name in zip(file_numbers, list(file)):
                file.move(name, f"p{number}")
    with h5py.File(paths[0], "r+") as file:
        file.copy("p0/CSN0000", "p19/later")        # a patient in two files
    index = create_dataset_index(path=paths)
    for folds in (3, 5, 20):
        splits = folds_of(index, 1, folds)
        assert folds_of(create_dataset_index(path=paths[::-1]), 1, folds) == splits
        assert folds_of(index, 2, folds) != splits
        assert sorted(sum((parts["test"] for parts in splits), [])) == sorted(index.patients)
        for parts, following in zip(splits, splits[1:] + splits[:1]):
            assert sorted(sum(parts.values(), [])) == sorted(index.patients)    # so disjoint
            assert parts["train"] and parts["tune"] == following["test"]
        for some in (*numbers, range(20)):
            tested = [sum(int(p[1:]) in some for p in parts["test"]) for parts in splits]
            assert max(tested) - min(tested) <= 1


@pytest.mark.parametrize("fold, folds", [(0, 2), (0, 7), (6, 6), (-1, 6), (None, 6), (1, None)])
def test_impossible_folds_are_refused(published, fold, folds):
    with pytest.raises(DataError, match=f"fold {fold} of {folds}, 6 patients .*3 folds or more"):
        split_index(create_dataset_index(path=published), fold=fold, folds=folds)


def test_a_split_without_folds_never_changes(published):
    parts = split_index(create_dataset_index(path=published))
    assert [part.patients.tolist() for part in parts.values()] == [
        ["MRN000", "MRN002", "MRN003", "MRN005"], ["MRN004"], ["MRN001"]]
    first = datasets.split_patients([f"p{i}" for i in range(1000)], 5)[:22]
    assert first.tolist() == [1, 2, 0, 0, 0, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 2, 0, 2, 1, 0, 0, 1]


def test_the_normaliser_holds_mean_and_sd_and_refuses_a_constant(dataset):
    fitted = datasets.fit_normaliser(dataset, KEYS[1:])
    values = dataset[np.arange(len(dataset))][3].numpy().astype("f8")
    assert fitted["hr"]["mean"] == pytest.approx(values.mean(), rel=1e-9)
    assert fitted["hr"]["sd"] == pytest.approx(values.std(), rel=1e-9)
    assert fitted["hr"]["unit"] == "beats/min"
    dataset.column("hr").fill_(70.1)
    with pytest.raises(DataError, match="'hr' is constant or not finite"):
        datasets.fit_normaliser(dataset, ["hr"])
