"""Times and memory of the optimizers beside their peers, each measured in turn in one process.

    python -m benchmarks step --sets resnet18 330 --losses 2 4
    python -m benchmarks train --losses 2 4 8 --json train.json --plot train.png
    python -m benchmarks studies dot --workers 2
    python -m benchmarks COMMAND --help

No time of these is a test: a number means something beside another one of the same run.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

# A command is a module here, with a ``main`` that takes its arguments.
COMMANDS = {
    "step": "the update alone, from gradients that are there",
    "resolve": "Gram matrix and weights, beside the norm of a gradient",
    "train": "whole training steps",
    "activation_gram": "the Gram matrix from activation gradients, in place of K weight gradients",
    "monitor": "what a monitor costs",
    "memory": "peak memory of a training step, in sets of gradients",
    "distributed": "training steps of several processes under DistributedDataParallel",
    "goals": "what the project set out to reach, one line each",
    "combine": "every combination method: time, host reads, distance from the exact direction",
    "min_norm": "how near min-norm solvers come to the optimum",
    "studies": "whole trainings, every method tuned alike: what the papers claim, tried out",
    "gallery": "pictures of what every method makes of a few gradients",
    "maths": "pictures of the walk from losses to a step",
}


def main(arguments: Sequence[str] | None = None) -> None:
    # argparse: numbers and names are all the options there are, and it is nothing more to install.
    width = max(map(len, COMMANDS))
    commands = "\n".join(f"  {name:{width}}  {what}" for name, what in COMMANDS.items())
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description=f"{__doc__}\ncommands:\n{commands}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND", help="one of the above")
    given = list(sys.argv[1:] if arguments is None else arguments)
    command = parser.parse_args(given[:1]).command
    importlib.import_module(f"benchmarks.{command}").main(given[1:])


if __name__ == "__main__":
    main()
