"""Shared helpers: atomic files, script errors, tables, progress, processes, seeds, run figures.

    from tk_utils import atomic_path, histogram_plot, print_table

Needs no other file of this project. matplotlib, tqdm and torch are imported where they are used.
"""
import argparse
import codecs
import contextlib
import errno
import glob
import json
import math
import multiprocessing
import multiprocessing.connection
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
import tempfile
import textwrap
import threading
import time
import zlib
from collections import deque
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from importlib import metadata
from typing import Any, Callable, Dict, Iterable, Iterator, Optional, Sequence, Tuple

import filelock
import numpy as np

# ---------------------------------------------------------------- files

_DAY_S = 86_400


@contextlib.contextmanager
def atomic_path(path) -> Iterator[str]:
    """Yield a temporary path in the same folder; on success, sync it and rename it to `path`.

    A reader of `path` sees the old file or the complete new one. On an error the temporary file is
    removed and the old file stays. Missing folders are made. The temporary file is hidden and ends
    in .tmp, so no glob for data finds it; those of killed processes are removed. Libraries that go
    by the suffix must be told the format.

        with atomic_path('runs/M1.5.pth') as temporary:
            torch.save(checkpoint, temporary)
    """
    path = os.path.realpath(os.fspath(path))    # follow a symlink, so that the link itself stays
    if os.path.isdir(path):
        raise IsADirectoryError(f"{path}: expected a file to write, but this is a folder")
    folder, name = os.path.split(path)
    os.makedirs(folder, exist_ok=True)
    remove_leftovers(path)
    writer = f"{_machine()}-{os.getpid()}-{secrets.token_hex(4)}"
    temporary = os.path.join(folder, f".{name[:60]}.{writer}.tmp")
    try:
        yield temporary
        if os.path.exists(path):
            shutil.copymode(path, temporary)    # a private file stays private
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        full = isinstance(error, RuntimeError) and shutil.disk_usage(folder).free < 2 ** 20
        with contextlib.suppress(OSError):      # must not hide the first error
            os.remove(temporary)
        if full:                                # torch and h5py report a full disk in other ways
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path) from error
        raise
    if os.name == "posix":                      # sync the rename as well
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextlib.contextmanager
def atomic_file(path, mode="w", **options):
    """`atomic_path`, opened for writing (text in UTF-8). options: further arguments of `open`."""
    options = options if "b" in mode else {"encoding": "utf-8", **options}
    with atomic_path(path) as temporary, open(temporary, mode, **options) as file:
        yield file


def remove_leftovers(path) -> None:
    """Remove the temporary files that killed writers of `atomic_path(path)` left behind."""
    folder, name = os.path.split(os.path.realpath(path))
    pattern = os.path.join(glob.escape(folder), f".{glob.escape(name[:60])}.*-*-*.tmp")
    for temporary in glob.glob(pattern):
        machine, pid, _ = os.path.basename(temporary)[:-len(".tmp")].rsplit(".", 1)[1].split("-")
        with contextlib.suppress(OSError, ValueError):
            killed = machine == _machine() and not _is_alive(int(pid))
            if killed or time.time() - os.path.getmtime(temporary) > _DAY_S:
                os.remove(temporary)


def check_writable(path, inputs=()) -> None:
    """Raise OSError if `path` cannot be written, or is one of the files `inputs` (None: no file):
    call it before the work that it will hold."""
    if os.path.isdir(path):
        raise IsADirectoryError(f"{path}: expected a file to write, but this is a folder")
    if os.path.realpath(path) in {os.path.realpath(file) for file in inputs if file}:
        raise FileExistsError(f"{path}: is both an input and an output")
    folder = os.path.dirname(os.path.realpath(path))
    while not os.path.exists(folder):
        folder = os.path.dirname(folder)
    try:
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise OSError(f"{path}: cannot be written here ({error.strerror})") from None


def _machine() -> str:
    return f"{zlib.crc32(platform.node().encode()):08x}"


def _is_alive(pid: int) -> bool:
    if os.name != "posix":                      # on Windows, signal 0 would end the process
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


@contextlib.contextmanager
def locked(path, message: str):
    """Hold the lock file `path`; raises BlockingIOError(message) where another process holds it.

    The system frees the lock when a process ends, however it ends; the empty file stays.
    """
    os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
    lock = filelock.FileLock(os.fspath(path))
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        raise BlockingIOError(message) from None
    try:
        yield
    finally:
        lock.release()


