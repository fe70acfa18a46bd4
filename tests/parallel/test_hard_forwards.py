"""Forwards that are hard to cut: each mechanism equals the single model, or says beforehand why not."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from meshloom.errors import PlanError
from meshloom.parallel import answers
from meshloom.parallel.answers import CannotFollow
from meshloom.parallel.apply import check_plan, parallelize
from meshloom.parallel.certify import certify, rounding
from meshloom.parallel.discover import discover
from meshloom.parallel.fake import learn_answers
from meshloom.parallel.flow import Output, trace_flow
from meshloom.parallel.launch import rank_context, run_ranks
from meshloom.parallel.mesh import make_mesh
from meshloom.parallel.pairs import Discovery
from meshloom.plan import Plan
from tests.parallel import toys

ONE = toys.batch(0, batch_size=1)


def _checked(kind: type[toys.Model], plan: str) -> Discovery:
    return check_plan(toys.make(kind), Plan.parse(plan), ONE)


def _columns(found: Discovery) -> set[str]:
    return {path for pair in found.pairs for path in pair.columns}


def test_a_forward_that_decides_by_values_is_followed_on_real_tensors() -> None:
    model = toys.make(toys.Routed)
    with pytest.raises(CannotFollow, match="decides by the values"):
        discover(model, ONE)
    state = torch.get_rng_state()
    before = [{**vars(module), "training": True} for module in model.modules()]
    found = check_plan(model, Plan.parse("tp2"), ONE)
    assert found.answers is not None
    assert _columns(found)
    assert _columns(found) <= {f"layers.{i}.experts.expert_{j}.up" for i in range(2) for j in range(3)}
    assert torch.equal(torch.get_rng_state(), state)
    assert [vars(module) for module in model.modules()] == before, "what the forward kept is forgotten"
    assert all(layer.capacity is None for layer in model.layers)


def test_a_small_model_without_data_is_filled_and_a_large_one_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with torch.device("meta"):
        model = toys.Routed()
    example = {name: value.to("meta") for name, value in ONE.items()}
    assert _columns(check_plan(model, Plan.parse("tp2"), example))
    assert all(parameter.is_meta for parameter in model.parameters())
    monkeypatch.setattr(answers, "_MOST_BYTES", 100)
    with pytest.raises(PlanError, match=r"GiB is not filled.*load its weights first"):
        check_plan(model, Plan.parse("tp2"), example)


def test_answers_are_those_of_the_place_in_the_code() -> None:
    model = toys.make(toys.Routed)
    given = learn_answers(model, ONE).given
    uniques = [values for site, values in given.items() if site[0] == "_unique2"]
    assert [len(values) for values in uniques] == [2], "one place, once in each layer"


def test_a_parameter_of_each_head_is_cut_with_the_heads() -> None:
    found = _checked(toys.Sinks, "tp2")
    assert {candidate.parameter for candidate in found.owned} == {"layers.0.sinks", "layers.1.sinks"}
    assert not found.partial
    assert not _checked(toys.PenalisedSinks, "tp2").pairs
    assert "is also used whole" in discover(toys.make(toys.PenalisedSinks), ONE).kept["layers.0.q"]


def test_a_tied_head_is_not_cut_by_its_inputs() -> None:
    found = _checked(toys.Tied, "tp2")
    assert _columns(found) == {"layers.0.up", "layers.1.up"}
    assert found.kept["before"] == "head, which it feeds, cannot be cut"


def test_a_layer_whose_weight_is_used_past_it_stays_whole() -> None:
    assert not _checked(toys.Past, "tp2").pairs
    assert discover(toys.make(toys.Past), ONE).kept["layers.0.down"] == "clamp uses its parameters past its forward"


def test_a_pair_that_does_not_fit_stays_whole_and_the_others_are_cut() -> None:
    found = _checked(toys.Stubborn, "tp2")
    assert _columns(found) == {"layers.0.up", "layers.1.up"}
    assert "does not fit into the forward" in found.kept["layers.0.first"]
    assert {"layers.0.first", "layers.0.second"} <= set(found.kept)


def test_layers_within_a_backward_of_the_models_own_are_refused() -> None:
    with pytest.raises(PlanError, match=r"layers\.0 runs within a backward of the model's own"):
        _checked(toys.OwnBackward, "pp2")


def test_one_layer_that_runs_often_is_as_many_layers() -> None:
    flow = trace_flow(toys.make(toys.Shared), ONE)
    assert flow.layers == ("layers.0",) * 4
    assert flow.crossing(2) == [Output(1, 0)]


def test_what_layers_put_into_a_dict_crosses() -> None:
    flow = trace_flow(toys.make(toys.Giving), ONE)
    assert flow.crossing(1) == [Output(0, 0), Output(0, 1)]
    assert [[place.key for place in puts] for puts in flow.puts] == [["keys"], []]


def test_rounding_is_that_of_the_model_itself() -> None:
    single = toys.make(toys.Normed).float()
    batches = [toys.batch(seed) for seed in range(2)]
    for one in batches:
        (single(**one).loss / len(batches)).backward()
    own = rounding(single, batches)
    assert 1e-9 < own < 1e-5
    single.embed.weight.grad *= 1 + 1e-3
    assert rounding(single, batches) == pytest.approx(1e-3, rel=0.1)


JOBS = [
    (toys.Normed, "tp2"), (toys.Sinks, "tp2"), (toys.Routed, "tp2"), (toys.Tied, "tp2"), (toys.Stubborn, "tp2"),
    (toys.Routed, "pp2"), (toys.Pooled, "pp2"), (toys.Shared, "pp2"), (toys.Giving, "pp2"), (toys.Writing, "pp2"),
    (toys.Normed, "tp2.pp2"), (toys.Routed, "pp2.dp2"), (toys.Routed, "tp2.dp2"), (toys.Sinks, "tp4"),
]  # fmt: skip


def _check(folder: str, world_size: int) -> None:
    with rank_context("cpu"):
        found: dict[str, Any] = {}
        for kind, text in JOBS:
            plan = replace(Plan.parse(text), num_micro_batches=2)
            if plan.world_size != world_size:
                continue
            mesh = make_mesh(plan, torch.device("cpu"))
            model = parallelize(toys.make(kind), plan=plan, mesh=mesh, example=ONE)
            told = certify(toys.make(kind), model, [toys.batch(seed) for seed in range(2 * plan.dp)], mesh)
            found[f"{kind.__name__} {text}"] = [told.loss, told.gradient, told.parameter, told.share]
        if dist.get_rank() == 0:
            Path(folder, "found.json").write_text(json.dumps(found))


@pytest.mark.parametrize("world_size", [2, 4])
def test_they_equal_the_single_model(world_size: int, tmp_path: Path) -> None:
    run_ranks(_check, str(tmp_path), world_size, num_ranks=world_size, log_dir=tmp_path / "logs")
    results = json.loads((tmp_path / "found.json").read_text())
    assert len(results) == sum(Plan.parse(text).world_size == world_size for _, text in JOBS) > 3
    for job, (loss, gradient, parameter, share) in results.items():
        assert loss <= 1e-12, (job, loss)
        assert gradient <= 1e-12, (job, gradient, parameter)
        assert share < 1, job
