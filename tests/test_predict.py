"""predict.py: a recording in, TPP by minute out; following a growing recording; the export."""
import contextlib
import csv
import io
import os
import shutil
import signal as signals_of_the_system
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from test_recordings import ROUNDING, files, signals  # noqa: F401 - fixtures

import predict
import recordings
import tk_utils
from models import get_model_v3
from training_header import NormalisedModel, load_checkpoint, load_model, save_checkpoint

ROOT = os.path.dirname(os.path.abspath(predict.__file__))
FS = 100
KEYS = ["ppg", "map", "dbp", "hr", "tpp"]


def make_checkpoint(path, keys=KEYS, calibrated=True, spread=False, **provenance):
    """A small network of random weights whose answers vary with PPG and vitals."""
    torch.manual_seed(3)
    with_ppg = keys[0] == "ppg"
    arguments = {"num_discrete": len(keys) - 1 - with_ppg, "widths": (8, 8, 8),
                 **({} if with_ppg else {"in_channels": 0}),
                 **({"num_outputs": 2} if spread else {})}
    network = get_model_v3(**arguments)
    with torch.no_grad():
        network.mlp[-1].weight *= 10
    usual = {"map": (76.0, 11.0), "dbp": (56.0, 10.0), "hr": (77.0, 17.0), "tpp": (38.0, 11.0),
             "p_crit": (40.0, 15.0), "sbp": (118.0, 19.0), "pp": (62.0, 18.0)}
    normaliser = {key: {"mean": usual[key][0], "sd": usual[key][1], "unit": ""}
                  for key in keys[with_ppg:]}
    n = network.projection.in_features
    calibration = {
        "levels": [0.5, 0.9, 0.95], "half_widths": [3.0, 9.0, None], "n_patients": 12,
        "n_segments": 50, "spread": spread, "error_quantiles": [-1.0, 0.0, 1.0],
        "novelty": {"mean": [0.0] * n, "precision": np.eye(n).tolist(), "level": 0.95,
                    "threshold": 4.0}}
    save_checkpoint(str(path), NormalisedModel(network, keys, normaliser), arguments,
                    {"condition": "default"}, {"train": []}, {"origin": "recordings", **provenance},
                    calibration=calibration if calibrated else None)
    return str(path)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("runs") / "m.pth")


def run(*arguments):
    """(exit code, stdout, stderr) in this process: a subprocess takes seconds to import PyTorch."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = tk_utils.run_script(
                lambda: predict.main([str(a) for a in arguments]), "CheckpointError", "DataError",
                "TrainingError", predict.PredictError, recordings.RecordingError)
        except SystemExit as stop:      # argparse
            code = stop.code
    return code, out.getvalue(), err.getvalue()


def rows_of(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def predicted(tmp_path, *arguments):
    code, out, err = run(*arguments, "--out", tmp_path / "o.csv")
    assert code == 0, out + err
    return rows_of(tmp_path / "o.csv")


def waves(t):
    """(ABP in mmHg, PPG) at times in s: 72 beats/min, slowly varying, and the PPG's shape, too."""
    phase = 2 * np.pi * 1.2 * t
    size, shape = 25 + 6 * np.sin(2 * np.pi * 0.03 * t), 0.4 + 0.2 * np.sin(2 * np.pi * t / 500)
    pulse = np.sin(phase) + 0.4 * np.sin(2 * phase - 1)
    abp = 80 + 5 * np.sin(2 * np.pi * t / 700) + size * pulse
    return abp, 3 * (np.sin(phase - 1) + shape * np.sin(2 * phase - 2))


def write_csv(path, seconds, start_s=0.0, columns=("ABP", "PLETH"), mode="w", numbers=None, fs=FS):
    """`numbers`: {column: function of the time}, a value in the first row of every 2 s."""
    t = start_s + np.arange(int(seconds * fs)) / fs
    found = dict(zip(("ABP", "PLETH"), waves(t)))
    numbers = numbers or {}
    with open(path, mode) as file:
        if mode == "w":
            file.write(",".join(["time_s", *columns, *numbers]) + "\n")
        for i in range(t.size):
            cells = [f"{t[i]:.3f}"] + [f"{found[name][i]:.4f}" for name in columns]
            cells += [f"{value(t[i]):.2f}" if i % (2 * fs) == 0 else ""
                      for value in numbers.values()]
            file.write(",".join(cells) + "\n")
    return path


