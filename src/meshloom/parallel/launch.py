"""Start the ranks of a run, and say what happened when one of them dies. The only place that reads the environment.

On one host the ranks are forked by torchrun's elastic agent after one import, so that eight are ready in the time of
one. Under `torchrun` (or any launcher that sets RANK and WORLD_SIZE) the calling process is a rank already.
"""

from __future__ import annotations

import ctypes
import json
import logging
import os
import signal
import sys
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException, Std
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from meshloom import errors
from meshloom.errors import MeshloomError, PlanError, RunFailed

_SET_PARENT_DEATH_SIGNAL = 1  # prctl(2)


def world_from_environment() -> tuple[int, int] | None:
    """(rank, world size) if a launcher started this process as a rank, else None."""
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        return int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    return None


def run_ranks(function: Callable[..., None], *args: Any, num_ranks: int, log_dir: Path) -> None:
    """Run `function(*args)` on `num_ranks` ranks of this host and wait; `function` opens its own `rank_context`.

    Output of rank 0 goes to the terminal, that of the others to files below `log_dir`. Raises what a rank raised if
    that was a MeshloomError, else RunFailed naming the rank and its log; no process is left behind in either case.
    """
    log_dir.mkdir(parents=True, exist_ok=True)
    fork = sys.platform == "linux"  # elsewhere forking after an import of torch is not safe
    quiet: dict[int, Std] = dict.fromkeys(range(1, num_ranks), Std.ALL)
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=num_ranks,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        # A store in a file, and rank 0 as the host of the one that ranks meet in: the agent must have no threads of
        # C++ when it forks, because a lock that one of them holds just then stays locked in the child for ever.
        rdzv_endpoint=str((log_dir / "rendezvous").absolute()),
        rdzv_configs={"store_type": "file"},
        local_addr="localhost",
        max_restarts=0,
        monitor_interval=0.1,
        start_method="fork" if fork else "spawn",
        logs_specs=DefaultLogsSpecs(log_dir=str(log_dir / "elastic"), redirects=quiet),
    )
    # What the agent logs when a rank dies is told in one line below; the rest is for those who debug it.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    sys.stdout.flush()
    try:
        elastic_launch(config, _rank)(function, args, os.getpid(), str(log_dir))
    except ChildFailedError as error:
        raise _explain(error, log_dir, num_ranks) from error
    except SignalException as error:
        if error.sigval == signal.SIGINT:
            raise KeyboardInterrupt from error
        raise RunFailed(f"stopped by {error.sigval.name}; all {num_ranks} ranks were ended") from error


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
                f"expected {local_size} GPUs for {local_size} ranks on this host, got "
                f"{torch.cuda.device_count()}; use a smaller plan, or --device cpu"
            )
        chosen = torch.device("cuda", local_rank)
        torch.cuda.set_device(chosen)
    else:
        chosen = torch.device("cpu")
        # Ranks share the host's cores; with more threads than cores they only wait for one another.
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // local_size))
    if world_from_environment() is None:
        # a single process that nobody launched is a world of one
        store = HashStore()
        dist.init_process_group("nccl" if use_cuda else "gloo", store=store, rank=0, world_size=1)
    else:
        dist.init_process_group("nccl" if use_cuda else "gloo")
    try:
        yield chosen
        dist.barrier()
    finally:
        # gloo's destructor joins its threads while it holds the GIL; a thread that still has to drop the tensor of
        # the last collective wants the GIL too, and both wait for ever. A rank ends right after this, so its groups
        # may live until then.
        if use_cuda or world_from_environment() is None:
            dist.destroy_process_group()


def _rank(function: Callable[..., None], args: tuple[Any, ...], parent: int, log_dir: str) -> None:
    """What each rank runs. Ctrl-C reaches the launcher too, which ends the ranks: here it must not interrupt."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_SET_PARENT_DEATH_SIGNAL, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        function(*args)
    except MeshloomError as error:
        note = Path(log_dir) / f"error.rank{os.environ['RANK']}.json"
        note.write_text(json.dumps({"type": type(error).__name__, "message": str(error)}))
        raise


def _explain(error: ChildFailedError, log_dir: Path, num_ranks: int) -> MeshloomError:
    """The error to show: a user's mistake that a rank found, else which rank died first and of what."""
    for note in sorted(log_dir.glob("error.rank*.json")):
        told = json.loads(note.read_text())
        return getattr(errors, told["type"], RunFailed)(told["message"])
    # A rank that was killed is the cause, also if another one noticed the broken connection before it was found dead;
    # SIGTERM is what the agent sends to the others.
    killed = {
        rank: failure
        for rank, failure in error.failures.items()
        if failure.exitcode < 0 and failure.exitcode != -signal.SIGTERM
    }
    rank, failure = next(iter(killed.items()), None) or error.get_first_failure()
    if failure.exitcode < 0:
        what = f"was killed by {signal.Signals(-failure.exitcode).name}"
        if failure.exitcode == -signal.SIGKILL:
            what += " (by hand, or by the system for want of memory)"
    else:
        what = f"failed: {_last_words(failure.message)}"
    log = f"see {log_dir / 'elastic'}" if rank else "see the output above"
    others = f"; the other {num_ranks - 1} were ended" if num_ranks > 1 else ""
    return RunFailed(f"rank {rank} {what}{others}; {log}")


def _last_words(message: Any) -> str:
    text = message.get("message", "") if isinstance(message, dict) else str(message)
    lines = [line for line in str(text).splitlines() if line.strip()]
    return lines[0][:300] if lines else "no message"
