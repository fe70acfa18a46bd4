"""Where ranks that were started by hand find one another: a store that rank 0 opens on a port of this host.

A rank that waits says for whom, and how to start them. Nothing is agreed on but who is there and that all run the same
command; process groups are made after.
"""

from __future__ import annotations

import os
import socket
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

from torch._C._distributed_c10d import Store, TCPStore

from meshloom.errors import RunFailed, UsageError

HOST = "127.0.0.1"
_PAUSE_S = 0.1
_POLITE_S = 1.0  # ranks that come together need not be told
_FAREWELL_S = 30.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Meeting:
    """Who meets where: `command` is what each rank runs, with {rank} in the place of its number."""

    rank: int
    world_size: int
    port: int
    timeout_s: float
    command: str

    def __str__(self) -> str:
        return f"rank {self.rank} of {self.world_size}"


@contextmanager
def meet(meeting: Meeting) -> Iterator[Store]:
    """A store that all ranks of the meeting share, given once all are there; rank 0 leaves it last.

    Raises UsageError if the port is taken, the rank is there already or runs another command than rank 0, RunFailed if
    others do not come in time.
    """
    deadline = time.monotonic() + meeting.timeout_s
    store = _open(meeting, deadline)
    try:
        join(meeting, store)
        try:
            _wait(meeting, deadline, lambda: _missing(meeting, store, "place"))
        except BaseException:
            store.delete_key(f"place {meeting.rank}")  # so that it can be started again
            raise
    except RuntimeError as error:  # of the store, when its host has gone
        raise RunFailed(f"{meeting}: rank 0 left while ranks were waiting for one another; start it again") from error
    print(f"{meeting}: all ranks are here", file=sys.stderr, flush=True)
    yield store
    store.set(f"done {meeting.rank}", "")
    end = time.monotonic() + _FAREWELL_S
    while meeting.rank == 0 and _missing(meeting, store, "done") and time.monotonic() < end:
        time.sleep(_PAUSE_S)


def _open(meeting: Meeting, deadline: float) -> Store:
    if meeting.rank == 0:
        try:
            return _store(meeting, meeting.timeout_s)
        except RuntimeError as error:
            raise UsageError(
                f"{meeting}: port {meeting.port} is taken, perhaps by a rank 0 that is running already; "
                "end that, or give all ranks another --port"
            ) from error
    _wait(meeting, deadline, lambda: [] if _answers(meeting.port) else [0])
    try:
        return _store(meeting, max(1.0, deadline - time.monotonic()))
    except RuntimeError as error:
        raise UsageError(
            f"{meeting}: what answers on {HOST}:{meeting.port} is no rank 0; give all ranks another --port"
        ) from error


def _store(meeting: Meeting, timeout_s: float) -> Store:
    return TCPStore(
        HOST,
        meeting.port,
        meeting.world_size,
        is_master=meeting.rank == 0,
        timeout=timedelta(seconds=timeout_s),
        wait_for_workers=False,
    )


def _answers(port: int) -> bool:
    try:
        socket.create_connection((HOST, port), timeout=1).close()
    except OSError:
        return False
    return True


def join(meeting: Meeting, store: Store) -> None:
    """Take this rank's place; raises UsageError if it is taken, or the command is not that of the others."""
    command = store.compare_set("command", "", meeting.command).decode()
    if command != meeting.command:
        raise UsageError(
            f"{meeting}: expected the command of the other ranks, `{command.format(rank=meeting.rank)}`, "
            f"got `{meeting.command.format(rank=meeting.rank)}`"
        )
    mine = f"{os.getpid()} {uuid.uuid4().hex}"
    holder = store.compare_set(f"place {meeting.rank}", "", mine).decode()
    if holder != mine:
        pid = holder.partition(" ")[0]
        raise UsageError(f"{meeting} is there already, as process {pid}; start another rank, or end that one")


def _missing(meeting: Meeting, store: Store, what: str) -> list[int]:
    return [rank for rank in range(meeting.world_size) if not store.check([f"{what} {rank}"])]


def _wait(meeting: Meeting, deadline: float, missing: Callable[[], list[int]]) -> None:
    """Until nobody is missing; says once who is, and raises RunFailed when the time is over."""
    told, since = False, time.monotonic()
    while ranks := missing():
        names = f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))}"
        where = f"on {HOST}:{meeting.port}"
        if time.monotonic() > deadline:
            raise RunFailed(f"{meeting} waited {meeting.timeout_s:.0f} s {where} for {names}, in vain")
        if not told and time.monotonic() > since + _POLITE_S:
            how = f"start {'it' if len(ranks) == 1 else 'each'} with `{meeting.command.format(rank=ranks[0])}`"
            print(f"{meeting} waits {where} for {names}: {how}", file=sys.stderr, flush=True)
            told = True
        time.sleep(_PAUSE_S)
