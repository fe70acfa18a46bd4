"""What a prediction tells: shares that sum to the step, a critical path that holds it up, memory, tokens, MFU."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meshloom import Cluster, Node, Trace
from meshloom.chakra.trace import CommType, NodeType
from meshloom.errors import UsageError
from meshloom.hardware.cluster import load_cluster
from meshloom.hardware.curves import GemmCurve
from meshloom.plan import Plan
from meshloom.simulate.imagined import predict_job
from meshloom.simulate.memory import stage_memory
from meshloom.simulate.outcome import path_ops, path_parts, predict, usage_of
from meshloom.simulate.shape import Job, Shape
from meshloom.simulate.stack import STACKS
from meshloom.simulate.step import predict_step

_LOADED = load_cluster("h100x8")
_DEVICE = replace(
    _LOADED.device, flops_per_second={"float32": 1e12}, memory_bytes_per_second=1e9, kernel_launch_ns=0,
    memory_efficiency=1.0, sustained=1.0, gemm=GemmCurve(), collectives={}, memory_bytes=10_000, num_multiprocessors=1,
)  # fmt: skip
_NETWORK = replace(_LOADED.inside_host, bytes_per_second=1e9, latency_ns=0, efficiency=1.0, collectives={})
EASY: Cluster = replace(_LOADED, device=_DEVICE, inside_host=_NETWORK)  # a byte a ns, both of memory and network


def _memory(number: int, num_bytes: int, data: list[int] | None = None, **more: Any) -> Node:
    attrs = {"op_class": "memory", "tensor_size": num_bytes, "num_ops": 1, "dtype": "float32", **more}
    return Node(id=number, name=f"op{number}", type=NodeType.COMP, data_deps=data or [], attrs=attrs)


def _reduce(number: int, size: int, data: list[int]) -> Node:
    attrs = {"comm_type": int(CommType.ALL_REDUCE), "comm_size": size, "pg_name": "1", "comm_ranks": [0, 1]}
    return Node(id=number, name="all_reduce", type=NodeType.COMM_COLL, data_deps=data, attrs=attrs)


def _message(number: int, size: int, data: list[int], *, sends: bool) -> Node:
    attrs = {"comm_src": 0, "comm_dst": 1, "comm_tag": 0, "comm_size": size}
    kind = NodeType.COMM_SEND if sends else NodeType.COMM_RECV
    return Node(id=number, name="send" if sends else "recv", type=kind, data_deps=data, attrs=attrs)


def _world(*by_rank: list[Node], **facts: Any) -> dict[int, Trace]:
    return {
        rank: Trace(nodes=nodes, attrs={"rank": rank, "world_size": len(by_rank), **facts})
        for rank, nodes in enumerate(by_rank)
    }


def test_the_path_leads_over_the_rank_that_came_last() -> None:
    fast = [_memory(1, 100), _reduce(2, 1000, [1]), _memory(3, 50, [2])]
    slow = [_memory(1, 400), _memory(2, 500, [1]), _reduce(3, 1000, [2]), _memory(4, 20, [3])]
    outcome = predict(_world(fast, slow), EASY)
    assert outcome.step_ns == 900 + 1000 + 50
    told = [(op.rank, op.node) for op in outcome.path]
    assert told in ([(1, 1), (1, 2), (0, 2), (0, 3)], [(1, 1), (1, 2), (1, 3), (0, 3)])
    assert path_parts(outcome.path) == {"compute": 950, "communication": 1000, "waiting": 0}
    assert path_ops(outcome.path)[0] == ("all_reduce", "communication", 1, 1000)
    assert [(rank.compute_ns, rank.exposed_communication_ns, rank.idle_ns) for rank in outcome.ranks] == [
        (150, 1000, 800), (920, 1000, 30),
    ]  # fmt: skip


def test_waiting_for_another_stage_is_a_bubble() -> None:
    first = [_memory(1, 700), _message(2, 100, [1], sends=True)]
    second = [_message(1, 100, [], sends=False), _memory(2, 300, [1])]
    outcome = predict(_world(first, second), EASY)
    assert outcome.step_ns == 1100
    assert [(rank.bubble_ns, rank.idle_ns) for rank in outcome.ranks] == [(300, 0), (700, 0)]
    for rank in outcome.ranks:
        assert rank.compute_ns + rank.exposed_communication_ns + rank.bubble_ns + rank.idle_ns == outcome.step_ns


def test_one_op_at_a_time_is_a_cause_too() -> None:
    """Nothing but the device makes these wait for one another: all of them are on the path."""
    outcome = predict(_world([_memory(1, 100), _memory(2, 200), _memory(3, 300)]), EASY)
    assert sum(op.duration_ns for op in outcome.path) == outcome.step_ns == 600


def test_memory_follows_what_ops_allocate_and_release() -> None:
    nodes = [
        _memory(1, 100, memory_allocated=4000),
        _memory(2, 100, [1], memory_allocated=5000, memory_released=4000),
        _memory(3, 100, [2], memory_released=5000),
    ]
    outcome = predict(_world(nodes, memory_held=2000), EASY)
    assert outcome.fullest is not None
    assert outcome.fullest.curve == [(0, 6000), (100, 11000), (200, 7000), (300, 2000)]
    assert (outcome.fullest.peak_bytes, outcome.fullest.peak_at_ns, outcome.capacity_bytes) == (11000, 100, 10_000)


def test_what_a_foreign_trace_lacks_is_said_and_not_made_up() -> None:
    outcome = predict(_world([_memory(1, 100)]), EASY)
    assert outcome.memory == []
    assert outcome.tokens_per_second is None
    assert outcome.mfu is None
    assert outcome.hfu is None
    assert [each.partition(":")[0] for each in outcome.unknown] == ["memory", "tokens/s", "MFU"]
    assert predict(_world([_memory(1, 100)]), EASY, num_tokens=5).tokens_per_second == pytest.approx(5e7)
    with pytest.raises(UsageError, match="--tokens 5: the traces are of a step of 7 tokens"):
        predict(_world([_memory(1, 100)], num_tokens=7), EASY, num_tokens=5)
    (missing,) = [
        each for each in predict({0: Trace(nodes=[_memory(1, 1)], attrs={"world_size": 4})}, EASY).unknown
        if "no trace" in each
    ]  # fmt: skip
    assert missing == "3 of 4 ranks have no trace: nothing waits for them"


def test_mfu_counts_the_forward_pass_three_times_and_recomputation_not() -> None:
    def product(number: int, phase: str, data: list[int]) -> Node:
        return _memory(number, 1, data, gemm=[1, 1000, 1000, 1000], op_class="gemm", phase=phase, num_ops=2 * 10**9)

    nodes = [
        product(1, "forward", []), product(2, "backward", [1]), product(3, "backward", [2]), product(4, "backward", [3])
    ]  # fmt: skip
    outcome = predict(_world(nodes, num_tokens=10), EASY)
    seconds = outcome.step_ns / 1e9
    assert outcome.hfu == pytest.approx(4 * 2e9 / seconds / 1e12)
    assert outcome.mfu == pytest.approx(3 * 2e9 / seconds / 1e12)


@given(
    ops=st.lists(
        st.tuples(st.integers(1, 50), st.booleans(), st.lists(st.integers(0, 5), max_size=2)), min_size=1, max_size=9
    )
)
@settings(max_examples=60, deadline=None)
def test_a_path_without_lags_has_no_holes(ops: list[tuple[int, bool, list[int]]]) -> None:
    """Whatever the graph: times are causal, the path's ops follow one another from 0 to the end, shares add up."""
    nodes = []
    for number, (size, talks, back) in enumerate(ops, 1):
        data = sorted({number - 1 - step for step in back if number - 1 - step >= 1})
        nodes.append(_reduce(number, size, data) if talks else _memory(number, size, data))
    other = [node if node.is_comm else _memory(node.id, 7, list(node.data_deps)) for node in nodes]
    outcome = predict(_world(nodes, other), EASY)
    assert path_parts(outcome.path)["waiting"] == 0
    assert sum(path_parts(outcome.path).values()) == outcome.step_ns
    for rank in outcome.ranks:
        parts = rank.compute_ns + rank.exposed_communication_ns + rank.bubble_ns + rank.idle_ns
        assert parts == outcome.step_ns
        assert min(rank) >= 0


