"""The network: a 1-D ResNet from 60 s of PPG and a few vitals to tissue perfusion pressure.

    from models import get_model_v3
    model = get_model_v3(num_discrete=3)                # MAP, DBP, HR beside the PPG
    tpp = model(ppg, map_mmhg, dbp_mmhg, hr_bpm)        # [B, 1, 3600], [B], [B], [B] -> [B, 1]

This file stands alone: copy it into an experiment and it needs nothing but PyTorch.

The parameters are those of the published network (`Conv1d`, affine `InstanceNorm1d`, `Linear`; a
published state dict loads with `strict=True`). How they are executed is ours: activations are
[B, C, L] tensors that lie channels-last in memory, i.e. as [B, L, C], where convolutions run as
(1, K) `conv2d` at the machine's full arithmetic, and norms and ReLUs stream over memory once.
"""
import torch
from torch import nn
from torch.nn import functional as F

MIN_SAMPLES = 600       # 10 s at 60 Hz: below, the last block's norm has next to nothing to average


def convolve(conv, x):
    """`conv(x)` for an `nn.Conv1d`, run as a (1, K) `conv2d` on channels-last memory.

    x [B, C_in, L] -> [B, C_out, L'], both channels-last.
    """
    y = F.conv2d(x.unsqueeze(2), conv.weight.unsqueeze(2), conv.bias,
                 stride=(1, conv.stride[0]), padding=(0, conv.padding[0]))
    return y.squeeze(2)


def norm_relu(norm, x):
    """`relu(norm(x))` for an affine `nn.InstanceNorm1d`; x [B, C, L] -> [B, C, L].

    PyTorch's own kernel copies channels-last input to and fro. Two passes over the data (mean, then
    the variance of what is left) lose no digits where the mean is large against the spread.
    """
    centred = x - x.mean(2, keepdim=True)
    variance = (centred * centred).mean(2, keepdim=True)
    scale = norm.weight.unsqueeze(1) * torch.rsqrt(variance + norm.eps)
    return torch.addcmul(norm.bias.unsqueeze(1), centred, scale).relu_()


def patches_norm_relu(conv, norm, x):
    """`relu(norm(conv(x)))` where a patch of the input is smaller than the output it makes.

    x [B, C_in, L] -> [B, C_out, L']. The first layer's output (64 x 3600) is by far the largest
    tensor of the network, its input (1 x 3600) the smallest. Mean and variance of the output follow
    from those of the input's patches (a convolution w has variance w' S w, S the patches'
    covariance), so we normalise the filters, one set for each segment, and write the large tensor
    once, finished.
    S in float64: a PPG is smooth, and a filter that takes differences has a variance far below S.
    """
    kernel, stride, padding = conv.kernel_size[0], conv.stride[0], conv.padding[0]
    patches = F.pad(x, (padding, padding)).unfold(2, kernel, stride)    # [B, C_in, L', K]
    patches = patches.transpose(1, 2).flatten(2)                        # [B, L', C_in * K]
    patches = patches - patches.mean(1, keepdim=True)
    exact = patches.double()
    covariance = torch.bmm(exact.transpose(1, 2), exact) / patches.shape[1]
    filters = conv.weight.flatten(1).t()                                # [C_in * K, C_out]
    exact = filters.double()
    variance = (torch.matmul(covariance, exact) * exact).sum(1, keepdim=True)
    scale = norm.weight * torch.rsqrt(variance + norm.eps).to(x.dtype)  # [B, 1, C_out]
    filters = filters * scale                                           # [B, C_in * K, C_out]
    # The norm cancels the convolution's bias. It keeps its place in the state dict and, with a zero
    # gradient rather than none, in the optimiser.
    shift = norm.bias + 0 * conv.bias
    return torch.baddbmm(shift, patches, filters).relu_().transpose(1, 2)


