"""Run every command and Python block of README and docs, shortened; check files, links and options.

The steps run in the order of the pages, in one folder with the files that a reader would have: a
few virtual patients instead of the default data, recordings, a checkpoint, and a custom network.
Python scripts run in this process with a small network, so that all of this takes about a minute.
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
from conftest import ROOT, little_work, run
from conftest import read_ours as read

import report
import simulate
from tk_utils import run_script

PAGES = ["README.md", *sorted(os.path.relpath(path, ROOT)
                              for path in glob.glob(os.path.join(ROOT, "docs", "*.md")))]
SETTING_UP = r"python -m venv |pip install |\.venv/bin/pip install "      # not again in a test
# (pattern, replacement): all are applied; each shortens a command or a Python block
SHORTER = [
    (r"--threads \d+", "--threads 1"),
    (r"--nnodes=\d+ |--rdzv-\S+ ", ""), (r"--nproc_per_node=\d+", "--nproc_per_node=2"),
    (r"(torchrun.*)--batch-size \d+", r"\1"), (r"data/\*", "data/a*"),
    (r"(train_resnet\.py.*)--folds \d+", r"\1--folds 3"),
    (r"(train_resnet\.py.*)--seeds \d+", r"\1--seeds 2"),
    (r"(.*train_resnet\.py.*)", r"\1 --fresh --epochs 1 --batch-size 8"),
    (r"(.*simulate\.py .*)", r"\1 --patients 15 --segments 2 --workers 1"),
    (r"(.*prepare\.py.*)--workers \d+", r"\1--workers 1"),
    (r"(.*evaluate\.py.*--condition.*)", r"\1 --split all"),      # few test patients
    (r"\b(total_epochs|epochs)=\d+", r"\1=1")]
# Run by test_benchmarks.py and test_examples.py; here only their options are checked.
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
for page in PAGES:
    for step in steps_of(page):
        if not re.match(SETTING_UP, step):
            STEPS.setdefault(step, page)
# {name: text}: blocks that start with a file name, which the reader saves under that name
FILES = {step[2:].split("\n")[0]: step for step in STEPS if re.match(r"# \w+\.py\n", step)}


def shorten(text):
    for long, short in SHORTER:
        text = re.sub(long, short, text)
    return text


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with the files that the pages mention; networks in this process are small."""
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
    """Write three minutes of 12 virtual patients as CSV, and the last patient in other formats."""
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
    """Run a shortened command, which must succeed."""
    words = shlex.split(shorten(command))
    words = [path for word in words for path in sorted(glob.glob(word)) or [word]]
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
        exec(compile(shorten(step), STEPS[step], "exec"), STATE[STEPS[step]])
    elif re.search(RUN_ELSEWHERE, step):
        words = shlex.split(step)
        known = options_of(words[1]) + options_of("train_resnet.py")    # sweep.py passes them on
        assert all(word in known for word in words if word.startswith("--"))
    elif shorten(step) not in DONE:
        DONE.add(shorten(step))
        run_line(step)


STATE = {page: {} for page in PAGES}        # names defined by the page's Python blocks
DONE = set()            # shortened commands that have run


def test_ci_runs_exactly_the_commands_of_readme_and_contributing():
    lines = re.findall(r"```\n(.*?)```", read("CONTRIBUTING.md"), re.S)[0].splitlines()
    assert len(lines) == 3 and f"```\n{lines[0]}\n```" in README
    assert all(f"\n{line} || exit 1\n" in read(".ci/run") for line in lines)


def test_all_scripts_are_shown_and_the_set_up_commands_come_first():
    for script in ("train_resnet", "evaluate", "predict", "prepare", "simulate", "checkpoint"):
        assert any(step.startswith(f"python {script}.py ") for step in STEPS)
    first, second = (step for step in steps_of("README.md") if step.startswith("python -m venv"))
    venv = "python -m venv .venv && .venv/bin/pip install -r "
    assert first == venv + "requirements.txt && .venv/bin/python train_resnet.py"
    assert second == venv + "requirements-dev.txt && .venv/bin/python -m pytest"
    top = "\n".join(README.splitlines()[:100])
    assert all(word in top for word in ("predict.py", "prepare.py", "--model"))


@pytest.mark.parametrize("page", PAGES)
def test_options_that_the_text_names_exist(page):
    for script, options in re.findall(r"`python ([\w/]+\.py)(.*?)`", read(page), re.S):
        assert set(re.findall(r"--[a-z][a-z-]+", options)) <= set(options_of(script)), script


@pytest.mark.parametrize("page", [*PAGES, "CONTRIBUTING.md", "CHANGELOG.md"])
def test_every_file_and_heading_that_a_page_names_exists(page):
    for name, anchor in re.findall(r"(?:\]\(|src=\")(?!http)([^)#\"]*)#?([^)\"]*)", read(page)):
        path = os.path.normpath(os.path.join(os.path.dirname(page), name) if name else page)
        assert os.path.exists(os.path.join(ROOT, path)), name
        if anchor:
            headings = re.findall(r"^#+ (.*)", read(path), re.M)
            assert anchor in [re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-")
                              for heading in headings], anchor
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
