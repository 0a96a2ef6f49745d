"""What the README says can be run, exists; what CI runs is what the README says."""
import os
import re
import subprocess
import sys

import pytest
from conftest import ROOT


def read(name):
    with open(os.path.join(ROOT, name), encoding="utf-8") as file:
        return file.read()


README = read("README.md")
COMMANDS = re.findall(r"^(?:torchrun \S+ |python )?(\w+(?:/\w+)?\.py)(.*?)(?:\s#.*)?$",
                      "\n".join(re.findall(r"```\n(.*?)```", README, re.S)), re.M)


def test_ci_runs_exactly_the_test_command_of_the_readme():
    command = next(line for line in README.splitlines() if line.endswith("-m pytest"))
    assert f"\n{command} || exit 1\n" in read(".ci/run")


def test_the_readmes_commands_are_found():
    assert {script for script, _ in COMMANDS} >= {"train_resnet.py", "evaluate.py", "prepare.py"}


@pytest.mark.parametrize("script", sorted({script for script, _ in COMMANDS}))
def test_every_option_that_the_readme_uses_exists(script):
    done = subprocess.run([sys.executable, os.path.join(ROOT, script), "--help"], cwd=ROOT,
                          capture_output=True, text=True, timeout=120)
    assert done.returncode == 0
    for name, options in COMMANDS:
        if name == script:
            for option in re.findall(r"--[a-z][a-z-]+", options):
                assert option in done.stdout, f"{script} {option}"


def test_every_file_that_the_readme_names_is_there():
    for name in re.findall(r"\]\(((?!http)[^)#]+)\)", README):
        assert os.path.exists(os.path.join(ROOT, name)), name
    for module in re.findall(r"^\| `(\w+\.py)` \|", README, re.M):
        assert os.path.exists(os.path.join(ROOT, module)), module
