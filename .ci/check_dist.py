"""Looks into what ``python -m build --outdir DIST`` made of this checkout: python .ci/check_dist.py DIST."""

import sys
import tarfile
import zipfile
from pathlib import Path

from packaging.metadata import Metadata

FOLDERS = (".ci", ".github", "benchmarks", "distill_optim", "docs", "tests")
FILES = ("CITATION.cff", "CHANGELOG.md", "LICENSE", "README.md", "conftest.py", "constraints.txt", "pyproject.toml")
LEFT_OUT = {"__pycache__", "_build"}


def files(folder: str) -> set[str]:
    """Those of the checkout, without caches."""
    found = (path for path in Path(folder).rglob("*") if path.is_file())
    return {path.as_posix() for path in found if LEFT_OUT.isdisjoint(path.parts)}


def expect_same(found: set[str], expected: set[str], where: Path) -> None:
    if found != expected:
        sys.exit(f"{where.name}: {sorted(expected - found)} missing, {sorted(found - expected)} too many")


def main(dist: Path) -> None:
    (wheel,), (sdist,) = dist.glob("*.whl"), dist.glob("*.tar.gz")

    with zipfile.ZipFile(wheel) as archive:
        (metadata,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        version = Metadata.from_email(archive.read(metadata)).version  # raises what an index would refuse
        info = metadata.removesuffix("METADATA")
        rest = {name for name in archive.namelist() if not name.startswith(info)}
        expect_same(rest, files("distill_optim"), wheel)
        assert f"{info}licenses/LICENSE" in archive.namelist(), "no licence in the wheel"

    assert f"\nversion: {version}\n" in Path("CITATION.cff").read_text("utf-8"), f"CITATION.cff is not of {version}"
    assert f"\n## {version} - " in Path("CHANGELOG.md").read_text("utf-8"), f"CHANGELOG.md has no {version}"

    with tarfile.open(sdist) as archive:
        held = {member.name.partition("/")[2] for member in archive if member.isfile()}
    for folder in FOLDERS:
        expect_same({name for name in held if name.startswith(f"{folder}/")}, files(folder), sdist)
    expect_same(held & set(FILES), set(FILES), sdist)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
