"""A run that is interrupted, refused, fine-tuned or in trouble: train_resnet.py and its loop."""
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import h5py
import numpy as np
import pytest
import torch
from conftest import ROOT, children, make_file, needs_children
from torch.utils.data import DataLoader, TensorDataset

from datasets import TPP_PPG_dataset, create_dataset_index, make_loader
from training_header import (
    CosineAnnealingLR,
    Interrupted,
    NormalisedModel,
    ReduceLROnPlateau,
    StepLR,
    fit_normaliser,
    get_model_v3,
    load_checkpoint,
    reset_all_seeds,
    training_loop,
)

KEYS = ["ppg", "map", "dbp", "hr", "tpp"]
SCRIPT = os.path.join(ROOT, "train_resnet.py")
OPTIONS = ["--epochs", "2", "--batch-size", "8", "--device", "cpu"]
ONE_THREAD = dict(os.environ, OMP_NUM_THREADS="1", MPLBACKEND="agg")


# ----------------------------------------------------------------------- the loop, in this process

class Signals:
    """A loader that sends this process a signal before some batch of some epoch."""

    def __init__(self, loader, epoch, batch):
        self.loader, self.sampler, self.when, self.epoch = loader, loader.sampler, (epoch, batch), 0

    def __len__(self):
        return len(self.loader)

    def __iter__(self):
        first = getattr(self.sampler, "first_batch", 0)
        for number, batch in enumerate(self.loader, first):
            if (self.epoch, number) == self.when:
                signal.raise_signal(signal.SIGTERM)
            yield batch
        self.epoch += 1


def train_small(folder, interrupt=None, level="segment", plain=False, **options):
    """Weights and trajectories of a small network; `interrupt` (epoch, batch) stops it there."""
    reset_all_seeds(0)
    index = create_dataset_index(path=str(folder / "d.h5"))
    dataset = TPP_PPG_dataset(index, level, KEYS)
    network = get_model_v3(3, widths=(4, 4, 8), kernel_sizes=5, dropout=0.3)
    model = NormalisedModel(network, KEYS, fit_normaliser(dataset, KEYS[1:]))
    if plain:       # an experiment's own loader, shuffled by PyTorch's random numbers
        loader = DataLoader(TensorDataset(*dataset.read(np.arange(len(index)))), 8, shuffle=True)
    else:
        loader = make_loader(dataset, 8, shuffle=True, seed=1)
    if interrupt:
        loader = Signals(loader, *interrupt)
    defaults = {"total_epochs": 4, "lr": 3e-3, "device": torch.device("cpu"), "l1_reg": 1e-3,
                "scheduler_and_args": [StepLR, {"step_size": 2, "gamma": 0.5}]}
    model, seen = training_loop(model, loader, make_loader(dataset, 32), **{**defaults, **options},
                                resume_path=str(folder / "state.pth"))
    os.remove(folder / "state.pth")
    return [*model.state_dict().values(), *map(torch.from_numpy, seen.values())]


@pytest.mark.parametrize("interrupt, options", [
    ((1, 3), {}),
    ((1, 0), {"gradient_accumulation": 4, "gradient_clipping": 1.0}),
    ((2, 4), {"scheduler_and_args": [CosineAnnealingLR, {"T_max": 20}], "batch_cosine": True}),
    ((2, 1), {"scheduler_and_args": [ReduceLROnPlateau, {"patience": 0}], "early_stopping": 1,
              "total_epochs": 9, "lr": 0.3}),
    ((0, 2), {"warmup_epochs": 2, "criterion": "l1", "optimizer_type": torch.optim.SGD}),
    ((1, 1), {"level": "patient", "total_epochs": 9}),
    ((1, 2), {"plain": True}),
])
def test_an_interrupted_loop_goes_on_to_the_same_weights_to_the_last_bit(tmp_path, interrupt,
                                                                         options):
    make_file(tmp_path / "d.h5", patients=16, encounters=1, rows=3)
    expected = train_small(tmp_path, **options)
    with pytest.raises(Interrupted, match=f"interrupted (at|after) epoch {interrupt[0] + 1}"):
        train_small(tmp_path, interrupt, **options)
    torch.rand(7)       # whatever happened in between
    found = train_small(tmp_path, **options)
    assert len(found) == len(expected)
    assert all(torch.equal(one, other) for one, other in zip(found, expected))


# ------------------------------------------------------------------------------------- the script

