"""anchor.py: pulse statistics, the ridge on them, and how much of it is kept."""
import numpy as np
import torch

import signals
from anchor import PULSE_STATISTICS, blend, find_pulse_feet, pulse_statistics, shown_share


def pulses(rates, heights):
    """[1, 1, 3600]: one beat for each rate (beats/min) and height in turn, from foot to foot."""
    beats = [height * np.sin(np.linspace(0, np.pi, max(2, round(3600 / rate)), endpoint=False)) ** 3
             for rate, height in zip(rates, heights)]
    return torch.from_numpy(np.concatenate(beats)[:3600]).float().view(1, 1, -1)


def test_pulse_statistics_say_how_much_beats_vary_in_rate_and_height():
    rng = np.random.default_rng(0)
    rates, heights = 75 + rng.normal(size=120), 1 + 0.01 * rng.normal(size=120)
    steady, more_rate, more_height = (
        dict(zip(PULSE_STATISTICS, pulse_statistics(pulses(*both))[0])) for both in (
            (rates, heights), (75 + 8 * rng.normal(size=120), heights),
            (rates, 1 + 0.15 * rng.normal(size=120))))
    assert more_rate["variation of rate"] > steady["variation of rate"] + 1
    assert more_height["variation of height"] > steady["variation of height"] + 1
    assert abs(more_height["variation of rate"] - steady["variation of rate"]) < 0.7
    # 16th to 84th percentile of 15 % normal variation: 0.3
    assert abs(more_height["variation of height"].exp() - 0.3) < 0.1


def test_pulse_statistics_ignore_the_scale_and_are_finite_for_a_flat_line():
    rng = np.random.default_rng(1)
    ppg = pulses(75 + 5 * rng.normal(size=120), 1 + 0.1 * rng.normal(size=120))
    assert torch.allclose(pulse_statistics(ppg), pulse_statistics(300 + 40 * ppg), atol=1e-2)
    for broken in (torch.zeros(2, 1, 3600), torch.arange(3600.0).view(1, 1, -1)):
        assert torch.isfinite(pulse_statistics(broken)).all()


def test_pulse_statistics_find_the_beats_that_signals_finds():
    rng = np.random.default_rng(2)
    ppg = pulses(80 + 6 * rng.normal(size=120), 1 + 0.1 * rng.normal(size=120))
    feet = find_pulse_feet((ppg[:, 0] - ppg.mean()) / ppg.std())[0]
    expected, _ = signals.find_feet(60 * ppg[0].double().numpy(), 60)
    feet = feet[feet >= 0].numpy()
    nearest = np.abs(feet[:, None] - expected[None]).min(1)
    assert len(feet) >= len(expected) - 2 and np.quantile(nearest, 0.9) < 1.5


def test_only_the_share_that_patients_show_is_kept():
    rng = np.random.default_rng(3)
    patients, added = np.repeat(np.arange(200), 5), rng.normal(size=1000)
    missing = 0.5 * added + 0.3 * rng.normal(size=1000)
    assert abs(shown_share(missing, added, patients) - 0.5) < 0.05
    assert shown_share(-missing, added, patients) == 0.0        # it would do harm
    assert shown_share(missing, 0 * added, patients) == 0.0     # nothing is added
    few = patients < 4                          # four patients of noise: nothing is shown
    assert shown_share(rng.normal(size=20), added[few], patients[few]) < 0.2


def test_a_blend_mixes_both_ridges_and_scales_the_network():
    pulse = {"intercept": 20.0, "coefficients": {"map": 2.0}, "sd": 3.0,
             "statistics": {"low": [0.0], "high": [1.0], "coefficients": [8.0]}}
    anchor = {"intercept": 10.0, "coefficients": {"map": 1.0}, "sd": 4.0}
    mixed = blend(anchor, anchor, pulse, 0.5, 0.25)
    assert mixed["sd"] == 1.0 and mixed["statistics"]["coefficients"] == [3.0]
    assert mixed["intercept"] == 13.75 and mixed["coefficients"]["map"] == 1.375
    assert blend(anchor, pulse, pulse, 0.0, 1.0)["coefficients"] == anchor["coefficients"]
