"""The commands of ``python -m benchmarks``: that they run and say what they say, not how long anything takes."""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks import common, goals, models
from benchmarks.__main__ import COMMANDS, main
from benchmarks.activation_gram import Call, check
from benchmarks.dot_authors import AuthorsDOT
from distill_optim import DOTSGD

SMALL = {
    "step": ["--sets", "3x5", "--losses", "1", "2"],
    "resolve": ["--sets", "3x5", "--losses", "1", "2"],
    "train": ["--students", "mlp", "--losses", "1", "2", "--batch", "2"],
    "activation_gram": ["--students", "mlp", "--losses", "1", "2", "--batch", "2"],
    "memory": ["--students", "mlp", "--losses", "1", "2", "--batch", "2"],
    "distributed": ["--students", "mlp", "--losses", "2", "--batch", "2"],
    "monitor": ["--students", "mlp", "--losses", "2", "--batch", "2", "--steps", "2"],
}
# What torch says of the peers' ways is no fault of ours.
pytestmark = [pytest.mark.filterwarnings("ignore")]


def run(command: str, *extra: str, folder: Path) -> dict[str, Any]:
    out = folder / "out.json"
    main([command, *SMALL[command], "--rounds", "2", "--threads", "1", "--json", str(out), *extra])
    found: dict[str, Any] = json.loads(out.read_text("utf-8"))
    return found


