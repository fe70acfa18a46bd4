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
    """What a process is known by, of the calling one by default: pid, created (seconds since 1970), command, and on
    Linux `since_boot`, the boot and the clock ticks after it, which no change of the clock moves."""
    process = psutil.Process(pid)
    told = {"pid": process.pid, "created": process.create_time(), "command": process.cmdline()}
    since_boot = _since_boot(process.pid)
    return told if since_boot is None else {**told, "since_boot": since_boot}


def find_process(described: Mapping[str, Any] | None) -> psutil.Process | None:
    """The process that was described, None if it has ended or its number belongs to another one by now."""
    if not described:
        return None
    try:
        process = psutil.Process(int(described["pid"]))
        since_boot = _since_boot(process.pid) if "since_boot" in described else None
        if since_boot is not None and since_boot != described["since_boot"]:
            return None
        if since_boot is None and abs(process.create_time() - float(described["created"])) > _CLOCK_S:
            return None
        if process.status() == psutil.STATUS_ZOMBIE or process.cmdline() != list(described["command"]):
            return None
    except (psutil.Error, KeyError, TypeError, ValueError):
        return None
    return process


def _since_boot(pid: int) -> str | None:
    """Which boot of this machine, and how many ticks after it the process began; None where /proc does not tell."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
        return f"{boot} {int(fields[19])}"
    except (OSError, ValueError, IndexError):
        return None


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