def test_a_recording_gives_the_same_numbers_in_every_format(tmp_path, checkpoint, files):  # noqa: F811
    expected = None
    for form in sorted(ROUNDING):
        # The .vital files alone hold numbers, of the heart rate.
        rows = predicted(tmp_path, checkpoint, files[form], "--hr", 75)
        assert [row["refused"] for row in rows] == [
            "", "ppg_missing no_map no_dbp", ""], form
        numbers = np.array([[float(row[key] or "nan") for key in (
            "start_s", "tpp", "low_90", "high_50", "map", "dbp", "hr", "tpp_abp")] for row in rows])
        assert rows[0]["vitals_from"] == "map=abp dbp=abp hr=option"
        expected = numbers if expected is None else expected
        np.testing.assert_allclose(numbers[:, :4], expected[:, :4], atol=0.05, err_msg=form)
        np.testing.assert_allclose(numbers[:, 4:7], expected[:, 4:7], atol=0.05, err_msg=form)
        np.testing.assert_allclose(numbers[:, 7], expected[:, 7], atol=0.5, err_msg=form)
    assert abs(expected[0, 1] - expected[2, 1]) > 0.2     # the answers are not all one


@pytest.mark.parametrize("form", sorted(ROUNDING))
def test_windows_of_a_file_give_what_the_whole_file_gives(files, form, monkeypatch):  # noqa: F811
    monkeypatch.setattr(recordings, "TABLE_BYTES", 30000)
    monkeypatch.setattr(recordings, "TABLE_ROWS", 700)
    whole = recordings.read_recording(files[form])
    windows = recordings.Windows(files[form])
    length_s, margin_s, ended, start_s, parts = 20, recordings.WINDOW_MARGIN_S, False, 0, {}
    while not ended:
        part, ended = windows.read(max(0, start_s - margin_s), start_s + length_s + margin_s)
        for name in whole.channels:
            channel = part.channels.get(name)
            parts.setdefault(name, []).append(
                np.full(length_s * 60, np.nan) if channel is None else recordings.resample(
                    recordings.Channel(channel.samples, channel.fs, "", channel.start_s - start_s),
                    60, length_s * 60))
        start_s += length_s
    for name, channel in whole.channels.items():
        if channel.fs > 40:
            expected = recordings.resample(channel, 60, start_s * 60)
            np.testing.assert_allclose(np.concatenate(parts[name]), expected, rtol=2e-6, atol=2e-5)
    assert start_s == 200


def test_windows_of_a_wfdb_record_of_segments_join_to_the_whole(tmp_path):
    for name, seed, n in (("s1", 1, 5000), ("s2", 2, 3333)):
        np.random.default_rng(seed).integers(-9000, 9000, (n, 1)).astype("<i2").tofile(
            tmp_path / f"{name}.dat")
        (tmp_path / f"{name}.hea").write_text(
            f"{name} 1 125 {n}\n{name}.dat 16 100/mmHg 16 0 0 0 0 ABP\n")
    (tmp_path / "m.hea").write_text("m/3 1 125 10333\ns1 5000\n~ 2000\ns2 3333\n")
    whole = recordings.read_recording(str(tmp_path / "m.hea")).channels["ABP"].samples
    windows, parts, ended = recordings.Windows(str(tmp_path / "m.hea")), [], False
    while not ended:
        start_s = 7.3 * len(parts)
        part, ended = windows.read(start_s, start_s + 7.3)
        parts.append(part.channels["ABP"].samples)
    np.testing.assert_array_equal(np.concatenate(parts), whole)


def test_a_recording_longer_than_a_block_has_no_seam(tmp_path, checkpoint, monkeypatch):
    path = write_csv(tmp_path / "r.csv", 60 * 7 + 5)
    whole = predicted(tmp_path, checkpoint, path)
    monkeypatch.setattr(predict, "BLOCK_MINUTES", 2)
    assert predicted(tmp_path, checkpoint, path) == whole
    assert [row["start_s"] for row in whole] == [str(60 * i) for i in range(7)]


