"""The toolkit: atomic files, figures, tables, HTML, progress, seeds; imports nothing of ours.

    from tk_utils import atomic_path, histogram_plot, print_table

Importing it does no work: matplotlib, torch and tqdm are imported by the functions that use them.
"""
import argparse
import base64
import contextlib
import glob
import html
import importlib
import io
import json
import math
import numbers
import os
import platform
import random
import re
import secrets
import shutil
import struct
import subprocess
import sys
import time

import numpy as np

# ---------------------------------------------------------------- files

@contextlib.contextmanager
def atomic_path(path):
    """Yield a temporary path beside `path`; on success it is synced and renamed to `path`.

    A reader of `path` sees the old file or the complete new one, never half of one. On an error the
    temporary is removed and the old file stays. Missing folders are made. The temporary is called
    `.<name>.<random>.tmp`, so neither `*` nor `*<suffix>` finds it, and concurrent writers have one
    each (the last to finish wins). Its suffix is .tmp: libraries that go by the suffix need to be
    told the format, and `np.savez` an open file.

        with atomic_path('runs/M1.5.pth') as temporary:
            torch.save(checkpoint, temporary)
    """
    path = os.path.realpath(os.fspath(path))    # through a symlink, so that the link itself stays
    if os.path.isdir(path):
        raise IsADirectoryError(f"{path}: a file is to be written here, but it is a folder")
    folder, name = os.path.split(path)
    os.makedirs(folder, exist_ok=True)
    temporary = os.path.join(folder, f".{name[:150]}.{secrets.token_hex(6)}.tmp")
    try:
        yield temporary
        if os.path.exists(path):
            shutil.copymode(path, temporary)    # what was made private stays private
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):      # never hides the error that brought us here
            os.remove(temporary)
        raise
    if os.name == "posix":                      # the rename itself has to reach the disk, too
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextlib.contextmanager
def atomic_file(path, mode="w", **how):
    """`atomic_path`, opened for writing (text in UTF-8); how: further arguments of `open`.

        with atomic_file('scores.csv') as file:
            file.write(text)
    """
    how = how if "b" in mode else {"encoding": "utf-8", **how}
    with atomic_path(path) as temporary, open(temporary, mode, **how) as file:
        yield file


def remove_leftovers(path, older_than_s=0):
    """Remove what killed writers of `atomic_path(path)` left; only where none is at work now."""
    folder, name = os.path.split(os.path.realpath(path))
    for temporary in glob.glob(os.path.join(glob.escape(folder), f".{glob.escape(name)}.*.tmp")):
        with contextlib.suppress(OSError):
            if time.time() - os.path.getmtime(temporary) >= older_than_s:
                os.remove(temporary)


@contextlib.contextmanager
def locked(path, message):
    """Hold the lock file `path`; raises BlockingIOError(message) where another process holds it.

    The system frees the lock when a process ends, however it ends.
    """
    os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
    with contextlib.ExitStack() as stack:
        while True:
            file = stack.enter_context(open(path, "a"))
            try:
                if os.name == "nt":
                    import msvcrt
                    msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
                else:
                    import fcntl
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise BlockingIOError(message) from None
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
                    break               # else its holder has just removed it: it locks nobody out
        try:
            yield
        finally:
            with contextlib.suppress(OSError):      # Windows removes no open file
                os.remove(path)


def write_json(path, obj):
    """Write `obj` as JSON, atomically: sorted keys, NumPy's numbers too, NaN and inf as null."""
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
        return None                             # JSON has no word for NaN or infinity
    return obj


# ---------------------------------------------------------------- scripts

