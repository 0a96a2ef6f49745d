"""Every command and every Python block of README and docs is run, shortened; what they name exists.

They run in the order of the pages, in one folder with the files that a reader would have: a few
virtual patients in place of the default data, recordings, a trained checkpoint, a network of one's
own. Python scripts run in this process, with a small network, so that it takes about a minute.
"""
import glob
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, little_work, run
from conftest import read_ours as read

import report
import simulate
from tk_utils import run_script

PAGES = ["README.md", *sorted(os.path.relpath(path, ROOT)
                              for path in glob.glob(os.path.join(ROOT, "docs", "*.md")))]
SETTING_UP = r"python -m venv |pip install |\.venv/bin/pip install "      # not again in a test
# (pattern, replacement): every one that fits makes a command or a Python block end sooner
SHORTER = [
    (r"--threads \d+", "--threads 1"),
    (r"--nnodes=\d+ |--rdzv-\S+ ", ""), (r"--nproc_per_node=\d+", "--nproc_per_node=2"),
    (r"(torchrun.*)--batch-size \d+", r"\1"), (r"data/\*", "data/a*"),
    (r"(train_resnet\.py.*)--folds \d+", r"\1--folds 3"),
    (r"(train_resnet\.py.*)--seeds \d+", r"\1--seeds 2"),
    (r"(.*train_resnet\.py.*)", r"\1 --fresh --epochs 1 --batch-size 8"),
    (r"(.*simulate\.py .*)", r"\1 --patients 15 --segments 2 --workers 1"),
    (r"(.*prepare\.py.*)--workers \d+", r"\1--workers 1"),
    (r"(.*evaluate\.py.*--condition.*)", r"\1 --split all"),      # of few test patients
    (r"\b(total_epochs|epochs)=\d+", r"\1=1")]
# by test_benchmarks.py and test_examples.py; here their options are looked up
RUN_ELSEWHERE = r"benchmarks/|examples/(fine_tune|sweep)\.py"


def steps_of(page):
    """Commands and Python blocks in the order of the page."""
    for language, text in re.findall(r"^```(\w*)\n(.*?)^```", read(page), re.S | re.M):
        if language == "python":
            yield text
        elif language in ("", "sh", "bash"):
            for line in text.replace("\\\n", " ").splitlines():
                if re.match(r"(\.venv/bin/)?(python|pip|torchrun)\b", line):
                    yield line.split("  #")[0].strip()


README = read("README.md")
STEPS = {}              # text: the first page that has it
for one in PAGES:
    for step in steps_of(one):
        if not re.match(SETTING_UP, step):
            STEPS.setdefault(step, one)
COMMANDS = [step for step in STEPS if "\n" not in step]
# {name: text} of the blocks that begin with the name of a file, which the reader writes
FILES = {match.group(1): step for step in STEPS for match in [re.match(r"# (\w+\.py)\n", step)]
         if match}


