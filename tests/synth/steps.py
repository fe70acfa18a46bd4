"""Small models and steps that the tests of synthesis share."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from transformers import AutoConfig

from meshloom.model.config import objective_of
from meshloom.plan import Plan
from meshloom.synth.roles import Step

TOKENS = {"bos_token_id": 0, "eos_token_id": 0}


def config(kind: str, layers: int = 4, width: int = 32, vocabulary: int = 101, **more: Any) -> Any:
    """A model of `width` features, 4 heads and a vocabulary that 2 does not divide."""
    if kind == "gpt2":
        return AutoConfig.for_model(
            "gpt2", n_embd=width, n_layer=layers, n_head=4, vocab_size=vocabulary, n_positions=64, **TOKENS
        )
    sizes = {
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "intermediate_size": 2 * width,
        "vocab_size": vocabulary,
        "max_position_embeddings": 64,
    }
    if kind == "llama":
        more = {"num_key_value_heads": 2} | more
    return AutoConfig.for_model(kind, **sizes, **({} if kind == "bert" else TOKENS), **more)


def step(kind: str, plan: str, micro_batches: int, layers: int = 4, **more: Any) -> Step:
    """A step of two sequences of 16 tokens a micro-batch; `more` may hold fields of Plan and of Step."""
    names = ("schedule", "virtual_stages", "recompute")
    cut = replace(
        Plan.parse(plan), num_micro_batches=micro_batches, **{name: more.pop(name) for name in names if name in more}
    )
    made = more.pop("config", None) or config(kind, layers)
    sizes = {"micro_batch": 2, "seq_length": 16} | more
    return Step(config=made, objective=objective_of(made), plan=cut, **sizes)
