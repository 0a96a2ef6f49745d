"""A file of prepared segments -> summary on the console, and a quality page.

    contents = read_contents("data/icu.h5")
    print_summary(contents)
    write_page("icu.html", contents, {"label method": "published"})

Neither names a patient or a record. Needs datasets, signals, report, tk_utils and templates/.
"""

from typing import NamedTuple

import numpy as np
import pandas as pd

import datasets
import report
import signals
import tk_utils
from tk_utils import counted

N_EXAMPLES, EXAMPLES_SEED = 6, 0
# Mean and SD in the published cohort, in mmHg and beats/min: constants of the published PPG system
# (Chandrasekhar et al., Nat Med 2023, and its companion code). Then the range that a figure shows.
PUBLISHED_COHORT = {
    "map": (76.7, 11.2, (30, 130)), "sbp": (118.1, 19.5, (50, 200)), "dbp": (56.1, 10.2, (20, 110)),
    "pp": (62.5, 18.5, (0, 140)), "hr": (77.0, 17.3, (30, 160)), "p_crit": (40.5, 15.5, (0, 100)),
}
SCALARS = ("map", "sbp", "dbp", "pp", "hr", "p_crit", "tpp", "r2", "reason")
REASON_TEXTS = {
    "abp_missing": "arterial pressure missing", "abp_flat": "arterial pressure flat",
    "abp_clipped": "arterial peaks clipped", "abp_flush": "arterial line flushed or closed",
    "abp_range": "pressures that no arterial line shows", "few_beats": "too few valid beats",
    "no_fit": "no regression line through the beats", "ppg_missing": "PPG missing",
    "ppg_flat": "PPG flat", "ppg_clipped": "PPG clipped", "ppg_no_pulse": "no pulse in the PPG",
    "abp_saturated": "arterial pressure stuck at the end of its scale",
    "ppg_saturated": "PPG stuck at the end of its scale",
    "rate_mismatch": "PPG and arterial pressure differ in pulse rate",
}


class Contents(NamedTuple):
    """The output without its waveforms, some 50 bytes a segment."""
    path: str
    encounters: pd.DataFrame  # a row an encounter: patient, name, first (segment), its attributes
    segments: pd.DataFrame  # a row a segment: SCALARS, encounter (number), patient
    rules: list  # of the default gate: (text, [N] whether each segment keeps the rule)
    passed: np.ndarray  # [N] bool

    def of_patients(self):
        """Number of segments that pass, by patient, largest first; of those that have one."""
        return self.segments["patient"][self.passed].value_counts()


def read_contents(path) -> Contents:
    encounters, segments, n = [], [], 0
    with datasets.open_file(path) as file:
        for patient, groups in file.items():
            for name, group in groups.items():
                place = {"patient": patient, "encounter": len(encounters)}
                segments.append(pd.DataFrame({**{key: group[key][:] for key in SCALARS}, **place}))
                encounters.append({"patient": patient, "name": name, "first": n, **group.attrs})
                n += len(segments[-1])
    segments = pd.concat(segments, ignore_index=True)
    columns = {key: segments[key].to_numpy() for key in SCALARS}
    rules = list(datasets.gate_rules(datasets.get_gate(datasets.DEFAULT_CONDITION), columns.get,
                                     np.ones(n, bool)))
    passed = np.logical_and.reduce([kept for _, kept in rules])
    return Contents(path, pd.DataFrame(encounters), segments, rules, passed)


def summary_lines(contents):
    """What passes, from how many patients, and the PPG's delay."""
    counts, encounters = contents.of_patients(), contents.encounters
    passes = f"{contents.passed.sum():,} of {len(contents.passed):,} segments pass the default gate"
    if len(counts):
        passes += (f"; they come from {len(counts):,} of {encounters['patient'].nunique():,} "
                   f"patients, and the largest gives {counts.iloc[0] / counts.sum():.0%} of them")
    sure = encounters["ppg_delay_strength"] >= signals.SURE_DELAY
    delay = "PPG behind ABP: not known for any record"
    if sure.any():
        low, middle, high = np.percentile(encounters["ppg_delay_s"][sure], [5, 50, 95])
        delay = (f"PPG behind ABP, per record: median {middle:.2f} s (5th to 95th percentile "
                 f"{low:.2f} to {high:.2f} s); certain in {sure.sum():,} of "
                 f"{counted(len(sure), 'record')}")
    return passes, delay


