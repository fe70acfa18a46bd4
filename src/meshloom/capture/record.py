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
from meshloom.chakra.stacks import most_expensive
from meshloom.chakra.stacks import stacks as stacks_of
from meshloom.errors import FolderError, UsageError


class Recorder:
    """Records steps of a run on this rank: call it with each step's number for what should stand around the step.

    Steps `step` to `step + active - 1` are recorded, into one trace, or each into a folder of its own (`step<n>`) if
    `separate`; in the `warmup` steps before, the profiler is on and its data thrown away. Beside each trace lies
    `rank<r>.ops.txt`, the most expensive ops; `stacks` adds a table of all times as text, `facts` go into the trace's
    metadata. Raises FolderError if `folder` cannot be written.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        step: int,
        active: int = 1,
        warmup: int = 0,
        separate: bool = False,
        stacks: bool = False,
        model: nn.Module | None = None,
        axes: Mapping[tuple[int, ...], str] | None = None,
        facts: Mapping[str, Any] | None = None,
    ) -> None:
        self._folder = Path(folder)
        self._steps = range(step, step + active)
        self._warm = range(step - warmup, step)
        self._separate, self._stacks = separate, stacks
        self._paths = {id(module): path for path, module in model.named_modules()} if model is not None else {}
        self._axes = dict(axes or {})
        self._facts = dict(facts or {})
        self._recording = ExitStack()
        self._last = step  # the step that began last
        self.rank, self.world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        _make(self._folder)

    def __call__(self, step: int) -> AbstractContextManager[None]:
        """What should stand around step number `step`: the recording, or its part of it, or nothing."""
        if step in self._warm:
            return _warming()
        return self._around(step) if step in self._steps else nullcontext()

    def finish(self) -> None:
        """End the recording if it is open: what was recorded until now is written."""
        self._recording.close()

    @contextmanager
    def _around(self, step: int) -> Iterator[None]:
        """A step of the recording: the first begins it, the last ends it, and so does an exception."""
        begin, length = (step, 1) if self._separate else (self._steps.start, len(self._steps))
        if step == begin:
            self._recording.enter_context(self._record(step))
        self._last = step
        try:
            yield
        except BaseException:
            self._recording.close()
            raise
        if step == begin + length - 1:
            self._recording.close()

    @contextmanager
    def _record(self, step: int) -> Iterator[None]:
        """Record what runs within this; an exception ends the recording, which is written all the same."""
        folder = self._folder / f"step{step}" if self._separate else self._folder
        _make(folder)
        name = folder / f"rank{self.rank}"
        host, device, notes = (name.with_suffix(f".{part}.json") for part in ("host", "device", "notes"))
        first_comm = _next_record()
        observer = ExecutionTraceObserver()
        observer.register_callback(str(host))
        activities = [ProfilerActivity.CPU]
        if torch.cuda.is_available():
            activities.append(ProfilerActivity.CUDA)
        profiler = profile(
            activities=activities,
            record_shapes=True,
            execution_trace_observer=observer,
            experimental_config=_config(),
        )
        start_ns = time.perf_counter_ns()
        try:
            with profiler, _module_scopes(self._paths):
                start_ns = time.perf_counter_ns()
                yield
                if torch.cuda.is_available():
                    torch.cuda.synchronize()
        finally:
            duration_ns = time.perf_counter_ns() - start_ns
            observer.unregister_callback()
            profiler.export_chrome_trace(str(device))
            told = Notes(
                rank=self.rank,
                world_size=self.world_size,
                step=step,
                step_duration_ns=duration_ns,
                groups=_groups(self.world_size),
                collectives=_collectives(first_comm),
                axes={",".join(map(str, ranks)): axis for ranks, axis in self._axes.items()},
                composite_ops=_composite_ops(host),
                facts={**self._facts, "num_steps": self._last - step + 1},
            )
            with whole_file(notes) as file:
                file.write(msgspec.json.format(msgspec.json.encode(told), indent=1))
            trace, _ = convert_rank(host, device, name.with_suffix(".et"), notes=notes)
            with whole_file(name.with_suffix(".ops.txt")) as file:
                file.write(most_expensive(trace).encode())
            if self._stacks:
                with whole_file(name.with_suffix(".stacks.txt")) as file:
                    file.write(stacks_of(trace).encode())


@contextmanager
def _warming() -> Iterator[None]:
    """The profiler as it is while recording, for nothing: its first start is slow."""
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True):
        yield


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FolderError(f"{folder}: expected to make a folder here, got '{error.strerror}'") from error


def _config() -> Any:
    """Ask the device's driver which stream waits for which, where this torch can; None where it cannot."""
    try:
        return torch._C._profiler._ExperimentalConfig(enable_cuda_sync_events=True)
    except (TypeError, AttributeError):
        return None


