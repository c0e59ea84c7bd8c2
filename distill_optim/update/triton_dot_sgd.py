"""DOT's update in one launch for any number of tensors: the tables that its kernel reads, and what it can take."""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Sequence
from contextlib import nullcontext
from functools import cache, lru_cache
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

# Where the kernel runs for real. (Tests add the CPU, for Triton's interpreter.)
_DEVICES = frozenset({"cuda"})
_PLAIN = frozenset({Tensor, Parameter, type(None)})
_DTYPES = frozenset({torch.float16, torch.bfloat16, torch.float32, torch.float64})


def supported(
    params: Sequence[Tensor],
    gradients: Sequence[Sequence[Tensor | None]],
    buffers: Sequence[Sequence[Tensor | None]],
    *,
    lr: float | Tensor,
    numbers: Sequence[Any],
) -> bool:
    """Whether one launch per device and dtype can take this step; nothing on a device is read for the answer.

    Args:
        params, gradients, buffers, lr: as in :func:`~distill_optim.update.dot_sgd`.
        numbers: the other hyperparameters; a tensor among them would have to be read.
    """
    if not params or any(param.device.type not in _DEVICES for param in params) or torch.compiler.is_compiling():
        return False
    if any(isinstance(number, Tensor) for number in numbers):
        return False
    if isinstance(lr, Tensor) and (lr.requires_grad or lr.numel() != 1 or not lr.is_floating_point()):
        return False
    # The tables are copied from host memory, which a replayed graph would read again after it was given back.
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        return False
    parts = _parts(params)
    for whole in parts:
        if whole is None or whole.dtype not in _DTYPES or not _dense(whole):
            return False
        if isinstance(lr, Tensor) and lr.device.type != "cpu" and lr.device != whole.device:
            return False
    for column in (*gradients, *buffers):
        for whole, given, other in zip(parts, column, _parts(column, like=params), strict=True):
            if given is not None and (whole is None or other is None or not _walks_along(whole, other)):
                return False
    return all(_runs_on(device) for device in {param.device for param in params})


@cache
def _runs_on(device: torch.device) -> bool:
    """Whether Triton is there and can build and start the kernel: it may lack a C compiler, or not know the GPU."""
    try:
        import triton  # noqa: F401  # only whether it is there
    except ImportError:
        return False
    try:
        with torch.no_grad():
            p, g = torch.zeros(1, device=device), torch.zeros(1, device=device)
            dot_sgd(
                [p], [[g]], [[None]], lr=0.1, momentum=0.9, momenta=[0.9], gains=[1], dampening=0, weight_decay=0,
                nesterov=False, maximize=False,
            )  # fmt: skip
    except Exception as error:
        warnings.warn(
            f"fused=True: Triton cannot run DOT's kernel on {device}, so torch's fused SGD takes its place, once per "
            f"loss. Triton says: {error}",
            stacklevel=2,
        )
        return False
    return True


def _parts(tensors: Sequence[Tensor | None], like: Sequence[Tensor] | None = None) -> list[Tensor | None]:
    """:func:`_part` of each; a plain model, of many small tensors perhaps, is through in one look."""
    plain = _PLAIN.issuperset(map(type, tensors)) and (like is None or _PLAIN.issuperset(map(type, like)))
    if plain and all(t is None or t.layout is torch.strided for t in tensors):
        return list(tensors)
    likes = [None] * len(tensors) if like is None else like
    return [None if t is None else _part(t, like=one) for t, one in zip(tensors, likes, strict=True)]


def _part(tensor: Tensor, like: Tensor | None = None) -> Tensor | None:
    """What this process holds of a tensor, in the same memory; None for a kind of tensor that has no memory of its
    own, or that is cut in another way than ``like``.
    """
    if like is not None and hasattr(like, "placements") != hasattr(tensor, "placements"):
        return None
    if type(tensor) in _PLAIN:
        return tensor if tensor.layout is torch.strided else None
    if not hasattr(tensor, "placements"):
        return None
    from torch.distributed.tensor import DTensor

    if not isinstance(tensor, DTensor) or any(placement.is_partial() for placement in tensor.placements):
        return None
    if like is not None and not (
        isinstance(like, DTensor) and tensor.placements == like.placements and tensor.device_mesh == like.device_mesh
    ):
        return None
    return _part(tensor._local_tensor)


def _dense(tensor: Tensor) -> bool:
    """Whether the elements lie side by side, in whatever order."""
    if tensor.is_contiguous():
        return True
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size != 1:
            if stride != expected:
                return False
            expected *= size
    return True


def _walks_along(param: Tensor, other: Tensor) -> bool:
    """Whether the n-th element in memory is the same one in both, for a dense ``param``."""
    if other.dtype is not param.dtype or other.device != param.device or other.is_neg():
        return False
    if other.is_contiguous() and param.is_contiguous():
        return other.numel() == param.numel()
    return other.shape == param.shape and other.stride() == param.stride()


