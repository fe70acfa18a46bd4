"""Pipelines: what crosses between layers is found, stages are balanced, and every plan equals the single model."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForSeq2SeqLM

from meshloom.errors import PlanError
from meshloom.parallel.apply import parallelize
from meshloom.parallel.certify import Certificate, certify
from meshloom.parallel.flow import Output, trace_flow
from meshloom.parallel.launch import rank_context, run_ranks
from meshloom.parallel.mesh import make_mesh
from meshloom.parallel.stages import balance
from meshloom.plan import Plan

_SMALL: dict[str, Any] = {"vocab_size": 96, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
FAMILIES: dict[str, tuple[Any, dict[str, Any]]] = {
    "gpt2": (AutoModelForCausalLM, {"n_layer": 4, "n_embd": 32, "n_head": 4, "resid_pdrop": 0.0, "embd_pdrop": 0.0,
                                    "attn_pdrop": 0.0}),
    "bert": (AutoModelForMaskedLM, {"num_hidden_layers": 4, "hidden_size": 32, "num_attention_heads": 4,
                                    "intermediate_size": 64, "hidden_dropout_prob": 0.0,
                                    "attention_probs_dropout_prob": 0.0}),
    "qwen3": (AutoModelForCausalLM, {"num_hidden_layers": 4, "hidden_size": 32, "num_attention_heads": 4, "head_dim": 8,
                                     "num_key_value_heads": 2, "intermediate_size": 64}),
    "t5": (AutoModelForSeq2SeqLM, {"num_layers": 2, "d_model": 32, "num_heads": 4, "d_kv": 8, "d_ff": 64,
                                   "dropout_rate": 0.0, "decoder_start_token_id": 0}),
}  # fmt: skip


def _model(family: str) -> nn.Module:
    head, sizes = FAMILIES[family]
    torch.manual_seed(0)
    model: nn.Module = head.from_config(AutoConfig.for_model(family, **{**_SMALL, **sizes}))
    return model.double()


def _batch(seed: int, batch_size: int = 2) -> dict[str, Tensor]:
    ids = torch.randint(3, 96, (batch_size, 8), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids, "labels": ids.clone()}


def test_what_crosses_in_a_decoder() -> None:
    flow = trace_flow(_model("gpt2"), _batch(0))
    assert flow.layers == tuple(f"transformer.h.{index}" for index in range(4))
    assert flow.crossing(2) == [Output(1, 0)]
    assert flow.shapes[Output(1, 0)] == ((2, 8, 32), torch.float64)
    assert flow.parameters[0] == {"transformer.wte.weight", "transformer.wpe.weight"}
    assert flow.parameters[1] == flow.parameters[3] == set()
    assert flow.parameters[4] == {"transformer.wte.weight", "transformer.ln_f.weight", "transformer.ln_f.bias"}


def test_rows_that_the_head_shares_are_looked_up_by_the_first_part_only() -> None:
    flow = trace_flow(_model("gpt2"), _batch(0))
    rows = "transformer.wte.weight"
    assert [rows in part for part in flow.parameters] == [True, False, False, False, True]
    assert [rows in part for part in flow.looked_up] == [True, False, False, False, False]
    of_both = trace_flow(_model("t5"), _batch(0))  # encoder and decoder look up the same rows
    assert [index for index, part in enumerate(of_both.looked_up) if "shared.weight" in part] == [0, 2]


def test_what_crosses_in_an_encoder_and_decoder() -> None:
    flow = trace_flow(_model("t5"), _batch(0))
    assert flow.layers == ("encoder.block.0", "encoder.block.1", "decoder.block.0", "decoder.block.1")
    crossing = flow.crossing(3)
    assert Output(1, 0) in crossing  # the encoder's result goes on to every layer of the decoder
    assert Output(2, 0) in crossing
    assert len(crossing) > 2  # and so do the position biases that the first layer of the decoder computes
    assert "encoder.final_layer_norm.weight" in flow.parameters[3]


class _Keeping(nn.Linear):
    """Keeps what it computes inside."""

    def forward(self, x: Tensor) -> Tensor:
        self.kept = x * self.weight.sum()
        return super().forward(x)


class _Peeking(nn.Module):
    """Its second layer uses what the first keeps to itself."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([_Keeping(4, 4) for _ in range(2)])

    def forward(self, input_ids: Tensor) -> Any:
        hidden = self.layers[0](torch.nn.functional.one_hot(input_ids, 4).float())
        return {"out": self.layers[1](hidden * self.layers[0].kept.sum())}


