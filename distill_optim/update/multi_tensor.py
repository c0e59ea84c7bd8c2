"""One launch of a kernel for any number of tensors: which tensors it can take, and the tables that it reads.

Nothing about the tensors is remembered from one step to the next: any of them may have been replaced, moved or
reshaped since, and to see that is to look at each. What is kept is the tables, by what stands in them.
"""

from __future__ import annotations

import warnings
from array import array
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

# Where the kernels run for real. (Tests add the CPU, for Triton's interpreter.)
_DEVICES = frozenset({"cuda"})
_PLAIN = frozenset({Tensor, Parameter})
_DTYPES = frozenset({torch.float16, torch.bfloat16, torch.float32, torch.float64})

Column = Sequence[Tensor | None]


@dataclass
class Launch:
    """A launch for parameters of one device and dtype: it can be done, and nothing has been touched.

    Attributes:
        kernel: name of the kernel.
        k: number of losses.
        positions: which of the parameters these are.
        params: the parameters.
        rows: of the table: sizes, the parameters' addresses, then each column's, 0 where it has nothing.
        numbers, scalars: as given to :func:`launches`.
    """

    kernel: str
    k: int
    positions: list[int]
    params: list[Tensor]
    rows: list[list[int]]
    numbers: tuple[float, ...]
    scalars: tuple[Tensor | None, ...]

    def make_missing(self, column: list[Tensor | None], row: list[int], wanted: Callable[[int], bool]) -> list[int]:
        """Puts zeros like the parameter where a buffer is wanted and missing.

        Returns:
            A row of the table: 1 where a buffer is new.
        """
        new = [int(column[p] is None and wanted(p)) for p in self.positions]
        for at, p in enumerate(self.positions):
            if new[at]:
                column[p] = made = torch.zeros_like(self.params[at], memory_format=torch.preserve_format)
                row[at] = getattr(made, "_local_tensor", made).data_ptr()
        return new

    def run(self, more: Sequence[list[int]], written: Sequence[Column]) -> None:
        """Does it.

        Args:
            more: further rows of the table.
            written: the columns of buffers. Autograd, which sees no kernel, is told that they and the parameters
                change: a graph that still needs an old value then says so.
        """
        changed = [t for column in written for p in self.positions if (t := column[p]) is not None] + self.params
        changed += [t._local_tensor for t in changed if type(t) not in _PLAIN]  # type: ignore[attr-defined]  # DTensors
        torch.autograd.graph.increment_version(changed)
        device, dtype = self.params[0].device, self.params[0].dtype
        if not any(self.rows[0]):
            return
        tables = _tables(tuple(chain(*self.rows, *more)), tuple(self.rows[0]), self.numbers, device)
        _start(self.kernel, dtype, self.k, len(self.params), tables, self.scalars)


def has_kernels(params: Sequence[Tensor]) -> bool:
    """Whether there are kernels for such parameters at all, by the first one."""
    return bool(params) and params[0].device.type in _DEVICES and not torch.compiler.is_compiling()


def launches(
    kernel: str,
    params: Sequence[Tensor],
    gradients: Sequence[Column],
    buffers: Sequence[Column],
    *,
    numbers: Sequence[Any],
    lr: float | Tensor,
    weights: Tensor | None = None,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
) -> list[Launch] | None:
    """A step as one launch per device and dtype, or None where a kernel cannot take it; nothing is touched.

    While a CUDA graph is being captured, a kernel can if it has taken a step like this before: neither can it be
    loaded then, nor memory for the tables be pinned.

    Args:
        kernel: its name in ``kernels.py``.
        params: P parameters; those that no loss reaches are left out.
        gradients: K columns of P.
        buffers: columns of P, None where there is none yet.
        numbers: hyperparameters, of which a tensor would have to be read; the learning rate goes in front of them.
        lr: learning rate. A tensor is read on the device, as are
        weights: shape (K,),
        grad_scale, found_inf: what the gradients are to be divided by, and, unless it is 0, that the step be skipped.
    """
    # First what costs nothing: on a CPU that is all there is.
    if not has_kernels(params):
        return None
    if any(isinstance(number, Tensor) for number in numbers):
        return None
    if isinstance(lr, Tensor) and (lr.requires_grad or lr.numel() != 1 or not lr.is_floating_point()):
        return None
    kinds: defaultdict[tuple[int, torch.dtype], list[int]] = defaultdict(list)
    for p in sorted({p for column in gradients for p, g in enumerate(column) if g is not None}):
        kinds[params[p].get_device(), params[p].dtype].append(p)
    found, words = [], 0
    for (_, dtype), positions in kinds.items():
        device = params[positions[0]].device
        number, rate = (0.0, lr) if isinstance(lr, Tensor) else (lr, None)
        if rate is not None and rate.device.type == "cpu" != device.type:
            number, rate = rate.item(), None
        scalars = tuple(
            None if t is None else t.to(device, non_blocking=True).contiguous()
            for t in (rate, weights, grad_scale, found_inf)
        )
        own = [params[p] for p in positions]
        columns: list[Column] = [own, *([column[p] for p in positions] for column in (*gradients, *buffers))]
        if device.type not in _DEVICES or dtype not in _DTYPES or (rows := _rows(own, columns)) is None:
            return None
        if not _runs(kernel, device, dtype, len(gradients), scalars):
            return None
        if _capturing(device):
            words += (len(rows) + len(buffers) + 1) * len(own) + len(_places(tuple(rows[0]))) + len(numbers) + 1
            if words > _pinned.room:
                return None
        found.append(Launch(kernel, len(gradients), positions, own, rows, (number, *numbers), scalars))
    return found


