"""Shared helpers: atomic files, script errors, tables, progress, processes, seeds, run figures.

    from tk_utils import atomic_path, histogram_figure, print_table, save_figure

Needs no other file of this project. matplotlib, tqdm and torch are imported by the functions that
use them.
"""
import argparse
import codecs
import contextlib
import errno
import glob
import itertools
import json
import math
import multiprocessing
import numbers
import os
import platform
import random
import re
import secrets
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
import zlib
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor, ThreadPoolExecutor
from importlib import metadata
from pathlib import Path
from typing import Callable, Dict, Iterable, Iterator, List, Optional, Sequence

import filelock
import numpy as np


# ---------------------------------------------------------------- files
@contextlib.contextmanager
def atomic_path(path) -> Iterator[str]:
    """Yield a temporary path in the same folder; on success, sync it and rename it to `path`.

    A reader of `path` sees the old file or the complete new one. Missing folders are made. The
    temporary file is hidden and ends in .tmp, so libraries that go by the suffix need the format.
    """
    path = os.path.realpath(path)               # follow a symlink, so that the link itself stays
    folder, name = os.path.split(path)
    os.makedirs(folder, exist_ok=True)
    machine = zlib.crc32(platform.node().encode())
    prefix = os.path.join(folder, f".{name[:60]}.{machine:08x}-")
    _remove_leftovers(prefix)
    temporary = f"{prefix}{os.getpid()}-{secrets.token_hex(4)}.tmp"
    try:
        yield temporary
        if os.path.exists(path):
            shutil.copymode(path, temporary)    # a private file stays private
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        full = shutil.disk_usage(folder).free < 2 ** 20
        with contextlib.suppress(OSError):      # must not hide the first error
            os.remove(temporary)
        if full and isinstance(error, RuntimeError):    # how torch and h5py report a full disk
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path) from error
        raise


def _remove_leftovers(prefix) -> None:
    """Remove the temporary files that killed processes of this machine left behind (POSIX)."""
    if os.name != "posix":                      # on Windows, signal 0 would end the process
        return
    for temporary in glob.glob(glob.escape(prefix) + "*.tmp"):
        with contextlib.suppress(PermissionError, FileNotFoundError):   # another user's; or gone
            try:
                os.kill(int(temporary.split("-")[-2]), 0)
            except ProcessLookupError:
                os.remove(temporary)


@contextlib.contextmanager
def atomic_file(path, mode="w", **options):
    """`atomic_path`, opened for writing (text in UTF-8). options: further arguments of `open`."""
    options = options if "b" in mode else {"encoding": "utf-8", **options}
    with atomic_path(path) as temporary, open(temporary, mode, **options) as file:
        yield file


def find_files(names) -> List[str]:
    """The files that names and glob patterns stand for; '~' is expanded."""
    names = [os.path.expanduser(name) for name in names]
    return [path for name in names for path in sorted(glob.glob(name)) or [name]]


def check_writable(path, inputs=()) -> None:
    """Raise OSError if `path` cannot be written or is one of the files `inputs` (None: no file)."""
    if os.path.isdir(path):
        raise IsADirectoryError(f"{path}: expected a file to write, but this is a folder")
    if os.path.realpath(path) in {os.path.realpath(file) for file in inputs if file}:
        raise FileExistsError(f"{path}: is both an input and an output")
    folders = map(str, Path(os.path.realpath(path)).parents)
    folder = next(filter(os.path.exists, folders), "")      # the nearest that exists
    if not (os.path.isdir(folder) and os.access(folder, os.W_OK)):
        raise PermissionError(f"{path}: cannot be written here")


@contextlib.contextmanager
def locked(path, message: str):
    """Hold the lock file `path`; raises BlockingIOError(message) where another process holds it."""
    os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
    try:
        with filelock.FileLock(path, timeout=0):
            yield
    except filelock.Timeout:
        raise BlockingIOError(message) from None


