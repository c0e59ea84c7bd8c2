"""The gradients of several losses, between their backward passes and the update."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from itertools import repeat
from operator import is_, is_not
from typing import Any, NamedTuple

import torch
from torch import Tensor

from distill_optim.buckets import buckets
from distill_optim.sharding import Shards, add_up, local

# One gradient per parameter, None where there is none. By position: to look a tensor up costs more than the
# arithmetic on a small gradient.
Column = list[Tensor | None]

# Python's, or 0-d tensors where reading them would be waiting.
Numbers = list[Any]

# Elements that are compared, or rescaled, at a time.
_BUCKET = 1 << 20


class Collected:
    """One gradient per loss and parameter, beside the ordinary ``.grad`` that holds their sum.

    Attributes:
        params: the parameters, in the order of the columns.
        gradients: a column per loss.
        values: value of each loss, by loss: their sum over the micro-batches, or over those of a joint loss their mean,
            because whoever owns that backward divides it by their number.
    """

    def __init__(self, k: int) -> None:
        self.params: list[Tensor] = []
        self.gradients: list[Column] = [[] for _ in range(k)]
        self.values: dict[int, Tensor] = {}
        self._joint_calls: Tensor | int = 0
        self._sum_owed = False
        # Lengths of .grad as remember() saw them.
        self._lengths: Column = []

    def __bool__(self) -> bool:
        return bool(self.values)

    @property
    def present(self) -> list[int]:
        """The losses that were given, in order."""
        return sorted(self.values)

    def reach(self) -> list[int]:
        """How many losses reach each parameter."""
        if all(all(map(is_not, own, repeat(None))) for own in self.gradients):
            return [len(self.gradients)] * len(self.params)
        return list(map(sum, zip(*(map(is_not, own, repeat(None)) for own in self.gradients), strict=True)))

    def columns(self, positions: Sequence[int], losses: Sequence[int]) -> list[Column]:
        """The gradients of the parameters at these positions, a column per loss."""
        whole = len(positions) == len(self.params)
        return [self.gradients[i] if whole else [self.gradients[i][n] for n in positions] for i in losses]

    def align(self, params: Sequence[Tensor]) -> None:
        """Puts the columns into the order of these parameters, some of which may be new, or gone."""
        if len(params) == len(self.params) and all(map(is_, params, self.params)):
            return
        at = {id(p): n for n, p in enumerate(self.params)}
        order = [at.get(id(p)) for p in params]

        def aligned(column: Column) -> Column:
            return [None if n is None else column[n] for n in order]

        self.gradients = [aligned(own) for own in self.gradients]
        self._lengths = aligned(self._lengths) if self._lengths else []
        self.params = list(params)

    def add(
        self,
        params: Sequence[Tensor],
        gradients: Mapping[int, Column],
        before: Column,
        values: Mapping[int, Tensor],
        *,
        joint: bool = False,
        late: bool = False,
    ) -> None:
        """Adds one round of backward passes and leaves their sum in ``.grad``.

        Args:
            params: the parameters.
            gradients: per loss its gradients; kept, and written into later.
            before: the ``.grad`` that were there before the round.
            values: the losses' values.
            joint: whether they came through a joint loss.
            late: whether the sum may wait for :meth:`sum_up`, which it does where there was nothing before.
        """
        late = late and not self and all(map(is_, before, repeat(None)))
        if self:
            self.follow(params, before)
        self.align(params)
        summed = before if late else _sum(list(gradients.values()))
        nameless = [None if known else grad for known, grad in zip(self.reach(), before, strict=True)]
        _share(nameless, list(gradients.values()))
        for i, own in gradients.items():
            self.gradients[i] = _add(self.gradients[i], own)
        for p, grad in zip(params, _add(before, summed), strict=True):
            p.grad = grad
        self._sum_owed = late
        for i, value in values.items():
            if i in self.values:
                so_far, calls = self.values[i], self._joint_calls
                value = (so_far * calls + value) / (calls + 1) if joint else so_far + value
            self.values[i] = value
        self._joint_calls = self._joint_calls + joint

    def sum_up(self) -> None:
        """Leaves the sum of the gradients in ``.grad`` where that was put off: to be called before they are changed."""
        if self._sum_owed:
            self._sum_owed = False
            for p, grad in zip(self.params, _sum(self.gradients), strict=True):
                p.grad = grad

    def release(self) -> None:
        """Lets go of the gradients; ``.grad`` stays."""
        self.gradients = [[None] * len(self.params) for _ in self.gradients]

    def remember(self) -> None:
        """Takes down how long ``.grad`` is now, for :meth:`follow`."""
        grads = [p.grad if reached else None for p, reached in zip(self.params, self.reach(), strict=True)]
        lengths = iter(lengths_of([g for g in grads if g is not None]))
        self._lengths = [None if g is None else next(lengths) for g in grads]

    def follow(self, params: Sequence[Tensor], grads: Column) -> None:
        """Makes the collected gradients add up to what ``.grad`` is now.

        If that is a multiple of what :meth:`remember` saw (unscaled, clipped, divided by the number of micro-batches),
        parameter by parameter, then every loss's gradient is multiplied in the same way. If it is anything else
        (noise, another backward pass, a clamp, zeros), nobody can tell the losses apart in it, and each that reaches
        the parameter takes an equal share: the step of the summed loss. A parameter without ``.grad`` is dropped.

        Args:
            params: the parameters.
            grads: their present ``.grad``.
        """
        self.align(params)
        # What a step that was handed its losses has left, because it failed, was never taken down and is not followed.
        seen = self._lengths or [None] * len(params)
        known = [None if length is None else grad for grad, length in zip(grads, seen, strict=True)]
        for own in self.gradients:
            own[:] = [None if grad is None else gradient for gradient, grad in zip(own, known, strict=True)]
        positions = [n for n, count in enumerate(self.reach()) if count]
        if not positions:
            self.values.clear()
            self._joint_calls = 0
            return
        now_is = [grad for grad in (grads[n] for n in positions) if grad is not None]
        home = now_is[0].device
        now = _stack(lengths_of(now_is), home)
        then = _stack([length for length in (self._lengths[n] for n in positions) if length is not None], home)
        own_lengths = [iter(lengths_of([g for g in own if g is not None])) for own in self.gradients]
        zero = torch.zeros((), device=home)
        parts = torch.zeros_like(now)
        for own, lengths in zip(self.gradients, own_lengths, strict=True):
            parts += _stack([zero if own[n] is None else next(lengths) for n in positions], home)
        # What rounding may do to a sum of gradients of these lengths, in micro-batches and in this precision.
        dtypes = [grad.dtype for grad in now_is]
        units = {dtype: torch.full((), _rounding(dtype), dtype=torch.float64, device=home) for dtype in set(dtypes)}
        rounding = torch.stack([units[dtype] for dtype in dtypes]) if len(units) > 1 else units[dtypes[0]]
        # Where the gradients cancel out in the sum, its length says nothing; there the rest of the model speaks.
        legible = (then > rounding * parts) & torch.isfinite(then)
        common = (now.square() * legible).nansum() / (then.square() * legible).nansum()
        factors = torch.where(legible, now / then, torch.where(legible.any(), common.sqrt(), 1))
        bucketed = list(self._buckets(positions, now_is))
        residuals = _stack(_of_whole(_residuals(bucketed, _readable(factors)), [local(g)[1] for g in now_is]), home)
        followed = residuals <= rounding * (now + factors * parts)
        numbers = _readable(torch.where(followed, factors, torch.nan))
        for bucket in bucketed:
            for gradients in bucket.gradients:
                _rescale(gradients, bucket.now, [numbers[n] for n in bucket.members], 1 / len(bucket.gradients))
        afresh = (now == 0).all()
        self.values = {i: torch.where(afresh.to(v.device), 0, v) for i, v in self.values.items()}
        self._joint_calls = torch.where(afresh, 0, self._joint_calls)

    def _buckets(self, positions: Sequence[int], grads: Sequence[Tensor]) -> Iterator[_Bucket]:
        """The parameters at these positions, whose ``.grad`` are these, piece by piece."""
        alike: defaultdict[object, list[int]] = defaultdict(list)
        columns = self.columns(positions, range(len(self.gradients)))
        reaching = zip(*(map(is_not, own, repeat(None)) for own in columns), strict=True)
        for n, kind in enumerate(zip(reaching, [g.device for g in grads], [g.dtype for g in grads], strict=True)):
            alike[kind].append(n)
        for members in alike.values():
            rows = [[local(grads[n])[0] for n in members]]
            for own in columns:
                if own[members[0]] is not None:
                    rows.append([local(g)[0] for g in (own[n] for n in members) if g is not None])
            for part, (now, *gradients) in buckets(rows, _BUCKET, copying=False):
                yield _Bucket([members[n] for n in part], now, gradients)


class _Bucket(NamedTuple):
    """Pieces of parameters that the same losses reach, of one dtype, on one device.

    They have ``_BUCKET`` elements in all at most, unless one is larger and cannot be cut.
    """

    members: Sequence[int]
    now: list[Tensor]
    gradients: list[list[Tensor]]


def _residuals(bucketed: Sequence[_Bucket], factors: Numbers) -> list[Tensor]:
    """How far each ``.grad`` is from its factor times the sum of the collected gradients."""
    lengths: list[list[Tensor]] = [[] for _ in factors]
    for members, now, (first, *others) in bucketed:
        sums = list(torch._foreach_add(first, others[0])) if others else [gradient.clone() for gradient in first]
        for more in others[1:]:
            torch._foreach_add_(sums, more)
        _multiply(sums, [factors[n] for n in members])
        torch._foreach_sub_(sums, now)
        for n, length in zip(members, _local_lengths(sums), strict=True):
            lengths[n].append(length)
    return [of[0] if len(of) == 1 else torch.stack(of).double().square().sum().sqrt() for of in lengths]


def _readable(numbers: Tensor) -> Numbers:
    """One by one; as Python's where nothing has to be waited for."""
    if numbers.device.type == "cpu" and not torch.compiler.is_compiling():
        read: list[float] = numbers.tolist()
        return read
    return list(numbers.unbind())


