"""The report: its page stands alone, its words follow the numbers, its figures and model card."""
import html
import json
import os
import re
import shutil
import subprocess
import types

import numpy as np
import pandas as pd
import pytest
import torch

import metrics
import report
from anchor import kept_shares
from evaluate import Segments, pool, problem_lines, score_all

KEYS = ["ppg", "map", "hr", "tpp"]
WAVES = types.SimpleNamespace(      # a dataset of as many waveforms as are asked for
    waveform=lambda key, rows: np.sin(np.arange(3600) / 10 + np.asarray(rows)[:, None]))


def make_segments(n_patients=40, each=6, seed=0, intervals=True):
    rng = np.random.default_rng(seed)
    n = n_patients * each
    fields = {"map": rng.normal(78, 10, n), "tpp": rng.normal(36, 12, n),
              "hr": rng.normal(75, 10, n), "pp": rng.normal(60, 9, n), "r2": rng.uniform(0.5, 1, n)}
    fields["p_crit"] = fields["map"] - fields["tpp"]
    tpp = fields["tpp"] + rng.normal(0, 5, n)
    ridge, fields["swapped"] = fields["tpp"] + rng.normal(0, 9, n), tpp + rng.normal(0, 9, n)
    patients = np.repeat(np.arange(n_patients), each)
    return Segments(
        fields, patients, patients, patients.astype(str), WAVES, tpp, best="ridge",
        baselines={"ridge": ridge, "mean_tpp": np.full(n, 36.0)},
        intervals={0.9: (tpp - 9, tpp + 9) if intervals else "calibrated on other data"})


def make_results(segments, **other):
    found = {"checkpoint": "<b>M&1.pth", "date": "2026-10-01", "split": "test",
             "origin": "simulated", "condition": "default", "shares": None, "keys": KEYS,
             "simulated": True, "note": "SIMULATED PATIENTS: says nothing about real ones",
             "loss_label": "Loss, MSE (mmHg²)", "n_train_patients": 99, "n_tune_patients": 30,
             "problems": [], **score_all(segments, full=True), **other}
    found["uncertainty"]["n_calibration_patients"] = 30
    return found


CHECKPOINT = {
    "model": {"weight": torch.zeros(3, 4)}, "spec": "resnet_v3", "keys": KEYS,
    "normaliser": {"map": {"mean": 78.0, "sd": 10.0}}, "config": {"epochs": 8, "loss": "mse"},
    "split": {"train": ["a"] * 99, "tune": ["b"] * 30, "test": ["c"] * 40},
    "provenance": {"origin": "simulated", "label_method": "published", "git_revision": "abc",
                   "data_fingerprint": "0123456789abcdef01", "versions": {"torch": "2"}}}


@pytest.fixture(scope="module")
def reported(tmp_path_factory):     # (folder, results, page), with everything that can be in it
    folder, segments = tmp_path_factory.mktemp("reported"), make_segments()
    results = make_results(segments)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        os.makedirs("runs/M1.5")
        pd.DataFrame({"epoch": [1, 2], "train_loss": [90, 40], "tune_loss": [80, 50],
                      "lr": [1e-3, 1e-3]}).to_csv("runs/M1.5/log.csv", index=False)
        report.write_report(results, segments, "report.html", {"runs/M1.5.pth": CHECKPOINT})
    return folder, results, (folder / "report.html").read_text(encoding="utf-8")


def render_page(results, checkpoints, **context):       # without figures
    return report.render("evaluation.html", results=results, warnings=results["problems"],
                         figures={}, runs=[results], checkpoints=checkpoints, **context)


def words(page):    # its text
    text = re.sub(r"<style.*?</style>|<[^>]+>", " ", page, flags=re.S)
    return " ".join(html.unescape(text).split())


def test_the_page_stands_alone_and_nothing_in_it_can_run(reported):
    *_, text = reported
    assert len(text) < 5e6 and text.count("<figure") == len(report.FIGURES)
    assert not re.search(r"<(script|link|iframe|object)| on\w+=|https?://", text)
    assert "default-src 'none'" in text
    assert not re.search(r"(src|href)=\W?(?!#|data:image/png;base64,)\w", text)
    ids = re.findall(r' id="([^"]+)"', text)
    assert len(ids) == len(set(ids))                    # also over the figures
    assert set(re.findall(r'<a href="#([^"]+)"', text)) <= set(ids)
    for name in report.FIGURES:     # also as files, with fonts that can be edited
        path = reported[0] / "figures_resnet" / f"M1.5_{name}.png"
        pdf = path.with_suffix(".pdf").read_bytes()
        assert path.is_file() and pdf.startswith(b"%PDF") and b"/Type3" not in pdf


