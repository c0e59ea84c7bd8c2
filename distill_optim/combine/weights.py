"""The whole walk from Gram matrix and losses to the weights on the raw gradients."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from distill_optim.combine.dominance import dominance_rule
from distill_optim.combine.gram import gram as gram_of
from distill_optim.combine.methods import method, own_dominance
from distill_optim.combine.rules import Method, State, Stateful, apply, uses_gram


def weights(
    gram: Tensor,
    losses: Tensor,
    *,
    combine: str | Method | Stateful = "min_norm",
    dominance: str | Method | Stateful = "log",
    rescale: bool = True,
) -> Tensor:
    r"""Weights on the raw gradients, as :class:`~distill_optim.MoKDSGD` applies them in its first step.

    With :math:`s` from ``dominance``, :math:`\pi` from ``combine`` on the Gram matrix of the gradients
    :math:`s_i g_i`, the weights are :math:`w_i = \pi_i s_i`. ``rescale`` brings :math:`\sum_i |w_i|` to K, so that a
    learning rate tuned for the summed loss keeps its meaning; without it the step is :math:`\sum_i \pi_i s_i g_i`
    itself. (Most methods' weights are never negative, so that their plain sum is K. Where some are, a sum may vanish
    while the step does not.)

    Args:
        gram: inner products of the raw gradients, shape (K, K).
        losses: values of the losses, shape (K,).
        combine: name or rule, see :func:`method`.
        dominance: name or rule, see :func:`dominance_scales`.
        rescale: whether the weights sum to K in absolute value.

    Returns:
        Tensor of shape (K,), float64, on the device of ``gram``.

    Raises:
        ValueError: for an unknown name.

    Example:
        >>> weights(torch.tensor([[4.0, 0.0], [0.0, 1.0]]), torch.ones(2), dominance="none")
        tensor([0.4000, 1.6000], dtype=torch.float64)
    """
    gram = gram.double()
    return advance(gram, losses.to(gram), {}, combine=combine, dominance=dominance, rescale=rescale)[0]


def advance(
    gram: Tensor | None,
    losses: Tensor,
    state: State,
    *,
    combine: str | Method | Stateful = "min_norm",
    dominance: str | Method | Stateful = "log",
    rescale: bool = True,
) -> tuple[Tensor, State]:
    """As :func:`weights`, for rules with a memory: state in, state out.

    Args:
        gram: as in :func:`weights`, float64; may be None where :func:`needs_gram` says that nobody looks at it.
        losses: as in :func:`weights`, float64.
        state: the memory of both rules, empty before the first step. It is not changed.
        combine, dominance, rescale: as in :func:`weights`.

    Returns:
        The weights, shape (K,), and the memory for the next step, empty where neither rule has one.

    Example:
        >>> losses, state = torch.tensor([1.0, 1.0]).double(), {}
        >>> for fall in torch.tensor([[1.0, 1.0], [0.5, 0.9]]).double():
        ...     w, state = advance(None, losses * fall, state, combine="famo", rescale=False, dominance="none")
        >>> w
        tensor([0.4875, 0.5125], dtype=torch.float64)
    """
    scales, dominance_state = apply(dominance_rule(dominance), _given(gram), losses, _part(state, "dominance"))
    scaled = gram if gram is None else gram * torch.outer(scales, scales)
    shares, combine_state = apply(method(combine), _given(scaled), losses, _part(state, "combine"))
    state = {f"dominance.{k}": v for k, v in dominance_state.items()}
    state |= {f"combine.{k}": v for k, v in combine_state.items()}
    shares, scales = shares.to(losses), scales.to(losses)
    if not rescale:
        return shares * scales, state
    # Relative to the largest first: equal ones are exactly 1 then, and so are the weights of equal gradients.
    raw = shares * (scales / scales.amax())
    largest = raw.abs().amax()
    raw = raw / torch.where(largest == 0, torch.ones_like(largest), largest)
    total = raw.abs().sum()
    return raw * (raw.numel() / torch.where(total == 0, torch.ones_like(total), total)), state


def observe(losses: Tensor, state: State, *, combine: str | Method | Stateful) -> State:
    """Shows a rule that looks back the losses of the same batch after the step, see :meth:`Stateful.observe`.

    Args:
        losses: shape (K,), float64.
        state: the memory that :func:`advance` returned.
        combine: name or rule.

    Returns:
        The memory for the next step.
    """
    rule = method(combine)
    if not isinstance(rule, Stateful):
        return state
    other = {k: v for k, v in state.items() if not k.startswith("combine.")}
    return other | {f"combine.{k}": v for k, v in rule.observe(losses, _part(state, "combine")).items()}


def initial(losses: Tensor, *, combine: str | Method | Stateful, dominance: str | Method | Stateful) -> State:
    """The memory of both rules before the first step, which an empty one stands for.

    Args:
        losses: shape (K,), for number, type and device.
        combine, dominance: as in :func:`weights`.

    Example:
        >>> initial(torch.ones(2), combine="min_norm", dominance="ema")["dominance.norms"]
        tensor([0., 0.], dtype=torch.float64)
    """
    rules = {"dominance": dominance_rule(dominance), "combine": method(combine)}
    return {
        f"{name}.{k}": v
        for name, rule in rules.items()
        if isinstance(rule, Stateful)
        for k, v in rule.init(losses).items()
    }


def select(state: State, members: Tensor) -> State:
    """The memory of some of the losses, for a step that lacks the others.

    Args:
        state: the memory of all K losses.
        members: indices of M losses.

    Example:
        >>> select({"count": torch.tensor(3), "norms": torch.tensor([1.0, 2.0, 3.0])}, torch.tensor([0, 2]))
        {'count': tensor(3), 'norms': tensor([1., 3.])}
    """
    chosen = dict(state)
    for name, value in state.items():
        for dim in range(value.dim()):
            chosen[name] = chosen[name].index_select(dim, members)
    return chosen


def merge(state: State, part: State, members: Tensor) -> State:
    """The memory of all losses after a step of some of them; what is new is unknown (nan) for the others.

    Args:
        state: the memory of all K losses before.
        part: that of M losses after.
        members: their indices.

    Example:
        >>> before = {"count": torch.tensor(3), "norms": torch.tensor([1.0, 2.0, 3.0])}
        >>> merge(before, {"count": torch.tensor(4), "norms": torch.tensor([5.0, 6.0])}, torch.tensor([0, 2]))
        {'count': tensor(4), 'norms': tensor([5., 2., 6.])}
    """
    k = max((value.shape[0] for value in state.values() if value.dim()), default=0)
    merged = {}
    for name, value in part.items():
        merged[name] = value
        if value.dim():
            whole = state[name] if name in state else value.new_full((k,) * value.dim(), torch.nan)
            merged[name] = whole.index_put(torch.meshgrid([members] * value.dim(), indexing="ij"), value)
    return merged


def needs_gram(combine: str | Method | Stateful, dominance: str | Method | Stateful) -> bool:
    """Whether the weights depend on the gradients at all, or on the values of the losses alone.

    Example:
        >>> needs_gram("min_norm", "log"), needs_gram("famo", "log"), needs_gram("famo", "norm")
        (True, False, True)
    """
    return uses_gram(method(combine)) or uses_gram(dominance_rule(dominance))


def looks_back(combine: str | Method | Stateful) -> bool:
    """Whether a rule wants the losses of the same batch again after the step.

    Example:
        >>> looks_back("famo"), looks_back("min_norm")
        (True, False)
    """
    return bool(getattr(method(combine), "looks_back", False))


def solve(
    combine: str | Method | Stateful,
    gradients: Sequence[Tensor] | Tensor,
    losses: Tensor | None = None,
    *,
    kind: str = "auto",
    dominance: str | Method | Stateful | None = None,
    rescale: bool = False,
) -> Tensor:
    """Weights of a method, for whoever wants the maths alone.

    Args:
        combine: name or rule; of one with a memory, the first step.
        gradients: K flat gradients as a sequence; or the Jacobian, shape (K, N); or the Gram matrix, shape (K, K).
        losses: values of the losses, shape (K,); not needed by methods that look at gradients alone.
        kind: ``"jacobian"`` or ``"gram"`` where the shape leaves it open: with ``"auto"`` a square matrix is a Gram
            matrix if it is symmetric, which has to be looked at.
        dominance: as in :func:`weights`; None stands for the method as it was published: ``"log"`` for those that are
            defined on the gradients of the log losses, ``"none"`` for all others.
        rescale: as in :func:`weights`.

    Returns:
        Weights on the gradients that were given, shape (K,), float64; ``weights @ jacobian`` is the step's direction.

    Raises:
        ValueError: for gradients of another shape, losses of another number or missing ones, and unknown names.

    Example:
        >>> jacobian = torch.tensor([[2.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
        >>> solve("min_norm", jacobian)
        tensor([0.2000, 0.8000], dtype=torch.float64)
        >>> solve("pcgrad", [torch.tensor([1.0, 0.0]), torch.tensor([-1.0, 1.0])])
        tensor([2.0000, 1.5000], dtype=torch.float64)
        >>> solve("gls", jacobian @ jacobian.T, torch.tensor([1.0, 4.0]))
        tensor([1.0000, 0.2500], dtype=torch.float64)
    """
    gram = _as_gram(gradients, kind)
    k = gram.shape[-1]
    dominance = own_dominance(combine) if dominance is None else dominance
    if losses is None:
        if _reads_losses(combine) or dominance == "log":
            raise ValueError(f"losses: combine={combine!r} needs the values of the {k} losses")
        losses = torch.ones(k, dtype=gram.dtype, device=gram.device)
    if losses.shape != (k,):
        raise ValueError(f"losses: expected a tensor of shape ({k},), got {tuple(losses.shape)}")
    return weights(gram, losses, combine=combine, dominance=dominance, rescale=rescale)


def _as_gram(gradients: Sequence[Tensor] | Tensor, kind: str) -> Tensor:
    if kind not in ("auto", "jacobian", "gram"):
        raise ValueError(f"kind={kind!r}: expected 'auto', 'jacobian' or 'gram'")
    if not isinstance(gradients, Tensor):
        rows = list(gradients)
        if not rows or any(not isinstance(row, Tensor) or row.shape != rows[0].shape for row in rows):
            raise ValueError("gradients: expected K tensors of one shape, a Jacobian or a Gram matrix")
        return gram_of([[row] for row in rows])
    if gradients.dim() != 2 or not gradients.shape[0]:
        raise ValueError(f"gradients: expected a matrix of K rows, got shape {tuple(gradients.shape)}")
    square = gradients.shape[0] == gradients.shape[1]
    if kind == "gram" and not square:
        raise ValueError(f"gradients: a Gram matrix is square, got shape {tuple(gradients.shape)}; see kind=")
    if kind == "gram" or (kind == "auto" and square and torch.equal(gradients.nan_to_num(), gradients.mT.nan_to_num())):
        return gradients.double()
    return gram_of([[row] for row in gradients])


def _reads_losses(combine: str | Method | Stateful) -> bool:
    """Whether a method is one of those of the losses: a rule with a memory says so, the other one is of their logs."""
    rule = method(combine)
    return rule.uses_losses if isinstance(rule, Stateful) else own_dominance(combine) == "log"


def _given(gram: Tensor | None) -> Any:
    """Rules are typed as if they always got a Gram matrix; those that may get None say so by ``uses_gram``."""
    return gram


def _part(state: State, name: str) -> State:
    return {k.removeprefix(f"{name}."): v for k, v in state.items() if k.startswith(f"{name}.")}
