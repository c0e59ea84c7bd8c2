"""Several processes on this machine, for tests of what happens between them."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
from torch import distributed
from torch.multiprocessing.spawn import spawn

# Seconds that a function may take.
TIMEOUT = 60.0


def run(function: Callable[..., None], folder: Path, *arguments: Any, world: int = 2) -> None:
    """Calls ``function(rank, *arguments)`` in processes of one gloo group; raises what any of them raises.

    The function has to be importable: one at the top of a test module.
    """
    spawn(_enter, (function, str(folder / "store"), world, arguments), nprocs=world)


def _enter(rank: int, function: Callable[..., None], store: str, world: int, arguments: tuple[Any, ...]) -> None:
    join(rank, world, store)
    try:
        function(rank, *arguments)
    finally:
        distributed.destroy_process_group()
    leave()


def leave() -> None:
    """Ends this process, its work done, without taking Python down.

    Threads of gloo that outlive their group, because a DDP reducer or a mesh still holds it, would now and then abort
    it then: "terminate called without an active exception".
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def join(rank: int, world: int, store: str) -> None:
    """Makes this process one of a gloo group on this machine."""
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    distributed.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=world, timeout=timedelta(seconds=TIMEOUT)
    )


class Pool:
    """Processes of one gloo group that stay for many tests, because to start them takes seconds.

    After a failure they are stopped, and started anew for the next test.
    """

    def __init__(self, folder: Path, world: int = 2) -> None:
        self._folder, self._world, self._starts = folder, world, 0
        self._processes: list[Any] = []
        self._pipes: list[Connection] = []

    def run(self, function: Callable[..., Any], *arguments: Any, **keywords: Any) -> list[Any]:
        """What ``function(rank, *arguments, **keywords)`` returns in each process; the function has to be importable.

        Raises:
            AssertionError: with the traceback of the first process that raised, or that was not done in time.
        """
        if not self._processes:
            self._start()
        for pipe in self._pipes:
            pipe.send((function, arguments, keywords))
        results: dict[int, Any] = {}
        while len(results) < self._world:
            ready = wait([pipe for rank, pipe in enumerate(self._pipes) if rank not in results], TIMEOUT)
            failure = None if ready else f"not done in {TIMEOUT} s: processes {set(range(self._world)) - set(results)}"
            for rank in [rank for rank, pipe in enumerate(self._pipes) if pipe in ready]:
                try:
                    results[rank], error = self._pipes[rank].recv()
                except EOFError:
                    error = "the process died"
                failure = failure or (error and f"process {rank}: {error}")
            if failure:
                self.stop()
                raise AssertionError(failure)
        return [results[rank] for rank in range(self._world)]

    def _start(self) -> None:
        self._starts += 1
        context = torch.multiprocessing.get_context("spawn")
        for rank in range(self._world):
            here, there = context.Pipe()
            store = str(self._folder / f"store-{self._starts}")
            process = context.Process(target=_serve, args=(rank, self._world, store, there), daemon=True)
            process.start()
            self._processes.append(process)
            self._pipes.append(here)

    def stop(self) -> None:
        """Ends the processes."""
        for process in self._processes:
            process.kill()
            process.join()
        self._processes, self._pipes = [], []


def _serve(rank: int, world: int, store: str, pipe: Connection) -> None:
    join(rank, world, store)
    while True:
        function, arguments, keywords = pipe.recv()
        try:
            pipe.send((function(rank, *arguments, **keywords), None))
        except BaseException:
            pipe.send((None, traceback.format_exc()))
