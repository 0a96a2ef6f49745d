"""The training step and inference on one GPU, ours and the published one in the same process.

    python benchmarks/gpu.py --json gpu.json                    # everything, under five minutes
    python benchmarks/gpu.py --ablate-kernels --parts steps,ablation
    python benchmarks/gpu.py --device cpu --batch 32            # the same on CPU; by default a toy

If a part fails, its error is printed and the next part runs. Rates are medians.
The network costs 1.52 GFLOP a training segment and 0.51 an inference.
"""
import argparse
import contextlib
import json
import os
import statistics
import sys
import tempfile
import time
import traceback
import warnings
from functools import partial
from typing import NamedTuple

import common  # noqa: F401 (puts the repository on the path)
import h5py
import numpy as np
import torch

import kernels
from models import get_model_v3
from tk_utils import git_revision, print_table

GFLOP_FORWARD = 0.508
PRECISIONS = {"tf32": torch.float32, "bf16": torch.bfloat16}


class Bench(NamedTuple):
    """What all parts share."""
    device: torch.device
    batch: int
    small_batch: int
    repeats: int
    segments: int           # of the file of the end-to-end part
    results: dict           # {part: what it found}, for the JSON

    @property
    def cuda(self):
        return self.device.type == "cuda"

    def sync(self):
        if self.cuda:
            torch.cuda.synchronize()

    def inputs(self, batch, seed=0):
        """(ppg, three vitals, label), normalised, on the device."""
        generator = torch.Generator().manual_seed(seed)
        ppg = torch.randn(batch, 1, 3600, generator=generator).cumsum(2)
        ppg = (ppg - ppg.mean(2, keepdim=True)) / ppg.std(2, keepdim=True)
        rest = torch.randn(4, batch, generator=generator)
        return [t.to(self.device) for t in (ppg, *rest)]

    def seconds(self, run, calls=None):
        """The median time of a call."""
        calls, times = calls or (20 if self.cuda else 1), []
        for repeat in range(self.repeats + 1):
            self.sync()
            started = time.perf_counter()
            for _ in range(calls):
                run()
            self.sync()
            if repeat:
                times.append((time.perf_counter() - started) / calls)
        return statistics.median(times)


class Trainer:
    """A network, its optimiser and the whole step, as training_header.py has them."""

    def __init__(self, bench, precision, forward=None, fast=True, seed=0):
        torch.manual_seed(seed)
        self.network = get_model_v3(3).to(bench.device)
        self.forward = (forward or (kernels.accelerate if fast else lambda one: one))(self.network)
        self.device, self.dtype = bench.device, PRECISIONS[precision]
        fused = {"fused": True, "capturable": True} if bench.cuda else {}
        self.optimizer = torch.optim.Adam(self.network.parameters(), lr=1e-3, **fused)

    def predict(self, *inputs):
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            return self.forward(*inputs).float()

    def step(self, *batch):
        loss = ((self.predict(*batch[:-1])[:, 0] - batch[-1]) ** 2).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.network.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    def captured(self, batch):
        step = kernels.capture_step(self.step, batch, model=self.network, optimizer=self.optimizer)
        if self.device.type == "cuda" and step == self.step:
            raise RuntimeError("the step was not captured (see the line above)")
        return step

    def weights(self):
        return torch.cat([p.detach().reshape(-1) for p in self.network.parameters()])


# ------------------------------------------------------------------------------------------- parts

def machine(bench):
    found = {"torch": torch.__version__, "python": sys.version.split()[0], "cores": os.cpu_count(),
             "triton": getattr(kernels.triton, "__version__", None), "revision": git_revision(),
             "device": torch.cuda.get_device_name() if bench.cuda else "CPU",
             "cudnn": torch.backends.cudnn.version()}
    print(", ".join(f"{key} {value}" for key, value in found.items()))
    return found


