"""Does a function read a tensor on the host? Run it on fake tensors that claim to be on CUDA; no GPU is needed.

A fake tensor has no data, so reading it raises. That includes a value-dependent shape. A copy to the host shows as a
tensor on another device. The reads that fake tensors let pass are known by their names: the look at LAPACK's error
code by ``torch.linalg``'s ``eigh``, ``svd``, ``pinv``, ``inv``, ``solve`` and ``cholesky``, and an index by a tensor
that is a mask or a single position. A read within some other kernel of torch's would pass unseen.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from distill_optim import combine
from distill_optim.combine import rules
from distill_optim.testing.assertions import AnyMethod


class LeftDevice(AssertionError):
    """A tensor that is not on the device, or an operation that looks at the device's values."""


def on_fake_cuda(function: Callable[..., Tensor], *shapes: tuple[int, ...]) -> Tensor:
    """``function`` of fake CUDA tensors of these shapes.

    Args:
        function: of as many tensors as there are shapes.
        shapes: of the arguments, which are float32.

    Returns:
        What the function returns, a fake tensor: its shape, dtype and device can be looked at.

    Raises:
        LeftDevice: where a tensor is made on the host, is copied there, or where an operation looks at its values.
        DataDependentOutputException: torch's, where the host reads a value.
        DynamicOutputShapeException: torch's, where a shape depends on values.

    Example:
        >>> on_fake_cuda(lambda x: x / x.amax(), (3,)).device.type
        'cuda'
        >>> on_fake_cuda(lambda x: x / x.max().item(), (3,))
        Traceback (most recent call last):
        torch._subclasses.fake_tensor.DataDependentOutputException: aten._local_scalar_dense.default
    """
    with FakeTensorMode():
        arguments = [torch.empty(shape, device="cuda") for shape in shapes]
        with _Python(), _Watch():  # type: ignore[no-untyped-call]  # torch's
            return function(*arguments)


def assert_no_host_read(method: AnyMethod, k: int = 3, batch: tuple[int, ...] = ()) -> None:
    """The method runs on an accelerator without the host waiting for it, or receiving anything.

    It would cost a synchronisation per step. The weights have the shape (..., K), are float64 and on the device. What
    depends on K, as an algorithm that is chosen by it, is to be tried on either side.

    Args:
        method: name, function or rule with a memory.
        k: number of losses.
        batch: leading dimensions; none for a rule with a memory.

    Raises:
        AssertionError: see :func:`on_fake_cuda`.

    Example:
        >>> assert_no_host_read("min_norm")
        >>> assert_no_host_read(lambda gram, losses: gram.diagonal().double() if gram.sum() > 0 else losses.double())
        Traceback (most recent call last):
        AssertionError: the host reads a value: aten._local_scalar_dense.default
    """
    rule = combine.method(method)
    try:
        weights = on_fake_cuda(lambda gram, losses: rules.apply(rule, gram, losses, {})[0], (*batch, k, k), (*batch, k))
    except DataDependentOutputException as error:
        raise AssertionError(f"the host reads a value: {error.func}") from error
    except DynamicOutputShapeException as error:
        raise AssertionError(f"the host waits for a shape: {error.func}") from error
    result = (tuple(weights.shape), weights.dtype, weights.device.type)
    if result != ((*batch, k), torch.float64, "cuda"):
        raise AssertionError(f"weights of shape {result[0]}, {result[1]} on {result[2]}")


# Kernels that hand LAPACK's error code to the host from within, where no fake tensor sees it.
_CHECKED = {
    torch.ops.aten._linalg_check_errors,
    torch.ops.aten._linalg_eigh,
    torch.ops.aten._linalg_eigvals,
    torch.ops.aten._linalg_svd,
    torch.ops.aten.linalg_eig,
    torch.ops.aten.linalg_pinv,
}

# What turns a tensor into something of Python's and, on a build without CUDA, fails on the way with another message.
_READS = {Tensor.__float__, Tensor.__int__, Tensor.__index__, Tensor.__array__, Tensor.numpy, Tensor.nonzero}


class _Watch(TorchDispatchMode):
    """Every operation's results lie on CUDA."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket in _CHECKED:
            raise LeftDevice(f"the error code of a decomposition: {func}")
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and leaf.device.type != "cuda":
                raise LeftDevice(f"{func} gave a tensor on {leaf.device}")
        return result


class _Python(TorchFunctionMode):
    """x[...] by views: indexing itself sets the current CUDA device, which a build without CUDA cannot."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.__getitem__:
            return _index(*args)
        if func is Tensor.__setitem__:
            x, index, value = args
            return _index(x, index).add_(value)  # any update in place: there are no values here
        if func is Tensor.copy_:
            return args[0].add_(args[1])  # as above
        if func in _READS or func is torch.nonzero:
            raise LeftDevice(f"a read: {func.__name__}")
        return func(*args, **(kwargs or {}))


def _index(x: Tensor, index: Any) -> Tensor:
    entries = index if isinstance(index, tuple) else (index,)
    dim = 0
    gathered: dict[int, Tensor] = {}
    for position, entry in enumerate(entries):
        if entry is Ellipsis:
            dim = x.dim() - sum(e is not None for e in entries[position + 1 :])
        elif entry is None:
            x, dim = x.unsqueeze(dim), dim + 1
        elif isinstance(entry, int):
            x = x.select(dim, entry)
        elif isinstance(entry, slice):
            x, dim = torch.ops.aten.slice.Tensor(x, dim, entry.start, entry.stop, entry.step or 1), dim + 1
        elif not isinstance(entry, Tensor):
            raise LeftDevice(f"positions that the host sends: {entry!r}")
        elif entry.dtype in (torch.bool, torch.uint8):
            raise LeftDevice("a mask, whose ones the host has to count")
        elif entry.dim() == 0:
            raise LeftDevice("a position that the host has to read; torch.gather and torch.take_along_dim do without")
        else:
            gathered[dim], dim = entry, dim + 1
    if not gathered:
        return x
    result: Tensor = torch.ops.aten.index.Tensor(x, [gathered.get(d) for d in range(dim)])
    return result
