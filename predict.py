"""A checkpoint and new recordings -> TPP minute by minute, with interval, vitals and quality.

    python predict.py runs/M1.5.pth RECORDING --out tpp.csv --figure tpp.png
    python predict.py runs/M1.5.pth RECORDING --map 75 --dbp 55         # no arterial line
    python predict.py runs/M1.5.pth RECORDING --vitals cuff.csv         # time_s,map,dbp
    python predict.py runs/M1.5.pth FOLDER --out tpp.csv                # all of its recordings
    python predict.py runs/M1.5.pth --export model.onnx                 # for other programs

    table = predict_recording("runs/M1.5.pth", "night.csv", map=75, dbp=55)     # from Python

Each minute takes a vital from the first source that has it: an option, the CSV of --vitals, the
arterial waveform, the monitor's numbers (of the line, then of a cuff) and, for HR, the PPG. Needs
training_header and recordings with what they need, signals, labels, metrics, report, templates/.
"""
import argparse
import inspect
import io
import os
import sys
import warnings
from dataclasses import replace

import numpy as np
import pandas as pd
import torch

import datasets
import labels
import metrics
import recordings
import report
import signals
import tk_utils
import training_header as header
from checkpoint import run_of
from datasets import FIELDS, FS, SEGMENT_SAMPLES, SEGMENT_SECONDS, VITALS, WINDOW, DataError
from recordings import MAX_AGE_S, RecordingError
from tk_utils import counted

EXPORT_LEVEL = 0.9
EXPORT_TOLERANCE = 1e-3         # mmHg
EXPORT_SEGMENTS = 64            # an export is checked on so many