def _multiply(tensors: list[Tensor], factors: Numbers) -> None:
    """Each by its own factor, in place. Foreach functions take Python's numbers; others are spread to the shapes."""
    spread = _spread(factors, tensors)
    if spread is not None:
        torch._foreach_mul_(tensors, torch._C._nn.unflatten_dense_tensors(spread, tensors))
    elif any(factor != 1 for factor in factors):
        torch._foreach_mul_(tensors, factors)


def _rescale(gradients: list[Tensor], now: list[Tensor], factors: Numbers, share: float) -> None:
    """Gradient ← factor · gradient, or share · now where the factor is nan; what is replaced may be infinite."""
    spread = _spread(factors, gradients)
    if spread is not None:
        flat, instead = map(torch._C._nn.flatten_dense_tensors, (gradients, now))
        flat = torch.where(spread.isnan(), instead * share, flat * spread).to(flat.dtype)
        torch._foreach_copy_(gradients, torch._C._nn.unflatten_dense_tensors(flat, gradients))
        return
    scaled = [(gradient, x) for gradient, x in zip(gradients, factors, strict=True) if x == x and x != 1]
    if scaled:
        torch._foreach_mul_([gradient for gradient, _ in scaled], [x for _, x in scaled])
    for gradient, grad, x in zip(gradients, now, factors, strict=True):
        if x != x:
            gradient.copy_(grad).mul_(share)


