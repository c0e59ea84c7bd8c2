"""One training function for every row of the table: rows differ in how the optimizer is made and stepped."""

from __future__ import annotations

import functools
import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from statistics import fmean, median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD

from distill_optim import DOTSGD, MoKDSGD, combine

from .data import CLASSES, PIXELS, Digits, flip_labels, load_splits

TEMPERATURE = 4.0
BATCH = 50
TEACHER_WIDTHS = (PIXELS, 256, 256, CLASSES)
STUDENT_WIDTHS = (PIXELS, 16, CLASSES)
TUNING_SEED = 10_000  # the seeds that choose learning rates are never those of the table
CONFLICT_EVERY = 3  # steps between two looks at the gradients of an optimizer that does not report them

Losses = list[Tensor]


@dataclass(frozen=True)
class Settings:
    """What one call of the demo does."""

    seeds: int = 10
    epochs: int = 30
    label_noise: float = 0.3
    device: str = "cpu"
    teacher_epochs: int = 60
    tuning_seeds: int = 5
    learning_rates: tuple[float, ...] = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
    distill_weights: tuple[float, ...] = (0.0, 0.2, 0.5, 1.0, 1.5, 1.8, 2.0)  # from no teacher to no labels


QUICK: dict[str, Any] = {
    "seeds": 2,
    "epochs": 3,
    "teacher_epochs": 5,
    "tuning_seeds": 1,
    "learning_rates": (0.01, 0.03),
    "distill_weights": (0.5, 1.5),
}


@dataclass(frozen=True)
class Recipe:
    """One row: how its optimizer is made, and how it steps, given the losses and a distillation weight."""

    label: str
    build: Callable[..., Any]
    step: Callable[[Any, Losses, float], object]
    taught: bool = True
    distill_weights: tuple[float, ...] = (1.0,)


@dataclass
class Run:
    """One training of one student. Lists have an entry per epoch; losses are over the training set."""

    validation_accuracy: float = 0.0
    test_accuracy: float = 0.0
    task_loss: list[float] = field(default_factory=list)
    distill_loss: list[float] = field(default_factory=list)
    cosine: list[float] = field(default_factory=list)
    conflict: list[float] = field(default_factory=list)
    weights: list[list[float]] = field(default_factory=list)
    step_seconds: float = 0.0


@dataclass(frozen=True)
class Choice:
    """What the validation split chose for one row. ``at_border``: a wider grid of rates might do better."""

    learning_rate: float
    distill_weight: float
    validation_accuracy: float
    at_border: bool


@dataclass(frozen=True)
class Row:
    """One line of the table: a recipe at its best settings, with one run per seed."""

    label: str
    choice: Choice
    runs: list[Run]


@dataclass(frozen=True)
class Study:
    """All that the demo measured."""

    settings: Settings
    teacher_accuracy: float
    rows: dict[str, Row]


def summed(optimizer: SGD, losses: Losses, weight: float) -> None:
    sum(losses[1:], start=losses[0]).backward()
    optimizer.step()


def weighted(optimizer: SGD, losses: Losses, weight: float) -> None:
    # The weights sum to 2, as those of the plain sum do, so that one grid of learning rates suits both.
    task, distill = losses
    ((2 - weight) * task + weight * distill).backward()
    optimizer.step()


def apart(optimizer: DOTSGD | MoKDSGD, losses: Losses, weight: float) -> None:
    optimizer.step(losses)


# The rows that are shown where none are asked for.
USUAL = ("none", "sum", "fixed", "dot", "dot-matched", "mokd", "pcgrad")


