"""Pictures of results, drawn from what stands in their JSON files."""

from __future__ import annotations

from matplotlib.figure import Figure

from benchmarks.studies.harness import Results

# Okabe and Ito's palette, readable with every common kind of colour blindness.
COLOURS = ("#000000", "#E69F00", "#56B4E9", "#009E73", "#D55E00", "#0072B2", "#CC79A7")


def trade_off(results: Results) -> Figure:
    """Task loss against distillation loss over the training set: all learning rates as a line, the chosen as a dot."""
    found = results["experiments"]
    figure = Figure(figsize=(4 * len(found), 4.6), layout="constrained")
    for axes, experiment in zip(figure.subplots(1, len(found), squeeze=False)[0], found.values(), strict=True):
        for colour, row in zip(COLOURS, experiment["rows"].values(), strict=False):
            (x, dx), (y, dy) = row["mean"]["task"], row["mean"]["logits"]
            axes.errorbar(x, y, dy, dx, fmt="o", color=colour, label=row["label"])
        axes.set(title=experiment["title"], xlabel="task loss", ylabel="distillation loss")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    return figure
