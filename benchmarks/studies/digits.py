"""A small student of scikit-learn's digits, with a teacher that saw more of them."""

from __future__ import annotations

import copy
import functools
from collections import defaultdict
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.studies.harness import Measures, Options
from benchmarks.studies.training import Forward, fit, shuffled
from distill_optim import MoKDSGD
from distill_optim.demo.data import CLASSES, PIXELS, Split, flip_labels, load_splits
from distill_optim.demo.train import TEACHER_WIDTHS, accuracy, mlp
from distill_optim.distill import SubspaceProjector, kd

TEACHER, VALIDATION = 500, 300
BATCH = 50
LOOK_EVERY = 10  # steps


class Problem(NamedTuple):
    """What all methods share of one seed.

    Attributes:
        inputs, labels: of the student, (n, 64) and (n,); some labels are wrong.
        features, logits: of the teacher, for the student's inputs, (n, 256) and (n, 10).
        validation, test: with clean labels.
        options: of the problem.
    """

    inputs: Tensor
    labels: Tensor
    features: Tensor
    logits: Tensor
    validation: Split
    test: Split
    options: Options


@functools.cache
def dealt() -> tuple[Split, Split]:
    """The test split, the same for every seed, and the rest."""
    digits = load_splits()
    parts = (digits.student, digits.teacher, digits.validation)
    return digits.test, Split(*(torch.cat(tensors) for tensors in zip(*parts, strict=True)))


def prepare(options: Options, seed: int) -> Problem:
    """Deals what is not for the test anew for every seed, and trains a teacher on its part.

    Args:
        options: ``images``, of the student; ``noise``, the share of its labels that are wrong; ``width`` of its hidden
            layer; ``steps`` and ``teacher_steps`` of the trainings.
        seed: of the splits, the wrong labels, both networks and the batches.
    """
    generator = torch.Generator().manual_seed(seed)
    test, rest = dealt()
    order = torch.randperm(len(rest.labels), generator=generator)
    sizes = (TEACHER, VALIDATION, options["images"])
    taught, validation, own = (Split(*(tensor[rows] for tensor in rest)) for rows in order[: sum(sizes)].split(sizes))
    teacher = mlp(TEACHER_WIDTHS, seed)

    def forward(batch: Tensor) -> Forward:
        logits = teacher(taught.inputs[batch])
        return Forward([F.cross_entropy(logits, taught.labels[batch])], logits)

    how = {"optimizer": "SGD", "lr": 0.05, "arguments": {"momentum": 0.9}}
    for _ in fit(teacher.parameters(), shuffled(TEACHER, BATCH, options["teacher_steps"], seed), forward, how):
        pass
    with torch.no_grad():
        features = teacher[:-1](own.inputs)
        logits = teacher[-1](features)
    labels = flip_labels(own.labels, options["noise"], generator)
    return Problem(own.inputs, labels, features, logits, validation, test, options)


class Regressor(nn.Module):
    """The projector's loss with a free linear map in the place of an orthonormal one."""

    def __init__(self, student_width: int, teacher_width: int) -> None:
        super().__init__()
        self.map = nn.Linear(student_width, teacher_width, bias=False)

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        return F.smooth_l1_loss(self.map(student), F.layer_norm(teacher, teacher.shape[-1:]))


MAPS = {"projector": SubspaceProjector, "regressor": Regressor}


def train(problem: Problem, options: Options, seed: int, final: bool) -> Measures:
    """One student.

    Args:
        problem: data and teacher.
        options: those of ``fit``; ``distill``, the losses beside the task: ``"logits"``, and a map of the features;
            ``early_stopping``, whether the student is the best on the validation split of those seen on the way.
        seed: of initial weights and batches.
        final: whether to look at the test split, and, if the problem says ``watch``, at the gradients on the way.

    Returns:
        Validation and test accuracy; the losses over the student's images at the end, ``task``, ``logits`` and
        ``features``; and curves of what the gradients of single batches were like.
    """
    width = problem.options["width"]
    student = mlp((PIXELS, width, CLASSES), seed)
    body, head = student[:-1], student[-1]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        maps = nn.ModuleList(
            MAPS[name](width, problem.features.shape[1]) for name in options["distill"] if name in MAPS
        )

    def forward(batch: Tensor) -> Forward:
        features = body(problem.inputs[batch])
        logits = head(features)
        losses = [F.cross_entropy(logits, problem.labels[batch])]
        if "logits" in options["distill"]:
            losses.append(kd(logits, problem.logits[batch]))
        losses += [project(features, problem.features[batch]) for project in maps]
        return Forward(losses, features if maps else logits)

    curves = defaultdict[str, list[float]](list)
    best, kept = -1.0, {}
    images = len(problem.labels)
    batches = shuffled(images, BATCH, problem.options["steps"], seed)
    looks = shuffled(images, BATCH, len(batches), seed + 1)
    for step, optimizer in enumerate(fit([*student.parameters(), *maps.parameters()], batches, forward, options)):
        if (step + 1) % LOOK_EVERY:
            continue
        if options.get("early_stopping"):
            score = accuracy(student, problem.validation.inputs, problem.validation.labels)
            if score > best:
                best, kept = score, copy.deepcopy(student.state_dict())
        if final and problem.options.get("watch"):
            for name, value in gradients(forward(looks[step]).losses, list(student.parameters())).items():
                curves[name].append(value)
            if isinstance(optimizer, MoKDSGD) and optimizer.stats:
                curves["weight"].append(float(optimizer.stats.weights[1]))
    if kept:
        student.load_state_dict(kept)

    with torch.no_grad():
        losses = forward(torch.arange(images)).losses
    names = ["task", *("features" if name in MAPS else name for name in options["distill"])]
    measures = {name: float(loss) for name, loss in zip(names, losses, strict=True)}
    measures["validation"] = accuracy(student, problem.validation.inputs, problem.validation.labels)
    if final:
        measures["test"] = accuracy(student, problem.test.inputs, problem.test.labels)
    return {**measures, **curves}


def gradients(losses: list[Tensor], params: list[nn.Parameter]) -> dict[str, float]:
    """Conflict and dominance of two losses: the cosine of their gradients, and how much longer the second is."""
    task, distill = (
        torch.cat([g.flatten() for g in torch.autograd.grad(loss, params, retain_graph=True, materialize_grads=True)])
        for loss in losses
    )
    return {
        "cosine": float(F.cosine_similarity(task, distill, dim=0)),
        "log_ratio": float((distill.norm() / task.norm()).log10()),
    }
