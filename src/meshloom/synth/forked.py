"""Several independent passes at once: each in a process of its own, forked after everything is imported.

What a process found comes back as bytes. The parent itself runs none of them while others do: a process cannot run
backward whose parent did so before it.
"""

from __future__ import annotations

import gc
import os
import select
import signal
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress

Job = Callable[[], bytes]


def run_all(jobs: Sequence[Job], *, num_processes: int) -> list[bytes]:
    """What each job returns, in order; up to so many run at once, or all in this process if that is 1.

    Raises what a job raises. A process that did run backward, or has threads, must not ask for more than 1.
    """
    if sys.platform != "linux" or num_processes == 1 or len(jobs) == 1:
        return [job() for job in jobs]
    results: dict[int, bytes] = {}
    running: dict[int, tuple[int, int]] = {}  # job -> (process, where its bytes come from)
    waiting = list(range(len(jobs)))
    try:
        while waiting or running:
            while waiting and len(running) < num_processes:
                index = waiting.pop(0)
                running[index] = _fork(jobs[index])
            _collect(running, results)
    finally:
        for process, pipe in running.values():
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
            os.waitpid(process, 0)
            os.close(pipe)
    # What failed is done again here, and so raises what there is to raise.
    return [results[index] if index in results else job() for index, job in enumerate(jobs)]


def _collect(running: dict[int, tuple[int, int]], results: dict[int, bytes]) -> None:
    """Wait for one that is done, and take its result if it has one."""
    ready, _, _ = select.select([pipe for _, pipe in running.values()], [], [])
    for index, (process, pipe) in list(running.items()):
        if pipe in ready:
            with os.fdopen(pipe, "rb") as file:
                del running[index]
                data = file.read()
            os.waitpid(process, 0)
            if data[:1] == b"+":
                results[index] = data[1:]


def _fork(job: Job) -> tuple[int, int]:
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
        data = job()
        with os.fdopen(theirs, "wb") as file:
            file.write(b"+" + data)
        status = 0
    except BaseException:  # the parent does the job again, and so raises what there is to raise
        status = 1
    finally:
        os._exit(status)
