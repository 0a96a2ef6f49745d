"""The train step and inference: ours against the published style, and against the machine's limit.

    python benchmarks/train_step.py [--batch 32] [--repeats 5] [--no-compile]

Each candidate lives in a process of its own (the cure of freed memory acts on a whole process) and
they take turns. The limit is the rate of a large float32 matrix product in the same run; the
network's cost is 0.508 GFLOP forward and three times that for a step, by the direct convolutions
(ours does some of them by FFT, with fewer). bf16 is `--amp bf16`: other numbers, not to compare.
"""
import argparse
import multiprocessing
import time

from common import alternate, print_machine

from tk_utils import print_table

GFLOP_FORWARD = 0.508
CANDIDATES = ("published", "published, memory kept", "ours", "ours, bf16", "ours, compiled")


def candidate(name, batch, pipe):
    import torch
    from published_style import PlainResNet

    from models import get_model_v3
    from training_header import compile_or_not, keep_freed_memory
    torch.manual_seed(0)
    model = PlainResNet(3) if name.startswith("published") else get_model_v3(3)
    if name != "published":
        keep_freed_memory()
    ppg, vitals = torch.randn(batch, 1, 3600), [torch.randn(batch) for _ in range(3)]
    label = torch.randn(batch, 1)
    forward = compile_or_not(model) if name.endswith("compiled") else model
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)

    def predict():
        with torch.autocast("cpu", torch.bfloat16, enabled=name.endswith("bf16")):
            return forward(ppg, *vitals).float()

    def train():
        optimizer.zero_grad()
        ((predict() - label) ** 2).mean().backward()
        optimizer.step()

    def infer():
        with torch.no_grad():
            predict()

    for what in iter(pipe.recv, None):
        model.train(what == "train")
        run = {"train": train, "infer": infer}[what]
        run()
        started = time.perf_counter()
        for _ in range(3):
            run()
        pipe.send((time.perf_counter() - started) / 3 / batch)


def matrix_product():
    import torch
    a, b = torch.randn(2048, 2048), torch.randn(2048, 2048)
    a @ b
    started = time.perf_counter()
    for _ in range(5):
        a @ b
    return (time.perf_counter() - started) / 5


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--no-compile", action="store_true")
    options = parser.parse_args()
    print_machine()
    context = multiprocessing.get_context("spawn")
    pipes = {}
    for name in CANDIDATES[:4 if options.no_compile else 5]:
        pipes[name], theirs = context.Pipe()
        context.Process(target=candidate, args=(name, options.batch, theirs), daemon=True).start()

    def ask(name, what):
        pipes[name].send(what)
        return pipes[name].recv()

    runs = {(name, what): lambda name=name, what=what: ask(name, what)
            for what in ("train", "infer") for name in pipes}
    seconds = alternate({**runs, "product": matrix_product}, options.repeats)
    limit = 2 * 2.048 ** 3 / seconds["product"]
    print(f"matrix product: {limit:.0f} GFLOP/s; batch {options.batch}")
    rows = []
    for name in pipes:
        train, infer = seconds[name, "train"], seconds[name, "infer"]
        rows.append([name, f"{1 / train:.1f}", seconds["published", "train"] / train,
                     f"{3 * GFLOP_FORWARD / train / limit:.0%}", f"{1 / infer:.1f}",
                     seconds["published", "infer"] / infer,
                     f"{GFLOP_FORWARD / infer / limit:.0%}"])
    print_table(rows, ["", "train, segments/s", "ratio", "of the limit", "inference, segments/s",
                       "ratio", "of the limit"])
    for pipe in pipes.values():
        pipe.send(None)


if __name__ == "__main__":
    main()
