"""Seeds, folds, runs without the PPG or without vitals, and networks that predict their spread."""
import json
import os
import shutil

import numpy as np
import pytest
import torch
from test_training import segments

import metrics
import train_resnet
from evaluate import compare_runs, evaluate
from training_header import (
    DataError,
    NormalisedModel,
    get_model_v3,
    init_steady,
    likelihood_loss,
    load_checkpoint,
    load_model,
    training_loop,
)

SMALL = {"widths": (4, 4, 8), "kernel_sizes": 5}


def names_of(*arguments):
    return [one.name for one in train_resnet.repeats(train_resnet.parse_args(arguments))]


# ---------------------------------------------------------------- which runs

def test_seeds_folds_and_ablations_multiply_and_each_run_has_its_name():
    assert names_of() == ["M1.5"]
    assert names_of("--seeds", "2", "--seed", "5", "--name", "a") == ["a_seed5", "a_seed6"]
    assert names_of("--folds", "3") == ["M1.5_fold0", "M1.5_fold1", "M1.5_fold2"]
    assert names_of("--ablate") == ["M1.5_no_ppg", "M1.5_no_vitals", "M1.5"]
    both = names_of("--seeds", "2", "--folds", "3", "--ablate")
    assert len(set(both)) == 18 and both[2::3][:4] == [
        "M1.5_seed0_fold0", "M1.5_seed0_fold1", "M1.5_seed0_fold2", "M1.5_seed1_fold0"]


def test_each_run_has_the_options_that_its_name_says():
    runs = train_resnet.repeats(train_resnet.parse_args(["--seeds", "2", "--folds", "3",
                                                         "--ablate"]))
    by_name = {one.name: one for one in runs}
    one = by_name["M1.5_seed1_fold2_no_ppg"]
    assert (one.seed, one.fold, one.keys) == (1, 2, ["map", "dbp", "hr", "tpp"])
    assert by_name["M1.5_seed0_fold1_no_vitals"].keys == ["ppg", "tpp"]
    assert by_name["M1.5_seed0_fold1"].keys == train_resnet.KEYS


@pytest.mark.parametrize("arguments, message", [
    (["--folds", "2"], "--folds 2: expected at least 3"),
    (["--seeds", "1"], "--seeds 1: expected at least 2"),
    (["--keys", "ppg", "tpp", "--ablate"], "expected --keys with ppg and vitals"),
    (["--keys", "map", "ppg", "tpp"], "expected ppg, then vitals, then tpp or p_crit"),
    (["--keys", "tpp"], "expected ppg, then vitals, then tpp or p_crit"),
    (["--keys", "ppg"], "expected ppg, then vitals, then tpp or p_crit"),
    (["--ablate", "--init-from", "a.pth"], "--ablate does not go with --init-from")])
def test_options_that_make_no_sense_are_refused(arguments, message, capsys):
    with pytest.raises(SystemExit):
        train_resnet.parse_args(arguments)
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("arguments, segments, said", [
    (["--data", "d.h5"], 512, "20 steps in all are few to learn in: --batch-size 16 makes 320"),
    (["--data", "d.h5", "--batch-size", "16"], 512, ""), (["--data", "d.h5"], 10_000, ""),
    ([], 99, "")])
def test_too_few_steps_are_told_with_what_to_do(arguments, segments, said, capsys):
    train_resnet.warn_of_few_steps(train_resnet.parse_args(arguments), segments, 1)
    assert capsys.readouterr().out.strip() == said


# ---------------------------------------------------------------- folds, ablated

@pytest.fixture(scope="module")
def folded(simulated, tmp_path_factory):
    """(folder, what was printed) of three folds with their ablations, one epoch each."""
    folder = tmp_path_factory.mktemp("folded")
    shutil.copy(simulated, folder / "s.h5")
    before, metrics.BOOSTING_ROUNDS = metrics.BOOSTING_ROUNDS, 5
    train(folder)
    yield folder
    metrics.BOOSTING_ROUNDS = before


def train(folder, *more):
    patch = pytest.MonkeyPatch()
    patch.chdir(folder)
    patch.setattr("sys.argv", [
        "train_resnet.py", "--data", "s.h5", "--epochs", "1", "--batch-size", "32", "--device",
        "cpu", "--folds", "3", "--ablate", "--name", "x", *more])
    try:
        assert not train_resnet.main()
    finally:
        patch.undo()


def test_each_patient_is_tested_by_one_fold_and_trained_or_tuned_on_by_the_others(folded):
    splits = [load_checkpoint(folded / f"runs/x_fold{n}.pth")["split"] for n in range(3)]
    tested = [set(split["test"]) for split in splits]
    assert sum(map(len, tested)) == len(set.union(*tested))
    for split, own in zip(splits, tested):
        assert own | set(split["train"]) | set(split["tune"]) == set.union(*tested)
        assert not own & (set(split["train"]) | set(split["tune"]))