def parse_arguments(arguments=None):
    parser = tk_utils.ScriptParser(description=__doc__,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("checkpoint", help="runs/<name>.pth, as train_resnet.py writes it")
    add("recordings", nargs="*", metavar="RECORDING",
        help="recordings in any format that prepare.py reads, or folders of them")
    add("--out", metavar="CSV", help="write a row for each minute (default: print a table)")
    add("--figure", metavar="FILE",
        help="draw TPP and the vitals over time (.png, .pdf, .svg; .html shows values on hovering)")
    add("--model", metavar="NAME", help="the network, if it is your own: file.py:Name")
    add("--export", metavar="ONNX", help="write the network: raw units in, mmHg out")
    add = parser.add_argument_group("vitals").add_argument
    for key in ("map", "dbp", "hr"):
        unit = FIELDS[key].unit
        add(f"--{key}", type=float, metavar=unit.split("/")[0].upper(),
            help=f"{key.upper()} for all minutes, {unit}")
    add("--vitals", metavar="CSV", help="readings: time_s (from the recording's start) and any of "
        f"{', '.join(VITALS)}; each is held until the next, at most {MAX_AGE_S / 60:g} minutes")
    recordings.add_channel_options(parser)
    options = parser.parse_intermixed_args(arguments)
    if not options.recordings and not options.export:
        parser.error(f"expected CHECKPOINT RECORDING (or --export FILE), got {options.checkpoint}")
    for name, endings in (("figure", (".png", ".pdf", ".svg", ".html")), ("export", (".onnx",)),
                          ("out", (".csv",))):
        path = getattr(options, name)
        if path and not path.lower().endswith(endings):
            parser.error(f"--{name} {path}: expected a name that ends in {' or '.join(endings)}")
    return options


def main(arguments=None):
    options = parse_arguments(arguments)
    model = header.load_model(options.checkpoint, header.choose_device(), options.model)
    predictor = Predictor(model, options.checkpoint, {
        key: getattr(options, key) for key in ("map", "dbp", "hr")}, options.vitals,
        **recordings.channel_options(options))
    found = recordings.find_recordings(options.recordings)
    if options.figure and len(found) > 1:
        raise DataError(f"--figure draws one recording, but {len(found)} are given")
    names_path = options.out and os.path.splitext(options.out)[0] + "_recordings.csv"
    inputs = [path for item in found for path in recordings.files_of(item.path)]
    for path in filter(None, (options.out, names_path, options.figure, options.export)):
        tk_utils.check_writable(path, [*inputs, options.checkpoint, options.vitals])
        if path in (options.out, names_path) and os.path.exists(path):
            with open(path, encoding="utf-8", errors="replace") as file:
                first, second = file.readline(1000).rstrip(), file.readline(1000).rstrip()
            names = (first, second) == (recordings.PRIVATE_LINE, "recording,path")
            if not (names if path == names_path else ",tpp," in first):
                raise DataError(f"{path}: was not written by predict.py; give another --out")
    if predictor.warning:
        print(f"*** {predictor.warning} ***")
    if options.export:
        export(predictor, options.export)
    if found:
        table = predictor.table(found)
        print(*summary(table, predictor.needed), sep="\n")
        if options.out:
            write_csv(table, options.out, names_path)
        else:
            print_minutes(table, predictor.needed)
        if options.figure:
            save_drawing(table, predictor, options.figure)
    for line in predictor.remarks:
        print(line)
    return int(bool(found) and (table.attrs["failed"] > 0 or not table["tpp"].count()))


def predict_recording(model_or_path, recording, map=None, dbp=None, hr=None, vitals=None,
                      channels=None, units=None, fs=None, network=None) -> pd.DataFrame:
    """TPP of each minute of a recording.

    model_or_path: a `NormalisedModel` or a checkpoint; network: your own module, if the checkpoint
    holds its weights. recording: a path, a folder, or a list of them. map, dbp (mmHg), hr
    (beats/min): for all minutes; vitals: path of a CSV of readings. channels, units, fs: as
    channels, units and file_fs of `recordings.read_windows`. Returns a row per minute:

    recording (if several: as given, or its number in the folder, paths in .attrs['recordings']);
    start_s; clock, where known; tpp, low_90, high_90, … (mmHg; NaN where refused); refused
    (reasons); <vital>, <vital>_from, <vital>_age_s and <vital>_refused for each needed vital; with
    an arterial line tpp_abp, r2_abp, abp_in_gate. Raises RecordingError, CheckpointError or
    DataError.
    """
    model, name = model_or_path, "the model"
    if not isinstance(model, header.NormalisedModel):
        name, model = os.fspath(model), header.load_model(model, network=network)
    predictor = Predictor(model, name, {"map": map, "dbp": dbp, "hr": hr}, vitals,
                          channels=channels, units=units, file_fs=fs)
    inputs = recording if isinstance(recording, (list, tuple)) else [recording]
    table = predictor.table(recordings.find_recordings(inputs))
    for line in predictor.remarks:
        warnings.warn(line, stacklevel=2)
    return table


class Predictor:
    """A model with the options of a run. needed: the network's vitals, and MAP where it predicts
    Pcrit (TPP = MAP - Pcrit). levels: {level: half width} of its intervals. remarks: for the user.
    """

    def __init__(self, model, name, given, vitals_path, **reading):
        """reading: channels, units and file_fs of recordings.read_windows."""
        if not model.with_ppg:
            raise DataError(f"{name}: predict.py needs a network of the PPG and the vitals of "
                            "datasets.FIELDS; evaluate.py scores any other")
        self.model, self.name, self.vitals_path = model, name, vitals_path
        self.reading = {**WINDOW, **reading, "polarity": signals.ppg_polarity}
        self.unknown_units = {name.lower() for name in reading.get("units") or ()}
        self.inputs, self.gives_p_crit = list(model.keys[1:-1]), model.keys[-1] == "p_crit"
        self.needed = list(dict.fromkeys(self.inputs + ["map"] * self.gives_p_crit))
        self.given = {key: value for key, value in given.items() if value is not None}
        for key, value in self.given.items():
            low, high = WINDOW["limits"][key]
            if not low <= value <= high:
                raise DataError(f"--{key} {value:g}: expected {low:g} to {high:g}")
        if self.given.get("dbp", 0) >= self.given.get("map", np.inf):
            raise DataError("--dbp {dbp:g}: expected less than --map {map:g}".format(**self.given))
        run = run_of(model.checkpoint)
        self.origin, self.calibration, self.gate = (
            run.origin, run.calibration, datasets.get_gate(run.condition))
        self.method = run.label_method if run.label_method in labels.METHODS else "published"
        self.warning, self.remarks = tk_utils.simulated_note("recordings", self.origin), []
        if run.label_method not in (self.method, "unknown"):
            self.remarks.append(f"labels are 'published', not {run.label_method!r} as in training")
        self.remarks += report.influence_lines(header.kept_shares(model.anchor))
        self.levels = self.usable_levels()

    def usable_levels(self):
        """{level: half width} if the calibration holds for recordings; adds to the remarks."""
        known = self.calibration
        halves = dict(zip(known.get("levels", ()), known.get("half_widths", ())))
        usable = {level: half for level, half in halves.items() if half is not None}
        missing = [f"{100 * level:.0f} %" for level in halves if level not in usable]
        why = "no calibration (evaluate.py CHECKPOINT --calibrate DATA makes one)"
        if halves:
            why = usable and report.domain_refusal({"origin": self.origin, **known}, "recordings")
        if why:
            self.remarks.append(f"no prediction intervals: {why}")
            return {}
        if missing:
            self.remarks.append(f"no interval at {', '.join(missing)}: calibrated on too few "
                                f"patients ({known['n_patients']})")
        return usable

    def table(self, found) -> pd.DataFrame:
        """The rows of all recordings; of several, an unusable recording gets a line on stderr."""
        tables, several = [], len(found) > 1
        for number, item in enumerate(found):
            try:
                table, notes = self.one_table(item)
            except (RecordingError, DataError) as error:
                if not several and not item.in_folder:
                    raise
                print(recordings.public_name(found, number), tk_utils.printable(
                    getattr(error, "what", error)), sep=": ", file=sys.stderr)
                continue
            self.remarks += [f"{item.typed}: {note}" if several else note for note in notes]
            if several:
                table.insert(0, "recording", str(number + 1) if item.in_folder else item.typed)
            tables.append(table)
        if not tables:
            raise DataError("none of the recordings could be used")
        if self.unknown_units:      # to all recordings
            raise DataError(self.unknown_text())
        table = pd.concat(tables, ignore_index=True)
        names = {str(i): item.path for i, item in enumerate(found, 1) if item.in_folder}
        table.attrs.update(failed=len(found) - len(tables), recordings=names if several else {})
        return table

    def one_table(self, item):
        """(rows of a recording, notes on it)."""
        recorded = recordings.read_windows(item.path, **self.reading)
        readings, wrong, implausible, columns = {}, {}, {}, set()
        if self.vitals_path:
            readings, wrong, implausible, columns = recordings.read_vitals(
                self.vitals_path, WINDOW["limits"], self.reading["units"], recorded.start_time)
        self.unknown_units &= recorded.unknown_units - columns
        with tk_utils.progress(recorded, desc="predicting", unit="block") as blocks:
            parts = [self.block(recorded, minutes, readings, wrong) for minutes in blocks]
        if not parts:
            raise RecordingError(item.typed, "has no uninterrupted minute of PPG")
        table = pd.concat(parts, ignore_index=True)
        missing = [key for key in self.needed if key != "hr" and table[key].isna().all()]
        if missing:
            raise RecordingError(item.typed, f"this network needs {', '.join(missing).upper()}: "
                                 + self.why_missing(missing, recorded, readings, implausible))
        return table, recorded.notes + [
            f"--vitals: {what}; {recordings.UNIT_HINT.format('COLUMN', key)}"
            for key, what in implausible.items()]

    def unknown_text(self):
        where = "channel or column of --vitals" if self.vitals_path else "channel"
        return f"--unit {', '.join(sorted(self.unknown_units))}: no such {where}"

    def why_missing(self, missing, recorded, readings, implausible):
        """Why no minute has the vitals `missing`, and what to do."""
        whys, of_line = [], [key for key in missing if key in labels.FIELDS]
        whys += [f"no {key.upper()} in the recording" for key in missing
                 if key not in (*of_line, *recorded.chosen)]
        if of_line and "abp" not in recorded.chosen:
            whys.append("no arterial pressure (--abp-channel)")
        elif of_line:
            whys.append(recorded.implausible.get("abp", "no usable beats in the arterial pressure"))
        whys += [what for kind, what in recorded.implausible.items()
                 if kind.replace("cuff_", "") in missing]
        for key in missing if self.vitals_path else ():
            what = implausible.get(key, f"no numeric column with a usual name for {key}")
            times_s = readings.get(key, [()])[0]
            if len(times_s):
                what = (f"{key.upper()} from {times_s[0]:.0f} to {times_s[-1]:.0f} s, which reaches"
                        f" no minute (a reading is held for {MAX_AGE_S / 60:g} minutes)")
            whys.append(f"--vitals: {what}")
        if self.unknown_units:
            whys.append(self.unknown_text())
        elif any("implausible" in why and "swapped" not in why for why in whys):
            names = ("COLUMN", missing[0]) if implausible else ("CHANNEL", "ABP")
            whys.append(recordings.UNIT_HINT.format(*names))
        elif not self.vitals_path:
            options = "--map, --dbp, or " if of_line else ""
            whys.append(f"add {options}--vitals CSV of time_s,{','.join(missing)}")
        return "; ".join(whys)

    def block(self, recorded, minutes, readings, wrong_readings) -> pd.DataFrame:
        """The rows of some minutes; readings, wrong_readings: from the CSV of --vitals."""
        start_s, end_s = minutes.start_s, minutes.start_s + SEGMENT_SECONDS
        label = labels.label_segments(minutes.abp, FS, method=self.method)
        quality = signals.signal_quality(minutes.abp, minutes.ppg, FS)
        numbers = {kind: (values, minutes.number_age_s[kind])
                   for kind, values in minutes.numbers.items()}
        none = np.full(len(start_s), np.nan)
        vitals = choose_vitals(self.needed, len(none), {    # {source: {vital: (values, ages in s)}}
            "option": {key: (np.full_like(none, value), none) for key, value in self.given.items()},
            "vitals": {key: recordings.last_reading(*reading, end_s)
                       for key, reading in readings.items()},
            "abp": {key: (label[key], none) for key in VITALS if key in label},
            "numbers": numbers,
            "cuff": {kind[len("cuff_"):]: values for kind, values in numbers.items()
                     if kind.startswith("cuff_")},
            "ppg": {"hr": (np.where(quality["reason"], np.nan, quality["ppg_hr"]), none)}})
        above = vitals.get("dbp", none) >= vitals.get("map", none)
        reasons = [" ".join([*signals.reason_names(mask),
                             *(f"no_{key}" for key in self.needed if np.isnan(vitals[key][i])),
                             *["dbp_above_map"] * int(above[i])])
                   for i, mask in enumerate(quality["reason"])]
        columns = {"start_s": start_s}
        if recorded.start_time is not None:
            clock = pd.Timestamp(recorded.start_time) + pd.to_timedelta(start_s, unit="s")
            columns["clock"] = clock.strftime("%H:%M:%S %Z").str.strip()
        columns.update(self.predict(minutes.ppg, vitals, np.array(reasons, object)), **vitals)
        for key in self.needed + ["sbp", "dbp"] * ("pp" in self.needed):
            begin, end = np.searchsorted(wrong_readings.get(key, []), [start_s, end_s])
            columns[f"{key}_refused"] = end - begin + sum(
                minutes.refused.get(kind, 0) for kind in (key, f"cuff_{key}"))
        if "abp" in recorded.chosen:
            fields = {**quality, **label, "reason": label["reason"] | quality["reason"]}
            gate = replace(self.gate, min_minutes=0, comparisons=tuple(     # of the minute alone
                (key, sign, bound) for key, sign, bound in self.gate.comparisons
                if {key, bound} & set(FIELDS) <= set(fields)))
            passes = datasets.passes_gate(gate, fields.get, np.isfinite(minutes.ppg).all(1))
            columns.update(tpp_abp=label["tpp"], r2_abp=label["r2"],
                           abp_in_gate=np.where(passes, "yes", "no"))
        return pd.DataFrame(columns)

    def predict(self, ppg, vitals, refused):
        """{'tpp', 'low_…', 'high_…', 'refused': [n]} of n minutes; refused: [n], '' or why."""
        fine, answer = refused == "", np.full((len(ppg), self.model.outputs), np.nan)
        if fine.any():
            device = next(self.model.buffers()).device
            inputs = [torch.from_numpy(np.asarray(values[fine], np.float32)).to(device)
                      for values in (ppg[:, None], *(vitals[key] for key in self.inputs))]
            with torch.no_grad():
                answer[fine] = self.model(*inputs).cpu().numpy()
        tpp = vitals["map"] - answer[:, 0] if self.gives_p_crit else answer[:, 0]
        absurd = tpp[fine & ~(np.abs(tpp) <= metrics.MAX_TPP)]
        if absurd.size:
            raise header.CheckpointError(f"{self.name}: gives {absurd[0]:.6g} mmHg, which cannot "
                                         "be a tissue perfusion pressure")
        columns = {"tpp": tpp}
        for level in self.levels:
            # the last output is the spread, which only a calibration with one reads
            ends = metrics.interval(tpp, self.calibration, level, answer[:, -1])
            columns.update(zip((f"low_{100 * level:g}", f"high_{100 * level:g}"), ends))
        return dict(columns, refused=refused)


def choose_vitals(needed, n, sources):
    """{vital, <vital>_from, <vital>_age_s: [n]} of the needed vitals, from the first source with a
    plausible value that is at most MAX_AGE_S old. SBP and DBP of a source give PP."""
    columns, none = {}, np.full(n, np.nan)
    for key in needed:
        low, high = WINDOW["limits"][key]
        value, age_s, came_from = none.copy(), none.copy(), np.full(n, "", object)
        for name, source in sources.items():
            found, found_age_s = source.get(key, (none, none))
            if key == "pp" and "pp" not in source and {"sbp", "dbp"} <= set(source):
                found = source["sbp"][0] - source["dbp"][0]
                found_age_s = np.fmax(source["sbp"][1], source["dbp"][1])
            new = np.isnan(value) & (found >= low) & (found <= high) & ~(found_age_s > MAX_AGE_S)
            value[new], age_s[new], came_from[new] = found[new], found_age_s[new], name
        columns.update({key: value, f"{key}_from": came_from, f"{key}_age_s": age_s})
    return columns


def write_csv(table, path, names_path):
    """Write the table as CSV, two decimals; names of files in a folder go to a private file."""
    with tk_utils.atomic_file(path, newline="") as file:
        table.round(2).to_csv(file, index=False, lineterminator="\n")
    print(f"written: {path}")
    names = pd.DataFrame(table.attrs["recordings"].items(), columns=["recording", "path"])
    if len(names):
        with tk_utils.atomic_file(names_path, newline="") as file:
            file.write(recordings.PRIVATE_LINE + "\n")
            names.to_csv(file, index=False, lineterminator="\n")
        print(f"written: {names_path} (private: it names the recordings)")


def print_minutes(table, needed):
    """Print a line per minute, without empty columns."""
    names = [name for name in ("recording", "clock", "start_s", "tpp", "low_90", "high_90", *needed,
                               "tpp_abp", "abp_in_gate", "refused")
             if name in table and table[name].replace("", np.nan).notna().any()]
    cells = [table[name].map("{:.1f}".format).replace("nan", "\u2013")
             if table[name].dtype.kind == "f" else table[name] for name in names]
    tk_utils.print_table(zip(*cells), names)
    print("pressures in mmHg, HR in beats/min")


def summary(table, needed):
    """Yield lines on all minutes together: TPP, refusals, and the sources of the vitals."""
    n_done, reasons = table["tpp"].count(), table["refused"].str.split().explode().value_counts()
    yield (f"{counted(len(table), 'minute')}, {n_done:,} with TPP"
           + (f", median {table['tpp'].median():.1f} mmHg" if n_done else "")
           + ("; refused: " if len(reasons) else "")
           + ", ".join(f"{name} {n:,}" for name, n in reasons.items()))
    for key in needed:
        counts = table[f"{key}_from"].replace("", np.nan).value_counts()
        age_s, n_wrong = table[f"{key}_age_s"].max(), table[f"{key}_refused"].sum()
        yield (f"{key.upper()} from: "
               + (", ".join(f"{name} ({n:,} min)" for name, n in counts.items()) or "nothing")
               + (f"; held for up to {age_s / 60:.0f} min" if age_s > SEGMENT_SECONDS else "")
               + (f"; {counted(n_wrong, 'implausible value')} refused" if n_wrong else ""))


def draw(table, predictor, with_values=False):
    """Draw TPP with its intervals and the label, and the vitals below; shade refused minutes."""
    scale, unit = (60.0, "minutes") if table["start_s"].iloc[-1] < 7200 else (3600.0, "hours")
    units = list(dict.fromkeys(FIELDS[key].unit for key in predictor.needed))
    figure = tk_utils.new_figure(9, 3 + 1.5 * len(units))
    axes = figure.subplots(1 + len(units), 1, sharex=True, squeeze=False,
                           gridspec_kw={"height_ratios": [2.2] + [1] * len(units)})[:, 0]
    # A minute has two rows, its start and its end, and then an empty row if a gap follows.
    ends = table.assign(start_s=table["start_s"] + SEGMENT_SECONDS - 1e-3)
    is_last = np.append(np.diff(table["start_s"]) > SEGMENT_SECONDS + 0.01, True)
    steps = pd.concat([table, ends, ends.loc[is_last, ["start_s"]]]).sort_values(
        "start_s", kind="stable")
    x, top = steps["start_s"] / scale, axes[0]
    if 0.9 in predictor.levels:
        top.fill_between(x, steps["low_90"], steps["high_90"], alpha=0.3, lw=0,
                         color=tk_utils.TRAIN_COLOUR, label="90 % interval")
    top.plot(x, steps["tpp"], color=tk_utils.TRAIN_COLOUR, lw=1.2, label="TPP")
    if "tpp_abp" in table:
        middle = (table["start_s"] + SEGMENT_SECONDS / 2) / scale
        top.plot(middle, table["tpp_abp"].where(table["abp_in_gate"] == "yes"), ".", color="black",
                 ms=4, label="label from the arterial\nline (passes the gate)")
    if with_values:
        add_values(top, scale, table)
    top.axhline(metrics.LOW_TPP, color="0.4", lw=0.9, ls="--", label=f"{metrics.LOW_TPP:g} mmHg")
    for axis, label in zip(axes, ("TPP (mmHg)", *units)):
        for i, key in enumerate(predictor.needed):
            if FIELDS[key].unit == label:
                axis.plot(x, steps[key], lw=1.2, label=key.upper(), color=f"C{i + 1}")
        middle_y, half = np.mean(axis.get_ylim()), np.ptp(axis.get_ylim()) / 2
        axis.set_ylim(middle_y - max(half, 10), middle_y + max(half, 10))   # at least 20 units high
        refused = steps["refused"].fillna("") != ""
        axis.fill_between(x, 0, 1, where=refused, color="0.85", lw=0, zorder=0,
                          transform=axis.get_xaxis_transform(),
                          label="refused" if axis is top and refused.any() else None)
        axis.set_ylabel(label)
        axis.legend(frameon=False, fontsize=9, loc="center left", bbox_to_anchor=(1, 0.5))
    axes[-1].set_xlabel(f"{unit} from the recording's start")
    axes[-1].locator_params(axis="x", integer=True, min_n_ticks=1)
    return tk_utils.finish_figure(figure, predictor.warning)


def add_values(axis, scale, table):
    """Draw invisible marks, which show a minute's values under the pointer on a page."""
    for row in table.dropna(subset=["tpp"]).to_dict("records"):
        ends = f" (90 %: {row['low_90']:.0f} to {row['high_90']:.0f})" if "low_90" in row else ""
        when = row.get("clock") or f"minute {row['start_s'] / SEGMENT_SECONDS + 1:.0f}"
        axis.plot((row["start_s"] + SEGMENT_SECONDS / 2) / scale, row["tpp"], "o", ms=8, alpha=0,
                  gid=f"hover:{when}: TPP {row['tpp']:.0f} mmHg{ends}")


def save_drawing(table, predictor, path):
    if path.lower().endswith(".html"):
        image = report.page_figure(draw(table, predictor, with_values=True), "TPP by minute.")
        report.write_page(
            path, "figure.html", title="Tissue perfusion pressure (TPP)", note=predictor.warning,
            lines=[*summary(table, predictor.needed), *predictor.remarks], network=predictor.name,
            date=pd.Timestamp.now().date(), refused=(table["refused"] != "").any(), image=image)
    else:
        tk_utils.save_figure(draw(table, predictor), path)
    print(f"written: {path}")


class RawUnits(torch.nn.Module):
    """ppg [B, 1, 3600] in any unit, needed vitals [B] -> TPP [B] and the ends of its interval."""

    def __init__(self, predictor):
        super().__init__()
        self.model, self.n_inputs = predictor.model, len(predictor.inputs)
        self.map_at = predictor.needed.index("map") if predictor.gives_p_crit else None
        self.half = predictor.levels.get(EXPORT_LEVEL)

    def forward(self, ppg, *vitals):
        answer = self.model(ppg, *vitals[:self.n_inputs])
        tpp = answer[:, 0] if self.map_at is None else vitals[self.map_at] - answer[:, 0]
        if self.half is None:
            return (tpp,)
        width = self.half * answer[:, 1] if answer.shape[1] > 1 else self.half
        return tpp, tpp - width, tpp + width


def export(predictor, path):
    """Write the ONNX file if onnxruntime gives the same answers as PyTorch."""
    try:
        import onnx
        import onnxruntime
    except ModuleNotFoundError as error:
        raise DataError(f"--export needs the package {error.name}: "
                        "pip install -r requirements-extra.txt") from None
    module, inputs = RawUnits(predictor).cpu().eval(), example_inputs(len(predictor.needed))
    names, outputs, interval = ["ppg", *predictor.needed], ["tpp"], ""
    if module.half is not None:
        outputs, interval = ["tpp", "low", "high"], f"; low to high: {EXPORT_LEVEL:.0%} interval"
    units = ", ".join(f"{key} [batch] {FIELDS[key].unit}" for key in predictor.needed)
    old = {"dynamo": False} if "dynamo" in inspect.signature(torch.onnx.export).parameters else {}
    with tk_utils.one_line(f"{path}: not written", DataError), warnings.catch_warnings():
        warnings.simplefilter("ignore")         # the tracer keeps sizes as constants
        buffer = io.BytesIO()
        torch.onnx.export(module, tuple(x[:2] for x in inputs), buffer, input_names=names,
                          output_names=outputs, opset_version=17,      # the highest of PyTorch 2.0
                          do_constant_folding=False,    # folding drops one of two equal parameters
                          dynamic_axes={name: {0: "batch"} for name in names + outputs}, **old)
        graph = onnx.load_from_string(buffer.getvalue())
        onnx.helper.set_model_props(graph, {
            "inputs": f"ppg [batch, 1, {SEGMENT_SAMPLES}] at {FS} Hz in any unit; {units}",
            "outputs": f"{', '.join(outputs)} [batch] mmHg{interval}",
            "trained_on": predictor.origin, "use": "research only; no medical device"})
        onnx.checker.check_model(graph)
        data = graph.SerializeToString()
        onnxruntime.set_default_logger_severity(3)  # errors only
        session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
        worst = 0.0
        for n in (EXPORT_SEGMENTS, 1, 7):
            part = [x[:n] for x in inputs]
            with torch.no_grad():
                expected = module(*part)
            answers = session.run(None, {name: x.numpy() for name, x in zip(names, part)})
            worst = np.max([worst, *(np.abs(a - b.numpy()).max()        # NaN if one is
                                     for a, b in zip(answers, expected))])
    if not worst <= EXPORT_TOLERANCE:
        raise DataError(f"{path}: not written: onnxruntime and PyTorch differ by {worst:.2g} mmHg "
                        f"(at most {EXPORT_TOLERANCE:g} is allowed)")
    with tk_utils.atomic_file(path, "wb") as file:
        file.write(data)
    print(f"written: {path}; at most {worst:.1g} mmHg from PyTorch on {EXPORT_SEGMENTS} segments")


def example_inputs(n_vitals):
    """PPG [EXPORT_SEGMENTS, 1, 3600] at many gains and offsets, and n_vitals vitals."""
    rng, n = np.random.default_rng(0), EXPORT_SEGMENTS
    phase = 2 * np.pi * rng.uniform(0.7, 2.5, (n, 1)) * np.arange(SEGMENT_SAMPLES) / FS
    ppg = np.sin(phase) + rng.uniform(0.1, 0.6, (n, 1)) * np.sin(2 * phase - 1)
    ppg += 0.02 * rng.standard_normal(ppg.shape) + rng.uniform(-100, 100, (n, 1))
    ppg *= 10 ** rng.uniform(-3, 3, (n, 1))
    vitals = rng.uniform(40, 110, (n_vitals, n))
    return [torch.from_numpy(x.astype(np.float32)) for x in (ppg[:, None], *vitals)]


if __name__ == "__main__":
    sys.exit(tk_utils.run_script(main, header.CheckpointError, DataError, RecordingError,
                                 MemoryError))
