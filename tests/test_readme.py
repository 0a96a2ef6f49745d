"""Every command in README and docs is run, long ones shortened; what they name is there.

The commands run in a copy of the repository, in the order of the pages, on the files that a reader
would have: a few virtual patients in place of the default data, recordings, a trained checkpoint.
"""
import glob
import os
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT

PAGES = ["README.md", *sorted(os.path.relpath(path, ROOT)
                              for path in glob.glob(os.path.join(ROOT, "docs", "*.md")))]
SETTING_UP = r"python -m venv |pip install |\.venv/bin/pip install "      # not again in a test
# What is added to a command, or put in its place, so that it ends soon: the first line that fits.
SHORTER = [
    (r"(torchrun .*)--nnodes=2 .*?--rdzv-endpoint=\S+(.*)", r"\1--nproc_per_node=2\2"),
    (r".*train_resnet\.py.*(--plot-log|--dry-run).*", r"\g<0>"),
    (r"(.*train_resnet\.py.*) --folds \d+( --seeds \d+)?(.*)",
     r"\1 --folds 3\3 --fresh --epochs 1 --batch-size 8"),
    (r"(.*train_resnet\.py.*) --seeds \d+(.*)",
     r"\1 --seeds 2\2 --fresh --epochs 1 --batch-size 8"),
    (r".*train_resnet\.py.*", r"\g<0> --fresh --epochs 1 --batch-size 8"),
    (r".*simulate\.py --label-report --seed 2", r"\g<0> --patients 2"),
    (r".*simulate\.py --out.*", r"\g<0> --patients 20 --segments 2"),
    (r".*examples/custom_network\.py.*", r"\g<0> --epochs 1 --networks short"),
    (r".*examples/fine_tune\.py.*", r"\g<0> --epochs 1"),
    (r".*examples/sweep\.py.*", r"\g<0> --settings 1 --seeds 1 --epochs 1 --batch-size 8"),
    (r".*benchmarks/read\.py.*", r"\g<0> --rows 8400 --repeats 1"),
    (r".*benchmarks/train_step\.py.*", r"\g<0> --batch 4 --repeats 1 --no-compile"),
    (r".*benchmarks/label\.py.*", r"\g<0> --segments 40 --repeats 1"),
    (r".*benchmarks/scale\.py.*", r"\g<0> --part wait --repeats 1"),
    (r".*--condition default_and_regular_rhythm", r"\g<0> --split all"),   # of few test patients
    (r".*benchmarks/real\.py.*", r"\g<0> --patients 4"),
    (r".*benchmarks/evaluation\.py.*", r"\g<0> --repeats 2 --draws 20"),
    (r"(.*prepare\.py.*--workers )\d+(.*)", r"\g<1>2\2"),
]


def read(name):
    with open(os.path.join(ROOT, name), encoding="utf-8") as file:
        return file.read()


def commands_of(page):
    fenced = re.findall(r"^```(\w*)\n(.*?)^```", read(page), re.S | re.M)
    blocks = "\n".join(text for language, text in fenced if language in ("", "sh", "bash"))
    return [line.split("  #")[0].strip() for line in blocks.splitlines()
            if re.match(r"(\.venv/bin/)?(python|pip|torchrun)\b", line)]


README = read("README.md")
COMMANDS = {}           # command: the first page that has it
for one in PAGES:
    for line in commands_of(one):
        if not re.match(SETTING_UP, line):
            COMMANDS.setdefault(line, one)


def shorten(command):
    for long, short in SHORTER:
        if re.fullmatch(long, command):
            command = re.sub(long, short, command, count=1)
            if not long.startswith("(torchrun"):
                break
    torchrun = f"{sys.executable} -m torch.distributed.run --standalone "
    return re.sub(r"^(\.venv/bin/)?python ", f"{sys.executable} ",
                  re.sub(r"^torchrun ", torchrun, command))


@pytest.fixture(scope="module")
def clone(tmp_path_factory, run):
    """A copy of the repository with the files that the pages speak of."""
    folder = tmp_path_factory.mktemp("clone")
    for path in glob.glob(os.path.join(ROOT, "*.py")):
        shutil.copy(path, folder)
    for name in ("examples", "benchmarks"):
        shutil.copytree(os.path.join(ROOT, name), folder / name)
    default = folder / "data" / "simulated_1200x3_seed0.h5"
    run("simulate.py", "--out", default, "--patients", 15, "--segments", 3, "--abp", "--workers", 1,
        cwd=folder, check=0)
    for name in ("records", "archive"):
        write_recordings(default, folder / name)
    ppg = np.loadtxt(folder / "records" / "p00.csv", delimiter=",", skiprows=1)[:, [0, 2]]
    np.savetxt(folder / "finger_only.csv", ppg, delimiter=",", comments="", header="time_s,ppg")
    (folder / "cuff.csv").write_text("time_s,map,dbp\n0,74,52\n150,79,55\n")
    write_wfdb(folder, "my_record", folder / "records" / "p01.csv")
    with open(folder / "patients.csv", "w") as file:
        file.write("record,split_group\n" + "".join(f"p{i:02d},{i}\n" for i in range(15)))
    run("prepare.py", "records", "--out", "data/icu.h5", "--groups", "patients.csv", cwd=folder,
        check=0)
    for name, data in (("M1.5", []), ("icu", ["--data", "data/icu.h5"])):
        run("train_resnet.py", *data, "--name", name, "--epochs", 1, "--batch-size", 8, cwd=folder,
            check=0)
    return folder


