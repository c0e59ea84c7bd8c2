"""What a monitor costs: training steps with one and without, in the same run.

    python -m benchmarks monitor --students conv mlp --every 1 20

A step that is recorded costs more than the others, so a contender is ``--steps`` steps in a row, as many for each. A
plain optimizer is compared with itself too: there the monitor walks each loss back once more.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from benchmarks import common
from benchmarks.common import Contender, Row
from benchmarks.models import STUDENTS, losses_of
from distill_optim import DOTSGD, MoKDSGD
from distill_optim.monitor import Monitor


def contenders(student: Callable[[], nn.Module], k: int, options: argparse.Namespace) -> list[Contender]:
    x = torch.randn(options.batch, 3, 32, 32, device=options.device, dtype=options.dtype)

    def steps(make: Any, every: int | None = None, modules: bool = False) -> Callable[[], None]:
        torch.manual_seed(0)
        net = student().to(options.device, options.dtype)
        plain = make is torch.optim.SGD
        optimizer = make(net.parameters(), lr=1e-3, momentum=0.9, **({} if plain else {"losses": k}))
        monitor = None if every is None else Monitor(optimizer, every, modules=net if modules else None)

        def run() -> None:
            for _ in range(options.steps):
                optimizer.zero_grad()
                losses = losses_of(net(x), k)
                if plain:
                    if monitor is not None:
                        monitor.observe(losses)
                    torch.stack(losses).sum().backward()
                    optimizer.step()
                else:
                    optimizer.step(losses)

        return run

    found: list[Contender] = []
    for make in MoKDSGD, DOTSGD, torch.optim.SGD:
        name = make.__name__
        found.append(Contender(name, steps(make)))
        for every in options.every:
            found.append(Contender(f"{name}, every={every}", steps(make, every)))
            found.append(Contender(f"{name}, every={every}, by module", steps(make, every, modules=True)))
    return found


def measure(student: str, k: int, options: argparse.Namespace) -> list[Row]:
    rows: list[Row] = []
    running = common.pick(contenders(STUDENTS[student], k, options), options)
    taken = common.race(running, options.device, options.rounds, warm_up=2)
    for own in running:
        # Each beside its own optimizer without a monitor.
        alone = own.name.split(",")[0]
        to = alone if alone in taken else running[0].name
        rows += common.rows_of({"student": student, "K": k}, [own], taken, [to])
    common.profile(running, options, f"{student}, K = {k}")
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    parser = common.parser(__doc__, rounds=20)
    parser.add_argument("--students", nargs="+", default=["conv"], choices=STUDENTS, metavar="STUDENT",
                        help=f"{', '.join(STUDENTS)}")  # fmt: skip
    parser.add_argument("--losses", type=int, nargs="+", default=[2], help="numbers of losses K")
    parser.add_argument("--batch", type=int, default=32, help="images in a batch")
    parser.add_argument("--every", type=int, nargs="+", default=[1, 20], help="one step in so many is recorded")
    parser.add_argument("--steps", type=int, default=20, help="steps in a row")
    options = common.parse(parser, arguments)
    rows: list[Row] = []
    for student in options.students:
        found = [row for k in options.losses for row in measure(student, k, options)]
        cells = [
            [row["contender"], str(row["K"]), common.milliseconds(row["milliseconds"])]
            + [common.number(ratio, 3) for ratio in row["ratios"].values()]
            for row in found
        ]
        print(f"\n{student}, {options.steps} steps, relative to the same optimizer without a monitor\n")
        print(common.table(["steps", "K", "ms", "ratio"], cells), flush=True)
        rows += found
    common.finish(rows, options, lambda row: f"{row['student']}, K = {row['K']}", "the optimizer without a monitor")


if __name__ == "__main__":
    main()
