"""Steps of models of real size: what they compute in all is the closed form."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from transformers import AutoConfig

from meshloom.model.config import load_config
from meshloom.plan import Plan
from meshloom.synth.roles import Step, find_roles

SEQUENCES, LENGTH = 1536, 2048


def _flops(config: Any) -> int:
    plan = replace(Plan.parse("tp8.pp16.dp8"), num_micro_batches=SEQUENCES // 8)
    found = find_roles(Step(config=config, objective="causal", plan=plan, micro_batch=1, seq_length=LENGTH))
    assert found.notes == ()
    return sum(role.num_flops * len(role.ranks) for role in found.roles)


def test_flops_of_gpt3_175b_are_the_closed_form() -> None:
    """Narayanan et al. 2021, appendix, without recompute: 72·B·s·l·h²·(1 + s/6h + V/12lh)."""
    layers, width, vocabulary = 96, 12288, 51200
    config = AutoConfig.for_model(
        "gpt2", n_embd=width, n_layer=layers, n_head=96, n_positions=LENGTH, vocab_size=vocabulary
    )
    scores = 1 + LENGTH / (6 * width) + vocabulary / (12 * layers * width)
    expected = 72 * SEQUENCES * LENGTH * layers * width**2 * scores
    assert _flops(config) == pytest.approx(expected, rel=0.005)


def test_flops_of_llama_3_70b_are_the_closed_form() -> None:
    """6 FLOPs a token and weight of a product, and attention's seven products of 2·s²·h a sequence and layer."""
    config = load_config("llama-3-70b")
    width, inner, layers = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    keys = width // config.num_attention_heads * config.num_key_value_heads
    weights = layers * (2 * width**2 + 2 * width * keys + 3 * width * inner) + width * config.vocab_size
    expected = 6 * SEQUENCES * LENGTH * weights + layers * SEQUENCES * 7 * 2 * LENGTH**2 * width
    assert _flops(config) == pytest.approx(expected, rel=0.005)
