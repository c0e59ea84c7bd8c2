"""Study 3: its data, its metrics, and that it says the same twice."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.studies import composites, harness, kd4mtl, load
from benchmarks.studies.composites import BRIGHTNESS, INK, NOISE, REGIONS, TASKS

SIZES = {"train": 200, "validation": 100, "test": 100}
RESULTS = Path(kd4mtl.__file__).parent / "results" / "kd4mtl.json"


@pytest.fixture(scope="module")
def problem() -> kd4mtl.Problem:
    return kd4mtl.prepare({"sizes": SIZES, "steps": 8, "teachers": kd4mtl.TEACHERS}, 0)


# ---------------------------------------------------------------- data


def test_no_digit_is_in_two_splits() -> None:
    splits = composites.load_splits(SIZES, seed=0)
    digits = {name: set(split.rows.flatten().tolist()) for name, split in splits.items()}
    assert not digits["train"] & digits["validation"]
    assert not digits["train"] & digits["test"]
    assert not digits["validation"] & digits["test"]
    assert {name: len(split.images) for name, split in splits.items()} == SIZES


def test_the_answers_are_those_of_the_digits() -> None:
    from sklearn.datasets import load_digits

    labels = torch.as_tensor(load_digits().target)
    for split in composites.load_splits(SIZES, seed=1).values():
        assert torch.equal(split.answers["left"], labels[split.rows[:, 0]])
        assert torch.equal(split.answers["right"], labels[split.rows[:, 1]])


def test_a_digit_is_placed_whole_and_on_its_side() -> None:
    digits = torch.rand(50, 8, 8)
    placed = composites.place(digits, 4, torch.Generator().manual_seed(0))
    corners = set()
    for digit, canvas in zip(digits, placed, strict=True):
        at = [(r, c) for r in range(3) for c in range(4, 7) if torch.equal(canvas[r : r + 8, c : c + 8], digit)]
        assert len(at) == 1
        torch.testing.assert_close(canvas.sum(), digit.sum())  # nothing beside it
        corners.update(at)
    assert len(corners) == 9


def test_a_composite_is_that_of_a_loop_over_pixels() -> None:
    digits, labels = torch.rand(6, 8, 8).square(), torch.arange(6)
    rows = torch.tensor([[0, 1], [2, 3], [4, 5]])
    made = composites.compose(digits, labels, rows, torch.Generator().manual_seed(3))
    again = torch.Generator().manual_seed(3)
    left, right = (composites.place(digits[rows[:, side]], 4 * side, again) for side in (0, 1))
    for n in range(3):
        for r in range(composites.HEIGHT):
            for c in range(composites.WIDTH):
                a, b = float(left[n, r, c]), float(right[n, r, c])
                seen = (a * BRIGHTNESS[0], b * BRIGHTNESS[1])
                assert float(made.answers["clean"][n, r, c]) * NOISE == pytest.approx(max(seen))
                inked = [side for side, own in enumerate((a, b)) if own > INK]
                front = max(inked, key=lambda side: seen[side]) + 1 if inked else 0
                assert made.answers["regions"][n, r, c] == front


def test_the_noise_is_as_said() -> None:
    split = composites.load_splits(SIZES, seed=0)["train"]
    noise = split.images[:, 0] / NOISE - split.answers["clean"]
    # 28,000 draws: the standard error of a mean is 0.006 and of a deviation 0.004.
    assert abs(float(noise.mean())) < 0.03
    assert abs(float(noise.std()) - 1) < 0.02


# ---------------------------------------------------------------- metrics


def test_the_intersection_over_union_is_that_of_sets() -> None:
    output, answer = torch.randn(7, REGIONS, 10, 14), torch.randint(REGIONS, (7, 10, 14))
    found, true = output.argmax(1).flatten().tolist(), answer.flatten().tolist()
    ratios = []
    for region in range(REGIONS):
        a = {pixel for pixel, value in enumerate(found) if value == region}
        b = {pixel for pixel, value in enumerate(true) if value == region}
        ratios.append(len(a & b) / len(a | b))
    assert composites.metric("regions", output, answer) == pytest.approx(sum(ratios) / REGIONS)


def test_accuracy_and_absolute_error() -> None:
    logits = torch.eye(10)[:4]
    assert composites.metric("left", logits, torch.tensor([0, 1, 2, 0])) == 0.75
    clean, output = torch.zeros(2, 10, 14), torch.full((2, 1, 10, 14), -0.5)
    assert composites.metric("clean", output, clean) == 0.5


def test_a_gain_is_positive_where_a_task_got_better() -> None:
    single = {"left": 0.8, "right": 0.5, "regions": 0.5, "clean": 0.4}
    got = composites.gains({"left": 0.88, "right": 0.45, "regions": 0.5, "clean": 0.3}, single)
    assert got == pytest.approx({"left": 10, "right": -10, "regions": 0, "clean": 25})


# ---------------------------------------------------------------- students and teachers


def options(**more: Any) -> harness.Options:
    rows = load("kd4mtl", quick=True).experiments["students"].rows
    row = rows[more.pop("row")]
    return {**row.options, **row.points()[0], **more}


@pytest.mark.parametrize("row", ["uniform", "bam", "kd4mtl", "nonlinear"])
def test_a_student_leaves_its_teachers_as_they_are(problem: kd4mtl.Problem, row: str) -> None:
    before = copy.deepcopy({task: teacher.state_dict() for task, teacher in problem.teachers.items()})
    kd4mtl.train(problem, options(row=row), 0, False)
    for task, teacher in problem.teachers.items():
        for name, value in teacher.state_dict().items():
            assert torch.equal(value, before[task][name]), (task, name)


def test_choosing_does_not_look_at_the_test_split(problem: kd4mtl.Problem) -> None:
    splits = {name: split for name, split in problem.splits.items() if name != "test"}
    blind = problem._replace(splits=splits, alone={name: problem.alone[name] for name in splits})
    assert kd4mtl.train(blind, options(row="uniform"), 0, False).keys() == {"validation"}
    assert kd4mtl.train_single(blind, {"task": "left", "lr": 0.01}, 0, False).keys() == {"validation"}


def test_bam_goes_from_the_teachers_to_the_answers(problem: kd4mtl.Problem) -> None:
    images, answers, _ = problem.splits["train"]
    batch = torch.arange(20)
    with torch.no_grad():
        output = {task: teacher.eval()(images[batch])[task] for task, teacher in problem.teachers.items()}
    own = {task: composites.loss(task, output[task], answers[task][batch]) for task in TASKS}
    teaching = kd4mtl.Outputs(kd4mtl.Net(list(TASKS)), problem, {})
    first = torch.stack(teaching.losses(own, output, batch))
    # A student like its teachers; evaluated in another batch, so up to rounding.
    torch.testing.assert_close(first, torch.zeros(4), rtol=0, atol=1e-5)
    for _ in range(problem.steps):
        teaching.step()
    last = torch.stack(teaching.losses(own, output, batch))
    torch.testing.assert_close(last, torch.stack(list(own.values())))


def test_a_student_of_its_own_weights_gains_nothing(problem: kd4mtl.Problem) -> None:
    alone = problem.alone["validation"]
    assert set(composites.gains(alone, alone).values()) == {0.0}


# ---------------------------------------------------------------- the whole study


def test_a_run_is_the_same_whatever_ran_before() -> None:
    """Runs of a seed share data and teachers, and methods that draw share a generator."""
    experiment = load("kd4mtl", quick=True).experiments["students"]
    jobs = [
        harness.Job(experiment.prepare, kd4mtl.train, experiment.problem, options(row=row), 1, final=True)
        for row in ("uniform", "pcgrad", "bam", "kd4mtl-mokd")
    ]
    first = [{**harness.run(job), "seconds": 0} for job in jobs]
    torch.manual_seed(7)
    last = [{**harness.run(job), "seconds": 0} for job in reversed(jobs)]
    assert last[::-1] == first


def test_the_teachers_have_the_rates_that_were_chosen() -> None:
    rows = json.loads(RESULTS.read_text("utf-8"))["experiments"]["single"]["rows"]
    assert {task: row["chosen"]["lr"] for task, row in rows.items()} == kd4mtl.TEACHERS
