"""Pictures of results, drawn from what stands in their JSON files."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.studies.digits import LOOK_EVERY
from benchmarks.studies.harness import Results

# Okabe and Ito's palette, readable with every common kind of colour blindness.
COLOURS = ("#000000", "#E69F00", "#56B4E9", "#009E73", "#D55E00", "#0072B2", "#CC79A7")


def trade_off(results: Results) -> Figure:
    """Both losses over the training set at the end: a line through all learning rates, a large dot for the chosen one."""
    shown = ("sum", "gains", "fixed", "dot", "matched", "delta-0.075")
    figure, panels = grid(len(results["experiments"]), 3)
    for axes, experiment in zip(panels, results["experiments"].values(), strict=True):
        for colour, key in zip(COLOURS, shown, strict=False):
            row = experiment["rows"].get(key)
            if row is None:
                continue
            points = sorted((at["lr"], at["task"], at["logits"]) for at in row["grid"])
            if key != "fixed":
                axes.plot(
                    [task for _, task, _ in points], [logits for *_, logits in points], ".-", color=colour, lw=0.9
                )
            (x, dx), (y, dy) = row["mean"]["task"], row["mean"]["logits"]
            label = row["label"].replace("AdamW", "SGD")
            axes.errorbar(x, y, dy, dx, fmt="o", color=colour, markersize=7, label=label)
        plain(axes, experiment["title"], "task loss", "distillation loss")
        axes.loglog()
    legend(figure, panels)
    return figure


def conflict(results: Results) -> Figure:
    """Conflict, dominance and weights over training; what wrong labels and the ablation come to."""
    figure, panels = grid(6, 3)
    found = results["experiments"]
    noisy = found["noise30"]
    rows = {key: noisy["rows"][key] for key in ("sum", "mokd", "norm", "none")}
    for axes, curve, what in zip(
        panels,
        ("cosine", "log_ratio", "weight"),
        ("cosine of the two gradients", "log₁₀ of distillation's norm over the task's", "weight of distillation"),
        strict=False,
    ):
        for colour, row in zip(COLOURS, rows.values(), strict=False):
            values = row["curves"].get(curve, [])
            steps = range(LOOK_EVERY, LOOK_EVERY * (len(values) + 1), LOOK_EVERY)
            axes.plot(steps, values, color=colour, label=row["label"])
        plain(axes, noisy["title"], "step", what)
        axes.axhline(1 if curve == "weight" else 0, color="0.7", lw=0.8, zorder=0)
    sweep = {key: found[key] for key in ("noise0", "noise10", "noise30", "noise50")}
    levels = [100 * experiment["problem"]["noise"] for experiment in sweep.values()]
    for colour, key in zip(COLOURS[1:], ("mokd", "mokd_stopped", "fixed", "sum_stopped"), strict=False):
        differences = [experiment["rows"][key]["difference"]["sum"]["test"] for experiment in sweep.values()]
        means, errors = ([100 * value for value in values] for values in zip(*differences, strict=True))
        panels[3].errorbar(levels, means, errors, fmt="o-", color=colour, label=noisy["rows"][key]["label"], capsize=3)
    panels[3].axhline(0, color="0.7", lw=0.8, zorder=0)
    plain(panels[3], "Test accuracy, against SGD on the sum", "wrong labels %", "difference in points")
    for axes, key in zip(panels[4:], ("features_few", "features_noisy"), strict=True):
        dots(axes, found[key])
    legend(figure, [panels[0], panels[3]])
    return figure


def accuracies(results: Results) -> Figure:
    """Test accuracies."""
    figure, panels = grid(len(results["experiments"]), 2)
    for axes, experiment in zip(panels, results["experiments"].values(), strict=True):
        dots(axes, experiment)
    return figure


def dots(axes: Axes, experiment: Results) -> None:
    """A line per row with its mean test accuracy and standard error."""
    rows = list(experiment["rows"].values())
    for place, row in enumerate(rows):
        mean, error = (100 * value for value in row["mean"]["test"])
        axes.errorbar(mean, place, xerr=error, fmt="o", color=COLOURS[0], capsize=3)
    axes.set_yticks(range(len(rows)), [row["label"] for row in rows])
    axes.invert_yaxis()
    plain(axes, experiment["title"], "test accuracy %", "")


def grid(count: int, columns: int) -> tuple[Figure, list[Axes]]:
    """A figure with so many panels."""
    lines = -(-count // columns)
    figure = Figure(figsize=(4.5 * columns, 3.9 * lines), layout="constrained")
    panels = list(figure.subplots(lines, columns, squeeze=False).ravel())
    for axes in panels[count:]:
        axes.set_axis_off()
    return figure, panels[:count]


def plain(axes: Axes, title: str, x: str, y: str) -> None:
    axes.set_title(title, fontsize=10)
    axes.set(xlabel=x, ylabel=y)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)


def legend(figure: Figure, panels: Iterable[Axes]) -> None:
    """One for all panels, each label once."""
    found: Mapping[str, Any] = {
        label: handle for axes in panels for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend(found.values(), found.keys(), loc="outside lower center", ncols=4, frameon=False)
