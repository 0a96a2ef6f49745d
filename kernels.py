"""The networks of models.py, run faster with the same parameters.

    from kernels import accelerate
    fast = accelerate(network)          # fast(ppg, *vitals), fast.features(ppg, *vitals)

models.py defines the computation; this file is its fast implementation: `rows_features` on CPU and
CUDA; on CPU with FFTs (`convolve_by_fft`); on CUDA with Triton kernels for the largest passes over
memory, and with a whole training step recorded as one graph (cuda_graph.py). Each trick states by
how much it shortens the whole training step (measured by benchmarks/gpu.py), and has a plain twin
in models.py or here, to which tests/test_kernels.py compares it. Needs models.py, cuda_graph.py.

"Rows" are activations as [B, L, C]: the channels of one time step are adjacent in memory. Viewed as
[B, C, 1, L] they are PyTorch's channels-last images.
"""
import ctypes
import math
import os
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

import models
from cuda_graph import capture_inference, capture_step, feed  # noqa: F401 - used as kernels.feed

try:                                    # comes with PyTorch's CUDA builds for Linux
    import triton
    import triton.language as tl
except ImportError:
    triton = None

# On CPU, convolutions from this many samples and this kernel length up are faster by FFT, in pieces
# of about FFT_PIECE outputs.
FFT_MIN_SAMPLES, FFT_MIN_KERNEL, FFT_PIECE = 150, 9, 50


def accelerate(network: nn.Module, fft: bool = True):
    """A faster callable with the parameters of `network`, or `network` itself if it is not known.

    Call it after `network.to(device)`; on CUDA it changes the memory order of the weights
    (`store_weights_as_rows`), not their shape. Knows the networks of models.py with a waveform;
    hooks on their layers do not run. fft: on CPU, use `convolve_by_fft`.
    """
    if (type(network) not in (models.MyFirstResNet, models.SpreadResNet)
            or not network.in_channels):
        return network
    first, *blocks = (type(layer) for layer in network.layers)
    known = {models.ResBlockV1, models.ResBlockV2, models.ResBlockV3}
    if first is not models.ConvBlock or not set(blocks) <= known:
        return network
    if next(network.parameters()).is_cuda:
        store_weights_as_rows(network)
    return FastResNet(network, fft)


class FastResNet:
    """A network with a faster `waveform_features`; see `accelerate`.

    Not an `nn.Module`, so that the parameters are registered only once.
    """
    # these call the `waveform_features` below
    __call__, features = models.MyFirstResNet.forward, models.MyFirstResNet.features

    def __init__(self, network, fft):
        self.network, self.fft = network, fft
        for name in ("in_channels", "num_discrete", "min_samples", "dropout", "projection", "mlp"):
            setattr(self, name, getattr(network, name))

    def waveform_features(self, ppg):
        """[B, in_channels, L] -> [B, F], as `network.waveform_features`."""
        dtype, on_cpu = autocast_dtype(ppg), ppg.device.type == "cpu"
        if (ppg.requires_grad or torch.onnx.is_in_onnx_export()
                or on_cpu and dtype != ppg.dtype):      # autocast on CPU has its own fast layers
            return self.network.waveform_features(ppg)
        return rows_features(self.network, ppg, dtype, self.fft and on_cpu)


def autocast_dtype(x):
    """The type in which autocast computes products of x; without autocast, the type of x."""
    kind = x.device.type
    if hasattr(torch, "get_autocast_dtype"):                            # PyTorch 2.4
        enabled, dtype = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)
    elif kind == "cuda":
        enabled, dtype = torch.is_autocast_enabled(), torch.get_autocast_gpu_dtype()
    else:
        enabled, dtype = torch.is_autocast_cpu_enabled(), torch.get_autocast_cpu_dtype()
    return dtype if enabled else x.dtype


def keep_freed_memory():
    """On CPU with glibc, keep freed activations in the process for the next step.

    Each training step frees and allocates the same few hundred megabytes; by default they go back
    to the system and are paged in again. Gain: 10 % at batch 16, 17 % at batch 32.
    """
    libc = ctypes.CDLL(None) if os.name == "posix" else None
    if libc is not None and hasattr(libc, "gnu_get_libc_version"):
        libc.mallopt(-4, 0)                     # M_MMAP_MAX of malloc.h
        libc.mallopt(-1, 2 ** 31 - 1)           # M_TRIM_THRESHOLD


