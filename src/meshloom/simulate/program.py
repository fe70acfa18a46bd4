"""What the engine plays: the nodes of all ranks as flat lists, ranks that do the same folded into one role. No torch.

Ranks fold where nothing tells them apart: equal nodes and costs, and groups that lie alike on the cluster and hold
alike ranks, found by colour refinement (Weisfeiler & Leman 1968; an equitable partition, so that all ranks of a role
do the same at the same time). A program then costs as much as it has roles.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from meshloom.chakra.clocks import offsets_ns
from meshloom.chakra.trace import CommType, Node, NodeType, Trace
from meshloom.errors import SimulationError
from meshloom.hardware.cluster import Cluster
from meshloom.simulate.compute import duration_ns
from meshloom.simulate.network import collective_ns, message_ns

Durations = Literal["model", "measured"]
Flow = tuple[object, ...]

HOST, COMPUTE, COMMUNICATION = 0, 1, 2


@dataclass(slots=True, kw_only=True)
class Program:
    """Nodes of all roles, one after the other; position in the lists is a node's number here.

    `roles` holds the ranks of each role, `owner` a node's role, `kind` how it runs, `duration_ns` how long (of a
    communication what its bytes take), `lag_ns` how long after its dependencies it begins, `needed_by` and `waiting`
    its dependencies, `meeting` which meeting a communication belongs to (-1: none), `parties` how many nodes meet.
    """

    roles: list[list[int]] = field(default_factory=list)
    owner: list[int] = field(default_factory=list)
    kind: list[int] = field(default_factory=list)
    duration_ns: list[int] = field(default_factory=list)
    lag_ns: list[int] = field(default_factory=list)
    needed_by: list[list[int]] = field(default_factory=list)
    waiting: list[int] = field(default_factory=list)
    meeting: list[int] = field(default_factory=list)
    parties: list[int] = field(default_factory=list)
    flows: list[Flow] = field(default_factory=list)  # of each meeting, for messages
    missing: dict[int, int] = field(default_factory=dict)  # meeting -> a rank that never reaches it
    nodes: list[Node] = field(default_factory=list)

    def add(self, role: int, kind: int, duration: int, needs: Iterable[int] = (), *, lag: int = 0) -> int:
        """Append a node; returns its number."""
        number = len(self.owner)
        self.owner.append(role)
        self.kind.append(kind)
        self.duration_ns.append(duration)
        self.lag_ns.append(lag)
        self.needed_by.append([])
        self.meeting.append(-1)
        count = 0
        for needed in needs:
            self.needed_by[needed].append(number)
            count += 1
        self.waiting.append(count)
        return number

    def meet(self, numbers: Sequence[int], flow: Flow = ()) -> None:
        """Let these communications wait for one another."""
        for number in numbers:
            self.meeting[number] = len(self.parties)
        self.parties.append(len(numbers))
        self.flows.append(flow)


def program_of(
    traces: Mapping[int, Trace], cluster: Cluster, *, durations: Durations = "model", fold: bool = True
) -> Program:
    """The program of traces by rank, rank r on device r of `cluster`.

    `durations="measured"` takes the traces' own times: of a collective the shortest of its ranks (the others wait
    inside), and the time that lies between a node and what it needed (Python, launches) as its lag.
    Raises SimulationError where measured times are asked for and the traces hold none.
    """
    nodes = {rank: list(trace.nodes) for rank, trace in traces.items()}
    if durations == "measured" and not any(node.duration_ns for each in nodes.values() for node in each):
        raise SimulationError("--compute measured: expected traces with durations, these hold none; record them first")
    roles = _roles(nodes, cluster) if fold and durations == "model" else [[rank] for rank in sorted(nodes)]
    program = Program(roles=roles)
    shift = offsets_ns(nodes) if durations == "measured" else dict.fromkeys(nodes, 0)
    begin = min((node.start_ns + shift[rank] for rank, each in nodes.items() for node in each), default=0)
    role_of = {rank: role for role, ranks in enumerate(roles) for rank in ranks}
    reached: dict[Flow, list[int]] = defaultdict(list)
    expected: dict[Flow, tuple[int, ...]] = {}
    for role, ranks in enumerate(roles):
        first = ranks[0]
        _load(program, role, nodes[first], cluster, durations, begin - shift[first], reached, expected, role_of)
    _meet(program, reached, expected, nodes, role_of, durations)
    return program


def _load(
    program: Program, role: int, nodes: list[Node], cluster: Cluster, durations: Durations, begin: int,
    reached: dict[Flow, list[int]], expected: dict[Flow, tuple[int, ...]], role_of: Mapping[int, int],
) -> None:  # fmt: skip
    first = len(program.owner)
    numbers = {node.id: first + place for place, node in enumerate(nodes)}
    ends = {node.id: node.start_ns + node.duration_ns for node in nodes} if durations == "measured" else {}
    counts: dict[Flow, int] = defaultdict(int)
    waiting_for: list[list[int]] = []
    for node in nodes:
        needs = [need for need in {*node.data_deps, *node.ctrl_deps} if need in numbers]
        lag = 0
        if durations == "measured":
            lag = node.start_ns - max((ends[need] for need in needs), default=begin)
        number = program.add(role, _kind(node, durations), _length(node, cluster, durations), lag=lag)
        waiting_for.append([numbers[need] for need in needs])
        program.nodes.append(node)
        if node.is_comm:
            flow = flow_of(node)
            key = (*_folded(flow, node, role_of), counts[flow])
            counts[flow] += 1
            reached[key].append(number)
            expected[key] = ranks_of(node)
    for number, needed in enumerate(waiting_for, first):
        program.waiting[number] = len(needed)
        for need in needed:
            program.needed_by[need].append(number)


def _kind(node: Node, durations: Durations) -> int:
    if node.is_comm:
        return COMMUNICATION
    # measured streams are in the dependencies already: nothing else may hold a node up
    on_device = node.type == NodeType.COMP and node.get("op_class", "memory") != "host"
    return COMPUTE if on_device and durations == "model" else HOST


def _length(node: Node, cluster: Cluster, durations: Durations) -> int:
    if durations == "measured":
        return node.duration_ns
    if node.type == NodeType.COMM_COLL:
        return collective_ns(CommType(node.get("comm_type")), int(node.get("comm_size", 0)), ranks_of(node), cluster)
    if node.is_comm:
        return message_ns(int(node.get("comm_size", 0)), int(node.get("comm_src")), int(node.get("comm_dst")), cluster)
    return duration_ns(node, cluster.device) if node.type == NodeType.COMP else 0


def _meet(
    program: Program, reached: Mapping[Flow, list[int]], expected: Mapping[Flow, tuple[int, ...]],
    nodes: Mapping[int, list[Node]], role_of: Mapping[int, int], durations: Durations,
) -> None:  # fmt: skip
    """Meetings of nodes that carry the same flow; a rank of the group that has a trace and never comes is missed."""
    for key, numbers in reached.items():
        here = {program.owner[number] for number in numbers}
        missing = [rank for rank in expected[key] if rank in nodes and role_of[rank] not in here]
        program.meet(numbers, key)
        if missing:
            program.parties[-1] += len(missing)
            program.missing[len(program.parties) - 1] = min(missing)
        if durations == "measured":
            shortest = min(program.duration_ns[number] for number in numbers)
            for number in numbers:
                program.duration_ns[number] = shortest


def flow_of(node: Node) -> Flow:
    """What the ends of one collective or message share."""
    if node.type == NodeType.COMM_COLL:
        return (f"group {node.get('pg_name')}",)
    return (f"message from {node.get('comm_src')} to {node.get('comm_dst')}", node.get("comm_tag"))


def ranks_of(node: Node) -> tuple[int, ...]:
    """The ranks that a communication concerns."""
    if node.type == NodeType.COMM_COLL:
        return tuple(node.get("comm_ranks") or ())
    return int(node.get("comm_src")), int(node.get("comm_dst"))


def _folded(flow: Flow, node: Node, role_of: Mapping[int, int]) -> Flow:
    """The flow in terms of roles: groups of the same roles are one."""
    ranks = [role_of[rank] for rank in ranks_of(node) if rank in role_of]
    if node.type == NodeType.COMM_COLL:
        return (*flow[:1], tuple(sorted(set(ranks)))) if len(set(ranks)) > 1 else (flow[0], *sorted(set(ranks)))
    return ("message", tuple(ranks), *flow[1:]) if len(ranks) == 2 else flow


def _roles(nodes: Mapping[int, list[Node]], cluster: Cluster) -> list[list[int]]:
    """Ranks that nothing tells apart, by colour refinement."""
    colours = {rank: hash(tuple(_alike(node, cluster) for node in each)) for rank, each in nodes.items()}
    talks = {rank: [ranks_of(node) for node in each if node.is_comm] for rank, each in nodes.items()}
    found = len(set(colours.values()))
    while True:
        colours = {
            rank: hash((colours[rank], *(tuple(sorted(colours.get(peer, 0) for peer in group)) for group in groups)))
            for rank, groups in talks.items()
        }
        if len(set(colours.values())) == found:
            break
        found = len(set(colours.values()))
    by_colour: dict[int, list[int]] = defaultdict(list)
    for rank in sorted(colours):
        by_colour[colours[rank]].append(rank)
    roles = list(by_colour.values())
    return roles if _foldable(roles, talks) else [[rank] for rank in sorted(nodes)]


def _foldable(roles: list[list[int]], talks: Mapping[int, list[tuple[int, ...]]]) -> bool:
    """Whether every group holds all or one of each role's ranks that it meets: else one rank cannot stand for them."""
    role_of = {rank: role for role, ranks in enumerate(roles) for rank in ranks}
    for ranks in roles:
        for group in talks[ranks[0]]:
            inside = [role_of.get(rank, -1) for rank in group]
            if len(set(inside)) > 1 and len(set(inside)) != len(inside):
                return False
    return True


def _alike(node: Node, cluster: Cluster) -> tuple[object, ...]:
    """What decides when a node runs and for how long, without the names of groups and ranks."""
    known = (node.id, node.type, tuple(node.data_deps), tuple(node.ctrl_deps))
    if not node.is_comm:
        gemm = node.get("gemm")
        return (
            *known, node.get("op_class"), node.get("tensor_size"), node.get("num_ops"), node.get("dtype"),
            tuple(gemm) if gemm else None,
        )  # fmt: skip
    spread = cluster.spread(ranks_of(node))
    return (*known, node.get("comm_type"), node.get("comm_size"), len(ranks_of(node)), *spread, node.get("comm_tag"))
