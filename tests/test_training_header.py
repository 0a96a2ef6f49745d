"""training_header.py and normalised_model.py: the loop against arithmetic done by hand, resuming,
the wrapper, and networks and losses of one's own."""
import copy
import math
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, make_file
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import training_header
from training_header import (
    LOSSES,
    CosineAnnealingLR,
    DataError,
    Interrupted,
    NonFiniteLoss,
    NormalisedModel,
    OneCycleLR,
    ReduceLROnPlateau,
    StepLR,
    TPP_PPG_dataset,
    TrainingError,
    create_dataset_index,
    fit_anchor,
    fit_normaliser,
    get_model_v3,
    load_model,
    make_loader,
    predict_dataset,
    predict_with_spread,
    reset_all_seeds,
    save_checkpoint,
    shrink_weights,
    split_index,
    training_loop,
)

KEYS = ["ppg", "map", "dbp", "hr", "tpp"]
SMALL = {"num_discrete": 3, "widths": (4, 4, 8), "kernel_sizes": 5}
NORMALISER = {"map": {"mean": 75.0, "sd": 11.0}, "dbp": {"mean": 56.0, "sd": 10.0},
              "hr": {"mean": 77.0, "sd": 17.0}, "tpp": {"mean": 40.0, "sd": 15.0}}
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")


class Line(nn.Module):
    """An experiment's own network: a straight line on the PPG's samples."""

    def __init__(self, weights=(0.0, 0.0), bias=0.0):
        super().__init__()
        self.linear = nn.Linear(len(weights), 1).double()
        with torch.no_grad():
            self.linear.weight.copy_(torch.tensor([weights], dtype=torch.float64))
            self.linear.bias.fill_(bias)

    def forward(self, ppg):
        return self.linear(ppg[:, 0])


class MyNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.ppg, self.out = nn.Conv1d(1, 3, 9, 4), nn.Linear(6, 1)

    def features(self, ppg, *vitals):
        return torch.cat([self.ppg(ppg).amax(2), torch.stack(vitals, 1)], 1)

    def forward(self, ppg, *vitals):
        return self.out(self.features(ppg, *vitals))


def cubic(prediction, label):
    return (prediction - label).abs() ** 3 / 100


def mean_cubic(prediction, label):
    return cubic(prediction, label).mean()


class NotedSGD(torch.optim.SGD):
    """SGD that notes the rate of each step."""

    def step(self, *arguments, **options):
        self.rates.append(self.param_groups[0]["lr"])
        return super().step(*arguments, **options)


def lines(label, n=4, samples=0.0, batch_size=4):
    """A loader of `n` segments of two equal samples, all with one label."""
    return DataLoader(TensorDataset(torch.full((n, 1, 2), float(samples), dtype=torch.float64),
                                    torch.full((n,), float(label), dtype=torch.float64)),
                      batch_size=batch_size)


def segments(n, seed=0, dtype=torch.float32, samples=600):
    """Random PPG, three vitals and a label that depends on them."""
    rng = torch.Generator().manual_seed(seed)
    ppg = torch.randn(n, 1, samples, generator=rng, dtype=dtype)
    vitals = [torch.randn(n, generator=rng, dtype=dtype) for _ in range(3)]
    return TensorDataset(ppg, *vitals, vitals[0] * 2 + vitals[1] + ppg[:, 0, ::2].mean(1) * 9)


def small_model(seed=0, dtype=torch.float32):
    torch.manual_seed(seed)
    return get_model_v3(**SMALL).to(dtype)


