"""Show the results of evaluate.py: console table, figures, one HTML page, model card.

    report.print_results(results)
    report.write_report(results, segments, 'report.html', {'runs/M1.5.pth': checkpoint})
    report.write_page('page.html', 'quality.html', title='Quality', …)     # any page of templates/

To add a figure, add a function to `FIGURES`; to add a score, an entry to `metrics.SCORES`. Needs
metrics.py, datasets.py, tk_utils.py and the folder templates/.
"""
import html
import io
import os
import re
import textwrap
from typing import Optional

import jinja2
import numpy as np
import pandas as pd
from markupsafe import Markup
from sklearn.metrics import roc_curve

import metrics
import tk_utils
from datasets import FIELDS
from tk_utils import FONT_POINTS, TRAIN_COLOUR, TUNE_COLOUR, counted, new_figure, print_table

MIN_SHARE = 0.05        # a network kept to a smaller share has almost no influence
TEMPLATES = os.path.join(os.path.dirname(os.path.abspath(__file__)), "templates")
NAMES = {"mean_tpp": "mean TPP of other patients", "map_minus_mean_pcrit": "MAP - mean Pcrit",
         "ridge": "ridge, network's vitals",
         "gradient_boosting": "gradient boosting, network's vitals",
         "ridge_ppg": "ridge, vitals and pulse statistics",
         "gradient_boosting_ppg": "gradient boosting, vitals and pulse statistics",
         "ridge_all": "ridge, arterial line's vitals",
         "gradient_boosting_all": "gradient boosting, arterial line's vitals"}


def named(name: str) -> str:
    """The name of a baseline in tables and figures."""
    return NAMES.get(name, name)


# ---------------------------------------------------------------- numbers as text

def shown(estimate, digits=2, unit="") -> str:
    """'4.72 (4.27 to 5.21)'; '4.72' without an interval; a dash without a value. Missing numbers
    are NaN, or None in results read from JSON."""
    if estimate is None or estimate["value"] is None or not np.isfinite(estimate["value"]):
        return "–"
    text = f"{estimate['value']:.{digits}f}{unit}"
    if estimate["low"] is None or not np.isfinite(estimate["low"]):
        return text
    return f"{text} ({estimate['low']:.{digits}f} to {estimate['high']:.{digits}f})"


def percent(share) -> str:
    """'94 % (91 to 96)' for an estimate, '94 %' for a number, a dash for None or NaN."""
    if not isinstance(share, dict):
        return "–" if share is None or np.isnan(share) else f"{100 * share:.0f} %"
    return shown({key: 100 * share[key] for key in ("value", "low", "high")}, 0, " %")


def of_ci95(scores, name) -> dict:
    """A score and its entry of 'ci95' as an estimate."""
    low, high = scores["ci95"][name]
    return {"value": scores[name], "low": low, "high": high}


def if_intervals(results, text=" (95 %)") -> str:
    """The text, or '' if there are too few patients for 95 % intervals."""
    return text * (results["n_patients"] >= metrics.MIN_PATIENTS)


# ---------------------------------------------------------------- words

def domain_refusal(calibration: dict, origin: str, label_method: str = "unknown") -> Optional[str]:
    """Why prediction intervals do not hold for data of this origin and label method, or None.

    Published files do not state their origin: 'unknown' counts as real data of any kind.
    """
    for what, text, ours in (("origin", "{}", origin),
                             ("label_method", "labels by the method '{}'", label_method)):
        theirs = calibration.get(what, ours)
        known = {ours, theirs} - {"unknown"}
        if len(known) > 1 or ("simulated" in ours) != ("simulated" in theirs):
            words = (text.format(value).replace("simulated", "simulated data").replace(
                "unknown", "data of unknown origin").replace("recordings", "data of real patients")
                     for value in (theirs, ours))
            return ("the network was calibrated on {}, not on {}; calibrate on such data "
                    "(evaluate.py CHECKPOINT --calibrate DATA) or fine-tune").format(*words)
    return None


