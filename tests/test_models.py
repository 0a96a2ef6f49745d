"""models.py against the published network, written plainly in benchmarks/published_style.py."""
import pytest
import torch

import models
from benchmarks.published_style import PlainResNet
from models import MyFirstResNet, get_model_v3, init_steady, receptive_field


def batch(n, length=3600, vitals=3, dtype=torch.float32, offset=0.0):
    generator = torch.Generator().manual_seed(1)
    ppg = torch.randn(n, 1, length, dtype=dtype, generator=generator).cumsum(2) * 0.1 + offset
    return [ppg] + [torch.randn(n, dtype=dtype, generator=generator) for _ in range(vitals)]


def twins(dtype=torch.float32, vitals=3):
    torch.manual_seed(0)
    plain, ours = PlainResNet(vitals).to(dtype), get_model_v3(vitals).to(dtype)
    ours.load_state_dict(plain.state_dict(), strict=True)
    return plain, ours


def test_a_published_state_dict_loads_strictly_and_gives_the_same_numbers():
    plain, ours = twins()
    for offset in (0.0, 50.0):      # a raw PPG with an offset makes edges; these too are the same
        inputs = batch(4, offset=offset)
        expected, got = plain(*inputs), ours(*inputs)
        assert (got - expected).abs().max() <= 1e-4 * expected.abs().max()


def test_the_published_network_has_its_names_and_2_57_million_parameters():
    model = get_model_v3(3)
    assert sum(p.numel() for p in model.parameters()) == 2_565_825
    names = {name.rsplit(".", 1)[0] for name in model.state_dict()}
    blocks = [f"layers.{i}.{part}" for i in (1, 2, 3, 4)
              for part in ("conv1x1", "conv1.conv", "conv1.instance_norm", "conv2")]
    extra = [f"layers.{i}.mini_res.instance_norm" for i in (2, 3, 4)]
    assert names == {"layers.0.conv", "layers.0.instance_norm", *blocks, *extra,
                     "layers.4.mini_res_end.instance_norm", "projection", "mlp.1", "mlp.3"}


def test_twenty_float64_steps_stay_with_the_plain_network_to_1e_9():
    plain, ours = twins(torch.float64)
    inputs = batch(2, 1200, dtype=torch.float64)
    target = torch.tensor([30.0, 50.0], dtype=torch.float64)
    optimizers = [torch.optim.Adam(m.parameters(), lr=1e-3) for m in (plain, ours)]
    for _ in range(20):
        outputs = []
        for model, optimizer in zip((plain, ours), optimizers):
            optimizer.zero_grad()
            out = model(*inputs)[:, 0]
            ((out - target) ** 2).mean().backward()
            optimizer.step()
            outputs.append(out.detach())
        assert (outputs[0] - outputs[1]).abs().max() <= 1e-9 * outputs[0].abs().max()


def test_one_float32_steps_gradients_are_the_plain_networks_to_1e_4():
    plain, ours = twins()
    inputs = batch(4)
    for model in (plain, ours):
        (model(*inputs) ** 2).sum().backward()
    ours_by_name = dict(ours.named_parameters())
    whole = torch.cat([p.grad.flatten() for p in plain.parameters()]).norm()
    for name, p in plain.named_parameters():
        # a bias that a norm behind it cancels has a gradient of 0, rounding aside: hence the floor
        scale = max(p.grad.norm(), 1e-3 * whole)
        assert (p.grad - ours_by_name[name].grad).norm() <= 1e-4 * scale, name


def test_biases_that_a_norm_cancels_have_a_gradient_of_zero_not_none():
    _, ours = twins()
    (ours(*batch(2, 1200)) ** 2).sum().backward()
    assert (ours.layers[0].conv.bias.grad == 0).all()
    assert all(p.grad is not None for p in ours.parameters())


@pytest.mark.parametrize("length", [600, 601, 1837, 3600, 7200])
def test_any_length_from_10_seconds_up_is_the_plain_networks(length):
    plain, ours = twins(torch.float64)
    inputs = batch(2, length, dtype=torch.float64)
    assert torch.allclose(plain(*inputs), ours(*inputs), rtol=1e-9, atol=1e-12)


def test_a_segment_shorter_than_10_seconds_is_refused_in_one_line():
    with pytest.raises(ValueError, match="599 samples: expected at least 600"):
        get_model_v3(0)(torch.zeros(1, 1, 599))


@pytest.mark.parametrize("vitals", [0, 1, 5])
def test_any_number_of_vitals(vitals):
    model = get_model_v3(vitals)
    assert model(*batch(2, 900, vitals)).shape == (2, 1)
    with pytest.raises(ValueError, match=f"expected {vitals} vitals"):
        model(*batch(2, 900, vitals + 1))


