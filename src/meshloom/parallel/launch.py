"""Start the ranks of a run, and say what happened when one of them dies. The only place that reads the environment.

The ranks of a host are forked by torchrun's elastic agent after one import, so that eight are ready in the time of
one; agents of several hosts meet by a store on a port of host 0, and start all ranks again if one dies. Under
`torchrun` (or any launcher that sets RANK and WORLD_SIZE) the calling process is a rank already; so it is within
`launched`, one rank started by hand.
"""

from __future__ import annotations

import ctypes
import json
import logging
import os
import signal
import sys
import threading
import time
import traceback
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore, PrefixStore, Store, TCPStore
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException, Std
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.elastic.rendezvous import RendezvousError, rendezvous_handler_registry
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from meshloom import errors
from meshloom.errors import MeshloomError, PlanError, RunFailed
from meshloom.parallel import one_host
from meshloom.parallel.hosts import Hosts, joined
from meshloom.parallel.meet import Meeting, meet
from meshloom.parallel.waiting import last_collective, waited_in_vain, where_it_is

_SET_PARENT_DEATH_SIGNAL = 1  # prctl(2)
_MEETING = "MESHLOOM_MEETING"  # set by `launched`
_HOSTS = "MESHLOOM_HOSTS"  # set by `run_ranks` where there are several
_ENDING = (signal.SIGTERM, signal.SIGINT)  # what the agent, a user or a terminal sends to end a rank


def world_from_environment() -> tuple[int, int] | None:
    """(rank, world size) if a launcher started this process as a rank, else None."""
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        return int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    return None


def restart_count() -> int:
    """How many times the agent of this host has started its ranks again."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))


def count_gpus_without_cuda() -> None:
    """Let torch count GPUs by NVML from now on: its other way starts CUDA's driver, which no forked rank could use."""
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"


def cache_folder() -> Path:
    """Where what is slow to make is kept: MESHLOOM_CACHE_DIR, or meshloom in the cache folder of the user."""
    chosen = os.environ.get("MESHLOOM_CACHE_DIR")
    return Path(chosen) if chosen else Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "meshloom"


@contextmanager
def launched(meeting: Meeting) -> Iterator[None]:
    """Within this, the calling process is a rank, which meets the others when it opens its `rank_context`."""
    told = {
        "RANK": str(meeting.rank),
        "WORLD_SIZE": str(meeting.world_size),
        "LOCAL_RANK": str(meeting.rank),
        "LOCAL_WORLD_SIZE": str(meeting.world_size),
        _MEETING: json.dumps(asdict(meeting)),
    }
    before = {name: os.environ.get(name) for name in told}
    os.environ.update(told)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def run_ranks(
    function: Callable[..., None],
    *args: Any,
    num_ranks: int,
    log_dir: Path,
    hosts: Hosts | None = None,
    max_restarts: int = 0,
) -> None:
    """Run `function(*args)` on `num_ranks` ranks of this host and wait; `function` opens its own `rank_context`.

    With `hosts` as many run on each of them, as one world. If a rank dies all are started again, at most `max_restarts`
    times. Output of rank 0 goes to the terminal, that of the others to files below `log_dir`. Raises what a rank raised
    if that was a MeshloomError, else RunFailed naming the rank and its log; no process is left behind in either case.
    """
    with ExitStack() as stack:
        run_id, first = uuid.uuid4().hex, 0
        if hosts is not None:
            facts = f"{hosts.job} on {hosts.num_hosts} hosts of {num_ranks} ranks"
            run_id = stack.enter_context(joined(hosts, facts=facts, again=max_restarts > 0))
            os.environ[_HOSTS] = json.dumps(asdict(hosts))
            stack.callback(os.environ.pop, _HOSTS)
            first = hosts.host_rank * num_ranks
        own = log_dir if not first else log_dir / str(hosts and hosts.name)
        own.mkdir(parents=True, exist_ok=True)
        # What the agent logs when a rank dies is told in one line below; the rest is for those who debug it.
        for name in [*logging.root.manager.loggerDict]:  # each has a level of its own
            if name.startswith("torch.distributed.elastic"):
                logging.getLogger(name).setLevel(logging.CRITICAL)
        os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
        count_gpus_without_cuda()
        sys.stdout.flush()
        agent = elastic_launch(_agent(num_ranks, own, hosts, run_id, max_restarts), _rank)
        ranks = range(first, first + num_ranks)
        try:
            agent(function, args, os.getpid(), str(own))
        except ChildFailedError as error:
            cause = _explain(own, ranks)
            if hosts is not None and isinstance(cause, RunFailed):
                cause = RunFailed(f"{hosts}: {cause}; if it lost a connection, another host tells why")
            raise cause from error
        except RendezvousError as error:
            raise RunFailed(
                f"{hosts}: the hosts did not come together (again): {str(error) or 'time is up'}"
            ) from error
        except SignalException as error:
            if error.sigval == signal.SIGINT:
                raise KeyboardInterrupt from error
            raise RunFailed(f"stopped by {error.sigval.name}; all {num_ranks} ranks were ended") from error


