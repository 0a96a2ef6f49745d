"""training_header.py: the loop against arithmetic by hand, resuming, the normalised model, and
other people's networks and losses."""
# ruff: noqa: I001
import copy
import os
import signal

import numpy as np
import pytest
import torch
from conftest import KEYS, fork_ranks, make_file, printed_by
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from anchor import FOLDS, cross_validate, read_pulse
from training_header import (
    LOSSES, PPG_NORMALISATIONS, CheckpointError, CosineAnnealingLR, DataError, Interrupted,
    NonFiniteLoss, NormalisedModel, ReduceLROnPlateau, StepLR, TPP_PPG_dataset, TrainingError,
    choose_loss, create_dataset_index, distributed, fit_anchor, fit_blend, fit_normaliser,
    get_model_v3, kept_shares, load_model, make_loader, predict_dataset, predict_with_anchor,
    predict_with_spread, refit_anchor, reset_all_seeds, save_checkpoint, training_loop)

SMALL = {"num_discrete": 3, "widths": (4, 4, 8), "kernel_sizes": 5}
NORMALISER = {"map": {"mean": 75.0, "sd": 11.0}, "dbp": {"mean": 56.0, "sd": 10.0},
              "hr": {"mean": 77.0, "sd": 17.0}, "tpp": {"mean": 40.0, "sd": 15.0}}
SGD = torch.optim.SGD


class Line(nn.Module):
    """A network of your own: a straight line on the PPG samples."""

    def __init__(self, weights=(0.0, 0.0), bias=0.0):
        super().__init__()
        self.linear = nn.Linear(len(weights), 1).double()
        with torch.no_grad():
            self.linear.weight.copy_(torch.tensor([weights], dtype=torch.float64))
            self.linear.bias.fill_(bias)

    def forward(self, ppg):
        return self.linear(ppg[:, 0])


class Constant(Line):
    def forward(self, ppg):
        return super().forward(ppg).detach()


class MyNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.ppg, self.out = nn.Conv1d(1, 3, 9, 4), nn.Linear(6, 1)

    def forward(self, ppg, *vitals):
        return self.out(torch.cat([self.ppg(ppg).amax(2), torch.stack(vitals, 1)], 1))


def cubic(prediction, label):
    return (prediction - label).abs() ** 3 / 100


class NotedSGD(SGD):
    """SGD that records the learning rate of each step."""

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


def train_line(epochs, label=0.0, tune_label=0.0, model=None, loader=None, **options):
    loader = lines(label) if loader is None else loader
    return training_loop(model or Line(), loader, lines(tune_label), epochs,
                         **{"lr": 0.1, "optimizer_type": SGD, "device": "cpu", **options})


def test_the_best_epochs_weights_are_returned_and_early_stopping_counts_from_it():
    # The bias walks from 0 towards 10 and passes the tune label 3 on its way.
    rows = []
    model, seen = train_line(30, label=10, tune_label=3, early_stopping=2,
                             on_epoch=lambda log: rows.append(log[-1]))
    best = int(seen["epoch_val_loss"].argmin())
    assert (model.linear.bias.item() - 3) ** 2 == pytest.approx(seen["epoch_val_loss"][best])
    assert [row["epoch"] for row in rows] == list(range(1, best + 1 + 2 + 1))
    assert [row["tune_loss"] for row in rows] == seen["epoch_val_loss"].tolist()
    assert rows[-1]["best_epoch"] == best + 1