def write_json(path, obj) -> None:
    """Write `obj` as JSON, atomically: sorted keys, NumPy numbers allowed, NaN and inf as null."""
    with atomic_file(path) as file:
        json.dump(_plain(obj), file, indent=2, sort_keys=True, allow_nan=False,
                  ensure_ascii=False)
        file.write("\n")


def _plain(obj):
    if isinstance(obj, dict):
        return {str(key): _plain(value) for key, value in obj.items()}
    if isinstance(obj, (list, tuple)):
        return [_plain(value) for value in obj]
    if isinstance(obj, (np.ndarray, np.generic)):
        return _plain(obj.tolist())
    if isinstance(obj, float) and not math.isfinite(obj):
        return None
    return obj


@dataclass(frozen=True)
class RunFiles:
    """Where the files of one training run are. base: runs/<name>, without a suffix."""
    base: str

    def __getattr__(self, name):
        try:
            return os.path.join(self.base, _IN_RUN_FOLDER[name])
        except KeyError:
            raise AttributeError(name) from None

    @property
    def checkpoint(self) -> str:
        return self.base + ".pth"

    @property
    def loss_plot(self) -> str:
        return f"figures_resnet/{os.path.basename(self.base)}_loss_lr_plot.png"

    @property
    def histogram(self) -> str:
        return f"figures_resnet/{os.path.basename(self.base)}_histogram_plot.png"


_IN_RUN_FOLDER = {"resume": "resume.pth", "trajectory": "trajectory.pth", "log": "log.csv",
                  "metrics": "metrics.json", "run": "run.json", "card": "card.md",
                  "tensorboard": "tensorboard", "lock": ".lock"}


def run_files(name: str, folder: str = "runs") -> RunFiles:
    """The files of the run `name`: runs/<name>.pth, the others in the folder runs/<name>/."""
    return RunFiles(os.path.join(folder, name))


# ---------------------------------------------------------------- scripts

_REMEDIES = {errno.ENOSPC: "free some disk space and run the command again",
             errno.EMFILE: "raise the limit of open files: ulimit -n 8192"}


def run_script(main: Callable[[], Optional[int]], *error_classes) -> int:
    """Run `main()` and return the script's exit code: `sys.exit(run_script(main, DataError))`.

    0 or what main returns; 2 with one line `error: ...` on stderr for `error_classes` and OSError;
    130 when interrupted from the keyboard. Any other exception is a bug and keeps its traceback.
    """
    _tolerate_any_text(sys.stdout, sys.stderr)
    try:
        code = main()
        sys.stdout.flush()                      # a closed pipe or a full disk shows here
        return 0 if code is None else code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except (OSError, *error_classes) as error:
        print(f"error: {_one_line(error)}", file=sys.stderr)
        return 2


class ScriptParser(argparse.ArgumentParser):
    """An ArgumentParser that reports a wrong option in one line and takes no abbreviations."""

    def __init__(self, **options):
        super().__init__(allow_abbrev=False, **options)

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


# What a terminal without Unicode shows instead (PYTHONIOENCODING=ascii, LC_ALL=C).
_ASCII = {"–": "-", "−": "-", "±": "+/-", "×": "x", "²": "2", "≥": ">=", "≤": "<=", "…": "...",
          "→": "->", "·": ".", "µ": "u", "₂": "2", "’": "'"}


def _in_ascii(error):
    if not isinstance(error, UnicodeEncodeError):
        raise error
    return "".join(_ASCII.get(c, "?") for c in error.object[error.start:error.end]), error.end


def as_ascii(text: str) -> str:
    """Text as a stdout without Unicode will show it; unchanged where stdout has Unicode."""
    codecs.register_error("tk_utils", _in_ascii)
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    return text.encode(encoding, "tk_utils").decode(encoding)


def _tolerate_any_text(*streams) -> None:
    """Let streams show characters they cannot encode in another way instead of raising."""
    codecs.register_error("tk_utils", _in_ascii)
    for stream in streams:
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="tk_utils")


def counted(n: int, noun: str, plural: Optional[str] = None) -> str:
    """'1 patient', '1,200 patients'."""
    return f"{n:,} {noun if n == 1 else plural or noun + 's'}"


