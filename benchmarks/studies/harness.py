"""What every study has: settings chosen on a validation split, seeds, paired differences, and a file to go on from."""

from __future__ import annotations

import functools
import itertools
import json
import math
import multiprocessing
import platform
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median
from typing import Any

import torch
from matplotlib.figure import Figure
from tqdm import tqdm

from distill_optim.demo.report import finite, mean_and_error, number
from distill_optim.demo.train import TUNING_SEED, one_thread

# Plain numbers, strings, lists and mappings of them: as JSON they are what a run is known by.
Options = dict[str, Any]

# What a run measures: numbers, and lists of numbers for curves.
Measures = dict[str, Any]

# What a study comes to, as it stands in its JSON file.
Results = dict[str, Any]


@dataclass(frozen=True)
class Row:
    """One method, a line of the table.

    Attributes:
        label: how the table calls it.
        options: what ``train`` is given for it.
        grid: values by option, from whose combinations the validation split chooses.
    """

    label: str
    options: Options
    grid: Mapping[str, Sequence[Any]]

    def points(self) -> list[Options]:
        """All combinations of the grid."""
        return [dict(zip(self.grid, values, strict=True)) for values in itertools.product(*self.grid.values())]


@dataclass(frozen=True)
class Column:
    """A measure as the table shows it: its name, the header, a factor such as 100 for percents, and the format."""

    measure: str
    header: str
    factor: float = 1
    spec: str = ".2f"


@dataclass(frozen=True)
class Experiment:
    """Methods on one problem: a table.

    Attributes:
        title: of the table.
        problem: what ``prepare`` is given.
        prepare: makes what the runs of one seed share, such as data and teacher, of ``(problem, seed)``. Found again by
            its name in other processes, as ``train`` is.
        train: one run, of ``(prepared, options, seed, final)``. Its measures need ``"validation"``, higher is better.
            Only with ``final`` may it look at the test split.
        rows: the methods by key.
        columns: the measures that the table shows; of the first ones, ``compared``, the differences to the baselines.
        baselines: keys of rows.
        seeds: 0, 1, … of the final runs.
        tuning_seeds: how many others choose from the grid.
        compared: how many columns are compared with the baselines.
    """

    title: str
    problem: Options
    prepare: Callable[[Options, int], Any]
    train: Callable[[Any, Options, int, bool], Measures]
    rows: Mapping[str, Row]
    columns: Sequence[Column]
    baselines: Sequence[str]
    seeds: int = 10
    tuning_seeds: int = 3
    compared: int = 1


@dataclass(frozen=True)
class Study:
    """Experiments by key, how their results are drawn, and what else there is to say of one, in Markdown."""

    name: str
    experiments: Mapping[str, Experiment]
    draw: Callable[[Results], Figure]
    remark: Callable[[Results], str] | None = None


# ---------------------------------------------------------------- one run


@dataclass(frozen=True)
class Job:
    """One training, which another process can do."""

    prepare: Callable[[Options, int], Any]
    train: Callable[[Any, Options, int, bool], Measures]
    problem: Options
    options: Options
    seed: int
    final: bool

    @property
    def key(self) -> str:
        """What the run is known by: two rows that ask for the same run share it."""
        made = f"{self.train.__module__}.{self.train.__qualname__}"
        return canonical([made, self.problem, self.options, self.seed, self.final])


def canonical(value: Any) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"))


@functools.lru_cache(maxsize=32)
def _prepared(prepare: Callable[[Options, int], Any], problem: str, seed: int) -> Any:
    return prepare(json.loads(problem), seed)