def weights_of(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def train_line(epochs, label=0.0, tune_label=0.0, model=None, **options):
    return training_loop(model or Line(), lines(label), lines(tune_label), epochs,
                         **{"lr": 0.1, "optimizer_type": torch.optim.SGD, "device": "cpu",
                            **options})


# --------------------------------------------------------------------------------- what it returns

def test_the_model_returned_has_the_weights_of_the_best_epoch_not_of_the_last():
    # The bias walks from 0 towards 10 and passes the tune label 3 on its way.
    model, seen = train_line(8, label=10, tune_label=3)
    best = int(seen["epoch_val_loss"].argmin())
    assert 0 < best < 7
    assert (model.linear.bias.item() - 3) ** 2 == pytest.approx(seen["epoch_val_loss"][best])
    assert seen["epoch_val_loss"][-1] > 10 * seen["epoch_val_loss"][best]


def test_the_best_weights_are_those_that_the_best_epochs_own_file_holds(tmp_path):
    # Adam with momentum changes its weights in place: a shallow copy would follow them.
    model, seen = training_loop(small_model(), DataLoader(segments(16, 1), 8),
                                DataLoader(segments(8, 2), 8), 6, 0.05, device="cpu",
                                checkpoints_name=str(tmp_path / "each"))
    assert sorted(os.listdir(tmp_path)) == [f"each_{i}.pth" for i in range(1, 7)]
    best = int(seen["epoch_val_loss"].argmin())
    for number in range(6):
        saved = torch.load(tmp_path / f"each_{number + 1}.pth", weights_only=True)
        same = all(torch.equal(saved[k], v) for k, v in model.state_dict().items())
        assert same == (number == best)


def test_trajectories_are_arrays_one_value_per_batch_and_per_epoch():
    seen = training_loop(small_model(), DataLoader(segments(20), 8), DataLoader(segments(9), 4), 2,
                         1e-3, device="cpu")[1]
    assert {k: len(v) for k, v in seen.items()} == {
        "batch_train_loss": 6, "epoch_train_loss": 2, "batch_val_loss": 6, "epoch_val_loss": 2,
        "lr": 2}
    assert all(isinstance(v, np.ndarray) and v.dtype == np.float64 for v in seen.values())
    # An epoch's loss is the mean over segments, so a short last batch counts by its size.
    for name, sizes in (("train", [8, 8, 4]), ("val", [4, 4, 1])):
        per_epoch = seen[f"batch_{name}_loss"].reshape(2, 3) @ np.array(sizes) / sum(sizes)
        assert per_epoch == pytest.approx(seen[f"epoch_{name}_loss"], rel=1e-5)


def test_the_tune_loss_is_taken_in_evaluation_mode_without_gradients():
    class Watcher(Line):
        def forward(self, ppg):
            modes.append((self.training, torch.is_grad_enabled()))
            return super().forward(ppg)
    modes = []
    train_line(2, model=Watcher())
    assert modes == [(True, True), (False, False)] * 2


def test_each_epoch_is_reported_as_it_ends():
    rows = []
    seen = train_line(3, label=10, tune_label=3, on_epoch=lambda log: rows.append(log[-1]))[1]
    assert [r["epoch"] for r in rows] == [1, 2, 3]
    assert [r["train_loss"] for r in rows] == seen["epoch_train_loss"].tolist()
    assert [r["tune_loss"] for r in rows] == seen["epoch_val_loss"].tolist()
    assert rows[-1]["best_epoch"] == seen["epoch_val_loss"].argmin() + 1


# ------------------------------------------------------------------------------------ loss, penalty

def test_criterion_l1_is_the_mean_absolute_error():
    seen = train_line(1, label=3, tune_label=5, criterion="l1", lr=1e-12)[1]
    assert seen["epoch_train_loss"][0] == pytest.approx(3)
    assert seen["epoch_val_loss"][0] == pytest.approx(5)


def test_criterion_mse_is_the_mean_squared_error():
    assert train_line(1, label=3, tune_label=5, lr=1e-12)[1]["epoch_val_loss"][0] \
        == pytest.approx(25)


def test_l1_shrinks_weights_once_per_step_stops_at_exactly_zero_and_spares_biases():
    # Samples are 0, so weights have no gradient; the bias is right already.
    for options, loader in (({}, lines(2.0, n=8)),
                            ({"gradient_accumulation": 4}, lines(2.0, n=8, batch_size=1))):
        model = training_loop(Line((0.5, -0.002), bias=2.0), loader, lines(2.0), 1, lr=0.1,
                              l1_reg=0.1, optimizer_type=torch.optim.SGD, device="cpu",
                              **options)[0]
        first, second = model.linear.weight[0].tolist()     # two steps of 0.1 * 0.1 each
        assert first == pytest.approx(0.48, abs=1e-12) and second == 0
        assert model.linear.bias.item() == 2


def test_l1_acts_after_the_step_and_by_the_steps_own_rate():
    # One SGD step by hand: the prediction is w + w, its gradient 2 (w + w - y).
    model = training_loop(Line((0.05, 0.05)), lines(-0.3, samples=1.0), lines(0), 1, lr=0.1,
                          l1_reg=0.1, optimizer_type=torch.optim.SGD, device="cpu")[0]
    stepped = 0.05 - 0.1 * 2 * (0.05 + 0.05 + 0.3)
    assert stepped < 0 < 0.05       # shrinking first would have ended somewhere else
    assert model.linear.weight[0].tolist() == pytest.approx([stepped + 0.01] * 2, abs=1e-12)


def test_norms_and_biases_are_not_penalised():
    model = small_model()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    shrink_weights(model.parameters(), 0.01)
    for name, after in model.state_dict().items():
        assert torch.equal(after, before[name]) == (before[name].dim() == 1), name
        if after.dim() > 1:
            expected = (before[name].abs() - 0.01).clamp_min(0) * before[name].sign()
            assert torch.allclose(after, expected, atol=1e-8)
    zeros = sum(int((after == 0).sum()) for after in model.state_dict().values())
    assert zeros > sum(int((value == 0).sum()) for value in before.values())


# ------------------------------------------------------------------ accumulation, clipping, rates

@pytest.mark.parametrize("clipping", [None, 0.1])
@pytest.mark.parametrize("accumulate, batch, big", [(2, 4, 8), (5, 3, 15)])
def test_accumulated_batches_equal_one_big_batch(accumulate, batch, big, clipping):
    # 21 segments: the last group is short, and so is its last batch.
    data, results = segments(21, dtype=torch.float64), []
    for size, parts in ((batch, accumulate), (big, 1)):
        model, seen = training_loop(
            small_model(dtype=torch.float64), DataLoader(data, size), DataLoader(data, 21), 3, 1e-2,
            weight_decay=0.1, l1_reg=1e-3, gradient_accumulation=parts, device="cpu",
            gradient_clipping=clipping)
        results.append((weights_of(model), seen))
    (ours, seen), (expected, plain) = results
    assert torch.allclose(ours, expected, rtol=1e-9, atol=1e-9)
    for name in ("epoch_train_loss", "epoch_val_loss", "lr"):
        assert seen[name] == pytest.approx(plain[name], rel=1e-9)


def test_clipping_bounds_the_accumulated_gradient():
    # Gradients of two micro-batches on the bias: -20 and +16, -2 together. A bound of 2 on each
    # would leave nothing of them; on both together it changes nothing.
    data = TensorDataset(torch.zeros(2, 1, 2).double(), torch.tensor([10.0, -8.0]).double())
    rows = {}
    for clip in (2.0, 0.5):
        rows[clip] = training_loop(Line(), DataLoader(data, 1), lines(0), 1, lr=0.1,
                                   gradient_accumulation=2, gradient_clipping=clip, device="cpu",
                                   optimizer_type=torch.optim.SGD)[0].linear.bias.item()
    assert rows[2.0] == pytest.approx(0.2, rel=1e-5)
    assert rows[0.5] == pytest.approx(0.05, rel=1e-5)


def rates(epochs, **options):
    return train_line(epochs, lr=1.0, optimizer_type=torch.optim.SGD, label=0.0, **options)[1]["lr"]


def test_step_lr_reduces_the_rate_every_few_epochs():
    assert rates(7, scheduler_and_args=[StepLR, {"step_size": 3, "gamma": 0.2}]) \
        == pytest.approx([1, 1, 1, 0.2, 0.2, 0.2, 0.04])


@pytest.mark.parametrize("accumulate", [1, 2])
def test_cosine_by_batch_follows_the_cosine_through_the_batches(accumulate):
    NotedSGD.rates = []
    training_loop(Line(), lines(0, n=8, batch_size=2), lines(0), 2, 1.0, device="cpu",
                  optimizer_type=NotedSGD, scheduler_and_args=[CosineAnnealingLR, {"T_max": 8}],
                  batch_cosine=True, gradient_accumulation=accumulate)
    assert NotedSGD.rates == pytest.approx([(1 + math.cos(math.pi * b / 8)) / 2
                                            for b in range(0, 8, accumulate)])


def test_one_cycle_by_batch_rises_and_falls():
    NotedSGD.rates = []
    training_loop(Line(), lines(0, n=8, batch_size=2), lines(0), 5, 1.0, device="cpu",
                  optimizer_type=NotedSGD, batch_cosine=True, scheduler_and_args=[
                      OneCycleLR, {"max_lr": 1.0, "total_steps": 21, "cycle_momentum": False}])
    assert len(NotedSGD.rates) == 20 and max(NotedSGD.rates[4:8]) == pytest.approx(1, abs=0.02)
    assert NotedSGD.rates[0] == pytest.approx(0.04) and NotedSGD.rates[-1] < 0.02


def test_plateau_reduces_the_rate_when_the_tune_loss_stays():
    plateau = [ReduceLROnPlateau, {"patience": 1, "factor": 0.5}]
    assert rates(6, scheduler_and_args=plateau) == pytest.approx([1, 1, 1, 0.5, 0.5, 0.25])


@pytest.mark.parametrize("scheduler, after", [
    (None, [1, 1, 1]),
    ([StepLR, {"step_size": 2, "gamma": 0.1}], [1, 1, 0.1]),
    ([CosineAnnealingLR, {"T_max": 2}], [1, 0.5, 0]),
    ([ReduceLROnPlateau, {"patience": 0, "factor": 0.5}], [1, 1, 0.5]),
])
def test_the_rate_warms_up_from_a_tenth_and_then_the_scheduler_takes_over(scheduler, after):
    assert rates(7, scheduler_and_args=scheduler, warmup_epochs=4) \
        == pytest.approx([0.1, 0.325, 0.55, 0.775] + after, abs=1e-12)


def test_the_rate_that_is_reported_is_the_one_that_was_used():
    NotedSGD.rates = []
    seen = train_line(5, lr=1.0, optimizer_type=NotedSGD, warmup_epochs=2,
                      scheduler_and_args=[StepLR, {"step_size": 1, "gamma": 0.5}])[1]
    assert NotedSGD.rates == seen["lr"].tolist()


def test_early_stopping_ends_the_run_so_many_epochs_after_the_best():
    seen = train_line(30, label=10, tune_label=3, early_stopping=2)[1]
    assert len(seen["epoch_val_loss"]) == seen["epoch_val_loss"].argmin() + 1 + 2


def test_without_early_stopping_every_epoch_is_run():
    assert len(train_line(30, label=10, tune_label=3)[1]["lr"]) == 30


# ------------------------------------------------------------------------ average of the weights

def test_the_last_steps_weights_are_averaged_tuned_with_and_returned():
    # The gradient of |b - 10| is -1: SGD moves the bias by 0.1 a step, 20 steps of 2 an epoch.
    model, seen = train_line(10, label=10, tune_label=10, criterion="l1", average_weights=0.3,
                             model=Line())
    loaders = lines(10, n=8), lines(10)
    model, seen = training_loop(Line(), *loaders, 10, 0.1, optimizer_type=torch.optim.SGD,
                                criterion="l1", device="cpu", average_weights=0.3)
    last = [0.1 * step for step in range(15, 21)]           # after each of the last six steps
    assert model.linear.bias.item() == pytest.approx(np.mean(last))
    assert seen["epoch_val_loss"][-1] == pytest.approx(10 - np.mean(last))
    assert seen["epoch_val_loss"][6] == pytest.approx(10 - 1.4)         # not yet averaged


# -------------------------------------------------------------------- its data, its reproducibility

def test_repeat_val_draws_anew_at_the_patients_level_and_averages(tmp_path):
    index = create_dataset_index(path=make_file(tmp_path / "f.h5", patients=4))
    dataset = TPP_PPG_dataset(index, "patient", KEYS)
    seen = training_loop(small_model(), make_loader(dataset, 4, shuffle=True),
                         make_loader(dataset, 4), 2, 1e-9, repeat_val=3, device="cpu")[1]
    passes = seen["batch_val_loss"].reshape(2, 3)
    assert len(set(passes.ravel())) == 6
    assert seen["epoch_val_loss"] == pytest.approx(passes.mean(1))


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    path = make_file(tmp_path_factory.mktemp("data") / "f.h5", patients=10, rows=3)
    return split_index(create_dataset_index(path=path), 0)


def train_on_file(parts, seed=0, workers=0, **options):
    reset_all_seeds(seed)
    train, tune = (TPP_PPG_dataset(parts[p], "segment", KEYS) for p in ("train", "tune"))
    model = NormalisedModel(get_model_v3(dropout=0.2, **SMALL), KEYS,
                            fit_normaliser(train, KEYS[1:]))
    return training_loop(model, make_loader(train, 16, shuffle=True, seed=seed, workers=workers),
                         make_loader(tune, 16, workers=workers), 2, 1e-3, device="cpu", **options)


def test_the_same_seed_gives_the_same_bits_with_and_without_workers(parts):
    first, second, with_workers, other = (
        weights_of(train_on_file(parts, **options)[0])
        for options in ({}, {}, {"workers": 2}, {"seed": 1}))       # with dropout, too
    assert torch.equal(first, second) and torch.equal(first, with_workers)
    assert not torch.equal(first, other)


def test_an_experiments_own_loader_and_network_train(parts):
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.ppg, self.out = nn.Conv1d(1, 3, 9, 4), nn.Linear(6, 1)

        def forward(self, ppg, map_, dbp, hr):
            vitals = torch.stack([map_ / 100, dbp / 100, hr / 100], 1)
            return self.out(torch.cat([self.ppg(ppg).amax(2), vitals], 1))

    loaders = [DataLoader(TPP_PPG_dataset(parts[p], "segment", KEYS), 16, shuffle=p == "train",
                          drop_last=p == "train", num_workers=1) for p in ("train", "tune")]
    model, seen = training_loop(Own(), *loaders, 3, 1e-2, device="cpu")
    assert isinstance(model, Own) and seen["epoch_train_loss"][-1] < seen["epoch_train_loss"][0]


TWO_PROCESSES = """
import sys
import torch
import torch.distributed as dist
sys.path[:0] = sys.argv[1:3]
from conftest import make_file
from test_training_header import KEYS, weights_of
import training_header as th
if "RANK" in __import__("os").environ:
    dist.init_process_group("gloo")
rank, world = th.distributed()
parts = th.split_index(th.create_dataset_index(path=sys.argv[3]), 0)
train, tune = (th.TPP_PPG_dataset(parts[p], "segment", KEYS) for p in ("train", "tune"))
torch.manual_seed(0)
network = th.get_model_v3(3, widths=(4, 4, 8), kernel_sizes=5)
model = th.NormalisedModel(network, KEYS, th.fit_normaliser(train, KEYS[1:])).double()

class Doubles(torch.utils.data.DataLoader):
    def __iter__(self):
        for batch in super().__iter__():
            yield tuple(t.double() for t in batch)

loaders = []
for data, batch in ((train, 8), (tune, 4)):
    loader = th.make_loader(data, batch, shuffle=data is train, rank=rank, world=world)
    loaders.append(Doubles(data, batch_size=None, sampler=loader.sampler, collate_fn=tuple))
model, seen = th.training_loop(model, *loaders, 4, 2e-3, l1_reg=1e-3, gradient_clipping=50.0,
                               gradient_accumulation=2, device="cpu")
if rank == 0:
    torch.save([weights_of(model), seen["epoch_train_loss"].tolist(),
                seen["epoch_val_loss"].tolist()], sys.argv[4])
"""


def test_two_processes_equal_one_to_the_ninth_digit(tmp_path):
    # 9 tune segments in batches of 4: the second process has none of the last batch.
    data = make_file(tmp_path / "f.h5", patients=10, encounters=1, rows=9)
    (tmp_path / "two.py").write_text(TWO_PROCESSES)
    found = []
    for launcher in ([], ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]):
        out = tmp_path / f"out{len(found)}"
        done = subprocess.run(
            [sys.executable, *launcher, tmp_path / "two.py", ROOT, os.path.join(ROOT, "tests"),
             data, out], capture_output=True, text=True, env=dict(os.environ, OMP_NUM_THREADS="1"))
        assert done.returncode == 0, done.stderr
        found.append(torch.load(out, weights_only=True))
    (weights, train_loss, tune_loss), (weights2, train_loss2, tune_loss2) = found
    assert torch.allclose(weights2, weights, rtol=1e-9, atol=1e-9)
    assert train_loss2 == pytest.approx(train_loss, rel=1e-9)
    assert tune_loss2 == pytest.approx(tune_loss, rel=1e-9)


