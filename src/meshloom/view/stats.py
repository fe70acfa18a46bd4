"""Numbers about a step: ops, modules, collectives, who sends how much to whom, where time went. No torch.

Sums run over all ranks that have traces. Compute covers communication where both run at once; what is left of
communication is exposed, what neither covers is idle.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import numpy as np

from meshloom.chakra.summary import comm_kind
from meshloom.chakra.trace import CommType, Node, NodeType
from meshloom.view.graph import known_cost, layer_of, short_name
from meshloom.view.scene import Event, Scene
from meshloom.view.tracks import Source


class OpRow(NamedTuple):
    """Events that share a name (or a module) and a phase, over all ranks.

    `flops` and `num_bytes` are sums of what is known: a cost of 1 stands for one that nobody knows.
    """

    name: str
    kind: str
    phase: str
    num_events: int
    time_ns: int
    flops: int
    num_bytes: int


class CollectiveRow(NamedTuple):
    """Collectives or messages of one kind, axis, group size and size; times of the fastest and the mean rank.

    `bus_bytes_per_second` is what each rank's port moved: nccl-tests' bus bandwidth, of the fastest rank's time,
    because the others wait inside.
    """

    kind: str
    axis: str
    group_size: int
    num_bytes: int
    num_events: int
    time_ns: int
    best_ns: int
    bus_bytes_per_second: float


class Gap(NamedTuple):
    """Time in which a rank did nothing, and what came next."""

    rank: int
    start_ns: int
    duration_ns: int
    before: str


class ShareRow(NamedTuple):
    """Where a rank's time went, in ns; compute, exposed communication and idle sum to the step."""

    rank: int
    compute_ns: int
    exposed_ns: int
    idle_ns: int
    communication_ns: int
    num_gaps: int


def ops(events: Iterable[Event], *, by: Callable[[Node], str] | None = None) -> list[OpRow]:
    """Rows by op name (or by what `by` gives) and phase, longest first."""
    name_of = by or (lambda node: short_name(node.name))
    table: dict[tuple[str, str, str], list[int]] = defaultdict(lambda: [0, 0, 0, 0])
    for event in events:
        node = event.node
        kind = "communication" if node.is_comm else str(node.get("op_class", "compute"))
        row = table[name_of(node), kind if by is None else "", str(node.get("phase") or "")]
        row[0] += 1
        row[1] += event.duration_ns
        if not node.is_comm:
            row[2] += known_cost(node, "num_ops")
        row[3] += int(node.get("comm_size", 0)) if node.is_comm else known_cost(node, "tensor_size")
    return sorted(
        (OpRow(*key, *row) for key, row in table.items()), key=lambda row: (-row.time_ns, -row.flops, row.name)
    )


def modules(events: Iterable[Event]) -> list[OpRow]:
    """Rows by module and phase; empty where no node tells its module."""
    named = [event for event in events if event.node.get("module")]
    return ops(named, by=lambda node: str(node.get("module")))


def layers(events: Iterable[Event]) -> list[OpRow]:
    """Rows by numbered layer and phase; what belongs to none stands under its module's first part."""
    named = [event for event in events if event.node.get("module")]

    def name(node: Node) -> str:
        module = str(node.get("module"))
        number = layer_of(module)
        return f"layer {number}" if number is not None else module.split(".")[0]

    return ops(named, by=name)


_FACTOR: dict[CommType, Callable[[int], float]] = {  # bus bytes over this rank's input bytes, of n ranks in a ring
    CommType.ALL_REDUCE: lambda n: 2 * (n - 1) / n,
    CommType.ALL_GATHER: lambda n: n - 1,
    CommType.REDUCE_SCATTER: lambda n: (n - 1) / n,
    CommType.REDUCE_SCATTER_BLOCK: lambda n: (n - 1) / n,
    CommType.ALL_TO_ALL: lambda n: (n - 1) / n,
    CommType.BROADCAST: lambda n: 1.0,
    CommType.REDUCE: lambda n: 1.0,
}


def sent_bytes(node: Node) -> float:
    """Bytes that a collective's rank sends, as a ring moves them (nccl-tests, PERFORMANCE.md); 0 where not known."""
    size = len(node.get("comm_ranks") or ())
    kind = node.get("comm_type")
    if node.type != NodeType.COMM_COLL:
        return float(node.get("comm_size", 0)) if node.type == NodeType.COMM_SEND else 0.0
    if size < 2 or kind not in CommType.__members__.values():
        return 0.0
    factor = _FACTOR.get(CommType(kind))
    return factor(size) * float(node.get("comm_size", 0)) if factor else 0.0


