"""Every combination method beside TorchJD's: time per call, reads on the host, distance from the exact direction.

    python -m benchmarks combine

Gradients are Gaussian rows of length 2K, with norms from 0.1 to 10, so that some of them conflict. The exact direction
is that of the oracles in tests/reference, which work from the gradients themselves; the distance is that of the two
unit vectors, the largest over the draws. "hurt" counts the draws in which the direction makes some loss worse, for
methods that promise not to. Reads are counted on CPU tensors: each would wait for an accelerator. Both sides are timed
in turn, in the same run, on one thread.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from distill_optim import combine
from tests.reference import gram_methods as reference
from tests.reference import min_norm as shortest

Solver = Callable[[Tensor, Tensor], Tensor]

# Method → exact step from the rows, and whether it promises that no loss gets worse (here all rows are independent).
ORACLES: dict[str, tuple[Callable[[Any], Any], bool]] = {
    "min_norm": (lambda rows: shortest.by_nnls(rows) @ rows, True),
    "upgrad": (lambda rows: reference.upgrad(rows).vector, True),
    "dualproj": (lambda rows: reference.dualproj(rows).vector, True),
    "cagrad": (lambda rows: reference.cagrad(rows, 0.5).vector, False),
    "imtl_g": (lambda rows: reference.imtl_g(rows).vector, True),
    "aligned_mtl": (lambda rows: reference.aligned_mtl(rows).vector, False),
    "nash_mtl": (lambda rows: reference.nash_mtl(rows @ rows.T) @ rows, True),
    "fairgrad": (lambda rows: reference.fairgrad(rows @ rows.T, 2.0) @ rows, True),
    "config": (lambda rows: reference.config(rows).vector, True),
    "sdmgrad": (lambda rows: reference.sdmgrad(rows, 0.3).vector, False),
    "pcgrad_average": (lambda rows: reference.pcgrad_average(rows).vector, False),
}
# Beyond this K the oracle of the average over all orders takes too long, and so does one in decimal arithmetic.
LIMITS = {"pcgrad_average": 4, "nash_mtl": 16, "fairgrad": 16}


def torchjd() -> dict[str, Callable[[int], Solver]]:
    """TorchJD's methods by our names: made for K losses, from the Gram matrix and the Jacobian."""
    try:
        from torchjd import aggregation as jd
    except ImportError:
        return {}

    def of_gram(make: Callable[[], Any]) -> Callable[[int], Solver]:
        def made(k: int) -> Solver:
            weighting = make()
            return lambda gram, rows: weighting(gram)

        return made

    def nash(k: int) -> Solver:
        weighting = jd.NashMTL(n_tasks=k, max_norm=0.0).weighting

        def solve(gram: Tensor, rows: Tensor) -> Tensor:
            weights: Tensor = weighting(rows)
            return weights

        return solve

    def config(k: int) -> Solver:
        aggregator = jd.ConFIG()

        def solve(gram: Tensor, rows: Tensor) -> Tensor:
            vector: Tensor = aggregator(rows)
            found: Tensor = torch.linalg.lstsq(rows.T, vector[:, None]).solution
            return found[:, 0]

        return solve

    return {
        "min_norm": of_gram(jd.MGDAWeighting),
        "upgrad": of_gram(jd.UPGradWeighting),
        "dualproj": of_gram(jd.DualProjWeighting),
        "cagrad": of_gram(partial(jd.CAGradWeighting, c=0.5)),
        "imtl_g": of_gram(jd.IMTLGWeighting),
        "aligned_mtl": of_gram(jd.AlignedMTLWeighting),
        "nash_mtl": nash,
        "fairgrad": of_gram(partial(jd.FairGradWeighting, alpha=2.0)),
        "config": config,
        "sdmgrad": of_gram(jd.SDMGradWeighting),
        "pcgrad": of_gram(jd.PCGradWeighting),
        "gradvac": of_gram(jd.GradVacWeighting),
        "random": lambda k: lambda gram, rows: jd.RandomWeighting()(rows),
        "mean": of_gram(jd.MeanWeighting),
        "sum": of_gram(jd.SumWeighting),
        "constant": lambda k: lambda gram, rows: jd.ConstantWeighting(torch.ones(k, dtype=torch.float64))(rows),
    }


def ours(name: str) -> Solver:
    """The method as published, over the steps of its memory if it has one."""
    rule, state = combine.method(name), [combine.State()]

    def solve(gram: Tensor, rows: Tensor) -> Tensor:
        losses = gram.diagonal()
        if isinstance(rule, combine.Stateful):
            weights, state[0] = rule(gram, losses, state[0] or rule.init(losses))
            return weights
        return rule(gram, losses)

    return solve