# ---------------------------------------------------------------------------------------- resuming

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


def train_small(folder, interrupt=None, level="segment", plain=False, own=None,
                **options):
    """Weights and trajectories of a small network; `interrupt` (epoch, batch) stops it there."""
    reset_all_seeds(0)
    index = create_dataset_index(path=str(folder / "d.h5"))
    dataset = TPP_PPG_dataset(index, level, KEYS)
    network = own() if own else get_model_v3(dropout=0.3, **SMALL)
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
    ((3, 2), {"average_weights": 0.6, "optimizer_type": torch.optim.AdamW, "weight_decay": 0.1}),
    ((1, 1), {"level": "patient", "total_epochs": 9}),
    ((1, 2), {"plain": True}),
    ((1, 2), {"own": MyNet, "criterion": mean_cubic}),
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


def test_a_state_of_another_network_is_refused_in_one_line(tmp_path):
    make_file(tmp_path / "d.h5", patients=16, encounters=1, rows=3)
    with pytest.raises(Interrupted):
        train_small(tmp_path, (1, 3))
    with pytest.raises(TrainingError, match="not the state of this run") as caught:
        train_line(3, resume_path=str(tmp_path / "state.pth"))
    assert "\n" not in str(caught.value)


# ------------------------------------------------------------------ networks and losses of your own

