"""train_resnet.py as its users run it, on small real files and with small networks."""
import json
import os
import re
import select
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from types import SimpleNamespace

import h5py
import numpy as np
import pandas as pd
import pytest
import torch
from conftest import KEYS, call, children, fork, fork_ranks, make_file, needs_children, printed_by

import tk_utils
import train_resnet
from checkpoint import CheckpointError, hash_patients, load_checkpoint, read_salt
from datasets import DataError, TPP_PPG_dataset, create_dataset_index, split_index
from models import MODELS, MyFirstResNet
from training_header import TrainingError, load_model

pytestmark = pytest.mark.usefixtures("small")
OPTIONS = ["--data", "d.h5", "--epochs", "2", "--batch-size", "8", "--device", "cpu"]
SIDE_FILES = {"trajectory.pth", "log.csv", "metrics.json", "run.json", "card.md"}
FIGURES = {f"figures_resnet/{name}_plot.png" for name in (
    "M1.5_loss_lr", "M1.5_histogram", "loss_lr", "histogram")}
OUTPUTS = {"runs/M1.5.pth", *FIGURES, *(f"runs/M1.5/{name}" for name in SIDE_FILES)}


def tree(folder):
    """The files below a folder, as relative paths, without hidden ones (locks)."""
    return {path.relative_to(folder).as_posix() for path in folder.rglob("[!.]*") if path.is_file()}


def read_json(path):
    return json.loads(path.read_text(encoding="utf-8"))


def same_weights(one, other):
    one, other = (torch.load(path, weights_only=True)["model"] for path in (one, other))
    return all(torch.equal(one[key], other[key]) for key in one)


def train(folder, *options, code=0):
    """Run train_resnet.py; returns its stdout, or its stderr if it must fail with this code."""
    done = call(train_resnet, *OPTIONS, *options, cwd=folder, check=code)
    return done.stderr if code else done.stdout


@pytest.fixture
def folder(tmp_path):
    make_file(tmp_path / "d.h5", patients=5, encounters=1, rows=6)
    return tmp_path


@pytest.fixture(scope="module")
def trained(simulated, tmp_path_factory):
    """A folder with a run on simulated patients."""
    folder = tmp_path_factory.mktemp("trained")
    shutil.copy(simulated, folder / "d.h5")
    (folder / "printed.txt").write_text(train(folder, "--recipe", "M1.5"), encoding="utf-8")
    return folder


def test_metrics_json_agrees_with_the_checkpoint_and_counts_the_test_patients(trained):
    found = read_json(trained / "runs/M1.5/metrics.json")
    assert (found["origin"], found["split"], found["n_patients"]) == ("simulated", "test", 3)
    saved = load_checkpoint(trained / "runs/M1.5.pth")["metrics"]
    # TPP = MAP - Pcrit, and MAP is known, so both have the same error.
    assert saved["tpp"]["rmse"] == found["tpp"]["rmse"] == pytest.approx(found["p_crit"]["rmse"])


def test_simulated_data_are_labelled_on_console_in_json_and_in_figures(trained):
    from matplotlib.image import imread
    found = read_json(trained / "runs/M1.5/metrics.json")
    assert "SIMULATED" in (trained / "printed.txt").read_text(encoding="utf-8")
    assert "SIMULATED" in found["note"] and found["simulated"] is True
    for figure in FIGURES:
        red = np.abs(imread(trained / figure)[..., :3] - (0.70, 0.15, 0.12)).max(2) < 0.02
        assert red.sum() > 500, figure


def test_the_log_has_a_row_per_epoch_and_agrees_with_the_trajectory(trained):
    rows = pd.read_csv(trained / "runs/M1.5/log.csv")
    seen = torch.load(trained / "runs/M1.5/trajectory.pth", weights_only=True)
    assert rows["epoch"].tolist() == [1, 2]
    for column, curve in (("train_loss", "epoch_train_loss"), ("tune_loss", "epoch_val_loss"),
                          ("lr", "lr")):
        assert rows[column].tolist() == pytest.approx(seen[curve].tolist(), rel=1e-4)


