"""Kernels in Triton: the only module that imports it, so it is imported when a kernel is first used.

A program updates one chunk of one parameter; ``multi_tensor.py`` has the tables that say which, and where everything
lies. Products and sums are rounded where torch's for-loop rounds them: its ``a + alpha * b`` is one fused multiply-add,
and the compiler must fuse no others. Half precision is computed in float32.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

# Elements that one program updates: a few 16-byte loads per thread and tensor, and no loop.
BLOCK = 2048
OPTIONS: dict[str, Any] = {"num_warps": 8, "enable_fp_fusion": False}

PRECISION: dict[str, tuple[Any, Any]] = {
    "float16": (tl.float16, tl.float32),
    "bfloat16": (tl.bfloat16, tl.float32),
    "float32": (tl.float32, tl.float32),
    "float64": (tl.float64, tl.float64),
}

# Kernels are not compiled anew for a number that happens to be 1, or an address that happens to be a multiple of 16:
# what has run once can run in a CUDA graph's capture, when nothing can be loaded.
_kernel = triton.jit(
    do_not_specialize=["table", "tensors", "places", "numbers", "lr", "weights", "grad_scale", "found_inf"]
)


# ---------------------------------------------------------------- where everything lies


@triton.jit
def _chunk(table, tensors, places, found_inf, ADDRESSES: tl.constexpr, BLOCK: tl.constexpr):
    """This program's column of the table, the first element of its chunk, the size of the parameter, and whether the
    chunk is full and the addresses are multiples of 16: what a table says, the compiler cannot know.
    """
    place = tl.load(places + tl.program_id(0))
    # Rows of a number per tensor: size, the parameter's address, other addresses, and what else a kernel needs.
    column = table + (place & 0xFFFFFFFF)
    start = (place >> 32) * BLOCK
    size = tl.load(column)
    if found_inf is not None:
        size = tl.where(tl.load(found_inf) == 0, size, 0)  # nothing is read or written
    bits = tl.load(column + tensors)
    for i in tl.static_range(1, ADDRESSES):
        bits |= tl.load(column + (1 + i) * tensors)
    return column, start, size, (start + BLOCK <= size) & (bits % 16 == 0)


@triton.jit
def _inside(at, size, WHOLE: tl.constexpr):
    return tl.full(at.shape, 1, tl.int1) if WHOLE else at < size


@triton.jit
def _pointers(address, at, DTYPE: tl.constexpr, WHOLE: tl.constexpr):
    pointers = address.to(tl.pointer_type(DTYPE)) + at
    return tl.multiple_of(pointers, [16]) if WHOLE else pointers


@triton.jit
def _read(address, at, mask, DTYPE: tl.constexpr, COMPUTE: tl.constexpr, WHOLE: tl.constexpr):
    return tl.load(_pointers(address, at, DTYPE, WHOLE), mask=mask, other=0).to(COMPUTE)


@triton.jit
def _write(address, at, value, mask, DTYPE: tl.constexpr, WHOLE: tl.constexpr):
    tl.store(_pointers(address, at, DTYPE, WHOLE), value.to(DTYPE), mask=mask)


@triton.jit
def _reach(column, tensors, K: tl.constexpr):
    """How many losses reach the parameter: where one does not, its gradient has no address."""
    reach = 0
    for i in tl.static_range(K):
        reach += (tl.load(column + (2 + i) * tensors) != 0).to(tl.int32)
    return reach


# ---------------------------------------------------------------- equations


@triton.jit
def _divided(a, b):
    # In float32 Triton's own quotient may be two units off.
    return tl.div_rn(a, b) if a.dtype == tl.float32 else a / b


@triton.jit
def _gradient(address, at, inside, grad_scale, sign, DTYPE: tl.constexpr, COMPUTE: tl.constexpr, WHOLE: tl.constexpr):
    """A loss's gradient, zero where there is none: unscaled, and negative to maximize."""
    g = _read(address, at, inside & (address != 0), DTYPE, COMPUTE, WHOLE)
    if grad_scale is not None:
        g = _divided(g, tl.load(grad_scale).to(COMPUTE))
    return g * sign


