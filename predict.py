"""A checkpoint and a new recording -> TPP minute by minute, with its interval and its quality.

    python predict.py runs/M1.5.pth RECORDING --out tpp.csv --figure tpp.png
    python predict.py runs/M1.5.pth RECORDING --map 75 --dbp 55         # no arterial line
    python predict.py runs/M1.5.pth RECORDING --vitals cuff.csv         # time_s,map,dbp
    python predict.py runs/M1.5.pth growing.csv --watch --out live.csv  # or a folder, until Ctrl-C
    python predict.py runs/M1.5.pth --export model.onnx                 # for other programs

Each vital that the checkpoint needs comes, minute by minute, from the first of these that has it:
an option, the CSV of --vitals, the recording's numbers, its arterial pressure, and the heart rate
from the PPG itself. Where there is arterial pressure, the label is put beside the prediction.
"""
import argparse
import csv
import math
import os
import signal
import sys
import threading
from dataclasses import dataclass, replace

import numpy as np

import recordings
import tk_utils
from recordings import RecordingError

FS, SEGMENT_SECONDS, SEGMENT_SAMPLES = 60, 60, 3600     # of the network's input
BLOCK_MINUTES = 20              # read and predicted at a time: what bounds the memory
BATCH = 32
WAVEFORMS = ("ppg", "abp")
VITALS = {"map": "mmHg", "sbp": "mmHg", "dbp": "mmHg", "pp": "mmHg", "hr": "beats/min"}
NUMBERS = ("map", "sbp", "dbp", "hr")       # that monitors give; pp is their difference
HIGHEST = 400                   # mmHg or beats/min; above lies a slip of the keyboard
EXPORT_LEVEL = 0.9
EXPORT_TOLERANCE = 1e-3         # mmHg
EXPORT_OPSET = 17               # the highest that PyTorch 2.0 writes
PRIVATE_LINE = "# private: contains true file names; do not share"
NO_CALIBRATION = ("no intervals and no flag for unusual inputs: this checkpoint was saved without "
                  "a calibration (train it again)")


class PredictError(ValueError):
    """What was asked for cannot be done; the message is one line."""


