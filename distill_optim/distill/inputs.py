"""What every loss does with what it is given, before its equation."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def pair(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Both in one dtype, float32 or wider, and the teacher as a constant.

    Half precision has three digits: enough for what a layer hands on, not for a sum of exponentials over a vocabulary.
    No gradient flows to a teacher, whether or not it ran under ``torch.no_grad()``.

    Raises:
        TypeError: for anything but floating-point tensors.

    Example:
        >>> student, teacher = pair(torch.ones(2, dtype=torch.bfloat16), torch.ones(2, requires_grad=True))
        >>> student.dtype, teacher.requires_grad
        (torch.float32, False)
    """
    expect_numbers(student=student, teacher=teacher)
    dtype = torch.promote_types(torch.promote_types(student.dtype, teacher.dtype), torch.float32)
    return student.to(dtype), teacher.detach().to(dtype)


def expect_numbers(**given: Tensor) -> None:
    """Refuses what is no floating-point tensor, by its name.

    Raises:
        TypeError: with what was found, and the mend.
    """
    for name, value in given.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"{name}: expected a tensor, got {type(value).__name__}; take its logits or features")
        if not value.is_floating_point():
            raise TypeError(f"{name}: expected floating-point numbers, got {value.dtype}; not labels or indices")


def expect_same(student: Sequence[int], teacher: Sequence[int], mend: str, what: str = "shape") -> None:
    """Refuses a teacher of another shape than the student's.

    Raises:
        ValueError: with what was found, and the mend.
    """
    if tuple(student) != tuple(teacher):
        raise ValueError(f"teacher: {what} {tuple(teacher)}, but the student's is {tuple(student)}; {mend}")


def expect_positive(temperature: float) -> None:
    """Refuses a temperature that is none.

    Raises:
        ValueError: unless it is positive.
    """
    if not temperature > 0:
        raise ValueError(f"temperature={temperature}: expected a positive number")


def channels_last(features: Tensor) -> Tensor:
    """Maps (N, C, H, W, …) as (N, H, W, …, C); vectors (N, C) and tokens (N, L, C) as they are.

    A 1×1 convolution of the map is a linear layer of what comes out, and so all three have one equation.

    Example:
        >>> [tuple(channels_last(torch.ones(shape)).shape) for shape in ((2, 3), (2, 5, 3), (2, 3, 5, 6))]
        [(2, 3), (2, 5, 3), (2, 5, 6, 3)]
    """
    return features.movedim(1, -1) if features.ndim >= 4 else features


def full_precision(x: Tensor) -> torch.autocast:
    """A context in which autocast leaves matrix products in the dtype of their factors."""
    return torch.autocast(x.device.type, enabled=False)


def unit(x: Tensor, dim: int = -1) -> Tensor:
    """x/‖x‖, and 0 where x is 0.

    Example:
        >>> unit(torch.tensor([[3.0, 4.0], [0.0, 0.0]]))
        tensor([[0.6000, 0.8000],
                [0.0000, 0.0000]])
    """
    norm = torch.linalg.vector_norm(x, dim=dim, keepdim=True)
    normalised: Tensor = x / norm.masked_fill(norm == 0, 1)
    return normalised


def centred_unit(x: Tensor, dim: int = -1) -> Tensor:
    """(x − x̄)/‖x − x̄‖; 0, without a gradient, where x is constant up to rounding.

    What is left of a constant after rounding has a direction too, an arbitrary one, whose gradient would drown all
    others.

    Example:
        >>> centred_unit(torch.tensor([[0.0, 2.0], [0.1, 0.1]]))
        tensor([[-0.7071,  0.7071],
                [ 0.0000,  0.0000]])
    """
    centred = x - x.mean(dim, keepdim=True)
    with torch.no_grad():
        # Of a constant each difference is about ε |x|, and all of them ε ‖x‖; √n is for the error of the mean.
        rounding = x.shape[dim] ** 0.5 * torch.finfo(x.dtype).eps * torch.linalg.vector_norm(x, dim=dim, keepdim=True)
        constant = torch.linalg.vector_norm(centred, dim=dim, keepdim=True) <= rounding
    return unit(centred.masked_fill(constant, 0), dim)
