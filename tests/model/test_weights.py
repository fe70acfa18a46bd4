"""Sharded from the start: each rank's part is, to the bit, that of the whole model of the same seed."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import BertConfig, GPT2Config, LlamaConfig, MixtralConfig, ModernBertConfig

from meshloom.model import weights
from meshloom.model.build import build_model
from meshloom.model.config import objective_of
from meshloom.model.initial import _PIECE, record, replay
from meshloom.model.weights import build_part, inner_model
from meshloom.parallel.mesh import Mesh, make_mesh
from meshloom.parallel.placement import Placed, placed_parameters
from meshloom.parallel.shard import Shard
from meshloom.plan import Plan

SMALL = {"vocab_size": 101, "num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 32}
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2}
LLAMA = {**SMALL, "intermediate_size": 48, "num_key_value_heads": 2}
CONFIGS: dict[str, Any] = {
    "gpt2": GPT2Config(vocab_size=101, n_layer=2, n_head=4, n_embd=32, bos_token_id=1, eos_token_id=1),
    "gpt2, untied": GPT2Config(
        vocab_size=101, n_layer=2, n_head=4, n_embd=32, bos_token_id=1, eos_token_id=1, tie_word_embeddings=False
    ),
    "bert": BertConfig(**SMALL, intermediate_size=64, architectures=["BertForMaskedLM"]),  # a padding row
    "llama": LlamaConfig(**LLAMA),  # tp4: key-value heads are shared
    "llama, tied": LlamaConfig(**LLAMA, tie_word_embeddings=True),
    "modernbert": ModernBertConfig(
        **SMALL, **TOKENS, intermediate_size=48, architectures=["ModernBertForMaskedLM"]
    ),  # drawn until right
    "mixtral": MixtralConfig(**LLAMA),  # weights of three dims
}


@contextmanager
def world(plan: Plan, rank: int) -> Iterator[Mesh]:
    """The mesh of `rank` in a world where it is alone."""
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=plan.world_size)
    try:
        yield make_mesh(plan, torch.device("cpu"))
    finally:
        dist.destroy_process_group()


def _compare(config: Any, plan: Plan, spoil: Callable[[nn.Module], None] = lambda model: None) -> None:
    objective = objective_of(config)
    whole = build_model(config, objective, seed=3)
    spoil(whole)
    wholes = {name: parameter.detach() for name, parameter in whole.named_parameters()}
    shapes = {name: tuple(parameter.shape) for name, parameter in wholes.items()}
    found = set()
    for rank in range(plan.world_size):
        with world(plan, rank) as mesh:
            model = build_part(config, objective, mesh=mesh, seed=3)
            for name, placed in placed_parameters(model, mesh, shapes).items():
                mine = placed.like(torch.full_like(placed.tensor, -7.0))
                mine.put(wholes[name].flatten(), 0)
                assert torch.equal(placed.tensor, mine.tensor), name
                found.add(name)
            for name, buffer in inner_model(model).named_buffers():
                assert torch.equal(buffer, whole.get_buffer(name)), name
    assert found == set(wholes)


@pytest.mark.parametrize("plan", ["dp1", "tp2", "tp4", "pp2", "tp2.pp2"])
@pytest.mark.parametrize("family", CONFIGS)
def test_each_part_is_that_of_the_whole(family: str, plan: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing falls back
        _compare(CONFIGS[family], Plan.parse(plan))


def test_the_comparison_sees_another_weight() -> None:
    def spoil(model: nn.Module) -> None:
        model.get_parameter("transformer.h.1.mlp.c_proj.weight").data[-1, -1] += 1e-6

    with pytest.raises(AssertionError, match=r"h\.1\.mlp\.c_proj"):
        _compare(CONFIGS["gpt2"], Plan.parse("tp2"), spoil)


def test_what_cannot_be_followed_is_built_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    def decide_by_value(config: Any, objective: Any, *, seed: int, device: str = "cpu") -> nn.Module:
        model = build_model(config, objective, seed=seed, device=device)
        with torch.no_grad():
            for parameter in model.parameters():
                if device != "meta" and parameter.sum() > 0:
                    parameter.mul_(2)
        return model

    monkeypatch.setattr(weights, "build_model", decide_by_value)
    with pytest.warns(UserWarning, match="each rank builds the whole model"), world(Plan(tp=2), 1) as mesh:
        build_part(CONFIGS["gpt2"], "causal", mesh=mesh, seed=3)


class _Odd(nn.Module):
    """Sizes that no piece divides, and every way to fill a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.large = nn.Parameter(torch.empty(3, _PIECE // 2 + 5, 3))
        self.tiny = nn.Parameter(torch.empty(5))
        self.made = nn.Parameter(torch.randn(7, 4))
        self.scaled = nn.Parameter(torch.empty(40, 6))
        self.product = nn.Parameter(torch.empty(4, 4))
        self.register_buffer("random", torch.rand(3))
        self.register_buffer("steps", torch.arange(6).float() / 7)
        with torch.no_grad():
            self.large.normal_(0.1, 0.2)
            self.tiny.normal_()
            self.scaled.uniform_(-0.9, 0.9).erfinv_().mul_(0.3).add_(0.1).clamp_(min=-0.2)
            self.scaled[2].zero_()
            self.product.uniform_()
            self.product.copy_(self.product @ self.product)


@pytest.mark.parametrize("dim", [0, 1, 2])
def test_odd_sizes_and_every_way_to_fill(dim: int) -> None:
    torch.manual_seed(11)
    whole = _Odd()
    fake, recording = record(_Odd)
    shard = Shard(dim=dim, unit=1)
    parts, held = {}, {}
    for name, parameter in whole.named_parameters():
        mine = Shard(dim=min(dim, parameter.dim() - 1)) if name != "large" else shard
        ranges = tuple(mine.ranges(parameter.size(mine.dim), 1, 2))
        local = torch.empty(mine.shape(parameter.shape, 1, 2))
        held[name] = Placed(tensor=local, shape=tuple(parameter.shape), dim=mine.dim, ranges=ranges)
        parts[recording.view(fake.get_parameter(name)).storage] = [held[name]]
    buffers = [fake.get_buffer("random"), fake.get_buffer("steps")]
    state = torch.get_rng_state()
    real = replay(recording, parts, buffers, seed=11)
    assert torch.equal(torch.get_rng_state(), state)
    for name, placed in held.items():
        expected = Shard(dim=placed.dim).take(whole.get_parameter(name).detach(), 1, 2)
        assert torch.equal(placed.tensor, expected), name
    assert torch.equal(real(buffers[0]), whole.get_buffer("random"))
    assert torch.equal(real(buffers[1]), whole.get_buffer("steps"))


def test_a_parameter_stays_the_object_that_hooks_know() -> None:
    """Shared key-value heads sum their gradients in a hook, which must outlive the way from meta to memory."""
    parameter = nn.Parameter(torch.empty(2, 3, device="meta"))
    parameter.tensor_shard = Shard(dim=0)  # type: ignore[attr-defined]
    parameter.register_hook(lambda gradient: gradient * 5)
    known = parameter
    weights._give_memory(parameter, torch.ones(2, 3))
    parameter.sum().backward()
    assert known is parameter
    assert torch.equal(known.grad, torch.full((2, 3), 5.0))  # type: ignore[arg-type]
    assert parameter.tensor_shard == Shard(dim=0)  # type: ignore[attr-defined]