def write_json(path, obj) -> None:
    """Write `obj` as JSON, atomically: sorted keys, NumPy numbers allowed, NaN and inf as null."""
    text = json.dumps(obj, default=lambda numpy_value: numpy_value.tolist())
    plain = json.loads(text, parse_constant=lambda nan_or_infinity: None)
    with atomic_file(path) as file:
        json.dump(plain, file, indent=2, sort_keys=True, ensure_ascii=False)
        file.write("\n")


class RunFiles:
    """The paths of one training run's files. base: runs/<name>, without a suffix."""

    def __init__(self, base: str):
        self.base, self.checkpoint = base, f"{base}.pth"
        self.resume, self.trajectory = f"{base}/resume.pth", f"{base}/trajectory.pth"
        self.metrics, self.run = f"{base}/metrics.json", f"{base}/run.json"
        self.log, self.card = f"{base}/log.csv", f"{base}/card.md"
        folder, name = os.path.split(base)
        self.tensorboard, self.lock = f"{base}/tensorboard", f"{folder}/.{name}.lock"
        self.loss_plot = f"figures_resnet/{name}_loss_lr_plot.png"
        self.histogram = f"figures_resnet/{name}_histogram_plot.png"


# ---------------------------------------------------------------- scripts
_REMEDIES = {errno.ENOSPC: "free some disk space and run the command again",
             errno.EMFILE: "raise the limit of open files: ulimit -n 8192"}
PLAIN = {"±": "+/-", "²": "2", "≥": ">=", "–": "-", "−": "-", "…": "...", "×": "x", "₂": "2"}


def _plain_characters(error):
    """An error handler that encodes what a console lacks as plain characters or as escapes."""
    return "".join(PLAIN.get(c) or c.encode("ascii", "backslashreplace").decode()
                   for c in error.object[error.start:error.end]), error.end


codecs.register_error("plain_characters", _plain_characters)


def run_script(main: Callable[[], Optional[int]], *error_classes) -> int:
    """Run `main()` and return the script's exit code: `sys.exit(run_script(main, DataError))`.

    0 or what main returns; 2 with one line `error: ...` on stderr for `error_classes` and OSError;
    130 when interrupted from the keyboard. Any other exception is a bug and keeps its traceback.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):      # not in a notebook, which shows any character
            stream.reconfigure(errors="plain_characters")
    try:
        code = main()
        sys.stdout.flush()                      # fails here on a closed pipe or a full disk
        return code or 0
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except (OSError, *error_classes) as error:
        print(f"error: {_one_line(error)}", file=sys.stderr)
        return 2


class ScriptParser(argparse.ArgumentParser):
    """An ArgumentParser that reports a wrong option in one line and takes no abbreviations."""

    def __init__(self, **options):
        super().__init__(allow_abbrev=False, **options, epilog="exit codes: 0 done; 1 (prepare.py, "
                         "predict.py) done, but some records could not be used;\n2 an error, in "
                         "one line; 3 (train_resnet.py) interrupted and saved; 130 interrupted")

    def error(self, message):
        self.exit(2, f"error: {printable(message)} (--help lists the options)\n")


def _one_line(error: BaseException) -> str:
    text = str(error)
    if isinstance(error, OSError):
        if error.filename is not None and error.strerror:
            text = f"{os.fsdecode(error.filename)}: {error.strerror}"
        if error.errno in _REMEDIES:
            text += f" ({_REMEDIES[error.errno]})"
    return printable(text) or type(error).__name__


def printable(text) -> str:
    """Text on one line, without control characters (a terminal would obey them)."""
    text = " ".join(str(text).split())
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


@contextlib.contextmanager
def one_line(what: str, error_class):
    """Turn any error of a user's code or file into error_class('<what> (TypeError: …)')."""
    try:
        yield
    except Exception as error:
        if isinstance(error, error_class) or "Memory" in type(error).__name__:
            raise
        raise error_class(f"{what} ({type(error).__name__}: {printable(error)[:200]})") from error


