"""The backward passes: one per loss, or one of a weighted sum."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import repeat
from operator import is_
from typing import NoReturn

import torch
from torch import Tensor

from distill_optim.gradients.collected import Column
from distill_optim.gradients.graph import delays_reduction, hides_leaves, leaves_above, nodes_above
from distill_optim.gradients.processes import Replicas
from distill_optim.sharding import local

# No loss has this index.
NONE = -1


@contextmanager
def _grads_set_aside(params: Sequence[Tensor], replicas: Replicas | None) -> Iterator[Column]:
    """Takes every ``.grad`` away for the duration, and puts it back if something raises."""
    aside = _taken(params)
    if replicas is not None:
        # DistributedDataParallel may have made it a part of a bucket, which the next backward pass overwrites.
        aside = [g if g is None or not _is_part(g) else g.clone() for g in aside]
    try:
        yield aside
    except BaseException:
        for p, grad in zip(params, aside, strict=True):
            p.grad = grad
        raise


def _taken(params: Sequence[Tensor]) -> Column:
    """Takes every ``.grad`` away."""
    grads = [p.grad for p in params]
    for p in params:
        p.grad = None
    return grads


def backward_each(
    losses: Mapping[int, Tensor],
    params: Sequence[Tensor],
    names: Sequence[str],
    *,
    scale: Tensor | None = None,
    retain_graph: bool = False,
    present: Sequence[int] | Callable[[], Sequence[int]] | None = None,
    replicas: Replicas | None = None,
) -> tuple[dict[int, Column], Column]:
    """One gradient per loss, by one ``.backward()`` per loss with ``.grad`` taken away in between.

    (``torch.autograd.grad`` would be shorter, but skips the hooks that distributed training hangs on, ignores the
    parameters' layout and may hand out tensors that share memory.) The last loss frees the graph.

    Args:
        losses: scalar losses by index.
        params: the parameters that gradients are wanted of.
        names: names of all losses, for messages.
        scale: what each loss's gradient is multiplied by (a loss scale), a scalar tensor.
        retain_graph: whether the last loss leaves the graph in place too.
        present: the losses that any process has, in order; or a function that asks the others, some of which have run
            out of batches, to be called after a backward pass; None: those given.
        replicas: the processes to average over; one loss's gradient is under way while the next is walked back.

    Returns:
        Per loss the gradients, None for a parameter that it does not reach; and the ``.grad`` that were there before,
        which are left set to None.

    Raises:
        ValueError: for a loss whose graph was freed or can be walked back only once, that reaches no parameter, or
            whose gradient is sparse. All ``.grad`` are as before then.
    """
    refuse_graphed(losses, names)
    gradients: dict[int, Column] = {}
    under_way: dict[int, Callable[[], Column]] = {}
    last = next(reversed(losses), None)

    def walk(i: int, *, down_to_all: bool = False) -> tuple[Column, set[Tensor]]:
        """The loss's gradients, and parameters that it does not reach although they have one."""
        others: set[Tensor] = set()
        if down_to_all:
            others = _backward_of_all(losses, i, params, names, scale, retain_graph=retain_graph or i != last)
        elif i in losses:
            seed = _seed(losses[i], scale)
            _backward({i: losses[i]}, names, seed, retain_graph=retain_graph or i != last)
        own = _taken(params)
        if i in losses:
            _check_gradients([g for p, g in zip(params, own, strict=True) if p not in others], names[i])
        return own, others

    with _grads_set_aside(params, replicas) as before:
        if replicas is None:
            gradients.update({i: walk(i)[0] for i in losses})
        else:
            if callable(present):
                # What the wrapper averages now the processes without batches do not see: it is given zeros.
                walk(NONE, down_to_all=True)
                present = present()
            order = list(losses) if present is None else present
            for i in order:
                own, others = walk(i, down_to_all=i == order[0])
                under_way[i] = replicas.average(own, params, without=others)
            gradients.update({i: finish() for i, finish in under_way.items()})
    return gradients, before


def gradients_beside(
    losses: Mapping[int, Tensor], params: Sequence[Tensor], names: Sequence[str], *, scale: Tensor | None = None
) -> dict[int, Column]:
    """One gradient per loss for somebody who looks on: the training loop's own backward pass is still to come.

    By ``torch.autograd.grad``, for the very reasons that :func:`backward_each` avoids it: ``.grad`` is not touched, and
    what waits for a backward pass (``DistributedDataParallel`` averages the first one after a forward and no other)
    takes no notice. So the gradients are this process's. The graph stays.

    Args:
        losses: scalar losses by index.
        params: the parameters that gradients are wanted of.
        names: names of all losses, for messages.
        scale: what each loss's gradient is multiplied by (a loss scale), a scalar tensor.

    Returns:
        Per loss the gradients, None for a parameter that it does not reach; not to be written into.

    Raises:
        ValueError: as :func:`backward_each`; also for sharded parameters and reentrant checkpoints, which know whole
            backward passes only, and in the first step under ``DistributedDataParallel(static_graph=True)``.
    """
    if any(local(p)[1] is not None for p in params):
        raise ValueError(
            "losses: the parameters are sharded (DTensor), and only a backward pass gathers and reduces them; take an "
            "optimizer of distill_optim, which keeps each loss's gradient of its own passes"
        )
    if hides_leaves(losses.values()):
        raise ValueError(
            "losses: below a reentrant checkpoint the graph can only be walked back whole; call "
            "checkpoint(..., use_reentrant=False)"
        )
    if delays_reduction(losses.values()):
        raise ValueError(
            "losses: DistributedDataParallel(static_graph=True) would take this for its first backward pass, and "
            "average nothing in its own; leave static_graph out while you look, or look from the second step on"
        )
    refuse_graphed(losses, names)
    wanted = [n for n, p in enumerate(params) if p.requires_grad]
    gradients: dict[int, Column] = {}
    for i, loss in losses.items():
        with walked_back(names[i]):
            found = torch.autograd.grad(
                loss, [params[n] for n in wanted], _seed(loss, scale), retain_graph=True, allow_unused=True
            )
        own = dict(zip(wanted, found, strict=True))
        gradients[i] = [own.get(n) for n in range(len(params))]
        _check_gradients(gradients[i], names[i])
    return gradients


def backward_onto(
    i: int, losses: Mapping[int, Tensor], params: Sequence[Tensor], targets: Column, names: Sequence[str]
) -> None:
    """Adds one loss's gradient to tensors that are there, as autograd adds to ``.grad``: no gradient is stored.

    Args:
        i: the loss that is walked back; the last one frees the graph.
        losses: scalar losses by index.
        params: the parameters, whose ``.grad`` are None before and afterwards.
        targets: what the gradient of each is added to; None for a parameter that the loss does not reach.
        names: names of all losses, for messages.

    Raises:
        ValueError: as :func:`backward_each`; what has been added by then stays.
    """
    for p, target in zip(params, targets, strict=True):
        p.grad = target
    try:
        _backward({i: losses[i]}, names, _seed(losses[i], None), retain_graph=i != next(reversed(losses)))
    finally:
        for grad, target in zip(_taken(params), targets, strict=True):
            # Autograd adds in place; what a hook puts there may be another tensor.
            if grad is not None and target is not None and grad is not target:
                target.copy_(grad)


def _backward_of_all(
    losses: Mapping[int, Tensor],
    i: int,
    params: Sequence[Tensor],
    names: Sequence[str],
    scale: Tensor | None,
    *,
    retain_graph: bool,
) -> set[Tensor]:
    """The first backward pass after a forward in ``DistributedDataParallel``: of one loss, down to all parameters.

    The hooks there wait for every parameter that the forward used, and average what this one pass brings them, which
    has to be the gradient of the same loss in every process. So the other losses are walked back with it, with weights
    of zero. (What they share is walked once.)

    Returns:
        The parameters that the loss does not reach, although their ``.grad`` may be there now.
    """
    if not losses:
        return set()
    # Where the graph does not say what a loss reaches, it is walked back alone.
    hidden = i in losses and hides_leaves(losses.values())
    walked = {i: losses[i]} if hidden else losses
    _backward(walked, names, *(_seed(loss, scale) * (j == i) for j, loss in walked.items()), retain_graph=retain_graph)
    reached = leaves_above([losses[i]]) if i in losses else set()
    return set() if hidden else {p for p in params if p not in reached}


def backward_weighted(
    losses: Mapping[int, Tensor],
    weights: Mapping[int, Tensor],
    params: Sequence[Tensor],
    names: Sequence[str],
    alone: Mapping[int, Sequence[Tensor]],
    *,
    scale: Tensor | None = None,
    retain_graph: bool = False,
    replicas: Replicas | None = None,
) -> Column:
    """The gradient of the weighted sum, in one backward pass.

    Args:
        losses: scalar losses by index.
        weights: a 0-d tensor for each.
        params: the parameters that gradients are wanted of.
        names: names of all losses, for messages.
        alone: the parameters that one loss alone reaches, by loss: they take its gradient as it is.
        scale: what every gradient is multiplied by (a loss scale), a scalar tensor.
        retain_graph: as in ``torch.autograd.backward``.
        replicas: the processes to average over.

    Returns:
        The ``.grad`` that were there before; ``.grad`` holds the new gradient alone.

    Raises:
        ValueError: as :func:`backward_each`.
    """
    # A weight of zero would take a loss's own parameters' gradient away with it, so such a loss keeps a trace that
    # can be divided out again: a power of two, so that nothing is lost but range. On the shared parameters it is
    # too small to matter.
    trace = 2.0**-16
    factors = {i: torch.where(w.abs() < trace, trace, w) if alone.get(i) else w for i, w in weights.items()}
    with _grads_set_aside(params, replicas) as before:
        seeds = [_seed(loss, factors[i] if scale is None else factors[i] * scale) for i, loss in losses.items()]
        _backward(losses, names, *seeds, retain_graph=retain_graph)
        _check_gradients([p.grad for p in params], "/".join(names[i] for i in losses))
        for i in losses:
            grads = [p.grad for p in alone.get(i, ()) if p.grad is not None]
            if grads:
                torch._foreach_div_(grads, factors[i].to(grads[0].device, grads[0].dtype))
        if replicas is not None:
            averages = replicas.average([p.grad for p in params], params)()
            for p, grad in zip(params, averages, strict=True):
                p.grad = grad
    return before


def _is_part(tensor: Tensor) -> bool:
    return tensor.untyped_storage().nbytes() > tensor.numel() * tensor.element_size()


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


def refuse_unreached(name: str) -> NoReturn:
    """Raises for a loss without a gradient."""
    raise ValueError(
        f"losses[{name!r}]: it reaches none of this optimizer's parameters; check that they require grad and "
        "that the loss was computed from them, or leave it out of the mapping in such a step (under FSDP2 also "
        "check that set_requires_gradient_sync(False) is not on, which keeps gradients out of .grad)"
    )


def _check_gradients(gradients: Column, name: str) -> None:
    if all(map(is_, gradients, repeat(None))):
        refuse_unreached(name)
    for gradient in gradients:
        if gradient is not None and gradient.layout != torch.strided:
            raise ValueError(
                f"losses[{name!r}]: the gradient of a parameter of shape {tuple(gradient.shape)} has layout "
                f"{gradient.layout}; several losses need dense gradients, e.g. nn.Embedding(sparse=False)"
            )
