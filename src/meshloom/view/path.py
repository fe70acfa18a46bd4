"""What holds a step up: its critical path, its memory, and how near its ops come to the hardware. No torch."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from meshloom.chakra.path import critical_path as chain
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
    at = {(event.rank, event.node.id): number for number, event in enumerate(timed)}
    before = _before(timed)
    met: dict[Meeting, list[int]] = defaultdict(list)
    of_event: dict[int, Meeting] = {}
    for rank, nodes in scene.nodes.items():
        for node, key in meetings_of(rank, nodes).items():
            if (rank, node) in at:
                met[key].append(at[rank, node])
                of_event[at[rank, node]] = key

    def needs(number: int) -> list[int]:
        event = timed[number]
        found = [at.get((event.rank, need)) for need in (*event.node.data_deps, *event.node.ctrl_deps)]
        return [each for each in (*found, before.get(number)) if each is not None]

    path = chain(
        [event.start_ns for event in timed],
        [event.end_ns for event in timed],
        max(range(len(timed)), key=lambda number: (timed[number].end_ns, timed[number].rank)),
        needs=needs,
        meets=lambda number: met[of_event[number]] if number in of_event else (number,),
        clock_ns=_CLOCK_NS,
    )
    return [Link(timed[link.number], link.waited_ns) for link in path]


def _before(events: Iterable[Event]) -> dict[int, int]:
    """What ran before each event in its lane, by place: its stream, its thread, its rank's communication."""
    last: dict[tuple[object, ...], int] = {}
    found = {}
    for number, event in enumerate(events):  # by start
        node = event.node
        lane = event.rank, node.is_comm, node.get("stream"), node.get("thread")
        if lane in last:
            found[number] = last[lane]
        last[lane] = number
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
