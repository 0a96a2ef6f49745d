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
import math

import torch
from torch import nn
from torch.nn import functional as F

MIN_SAMPLES = 600       # 10 s at 60 Hz: below, the last block's norm has next to nothing to average
# On CPU a convolution over this many samples, by a kernel this long, is quicker through Fourier
# transforms of pieces of about FFT_PIECE outputs (benchmarks/train_step.py).
FFT_MIN_SAMPLES, FFT_MIN_KERNEL, FFT_PIECE = 150, 9, 50


def convolve(conv, x):
    """`conv(x)` for an `nn.Conv1d`; x [B, C_in, L] -> [B, C_out, L'], both channels-last.

    Run as a (1, K) `conv2d` on channels-last memory, or, where that needs less arithmetic, by FFT.
    """
    if (on_cpu_in_full_precision(x) and conv.stride[0] == 1 and x.shape[2] >= FFT_MIN_SAMPLES
            and conv.kernel_size[0] >= FFT_MIN_KERNEL):
        return convolve_by_fft(x, conv.weight, conv.bias)
    return convolve_directly(x, conv.weight, conv.bias, conv.stride[0])


def on_cpu_in_full_precision(x):
    if torch.onnx.is_in_onnx_export():      # there plain convolutions, which any runtime has
        return False
    if hasattr(torch, "get_autocast_dtype"):                            # PyTorch 2.4
        return x.device.type == "cpu" and not torch.is_autocast_enabled("cpu")
    return x.device.type == "cpu" and not torch.is_autocast_cpu_enabled()


