"""Four settings, several seeds, one table; the winner alone meets the test patients.

    python examples/sweep.py --data data/icu.h5                 # its other options go to every run
    python examples/sweep.py --seeds 3 --epochs 5               # on the default data

A run that is finished is not trained again: break it off and give the same command again.
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
    "a third of the rate": ["--lr", "3e-4"],
    "no L1": ["--l1", "0"],
    "PyTorch's initial weights": ["--init", "pytorch"],
}

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--seeds", type=int, default=2, help="runs of each setting; default 2")
parser.add_argument("--settings", type=int, default=len(SETTINGS), help="the first so many")
options, of_every_run = parser.parse_known_args()

rows, best = [], None
for number, (setting, arguments) in enumerate(list(SETTINGS.items())[:options.settings]):
    tune, names = [], []
    for seed in range(options.seeds):
        names.append(f"sweep_{number}_{seed}")
        command = ["train_resnet.py", *of_every_run, *arguments, "--name", names[-1],
                   "--seed", str(seed)]
        print("\n$ python " + " ".join(command), flush=True)
        command[0] = os.path.join(ROOT, command[0])
        code = subprocess.run([sys.executable, *command]).returncode
        if code:
            sys.exit(code)
        with open(f"runs/{names[-1]}_log.csv") as file:
            tune.append(min(float(row["tune_loss"]) for row in csv.DictReader(file)) ** 0.5)
    mean, sd = statistics.mean(tune), statistics.stdev(tune) if len(tune) > 1 else float("nan")
    rows.append([setting, " ".join(arguments), f"{mean:.2f} ± {sd:.2f}", options.seeds])
    if best is None or mean < best[0]:
        best = mean, setting, names

print("\nRMSE on the tune patients, mmHg, mean ± SD over seeds:")
print_table(rows, ["setting", "options", "RMSE", "seeds"])
test = []
for name in best[2]:
    with open(f"runs/{name}_metrics.json", encoding="utf-8") as file:
        test.append(json.load(file)["tpp"]["rmse"])
print(f"\nthe best, {best[1]!r}, on the test patients: RMSE {statistics.mean(test):.2f} mmHg "
      f"({', '.join(f'{rmse:.2f}' for rmse in test)}). The others were not looked at: choosing by "
      "the test patients would flatter the winner.")