def test_the_answers_are_those_of_the_model_on_the_segments_that_prepare_stores(tmp_path,
                                                                               checkpoint):
    import h5py

    import prepare
    path = write_csv(tmp_path / "r.csv", 185)
    rows = predicted(tmp_path, checkpoint, path)
    with contextlib.redirect_stdout(io.StringIO()):
        prepare.main([str(path), "--out", str(tmp_path / "p.h5")])
    with h5py.File(tmp_path / "p.h5", "r") as file:
        fields = {key: torch.from_numpy(item[:]) for key, item in file["r/r"].items()
                  if key in KEYS}
    with torch.no_grad():
        tpp = load_model(checkpoint)(fields["ppg"][:, None], *(fields[k] for k in KEYS[1:-1]))
    np.testing.assert_allclose([float(row["tpp"]) for row in rows], tpp[:, 0], atol=0.01)
    np.testing.assert_allclose([float(row["tpp_abp"]) for row in rows], fields["tpp"], atol=0.01)


def test_without_arterial_line_exactly_the_missing_vitals_are_named(tmp_path, checkpoint):
    path = write_csv(tmp_path / "r.csv", 121, columns=("PLETH",))
    code, _, err = run(checkpoint, path, "--out", tmp_path / "o.csv")
    line = err.strip().splitlines()[-1]
    assert code == 2 and "gives MAP, DBP, which" in line and "--map MMHG --dbp MMHG" in line
    assert "HR" not in line and not os.path.exists(tmp_path / "o.csv")
    code, _, err = run(checkpoint, path, "--map", 75)
    assert code == 2 and "gives DBP, which" in err
    rows = predicted(tmp_path, checkpoint, path, "--map", 75, "--dbp", 55)
    assert [row["vitals_from"] for row in rows] == ["map=option dbp=option hr=ppg"] * 2
    assert abs(float(rows[0]["hr"]) - 72) < 1 and rows[0]["tpp"] and not rows[0]["tpp_abp"]


def test_the_arterial_line_can_be_left_aside(tmp_path, checkpoint):
    path = write_csv(tmp_path / "r.csv", 125)
    rows = predicted(tmp_path, checkpoint, path, "--abp-channel", "none", "--map", 75, "--dbp", 55)
    assert [row["vitals_from"] for row in rows] == ["map=option dbp=option hr=ppg"] * 2
    assert {row["tpp_abp"] for row in rows} == {""}
    code, _, error = run(checkpoint, path, "--abp", "waves/abp")
    assert code == 2 and "--abp, --ppg and --fs are for HDF5 alone" in error


def test_vitals_come_from_options_then_readings_then_numbers_then_pressure(tmp_path, checkpoint):
    path = write_csv(tmp_path / "r.csv", 245, numbers={
        "MAP": lambda t: 70 + t / 60, "DBP": lambda t: 50.0, "HR": lambda t: 90.0})
    (tmp_path / "cuff.csv").write_text("time_s,map\n20,80\n140,100\n")
    rows = predicted(tmp_path, checkpoint, path, "--hr", 66, "--vitals", tmp_path / "cuff.csv",
                     "--max-age", 1)
    assert [row["vitals_from"] for row in rows] == [
        "map=cuff dbp=numbers hr=option"] * 3 + ["map=numbers dbp=numbers hr=option"]
    # Between the readings by straight lines, at the minute's middle, and their age.
    np.testing.assert_allclose([float(row["map"]) for row in rows],
                               [80 + 20 * 10 / 120, 80 + 20 * 70 / 120, 100, 73.48], atol=0.01)
    assert [row["vitals_age_s"] for row in rows] == ["10", "70", "10", ""]
    assert {(row["dbp"], row["hr"]) for row in rows} == {("50.00", "66.00")}


def test_a_reading_holds_for_so_long_and_no_longer(tmp_path, checkpoint):
    path = write_csv(tmp_path / "r.csv", 305, columns=("PLETH",))
    (tmp_path / "cuff.csv").write_text("time_s,NIBP_SYS,NIBP_MEAN,NIBP_DIAS\n100,120,80,60\n")
    rows = predicted(tmp_path, checkpoint, path, "--vitals", tmp_path / "cuff.csv", "--max-age", 2)
    assert [row["refused"] for row in rows] == ["", "", "", "", "no_map no_dbp"]
    assert [row["vitals_age_s"] for row in rows] == ["-70", "-10", "50", "110", ""]
    assert [bool(row["tpp"]) for row in rows] == [True] * 4 + [False]


