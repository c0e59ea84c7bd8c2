"""The gradients of several losses, between their backward passes and the update."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Iterator, Mapping, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from distill_optim.sharding import Shards, add_up, local

Key = TypeVar("Key", bound=Hashable)

# Elements of .grad that are compared at a time with the sum of what was collected.
_BUCKET = 1 << 20


class Collected:
    """One gradient per loss and parameter, beside the ordinary ``.grad`` that holds their sum.

    Attributes:
        gradients: per loss the gradient of each parameter that it reaches.
        values: value of each loss, by loss: their sum over the micro-batches, or over those of a joint loss their mean,
            because whoever owns that backward divides it by their number.
    """

    def __init__(self, k: int) -> None:
        self.gradients: list[dict[Tensor, Tensor]] = [{} for _ in range(k)]
        self.values: dict[int, Tensor] = {}
        self._joint_calls: Tensor | int = 0
        self._norms: dict[Tensor, Tensor] = {}

    def __bool__(self) -> bool:
        return bool(self.values)

    @property
    def present(self) -> list[int]:
        """The losses that were given, in order."""
        return sorted(self.values)

    def reached(self, params: Sequence[Tensor], at_least: int = 1) -> list[Tensor]:
        """Those of the parameters that at least so many losses reach."""
        if at_least == 1:
            known = set().union(*self.gradients)  # takes over the hashes, which tensors work out in Python
            return [p for p in params if p in known]
        return [p for p in params if sum([p in own for own in self.gradients]) >= at_least]

    def columns(self, params: Sequence[Tensor], losses: Sequence[int]) -> list[list[Tensor | None]]:
        """The gradients as one list per loss, None where a loss does not reach a parameter."""
        return [[self.gradients[i].get(p) for p in params] for i in losses]

    def add(
        self,
        gradients: Mapping[int, dict[Tensor, Tensor]],
        before: Mapping[Tensor, Tensor],
        values: Mapping[int, Tensor],
        *,
        joint: bool = False,
    ) -> None:
        """Adds one round of backward passes and leaves their sum in ``.grad``.

        Args:
            gradients: per loss the gradient of each parameter that it reaches; kept, and written into later.
            before: the ``.grad`` that were there before the round.
            values: the losses' values.
            joint: whether they came through a joint loss.
        """
        if self:
            self.follow(before)
        known = {p for own in self.gradients for p in own}
        summed = _sum(gradients)
        _share({p: g for p, g in before.items() if p not in known}, gradients)
        for i, own in gradients.items():
            have = self.gradients[i]
            again = [p for p in own if p in have]
            if again:
                torch._foreach_add_([have[p] for p in again], [own[p] for p in again])
            have.update({p: g for p, g in own.items() if p not in have})
        again = [p for p in summed if p in before]
        if again:
            torch._foreach_add_([before[p] for p in again], [summed[p] for p in again])
        for p, grad in {**summed, **before}.items():
            p.grad = grad
        for i, value in values.items():
            if i in self.values:
                so_far, calls = self.values[i], self._joint_calls
                value = (so_far * calls + value) / (calls + 1) if joint else so_far + value
            self.values[i] = value
        self._joint_calls = self._joint_calls + joint

    def remember(self) -> None:
        """Takes down how long ``.grad`` is now, for :meth:`follow`."""
        self._norms = _norms({p: p.grad for own in self.gradients for p in own if p.grad is not None})

    def follow(self, grads: Mapping[Tensor, Tensor]) -> None:
        """Makes the collected gradients add up to what ``.grad`` is now.

        If that is a multiple of what :meth:`remember` saw (unscaled, clipped, divided by the number of micro-batches),
        parameter by parameter, then every loss's gradient is multiplied in the same way. If it is anything else
        (noise, another backward pass, a clamp, zeros), nobody can tell the losses apart in it, and each that reaches
        the parameter takes an equal share: the step of the summed loss. A parameter without ``.grad`` is dropped.

        Args:
            grads: the present ``.grad`` of each parameter that has one.
        """
        for own in self.gradients:
            for p in [p for p in own if p not in grads or p not in self._norms]:
                del own[p]
        params = [p for p in grads if any(p in own for own in self.gradients)]
        if not params:
            self.values.clear()
            self._joint_calls = 0
            return
        home = params[0].device

        def column(norms: Mapping[Tensor, Tensor]) -> Tensor:
            zero = torch.zeros((), device=home)
            return torch.stack([norms[p].to(home) if p in norms else zero for p in params]).double()

        now, then = column(_norms({p: grads[p] for p in params})), column(self._norms)
        parts = torch.stack([column(_norms(own)) for own in self.gradients]).sum(0)
        # What rounding may do to a sum of gradients of these lengths, in micro-batches and in this precision.
        dtypes = [grads[p].dtype for p in params]
        units = {dtype: torch.full((), _rounding(dtype), dtype=torch.float64, device=home) for dtype in set(dtypes)}
        rounding = torch.stack([units[dtype] for dtype in dtypes])
        # Where the gradients cancel out in the sum, its length says nothing; there the rest of the model speaks.
        legible = (then > rounding * parts) & torch.isfinite(then)
        common = (now.square() * legible).nansum() / (then.square() * legible).nansum()
        factors = torch.where(legible, now / then, torch.where(legible.any(), common.sqrt(), 1))
        residuals = column(self._residuals(params, grads, factors.unbind()))
        followed = residuals <= rounding * (now + factors * parts)
        reaching = [[own[p] for own in self.gradients if p in own] for p in params]
        # Taken apart once: to index a tensor costs more than the arithmetic on a small gradient.
        portions = {n: torch.full((), 1 / n, dtype=torch.float64, device=home) for n in set(map(len, reaching))}
        shares = {n: torch.where(followed, 1, portion).unbind() for n, portion in portions.items()}
        numbers = zip(factors.unbind(), followed.unbind(), strict=True)
        for n, (p, gradients, (factor, same)) in enumerate(zip(params, reaching, numbers, strict=True)):
            grad = local(grads[p])[0]
            for gradient in (local(g)[0] for g in gradients):
                # In place, and not by products alone: what is to be forgotten may be infinite.
                gradient.mul_(factor)
                torch.where(same, gradient, grad, out=gradient)
                if len(gradients) > 1:
                    gradient.mul_(shares[len(gradients)][n])
        afresh = (now == 0).all()
        self.values = {i: torch.where(afresh.to(v.device), 0, v) for i, v in self.values.items()}
        self._joint_calls = torch.where(afresh, 0, self._joint_calls)

    def _residuals(
        self, params: Sequence[Tensor], grads: Mapping[Tensor, Tensor], factors: Sequence[Tensor]
    ) -> dict[Tensor, Tensor]:
        """How far each ``.grad`` is from its factor times the sum of the collected gradients."""
        squares: dict[Tensor, Tensor] = {}
        for run in self._runs(params, grads, factors):
            sums = list(torch._foreach_mul([own[0] for _, _, _, own in run], 1))
            for i in range(1, len(self.gradients)):
                again = [n for n, (_, _, _, own) in enumerate(run) if len(own) > i]
                if again:
                    torch._foreach_add_([sums[n] for n in again], [run[n][3][i] for n in again])
            torch._foreach_mul_(sums, [factor for _, _, factor, _ in run])
            torch._foreach_sub_(sums, [grad for _, grad, _, _ in run])
            for (p, _, _, _), norm in zip(run, _local_norms(dict(enumerate(sums))).values(), strict=True):
                square = norm.double().square()
                squares[p] = squares[p] + square if p in squares else square
        return _of_whole({p: square.sqrt() for p, square in squares.items()}, {p: local(grads[p])[1] for p in params})

    def _runs(
        self, params: Sequence[Tensor], grads: Mapping[Tensor, Tensor], factors: Sequence[Tensor]
    ) -> Iterator[list[tuple[Tensor, Tensor, Tensor, list[Tensor]]]]:
        """Parameter, .grad, factor and the losses' gradients, in pieces, at most a bucket of elements at a time."""
        run: list[tuple[Tensor, Tensor, Tensor, list[Tensor]]] = []
        filled = 0
        for p, factor in zip(params, factors, strict=True):
            tensors = [local(t)[0] for t in (grads[p], *(own[p] for own in self.gradients if p in own))]
            if tensors[0].numel() > _BUCKET and all(t.is_contiguous() for t in tensors):
                pieces = list(zip(*(t.view(-1).split(_BUCKET) for t in tensors), strict=True))
            else:
                pieces = [tuple(tensors)]
            for grad, *own in pieces:
                if run and filled + grad.numel() > _BUCKET:
                    yield run
                    run, filled = [], 0
                run.append((p, grad, factor, own))
                filled += grad.numel()
        if run:
            yield run