def collectives(events: Iterable[Event]) -> list[CollectiveRow]:
    """Rows by kind, axis, group size and bytes, longest first."""
    table: dict[tuple[str, str, int, int], list[Event]] = defaultdict(list)
    for event in events:
        node = event.node
        if node.is_comm:
            size = len(node.get("comm_ranks") or ()) or 2
            table[comm_kind(node), str(node.get("comm_axis", "")), size, int(node.get("comm_size", 0))].append(event)
    rows = []
    for key, group in table.items():
        best = min((event.duration_ns for event in group if event.duration_ns), default=0)
        sent = sent_bytes(group[0].node) or (float(key[3]) if key[0] == "recv" else 0.0)
        total = sum(event.duration_ns for event in group)
        rows.append(CollectiveRow(*key, len(group), total, best, sent / best * 1e9 if best else 0.0))
    return sorted(rows, key=lambda row: (-row.time_ns, -row.num_bytes * row.num_events))


def matrix(scene: Scene) -> tuple[list[int], list[list[float]]]:
    """(ranks, bytes from each to each): messages as they are, collectives as a ring of the group moves them, and an
    all-to-all to each other rank."""
    ranks = sorted({*scene.traces, *(rank for each in scene.nodes.values() for node in each if node.is_comm
                                     for rank in node.get("comm_ranks") or ())})  # fmt: skip
    at = {rank: place for place, rank in enumerate(ranks)}
    table = np.zeros((len(ranks), len(ranks)))
    for rank, nodes in scene.nodes.items():
        for node in nodes:
            if not node.is_comm:
                continue
            group = list(node.get("comm_ranks") or ())
            if node.type == NodeType.COMM_SEND and node.get("comm_dst") in at:
                table[at[rank], at[node.get("comm_dst")]] += float(node.get("comm_size", 0))
            elif rank in group and len(group) > 1:
                sent = sent_bytes(node)
                if node.get("comm_type") == CommType.ALL_TO_ALL:
                    for other in group:
                        if other != rank:
                            table[at[rank], at[other]] += sent / (len(group) - 1)
                else:
                    table[at[rank], at[group[(group.index(rank) + 1) % len(group)]]] += sent
    return ranks, table.tolist()


def shares(events: Iterable[Event]) -> tuple[int, list[ShareRow], list[Gap]]:
    """(length of the step in ns, where each rank's time went, the longest gaps)."""
    by_rank: dict[int, list[Event]] = defaultdict(list)
    for event in events:
        if event.duration_ns:
            by_rank[event.rank].append(event)
    whole = max((event.end_ns for each in by_rank.values() for event in each), default=0)
    rows, gaps = [], []
    for rank, each in sorted(by_rank.items()):
        compute = _covered([event for event in each if not event.node.is_comm])
        communication = _covered([event for event in each if event.node.is_comm])
        busy, holes = 0, []
        reached = 0
        for event in sorted(each, key=lambda event: event.start_ns):
            if event.start_ns > reached:
                holes.append(Gap(rank, reached, event.start_ns - reached, short_name(event.node.name)))
            busy += max(0, event.end_ns - max(reached, event.start_ns))
            reached = max(reached, event.end_ns)
        if whole > reached:
            holes.append(Gap(rank, reached, whole - reached, ""))
        rows.append(ShareRow(rank, compute, busy - compute, whole - busy, communication, len(holes)))
        gaps += sorted(holes, key=lambda gap: -gap.duration_ns)[:10]
    return whole, rows, sorted(gaps, key=lambda gap: -gap.duration_ns)[:20]


def _covered(events: list[Event]) -> int:
    covered = reached = 0
    for event in sorted(events, key=lambda event: event.start_ns):
        covered += max(0, event.end_ns - max(reached, event.start_ns))
        reached = max(reached, event.end_ns)
    return covered


def steps_of(scene: Scene, source: Source) -> dict[str, Any]:
    """Length of the step, and mean shares over the ranks."""
    whole, rows, _ = shares(scene.events(source))
    total = max(1, whole * len(rows))
    return {
        "step_ns": whole,
        "compute_share": sum(row.compute_ns for row in rows) / total,
        "exposed_communication_share": sum(row.exposed_ns for row in rows) / total,
        "idle_share": sum(row.idle_ns for row in rows) / total,
    }
