"""The oracles against closed forms, optimality conditions, exact arithmetic and each other."""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction
from itertools import permutations, product
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.optimize import brentq, least_squares
from torch import Tensor

from tests.reference import gram_methods as gram
from tests.reference import loss_methods as loss
from tests.reference import min_norm

Array = NDArray[Any]

EPS = float(np.finfo(np.float64).eps)
#: A few operations on vectors of unit length.
ROUNDING = 64 * EPS


def independent(n: int = 12, most: int = 6) -> list[Array]:
    """Gaussian rows, at most as many as columns, lengths within two orders of magnitude."""
    random = np.random.default_rng(1)
    shapes = [(k, int(random.integers(k, 9))) for k in random.integers(2, most + 1, n)]
    return [random.standard_normal(shape) * 10 ** random.uniform(-1, 1, (shape[0], 1)) for shape in shapes]


def awkward(n: int = 5) -> Iterator[Array]:
    """Integers with ties and zeros, more rows than columns, lengths over twelve orders, one common direction."""
    random = np.random.default_rng(2)
    for _ in range(n):
        k, columns = random.integers(2, 6), random.integers(1, 5)
        rows = random.standard_normal((k, columns))
        yield random.integers(-2, 3, (k, columns)).astype(np.float64)
        yield random.standard_normal((5, 2)) @ rows[:2]
        yield rows * 10 ** random.uniform(-6, 6, (k, 1))
        yield rows + 2 * random.standard_normal(columns)
    yield np.array([[1.0, 0], [-1, 0]])
    yield np.array([[1.0, 1e-3], [-1, 1e-3]])
    yield np.array([[1.0, 0], [-1e-6, 1]])
    yield np.array([[1e6, 0.0, 0], [-0.5, 1, 0], [0, 0.3, 0.7]])
    yield np.array([[1.0, 2, 3], [1, 2, 3], [-1, 0, 1]])
    yield np.zeros((3, 2))


INDEPENDENT, AWKWARD = independent(), list(awkward())
ANY = [*INDEPENDENT, *AWKWARD]


def orders_of(k: int, seed: int) -> list[list[int]]:
    random = np.random.default_rng(seed)
    return [[int(j) for j in random.permutation(k) if j != i] for i in range(k)]


def longest(rows: Array) -> float:
    return float(np.linalg.norm(rows, axis=1).max())


def cosine(a: Array, b: Array) -> float:
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


def close(a: Array, b: Array, tolerance: float) -> None:
    np.testing.assert_allclose(a, b, rtol=0, atol=tolerance)


@pytest.mark.parametrize("rows", ANY)
def test_the_weights_give_the_vector(rows: Array) -> None:
    k = len(rows)
    orders, phi = orders_of(k, 0), np.random.default_rng(0).uniform(-0.9, 0.9, (k, k))
    vaccinated = gram.gradvac(rows, orders, phi, 0.5)
    steps = [gram.pcgrad(rows, orders), gram.dualproj(rows), gram.upgrad(rows), gram.config(rows)]
    for vector, weights in [*steps, gram.aligned_mtl(rows), vaccinated[:2]]:
        # To the rounding of the sum; the weights of dependent rows cancel.
        scale = (np.abs(weights) * np.linalg.norm(rows, axis=1)).sum()
        close(weights @ rows, vector, ROUNDING * scale + 1e3 * ROUNDING * float(np.linalg.norm(vector)))


@pytest.mark.parametrize("rows", ANY)
def test_pcgrad_is_that_of_rational_arithmetic(rows: Array) -> None:
    orders = orders_of(len(rows), 1)
    exact = gram.pcgrad(gram.rational(rows), orders)
    assert all(isinstance(x, Fraction) for x in [*exact.vector, *exact.weights])
    close(gram.pcgrad(rows, orders).vector, exact.vector.astype(np.float64), ROUNDING * longest(rows))


def test_pcgrad_of_two_conflicting_gradients() -> None:
    """gᵢ − ⟨gᵢ, gⱼ⟩/‖gⱼ‖² gⱼ each: from Figure 2 of the paper."""
    step = gram.pcgrad(np.array([[2.0, 0], [-1, 1]]), [[1], [0]])
    np.testing.assert_array_equal(step.vector, [2 - 1, 1 + 1])
    np.testing.assert_array_equal(step.weights, [1 + 0.5, 1 + 1])


