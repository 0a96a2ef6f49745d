"""predict.py: from recordings to TPP by minute; the ONNX export."""
import html
import re
import shutil
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import KEYS, call
from test_prepare import light, read, write_csv

import predict
import prepare
import recordings
from checkpoint import save_checkpoint
from models import get_model_v3
from training_header import NormalisedModel, load_model


class Own(torch.nn.Module):     # no features()
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(2, 1)

    def forward(self, ppg, map_):
        return self.linear(torch.stack([ppg[:, 0, :30].mean(1), map_], 1))


def make_checkpoint(path, keys=KEYS, outputs=1, scale=10.0, calibrated=True, **provenance):
    """A small network of random weights whose answers vary with PPG and vitals."""
    torch.manual_seed(3)
    network = get_model_v3(num_discrete=len(keys) - 2, widths=(8, 8, 8), num_outputs=outputs)
    with torch.no_grad():
        network.mlp[-1].weight *= scale
    provenance = {"origin": "recordings", "label_method": "published", **provenance}
    calibration = {"levels": [0.5, 0.9, 0.95], "half_widths": [3.0, 9.0, None], "n_patients": 12,
                   "spread": outputs == 2, **provenance}
    return save(path, network, keys, provenance=provenance,
                calibration=calibration if calibrated else None)


def save(path, network, keys, **rest):
    normaliser = {key: {"mean": 70.0, "sd": 15.0, "unit": ""} for key in keys[1:]}
    save_checkpoint(str(path), NormalisedModel(network, keys, normaliser), **rest)
    return str(path)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("runs") / "m.pth")


def run(*arguments, code=0):
    """Run predict.py, which must end with this exit code."""
    return call(predict, *arguments, check=code)


def predicted(tmp_path, *arguments):
    run(*arguments, "--out", tmp_path / "o.csv")
    return pd.read_csv(tmp_path / "o.csv", dtype={"refused": object}).fillna({"refused": ""})


@pytest.fixture(scope="module")
def night(tmp_path_factory):
    return write_csv(tmp_path_factory.mktemp("records") / "MRN12345.csv", 185)


def test_predictions_equal_the_model_s_on_what_prepare_stores(tmp_path, night):
    model = make_checkpoint(tmp_path / "m.pth", label_method="waveform_balance")
    table = predicted(tmp_path, model, night, "--figure", tmp_path / "f.html")
    page = (tmp_path / "f.html").read_text()
    assert page.count("<title>") == 1 + table["tpp"].count() and "<script" not in page
    assert f"TPP {table['tpp'][0]:.0f} mmHg (90 %: " in page
    call(prepare, night, "--out", tmp_path / "p.h5", "--label-method", "waveform_balance")
    fields = read(tmp_path / "p.h5")["MRN12345", "MRN12345"]
    ppg, *vitals, label = (torch.from_numpy(fields[key]) for key in KEYS)
    with torch.no_grad():
        tpp = load_model(model)(ppg[:, None], *vitals)[:, 0]
    np.testing.assert_allclose(table["tpp"], tpp, atol=0.01)
    np.testing.assert_allclose(table["tpp_abp"], label, atol=0.01)
    assert list(table["start_s"]) == [0, 60, 120] and np.ptp(table["tpp"]) > 0.2
    frame = predict.predict_recording(load_model(model), night)     # from Python
    np.testing.assert_allclose(frame["tpp"], table["tpp"], atol=0.01)
    assert list(frame.columns[:6]) == ["start_s", "tpp", "low_50", "high_50", "low_90", "high_90"]


def test_the_page_has_the_console_s_lines_and_explains_the_figure(tmp_path, night):
    model = make_checkpoint(tmp_path / "m.pth", origin="simulated")
    table = pd.read_csv(night)
    table.loc[table["time_s"] < 60, "PLETH"] = 1.0
    table.to_csv(tmp_path / "MRN77.csv", index=False)
    for path, refused in ((night, False), (tmp_path / "MRN77.csv", True)):
        out = run(model, path, "--figure", tmp_path / "f.html", "--out", tmp_path / "o.csv").stdout
        page = html.unescape((tmp_path / "f.html").read_text(encoding="utf-8"))
        for line in out.splitlines():
            if "written: " not in line:
                assert line.strip("* ") in page, line
        assert "from: abp (3 min)" in page
        assert ("Grey: refused minutes" in page) == refused and "MRN" not in page
        assert "Network: m.pth." in page and "34 mmHg: the published system's cut-off" in page
        assert re.search(r"Research only; \d{4}-\d\d-\d\d", page) and "min-width: 42rem" in page


