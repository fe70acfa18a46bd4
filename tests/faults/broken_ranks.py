"""A run in which one rank is killed, or hangs, in one phase; started as a script: PHASE RANK and train's arguments."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable
from typing import Any

import meshloom.capture.record as record
import meshloom.train.loop as loop
from meshloom.cli.__main__ import _run
from meshloom.parallel.launch import world_from_environment
from meshloom.train.checkpoint import Writer

# phase -> (what holds the function, its name, the how-manieth call of it is the last)
PHASES: dict[str, tuple[Any, str, int]] = {
    "start": (loop, "make_mesh", 1),
    "step": (loop, "train_step", 4),
    "hang": (loop, "train_step", 4),
    "collective": (loop.dist, "all_gather", 4),
    "save": (Writer, "write_data", 3),  # the initial model's, that of the first checkpoint, and the second's
    "trace": (record, "convert_rank", 1),
}


def _broken(plain: Callable[..., Any], rank: str, last: int, hangs: bool) -> Callable[..., Any]:
    calls = 0

    def instead(*args: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        told = world_from_environment()
        if calls == last and told is not None and told[0] == int(rank):
            if hangs:
                threading.Event().wait()
            os.kill(os.getpid(), signal.SIGKILL)
        return plain(*args, **options)

    return instead


if __name__ == "__main__":
    phase, rank, *arguments = sys.argv[1:]
    where, name, last = PHASES[phase]
    setattr(where, name, _broken(getattr(where, name), rank, last, phase == "hang"))
    sys.exit(_run(["train", *arguments]))