def counted(n: int, noun: str) -> str:
    """'1 patient', '1,200 patients'."""
    return f"{n:,} {noun if n == 1 else noun + 's'}"


def print_table(rows: Iterable[Sequence], headers: Sequence[str]) -> None:
    """Print rows (sequences of cells) in aligned columns; columns of numbers are right-aligned.

    Floats get two decimals, integers thousands separators; None is an empty cell, NaN a dash. At
    most 100 columns wide, or as wide as the terminal: headers are wrapped, then the widest cells.
    """
    cells, numeric = table_cells(rows, headers)
    columns = [[printable(cell) for cell in column] for column in zip(headers, *cells)]
    widths = [max([1, *map(len, column)]) for column in columns]
    longest_words = [max([1, *map(len, " ".join(column).split())]) for column in columns]
    limit = min(100, shutil.get_terminal_size((100, 24)).columns) - 2 * (len(columns) - 1)
    if sum(widths) > limit:
        widths = [max([1, *map(len, column[0].split() + column[1:])]) for column in columns]
    while sum(widths) > limit and widths != longest_words:
        _, widest = max((width, n) for n, width in enumerate(widths) if width > longest_words[n])
        widths[widest] -= 1
    for number, row in enumerate(zip(*columns)):
        for line in itertools.zip_longest(*map(textwrap.wrap, row, widths), fillvalue=""):
            print("  ".join(text.rjust(width) if right else text.ljust(width)
                            for text, width, right in zip(line, widths, numeric)).rstrip())
        if number == 0:
            print("  ".join("-" * width for width in widths))


_NUMBER = re.compile(r"([-+\u2212\u2013<>=≥()\[\]\d.,:;%±×e/ ]|\bto\b)*$")


def table_cells(rows, headers):
    """(cells as text, whether each column holds only numbers), for the console and for pages."""
    cells = [[_cell(value) for value in row] for row in rows]
    numeric = [all(map(_NUMBER.match, column)) for column in zip(*cells)]
    return cells, numeric or [False] * len(headers)


def _cell(value) -> str:
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        return "" if value is None else str(value)
    if not math.isfinite(value):
        return "–"
    return f"{int(value):,}" if isinstance(value, numbers.Integral) else f"{float(value):.2f}"


def simulated_note(origin: str, trained_on: str) -> Optional[str]:
    """The warning for console, figures and pages if data are or were simulated, else None."""
    if "simulated" in origin:
        return "SIMULATED PATIENTS: says nothing about real ones"
    if "simulated" in trained_on:
        return "MODEL TRAINED ON SIMULATED PATIENTS"
    return None


# ---------------------------------------------------------------- running
def progress(iterable=None, **options):
    """tqdm with its options; a log file gets a plain line every 30 s instead of a bar."""
    from tqdm.auto import tqdm
    if not sys.stderr.isatty() and "ipykernel" not in sys.modules:
        options.update(ncols=0, mininterval=30, delay=30, miniters=1)
    return tqdm(iterable, **options)


class ProcessDied(Exception):
    """The result of a job whose process was killed."""


def in_processes(function: Callable, jobs: Iterable, workers: int = 1) -> Iterator[tuple]:
    """Yield (job, function(job)) in the order of the jobs, computed by `workers` processes.

    If a process is killed, its job's result is a ProcessDied. One worker: no process is started.
    """
    jobs = list(jobs)
    if workers <= 1:
        yield from zip(jobs, map(function, jobs))
        return
    spawn = multiprocessing.get_context("spawn")    # fork is not safe with HDF5 and threads
    own = threading.local()                         # one process per thread

    def run(job):
        if not hasattr(own, "process"):
            own.process = ProcessPoolExecutor(1, mp_context=spawn, initializer=_start_worker)
        try:
            return own.process.submit(function, job).result()
        except BrokenExecutor:
            del own.process
            return ProcessDied("its process was killed (out of memory?)")

    with ThreadPoolExecutor(workers) as threads:
        with contextlib.closing(threads.map(run, jobs)) as results:     # an error cancels the rest
            yield from zip(jobs, results)


