"""A whole training step with K losses, relative to forward + K separate backward passes + SGD step in the same run.

    python -m benchmarks train --students conv mlp --losses 2 4 8

Every contender takes one step in every round, so that whatever else the machine does falls on all alike; the table
has the median of the rounds' ratios and their quartiles. Peers are timed where they are installed (extra ``bench``).
The rows without an update tell where the time goes.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import common
from benchmarks.common import Contender, Row
from benchmarks.models import STUDENTS, losses_of
from distill_optim import DOTSGD, DOTAdamW, MoKDAdamW, MoKDSGD

Step = Callable[[], object]


def contenders(student: Callable[[], nn.Module], k: int, options: argparse.Namespace) -> list[Contender]:
    device, dtype = options.device, options.dtype
    x = torch.randn(options.batch, 3, 32, 32, device=device, dtype=dtype)

    def model() -> nn.Module:
        torch.manual_seed(0)
        return student().to(device, dtype)

    def passes(backward: bool) -> Step:
        net = model()

        def step() -> None:
            losses = losses_of(net(x), k)
            net.zero_grad()
            for i, loss in enumerate(losses if backward else []):
                loss.backward(retain_graph=i < k - 1)

        return step

    def plain(total: bool, make: Any = torch.optim.SGD, **options: Any) -> Step:
        net = model()
        optimizer = make(net.parameters(), lr=1e-3, **options)

        def step() -> None:
            optimizer.zero_grad()
            losses = losses_of(net(x), k)
            if total:
                torch.stack(losses).sum().backward()
            else:
                for i, loss in enumerate(losses):
                    loss.backward(retain_graph=i < k - 1)
            optimizer.step()

        return step

    def batched() -> Step:
        net = model()
        params = list(net.parameters())
        optimizer = torch.optim.SGD(params, lr=1e-3, momentum=0.9)

        def step() -> None:
            losses = torch.stack(losses_of(net(x), k))
            each = torch.autograd.grad(losses, params, torch.eye(k).to(losses), is_grads_batched=True)
            for p, gradients in zip(params, each, strict=True):
                p.grad = gradients.sum(0)
            optimizer.step()

        return step

    def ours(
        make: Any, through: bool = False, two_phases: bool = False, observed: bool = False, **options: Any
    ) -> Step:
        net = model()
        optimizer = make(net.parameters(), lr=1e-3, losses=k, **options)

        def step() -> None:
            optimizer.zero_grad()
            logits = net(x)
            if two_phases:
                optimizer.backward(losses_of(logits, k))
                optimizer.step()
            else:
                optimizer.step(losses_of(logits, k), through=logits if through else None)
            if observed:
                with torch.no_grad():
                    optimizer.observe(losses_of(net(x), k))

        return step

    heavy: dict[str, Any] = {"momentum": 0.9}
    steps = {
        "forward, K backward passes, SGD": plain(False, **heavy),
        "forward alone": passes(False),
        "forward, K backward passes, no update": passes(True),
        "forward, one batched pass, SGD": batched(),
        "summed loss, SGD": plain(True, **heavy),
        "DOTSGD": ours(DOTSGD, **heavy),
        "DOTSGD, fused": ours(DOTSGD, fused=True, **heavy),
        "DOTSGD, folded": ours(DOTSGD, fold=True, **heavy),
        "DOTAdamW": ours(DOTAdamW),
        "MoKDSGD": ours(MoKDSGD, **heavy),
        "MoKDSGD, backward then step": ours(MoKDSGD, two_phases=True, **heavy),
        "MoKDAdamW": ours(MoKDAdamW),
        "MoKDSGD, through=logits": ours(MoKDSGD, through=True, **heavy),
        "MoKDSGD, 4 steps of every=4": fourfold(ours(MoKDSGD, every=4, **heavy)),
        "MoKDSGD, famo": ours(MoKDSGD, combine="famo", **heavy),
        "MoKDSGD, famo, observe": ours(MoKDSGD, observed=True, combine="famo", **heavy),
    }
    return [Contender(name, step) for name, step in (steps | peers(k, x, model)).items()]


def fourfold(step: Step) -> Step:
    def four() -> None:
        for _ in range(4):
            step()

    return four


def peers(k: int, x: Tensor, model: Callable[[], nn.Module]) -> dict[str, Step]:
    found: dict[str, Step] = {}
    try:
        from torchjd.aggregation import MGDA, UPGrad
        from torchjd.autojac import backward, jac_to_grad
    except ImportError:
        pass
    else:

        def torchjd(aggregator: Any, chunk: int | None) -> Step:
            net = model()
            optimizer = torch.optim.SGD(net.parameters(), lr=1e-3, momentum=0.9)
            params = list(net.parameters())

            def step() -> None:
                optimizer.zero_grad()
                backward(losses_of(net(x), k), parallel_chunk_size=chunk)
                jac_to_grad(params, aggregator)
                optimizer.step()

            return step

        found["TorchJD MGDA, SGD"] = torchjd(MGDA(), None)
        found["TorchJD MGDA, chunk 1, SGD"] = torchjd(MGDA(), 1)
        found["TorchJD UPGrad, chunk 1, SGD"] = torchjd(UPGrad(), 1)
    try:
        from pytorch_optimizer import PCGrad
    except ImportError:
        pass
    else:
        net = model()
        pcgrad: Any = PCGrad(torch.optim.SGD(net.parameters(), lr=1e-3, momentum=0.9))

        def step() -> None:
            pcgrad.zero_grad()
            pcgrad.pc_backward(losses_of(net(x), k))
            pcgrad.step()

        found["pytorch_optimizer PCGrad, SGD"] = step
    return found


def measure(student: str, k: int, options: argparse.Namespace) -> list[Row]:
    running = common.pick(contenders(STUDENTS[student], k, options), options)
    taken = common.race(running, options.device, options.rounds, warm_up=4)
    rows = common.rows_of({"student": student, "K": k}, running, taken, common.references(running, options))
    common.profile(running, options, f"{student}, K = {k}")
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    parser = common.parser(__doc__, rounds=40)
    parser.add_argument("--students", nargs="+", default=["conv"], choices=STUDENTS, metavar="STUDENT",
                        help=f"{', '.join(STUDENTS)}")  # fmt: skip
    parser.add_argument("--losses", type=int, nargs="+", default=[2, 4, 8], help="numbers of losses K")
    parser.add_argument("--batch", type=int, default=32, help="images in a batch")
    options = common.parse(parser, arguments)
    rows: list[Row] = []
    for student in options.students:
        found = [row for k in options.losses for row in measure(student, k, options)]
        common.compare(student, found)
        rows += found
    common.finish(rows, options, lambda row: f"{row['student']}, K = {row['K']}", rows[0]["contender"])


if __name__ == "__main__":
    main()