def test_trajectories_have_a_value_per_batch_and_epoch_and_each_epoch_may_have_its_file(tmp_path):
    # Adam changes the weights in place: a shallow copy would change with them.
    model, seen = training_loop(small_model(), DataLoader(segments(20, 1), 8),
                                DataLoader(segments(9, 2), 4), 6, 0.05, device="cpu",
                                checkpoints_name=str(tmp_path / "each"))
    assert {k: len(v) for k, v in seen.items()} == {
        "batch_train_loss": 18, "epoch_train_loss": 6, "batch_val_loss": 18, "epoch_val_loss": 6,
        "lr": 6}
    assert all(isinstance(v, np.ndarray) and v.dtype == np.float64 for v in seen.values())
    # An epoch's loss is the mean over segments, so a short last batch counts by its size.
    for name, sizes in (("train", [8, 8, 4]), ("val", [4, 4, 1])):
        per_epoch = seen[f"batch_{name}_loss"].reshape(6, 3) @ np.array(sizes) / sum(sizes)
        assert per_epoch == pytest.approx(seen[f"epoch_{name}_loss"], rel=1e-5)
    for number, loss in enumerate(seen["epoch_val_loss"], 1):
        saved = torch.load(tmp_path / f"each_{number}.pth", weights_only=True)
        same = all(torch.equal(saved[k], v) for k, v in model.state_dict().items())
        assert same == (loss == seen["epoch_val_loss"].min())


def test_the_tune_loss_is_taken_in_evaluation_mode_without_gradients():
    modes, model = [], Line()
    model.register_forward_hook(
        lambda network, *_: modes.append((network.training, torch.is_grad_enabled())))
    train_line(2, model=model)
    assert modes == [(True, True), (False, False)] * 2


@pytest.mark.parametrize("criterion, train_loss, tune_loss", [
    ("mse", 9, 400), ("l1", 3, 20), ("huber", 4.5, 5 * (20 - 2.5)), (cubic, 0.27, 80),
    (lambda prediction, label: cubic(prediction, label).mean(), 0.27, 80)])
def test_each_loss_by_hand(criterion, train_loss, tune_loss):
    seen = train_line(1, label=3, tune_label=20, criterion=criterion, lr=1e-12)[1]
    assert seen["epoch_train_loss"] == pytest.approx([train_loss])
    assert seen["epoch_val_loss"] == pytest.approx([tune_loss])


def test_the_likelihood_is_pytorchs_and_the_estimates_gradient_is_the_squared_errors():
    estimate = torch.tensor([40.0, 30.0], requires_grad=True)
    spread, label = torch.tensor([3.0, 8.0], requires_grad=True), torch.tensor([42.0, 20.0])
    loss = LOSSES["nll"].function(torch.stack([estimate, spread], 1), label)
    expected = nn.functional.gaussian_nll_loss(estimate, label, spread ** 2, reduction="none")
    assert torch.allclose(loss, expected)
    loss.sum().backward()
    assert torch.allclose(estimate.grad, 2 * (estimate.detach() - label))
    # the first spread falls from 3 towards its error of 2 mmHg, the second rises from 8 to 10
    assert spread.grad[0] > 0 > spread.grad[1]


@pytest.mark.parametrize("options, batch_size", [({}, 4), ({"gradient_accumulation": 4}, 1)])
def test_l1_shrinks_weights_once_a_step_to_exactly_zero_and_spares_biases(options, batch_size):
    # Samples are 0, so weights have no gradient; the bias is right already.
    model = train_line(1, tune_label=2, model=Line((0.5, -0.002), bias=2.0), l1_reg=0.1,
                       loader=lines(2.0, n=8, batch_size=batch_size), **options)[0]
    first, second = model.linear.weight[0].tolist()     # two steps of 0.1 * 0.1 each
    assert first == pytest.approx(0.48, abs=1e-12) and second == 0
    assert model.linear.bias.item() == 2
    # One step by hand: the prediction is w + w, its gradient 2 (w + w - y).
    model = train_line(1, model=Line((0.05, 0.05)), loader=lines(-0.3, samples=1.0), l1_reg=0.1)[0]
    stepped = 0.05 - 0.1 * 2 * (0.05 + 0.05 + 0.3)      # shrinking first would end elsewhere
    assert model.linear.weight[0].tolist() == pytest.approx([stepped + 0.01] * 2, abs=1e-12)


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


