"""A network of your own through the options of `get_model_v3`, beside the published one.

    python simulate.py --out data/small.h5 --patients 120 --segments 4
    python examples/custom_network.py data/small.h5

Options of get_model_v3: widths, kernel_sizes, strides, dropout, num_outputs (models.MyFirstResNet).
"""
# ruff: noqa: F405 - names from training_header
import argparse
import os
import sys
import time

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from metrics import scores
from tk_utils import print_table
from training_header import *  # noqa: F403

KEYS = ["ppg", "map", "dbp", "hr", "tpp"]
NETWORKS = {
    "published": {},
    "narrow": {"widths": (32, 32, 64, 64, 128)},
    "short": {"widths": (64, 64, 128, 256), "strides": (4, 8, 8), "dropout": 0.1},
    "wide kernels first": {"widths": (32, 32, 64, 128), "kernel_sizes": (31, 31, 15, 9)},
}

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("data", help="an HDF5 file of the layout")
parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS),
                    help="default: all")
parser.add_argument("--epochs", type=int, default=8, help="default 8")
parser.add_argument("--batch-size", type=int, default=16, help="segments; default 16")
options = parser.parse_args()

parts = split_index(create_dataset_index(path=options.data), split_seed=0)
data = {name: TPP_PPG_dataset(part, "segment", KEYS) for name, part in parts.items()}
normaliser = fit_normaliser(data["train"], KEYS[1:])        # of the train patients alone
rows = []
for name in options.networks:
    reset_all_seeds(0)
    network = init_steady(get_model_v3(len(KEYS) - 2, **NETWORKS[name]))
    model = NormalisedModel(network, KEYS, normaliser)      # raw units in, mmHg out
    started = time.time()
    model, _ = training_loop(
        model, make_loader(data["train"], options.batch_size, shuffle=True),
        make_loader(data["tune"], options.batch_size), total_epochs=options.epochs, lr=1e-3,
        weight_decay=0.1, l1_reg=1e-4, scheduler_and_args=[StepLR, {"step_size": 6, "gamma": 0.2}])
    minutes = (time.time() - started) / 60
    # Compared on the tune patients: choosing by the test patients would flatter the choice.
    found = scores(data["tune"].column("tpp").numpy(), predict_dataset(model, data["tune"]))
    samples, _ = receptive_field(network)
    rows.append([name, sum(p.numel() for p in network.parameters()), f"{samples / FS:.1f}",
                 f"{minutes:.1f}", found["rmse"], found["r2"]])
print_table(rows, ["network", "weights", "sees, s", "min", "RMSE on tune, mmHg", "R2"])
