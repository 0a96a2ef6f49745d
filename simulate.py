"""Virtual patients with a known closing pressure: waveforms, labels and truth in the HDF5 layout.

    python simulate.py --out data/simulated.h5 --patients 400 --segments 12 --seed 1 --workers 2

The left ventricle ejects into a three-element Windkessel that empties towards Pcrit. The radial
line shows the arterial pressure, which labels.py labels exactly as in a recording. The blood
volume of the finger follows the pressure through a sigmoid curve and becomes the PPG. The true
Pcrit is stored as `p_crit_true`. These are not real patients: a network that does well on them has
learnt the physics of this model. Needs labels.py, signals.py, datasets.py, tk_utils.py.
"""
import os
import sys
from collections import namedtuple
from dataclasses import dataclass
from functools import partial
from typing import Callable, Dict, Optional, Tuple

import numpy as np
from scipy.signal import butter, lfilter, lfiltic, resample_poly, sosfilt
from scipy.special import expit

import datasets
import labels
import signals
import tk_utils

FS_SIM = 240            # Hz: resolves ejection and line resonance; 4 times the layout's 60
LEAD_SECONDS = 10       # before each segment: the Windkessel (tau < 2 s) forgets its first state
TAIL_SECONDS = 1        # after it, cut off with the edge of the resampling filter

# Distributions between patients; Normal is clipped at low and high.
Normal = namedtuple("Normal", "mean sd low high", defaults=(-np.inf, np.inf))
Uniform = namedtuple("Uniform", "low high")


@dataclass(frozen=True)
class Settings:
    """The parameters of the patients and their distributions.

    R and Pcrit: Maas et al. 2012. C, Zc and the ejection time: textbook ranges. Pulse-pressure
    variation: PMC4240833. Values without a source were chosen so that the segments that pass the
    gate roughly match the cohort of Chandrasekhar et al. 2023 (means of MAP, SBP, DBP, PP, HR and
    Pcrit 76.7, 118, 56, 62.5, 77 and 40.5; SD 11, 20, 10, 19, 17 and 16), and so that the published
    label errs in Pcrit as in other simulators (bias 3 to 5, SD 5 mmHg; here 2 to 3 and 5)."""
    # Circulation. MAP is regulated: R (mmHg s/mL) follows from (MAP - Pcrit) / flow, in its limits.
    map: Normal = Normal(77.5, 9.0)                         # mmHg
    p_crit: Normal = Normal(37.5, 13.5)                     # mmHg
    p_crit_map_correlation: float = 0.5
    p_crit_limits: tuple = (5.0, 85.0)
    resistance_limits: tuple = (0.12, 1.3)                  # 0.50 +- 0.27
    heart_rate: Normal = Normal(77.0, 16.0, 40.0, 150.0)    # beats/min
    heart_rate_limits: tuple = (35.0, 165.0)
    stroke_volume: Normal = Normal(68.0, 16.0, 30.0, 110.0)  # mL
    compliance: Normal = Normal(1.12, 0.26, 0.7, 2.0)       # mL/mmHg
    impedance: Normal = Normal(0.06, 0.006, 0.04, 0.075)    # Zc, mmHg s/mL
    ejection_s: Normal = Normal(0.282, 0.018, 0.23, 0.34)   # at 77 beats/min
    ejection_s_per_bpm: float = -0.0017                     # Weissler 1968
    backflow: Uniform = Uniform(0.0, 0.04)                  # of the stroke volume, at valve closure
    reflection: Uniform = Uniform(0.3, 0.8)                 # of the forward wave Zc Q
    reflection_delay_s: Uniform = Uniform(0.08, 0.2)
    # Drift from segment to segment: SD within a patient, of a first-order process.
    drift_memory: float = 0.9                               # share of its value that it keeps
    map_drift: float = 4.5                                  # mmHg
    p_crit_drift: float = 5.0                               # mmHg
    heart_rate_drift: float = 0.06                          # this and the next two: shares
    stroke_volume_drift: float = 0.08
    compliance_drift: float = 0.05
    # From beat to beat: amplitudes (`random_`: SD) as shares of stroke volume and beat interval.
    # A pulse-pressure variation of 4-17 % is a respiratory amplitude of 2-8.5 %.
    slow_hz: Uniform = Uniform(0.01, 0.05)
    slow_stroke_volume: Uniform = Uniform(0.0, 0.08)
    slow_interval: Uniform = Uniform(0.0, 0.012)
    respiration_hz: Uniform = Uniform(0.17, 0.35)
    respiratory_stroke_volume: Uniform = Uniform(0.02, 0.085)
    respiratory_interval: Uniform = Uniform(0.001, 0.012)
    random_stroke_volume: Uniform = Uniform(0.005, 0.04)
    random_interval: Uniform = Uniform(0.002, 0.006)
    filling_tau_s: float = 0.22                             # of diastolic filling
    thoracic_mmhg: Uniform = Uniform(0.0, 0.4)              # the breath's own pressure swing
    vasomotion_mmhg: Uniform = Uniform(0.1, 0.7)            # SD of Pcrit's course within a minute
    windkessel: Optional[Callable] = None                   # replaces the function `windkessel`
    fibrillation_share: float = 0.04                        # of the patients
    fibrillation_interval_sd: float = 0.18
    ectopic_share: float = 0.1                              # of the patients
    ectopic_beats: Uniform = Uniform(0.005, 0.05)           # share of their beats
    # Radial line: second-order resonance, noise, faults.
    line_hz: Uniform = Uniform(5.0, 9.0)
    line_damping: Uniform = Uniform(0.25, 0.6)
    abp_noise_mmhg: Uniform = Uniform(0.1, 0.5)             # SD
    flush_share: float = 0.02                               # of the segments
    damped_share: float = 0.02                              # of the segments
    damped_line_damping: Uniform = Uniform(1.5, 3.0)
    # Finger: blood volume = sigmoid((pressure - contact pressure) / width), low-passed.
    contact_mmhg: Normal = Normal(42.0, 7.0, 15.0, 75.0)
    vessel_width_mmhg: Normal = Normal(55.0, 8.0, 30.0, 80.0)
    finger_hz: Uniform = Uniform(5.0, 8.0)
    # Monitor. Shares are of the height of the pulse, except where they count segments or patients.
    ppg_delay_s: Uniform = Uniform(0.06, 0.34)              # behind the ABP, in real monitors
    late_monitor_share: float = 0.15                        # of patients, whose monitor is late ...
    late_monitor_delay_s: Uniform = Uniform(0.95, 1.1)      # ... by so much, as one vendor's are
    ppg_scales: tuple = (1.0, 1.0, 4.0, 100.0)              # top of the monitor's scale
    ppg_gain: Uniform = Uniform(0.15, 0.6)                  # height of the pulse, of the scale
    ppg_level: Uniform = Uniform(0.4, 0.6)                  # DC level, of the scale
    venous_share: Uniform = Uniform(0.0, 0.015)             # respiratory wave
    wander_share: Uniform = Uniform(0.0, 0.015)             # slow baseline; more in real signals
    ppg_noise_share: Uniform = Uniform(0.001, 0.006)
    motion_share: float = 0.05                              # of the segments


