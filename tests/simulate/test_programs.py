"""Folding, imagined steps and measured twins: each against what it must equal."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import msgspec
import pytest

from meshloom.capture.convert import convert_rank
from meshloom.chakra.clocks import offsets_ns
from meshloom.chakra.file import read_all
from meshloom.chakra.trace import Node, NodeType, Trace
from meshloom.errors import SimulationError, UsageError
from meshloom.hardware.cluster import load_cluster
from meshloom.hardware.device import load_device
from meshloom.plan import Plan
from meshloom.simulate.change import Change
from meshloom.simulate.engine import play, simulate
from meshloom.simulate.imagined import imagine, simulate_job
from meshloom.simulate.program import program_of
from meshloom.simulate.shape import Job, Shape
from meshloom.simulate.stack import STACKS
from meshloom.simulate.step import predict_step

GPT3 = Shape(num_layers=96, hidden_size=12288, intermediate_size=49152, num_heads=96, num_kv_heads=96, vocab_size=51200)


def _job(plan: Plan, batch: int, stack: str = "megatron-2022") -> Job:
    return Job(
        shape=GPT3, plan=plan, cluster=replace(load_cluster("a100x1024"), num_hosts=2048), stack=STACKS[stack],
        seq_length=2048, global_batch=batch,
    )  # fmt: skip


def _world(size: int, slow: int = -1) -> dict[int, Trace]:
    """Ranks that compute, reduce in pairs, reduce all; `slow` has more to compute."""
    traces = {}
    for rank in range(size):
        pair = (rank, rank + 1) if rank % 2 == 0 else (rank - 1, rank)
        work = {"op_class": "memory", "tensor_size": 10**9 * (1 + (rank == slow)), "num_ops": 1, "dtype": "float32"}
        nodes = [Node(id=1, name="work", type=NodeType.COMP, attrs=work)]
        for number, ranks in ((2, pair), (3, tuple(range(size)))):
            attrs = {
                "comm_type": 0,
                "comm_size": 10**8,
                "pg_name": str(number * 1000 + ranks[0]),
                "comm_ranks": list(ranks),
            }
            nodes.append(Node(id=number, name="reduce", type=NodeType.COMM_COLL, data_deps=[number - 1], attrs=attrs))
        traces[rank] = Trace(nodes=nodes, attrs={"rank": rank, "world_size": size})
    return traces


@pytest.mark.parametrize("slow", [-1, 0, 5])
def test_folding_changes_no_time(slow: int) -> None:
    cluster = load_cluster("h100x1024")
    folded, plain = (simulate(_world(16, slow), cluster, fold=fold) for fold in (True, False))
    key = lambda span: (span.rank, span.node)  # noqa: E731
    assert sorted(folded.spans, key=key) == sorted(plain.spans, key=key)
    assert folded.makespan_ns == plain.makespan_ns


def test_equal_ranks_are_one_role_and_an_odd_one_is_not_lost() -> None:
    cluster = load_cluster("h100x1024")
    assert len(program_of(_world(64), cluster).roles) == 1
    roles = program_of(_world(64, slow=5), cluster).roles
    assert [rank for ranks in roles for rank in ranks if rank == 5] == [5]
    assert sorted(rank for ranks in roles for rank in ranks) == list(range(64))


def test_a_recorded_run_is_the_same_folded_or_not(demo_run: Path) -> None:
    traces, cluster = read_all(demo_run), load_cluster("h100x8")
    assert simulate(traces, cluster) == simulate(traces, cluster, fold=False)


@pytest.mark.parametrize(
    ("plan", "batch"),
    [
        (Plan(tp=8, pp=8, dp=2, num_micro_batches=32, recompute="full"), 64),
        (Plan(tp=8, pp=16, num_micro_batches=64), 64),
        (Plan(tp=8, pp=8, num_micro_batches=32, virtual_stages=3, schedule="interleaved"), 32),
        (Plan(tp=4, dp=4, num_micro_batches=2), 8),
    ],
)
def test_events_and_closed_form_agree(plan: Plan, batch: int) -> None:
    job = _job(plan, batch)
    timeline = simulate_job(job)
    assert timeline.makespan_ns / 1e9 == pytest.approx(predict_step(job).step_s, rel=0.02)
    for share in timeline.shares():
        assert share.compute_ns + share.exposed_communication_ns + share.idle_ns == timeline.makespan_ns
    assert timeline.ranks() == [plan.rank(pp=stage) for stage in range(plan.pp)]


def test_cost_follows_stages_and_not_ranks() -> None:
    few = imagine(_job(Plan(tp=8, pp=8, dp=1, num_micro_batches=8), 8))
    many = imagine(_job(Plan(tp=8, pp=8, dp=256, num_micro_batches=8), 8 * 256))
    assert len(few.owner) == len(many.owner)


def test_zero_bubble_is_shorter_than_1f1b() -> None:
    plain, without = (
        max(play(imagine(_job(Plan(tp=8, pp=8, num_micro_batches=8, schedule=schedule), 8)))[1])  # type: ignore[arg-type]
        for schedule in ("1f1b", "zero-bubble")
    )
    assert without < plain


def _recorded(starts: list[tuple[int, int]], shift: int, rank: int) -> Trace:
    """An op, a collective, an op, with their times; the second rank's clock is `shift` late."""
    nodes = []
    for number, (start, length) in enumerate(starts, 1):
        times = {"start_ns": start + shift, "duration_ns": length}
        needs = [number - 1] if number > 1 else []
        if number == 2:
            attrs = {"comm_type": 0, "comm_size": 8, "pg_name": "1", "comm_ranks": [0, 1]}
            nodes.append(Node(id=2, name="reduce", type=NodeType.COMM_COLL, data_deps=needs, attrs=attrs, **times))
        else:
            nodes.append(
                Node(id=number, name="op", type=NodeType.COMP, data_deps=needs, attrs={"tensor_size": 8}, **times)
            )
    return Trace(nodes=nodes, attrs={"rank": rank, "world_size": 2})


