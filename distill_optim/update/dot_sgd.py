"""DOT's update: one heavy-ball momentum per loss."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import cast

from torch import Tensor
from torch.optim.sgd import sgd

from distill_optim.update import triton_dot_sgd


def dot_sgd(
    params: Sequence[Tensor],
    gradients: Sequence[Sequence[Tensor | None]],
    buffers: Sequence[list[Tensor | None]],
    *,
    lr: float | Tensor,
    momentum: float,
    momenta: Sequence[float],
    gains: Sequence[float],
    dampening: float,
    weight_decay: float | Tensor,
    nesterov: bool,
    maximize: bool,
    foreach: bool | None,
    fused: bool | None,
) -> None:
    r"""One step of DOT (ICCV 2023, eqs. 4–6, and the authors' ``mdistiller/engine/dot.py``), in place.

    .. math:: v_i \leftarrow \mu_i v_i + (1 - \tau) g_i, \qquad \theta \leftarrow \theta - \gamma \sum_i c_i v_i

    Losses are taken one after the other, and one loss's share is exactly a step of ``torch.optim.SGD``: torch's
    own for-loop, foreach and fused paths run it, with nesterov, dampening, maximize and the first buffer being the
    gradient. Weight decay enters with the first loss that reaches the parameter. (The authors' code forgets it
    in the first step of a parameter that only the distillation loss reaches; this does not.)

    With ``fused`` on a GPU one kernel of our own takes all losses at once, where it can
    (:func:`~distill_optim.update.multi_tensor.launches`).

    Args:
        params: P parameters, updated.
        gradients: K sequences of P gradients, None where loss i does not reach parameter p. Nesterov's foreach
            path writes into them, as it does in torch.
        buffers: K lists of P momentum buffers, None before the first step; updated, and filled where None.
        lr: learning rate γ.
        momentum: μ of a parameter that one loss alone reaches in this step.
        momenta: μ of each loss, length K.
        gains: factor c of each loss's buffer where several losses reach the parameter, length K.
        dampening: τ. weight_decay, nesterov, maximize, foreach, fused: as in ``torch.optim.SGD``.
    """
    # foreach and fused together are an error, which is torch's to raise.
    if fused is True and not foreach and triton_dot_sgd.dot_sgd(
        params,
        gradients,
        buffers,
        lr=lr,
        momentum=momentum,
        momenta=momenta,
        gains=gains,
        dampening=dampening,
        weight_decay=weight_decay,
        nesterov=nesterov,
        maximize=maximize,
    ):  # fmt: skip
        return
    reach = [sum(g is not None for g in column) for column in zip(*gradients, strict=True)]
    decayed: set[int] = set()
    for loss, (grads, bufs) in enumerate(zip(gradients, buffers, strict=True)):
        calls: defaultdict[tuple[bool, bool, bool], list[int]] = defaultdict(list)
        for p, grad in enumerate(grads):
            if grad is not None:
                # torch's fused path takes buffers either all new or all old.
                calls[reach[p] > 1, p not in decayed, fused is True and bufs[p] is None].append(p)
        for (shared, first, _), positions in calls.items():
            call_buffers = [bufs[p] for p in positions]
            sgd(
                [params[p] for p in positions],
                [g for g in (grads[p] for p in positions) if g is not None],
                call_buffers,
                lr=cast(float, lr * gains[loss] if shared else lr),  # sgd() takes a tensor too, but does not say so
                momentum=momenta[loss] if shared else momentum,
                weight_decay=cast(float, weight_decay) if first else 0.0,
                dampening=dampening,
                nesterov=nesterov,
                maximize=maximize,
                foreach=foreach,
                fused=fused,
            )
            for p, buffer in zip(positions, call_buffers, strict=True):
                bufs[p] = buffer
            decayed.update(positions)