def recipes(settings: Settings) -> dict[str, Recipe]:
    """The rows by the keys of ``--optimizers``, in the order of the table; every combination method has one."""
    rows = {
        "none": Recipe("no teacher", SGD, summed, taught=False),
        "sum": Recipe("summed SGD", SGD, summed),
        "fixed": Recipe("SGD, best fixed weight", SGD, weighted, distill_weights=settings.distill_weights),
        "dot": Recipe("DOTSGD", DOTSGD, apart),
        "dot-matched": Recipe("DOTSGD, matched gain", functools.partial(DOTSGD, gain="matched"), apart),
        "mokd": Recipe("MoKDSGD", MoKDSGD, apart),
    }
    for name in combine.names():
        # As published; "mokd" is min-norm on the log losses.
        build = functools.partial(MoKDSGD, combine=name, dominance=combine.own_dominance(name))
        key, label = ("pcgrad", "PCGrad") if name == "pcgrad" else (f"mokd-{name}", f"MoKDSGD, {name}")
        rows[key] = Recipe(label, build, apart)
    return rows


def mlp(widths: tuple[int, ...], seed: int) -> nn.Sequential:
    """Linear layers with ReLU between them. Made on the CPU: the same initial weights on every device."""
    layers: list[nn.Module] = []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for inputs, outputs in itertools.pairwise(widths):
            layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def distillation_loss(logits: Tensor, teacher: Tensor) -> Tensor:
    """T² KL(student/T ‖ teacher/T) as Hinton et al. (2015) weigh it, mean over the batch."""
    student = F.log_softmax(logits / TEMPERATURE, dim=1)
    target = F.log_softmax(teacher / TEMPERATURE, dim=1)
    return TEMPERATURE**2 * F.kl_div(student, target, reduction="batchmean", log_target=True)


def batches(count: int, generator: torch.Generator, device: torch.device) -> tuple[Tensor, ...]:
    """The indices of one epoch, shuffled. Drawn on the CPU: the same batches on every device."""
    return torch.split(torch.randperm(count, generator=generator).to(device), BATCH)


def train_teacher(digits: Digits, settings: Settings) -> nn.Module:
    """A large network on the teacher's own, clean labels."""
    inputs, labels, _ = digits.teacher
    generator = torch.Generator().manual_seed(0)
    teacher = mlp(TEACHER_WIDTHS, seed=0).to(inputs.device)
    optimizer = SGD(teacher.parameters(), lr=0.03, momentum=0.9)
    for _ in range(settings.teacher_epochs):
        for batch in batches(len(labels), generator, inputs.device):
            optimizer.zero_grad()
            F.cross_entropy(teacher(inputs[batch]), labels[batch]).backward()
            optimizer.step()
    return teacher.requires_grad_(False)


@torch.no_grad()
def accuracy(model: nn.Module, inputs: Tensor, labels: Tensor) -> float:
    return float((model(inputs).argmax(1) == labels).float().mean())


def gradient_cosine(losses: Losses, parameters: list[nn.Parameter]) -> Tensor:
    """Cosine of the angle between the gradients of two losses, over all parameters."""
    task, distill = (
        torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters, retain_graph=True)]) for loss in losses
    )
    return F.cosine_similarity(task, distill, dim=0)


def synchronize(device: torch.device) -> None:
    if device.type != "cpu":  # an accelerator runs behind the clock
        torch.accelerator.synchronize(device)