def shorten(text):
    for long, short in SHORTER:
        text = re.sub(long, short, text)
    return text


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The files that the pages speak of; in this process, the networks are small."""
    folder = tmp_path_factory.mktemp("reader")
    with little_work(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "FIGURES", dict(list(report.FIGURES.items())[:2]))
        patch.setenv("MPLBACKEND", "agg")
        patch.setenv("PYTHONPATH", ROOT)
        patch.chdir(folder)
        patch.syspath_prepend(folder)
        for path, text in FILES.items():
            (folder / path).write_text(text, encoding="utf-8")
        os.mkdir(folder / "data")
        simulate.simulate_file("data/simulated_1200x3_seed0.h5", 15, 3, 0)
        Path("patients.csv").write_text("record,split_group\n" + "".join(
            f"p{i:02d},{i}\n" for i in range(12)))
        write_recordings(folder)
        for line in ("python prepare.py records --out data/icu.h5 --groups patients.csv",
                     "python train_resnet.py --name M1.5",
                     "python train_resnet.py --name icu --data data/icu.h5"):
            run_line(line)
        yield folder


def write_recordings(folder):
    """Three minutes of each of 12 virtual patients as CSV, and of the last as other files."""
    os.makedirs("records")
    for number in range(12):
        fields = simulate.simulate_patient(0, number, 3, keep_abp=True)
        waves = np.column_stack([fields[key].ravel() for key in ("abp", "ppg")])
        times = np.arange(len(waves)) / 60
        np.savetxt(f"records/p{number:02d}.csv", np.column_stack([times, waves]), fmt="%.6g",
                   delimiter=",", comments="", header="time_s,abp_mmhg,ppg")
    shutil.copytree("records", "archive")
    np.savetxt("finger_only.csv", np.column_stack([times, waves[:, 1]]), delimiter=",", comments="",
               header="time_s,ppg")
    Path("cuff.csv").write_text("time_s,map,dbp\n0,74,52\n150,79,55\n")
    wfdb = pytest.importorskip("wfdb", reason="the package wfdb is not installed")
    wfdb.wrsamp("my_record", fs=60, units=["mmHg", "NU"], sig_name=["ABP", "PLETH"],
                p_signal=waves, fmt=["16", "16"], write_dir=str(folder))


def options_of(script):
    """The options of a script: from its help, or from the source of an example or benchmark."""
    text = read(script) if "/" in script else run(script, "--help").stdout
    return re.findall(r"--[a-z][a-z-]+", text)


def run_line(command):
    """Runs a shortened command, which must end well."""
    words = shlex.split(shorten(command))
    words = [one for word in words for one in sorted(glob.glob(word)) or [word]]
    if words[0] == "torchrun":
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        words = [__file__ if word == "train_resnet.py" else word for word in words]     # see below
        subprocess.run([*launcher, *words[1:]], timeout=300, check=True, env=dict(
            os.environ, OMP_NUM_THREADS="1"))
    else:
        run(*words[1:], check=0)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("step", STEPS, ids=lambda step: " ".join(step.split())[:90])
def test_the_step_runs(step, folder, monkeypatch):
    monkeypatch.chdir(folder)
    if step in FILES.values():
        compile(step, STEPS[step], "exec")
    elif "\n" in step:
        names = STATE.setdefault(STEPS[step], {
            "ppg": torch.randn(2, 1, 3600), "map_mmhg": torch.tensor([75.0, 80.0]),
            "dbp_mmhg": torch.tensor([55.0, 60.0]), "hr_bpm": torch.tensor([80.0, 90.0])})
        exec(compile(shorten(step), STEPS[step], "exec"), names)
    elif re.search(RUN_ELSEWHERE, step):
        words = shlex.split(step)
        known = options_of(words[1]) + options_of("train_resnet.py")    # sweep.py passes them on
        assert all(word in known for word in words if word.startswith("--"))
    elif shorten(step) not in DONE:
        DONE.add(shorten(step))
        run_line(step)


STATE = {}              # {page: the names that its Python blocks have made}
DONE = set()            # shortened commands


def test_ci_runs_exactly_the_commands_of_readme_and_contributing():
    command = next(line for line in README.splitlines() if line.endswith("-m pytest"))
    ci = read(".ci/run")
    assert f"\n{command} || exit 1\n" in ci
    lines = re.findall(r"```\n(.*?)```", read("CONTRIBUTING.md"), re.S)[0].splitlines()
    assert len(lines) == 3 and lines[0] == command
    assert all(f"\n{line} || exit 1\n" in ci for line in lines)


def test_the_commands_are_found_and_those_that_set_up_and_run_stand_first():
    scripts = {word for command in COMMANDS for word in re.findall(r"[\w/]+\.py", command)}
    assert scripts >= {"train_resnet.py", "evaluate.py", "predict.py", "prepare.py", "simulate.py",
                       "checkpoint.py"}
    first, second = (step for step in steps_of("README.md") if step.startswith("python -m venv"))
    venv = "python -m venv .venv && .venv/bin/pip install -r "
    assert first == venv + "requirements.txt && .venv/bin/python train_resnet.py"
    assert second == venv + "requirements-dev.txt && .venv/bin/python -m pytest"
    top = "\n".join(README.splitlines()[:100])
    assert all(word in top for word in ("predict.py", "prepare.py", "--model"))


@pytest.mark.parametrize("script", sorted({name for page in PAGES for name in
                                           re.findall(r"`python ([\w/]+\.py)", read(page))}
                                          | {"train_resnet.py", "prepare.py", "predict.py"}))
def test_options_that_the_text_names_exist(script):
    known = options_of(script)
    for page in PAGES:
        for options in re.findall(rf"`python {re.escape(script)}(.*?)`", read(page), re.S):
            for option in re.findall(r"--[a-z][a-z-]+", options):
                assert option in known, f"{page}: {script} {option}"


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


def test_the_citation_file_names_what_the_readme_cites():
    yaml = read("CITATION.cff")
    assert yaml.startswith("cff-version: 1.2.0\n")
    for key in ("title", "message", "authors", "license"):
        assert re.search(rf"^{key}: ?", yaml, re.M)
    assert re.search(r"doi: (\S+)", yaml).group(1) in README


if __name__ == "__main__":      # train_resnet.py for torchrun
    import train_resnet
    with little_work():
        sys.exit(run_script(train_resnet.main))
