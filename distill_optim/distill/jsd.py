"""Generalised Jensen-Shannon divergence of language models, in little memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from distill_optim.distill.inputs import expect_numbers, expect_positive, expect_same, pair
from distill_optim.distill.kd import kl, log_probabilities

# Numbers in flight at a time: 16 MB in float32, of which the divergence and its backward take a dozen.
_CHUNK = 2**22


def generalized_jsd(
    student: Tensor, teacher: Tensor, mask: Tensor | None = None, *, beta: float = 0.5, temperature: float = 1.0
) -> Tensor:
    r"""Divergence of the next-token distributions, between forward and reverse Kullback-Leibler.

    With the teacher's :math:`p`, the student's :math:`q` and :math:`m = \beta p + (1 - \beta) q`,

    .. math:: \mathrm{JSD}_\beta = \beta\,\mathrm{KL}(p \,\Vert\, m) + (1 - \beta)\,\mathrm{KL}(q \,\Vert\, m)

    the mean over the tokens that count. Agarwal et al., *On-policy distillation of language models* (ICLR 2024). At
    β = 0 and 1, where that is 0, it is :math:`\mathrm{KL}(p \,\Vert\, q)` and :math:`\mathrm{KL}(q \,\Vert\, p)`: the
    limits of :math:`\mathrm{JSD}_\beta / \beta` and :math:`\mathrm{JSD}_\beta / (1 - \beta)`. Small β covers all that
    the teacher says, β near 1 seeks one of its modes. In between the value is at most the entropy of (β, 1 − β), which
    is at most log 2. As in the paper there is no factor T², unlike in :func:`~distill_optim.distill.kd`.

    It walks over the tokens in pieces, in both passes, and computes each piece anew in the backward pass. So beside the
    logits there is one tensor of their size, the gradient in the student's dtype, and nothing of it in float32. The
    gradient cannot be differentiated once more.

    Args:
        student: logits of shape (..., V), of any strides: slices need no copy.
        teacher: logits of the same shape; taken as a constant.
        mask: which tokens count, booleans of shape (...), as ``labels != -100``. None: all. Whatever the logits of the
            others are, nan too, they have no gradient. If no token counts, the value is 0.
        beta: β, in [0, 1].
        temperature: T, by which the logits are divided.

    Returns:
        A scalar, in float32 or wider.

    Raises:
        TypeError, ValueError: for shapes that do not fit, dtypes that are none of these, β outside [0, 1], or a
            temperature that is not positive.

    Example:
        >>> teacher = torch.tensor([[[2.0, 0.0], [0.0, 9.0]]])
        >>> counts = torch.tensor([[True, False]])
        >>> generalized_jsd(torch.zeros(1, 2, 2), teacher, counts, beta=0.0)
        tensor(0.3278)
    """
    expect_positive(temperature)
    if not 0 <= beta <= 1:
        raise ValueError(
            f"beta={beta}: expected a number in [0, 1]; 0 is KL(teacher ‖ student), 1 KL(student ‖ teacher)"
        )
    expect_numbers(student=student, teacher=teacher)
    expect_same(student.shape, teacher.shape, "both need the same tokens and the same vocabulary")
    if mask is None:
        mask = torch.ones(student.shape[:-1], dtype=torch.bool, device=student.device)
    if mask.dtype != torch.bool:
        raise TypeError(f"mask: expected booleans, got {mask.dtype}; for an attention mask give attention_mask.bool()")
    if mask.shape != student.shape[:-1]:
        raise ValueError(
            f"mask: shape {tuple(mask.shape)}, but the tokens' is {tuple(student.shape[:-1])}; one for each"
        )
    total: Tensor = _Sum.apply(student, teacher.detach(), mask, beta, temperature)  # type: ignore[no-untyped-call]  # torch's
    return total / mask.sum().clamp_min(1)


def divergences(student: Tensor, teacher: Tensor, beta: float, temperature: float) -> Tensor:
    """JSD of each token, shape (...)."""
    log_q, log_p = log_probabilities(student, temperature), log_probabilities(teacher, temperature)
    # log m; at either end it is the other side's own logarithm, and so one of the two terms vanishes.
    log_beta, log_rest = (log_p.new_full((), x).log() for x in (beta, 1 - beta))
    log_m = torch.logaddexp(log_p + log_beta, log_q + log_rest)
    return (beta or 1) * kl(log_p, log_m) + ((1 - beta) or 1) * kl(log_q, log_m)


def _unravel(rows: Tensor, shape: Sequence[int]) -> tuple[Tensor, ...]:
    """Where flat rows lie in a shape. (torch.unravel_index sends the shape to the device, and waits for that.)"""
    index: tuple[Tensor, ...] = ()
    for size in reversed(shape):
        index = (rows % size, *index)
        rows = rows // size
    return index


def _pieces(student: Tensor, teacher: Tensor, mask: Tensor) -> Iterator[tuple[slice, Tensor, Tensor, Tensor]]:
    """Some tokens at a time: which of them, and their logits and mask; a padded token's logits are 0."""
    rows = max(_CHUNK // student.shape[-1], 1)
    for start in range(0, max(mask.numel(), 1), rows):
        where = slice(start, min(start + rows, mask.numel()))
        index = _unravel(torch.arange(where.start, where.stop, device=mask.device), mask.shape)
        counts = mask[index]
        logits, target = (x[index].masked_fill(~counts[:, None], 0) for x in (student, teacher))
        yield where, logits, target, counts


class _Sum(torch.autograd.Function):
    """The sum of the divergences of the tokens that count, with a backward that computes them anew."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, mask: Tensor, beta: float, temperature: float) -> Tensor:
        ctx.save_for_backward(student, teacher, mask)
        ctx.options = beta, temperature
        parts = [
            (divergences(*pair(s, t), beta, temperature) * counts).sum()
            for _, s, t, counts in _pieces(student, teacher, mask)
        ]
        return torch.stack(parts).sum()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        student, teacher, mask = ctx.saved_tensors
        total = torch.empty(mask.numel(), student.shape[-1], dtype=student.dtype, device=student.device)
        for where, s, t, counts in _pieces(student, teacher, mask):
            with torch.enable_grad():
                q, p = pair(s.requires_grad_(), t)
                value = (divergences(q, p, *ctx.options) * counts).sum()
            (total[where],) = torch.autograd.grad(value, s, grad)
        return total.view(student.shape), None, None, None, None
