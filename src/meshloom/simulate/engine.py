"""Play the traces of all ranks against a cluster: a deterministic event heap, from traces to a `Timeline`. No torch.

Each rank computes one op at a time and communicates one message or collective at a time; the two overlap. A
collective starts when every rank of its group that has a trace has reached it. Ties are broken by rank, then by the
order in the file, so that equal inputs give equal timelines.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from heapq import heappop, heappush

from meshloom.chakra.timeline import Span, Timeline, Track
from meshloom.chakra.trace import CommType, Node, NodeType, Trace
from meshloom.errors import SimulationError
from meshloom.hardware.cluster import Cluster
from meshloom.simulate.compute import duration_ns
from meshloom.simulate.network import collective_ns, message_ns

_Meeting = tuple[object, ...]  # what the ends of one collective or message share


def simulate(traces: Mapping[int, Trace], cluster: Cluster) -> Timeline:
    """When each node would run on `cluster`, rank r on its device r.

    Raises HardwareError if the cluster is too small, SimulationError if the traces cannot run to their end.
    """
    cluster.check_fits(max(int(trace.get("world_size", 0)) or rank + 1 for rank, trace in traces.items()))
    return _Engine(traces, cluster).run()


class _Engine:
    """The state of one simulation."""

    def __init__(self, traces: Mapping[int, Trace], cluster: Cluster) -> None:
        self.cluster = cluster
        self.traces = traces
        self.nodes: dict[tuple[int, int], Node] = {}
        self.waiting: dict[tuple[int, int], int] = {}  # (rank, node) -> dependencies that have not ended
        self.needed_by: dict[tuple[int, int], list[int]] = defaultdict(list)
        self.meetings: dict[tuple[int, int], _Meeting] = {}
        self.parties: dict[_Meeting, set[int]] = defaultdict(set)
        self.arrived: dict[_Meeting, dict[int, tuple[int, int]]] = defaultdict(dict)  # rank -> (when, node)
        self.queue: dict[int, list[tuple[int, int]]] = defaultdict(list)  # rank -> ready compute (when, node)
        self.computing: set[int] = set()
        self.port_free_ns: dict[int, int] = defaultdict(int)
        self.events: list[tuple[int, int, int, int]] = []  # when, order, rank, node that ends
        self.order = 0
        self.spans: list[Span] = []
        for rank, trace in traces.items():
            self._load(rank, trace)

    def _load(self, rank: int, trace: Trace) -> None:
        counts: dict[_Meeting, int] = defaultdict(int)
        ids = {node.id for node in trace.nodes}
        for node in trace.nodes:
            key = rank, node.id
            self.nodes[key] = node
            dependencies = {*node.data_deps, *node.ctrl_deps} & ids
            self.waiting[key] = len(dependencies)
            for dependency in dependencies:
                self.needed_by[rank, dependency].append(node.id)
            if node.is_comm:
                flow: _Meeting = _flow(node)
                meeting = (*flow, counts[flow])
                counts[flow] += 1
                self.meetings[key] = meeting
                self.parties[meeting] |= {party for party in _ranks(node) if party in self.traces} | {rank}

    def run(self) -> Timeline:
        """Play to the end."""
        for (rank, node), count in list(self.waiting.items()):
            if not count:
                self._ready(0, rank, node)
        left, now = len(self.nodes), 0
        while self.events:
            now, _, rank, node = heappop(self.events)
            left -= 1
            if self.nodes[rank, node].type == NodeType.COMP and rank in self.computing and self._is_device(rank, node):
                self.computing.discard(rank)
            for successor in self.needed_by[rank, node]:
                self.waiting[rank, successor] -= 1
                if not self.waiting[rank, successor]:
                    self._ready(now, rank, successor)
            self._start_compute(now, rank)
        if left:
            raise SimulationError(self._deadlock())
        return Timeline(
            spans=self.spans,
            source="predicted",
            world_size=len(self.traces),
            makespan_ns=now,
            cluster=self.cluster.name,
        )

    def _is_device(self, rank: int, node: int) -> bool:
        return bool(self.nodes[rank, node].get("op_class", "memory") != "host")

    def _ready(self, now: int, rank: int, node_id: int) -> None:
        node = self.nodes[rank, node_id]
        if node.is_comm:
            self._arrive(now, rank, node)
        elif node.type == NodeType.COMP and self._is_device(rank, node_id):
            heappush(self.queue[rank], (now, node_id))
            self._start_compute(now, rank)
        else:
            self._end_at(now, rank, node_id)

    def _start_compute(self, now: int, rank: int) -> None:
        if rank in self.computing or not self.queue[rank]:
            return
        _, node_id = heappop(self.queue[rank])
        self.computing.add(rank)
        node = self.nodes[rank, node_id]
        length = duration_ns(node, self.cluster.device)
        self._span(rank, "compute", node, now, length)
        self._end_at(now + length, rank, node_id)

    def _arrive(self, now: int, rank: int, node: Node) -> None:
        meeting = self.meetings[rank, node.id]
        arrived = self.arrived[meeting]
        arrived[rank] = now, node.id
        if len(arrived) < len(self.parties[meeting]):
            return
        start = max([now, *(self.port_free_ns[party] for party in arrived)])
        length = self._length(node)
        for party, (_, node_id) in sorted(arrived.items()):
            self.port_free_ns[party] = start + length
            self._span(party, "communication", self.nodes[party, node_id], start, length)
            self._end_at(start + length, party, node_id)

    def _length(self, node: Node) -> int:
        size = int(node.get("comm_size", 0))
        if node.type == NodeType.COMM_COLL:
            return collective_ns(CommType(node.get("comm_type")), size, _ranks(node), self.cluster)
        return message_ns(size, int(node.get("comm_src")), int(node.get("comm_dst")), self.cluster)

    def _end_at(self, when: int, rank: int, node: int) -> None:
        self.order += 1
        heappush(self.events, (when, self.order, rank, node))

    def _span(self, rank: int, track: Track, node: Node, start_ns: int, length: int) -> None:
        phase, module = node.get("phase", ""), node.get("module", "")
        self.spans.append(Span(rank, track, node.name, start_ns, length, node.id, phase, module))

    def _deadlock(self) -> str:
        for meeting, arrived in self.arrived.items():
            missing = sorted(self.parties[meeting] - set(arrived))
            if missing:
                rank, (_, node) = next(iter(arrived.items()))
                return (
                    f"deadlock: rank {rank} waits in {self.nodes[rank, node].name} (node {node}, {meeting[0]}) for "
                    f"rank {missing[0]}, which never reaches it; run `meshloom check`"
                )
        rank, node = next(key for key, count in self.waiting.items() if count)
        return f"rank {rank}: node {node} waits for a node that never ends; run `meshloom check`"


def _flow(node: Node) -> _Meeting:
    if node.type == NodeType.COMM_COLL:
        return (f"group {node.get('pg_name')}",)
    return (f"message from {node.get('comm_src')} to {node.get('comm_dst')}", node.get("comm_tag"))


def _ranks(node: Node) -> tuple[int, ...]:
    if node.type == NodeType.COMM_COLL:
        return tuple(node.get("comm_ranks") or ())
    return int(node.get("comm_src")), int(node.get("comm_dst"))
