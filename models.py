"""The network: a 1-D ResNet from 60 s of PPG and a few vitals to tissue perfusion pressure (TPP).

Needs only PyTorch: copy this file into an experiment. `kernels.accelerate(network)` runs the same
parameters faster.

**Inputs and label must be normalised**: each PPG segment by its own mean and SD (zero padding turns
an offset into an edge, and monitors differ in scale), vitals and label by the mean and SD over the
train patients. A complete example, on made-up data:

    import torch
    from models import get_model_v3

    ppg = 40 + 5 * torch.randn(32, 1, 3600)                         # [segments, 1, 60 s at 60 Hz]
    map_mmhg, hr_bpm = 75 + 10 * torch.randn(32), 80 + 15 * torch.randn(32)
    tpp_mmhg = map_mmhg - 35 + torch.randn(32)

    ppg = (ppg - ppg.mean(2, keepdim=True)) / ppg.std(2, keepdim=True)
    vitals = [(v - v.mean()) / v.std() for v in (map_mmhg, hr_bpm)]
    label = (tpp_mmhg - tpp_mmhg.mean()) / tpp_mmhg.std()

    model = get_model_v3(num_discrete=2)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for step in range(5):
        optimizer.zero_grad()
        loss = ((model(ppg, *vitals)[:, 0] - label) ** 2).mean()
        loss.backward()
        optimizer.step()
    estimate_mmhg = model(ppg, *vitals)[:, 0] * tpp_mmhg.std() + tpp_mmhg.mean()

To add an architecture, add an entry to `MODELS`: any `nn.Module` with `forward(ppg, *vitals)`, and
optionally `features(ppg, *vitals)`; with `entry` and `arguments`, checkpoints know how to build it.
"""
import math

import torch
from torch import nn
from torch.nn import functional as F

MIN_SAMPLES = 600       # 10 s at 60 Hz; below, the last norm averages over two or three values