def limits(bench):
    """What the card reaches in large matrix products and copies."""
    n, found = 8192 if bench.cuda else 512, {}
    for name, dtype in PRECISIONS.items():
        a = torch.randn(n, n, device=bench.device, dtype=dtype)
        found[f"{name} TFLOP/s"] = 2e-12 * n ** 3 / bench.seconds(lambda a=a: a @ a, calls=3)
    a = torch.empty(2 ** 28 if bench.cuda else 2 ** 20, device=bench.device, dtype=torch.uint8)
    found["copy GB/s"] = 2e-9 * len(a) / bench.seconds(a.clone, calls=3)
    print({key: round(value, 2) for key, value in found.items()})
    return found


def published(bench):
    """The published practice: models.py as it is, plain Adam, PyTorch's defaults, no graph."""
    torch.manual_seed(0)
    network = get_model_v3(3).to(bench.device)
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3)
    *inputs, label = bench.inputs(bench.batch)

    def step():
        optimizer.zero_grad()
        ((network(*inputs)[:, 0] - label) ** 2).mean().backward()
        optimizer.step()

    def infer():
        with torch.no_grad():
            network(*inputs)

    if bench.cuda:
        torch.cuda.reset_peak_memory_stats()
    found = {"train": bench.batch / bench.seconds(step, 5 if bench.cuda else 1),
             "infer": bench.batch / bench.seconds(infer, 5 if bench.cuda else 1),
             "peak GB": torch.cuda.max_memory_allocated() / 1e9 if bench.cuda else 0.0}
    print({key: round(value, 1) for key, value in found.items()})
    return found


def parity(bench):
    """accelerate(network) against the network: outputs and gradients, relative."""
    found = {}
    *inputs, label = bench.inputs(min(bench.batch, 32))
    for precision in ("float32", "tf32", "bf16"):
        kernels.prepare_device(bench.device, precision)
        outputs, gradients = [], []
        for fast in (False, True):
            trainer = Trainer(bench, "bf16" if precision == "bf16" and fast else "tf32", fast=fast)
            if not fast and bench.cuda:                 # the reference, always in full float32
                kernels.prepare_device(bench.device, "float32")
            out = trainer.predict(*inputs)[:, 0]
            ((out - label) ** 2).mean().backward()
            kernels.prepare_device(bench.device, precision)
            outputs.append(out.detach())
            gradients.append(torch.cat([p.grad.reshape(-1) for p in trainer.network.parameters()]))
        found[precision] = {
            "output": float((outputs[1] - outputs[0]).norm() / outputs[0].norm()),
            "gradient": float((gradients[1] - gradients[0]).norm() / gradients[0].norm())}
        print(precision, {key: f"{value:.1e}" for key, value in found[precision].items()})
    return found


def steps(bench):
    """Rates of the captured step and of captured inference, and peak memory."""
    found, rows = {}, []
    base = bench.results.get("published", {})
    for precision in PRECISIONS:
        kernels.prepare_device(bench.device, precision)
        for batch in (bench.batch, bench.small_batch):
            if bench.cuda:
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
            data, trainer = bench.inputs(batch), Trainer(bench, precision)
            started = time.perf_counter()
            step = trainer.captured(data)
            bench.sync()
            warm = time.perf_counter() - started
            train = batch / bench.seconds(partial(step, *data))
            peak = torch.cuda.max_memory_allocated() / 1e9 if bench.cuda else 0.0
            del step
            trainer.network.eval()
            infer = kernels.capture_inference(trainer.predict, data[:-1])
            infer = batch / bench.seconds(partial(infer, *data[:-1]))
            found[f"{precision} batch {batch}"] = {
                "train": train, "infer": infer, "peak GB": peak, "recording s": warm}
            rows.append([precision, batch, f"{train:,.0f}", train / base.get("train", np.nan),
                         f"{infer:,.0f}", infer / base.get("infer", np.nan), f"{peak:.2f}",
                         f"{3e-3 * GFLOP_FORWARD * train:.1f}", f"{warm:.1f}"])
    print_table(rows, ["precision", "batch", "train /s", "x published", "infer /s", "x published",
                       "peak GB", "TFLOP/s", "recording s"])
    return found