def shares_text(shares, n_tune_patients=None) -> str:
    """The shares of network and pulse statistics that a model keeps, from `anchor.kept_shares`."""
    chosen = f" (chosen on {counted(n_tune_patients, 'tune patient')})" if n_tune_patients else ""
    return ("kept of the network {network:.2f}, of the pulse statistics {pulse_statistics:.2f}"
            .format(**shares) + chosen)


def influence_lines(shares) -> list:
    """[The warning that a model is little more than its ridge], or []."""
    if not shares or shares["network"] >= MIN_SHARE:
        return []
    return [f"the network has {'almost ' if shares['network'] else ''}no influence on these "
            "predictions: they are those of the ridge on the vitals"
            + (" and the pulse statistics" if shares["pulse_statistics"] else "")]


def headline(results) -> list:
    """The main results in sentences: error, patients, model, skill, interval, low TPP."""
    tpp, skill, low = results["tpp"], results["skill"], results["detection"]
    rmse, own = shown(of_ci95(tpp, "rmse"), 1), shown(results["per_patient"]["tpp"]["rmse"], 1)
    lines = [f"RMSE {rmse} mmHg{if_intervals(results, ' (95 % interval)')}; half of the "
             f"predictions are off by less than {tpp['mead']:.1f} mmHg. With equal weight for each "
             f"patient: {own} mmHg.", scored_text(results)]
    if results["shares"]:
        text = shares_text(results["shares"], results["n_tune_patients"])
        lines.append(f"The model is a ridge to which a network adds: {text}.")
    if skill:
        own = results["baselines"][skill["over"]]["skill_per_patient"]
        lines.append(skill_text(skill, own, results["skill_in_hindsight"]))
    return [*lines, interval_text(results),
            f"TPP below {low['threshold']:g} mmHg: sensitivity {percent(low['sensitivity'])}, "
            f"specificity {percent(low['specificity'])}, ROC area {shown(low['auc'])}."]


def scored_text(results) -> str:
    n, n_runs = results["n_patients"], results["n_predictions"] / results["n_segments"]
    text = (f"Scored on {counted(results['n_segments'], 'minute')} of "
            f"{counted(n, 'SIMULATED patient' if results['simulated'] else 'patient')}")
    if n_runs > 1:
        text += f", each predicted by {n_runs:.3g} runs"
    text += (", none of them seen in training" if results["split"] == "test" else
             f" ({results['split']})")
    if n < metrics.FEW_PATIENTS:
        text += (f": too few; intervals are too narrow below {metrics.FEW_PATIENTS} patients, and "
                 f"there are none below {metrics.MIN_PATIENTS}")
    return text + "."


def skill_text(skill, own, here) -> str:
    """skill: over the best baseline (cross-validated); own: with equal weight for each patient;
    here: over the best baseline on these patients."""
    by_minute, by_patient = (
        "better than" if (estimate["low"] or 0) > 0 else
        "WORSE than" if (estimate["high"] or 0) < 0 else "NOT shown to be better than"
        for estimate in (skill, own))
    other = "the best baseline (cross-validated), " * (skill["over"] in NAMES)
    text = f"The model is {by_minute} {other}{named(skill['over'])}: skill {shown(skill)}"
    if by_minute == by_patient:
        text += f", with equal weight for each patient {shown(own)} (0: no gain, 1: perfect)."
    else:
        text += (" by minute (0: no gain, 1: perfect). With equal weight for each patient it is "
                 f"{by_patient.replace(' than', '')}: skill {shown(own)}.")
    if here["value"] == skill["value"]:         # the same baseline
        return text
    worse = "It does WORSE than" if (here["high"] or 0) < 0 else "Over"
    return f"{text} {worse} the best baseline here, {named(here['over'])}: skill {shown(here)}."


def listed(settings: dict) -> str:
    """'epochs 6, lr 0.002' of the settings of a run, without its keys."""
    return ", ".join(f"{name} {value}" for name, value in settings.items() if name != "keys")


