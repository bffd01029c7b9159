"""Runs a function on every rank of a gloo job, each rank a process; a rank that fails or hangs fails the test."""

import os
import socket
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.multiprocessing import get_context


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def run_ranks(function: Callable[..., Any], size: int, folder: Path, *args: Any, timeout_s: float = 120) -> list[Any]:
    """`function(*args)` in `size` processes with a process group; what each returned."""
    port = free_port()
    start = get_context("spawn").Process
    processes = [start(target=_rank, args=(function, rank, size, port, folder, args)) for rank in range(size)]
    for process in processes:
        process.start()
    deadline = time.monotonic() + timeout_s
    try:
        while any(process.is_alive() for process in processes):
            failed = [path.read_text() for path in folder.glob("failed*")]
            died = [process.exitcode for process in processes if process.exitcode]
            assert not failed and not died, f"exit codes {died}\n" + "\n".join(failed)
            assert time.monotonic() < deadline, f"ranks hang: {[process.is_alive() for process in processes]}"
            processes[-1].join(0.1)
    finally:
        for process in processes:
            process.kill()
            process.join()
    return [torch.load(folder / f"rank{rank}", weights_only=False) for rank in range(size)]


def _rank(function: Callable[..., Any], rank: int, size: int, port: int, folder: Path, args: tuple[Any, ...]) -> None:
    os.environ |= {
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "WORLD_SIZE": str(size)
    }  # fmt: skip
    torch.set_num_threads(1)
    try:
        torch.save(function(*args), folder / f"rank{rank}")
    except BaseException:
        (folder / f"failed{rank}").write_text(traceback.format_exc())
        raise
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