def _start_worker():
    signal.signal(signal.SIGINT, signal.SIG_IGN)    # the parent handles Ctrl-C
    exit_when_parent_dies()


def exit_when_parent_dies() -> None:
    """End this process (a worker, a rank of torchrun) as soon as its parent is dead (POSIX)."""
    parent = multiprocessing.parent_process()   # it may have ended while this process was starting
    pid = parent.pid if parent else os.getppid()

    def wait():
        while os.getppid() == pid:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def reset_all_seeds(seed: int) -> None:
    """Seed the global random generators of Python, NumPy and torch (CPU and GPU)."""
    import torch  # slow to import
    random.seed(seed)
    np.random.seed(seed % 2 ** 32)
    torch.manual_seed(seed)


def versions() -> Dict[str, str]:
    """Versions of Python and of the packages that shape a result; no host or user name."""
    return {"python": platform.python_version(),
            "platform": f"{platform.system()} {platform.machine()}",
            **{name: metadata.version(name)
               for name in ("torch", "numpy", "h5py", "scikit-learn", "scipy")}}


def git_revision() -> Optional[str]:
    """Short hash of this file's checkout ('-dirty' if it was edited since), or None."""
    if shutil.which("git") is None:
        return None
    done = subprocess.run(["git", "describe", "--always", "--dirty", "--exclude=*"], text=True,
                          cwd=os.path.dirname(os.path.abspath(__file__)), capture_output=True)
    return done.stdout.strip() or None


# ---------------------------------------------------------------- figures
TRAIN_COLOUR, TUNE_COLOUR = "#4c72b0", "#dd8452"
FONT_POINTS = 9         # of figures 4.8 inches wide: at least 9 px on a phone


def new_figure(width_inches: float, height_inches: float):
    """A figure without pyplot: no window, no global state, no choice of backend."""
    from matplotlib.figure import Figure
    return Figure(figsize=(width_inches, height_inches), layout="constrained")


def save_figure(figure, path) -> None:
    """Write a figure atomically, in the format of the suffix (.png at 200 dpi, .pdf, .svg)."""
    from matplotlib import rc_context
    suffix = os.path.splitext(path)[1][1:] or "png"
    with atomic_path(path) as temporary, rc_context({"pdf.fonttype": 42}):     # editable text
        figure.savefig(temporary, format=suffix, dpi=200, facecolor="white")


def finish_figure(figure, note: Optional[str] = None):
    """Add light grids, readable ticks and, on top, the note in red. Returns the figure."""
    for axes in figure.axes:
        if axes.get_label() != "<colorbar>":
            axes.grid(color="0.9", lw=0.6)
            axes.set_axisbelow(True)
            axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=FONT_POINTS)
        axes.xaxis.label.set_size(FONT_POINTS)
        axes.yaxis.label.set_size(FONT_POINTS)
    if note:
        figure.suptitle(note, color="white", fontsize=9, fontweight="bold", bbox={
            "boxstyle": "round,pad=0.35", "facecolor": "#b3261e", "edgecolor": "none"})
    return figure


