"""models.py: the published network, its names, its numbers, its options and initial weights."""
import subprocess
import sys
import textwrap

import pytest
import torch
from torch.nn import functional as F

import models
from models import MODELS, MyFirstResNet, get_model_v3, receptive_field


def batch(n, length=3600, vitals=3, dtype=torch.float32, offset=0.0):
    generator = torch.Generator().manual_seed(1)
    ppg = torch.randn(n, 1, length, dtype=dtype, generator=generator).cumsum(2) * 0.1 + offset
    return [ppg] + [torch.randn(n, dtype=dtype, generator=generator) for _ in range(vitals)]


def published(state, ppg, *vitals):
    """The published network as a function of its state dict, independent of models.py."""
    def conv(name, x, stride=1):
        weight = state[f"{name}.weight"]
        return F.conv1d(x, weight, state[f"{name}.bias"], stride, weight.shape[2] // 2)

    def norm_relu(name, x):
        return F.relu(F.instance_norm(x, weight=state[f"{name}.instance_norm.weight"],
                                      bias=state[f"{name}.instance_norm.bias"]))

    def linear(name, x):
        return F.linear(x, state[f"{name}.weight"], state[f"{name}.bias"])

    x = norm_relu("layers.0", conv("layers.0.conv", ppg))
    for block in (f"layers.{i}" for i in (1, 2, 3, 4)):
        y = x if block == "layers.1" else norm_relu(f"{block}.mini_res", x)
        y = norm_relu(f"{block}.conv1", conv(f"{block}.conv1.conv", y, 4))
        x = conv(f"{block}.conv2", y) + conv(f"{block}.conv1x1", x, 4)
    x = norm_relu("layers.4.mini_res_end", x).mean(2)
    x = linear("projection", torch.cat([x] + [v.unsqueeze(1) for v in vitals], 1))
    return linear("mlp.3", F.relu(linear("mlp.1", F.relu(x))))


@pytest.mark.parametrize("length", [600, 601, 1837, 3600, 7200])
def test_the_network_is_the_published_one_at_any_length_from_10_seconds_up(length):
    model = get_model_v3(3).double()
    inputs = batch(2, length, dtype=torch.float64)
    expected = published(model.state_dict(), *inputs)
    assert torch.allclose(model(*inputs), expected, rtol=1e-9, atol=1e-12)


def test_it_has_the_published_names_and_2_57_million_parameters():
    model = get_model_v3(3)
    assert sum(p.numel() for p in model.parameters()) == 2_565_825
    names = {name.rsplit(".", 1)[0] for name in model.state_dict()}
    blocks = [f"layers.{i}.{part}" for i in (1, 2, 3, 4)
              for part in ("conv1x1", "conv1.conv", "conv1.instance_norm", "conv2")]
    extra = [f"layers.{i}.mini_res.instance_norm" for i in (2, 3, 4)]
    assert names == {"layers.0.conv", "layers.0.instance_norm", *blocks, *extra,
                     "layers.4.mini_res_end.instance_norm", "projection", "mlp.1", "mlp.3"}


def test_features_are_what_the_head_sees_pooled_ppg_then_vitals():
    model = get_model_v3(3).eval()
    inputs = batch(2, 900)
    features = model.features(*inputs)
    assert features.shape == (2, 259)
    assert torch.equal(features[:, 256:], torch.stack(inputs[1:], 1))
    assert torch.equal(model.mlp(model.projection(features)), model(*inputs))


def test_without_a_waveform_it_takes_the_vitals_alone():
    model = get_model_v3(2, in_channels=0)
    _, *vitals = batch(3, 900, 2)
    assert model(*vitals).shape == (3, 1)
    assert torch.equal(model.features(*vitals), torch.stack(vitals, 1))
    with pytest.raises(ValueError, match="expected 2 vitals, got 1"):
        model(vitals[0])


def test_a_segment_shorter_than_10_seconds_is_refused_in_one_line():
    with pytest.raises(ValueError, match="599 samples: expected at least 600"):
        get_model_v3(0)(torch.zeros(1, 1, 599))


@pytest.mark.parametrize("vitals", [0, 1, 5])
def test_any_number_of_vitals_as_vectors_or_columns(vitals):
    model = get_model_v3(vitals)
    ppg, *values = batch(2, 900, vitals)
    out = model(ppg, *values)
    assert out.shape == (2, 1)
    assert torch.equal(out, model(ppg, *[v.unsqueeze(1) for v in values]))
    with pytest.raises(ValueError, match=f"expected {vitals} vitals"):
        model(*batch(2, 900, vitals + 1))


def test_widths_kernels_strides_dropout_and_outputs_are_options():
    model = get_model_v3(2, widths=(16, 24, 32), kernel_sizes=(7, 9, 11), strides=(2, 3),
                         dropout=0.5, num_outputs=2)
    inputs = batch(2, 900, 2)
    evaluated = model.eval()(*inputs)
    assert evaluated.shape == (2, 2)
    assert model.layers[1].conv2.weight.shape == (24, 24, 9)
    assert model.layers[2].conv1.conv.stride == (3,)
    assert not torch.equal(model.train()(*inputs), evaluated)


@pytest.mark.parametrize("options, message", [
    ({"kernel_sizes": 8}, "odd"), ({"kernel_sizes": (15, 15)}, "kernel_sizes"),
    ({"widths": (64, 64)}, "three"), ({"strides": (4, 4)}, "strides"),
    ({"in_channels": 0}, "no inputs")])
def test_settings_that_do_not_fit_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        MyFirstResNet(**options)


def test_long_strides_ask_for_longer_segments():
    with pytest.raises(ValueError, match="at least 4097"):
        get_model_v3(0, strides=8)(torch.zeros(1, 1, 3600))


def test_the_receptive_field_is_what_an_impulse_reaches():
    """Without norms the output at one place depends on exactly so many samples of the input."""
    model = get_model_v3(0).double()
    samples, step = receptive_field(model)
    assert step == 256
    ppg = torch.zeros(1, 1, 12800, dtype=torch.float64, requires_grad=True)
    x = ppg
    for layer in model.layers:      # the convolutions of the main path alone
        for conv in ([layer.conv] if hasattr(layer, "conv") else [layer.conv1.conv, layer.conv2]):
            x = conv(x)
    x[0, :, x.shape[2] // 2].sum().backward()
    reached = torch.nonzero(ppg.grad[0, 0])[:, 0]
    assert int(reached[-1] - reached[0]) + 1 == samples == 5965


def test_verbose_prints_depth_parameters_and_receptive_field(capsys):
    get_model_v3(3, verbose=True)
    printed = capsys.readouterr().out
    assert "depth 12 " in printed and "2,565,825 parameters" in printed
    assert "5965 samples (99.4 s at 60 Hz)" in printed


def test_the_vitals_begin_with_the_weight_of_all_features():
    torch.manual_seed(0)
    plain = MyFirstResNet(num_discrete=3).projection.weight
    torch.manual_seed(0)
    balanced = get_model_v3(3).projection.weight
    assert torch.equal(balanced[:, :256], plain[:, :256])
    assert torch.allclose(balanced[:, 256:], plain[:, 256:] * (256 / 3) ** 0.5)


@pytest.mark.parametrize("build", MODELS.values())
def test_every_architecture_has_features_a_forward_pass_and_a_form_without_waveform(build):
    model, inputs = build(3), batch(2, 900)
    assert model(*inputs).shape == (2, 1)
    assert model.features(*inputs).shape == (2, model.projection.in_features)
    assert build(2, in_channels=0)(*inputs[1:3]).shape == (2, 1)


def test_the_example_in_the_docstring_runs_and_learns_in_a_folder_with_models_py_alone(tmp_path):
    example = models.__doc__.split("made-up data:")[1].split("A second architecture")[0]
    code = textwrap.dedent(example).replace("range(5)", "range(2)")
    with open(models.__file__) as file:
        (tmp_path / "models.py").write_text(file.read())
    code += "\nassert estimate_mmhg.shape == (32,) and loss < 10\n"
    (tmp_path / "example.py").write_text(code)
    done = subprocess.run([sys.executable, "example.py"], cwd=tmp_path, capture_output=True,
                          text=True, timeout=120)
    assert done.returncode == 0, done.stderr