def true_text(true) -> str:
    return (f"Against the simulator's true TPP: RMSE {shown(of_ci95(true, 'rmse'))} mmHg, bias "
            f"{true['bias']:+.2f}; the label's own error: RMSE {true['label']['rmse']:.2f}, "
            f"bias {true['label']['bias']:+.2f}.")


def interval_90(results) -> dict:
    """The results about the 90 % prediction interval, or {}."""
    return results["uncertainty"]["levels"].get("90 %", {})


def interval_text(results) -> str:
    found = interval_90(results)
    if "segments" not in found:
        return f"90 % prediction interval: none ({found.get('refused', 'no calibration')})."
    test = (" (also patients of the calibration: not a test of it)"
            if results["uncertainty"].get("n_patients_of_calibration") else "")
    return (f"90 % prediction interval: ± {found['half_width']:.1f} mmHg; it holds "
            f"{percent(found['segments'])} of the segments here{test}.")


# ---------------------------------------------------------------- tables

def print_results(results) -> None:
    """Print the warnings, the table of scores and the headline."""
    for line in filter(None, [results["note"], *results["problems"]]):
        print(textwrap.fill(f"*** {line} ***", 100))
    print_table(*score_table(results))
    true = [true_text(results["true"])] if "true" in results else []
    for line in headline(results) + true:
        print(textwrap.fill(line, 100, subsequent_indent="  "))


def runs_table(runs):
    """(rows, headers): a row for each run, then mean and SD."""
    names, shares = ("rmse", "mae", "bias", "r2"), ("network", "pulse_statistics")
    table = pd.DataFrame(
        [[run["tpp"][name] for name in names]
         + [run["p_crit"]["r2"], run["skill"] and run["skill"]["value"],
            *((run["shares"] or {}).get(name) for name in shares),
            interval_90(run).get("segments", {}).get("value")] for run in runs],
        columns=[*(metrics.SCORES[name].title for name in names), "R² of Pcrit", "skill",
                 "share of the network", "share of pulse statistics", "in the 90 % interval"],
        dtype=float)
    firsts = [[os.path.splitext(run["checkpoint"])[0], run["n_patients"]] for run in runs]
    if len(runs) > 1:
        firsts += [["mean", None], ["SD", None]]
        table = pd.concat([table, table.agg(["mean", "std"])])
    rows = [[*first, *numbers[:-1], percent(numbers[-1])]
            for first, numbers in zip(firsts, table.to_numpy())]
    return rows, ["run", "patients", *table.columns]


def all_scores(results):
    """Yield (name, scores) of the model and of everything that it is compared with."""
    yield "model", dict(results["tpp"], p_crit_r2=results["p_crit"]["r2"], skill=None)
    for name, scores in (*results["baselines"].items(), *results["compared"].items()):
        yield named(name), scores
    if "swapped_ppg" in results:
        yield "model, another patient's PPG", results["swapped_ppg"]


def score_table(results):
    """(rows, headers) of `all_scores`."""
    others = {name: score.title for name, score in metrics.SCORES.items() if name != "rmse"}
    rows = [[name, shown(of_ci95(scores, "rmse")), *map(scores.get, others),
             scores["p_crit_r2"], scores["skill"] and scores["skill"]["value"]]
            for name, scores in all_scores(results)]
    return rows, ["TPP by", f"RMSE, mmHg{if_intervals(results)}", *others.values(), "R² of Pcrit",
                  "model's skill over it"]


def error_rows(results):
    tpp, own, agreement = results["tpp"], results["per_patient"], results["bland_altman"]
    rows = [[f"TPP: {score.title}", shown(of_ci95(tpp, key)), shown(own["tpp"].get(key))]
            for key, score in metrics.SCORES.items()]
    p_crit = shown(of_ci95(results["p_crit"], "r2"))
    return [*rows, ["R² of Pcrit", p_crit, shown(own["p_crit_r2"])],
            ["lower limit of agreement, mmHg", shown(agreement["lower"]), None],
            ["upper limit of agreement, mmHg", shown(agreement["upper"]), None],
            ["SD between patients, mmHg", agreement["sd_between"], None],
            ["SD within patients, mmHg", agreement["sd_within"], None]]


