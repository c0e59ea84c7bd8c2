"""Three losses, the task, logits and features: does momentum per loss, or min-norm, still help?"""

from __future__ import annotations

import itertools
from typing import Any

from benchmarks.studies import digits
from benchmarks.studies.dot import DELTA, GAINS, MOMENTUM, Rates, row
from benchmarks.studies.harness import Column, Experiment, Row, Study
from benchmarks.studies.pictures import accuracies

DISTILL = ["logits", "projector"]
LOSSES = ["task", *DISTILL]


def sgd(label: str, rates: Rates, **options: Any) -> Row:
    return row(label, "SGD", rates, {"momentum": MOMENTUM}, **{"distill": DISTILL, **options})


def dot(label: str, rates: Rates, **arguments: Any) -> Row:
    given = {"momentum": MOMENTUM, "delta": DELTA, "losses": LOSSES, **arguments}
    return row(label, "DOTSGD", rates, given, distill=DISTILL)


def mokd(label: str, rates: Rates, through: bool = False, **arguments: Any) -> Row:
    given = {"momentum": MOMENTUM, "losses": LOSSES, **arguments}
    return row(label, "MoKDSGD", rates, given, distill=DISTILL, through=through)


def rows(rates: Rates) -> dict[str, Row]:
    weights = [[1.0, *pair] for pair in itertools.product((0.3, 1.0, 3.0), (1.0, 10.0))]
    apart = {"task": MOMENTUM - DELTA, "logits": MOMENTUM + DELTA, "projector": MOMENTUM}
    return {
        "task": sgd("SGD, task alone", rates, weights=[1, 0, 0]),
        "logits": sgd("SGD, task and logits", rates, distill=["logits"]),
        "sum": sgd("SGD on the sum", rates),
        "gains": sgd("SGD, DOT's long-run weights", rates, weights=[*GAINS, GAINS[1]]),
        "fixed": Row("SGD, best fixed weights", sgd("", rates).options, {"lr": rates, "weights": weights}),
        "dot": dot("DOTSGD", rates),
        "matched": dot("DOTSGD, matched gain", rates, gain="matched"),
        "apart": dot("DOTSGD, μ ∓ Δ for task and logits alone", rates, momentums=apart),
        "mokd": mokd("MoKDSGD", rates),
        "norm": mokd('MoKDSGD, dominance="norm"', rates, dominance="norm"),
        "none": mokd('MoKDSGD, dominance="none"', rates, dominance="none"),
        "through": mokd("MoKDSGD, through the features", rates, through=True),
        "pcgrad": mokd("PCGrad", rates, combine="pcgrad", dominance="none"),
        "cagrad": mokd("CAGrad", rates, combine="cagrad", dominance="none"),
    }


def study(*, quick: bool = False) -> Study:
    rates: Rates = (0.02, 0.1) if quick else (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)
    seeds, tuning_seeds = (2, 1) if quick else (10, 3)
    steps = {"steps": 20, "teacher_steps": 20} if quick else {"steps": 300, "teacher_steps": 400}

    def experiment(title: str, **problem: Any) -> Experiment:
        return Experiment(
            title,
            {"width": 16, **steps, **problem},
            digits.prepare,
            digits.train,
            rows(rates),
            [
                Column("test", "test accuracy %", 100, ".1f"),
                Column("task", "task loss", spec=".3f"),
                Column("logits", "logit loss", spec=".3f"),
                Column("features", "feature loss", spec=".3f"),
            ],
            ["sum", "fixed"],
            seeds,
            tuning_seeds,
        )

    return Study(
        "three",
        {
            "few": experiment("60 images, all labels right", images=60, noise=0.0),
            "noisy": experiment("400 images, 30 % of the labels wrong", images=400, noise=0.3),
        },
        accuracies,
    )
