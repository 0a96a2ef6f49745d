"""loaders.py: every segment once, for any reader; limits of open files and shared memory."""
import functools
import os
import subprocess
import sys

import h5py
import numpy as np
import pytest
import torch
from conftest import KEYS, ROOT, fork, make_file, printed_by, serials

import datasets
import loaders
from datasets import TPP_PPG_dataset, create_dataset_index
from loaders import make_loader


@pytest.mark.parametrize("storage", ["contiguous", "lzf"])
def test_a_shuffled_epoch_holds_every_segment_once_and_the_next_differs(tmp_path, capsys, storage):
    path = make_file(tmp_path / "f.h5", layout=storage)
    dataset = TPP_PPG_dataset(create_dataset_index(path=path), "segment", KEYS)
    loader = make_loader(dataset, 10, shuffle=True, drop_last=False)
    said = f"h5repack -l CONTI -f NONE {path} NEW" in capsys.readouterr().err
    assert said == (storage == "lzf")                   # slow to shuffle
    epochs = [serials(loader) for _ in range(2)]        # without set_epoch, each pass is the next
    loader.sampler.set_epoch(0)
    epochs.append(serials(loader))
    assert all(sorted(epoch) == list(range(96)) for epoch in epochs)
    assert epochs[0] == epochs[2] != epochs[1]


def test_only_an_incomplete_train_batch_after_a_full_batch_is_dropped(dataset):
    assert [len(b[0]) for b in make_loader(dataset, 90, shuffle=True)] == [90]
    assert [len(b[0]) for b in make_loader(dataset, 100, shuffle=True)] == [96]
    tune = make_loader(dataset, 20)
    assert serials(tune) == list(range(96)) and len(tune) == 5


@pytest.mark.parametrize("level", ["segment", "patient"])
def test_batches_on_a_device_equal_the_plain_loaders(dataset, level):
    dataset = TPP_PPG_dataset(dataset.index, level, KEYS)
    how = {"shuffle": True, "seed": 3, "rank": 1, "world": 2}
    plain, cached = (make_loader(dataset, 10, **how, device_cache=device)
                     for device in (None, "cpu"))
    assert plain.device is None and cached.device.type == "cpu" and len(plain) == len(cached)
    for epoch, first_batch in ((0, 0), (1, len(plain) - 1)):
        for loader in (plain, cached):
            loader.sampler.set_epoch(epoch, first_batch)
        batches = list(plain), list(cached)
        assert len(batches[0]) == len(batches[1]) == len(plain) - first_batch
        assert all(torch.equal(a, b) for one, other in zip(*batches) for a, b in zip(one, other))


READ_ALL = """
import sys
from datasets import *
from loaders import *
data = TPP_PPG_dataset(create_dataset_index(path=sys.argv[1]), 'segment', ['ppg', 'map', 'tpp'])
for workers in (0, 2):
    print(sum(int(batch[0][:, 0, 0].sum()) for batch in make_loader(data, 32, workers=workers)))
"""


def test_more_files_than_may_be_open_are_read(tmp_path):
    resource = pytest.importorskip("resource", reason="limits of a process are of POSIX")
    paths = []
    for number in range(40):
        storage = ("contiguous", "lzf")[number % 2]
        paths.append(make_file(tmp_path / f"{number}.h5", 1, 1, 4, layout=storage))
        with h5py.File(paths[-1], "r+") as file:
            file.move("MRN000", f"p{number}")

    def read():
        open_files = len(os.listdir("/dev/fd"))
        resource.setrlimit(resource.RLIMIT_NOFILE, (open_files + 20,) * 2)
        datasets.map_rows = functools.lru_cache(5)(datasets.map_rows.__wrapped__)
        data = TPP_PPG_dataset(create_dataset_index(path=paths), "segment", ["ppg", "map", "tpp"])
        assert sum(serials(make_loader(data, 32))) == 240

    printed_by([fork(read, tmp_path)], tmp_path)


@pytest.mark.skipif(os.getuid() != 0 or not os.path.exists("/dev/shm"), reason="needs mount")
def test_a_full_dev_shm_is_one_line_and_harmless_without_workers(published):
    if subprocess.run(["unshare", "-m", "true"]).returncode:
        pytest.skip("needs unshare")
    fill = "mount -t tmpfs -o size=4k tmpfs /dev/shm && head -c 4096 /dev/zero > /dev/shm/x"
    done = subprocess.run(["unshare", "-m", "bash", "-c", f'{fill}; exec "$@"', "bash",
                           sys.executable, "-c", READ_ALL, published],
                          cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "4560\n"
    assert done.stderr.splitlines()[-1].startswith("datasets.DataError: a loader worker failed")


@pytest.mark.parametrize("level", ["segment", "patient"])
def test_workers_change_neither_order_nor_draw_nor_the_networks_random_numbers(dataset, level):
    dataset = TPP_PPG_dataset(dataset.index, level, KEYS, seed=3)
    before = torch.random.get_rng_state()
    plain, by_workers = (make_loader(dataset, 4, shuffle=True, workers=n) for n in (0, 2))
    for epoch in (0, 1):
        plain.sampler.set_epoch(epoch)
        by_workers.sampler.set_epoch(epoch)
        assert serials(plain) == serials(by_workers)
    assert torch.equal(before, torch.random.get_rng_state())


def test_ranks_share_each_batch_without_loss_or_duplication(dataset):
    batches = [loaders.BatchOrder(dataset, 20, shuffle=True, rank=rank, world=world)
               for rank, world in ((0, 1), (0, 3), (1, 3), (2, 3))]
    for whole, *shares in zip(*batches):
        assert np.array_equal(np.concatenate(shares), whole)
