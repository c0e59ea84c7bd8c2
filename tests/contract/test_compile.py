"""torch.compile of the step, with the learning rate in a tensor."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters

from distill_optim import DOTSGD, MoKDAdamW, MoKDSGD
from tests.contract.inputs import is_sgd
from tests.helpers import OURS, batches, flat, student, summed, two_losses

no_compiler = pytest.mark.skipif(
    not any(shutil.which(name) for name in ("c++", "g++", "clang++")), reason="inductor needs a C++ compiler"
)
# What is traced, of every step; and what inductor makes of it, which takes a while, of two.
CASES = [
    *((cls, "eager", way) for cls in OURS for way in ("plain", "two phases", "list")),
    *(pytest.param(cls, "inductor", "two phases", marks=no_compiler) for cls in (DOTSGD, MoKDAdamW)),
]


# In 2.9 dynamo stops at a step's statistics.
OLD = tuple(map(int, torch.__version__.split(".")[:2])) < (2, 11)


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


@pytest.mark.filterwarnings("ignore")  # torch's own, about its own code
@pytest.mark.parametrize(("cls", "backend", "way"), CASES)
def test_a_compiled_step_is_the_step_and_is_compiled_once(cls: Any, backend: str, way: str) -> None:
    """Up to rounding; and a schedule that writes into the learning rate makes no new graph."""
    if OLD and way != "plain":
        pytest.skip("a compiled step over losses is for torch 2.11 and newer")
    seen = []
    for compiled in False, True:
        model, lr = student()[: 1 if backend == "inductor" else 3], torch.tensor(0.05)
        optimizer = cls(model.parameters(), lr=lr, **({"momentum": 0.9} if is_sgd(cls) else {}))
        step = torch.compile(optimizer.step, backend=backend) if compiled else optimizer.step
        graphs = []
        for n, x in enumerate(batches(6)):
            optimizer.zero_grad()
            lr.fill_(0.05 / (n + 1))
            if way == "list":
                step(two_losses(model, x))
            elif way == "plain":
                summed(model, x).backward()
                step()
            else:
                optimizer.backward(two_losses(model, x))
                step()
            graphs.append(counters["stats"]["unique_graphs"])
        if compiled:
            assert graphs[0] > 0, "something was compiled"
            # The second step alone may differ: there are buffers now.
            assert graphs[1:] == graphs[1:2] * 5
            if way != "two phases" or cls in (MoKDSGD, MoKDAdamW):
                assert graphs[-1] <= 5, "torch breaks before and after a step of its own, and we around backward passes"
            else:
                assert graphs[-1] <= 2
                assert not counters["graph_break"]
        seen.append(flat(model.parameters()))
    torch.testing.assert_close(*seen, rtol=1e-4, atol=1e-5)
