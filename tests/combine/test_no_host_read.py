"""Nothing in ``combine`` reads a tensor on the host or moves one there: run on fake tensors that claim to be on CUDA.

A fake tensor has no data, so reading it raises. That includes a value-dependent shape. A copy to the host shows as a
tensor on another device, and the one read that fake tensors let pass, the look at a LAPACK error code, by its name.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from distill_optim import combine


class LeftDevice(AssertionError):
    """A tensor that is not on the device, or an operation that looks at the device's values."""


class _Watch(TorchDispatchMode):
    """Every operation's results lie on CUDA."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._linalg_check_errors.default:
            raise LeftDevice("the error code of a decomposition")
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and leaf.device.type != "cuda":
                raise LeftDevice(f"{func} gave a tensor on {leaf.device}")
        return result


class _Indexing(TorchFunctionMode):
    """x[...] by views: indexing itself sets the current CUDA device, which a build without CUDA cannot."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.__getitem__:
            return _view(*args)
        if func is Tensor.__setitem__:
            x, index, value = args
            return _view(x, index).add_(value)  # any update in place: there are no values here
        return func(*args, **(kwargs or {}))


def _view(x: Tensor, index: Any) -> Tensor:
    entries = index if isinstance(index, tuple) else (index,)
    dim = 0
    for entry in entries:
        if isinstance(entry, Tensor):
            raise LeftDevice("a mask, whose ones the host has to count")
        if entry is Ellipsis:
            dim = x.dim() - sum(e is not None for e in entries[entries.index(Ellipsis) + 1 :])
        elif entry is None:
            x, dim = x.unsqueeze(dim), dim + 1
        elif isinstance(entry, int):
            x = x.select(dim, entry)
        else:
            x, dim = torch.ops.aten.slice.Tensor(x, dim, entry.start, entry.stop, entry.step or 1), dim + 1
    return x


def on_fake_cuda(function: Callable[..., Tensor], *shapes: tuple[int, ...]) -> Tensor:
    """``function`` of fake CUDA tensors of these shapes; raises where the host would read or receive anything."""
    with FakeTensorMode():
        arguments = [torch.empty(shape, device="cuda") for shape in shapes]
        with _Indexing(), _Watch():  # type: ignore[no-untyped-call]  # torch's
            return function(*arguments)


@pytest.mark.parametrize(
    ("culprit", "caught"),
    [
        (lambda x: x * x.sum().item(), DataDependentOutputException),
        (lambda x: x if x.sum() > 0 else -x, DataDependentOutputException),
        (lambda x: x.masked_select(x > 0), DynamicOutputShapeException),
        (lambda x: x[x > 0], LeftDevice),
        (lambda x: x.cpu(), LeftDevice),
        (lambda x: x.cpu().cuda(), LeftDevice),
        (lambda x: x + torch.tensor([1.0, 2.0, 3.0], device="cuda"), LeftDevice),
        (lambda x: torch.linalg.solve(x, x), LeftDevice),
        (lambda x: torch.linalg.cholesky(x), LeftDevice),
    ],
    ids=[
        "item",
        "if",
        "masked_select",
        "mask",
        "cpu",
        "to and fro",
        "from a list",
        "checked solve",
        "checked Cholesky",
    ],
)
def test_a_culprit_is_caught(culprit: Callable[[Tensor], Tensor], caught: type[Exception]) -> None:
    """The harness is able to fail."""
    with pytest.raises(caught):
        on_fake_cuda(culprit, (3, 3))


@pytest.mark.parametrize("k", [1, 2, 3, 8])
def test_gram(k: int) -> None:
    def lists(*tensors: Tensor) -> Tensor:
        """K lists of one full, one half, one complex, one empty and one missing gradient."""
        a, b, c, d = tensors
        return combine.gram([[a, b.half(), torch.complex(c, c), d, None if i else c] for i in range(k)])

    result = on_fake_cuda(lists, (), (2, 3), (4,), (0,))
    assert (result.shape, result.dtype, result.device.type) == ((k, k), torch.float64, "cuda")


@pytest.mark.parametrize("dominance", combine.DOMINANCE)
@pytest.mark.parametrize("k", [2, 3])
def test_dominance_scales(k: int, dominance: str) -> None:
    result = on_fake_cuda(lambda gram, losses: combine.dominance_scales(dominance, gram, losses), (k, k), (k,))
    assert (result.shape, result.device.type) == ((k,), "cuda")


@pytest.mark.parametrize("batch", [(), (2,)])
@pytest.mark.parametrize("k", [1, 2, 3, 8, 9, 32])
@pytest.mark.parametrize("solve", [combine.min_norm, lambda gram: combine.simplex_qp(gram.double())])
def test_solvers(solve: Callable[[Tensor], Tensor], k: int, batch: tuple[int, ...]) -> None:
    result = on_fake_cuda(solve, (*batch, k, k))
    assert (result.shape, result.dtype, result.device.type) == ((*batch, k), torch.float64, "cuda")


@pytest.mark.parametrize("rescale", [True, False])
@pytest.mark.parametrize("dominance", combine.DOMINANCE)
@pytest.mark.parametrize("k", [2, 3, 9])
def test_weights(k: int, dominance: str, rescale: bool) -> None:
    result = on_fake_cuda(
        lambda gram, losses: combine.weights(gram, losses, dominance=dominance, rescale=rescale), (k, k), (k,)
    )
    assert (result.shape, result.dtype, result.device.type) == ((k,), torch.float64, "cuda")
