"""Fine-tune a network that learnt on virtual patients on a small file of others.

    python train_resnet.py                                      # once: the parent, runs/M1.5.pth
    python examples/fine_tune.py runs/M1.5.pth data/icu.h5      # your file, as prepare.py makes it
    python examples/fine_tune.py runs/M1.5.pth                  # none? a simulated other hospital

Three networks meet on the same test patients of the file: the parent as it is, the parent fine-
tuned on the file's train patients (at a tenth of the rate), and one trained on them from scratch.
"""
# ruff: noqa: F405 - names from training_header
import argparse
import os
import subprocess
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from metrics import confidence_intervals, scores
from tk_utils import print_table
from training_header import *  # noqa: F403

ROOT = sys.path[0]

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("checkpoint", help="of the parent")
parser.add_argument("data", nargs="?", default="data/other_hospital.h5",
                    help="an HDF5 file of the layout; default: data/other_hospital.h5, simulated")
parser.add_argument("--patients", type=int, default=60, help="of the simulated file; default 60")
parser.add_argument("--epochs", type=int, default=6, help="default 6")
parser.add_argument("--batch-size", type=int, default=16, help="segments; default 16")
options = parser.parse_args()


def run(script, *arguments):
    command = [sys.executable, os.path.join(ROOT, script), *map(str, arguments)]
    print("\n$ " + " ".join(["python", script, *map(str, arguments)]), flush=True)
    code = subprocess.run(command).returncode
    if code:
        sys.exit(code)


if not os.path.exists(options.data):
    run("simulate.py", "--out", options.data, "--patients", options.patients, "--segments", 4,
        "--seed", 77)
shared = ["--data", options.data, "--epochs", options.epochs, "--batch-size", options.batch_size]
run("train_resnet.py", *shared, "--name", "from_scratch")
run("train_resnet.py", *shared, "--name", "fine_tuned", "--init-from", options.checkpoint,
    "--lr", 1e-4)

test = split_index(create_dataset_index(path=options.data), split_seed=0)["test"]
rows = []
for name, path in (("parent as it is", options.checkpoint), ("fine-tuned", "runs/fine_tuned.pth"),
                   ("from scratch", "runs/from_scratch.pth")):
    model = load_model(path)
    dataset = TPP_PPG_dataset(test, "segment", model.keys)
    truth, predicted = dataset.column("tpp").numpy(), predict_dataset(model, dataset)
    found = scores(truth, predicted)
    intervals = confidence_intervals(test.segment_patients(), truth, predicted)
    rows.append([name] + ["{:.2f} ({:.2f} to {:.2f})".format(found[key], *intervals[key])
                          for key in ("rmse", "bias")])
print(f"\n{len(test)} segments of {test.n_patients} test patients of {options.data}, mmHg (95 %):")
print_table(rows, ["network", "RMSE", "bias"])
