"""What the project set out to reach, measured: one line per goal.

    python -m benchmarks goals
    python -m benchmarks goals --device cuda

Each is a ratio within one run, of the medians of the rounds, with quartiles. What needs a GPU says "not measured"
without one. Words are numbers that an update has to read and write per parameter at least.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch

from benchmarks import common, memory, resolve, step, train
from benchmarks.common import Contender, Row
from benchmarks.models import STUDENTS, losses_of, shapes_of
from distill_optim import DOTSGD, DOTAdamW, MoKDAdamW, MoKDSGD


class Goal(NamedTuple):
    """A line of the table.

    Attributes:
        what: what is measured.
        goal: the bound, in words, such as "≤ 2.2".
        values: median and quartiles, or the number alone; None where it was not measured.
        reached: whether the median keeps to the bound.
    """

    what: str
    goal: str
    values: Sequence[float] | None
    reached: bool | None


def at_most(what: str, bound: float, values: Sequence[float]) -> Goal:
    return Goal(what, f"≤ {bound:g}", values, values[0] <= bound)


def at_least(what: str, bound: float, values: Sequence[float]) -> Goal:
    return Goal(what, f"≥ {bound:g}", values, values[0] >= bound)


def with_(options: argparse.Namespace, **changed: Any) -> argparse.Namespace:
    return argparse.Namespace(**{**vars(options), "compile": False, "methods": ["min_norm"], "batch": 32, **changed})


def ratio(rows: Sequence[Row], contender: str, to: str) -> list[float]:
    found: list[float] = next(row for row in rows if row["contender"] == contender)["ratios"][to]
    return found


def inverse(values: Sequence[float]) -> list[float]:
    middle, low, high = values
    return [1 / middle, 1 / high, 1 / low]


# ---------------------------------------------------------------- on any device


def updates(options: argparse.Namespace) -> Iterator[Goal]:
    ours, sgd, bare, authors = (
        "DOTSGD update, fused",
        "torch SGD on the sum, fused",
        "K bare fused SGD calls",
        "the DOT authors' loop",
    )
    for name, times in ("54", 2.5), ("330", 5), ("1600", 10):
        rows = step.measure(name, 2, with_(options, only=[ours], against=[authors]))
        if name == "330":
            yield at_most("DOTSGD's fused update of torch's fused SGD, 330 tensors", 2.2, ratio(rows, ours, sgd))
        faster = inverse(ratio(rows, ours, authors))
        yield at_least(f"times faster than the DOT authors' loop, {name} tensors", times, faster)
    rows = step.measure("huge", 2, with_(options, only=[ours], against=[bare], rounds=min(options.rounds, 8)))
    yield at_most("DOTSGD's fused update of two bare fused calls, 50 M elements", 1.1, ratio(rows, ours, bare))


def steps(options: argparse.Namespace) -> Iterator[Goal]:
    plain, summed, torchjd = "forward, K backward passes, SGD", "summed loss, SGD", "TorchJD MGDA, SGD"
    ours, through = ["DOTSGD", "MoKDSGD"], "MoKDSGD, through=logits"
    for k, bound in (2, 0.85), (4, 0.75), (8, 0.7):
        rows = train.measure("conv", k, with_(options, only=[*ours, through], against=[summed, torchjd]))
        for name in ours:
            yield at_most(
                f"{name}'s step of forward, K backward passes and SGD, K = {k}", 1.02, ratio(rows, name, plain)
            )
            yield at_most(f"{name}'s step of TorchJD's with MGDA, K = {k}", bound, ratio(rows, name, torchjd))
        if k != 4:
            limit = 1.1 if k == 2 else 1.25
            yield at_most(f"the step with through= of the summed loss's, K = {k}", limit, ratio(rows, through, summed))


def resolved(options: argparse.Namespace) -> Iterator[Goal]:
    rows = resolve.measure("1x10000000", 2, with_(options, only=["gram and min_norm"], against=["norms of all"]))
    values = ratio(rows, "gram and min_norm", "norms of all")
    yield at_most("Gram matrix and weights of reading both gradients once, 10 M, K = 2", 3, values)


def peaks(options: argparse.Namespace) -> Iterator[Goal]:
    for k in 2, 8:
        rows = {
            row["contender"]: row["beyond"]
            for row in memory.measure("vit", k, with_(options, only=["DOT", "MoKD"], batch=2))
        }
        for name in "DOTSGD", "MoKDSGD", "DOTAdamW", "MoKDAdamW":
            yield at_most(f"{name}'s peak beyond the summed step's, in gradient sets, K = {k}", k, [rows[name]])
        yield at_most(f"the same of DOTSGD(fold=True), K = {k}", 0, [rows["DOTSGD, folded"]])


# ---------------------------------------------------------------- on a CUDA device


def bandwidth(options: argparse.Namespace) -> Iterator[Goal]:
    only = ["DOTSGD update, fused", "MoKDSGD update, fused"]
    rows = step.measure("100x1000000", 2, with_(options, only=only, against=[]))
    share = {row["contender"]: [row["of a copy"]] for row in rows}
    yield at_least("DOTSGD's fused update, 8 words at a copy's speed, 100 M", 0.85, share[only[0]])
    yield at_least("MoKDSGD's fused update, 2K + 4 words at a copy's speed, 100 M", 0.75, share[only[1]])


def waiting(options: argparse.Namespace) -> Iterator[Goal]:
    for cls in DOTSGD, MoKDSGD, DOTAdamW, MoKDAdamW:
        run = small_step(cls, options.device)
        run()
        torch.cuda.set_sync_debug_mode("error")
        waits = 0
        try:
            run()
        except RuntimeError:
            waits = 1
        finally:
            torch.cuda.set_sync_debug_mode("default")
        yield at_most(f"host synchronisations in a step of {cls.__name__}", 0, [waits])


def launches(options: argparse.Namespace) -> Iterator[Goal]:
    counts = []
    for tensors in 50, 1600:
        gradients = step.Gradients(shapes_of(f"{tensors}x64"), 2, options.device, options.dtype)
        optimizer = DOTSGD(gradients.params, lr=1e-6, momentum=0.9, fused=True)
        update = step.update("", optimizer, gradients, 8)
        for _ in range(3):
            prepared(update)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as trace:
            prepared(update)
            torch.cuda.synchronize(options.device)
        counts.append(sum(event.device_type == torch.profiler.DeviceType.CUDA for event in trace.events()))
    yield at_most("kernel launches of DOTSGD's fused update, 1600 tensors of 50", 1, [counts[1] / counts[0]])


def captured(options: argparse.Namespace) -> Iterator[Goal]:
    for cls in DOTSGD, MoKDSGD, DOTAdamW, MoKDAdamW:
        eager, body = small_step(cls, options.device), small_step(cls, options.device)
        side = torch.cuda.Stream(options.device)
        side.wait_stream(torch.cuda.current_stream(options.device))
        with torch.cuda.stream(side):
            for _ in range(3):
                body()
        torch.cuda.current_stream(options.device).wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            body()
        running = [Contender("eager", eager), Contender("captured", graph.replay)]
        taken = common.race(running, options.device, options.rounds)
        faster = list(common.ratios(taken, "eager", "captured"))
        yield at_least(f"times faster a captured step of {cls.__name__}, small student", 3, faster)


def small_step(cls: Any, device: torch.device) -> Callable[[], None]:
    net = STUDENTS["mlp"]().to(device)
    options: dict[str, Any] = {"momentum": 0.9} if issubclass(cls, torch.optim.SGD) else {"capturable": True}
    optimizer = cls(net.parameters(), lr=1e-3, fused=True, **options)
    x = torch.randn(32, 3, 32, 32, device=device)

    def run() -> None:
        optimizer.zero_grad()
        optimizer.step(losses_of(net(x), 2))

    return run


def prepared(contender: Contender) -> None:
    if contender.prepare is not None:
        contender.prepare()
    contender.run()


ANYWHERE = [updates, steps, resolved, peaks]
CUDA = {
    bandwidth: "fused updates at 100 M parameters, of a copy's speed",
    waiting: "host synchronisations in a step",
    launches: "kernel launches as tensors grow from 50 to 1600",
    captured: "a captured step beside an eager one",
}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = common.parser(__doc__, rounds=25)
    options = common.parse(parser, arguments)
    if options.plot or options.against or options.profile:
        parser.error("--plot, --against, --profile: those are for the other commands, one per measurement")
    heads = ["what", "measured", "goal", "reached"]
    print(f"| {' | '.join(heads)} |\n| {' | '.join(['---'] * len(heads))} |", flush=True)
    rows: list[Row] = []

    def report(goal: Goal) -> None:
        measured = (
            "not measured"
            if goal.values is None
            else common.number(goal.values)
            if len(goal.values) == 3
            else f"{goal.values[0]:.2f}"
        )
        reached = {True: "yes", False: "no", None: ""}[goal.reached]
        print(f"| {goal.what} | {measured} | {goal.goal} | {reached} |", flush=True)
        rows.append(goal._asdict())

    def wanted(text: str) -> bool:
        return not options.only or any(part.lower() in text.lower() for part in options.only)

    for measure in ANYWHERE:
        if wanted(measure.__name__):
            for goal in measure(options):
                report(goal)
    for measure, what in CUDA.items():
        if not wanted(measure.__name__):
            continue
        if options.device.type != "cuda":
            report(Goal(what, "", None, None))
            continue
        for goal in measure(options):
            report(goal)
    common.finish(rows, options, lambda row: row["what"], "")


if __name__ == "__main__":
    main()