def test_a_network_of_your_own_predicts_and_exports(tmp_path, night):
    path = save(tmp_path / "own.pth", Own(), ["ppg", "map", "tpp"], spec="test_predict.py:Own")
    own, export = ["--model", f"{__file__}:Own"], ["--export", tmp_path / "own.onnx"]
    out = run(path, night, *own).stdout
    assert "3 minutes, 3 with TPP" in out and re.search("^ +60.0 ", out, re.M)      # the table
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    assert "from PyTorch on 64 segments" in run(path, *own, *export).stdout
    said = {item.key: item.value for item in onnx.load(str(export[1])).metadata_props}
    assert said["outputs"] == "tpp [batch] mmHg"            # not calibrated, so no interval
    model = NormalisedModel(Own(), ["ppg", "tpp"], load_model(path, network=Own()).normaliser,
                            inputs=["ppg", "map"])          # as by --ablate: without the vitals
    save_checkpoint(path, model)
    assert "from PyTorch on 64 segments" in run(path, *own, *export).stdout


def test_several_recordings_make_one_table_and_names_stay_private(tmp_path, night, checkpoint):
    folder, out_path = tmp_path / "in", tmp_path / "o.csv"
    folder.mkdir()
    paths = [folder / f"MRN{i}.csv" for i in (1, 2, 3)]
    shutil.copy(night, paths[0])
    paths[1].write_text("no recording\n")
    write_csv(paths[2], 61)
    _, out, err = run(checkpoint, folder, "--out", out_path, code=1)
    assert "recording 2 of 3" in err and "MRN" not in out + err + out_path.read_text()
    table = pd.read_csv(out_path)
    assert list(zip(table["recording"], table["start_s"])) == [(1, 0), (1, 60), (1, 120), (3, 0)]
    names = pd.read_csv(tmp_path / "o_recordings.csv", comment="#", index_col="recording")["path"]
    assert names.to_dict() == {i: str(path) for i, path in enumerate(paths, 1)}
    table = predict.predict_recording(checkpoint, paths[::2])
    assert list(table["recording"].unique()) == list(map(str, paths[::2]))
    done = run(checkpoint, folder, "--figure", tmp_path / "f.png", code=2)
    assert "--figure draws one recording" in done.stderr
    theirs = f"{recordings.PRIVATE_LINE}\nkind,record,path,what,detail,key\n"
    (tmp_path / "x_problems.csv").write_text(theirs)        # prepare.py's
    done = run(checkpoint, folder, "--out", tmp_path / "x_problems.csv", code=2)
    assert "was not written by predict.py" in done.stderr
    assert (tmp_path / "x_problems.csv").read_text() == theirs


def test_from_python_vitals_hold_for_all_minutes_and_hr_comes_from_the_ppg(night, checkpoint):
    table = predict.predict_recording(checkpoint, night, 75, 55, channels={"abp": "none"})
    assert list(table["map_from"] + table["hr_from"]) == ["optionppg"] * 3
    assert abs(table["hr"][0] - 72) < 1 and "tpp_abp" not in table


@pytest.mark.parametrize("abp, cuff, said", [
    ("x", None, "needs MAP, DBP: no arterial pressure (--abp-channel); add --map, --dbp, or "
     "--vitals CSV of time_s,map,dbp"),
    ("ABP [kPa]", None, ", expected 20 to 200 mmHg; see --abp-channel); if the unit is another: "
     "--unit CHANNEL=UNIT"),
    ("x", "0,80,\n60,90,", "needs DBP: no arterial pressure (--abp-channel); --vitals: no num"),
    ("x", "0,10,7.3\n90,9.4,7", "such as --unit map=kPa"),
    ("x", "0,55,75\n90,50,70", "median 52.5, expected DBP <= MAP <= SBP; are they swapped?"),
    ("x", "0,seventy,55", "no numeric column with a usual name for map"),
    ("x", "5000,75,55", "MAP from 5000 to 5000 s, which reaches no minute")])
def test_the_error_says_why_no_minute_has_a_vital(tmp_path, checkpoint, abp, cuff, said):
    path = write_csv(tmp_path / "r.csv", 125, columns=(abp, "PLETH"))
    (tmp_path / "cuff.csv").write_text(f"time_s,map,dbp\n{cuff}\n")
    vitals = ["--vitals", tmp_path / "cuff.csv"] if cuff else []
    line, = run(checkpoint, *vitals, path, code=2).stderr.splitlines()
    assert said in line and "add --vitals" not in line and ("if the unit" in line) == (
        "--unit" in said)


def test_a_vital_that_no_arterial_line_gives_is_not_blamed_on_it(checkpoint):
    predictor = predict.Predictor(load_model(checkpoint), "x", {}, None)
    recorded = SimpleNamespace(chosen={"abp": "ABP"}, implausible={})
    assert predictor.why_missing(["spo2"], recorded, {}, {}) == (
        "no SPO2 in the recording; add --vitals CSV of time_s,spo2")


