"""Studies: what the optimizers make of small problems, each with its rivals tuned alike.

    python -m benchmarks studies dot
    python -m benchmarks studies mokd --quick
    python -m benchmarks studies three --workers 8

Every learning rate, and whatever else a method leaves open, is chosen on a validation split, with seeds that the table
does not have. A study that was stopped goes on where it was.
"""

from __future__ import annotations

import argparse
import importlib
import json
from collections.abc import Sequence
from pathlib import Path

from benchmarks.studies import harness

# A study is a module here, with a function ``study(quick)``.
STUDIES = {
    "dot": "DOT's trade-off between the two losses: digits, and a language model of characters",
    "mokd": "MoKD's conflict and dominance, its ablation, its cheaper ways, wrong labels",
    "kd4mtl": "distillation for multi-task learning, beside ways to weigh the tasks",
    "three": "three losses: task, logits and features",
}


def load(name: str, *, quick: bool = False) -> harness.Study:
    made: harness.Study = importlib.import_module(f"benchmarks.studies.{name}").study(quick=quick)
    return made


def main(arguments: Sequence[str] | None = None) -> None:
    width = max(map(len, STUDIES))
    listed = "\n".join(f"  {name:{width}}  {what}" for name, what in STUDIES.items())
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks studies",
        description=f"{__doc__}\nstudies:\n{listed}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("study", choices=STUDIES, metavar="STUDY", help="one of the above")
    parser.add_argument("--quick", action="store_true", help="two seeds and few steps: no results, but the same code")
    parser.add_argument("--workers", type=int, default=1, help="processes, of one thread each")
    parser.add_argument("--out", type=Path, default=Path("studies"), help="folder of what is written")
    options = parser.parse_args(arguments)

    study = load(options.study, quick=options.quick)
    options.out.mkdir(parents=True, exist_ok=True)
    log = harness.Log(options.out / f"{study.name}.runs.jsonl")
    results = harness.carry_out(study, log, options.workers)
    (options.out / f"{study.name}.json").write_text(json.dumps(results, ensure_ascii=False) + "\n", "utf-8")
    study.draw(results).savefig(options.out / f"{study.name}.png", dpi=150)
    for key, experiment in study.experiments.items():
        print("", experiment.title, *harness.tables(study, key, results["experiments"][key]), sep="\n\n")
