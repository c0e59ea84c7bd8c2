"""The kernels: on the CPU by Triton's interpreter, on a GPU for real, against torch's for-loop path."""

from __future__ import annotations

import math
import os
import subprocess
import sys
import warnings
from functools import partial
from itertools import chain
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw
from torch.optim.sgd import sgd

from distill_optim import DOTSGD, DOTAdamW, MoKDAdamW, MoKDSGD
from distill_optim.update import (
    dot_adamw,
    dot_sgd,
    multi_tensor,
    triton_dot_adamw,
    triton_dot_sgd,
    triton_weighted,
    weighted_sum,
)
from tests.helpers import assert_same_bits, batches, flat, no_waiting, student, train, two_losses

triton = pytest.importorskip("triton", reason="needs Triton, which comes with torch for CUDA and with the extra test")

# Not at the top: it imports Triton.
from distill_optim.update import kernels  # noqa: E402

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
pytestmark = pytest.mark.skipif(
    not ON_GPU and os.environ.get("TRITON_INTERPRET") != "1",
    reason="needs a GPU or TRITON_INTERPRET=1, and the variable was set to something else",
)

BLOCK = kernels.BLOCK
SHAPES: list[tuple[int, ...]] = [(3, 5), (), (0, 3), (1,), (BLOCK - 1,), (2, BLOCK), (BLOCK + 1,), (7,), (2,), (5,)]
OPTIONS: list[dict[str, Any]] = [
    {},
    {"weight_decay": 0.1},
    {"dampening": 0.3},
    {"nesterov": True, "weight_decay": 0.1},
    {"maximize": True, "weight_decay": 0.1, "dampening": 0.3},
    {"gains": [0.3, 1.0, 2.0, 0.7]},
    {"momentum": 0.0, "dampening": 0.3},
    {"momenta": [0.0, 0.9, 0.5, 0.0], "weight_decay": 0.1},
    {"lr": torch.tensor(0.07)},
    {"lr": torch.tensor([0.07], dtype=torch.float64), "gains": [0.3, 1.0, 2.0, 0.7]},
]


@pytest.fixture(autouse=True)
def _also_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(multi_tensor, "_DEVICES", frozenset({"cpu", "cuda"}))
    if not ON_GPU:
        # Interpreted, a multiply-add is a product and a sum, both rounded. In float64 a product of float32 is exact.
        from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

        def fused(self: Any, x: Any, y: Any, z: Any) -> Any:
            total = x.data.astype("float64") * y.data + z.data
            return TensorHandle(total.astype(z.data.dtype), z.dtype.scalar)

        # And bfloat16, which numpy lacks, is cut off where a GPU rounds.
        cut = InterpreterBuilder.create_fp_trunc

        def rounded(self: Any, x: Any, dtype: Any) -> Any:
            if dtype.scalar != triton.language.bfloat16:
                return cut(self, x, dtype)
            bits = torch.from_numpy(x.data).bfloat16().view(torch.int16).numpy().view("uint16")
            return TensorHandle(bits, dtype.scalar)

        monkeypatch.setattr(InterpreterBuilder, "create_fma", fused)
        monkeypatch.setattr(InterpreterBuilder, "create_fp_trunc", rounded)


def options(k: int, given: dict[str, Any]) -> dict[str, Any]:
    defaults: dict[str, Any] = {
        "lr": 0.1, "momentum": 0.9, "momenta": [0.8, 0.95, 0.9, 0.5], "gains": [1.0] * 4, "dampening": 0.0,
        "weight_decay": 0.0, "nesterov": False, "maximize": False,
    }  # fmt: skip
    chosen = defaults | given
    return chosen | {"momenta": chosen["momenta"][:k], "gains": chosen["gains"][:k]}


def random_step(shapes: list[Any], k: int, dtype: torch.dtype, step: int) -> list[list[Tensor | None]]:
    """One gradient per loss and parameter; some losses miss some parameters, another in each step."""
    return [
        [
            None if k > 1 and (p + i + step) % 4 == 0 else torch.randn(shape, dtype=torch.float64).to(dtype)
            for p, shape in enumerate(shapes)
        ]
        for i in range(k)
    ]


def to(column: Any, device: str, dtype: torch.dtype) -> list[Any]:
    return [None if t is None else t.detach().clone().to(device, dtype) for t in column]


@pytest.mark.parametrize(
    ("k", "dtype"), [(1, torch.float32), (2, torch.float32), (2, torch.float64), (4, torch.float32)]
)
@pytest.mark.parametrize("given", OPTIONS, ids=str)
def test_the_kernel_takes_the_steps_of_the_for_loop(k: int, given: dict[str, Any], dtype: torch.dtype) -> None:
    """In float32 bit for bit on the interpreter, because the kernel rounds where torch does. In float64 the
    interpreter has no exact multiply-add, and on a GPU torch's reference runs on the CPU, so that a few ulps are left.
    """
    chosen = options(k, given)
    start = [torch.randn(shape, dtype=dtype) for shape in SHAPES]
    theirs, ours = to(start, "cpu", dtype), to(start, DEVICE, dtype)
    their_buffers: list[list[Any]] = [[None] * len(SHAPES) for _ in range(k)]
    our_buffers: list[list[Any]] = [[None] * len(SHAPES) for _ in range(k)]
    for step in range(3):
        gradients = random_step(SHAPES, k, dtype, step)
        dot_sgd(theirs, gradients, their_buffers, **chosen, foreach=False, fused=False)
        there = {**chosen, "lr": chosen["lr"].to(DEVICE) if isinstance(chosen["lr"], Tensor) else chosen["lr"]}
        triton_dot_sgd.dot_sgd(ours, [to(column, DEVICE, dtype) for column in gradients], our_buffers, **there)
    for mine, yours in zip([ours, *our_buffers], [theirs, *their_buffers], strict=True):
        assert [b is None for b in mine] == [b is None for b in yours]
        # A tensor lr times a gain is rounded by torch, and not by the kernel.
        if dtype is torch.float32 and not ON_GPU and not isinstance(chosen["lr"], Tensor):
            assert_same_bits([b for b in mine if b is not None], [b for b in yours if b is not None])
        rtol, atol = (1e-5, 1e-6) if dtype is torch.float32 else (1e-13, 1e-14)
        for mine_, yours_ in zip(mine, yours, strict=True):
            if mine_ is not None:
                torch.testing.assert_close(mine_.cpu(), yours_, rtol=rtol, atol=atol)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("given", OPTIONS[:6], ids=str)