def test_a_unit_must_name_a_channel_or_a_column_of_vitals(tmp_path, night, checkpoint):
    (tmp_path / "cuff.csv").write_text("time_s,map,dbp\n0,10,7.3\n")
    given = [checkpoint, night, "--vitals", tmp_path / "cuff.csv", "--unit", "DBP=kPa", "--unit"]
    out = run(*given, "map=kPa").stdout
    assert "MAP from: vitals (3 min)" in out and "75.0" in out
    err = run(*given, "abpp=kPa", code=2).stderr
    assert "--unit abpp: no such channel or column of --vitals" in err


def test_vitals_come_from_options_then_readings_then_the_line_then_numbers(tmp_path, checkpoint):
    numbers = {"MAP": lambda t: 70 + t / 60, "DBP": lambda t: 50.0, "HR": lambda t: 90.0,
               "NIBP_MEAN": lambda t: 99.0}
    path = write_csv(tmp_path / "r.csv", 245, numbers=numbers)
    (tmp_path / "cuff.csv").write_text("time_s,map\n20,80\n140,100\n")
    table = predicted(tmp_path, checkpoint, path, "--hr", 66, "--vitals", tmp_path / "cuff.csv")
    assert [set(table[f"{key}_from"]) for key in ("map", "dbp", "hr")] == [
        {"vitals"}, {"abp"}, {"option"}]
    held = list(zip(table["map"], table["map_age_s"]))      # not interpolated
    assert held == [(80, 40), (80, 100), (100, 40), (100, 100)]
    table = predicted(tmp_path, checkpoint, path, "--abp-channel", "none")
    assert [set(table[f"{key}_from"]) for key in ("map", "dbp", "hr")] == [{"numbers"}] * 3
    np.testing.assert_allclose(table["map"], [70.48, 71.48, 72.48, 73.48], atol=0.01)
    out = run(checkpoint, path, "--map", 40, code=1).stdout
    assert "4 minutes, 0 with TPP; refused: dbp_above_map 4" in out
    del numbers["MAP"]
    path = write_csv(tmp_path / "r.csv", 65, columns=("x", "PLETH"), numbers=numbers)
    assert list(predicted(tmp_path, checkpoint, path)["map_from"]) == ["cuff"]


def test_implausible_numbers_are_refused_and_counted_by_minute(tmp_path, checkpoint):
    path = write_csv(tmp_path / "r.csv", 121, columns=("x", "PLETH"), numbers={
        "MAP": lambda t: 8388607 if t % 6 == 0 else 86, "DBP": lambda t: 68,
        "HR": lambda t: 0 if t >= 60 and t % 6 == 0 else 75})
    out = run(checkpoint, path, "--out", tmp_path / "o.csv").stdout
    assert "MAP from: numbers (2 min); 20 implausible values refused" in out
    table = pd.read_csv(tmp_path / "o.csv")[["map", "hr", "map_refused", "hr_refused"]]
    assert table.values.tolist() == [[86, 75, 10, 0], [86, 75, 10, 10]]


def test_a_reading_holds_for_half_an_hour_and_no_longer(tmp_path, checkpoint):
    path, cuff = write_csv(tmp_path / "r.csv", 185, columns=("x", "PLETH")), tmp_path / "cuff.csv"
    cuff.write_text("time_s,NIBP_SYS,NIBP_MEAN,NIBP_DIAS\n-1700,120,80,60\n130,120,80,60\n")
    table = predicted(tmp_path, checkpoint, path, "--vitals", cuff)
    assert list(table["refused"]) == ["", "no_map no_dbp", ""]
    assert list(table["tpp"].isna()) == [False, True, False]


def test_a_network_of_pcrit_gives_tpp_and_needs_map(tmp_path):
    model = make_checkpoint(tmp_path / "p.pth", ["ppg", "pp", "p_crit"])
    path, cuff = write_csv(tmp_path / "r.csv", 61, columns=("x", "PLETH")), tmp_path / "cuff.csv"
    assert "needs PP, MAP: no arterial" in run(model, path, code=2).stderr
    cuff.write_text("time_s,sbp,dbp\n20,110,70\n")
    a, b = (predicted(tmp_path, model, path, "--vitals", cuff, "--map", x) for x in (85, 95))
    assert abs(b["tpp"][0] - a["tpp"][0] - 10) < 0.011
    assert (a["pp"][0], a["pp_from"][0], a["pp_age_s"][0]) == (40, "vitals", 40)


