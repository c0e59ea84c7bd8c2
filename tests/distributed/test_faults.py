"""A process that raises does not leave the others waiting."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import pytest
import torch
from torch import distributed

from tests.distributed import faults
from tests.processes import TIMEOUT

pytestmark = pytest.mark.skipif(not distributed.is_available(), reason="this build of torch has no torch.distributed")


@pytest.mark.parametrize("when", ["forward", "backward"])
def test_the_others_get_an_error_and_not_a_deadlock(tmp_path: Path, when: str) -> None:
    """At once, and not when the group's timeout has passed: the connection of a process that ends is closed."""
    context = torch.multiprocessing.get_context("spawn")
    pipes = [context.Pipe() for _ in range(2)]
    started = time.monotonic()
    processes = [
        context.Process(target=faults.raises_in_one, args=(rank, str(tmp_path / "store"), pipes[rank][1], when))
        for rank in range(2)
    ]
    try:
        for process in processes:
            process.start()
        for process in processes:
            process.join(TIMEOUT)
        assert time.monotonic() - started < TIMEOUT / 2
        # Where the wrapper has a reduction under way gloo sometimes ends the process itself: the second when its
        # connection breaks, the first in the interpreter's end, when it has told its error.
        assert processes[0].exitcode in (1, -signal.SIGABRT)
        assert pipes[0][0].recv() == "ArithmeticError"
        assert processes[1].exitcode in (1, -signal.SIGABRT)
        if processes[1].exitcode == 1:
            assert pipes[1][0].recv() in ("RuntimeError", "DistBackendError")
    finally:
        for process in processes:
            process.kill()