@pytest.mark.parametrize("rows", [rows[:3] for rows in ANY if len(rows) > 2])
def test_average_is_the_mean_over_all_combinations_of_orders(rows: Array) -> None:
    exact = gram.rational(rows)
    combinations = list(product(*(permutations([j for j in range(3) if j != i]) for i in range(3))))
    steps = [gram.pcgrad(exact, orders) for orders in combinations]
    average = gram.pcgrad_average(exact)
    assert (average.vector == sum(step.vector for step in steps) / len(steps)).all()
    assert (average.weights == sum(step.weights for step in steps) / len(steps)).all()
    close(gram.pcgrad_average(rows).vector, average.vector.astype(np.float64), ROUNDING * longest(rows))


@pytest.mark.parametrize("rows", ANY)
def test_gradvac_with_targets_of_zero_is_pcgrad(rows: Array) -> None:
    orders = orders_of(len(rows), 2)
    step = gram.gradvac(rows, orders, np.zeros((len(rows), len(rows))), beta=0)
    close(step.vector, gram.pcgrad(rows, orders).vector, ROUNDING * longest(rows))


@pytest.mark.parametrize("target", [-0.5, 0.0, 0.3, 0.999, 1 - 1e-12])
@pytest.mark.parametrize("rows", INDEPENDENT)
def test_gradvac_reaches_the_target(rows: Array, target: float) -> None:
    first, second = rows[:2]
    phi = np.array([[7, target], [-1, 7]])
    step = gram.gradvac(rows[:2], [[1], [0]], phi, beta=0.25)
    before, after = cosine(first, second), cosine(step.vector - second, second)
    assert after == pytest.approx(max(before, target), abs=1e3 * EPS)
    np.testing.assert_allclose(step.phi, [[7, 0.75 * target + 0.25 * before], [-0.75 + 0.25 * before, 7]], rtol=1e-14)


def test_gradvac_raises_for_a_target_out_of_reach() -> None:
    with pytest.raises(ZeroDivisionError, match="target cosine 1"):
        gram.gradvac(np.eye(2), [[1], [0]], np.ones((2, 2)), 0.5)


@pytest.mark.parametrize("rows", ANY)
def test_projections_are_those_of_rational_arithmetic(rows: Array) -> None:
    k, exact = len(rows), gram.rational(rows)
    # The rows, of unit length, lie as close as 1e-3 to dependence: three digits.
    tolerance = 1e3 * ROUNDING * longest(rows)
    parts = [gram.project_exact(exact, row)[0].astype(np.float64) for row in exact]
    for row, part in zip(rows, parts, strict=True):
        close(gram.project(rows, row).vector, part, 1e3 * ROUNDING * float(np.linalg.norm(row)))
    close(gram.upgrad(rows).vector, np.mean(parts, axis=0), tolerance)
    u = np.arange(1.0, k + 1)
    point = gram.project_exact(exact, gram.rational(u) @ exact)[0].astype(np.float64)
    close(gram.dualproj(rows, u).vector, point, u.sum() * tolerance)


@pytest.mark.parametrize("rows", AWKWARD)
def test_projection_is_optimal(rows: Array) -> None:
    """Weights v ≥ u, Gv ≥ 0, and Gv = 0 where v > u: the conditions of Proposition 1, met exactly."""
    exact = gram.rational(rows)
    for vector in exact:
        point, x = gram.project_exact(exact, vector)
        slope = exact @ point
        assert (x >= 0).all()
        assert (slope >= 0).all()
        assert slope @ x == 0


RADII = [0.1, 0.4, 0.9, 1.0, 3.0]


@pytest.mark.parametrize("c", RADII)
@pytest.mark.parametrize("rows", ANY)
def test_cagrad_is_optimal(rows: Array, c: float) -> None:
    step, mean = gram.cagrad(rows, c), rows.mean(0)
    size = float(np.linalg.norm(mean))
    assert np.linalg.norm(step.vector - mean) <= c * size + 1e3 * ROUNDING * longest(rows)
    assert gram.cagrad_gap(rows, c, step) <= 1e3 * ROUNDING * size * longest(rows)