@pytest.mark.parametrize("scheduler, options, expected", [
    ([StepLR, {"step_size": 3, "gamma": 0.2}], {}, [1, 1, 1, 0.2, 0.2, 0.2, 0.04]),
    ([ReduceLROnPlateau, {"patience": 1, "factor": 0.5}], {}, [1, 1, 1, 0.5, 0.5, 0.25]),
    (None, {"warmup_epochs": 4}, [0.1, 0.325, 0.55, 0.775, 1, 1, 1]),
    ([StepLR, {"step_size": 2, "gamma": 0.1}], {"warmup_epochs": 2}, [0.1, 0.55, 1, 1, 0.1]),
    ([CosineAnnealingLR, {"T_max": 2}], {"warmup_epochs": 2}, [0.1, 0.55, 1, 0.5, 0]),
    ([ReduceLROnPlateau, {"patience": 0}], {"warmup_epochs": 2}, [0.1, 0.55, 1, 1, 0.1])])
def test_the_rate_warms_up_and_follows_the_scheduler_by_epoch(scheduler, options, expected):
    NotedSGD.rates = []
    seen = train_line(len(expected), lr=1.0, optimizer_type=NotedSGD, scheduler_and_args=scheduler,
                      **options)[1]
    assert seen["lr"] == pytest.approx(expected, abs=1e-12)
    assert NotedSGD.rates == seen["lr"].tolist()        # the reported rates were used


@pytest.mark.parametrize("accumulate", [1, 2])
def test_cosine_by_batch_follows_the_cosine_through_the_batches(accumulate):
    NotedSGD.rates = []
    train_line(2, lr=1.0, loader=lines(0, n=8, batch_size=2), optimizer_type=NotedSGD,
               scheduler_and_args=[CosineAnnealingLR, {"T_max": 8}], batch_cosine=True,
               gradient_accumulation=accumulate)
    cosine = (1 + np.cos(np.pi * np.arange(8) / 8)) / 2
    assert NotedSGD.rates == pytest.approx(cosine[::accumulate])


def test_the_last_steps_weights_are_averaged_tuned_with_and_returned():
    # The gradient of |b - 10| is -1: SGD moves the bias by 0.1 a step, 20 steps of 2 an epoch.
    model, seen = train_line(10, tune_label=10, loader=lines(10, n=8), criterion="l1",
                             average_weights=0.3)
    last = [0.1 * step for step in range(15, 21)]           # after each of the last six steps
    assert model.linear.bias.item() == pytest.approx(np.mean(last))
    assert seen["epoch_val_loss"][-1] == pytest.approx(10 - np.mean(last))
    assert seen["epoch_val_loss"][6] == pytest.approx(10 - 1.4)         # not yet averaged


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    """24 segments of 8 patients."""
    path = make_file(tmp_path_factory.mktemp("data") / "f.h5", patients=8, encounters=1, rows=3)
    return create_dataset_index(path=path)


def train_on_file(index, *, level="segment", seed=0, workers=0, own=None, plain=False,
                  double=False, **options):
    """(model, trajectories) of a small network; an epoch has four batches."""
    reset_all_seeds(seed)
    (rank, world), dataset = distributed(), TPP_PPG_dataset(index, level, KEYS)
    network = own() if own else get_model_v3(dropout=0.0 if double else 0.3, **SMALL)
    model = NormalisedModel(network, KEYS, fit_normaliser(dataset, KEYS[1:]))
    loaders = [make_loader(dataset, len(dataset) // 4, shuffle=True, seed=seed, workers=workers,
                           rank=rank, world=world),
               make_loader(dataset, 23, rank=rank, world=world)]
    if plain:       # an experiment's own loader, shuffled by PyTorch's random numbers
        data = TensorDataset(*dataset.read(np.arange(len(dataset))))
        loaders[0] = DataLoader(data, 6, shuffle=True)
    if double:
        model.double()
        for loader in loaders:
            loader.batches.collate_fn = lambda batch: tuple(t.double() for t in batch)
    defaults = {"total_epochs": 4, "lr": 3e-3, "device": "cpu", "l1_reg": 1e-3,
                "scheduler_and_args": [StepLR, {"step_size": 2, "gamma": 0.5}]}
    return training_loop(model, *loaders, **{**defaults, **options})


def test_repeat_val_draws_anew_at_the_patients_level_and_averages(index):
    seen = train_on_file(index, level="patient", total_epochs=2, lr=1e-9, repeat_val=3)[1]
    passes = seen["batch_val_loss"].reshape(2, 3)
    assert len(set(passes.ravel())) == 6
    assert seen["epoch_val_loss"] == pytest.approx(passes.mean(1))


