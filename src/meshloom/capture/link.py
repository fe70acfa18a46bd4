"""Join PyTorch's host trace with its device trace: what each op was, when it ran, inside which other op, and which
kernels it launched. No torch.

Where Kineto tells record-function ids, host nodes and events pair by them; else on each thread the i-th op of a name
pairs with the i-th event of that name. Parents are taken from the nesting of times on a thread, not from the host
trace: gloo's worker callbacks leave some of its parents wrong (they are right without gloo).
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import msgspec

from meshloom.capture.device import DeviceTrace, HostEvent, Kernel, Launch, read_device
from meshloom.capture.host import HostOp, TensorRef, read_host
from meshloom.errors import TraceError


class Op(msgspec.Struct, kw_only=True, gc=False):
    """One op of the host, timed: `parent` is the index of the op that encloses it, -1 if none does."""

    rf_id: int
    name: str
    schema: str
    thread: int
    start_ns: int
    duration_ns: int
    inputs: list[list[TensorRef]]  # for each argument its tensors
    outputs: list[TensorRef]
    scalars: list[Any]  # for each argument its value, None where it is tensors
    sequence: int = -1  # autograd's sequence number: a backward op has that of its forward op
    parent: int = -1

    @property
    def end_ns(self) -> int:
        """When it ended."""
        return self.start_ns + self.duration_ns


class Launched(msgspec.Struct, frozen=True, gc=False):
    """A kernel, the op that launched it (its index, -1 if none is known), when that was, and whether that is known."""

    kernel: Kernel
    op: int
    launched_ns: int
    launched: bool = True


class Linked(msgspec.Struct, kw_only=True, gc=False):
    """One rank: ops in the order of their starts, kernels in the order of their launches, calls that order streams or
    wait for the device, and what had to be repaired or left out."""

    ops: list[Op]
    kernels: list[Launched]
    waits: list[Launch]
    device: DeviceTrace
    warnings: list[str]


def link(host: Path, device: Path) -> Linked:
    """Link the two files of one rank; raises TraceError if they are not what they should be, or of different runs."""
    warnings: list[str] = []
    nodes, told = read_host(host, warnings), read_device(device, warnings)
    by_id = any(event.rf_id >= 0 for event in told.host)
    pairs = _pair_by_id(nodes, told.host) if by_id else _pair_by_name(nodes, told.host)
    missing = [node.name for node, event in pairs if event is None]
    if missing:
        message = (
            f"{host}: expected each of its {len(nodes):,} ops in {device.name}, {len(missing):,} are not there, "
            f"the first is {missing[0]!r}"
        )
        if 10 * len(missing) > len(nodes):
            raise TraceError(f"{message}; are they of one run?")
        warnings.append(f"{message}; they were left out")
    ops = [_timed(node, event) for node, event in pairs if event is not None]
    ops.sort(key=lambda op: (op.start_ns, -op.duration_ns, op.rf_id))
    return linked(ops, told, warnings)


def linked(ops: list[Op], told: DeviceTrace, warnings: list[str]) -> Linked:
    """The ops, each with its parent, and the kernels that they launched; `ops` come in the order of their starts."""
    enclosing = _nest(ops, told.launches)
    by_correlation = {launch.correlation: index for index, launch in enumerate(told.launches)}
    kernels = []
    for kernel in told.kernels:
        index = by_correlation.get(kernel.correlation)
        if index is None:
            kernels.append(Launched(kernel, -1, kernel.start_ns, launched=False))
        else:
            kernels.append(Launched(kernel, enclosing[index], told.launches[index].start_ns))
    kernels.sort(key=lambda launched: (launched.launched_ns, launched.kernel.start_ns))
    records = {launch.wait_record for launch in told.launches}
    waits = [
        launch
        for launch in told.launches
        if "Synchronize" in launch.name or launch.wait_record >= 0 or launch.correlation in records
    ]
    return Linked(ops=ops, kernels=kernels, waits=waits, device=told, warnings=warnings)


def _pair_by_id(nodes: Sequence[HostOp], events: Sequence[HostEvent]) -> list[tuple[HostOp, HostEvent | None]]:
    by_id = {event.rf_id: event for event in events}
    found = [(node, by_id.get(node.rf_id)) for node in nodes]
    return [(node, event if event is not None and event.name == node.name else None) for node, event in found]


def _pair_by_name(nodes: Sequence[HostOp], events: Sequence[HostEvent]) -> list[tuple[HostOp, HostEvent | None]]:
    threads = _match_threads(nodes, events)
    queues: dict[tuple[int, str], list[HostEvent]] = defaultdict(list)
    for event in reversed(events):
        queues[event.thread, event.name].append(event)
    pairs: list[tuple[HostOp, HostEvent | None]] = []
    for node in nodes:  # in the order of their starts, as the events are
        queue = queues.get((threads.get(node.thread, -1), node.name))
        pairs.append((node, queue.pop() if queue else None))
    # The host trace books what gloo's threads ran on the thread that asked for it: what is left pairs across threads.
    left: dict[str, list[HostEvent]] = defaultdict(list)
    for (_, name), queue in queues.items():
        left[name] += queue
    for queue in left.values():
        queue.sort(key=lambda event: -event.start_ns)
    return [(node, event or (left[node.name].pop() if left[node.name] else None)) for node, event in pairs]


def _match_threads(nodes: Sequence[HostOp], events: Sequence[HostEvent]) -> dict[int, int]:
    """The host trace's thread numbers -> the system's: each to the one that shares most ops, largest first."""
    ours: dict[int, Counter[str]] = defaultdict(Counter)
    theirs: dict[int, Counter[str]] = defaultdict(Counter)
    for node in nodes:
        ours[node.thread][node.name] += 1
    for event in events:
        theirs[event.thread][event.name] += 1
    found: dict[int, int] = {}
    for thread, names in sorted(ours.items(), key=lambda item: -item[1].total()):
        free = [other for other in theirs if other not in found.values()]
        if free:
            found[thread] = max(free, key=lambda other: (names & theirs[other]).total())
    return found


def _timed(node: HostOp, event: HostEvent) -> Op:
    return Op(
        rf_id=node.rf_id,
        name=node.name,
        schema=node.schema,
        thread=event.thread,
        start_ns=event.start_ns,
        duration_ns=event.duration_ns,
        inputs=node.inputs,
        outputs=node.outputs,
        scalars=node.scalars,
        # scopes of the autograd engine have their number in the device file only
        sequence=node.sequence if node.sequence >= 0 else event.sequence,
    )


def _nest(ops: list[Op], launches: Sequence[Launch]) -> list[int]:
    """Set each op's parent, the innermost op of its thread whose interval holds its own; for each launch its op."""
    enclosing = [-1] * len(launches)
    open_ops: dict[int, list[int]] = {}
    waiting = 0

    def place(until_ns: int) -> None:
        nonlocal waiting
        while waiting < len(launches) and launches[waiting].start_ns < until_ns:
            launch = launches[waiting]
            stack = open_ops.get(launch.thread, [])
            while stack and ops[stack[-1]].end_ns < launch.start_ns:
                stack.pop()
            enclosing[waiting] = stack[-1] if stack else -1
            waiting += 1

    for index, op in enumerate(ops):
        place(op.start_ns)
        stack = open_ops.setdefault(op.thread, [])
        while stack and ops[stack[-1]].end_ns < op.end_ns:
            stack.pop()
        if stack:
            op.parent = stack[-1]
        stack.append(index)
    place(1 << 63)
    return enclosing