def run_counted(
    kernel: str,
    params: Sequence[Tensor],
    gradients: Sequence[Column],
    buffers: Sequence[Column],
    steps: Sequence[Tensor],
    **options: Any,
) -> bool:
    """A whole step with counts, as Adam has them, where a kernel can take it; if not, nothing is touched.

    Args:
        kernel, params, gradients, buffers, options: as in :func:`launches`. All buffers are there.
        steps: P counts, each one float32 on the parameter's device; one more afterwards, unless the step is skipped.

    Returns:
        Whether it was taken.
    """
    found = launches(kernel, params, gradients, buffers, **options)
    if found is None or any(
        t.dtype is not torch.float32 or t.get_device() != p.get_device() for t, p in zip(steps, params, strict=True)
    ):
        return False
    for launch in found:
        counts = [steps[p] for p in launch.positions]
        torch._foreach_add_(counts, 1)
        launch.run([[count.data_ptr() for count in counts]], buffers)
        *_, skipped = launch.scalars
        if skipped is not None:
            torch._foreach_sub_(counts, [skipped] * len(counts))
    return True


# ---------------------------------------------------------------- what a kernel can take


def _rows(params: list[Tensor], columns: Sequence[Column]) -> list[list[int]] | None:
    """Sizes, and each column's addresses; None where the n-th element in memory is not the n-th of the parameter."""
    try:
        parts = _parts(params, params)
        sizes, contiguous = list(map(Tensor.numel, parts)), list(map(Tensor.is_contiguous, parts))
        rows = [sizes]
        # Whatever its strides are, a single number is contiguous, and may be an imaginary part with the wrong sign.
        odd = [at for at, n in enumerate(sizes) if n == 1 or not contiguous[at]]
        if not all(_dense(parts[at]) for at in odd):
            return None
        for column in columns:
            others = _parts(column, params)
            if (
                list(map(Tensor.numel, others)) != sizes
                or list(map(Tensor.is_contiguous, others)) != contiguous
                or {t.dtype for t in others} != {params[0].dtype}
                or set(map(Tensor.get_device, others)) != {params[0].get_device()}
                or not all(_lies_like(parts[at], others[at]) for at in odd)
            ):
                return None
            rows.append([0 if t is None else a for t, a in zip(column, map(Tensor.data_ptr, others), strict=True)])
    except RuntimeError:
        return None  # a tensor without memory of its own, such as a sparse one, has no address, and says so
    return rows


def _parts(column: Column, params: list[Tensor]) -> list[Tensor]:
    """What this process holds of each, in the same memory; of the parameter where there is none.

    Raises:
        RuntimeError: for a kind of tensor that has no memory of its own, or that is cut otherwise than its parameter.
    """
    tensors = [p if t is None else t for t, p in zip(column, params, strict=True)]
    if _PLAIN.issuperset(map(type, chain(tensors, params))):
        return tensors
    from torch.distributed.tensor import DTensor

    for at, p in enumerate(params):
        t = tensors[at]
        if isinstance(t, DTensor) and isinstance(p, DTensor):
            alike = t.placements == p.placements and t.device_mesh == p.device_mesh
            if alike and not any(placement.is_partial() for placement in t.placements):
                tensors[at] = t._local_tensor
        if isinstance(p, DTensor) is not isinstance(t, DTensor) or type(tensors[at]) not in _PLAIN:
            raise RuntimeError(f"the kernels cannot take a {type(t).__name__} for a {type(p).__name__}")
    return tensors


def _dense(tensor: Tensor) -> bool:
    """Whether the elements lie side by side, in whatever order."""
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size != 1:
            if stride != expected:
                return False
            expected *= size
    return True


def _lies_like(param: Tensor, other: Tensor) -> bool:
    same = other.is_contiguous() or (other.shape == param.shape and other.stride() == param.stride())
    return same and not other.is_neg()


_known: dict[tuple[Any, ...], bool] = {}


