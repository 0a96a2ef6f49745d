"""kernels.py and cuda_graph.py against models.py and the plain step."""
import copy
import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from test_models import batch
from torch import nn

import kernels
from cuda_graph import capture_inference, capture_step
from kernels import accelerate, convolve_by_fft
from models import MODELS, get_model_v3

SMALL = {"widths": (24, 24, 40), "kernel_sizes": (7, 9, 11), "strides": (2, 3)}


def twins(dtype=torch.float32, build=get_model_v3, **options):
    torch.manual_seed(0)
    plain, ours = build(3, **options).to(dtype), build(3, **options).to(dtype)
    ours.load_state_dict(plain.state_dict())
    return plain, ours


@pytest.mark.parametrize("fft", [True, False])
@pytest.mark.parametrize("as_rows", [True, False])
def test_twenty_float64_steps_match_the_plain_network_to_1e_9(fft, as_rows):
    plain, ours = twins(torch.float64, widths=(16, 16, 24))
    if as_rows:
        kernels.store_weights_as_rows(ours)
    inputs = batch(2, 1200, dtype=torch.float64)
    target = torch.tensor([30.0, 50.0], dtype=torch.float64)
    outputs = []
    for model, run in ((plain, plain), (ours, accelerate(ours, fft=fft))):
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
        for _ in range(20):
            optimizer.zero_grad()
            outputs.append(run(*inputs)[:, 0])
            ((outputs[-1] - target) ** 2).mean().backward()
            optimizer.step()
    expected, got = torch.stack(outputs).view(2, 20, 2)
    assert ((got - expected).abs().amax(1) <= 1e-9 * expected.abs().amax(1)).all()


@pytest.mark.parametrize("length, options", [
    (600, {}), (601, {}), (1837, {}), (3600, {}), (903, SMALL), (700, {"in_channels": 2}),
    (1201, {"kernel_sizes": 17}), (1203, {"build": MODELS["resnet_spread"]}),
    (700, {"build": MODELS["resnet_spread"], "in_channels": 2}),
    (3600, {"dtype": torch.float32})])
def test_any_length_and_shape_has_the_plain_networks_output_and_gradients(length, options):
    options = {"dtype": torch.float64, **options}
    plain, ours = twins(**options)
    close = 1e-10 if options["dtype"] == torch.float64 else 1e-4
    ppg, *vitals = batch(2, length, dtype=options["dtype"], offset=1.0)
    ppg = ppg.expand(-1, options.get("in_channels", 1), -1)
    outputs = []
    for run in (plain, accelerate(ours)):
        outputs.append(run(ppg, *vitals))
        (outputs[-1] ** 2).sum().backward()
    assert torch.allclose(*outputs, rtol=close)
    whole = torch.cat([p.grad.flatten() for p in plain.parameters()]).norm()
    for (name, p), q in zip(plain.named_parameters(), ours.parameters()):
        # the gradient of a bias that the next norm cancels is 0 up to rounding: hence the floor
        assert (p.grad - q.grad).norm() <= close * max(p.grad.norm(), 1e-2 * whole), name


def test_features_inference_and_the_gradient_of_the_input_are_the_plain_networks():
    plain, ours = twins(torch.float64, dropout=0.5)
    ppg, *vitals = batch(2, 900, dtype=torch.float64)
    fast = accelerate(ours.eval())
    with torch.no_grad():
        assert torch.allclose(fast.features(ppg, *vitals), plain.eval().features(ppg, *vitals),
                              rtol=1e-9)
    ppg.requires_grad_()
    evaluated = [run(ppg, *vitals) for run in (plain, fast)]
    assert torch.allclose(*(torch.autograd.grad(out.sum(), ppg)[0] for out in evaluated))
    assert torch.equal(copy.deepcopy(fast)(ppg, *vitals), evaluated[1])
    assert not torch.equal(accelerate(ours.train())(ppg, *vitals), evaluated[1])    # dropout acts


def test_other_networks_stay_as_they_are():
    class Another(type(get_model_v3(0))):
        pass

    changed = get_model_v3(3)
    changed.layers[2] = nn.Sequential(nn.Conv1d(64, 128, 3, 4))
    for network in (nn.Linear(3, 1), get_model_v3(2, in_channels=0), Another(1, 2), changed):
        assert accelerate(network) is network


