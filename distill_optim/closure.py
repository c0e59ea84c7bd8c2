"""Several losses for loops that own the closure or the backward pass."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from distill_optim.gradients import Losses, by_index, check_losses, is_losses
from distill_optim.multi_loss import MultiLossOptimizer, Through, Walk, unwrap


class MultiLossClosure:
    """An ordinary closure around a function that returns several losses.

    Handed to the ``step`` of one of our optimizers it keeps the losses apart; handed to any torch optimizer's, it
    does what a closure does there: ``zero_grad``, sum, backward, and the total as the result. So one loop
    compares them all, also where a framework wraps the closure in one of its own.

    Args:
        fn: returns scalar losses as a list, tuple or mapping.
        optimizer: the optimizer that it will be handed to, or a framework's wrapper around it.
        through: as in :meth:`MultiLossOptimizer.backward`; for our optimizers only. May be a function without
            arguments, called after ``fn``, for a tensor that ``fn`` makes.

    Raises:
        TypeError: if ``fn`` is not callable, ``optimizer`` is not an optimizer, or ``fn`` returns something else.

    Example:
        >>> w = torch.nn.Parameter(torch.ones(2))
        >>> for optimizer in torch.optim.SGD([w], lr=0.1), distill_optim.DOTSGD([w], lr=0.1):
        ...     closure = distill_optim.MultiLossClosure(lambda: [w.sum(), w.square().sum()], optimizer)
        ...     round(optimizer.step(closure).item(), 4)
        4.0
        2.38
    """

    def __init__(
        self, fn: Callable[[], Losses], optimizer: Any, *, through: Through | Callable[[], Through] | None = None
    ) -> None:
        if not callable(fn):
            raise TypeError(f"fn: expected a function that returns losses, got {type(fn).__name__}")
        if not isinstance(unwrap(optimizer), torch.optim.Optimizer):
            raise TypeError(f"optimizer: expected a torch optimizer, got {type(optimizer).__name__}")
        self.fn = fn
        self.optimizer = optimizer
        self.through = through

    def __call__(self) -> Tensor:
        """Runs the function and the backward passes; returns the sum of the losses, detached."""
        optimizer = unwrap(self.optimizer)
        optimizer.zero_grad()
        with torch.enable_grad():
            losses = self.fn()
            if not is_losses(losses):
                raise TypeError(f"fn: it returned {type(losses).__name__}; expected losses as a list, tuple or mapping")
            total = _total(losses)
            if isinstance(optimizer, MultiLossOptimizer):
                through = self.through() if callable(self.through) else self.through
                optimizer.backward(losses, through=through)
            else:
                total.backward()
        return total.detach()


def joint_loss(losses: Losses, optimizer: Any, through: Through | None = None) -> Tensor:
    """One scalar for several losses, for whoever calls ``.backward()`` on it.

    Its value is the sum. When it is walked back, scaled or not, the gradient of every loss is collected for the
    optimizer's next ``step()``, and ``.grad`` holds what the sum's backward would have left there. Where no grad is
    recorded (evaluation) it is just the sum.

    Args:
        losses: scalar losses: a list or tuple in the order of the optimizer's ``losses=``, or a mapping by name.
        optimizer: one of ours, or a framework's wrapper around it.
        through: as in :meth:`MultiLossOptimizer.backward`.

    Returns:
        A scalar tensor.

    Raises:
        TypeError: if the optimizer is not one of ours.
        TypeError, ValueError: for losses that cannot be right, as in :meth:`MultiLossOptimizer.step`.

    Example:
        >>> w = torch.nn.Parameter(torch.ones(2))
        >>> optimizer = distill_optim.MoKDSGD([w], lr=0.1)
        >>> loss = distill_optim.joint_loss([w.sum(), w.square().sum()], optimizer)
        >>> loss.item()
        4.0
        >>> (loss / 2).backward()
        >>> w.grad
        tensor([1.5000, 1.5000])
        >>> optimizer.step()
    """
    ours = unwrap(optimizer)
    if not isinstance(ours, MultiLossOptimizer):
        raise TypeError(
            f"optimizer: expected one of distill_optim's, or a wrapper that holds it in .optimizer, got "
            f"{type(optimizer).__name__}"
        )
    if not is_losses(losses):
        raise TypeError(f"losses: expected a list, tuple or mapping, got {type(losses).__name__}")
    indexed = by_index(losses, ours.defaults["losses"])
    total = _total(losses)
    if not total.requires_grad:
        return total
    check_losses(indexed, ours.defaults["losses"])
    anchor = torch.zeros((), dtype=total.dtype, device=total.device, requires_grad=True)
    # Packed, so that autograd does not take ``through`` for an input and walk on from it.
    packed = (losses, ours, through)
    joint: Tensor = _Joint.apply(anchor, total.detach(), packed)  # type: ignore[no-untyped-call]  # torch's
    return joint


def _total(losses: Losses) -> Tensor:
    return torch.as_tensor(sum(losses.values() if isinstance(losses, Mapping) else losses))


class _Joint(torch.autograd.Function):
    """The sum, with the collection of the gradients as its backward.

    The losses are not inputs: their graphs are walked back by ordinary backward passes nested in this one, so that
    everything that hangs on such passes (hooks, sharded parameters) works. The anchor is there to be differentiable.
    """

    @staticmethod
    def forward(
        ctx: Any, anchor: Tensor, total: Tensor, packed: tuple[Losses, MultiLossOptimizer, Through | None]
    ) -> Tensor:
        ctx.packed = packed
        return total.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, ...]:
        losses, optimizer, through = ctx.packed
        keep_graph: bool = torch._C._autograd._get_current_graph_task_keep_graph()
        optimizer._backward(losses, Walk(grads[0], through, joint=True, retain_graph=keep_graph))
        return (None,) * 3
