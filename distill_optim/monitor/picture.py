"""A picture of what was recorded."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distill_optim.monitor.history import DOMINANT, History

# Okabe and Ito's palette, readable with every common kind of colour blindness; dashes tell the rest apart.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999")
_DASHES = ("-", "--", "-.", ":")


def plot(history: History, path: str | Path) -> None:
    """Draws losses, cosines, lengths and steps relative to the first loss's, and weights over time.

    Faint lines are the records, strong ones their running mean over a twentieth of them (geometric where the axis is
    logarithmic). Of many pairs of losses the eight with the lowest mean cosines are drawn.

    Args:
        history: what was recorded.
        path: where to; the ending says the format, as matplotlib knows them.

    Raises:
        ImportError: without matplotlib.
        ValueError: if nothing was recorded.
    """
    if not history.steps:
        raise ValueError("plot: nothing was recorded yet")
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, StrMethodFormatter
    except ImportError as error:
        raise ImportError('plot: it needs matplotlib; pip install "distill_optim[plot]"') from error
    names = history.names
    norms, cosines = history.norms[:, 0], history.cosines[:, 0]
    worst = sorted(history.pairs, key=lambda pair: cosines[:, pair[0], pair[1]].nanmean().nan_to_num(2).item())
    panels: list[tuple[str, str, Mapping[str, Tensor]]] = [
        ("Losses", "log", {name: history.losses[:, i] for i, name in enumerate(names)}),
        ("Cosines of the gradients", "linear", {f"{names[i]}, {names[j]}": cosines[:, i, j] for i, j in worst[:8]}),
        (
            f"Gradient's length, relative to {names[0]}'s",
            "log",
            {names[i]: norms[:, i] / norms[:, 0] for i in range(1, len(names))},
        ),
        (
            f"Step along each loss, relative to {names[0]}'s",
            "log",
            {names[i]: history.updates[:, 0, i] / history.updates[:, 0, 0] for i in range(1, len(names))},
        ),
        ("Weights of the gradients", "linear", {name: history.weights[:, i] for i, name in enumerate(names)}),
    ]
    # Small in inches: at the width of a phone ten points are still eight pixels.
    figure = Figure(figsize=(6, 9), layout="constrained", dpi=160)
    axes: Any = figure.subplots(len(panels), 1, sharex=True)
    for ax, (title, scale, curves) in zip(axes, panels, strict=True):
        drawn = {name: values for name, values in curves.items() if values.isfinite().any()}
        numbers = [x for values in drawn.values() for x in values.tolist() if math.isfinite(x)]
        # Over less than a factor of four a logarithmic axis has one label or two.
        logarithmic = scale == "log" and bool(numbers) and min(numbers) > 0 and max(numbers) > 4 * min(numbers)
        if logarithmic:
            wide = max(numbers) > 1e3 * min(numbers)
            ax.set_yscale("log")
            ax.yaxis.set_major_locator(LogLocator(subs=(1,) if wide else (1, 2, 5)))
            ax.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
            ax.yaxis.set_minor_formatter(NullFormatter())
        for n, (name, values) in enumerate(drawn.items()):
            # A loss has one colour throughout; pairs of losses have their own order.
            n = names.index(name) if name in names else n
            colour, dashes = _COLOURS[n % len(_COLOURS)], _DASHES[n // len(_COLOURS) % len(_DASHES)]
            ax.plot(history.steps, values, color=colour, alpha=0.25, linewidth=0.8)
            ax.plot(history.steps, _running(values, logarithmic), dashes, color=colour, linewidth=1.8, label=name)
        ax.set_title(title, fontsize=11, loc="left")
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(alpha=0.25)
        if drawn:
            ax.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False, fontsize=10, handlelength=1.2)
        else:
            ax.text(0.5, 0.5, "not known", transform=ax.transAxes, ha="center", va="center", color="0.4")
    axes[1].set_ylim(-1.05, 1.05)
    axes[1].axhspan(-1.05, 0, color="0.5", alpha=0.12, linewidth=0)
    axes[1].text(0.005, 0.03, "conflict", transform=axes[1].transAxes, color="0.35", fontsize=10)
    # Where dominance begins.
    for line in DOMINANT, 1 / DOMINANT:
        axes[2].axhline(line, color="0.5", linewidth=0.8, linestyle=":")
    axes[-1].set_xlabel("step")
    axes[-1].xaxis.set_major_locator(MaxNLocator(integer=True))
    # Twice, here and in savefig: the first layout changes the ticks, and the second makes room for their labels.
    figure.draw_without_rendering()
    figure.savefig(path)


def _running(values: Tensor, logarithmic: bool) -> Tensor:
    """Mean over a window of a twentieth of the records around each, of those that are finite."""
    numbers = values.log() if logarithmic else values
    half = len(numbers) // 40
    padded = torch.nn.functional.pad(numbers, (half, half), value=torch.nan)
    windows = padded.unfold(0, 2 * half + 1, 1)
    mean = torch.where(windows.isfinite(), windows, torch.nan).nanmean(1)
    return mean.exp() if logarithmic else mean