def dot_sgd(
    params: Sequence[Tensor],
    gradients: Sequence[Sequence[Tensor | None]],
    buffers: Sequence[list[Tensor | None]],
    *,
    lr: float | Tensor,
    momentum: float,
    momenta: Sequence[float],
    gains: Sequence[float],
    dampening: float,
    weight_decay: float,
    nesterov: bool,
    maximize: bool,
) -> None:
    """The step of :func:`~distill_optim.update.dot_sgd`, in one launch per device and dtype.

    The parameter and each loss's gradient are read once, each buffer is read and written once: 3K + 2 words per
    parameter. Arithmetic is in float32 for half precision. Gradients are only read.

    Args:
        All as in :func:`~distill_optim.update.dot_sgd`, and such that :func:`supported` holds.
    """
    if isinstance(lr, Tensor) and lr.device.type == "cpu" != params[0].device.type:
        lr = lr.item()
    batches: defaultdict[tuple[torch.device, torch.dtype], list[int]] = defaultdict(list)
    for p, param in enumerate(params):
        if any(grads[p] is not None for grads in gradients):
            batches[param.device, param.dtype].append(p)
    for positions in batches.values():
        own = [params[p] for p in positions]
        grads = [[column[p] for p in positions] for column in gradients]
        shared = [sum(g is not None for g in of_one) > 1 for of_one in zip(*grads, strict=True)]
        written, kept, fresh = list(own), [], []
        for column, given, mu in zip(buffers, grads, momenta, strict=True):
            # Without momentum there is no buffer, as in torch.
            keeps = [
                g is not None and (mu if several else momentum) != 0 for g, several in zip(given, shared, strict=True)
            ]
            new = [keep and column[p] is None for keep, p in zip(keeps, positions, strict=True)]
            if any(new):
                for p, is_new in zip(positions, new, strict=True):
                    if is_new:
                        column[p] = torch.empty_like(params[p], memory_format=torch.preserve_format).detach()
            kept.append([column[p] if keep else None for keep, p in zip(keeps, positions, strict=True)])
            fresh.append(new)
            written += (buffer for buffer in kept[-1] if buffer is not None)
        parts = _parts(own)
        sizes = tuple(0 if part is None else part.numel() for part in parts)
        _launch(
            own[0],
            (*_addresses(parts), *sizes, *chain(*map(_addresses, map(_parts, (*grads, *kept)))), *chain(*fresh)),
            sizes,
            numbers=(momentum, 1 - dampening, weight_decay, 0.0 if isinstance(lr, Tensor) else lr, *momenta, *gains),
            lr=lr if isinstance(lr, Tensor) else None,
            k=len(momenta),
            nesterov=nesterov,
            maximize=maximize,
        )
        _bump(written)


def _addresses(tensors: Sequence[Tensor | None]) -> list[int]:
    """Where the elements lie; 0 for none."""
    return [0 if t is None else t.data_ptr() for t in tensors]


def _launch(
    example: Tensor,
    columns: tuple[int, ...],
    sizes: tuple[int, ...],
    *,
    numbers: tuple[float, ...],
    lr: Tensor | None,
    k: int,
    nesterov: bool,
    maximize: bool,
) -> None:
    from distill_optim.update import kernels

    device = example.device
    tensor_of, chunk_of = _chunks(sizes, kernels.BLOCK, device, _stream(device))
    programs = tensor_of.numel()
    if programs == 0:
        return
    stored, computed = kernels.PRECISION[str(example.dtype).removeprefix("torch.")]
    numbers_there = _there(numbers, torch.float64, device, _stream(device))
    # Triton launches on the current device, whatever the tensors' is.
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        kernels.dot_sgd[(programs,)](
            _there(columns, torch.int64, device, _stream(device)),
            len(sizes),
            tensor_of,
            chunk_of,
            numbers_there,
            numbers_there if lr is None else lr,
            K=k,
            LR_IS_TENSOR=lr is not None,
            DECAY=numbers[2] != 0,
            NESTEROV=nesterov,
            MAXIMIZE=maximize,
            DTYPE=stored,
            COMPUTE=computed,
            BLOCK=kernels.BLOCK,
            num_warps=kernels.WARPS,
        )


def _stream(device: torch.device) -> int:
    """The stream that a table was copied on is part of its name: on another one the copy might not have arrived."""
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0


@lru_cache(maxsize=16)
def _there(values: tuple[float, ...], dtype: torch.dtype, device: torch.device, stream: int) -> Tensor:
    """These numbers on a device. Equal numbers are the same table, so one is copied only when something has moved;
    autograd's gradients mostly come to lie where the last step's did.
    """
    return _copied(torch.tensor(values, dtype=dtype), device)


@lru_cache(maxsize=16)
def _chunks(sizes: tuple[int, ...], block: int, device: torch.device, stream: int) -> tuple[Tensor, Tensor]:
    """For each program its tensor, and which chunk of that tensor it updates."""
    counts = (torch.tensor(sizes) + block - 1) // block
    tensors = torch.repeat_interleave(torch.arange(len(sizes)), counts)
    chunks = torch.arange(tensors.numel()) - (counts.cumsum(0) - counts)[tensors]
    return _copied(tensors.int(), device), _copied(chunks.int(), device)


def _copied(table: Tensor, device: torch.device) -> Tensor:
    # From pinned memory, so that the host need not wait for the device to arrive there; torch gives such memory back
    # only after the copy.
    return table.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else table.to(device)


def _bump(written: list[Tensor]) -> None:
    """Tells autograd, which sees no kernel: a graph that still needs an old value then says so."""
    written += (part for t in written if type(t) not in _PLAIN and (part := _part(t)) is not None)
    torch.autograd.graph.increment_version([t for t in written if not t.is_inference()])
