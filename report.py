"""Results of evaluate.py -> console table, figures, one HTML page, model card.

    report.print_results(results)
    report.write_report(results, arrays, 'report.html', {'runs/M1.5.pth': checkpoint})
    report.write_page('page.html', 'quality.html', title='Quality', …)     # any page of templates/

A figure is a function in `FIGURES`; a score is an entry of `metrics.SCORES`. Needs metrics.py,
tk_utils.py and the folder templates/.
"""
import base64
import html
import io
import os
import re
import textwrap
from typing import Optional

import jinja2
import numpy as np
import pandas as pd

import metrics
import tk_utils
from tk_utils import FONT_POINTS, TRAIN_COLOUR, TUNE_COLOUR, counted, new_figure, print_table

TEMPLATES = os.path.join(os.path.dirname(os.path.abspath(__file__)), "templates")
NAMES = {"mean_tpp": "mean TPP of the train patients", "map_minus_mean_pcrit": "MAP - mean Pcrit",
         "ridge": "ridge, network's vitals",
         "gradient_boosting": "gradient boosting, network's vitals",
         "gradient_boosting_ppg": "gradient boosting, vitals and PPG features",
         "ridge_all": "ridge, arterial line's vitals",
         "gradient_boosting_all": "gradient boosting, arterial line's vitals"}


def named(name: str) -> str:
    """The plain name of a baseline, the same in tables, figures and on the page."""
    return NAMES.get(name, name)


# ---------------------------------------------------------------- numbers as text

def shown(estimate, digits=2, unit="") -> str:
    """'4.72 (4.27 to 5.21)', only the value where there is no interval, a dash without a value."""
    if estimate is None or estimate["value"] is None or not np.isfinite(estimate["value"]):
        return "–"
    text = f"{estimate['value']:.{digits}f}{unit}"
    if estimate["low"] is None or not np.isfinite(estimate["low"]):
        return text
    return f"{text} ({estimate['low']:.{digits}f} to {estimate['high']:.{digits}f})"


def percent(share) -> str:
    """'94 % (91 to 96)' of an estimate, '94 %' of a number."""
    if not isinstance(share, dict):
        return f"{100 * share:.0f} %"
    return shown({key: 100 * share[key] for key in ("value", "low", "high")}, 0, " %")


def of_ci95(scores, name) -> dict:
    """A score with its interval as an estimate."""
    low, high = scores["ci95"][name]
    return {"value": scores[name], "low": low, "high": high}


def domain_refusal(calibration: dict, origin: str, label_method: str = "unknown") -> Optional[str]:
    """Why a calibration's prediction intervals do not hold for data of this origin, or None.

    Published files do not state their origin: 'unknown' counts as real data of any kind.
    """
    for what, here, ours in (("origin", "data of origin", origin),
                             ("label_method", "labels by method", label_method)):
        theirs = calibration.get(what, ours)
        known = {ours, theirs} - {"unknown"}
        if len(known) > 1 or ("simulated" in ours) != ("simulated" in theirs):
            return (f"calibrated on {here} '{theirs}', these are '{ours}'; calibrate on data like "
                    "these (evaluate.py CHECKPOINT --calibrate DATA) or fine-tune")
    return None


# ---------------------------------------------------------------- console

def warning_lines(results) -> list:
    """What is wrong with the scores, or with the choice of patients."""
    return [line for line in (results["warning"], *results["problems"]) if line]


def print_results(results) -> None:
    """The table that a person reads first."""
    if results["note"]:
        print(f"*** {results['note']} ***")
    for problem in results["problems"]:
        print(f"!!! {problem}")
    print(f"{scored_text(results)} ({results['origin']}); 95 % intervals over patients"
          + few_patients(results))
    print_table(*score_table(results))
    for line in summary_lines(results):
        print(textwrap.fill(line, 100, subsequent_indent="  "))


def scored_text(results) -> str:
    return (f"{counted(results['n_segments'], 'segment')} of {results['n_patients']:,} "
            f"{results['split']} {'patient' if results['n_patients'] == 1 else 'patients'}")


def few_patients(results) -> str:
    if results["n_patients"] < metrics.LEAST_PATIENTS:
        return f" (none below {metrics.LEAST_PATIENTS})"
    if results["n_patients"] < metrics.FEW_PATIENTS:
        return f" (too narrow below {metrics.FEW_PATIENTS})"
    return ""