@pytest.mark.parametrize("c", RADII)
@pytest.mark.parametrize("rows", INDEPENDENT)
def test_cagrad_is_a_shortest_vector_of_shifted_gradients(rows: Array, c: float) -> None:
    """By the dual: g_w is shortest in the hull of gᵢ + κ g₀, where ‖g_w‖ = κ c ‖g₀‖."""
    k, mean = len(rows), rows.mean(0)
    radius = c * float(np.linalg.norm(mean))

    def worst(kappa: float) -> Array:
        vector: Array = min_norm.by_nnls(rows + kappa * mean) @ rows
        return vector

    def excess(kappa: float) -> float:
        return float(np.linalg.norm(worst(kappa))) - kappa * radius

    # ‖g_w‖ is at most the longest row, so that the root is below its multiple.
    kappa = brentq(excess, 0, 2 * longest(rows) / radius, xtol=1e-300, rtol=4 * EPS)
    g_w = worst(kappa)
    expected = mean + radius * g_w / np.linalg.norm(g_w)
    close(gram.cagrad(rows, c).vector, expected, 1e3 * ROUNDING * float(np.linalg.norm(mean)) * k)


def test_cagrad_with_zero_in_the_hull() -> None:
    opposed = np.array([[1.0, 0], [-0.5, 0], [0, 1]])
    # The ball reaches the dual cone, which is the half-line (0, ≥ 0): the nearest point to the mean (1/6, 1/3).
    close(gram.cagrad(opposed, 1.0).vector, np.array([0, 1 / 3]), ROUNDING)
    close(gram.cagrad(opposed, 1.0).vector, gram.dualproj(opposed).vector, ROUNDING)
    # It does not: (d₁, −d₁/2, d₂) has its least entry highest where d₁ is least and d₂ ≥ −d₁/2.
    step, mean = gram.cagrad(opposed, 0.1), opposed.mean(0)
    close(step.vector, mean - [0.1 * np.linalg.norm(mean), 0], ROUNDING)


def test_cagrad_without_a_radius_is_the_mean() -> None:
    np.testing.assert_array_equal(gram.cagrad(INDEPENDENT[0], 0.0).vector, INDEPENDENT[0].mean(0))


@pytest.mark.parametrize("rows", INDEPENDENT)
def test_imtl_g_is_the_closed_form_of_the_paper(rows: Array) -> None:
    """α₂.. = g₁Uᵀ(DUᵀ)⁻¹ with D = g₁ − gᵢ and U = u₁ − uᵢ; equal projections; both pseudoinverses."""
    step = gram.imtl_g(rows)
    units = rows / np.linalg.norm(rows, axis=1)[:, None]
    d, u = rows[0] - rows[1:], units[0] - units[1:]
    rest = np.linalg.solve((d @ u.T).T, u @ rows[0])
    scale = np.abs(step.weights).max()
    # Gauss-Jordan on a matrix with a condition number of some 1e4.
    close(np.append(1 - rest.sum(), rest), step.weights, 1e4 * ROUNDING * scale)
    close(gram.imtl_g_pinv(rows).weights, step.weights, 1e4 * ROUNDING * scale)
    close(gram.imtl_g_pinv(rows, unit=True).weights, step.weights, 1e4 * ROUNDING * scale)
    assert np.ptp(units @ step.vector) <= ROUNDING * scale * longest(rows)


def test_imtl_g_may_ascend_along_every_gradient() -> None:
    """Though none conflict: U⁻¹1 = (1, 1, −0.4), the third weight is negative, and its gradient short: Σ v < 0."""
    rows = np.array([[10.0, 0, 0], [0, 10, 0], [0.6, 0.6, 0.5]])
    assert (rows @ rows.T >= 0).all()
    step = gram.imtl_g(rows)
    assert step.weights.sum() == pytest.approx(1)
    assert (rows @ step.vector < 0).all()


def test_imtl_g_of_dependent_gradients() -> None:
    """u₁ + u₂ has the projection 1 on the first two, √2 on the third: the nearest is no solution, but symmetric."""
    rows = np.array([[1.0, 0], [0, 1], [1, 1]])
    with pytest.raises(ZeroDivisionError, match="dependent"):
        gram.imtl_g(rows)
    close(gram.imtl_g_pinv(rows).weights, np.array([0.25, 0.25, 0.5]), ROUNDING)
    for unit in (False, True):
        twice = gram.imtl_g_pinv(np.array([[1.0, 0], [1, 0], [0, 1]]), unit=unit)
        close(twice.weights, np.array([0.25, 0.25, 0.5]), ROUNDING)
        assert not gram.imtl_g_pinv(np.array([[1.0, 0], [-1, 0]]), unit=unit).vector.any()