def run_script(main, *errors):
    """Run `main()` and return the exit code of the script: `sys.exit(run_script(main, DataError))`.

    0 or what main returns; 2 with one line `error: ...` on stderr for `errors` and OSError; 130
    when interrupted from the keyboard. Any other exception is a bug and keeps its traceback.
    `errors` may be names of classes, which spares a script's --help the import of their modules.
    """
    try:
        code = main()
        sys.stdout.flush()                      # a closed pipe or a full disk shows here
        return 0 if code is None else code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        kinds = type(error).__mro__
        if OSError not in kinds and not any(one in errors or one.__name__ in errors
                                            for one in kinds):
            raise
        print(f"error: {_one_line(error)}", file=sys.stderr)
        return 2


class ScriptParser(argparse.ArgumentParser):
    """An ArgumentParser for which a wrong option costs one line, like any other error."""

    def __init__(self, **options):
        super().__init__(allow_abbrev=False, **options)

    def error(self, message):
        self.exit(2, f"error: {message} (--help lists the options)\n")


def lazy_module(name):
    """The module `name`, imported when something of it is first used: --help can do without it."""
    class Lazy:         # no importlib LazyLoader: PyTorch looks into all of sys.modules, and
        def __getattr__(self, attribute):       # would import what waits there amid another import
            return getattr(importlib.import_module(name), attribute)

    return Lazy()


def _one_line(error):
    text = str(error)
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        text = f"{os.fsdecode(error.filename)}: {error.strerror}"
    text = "".join(c if c.isprintable() else " " for c in text)     # a terminal obeys some others
    return " ".join(text.split()) or type(error).__name__


def print_table(rows, headers):
    """Print rows (sequences of cells) in aligned columns; columns of numbers are right-aligned.

    Floats get two decimals and integers thousands separators; strings stay as they are, so format a
    number that needs something else yourself. None is an empty cell.
    """
    cells, numeric = _cells(rows, headers)
    widths = [max(map(len, column)) for column in zip(headers, *cells)]

    for line in (headers, ["-" * width for width in widths], *cells):
        aligned = [cell.rjust(width) if right else cell.ljust(width)
                   for cell, width, right in zip(line, widths, numeric)]
        print("  ".join(aligned).rstrip())


def _cells(rows, headers):
    """The cells as text, and which columns hold numbers alone."""
    cells = [[_cell(value) for value in row] for row in rows]
    columns = list(zip(*cells)) if cells else [()] * len(headers)
    return cells, [any(column) and all(_NUMBER.match(cell) for cell in column)
                   for column in columns]


_NUMBER = re.compile(r"(nan|[-+]?inf|([-+\u2212\u2013<>=()\[\]\d.,:;%±×e/ ]|\bto\b)*)$")


def _cell(value):
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        return "" if value is None else str(value)
    return f"{int(value):,}" if isinstance(value, numbers.Integral) else f"{float(value):.2f}"


# ---------------------------------------------------------------- one page of HTML

