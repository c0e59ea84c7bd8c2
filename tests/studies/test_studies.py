"""The studies: that they choose without the test split, go on where they were stopped, and say what they measured."""

from __future__ import annotations

import csv
import inspect
import itertools
import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks import studies
from benchmarks.__main__ import main
from benchmarks.studies import digits, harness, language
from benchmarks.studies.harness import Column, Experiment, Log, Measures, Options, Row, Study
from benchmarks.studies.training import Forward, fit, shuffled
from distill_optim import DOTSGD
from distill_optim.distill import SubspaceProjector

REPOSITORY = Path(__file__).parents[2]
RESULTS = REPOSITORY / "benchmarks" / "studies" / "results"

# ---------------------------------------------------------------- the harness, on a training that is a formula

CALLS: list[tuple[Options, int, bool]] = []


def nothing(options: Options, seed: int) -> Options:
    return options


def formula(problem: Options, options: Options, seed: int, final: bool) -> Measures:
    """What is best on validation is worst on test; a learning rate of 9 diverges."""
    CALLS.append((options, seed, final))
    score = math.nan if options["lr"] == 9 else -abs(options["lr"] - problem["best"])
    measures: Measures = {"validation": score}
    if final:
        measures |= {"test": -score + options.get("extra", 0) * (seed + 1), "curve": [float(seed), 1.0]}
    return measures


def experiment(**changes: Any) -> Experiment:
    rows = {
        "base": Row("base", {}, {"lr": (1, 2, 3)}),
        "better": Row("better", {"extra": 1}, {"lr": (9, 1, 2), "weights": ([1, 1],)}),
    }
    columns = [Column("test", "test", spec=".1f")]
    made = Experiment("An experiment", {"best": 2}, nothing, formula, rows, columns, ["base"], seeds=3, tuning_seeds=2)
    return replace(made, **changes)


def carried_out(folder: Path, made: Experiment | None = None) -> harness.Results:
    CALLS.clear()
    study = Study("formulas", {"only": made or experiment()}, lambda results: pytest.fail("not asked for"))
    return harness.carry_out(study, Log(folder / "runs.jsonl"), workers=1)


def without_seconds(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: without_seconds(item) for key, item in value.items() if key != "seconds"}
    return value


def test_the_validation_split_chooses_on_seeds_of_its_own(tmp_path: Path) -> None:
    rows = carried_out(tmp_path)["experiments"]["only"]["rows"]
    assert rows["base"]["chosen"] == {"lr": 2}
    assert rows["better"]["chosen"] == {"lr": 2, "weights": [1, 1]}
    tuning = {seed for _, seed, final in CALLS if not final}
    table = {seed for _, seed, final in CALLS if final}
    assert len(tuning) == 2
    assert table == {0, 1, 2}
    assert tuning.isdisjoint(table)
    assert {options["lr"] for options, _, final in CALLS if final} == {2}


def test_a_point_that_diverged_is_not_chosen_and_a_border_is_marked(tmp_path: Path) -> None:
    rows = carried_out(tmp_path, experiment(problem={"best": 9}))["experiments"]["only"]["rows"]
    assert rows["better"]["chosen"]["lr"] == 2
    assert not rows["better"]["at_border"]
    assert rows["base"]["chosen"]["lr"] == 3
    assert rows["base"]["at_border"]


def test_differences_are_paired_by_seed(tmp_path: Path) -> None:
    """The differences are 1, 2 and 3: mean 2, standard error 1/sqrt(3)."""
    found = carried_out(tmp_path)["experiments"]["only"]
    assert found["rows"]["better"]["per_seed"]["test"] == [1, 2, 3]
    assert found["rows"]["better"]["difference"]["base"]["test"] == pytest.approx([2, 3**-0.5], rel=1e-5)
    assert found["rows"]["better"]["curves"]["curve"] == [1, 1]
    assert found["rows"]["base"]["difference"] == {}


