"""Shared by the tests: small files and networks, scripts in this process and in forks of it.

A new interpreter imports PyTorch for seconds: only tests of start-up itself start any.
"""
import contextlib
import io
import multiprocessing
import os
import runpy
import socket
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import h5py
import numpy as np
import pytest

# Before PyTorch is imported, and for all subprocesses: several test processes share the cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
SHARED = os.path.join(os.path.dirname(ROOT), "shared", "data")

import torch  # noqa: E402 - after the number of threads is set

import baselines  # noqa: E402
import models  # noqa: E402
import simulate  # noqa: E402
from checkpoint import CheckpointError  # noqa: E402
from datasets import DataError, TPP_PPG_dataset, create_dataset_index  # noqa: E402
from recordings import RecordingError  # noqa: E402
from tk_utils import run_script  # noqa: E402
from training_header import TrainingError  # noqa: E402


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


Done = namedtuple("Done", "returncode stdout stderr")


def run_here(main, *arguments, cwd=".", encoding="utf-8", check=None):
    """What `main()` of a script does with these arguments, in this process, and must end with the
    exit code `check`."""
    streams = [io.TextIOWrapper(io.BytesIO(), encoding) for _ in range(2)]
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(streams[0]), \
            contextlib.redirect_stderr(streams[1]):
        patch.chdir(cwd)
        patch.setattr(sys, "argv", ["script.py", *map(str, arguments)])
        try:
            code = main()
        except SystemExit as end:
            code = end.code
    done = Done(code or 0, *(stream.seek(0) or stream.read() for stream in streams))
    assert check in (None, done.returncode), done.stdout + done.stderr
    return done


def call(module, *arguments, **options):
    """What a script's module does, as it is in this process."""
    return run_here(lambda: run_script(module.main, CheckpointError, DataError, RecordingError,
                                       TrainingError), *arguments, **options)


def run(script, *arguments, **options):
    """What a script does, read anew from its file as a user's would be."""
    path = os.path.join(ROOT, script)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", [os.path.dirname(path), *sys.path])
        return run_here(lambda: runpy.run_path(path, run_name="__main__") and 0, *arguments,
                        **options)


@pytest.fixture
def scripts_here(monkeypatch):
    """What starts a script of ours by subprocess.run has it run in this process."""
    start = subprocess.run

    def start_here(command, check=False, **options):
        if command[0] != sys.executable or not os.path.isfile(command[1]):
            return start(command, check=check, **options)
        return run(*command[1:], check=0 if check else None)
    monkeypatch.setattr(subprocess, "run", start_here)


def fork(work, folder, **environment):
    """A process of its own that does `work()` in `folder` and prints to the file .printed there."""
    def child():
        os.setsid()
        os.chdir(folder)
        os.environ.update(environment)
        torch.set_num_threads(1)
        printed = os.open(".printed", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        for number in (1, 2):
            os.dup2(printed, number)
        sys.stdout = sys.stderr = os.fdopen(printed, "a", buffering=1)
        sys.exit(work())
    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    return process


def printed_by(processes, folder, code=0, seconds=120):
    """What forks in this folder have printed that must end with this exit code."""
    for process in processes:
        process.join(seconds)
        text = (folder / ".printed").read_text()
        assert process.exitcode == code, text
    return text


def fork_ranks(work, folder):
    """Two processes that train together, as torchrun starts them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    return [fork(work, folder, RANK=rank, LOCAL_RANK=rank, WORLD_SIZE="2", MASTER_PORT=port,
                 MASTER_ADDR="127.0.0.1") for rank in "01"]


@contextlib.contextmanager
def little_work(boosting_rounds=5):
    """Few and narrow layers, baselines chosen from few: from some dozen segments nothing is
    learned."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(baselines, "BOOSTING_ROUNDS", boosting_rounds)
        patch.setattr(baselines, "FOLDS", 2)
        for name in ("resnet_v3", "resnet_spread"):
            builder = models.MODELS[name]
            patch.setitem(models.MODELS, name, lambda num_discrete, builder=builder, **options:
                          builder(num_discrete, **{"widths": (4, 4, 8), **options}))
        yield


@pytest.fixture(scope="module")
def small():
    with little_work():
        yield


@pytest.fixture(scope="session")
def simulated(tmp_path_factory):
    """A small file of virtual patients: 30 patients of 4 segments."""
    path = str(tmp_path_factory.mktemp("simulated") / "s.h5")
    simulate.simulate_file(path, 30, 4, 1)
    return path


needs_children = pytest.mark.skipif(
    not os.path.exists(f"/proc/{os.getpid()}/task/{os.getpid()}/children"),
    reason="needs Linux's list of a process's children")


def children(pid):
    """The processes that a process has started, in any of its threads, and that have not ended."""
    return [int(child) for path in Path(f"/proc/{pid}/task").glob("*/children")
            for child in path.read_text().split()]


def read_ours(name):
    """The text of a file of the repository."""
    return Path(ROOT, name).read_text(encoding="utf-8")


def make_file(path, patients=6, encounters=2, rows=8, seed=0, ppg_rank=3, layout="contiguous"):
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
                for key, value in values.items():
                    group.create_dataset(key, data=value.astype("f4"))
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
