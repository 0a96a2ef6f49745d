"""Labels and simulation on one core: segments a second.

    python benchmarks/label.py [--segments 2000] [--repeats 5]
"""
import argparse
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")       # before NumPy starts its threads

import numpy as np
import torch
from common import alternate, print_machine

import anchor
import labels
import signals
import simulate
from tk_utils import print_table


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--segments", type=int, default=2000)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    print_machine()
    patients = min(20, max(1, options.segments // 10))
    fields = [simulate.simulate_patient(0, i, 10, keep_abp=True) for i in range(patients)]
    simulated = min(50, options.segments)
    times = max(1, options.segments // (10 * patients))
    abp, ppg = (np.tile(np.concatenate([f[key] for f in fields]), (times, 1))
                for key in ("abp", "ppg"))
    runs = {**{f"labels, {method}": lambda method=method: labels.label_segments(abp, 60, method)
               for method in labels.METHODS},
            "signal quality": lambda: signals.signal_quality(abp, ppg, 60),
            "pulse statistics": lambda: anchor.pulse_statistics(torch.from_numpy(ppg[:, None])),
            "simulated, labels included": lambda: simulate.simulate_patient(0, 1, simulated)}
    counts = {name: len(abp) for name in runs}
    counts["simulated, labels included"] = simulated
    seconds = alternate(runs, options.repeats)
    print_table([[name, f"{counts[name] / seconds[name]:,.0f}"] for name in runs],
                ["one core", "segments/s"])


if __name__ == "__main__":
    main()