def _share(nameless: Mapping[Tensor, Tensor], gradients: Mapping[int, dict[Tensor, Tensor]]) -> None:
    """Gives a ``.grad`` of no loss's name to the losses that reach the parameter, in equal parts.

    Where none does it becomes the first loss's: zeros after ``zero_grad(set_to_none=False)`` still decay a weight.
    """
    for p, grad in nameless.items():
        reaching = [own for own in gradients.values() if p in own]
        for own in reaching:
            own[p].add_(grad, alpha=1 / len(reaching))
        if not reaching:
            next(iter(gradients.values()))[p] = grad.clone()


def _sum(gradients: Mapping[int, dict[Tensor, Tensor]]) -> dict[Tensor, Tensor]:
    """The sum over the losses, in memory of its own."""
    total: dict[Tensor, Tensor] = {}
    borrowed: set[Tensor] = set()
    for own in gradients.values():
        fresh = [p for p in own if p in borrowed]
        if fresh:
            sums = torch._foreach_add([total[p] for p in fresh], [own[p] for p in fresh])
            total.update(zip(fresh, sums, strict=True))
        again = [p for p in own if p in total and p not in borrowed]
        if again:
            torch._foreach_add_([total[p] for p in again], [own[p] for p in again])
        borrowed.difference_update(fresh)
        new = {p: g for p, g in own.items() if p not in total}
        total.update(new)
        borrowed.update(new)
    return {p: g.clone() if p in borrowed else g for p, g in total.items()}


