"""The methods that rest on small programs, against oracles that work from the gradients themselves."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, example, given
from hypothesis import strategies as st
from torch import Tensor

from distill_optim import combine, testing
from distill_optim.testing import ROUNDING, assert_same_vector, gram_of, reach
from tests.reference import gram_methods as reference

EPS = torch.finfo(torch.float64).eps

PROGRAMS: dict[str, Any] = {
    "dualproj": reference.dualproj,
    "upgrad": reference.upgrad,
    "sdmgrad": partial(reference.sdmgrad, lam=0.3),
}
every_program = pytest.mark.parametrize("name", PROGRAMS)


def weights_of(step: Any) -> Tensor:
    return torch.from_numpy(np.asarray(step.weights, dtype=float))


@every_program
@given(testing.gradients(1, 8))
def test_faces_give_the_oracle_s_vector(name: str, rows: Tensor) -> None:
    expected = weights_of(PROGRAMS[name](rows.double().numpy()))
    assert_same_vector(combine.solve(name, gram_of(rows), kind="gram"), expected, gram_of(rows))


@every_program
@given(testing.gradients(9, 24))
def test_interior_point_gives_the_oracle_s_vector(name: str, rows: Tensor) -> None:
    expected = weights_of(PROGRAMS[name](rows.double().numpy()))
    assert_same_vector(combine.solve(name, gram_of(rows), kind="gram"), expected, gram_of(rows))


# ---------------------------------------------------------------- dualproj and upgrad


@pytest.mark.parametrize("name", ["dualproj", "upgrad"])
@given(testing.gradients(1, 20))
def test_projection_weighs_nothing_below_its_preference(name: str, rows: Tensor) -> None:
    assert (combine.solve(name, gram_of(rows), kind="gram") >= 1 / len(rows)).all()


@pytest.mark.parametrize("name", ["dualproj", "upgrad"])
@given(testing.gradients(1, 20))
def test_projection_conflicts_with_no_loss(name: str, rows: Tensor) -> None:
    """Feasibility of the program in unit rows: within its residual of 1e-8 of what the weights reach."""
    gram = gram_of(rows)
    weights = combine.solve(name, gram, kind="gram")
    slope = gram @ weights
    lengths = gram.diagonal().sqrt()
    assert (slope >= -1e-8 * lengths * reach(weights, gram)).all()


@pytest.mark.parametrize("name", ["dualproj", "upgrad"])
@pytest.mark.parametrize("k", [1, 2, 5, 12])
def test_mean_is_kept_where_nobody_conflicts(name: str, k: int) -> None:
    gram = gram_of(torch.rand(k, 6))
    assert combine.solve(name, gram, kind="gram").tolist() == [1 / k] * k


@given(testing.gradients(2, 2))
def test_two_losses_of_upgrad_are_half_of_pcgrad(rows: Tensor) -> None:
    gram = gram_of(rows)
    torch.testing.assert_close(combine.upgrad(gram), combine.pcgrad(gram) / 2, rtol=8 * EPS, atol=0)  # a few quotients


@given(testing.independent_gradients(2, 6), st.data())
def test_upgrad_is_linear_in_the_length_of_a_gradient(rows: Tensor, data: st.DataObject) -> None:
    """Under scaling (Quinton & Rey, definition 4): A(diag(c) J) is linear in c > 0."""
    k = len(rows)
    a, b = (torch.tensor(data.draw(st.lists(st.floats(0.1, 10), min_size=k, max_size=k))).double() for _ in "ab")

    def step(c: Tensor) -> Tensor:
        scaled = c[:, None] * rows
        return combine.upgrad(gram_of(scaled)) @ scaled

    # Condition numbers up to 100 of the unit rows, squared in the Gram matrix: 1e4 roundings of the terms.
    size = (a + b).max() * rows.norm(dim=1).max()
    assert (step(a) + step(b) - step(a + b)).norm() <= 1e4 * ROUNDING * k * size


def test_preference() -> None:
    gram = torch.tensor([[1.0, -0.5], [-0.5, 4.0]])
    assert combine.dualproj(gram, preference=[1.0, 0.0]).tolist() == [1.0, 0.125]
    assert combine.upgrad(gram, preference=[1.0, 0.0]).tolist() == [1.0, 0.125]
    for method in (combine.dualproj, combine.upgrad):
        with pytest.raises(ValueError, match=r"^preference: expected one for each of 2 losses, got 3$"):
            method(gram, preference=[1.0, 2.0, 3.0])


# ---------------------------------------------------------------- sdmgrad


@given(testing.gradients(1, 12))
def test_sdmgrad_without_pull_is_min_norm(rows: Tensor) -> None:
    assert torch.equal(combine.sdmgrad(gram_of(rows), pull=0.0), combine.min_norm(gram_of(rows)))


@given(testing.gradients(1, 12), st.floats(0, 10))
def test_sdmgrad_lies_on_the_simplex_above_its_floor(rows: Tensor, pull: float) -> None:
    weights = combine.sdmgrad(gram_of(rows), pull=pull)
    assert abs(weights.sum() - 1) <= 2 * len(rows) * EPS
    assert (weights >= pull / len(rows) / (1 + pull) * (1 - 4 * EPS)).all()


def test_pull_out_of_range() -> None:
    with pytest.raises(ValueError, match=r"^pull=-1: expected at least 0$"):
        combine.sdmgrad(torch.eye(2), pull=-1)


# ---------------------------------------------------------------- cagrad


@pytest.mark.parametrize("c", [0.2, 0.5, 1.5])
@given(testing.independent_gradients(2, 8))
def test_cagrad_is_the_oracle_s(c: float, rows: Tensor) -> None:
    expected = weights_of(reference.cagrad(rows.double().numpy(), c))
    assert_same_vector(combine.cagrad(gram_of(rows), c=c), expected, gram_of(rows))


@given(testing.independent_gradients(9, 20))
def test_cagrad_of_many_losses_is_the_oracle_s(rows: Tensor) -> None:
    expected = weights_of(reference.cagrad(rows.double().numpy(), 0.5))
    assert_same_vector(combine.cagrad(gram_of(rows)), expected, gram_of(rows))


NEARLY_OPPOSED = torch.tensor(
    [
        [-0.70806943, -0.64386605, 0.01941135, 0.32744895, 0.02441684],
        [1.31445326, 1.19526978, -0.03603855, -0.60787748, -0.04532672],
    ],
    dtype=torch.float64,
)


@pytest.mark.parametrize("c", [0.5, 3.0])
@given(testing.gradients(2, 8))
@example(NEARLY_OPPOSED)
def test_cagrad_is_optimal(c: float, rows: Tensor) -> None:
    """Within the ball, and no worse in the worst improvement than the oracle's step, which is the best there is.

    Unit: ‖g₀‖ times the longest gradient. A Gram matrix knows ‖g₀‖² to a rounding of Σ‖gᵢ‖²/K, so where the mean
    cancels, as here by up to four digits, the radius of the ball is known to 1e-8, and the gap with it.
    """
    rows = rows.double()
    mean, longest = rows.mean(0).norm(), rows.norm(dim=1).max()
    assume(mean > 1e-4 * longest > 0)
    weights = combine.cagrad(gram_of(rows), c=c)
    step, best = weights @ rows, torch.from_numpy(reference.cagrad(rows.numpy(), c).vector)
    assert (step - rows.mean(0)).norm() <= c * mean * (1 + 1e-6)
    assert (rows @ step).min() >= (rows @ best).min() - 1e-6 * mean * longest


@given(testing.gradients(1, 12))
def test_cagrad_without_radius_is_the_mean(rows: Tensor) -> None:
    expected = torch.full((len(rows),), 1 / len(rows), dtype=torch.float64)
    assert_same_vector(combine.cagrad(gram_of(rows), c=0.0), expected, gram_of(rows))


@pytest.mark.parametrize("length", [1e-12, 1e-10, 1e-9, 1e-8])
def test_cagrad_where_the_mean_is_lost_in_rounding(length: float) -> None:
    a = 1 + length
    weights = combine.cagrad(torch.tensor([[1.0, -a], [-a, a * a]], dtype=torch.float64))
    torch.testing.assert_close(weights, torch.tensor([0.5, 0.5]).double(), rtol=0, atol=1e-7)


def test_radius_out_of_range() -> None:
    with pytest.raises(ValueError, match=r"^c=-1: expected at least 0$"):
        combine.cagrad(torch.eye(2), c=-1)


# ---------------------------------------------------------------- fairgrad and nash_mtl


@pytest.mark.parametrize("alpha", [0.5, 1.0, 2.0])
@given(testing.independent_gradients(2, 6))
def test_fairgrad_is_the_oracle_s(alpha: float, rows: Tensor) -> None:
    """On G/‖G‖_F; where the solution is unique, and lengths are 12 orders of magnitude apart."""
    gram = gram_of(rows)
    expected = torch.from_numpy(reference.fairgrad((gram / gram.norm()).numpy(), alpha))
    # The condition number of the unit rows' Gram matrix, 1e4 at most, and the proximal 1e-13 times it.
    torch.testing.assert_close(combine.fairgrad(gram, alpha=alpha), expected, rtol=1e4 * (ROUNDING + 1e-13), atol=0)


@given(testing.independent_gradients(2, 6))
def test_nash_is_the_oracle_s(rows: Tensor) -> None:
    gram = gram_of(rows)
    expected = torch.from_numpy(reference.nash_mtl(gram.numpy()))
    torch.testing.assert_close(combine.nash_mtl(gram), expected, rtol=1e4 * (ROUNDING + 1e-13), atol=0)  # as above


@given(testing.independent_gradients(2, 12))
def test_every_loss_has_the_same_share_in_nash(rows: Tensor) -> None:
    """αᵢ ⟨gᵢ, d⟩ is one number."""
    gram = gram_of(rows)
    weights = combine.nash_mtl(gram)
    shares = weights * (gram @ weights)
    torch.testing.assert_close(shares / shares[0], torch.ones_like(shares), rtol=1e4 * (ROUNDING + 1e-13), atol=0)


@given(testing.independent_gradients(2, 8), st.data())
def test_nash_does_not_see_the_length_of_a_gradient(rows: Tensor, data: st.DataObject) -> None:
    k = len(rows)
    c = torch.tensor(data.draw(st.lists(st.floats(0.01, 100), min_size=k, max_size=k)), dtype=torch.float64)
    before = combine.nash_mtl(gram_of(rows))
    after = combine.nash_mtl(gram_of(rows * c[:, None])) * c
    torch.testing.assert_close(
        after / after.sum(),
        before / before.sum(),
        rtol=1e4 * (ROUNDING + 1e-13),
        atol=0,  # condition, as above
    )


@pytest.mark.parametrize("k", [2, 3, 9])
def test_no_bargain_at_a_stationary_point(k: int) -> None:
    """The weights stay finite and positive, and the step is nothing beside what they reach."""
    rows = torch.randn(k, k - 1, dtype=torch.float64)
    rows[-1] = -rows[:-1].sum(0)
    gram = gram_of(rows)
    weights = combine.nash_mtl(gram)
    assert weights.isfinite().all()
    assert (weights > 0).all()
    assert (weights @ rows).norm() <= 1e-5 * reach(weights, gram)


@pytest.mark.parametrize("alpha", [0.0, -1.0, float("nan")])
def test_alpha_out_of_range(alpha: float) -> None:
    with pytest.raises(ValueError, match=r"^alpha=.*: expected more than 0$"):
        combine.fairgrad(torch.eye(2), alpha=alpha)
