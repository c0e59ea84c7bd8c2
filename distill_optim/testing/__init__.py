"""Property tests for methods of gradient combination: strategies of gradients, and assertions about the weights. ::

    from distill_optim import testing

    @given(testing.gradients())
    def test_my_method(rows):
        testing.assert_scale_invariant(my_method, rows)

Strategies draw gradients in the mixtures that break solvers, see :mod:`distill_optim.testing.strategies`. Assertions
allow what rounding explains and nothing else, see :mod:`distill_optim.testing.assertions`. Those named for an outcome
take ``(weights, gram)``; those named for a behaviour take ``(method, rows, losses=None)`` and call the method.

Needs hypothesis, which the rest of the package does not: ``pip install "distill_optim[test]"``.
"""

from __future__ import annotations

try:
    import hypothesis as _hypothesis  # noqa: F401  # here, so that there is one message for all that is below
except ImportError as error:
    raise ImportError('distill_optim.testing needs hypothesis: pip install "distill_optim[test]"') from error

from distill_optim.testing.assertions import (
    ROUNDING,
    assert_batch_is_a_loop,
    assert_defined,
    assert_invariant_to_row_scaling,
    assert_kkt,
    assert_non_conflicting,
    assert_not_finite_in_not_finite_out,
    assert_on_simplex,
    assert_permutation_equivariant,
    assert_positive,
    assert_same_vector,
    assert_scale_invariant,
    assert_takes_any_dtype,
    gram_of,
    reach,
    rounding,
)
from distill_optim.testing.fake_cuda import LeftDevice, assert_no_host_read, on_fake_cuda
from distill_optim.testing.strategies import (
    badly_scaled_gradients,
    conflicting_gradients,
    gradients,
    independent_gradients,
    losses,
    nearly_stationary_gradients,
    related_gradients,
    slightly_conflicting_gradients,
    stationary_gradients,
    with_losses,
)

__all__ = [
    "ROUNDING",
    "LeftDevice",
    "assert_batch_is_a_loop",
    "assert_defined",
    "assert_invariant_to_row_scaling",
    "assert_kkt",
    "assert_no_host_read",
    "assert_non_conflicting",
    "assert_not_finite_in_not_finite_out",
    "assert_on_simplex",
    "assert_permutation_equivariant",
    "assert_positive",
    "assert_same_vector",
    "assert_scale_invariant",
    "assert_takes_any_dtype",
    "badly_scaled_gradients",
    "conflicting_gradients",
    "gradients",
    "gram_of",
    "independent_gradients",
    "losses",
    "nearly_stationary_gradients",
    "on_fake_cuda",
    "reach",
    "related_gradients",
    "rounding",
    "slightly_conflicting_gradients",
    "stationary_gradients",
    "with_losses",
]