GPT = Shape(num_layers=8, hidden_size=1024, intermediate_size=4096, num_heads=16, num_kv_heads=16, vocab_size=51200)


@pytest.mark.parametrize("recompute", ["none", "full"])
@pytest.mark.parametrize("virtual_stages", [1, 2])
def test_a_job_keeps_in_memory_what_the_closed_form_says(recompute: Any, virtual_stages: int) -> None:
    plan = Plan(
        tp=2, pp=4, num_micro_batches=8, recompute=recompute, virtual_stages=virtual_stages,
        schedule="interleaved" if virtual_stages > 1 else "1f1b",
    )  # fmt: skip
    job = Job(
        shape=GPT, plan=plan, cluster=_LOADED, stack=STACKS["megatron-core"], seq_length=1024, global_batch=8,
    )  # fmt: skip
    outcome = predict_job(job)
    for stage, usage in enumerate(outcome.memory):
        closed = stage_memory(job, stage)
        if virtual_stages == 1:
            assert usage.peak_bytes == pytest.approx(closed.allocated_bytes, rel=0.02)
        assert usage.curve[-1][1] == pytest.approx(usage.held_bytes, abs=10), "all is let go of"
    assert outcome.step_ns / 1e9 == pytest.approx(predict_step(job).step_s, rel=0.05)
    assert outcome.mfu == pytest.approx(predict_step(job).mfu, rel=0.05)
    for rank in outcome.ranks:
        parts = rank.compute_ns + rank.exposed_communication_ns + rank.bubble_ns + rank.idle_ns
        assert parts == outcome.step_ns
    assert sum(path_parts(outcome.path).values()) == outcome.step_ns


def test_a_curve_of_many_points_keeps_its_peak() -> None:
    changes = [(when, 10 if when % 2 else -9) for when in range(10_000)]
    usage = usage_of([0], 100_000, changes)
    assert len(usage.curve) <= 1502
    assert max(size for _, size in usage.curve) == usage.peak_bytes