@pytest.mark.parametrize("rows", INDEPENDENT)
def test_config_has_one_cosine_to_all(rows: Array) -> None:
    """And is as long as the sum of the projections on it (eq. 2); its direction is that of IMTL-G, but for the sign."""
    vector, _ = gram.config(rows)
    unit = vector / np.linalg.norm(vector)
    assert np.ptp([cosine(row, vector) for row in rows]) <= 1e3 * ROUNDING
    assert min(cosine(row, vector) for row in rows) > 0
    assert np.linalg.norm(vector) == pytest.approx((rows @ unit).sum(), rel=1e-12)
    assert abs(cosine(vector, gram.imtl_g(rows).vector)) == pytest.approx(1, rel=1e-12)


def test_config_with_a_zero_row_or_opposed_rows() -> None:
    close(gram.config(np.array([[2.0, 0], [0, 0]])).vector, np.array([2.0, 0]), ROUNDING)
    assert not gram.config(np.array([[2.0, 1], [-4, -2]])).vector.any()


@pytest.mark.parametrize("rows", INDEPENDENT)
def test_aligned_gradients_are_orthogonal_and_as_long_as_the_least_singular_value(rows: Array) -> None:
    aligned = np.stack([gram.aligned_mtl(rows, u).vector for u in np.eye(len(rows))])
    least = np.linalg.svd(rows, compute_uv=False)[-1]
    close(aligned @ aligned.T, least**2 * np.eye(len(rows)), ROUNDING * least**2)
    # Algorithm 1: λ, V of JJᵀ, B = √λ_min V Λ^(−1/2) Vᵀ.
    values, vectors = np.linalg.eigh(rows @ rows.T)
    balance = values[0] ** 0.5 * (vectors / values**0.5) @ vectors.T
    # Eigenvalues lose the square of the rows' condition number, some 1e4.
    close(balance.sum(1) @ rows, gram.aligned_mtl(rows).vector, 1e4 * ROUNDING * least)


@pytest.mark.parametrize("alpha", [0.2, 0.5, 1.0, 2.0, 10.0])
@pytest.mark.parametrize("rows", INDEPENDENT)
def test_fairgrad_solves_its_equation(rows: Array, alpha: float) -> None:
    """w = (G w)^(−α), so that the residual is in units of w; and a library's root agrees."""
    matrix = rows @ rows.T
    w = gram.fairgrad(matrix, alpha)
    # G w cancels, and the power multiplies its relative error by α.
    share = (np.abs(matrix) @ w) / (matrix @ w)
    assert (np.abs((matrix @ w) ** -alpha / w - 1) <= ROUNDING * max(1, alpha) * share).all()
    start = w * np.exp(np.random.default_rng(0).uniform(-1, 1, len(w)))
    found = least_squares(
        lambda logs: np.log(np.maximum(matrix @ np.exp(logs), 1e-300)) + logs / alpha, np.log(start), xtol=1e-15
    )
    if found.cost < 1e-24:  # the library's search may stop elsewhere
        np.testing.assert_allclose(np.exp(found.x), w, rtol=1e-6)


@pytest.mark.parametrize("power", [0.1, 1.0, 3.0])
def test_power_equation_of_orthogonal_gradients(power: float) -> None:
    """gᵢᵢ wᵢ = wᵢ⁻ᵖ: wᵢ = gᵢᵢ^(−1/(1+p)), over twelve orders of magnitude."""
    diagonal = np.array([1e-12, 1e-3, 1.0, 7.0, 1e12])
    w = gram.fairgrad(np.diag(diagonal), 1 / power)
    np.testing.assert_allclose(w, diagonal ** (-1 / (1 + power)), rtol=1e-14)


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_nash_mtl_of_two_gradients(scale: float) -> None:
    """a₁/a₂ = ‖g₂‖/‖g₁‖ and a₁²(g₁₁ + g₁₂ a₂/a₁) = 1; with G/‖G‖_F at any scale of G the same."""
    matrix = np.array([[4.0, -1.9], [-1.9, 1.0]])
    first = (4 - 1.9 * 2) ** -0.5
    w = gram.nash_mtl(scale * matrix, normalized=False)
    np.testing.assert_allclose(w, np.array([first, 2 * first]) / scale**0.5, rtol=1e-13)
    size = np.linalg.norm(matrix)
    np.testing.assert_allclose(gram.nash_mtl(scale * matrix), size**0.5 * np.array([first, 2 * first]), rtol=1e-13)


