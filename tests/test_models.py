"""models.py: the published network: its names, numbers, options and initial weights."""
import textwrap

import pytest
import torch
from torch.nn import functional as F

import models
from models import MyFirstResNet, get_model_v3, get_spread_resnet


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


@pytest.mark.parametrize("length", [600, 601, 3600])
def test_the_network_is_the_published_one_at_any_length_from_10_seconds_up(length):
    model = get_model_v3(3).double()
    inputs = batch(2, length, dtype=torch.float64)
    expected = published(model.state_dict(), *inputs)
    assert torch.allclose(model(*inputs), expected, rtol=1e-9, atol=1e-12)


def test_it_has_the_published_names_and_2_57_million_parameters(capsys):
    model = get_model_v3(3, verbose=True)
    assert "2,565,825 parameters" in capsys.readouterr().out
    names = {name.rsplit(".", 1)[0] for name in model.state_dict()}
    blocks = [f"layers.{i}.{part}" for i in (1, 2, 3, 4)
              for part in ("conv1x1", "conv1.conv", "conv1.instance_norm", "conv2")]
    extra = [f"layers.{i}.mini_res.instance_norm" for i in (2, 3, 4)]
    assert names == {"layers.0.conv", "layers.0.instance_norm", *blocks, *extra,
                     "layers.4.mini_res_end.instance_norm", "projection", "mlp.1", "mlp.3"}


@pytest.mark.parametrize("with_ppg, vitals", [(1, 0), (1, 1), (1, 3), (0, 2)])
@pytest.mark.parametrize("build", [get_model_v3, get_spread_resnet])
def test_every_architecture_takes_ppg_and_vitals_and_shows_its_features(build, with_ppg, vitals):
    model = build(vitals, in_channels=with_ppg).eval()
    ppg, *values = batch(2, 900, vitals)
    ppg = [ppg] * with_ppg
    out, features = model(*ppg, *values), model.features(*ppg, *values)
    assert out.shape == (2, 1) and features.shape == (2, model.projection.in_features)
    if vitals:
        assert torch.equal(features[:, -vitals:], torch.stack(values, 1))
    assert torch.equal(model.mlp(model.projection(features)), out)
    assert torch.equal(model(*ppg, *[v.unsqueeze(1) for v in values]), out)
    with pytest.raises(ValueError, match=f"expected {vitals} vitals, got {vitals + 1}"):
        model(*ppg, *values, torch.zeros(2))


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
    ({}, "599 samples: expected at least 600"), ({"strides": 8}, "at least 4097")])
def test_settings_and_segments_that_do_not_fit_are_refused_in_one_line(options, message):
    with pytest.raises(ValueError, match=message):
        MyFirstResNet(**options)(torch.zeros(1, 1, 599))


def test_the_vitals_begin_with_the_weight_of_all_features():
    torch.manual_seed(0)
    plain = MyFirstResNet(num_discrete=3).projection.weight
    torch.manual_seed(0)
    balanced = get_model_v3(3).projection.weight
    assert torch.equal(balanced[:, :256], plain[:, :256])
    assert torch.allclose(balanced[:, 256:], plain[:, 256:] * (256 / 3) ** 0.5)


def test_the_example_in_the_docstring_runs_and_learns():
    example = models.__doc__.split("made-up data:")[1].split("To add an architecture")[0]
    code = textwrap.dedent(example).replace("randn(32", "randn(8").replace("range(5)", "range(2)")
    exec(code + "\nassert estimate_mmhg.shape == (8,) and loss < 10\n", {})
