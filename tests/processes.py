"""Several processes on this machine, for tests of what happens between them."""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import distributed
from torch.multiprocessing.spawn import spawn


def run(function: Callable[..., None], folder: Path, *arguments: Any, world: int = 2) -> None:
    """Calls ``function(rank, *arguments)`` in processes of one gloo group; raises what any of them raises.

    The function has to be importable: one at the top of a test module.
    """
    spawn(_enter, (function, str(folder / "store"), world, arguments), nprocs=world)


def _enter(rank: int, function: Callable[..., None], store: str, world: int, arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    distributed.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=world, timeout=timedelta(seconds=60)
    )
    try:
        function(rank, *arguments)
    finally:
        distributed.destroy_process_group()
