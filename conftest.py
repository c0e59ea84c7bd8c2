"""Runs the examples: in docstrings, in README.md and in docs/."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import pytest
import torch
from sybil import Sybil
from sybil.parsers.markdown import PythonCodeBlockParser, SkipParser

import distill_optim

# Scripts to run, not modules with examples; they need frameworks that the core tests do without.
collect_ignore_glob = ["docs/integrations/*.py"]
# The one module that imports Triton, which not every machine has.
if find_spec("triton") is None:
    collect_ignore_glob.append("distill_optim/update/kernels.py")

pytest_collect_file = Sybil(parsers=[PythonCodeBlockParser(), SkipParser()], patterns=["*.md"]).pytest()


@pytest.fixture(autouse=True)
def _names_in_examples(doctest_namespace: dict[str, Any]) -> None:
    doctest_namespace.update(
        torch=torch,
        distill_optim=distill_optim,
        leaves_above=distill_optim.gradients.leaves_above,
    )
    torch.manual_seed(0)
