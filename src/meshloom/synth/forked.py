"""Several independent passes at once: each in a process of its own, forked after everything is imported.

What a process found comes back as bytes. Where a process cannot be forked, or cannot run backward because its parent
did so before it, the parent runs the pass itself.
"""

from __future__ import annotations

import gc
import os
import select
import signal
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress

import torch

Job = Callable[[], bytes]


def run_all(jobs: Sequence[Job], *, num_processes: int, backward: bool = False) -> list[bytes]:
    """What each job returns, in order; up to so many run at once. Raises what a job raises.

    `backward`: whether they run backward, which a process cannot whose parent did so before.
    """
    results: dict[int, bytes] = {}
    forks = sys.platform == "linux" and num_processes > 1
    running: dict[int, tuple[int, int]] = {}  # job -> (process, where its bytes come from)
    waiting = list(range(len(jobs)))
    try:
        while waiting or running:
            while forks and len(running) < num_processes - 1 and len(waiting) > 1:
                index = waiting.pop()
                running[index] = _fork(jobs[index], backward)
            if waiting:
                index = waiting.pop(0)
                results[index] = jobs[index]()
            _collect(running, results, jobs, all_of_them=not waiting)
    finally:
        for process, pipe in running.values():
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
            os.waitpid(process, 0)
            os.close(pipe)
    return [results[index] for index in range(len(jobs))]


def _collect(
    running: dict[int, tuple[int, int]], results: dict[int, bytes], jobs: Sequence[Job], *, all_of_them: bool
) -> None:
    """Take what is done, waiting for it if `all_of_them`; a job whose process could not do it is done here."""
    for index, (process, pipe) in list(running.items()):
        if not all_of_them and not select.select([pipe], [], [], 0)[0]:
            continue
        with os.fdopen(pipe, "rb") as file:
            del running[index]
            data = file.read()
        os.waitpid(process, 0)
        results[index] = data[1:] if data[:1] == b"+" else jobs[index]()


def _fork(job: Job, backward: bool) -> tuple[int, int]:
    """A process that runs the job, and the end of the pipe where its bytes come from, after a plus."""
    mine, theirs = os.pipe()
    sys.stdout.flush()
    sys.stderr.flush()
    process = os.fork()
    if process:
        os.close(theirs)
        return process, mine
    status = 1
    try:
        gc.freeze()  # pages that are shared stay so
        os.close(mine)
        if backward:
            torch.ones((), requires_grad=True).backward()  # fails at once if it cannot be
        data = job()
        with os.fdopen(theirs, "wb") as file:
            file.write(b"+" + data)
        status = 0
    except BaseException:  # the parent does the job again, and so raises what there is to raise
        status = 1
    finally:
        os._exit(status)