def test_the_page_escapes_what_it_is_given(reported):
    bad = "<script>alert('&')</script>"
    results = dict(reported[1], condition=bad, origin=bad, note=bad, problems=[bad])
    text = render_page(results, {"runs/<b>.pth": CHECKPOINT}, title=bad, note=bad)
    assert "<script" not in text and text.count("&lt;script&gt;") >= 5 and "<b>.pth" not in text


def test_the_page_says_what_tpp_is_four_numbers_and_shows_values_under_the_pointer(reported):
    _, results, text = reported
    first = words(text[:text.index("<nav")])
    for wanted in ("Tissue perfusion pressure (TPP)", "critical closing pressure (Pcrit)",
                   "SIMULATED", f"{results['tpp']['rmse']:.1f} mmHg", "R² of Pcrit", "skill",
                   "90 % prediction interval", "2026-10-01", "Trained on 99 patients",
                   "Scored on 240 minutes of 40 SIMULATED patients"):
        assert wanted in first, wanted
    assert text.count('class="tile"') == 4 and not re.search(r"\bnan\b", words(text))
    assert text.count("TPP &lt; 20 mmHg") == 1          # strata once
    assert all(part in words(text) for part in (" no verdict ", "BHS grade", "epochs 8", "torch 2"))
    titles = re.findall(r"<title>([^<]+)</title>", text)
    assert f"model: RMSE {report.shown(report.of_ci95(results['tpp'], 'rmse'))} mmHg" in titles


