"""Shared by the tests: small simulated files, published-style files, scripts as subprocesses."""
import glob
import os
import subprocess
import sys

import h5py
import numpy as np
import pytest

# Before PyTorch is imported, and for all subprocesses: several test processes share the cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
SHARED = os.path.join(os.path.dirname(ROOT), "shared", "data")

import torch  # noqa: E402 - after the number of threads is set

from datasets import TPP_PPG_dataset, create_dataset_index  # noqa: E402


def pytest_configure(config):
    """Files in their order (newer xdist begins with those of most tests): faults/, the longest,
    first, and no process is left alone with it at the end."""
    if hasattr(config.option, "loadscopereorder"):
        config.option.loadscopereorder = False


@pytest.fixture(scope="session")
def recordings():
    """The folder of real recordings, which are not part of the repository."""
    if not os.path.isdir(SHARED):
        pytest.skip("the real recordings (../shared/data) are not here")
    return SHARED


@pytest.fixture(scope="session")
def run():
    """run("evaluate.py", *arguments, cwd=folder) -> CompletedProcess, as a user would run it."""
    def call(script, *arguments, cwd, check=None, timeout=300, **environment):
        done = subprocess.run([sys.executable, os.path.join(ROOT, script), *map(str, arguments)],
                              cwd=cwd, capture_output=True, text=True, timeout=timeout,
                              env=dict(os.environ, **environment))
        if check is not None:
            assert done.returncode == check, done.stdout + done.stderr
        return done
    return call


@pytest.fixture(scope="session")
def simulated(tmp_path_factory, run):
    """A small file of virtual patients: 30 patients of 4 segments."""
    folder = tmp_path_factory.mktemp("simulated")
    run("simulate.py", "--out", "s.h5", "--patients", 30, "--segments", 4, "--seed", 1,
        "--workers", 1, cwd=folder, check=0)
    return str(folder / "s.h5")


def read_terminal(main):
    """All that a process writes to the other end of a pseudo-terminal, until it closes that."""
    seen = b""
    while True:
        try:
            piece = os.read(main, 4096)
        except OSError:                         # how Linux says that the other end is closed
            break
        if not piece:
            break
        seen += piece
    os.close(main)
    return seen


needs_children = pytest.mark.skipif(
    not os.path.exists(f"/proc/{os.getpid()}/task/{os.getpid()}/children"),
    reason="needs Linux's list of a process's children")


def children(pid):
    """The processes that a process has started, in any of its threads, and that have not ended."""
    found = []
    for path in glob.glob(f"/proc/{pid}/task/*/children"):
        with open(path) as file:
            found += map(int, file.read().split())
    return found


def make_file(path, patients=6, encounters=2, rows=8, seed=0, ppg_rank=3, layout="contiguous",
              fields=("abp", "map", "sbp", "dbp", "pp", "hr", "p_crit", "tpp", "r2", "fit_rmse")):
    """A file as the published system describes it: no attributes, ppg (N, 1, 3600) or (N, 3600).

    Every number tells where it stands: sample 0 of a PPG row is its own serial number. Vitals pass
    the default gate. layout: 'contiguous', 'rows' (a chunk a row), 'lzf' or 'gzip' (4-row chunks).
    """
    rng = np.random.default_rng(seed)
    serial = 0
    with h5py.File(path, "w") as file:
        for p in range(patients):
            for e in range(encounters):
                group = file.create_group(f"MRN{p:03d}/CSN{p:03d}{e}")
                ppg = rng.normal(size=(rows, 3600)).astype("f4")
                ppg[:, 0] = serial + np.arange(rows)
                serial += rows
                values = {"map": rng.uniform(70, 90, rows), "dbp": rng.uniform(50, 60, rows),
                          "hr": rng.uniform(60, 90, rows), "p_crit": rng.uniform(20, 50, rows),
                          "r2": rng.uniform(0.6, 0.99, rows), "fit_rmse": rng.uniform(0, 3, rows),
                          "sbp": rng.uniform(110, 130, rows),
                          "abp": rng.normal(80, 9, (rows, 3600))}
                values["pp"] = values["sbp"] - values["dbp"]
                values["tpp"] = values["map"] - values["p_crit"]
                shape = (rows, 1, 3600) if ppg_rank == 3 else (rows, 3600)
                chunks = {"contiguous": None, "rows": 1, "lzf": 4, "gzip": 4}[layout]
                group.create_dataset("ppg", data=ppg.reshape(shape),
                                     chunks=None if chunks is None else (chunks,) + shape[1:],
                                     compression=layout if layout in ("lzf", "gzip") else None)
                for key in fields:
                    group.create_dataset(key, data=values[key].astype("f4"))
    return str(path)


KEYS = ["ppg", "map", "dbp", "hr", "tpp"]


@pytest.fixture
def published(tmp_path):
    return make_file(tmp_path / "published.h5")


@pytest.fixture
def dataset(published):
    return TPP_PPG_dataset(create_dataset_index(path=published), "segment", KEYS)


def serials(batches):
    """Sample 0 of the PPG, a row's own number, of all batches."""
    return torch.cat([batch[0][:, 0, 0] for batch in batches]).tolist()
