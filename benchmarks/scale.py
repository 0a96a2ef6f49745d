"""Scale: an index of 64 million segments, memory with ten times the data, two ranks, loader wait.

    python benchmarks/scale.py [--part index|memory|ranks|wait] [--repeats 5]

The 64-million file is sparse (its PPG is allocated and never written): it needs little disk, but a
file system with holes. Making its index for the first time takes minutes.
"""
import argparse
import csv
import os
import statistics
import subprocess
import sys
import tempfile
import time

import h5py
import numpy as np
from common import ROOT, print_machine
from read import KEYS, write_file

from tk_utils import print_table

ENCOUNTERS, ROWS = 28_000, 2_286        # 64 million segments

OPEN = """
import sys, time; sys.path.insert(0, {root!r})
import torch
from datasets import *
from loaders import make_loader
start = time.time()
index = create_dataset_index(condition="any", path={path!r}); loaded = time.time()
parts = split_index(index, 0); split = time.time()
dataset = TPP_PPG_dataset(parts["train"], "segment", {keys!r})
loader = iter(make_loader(dataset, 256, shuffle=True)); batch = next(loader); end = time.time()
peak = [l for l in open("/proc/self/status") if l.startswith("VmHWM")][0].split()[1]
print(len(index), len(batch[0]), loaded - start, split - loaded, end - split, int(peak) / 1e6)
"""

FEED = """
import sys; sys.path.insert(0, {root!r})
import torch
from training_header import *
from kernels import keep_freed_memory
keep_freed_memory()
index = create_dataset_index(path={path!r})
dataset = TPP_PPG_dataset(index, "segment", {keys!r})
model = NormalisedModel(get_model_v3(3), {keys!r}, fit_normaliser(dataset, {keys!r}[1:]))
optimizer = torch.optim.Adam(model.parameters())
for i, (*inputs, label) in enumerate(make_loader(dataset, 16, shuffle=True)):
    if i < 10:                      # the whole file passes, a few steps are trained
        optimizer.zero_grad(); ((model(*inputs)[:, 0] - label) ** 2).mean().backward()
        optimizer.step()
lines = dict(line.split(":") for line in open("/proc/self/status"))
print(lines["RssAnon"].split()[0])
"""


def python(code, **values):
    done = subprocess.run([sys.executable, "-c", code.format(root=ROOT, keys=KEYS, **values)],
                          capture_output=True, text=True, check=True)
    return done.stdout.split()


def measure_index(folder, repeats):
    path = os.path.join(folder, "huge.h5")
    ranges = [(60, 90), (30, 60), (50, 90), (20, 50)]           # of map, dbp, hr and p_crit
    vitals = [np.random.default_rng(0).uniform(*one, ROWS).astype("f4") for one in ranges]
    with h5py.File(path, "w") as file:
        for e in range(ENCOUNTERS):
            group = file.create_group(f"{e // 2:06d}/{e % 2}")
            space = h5py.h5s.create_simple((ROWS, 3600))
            plist = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
            plist.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
            plist.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
            h5py.h5d.create(group.id, b"ppg", h5py.h5t.IEEE_F32LE, space, plist)
            for key, values in zip(("map", "dbp", "hr", "p_crit"), vitals):
                group[key] = values
            group["reason"] = np.zeros(ROWS, "u4")
    started = time.time()
    python(OPEN, path=path)
    made = time.time() - started
    runs = [[float(v) for v in python(OPEN, path=path)] for _ in range(min(repeats, 3))]
    segments, _, load, split, first, peak = (statistics.median(column) for column in zip(*runs))
    print_table([
        ["segments", f"{segments:,.0f}"], ["made for the first time, s", f"{made:.0f}"],
        ["saved index, GB", f"{os.path.getsize(path + '.index.npz') / 1e9:.2f}"],
        ["open, s", f"{load:.1f}"], ["split, s", f"{split:.1f}"],
        ["shuffle and first batch, s", f"{first:.1f}"],
        ["open + split + shuffle + first batch, s", f"{load + split + first:.1f}"],
        ["peak memory, GB", f"{peak:.1f}"]], ["index of 64 million segments", "median"])


def measure_memory(folder, repeats):
    anonymous = []
    for rows in (2_000, 20_000):
        path = os.path.join(folder, f"{rows}.h5")
        write_file(path, rows)
        anonymous.append(statistics.median(int(python(FEED, path=path)[0])
                                           for _ in range(min(repeats, 3))) / 1024)
    print_table([["2,000 segments, MB", f"{anonymous[0]:.0f}"],
                 ["20,000 segments, MB", f"{anonymous[1]:.0f}"],
                 ["ratio", f"{anonymous[1] / anonymous[0]:.2f}"]], ["anonymous memory", "median"])


def measure_ranks(folder, repeats):
    path = os.path.join(folder, "ranks.h5")
    write_file(path, 1_000)

    def rate(name, launcher, threads, batch):
        command = [*launcher, os.path.join(ROOT, "train_resnet.py"), "--data", path, "--name", name,
                   "--epochs", "2", "--batch-size", str(batch), "--device", "cpu", "--fresh"]
        subprocess.run(command, cwd=folder, check=True, capture_output=True,
                       env=dict(os.environ, OMP_NUM_THREADS=str(threads)))
        with open(os.path.join(folder, "runs", name, "log.csv")) as file:
            seconds = [float(row["seconds"]) for row in csv.DictReader(file)]
        return 1 / (seconds[1] - seconds[0])        # epochs a second, the first not counted

    seen = {"one": [], "two": []}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone",
                "--nproc_per_node", "2"]
    for _ in range(repeats):
        seen["one"].append(rate("one", [sys.executable], 2, 32))
        seen["two"].append(rate("two", torchrun, 1, 16))
    one, two = statistics.median(seen["one"]), statistics.median(seen["two"])
    print_table([["two ranks of one thread / one process of two", f"{two / one:.2f}"]],
                ["throughput of training", "ratio of medians"])


def measure_wait(folder, repeats):
    import torch

    from datasets import TPP_PPG_dataset, create_dataset_index, fit_normaliser
    from kernels import keep_freed_memory
    from loaders import make_loader
    from models import get_model_v3
    from training_header import NormalisedModel
    keep_freed_memory()
    path = os.path.join(folder, "wait.h5")
    write_file(path, 400)
    dataset = TPP_PPG_dataset(create_dataset_index(path=path), "segment", KEYS)
    model = NormalisedModel(get_model_v3(3), KEYS, fit_normaliser(dataset, KEYS[1:]))
    optimizer = torch.optim.Adam(model.parameters())
    shares = []
    for _ in range(repeats):
        waited, started = 0.0, time.perf_counter()
        loader = iter(make_loader(dataset, 16, shuffle=True))
        while True:
            asked = time.perf_counter()
            batch = next(loader, None)
            waited += time.perf_counter() - asked
            if batch is None:
                break
            *inputs, label = batch
            optimizer.zero_grad()
            ((model(*inputs)[:, 0] - label) ** 2).mean().backward()
            optimizer.step()
        shares.append(waited / (time.perf_counter() - started))
    print_table([["loader wait, share of a CPU epoch", f"{statistics.median(shares):.2%}"]],
                ["feeding", "median"])


PARTS = {"index": measure_index, "memory": measure_memory, "ranks": measure_ranks,
         "wait": measure_wait}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--part", choices=PARTS, action="append")
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    print_machine()
    for name in options.part or PARTS:
        with tempfile.TemporaryDirectory() as folder:
            PARTS[name](folder, options.repeats)
        print()


if __name__ == "__main__":
    main()