def prepare_device(device: torch.device, precision: str = "tf32"):
    """Process-wide settings for fast and reproducible training on a device; call before training.

    With precision 'tf32' or 'bf16', float32 products on CUDA round their factors to TF32; with
    'float32' they do not. On CUDA the same seed gives the same weights to the bit.
    """
    if device.type == "cpu":
        keep_freed_memory()
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")     # without it cuBLAS may differ
    torch.use_deterministic_algorithms(True, warn_only=True)    # some layers have none
    if hasattr(torch.utils, "deterministic"):       # do not fill each new tensor with NaN
        torch.utils.deterministic.fill_uninitialized_memory = False
    torch.backends.cudnn.benchmark = False          # its choice of algorithms varies between runs
    torch.backends.cudnn.allow_tf32 = precision != "float32"
    torch.set_float32_matmul_precision("highest" if precision == "float32" else "high")


# ------------------------------------------------------------------------------- network on rows

def rows_features(network, ppg, dtype, fft):
    """`network.waveform_features(ppg)` on rows of `dtype`: [B, in_channels, L] -> [B, F].

    A strided convolution runs as a convolution of stride 1 over rows of `stride` samples (space to
    depth). This is a free view, because the layer before writes its output with the right padding.
    Biases of convolutions are left out, as the next norm cancels each of them. The backward pass of
    a block is written by hand, to add the skip's gradient in place. Gain over models.py on CPU,
    without FFT: 30 % at batch 16, 26 % at batch 32 (with FFT 48 and 46 %).
    """
    (first, *blocks), with_spread = network.layers, isinstance(network, models.SpreadResNet)
    with torch.autocast(ppg.device.type, enabled=False):
        samples = ppg.shape[2]
        plan = Strided.of(samples, blocks[0].conv1.conv)
        conv, norm = first.conv, first.instance_norm
        if conv.in_channels == 1 and conv.kernel_size[0] < 16:
            wave = ppg[:, 0].contiguous()
            mean, covariance = patch_statistics(wave, conv.kernel_size[0])
            x = FirstLayer.apply(wave, mean, covariance, conv.weight, norm.weight, norm.bias,
                                 norm.eps, plan, dtype)
            spreads = [first_spread(covariance, conv.weight).to(ppg.dtype)] if with_spread else []
        else:
            x = conv(ppg)
            spreads = [models.log_spread(x)] if with_spread else []
            x = F.relu(norm(x)).transpose(1, 2).to(dtype)
            x = F.pad(x, (0, 0, plan.lead, plan.length - plan.lead - samples))
        for block in blocks:
            plan = Strided.of(samples, block.conv1.conv)
            norm = block.mini_res.instance_norm if hasattr(block, "mini_res") else None
            x = ResidualBlock.apply(
                x, *((norm.weight, norm.bias) if norm else (None, None)), block.conv1.conv.weight,
                block.conv1.instance_norm.weight, block.conv1.instance_norm.bias,
                block.conv2.weight, block.conv1x1.weight, plan, block.conv1.instance_norm.eps, fft)
            samples = plan.rows
            if with_spread:
                spreads.append(models.log_spread(x.to(ppg.dtype), dim=1))
            if hasattr(block, "mini_res_end"):
                norm = block.mini_res_end.instance_norm
                x = NormReLURows.apply(x, norm.weight, norm.bias, norm.eps)
        biases = torch.cat([m.bias for m in network.layers.modules() if isinstance(m, nn.Conv1d)])
        x = x.to(ppg.dtype).mean(1) + 0 * biases.sum()      # gradients of 0, not None: they decay
        return torch.cat([x, *spreads], 1)


def first_spread(covariance, weight):
    """`log_spread` of a convolution's output from the covariance of its patches: [B, C] float64."""
    taps = weight[:, 0].t().double()
    return 0.5 * torch.log((torch.matmul(covariance, taps) * taps).sum(1) + 1e-5)