def test_the_checkpoint_says_how_it_was_made(trained):
    saved = load_checkpoint(trained / "runs/M1.5.pth")
    recipe = {**train_resnet.RECIPES["M1.5"], "epochs": 2, "batch_size": 8, "recipe": "M1.5",
              "seed": 0, "split_seed": 0, "condition": "default", "keys": KEYS, "processes": 1,
              "loss": "mse", "model": "resnet_v3"}
    assert {k: saved["config"][k] for k in recipe} == recipe
    assert saved["model_args"]["num_discrete"] == 3 and saved["spec"] == "resnet_v3"
    assert torch.__version__.startswith(saved["provenance"]["versions"]["torch"].split("+")[0])
    assert len(saved["provenance"]["data_fingerprint"]) == 64 and saved["calibration"]


def test_patients_are_split_by_hash_and_normalised_by_the_train_patients_alone(trained):
    saved, index = load_checkpoint(trained / "runs/M1.5.pth"), create_dataset_index(
        path=trained / "d.h5")
    salt, parts = read_salt(trained / "tpp_ppg.salt"), split_index(index, 0)
    assert saved["split"] == {name: hash_patients(part.patients.tolist(), salt)
                              for name, part in parts.items()}
    column = TPP_PPG_dataset(parts["train"], "segment", ["ppg", "tpp"]).column("tpp").double()
    assert saved["normaliser"]["tpp"]["mean"] == pytest.approx(column.mean().item())
    assert saved["normaliser"]["tpp"]["sd"] == pytest.approx(column.std(unbiased=False).item())


def test_without_data_default_patients_are_simulated_once(monkeypatch, tmp_path):
    path = "data/simulated_12x2_seed3.h5"
    monkeypatch.setattr(train_resnet, "SIMULATED", {"patients": 12, "segments": 2, "seed": 3})
    monkeypatch.setattr(train_resnet, "SIMULATED_FILE", path)
    monkeypatch.setattr(os, "cpu_count", lambda: 1)     # so that this process simulates
    out = call(train_resnet, "--epochs", 1, "--device", "cpu", cwd=tmp_path, check=0).stdout
    assert "training on SIMULATED patients" in out and "recipe small" in out
    assert re.search(r"\nkept of the network \d\.\d\d, of .* \(chosen on \d+ tune patient", out)
    assert tree(tmp_path) == OUTPUTS | {path, "data/tpp_ppg.salt"}
    before = (tmp_path / path).stat().st_mtime_ns
    monkeypatch.chdir(tmp_path)
    assert train_resnet.find_data(train_resnet.parse_args([])) == [path]
    assert (tmp_path / path).stat().st_mtime_ns == before


def test_a_network_of_pcrit_and_its_spread_without_vitals_is_scored_as_tpp(folder):
    assert "nats" in train(folder, "--keys", "ppg", "p_crit", "--loss", "nll", "--name", "P")
    found = read_json(folder / "runs/P/metrics.json")
    assert found["tpp"]["rmse"] == pytest.approx(found["p_crit"]["rmse"])
    model = load_model(folder / "runs/P.pth")
    assert model.keys == ["ppg", "p_crit"] and model.outputs == 2
    assert not (folder / "figures_resnet/loss_lr_plot.png").exists()    # of the default name


@pytest.mark.parametrize("arguments, segments, expected", [
    ([], 3000, {"recipe": "small", "batch_size": 16}),
    ([], 10 ** 6, {"recipe": "large", "batch_size": 256}),
    (["--recipe", "M1.5", "--lr", "0.01", "--epochs", "3", "--weight-decay", "0"], 30,
     {"recipe": "M1.5", "lr": 0.01, "epochs": 3, "weight_decay": 0.0, "model": "resnet_v3"})])
def test_the_recipe_follows_the_size_of_the_data_and_the_options(arguments, segments, expected):
    found = train_resnet.choose_recipe(train_resnet.parse_args(arguments), segments)
    assert {key: found[key] for key in expected} == expected