def _spread(factors: Numbers, like: Sequence[Tensor]) -> Tensor | None:
    """Tensors of one number each as a vector with a number per element; None for Python's numbers."""
    if not isinstance(factors[0], Tensor):
        return None
    # A factor of 2⁻¹⁶ is no number in float16.
    dtype = torch.float64 if like[0].dtype in (torch.float64, torch.complex128) else torch.float32
    numbers = torch.stack(factors).to(like[0].device, dtype).unbind()
    return torch.cat([x.expand(t.numel()) for x, t in zip(numbers, like, strict=True)])


def _share(nameless: Column, gradients: Sequence[Column]) -> None:
    """Gives a ``.grad`` of no loss's name to the losses that reach the parameter, in equal parts.

    Where none does it becomes the first loss's: zeros after ``zero_grad(set_to_none=False)`` still decay a weight.
    """
    for n, grad in enumerate(nameless):
        if grad is None:
            continue
        reaching = [gradient for gradient in (own[n] for own in gradients) if gradient is not None]
        for gradient in reaching:
            gradient.add_(grad, alpha=1 / len(reaching))
        if not reaching:
            gradients[0][n] = grad.clone()


def _add(column: Column, more: Column) -> Column:
    """Entry by entry, in the first one's memory where both have one."""
    both = [(a, b) for a, b in zip(column, more, strict=True) if a is not None and b is not None]
    if both:
        torch._foreach_add_([a for a, _ in both], [b for _, b in both])
    return [b if a is None else a for a, b in zip(column, more, strict=True)]