def test_the_network_s_own_spread_sets_the_width_of_intervals(tmp_path, night):
    model = make_checkpoint(tmp_path / "s.pth", ["ppg", "map", "p_crit"], outputs=2)
    table = predicted(tmp_path, model, night, "--figure", tmp_path / "f.pdf")
    width = table["high_90"] - table["low_90"]
    np.testing.assert_allclose(table["high_90"] - table["tpp"], width / 2, atol=0.02)
    np.testing.assert_allclose(width, 3 * (table["high_50"] - table["low_50"]), atol=0.1)
    assert np.ptp(width) > 0.05     # not the same for each minute
    assert b"Type3" not in (tmp_path / "f.pdf").read_bytes()


@pytest.mark.parametrize("options, shown, remark", [
    ({"origin": "simulated"}, False, "no prediction intervals: .* --calibrate DATA"),
    ({"calibrated": False}, False, "no prediction intervals: no calibration .* makes one"),
    ({}, True, r"no interval at 95 %: calibrated on too few patients \(12\)"),
    ({"label_method": "mine"}, True, "labels are 'published', not 'mine'")])
def test_intervals_are_given_where_the_calibration_holds(tmp_path, night, options, shown, remark):
    model = make_checkpoint(tmp_path / "m.pth", **options)
    out = run(model, night, "--out", tmp_path / "o.csv", "--figure", tmp_path / "f.svg").stdout
    assert len(re.findall(remark, out)) == 1
    assert ("MODEL TRAINED ON SIMULATED PATIENTS" in out) == ("origin" in options)
    table = pd.read_csv(tmp_path / "o.csv")
    assert "low_95" not in table and ("low_90" in table) == shown
    with pytest.warns(UserWarning, match=remark):
        predict.predict_recording(model, night)


@pytest.mark.parametrize("file, options, said", [
    ({"seconds": 30}, [], "no uninterrupted minute"), ({"columns": ("ABP", "x")}, [], "no PPG"),
    ({}, ["--ppg-channel", "X"], "--ppg-channel"), ({}, ["--map", "0"], "--map 0: expected"),
    ({}, ["--map", "55", "--dbp", "75"], "--dbp 75: expected less than --map 55"),
    ({}, ["--figure", "f.txt"], "ends in .png"), ({}, ["--unit", "kPa"], "CHANNEL=UNIT"),
    ({}, ["none.csv"], "no such file"), ({"scale": 1e6}, [], "cannot be a tissue perfusion")])
def test_bad_input_is_one_clear_line_and_leaves_nothing(tmp_path, file, options, said):
    model = make_checkpoint(tmp_path / "m.pth", scale=file.pop("scale", 10.0))
    path, out = write_csv(tmp_path / "r.csv", **{"seconds": 61, **file}), tmp_path / "x" / "o.csv"
    err = run(model, path, "--out", out, *options, code=2).stderr
    assert said in err.strip().splitlines()[-1] and "Traceback" not in err
    assert not out.parent.exists()


def test_no_input_checkpoint_or_foreign_table_is_overwritten(tmp_path, night, checkpoint):
    for name in ("r.csv", "other.csv"):
        shutil.copy(night, tmp_path / name)
    shutil.copy(checkpoint, tmp_path / "m.csv")
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    for model, out in ((checkpoint, "r.csv"), (checkpoint, "other.csv"), ("m.csv", "m.csv"),
                       (checkpoint, "/proc/nowhere/o.csv")):
        done = run(tmp_path / model, tmp_path / "r.csv", "--out", tmp_path / out, code=2)
        assert done.stderr.startswith("error: ")        # found before the work
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_an_export_gives_what_pytorch_gives_at_any_gain_and_batch_or_is_refused(
        tmp_path, checkpoint, monkeypatch):
    onnxruntime, path = pytest.importorskip("onnxruntime"), str(tmp_path / "m.onnx")
    assert "mmHg from PyTorch on 64 segments" in run(checkpoint, "--export", path).stdout
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    rng = np.random.default_rng(0)
    for n in (1, 64):
        pulses = light(np.arange(3600) / 60 + 97 * np.arange(n)[:, None])
        ppg = (pulses + rng.uniform(-50, 50, (n, 1))) * 10 ** rng.uniform(-3, 3, (n, 1))
        inputs = [x.astype("f4") for x in (ppg[:, None], *rng.uniform(40, 100, (3, n)))]
        tpp, low, high = session.run(None, dict(zip(KEYS, inputs)))
        with torch.no_grad():
            expected = load_model(checkpoint)(*map(torch.from_numpy, inputs))[:, 0].numpy()
        assert tpp.shape == (n,) and np.abs(tpp - expected).max() <= 1e-3
        np.testing.assert_allclose([tpp - low, high - tpp], 9.0, atol=1e-4)
    monkeypatch.setattr(predict, "EXPORT_TOLERANCE", 0.0)
    done = run(checkpoint, "--export", tmp_path / "x" / "m.onnx", code=2)
    assert "not written: onnxruntime and PyTorch differ" in done.stderr
    assert not (tmp_path / "x").exists()