def parse_arguments(arguments=None):
    parser = argparse.ArgumentParser(allow_abbrev=False, description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("checkpoint", help="runs/<name>.pth, as train_resnet.py writes it")
    add("recording", nargs="?", metavar="RECORDING",
        help="a file of any format that prepare.py reads; with --watch also a folder")
    add("--out", metavar="CSV", help="write a row for each minute (default: print a table)")
    add("--figure", metavar="PNG", help="draw TPP with its band, and MAP and HR under it")
    add("--device", help="cpu, cuda, ... (default: CUDA where present)")
    group = parser.add_argument_group("vitals")
    for key, unit in VITALS.items():
        group.add_argument(f"--{key}", type=float, metavar=unit.split("/")[0].upper(),
                           help=f"{key.upper()} of all minutes, {unit}")
    group.add_argument("--vitals", metavar="CSV", help="readings: time_s (from the recording's "
                       "start) and any of map, sbp, dbp, pp, hr; interpolated")
    group.add_argument("--max-age", type=float, default=30, metavar="MIN",
                       help="how long a reading holds, minutes (default: 30)")
    group = parser.add_argument_group("the recording")
    group.add_argument("--abp-channel", metavar="NAME", help="default: by its usual names")
    group.add_argument("--ppg-channel", metavar="NAME", help="default: by its usual names")
    group.add_argument("--csv-rate", type=float, metavar="HZ", help="a table's rows are evenly "
                       "spaced at this rate; its time column is not used")
    group.add_argument("--abp", metavar="PATH", help="HDF5: the ABP's dataset, mmHg")
    group.add_argument("--ppg", metavar="PATH", help="HDF5: the PPG's dataset")
    group.add_argument("--fs", type=float, metavar="HZ", help="HDF5: samples per second of both")
    group = parser.add_argument_group("other ways to run")
    group.add_argument("--watch", action="store_true", help="follow a growing CSV or WFDB record, "
                       "or a folder that gets new files, and add a row to --out for each minute")
    group.add_argument("--poll", type=float, default=5, metavar="S",
                       help="--watch: seconds between two looks (default: 5)")
    group.add_argument("--export", metavar="ONNX", help="write the model, raw units in, mmHg out; "
                       "checked on RECORDING's minutes, or simulated ones")
    options = parser.parse_args(arguments)
    if not options.recording and not options.export:
        parser.error("RECORDING is required (or --export FILE)")
    for name in (*VITALS, "csv_rate", "fs", "max_age", "poll"):
        value, most = getattr(options, name), HIGHEST if name in VITALS else 1e6
        if value is not None and not 0 < value < most:
            parser.error(f'--{name.replace("_", "-")} {value:g}: expected more than 0 and less '
                         f"than {most:g}")
    if options.watch and (not options.out or options.figure or options.export):
        parser.error("--watch needs --out, and goes with neither --figure nor --export")
    return options


def main(arguments=None):
    options = parse_arguments(arguments)
    from training_header import choose_device, load_checkpoint, load_model
    checkpoint = load_checkpoint(options.checkpoint)
    model = load_model(checkpoint)
    calibration = read_calibration(options.checkpoint, checkpoint)
    if options.export:
        return export(model, calibration, checkpoint, options)
    if checkpoint["provenance"].get("origin") == "simulated":
        print("*** MODEL TRAINED ON SIMULATED PATIENTS ***")
    model.to(choose_device(options.device))
    if options.watch:
        return watch(Predictor(model, calibration, checkpoint, options), options)
    found = recordings.find_recordings([options.recording])
    if len(found) > 1:
        raise PredictError(f"{options.recording}: holds {len(found)} recordings; name one of them, "
                           "or follow the folder with --watch --out CSV")
    predictor = Predictor(model, calibration, checkpoint, options)
    source = predictor.open(found[0].path)
    predictor.check_vitals(options.recording, source.channels)
    rows, start, ended = [], 0, False
    with tk_utils.progress(desc="predicting", unit="min") as bar:
        while not ended:
            new, ended = predictor.minutes(source, start)
            rows += new
            start += BLOCK_MINUTES
            bar.update(len(new))
    if not rows:
        raise PredictError(f"{options.recording}: lasts less than a minute")
    tell(rows, predictor)
    if options.out:
        with tk_utils.atomic_file(options.out, newline="") as file:
            writer = csv.DictWriter(file, predictor.columns, lineterminator="\n")
            writer.writeheader()
            writer.writerows(map(as_text, rows))
        print(f"written: {options.out}")
    else:
        shown = [c for c in predictor.columns if any(as_text(row)[c] for row in rows)]
        tk_utils.print_table([[as_text(row)[c] for c in shown] for row in rows], shown)
    if options.figure:
        draw(rows, predictor, options.figure)
        print(f"written: {options.figure}")
    return 0


def read_calibration(path, checkpoint):
    """The checkpoint's calibration, checked, or None; says what it does not allow."""
    import metrics
    calibration = checkpoint.get("calibration")
    if not calibration:
        print(NO_CALIBRATION, file=sys.stderr)
        return None
    try:
        known = [level for level, half in zip(calibration["levels"], calibration["half_widths"])
                 if half is not None]
        for level in known:
            metrics.interval(np.zeros(1), calibration, level)
        novelty = calibration.get("novelty")
        if novelty:
            metrics.novelty(np.zeros((1, len(novelty["mean"]))), novelty)
    except (ValueError, TypeError, LookupError) as error:
        raise PredictError(f"{path}: its calibration is none of this project ({error})") from None
    if len(known) < len(calibration["levels"]):
        left = ", ".join(f"{100 * v:g} %" for v in calibration["levels"] if v not in known)
        print(f"no interval at {left}: the {calibration['n_patients']} tune patients are too few",
              file=sys.stderr)
    return dict(calibration, known=known)


def needed_vitals(model, path):
    """What the network gets beside the PPG, and MAP where it predicts Pcrit: TPP = MAP - Pcrit."""
    inputs = model.keys[1:-1]
    unknown = [key for key in inputs if key not in VITALS]
    if unknown:
        raise PredictError(f"{path}: needs {', '.join(unknown)}, which no recording gives")
    return list(dict.fromkeys(inputs + ["map"] * (model.keys[-1] == "p_crit")))


# ---------------------------------------------------------------- one recording

@dataclass
class Source:
    """A recording that is being read."""
    windows: recordings.Windows
    channels: dict              # {'ppg': name, and where found 'abp', 'map', 'sbp', 'dbp', 'hr'}
    growing: bool
    last: dict                  # {vital: (time in s, value) of the last number so far}


class Predictor:
    """A checkpoint with the options of a run; `minutes` makes the rows."""

    def __init__(self, model, calibration, checkpoint, options):
        from training_header import get_gate
        self.model, self.calibration, self.options = model.eval(), calibration, options
        self.needed = needed_vitals(model, options.checkpoint)
        self.simulated = checkpoint["provenance"].get("origin") == "simulated"
        # of a minute alone: its rules, without the one on the length of the encounter
        self.gate = replace(get_gate(checkpoint["config"]["condition"]), min_minutes=0)
        self.given = {key: getattr(options, key) for key in VITALS
                      if getattr(options, key) is not None}
        self.cuff = Cuff(options.vitals) if options.vitals else None
        self.levels = calibration["known"] if calibration else []
        levels = [f"{end}_{100 * level:g}" for level in self.levels for end in ("low", "high")]
        self.columns = ["start_s", "tpp", *levels, "refused", "unlike_training", *self.needed,
                        "vitals_from", "vitals_age_s", "tpp_abp", "r2_abp", "abp_in_gate",
                        "abp_refused"]

    def open(self, path, growing=False):
        """The Source of a recording."""
        o, channels = self.options, {}

        def choose(names):
            for kind in (*WAVEFORMS, *NUMBERS):
                asked = {"abp": o.abp_channel, "ppg": o.ppg_channel}.get(kind)
                name = recordings.choose_channel(names, kind, asked)
                if name is None and (kind == "ppg" or asked):
                    raise RecordingError(path, f"no {kind.upper()} channel " + (
                        f"named {asked}" if asked else "with a usual name")
                        + f" (--{kind}-channel)", "it has " + (", ".join(names) or "none"))
                if name is not None and name not in channels.values():
                    channels[kind] = name
            return list(channels.values())

        hdf5 = {"abp": o.abp, "ppg": o.ppg, "fs": o.fs}
        windows = recordings.Windows(path, choose, o.csv_rate, hdf5, growing)
        windows.read(0, 1)          # which chooses
        return Source(windows, channels, growing, {})

    def check_vitals(self, shown, channels):
        """Raises where the recording can never give what the checkpoint needs."""
        have = {**channels, **self.given, **(self.cuff.readings if self.cuff else {}), "hr": True}
        if "abp" in channels:
            return
        missing = [key for key in self.needed if key not in have
                   and not (key == "pp" and {"sbp", "dbp"} <= set(have))]
        if missing:
            give = " ".join(f"--{key} {VITALS[key].split('/')[0].upper()}" for key in missing)
            raise PredictError(
                f"{shown}: no arterial pressure, and nothing that gives "
                f"{', '.join(key.upper() for key in missing)}, which this checkpoint needs; add "
                f"{give}, or --vitals CSV with the columns time_s,{','.join(missing)}")

    def minutes(self, source, first):
        """(rows of the minutes from number `first` on, at most BLOCK_MINUTES; is it the end?)."""
        import labels
        from datasets import passes_gate
        margin, start_s = recordings.WINDOW_MARGIN_S, first * SEGMENT_SECONDS
        stop_s = start_s + BLOCK_MINUTES * SEGMENT_SECONDS
        recording, ended = source.windows.read(max(0, start_s - margin), stop_s + margin)
        channels = {kind: recording.channels[name] for kind, name in source.channels.items()
                    if name in recording.channels}
        n = BLOCK_MINUTES
        if ended:
            end_s = max((c.start_s + c.samples.size / c.fs for kind, c in channels.items()
                         if kind in WAVEFORMS), default=0.0) - (margin if source.growing else 0)
            n = int(np.clip((end_s - start_s + 1e-6) // SEGMENT_SECONDS, 0, BLOCK_MINUTES))
        if n == 0:
            return [], ended
        ppg, abp = (self.on_grid(channels.get(kind), kind, start_s, n) for kind in WAVEFORMS)
        label = labels.label_segments(abp, FS)
        quality = labels.signal_quality(abp, ppg, FS)
        middle_s = start_s + (np.arange(n) + 0.5) * SEGMENT_SECONDS
        numbers, age_s = self.numbers(channels, source.last, start_s, n)
        cuff, cuff_age_s = self.cuff.at(middle_s, 60 * self.options.max_age) if self.cuff else ({},
                                                                                               {})
        constant = {key: np.full(n, value) for key, value in self.given.items()}
        vitals, came_from, ages = choose_vitals(self.needed, n, [
            ("option", constant, {}), ("cuff", cuff, cuff_age_s), ("numbers", numbers, age_s),
            ("abp", label, {}), ("ppg", {"hr": quality["ppg_hr"]}, {})])
        refused = [labels.reason_names(mask) for mask in quality["reason"]]
        for key in self.needed:
            for i in np.flatnonzero(~np.isfinite(vitals[key])):
                refused[i].append(f"no_{key}")
        fine = np.array([not names for names in refused])
        tpp, unlike = self.predict(ppg[fine], {key: vitals[key][fine] for key in self.needed})
        prediction, new = np.full(n, np.nan), np.full(n, None, dtype=object)
        prediction[fine], new[fine] = tpp, unlike
        intervals = self.intervals(prediction)
        in_gate = passes_gate(self.gate, {
            **quality, **label, "reason": label["reason"] | quality["reason"]}.get,
            np.ones(n, bool))
        rows = []
        for i in range(n):
            row = {"start_s": float(start_s + i * SEGMENT_SECONDS), "tpp": prediction[i],
                   "refused": " ".join(refused[i]), "unlike_training": new[i],
                   **{key: ends[i] for key, ends in intervals.items()},
                   **{key: float(vitals[key][i]) for key in self.needed},
                   "vitals_from": " ".join(f"{key}={came_from[key][i]}" for key in self.needed
                                           if came_from[key][i]),
                   "vitals_age_s": ages[i], "tpp_abp": float(label["tpp"][i]),
                   "r2_abp": float(label["r2"][i]), "abp_in_gate": None, "abp_refused": ""}
            if "abp" in source.channels:
                row["abp_refused"] = " ".join(labels.reason_names(label["reason"][i]))
                row["abp_in_gate"] = bool(in_gate[i])
            rows.append(row)
        return rows, ended

    def on_grid(self, channel, kind, start_s, n):
        """[n, 3600] float32: minutes of a Channel, NaN where there is none."""
        import labels
        if channel is None:
            return np.full((n, SEGMENT_SAMPLES), np.nan, np.float32)
        if channel.fs < labels.MIN_FS_HZ:
            raise PredictError(f"the {kind.upper()} channel has {channel.fs:g} samples/s; a "
                               f"waveform needs {labels.MIN_FS_HZ} or more")
        samples = channel.samples * (recordings.mmhg_per_unit(channel.unit) if kind == "abp" else 1)
        moved = recordings.Channel(samples, channel.fs, "", channel.start_s - start_s)
        return recordings.resample(moved, FS, n * SEGMENT_SAMPLES).reshape(n, SEGMENT_SAMPLES)

    def numbers(self, channels, last, start_s, n):
        """({vital: [n]}, {vital: [n] age in s}): the minute's mean of the monitor's numbers; where
        it holds none, the last one before, up to --max-age."""
        found, ages = {}, {}
        for key in NUMBERS:
            if key not in channels:
                continue
            channel, found[key], ages[key] = channels[key], np.full(n, np.nan), np.full(n, np.nan)
            factor = recordings.mmhg_per_unit(channel.unit) if key != "hr" else 1.0
            times = channel.start_s + np.arange(channel.samples.size) / channel.fs
            known = np.isfinite(channel.samples)
            times, values = times[known], channel.samples[known] * factor
            for i in range(n):
                begin = start_s + i * SEGMENT_SECONDS
                a, b = np.searchsorted(times, [begin - 1e-6, begin + SEGMENT_SECONDS - 1e-6])
                if a < b:
                    found[key][i] = values[a:b].mean()
                    last[key] = times[b - 1], values[b - 1]
                elif key in last and begin - last[key][0] <= 60 * self.options.max_age:
                    ages[key][i], found[key][i] = begin - last[key][0], last[key][1]
        if {"sbp", "dbp"} <= set(found):
            found["pp"] = found["sbp"] - found["dbp"]
            ages["pp"] = np.fmax(ages["sbp"], ages["dbp"])
        return found, ages

    def predict(self, ppg, vitals):
        """(TPP [n] in mmHg, [n] whether unlike the training data or None) of clean minutes."""
        import torch

        import metrics
        from training_header import watch_features
        inputs = [ppg[:, None]] + [vitals[key] for key in self.model.keys[1:-1]]
        device = self.model.label_mean.device
        inputs = [torch.from_numpy(np.asarray(x, np.float32)).to(device) for x in inputs]
        features, out = [], [np.empty(0)]
        with torch.no_grad(), watch_features(self.model, features.append):
            out += [self.model(*(x[i:i + BATCH] for x in inputs))[:, 0].cpu().numpy()
                    for i in range(0, len(ppg), BATCH)]
        tpp = np.concatenate(out).astype(np.float64)
        if self.model.keys[-1] == "p_crit":
            tpp = vitals["map"] - tpp
        novelty = (self.calibration or {}).get("novelty")
        if not novelty or novelty["threshold"] is None or not len(tpp):
            return tpp, None
        return tpp, metrics.novelty(np.concatenate(features), novelty) > novelty["threshold"]

    def intervals(self, tpp):
        """{'low_90': [n], 'high_90': [n], ...} of the calibration's levels."""
        import metrics
        found = {}
        for level in self.levels:
            low, high = metrics.interval(tpp, self.calibration, level)
            found.update({f"low_{100 * level:g}": low, f"high_{100 * level:g}": high})
        return found


def choose_vitals(needed, n, sources):
    """({vital: [n]}, {vital: [n] name of its source}, [n] greatest age in s) by order of `sources`,
    which are (name, {vital: [n]}, {vital: [n] age})."""
    values = {key: np.full(n, np.nan) for key in needed}
    came_from = {key: np.full(n, "", dtype=object) for key in needed}
    ages = np.full(n, np.nan)
    for name, found, age_s in sources:
        for key in set(needed) & set(found):
            new = ~np.isfinite(values[key]) & np.isfinite(found[key])
            values[key][new], came_from[key][new] = found[key][new], name
            if key in age_s:
                ages[new] = np.fmax(ages[new], age_s[key][new])
    return values, came_from, ages


class Cuff:
    """Readings of a CSV: `time_s` and any vitals. A file that grows is read again."""

    def __init__(self, path):
        self.path, self.stamp, self.readings = path, None, {}
        self.read()

    def read(self):
        stamp = os.stat(self.path).st_mtime_ns, os.path.getsize(self.path)
        if stamp == self.stamp:
            return
        with open(self.path, encoding="utf-8-sig", errors="replace", newline="") as file:
            rows = csv.reader(file)
            names = next(rows, [])
            time = [i for i, name in enumerate(names)
                    if recordings.plain_name(name) in recordings.TIME_NAMES]
            columns = {key: recordings.choose_channel(names, key) if key != "pp" else
                       next((name for name in names if recordings.plain_name(name) == "pp"), None)
                       for key in VITALS}
            columns = {key: names.index(name) for key, name in columns.items() if name is not None}
            if not time or not columns:
                raise RecordingError(self.path, "expected the columns time_s (seconds from the "
                                     "recording's start) and any of " + ", ".join(VITALS))
            readings = {key: [] for key in columns}
            for row in rows:
                if any(cell.strip() for cell in row):
                    self.add(row, time[0], columns, readings, rows.line_num)
        for key, pairs in readings.items():
            if any(later <= t for (t, _), (later, _) in zip(pairs, pairs[1:])):
                raise RecordingError(self.path, f"column {key}: times do not increase")
        self.stamp = stamp
        self.readings = {key: np.array(pairs).T for key, pairs in readings.items() if pairs}

    def add(self, row, time, columns, readings, line):
        try:
            t = float(row[time])
            for key, i in columns.items():
                if row[i].strip().lower() not in recordings.MISSING_CELLS:
                    value = float(row[i])
                    if not (math.isfinite(t) and 0 < value < HIGHEST):
                        raise ValueError
                    readings[key].append((t, value))
        except (ValueError, IndexError):
            raise RecordingError(self.path, f"line {line}: expected a time in s and vitals above 0 "
                                            f"and below {HIGHEST}") from None

    def at(self, times_s, max_age_s):
        """({vital: [n]} between readings by straight lines, {vital: [n] s since the last reading});
        NaN where no reading is within max_age_s."""
        self.read()
        found, ages = {}, {}
        for key, (at_s, values) in self.readings.items():
            nearest = np.abs(times_s[:, None] - at_s).min(1)
            found[key] = np.where(nearest <= max_age_s, np.interp(times_s, at_s, values), np.nan)
            before = np.searchsorted(at_s, times_s, side="right") - 1
            ages[key] = times_s - at_s[np.maximum(before, 0)]       # negative before the first
        if {"sbp", "dbp"} <= set(found) and "pp" not in found:
            found["pp"], ages["pp"] = found["sbp"] - found["dbp"], np.fmax(ages["sbp"], ages["dbp"])
        return found, ages


# ---------------------------------------------------------------- what is told

def as_text(row):
    """A row's cells: numbers with two decimals, nothing for what is not known."""
    def cell(key, value):
        if value is None or isinstance(value, float) and math.isnan(value):
            return ""
        if isinstance(value, (bool, np.bool_)):
            return "yes" if value else "no"
        if isinstance(value, (float, np.floating)):
            return f"{value:.0f}" if key.endswith("_s") else f"{value:.2f}"
        return str(value)
    return {key: cell(key, value) for key, value in row.items()}


def tell(rows, predictor):
    """Prints what the rows say together."""
    import metrics
    counts = {}
    for row in rows:
        for name in row["refused"].split():
            counts[name] = counts.get(name, 0) + 1
    tpp = np.array([row["tpp"] for row in rows])
    done = np.isfinite(tpp)
    print(f"{len(rows):,} minutes, {done.sum():,} with TPP"
          + (f", median {np.median(tpp[done]):.1f} mmHg" if done.any() else "")
          + (f"; refused: {', '.join(f'{name} {n:,}' for name, n in counts.items())}" if counts
             else ""))
    for key in predictor.needed:
        sources = [part.split("=")[1] for row in rows for part in row["vitals_from"].split()
                   if part.split("=")[0] == key]
        print(f"{key} from: " + (", ".join(f"{name} ({sources.count(name):,} min)"
                                           for name in dict.fromkeys(sources)) or "nothing"))
    new = sum(bool(row["unlike_training"]) for row in rows)
    if new:
        print(f"{new:,} of {done.sum():,} minutes are unlike the training data (1 in 20 would be "
              "usual): do not trust them")
    reference = np.array([row["tpp_abp"] for row in rows])
    both = done & np.isfinite(reference) & [bool(row["abp_in_gate"]) for row in rows]
    if both.any():
        score = metrics.scores(reference[both], tpp[both])
        print(f"against the arterial line's label in {both.sum():,} minutes that pass the gate: "
              f"RMSE {score['rmse']:.1f}, bias {score['bias']:+.1f} mmHg")


def draw(rows, predictor, path):
    """TPP with its band and the label, vitals below, over hours; what was refused is shaded."""
    def column(key):
        return np.array([row.get(key, np.nan) for row in rows], float)

    hours = (column("start_s") + SEGMENT_SECONDS / 2) / 3600
    tpp, vitals = column("tpp"), [k for k in predictor.needed if k != "hr"]
    lower = [(vitals, "mmHg")] * bool(vitals) + [(["hr"], "beats/min")] * ("hr" in predictor.needed)
    figure = tk_utils.new_figure(9, 3 + 1.5 * len(lower))
    axes = figure.subplots(1 + len(lower), 1, sharex=True, squeeze=False,
                           gridspec_kw={"height_ratios": [2.2] + [1] * len(lower)})[:, 0]
    top, half = axes[0], SEGMENT_SECONDS / 7200
    edges = np.stack([hours - half, hours + half], 1).ravel()   # a minute is a step of its width
    for level, alpha in ((0.9, 0.2), (0.5, 0.3)):
        if level in predictor.levels:
            low, high = (np.repeat(column(f"{end}_{100 * level:g}"), 2) for end in ("low", "high"))
            top.fill_between(edges, low, high, color=tk_utils.TRAIN_COLOUR, alpha=alpha, lw=0,
                             label=f"{level:.0%} interval")
    top.plot(edges, np.repeat(tpp, 2), color=tk_utils.TRAIN_COLOUR, lw=1, label="TPP")
    label = np.where([bool(row["abp_in_gate"]) for row in rows], column("tpp_abp"), np.nan)
    if np.isfinite(label).any():
        top.plot(hours, label, ".", color="black", ms=3, label="label from the arterial line")
    new = np.array([bool(row["unlike_training"]) for row in rows])
    if new.any():
        top.plot(hours[new], np.full(new.sum(), 0.02), "|", color="#b3261e", ms=5,
                 transform=top.get_xaxis_transform(), label="unlike the training data")
    top.set_ylabel("TPP (mmHg)")
    colours = iter((tk_utils.TUNE_COLOUR, "#55a868", "#8172b2", "#937860", "#c44e52"))
    for axis, (keys, unit) in zip(axes[1:], lower):
        for key in keys:
            axis.plot(edges, np.repeat(column(key), 2), color=next(colours), lw=1,
                      label=key.upper())
        axis.set_ylabel(unit)
    refused = np.concatenate(([0], [bool(row["refused"]) for row in rows], [0])).astype(int)
    spans = zip(np.flatnonzero(np.diff(refused) > 0), np.flatnonzero(np.diff(refused) < 0))
    for number, (first, end) in enumerate(spans):
        for axis in axes:
            axis.axvspan(hours[first] - half, hours[end - 1] + half, color="0.85", lw=0, zorder=0,
                         label="refused" if number == 0 and axis is top else None)
    for axis in axes:
        axis.legend(frameon=False, fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
        axis.spines[["top", "right"]].set_visible(False)
    axes[-1].set_xlabel("hours from the recording's start")
    axes[-1].set_xlim(hours[0] - half, hours[-1] + half)
    if predictor.simulated:
        top.set_title("MODEL TRAINED ON SIMULATED PATIENTS", **tk_utils.NOTE_STYLE)
    tk_utils.save_figure(figure, path)


# ---------------------------------------------------------------- following

def stop_event():
    """Set by SIGINT and SIGTERM, so that a row is never cut."""
    event = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: event.set())
    return event


def watch(predictor, options):
    """Follows a growing file or a folder; adds each full minute to --out once, until SIGINT."""
    is_folder = os.path.isdir(options.recording)
    columns = ["file"] * is_folder + predictor.columns
    folder, name = os.path.split(os.path.abspath(options.out))
    with tk_utils.locked(os.path.join(folder, f".{name}.lock"),
                         f"{options.out}: another --watch is writing it"):
        done = prepare_log(options.out, columns)
        stop = stop_event()
        with open(options.out, "ab", buffering=0) as log:
            def add(rows, **more):
                if rows:
                    text = "".join(",".join(as_text({**more, **row})[c] for c in columns) + "\n"
                                   for row in rows)
                    log.write(text.encode())
                    os.fsync(log.fileno())

            if is_folder:
                written = watch_folder(predictor, options, done, add, stop)
            else:
                written = watch_file(predictor, options, done.get("", 0), add, stop)
    print(f"stopped; {written:,} minutes added to {options.out}")
    return 0


def prepare_log(path, columns):
    """{file number, or '' without: minutes that the file holds}; makes it, and cuts off a row that
    was not finished."""
    header = (",".join(columns) + "\n").encode()
    if not os.path.exists(path) or not os.path.getsize(path):
        with tk_utils.atomic_file(path, "wb") as file:
            file.write(header)
    done, size = {}, 0
    with open(path, "rb+") as file:
        if file.readline() != header:
            raise PredictError(f"{path}: was not written by --watch with this checkpoint and these "
                               "options; give another --out")
        size = file.tell()
        for line in file:
            if not line.endswith(b"\n"):
                break
            size += len(line)
            cells = dict(zip(columns, line.decode().rstrip("\n").split(",")))
            done[cells.get("file", "")] = int(float(cells["start_s"])) // SEGMENT_SECONDS + 1
        file.truncate(size)
    return done


def watch_file(predictor, options, first, add, stop):
    (found,) = recordings.find_recordings([options.recording])
    source = predictor.open(found.path, growing=True)
    predictor.check_vitals(options.recording, source.channels)
    written = 0
    while not stop.is_set():
        rows, ended = predictor.minutes(source, first)
        add(rows)
        first, written = first + len(rows), written + len(rows)
        if ended:
            stop.wait(options.poll)
    return written


def watch_folder(predictor, options, done, add, stop):
    """Each file is a recording of its own, read when it has not changed between two looks. The
    rows name it by number; which is which stands in the private <out>_files.csv."""
    names_path = os.path.splitext(options.out)[0] + "_files.csv"
    numbers, waiting, finished, written = read_names(names_path), {}, {}, 0
    own = {os.path.realpath(path) for path in (options.out, names_path, options.vitals) if path}
    while not stop.is_set():
        for path in files_in(options.recording):
            if os.path.realpath(path) in own or stop.is_set():
                continue
            name, stamp = os.path.relpath(path, options.recording), stamp_of(path)
            if finished.get(name) == stamp or waiting.get(name) != stamp:
                waiting[name] = stamp
                continue
            finished[name] = stamp
            del waiting[name]
            if name not in numbers:
                numbers[name] = str(len(numbers) + 1)
                write_names(names_path, numbers)
            number = numbers[name]
            try:
                source, ended = predictor.open(path), False
                predictor.check_vitals(f"file {number} of the folder", source.channels)
                while not ended and not stop.is_set():
                    rows, ended = predictor.minutes(source, done.get(number, 0))
                    add(rows, file=number)
                    done[number] = done.get(number, 0) + len(rows)
                    written += len(rows)
            except RecordingError as error:
                print(f"file {number} of the folder: {error.what}", file=sys.stderr, flush=True)
            except PredictError as error:
                print(error, file=sys.stderr, flush=True)
        stop.wait(options.poll)
    return written


def files_in(folder):
    try:
        return [found.path for found in recordings.find_recordings([folder])]
    except RecordingError:
        return []                       # none yet


def stamp_of(path):
    """Sizes and times of a recording's files (a WFDB header's data lie beside it)."""
    folder, base = os.path.dirname(path) or ".", recordings.recording_name(path)
    stats = [os.stat(path)]
    if path.endswith(".hea"):
        with os.scandir(folder) as entries:
            stats += [entry.stat() for entry in entries if entry.name.startswith(base)]
    return sorted((one.st_size, one.st_mtime_ns) for one in stats)


def read_names(path):
    if not os.path.exists(path):
        return {}
    with open(path, encoding="utf-8", newline="") as file:
        if file.readline().rstrip("\r\n") != PRIVATE_LINE:
            raise PredictError(f"{path}: is in the way; --watch keeps the files' names there")
        return {row["name"]: row["file"] for row in csv.DictReader(file)}


def write_names(path, numbers):
    with tk_utils.atomic_file(path, newline="") as file:
        file.write(PRIVATE_LINE + "\n")
        csv.writer(file).writerows([("file", "name")]
                                   + [(number, name) for name, number in numbers.items()])


# ---------------------------------------------------------------- export

def export(model, calibration, checkpoint, options):
    """Writes --export: raw units in, mmHg out; only if onnxruntime gives what PyTorch gives."""
    import inspect
    import io
    import warnings

    import torch
    try:
        import onnx
        import onnxruntime
    except ModuleNotFoundError as error:
        raise PredictError(f"--export needs the package {error.name}: "
                           f"{recordings.INSTALL_LINE}") from None
    vitals = needed_vitals(model, options.checkpoint)
    half = None
    if calibration and EXPORT_LEVEL in calibration["known"] and not calibration["spread"]:
        half = calibration["half_widths"][calibration["levels"].index(EXPORT_LEVEL)]
    elif calibration:
        print(f"no {EXPORT_LEVEL:.0%} interval in this calibration: the file gives TPP alone",
              file=sys.stderr)
    n_inputs = len(model.keys) - 2

    class RawUnits(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, ppg, *vitals):
            # The first sample off first: in float32 a mean of large numbers loses digits.
            tpp = self.model(ppg - ppg[:, :, :1], *vitals[:n_inputs])[:, 0]
            if self.model.keys[-1] == "p_crit":
                tpp = vitals[-1 if "map" not in model.keys else model.keys.index("map") - 1] - tpp
            return tpp if half is None else (tpp, tpp - half, tpp + half)

    raw, names = RawUnits().eval(), ["ppg", *vitals]
    outputs = ["tpp"] + ["low", "high"] * (half is not None)
    inputs = check_inputs(model, vitals, checkpoint, options)
    buffer = io.BytesIO()
    old = {"dynamo": False} if "dynamo" in inspect.signature(torch.onnx.export).parameters else {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")         # that the tracer keeps sizes as constants
        torch.onnx.export(raw, tuple(torch.from_numpy(x[:2]) for x in inputs), buffer,
                          input_names=names, output_names=outputs, opset_version=EXPORT_OPSET,
                          do_constant_folding=False,    # it loses one of two equal parameters
                          dynamic_axes={name: {0: "batch"} for name in names + outputs}, **old)
    graph = onnx.load_from_string(buffer.getvalue())
    notes = {"inputs": "ppg [batch, 1, 3600] 60 s at 60 Hz in any unit; " + ", ".join(
                 f"{key} [batch] {VITALS[key]}" for key in vitals),
             "outputs": f"{', '.join(outputs)} [batch] mmHg"
                        + f"; low to high: {EXPORT_LEVEL:.0%} interval" * (half is not None),
             "trained_on": str(checkpoint["provenance"].get("origin")),
             "use": "research only; no medical device"}
    onnx.helper.set_model_props(graph, notes)
    onnx.checker.check_model(graph)
    data = graph.SerializeToString()
    quiet = onnxruntime.SessionOptions()
    quiet.log_severity_level = 3                # errors alone; it warns of what it cannot speed up
    session = onnxruntime.InferenceSession(data, quiet, providers=["CPUExecutionProvider"])
    worst = 0.0
    with torch.no_grad():
        for rows in (slice(None), slice(0, 1), slice(1, 8)):
            given = [x[rows] for x in inputs]
            tensors = [torch.from_numpy(x) for x in given]
            expected = model(*tensors[:n_inputs + 1])[:, 0].numpy()
            if model.keys[-1] == "p_crit":
                expected = given[names.index("map")] - expected
            found = session.run(None, dict(zip(names, given)))
            for values, shift in zip(found, (0, -(half or 0), half or 0)):
                worst = max(worst, float(np.abs(values - (expected + shift)).max()))
    if not worst <= EXPORT_TOLERANCE:
        raise PredictError(f"{options.export}: not written, as onnxruntime differs from PyTorch by "
                           f"{worst:.2g} mmHg (at most {EXPORT_TOLERANCE:g} is allowed)")
    with tk_utils.atomic_file(options.export, "wb") as file:
        file.write(data)
    print(f"written: {options.export}; at most {worst:.1g} mmHg from PyTorch on "
          f"{len(inputs[0])} segments")
    return 0


def check_inputs(model, vitals, checkpoint, options):
    """64 segments of RECORDING, or simulated ones, at many gains and offsets; vitals at random."""
    rng = np.random.default_rng(0)
    if options.recording:
        ppg = clean_minutes(Predictor(model, None, checkpoint, options), options)
        ppg = ppg[np.arange(max(64, len(ppg))) % len(ppg)]
    else:
        t = np.arange(SEGMENT_SAMPLES) / FS
        rate, share, late = (rng.uniform(*ends, (64, 1)) for ends in
                             ((0.7, 2.5), (0.1, 0.6), (0, 2 * np.pi)))
        phase = 2 * np.pi * rate * t + 0.3 * np.sin(2 * np.pi * 0.25 * t + late)
        ppg = np.sin(phase) + share * np.sin(2 * phase - late)
        ppg += 0.2 * np.sin(2 * np.pi * 0.25 * t) + 0.02 * rng.standard_normal(ppg.shape)
    sd, shape = ppg.std(1, keepdims=True), (len(ppg), 1)
    ppg = (ppg + rng.uniform(-100, 100, shape) * sd) * 10 ** rng.uniform(-3, 3, shape)
    numbers = [rng.normal(model.normaliser[key]["mean"], model.normaliser[key]["sd"], len(ppg))
               if key in model.normaliser else rng.uniform(50, 110, len(ppg)) for key in vitals]
    return [ppg[:, None].astype(np.float32)] + [x.astype(np.float32) for x in numbers]


def clean_minutes(predictor, options):
    """[n, 3600]: up to 256 minutes of PPG without a reason against them."""
    import labels
    (found,) = recordings.find_recordings([options.recording])
    source, clean, start, ended = predictor.open(found.path), [], 0, False
    while not ended and sum(map(len, clean)) < 256:
        stop_s = (start + BLOCK_MINUTES) * SEGMENT_SECONDS
        recording, ended = source.windows.read(start * SEGMENT_SECONDS, stop_s)
        channel = recording.channels.get(source.channels["ppg"])
        if channel is not None:
            ppg = predictor.on_grid(channel, "ppg", start * SEGMENT_SECONDS, BLOCK_MINUTES)
            clean.append(ppg[labels.ppg_reasons(ppg, FS) == 0])
        start += BLOCK_MINUTES
    if not sum(map(len, clean)):
        raise PredictError(f"{options.recording}: no clean minute of PPG to check the export with")
    return np.concatenate(clean)


if __name__ == "__main__":
    sys.exit(tk_utils.run_script(main, "CheckpointError", "DataError", "TrainingError",
                                 PredictError, RecordingError))
