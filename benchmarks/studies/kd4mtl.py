"""Knowledge distillation for multi-task learning: one student, a teacher per task, and the ways to weigh the tasks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any, NamedTuple

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.optim import Adam
from torch.optim.lr_scheduler import CosineAnnealingLR

from benchmarks.studies import composites
from benchmarks.studies.composites import DENSE, DIGITS, HEIGHT, TASKS, Composites
from benchmarks.studies.composites import WIDTH as BREADTH
from benchmarks.studies.harness import Column, Experiment, Measures, Options, Results, Row, Study
from benchmarks.studies.pictures import COLOURS
from benchmarks.studies.training import Forward, fit, shuffled
from distill_optim.combine import DWA
from distill_optim.distill import TaskAdaptors, anneal, features, kd
from distill_optim.distill.adaptors import linear

BATCH = 50
CHANNELS = 24
LAYERS = ("trunk.0", "trunk.1", "trunk.2")

# Of the adaptors' own Adam, as in the authors' code.
ADAPTOR_RATE, ADAPTOR_DECAY = 0.1, 5e-4

# What the validation split chose for the networks of one task: the first experiment's choices.
TEACHERS = {"left": 0.01, "right": 0.01, "regions": 0.01, "clean": 0.03}


class Net(nn.Module):
    """A shared trunk at half resolution, and a head for each of some tasks; for one task alone, a teacher."""

    def __init__(self, tasks: Sequence[str]) -> None:
        super().__init__()
        self.trunk = nn.Sequential(
            convolution(1, size=4, stride=2),
            convolution(CHANNELS, size=3, stride=1),
            convolution(CHANNELS, size=3, stride=1),
        )
        self.heads = nn.ModuleDict({task: head(task) for task in tasks})
        # Faster on a CPU; torch's stubs do not have it.
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        shared = self.trunk(images)
        return {task: head(shared) for task, head in self.heads.items()}


def convolution(channels: int, size: int, stride: int) -> nn.Module:
    layer = nn.Conv2d(channels, CHANNELS, size, stride, padding=1, bias=False)
    return nn.Sequential(layer, nn.BatchNorm2d(CHANNELS), nn.ReLU())


def head(task: str) -> nn.Module:
    """A linear map from a position to the four pixels there, or from all positions to a class."""
    if task in DENSE:
        return nn.Sequential(nn.Conv2d(CHANNELS, 4 * TASKS[task], kernel_size=1), nn.PixelShuffle(2))
    return nn.Sequential(nn.Flatten(), nn.Linear(CHANNELS * HEIGHT * BREADTH // 4, TASKS[task]))


def two_layers(student_width: int, teacher_width: int) -> nn.Module:
    """A non-linear adaptor."""
    return nn.Sequential(nn.Linear(student_width, teacher_width), nn.ReLU(), nn.Linear(teacher_width, teacher_width))


ADAPTORS = {"linear": linear, "two layers": two_layers}


class Problem(NamedTuple):
    """What all methods share of one seed.

    Attributes:
        splits: training, validation and test.
        steps: of every training.
        teachers: a trained network per task.
        alone: their metrics by split.
    """

    splits: dict[str, Composites]
    steps: int
    teachers: dict[str, Net]
    alone: dict[str, dict[str, float]]


def prepare(options: Options, seed: int) -> Problem:
    """Composites, and the networks of one task: the teachers, and what the students are measured by.

    Args:
        options: ``sizes`` of the splits, ``steps`` of every training, ``teachers``, their learning rates by task.
        seed: of the splits, and of the networks' initial weights and batches.
    """
    problem = Problem(composites.load_splits(options["sizes"], seed), options["steps"], {}, {})
    teachers = {task: single(problem, task, lr, seed) for task, lr in options["teachers"].items()}
    alone = {
        split: {task: evaluate(teacher, data)[task] for task, teacher in teachers.items()}
        for split, data in problem.splits.items()
    }
    return problem._replace(teachers=teachers, alone=alone)


def batches_of(problem: Problem, seed: int) -> list[Tensor]:
    return shuffled(len(problem.splits["train"].images), BATCH, problem.steps, seed)


def single(problem: Problem, task: str, lr: float, seed: int) -> Net:
    """A trained network of one task."""
    images, answers, _ = problem.splits["train"]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = Net([task])

    def forward(batch: Tensor) -> Forward:
        output = net(images[batch])[task]
        return Forward([composites.loss(task, output, answers[task][batch])], output)

    options = {"optimizer": "AdamW", "lr": lr, "arguments": {"weight_decay": 0}}
    for _ in fit(net.parameters(), batches_of(problem, seed), forward, options):
        pass
    return net


def train_single(problem: Problem, options: Options, seed: int, final: bool) -> Measures:
    """A network of one task, and its metric."""
    task = options["task"]
    net = single(problem, task, options["lr"], seed)
    measures = {"validation": composites.score(task, evaluate(net, problem.splits["validation"])[task])}
    if final:
        measures["test"] = evaluate(net, problem.splits["test"])[task]
    return measures


class Labels:
    """The losses of the tasks, without teachers."""

    def __init__(self, net: Net, problem: Problem, options: Options) -> None:
        pass

    def losses(self, own: dict[str, Tensor], output: dict[str, Tensor], batch: Tensor) -> list[Tensor]:
        return list(own.values())

    def step(self) -> None:
        """After every step of the student."""


class Outputs(Labels):
    """BAM: from the teachers' outputs to the answers, as training goes on."""

    def __init__(self, net: Net, problem: Problem, options: Options) -> None:
        images = problem.splits["train"].images
        with torch.no_grad():
            self.known = {task: teacher.eval()(images)[task] for task, teacher in problem.teachers.items()}
        self.taken, self.steps = 0, problem.steps

    def losses(self, own: dict[str, Tensor], output: dict[str, Tensor], batch: Tensor) -> list[Tensor]:
        share = anneal(self.taken, self.steps)
        return [
            share * loss + (1 - share) * distance(task, output[task], self.known[task][batch])
            for task, loss in own.items()
        ]

    def step(self) -> None:
        self.taken += 1


