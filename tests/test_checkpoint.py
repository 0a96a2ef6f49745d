"""checkpoint.py: saving and loading, other files, your own networks, salts."""
# ruff: noqa: I001
import inspect
import os
import pickle
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, fork, make_file, printed_by
from test_training_header import KEYS, NORMALISER, SMALL, some_inputs, wrapped

from checkpoint import (
    CheckpointError, default_salt_path, hash_patients, new_network, patient_parts, read_salt,
    salt_mark, save_checkpoint, save_tensors, seen_by)
from datasets import DataError, create_dataset_index, split_index
from training_header import MyFirstResNet, NormalisedModel, get_model_v3, load_model


@pytest.mark.parametrize("arguments, options", [(SMALL, ()), (
    {"num_discrete": 3, "widths": (4, 8, 8, 16), "kernel_sizes": [3, 5, 7, 9], "strides": [2, 4, 2],
     "dropout": 0.25, "num_outputs": 2},
    ("none", {"coefficients": {"map": 0.5, "dbp": 0.2, "hr": -0.1}, "intercept": 3.0, "sd": 9.0}))])
def test_a_checkpoint_gives_back_the_same_model(tmp_path, arguments, options):
    model = NormalisedModel(get_model_v3(**arguments), KEYS, NORMALISER, *options).eval()
    save_checkpoint(tmp_path / "m.pth", model, metrics={"tpp": {"rmse": 5.0}})
    again = load_model(tmp_path / "m.pth")
    ppg, vitals = some_inputs()
    assert torch.equal(again(ppg, *vitals), model(ppg, *vitals))
    assert repr(again.network) == repr(model.network)       # dropout as well
    assert set(again.network.arguments) == set(inspect.signature(MyFirstResNet).parameters)
    assert not again.training and again.keys == KEYS and again.normaliser == NORMALISER
    assert (again.ppg_normalisation, again.anchor) == (model.ppg_normalisation, model.anchor)
    saved = torch.load(tmp_path / "m.pth", weights_only=True)       # plain data
    assert saved["spec"] == "resnet_v3" and saved["metrics"] == {"tpp": {"rmse": 5.0}}
    assert set(saved["model"]) == set(model.network.state_dict())       # published names


def test_a_checkpoint_is_written_atomically(tmp_path):
    save_checkpoint(tmp_path / "m.pth", wrapped())
    before = (tmp_path / "m.pth").read_bytes()
    with pytest.raises((pickle.PicklingError, AttributeError, TypeError)):
        save_checkpoint(tmp_path / "m.pth", wrapped(), config={"cannot": lambda: None})
    assert os.listdir(tmp_path) == ["m.pth"] and (tmp_path / "m.pth").read_bytes() == before


class Payload:
    def __reduce__(self):
        return (os.mkdir, ("PAYLOAD-RAN",))


def test_other_files_are_refused_in_one_line_and_never_executed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_checkpoint("whole.pth", wrapped())
    whole = (tmp_path / "whole.pth").read_bytes()
    damaged = bytearray(whole)
    damaged[whole.index(b"data/3") + 200] ^= 255         # inside the weights
    (tmp_path / "damaged.pth").write_bytes(damaged)
    (tmp_path / "half.pth").write_bytes(whole[:-3000])
    (tmp_path / "text.pth").write_text("epoch,loss\n1,2\n")
    (tmp_path / "pickle.pth").write_bytes(pickle.dumps(Payload()))
    torch.save({"model": Payload()}, "payload.pth")
    torch.save(get_model_v3(**SMALL).state_dict(), "state_dict.pth")
    torch.save([1, 2], "list.pth")
    for name, message in {
            "absent": "no such checkpoint", "text": "not a checkpoint", "half": "not a checkpoint",
            "pickle": "not a checkpoint", "payload": "not a checkpoint",
            "damaged": "wrong check sum", "state_dict": "not a checkpoint of this project",
            "list": "not a checkpoint of this project"}.items():
        with pytest.raises(CheckpointError, match=rf"{name}\.pth: .*{message}") as caught:
            load_model(f"{name}.pth")
        assert "\n" not in str(caught.value), name
    assert not os.path.exists("PAYLOAD-RAN")


@pytest.mark.parametrize("part, value, message", [
    ("keys", ["ppg", "map", "dbp", "hr", "age"], "keys"), ("keys", ["map", "ppg", "tpp"], "keys"),
    ("normaliser", {}, "normaliser of map"),
    ("normaliser", {**NORMALISER, "map": {"mean": 75.0, "sd": 0.0}}, "normaliser of map"),
    ("model", {"projection.bias": torch.tensor([float("nan")])}, "weights projection.bias"),
    ("model_args", {**SMALL, "colour": "red"}, "saved with resnet_v3, whose settings do not fit"),
    *(("model_args", {**SMALL, **change}, "saved with resnet_v3, given resnet_v3: its parameters "
       "have other names or shapes .RuntimeError")
      for change in ({"widths": (4, 4, 16)}, {"num_discrete": 2}))])
def test_parts_that_do_not_fit_are_refused_in_one_line(tmp_path, part, value, message):
    saved = save_checkpoint(tmp_path / "m.pth", wrapped())
    save_tensors(tmp_path / "m.pth", {**saved, part: value})
    with pytest.raises(CheckpointError, match=rf"m\.pth: {message}") as caught:
        load_model(tmp_path / "m.pth")
    assert "\n" not in str(caught.value)


NET = """
import torch
from torch import nn
from my_parts import width

class MyNet(nn.Module):
    def __init__(self, num_discrete, depth=2):
        super().__init__()
        self.ppg, self.out = nn.Conv1d(1, width, 9, 4), nn.Linear(width + num_discrete, 1)

    def forward(self, ppg, *vitals):
        return self.out(torch.cat([self.ppg(ppg).amax(2), torch.stack(vitals, 1)], 1))
"""


