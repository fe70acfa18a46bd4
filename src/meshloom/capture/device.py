"""Read Kineto's device trace: when each host op ran, what it launched, and what ran on the device. No torch."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import msgspec

from meshloom.capture.repair import each, read_json

_HOST = ("cpu_op", "user_annotation")
_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")
_SYNC = "cuda_sync"
_LAUNCH = ("cuda_runtime", "cuda_driver", "hip_runtime", "xpu_runtime", "privateuse1_runtime")


_KINETO_NAMES = {
    "rf_id": "Record function id",
    "sequence": "Sequence number",
    "collective": "Collective name",
    "group_ranks": "Process Group Ranks",
    "group_name": "Process Group Name",
    "group_size": "Group size",
    "num_sent": "In msg nelems",
    "num_received": "Out msg nelems",
    "source": "Src Rank",
    "destination": "Dst Rank",
    "wait_stream": "wait_on_stream",
    "wait_record": "wait_on_cuda_event_record_corr_id",
    "input_dims": "Input Dims",
    "input_types": "Input type",
}
NOTHING = msgspec.Raw(b"")


class Args(msgspec.Struct, gc=False, rename=_KINETO_NAMES):
    """The arguments of an event that matter here; the rest of a file is most of it, and is not kept."""

    rf_id: int = -1
    sequence: int = -1
    correlation: int = -1
    stream: int | str | None = None
    collective: str = ""
    group_ranks: str | list[int] = ""
    group_name: str = ""
    group_size: int = 0
    dtype: str = ""
    num_sent: int = 0
    num_received: int = 0
    source: int = -1
    destination: int = -1
    wait_stream: int = -1
    wait_record: int = -1
    input_dims: msgspec.Raw = NOTHING  # most files that have them come with a host trace, which tells more
    input_types: msgspec.Raw = NOTHING


class HostEvent(msgspec.Struct, kw_only=True, gc=False):
    """A host op's time; `rf_id` is -1 where the file does not tell it, `args` None where nobody asked."""

    name: str
    thread: int
    start_ns: int
    duration_ns: int
    rf_id: int
    sequence: int
    args: Args | None


class Launch(msgspec.Struct, kw_only=True, gc=False):
    """A call of the driver or runtime: it may launch what carries its correlation, note an event in a stream, or wait.

    A wait for an event names the stream that is waited for and the correlation of the call that noted the event.
    """

    name: str
    thread: int
    start_ns: int
    duration_ns: int
    correlation: int
    stream: int
    wait_stream: int = -1
    wait_record: int = -1


class Kernel(msgspec.Struct, kw_only=True, gc=False):
    """What ran on a stream of the device: a kernel, a copy or a fill (`kind`)."""

    name: str
    kind: str
    stream: int
    start_ns: int
    duration_ns: int
    correlation: int
    args: Args


class DeviceTrace(msgspec.Struct, kw_only=True, gc=False):
    """A device file: host events, launches and kernels, each in the order of their starts; rank -1 where not told."""

    host: list[HostEvent]
    launches: list[Launch]
    kernels: list[Kernel]
    rank: int
    world_size: int
    groups: dict[str, list[int]]


# since 1970 or since the machine's start: a thousand years at most, so that nanoseconds stay whole numbers
_Microseconds = Annotated[float, msgspec.Meta(ge=-3.2e16, le=3.2e16)]


class _Event(msgspec.Struct, gc=False):
    ph: str = ""
    cat: str | None = None
    name: str = ""
    ts: _Microseconds = 0.0
    dur: _Microseconds = 0.0
    tid: int | str = 0
    args: Args = msgspec.field(default_factory=Args)


_Count = Annotated[int, msgspec.Meta(ge=-1, le=(1 << 31) - 1)]


class _Group(msgspec.Struct):
    pg_name: str | int = ""
    ranks: list[_Count] | None = None


class _World(msgspec.Struct):
    rank: _Count = -1
    world_size: _Count = 0
    pg_config: list[_Group] | None = None


class _Trace(msgspec.Struct, gc=False):
    traceEvents: list[msgspec.Raw]  # noqa: N815 - Kineto's own name
    distributedInfo: _World = msgspec.field(default_factory=_World)  # noqa: N815


def read_device(path: Path, warnings: list[str], *, keep_args: bool = False) -> DeviceTrace:
    """The device trace in `path`, with the arguments of host events if asked; raises TraceError."""
    what = "a Kineto trace"
    trace = read_json(path, _Trace, what, warnings)
    host: list[HostEvent] = []
    launches: list[Launch] = []
    kernels: list[Kernel] = []
    syncs: dict[int, Args] = {}
    for event in each(trace.traceEvents, _Event, path, what, warnings):
        if event.ph != "X" or event.cat is None:
            continue
        # the file counts microseconds; everything inside is nanoseconds
        start_ns, duration_ns = round(event.ts * 1000), round(event.dur * 1000)
        if event.cat in _HOST:
            host.append(_host_event(event, start_ns, duration_ns, keep_args))
        elif event.cat in _DEVICE:
            kernels.append(_kernel(event, start_ns, duration_ns))
        elif event.cat in _LAUNCH:
            launches.append(_launch(event, start_ns, duration_ns))
        elif event.cat == _SYNC:
            syncs[event.args.correlation] = event.args
    for launch in launches:  # what the driver says of a wait stands in an event of its own
        sync = syncs.get(launch.correlation)
        if sync is not None:
            launch.wait_stream, launch.wait_record = sync.wait_stream, sync.wait_record
            launch.stream = _number(sync.stream)
    host.sort(key=lambda event: (event.start_ns, -event.duration_ns))
    launches.sort(key=lambda event: event.start_ns)
    kernels.sort(key=lambda event: (event.start_ns, event.stream))
    told = trace.distributedInfo
    return DeviceTrace(
        host=host,
        launches=launches,
        kernels=kernels,
        rank=told.rank,
        world_size=told.world_size,
        groups={str(group.pg_name): group.ranks for group in told.pg_config or [] if group.ranks is not None},
    )


def _host_event(event: _Event, start_ns: int, duration_ns: int, keep_args: bool) -> HostEvent:
    return HostEvent(
        name=event.name,
        thread=_number(event.tid),
        start_ns=start_ns,
        duration_ns=duration_ns,
        rf_id=event.args.rf_id,
        sequence=event.args.sequence,
        args=event.args if keep_args else None,
    )


def _kernel(event: _Event, start_ns: int, duration_ns: int) -> Kernel:
    return Kernel(
        name=event.name,
        kind=str(event.cat),
        stream=_number(event.tid if event.args.stream is None else event.args.stream),
        start_ns=start_ns,
        duration_ns=duration_ns,
        correlation=event.args.correlation,
        args=event.args,
    )


def _launch(event: _Event, start_ns: int, duration_ns: int) -> Launch:
    return Launch(
        name=event.name,
        thread=_number(event.tid),
        start_ns=start_ns,
        duration_ns=duration_ns,
        correlation=event.args.correlation,
        stream=_number(-1 if event.args.stream is None else event.args.stream),
    )


def _number(value: Any) -> int:
    if isinstance(value, int):
        return value
    text = str(value)
    return int(text) if len(text) < 20 and text.removeprefix("-").isdecimal() else -1
