"""What the demo found: a table to read, numbers to reuse, a picture to look at."""

from __future__ import annotations

import io
import json
import math
import os
import platform
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from statistics import fmean, median, stdev
from typing import Any

import matplotlib
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter
from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from .data import STUDENT, TEACHER, TEST, VALIDATION
from .train import Row, Study

# Okabe and Ito's palette, readable with every common kind of colour blindness.
COLOURS = {
    "none": "#999999",
    "sum": "#000000",
    "fixed": "#E69F00",
    "dot": "#56B4E9",
    "dot-matched": "#0072B2",
    "mokd": "#D55E00",
    "pcgrad": "#009E73",
}
# Beyond those: the methods that only show on request.
MORE = [matplotlib.colormaps["tab20"](i) for i in range(20)]
BASELINES = {"sum": "summed SGD", "fixed": "best fixed weight"}
BLANK, TIMES = "\N{EN DASH}", "\N{MULTIPLICATION SIGN}"
MINUS = str.maketrans("-", "\N{MINUS SIGN}")


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Mean and its standard error, which one value alone does not have (NaN)."""
    error = stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return fmean(values), error


def differences(study: Study) -> dict[str, dict[str, tuple[float, float]]]:
    """Per row and baseline, mean and standard error of the difference in test accuracy, paired by seed."""
    return {
        key: {
            base: mean_and_error([a.test_accuracy - b.test_accuracy for a, b in zip(row.runs, other.runs, strict=True)])
            for base in BASELINES
            if base != key and (other := study.rows.get(base))
        }
        for key, row in study.rows.items()
    }


def relative_time(row: Row, study: Study) -> float | None:
    """Time of a step in units of summed SGD's: the median over seeds, each compared within the seed."""
    if "sum" not in study.rows:
        return None
    pairs = zip(row.runs, study.rows["sum"].runs, strict=True)
    return median(run.step_seconds / base.step_seconds for run, base in pairs)


def mean_curve(row: Row, name: str) -> list[Any]:
    """A curve of ``Run``, one entry per epoch, averaged over the seeds."""
    curves = torch.tensor([getattr(run, name) for run in row.runs], dtype=torch.float64)
    return curves.mean(0).tolist()


def conditions(study: Study) -> str:
    """The experiment in a few sentences, so that the table stands on its own."""
    settings = study.settings
    rates = ", ".join(f"{rate:g}" for rate in settings.learning_rates)
    weights = ", ".join(f"{weight:g}" for weight in settings.distill_weights)
    lines = [
        f"Student: {STUDENT} training labels, {settings.label_noise:.0%} of them wrong. "
        f"Teacher: {TEACHER} other labels, all right; {study.teacher_accuracy:.1%} of the test split.",
        f"Standard errors over {settings.seeds} seeds (wrong labels, initial weights, batches) on one split.",
        f"Learning rate of every row chosen on the validation split ({VALIDATION} clean labels, "
        f"other seeds: {settings.tuning_seeds}) from {{{rates}}}.",
    ]
    if "fixed" in study.rows:
        lines.append(f"Fixed weight w, of the loss (2 - w) task + w distill, chosen with it from {{{weights}}}.")
    if any(row.choice.at_border for row in study.rows.values()):
        lines.append("* at the border of the grid of learning rates.")
    return "\n".join(lines)


def reading(study: Study) -> str:
    """Who is ahead of each baseline and who behind, by the rule of two standard errors."""
    lines = []
    paired = differences(study)
    for base, name in BASELINES.items():
        compared = {study.rows[key].label: row[base] for key, row in paired.items() if base in row}
        # With one seed the error is NaN, and nobody is ahead.
        ahead = [label for label, (mean, error) in compared.items() if mean > 2 * error]
        behind = [label for label, (mean, error) in compared.items() if mean < -2 * error]
        if compared:
            lines.append(
                f"More than two standard errors ahead of {name}: {' / '.join(ahead) or 'none'}; "
                f"behind it: {' / '.join(behind) or 'none'}."
            )
    return "\n".join(lines)


def number(value: float, spec: str) -> str:
    return BLANK if math.isnan(value) else f"{value:{spec}}".translate(MINUS)