class Strided(NamedTuple):
    """How a strided convolution with an odd kernel becomes one of stride 1 over longer rows."""
    stride: int
    lead: int           # zeros before the samples: the padding, rounded up to whole rows
    skipped: int        # zero taps before the kernel, which undo that rounding
    taps: int           # of the kernel over longer rows
    rows: int           # outputs
    length: int         # samples with all the padding

    @classmethod
    def of(cls, samples, conv):
        kernel, stride = conv.kernel_size[0], conv.stride[0]
        lead = -(-(kernel // 2) // stride) * stride
        skipped = lead - kernel // 2
        taps = -(-(kernel + skipped) // stride)
        rows = -(-samples // stride)
        return cls(stride, lead, skipped, taps, rows, (rows - 1 + taps) * stride)

    def at_outputs(self, padded):
        """Padded rows [B, length, C] -> a view of those at the outputs' places, [B, rows, C]."""
        return padded[:, self.lead::self.stride][:, :self.rows]

    def kernel(self, weight, dtype):
        """[C_out, C_in, K] -> [C_out, taps, stride * C_in]."""
        out_channels, in_channels, kernel = weight.shape
        wide = torch.zeros(out_channels, self.taps * self.stride, in_channels, dtype=dtype,
                           device=weight.device)
        wide[:, self.skipped:self.skipped + kernel] = weight.transpose(1, 2)
        return wide.view(out_channels, self.taps, -1)

    def kernel_gradient(self, grad, weight):
        """The gradient of `kernel`, with the shape and type of `weight`."""
        grad = grad.view(len(weight), self.taps * self.stride, -1)
        return as_weight(grad[:, self.skipped:self.skipped + weight.shape[2]], weight)


def as_weight(rows, weight):
    """[C_out, K, C_in] -> [C_out, C_in, K], with the type of `weight`."""
    return rows.to(weight.dtype).contiguous().transpose(1, 2)


def store_weights_as_rows(network):
    """Store weights [C_out, C_in, K] as [C_out, K, C_in] in memory, as the convolutions need them.

    Otherwise each step copies every weight and every gradient into the other order.
    """
    for module in network.modules():
        if isinstance(module, nn.Conv1d):
            weight = module.weight
            weight.data = weight.data.transpose(1, 2).contiguous().transpose(1, 2)


def image(rows):
    """[B, L, C] -> [B, C, 1, L], channels-last, a view."""
    return rows.transpose(1, 2).unsqueeze(2)


def rows_of(x):
    """[B, C, 1, L] -> [B, L, C]; a view of a channels-last image."""
    return x.squeeze(2).transpose(1, 2).contiguous()


def convolve_rows(x, weight, padding=0):
    """x [B, L, C_in], weight [C_out, K, C_in] -> [B, L', C_out]."""
    return rows_of(F.conv2d(image(x), image(weight), padding=(0, padding)))


def convolve_rows_backward(grad, x, weight, padding=0):
    """Gradients of x and weight, from the gradient of the result."""
    grad_x, grad_weight, _ = torch.ops.aten.convolution_backward(
        image(grad), image(x), image(weight), None, (1, 1), (0, padding), (1, 1), False, (0, 0), 1,
        (True, True, False))
    return rows_of(grad_x), rows_of(grad_weight)


class ResidualBlock(torch.autograd.Function):
    """A block of `models.py` on rows: x [B, L, C_in] -> [B, rows, C_out], without `mini_res_end`.

    If gain0 is None (V1), x is already padded: [B, plan.length, C_in].
    """

    @staticmethod
    def forward(ctx, x, gain0, shift0, weight1, gain1, shift1, weight2, skip_weight, plan, eps,
                fft):
        batch, dtype = len(x), x.dtype
        a = x if gain0 is None else norm_relu_rows(x, gain0, shift0, eps, plan.lead, plan.length)
        wide = a.view(batch, -1, plan.stride * a.shape[2])
        u = convolve_rows(wide, plan.kernel(weight1, dtype))
        h = norm_relu_rows(u, gain1, shift1, eps)
        ctx.fft = None
        if fft and plan.rows >= FFT_MIN_SAMPLES and weight2.shape[2] >= FFT_MIN_KERNEL:
            with torch.set_grad_enabled(any(ctx.needs_input_grad)):
                leaves = h.detach().requires_grad_(), weight2.detach().requires_grad_()
                y = convolve_by_fft(leaves[0].transpose(1, 2), leaves[1]).transpose(1, 2)
            ctx.fft = leaves, y
            y = y.detach()
        else:
            y = convolve_rows(h, weight2.transpose(1, 2).to(dtype), weight2.shape[2] // 2)
        taken = plan.at_outputs(x) if gain0 is None else x[:, ::plan.stride]
        y.baddbmm_(taken, skip_weight[:, :, 0].t().to(dtype).expand(batch, -1, -1))
        ctx.save_for_backward(x, gain0, shift0, weight1, gain1, shift1, weight2, skip_weight,
                              a, u, h)
        ctx.plan, ctx.eps = plan, eps
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        (x, gain0, shift0, weight1, gain1, shift1, weight2, skip_weight,
         a, u, h) = ctx.saved_tensors
        plan, eps, batch, dtype, grad = ctx.plan, ctx.eps, len(x), x.dtype, grad.contiguous()
        if ctx.fft:
            grad_h, grad2 = torch.autograd.grad(ctx.fft[1], ctx.fft[0], grad)
            ctx.fft = None
        else:
            grad_h, grad2 = convolve_rows_backward(grad, h, weight2.transpose(1, 2).to(dtype),
                                                   weight2.shape[2] // 2)
            grad2 = as_weight(grad2, weight2)
        grad_u, grad_gain1, grad_shift1 = norm_relu_rows_backward(grad_h, u, gain1, shift1, eps)
        wide = a.view(batch, -1, plan.stride * a.shape[2])
        grad_a, grad1 = convolve_rows_backward(grad_u, wide, plan.kernel(weight1, dtype))
        grad_a = grad_a.view_as(a)
        if gain0 is None:
            grad_x, grad_gain0, grad_shift0 = grad_a, None, None
            taken, grad_taken = plan.at_outputs(x), plan.at_outputs(grad_x)
        else:
            grad_x, grad_gain0, grad_shift0 = norm_relu_rows_backward(
                grad_a, x, gain0, shift0, eps, plan.lead)
            taken, grad_taken = x[:, ::plan.stride], grad_x[:, ::plan.stride]
        skip = skip_weight[:, :, 0].to(dtype)
        grad_taken.baddbmm_(grad, skip.expand(batch, -1, -1))
        grad_skip = torch.bmm(grad.transpose(1, 2), taken).sum(0, dtype=skip_weight.dtype)
        return (grad_x, grad_gain0, grad_shift0, plan.kernel_gradient(grad1, weight1), grad_gain1,
                grad_shift1, grad2, grad_skip.unsqueeze(2), None, None, None)


class FirstLayer(torch.autograd.Function):
    """`relu(norm(conv(ppg)))` as padded rows, written once: [B, L] -> [B, plan.length, C].

    The norm is applied to the filters, from the PPG's `patch_statistics`, not to the output. The
    backward pass computes the output again, which is cheaper than reading it. No gradient for the
    PPG. Gain on CPU: 8 % at batch 16, 17 % at batch 32.
    """

    @staticmethod
    def forward(ctx, ppg, mean, covariance, weight, gain, shift, eps, plan, dtype):
        taps = weight[:, 0].t().double()                        # [K, C]
        product = torch.matmul(covariance, taps)                # [B, K, C]
        root = torch.rsqrt((product * taps).sum(1, keepdim=True) + eps)         # [B, 1, C]
        filters = taps * (gain * root)
        filters = torch.cat([filters, shift - (mean * filters).sum(1, keepdim=True)], 1)
        filters = filters.to(ppg.dtype)                         # [B, K + 1, C], the last the shift
        ctx.save_for_backward(ppg, weight, gain, mean, product, root, filters)
        ctx.plan = plan
        return patches_relu(ppg, filters, plan, dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        ppg, weight, gain, mean, product, root, filters = ctx.saved_tensors
        grad = patches_relu_backward(grad.contiguous(), ppg, filters, ctx.plan).double()
        grad_shift = grad[:, -1:]                               # [B, 1, C]
        grad = grad[:, :-1] - mean * grad_shift                 # [B, K, C]
        taps = weight[:, 0].t().double()
        along = (grad * taps).sum(1, keepdim=True) * root       # [B, 1, C]
        grad = root * gain * (grad - along * root * product)    # variance = taps' covariance taps
        return (None, None, None, grad.sum(0).t().unsqueeze(1).to(weight.dtype),
                along.sum((0, 1)).to(gain.dtype), grad_shift.sum((0, 1)).to(gain.dtype),
                None, None, None)


def convolve_by_fft(x, weight):
    """Convolution of stride 1, padded to equal length: x [B, C_in, L] -> [B, C_out, L].

    Overlap-save: the signal is cut into T pieces of N samples that yield N - K + 1 outputs each. In
    the frequency domain a convolution is a product of matrices over the channels, one for each of F
    frequencies: 4 F multiplications for N - K + 1 outputs, instead of K for each output. Transforms
    of so few points are matrix products, too short for an FFT to be faster; complex products are
    real products of [Re, Im]. Gain on CPU: 14 to 20 % (batch 16 and 32).
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
    # A network's convolution is a correlation, so the kernel's spectrum is conjugated.
    taps = weight.permute(2, 1, 0).flatten(1)                           # [K, C_in C_out]
    w = torch.mm(forth[:, :kernel], taps).view(n_frequencies, 2, in_channels, out_channels)
    real, imaginary = w[:, 0], -w[:, 1]
    w = torch.cat([torch.cat([real, imaginary], 2), torch.cat([-imaginary, real], 2)], 1)
    y = torch.bmm(x, w).transpose(0, 1)                                 # [B T, F, 2 C_out]
    y = y.reshape(-1, 2 * n_frequencies, out_channels)
    y = torch.bmm(back.expand(len(y), -1, -1), y)                       # [B T, kept, C_out]
    return y.view(-1, pieces * kept, out_channels)[:, :samples].transpose(1, 2)


def fourier_matrices(n, kernel, dtype):
    """Matrices of the real DFT of n (even) samples, [F, 2, n], and of a part of its inverse.

    The inverse gives only the first n - kernel + 1 samples, whose kernel lies inside the piece:
    [n - kernel + 1, F, 2]. F = n / 2 + 1; the two rows are the real and the imaginary part.
    """
    frequency = torch.arange(n // 2 + 1, dtype=torch.float64)
    angle = 2 * math.pi / n * torch.arange(n, dtype=torch.float64) * frequency.unsqueeze(1)
    forth = torch.stack([angle.cos(), -angle.sin()], 1)
    twice = torch.full((n // 2 + 1, 1, 1), 2.0 / n, dtype=torch.float64)
    twice[[0, -1]] = 1.0 / n                # these two frequencies have no mirror image
    back = (forth * twice)[:, :, :n - kernel + 1].permute(2, 0, 1)
    return forth.to(dtype), back.to(dtype).contiguous()


class NormReLURows(torch.autograd.Function):
    """`relu(norm(x))` of rows [B, L, C]."""

    @staticmethod
    def forward(ctx, x, gain, shift, eps):
        ctx.save_for_backward(x, gain, shift)
        ctx.eps = eps
        return norm_relu_rows(x, gain, shift, eps)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        return (*norm_relu_rows_backward(grad.contiguous(), *ctx.saved_tensors, ctx.eps), None)


# Functions that have a plain form and, on CUDA, a Triton kernel.

def use_triton(x, samples=0):
    """Whether to use the Triton kernels on x. Triton's interpreter runs them on CPU, for tests."""
    return (triton is not None and (x.is_cuda or os.environ.get("TRITON_INTERPRET") == "1")
            and x.dtype != torch.float64 and samples <= 2048)


def norm_relu_rows(x, gain, shift, eps, lead=0, length=None):
    """`relu(norm(x))`, x [B, L, C], as rows [B, length, C], of which the first `lead` are zeros."""
    batch, samples, channels = x.shape
    length = length or samples
    if use_triton(x, samples):
        out = torch.empty(batch, length, channels, dtype=x.dtype, device=x.device)
        grid, blocks = norm_blocks(x)
        _norm_relu[grid](x, gain, shift, out, samples, length, lead, channels, eps,
                         EDGE=triton.next_power_of_2(max(1, length - samples)), **blocks)
        return out
    standard, _ = standardise(x, eps)
    return F.pad(F.relu(standard * gain + shift).to(x.dtype),
                 (0, 0, lead, length - lead - samples))


def norm_relu_rows_backward(grad, x, gain, shift, eps, lead=0):
    """Gradients of x, gain and shift, from the gradient [B, length, C] of `norm_relu_rows`."""
    batch, samples, channels = x.shape
    if use_triton(x, samples):
        grad_x = torch.empty_like(x)
        parts = torch.empty(2, batch, channels, dtype=torch.float32, device=x.device)
        grid, blocks = norm_blocks(x)
        _norm_relu_backward[grid](grad, x, gain, shift, grad_x, parts, samples, grad.shape[1], lead,
                                  channels, batch * channels, eps, **blocks)
        return (grad_x, *parts.sum(1).to(gain.dtype))
    standard, root = standardise(x, eps)
    grad = grad[:, lead:lead + samples].to(standard.dtype) * (standard * gain + shift > 0)
    grad_shift, grad_gain = grad.sum(1, keepdim=True), (grad * standard).sum(1, keepdim=True)
    grad_x = root * gain * (grad - (grad_shift + standard * grad_gain) / samples)
    return grad_x.to(x.dtype), grad_gain.sum((0, 1)), grad_shift.sum((0, 1))


def standardise(x, eps):
    """(x with mean 0 and variance 1 over time, 1 / SD [B, 1, C]), in float32 or float64."""
    x = x if x.dtype == torch.float64 else x.float()
    centred = x - x.mean(1, keepdim=True)
    root = torch.rsqrt((centred * centred).mean(1, keepdim=True) + eps)
    return centred * root, root


def norm_blocks(x):
    """Grid and block sizes; each program holds all samples of some channels of one segment."""
    batch, samples, channels = x.shape
    block_l = triton.next_power_of_2(samples)
    block_c = min(triton.next_power_of_2(channels), max(16, 8192 // block_l), 64)
    return ((batch, triton.cdiv(channels, block_c)),
            {"BLOCK_L": block_l, "BLOCK_C": block_c,
             "num_warps": max(4, block_l * block_c // 1024)})


def patch_rows(ppg, kernel):
    """[B, L] -> [B, L, K + 1]: the K samples around each sample, and a 1."""
    patches = F.pad(ppg, (kernel // 2, kernel // 2)).unfold(1, kernel, 1)
    return F.pad(patches, (0, 1), value=1.0)


def patch_moments(ppg, kernel):
    """Sums over time of the products of `patch_rows`: [B, K + 1, K + 1] float64."""
    batch, samples = ppg.shape
    if use_triton(ppg):
        chunk = 512
        parts = torch.empty(batch, triton.cdiv(samples, chunk), 16, 16, dtype=torch.float64,
                            device=ppg.device)
        _patch_moments[parts.shape[:2]](ppg, parts, samples, K=kernel, CHUNK=chunk, BLOCK=16)
        return parts.sum(1)[:, :kernel + 1, :kernel + 1]
    patches = patch_rows(ppg, kernel).double()
    return torch.bmm(patches.transpose(1, 2), patches)


def patch_statistics(ppg, kernel):
    """Mean [B, K, 1] and covariance [B, K, K] of the K samples around each sample, float64."""
    moments = patch_moments(ppg, kernel) / ppg.shape[1]
    mean = moments[:, kernel, :kernel].unsqueeze(2)
    return mean, moments[:, :kernel, :kernel] - mean * mean.transpose(1, 2)


def patches_relu(ppg, filters, plan, dtype):
    """`relu(patch_rows(ppg) @ filters)` as padded rows [B, plan.length, C] of `dtype`."""
    (batch, samples), (_, taps, channels) = ppg.shape, filters.shape
    if use_triton(ppg):
        out = torch.empty(batch, plan.length, channels, dtype=dtype, device=ppg.device)
        grid = batch, triton.cdiv(plan.length, 128), triton.cdiv(channels, 64)
        _patches_relu[grid](ppg, filters.contiguous(), out, samples, plan.length, plan.lead,
                            channels, K=taps - 1, PRECISION=product_precision(), BLOCK=128,
                            BLOCK_C=64)
        return out
    y = F.relu(torch.bmm(patch_rows(ppg, taps - 1).to(dtype), filters.to(dtype)))
    return F.pad(y, (0, 0, plan.lead, plan.length - plan.lead - samples))


def patches_relu_backward(grad, ppg, filters, plan):
    """The gradient of `filters`, from the gradient of the result of `patches_relu`."""
    (batch, samples), (_, taps, channels) = ppg.shape, filters.shape
    if use_triton(ppg):
        chunk = 1024
        grid = batch, triton.cdiv(samples, chunk), triton.cdiv(channels, 64)
        parts = torch.empty(batch, grid[1], 16, channels, dtype=torch.float32, device=ppg.device)
        _patches_relu_backward[grid](
            grad, ppg, filters, parts, samples, plan.length, plan.lead, channels, K=taps - 1,
            PRECISION=product_precision(), CHUNK=chunk, BLOCK=64, BLOCK_C=64)
        return parts.sum(1)[:, :taps]
    patches = patch_rows(ppg, taps - 1).to(grad.dtype)
    positive = torch.bmm(patches, filters.to(grad.dtype)) > 0
    grad = grad[:, plan.lead:plan.lead + samples] * positive
    return torch.bmm(patches.transpose(1, 2), grad).to(filters.dtype)


def product_precision():
    return "tf32" if torch.backends.cudnn.allow_tf32 else "ieee"


if triton is not None:
    @triton.jit
    def _norm_relu(x, gain, shift, out, samples, length, lead, channels, eps,
                   BLOCK_L: tl.constexpr, BLOCK_C: tl.constexpr, EDGE: tl.constexpr):
        b, t = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK_L)
        c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
        inside = (t < samples)[:, None] & (c < channels)[None, :]
        at = t[:, None] * channels + c[None, :]
        v = tl.load(x + b * samples * channels + at, mask=inside, other=0.0).to(tl.float32)
        v = tl.where(inside, v - tl.sum(v, 0)[None, :] / samples, 0.0)
        root = 1 / tl.sqrt(tl.sum(v * v, 0) / samples + eps)
        g = tl.load(gain + c, mask=c < channels, other=0.0)
        s = tl.load(shift + c, mask=c < channels, other=0.0)
        z = v * root[None, :] * g[None, :] + s[None, :]
        out += b * length * channels
        tl.store(out + lead * channels + at, tl.maximum(z, 0.0), mask=inside)
        e = tl.arange(0, EDGE)
        row = tl.where(e < lead, e, samples + e)            # the zeros in front and behind
        edge = (e < length - samples)[:, None] & (c < channels)[None, :]
        tl.store(out + row[:, None] * channels + c[None, :], tl.zeros((EDGE, BLOCK_C), tl.float32),
                 mask=edge)

    @triton.jit
    def _norm_relu_backward(grad, x, gain, shift, grad_x, parts, samples, length, lead, channels,
                            part, eps, BLOCK_L: tl.constexpr, BLOCK_C: tl.constexpr):
        b, t = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK_L)
        c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
        inside = (t < samples)[:, None] & (c < channels)[None, :]
        at = t[:, None] * channels + c[None, :]
        v = tl.load(x + b * samples * channels + at, mask=inside, other=0.0).to(tl.float32)
        dz = tl.load(grad + (b * length + lead) * channels + at, mask=inside, other=0.0)
        v = tl.where(inside, v - tl.sum(v, 0)[None, :] / samples, 0.0)
        root = 1 / tl.sqrt(tl.sum(v * v, 0) / samples + eps)
        v = v * root[None, :]
        g = tl.load(gain + c, mask=c < channels, other=0.0)
        s = tl.load(shift + c, mask=c < channels, other=0.0)
        dz = tl.where(inside & (v * g[None, :] + s[None, :] > 0), dz.to(tl.float32), 0.0)
        grad_shift, grad_gain = tl.sum(dz, 0), tl.sum(dz * v, 0)
        dz -= (grad_shift[None, :] + v * grad_gain[None, :]) / samples
        tl.store(grad_x + b * samples * channels + at, dz * (root * g)[None, :], mask=inside)
        tl.store(parts + b * channels + c, grad_gain, mask=c < channels)
        tl.store(parts + part + b * channels + c, grad_shift, mask=c < channels)

    @triton.jit
    def _patches(ppg, t, k, samples, K: tl.constexpr):
        """Tap k < K of the patch at sample t; 1 for k == K; 0 elsewhere."""
        source = t + k - K // 2
        inside = (t >= 0) & (t < samples) & (k < K) & (source >= 0) & (source < samples)
        values = tl.load(ppg + source, mask=inside, other=0.0)
        return tl.where((t >= 0) & (t < samples) & (k == K), 1.0, values)

    @triton.jit
    def _patch_moments(ppg, parts, samples, K: tl.constexpr, CHUNK: tl.constexpr,
                       BLOCK: tl.constexpr):
        b, chunk, k = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.arange(0, 16)
        total = tl.zeros((BLOCK, 16, 16), tl.float64)
        for start in range(0, CHUNK, BLOCK):
            t = chunk * CHUNK + start + tl.arange(0, BLOCK)[:, None, None]
            left = _patches(ppg + b * samples, t, k[None, :, None], samples, K).to(tl.float64)
            right = _patches(ppg + b * samples, t, k[None, None, :], samples, K).to(tl.float64)
            total += left * right
        parts += (b * tl.num_programs(1) + chunk) * 256
        tl.store(parts + k[:, None] * 16 + k[None, :], tl.sum(total, 0))

    @triton.jit
    def _patches_relu(ppg, filters, out, samples, length, lead, channels, K: tl.constexpr,
                      PRECISION: tl.constexpr, BLOCK: tl.constexpr, BLOCK_C: tl.constexpr):
        b, k = tl.program_id(0).to(tl.int64), tl.arange(0, 16)
        row = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        c = tl.program_id(2) * BLOCK_C + tl.arange(0, BLOCK_C)
        t = row - lead
        dtype = out.dtype.element_ty
        p = _patches(ppg + b * samples, t[:, None], k[None, :], samples, K)
        filters += b * (K + 1) * channels
        f = tl.load(filters + k[:, None] * channels + c[None, :],
                    mask=(k < K)[:, None] & (c < channels)[None, :], other=0.0)
        shift = tl.load(filters + K * channels + c, mask=c < channels, other=0.0)
        z = tl.dot(p.to(dtype), f.to(dtype), input_precision=PRECISION) + shift[None, :]
        z = tl.where(((t >= 0) & (t < samples))[:, None], tl.maximum(z, 0.0), 0.0)
        tl.store(out + (b * length + row[:, None]) * channels + c[None, :], z.to(dtype),
                 mask=(row < length)[:, None] & (c < channels)[None, :])

    @triton.jit
    def _patches_relu_backward(grad, ppg, filters, parts, samples, length, lead, channels,
                               K: tl.constexpr, PRECISION: tl.constexpr, CHUNK: tl.constexpr,
                               BLOCK: tl.constexpr, BLOCK_C: tl.constexpr):
        b, chunk, k = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.arange(0, 16)
        c = tl.program_id(2) * BLOCK_C + tl.arange(0, BLOCK_C)
        dtype = grad.dtype.element_ty
        ppg += b * samples
        filters += b * (K + 1) * channels
        f = tl.load(filters + k[:, None] * channels + c[None, :],
                    mask=(k < K)[:, None] & (c < channels)[None, :], other=0.0).to(dtype)
        shift = tl.load(filters + K * channels + c, mask=c < channels, other=0.0)
        total = tl.zeros((16, BLOCK_C), tl.float32)
        for start in range(0, CHUNK, BLOCK):
            t = chunk * CHUNK + start + tl.arange(0, BLOCK)
            p = _patches(ppg, t[:, None], k[None, :], samples, K).to(dtype)
            z = tl.dot(p, f, input_precision=PRECISION) + shift[None, :]
            dz = tl.load(grad + (b * length + lead + t[:, None]) * channels + c[None, :],
                         mask=(t < samples)[:, None] & (c < channels)[None, :], other=0.0)
            dz = tl.where(z > 0, dz, 0.0).to(dtype)
            p = _patches(ppg, t[None, :], k[:, None], samples, K).to(dtype)     # [16, BLOCK]
            total += tl.dot(p, dz, input_precision=PRECISION)
        parts += (b * tl.num_programs(1) + chunk) * 16 * channels
        tl.store(parts + k[:, None] * channels + c[None, :], total,
                 mask=(c < channels)[None, :] & (k < 16)[:, None])
