"""DOT's trade-off: does a momentum per loss lower both training losses, and what of that is reweighting?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from benchmarks.studies import digits
from benchmarks.studies.harness import Column, Experiment, Row, Study
from benchmarks.studies.pictures import trade_off

MOMENTUM, DELTA = 0.9, 0.075
# The long-run gain 1/(1-mu) of either buffer over that of the one buffer of SGD: 0.571 and 4, or 1 : 7.
GAINS = [(1 - MOMENTUM) / (1 - MOMENTUM + DELTA), (1 - MOMENTUM) / (1 - MOMENTUM - DELTA)]
FIXED = [[1.75, 0.25], [1.5, 0.5], [1.0, 1.0], [0.5, 1.5], [0.25, 1.75]]


def sgd(label: str, rates: Sequence[float], momentum: float = MOMENTUM, **options: Any) -> Row:
    how = {"optimizer": "SGD", "arguments": {"momentum": momentum}, "distill": ["logits"], **options}
    return Row(label, how, {"lr": rates})


def dot(label: str, rates: Sequence[float], momentum: float = MOMENTUM, **arguments: Any) -> Row:
    arguments = {"momentum": momentum, "delta": DELTA, **arguments}
    return Row(label, {"optimizer": "DOTSGD", "arguments": arguments, "distill": ["logits"]}, {"lr": rates})


def sgd_rows(rates: Sequence[float]) -> dict[str, Row]:
    fixed = sgd("SGD, best fixed weights", rates)
    return {
        "task": sgd("SGD, task alone", rates, weights=[1, 0]),
        "sum": sgd("SGD on the sum", rates),
        "gains": sgd("SGD, DOT's long-run weights", rates, weights=GAINS),
        "fixed": Row(fixed.label, fixed.options, {**fixed.grid, "weights": FIXED}),
        "dot": dot("DOTSGD", rates),
        "matched": dot("DOTSGD, matched gain", rates, gain="matched"),
    }


def sweeps(rates: Sequence[float]) -> dict[str, Row]:
    return {
        "delta-0.075": dot("DOTSGD, Δ = −0.075", rates, delta=-DELTA),
        "delta0.025": dot("DOTSGD, Δ = 0.025", rates, delta=0.025),
        "delta0.05": dot("DOTSGD, Δ = 0.05", rates, delta=0.05),
        "delta0.09": dot("DOTSGD, Δ = 0.09", rates, delta=0.09),
        "sum0.5": sgd("SGD on the sum, μ = 0.5", rates, momentum=0.5),
        "dot0.5": dot("DOTSGD, μ = 0.5", rates, momentum=0.5),
        "sum0.975": sgd("SGD on the sum, μ = 0.975", rates, momentum=0.975),
    }


def study(*, quick: bool = False) -> Study:
    rates = (0.01, 0.05) if quick else (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5)
    steps = {"steps": 20, "teacher_steps": 20} if quick else {"steps": 300, "teacher_steps": 400}
    seeds, tuning_seeds = (2, 1) if quick else (10, 3)

    def on_digits(title: str, **problem: Any) -> Experiment:
        return Experiment(
            title,
            {"width": 16, **steps, **problem},
            digits.prepare,
            digits.train,
            {**sgd_rows(rates), **sweeps(rates)},
            [
                Column("task", "task loss", spec=".3f"),
                Column("logits", "distillation loss", spec=".3f"),
                Column("test", "test accuracy %", 100, ".1f"),
            ],
            ["sum", "gains"],
            seeds,
            tuning_seeds,
            compared=3,
        )

    return Study(
        "dot",
        {
            "clean": on_digits("Digits, 400 images, all labels right", images=400, noise=0.0),
            "few": on_digits("Digits, 60 images, all labels right", images=60, noise=0.0),
            "noisy": on_digits("Digits, 400 images, 30 % of the labels wrong", images=400, noise=0.3),
        },
        trade_off,
    )
