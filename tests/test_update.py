"""The pure updates on lists of tensors, and what only a GPU can show."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import nn

from distill_optim.update import weighted_sum
from tests.helpers import OURS, batches, flat, no_waiting, student, train, two_losses


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64])
def test_weighted_sum_is_the_sum(dtype: torch.dtype) -> None:
    shapes = [(3, 4), (), (5,), (0,)]
    gradients = [[torch.randn(s, dtype=dtype) for s in shapes] for _ in range(3)]
    weights = torch.tensor([0.5, 0.0, 2.0], dtype=torch.float64)
    expected = [
        sum(w.to(dtype) * g for w, g in zip(weights, column, strict=True)) for column in zip(*gradients, strict=True)
    ]
    for total, other in zip(weighted_sum(gradients, weights), expected, strict=True):
        # Products and one sum in this precision.
        torch.testing.assert_close(total, other)


def test_weighted_sum_of_those_that_reach_a_parameter() -> None:
    a, b, c = torch.tensor([1.0]), torch.tensor([10.0]), torch.tensor([100.0], dtype=torch.float64)
    total = weighted_sum([[a, None], [None, c], [b, None], [None, None]], torch.tensor([2.0, 3.0, 4.0, 5.0]))
    assert [t.item() for t in total] == [42, 300]
    assert total[0] is a, "the sum should grow in the first gradient's memory"


def test_a_weight_is_rounded_for_each_dtype_by_itself() -> None:
    third = torch.tensor([1 / 3], dtype=torch.float64)
    one = [torch.ones(1, dtype=dtype) for dtype in (torch.float32, torch.float64, torch.bfloat16)]
    total = weighted_sum([[t.clone() for t in one]], third)
    assert [t.item() for t in total] == [third.to(t.dtype).item() for t in one]


@pytest.mark.parametrize("cls", OURS)
def test_one_path_computes_what_another_does(cls: Any) -> None:
    """For-loop, foreach and fused, in float64: they differ by rounding."""
    results = []
    for flags in {"foreach": False}, {"foreach": True}, {"fused": True}:
        model = student(torch.float64)
        optimizer = cls(model.parameters(), lr=0.01, weight_decay=0.1, **flags)
        train(optimizer, model, batches(20, torch.float64))
        results.append(flat(model.parameters()))
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("cls", OURS)
def test_parameters_of_every_shape(cls: Any) -> None:
    """0-d, empty, transposed and strided parameters."""
    params = [
        nn.Parameter(torch.randn(())),
        nn.Parameter(torch.randn(0, 3)),
        nn.Parameter(torch.randn(4, 3).t()),
        nn.Parameter(torch.randn(2, 3, 5, 5).to(memory_format=torch.channels_last)),
    ]
    before = [p.detach().clone() for p in params]
    optimizer = cls(params, lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        optimizer.step([
            torch.stack([p.square().sum() for p in params]).sum(),
            torch.stack([(p - 1).abs().sum() for p in params]).sum(),
        ])  # fmt: skip
    for p, q in zip(params, before, strict=True):
        assert p.stride() == q.stride()
        assert p.numel() == 0 or not torch.equal(p, q)


@pytest.mark.cuda
@pytest.mark.parametrize("flags", [{}, {"fused": True}, {"foreach": False}])
@pytest.mark.parametrize("cls", OURS)
def test_a_step_waits_for_no_gpu(cls: Any, flags: dict[str, Any]) -> None:
    model = student().cuda()
    if issubclass(cls, torch.optim.AdamW):
        flags = flags | {"capturable": True}
    optimizer = cls(model.parameters(), lr=0.01, **flags)
    xs = [x.cuda() for x in batches(4)]
    train(optimizer, model, xs)
    with no_waiting():
        train(optimizer, model, xs)
        _ = optimizer.stats.cosines


@pytest.mark.cuda
@pytest.mark.parametrize("cls", OURS)
def test_a_gpu_takes_the_steps_of_a_cpu(cls: Any) -> None:
    results = []
    for device in "cpu", "cuda":
        model = student(torch.float64).to(device)
        optimizer = cls(model.parameters(), lr=0.01)
        train(optimizer, model, [x.to(device) for x in batches(20, torch.float64)])
        results.append(flat(model.parameters()).cpu())
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-11)


@pytest.mark.cuda
@pytest.mark.parametrize("way", ["backward", "through"])
def test_mokd_through_waits_for_no_gpu(way: str) -> None:
    from distill_optim import MoKDSGD

    model = student().cuda()
    optimizer = MoKDSGD(model.parameters(), lr=0.01, momentum=0.9, every=1 if way == "through" else 3)
    xs = [x.cuda() for x in batches(4)]
    for around in nullcontext, no_waiting:
        with around():
            for x in xs:
                optimizer.zero_grad()
                out = model(x)
                optimizer.step([out.square().mean(), (out - 1).abs().mean()], through=out if way == "through" else None)
    assert two_losses(model, xs[0])[0].isfinite()