def test_a_network_and_a_loss_of_your_own_train_save_load_and_predict(parts, tmp_path):
    train, tune = (TPP_PPG_dataset(parts[p], "segment", KEYS) for p in ("train", "tune"))
    results = []
    for criterion in (cubic, mean_cubic):
        torch.manual_seed(0)
        model = NormalisedModel(MyNet(), KEYS, fit_normaliser(train, KEYS[1:]))
        model, seen = training_loop(model, make_loader(train, 16, shuffle=True),
                                    make_loader(tune, 16), 3, 1e-2, criterion=criterion,
                                    device="cpu")
        assert seen["epoch_train_loss"][-1] < seen["epoch_train_loss"][0]
        results.append(seen["epoch_train_loss"])
    assert results[0] == pytest.approx(results[1], rel=1e-4)    # [B] and scalar are the same
    save_checkpoint(tmp_path / "m.pth", model)
    again = load_model(tmp_path / "m.pth", network=MyNet())
    expected, _, features = predict_with_spread(model, tune, device="cpu", collect_features=True)
    assert np.array_equal(predict_dataset(again, tune, device="cpu"), expected)
    assert features.shape == (len(tune), 6) and again.outputs == 1


def test_without_features_there_are_none(parts):
    class Plain(nn.Module):
        def forward(self, ppg, *vitals):
            return vitals[0][:, None] + 0 * ppg.mean(2)

    train = TPP_PPG_dataset(parts["train"], "segment", KEYS)
    model = NormalisedModel(Plain(), KEYS, fit_normaliser(train, KEYS[1:]))
    assert predict_with_spread(model, train, device="cpu", collect_features=True)[1:] == (None,
                                                                                          None)


