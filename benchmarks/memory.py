"""Peak memory of a training step, in sets of gradients: what it takes beside parameters and optimizer state.

    python -m benchmarks memory --students transformer conv --losses 1 2 4 8

On a CPU every storage that an operation makes is counted; on CUDA it is the allocator's own peak. Activations are part
of it, the same in all rows, so the last column is what a row takes beyond the step of the summed loss by the same kind
of optimizer. "State" is what stays between steps.
"""

from __future__ import annotations

import argparse
import gc
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks import common
from benchmarks.common import Row
from benchmarks.models import STUDENTS, losses_of
from distill_optim import DOTSGD, DOTAdamW, MoKDAdamW, MoKDSGD

Made = tuple[Any, Callable[[Tensor], None]]


class PeakMemory(TorchDispatchMode):
    """Bytes of all storages that operations made and that are still alive; remembers the most."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch's
        self.now: int = 0
        self.peak: int = 0
        self._seen: set[int] = set()

    def _forget(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.now -= size

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        known = {leaf.untyped_storage()._cdata for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                storage = leaf.untyped_storage()
                key = storage._cdata
                if key not in self._seen and key not in known:
                    self._seen.add(key)
                    self.now += storage.nbytes()
                    weakref.finalize(storage, self._forget, key, storage.nbytes())
        self.peak = max(self.peak, self.now)
        return result


def peak_of(step: Callable[[], object], device: torch.device) -> int:
    """Bytes that a step had at most, beyond those that were there before it."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step()
        return torch.cuda.max_memory_allocated(device) - before
    with PeakMemory() as memory:
        step()
    peak: int = memory.peak
    return peak


def contenders(k: int) -> dict[str, Callable[[nn.Module], Made]]:
    """Each from a model: its optimizer, and one step on logits."""

    def plain(make: Any, **options: Any) -> Callable[[nn.Module], Made]:
        def made(net: nn.Module) -> Made:
            optimizer = make(net.parameters(), lr=1e-3, **options)

            def step(logits: Tensor) -> None:
                torch.stack(losses_of(logits, k)).sum().backward()
                optimizer.step()

            return optimizer, step

        return made

    def ours(make: Any, how: str = "step", **options: Any) -> Callable[[nn.Module], Made]:
        def made(net: nn.Module) -> Made:
            optimizer = make(net.parameters(), lr=1e-3, losses=k, **options)

            def step(logits: Tensor) -> None:
                if how == "backward":
                    optimizer.backward(losses_of(logits, k))
                    optimizer.step()
                else:
                    optimizer.step(losses_of(logits, k), through=logits if how == "through" else None)

            return optimizer, step

        return made

    heavy: dict[str, Any] = {"momentum": 0.9}
    found = {
        "summed loss, SGD": plain(torch.optim.SGD, **heavy),
        "summed loss, AdamW": plain(torch.optim.AdamW),
        "DOTSGD": ours(DOTSGD, **heavy),
        "DOTSGD, fused": ours(DOTSGD, fused=True, **heavy),
        "DOTSGD, folded": ours(DOTSGD, fold=True, **heavy),
        "DOTSGD, backward then step": ours(DOTSGD, "backward", **heavy),
        "DOTAdamW": ours(DOTAdamW),
        "MoKDSGD": ours(MoKDSGD, **heavy),
        "MoKDSGD, backward then step": ours(MoKDSGD, "backward", **heavy),
        "MoKDSGD, through=logits": ours(MoKDSGD, "through", **heavy),
        "MoKDAdamW": ours(MoKDAdamW),
    }
    return found | peers(k)


