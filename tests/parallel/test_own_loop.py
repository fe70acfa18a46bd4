"""`parallelize` in a loop of one's own: the script of docs/parallel.md on real ranks, and what it says of mistakes."""

from __future__ import annotations

import contextlib
import io
import json
import re
import runpy
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM, LlamaConfig

import meshloom
from meshloom.errors import PlanError
from meshloom.parallel.launch import rank_context, run_ranks

PAGE = Path(__file__).resolve().parents[2] / "docs" / "parallel.md"


def _own(script: str, plan: str, out: str) -> None:
    sys.argv = [script, plan]
    printed = io.StringIO()
    with rank_context("cpu"), contextlib.redirect_stdout(printed), pytest.MonkeyPatch.context() as patch:
        # the world is there already: ranks of one test meet as those of all others do
        patch.setattr(dist, "init_process_group", lambda backend: None)
        patch.setattr(dist, "destroy_process_group", lambda: None)
        runpy.run_path(script)
    if printed.getvalue():
        Path(out).write_text(printed.getvalue())


@pytest.fixture(scope="module")
def losses(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[float]]:
    folder = tmp_path_factory.mktemp("own")
    text = re.search(r"## In your own loop\n\n```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert text is not None
    (folder / "own.py").write_text(text.group(1))
    found = {}
    for plan in ("dp1", "tp2.pp2", "dp2", "tp2.dp2"):
        out, size = folder / plan, meshloom.Plan.parse(plan).world_size
        run_ranks(_own, str(folder / "own.py"), plan, str(out), num_ranks=size, log_dir=folder / f"{plan}.logs")
        found[plan] = [float(line.split()[-1]) for line in out.read_text().splitlines()]
    return found


def test_the_script_of_the_page_gives_the_losses_of_one_rank(losses: dict[str, list[float]]) -> None:
    assert len(losses["dp1"]) == 3
    assert losses["dp1"][2] < losses["dp1"][0]
    assert losses["tp2.pp2"] == pytest.approx(losses["dp1"], abs=2e-5)
    assert losses["tp2.dp2"] == pytest.approx(losses["dp2"], abs=2e-5)
    assert losses["dp2"][2] != pytest.approx(losses["dp1"][2], abs=2e-5), "the second rank has other sequences"


def _llama() -> torch.nn.Module:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=64, use_cache=False
    )
    model: torch.nn.Module = AutoModelForCausalLM.from_config(config)
    return model


def _meshes(out: str) -> None:
    with rank_context("cpu"):
        _mesh_after_mesh(out)


def _mesh_after_mesh(out: str) -> None:
    ids = torch.arange(16).reshape(1, 16)
    told = {}
    with torch.no_grad():
        whole = _llama()(input_ids=ids).logits
        for name, mesh in (
            ("none", None), ("ours", meshloom.make_mesh("tp2")),
            ("torch's", init_device_mesh("cpu", (1, 2), mesh_dim_names=("dp", "tp"))),
        ):  # fmt: skip
            told[name] = (meshloom.parallelize(_llama(), plan="tp2", mesh=mesh)(input_ids=ids).logits[:] - whole).abs()
    found = {name: difference.max().item() for name, difference in told.items()}
    assert isinstance(meshloom.parallelize(_llama(), plan="dp2"), DistributedDataParallel)
    errors = []
    for plan, mesh in (
        ("tp4", None), ("tp2", meshloom.make_mesh("dp2")),
        ("tp2", init_device_mesh("cpu", (2,), mesh_dim_names=("x",))),
        ("tp2", init_device_mesh("cpu", (2,))), ("2tp", None),
    ):  # fmt: skip
        try:
            meshloom.parallelize(_llama(), plan=plan, mesh=mesh)
        except PlanError as error:
            errors.append(str(error))
    try:
        meshloom.parallelize(_llama(), plan="pp2")(input_ids=ids)
    except PlanError as error:
        errors.append(str(error))
    if dist.get_rank() == 0:
        Path(out).write_text(json.dumps([found, errors]))


def test_meshes_of_ours_of_torch_and_of_nobody(tmp_path: Path) -> None:
    run_ranks(_meshes, str(tmp_path / "out"), num_ranks=2, log_dir=tmp_path / "logs")
    found, errors = json.loads((tmp_path / "out").read_text())
    assert set(found) == {"none", "ours", "torch's"}
    assert max(found.values()) < 1e-5
    expected = [
        "2 were started",
        "got one of plan dp2",
        "got x2",
        r"no names for \(2,\)",
        "expected tp, cp",
        "schedule",
    ]
    assert len(errors) == len(expected)
    for error, part in zip(errors, expected, strict=True):
        assert re.search(part, error), error
        assert "\n" not in error


def test_without_a_process_group_it_says_what_to_do() -> None:
    with pytest.raises(PlanError, match="init_process_group first"):
        meshloom.parallelize(_llama(), plan="tp2")


def test_stages_as_they_are_told() -> None:
    from meshloom.parallel.stages import stage_bounds
    from meshloom.plan import Plan

    told = Plan(pp=2, stage_layers=Plan.parse_stage_layers("1,3"))
    assert stage_bounds(told, [1.0] * 4) == [0, 1, 4]
    with pytest.raises(PlanError, match=r"stages of 5 layers together.*1 \+ 3 = 4"):
        stage_bounds(told, [1.0] * 5)
    for text in ("1", "1,2,3", "0,4"):
        with pytest.raises(PlanError, match="how many layers each of 2 stages has"):
            Plan(pp=2, stage_layers=Plan.parse_stage_layers(text))
    with pytest.raises(PlanError, match="such as 10,14, got 'a'"):
        Plan.parse_stage_layers("a")