def test_the_summary_scores_all_folds_as_one_set_of_patients(folded):
    found = json.loads((folded / "runs/x_summary.json").read_text())
    together, runs = found["together"], found["runs"]
    assert together["n_patients"] == sum(one["n_patients"] for one in runs)
    assert together["n_segments"] == sum(one["n_segments"] for one in runs)
    squared = sum(one["n_segments"] * one["tpp"]["rmse"] ** 2 for one in runs)
    assert together["tpp"]["rmse"] == pytest.approx((squared / together["n_segments"]) ** 0.5)
    ridge = [one["baselines"]["ridge"]["rmse"] ** 2 * one["n_segments"] for one in runs]
    assert together["baselines"]["ridge"]["rmse"] == pytest.approx(
        (sum(ridge) / together["n_segments"]) ** 0.5)
    best = [one["baselines"][one["skill"]["over"]]["rmse"] ** 2 * one["n_segments"] for one in runs]
    assert together["skill"]["value"] == pytest.approx(1 - squared / sum(best))
    assert "SIMULATED" in together["note"]


def test_the_runs_without_ppg_and_without_vitals_stand_in_the_table_of_the_run(folded):
    for n in range(3):
        scores = json.loads((folded / f"runs/x_fold{n}_metrics.json").read_text())
        assert set(scores["compared"]) == {"network without the PPG", "network without vitals"}
        alone = json.loads((folded / f"runs/x_fold{n}_no_ppg_metrics.json").read_text())
        assert alone["keys"] == ["map", "dbp", "hr", "tpp"]
        assert scores["compared"]["network without the PPG"]["rmse"] == pytest.approx(
            alone["tpp"]["rmse"], rel=1e-6)
    together = json.loads((folded / "runs/x_summary.json").read_text())["together"]
    assert set(together["compared"]) == {"network without the PPG", "network without vitals"}


def test_a_network_without_the_ppg_does_not_read_it(folded):
    model = load_model(str(folded / "runs/x_fold0_no_ppg.pth"))
    assert sum(p.numel() for p in model.parameters()) < 10_000
    assert model(*torch.tensor([[75.0], [60.0], [80.0]])).shape == (1, 1)


def test_started_again_finished_runs_are_kept_and_the_missing_one_is_trained_the_same(folded,
                                                                                      capsys):
    before = {path.name: path.read_bytes() for path in (folded / "runs").glob("x_fold?.pth")}
    weights = load_checkpoint(folded / "runs/x_fold1.pth")["model"]
    for path in (folded / "runs").glob("x_fold1[._]*"):
        os.remove(path)
    train(folded)
    printed = capsys.readouterr().out
    assert printed.count("this run is finished") == 6 and "x_fold1: run 6 of 9" in printed
    again = load_checkpoint(folded / "runs/x_fold1.pth")["model"]
    assert all(torch.equal(again[key], weights[key]) for key in weights)
    for n in (0, 2):
        assert (folded / f"runs/x_fold{n}.pth").read_bytes() == before[f"x_fold{n}.pth"]


def test_a_dry_run_names_every_run(folded, capsys):
    train(folded, "--dry-run")
    printed = capsys.readouterr().out
    assert "9 runs" in printed and all(name in printed for name in ("x_fold0_no_ppg", "x_fold2"))


def test_the_same_run_twice_has_its_own_scores_and_counts_each_patient_once(folded, monkeypatch):
    monkeypatch.chdir(folded)
    path = "runs/x_fold0.pth"
    one, _ = evaluate(path, device="cpu")
    both, arrays = compare_runs([path, path], device="cpu")
    together = both["together"]
    assert together["n_patients"] == one["n_patients"]
    assert len(arrays["truth"]) == 2 * one["n_segments"]
    assert together["tpp"]["rmse"] == pytest.approx(one["tpp"]["rmse"])
    assert together["tpp"]["ci95"]["rmse"] == pytest.approx(one["tpp"]["ci95"]["rmse"])
    assert together["trend"]["tpp"]["n_changes"] == 2 * one["trend"]["tpp"]["n_changes"]


# ---------------------------------------------------------------- a network's own spread

def test_the_likelihood_is_that_of_pytorch_and_its_weight_leaves_the_squared_errors_gradient():
    estimate = torch.tensor([40.0, 30.0], requires_grad=True)
    spread, label = torch.tensor([3.0, 8.0], requires_grad=True), torch.tensor([42.0, 20.0])
    each, weight = likelihood_loss(estimate, spread, label)
    expected = torch.nn.functional.gaussian_nll_loss(estimate, label, spread ** 2, reduction="none")
    assert torch.allclose(each, expected)
    (each * weight).sum().backward()
    assert torch.allclose(estimate.grad, 2 * (estimate.detach() - label))
    # at the true spread, |error|, the spread has nothing to gain
    wide = torch.tensor([2.0, 10.0], requires_grad=True)
    likelihood_loss(estimate.detach(), wide, label)[0].sum().backward()
    assert torch.allclose(wide.grad, torch.zeros(2), atol=1e-6)
    assert torch.equal(likelihood_loss(estimate, spread, label, torch.tensor([1.0, 0.5]))[1],
                       weight * torch.tensor([1.0, 0.5]))


