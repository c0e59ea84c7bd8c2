"""Beside TorchJD 0.18: the same where it is right, and what it does where it is not."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from torch import Tensor

from distill_optim import combine
from distill_optim.combine import FAMO, GradVac, Uncertainty
from distill_optim.testing import assert_non_conflicting, assert_same_vector, gram_of
from tests.reference import gram_methods as reference
from tests.reference import min_norm as min_norm_reference

aggregation = pytest.importorskip("torchjd.aggregation")
linalg = pytest.importorskip("torchjd.linalg")
scalarization = pytest.importorskip("torchjd.scalarization")

SHAPES = [(2, 3), (3, 5), (5, 8), (10, 14)]
shapes = pytest.mark.parametrize("shape", SHAPES, ids=str)


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    """Its solvers have opinions on the input."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def jacobian(k: int, n: int) -> Tensor:
    """Gradients of about one length, with conflicts among them."""
    return torch.randn(k, n, dtype=torch.float64)


def matrix(*rows: list[float]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64)


def direction(weights: Tensor, rows: Tensor) -> Tensor:
    step = weights @ rows
    unit: Tensor = step / step.norm()
    return unit


def exact(step: Any) -> Tensor:
    return torch.from_numpy(np.asarray(step.weights, dtype=float))


def nash(rows: Tensor, **options: Any) -> Tensor:
    """Without its clipping; it takes the Jacobian."""
    weights: Tensor = aggregation.NashMTL(n_tasks=len(rows), max_norm=0.0, **options).weighting(rows)
    return weights


# ---------------------------------------------------------------- where it is right

# Name, TorchJD's as it comes, and how far apart the directions may be: by rounding, or by what it costs it to
# regularise, and to stop.
AS_IT_COMES: list[tuple[str, Callable[[], Any], float]] = [
    ("mean", aggregation.MeanWeighting, 1e-15),
    ("sum", aggregation.SumWeighting, 1e-15),
    ("min_norm", lambda: aggregation.MGDAWeighting(epsilon=1e-12, max_iters=10_000), 1e-2),  # Frank–Wolfe: sublinear
    ("upgrad", aggregation.UPGradWeighting, 5e-3),  # 1e-4 of the trace on the diagonal
    ("dualproj", aggregation.DualProjWeighting, 5e-3),
    ("cagrad", lambda: aggregation.CAGradWeighting(c=0.5), 1e-3),  # Clarabel's tolerance, on a normalised matrix
    ("imtl_g", aggregation.IMTLGWeighting, 1e-10),
    ("aligned_mtl", aggregation.AlignedMTLWeighting, 1e-10),
    ("fairgrad", lambda: aggregation.FairGradWeighting(alpha=2.0), 1e-6),  # least_squares stops at 1e-8
]


@shapes
@pytest.mark.parametrize(("name", "theirs", "tolerance"), AS_IT_COMES, ids=[name for name, _, _ in AS_IT_COMES])
def test_same_direction(name: str, theirs: Callable[[], Any], tolerance: float, shape: tuple[int, int]) -> None:
    rows = jacobian(*shape)
    ours = combine.solve(name, rows)
    assert (direction(ours, rows) - direction(theirs()(rows @ rows.T), rows)).norm() <= tolerance


def unregularised() -> Any:
    return linalg.QuadprogProjector(norm_eps=0.0, reg_eps=0.0)