def loss_lr_figure(trajectory, title_note: Optional[str] = None,
                   loss_label: str = "Loss, MSE (mmHg²)"):
    """Loss of train and tune patients and learning rate by epoch, with the best epoch marked.

    trajectory: what training_loop returns; uses `epoch_train_loss`, `epoch_val_loss` and `lr`,
    [epochs] each. title_note: shown in a red field on top, e.g. 'SIMULATED DATA'.
    """
    train, tune, lr = (np.asarray(trajectory[key], float)
                       for key in ("epoch_train_loss", "epoch_val_loss", "lr"))
    epochs, best = np.arange(1, len(train) + 1), int(np.argmin(tune))
    figure = new_figure(4.8, 4.2)
    loss_axes, lr_axes = figure.subplots(2, 1, sharex=True, gridspec_kw={"height_ratios": (2.4, 1)})
    loss_axes.plot(epochs, train, "o-", ms=3, color=TRAIN_COLOUR, label="train")
    loss_axes.plot(epochs, tune, "o-", ms=3, color=TUNE_COLOUR, label="tune")
    loss_axes.plot(best + 1, tune[best], "*", ms=13, color=TUNE_COLOUR, mec="black",
                   label=f"best: epoch {best + 1}, {tune[best]:.4g}")
    lr_axes.plot(epochs, lr, "o-", ms=3, color="0.2", drawstyle="steps-mid")
    for axes, seen in ((loss_axes, np.concatenate([train, tune])), (lr_axes, lr)):
        if seen.max() > 5 * seen.min() > 0:         # else the first epoch flattens the others
            axes.set_yscale("log")
        axes.axvline(best + 1, color="0.55", lw=0.8, ls="--", zorder=0)
    loss_axes.set_ylabel(loss_label)
    loss_axes.legend(frameon=False, fontsize=FONT_POINTS)
    lr_axes.set(xlabel="Epoch", ylabel="Learning rate")
    lr_axes.locator_params(axis="x", integer=True)
    return finish_figure(figure, title_note)


def histogram_figure(truth, prediction, scores, title_note: Optional[str] = None):
    """2-D histogram of predicted against label values [N] (mmHg), with the scores above it.

    scores: what metrics.scores returns (n: segments), `p_crit_r2` (R² of Pcrit) and `n_patients`.
    title_note: shown in a red field on top, e.g. 'SIMULATED DATA'.
    """
    from matplotlib.colors import LogNorm
    both = np.asarray([truth, prediction], float)
    # The axes leave out extreme outliers, which would shrink the rest; the title counts them.
    low, high = np.percentile(both, [0.1, 99.9])
    low, high = 5 * math.floor(low / 5 - 1), 5 * math.ceil(high / 5 + 1)
    outside = ((both < low) | (both > high)).any(0).sum()
    bin_mmhg = 1 if len(truth) >= 3000 else 2
    figure = new_figure(4.8, 4.7)
    axes = figure.subplots()
    counts, _, _, image = axes.hist2d(*both, np.arange(low, high + bin_mmhg, bin_mmhg), cmin=1,
                                      norm=LogNorm(), cmap="viridis", rasterized=True)
    image.set_clim(1, max(np.nanmax(counts), 2))
    figure.colorbar(image, ax=axes, shrink=0.9, pad=0.03, format="{x:,.0f}",
                    ticks=[factor * 10 ** n for n in range(6) for factor in (1, 2, 5)],
                    label=f"Segments per {bin_mmhg} × {bin_mmhg} mmHg").minorticks_off()
    axes.plot([low, high], [low, high], color="black", lw=1, ls="--", label="identity")
    axes.legend(loc="lower right", frameon=False, fontsize=FONT_POINTS)
    axes.set(xlim=(low, high), ylim=(low, high), aspect="equal",
             xlabel="Label TPP (mmHg)", ylabel="Predicted TPP (mmHg)")
    title = ("RMSE {rmse:.2f}   MAE {mae:.2f}   MeAD {mead:.2f}   bias {bias:+.2f} ± {sd:.2f} mmHg"
             "\nR² {r2:.3f}   R² of Pcrit {p_crit_r2:.3f}\n").format(**scores)
    title += f"{counted(scores['n_patients'], 'patient')}   {counted(scores['n'], 'segment')}"
    if len(truth) > scores["n"]:
        title += f"   {len(truth):,} predictions"
    if outside:
        title += f" ({outside:,} beyond the axes)"
    axes.set_title(title, fontsize=FONT_POINTS, linespacing=1.4)
    return finish_figure(figure, title_note)
