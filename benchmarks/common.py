"""Shared by the benchmarks: alternating repeats, medians, the machine in a line."""
import os
import statistics
import sys
import time

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)


def alternate(candidates, repeats=5):
    """Runs {name: function(), which is timed unless it returns seconds} in turn, A B A B …, after
    one round that is not counted: {name: median seconds}."""
    seen = {name: [] for name in candidates}
    for repeat in range(repeats + 1):
        for name, run in candidates.items():
            started = time.perf_counter()
            seconds = run()
            if not isinstance(seconds, float):
                seconds = time.perf_counter() - started
            if repeat:
                seen[name].append(seconds)
    return {name: statistics.median(values) for name, values in seen.items()}


def print_machine():
    import numpy
    import torch

    from tk_utils import git_revision, versions
    found = versions()
    cpu = "unknown processor"
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo") as file:
            cpu = next((line.split(":")[1].strip() for line in file if "model name" in line), cpu)
    print(f"{cpu}, {os.cpu_count()} cores, {torch.get_num_threads()} threads; "
          f"python {found['python']}, torch {torch.__version__}, numpy {numpy.__version__}; "
          f"revision {git_revision()}")