def exact(bench):
    """A captured run against an eager one, and two captured runs of a seed: largest difference."""
    kernels.prepare_device(bench.device, "tf32")
    batches = [bench.inputs(bench.small_batch, seed) for seed in range(30 if bench.cuda else 3)]
    ends = {}
    for name in ("eager", "captured", "again"):
        trainer = Trainer(bench, "tf32")
        step = trainer.step if name == "eager" else trainer.captured(batches[0])
        for i, batch in enumerate(batches):
            trainer.optimizer.param_groups[0]["lr"] = 1e-3 / (1 + i)
            step(*batch)
        ends[name] = trainer.weights()
    found = {"two runs equal": torch.equal(ends["captured"], ends["again"]),
             "eager equal": torch.equal(ends["captured"], ends["eager"]),
             "eager difference": float((ends["captured"] - ends["eager"]).abs().max())}
    print(found)
    return found


def profile(bench):
    """Where the captured step's time goes: its 25 longest kernels, µs a step."""
    if not bench.cuda:
        return "only on CUDA"
    from torch.profiler import ProfilerActivity
    found = {}
    for precision in PRECISIONS:
        kernels.prepare_device(bench.device, precision)
        data = bench.inputs(bench.batch)
        step = Trainer(bench, precision).captured(data)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")         # that a profile holds one cycle only
            with torch.profiler.profile(activities=[ProfilerActivity.CUDA]) as seen:
                for _ in range(3):
                    step(*data)
                bench.sync()
            # PyTorch before 2.4 calls it self_cuda_time_total
            events = [(getattr(e, "self_device_time_total", getattr(e, "self_cuda_time_total", 0)),
                       e) for e in seen.key_averages()]
        events = sorted(events, key=lambda one: -one[0])
        total = sum(us for us, _ in events) / 3
        print(f"{precision}: {total:.0f} us in {sum(e.count for _, e in events) / 3:.0f} kernels")
        found[precision] = [{"us": us / 3, "calls": e.count / 3, "name": e.key[:160]}
                            for us, e in events[:40]]
        for one in found[precision][:25]:
            print(f"  {one['us']:7.0f} us x{one['calls']:4.0f}  {one['name'][:105]}")
    return found


@contextlib.contextmanager
def changed(owner, name, value):
    """owner.name is `value` meanwhile."""
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


