"""What a rule of the combination is: a function, or one with a memory."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

#: A rule without a memory: the Gram matrix of the gradients that are combined, shape (..., K, K), and the values of the
#: losses, shape (..., K), both float64 on one device, to K numbers, shape (..., K).
Method = Callable[[Tensor, Tensor], Tensor]

#: The memory of a rule, by name. Every entry has the shape (), (K,) or (K, K), the last two in the order of the losses.
State = dict[str, Tensor]

_Function = TypeVar("_Function", bound=Callable[..., Tensor])


class Stateful:
    """A rule with a memory that is handed in and out: the rule itself never changes.

    Subclasses are frozen dataclasses of their options, so that they compare, copy and pickle.

    Attributes:
        uses_gram: whether the Gram matrix is looked at; None may be given for it otherwise.
        uses_losses: whether the values of the losses are looked at, or their number alone.
        looks_back: whether the rule wants the losses again after the step, see :meth:`observe`.
    """

    uses_gram: ClassVar[bool] = True
    uses_losses: ClassVar[bool] = True
    looks_back: ClassVar[bool] = False

    def init(self, losses: Tensor) -> State:
        """The memory before the first step.

        Args:
            losses: values of the losses, shape (K,); their number, type and device are what counts.
        """
        raise NotImplementedError  # every rule has its own

    def __call__(self, gram: Tensor, losses: Tensor, state: State) -> tuple[Tensor, State]:
        """One step.

        Args:
            gram: inner products of the gradients that are combined, shape (K, K).
            losses: values of the losses, shape (K,).
            state: the memory; it is not changed.

        Returns:
            K numbers, and the memory for the next step.
        """
        raise NotImplementedError  # every rule has its own

    def observe(self, losses: Tensor, state: State) -> State:
        """Takes in the losses of the same batch after the step.

        Args:
            losses: shape (K,).
            state: the memory that the step returned.

        Returns:
            The memory for the next step.
        """
        return state


def losses_only(function: _Function) -> _Function:
    """Marks a method that never looks at the Gram matrix, so that nobody has to compute one for it."""
    setattr(function, "uses_gram", False)  # noqa: B010  # a function has no such attribute for a type checker
    return function


def uses_gram(rule: Any) -> bool:
    """Whether a rule has to be given the Gram matrix; a function is taken to, unless it is marked.

    Example:
        >>> from distill_optim.combine import mean, min_norm
        >>> uses_gram(min_norm), uses_gram(mean)
        (True, False)
    """
    while isinstance(rule, partial):
        rule = rule.func
    return bool(getattr(rule, "uses_gram", True))


def apply(rule: Method | Stateful, gram: Tensor, losses: Tensor, state: State) -> tuple[Tensor, State]:
    """A rule's numbers and its next memory; an empty memory stands for the one before the first step."""
    if isinstance(rule, Stateful):
        return rule(gram, losses, state or rule.init(losses))
    return rule(gram, losses), {}


def vector(values: Any, like: Tensor) -> Tensor:
    """Numbers from the host as a tensor, by fills, because a copy to an accelerator would wait for it."""
    if isinstance(values, Tensor):
        return values.to(like)
    return torch.stack([torch.full((), float(v), dtype=like.dtype, device=like.device) for v in values])


def where_finite(gram: Tensor, weights: Tensor) -> Tensor:
    """The weights, or nan for all of them where the Gram matrix is not finite.

    Example:
        >>> where_finite(torch.tensor([[1.0, 0.0], [0.0, torch.inf]]), torch.tensor([1.0, 0.0]))
        tensor([nan, nan])
    """
    return torch.where(torch.isfinite(gram).all(-1).all(-1)[..., None], weights, torch.nan)


def keep(worth: Tensor, new: State, old: State) -> State:
    """The new memory, or the old one where the step is not worth keeping.

    One loss that is not finite, as mixed precision gives now and then, would otherwise stay in the averages for ever.

    Args:
        worth: one truth value, shape ().
        new: the memory after the step.
        old: the memory before it, with the same entries.

    Example:
        >>> keep(torch.tensor(False), {"total": torch.tensor(torch.nan)}, {"total": torch.tensor(2.0)})
        {'total': tensor(2.)}
    """
    return {name: torch.where(worth, new[name], value) for name, value in old.items()}