def print_table(rows: Iterable[Sequence], headers: Sequence[str]) -> None:
    """Print rows (sequences of cells) in aligned columns; columns of numbers are right-aligned.

    Floats get two decimals, integers thousands separators; None is an empty cell, NaN a dash. At
    most 100 columns wide, or as wide as the terminal: headers and texts are wrapped, and columns
    that still do not fit follow in a second block that repeats the first column.
    """
    cells, numeric = table_cells(rows, headers)
    columns = [[as_ascii(printable(cell)) for cell in column] for column in zip(headers, *cells)]
    limit = max(40, min(100, shutil.get_terminal_size((100, 24)).columns or 100))
    widths = [max(map(len, column)) for column in columns]
    if sum(widths) + 2 * len(widths) - 2 > limit:       # headers by word, then the widest texts
        widths = [max(*map(len, column[0].split() or [""]), *map(len, column[1:]), 1)
                  for column in columns]
        while sum(widths) + 2 * len(widths) - 2 > limit:
            text = max((n for n, right in enumerate(numeric) if not right),
                       key=lambda n: widths[n], default=None)
            if text is None or widths[text] <= MIN_TEXT_COLUMNS:
                break
            widths[text] -= 1
    block = [0]
    for n in range(1, len(widths)):
        if len(block) > 1 and sum(widths[m] + 2 for m in (*block, n)) - 2 > limit:
            _print_block(columns, widths, numeric, block)
            print()
            block = [0]
        block.append(n)
    _print_block(columns, widths, numeric, block)


MIN_TEXT_COLUMNS = 20


def _print_block(columns, widths, numeric, block):
    for number, row in enumerate(zip(*(columns[n] for n in block))):
        wrapped = [textwrap.wrap(cell, widths[n]) or [""] for cell, n in zip(row, block)]
        for line in range(max(map(len, wrapped))):
            texts = [cell[line] if line < len(cell) else "" for cell in wrapped]
            print("  ".join(text.rjust(widths[n]) if numeric[n] else text.ljust(widths[n])
                            for text, n in zip(texts, block)).rstrip())
        if number == 0:
            print("  ".join("-" * widths[n] for n in block))


_NUMBER = re.compile(r"([-+\u2212\u2013<>=≥()\[\]\d.,:;%±×e/ ]|\bto\b)*$")


def table_cells(rows, headers):
    """(cells as text, whether each column holds only numbers), for the console and for pages."""
    cells = [[_cell(value) for value in row] for row in rows]
    columns = list(zip(*cells)) if cells else [()] * len(headers)
    return cells, [any(column) and all(_NUMBER.match(cell) for cell in column)
                   for column in columns]


def _cell(value) -> str:
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        return "" if value is None else str(value)
    if not math.isfinite(value):
        return "–"
    return f"{int(value):,}" if isinstance(value, numbers.Integral) else f"{float(value):.2f}"


def simulated_note(origin: str, trained_on: str) -> Optional[str]:
    """What console, figures and pages must say when simulated data are involved, or None."""
    if "simulated" in origin:
        return "SIMULATED PATIENTS: says nothing about real ones"
    if "simulated" in trained_on:
        return "MODEL TRAINED ON SIMULATED PATIENTS"
    return None


# ---------------------------------------------------------------- progress

SECONDS_BETWEEN_LINES = 30


def progress(iterable=None, **options):
    """tqdm where a bar can be drawn (terminal, notebook), plain lines where it cannot (log file).

    Takes tqdm's options. A log file gets a line at most every 30 s, and one at the end (none with
    `leave=False`).
    """
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    if os.environ.get("NO_COLOR"):              # https://no-color.org
        options.pop("colour", None)
    if sys.stderr.isatty() or "IPKernelApp" in getattr(shell, "config", ()):
        from tqdm.auto import tqdm
        if sys.stderr.isatty() and os.get_terminal_size(sys.stderr.fileno()).columns == 0:
            options = {"ncols": 80, "nrows": 24, **options}     # a container's terminal
    else:
        from tqdm import tqdm
        options.update(file=_LogLines(), ncols=0, position=0)
    return tqdm(iterable, **options)