DEFAULT = Settings()


def simulate_patient(seed: int, patient_number: int, n_segments: int, keep_abp: bool = False,
                     settings=DEFAULT, label_method="published") -> Dict[str, np.ndarray]:
    """One patient's encounter as the layout's fields: dict of arrays with `n_segments` rows; `ppg`
    (and `abp` if kept) is [n_segments, 3600] float32. A pure function of its arguments."""
    rng = np.random.default_rng([seed, patient_number])
    patient = draw_patient(rng, settings)
    states = drift(rng, patient, n_segments, settings)
    present = [{**patient, **dict(zip(states, values))} for values in zip(*states.values())]
    waves = np.array([simulate_segment(rng, p, settings) for p in present], dtype=np.float32)
    abp, ppg = waves.transpose(1, 0, 2)                     # each [n_segments, 3600]
    gap_s = np.where(rng.random(n_segments) < 0.03, 60.0 * rng.integers(1, 60, n_segments), 0.0)
    label = labels.label_segments(abp, datasets.FS, label_method)
    quality = signals.signal_quality(abp, ppg, datasets.FS)
    return {**label, **quality, "reason": label["reason"] | quality["reason"], "ppg": ppg,
            "p_crit_true": states["p_crit"].astype(np.float32),
            "start_s": datasets.SEGMENT_SECONDS * np.arange(n_segments) + np.cumsum(gap_s),
            "ppg_delay_s": np.full(n_segments, patient["ppg_delay_s"], dtype=np.float32),
            **({"abp": abp} if keep_abp else {})}


def draw(rng: np.random.Generator, distribution) -> float:
    if isinstance(distribution, Uniform):
        return float(rng.uniform(*distribution))
    mean, sd, low, high = distribution
    return float(np.clip(rng.normal(mean, sd), low, high))