def test_layers_that_share_what_they_compute_inside_are_refused() -> None:
    with pytest.raises(PlanError, match=r"layers.1 uses what layers.0 computes inside"):
        trace_flow(_Peeking(), {"input_ids": torch.zeros(1, 3, dtype=torch.long)})


def test_a_model_without_layers_is_refused() -> None:
    with pytest.raises(PlanError, match="expected a list of layers"):
        trace_flow(nn.Embedding(4, 4), {"input": torch.zeros(1, 3, dtype=torch.long)})


@pytest.mark.parametrize(
    ("costs", "stages", "bounds"),
    [
        ([1, 1, 1, 1], 2, [0, 2, 4]),
        ([1, 1, 1, 3], 2, [0, 3, 4]),
        ([5, 1, 1, 1, 1, 1], 3, [0, 1, 3, 6]),
        ([1, 1, 1], 3, [0, 1, 2, 3]),
        ([2, 2], 1, [0, 2]),
    ],
)
def test_stages_are_balanced(costs: list[float], stages: int, bounds: list[int]) -> None:
    found = balance(costs, stages)

    def dearest(ends: list[int]) -> float:
        return max(sum(costs[begin:end]) for begin, end in itertools.pairwise(ends))

    assert dearest(found) == dearest(bounds)
    assert found[0] == 0
    assert found[-1] == len(costs)
    assert all(begin < end for begin, end in itertools.pairwise(found))


JOBS = [
    ("gpt2", "pp2", "gpipe", 1), ("gpt2", "pp2", "interleaved", 2), ("gpt2", "pp4", "zero-bubble", 1),
    ("gpt2", "tp2.pp2", "1f1b", 1), ("bert", "pp2.dp2", "1f1b", 1), ("qwen3", "tp2.pp2", "1f1b", 1),
    ("qwen3", "tp2.dp2", "1f1b", 1), ("t5", "pp4", "1f1b", 1), ("t5", "pp2", "zero-bubble", 1),
]  # fmt: skip


def _check(folder: str, world_size: int) -> None:
    with rank_context("cpu"):
        found: dict[str, Any] = {}
        for family, plan_text, schedule, chunks in JOBS:
            plan = replace(Plan.parse(plan_text), schedule=schedule, virtual_stages=chunks, num_micro_batches=4)
            if plan.world_size != world_size:
                continue
            mesh = make_mesh(plan, torch.device("cpu"))
            model = parallelize(_model(family), plan=plan, mesh=mesh, example=_batch(0, batch_size=1))
            told = certify(_model(family), model, [_batch(seed) for seed in range(4 * plan.dp)], mesh)
            found[f"{family} {plan_text} {schedule}"] = [told.loss, told.gradient, told.parameter, told.share]
        if dist.get_rank() == 0:
            Path(folder, "found.json").write_text(json.dumps(found))


@pytest.fixture(scope="module", params=[2, 4])
def found(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[int, dict[str, Any]]:
    folder = tmp_path_factory.mktemp(f"pipeline{request.param}")
    run_ranks(_check, str(folder), request.param, num_ranks=request.param, log_dir=folder / "logs")
    return request.param, json.loads((folder / "found.json").read_text())


def test_pipelines_equal_the_single_model(found: tuple[int, dict[str, Any]]) -> None:
    world_size, results = found
    expected = [job for job in JOBS if Plan.parse(job[1]).world_size == world_size]
    assert len(results) == len(expected) > 2
    for job, (loss, gradient, parameter, share) in results.items():
        tolerance = 2e-6 if job.startswith(("t5", "qwen3")) else 1e-12  # both norm in float32 whatever they are given
        assert loss <= 2e-7, (job, loss)  # transformers computes the loss in float32
        assert gradient <= tolerance, (job, gradient, parameter)
        assert share < 1, job


def test_a_certificate_fails_where_a_gradient_is_wrong() -> None:
    told = Certificate(loss=0.0, gradient=1e-3, parameter="x", num_parameters=1, share=1.0)
    assert not told.passes(2e-6)
    assert replace(told, gradient=1e-7).passes(2e-6)
