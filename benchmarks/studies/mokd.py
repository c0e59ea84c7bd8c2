"""MoKD: conflict and dominance over training, what projector and optimizer bring, its cheaper ways, wrong labels."""

from __future__ import annotations

from typing import Any

from benchmarks.studies import digits
from benchmarks.studies.dot import Rates, fixed, row, sgd
from benchmarks.studies.harness import Column, Experiment, Row, Study
from benchmarks.studies.pictures import conflict

COLUMNS = [
    Column("test", "test accuracy %", 100, ".1f"),
    Column("task", "task loss", spec=".3f"),
]


def mokd(label: str, rates: Rates, arguments: dict[str, Any] | None = None, **options: Any) -> Row:
    return row(label, "MoKDSGD", rates, {"momentum": 0.9, **(arguments or {})}, **options)


def rivals(rates: Rates) -> dict[str, Row]:
    """What a reader would try first, and MoKD."""
    return {
        "task": sgd("SGD, task alone", rates, weights=[1, 0]),
        "sum": sgd("SGD on the sum", rates),
        "sum_stopped": sgd("SGD on the sum, early stopping", rates, early_stopping=True),
        "fixed": fixed(sgd("SGD", rates)),
        "mokd": mokd("MoKDSGD", rates),
        "mokd_stopped": mokd("MoKDSGD, early stopping", rates, early_stopping=True),
    }


def ways(rates: Rates) -> dict[str, Row]:
    """Other treatments of dominance, and cheaper steps."""
    return {
        "norm": mokd('MoKDSGD, dominance="norm"', rates, {"dominance": "norm"}),
        "none": mokd('MoKDSGD, dominance="none"', rates, {"dominance": "none"}),
        "through": mokd("MoKDSGD, through the logits", rates, through=True),
        "every": mokd("MoKDSGD, every=4", rates, {"every": 4}),
        "famo": mokd('MoKDSGD, combine="famo"', rates, {"combine": "famo"}, observe=True),
    }


def ablation(rates: Rates) -> dict[str, Row]:
    """The paper's: the space where features meet, the optimizer, and both."""
    return {
        "task": sgd("SGD, task alone", rates, weights=[1, 0], distill=["regressor"]),
        "neither": sgd("neither: SGD, linear map", rates, distill=["regressor"]),
        "projector": sgd("projector: SGD, SubspaceProjector", rates, distill=["projector"]),
        "optimizer": mokd("optimizer: MoKDSGD, linear map", rates, distill=["regressor"]),
        "both": mokd("both: MoKDSGD, SubspaceProjector", rates, distill=["projector"]),
        "fixed": Row(
            "SGD, SubspaceProjector, best fixed weights",
            sgd("", rates, distill=["projector"]).options,
            {"lr": rates, "weights": [[1.0, 1.0], [1.0, 3.0], [1.0, 10.0], [1.0, 30.0]]},
        ),
    }


def study(*, quick: bool = False) -> Study:
    rates: Rates = (0.02, 0.1) if quick else (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5)
    longer: Rates = rates if quick else (*rates, 1.0, 2.0, 5.0, 10.0)  # min-norm steps on raw features are short
    seeds, tuning_seeds = (2, 1) if quick else (10, 3)
    steps = {"steps": 20, "teacher_steps": 20} if quick else {"steps": 300, "teacher_steps": 400}

    def experiment(title: str, rows: dict[str, Row], distilled: Column, base: list[str], **problem: Any) -> Experiment:
        return Experiment(
            title,
            {"images": 400, "width": 16, "watch": True, **steps, **problem},
            digits.prepare,
            digits.train,
            rows,
            [*COLUMNS, distilled],
            base,
            seeds,
            tuning_seeds,
        )

    def noisy(noise: float, rows: dict[str, Row], **problem: Any) -> Experiment:
        width = problem.get("width", 16)
        title = f"{noise:.0%} of the labels wrong, {width} hidden units"
        distilled = Column("logits", "distillation loss", spec=".3f")
        return experiment(title, rows, distilled, ["sum", "fixed"], noise=noise, **problem)

    def of_features(title: str, **problem: Any) -> Experiment:
        distilled = Column("features", "feature loss", spec=".3f")
        return experiment(title, ablation(longer), distilled, ["neither", "fixed"], **problem)

    return Study(
        "mokd",
        {
            "noise0": noisy(0.0, rivals(rates)),
            "noise10": noisy(0.1, rivals(rates)),
            "noise30": noisy(0.3, {**rivals(rates), **ways(rates)}),
            "noise50": noisy(0.5, rivals(rates)),
            "wide": noisy(0.3, rivals(rates), width=64),
            "features_few": of_features("Features, 60 images, all labels right", images=60, noise=0.0),
            "features_noisy": of_features("Features, 400 images, 30 % of the labels wrong", noise=0.3),
        },
        conflict,
    )