def test_a_network_of_pcrit_gives_tpp_and_needs_map(tmp_path):
    model = make_checkpoint(tmp_path / "p.pth", ["ppg", "pp", "p_crit"])
    path = write_csv(tmp_path / "r.csv", 61, columns=("PLETH",))
    code, _, err = run(model, path)
    assert code == 2 and "gives PP, MAP, which" in err
    a, b = (predicted(tmp_path, model, path, "--sbp", 120, "--dbp", 70, "--pp", 50, "--map", value)
            for value in (70, 80))
    assert abs(float(b[0]["tpp"]) - float(a[0]["tpp"]) - 10) < 0.011
    code, out, err = run(model, "--export", tmp_path / "p.onnx")
    assert code == 0, err


def test_pulse_pressure_comes_from_systolic_and_diastolic_of_one_source(tmp_path):
    model = make_checkpoint(tmp_path / "p.pth", ["ppg", "pp", "tpp"])
    path = write_csv(tmp_path / "r.csv", 61, columns=("PLETH",), numbers={"SBP": lambda t: 120.0})
    (row,) = predicted(tmp_path, model, path, "--sbp", 125, "--dbp", 70)
    assert (row["pp"], row["vitals_from"]) == ("55.00", "pp=option")
    (tmp_path / "cuff.csv").write_text("time_s,sbp,dbp\n20,110,70\n")
    (row,) = predicted(tmp_path, model, path, "--vitals", tmp_path / "cuff.csv")
    assert (row["pp"], row["vitals_from"], row["vitals_age_s"]) == ("40.00", "pp=cuff", "10")
    code, _, err = run(model, path, "--dbp", 70)        # the other is the monitor's
    assert code == 2 and "gives PP, which" in err


@pytest.mark.parametrize("label", ["tpp", "p_crit"])
def test_the_intervals_of_a_network_with_its_own_spread_are_as_wide_as_it_says(tmp_path, label):
    model = make_checkpoint(tmp_path / "s.pth", ["ppg", "map", label], spread=True)
    path = write_csv(tmp_path / "r.csv", 185)
    rows = predicted(tmp_path, model, path, "--figure", tmp_path / "f.png")
    table = np.array([[float(row[key]) for key in ("tpp", "low_90", "high_90", "low_50", "high_50")]
                      for row in rows])
    np.testing.assert_allclose(table[:, 2] - table[:, 0], table[:, 0] - table[:, 1], atol=0.011)
    np.testing.assert_allclose(table[:, 2] - table[:, 1], 3 * (table[:, 4] - table[:, 3]), atol=0.1)
    assert np.ptp(table[:, 2] - table[:, 1]) > 0.05     # not the same for each minute
    pytest.importorskip("onnx")
    onnxruntime = pytest.importorskip("onnxruntime")
    code, out, err = run(model, path, "--export", tmp_path / "s.onnx")
    assert code == 0 and "on 64 segments" in out, err
    session = onnxruntime.InferenceSession(str(tmp_path / "s.onnx"),
                                           providers=["CPUExecutionProvider"])
    options = predict.parse_arguments([model, str(path)])
    predictor = predict.Predictor(load_checkpoint(model), options)
    ppg, given, _ = predictor.read(predictor.open(str(path)), 0)
    found = session.run(None, {"ppg": ppg[:, None], "map": given["map"].astype("f4")})
    np.testing.assert_allclose(np.stack(found, 1), table[:, :3], atol=0.006)


@pytest.mark.parametrize("asked", [["--out"], ["--watch", "--out"], ["--export"]])
def test_a_network_without_the_ppg_is_refused_in_one_line(tmp_path, asked):
    model = make_checkpoint(tmp_path / "v.pth", ["map", "hr", "tpp"], calibrated=False)
    path = write_csv(tmp_path / "r.csv", 61)
    code, _, err = run(model, path, *asked, tmp_path / "o")
    assert code == 2 and err.strip().endswith("trained without the PPG; evaluate.py is for it")
    assert not (tmp_path / "o").exists()


