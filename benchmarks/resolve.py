"""From gradients to weights: the Gram matrix and what is solved with it, beside the norm of one gradient.

    python -m benchmarks resolve --sets 1x10000000 resnet18 --losses 2 8

Gradients are drawn anew in every round. GB/s is of reading every gradient once, which is the least.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks import common
from benchmarks.common import Contender, Row
from benchmarks.models import SETS, shapes_of
from benchmarks.step import Gradients
from distill_optim import combine


def contenders(each: list[list[Tensor]], methods: Sequence[str]) -> list[Contender]:
    k, device = len(each), each[0][0].device
    losses = torch.linspace(1, 2, k, dtype=torch.float64, device=device)
    solved = combine.gram(each)

    def resolve(method: str) -> Callable[[], object]:
        rule = combine.method(method)
        memory = rule.init(losses) if isinstance(rule, combine.Stateful) else None

        def run() -> object:
            gram = combine.gram(each)
            return combine.advance(gram, losses, memory or {}, combine=method, dominance="log")

        return run

    def dots() -> list[Tensor]:
        """In the gradients' own precision, which is not enough where they nearly agree."""
        pairs = [(each[i], each[j]) for i in range(k) for j in range(i + 1)]
        return [torch.stack([torch.dot(a.view(-1), b.view(-1)) for a, b in zip(*p, strict=True)]).sum() for p in pairs]

    def stacked() -> Tensor:
        rows = torch.stack([torch.cat([g.view(-1) for g in own]) for own in each])
        return rows @ rows.T

    found = [
        Contender("norm of one gradient", lambda: torch.nn.utils.get_total_norm(each[0]), words=1),
        Contender("norms of all", lambda: [torch.nn.utils.get_total_norm(own) for own in each], words=k),
        Contender("gram", lambda: combine.gram(each), words=k),
        *(Contender(f"gram and {method}", resolve(method), words=k) for method in methods),
        Contender("min_norm alone", lambda: combine.weights(solved, losses), words=0),
        Contender("a dot per tensor and pair, own precision", dots, words=k),
        Contender("cat and mm, own precision", stacked, words=k),
    ]  # fmt: skip
    try:
        from torchjd.aggregation import MGDAWeighting
    except ImportError:
        return found
    mgda: Any = MGDAWeighting()
    return [*found, Contender("cat and mm, TorchJD MGDA", lambda: mgda(stacked()), words=k)]


def measure(name: str, k: int, options: argparse.Namespace) -> list[Row]:
    gradients = Gradients(shapes_of(name), k, options.device, options.dtype)
    each = gradients.each
    size = sum(g.numel() * g.element_size() for g in each[0])
    running = common.pick(contenders(each, options.methods), options)
    taken = common.race(running, options.device, options.rounds, refresh=gradients.draw)
    count = sum(p.numel() for p in each[0])
    case = {"set": name, "tensors": len(each[0]), "parameters": count, "K": k}
    rows = common.rows_of(case, running, taken, common.references(running, options))
    for row, contender in zip(rows, running, strict=True):
        row["GB/s"] = (contender.words or 0) * size / row["milliseconds"][0] / 1e6
    common.profile(running, options, f"{name}, K = {k}")
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    parser = common.parser(__doc__, rounds=25)
    parser.add_argument("--sets", nargs="+", default=["330", "resnet18", "1x10000000"], metavar="SET",
                        help=f"parameters: {', '.join(SETS)}, or COUNTxELEMENTS")  # fmt: skip
    parser.add_argument("--losses", type=int, nargs="+", default=[2, 8], help="numbers of losses K")
    parser.add_argument("--methods", nargs="+", default=["min_norm"], choices=combine.names(), metavar="NAME")
    options = common.parse(parser, arguments)
    rows: list[Row] = []
    for name in options.sets:
        for k in options.losses:
            found = measure(name, k, options)
            first = found[0]
            print(f"\n{name}: {first['tensors']} tensors, {first['parameters']:,} parameters, K = {k}\n")
            heads = ["resolve", "ms", *(f"of “{to}”" for to in first["ratios"]), "GB/s"]
            cells = [
                [
                    row["contender"],
                    common.milliseconds(row["milliseconds"]),
                    *map(common.number, row["ratios"].values()),
                    f"{row['GB/s']:.1f}" if row["GB/s"] else "–",
                ]
                for row in found
            ]
            print(common.table(heads, cells), flush=True)
            rows += found
    common.finish(rows, options, lambda row: f"{row['set']}, K = {row['K']}", rows[0]["contender"])


if __name__ == "__main__":
    main()