def test_a_recipe_becomes_arguments_of_the_loop():
    model = SimpleNamespace(scale=torch.tensor([2.0]))  # mmHg per unit of the network's output
    found = train_resnet.loop_arguments(train_resnet.RECIPES["M1.5"], range(10), model)
    assert found == {
        "total_epochs": 10, "lr": 1e-3, "weight_decay": 0.1, "l1_reg": 1e-4,
        "optimizer_type": torch.optim.Adam, "gradient_clipping": None, "average_weights": 0.0,
        "batch_cosine": False, "scheduler_and_args": [
            torch.optim.lr_scheduler.StepLR, {"step_size": 3, "gamma": 0.2}]}
    found = train_resnet.loop_arguments(train_resnet.RECIPES["small"], range(10), model)
    assert found["optimizer_type"] is torch.optim.AdamW and found["gradient_clipping"] == 4.0
    scheduler, arguments = found["scheduler_and_args"]
    assert scheduler is torch.optim.lr_scheduler.OneCycleLR and found["batch_cosine"]
    assert (arguments["max_lr"], arguments["total_steps"]) == (2e-3, 61)


MY_NET = """
import torch
from torch import nn

class MyNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.ppg, self.out = nn.Conv1d(1, 8, 15, 4), nn.LazyLinear(1)

    def forward(self, ppg, *vitals):
        return self.out(torch.cat([self.ppg(ppg).relu().mean(2), torch.stack(vitals, 1)], 1))

def my_loss(prediction, label):
    return torch.nn.functional.smooth_l1_loss(prediction, label)
"""


def test_your_own_network_and_loss_are_trained_and_scored_in_every_fold(folder):
    (folder / "mine").mkdir()
    (folder / "mine/my_net.py").write_text(MY_NET)
    folds = ["--folds", "3", "--ablate", "--name", "own"]
    train(folder, *folds, "--model", "mine/my_net.py:MyNet", "--loss", "mine/my_net.py:my_loss")
    saved = load_checkpoint(folder / "runs/own_fold0.pth")
    assert saved["spec"] == "my_net.py:MyNet" and saved["config"]["loss"] == "my_net.py:my_loss"
    assert read_json(folder / "runs/own/summary.json")["together"]["n_patients"] == 5
    without = load_checkpoint(folder / "runs/own_fold0_no_vitals.pth")
    assert (without["keys"], without["inputs"]) == (["ppg", "tpp"], KEYS[:-1])
    assert {*read_json(folder / "runs/own_fold0/metrics.json")["compared"]} == {
        "model without the PPG", "model without vitals"}
    assert "model my_net.py:MyNet (now resnet_" in train(folder, *folds, code=2)


def test_an_architecture_of_the_table_that_needs_a_ppg_gets_zeros_without_it(folder, monkeypatch):
    monkeypatch.setitem(MODELS, "mine", lambda num_discrete: MyFirstResNet(
        num_discrete=num_discrete, widths=(4, 4, 8)))
    train(folder, "--model", "mine", "--ablate", "--name", "mine")
    without = load_checkpoint(folder / "runs/mine_no_ppg.pth")
    assert (without["keys"], without["inputs"]) == (KEYS[1:], KEYS[:-1])


def run_script(*options):
    """Run train_resnet.py with these options in a fork."""
    sys.argv[1:] = [*OPTIONS, *options]
    return tk_utils.run_script(train_resnet.main, CheckpointError, DataError, TrainingError)


def started(folder, *options, work=None):
    """Start a long run in a fork; returns the process after its first epoch."""
    (folder / ".printed").touch()
    process = fork(work or partial(run_script, "--epochs", "500", *options), folder)
    while "epoch 1/" not in (printed := (folder / ".printed").read_text()):
        assert process.is_alive(), printed
        time.sleep(0.05)
    return process


@pytest.mark.parametrize("number, epochs", [
    (signal.SIGINT, 500), (signal.SIGTERM, 500), (signal.SIGTERM, 1)])     # 1: while it is scored
def test_a_signal_saves_and_ends_with_exit_code_3(folder, number, epochs):
    process = started(folder, "--epochs", str(epochs))
    err = train(folder, code=2)
    assert "another process is training under this name" in err and "--name" in err
    os.kill(process.pid, number)
    text = printed_by([process], folder, code=3)
    assert "the same command continues from here" in text and "Traceback" not in text
    err = train(folder, "--lr", "0.01", code=2)
    assert f"epochs {epochs} (now 2)" in err and "(now 0.01)" in err
    assert "--fresh" in err and "--name" in err
    if epochs == 1:
        assert "continuing from" in train(folder, "--epochs", "1")
    else:
        assert "continuing from" not in train(folder, "--fresh")
    assert not os.path.exists(folder / "runs/M1.5/resume.pth")