def _agent(num_ranks: int, log_dir: Path, hosts: Hosts | None, run_id: str, max_restarts: int) -> LaunchConfig:
    """How torchrun's agent is set up: it starts the ranks of this host, and watches them."""
    fork = sys.platform == "linux"  # elsewhere forking after an import of torch is not safe
    shown = 1 if hosts is None or hosts.host_rank == 0 else 0
    # The agent must have no threads of C++ when it forks, because a lock that one of them holds just then stays
    # locked in the child for ever: it serves no store.
    where: dict[str, Any] = {"rdzv_backend": one_host.NAME}
    if hosts is None:
        rendezvous_handler_registry.register(one_host.NAME, one_host.OneHost)
    else:
        where = {
            "rdzv_backend": "c10d",
            "rdzv_endpoint": hosts.endpoint,
            "rdzv_configs": {"store_type": "tcp", "is_host": False, "timeout": round(hosts.timeout_s)},
            "local_addr": hosts.name,
        }
    return LaunchConfig(
        min_nodes=1 if hosts is None else hosts.num_hosts,
        max_nodes=1 if hosts is None else hosts.num_hosts,
        nproc_per_node=num_ranks,
        run_id=run_id,
        max_restarts=max_restarts,
        monitor_interval=0.1,
        start_method="fork" if fork else "spawn",
        logs_specs=DefaultLogsSpecs(
            log_dir=str(log_dir / "elastic"), redirects=dict.fromkeys(range(shown, num_ranks), Std.ALL)
        ),
        **where,
    )


@contextmanager
def rank_context(device: str = "auto") -> Iterator[torch.device]:
    """Within this, the calling process is a rank of an initialised world; gives the device that it computes on.

    `device` is cpu, cuda or auto (cuda where there is one). Raises PlanError if there are fewer GPUs than ranks here.
    """
    local_rank, local_size = int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    use_cuda = device == "cuda" or (device == "auto" and torch.cuda.is_available())
    if use_cuda:
        if torch.cuda.device_count() < local_size:
            raise PlanError(
                f"expected a GPU for each of {local_size} ranks on this host, found "
                f"{torch.cuda.device_count()}; use a smaller plan, or --device cpu"
            )
        chosen = torch.device("cuda", local_rank)
        torch.cuda.set_device(chosen)
    else:
        chosen = torch.device("cpu")
        # Ranks share the host's cores; with more threads than cores they only wait for one another.
        num_cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        torch.set_num_threads(max(1, num_cores // local_size))
    backend = "nccl" if use_cuda else "gloo"
    with ExitStack() as stack:
        if _MEETING in os.environ:
            meeting = Meeting(**json.loads(os.environ[_MEETING]))
            store = PrefixStore("world", stack.enter_context(meet(meeting)))
            # the others wait in a collective while somebody thinks in a debugger
            dist.init_process_group(
                backend, store=store, rank=meeting.rank, world_size=meeting.world_size, timeout=timedelta(days=1)
            )
        elif _HOSTS in os.environ:
            # a port that is new in each round of the agents, so that a round meets none of what the last one left
            round_ = f"round {os.environ['MASTER_PORT']}"
            _init(backend, PrefixStore(round_, Hosts(**json.loads(os.environ[_HOSTS])).connect()))
        elif world_from_environment() is None:
            # a single process that nobody launched is a world of one
            dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1)
        elif os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" and restart_count():
            # torchrun keeps the store of the ranks that it starts again, with the addresses of those that died in it
            address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
            kept = TCPStore(address, port, is_master=False)
            store = PrefixStore(f"restart {restart_count()}", kept)
            _init(backend, store)
        else:
            dist.init_process_group(backend)
        stack.enter_context(_closed_in_the_end(use_cuda))
        yield chosen
        dist.barrier()


def _init(backend: str, store: Store) -> None:
    """Make the world of the ranks that an agent has numbered, by a store of their own."""
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size)