def test_the_published_networks_features_are_what_its_head_sees(parts):
    model, dataset = wrapped(), TPP_PPG_dataset(parts["tune"], "segment", KEYS)
    found = predict_with_spread(model, dataset, device="cpu", collect_features=True)
    assert np.allclose(found[0], predict_dataset(model, dataset, device="cpu"), atol=1e-4)
    with torch.no_grad():
        expected = model.network.features(*model.normalise(dataset[np.arange(len(dataset))][:4]))
    assert np.allclose(found[2], expected, atol=1e-4)


def test_a_scalar_loss_takes_no_weights_for_segments():
    data = TensorDataset(torch.zeros(4, 1, 2).double(), torch.ones(4).double(),
                         torch.ones(4).double())
    with pytest.raises(TrainingError, match="weights for segments need a loss of each segment"):
        training_loop(Line(), DataLoader(data, 2), lines(0), 1, 0.1, device="cpu",
                      criterion=lambda a, b: (a - b).mean(), weigh=lambda se: se)


@pytest.mark.parametrize("weights", [[1.0, 1.0], [1.5, 0.5]])
def test_segments_are_weighed(weights):
    data = TensorDataset(torch.zeros(2, 1, 2).double(), torch.tensor(weights).double(),
                         torch.tensor([2.0, -4.0]).double())
    model, seen = training_loop(Line(), DataLoader(data, 2), lines(0), 1, 0.1, device="cpu",
                                optimizer_type=torch.optim.SGD, weigh=lambda w: w)
    assert model.linear.bias.item() == pytest.approx(0.1 * (weights[0] * 2 - weights[1] * 4))
    assert seen["epoch_train_loss"][0] == pytest.approx(10)     # what is reported has no weights