def interval_rows(results):
    return [[level, "none", "–", "–", "–"] if "refused" in found else
            [level, f"± {found['half_width']:.1f}", percent(found["segments"]),
             percent(found["patients"]), percent(found["lowest_tenth"])]
            for level, found in results["uncertainty"]["levels"].items()]


def strata_rows(results):
    return [[f"{row['of']} {row['range']}", row["n_segments"], row["n_patients"],
             shown(row["rmse"]), row["bias"], percent(row["coverage_90"])]
            for row in results["strata"]]


# ---------------------------------------------------------------- figures

def histogram(results, segments):
    """2-D histogram of predicted against label TPP."""
    box = dict(results["tpp"], n=results["n_segments"], n_patients=results["n_patients"],
               p_crit_r2=results["p_crit"]["r2"])
    figure = tk_utils.histogram_figure(segments.truth, segments.tpp, box, results["note"])
    return figure, "Predicted TPP against the label; darker: fewer segments. Dashed: identity."


def compared(results, segments):
    """RMSE of the model and of everything that it is compared with."""
    rows = [(name, of_ci95(scores, "rmse")) for name, scores in all_scores(results)]
    axes = new_figure(4.8, 0.9 + 0.42 * len(rows)).subplots()
    for y, (name, estimate) in enumerate(rows):
        colour = TRAIN_COLOUR if y else TUNE_COLOUR
        axes.plot([estimate["low"], estimate["high"]], [y, y], color=colour, lw=2.5)
        axes.plot(estimate["value"], y, "o", color=colour, ms=7,
                  gid=f"hover:{name}: RMSE {shown(estimate)} mmHg")
    axes.axvline(rows[0][1]["value"], color="0.4", lw=0.9, ls="--", zorder=0)
    axes.set_yticks(range(len(rows)), [textwrap.fill(name, 27) for name, _ in rows])
    axes.set_xlabel("RMSE of TPP (mmHg)" + if_intervals(results, ", 95 %"))
    axes.invert_yaxis()
    return axes.figure, (
        "Error of the model (orange) and of what it is compared with"
        + if_intervals(results, ", with 95 % intervals over patients") + ". Left is better.")


def bland_altman(results, segments):
    agreement, truth, tpp = results["bland_altman"], segments.truth, segments.tpp
    axes, error = new_figure(4.8, 3.8).subplots(), tpp - truth
    cloud(axes, (truth + tpp) / 2, error)
    for name, style in (("upper", "--"), ("bias", "-"), ("lower", "--")):
        line = agreement[name]
        if np.isfinite(line["low"]):
            axes.axhspan(line["low"], line["high"], color=TUNE_COLOUR, alpha=0.25, lw=0)
        axes.axhline(line["value"], color="black", lw=1, ls=style)
        axes.annotate(f"{name} {line['value']:+.1f}", (1, line["value"]), xytext=(-2, 2),
                      ha="right", xycoords=("axes fraction", "data"), fontsize=FONT_POINTS,
                      textcoords="offset points")
    reach = 1.15 * max(5, np.percentile(np.abs(error), 99.9), agreement["upper"]["value"],
                       -agreement["lower"]["value"])
    axes.set(ylim=(-reach, reach), xlabel="Mean of label and predicted TPP (mmHg)",
             ylabel="Predicted - label TPP (mmHg)")
    return axes.figure, (
        "Bland-Altman plot: bias and 95 % limits of agreement"
        + if_intervals(results, ", bands: their 95 % intervals") + ".")


