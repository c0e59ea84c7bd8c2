"""The walls of docs/architecture.md: what imports what, and that the map there has every file."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

import distill_optim

PACKAGE = Path(distill_optim.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))

# What each room may look into, beside itself. The stations of the walk know nothing of each other.
MAY_IMPORT: dict[str, set[str]] = {
    "sharding": set(),
    "buckets": set(),
    "gradients": {"sharding", "buckets"},
    "combine": {"sharding", "buckets"},
    "update": {"sharding"},
    "distill": set(),
    "stats": set(),
    "multi_loss": {"gradients", "stats"},
    "closure": {"gradients", "multi_loss"},
    "dot": {"gradients", "combine", "update", "stats", "multi_loss"},
    "mokd": {"gradients", "combine", "update", "stats", "multi_loss"},
    "monitor": {"gradients", "combine", "stats", "multi_loss"},
}


def room(path: Path) -> str:
    first = path.relative_to(PACKAGE).parts[0]
    return first.removesuffix(".py")


def imported(path: Path) -> set[str]:
    """The rooms that a file imports anywhere, in functions too."""
    rooms = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        rooms |= {name.split(".")[1] for name in names if name.startswith("distill_optim.")}
    return rooms


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_room_imports_one_further_down_the_walk(path: Path) -> None:
    if room(path) in MAY_IMPORT:
        assert imported(path) - {room(path)} <= MAY_IMPORT[room(path)]


def test_only_the_kernels_need_triton() -> None:
    found = [path.name for path in FILES if re.search(r"^(import|from) triton", path.read_text("utf-8"), re.M)]
    assert found == ["kernels.py"]


def test_the_map_has_every_file() -> None:
    page = (PACKAGE.parent / "docs" / "architecture.md").read_text("utf-8")
    drawn = page.split("```")[1]
    names = set(re.findall(r"\w+\.py|\w+/", drawn))
    for path in FILES:
        parts = path.relative_to(PACKAGE).parts
        assert parts[0] in names or f"{parts[0]}/" in names, f"{path} is not on the map"
    for name in names - {"distill_optim/"}:
        assert list(PACKAGE.rglob(name.removesuffix("/"))), f"{name} is on the map and not there"
