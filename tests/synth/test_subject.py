"""Models that were written by hand: what is synthesised of them, and what is said where their forward needs data."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import meshloom
from meshloom.chakra.check import check
from meshloom.errors import MeshloomError, ModelError, PlanError, UsageError
from meshloom.plan import Plan
from meshloom.synth.roles import find_roles
from tests.synth.steps import step


class Written(nn.Module):
    """Two linear layers between an embedding and its head; `decides` how the forward may depend on data."""

    def __init__(self, decides: str = "") -> None:
        super().__init__()
        self.rows, self.head = nn.Embedding(40, 16), nn.Linear(16, 40)
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)
        self.decides = decides

    def forward(self, input_ids: Tensor, labels: Tensor) -> Any:
        """The loss."""
        x = self.rows(input_ids)
        x = x + self.down(self.up(x).relu())
        if self.decides == "item":
            x = x * x.abs().max().item()
        if self.decides == "if" and x.sum() > 0:
            x = -x
        if self.decides == "nonzero":
            x = x + x[x > 0].sum()
        return SimpleNamespace(loss=functional.cross_entropy(self.head(x).view(-1, 40), labels.view(-1)))


@pytest.mark.parametrize("plan", ["dp2", "tp2.dp2"])
def test_a_module_written_by_hand(plan: str) -> None:
    model = Written()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    traces = meshloom.synthesise(model, plan=Plan.parse(plan), micro_batch=2, seq_length=8)
    assert check(traces) == []
    assert sorted(traces) == list(range(Plan.parse(plan).world_size))
    products = [node for node in traces[0].nodes if node.get("op_class") == "gemm"]
    width = 32 // Plan.parse(plan).tp
    assert len(products) == 9, "three layers, three products each"
    assert sum(f"[16,{width}]" in node.get("output_shapes") for node in products) >= 1
    assert {node.get("module") for node in products} == {"up", "down", "head"}
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(("decides", "code"), [
    ("item", "x = x * x.abs().max().item()"), ("if", 'if self.decides == "if" and x.sum() > 0:'),
    ("nonzero", "x = x + x[x > 0].sum()"),
])  # fmt: skip
def test_a_forward_that_depends_on_data_is_told_with_its_line(decides: str, code: str) -> None:
    lines = Path(__file__).read_text(encoding="utf-8").splitlines()
    number = 1 + next(index for index, line in enumerate(lines) if line.strip() == code)
    with pytest.raises(ModelError) as raised:
        meshloom.synthesise(Written(decides), plan=Plan.parse("dp2"), micro_batch=2, seq_length=8)
    told = str(raised.value)
    assert told.startswith(f"{__file__}:{number}, in forward: `{code}`: ")
    assert "meshloom train --trace" in told
    assert "\n" not in told


def test_the_loss_scaler_asks_all_ranks_whether_one_overflowed() -> None:
    """Which takes the largest of their flags; the norm of the gradients is a sum."""
    trace = find_roles(step("gpt2", "tp2", 1, layers=2, precision="fp16")).traces()
    told = [(node.get("comm_reduction"), node.get("comm_size")) for node in next(trace)[1].nodes
            if node.is_comm and node.get("phase") == "optimizer"]  # fmt: skip
    assert told == [("max", 4), ("sum", 4)]


def test_what_cannot_be_shared_or_skipped_is_refused() -> None:
    with pytest.raises(PlanError, match="several dp ranks"):
        step("gpt2", "tp2", 1, zero=1)
    with pytest.raises(UsageError, match="fused"):
        step("gpt2", "dp2", 1, precision="fp16", fused=False)
    assert issubclass(ModelError, MeshloomError)
