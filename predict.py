"""A checkpoint and new recordings -> TPP minute by minute, with interval, vitals and quality.

    python predict.py runs/M1.5.pth RECORDING --out tpp.csv --figure tpp.png
    python predict.py runs/M1.5.pth RECORDING --map 75 --dbp 55         # no arterial line
    python predict.py runs/M1.5.pth RECORDING --vitals cuff.csv         # time_s,map,dbp
    python predict.py runs/M1.5.pth FOLDER --out tpp.csv                # all of its recordings
    python predict.py runs/M1.5.pth --export model.onnx                 # for other programs

    table = predict_recording("runs/M1.5.pth", "night.csv", map=75, dbp=55)     # from Python

Each vital that the network needs comes, minute by minute, from the first of these that has it: an
option, the CSV of --vitals, the arterial waveform, the monitor's numbers of the arterial line,
those of a cuff, and, for the heart rate, the PPG. Where there is an arterial waveform, the label is
computed as well.

Needs training_header (and what it needs), recordings, signals, labels, metrics beside it.
"""

import argparse
import datetime
import inspect
import io
import os
import sys
import warnings
from collections import Counter
from dataclasses import replace
from typing import Dict

import numpy as np
import pandas as pd
import torch
from pandas.api.types import is_numeric_dtype

import labels
import metrics
import recordings
import report
import signals
import tk_utils
import training_header as header
from datasets import (
    FIELDS,
    FS,
    SEGMENT_SAMPLES,
    SEGMENT_SECONDS,
    VITALS,
    WINDOW,
    DataError,
    get_gate,
    passes_gate,
)
from recordings import RecordingError
from tk_utils import counted

MAX_AGE_S = 30 * 60.0           # how long a reading or a monitor's number is held
MAX_TPP = 500.0                 # mmHg; a larger answer is not a perfusion pressure
EXPORT_LEVEL = 0.9
EXPORT_TOLERANCE = 1e-3         # mmHg
EXPORT_OPSET = 17               # the highest that PyTorch 2.0 writes
EXPORT_SEGMENTS = 64            # that an export is checked with


class PredictError(ValueError):
    """The request cannot be fulfilled; the message is one line."""