def plain_table(title: str) -> Table:
    """One column of labels, and room for all the others in 80 characters."""
    table = Table(title=title, title_style="bold", box=box.SIMPLE_HEAD, collapse_padding=True, pad_edge=False)
    table.add_column("optimizer", no_wrap=True)
    return table


def accuracy_table(study: Study) -> Table:
    table = plain_table("Digits: a small student after distillation")
    headers = ("test acc.\n%", "task\nloss", "distill\nloss", "in con-\nflict", "lr", "w", "time/\nstep")
    for header in headers:
        table.add_column(header, justify="right", no_wrap=True)
    for key, row in study.rows.items():
        mean, error = mean_and_error([100 * run.test_accuracy for run in row.runs])
        conflict = mean_curve(row, "conflict")
        time = relative_time(row, study)
        table.add_row(
            row.label,
            f"{mean:.1f} ± {number(error, '.1f')}",
            f"{mean_curve(row, 'task_loss')[-1]:.2f}",
            f"{mean_curve(row, 'distill_loss')[-1]:.2f}",
            f"{fmean(conflict):.0%}" if conflict else BLANK,
            f"{row.choice.learning_rate:g}" + "*" * row.choice.at_border,
            f"{row.choice.distill_weight:g}" if key == "fixed" else BLANK,
            BLANK if time is None else f"{time:.2f}{TIMES}",
        )
    return table


def difference_table(study: Study) -> Table:
    paired = differences(study)
    table = plain_table("Difference in test accuracy, in points, paired by seed")
    bases = [base for base in BASELINES if base in study.rows]
    for base in bases:
        table.add_column(f"against {BASELINES[base]}", justify="right")
    for key, row in paired.items():
        points = [[100 * value for value in row[base]] if base in row else None for base in bases]
        cells = [f"{number(p[0], '+.1f')} ± {number(p[1], '.1f')}" if p else BLANK for p in points]
        table.add_row(study.rows[key].label, *cells)
    return table


def report(study: Study) -> Group:
    """Everything for the terminal: results, how they came about, and what they allow to say."""
    parts: list[Table | Text] = [accuracy_table(study), Text(conditions(study))]
    if any(differences(study).values()):
        parts += [Text(), difference_table(study), Text(reading(study))]
    return Group(*parts)


def picture(study: Study) -> Figure:
    """Accuracy, both losses, conflict and weights, one colour per optimizer."""
    figure = Figure(figsize=(12, 7), dpi=150, layout="constrained")
    (accuracies, task, distill), (cosine, conflict, weights) = figure.subplots(2, 3)
    for position, (key, row) in enumerate(study.rows.items()):
        mean, error = mean_and_error([run.test_accuracy for run in row.runs])
        line = {"color": colour(key, study), "label": row.label}
        bar = 0 if math.isnan(error) else error
        accuracies.errorbar(mean, position, xerr=bar, fmt="o", capsize=3, **line)
        for axes, name in (
            (task, "task_loss"),
            (distill, "distill_loss"),
            (cosine, "cosine"),
            (conflict, "conflict"),
        ):
            curve = mean_curve(row, name)
            axes.plot(range(1, len(curve) + 1), curve, linewidth=1.6, **line)
        draw_weights(weights, key, row, colour(key, study))

    title(accuracies, "Test accuracy", "", "mean ± standard error over the seeds")
    accuracies.set_yticks(range(len(study.rows)), [row.label for row in study.rows.values()])
    accuracies.invert_yaxis()
    accuracies.axvline(study.teacher_accuracy, color="0.5", linewidth=1, linestyle="--", zorder=0)
    accuracies.annotate(
        "teacher",
        (study.teacher_accuracy, 1),
        xycoords=("data", "axes fraction"),
        xytext=(-3, -3),
        textcoords="offset points",
        ha="right",
        va="top",
        color="0.4",
        fontsize=9,
    )
    accuracies.xaxis.set_major_formatter(PercentFormatter(1, decimals=1))
    noise = f", {study.settings.label_noise:.0%} wrong" if study.settings.label_noise else ""
    title(task, f"Task loss (training labels{noise})", "cross-entropy [nats]")
    title(distill, "Distillation loss (training inputs)", "T² KL divergence [nats]")
    distill.set_yscale("log")
    title(cosine, "Cosine of the two gradients", "mean over the steps of an epoch")
    cosine.axhline(0, color="0.7", linewidth=0.8, zorder=0)
    title(conflict, "Steps in conflict (cosine < 0)", "share of the steps of an epoch")
    conflict.yaxis.set_major_formatter(PercentFormatter(1))
    conflict.set_ylim(-0.03, 1.03)
    title(weights, "Weights: distillation solid, task dotted", "weight of the raw gradient")
    weights.set_ylim(-0.06, 2.06)
    handles, labels = task.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(len(labels), 8), frameon=False)
    return figure