def test_the_label_beside_the_prediction_is_of_the_kind_that_the_network_learned(tmp_path,
                                                                                checkpoint):
    import labels
    path = write_csv(tmp_path / "r.csv", 185)
    abp = waves(np.arange(180 * FS) / FS)[0].reshape(3, -1)

    def beside(*how):
        model = make_checkpoint(tmp_path / "l.pth", **dict(zip(("label_method", "beats"), how)))
        return [float(row["tpp_abp"]) for row in predicted(tmp_path, model, path)]

    published = beside()
    for how in (("published", "peak"), ("waveform_balance", "foot")):
        expected = labels.label_segments(abp, FS, method=how[0], beats=how[1])["tpp"]
        found = beside(*how)
        np.testing.assert_allclose(found, expected, atol=1.0)
        assert np.abs(np.subtract(found, published)).max() > 0.05
    model = make_checkpoint(tmp_path / "l.pth", label_method="mine", beats="foot")
    code, _, err = run(model, path)
    assert code == 0 and "labels were made (mine, foot) is not known" in err


def test_a_checkpoint_without_calibration_says_that_there_is_no_interval(tmp_path):
    path = write_csv(tmp_path / "r.csv", 61)
    model = make_checkpoint(tmp_path / "m.pth", calibrated=False)
    code, _, err = run(model, path, "--out", tmp_path / "o.csv")
    assert code == 0 and err.count("no intervals") == 1
    (row,) = rows_of(tmp_path / "o.csv")
    assert "low_90" not in row and row["tpp"] and row["unlike_training"] == ""


def test_a_level_with_too_few_patients_is_left_out_and_said(tmp_path, checkpoint):
    path = write_csv(tmp_path / "r.csv", 61)
    code, out, err = run(checkpoint, path, "--out", tmp_path / "o.csv", "--figure",
                         tmp_path / "f.png")
    assert code == 0 and "no interval at 95 %: the 12 tune patients are too few" in err
    (row,) = rows_of(tmp_path / "o.csv")
    assert "low_95" not in row and float(row["high_90"]) - float(row["low_90"]) == pytest.approx(18)
    assert row["unlike_training"] in ("yes", "no")
    assert (tmp_path / "f.png").read_bytes()[:4] == b"\x89PNG"


def test_outputs_hold_no_name_of_the_record(tmp_path, checkpoint):
    path = write_csv(tmp_path / "MRN12345.csv", 61)
    run(checkpoint, path, "--out", tmp_path / "o.csv", "--figure", tmp_path / "f.png")
    for name in ("o.csv", "f.png"):
        assert b"MRN12345" not in (tmp_path / name).read_bytes()


@pytest.mark.parametrize("make, said", [
    (lambda f: ["none.csv"], "no such file"),
    (lambda f: [write_csv(f / "r.csv", 30)], "less than a minute"),
    (lambda f: [write_csv(f / "r.csv", 61, columns=("ABP",))], "no PPG channel"),
    (lambda f: [write_csv(f / "r.csv", 61), "--ppg-channel", "X"], "no PPG channel named X"),
    (lambda f: [shutil.copy(write_csv(f / "r.csv", 61), f / "s.csv") and f], "holds 2 recordings"),
    (lambda f: [write_csv(f / "r.csv", 61), "--vitals", f / "r.csv"], "expected the columns"),
    (lambda f: [write_csv(f / "r.csv", 61, fs=20)], "20 samples/s"),
    (lambda f: [write_csv(f / "r.csv", 61), "--map", "0"], "--map 0: expected"),
    (lambda f: [f / "r.csv", "--watch"], "--watch needs --out"),
])
def test_bad_input_is_one_clear_line_and_leaves_nothing(tmp_path, checkpoint, make, said):
    out = tmp_path / "out" / "o.csv"
    arguments = [*make(tmp_path)] + (["--out", out] if "--watch" not in said else [])
    code, _, err = run(checkpoint, *arguments)
    assert code == 2 and said in err.strip().splitlines()[-1] and "Traceback" not in err
    assert not out.exists()


# ----------------------------------------------------------------------------- following

