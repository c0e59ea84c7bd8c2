"""Every loss in one form, for the tests of what all have in common; and strategies of what they are given."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from torch import Tensor

from distill_optim import distill

DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
LABELS = {device: torch.tensor([0, 4, 2, 1], device=device) for device in DEVICES}
MASK = {device: torch.tensor([True, True, False, True], device=device) for device in DEVICES}
PROJECTOR = {device: distill.SubspaceProjector(5, 7).to(device, torch.float64) for device in DEVICES}
for made in PROJECTOR.values():
    torch.nn.init.normal_(made.free, std=0.4, generator=torch.Generator(made.free.device).manual_seed(1))
EPS = torch.finfo(torch.float64).eps


@dataclass(frozen=True)
class Loss:
    """A loss of two tensors, and shapes that fit."""

    of: Callable[[Tensor, Tensor], Tensor | tuple[Tensor, ...]]
    student: tuple[int, ...]
    teacher: tuple[int, ...]

    def __call__(self, student: Tensor, teacher: Tensor) -> tuple[Tensor, ...]:
        value = self.of(student, teacher)
        return (value,) if isinstance(value, Tensor) else tuple(value)

    def draw(self, dtype: torch.dtype = torch.float64, device: str = "cpu") -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(3)
        student, teacher = (
            torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype)
            for shape in (self.student, self.teacher)
        )
        return student.requires_grad_(), teacher


LOSSES: dict[str, Loss] = {
    "kd": Loss(distill.kd, (4, 5), (4, 5)),
    "KDLoss": Loss(distill.KDLoss(2.0), (4, 5), (4, 5)),
    "kd of tokens": Loss(distill.kd, (2, 3, 5), (2, 3, 5)),
    "kd, standardized": Loss(
        lambda s, t: distill.kd(distill.standardize(s), distill.standardize(t), 2.0), (4, 5), (4, 5)
    ),
    "dkd": Loss(lambda s, t: distill.dkd(s, t, LABELS[t.device.type]), (4, 5), (4, 5)),
    "dist": Loss(distill.dist, (4, 5), (4, 5)),
    "hint": Loss(distill.hint, (4, 3, 2, 2), (4, 3, 2, 2)),
    "attention_transfer": Loss(distill.attention_transfer, (4, 3, 2, 5), (4, 6, 2, 5)),
    "rkd": Loss(distill.rkd, (4, 5), (4, 3)),
    "generalized_jsd": Loss(lambda s, t: distill.generalized_jsd(s, t, MASK[t.device.type]), (4, 5), (4, 5)),
    "forward kl": Loss(lambda s, t: distill.generalized_jsd(s, t, beta=0.0), (2, 3, 5), (2, 3, 5)),
    "reverse kl": Loss(lambda s, t: distill.generalized_jsd(s, t, beta=1.0), (2, 3, 5), (2, 3, 5)),
    "SubspaceProjector": Loss(lambda s, t: PROJECTOR[t.device.type](s, t), (4, 5), (4, 7)),
}


def matrices(rows: int = 4, columns: int = 5, largest: float = 20.0) -> st.SearchStrategy[Tensor]:
    """Of shape (rows, columns), float64, entries of any size up to one."""
    return arrays(np.float64, (rows, columns), elements=st.floats(-largest, largest)).map(torch.from_numpy)


def normal(rows: int = 4, columns: int = 5) -> st.SearchStrategy[Tensor]:
    """Of shape (rows, columns), float64, none of it nearly constant and no two rows alike."""

    def draw(seed: int) -> Tensor:
        return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)

    return st.integers(0, 2**31).map(draw)


temperatures = st.floats(0.5, 10)