class PlainFirstLayer:
    """`kernels.FirstLayer` by PyTorch's convolution, norm and ReLU."""

    @staticmethod
    def apply(ppg, mean, covariance, weight, gain, shift, eps, plan, dtype):
        x = torch.nn.functional.conv1d(ppg.unsqueeze(1), weight, padding=weight.shape[2] // 2)
        x = kernels.NormReLURows.apply(x.transpose(1, 2).to(dtype).contiguous(), gain, shift, eps)
        return torch.nn.functional.pad(
            x, (0, 0, plan.lead, plan.length - plan.lead - x.shape[1]))


def unfolded(x, weight, padding=0):
    """`kernels.convolve_rows` as a matrix product of unfolded rows."""
    x = torch.nn.functional.pad(x, (0, 0, padding, padding))
    x = x.unfold(1, weight.shape[1], 1).transpose(2, 3).flatten(2)      # [B, L', K C]
    return torch.matmul(x, weight.flatten(1).t())


def norm_blocks(elements, warps):
    """`kernels.norm_blocks` with other sizes."""
    def blocks(x):
        length, channels = kernels.triton.next_power_of_2(x.shape[1]), x.shape[2]
        width = min(kernels.triton.next_power_of_2(channels), max(8, elements // length), 128)
        return ((len(x), kernels.triton.cdiv(channels, width)),
                {"BLOCK_L": length, "BLOCK_C": width,
                 "num_warps": max(1, min(16, length * width // warps))})
    return blocks


def ablation(bench):
    """Variants of the captured bf16 and TF32 step, to choose defaults by measurement."""
    same = contextlib.nullcontext
    unchanged = lambda network: network
    eager = lambda network: kernels.FastResNet(network, fft=True)
    variants = {
        "as it is": (same, None),
        "without FFT (CPU)": (same, lambda network: kernels.accelerate(network, fft=False)),
        "first layer by PyTorch": (lambda: changed(kernels, "FirstLayer", PlainFirstLayer), None),
        "forward convolutions by unfolding": (lambda: changed(kernels, "convolve_rows", unfolded),
                                              None),
        "weights not stored as rows": (same, eager),
        "models.py": (same, unchanged)}
    if bench.cuda:
        variants["cudnn.benchmark"] = (
            lambda: changed(torch.backends.cudnn, "benchmark", True), None)
        variants["algorithms not deterministic"] = (not_deterministic, None)
        variants["both of these"] = (lambda: not_deterministic(benchmark=True), None)
        variants["models.py, compiled"] = (same, torch.compile)
    if bench.cuda and kernels.triton is not None:
        variants["without Triton"] = (lambda: changed(kernels, "triton", None), None)
        for elements, warps in ((8192, 512), (8192, 2048), (16384, 1024), (32768, 2048)):
            variants[f"norm blocks of {elements}, a warp for {warps}"] = (
                lambda e=elements, w=warps: changed(kernels, "norm_blocks", norm_blocks(e, w)),
                None)
    found, rows = {}, []
    for name, (context, forward) in variants.items():
        rates = []
        for precision in PRECISIONS if bench.cuda else ("tf32",):
            kernels.prepare_device(bench.device, precision)
            try:
                with context():
                    data = bench.inputs(bench.batch)
                    step = Trainer(bench, precision, forward).captured(data)
                    rates.append(bench.batch / bench.seconds(partial(step, *data), 10))
            except Exception as error:  # noqa: BLE001 - the other variants still count
                print(f"FAILED {name} {precision}: {type(error).__name__}: {str(error)[:200]}")
                rates.append(float("nan"))
            step = None
            if bench.cuda:
                torch.cuda.empty_cache()
        found[name] = rates
        rows.append([name] + [f"{rate:,.0f}" for rate in rates])
        print("  ", *rows[-1], flush=True)
    print_table(rows, ["variant", *(PRECISIONS if bench.cuda else ["float32"])])
    return found


@contextlib.contextmanager
def not_deterministic(benchmark=False):
    torch.use_deterministic_algorithms(False)
    with changed(torch.backends.cudnn, "benchmark", benchmark):
        yield
    torch.use_deterministic_algorithms(True, warn_only=True)


def pieces(bench):
    """Single operations of the first block, forward and backward, µs: Triton beside its twin."""
    found = {}
    for precision, dtype in PRECISIONS.items() if bench.cuda else [("tf32", torch.float32)]:
        batch = bench.batch
        ppg = bench.inputs(batch)[0][:, 0].contiguous()
        plan = kernels.Strided.of(3600, get_model_v3(0).layers[1].conv1.conv)
        filters = torch.randn(batch, 16, 64, device=bench.device)
        x = torch.randn(batch, 900, 64, device=bench.device, dtype=dtype)
        wide = torch.randn(batch, plan.length // 4, 256, device=bench.device, dtype=dtype)
        kernel = torch.randn(64, 4, 256, device=bench.device, dtype=dtype)
        kernel2 = torch.randn(64, 15, 64, device=bench.device, dtype=dtype)
        gain = torch.ones(64, device=bench.device)
        padded = wide.view(batch, -1, 64)
        runs = {
            "patch moments": partial(kernels.patch_moments, ppg, 15),
            "first layer": partial(kernels.patches_relu, ppg, filters, plan, dtype),
            "first layer backward": partial(kernels.patches_relu_backward, padded, ppg, filters,
                                            plan),
            "norm": partial(kernels.norm_relu_rows, x, gain, gain, 1e-5),
            "norm backward": partial(kernels.norm_relu_rows_backward, x, x, gain, gain, 1e-5),
            "strided convolution": partial(kernels.convolve_rows, wide, kernel),
            "strided convolution backward": partial(kernels.convolve_rows_backward, x, wide,
                                                    kernel),
            "convolution": partial(kernels.convolve_rows, x, kernel2, 7),
            "convolution backward": partial(kernels.convolve_rows_backward, x, x, kernel2, 7)}
        found[precision] = {name: 1e6 * bench.seconds(run, 5) for name, run in runs.items()}
        print(precision, {name: round(us) for name, us in found[precision].items()})
    return found


def end_to_end(bench):
    """`training_loop` from an HDF5 file: segments/s of the third epoch, and of the loader alone."""
    from datasets import TPP_PPG_dataset, create_dataset_index
    from loaders import make_loader
    from training_header import training_loop
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "random.h5")
        write_random_file(path, bench.segments)
        index = create_dataset_index(path=path, condition="any")
        data = TPP_PPG_dataset(index, "segment", ["ppg", "map", "dbp", "hr", "tpp"])
        few = TPP_PPG_dataset(index, "segment", ["ppg", "map", "dbp", "hr", "tpp"], percentage=1)
        for name, options in (("file", {"pin_memory": bench.cuda}),
                              ("device cache", {"device_cache": bench.device})):
            loader = make_loader(data, bench.batch, shuffle=True, **options)
            for _ in range(2):
                started = time.perf_counter()
                count = sum(len(batch[-1]) for batch in kernels.feed(loader, bench.device))
                bench.sync()
                found[f"{name}, loader alone"] = count / (time.perf_counter() - started)
            for precision in PRECISIONS:
                ends = []
                training_loop(get_model_v3(3), loader, make_loader(few, bench.batch), 3, 1e-4,
                              precision=precision, device=bench.device,
                              on_epoch=lambda _, ends=ends: ends.append(time.perf_counter()))
                found[f"{name}, {precision}"] = count / (ends[2] - ends[1])
    print({name: round(rate) for name, rate in found.items()})
    return found


def write_random_file(path, segments, patients=20):
    rng = np.random.default_rng(0)
    with h5py.File(path, "w") as file:
        for patient in range(patients):
            group, rows = file.create_group(f"P{patient}/E0"), segments // patients
            group["ppg"] = rng.standard_normal((rows, 1, 3600), dtype=np.float32)
            for key, mean in (("map", 80), ("dbp", 60), ("hr", 70), ("tpp", 40)):
                group[key] = (mean + 5 * rng.standard_normal(rows)).astype(np.float32)


PARTS = {one.__name__: one for one in (
    machine, limits, published, parity, steps, exact, profile, pieces, end_to_end, ablation)}


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batch", type=int, help="default 256; 2 on CPU")
    parser.add_argument("--segments", type=int, help="of the file; default 50,000; 20 on CPU")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--parts", default=",".join(PARTS), help="default: all but ablation")
    parser.add_argument("--ablate-kernels", action="store_true", help="also time variants")
    parser.add_argument("--json", help="also write the results to this file")
    options = parser.parse_args()
    device = torch.device(options.device)
    toy = device.type == "cpu" and options.batch is None
    bench = Bench(device, options.batch or (2 if toy else 256), 2 if toy else 16,
                  1 if toy else options.repeats, options.segments or (20 if toy else 50000), {})
    started = time.perf_counter()
    for name in options.parts.split(","):
        if name == "ablation" and not options.ablate_kernels:
            continue
        print(f"--- {name} ({time.perf_counter() - started:.0f} s)", flush=True)
        try:
            bench.results[name] = PARTS[name](bench)
        except Exception as error:  # noqa: BLE001 - the other parts still count
            print(f"FAILED {name}: {type(error).__name__}: {error}")
            traceback.print_exc(limit=-4, file=sys.stdout)
            bench.results[name] = {"failed": repr(error)}
        if options.json:
            with open(options.json, "w") as file:
                json.dump(bench.results, file, indent=1)
    print(f"{time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()