def train(folder, *options, check=None, **environment):
    done = subprocess.run([sys.executable, SCRIPT, "--data", "d.h5", *OPTIONS, *options],
                          cwd=folder, capture_output=True, text=True, timeout=300,
                          env=dict(ONE_THREAD, **environment))
    if check is not None:
        assert done.returncode == check, done.stdout + done.stderr
    return done


def started(folder, *options, launcher=(), until="epoch 1/"):
    """A run, once it has printed a line that begins with `until`."""
    process = subprocess.Popen(
        [sys.executable, *launcher, SCRIPT, "--data", "d.h5", *OPTIONS, "--epochs", "500",
         *options], cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=ONE_THREAD, start_new_session=True)
    for line in process.stdout:
        if line.startswith(until):
            return process
    raise AssertionError(process.communicate()[1])


@pytest.fixture()
def folder(tmp_path):
    make_file(tmp_path / "d.h5", patients=5, encounters=1, rows=6)
    return tmp_path


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished")
    make_file(folder / "d.h5", patients=5, encounters=1, rows=6)
    train(folder, check=0)
    return folder


def weights_of(path):
    return torch.load(path, weights_only=True)["model"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_ends_with_exit_code_3(folder, number):
    process = started(folder)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 3, out + err
    assert "the same command goes on from here" in err and "Traceback" not in err
    assert os.path.exists(folder / "runs/M1.5_resume.pth")
    refused = train(folder, "--lr", "0.01", check=2)
    assert re.search(r"--epochs 500 \(now 2\), --lr 0.001 \(now 0.01\)", refused.stderr)
    assert "--fresh" in refused.stderr and "--name" in refused.stderr
    train(folder, "--fresh", check=0)
    assert not os.path.exists(folder / "runs/M1.5_resume.pth")


def test_a_second_sigint_ends_at_once(folder):
    process = started(folder)
    os.kill(process.pid, signal.SIGSTOP)        # so that both wait for it when it goes on
    process.send_signal(signal.SIGINT)
    os.kill(process.pid, signal.SIGCONT)
    time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=30)
    assert process.returncode in (-signal.SIGINT, 3)


def test_two_runs_cannot_write_one_name(folder):
    process = started(folder)
    try:
        second = train(folder, check=2)
        assert "another process is training under this name" in second.stderr
        assert "--name" in second.stderr
    finally:
        process.kill()
        process.communicate()


def test_a_finished_run_is_never_overwritten(finished):
    before = (finished / "runs/M1.5.pth").read_bytes()
    same = train(finished, check=0)
    assert "this run is finished" in same.stdout and "R² of Pcrit" in same.stdout
    other = train(finished, "--seed", "3", check=2)
    assert "--seed 0 (now 3)" in other.stderr
    assert "--fresh" in other.stderr and "--name" in other.stderr
    assert (finished / "runs/M1.5.pth").read_bytes() == before


def test_changed_data_are_another_experiment(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "copy")
    with h5py.File(tmp_path / "copy/d.h5", "a") as file:
        for patient in file:
            for encounter in file[patient].values():
                encounter["tpp"][...] += 1
    assert "other data" in train(tmp_path / "copy", check=2).stderr


def test_fine_tuning_begins_with_the_parents_weights_and_remembers_its_patients(finished, tmp_path):
    make_file(tmp_path / "d.h5", patients=5, encounters=1, rows=6, seed=7)
    with h5py.File(tmp_path / "d.h5", "a") as file:
        for patient in list(file):
            file.move(patient, "new" + patient)
    shutil.copy(finished / "tpp_ppg.salt", tmp_path)
    parent = finished / "runs/M1.5.pth"
    train(tmp_path, "--init-from", parent, "--lr", "1e-12", "--l1", "0", "--epochs", "1", check=0)
    child, parent = load_checkpoint(tmp_path / "runs/M1.5.pth"), load_checkpoint(parent)
    assert all(torch.allclose(child["model"][k], v, atol=1e-9) for k, v in parent["model"].items())
    assert child["normaliser"] == parent["normaliser"]
    seen = parent["split"]["train"] + parent["split"]["tune"]
    assert child["split"]["ancestors"] == sorted(seen)
    assert child["provenance"]["parent"] and not parent["provenance"]["parent"]


def test_fine_tuning_refuses_to_test_on_the_parents_patients(finished, tmp_path):
    shutil.copy(finished / "d.h5", tmp_path)
    shutil.copy(finished / "tpp_ppg.salt", tmp_path)
    parent = load_checkpoint(finished / "runs/M1.5.pth")["split"]
    for seed in range(1, 20):       # some other split tests on a patient of the parent's
        done = train(tmp_path, "--init-from", finished / "runs/M1.5.pth", "--split-seed", str(seed))
        if done.returncode:
            break
        shutil.rmtree(tmp_path / "runs")
    assert done.returncode == 2 and "--split-seed" in done.stderr, parent