def test_a_network_of_two_outputs_gives_mmhg_and_a_spread_above_nothing():
    torch.manual_seed(0)
    normaliser = {"map": {"mean": 75.0, "sd": 10.0}, "tpp": {"mean": 35.0, "sd": 12.0}}
    network = get_model_v3(1, num_outputs=2, **SMALL)
    model = NormalisedModel(network, ["ppg", "map", "tpp"], normaliser).eval()
    ppg, vital = torch.randn(5, 1, 600), torch.full((5,), 80.0)
    out, inner = model(ppg, vital), []
    network.register_forward_hook(lambda _, inputs, output: inner.append(output))
    model(ppg, vital)
    assert torch.allclose(out[:, 0], inner[0][:, 0] * 12 + 35)
    assert torch.allclose(out[:, 1], 12 * (torch.log1p(inner[0][:, 1].exp()) + 0.01))
    with torch.no_grad():
        network.mlp[3].bias[1] = -1e4
    assert (model(ppg, vital)[:, 1] >= 0.12 - 1e-6).all()


def test_the_spread_learns_where_the_label_is_noisy():
    """Labels whose SD is 1 or 10 mmHg, as the vital says."""
    torch.manual_seed(0)
    vital = torch.rand(512)
    label = 40 + torch.randn(512) * torch.where(vital > 0.5, 10.0, 1.0)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(vital, label), 64)
    normaliser = {"map": {"mean": 0.5, "sd": 0.3}, "tpp": {"mean": 40.0, "sd": 7.0}}
    model = NormalisedModel(get_model_v3(1, in_channels=0, num_outputs=2), ["map", "tpp"],
                            normaliser)
    model, trajectory = training_loop(model, loader, loader, 60, 3e-3, criterion="nll",
                                      device="cpu")
    spread = model.eval()(torch.tensor([0.1, 0.9]))[:, 1]
    assert 0.5 < spread[0] < 2 and 7 < spread[1] < 13
    assert trajectory["epoch_val_loss"][-1] < trajectory["epoch_val_loss"][0]


def test_a_run_with_its_own_spread_is_calibrated_by_it_and_scored(folded, run):
    run("train_resnet.py", "--data", "s.h5", "--epochs", 1, "--batch-size", 32, "--device", "cpu",
        "--spread", "--name", "own", cwd=folded, check=0)
    saved = load_checkpoint(folded / "runs/own.pth")
    assert saved["model_args"]["num_outputs"] == 2 and saved["calibration"]["spread"]
    scores = json.loads((folded / "runs/own_metrics.json").read_text())
    assert scores["uncertainty"]["own_spread"]
    levels = scores["uncertainty"]["levels"]
    assert levels["50 %"]["half_width"] > 0 and "refused" in levels["90 %"]     # 3 tune patients
    log = np.genfromtxt(folded / "runs/own_log.csv", delimiter=",", names=True)
    assert 0 < log["tune_loss"] < 20                    # -log likelihood, not a squared error
    done = run("train_resnet.py", "--data", "s.h5", "--init-from", "runs/own.pth", "--name", "on",
               cwd=folded, check=2)
    assert "with --spread it goes on" in done.stderr


# ---------------------------------------------------------------- the network without a waveform

def test_without_a_waveform_the_network_is_its_head_alone():
    torch.manual_seed(0)
    network = init_steady(get_model_v3(2, in_channels=0))
    assert len(network.layers) == 0 and network.projection.in_features == 2
    vitals = torch.randn(2, 7)
    expected = network.mlp(network.projection(vitals.T))
    assert torch.equal(network(*vitals), expected)
    assert expected.std() > 0
    with pytest.raises(ValueError, match="expected 2 vitals, got 1"):
        network(vitals[0])
    with pytest.raises(ValueError, match="nothing to learn from"):
        get_model_v3(0, in_channels=0)
    with pytest.raises(DataError, match="keys"):
        NormalisedModel(network, ["ppg", "map", "tpp"], {})


def test_a_model_with_the_ppg_still_needs_it():
    model = get_model_v3(1, **SMALL)
    ppg, vital = next(iter(torch.utils.data.DataLoader(segments(4), 4)))[:2]
    assert model(ppg, vital).shape == (4, 1)
    with pytest.raises(ValueError, match="expected 1 vitals beside the PPG, got 0"):
        model(ppg)
