"""What ran when, as columns: a track for each stream and host thread of each rank, measured beside predicted. No torch.

Measured times are put on one clock by the ends of collectives. Within a lane of a track nothing overlaps: host scopes
nest in lanes of their own, as their own times imply (a scope holds only its own part, see docs/trace-format.md).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from meshloom.chakra.clocks import offsets_ns
from meshloom.chakra.file import paused_collection
from meshloom.chakra.timeline import Span, Timeline
from meshloom.chakra.trace import Node, NodeType, Trace

Source = Literal["measured", "predicted"]
Kind = Literal["compute", "communication", "host"]
Meeting = tuple[object, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Track:
    """Slices of one rank that ran in one place, by start; times in ns since the step began on any rank.

    `names` are indices into the `Tracks`' names; `nodes` the ids in the rank's trace; `lanes` 0 for what nothing
    encloses. `name` tells the place: `stream 7`, `thread 12`, `compute`.
    """

    rank: int
    source: Source
    kind: Kind
    name: str
    starts_ns: NDArray[np.int64]
    durations_ns: NDArray[np.int64]
    names: NDArray[np.int32]
    nodes: NDArray[np.int64]
    lanes: NDArray[np.int16]

    def __len__(self) -> int:
        return len(self.starts_ns)


@dataclass(frozen=True, slots=True, kw_only=True)
class Flow:
    """Slices that belong together: (track, row) of each rank of a collective, or of a send and its receive."""

    name: str
    ends: list[tuple[int, int]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Tracks:
    """All tracks of a step, the names that they count on, and what meets across ranks."""

    tracks: list[Track]
    names: list[str]
    flows: list[Flow] = field(default_factory=list)

    @property
    def num_slices(self) -> int:
        """Slices of all tracks."""
        return sum(len(track) for track in self.tracks)

    @property
    def ranks(self) -> list[int]:
        """The ranks that have tracks, in order."""
        return sorted({track.rank for track in self.tracks})


def tracks(traces: Mapping[int, Trace], predicted: Timeline | None = None) -> Tracks:
    """The tracks of the traces' measured times, where they have any, and of a predicted timeline."""
    with paused_collection():
        nodes = {rank: list(trace.nodes) for rank, trace in traces.items()}
        return tracks_of(nodes, predicted)


def tracks_of(nodes: Mapping[int, list[Node]], predicted: Timeline | None = None) -> Tracks:
    """As `tracks`, from nodes that are decoded already."""
    names: dict[str, int] = {}
    found: list[Track] = []
    met: dict[tuple[Source, Meeting], list[tuple[int, int]]] = defaultdict(list)
    meetings = {rank: meetings_of(rank, each) for rank, each in nodes.items()}
    timed = {rank: [node for node in each if node.duration_ns > 0] for rank, each in nodes.items()}
    if any(timed.values()):
        shift = offsets_ns(nodes)
        begin = min(node.start_ns + shift[rank] for rank, each in timed.items() for node in each)
        for rank, each in timed.items():
            _measured(found, names, rank, each, shift[rank] - begin)
    if predicted is not None:
        _predicted(found, names, predicted)
    for place, track in enumerate(found):
        if track.kind != "host":
            known = meetings.get(track.rank, {})
            for row, node in enumerate(track.nodes.tolist()):
                if node in known:
                    met[track.source, known[node]].append((place, row))
    flows = [Flow(name=str(key[1][0]), ends=ends) for key, ends in met.items() if len(ends) > 1]
    return Tracks(tracks=found, names=list(names), flows=flows)


def meetings_of(rank: int, nodes: Iterable[Node]) -> dict[int, Meeting]:
    """Node -> what it has in common with its partners on other ranks: the n-th collective of a group, the n-th message
    of a tag between two ranks."""
    counts: dict[Meeting, int] = defaultdict(int)
    found = {}
    for node in nodes:
        if node.type == NodeType.COMM_COLL:
            key: Meeting = ("collective", node.get("pg_name"))
        elif node.type in (NodeType.COMM_SEND, NodeType.COMM_RECV):
            key = ("message", node.get("comm_src"), node.get("comm_dst"), node.get("comm_tag"))
        else:
            continue
        # a send and its receive count apart: both are the n-th of their rank, unless a rank sends to itself
        number = counts[(*key, node.type)]
        counts[(*key, node.type)] += 1
        found[node.id] = (*key, number)
    return found