@pytest.fixture
def clean_imports(monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield
    for name in ("my_net", "my_parts", "bad"):
        sys.modules.pop(name, None)


def test_a_network_of_your_own_is_loaded_with_the_option_that_trained_it(tmp_path, clean_imports):
    (tmp_path / "my_net.py").write_text(NET)
    (tmp_path / "my_parts.py").write_text("width = 3\n")
    my_net = f"{tmp_path}/my_net.py:MyNet"
    network, spec, arguments = new_network(my_net, num_discrete=3, num_outputs=1)
    assert spec == "my_net.py:MyNet" and arguments == {"num_discrete": 3}
    model = NormalisedModel(network, KEYS, NORMALISER).eval()
    path = tmp_path / "m.pth"
    save_checkpoint(path, model, spec=spec, model_args=arguments)
    with pytest.raises(CheckpointError, match=r"m\.pth: trained with a network of your own: "
                                              r"--model my_net\.py:MyNet"):
        load_model(path)
    ppg, vitals = some_inputs()
    expected = model(ppg, *vitals)
    for given in (my_net, type(network), type(network)(3)):
        assert torch.equal(load_model(path, network=given)(ppg, *vitals), expected)
    for name, message in (("resnet_v9", "expected resnet_v3, .* or file.py:Name"),
                          ("absent.py:Net", "of an existing file")):
        with pytest.raises(CheckpointError, match=message):
            new_network(name, num_discrete=3)


@pytest.mark.parametrize("code, message", [
    ("def Net(:", "bad.py fails .SyntaxError: invalid syntax"),
    ("import no_such_module", "bad.py fails .ModuleNotFoundError: No module named"),
    ("Net = 3", "bad.py has no class or function Net"),
    ("def Net(): return 3", "expected a class of nn.Module, or a function .*; got a int"),
    ("from torch import nn\nNet = nn.ReLU()", "expected a class .*; got an instance of ReLU"),
    ("from torch import nn\nclass Net(nn.Module):\n    def __init__(self, width): pass",
     "expected a class .*; fails, given nothing .TypeError: .*missing 1 required .*'width'")])
def test_a_file_without_a_network_is_refused_in_one_line(tmp_path, clean_imports, code, message):
    (tmp_path / "bad.py").write_text(code)
    with pytest.raises(CheckpointError, match=f"--model .*bad.py:Net: .*{message}") as caught:
        new_network(f"{tmp_path}/bad.py:Net", num_discrete=3)
    assert "\n" not in str(caught.value)


def test_a_script_whose_network_it_loads_itself_runs_once(tmp_path):
    (tmp_path / "mine.py").write_text(
        "from checkpoint import new_network\nfrom torch import nn\nprint('runs')\n"
        "class Net(nn.Linear):\n    def __init__(self): super().__init__(3, 1)\n"
        "new_network('mine.py:Net')")
    for arguments in (["mine.py"], ["-c", "from checkpoint import *; new_network('mine.py:Net')"]):
        done = subprocess.run([sys.executable, *arguments], cwd=tmp_path, text=True,
                              capture_output=True, env=dict(os.environ, PYTHONPATH=ROOT))
        assert done.stdout.split() == ["runs"], done.stderr


@pytest.mark.parametrize("left", [None, "", "0123456789abcdef"])       # by killed processes
def test_a_salt_is_made_once_also_by_two_processes_and_kept_private(tmp_path, left):
    if left is not None:
        (tmp_path / "a.salt").write_text(left)
    both = [fork(lambda: print(read_salt("a.salt")), tmp_path) for _ in range(2)]
    salt, second = printed_by(both, tmp_path).split()
    assert len(salt) == 32 and salt == second == read_salt(tmp_path / "a.salt")
    assert (tmp_path / "a.salt").stat().st_mode & 0o777 == 0o600
    assert read_salt(tmp_path / "b.salt") != salt
    assert salt_mark(salt) != salt_mark("other") and salt not in salt_mark(salt)


@pytest.mark.parametrize("text", ["short\n", "0" * 31 + "\n", "0" * 40 + "\n", "x" * 32])
def test_another_file_is_not_replaced_by_a_salt(tmp_path, text):
    (tmp_path / "a.salt").write_text(text)
    with pytest.raises(DataError, match="expected a salt"):
        read_salt(tmp_path / "a.salt")
    assert (tmp_path / "a.salt").read_text() == text


def test_the_part_of_each_patient_is_found_by_the_salted_hash(tmp_path, capsys):
    index = create_dataset_index(path=make_file(tmp_path / "d.h5"), condition="any")
    parts, salt_path = split_index(index), default_salt_path(index.paths[0])
    saved = save_checkpoint(tmp_path / "m.pth", wrapped(), split=parts)
    assert saved["config"]["condition"] == "any"
    assert saved["provenance"]["origin"] == "unknown"       # a published file does not say it
    found = patient_parts(index, saved, salt_path)
    for name, part in parts.items():
        assert index.patients[found == name].tolist() == part.patients.tolist()
    saved["split"]["ancestors"] = ["f" * 16]
    seen = [patient for name in ("train", "tune") for patient in parts[name].patients]
    assert seen_by(saved) == {*hash_patients(seen, read_salt(salt_path)), "f" * 16}
    saved["provenance"]["salt"] = "another"
    assert patient_parts(index, saved, salt_path) is None
    assert patient_parts(index, saved, str(tmp_path / "none.salt")) is None
    assert capsys.readouterr().err.count("COULD NOT BE CHECKED") == 2