def test_a_finished_run_is_never_overwritten(trained, tmp_path):
    copied, same = shutil.copytree(trained, tmp_path / "copy"), ["--recipe", "M1.5"]
    path = copied / "runs/M1.5.pth"
    before = path.read_bytes()
    assert "this run is finished" in train(copied, *same)
    err = train(copied, *same, "--seed", "3", code=2)
    assert "seed 0 (now 3)" in err and "--fresh" in err and "--name" in err
    assert path.read_bytes() == before
    # an option that is newer than the saved run had its default value
    saved = load_checkpoint(path)
    for key in ("anchor", "precision", "loss"):
        del saved["config"][key]
    torch.save(saved, path)
    assert "this run is finished" in train(copied, *same)
    assert "loss mse (now l1)" in train(copied, *same, "--loss", "l1", code=2)
    saved["split"]["test"] = saved["split"]["train"]    # as if `split_index` had changed
    del saved["metrics"]["tpp"]["sd"]                   # as if this score were newer
    torch.save(saved, path)
    assert "other train, tune or test patients" in train(copied, *same, code=2)
    saved["provenance"]["salt"] = "another"             # then a changed split cannot be detected
    torch.save(saved, path)
    assert "this run is finished" in train(copied, *same)
    with h5py.File(copied / "d.h5", "a") as file:       # changed data are another experiment
        file["sim1-000000/1/tpp"][...] += 1
    assert "other data" in train(copied, *same, code=2)


def test_files_that_are_not_ours_are_left_alone(folder):
    (folder / "runs").mkdir()
    (folder / "runs/mine.pth").write_text("not a checkpoint")
    for options in ([], ["--fresh"]):
        assert "not a checkpoint" in train(folder, "--name", "mine", *options, code=2)
    assert (folder / "runs/mine.pth").read_text() == "not a checkpoint"


@pytest.fixture
def other_patients(trained, folder):
    """A folder with the parent's salt and data of other patients."""
    shutil.copy(trained / "tpp_ppg.salt", folder)
    return folder


def test_fine_tuning_takes_the_parents_weights_and_remembers_its_patients(trained, other_patients):
    parent = trained / "runs/M1.5.pth"
    train(other_patients, "--init-from", parent, "--lr", "1e-12", "--epochs", "1")
    child, parent = load_checkpoint(other_patients / "runs/M1.5.pth"), load_checkpoint(parent)
    assert all(torch.allclose(child["model"][k], v, atol=1e-9) for k, v in parent["model"].items())
    assert child["normaliser"] == parent["normaliser"]
    assert child["split"]["ancestors"] == sorted(parent["split"]["train"] + parent["split"]["tune"])
    assert child["provenance"]["parent"] and not parent["provenance"]["parent"]


def test_a_parent_that_does_not_fit_or_knows_the_patients_is_refused(trained, other_patients):
    for options, message in (
            (["--loss", "nll"], "the network has 1 output, --loss nll needs 2"),
            (["--keys", "ppg", "map", "tpp"], "M1.5.pth: needs --keys ppg map dbp hr tpp"),
            (["--data", trained / "d.h5", "--split-seed", 1],
             "trained or tuned on patients that would be tune patients here; fine-tuning needs")):
        assert message in train(other_patients, "--init-from", trained / "runs/M1.5.pth", *options,
                                code=2)
    assert tree(other_patients) == {"d.h5", "tpp_ppg.salt"}


def test_seeds_folds_and_ablations_multiply_and_each_run_has_its_name():
    runs = {run.name: run for run in train_resnet.list_runs(train_resnet.parse_args(
        ["--seeds", "2", "--seed", "5", "--folds", "3", "--ablate"]))}
    one = runs["M1.5_seed6_fold2_no_ppg"]
    assert (len(runs), one.seed, one.fold, one.keys) == (18, 6, 2, ["map", "dbp", "hr", "tpp"])


FOLDED = ["--epochs", "1", "--batch-size", "32", "--folds", "3", "--ablate", "--name", "x"]


