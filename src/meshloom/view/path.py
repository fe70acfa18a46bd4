"""What holds a step up: its critical path, its memory, and how near its ops come to the hardware. No torch."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from meshloom.chakra.trace import Node
from meshloom.hardware.device import Device
from meshloom.view.graph import result_bytes, short_name
from meshloom.view.scene import Event, Scene
from meshloom.view.tracks import Meeting, meetings_of

_CLOCK_NS = 1000  # ranks that start a collective together do so within this
_POINTS = 1500  # of a curve: more than a page has pixels


class Link(NamedTuple):
    """An event on the critical path, and how long nothing ran on the path before it."""

    event: Event
    waited_ns: int


class Roof(NamedTuple):
    """An op on the roofline plot: FLOPs a byte, FLOP/s that it reached, its share of the time."""

    name: str
    kind: str
    intensity: float
    flops_per_second: float
    time_ns: int


def critical_path(scene: Scene, events: Sequence[Event]) -> list[Link]:
    """The chain of events that ends last, in order of time: each could not start before the one before it was over.

    From the end backwards: of what an event needed (dependencies, what ran before it in its lane) the one that ended
    last; a collective leads on from the rank that reached it last.
    """
    timed = [event for event in events if event.duration_ns]
    if not timed:
        return []
    at = {(event.rank, event.node.id): event for event in timed}
    before = _before(timed)
    met: dict[Meeting, list[Event]] = defaultdict(list)
    of_node: dict[tuple[int, int], Meeting] = {}
    for rank, nodes in scene.nodes.items():
        for number, key in meetings_of(rank, nodes).items():
            if (rank, number) in at:
                met[key].append(at[rank, number])
                of_node[rank, number] = key
    event: Event | None = max(timed, key=lambda event: (event.end_ns, event.rank))
    path: list[Link] = []
    seen: set[tuple[int, int]] = set()
    while event is not None and (event.rank, event.node.id) not in seen:
        members = met[of_node[event.rank, event.node.id]] if (event.rank, event.node.id) in of_node else [event]
        latest = max(member.start_ns for member in members)
        choices = [  # who came last at a meeting, and of those what they waited for
            (needed, member)
            for member in members
            if member.start_ns >= latest - _CLOCK_NS
            for needed in _needed(member, at, before)
            if (needed.rank, needed.node.id) not in seen
        ]
        previous, here = max(choices, key=lambda choice: choice[0].end_ns, default=(None, event))
        seen.update((member.rank, member.node.id) for member in (event, here))
        path.append(Link(here, max(0, here.start_ns - previous.end_ns) if previous else here.start_ns))
        event = previous
    return path[::-1]


def _needed(event: Event, at: Mapping[tuple[int, int], Event], before: Mapping[tuple[int, int], Event]) -> list[Event]:
    """What an event needed on its rank, and what ran before it in its lane."""
    needed = [at.get((event.rank, need)) for need in (*event.node.data_deps, *event.node.ctrl_deps)]
    needed.append(before.get((event.rank, event.node.id)))
    return [each for each in needed if each and each.start_ns <= event.start_ns and each.end_ns <= event.end_ns]


def _before(events: Iterable[Event]) -> dict[tuple[int, int], Event]:
    """What ran before each event in its lane: its stream, its thread, its rank's communication."""
    last: dict[tuple[object, ...], Event] = {}
    found = {}
    for event in events:  # by start
        node = event.node
        lane = event.rank, node.is_comm, node.get("stream"), node.get("thread")
        if lane in last:
            found[event.rank, node.id] = last[lane]
        last[lane] = event
    return found


def path_parts(path: Sequence[Link]) -> dict[str, int]:
    """Nanoseconds of the path by what they were: compute, communication, waiting."""
    parts = {"compute": 0, "communication": 0, "waiting": 0}
    reached = 0
    for link in path:
        kind = "communication" if link.event.node.is_comm else "compute"
        parts[kind] += max(0, link.event.end_ns - max(reached, link.event.start_ns))
        parts["waiting"] += link.waited_ns
        reached = max(reached, link.event.end_ns)
    return parts


def memory_curve(events: Iterable[Event]) -> list[tuple[int, int]]:
    """(time in ns, bytes) of the results that are alive on a rank: made, and still to be read by an op of the step.

    Parameters and optimizer states are not in a trace, and a result that an op writes in place counts twice: read it
    as the shape of the step's activations. At most 1,500 points; the highest of each stretch is kept.
    """
    timed = [event for event in events if event.duration_ns]
    last_use: dict[int, int] = {}
    for event in timed:
        for need in event.node.data_deps:
            last_use[need] = max(last_use.get(need, 0), event.end_ns)
    changes: list[tuple[int, int]] = []
    for event in timed:
        size = result_bytes(event.node)
        if size:
            changes += [(event.start_ns, size), (last_use.get(event.node.id, event.end_ns), -size)]
    changes.sort()
    curve, alive = [(0, 0)], 0
    for when, change in changes:
        alive += change
        curve.append((when, alive))
    return thinned(curve)


def thinned(curve: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """At most about 1,500 points of a curve: the highest of each equal stretch of time."""
    if len(curve) <= _POINTS:
        return curve
    begin, end = curve[0][0], curve[-1][0]
    best: dict[int, tuple[int, int]] = {}
    for when, value in curve:
        slot = (when - begin) * _POINTS // max(1, end - begin)
        if slot not in best or value > best[slot][1]:
            best[slot] = (when, value)
    return list(best.values())


def roofline(events: Iterable[Event]) -> list[Roof]:
    """Each op with FLOPs, bytes and time, by name and class."""
    table: dict[tuple[str, str], list[int]] = defaultdict(lambda: [0, 0, 0])
    for event in events:
        node: Node = event.node
        if not node.is_comm and event.duration_ns and int(node.get("tensor_size", 0)) > 1:
            row = table[short_name(node.name), str(node.get("op_class", "compute"))]
            row[0] += int(node.get("num_ops", 0))
            row[1] += int(node.get("tensor_size", 0))
            row[2] += event.duration_ns
    roofs = [Roof(*key, flops / size, flops / time * 1e9, time) for key, (flops, size, time) in table.items() if flops]
    return sorted(roofs, key=lambda roof: -roof.time_ns)


def roofs_of(device: Device) -> dict[str, Any]:
    """The device's peaks, as data: bytes a second, FLOP/s by dtype, bytes of memory."""
    return {
        "name": device.name,
        "memory_bytes": device.memory_bytes,
        "memory_bytes_per_second": device.memory_bytes_per_second,
        "flops_per_second": dict(device.flops_per_second),
    }