def test_vitals_come_as_a_column_or_as_a_vector():
    _, ours = twins()
    ppg, *vitals = batch(3, 900)
    assert torch.equal(ours(ppg, *vitals), ours(ppg, *[v.unsqueeze(1) for v in vitals]))


def test_widths_kernels_strides_dropout_and_outputs_are_options():
    model = get_model_v3(2, widths=(16, 24, 32), kernel_sizes=(7, 9, 11), strides=(2, 3),
                         dropout=0.5, num_outputs=2)
    model.eval()
    assert model(*batch(2, 900, 2)).shape == (2, 2)
    assert model.layers[1].conv2.weight.shape == (24, 24, 9)
    assert model.layers[2].conv1.conv.stride == (3,)
    inputs = batch(2, 900, 2)
    evaluated = model(*inputs)
    model.train()
    assert not torch.equal(model(*inputs), evaluated)
    assert model.dropout.p == 0.5


@pytest.mark.parametrize("options, message", [
    ({"kernel_sizes": 8}, "odd"), ({"kernel_sizes": (15, 15)}, "kernel_sizes"),
    ({"widths": (64, 64)}, "three"), ({"strides": (4, 4)}, "strides")])
def test_settings_that_do_not_fit_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        MyFirstResNet(**options)


def test_long_strides_ask_for_longer_segments():
    model = get_model_v3(0, strides=8)
    with pytest.raises(ValueError, match="at least 4097"):
        model(torch.zeros(1, 1, 3600))


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
    assert "2,565,825 parameters" in capsys.readouterr().out


def test_steady_weights_are_moving_averages_and_give_the_vitals_the_features_weight():
    torch.manual_seed(0)
    model = get_model_v3(3)
    before = [block.conv2.weight.std().item() for block in model.layers[1:]]
    vitals = model.projection.weight[:, 256:].detach().clone()
    init_steady(model)
    for block, spread in zip(model.layers[1:], before):
        assert (block.conv2.weight == block.conv2.weight[..., :1]).all()
        assert block.conv2.weight.std().item() == pytest.approx(spread, rel=0.05)
    assert not (model.layers[0].conv.weight == model.layers[0].conv.weight[..., :1]).all()
    assert torch.allclose(model.projection.weight[:, 256:], vitals * (256 / 3) ** 0.5)
    init_steady(get_model_v3(0))        # and a network without vitals has none to weigh


@pytest.mark.parametrize("samples, kernel", [(900, 15), (225, 15), (150, 9), (601, 31)])
def test_the_convolution_by_fft_is_the_direct_one(samples, kernel):
    torch.manual_seed(0)
    x = torch.randn(2, 3, samples, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(4, 3, kernel, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(4, dtype=torch.float64, requires_grad=True)
    fast = models.convolve_by_fft(x, weight, bias)
    plain = torch.nn.functional.conv1d(x, weight, bias, padding=kernel // 2)
    assert (fast - plain).abs().max() < 1e-12
    weights = torch.randn_like(plain)
    for ours, theirs in zip(*(torch.autograd.grad((y * weights).sum(), (x, weight, bias))
                              for y in (fast, plain))):
        assert (ours - theirs).abs().max() < 1e-11


@pytest.mark.parametrize("samples, kernel, stride", [
    (40, 15, 4), (41, 15, 4), (39, 7, 2), (30, 5, 3), (30, 15, 1), (43, 3, 5)])
def test_the_strided_pair_is_two_convolutions(samples, kernel, stride):
    torch.manual_seed(0)
    x, *parameters = [torch.randn(shape, dtype=torch.float64, requires_grad=True)
                      for shape in ((2, 3, samples), (4, 3, kernel), (4,), (4, 3, 1), (4,))]
    weight, bias, skip_weight, skip_bias = parameters
    ours = models.StridedPair.apply(x, weight, bias, skip_weight, skip_bias, stride)
    theirs = (torch.nn.functional.conv1d(x, weight, bias, stride, kernel // 2),
              torch.nn.functional.conv1d(x, skip_weight, skip_bias, stride))
    gradients = []
    for pair in (ours, theirs):
        loss = sum((y * torch.arange(y.numel(), dtype=y.dtype).view_as(y).cos()).sum()
                   for y in pair)
        gradients.append(torch.autograd.grad(loss, (x, weight, bias, skip_weight, skip_bias)))
    for one, other in zip(ours + gradients[0], theirs + gradients[1]):
        assert one.shape == other.shape and (one - other).abs().max() < 1e-12


def test_autocast_takes_the_direct_convolutions():
    torch.manual_seed(0)
    model = get_model_v3(0)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        short = model(torch.randn(2, 1, 3600))
    assert short.dtype == torch.bfloat16