# Ours, TorchJD's with its guards at zero and its patience without end, and how far apart the weights may be, as a share
# of the largest.
UNGUARDED: dict[str, tuple[Any, Callable[[], Any], float]] = {
    # An active-set method in float64; the condition number of these products is below 1e4.
    "upgrad": (combine.upgrad, lambda: aggregation.UPGradWeighting(projector=unregularised()), 1e-10),
    "dualproj": (combine.dualproj, lambda: aggregation.DualProjWeighting(projector=unregularised()), 1e-10),
    # Clarabel stops at a gap of 1e-8, of an objective that is flat at its optimum: the root of that.
    "cagrad 0.4": (
        partial(combine.cagrad, c=0.4),
        lambda: aggregation.CAGradWeighting(c=0.4, norm_eps=0.0),
        1e-3,
    ),
    "cagrad 2": (partial(combine.cagrad, c=2.0), lambda: aggregation.CAGradWeighting(c=2.0, norm_eps=0.0), 1e-3),
    # Projected gradient steps; linear convergence at a rate of the condition number.
    "sdmgrad": (combine.sdmgrad, lambda: aggregation.SDMGradWeighting(lr=0.5, n_iter=3000), 1e-4),
}


@shapes
@pytest.mark.parametrize("name", UNGUARDED)
def test_same_weights_without_its_guards(name: str, shape: tuple[int, int]) -> None:
    method, theirs, tolerance = UNGUARDED[name]
    rows = jacobian(*shape)
    gram = rows @ rows.T
    ours = method(gram)
    torch.testing.assert_close(theirs()(gram), ours, rtol=0, atol=tolerance * float(ours.abs().max()))


@shapes
@pytest.mark.parametrize("name", ["upgrad", "dualproj"])
def test_same_weights_for_a_preference(name: str, shape: tuple[int, int]) -> None:
    rows, u = jacobian(*shape), torch.arange(1, shape[0] + 1).double()
    gram = rows @ rows.T
    theirs = {"upgrad": aggregation.UPGradWeighting, "dualproj": aggregation.DualProjWeighting}[name]
    ours = getattr(combine, name)(gram, preference=u)
    torch.testing.assert_close(theirs(u, projector=unregularised())(gram), ours, rtol=0, atol=1e-10 * float(ours.max()))


def test_same_two_weights_of_min_norm() -> None:
    """One step of Frank–Wolfe along the segment ends at its best point; theirs makes some more there."""
    for _ in range(20):
        rows = jacobian(2, 3) * torch.tensor([[1.0], [3.0]])
        gram = rows @ rows.T
        theirs = aggregation.MGDAWeighting(epsilon=1e-12)(gram)
        torch.testing.assert_close(combine.min_norm(gram), theirs, rtol=0, atol=1e-12)


@shapes
def test_same_weights_in_the_same_convention(shape: tuple[int, int]) -> None:
    """Mean-like or sum-like, as theirs; but for Aligned-MTL, whose authors sum."""
    rows = jacobian(*shape)
    gram = rows @ rows.T
    torch.testing.assert_close(combine.imtl_g(gram), aggregation.IMTLGWeighting()(gram), rtol=1e-8, atol=0)
    torch.testing.assert_close(
        combine.aligned_mtl(gram), aggregation.AlignedMTLWeighting()(gram) * len(gram), rtol=1e-8, atol=0
    )
    torch.testing.assert_close(combine.config(gram) @ rows, aggregation.ConFIG()(rows), rtol=1e-8, atol=1e-8)
    w = torch.arange(1, len(gram) + 1).double()
    constant = combine.constant(gram, gram.diagonal(), weights=w)
    assert torch.equal(constant, aggregation.ConstantWeighting(w)(gram))


@shapes
def test_same_bargain(shape: tuple[int, int]) -> None:
    """Ours is that of G/‖G‖_F, hence √‖G‖_F times theirs, which stops at a residual of 1e-3 or a step of 1e-6."""
    rows = jacobian(*shape)
    gram = rows @ rows.T
    ours = combine.nash_mtl(gram) / gram.norm().sqrt()
    torch.testing.assert_close(nash(rows, optim_niter=100), ours, rtol=1e-2, atol=0)