def test_the_same_seed_gives_the_same_bits_with_and_without_workers(index):
    first, second, with_workers, other = (
        weights_of(train_on_file(index, **options)[0])
        for options in ({}, {}, {"workers": 2}, {"seed": 1}))       # dropout included
    assert torch.equal(first, second) and torch.equal(first, with_workers)
    assert not torch.equal(first, other)


def test_two_processes_equal_one_to_the_ninth_digit(index, tmp_path):
    def train():
        model, seen = train_on_file(index, double=True, gradient_clipping=50.0,
                                    gradient_accumulation=2)
        return [weights_of(model), *(torch.from_numpy(seen[f"epoch_{part}_loss"])
                                     for part in ("train", "val"))]

    def work():
        torch.distributed.init_process_group("gloo")
        found = train()
        if distributed()[0] == 0:
            torch.save(found, "out")

    # 24 tune segments in batches of 23: the second process has none of the last batch.
    printed_by(fork_ranks(work, tmp_path), tmp_path)
    for two, one in zip(torch.load(tmp_path / "out", weights_only=True), train()):
        assert torch.allclose(two, one, rtol=1e-9, atol=1e-9)


def with_signal(criterion, step):
    """A loss that sends this process SIGTERM in the given training step."""
    loss, calls = choose_loss(criterion), []

    def function(prediction, label):
        calls.extend([1] * prediction.requires_grad)
        if len(calls) == step and prediction.requires_grad:
            signal.raise_signal(signal.SIGTERM)
        return loss.function(prediction, label)
    return loss._replace(function=function)


@pytest.mark.parametrize("step, options", [
    (7, {}),
    (5, {"gradient_accumulation": 2, "gradient_clipping": 1.0}),
    (11, {"scheduler_and_args": [CosineAnnealingLR, {"T_max": 20}], "batch_cosine": True}),
    (6, {"scheduler_and_args": [ReduceLROnPlateau, {"patience": 0}], "early_stopping": 1,
         "total_epochs": 9, "lr": 0.3}),
    (3, {"warmup_epochs": 2, "criterion": "l1", "optimizer_type": SGD}),
    (15, {"average_weights": 0.6, "optimizer_type": torch.optim.AdamW, "weight_decay": 0.1}),
    (8, {"level": "patient"}),
    (7, {"plain": True}),
    (6, {"own": MyNet, "criterion": lambda *both: cubic(*both).mean()})])
def test_an_interrupted_loop_continues_to_the_same_bits(index, tmp_path, step, options):
    options["resume_path"] = state = str(tmp_path / "state.pth")
    expected, expected_seen = train_on_file(index, **options)
    os.remove(state)
    with pytest.raises(Interrupted, match=f"interrupted (at|after) epoch {(step + 3) // 4}"):
        train_on_file(index, **{**options, "criterion": with_signal(
            options.get("criterion", "mse"), step)})
    if "own" in options:
        with pytest.raises(TrainingError, match="not the state of this run .*linear"):
            train_line(3, resume_path=state)
    torch.rand(7)       # the random generator has moved on
    found, seen = train_on_file(index, **options)
    assert torch.equal(weights_of(found), weights_of(expected))
    assert all(np.array_equal(seen[name], values) for name, values in expected_seen.items())


