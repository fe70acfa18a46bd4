"""The closed-form step: corners where it must equal a formula, directions in which it must move, refusals."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meshloom.errors import HardwareError, PlanError
from meshloom.hardware.cluster import Cluster, load_cluster
from meshloom.hardware.curves import GemmCurve
from meshloom.plan import Plan
from meshloom.simulate.layer import layer
from meshloom.simulate.shape import Job, Shape
from meshloom.simulate.stack import STACKS, Stack
from meshloom.simulate.step import layers_by_stage, predict_step

GPT3 = Shape(num_layers=96, hidden_size=12288, intermediate_size=49152, num_heads=96, num_kv_heads=96, vocab_size=51200)
BARE = Stack(
    name="bare", hidden_bytes=0, ffn_bytes=0, head_bytes=0, logit_bytes=0, score_bytes=(0, 0), accumulate_bytes=0,
    optimizer_bytes=0, elementwise_kernels=(0, 0), vocab_multiple=8,
)  # fmt: skip


@pytest.fixture(scope="module")
def ideal() -> Cluster:
    """1024 devices that do nothing but multiply, at 1 PFLOP/s, and a network that costs nothing."""
    loaded = load_cluster("h100x1024")
    device = replace(
        loaded.device, flops_per_second={"bfloat16": 1e15}, memory_bytes_per_second=1e30, kernel_launch_ns=0,
        sustained=1.0, gemm=GemmCurve(), collectives={}, num_multiprocessors=1, memory_efficiency=1.0,
    )  # fmt: skip
    free = replace(loaded.inside_host, bytes_per_second=1e30, latency_ns=0, collectives={}, efficiency=1.0)
    return replace(loaded, device=device, inside_host=free, between_hosts=free)


def _job(cluster: Cluster, plan: Plan, batch: int = 64, shape: Shape = GPT3, stack: Stack = BARE) -> Job:
    return Job(shape=shape, plan=plan, cluster=cluster, stack=stack, seq_length=2048, global_batch=batch)


def test_parameters_of_gpt3() -> None:
    assert GPT3.num_parameters == pytest.approx(174.6e9, rel=2e-3)


def test_an_ideal_device_takes_the_flops_of_the_paper(ideal: Cluster) -> None:
    # Narayanan et al. 2021, equation 3, counts recomputation: 96 = 4 passes x 24; without it 72
    step = predict_step(_job(ideal, Plan(num_micro_batches=64)))
    h, s, v, n = 12288, 2048, 51200, 96
    flops = 72 * 64 * s * n * h**2 * (1 + s / (6 * h) + v / (12 * n * h))
    assert step.model_flops == pytest.approx(flops, rel=1e-12)
    assert step.step_s == pytest.approx(flops / 1e15, rel=1e-9)
    assert step.mfu == pytest.approx(1, rel=1e-9)
    full = predict_step(_job(ideal, Plan(num_micro_batches=64, recompute="full")))
    layers = 96 * 64 * s * n * h**2 * (1 + s / (6 * h))
    assert full.step_s == pytest.approx((layers + 6 * 64 * s * v * h) / 1e15, rel=1e-9)


@pytest.mark.parametrize(("pp", "micro_batches", "chunks"), [(2, 4, 1), (8, 64, 1), (8, 64, 3), (96, 96, 1)])
def test_the_bubble_of_1f1b(ideal: Cluster, pp: int, micro_batches: int, chunks: int) -> None:
    # without logits stages are equal, and the bubble is (p - 1) / (v·(m + (p - 1)/v)) of the step
    shape = replace(GPT3, vocab_size=0)
    schedule = "interleaved" if chunks > 1 else "1f1b"
    plan = Plan(pp=pp, num_micro_batches=micro_batches, virtual_stages=chunks, schedule=schedule)  # type: ignore[arg-type]
    step = predict_step(_job(ideal, plan, micro_batches, shape))
    idle = (pp - 1) / chunks
    assert step.bubble_s / step.step_s == pytest.approx(idle / (micro_batches + idle), rel=1e-5)


def test_the_stage_with_the_logits_sets_the_pace(ideal: Cluster) -> None:
    wide = replace(GPT3, vocab_size=512_000)
    step = predict_step(_job(ideal, Plan(pp=8, num_micro_batches=64), 64, wide))
    plain = predict_step(_job(ideal, Plan(pp=8, num_micro_batches=64), 64, replace(GPT3, vocab_size=0)))
    logits = 6 * 64 * 2048 * 512_000 * 12288 / 1e15
    assert step.compute_s == pytest.approx(plain.compute_s + logits, rel=1e-6)


def test_layers_are_dealt_by_cost_when_the_stack_does_so(ideal: Cluster) -> None:
    shape = Shape(
        num_layers=16, hidden_size=2048, intermediate_size=8192, num_heads=32, num_kv_heads=32, vocab_size=131072,
        gated=True,
    )  # fmt: skip
    job = _job(ideal, Plan(pp=4, num_micro_batches=4), 4, shape, replace(BARE, balanced_stages=True))
    assert layers_by_stage(job) == [6, 5, 5, 0], "the logits cost as much as four layers"
    assert layers_by_stage(replace(job, stack=BARE)) == [4, 4, 4, 4]


def test_the_parts_sum_to_the_step() -> None:
    cluster = load_cluster("a100x1024")
    for stack in STACKS.values():
        plan = Plan(tp=8, pp=8, dp=16, num_micro_batches=16, recompute="full")
        step = predict_step(_job(cluster, plan, 256, stack=stack))
        parts = (
            step.compute_s, step.tensor_s, step.host_s, step.bubble_s, step.message_s, step.gradient_s,
            step.optimizer_s,
        )  # fmt: skip
        assert sum(parts) == pytest.approx(step.step_s, rel=1e-9)
        assert min(parts) >= 0
        assert step.exposed_communication_s < step.step_s


@settings(max_examples=60, deadline=None)
@given(
    tp=st.sampled_from([1, 2, 4, 8]), pp=st.sampled_from([1, 2, 4, 8]), dp=st.sampled_from([1, 2, 8]),
    batches=st.sampled_from([8, 16, 32]), recompute=st.sampled_from(["none", "selective", "full"]),
    stack=st.sampled_from(sorted(STACKS)),
)  # fmt: skip
def test_worse_hardware_and_more_work_never_take_less(
    tp: int, pp: int, dp: int, batches: int, recompute: str, stack: str
) -> None:
    cluster = load_cluster("h100x1024")
    plan = Plan(tp=tp, pp=pp, dp=dp, num_micro_batches=batches, recompute=recompute)  # type: ignore[arg-type]
    job = _job(cluster, plan, batches * dp, stack=STACKS[stack])
    step = predict_step(job)
    slow = replace(cluster, between_hosts=replace(cluster.between_hosts, bytes_per_second=1e9))
    assert predict_step(replace(job, cluster=slow)).step_s >= step.step_s * (1 - 1e-12)
    weak = replace(cluster, device=replace(cluster.device, memory_bytes_per_second=1e12))
    assert predict_step(replace(job, cluster=weak)).step_s > step.step_s
    assert predict_step(replace(job, global_batch=2 * batches * dp)).step_s > step.step_s
    assert 0 < step.mfu < 1


def test_recomputing_costs_a_forward_pass_or_the_attention_core() -> None:
    cluster = load_cluster("a100x8")
    stack = STACKS["megatron-2022"]
    passes = {
        mode: layer(_job(cluster, Plan(tp=8, recompute=mode), 1, stack=stack))  # type: ignore[arg-type]
        for mode in ("none", "selective", "full")
    }
    assert passes["none"].recompute.device_s == 0
    assert passes["full"].recompute == passes["full"].forward
    assert 0 < passes["selective"].recompute.device_s < 0.2 * passes["full"].forward.device_s


def test_a_slow_host_sets_the_pace_of_a_small_model() -> None:
    small = Shape(
        num_layers=12, hidden_size=768, intermediate_size=3072, num_heads=12, num_kv_heads=12, vocab_size=50304
    )
    stack = replace(STACKS["fsdp"], kernel_ns=0)
    fast = predict_step(_job(load_cluster("h100x8"), Plan(), 1, small, stack))
    slow = predict_step(_job(load_cluster("h100x8"), Plan(), 1, small, replace(stack, kernel_ns=1_000_000)))
    assert fast.host_s == 0
    assert slow.host_s > 0.9 * slow.step_s
    assert "the host" in slow.limit
    assert slow.step_s >= 12 * 94 * 1e-3, "94 launches a layer of 1 ms"


@pytest.mark.parametrize(
    ("plan", "batch", "error", "told"),
    [
        (Plan(tp=5), 8, PlanError, "tp to divide 96 heads, got tp5"),
        (Plan(pp=128), 8, PlanError, "at most 96 stages"),
        (Plan(dp=3), 8, PlanError, "a global batch that dp3 × 1 micro-batches divide, got 8"),
        (Plan(dp=2048), 2048, HardwareError, "at least 2048 devices"),
        (Plan(cp=3), 8, PlanError, "cp to divide the sequence of 2048"),
    ],
)
def test_what_cannot_be_is_refused(ideal: Cluster, plan: Plan, batch: int, error: type[Exception], told: str) -> None:
    with pytest.raises(error, match=told):
        predict_step(_job(ideal, plan, batch))


def test_what_was_not_calibrated_is_said() -> None:
    cluster = load_cluster("h100x1024")
    assert predict_step(_job(cluster, Plan(tp=8), stack=STACKS["megatron-2022"])).warnings == ()
    odd = predict_step(_job(cluster, Plan(tp=16, cp=2, schedule="gpipe"), stack=STACKS["megatron-2022"])).warnings
    assert len(odd) == 3
    assert "leaves a host of 8" in " ".join(odd)


def test_what_lies_outside_of_what_was_measured_is_said() -> None:
    cluster = replace(load_cluster("h100x1024"), num_hosts=1 << 13)
    stack = STACKS["megatron-core"]

    def told(plan: Plan, shape: Shape = GPT3, seq_length: int = 2048) -> str:
        job = Job(
            shape=shape, plan=plan, cluster=cluster, stack=stack, seq_length=seq_length,
            global_batch=plan.dp * plan.num_micro_batches,
        )  # fmt: skip
        step = predict_step(job)
        assert 0 < step.mfu < 1
        return "; ".join(step.warnings)

    assert told(Plan(tp=8, pp=8, num_micro_batches=16)) == ""
    assert "pp96 is more than the 64 stages" in told(Plan(tp=8, pp=96, num_micro_batches=96))
    assert "65536 ranks are more than the 3072" in told(Plan(tp=8, pp=8, dp=1024, num_micro_batches=8))
    assert "sequence length 1048576" in told(Plan(tp=8, pp=8, num_micro_batches=8), seq_length=1 << 20)
    tiny = Shape(num_layers=2, hidden_size=128, intermediate_size=512, num_heads=4, num_kv_heads=4, vocab_size=300)
    assert "hidden size 128" in told(Plan(), tiny)
    assert "tp16 leaves a host of 8" in told(Plan(tp=16, num_micro_batches=4))