@shapes
@pytest.mark.parametrize("alpha", [0.5, 1.0, 2.0])
def test_same_fair_shares(shape: tuple[int, int], alpha: float) -> None:
    """Ours is that of G/‖G‖_F, hence ‖G‖_F^(α/(1 + α)) times theirs; least_squares stops at 1e-8."""
    rows = jacobian(*shape)
    gram = rows @ rows.T
    ours = combine.fairgrad(gram, alpha=alpha) / gram.norm() ** (alpha / (1 + alpha))
    torch.testing.assert_close(aggregation.FairGradWeighting(alpha=alpha)(gram), ours, rtol=1e-4, atol=0)


@shapes
def test_pcgrad_in_the_same_order(shape: tuple[int, int]) -> None:
    """Theirs visits by torch.randperm; given the same orders the weights are the same."""
    k, n = shape
    rows = jacobian(k, n)
    for _ in range(5):
        orders = [torch.randperm(k) for _ in range(k)]
        with patch("torch.randperm", side_effect=orders):
            theirs = aggregation.PCGradWeighting()(rows @ rows.T)
        visits = torch.tensor([[j for j in order.tolist() if j != i] for i, order in enumerate(orders)])
        with patch("distill_optim.combine.pcgrad.random_orders", return_value=visits[None]):
            ours = combine.pcgrad(rows @ rows.T)
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=0)  # some K products in another order


def vaccinated(rows: Tensor, theirs: Any, steps: int) -> tuple[list[Tensor], list[Tensor]]:
    """Weights of so many steps in the same random orders: ours, and theirs."""
    k, rule, ours, expected = len(rows), GradVac(), [], []
    state = rule.init(torch.ones(k))
    for _ in range(steps):
        orders = [torch.randperm(k - 1) for _ in range(k)]
        with patch("torch.randperm", side_effect=orders):
            expected.append(theirs(rows @ rows.T))
        visits = torch.stack([order + (order >= i) for i, order in enumerate(orders)])
        with patch("distill_optim.combine.gradvac.random_orders", return_value=visits):
            weights, state = rule(rows @ rows.T, torch.ones(k), state)
        ours.append(weights)
        rows = rows + 0.3 * torch.randn_like(rows) * rows.norm(dim=1, keepdim=True)
    return ours, expected


@shapes
def test_gradvac_in_the_same_order(shape: tuple[int, int]) -> None:
    """Five steps, without its 1e-8 beside lengths and cosines."""
    ours, theirs = vaccinated(jacobian(*shape), aggregation.GradVacWeighting(eps=0.0), 5)
    # Shares divide by √(1 − φ̂²), and add up over K.
    torch.testing.assert_close(torch.stack(ours), torch.stack(theirs), rtol=1e-9, atol=0)


LOSSES = torch.tensor([0.5, 2.0, 1.25], dtype=torch.float64)


def gradient(scalarizer: Any, losses: Tensor) -> Tensor:
    """Their scalarizers give a scalar: its gradient in the losses are the weights."""
    leaf = losses.clone().requires_grad_()
    return torch.autograd.grad(scalarizer(leaf), leaf)[0]


def test_losses_weighed_by_their_values() -> None:
    theirs = gradient(scalarization.GeometricMean(), LOSSES)
    torch.testing.assert_close(combine.solve("gls", torch.eye(3), LOSSES), theirs, rtol=1e-12, atol=0)


def test_dwa_over_epochs() -> None:
    """Of four steps; torch.optim's order: the weights of a step, then its losses."""
    rule, theirs = combine.DWA(temperature=1.5, window=4), scalarization.DWA(temperature=1.5)
    state = rule.init(LOSSES)
    for step in range(16):
        losses = LOSSES * (1 + torch.rand(3).double())
        weights, state = rule(None, losses, state)
        # Means as a sum of four over four; an exponential of a quotient.
        torch.testing.assert_close(weights, gradient(theirs, losses), rtol=1e-14, atol=0)
        if step % 4 == 3:
            theirs.step()