def _sum(columns: Sequence[Column]) -> Column:
    """The sum over the losses, in memory of its own."""
    reaching = [[g for g in column if g is not None] for column in zip(*columns, strict=True)]
    total: Column = [own[0].clone() if len(own) == 1 else None for own in reaching]
    several = [n for n, own in enumerate(reaching) if len(own) > 1]
    if several:
        sums = torch._foreach_add([reaching[n][0] for n in several], [reaching[n][1] for n in several])
        for n, summed in zip(several, sums, strict=True):
            total[n] = summed
        for i in range(2, max(len(reaching[n]) for n in several)):
            _add(total, [own[i] if len(own) > i else None for own in reaching])
    return total


def cleared(params: Sequence[Tensor], home: torch.device) -> Tensor:
    """Whether every ``.grad`` that there is is zero, on a device and without waiting for it."""
    lengths = lengths_of([p.grad for p in params if p.grad is not None])
    return _stack([torch.zeros((), device=home), *lengths], home).eq(0).all()


def _stack(numbers: Sequence[Tensor], home: torch.device) -> Tensor:
    """0-d tensors as one vector, float64."""
    return torch.stack([x if x.device == home else x.to(home) for x in numbers]).double()


def lengths_of(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Lengths; of a sharded tensor that of the whole."""
    parts = [local(t) for t in tensors]
    return _of_whole(_local_lengths([part for part, _ in parts]), [shards for _, shards in parts])


def _of_whole(lengths: list[Tensor], shards: Sequence[Shards]) -> list[Tensor]:
    """Lengths of whole tensors from those of this process's parts."""
    alike: defaultdict[Shards, list[int]] = defaultdict(list)
    for n, over in enumerate(shards):
        if over is not None:
            alike[over].append(n)
    for over, members in alike.items():
        squares = torch.stack([lengths[n].double().square() for n in members])
        add_up(squares, over)
        for n, length in zip(members, squares.sqrt().unbind(), strict=True):
            lengths[n] = length
    return lengths


def _local_lengths(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Lengths, at least in float32: a norm in half precision overflows at 65504 and has three digits."""
    real = [torch.view_as_real(t) if t.is_complex() else t for t in tensors]
    half = [t.dtype in (torch.float16, torch.bfloat16) for t in real]
    lengths: list[Tensor] = list(real)
    for is_half in set(half):
        mine = [n for n, so in enumerate(half) if so is is_half]
        found = torch._foreach_norm([real[n] for n in mine], 2, torch.float32 if is_half else None)
        for n, length in zip(mine, found, strict=True):
            lengths[n] = length
    return lengths


def _rounding(dtype: torch.dtype) -> float:
    """256 units in the last place, but no more than a twentieth."""
    return min(256 * torch.finfo(dtype).eps, 0.05)