def _measured(found: list[Track], names: dict[str, int], rank: int, nodes: list[Node], shift: int) -> None:
    places: dict[tuple[Kind, str], list[Node]] = defaultdict(list)
    for node in nodes:
        stream, thread = node.get("stream"), node.get("thread", 0)
        if node.is_comm:
            places["communication", f"stream {stream}" if stream is not None else "communication"].append(node)
        elif stream is not None and not node.get("is_cpu_op"):
            places["compute", f"stream {stream}"].append(node)
        else:
            places["host", f"thread {thread}"].append(node)
    streams = {name for kind, name in places if kind == "compute"}
    for (kind, name), each in sorted(places.items(), key=lambda item: (item[0][0] == "host", item[0])):
        if kind == "communication" and name in streams:
            name = f"{name}, communication"
        each.sort(key=lambda node: node.start_ns)
        starts = np.array([node.start_ns + shift for node in each], dtype=np.int64)
        durations = np.array([node.duration_ns for node in each], dtype=np.int64)
        if kind == "host":
            durations, lanes = nested(starts, durations, [node.get("op_class") != "host" for node in each])
        else:
            lanes = side_by_side(starts, durations)
        found.append(
            Track(rank=rank, source="measured", kind=kind, name=name, starts_ns=starts, durations_ns=durations,
                  names=_numbered(names, [node.name for node in each]),
                  nodes=np.array([node.id for node in each], dtype=np.int64), lanes=lanes)
        )  # fmt: skip


def _predicted(found: list[Track], names: dict[str, int], timeline: Timeline) -> None:
    places: dict[tuple[int, Kind], list[Span]] = defaultdict(list)
    for span in timeline.spans:
        places[span.rank, span.track].append(span)
    for (rank, kind), spans in sorted(places.items()):
        spans.sort(key=lambda span: span.start_ns)
        starts = np.array([span.start_ns for span in spans], dtype=np.int64)
        durations = np.array([span.duration_ns for span in spans], dtype=np.int64)
        found.append(
            Track(rank=rank, source=timeline.source, kind=kind, name=kind, starts_ns=starts, durations_ns=durations,
                  names=_numbered(names, [span.name for span in spans]),
                  nodes=np.array([span.node for span in spans], dtype=np.int64),
                  lanes=side_by_side(starts, durations))
        )  # fmt: skip


def _numbered(names: dict[str, int], each: list[str]) -> NDArray[np.int32]:
    return np.array([names.setdefault(name, len(names)) for name in each], dtype=np.int32)


def nested(
    starts: NDArray[np.int64], own: NDArray[np.int64], whole: Sequence[bool] = ()
) -> tuple[NDArray[np.int64], NDArray[np.int16]]:
    """Whole durations and depths of the slices of one thread, from their starts (in order) and their own parts.

    What starts before another of its thread is over lies inside it, and makes it longer by its own time; but not those
    of which `whole` says that their time holds everything inside already, as that of an op that does work.
    """
    ends = (starts + own).tolist()
    depths = np.zeros(len(starts), dtype=np.int16)
    open_rows: list[int] = []
    for row, (start, length) in enumerate(zip(starts.tolist(), own.tolist())):
        while open_rows and ends[open_rows[-1]] <= start:
            open_rows.pop()
        for outer in reversed(open_rows):
            if whole and whole[outer]:
                break
            ends[outer] += length
        depths[row] = len(open_rows)
        open_rows.append(row)
    return np.array(ends, dtype=np.int64) - starts, depths


def side_by_side(starts: NDArray[np.int64], durations: NDArray[np.int64]) -> NDArray[np.int16]:
    """The first lane that is free, for each slice by start: 0 wherever nothing overlaps."""
    lanes = np.zeros(len(starts), dtype=np.int16)
    ends = starts + durations
    if len(starts) < 2 or (starts[1:] >= np.maximum.accumulate(ends)[:-1]).all():
        return lanes
    free: list[int] = []
    for row, (start, end) in enumerate(zip(starts.tolist(), ends.tolist())):
        lane = next((lane for lane, reached in enumerate(free) if reached <= start), len(free))
        if lane == len(free):
            free.append(end)
        free[lane] = end
        lanes[row] = lane
    return lanes