def _span_ns(nodes: dict[int, list[Node]]) -> int:
    """How long the recorded step took on all ranks together, on one clock."""
    shift = offsets_ns(nodes)
    timed = [(node.start_ns + shift[rank], node.duration_ns) for rank, each in nodes.items() for node in each]
    return max(start + length for start, length in timed) - min(start for start, _ in timed)


def test_a_measured_twin_puts_clocks_together_and_keeps_gaps() -> None:
    # rank 0 waits 60 in the collective, whose bytes take 40; both pause 5 before their last op
    traces = {
        0: _recorded([(0, 100), (100, 100), (205, 50)], 0, 0),
        1: _recorded([(0, 160), (160, 40), (205, 70)], 7000, 1),
    }
    nodes = {rank: list(trace.nodes) for rank, trace in traces.items()}
    assert offsets_ns(nodes) == {0: 0, 1: -7000}
    assert _span_ns(nodes) == 275
    timeline = simulate(traces, load_cluster("h100x8"), durations="measured")
    assert timeline.makespan_ns == 275
    reduces = [span for span in timeline.spans if span.name == "reduce"]
    assert [(span.start_ns, span.duration_ns) for span in reduces] == [(160, 40), (160, 40)]


def test_a_twin_needs_measured_times() -> None:
    with pytest.raises(SimulationError, match="expected traces with durations"):
        simulate(_world(2), load_cluster("h100x8"), durations="measured")


def test_the_twin_of_a_run_on_this_machine_takes_as_long_as_it_did(demo_run: Path) -> None:
    traces = read_all(demo_run)
    measured = _span_ns({rank: list(trace.nodes) for rank, trace in traces.items()})
    predicted = simulate(traces, load_cluster("h100x8"), durations="measured").makespan_ns
    assert predicted == pytest.approx(measured, rel=0.02)
    assert predicted > 0.98 * max(trace.get("step_duration_ns") for trace in traces.values())


@pytest.mark.shared
def test_the_twin_of_eight_a100s_takes_as_long_as_they_did(shared: Path, tmp_path: Path) -> None:
    pairs = shared / "traces" / "megatron_gpt8b_tp8_8xA100"
    for rank in range(8):
        host, device = (pairs / f"{kind}_{rank}.json.gz" for kind in ("host", "device"))
        convert_rank(host, device, tmp_path / f"rank{rank}.et", rank=rank)
    traces = read_all(tmp_path)
    measured = _span_ns({rank: list(trace.nodes) for rank, trace in traces.items()})
    predicted = simulate(traces, load_cluster("a100x8"), durations="measured").makespan_ns
    assert predicted == pytest.approx(measured, rel=0.02)


def test_what_if() -> None:
    cluster = load_cluster("h100x1024")
    world = {
        rank: Trace(nodes=[_tagged(node) for node in trace.nodes], attrs=trace.attrs)
        for rank, trace in _world(16).items()
    }
    before = simulate(world, cluster).makespan_ns
    compute = simulate(world, cluster, wanted=Change(without=frozenset({"dp"}))).makespan_ns
    assert compute < before
    twice = simulate(world, cluster, wanted=Change(network=2.0)).makespan_ns
    assert twice == pytest.approx(compute + (before - compute) / 2, abs=4)
    faster = simulate(world, cluster, wanted=Change(compute=2.0)).makespan_ns
    assert faster == pytest.approx(before - compute / 2, abs=4)
    h200 = Change(device=cluster.device, instead=load_device("h200"))
    assert simulate(world, cluster, wanted=h200).makespan_ns < before
    with pytest.raises(UsageError, match=r"expected an axis that the traces communicate along \(dp\), got tp"):
        simulate(world, cluster, wanted=Change(without=frozenset({"tp"})))


def _tagged(node: Node) -> Node:
    return msgspec.structs.replace(node, attrs={**node.attrs, "comm_axis": "dp"}) if node.is_comm else node
