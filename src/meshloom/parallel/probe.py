"""What ranks find out about this host for `meshloom doctor`: whether a collective runs, and how fast things are.

Everything that would start a CUDA context runs in a rank, never in the process that forks ranks.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from meshloom.parallel.launch import rank_context

RESULT, LATE = "probe.json", "late"
ALL_REDUCE_BYTES = tuple(1 << power for power in range(12, 26, 2))
_SIZE = {"cpu": 1024, "cuda": 8192}  # of the products that are timed
_ROUNDS = 5


def probe(folder: str, device: str, limit_s: float) -> None:
    """On each of two ranks: sum numbers over both, time an all-reduce and a product; rank 0 writes `RESULT`.

    A rank that is not done after `limit_s` seconds leaves the file `LATE` and ends: a collective hangs.
    """
    watch = threading.Timer(limit_s, _give_up, (Path(folder),))
    watch.daemon = True
    watch.start()
    with rank_context(device) as chosen:
        rank, num_ranks = dist.get_rank(), dist.get_world_size()
        ours = torch.arange(1000, dtype=torch.float32, device=chosen) + rank
        dist.all_reduce(ours)
        wanted = num_ranks * torch.arange(1000, dtype=torch.float32) + num_ranks * (num_ranks - 1) / 2
        told: dict[str, Any] = {"backend": dist.get_backend(), "sum_is_right": bool(torch.equal(ours.cpu(), wanted))}
        told["all_reduce_s"] = {str(size): _all_reduce_s(size, chosen) for size in ALL_REDUCE_BYTES}
        if rank == 0:
            told |= describe_device(chosen)
            Path(folder, RESULT).write_text(json.dumps(told))
        dist.barrier()
    watch.cancel()


def probe_alone(folder: str, device: str, limit_s: float) -> None:
    """The same on one rank where there is but one GPU: its speed, and no collective."""
    watch = threading.Timer(limit_s, _give_up, (Path(folder),))
    watch.daemon = True
    watch.start()
    with rank_context(device) as chosen:
        Path(folder, RESULT).write_text(json.dumps(describe_device(chosen)))
    watch.cancel()


def describe_device(device: torch.device) -> dict[str, Any]:
    """Name and measured speed of a device, and of all GPUs of this host name, free memory and who reaches whom."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    told: dict[str, Any] = {"gpus": [], "dtype": str(dtype).removeprefix("torch."), "device": "cpu"}
    threads = torch.get_num_threads()
    if device.type == "cpu":  # the other rank waits meanwhile
        with suppress(AttributeError):
            torch.set_num_threads(len(os.sched_getaffinity(0)))
    told["threads"] = torch.get_num_threads()
    size = _SIZE[device.type]
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    seconds = _fastest(lambda: left @ right, device)
    told["flops_per_second"] = 2 * size**3 / seconds
    torch.set_num_threads(threads)
    if device.type == "cuda":
        told["device"] = torch.cuda.get_device_name(device)
        count = torch.cuda.device_count()
        for index in range(count):
            free, total = torch.cuda.mem_get_info(index)
            reached = [other for other in range(count) if other != index and _reaches(index, other)]
            name = torch.cuda.get_device_name(index)
            told["gpus"].append({"name": name, "free_bytes": free, "total_bytes": total, "reaches": reached})
    return told


def _reaches(one: int, other: int) -> bool:
    return bool(torch.cuda.can_device_access_peer(one, other))


def _all_reduce_s(num_bytes: int, device: torch.device) -> float:
    tensor = torch.zeros(num_bytes // 4, dtype=torch.float32, device=device)

    def run() -> None:
        dist.all_reduce(tensor)

    dist.barrier()
    return _fastest(run, device)


def _fastest(function: Callable[[], Any], device: torch.device) -> float:
    """Seconds of the fastest of a few calls, after one that is not counted."""
    times = []
    for _ in range(_ROUNDS + 1):
        begin = time.perf_counter()
        function()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - begin)
    return min(times[1:])


def _give_up(folder: Path) -> None:
    (folder / LATE).touch()
    os._exit(1)