class Reads:
    """Counts what would wait for an accelerator: scalars that are read, tensors that are copied to the host."""

    def __init__(self) -> None:
        self.count = 0

    def __enter__(self) -> Reads:
        reads = self
        taken = {Tensor.cpu, Tensor.numpy, Tensor.tolist, Tensor.__array__}

        class Calls(TorchFunctionMode):
            def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
                reads.count += func in taken
                return func(*args, **(kwargs or {}))

        class Operations(TorchDispatchMode):
            def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
                name = func.overloadpacket.__name__
                reads.count += name in ("_local_scalar_dense", "nonzero", "_linalg_check_errors")
                mask = name == "index" and any(t is not None and t.dtype == torch.bool for t in args[1])
                reads.count += mask
                return func(*args, **(kwargs or {}))

        self._modes: list[Any] = [Calls(), Operations()]  # type: ignore[no-untyped-call]  # torch's
        for mode in self._modes:
            mode.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        for mode in reversed(self._modes):
            mode.__exit__(*error)


def draw(k: int, generator: torch.Generator) -> Tensor:
    norms = torch.logspace(-1, 1, k, dtype=torch.float64)
    return torch.randn(k, 2 * k, dtype=torch.float64, generator=generator) * norms[:, None]


def measure(name: str, k: int, sides: dict[str, Solver], draws: int, repeats: int) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(k)
    seconds: dict[str, list[float]] = {side: [] for side in sides}
    errors: dict[str, list[float]] = {side: [] for side in sides}
    hurt = dict.fromkeys(sides, 0)
    oracle, promises = ORACLES.get(name, (None, False))
    for _ in range(draws):
        rows = draw(k, generator)
        gram = rows @ rows.T
        exact = None
        if oracle is not None and k <= LIMITS.get(name, 64):
            exact = torch.from_numpy(np.asarray(oracle(rows.numpy()), dtype=float))
        for side, solve in sides.items():
            for _ in range(repeats):
                start = time.perf_counter()
                weights = solve(gram, rows)
                seconds[side].append(time.perf_counter() - start)
            step = weights.double() @ rows
            if exact is not None:
                error = (step / step.norm() - exact / exact.norm()).norm().item()
                errors[side].append(error if step.norm() > 0 else 1.0)
            # The rounding of an inner product of some dozen numbers.
            hurt[side] += bool(promises and (rows @ step < -1e-13 * rows.norm(dim=1) * step.norm()).any())
    found = []
    for side, solve in sides.items():
        with Reads() as reads:
            solve(gram, rows)
        found.append(
            {
                "method": name,
                "K": k,
                "by": side,
                "microseconds": 1e6 * statistics.median(seconds[side]),
                "reads": reads.count,
                "error": max(errors[side]) if errors[side] else None,
                "hurt": hurt[side] if promises else None,
                "draws": draws,
            }
        )
    return found


def line(entry: dict[str, Any], base: float) -> str:
    error = "–" if entry["error"] is None else f"{entry['error']:.0e}"
    hurt = "–" if entry["hurt"] is None else f"{entry['hurt']}/{entry['draws']}"
    return (
        f"| {entry['method']} | {entry['K']} | {entry['by']} | {entry['microseconds']:.0f} | "
        f"{entry['microseconds'] / base:.2f} | {entry['reads']} | {error} | {hurt} |"
    )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--losses", type=int, nargs="+", default=[2, 4, 8, 16, 32])
    parser.add_argument("--methods", nargs="+", default=list(combine.names()), choices=combine.names(), metavar="NAME")
    parser.add_argument("--draws", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=5, help="calls per draw")
    parser.add_argument("--json", type=Path, help="write the numbers to this file")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)  # systems of this size gain nothing from more
    warnings.simplefilter("ignore")  # TorchJD's solvers have opinions on the input
    peers, found = torchjd(), []
    print("| method | K | by | µs per call | of TorchJD's | host reads | off the exact direction | hurt |")
    print("|---|---|---|---|---|---|---|---|")
    for name in options.methods:
        for k in options.losses:
            sides = {"distill_optim": ours(name)}
            if name in peers:
                sides["TorchJD"] = peers[name](k)
            slow = name == "nash_mtl" and "TorchJD" in sides  # a second per call
            entries = measure(name, k, sides, 3 if slow else options.draws, 1 if slow else options.repeats)
            for entry in entries:
                print(line(entry, entries[-1]["microseconds"]), flush=True)
            found += entries
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