class _LogLines:
    """The file that tqdm draws on: keeps a few of the bars that overwrite each other, as lines."""

    def __init__(self):
        self.bar, self.last_line = "", time.monotonic()

    def write(self, text):
        drawn = text.strip()
        self.bar = drawn or self.bar
        due = time.monotonic() - self.last_line >= SECONDS_BETWEEN_LINES
        if text == "\n" or (drawn and due):     # tqdm ends with a line feed, unless leave=False
            self.last_line = time.monotonic()
            print(self.bar, file=sys.stderr, flush=True)

    def flush(self):
        pass


# ---------------------------------------------------------------- processes

class ProcessDied(Exception):
    """The result of a job whose process was killed, also when it ran alone (out of memory?)."""


def in_processes(function: Callable, jobs: Iterable, workers: int = 1
                 ) -> Iterator[Tuple[Any, Any]]:
    """Yield (job, function(job)) in the order of the jobs, computed by `workers` processes.

    At most 4 x workers results wait at a time. If a process is killed, the jobs under way run again
    one at a time, so that only the job that kills its process is lost: its result is ProcessDied().
    One worker: no process is started.
    """
    if workers <= 1:
        for job in jobs:
            yield job, function(job)
        return
    jobs, waiting = iter(jobs), deque()
    done = False
    while not done:
        try:
            with _pool(workers) as pool:
                try:
                    while True:
                        for job in jobs:
                            waiting.append((job, None))     # kept if submitting fails
                            waiting[-1] = job, pool.submit(function, job)
                            if len(waiting) >= 4 * workers:
                                break
                        if not waiting:
                            done = True
                            break
                        result = waiting[0][1].result()
                        yield waiting.popleft()[0], result
                finally:
                    for _, future in waiting:
                        if future:
                            future.cancel()
        except BrokenProcessPool:
            while waiting:
                job, _ = waiting.popleft()
                yield job, _alone(function, job)


def _alone(function, job):
    try:
        with _pool(1) as pool:
            return pool.submit(function, job).result()
    except BrokenProcessPool:
        return ProcessDied("its process was killed (out of memory?)")


def _pool(workers):
    spawn = multiprocessing.get_context("spawn")    # fork is not safe with HDF5 and threads
    return ProcessPoolExecutor(workers, mp_context=spawn, initializer=_start_worker)


def _start_worker():
    signal.signal(signal.SIGINT, signal.SIG_IGN)    # Ctrl-C is the parent's to handle
    exit_when_parent_dies()


def exit_when_parent_dies() -> None:
    """End this process as soon as its parent is gone: a pool's worker, or a rank of torchrun."""
    parent = multiprocessing.parent_process()
    pid = os.getppid()

    def wait():
        if parent is not None:
            multiprocessing.connection.wait([parent.sentinel])
        else:
            while os.getppid() == pid:
                time.sleep(1)
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


# ---------------------------------------------------------------- what a run was made with

def reset_all_seeds(seed: int) -> None:
    """Seed the global random generators of Python, NumPy and torch (CPU and GPU)."""
    import torch  # takes seconds; workers that read recordings do without it
    random.seed(seed)
    np.random.seed(seed % 2 ** 32)
    torch.manual_seed(seed)


def versions() -> Dict[str, Optional[str]]:
    """Versions of Python and of the packages that shape a result; no host or user name."""
    found = {"python": platform.python_version(),
             "platform": f"{platform.system()} {platform.machine()}"}
    for name, distribution in (("torch", "torch"), ("numpy", "numpy"), ("h5py", "h5py"),
                               ("sklearn", "scikit-learn"), ("scipy", "scipy")):
        try:
            found[name] = metadata.version(distribution)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found


def git_revision() -> Optional[str]:
    """Short hash of this file's checkout ('-dirty' if it was edited since), or None."""
    try:
        return subprocess.run(
            ["git", "describe", "--always", "--dirty", "--exclude=*"], check=True, timeout=20,
            cwd=os.path.dirname(os.path.abspath(__file__)), text=True,
            stdout=subprocess.PIPE, stderr=subprocess.DEVNULL).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


# ---------------------------------------------------------------- figures

NOTE_STYLE = {"color": "white", "fontsize": 9, "fontweight": "bold", "ha": "center", "va": "bottom",
              "bbox": {"boxstyle": "round,pad=0.35", "facecolor": "#b3261e", "edgecolor": "none"}}
