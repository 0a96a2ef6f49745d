"""The evaluation beyond its scores: report, model card, calibration, honesty, several runs."""
import html.parser
import json
import os
import re
import shutil
import subprocess
import sys
import types

import h5py
import numpy as np
import pytest
import torch
from conftest import ROOT

import evaluate
import metrics
from training_header import (
    DataError,
    TPP_PPG_dataset,
    create_dataset_index,
    get_model_v3,
    init_steady,
    load_checkpoint,
    load_model,
    predict_dataset,
    watch_features,
)

CPU = torch.device("cpu")
FIGURES = {"histogram_plot", "baselines", "bland_altman", "detection", "trend", "strata", "worst"}


@pytest.fixture(scope="module")
def trained(simulated, run, tmp_path_factory):
    """A folder with a run of a few steps on 30 virtual patients."""
    folder = tmp_path_factory.mktemp("evaluated")
    os.makedirs(folder / "data")
    shutil.copy(simulated, folder / "data/s.h5")
    run("train_resnet.py", "--data", "data/s.h5", "--epochs", 1, "--batch-size", 16, "--device",
        "cpu", cwd=folder, check=0, timeout=600)
    return folder


@pytest.fixture(scope="module")
def few_rounds():
    """Few rounds of boosting: of some dozen segments nothing is learned in 200 either."""
    before, metrics.BOOSTING_ROUNDS = metrics.BOOSTING_ROUNDS, 5
    yield
    metrics.BOOSTING_ROUNDS = before


@pytest.fixture(scope="module")
def reported(trained, few_rounds):
    """(folder, results, page) of a whole evaluation, its figures included."""
    before = os.getcwd()
    os.chdir(trained)
    try:
        results, arrays = evaluate.evaluate("runs/M1.5.pth", device="cpu", full=True)
        evaluate.write_report(results, arrays, "report.html", "runs/M1.5.pth")
    finally:
        os.chdir(before)
    return trained, results, (trained / "report.html").read_text(encoding="utf-8")