@pytest.mark.parametrize(
    "rows", [np.array([[1, 0], [-2, 0]]), np.array([[1, 0], [0, 0]]), np.array([[1, 0], [-1, 1], [-1, -1]])]
)
def test_no_fair_weights_with_zero_in_the_hull(rows: Array) -> None:
    for alpha in (0.5, 1.0, 2.0):
        with pytest.raises(ValueError, match="no solution"):
            gram.fairgrad(gram.rational(rows @ rows.T), alpha)


def test_fair_weights_see_a_conflict_of_one_part_in_a_million() -> None:
    """G = [[1, ε − 1], [ε − 1, 1]]: ε w = w⁻ᵖ."""
    epsilon = Fraction(1, 10**12)
    matrix = np.array([[1, epsilon - 1], [epsilon - 1, 1]], dtype=object)
    np.testing.assert_allclose(gram.nash_mtl(matrix, normalized=False), 1e6, rtol=1e-15)
    np.testing.assert_allclose(gram.fairgrad(matrix, 0.5), 1e4, rtol=1e-15)


@pytest.mark.parametrize("lam", [0.0, 0.25, 4.0])
@pytest.mark.parametrize("rows", [rows for rows in ANY if len(rows) < 5])
def test_sdmgrad_is_that_of_rational_arithmetic(rows: Array, lam: float) -> None:
    exact, factor = gram.rational(rows), Fraction(lam)
    mean = exact.sum(0) / len(rows)
    shares = np.array(min_norm.exact(exact + factor * mean), dtype=object)
    vector = (shares @ exact + factor * mean) / (1 + factor)
    step = gram.sdmgrad(rows, lam)
    close(step.vector, vector.astype(np.float64), 1e3 * ROUNDING * longest(rows))
    assert step.weights.sum() == pytest.approx(1, rel=1e-14)


# Methods that look at losses. Adam by hand is another program than torch's.


class Adam:
    """Kingma & Ba, Algorithm 1; with decay as a part of the gradient."""

    def __init__(self, x: Array, lr: float, decay: float = 0.0) -> None:
        self.x, self.lr, self.decay = x, lr, decay
        self.m, self.v, self.t = np.zeros_like(x), np.zeros_like(x), 0

    def step(self, gradient: Array) -> None:
        gradient = gradient + self.decay * self.x
        self.t += 1
        self.m = 0.9 * self.m + 0.1 * gradient
        self.v = 0.999 * self.v + 0.001 * gradient**2
        self.x = self.x - self.lr * self.m / (1 - 0.9**self.t) / (np.sqrt(self.v / (1 - 0.999**self.t)) + 1e-8)


@pytest.fixture(params=[(1, 0), (2, 1), (5, 2)], ids=lambda p: f"K={p[0]}")
def losses(request: pytest.FixtureRequest) -> Tensor:
    k, seed = request.param
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(24, k, generator=generator, dtype=torch.float64).exp() * 10 ** torch.arange(k).double()


def same(a: Tensor, b: Array) -> None:
    np.testing.assert_allclose(a.numpy(), b, rtol=1e-12)


def test_uncertainty_by_hand(losses: Tensor) -> None:
    """∂/∂sᵢ = −Lᵢ/(c e^sᵢ) + 1/2."""
    adam = Adam(np.zeros(losses.shape[1]), 0.1)
    expected = []
    for values in losses.numpy():
        expected.append(np.exp(-adam.x) / 2)
        adam.step(-values * expected[-1] + 0.5)
    same(loss.uncertainty(losses, 0.1), np.stack(expected))


def test_uncertainty_settles_at_the_losses() -> None:
    """Constant losses: the total is least at e^s = 2L/c, weight 1/(2L)."""
    losses = torch.tensor([[1.0, 30.0]]).expand(1000, 2)
    np.testing.assert_allclose(loss.uncertainty(losses, 0.05)[-1], [1 / 2, 1 / 60], rtol=1e-3)


def test_gradnorm_by_hand(losses: Tensor) -> None:
    """∂/∂wᵢ = sign(Gᵢ − target) ‖gᵢ‖ / mean ‖g‖."""
    norms = losses.flip(0).sqrt()
    k = losses.shape[1]
    adam, expected = Adam(np.ones(k), 0.025), []
    for values, lengths in zip(losses.numpy(), norms.numpy(), strict=True):
        expected.append(adam.x)
        ratio = values / losses[0].numpy()
        target = (adam.x * lengths).mean() * (ratio / ratio.mean()) ** 1.5
        adam.step(np.sign(adam.x * lengths - target) * lengths / lengths.mean())
        adam.x = k * adam.x / adam.x.sum()
    same(loss.gradnorm(losses, norms), np.stack(expected))