def summary_tables(contents):
    """[(title, rows, headers)]: gate by rule, reasons, and labels beside the published cohort's."""
    left = np.ones(len(contents.passed), bool)
    gate = [("all segments", 0, len(contents.passed))]
    for text, kept in contents.rules:
        left = left & kept
        gate.append((text, int((~kept).sum()), int(left.sum())))
    tables = [("The default quality gate, rule by rule", gate,
               ("rule", "segments that break it", "left"))]
    reason = contents.segments["reason"].to_numpy()
    reasons = [(REASON_TEXTS.get(name, name), int((reason >> bit & 1).sum()))
               for bit, name in enumerate(signals.REASONS)]
    if any(n for _, n in reasons):
        tables.append(("Reasons for refusing segments (a segment may have several)",
                       sorted((row for row in reasons if row[1]), key=lambda row: -row[1]),
                       ("reason", "segments")))
    passing = contents.segments[contents.passed]
    if len(passing):
        rows = []
        for key in SCALARS[:-1]:
            cohort, values = PUBLISHED_COHORT.get(key), passing[key].astype(np.float64)
            rows.append((key, datasets.FIELDS[key].unit,
                         f"{values.mean():.2f} \u00b1 {values.std(ddof=0):.2f}",
                         f"{cohort[0]:.1f} \u00b1 {cohort[1]:.1f}" if cohort else ""))
        tables.append(("Segments that pass, mean \u00b1 SD "
                       f"({counted(passing['patient'].nunique(), 'patient')})", rows,
                       ("field", "unit", "here", "published cohort")))
    return tables


def print_summary(contents):
    print(f'{contents.encounters["left_over_s"].sum() / 60:.1f} minutes dropped, as they fill no '
          "segment", *summary_lines(contents), sep="\n")
    for title, rows, headers in summary_tables(contents):
        print(f"\n{title}:")
        tk_utils.print_table(rows, headers)


# ------------------------------------------------------------------------------------------- page


def write_page(path, contents, about, tables=()):
    """One HTML page. about: {what: value}, more lines on the input; tables: (title, rows, headers)
    of recordings that could not be used, notes, …"""
    counts = contents.of_patients()
    came_in = {
        "recordings prepared": len(contents.encounters),
        "patients": contents.encounters["patient"].nunique(),
        "segments of one minute": len(contents.passed),
        "minutes that fill no segment": f'{contents.encounters["left_over_s"].sum() / 60:.1f}',
        **about}
    tables = [("Input", list(came_in.items()), ("", "")), *tables]
    largest = f"{counts.iloc[0] / counts.sum():.0%}" if len(counts) else "\u2013"
    passes, delay = summary_lines(contents)
    report.write_page(
        path, "quality.html", title="Quality of the prepared segments", lead=[passes + "."],
        tile_values=[
            ("Segments", f"{contents.passed.sum():,}", f"pass, of {len(contents.passed):,}"),
            ("Share", f"{contents.passed.mean():.0%}", "of the segments pass the default gate"),
            ("Patients", f"{len(counts):,}", "have a segment that passes"),
            ("Largest patient", largest, "of the segments that pass")],
        patients=picture(patients_figure(counts), "Segments that pass, per patient",
                         "Patients in order of their number of segments that pass.")
        if len(counts) else None,
        input_tables=[table for table in tables if table[1]],
        gate_tables=summary_tables(contents),
        distributions=picture(
            distributions_figure(contents), "Histograms of MAP, SBP, DBP, PP, HR and Pcrit",
            "Line and band: mean and SD of the published cohort (Chandrasekhar et al. 2023).")
        if contents.passed.any() else None,
        delay=delay + ".",
        delays=picture(delays_figure(contents), "Delay of the PPG behind the ABP per record",
                       "Uncertain: the rhythm varies so little that it may be off by one beat."),
        examples=examples(contents))


def picture(figure, alt, caption):
    return {**report.page_figure(figure, alt), "caption": caption}


def examples(contents):
    """[(title, pictures)]: random segments that pass and that are refused, the same each time."""
    rng, chosen = np.random.default_rng(EXAMPLES_SEED), []
    for mask, what in ((contents.passed, "that pass"), (~contents.passed, "that the gate refuses")):
        rows = rng.choice(np.flatnonzero(mask), min(N_EXAMPLES, int(mask.sum())), replace=False)
        chosen.append((f"{counted(len(rows), 'random segment')} {what}",
                       [example(contents, row, number) for number, row in enumerate(rows, 1)]))
    return chosen


