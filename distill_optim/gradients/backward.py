"""The backward passes: one per loss, or one of a weighted sum."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor


@contextmanager
def _grads_set_aside(params: Iterable[Tensor]) -> Iterator[dict[Tensor, Tensor]]:
    """Takes every ``.grad`` away for the duration, and puts it back if something raises."""
    params = list(params)
    aside = {p: p.grad for p in params if p.grad is not None}
    for p in aside:
        p.grad = None
    try:
        yield aside
    except BaseException:
        for p in params:
            p.grad = aside.get(p)
        raise


def backward_each(
    losses: Mapping[int, Tensor],
    params: Sequence[Tensor],
    names: Sequence[str],
    *,
    scale: Tensor | None = None,
    retain_graph: bool = False,
) -> tuple[dict[int, dict[Tensor, Tensor]], dict[Tensor, Tensor]]:
    """One gradient per loss, by one ``.backward()`` per loss with ``.grad`` taken away in between.

    (``torch.autograd.grad`` would be shorter, but skips the hooks that distributed training hangs on, ignores the
    parameters' layout and may hand out tensors that share memory.) The last loss frees the graph.

    Args:
        losses: scalar losses by index.
        params: the parameters that gradients are wanted of.
        names: names of all losses, for messages.
        scale: what each loss's gradient is multiplied by (a loss scale), a scalar tensor.
        retain_graph: whether the last loss leaves the graph in place too.

    Returns:
        Per loss the gradient of each parameter that it reaches; and the ``.grad`` that were there before, which
        are left set to None.

    Raises:
        ValueError: for a loss whose graph was freed, that reaches no parameter, or whose gradient is sparse.
            All ``.grad`` are as before then.
    """
    gradients: dict[int, dict[Tensor, Tensor]] = {}
    last = list(losses)[-1]
    with _grads_set_aside(params) as before:
        for i, loss in losses.items():
            _backward({i: loss}, names, _seed(loss, scale), retain_graph=retain_graph or i != last)
            own = gradients[i] = {}
            for p in params:
                if p.grad is not None:
                    own[p] = p.grad
                    p.grad = None
            _check_gradients(own, names[i])
    return gradients, before


def backward_weighted(
    losses: Mapping[int, Tensor],
    weights: Mapping[int, Tensor],
    params: Sequence[Tensor],
    names: Sequence[str],
    alone: Mapping[int, Sequence[Tensor]],
    *,
    scale: Tensor | None = None,
    retain_graph: bool = False,
) -> None:
    """Accumulates the gradient of the weighted sum into ``.grad``, in one backward pass.

    Args:
        losses: scalar losses by index.
        weights: a 0-d tensor for each.
        params: the parameters that gradients are wanted of.
        names: names of all losses, for messages.
        alone: the parameters that one loss alone reaches, by loss: they take its gradient as it is.
        scale: what every gradient is multiplied by (a loss scale), a scalar tensor.
        retain_graph: as in ``torch.autograd.backward``.

    Raises:
        ValueError: as :func:`backward_each`.
    """
    # A weight of zero would take a loss's own parameters' gradient away with it, so such a loss keeps a trace that
    # can be divided out again: a power of two, so that nothing is lost but range. On the shared parameters it is
    # too small to matter.
    trace = 2.0**-16
    factors = {i: torch.where(w.abs() < trace, trace, w) if alone.get(i) else w for i, w in weights.items()}
    with _grads_set_aside(params) as before:
        seeds = [_seed(loss, factors[i] if scale is None else factors[i] * scale) for i, loss in losses.items()]
        _backward(losses, names, *seeds, retain_graph=retain_graph)
        _check_gradients({p: p.grad for p in params if p.grad is not None}, "/".join(names[i] for i in losses))
        for i in losses:
            grads = [p.grad for p in alone.get(i, ()) if p.grad is not None]
            if grads:
                torch._foreach_div_(grads, factors[i].to(grads[0].device, grads[0].dtype))
    for p, grad in before.items():
        p.grad = grad if p.grad is None else grad.add_(p.grad)


def _seed(loss: Tensor, scale: Tensor | None) -> Tensor:
    seed = torch.ones_like(loss)
    return seed if scale is None else seed * scale.to(loss.device, loss.dtype)


def _backward(losses: Mapping[int, Tensor], names: Sequence[str], *seeds: Tensor, retain_graph: bool) -> None:
    try:
        torch.autograd.backward(tuple(losses.values()), seeds, retain_graph=retain_graph)
    except RuntimeError as error:
        if "second time" not in str(error):
            raise
        raise ValueError(
            f"losses[{'/'.join(names[i] for i in losses)!r}]: its graph was freed by an earlier backward; compute the "
            "losses anew, or pass retain_graph=True to that backward"
        ) from error


def _check_gradients(gradients: Mapping[Tensor, Tensor], name: str) -> None:
    if not gradients:
        raise ValueError(
            f"losses[{name!r}]: it reaches none of this optimizer's parameters; check that they require grad and "
            "that the loss was computed from them, or leave it out of the mapping in such a step"
        )
    for p, gradient in gradients.items():
        if gradient.layout != torch.strided:
            raise ValueError(
                f"losses[{name!r}]: the gradient of a parameter of shape {tuple(p.shape)} has layout "
                f"{gradient.layout}; several losses need dense gradients, e.g. nn.Embedding(sparse=False)"
            )