class ConvBlock(nn.Module):
    """Convolution, instance norm, ReLU: [B, in_channels, L] -> [B, out_channels, L / stride]."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, stride: int = 1):
        super().__init__()
        if kernel_size % 2 == 0:
            raise ValueError(f"kernel_size {kernel_size}: expected an odd number")
        self.conv = nn.Conv1d(in_channels, out_channels, kernel_size, stride, kernel_size // 2)
        self.instance_norm = nn.InstanceNorm1d(out_channels, affine=True)

    def forward(self, x):
        return F.relu(self.instance_norm(self.conv(x)))


class NormReLU(nn.Module):
    """Instance norm, ReLU: [B, channels, L] -> [B, channels, L]."""

    def __init__(self, channels: int):
        super().__init__()
        self.instance_norm = nn.InstanceNorm1d(channels, affine=True)

    def forward(self, x):
        return F.relu(self.instance_norm(x))


class ResBlockV1(nn.Module):
    """Strided convolution, norm, ReLU, convolution; plus a strided 1x1 convolution as skip:
    [B, in_channels, L] -> [B, out_channels, ceil(L / stride)]."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int = 15, stride: int = 4):
        super().__init__()
        self.conv1x1 = nn.Conv1d(in_channels, out_channels, 1, stride)
        self.conv1 = ConvBlock(in_channels, out_channels, kernel_size, stride)
        self.conv2 = nn.Conv1d(out_channels, out_channels, kernel_size, padding=kernel_size // 2)

    def forward(self, x):
        return self.conv2(self.conv1(x)) + self.conv1x1(x)


class ResBlockV2(ResBlockV1):
    """V1 with norm and ReLU before the main path (not before the skip)."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int = 15, stride: int = 4):
        super().__init__(in_channels, out_channels, kernel_size, stride)
        self.mini_res = NormReLU(in_channels)

    def forward(self, x):
        return self.conv2(self.conv1(self.mini_res(x))) + self.conv1x1(x)


class ResBlockV3(ResBlockV2):
    """V2 with norm and ReLU on the sum."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int = 15, stride: int = 4):
        super().__init__(in_channels, out_channels, kernel_size, stride)
        self.mini_res_end = NormReLU(out_channels)

    def forward(self, x):
        return self.mini_res_end(super().forward(x))


class MyFirstResNet(nn.Module):
    """ppg [B, in_channels, L >= 600], num_discrete vitals [B] or [B, 1] -> [B, num_outputs].

    All inputs are normalised (see the module's docstring). A `ConvBlock` is followed by a
    `ResBlockV1`, V2 blocks, and a final V3: one block for each entry of `widths` after the first.
    `kernel_sizes` is an odd number, or a list with one per layer; `strides` a number, or a list
    with one per block. `dropout` acts on the pooled features. With in_channels 0 there is no
    waveform and the call is `model(*vitals)`; comparing with it shows what the PPG adds.
    Raises ValueError for a wrong number of vitals and for a segment that is too short.
    """
    entry = "resnet_v3"     # in MODELS, for checkpoints saved from Python

    def __init__(self, in_channels: int = 1, num_discrete: int = 0,
                 widths=(64, 64, 128, 128, 256), kernel_sizes=15, strides=4,
                 dropout: float = 0.0, num_outputs: int = 1):
        super().__init__()
        blocks = len(widths) - 1
        if blocks < 2:
            raise ValueError(f"widths {tuple(widths)}: expected at least three (a first layer and "
                             "two blocks)")
        if isinstance(kernel_sizes, int):
            kernel_sizes = [kernel_sizes] * (blocks + 1)
        if isinstance(strides, int):
            strides = [strides] * blocks
        if len(kernel_sizes) != blocks + 1 or len(strides) != blocks:
            raise ValueError(f"{len(widths)} widths need {blocks + 1} kernel_sizes and {blocks} "
                             f"strides, got {len(kernel_sizes)} and {len(strides)}")
        self.in_channels, self.num_discrete = in_channels, num_discrete
        self.arguments = {"in_channels": in_channels, "num_discrete": num_discrete,
                          "widths": list(widths), "kernel_sizes": list(kernel_sizes),
                          "strides": list(strides), "dropout": dropout, "num_outputs": num_outputs}
        layers = []
        if in_channels:
            layers.append(ConvBlock(in_channels, widths[0], kernel_sizes[0]))
            kinds = [ResBlockV1] + [ResBlockV2] * (blocks - 2) + [ResBlockV3]
            for i, block in enumerate(kinds):
                layers.append(block(widths[i], widths[i + 1], kernel_sizes[i + 1], strides[i]))
        self.min_samples = max(MIN_SAMPLES, math.prod(strides) + 1)   # 2 samples for the last norm
        self.layers = nn.Sequential(*layers)
        self.dropout = nn.Dropout(dropout)
        self.projection = nn.Linear((widths[-1] if in_channels else 0) + num_discrete, 128)
        self.mlp = nn.Sequential(nn.ReLU(), nn.Linear(128, 64), nn.ReLU(),
                                 nn.Linear(64, num_outputs))

    def waveform_features(self, ppg):
        return self.layers(ppg).mean(2)     # [B, 1, 3600] -> [B, 256, 15] -> [B, 256]

    def features(self, *inputs):
        """Pooled features of the PPG, and the vitals, [B, F]: the head's (`projection`'s) input."""
        ppg, vitals = (inputs[:1], inputs[1:]) if self.in_channels else ((), inputs)
        if len(vitals) != self.num_discrete:
            raise ValueError(f"expected {self.num_discrete} vitals, got {len(vitals)}")
        columns = [v.unsqueeze(1) if v.dim() == 1 else v for v in vitals]       # each [B, 1]
        if self.in_channels:
            if ppg[0].shape[-1] < self.min_samples:
                raise ValueError(f"PPG of {ppg[0].shape[-1]} samples: expected at least "
                                 f"{self.min_samples} (10 s at 60 Hz, more with long strides)")
            columns.insert(0, self.dropout(self.waveform_features(ppg[0])))     # [B, 256]
        return torch.cat(columns, dim=1)                                        # [B, 259]

    def forward(self, *inputs):
        return self.mlp(self.projection(self.features(*inputs)))


class SpreadResNet(MyFirstResNet):
    """`MyFirstResNet` whose head also sees the spread of each channel before a norm removes it.

    An instance norm divides each channel by its SD over the minute. These SDs say how strong each
    pattern is in this PPG, and so tell pulse shapes apart; the published network loses them
    (docs/training.md). Here their logarithms, for the outputs of the first layer and of each block,
    join the pooled features: [B, 256 + 64 + 64 + 128 + 128 + 256].
    """
    entry = "resnet_spread"

    def __init__(self, in_channels: int = 1, num_discrete: int = 0,
                 widths=(64, 64, 128, 128, 256), **options):
        super().__init__(in_channels, num_discrete, widths, **options)
        if in_channels:
            self.projection = nn.Linear(widths[-1] + sum(widths) + num_discrete, 128)

    def waveform_features(self, ppg):
        first, *blocks = self.layers
        x = first.conv(ppg)                                             # [B, 64, 3600]
        spreads = [log_spread(x)]
        x = F.relu(first.instance_norm(x))
        for block in blocks:
            if isinstance(block, ResBlockV3):
                x = ResBlockV2.forward(block, x)                        # without the last norm
            else:
                x = block(x)
            spreads.append(log_spread(x))
        x = blocks[-1].mini_res_end(x)                                  # [B, 256, 15]
        return torch.cat([x.mean(2), *spreads], 1)                      # [B, 896]


def log_spread(x, dim: int = 2):
    """Logarithm of each channel's SD over time, [B, C, L] -> [B, C]; finite for a flat channel."""
    return 0.5 * torch.log(x.var(dim, unbiased=False) + 1e-5)


def balance_vitals(model: MyFirstResNet) -> MyFirstResNet:
    """Give the few vitals together the same initial weight as the hundreds of features together;
    with PyTorch's initial weights they would have almost none. Return the model."""
    features = model.projection.in_features - model.num_discrete
    if features and model.num_discrete:
        with torch.no_grad():
            model.projection.weight[:, features:] *= (features / model.num_discrete) ** 0.5
    return model


def get_model_v3(num_discrete: int, verbose: bool = False, **options) -> MyFirstResNet:
    """The published network for `num_discrete` vitals; options as in `MyFirstResNet`.

    With three vitals it has 2.57 M parameters and does 0.25 G multiply-adds per 60-s segment.
    `verbose` prints the model and its number of parameters.
    """
    model = balance_vitals(MyFirstResNet(num_discrete=num_discrete, **options))
    if verbose:
        print(f"{model}\n{sum(p.numel() for p in model.parameters()):,} parameters")
    return model


def get_spread_resnet(num_discrete: int, **options) -> SpreadResNet:
    """`SpreadResNet` for `num_discrete` vitals; options as in `MyFirstResNet`."""
    return balance_vitals(SpreadResNet(num_discrete=num_discrete, **options))


# name -> builder(num_discrete, **options); options: num_outputs, in_channels (0: no PPG), …
MODELS = {"resnet_v3": get_model_v3, "resnet_spread": get_spread_resnet}
