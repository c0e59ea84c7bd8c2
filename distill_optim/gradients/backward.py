"""The backward passes: one per loss, or one of a weighted sum."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from distill_optim.gradients.graph import nodes_above


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
        ValueError: for a loss whose graph was freed or can be walked back only once, that reaches no parameter, or
            whose gradient is sparse. All ``.grad`` are as before then.
    """
    refuse_graphed(losses, names)
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
    with walked_back("/".join(names[i] for i in losses)):
        torch.autograd.backward(tuple(losses.values()), seeds, retain_graph=retain_graph)


@contextmanager
def walked_back(name: str) -> Iterator[None]:
    """Says what to do where torch cannot walk a graph back, or not a second time.

    Args:
        name: the loss's, for the message.

    Raises:
        ValueError: in the place of torch's RuntimeError.
    """
    try:
        yield
    except RuntimeError as error:
        if "second time" in str(error):
            raise ValueError(
                f"losses[{name!r}]: its graph was freed by an earlier backward; compute the losses anew, or pass "
                "retain_graph=True to that backward"
            ) from error
        if "donated buffers" in str(error):
            raise ValueError(
                f"losses[{name!r}]: the graph passes a compiled model whose first backward was an ordinary one, so "
                "torch.compile made a backward that gives its buffers away and cannot be repeated for the next loss; "
                "set torch._functorch.config.donated_buffer = False before the first step, or, in a process that has "
                "compiled already, set it and call torch.compiler.reset()"
            ) from error
        if "`inputs`" in str(error):
            raise ValueError(
                f"through: between it and losses[{name!r}] lies a reentrant checkpoint, which can only be walked back "
                "whole; call checkpoint(..., use_reentrant=False), or leave through out"
            ) from error
        raise


def refuse_graphed(losses: Mapping[int, Tensor], names: Sequence[str], stop: Collection[Tensor] = ()) -> None:
    """Refuses several losses behind a callable of ``torch.cuda.make_graphed_callables``.

    Its backward is a CUDA graph: replayed for a second loss it would read activations that the first replay overwrote,
    and write into the memory in which it handed out the first loss's gradients, without any error.

    Args:
        losses: scalar losses by index.
        names: names of all losses, for the message.
        stop: tensors below which the graph is walked back only once.

    Raises:
        ValueError: if one of several losses has such a callable in its graph.
    """
    # make_graphed_callables defines the Function anew for every callable; where nobody has called it there is no need
    # to look at the graph.
    if len(losses) < 2 or all(kind.__name__ != "Graphed" for kind in torch.autograd.Function.__subclasses__()):
        return
    for i, loss in losses.items():
        if any(node.name() == "GraphedBackward" for node in nodes_above([loss], stop)):
            raise ValueError(
                f"losses[{names[i]!r}]: the graph passes a callable of torch.cuda.make_graphed_callables, whose "
                "backward can be replayed once per forward and not once per loss; capture the whole step in a "
                "torch.cuda.CUDAGraph instead, or add up the losses and call .backward()"
            )


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