def test_gradnorm_evens_out_the_lengths_of_losses_that_fall_alike() -> None:
    norms = torch.tensor([[1.0, 3.0]]).expand(400, 2)
    weights = loss.gradnorm(torch.ones(400, 2), norms)
    np.testing.assert_allclose(weights[-1], [1.5, 0.5], atol=0.05)


def test_dwa_by_hand() -> None:
    losses = torch.tensor([[4.0, 4.0], [2, 4], [1, 2], [1, 4], [9, 9]])
    weights = loss.dwa(losses, 1, tau=2.0)
    for step, ratios in [(2, (2 / 4, 4 / 4)), (3, (1 / 2, 2 / 4)), (4, (1 / 1, 4 / 2))]:
        e = np.exp(np.array(ratios) / 2)
        np.testing.assert_allclose(weights[step], 2 * e / e.sum(), rtol=1e-14)
    assert (weights[:2] == 1).all()


def test_dwa_takes_means_over_epochs(losses: Tensor) -> None:
    coarse = loss.dwa(losses.reshape(6, 4, -1).mean(1), 1)
    torch.testing.assert_close(loss.dwa(losses, 4), coarse.repeat_interleave(4, 0))
    torch.testing.assert_close(loss.dwa(losses[:23], 4), coarse.repeat_interleave(4, 0)[:23])


def test_famo_by_hand(losses: Tensor) -> None:
    """(∂z/∂w)ᵀδ = z ∘ (δ − zᵀδ)."""
    after = losses.flip(0) * 0.5
    adam, expected = Adam(np.zeros(losses.shape[1]), 0.025, 1e-3), []
    for old, new in zip(losses.numpy(), after.numpy(), strict=True):
        z = np.exp(adam.x) / np.exp(adam.x).sum()
        expected.append(z)
        delta = np.log(old / new)
        adam.step(z * (delta - z @ delta))
    # One loss has weight 1 at any w; of a gradient of zero plus rounding Adam makes a step of its learning rate.
    same(loss.famo(losses, after), np.stack(expected))


def test_famo_leans_to_the_loss_that_improves_least() -> None:
    before, after = torch.ones(20, 2), torch.tensor([[0.9, 0.5]]).expand(20, 2)
    weights = loss.famo(before, after)
    assert (weights[1:, 0] > weights[:-1, 0]).all()


def parameters(k: int) -> tuple[Tensor, Tensor]:
    """A point, and K positive losses there that depend on all of it."""
    x = torch.linspace(0.5, 1, 3, dtype=torch.float64).requires_grad_()
    return x, torch.stack([((i + 1) * x).square().sum() + torch.sin(x * (i + 1)).sum() for i in range(k)])


def of_log_losses(weights: Tensor, values: Tensor, x: Tensor) -> Tensor:
    """Σ wᵢ ∇log Lᵢ."""
    (gradient,) = torch.autograd.grad((weights * values.log()).sum(), x, retain_graph=True)
    return gradient


@pytest.mark.parametrize("k", [1, 2, 5])
def test_gls_gives_the_gradient_of_the_geometric_mean(k: int) -> None:
    x, values = parameters(k)
    (expected,) = torch.autograd.grad(values.prod() ** (1 / k), x, retain_graph=True)
    torch.testing.assert_close(of_log_losses(loss.gls(values.detach()), values, x), expected)


@pytest.mark.parametrize("k", [1, 2, 5])
def test_stch_gives_the_gradient_of_the_smooth_maximum(k: int) -> None:
    x, values = parameters(k)
    first = torch.rand(3, k, generator=torch.Generator().manual_seed(3), dtype=torch.float64) + 0.5
    weights = loss.stch(torch.cat([first, values.detach()[None]]), 3, mu=0.5)
    assert (weights[:3] == 1).all()
    smooth = 0.5 * ((values / first.mean(0)).log() / 0.5).exp().sum().log() * k
    (expected,) = torch.autograd.grad(smooth, x, retain_graph=True)
    torch.testing.assert_close(of_log_losses(weights[3], values, x), expected)
    assert weights[3].sum() == pytest.approx(k)


def test_ema_norms_by_recursion(losses: Tensor) -> None:
    mean, expected = np.zeros(losses.shape[1]), []
    for t, values in enumerate(losses.numpy(), start=1):
        mean = 0.9 * mean + 0.1 * values
        expected.append((1 - 0.9**t) / mean)
    same(loss.ema_norms(losses, 0.9), np.stack(expected))