def convolve_directly(x, weight, bias, stride):
    y = F.conv2d(x.unsqueeze(2), weight.unsqueeze(2), bias,
                 stride=(1, stride), padding=(0, weight.shape[2] // 2))
    return y.squeeze(2)


def convolve_by_fft(x, weight, bias):
    """Convolution of stride 1, padded to equal length: x [B, C_in, L] -> [B, C_out, L].

    Overlap-save: the signal is cut into T pieces of N samples that yield N - K + 1 outputs each. In
    the frequency domain a convolution is a product of matrices over the channels, one for each of F
    frequencies: 4 F multiplications for N - K + 1 outputs instead of K for each. The transforms
    of so few points are matrix products themselves; a complex product is a real one of [Re, Im].
    """
    samples, (out_channels, in_channels, kernel) = x.shape[2], weight.shape
    pieces = max(1, round(samples / FFT_PIECE))
    kept = -(-samples // pieces)
    kept += (kept + kernel - 1) % 2                                     # N is even
    forth, back = fourier_matrices(kept + kernel - 1, kernel, x.dtype)  # [F, 2, N], [kept, F, 2]
    n_frequencies, _, n = forth.shape
    forth, back = forth.flatten(0, 1), back.flatten(1)
    x = F.pad(x.transpose(1, 2), (0, 0, kernel // 2, pieces * kept - samples + kernel // 2))
    x = x.unfold(1, n, kept).transpose(2, 3).flatten(0, 1)              # [B T, N, C_in]
    x = torch.bmm(forth.expand(len(x), -1, -1), x)                      # [B T, 2 F, C_in]
    x = x.view(-1, n_frequencies, 2 * in_channels).transpose(0, 1)
    # A network's convolution is a correlation: the kernel's spectrum is conjugated.
    taps = weight.permute(2, 1, 0).flatten(1)                           # [K, C_in C_out]
    w = torch.mm(forth[:, :kernel], taps).view(n_frequencies, 2, in_channels, out_channels)
    real, imaginary = w[:, 0], -w[:, 1]
    w = torch.cat([torch.cat([real, imaginary], 2), torch.cat([-imaginary, real], 2)], 1)
    y = torch.bmm(x, w).transpose(0, 1)                                 # [B T, F, 2 C_out]
    y = y.reshape(-1, 2 * n_frequencies, out_channels)
    y = torch.baddbmm(bias, back.expand(len(y), -1, -1), y)             # [B T, kept, C_out]
    return y.view(-1, pieces * kept, out_channels)[:, :samples].transpose(1, 2)


def fourier_matrices(n, kernel, dtype):
    """The real DFT of n (even) samples, [F, 2, n], and the last part of its inverse, as matrices.

    The inverse gives the n - kernel + 1 first samples, [n - kernel + 1, F, 2]: those whose kernel
    lies inside the piece. F = n / 2 + 1; the two rows are real and imaginary part.
    """
    frequency = torch.arange(n // 2 + 1, dtype=torch.float64)
    angle = 2 * math.pi / n * torch.arange(n, dtype=torch.float64) * frequency.unsqueeze(1)
    forth = torch.stack([angle.cos(), -angle.sin()], 1)
    twice = torch.full((n // 2 + 1, 1, 1), 2.0 / n, dtype=torch.float64)
    twice[[0, -1]] = 1.0 / n                # these two have no mirror image
    back = (forth * twice)[:, :, :n - kernel + 1].permute(2, 0, 1)
    return forth.to(dtype), back.to(dtype).contiguous()


class StridedPair(torch.autograd.Function):
    """The two strided convolutions at the start of a residual block, kernels K and 1, as one node.

    x [B, C_in, L] -> two of [B, C_out, ceil(L / stride)]. Autograd alone would write the large
    gradient of x twice and add, and its weight gradient runs at half the rate of a matrix product.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, skip_weight, skip_bias, stride):
        ctx.save_for_backward(x, weight, skip_weight)
        ctx.stride = stride
        return (convolve_directly(x, weight, bias, stride),
                convolve_directly(x, skip_weight, skip_bias, stride))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad, skip_grad):
        x, weight, skip_weight = ctx.saved_tensors
        stride, (out_channels, in_channels, kernel) = ctx.stride, weight.shape
        grad_x = torch.ops.aten.convolution_backward(
            grad.unsqueeze(2), x.unsqueeze(2), weight.unsqueeze(2), None, (1, stride),
            (0, kernel // 2), (1, 1), False, (0, 0), 1, (True, False, False))[0].squeeze(2)
        rows, skip_rows = grad.transpose(1, 2), skip_grad.transpose(1, 2)       # [B, L', C_out]
        grad_x[:, :, ::stride] += torch.matmul(skip_rows, skip_weight[:, :, 0]).transpose(1, 2)
        taken = x[:, :, ::stride].transpose(1, 2).flatten(0, 1)
        grad_skip = torch.mm(skip_rows.flatten(0, 1).t(), taken).unsqueeze(2)

        # Weight gradient: with `stride` samples of x to a row, tap q * stride + r of the kernel is
        # the product of the gradient with the rows that are q later, columns of r.
        lead = -(-(kernel // 2) // stride) * stride         # padding in front, in whole rows
        shifts = -(-(kernel + lead - kernel // 2) // stride)
        length = (rows.shape[1] + shifts - 1) * stride
        padded = F.pad(x.transpose(1, 2), (0, 0, lead, length - lead - x.shape[2]))
        padded = padded.view(-1, stride * in_channels)                  # [B (L' + shifts - 1), …]
        spaced = F.pad(rows, (0, 0, 0, shifts - 1)).flatten(0, 1)[:len(padded) - shifts + 1]
        taps = torch.stack([torch.mm(padded[q:q + len(spaced)].t(), spaced)
                            for q in range(shifts)])
        taps = taps.view(shifts * stride, in_channels, out_channels)[lead - kernel // 2:][:kernel]
        return (grad_x, taps.permute(2, 1, 0), rows.sum((0, 1)), grad_skip, skip_rows.sum((0, 1)),
                None)


def convolve_pair(conv, skip, x):
    """(conv(x), skip(x)) for `nn.Conv1d`s of kernels K and 1 and the same stride."""
    if on_cpu_in_full_precision(x):
        return StridedPair.apply(x, conv.weight, conv.bias, skip.weight, skip.bias, conv.stride[0])
    return convolve(conv, x), convolve(skip, x)


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
        patch = self.conv.in_channels * self.conv.kernel_size[0]
        if patch < self.conv.out_channels and not torch.onnx.is_in_onnx_export():
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

    def forward(self, x):
        y, skip = convolve_pair(self.conv1.conv, self.conv1x1, x)
        return convolve(self.conv2, norm_relu(self.conv1.instance_norm, y)) + skip


class ResBlockV2(ResBlockV1):
    """V1 with norm and ReLU before the main path (not before the skip)."""

    def __init__(self, in_channels, out_channels, kernel_size=15, stride=4):
        super().__init__(in_channels, out_channels, kernel_size, stride)
        self.mini_res = NormReLU(in_channels)

    def forward(self, x):
        return convolve(self.conv2, self.conv1(self.mini_res(x))) + convolve(self.conv1x1, x)


class ResBlockV3(ResBlockV2):
    """V2 with norm and ReLU on the sum."""

    def __init__(self, in_channels, out_channels, kernel_size=15, stride=4):
        super().__init__(in_channels, out_channels, kernel_size, stride)
        self.mini_res_end = NormReLU(out_channels)

    def forward(self, x):
        return self.mini_res_end(super().forward(x))


class MyFirstResNet(nn.Module):
    """ppg [B, in_channels, L >= 600], num_discrete vitals [B] or [B, 1] -> [B, num_outputs].

    With in_channels 0 there is no waveform: `model(*vitals)` (what the PPG adds shows beside it).
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
        if not in_channels + num_discrete:
            raise ValueError("neither a waveform nor vitals: there is nothing to learn from")
        self.in_channels, self.num_discrete = in_channels, num_discrete
        layers = [ConvBlock(in_channels, widths[0], kernel_sizes[0])] if in_channels else []
        total_stride = 1
        for i in range(blocks if in_channels else 0):
            block = ResBlockV1 if i == 0 else ResBlockV3 if i == blocks - 1 else ResBlockV2
            layers.append(block(widths[i], widths[i + 1], kernel_sizes[i + 1], strides[i]))
            total_stride *= strides[i]
        self.min_samples = max(MIN_SAMPLES, total_stride + 1)   # the last norm needs two samples
        self.layers = nn.Sequential(*layers)
        self.dropout = nn.Dropout(dropout)
        self.projection = nn.Linear((widths[-1] if in_channels else 0) + num_discrete, 128)
        self.mlp = nn.Sequential(nn.ReLU(), nn.Linear(128, 64), nn.ReLU(),
                                 nn.Linear(64, num_outputs))

    def forward(self, *inputs):
        discretes = inputs[1:] if self.in_channels else inputs
        if len(discretes) != self.num_discrete:
            raise ValueError(f"expected {self.num_discrete} vitals"
                             + (" beside the PPG" if self.in_channels else "")
                             + f", got {len(discretes)}")
        columns = [d.unsqueeze(1) if d.dim() == 1 else d for d in discretes]        # each [B, 1]
        if self.in_channels:
            ppg = inputs[0]
            if ppg.shape[-1] < self.min_samples:
                raise ValueError(f"PPG of {ppg.shape[-1]} samples: expected at least "
                                 f"{self.min_samples} (10 s at 60 Hz, and more for long strides)")
            columns.insert(0, self.dropout(self.layers(ppg).mean(2)))               # [B, 256]
        return self.mlp(self.projection(torch.cat(columns, dim=1)))


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
        features = model.projection.in_features - model.num_discrete
        if features and model.num_discrete:
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