def run(job: Job) -> Measures:
    """The measures, and the seconds of processor time that the training took, which other processes do not stretch."""
    prepared = _prepared(job.prepare, canonical(job.problem), job.seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(job.seed)  # for methods that draw, such as PCGrad
        start = time.process_time()
        measures = job.train(prepared, job.options, job.seed, job.final)
        return {**measures, "seconds": time.process_time() - start}


# ---------------------------------------------------------------- all runs


class Log:
    """Finished runs, one line of JSON each, so that a study that was stopped goes on where it was."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.runs: dict[str, Measures] = {}
        if path.exists():
            text = path.read_text("utf-8")
            whole = text[: text.rfind("\n") + 1]  # a process that was killed may have left half a line
            if whole != text:
                path.write_text(whole, "utf-8")
            self.runs = dict(json.loads(line) for line in whole.splitlines())

    def add(self, key: str, measures: Measures) -> None:
        # Both as one will read them, so that a study that went on says the same.
        line = json.dumps([key, finite(measures)])
        self.runs[key] = json.loads(line)[1]
        with self.path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")


def _finished(jobs: Mapping[str, Job], workers: int) -> Iterator[tuple[str, Measures]]:
    """The runs as they end; each on one thread, because networks this small gain nothing from more."""
    if workers == 1:
        with one_thread():
            for key, job in jobs.items():
                yield key, run(job)
        return
    # Not forked: torch's threads would not survive that.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, torch.set_num_threads, (1,)) as pool:
        keys = {pool.submit(run, job): key for key, job in jobs.items()}
        try:
            for future in as_completed(keys):
                yield keys[future], future.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def execute(jobs: Iterable[Job], log: Log, workers: int, what: str) -> None:
    """All the runs that the log does not have."""
    missing = {job.key: job for job in jobs if job.key not in log.runs}
    for key, measures in tqdm(_finished(missing, workers), what, len(missing), unit="run", disable=not missing):
        log.add(key, measures)


def jobs_of(experiment: Experiment, options: Options, *, final: bool) -> list[Job]:
    """The runs of one method at one point of its grid: to choose, or for the table. They have no seed in common."""
    first, count = (0, experiment.seeds) if final else (TUNING_SEED, experiment.tuning_seeds)
    return [
        Job(experiment.prepare, experiment.train, experiment.problem, options, seed, final)
        for seed in range(first, first + count)
    ]


def tuning_runs(experiment: Experiment, row: Row, log: Log) -> list[tuple[Options, list[Measures]]]:
    """Every point of a row's grid, with its runs on the tuning seeds."""
    return [
        (point, [log.runs[job.key] for job in jobs_of(experiment, {**row.options, **point}, final=False)])
        for point in row.points()
    ]


def choose(experiment: Experiment, row: Row, log: Log) -> Options:
    """The point of the grid with the best mean on the validation split, the first of equals."""

    def score(runs: Sequence[Measures]) -> float:
        values = [run["validation"] for run in runs]
        return -math.inf if None in values else fmean(values)  # one that is not finite is no choice

    return max(tuning_runs(experiment, row, log), key=lambda tuned: score(tuned[1]))[0]


def carry_out(study: Study, log: Log, workers: int) -> Results:
    """All runs of a study that are still to be done, then its results."""
    experiments = study.experiments.values()
    tuning = [
        job
        for experiment in experiments
        for row in experiment.rows.values()
        for point in row.points()
        for job in jobs_of(experiment, {**row.options, **point}, final=False)
    ]
    execute(tuning, log, workers, "choosing")
    final = [
        job
        for experiment in experiments
        for row in experiment.rows.values()
        for job in jobs_of(experiment, {**row.options, **choose(experiment, row, log)}, final=True)
    ]
    execute(final, log, workers, "final runs")
    used = {job.key for job in (*tuning, *final)}
    return {
        "study": study.name,
        "about": {
            "machine": platform.machine(),
            "processor": processor(),
            "python": platform.python_version(),
            "torch": torch.__version__,
            "runs": len(used),
            "seconds": rounded(sum(log.runs[key]["seconds"] for key in used)),
        },
        "experiments": {key: summary(experiment, log) for key, experiment in study.experiments.items()},
    }


def processor() -> str:
    """The model, on which the last digits depend."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text("utf-8").splitlines() if info.exists() else []
    return next((line.split(": ", 1)[1] for line in lines if line.startswith("model name")), platform.processor())


# ---------------------------------------------------------------- results


def rounded(value: Any) -> Any:
    """Six digits, and null for what is not finite."""
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [rounded(item) for item in value]
    return finite(float(f"{value:.6g}")) if isinstance(value, float) else value


def values(runs: Iterable[Measures], measure: str) -> list[float]:
    return [_float(run[measure]) for run in runs]


def _float(value: float | None) -> float:
    return math.nan if value is None else value


def paired(runs: Sequence[Measures], others: Sequence[Measures], measure: str) -> tuple[float, float]:
    """Mean of the differences, seed by seed, and its standard error."""
    pairs = zip(values(runs, measure), values(others, measure), strict=True)
    return mean_and_error([a - b for a, b in pairs])


def summary(experiment: Experiment, log: Log) -> Results:
    """An experiment's results: per row the choice and how it came about, and the final runs."""
    chosen = {key: choose(experiment, row, log) for key, row in experiment.rows.items()}
    runs = {
        key: [log.runs[job.key] for job in jobs_of(experiment, {**row.options, **chosen[key]}, final=True)]
        for key, row in experiment.rows.items()
    }
    rows = {}
    for key, row in experiment.rows.items():
        first = runs[key][0]
        numbers = [name for name, value in first.items() if not isinstance(value, list) and name != "seconds"]
        curves = {name: len(value) for name, value in first.items() if isinstance(value, list)}
        tuned = tuning_runs(experiment, row, log)
        scores = [name for name in numbers if name in tuned[0][1][0]]
        rows[key] = {
            "label": row.label,
            "options": row.options,
            "chosen": chosen[key],
            "at_border": at_border(row, chosen[key]),
            "grid": [{**point, **{name: fmean(values(at, name)) for name in scores}} for point, at in tuned],
            # Of the runs that choose: they look at nothing on the way, and there are more of them.
            "seconds": median(run["seconds"] for _, at in tuned for run in at),
            "mean": {name: mean_and_error(values(runs[key], name)) for name in numbers},
            "per_seed": {name: values(runs[key], name) for name in numbers},
            "difference": {
                base: {name: paired(runs[key], runs[base], name) for name in numbers}
                for base in experiment.baselines
                if base != key
            },
            "curves": {
                name: [fmean(_float(run[name][n]) for run in runs[key]) for n in range(length)]
                for name, length in curves.items()
            },
        }
    found: Results = rounded(
        {
            "title": experiment.title,
            "problem": experiment.problem,
            "seeds": experiment.seeds,
            "tuning_seeds": experiment.tuning_seeds,
            "rows": rows,
        }
    )
    return found


def at_border(row: Row, chosen: Options) -> bool:
    """Whether a learning rate was chosen beside which the grid ends, so that another might do better."""
    rates = row.grid.get("lr", ())
    return len(rates) > 1 and chosen["lr"] in (min(rates), max(rates))


def table(experiment: Experiment, found: Results) -> str:
    """An experiment's results in Markdown: mean ± standard error over the seeds, and what was chosen."""
    first = found["rows"][experiment.baselines[0]]
    lines = [["", *(column.header for column in experiment.columns), "chosen", "time"]]
    for row in found["rows"].values():
        star = "*" * row["at_border"]
        chosen = ", ".join(f"{name} {shown(value)}{star * (name == 'lr')}" for name, value in row["chosen"].items())
        time = row["seconds"] / first["seconds"]
        cells = [cell(row["mean"].get(column.measure), column) for column in experiment.columns]
        lines.append([row["label"], *cells, chosen, f"{time:.2f}×"])
    return markdown(lines)


def difference_table(experiment: Experiment, found: Results, base: str) -> str:
    """Differences to a baseline in Markdown, paired by seed: mean ± standard error."""
    compared = experiment.columns[: experiment.compared]
    lines = [[f"against {experiment.rows[base].label}", *(column.header for column in compared)]]
    for key, row in found["rows"].items():
        if key != base:
            pairs = (row["difference"][base].get(column.measure) for column in compared)
            lines.append([row["label"], *map(functools.partial(cell, sign="+"), pairs, compared)])
    return markdown(lines)


def tables(study: Study, key: str, found: Results) -> list[str]:
    """All that is printed of an experiment."""
    experiment = study.experiments[key]
    made = [table(experiment, found), *(difference_table(experiment, found, base) for base in experiment.baselines)]
    return [*made, study.remark(found)] if study.remark else made


def markdown(lines: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(line)} |" for line in (lines[0], ["---"] * len(lines[0]), *lines[1:]))


def cell(pair: Sequence[float | None] | None, column: Column, sign: str = "") -> str:
    """Mean ± standard error of a measure, a dash where there is none."""
    if pair is None:
        return number(math.nan, "")
    mean, error = (column.factor * _float(value) for value in pair)
    return f"{number(mean, sign + column.spec)} ± {number(error, column.spec)}"


def shown(value: Any) -> str:
    if isinstance(value, list):
        return " : ".join(map(shown, value))
    return f"{value:g}" if isinstance(value, (int, float)) else str(value)