def draw_patient(rng: np.random.Generator, s: Settings) -> Dict[str, float]:
    """The constants of an encounter and the means of what drifts: dict of floats."""
    patient = {name: draw(rng, value) for name, value in vars(s).items()
               if isinstance(value, (Normal, Uniform))}
    map_z = (patient["map"] - s.map.mean) / s.map.sd
    own_z = (patient["p_crit"] - s.p_crit.mean) / s.p_crit.sd
    r = s.p_crit_map_correlation
    patient["p_crit"] = s.p_crit.mean + s.p_crit.sd * (r * map_z + np.sqrt(1 - r ** 2) * own_z)
    rhythm = rng.random()
    patient["fibrillation"] = rhythm < s.fibrillation_share
    if not s.fibrillation_share <= rhythm < s.fibrillation_share + s.ectopic_share:
        patient["ectopic_beats"] = 0.0
    if rng.random() < s.late_monitor_share:
        patient["ppg_delay_s"] = patient["late_monitor_delay_s"]
    patient["ppg_delay_s"] = round(patient["ppg_delay_s"] * FS_SIM) / FS_SIM
    patient["ppg_scale"] = float(rng.choice(s.ppg_scales))
    patient["thoracic_phase"] = rng.uniform(0.0, 2 * np.pi)
    return patient


def drift(rng: np.random.Generator, patient: dict, n: int, s: Settings) -> Dict[str, np.ndarray]:
    """The states that drift from segment to segment: dict of (n,) arrays."""
    def course(sd):                              # first-order autoregression of stationary SD
        steps = rng.normal(size=n) * np.sqrt(1 - s.drift_memory ** 2)
        steps[:1] = rng.normal(size=1)
        return sd * lfilter([1.0], [1.0, -s.drift_memory], steps)

    heart_rate = patient["heart_rate"] * np.exp(course(s.heart_rate_drift))
    heart_rate = np.clip(heart_rate, *s.heart_rate_limits)
    stroke_volume = patient["stroke_volume"] * np.exp(course(s.stroke_volume_drift))
    p_crit = np.clip(patient["p_crit"] + course(s.p_crit_drift), *s.p_crit_limits)
    mean_pressure = patient["map"] + course(s.map_drift)
    flow = stroke_volume * heart_rate / 60.0
    # the mean flow passes Zc too: MAP = Pcrit + (R + Zc (1 + reflection)) flow
    series = patient["impedance"] * (1 + patient["reflection"])
    resistance = np.clip((mean_pressure - p_crit) / flow - series, *s.resistance_limits)
    compliance = patient["compliance"] * np.exp(course(s.compliance_drift))
    return {"heart_rate": heart_rate, "stroke_volume": stroke_volume, "p_crit": p_crit,
            "resistance": resistance, "compliance": compliance}


def simulate_segment(rng: np.random.Generator, p: dict, s: Settings,
                     segment_seconds=datasets.SEGMENT_SECONDS) -> Tuple[np.ndarray, np.ndarray]:
    """(abp in mmHg, ppg in the monitor's unit), [3600] each, for the patient's present state `p`
    (the floats of `draw_patient` and `drift`)."""
    t = np.arange((LEAD_SECONDS + segment_seconds + TAIL_SECONDS) * FS_SIM) / FS_SIM
    breath = 2 * np.pi * (p["respiration_hz"] * t + rng.random())
    flow = ventricle(rng, t, breath, p, s)
    closing = p["p_crit"] + p["vasomotion_mmhg"] * slow_wander(rng, t)
    delayed = np.roll(flow, int(round(p["reflection_delay_s"] * FS_SIM)))   # wraps into the lead
    reflected = sosfilt(butter(1, 5.0, fs=FS_SIM, output="sos"), delayed)
    pressure = ((s.windkessel or windkessel)(flow, closing, p)
                + p["impedance"] * (flow + p["reflection"] * reflected))
    pressure += p["thoracic_mmhg"] * np.sin(breath + p["thoracic_phase"])
    abp = to_layout(radial_line(rng, pressure, p, s), 0.0)
    abp += rng.normal(size=abp.shape) * p["abp_noise_mmhg"]
    return abp, to_layout(monitor(rng, pressure, breath, p, s), p["ppg_delay_s"])