def distance(task: str, output: Tensor, teacher: Tensor) -> Tensor:
    """Of two outputs, as the task's loss is measured."""
    if task == "clean":
        return composites.absolute_error(output, teacher)
    return kd(output.movedim(1, -1), teacher.movedim(1, -1), temperature=1)


class FeatureDistances(Labels):
    """KD4MTL: a loss more per task, between features, through adaptors that have an optimizer of their own."""

    def __init__(self, net: Net, problem: Problem, options: Options) -> None:
        self.images = problem.splits["train"].images
        adaptor, layers = ADAPTORS[options["adaptor"]], options["layers"]
        self.adaptors = TaskAdaptors(net, problem.teachers, layers, self.images[:1], adaptor=adaptor)
        self.seen = features(net, layers)
        self.adam = Adam(self.adaptors.parameters(), lr=ADAPTOR_RATE, weight_decay=ADAPTOR_DECAY)
        self.schedule = CosineAnnealingLR(self.adam, problem.steps)

    def losses(self, own: dict[str, Tensor], output: dict[str, Tensor], batch: Tensor) -> list[Tensor]:
        return [*own.values(), *self.adaptors(self.seen, self.images[batch]).values()]

    def step(self) -> None:
        self.adam.step()
        self.adam.zero_grad()
        self.schedule.step()


TEACHING = {"labels": Labels, "outputs": Outputs, "features": FeatureDistances}


