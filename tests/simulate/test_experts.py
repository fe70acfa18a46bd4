"""Mixtures of experts in closed form: parameters, FLOPs, time and memory."""

from __future__ import annotations

from dataclasses import replace

import pytest

from meshloom.hardware.cluster import load_cluster
from meshloom.plan import Plan
from meshloom.simulate.advise import advise
from meshloom.simulate.layer import kernels, layer
from meshloom.simulate.memory import layer_activation_bytes, predict_memory
from meshloom.simulate.shape import Experts, Job, Shape
from meshloom.simulate.stack import STACKS
from meshloom.simulate.step import predict_step

MIXTRAL = Shape(
    num_layers=32, hidden_size=4096, intermediate_size=14336, num_heads=32, num_kv_heads=8, vocab_size=32000,
    gated=True, tied=False, experts=Experts(count=8, per_token=2, width=14336),
)  # fmt: skip
QWEN = Shape(
    num_layers=24, hidden_size=2048, intermediate_size=5632, num_heads=16, num_kv_heads=16, vocab_size=151936,
    gated=True, tied=False, experts=Experts(count=60, per_token=4, width=1408, shared_width=5632),
)  # fmt: skip
CLUSTER = load_cluster("h100x1024")


def _job(shape: Shape, plan: str = "tp8.pp4", micro_batches: int = 8) -> Job:
    cut = replace(Plan.parse(plan), num_micro_batches=micro_batches)
    return Job(
        shape=shape, plan=cut, cluster=CLUSTER, stack=STACKS["megatron-core"], seq_length=4096,
        global_batch=cut.dp * micro_batches,
    )  # fmt: skip


def test_parameters_are_those_that_the_models_are_known_by() -> None:
    """Jiang et al. 2024: 47B, 13B active; Qwen1.5-MoE-A2.7B: 14.3B, 2.7B active."""
    assert MIXTRAL.num_parameters == pytest.approx(46.70e9, rel=1e-3)
    assert MIXTRAL.num_active_parameters == pytest.approx(12.88e9, rel=1e-3)
    assert QWEN.num_parameters == pytest.approx(14.316e9, rel=1e-3)
    assert QWEN.num_active_parameters == pytest.approx(2.689e9, rel=1e-3)


def test_flops_are_six_for_each_active_weight_and_the_scores() -> None:
    embeddings = MIXTRAL.vocab_size * MIXTRAL.hidden_size
    norms = 64 * MIXTRAL.hidden_size
    weights = MIXTRAL.num_active_parameters - 2 * embeddings - norms
    scores = 12 * 32 * 4096 * 4096
    assert MIXTRAL.model_flops(4096) == pytest.approx(4096 * (6 * (weights + embeddings) + scores), rel=1e-9)


def test_one_expert_for_all_tokens_is_the_plain_layer_but_for_routing() -> None:
    plain = replace(MIXTRAL, experts=None)
    alone = replace(MIXTRAL, experts=Experts(count=1, per_token=1, width=14336))
    dense, routed = (layer(_job(shape)) for shape in (plain, alone))
    assert 0 < routed.forward.device_s - dense.forward.device_s < 0.1 * dense.forward.device_s
    assert 0 < routed.backward.device_s - dense.backward.device_s < 0.1 * dense.backward.device_s
    assert alone.num_parameters - plain.num_parameters == 32 * 4096, "the router"


def test_more_experts_cost_memory_and_more_of_them_a_token_cost_time() -> None:
    job = _job(MIXTRAL)
    more = _job(replace(MIXTRAL, experts=Experts(count=16, per_token=2, width=14336)))
    wider = _job(replace(MIXTRAL, experts=Experts(count=8, per_token=4, width=14336)))
    states = predict_memory(more).static_bytes / predict_memory(job).static_bytes
    assert 1.8 < states < 2
    assert layer_activation_bytes(more) == layer_activation_bytes(job)
    assert layer_activation_bytes(wider) > 1.5 * layer_activation_bytes(job)
    times = [predict_step(each).compute_s for each in (job, more, wider)]
    assert times[0] < times[1] < 1.25 * times[0], "as many FLOPs, on fewer rows each"
    assert times[2] > 1.4 * times[0]


def test_layers_of_both_kinds_are_the_mean_of_both() -> None:
    mixed = replace(QWEN, experts=replace(QWEN.experts, num_dense_layers=6))
    dense, sparse, both = (layer(_job(shape)) for shape in (QWEN.alike(dense=True), QWEN, mixed))
    for name in ("forward", "backward"):
        one, other, mean = (getattr(each, name).device_s for each in (dense, sparse, both))
        assert mean == pytest.approx(0.25 * one + 0.75 * other)
    forward, _, backward = kernels(_job(mixed))
    assert sum(each.seconds for each in forward) == pytest.approx(both.forward.device_s)
    assert sum(each.seconds for each in backward) == pytest.approx(both.backward.device_s)
    parameters = [shape.num_parameters for shape in (QWEN.alike(dense=True), QWEN, mixed)]
    assert parameters[2] == pytest.approx(0.25 * parameters[0] + 0.75 * parameters[1])


def test_fewer_tokens_than_experts_wake_only_as_many() -> None:
    short = replace(_job(QWEN, "dp1", 1), seq_length=8)
    many = replace(short, shape=replace(QWEN, experts=Experts(count=6000, per_token=4, width=1408, shared_width=5632)))
    assert layer(many).forward.device_s < 1.2 * layer(short).forward.device_s


def test_advice_on_a_mixture_cuts_its_experts_and_says_that_it_was_never_measured() -> None:
    odd = replace(MIXTRAL, experts=Experts(count=8, per_token=2, width=14340))  # 4 divides it, 8 does not
    advice = advise(odd, replace(CLUSTER, num_hosts=8), global_batch=256, seq_length=4096)
    assert {choice.job.plan.tp for choice in advice.choices} <= {1, 2, 4}
    assert any("mixture of experts was never held against" in warning for warning in advice.choices[0].step.warnings)
    for choice in advice.choices:
        assert choice.step.step_s > 0
        assert choice.memory.reserved_bytes <= CLUSTER.device.memory_bytes
