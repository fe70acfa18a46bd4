"""The process of a run: started so that it outlives its terminal, known again by more than its number.

A process id alone may belong to another process by now; with the time of its start and its command it cannot.
"""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil

_CLOCK_S = 1.0  # how far two readings of one process's start may be apart


def describe_process(pid: int | None = None) -> dict[str, Any]:
    """What a process is known by, of the calling one by default: pid, created (seconds since 1970), command."""
    process = psutil.Process(pid)
    return {"pid": process.pid, "created": process.create_time(), "command": process.cmdline()}


def find_process(described: Mapping[str, Any] | None) -> psutil.Process | None:
    """The process that was described, None if it has ended or its number belongs to another one by now."""
    if not described:
        return None
    try:
        process = psutil.Process(int(described["pid"]))
        if abs(process.create_time() - float(described["created"])) > _CLOCK_S:
            return None
        if process.status() == psutil.STATUS_ZOMBIE or process.cmdline() != list(described["command"]):
            return None
    except (psutil.Error, KeyError, TypeError, ValueError):
        return None
    return process


def detach(command: Sequence[str], log: Path) -> int:
    """Start `command` in a session of its own, deaf to hang-ups, with all it prints in `log`; returns its pid."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # what is ignored here is ignored by the child
    try:
        with log.open("ab") as file:
            process = subprocess.Popen(
                list(command),
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                close_fds=True,
            )
    finally:
        signal.signal(signal.SIGHUP, before)
    return process.pid


def end_process(process: psutil.Process, patience_s: float) -> bool:
    """Ask the process to end, and after `patience_s` make it; whether it did as asked."""
    try:
        process.terminate()
        process.wait(patience_s)
        return True
    except psutil.TimeoutExpired:
        process.kill()
        return False
    except psutil.NoSuchProcess:
        return True
