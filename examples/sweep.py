"""Compare settings over several seeds; score only the best setting on the test patients.

    python examples/sweep.py --data data/icu.h5                 # other options go to every run
    python examples/sweep.py --seeds 3 --epochs 5               # on the default data

Finished runs are not trained again: after an interruption, repeat the command.
"""
import argparse
import csv
import json
import os
import statistics
import subprocess
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from tk_utils import print_table

ROOT = sys.path[0]

SETTINGS = {
    "recipe": [],
    "a third of the rate": ["--lr", "7e-4"],
    "no weight decay": ["--weight-decay", "0"],
    "published network": ["--model", "resnet_v3"],
}

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--seeds", type=int, default=2, help="runs of each setting; default 2")
parser.add_argument("--settings", type=int, default=len(SETTINGS), help="how many; default all")
options, of_every_run = parser.parse_known_args()

rows, best = [], None
for number, (setting, arguments) in enumerate(list(SETTINGS.items())[:options.settings]):
    command = ["train_resnet.py", *of_every_run, *arguments, "--name", f"sweep{number}",
               "--seeds", str(options.seeds)]
    print("\n$ python " + " ".join(command), flush=True)
    code = subprocess.run([sys.executable, os.path.join(ROOT, command[0]), *command[1:]]).returncode
    if code:
        sys.exit(code)
    runs = [f"runs/sweep{number}_seed{seed}" for seed in range(options.seeds)]
    tune = []
    for run in runs:
        with open(f"{run}/log.csv") as file:
            tune.append(min(float(row["tune_loss"]) for row in csv.DictReader(file)) ** 0.5)
    mean = statistics.mean(tune)
    rows.append([setting, " ".join(arguments), f"{mean:.2f} ± {statistics.stdev(tune):.2f}"])
    if best is None or mean < best[0]:
        best = mean, setting, runs

print("\nRMSE on the tune patients, mmHg, mean ± SD over the seeds:")
print_table(rows, ["setting", "options", "RMSE"])
test = []
for run in best[2]:
    with open(f"{run}/metrics.json", encoding="utf-8") as file:
        test.append(json.load(file)["tpp"]["rmse"])
print(f"\nthe best, {best[1]!r}, on the test patients: RMSE {statistics.mean(test):.2f} mmHg "
      f"({', '.join(f'{rmse:.2f}' for rmse in test)}). The other settings were not scored "
      "on them: choosing by the test patients would bias the result.")