def summary_lines(results) -> list:
    """The lines below the table of scores."""
    lines = []
    if results["skill"]:
        skill, here = results["skill"], results["skill_in_hindsight"]
        lines.append(f"Skill over the best baseline on the tune patients ({named(skill['over'])}): "
                     f"{shown(skill, 3)}{above_zero(skill)}")
        if here["over"] != skill["over"]:
            lines.append(f"Skill over the best baseline here ({named(here['over'])}): "
                         f"{shown(here, 3)}{above_zero(here)}")
    if "true" in results:
        lines.append(true_text(results["true"]))
    lines.append(interval_text(results))
    if novelty_of(results):
        lines.append(novelty_text(results))
    detection = results["detection"]
    lines.append(f"TPP < {detection['threshold']:g} mmHg: sensitivity "
                 f"{percent(detection['sensitivity'])}, specificity "
                 f"{percent(detection['specificity'])}, ROC area {shown(detection['auc'])}")
    return lines


def print_runs(runs) -> None:
    """One line for each run, and their mean and SD."""
    print_table(*runs_table(runs))


def runs_table(runs):
    """(rows, headers) of several runs' results."""
    rows = [[os.path.splitext(one["checkpoint"])[0], one["n_patients"], one["tpp"]["rmse"],
             one["tpp"]["mae"], one["tpp"]["bias"], one["tpp"]["r2"], one["p_crit"]["r2"],
             one["skill"]["value"] if one["skill"] else None] for one in runs]
    columns = np.array([[np.nan if x is None else x for x in row[2:]] for row in rows])
    if len(rows) > 1:
        rows += [["mean", None, *columns.mean(0)], ["SD", None, *columns.std(0, ddof=1)]]
    return rows, ["run", "patients", "RMSE", "MAE", "bias", "R²", "R² of Pcrit", "skill"]


def all_scores(results):
    """(name, scores) of the network and of everything that is compared with it."""
    yield "network", dict(results["tpp"], p_crit_r2=results["p_crit"]["r2"], skill=None)
    for name, scores in (*results["baselines"].items(), *results["compared"].items()):
        yield named(name), scores
    if "swapped_ppg" in results:
        yield "network, another patient's PPG", results["swapped_ppg"]


def score_table(results):
    """(rows, headers) of `all_scores`."""
    others = [name for name in metrics.SCORES if name != "rmse"]
    rows = [[name, shown(of_ci95(scores, "rmse")), *(scores[key] for key in others),
             scores["p_crit_r2"], scores["skill"] and scores["skill"]["value"]]
            for name, scores in all_scores(results)]
    return rows, ["TPP, mmHg", "RMSE (95 %)", *(score_title(name) for name in others),
                  "R² of Pcrit", "network's skill over it"]


def score_title(name: str) -> str:
    return metrics.SCORES[name].title


def true_text(true) -> str:
    return (f"Against the simulator's true TPP: RMSE {shown(of_ci95(true, 'rmse'))} mmHg, bias "
            f"{true['bias']:+.2f}; the label's own error: RMSE {true['label']['rmse']:.2f}, "
            f"bias {true['label']['bias']:+.2f}.")


def interval_90(results) -> dict:
    """What is known of the 90 % prediction interval, or {}."""
    return (results["uncertainty"] or {}).get("levels", {}).get("90 %", {})


def interval_text(results) -> str:
    found = interval_90(results)
    if "segments" in found:
        test = (" (also patients of the calibration: not a test of it)"
                if results["uncertainty"].get("n_patients_of_calibration") else "")
        return (f"90 % prediction interval: ± {found['half_width']:.1f} mmHg; it holds "
                f"{percent(found['segments'])} of the segments here{test}.")
    return f"90 % prediction interval: none ({found.get('refused', 'no calibration')})."


def novelty_of(results) -> Optional[dict]:
    return (results["uncertainty"] or {}).get("novelty")


