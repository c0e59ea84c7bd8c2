"""The table of what was tested where names tests that exist."""

from __future__ import annotations

import re
from pathlib import Path

HERE = Path(__file__).parent


def test_the_table_names_tests_that_exist() -> None:
    table = (HERE.parent / "docs" / "tested.md").read_text("utf-8")
    rows = [line for line in table.splitlines() if line.startswith("| ") and "::" in line]
    assert len(rows) > 20
    for row in rows:
        file = ""
        for found, name in re.findall(r"`([\w/]+\.py)?::(\w+)`", row):
            file = found or file
            assert f"def {name}(" in (HERE / file).read_text("utf-8"), f"{file}::{name}"