def example(contents, row, number):
    encounter = contents.encounters.iloc[contents.segments["encounter"].iloc[row]]
    with datasets.open_file(contents.path) as file:
        fields = {key: item[row - encounter["first"]]
                  for key, item in file[encounter["patient"]][encounter["name"]].items()}
    text = ("Pcrit {p_crit:.0f}, TPP {tpp:.0f}, MAP {map:.0f} mmHg, {hr:.0f} beats/min, "
            "r\u00b2 {r2:.2f}".format(**fields).replace("nan", "\u2013"))
    if not contents.passed[row]:
        why = [REASON_TEXTS.get(name, name) for name in signals.reason_names(fields["reason"])]
        why = why or ["not " + rule for rule, kept in contents.rules if not kept[row]]
        text = f'Refused: {", ".join(why)}. {text}'
    return picture(segment_figure(fields), f"ABP, PPG and fit of segment {number}",
                   f"{number}. {text}")


def patients_figure(counts):
    figure = tk_utils.new_figure(4.8, 2.2)
    axes = figure.subplots()
    axes.bar(np.arange(1, len(counts) + 1), counts, width=1.0 if len(counts) > 50 else 0.8,
             color=tk_utils.TRAIN_COLOUR)
    axes.set(xlabel="patients, largest first", ylabel="segments that pass",
             xlim=(0.4, len(counts) + 0.6))
    axes.locator_params(integer=True)
    return tk_utils.finish_figure(figure)


def distributions_figure(contents):
    figure = tk_utils.new_figure(4.8, 5)
    for axes, (key, (mean, sd, limits)) in zip(figure.subplots(3, 2).flat,
                                               PUBLISHED_COHORT.items()):
        values = contents.segments[key][contents.passed].to_numpy()
        axes.hist(values, 50, range=limits, color=tk_utils.TRAIN_COLOUR,
                  weights=np.full(len(values), 100 / len(values)))
        axes.axvspan(mean - sd, mean + sd, color=tk_utils.TUNE_COLOUR, alpha=0.25, lw=0)
        axes.axvline(mean, color=tk_utils.TUNE_COLOUR)
        axes.set(xlim=limits, xlabel=f"{key} ({datasets.FIELDS[key].unit})",
                 ylabel="% of segments" if key in ("map", "dbp", "hr") else "")
    return tk_utils.finish_figure(figure)


def delays_figure(contents):
    figure = tk_utils.new_figure(4.8, 2.2)
    axes = figure.subplots()
    delay_s = contents.encounters["ppg_delay_s"]
    sure = contents.encounters["ppg_delay_strength"] >= signals.SURE_DELAY
    axes.hist([delay_s[sure], delay_s[~sure & np.isfinite(delay_s)]], stacked=True,
              bins=np.arange(*signals.DELAY_RANGE_S, 0.02),
              color=[tk_utils.TRAIN_COLOUR, "#b0b8c4"], label=["certain", "uncertain"])
    axes.legend(frameon=False, fontsize=tk_utils.FONT_POINTS)
    axes.set(xlabel="PPG behind ABP (s)", ylabel="records")
    return tk_utils.finish_figure(figure)


def segment_figure(fields):
    """A minute: ABP with the feet of its beats, PPG, and each beat's MAP over PP x HR with the line
    through Pcrit."""
    figure, fs = tk_utils.new_figure(4.8, 4.4), datasets.FS
    above, below, fit = figure.subplots(3, 1, gridspec_kw={"height_ratios": (1, 1, 1.4)})
    abp, missing = signals.fill_missing(fields["abp"][None])
    wave, t = signals.Wave(abp, missing, fs), np.arange(datasets.SEGMENT_SAMPLES) / fs
    beats = signals.measure_beats(wave, wave.foot, wave.row)
    above.plot(t, fields["abp"], lw=0.7, color="#a02c2c")
    above.plot(wave.foot / fs, np.interp(wave.foot / fs, t, abp[0]), ".", ms=3, color="black")
    below.plot(t, fields["ppg"], lw=0.7, color="#2c5aa0")
    above.set(xlim=(0, datasets.SEGMENT_SECONDS), ylabel="ABP (mmHg)")
    below.set(xlim=(0, datasets.SEGMENT_SECONDS), xlabel="s", ylabel="PPG")
    flow = beats.flow / 1000
    fit.plot(flow, beats.map, ".", ms=3, color="0.3")
    if np.isfinite(fields["p_crit"]) and len(flow):
        slope = (beats.map.mean() - fields["p_crit"]) / flow.mean()
        ends = np.array([0, flow.max()])
        fit.plot(ends, fields["p_crit"] + slope * ends, lw=1, color=tk_utils.TUNE_COLOUR)
        fit.plot(0, fields["p_crit"], "o", ms=4, color=tk_utils.TUNE_COLOUR, clip_on=False)
        fit.set_xlim(left=0)
    fit.set(xlabel="PP \u00d7 HR (mmHg/min / 1000)", ylabel="MAP (mmHg)")
    return tk_utils.finish_figure(figure)
