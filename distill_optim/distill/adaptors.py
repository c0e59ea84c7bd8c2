"""Task adaptors: one student, a teacher per task, and a linear map per task and layer between them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from distill_optim.distill.features import features
from distill_optim.distill.inputs import channels_last, expect_same, pair


def linear(student_width: int, teacher_width: int) -> nn.Module:
    """The paper's adaptor: a linear layer without bias, for maps a 1×1 convolution."""
    return nn.Linear(student_width, teacher_width, bias=False)


def normalized_distance(student: Tensor, teacher: Tensor) -> Tensor:
    r"""Squared distance of features that have, nearly, length 1; the mean over positions.

    .. math:: d(f^s, f^t) = \operatorname{mean} \lVert \hat f^s - \hat f^t \rVert^2, \qquad
        \hat f = f \Big/ \sqrt{\textstyle\sum_c f_c^2 + 10^{-6}}

    Both of shape (..., C), the channels last. Between 0 and 4.

    Example:
        >>> normalized_distance(torch.tensor([[1000.0, 0.0]]), torch.tensor([[0.0, 2000.0]]))
        tensor(2.)
    """
    student, teacher = pair(student, teacher)
    expect_same(student.shape, teacher.shape, "after the adaptor both need the same batch, positions and channels")
    f_s, f_t = (f / (f.square().sum(-1, keepdim=True) + 1e-6).sqrt() for f in (student, teacher))
    return (f_s - f_t).square().sum(-1).mean()


class TaskAdaptors(nn.Module):
    r"""Distances of a multi-task student's features to those of one teacher per task.

    For task τ, distilled layers ℓ and an adaptor :math:`A_{\tau\ell}` per pair,

    .. math:: D_\tau = \sum_\ell \operatorname{mean}_p \bigl\lVert \hat f^s_p - \hat f^\tau_p \bigr\rVert^2, \qquad
        f^s = A_{\tau\ell} F^s_\ell, \quad f^\tau = F^\tau_\ell, \quad
        \hat f_p = f_p \Big/ \sqrt{\lVert f_p \rVert^2 + 10^{-6}}

    over examples and positions p. Li & Bilen, *Knowledge distillation for multi-task learning* (2020). The adaptor
    takes up what is special to a teacher, so that the shared features need not; a linear one suffices, they found. The
    whole loss of the paper is :math:`\sum_\tau L_\tau + \lambda_\tau D_\tau`; the adaptors have an optimizer of their
    own there (Adam, lr 0.1).

    The teachers are frozen, and run in eval mode whatever mode they or this module were put into, so that the
    statistics of their batch norms stay (the authors' code forgets that). They move along with ``.to()``, but are no
    submodules: their weights are not among ``parameters()`` and not in the state dict.

    Args:
        student: run once, in eval mode and without a graph, to see how wide its layers are; not kept.
        teachers: a model per task, by the task's name, which has no dot; ``requires_grad`` is switched off.
        layers: names of the layers, the same in the student and the teachers; or a mapping from the student's to the
            teachers'. Feature maps (N, C, H, W), tokens (N, L, C) and vectors (N, C).
        inputs: what student and teachers are called with, an example of it.
        adaptor: makes an adaptor from the width of the student's and of the teacher's layer. It is called on features
            with the channels last. A non-linear one: ``lambda s, t: nn.Sequential(nn.Linear(s, t), nn.ReLU(),
            nn.Linear(t, t))``.

    Raises:
        TypeError: for one string in the place of several layers, or a layer that returns no tensor.
        ValueError: for a layer that is not there, a task with a dot in its name, no task or no layer.

    Example:
        >>> from torch import nn
        >>> def net(width):
        ...     return nn.Sequential(nn.Conv2d(1, width, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16 * width, 2))
        >>> x = torch.randn(4, 1, 6, 6)
        >>> student, teachers = net(3), {"left": net(5), "right": net(5)}
        >>> seen = distill_optim.distill.features(student, ["1"])
        >>> adaptors = TaskAdaptors(student, teachers, ["1"], x)
        >>> outputs = student(x)
        >>> list(adaptors(seen, x))
        ['left', 'right']
    """

    def __init__(
        self,
        student: nn.Module,
        teachers: Mapping[str, nn.Module],
        layers: Iterable[str] | Mapping[str, str],
        *inputs: object,
        adaptor: Callable[[int, int], nn.Module] = linear,
    ) -> None:
        super().__init__()
        if isinstance(layers, str):
            raise TypeError(f"layers={layers!r}: expected several names; for one layer give [{layers!r}]")
        self.layers = dict(layers) if isinstance(layers, Mapping) else {name: name for name in layers}
        self._teachers = dict(teachers)  # in a plain dict they are no submodules
        if not self.layers or not self._teachers:
            raise ValueError(
                f"teachers: {len(self._teachers)} of them, layers: {len(self.layers)}; give at least one of each"
            )
        for task in self._teachers:
            if "." in task:
                raise ValueError(
                    f"teachers: {task!r} has a dot, which names in a state dict cannot have; rename the task"
                )
        modes = {module: module.training for module in student.modules()}
        try:
            own = _run(student, self.layers, inputs)
        finally:
            for module, mode in modes.items():
                module.training = mode
        self.adaptors = nn.ModuleDict()
        for task, teacher in self._teachers.items():
            taught = _run(teacher, self.layers.values(), inputs)
            self.adaptors[task] = nn.ModuleList(
                adaptor(channels_last(s).shape[-1], channels_last(t).shape[-1]).to(s)
                for s, t in zip(own, taught, strict=True)
            )
        for teacher in self._teachers.values():
            teacher.requires_grad_(False)

    def forward(self, student_features: Mapping[str, Tensor], *inputs: object) -> dict[str, Tensor]:
        """The distance of each task, scalars in float32 or wider, with the teachers run on the same inputs."""
        distances = {}
        for task, teacher in self._teachers.items():
            taught = _run(teacher, self.layers.values(), inputs)
            adapted = [
                adaptor(channels_last(student_features[name]))
                for name, adaptor in zip(self.layers, self.adaptors[task].children(), strict=True)
            ]
            parts = [normalized_distance(s, channels_last(t)) for s, t in zip(adapted, taught, strict=True)]
            distances[task] = torch.stack(parts).sum()
        return distances

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        for teacher in self._teachers.values():
            teacher._apply(fn, recurse)
        return nn.Module._apply(self, fn, recurse)


def _run(model: nn.Module, layers: Iterable[str], inputs: tuple[object, ...]) -> list[Tensor]:
    """The features of a model in eval mode, without a graph."""
    with torch.no_grad(), features(model, layers) as taken:
        model.eval()(*inputs)
    return [taken[name] for name in layers]
