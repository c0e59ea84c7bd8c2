"""Beside TorchJD: the same where it is right, and what it does where it is not."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from torch import Tensor

from distill_optim import combine
from tests.reference import gram_methods as reference

aggregation = pytest.importorskip("torchjd.aggregation")
scalarization = pytest.importorskip("torchjd.scalarization")

SHAPES = [(2, 3), (3, 5), (5, 8), (10, 14)]


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    """Its solvers have opinions on the input."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def jacobian(k: int, n: int) -> Tensor:
    """Gradients of about one length, with conflicts among them."""
    return torch.randn(k, n, dtype=torch.float64)


def direction(weights: Tensor, rows: Tensor) -> Tensor:
    step = weights @ rows
    unit: Tensor = step / step.norm()
    return unit


# Name, TorchJD's, and how far apart the directions may be: rounding, or what its regularisation or stopping rule costs.
ALIKE: list[tuple[str, Callable[[], Any], float]] = [
    ("mean", aggregation.MeanWeighting, 1e-15),
    ("sum", aggregation.SumWeighting, 1e-15),
    ("min_norm", lambda: aggregation.MGDAWeighting(epsilon=1e-12, max_iters=100_000), 2e-3),  # Frank–Wolfe: sublinear
    ("upgrad", aggregation.UPGradWeighting, 5e-3),  # 1e-4 of the trace on the diagonal
    ("dualproj", aggregation.DualProjWeighting, 5e-3),
    ("cagrad", lambda: aggregation.CAGradWeighting(c=0.5), 1e-3),  # Clarabel's tolerance, on a normalised matrix
    ("imtl_g", aggregation.IMTLGWeighting, 1e-10),
    ("aligned_mtl", aggregation.AlignedMTLWeighting, 1e-10),
    ("fairgrad", lambda: aggregation.FairGradWeighting(alpha=2.0), 1e-6),  # least_squares stops at 1e-8
]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("name", "theirs", "tolerance"), ALIKE, ids=[name for name, _, _ in ALIKE])
def test_same_direction(name: str, theirs: Callable[[], Any], tolerance: float, shape: tuple[int, int]) -> None:
    rows = jacobian(*shape)
    ours = combine.solve(name, rows)
    assert (direction(ours, rows) - direction(theirs()(rows @ rows.T), rows)).norm() <= tolerance


@pytest.mark.parametrize("shape", SHAPES)
def test_same_weights_in_the_same_convention(shape: tuple[int, int]) -> None:
    """Mean-like or sum-like, as theirs; but for Aligned-MTL, whose authors sum."""
    rows = jacobian(*shape)
    gram = rows @ rows.T
    torch.testing.assert_close(combine.imtl_g(gram), aggregation.IMTLGWeighting()(gram), rtol=1e-8, atol=0)
    torch.testing.assert_close(
        combine.aligned_mtl(gram), aggregation.AlignedMTLWeighting()(gram) * len(gram), rtol=1e-8, atol=0
    )
    torch.testing.assert_close(combine.config(gram) @ rows, aggregation.ConFIG()(rows), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("shape", SHAPES[:3])
def test_pcgrad_in_the_same_order(shape: tuple[int, int]) -> None:
    """Theirs visits by torch.randperm; given the same orders the weights are the same."""
    k, n = shape
    rows = jacobian(k, n)
    for _ in range(5):
        orders = [torch.randperm(k) for _ in range(k)]
        with patch("torch.randperm", side_effect=orders):
            theirs = aggregation.PCGradWeighting()(rows @ rows.T)
        others = [[j for j in order.tolist() if j != i] for i, order in enumerate(orders)]
        visits = torch.tensor(others)
        with patch("distill_optim.combine.pcgrad.random_orders", return_value=visits[None]):
            ours = combine.pcgrad(rows @ rows.T)
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=0)  # some K products in another order


def test_losses_weighed_by_their_values() -> None:
    """Their scalarizers give a scalar: its gradient in the losses are the weights."""
    losses = torch.tensor([0.5, 2.0, 1.25], dtype=torch.float64, requires_grad=True)

    def gradient(scalarizer: Any) -> Tensor:
        return torch.autograd.grad(scalarizer(losses), losses)[0]

    values = losses.detach()
    gls = combine.solve("gls", torch.eye(3), values)
    torch.testing.assert_close(gls, gradient(scalarization.GeometricMean()), rtol=1e-12, atol=0)
    famo = combine.solve("famo", torch.eye(3), values)
    theirs = gradient(scalarization.FAMO(3).double())
    # Theirs adds 1e-8 to every loss.
    torch.testing.assert_close(famo / famo.sum(), theirs / theirs.sum(), rtol=1e-7, atol=0)