@pytest.mark.parametrize("samples, kernel", [(900, 15), (225, 15), (150, 9), (601, 31)])
def test_the_convolution_by_fft_is_the_direct_one(samples, kernel):
    torch.manual_seed(0)
    x = torch.randn(2, 3, samples, dtype=torch.float64)
    weight = torch.randn(4, 3, kernel, dtype=torch.float64)
    plain = nn.functional.conv1d(x, weight, padding=kernel // 2)
    assert (convolve_by_fft(x, weight) - plain).abs().max() < 1e-12


def test_the_triton_kernels_match_their_plain_twins_in_tritons_interpreter():
    pytest.importorskip("triton")
    code = """
import torch, kernels
plan = kernels.Strided(4, 8, 1, 4, 25, 112)
ppg, filters = torch.randn(2, 100), torch.randn(2, 16, 20)
for dtype in (torch.float32, torch.float16):    # (the interpreter cannot multiply bfloat16)
    grad, x = torch.randn(2, 112, 20).to(dtype), torch.randn(2, 100, 20).to(dtype)
    gain, shift = torch.randn(20), torch.randn(20)
    def run():
        return [kernels.patch_moments(ppg, 15), kernels.patches_relu(ppg, filters, plan, dtype),
                kernels.patches_relu_backward(grad, ppg, filters, plan),
                kernels.norm_relu_rows(x, gain, shift, 1e-5, 8, 112),
                *kernels.norm_relu_rows_backward(grad, x, gain, shift, 1e-5, 8)]
    torch.backends.cudnn.allow_tf32 = False
    assert kernels.use_triton(x)
    by_triton = run()
    triton, kernels.triton = kernels.triton, None
    for ours, plain in zip(by_triton, run()):
        limit = 1e-5 if dtype == torch.float32 else 1e-2
        assert (ours - plain).abs().max() <= limit * plain.abs().max(), (dtype, ours.shape)
    kernels.triton = triton
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True,
                          env=dict(os.environ, TRITON_INTERPRET="1"), timeout=300)
    assert done.returncode == 0, done.stderr


def stand_in(run):
    """Instead of a CUDA graph: calls `run` to warm up and to replay, into one static output."""
    for _ in range(3):
        output = run()

    def replay():
        output.copy_(run())
    return replay, output


class Training:
    """A small network, its optimiser, and the step that is captured."""

    def __init__(self):
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 1))
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=0.01)

    def step(self, x, label):
        loss = ((self.model(x)[:, 0] - label) ** 2).mean()
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    def train(self, step):
        """Losses, then weights."""
        generator = torch.Generator().manual_seed(1)
        scheduler = torch.optim.lr_scheduler.StepLR(self.optimizer, 2, 0.5)
        losses = []
        for n in (8, 8, 8, 8, 3, 8):        # a short batch among the others
            losses.append(step(torch.randn(n, 5, generator=generator),
                               torch.randn(n, generator=generator)))
            scheduler.step()
        return [*losses, *self.model.parameters()]


@pytest.mark.parametrize("begun", [False, True])
def test_a_captured_step_trains_as_the_plain_step(begun):
    """With schedules and short batches, whether or not the optimiser has a state already."""
    results = []
    for captured in (False, True):
        run = Training()
        if begun:
            run.step(torch.ones(8, 5), torch.ones(8))
        step = run.step if not captured else capture_step(
            run.step, (torch.ones(8, 5), torch.ones(8)), model=run.model, optimizer=run.optimizer,
            record=stand_in)
        assert isinstance(run.optimizer.param_groups[0]["lr"], float)
        results.append(run.train(step))
    for one, other in zip(*results):    # the rate is rounded to float32: other last digits
        assert torch.allclose(one, other, rtol=1e-6, atol=1e-7)


def test_each_call_returns_a_tensor_of_its_own():
    inference = capture_inference(lambda x: x + 1, [torch.zeros(2)], record=stand_in)
    first, second = inference(torch.tensor([1.0, 2.0])), inference(torch.tensor([3.0, 4.0]))
    assert first.tolist() == [2.0, 3.0] and second.tolist() == [4.0, 5.0]


def test_on_cpu_with_other_optimisers_and_where_recording_fails_the_step_is_run_as_it_is(capsys):
    def record(run):
        run()
        raise RuntimeError("operation not permitted\nwhen stream is capturing")

    run, inputs = Training(), (torch.ones(8, 5), torch.zeros(8))
    assert capture_step(run.step, inputs) == run.step and not capsys.readouterr().out
    before = [p.detach().clone() for p in run.model.parameters()]
    assert run.step == capture_step(run.step, inputs, model=run.model, optimizer=run.optimizer,
                                    record=record)
    assert all(torch.equal(one, p) for one, p in zip(before, run.model.parameters()))
    assert "not permitted when stream is capturing" in capsys.readouterr().out
    nadam = torch.optim.NAdam(run.model.parameters())       # its state begins at 1, not at 0
    assert capture_step(run.step, inputs, optimizer=nadam, record=record) == run.step
    assert "no CUDA graph of a step of NAdam" in capsys.readouterr().out
