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

    config = _config("gpt2")
    width, layers = config.n_embd, config.n_layer
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