def test_a_study_goes_on_where_it_was_stopped(tmp_path: Path) -> None:
    whole = carried_out(tmp_path)
    runs = 3 * 2 + 3 * 2 + 3 + 3
    assert len(CALLS) == runs == whole["about"]["runs"]
    path = tmp_path / "runs.jsonl"
    lines = path.read_text("utf-8").splitlines(keepends=True)
    assert without_seconds(carried_out(tmp_path)) == without_seconds(whole)
    assert CALLS == []

    path.write_text("".join(lines[:-2]) + lines[-2][:20], "utf-8")  # killed while it wrote a line
    assert without_seconds(carried_out(tmp_path)) == without_seconds(whole)
    assert len(CALLS) == 2
    assert len(path.read_text("utf-8").splitlines()) == runs


def test_other_settings_are_other_runs(tmp_path: Path) -> None:
    carried_out(tmp_path)
    carried_out(tmp_path, experiment(problem={"best": 1}))
    assert len(CALLS) == 18
    carried_out(tmp_path, experiment(seeds=4))
    assert [(seed, final) for _, seed, final in CALLS] == [(3, True)] * 2


def test_the_tables_say_what_was_found(tmp_path: Path) -> None:
    made = experiment()
    found = carried_out(tmp_path)["experiments"]["only"]
    found["rows"]["base"]["seconds"], found["rows"]["better"]["seconds"] = 2.0, 3.0
    assert harness.table(made, found).splitlines() == [
        "|  | test | chosen | time |",
        "| --- | --- | --- | --- |",
        "| base | 0.0 ± 0.0 | lr 2 | 1.00× |",
        "| better | 2.0 ± 0.6 | lr 2, weights 1 : 1 | 1.50× |",
    ]
    assert harness.difference_table(made, found, "base").splitlines() == [
        "| against base | test |",
        "| --- | --- |",
        "| better | +2.0 ± 0.6 |",
    ]


def test_a_failing_run_ends_the_study_and_keeps_what_was_finished(tmp_path: Path) -> None:
    rows = {"base": Row("base", {}, {"lr": (1,)}), "wrong": Row("wrong", {"extra": "one"}, {"lr": (2,)})}
    with pytest.raises(TypeError):
        carried_out(tmp_path, experiment(rows=rows))
    assert len(Log(tmp_path / "runs.jsonl").runs) == 4 + 3


# ---------------------------------------------------------------- the problems

DIGITS = {"images": 60, "noise": 0.3, "width": 8, "steps": 10, "teacher_steps": 5}
TEXT = {"pieces": 32, "width": 8, "steps": 3, "teacher": [8, 1, 2]}
PLAIN = {"optimizer": "SGD", "lr": 0.05, "distill": ["logits"]}


def test_the_test_images_are_the_same_for_all_seeds_and_in_no_other_split() -> None:
    first, second = (digits.prepare(DIGITS, seed) for seed in (0, 1))
    assert first.test.rows.equal(second.test.rows)
    assert not first.inputs.equal(second.inputs)
    test = set(first.test.rows.tolist())
    _, rest = digits.dealt()
    assert test.isdisjoint(rest.rows.tolist())
    assert len(test) + len(rest.rows) == 1797
    assert test.isdisjoint(first.validation.rows.tolist())
    images = {tuple(image) for image in first.inputs.tolist()}
    assert images.isdisjoint(tuple(image) for image in first.validation.inputs.tolist())


def test_the_wrong_labels_are_as_many_as_said() -> None:
    clean, noisy = (digits.prepare({**DIGITS, "noise": noise}, 0) for noise in (0.0, 0.3))
    assert clean.inputs.equal(noisy.inputs)
    assert int((clean.labels != noisy.labels).sum()) == 18