@triton.jit
def _weighted(
    column, tensors, at, inside, weights, grad_scale, sign,
    K: tl.constexpr, DTYPE: tl.constexpr, COMPUTE: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """g = sum of w_i g_i over the losses that reach the parameter; a single one's gradient as it is."""
    shared = _reach(column, tensors, K) > 1
    total = tl.zeros(at.shape, COMPUTE)
    for i in tl.static_range(K):
        address = tl.load(column + (2 + i) * tensors)
        weight = tl.where(shared, tl.load(weights + i).to(COMPUTE), 1.0)
        # A weight that is not finite does no harm where there is no gradient.
        weight = tl.where(address != 0, weight, 0.0).to(COMPUTE)
        total += weight * _gradient(address, at, inside, grad_scale, sign, DTYPE, COMPUTE, WHOLE)
    return total


@triton.jit
def _sgd(
    theta, g, v_address, fresh, at, inside, numbers, momentum, weight_decay, rate,
    DTYPE: tl.constexpr, COMPUTE: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """The parameter after a step of ``torch.optim.SGD`` along one gradient; its buffer is written."""
    undamped = tl.load(numbers + 3).to(COMPUTE)
    nesterov = tl.load(numbers + 4) != 0
    remembers = (v_address != 0) & (momentum != 0)  # without momentum torch leaves buffers alone
    g = tl.where(weight_decay != 0, tl.fma(theta, weight_decay, g), g)
    # v <- mu v + (1 - tau) g; the first buffer is the gradient.
    v = _read(v_address, at, inside & remembers & (fresh == 0), DTYPE, COMPUTE, WHOLE)
    v = tl.where(fresh != 0, g, tl.fma(g, undamped, momentum * v))
    _write(v_address, at, v, inside & remembers, DTYPE, WHOLE)
    moved = tl.where(nesterov, tl.fma(v, momentum, g), v)
    return tl.fma(tl.where(remembers, moved, g), rate, theta)


@triton.jit
def _corrected(beta, count):
    """1 - beta^t, in float64 as on the host: in float32 1 - 0.999^t has four digits at first."""
    return 1 - tl.exp(count.to(tl.float64) * tl.log(beta))


@triton.jit
def _mean(m, g, beta, COMPUTE: tl.constexpr):
    """m <- m + (1 - beta)(g - m), from whichever end is nearer, as torch's lerp."""
    return tl.where(beta > 0.5, tl.fma(g - m, (1 - beta).to(COMPUTE), m), tl.fma(m - g, beta.to(COMPUTE), g))


@triton.jit
def _below(
    v_address, max_address, g, count, at, inside, numbers,
    DTYPE: tl.constexpr, COMPUTE: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """AdamW's denominator after a step along one gradient; the second moment, and the maximum of it, are written."""
    beta2 = tl.load(numbers + 4)
    # v <- beta2 v + (1 - beta2) g^2
    v = _read(v_address, at, inside, DTYPE, COMPUTE, WHOLE)
    v = beta2.to(COMPUTE) * v + (1 - beta2).to(COMPUTE) * g * g
    _write(v_address, at, v, inside, DTYPE, WHOLE)
    # amsgrad: the largest v so far
    largest = _read(max_address, at, inside & (max_address != 0), DTYPE, COMPUTE, WHOLE)
    v = tl.where(max_address != 0, tl.maximum(largest, v, propagate_nan=tl.PropagateNan.ALL), v)
    _write(max_address, at, v, inside & (max_address != 0), DTYPE, WHOLE)
    # sqrt(v / (1 - beta2^t)) + eps
    root = tl.sqrt_rn(v) if v.dtype == tl.float32 else tl.sqrt(v)
    return _divided(root, tl.sqrt(_corrected(beta2, count)).to(COMPUTE)) + tl.load(numbers + 5).to(COMPUTE)


# ---------------------------------------------------------------- DOT


@_kernel
def dot_sgd(
    table, tensors, places, numbers, lr, weights, grad_scale, found_inf,
    K: tl.constexpr, DTYPE: tl.constexpr, COMPUTE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One SGD per loss, one after the other. Rows: K gradients, K buffers; whether each buffer is new."""
    column, start, size, whole = _chunk(table, tensors, places, found_inf, 1 + 2 * K, BLOCK)
    if whole:
        _dot_sgd(column, tensors, start, size, numbers, lr, grad_scale, K, DTYPE, COMPUTE, BLOCK, True)
    else:
        _dot_sgd(column, tensors, start, size, numbers, lr, grad_scale, K, DTYPE, COMPUTE, BLOCK, False)


@triton.jit
def _dot_sgd(
    column, tensors, start, size, numbers, lr, grad_scale,
    K: tl.constexpr, DTYPE: tl.constexpr, COMPUTE: tl.constexpr, BLOCK: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    at = start + tl.arange(0, BLOCK)
    inside = _inside(at, size, WHOLE)
    sign = tl.load(numbers + 1).to(COMPUTE)
    # In float64 until the gain is in, as on the host.
    rate = -(tl.load(numbers) if lr is None else tl.load(lr).to(tl.float64))
    shared = _reach(column, tensors, K) > 1
    weight_decay = tl.load(numbers + 2).to(COMPUTE)
    theta = _read(tl.load(column + tensors), at, inside, DTYPE, COMPUTE, WHOLE)
    for i in tl.static_range(K):
        address = tl.load(column + (2 + i) * tensors)
        reaches = address != 0
        momentum = tl.load(numbers + tl.where(shared, 6 + i, 5)).to(COMPUTE)
        gain = tl.where(shared, tl.load(numbers + 6 + K + i), 1.0)
        g = _gradient(address, at, inside, grad_scale, sign, DTYPE, COMPUTE, WHOLE)
        stepped = _sgd(
            theta, g, tl.where(reaches, tl.load(column + (2 + K + i) * tensors), 0),
            tl.load(column + (2 + 2 * K + i) * tensors), at, inside, numbers,
            momentum, weight_decay, (rate * gain).to(COMPUTE), DTYPE, COMPUTE, WHOLE,
        )  # fmt: skip
        weight_decay = tl.where(reaches, 0.0, weight_decay)  # it joins the first loss
        # Rounded to the parameter's precision before the next loss, as by one optimizer after the other.
        theta = tl.where(reaches, stepped, theta).to(DTYPE).to(COMPUTE)
    _write(tl.load(column + tensors), at, theta, inside, DTYPE, WHOLE)


@_kernel
def dot_adamw(
    table, tensors, places, numbers, lr, weights, grad_scale, found_inf,
    K: tl.constexpr, DTYPE: tl.constexpr, COMPUTE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """AdamW with a first moment per loss. Rows: K gradients, K first moments, the second, its maximum; the address of
    the step count.
    """
    column, start, size, whole = _chunk(table, tensors, places, found_inf, 3 + 2 * K, BLOCK)
    if whole:
        _dot_adamw(column, tensors, start, size, numbers, lr, grad_scale, K, DTYPE, COMPUTE, BLOCK, True)
    else:
        _dot_adamw(column, tensors, start, size, numbers, lr, grad_scale, K, DTYPE, COMPUTE, BLOCK, False)


@triton.jit
def _dot_adamw(
    column, tensors, start, size, numbers, lr, grad_scale,
    K: tl.constexpr, DTYPE: tl.constexpr, COMPUTE: tl.constexpr, BLOCK: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    at = start + tl.arange(0, BLOCK)
    inside = _inside(at, size, WHOLE)
    sign = tl.load(numbers + 1).to(COMPUTE)
    rate = tl.load(numbers) if lr is None else tl.load(lr).to(tl.float64)
    count = tl.load(tl.load(column + (4 + 2 * K) * tensors).to(tl.pointer_type(tl.float32)), mask=size > 0, other=1)
    shared = _reach(column, tensors, K) > 1
    summed = tl.zeros(at.shape, COMPUTE)
    along = tl.zeros(at.shape, COMPUTE)
    for i in tl.static_range(K):
        address = tl.load(column + (2 + i) * tensors)
        reaches = address != 0
        beta1 = tl.load(numbers + tl.where(reaches & (shared == 0), 3, 6 + i))
        g = _gradient(address, at, inside, grad_scale, sign, DTYPE, COMPUTE, WHOLE)
        # A missing gradient is a zero.
        summed += g
        m_address = tl.load(column + (2 + K + i) * tensors)
        m = _read(m_address, at, inside, DTYPE, COMPUTE, WHOLE)
        m = tl.where(reaches, _mean(m, g, beta1, COMPUTE), m * beta1.to(COMPUTE))
        _write(m_address, at, m, inside, DTYPE, WHOLE)
        along += (-rate / _corrected(beta1, count)).to(COMPUTE) * m
    below = _below(
        tl.load(column + (2 + 2 * K) * tensors), tl.load(column + (3 + 2 * K) * tensors), summed, count, at, inside,
        numbers, DTYPE, COMPUTE, WHOLE,
    )  # fmt: skip
    # theta <- (1 - lr lambda) theta - lr sum of m_i / (1 - beta1_i^t) / (sqrt(v / (1 - beta2^t)) + eps)
    theta = _read(tl.load(column + tensors), at, inside, DTYPE, COMPUTE, WHOLE)
    theta = theta * (1 - rate * tl.load(numbers + 2)).to(COMPUTE)
    theta += _divided(along, below)
    _write(tl.load(column + tensors), at, theta, inside, DTYPE, WHOLE)


# ---------------------------------------------------------------- one gradient, the weighted sum


@_kernel
def weighted_sgd(
    table, tensors, places, numbers, lr, weights, grad_scale, found_inf,
    K: tl.constexpr, DTYPE: tl.constexpr, COMPUTE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """SGD. Rows: K gradients, the buffer; whether it is new."""
    column, start, size, whole = _chunk(table, tensors, places, found_inf, 2 + K, BLOCK)
    if whole:
        _weighted_sgd(column, tensors, start, size, numbers, lr, weights, grad_scale, K, DTYPE, COMPUTE, BLOCK, True)
    else:
        _weighted_sgd(column, tensors, start, size, numbers, lr, weights, grad_scale, K, DTYPE, COMPUTE, BLOCK, False)


@triton.jit
def _weighted_sgd(
    column, tensors, start, size, numbers, lr, weights, grad_scale,
    K: tl.constexpr, DTYPE: tl.constexpr, COMPUTE: tl.constexpr, BLOCK: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    at = start + tl.arange(0, BLOCK)
    inside = _inside(at, size, WHOLE)
    sign = tl.load(numbers + 1).to(COMPUTE)
    rate = -(tl.load(numbers) if lr is None else tl.load(lr).to(tl.float64))
    g = _weighted(column, tensors, at, inside, weights, grad_scale, sign, K, DTYPE, COMPUTE, WHOLE)
    theta = _read(tl.load(column + tensors), at, inside, DTYPE, COMPUTE, WHOLE)
    theta = _sgd(
        theta, g, tl.load(column + (2 + K) * tensors), tl.load(column + (3 + K) * tensors), at, inside,
        numbers, tl.load(numbers + 5).to(COMPUTE), tl.load(numbers + 2).to(COMPUTE), rate.to(COMPUTE),
        DTYPE, COMPUTE, WHOLE,
    )  # fmt: skip
    _write(tl.load(column + tensors), at, theta, inside, DTYPE, WHOLE)


@_kernel
def weighted_adamw(
    table, tensors, places, numbers, lr, weights, grad_scale, found_inf,
    K: tl.constexpr, DTYPE: tl.constexpr, COMPUTE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """AdamW. Rows: K gradients, both moments, the maximum of the second; the address of the step count."""
    column, start, size, whole = _chunk(table, tensors, places, found_inf, 4 + K, BLOCK)
    if whole:
        _weighted_adamw(column, tensors, start, size, numbers, lr, weights, grad_scale, K, DTYPE, COMPUTE, BLOCK, True)
    else:
        _weighted_adamw(column, tensors, start, size, numbers, lr, weights, grad_scale, K, DTYPE, COMPUTE, BLOCK, False)


@triton.jit
def _weighted_adamw(
    column, tensors, start, size, numbers, lr, weights, grad_scale,
    K: tl.constexpr, DTYPE: tl.constexpr, COMPUTE: tl.constexpr, BLOCK: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    at = start + tl.arange(0, BLOCK)
    inside = _inside(at, size, WHOLE)
    sign = tl.load(numbers + 1).to(COMPUTE)
    rate = tl.load(numbers) if lr is None else tl.load(lr).to(tl.float64)
    beta1 = tl.load(numbers + 3)
    count = tl.load(tl.load(column + (5 + K) * tensors).to(tl.pointer_type(tl.float32)), mask=size > 0, other=1)

    g = _weighted(column, tensors, at, inside, weights, grad_scale, sign, K, DTYPE, COMPUTE, WHOLE)
    m = _read(tl.load(column + (2 + K) * tensors), at, inside, DTYPE, COMPUTE, WHOLE)
    m = _mean(m, g, beta1, COMPUTE)
    _write(tl.load(column + (2 + K) * tensors), at, m, inside, DTYPE, WHOLE)
    below = _below(
        tl.load(column + (3 + K) * tensors), tl.load(column + (4 + K) * tensors), g, count, at, inside, numbers,
        DTYPE, COMPUTE, WHOLE,
    )  # fmt: skip
    # theta <- (1 - lr lambda) theta - lr m / (1 - beta1^t) / (sqrt(v / (1 - beta2^t)) + eps)
    theta = _read(tl.load(column + tensors), at, inside, DTYPE, COMPUTE, WHOLE)
    theta = theta * (1 - rate * tl.load(numbers + 2)).to(COMPUTE)
    theta += _divided((-rate / _corrected(beta1, count)).to(COMPUTE) * m, below)
    _write(tl.load(column + tensors), at, theta, inside, DTYPE, WHOLE)