def test_the_likelihood_is_that_of_pytorch_and_its_gradient_that_of_the_squared_error():
    estimate = torch.tensor([40.0, 30.0], requires_grad=True)
    spread, label = torch.tensor([3.0, 8.0], requires_grad=True), torch.tensor([42.0, 20.0])
    loss = LOSSES["nll"].function(torch.stack([estimate, spread], 1), label)
    expected = nn.functional.gaussian_nll_loss(estimate, label, spread ** 2, reduction="none")
    assert torch.allclose(loss, expected)
    loss.sum().backward()
    assert torch.allclose(estimate.grad, 2 * (estimate.detach() - label))
    # at the true spread, |error|, the spread has nothing to gain
    wide = torch.tensor([2.0, 10.0], requires_grad=True)
    LOSSES["nll"].function(torch.stack([estimate.detach(), wide], 1), label).sum().backward()
    assert torch.allclose(wide.grad, torch.zeros(2), atol=1e-6)


def test_the_spread_learns_where_the_label_is_noisy():
    """Labels whose SD is 1 or 10 mmHg, as the vital says."""
    torch.manual_seed(0)
    vital = torch.rand(512)
    label = 40 + torch.randn(512) * torch.where(vital > 0.5, 10.0, 1.0)
    loader = DataLoader(TensorDataset(vital, label), 64)
    normaliser = {"map": {"mean": 0.5, "sd": 0.3}, "tpp": {"mean": 40.0, "sd": 7.0}}
    model = NormalisedModel(get_model_v3(1, in_channels=0, num_outputs=2), ["map", "tpp"],
                            normaliser)
    model, seen = training_loop(model, loader, loader, 60, 3e-3, criterion="nll", device="cpu")
    spread = model.eval()(torch.tensor([0.1, 0.9]))[:, 1]
    assert 0.5 < spread[0] < 2 and 7 < spread[1] < 13
    assert seen["epoch_val_loss"][-1] < seen["epoch_val_loss"][0]


def test_no_loss_is_called_a_squared_error_that_is_none():
    assert all(("mmHg²" in loss.label) == (loss.unit == "mmHg²") for loss in LOSSES.values())
    assert "mmHg" not in LOSSES["nll"].label


def test_huber_is_half_the_squared_error_of_small_ones_and_linear_in_large_ones():
    found = LOSSES["huber"].function(torch.tensor([1.0, 20.0]), torch.zeros(2))
    assert found.tolist() == pytest.approx([0.5, 5 * (20 - 2.5)])


def test_a_learnable_label_is_learned():
    data = DataLoader(segments(96), 16, shuffle=True), DataLoader(segments(48, seed=1), 48)
    reset_all_seeds(0)
    seen = training_loop(small_model(), *data, 15, 1e-2, device="cpu")[1]
    assert seen["epoch_val_loss"].min() < 0.1 * segments(48, seed=1).tensors[-1].var()


# ----------------------------------------------------------------------------- numbers and devices

def test_bf16_autocast_runs_on_the_cpu_and_stays_near_float32():
    data = segments(16)
    exact, short = (training_loop(small_model(), DataLoader(data, 8), DataLoader(data, 8), 2, 1e-3,
                                  device="cpu", precision=precision)[1]["epoch_val_loss"]
                    for precision in (None, "bf16"))
    assert not np.array_equal(exact, short) and short == pytest.approx(exact, rel=0.03)


@pytest.mark.parametrize("options, message", [
    ({"criterion": "hubris"}, "--loss hubris: expected mse, l1, huber, nll or file.py:Name"),
    ({"precision": "int8"}, "precision 'int8'"),
    ({"batch_cosine": True}, "batch_cosine needs"),
    ({"device": "cuda:99"}, "device 'cuda:99'"),
    ({"device": "toaster"}, "device 'toaster'"),
    ({"criterion": "nll"}, r"output has shape \(4, 1\); expected \[4, 2\]"),
    ({"criterion": lambda a, b: torch.zeros(7)}, r"the loss has shape \(7,\)"),
])
def test_options_that_cannot_be_are_refused_in_one_line(options, message):
    with pytest.raises(TrainingError, match=message) as caught:
        train_line(1, **options)
    assert "\n" not in str(caught.value)


def test_no_epochs_or_no_batches_are_refused():
    with pytest.raises(TrainingError, match="expected at least 1"):
        train_line(0)
    with pytest.raises(TrainingError, match="empty"):
        training_loop(Line(), DataLoader(lines(0, n=3).dataset, 4, drop_last=True), lines(0), 1,
                      0.1, device="cpu")


@pytest.mark.parametrize("label, tune_label, message", [
    (math.nan, 0, "the training loss is not finite at epoch 1, batch 1"),
    (0, math.inf, "the tune loss is inf after epoch 1")])
def test_a_loss_that_is_not_finite_stops_the_run_in_one_line(label, tune_label, message):
    with pytest.raises(TrainingError, match=message) as caught:
        train_line(3, label=label, tune_label=tune_label)
    assert "\n" not in str(caught.value)


def test_diverging_weights_are_noticed():
    with pytest.raises(TrainingError, match="loss is (inf|nan) (at|after) epoch"):
        train_line(900, label=10, lr=100.0)


def test_the_batch_that_is_not_finite_is_named():
    data = TensorDataset(torch.zeros(6, 1, 2).double(), torch.tensor([0, 0, 0, 0, math.nan, 0]))
    with pytest.raises(NonFiniteLoss) as caught:
        training_loop(Line(), DataLoader(data, 1), lines(0), 1, 0.1, device="cpu",
                      gradient_accumulation=2, optimizer_type=torch.optim.SGD)
    assert caught.value.epoch == 0 and caught.value.batches == [4, 5]


