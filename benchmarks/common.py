"""What all measurements share: options, the clock, tables, JSON, plots and profiles."""

from __future__ import annotations

import argparse
import gc
import json
import platform
import re
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

Row = dict[str, Any]


@dataclass(frozen=True)
class Contender:
    """Something that takes time.

    Attributes:
        name: how the table calls it.
        run: what is timed.
        prepare: what is done before each run, outside the clock.
        words: numbers per parameter that this work has to read and write at least; for GB/s.
    """

    name: str
    run: Callable[[], object]
    prepare: Callable[[], object] | None = None
    words: float | None = None


def parser(description: str | None, *, rounds: int) -> argparse.ArgumentParser:
    """With the options that every measurement has."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    made.add_argument("--dtype", default="float32", choices=["float32", "float64", "bfloat16", "float16"])
    made.add_argument("--threads", type=int, help="of a CPU; default: torch's choice")
    made.add_argument("--rounds", type=int, default=rounds, help="in each, every contender runs once")
    made.add_argument("--only", nargs="+", metavar="TEXT", help="contenders that have one of these in their names")
    made.add_argument("--against", nargs="+", default=[], metavar="TEXT", help="more contenders to give ratios to")
    made.add_argument("--json", type=Path, help="write all numbers to this file")
    made.add_argument("--plot", type=Path, help="draw the ratios into this file (needs matplotlib)")
    made.add_argument("--profile", type=Path, help="folder for a torch.profiler trace of each contender")
    return made


def parse(made: argparse.ArgumentParser, arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options, with the dtype as torch's and the number of threads set."""
    options = made.parse_args(arguments)
    options.dtype = getattr(torch, options.dtype)
    if options.rounds < 2:
        made.error("--rounds: at least 2, for a spread")
    if options.threads:
        torch.set_num_threads(options.threads)
    return options


def pick(contenders: Sequence[Contender], options: argparse.Namespace) -> list[Contender]:
    """Those asked for, and those that ratios are given to; the first always."""
    names = [c.name for c in contenders]
    wanted = {name for text in (options.only or [""]) + options.against for name in _named(text, names)}
    return [c for n, c in enumerate(contenders) if n == 0 or c.name in wanted]


def references(contenders: Sequence[Contender], options: argparse.Namespace) -> list[str]:
    """The first contender, and the first that is called, or has in its name, each text of ``--against``."""
    names = [c.name for c in contenders]
    found = [names[0]]
    for text in options.against:
        named = _named(text, names)
        if not named:
            raise SystemExit(f"--against {text!r}: no contender is called that; there are {', '.join(names)}")
        found.append(named[0])
    return list(dict.fromkeys(found))


def _named(text: str, names: Sequence[str]) -> list[str]:
    """The name that is the text; where there is none, those that contain it."""
    text = text.lower()
    return [name for name in names if name.lower() == text] or [name for name in names if text in name.lower()]


# ---------------------------------------------------------------- the clock


def seconds(contender: Contender, device: torch.device) -> float:
    """Time of one run. By events on a CUDA device, so that what was under way before does not count."""
    if contender.prepare is not None:
        contender.prepare()
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(device)
        start.record()
        contender.run()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / 1e3
    if device.type != "cpu":
        torch.accelerator.synchronize()
    begin = time.perf_counter()
    contender.run()
    if device.type != "cpu":
        torch.accelerator.synchronize()
    return time.perf_counter() - begin


def race(
    contenders: Sequence[Contender],
    device: torch.device,
    rounds: int,
    *,
    refresh: Callable[[], object] | None = None,
    warm_up: int = 3,
) -> dict[str, list[float]]:
    """Seconds of every run: each contender once in every round, so that whatever drifts falls on all alike.

    Args:
        contenders: who runs.
        device: where.
        rounds: how often.
        refresh: called before every round, outside the clock: fresh numbers.
        warm_up: rounds that do not count: buffers are made, kernels chosen, graphs compiled.
    """
    taken: dict[str, list[float]] = {c.name: [] for c in contenders}
    collecting = gc.isenabled()
    gc.disable()
    try:
        for n in range(-warm_up, rounds):
            gc.collect()
            if refresh is not None:
                refresh()
            # From another one on in every round: who runs first finds other things in the caches.
            for c in [*contenders[n % len(contenders) :], *contenders[: n % len(contenders)]]:
                spent = seconds(c, device)
                if n >= 0:
                    taken[c.name].append(spent)
    finally:
        if collecting:
            gc.enable()
    return taken


def spread(numbers: Sequence[float]) -> tuple[float, float, float]:
    """Median and quartiles."""
    low, middle, high = statistics.quantiles(numbers, n=4, method="inclusive")
    return middle, low, high


def ratios(taken: Mapping[str, Sequence[float]], name: str, to: str) -> tuple[float, float, float]:
    """Median and quartiles of the rounds' ratios."""
    return spread([a / b for a, b in zip(taken[name], taken[to], strict=True)])