@contextmanager
def _closed_in_the_end(use_cuda: bool) -> Iterator[None]:
    try:
        yield
    finally:
        # gloo's destructor joins its threads while it holds the GIL; a thread that still has to drop the tensor of
        # the last collective wants the GIL too, and both wait for ever. A rank ends right after this, so its groups
        # may live until then.
        if use_cuda or world_from_environment() is None:
            dist.destroy_process_group()


def _rank(function: Callable[..., None], args: tuple[Any, ...], parent: int, log_dir: str) -> None:
    """What each rank runs. It leaves a note of how it ended, by which `_explain` finds the rank that died first."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_SET_PARENT_DEATH_SIGNAL, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)
    signal.pthread_sigmask(signal.SIG_BLOCK, _ENDING)
    note = Path(log_dir) / f"end.rank{os.environ['RANK']}.json"
    note.unlink(missing_ok=True)  # of the time before, if the ranks are started again
    threading.Thread(target=_end_on_signal, args=(note,), daemon=True).start()
    try:
        function(*args)
    except BaseException as error:
        _note_end(note, type(error).__name__, str(error), "".join(traceback.format_exception(error)))
        raise
    _note_end(note, "finished", "", "")


def _end_on_signal(note: Path) -> None:
    """Wait for a signal in a thread of its own: the main one may be deep in a collective, where no handler runs."""
    received = signal.Signals(signal.sigwait(_ENDING))
    _note_end(note, received.name, "", "")
    os._exit(128 + received)


def _note_end(note: Path, how: str, message: str, trace: str) -> None:
    part = note.with_suffix(
        f".{threading.get_ident()}.part"
    )  # whole or not at all: a rank may be killed while it writes
    told = {"time_ns": time.monotonic_ns(), "how": how, "message": message, "traceback": trace}
    if how != "finished":
        told |= {"last": last_collective(), "at": where_it_is()}
    part.write_text(json.dumps(told))
    part.replace(note)


def _explain(log_dir: Path, ranks: range) -> MeshloomError:
    """The error to show: a user's mistake that a rank of this host found, else which died first and of what."""
    num_ranks = len(ranks)
    notes = {rank: log_dir / f"end.rank{rank}.json" for rank in ranks}
    ends = {rank: json.loads(note.read_text()) for rank, note in notes.items() if note.exists()}
    failed = {rank: end for rank, end in ends.items() if end["how"] != "finished"}
    by_time = sorted(failed.items(), key=lambda item: item[1]["time_ns"])
    for _, end in by_time:
        kind = getattr(errors, end["how"], None)
        if kind is not None:
            error: MeshloomError = kind(end["message"])
            return error
    waited = waited_in_vain(ends, ranks)
    if waited:
        return RunFailed(f"{waited}; see {log_dir}")
    others = f"; the other {num_ranks - 1} were ended" if num_ranks > 2 else "; the other was ended" * (num_ranks - 1)
    silent = [rank for rank in ranks if rank not in ends]
    if silent or not by_time:  # others lose their connection to it and fail, but they can still say so
        rank = silent[0] if silent else ranks[0]
        return RunFailed(
            f"rank {rank} was killed (by hand, by the system for want of memory, or it crashed){others}; see {log_dir}"
        )
    rank, end = by_time[0]
    if end["how"].startswith("SIG"):
        return RunFailed(f"rank {rank} was ended by {end['how']}{others}; see {log_dir}")
    said = next((line for line in end["message"].splitlines() if line.strip()), "no message")
    return RunFailed(f"rank {rank} failed: {end['how']}: {said[:300]}{others}; the traceback is in {notes[rank]}")