class record:  # noqa: N801 - used as `with meshloom.record(...)`
    """Record steps of any torch script on this rank: `with record("trace", wait=2) as rec: ...; rec.step()` each step.

    After `wait` and `warmup` steps the next `active` ones are recorded into one trace, `rank<r>.et` in `folder`, beside
    PyTorch's own files; or each into `folder/step<n>` if `separate`. `stacks` adds `rank<r>.stacks.txt`, a table of
    times. In the last warmup step the profiler is on and its data thrown away, because its first start is slow. Call it
    on every rank, after torch.distributed is initialised if it is. An exception or SIGTERM ends the recording, which is
    written all the same. Raises FolderError, UsageError.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        wait: int = 2,
        warmup: int = 2,
        active: int = 1,
        separate: bool = False,
        stacks: bool = False,
        model: nn.Module | None = None,
    ) -> None:
        if wait < 0 or warmup < 0 or active < 1:
            raise UsageError(
                f"record: expected wait and warmup of at least 0 and active of at least 1, got wait={wait}, "
                f"warmup={warmup}, active={active}"
            )
        first = wait + warmup
        self._warm = first - 1 if warmup else -1
        self._recorder = Recorder(folder, step=first, active=active, separate=separate, stacks=stacks, model=model)
        self._count = 0
        self._step = ExitStack()
        self._old_handler: Any = None

    def __enter__(self) -> record:
        if threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
            # By default SIGTERM ends Python without a word; as an exception it ends the recording first.
            self._old_handler = signal.signal(signal.SIGTERM, _exit_on_signal)
        self._open()
        return self

    def step(self) -> None:
        """Tell that a step has ended."""
        self._step.close()
        self._count += 1
        self._open()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._step.__exit__(kind, error, trace)
            self._recorder.finish()
        finally:
            if self._old_handler is not None:
                signal.signal(signal.SIGTERM, self._old_handler)

    def _open(self) -> None:
        """Open what stands around the step that begins now."""
        if self._count == self._warm:
            self._step.enter_context(profile(activities=[ProfilerActivity.CPU], record_shapes=True))
        self._step.enter_context(self._recorder(self._count))


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
            if paths and root is module:  # what stands around the model that was given, as a pipeline does
                known[id(module)] = ""
            else:
                known.update((id(inner), path) for path, inner in root.named_modules())
        scope = record_function(MODULE + known.get(id(module), type(module).__name__))
        scopes.append(scope)
        scope.__enter__()

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        scopes.pop().__exit__(None, None, None)

    handles = [
        module_hooks.register_module_forward_pre_hook(enter),
        # a stage of a pipeline ends its forward with an exception
        module_hooks.register_module_forward_hook(leave, always_call=True),
    ]
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
    """The host trace's ops, with their overloads, that are made of other ops: those do the work, as a dispatcher below
    autograd sees it."""
    nodes = msgspec.json.decode(host.read_bytes())["nodes"]
    schemas = {attr["value"] for node in nodes for attr in node["attrs"] if attr["name"] == "op_schema"}
    overloads = {schema.partition("(")[0] for schema in schemas if "::" in schema}
    return sorted(overload for overload in overloads if _is_composite(overload))


def _is_composite(overload: str) -> bool:
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    try:  # some are made of others only where they have no kernel of their own
        return bool(has(overload, "CompositeImplicitAutograd")) and not has(overload, "CPU")
    except RuntimeError:  # an op of TorchScript only
        return False