@needs_cuda
@pytest.mark.parametrize("precision", [None, "float32", "bf16"])
def test_cuda_trains_as_the_cpu_does(parts, precision):
    expected = train_on_file(parts)[1]["epoch_train_loss"]
    reset_all_seeds(0)
    train, tune = (TPP_PPG_dataset(parts[p], "segment", KEYS) for p in ("train", "tune"))
    model = NormalisedModel(get_model_v3(**SMALL), KEYS, fit_normaliser(train, KEYS[1:]))
    loaders = (make_loader(train, 16, shuffle=True, workers=1, pin_memory=True),
               make_loader(tune, 16, pin_memory=True))
    model, seen = training_loop(model, *loaders, 2, 1e-3, device="cuda:0", precision=precision)
    assert seen["epoch_train_loss"] == pytest.approx(expected, rel=0.1)
    assert next(model.parameters()).device.type == "cpu"


@needs_cuda
def test_cuda_predicts_what_the_cpu_predicts(parts):
    model = wrapped()
    dataset = TPP_PPG_dataset(parts["tune"], "segment", KEYS)
    expected = predict_dataset(model, dataset, device=torch.device("cpu"))
    ours = predict_dataset(model, dataset, device=torch.device("cuda:0"))
    assert np.allclose(ours, expected, atol=0.02)


def test_predictions_stand_in_the_datasets_order_for_any_batch_size(parts):
    model, dataset = wrapped(), TPP_PPG_dataset(parts["train"], "segment", KEYS)
    cpu = torch.device("cpu")
    whole = predict_dataset(model, dataset, 256, cpu)
    assert whole.shape == (len(dataset),)
    assert np.allclose(whole, predict_dataset(model, dataset, 7, cpu), atol=1e-4)
    with torch.no_grad():
        one = model(*[t[None] for t in dataset[11][:4]]).item()
    assert whole[11] == pytest.approx(one, abs=1e-4)


# -------------------------------------------------------------------------------------- the wrapper

def wrapped(seed=0):
    return NormalisedModel(small_model(seed), KEYS, NORMALISER).eval()


def some_inputs(n=4):
    rng = torch.Generator().manual_seed(3)
    ppg = torch.randn(n, 1, 600, generator=rng).cumsum(2)
    return ppg, [NORMALISER[k]["mean"] + torch.randn(n, generator=rng) for k in KEYS[1:-1]]


def test_the_wrapper_ignores_the_gain_and_the_offset_of_the_ppg():
    ppg, vitals = some_inputs()
    model = wrapped()
    with torch.no_grad():
        expected = model(ppg, *vitals)
        for gain, offset in ((1e-3, 0), (100, 0), (1, 50), (0.004, 0.5), (1000, -2e4)):
            assert torch.allclose(model(ppg * gain + offset, *vitals), expected, atol=2e-2)
        assert not torch.allclose(model(ppg.flip(2) ** 2, *vitals), expected, atol=2e-2)


def test_a_flat_ppg_gives_a_finite_number():
    vitals = some_inputs()[1]
    for level in (0.0, 70.3, -1e4):
        out = wrapped()(torch.full((4, 1, 600), level), *vitals)
        assert torch.isfinite(out).all()
        out.sum().backward()


def test_the_wrapper_takes_raw_units_and_gives_mmhg():
    ppg, vitals = some_inputs()
    model = wrapped()
    centred = ppg - ppg.mean(2, keepdim=True)
    scaled = [(v - NORMALISER[k]["mean"]) / NORMALISER[k]["sd"] for k, v in zip(KEYS[1:], vitals)]
    with torch.no_grad():
        inner = model.network(centred / centred.std(2, unbiased=False, keepdim=True), *scaled)
        assert torch.allclose(model(ppg, *vitals), 40 + 15 * inner, atol=1e-4)


def test_a_network_of_two_outputs_gives_mmhg_and_a_spread_above_nothing():
    torch.manual_seed(0)
    normaliser = {"map": {"mean": 75.0, "sd": 10.0}, "tpp": {"mean": 35.0, "sd": 12.0}}
    network = get_model_v3(1, num_outputs=2, widths=(4, 4, 8), kernel_sizes=5)
    model = NormalisedModel(network, ["ppg", "map", "tpp"], normaliser).eval()
    ppg, vital = torch.randn(5, 1, 600), torch.full((5,), 80.0)
    out, inner = model(ppg, vital), network(*model.normalise([ppg, vital]))
    assert model.outputs == 2
    assert torch.allclose(out[:, 0], inner[:, 0] * 12 + 35, atol=1e-4)
    assert torch.allclose(out[:, 1], 12 * (torch.log1p(inner[:, 1].exp()) + 0.01), atol=1e-4)
    with torch.no_grad():
        network.mlp[3].bias[1] = -1e4
    assert (model(ppg, vital)[:, 1] >= 0.12 - 1e-6).all()