def train_student(
    recipe: Recipe,
    learning_rate: float,
    distill_weight: float,
    seed: int,
    digits: Digits,
    teacher_logits: Tensor,
    settings: Settings,
    *,
    watch: bool = True,
) -> Run:
    """Train one student. ``seed`` fixes noise, initial weights and batches, so that rows compare in pairs.

    ``watch=False`` leaves out curves and conflicts: enough to choose a learning rate.
    """
    generator = torch.Generator().manual_seed(seed)
    inputs, device = digits.student.inputs, digits.student.inputs.device
    labels = flip_labels(digits.student.labels, settings.label_noise, generator)
    student = mlp(STUDENT_WIDTHS, seed).to(device)
    parameters = list(student.parameters())
    optimizer = recipe.build(parameters, lr=learning_rate, momentum=0.9)
    reports = recipe.step is apart

    def losses_of(batch: Tensor) -> Losses:
        logits = student(inputs[batch])
        task = F.cross_entropy(logits, labels[batch])
        return [task, distillation_loss(logits, teacher_logits[batch])] if recipe.taught else [task]

    run = Run()
    seconds: list[float] = []
    for _ in range(settings.epochs):
        cosines: list[Tensor] = []
        weights: list[Tensor] = []
        for batch in batches(len(labels), generator, device):
            if watch and recipe.taught and not reports and len(seconds) % CONFLICT_EVERY == 0:
                cosines.append(gradient_cosine(losses_of(batch), parameters))

            synchronize(device)
            start = time.perf_counter()
            optimizer.zero_grad()
            losses = losses_of(batch)
            recipe.step(optimizer, losses, distill_weight)
            synchronize(device)
            seconds.append(time.perf_counter() - start)

            if watch and reports:
                # Methods of the loss values alone never compare gradients.
                if optimizer.stats.cosines is not None:
                    cosines.append(optimizer.stats.cosines[0, 1].clone())
                weights.append(optimizer.stats.weights.clone())
        if watch:
            with torch.no_grad():
                logits = student(inputs)
                run.task_loss.append(float(F.cross_entropy(logits, labels)))
                run.distill_loss.append(float(distillation_loss(logits, teacher_logits)))
            if cosines:
                run.cosine.append(float(torch.stack(cosines).mean()))
                run.conflict.append(float((torch.stack(cosines) < 0).float().mean()))
            if weights:
                run.weights.append(torch.stack(weights).mean(0).tolist())
    run.step_seconds = median(seconds)
    run.validation_accuracy = accuracy(student, digits.validation.inputs, digits.validation.labels)
    run.test_accuracy = accuracy(student, digits.test.inputs, digits.test.labels)
    return run


def grid(recipe: Recipe, settings: Settings) -> list[tuple[float, float]]:
    """The pairs (learning rate, distillation weight) from which the validation split chooses."""
    return list(itertools.product(settings.learning_rates, recipe.distill_weights))


def choose(recipe: Recipe, settings: Settings, train: Callable[..., Run]) -> Choice:
    """The point of the grid with the best mean validation accuracy, on seeds of its own."""
    seeds = range(TUNING_SEED, TUNING_SEED + settings.tuning_seeds)
    scores = {
        point: fmean(train(recipe, *point, seed, watch=False).validation_accuracy for seed in seeds)
        for point in grid(recipe, settings)
    }
    best = max(scores, key=scores.__getitem__)
    at_border = best[0] in (min(settings.learning_rates), max(settings.learning_rates))
    return Choice(*best, scores[best], at_border)


def count_runs(settings: Settings, keys: Iterable[str]) -> int:
    """How many students ``study`` trains."""
    rows = recipes(settings)
    return sum(len(grid(rows[key], settings)) * settings.tuning_seeds + settings.seeds for key in keys)


def study(settings: Settings, keys: Sequence[str], advance: Callable[[str], None]) -> Study:
    """Train the teacher, choose every row's learning rate, then train every row on every seed.

    ``advance`` is called with a description after every student.
    """
    with one_thread():
        digits = load_splits(settings.device)
        teacher = train_teacher(digits, settings)
        with torch.no_grad():
            teacher_logits = teacher(digits.student.inputs)

        def train(recipe: Recipe, rate: float, weight: float, seed: int, watch: bool = True) -> Run:
            run = train_student(recipe, rate, weight, seed, digits, teacher_logits, settings, watch=watch)
            advance(recipe.label)
            return run

        chosen = {key: recipes(settings)[key] for key in keys}
        rows = {key: Row(r.label, choose(r, settings, train), []) for key, r in chosen.items()}
        # Seed by seed through all rows: whatever else the machine does then slows all of them alike.
        for seed in range(settings.seeds):
            for key, row in rows.items():
                choice = row.choice
                row.runs.append(train(chosen[key], choice.learning_rate, choice.distill_weight, seed))
        return Study(settings, accuracy(teacher, digits.test.inputs, digits.test.labels), rows)


@contextmanager
def one_thread() -> Iterator[None]:
    """Networks this small are faster on one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