@pytest.mark.parametrize("command", SMALL)
def test_a_measurement_prints_its_table_and_writes_the_same_rows(
    command: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    found = run(command, folder=tmp_path)
    assert {"torch", "machine", "threads", "device", "dtype", "rounds"} <= found["about"].keys()
    printed = capfd.readouterr().out
    for row in found["rows"]:
        assert f"| {row['contender']} |" in printed
        ratios = list(row["ratios"].values())
        if command == "memory":
            assert row["peak"] > 0
            continue
        middle, low, high = row["milliseconds"]
        assert 0 < low <= middle <= high
        assert all(0 < low <= middle <= high for middle, low, high in ratios)
    ours = {row["contender"] for row in found["rows"] if row["K"] == 2}
    for optimizer in {"resolve": [], "activation_gram": ["MoKDSGD"]}.get(command, ["DOTSGD", "MoKDSGD"]):
        assert any(optimizer in name for name in ours)
    first = found["rows"][0]
    assert first["ratios"][first["contender"]] == [1, 1, 1]


def test_only_and_against_choose_the_rows_and_the_ratios(tmp_path: Path) -> None:
    rows = run("step", "--only", "AdamW", "--against", "authors", "--losses", "2", folder=tmp_path)["rows"]
    names = [row["contender"] for row in rows]
    assert names[0] == "torch SGD on the sum, fused"
    assert "DOTAdamW update, foreach" in names
    assert not any("DOTSGD" in name for name in names)
    assert all(list(row["ratios"]) == [names[0], "the DOT authors' loop"] for row in rows)


def test_a_profile_is_a_trace_per_contender_and_a_plot_a_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    extra = ["--only", "gram", "--profile", str(tmp_path / "traces"), "--plot", str(tmp_path / "plot.png")]
    rows = run("resolve", *extra, folder=tmp_path)["rows"]
    traces = list((tmp_path / "traces").glob("*.json"))
    assert len(traces) == len(rows)
    assert all("traceEvents" in json.loads(trace.read_text("utf-8")) for trace in traces)
    assert (tmp_path / "plot.png").stat().st_size > 1000


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as done:
        main([command, "--help"])
    assert done.value.code == 0
    assert f"python -m benchmarks {command}" in capsys.readouterr().out


def test_the_name_of_a_contender_stands_for_it_alone(tmp_path: Path) -> None:
    rows = run("step", "--only", "torch SGD on the sum, foreach", "--losses", "2", folder=tmp_path)["rows"]
    expected = ["torch SGD on the sum, fused", "torch SGD on the sum, foreach", "a copy of one set"]
    assert [row["contender"] for row in rows] == expected


def test_goals_say_what_was_reached_and_what_was_not_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(goals, "ANYWHERE", [goals.resolved])
    monkeypatch.setattr("benchmarks.resolve.shapes_of", lambda name: [(100,)])
    main(["goals", "--rounds", "2", "--threads", "1", "--json", str(tmp_path / "out.json")])
    lines = capsys.readouterr().out.splitlines()
    (measured,) = [line for line in lines if "Gram matrix and weights" in line]
    assert measured.endswith(("| ≤ 3 | yes |", "| ≤ 3 | no |"))
    unmeasured = [line for line in lines if "not measured" in line]
    assert len(unmeasured) == len(goals.CUDA)
    rows = json.loads((tmp_path / "out.json").read_text("utf-8"))["rows"]
    assert [row["reached"] for row in rows] == [measured.endswith("yes |"), *[None] * len(goals.CUDA)]


def test_a_goal_is_reached_or_missed() -> None:
    assert goals.at_most("", 2, [1.9, 1, 3]).reached
    assert not goals.at_most("", 2, [2.1, 1, 3]).reached
    assert goals.at_least("", 2, [2.1, 1, 3]).reached
    assert not goals.at_least("", 2, [1.9, 1, 3]).reached
    assert goals.inverse([2, 1, 4]) == [0.5, 0.25, 1]


@pytest.mark.cuda
@pytest.mark.parametrize("measure", goals.CUDA)
def test_the_goals_on_a_gpu_can_be_measured(measure: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.step.shapes_of", lambda name: [(1000,)] * 3)
    options = argparse.Namespace(
        device=torch.device("cuda"), dtype=torch.float32, rounds=2, only=None, against=[], profile=None
    )
    assert all(goal.values is not None for goal in measure(options))


def test_an_unknown_set_or_contender_is_named() -> None:
    with pytest.raises(ValueError, match="set 'resnet19': expected one of"):
        models.shapes_of("resnet19")
    with pytest.raises(SystemExit, match="--against 'nobody'"):
        main(["step", *SMALL["step"], "--rounds", "2", "--against", "nobody"])


@pytest.mark.parametrize(
    ("name", "tensors", "parameters"),
    [("resnet18", 62, 11_689_512), ("resnet50", 161, 25_557_032), ("vit_s16", 152, 22_050_664),
     ("gpt2", 148, 124_439_808), ("330", 330, 110 * 2336), ("54", 54, 18 * 2336), ("1600", 1600, 102_400)],
)  # fmt: skip
def test_the_sets_are_those_of_the_networks_they_are_named_after(name: str, tensors: int, parameters: int) -> None:
    """The published numbers of parameters."""
    shapes = models.shapes_of(name)
    assert len(shapes) == tensors
    assert sum(map(math.prod, shapes)) == parameters


def test_the_ratios_are_taken_round_by_round() -> None:
    taken = {"a": [1.0, 2.0, 4.0], "b": [2.0, 4.0, 8.0]}
    assert common.ratios(taken, "b", "a") == (2, 2, 2)
    assert common.spread(taken["a"]) == (2, 1.5, 3)


def test_every_contender_runs_once_per_round_and_is_prepared_first() -> None:
    log: list[str] = []

    def contender(name: str) -> common.Contender:
        return common.Contender(name, lambda: log.append(name), lambda: log.append(f"prepare {name}"))

    taken = common.race([contender("a"), contender("b")], torch.device("cpu"), 2, warm_up=1)
    assert {name: len(times) for name, times in taken.items()} == {"a": 2, "b": 2}
    assert len(log) == 12
    assert all(log[n] == f"prepare {log[n + 1]}" for n in range(0, 12, 2))


def test_the_authors_loop_comes_to_what_dotsgd_comes_to() -> None:
    """Parameters of both losses, of one alone, and weight decay; from the second step on for that of distillation
    alone, whose weight decay the authors forget in the first.
    """
    torch.manual_seed(0)
    options: dict[str, Any] = {"lr": 0.1, "momentum": 0.8, "delta": 0.1, "dampening": 0.2, "weight_decay": 0.05}
    start = [torch.randn(3, 2, dtype=torch.float64) for _ in range(3)]
    start[2].zero_()  # has nothing to decay from in the first step
    theirs = [p.clone() for p in start]
    ours: list[Tensor] = [nn.Parameter(p.clone()) for p in start]
    authors, optimizer = AuthorsDOT(theirs, **options), DOTSGD(ours, **options)
    for _ in range(6):
        task, distill = [[torch.randn(3, 2, dtype=torch.float64) for _ in start] for _ in range(2)]
        authors.step([*task[:2], None], [distill[0], None, distill[2]])
        optimizer.zero_grad()
        task_loss = (ours[0] * task[0]).sum() + (ours[1] * task[1]).sum()
        optimizer.step([task_loss, (ours[0] * distill[0]).sum() + (ours[2] * distill[2]).sum()])
    for a, b in zip(theirs, ours, strict=True):
        torch.testing.assert_close(a, b.detach(), rtol=1e-13, atol=1e-13)


def every_kind_of_layer() -> nn.Module:
    """Tokens from strided, padded and dilated convolutions, a residual, norms, and layers with and without biases."""
    convolutions = [nn.Conv2d(3, 4, 3, 2, 1, 2), nn.BatchNorm2d(4), nn.Tanh(), nn.Conv2d(4, 32, (1, 2), bias=False)]
    return nn.Sequential(
        *convolutions, nn.Flatten(2), nn.Linear(210, 32), models.Block(32), nn.Flatten(), nn.Linear(1024, 9)
    )


@pytest.mark.parametrize("k", [1, 2, 5])
def test_activation_gradients_give_the_gram_matrix_and_the_sum_of_the_plain_passes(k: int) -> None:
    """All layers by activation gradients, to rounding: the formula, unfolded convolutions, and what is left to the
    plain way beside them.
    """
    net, x = every_kind_of_layer().double(), torch.randn(3, 3, 32, 32, dtype=torch.float64)
    assert check(net, x, k, lambda call: True) == 8
    assert check(net, x, k, lambda call: isinstance(call.layer, nn.Linear)) == 6


@pytest.mark.parametrize("wrong", ["gram", "weight_gradient"])
def test_a_wrong_gram_matrix_or_sum_stops_the_benchmark(wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right = getattr(Call, wrong)
    monkeypatch.setattr(Call, wrong, lambda call, d: right(call, d) * (1 + 1e-8))
    with pytest.raises(AssertionError, match="not close"):
        check(every_kind_of_layer().double(), torch.randn(3, 3, 32, 32, dtype=torch.float64), 2, lambda call: True)


@pytest.mark.parametrize(
    ("rows", "k", "pays"), [(20, 2, True), (22, 2, False), (49, 8, True), (50, 8, False), (1, 1, False)]
)
def test_activation_gradients_pay_below_a_share_of_the_width(rows: int, k: int, pays: bool) -> None:
    """N < d (K - 1) / (K + 1), for a square layer: 21.3 of 64 at K = 2, 49.8 at K = 8."""
    layer = nn.Linear(64, 64)
    x = torch.randn(rows, 64)
    assert Call(layer, x, layer(x)).pays(k) == pays