def cleared(params: Sequence[Tensor], home: torch.device) -> Tensor:
    """Whether every ``.grad`` that there is is zero, on a device and without waiting for it."""
    norms = _norms({p: p.grad for p in params if p.grad is not None}).values()
    return (
        torch.stack([torch.zeros((), dtype=torch.float64, device=home), *(n.to(home).double() for n in norms)])
        .eq(0)
        .all()
    )


def _norms(grads: Mapping[Key, Tensor]) -> dict[Key, Tensor]:
    """Lengths; of a sharded tensor that of the whole."""
    parts = {p: local(g) for p, g in grads.items()}
    norms = _local_norms({p: part for p, (part, _) in parts.items()})
    return _of_whole(norms, {p: shards for p, (_, shards) in parts.items()})


def _of_whole(norms: dict[Key, Tensor], shards: Mapping[Key, Shards]) -> dict[Key, Tensor]:
    """Lengths of whole tensors from those of this process's parts."""
    alike: defaultdict[Shards, list[Key]] = defaultdict(list)
    for p, over in shards.items():
        if over is not None:
            alike[over].append(p)
    for over, members in alike.items():
        squares = torch.stack([norms[p].double().square() for p in members])
        add_up(squares, over)
        norms.update(zip(members, squares.sqrt().unbind(), strict=True))
    return norms


def _local_norms(grads: Mapping[Key, Tensor]) -> dict[Key, Tensor]:
    """Lengths, at least in float32: a norm in half precision overflows at 65504 and has three digits."""
    norms: dict[Key, Tensor] = {}
    for half in (False, True):
        mine = [p for p, g in grads.items() if (g.dtype in (torch.float16, torch.bfloat16)) is half]
        real = [torch.view_as_real(g) if g.is_complex() else g for g in (grads[p] for p in mine)]
        if real:
            norms.update(zip(mine, torch._foreach_norm(real, 2, torch.float32 if half else None), strict=True))
    return {p: norms[p] for p in grads}


def _rounding(dtype: torch.dtype) -> float:
    """256 units in the last place, but no more than a twentieth."""
    return min(256 * torch.finfo(dtype).eps, 0.05)