def parse_arguments(arguments=None):
    parser = tk_utils.ScriptParser(description=__doc__,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("checkpoint", help="runs/<name>.pth, as train_resnet.py writes it")
    add("recordings", nargs="*", metavar="RECORDING",
        help="recordings in any format that prepare.py reads, or folders of them")
    add("--out", metavar="CSV", help="write a row for each minute (default: print a table)")
    add("--figure", metavar="PNG", help="draw TPP and the vitals over time (.png, .pdf, .svg)")
    add("--model", metavar="NAME", help="the network, if it is one of your own: file.py:Name")
    add("--export", metavar="ONNX", help="write the network: raw units in, mmHg out; checked on "
        "RECORDING's minutes, or on simulated ones")
    add = parser.add_argument_group("vitals").add_argument
    for key in ("map", "dbp", "hr"):
        unit = FIELDS[key].unit
        add(f"--{key}", type=float, metavar=unit.split("/")[0].upper(),
            help=f"{key.upper()} of all minutes, {unit}")
    add("--vitals", metavar="CSV", help="readings: time_s (from the recording's start) and any of "
        f"{', '.join(VITALS)}; each is held until the next, at most {MAX_AGE_S / 60:g} minutes")
    recordings.add_channel_options(parser)
    options = parser.parse_intermixed_args(arguments)
    if not options.recordings and not options.export:
        parser.error(f"expected CHECKPOINT RECORDING (or --export FILE), got {options.checkpoint}")
    for name, endings in (("figure", (".png", ".pdf", ".svg")), ("export", (".onnx",)),
                          ("out", (".csv",))):
        path = getattr(options, name)
        if path and not path.lower().endswith(endings):
            parser.error(f"--{name} {path}: expected a name that ends in {' or '.join(endings)}")
    return options


def main(arguments=None):
    options = parse_arguments(arguments)
    model = header.load_model(options.checkpoint, header.choose_device(), options.model)
    given = {key: getattr(options, key) for key in ("map", "dbp", "hr")
             if getattr(options, key) is not None}
    predictor = Predictor(model, options.checkpoint, given, options.vitals,
                          **recordings.channel_options(options))
    found = recordings.find_recordings(options.recordings) if options.recordings else []
    outputs = [options.out, options.figure, options.export]
    outputs += [names_path(options.out)] if options.out else []
    inputs = [path for item in found for path in recordings.files_of(item.path)]
    for path in filter(None, outputs):
        tk_utils.check_writable(path, [*inputs, options.checkpoint, options.vitals])
    for path in outputs[:1] + outputs[3:]:
        check_ours(path)
    if options.export:
        export(predictor, found, options.export)
        print(*predictor.remarks, sep="\n", end="\n" * bool(predictor.remarks))
        return 0
    if options.figure and len(found) > 1:
        raise PredictError(f"--figure draws one recording, and {len(found)} are given")
    if predictor.simulated:
        print("*** MODEL TRAINED ON SIMULATED PATIENTS ***")
    table = predictor.table(found)
    print_summary(table, predictor)
    if options.out:
        write_csv(table, options.out)
        print(f"written: {options.out}")
    else:
        print_minutes(table, predictor)
    if options.figure:
        tk_utils.save_figure(draw(table, predictor), options.figure)
        print(f"written: {options.figure}")
    return int(bool(table.attrs["failed"]))


def check_ours(path):
    """Raises PredictError if a table is in the way that this program has not written."""
    if path and os.path.exists(path):
        with open(path, encoding="utf-8", errors="replace") as file:
            first = file.readline(1000)
        if first.rstrip() != recordings.PRIVATE_LINE and "tpp," not in first:
            raise PredictError(f"{path}: was not written by predict.py; give another --out")


# -------------------------------------------------------------------------------------- from Python

def predict_recording(model_or_path, recording, map=None, dbp=None, hr=None, vitals=None,
                      channels=None, units=None, fs=None, network=None) -> pd.DataFrame:
    """TPP of each minute of a recording.

    model_or_path: a `NormalisedModel` or a checkpoint; network: your own module, if the checkpoint
    holds its weights. recording: a path, a folder, or a list of them. map, dbp (mmHg), hr
    (beats/min): for all minutes; vitals: path of a CSV of readings. channels: {'abp': name or
    'none', 'ppg': name}; units: {channel: unit}; fs: Hz.

    Returns a row a minute: start_s; clock (time of day, where the recording has it); tpp and
    low_90, high_90, … (mmHg; NaN in refused minutes); refused (reasons); unlike_training ('yes',
    'no'); each needed vital with <vital>_from and <vital>_age_s; values_refused (implausible values
    in that minute); and where there is an arterial line tpp_abp, r2_abp, abp_in_gate, abp_refused.
    Several recordings: also `recording` (as given, or numbered if found in a folder; the numbers'
    paths are in .attrs['recordings']).

    Raises PredictError, RecordingError, CheckpointError, DataError.
    """
    model, name = model_or_path, "the model"
    if not isinstance(model, header.NormalisedModel):
        name, model = os.fspath(model), header.load_model(model, network=network)
    given = {key: value for key, value in (("map", map), ("dbp", dbp), ("hr", hr))
             if value is not None}
    predictor = Predictor(model, name, given, vitals, channels=channels or {}, units=units or {},
                          file_fs=fs)
    inputs = recording if isinstance(recording, (list, tuple)) else [recording]
    table = predictor.table(recordings.find_recordings(inputs))
    for line in predictor.remarks:
        warnings.warn(line, stacklevel=2)
    return table


class Predictor:
    """A model with the options of a run.

    needed: the vitals that the network takes, and MAP where it predicts Pcrit: TPP = MAP - Pcrit.
    remarks: what the user must know about intervals and labels.
    """

    def __init__(self, model, name, given, vitals_path, **reading):
        """reading: channels, units and file_fs of recordings.read_windows."""
        self.model, self.name, self.reading, self.remarks = model, name, reading, []
        if not model.with_ppg:
            raise PredictError(f"{name}: this network was trained without the PPG; use evaluate.py")
        self.inputs = list(model.keys[1:-1])
        unknown = [key for key in self.inputs if key not in VITALS]
        if unknown:
            raise PredictError(f"{name}: needs {', '.join(unknown)}, which no recording gives")
        self.gives_p_crit = model.keys[-1] == "p_crit"
        self.needed = list(dict.fromkeys(self.inputs + ["map"] * self.gives_p_crit))
        self.given, self.vitals_path = check_given(given), vitals_path
        about = describe(model)
        self.simulated = "simulated" in about["origin"]
        self.method = about["label_method"]
        if self.method not in labels.METHODS:
            self.remarks.append(f"the network's labels were made with {self.method!r}, which is "
                                "unknown here; labels beside predictions are 'published'")
            self.method = "published"
        # the rules that a minute can be tested for: not those on the encounter
        gate = get_gate(about["condition"])
        known = {*labels.FIELDS, *signals.QUALITY_FIELDS, "n_beats"}
        self.gate = replace(gate, min_minutes=0, comparisons=tuple(
            rule for rule in gate.comparisons if {rule[0], rule[2]} & set(FIELDS) <= known))
        self.calibration, self.levels = self.usable_calibration(
            about["calibration"], about["origin"] or "unknown")

    def usable_calibration(self, calibration, origin):
        """(calibration or {}, levels with an interval); adds to the remarks."""
        if not calibration:
            self.remarks.append(
                "no intervals, and no flag for inputs unlike the training data: the model has no "
                "calibration (make one: evaluate.py CHECKPOINT --calibrate DATA)")
            return {}, []
        if not calibration.get("novelty"):
            self.remarks.append("no flag for inputs unlike the training data: the network has no "
                                "features()")
        refusal = report.domain_refusal({"origin": origin, **calibration}, "recordings")
        if refusal:
            self.remarks.append(f"no prediction intervals: {refusal}")
            return calibration, []
        levels = [level for level, half in zip(calibration["levels"], calibration["half_widths"])
                  if half is not None]
        missing = [f"{level:.0%}" for level in calibration["levels"] if level not in levels]
        if missing:
            self.remarks.append(f"no interval at {', '.join(missing)}: calibrated on "
                                f"{counted(calibration['n_patients'], 'patient')}, too few")
        return calibration, levels

    def table(self, found) -> pd.DataFrame:
        """The rows of all recordings. One that cannot be used raises; of several, it costs a line
        on stderr and stands in .attrs['failed']."""
        tables, failed, names = [], [], {}
        for number, item in enumerate(found, 1):
            in_folder = item.in_folder
            name = str(number) if in_folder else item.typed
            try:
                table = self.one_table(item)
            except (RecordingError, PredictError) as error:
                if len(found) == 1 and not in_folder:
                    raise
                what = error.what if isinstance(error, RecordingError) else error
                print(f"{recordings.shown(found, number - 1)}: {tk_utils.printable(what)}",
                      file=sys.stderr)
                failed.append(name)
                continue
            if len(found) > 1:
                table.insert(0, "recording", name)
                names.update({name: item.path} if in_folder else {})
            tables.append(table)
        if not tables:
            raise PredictError("none of the recordings could be used")
        table = pd.concat(tables, ignore_index=True)
        table.attrs.update(recordings=names, failed=failed)
        return table

    def one_table(self, item):
        """The DataFrame of one recording."""
        with tk_utils.progress(desc="predicting", unit="min") as bar:
            parts = []
            for ppg, table in self.blocks(item):
                parts.append(self.predict(ppg, table))
                bar.update(len(table))
        if not parts:
            raise RecordingError(item.path, "has no uninterrupted minute")
        return pd.concat(parts, ignore_index=True)

    def blocks(self, item):
        """Yields (PPG [n, samples], table of n rows without the predictions)."""
        recorded = recordings.read_windows(item.path, **WINDOW, **self.reading,
                                           polarity=signals.ppg_polarity)
        if "ppg" not in recorded.chosen:
            raise RecordingError(item.typed, f"no PPG: {recorded.reasons['ppg']}; see prepare.py "
                                             "--list-channels and --ppg-channel")
        readings, wrong = {}, {}
        if self.vitals_path:
            readings, wrong = recordings.read_vitals(self.vitals_path, limits=WINDOW["limits"],
                                              units=self.reading["units"],
                                              start_time=recorded.start_time)
        self.check_vitals(item.typed, recorded.chosen, readings)
        for minutes in recorded:
            yield minutes.ppg, self.block(recorded, minutes, readings, wrong)
        self.remarks += [f"{item.typed}: {note}" for note in recorded.notes]

    def check_vitals(self, shown, chosen, readings):
        """Raises PredictError if the recording cannot give what the network needs."""
        if chosen.get("abp"):
            return
        have = {"hr", *self.given, *(key for key in readings if len(readings[key][0])),
                *(kind.replace("cuff_", "") for kind in chosen)}
        have |= {"pp"} if {"sbp", "dbp"} <= have else set()
        missing = [key for key in self.needed if key not in have]
        if missing:
            give = " ".join(f"--{key} {FIELDS[key].unit.split('/')[0].upper()}" for key in missing
                            if key in ("map", "dbp", "hr"))
            raise PredictError(
                f"{shown}: no arterial pressure, and nothing that gives "
                f"{', '.join(key.upper() for key in missing)}, which this network needs; add "
                + f"{give}, or ".lstrip(", or") * bool(give)
                + f"--vitals CSV with the columns time_s,{','.join(missing)}")

    def block(self, recorded, minutes, readings, wrong) -> pd.DataFrame:
        """The vitals, labels and quality of some minutes."""
        n = len(minutes.start_s)
        label = labels.label_segments(minutes.abp, FS, method=self.method)
        quality = signals.signal_quality(minutes.abp, minutes.ppg, FS)
        sources = [("option", {key: np.full(n, value) for key, value in self.given.items()}, {}),
                   ("vitals", *held(readings, minutes.start_s)),
                   ("abp", {key: label[key] for key in VITALS if key in label}, {}),
                   *numbers_of(minutes), ("ppg", {"hr": quality["ppg_hr"]}, {})]
        table = choose_vitals(self.needed, n, sources)
        reasons = [signals.reason_names(mask) for mask in quality["reason"]]
        for key in self.needed:
            for i in np.flatnonzero(~np.isfinite(table[key])):
                reasons[i].append(f"no_{key}")
        if {"map", "dbp"} <= set(self.needed):
            for i in np.flatnonzero(table["dbp"] >= table["map"]):
                reasons[i].append("dbp_above_map")
        table.insert(0, "start_s", minutes.start_s)
        if recorded.start_time is not None:
            table.insert(1, "clock", [
                (recorded.start_time + datetime.timedelta(seconds=float(s))).strftime("%H:%M:%S")
                for s in minutes.start_s])
        table["refused"] = [" ".join(names) for names in reasons]
        refused = Counter()     # {vital: [n] readings that no person has}
        for key, counts in minutes.refused.items():
            refused[key.replace("cuff_", "")] = refused[key.replace("cuff_", "")] + counts
        for key, times_s in wrong.items():
            within = (times_s >= minutes.start_s[:, None]) & (
                times_s < minutes.start_s[:, None] + SEGMENT_SECONDS)
            refused[key] = refused[key] + within.sum(1)
        table["values_refused"] = [
            " ".join(f"{key} {refused[key][i]}" for key in VITALS if np.any(refused[key])
                     and refused[key][i]) for i in range(n)]
        if recorded.chosen.get("abp"):
            fields = {**quality, **label, "reason": label["reason"] | quality["reason"]}
            passes = passes_gate(self.gate, fields.get, np.isfinite(minutes.ppg).all(1))
            table["tpp_abp"], table["r2_abp"] = label["tpp"], label["r2"]
            table["abp_in_gate"] = np.where(passes, "yes", "no")
            table["abp_refused"] = [" ".join(signals.reason_names(mask))
                                    for mask in label["reason"]]
        return table

    def predict(self, ppg, table) -> pd.DataFrame:
        """The table of `block` with tpp, intervals and unlike_training."""
        fine = (table["refused"] == "").to_numpy()
        answer, unlike = np.full((len(table), 2), np.nan), np.full(len(table), "", object)
        novelty = self.calibration.get("novelty") or {}
        if fine.any():
            inputs = [torch.from_numpy(np.asarray(values[fine], np.float32)).to(
                next(self.model.buffers()).device)
                for values in (ppg[:, None], *(table[key].to_numpy() for key in self.inputs))]
            with torch.no_grad():
                found, features = self.model.with_features(*inputs)     # [minutes, 1 or 2], [., F]
            answer[fine, :found.shape[1]] = found.cpu().numpy()
            if features is not None and novelty.get("threshold") is not None:
                away = metrics.novelty(features.cpu().numpy(), novelty) > novelty["threshold"]
                unlike[fine] = np.where(away, "yes", "no")
        tpp = table["map"].to_numpy() - answer[:, 0] if self.gives_p_crit else answer[:, 0]
        if not (np.abs(tpp[fine]) <= MAX_TPP).all():
            worst = tpp[fine][np.argmax(~(np.abs(tpp[fine]) <= MAX_TPP))]
            raise header.CheckpointError(
                f"{self.name}: its answer is {worst:.6g} mmHg, which is no tissue perfusion "
                "pressure; the network is damaged or not trained")
        at = table.columns.get_loc(self.needed[0]) if self.needed else len(table.columns)
        columns = {"tpp": tpp}
        for level in self.levels:
            ends = metrics.interval(tpp, self.calibration, level,
                                    answer[:, 1] if self.calibration.get("spread") else None)
            columns.update(zip((f"low_{100 * level:g}", f"high_{100 * level:g}"), ends))
        columns["refused"] = table.pop("refused")
        if novelty:
            columns["unlike_training"] = unlike
        for name, values in reversed(list(columns.items())):
            table.insert(at, name, values)
        return table


def describe(model) -> Dict:
    """origin, label_method, condition and calibration of the model's checkpoint, if it has one."""
    checkpoint = getattr(model, "checkpoint", None) or {}
    provenance = checkpoint.get("provenance") or {}
    return {"origin": provenance.get("origin", ""),
            "label_method": provenance.get("label_method", "published"),
            "condition": (checkpoint.get("config") or {}).get("condition", "default"),
            "calibration": checkpoint.get("calibration") or {}}


# ------------------------------------------------------------------------------------------- vitals

def check_given(given) -> Dict[str, float]:
    """Vitals given as options; raises PredictError if no person has them."""
    for key, value in given.items():
        low, high = WINDOW["limits"][key]
        if not low <= value <= high:
            raise PredictError(f"--{key} {value:g}: expected {low:g} to {high:g} "
                               f"{FIELDS[key].unit}")
    if {"map", "dbp"} <= set(given) and given["dbp"] >= given["map"]:
        raise PredictError(f"--dbp {given['dbp']:g}: expected less than --map {given['map']:g}")
    return given


def held(readings, start_s):
    """({vital: [n] values}, {vital: [n] ages in s}): the last reading before the end of each minute
    that begins at start_s [n]. Ages are at the minute's end."""
    values, ages = {}, {}
    end_s = np.asarray(start_s) + SEGMENT_SECONDS
    for key, (times_s, numbers) in readings.items():
        last = np.searchsorted(times_s, end_s, side="left") - 1
        values[key] = np.where(last >= 0, numbers[np.maximum(last, 0)], np.nan)
        ages[key] = np.where(last >= 0, end_s - times_s[np.maximum(last, 0)], np.nan)
    return values, ages


def numbers_of(minutes):
    """The monitor's numbers as sources: those of the arterial line, then those of a cuff."""
    for name, is_cuff in (("numbers", False), ("cuff", True)):
        keys = [key for key in minutes.numbers if key.startswith("cuff_") == is_cuff]
        yield (name, {key.replace("cuff_", ""): minutes.numbers[key] for key in keys},
               {key.replace("cuff_", ""): minutes.number_age_s[key] for key in keys})


def choose_vitals(needed, n, sources) -> pd.DataFrame:
    """[n] rows: each needed vital with <vital>_from and <vital>_age_s, from the first source that
    has it, plausible and at most MAX_AGE_S old. sources: (name, {vital: [n]}, {vital: [n] age in
    s}); SBP and DBP of one source give PP."""
    columns = {}
    for key in needed:
        value, came_from, age = (np.full(n, np.nan), np.full(n, "", object), np.full(n, np.nan))
        for name, found, ages in sources:
            if key == "pp" and "pp" not in found and {"sbp", "dbp"} <= set(found):
                found = {"pp": found["sbp"] - found["dbp"]}
                ages = {"pp": np.fmax(ages["sbp"], ages["dbp"])} if ages else {}
            if key not in found:
                continue
            low, high = WINDOW["limits"].get(key, (-np.inf, np.inf))
            age_s = ages.get(key, np.zeros(n))
            new = np.isnan(value) & (found[key] >= low) & (found[key] <= high)
            new &= age_s <= MAX_AGE_S
            value[new], came_from[new] = found[key][new], name
            age[new] = age_s[new] if key in ages else np.nan
        columns.update({key: value, f"{key}_from": came_from, f"{key}_age_s": age})
    return pd.DataFrame(columns, index=range(n))


# ------------------------------------------------------------------------------------------- output

def names_path(out):
    return os.path.splitext(out)[0] + "_recordings.csv"


def write_csv(table, path):
    """The table as CSV, two decimals; names of files found in a folder go to a private file."""
    cells = {name: column.astype(np.float64).round(2) if is_numeric_dtype(column)
             else column for name, column in table.items()}
    with tk_utils.atomic_file(path, newline="") as file:
        pd.DataFrame(cells).to_csv(file, index=False, lineterminator="\n")
    names = table.attrs.get("recordings")
    if names:
        with tk_utils.atomic_file(names_path(path), newline="") as file:
            file.write(recordings.PRIVATE_LINE + "\n")
            pd.DataFrame(list(names.items()), columns=["recording", "path"]).to_csv(
                file, index=False, lineterminator="\n")
        print(f"written: {names_path(path)}, which is private: the recordings' names")


def print_minutes(table, predictor):
    """A line a minute, at most 100 columns; columns without content are left out."""
    def numbers(values):
        return [f"{value:.1f}" if np.isfinite(value) else "" for value in values]

    columns = {name: table[name] for name in ("recording", "clock") if name in table}
    if "clock" not in table:
        columns["minute"] = [f"{s / 60:g}" if s % 60 == 0 else f"{s / 60:.2f}"
                             for s in table["start_s"]]
    columns["TPP"] = [text or "\u2013" for text in numbers(table["tpp"])]
    if predictor.levels:
        level = min(predictor.levels, key=lambda level: abs(level - EXPORT_LEVEL))
        low, high = (numbers(table[f"{end}_{100 * level:g}"]) for end in ("low", "high"))
        columns[f"{level:.0%} interval"] = [a and f"{a} to {b}" for a, b in zip(low, high)]
    sources = [table[f"{key}_from"] for key in predictor.needed]
    columns.update({key.upper(): numbers(table[key]) for key in predictor.needed})
    columns["from"] = [" ".join(dict.fromkeys(filter(None, row))) for row in zip(*sources)]
    if "tpp_abp" in table:
        columns["label"] = [text and text + "*" * (passes == "no") for text, passes in zip(
            numbers(table["tpp_abp"]), table["abp_in_gate"])]
    if "unlike_training" in table:
        columns["unlike"] = table["unlike_training"].replace("no", "")
    columns["refused"] = table["refused"]
    columns = {name: list(values) for name, values in columns.items() if any(values)}
    tk_utils.print_table(list(zip(*columns.values())), list(columns))
    if any(text.endswith("*") for text in columns.get("label", [])):
        print("* this minute's label does not pass the gate")


def print_summary(table, predictor):
    """What the minutes say together."""
    done = np.isfinite(table["tpp"])
    reasons = Counter(" ".join(table["refused"]).split())
    print(f"{counted(len(table), 'minute')}, {done.sum():,} with TPP"
          + (f", median {table['tpp'][done].median():.1f} mmHg" if done.any() else "")
          + ("; refused: " + ", ".join(f"{name} {n:,}" for name, n in reasons.items())
             if reasons else ""))
    for key in predictor.needed:
        counts = table[f"{key}_from"][table[f"{key}_from"] != ""].value_counts()
        age_s = table[f"{key}_age_s"].max()
        print(f"{key.upper()} from: "
              + (", ".join(f"{name} ({n:,} min)" for name, n in counts.items()) or "nothing")
              + (f"; held for up to {age_s / 60:.0f} min" if age_s > SEGMENT_SECONDS else ""))
    wrong = Counter()
    for text in table["values_refused"]:
        words = text.split()
        wrong.update(dict(zip(words[::2], map(int, words[1::2]))))
    if wrong:
        print("implausible values refused (by minute in the column values_refused): "
              + ", ".join(f"{key.upper()} {n:,}" for key, n in wrong.items()))
    if "unlike_training" in table and (table["unlike_training"] == "yes").any():
        print(f"{(table['unlike_training'] == 'yes').sum():,} of {counted(done.sum(), 'minute')} "
              "are unlike the training data (1 in 20 would be usual): do not rely on them")
    if "tpp_abp" in table:
        both = done & np.isfinite(table["tpp_abp"]) & (table["abp_in_gate"] == "yes")
        if both.any():
            score = metrics.scores(table["tpp_abp"][both].to_numpy(), table["tpp"][both].to_numpy())
            print(f"against the label, where it passes the gate ({counted(both.sum(), 'minute')}): "
                  f"RMSE {score['rmse']:.1f}, bias {score['bias']:+.1f} mmHg (fair only "
                  "if this patient was not in the training data)")
    for line in predictor.remarks:
        print(line)


def draw(table, predictor):
    """TPP with its intervals and the label, vitals below; refused minutes are shaded."""
    from matplotlib.ticker import MaxNLocator
    scale, unit = (60.0, "minutes") if table["start_s"].iloc[-1] < 7200 else (3600.0, "hours")
    lower = {}                  # {unit: vitals}
    for key in predictor.needed:
        lower.setdefault(FIELDS[key].unit, []).append(key)
    figure = tk_utils.new_figure(9, 3 + 1.5 * len(lower))
    axes = figure.subplots(1 + len(lower), 1, sharex=True, squeeze=False,
                           gridspec_kw={"height_ratios": [2.2] + [1] * len(lower)})[:, 0]
    start = table["start_s"].to_numpy()
    # a minute is a step of its width; NaN between minutes that do not follow one another
    after_gap = np.flatnonzero(np.diff(start) > SEGMENT_SECONDS * 1.001) + 1
    edges = np.insert(np.stack([start, start + SEGMENT_SECONDS], 1).ravel() / scale,
                      2 * after_gap, np.nan)

    def steps(values):
        return np.insert(np.asarray(values, float).repeat(2), 2 * after_gap, np.nan)

    top = axes[0]
    for level, alpha in ((0.9, 0.2), (0.5, 0.3)):
        if level in predictor.levels:
            ends = (steps(table[f"{end}_{100 * level:g}"]) for end in ("low", "high"))
            top.fill_between(edges, *ends, color=tk_utils.TRAIN_COLOUR, alpha=alpha, lw=0,
                             label=f"{level:.0%} interval")
    top.plot(edges, steps(table["tpp"]), color=tk_utils.TRAIN_COLOUR, lw=1.2, label="TPP")
    middle = (start + SEGMENT_SECONDS / 2) / scale
    if "tpp_abp" in table:
        label = np.where(table["abp_in_gate"] == "yes", table["tpp_abp"], np.nan)
        top.plot(middle, label, ".", color="black", ms=4,
                 label="label from the arterial\nline (passes the gate)")
    if "unlike_training" in table:
        unlike = middle[(table["unlike_training"] == "yes").to_numpy()]
        top.plot(unlike, np.full(len(unlike), 0.02), "|", color="#b3261e", ms=6,
                 transform=top.get_xaxis_transform(), label="unlike the training data")
    top.axhline(metrics.LOW_TPP, color="0.4", lw=0.9, ls="--", label=f"{metrics.LOW_TPP:g} mmHg")
    top.set_ylabel("TPP (mmHg)")
    for axis, (vital_unit, keys) in zip(axes[1:], lower.items()):
        for key in keys:
            axis.plot(edges, steps(table[key]), lw=1.2, label=key.upper(),
                      color=f"C{1 + predictor.needed.index(key)}")
        axis.set_ylabel(vital_unit)
    refused = (table["refused"] != "").to_numpy()
    for axis in axes:
        low, high = axis.get_ylim()
        if high - low < 20:     # do not magnify small changes
            axis.set_ylim((low + high) / 2 - 10, (low + high) / 2 + 10)
        axis.fill_between(edges, 0, 1, where=steps(refused) == 1, color="0.85", lw=0, zorder=0,
                          transform=axis.get_xaxis_transform(),
                          label="refused" if axis is top and refused.any() else None)
        axis.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    axes[-1].set_xlabel(f"{unit} from the recording's start")
    axes[-1].set_xlim(start[0] / scale, (start[-1] + SEGMENT_SECONDS) / scale)
    axes[-1].xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    return tk_utils.finish_figure(
        figure, "MODEL TRAINED ON SIMULATED PATIENTS" if predictor.simulated else None)


# ------------------------------------------------------------------------------------------- export

class RawUnits(torch.nn.Module):
    """ppg [B, 1, 3600] in any unit, needed vitals [B] -> TPP [B], and its interval's ends."""

    def __init__(self, predictor, half):
        super().__init__()
        self.model, self.half = predictor.model, half
        self.n_inputs, self.gives_p_crit = len(predictor.inputs), predictor.gives_p_crit
        self.map_at = predictor.needed.index("map") if self.gives_p_crit else None
        self.scaled = bool(predictor.calibration.get("spread"))

    def forward(self, ppg, *vitals):
        answer = self.model(ppg, *vitals[:self.n_inputs])
        tpp = vitals[self.map_at] - answer[:, 0] if self.gives_p_crit else answer[:, 0]
        if self.half is None:
            return tpp
        width = self.half * answer[:, 1] if self.scaled else self.half
        return tpp, tpp - width, tpp + width


def export(predictor, found, path):
    """Writes the ONNX file, if onnxruntime gives the same answers as PyTorch."""
    try:
        import onnx
        import onnxruntime
    except ModuleNotFoundError as error:
        raise PredictError(f"--export needs the package {error.name}: "
                           "pip install -r requirements-extra.txt") from None
    half = None
    if EXPORT_LEVEL in predictor.levels:
        calibration = predictor.calibration
        half = calibration["half_widths"][calibration["levels"].index(EXPORT_LEVEL)]
    module = RawUnits(predictor, half).cpu().eval()
    names = ["ppg", *predictor.needed]
    outputs = ["tpp", "low", "high"] if half is not None else ["tpp"]
    inputs = example_inputs(predictor, found)
    buffer = io.BytesIO()
    old = {"dynamo": False} if "dynamo" in inspect.signature(torch.onnx.export).parameters else {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")         # that the tracer keeps sizes as constants
        torch.onnx.export(module, tuple(x[:2] for x in inputs), buffer, input_names=names,
                          output_names=outputs, opset_version=EXPORT_OPSET,
                          do_constant_folding=False,    # it loses one of two equal parameters
                          dynamic_axes={name: {0: "batch"} for name in names + outputs}, **old)
    graph = onnx.load_from_string(buffer.getvalue())
    onnx.helper.set_model_props(graph, {
        "inputs": f"ppg [batch, 1, {SEGMENT_SAMPLES}] {SEGMENT_SECONDS} s at {FS} Hz in any unit; "
                  + ", ".join(f"{key} [batch] {FIELDS[key].unit}" for key in predictor.needed),
        "outputs": f"{', '.join(outputs)} [batch] mmHg"
                   + (f"; low to high: {EXPORT_LEVEL:.0%} interval" if half is not None else ""),
        "trained_on": describe(predictor.model)["origin"],
        "use": "research only; no medical device"})
    onnx.checker.check_model(graph)
    data = graph.SerializeToString()
    quiet = onnxruntime.SessionOptions()
    quiet.log_severity_level = 3                # errors only
    session = onnxruntime.InferenceSession(data, quiet, providers=["CPUExecutionProvider"])
    differences = []
    for rows in (slice(None), slice(0, 1), slice(1, 8)):
        part = [x[rows] for x in inputs]
        with torch.no_grad():
            wanted = module(*part)
        wanted = wanted if isinstance(wanted, tuple) else (wanted,)
        answers = session.run(None, {name: x.numpy() for name, x in zip(names, part)})
        differences += [np.abs(a - w.numpy()).max() for a, w in zip(answers, wanted)]
    worst = np.max(differences)                 # NaN if one is
    if not worst <= EXPORT_TOLERANCE:
        raise PredictError(f"{path}: not written, as onnxruntime differs from PyTorch by "
                           f"{worst:.2g} mmHg (at most {EXPORT_TOLERANCE:g} is allowed)")
    with tk_utils.atomic_file(path, "wb") as file:
        file.write(data)
    print(f"written: {path}; at most {worst:.1g} mmHg from PyTorch on {len(inputs[0])} segments")


def example_inputs(predictor, found):
    """[PPG [n, 1, 3600], needed vitals [n], …]: clean minutes of the recordings, or simulated ones,
    at many gains and offsets; random vitals."""
    rng, n = np.random.default_rng(0), EXPORT_SEGMENTS
    clean = []
    for item in found:
        for minutes in recordings.read_windows(item.path, **WINDOW, **predictor.reading):
            clean += list(minutes.ppg[signals.ppg_reasons(minutes.ppg, FS) == 0])
            if len(clean) >= n:
                break
    if found and not clean:
        raise PredictError(f"{found[0].typed}: no clean minute of PPG to check the export with")
    if clean:
        ppg = np.stack([clean[i % len(clean)] for i in range(n)]).astype(float)
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
    return [torch.from_numpy(x.astype(np.float32)) for x in (ppg[:, None], *numbers)]


if __name__ == "__main__":
    sys.exit(tk_utils.run_script(main, header.CheckpointError, DataError, PredictError,
                                 RecordingError, MemoryError))
