"""Nothing in ``combine`` reads a tensor on the host or moves one there: see ``distill_optim.testing.fake_cuda``."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException

from distill_optim import combine
from distill_optim.testing import LeftDevice, on_fake_cuda


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
