"""Memory against the equations of Korthikanti et al. 2022 and against what must hold for any plan."""

from __future__ import annotations

from dataclasses import replace

import pytest

from meshloom.hardware.cluster import load_cluster
from meshloom.plan import Plan
from meshloom.simulate.memory import fits, layer_activation_bytes, predict_memory, stage_memory
from meshloom.simulate.shape import Job, Shape
from meshloom.simulate.stack import STACKS

S, B, H, A, T = 2048, 1, 12288, 96, 8
GPT3 = Shape(num_layers=96, hidden_size=H, intermediate_size=4 * H, num_heads=A, num_kv_heads=A, vocab_size=51200)


def _job(**plan: object) -> Job:
    made = Plan(tp=T, **plan)  # type: ignore[arg-type]
    return Job(
        shape=GPT3, plan=made, cluster=load_cluster("a100x1024"), stack=STACKS["megatron-2022"], seq_length=S,
        global_batch=made.num_micro_batches * made.dp,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("plan", "formula"),
    [
        ({}, S * B * H * (10 + 24 / T + 5 * A * S / (H * T))),  # equation 2
        ({"sequence_parallel": True}, S * B * H / T * (34 + 5 * A * S / H)),  # equation 4
        ({"sequence_parallel": True, "recompute": "selective"}, 34 * S * B * H / T),  # equation 6
        ({"recompute": "full"}, 2 * S * B * H),
    ],
)
def test_a_layer_keeps_what_the_paper_says(plan: dict[str, object], formula: float) -> None:
    assert layer_activation_bytes(_job(**plan)) == pytest.approx(formula, rel=1e-12)


def test_interleaving_keeps_more_in_flight() -> None:
    # section 4.2.3: (1 + (p - 1) / (p·m)) times as much
    plain = stage_memory(_job(pp=8, num_micro_batches=64), 0)
    chunks = stage_memory(_job(pp=8, num_micro_batches=64, virtual_stages=3, schedule="interleaved"), 0)
    assert chunks.activation_bytes == pytest.approx(plain.activation_bytes * (1 + 7 / 24), rel=1e-12)


def test_the_first_stage_keeps_most_activations_and_zero_shards_states() -> None:
    job = _job(pp=8, dp=4, num_micro_batches=64)
    kept = [stage_memory(job, stage).activation_bytes for stage in range(8)]
    assert kept == sorted(kept, reverse=True)
    stages = [stage_memory(replace(job, zero_stage=zero), 1) for zero in range(4)]
    assert stages[1].optimizer_bytes == stages[0].optimizer_bytes / 4
    assert stages[2].gradient_bytes == stages[0].gradient_bytes / 4
    assert stages[3].weight_bytes == stages[0].weight_bytes / 4
    assert predict_memory(job).reserved_bytes >= max(stage_memory(job, s).allocated_bytes for s in range(8))


def test_what_fits() -> None:
    assert not fits(_job())
    assert fits(_job(pp=8, num_micro_batches=8, sequence_parallel=True, recompute="selective"))
