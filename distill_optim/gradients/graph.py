"""What is to be read off the autograd graph without walking it back: which parameters a loss reaches, and how."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor


def nodes_above(losses: Iterable[Tensor], stop: Collection[Tensor] = ()) -> Iterator[Any]:
    """Nodes of the graph between the losses and the tensors at which the walk stops.

    Args:
        losses: where the walk starts.
        stop: tensors below which it does not go.
    """
    stopped = {t.grad_fn for t in stop if t.grad_fn is not None}
    seen: set[Any] = set()
    stack: list[Any] = [(t.grad_fn, t.output_nr) for t in losses if t.grad_fn is not None]
    while stack:
        node, output = stack.pop()
        if node is None or node in stopped:
            continue
        # Through DistributedDataParallel's node all outputs of the model pass side by side.
        passing = type(node).__name__ == "_DDPSinkBackward"
        place = (node, output) if passing else node
        if place in seen:
            continue
        seen.add(place)
        yield node
        stack.extend(node.next_functions[output : output + 1] if passing else node.next_functions)


def delays_reduction(losses: Iterable[Tensor]) -> bool:
    """Whether ``DistributedDataParallel(static_graph=True)`` takes the next pass through this graph for its first.

    In the first step it has the engine average at the end of whatever pass comes by, be it ours or the training loop's.
    """
    for node in nodes_above(losses):
        if type(node).__name__ == "_DDPSinkBackward" and node.ddp_weakref().static_graph:
            return True
    return False


def leaves_above(losses: Iterable[Tensor], stop: Collection[Tensor] = ()) -> set[Tensor]:
    """Leaves of the graph between the losses and the tensors at which the walk stops.

    Args:
        losses: where the walk starts.
        stop: tensors below which it does not go.

    Returns:
        The leaf tensors whose gradient a backward pass down to ``stop`` would reach; but see :func:`hides_leaves`.

    Example:
        >>> a, b = torch.ones(1, requires_grad=True), torch.ones(1, requires_grad=True)
        >>> z = a * 2
        >>> leaves_above([(z * b).sum()], stop=[z]) == {b}
        True
    """
    losses = list(losses)
    leaves = {t for t in losses if t.grad_fn is None and t.requires_grad}
    for node in nodes_above(losses, stop):
        variable = getattr(node, "variable", None)
        if isinstance(variable, Tensor):
            leaves.add(variable)
    return leaves - set(stop)


def hides_leaves(losses: Iterable[Tensor]) -> bool:
    """Whether the graph has a reentrant checkpoint, whose parameters do not show before it is walked back."""
    return any(node.name() == "CheckpointFunctionBackward" for node in nodes_above(losses))


def reached_alone(reached: Mapping[int, Collection[Tensor]], params: Iterable[Tensor]) -> dict[int, list[Tensor]]:
    """The parameters that one loss alone reaches, by loss."""
    alone: dict[int, list[Tensor]] = {i: [] for i in reached}
    for p in params:
        by = [i for i, leaves in reached.items() if p in leaves]
        if len(by) == 1:
            alone[by[0]].append(p)
    return alone