@pytest.mark.parametrize("options, message", [
    ({"epochs": 0}, "nothing to train"),
    ({"loader": DataLoader(lines(0, n=3).dataset, 4, drop_last=True)}, "nothing to train"),
    ({"criterion": "hubris"}, "--loss hubris: expected mse, l1, huber, nll"),
    ({"precision": "int8"}, "precision 'int8'"),
    ({"device": "cuda:99"}, "device 'cuda:99'"),
    ({"criterion": "nll"}, r"an output of shape \(4, 1\); expected \[B, 2\]"),
    ({"criterion": lambda a, b: a.sum() * torch.ones(7)}, r"the loss has shape \(7,\)"),
    ({"criterion": lambda a, b: (a - b).mean().item()}, "the loss, a float, has no gradient"),
    ({"criterion": lambda a, b: a.detach() - b}, "the loss, a Tensor, has no gradient"),
    ({"criterion": lambda a, b, c: a}, "the loss fails on a batch .TypeError: .* missing 1 requ"),
    ({"criterion": nn.MSELoss}, r"^loss MSELoss: expected a function .* got a class: give an .* "
                                r"MSELoss\(\)"),
    ({"model": Constant()}, "the network's output does not depend on its parameters"),
    ({"loader": lines(0).dataset}, r"expected a loader, make_loader\(dataset, 16\); got the"),
    ({"criterion": 3}, "--loss 3: expected mse"),
    ({"model": nn.Flatten()}, "the network has no parameters"),
    ({"model": nn.Sequential(Line((0, 0)), nn.BatchNorm1d(1).double()),
      "loader": lines(0, batch_size=1)}, "the network fails on a batch .ValueError: Expected more"),
    ({"label": np.nan}, "the training loss is not finite at epoch 1, batch 1"),
    ({"tune_label": np.inf}, "the tune loss is inf after epoch 1"),
    ({"epochs": 900, "label": 10, "lr": 100.0}, "loss is (inf|nan|not finite) (at|after) epoch")])
def test_what_cannot_be_trained_is_refused_in_one_line(options, message):
    with pytest.raises((TrainingError, CheckpointError), match=message) as caught:
        train_line(**{"epochs": 1, **options})
    assert "\n" not in str(caught.value)


def test_the_batches_of_the_step_that_is_not_finite_are_named():
    data = TensorDataset(torch.zeros(6, 1, 2).double(), torch.tensor([0, 0, 0, 0, np.nan, 0]))
    with pytest.raises(NonFiniteLoss) as caught:
        train_line(1, loader=DataLoader(data, 1), gradient_accumulation=2)
    assert (caught.value.epoch, caught.value.batches) == (0, [4, 5])


def test_bf16_autocast_runs_on_the_cpu_and_stays_near_float32(index):
    exact, short = (train_on_file(index, precision=precision)[1]["epoch_val_loss"]
                    for precision in (None, "bf16"))
    assert not np.array_equal(exact, short) and short == pytest.approx(exact, rel=0.03)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
@pytest.mark.parametrize("precision", [None, "float32", "bf16"])
def test_cuda_trains_and_predicts_as_the_cpu_does(index, precision):
    expected = train_on_file(index)[1]["epoch_train_loss"]
    model, seen = train_on_file(index, workers=1, device="cuda:0", precision=precision)
    assert seen["epoch_train_loss"] == pytest.approx(expected, rel=0.1)
    assert next(model.parameters()).device.type == "cpu"
    cpu, cuda = (predict_dataset(model, TPP_PPG_dataset(index, "segment", KEYS), device=device)
                 for device in ("cpu", "cuda:0"))
    assert np.allclose(cuda, cpu, atol=0.02)


def wrapped(seed=0):
    return NormalisedModel(small_model(seed), KEYS, NORMALISER).eval()


def some_inputs(n=4):
    rng = torch.Generator().manual_seed(3)
    ppg = torch.randn(n, 1, 600, generator=rng).cumsum(2)
    return ppg, [NORMALISER[k]["mean"] + torch.randn(n, generator=rng) for k in KEYS[1:-1]]


def test_the_model_takes_raw_units_and_gives_mmhg_at_any_gain_and_offset_of_the_ppg():
    ppg, vitals = some_inputs()
    model = wrapped()
    centred = ppg - ppg.mean(2, keepdim=True)
    scaled = [(v - NORMALISER[k]["mean"]) / NORMALISER[k]["sd"] for k, v in zip(KEYS[1:], vitals)]
    with torch.no_grad():
        inner = model.network(centred / centred.std(2, unbiased=False, keepdim=True), *scaled)
        expected = model(ppg, *vitals)
        assert torch.allclose(expected, 40 + 15 * inner, atol=1e-4)
        for gain, offset in ((1e-3, 0), (100, 0), (1, 50), (0.004, 0.5), (1000, -2e4)):
            assert torch.allclose(model(ppg * gain + offset, *vitals), expected, atol=2e-2)
        assert not torch.allclose(model(ppg.flip(2) ** 2, *vitals), expected, atol=2e-2)
        for level in (0.0, 70.3, -1e4):     # a flat one
            assert torch.isfinite(model(torch.full_like(ppg, level), *vitals)).all()


