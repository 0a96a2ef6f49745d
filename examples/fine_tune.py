"""Fine-tune a network trained on virtual patients on a small file of other patients.

    python train_resnet.py                                      # first: the parent, runs/M1.5.pth
    python examples/fine_tune.py runs/M1.5.pth data/icu.h5      # your file, from prepare.py
    python examples/fine_tune.py runs/M1.5.pth                  # simulates a second set

Scores three networks on the same test patients of the file: the parent as it is, the parent
fine-tuned on the file's train patients at a tenth of the rate, and a network trained from scratch.
"""
import argparse
import os
import subprocess
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from evaluate import evaluate
from metrics import MIN_PATIENTS
from report import of_ci95, shown
from tk_utils import print_table
from training_header import create_dataset_index, split_index

ROOT = sys.path[0]

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("checkpoint", help="checkpoint of the parent")
parser.add_argument("data", nargs="?", default="data/other_patients.h5",
                    help="a prepared HDF5 file; default: data/other_patients.h5, simulated")
parser.add_argument("--patients", type=int, default=60, help="simulated patients; default 60")
parser.add_argument("--epochs", type=int, default=6, help="default 6")
options = parser.parse_args()


def run(script, *arguments):
    print("\n$ python " + " ".join(map(str, (script, *arguments))), flush=True)
    code = subprocess.run([sys.executable, os.path.join(ROOT, script),
                           *map(str, arguments)]).returncode
    if code:
        sys.exit(code)


if not os.path.exists(options.data):
    run("simulate.py", "--out", options.data, "--patients", options.patients, "--segments", 4,
        "--seed", 77)
shared = ("--data", options.data, "--epochs", options.epochs)
run("train_resnet.py", *shared, "--name", "from_scratch")
run("train_resnet.py", *shared, "--name", "fine_tuned", "--init-from", options.checkpoint,
    "--lr", 2e-4)

test, fitted, rows = split_index(create_dataset_index(path=options.data))["test"], {}, []
for name, path in (("parent as it is", options.checkpoint), ("fine-tuned", "runs/fine_tuned.pth"),
                   ("from scratch", "runs/from_scratch.pth")):
    found = evaluate(path, test, fitted=fitted)["tpp"]
    rows.append([name, *(shown(of_ci95(found, key)) for key in ("rmse", "bias"))])
print(f"\n{len(test)} segments of {test.n_patients} test patients of {options.data}, mmHg (95 %):")
if test.n_patients < MIN_PATIENTS:
    print(f"below {MIN_PATIENTS} test patients there are no intervals")
print_table(rows, ["network", "RMSE", "bias"])