def novelty_text(results) -> str:
    novelty = novelty_of(results)
    if not novelty:
        reason = ("too few tune patients" if (results["uncertainty"] or {}).get("has_features")
                  else "the network has no features() or the checkpoint no calibration")
        return f"Unusual inputs are not flagged ({reason})."
    return (f"Unusual inputs: {percent(novelty['rate'])} of the segments "
            f"({percent(novelty['expected'])} by design), RMSE {shown(novelty['rmse_new'])} mmHg; "
            f"the others {shown(novelty['rmse_usual'])}.")


def above_zero(skill) -> str:
    """What must be said where a skill's interval does not lie above 0."""
    if skill["low"] is None or np.isnan(skill["low"]):
        return (f" - no interval below {metrics.LEAST_PATIENTS} patients; improvement not "
                "demonstrated")
    return "" if skill["low"] > 0 else " - NOT above 0"


# ---------------------------------------------------------------- figures

def draw_histogram(results, arrays, path) -> None:
    """Predicted against label TPP as a 2-D histogram, to `path`."""
    tk_utils.save_figure(histogram(results, arrays)[0], path)


def histogram(results, arrays):
    box = dict(results["tpp"], n_patients=results["n_patients"], p_crit_r2=results["p_crit"]["r2"])
    figure = tk_utils.histogram_figure(arrays.truth, arrays.tpp, box, results["note"])
    return figure, "Predicted TPP against the label; darker: fewer segments. Dashed: identity."


def compared(results, arrays):
    """RMSE of the network and of everything that is compared with it."""
    rows = [(name, of_ci95(scores, "rmse")) for name, scores in all_scores(results)]
    figure = new_figure(4.8, 0.9 + 0.42 * len(rows))
    axes = figure.subplots()
    for place, (name, estimate) in enumerate(rows):
        colour = TRAIN_COLOUR if place else TUNE_COLOUR
        axes.plot([estimate["low"], estimate["high"]], [place, place], color=colour, lw=2.5)
        axes.plot(estimate["value"], place, "o", color=colour, ms=7,
                  gid=hover(f"{name}: RMSE {shown(estimate)} mmHg"))
    axes.axvline(rows[0][1]["value"], color="0.4", lw=0.9, ls="--", zorder=0)
    axes.set_yticks(range(len(rows)), [textwrap.fill(name, 27) for name, _ in rows])
    axes.set_xlabel("RMSE of TPP (mmHg), 95 %")
    axes.invert_yaxis()
    return (tk_utils.finish_figure(figure, results["note"]),
            "Error of the network (orange) and of what it is compared with, with 95 % intervals "
            "over patients. Left is better.")


def bland_altman(results, arrays):
    agreement, truth, tpp = results["bland_altman"], arrays.truth, arrays.tpp
    figure = new_figure(4.8, 3.8)
    axes = figure.subplots()
    error = tpp - truth
    cloud(axes, (truth + tpp) / 2, error)
    for name, style in (("upper", "--"), ("bias", "-"), ("lower", "--")):
        line = agreement[name]
        if np.isfinite(line["low"]):
            axes.axhspan(line["low"], line["high"], color=TUNE_COLOUR, alpha=0.25, lw=0)
        axes.axhline(line["value"], color="black", lw=1, ls=style)
        axes.annotate(f"{name} {line['value']:+.1f}", (1, line["value"]), xytext=(-2, 2),
                      ha="right", xycoords=("axes fraction", "data"), fontsize=FONT_POINTS,
                      textcoords="offset points")
    limits = [abs(agreement[name]["value"]) for name in ("upper", "lower")]
    reach = max(np.percentile(np.abs(error), 99.9), 5, *limits) * 1.15
    axes.set(ylim=(-reach, reach), xlabel="Mean of label and predicted TPP (mmHg)",
             ylabel="Predicted - label TPP (mmHg)")
    return (tk_utils.finish_figure(figure, results["note"]),
            "Bland-Altman plot: bias and 95 % limits of agreement, bands: their 95 % intervals.")


