"""The scripts as commands, thousands of times: forked from one process that has them loaded.

    with Commands() as commands:
        done = commands.run("evaluate.py", "m.pth", "--data", "f.h5", cwd=folder)
        done["code"], done["out"], done["err"], done["seconds"], done["megabytes"]

    python tests/faults/commands.py hdf5 1000       # checkpoint, wfdb; which failed, and how

A fresh interpreter spends seconds on importing PyTorch; here each command is a fork of a process
that has done so, and runs the script's file as `__main__` with its own arguments, in its own
folder, under limits of time and memory.
"""
import collections
import json
import os
import re
import resource
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(os.path.dirname(HERE))
CPU_SECONDS, SECONDS, MEGABYTES = 30, 600, 1000     # above, a command hangs or is too large


class Commands:
    """The process that forks; `run` waits for one command."""

    def __enter__(self):
        self.server = subprocess.Popen(
            [sys.executable, __file__, "--serve"], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            text=True, env=dict(os.environ, OMP_NUM_THREADS="1", MKL_NUM_THREADS="1"))
        return self

    def __exit__(self, *error):
        self.server.stdin.close()
        self.server.wait()
        self.server.stdout.close()

    def run(self, script, *arguments, cwd):
        job = {"script": script, "arguments": list(map(str, arguments)), "cwd": str(cwd)}
        self.server.stdin.write(json.dumps(job) + "\n")
        self.server.stdin.flush()
        return json.loads(self.server.stdout.readline())


def serve():
    sys.path[:0] = [ROOT]
    import matplotlib.backends.backend_agg  # noqa: F401
    import sklearn.ensemble
    import sklearn.linear_model  # noqa: F401
    import torch._dynamo  # noqa: F401
    import wfdb  # noqa: F401

    import evaluate  # noqa: F401
    import prepare  # noqa: F401
    import train_resnet  # noqa: F401
    import training_header  # noqa: F401
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with open("/proc/self/statm") as statm:
        limit = int(statm.read().split()[0]) * resource.getpagesize() + 4 * 2 ** 30
    idle = os.fork()
    if not idle:
        os._exit(0)
    idle_kilobytes = os.wait4(idle, 0)[2].ru_maxrss
    for line in sys.stdin:
        job = json.loads(line)
        with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
            child = os.fork()
            if not child:
                run_script_file(job, out, err, limit)
            _, status, usage = os.wait4(child, 0)
            found = {"seconds": usage.ru_utime + usage.ru_stime,
                     "megabytes": (usage.ru_maxrss - idle_kilobytes) / 1024,
                     "code": os.WEXITSTATUS(status) if os.WIFEXITED(status) else
                     -os.WTERMSIG(status)}
            for name, file in (("out", out), ("err", err)):
                file.seek(0)
                found[name] = file.read().decode(errors="surrogateescape")
        print(json.dumps(found), flush=True)


def run_script_file(job, out, err, limit):
    """In the child: never returns."""
    code = 1
    try:
        os.chdir(job["cwd"])
        with open(os.devnull) as nothing:
            os.dup2(nothing.fileno(), 0)
        os.dup2(out.fileno(), 1)
        os.dup2(err.fileno(), 2)
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS))
        signal.alarm(SECONDS)
        sys.argv = [job["script"], *job["arguments"]]
        runpy.run_path(os.path.join(ROOT, job["script"]), run_name="__main__")
        code = 0
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except BaseException:  # noqa: BLE001 - as the interpreter does
        sys.excepthook(*sys.exc_info())
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


# -------------------------------------------------------------------------------------- the verdict

def verdict(done, normal=(0,)):
    """'normal', 'refused' (one line, exit code 2), or what is wrong with how a command ended."""
    text = done["out"] + done["err"]
    if done["code"] < 0:
        return f"killed by {signal.Signals(-done['code']).name}"
    if "Traceback" in text:
        return "traceback: " + text.strip().splitlines()[-1][:150]
    if re.search(r"^\S*Warning: |: \w*Warning: ", text, re.M):
        return "Python's warning: " + re.search(r".*Warning: .*", text).group()[:150]
    if done["megabytes"] > MEGABYTES:
        return f"{done['megabytes']:.0f} MB"
    if re.search(r"MRN|CSN", text):
        return "a name: " + re.search(r".*(MRN|CSN).*", text).group()[:150]
    if not text.replace("\n", "").replace("\t", "").replace("\r", "").isprintable():
        return f"control characters: {text!r:.150}"
    errors = [line for line in done["err"].splitlines() if line.startswith("error: ")]
    if done["code"] in normal and not errors:
        return "normal"
    if done["code"] == 2 and len(errors) == 1 and done["err"].splitlines()[-1] == errors[0]:
        return "refused"
    return f"exit code {done['code']}, {len(errors)} error lines: {text[-200:]!r}"