def colour(key: str, study: Study) -> Any:
    others = [other for other in study.rows if other not in COLOURS]
    return COLOURS.get(key) or MORE[others.index(key) % len(MORE)]


def draw_weights(axes: Axes, key: str, row: Row, color: Any) -> None:
    """Where an optimizer chooses weights, those; where the validation split did, that constant."""
    epochs = len(row.runs[0].task_loss)
    if key == "fixed":
        weight = row.choice.distill_weight
        curve = [[2 - weight, weight]] * epochs
    elif row.runs[0].weights and not key.startswith("dot"):  # whose weights are all 1
        curve = mean_curve(row, "weights")
    else:
        return
    for values, style in zip(zip(*curve, strict=True), (":", "-"), strict=True):
        axes.plot(range(1, epochs + 1), values, style, color=color, linewidth=1.6)


def title(axes: Axes, text: str, ylabel: str, xlabel: str = "epoch") -> None:
    axes.set_title(text, fontsize=11)
    axes.set_xlabel(xlabel)
    if xlabel == "epoch":
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_ylabel(ylabel)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)


def numbers(study: Study) -> dict[str, Any]:
    """Everything measured, ready for JSON. Curves have one entry per epoch and are means over the seeds."""
    rows = {}
    for key, row in study.rows.items():
        mean, error = mean_and_error([run.test_accuracy for run in row.runs])
        conflict = mean_curve(row, "conflict")
        rows[key] = {
            "label": row.label,
            "chosen_on_validation": asdict(row.choice),
            "test_accuracy": {
                "mean": mean,
                "standard_error": error,
                "per_seed": [run.test_accuracy for run in row.runs],
            },
            "difference_to": {
                base: dict(zip(("mean", "standard_error"), difference, strict=True))
                for base, difference in differences(study)[key].items()
            },
            "share_of_steps_in_conflict": fmean(conflict) if conflict else None,
            "step_seconds": median(run.step_seconds for run in row.runs),
            "step_time_relative_to_summed": relative_time(row, study),
            "curves": {
                name: mean_curve(row, name) for name in ("task_loss", "distill_loss", "cosine", "conflict", "weights")
            },
        }
    return {
        "settings": asdict(study.settings),
        "split_sizes": {"student": STUDENT, "teacher": TEACHER, "validation": VALIDATION, "test": TEST},
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "scikit-learn": version("scikit-learn"),
        },
        "teacher_test_accuracy": study.teacher_accuracy,
        "rows": rows,
    }


def finite(value: Any) -> Any:
    """JSON knows neither NaN nor infinity: null stands for both."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write(study: Study, folder: Path) -> list[Path]:
    """Write ``results.json`` and ``curves.png`` into ``folder``; each is there whole or not at all."""
    png = io.BytesIO()
    picture(study).savefig(png, format="png")
    contents = {
        "results.json": json.dumps(finite(numbers(study)), indent=1, allow_nan=False).encode(),
        "curves.png": png.getvalue(),
    }
    folder.mkdir(parents=True, exist_ok=True)
    temporary = {folder / f".{name}.{os.getpid()}": folder / name for name in contents}
    try:
        for path, content in zip(temporary, contents.values(), strict=True):
            path.write_bytes(content)
        for path, final in temporary.items():
            os.replace(path, final)
    finally:
        for path in temporary:
            path.unlink(missing_ok=True)
    return list(temporary.values())