def exact(step: Any) -> Tensor:
    return torch.from_numpy(np.asarray(step.weights, dtype=float))


DOMINATED = torch.tensor([[1000.0, 0.0, 0.0], [-0.5, 1.0, 0.0], [0.0, 0.3, 0.7]], dtype=torch.float64)
OPPOSED = torch.tensor([[1.0, 1e-6], [-1.0, 1e-6]], dtype=torch.float64)


@pytest.mark.parametrize("name", ["upgrad", "dualproj"])
def test_projection_of_badly_scaled_gradients(name: str) -> None:
    """Regularised by 1e-4 of the trace, theirs conflicts with the second gradient; ours is the oracle's."""
    gram = DOMINATED @ DOMINATED.T
    theirs = {"upgrad": aggregation.UPGradWeighting, "dualproj": aggregation.DualProjWeighting}[name]()(gram)
    assert (gram @ theirs)[1] < -100
    ours = combine.solve(name, gram)
    # The rounding of an inner product of vectors 1000 long.
    assert (gram @ ours).min() >= -1e-9
    torch.testing.assert_close(ours, exact(getattr(reference, name)(DOMINATED.numpy())), rtol=1e-10, atol=0)


@pytest.mark.parametrize("rows", [OPPOSED, 1e-3 * DOMINATED[1:]], ids=["opposed", "short"])
def test_cagrad_that_gives_up(rows: Tensor) -> None:
    """Theirs is zero where its normalised ‖g_w‖ is below 1e-4, or everything is short; there is a best direction."""
    gram = rows @ rows.T
    theirs = aggregation.CAGradWeighting(c=0.5)(gram)
    ours = combine.cagrad(gram)
    best = torch.from_numpy(reference.cagrad(rows.numpy(), 0.5).vector)
    assert (ours @ rows - best).norm() <= 1e-6 * best.norm()
    if rows is OPPOSED:
        assert theirs.tolist() == [0, 0]


def test_fairgrad_that_stops_early() -> None:
    rows = torch.tensor([[1.0, 1e-3], [-1.0, 1e-3]], dtype=torch.float64)
    gram = rows @ rows.T
    theirs = aggregation.FairGradWeighting(alpha=0.5)(gram)
    unit = torch.from_numpy(reference.fairgrad((gram / gram.norm()).numpy(), 0.5))
    ours = combine.fairgrad(gram, alpha=0.5)
    torch.testing.assert_close(ours, unit, rtol=1e-6, atol=0)  # the matrix has a condition number of 1e6

    def residual(w: Tensor) -> Tensor:
        return ((gram @ w) * w**2 - 1).abs().max()

    # w ∝ ‖G‖^(-1/3) brings ours to the paper's unit.
    assert residual(ours / gram.norm() ** (1 / 3)) < 1e-6
    assert residual(theirs) > 1e-2


def test_imtl_g_of_long_gradients() -> None:
    """An absolute guard: theirs is zero once the lengths exceed 1e12."""
    rows = 1e13 * torch.tensor([[1.0, 0.2], [-0.3, 1.0]], dtype=torch.float64)
    gram = rows @ rows.T
    assert aggregation.IMTLGWeighting()(gram).tolist() == [0, 0]
    torch.testing.assert_close(combine.imtl_g(gram), exact(reference.imtl_g(rows.numpy())), rtol=1e-10, atol=0)


def test_min_norm_of_lengths_far_apart() -> None:
    """Frank–Wolfe stops above the optimum, in a direction that some loss objects to."""
    torch.manual_seed(1)
    worst = 1.0
    for _ in range(20):
        rows = torch.randn(10, 20, dtype=torch.float64) * torch.logspace(-1, 1, 10, dtype=torch.float64)[:, None]
        gram = rows @ rows.T
        theirs, ours = aggregation.MGDAWeighting()(gram), combine.min_norm(gram)
        worst = max(worst, float((theirs @ gram @ theirs) / (ours @ gram @ ours)))
    assert worst > 2


def test_infinite_gradient_is_an_exception_there() -> None:
    gram = torch.eye(3, dtype=torch.float64)
    gram[0, 0] = torch.inf
    with pytest.raises(Exception, match=r"."):  # NumPy's, of no documented kind
        aggregation.CAGradWeighting(c=0.5)(gram)
    assert not combine.cagrad(gram).isfinite().any()
