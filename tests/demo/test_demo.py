"""The demo runs, reports what it measured, and leaves nothing behind when it cannot finish."""

from __future__ import annotations

import contextlib
import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from distill_optim import combine
from distill_optim.__main__ import main
from distill_optim.demo import data, train

for module in ("sklearn", "matplotlib", "rich"):
    pytest.importorskip(module)

RECIPES = train.recipes(train.Settings())


class Outcome(NamedTuple):
    status: int
    printed: str
    folder: Path


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    """One tiny run of everything, through the command line."""
    folder = tmp_path_factory.mktemp("demo") / "new" / "folder"
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        status = main(["demo", "--quick", "--optimizers", "all", "--out", str(folder)])
    return Outcome(status, printed.getvalue(), folder)


def test_prints_every_row_and_how_it_was_tuned(quick: Outcome) -> None:
    assert quick.status == 0
    for recipe in RECIPES.values():
        assert recipe.label in quick.printed
    assert "Learning rate of every row chosen on the validation split" in quick.printed
    assert "More than two standard errors ahead of summed SGD" in quick.printed


def test_writes_its_two_files_and_no_other(quick: Outcome) -> None:
    assert sorted(path.name for path in quick.folder.iterdir()) == ["curves.png", "results.json"]
    assert (quick.folder / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_json_holds_what_was_measured(quick: Outcome) -> None:
    results = json.loads((quick.folder / "results.json").read_text())
    seeds, epochs = train.QUICK["seeds"], train.QUICK["epochs"]
    assert results["settings"]["seeds"] == seeds
    assert results["versions"]["torch"] == torch.__version__
    assert list(results["rows"]) == list(RECIPES)
    for key, row in results["rows"].items():
        assert row["label"] == RECIPES[key].label
        assert row["chosen_on_validation"]["learning_rate"] in train.QUICK["learning_rates"]
        accuracies = row["test_accuracy"]["per_seed"]
        assert len(accuracies) == seeds
        assert all(0 <= accuracy <= 1 for accuracy in accuracies)
        assert row["test_accuracy"]["mean"] == pytest.approx(sum(accuracies) / seeds)
        assert len(row["curves"]["task_loss"]) == len(row["curves"]["distill_loss"]) == epochs
        assert row["step_seconds"] > 0
        method = key.removeprefix("mokd-")
        of_values = key != method and not combine.needs_gram(method, combine.own_dominance(method))
        if key == "none" or of_values:  # nobody compared gradients
            assert row["share_of_steps_in_conflict"] is None
        else:
            assert 0 <= row["share_of_steps_in_conflict"] <= 1
            assert all(-1.001 <= cosine <= 1.001 for cosine in row["curves"]["cosine"])
    assert results["rows"]["sum"]["step_time_relative_to_summed"] == 1
    weights = torch.tensor(results["rows"]["mokd"]["curves"]["weights"])
    assert weights.shape == (epochs, 2)
    torch.testing.assert_close(weights.sum(1), torch.full((epochs,), 2.0))  # rescaled to the number of losses


def test_a_subset_of_rows_without_a_baseline(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["demo", "--quick", "--seeds", "1", "--epochs", "1", "--label-noise", "0"]
    assert main([*command, "--optimizers", "mokd, dot,dot", "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "MoKDSGD" in printed
    assert "summed SGD" not in printed
    results = json.loads((tmp_path / "results.json").read_text())
    assert list(results["rows"]) == ["dot", "mokd"]
    assert results["rows"]["dot"]["test_accuracy"]["standard_error"] is None  # one seed has none


def test_every_row_starts_from_the_same_student_labels_and_batches() -> None:
    settings = train.Settings(epochs=1)
    digits = data.load_splits()
    logits = torch.zeros(data.STUDENT, data.CLASSES)
    runs = [train.train_student(recipe, 0.0, 1.0, 3, digits, logits, settings) for recipe in RECIPES.values()]
    assert len({(run.task_loss[0], run.distill_loss[0], run.test_accuracy) for run in runs}) == 1


def test_reported_and_measured_conflict_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train, "CONFLICT_EVERY", 1)
    settings = train.Settings(epochs=2)
    digits = data.load_splits()
    logits = torch.randn(data.STUDENT, data.CLASSES, generator=torch.Generator().manual_seed(0))
    summed, dot = (train.train_student(RECIPES[key], 0.0, 1.0, 0, digits, logits, settings) for key in ("sum", "dot"))
    assert summed.cosine == pytest.approx(dot.cosine, abs=1e-5)
    assert summed.conflict == pytest.approx(dot.conflict)


@pytest.mark.parametrize(("best", "at_border"), [((0.1, 0.5), True), ((0.2, 0.5), False), ((0.3, 1.0), True)])
def test_choice_is_the_best_of_the_grid(best: tuple[float, float], at_border: bool) -> None:
    settings = train.Settings(learning_rates=(0.1, 0.2, 0.3), distill_weights=(0.5, 1.0, 1.5))
    seeds = set()

    def run(recipe: train.Recipe, rate: float, weight: float, seed: int, watch: bool) -> train.Run:
        seeds.add(seed)
        return train.Run(validation_accuracy=float((rate, weight) == best))

    choice = train.choose(train.recipes(settings)["fixed"], settings, run)
    assert (choice.learning_rate, choice.distill_weight, choice.at_border) == (*best, at_border)
    assert seeds.isdisjoint(range(settings.seeds))


@pytest.mark.parametrize("share", [0.0, 0.1, 0.3, 0.999])
def test_noise_flips_exactly_its_share(share: float) -> None:
    labels = torch.arange(600) % data.CLASSES
    noisy = data.flip_labels(labels, share, torch.Generator().manual_seed(1))
    assert int((noisy != labels).sum()) == round(share * 600)
    assert noisy.dtype == labels.dtype
    assert set(noisy.tolist()) <= set(range(data.CLASSES))


def test_noise_reaches_every_other_class() -> None:
    noisy = data.flip_labels(torch.zeros(2000, dtype=torch.int64), 0.5, torch.Generator().manual_seed(1))
    counts = noisy.bincount(minlength=data.CLASSES)
    assert counts[0] == 1000
    assert (counts[1:] > 60).all()


def test_splits_share_no_image() -> None:
    digits = data.load_splits()
    rows = torch.cat([split.rows for split in digits])
    assert rows.sort().values.equal(torch.arange(1797))
    assert [len(split.labels) for split in digits] == [data.STUDENT, data.TEACHER, data.VALIDATION, data.TEST]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--optimizers", "sum,adam"], "unknown 'adam'; known are none,sum,fixed,dot,dot-matched,mokd"),
        (["--label-noise", "1"], "outside [0, 1)"),
        (["--label-noise", "-0.1"], "outside [0, 1)"),
        (["--label-noise", "nan"], "outside [0, 1)"),
        (["--seeds", "0"], "less than 1"),
        (["--epochs", "0"], "less than 1"),
        (["--device", "nowhere"], "cannot use 'nowhere'"),
        (["--device", "meta"], "cannot use 'meta'"),
        (["--out", __file__], "is not a folder"),
    ],
)
def test_bad_option(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["demo", *arguments])
    assert exit_.value.code == 2
    error = capsys.readouterr().err
    assert f"argument {arguments[0]}" in error
    assert message in error


@pytest.mark.parametrize(
    ("module", "package"), [("sklearn", "scikit-learn"), ("matplotlib", "matplotlib"), ("rich", "rich")]
)
def test_missing_extra(
    module: str, package: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    assert main(["demo"]) == 2
    assert capsys.readouterr().err == f'the demo needs {package}: pip install "distill_optim[demo]"\n'


def test_package_and_command_line_import_without_the_extra() -> None:
    code = (
        "import sys; sys.modules.update(dict.fromkeys(['sklearn', 'matplotlib', 'rich']));"
        "import distill_optim; from distill_optim.__main__ import main; sys.exit(main(['demo']))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert "scikit-learn, matplotlib, rich" in result.stderr
    assert "Traceback" not in result.stderr


def test_interrupt_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls, threads, real = [], torch.get_num_threads(), train.train_student

    def interrupted(*args: Any, **kwargs: Any) -> train.Run:
        calls.append(args)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    monkeypatch.setattr(train, "train_student", interrupted)
    assert main(["demo", "--quick", "--out", str(tmp_path / "out")]) == 130
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr().err == "interrupted: nothing was written\n"
    assert torch.get_num_threads() == threads


def test_failed_write_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(source: Path, target: Path) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(os, "replace", full)
    command = ["demo", "--quick", "--seeds", "1", "--epochs", "1", "--optimizers", "sum"]
    assert main([*command, "--out", str(tmp_path)]) == 1
    assert list(tmp_path.iterdir()) == []
    captured = capsys.readouterr()
    assert "summed SGD" in captured.out
    assert "No space left on device" in captured.err


def test_every_combination_method_has_a_row() -> None:
    shown = {recipe.build.keywords.get("combine") for recipe in RECIPES.values() if hasattr(recipe.build, "keywords")}
    assert shown >= set(combine.names())
    assert set(train.USUAL) < set(RECIPES)