@contextlib.contextmanager
def watching(checkpoint, target, out):
    with subprocess.Popen(
            [sys.executable, os.path.join(ROOT, "predict.py"), checkpoint, str(target), "--watch",
             "--out", str(out), "--poll", "0.1"], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            text=True, env=dict(os.environ, OMP_NUM_THREADS="1")) as process:
        try:
            yield process
        finally:
            if process.poll() is None:
                process.kill()


def wait_for(condition, process, seconds=240):
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.05)


def n_rows(path):
    return len(path.read_bytes().splitlines()) - 1 if path.exists() else -1


def stopped(process):
    process.send_signal(signals_of_the_system.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    return out, err


def test_a_growing_csv_is_followed_and_a_killed_run_goes_on_with_each_minute_once(tmp_path,
                                                                                 checkpoint):
    path, out = tmp_path / "g.csv", tmp_path / "live.csv"
    write_csv(path, 130)
    with watching(checkpoint, path, out) as process:
        wait_for(lambda: n_rows(out) == 2, process)
        write_csv(path, 55, start_s=130, mode="a")          # to 185 s
        wait_for(lambda: n_rows(out) == 3, process)
        process.kill()
        process.wait()
    with open(out, "a") as file:
        file.write("180,12.3")                              # a row that a crash cut
    write_csv(path, 120, start_s=185, mode="a")
    with open(path, "a") as file:
        file.write("305.000,80.1")                          # a row that is being written
    with watching(checkpoint, path, out) as process:
        wait_for(lambda: n_rows(out) == 5, process)
        said, _ = stopped(process)
    assert "2 minutes added" in said
    with open(path, "rb+") as file:
        file.truncate(os.path.getsize(path) - len("305.000,80.1"))
    assert rows_of(out) == predicted(tmp_path, checkpoint, path)


def test_a_growing_wfdb_record_gives_the_rows_of_the_whole_one(tmp_path, checkpoint):
    wave = np.stack(waves(np.arange(190 * FS) / FS), 1)
    digital = np.rint(wave * 100).astype("<i2")
    path, out = tmp_path / "g.hea", tmp_path / "live.csv"
    lines = "g.dat 16 100(0)/mmHg 16 0 0 0 0 ABP\ng.dat 16 100(0)/NU 16 0 0 0 0 PLETH\n"
    path.write_text(f"g 2 {FS}\n" + lines)
    digital[:70 * FS].tofile(tmp_path / "g.dat")
    options = predict.parse_arguments([checkpoint, str(path), "--watch", "--out", str(out)])
    predictor = predict.Predictor(load_checkpoint(checkpoint), options)
    source = predictor.open(str(path), growing=True)
    one, ended = predictor.minutes(source, 0)
    assert len(one["tpp"]) == 1 and ended and predictor.minutes(source, 1) == ({}, True)
    digital.tofile(tmp_path / "g.dat")
    more, ended = predictor.minutes(source, 1)
    assert len(more["tpp"]) == 2 and ended
    path.write_text(f"g 2 {FS} {len(digital)}\n" + lines)
    whole, ended = predictor.minutes(predictor.open(str(path)), 0)
    np.testing.assert_allclose(whole["tpp"], [*one["tpp"], *more["tpp"]], atol=1e-3)


def test_a_folder_is_followed_file_by_file_and_names_stay_in_a_private_file(tmp_path, checkpoint):
    folder, out = tmp_path / "in", tmp_path / "live.csv"
    folder.mkdir()
    write_csv(folder / "MRN7a.csv", 125)
    with watching(checkpoint, folder, out) as process:
        wait_for(lambda: n_rows(out) == 2, process)
        (folder / "MRN7b.csv").write_text("no recording\n")
        write_csv(folder / "MRN7c.csv", 61)
        wait_for(lambda: n_rows(out) == 3, process)
        _, err = stopped(process)
    assert "file 2 of the folder: " in err and "MRN" not in err
    write_csv(folder / "MRN70.csv", 61)                     # sorts before the others
    with watching(checkpoint, folder, out) as process:
        wait_for(lambda: n_rows(out) == 4, process)
        stopped(process)
    rows = rows_of(out)
    assert [(row["file"], row["start_s"]) for row in rows] == [
        ("1", "0"), ("1", "60"), ("3", "0"), ("4", "0")]
    assert b"MRN" not in out.read_bytes()
    names = (tmp_path / "live_files.csv").read_text().splitlines()
    assert "private" in names[0] and names[2:] == [
        "1,MRN7a.csv", "2,MRN7b.csv", "3,MRN7c.csv", "4,MRN70.csv"]


def test_another_table_is_not_written_to(tmp_path, checkpoint):
    path, out = write_csv(tmp_path / "r.csv", 61), tmp_path / "o.csv"
    out.write_text("mine\n")
    code, _, err = run(checkpoint, path, "--watch", "--out", out)
    assert code == 2 and "was not written by --watch" in err and out.read_text() == "mine\n"


# ----------------------------------------------------------------------------- export

@pytest.fixture(scope="module")
def exported(tmp_path_factory, checkpoint):
    pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    path = tmp_path_factory.mktemp("onnx") / "m.onnx"
    code, out, err = run(checkpoint, "--export", path)
    assert code == 0 and "mmHg from PyTorch on 64 segments" in out, err
    return str(path)


@pytest.mark.parametrize("n", [1, 64])
def test_the_exported_model_gives_what_pytorch_gives_at_any_gain_and_batch(exported, checkpoint, n):
    import onnxruntime
    rng = np.random.default_rng(n)
    gain, offset = 10 ** rng.uniform(-3, 3, (n, 1)), rng.uniform(-50, 50, (n, 1))
    ppg = np.stack([waves(np.arange(3600) / 60 + 97 * i)[1] for i in range(n)])
    ppg = ((ppg + offset) * gain)[:, None].astype("f4")
    vitals = [rng.uniform(*ends, n).astype("f4") for ends in ((50, 100), (40, 70), (50, 120))]
    session = onnxruntime.InferenceSession(exported, providers=["CPUExecutionProvider"])
    tpp, low, high = session.run(None, dict(zip(KEYS, [ppg, *vitals])))
    with torch.no_grad():
        expected = load_model(checkpoint)(*map(torch.from_numpy, [ppg, *vitals]))[:, 0].numpy()
    assert tpp.shape == (n,) and np.abs(tpp - expected).max() <= 1e-3
    np.testing.assert_allclose([tpp - low, high - tpp], 9.0, atol=1e-4)
    assert n == 1 or expected.std() > 0.5


def test_an_export_that_differs_is_refused_and_leaves_nothing(tmp_path, checkpoint, exported,
                                                              monkeypatch):
    monkeypatch.setattr(predict, "EXPORT_TOLERANCE", -1.0)
    code, _, err = run(checkpoint, "--export", tmp_path / "x" / "m.onnx")
    assert code == 2 and "not written, as onnxruntime differs" in err
    assert not (tmp_path / "x").exists()


def test_an_export_is_checked_on_the_recording_that_is_named(tmp_path, exported, checkpoint):
    code, out, _ = run(checkpoint, write_csv(tmp_path / "r.csv", 130), "--export",
                       tmp_path / "m.onnx")
    assert code == 0 and "on 64 segments" in out
    flat = tmp_path / "flat.csv"
    flat.write_text("time_s,PLETH\n" + "".join(f"{i / 50:.2f},1\n" for i in range(4000)))
    code, _, err = run(checkpoint, flat, "--export", tmp_path / "n.onnx")
    assert code == 2 and "no clean minute" in err and not (tmp_path / "n.onnx").exists()


def test_the_example_uses_the_export_without_pytorch(tmp_path, exported):
    np.savetxt(tmp_path / "ppg.txt", waves(np.arange(3600) / 60)[1])
    (tmp_path / "torch.py").write_text("raise ImportError('no PyTorch here')\n")
    done = subprocess.run(
        [sys.executable, os.path.join(ROOT, "examples", "onnx_predict.py"), exported,
         str(tmp_path / "ppg.txt"), "--map", "80"], capture_output=True, text=True,
        env=dict(os.environ, PYTHONPATH=str(tmp_path)))
    assert done.returncode == 0, done.stderr
    assert "tpp: " in done.stdout and "latency of one segment on one core: " in done.stdout