def test_a_run_that_chooses_cannot_look_at_the_test_split() -> None:
    image = digits.prepare(DIGITS, 0)
    text = language.prepare(TEXT, 0)
    blind: Any = None
    assert "test" not in digits.train(image._replace(test=blind), PLAIN, 0, False)
    assert "test" not in language.train(text._replace(test=blind), PLAIN, 0, False)
    assert 0 <= digits.train(image, PLAIN, 0, True)["test"] <= 1
    assert language.train(text, PLAIN, 0, True)["test"] > 0


def test_early_stopping_is_the_best_that_was_seen_on_validation() -> None:
    """Some learning rate makes the student worse towards the end."""
    problem = digits.prepare({**DIGITS, "steps": 40}, 0)
    options = {**PLAIN, "lr": 2.0}
    last = digits.train(problem, options, 0, True)["validation"]
    assert digits.train(problem, {**options, "early_stopping": True}, 0, True)["validation"] > last


def test_the_maps_of_features_have_the_same_loss() -> None:
    regressor, projector = digits.Regressor(8, 6), SubspaceProjector(8, 6)
    with torch.no_grad():
        regressor.map.weight.copy_(projector.weight)
    z_s, z_t = torch.randn(5, 8), torch.randn(5, 6)
    torch.testing.assert_close(regressor(z_s, z_t), projector(z_s, z_t))


def test_conflict_and_dominance_of_two_gradients() -> None:
    w = nn.Parameter(torch.tensor([1.0, 0.0]))
    found = digits.gradients([w[0], 10 * (w[1] - w[0])], [w])
    assert found["cosine"] == pytest.approx(-(0.5**0.5))
    assert found["log_ratio"] == pytest.approx(1 + math.log10(2) / 2)


def test_pieces_of_text_are_the_modules_source() -> None:
    pieces = language.pieces_of(("csv",), 20)
    text = "".join(language.CHARACTERS[code] for code in pieces.flatten().tolist())
    assert pieces.shape == (20, language.CONTEXT + 1)
    assert inspect.getsource(csv).startswith(text[:200])


def test_no_text_is_in_two_splits() -> None:
    splits = [language.TEACHER, language.VALIDATION, language.TEST]
    assert set(language.STUDENT) < set(language.TEACHER)
    assert all(set(a).isdisjoint(b) for a, b in itertools.combinations(splits, 2))


def test_the_transformer_looks_at_no_later_character() -> None:
    model = language.Transformer(8, 1, seed=0)
    codes = torch.randint(96, (1, language.CONTEXT))
    changed = codes.clone()
    changed[0, 10] = (codes[0, 10] + 1) % 96
    same = (model(codes) == model(changed)).all(-1)[0]
    assert same[:10].all()
    assert not same[10:].any()


# ---------------------------------------------------------------- the steps


def quadratic(options: Options) -> torch.Tensor:
    """Where five steps on two losses of two parameters lead."""
    w = nn.Parameter(torch.tensor([1.0, -1.0], dtype=torch.float64))

    def forward(batch: torch.Tensor) -> Forward:
        x = 1 * w
        return Forward([x.square().sum(), (x - batch).square().sum()], x)

    for _ in fit([w], list(torch.arange(5.0)), forward, {"lr": 0.1, **options}):
        pass
    return w.detach()


def test_options_are_what_a_loop_by_hand_does() -> None:
    w = nn.Parameter(torch.tensor([1.0, -1.0], dtype=torch.float64))
    optimizer = DOTSGD([w], lr=0.1, delta=0.05)
    for step in range(5):
        optimizer.param_groups[0]["lr"] = 0.1 * (1 + math.cos(math.pi * step / 5)) / 2
        optimizer.zero_grad()
        optimizer.step([2 * w.square().sum(), (w - step).square().sum()])
    found = quadratic({"optimizer": "DOTSGD", "arguments": {"delta": 0.05}, "weights": [2, 1]})
    # torch works the half cosine out by recursion.
    torch.testing.assert_close(found, w.detach(), rtol=1e-12, atol=1e-12)