# Dark on white (contrast 16:1), a table scrolls inside its own box, nothing is fetched or run.
_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<title>{title}</title><style>
:root {{ color-scheme: light }}
body {{ font: 16px/1.5 system-ui, "Segoe UI", Roboto, Helvetica, Arial, sans-serif; color: #1b1f24;
 background: #fff; max-width: 62rem; margin: 0 auto; padding: 1rem; overflow-wrap: anywhere }}
h1 {{ font-size: 1.6rem; line-height: 1.2; margin: .5rem 0 1rem }}
h2 {{ font-size: 1.2rem; margin: 2.2rem 0 .5rem; border-bottom: 1px solid #c8ced6 }}
h3 {{ font-size: 1rem; margin: 1.4rem 0 .3rem }}
p, ul {{ max-width: 46rem }}
.lead {{ font-size: 1.2rem }}
.note {{ background: #b3261e; color: #fff; font-weight: 600; padding: .4rem .8rem;
 border-radius: .3rem; max-width: none }}
.small, figcaption, caption {{ font-size: .85rem; color: #4a525c }}
.table {{ overflow-x: auto; margin: .8rem 0 }}
table {{ border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums;
 overflow-wrap: normal }}
caption {{ text-align: left; padding-bottom: .2rem }}
th, td {{ padding: .25rem .7rem .25rem 0; border-bottom: 1px solid #dfe3e8; text-align: left;
 vertical-align: top }}
th {{ border-bottom: 2px solid #8a939e }}
th:first-child, td:first-child {{ min-width: 8rem }}
.right {{ text-align: right; white-space: nowrap }}
figure {{ margin: 1rem 0 }}
img {{ display: block; max-width: 100%; height: auto }}
@media print {{ body {{ font-size: 10pt; max-width: none; padding: 0 }}
 .table {{ overflow: visible }} table {{ font-size: 7.5pt }} th, td {{ padding-right: .4rem }}
 .right {{ white-space: normal }}
 .note {{ print-color-adjust: exact; -webkit-print-color-adjust: exact }}
 figure, tr {{ break-inside: avoid }} h2, h3 {{ break-after: avoid }} }}
</style></head>
<body>
<h1>{title}</h1>
{body}
</body></html>
"""


def html_page(path, title, body):
    """Write one page that stands alone: style and pictures embedded, no script, opens offline.

    title: plain text. body: HTML, joined from what html_text, html_table and html_figure return.
    """
    with atomic_file(path) as file:
        file.write(_PAGE.format(title=html.escape(title), body=body))


def html_text(text, tag="p", kind=None):
    """An element of plain text (escaped). kind: 'lead' (large), 'small' or 'note' (a red field)."""
    return f"<{tag}{f' class={kind}' if kind else ''}>{html.escape(text)}</{tag}>\n"


def html_table(rows, headers, caption=""):
    """A table in a box that scrolls sideways; cells and alignment as in `print_table`, escaped."""
    cells, numeric = _cells(rows, headers)

    def line(tag, texts):
        attributes = [" class=right" if right else "" for right in numeric]
        scope = " scope=col" if tag == "th" else ""
        return "<tr>" + "".join(f"<{tag}{scope}{attribute}>{html.escape(text)}</{tag}>"
                                for attribute, text in zip(attributes, texts)) + "</tr>\n"

    label = html.escape(caption or ", ".join(headers), quote=True)
    title = f"<caption>{html.escape(caption)}</caption>" if caption else ""
    return (f'<div class=table role=region tabindex=0 aria-label="{label}"><table>{title}\n<thead>'
            + line("th", headers) + "</thead><tbody>" + "".join(line("td", row) for row in cells)
            + "</tbody></table></div>\n")


def html_figure(figure, alt, caption=""):
    """A matplotlib Figure as an embedded picture. alt: what it shows, for who cannot see it."""
    if not alt:
        raise ValueError("a figure needs a text that says what it shows (alt)")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150, bbox_inches="tight", facecolor="white")
    # The size of the PNG stands in its header; known to the browser, the page does not jump.
    width, height = struct.unpack(">II", buffer.getvalue()[16:24])
    text = f"<figcaption>{html.escape(caption)}</figcaption>" if caption else ""
    return (f'<figure><img width={width * 2 // 3} height={height * 2 // 3} '
            f'alt="{html.escape(alt, quote=True)}" src="data:image/png;base64,'
            f'{base64.b64encode(buffer.getvalue()).decode()}">{text}</figure>\n')


# ---------------------------------------------------------------- progress

SECONDS_BETWEEN_LINES = 30


def progress(iterable=None, **options):
    """tqdm where a bar can be drawn (terminal, notebook), plain lines where it cannot (log file).

    Takes tqdm's options. Into a file goes a line at most every 30 s, and one at the end (none with
    `leave=False`).
    """
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    if os.environ.get("NO_COLOR"):              # https://no-color.org
        options.pop("colour", None)
    if sys.stderr.isatty() or "IPKernelApp" in getattr(shell, "config", ()):
        from tqdm.auto import tqdm
        if sys.stderr.isatty() and os.get_terminal_size(sys.stderr.fileno()).columns == 0:
            options = {"ncols": 80, "nrows": 24, **options}     # a container's, of unknown size
    else:
        from tqdm import tqdm
        options.update(file=_LogLines(), ncols=0, position=0)
    return tqdm(iterable, **options)


class _LogLines:
    """The file that tqdm draws on: of bars that it draws over one another, some become lines."""

    def __init__(self):
        self.bar, self.last_line = "", time.monotonic()

    def write(self, text):
        drawn = text.strip()
        self.bar = drawn or self.bar
        due = time.monotonic() - self.last_line >= SECONDS_BETWEEN_LINES
        if text == "\n" or (drawn and due):     # it ends with a line feed, unless leave=False
            self.last_line = time.monotonic()
            print(self.bar, file=sys.stderr, flush=True)

    def flush(self):
        pass


# ---------------------------------------------------------------- what a run was made with

def reset_all_seeds(seed):
    """Seed Python's, NumPy's and torch's (CPU and GPU) global random generators."""
    import torch
    random.seed(seed)
    np.random.seed(seed % 2 ** 32)
    torch.manual_seed(seed)


def versions():
    """Versions of Python and of the packages that shape a result; no host or user name."""
    from importlib import metadata
    found = {"python": platform.python_version(),
             "platform": f"{platform.system()} {platform.machine()}"}
    for name, distribution in (("torch", "torch"), ("numpy", "numpy"), ("h5py", "h5py"),
                               ("sklearn", "scikit-learn"), ("scipy", "scipy")):
        try:
            found[name] = metadata.version(distribution)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found


def git_revision():
    """Short hash of the checkout this file lies in ('-dirty' if it was edited since), or None."""
    try:
        return subprocess.run(
            ["git", "describe", "--always", "--dirty", "--exclude=*"], check=True, timeout=20,
            cwd=os.path.dirname(os.path.abspath(__file__)), text=True,
            stdout=subprocess.PIPE, stderr=subprocess.DEVNULL).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None                             # no git, no checkout or no commit yet


# ---------------------------------------------------------------- figures

NOTE_STYLE = {"color": "white", "fontsize": 9, "fontweight": "bold", "ha": "center", "va": "bottom",
              "bbox": {"boxstyle": "round,pad=0.35", "facecolor": "#b3261e", "edgecolor": "none"}}
TRAIN_COLOUR, TUNE_COLOUR = "#4c72b0", "#dd8452"


def new_figure(width_inches, height_inches):
    """A figure of its own: no pyplot, so no window, no global state, no choice of backend."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    figure = Figure(figsize=(width_inches, height_inches))
    FigureCanvasAgg(figure)
    return figure


def save_figure(figure, path):
    """Write a figure atomically, as the suffix of `path` says (.png at 200 dpi, .pdf, .svg)."""
    suffix = os.path.splitext(os.fspath(path))[1].lstrip(".").lower() or "png"
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format=suffix, dpi=200, bbox_inches="tight", pad_inches=0.08,
                       facecolor="white")


def loss_lr_plot(trajectory, path, title_note=None, loss_label="Loss, MSE (mmHg²)"):
    """Loss of train and tune patients and learning rate by epoch, best epoch marked, to `path`.

    trajectory: what training_loop returns: `epoch_train_loss` [epochs], `epoch_val_loss` [epochs]
    (may be empty) and `lr` (one value per epoch or per batch), arrays or tensors.
    title_note: shown in a red field on top, e.g. 'SIMULATED DATA'.
    """
    from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter
    train, tune, lr = (np.asarray(trajectory[key], float).ravel()
                       for key in ("epoch_train_loss", "epoch_val_loss", "lr"))
    epochs = np.arange(1, len(train) + 1)
    figure = new_figure(5.2, 4.6)
    loss_axes, lr_axes = figure.subplots(
        2, 1, sharex=True, gridspec_kw={"height_ratios": (2.4, 1), "hspace": 0.1})

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
    seen = seen[np.isfinite(seen) & (seen > 0)]
    if seen.size and seen.max() > 5 * seen.min():   # or the first epoch flattens all the others
        loss_axes.set_yscale("log")
        loss_axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        loss_axes.yaxis.set_major_formatter("{x:g}")
        loss_axes.yaxis.set_minor_formatter(NullFormatter())
    loss_axes.set_ylabel(loss_label)
    loss_axes.legend(frameon=False, fontsize=8)

    if len(lr) == len(train):
        lr_axes.plot(epochs, lr, color="0.2", marker=marker, ms=3, drawstyle="steps-mid")
    else:                                       # one value per batch; epoch e ends at x = e
        lr_axes.plot(np.arange(1, len(lr) + 1) * len(train) / max(len(lr), 1), lr, color="0.2")
    if np.any(lr > 0) and lr[lr > 0].max() > 10 * lr[lr > 0].min():
        lr_axes.set_yscale("log")
    lr_axes.set(xlabel="Epoch", ylabel="Learning rate")
    lr_axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    figure.align_ylabels()
    save_figure(_finish(figure, title_note), path)


def histogram_plot(truth, prediction, path, scores, title_note=None, label="TPP"):
    """`histogram_figure` written to `path`, in the format of its suffix."""
    save_figure(histogram_figure(truth, prediction, scores, title_note, label), path)


def histogram_figure(truth, prediction, scores, title_note=None, label="TPP"):
    """2-D histogram of predicted against true values (mmHg), equal axes, scores in a box.

    truth, prediction: [N] mmHg. scores: what metrics.scores returns, with `n_patients` and, if the
    R² of Pcrit belongs beside that of TPP, `p_crit_r2`; what is missing is not shown.
    title_note: shown in a red field on top, e.g. 'SIMULATED DATA'.
    """
    from matplotlib.ticker import LogLocator, NullLocator
    truth, prediction = (np.asarray(values, float).ravel() for values in (truth, prediction))
    # One wild value must not shrink the picture to a dot: the axes hold 99.8 % of the values and
    # a quarter of their range on either side; what lies beyond is counted in the box.
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

    figure = new_figure(5.0, 4.4)
    axes = figure.subplots()
    image = _density(axes, counts, bins, bins)
    axes.plot([low, high], [low, high], color="black", lw=1, ls="--", label="identity")
    axes.set(xlim=(low, high), ylim=(low, high), aspect="equal",
             xlabel=f"Label {label} (mmHg)", ylabel=f"Predicted {label} (mmHg)")
    axes.tick_params(labelsize=8)
    axes.legend(loc="lower right", frameon=False, fontsize=8)
    colour_bar = figure.colorbar(image, ax=axes, shrink=0.9, pad=0.03, format="{x:,.0f}",
                                 ticks=LogLocator(subs=(1, 2, 5) if counts.max() < 500 else (1,)))
    colour_bar.ax.yaxis.set_minor_locator(NullLocator())
    colour_bar.set_label(f"Segments per {bin_mmhg} × {bin_mmhg} mmHg", fontsize=8)
    colour_bar.ax.tick_params(labelsize=8)

    def known(*texts_and_keys):
        return "    ".join(text.format(**scores) for text, key in texts_and_keys if key in scores)

    lines = [
        known(("RMSE {rmse:.2f}", "rmse"), ("MAE {mae:.2f}", "mae"), ("MeAD {mead:.2f}", "mead"),
              ("bias {bias:+.2f} ± {sd:.2f} mmHg", "sd")),
        known(("R² {r2:.3f}", "r2"), ("R² of Pcrit {p_crit_r2:.3f}", "p_crit_r2")),
        known(("{n_patients:,} patients    ", "n_patients")) + f"{len(truth):,} segments"
        + (f" ({outside:,} beyond the axes)" if outside else "")]
    axes.annotate("\n".join(filter(None, lines)), (0.5, 1), xytext=(0, 9), ha="center", va="bottom",
                  textcoords="offset points", xycoords="axes fraction", fontsize=7.5,
                  linespacing=1.4, bbox={"boxstyle": "round,pad=0.4", "facecolor": "white",
                                         "edgecolor": "0.6"})
    _note_on(axes, title_note, points_above=56)
    return figure


def _note_on(axes, text, points_above=9, x=0.5):
    """The red field on top of a figure, if there is a text for it."""
    if text:
        axes.annotate(text, (x, 1), xytext=(0, points_above), xycoords="axes fraction",
                      textcoords="offset points", **NOTE_STYLE)


def _finish(figure, note, points_above=9, x=0.5):
    """The figure with quiet axes and, on top of the first ones, the note."""
    for axes in figure.axes:
        axes.grid(color="0.9", lw=0.6)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=8)
    _note_on(figure.axes[0], note, points_above, x)
    return figure


def _cloud(axes, x, y, few=3000):
    """Points; of more than `few` their density."""
    if len(x) <= few:
        axes.plot(x, y, ".", color=TRAIN_COLOUR, ms=4, alpha=0.5, mew=0, rasterized=True)
        return
    _density(axes, *np.histogram2d(x, y, bins=120, range=[
        np.percentile(v, [0.05, 99.95]) + [-1e-3, 1e-3] for v in (x, y)]))


def _density(axes, counts, x_edges, y_edges):
    """Counts [x, y] as colours, on a logarithmic scale; where there is nothing, the background."""
    from matplotlib.colors import LogNorm
    return axes.pcolormesh(x_edges, y_edges, np.ma.masked_equal(counts.T, 0), cmap="viridis",
                           norm=LogNorm(vmin=1, vmax=max(counts.max(), 2)), rasterized=True)


def intervals_figure(rows, label, title_note=None, line=None, highlight=None):
    """A dot with its interval for each row. rows: [(name, value, low, high)], the first on top.

    label: of the axis, with its unit. line: a value to mark; highlight: the number of a row.
    """
    figure = new_figure(6.4, 0.8 + 0.24 * len(rows))
    axes = figure.subplots()
    for place, (_, value, low, high) in enumerate(rows):
        axes.plot([low, high], [place, place], color=TRAIN_COLOUR, lw=2)
        axes.plot(value, place, "o", ms=6,
                  color=TUNE_COLOUR if place == highlight else TRAIN_COLOUR)
    if line is not None:
        axes.axvline(line, color="0.4", lw=0.9, ls="--", zorder=0)
    axes.set_yticks(range(len(rows)), [row[0] for row in rows])
    axes.set_xlabel(label)
    axes.invert_yaxis()
    return _finish(figure, title_note)


def bland_altman_figure(truth, prediction, agreement, title_note=None):
    """Error against the mean of both, with bias and limits. agreement: metrics.bland_altman's."""
    figure = new_figure(6.4, 3.6)
    axes = figure.subplots()
    error = prediction - truth
    _cloud(axes, (truth + prediction) / 2, error)
    for name, style in (("upper", "--"), ("bias", "-"), ("lower", "--")):
        one = agreement[name]
        if np.isfinite(one["low"]):
            axes.axhspan(one["low"], one["high"], color=TUNE_COLOUR, alpha=0.25, lw=0)
        axes.axhline(one["value"], color="black", lw=1, ls=style)
        axes.annotate(f"{name} {one['value']:+.1f}", (1, one["value"]), xytext=(-2, 2), ha="right",
                      xycoords=("axes fraction", "data"), textcoords="offset points", fontsize=8)
    limits = [abs(agreement[name]["value"]) for name in ("upper", "lower")]
    reach = max(np.percentile(np.abs(error), 99.9), 5, *limits) * 1.15
    axes.set(ylim=(-reach, reach), xlabel="Mean of label and predicted TPP (mmHg)",
             ylabel="Predicted - label (mmHg)")
    return _finish(figure, title_note)


def detection_figure(event, score, found, reliability=None, title_note=None):
    """ROC curve of score [N] for event [N] (bool), and observed against predicted probability.

    found: metrics.detection's; reliability: metrics.reliability's, or None to leave it out.
    """
    figure = new_figure(7.2 if reliability else 3.8, 3.6)
    axes = np.atleast_1d(figure.subplots(1, 2 if reliability else 1, gridspec_kw={"wspace": 0.3}))
    order = np.argsort(-score, kind="stable")
    last = np.append(np.diff(score[order]) != 0, True)          # ties are one step of the curve
    hits, others = np.cumsum(event[order])[last], np.cumsum(~event[order])[last]
    if hits[-1] and others[-1]:
        pick = np.unique(np.linspace(0, len(hits) - 1, 2000).astype(int))
        axes[0].plot(np.append(0, others[pick] / others[-1]), np.append(0, hits[pick] / hits[-1]),
                     color=TRAIN_COLOUR)
        axes[0].plot(1 - found["specificity"]["value"], found["sensitivity"]["value"], "o", ms=7,
                     color=TUNE_COLOUR)
    auc = found["auc"]
    axes[0].set_title(f"ROC area {auc['value']:.2f} ({auc['low']:.2f} to {auc['high']:.2f})",
                      fontsize=9)
    axes[0].set(xlabel="False alarms (1 - specificity)",
                ylabel=f"TPP < {found['threshold']:g} found (sensitivity)")
    if reliability:
        for one in reliability["bins"]:
            axes[1].plot([one["predicted"]] * 2, [one["low"], one["high"]], color=TRAIN_COLOUR)
            axes[1].plot(one["predicted"], one["value"], "o", ms=5, color=TRAIN_COLOUR)
        axes[1].set(xlabel=f"Predicted probability of TPP < {found['threshold']:g}",
                    ylabel="Observed share")
    for one in axes:
        one.plot([0, 1], [0, 1], color="0.5", lw=0.9, ls="--", zorder=0)
        one.set_aspect("equal")
    return _finish(figure, title_note, points_above=24, x=1.15 if reliability else 0.5)


def trend_figure(true_change, change, zone, title_note=None):
    """Four-quadrant plot of changes (mmHg); the exclusion zone is the grey square."""
    from matplotlib.patches import Rectangle
    figure = new_figure(4.2, 4.0)
    axes = figure.subplots()
    if len(true_change):
        _cloud(axes, true_change, change)
        reach = 1.1 * max(np.percentile(np.abs(np.concatenate([true_change, change])), 99.8),
                          2 * zone)
        axes.set(xlim=(-reach, reach), ylim=(-reach, reach))
    axes.add_patch(Rectangle((-zone, -zone), 2 * zone, 2 * zone, color="0.75", alpha=0.6))
    axes.axhline(0, color="black", lw=0.8)
    axes.axvline(0, color="black", lw=0.8)
    axes.set(aspect="equal", xlabel="Change of true TPP (mmHg)",
             ylabel="Change of predicted TPP (mmHg)")
    return _finish(figure, title_note)


def waveforms_figure(waveforms, titles, fs, seconds=15, title_note=None):
    """The first seconds of waveforms [rows, samples] below one another, each with its title."""
    figure = new_figure(7.2, 0.95 * len(waveforms) + 0.5)
    all_axes = np.atleast_1d(figure.subplots(len(waveforms), 1, sharex=True,
                                             gridspec_kw={"hspace": 0.75}))
    samples = int(seconds * fs)
    for axes, wave, title in zip(all_axes, waveforms, titles):
        axes.plot(np.arange(samples) / fs, wave[:samples], color=TRAIN_COLOUR, lw=0.9)
        axes.set_title(title, fontsize=8, loc="left", pad=2)
        axes.set_yticks([])
    all_axes[-1].set_xlabel("Time (s)")
    return _finish(figure, title_note, points_above=16)
