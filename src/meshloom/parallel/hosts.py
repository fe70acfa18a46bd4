"""Several hosts of one run: a store on a port of host 0, by which their agents and ranks find one another.

The store is served by a process of its own: an agent that forks ranks must have no threads of C++.
"""

from __future__ import annotations

import multiprocessing
import signal
import socket
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection

from torch._C._distributed_c10d import Store, TCPStore

from meshloom.errors import RunFailed, UsageError

_PAUSE_S = 0.2
_POLITE_S = 2.0
_FAREWELL_S = 30.0
_PORT = 29400  # torchrun's own default


@dataclass(frozen=True, slots=True, kw_only=True)
class Hosts:
    """How many hosts there are, which one this is, and where host 0 answers: `address`, `port`.

    `job` is what all must be asked for alike, in words; `timeout_s` how long they wait for one another.
    """

    num_hosts: int
    host_rank: int
    address: str
    port: int = _PORT
    job: str = ""
    timeout_s: float = 600.0

    @property
    def name(self) -> str:
        """How the agent of this host is called; agents are numbered in the order of their names."""
        return f"host{self.host_rank:05}"

    @property
    def endpoint(self) -> str:
        """Where host 0 answers, as host:port."""
        return f"{self.address}:{self.port}"

    def __str__(self) -> str:
        return f"host {self.host_rank} of {self.num_hosts}"

    def connect(self) -> Store:
        """A client of the store; raises RunFailed if it does not answer in time."""
        try:
            return TCPStore(self.address, self.port, is_master=False, timeout=timedelta(seconds=self.timeout_s))
        except RuntimeError as error:
            raise RunFailed(f"{self}: what answers on {self.endpoint} is no host 0 of a run") from error


def parse_endpoint(text: str) -> tuple[str, int]:
    """Address and port of host, host:port or [v6]:port; raises UsageError."""
    address, colon, port = text.rpartition(":") if not text.endswith("]") else (text, "", "")
    if not colon:
        address, port = text, str(_PORT)
    address = address.strip("[]")
    if not address or not port.isdigit() or not 0 < int(port) < 65536:
        raise UsageError(f"--rdzv-endpoint: expected HOST:PORT of host 0, such as node0:{_PORT}, got {text!r}")
    return address, int(port)


@contextmanager
def joined(hosts: Hosts, *, facts: str, again: bool) -> Iterator[str]:
    """Within this, the store of the run is there; gives the id of the run, the same on all hosts.

    `facts` must be those of host 0, `again` lets a host come back. Raises UsageError if they differ, the port is taken
    or the place is; RunFailed if host 0 does not come. Host 0 leaves last.
    """
    with _served(hosts):
        _wait_for_first(hosts)
        store = hosts.connect()
        told = store.compare_set("facts", "", facts).decode()
        if told != facts:
            raise UsageError(f"{hosts}: expected the same on all hosts, host 0 has {told}, this one {facts}")
        if store.add(f"host {hosts.host_rank}", 1) > 1 and not again:
            raise UsageError(f"{hosts} is there already; give each host another --node-rank")
        yield store.compare_set("run", "", uuid.uuid4().hex).decode()
        _leave(hosts, store)


def _leave(hosts: Hosts, store: Store) -> None:
    """Tell that this host has done; host 0 waits for the others, which still need the store."""
    gone = store.add("left", 1)
    deadline = time.monotonic() + _FAREWELL_S
    while hosts.host_rank == 0 and gone < hosts.num_hosts and time.monotonic() < deadline:
        time.sleep(_PAUSE_S)
        gone = store.add("left", 0)


def _wait_for_first(hosts: Hosts) -> None:
    start, told = time.monotonic(), False
    while not _answers(hosts):
        waited = time.monotonic() - start
        if waited > hosts.timeout_s:
            raise RunFailed(f"{hosts} waited {waited:.0f} s for host 0 on {hosts.endpoint}, in vain")
        if not told and waited > _POLITE_S:
            print(f"{hosts} waits for host 0 on {hosts.endpoint}", file=sys.stderr, flush=True)
            told = True
        time.sleep(_PAUSE_S)


def _answers(hosts: Hosts) -> bool:
    try:
        socket.create_connection((hosts.address, hosts.port), timeout=2).close()
    except OSError:
        return False
    return True


@contextmanager
def _served(hosts: Hosts) -> Iterator[None]:
    """On host 0 the store's process, which ends with this one."""
    if hosts.host_rank:
        yield
        return
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("fork").Process(target=_serve, args=(hosts.port, theirs, ours), daemon=True)
    process.start()
    theirs.close()
    try:
        failed = ours.recv()
    except EOFError:
        failed = "its process ended"
    if failed:
        raise UsageError(
            f"{hosts}: expected to open port {hosts.port}, got '{failed}'; perhaps another run has it: give all hosts "
            "another --rdzv-endpoint"
        )
    try:
        yield
    finally:
        ours.close()  # which ends it
        process.join(5)
        process.kill()


def _serve(port: int, told: Connection, other: Connection) -> None:
    """Hold the store until the process that asked for it is gone."""
    other.close()  # the copy that came by the fork would keep the pipe open
    for number in (signal.SIGINT, signal.SIGTERM):  # the ranks still need it while they are ended
        signal.signal(number, signal.SIG_IGN)
    try:
        everyone = "0.0.0.0"  # nosec B104 # other hosts must reach it, and only who names several hosts comes here
        store = TCPStore(everyone, port, is_master=True, wait_for_workers=False, multi_tenant=False)
    except RuntimeError as error:
        told.send(str(error).splitlines()[0][:200])
        return
    told.send("")
    try:
        told.recv()
    except EOFError:
        del store
