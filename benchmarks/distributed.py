"""Training steps of several processes on this machine (gloo, 127.0.0.1) under DistributedDataParallel.

    python -m benchmarks distributed --world 2 --losses 2 4

A plain step reduces one set of gradients, ours one per loss. "no_sync" is around forward and backward: for ours it
saves DDP's own preparations for a reduction, because they reduce by themselves; for the sum it leaves the reduction
out, which trains nothing together and tells what it takes. Every round starts at a barrier; the times are those of
process 0.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import distributed, nn
from torch.multiprocessing.spawn import spawn
from torch.nn.parallel import DistributedDataParallel

from benchmarks import common
from benchmarks.common import Contender, Row
from benchmarks.models import STUDENTS, losses_of
from distill_optim import DOTSGD, MoKDSGD


def contenders(student: str, k: int, options: argparse.Namespace) -> list[Contender]:
    x = torch.randn(options.batch, 3, 32, 32, dtype=options.dtype)

    def step_of(make: Any, *, sync: bool = True, wrapped: bool = True, how: str = "sum", **extra: Any) -> Contender:
        torch.manual_seed(0)
        model: nn.Module = STUDENTS[student]().to(options.dtype)
        net: Any = DistributedDataParallel(model) if wrapped else model
        optimizer = make(net.parameters(), lr=1e-3, momentum=0.9, **extra)

        def run() -> None:
            optimizer.zero_grad()
            with nullcontext() if sync or not wrapped else net.no_sync():
                logits = net(x)
                losses = losses_of(logits, k)
                if how == "sum":
                    torch.stack(losses).sum().backward()
                elif how == "backward":
                    optimizer.backward(losses)
                elif how == "through":
                    optimizer.backward(losses, through=logits)
            optimizer.step()

        words = "" if wrapped and sync else ", no_sync" if wrapped else ", not wrapped"
        name = (
            "summed loss, SGD" if make is torch.optim.SGD else make.__name__ + (", through" if how == "through" else "")
        )
        return Contender(f"{name}{words}", run, distributed.barrier)

    found = [step_of(torch.optim.SGD), step_of(torch.optim.SGD, sync=False)]
    for make in (DOTSGD, MoKDSGD):
        for settings in ({}, {"sync": False}, {"wrapped": False}):
            found.append(step_of(make, how="backward", losses=k, **settings))
    found.append(step_of(MoKDSGD, how="through", losses=k))
    return found


def measure(rank: int, store: str, out: str, options: argparse.Namespace) -> None:
    """One of the processes; the first writes what it measured."""
    torch.set_num_threads(options.threads or 1)
    if sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=options.world)
    rows: list[Row] = []
    try:
        for student in options.students:
            for k in options.losses:
                running = common.pick(contenders(student, k, options), options)
                taken = common.race(running, torch.device("cpu"), options.rounds)
                case = {"student": student, "K": k, "world": options.world}
                rows += common.rows_of(case, running, taken, common.references(running, options))
                if rank == 0:
                    common.profile(running, options, f"{student}, K = {k}, {options.world} processes")
                elif options.profile:
                    for contender in running:
                        assert contender.prepare is not None
                        contender.prepare()
                        contender.run()
        if rank == 0:
            Path(out).write_text(json.dumps(rows), "utf-8")
    finally:
        distributed.destroy_process_group()
    # Threads of gloo that outlive the group, for DDP's reducers hold it, abort the process when Python is taken down
    # around them ("terminate called without an active exception"): what was measured is written, so end before that.
    sys.stdout.flush()
    os._exit(0)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = common.parser(__doc__, rounds=20)
    parser.add_argument("--students", nargs="+", default=["conv"], choices=STUDENTS, metavar="STUDENT",
                        help=f"{', '.join(STUDENTS)}")  # fmt: skip
    parser.add_argument("--losses", type=int, nargs="+", default=[2, 4], help="numbers of losses K")
    parser.add_argument("--batch", type=int, default=16, help="images in a batch of a process")
    parser.add_argument("--world", type=int, default=2, help="processes")
    options = common.parse(parser, arguments)
    if options.device.type != "cpu":
        parser.error("--device: the processes talk by gloo, on a CPU")
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "rows.json"
        spawn(measure, (str(Path(folder) / "store"), str(out), options), nprocs=options.world)
        rows: list[Row] = json.loads(out.read_text("utf-8"))
    for student in options.students:
        for k in options.losses:
            found = [row for row in rows if (row["student"], row["K"]) == (student, k)]
            print(f"\n{student}, K = {k}, {options.world} processes\n")
            heads = ["step", "ms", *(f"of “{to}”" for to in found[0]["ratios"])]
            cells = [
                [r["contender"], common.milliseconds(r["milliseconds"]), *map(common.number, r["ratios"].values())]
                for r in found
            ]
            print(common.table(heads, cells), flush=True)
    common.finish(rows, options, lambda row: f"{row['student']}, K = {row['K']}", rows[0]["contender"])


if __name__ == "__main__":
    main()
