"""The pages that name tests name tests that exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

HERE = Path(__file__).parent


@pytest.mark.parametrize(("page", "least"), [("tested.md", 21), ("peers.md", 5), ("moving.md", 6)])
def test_the_page_names_tests_that_exist(page: str, least: int) -> None:
    text = (HERE.parent / "docs" / page).read_text("utf-8")
    rows = [line for line in text.splitlines() if "::test_" in line]
    assert len(rows) >= least
    for row in rows:
        file = ""
        for found, name in re.findall(r"`([\w/]+\.py)?::(\w+)`", row):
            file = found or file
            assert f"def {name}(" in (HERE / file).read_text("utf-8"), f"{file}::{name}"