def test_a_network_with_two_outputs_gives_mmhg_and_a_spread_above_zero():
    ppg, vitals = some_inputs()
    network = get_model_v3(num_outputs=2, **SMALL)
    model = NormalisedModel(network, KEYS, NORMALISER).eval()
    out, inner = model(ppg, *vitals), network(*model.normalise([ppg, *vitals]))
    assert model.outputs == 2
    assert torch.allclose(out[:, 0], inner[:, 0] * 15 + 40, atol=1e-4)
    assert torch.allclose(out[:, 1], 15 * (torch.log1p(inner[:, 1].exp()) + 0.01), atol=1e-4)
    with torch.no_grad():
        network.mlp[3].bias[1] = -1e4
    assert (model(ppg, *vitals)[:, 1] >= 0.15 - 1e-6).all()


def test_with_an_anchor_the_network_adds_to_the_ridge_on_the_vitals(index):
    train = TPP_PPG_dataset(index, "segment", KEYS)
    anchor, network, batch = fit_anchor(train, KEYS), small_model(), train[np.arange(20)]
    # the normal equations on standardised vitals, with a penalty of 1
    raw = np.stack([train.column(key).numpy().astype(float) for key in KEYS[1:-1]], 1)
    label = train.column("tpp").numpy().astype(float)
    scaled = (raw - raw.mean(0)) / raw.std(0)
    slopes = np.linalg.solve(scaled.T @ scaled + np.eye(3), scaled.T @ (label - label.mean()))
    expected = dict(zip(KEYS[1:-1], slopes / raw.std(0)))
    assert anchor["coefficients"] == pytest.approx(expected, rel=1e-9)
    fitted = label.mean() + scaled @ slopes
    assert anchor["sd"] == pytest.approx((label - fitted).std(), rel=1e-9)

    model = NormalisedModel(network, KEYS, fit_normaliser(train, KEYS[1:]), anchor=anchor).eval()
    with torch.no_grad():
        added = anchor["sd"] * network(*model.normalise(batch[:-1]))[:, 0]
        assert np.allclose(model(*batch[:-1])[:, 0], fitted[:20] + added.numpy(), atol=1e-3)


def test_no_patient_is_in_the_fit_that_its_cross_validation_tests(index):
    train = TPP_PPG_dataset(index, "segment", KEYS)
    missing, added, patients = cross_validate(train, KEYS, read_pulse(train))
    assert index.n_patients <= FOLDS and np.array_equal(patients, index.segment_patients())
    others = TPP_PPG_dataset(index.select(index.encounter_patient != 2), "segment", KEYS)
    this = TPP_PPG_dataset(index.select(index.encounter_patient == 2), "segment", KEYS)
    plain, full = (predict_with_anchor(fit_anchor(others, KEYS, pulse), this)
                   for pulse in (None, read_pulse(others)))
    assert np.allclose(missing[patients == 2], this.column("tpp").numpy() - plain, atol=1e-6)
    assert np.allclose(added[patients == 2], full - plain, atol=1e-6)


