"""The search: what it must find, what it must leave out, and what it says when nothing fits."""

from __future__ import annotations

from dataclasses import replace

import pytest

from meshloom.errors import PlanError
from meshloom.hardware.cluster import load_cluster
from meshloom.simulate.advise import advise, jobs
from meshloom.simulate.memory import predict_memory
from meshloom.simulate.shape import Shape
from meshloom.simulate.stack import STACKS

LLAMA_8B = Shape(
    num_layers=32, hidden_size=4096, intermediate_size=14336, num_heads=32, num_kv_heads=8, vocab_size=128256,
    gated=True, tied=False,
)  # fmt: skip


def test_the_best_fits_and_beats_every_other_that_fits() -> None:
    cluster = load_cluster("h100x8")
    advice = advise(LLAMA_8B, cluster, global_batch=32, seq_length=4096)
    every = list(
        jobs(LLAMA_8B, cluster, global_batch=32, seq_length=4096, dtype="bfloat16", stack=STACKS["megatron-core"])
    )
    room = cluster.device.memory_bytes
    assert advice.num_priced == len(every)
    assert advice.num_too_large == sum(predict_memory(job).reserved_bytes > room for job in every) > 0
    assert all(choice.memory.reserved_bytes <= room for choice in advice.choices)
    steps = [choice.step.step_s for choice in advice.choices]
    assert steps == sorted(steps)
    assert all(choice.job.plan.world_size == 8 for choice in advice.choices)


def test_nothing_beats_a_pareto_choice_in_time_and_memory() -> None:
    advice = advise(LLAMA_8B, load_cluster("h100x8"), global_batch=32, seq_length=4096)
    front = advice.pareto()
    assert 1 < len(front) < len(advice.choices)
    for choice in front:
        assert not any(
            other.step.step_s < choice.step.step_s and other.memory.reserved_bytes < choice.memory.reserved_bytes
            for other in advice.choices
        )


def test_less_memory_costs_time() -> None:
    cluster = load_cluster("h100x8")
    roomy, tight = (
        advise(LLAMA_8B, cluster, global_batch=32, seq_length=4096, memory_bytes=room).choices[0].step.step_s
        for room in (80e9, 30e9)
    )
    assert tight > roomy


def test_enough_plans_for_a_thousand_devices() -> None:
    wide = replace(LLAMA_8B, num_layers=96, hidden_size=12288, intermediate_size=49152, num_heads=96, num_kv_heads=96)
    assert advise(wide, load_cluster("h100x1024"), global_batch=1024, seq_length=2048).num_priced >= 500


def test_what_cannot_fit_is_told_with_a_size() -> None:
    with pytest.raises(PlanError, match=r"none of \d+ plans fits 1 GB a device, the smallest needs \d+ GB"):
        advise(LLAMA_8B, load_cluster("h100x8"), global_batch=32, seq_length=4096, memory_bytes=1e9)
    with pytest.raises(PlanError, match="expected a global batch that they divide"):
        advise(replace(LLAMA_8B, num_layers=7, num_heads=5, num_kv_heads=5), load_cluster("h100x8"), global_batch=3,
               seq_length=64)  # fmt: skip