def test_famo_over_steps() -> None:
    """Its 1e-8 beside losses of 1 moves their logarithms by as much, and Adam by that over the fall of a loss."""
    rule, theirs = FAMO(), scalarization.FAMO(3).double()
    state = rule.init(LOSSES)
    for _ in range(10):
        losses = LOSSES * (1 + torch.rand(3).double())
        weights, state = rule(None, losses, state)
        weights = weights / losses
        torch.testing.assert_close(weights / weights.sum(), gradient(theirs, losses), rtol=1e-5, atol=0)
        after = losses * torch.tensor([0.9, 0.8, 0.95])
        state = rule.observe(after, state)
        theirs.update(after)


def test_uncertainty_over_steps() -> None:
    """Its log-variances in an Adam of their own, at our learning rate."""
    rule, theirs = Uncertainty(lr=0.025), scalarization.UW(3).double()
    adam = torch.optim.Adam(theirs.parameters(), lr=0.025)
    state = rule.init(LOSSES)
    for _ in range(10):
        losses = LOSSES * (1 + torch.rand(3).double())
        weights, state = rule(None, losses, state)
        leaf = losses.clone().requires_grad_()
        adam.zero_grad()
        theirs(leaf).backward()
        assert leaf.grad is not None
        torch.testing.assert_close(weights, leaf.grad, rtol=1e-12, atol=0)
        adam.step()


# ---------------------------------------------------------------- where it is not

DOMINATED = matrix([1000.0, 0.0, 0.0], [-0.5, 1.0, 0.0], [0.0, 0.3, 0.7])
# Lengths and conflicts of every training run; late in it.
SHORT = 1e-3 * matrix([1.0, 0.2, -0.4], [-0.8, 0.5, 0.1], [0.3, -0.9, 0.6])
OPPOSED = matrix([1.0, 1e-6], [-1.0, 1e-6])
PROJECTIONS = {"upgrad": aggregation.UPGradWeighting, "dualproj": aggregation.DualProjWeighting}
projection = pytest.mark.parametrize("name", PROJECTIONS)


@projection
def test_projection_of_badly_scaled_gradients(name: str) -> None:
    """Regularised by 1e-4 of the trace, theirs conflicts with the second gradient; ours is the oracle's."""
    gram = DOMINATED @ DOMINATED.T
    theirs = PROJECTIONS[name]()(gram)
    assert (gram @ theirs)[1] < -100
    ours = combine.solve(name, gram)
    assert_non_conflicting(ours, gram)
    # The condition number is that of the unit rows, 2.
    torch.testing.assert_close(ours, exact(getattr(reference, name)(DOMINATED.numpy())), rtol=1e-12, atol=0)


@projection
def test_projection_of_short_gradients(name: str) -> None:
    """Theirs takes a trace below 1e-4 for zero, and gives the mean."""
    gram = SHORT @ SHORT.T
    theirs = PROJECTIONS[name]()(gram)
    # All but the factor with the identity matrix that is left.
    torch.testing.assert_close(theirs, torch.full_like(theirs, 1 / 3), rtol=1e-12, atol=0)
    with pytest.raises(AssertionError, match="conflicts"):
        assert_non_conflicting(theirs, gram)
    ours = combine.solve(name, gram)
    assert_non_conflicting(ours, gram)
    torch.testing.assert_close(ours, exact(getattr(reference, name)(SHORT.numpy())), rtol=1e-12, atol=0)


WITH_ZERO = matrix([1.0, 0.0], [0.0, 0.0], [-0.5, 1.0])


@pytest.mark.parametrize("rows", [SHORT, OPPOSED, WITH_ZERO], ids=["short", "opposed", "zero gradient"])
def test_cagrad_that_gives_up(rows: Tensor) -> None:
    """Theirs is zero where its normalised ‖g_w‖ is below 1e-4, a step that helps no loss; there is a best one."""
    gram = rows @ rows.T
    assert not aggregation.CAGradWeighting(c=0.5)(gram).any()
    ours, best = combine.cagrad(gram, c=0.5), torch.from_numpy(reference.cagrad(rows.numpy(), 0.5).vector)
    # The length of a vector that is a millionth of its terms is known to 1e-4.
    assert (ours @ rows - best).norm() <= 1e-4 * best.norm()
    assert (ours @ rows).norm() > 0


