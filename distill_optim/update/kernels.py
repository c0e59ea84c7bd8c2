"""Kernels in Triton: the only module that imports it, so it is imported when a kernel is first used."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

# Elements that one program updates: a few 16-byte loads per thread and tensor, and no loop.
BLOCK = 2048
WARPS = 8


# Not compiled anew for a number of tensors that is 1, or a multiple of 16.
@triton.jit(do_not_specialize=["tensors"])  # type: ignore[untyped-decorator]  # triton's, whose types nobody checks
def dot_sgd(  # type: ignore[no-untyped-def]  # the compiler takes types from the call
    table,
    tensors,
    tensor_of,
    chunk_of,
    numbers,
    lr_tensor,
    K: tl.constexpr,
    LR_IS_TENSOR: tl.constexpr,
    DECAY: tl.constexpr,
    NESTEROV: tl.constexpr,
    MAXIMIZE: tl.constexpr,
    DTYPE: tl.constexpr,
    COMPUTE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One step of DOT for the elements of one chunk of one parameter; ``triton_dot_sgd.py`` has the tables."""
    program = tl.program_id(0)
    # Columns of a number per tensor: address, size, K addresses of gradients, K of buffers, K times whether one is new.
    row = table + tl.load(tensor_of + program)
    # In 64 bits: a parameter may have more elements than 32 bits count.
    start = tl.load(chunk_of + program).to(tl.int64) * BLOCK
    # In float64 until the gain is in, as on the host.
    lr = tl.load(lr_tensor).to(tl.float64) if LR_IS_TENSOR else tl.load(numbers + 3)
    size = tl.load(row + tensors)
    address_bits = tl.load(row)
    for i in tl.static_range(2 * K):
        address_bits |= tl.load(row + (2 + i) * tensors)
    # What a table says, the compiler cannot know. Told that nothing is masked off within a chunk and that addresses are
    # multiples of 16, it moves 16 bytes at a time.
    if (start + BLOCK <= size) & (address_bits % 16 == 0):
        _dot_sgd_chunk(
            row, tensors, start, size, numbers, lr, K, DECAY, NESTEROV, MAXIMIZE, DTYPE, COMPUTE, BLOCK, True
        )
    else:
        _dot_sgd_chunk(
            row, tensors, start, size, numbers, lr, K, DECAY, NESTEROV, MAXIMIZE, DTYPE, COMPUTE, BLOCK, False
        )


@triton.jit  # type: ignore[untyped-decorator]  # as above
def _dot_sgd_chunk(  # type: ignore[no-untyped-def]  # as above
    row,
    tensors,
    start,
    size,
    numbers,
    lr,
    K: tl.constexpr,
    DECAY: tl.constexpr,
    NESTEROV: tl.constexpr,
    MAXIMIZE: tl.constexpr,
    DTYPE: tl.constexpr,
    COMPUTE: tl.constexpr,
    BLOCK: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """Loss after loss, each product and sum rounded where ``torch.optim.SGD`` rounds: torch's ``a + alpha * b`` is one
    fused multiply-add. Only within a loss half precision is kept in float32, as in torch's own fused kernel.
    """
    base = tl.load(numbers).to(COMPUTE)
    undamped = tl.load(numbers + 1).to(COMPUTE)
    weight_decay = tl.load(numbers + 2).to(COMPUTE)
    reach = 0
    for i in tl.static_range(K):
        reach += (tl.load(row + (2 + i) * tensors) != 0).to(tl.int32)
    shared = reach > 1

    at = start + tl.arange(0, BLOCK)
    theta_at = tl.load(row).to(tl.pointer_type(DTYPE)) + at
    if WHOLE:
        theta_at = tl.multiple_of(theta_at, [16])
        inside = tl.full([BLOCK], 1, tl.int1)
    else:
        inside = at < size
    theta = tl.load(theta_at, mask=inside, other=0).to(COMPUTE)
    undecayed = reach > 0
    for i in tl.static_range(K):
        g_address = tl.load(row + (2 + i) * tensors)
        v_address = tl.load(row + (2 + K + i) * tensors)
        fresh = tl.load(row + (2 + 2 * K + i) * tensors) != 0
        reaches = g_address != 0
        remembers = v_address != 0
        momentum = tl.where(shared, tl.load(numbers + 4 + i).to(COMPUTE), base)
        gain = tl.where(shared, tl.load(numbers + 4 + K + i), 1.0)
        g_at = g_address.to(tl.pointer_type(DTYPE)) + at
        v_at = v_address.to(tl.pointer_type(DTYPE)) + at
        if WHOLE:
            g_at = tl.multiple_of(g_at, [16])
            v_at = tl.multiple_of(v_at, [16])

        g = tl.load(g_at, mask=inside & reaches, other=0).to(COMPUTE)
        if MAXIMIZE:
            g = -g
        if DECAY:
            g = tl.where(undecayed & reaches, tl.fma(theta, weight_decay, g), g)
            undecayed = undecayed & (g_address == 0)
        # v <- mu v + (1 - tau) g, eqs. 4 and 5; the first buffer is the gradient.
        v = tl.load(v_at, mask=inside & remembers & (fresh == 0), other=0).to(COMPUTE)
        v = tl.where(fresh, g, tl.fma(g, undamped, momentum * v))
        tl.store(v_at, v.to(DTYPE), mask=inside & remembers)
        moved = tl.fma(v, momentum, g) if NESTEROV else v
        moved = tl.where(remembers, moved, g)
        # theta <- theta - gamma c v, eq. 6, rounded to the parameter's precision before the next loss.
        rate = (-(lr * gain)).to(COMPUTE)
        theta = tl.where(reaches, tl.fma(moved, rate, theta), theta).to(DTYPE).to(COMPUTE)
    tl.store(theta_at, theta.to(DTYPE), mask=inside)


PRECISION: dict[str, tuple[Any, Any]] = {
    "float16": (tl.float16, tl.float32),
    "bfloat16": (tl.bfloat16, tl.float32),
    "float32": (tl.float32, tl.float32),
    "float64": (tl.float64, tl.float64),
}
