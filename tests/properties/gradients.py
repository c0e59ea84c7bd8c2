"""The strategies and assertions of ``distill_optim.testing`` that our own tests use."""

from __future__ import annotations

from distill_optim.testing import (
    ROUNDING,
    assert_same_vector,
    gradients,
    gram_of,
    independent_gradients,
    reach,
)

__all__ = ["ROUNDING", "assert_same_vector", "gradients", "gram_of", "independent_gradients", "reach"]
