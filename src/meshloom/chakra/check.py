"""What is wrong with traces: rules as two tables of small functions, one over a trace, one over all ranks together.

Add a rule by writing a function that yields findings and naming it in `TRACE_RULES` or `WORLD_RULES`. Rules never
raise on a bad trace and never recurse.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from typing import Literal

import msgspec
import numpy as np
from numpy.typing import NDArray

from meshloom.chakra.columns import Columns, columns
from meshloom.chakra.trace import ATTRIBUTES, CommType, Node, NodeType, Trace

Severity = Literal["error", "warning"]

_VERSIONS = ("0.0.4", "1.0.0")  # 1.0.0 changed the number only
_CLOCK_NS = 1000  # files that count whole microseconds round each end
_REQUIRED = {
    NodeType.COMM_COLL: ("comm_type", "comm_size", "pg_name"),
    NodeType.COMM_SEND: ("comm_size", "comm_src", "comm_dst", "comm_tag"),
    NodeType.COMM_RECV: ("comm_size", "comm_src", "comm_dst", "comm_tag"),
}


class Finding(msgspec.Struct, frozen=True, kw_only=True):
    """One fault: a code to search for, where it is (node None: the file or the world as a whole), what it means."""

    code: str
    severity: Severity
    rank: int
    node: int | None
    message: str

    def __str__(self) -> str:
        where = f"rank {self.rank}" + (f" node {self.node}" if self.node is not None else "")
        return f"{self.severity} {self.code} ({where}): {self.message}"


Rule = Callable[[Columns], Iterator[Finding]]
WorldRule = Callable[[Mapping[int, Columns]], Iterator[Finding]]


def check(traces: Mapping[int, Trace] | Trace) -> list[Finding]:
    """Every finding of every rule on one trace, or on the traces of all ranks by rank; empty if all is well.

    Errors would stop or mislead a reader; warnings only some readers. Raises TraceError where a node is damaged.
    """
    if isinstance(traces, Trace):
        traces = {traces.rank: traces}
    world = {rank: columns(trace) for rank, trace in traces.items()}
    findings = [finding for view in world.values() for rule in TRACE_RULES for finding in rule(view)]
    findings += [finding for rule in WORLD_RULES for finding in rule(world)]
    return findings


def _error(view: Columns, code: str, node: int | None, message: str) -> Finding:
    return Finding(code=code, severity="error", rank=view.trace.rank, node=node, message=message)


def _warning(view: Columns, code: str, node: int | None, message: str) -> Finding:
    return Finding(code=code, severity="warning", rank=view.trace.rank, node=node, message=message)


def unique_ids(view: Columns) -> Iterator[Finding]:
    """Ids are unique: readers let the last node of an id win, silently."""
    first = view.rows_of(view.ids)
    for row in np.flatnonzero(first != np.arange(len(first))):
        other = view.trace.nodes[int(first[row])].name
        yield _error(view, "duplicate-id", int(view.ids[row]), f"expected unique ids, but {other!r} has it as well")


def dependencies_exist(view: Columns) -> Iterator[Finding]:
    """Every dependency is a node of the file, and none is the node itself."""
    for kind, edges in (("data", view.data), ("control", view.control)):
        itself = view.ids[edges.owners] == edges.needed
        missing = ~itself & (view.rows_of(edges.needed) < 0)
        for place in np.flatnonzero(itself | missing):
            node, needed = view.trace.nodes[int(edges.owners[place])], int(edges.needed[place])
            if itself[place]:
                yield _error(view, "self-dependency", node.id, f"{node.name!r} has a {kind} dependency on itself")
            else:
                yield _error(
                    view,
                    "dangling-dependency",
                    node.id,
                    f"{node.name!r} has a {kind} dependency on {needed}, which is not in the file",
                )


def _known_edges(view: Columns) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(row, row that it needs) of every dependency that is in the file and not on the node itself."""
    owners = np.concatenate((view.data.owners, view.control.owners))
    rows = view.rows_of(np.concatenate((view.data.needed, view.control.needed)))
    kept = (rows >= 0) & (rows != owners)
    return owners[kept], rows[kept]


def acyclic(view: Columns) -> Iterator[Finding]:
    """The graph has no cycle; one cycle is named (Kahn 1962, iterative)."""
    owners, rows = _known_edges(view)
    if (rows < owners).all():  # everything comes after what it needs
        return
    needed_by: dict[int, list[int]] = defaultdict(list)
    needs: dict[int, list[int]] = defaultdict(list)
    for owner, row in zip(owners.tolist(), rows.tolist()):
        needed_by[row].append(owner)
        needs[owner].append(row)
    waiting = {owner: len(deps) for owner, deps in needs.items()}
    ready = [row for row in needed_by if row not in waiting]
    while ready:
        for successor in needed_by.get(ready.pop(), ()):
            waiting[successor] -= 1
            if not waiting[successor]:
                del waiting[successor]
                ready.append(successor)
    if waiting:
        cycle = [int(view.ids[row]) for row in _one_cycle(needs, waiting)]
        yield _error(
            view,
            "cycle",
            cycle[0],
            f"{len(waiting)} nodes lie on or behind a cycle; one is "
            + " -> ".join(map(str, cycle[:12]))
            + (" -> …" if len(cycle) > 12 else ""),
        )


