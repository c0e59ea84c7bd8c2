"""Inner products of gradients, against NumPy in float64 on the concatenated gradients."""

from __future__ import annotations

import importlib
import math
from collections.abc import Sequence
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from distill_optim.combine import gram, min_norm

BUCKETS: dict[str, int] = importlib.import_module("distill_optim.combine.gram")._BUCKET

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.complex64, torch.complex128)
SHAPES = ((), (0,), (1,), (5,), (2, 3), (3, 0, 2), (2, 2, 2, 3))

Gradients = list[list[Tensor | None]]


def reference(gradients: Sequence[Sequence[Tensor | None]]) -> NDArray[np.float64]:
    """Concatenates a real view of everything; None is zero."""
    shapes = [next((g for g in column if g is not None), torch.zeros(0)) for column in zip(*gradients, strict=True)]
    rows = []
    for gradient in gradients:
        dense = [torch.zeros_like(s) if g is None else g for g, s in zip(gradient, shapes, strict=True)]
        real = [(torch.view_as_real(d) if d.is_complex() else d).double().flatten().numpy() for d in dense]
        rows.append(np.concatenate([*real, np.zeros(0)]))
    stacked = np.stack(rows)
    return np.asarray(stacked @ stacked.T)


@st.composite
def gradient_lists(draw: st.DrawFn) -> Gradients:
    """Small integers, whose inner products no order of summation rounds, in every layout that autograd returns."""
    k = draw(st.integers(1, 8))
    lists: Gradients = [[] for _ in range(k)]
    for _ in range(draw(st.integers(0, 5))):
        shape = draw(st.sampled_from(SHAPES))
        generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
        complex_parameter = draw(st.booleans())
        for gradients in lists:
            dtype = draw(st.sampled_from(DTYPES[4:] if complex_parameter else DTYPES[:4]))
            tensor = torch.randint(-4, 5, shape, generator=generator).to(dtype)
            if dtype.is_complex:
                tensor = tensor + 1j * torch.randint(-4, 5, shape, generator=generator)
            layout = draw(st.sampled_from(["contiguous", "transposed", "strided", "expanded", "none"]))
            if layout == "transposed":
                tensor = tensor.transpose(0, -1).contiguous().transpose(0, -1) if shape else tensor
            elif layout == "strided":
                tensor = torch.stack([tensor, tensor + 1], -1)[..., 0]
            elif layout == "expanded":
                tensor = (tensor.flatten()[0] if tensor.numel() else tensor.new_zeros(())).expand(shape)
            gradients.append(None if layout == "none" else tensor)
    return lists


@given(gradient_lists(), st.sampled_from([1, 2, 7, BUCKETS["cpu"]]))
def test_equals_numpy_on_concatenated_gradients(gradients: Gradients, bucket: int) -> None:
    """Exactly, for integers; buckets of a few elements, so that their borders fall everywhere."""
    with patch.dict(BUCKETS, cpu=bucket):
        result = gram(gradients)
    assert result.dtype == torch.float64
    assert np.array_equal(result.numpy(), reference(gradients))


@pytest.mark.parametrize("sizes", [(1 << 20,), ((1 << 18) - 1, 3, (1 << 18) + 5), (1 << 18, 1, 1 << 18), (7,) * 999])
def test_more_elements_than_a_bucket(sizes: tuple[int, ...]) -> None:
    gradients: Gradients = [[torch.randint(-9, 10, (n,)).float() for n in sizes] for _ in range(3)]
    assert np.array_equal(gram(gradients).numpy(), reference(gradients))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k", [2, 5, 8])
def test_symmetric_to_the_last_bit(k: int, dtype: torch.dtype) -> None:
    gradients = [[torch.randn(1001, dtype=dtype), torch.randn(7, 11, dtype=dtype)] for _ in range(k)]
    result = gram(gradients)
    assert torch.equal(result, result.mT)
    # A product of two 53-bit numbers is rounded, and 2 · 1078 sums of them: at most as many eps of ‖gᵢ‖‖gⱼ‖.
    lengths = result.diagonal().sqrt()
    assert (
        (result - torch.from_numpy(reference(gradients))).abs() <= 2156 * 2.3e-16 * torch.outer(lengths, lengths)
    ).all()


def test_half_precision_squares_do_not_overflow() -> None:
    """300² is beyond float16, and a sum of 70,000 ones beyond bfloat16's digits."""
    assert gram([[torch.full((3,), 300.0).half()]]).item() == 3 * 300**2
    assert gram([[torch.ones(70_001).bfloat16()]]).item() == 70_001


def test_nearly_agreeing_gradients_keep_the_digits_of_their_difference() -> None:
    """A relative gap of 1e-3 in float32: our weight is the exact one, that of a float32 Gram matrix is not."""
    base, noise = torch.randn(2, 100_000, dtype=torch.float64)
    noise -= (noise @ base) / (base @ base) * base
    g1, g2 = (base - 0.0003 * noise).float(), (base + 0.0007 * noise).float()
    d = (g2.double() - g1.double()).tolist()
    expected = math.fsum(map(math.prod, zip(d, g2.tolist(), strict=True))) / math.fsum(x * x for x in d)
    assert 0.1 < expected < 0.9
    # √n roundings of eps ‖g‖² make 7e-14 ‖g‖², which is 7e-8 of ‖d‖² = 1e-6 ‖g‖².
    assert min_norm(gram([[g1], [g2]]))[0].item() == pytest.approx(expected, abs=1e-7)
    stacked = torch.stack([g1, g2])
    assert min_norm(stacked @ stacked.mT)[0].item() != pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize("sizes", [(1001,), (3, 13, 1), (263_001,)])
@pytest.mark.parametrize("k", [2, 3, 8])
def test_equal_gradients_have_equal_products(k: int, sizes: tuple[int, ...]) -> None:
    """To the last bit, wherever their rows lie: the weights of a tie depend on it."""
    own = [torch.randn(n) for n in sizes]
    result = gram([own] * k)
    assert torch.equal(result, result[0, 0].expand(k, k))


def test_complex_inner_product_is_the_real_part() -> None:
    g1, g2 = torch.tensor([1 + 2j]), torch.tensor([3 - 1j])
    assert gram([[g1], [g2]]).tolist() == [[5, 1], [1, 10]]


def test_nothing_reached() -> None:
    assert gram([[None, None], [None, None]]).tolist() == [[0, 0], [0, 0]]
    assert gram([[], []]).tolist() == [[0, 0], [0, 0]]


def test_gradients_are_left_as_they_were() -> None:
    gradients = [torch.randn(4, dtype=torch.float64) for _ in range(3)]
    gram([[g] for g in gradients])
    assert [g._version for g in gradients] == [0, 0, 0]


def test_lists_of_unequal_length() -> None:
    ones: list[Any] = [torch.ones(1)]
    with pytest.raises(ValueError, match="zip"):
        gram([ones, ones * 2])
