"""What each rank of the tests of generation does: every model and way of choosing, in one start of the processes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig

from meshloom.generate import engine
from meshloom.generate.engine import generate
from meshloom.generate.sample import Sampling
from meshloom.model import tape
from meshloom.model.layout import lay_out_for_one_row
from meshloom.model.tape import Replay
from meshloom.model.weights import build_part
from meshloom.parallel.candidates import most_likely
from meshloom.parallel.launch import rank_context
from meshloom.parallel.mesh import Mesh, make_mesh
from meshloom.parallel.vocab import CutLogits
from meshloom.plan import Plan

NEW = 64
PROMPTS = [[5, 17, 42, 8, 77, 3, 60], [9, 4, 31]]
_SMALL: dict[str, Any] = {
    "vocab_size": 101, "initializer_range": 0.2, "max_position_embeddings": 128, "num_attention_heads": 4,
    "hidden_size": 32, "num_hidden_layers": 4, "eos_token_id": None, "bos_token_id": 0, "pad_token_id": 1,
}  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {
    "gpt2": {},
    "opt": {"ffn_dim": 64, "word_embed_proj_dim": 32, "init_std": 0.2},
    "llama": {"num_key_value_heads": 2, "intermediate_size": 64},
    "qwen2": {"num_key_value_heads": 2, "intermediate_size": 64},
}
WAYS = {
    "greedy": Sampling(),
    "top-k": Sampling(temperature=0.7, top_k=20, top_p=0.9, seed=3),
    "top-p": Sampling(temperature=1.3, top_p=0.8, seed=4),
    "all": Sampling(temperature=1.0, seed=5),
}


def config(family: str) -> Any:
    return AutoConfig.for_model(family, **{**_SMALL, **FAMILIES[family]})


def run(plan: str, folder: str) -> None:
    """Continue the prompts in every way, and leave the tokens, and the logits of the last stage, of each rank."""
    with rank_context("cpu") as device:
        mesh = make_mesh(Plan.parse(plan), device)
        told: dict[str, Any] = {}
        for family in FAMILIES:
            model = build_part(config(family), "causal", mesh=mesh, seed=3).eval().requires_grad_(False)
            lay_out_for_one_row(model)
            told[family] = {way: _continue(model, mesh, sampling) for way, sampling in WAYS.items()}
            told[family]["one"], logits, told[family]["why not replayed"] = _watched(model, mesh)
            told[family]["replayed"], told[family]["sums a step"] = _counted(model, mesh)
            torch.save(logits, Path(folder) / f"{family}.{mesh.rank}.pt")
        (Path(folder) / f"{mesh.rank}.json").write_text(json.dumps(told))


def _continue(model: Any, mesh: Mesh, sampling: Sampling) -> list[list[int]]:
    return generate(model, PROMPTS, mesh=mesh, max_new_tokens=NEW, sampling=sampling).tokens


def _counted(model: Any, mesh: Mesh) -> tuple[list[int], float]:
    """The tokens of the first prompt alone, and how many reductions over the group a replayed step makes."""
    count, reduce = 0, tape._reduce

    def counting(*arguments: Any) -> None:
        nonlocal count
        count += 1
        reduce(*arguments)

    tape._reduce = counting
    try:
        tokens = generate(model, PROMPTS[:1], mesh=mesh, max_new_tokens=NEW, sampling=Sampling()).tokens[0]
    finally:
        tape._reduce = reduce
    return tokens, count / (NEW - 3)  # the prefill and two steps that are recorded are no replays


def _watched(model: Any, mesh: Mesh) -> tuple[list[int], Tensor, str | None]:
    """The tokens of the first prompt alone, the logits by which they were chosen, and why steps were not replayed."""
    logits: list[Tensor] = []
    replays: list[Replay] = []

    def watching(found: Tensor | CutLogits) -> Tensor:
        logits.append((found.whole() if isinstance(found, CutLogits) else found).clone())
        return most_likely(found)

    class Kept(Replay):
        def __init__(self) -> None:
            super().__init__()
            replays.append(self)

    before = engine.most_likely, engine.Replay
    engine.most_likely, engine.Replay = watching, Kept  # type: ignore[misc]
    try:
        tokens = generate(model, PROMPTS[:1], mesh=mesh, max_new_tokens=NEW, sampling=Sampling()).tokens[0]
    finally:
        engine.most_likely, engine.Replay = before  # type: ignore[misc]
    return (
        tokens,
        torch.cat(logits) if logits else torch.empty(0),
        "not checked" if not replays[0].checked else replays[0].why_not,
    )