def trend(results, segments):
    zone = results["trend"]["tpp"]["zone"]
    _, true_change, change = metrics.changes(segments.series, segments.truth, segments.tpp)
    axes = new_figure(4.8, 4.4).subplots()
    if len(true_change):
        cloud(axes, true_change, change)
        reach = 1.1 * max(np.percentile(np.abs(np.concatenate([true_change, change])), 99.8),
                          2 * zone)
        axes.set(xlim=(-reach, reach), ylim=(-reach, reach))
    axes.fill_between([-zone, zone], -zone, zone, color="0.75", alpha=0.6)
    axes.axhline(0, color="black", lw=0.8)
    axes.axvline(0, color="black", lw=0.8)
    axes.set(aspect="equal", xlabel="Change of label TPP (mmHg)",
             ylabel="Change of predicted TPP (mmHg)")
    return axes.figure, (
        "Changes from one minute to the next. Upper right and lower left: in the right direction. "
        f"Changes within ± {zone:g} mmHg (grey) are not counted.")


def detection(results, segments):
    found = results["detection"]
    event, axes = segments.truth < found["threshold"], new_figure(4.8, 4.4).subplots()
    if 0 < event.sum() < len(event):
        false_alarms, hits, _ = roc_curve(event, -segments.tpp)
        few = np.unique(np.linspace(0, len(hits) - 1, 2000).astype(int))
        axes.plot(false_alarms[few], hits[few], color=TRAIN_COLOUR)
        axes.plot(1 - found["specificity"]["value"], found["sensitivity"]["value"], "o", ms=7,
                  color=TUNE_COLOUR)
    axes.plot([0, 1], [0, 1], color="0.5", lw=0.9, ls="--", zorder=0)
    axes.set(aspect="equal", xlabel="1 - specificity", ylabel="Sensitivity")
    return axes.figure, (
        f"ROC curve for TPP < {found['threshold']:g} mmHg, area {shown(found['auc'])}. Orange: a "
        f"prediction below {found['threshold']:g} mmHg counts as low.")


def loss(results, segments):
    """The loss curve, if the run's log is here."""
    if "log" not in results:
        return None
    log = results["log"].rename(
        columns={"train_loss": "epoch_train_loss", "tune_loss": "epoch_val_loss"})
    return tk_utils.loss_lr_figure(log, results["note"], results["loss_label"]), (
        "Loss on train and tune patients and learning rate by epoch. The weights of the best epoch "
        "on the tune patients are kept.")


def worst(results, segments):
    """The PPG of the segments with the largest errors; none for several runs."""
    if segments.dataset is None:
        return None
    rows = np.argsort(-np.abs(segments.tpp - segments.truth), kind="stable")[:8]
    titles = []
    for row in rows:
        vitals = ", ".join(f"{key.upper()} {segments.fields[key][row]:.0f}"
                           for key in ("map", "pp", "hr") if key in segments.fields)
        titles.append(f"predicted {segments.tpp[row]:.0f}, label {segments.truth[row]:.0f} mmHg "
                      f"({vitals})")
    return traces(segments.dataset.waveform("ppg", rows), titles, 15), (
        f"15 s of the PPG of the {len(rows)} segments with the largest errors.")