def test_a_page_of_few_segments_and_no_intervals_says_of_none(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    segments = make_segments(3, 2, seed=1, intervals=False)
    segments.best, segments.baselines = None, {}
    results = make_results(segments, note=None, simulated=False, origin="recordings")
    report.write_report(results, segments, "r.html", {"runs/a.pth": CHECKPOINT})
    text = words((tmp_path / "r.html").read_text(encoding="utf-8"))
    assert "none (calibrated on other data)" in text and not re.search(r"\bnan\b|SIMU", text)
    report.print_results(results)
    assert not re.search(r"\(95 %|95 % interval", text + capsys.readouterr().out)    # there is none


def test_several_runs_have_one_page_with_a_line_for_each(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    parts = [make_segments(20, 4, seed=seed) for seed in (1, 2)]
    names = ["icu_fold0.pth", "icu_fold1.pth"]
    runs = [make_results(one, checkpoint=name) for name, one in zip(names, parts)]
    results = {"runs": runs, "together": make_results(pool(parts), checkpoint="2 runs")}
    report.write_report(results, pool(parts), "icu.html", dict.fromkeys(names, CHECKPOINT))
    text = words((tmp_path / "icu.html").read_text(encoding="utf-8"))
    assert all(part in text for part in ("icu_fold0", "icu_fold1", "Each run", "160 minutes of 20",
                                         "each run's best baseline"))
    assert (tmp_path / "figures_resnet/icu_fold_histogram_plot.pdf").exists()


BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
MEASURE = """<script>document.title = JSON.stringify([innerWidth,
 document.documentElement.scrollWidth,
 [...document.querySelectorAll('.table')].filter(t => t.scrollWidth > t.clientWidth + 1).length,
 Math.min(...[...document.querySelectorAll('figure svg')].map(i => i.clientWidth))
])</script>"""


@pytest.mark.skipif(BROWSER is None, reason="no Chromium here")
@pytest.mark.parametrize("width", [390, 768, 1280])
def test_in_a_browser_nothing_overflows_and_every_figure_can_be_read(reported, tmp_path, width):
    # A copy that may run scripts measures itself, in a frame: no window is as narrow as a phone's.
    text = re.sub(r'<meta http-equiv="Content[^>]+>', "", reported[2])
    (tmp_path / "page.html").write_text(text.replace("</body>", MEASURE + "</body>"),
                                        encoding="utf-8")
    (tmp_path / "frame.html").write_text(
        f"<iframe src=page.html width={width} height=800 style='border:0' onload='document.body"
        ".append(this.contentDocument.title)'></iframe>")
    done = subprocess.run(
        [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking",
         "--allow-file-access-from-files", f"--user-data-dir={tmp_path}/u",
         "--virtual-time-budget=5000", "--dump-dom", (tmp_path / "frame.html").as_uri()],
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, timeout=120)
    inner, scroll, cut, narrowest = json.loads(re.search(r"(\[[\d,.]+\])</body>", done.stdout)[1])
    assert inner <= width and scroll <= inner and cut == 0
    assert 9 * narrowest / (4.8 * 72) >= 8.9    # 9-point text in figures of 4.8 inches, in pixels


def estimate(value):
    return {"value": value, "low": value - 0.1, "high": value + 0.1}


def test_the_headline_says_worse_where_any_baseline_does_better():
    def text(skill, here, own=None, **ends):
        return report.skill_text(dict(estimate(skill), over="ridge"), estimate(own or skill),
                                 dict(estimate(here), over="mean_tpp", **ends))

    assert "is better than the best" in text(0.5, 0.4) and "WORSE" not in text(0.5, 0.4)
    assert "WORSE than the best baseline here, mean TPP of other patients" in text(0.5, -0.6)
    assert "Over the best baseline here, mean TPP" in text(0.5, -0.05)      # its interval holds 0
    for none in (None, np.nan):
        assert "WORSE" not in text(0.5, -0.6, low=none, high=none)
    assert "is WORSE than" in text(-0.6, -0.7) and "NOT shown to be better" in text(0.05, 0.04)
    assert len(re.findall("WORSE|NOT shown|skill", text(-0.6, -0.6))) == 2      # each fact once
    assert "equal weight for each patient it is NOT shown to be better: skill 0.05" in text(
        0.5, 0.5, own=0.05)


def test_numbers_without_an_interval_or_a_value_are_shown_as_what_they_are():
    assert report.shown({"value": 4.716, "low": 4.271, "high": 5.21}) == "4.72 (4.27 to 5.21)"
    assert report.shown({"value": 4.716, "low": None, "high": None}) == "4.72"
    assert report.shown({"value": None}) == report.shown({"value": np.nan}) == "–"
    assert report.percent(0.5) == "50 %" and report.percent(estimate(0.5)) == "50 % (40 to 60)"


@pytest.mark.parametrize("theirs, ours, refused", [
    ("simulated", "simulated", False), ("recordings", "unknown", False),
    ("unknown", "recordings", False), ("simulated", "recordings", True),
    ("simulated", "unknown", True), ("recordings", "simulated", True)])
def test_intervals_hold_only_for_the_data_and_labels_of_their_calibration(theirs, ours, refused):
    calibration = {"origin": theirs, "label_method": "published"}
    assert bool(report.domain_refusal(calibration, ours, "published")) == refused
    assert report.domain_refusal(calibration, theirs, "waveform_balance")


def test_a_score_added_to_the_table_reaches_console_and_page(monkeypatch):
    monkeypatch.setitem(metrics.SCORES, "new", metrics.SCORES["mae"]._replace(title="new score"))
    results = make_results(make_segments(6, seed=1))
    assert "new score" in report.score_table(results)[1]
    assert "TPP: new score" in [row[0] for row in report.error_rows(results)]


def test_the_model_card_fills_what_a_program_can_and_lists_what_it_cannot(reported):
    card = (reported[0] / "runs/M1.5/card.md").read_text(encoding="utf-8")
    assert "SIMULATED PATIENTS" in card and "M&1" in card      # Markdown, not HTML
    items = re.findall(r"^(?:\| (\d[^|]+) \| .{3,} \||- (.+))$", card, re.M)     # of TRIPOD+AI
    assert {int(n) for n in re.findall(r"\b(\d+)", str(items))} == set(range(1, 28))
    assert "240 segments of 40 patients" in card and "99 train, 30 tune, 40 test" in card
    quick = {key: reported[1][key] for key in reported[1] if key not in ("strata", "patients")}
    assert "RMSE" in report.model_card(quick, CHECKPOINT)


def test_card_page_and_console_say_what_a_model_keeps_of_its_network(capsys):
    anchor = {"coefficients": {"map": 1.0, "hr": 0.1}, "blend": 0.02, "pulse_share": 0.7}
    config = {"optimizer": "adamw", "schedule": ["onecycle", 0.3, 0.04], "lr": 0.002, "clip": 1.0,
              "average_last": 0.2, "epochs": 6, "loss": "mse"}
    checkpoint, shares = dict(CHECKPOINT, anchor=anchor, config=config), kept_shares(anchor)
    results = make_results(make_segments(), shares=shares, problems=problem_lines({}, shares))
    page = words(render_page(results, {"a.pth": checkpoint}, title="t"))
    report.print_results(results)
    texts = report.model_card(results, checkpoint), page, capsys.readouterr().out
    for text in texts:
        text = " ".join(text.split())
        assert "kept of the network 0.02, of the pulse statistics 0.70 (chosen on 30 tune" in text
        assert "The model is better than" in text and results["problems"][0] in text
    for part in ("ridge on map, hr (the anchor), to which the network adds; blend: kept of the",
                 "AdamW, one cycle up to rate 0.002, gradient clipped at 1.0, weights averaged",
                 "over the last 20 % of the steps, epochs 6, loss mse", "resnet_v3, 12 weights"):
        assert all(part in text for text in texts[:2])
    assert "share of the network" in page
    assert re.search("almost no influence.* pulse statistics$", results["problems"][0])
    assert problem_lines({}, dict(shares, network=0.05)) == problem_lines({}, None) == []
    assert problem_lines({}, {"network": 0.0, "pulse_statistics": 0.0})[0].endswith("on the vitals")