def trend(results, arrays):
    from matplotlib.patches import Rectangle
    zone = results["trend"]["tpp"]["zone"]
    _, true_change, change = metrics.changes(arrays.series, arrays.truth, arrays.tpp)
    figure = new_figure(4.8, 4.4)
    axes = figure.subplots()
    if len(true_change):
        cloud(axes, true_change, change)
        reach = 1.1 * max(np.percentile(np.abs(np.concatenate([true_change, change])), 99.8),
                          2 * zone)
        axes.set(xlim=(-reach, reach), ylim=(-reach, reach))
    axes.add_patch(Rectangle((-zone, -zone), 2 * zone, 2 * zone, color="0.75", alpha=0.6))
    axes.axhline(0, color="black", lw=0.8)
    axes.axvline(0, color="black", lw=0.8)
    axes.set(aspect="equal", xlabel="Change of label TPP (mmHg)",
             ylabel="Change of predicted TPP (mmHg)")
    return (tk_utils.finish_figure(figure, results["note"]),
            f"Changes from one minute to the next. Upper right and lower left: in the right "
            f"direction. Changes within ± {zone:g} mmHg (grey) are not counted.")


def detection(results, arrays):
    found = results["detection"]
    event, score = arrays.truth < found["threshold"], -arrays.tpp
    figure = new_figure(4.8, 4.4)
    axes = figure.subplots()
    order = np.argsort(-score, kind="stable")
    last = np.append(np.diff(score[order]) != 0, True)          # ties are one step of the curve
    hits, others = np.cumsum(event[order])[last], np.cumsum(~event[order])[last]
    if hits[-1] and others[-1]:
        pick = np.unique(np.linspace(0, len(hits) - 1, 2000).astype(int))
        axes.plot(np.append(0, others[pick] / others[-1]), np.append(0, hits[pick] / hits[-1]),
                  color=TRAIN_COLOUR)
        axes.plot(1 - found["specificity"]["value"], found["sensitivity"]["value"], "o", ms=7,
                  color=TUNE_COLOUR)
    axes.plot([0, 1], [0, 1], color="0.5", lw=0.9, ls="--", zorder=0)
    axes.set(aspect="equal", xlabel="1 - specificity", ylabel="Sensitivity")
    return (tk_utils.finish_figure(figure, results["note"]),
            f"ROC curve for TPP < {found['threshold']:g} mmHg, area {shown(found['auc'])}. "
            f"Orange: a prediction below {found['threshold']:g} mmHg counts as low.")


def reliability(results, arrays):
    found = (results["uncertainty"] or {}).get("reliability")
    if not found:
        return None
    figure = new_figure(4.8, 4.4)
    axes = figure.subplots()
    for bin_ in found["bins"]:
        axes.plot([bin_["predicted"]] * 2, [bin_["low"], bin_["high"]], color=TRAIN_COLOUR)
        axes.plot(bin_["predicted"], bin_["value"], "o", ms=6, color=TRAIN_COLOUR,
                  gid=hover(f"predicted {percent(bin_['predicted'])}, observed "
                            f"{percent({key: bin_[key] for key in ('value', 'low', 'high')})}"))
    axes.plot([0, 1], [0, 1], color="0.5", lw=0.9, ls="--", zorder=0)
    low = f"TPP < {results['detection']['threshold']:g} mmHg"
    axes.set(aspect="equal", xlabel=f"Predicted probability of {low}", ylabel="Observed share")
    return (tk_utils.finish_figure(figure, results["note"]),
            f"Predicted probability of {low} and the share observed, by tenths of the segments. "
            "On the dashed line, probabilities are right.")


def loss(results, arrays):
    """The loss curve of the run, or the tune losses of several."""
    logs = results.get("logs") or {}
    if len(logs) == 1:
        log, = logs.values()
        trajectory = {"epoch_train_loss": log["train_loss"], "epoch_val_loss": log["tune_loss"],
                      "lr": log["lr"]}
        return (tk_utils.loss_lr_figure(trajectory, results["note"], results["loss_label"]),
                "Loss on train and tune patients and learning rate by epoch. The weights of the "
                "best epoch on the tune patients are kept.")
    if not logs:
        return None
    figure = new_figure(4.8, 4.2)
    axes = figure.subplots()
    for name, log in logs.items():
        axes.plot(log["epoch"], log["tune_loss"], marker="o", ms=3.5, label=name)
    axes.set(xlabel="Epoch", ylabel=f"Tune: {results['loss_label']}")
    axes.legend(frameon=False, fontsize=FONT_POINTS)
    return (tk_utils.finish_figure(figure, results["note"]),
            "Loss on the tune patients by epoch, for each run.")