def peers(k: int) -> dict[str, Callable[[nn.Module], Made]]:
    found: dict[str, Callable[[nn.Module], Made]] = {}
    try:
        from torchjd.aggregation import MGDA
        from torchjd.autojac import backward, jac_to_grad
    except ImportError:
        pass
    else:

        def torchjd(chunk: int | None) -> Callable[[nn.Module], Made]:
            def made(net: nn.Module) -> Made:
                params, mgda = list(net.parameters()), MGDA()
                optimizer = torch.optim.SGD(params, lr=1e-3, momentum=0.9)

                def step(logits: Tensor) -> None:
                    backward(losses_of(logits, k), parallel_chunk_size=chunk)
                    jac_to_grad(params, mgda)
                    optimizer.step()

                return optimizer, step

            return made

        found["TorchJD MGDA, SGD"] = torchjd(None)
        found["TorchJD MGDA, chunk 1, SGD"] = torchjd(1)
    try:
        from pytorch_optimizer import PCGrad
    except ImportError:
        return found

    def pcgrad(net: nn.Module) -> Made:
        optimizer = torch.optim.SGD(net.parameters(), lr=1e-3, momentum=0.9)
        surgeon: Any = PCGrad(optimizer)

        def step(logits: Tensor) -> None:
            surgeon.pc_backward(losses_of(logits, k))
            surgeon.step()

        return optimizer, step

    return found | {"pytorch_optimizer PCGrad, SGD": pcgrad}


def measure(student: str, k: int, options: argparse.Namespace) -> list[Row]:
    x = torch.randn(options.batch, 3, 32, 32, device=options.device, dtype=options.dtype)
    rows: list[Row] = []
    alike: dict[str, int] = {}
    for name, make in contenders(k).items():
        plain = name.startswith("summed loss")
        if not plain and options.only and not any(text.lower() in name.lower() for text in options.only):
            continue
        torch.manual_seed(0)
        net = STUDENTS[student]().to(options.device, options.dtype)
        sizes = {p: p.numel() * p.element_size() for p in net.parameters()}
        optimizer, step_on = make(net)

        def step(optimizer: Any = optimizer, step_on: Callable[[Tensor], None] = step_on, net: Any = net) -> None:
            optimizer.zero_grad()
            step_on(net(x))

        step()  # buffers are made
        optimizer.zero_grad()
        peak = peak_of(step, options.device)
        state = sum(
            value.numel() * value.element_size()
            for p in sizes
            for value in optimizer.state.get(p, {}).values()
            if isinstance(value, Tensor)
        )
        size = sum(sizes.values())
        kind = "AdamW" if "AdamW" in name else "SGD"
        if plain:
            alike[kind] = peak
        rows.append({"student": student, "K": k, "contender": name, "bytes": size, "state": state / size,
                     "peak": peak / size, "beyond": (peak - alike[kind]) / size})  # fmt: skip
        rows[-1]["ratios"] = {rows[0]["contender"]: [peak / size / rows[0]["peak"]] * 3}
        if options.profile:
            common.profile([common.Contender(name, step)], options, f"{student}, K = {k}")
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    parser = common.parser(__doc__, rounds=2)
    parser.add_argument("--students", nargs="+", default=["transformer"], choices=STUDENTS, metavar="STUDENT",
                        help=f"{', '.join(STUDENTS)}")  # fmt: skip
    parser.add_argument("--losses", type=int, nargs="+", default=[1, 2, 4, 8], help="numbers of losses K")
    parser.add_argument("--batch", type=int, default=8, help="images in a batch")
    options = common.parse(parser, arguments)
    rows: list[Row] = []
    for student in options.students:
        for k in options.losses:
            found = measure(student, k, options)
            print(f"\n{student}: a set of gradients is {found[0]['bytes'] / 1e6:.3g} MB, K = {k}\n")
            cells = [[r["contender"], *(f"{r[key]:.2f}" for key in ("state", "peak", "beyond"))] for r in found]
            print(common.table(["step", "state, sets", "peak, sets", "beyond the summed loss"], cells), flush=True)
            rows += found
    common.finish(rows, options, lambda row: f"{row['student']}, K = {row['K']}", rows[0]["contender"])


if __name__ == "__main__":
    main()
