"""Who is missing when ranks wait in vain: what each rank did last with others, and where its own code stands.

torch notes every collective of a rank (its flight recorder), finished or not. When one takes longer than is allowed it
fails on those who came; who did not come is in no collective, and what it does instead its stack tells.
"""

from __future__ import annotations

import json
import re
import sys
import threading
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

_TIMED_OUT = re.compile(r"timed out", re.IGNORECASE)


def limit_waits(timeout_s: float) -> None:
    """Let a collective of any group that there is now fail after so many seconds; torch's own limit is 30 minutes."""
    limit = timedelta(seconds=timeout_s)
    for group in list(distributed_c10d._world.pg_map):
        distributed_c10d._set_pg_timeout(limit, group)


def last_collective() -> dict[str, Any]:
    """The last collective or message of this rank: name, number in its group, ranks, shapes, and whether it ended.

    Empty where there was none, or torch notes none.
    """
    dump: Any = getattr(torch._C._distributed_c10d, "_dump_fr_trace_json", None)
    try:
        told = json.loads(dump(includeCollectives=True))
        last = max(told.get("entries", []), key=lambda entry: int(entry["record_id"]), default=None)
        if last is None:
            return {}
        name = str(last["process_group"][0])
        groups = {str(each): group for group, each in distributed_c10d._world.pg_names.items()}
        ranks = dist.get_process_group_ranks(groups[name]) if name in groups else []
        return {
            "name": str(last["profiling_name"]).partition(":")[2] or str(last["profiling_name"]),
            "number": int(last["p2p_seq_id" if last["is_p2p"] else "collective_seq_id"]),
            "ranks": ranks,
            "shapes": last["input_sizes"],
            "ended": bool(last["retired"]),
        }
    except (AttributeError, LookupError, TypeError, ValueError, RuntimeError):  # the recorder is no promise of torch's
        return {}


def where_it_is() -> str:
    """The innermost line of the main thread that is not torch's or Python's own, as file, line and function."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    told = ""
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        line = f"{path.name}:{frame.f_lineno} in {frame.f_code.co_name}"
        told = told or line
        if not {"torch", "lib", "importlib"} & set(path.parts[-4:-1]) and not frame.f_code.co_filename.startswith("<"):
            return line
        frame = frame.f_back
    return told


def waited_in_vain(ends: Mapping[int, Mapping[str, Any]], ranks: range) -> str:
    """The sentence that names who did not come, and to what; empty if no rank of `ends` waited in vain.

    `ends` are the notes of how ranks ended, with `last` and `at` as told by `last_collective` and `where_it_is`.
    """
    waiters = {
        rank: end for rank, end in ends.items() if end["how"] != "finished" and _TIMED_OUT.search(end["message"])
    }
    if not waiters:
        return ""
    first = min(waiters, key=lambda rank: waiters[rank]["time_ns"])
    what = waiters[first].get("last") or {}
    group = what.get("ranks") or list(ranks)
    hung = [rank for rank in ranks if rank not in waiters and (rank not in ends or _is_elsewhere(ends[rank]))]
    came = f"{what['name']} number {what['number']} of ranks {', '.join(map(str, group))}" if what else "a collective"
    if not hung:
        return f"rank {first} waited in {came} until its time was up (--collective-timeout)"
    told = [f"rank {rank} was in {ends[rank]['at']}" for rank in hung if ends.get(rank, {}).get("at")]
    names = f"rank{'s' * (len(hung) > 1)} {', '.join(map(str, hung))}"
    where = "; ".join(told) or f"{names} gave no sign of life"
    return f"{names} hung: rank {first} waited for it in {came} until its time was up (--collective-timeout); {where}"


def _is_elsewhere(end: Mapping[str, Any]) -> bool:
    last = end.get("last") or {}
    return str(end["how"]).startswith("SIG") and (not last or bool(last.get("ended")))
