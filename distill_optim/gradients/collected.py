"""The gradients of several losses, between their backward passes and the update."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor


class Collected:
    """One gradient per loss and parameter, beside the ordinary ``.grad`` that holds their sum.

    What happens to ``.grad`` in place between the backward passes and the step (unscaling, clipping, division by
    the number of micro-batches) is read off it, parameter by parameter, as the ratio of its norm now to its norm
    then, and applied to every loss's gradient.

    Attributes:
        gradients: per loss the gradient of each parameter that it reaches.
        values: value of each loss, by loss: their sum over the micro-batches, or over those of a joint loss their mean,
            because whoever owns that backward divides it by their number.
    """

    def __init__(self, k: int) -> None:
        self.gradients: list[dict[Tensor, Tensor]] = [{} for _ in range(k)]
        self.values: dict[int, Tensor] = {}
        self._joint_calls: Tensor | int = 0
        self._left: dict[Tensor, Tensor] = {}
        self._norms: dict[Tensor, Tensor] = {}

    def __bool__(self) -> bool:
        return bool(self.values)

    @property
    def present(self) -> list[int]:
        """The losses that were given, in order."""
        return sorted(self.values)

    def reached(self, params: Sequence[Tensor], at_least: int = 1) -> list[Tensor]:
        """Those of the parameters that at least so many losses reach."""
        return [p for p in params if sum(p in own for own in self.gradients) >= at_least]

    def columns(self, params: Sequence[Tensor], losses: Sequence[int]) -> list[list[Tensor | None]]:
        """The gradients as one list per loss, None where a loss does not reach a parameter."""
        return [[self.gradients[i].get(p) for p in params] for i in losses]

    def check(self) -> None:
        """Refuses a ``.grad`` that somebody replaced, because then nobody knows what it is a multiple of.

        Raises:
            ValueError: if there is one.
        """
        for p, left in self._left.items():
            if p.grad is not None and p.grad is not left:
                raise ValueError(
                    f"the .grad of a parameter of shape {tuple(p.shape)} was replaced after the gradients of several "
                    "losses were collected; change .grad in place (p.grad.mul_(...)), or call optimizer.zero_grad() "
                    "before another backward pass"
                )

    def add(
        self,
        gradients: Mapping[int, dict[Tensor, Tensor]],
        before: Mapping[Tensor, Tensor],
        losses: Mapping[int, Tensor],
        *,
        joint: bool = False,
    ) -> None:
        """Adds one round of backward passes and leaves their sum in ``.grad``.

        Args:
            gradients: per loss the gradient of each parameter that it reaches; kept, and written into later.
            before: the ``.grad`` that were there before the round.
            losses: the losses, for their values.
            joint: whether they came through a joint loss.
        """
        summed = _sum(gradients)
        if self._left:
            self._follow(before)
        # A .grad that is not ours belongs to no loss by name: it joins the first that reaches the parameter, as
        # weight decay does, and makes its gradient where none does (zeros, after zero_grad(set_to_none=False)).
        for p, grad in before.items():
            if p not in self._left:
                own = next((own for own in gradients.values() if p in own), None)
                if own is None:
                    next(iter(gradients.values()))[p] = grad.clone()
                else:
                    own[p].add_(grad)
        for i, own in gradients.items():
            have = self.gradients[i]
            again = [p for p in own if p in have]
            if again:
                torch._foreach_add_([have[p] for p in again], [own[p] for p in again])
            have.update({p: g for p, g in own.items() if p not in have})
        again = [p for p in summed if p in before]
        if again:
            torch._foreach_add_([before[p] for p in again], [summed[p] for p in again])
        self._left = {**summed, **before}
        for p, left in self._left.items():
            p.grad = left
        self._norms = {}
        for i, loss in losses.items():
            value = loss.detach()
            if i in self.values:
                so_far, calls = self.values[i], self._joint_calls
                value = (so_far * calls + value) / (calls + 1) if joint else so_far + value
            self.values[i] = value
        self._joint_calls = self._joint_calls + joint

    def remember_norms(self) -> None:
        """Takes down how long ``.grad`` is now, for a step that comes later."""
        self._norms = _norms(self._left)

    def rescale(self) -> None:
        """Applies to every loss's gradient what was done to ``.grad`` since :meth:`remember_norms`."""
        self.check()
        self._drop([p for p in self._left if p.grad is None])
        factors = self._factors(self._left)
        for own in self.gradients:
            if own:
                torch._foreach_mul_(list(own.values()), [factors[p] for p in own])

    def _follow(self, grads: Mapping[Tensor, Tensor]) -> None:
        """:meth:`rescale` ahead of another round; a ``.grad`` set to zero starts afresh."""
        self._drop([p for p in self._left if p not in grads])
        factors = self._factors(self._left)
        # Not products alone: after an overflow what is to be forgotten may be infinite.
        for own in self.gradients:
            for p, gradient in own.items():
                own[p] = torch.where(factors[p] == 0, 0, gradient).mul_(factors[p])
        if not factors:
            self.values.clear()
            self._joint_calls = 0
            return
        home = next(iter(factors.values())).device
        afresh = torch.stack([factor.to(home) == 0 for factor in factors.values()]).all()
        self.values = {i: torch.where(afresh.to(v.device), 0, v) for i, v in self.values.items()}
        self._joint_calls = torch.where(afresh, 0, self._joint_calls)

    def _drop(self, params: Sequence[Tensor]) -> None:
        for p in params:
            del self._left[p]
            for own in self.gradients:
                own.pop(p, None)

    def _factors(self, grads: Mapping[Tensor, Tensor]) -> dict[Tensor, Tensor]:
        now = _norms(grads)
        factors = {}
        for p, after in now.items():
            before = self._norms[p]
            # 0/0 is 1: gradients that cancel out in the sum were not rescaled by anybody. Nor is there anything to
            # read off a norm that is not finite; what becomes of such a step is the caller's or the scaler's affair.
            known = (before > 0) & torch.isfinite(before)
            factors[p] = torch.where(known, after / before, ((before == 0) | (after != 0)).to(after))
        return factors


def _sum(gradients: Mapping[int, dict[Tensor, Tensor]]) -> dict[Tensor, Tensor]:
    """The sum over the losses, in memory of its own."""
    total: dict[Tensor, Tensor] = {}
    borrowed: set[Tensor] = set()
    for own in gradients.values():
        fresh = [p for p in own if p in borrowed]
        if fresh:
            total.update(
                zip(fresh, torch._foreach_add([total[p] for p in fresh], [own[p] for p in fresh]), strict=True)
            )
        again = [p for p in own if p in total and p not in borrowed]
        if again:
            torch._foreach_add_([total[p] for p in again], [own[p] for p in again])
        borrowed.difference_update(fresh)
        new = {p: g for p, g in own.items() if p not in total}
        total.update(new)
        borrowed.update(new)
    return {p: g.clone() if p in borrowed else g for p, g in total.items()}


def _norms(grads: Mapping[Tensor, Tensor]) -> dict[Tensor, Tensor]:
    """Lengths, at least in float32: a norm in half precision overflows at 65504 and has three digits."""
    norms: dict[Tensor, Tensor] = {}
    for half in (False, True):
        mine = [p for p, g in grads.items() if (g.dtype in (torch.float16, torch.bfloat16)) is half]
        real = [torch.view_as_real(g) if g.is_complex() else g for g in (grads[p] for p in mine)]
        if real:
            norms.update(zip(mine, torch._foreach_norm(real, 2, torch.float32 if half else None), strict=True))
    return norms
