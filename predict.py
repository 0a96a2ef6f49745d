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
import contextlib
import csv
import math
import os
import signal
import sys
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np

import labels
import metrics
import recordings
import tk_utils
from recordings import RecordingError

FS, SEGMENT_SECONDS, SEGMENT_SAMPLES = 60, 60, 3600     # of the network's input
BLOCK_MINUTES = 32              # read and predicted at a time: what bounds the memory
WAVEFORMS = ("ppg", "abp")
VITALS = {"map": "mmHg", "sbp": "mmHg", "dbp": "mmHg", "pp": "mmHg", "hr": "beats/min"}
NUMBERS = ("map", "sbp", "dbp", "hr")       # that monitors give; pp is their difference
HIGHEST = 400                   # mmHg or beats/min; above lies a slip of the keyboard
EXPORT_LEVEL = 0.9
EXPORT_TOLERANCE = 1e-3         # mmHg
EXPORT_OPSET = 17               # the highest that PyTorch 2.0 writes
EXPORT_SEGMENTS = 64            # that an export is checked with
PRIVATE_LINE = "# private: contains true file names; do not share"


class PredictError(ValueError):
    """What was asked for cannot be done; the message is one line."""


def parse_arguments(arguments=None):
    parser = tk_utils.ScriptParser(description=__doc__,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("checkpoint", help="runs/<name>.pth, as train_resnet.py writes it")
    add("recording", nargs="?", metavar="RECORDING",
        help="a file of any format that prepare.py reads; with --watch also a folder")
    add("--out", metavar="CSV", help="write a row for each minute (default: print a table)")
    add("--figure", metavar="PNG", help="draw TPP with its band, and MAP and HR under it")
    add("--device", help="cpu, cuda, ... (default: CUDA where present)")
    add = parser.add_argument_group("vitals").add_argument
    for key, unit in VITALS.items():
        add(f"--{key}", type=float, metavar=unit.split("/")[0].upper(),
            help=f"{key.upper()} of all minutes, {unit}")
    add("--vitals", metavar="CSV", help="readings: time_s (from the recording's start) and any of "
        "map, sbp, dbp, pp, hr; interpolated")
    add("--max-age", type=float, default=30, metavar="MIN",
        help="how long a reading holds, minutes (default: 30)")
    add = parser.add_argument_group("the recording").add_argument
    add("--abp-channel", metavar="NAME",
        help="default: by its usual names; none: as if there were no arterial line")
    add("--ppg-channel", metavar="NAME", help="default: by its usual names")
    add("--csv-rate", type=float, metavar="HZ",
        help="a table's rows are evenly spaced at this rate; its time column is not used")
    add("--abp", metavar="PATH", help="HDF5: the ABP's dataset, mmHg")
    add("--ppg", metavar="PATH", help="HDF5: the PPG's dataset")
    add("--fs", type=float, metavar="HZ", help="HDF5: samples per second of both")
    add = parser.add_argument_group("other ways to run").add_argument
    add("--watch", action="store_true", help="follow a growing CSV or WFDB record, or a folder "
        "that gets new files, and add a row to --out for each minute")
    add("--poll", type=float, default=5, metavar="S",
        help="--watch: seconds between two looks (default: 5)")
    add("--export", metavar="ONNX", help="write the model, raw units in, mmHg out; checked on "
        "RECORDING's minutes, or simulated ones")
    options = parser.parse_args(arguments)
    if not options.recording and not options.export:
        parser.error(f"expected CHECKPOINT RECORDING (or --export FILE), got {options.checkpoint}")
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
    from training_header import choose_device, load_checkpoint
    checkpoint = load_checkpoint(options.checkpoint)
    predictor = Predictor(checkpoint, options)
    if options.export:
        return export(predictor, checkpoint["provenance"]["origin"], options)
    if predictor.simulated:
        print("*** MODEL TRAINED ON SIMULATED PATIENTS ***")
    predictor.model.to(choose_device(options.device))
    if options.watch:
        return watch(predictor, options)
    found = recordings.find_recordings([options.recording])
    if len(found) > 1:
        raise PredictError(f"{options.recording}: holds {len(found)} recordings; name one of them, "
                           "or follow the folder with --watch --out CSV")
    source = predictor.open(found[0].path)
    predictor.check_vitals(options.recording, source.channels)
    tables = []
    with tk_utils.progress(desc="predicting", unit="min") as bar:
        for table in filter(None, predictor.tables(source)):
            tables.append(table)
            bar.update(len(table["tpp"]))
    if not tables:
        raise PredictError(f"{options.recording}: lasts less than a minute")
    table = {key: np.concatenate([one[key] for one in tables]) for key in predictor.columns}
    tell(table, predictor.needed)
    texts = as_text(table)
    if options.out:
        with tk_utils.atomic_file(options.out, newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(texts)
            writer.writerows(zip(*texts.values()))
        print(f"written: {options.out}")
    else:
        texts = {key: cells for key, cells in texts.items() if any(cells)}
        tk_utils.print_table(list(zip(*texts.values())), list(texts))
    if options.figure:
        draw(table, predictor, options.figure)
        print(f"written: {options.figure}")
    return 0


def read_calibration(path, checkpoint):
    """(the checkpoint's calibration or {}, its levels with an interval); says what it lacks."""
    calibration = checkpoint.get("calibration") or {}
    if not calibration:
        print("no intervals and no flag for unusual inputs: this checkpoint was saved without a "
              "calibration (train it again)", file=sys.stderr)
        return {}, []
    levels, left = [], []
    for level, half in zip(calibration["levels"], calibration["half_widths"]):
        if not (isinstance(level, float) and isinstance(half, (float, type(None)))):
            raise PredictError(f"{path}: its calibration is none of this project")
        (left if half is None else levels).append(level)
    if left:
        print(f"no interval at {', '.join(f'{100 * v:g} %' for v in left)}: the "
              f"{calibration['n_patients']} tune patients are too few", file=sys.stderr)
    return calibration, levels


def label_options(provenance):
    """How the labels were made that the checkpoint learned: arguments of `label_segments`."""
    method, beats = provenance.get("label_method", "published"), provenance.get("beats", "foot")
    if method in labels.METHODS and beats in ("foot", "peak"):
        return {"method": method, "beats": beats}
    print(f"how the network's labels were made ({method}, {beats}) is not known here: those beside "
          "the predictions are 'published', foot to foot", file=sys.stderr)
    return {}


# ---------------------------------------------------------------- one recording

@dataclass
class Source:
    """A recording that is being read."""
    windows: recordings.Windows
    channels: dict              # {'ppg': name, and where found 'abp', 'map', 'sbp', 'dbp', 'hr'}
    last: dict                  # {vital: (time in s, value) of the last number so far}


class Predictor:
    """A checkpoint with the options of a run. A table is a dict of its `columns`, [minutes] each.

    needed: the vitals that the network gets, and MAP where it predicts Pcrit: TPP = MAP - Pcrit.
    """

    def __init__(self, checkpoint, options):
        from training_header import get_gate, load_model
        keys, provenance = checkpoint["keys"], checkpoint["provenance"]
        if keys[0] != "ppg":
            raise PredictError(f"{options.checkpoint}: this network was trained without the PPG; "
                               "evaluate.py is for it")
        self.inputs = keys[1:-1]
        unknown = [key for key in self.inputs if key not in VITALS]
        if unknown:
            raise PredictError(f"{options.checkpoint}: needs {', '.join(unknown)}, which no "
                               "recording gives")
        self.gives_p_crit = keys[-1] == "p_crit"
        self.needed = list(dict.fromkeys(self.inputs + ["map"] * self.gives_p_crit))
        self.model, self.options = load_model(checkpoint), options
        self.calibration, self.levels = read_calibration(options.checkpoint, checkpoint)
        self.simulated = "simulated" in provenance["origin"]
        self.label_options = label_options(provenance)
        # of a minute alone: its rules, without the one on the length of the encounter
        self.gate = replace(get_gate(checkpoint["config"]["condition"]), min_minutes=0)
        self.given = {key: getattr(options, key) for key in VITALS
                      if getattr(options, key) is not None}
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
                if kind == "abp" and (asked or "").lower() == "none":
                    continue
                name = recordings.choose_channel(names, kind, asked)
                if name is None and (kind == "ppg" or asked):
                    raise RecordingError(path, f"no {kind.upper()} channel " + (
                        f"named {asked}" if asked else "with a usual name")
                        + f" (--{kind}-channel)", "it has " + (", ".join(names) or "none"))
                if name is not None and name not in channels.values():
                    channels[kind] = name
            return list(channels.values())

        hdf5 = {"abp": o.abp, "ppg": o.ppg, "fs": o.fs}
        if any(hdf5.values()) and recordings.reader_of(path)[0] != "h5py":
            raise RecordingError(path, "--abp, --ppg and --fs are for HDF5 alone",
                                 "--abp-channel and --ppg-channel name the channels of others")
        windows = recordings.Windows(path, choose, o.csv_rate, hdf5, growing)
        windows.read(0, 1)          # which chooses
        return Source(windows, channels, {})

    def cuff(self):
        """The readings, which may have become more since the last call."""
        return read_cuff(self.options.vitals, self.options.watch)

    def check_vitals(self, shown, channels):
        """Raises where the recording can never give what the checkpoint needs."""
        have = {"hr"}
        for source in (channels, self.given, self.cuff()):
            have |= {*source, *(["pp"] if {"sbp", "dbp"} <= set(source) else [])}
        missing = [key for key in self.needed if key not in have]
        if missing and "abp" not in channels:
            give = " ".join(f"--{key} {VITALS[key].split('/')[0].upper()}" for key in missing)
            raise PredictError(
                f"{shown}: no arterial pressure, and nothing that gives "
                f"{', '.join(key.upper() for key in missing)}, which this checkpoint needs; add "
                f"{give}, or --vitals CSV with the columns time_s,{','.join(missing)}")

    def tables(self, source):
        """Yields the tables of a recording; a thread reads on while the network works."""
        import torch

        from training_header import keep_freed_memory
        keep_freed_memory()
        torch.set_num_threads(max(1, torch.get_num_threads() - 1))      # a core for the thread
        with ThreadPoolExecutor(1) as thread:
            first, ended, reading = 0, False, thread.submit(self.read, source, 0)
            while not ended:
                ppg, table, ended = reading.result()
                first += BLOCK_MINUTES
                if not ended:
                    reading = thread.submit(self.read, source, first)
                yield self.predict(ppg, table)

    def minutes(self, source, first):
        """(table of the minutes from number `first` on, at most BLOCK_MINUTES, {} if there is none;
        is it the recording's end?)."""
        ppg, table, ended = self.read(source, first)
        return self.predict(ppg, table), ended

    def read(self, source, first):
        """(PPG [n, 3600], the table without the predictions, is it the end?), as `minutes`."""
        from datasets import passes_gate
        margin, start_s = recordings.WINDOW_MARGIN_S, first * SEGMENT_SECONDS
        stop_s = start_s + BLOCK_MINUTES * SEGMENT_SECONDS
        recording, ended = source.windows.read(max(0, start_s - margin), stop_s + margin)
        channels = {kind: recording.channels[name] for kind, name in source.channels.items()
                    if name in recording.channels}
        n = BLOCK_MINUTES
        if ended:
            waves = [channels[kind] for kind in WAVEFORMS if kind in channels]
            end_s = max((wave.start_s + wave.samples.size / wave.fs for wave in waves), default=0.0)
            end_s -= margin * source.windows.growing
            n = int(np.clip((end_s - start_s + 1e-6) // SEGMENT_SECONDS, 0, BLOCK_MINUTES))
        if n == 0:
            return np.empty((0, SEGMENT_SAMPLES)), {}, ended
        begin_s = start_s + SEGMENT_SECONDS * np.arange(n, dtype=float)
        ppg, abp = (on_grid(channels.get(kind), kind, start_s, n) for kind in WAVEFORMS)
        label = labels.label_segments(abp, FS, **self.label_options)
        quality = labels.signal_quality(abp, ppg, FS)
        max_age_s = 60 * self.options.max_age
        constant = {key: np.full(n, value) for key, value in self.given.items()}
        table = choose_vitals(self.needed, n, [
            ("option", constant, {}),
            ("cuff", *cuff_at(begin_s + SEGMENT_SECONDS / 2, self.cuff(), max_age_s)),
            ("numbers", *numbers_at(begin_s, channels, source.last, max_age_s)),
            ("abp", label, {}), ("ppg", {"hr": quality["ppg_hr"]}, {})])
        reasons = [labels.reason_names(mask) for mask in quality["reason"]]
        for key in self.needed:
            for i in np.flatnonzero(~np.isfinite(table[key])):
                reasons[i].append(f"no_{key}")
        table.update(start_s=begin_s, refused=np.array([" ".join(names) for names in reasons]),
                     tpp_abp=label["tpp"], r2_abp=label["r2"],
                     abp_in_gate=np.full(n, ""), abp_refused=np.full(n, ""))
        if "abp" in source.channels:
            fields = {**quality, **label, "reason": label["reason"] | quality["reason"]}
            in_gate = passes_gate(self.gate, fields.get, np.ones(n, bool))
            table.update(abp_in_gate=np.where(in_gate, "yes", "no"), abp_refused=np.array(
                [" ".join(labels.reason_names(mask)) for mask in label["reason"]]))
        return ppg, table, ended

    def predict(self, ppg, table):
        """Adds the predictions to the table of `read`: its needed vitals, its minutes not refused.
        """
        if not table:
            return {}
        import torch

        from training_header import watch_features
        fine = table["refused"] == ""
        device, kept = self.model.label_mean.device, []
        inputs = [torch.from_numpy(np.asarray(values[fine], np.float32)).to(device)
                  for values in (ppg[:, None], *(table[key] for key in self.inputs))]
        answer, unlike = np.full((len(fine), 2), np.nan), np.full(len(fine), "", "U3")
        if fine.any():
            with torch.no_grad(), watch_features(self.model, kept.append):
                found = self.model(*inputs).cpu().numpy()
            answer[fine, :found.shape[1]] = found
            novelty = self.calibration.get("novelty") or {}
            if novelty.get("threshold") is not None:
                new = metrics.novelty(np.concatenate(kept), novelty) > novelty["threshold"]
                unlike[fine] = np.where(new, "yes", "no")
        tpp = table["map"] - answer[:, 0] if self.gives_p_crit else answer[:, 0]
        table.update(tpp=tpp, unlike_training=unlike)
        for level in self.levels:
            spread = answer[:, 1] if self.calibration["spread"] else None
            low, high = metrics.interval(tpp, self.calibration, level, spread)
            table.update({f"low_{100 * level:g}": low, f"high_{100 * level:g}": high})
        return table


def on_grid(channel, kind, start_s, n):
    """[n, 3600] float32: minutes of a Channel, NaN where there is none."""
    if channel is None:
        return np.full((n, SEGMENT_SAMPLES), np.nan, np.float32)
    if channel.fs < labels.MIN_FS_HZ:
        raise PredictError(f"the {kind.upper()} channel has {channel.fs:g} samples/s; a "
                           f"waveform needs {labels.MIN_FS_HZ} or more")
    samples = channel.samples * (recordings.mmhg_per_unit(channel.unit) if kind == "abp" else 1)
    moved = recordings.Channel(samples, channel.fs, "", channel.start_s - start_s)
    return recordings.resample(moved, FS, n * SEGMENT_SAMPLES).reshape(n, SEGMENT_SAMPLES)


# ---------------------------------------------------------------- vitals

def choose_vitals(needed, n, sources):
    """The vitals' columns: `needed`, vitals_from, vitals_age_s (the greatest). `sources`, the best
    first, are (name, {vital: [n]}, {vital: [n] age in s}); where one has SBP and DBP, it has PP."""
    values = {key: np.full(n, np.nan) for key in needed}
    came_from = {key: np.full(n, "", "U7") for key in needed}
    ages = np.full(n, np.nan)
    for name, found, age_s in sources:
        if {"sbp", "dbp"} <= set(found) and "pp" not in found:
            found = {**found, "pp": found["sbp"] - found["dbp"]}
            age_s = {"pp": np.fmax(age_s["sbp"], age_s["dbp"]), **age_s} if age_s else {}
        for key in set(needed) & set(found):
            new = ~np.isfinite(values[key]) & np.isfinite(found[key])
            values[key][new], came_from[key][new] = found[key][new], name
            if key in age_s:
                ages[new] = np.fmax(ages[new], age_s[key][new])
    told = [" ".join(f"{key}={came_from[key][i]}" for key in needed if came_from[key][i])
            for i in range(n)]
    return {**values, "vitals_from": np.array(told, str), "vitals_age_s": ages}


def numbers_at(begin_s, channels, last, max_age_s):
    """({vital: [n]}, {vital: [n] age in s}): the mean of the monitor's numbers in each minute from
    begin_s [n] on; where it holds none, the last one before, if not too old. Updates `last`."""
    found, ages = {}, {}
    edges = np.append(begin_s, begin_s[-1] + SEGMENT_SECONDS) - 1e-6
    for key in set(NUMBERS) & set(channels):
        channel, (last_s, last_value) = channels[key], last.get(key, (-np.inf, np.nan))
        known = np.flatnonzero(np.isfinite(channel.samples))
        known = known[channel.start_s + known / channel.fs > last_s]
        times = np.append(last_s, channel.start_s + known / channel.fs)
        values = channel.samples[known] * (
            1 if key == "hr" else recordings.mmhg_per_unit(channel.unit))
        values = np.append(last_value, values)
        at = np.searchsorted(times, edges)
        newest, count = at - 1, np.diff(at)         # before each edge, in each minute
        total = np.diff(np.append(0, values[1:]).cumsum()[newest])
        age_s = begin_s - times[newest[:-1]]
        held = (count == 0) & (age_s <= max_age_s)
        found[key] = np.where(held, values[newest[:-1]], np.nan)
        found[key][count > 0] = (total / np.maximum(count, 1))[count > 0]
        ages[key] = np.where(held, age_s, np.nan)
        last[key] = times[newest[-1]], values[newest[-1]]
    return found, ages


def cuff_at(times_s, readings, max_age_s):
    """({vital: [n]} between readings by straight lines, {vital: [n] s since the last reading});
    NaN where no reading is within max_age_s."""
    found, ages = {}, {}
    for key, (at_s, values) in readings.items():
        nearest = np.abs(times_s[:, None] - at_s).min(1)
        found[key] = np.where(nearest <= max_age_s, np.interp(times_s, at_s, values), np.nan)
        before = np.searchsorted(at_s, times_s, side="right") - 1
        ages[key] = times_s - at_s[np.maximum(before, 0)]       # negative before the first
    return found, ages


def read_cuff(path, growing):
    """{vital: (times in s, values)} of a CSV, where cells may be empty; {} without one."""
    if path is None:
        return {}
    names, _, blocks = recordings.open_csv(path, growing)
    short = [recordings.plain_name(name) for name in names]
    times = [name for name, plain in zip(names, short) if plain in recordings.TIME_NAMES]
    columns = {key: recordings.choose_channel(names, key) for key in NUMBERS}
    columns["pp"] = names[short.index("pp")] if "pp" in short else None
    columns = {key: name for key, name in columns.items() if name}
    if not times or not columns:
        raise RecordingError(path, "expected the columns time_s (seconds from the recording's "
                             "start) and any of " + ", ".join(VITALS))
    parts, readings = [], {}
    for part, ended in blocks([times[0], *columns.values()]):
        parts.append(part)
        if ended:
            break
    at_s, *values = map(np.concatenate, zip(*parts))
    for key, column in zip(columns, values):
        known = ~np.isnan(column)
        wrong = known & ~(np.isfinite(at_s) & (column > 0) & (column < HIGHEST))
        if wrong.any():
            raise RecordingError(path, f"row {wrong.argmax() + 1}, {key}: expected a time in s and "
                                       f"a number above 0 and below {HIGHEST}")
        if (np.diff(at_s[known]) <= 0).any():
            raise RecordingError(path, f"column {key}: times do not increase")
        if known.any():
            readings[key] = at_s[known], column[known]
    return readings


# ---------------------------------------------------------------- what is told

def as_text(table):
    """{column: its cells}: numbers with two decimals, nothing for what is not known."""
    def cell(value, decimals):
        if isinstance(value, str):
            return value
        return "" if math.isnan(value) else f"{value:.{decimals}f}"
    return {key: [cell(value, 0 if key.endswith("_s") else 2) for value in column]
            for key, column in table.items()}


def tell(table, needed):
    """Prints what the minutes say together."""
    tpp = table["tpp"]
    done = np.isfinite(tpp)
    counts = Counter(" ".join(table["refused"]).split())
    print(f"{len(tpp):,} minutes, {done.sum():,} with TPP"
          + (f", median {np.median(tpp[done]):.1f} mmHg" if done.any() else "")
          + (f"; refused: {', '.join(f'{name} {n:,}' for name, n in counts.items())}" if counts
             else ""))
    counts = Counter(" ".join(table["vitals_from"]).split())
    for key in needed:
        sources = [f"{name.split('=')[1]} ({n:,} min)" for name, n in counts.items()
                   if name.startswith(f"{key}=")]
        print(f"{key} from: " + (", ".join(sources) or "nothing"))
    new = np.sum(table["unlike_training"] == "yes")
    if new:
        print(f"{new:,} of {done.sum():,} minutes are unlike the training data (1 in 20 would be "
              "usual): do not trust them")
    both = done & np.isfinite(table["tpp_abp"]) & (table["abp_in_gate"] == "yes")
    if both.any():
        score = metrics.scores(table["tpp_abp"][both], tpp[both])
        print(f"against the arterial line's label in {both.sum():,} minutes that pass the gate: "
              f"RMSE {score['rmse']:.1f}, bias {score['bias']:+.1f} mmHg (fair only if the "
              "checkpoint was not trained on this patient)")


def draw(table, predictor, path):
    """TPP with its band and the label, vitals below, over hours; what was refused is shaded."""
    hours = (table["start_s"] + SEGMENT_SECONDS / 2) / 3600
    lower = {}                  # {unit: vitals}
    for key in predictor.needed:
        lower.setdefault(VITALS[key], []).append(key)
    figure = tk_utils.new_figure(9, 3 + 1.5 * len(lower))
    axes = figure.subplots(1 + len(lower), 1, sharex=True, squeeze=False,
                           gridspec_kw={"height_ratios": [2.2] + [1] * len(lower)})[:, 0]
    top, half = axes[0], SEGMENT_SECONDS / 7200
    edges = np.stack([hours - half, hours + half], 1).ravel()   # a minute is a step of its width
    for level, alpha in ((0.9, 0.2), (0.5, 0.3)):
        if level in predictor.levels:
            low, high = (table[f"{end}_{100 * level:g}"].repeat(2) for end in ("low", "high"))
            top.fill_between(edges, low, high, color=tk_utils.TRAIN_COLOUR, alpha=alpha, lw=0,
                             label=f"{level:.0%} interval")
    top.plot(edges, table["tpp"].repeat(2), color=tk_utils.TRAIN_COLOUR, lw=1, label="TPP")
    label = np.where(table["abp_in_gate"] == "yes", table["tpp_abp"], np.nan)
    if np.isfinite(label).any():
        top.plot(hours, label, ".", color="black", ms=3,
                 label="label from the arterial line,\nwhere the gate passes")
    new = hours[table["unlike_training"] == "yes"]
    if len(new):
        top.plot(new, np.full(len(new), 0.02), "|", color="#b3261e", ms=5,
                 transform=top.get_xaxis_transform(), label="unlike the training data")
    top.set_ylabel("TPP (mmHg)")
    for axis, (unit, keys) in zip(axes[1:], lower.items()):
        for key in keys:
            axis.plot(edges, table[key].repeat(2), lw=1, label=key.upper(),
                      color=f"C{1 + predictor.needed.index(key)}")
        axis.set_ylabel(unit)
    refused = (table["refused"] != "").repeat(2)
    for axis in axes:
        axis.fill_between(edges, 0, 1, where=refused, transform=axis.get_xaxis_transform(),
                          color="0.85", lw=0, zorder=0,
                          label="refused" if axis is top and refused.any() else None)
        axis.legend(frameon=False, fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
        axis.spines[["top", "right"]].set_visible(False)
    axes[-1].set_xlabel("hours from the recording's start")
    axes[-1].set_xlim(hours[0] - half, hours[-1] + half)
    if hours[-1] < 2:
        axes[-1].set_xlabel("minutes from the recording's start")
        axes[-1].xaxis.set_major_formatter(lambda x, _: f"{60 * x:.3g}")
    if predictor.simulated:
        top.set_title("MODEL TRAINED ON SIMULATED PATIENTS", **tk_utils.NOTE_STYLE)
    tk_utils.save_figure(figure, path)


# ---------------------------------------------------------------- following

def watch(predictor, options):
    """Follows a growing file or a folder; adds each full minute to --out once, until SIGINT."""
    is_folder = os.path.isdir(options.recording)
    columns = ["file"] * is_folder + predictor.columns
    folder, name = os.path.split(os.path.abspath(options.out))
    with tk_utils.locked(os.path.join(folder, f".{name}.lock"),
                         f"{options.out}: another --watch is writing it"):
        done = prepare_log(options.out, columns)
        before = sum(done.values())
        stop = threading.Event()        # set by a signal, so that a row is never cut
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: stop.set())
        with open(options.out, "ab", buffering=0) as log:
            def follow(source, file=""):
                """Adds the minutes of a recording that are not in the log, to its present end."""
                ended = False
                while not ended and not stop.is_set():
                    table, ended = predictor.minutes(source, done[file])
                    if table:
                        n = len(table["tpp"])
                        texts = {"file": [file] * n, **as_text(table)}
                        rows = zip(*(texts[column] for column in columns))
                        log.write("".join(",".join(row) + "\n" for row in rows).encode())
                        os.fsync(log.fileno())
                        done[file] += n

            (watch_folder if is_folder else watch_file)(predictor, options, follow, stop)
    print(f"stopped; {sum(done.values()) - before:,} minutes added to {options.out}")
    return 0


def prepare_log(path, columns):
    """{file number, or '' without: minutes that the file holds}; makes it, and cuts off a row that
    was not finished."""
    header = (",".join(columns) + "\n").encode()
    if not os.path.exists(path) or not os.path.getsize(path):
        with tk_utils.atomic_file(path, "wb") as file:
            file.write(header)
    done = Counter()
    with open(path, "rb+") as file:
        if file.readline() != header:
            raise PredictError(f"{path}: was not written by --watch with this checkpoint and these "
                               "options; give another --out")
        size = file.tell()
        for line in file:
            if not line.endswith(b"\n"):
                break
            size += len(line)
            done[line.split(b",")[0].decode() if columns[0] == "file" else ""] += 1
        file.truncate(size)
    return done


def watch_file(predictor, options, follow, stop):
    (found,) = recordings.find_recordings([options.recording])
    source = predictor.open(found.path, growing=True)
    predictor.check_vitals(options.recording, source.channels)
    while not stop.is_set():
        follow(source)
        stop.wait(options.poll)


def watch_folder(predictor, options, follow, stop):
    """Each file is a recording of its own, read when it has not changed between two looks. The
    rows name it by number; which is which stands in the private <out>_files.csv."""
    names_path = os.path.splitext(options.out)[0] + "_files.csv"
    numbers, waiting, finished = read_names(names_path), {}, {}
    own = {os.path.realpath(path) for path in (options.out, names_path, options.vitals) if path}
    while not stop.is_set():
        paths = []
        with contextlib.suppress(RecordingError):       # there may be none yet
            paths = [found.path for found in recordings.find_recordings([options.recording])]
        for path in paths:
            if os.path.realpath(path) in own or stop.is_set():
                continue
            name, stamp = os.path.relpath(path, options.recording), stamp_of(path)
            if finished.get(name) == stamp or waiting.get(name) != stamp:
                waiting[name] = stamp
                continue
            finished[name] = waiting.pop(name)
            if name not in numbers:
                numbers[name] = str(len(numbers) + 1)
                write_names(names_path, numbers)
            shown = f"file {numbers[name]} of the folder"
            try:
                source = predictor.open(path)
                predictor.check_vitals(shown, source.channels)
                follow(source, numbers[name])
            except RecordingError as error:
                print(f"{shown}: {error.what}", file=sys.stderr, flush=True)
            except PredictError as error:
                print(error, file=sys.stderr, flush=True)
        stop.wait(options.poll)


def stamp_of(path):
    """Sizes and times of a recording's files (a WFDB header's data lie beside it)."""
    stats = [os.stat(path)]
    if path.endswith(".hea"):
        with os.scandir(os.path.dirname(path) or ".") as entries:
            stats += [entry.stat() for entry in entries
                      if entry.name.startswith(recordings.recording_name(path))]
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

def export(predictor, origin, options):
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
    model, calibration, vitals = predictor.model, predictor.calibration, predictor.needed
    half = None
    if EXPORT_LEVEL in predictor.levels:
        half = calibration["half_widths"][calibration["levels"].index(EXPORT_LEVEL)]
    elif calibration:
        print(f"no {EXPORT_LEVEL:.0%} interval in this calibration: the file gives TPP alone",
              file=sys.stderr)

    class RawUnits(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, ppg, *given):
            # The first sample off first: in float32 a mean of large numbers loses digits.
            answer = self.model(ppg - ppg[:, :, :1], *given[:len(predictor.inputs)])
            tpp = answer[:, 0]
            if predictor.gives_p_crit:
                tpp = given[vitals.index("map")] - tpp
            if half is None:
                return tpp
            width = half * answer[:, 1] if calibration["spread"] else half
            return tpp, tpp - width, tpp + width

    names = ["ppg", *vitals]
    outputs = ["tpp"] + ["low", "high"] * (half is not None)
    inputs = check_inputs(predictor, options)
    buffer = io.BytesIO()
    old = {"dynamo": False} if "dynamo" in inspect.signature(torch.onnx.export).parameters else {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")         # that the tracer keeps sizes as constants
        torch.onnx.export(RawUnits().eval(), tuple(torch.from_numpy(x[:2]) for x in inputs), buffer,
                          input_names=names, output_names=outputs, opset_version=EXPORT_OPSET,
                          do_constant_folding=False,    # it loses one of two equal parameters
                          dynamic_axes={name: {0: "batch"} for name in names + outputs}, **old)
    graph = onnx.load_from_string(buffer.getvalue())
    notes = {"inputs": "ppg [batch, 1, 3600] 60 s at 60 Hz in any unit; " + ", ".join(
                 f"{key} [batch] {VITALS[key]}" for key in vitals),
             "outputs": f"{', '.join(outputs)} [batch] mmHg"
                        + f"; low to high: {EXPORT_LEVEL:.0%} interval" * (half is not None),
             "trained_on": origin, "use": "research only; no medical device"}
    onnx.helper.set_model_props(graph, notes)
    onnx.checker.check_model(graph)
    data = graph.SerializeToString()
    quiet = onnxruntime.SessionOptions()
    quiet.log_severity_level = 3                # errors alone; it warns of what it cannot speed up
    session = onnxruntime.InferenceSession(data, quiet, providers=["CPUExecutionProvider"])
    differences = []
    for rows in (slice(None), slice(0, 1), slice(1, 8)):
        given = [x[rows] for x in inputs]
        expected = predictor.predict(given[0][:, 0], dict(
            zip(vitals, given[1:]), refused=np.full(len(given[0]), "")))
        for name, values in zip(outputs, session.run(None, dict(zip(names, given)))):
            wanted = expected[name if name == "tpp" else f"{name}_{100 * EXPORT_LEVEL:g}"]
            differences.append(np.abs(values - wanted).max())
    worst = np.max(differences)                 # NaN if one is
    if not worst <= EXPORT_TOLERANCE:
        raise PredictError(f"{options.export}: not written, as onnxruntime differs from PyTorch by "
                           f"{worst:.2g} mmHg (at most {EXPORT_TOLERANCE:g} is allowed)")
    with tk_utils.atomic_file(options.export, "wb") as file:
        file.write(data)
    print(f"written: {options.export}; at most {worst:.1g} mmHg from PyTorch on "
          f"{len(inputs[0])} segments")
    return 0


def check_inputs(predictor, options):
    """[PPG [n, 1, 3600], vitals [n] ...]: the first clean minutes of RECORDING, or simulated ones,
    at many gains and offsets; vitals at random."""
    rng, n = np.random.default_rng(0), EXPORT_SEGMENTS
    if options.recording:
        (found,) = recordings.find_recordings([options.recording])
        source, clean, first, ended = predictor.open(found.path), [], 0, False
        while not ended and len(clean) < n:
            ppg, _, ended = predictor.read(source, first)
            clean += list(ppg[labels.ppg_reasons(ppg, FS) == 0])
            first += BLOCK_MINUTES
        if not clean:
            raise PredictError(f"{options.recording}: no clean minute of PPG to check the export "
                               "with")
        ppg = np.stack([clean[i % len(clean)] for i in range(n)])
    else:
        rate, share = (rng.uniform(*ends, (n, 1)) for ends in ((0.7, 2.5), (0.1, 0.6)))
        phase = 2 * np.pi * rate * np.arange(SEGMENT_SAMPLES) / FS
        ppg = np.sin(phase) + share * np.sin(2 * phase - 1)
        ppg += 0.2 * np.sin(phase / 5) + 0.02 * rng.standard_normal(ppg.shape)     # breath, noise
    ppg = ppg + rng.uniform(-100, 100, (n, 1)) * ppg.std(1, keepdims=True)
    ppg = ppg * 10 ** rng.uniform(-3, 3, (n, 1))
    usual = predictor.model.normaliser
    numbers = [rng.normal(usual[key]["mean"], usual[key]["sd"], n) if key in usual
               else rng.uniform(50, 110, n) for key in predictor.needed]
    return [x.astype(np.float32) for x in (ppg[:, None], *numbers)]


if __name__ == "__main__":
    sys.exit(tk_utils.run_script(main, "CheckpointError", "DataError", "TrainingError",
                                 PredictError, RecordingError))