def _one_cycle(needs: Mapping[int, list[int]], stuck: Mapping[int, int]) -> list[int]:
    """A cycle among the stuck rows: each of them needs another stuck one, so walking on must come round."""
    row = min(stuck)
    place: dict[int, int] = {}
    while row not in place:
        place[row] = len(place)
        row = next(dep for dep in needs[row] if dep in stuck)
    return [*list(place)[place[row] :], row]


def communication_complete(view: Columns) -> Iterator[Finding]:
    """Communication nodes carry all that a simulator needs, and run on no host resource."""
    for node in view.communication:
        missing = [name for name in _REQUIRED[node.type] if node.get(name) is None]
        if missing:
            yield _error(
                view, "incomplete-communication", node.id, f"{node.name!r}: expected attributes {', '.join(missing)}"
            )
        if node.get("is_cpu_op"):
            yield _error(view, "communication-on-host", node.id, f"{node.name!r}: expected is_cpu_op to be false")
        group = node.get("pg_name")
        if group is not None and not (str(group).isdecimal() and int(group) > 0):
            yield _error(
                view,
                "bad-group",
                node.id,
                f"{node.name!r}: expected pg_name to be an integer above 0 as text, got {group!r}",
            )


def times_sane(view: Columns) -> Iterator[Finding]:
    """No time is negative."""
    for row in np.flatnonzero((view.durations_ns < 0) | (view.starts_ns < 0)):
        node = view.trace.nodes[int(row)]
        yield _error(
            view,
            "negative-time",
            node.id,
            f"{node.name!r}: start {node.start_ns} ns, duration {node.duration_ns} ns",
        )


def times_follow(view: Columns) -> Iterator[Finding]:
    """Nothing measured is over before what it needs has started: an op before the one that encloses it, a kernel
    before its launch. (It may start before: a wait does, and waits.)"""
    owners, rows = _known_edges(view)
    starts, ends = view.starts_ns, view.starts_ns + view.durations_ns
    early = (ends[owners] + _CLOCK_NS < starts[rows]) & (starts[owners] > 0)
    if early.any():
        owner, row = (view.trace.nodes[int(side[early][0])] for side in (owners, rows))
        yield _warning(
            view,
            "ends-before-need",
            owner.id,
            f"{early.sum()} nodes are over before what they need starts; the first, {owner.name!r}, is over "
            f"{row.start_ns - owner.start_ns - owner.duration_ns} ns before node {row.id}, {row.name!r}",
        )


def schema_known(view: Columns) -> Iterator[Finding]:
    """The file says which schema it follows, and it is one that readers know."""
    version = view.trace.version
    if version not in _VERSIONS:
        yield _warning(view, "schema-version", None, f"expected one of {', '.join(_VERSIONS)}, got {version!r}")


def attribute_types(view: Columns) -> Iterator[Finding]:
    """Attributes have the protobuf kinds that consumers read: another kind is read as 0, or stops them."""
    for row, name in view.mistyped:
        node, known = view.trace.nodes[row], ATTRIBUTES[name]
        value = node.attrs[name]
        yield _warning(
            view,
            "attribute-type",
            node.id,
            f"{node.name!r}: expected {name} as {known.kind}"
            f"{' list' * known.many}, got {value.kind}{' list' * value.many}",
        )


def in_order(view: Columns) -> Iterator[Finding]:
    """Dependencies come before the nodes that need them, so that a reader may stream the file."""
    owners, rows = _known_edges(view)
    late = rows > owners
    for owner, first in zip(*np.unique(owners[late], return_index=True)):
        node, needed = view.trace.nodes[int(owner)], int(view.ids[rows[late][first]])
        yield _warning(view, "forward-reference", node.id, f"{node.name!r} needs {needed}, which comes later")


def streams_serial(view: Columns) -> Iterator[Finding]:
    """Measured kernels of a stream do not overlap: a stream runs one at a time."""
    measured = np.flatnonzero((view.streams >= 0) & (view.durations_ns > 0) & (view.starts_ns > 0))
    order = measured[np.lexsort((view.starts_ns[measured], view.streams[measured]))]
    before, after = order[:-1], order[1:]
    ends = view.starts_ns[before] + view.durations_ns[before]
    overlap = (view.streams[before] == view.streams[after]) & (ends > view.starts_ns[after] + _CLOCK_NS)
    for first, second in zip(before[overlap], after[overlap]):
        node = view.trace.nodes[int(second)]
        yield _warning(
            view,
            "overlap",
            node.id,
            f"{node.name!r} begins on stream {view.streams[second]} while node {view.ids[first]} still runs",
        )