TRAIN_COLOUR, TUNE_COLOUR = "#4c72b0", "#dd8452"
FONT_POINTS = 9         # of figures 4.8 inches wide: at least 9 px on a phone


def new_figure(width_inches: float, height_inches: float):
    """A figure without pyplot: no window, no global state, no choice of backend."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    figure = Figure(figsize=(width_inches, height_inches), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save_figure(figure, path) -> None:
    """Write a figure atomically, in the format of the suffix (.png at 200 dpi, .pdf, .svg)."""
    from matplotlib import rc_context
    suffix = os.path.splitext(os.fspath(path))[1].lstrip(".").lower() or "png"
    with atomic_path(path) as temporary, rc_context({"pdf.fonttype": 42, "ps.fonttype": 42}):
        figure.savefig(temporary, format=suffix, dpi=200, facecolor="white")


def finish_figure(figure, note: Optional[str] = None):
    """The figure with light grids, readable ticks and, above everything, the red note."""
    for axes in figure.axes:
        if axes.get_label() != "<colorbar>":
            axes.grid(color="0.9", lw=0.6)
            axes.set_axisbelow(True)
            axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=FONT_POINTS)
        axes.xaxis.label.set_size(FONT_POINTS)
        axes.yaxis.label.set_size(FONT_POINTS)
    if note:
        style = {key: NOTE_STYLE[key] for key in ("color", "fontsize", "fontweight", "bbox")}
        figure.suptitle(note, **style)
    return figure


def density(axes, counts, x_edges, y_edges):
    """Draw counts [x, y] in colours on a logarithmic scale; empty bins are left blank."""
    from matplotlib.colors import LogNorm
    return axes.pcolormesh(x_edges, y_edges, np.ma.masked_equal(counts.T, 0), cmap="viridis",
                           norm=LogNorm(vmin=1, vmax=max(counts.max(), 2)), rasterized=True)


def loss_lr_plot(trajectory, path, title_note: Optional[str] = None,
                 loss_label: str = "Loss, MSE (mmHg²)") -> None:
    """`loss_lr_figure`, written to `path`."""
    save_figure(loss_lr_figure(trajectory, title_note, loss_label), path)


def loss_lr_figure(trajectory, title_note: Optional[str] = None,
                   loss_label: str = "Loss, MSE (mmHg²)"):
    """Loss of train and tune patients and learning rate by epoch, with the best epoch marked.

    trajectory: what training_loop returns: `epoch_train_loss` [epochs], `epoch_val_loss` [epochs]
    (may be empty) and `lr` (one value per epoch or per batch), arrays or tensors.
    title_note: shown in a red field on top, e.g. 'SIMULATED DATA'.
    """
    from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter
    train, tune, lr = (np.asarray(trajectory[key], float).ravel()
                       for key in ("epoch_train_loss", "epoch_val_loss", "lr"))
    epochs = np.arange(1, len(train) + 1)
    figure = new_figure(4.8, 4.2)
    loss_axes, lr_axes = figure.subplots(2, 1, sharex=True, gridspec_kw={"height_ratios": (2.4, 1)})

    marker = "o" if len(train) <= 40 else None
    loss_axes.plot(epochs, train, color=TRAIN_COLOUR, marker=marker, ms=3.5, label="train")
    if np.isfinite(tune).any():
        loss_axes.plot(epochs[:len(tune)], tune, color=TUNE_COLOUR, marker=marker, ms=3.5,
                       label="tune")
        best = int(np.nanargmin(tune))
        loss_axes.plot(best + 1, tune[best], "*", color=TUNE_COLOUR, mec="black", mew=0.7, ms=13,
                       ls="none", label=f"best: epoch {best + 1}, {tune[best]:.4g}")
        for axes in (loss_axes, lr_axes):
            axes.axvline(best + 1, color="0.55", lw=0.8, ls="--", zorder=0)
    seen = np.concatenate([train, tune])
    seen = seen[np.isfinite(seen)]
    if seen.size and seen.min() > 0 and seen.max() > 5 * seen.min():
        loss_axes.set_yscale("log")             # or the first epoch flattens all the others
        loss_axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        loss_axes.yaxis.set_major_formatter("{x:g}")
        loss_axes.yaxis.set_minor_formatter(NullFormatter())
    loss_axes.set_ylabel(loss_label)
    loss_axes.legend(frameon=False, fontsize=FONT_POINTS)

    if len(lr) == len(train):
        lr_axes.plot(epochs, lr, color="0.2", marker=marker, ms=3, drawstyle="steps-mid")
    else:                                       # one value per batch; epoch e ends at x = e
        lr_axes.plot(np.arange(1, len(lr) + 1) * len(train) / max(len(lr), 1), lr, color="0.2")
    if np.any(lr > 0) and lr[lr > 0].max() > 10 * lr[lr > 0].min():
        lr_axes.set_yscale("log")
    lr_axes.set(xlabel="Epoch", ylabel="Learning rate")
    lr_axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    figure.align_ylabels()
    return finish_figure(figure, title_note)


def histogram_plot(truth, prediction, path, scores, title_note: Optional[str] = None,
                   label: str = "TPP") -> None:
    """`histogram_figure`, written to `path`."""
    save_figure(histogram_figure(truth, prediction, scores, title_note, label), path)


def histogram_figure(truth, prediction, scores, title_note: Optional[str] = None,
                     label: str = "TPP"):
    """2-D histogram of predicted against label values (mmHg), equal axes, scores in a box.

    truth, prediction: [N] mmHg. scores: what metrics.scores returns, optionally with `n_patients`
    and `p_crit_r2` (R² of Pcrit); missing ones are not shown.
    title_note: shown in a red field on top, e.g. 'SIMULATED DATA'.
    """
    from matplotlib.ticker import LogLocator, NullLocator
    truth, prediction = (np.asarray(values, float).ravel() for values in (truth, prediction))
    # One outlier must not shrink the picture to a dot: the axes hold 99.8 % of the values plus a
    # quarter of their range on either side; what lies beyond is counted in the box.
    both = np.concatenate([truth, prediction])
    low, high = np.percentile(both, [0.1, 99.9])
    spare = max(2.5, 0.25 * (high - low))
    low = 5 * math.floor(max(both.min() - 1, low - spare) / 5)
    high = 5 * math.ceil(min(both.max() + 1, high + spare) / 5)
    outside = int(np.sum((np.minimum(truth, prediction) < low)
                         | (np.maximum(truth, prediction) > high)))
    bin_mmhg = max(1 if len(truth) >= 3000 else 2, math.ceil((high - low) / 150))
    bins = np.arange(low, high + bin_mmhg, bin_mmhg)
    counts = np.histogram2d(truth, prediction, bins=(bins, bins))[0]

    figure = new_figure(4.8, 4.7)
    axes = figure.subplots()
    image = density(axes, counts, bins, bins)
    axes.plot([low, high], [low, high], color="black", lw=1, ls="--", label="identity")
    axes.set(xlim=(low, high), ylim=(low, high), aspect="equal",
             xlabel=f"Label {label} (mmHg)", ylabel=f"Predicted {label} (mmHg)")
    axes.legend(loc="lower right", frameon=False, fontsize=FONT_POINTS)
    colour_bar = figure.colorbar(image, ax=axes, shrink=0.9, pad=0.03, format="{x:,.0f}",
                                 ticks=LogLocator(subs=(1, 2, 5) if counts.max() < 500 else (1,)))
    colour_bar.ax.yaxis.set_minor_locator(NullLocator())
    colour_bar.set_label(f"Segments per {bin_mmhg} × {bin_mmhg} mmHg")

    def known(*texts_and_keys):
        return "   ".join(text.format(**scores) for text, key in texts_and_keys if key in scores)

    lines = [
        known(("RMSE {rmse:.2f}", "rmse"), ("MAE {mae:.2f}", "mae"), ("MeAD {mead:.2f}", "mead"),
              ("bias {bias:+.2f} ± {sd:.2f} mmHg", "sd")),
        known(("R² {r2:.3f}", "r2"), ("R² of Pcrit {p_crit_r2:.3f}", "p_crit_r2")),
        (counted(scores["n_patients"], "patient") + "   " if "n_patients" in scores else "")
        + counted(len(truth), "segment") + (f" ({outside:,} beyond the axes)" if outside else "")]
    axes.set_title("\n".join(filter(None, lines)), fontsize=FONT_POINTS, linespacing=1.4)
    return finish_figure(figure, title_note)