def worst(results, arrays, count=8, seconds=15):
    """The PPG of the segments with the largest errors."""
    def title(row):
        known = {"MAP": "map", "PP": "pp", "HR": "hr"}
        vitals = [f"{name} {arrays.fields[key][row]:.0f}" for name, key in known.items()
                  if key in arrays.fields]
        return (f"predicted {arrays.tpp[row]:.0f}, label {arrays.truth[row]:.0f} mmHg "
                f"({', '.join(vitals)})")

    rows = np.argsort(-np.abs(arrays.tpp - arrays.truth), kind="stable")[:count]
    waves = arrays.waveform(rows)
    samples = waves.shape[1] * seconds // 60
    figure = new_figure(4.8, 0.5 + 0.72 * len(rows))
    all_axes = np.atleast_1d(figure.subplots(len(rows), 1, sharex=True))
    for axes, wave, row in zip(all_axes, waves, rows):
        axes.plot(np.arange(samples) * seconds / samples, wave[:samples], color=TRAIN_COLOUR,
                  lw=0.9)
        axes.set_title(title(row), fontsize=FONT_POINTS, loc="left", pad=2)
        axes.set_yticks([])
    all_axes[-1].set_xlabel("Time (s)")
    return (tk_utils.finish_figure(figure, results["note"]),
            f"{seconds} s of the PPG of the {len(rows)} segments with the largest errors.")


# Name of the file in figures_resnet/ -> function (results, arrays) -> (figure, caption) or None.
FIGURES = {"compared": compared, "histogram_plot": histogram, "bland_altman": bland_altman,
           "trend": trend, "detection": detection, "reliability": reliability, "loss": loss,
           "worst": worst}


def cloud(axes, x, y, few=3000):
    """Points; their density where there are more than `few`."""
    if len(x) <= few:
        axes.plot(x, y, ".", color=TRAIN_COLOUR, ms=5, alpha=0.5, mew=0, rasterized=True)
        return
    tk_utils.density(axes, *np.histogram2d(x, y, bins=120, range=[
        np.percentile(v, [0.05, 99.95]) + [-1e-3, 1e-3] for v in (x, y)]))


def hover(text: str) -> str:
    """The `gid` of an artist that shows a text under the pointer (`page_figure` makes it so)."""
    return "hover:" + base64.b32encode(text.encode()).decode().rstrip("=")