def all_ranks_there(world: Mapping[int, Columns]) -> Iterator[Finding]:
    """Every rank of the world has a trace, or one that says that it stands for more ranks than its own."""
    if any(view.trace.get("role_size") is not None for view in world.values()):
        return
    world_size = max((int(view.trace.get("world_size", 0)) for view in world.values()), default=0)
    for rank in range(world_size):
        if rank not in world and len(world) > 1:
            yield Finding(
                code="missing-rank",
                severity="error",
                rank=rank,
                node=None,
                message=f"expected traces of ranks 0 to {world_size - 1}, got none of this one",
            )


def collectives_match(world: Mapping[int, Columns]) -> Iterator[Finding]:
    """All ranks of a group run the same collectives of the same size in the same order."""
    groups: dict[str, dict[int, list[Node]]] = defaultdict(dict)
    members: dict[str, list[int]] = {}
    for rank, view in world.items():
        for node in view.communication:
            if node.type is not NodeType.COMM_COLL:
                continue
            group = str(node.get("pg_name"))
            ranks = node.get("comm_ranks")
            if ranks is not None and members.setdefault(group, ranks) != ranks:
                yield Finding(
                    code="group-mismatch",
                    severity="error",
                    rank=rank,
                    node=node.id,
                    message=f"group {group} is {ranks} here, but {members[group]} elsewhere",
                )
                continue
            groups[group].setdefault(rank, []).append(node)
    for group, by_rank in groups.items():
        expected = [rank for rank in members.get(group, by_rank) if rank in world]
        yield from _match(group, {rank: by_rank.get(rank, []) for rank in expected})


def _match(group: str, by_rank: Mapping[int, list[Node]]) -> Iterator[Finding]:
    """The first difference between the first rank of the group and each other one."""
    if not by_rank:
        return
    first, *others = by_rank
    for rank in others:
        for index in range(max(len(by_rank[first]), len(by_rank[rank]))):
            mine, theirs = (nodes[index] if index < len(nodes) else None for nodes in (by_rank[rank], by_rank[first]))
            if _signature(mine) != _signature(theirs):
                yield Finding(
                    code="collective-mismatch",
                    severity="error",
                    rank=rank,
                    node=mine.id if mine else None,
                    message=f"collective {index} of group {group}: {_describe(mine)} here, but "
                    f"{_describe(theirs)} on rank {first}: this would deadlock",
                )
                break


def _signature(node: Node | None) -> tuple[object, ...]:
    return () if node is None else (node.get("comm_type"), node.get("comm_size"), node.get("dtype"))


def _describe(node: Node | None) -> str:
    if node is None:
        return "nothing"
    kind = node.get("comm_type")
    name = CommType(kind).name.lower() if kind in CommType.__members__.values() else f"type {kind}"
    return f"{name} of {node.get('comm_size')} bytes"


def messages_match(world: Mapping[int, Columns]) -> Iterator[Finding]:
    """Every send meets a receive of the same tag and size, in order, where both ends' traces are there."""
    flows: dict[tuple[object, ...], dict[NodeType, list[tuple[int, Node]]]] = defaultdict(lambda: defaultdict(list))
    for rank, view in world.items():
        for node in view.communication:
            if node.type in (NodeType.COMM_SEND, NodeType.COMM_RECV):
                source, destination = node.get("comm_src"), node.get("comm_dst")
                if source in world and destination in world:
                    flows[source, destination, node.get("comm_tag")][node.type].append((rank, node))
    for (source, destination, tag), ends in flows.items():
        sends, receives = ends[NodeType.COMM_SEND], ends[NodeType.COMM_RECV]
        for index in range(max(len(sends), len(receives))):
            send, receive = (end[index] if index < len(end) else None for end in (sends, receives))
            if send is None or receive is None or send[1].get("comm_size") != receive[1].get("comm_size"):
                sizes = [f"{end[1].get('comm_size')} bytes" if end else "nothing" for end in (send, receive)]
                yield Finding(
                    code="unmatched-message",
                    severity="error",
                    rank=(send or receive or sends[0])[0],
                    node=(send or receive or sends[0])[1].id,
                    message=f"message {index} from rank {source} to {destination}, tag {tag}: sends "
                    f"{sizes[0]}, receives {sizes[1]}",
                )
                break


TRACE_RULES: tuple[Rule, ...] = (
    unique_ids,
    dependencies_exist,
    acyclic,
    communication_complete,
    times_sane,
    times_follow,
    schema_known,
    attribute_types,
    in_order,
    streams_serial,
)
WORLD_RULES: tuple[WorldRule, ...] = (all_ranks_there, collectives_match, messages_match)