def test_cagrad_of_a_zero_gradient_without_the_guard() -> None:
    """Then theirs divides by what its solver has left of zero."""
    theirs = aggregation.CAGradWeighting(c=0.5, norm_eps=0.0)(WITH_ZERO @ WITH_ZERO.T)
    assert theirs.max() > 1e4
    assert combine.cagrad(WITH_ZERO @ WITH_ZERO.T).max() < 1


def test_fairgrad_that_stops_early() -> None:
    """Where the equation's matrix has a condition number of 1e6."""
    rows = matrix([1.0, 1e-3], [-1.0, 1e-3])
    gram = rows @ rows.T
    theirs = aggregation.FairGradWeighting(alpha=0.5)(gram)
    expected = torch.from_numpy(reference.fairgrad(gram.numpy(), 0.5))
    # ∝ ‖G‖^(−1/3) brings ours to the paper's unit; off by the proximal term, 1e-13, times the condition number.
    ours = combine.fairgrad(gram, alpha=0.5) / gram.norm() ** (1 / 3)
    torch.testing.assert_close(ours, expected, rtol=1e-6, atol=0)
    assert (theirs / expected - 1).abs().max() > 0.1


def test_bargain_of_badly_scaled_gradients() -> None:
    """Theirs ends where it has made its twenty steps: a loss's share is far from the others'."""
    gram = DOMINATED @ DOMINATED.T
    theirs, expected = nash(DOMINATED), torch.from_numpy(reference.nash_mtl(gram.numpy(), normalized=False))
    shares = theirs * (gram @ theirs)
    assert shares.max() > 10 * shares.min()
    ours = combine.nash_mtl(gram) / gram.norm().sqrt()
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=0)


def test_bargain_of_short_gradients() -> None:
    """Theirs does not leave its start: its solver gets the length of the Gram matrix as a parameter, 1e-8 here."""
    rows = 1e-4 * matrix([2.0, 0.0, 0.0], [-0.5, 1.0, 0.0], [0.0, 0.3, 0.7])
    gram = rows @ rows.T
    torch.testing.assert_close(nash(rows), torch.ones(3).double(), rtol=1e-6, atol=0)
    expected = torch.from_numpy(reference.nash_mtl(gram.numpy(), normalized=False))
    ours = combine.nash_mtl(gram) / gram.norm().sqrt()
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=0)
    assert ours.min() > 1e3


def test_imtl_g_of_long_gradients() -> None:
    """An absolute guard: theirs is zero once the lengths exceed 1e12."""
    rows = 1e13 * matrix([1.0, 0.2], [-0.3, 1.0])
    gram = rows @ rows.T
    assert aggregation.IMTLGWeighting()(gram).tolist() == [0, 0]
    torch.testing.assert_close(combine.imtl_g(gram), exact(reference.imtl_g(rows.numpy())), rtol=1e-10, atol=0)


def test_imtl_g_that_climbs() -> None:
    """Theirs, as the paper's, where the weights' sum is negative."""
    rows = matrix([10.0, 0, 0], [0, 10, 0], [0.6, 0.6, 0.5])
    gram = rows @ rows.T
    theirs, ours = aggregation.IMTLGWeighting()(gram), combine.imtl_g(gram)
    assert (gram @ theirs < 0).all()
    assert (gram @ ours > 0).all()
    torch.testing.assert_close(ours, -exact(reference.imtl_g(rows.numpy())), rtol=1e-10, atol=0)