def train(problem: Problem, options: Options, seed: int, final: bool) -> Measures:
    """A student of all tasks.

    Args:
        problem: data and teachers.
        options: those of ``fit``; ``teach``, a name of ``TEACHING``; for features the ``layers`` and the kind of
            ``adaptor``.
        seed: of initial weights, batches, and what a method draws.
        final: whether to look at the test split.

    Returns:
        On the test split the metrics, the gain of every task, their mean and the worst; on validation the mean gain.
    """
    images, answers, _ = problem.splits["train"]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = Net(list(TASKS))
        teaching = TEACHING[options["teach"]](net, problem, options)
        arguments = dict(options["arguments"])
        if arguments["combine"] == "dwa":  # it compares whole epochs
            arguments["combine"] = DWA(window=len(images) // BATCH)

        def forward(batch: Tensor) -> Forward:
            output = net(images[batch])
            own = {task: composites.loss(task, output[task], answers[task][batch]) for task in TASKS}
            return Forward(teaching.losses(own, output, batch), images)

        for _ in fit(net.parameters(), batches_of(problem, seed), forward, {**options, "arguments": arguments}):
            teaching.step()

    on_validation = evaluate(net, problem.splits["validation"])
    measures = {"validation": fmean(composites.gains(on_validation, problem.alone["validation"]).values())}
    if final:
        metrics = evaluate(net, problem.splits["test"])
        gains = composites.gains(metrics, problem.alone["test"])
        measures |= {"gain": fmean(gains.values()), "worst": min(gains.values())}
        measures |= {f"{task} gain": gain for task, gain in gains.items()}
        measures |= metrics
    return measures


@torch.no_grad()
def evaluate(net: Net, split: Composites) -> dict[str, float]:
    """The metric of every task that the network has a head for."""
    found = net.eval()(split.images)
    return {task: composites.metric(task, output, split.answers[task]) for task, output in found.items()}


# ---------------------------------------------------------------- the study


def row(
    label: str,
    grid: Mapping[str, Sequence[Any]],
    combine: str = "sum",
    dominance: str = "none",
    teach: str = "labels",
    **features: Any,
) -> Row:
    """A method. A constant sum is one backward pass and Adam."""
    losses = len(TASKS) * (2 if teach == "features" else 1)
    arguments = {"losses": losses, "combine": combine, "dominance": dominance, "weight_decay": 0}
    return Row(label, {"optimizer": "MoKDAdamW", "arguments": arguments, "teach": teach, **features}, grid)


def study(*, quick: bool = False) -> Study:
    rates = {"lr": (0.003, 0.01) if quick else (0.003, 0.01, 0.03, 0.1)}
    # Of the dense tasks, and of the distances: three numbers to choose from for either.
    dense = [[1.0, 1.0, w, w] for w in (3.0, 10.0, 30.0)]
    scales = [[1.0] * len(TASKS) + [w] * len(TASKS) for w in (0.3, 1.0, 3.0)]
    problem = {
        "sizes": dict(zip(DIGITS, (200, 100, 100) if quick else (2000, 1000, 1000), strict=True)),
        "steps": 8 if quick else 200,
    }
    seeds, tuning_seeds = (2, 1) if quick else (10, 2)

    def distilled(label: str, layers: Sequence[str] = LAYERS, adaptor: str = "linear") -> Row:
        return row(label, {**rates, "weights": scales}, teach="features", layers=list(layers), adaptor=adaptor)

    rows = {
        "uniform": row("uniform", rates),
        "fixed": row("best fixed weights", {**rates, "weights": dense}),
        "uncertainty": row("Uncert", rates, "uncertainty"),
        "dwa": row("DWA", rates, "dwa"),
        "gradnorm": row("GradNorm", rates, "gradnorm"),
        "mgda": row("MGDA", rates, "min_norm"),
        "pcgrad": row("PCGrad", rates, "pcgrad"),
        "cagrad": row("CAGrad", rates, "cagrad"),
        "mokd": row("MoKD, no teachers", rates, "min_norm", "log"),
        "bam": row("BAM", rates, teach="outputs"),
        "kd4mtl": distilled("KD4MTL"),
        "two": distilled("KD4MTL, last two layers", LAYERS[1:]),
        "one": distilled("KD4MTL, last layer", LAYERS[2:]),
        "nonlinear": distilled("KD4MTL, non-linear adaptors", adaptor="two layers"),
        "kd4mtl-mokd": row(
            "KD4MTL with MoKD", rates, "min_norm", "log", "features", layers=list(LAYERS), adaptor="linear"
        ),
    }
    return Study(
        "kd4mtl",
        {
            "single": Experiment(
                "Networks of one task",
                {**problem, "teachers": {}},
                prepare,
                train_single,
                {task: Row(task, {"task": task}, rates) for task in TASKS},
                [Column("test", "metric", spec=".3f")],
                ["left"],
                seeds,
                tuning_seeds,
                compared=0,
            ),
            "students": Experiment(
                "One network of four tasks",
                {**problem, "teachers": TEACHERS},
                prepare,
                train,
                rows,
                [
                    Column("gain", "Δ %", spec=".1f"),
                    Column("worst", "worst task %", spec=".1f"),
                    Column("left", "left %", 100, ".1f"),
                    Column("right", "right %", 100, ".1f"),
                    Column("regions", "regions %", 100, ".1f"),
                    Column("clean", "clean", spec=".3f"),
                ],
                ["uniform", "kd4mtl"],
                seeds,
                tuning_seeds,
                compared=2,
            ),
        },
        picture,
    )


def picture(results: Results) -> Figure:
    """Gain of every method over the networks of one task: each task, and the mean with its standard error."""
    rows = list(results["experiments"]["students"]["rows"].values())
    figure = Figure(figsize=(8, 0.36 * len(rows) + 1.4), layout="constrained")
    axes = figure.subplots()
    heights = range(len(rows))
    for colour, task in zip(COLOURS[1:], TASKS, strict=False):
        gains = [row["mean"][f"{task} gain"][0] for row in rows]
        axes.scatter(gains, heights, s=22, color=colour, label=task)
    means, errors = zip(*(row["mean"]["gain"] for row in rows), strict=True)
    axes.errorbar(means, heights, xerr=errors, fmt="D", color=COLOURS[0], markersize=6, label="mean Δ ± standard error")
    axes.axvline(0, color="0.6", linewidth=0.8)
    axes.set_yticks(heights, [row["label"] for row in rows])
    axes.invert_yaxis()
    axes.set_xlabel("gain over the network of the task alone, %")
    axes.grid(axis="x", color="0.9")
    axes.set_axisbelow(True)
    figure.legend(loc="outside lower center", ncols=len(TASKS) + 1, frameon=False)
    return figure
