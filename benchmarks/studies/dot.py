"""DOT's trade-off: does a momentum per loss lower both training losses, and what of that is reweighting?"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from benchmarks.studies import digits, language
from benchmarks.studies.harness import Column, Experiment, Options, Results, Row, Study, markdown
from benchmarks.studies.pictures import trade_off
from distill_optim.demo.report import number

MOMENTUM, DELTA = 0.9, 0.075
# The long-run gain 1/(1 - mu) of either buffer over that of SGD's one: 0.571 and 4, or 1 : 7.
GAINS = [(1 - MOMENTUM) / (1 - MOMENTUM + DELTA), (1 - MOMENTUM) / (1 - MOMENTUM - DELTA)]
FIXED = [[1.75, 0.25], [1.5, 0.5], [1.0, 1.0], [0.5, 1.5], [0.25, 1.75]]
FEWER = FIXED[1:-1]  # for the text, where a run takes longer

Rates = tuple[float, ...]


def row(label: str, optimizer: str, rates: Rates, arguments: dict[str, Any], **options: Any) -> Row:
    return Row(label, {"optimizer": optimizer, "arguments": arguments, "distill": ["logits"], **options}, {"lr": rates})


def fixed(chosen: Row, weights: Sequence[list[float]] = FIXED) -> Row:
    """The same with weights that the validation split chooses, together with the learning rate."""
    return Row(f"{chosen.label}, best fixed weights", chosen.options, {**chosen.grid, "weights": weights})


def sgd(label: str, rates: Rates, momentum: float = MOMENTUM, **options: Any) -> Row:
    return row(label, "SGD", rates, {"momentum": momentum}, **options)


def dot(label: str, rates: Rates, momentum: float = MOMENTUM, **arguments: Any) -> Row:
    return row(label, "DOTSGD", rates, {"momentum": momentum, "delta": DELTA, **arguments})


def sgd_rows(rates: Rates, weights: Sequence[list[float]] = FIXED) -> dict[str, Row]:
    return {
        "task": sgd("SGD, task alone", rates, weights=[1, 0]),
        "sum": sgd("SGD on the sum", rates),
        "gains": sgd("SGD, DOT's long-run weights", rates, weights=GAINS),
        "fixed": fixed(sgd("SGD", rates), weights),
        "dot": dot("DOTSGD", rates),
        "matched": dot("DOTSGD, matched gain", rates, gain="matched"),
    }


def sweeps(rates: Rates) -> dict[str, Row]:
    return {
        "delta-0.075": dot("DOTSGD, Δ = −0.075", rates, delta=-DELTA),
        "delta0.025": dot("DOTSGD, Δ = 0.025", rates, delta=0.025),
        "delta0.05": dot("DOTSGD, Δ = 0.05", rates, delta=0.05),
        "delta0.09": dot("DOTSGD, Δ = 0.09", rates, delta=0.09),
        "sum0.5": sgd("SGD on the sum, μ = 0.5", rates, momentum=0.5),
        "dot0.5": dot("DOTSGD, μ = 0.5", rates, momentum=0.5),
        "sum0.975": sgd("SGD on the sum, μ = 0.975", rates, momentum=0.975),
    }


def adamw_rows(rates: Rates) -> dict[str, Row]:
    """Adam's first moments are means, so that Δ changes no weights and there is no gain to match."""
    return {
        "task": row("AdamW, task alone", "AdamW", rates, {}, weights=[1, 0]),
        "sum": row("AdamW on the sum", "AdamW", rates, {}),
        "fixed": fixed(row("AdamW", "AdamW", rates, {}), FEWER),
        "dot": row("DOTAdamW", "DOTAdamW", rates, {"delta": DELTA}),
        "delta-0.075": row("DOTAdamW, Δ = −0.075", "DOTAdamW", rates, {"delta": -DELTA}),
    }


def rate_by_rate(found: Results) -> str:
    """Losses at the end of the sum and of DOT at the same learning rate, means over the seeds that choose, in Markdown.

    The last column counts the points of the grid of fixed weights, 1 : 1 among them, that end below DOT in both.
    """
    rows = found["rows"]
    plain = rows["fixed"]["grid"]
    lines = [
        ["lr", "sum: task, distillation", "DOT: task, distillation", "both lower", "fixed weights below DOT in both"]
    ]
    for theirs, ours in zip(rows["sum"]["grid"], rows["dot"]["grid"], strict=True):
        losses = [
            ", ".join("–" if at[k] is None else f"{at[k]:.3f}" for k in ("task", "logits")) for at in (theirs, ours)
        ]
        below = sum(below_both(at, ours) for at in plain)
        both = "yes" if below_both(ours, theirs) else "no"
        lines.append([f"{ours['lr']:g}", *losses, both, f"{below} of {len(plain)}"])
    return markdown(lines)


def shown(loss: float | None) -> str:
    return number(math.nan if loss is None else loss, ".3f")


def below_both(a: Results, b: Results) -> bool:
    """A loss that is not finite, null in the file, is below none."""
    pairs = [(at["task"], at["logits"]) for at in (a, b)]
    (task, distill), (other_task, other_distill) = ((math.inf if x is None else x for x in pair) for pair in pairs)
    return bool(task < other_task and distill < other_distill)


def study(*, quick: bool = False) -> Study:
    sgd_rates: Rates = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5)
    text_rates: Rates = (0.03, 0.1, 0.3, 1.0)
    adamw_rates: Rates = (0.003, 0.01, 0.03, 0.1)
    seeds, tuning_seeds, steps, teacher_steps = 10, 3, 300, 400
    text: Options = {"width": 32, "steps": 200, "teacher": [64, 2, 1000], "pieces": 1500}
    if quick:
        sgd_rates, text_rates, adamw_rates = (0.02, 0.1), (0.1, 0.3), (0.01, 0.03)
        seeds, tuning_seeds, steps, teacher_steps = 2, 1, 5, 20
        text = {"width": 8, "steps": 5, "teacher": [8, 1, 5], "pieces": 32}
    losses = [Column("task", "task loss", spec=".3f"), Column("logits", "distillation loss", spec=".3f")]

    def on_digits(title: str, **problem: Any) -> Experiment:
        return Experiment(
            title,
            {"width": 16, "steps": steps, "teacher_steps": teacher_steps, **problem},
            digits.prepare,
            digits.train,
            {**sgd_rows(sgd_rates), **sweeps(sgd_rates)},
            [*losses, Column("test", "test accuracy %", 100, ".1f")],
            ["sum", "gains", "fixed"],
            seeds,
            tuning_seeds,
            compared=3,
        )

    def on_text(optimizer: str, rows: dict[str, Row], *baselines: str) -> Experiment:
        return Experiment(
            f"Characters of source text, {optimizer}",
            text,
            language.prepare,
            language.train,
            rows,
            [*losses, Column("test", "test bits per character", spec=".3f")],
            baselines,
            seeds,
            min(tuning_seeds, 2),
            compared=3,
        )

    return Study(
        "dot",
        {
            "clean": on_digits("Digits, 400 images, all labels right", images=400, noise=0.0),
            "few": on_digits("Digits, 60 images, all labels right", images=60, noise=0.0),
            "noisy": on_digits("Digits, 400 images, 30 % of the labels wrong", images=400, noise=0.3),
            "text_sgd": on_text("SGD", sgd_rows(text_rates, FEWER), "sum", "gains", "fixed"),
            "text_adamw": on_text("AdamW", adamw_rows(adamw_rates), "sum", "fixed"),
        },
        trade_off,
        rate_by_rate,
    )
