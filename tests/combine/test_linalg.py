"""Eigenvalues and eigenvectors without a look at the host, and the vector of equal projections."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction

import pytest
import torch
from hypothesis import assume, example, given
from hypothesis import strategies as st
from torch import Tensor

from distill_optim import testing
from distill_optim.combine.linalg import ROUNDING, _jacobi, eigh, equal_projections, unit_rows
from distill_optim.testing import gradients, gram_of, independent_gradients, on_fake_cuda
from tests.reference import min_norm as reference

EPS = torch.finfo(torch.float64).eps


def normalised(matrix: Tensor) -> Tensor:
    """As _jacobi gets it: no entry above 1."""
    largest = matrix.abs().amax((-2, -1), keepdim=True)
    return matrix / torch.where(largest > 0, largest, 1)


def jacobi(matrix: Tensor) -> tuple[Tensor, Tensor]:
    return _jacobi(normalised(matrix))


def assert_eigen(solve: Callable[[Tensor], tuple[Tensor, Tensor]], matrix: Tensor) -> None:
    """A V = V Λ and VᵀV = I up to rounding, Λ ascending and that of LAPACK.

    V is a product of K log K orthogonal matrices in fixed order, and each product is off by up to √K ε in the spectral
    norm. They add up as random numbers do: 20 √K ε was the most among matrices of all the kinds below.
    """
    matrix = normalised(matrix)
    k = matrix.shape[-1]
    values, vectors = solve(matrix)
    size = torch.linalg.matrix_norm(matrix, 2)
    tolerance = 64 * k**0.5 * EPS
    assert (values.diff(dim=-1) >= 0).all()
    assert (torch.linalg.matrix_norm(vectors.mT @ vectors - torch.eye(k).double(), 2) <= tolerance).all()
    assert (torch.linalg.matrix_norm(matrix @ vectors - vectors * values[..., None, :], 2) <= tolerance * size).all()
    # Weyl: eigenvalues move by no more than the matrix.
    assert ((values - torch.linalg.eigvalsh(matrix)).abs().amax(-1) <= tolerance * size).all()


def symmetric(matrix: Tensor) -> Tensor:
    return (matrix + matrix.mT) / 2


def orthogonal(k: int) -> Tensor:
    q: Tensor = torch.linalg.qr(torch.randn(k, k, dtype=torch.float64)).Q
    return q


def with_spectrum(values: Tensor) -> Tensor:
    q = orthogonal(len(values))
    return symmetric((q * values) @ q.mT)


def kinds(k: int) -> dict[str, Tensor]:
    """Symmetric matrices that are hard for Jacobi's method, and easy ones that a division by zero could spoil."""
    i = torch.arange(k).double()
    rows = torch.randn(k, k, dtype=torch.float64)
    low = torch.randn(k, max(1, k // 2), dtype=torch.float64)
    levels = torch.randint(0, 3, (k,)).double()
    neighbours = torch.ones(k - 1, dtype=torch.float64)
    path = torch.diag(neighbours, 1) + torch.diag(neighbours, -1)
    return {
        "random": rows + rows.mT,
        "definite": rows @ rows.mT,
        "rank-deficient": low @ low.mT,
        "integers": (low * 3).round() @ (low * 3).round().mT,
        "zero": torch.zeros_like(rows),
        "identity": torch.eye(k).double(),
        "ones": torch.ones_like(rows),
        "opposed": torch.outer((-1) ** i, (-1) ** i),
        "diagonal": torch.diag(i.flip(0) - 2),
        "reversed": torch.eye(k).double().flip(0),
        "repeated": with_spectrum(levels),
        "nearly repeated": with_spectrum(levels + 1e-7 * torch.randn(k).double()),
        "nearly all equal": with_spectrum(1 + 1e-9 * torch.randn(k).double()),
        "signs": with_spectrum(levels.sign() * 2 - 1),
        "geometric": with_spectrum(torch.logspace(0, -16, k).double()),
        "levels": with_spectrum(10.0 ** (-5 * levels)),
        "graded": torch.outer(10.0 ** -i.clamp_max(12), 10.0 ** -i.clamp_max(12)) * (rows @ rows.mT),
        "graded upwards": torch.outer(10.0 ** i.clamp_max(12), 10.0 ** i.clamp_max(12)) * (rows @ rows.mT),
        "Hilbert": 1 / (1 + i[:, None] + i),
        "Toeplitz": 1 / (1 + (i[:, None] - i).abs()),
        "path": path,
        "Wilkinson": path + torch.diag((i - (k - 1) / 2).abs()),
    }


@pytest.mark.parametrize("solve", [eigh, jacobi])
@pytest.mark.parametrize("k", [*range(1, 10), 16, 17, 32])
def test_decomposition_of_every_kind(k: int, solve: Callable[[Tensor], tuple[Tensor, Tensor]]) -> None:
    assert_eigen(solve, torch.stack(list(kinds(k).values())))


@pytest.mark.parametrize("k", [63, 64])
def test_decomposition_of_many_rows(k: int) -> None:
    assert_eigen(jacobi, torch.stack(list(kinds(k).values())))


@pytest.mark.parametrize("solve", [eigh, jacobi])
@given(rows=gradients(1, 8))
def test_decomposition_of_gram_matrices(solve: Callable[[Tensor], tuple[Tensor, Tensor]], rows: Tensor) -> None:
    assert_eigen(solve, gram_of(rows))


@given(st.integers(2, 12), st.integers(0, 2**32 - 1), st.data())
def test_decomposition_of_small_integers(k: int, seed: int, data: st.DataObject) -> None:
    """Zeros and ties wherever a rotation may divide by them."""
    torch.manual_seed(seed)
    upper = torch.randint(-1, 2, (k, k)).double().triu()
    assert_eigen(jacobi, upper + upper.triu(1).mT)


@given(gradients(1, 6), st.integers(-100, 100))
def test_power_of_two_changes_not_a_bit(rows: Tensor, exponent: int) -> None:
    """2^±100 covers 1e±30."""
    values, vectors = eigh(gram_of(rows))
    scaled, same = eigh(gram_of(rows) * 2.0**exponent)
    assert torch.equal(scaled, values * 2.0**exponent)
    assert torch.equal(same, vectors)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("k", [1, 2, 5])
def test_not_finite_in_nan_out(k: int, bad: float) -> None:
    """Without an exception, and without harm to the rest of the batch."""
    fine = with_spectrum(torch.arange(k).double())
    broken = fine.clone()
    broken[0, -1] = broken[-1, 0] = bad
    values, vectors = eigh(torch.stack([fine, broken]))
    assert values[1].isnan().all()
    assert vectors[1].isnan().all()
    for batched, alone in zip((values[0], vectors[0]), eigh(fine), strict=True):
        assert torch.equal(batched, alone)


@pytest.mark.parametrize(("k", "batch"), [(1, ()), (2, ()), (2, (2,)), (3, (2,)), (9, ()), (32, ())])
def test_no_host_read(k: int, batch: tuple[int, ...]) -> None:
    def both(matrix: Tensor) -> Tensor:
        values, vectors = eigh(matrix.double())
        return torch.cat([values[..., None, :], vectors], -2)

    result = on_fake_cuda(both, (*batch, k, k))
    assert (result.shape, result.dtype, result.device.type) == ((*batch, k + 1, k), torch.float64, "cuda")


@given(gradients(1, 8))
def test_unit_rows(rows: Tensor) -> None:
    """cos = gᵢⱼ/‖gᵢ‖‖gⱼ‖, with a rounding for each of some quotients and roots; lengths relative to the longest."""
    gram = gram_of(rows)
    cosines, lengths = unit_rows(gram)
    norms = gram.diagonal().sqrt()
    zero = norms == 0
    assert torch.equal(lengths == 0, zero)
    assert not cosines[zero].any()
    assert not cosines[:, zero].any()
    torch.testing.assert_close(lengths * norms.max(), norms, rtol=4 * EPS, atol=0)
    torch.testing.assert_close(cosines * torch.outer(norms, norms), gram, rtol=8 * EPS, atol=0)


@given(gradients(1, 8), st.integers(-100, 100))
def test_unit_rows_have_no_scale(rows: Tensor, exponent: int) -> None:
    for scaled, same in zip(unit_rows(gram_of(rows) * 2.0**exponent), unit_rows(gram_of(rows)), strict=True):
        assert torch.equal(scaled, same)


@given(independent_gradients(max_losses=6))
@example(torch.tensor([[1.0, 0.0], [-1.0, 1e-5]], dtype=torch.float64))
def test_projections_on_independent_rows_are_equal(rows: Tensor) -> None:
    """C x = 1, in exact arithmetic on the same C."""
    cosines, _ = unit_rows(gram_of(rows))
    x, projections, squared = equal_projections(cosines)
    solution = reference._solve([[*map(Fraction, row), Fraction(1)] for row in cosines.tolist()])
    assert solution is not None
    expected = torch.tensor([float(v) for v in solution], dtype=torch.float64)
    condition = torch.linalg.cond(cosines)
    torch.testing.assert_close(x, expected, rtol=0, atol=float(8 * EPS * condition * expected.abs().max()))
    torch.testing.assert_close(projections, torch.ones_like(x), rtol=0, atol=ROUNDING)
    torch.testing.assert_close(squared, expected.sum(), rtol=float(8 * EPS * condition), atol=0)


# Of exact rank, and eigenvalues that are 0 or far from it.
@given(st.integers(1, 8), st.integers(1, 4), st.integers(0, 2**32 - 1))
def test_projections_on_dependent_rows_are_the_least_squares_fit(k: int, rank: int, seed: int) -> None:
    """The normal equations C (C x − 1) = 0, and x in the range of C: the shortest solution."""
    torch.manual_seed(seed)
    rows = torch.randint(-2, 3, (k, rank)).double()
    cosines, _ = unit_rows(gram_of(rows))
    x, projections, squared = equal_projections(cosines)
    scale = 1 + x.abs().max()
    values, vectors = torch.linalg.eigh(cosines)
    null = vectors[:, values < 1e-6]
    # A part of an eigenvector that is lost or found is worth its eigenvalue's inverse, 1e3 at most here.
    tolerance = 1e3 * k * ROUNDING * scale
    assert (cosines @ x - projections).abs().max() <= tolerance
    assert (cosines @ (projections - 1)).abs().max() <= tolerance
    assert (x @ null).abs().sum() <= tolerance
    assert abs(squared - x.sum()) <= tolerance


@pytest.mark.parametrize("pairs", [1, 2, 9, 32])
def test_opposed_rows_have_no_projection_in_common(pairs: int) -> None:
    """Exact zeros, not what rounding leaves; cosines of −1 and to either side of it."""
    rows = torch.randn(20, pairs, 70, dtype=torch.float64)
    for opposed in torch.cat([rows, -3 * rows], 1):
        for result in equal_projections(unit_rows(gram_of(opposed))[0]):
            assert not result.any()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("k", [1, 2, 3])
def test_no_projections_on_what_is_not_finite(k: int, bad: float) -> None:
    """Wherever it stands, and without harm to the rest of the batch."""
    for i in range(k):
        for j in range(i + 1):
            broken = torch.eye(k).double()
            broken[i, j] = broken[j, i] = bad
            for result in equal_projections(torch.stack([broken, torch.eye(k).double()])):
                assert result[0].isnan().all()
                assert result[1].isfinite().all()


@given(gradients(2, 2))
@example(torch.tensor([[1.0, 2.0], [-3.0, -6.0]], dtype=torch.float64))
@example(torch.tensor([[1.0, 0.0], [-1.0, 1e-6]], dtype=torch.float64))
@example(torch.tensor([[0.0, 0.0], [-1.0, 1e-6]], dtype=torch.float64))
def test_closed_form_of_two_is_that_of_more(rows: Tensor) -> None:
    """Two vectors go another way than two beside a zero, and arrive at the same."""
    cosines, _ = unit_rows(gram_of(rows))
    value = 1 + cosines[0, 1]
    assume(not 1e-15 < value < 1e-13)  # about the cut-off either may be right
    more, _ = unit_rows(gram_of(torch.cat([rows, 0 * rows[:1]])))
    x, projections, squared = equal_projections(cosines)
    others = equal_projections(more)
    # Errors along (1, −1) are magnified by 1/(1 − cos) in x, in the vector by its root: √ROUNDING at the cut-off.
    assert ((x - others[0][:2]) @ cosines @ (x - others[0][:2])).sqrt() <= 1e-7 * x.abs().sum()
    torch.testing.assert_close(projections, others[1][:2], rtol=0, atol=testing.ROUNDING)
    torch.testing.assert_close(
        squared, others[2], rtol=float(testing.ROUNDING * (1 + 1 / value.clamp_min(1e-13))), atol=0
    )


def test_small_conflicts_count() -> None:
    """Opposed but for one part in 1e6: the angle to either is a right one less 5e-7, and 1/‖d‖ = 5e-7."""
    cosines, _ = unit_rows(gram_of(torch.tensor([[1.0, 0.0], [-1.0, 1e-6]], dtype=torch.float64)))
    x, projections, squared = equal_projections(cosines)
    # 1 + cos = 5e-13 carries some roundings of 1.
    assert squared**-0.5 == pytest.approx(5e-7, rel=8 * EPS / 5e-13)
    torch.testing.assert_close(projections, torch.ones(2).double(), rtol=0, atol=ROUNDING)
    torch.testing.assert_close(x[0], x[1], rtol=ROUNDING, atol=0)