@pytest.fixture(scope="module")
def folded(simulated, tmp_path_factory):
    """A folder with three folds and their ablations, one epoch each."""
    folder = tmp_path_factory.mktemp("folded")
    shutil.copy(simulated, folder / "d.h5")
    printed = train(folder, *FOLDED)
    lines = [line for line in printed.splitlines() if line.startswith("x_fold")]
    assert [line.split(":")[0] for line in lines[:9]] == [
        f"x_fold{n}{ending} ({3 * n + k} of 9)" for n in range(3)
        for k, ending in enumerate(("_no_ppg", "_no_vitals", ""), 1)]
    assert "epoch 1/1" not in printed
    return folder


def test_the_summary_scores_all_folds_together_and_each_run_lists_its_ablations(folded):
    found = read_json(folded / "runs/x/summary.json")
    together, runs = found["together"], found["runs"]
    assert together["n_patients"] == sum(one["n_patients"] for one in runs)
    squared = sum(one["n_segments"] * one["tpp"]["rmse"] ** 2 for one in runs)
    assert together["tpp"]["rmse"] == pytest.approx((squared / together["n_segments"]) ** 0.5)
    assert "SIMULATED" in together["note"]
    assert os.path.exists(folded / "figures_resnet/x_histogram_plot.png")
    compared = read_json(folded / "runs/x_fold2/metrics.json")["compared"]
    assert set(compared) == {"model without the PPG", "model without vitals"}
    alone = read_json(folded / "runs/x_fold2_no_ppg/metrics.json")
    assert alone["keys"] == ["map", "dbp", "hr", "tpp"]
    assert compared["model without the PPG"]["rmse"] == pytest.approx(alone["tpp"]["rmse"])


def test_the_same_command_keeps_finished_runs_and_trains_a_missing_one_to_the_same_bits(folded):
    before = (folded / "runs/x_fold0.pth").read_bytes()
    shutil.move(folded / "runs/x_fold1.pth", folded / "first.pth")
    assert train(folded, *FOLDED).count("this run is finished") == 8
    assert same_weights(folded / "first.pth", folded / "runs/x_fold1.pth")
    assert (folded / "runs/x_fold0.pth").read_bytes() == before


def test_two_processes_at_half_the_batch_learn_the_same_and_one_of_them_writes(folder):
    # (test_training_header.py compares the loop to 1e-9; here Adam amplifies rounding.)
    train(folder, "--epochs", "1", "--batch-size", "4", "--name", "one")
    both = partial(run_script, "--epochs", "1", "--batch-size", "2", "--name", "two")
    text = printed_by(fork_ranks(both, folder), folder)
    assert text.count("test: 6 segments") == text.count("epoch 1/1: train loss") == 1
    assert load_checkpoint(folder / "runs/two.pth")["config"]["processes"] == 2
    one, two = (torch.load(folder / f"runs/{name}/trajectory.pth", weights_only=True)
                for name in ("one", "two"))
    for name in ("epoch_train_loss", "epoch_val_loss", "lr"):
        assert two[name].tolist() == pytest.approx(one[name].tolist(), rel=3e-3), name


def test_tensorboard_gets_scalars_hyper_parameters_and_figures(folder):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    train(folder, "--tensorboard")
    found = accumulator.EventAccumulator(str(folder / "runs/M1.5/tensorboard"),
                                         size_guidance={"images": 0}).Reload()
    assert {"train_loss", "tune_loss", "lr"} <= set(found.Tags()["scalars"])
    assert found.Tags()["images"] == ["losses"] and len(found.Scalars("tune_loss")) == 2
    assert "_hparams_/experiment" in found.summary_metadata


def test_a_loss_that_is_not_finite_names_the_batch_and_saves_nothing(folder):
    err = train(folder, "--lr", "1e30", code=2)
    line = err.strip().splitlines()[-1]
    assert "MRN" not in err
    assert re.match(r"error: the training loss is not finite at epoch \d, batch \d", line)
    assert re.search(r"Its patients: [0-9a-f]{16}", line)
    assert tree(folder) == {"d.h5", "tpp_ppg.salt"}


@pytest.mark.skipif(os.name != "posix" or os.geteuid() != 0, reason="mounting a tmpfs needs root")
def test_a_full_disk_ends_in_one_line_and_the_run_goes_on_when_there_is_room(folder):
    small = folder / "runs"
    small.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", small],
                      capture_output=True).returncode:
        pytest.skip("no tmpfs can be mounted here")
    try:
        err = train(folder, code=2)
        assert err.splitlines()[-1].startswith("error: ")
        assert "No space left on device" in err and "Traceback" not in err
        assert not list(small.rglob("*.tmp"))
        subprocess.run(["mount", "-o", "remount,size=200m", small], check=True)
        train(folder)
        train(folder, "--name", "again")
        assert same_weights(small / "M1.5.pth", small / "again.pth")
    finally:
        subprocess.run(["umount", small], check=True)