def in_order(linked: Linked) -> Iterator[int | Launched | Launch]:
    """Ops (their indices), kernels and waits in the order in which the host came to them."""
    kernels, waits = iter(linked.kernels), iter(linked.waits)
    kernel, wait = next(kernels, None), next(waits, None)
    far = 1 << 63
    for index, op in enumerate([*linked.ops, None]):
        start = op.start_ns if op is not None else far
        while (kernel is not None and kernel.launched_ns < start) or (wait is not None and wait.start_ns < start):
            if wait is None or (kernel is not None and kernel.launched_ns <= wait.start_ns):
                assert kernel is not None
                yield kernel
                kernel = next(kernels, None)
            else:
                yield wait
                wait = next(waits, None)
        if op is not None:
            yield index


def longest_kernels(kernels: Sequence[Launched]) -> dict[int, Launched]:
    """For each op the longest of its kernels: it carries the op's cost."""
    longest: dict[int, Launched] = {}
    for item in kernels:
        known = longest.get(item.op)
        if known is None or item.kernel.duration_ns > known.kernel.duration_ns:
            longest[item.op] = item
    return longest


def own_times(ops: Sequence[Op]) -> list[int]:
    """Each op's duration without that of the ops directly inside it."""
    own = [op.duration_ns for op in ops]
    for op in ops:
        if op.parent >= 0:
            own[op.parent] -= op.duration_ns
    return [max(0, duration) for duration in own]


def backend_events(ops: Sequence[Op]) -> dict[int, int]:
    """c10d op -> gloo's event that did it: the first with a higher id, before the next c10d op's id."""
    issued = sorted((op.rf_id, index) for index, op in enumerate(ops) if op.name.startswith("c10d::"))
    events = sorted((op.rf_id, index) for index, op in enumerate(ops) if op.name.startswith("gloo:"))
    found: dict[int, int] = {}
    waiting = iter(events)
    event = next(waiting, None)
    for (rf_id, index), (next_id, _) in pairwise([*issued, (1 << 62, -1)]):
        while event is not None and event[0] < rf_id:
            event = next(waiting, None)
        if event is not None and event[0] < next_id:
            found[index] = event[1]
    return found
