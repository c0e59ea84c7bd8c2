"""The command line: ``python -m distill_optim demo`` and ``diagnose``, installed as ``distill-optim``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import torch

from .demo import train
from .monitor import History, diagnose

# What the demo needs beyond the package's own dependencies, and the name under which pip knows it.
DEMO_EXTRA = {"sklearn": "scikit-learn", "matplotlib": "matplotlib", "rich": "rich"}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status."""
    options = make_parser().parse_args(argv)
    try:
        status: int = options.run(options)
        return status
    except KeyboardInterrupt:
        print("interrupted: nothing was written", file=sys.stderr)
        return 130


def make_parser() -> argparse.ArgumentParser:
    usual = train.Settings()
    parser = argparse.ArgumentParser(
        prog="distill-optim", description="Optimizers that keep the gradient of each loss apart."
    )
    commands = parser.add_subparsers(required=True, metavar="command")
    command = commands.add_parser(
        "demo",
        help="train a small student on digits with every optimizer and compare them",
        description="Train a teacher on scikit-learn's digits, then a much smaller student on noisy labels, "
        "once per optimizer and seed. Prints a table; writes results.json and curves.png.",
    )
    command.set_defaults(run=demo)
    add = command.add_argument
    add("--seeds", type=positive, help=f"students per optimizer (default: {usual.seeds})")
    add("--epochs", type=positive, help=f"epochs of every student (default: {usual.epochs})")
    add("--label-noise", type=share, help=f"share of wrong training labels (default: {usual.label_noise})")
    add("--device", type=device, help=f"where to train (default: {usual.device})")
    add(
        "--optimizers",
        type=keys,
        metavar="KEYS",
        help=f"some of {','.join(train.recipes(usual))}, or all (default: {','.join(train.USUAL)})",
    )
    add(
        "--out",
        type=folder,
        default=Path("distill-optim-demo"),
        help="output folder (default: %(default)s)",
    )
    add(
        "--quick",
        action="store_true",
        help="a run of seconds, to see that it works; its numbers mean nothing",
    )
    command = commands.add_parser(
        "diagnose",
        help="say what the losses of a recorded run do to each other",
        description="Prints advice on a run from the JSON lines that a distill_optim.monitor.Monitor wrote.",
    )
    command.set_defaults(run=advise)
    command.add_argument("file", type=Path, metavar="FILE.jsonl", help="what monitor.write_json_lines wrote")
    return parser


def advise(options: argparse.Namespace) -> int:
    """Print what a monitor's file says."""
    try:
        print(diagnose(History.read_json_lines(options.file)))
    except (OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


def demo(options: argparse.Namespace) -> int:
    """Train, print, write. Files come last and whole, so that an interrupt leaves none behind."""
    if missing := [package for module, package in DEMO_EXTRA.items() if find_spec(module) is None]:
        print(f'the demo needs {", ".join(missing)}: pip install "distill_optim[demo]"', file=sys.stderr)
        return 2

    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from .demo import report

    given = {name: getattr(options, name) for name in ("seeds", "epochs", "label_noise", "device")}
    settings = replace(train.Settings(), **(train.QUICK if options.quick else {}))
    settings = replace(settings, **{name: value for name, value in given.items() if value is not None})
    rows = options.optimizers or list(train.USUAL)

    console = Console(stderr=True)
    columns = TextColumn("{task.description:<22}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("teacher", total=train.count_runs(settings, rows))
        study = train.study(settings, rows, lambda label: progress.update(task, advance=1, description=label))
    Console().print(report.report(study))
    try:
        written = report.write(study, options.out)
    except OSError as error:
        print(f"cannot write the results: {error}", file=sys.stderr)
        return 1
    print(f"\nwritten: {', '.join(map(str, written))}")
    return 0


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is less than 1")
    return value


def share(text: str) -> float:
    value = float(text)
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"{text} is outside [0, 1)")
    return value


def keys(text: str) -> list[str]:
    """Rows of the table, in its order, each once."""
    known = list(train.recipes(train.Settings()))
    asked = known if text == "all" else [key.strip() for key in text.split(",")]
    if unknown := [key for key in asked if key not in known]:
        raise argparse.ArgumentTypeError(f"unknown {', '.join(map(repr, unknown))}; known are {','.join(known)}")
    return [key for key in known if key in asked]


def device(text: str) -> str:
    try:
        torch.zeros(1, device=text).item()  # reading it back rules out "meta"
    except (RuntimeError, AssertionError) as error:  # no such device, or not in this build of torch
        raise argparse.ArgumentTypeError(f"cannot use {text!r}: {str(error).splitlines()[0]}") from None
    return text


def folder(text: str) -> Path:
    path = Path(text)
    if path.exists() and not path.is_dir():  # said now, not after minutes of training
        raise argparse.ArgumentTypeError(f"{text} exists and is not a folder")
    return path


if __name__ == "__main__":
    sys.exit(main())
