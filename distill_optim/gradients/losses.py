"""What counts as losses, and what is wrong with the rest."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeGuard

import torch
from torch import Tensor

Losses = Sequence[Tensor] | Mapping[str, Tensor]


def loss_names(losses: int | Iterable[str]) -> tuple[str, ...]:
    """Names of the losses: given as such, or by their number.

    Raises:
        TypeError: for anything else.
        ValueError: for none, or two of the same name.

    Example:
        >>> loss_names(2), loss_names(3)
        (('task', 'distill'), ('task', 'distill_1', 'distill_2'))
    """
    if isinstance(losses, int) and not isinstance(losses, bool):
        if losses < 1:
            raise ValueError(f"losses={losses}: at least one loss is needed")
        if losses == 2:
            return "task", "distill"
        return "task", *(f"distill_{i}" for i in range(1, losses))
    if isinstance(losses, str) or not isinstance(losses, Iterable):
        raise TypeError(f"losses={losses!r}: expected a sequence of names such as ('task', 'distill'), or their number")
    names = tuple(losses)
    if not names:
        raise ValueError("losses=(): at least one loss is needed")
    for name in names:
        if not isinstance(name, str) or not name:
            raise TypeError(f"losses={names!r}: {name!r} is not a name; every name is a non-empty string")
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"losses={names!r}: {twice!r} stands there twice; give every loss a name of its own")
    return names


def is_losses(value: object) -> TypeGuard[Losses]:
    """Whether a value means several losses: a list, a tuple or a mapping (never a tensor or a number)."""
    return isinstance(value, list | tuple | Mapping)


def by_index(losses: Losses, names: Sequence[str]) -> dict[int, Tensor]:
    """The losses by their position in ``names``, in that order.

    Raises:
        ValueError: for a wrong number of losses, or an unknown name.
    """
    if isinstance(losses, Mapping):
        unknown = [name for name in losses if name not in names]
        if unknown:
            raise ValueError(
                f"losses: {unknown[0]!r} is not one of this optimizer's losses {tuple(names)!r}; "
                "rename it, or construct the optimizer with losses=(...) that names it"
            )
        if not losses:
            raise ValueError(f"losses: the mapping is empty; give at least one of {tuple(names)!r}")
        return {i: losses[name] for i, name in enumerate(names) if name in losses}
    if len(losses) != len(names):
        raise ValueError(
            f"losses: got {len(losses)}, but this optimizer was constructed for {len(names)}, {tuple(names)!r}; "
            f"give as many, give a mapping by name, or construct it with losses={len(losses)}"
        )
    return dict(enumerate(losses))


def check_losses(losses: Mapping[int, Tensor], names: Sequence[str]) -> None:
    """Refuses what no gradient can be taken of, before anything is touched.

    Raises:
        TypeError: for a loss that is not a tensor.
        ValueError: for a loss that is not a real scalar or has no graph.
    """
    for i, loss in losses.items():
        name = f"losses[{names[i]!r}]"
        if not isinstance(loss, Tensor):
            raise TypeError(f"{name}: expected a scalar tensor, got {type(loss).__name__}")
        if loss.numel() != 1:
            raise ValueError(f"{name}: expected a scalar, got shape {tuple(loss.shape)}; reduce it, e.g. with .mean()")
        if loss.is_complex():
            raise ValueError(f"{name}: expected a real scalar, got {loss.dtype}; take .real or .abs()")
        if not loss.requires_grad:
            raise ValueError(
                f"{name}: it has no graph (requires_grad is False), so no gradient can be taken; it was detached, "
                "computed under torch.no_grad(), or depends on no parameter. Leave it out of the mapping in such a step"
            )


def detached(losses: Losses) -> Any:
    """The losses as given, without their graphs, as a list, tuple or dict."""
    if isinstance(losses, Mapping):
        return {name: loss.detach() for name, loss in losses.items()}
    given = [loss.detach() for loss in losses]
    return tuple(given) if isinstance(losses, tuple) else given


def values(losses: Sequence[Tensor], device: torch.device) -> Tensor:
    """Values of losses, given without their graphs, as one vector on a device; without waiting for it."""
    # A copy to the host is not safe to read until it has been waited for.
    wait = device.type == "cpu"
    scalars = [v if v.dim() == 0 else v.reshape(()) for v in losses]
    there = [v if v.device == device else v.to(device, non_blocking=not wait) for v in scalars]
    return torch.stack(there)