class ConvBlock(nn.Module):
    """Convolution, instance norm, ReLU: [B, in_channels, L] -> [B, out_channels, L / stride]."""

    def __init__(self, in_channels, out_channels, kernel_size, stride=1):
        super().__init__()
        if kernel_size % 2 == 0:
            raise ValueError(f"kernel_size {kernel_size}: expected an odd number")
        self.conv = nn.Conv1d(in_channels, out_channels, kernel_size, stride, kernel_size // 2)
        self.instance_norm = nn.InstanceNorm1d(out_channels, affine=True)

    def forward(self, x):
        if self.conv.in_channels * self.conv.kernel_size[0] < self.conv.out_channels:
            return patches_norm_relu(self.conv, self.instance_norm, x)
        return norm_relu(self.instance_norm, convolve(self.conv, x))


class NormReLU(nn.Module):
    """Instance norm, ReLU: [B, channels, L] -> the same."""

    def __init__(self, channels):
        super().__init__()
        self.instance_norm = nn.InstanceNorm1d(channels, affine=True)

    def forward(self, x):
        return norm_relu(self.instance_norm, x)


class ResBlockV1(nn.Module):
    """conv (strided), norm, ReLU, conv; plus a strided 1x1 skip.

    [B, in_channels, L] -> [B, out_channels, ceil(L / stride)].
    """

    def __init__(self, in_channels, out_channels, kernel_size=15, stride=4):
        super().__init__()
        self.conv1x1 = nn.Conv1d(in_channels, out_channels, 1, stride)
        self.conv1 = ConvBlock(in_channels, out_channels, kernel_size, stride)
        self.conv2 = nn.Conv1d(out_channels, out_channels, kernel_size, padding=kernel_size // 2)

    def main_path(self, x):
        return convolve(self.conv2, self.conv1(x))

    def forward(self, x):
        return self.main_path(x) + convolve(self.conv1x1, x)


class ResBlockV2(ResBlockV1):
    """V1 with norm and ReLU before the main path (not before the skip)."""

    def __init__(self, in_channels, out_channels, kernel_size=15, stride=4):
        super().__init__(in_channels, out_channels, kernel_size, stride)
        self.mini_res = NormReLU(in_channels)

    def forward(self, x):
        return self.main_path(self.mini_res(x)) + convolve(self.conv1x1, x)


class ResBlockV3(ResBlockV2):
    """V2 with norm and ReLU on the sum."""

    def __init__(self, in_channels, out_channels, kernel_size=15, stride=4):
        super().__init__(in_channels, out_channels, kernel_size, stride)
        self.mini_res_end = NormReLU(out_channels)

    def forward(self, x):
        return self.mini_res_end(super().forward(x))


class MyFirstResNet(nn.Module):
    """ppg [B, in_channels, L >= 600], num_discrete vitals [B] or [B, 1] -> [B, num_outputs].

    The first layer is a `ConvBlock`; a `ResBlockV1` follows, then V2s, and a V3 last, one block for
    each further entry of `widths`. `kernel_sizes` is one odd number or one for each layer,
    `strides` one number or one for each block. `dropout` acts on the pooled features. Normalisation
    of the inputs is the caller's (instance norm ignores the PPG's gain, but zero padding turns an
    offset into an edge: centre each segment).
    Raises ValueError for a wrong number of vitals and for a segment that is too short.
    """

    def __init__(self, in_channels=1, num_discrete=0, widths=(64, 64, 128, 128, 256),
                 kernel_sizes=15, strides=4, dropout=0.0, num_outputs=1):
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
        self.num_discrete = num_discrete
        layers = [ConvBlock(in_channels, widths[0], kernel_sizes[0])]
        total_stride = 1
        for i in range(blocks):
            block = ResBlockV1 if i == 0 else ResBlockV3 if i == blocks - 1 else ResBlockV2
            layers.append(block(widths[i], widths[i + 1], kernel_sizes[i + 1], strides[i]))
            total_stride *= strides[i]
        self.min_samples = max(MIN_SAMPLES, total_stride + 1)   # the last norm needs two samples
        self.layers = nn.Sequential(*layers)
        self.dropout = nn.Dropout(dropout)
        self.projection = nn.Linear(widths[-1] + num_discrete, 128)
        self.mlp = nn.Sequential(nn.ReLU(), nn.Linear(128, 64), nn.ReLU(),
                                 nn.Linear(64, num_outputs))

    def forward(self, ppg, *discretes):
        if len(discretes) != self.num_discrete:
            raise ValueError(f"expected {self.num_discrete} vitals beside the PPG, "
                             f"got {len(discretes)}")
        if ppg.shape[-1] < self.min_samples:
            raise ValueError(f"PPG of {ppg.shape[-1]} samples: expected at least "
                             f"{self.min_samples} (10 s at 60 Hz, and more for long strides)")
        features = self.dropout(self.layers(ppg).mean(2))                           # [B, 256]
        columns = [d.unsqueeze(1) if d.dim() == 1 else d for d in discretes]        # each [B, 1]
        return self.mlp(self.projection(torch.cat([features] + columns, dim=1)))


def receptive_field(model):
    """(samples, stride): what one position of the last block sees through convolutions alone.

    (Instance norm and the mean over time see the whole segment in any case.)
    """
    samples, step = 1, 1
    for layer in model.layers:
        path = [layer.conv] if isinstance(layer, ConvBlock) else [layer.conv1.conv, layer.conv2]
        for conv in path:
            samples += (conv.kernel_size[0] - 1) * step
            step *= conv.stride[0]
    return samples, step


def init_steady(model):
    """Fresh weights with which the network learns from the first steps. Returns the model.

    With PyTorch's initial weights it spends hundreds of steps on a plateau, for two reasons.
    The head gets a few vitals beside 256 pooled features, each with the same small weight, and the
    features (means of ReLUs, about 0.4 each) hardly differ between segments: the vitals drown. So
    as a group they begin with the features' weight.
    And each norm removes a channel's mean over the minute, with it what the shape of every single
    pulse says; that passes the later norms only as the ramps which zero padding makes at the edges
    of the minute. Kernels with as many taps up as down bury these under the beat; kernels constant
    over time, moving averages, let them stand out (each tap with PyTorch's variance).
    """
    with torch.no_grad():
        for block in model.layers[1:]:
            for conv in (block.conv1.conv, block.conv2):
                out_channels, in_channels, kernel = conv.weight.shape
                taps = torch.randn(out_channels, in_channels, 1) / (3 * in_channels * kernel) ** 0.5
                conv.weight.copy_(taps.expand_as(conv.weight))
        if model.num_discrete:
            features = model.projection.in_features - model.num_discrete
            model.projection.weight[:, features:] *= (features / model.num_discrete) ** 0.5
    return model


def get_model_v3(num_discrete, verbose=False, **options):
    """The published network for `num_discrete` vitals; options as in `MyFirstResNet`.

    With three vitals: 2.57 M parameters, 0.25 G multiply-adds per 60-s segment.
    `verbose` prints the model, its depth, parameters and receptive field.
    """
    model = MyFirstResNet(num_discrete=num_discrete, **options)
    if verbose:
        samples, step = receptive_field(model)
        depth = (2 * len(model.layers) - 1              # convolutions on the main path
                 + sum(isinstance(m, nn.Linear) for m in model.modules()))
        parameters = sum(p.numel() for p in model.parameters())
        print(model)
        print(f"depth {depth} layers with weights (skips aside), {parameters:,} parameters, "
              f"receptive field {samples} samples ({samples / 60:.1f} s at 60 Hz), one position "
              f"every {step}")
    return model