def test_labels_are_weighed_by_their_standard_error(folder):
    with h5py.File(folder / "d.h5", "a") as file:
        for number, patient in enumerate(file):
            for encounter in file[patient].values():
                encounter["p_crit_se"] = np.full(6, 1.0 + number, "f4")
    plain = train(folder, "--name", "plain", check=0)
    train(folder, "--name", "weighed", "--weight-labels", check=0)
    assert plain.stdout
    one, other = (weights_of(folder / f"runs/{name}.pth") for name in ("plain", "weighed"))
    assert any(not torch.equal(one[k], other[k]) for k in one)
    assert load_checkpoint(folder / "runs/weighed.pth")["config"]["weight_labels"] is True


# ---------------------------------------------------------------------------------------- trouble

def test_a_loss_that_is_not_finite_names_the_batch_and_saves_nothing_bad(folder):
    done = train(folder, "--lr", "1e30", check=2)
    line = done.stderr.strip().splitlines()[-1]
    assert re.match(r"error: the training loss is not finite at epoch \d, batch \d", line)
    assert re.search(r"Its 8 segments: ppg \S+ to \S+, map \S+ to \S+", line)
    assert re.search(r"of the patients [0-9a-f]{16}", line) and "MRN" not in done.stderr
    assert not os.path.exists(folder / "runs/M1.5.pth")
    state = folder / "runs/M1.5_resume.pth"
    if state.exists():
        weights = torch.load(state, weights_only=True)["parts"]["model"]
        assert all(torch.isfinite(v).all() for v in weights.values())


@pytest.mark.skipif(os.name != "posix" or os.geteuid() != 0, reason="mounting a tmpfs needs root")
def test_a_full_disk_ends_in_one_line_and_the_run_goes_on_when_there_is_room(folder, tmp_path):
    expected = tmp_path / "expected"
    expected.mkdir()
    shutil.copy(folder / "d.h5", expected)
    train(expected, check=0)
    small = folder / "runs"
    small.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=12m", "tmpfs", small],
                             capture_output=True)
    if mounted.returncode:
        pytest.skip("no tmpfs can be mounted here")
    try:
        done = train(folder, check=2)
        assert done.stderr.strip().splitlines()[-1].startswith("error: ")
        assert "No space left on device" in done.stderr and "Traceback" not in done.stderr
        assert not [name for name in os.listdir(small) if name.endswith(".tmp")]
        subprocess.run(["mount", "-o", "remount,size=200m", small], check=True)
        train(folder, check=0)
        found = weights_of(small / "M1.5.pth")
    finally:
        subprocess.run(["umount", small], check=True)
    assert all(torch.equal(found[k], v) for k, v in weights_of(expected / "runs/M1.5.pth").items())


def test_a_data_file_that_is_cut_short_while_it_is_read_ends_in_one_line(folder):
    process = started(folder)
    os.truncate(folder / "d.h5", 2000)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 2 and "Traceback" not in err, err
    assert err.strip().splitlines()[-1].startswith("error: ") and "d.h5" in err


@needs_children
def test_a_dead_loader_worker_ends_in_one_line_that_says_what_to_do(folder):
    process = started(folder, "--workers", "2")
    os.kill(children(process.pid)[-1], signal.SIGKILL)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 2 and "Traceback" not in err, err
    assert "a loader worker was ended from outside" in err and "--workers" in err


@needs_children
def test_when_a_rank_dies_the_others_end_within_a_minute(folder):
    process = started(folder, launcher=("-m", "torch.distributed.run", "--standalone",
                                        "--nproc_per_node=2"))
    ranks = children(process.pid)
    os.kill(ranks[-1], signal.SIGKILL)
    begun = time.monotonic()
    process.communicate(timeout=60)
    assert process.returncode != 0 and time.monotonic() - begun < 60
    assert not any(os.path.exists(f"/proc/{pid}") for pid in ranks)


@pytest.mark.skipif(os.name != "posix", reason="an orphan is seen by its parent's number")
def test_when_torchrun_is_killed_its_ranks_end(folder):
    process = started(folder, launcher=("-m", "torch.distributed.run", "--standalone",
                                        "--nproc_per_node=2"))
    process.kill()
    try:
        process.communicate(timeout=60)     # reads until the ranks, who hold the other end, end
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise
