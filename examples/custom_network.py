"""Train, save, load, evaluate and export a network and a loss of your own.

    python simulate.py --out data/small.h5 --patients 120 --segments 4
    python examples/custom_network.py data/small.h5
    python examples/custom_network.py data/small.h5 my_record.hea   # also predicts a recording

The same from the command line, with resume, folds and seeds:

    python train_resnet.py --model examples/custom_network.py:TwoBlocks \
        --loss examples/custom_network.py:smooth_l1 --data data/small.h5 --name two_blocks
"""
import os
import sys

import torch
from torch import nn

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import predict
import report
import training_header as tpp
from evaluate import evaluate, make_calibration


class TwoBlocks(nn.Module):
    """ppg [B, 1, 3600] and vitals [B], all normalised -> [B, 1]."""

    def __init__(self, num_discrete=3):
        super().__init__()
        self.blocks = nn.Sequential(nn.Conv1d(1, 16, 15, 4), nn.ReLU(),
                                    nn.Conv1d(16, 32, 15, 4), nn.ReLU())
        self.head = nn.Linear(32 + num_discrete, 1)

    def forward(self, ppg, *vitals):
        pooled = self.blocks(ppg).mean(2)       # [B, 32]
        return self.head(torch.cat([pooled, torch.stack(vitals, 1)], 1))


def smooth_l1(prediction, label):
    return nn.functional.smooth_l1_loss(prediction, label, beta=5.0)


def main(data, recordings, path="runs/two_blocks.pth"):
    keys = ["ppg", "map", "dbp", "hr", "tpp"]
    parts = tpp.split_index(tpp.create_dataset_index(path=data))
    train, tune = (tpp.TPP_PPG_dataset(parts[name], "segment", keys) for name in ("train", "tune"))
    model = tpp.NormalisedModel(TwoBlocks(), keys, tpp.fit_normaliser(train, keys[1:]))
    model, _ = tpp.training_loop(model, tpp.make_loader(train, 16, shuffle=True),
                                 tpp.make_loader(tune, 16), total_epochs=10, lr=3e-3,
                                 criterion=smooth_l1, verbose=True)
    tpp.save_checkpoint(path, model, split=parts, calibration=make_calibration(model, tune))
    model = tpp.load_model(path, network=TwoBlocks)
    report.print_results(evaluate(model, parts["test"], train=parts["train"], tune=parts["tune"]))
    for recording in recordings:
        print(predict.predict_recording(model, recording)[["start_s", "tpp", "refused"]])
    predict.main([path, "--model", f"{__file__}:TwoBlocks", "--export", "two_blocks.onnx"])


if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1].startswith("-"):
        sys.exit(__doc__)
    main(sys.argv[1], sys.argv[2:])