def write_recordings(simulated, folder):
    """Three minutes of each virtual patient as CSV."""
    import h5py
    os.makedirs(folder)
    with h5py.File(simulated) as file:
        for number, patient in enumerate(file.values()):
            abp, ppg = (patient["1"][key][()].ravel() for key in ("abp", "ppg"))
            np.savetxt(folder / f"p{number:02d}.csv", np.column_stack(
                [np.arange(len(abp)) / 60, abp, ppg]), fmt="%.7g", delimiter=",", comments="",
                header="time_s,abp_mmhg,ppg")


def write_wfdb(folder, name, source):
    wfdb = pytest.importorskip("wfdb", reason="the package wfdb is not installed")
    _, abp, ppg = np.loadtxt(source, delimiter=",", skiprows=1).T
    wfdb.wrsamp(name, fs=60, units=["mmHg", "NU"], sig_name=["ABP", "PLETH"],
                p_signal=np.column_stack([abp, ppg]), fmt=["16", "16"], write_dir=str(folder))


@pytest.mark.parametrize("command", COMMANDS, ids=str)
def test_the_command_runs(command, clone):
    done = subprocess.run(shorten(command), shell=True, cwd=clone, capture_output=True, text=True,
                          timeout=600, env=dict(os.environ, OMP_NUM_THREADS="1"))
    assert done.returncode == 0, f"{shorten(command)}\n{done.stdout}\n{done.stderr}"


def test_ci_runs_exactly_the_commands_of_readme_and_contributing():
    command = next(line for line in README.splitlines() if line.endswith("-m pytest"))
    ci = read(".ci/run")
    assert f"\n{command} || exit 1\n" in ci
    lines = re.findall(r"```\n(.*?)```", read("CONTRIBUTING.md"), re.S)[0].splitlines()
    assert len(lines) == 3 and lines[0] == command
    assert all(f"\n{line} || exit 1\n" in ci for line in lines)


def test_the_pages_commands_are_found():
    scripts = {word for command in COMMANDS for word in re.findall(r"[\w/]+\.py", command)}
    assert scripts >= {"train_resnet.py", "evaluate.py", "predict.py", "prepare.py", "simulate.py",
                       "datasets.py"}
    assert all(any(not re.match(SETTING_UP, line) for line in commands_of(page)) for page in PAGES)


def test_the_two_set_up_and_run_commands_stand_first():
    first, second = commands_of("README.md")[:2]
    venv = "python -m venv .venv && .venv/bin/pip install -r "
    assert first == venv + "requirements.txt && .venv/bin/python train_resnet.py"
    assert second == venv + "requirements-dev.txt && .venv/bin/python -m pytest"


@pytest.mark.parametrize("script", sorted({name for page in PAGES for name in
                                           re.findall(r"`python ([\w/]+\.py)", read(page))}
                                          | {"train_resnet.py", "prepare.py", "predict.py"}))
def test_options_that_the_text_names_exist(script):
    done = subprocess.run([sys.executable, os.path.join(ROOT, script), "--help"], cwd=ROOT,
                          capture_output=True, text=True, timeout=120)
    assert done.returncode == 0
    for page in PAGES:
        for options in re.findall(rf"`python {re.escape(script)}(.*?)`", read(page), re.S):
            for option in re.findall(r"--[a-z][a-z-]+", options):
                assert option in done.stdout, f"{page}: {script} {option}"


@pytest.mark.parametrize("page", [*PAGES, "CONTRIBUTING.md", "CHANGELOG.md"])
def test_every_file_that_a_page_names_is_there(page):
    folder = os.path.dirname(os.path.join(ROOT, page))
    for name in re.findall(r"\]\(((?!http)[^)#]+)\)|src=\"([^\"]+)\"", read(page)):
        assert os.path.exists(os.path.join(folder, "".join(name))), name
    for module in re.findall(r"^\| `(\w+\.py)` \|", read(page), re.M):
        assert os.path.exists(os.path.join(ROOT, module)), module
    for name in re.findall(r"`((?:examples|benchmarks|tests)/\w+\.\w+)`", read(page)):
        assert os.path.exists(os.path.join(ROOT, name)), name


def test_the_table_of_modules_is_complete():
    named = set(re.findall(r"^\| `(\w+\.py)` \|", README, re.M))
    assert named == {name for name in os.listdir(ROOT) if name.endswith(".py")}


def test_the_readme_is_two_screens_before_the_details():
    before = README[:README.index("\n## How it flows")]
    assert len(before.splitlines()) <= 100


def test_the_citation_file_names_what_the_readme_cites():
    yaml = read("CITATION.cff")
    assert yaml.startswith("cff-version: 1.2.0\n")
    for key in ("title", "message", "authors", "license"):
        assert re.search(rf"^{key}: ?", yaml, re.M)
    assert re.search(r"doi: (\S+)", yaml).group(1) in README
