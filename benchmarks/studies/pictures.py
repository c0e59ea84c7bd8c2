"""Pictures of results, drawn from what stands in their JSON files."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure, FigureBase

from benchmarks.studies.digits import LOOK_EVERY
from benchmarks.studies.harness import Results

# Okabe and Ito's palette, readable with every common kind of colour blindness.
COLOURS = ("#000000", "#E69F00", "#56B4E9", "#009E73", "#D55E00", "#0072B2", "#CC79A7")


def trade_off(results: Results) -> Figure:
    """Both losses over the training set at the end: a line through all learning rates, a dot for the chosen one."""
    shown = ("sum", "gains", "fixed", "dot", "matched", "delta-0.075")
    found = list(results["experiments"].values())
    figure = Figure(figsize=(13, 8), layout="constrained")
    panels = list(figure.subplots(2, 3).ravel())
    for axes, experiment in zip(panels, found, strict=False):
        for colour, key in zip(COLOURS, shown, strict=False):
            row = experiment["rows"].get(key)
            if row is None:
                continue
            if key != "fixed":
                line = [[at[loss] for at in row["grid"]] for loss in ("task", "logits")]
                axes.plot(*line, ".-", color=colour, linewidth=0.9)
            (x, dx), (y, dy) = row["mean"]["task"], row["mean"]["logits"]
            axes.errorbar(x, y, dy, dx, fmt="o", color=colour, markersize=7, label=row["label"])
        plain(axes, experiment["title"], "task loss", "distillation loss")
        axes.set_yscale("log")
    for axes in panels[len(found) :]:
        axes.set_axis_off()
    legend(figure, panels[:1])
    return figure


def conflict(results: Results) -> Figure:
    """Conflict, dominance and weights over training; what wrong labels and the ablation come to."""
    found = results["experiments"]
    figure = Figure(figsize=(13, 9), layout="constrained")
    halves = figure.add_gridspec(2)
    upper, lower = (figure.add_subfigure(halves[n]) for n in range(2))

    noisy = found["noise30"]
    rows = [noisy["rows"][key] for key in ("sum", "mokd", "norm", "none")]
    curves = {
        "cosine": ("cosine of the two gradients", 0),
        "log_ratio": ("log₁₀ (distillation's norm / task's norm)", 0),
        "weight": ("weight of distillation", 1),
    }
    panels = upper.subplots(1, 3)
    for axes, (curve, (what, level)) in zip(panels, curves.items(), strict=True):
        for colour, row in zip(COLOURS, rows, strict=False):
            values = row["curves"].get(curve, [])
            steps = range(LOOK_EVERY, LOOK_EVERY * (len(values) + 1), LOOK_EVERY)
            axes.plot(steps, values, color=colour, label=row["label"])
        axes.axhline(level, color="0.7", linewidth=0.8, zorder=0)
        plain(axes, noisy["title"], "step", what)
    legend(upper, panels[:1])

    sweep, *features = lower.subplots(1, 3, width_ratios=(1.2, 1, 1))
    noises = [found[key] for key in ("noise0", "noise10", "noise30", "noise50")]
    for colour, key in zip(COLOURS[1:], ("mokd", "mokd_stopped", "fixed", "sum_stopped"), strict=False):
        pairs = [experiment["rows"][key]["difference"]["sum"]["test"] for experiment in noises]
        means, errors = ([100 * value for value in values] for values in zip(*pairs, strict=True))
        levels = [100 * experiment["problem"]["noise"] for experiment in noises]
        sweep.errorbar(levels, means, errors, fmt="o-", color=colour, label=noisy["rows"][key]["label"], capsize=3)
    sweep.axhline(0, color="0.7", linewidth=0.8, zorder=0)
    sweep.legend(fontsize=8, frameon=False, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.15))  # off the bars
    plain(sweep, "Test accuracy, less that of SGD on the sum", "wrong labels %", "points")
    dots(features, [found["features_few"], found["features_noisy"]])
    return figure


def accuracies(results: Results) -> Figure:
    """Test accuracies of all rows."""
    found = list(results["experiments"].values())
    figure = Figure(figsize=(10, 4.5), layout="constrained")
    dots(figure.subplots(1, len(found)), found)
    return figure


def dots(panels: Sequence[Axes], experiments: Sequence[Results]) -> None:
    """Experiments with the same rows beside each other: mean test accuracy and standard error."""
    for axes, experiment in zip(panels, experiments, strict=True):
        rows = list(experiment["rows"].values())
        means, errors = zip(*(row["mean"]["test"] for row in rows), strict=True)
        percents, bars = ([100 * value for value in values] for values in (means, errors))
        axes.errorbar(percents, range(len(rows)), xerr=bars, fmt="ko")
        axes.set_yticks(range(len(rows)), [row["label"] for row in rows] if axes is panels[0] else [""] * len(rows))
        axes.invert_yaxis()
        plain(axes, experiment["title"].replace(", ", "\n", 1), "test accuracy %", "")


def plain(axes: Axes, title: str, x: str, y: str) -> None:
    axes.set_title(title, fontsize=10)
    axes.set(xlabel=x, ylabel=y)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)


def legend(figure: FigureBase, panels: Iterable[Axes]) -> None:
    handles, labels = next(iter(panels)).get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False, fontsize=9)