def files_below(folder):
    return {os.path.relpath(os.path.join(place, name), folder)
            for place, _, names in os.walk(folder) for name in names}


LEFT_BY_FAILURE = re.compile(       # a run that fails after it began keeps its log and its salt
    r"runs/(x_log\.csv|x_run\.json|x_resume\.pth)|tpp_ppg\.salt|out_problems\.csv")


def try_hdf5(commands, number, folder):
    """One mutant through train_resnet.py (every seventh) or evaluate.py."""
    from mutations import checkpoint_base, hdf5_mutant
    what = hdf5_mutant(number, os.path.join(folder, "m.h5"))
    if number % 7:
        checkpoint_base(os.path.join(folder, "m.pth"))
        before = files_below(folder)
        done = commands.run("evaluate.py", "m.pth", "--data", "m.h5", "--split", "all",
                            "--json", "m.json", cwd=folder)
        made = {"m.json"}
    else:
        before = files_below(folder)
        done = commands.run("train_resnet.py", "--data", "m.h5", "--name", "x", "--epochs", 1,
                            "--batch-size", 8, "--device", "cpu", cwd=folder)
        made = {"runs/x.pth"}
    return what, done, judge(done, files_below(folder) - before, made)


def try_checkpoint(commands, number, folder):
    from conftest import make_file
    from mutations import PATIENTS, ROWS, checkpoint_mutant
    if not os.path.exists(os.path.join(folder, "..", "good.h5")):
        make_file(os.path.join(folder, "..", "good.h5"), PATIENTS, 1, ROWS)
    what = checkpoint_mutant(number, os.path.join(folder, "m.pth"))
    before = files_below(folder)
    done = commands.run("evaluate.py", "m.pth", "--data", "../good.h5", "--split", "all",
                        "--json", "m.json", cwd=folder)
    found = judge(done, files_below(folder) - before, {"m.json"})
    return what, done, "THE PAYLOAD RAN" if "PAYLOAD-RAN" in os.listdir(folder) else found


def try_wfdb(commands, number, folder):
    from mutations import wfdb_mutant
    what = wfdb_mutant(number, os.path.join(folder, "records"))
    before = files_below(folder)
    done = commands.run("prepare.py", "records", "--out", "out.h5", cwd=folder)
    return what, done, judge(done, files_below(folder) - before, {"out.h5"}, normal=(0, 1))


def judge(done, new, made, normal=(0,)):
    """The verdict, also on the files that a command left: all of `made` or none of it."""
    found = verdict(done, normal)
    if found == "normal" and not made <= new:
        return f"missing: {made - new}"
    if found == "refused" and not all(map(LEFT_BY_FAILURE.fullmatch, new)):
        return f"left behind: {sorted(new)}"
    if any(name.endswith((".tmp", ".partial")) for name in new):
        return f"left behind: {sorted(new)}"
    return found


TRIALS = {"hdf5": try_hdf5, "checkpoint": try_checkpoint, "wfdb": try_wfdb}


def run_all(kind, count, first=0):
    """Prints which mutants failed, and how many ended in which way; returns their number."""
    ends, seconds, megabytes = collections.Counter(), [], []
    with Commands() as commands, tempfile.TemporaryDirectory() as base:
        for number in range(first, first + count):
            folder = os.path.join(base, "one")
            os.mkdir(folder)
            what, done, found = TRIALS[kind](commands, number, folder)
            shutil.rmtree(folder)
            ends[found if found in ("normal", "refused") else "FAILED"] += 1
            seconds.append(done["seconds"])
            megabytes.append(done["megabytes"])
            if found not in ("normal", "refused") or os.environ.get("SHOW"):
                print(f"{kind} {number} ({what}): {found}: {done['err'].strip()[-300:]!r}",
                      flush=True)
    print(f"{kind} {first} to {first + count - 1}: {dict(ends)}, at most {max(seconds):.1f} s of "
          f"CPU and {max(megabytes):.0f} MB", flush=True)
    return ends["FAILED"]


if __name__ == "__main__":
    if sys.argv[1:] == ["--serve"]:
        serve()
    else:
        sys.path[:0] = [ROOT, os.path.join(ROOT, "tests"), HERE]
        sys.exit(run_all(sys.argv[1], *map(int, sys.argv[2:])) > 0)