def rows_of(
    case: Mapping[str, Any], contenders: Sequence[Contender], taken: Mapping[str, Sequence[float]], against: list[str]
) -> list[Row]:
    """One row per contender: what it was measured on, milliseconds, and the ratio to each of the others named."""
    return [
        {
            **case,
            "contender": c.name,
            "milliseconds": [1e3 * t for t in spread(taken[c.name])],
            "ratios": {to: list(ratios(taken, c.name, to)) for to in against},
        }
        for c in contenders
    ]


# ---------------------------------------------------------------- what comes out


def about(options: argparse.Namespace) -> dict[str, Any]:
    """What a reader has to know to compare the numbers with others."""
    device = options.device
    return {
        "torch": torch.__version__,
        "machine": torch.cuda.get_device_name(device) if device.type == "cuda" else processor(),
        "threads": torch.get_num_threads(),
        "device": str(device),
        "dtype": str(options.dtype).removeprefix("torch."),
        "rounds": options.rounds,
    }


def processor() -> str:
    """The name of the CPU."""
    info = Path("/proc/cpuinfo")  # Linux; elsewhere Python knows
    named = re.search(r"^model name\s*: (.+)$", info.read_text("utf-8"), re.M) if info.exists() else None
    return named[1] if named else platform.processor() or platform.machine()


def number(values: Sequence[float], digits: int = 2) -> str:
    """Median with quartiles."""
    middle, low, high = (f"{v:.{digits}f}" for v in values)
    return f"{middle} ({low}–{high})"


def milliseconds(values: Sequence[float]) -> str:
    return number(values, 3 if values[0] < 1 else 2 if values[0] < 100 else 0)


def table(heads: Sequence[str], cells: Sequence[Sequence[str]]) -> str:
    """In Markdown."""
    lines = [heads, ["---"] * len(heads), *cells]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def compare(case: str, rows: Sequence[Row]) -> None:
    """Prints what was measured on one case: a table per ratio, contenders by numbers of losses."""
    counts = list(dict.fromkeys(row["K"] for row in rows))
    names = list(dict.fromkeys(row["contender"] for row in rows))
    for to in rows[0]["ratios"]:
        print(f"\n{case}, relative to “{to}”\n")
        cells = [[name, *(number(row["ratios"][to]) for row in rows if row["contender"] == name)] for name in names]
        print(table(["step", *(f"K = {k}" for k in counts)], cells), flush=True)
    first = [row for row in rows if row["contender"] == names[0]]
    print("\nms of the first row: " + ", ".join(milliseconds(row["milliseconds"]) for row in first))


def finish(rows: list[Row], options: argparse.Namespace, case: Callable[[Row], str], what: str) -> None:
    """Says what was measured on, and writes the JSON and the plot that were asked for.

    Args:
        rows: all that was measured.
        options: the command's.
        case: what a row was measured on, in words: a group of bars.
        what: name of the ratio that is drawn, after "relative to".
    """
    known = about(options)
    print("\n" + ", ".join(f"{key} {value}" for key, value in known.items()))
    if options.json:
        options.json.write_text(json.dumps({"about": known, "rows": rows}, indent=1) + "\n", "utf-8")
    if options.plot:
        draw(rows, options.plot, case, what)


def draw(rows: Sequence[Row], path: Path, case: Callable[[Row], str], what: str) -> None:
    """Bars: the first ratio of every row with its quartiles, a panel per case."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise SystemExit("--plot: it needs matplotlib; pip install matplotlib") from None
    cases = list(dict.fromkeys(map(case, rows)))
    most = max(sum(case(row) == name for row in rows) for name in cases)
    figure = Figure(figsize=(8, len(cases) * (0.25 * most + 0.8)), layout="constrained")
    for axes, name in zip(figure.subplots(len(cases), 1, squeeze=False)[:, 0], cases, strict=True):
        shown = [row for row in rows if case(row) == name]
        values = [next(iter(row["ratios"].values())) for row in shown]
        bars = [v[0] for v in values]
        errors = [[v[0] - v[1] for v in values], [v[2] - v[0] for v in values]]
        axes.barh([row["contender"] for row in shown], bars, xerr=errors, color="#56B4E9", ecolor="0.3")
        axes.axvline(1, color="0.3", linewidth=0.8)
        axes.invert_yaxis()
        axes.set_title(name, fontsize=9)
        axes.tick_params(labelsize=8)
        axes.set_xlabel(f"relative to {what}", fontsize=8)
    figure.savefig(path, dpi=120)


def profile(contenders: Sequence[Contender], options: argparse.Namespace, case: str) -> None:
    """A trace of each contender, for chrome://tracing or ui.perfetto.dev, and its heaviest operations."""
    if options.profile is None:
        return
    options.profile.mkdir(parents=True, exist_ok=True)
    activities = [torch.profiler.ProfilerActivity.CPU]
    by = "self_cpu_time_total"
    if options.device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
        by = "self_cuda_time_total"
    for c in contenders:
        if c.prepare is not None:
            c.prepare()
        with torch.profiler.profile(activities=activities) as trace:
            c.run()
        path = options.profile / (re.sub(r"\W+", "-", f"{case} {c.name}").strip("-") + ".json")
        trace.export_chrome_trace(str(path))
        print(f"\n{case}, {c.name}: {path}")
        print(trace.key_averages().table(sort_by=by, row_limit=8, max_name_column_width=40))