def ventricle(rng, t, breath, p, s):
    """Aortic flow in mL/s at the times `t` (s) with beats of variable rhythm and stroke volume;
    `breath` is the phase of breathing at these times."""
    mean_interval = 60.0 / p["heart_rate"]
    n = int(t[-1] / mean_interval * 1.5) + 20
    nominal = np.arange(n) * mean_interval
    breathing = np.interp(nominal, t, breath)
    slow_hz = rng.uniform(*s.slow_hz, size=2)
    slow_wave = np.sin(2 * np.pi * (slow_hz[:, None] * nominal + rng.random((2, 1)))).sum(0)
    if p["fibrillation"]:
        interval = 1 + s.fibrillation_interval_sd * rng.normal(size=n)
    else:
        slow_rate = np.sin(2 * np.pi * (slow_hz.mean() * nominal + rng.random()))
        interval = (1 + p["slow_interval"] * slow_rate
                    + p["respiratory_interval"] * np.sin(breathing + 1.0)
                    + p["random_interval"] * rng.normal(size=n))
        early = np.flatnonzero(rng.random(n - 1) < p["ectopic_beats"])
        interval[early] = rng.uniform(0.55, 0.75, size=len(early))
        interval[early + 1] = 2 - interval[early]          # the compensatory pause
    interval = mean_interval * np.clip(interval, 0.5, 1.8)
    start = np.cumsum(interval) - interval[0]              # interval[k] lies before beat k
    filling, usual = (1 - np.exp(-before / s.filling_tau_s) for before in (interval, mean_interval))
    stroke = p["stroke_volume"] * filling / usual * np.clip(
        1 + p["slow_stroke_volume"] * (slow_wave / 2 ** 0.5)
        + p["respiratory_stroke_volume"] * np.sin(breathing)
        + p["random_stroke_volume"] * rng.normal(size=n), 0.2, 1.8)
    faster = 60.0 / interval - 77.0                         # beats/min
    ejection = np.clip(p["ejection_s"] + s.ejection_s_per_bpm * faster, 0.18, 0.36)
    beat = np.searchsorted(start, t, side="right") - 1
    phase = (t - start[beat]) / ejection[beat]
    x = np.minimum(phase, 1.0)      # x (1 - x)^1.5 rises fast, falls slowly; integral 0.1142857
    out = x * (1 - x) ** 1.5 / 0.1142857
    closing = (phase - 1) / 0.12                           # the valve closes in an eighth of it
    back = np.where(closing < 1, np.sin(np.pi * np.clip(closing, 0, 1)), 0.0) * (np.pi / 2 / 0.12)
    return (stroke / ejection)[beat] * ((1 + p["backflow"]) * out - p["backflow"] * back)


def slow_wander(rng, t):
    """A smooth random course of mean about 0 and SD about 1 at the times `t`, 0.01-0.1 Hz."""
    hz = rng.uniform(0.01, 0.1, size=(3, 1))
    coarse = np.linspace(t[0], t[-1], 300)                 # 4 points a second are ample
    wave = np.sin(2 * np.pi * (hz * coarse + rng.random((3, 1)))).sum(0)
    return np.interp(t, coarse, (2 / 3) ** 0.5 * wave)


def windkessel(flow, p_crit, p):
    """Pressure (mmHg) behind Zc: C dP/dt = Q - (P - Pcrit) / R by the trapezoidal rule, which is a
    recursive filter. flow (mL/s) and p_crit (mmHg): [samples] at FS_SIM."""
    a = 1.0 / (2 * FS_SIM * p["resistance"] * p["compliance"])
    gain = 1.0 / (2 * FS_SIM * p["compliance"] * (1 + a))
    numerator, denominator = [gain, gain], [1.0, -(1 - a) / (1 + a)]
    inflow = flow + p_crit / p["resistance"]
    begin = lfiltic(numerator, denominator, [p["resistance"] * inflow.mean()])
    return lfilter(numerator, denominator, inflow, zi=begin)[0]


def radial_line(rng, pressure, p, s):
    """The transducer's signal: resonance of catheter and tubing, and occasional faults."""
    damping = p["line_damping"]
    if rng.random() < s.damped_share:
        damping = draw(rng, s.damped_line_damping)
    if rng.random() < s.flush_share:
        at = int(rng.uniform(LEAD_SECONDS, LEAD_SECONDS + datasets.SEGMENT_SECONDS) * FS_SIM)
        pressure = pressure.copy()
        pressure[at:at + int(rng.uniform(1, 8) * FS_SIM)] = 300.0     # the bag's pressure
    w, w0 = 2 * FS_SIM, 2 * np.pi * p["line_hz"]           # bilinear transform
    gain = w0 ** 2
    a0 = w * w + 2 * damping * w0 * w + gain
    denominator = [1.0, (2 * gain - 2 * w * w) / a0, (w * w - 2 * damping * w0 * w + gain) / a0]
    level = pressure[0]
    return level + lfilter([gain / a0, 2 * gain / a0, gain / a0], denominator, pressure - level)