def page_figure(figure, alt: str) -> dict:
    """A figure for `figure` of macros.html: inline SVG where artists have a `hover` text, else PNG.

    alt: what it shows, for readers who cannot see it.
    """
    if not any(str(artist.get_gid()).startswith("hover:") for artist in figure.findobj()):
        return {"uri": figure_uri(figure), "alt": alt}
    from matplotlib import rc_context
    buffer = io.StringIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": alt}):
        figure.savefig(buffer, format="svg", facecolor="white", metadata={"Date": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg"):]

    def titled(match):
        text = match.group(1)
        text = base64.b32decode(text + "=" * (-len(text) % 8)).decode()
        return f"<g><title>{html.escape(text)}</title>"

    svg = re.sub(r'<g id="hover:([A-Z2-7]+)">', titled, svg)
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", svg, flags=re.S)
    used = set(re.findall(r'(?:href="#|url\(#)([\w-]+)', svg))
    svg = re.sub(r' id="([^"]+)"', lambda match: match.group() if match.group(1) in used else "",
                 svg)
    svg = svg.replace("<svg ", f'<svg role="img" aria-label="{html.escape(alt)}" ', 1)
    return {"svg": jinja2.utils.markupsafe.Markup(svg), "alt": alt}


def figure_uri(figure) -> str:
    """A matplotlib figure as a data URI (PNG), for the src of an image."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=160, facecolor="white")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


# ---------------------------------------------------------------- pages

def render(template: str, **context) -> str:
    """A template of templates/ as text; HTML is escaped, Markdown is not."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES), undefined=jinja2.StrictUndefined,
        autoescape=jinja2.select_autoescape(["html"]), trim_blocks=True, lstrip_blocks=True)
    environment.globals.update(
        {function.__name__: function for function in (
            tk_utils.table_cells, counted, of_ci95, named, tiles, headline, score_table, runs_table,
            error_rows, standard_rows, trend_rows, detection_rows, interval_rows, strata_rows,
            check_rows, provenance_rows, true_text, novelty_text, interval_text, rmse_of_patients)})
    environment.filters.update(shown=shown, percent=percent)
    return environment.get_template(template).render({"note": None, "warnings": [], **context})


def write_page(path, template: str, **context) -> None:
    """Write a page that stands alone, atomically. context: title and what the template names."""
    with tk_utils.atomic_file(path) as file:
        file.write(render(template, **context))


def write_report(results, arrays, path, checkpoints: dict) -> None:
    """The page, its figures as PNG and PDF in figures_resnet/, of one run's test the model card.

    results, arrays: of `evaluate_with_arrays(full=True)` or `compare_runs(full=True)`.
    checkpoints: {path: checkpoint}.
    """
    runs = results.get("runs", [])
    results = dict(results.get("together", results))
    results["logs"] = read_logs(checkpoints)
    first_path, first = next(iter(checkpoints.items()))
    name = os.path.splitext(os.path.basename(os.path.commonprefix(list(checkpoints))))[0]
    name = name.rstrip("_") or "runs"
    figures = {}
    for key, draw in FIGURES.items():
        drawn = draw(results, arrays)
        if drawn:
            for suffix in ("png", "pdf"):
                tk_utils.save_figure(drawn[0], f"figures_resnet/{name}_{key}.{suffix}")
            figures[key] = dict(page_figure(*drawn), caption=drawn[1])
    title = f"TPP from the PPG: {name}" + (" on SIMULATED patients" if results["simulated"] else "")
    write_page(path, "evaluation.html", title=title, note=results["note"],
               warnings=warning_lines(results), results=results, figures=figures, runs=runs,
               checkpoints=checkpoints)
    print(f"wrote {path} and figures_resnet/{name}_*.png and .pdf "
          f"({counted(len(figures), 'figure')})")
    if not runs and results["split"] == "test":
        card = tk_utils.RunFiles(os.path.splitext(first_path)[0]).card
        with tk_utils.atomic_file(card) as file:
            file.write(model_card(results, first))
        print(f"wrote {card}")


def read_logs(checkpoints) -> dict:
    """{run: epochs as a DataFrame} of the runs whose log is here."""
    logs = {}
    for path in checkpoints:
        log = tk_utils.RunFiles(os.path.splitext(path)[0]).log
        if os.path.exists(log):
            logs[os.path.splitext(os.path.basename(path))[0]] = pd.read_csv(log)
    return logs


def tiles(results) -> list:
    """The four numbers that matter: (name, value, explanation)."""
    found, skill, sure = results["tpp"], results["skill"], interval_90(results)
    rmse, r2 = of_ci95(found, "rmse"), of_ci95(results["p_crit"], "r2")

    def interval(estimate, digits=2):
        if not np.isfinite(estimate["low"]):
            return f"no interval below {metrics.LEAST_PATIENTS} patients"
        return f"95 %: {estimate['low']:.{digits}f} to {estimate['high']:.{digits}f}"

    return [
        ("RMSE of TPP", f"{rmse['value']:.1f} mmHg", interval(rmse, 1)),
        ("Skill over the best baseline", f"{skill['value']:.2f}" if skill else "–",
         f"{interval(skill)}; 0: no gain, 1: perfect; over {named(skill['over'])}" if skill else
         "the train patients' data are not here"),
        ("R² of Pcrit", f"{r2['value']:.2f}" if np.isfinite(r2["value"]) else "–",
         interval(r2) if np.isfinite(r2["value"]) else "Pcrit does not vary"),
        ("90 % prediction interval", f"± {sure['half_width']:.0f} mmHg" if "segments" in sure else
         "none", f"holds {percent(sure['segments'])} of the segments" if "segments" in sure else
         sure.get("refused", "no calibration"))]


def headline(results) -> list:
    """The sentences to read first: error, on whom, against what, uncertainty, low TPP."""
    found, per_patient = results["tpp"], results["per_patient"]["tpp"]
    lines = [f"RMSE {shown(of_ci95(found, 'rmse'), 1)} mmHg (95 % interval); half of the "
             f"predictions are off by less than {found['mead']:.1f} mmHg. With equal weight for "
             f"each patient: {shown(per_patient['rmse'], 1)} mmHg."]
    whom = (f"Scored on {counted(results['n_segments'], 'minute')} of "
            f"{results['n_patients']:,} " + ("SIMULATED " if results["simulated"] else "")
            + ("patient" if results["n_patients"] == 1 else "patients")
            + {"test": ", none of them seen in training", "all": " (all of these data)"}.get(
                results["split"], f" ({results['split']} patients)"))
    lines.append(whom + ("." if results["n_patients"] >= metrics.FEW_PATIENTS else
                         f": too few; intervals are too narrow below {metrics.FEW_PATIENTS} "
                         "patients."))
    if results["skill"]:
        skill, here = results["skill"], results["skill_in_hindsight"]
        better = ("better than" if skill["low"] > 0 else "worse than" if skill["high"] < 0 else
                  "NOT shown to be better than")
        against = (f"It is {better} the best baseline on the tune patients, "
                   f"{named(skill['over'])}: skill {shown(skill)}, where 0 is no gain and 1 is "
                   "perfect.")
        if here["value"] < 0:
            lines.append(f"It does WORSE here than {named(here['over'])}: skill {shown(here)}.")
        elif here["over"] != skill["over"]:
            against += f" Over the best baseline here, {named(here['over'])}: {shown(here)}."
        lines.append(against)
    lines.append(interval_text(results))
    low = results["detection"]
    lines.append(f"TPP below {low['threshold']:g} mmHg: sensitivity {percent(low['sensitivity'])}, "
                 f"specificity {percent(low['specificity'])}.")
    return lines


def error_rows(results):
    found, own, agreement = results["tpp"], results["per_patient"], results["bland_altman"]
    same = "equal weight per patient"
    return [
        *([f"{score_title(key)} of TPP", shown(of_ci95(found, key))] for key in metrics.SCORES),
        ["R² of Pcrit", shown(of_ci95(results["p_crit"], "r2"))],
        *([f"{score_title(key)}, {same}", shown(own["tpp"][key])] for key in ("rmse", "mae", "r2")),
        [f"R² of Pcrit, {same}", shown(own["p_crit_r2"])],
        ["lower limit of agreement", shown(agreement["lower"])],
        ["upper limit of agreement", shown(agreement["upper"])],
        ["SD between patients; within",
         f"{agreement['sd_between']:.2f}; {agreement['sd_within']:.2f}"]]


def standard_rows(found):
    aami, means, share, bhs, ieee = (found[name] for name in (
        "aami_1", "aami_2", "aami_esh_iso", "bhs", "ieee_1708"))

    def met(result):
        return "met" if result["passed"] else "not met"

    return [
        ["AAMI/ISO 81060-2, criterion 1", f"{aami['mean']:+.1f} ± {aami['sd']:.1f} mmHg",
         "mean within 5, SD up to 8", met(aami)],
        ["criterion 2: SD of patients' means", f"{means['sd']:.1f} mmHg",
         f"up to {means['limit']:.2f}", met(means)],
        ["errors within 10 mmHg", percent(share["within_10"]), "85 % or more", met(share)],
        ["BHS grade: within 5, 10, 15 mmHg",
         ", ".join(percent(bhs[f"within_{bound}"]) for bound in (5, 10, 15)),
         "A: 60, 85, 95 %", bhs["grade"]],
        ["IEEE 1708 grade: mean absolute error", f"{ieee['mad']:.1f} mmHg", "A: up to 5",
         ieee["grade"]]]


def trend_rows(results):
    rows = []
    for key, name in (("tpp", "TPP"), ("p_crit", "Pcrit")):
        found, within = results["trend"][key], results["within_patient"][key]
        rows += [[f"{name}: changes in the right direction ({found['n']:,} of "
                  f"{found['n_changes']:,} exceed {found['zone']:g} mmHg)",
                  percent(found) if found["n"] else "–"],
                 [f"{name}: correlation within patients", shown(within)]]
    return rows


def detection_rows(results):
    found = results["detection"]
    return [[name, percent(found[key])] for name, key in (
        (f"segments below {found['threshold']:g} mmHg", "prevalence"),
        ("sensitivity", "sensitivity"), ("specificity", "specificity"),
        ("positive predictive value", "ppv"), ("negative predictive value", "npv"))]


def interval_rows(results):
    rows = []
    for level, found in (results["uncertainty"] or {}).get("levels", {}).items():
        rows.append([level, "none", "–", "–", "–"] if "refused" in found else
                    [level, f"± {found['half_width']:.1f}", percent(found["segments"]),
                     percent(found["patients"]), percent(found["lowest_tenth"])])
    return rows


def strata_rows(results):
    return [[f"{row['of']} {row['range']}", row["n_segments"], row["n_patients"],
             shown(row["rmse"]), row["bias"],
             None if row["coverage_90"] is None else percent(row["coverage_90"])]
            for row in results["strata"]]


def rmse_of_patients(found) -> str:
    return "Each patient's own RMSE: " + ", ".join(
        f"{share} of patients below {value:.1f}"
        for share, value in found["rmse_quantiles"].items()) + " mmHg."


def check_rows(results):
    found = results["checks"]
    ignores = found.get("ignores_ppg")
    rows = [["patients in two parts of the split", found.get("patients_in_two_parts")],
            *([f"segments that share a second of PPG with {name} segments", number]
              for name, number in found.get("shared_seconds", {}).items()),
            ["segments that overlap the one before", found.get("overlapping_windows")],
            ["the output is constant", "YES" if found["constant_output"] else "no"],
            ["the output is the same with another patient's PPG",
             None if ignores is None else "YES" if ignores else "no"],
            ["skill with shuffled labels (must not be above 0)",
             shown(found.get("skill_with_shuffled_labels"))]]
    return [row for row in rows if row[1] is not None]


def provenance_rows(results, checkpoints):
    first = next(iter(checkpoints.values()))
    provenance, config = first.get("provenance", {}), first.get("config", {})
    rows = [
        ["checkpoint", ", ".join(map(os.path.basename, checkpoints))],
        ["inputs and label", ", ".join(results["keys"])],
        ["trained on", f"{provenance.get('origin', 'unknown')}, "
         + "; ".join(counted(len(one["split"]["train"]), "patient")
                     for one in checkpoints.values() if one.get("split"))],
        ["scored on", f"{results['origin']}, {results['split']} patients"],
        ["quality gate", str(results["condition"])],
        ["settings", ", ".join(f"{key} {value}" for key, value in config.items()
                               if key != "keys")],
        ["versions", ", ".join(f"{key} {value}"
                               for key, value in provenance.get("versions", {}).items())],
        ["code", str(provenance.get("git_revision"))], ["date of this page", results["date"]]]
    return [row for row in rows if row[1]]


# ---------------------------------------------------------------- model card

def model_card(results, checkpoint) -> str:
    """The model card in Markdown: the TRIPOD+AI items a program can fill, and a list of the others.

    results: of `evaluate(full=True)`.
    """
    keys = results["keys"]
    vitals = [key for key in keys[:-1] if key != "ppg"]
    return render(
        "card.md", results=results, checkpoint=checkpoint, keys=keys,
        name=os.path.splitext(results["checkpoint"])[0], warnings=warning_lines(results),
        inputs=", ".join(["PPG waveform"] * (keys[0] == "ppg") + vitals),
        n_weights=sum(weights.numel() for weights in checkpoint["model"].values()),
        counts={part: len(patients) for part, patients in checkpoint["split"].items()},
        half_width=interval_90(results).get("half_width"), novelty=novelty_of(results),
        headline=headline(results),
        patients_text=rmse_of_patients(results["patients"]) if "patients" in results else "–",
        limitations=limitations(results))


def limitations(results) -> str:
    found = ["the label rests on assumptions about the arterial tree and may be biased by several "
             "mmHg"]
    if "good_signal" in results:
        found.append("the gate, which needs the arterial line, keeps "
                     f"{percent(results['good_signal']['share_kept_by_gate'])} of the minutes of "
                     "good signal")
    if results["split"] == "test":
        found.append("no other data were scored")
    if results["note"]:
        found.append(results["note"].lower())
    if results["n_patients"] < metrics.FEW_PATIENTS:
        found.append(f"only {counted(results['n_patients'], 'patient')} scored")
    if results["skill"] and not results["skill"]["low"] > 0:
        found.append("no gain over the best baseline was shown")
    return "; ".join(found)