def test_a_weight_of_zero_leaves_a_loss_out() -> None:
    alone = quadratic({"optimizer": "SGD", "weights": [1, 0]})
    assert alone[0] == -alone[1]
    assert not quadratic({"optimizer": "SGD"}).equal(alone)


@pytest.mark.parametrize("option", ["through", "observe"])
def test_through_and_observe_reach_the_optimizer(option: str) -> None:
    """Refused by an optimizer that can do neither."""
    with pytest.raises((ValueError, AttributeError), match=option):
        quadratic({"optimizer": "DOTSGD", option: True})
    quadratic({"optimizer": "MoKDSGD", "arguments": {"combine": "famo"}, option: True})


def test_batches_are_whole_and_each_epoch_shuffled() -> None:
    batches = shuffled(10, 4, 5, seed=0)
    assert [len(batch) for batch in batches] == [4] * 5
    epochs = [torch.cat(batches[at : at + 2]).tolist() for at in (0, 2)]
    assert all(len(set(epoch)) == 8 for epoch in epochs)
    assert epochs[0] != epochs[1]


# ---------------------------------------------------------------- the studies


@pytest.mark.parametrize("name", studies.STUDIES)
def test_options_survive_json(name: str) -> None:
    """By which runs are known."""
    for experiment in studies.load(name).experiments.values():
        assert experiment.seeds >= 10
        assert set(experiment.baselines) <= experiment.rows.keys()
        for row in experiment.rows.values():
            for point in row.points():
                options = {**row.options, **point}
                assert json.loads(harness.canonical(options)) == options


@pytest.mark.parametrize("name", studies.STUDIES)
def test_the_quick_mode_says_what_it_said(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """To the digit where the machine is of the same type; else it runs."""
    main(["studies", name, "--quick", "--out", str(tmp_path)])
    printed = capsys.readouterr().out
    found = json.loads((tmp_path / f"{name}.json").read_text("utf-8"))
    for experiment in found["experiments"].values():
        assert experiment["title"] in printed
        assert all(f"| {row['label']} |" in printed for row in experiment["rows"].values())
    assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    kept = json.loads((RESULTS / "quick" / f"{name}.json").read_text("utf-8"))
    if all(found["about"][what] == kept["about"][what] for what in ("processor", "python", "torch")):
        assert without_seconds(found) == without_seconds(kept)


def test_two_processes_find_what_one_finds(tmp_path: Path) -> None:
    study = studies.load("three", quick=True)
    (key, made), *_ = study.experiments.items()
    rows = {row: made.rows[row] for row in ("sum", "fixed", "mokd", "pcgrad")}
    small = replace(study, experiments={key: replace(made, rows=rows)})
    one, two = (harness.carry_out(small, Log(tmp_path / f"{n}.jsonl"), workers=n) for n in (1, 2))
    assert without_seconds(one) == without_seconds(two)


def test_the_page_has_the_tables_of_the_files() -> None:
    """One of every experiment, and no table of a study that its file does not have."""
    page = (REPOSITORY / "docs" / "results.md").read_text("utf-8")
    made = set()
    for file in RESULTS.glob("*.json"):
        study = studies.load(file.stem)
        results = json.loads(file.read_text("utf-8"))
        assert results["experiments"].keys() == study.experiments.keys()
        for key, experiment in study.experiments.items():
            found = results["experiments"][key]
            assert experiment.problem == found["problem"]
            assert {row: kept["options"] for row, kept in found["rows"].items()} == {
                row: harness.rounded(asked.options) for row, asked in experiment.rows.items()
            }
            first, *others = harness.tables(study, key, found)
            assert first in page
            made |= {first, *others}
    shown = [table.strip() for table in re.findall(r"(?:^\|.*\n)+", page, re.M)]
    assert all(table in made for table in shown if table.startswith(("|  |", "| against", "| lr |")))
