"""Processes that stay for all tests of a module."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from torch import distributed

from tests.processes import Pool


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pool]:
    if not distributed.is_available():
        pytest.skip("this build of torch has no torch.distributed")
    pool = Pool(tmp_path_factory.mktemp("pool"))
    yield pool
    pool.stop()