def test_gradvac_of_short_gradients() -> None:
    """Its 1e-8 is added to a product of lengths that is 1e-6 here, so that it turns gradients too little."""

    def weights(rows: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        torch.manual_seed(0)  # the same orders
        ours, theirs = vaccinated(rows, aggregation.GradVacWeighting(eps=eps), 1)
        return ours[0], theirs[0]

    ours, theirs = weights(SHORT, 1e-8)
    assert (theirs - ours).abs().max() > 1e-3
    for same in (*weights(SHORT, 0.0), weights(1e3 * SHORT, 0.0)[0]):
        torch.testing.assert_close(same, ours, rtol=1e-12, atol=0)


def test_sdmgrad_that_does_not_converge() -> None:
    """Twenty steps of learning rate 10 jump between the corners of the simplex."""
    rows = matrix([1.0, 0.0], [-1e-6, 1.0])
    gram = rows @ rows.T
    theirs, ours = aggregation.SDMGradWeighting()(gram), combine.sdmgrad(gram)
    # The share is 1/2 but for 1e-12, by symmetry of all but the lengths.
    torch.testing.assert_close(ours, exact(reference.sdmgrad(rows.numpy(), 0.3)), rtol=1e-10, atol=0)
    assert (theirs - ours).abs().max() > 0.3


def test_min_norm_of_lengths_far_apart() -> None:
    """Frank–Wolfe stops above the optimum, in a direction that some loss objects to."""
    torch.manual_seed(1)
    worst, conflicts = 1.0, 0
    for _ in range(20):
        rows = torch.randn(10, 20, dtype=torch.float64) * torch.logspace(-1, 1, 10, dtype=torch.float64)[:, None]
        gram = gram_of(rows)
        theirs, ours = aggregation.MGDAWeighting()(gram), combine.min_norm(gram)
        assert_same_vector(ours, torch.from_numpy(min_norm_reference.by_nnls(rows.numpy())), gram, elements=20)
        worst = max(worst, float((theirs @ gram @ theirs) / (ours @ gram @ ours)))
        conflicts += bool((gram @ theirs < 0).any())
        assert_non_conflicting(ours, gram, elements=20)
    assert worst > 2
    assert conflicts > 0


def test_famo_of_tiny_losses() -> None:
    """Its 1e-8 hides losses of 1e-12: weights in the ratio of 1:1, where their logarithms ask for 2:1."""
    losses = torch.tensor([1e-12, 2e-12], dtype=torch.float64)
    theirs = gradient(scalarization.FAMO(2).double(), losses)
    assert theirs[0] / theirs[1] < 1.001
    ours = combine.solve("famo", torch.eye(2), losses)
    torch.testing.assert_close(ours[0] / ours[1], torch.tensor(2.0).double(), rtol=1e-14, atol=0)


@pytest.mark.parametrize(
    ("name", "theirs"),
    [
        ("aligned_mtl", aggregation.AlignedMTL),
        ("imtl_g", aggregation.IMTLG),
        ("cagrad", lambda: aggregation.CAGrad(c=0.5)),
        ("nash_mtl", lambda: aggregation.NashMTL(n_tasks=3, max_norm=0.0)),
        ("fairgrad", lambda: aggregation.FairGrad(alpha=2.0)),
    ],
)
def test_infinite_gradient_is_an_exception_there(name: str, theirs: Callable[[], Any]) -> None:
    """Of CVXPY, SciPy or LAPACK. A gradient scaler waits for a step that is not finite, and skips it."""
    rows = torch.eye(3, dtype=torch.float64)
    rows[0, 0] = torch.inf
    with pytest.raises((ValueError, RuntimeError)):
        theirs()(rows)
    assert not combine.solve(name, rows, kind="jacobian").isfinite().any()


def test_infinite_gradient_leaves_finite_weights_there() -> None:
    rows = torch.eye(3, dtype=torch.float64)
    rows[0, 0] = torch.inf
    assert aggregation.PCGradWeighting()(rows @ rows.T).isfinite().any()
    assert not combine.pcgrad(rows @ rows.T).isfinite().any()
