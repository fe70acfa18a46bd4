"""What is wrong with traces: rules as two tables of small functions, one over a trace, one over all ranks together.

Add a rule by writing a function that yields findings and naming it in `TRACE_RULES` or `WORLD_RULES`. Rules never
raise on a bad trace and never recurse.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from itertools import pairwise
from typing import Literal

import msgspec

from meshloom.chakra.trace import ATTRIBUTES, CommType, Node, NodeType, Trace, Typed

Severity = Literal["error", "warning"]

_VERSIONS = ("0.0.4", "1.0.0")  # 1.0.0 changed the number only
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


Rule = Callable[[Trace], Iterator[Finding]]
WorldRule = Callable[[Mapping[int, Trace]], Iterator[Finding]]


def check(traces: Mapping[int, Trace] | Trace) -> list[Finding]:
    """Every finding of every rule on one trace, or on the traces of all ranks by rank; empty if all is well.

    Errors would stop or mislead a reader; warnings only some readers.
    """
    if isinstance(traces, Trace):
        traces = {traces.rank: traces}
    findings = [finding for trace in traces.values() for rule in TRACE_RULES for finding in rule(trace)]
    findings += [finding for rule in WORLD_RULES for finding in rule(traces)]
    return findings


def _error(trace: Trace, code: str, node: int | None, message: str) -> Finding:
    return Finding(code=code, severity="error", rank=trace.rank, node=node, message=message)


def _warning(trace: Trace, code: str, node: int | None, message: str) -> Finding:
    return Finding(code=code, severity="warning", rank=trace.rank, node=node, message=message)


def unique_ids(trace: Trace) -> Iterator[Finding]:
    """Ids are unique: readers let the last node of an id win, silently."""
    seen: dict[int, str] = {}
    for node in trace.nodes:
        if node.id in seen:
            yield _error(trace, "duplicate-id", node.id, f"expected unique ids, but {seen[node.id]!r} has it as well")
        seen[node.id] = node.name


def dependencies_exist(trace: Trace) -> Iterator[Finding]:
    """Every dependency is a node of the file, and none is the node itself."""
    ids = {node.id for node in trace.nodes}
    for node in trace.nodes:
        for kind, dependencies in (("data", node.data_deps), ("control", node.ctrl_deps)):
            for dependency in dependencies:
                if dependency == node.id:
                    yield _error(trace, "self-dependency", node.id, f"{node.name!r} has a {kind} dependency on itself")
                elif dependency not in ids:
                    yield _error(
                        trace,
                        "dangling-dependency",
                        node.id,
                        f"{node.name!r} has a {kind} dependency on {dependency}, which is not in the file",
                    )


def acyclic(trace: Trace) -> Iterator[Finding]:
    """The graph has no cycle; one cycle is named (Kahn 1962, iterative)."""
    needs = {node.id: [*node.data_deps, *node.ctrl_deps] for node in trace.nodes}
    needs = {node: [dep for dep in deps if dep in needs and dep != node] for node, deps in needs.items()}
    needed_by: dict[int, list[int]] = defaultdict(list)
    for node, deps in needs.items():
        for dep in deps:
            needed_by[dep].append(node)
    waiting = {node: len(deps) for node, deps in needs.items()}
    ready = [node for node, count in waiting.items() if not count]
    while ready:
        node = ready.pop()
        del waiting[node]
        for successor in needed_by[node]:
            waiting[successor] -= 1
            if not waiting[successor]:
                ready.append(successor)
    if waiting:
        cycle = _one_cycle(needs, waiting)
        yield _error(
            trace,
            "cycle",
            cycle[0],
            f"{len(waiting)} nodes lie on or behind a cycle; one is "
            + " -> ".join(map(str, cycle[:12]))
            + (" -> …" if len(cycle) > 12 else ""),
        )


def _one_cycle(needs: Mapping[int, list[int]], stuck: Mapping[int, int]) -> list[int]:
    """A cycle among the stuck nodes: each of them needs another stuck one, so walking on must come round."""
    node = min(stuck)
    place: dict[int, int] = {}
    while node not in place:
        place[node] = len(place)
        node = next(dep for dep in needs[node] if dep in stuck)
    return [*list(place)[place[node] :], node]


def communication_complete(trace: Trace) -> Iterator[Finding]:
    """Communication nodes carry all that a simulator needs, and run on no host resource."""
    for node in trace.nodes:
        if not node.is_comm:
            continue
        missing = [name for name in _REQUIRED[node.type] if node.get(name) is None]
        if missing:
            yield _error(
                trace, "incomplete-communication", node.id, f"{node.name!r}: expected attributes {', '.join(missing)}"
            )
        if node.get("is_cpu_op"):
            yield _error(trace, "communication-on-host", node.id, f"{node.name!r}: expected is_cpu_op to be false")
        group = node.get("pg_name")
        if group is not None and not (str(group).isdecimal() and int(group) > 0):
            yield _error(
                trace,
                "bad-group",
                node.id,
                f"{node.name!r}: expected pg_name to be an integer above 0 as text, got {group!r}",
            )


def times_sane(trace: Trace) -> Iterator[Finding]:
    """No time is negative."""
    for node in trace.nodes:
        if node.duration_ns < 0 or node.start_ns < 0:
            yield _error(
                trace,
                "negative-time",
                node.id,
                f"{node.name!r}: start {node.start_ns} ns, duration {node.duration_ns} ns",
            )


def schema_known(trace: Trace) -> Iterator[Finding]:
    """The file says which schema it follows, and it is one that readers know."""
    if trace.version not in _VERSIONS:
        yield _warning(trace, "schema-version", None, f"expected one of {', '.join(_VERSIONS)}, got {trace.version!r}")


def attribute_types(trace: Trace) -> Iterator[Finding]:
    """Attributes have the protobuf kinds that consumers read: another kind is read as 0, or stops them."""
    for node in trace.nodes:
        for name, value in node.attrs.items():
            if isinstance(value, Typed) and name in ATTRIBUTES:
                known = ATTRIBUTES[name]
                yield _warning(
                    trace,
                    "attribute-type",
                    node.id,
                    f"{node.name!r}: expected {name} as {known.kind}"
                    f"{' list' * known.many}, got {value.kind}{' list' * value.many}",
                )


def in_order(trace: Trace) -> Iterator[Finding]:
    """Dependencies come before the nodes that need them, so that a reader may stream the file."""
    seen: set[int] = set()
    ids = {node.id for node in trace.nodes}
    for node in trace.nodes:
        seen.add(node.id)
        late = [dep for dep in (*node.data_deps, *node.ctrl_deps) if dep not in seen and dep in ids]
        if late:
            yield _warning(trace, "forward-reference", node.id, f"{node.name!r} needs {late[0]}, which comes later")


def streams_serial(trace: Trace) -> Iterator[Finding]:
    """Measured kernels of a stream do not overlap: a stream runs one at a time."""
    streams: dict[int, list[Node]] = defaultdict(list)
    for node in trace.nodes:
        stream = node.get("stream")
        if stream is not None and node.duration_ns > 0 and not node.get("is_cpu_op"):
            streams[stream].append(node)
    for stream, nodes in streams.items():
        nodes.sort(key=lambda node: node.start_ns)
        for before, after in pairwise(nodes):
            # files that count whole microseconds round each end
            if before.start_ns + before.duration_ns > after.start_ns + 1000 and before.start_ns:
                yield _warning(
                    trace,
                    "overlap",
                    after.id,
                    f"{after.name!r} begins on stream {stream} while node {before.id} still runs",
                )


def all_ranks_there(traces: Mapping[int, Trace]) -> Iterator[Finding]:
    """Every rank of the world has a trace."""
    world_size = max((int(trace.get("world_size", 0)) for trace in traces.values()), default=0)
    for rank in range(world_size):
        if rank not in traces and len(traces) > 1:
            yield Finding(
                code="missing-rank",
                severity="error",
                rank=rank,
                node=None,
                message=f"expected traces of ranks 0 to {world_size - 1}, got none of this one",
            )


def collectives_match(traces: Mapping[int, Trace]) -> Iterator[Finding]:
    """All ranks of a group run the same collectives of the same size in the same order."""
    groups: dict[str, dict[int, list[Node]]] = defaultdict(dict)
    members: dict[str, list[int]] = {}
    for rank, trace in traces.items():
        for node in trace.nodes:
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
        expected = [rank for rank in members.get(group, by_rank) if rank in traces]
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


def messages_match(traces: Mapping[int, Trace]) -> Iterator[Finding]:
    """Every send meets a receive of the same tag and size, in order, where both ends' traces are there."""
    flows: dict[tuple[object, ...], dict[NodeType, list[tuple[int, Node]]]] = defaultdict(lambda: defaultdict(list))
    for rank, trace in traces.items():
        for node in trace.nodes:
            if node.type in (NodeType.COMM_SEND, NodeType.COMM_RECV):
                source, destination = node.get("comm_src"), node.get("comm_dst")
                if source in traces and destination in traces:
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
    schema_known,
    attribute_types,
    in_order,
    streams_serial,
)
WORLD_RULES: tuple[WorldRule, ...] = (all_ranks_there, collectives_match, messages_match)
