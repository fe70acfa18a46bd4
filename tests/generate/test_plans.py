"""The same tokens as transformers' generate on one device, on every plan, greedy and drawn."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from meshloom.generate.engine import padded
from meshloom.model.build import build_model
from meshloom.parallel.launch import run_ranks
from meshloom.plan import Plan
from tests.generate.ranks import FAMILIES, NEW, PROMPTS, WAYS, config, run

PLANS = ("dp1", "tp2", "pp2", "tp2.pp2")


@pytest.fixture(scope="module", params=PLANS)
def told(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    folder = tmp_path_factory.mktemp("plan")
    run_ranks(run, request.param, str(folder), num_ranks=Plan.parse(request.param).world_size, log_dir=folder / "logs")
    return request.param, folder


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("single")
    run_ranks(run, "dp1", str(folder), num_ranks=1, log_dir=folder / "logs")
    return dict(json.loads((folder / "0.json").read_text()))


@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_and_logits_are_those_of_transformers(told: tuple[str, Path], family: str) -> None:
    plan, folder = told
    whole: Any = build_model(config(family), "causal", seed=3).eval()
    ids, mask = padded(PROMPTS, torch.device("cpu"))
    both = whole.generate(ids, attention_mask=mask, max_new_tokens=NEW, do_sample=False)
    alone = whole.generate(
        torch.tensor(PROMPTS[:1]), max_new_tokens=NEW, do_sample=False, return_dict_in_generate=True, output_logits=True
    )
    assert len(set(alone.sequences[0].tolist())) > 10, "not one token again and again, which any fault would give"
    num_ranks = Plan.parse(plan).world_size
    for rank in range(num_ranks):
        tokens = json.loads((folder / f"{rank}.json").read_text())[family]
        assert tokens["one"] == alone.sequences[0, len(PROMPTS[0]) :].tolist()
        assert tokens["greedy"] == both[:, ids.shape[1] :].tolist()
        assert tokens["why not replayed"] is None
        assert tokens["replayed"] == tokens["one"]
        cut = Plan.parse(plan)
        # two a layer of the stage; one of the embedding, and one for the likeliest token, on the first and last stage
        ends = (rank < cut.tp) + (rank >= num_ranks - cut.tp)
        assert tokens["sums a step"] == (2 * 4 / cut.pp + ends if cut.tp > 1 else 0)
    logits = torch.load(folder / f"{family}.{num_ranks - 1}.pt")
    torch.testing.assert_close(logits, torch.cat(alone.logits), rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_equal_seeds_draw_equal_tokens_on_every_plan(
    told: tuple[str, Path], single: dict[str, Any], family: str
) -> None:
    plan, folder = told
    for rank in range(Plan.parse(plan).world_size):
        tokens = json.loads((folder / f"{rank}.json").read_text())[family]
        for way in WAYS:
            assert tokens[way] == single[family][way], way
    assert len({str(single[family][way]) for way in WAYS}) == len(WAYS)
