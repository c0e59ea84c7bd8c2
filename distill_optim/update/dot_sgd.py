"""DOT's update: one heavy-ball momentum per loss."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from itertools import chain, repeat
from operator import is_not
from typing import Any, cast

import torch
from torch import Tensor
from torch.optim.sgd import sgd
from torch.utils._foreach_utils import _group_tensors_by_device_and_dtype

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
    step = _fused_sgd if fused and not foreach else partial(sgd, foreach=foreach, fused=fused)
    for reaching, positions in _alike(params, gradients, buffers if fused else ()):
        whole = len(positions) == len(params)
        batch = list(params) if whole else [params[p] for p in positions]
        shared = len(reaching) > 1
        for loss in reaching:
            grads, own = gradients[loss], buffers[loss]
            if not whole:
                grads, own = [grads[p] for p in positions], [own[p] for p in positions]
            step(
                batch,
                cast(list[Tensor], grads),
                own,
                lr=cast(float, lr * gains[loss] if shared else lr),  # sgd() takes a tensor too, but does not say so
                momentum=momenta[loss] if shared else momentum,
                weight_decay=cast(float, weight_decay) if loss == reaching[0] else 0.0,
                dampening=dampening,
                nesterov=nesterov,
                maximize=maximize,
            )
            if not whole:
                for p, buffer in zip(positions, own, strict=True):
                    buffers[loss][p] = buffer


def _alike(
    params: Sequence[Tensor], gradients: Sequence[Sequence[Tensor | None]], buffers: Sequence[Sequence[Tensor | None]]
) -> Iterator[tuple[list[int], Sequence[int]]]:
    """Parameters that go through the same calls: the losses that reach them, and their positions.

    Args:
        params, gradients: as in :func:`dot_sgd`.
        buffers: of a fused call, which takes tensors of one device and dtype, and buffers either all new or all old.
    """
    # Mostly all of them do, and to see that takes less than to sort them.
    complete = all(all(map(is_not, column, repeat(None))) for column in chain(gradients, buffers))
    if complete and (not buffers or len(_group_tensors_by_device_and_dtype([list(params)])) < 2):
        yield list(range(len(gradients))), range(len(params))
        return
    kinds: list[Iterable[object]] = [map(is_not, column, repeat(None)) for column in chain(gradients, buffers)]
    if buffers:
        kinds += [[p.device for p in params], [p.dtype for p in params]]
    alike: defaultdict[tuple[object, ...], list[int]] = defaultdict(list)
    for p, kind in enumerate(zip(*kinds, strict=True)):
        alike[kind].append(p)
    for kind, positions in alike.items():
        yield [loss for loss in range(len(gradients)) if kind[loss]], positions


def _fused_sgd(
    params: list[Tensor], grads: list[Tensor], buffers: list[Tensor | None], *, momentum: float, **options: Any
) -> None:
    """As torch's, which would sort the tensors by device and dtype in every call."""
    first = momentum != 0 and buffers[0] is None
    if first:
        buffers[:] = map(torch.empty_like, grads)
    torch._fused_sgd_(
        params,
        grads,
        cast(list[Tensor], buffers) if momentum else [],
        momentum=momentum,
        is_first_step=first,
        **options,
    )
