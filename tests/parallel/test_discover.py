"""discover: what is found by following the forward, and why something stays whole."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from meshloom.errors import PlanError
from meshloom.model.build import build_model
from meshloom.model.config import load_config
from meshloom.parallel.apply import check_plan
from meshloom.parallel.discover import discover
from meshloom.parallel.explain import explain
from meshloom.parallel.pairs import Discovery
from meshloom.parallel.shard import Shard
from meshloom.plan import Plan


class _Toy(nn.Module):
    """Two linear layers with `between` between them, on (B, S) token ids."""

    def __init__(self, between: str) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.first = nn.Linear(8, 8)
        self.second = nn.Linear(8, 8)
        self.norm = nn.LayerNorm(8)
        self.between = between

    def forward(self, input_ids: Tensor) -> Tensor:
        whole = self.embed(input_ids)
        x = self.first(whole)
        if self.between == "gelu":
            x = functional.gelu(x) * 2
        elif self.between == "norm":
            x = self.norm(x)
        elif self.between == "residual":
            x = x + whole
        elif self.between == "softmax over features":
            x = x.softmax(-1)
        elif self.between == "softmax over tokens":
            x = x.softmax(1)
        elif self.between == "heads":
            x = x.view(*x.shape[:2], 4, 2).transpose(1, 2)
            x = functional.scaled_dot_product_attention(x, x, x).transpose(1, 2).flatten(2)
        elif self.between == "heads inside":  # the cut features would not be outermost
            x = x.view(*x.shape[:2], 4, 2).transpose(2, 3).flatten(2)
        elif self.between == "half":
            x = torch.cat([x[..., :4], x[..., :4]], -1)
        return self.second(x)


def _discover(model: nn.Module) -> Discovery:
    return discover(model, {"input_ids": torch.zeros(1, 5, dtype=torch.long)})


@pytest.mark.parametrize(("between", "units"), [("gelu", 8), ("softmax over tokens", 8), ("heads", 4)])
def test_a_pair_is_found(between: str, units: int) -> None:
    (pair,) = _discover(_Toy(between)).pairs
    assert (dict(pair.columns), pair.rows, pair.num_units) == ({"first": 1}, ("second",), units)


def test_a_norm_over_cut_features_is_gathered() -> None:
    found = _discover(_Toy("norm"))
    assert [(dict(pair.columns), pair.rows) for pair in found.pairs] == [({"first": 1}, ("second",))]
    assert dict(found.gathered) == {"norm": {"first"}}
    assert dict(found.partial) == {"norm.weight": {"first"}, "norm.bias": {"first"}}


@pytest.mark.parametrize(
    ("between", "why"),
    [("residual", "add"), ("softmax over features", "softmax"), ("half", "slice"),
     ("heads inside", "")],
)  # fmt: skip
def test_what_cannot_be_proved_stays_whole(between: str, why: str) -> None:
    found = _discover(_Toy(between))
    assert found.pairs == ()
    assert why in found.kept["first"]
    assert set(found.kept) == {"first", "second"}


def test_the_model_is_left_as_it_was() -> None:
    model = _Toy("gelu").train()
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    _discover(model)
    assert model.training
    assert all(torch.equal(before[name], parameter) for name, parameter in model.named_parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_gpt2_is_cut_by_heads_with_three_blocks() -> None:
    model = build_model(load_config("gpt2"), "causal", seed=0, device="meta")
    found = _discover_meta(model)
    attention = [pair for pair in found.pairs if "transformer.h.11.attn.c_attn" in pair.columns]
    assert [(dict(pair.columns), pair.num_units) for pair in attention] == [({"transformer.h.11.attn.c_attn": 3}, 12)]
    assert len(found.pairs) == 24
    assert list(found.kept) == ["lm_head"]
    styles = [decision.style for decision in explain(found)]
    assert (styles.count("column"), styles.count("row"), styles.count("whole")) == (24, 24, 1)


def _discover_meta(model: nn.Module) -> Discovery:
    return discover(model, {"input_ids": torch.zeros(1, 8, dtype=torch.long, device="meta")})


@pytest.mark.parametrize(
    ("plan", "named"),
    [
        ("tp13", "c_attn has 12 heads, fewer than the ranks of tp13; use tp12 or less"),
        ("pp13", "expected at least 13 layers"),
        ("cp2", "context parallel"),
        ("sp", "sequence parallel needs tensor parallel"),
    ],
)
def test_a_plan_that_the_model_cannot_take(plan: str, named: str) -> None:
    model = build_model(load_config("gpt2"), "causal", seed=0, device="meta")
    with pytest.raises(PlanError, match=named):
        check_plan(model, Plan.parse(plan), {"input_ids": torch.zeros(1, 8, dtype=torch.long, device="meta")})


@pytest.mark.parametrize(
    ("shard", "degree"),
    [
        (Shard(dim=0), 2),
        (Shard(dim=1), 2),
        (Shard(dim=0, num_blocks=3), 2),
        (Shard(dim=1, num_blocks=3), 2),
        (Shard(dim=0), 5),
        (Shard(dim=0, num_copies=2), 4),
        (Shard(dim=0, num_blocks=2, unit=4), 2),
    ],
)
def test_join_is_the_inverse_of_take(shard: Shard, degree: int) -> None:
    whole = torch.arange(24 * 12.0).view(24, 12)
    parts = [shard.take(whole, index, degree) for index in range(degree)]
    assert torch.equal(shard.join(parts), whole)
    sizes = [part.size(shard.dim) for part in parts]
    assert max(sizes) - min(sizes) <= shard.unit * shard.num_blocks
    assert [tuple(part.shape) for part in parts] == [shard.shape(whole.shape, index, degree) for index in range(degree)]
