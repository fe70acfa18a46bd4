"""Record steps of a real run: PyTorch's host trace, its device trace, and what both leave out.

Three files a rank: `rank<r>.host.json` (ExecutionTraceObserver), `rank<r>.device.json` (Kineto), and
`rank<r>.notes.json` with the process group of every collective (from c10d's flight recorder: a gloo host trace does
not name them), which ops are composite, and what the run was. From these `convert` makes `rank<r>.et`.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from pathlib import Path
from types import TracebackType
from typing import Any

import msgspec
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.modules import module as module_hooks
from torch.nn.parallel import DistributedDataParallel
from torch.profiler import ExecutionTraceObserver, ProfilerActivity, profile, record_function

from meshloom.capture.convert import MODULE, convert_rank
from meshloom.capture.notes import Notes
from meshloom.chakra.file import whole_file
from meshloom.errors import FolderError, UsageError


class Recorder:
    """Records one step of a run on this rank: call it with each step's number for what should stand around the step.

    `facts` go into the trace's metadata. Raises FolderError if `folder` cannot be written.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        step: int,
        model: nn.Module | None = None,
        axes: Mapping[tuple[int, ...], str] | None = None,
        facts: Mapping[str, Any] | None = None,
    ) -> None:
        self._folder = Path(folder)
        self._step = step
        self._paths = {id(module): path for path, module in model.named_modules()} if model is not None else {}
        self._axes = dict(axes or {})
        self._facts = dict(facts or {})
        self.rank, self.world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise FolderError(f"{self._folder}: expected to make a folder here, got '{error.strerror}'") from error

    def __call__(self, step: int) -> AbstractContextManager[None]:
        """What should stand around step number `step`: the recording if it is the one, else nothing."""
        return self._record() if step == self._step else nullcontext()

    @contextmanager
    def _record(self) -> Iterator[None]:
        """Record what runs within this; an exception ends the recording, which is written all the same."""
        name = self._folder / f"rank{self.rank}"
        host, device, notes = (name.with_suffix(f".{part}.json") for part in ("host", "device", "notes"))
        first_comm = _next_record()
        observer = ExecutionTraceObserver()
        observer.register_callback(str(host))
        activities = [ProfilerActivity.CPU]
        if torch.cuda.is_available():
            activities.append(ProfilerActivity.CUDA)
        profiler = profile(activities=activities, record_shapes=True, execution_trace_observer=observer)
        start_ns = time.time_ns()
        try:
            with profiler, _module_scopes(self._paths):
                start_ns = time.time_ns()
                yield
                if torch.cuda.is_available():
                    torch.cuda.synchronize()
        finally:
            duration_ns = time.time_ns() - start_ns
            observer.unregister_callback()
            profiler.export_chrome_trace(str(device))
            told = Notes(
                rank=self.rank,
                world_size=self.world_size,
                step=self._step,
                step_duration_ns=duration_ns,
                groups=_groups(self.world_size),
                collectives=_collectives(first_comm),
                axes={",".join(map(str, ranks)): axis for ranks, axis in self._axes.items()},
                composite_ops=_composite_ops(host),
                facts=self._facts,
            )
            with whole_file(notes) as file:
                file.write(msgspec.json.format(msgspec.json.encode(told), indent=1))
            convert_rank(host, device, name.with_suffix(".et"), notes=notes)


