"""A synthesised generation: stamped equals captured, and ranks alike are alike."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import LlamaConfig

from meshloom.chakra.check import check
from meshloom.chakra.trace import Node
from meshloom.model.config import load_config
from meshloom.plan import Plan
from meshloom.synth.inference import Inference, synthesise_inference
from meshloom.synth.parts import NotAlike
from meshloom.synth.repeat import even, prove, repeated
from tests.synth.steps import config


def _config(family: str) -> Any:
    if family == "gpt2":
        return load_config("gpt2-tiny")
    return LlamaConfig(
        vocab_size=101, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, hidden_size=32,
        intermediate_size=48,
    )  # fmt: skip


def _step(family: str, plan: str, num_output_tokens: int, batch_size: int = 1) -> Inference:
    return Inference(
        config=_config(family), plan=Plan.parse(plan), batch_size=batch_size, num_input_tokens=10,
        num_output_tokens=num_output_tokens,
    )  # fmt: skip


@pytest.mark.parametrize(("family", "plan"), [("gpt2", "dp1"), ("llama", "tp2"), ("gpt2", "tp2.pp2"), ("llama", "pp2")])
@pytest.mark.parametrize("batch_size", [1, 2])
def test_stamped_steps_are_those_that_would_be_captured(family: str, plan: str, batch_size: int) -> None:
    found = synthesise_inference(_step(family, plan, 9, batch_size))
    assert found.notes == ()
    stamped = dict(found.traces())
    captured = dict(synthesise_inference(_step(family, plan, 9, batch_size), stamped=False).traces())
    assert check(stamped) == []
    assert stamped.keys() == captured.keys()
    for rank, trace in stamped.items():
        assert trace.nodes == captured[rank].nodes
        assert trace.attrs == captured[rank].attrs
        assert trace.get("memory_peak") > trace.get("memory_held") > 0


def test_attention_reads_one_token_more_in_each_step() -> None:
    def flops(num_output_tokens: int) -> int:
        return synthesise_inference(_step("gpt2", "dp1", num_output_tokens)).roles[0].num_flops

    made = _config("gpt2")
    width, layers = made.n_embd, made.n_layer
    # 2·2·width for each layer and token read, by scores and values
    assert (flops(9) - flops(8)) - (flops(8) - flops(7)) == 4 * width * layers


def test_even_growth_is_found_and_anything_else_refused() -> None:
    grown = even("[[1,4,11,8]]", "[[1,4,12,8]]")
    assert grown is not None
    assert grown.at(5) == "[[1,4,16,8]]"
    assert even([3, "a"], [3, "a"]) is None
    for one, other in (("ab", "ac"), ([1], [1, 2]), (1.5, 2.5)):
        with pytest.raises(NotAlike):
            even(one, other)

    def step(begin: int, size: int, name: str = "op") -> list[Node]:
        return [Node(id=begin, name=name, type=4, data_deps=[1], attrs={"num_ops": size})]  # type: ignore[arg-type]

    lines = repeated(step(2, 10), step(3, 12))
    prove(lines, step(5, 16), place=3, k=3)
    for wrong in (step(5, 17), step(6, 16), step(5, 16, "other"), []):
        with pytest.raises(NotAlike):
            prove(lines, wrong, place=3, k=3)


@pytest.mark.parametrize(
    ("family", "plan", "layers"),
    [("llama", "tp2", 8), ("gpt2", "dp1", 7), ("llama", "pp2", 13), ("gpt2", "tp2.pp2", 14), ("qwen3", "tp2", 6)],
)
def test_stamped_layers_are_those_that_would_be_captured(family: str, plan: str, layers: int) -> None:
    made = config(family, layers, head_dim=8, num_key_value_heads=2) if family == "qwen3" else config(family, layers)
    step = Inference(config=made, plan=Plan.parse(plan), batch_size=2, num_input_tokens=10, num_output_tokens=9)
    found, whole = synthesise_inference(step), synthesise_inference(step, stamped=False)
    assert found.notes == ()
    for mine, theirs in zip(found.roles, whole.roles, strict=True):
        assert len(mine.nodes) < mine.num_nodes == len(theirs.nodes)
        assert (mine.num_flops, mine.peak_bytes) == (theirs.num_flops, theirs.peak_bytes)
    stamped, captured = dict(found.traces()), dict(whole.traces())
    assert stamped.keys() == captured.keys()
    for rank, trace in stamped.items():
        assert list(trace.nodes) == list(captured[rank].nodes)
        assert trace.attrs == captured[rank].attrs


def test_layers_that_are_not_alike_are_captured_and_said() -> None:
    sizes = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2, "num_key_value_heads": 2}
    step = Inference(
        config=config("qwen2", 6, **sizes), plan=Plan.parse("tp2"), batch_size=1, num_input_tokens=4,
        num_output_tokens=2,
    )  # fmt: skip
    (told, *_) = synthesise_inference(step).notes
    assert "every layer is captured by itself: its config's layer_types differs" in told