@pytest.mark.parametrize("k", [1, 3])
def test_half_precision_is_computed_in_float32(k: int, given: dict[str, Any], dtype: torch.dtype) -> None:
    """Each step is the for-loop's in float32, then rounded: the buffers once (half an ulp, plus what float32 does at
    a tie), the parameter once per loss that reaches it.
    """
    chosen = options(k, given)
    ours = to([torch.randn(shape) for shape in SHAPES], DEVICE, dtype)
    buffers: list[list[Any]] = [[None] * len(SHAPES) for _ in range(k)]
    ulp = torch.finfo(dtype).eps
    for step in range(3):
        gradients = random_step(SHAPES, k, dtype, step)
        theirs = to(ours, "cpu", torch.float32)
        their_buffers = [to(column, "cpu", torch.float32) for column in buffers]
        wide = [to(column, "cpu", torch.float32) for column in gradients]
        dot_sgd(theirs, wide, their_buffers, **chosen, foreach=False, fused=False)
        triton_dot_sgd.dot_sgd(ours, [to(column, DEVICE, dtype) for column in gradients], buffers, **chosen)
        for mine, yours in zip(ours, theirs, strict=True):
            # The value may pass through a larger one between two losses: |θ| stays below 8.
            torch.testing.assert_close(mine.cpu().float(), yours, rtol=0, atol=k * ulp / 2 * 8)
        # From the second loss on weight decay is off, so the buffers see no rounding but their own.
        for mine_column, yours_column in zip(buffers, their_buffers, strict=True):
            for mine, yours in zip(mine_column, yours_column, strict=True):
                if mine is not None:
                    assert mine.dtype == dtype
                    torch.testing.assert_close(mine.cpu().float(), yours, rtol=ulp * 0.51, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_one_fused_sgd_after_the_other(dtype: torch.dtype) -> None:
    """Between two losses a parameter is rounded, as two optimizers would: 1 + 0.6 ulp + 0.6 ulp is 1 + 2 ulp then."""
    ulp = torch.finfo(dtype).eps
    p = torch.ones(BLOCK + 3, dtype=dtype, device=DEVICE)
    g = torch.full_like(p, -0.6 * ulp)
    triton_dot_sgd.dot_sgd([p], [[g], [g]], [[None], [None]], **options(2, {"lr": 1.0}))
    assert torch.equal(p.cpu().double(), torch.full(p.shape, 1 + 2 * ulp, dtype=torch.float64))


def test_memory_that_is_not_aligned_and_not_row_by_row() -> None:
    """Views into the middle of an allocation; transposed and channels-last parameters."""

    def made(seed: int) -> list[Tensor]:
        torch.manual_seed(seed)
        return [
            torch.randn(BLOCK + 3)[3:],
            torch.randn(3 * BLOCK)[1 : 2 * BLOCK + 1],
            torch.randn(40, 60).t(),
            torch.randn(2, 3, 5, 5).to(memory_format=torch.channels_last),
        ]

    theirs, ours = made(0), [p.to(DEVICE) for p in made(0)]
    their_buffers: list[list[Any]] = [[None] * 4 for _ in range(2)]
    our_buffers: list[list[Any]] = [[None] * 4 for _ in range(2)]
    chosen = options(2, {"weight_decay": 0.1})
    for step in range(3):
        gradients = [made(10 + step), made(20 + step)]
        there = [[g.to(DEVICE) for g in column] for column in gradients]
        dot_sgd(theirs, gradients, their_buffers, **chosen, foreach=False, fused=False)
        assert triton_dot_sgd.dot_sgd(ours, there, our_buffers, **chosen)
    for mine, yours in zip([*ours, *chain(*our_buffers)], [*theirs, *chain(*their_buffers)], strict=True):
        assert mine is not None
        assert yours is not None
        assert mine.stride() == yours.stride()
        torch.testing.assert_close(mine.cpu(), yours, rtol=1e-5, atol=1e-6)


def test_what_lies_beside_a_parameter_is_left_alone() -> None:
    memory = torch.ones(3, BLOCK + 9, device=DEVICE)
    p, v, w = (row[4 : BLOCK + 5] for row in memory)
    g = torch.full_like(p, 2)
    for _ in range(2):
        triton_dot_sgd.dot_sgd([p], [[g], [g]], [[v], [w]], **options(2, {}))
    for row in memory:
        assert row[:4].eq(1).all()
        assert row[BLOCK + 5 :].eq(1).all()
        assert row[4 : BLOCK + 5].ne(1).all()


def test_many_small_tensors_and_a_large_one() -> None:
    sizes = [i % 9 for i in range(60)] + [4 * BLOCK + 5]
    p = [torch.randn(n, device=DEVICE) for n in sizes]
    g = [[torch.randn(n, device=DEVICE) for n in sizes] for _ in range(2)]
    expected = [x - 0.1 * a - 0.1 * b for x, a, b in zip(p, *g, strict=True)]
    triton_dot_sgd.dot_sgd(p, g, [[None] * 61, [None] * 61], **options(2, {}))
    for mine, yours in zip(p, expected, strict=True):
        torch.testing.assert_close(mine, yours, rtol=1e-5, atol=1e-6)


# ---------------------------------------------------------------- AdamW with a first moment per loss

DOT_ADAMW_OPTIONS: list[dict[str, Any]] = [
    {},
    {"maximize": True, "weight_decay": 0.0},
    {"amsgrad": True},
    {"lr": torch.tensor(0.07, dtype=torch.float64), "beta1s": [0.3, 0.8, 0.5, 0.9], "beta2": 0.5},
    {"beta1s": [0.0, 0.95, 0.0, 0.6], "beta1": 0.4},
]


for_loop: Any = partial(dot_adamw, foreach=False, fused=False, on_device=False)


def dot_adamw_options(k: int, given: dict[str, Any]) -> dict[str, Any]:
    defaults: dict[str, Any] = {"beta1s": [0.85, 0.95, 0.9, 0.5]}
    chosen = adamw_options(defaults | given)
    return chosen | {"beta1s": chosen["beta1s"][:k]}


def dot_adamw_state(k: int, amsgrad: bool, dtype: torch.dtype, device: str) -> tuple[list[list[Tensor]], Any]:
    """K first moments; second moments, their maxima, and counts."""
    _, *others = adamw_state(SHAPES, amsgrad, dtype, device)
    return [[torch.zeros(shape, dtype=dtype, device=device) for shape in SHAPES] for _ in range(k)], others


def agreeing(gradients: list[list[Any]]) -> list[list[Any]]:
    """With the signs of the first loss that reaches the parameter, and none near 0.

    Where the losses cancel out in their sum, each one's step is a quotient by next to nothing, and the for-loop rounds
    them one by one: there it is the less exact one, and no reference.
    """
    signs = [next((g.sign() for g in row if g is not None), None) for row in zip(*gradients, strict=True)]
    return [
        [None if g is None else (g.abs() + 0.1) * sign for g, sign in zip(column, signs, strict=True)]
        for column in gradients
    ]


def sums(gradients: list[list[Any]]) -> list[Tensor]:
    """In the order of the losses, in the gradients' precision, as :class:`Collected` takes them."""
    reaching = [[g for g in row if g is not None] for row in zip(*gradients, strict=True)]
    return [sum(own[1:], own[0]) for own in reaching]


@pytest.mark.parametrize(("k", "dtype"), [(2, torch.float32), (2, torch.float64), (4, torch.float32)])
@pytest.mark.parametrize("given", DOT_ADAMW_OPTIONS, ids=str)
@pytest.mark.filterwarnings("ignore:divide by zero encountered in log")  # of the interpreter's numpy, where β₁ is 0
def test_dot_adamw_is_the_for_loop(k: int, given: dict[str, Any], dtype: torch.dtype) -> None:
    """To a few ulps: the steps along the losses are added up before they are divided, and taken together.

    Losses miss parameters, and some parameters are reached by one alone. (By none: left to torch.)
    """
    chosen = dot_adamw_options(k, given)
    start = [torch.randn(shape, dtype=dtype) for shape in SHAPES]
    theirs, ours = to(start, "cpu", dtype), to(start, DEVICE, dtype)
    amsgrad = "amsgrad" in given
    their_moments, their_state = dot_adamw_state(k, amsgrad, dtype, "cpu")
    moments, state = dot_adamw_state(k, amsgrad, dtype, DEVICE)
    for step in range(4):
        gradients = agreeing(random_step(SHAPES, k, dtype, step))
        there = [to(column, DEVICE, dtype) for column in gradients]
        for_loop(theirs, gradients, sums(gradients), their_moments, *their_state, **chosen)
        assert triton_dot_adamw.dot_adamw(ours, there, moments, *state, **on_device(chosen))
    rtol = 2e-6 if dtype is torch.float32 else 1e-13
    for mine, yours in zip(
        chain(ours, *moments, *state), chain(theirs, *their_moments, *their_state), strict=True
    ):  # fmt: skip
        torch.testing.assert_close(mine.cpu(), yours, rtol=rtol, atol=rtol)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("given", DOT_ADAMW_OPTIONS[:3], ids=str)
def test_dot_adamw_in_half_precision_is_computed_in_float32(given: dict[str, Any], dtype: torch.dtype) -> None:
    """Each step is the for-loop's in float32, and everything is rounded once, at its end."""
    k, ulp = 2, torch.finfo(dtype).eps
    chosen = dot_adamw_options(k, given)
    ours = to([torch.randn(shape) for shape in SHAPES], DEVICE, dtype)
    moments, state = dot_adamw_state(k, "amsgrad" in given, dtype, DEVICE)
    state[-1] = [torch.zeros((), device=DEVICE) for _ in SHAPES]
    for step in range(3):
        gradients = agreeing(random_step(SHAPES, k, dtype, step))
        theirs = to(ours, "cpu", torch.float32)
        their_moments, their_state = ([to(column, "cpu", torch.float32) for column in c] for c in (moments, state))
        wide = [to(column, "cpu", torch.float32) for column in gradients]
        for_loop(theirs, wide, sums(wide), their_moments, *their_state, **chosen)
        there = [to(column, DEVICE, dtype) for column in gradients]
        assert triton_dot_adamw.dot_adamw(ours, there, moments, *state, **on_device(chosen))
        # Below 2⁻¹⁴ float16 has fewer digits, and the second moments of the kernel's next step are those it stored.
        tiny = torch.finfo(dtype).smallest_normal * ulp
        for mine, yours in zip(
            chain(ours, *moments, *state), chain(theirs, *their_moments, *their_state), strict=True
        ):  # fmt: skip
            torch.testing.assert_close(mine.cpu().float(), yours, rtol=ulp * 0.51, atol=tiny)


# ---------------------------------------------------------------- the weighted sum and the update in one


def adamw_state(shapes: list[Any], amsgrad: bool, dtype: torch.dtype, device: str) -> list[list[Tensor]]:
    moments = [[torch.zeros(shape, dtype=dtype, device=device) for shape in shapes] for _ in range(2 + amsgrad)]
    return [*moments, *[[]] * (not amsgrad), [torch.zeros((), device=device) for _ in shapes]]


def reached(gradients: list[list[Tensor | None]]) -> list[int]:
    return [p for p, row in enumerate(zip(*gradients, strict=True)) if any(g is not None for g in row)]


def combined(gradients: list[list[Tensor | None]], weights: Tensor) -> dict[int, Tensor]:
    """By :func:`weighted_sum`, where several losses reach the parameter; the only gradient elsewhere."""
    rows = {p: [column[p] for column in gradients] for p in reached(gradients)}
    alone = {p: next(g for g in row if g is not None) for p, row in rows.items() if row.count(None) == len(row) - 1}
    shared = [p for p in rows if p not in alone]
    copies = [[None if g is None else g.clone() for g in (column[p] for p in shared)] for column in gradients]
    return alone | dict(zip(shared, weighted_sum(copies, weights), strict=True))


WEIGHTS = torch.tensor([0.3, 1.7, -0.4, 2.1], dtype=torch.float64)
SGD_OPTIONS: list[dict[str, Any]] = [
    {},
    {"weight_decay": 0.1, "nesterov": True},
    {"maximize": True, "weight_decay": 0.1, "dampening": 0.3},
    {"momentum": 0.0, "weight_decay": 0.1},
    {"lr": torch.tensor(0.07)},
]
ADAMW_OPTIONS: list[dict[str, Any]] = [
    {},
    {"maximize": True, "weight_decay": 0.0},
    {"amsgrad": True},
    {"lr": torch.tensor(0.07, dtype=torch.float64), "beta1": 0.3, "beta2": 0.5},
    {"beta1": 0.0},
]


def sgd_options(given: dict[str, Any]) -> dict[str, Any]:
    defaults = {"lr": 0.1, "momentum": 0.9, "dampening": 0.0, "weight_decay": 0.0, "nesterov": False, "maximize": False}
    return defaults | given


def adamw_options(given: dict[str, Any]) -> dict[str, Any]:
    defaults = {"lr": 0.1, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.1, "maximize": False}
    return {key: value for key, value in (defaults | given).items() if key != "amsgrad"}


def on_device(chosen: dict[str, Any]) -> dict[str, Any]:
    return {key: value.to(DEVICE) if isinstance(value, Tensor) else value for key, value in chosen.items()}


@pytest.mark.parametrize(
    ("k", "dtype"), [(1, torch.float32), (2, torch.float32), (2, torch.float64), (4, torch.float32)]
)
@pytest.mark.parametrize("given", SGD_OPTIONS, ids=str)
def test_weighted_sgd_is_the_weighted_sum_and_the_for_loop(k: int, given: dict[str, Any], dtype: torch.dtype) -> None:
    """In float32 bit for bit on the interpreter; in float64 it has no exact multiply-add, so a few ulps are left."""
    chosen, weights = sgd_options(given), WEIGHTS[:k]
    start = [torch.randn(shape, dtype=dtype) for shape in SHAPES]
    theirs, ours = to(start, "cpu", dtype), to(start, DEVICE, dtype)
    their_buffers: list[Any] = [None] * len(SHAPES)
    our_buffers: list[Any] = [None] * len(SHAPES)
    for step in range(3):
        gradients = random_step(SHAPES, k, dtype, step)
        along = combined(gradients, weights)
        own = [their_buffers[p] for p in along]
        sgd([theirs[p] for p in along], list(along.values()), own, **chosen, foreach=False)
        for p, buffer in zip(along, own, strict=True):
            their_buffers[p] = buffer
        there = [to(column, DEVICE, dtype) for column in gradients]
        assert triton_weighted.weighted_sgd(ours, there, weights.to(DEVICE), our_buffers, **on_device(chosen))
    for mine, yours in zip([*ours, *our_buffers], [*theirs, *their_buffers], strict=True):
        assert (mine is None) == (yours is None)
        if mine is not None and dtype is torch.float32 and not ON_GPU:
            assert_same_bits([mine], [yours])
        elif mine is not None:
            torch.testing.assert_close(mine.cpu(), yours)


@pytest.mark.parametrize(
    ("k", "dtype"), [(1, torch.float32), (2, torch.float32), (2, torch.float64), (4, torch.float32)]
)
@pytest.mark.parametrize("given", ADAMW_OPTIONS, ids=str)
@pytest.mark.filterwarnings("ignore:divide by zero encountered in log")  # of the interpreter's numpy, where β₁ is 0
def test_weighted_adamw_is_the_weighted_sum_and_the_for_loop(k: int, given: dict[str, Any], dtype: torch.dtype) -> None:
    """To a few ulps: torch's for-loop leaves to the compiler which products and sums are one."""
    chosen, weights = adamw_options(given), WEIGHTS[:k]
    start = [torch.randn(shape, dtype=dtype) for shape in SHAPES]
    theirs, ours = to(start, "cpu", dtype), to(start, DEVICE, dtype)
    amsgrad = "amsgrad" in given
    their_state, our_state = (adamw_state(SHAPES, amsgrad, dtype, device) for device in ("cpu", DEVICE))
    for step in range(3):
        gradients = random_step(SHAPES, k, dtype, step)
        along = combined(gradients, weights)
        m, v, largest, counts = ([column[p] for p in along] if column else [] for column in their_state)
        own = [theirs[p] for p in along]
        adamw(own, list(along.values()), m, v, largest, counts, **chosen, amsgrad=amsgrad, foreach=False)
        there = [to(column, DEVICE, dtype) for column in gradients]
        assert triton_weighted.weighted_adamw(ours, there, weights.to(DEVICE), *our_state, **on_device(chosen))
    rtol = 1e-6 if dtype is torch.float32 else 1e-13
    for mine, yours in zip(chain(ours, *our_state), chain(theirs, *their_state), strict=True):
        torch.testing.assert_close(mine.cpu(), yours, rtol=rtol, atol=rtol)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_weighted_sum_of_half_precision_is_rounded_once_at_the_end(dtype: torch.dtype) -> None:
    """Weights and sums that the dtype does not have: 0.1 times 1 and 0.9 times 1 is 1, and a step to 1 − 0.6 ulp."""
    p = torch.ones(BLOCK + 3, dtype=dtype, device=DEVICE)
    buffers: list[Tensor | None] = [None]
    g, weights = torch.ones_like(p), torch.tensor([0.1, 0.9], dtype=torch.float64, device=DEVICE)
    lr = 0.6 * torch.finfo(dtype).eps
    assert triton_weighted.weighted_sgd([p], [[g], [g]], weights, buffers, **sgd_options({"lr": lr}))
    assert torch.equal(p, torch.full_like(p, 1 - lr))
    assert buffers[0] is not None
    assert buffers[0].eq(1).all()


def test_a_weight_that_is_not_finite_stays_with_the_parameters_that_it_belongs_to() -> None:
    """A loss's weight does not touch what the loss does not reach, nor what it reaches alone."""
    weights = torch.tensor([0.5, math.nan, 1.5], device=DEVICE)
    one = torch.ones(3, device=DEVICE)
    params = [torch.ones(3, device=DEVICE) for _ in range(3)]
    gradients = [[one, None, one], [None, one, one], [one, None, None]]
    assert triton_weighted.weighted_sgd(params, gradients, weights, [None] * 3, **sgd_options({}))
    torch.testing.assert_close(params[0], one - 0.1 * 2)
    torch.testing.assert_close(params[1], one - 0.1)
    assert params[2].isnan().all()


# ---------------------------------------------------------------- what all kernels share

KERNELS = ["dot_sgd", "dot_adamw", "weighted_sgd", "weighted_adamw"]


def stepper(kernel: str, params: list[Tensor]) -> tuple[Any, list[list[Any]]]:
    """A kernel's step, which takes the gradients of two losses; and the state that it keeps."""
    weights = torch.tensor([0.5, 1.5], dtype=torch.float64, device=DEVICE)
    if kernel == "dot_sgd":
        state: list[list[Any]] = [[None] * len(params) for _ in range(2)]
        return partial(triton_dot_sgd.dot_sgd, params, buffers=state, **options(2, {})), state
    if kernel == "weighted_sgd":
        state = [[None] * len(params)]
        chosen = sgd_options({})
        return partial(triton_weighted.weighted_sgd, params, weights=weights, buffers=state[0], **chosen), state
    names = ["exp_avgs", "exp_avg_sqs", "max_exp_avg_sqs", "steps"]
    state = [[torch.zeros_like(p) for p in params] for _ in names[:-1]]
    state += [[torch.zeros((), device=DEVICE) for _ in params]]
    columns: Any = dict(zip(names, state, strict=True)) | adamw_options({})
    if kernel == "dot_adamw":
        more = [torch.zeros_like(p) for p in params]
        columns |= {"exp_avgs": [state[0], more], "beta1s": [0.85, 0.95]}
        return partial(triton_dot_adamw.dot_adamw, params, **columns), [*state[:-1], more, state[-1]]
    return partial(triton_weighted.weighted_adamw, params, weights=weights, **columns), state


@pytest.mark.parametrize("kernel", ["dot_adamw", "weighted_adamw"])
def test_step_counts_of_another_kind_are_left_to_torch(kernel: str) -> None:
    params = random_params()
    step, state = stepper(kernel, params)
    counts = [*state[-1][:-1], torch.zeros((), dtype=torch.float64, device=DEVICE)]
    assert not step(random_gradients(params, 0), steps=counts)
    assert all(t.eq(0).all() for t in chain(*state))
    assert_same_bits(params, random_params())


def values(params: list[Tensor], state: list[list[Any]]) -> list[Any]:
    return to(chain(params, *state), "cpu", torch.float64)


def random_params() -> list[Tensor]:
    torch.manual_seed(1)
    return [torch.randn(shape, device=DEVICE) for shape in [(3, 5), (), (BLOCK + 1,), (2, BLOCK)]]


def random_gradients(params: list[Tensor], seed: int) -> list[list[Tensor]]:
    torch.manual_seed(seed)
    return [[torch.randn_like(p) for p in params] for _ in range(2)]


@pytest.mark.parametrize("kernel", KERNELS)
def test_gradients_are_unscaled_within_the_kernel(kernel: str) -> None:
    """A power of two leaves no trace; an infinite gradient skips the step, whatever else stands in the gradients."""
    scale, fine = torch.tensor(2.0**16, device=DEVICE), torch.tensor(0.0, device=DEVICE)
    plain, scaled = random_params(), random_params()
    (step, state), (scaled_step, scaled_state) = stepper(kernel, plain), stepper(kernel, scaled)
    for seed in range(3):
        gradients = random_gradients(plain, seed)
        assert step(gradients)
        times = [[g * scale for g in column] for column in gradients]
        assert scaled_step(times, grad_scale=scale, found_inf=fine)
        before = values(scaled, scaled_state)
        times[1][2][5] = math.inf
        assert scaled_step(times, grad_scale=scale, found_inf=fine + 1)
        assert_same_bits(values(scaled, scaled_state), before)
    assert_same_bits(values(scaled, scaled_state), values(plain, state))


@pytest.mark.parametrize("kernel", KERNELS)
def test_buffers_of_a_first_step_that_is_skipped_are_zeros(kernel: str) -> None:
    params = random_params()
    step, state = stepper(kernel, params)
    nothing = [[torch.full_like(p, math.nan) for p in params] for _ in range(2)]
    assert step(nothing, found_inf=torch.ones((), device=DEVICE))
    assert_same_bits(params, random_params())
    assert all(t.eq(0).all() for t in chain(*state))


@pytest.mark.cuda
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("shifted", ["parameter", "gradient", "state"])
def test_memory_of_which_some_is_not_aligned(kernel: str, shifted: str) -> None:
    """Where any of a parameter's addresses is no multiple of 16 bytes, a GPU cannot move 16 at a time."""

    def aside(t: Tensor) -> Tensor:
        memory = torch.empty(t.numel() + 1, dtype=t.dtype, device=t.device)[1:]
        return memory.view(t.shape).copy_(t)

    params, expected = random_params(), random_params()
    if shifted == "parameter":
        params = [aside(p) for p in params]
    (step, state), (other_step, other_state) = stepper(kernel, params), stepper(kernel, expected)
    for seed in range(3):
        gradients = random_gradients(expected, seed)
        assert other_step(gradients)
        assert step([[aside(g) for g in column] if shifted == "gradient" else column for column in gradients])
        if shifted == "state":
            for column in state:
                # In place, because the step holds the lists. (Counts are numbers.)
                column[:] = [aside(t) for t in column]
    assert_same_bits(values(params, state), values(expected, other_state))


@pytest.mark.parametrize("kernel", KERNELS)
def test_autograd_is_told(kernel: str) -> None:
    params = random_params()
    step, state = stepper(kernel, params)
    for seed in range(2):
        before = [t._version for t in chain(params, *state) if t is not None]
        assert step(random_gradients(params, seed))
        assert seed == 0 or all(t._version > v for t, v in zip(chain(params, *state), before, strict=True))


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_captured_step_has_tables_of_its_own(kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is captured here, but the path is the one taken then: a step that was not warmed up is refused; what was
    handed to a graph is not handed out again; and where there is no more room, torch takes the step.
    """
    monkeypatch.setattr(multi_tensor, "_known", {})
    monkeypatch.setattr(multi_tensor, "_pinned", multi_tensor._Pinned())
    capturing = [True]
    monkeypatch.setattr(multi_tensor, "_capturing", lambda device: capturing[0])
    params, expected = random_params(), random_params()
    (step, state), (other_step, other_state) = stepper(kernel, params), stepper(kernel, expected)
    assert not step(random_gradients(params, 0))
    assert_same_bits(params, random_params())
    capturing[0] = False
    for seed in range(2):
        assert other_step(random_gradients(params, seed))
    assert step(random_gradients(params, 0))
    capturing[0] = True
    room, known = multi_tensor._pinned.room, dict(multi_tensor._known)
    multi_tensor._known.clear()
    assert not step(random_gradients(params, 1))
    multi_tensor._known.update(known)
    assert step(random_gradients(params, 1))
    assert_same_bits(values(params, state), values(expected, other_state))
    words = room - multi_tensor._pinned.room
    kept = [t.clone() for t in multi_tensor._pinned._used]
    assert step(random_gradients(params, 2))
    assert_same_bits(multi_tensor._pinned._used[: len(kept)], kept)
    monkeypatch.setattr(multi_tensor._pinned, "_free", multi_tensor._pinned._free[: words - 1])
    before = values(params, state)
    assert not step(random_gradients(params, 3))
    assert_same_bits(values(params, state), before)


@pytest.mark.cuda
@pytest.mark.parametrize("kernel", KERNELS)
def test_a_captured_step_is_the_step(kernel: str) -> None:
    params, expected = random_params(), random_params()
    (step, state), (other_step, other_state) = stepper(kernel, params), stepper(kernel, expected)
    gradients = random_gradients(params, 0)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        assert step(gradients)
    torch.cuda.current_stream().wait_stream(stream)
    assert other_step(gradients)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        assert step(gradients)
    for seed in range(1, 4):
        fresh = random_gradients(params, seed)
        for g, new in zip(chain(*gradients), chain(*fresh), strict=True):
            g.copy_(new)
        graph.replay()
        # Tables of other tensors in between, in whatever memory is free.
        step_of_others, _ = stepper(kernel, random_params())
        assert step_of_others(fresh)
        assert other_step(fresh)
    assert_same_bits(values(params, state), values(expected, other_state))


# ---------------------------------------------------------------- inside the optimizer


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[torch.dtype]:
    """The dtype of every launch of a kernel, one by one; those that only try whether it can be started left out."""
    seen: list[torch.dtype] = []
    run = multi_tensor.Launch.run

    def spy(self: multi_tensor.Launch, *args: Any) -> None:
        seen.append(self.params[0].dtype)
        run(self, *args)

    monkeypatch.setattr(multi_tensor.Launch, "run", spy)
    return seen


@pytest.mark.parametrize(
    "flags", [{}, {"weight_decay": 0.01, "gain": "matched"}, {"nesterov": True}, {"lr": torch.tensor(0.05)}], ids=str
)
def test_fused_is_one_launch_per_step(launches: list[torch.dtype], flags: dict[str, Any]) -> None:
    """Plain steps, which are torch's, in between: both keep the same buffers."""
    models = [student().to(DEVICE) for _ in range(2)]
    xs = [x.to(DEVICE) for x in batches(4)]
    for model, how in zip(models, ({"fused": True}, {"foreach": False}), strict=True):
        optimizer: Any = DOTSGD(model.parameters(), **{"lr": 0.05, "maximize": False} | how | flags)
        train(optimizer, model, xs)
        train(optimizer, model, xs[:1], plain=True)
        train(optimizer, model, xs)
    assert launches == [torch.float32] * 8
    torch.testing.assert_close(flat(models[0].parameters()), flat(models[1].parameters()), rtol=1e-5, atol=1e-6)


def test_one_launch_per_dtype(launches: list[torch.dtype]) -> None:
    params = [
        nn.Parameter(torch.ones(i % 5 + 1, device=DEVICE, dtype=d))
        for i in range(30)
        for d in (torch.float32, torch.bfloat16)
    ]
    wide = torch.cat([p.float() for p in params])
    DOTSGD(params, lr=0.1, fused=True).step([wide.sum(), wide.square().sum()])
    assert sorted(map(str, launches)) == ["torch.bfloat16", "torch.float32"]
    assert all(p[0].item() == pytest.approx(1 - 0.1 * (1 + 2), rel=1e-2) for p in params)


def test_a_stepped_parameter_in_a_kept_graph_is_noticed(launches: list[torch.dtype]) -> None:
    p = nn.Parameter(torch.ones(3, device=DEVICE))
    kept = p.square().sum()
    optimizer = DOTSGD([p], lr=0.1, fused=True)
    optimizer.step([p.sum(), p.square().sum()])
    assert launches
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        kept.backward()
    buffers = [optimizer.state[p][key] for key in ("momentum_buffer", "momentum_buffer/distill")]
    before = [b._version for b in buffers]
    optimizer.zero_grad()
    optimizer.step([p.sum(), p.square().sum()])
    assert all(b._version > v for b, v in zip(buffers, before, strict=True))


def test_tables_are_copied_when_something_has_moved() -> None:
    p = torch.ones(5, device=DEVICE)
    g = [torch.ones(5, device=DEVICE) for _ in range(3)]
    buffers: list[list[Any]] = [[None]]
    chosen = options(1, {"momentum": 0.5})

    def misses(grad: Tensor) -> int:
        before = multi_tensor._there.cache_info().misses
        triton_dot_sgd.dot_sgd([p], [[grad]], buffers, **chosen)
        return multi_tensor._there.cache_info().misses - before

    multi_tensor._there.cache_clear()
    # Addresses, sizes and hyperparameters; the buffer is no longer new; nothing; another gradient; a known one.
    assert [misses(g[0]), misses(g[0]), misses(g[0]), misses(g[1]), misses(g[0])] == [3, 1, 0, 1, 0]
    chosen["lr"] = 0.2
    assert misses(g[0]) == 1


def gaps() -> Tensor:
    return torch.ones(4, 6, device=DEVICE)[:, :3]


@pytest.mark.parametrize(
    "case",
    ["gaps", "other strides", "another shape", "a buffer of another size", "a buffer of another dtype", "complex",
     "integer", "bfloat16 gradients", "weight decay in a tensor", "lr that is recorded", "lr of two elements", "sparse",
     "sparse rows", "the other sign", "no triton", "other device"],
)  # fmt: skip
def test_what_the_kernel_cannot_take_is_left_to_torch(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    p, g = torch.ones(4, 3, device=DEVICE), torch.ones(4, 3, device=DEVICE)
    buffer: Tensor | None = None
    chosen = options(1, {})
    if case == "gaps":
        p, g = gaps(), gaps()
    elif case == "other strides":
        g = torch.ones(3, 4, device=DEVICE).t()
    elif case == "another shape":
        g = torch.ones(4, 4, device=DEVICE)
    elif case == "a buffer of another size":
        buffer = torch.ones(4, 4, device=DEVICE)
    elif case == "a buffer of another dtype":
        buffer = torch.ones(4, 3, device=DEVICE, dtype=torch.float64)
    elif case == "complex":
        p, g = p.to(torch.complex64), g.to(torch.complex64)
    elif case == "integer":
        p, g = p.int(), g.int()
    elif case == "bfloat16 gradients":
        g = g.bfloat16()
    elif case == "weight decay in a tensor":
        chosen["weight_decay"] = torch.tensor(0.1)
    elif case == "lr that is recorded":
        chosen["lr"] = torch.tensor(0.1, requires_grad=True)
    elif case == "lr of two elements":
        chosen["lr"] = torch.tensor([0.1, 0.2])
    elif case == "sparse":
        g = g.to_sparse()
    elif case == "sparse rows":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch calls them a beta
            g = g.to_sparse_csr()
    elif case == "the other sign":
        p, g = p[0, 0], torch.ones((), dtype=torch.complex64, device=DEVICE).conj().imag
        assert g.is_neg()
    elif case == "no triton":
        monkeypatch.setattr(multi_tensor, "_runs", lambda *variant: False)
    elif case == "other device":
        monkeypatch.setattr(multi_tensor, "_DEVICES", frozenset({"xpu"}))
    before, buffers = p.clone(), [[buffer]]
    assert not triton_dot_sgd.dot_sgd([p], [[g]], buffers, **chosen)
    assert torch.equal(p, before)
    assert buffers[0][0] is buffer


def test_one_tensor_that_it_cannot_take_stops_the_whole_step() -> None:
    """Also where another dtype, which goes first, could be taken."""
    params = [torch.ones(3, device=DEVICE), torch.ones(3, device=DEVICE, dtype=torch.float64), gaps()]
    buffers: list[list[Any]] = [[None] * 3]
    assert not triton_dot_sgd.dot_sgd(params, [[torch.ones_like(p) for p in params]], buffers, **options(1, {}))
    assert all(p.eq(1).all() for p in params)
    assert buffers == [[None] * 3]


@pytest.mark.parametrize("change", ["data", "another dtype", "transposed in place", "smaller in place", "buffer"])
def test_a_tensor_may_change_between_two_steps(change: str) -> None:
    """The kernel follows, or leaves the step to torch; it never takes the tensor for what it was."""
    p, g = torch.ones(4, 4, device=DEVICE), torch.ones(4, 4, device=DEVICE)
    buffers: list[list[Any]] = [[None]]
    taken: Any = partial(triton_dot_sgd.dot_sgd, [p], buffers=buffers, **options(1, {"lr": 1.0}))
    assert taken([[g]])
    if change == "data":
        p.data = torch.full((4, 4), 7.0, device=DEVICE)
        assert taken([[g]])
        torch.testing.assert_close(p, torch.full_like(p, 7 - 1.9))
    elif change == "another dtype":
        p.data = p.data.double()
        assert not taken([[g]])
        buffers[0][0] = buffers[0][0].double()
        assert taken([[g.double()]])
        assert p.eq(-1.9).all()
    elif change == "transposed in place":
        p.data = p.data.t()
        assert not taken([[g]])
    elif change == "smaller in place":
        memory = p.data
        p.data = memory[:2]
        buffers[0][0] = buffers[0][0][:2]
        assert taken([[g[:2]]])
        assert memory[2:].eq(0).all()
        assert p.eq(-1.9).all()
    else:
        buffers[0][0] = torch.full_like(g, 2)
        assert taken([[g]])
        torch.testing.assert_close(p, torch.full_like(p, -2.8))


def test_a_kernel_that_cannot_be_built_is_left_to_torch_with_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("no C compiler")

    monkeypatch.setattr(multi_tensor, "_start", fails)
    monkeypatch.setattr(multi_tensor, "_known", {})
    p = nn.Parameter(torch.ones(3, device=DEVICE))
    with pytest.warns(UserWarning, match="no C compiler"):
        DOTSGD([p], lr=0.1, fused=True).step([p.sum(), p.square().sum()])
    assert p[0].item() == pytest.approx(0.7)


def test_sharded_parameters() -> None:
    """Every process updates what it holds; stand-ins for the other processes, of which nothing is asked."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
    from torch.testing._internal.distributed.fake_pg import FakeStore

    torch.distributed.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    try:
        mesh = init_device_mesh(DEVICE, (2,))

        def sharded(part: Tensor, placement: Any = Shard(0)) -> Any:  # noqa: B008  # never changed
            return DTensor.from_local(part.to(DEVICE), mesh, [placement], run_check=False)

        ours = [torch.randn(3, 4), torch.randn(7)]
        theirs = [p.clone() for p in ours]
        params = [sharded(p.clone()) for p in ours]
        buffers: list[list[Any]] = [[None, None], [None, None]]
        their_buffers: list[list[Any]] = [[None, None], [None, None]]
        for _ in range(2):
            gradients = [[torch.randn_like(p) for p in ours] for _ in range(2)]
            there: list[list[Any]] = [[sharded(g) for g in column] for column in gradients]
            assert not triton_dot_sgd.dot_sgd(params, gradients, buffers, **options(2, {}))
            for placement in Replicate(), Partial():
                cut = [[sharded(g, placement) for g in column] for column in gradients]
                assert not triton_dot_sgd.dot_sgd(params, cut, buffers, **options(2, {}))
            assert triton_dot_sgd.dot_sgd(params, there, buffers, **options(2, {}))
            dot_sgd(theirs, gradients, their_buffers, **options(2, {}), foreach=False, fused=False)
        for mine, yours in zip([*params, *chain(*buffers)], [*theirs, *chain(*their_buffers)], strict=True):
            assert isinstance(mine, DTensor)
            torch.testing.assert_close(mine.to_local().cpu(), yours, rtol=1e-5, atol=1e-6)
        assert params[0]._version >= 2
    finally:
        torch.distributed.destroy_process_group()


# ---------------------------------------------------------------- what a GPU would run

COMPILE = r"""
import re
from triton import compile
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from distill_optim.update import kernels

for name in "dot_sgd", "dot_adamw", "weighted_sgd", "weighted_adamw":
    for dtype in "float32", "bfloat16", "float64":
        kernel = getattr(kernels, name)
        assert all(p.do_not_specialize or p.is_constexpr for p in kernel.params)
        stored, computed = kernels.PRECISION[dtype]
        kind = dict.fromkeys(kernel.arg_names, "constexpr")
        kind |= {"table": "*i64", "tensors": "i32", "places": "*i64", "numbers": "*fp64", "weights": "*fp64"}
        constants = dict(
            lr=None, grad_scale=None, found_inf=None, K=2, DTYPE=stored, COMPUTE=computed, BLOCK=kernels.BLOCK
        )
        built = compile(
            ASTSource(kernel, kind, constexprs=constants), target=GPUTarget("cuda", 90, 32), options=kernels.OPTIONS
        )
        whole, partly = built.asm["ttgir"].split("} else {")
        assert "convert_layout" not in whole
        for what in "ld", "st":
            print(name, dtype, what, len(re.findall(what + r"\.global\.v[24]\.b(?:32|64)", built.asm["ptx"])))
"""


# Read and written for two losses.
WORDS = {"dot_sgd": (5, 3), "dot_adamw": (7, 5), "weighted_sgd": (4, 2), "weighted_adamw": (6, 4)}


@pytest.mark.skipif(sys.platform != "linux", reason="needs the compiler in Triton's wheel, which is for Linux")
def test_the_compiled_kernels_move_each_word_once_and_16_bytes_at_a_time() -> None:
    """Compiled for a GPU that need not be there, for two losses. AdamW's include the maximum, which it moves only if
    there is one.
    """
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", COMPILE], env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    per_thread = BLOCK // (32 * kernels.OPTIONS["num_warps"])
    counts = {tuple(line.split()[:3]): int(line.split()[3]) for line in done.stdout.splitlines()}
    for (name, dtype, what), count in counts.items():
        assert count == WORDS[name][what == "st"] * per_thread * getattr(torch, dtype).itemsize // 16, (
            name,
            dtype,
            what,
        )
    assert len(counts) == 6 * len(WORDS)


@pytest.mark.cuda
@pytest.mark.parametrize("lr", [0.01, "tensor"])
def test_the_kernel_waits_for_no_gpu(launches: list[torch.dtype], lr: Any) -> None:
    model = student().cuda()
    rate = torch.tensor(0.01, device="cuda") if lr == "tensor" else lr
    optimizer = DOTSGD(model.parameters(), lr=rate, fused=True)
    xs = [x.cuda() for x in batches(4)]
    train(optimizer, model, xs)
    with no_waiting():
        for x in xs:
            optimizer.zero_grad()
            optimizer.step(two_losses(model, x))
            if lr != "tensor":
                optimizer.param_groups[0]["lr"] *= 0.9
    assert len(launches) == 8


@pytest.mark.cuda
def test_the_number_of_launches_does_not_grow_with_the_number_of_tensors() -> None:
    from torch.profiler import ProfilerActivity, profile

    def kernels_of(n: int) -> int:
        params = [torch.randn(i % 100 + 1, device="cuda") for i in range(n)]
        gradients: list[list[Any]] = [[torch.randn_like(p) for p in params] for _ in range(2)]
        buffers: list[list[Any]] = [[None] * n for _ in range(2)]
        for _ in range(2):
            triton_dot_sgd.dot_sgd(params, gradients, buffers, **options(2, {}))
        torch.cuda.synchronize()
        with profile(activities=[ProfilerActivity.CUDA]) as profiled:
            triton_dot_sgd.dot_sgd(params, gradients, buffers, **options(2, {}))
            torch.cuda.synchronize()
        return sum("dot_sgd" in event.name for event in profiled.events() or [])

    assert kernels_of(50) == kernels_of(1600) == 1


@pytest.mark.cuda
@pytest.mark.parametrize("cls", [DOTAdamW, MoKDAdamW, MoKDSGD])
def test_the_other_kernels_wait_for_no_gpu(cls: Any, launches: list[torch.dtype]) -> None:
    model = student().cuda()
    optimizer = cls(model.parameters(), lr=0.01, fused=True)
    xs = [x.cuda() for x in batches(4)]
    train(optimizer, model, xs)
    with no_waiting():
        train(optimizer, model, xs)
    assert len(launches) == 8


class Heads(nn.Module):
    """A trunk that both losses reach, a head for each, and a layer that none does."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.trunk, self.idle = nn.Linear(6, 5), nn.Linear(1, 1)
        self.heads = nn.ModuleList([nn.Linear(5, 2) for _ in range(2)])

    def forward(self, x: Tensor) -> list[Tensor]:
        hidden = self.trunk(x).tanh()
        return [head(hidden).square().mean() for head in self.heads]


@pytest.mark.parametrize(
    ("cls", "flags"),
    [
        (MoKDSGD, {"momentum": 0.9, "dampening": 0.2, "weight_decay": 0.1}),
        (MoKDSGD, {"momentum": 0.9, "nesterov": True, "maximize": True}),
        (MoKDSGD, {}),
        (MoKDAdamW, {"weight_decay": 0.1}),
        (MoKDAdamW, {"amsgrad": True, "maximize": True}),
    ],
)
def test_mokd_combines_and_updates_in_one_kernel(cls: Any, flags: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two groups, parameters of both losses, of one, and of none; the combined gradient is never formed."""
    models, optimizers = [], []
    for path in {"foreach": False}, {"fused": True}:
        model = Heads().to(DEVICE)
        others = [*model.heads.parameters(), *model.idle.parameters()]
        groups = [{"params": list(model.trunk.parameters())}, {"params": others, "lr": 0.02}]
        models.append(model)
        optimizers.append(cls(groups, lr=0.05, **flags, **path))
    for x in batches(5):
        optimizers[0].zero_grad()
        optimizers[0].step(models[0](x.to(DEVICE)))
    with monkeypatch.context() as forbidden:
        forbidden.setattr("distill_optim.mokd.weighted_sum", None)
        forbidden.setattr(cls, "_base_step", None)
        # The layer that no loss reaches is left to torch, which has nothing to do for it.
        forbidden.setattr(cls, "_step_along", lambda self, gradients: None)
        for x in batches(5):
            optimizers[1].zero_grad()
            optimizers[1].step(models[1](x.to(DEVICE)))
    theirs, ours = (flat([*m.parameters(), *m.trunk.parameters()]) for m in models)
    if cls is MoKDSGD and not ON_GPU:
        assert torch.equal(ours, theirs)
    else:
        # Adam's quotients are rounded in another order.
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)
    states = [o.state_dict()["state"] for o in optimizers]
    assert states[0].keys() == states[1].keys()
    assert all(states[0][n].keys() == states[1][n].keys() for n in states[0])


@pytest.mark.parametrize(
    "flags",
    [{"weight_decay": 0.1}, {"amsgrad": True, "maximize": True}, {"lr": torch.tensor(0.05)}, {"delta": 0.0}],
    ids=str,
)
def test_dot_adamw_is_one_launch_per_group_and_step(flags: dict[str, Any], launches: list[torch.dtype]) -> None:
    """Two groups, parameters of both losses, of one, and of none, which have no ``.grad``; plain steps in between."""
    models, optimizers = [], []
    for path in {"foreach": False}, {"fused": True}:
        model = Heads().to(DEVICE)
        others = [*model.heads.parameters(), *model.idle.parameters()]
        groups: list[dict[str, Any]] = [
            {"params": list(model.trunk.parameters())},
            {"params": others, "lr": 0.02},
        ]
        models.append(model)
        options: dict[str, Any] = {"lr": 0.05, **flags, **path}
        optimizers.append(DOTAdamW(groups, **options))
    for x in batches(5):
        for model, optimizer in zip(models, optimizers, strict=True):
            optimizer.zero_grad()
            optimizer.step(model(x.to(DEVICE)))
            optimizer.zero_grad()
            sum(model(x.to(DEVICE))).backward()
            optimizer.step()
    assert len(launches) == 2 * 5
    theirs, ours = (flat(m.parameters()) for m in models)
    # Some gradients of the two losses cancel out: see agreeing().
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=5e-6)
    states = [o.state_dict()["state"] for o in optimizers]
    assert states[0].keys() == states[1].keys()
    assert all(states[0][n].keys() == states[1][n].keys() for n in states[0])


@pytest.mark.parametrize("cls", [DOTAdamW, MoKDSGD, MoKDAdamW])
def test_a_grad_that_somebody_put_where_no_loss_reaches_is_left_out_of_a_kernel_too(cls: Any) -> None:
    """Between two parameters of its size, whose state could be taken for its own."""
    results = []
    for path in {"foreach": False}, {"fused": True}:
        params = [nn.Parameter(torch.full((4,), float(n), device=DEVICE)) for n in range(3)]
        optimizer = cls(params, lr=0.05, **path)
        for _ in range(3):
            optimizer.zero_grad()
            optimizer.backward([(params[0] * params[2] + 1).sum(), (params[0] - params[2]).square().sum()])
            params[1].grad = torch.ones_like(params[1])
            optimizer.step()
        results.append(flat(params))
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-7)