def test_a_blend_is_of_both_ridges_and_the_network_and_refitted_to_all_patients(index, monkeypatch):
    monkeypatch.setitem(PPG_NORMALISATIONS, "segment", lambda ppg: ppg.abs().log1p())
    train = TPP_PPG_dataset(index, "segment", KEYS)
    anchor = fit_anchor(train, KEYS)
    model = NormalisedModel(small_model(), KEYS, fit_normaliser(train, KEYS[1:]), anchor=anchor)
    with_network = predict_dataset(model, train)
    share = fit_blend(model, train, train)
    pulse_share = model.anchor["pulse_share"]
    assert 0 <= share <= 1 and 0 < pulse_share <= 1     # more inputs, on the segments of the fit
    ridge, with_pulse = (predict_with_anchor(one, train) for one in (
        anchor, fit_anchor(train, KEYS, read_pulse(train))))
    base = ridge + pulse_share * (with_pulse - ridge)
    assert np.allclose(predict_dataset(model, train), base + share * (with_network - base),
                       atol=2e-3)
    before = predict_dataset(model, train)
    halves = [TPP_PPG_dataset(index.select(index.encounter_patient % 2 == half), "segment", KEYS)
              for half in (0, 1)]
    refit_anchor(model, halves[0], halves[0])
    assert np.abs(predict_dataset(model, train) - before).max() > 0.1
    refit_anchor(model, *halves)            # together the same segments, so the same ridges
    assert np.allclose(predict_dataset(model, train), before, atol=2e-3)
    assert kept_shares(model.anchor) == {"network": share, "pulse_statistics": pulse_share}
    assert model.anchor["trained_on"] == anchor and model.anchor["refitted"]


def test_the_normalisation_of_the_ppg_is_chosen_by_name():
    ppg, vitals = some_inputs()
    model = NormalisedModel(small_model(), KEYS, NORMALISER, ppg_normalisation="none")
    assert torch.equal(model.normalise([ppg, *vitals])[0], ppg)
    with pytest.raises(DataError, match="PPG normalisation 'no such': expected segment or none"):
        NormalisedModel(small_model(), KEYS, NORMALISER, ppg_normalisation="no such")


def test_a_copy_of_a_model_has_its_own_weights():
    ppg, vitals = some_inputs()
    model = wrapped()
    expected, other = model(ppg, *vitals), copy.deepcopy(model)
    with torch.no_grad():
        model.network.mlp[-1].bias += 1
    assert torch.equal(other(ppg, *vitals), expected)
    assert set(model.state_dict()) == {f"network.{k}" for k in model.network.state_dict()}


@pytest.mark.parametrize("network, keys, message", [
    (small_model, ["ppg", "map", "dbp", "tpp"],
     "inputs ppg, map, dbp: MyFirstResNet does not take them .ValueError: expected 3 vitals"),
    (lambda: MyNet, KEYS, "network: expected an instance of nn.Module, got <class .*MyNet"),
    (MyNet, ["ppg", "map", "spo2", "tpp"], "normaliser lacks spo2; pass them to fit_norm"),
    (nn.Identity, ["ppg", "tpp"], r"Identity: an output of shape \(2, 1, 3600\)"),
    (lambda: nn.GRU(3600, 1), ["ppg", "tpp"],
     r"GRU: an output of type tuple for .*; expected a tensor")])
def test_a_network_that_does_not_fit_the_keys_is_refused(network, keys, message):
    with pytest.raises(DataError, match=message):
        NormalisedModel(network(), keys, NORMALISER)


def test_a_network_gets_zero_or_the_mean_for_an_input_that_is_left_out(tmp_path):
    ppg, vitals = some_inputs()
    for keys, given in ((["ppg", "tpp"], [ppg]), (KEYS[1:], vitals)):
        model = NormalisedModel(MyNet(), keys, NORMALISER, inputs=KEYS[:-1]).eval()
        normalised = model.normalise(given)
        inputs = ([*normalised, *torch.zeros(3, 4)] if model.with_ppg else
                  [torch.zeros(4, 1, 3600), *normalised])
        assert torch.allclose(model(*given), 40 + 15 * model.network(*inputs), atol=1e-4)
        save_checkpoint(tmp_path / "m.pth", model)
        again = load_model(tmp_path / "m.pth", network=MyNet)
        assert torch.equal(again(*given), model(*given)) and again.inputs == KEYS[:-1]


def test_predictions_are_in_the_order_of_the_dataset(index):
    model, dataset = wrapped(), TPP_PPG_dataset(index, "segment", KEYS)
    whole, spread = predict_with_spread(model, dataset, 256, "cpu")
    inputs = dataset[np.arange(len(dataset))][:4]
    with torch.no_grad():
        assert np.allclose(whole, model(*inputs)[:, 0], atol=1e-4) and spread is None
    assert np.allclose(whole, predict_dataset(model, dataset, 7, "cpu"), atol=1e-4)
