"""What is stamped out and shared equals what is captured part by part and rank by rank; closed forms hold."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from meshloom.chakra.check import check
from meshloom.chakra.trace import NodeType
from meshloom.chakra.wire import StoredNodes, whole_frames
from meshloom.errors import PlanError
from meshloom.plan import Plan
from meshloom.synth.parts import Part, enough_micro_batches, parts_of
from meshloom.synth.roles import Roles, find_roles
from tests.synth.steps import config, step

STEPS: dict[str, tuple[str, str, int, dict[str, Any]]] = {
    "gpt2 alone": ("gpt2", "dp1", 7, {}),
    "gpt2, gradients averaged in the last backward": ("gpt2", "dp2", 7, {}),
    "gpt2, uneven vocabulary": ("gpt2", "tp2", 6, {"layers": 2}),
    "llama": ("llama", "tp2.dp2", 7, {"layers": 2}),
    "gpt2, all three axes, few places for many, uneven stages": ("gpt2", "tp2.pp5.dp3", 8, {"layers": 6}),
    "llama interleaved": ("llama", "pp4", 8, {"layers": 8, "schedule": "interleaved", "virtual_stages": 2}),
    "llama, sequence parallel": ("llama", "tp2.sp.pp4", 6, {"layers": 5}),
    "bert, zero bubble": ("bert", "pp4.dp2", 7, {"layers": 5, "schedule": "zero-bubble"}),
    "gpt2, gpipe, recomputed": ("gpt2", "pp2", 6, {"schedule": "gpipe", "recompute": "full"}),
    "gpt2 in bf16, unfused": ("gpt2", "pp2", 6, {"precision": "bf16", "fused": False}),
}


@pytest.mark.parametrize("name", STEPS)
def test_stamped_equals_captured(name: str) -> None:
    kind, plan, count, more = STEPS[name]
    wanted = step(kind, plan, count, **more)
    stamped, whole = find_roles(wanted), find_roles(wanted, stamped=False)
    assert stamped.notes == ()
    traces, expected = dict(stamped.traces()), dict(whole.traces())
    assert sorted(traces) == sorted(expected) == list(range(wanted.plan.world_size))
    for rank, trace in traces.items():
        assert list(trace.nodes) == list(expected[rank].nodes)
        assert trace.attrs == expected[rank].attrs
    assert check(traces) == []


def test_ranks_of_a_role_run_the_same() -> None:
    """Each rank captured for itself is what its role says: tp position and replica change groups and peers only."""
    from meshloom.synth import roles as room

    wanted = step("gpt2", "tp2.pp2.dp2", 2, layers=2)
    traces = dict(find_roles(wanted).traces())
    plan = wanted.plan
    from meshloom.model.build import build_model, example_batch
    from meshloom.parallel.apply import find_cut

    model = build_model(wanted.config, "causal", seed=0, device="meta")
    cut = find_cut(model, plan, example_batch("causal", micro_batch=1, seq_length=8, device="meta"))
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    given = room._Given(cut=cut, flow=None, shapes=shapes)
    for pp in range(2):
        for tp in range(2):
            told = room._one_rank(wanted, wanted.config, plan, pp, tp, given)
            rank = plan.rank(pp=pp, tp=tp)
            nodes = list(StoredNodes(told.nodes, whole_frames(told.nodes)))
            assert nodes == list(traces[rank].nodes)
            assert told.held_bytes + 2 * told.batch_bytes == traces[rank].get("memory_held")


def test_cost_grows_with_roles_not_with_ranks() -> None:
    few, many = (find_roles(step("gpt2", f"pp4.dp{dp}", 6, layers=4)) for dp in (2, 64))
    assert len(few.roles) == len(many.roles) == 4
    for one, other in zip(few.roles, many.roles):
        assert one.step.plan == other.step.plan  # what was captured is the same
        assert one.num_nodes == other.num_nodes
    assert sorted(rank for role in many.roles for rank in role.ranks) == list(range(256))


def test_what_is_not_proven_to_repeat_is_captured_and_said() -> None:
    sizes = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2, "num_key_value_heads": 2}
    told = find_roles(step("qwen2", "pp4", 4, config=config("qwen2", 4, **sizes))).notes
    assert len(told) == 1
    assert "layer_types" in told[0]


def test_parts_follow_the_schedule() -> None:
    plan = replace(Plan.parse("pp2"), num_micro_batches=2)
    assert [str(part) for part in parts_of(plan, 1)] == [
        "start", "forward of micro-batch 0", "backward of micro-batch 0", "forward of micro-batch 1",
        "backward of micro-batch 1", "reduce", "loss", "optimizer",
    ]  # fmt: skip
    assert Part("weight", 0, 1).phase == "backward"
    assert enough_micro_batches(replace(Plan.parse("dp2"), num_micro_batches=100)) == 5


def flops(roles: Roles) -> int:
    """Of products and attention, on all ranks."""
    return sum(role.num_flops * len(role.ranks) for role in roles.roles)


@pytest.mark.parametrize("plan", ["dp2", "tp2", "tp2.pp2"])
def test_flops_of_gpt2_are_the_closed_form(plan: str) -> None:
    """Narayanan et al. 2021, appendix, without recompute: 72·B·s·l·h²·(1 + s/6h + V/12lh)."""
    made = config("gpt2", 4, width=128, vocabulary=1000)
    wanted = step("gpt2", plan, 2, config=made, seq_length=64)
    sequences = 2 * 2 * wanted.plan.dp
    layers, width, length = 4, 128, 64
    expected = 72 * sequences * length * layers * width**2 * (1 + length / (6 * width) + 1000 / (12 * layers * width))
    assert flops(find_roles(wanted)) == pytest.approx(expected, rel=0.005)


def test_flops_of_llama_are_the_closed_form() -> None:
    """6 FLOPs a token and weight of a product, and attention's seven products of 2·s²·h a sequence and layer."""
    made = config("llama", 2, width=64)
    wanted = step("llama", "tp2", 1, config=made)
    width, tokens = 64, 2 * 16
    weights = 2 * (2 * width**2 + 2 * width * width // 2 + 3 * width * 2 * width) + 101 * width
    expected = 6 * tokens * weights + 2 * 2 * 7 * 2 * 16**2 * width
    assert flops(find_roles(wanted)) == pytest.approx(expected, rel=0.005)


def test_memory_of_a_trace_adds_up() -> None:
    """What is allocated in a step and not released are the weights' gradients, if they were kept; nothing is."""
    for role in find_roles(step("gpt2", "tp2.pp2", 4)).roles:
        image = role.image()
        trace = role.trace(role.ranks[0], image)
        live = most = 0
        for node in trace.nodes:
            live += node.get("memory_allocated", 0)
            most = max(most, live)
            live -= node.get("memory_released", 0)
            assert live >= 0
        assert trace.get("memory_peak") == trace.get("memory_held") + most
        assert live <= 64  # the step's result: the loss and the norm of the gradients


def test_recompute_keeps_less() -> None:
    peaks = {}
    for mode in ("none", "selective", "full"):
        role = find_roles(step("gpt2", "dp1", 1, layers=8, seq_length=64, recompute=mode)).roles[0]
        image = role.image()
        peaks[mode] = image.peak_bytes
    assert peaks["full"] < peaks["selective"] < peaks["none"]


def test_messages_are_matched_and_name_the_stage() -> None:
    traces = dict(find_roles(step("gpt2", "pp5", 6, layers=5)).traces())
    sends = [node for trace in traces.values() for node in trace.nodes if node.type is NodeType.COMM_SEND]
    assert {(node.get("comm_src"), node.get("comm_dst")) for node in sends} == {
        (rank, rank + step) for rank in range(5) for step in (1, -1) if 0 <= rank + step < 5
    }
    assert len(sends) == 2 * 4 * 6


def test_a_plan_that_does_not_fit_is_told_with_its_own_name() -> None:
    with pytest.raises(PlanError, match=r"plan pp8: expected at least 8 layers"):
        find_roles(step("gpt2", "pp8", 8, layers=4))
    with pytest.raises(PlanError, match=r"plan tp8\.pp4: .* 4 heads"):
        find_roles(step("gpt2", "tp8.pp4", 8, layers=4))