class Page(html.parser.HTMLParser):
    """What the tests ask of a page: its tags with attributes, its text, tags left open."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.open, self.text = [], [], ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


# ---------------------------------------------------------------- the report

def test_the_page_stands_alone_and_says_simulated_in_title_note_and_headline(reported):
    _, results, text = reported
    page = Page(text)
    assert not page.open
    tags = [tag for tag, _ in page.tags]
    assert "script" not in tags and "link" not in tags and "iframe" not in tags
    assert not re.search(r"(src|href)=.?(http|//|file)", text)
    for tag, attributes in page.tags:
        if tag == "img":
            assert attributes["src"].startswith("data:image/png;base64,") and attributes["alt"]
    assert tags.count("img") == len(FIGURES)
    assert re.search(r"<title>.*SIMULATED", text) and "on SIMULATED patients</h1>" in text
    assert results["note"] in page.text and "SIMULATED patients" in evaluate.headline(results)[1]


def test_the_page_begins_with_how_far_off_for_whom_how_sure_and_against_what(reported):
    _, results, text = reported
    first = Page(text[:text.index("<h2>")]).text
    for wanted in (f"Off by {results['tpp']['rmse']:.1f}", f"{results['n_segments']:,} minutes of "
                   f"{results['n_patients']:,}", "too few", "skill", "the best baseline"):
        assert wanted in first
    # three tune patients: no 90 % interval, and the reason instead
    assert "tune patients are too few (at least 9 needed)" in first


def test_the_headline_says_worse_where_any_baseline_does_better(reported):
    _, results, _ = reported
    good, bad = ({"value": v, "low": v - 0.1, "high": v + 0.1} for v in (0.5, -0.6))
    lines = evaluate.headline(dict(results, skill=dict(good, over="ridge"),
                                   skill_in_hindsight=dict(good, over="ridge")))
    assert any(line.startswith("It is better than ridge on") for line in lines)
    assert not any("WORSE" in line for line in lines)
    lines = evaluate.headline(dict(results, skill=dict(good, over="ridge"),
                                   skill_in_hindsight=dict(bad, over="mean_tpp")))
    worse = [line for line in lines if "WORSE here than the train patients' mean TPP" in line]
    better = [line for line in lines if "it is better than ridge" in line]
    assert lines.index(worse[0]) < lines.index(better[0])
    lines = evaluate.headline(dict(results, skill=dict(bad, over="ridge"),
                                   skill_in_hindsight=dict(bad, over="ridge")))
    assert any("it is worse than ridge" in line for line in lines)


def test_the_figures_come_as_png_and_pdf_too(reported):
    folder = reported[0] / "figures_resnet"
    for name in FIGURES:
        assert (folder / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert (folder / f"{name}.pdf").read_bytes().startswith(b"%PDF")


# The items of TRIPOD+AI (Collins et al., BMJ 2024;385:e078378) that have parts.
PARTS_OF_ITEMS = {3: "abc", 5: "ab", 6: "abc", 8: "abc", 9: "abc", 12: "abcdefg", 18: "abcdef",
                  20: "abc", 23: "ab", 27: "abc"}


def items_of(names):
    """The items that names like '12f, 24 updating' and '18a-d funding' begin with."""
    found = set()
    for name in names:
        for number, first, last in re.findall(r"\b(\d+)([a-g]?)(?:-([a-g]))?\b",
                                              re.match(r"[\da-g, -]+\b", name).group()):
            letters = "abcdefg"["abcdefg".index(first):"abcdefg".index(last or first) + 1]
            found |= {number + letter for letter in letters} if first else {number}
    return found


def test_the_model_card_fills_what_a_program_can_and_lists_what_it_cannot(reported):
    folder, results, _ = reported
    card = (folder / "runs/M1.5_card.md").read_text(encoding="utf-8")
    assert "SIMULATED PATIENTS" in card and "Research only" in card
    rows = re.findall(r"^\| (\d[^|]+) \| (.+) \|$", card, re.M)
    assert all(len(text) > 2 for _, text in rows)
    left = re.findall(r"^- (.+)$", card, re.M)
    assert tuple(left) == evaluate.FOR_A_PERSON
    items = {f"{number}{part}" for number in range(1, 28)
             for part in PARTS_OF_ITEMS.get(number, [""])}
    assert len(items) == 52 and items_of([name for name, _ in rows]) | items_of(left) == items
    assert f"{results['n_segments']:,} segments of {results['n_patients']:,} patients" in card


def test_no_patient_and_no_path_is_named_in_report_and_card(reported):
    folder, _, page = reported
    with h5py.File(folder / "data/s.h5") as file:
        names = list(file)
    words = set(re.findall(r"[\w.-]+", re.sub('base64,[^"]+', "", page)
                           + (folder / "runs/M1.5_card.md").read_text(encoding="utf-8")))
    assert not words & set(names)
    assert str(folder) not in page


def test_a_page_in_a_browser_has_no_error_and_does_not_overflow_a_phone(reported, tmp_path):
    browser = next((path for path in map(shutil.which, ("chromium", "chromium-browser",
                                                        "google-chrome")) if path), None)
    if browser is None:
        pytest.skip("no Chromium here")
    # The page allows no script, so a copy without that rule measures itself, in a frame as narrow
    # as a phone's window (a browser's own window cannot be).
    measure = ("<script>document.title = [innerWidth, document.documentElement.scrollWidth, "
               "[...document.images].filter(i => !i.naturalWidth).length].join(' ')</script>")
    text = re.sub(r'<meta http-equiv="Content[^>]+>', "", reported[2])
    for width in (390, 1280):
        (tmp_path / "page.html").write_text(text.replace("</body>", measure + "</body>"),
                                            encoding="utf-8")
        (tmp_path / "frame.html").write_text(
            f"<iframe src=page.html width={width} height=800 style='border:0' onload='document.body"
            ".append(this.contentDocument.title)'></iframe>", encoding="utf-8")
        done = subprocess.run(
            [browser, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic",
             "--no-first-run", "--disable-background-networking", "--disable-component-update",
             "--disable-sync", "--allow-file-access-from-files", f"--user-data-dir={tmp_path}/u",
             "--virtual-time-budget=5000", "--dump-dom", (tmp_path / "frame.html").as_uri()],
            stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, timeout=120)
        inner, scroll, broken = map(int, re.search(r"(\d+) (\d+) (\d+)</body>",
                                                   done.stdout).groups())
        assert inner <= width and scroll <= inner and broken == 0


# ---------------------------------------------------------------- what is in it

def test_the_results_hold_every_score_with_its_interval(reported):
    _, results, _ = reported
    assert set(results["baselines"]) == {
        "mean_tpp", "map_minus_mean_pcrit", "ridge", "gradient_boosting", "gradient_boosting_ppg",
        "ridge_all", "gradient_boosting_all"}
    assert set(results["per_patient"]["tpp"]) == set(metrics.SCORES)
    assert {"tpp", "p_crit"} == set(results["trend"]) == set(results["within_patient"])
    assert {"sensitivity", "specificity", "auc"} <= set(results["detection"])
    assert {"aami_1", "aami_2", "bhs", "ieee_1708"} <= set(results["standards"])
    assert {one["of"] for one in results["strata"]} >= {"TPP", "MAP", "Heart rate",
                                                        "Pulse pressure", "Label's r²"}
    good = results["good_signal"]
    assert good["n_segments"] >= results["n_segments"] and 0 < good["share_kept_by_gate"] <= 1
    assert results["checks"]["shared_seconds"] == {"train": 0, "tune": 0}
    assert results["checks"]["overlapping_windows"] == 0 and not results["problems"]
    json.dumps(results, default=lambda value: value.item())


def test_strata_together_hold_every_segment_once(reported):
    _, results, _ = reported
    for name in {one["of"] for one in results["strata"]}:
        assert sum(one["n_segments"] for one in results["strata"]
                   if one["of"] == name) == results["n_segments"]


def test_swapping_gives_each_segment_the_ppg_of_another_patient(trained):
    index = create_dataset_index(path=str(trained / "data/s.h5"))
    part = evaluate.read_part(index, ["ppg", "map", "tpp"])
    seen = []

    def network(ppg, map_):
        seen.append((ppg.clone(), map_.clone()))
        return map_[:, None]

    model = torch.nn.Module()
    model.forward, model.keys = network, ["ppg", "map", "tpp"]
    model.network = types.SimpleNamespace(projection=torch.nn.Identity())
    swapped = evaluate.predict_with_swapped_ppg(
        model, part, {"batch_size": 16, "device": CPU, "workers": 0})
    assert swapped == pytest.approx(part.fields["map"], rel=1e-6)       # the vitals stay
    ppg = torch.cat([one for one, _ in seen])[:, 0].numpy()
    own = part.dataset.waveform("ppg", np.arange(len(part)))
    donors = [part.patients[np.flatnonzero((own == row).all(1))[0]] for row in ppg]
    assert (np.array(donors) != part.patients).all()
    assert len(np.unique(ppg[:, :99], axis=0)) == len(part)             # each is used once


def test_a_checkpoint_without_calibration_is_calibrated_on_the_tune_patients(trained):
    checkpoint = load_checkpoint(trained / "runs/M1.5.pth")
    model = load_model(checkpoint)
    index = create_dataset_index(path=str(trained / "data/s.h5"))
    parts = evaluate.patient_parts(index, checkpoint, trained / "data/tpp_ppg.salt")
    train, tune = (TPP_PPG_dataset(index.select((parts == name)[index.encounter_patient]),
                                   "segment", model.keys) for name in ("train", "tune"))
    found = evaluate.make_calibration(model, train, tune, device="cpu")
    error = predict_dataset(model, tune, device=CPU) - tune.column("tpp").numpy()
    expected = metrics.fit_calibration(error, tune.index.segment_patients())
    assert {k: found[k] for k in expected} == expected
    # what the last layers see: 256 pooled features and the vitals
    assert len(found["novelty"]["mean"]) == 256 + 3 and found["novelty"]["threshold"] is None


def test_watching_does_not_change_what_the_network_says():
    torch.manual_seed(0)
    model = types.SimpleNamespace(network=init_steady(get_model_v3(1)).eval())
    ppg, vital, kept = torch.randn(3, 1, 3600), torch.randn(3), []
    expected = model.network(ppg, vital)
    with watch_features(model, kept.append):
        assert torch.equal(model.network(ppg, vital), expected)
    assert kept[0].shape == (3, 257) and kept[0][:, -1] == pytest.approx(vital.numpy())
    model.network(ppg, vital)
    assert len(kept) == 1


# ---------------------------------------------------------------- honesty

def fake_part(n_patients=20, each=10, seed=0, **fields):
    rng = np.random.default_rng(seed)
    n = n_patients * each
    values = {"map": rng.normal(78, 10, n), "tpp": rng.normal(36, 12, n)}
    values["p_crit"] = values["map"] - values["tpp"]
    values.update({name: rng.normal(size=n) for name in metrics.PPG_FEATURES}, **fields)
    patients = np.repeat(np.arange(n_patients), each)
    return evaluate.Part(None, values, patients, patients)


def honesty(part, tpp, split=None):
    checkpoint = {"split": split or {"train": ["a", "b"], "tune": ["c"], "test": ["d"]}}
    return evaluate.check_honesty(part, tpp, checkpoint, np.full(len(tpp), 36.0),
                                  metrics.PatientBootstrap(part.patients))


def test_a_constant_output_is_named():
    part = fake_part()
    found, problems = honesty(part, np.full(200, 41.0))
    assert found["constant_output"] and "CONSTANT OUTPUT: the model says 41.0" in problems[0]
    found, problems = honesty(part, part.fields["tpp"] + 1)
    assert not found["constant_output"] and not problems


def test_patients_in_two_parts_of_a_checkpoint_are_told():
    part = fake_part()
    for split in ({"train": ["a", "b"], "tune": ["b"], "test": ["d"]},
                  {"train": ["a"], "tune": ["c"], "test": ["d"], "ancestors": ["d", "x"]}):
        found, problems = honesty(part, part.fields["tpp"], split)
        assert found["patients_in_two_parts"] == 1 and "leaked" in problems[0]
    split = {"train": ["a"], "tune": ["c"], "test": ["d"], "ancestors": ["a", "c"]}
    assert honesty(part, part.fields["tpp"], split)[0]["patients_in_two_parts"] == 0


def test_shuffled_labels_show_no_skill_whatever_the_model():
    for seed in range(10):
        part = fake_part(seed=seed)
        found, _ = honesty(part, part.fields["tpp"] + 1)
        assert found["skill_with_shuffled_labels"]["low"] <= 0


def test_overlapping_windows_of_an_encounter_are_counted():
    start = np.tile(np.arange(10) * 60.0, 20)
    assert honesty(fake_part(start_s=start), np.arange(200.0))[0]["overlapping_windows"] == 0
    start[5] -= 30
    assert honesty(fake_part(start_s=start), np.arange(200.0))[0]["overlapping_windows"] == 1


def write_ppg(path, **patients):
    """{patient: index} of a file of the published kind, one encounter a patient, PPG as given."""
    with h5py.File(path, "w") as file:
        for name, ppg in patients.items():
            group = file.create_group(f"{name}/1")
            group["ppg"] = ppg.astype("f4")
            for key, value in (("map", 80), ("p_crit", 40), ("tpp", 40), ("r2", 0.9), ("pp", 50)):
                group[key] = np.full(len(ppg), value, "f4")
    index = create_dataset_index(path=str(path))
    return {name: index.select((index.patients == name)[index.encounter_patient])
            for name in patients}


def test_segments_shared_between_parts_are_found_also_where_windows_overlap(tmp_path):
    rng = np.random.default_rng(0)
    record = rng.normal(size=3600 * 4)
    other, flat = rng.normal(size=(3, 3600)), np.tile(rng.normal(size=(1, 3600)), (2, 1))
    flat[:, 600:1200] = 0.5                                         # ten flat seconds are no match
    parts = write_ppg(tmp_path / "d.h5", p=record.reshape(4, 3600), duplicate=record[None, :3600],
                      overlapping=record[None, 3600 - 1800:7200 - 1800],
                      clean=np.concatenate([other, flat[:1]]), flat=np.concatenate([
                          rng.normal(size=(1, 3600))[:, :600], np.full((1, 600), 0.5),
                          rng.normal(size=(1, 2400))], axis=1))
    assert evaluate.shared_seconds(parts["p"], {"duplicate": parts["duplicate"]}) == {
        "duplicate": 1}
    assert evaluate.shared_seconds(parts["p"], {"o": parts["overlapping"]}) == {"o": 2}
    assert evaluate.shared_seconds(parts["clean"], {"f": parts["flat"], "p": parts["p"]}) == {
        "f": 0, "p": 0}


def test_a_duplicate_under_another_name_makes_the_report_say_leaked(trained, tmp_path, few_rounds,
                                                                    capsys):
    folder = tmp_path / "copy"
    shutil.copytree(trained, folder)
    record = json.loads((folder / "runs/M1.5_run.json").read_text())
    record.update(data=[str(folder / "data/s.h5")], salt_file=str(folder / "data/tpp_ppg.salt"))
    (folder / "runs/M1.5_run.json").write_text(json.dumps(record))
    checkpoint = load_checkpoint(folder / "runs/M1.5.pth")
    index = create_dataset_index(path=str(folder / "data/s.h5"))
    parts = evaluate.patient_parts(index, checkpoint, folder / "data/tpp_ppg.salt")
    train, test = (index.patients[np.flatnonzero(parts == name)[0]] for name in ("train", "test"))
    with h5py.File(folder / "data/s.h5", "r+") as file:
        of_train, of_test = (next(iter(file[name].values()))["ppg"] for name in (train, test))
        of_test[:1] = of_train[:1]
    results, _ = evaluate.evaluate(str(folder / "runs/M1.5.pth"), device="cpu", full=True)
    assert results["checks"]["shared_seconds"]["train"] >= 1
    assert "share seconds of PPG with train segments" in capsys.readouterr().err


# ---------------------------------------------------------------- several runs, and runs beside

def test_several_runs_are_scored_with_their_mean_and_sd(trained, few_rounds, tmp_path, capsys,
                                                        monkeypatch):
    for name in ("a", "b"):
        for end in (".pth", "_run.json"):
            shutil.copy(trained / f"runs/M1.5{end}", tmp_path / f"{name}{end}")
    checkpoint = torch.load(tmp_path / "b.pth", weights_only=True)
    checkpoint["model"]["mlp.3.bias"] += 0.1
    torch.save(checkpoint, tmp_path / "b.pth")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["evaluate.py", "a.pth", "b.pth", "--device", "cpu", "--json",
                                      "all.json"])
    evaluate.main()
    printed = capsys.readouterr().out
    assert "SIMULATED" in printed and re.search(r"^SD +", printed, re.M)
    found = json.loads((tmp_path / "all.json").read_text())
    values = [one["tpp"]["bias"] for one in found["runs"]]
    assert values[0] != values[1]
    assert found["summary"]["tpp.bias"]["mean"] == pytest.approx(np.mean(values))
    assert found["summary"]["tpp.bias"]["sd"] == pytest.approx(np.std(values, ddof=1))


def test_a_run_of_the_same_split_is_listed_beside_and_of_another_one_refused(trained, tmp_path,
                                                                             few_rounds):
    checkpoint = torch.load(trained / "runs/M1.5.pth", weights_only=True)
    torch.save(checkpoint, tmp_path / "same.pth")
    results, _ = evaluate.evaluate(str(trained / "runs/M1.5.pth"), device="cpu",
                                   compare=[str(tmp_path / "same.pth")])
    assert results["compared"]["same.pth"]["skill"]["value"] == pytest.approx(0, abs=1e-9)
    checkpoint["split"]["train"] = checkpoint["split"]["train"][1:]
    torch.save(checkpoint, tmp_path / "other.pth")
    with pytest.raises(DataError, match="trained on other patients"):
        evaluate.evaluate(str(trained / "runs/M1.5.pth"), device="cpu",
                          compare=[str(tmp_path / "other.pth")])


def test_options_that_go_with_one_checkpoint_are_refused_for_several(capsys):
    with pytest.raises(SystemExit):
        evaluate.parse_args(["a.pth", "b.pth", "--report", "r.html"])
    assert "go with one checkpoint" in capsys.readouterr().err


# ---------------------------------------------------------------- size

def test_a_million_predictions_are_scored_and_drawn_in_a_minute_and_two_gigabytes(tmp_path):
    done = subprocess.run([sys.executable, os.path.join(ROOT, "benchmarks/evaluation.py"), "scale"],
                          cwd=tmp_path, stdout=subprocess.PIPE, text=True, timeout=600, check=True)
    seconds, gigabytes = map(float, re.search(r"([\d.]+) s of processor time, ([\d.]+) GB",
                                              done.stdout).groups())
    assert seconds < 60 and gigabytes < 2
