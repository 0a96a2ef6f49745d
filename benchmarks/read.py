"""Feeding: our loader against the published style, and against a plain copy of the same rows.

    python benchmarks/read.py [--rows 20000] [--repeats 5]

Shuffled batches of 256 with five fields, warm cache, one process, a file of encounters of 100 rows.
"""
import argparse
import os
import tempfile
import time

import numpy as np
from common import alternate, print_machine
from published_style import PlainDataset
from torch.utils.data import DataLoader

from datasets import LayoutWriter, TPP_PPG_dataset, create_dataset_index
from loaders import make_loader
from tk_utils import print_table

KEYS = ["ppg", "map", "dbp", "hr", "tpp"]
BATCH = 256


def write_file(path, rows):
    rng = np.random.default_rng(0)
    with LayoutWriter(path, "simulated", "published", "foot", ("none",)) as out:
        for e in range(rows // 100):
            phase = rng.uniform(0, 6, (100, 1)) + np.arange(3600) * rng.uniform(0.1, 0.2, (100, 1))
            ppg = np.round(100 * np.sin(phase) + rng.normal(size=(100, 3600)), 1)
            fields = {"ppg": ppg, "map": rng.uniform(70, 90, 100), "dbp": rng.uniform(50, 60, 100),
                      "hr": rng.uniform(60, 90, 100), "p_crit": rng.uniform(20, 50, 100),
                      "r2": np.full(100, 0.9), "pp": np.full(100, 60), "reason": np.zeros(100)}
            fields["tpp"] = fields["map"] - fields["p_crit"]
            out.write(f"patient {e:05d}", "1", fields)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=20000)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    print_machine()
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "rows.h5")
        write_file(path, options.rows)
        dataset = TPP_PPG_dataset(create_dataset_index(path=path), "segment", KEYS)
        loader = make_loader(dataset, BATCH, shuffle=True)
        plain = PlainDataset(path, KEYS)
        in_memory = dataset.read(np.arange(len(dataset)))[0].numpy()[:, 0]
        orders = [np.random.default_rng(i).permutation(len(dataset)) for i in range(99)]

        def ours():
            started = time.perf_counter()
            count = sum(len(batch[0]) for batch in loader)
            return (time.perf_counter() - started) / count

        def published():
            some = np.random.default_rng(1).permutation(len(plain))[:2 * BATCH].tolist()
            started = time.perf_counter()
            for _ in DataLoader(plain, batch_sampler=[some[:BATCH], some[BATCH:]]):
                pass
            return (time.perf_counter() - started) / len(some)

        def copy():
            order = orders.pop()
            started = time.perf_counter()
            for a in range(0, len(order) - BATCH + 1, BATCH):
                in_memory[order[a:a + BATCH]]
            return (time.perf_counter() - started) / (len(order) // BATCH * BATCH)

        seconds = alternate({"ours": ours, "published": published, "copy": copy}, options.repeats)
    print_table([[f"{1 / seconds[name]:,.0f}" for name in ("published", "ours", "copy")]
                 + [f"{seconds['published'] / seconds['ours']:,.0f}",
                    f"{seconds['copy'] / seconds['ours']:.2f}"]],
                ["published style, rows/s", "ours", "plain copy of the rows", "ours / published",
                 "ours / copy"])


if __name__ == "__main__":
    main()