def traces(waves, titles, seconds):
    """A figure of the first `seconds` of one-minute waveforms, one below the other."""
    figure = new_figure(4.8, 0.5 + 0.72 * len(waves))
    all_axes = figure.subplots(len(waves), 1, sharex=True, squeeze=False)[:, 0]
    for axes, wave, title in zip(all_axes, waves, titles):
        part = wave[:len(wave) * seconds // 60]
        time_s = np.arange(len(part)) * seconds / len(part)
        axes.plot(time_s, part, color=TRAIN_COLOUR, lw=0.9)
        axes.set_title(title, fontsize=FONT_POINTS, loc="left", pad=2)
        axes.set_yticks([])
    axes.set_xlabel("Time (s)")
    return figure


# Name of the file in figures_resnet/ -> function (results, segments) -> (figure, caption) or None.
FIGURES = {"compared": compared, "histogram_plot": histogram, "bland_altman": bland_altman,
           "trend": trend, "detection": detection, "loss": loss, "worst": worst}


def cloud(axes, x, y):
    """Draw points, or their density if there are many."""
    if len(x) > 3000:
        axes.hexbin(x, y, gridsize=80, mincnt=1, bins="log", cmap="viridis", rasterized=True)
    else:
        axes.plot(x, y, ".", color=TRAIN_COLOUR, ms=7 if len(x) < 300 else 5, mew=0,
                  alpha=np.clip(300 / len(x), 0.4, 1), rasterized=True)


# ---------------------------------------------------------------- pages

def page_figure(figure, caption: str) -> dict:
    """A figure as inline SVG, for the macro `figure` of macros.html. An artist with the gid
    'hover:TEXT' shows TEXT under the pointer."""
    from matplotlib import rc_context
    buffer = io.StringIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": caption}):
        figure.savefig(buffer, format="svg", dpi=160, facecolor="white", metadata={"Date": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg"):].replace(
        "<svg", f'<svg role="img" aria-label="{html.escape(caption)}"', 1)
    svg = re.sub(r'<g id="hover:([^"]*)">', r"<g><title>\1</title>", svg)
    svg = re.sub(r'<metadata>.*?</metadata>|<style.*?</style>| xmlns[:\w]*="[^"]*"', "", svg,
                 flags=re.S)
    used = set(re.findall(r'(?:href="#|url\(#)([\w-]+)', svg))     # other ids repeat on the page
    svg = re.sub(r' id="([^"]+)"', lambda found: found[0] if found[1] in used else "", svg)
    return {"svg": Markup(svg), "caption": caption}


def render(template: str, **context) -> str:
    """Fill a template of templates/, which may call the functions of this module. HTML is escaped,
    Markdown is not."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES), undefined=jinja2.StrictUndefined,
        autoescape=jinja2.select_autoescape(["html"]), trim_blocks=True, lstrip_blocks=True)
    environment.globals.update(globals())
    environment.filters.update(shown=shown, percent=percent, basename=os.path.basename)
    return environment.get_template(template).render({"note": None, "warnings": [], **context})


def write_page(path, template: str, **context) -> None:
    """Write a self-contained page atomically. context: title and the template's variables."""
    with tk_utils.atomic_file(path) as file:
        file.write(render(template, **context))


def write_report(results, segments, path, checkpoints: dict) -> None:
    """Write the page, its figures as PNG and PDF and, for one run's test patients, the model card.

    results, segments: of `evaluate_with_arrays(full=True)` or `compare_runs(full=True)`.
    checkpoints: {path: checkpoint}.
    """
    runs = results.get("runs", [])
    results = dict(results.get("together", results))
    first_path, first = next(iter(checkpoints.items()))
    files = tk_utils.RunFiles(os.path.splitext(first_path)[0])
    if not runs and os.path.exists(files.log):
        results["log"] = pd.read_csv(files.log)
    stems = [os.path.splitext(os.path.basename(path))[0] for path in checkpoints]
    name = os.path.commonprefix(stems).rstrip("_") or "runs"
    figures = {}
    for key, draw in FIGURES.items():
        drawn = draw(results, segments)
        if drawn:
            tk_utils.finish_figure(drawn[0], results["note"])
            for suffix in ("png", "pdf"):
                tk_utils.save_figure(drawn[0], f"figures_resnet/{name}_{key}.{suffix}")
            figures[key] = page_figure(*drawn)
    title = f"TPP from the PPG: {name}" + (" on SIMULATED patients" if results["simulated"] else "")
    write_page(path, "evaluation.html", title=title, note=results["note"],
               warnings=results["problems"], results=results, figures=figures, runs=runs,
               checkpoints=checkpoints)
    print(f"wrote {path} and figures_resnet/{name}_*.png and .pdf "
          f"({counted(len(figures), 'figure')})")
    if not runs and results["split"] == "test":
        with tk_utils.atomic_file(files.card) as file:
            file.write(model_card(results, first))
        print(f"wrote {files.card}")


def model_card(results, checkpoint) -> str:
    """The model card in Markdown: the TRIPOD+AI items that a program can fill, and a list of the
    others. results: of `evaluate`, with or without full=True."""
    return render("card.md", results=results, checkpoint=checkpoint, warnings=results["problems"])


# ---------------------------------------------------------------- quality of prepared segments

# Mean and SD in the published cohort, in mmHg and beats/min: constants of the published PPG system
# (Chandrasekhar et al., Nat Med 2023, and its companion code).
PUBLISHED_COHORT = {"map": (76.7, 11.2), "sbp": (118.1, 19.5), "dbp": (56.1, 10.2),
                    "pp": (62.5, 18.5), "hr": (77.0, 17.3), "p_crit": (40.5, 15.5)}


def quality_lines(found) -> list:
    """Sentences: segments that pass the gate, the PPG's delay, dropped minutes, copies."""
    segments, delay_s = found["segments"], found["delays_s"]
    counts = segments["patient"][segments["passed"]].value_counts()
    passes = f"{counts.sum():,} of {len(segments):,} segments pass the default gate"
    if len(counts):
        passes += (f"; they come from {len(counts):,} of {segments['patient'].nunique():,} "
                   "patients, and the largest gives "
                   f"{percent(counts.max() / counts.sum())} of them")
    delay = "PPG behind ABP: not known for any record"
    if len(delay_s):
        low, middle, high = np.percentile(delay_s, [5, 50, 95])
        delay = (f"PPG behind ABP, per record: median {middle:.2f} s (5th to 95th percentile "
                 f"{low:.2f} to {high:.2f} s); certain in {len(delay_s):,} of "
                 f"{counted(found['n_records'], 'record')}")
    lines = [passes, delay, f"{found['minutes_dropped']:.1f} minutes left over at ends and gaps"]
    same = segments.dropna(subset=["map"]).groupby(["map", "dbp", "hr", "r2"])["patient"].nunique()
    n_same = int((same > 1).sum())
    if n_same:
        lines.append(f"*** {counted(n_same, 'minute')} in the recordings of several patients: "
                     "copies? Give them one group (--groups), or leave them out ***")
    return lines


def quality_tables(found) -> list:
    """[(title, rows, headers)]: gate by rule, reasons, labels compared with the published cohort.
    """
    segments = found["segments"]
    passing = segments[segments["passed"]]
    labels = []
    for key in (*PUBLISHED_COHORT, "tpp", "r2") if len(passing) else ():
        values, cohort = passing[key].astype(float), PUBLISHED_COHORT.get(key)
        labels.append((key, FIELDS[key].unit, f"{values.mean():.2f} ± {values.std(ddof=0):.2f}",
                       "{:.1f} ± {:.1f}".format(*cohort) if cohort else "",
                       *values.quantile([0.05, 0.5, 0.95])))
    return [("The default quality gate, rule by rule", found["gate"],
             ("rule", "segments that break it", "left")),
            ("Reasons for refusing segments (a segment may have several)",
             list(segments["reasons"].explode().value_counts().items()), ("reason", "segments")),
            (f"Segments that pass, mean ± SD ({counted(passing['patient'].nunique(), 'patient')})",
             labels, ("field", "unit", "here", "published cohort", "5 %", "50 %", "95 %"))]


def print_quality(found) -> None:
    print(*quality_lines(found), sep="\n")
    for title, rows, headers in quality_tables(found):
        if rows:
            print(f"\n{title}:")
            print_table(rows, headers)


def write_quality(path, found, tables) -> None:
    """Write the quality page. tables: more tables than those of `quality_tables`."""
    segments = found["segments"]
    counts = segments["patient"][segments["passed"]].value_counts()
    axes = new_figure(4.8, 2.2).subplots()
    axes.bar(np.arange(1, len(counts) + 1), counts, color=TRAIN_COLOUR)
    axes.set(xlabel="Patients, largest first", ylabel="Segments that pass")
    axes.locator_params(integer=True)
    examples = tk_utils.finish_figure(traces(found["waves"], found["titles"], 60))
    write_page(path, "quality.html", title="Quality of the prepared segments",
               lines=quality_lines(found), tables=[*quality_tables(found), *tables],
               patients=page_figure(tk_utils.finish_figure(axes.figure),
                                    "Segments that pass, per patient."),
               examples=page_figure(examples, "Random segments: a minute of ABP and of PPG."))