def test_with_an_anchor_the_network_adds_to_the_ridge_on_the_vitals(parts):
    train = TPP_PPG_dataset(parts["train"], "segment", KEYS)
    anchor = fit_anchor(train, KEYS)
    network = small_model()
    model = NormalisedModel(network, KEYS, fit_normaliser(train, KEYS[1:]), anchor=anchor).eval()
    batch = train[np.arange(20)]
    ridge = anchor["intercept"] + sum(anchor["coefficients"][key] * values
                                      for key, values in zip(KEYS[1:-1], batch[1:-1]))
    with torch.no_grad():
        expected = ridge[:, None] + anchor["sd"] * network(*model.normalise(batch[:-1]))
        assert torch.allclose(model(*batch[:-1]), expected, atol=1e-3)
    assert anchor["sd"] <= train.column("tpp").std() and set(anchor["coefficients"]) == {
        "map", "dbp", "hr"}


def test_the_normalisation_of_the_ppg_is_chosen_by_name():
    ppg, vitals = some_inputs()
    model = NormalisedModel(small_model(), KEYS, NORMALISER, ppg_normalisation="none")
    assert torch.equal(model.normalise([ppg, *vitals])[0], ppg)
    with pytest.raises(DataError, match="PPG normalisation 'robust': expected segment or none"):
        NormalisedModel(small_model(), KEYS, NORMALISER, ppg_normalisation="robust")


def test_a_copy_of_a_model_has_its_own_weights():
    ppg, vitals = some_inputs()
    model = wrapped()
    expected = model(ppg, *vitals)
    other = copy.deepcopy(model)
    with torch.no_grad():
        model.network.mlp[-1].bias += 1
    assert torch.equal(other(ppg, *vitals), expected)
    assert not torch.equal(model(ppg, *vitals), expected)
    assert set(model.state_dict()) == {f"network.{k}" for k in model.network.state_dict()}


@pytest.mark.parametrize("keys", [KEYS[:-2] + KEYS[-1:], KEYS[:-1] + ["pp", "tpp"]])
def test_keys_that_do_not_fit_the_network_are_refused(keys):
    normaliser = {**NORMALISER, "pp": NORMALISER["hr"]}
    with pytest.raises(DataError, match="MyFirstResNet does not take them .expected 3 vitals"):
        NormalisedModel(small_model(), keys, normaliser)
    with pytest.raises(DataError, match="the normaliser lacks"):
        NormalisedModel(small_model(), KEYS, {})


def test_a_network_of_other_outputs_is_refused_in_one_line():
    class Wide(nn.Module):
        def forward(self, ppg, *vitals):
            return ppg[:, 0]

    with pytest.raises(DataError, match=r"Wide: an output of shape \(2, 3600\)"):
        NormalisedModel(Wide(), KEYS, NORMALISER)


# ----------------------------------------------------------------------------- modules and imports

def python(code, cwd, **environment):
    """Runs Python code in a folder where ours are not on the path; returns its output's lines."""
    environment = {**{k: v for k, v in os.environ.items() if k != "PYTHONPATH"},
                   "PYTHONDONTWRITEBYTECODE": "1", **environment}
    done = subprocess.run([sys.executable, "-c", code], cwd=cwd, env=environment,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


COPIED = {"checkpoint": ["models", "datasets", "tk_utils"]}
COPIED["normalised_model"] = [*COPIED["checkpoint"], "checkpoint", "kernels", "cuda_graph"]
COPIED["training_header"] = [*COPIED["normalised_model"], "normalised_model"]


@pytest.mark.parametrize("name", COPIED)
def test_a_module_runs_with_the_files_that_its_docstring_names(name, tmp_path):
    for file in (name, *COPIED[name]):
        with open(os.path.join(ROOT, f"{file}.py"), encoding="utf-8") as source:
            (tmp_path / f"{file}.py").write_text(source.read(), encoding="utf-8")
    needed = python(f"import {name}; print({name}.__doc__)", tmp_path)
    assert all(f"{file}.py" in " ".join(needed) for file in COPIED[name])


def test_importing_our_modules_does_no_work(tmp_path):
    code = """if True:
        import random, numpy, torch
        before = torch.get_rng_state(), random.getstate(), repr(numpy.random.get_state())
        import training_header, evaluate, train_resnet
        after = torch.get_rng_state(), random.getstate(), repr(numpy.random.get_state())
        print(torch.equal(before[0], after[0]), before[1:] == after[1:])
        print("DEVICE" in vars(training_header), torch.cuda.is_initialized())
        print(training_header.DEVICE == training_header.choose_device())
    """
    assert python(code, tmp_path, PYTHONPATH=ROOT) == ["True True", "False False", "True"]
    assert os.listdir(tmp_path) == []


def test_a_star_import_brings_an_experiment_all_it_needs(tmp_path):
    needed = ["DEVICE", "TPP_PPG_dataset", "create_dataset_index", "load_dataset_index",
              "split_index", "make_loader", "fit_normaliser", "get_model_v3", "MyFirstResNet",
              "ConvBlock", "ResBlockV1", "ResBlockV2", "ResBlockV3", "training_loop", "load_model",
              "StepLR", "CosineAnnealingLR", "ReduceLROnPlateau", "CheckpointError",
              "save_checkpoint", "PPG_NORMALISATIONS", "LOSSES"]
    code = f"from training_header import *; print([n for n in {needed} if n not in globals()])"
    assert python(code, tmp_path, PYTHONPATH=ROOT) == ["[]"]
    for name in training_header.__all__:
        assert getattr(training_header, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'DEVICES'"):
        _ = training_header.DEVICES
