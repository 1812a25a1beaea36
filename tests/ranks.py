"""Processes that are the ranks of a group, for tests: gloo over a file, or over loopback."""

import datetime
import os
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

# Many times what a test takes.
GUARD = 300


def run_ranks(size: int, folder: Path, function: Callable[..., Any], *args: Any) -> list[Any]:
    """Return what function(rank, *args) returned, or the exception it raised, on every rank.

    A rank that ends without either, because it was killed, gives its exit code.
    """
    context = mp.get_context("spawn")
    ranks = [
        context.Process(target=_one, args=(rank, size, str(folder), function, args))
        for rank in range(size)
    ]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(GUARD)
    for rank in ranks:
        if rank.is_alive():
            rank.kill()
            rank.join()
    found = [folder / f"result-{rank}" for rank in range(size)]
    return [
        torch.load(path, weights_only=False) if path.exists() else process.exitcode
        for path, process in zip(found, ranks, strict=True)
    ]


def _one(rank: int, size: int, folder: str, function: Callable[..., Any], args: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=size,
        timeout=datetime.timedelta(seconds=60),
    )
    try:
        result = function(rank, *args)
    except Exception as error:
        traceback.print_exc()
        result = f"{type(error).__name__}: {error}"
    torch.save(result, f"{folder}/partial-{rank}")
    os.replace(f"{folder}/partial-{rank}", f"{folder}/result-{rank}")
    os._exit(0)  # a rank whose peers are gone cannot leave the group
