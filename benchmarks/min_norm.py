"""How near min-norm solvers come to the optimum, and what they cost; with TorchJD's where it is installed.

    python -m benchmarks min_norm

The optimum is that of SciPy's non-negative least squares. "hurt" counts the draws in which the direction found has a
negative inner product with some gradient, which the optimum never has.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence

import numpy as np
import torch
from scipy.optimize import nnls
from torch import Tensor

from distill_optim.combine import min_norm

Case = Callable[[], Tensor]


def cases(k: int) -> dict[str, Case]:
    def gaussian(n: int, decades: float) -> Tensor:
        scale = torch.logspace(-decades / 2, decades / 2, k, dtype=torch.float64)
        return torch.randn(k, n, dtype=torch.float64) * scale[:, None]

    return {
        "equal norms": lambda: gaussian(1000, 0),
        "norms 0.1 to 10, conflicting": lambda: gaussian(2 * k, 2),
        "norms 1e-3 to 1e3": lambda: gaussian(1000, 6),
    }


def optimum(gram: Tensor) -> float:
    """‖g*‖², from min ½xᵀGx − 1ᵀx over x ≥ 0 (x is π up to a factor), rows scaled to unit length."""
    g = gram.numpy()
    d = 1 / np.sqrt(g.diagonal())
    factor = np.linalg.cholesky(g * np.outer(d, d))
    x = nnls(factor.T, np.linalg.solve(factor, d))[0] * d
    x /= x.sum()
    return float(x @ g @ x)


def solvers() -> dict[str, Callable[[Tensor], Tensor]]:
    found: dict[str, Callable[[Tensor], Tensor]] = {"distill_optim": min_norm}
    try:
        from torchjd.aggregation import MGDAWeighting
    except ImportError:
        return found
    return found | {"TorchJD MGDA": MGDAWeighting()}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--losses", type=int, nargs="+", default=[2, 4, 8, 10, 32])
    parser.add_argument("--draws", type=int, default=20)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)  # systems of this size gain nothing from more
    print("| K | gradients | solver | ‖g‖² over the optimum, median (worst) | hurt | ms per call |")
    print("|---|---|---|---|---|---|")
    for k in options.losses:
        for title, draw in cases(k).items():
            torch.manual_seed(0)
            grams = [j @ j.T for j in (draw() for _ in range(options.draws))]
            optima = [optimum(g) for g in grams]
            for name, solve in solvers().items():
                ratios, hurt, seconds = [], 0, []
                for g, best in zip(grams, optima, strict=True):
                    start = time.perf_counter()
                    w = solve(g).double()
                    seconds.append(time.perf_counter() - start)
                    slope = g @ w
                    ratios.append(float(w @ slope) / best)
                    hurt += bool((slope < 0).any())
                print(
                    f"| {k} | {title} | {name} | {np.median(ratios):.4g} ({max(ratios):.4g}) "
                    f"| {hurt}/{options.draws} | {1e3 * np.median(seconds):.2f} |"
                )


if __name__ == "__main__":
    main()
