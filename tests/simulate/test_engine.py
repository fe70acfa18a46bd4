"""The engine against closed forms, and its refusals."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from meshloom import Cluster, Node, Trace
from meshloom.chakra.trace import CommType, NodeType
from meshloom.errors import HardwareError, SimulationError
from meshloom.hardware.cluster import load_cluster
from meshloom.hardware.curves import GemmCurve
from meshloom.simulate.compute import duration_ns
from meshloom.simulate.engine import simulate
from meshloom.simulate.network import collective_ns, message_ns


@pytest.fixture
def cluster() -> Cluster:
    """One host whose numbers are easy: 1 TFLOP/s, 1 GB/s memory, 1 GB/s network, no overheads."""
    loaded = load_cluster("h100x8")
    device = replace(
        loaded.device, flops_per_second={"float32": 1e12}, memory_bytes_per_second=1e9, kernel_launch_ns=0,
        memory_efficiency=1.0, sustained=1.0, gemm=GemmCurve(), collectives={},
    )  # fmt: skip
    network = replace(loaded.inside_host, bytes_per_second=1e9, latency_ns=0, efficiency=1.0, collectives={})
    return replace(loaded, device=device, inside_host=network)


def _memory(number: int, num_bytes: int, data: list[int] | None = None, **more: Any) -> Node:
    attrs = {"op_class": "memory", "tensor_size": num_bytes, "num_ops": 1, "dtype": "float32"}
    return Node(id=number, name=f"op{number}", type=NodeType.COMP, data_deps=data or [], attrs=attrs, **more)


def _reduce(number: int, size: int, data: list[int] | None = None, ranks: tuple[int, ...] = (0, 1)) -> Node:
    attrs = {"comm_type": int(CommType.ALL_REDUCE), "comm_size": size, "pg_name": "1", "comm_ranks": list(ranks)}
    return Node(id=number, name="all_reduce", type=NodeType.COMM_COLL, data_deps=data or [], attrs=attrs)


def _world(*by_rank: list[Node]) -> dict[int, Trace]:
    return {
        rank: Trace(nodes=nodes, attrs={"rank": rank, "world_size": len(by_rank)}) for rank, nodes in enumerate(by_rank)
    }


def test_a_chain_takes_the_sum_and_a_device_does_one_op_at_a_time(cluster: Cluster) -> None:
    chain = [_memory(1, 1000), _memory(2, 2000, [1]), _memory(3, 3000, [2])]
    free = [_memory(1, 1000), _memory(2, 2000), _memory(3, 3000)]
    assert simulate(_world(chain), cluster).makespan_ns == 6000
    assert simulate(_world(free), cluster).makespan_ns == 6000


def test_communication_overlaps_what_does_not_need_it(cluster: Cluster) -> None:
    # two ranks, ring all-reduce of V bytes: 2 · (1/2) · V / bandwidth = V ns
    nodes = [_memory(1, 1000), _reduce(2, 4000, [1]), _memory(3, 3000, [1]), _memory(4, 500, [2])]
    timeline = simulate(_world(nodes, nodes), cluster)
    assert timeline.makespan_ns == 1000 + 4000 + 500
    for share in timeline.shares():
        assert share.compute_ns == 4500
        assert share.exposed_communication_ns == 1000
        assert share.idle_ns == 0
        assert share.communication_ns == 4000


def test_a_collective_waits_for_the_last_rank(cluster: Cluster) -> None:
    timeline = simulate(
        _world([_memory(1, 1000), _reduce(2, 100, [1])], [_memory(1, 9000), _reduce(2, 100, [1])]), cluster
    )
    assert timeline.makespan_ns == 9100
    assert [share.idle_ns for share in timeline.shares()] == [8000, 0]


def test_busy_and_idle_make_up_the_makespan_and_effects_follow_causes(cluster: Cluster, demo_run: Any) -> None:
    from meshloom.chakra.file import read_all

    traces = read_all(demo_run)
    timeline = simulate(traces, load_cluster("h100x8"))
    for share in timeline.shares():
        assert share.compute_ns + share.exposed_communication_ns + share.idle_ns == timeline.makespan_ns
    ends = {(span.rank, span.node): span.end_ns for span in timeline.spans}
    starts = {(span.rank, span.node): span.start_ns for span in timeline.spans}
    pairs = [
        (ends[rank, dependency], starts[rank, node.id])
        for rank, trace in traces.items()
        for node in trace.nodes
        for dependency in (*node.data_deps, *node.ctrl_deps)
        if (rank, node.id) in starts and (rank, dependency) in ends
    ]
    assert len(pairs) > 300
    assert all(end <= start for end, start in pairs)


def test_equal_inputs_give_equal_timelines(demo_run: Any) -> None:
    from meshloom.chakra.file import read_all

    assert simulate(read_all(demo_run), load_cluster("h100x8")) == simulate(read_all(demo_run), load_cluster("h100x8"))


def test_messages_meet(cluster: Cluster) -> None:
    attrs = {"comm_size": 700, "comm_src": 0, "comm_dst": 1, "comm_tag": 3}
    send = Node(id=2, name="send", type=NodeType.COMM_SEND, data_deps=[1], attrs=attrs)
    receive = Node(id=1, name="recv", type=NodeType.COMM_RECV, attrs=attrs)
    timeline = simulate(_world([_memory(1, 1000), send], [receive, _memory(2, 50, [1])]), cluster)
    assert timeline.makespan_ns == 1000 + 700 + 50


@pytest.mark.parametrize(
    ("comm_type", "share"),
    [
        (CommType.ALL_REDUCE, 2 * 3 / 4), (CommType.REDUCE_SCATTER, 3 / 4), (CommType.ALL_GATHER, 3.0),
        (CommType.ALL_TO_ALL, 3 / 4), (CommType.BROADCAST, 1.0), (CommType.BARRIER, 0.0),
    ],
)  # fmt: skip
def test_ring_closed_forms(cluster: Cluster, comm_type: CommType, share: float) -> None:
    assert collective_ns(comm_type, 8000, (0, 1, 2, 3), cluster) == 8000 * share
    assert collective_ns(comm_type, 8000, (2,), cluster) == 0


def test_the_slower_network_counts_between_hosts(cluster: Cluster) -> None:
    between = replace(cluster.between_hosts, bytes_per_second=1e8, latency_ns=7, efficiency=1.0)
    two = replace(cluster, num_hosts=2, between_hosts=between)
    assert message_ns(100, 0, 7, two) == 100
    assert message_ns(100, 7, 8, two) == 7 + 1000


def test_roofline_corners(cluster: Cluster) -> None:
    def node(flops: int, num_bytes: int) -> Node:
        attrs = {"op_class": "gemm", "num_ops": flops, "tensor_size": num_bytes, "dtype": "float32"}
        return Node(id=1, name="mm", type=NodeType.COMP, attrs=attrs)

    assert duration_ns(node(10**9, 1000), cluster.device) == 1_000_000, "bound by compute"
    assert duration_ns(node(1000, 10**6), cluster.device) == 1_000_000, "bound by memory"


def test_a_deadlock_names_the_ranks_and_the_op(cluster: Cluster) -> None:
    with pytest.raises(SimulationError, match=r"deadlock: rank 0 waits in all_reduce \(node 1, group 1\) for rank 1"):
        simulate(_world([_reduce(1, 8)], [_memory(1, 8)]), cluster)


def test_a_cycle_is_refused(cluster: Cluster) -> None:
    with pytest.raises(SimulationError, match="never ends"):
        simulate(_world([_memory(1, 8, [2]), _memory(2, 8, [1])]), cluster)


def test_a_cluster_that_is_too_small(cluster: Cluster) -> None:
    with pytest.raises(HardwareError, match=r"at least 9 devices for 9 ranks, it has 1 × 8 = 8"):
        simulate({8: Trace(nodes=[], attrs={"rank": 8, "world_size": 9})}, cluster)
