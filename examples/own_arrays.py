"""Train the network on your own arrays; needs no other file than `models.py`.

    mkdir try && cp models.py examples/own_arrays.py try/ && cd try
    python own_arrays.py                        # on made-up arrays
    python own_arrays.py --arrays mine.npz      # your arrays, saved with numpy.savez

mine.npz: ppg [N, 3600] (60 s at 60 Hz, any scale), vitals [N, V], target [N] (mmHg), patient [N].
"""
import argparse

import numpy as np
import torch

from models import get_spread_resnet  # or get_model_v3, the published network


def made_up(segments, rng):
    """Made-up arrays; the target depends on MAP and on the width of the pulse wave."""
    patient = np.arange(segments) // 4                          # four minutes per patient
    rate_hz, width = rng.uniform(1, 1.6, segments), rng.uniform(2, 8, segments)
    phase = 2 * np.pi * rate_hz[:, None] * np.arange(3600) / 60
    ppg = np.exp(width[:, None] * (np.cos(phase) - 1)) + 0.05 * rng.normal(size=phase.shape)
    vitals = np.stack([rng.normal(78, 11, segments), 60 * rate_hz], 1)      # MAP, heart rate
    target = 0.5 * vitals[:, 0] - 3 * width + rng.normal(0, 1, segments)
    return {"ppg": ppg, "vitals": vitals, "target": target, "patient": patient}


parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--arrays", metavar="FILE.npz", help="default: made-up arrays")
parser.add_argument("--segments", type=int, default=800, help="made-up segments; default 800")
parser.add_argument("--epochs", type=int, default=5, help="default 5")
options = parser.parse_args()
rng = np.random.default_rng(0)
torch.manual_seed(0)
data = np.load(options.arrays) if options.arrays else made_up(options.segments, rng)
data = {name: np.asarray(data[name]) for name in ("ppg", "vitals", "target", "patient")}

# Hold out whole patients: minutes of a patient on both sides would inflate the score.
patients = rng.permutation(np.unique(data["patient"]))
test = np.isin(data["patient"], patients[:len(patients) // 5])

# Normalise each PPG segment by its own mean and SD (monitors differ in scale), and vitals and
# target by those of the train patients.
ppg = data["ppg"] - data["ppg"].mean(1, keepdims=True)
ppg = torch.tensor(ppg / ppg.std(1, keepdims=True), dtype=torch.float32).unsqueeze(1)
vitals, target = (torch.tensor((values - values[~test].mean(0)) / values[~test].std(0),
                               dtype=torch.float32) for values in (data["vitals"], data["target"]))
mean, sd = data["target"][~test].mean(), data["target"][~test].std()

model = get_spread_resnet(num_discrete=vitals.shape[1])
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
steps = options.epochs * -(-int((~test).sum()) // 16)
schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, steps, cycle_momentum=False)
for epoch in range(options.epochs):
    model.train()
    for rows in torch.from_numpy(rng.permutation(np.flatnonzero(~test))).split(16):
        optimizer.zero_grad()
        predicted = model(ppg[rows], *vitals[rows].T)[:, 0]     # [B, 1, 3600], V x [B] -> [B, 1]
        torch.nn.functional.mse_loss(predicted, target[rows]).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    model.eval()
    with torch.no_grad():
        predicted = torch.cat([model(ppg[rows], *vitals[rows].T)[:, 0] for rows in
                               torch.from_numpy(np.flatnonzero(test)).split(64)])
    error = predicted.numpy() * sd + mean - data["target"][test]
    print(f"epoch {epoch + 1}: RMSE {np.sqrt(np.mean(error ** 2)):.2f} mmHg on {test.sum()} "
          "held-out segments", flush=True)
always_mean = np.sqrt(np.mean((data["target"][test] - mean) ** 2))
print(f"always predicting the mean of the train patients: RMSE {always_mean:.2f} mmHg")
torch.save(model.state_dict(), "own_arrays.pth")