def change(process, folder):
    with h5py.File(folder / "d.h5", "a") as file:
        file["MRN000/CSN0000/tpp"][0] += 1


@needs_children
@pytest.mark.parametrize("workers, harm, message", [
    (0, change, "changed since the index was made"),
    (0, lambda process, folder: os.truncate(folder / "d.h5", 2000), "d.h5"),
    (2, lambda process, folder: os.kill(children(process.pid)[-1], signal.SIGKILL),
     "a loader worker")])
def test_damaged_data_and_a_killed_worker_end_a_run_in_one_line(folder, workers, harm, message):
    process = started(folder, "--workers", str(workers))
    harm(process, folder)
    text = printed_by([process], folder, code=2)
    line = text.strip().splitlines()[-1]
    assert line.startswith("error: ") and message in line and "Traceback" not in text, text


@needs_children
@pytest.mark.parametrize("victim", ["a rank", "the launcher"])
def test_when_a_rank_or_its_launcher_dies_all_end_within_a_minute(folder, victim):
    def launch():       # like torchrun, but it does not end the other rank
        for process in fork_ranks(partial(run_script, "--epochs", "500"), folder):
            process.join()

    reading, writing = os.pipe()
    launcher = started(folder, work=launch)
    os.close(writing)
    killed = children(launcher.pid)[-1] if victim == "a rank" else launcher.pid
    os.kill(killed, signal.SIGKILL)
    ended, _, _ = select.select([reading], [], [], 60)      # closed when the last has ended
    os.close(reading)
    launcher.join()
    assert ended, (folder / ".printed").read_text()


@pytest.mark.parametrize("options, message", [
    (("--data", "absent.h5"), "absent.h5: no such file"),
    (("--condition", "r2 > 1"), "no segment passes the quality gate"),
    (("--keys", "ppg", "r2", "tpp"), "'r2' cannot be an input: expected ppg, map"),
    (("--keys", "ppg", "map", "sbp"), "--keys: expected ppg, then vitals"),
    (("--keys", "map", "ppg", "tpp"), "expected ppg, then vitals"),
    (("--keys", "tpp"), "--keys: expected ppg"),
    (("--device", "toaster"), "device 'toaster'"),
    (("--model", "absent.py:Net"), "--model absent.py:Net: expected resnet_v3"),
    (("--data", "absent.h5", "--loss", "hubris"), "--loss hubris: expected mse"),   # checked first
    (("--data", "absent.h5", "--model", "resnet_v9"), "--model resnet_v9: expected resnet_v3"),
    (("--batch-size", "-3"), "--batch-size -3: expected at least 1"),
    (("--lr", "nan"), "--lr nan: expected more than 0"),
    (("--lr", "0"), "--lr 0.0: expected more than 0"),
    (("--folds", "2"), "--folds 2: expected at least 3"),
    (("--keys", "ppg", "tpp", "--ablate"), "expected --keys with ppg and vitals"),
    (("--ablate", "--init-from", "a.pth"), "expected --keys with ppg and vitals, and no"),
    (("--init-from", "a.pth"), "a.pth: no such checkpoint"),
    (("--loss", "bad.py:square"), "the loss fails on a batch (TypeError: square() missing"),
    (("--name", "../elsewhere"), "expected letters, digits"),
    (("--recipe", "secret"), "invalid choice: 'secret' (choose from"),
    (("--no-such-option",), "--no-such-option (--help lists the options)")])
def test_training_refuses_bad_input_in_one_line_and_writes_nothing(folder, options, message):
    (folder / "bad.py").write_text("def square(a, b, c): return (a - b) ** c")
    err = train(folder, *options, code=2)
    errors = [line for line in err.splitlines() if "error: " in line]
    assert len(errors) == 1 and message in errors[0] and "Traceback" not in err, err
    assert tree(folder) <= {"d.h5", "bad.py", "tpp_ppg.salt"}