class record:  # noqa: N801 - used as `with meshloom.record(...)`
    """Record steps of any torch script on this rank: `with record("trace", wait=2) as rec: ...; rec.step()` each step.

    After `wait` and `warmup` steps the next `active` ones are recorded into one trace, `rank<r>.et` in `folder`, beside
    PyTorch's own files. Call it on every rank, after torch.distributed is initialised if it is. An exception or SIGTERM
    ends the recording, which is written all the same. Raises FolderError, UsageError.
    """

    def __init__(
        self, folder: str | Path, *, wait: int = 2, warmup: int = 2, active: int = 1, model: nn.Module | None = None
    ) -> None:
        if wait < 0 or warmup < 0 or active < 1:
            raise UsageError(
                f"record: expected wait and warmup of at least 0 and active of at least 1, got wait={wait}, "
                f"warmup={warmup}, active={active}"
            )
        self._first, self._active = wait + warmup, active
        self._folder, self._model = folder, model
        self._count = 0
        self._recording = ExitStack()
        self._old_handler: Any = None

    def __enter__(self) -> record:
        if threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
            # By default SIGTERM ends Python without a word; as an exception it ends the recording first.
            self._old_handler = signal.signal(signal.SIGTERM, _exit_on_signal)
        self._open_if_due()
        return self

    def step(self) -> None:
        """Tell that a step has ended."""
        self._count += 1
        if self._count == self._first + self._active:
            self._recording.close()
        self._open_if_due()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._recording.__exit__(kind, error, trace)
        if self._old_handler is not None:
            signal.signal(signal.SIGTERM, self._old_handler)

    def _open_if_due(self) -> None:
        if self._count == self._first:
            facts = {"num_steps": self._active}
            recorder = Recorder(self._folder, step=self._first, model=self._model, facts=facts)
            self._recording.enter_context(recorder(self._first))


def _exit_on_signal(number: int, frame: object) -> None:
    raise SystemExit(128 + number)


@contextmanager
def _module_scopes(paths: Mapping[int, str]) -> Iterator[None]:
    """Within this, each module's forward stands in a scope that names its path.

    Where no model was given, the outermost module that runs is the one whose paths are meant.
    """
    scopes: list[Any] = []
    known = dict(paths)

    def enter(module: nn.Module, args: Any) -> None:
        if not scopes and id(module) not in known:
            root = module.module if isinstance(module, DistributedDataParallel) else module
            known.update((id(inner), path) for path, inner in root.named_modules())
        scope = record_function(MODULE + known.get(id(module), type(module).__name__))
        scopes.append(scope)
        scope.__enter__()

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        scopes.pop().__exit__(None, None, None)

    handles = [module_hooks.register_module_forward_pre_hook(enter), module_hooks.register_module_forward_hook(leave)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        while scopes:  # a forward that raised
            scopes.pop().__exit__(None, None, None)


def _flight_record() -> list[dict[str, Any]]:
    """Entries of c10d's flight recorder, which notes every collective with its group at next to no cost."""
    dump: Callable[[], bytes] | None = getattr(torch._C._distributed_c10d, "_dump_fr_trace_json", None)
    if dump is None or not dist.is_initialized():
        return []
    entries: list[dict[str, Any]] = msgspec.json.decode(dump()).get("entries", [])
    return entries


def _next_record() -> int:
    return max((entry["record_id"] for entry in _flight_record()), default=-1) + 1


def _collectives(first: int) -> list[tuple[str, str]]:
    """(operation, group name) of each collective since record number `first`, in order."""
    return [
        (entry["profiling_name"].partition(":")[2], entry["process_group"][0])
        for entry in _flight_record()
        if entry["record_id"] >= first and not entry["is_p2p"]
    ]


def _groups(world_size: int) -> dict[str, list[int]]:
    """Every process group's name -> its ranks."""
    if not dist.is_initialized():
        return {}
    named = torch.distributed.distributed_c10d._world.pg_group_ranks
    # groups that this rank is no member of stand there as a number
    return {group.group_name: list(ranks) for group, ranks in named.items() if isinstance(group, dist.ProcessGroup)}


def _composite_ops(host: Path) -> list[str]:
    """The host trace's ops that are made of other ops: those do the work, as a dispatcher below autograd sees it."""
    nodes = msgspec.json.decode(host.read_bytes())["nodes"]
    schemas = {attr["value"] for node in nodes for attr in node["attrs"] if attr["name"] == "op_schema"}
    overloads = {schema.partition("(")[0] for schema in schemas if "::" in schema}
    return sorted({overload.partition(".")[0] for overload in overloads if _is_composite(overload)})


def _is_composite(overload: str) -> bool:
    try:
        return bool(torch._C._dispatch_has_kernel_for_dispatch_key(overload, "CompositeImplicitAutograd"))
    except RuntimeError:  # an op of TorchScript only
        return False
