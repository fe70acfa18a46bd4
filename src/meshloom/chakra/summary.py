"""What a trace holds, in a few numbers: sums that can be taken part by part and joined."""

from __future__ import annotations

from collections.abc import Iterable

import msgspec

from meshloom.chakra.trace import CommType, Node, NodeType


class Place(msgspec.Struct, frozen=True):
    """A node that stands for a moment: when it started, or ended."""

    when_ns: int
    node: int
    name: str


class Traffic(msgspec.Struct, frozen=True):
    """`count` collectives or messages of one kind (`all_reduce`, `send`) with one size on one axis of the plan."""

    kind: str
    axis: str
    num_bytes: int
    count: int


class Summary(msgspec.Struct, frozen=True, kw_only=True):
    """Counts and sums over nodes: FLOPs and bytes are those of work (no host scopes, no communication), `first` is
    the node that starts first, `last` the one that ends last; both None where nothing is timed."""

    num_nodes: int = 0
    types: dict[str, int] = {}
    phases: dict[str, int] = {}  # of work
    flops: int = 0
    num_bytes: int = 0
    first: Place | None = None
    last: Place | None = None
    traffic: list[Traffic] = []

    @property
    def duration_ns(self) -> int:
        """From the first start to the last end."""
        return self.last.when_ns - self.first.when_ns if self.first and self.last else 0


def summarize(nodes: Iterable[Node]) -> Summary:
    """The summary of the nodes, in one pass."""
    num_nodes = flops = num_bytes = 0
    types: dict[NodeType, int] = {}
    phases: dict[str, int] = {}
    traffic: dict[tuple[str, str, int], int] = {}
    first: tuple[int, Node] | None = None
    last: tuple[int, Node] | None = None
    timed = False  # one node may start at 0, but not all of them
    for node in nodes:
        num_nodes += 1
        types[node.type] = types.get(node.type, 0) + 1
        if node.is_comm:
            key = comm_kind(node), str(node.get("comm_axis", "")), int(node.get("comm_size", 0))
            traffic[key] = traffic.get(key, 0) + 1
        elif node.attrs.get("op_class") != "host":
            phase = node.get("phase") or "other"
            phases[phase] = phases.get(phase, 0) + 1
            flops += int(node.get("num_ops", 0))
            num_bytes += int(node.get("tensor_size", 0))
        start, length = node.start_ns, node.duration_ns
        timed = timed or start > 0
        if start or length:
            if first is None or start < first[0]:
                first = start, node
            if last is None or start + length > last[0]:
                last = start + length, node
    return Summary(
        num_nodes=num_nodes,
        types={kind.name: count for kind, count in sorted(types.items())},
        phases=phases,
        flops=flops,
        num_bytes=num_bytes,
        first=Place(first[0], first[1].id, first[1].name) if first and timed else None,
        last=Place(last[0], last[1].id, last[1].name) if last and timed else None,
        traffic=[Traffic(*key, count) for key, count in sorted(traffic.items())],
    )


def join(parts: Iterable[Summary]) -> Summary:
    """The summary of all nodes of the parts."""
    whole = Summary()
    for part in parts:
        counts = {(item.kind, item.axis, item.num_bytes): item.count for item in whole.traffic}
        for item in part.traffic:
            key = item.kind, item.axis, item.num_bytes
            counts[key] = counts.get(key, 0) + item.count
        whole = Summary(
            num_nodes=whole.num_nodes + part.num_nodes,
            types=_added(whole.types, part.types),
            phases=_added(whole.phases, part.phases),
            flops=whole.flops + part.flops,
            num_bytes=whole.num_bytes + part.num_bytes,
            first=min((place for place in (whole.first, part.first) if place), key=_when, default=None),
            last=max((place for place in (whole.last, part.last) if place), key=_when, default=None),
            traffic=[Traffic(*key, count) for key, count in sorted(counts.items())],
        )
    return whole


def comm_kind(node: Node) -> str:
    """What a communication node is, in words: `all_reduce`, `send`."""
    if node.type != NodeType.COMM_COLL:
        return node.type.name.lower().removeprefix("comm_")
    kind = node.get("comm_type")
    return CommType(kind).name.lower() if kind in CommType.__members__.values() else f"collective {kind}"


def _added(one: dict[str, int], other: dict[str, int]) -> dict[str, int]:
    return {name: one.get(name, 0) + other.get(name, 0) for name in {**one, **other}}


def _when(place: Place) -> int:
    return place.when_ns