def _runs(kernel: str, device: torch.device, dtype: torch.dtype, k: int, scalars: tuple[Tensor | None, ...]) -> bool:
    """Whether Triton is there and can build and start this variant of a kernel: it may lack a C compiler, or not know
    the GPU.
    """
    variant = (kernel, device, dtype, k, *(None if t is None else t.dtype for t in scalars))
    if variant not in _known and not _capturing(device):
        _known[variant] = _tried(kernel, device, dtype, k, scalars)
    return _known.get(variant, False)


def _tried(kernel: str, device: torch.device, dtype: torch.dtype, k: int, scalars: tuple[Tensor | None, ...]) -> bool:
    try:
        import triton  # noqa: F401  # only whether it is there
    except ImportError:
        return False
    try:
        # One tensor without elements: whatever else the table and the numbers say, nothing is read or written.
        table, place = torch.zeros(8 + 4 * k, dtype=torch.int64, device=device).split([7 + 4 * k, 1])
        numbers = torch.full((8 + 2 * k,), 0.5, dtype=torch.float64, device=device)
        _start(kernel, dtype, k, 1, (table, place, numbers), scalars)
    except Exception as error:
        warnings.warn(
            f"fused=True: Triton cannot run the kernel {kernel} on {device}, so torch's own kernels take its place. "
            f"Triton says: {error}",
            stacklevel=2,
        )
        return False
    return True


def _start(
    kernel: str,
    dtype: torch.dtype,
    k: int,
    tensors: int,
    tables: tuple[Tensor, Tensor, Tensor],
    scalars: tuple[Tensor | None, ...],
) -> None:
    from distill_optim.update import kernels

    table, places, numbers = tables
    stored, computed = kernels.PRECISION[str(dtype).removeprefix("torch.")]
    # Triton launches on the current device, whatever the tensors' is.
    with torch.cuda.device(table.device) if table.device.type == "cuda" else nullcontext():
        getattr(kernels, kernel)[(places.numel(),)](
            table, tensors, places, numbers, *scalars,
            K=k, DTYPE=stored, COMPUTE=computed, BLOCK=kernels.BLOCK, **kernels.OPTIONS,
        )  # fmt: skip


# ---------------------------------------------------------------- tables


class _Pinned:
    """Host memory whose copies to a device are part of a CUDA graph. Each replay reads it again, so what is handed out
    is never taken back; and as none can be pinned during a capture, room is made before.
    """

    def __init__(self) -> None:
        self._free = torch.empty(0, dtype=torch.int64)
        self._used: list[Tensor] = []

    @property
    def room(self) -> int:
        return self._free.numel()

    def make_room(self, words: int, device: torch.device) -> None:
        if self.room < words:
            # Enough for a few captures: a graph for each size of a batch, say.
            self._free = torch.empty(max(8 * words, 1 << 16), dtype=torch.int64, pin_memory=device.type == "cuda")

    def copied(self, table: Tensor, device: torch.device) -> Tensor:
        kept, self._free = self._free.tensor_split([table.numel()])
        self._used.append(kept.copy_(table.view(torch.int64)))
        return kept.to(device, non_blocking=True).view(table.dtype)


_pinned = _Pinned()


def _capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _tables(
    rows: tuple[int, ...], sizes: tuple[int, ...], numbers: tuple[float, ...], device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """What a kernel reads, on its device: the table, each program's place in it, the numbers."""
    if _capturing(device):
        copied = partial(_pinned.copied, device=device)
        return copied(_integers(rows)), copied(_places(sizes)), copied(_floats(numbers))
    # The stream that a table was copied on is part of its name: on another one the copy might not have arrived.
    where = device, torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    tables = _there(_integers, rows, *where), _there(_places, sizes, *where), _there(_floats, numbers, *where)
    _pinned.make_room(sum(map(Tensor.numel, tables)), device)
    return tables


@lru_cache(maxsize=32)
def _there(
    table: Callable[[tuple[Any, ...]], Tensor], values: tuple[float, ...], device: torch.device, stream: int
) -> Tensor:
    """A table on a device. Equal values are the same table, so it is copied only when something has moved or changed;
    autograd's gradients mostly come to lie where the last step's did.
    """
    made = table(values)
    # From pinned memory, so that the host need not wait for the device to arrive there; torch reuses such memory only
    # after the copy.
    return made.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else made


def _integers(values: tuple[int, ...]) -> Tensor:
    return torch.frombuffer(array("q", values), dtype=torch.int64)


def _floats(values: tuple[float, ...]) -> Tensor:
    return torch.frombuffer(array("d", values), dtype=torch.float64)


def _places(sizes: tuple[int, ...]) -> Tensor:
    """For each program its tensor, and in the upper half of the word which chunk of that."""
    from distill_optim.update import kernels

    counts = (torch.tensor(sizes) + kernels.BLOCK - 1) // kernels.BLOCK
    tensors = torch.repeat_interleave(torch.arange(len(sizes)), counts)
    chunks = torch.arange(tensors.numel()) - (counts.cumsum(0) - counts)[tensors]
    return chunks << 32 | tensors