def monitor(rng, pressure, breath, p, s):
    """The PPG on the monitor's scale, with wander, noise and motion. The blood volume of the finger
    is a sigmoid of transmural pressure, steepest at zero."""
    low_pass = butter(1, p["finger_hz"], fs=FS_SIM, output="sos")
    at_finger = pressure[0] + sosfilt(low_pass, pressure - pressure[0])
    volume = expit((at_finger - p["contact_mmhg"]) / p["vessel_width_mmhg"])
    volume = volume[0] + sosfilt(low_pass, volume - volume[0])
    t = np.arange(len(volume)) / FS_SIM
    low, high = np.percentile(volume, [5, 95])
    pulse = (volume - np.median(volume)) / (high - low)
    pulse += p["wander_share"] * slow_wander(rng, t) + p["venous_share"] * np.sin(breath + 2.0)
    # twice the SD: resampling from 240 to 60 Hz keeps a quarter of the noise's power
    pulse += p["ppg_noise_share"] * rng.normal(size=len(t)) * 2
    if rng.random() < s.motion_share:
        begin = rng.uniform(LEAD_SECONDS, LEAD_SECONDS + datasets.SEGMENT_SECONDS)
        inside = (t > begin) & (t < begin + rng.uniform(2, 10))
        shake = sosfilt(butter(2, [0.3, 4.0], "bandpass", fs=FS_SIM, output="sos"),
                        rng.normal(size=len(t)))
        pulse += inside * shake / shake.std() * rng.uniform(0.2, 1.5)
    return np.clip(p["ppg_scale"] * (p["ppg_level"] + p["ppg_gain"] * pulse), 0.0, p["ppg_scale"])


def to_layout(signal, delay_s):
    """The segment's samples at 60 Hz of a signal with lead and tail, delayed by `delay_s`."""
    step, margin = FS_SIM // datasets.FS, 10               # margin: the filter's half length
    samples = (len(signal) - (LEAD_SECONDS + TAIL_SECONDS) * FS_SIM) // step
    begin = int(round((LEAD_SECONDS - delay_s) * FS_SIM)) - margin * step
    piece = signal[begin:begin + (samples + 2 * margin) * step]
    return piece[0] + resample_poly(piece - piece[0], 1, step)[margin:margin + samples]


def simulate_file(out, patients: int, segments: int, seed: int, workers: int = 1,
                  label_method: str = "published") -> None:
    """Write `patients` virtual patients of `segments` minutes each to `out`, atomically. Raises
    OSError when the file cannot be written."""
    simulate = partial(simulate_patient, seed, n_segments=segments, label_method=label_method)
    with tk_utils.atomic_path(out) as temporary, datasets.LayoutWriter(
            temporary, origin="simulated", label_method=label_method, beats=labels.BEATS,
            reasons=signals.REASONS, simulation_seed=seed) as writer:
        done = tk_utils.in_processes(simulate, range(patients), workers)
        for number, fields in tk_utils.progress(done, total=patients, desc="simulating"):
            if isinstance(fields, tk_utils.ProcessDied):
                raise OSError(f"patient {number}: {fields}; try fewer --workers")
            writer.write(f"sim{seed}-{number:06d}", "1", fields)    # differs between seeds


def main(arguments=None):
    parser = tk_utils.ScriptParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--out", metavar="FILE", required=True, help="HDF5 file to write")
    add("--patients", type=int, default=400, metavar="N", help="default 400")
    add("--segments", type=int, default=12, metavar="N", help="minutes per patient; default 12")
    add("--seed", type=int, default=0, metavar="N", help="other seeds, other patients; default 0")
    add("--workers", type=int, default=os.cpu_count() or 1, metavar="N",
        help="processes; default: one per core; the file does not depend on it")
    add("--label-method", choices=tuple(labels.METHODS), default="published",
        help="how Pcrit is estimated (docs/labels.md); default published")
    args = parser.parse_args(arguments)
    for name, least in (("patients", 1), ("segments", 1), ("workers", 1), ("seed", 0)):
        if getattr(args, name) < least:
            parser.error(f"--{name} must be at least {least}")
    if os.path.lexists(args.out) and datasets.origin_of([args.out]) != "simulated":
        raise datasets.DataError(f"{args.out}: not written by simulate.py; give another --out")
    simulate_file(**vars(args))
    print(f"{args.out}: {args.patients} virtual patients of {args.segments} min (simulated)")
    tk_utils.print_table(datasets.gate_report(args.out), ["gate", "break it", "left"])


if __name__ == "__main__":
    sys.exit(tk_utils.run_script(main, datasets.DataError))
