"""The reducer's twin sends what DistributedDataParallel sends, in the same order."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from meshloom.chakra.file import read_all
from meshloom.chakra.trace import Trace
from meshloom.cli.synth import synth
from meshloom.model.step import make_optimizer, train_step
from meshloom.parallel.apply import parallelize
from meshloom.parallel.launch import rank_context, run_ranks
from meshloom.parallel.mesh import make_mesh
from meshloom.parallel.unused import find_unused
from meshloom.plan import Plan
from tests.conftest import Meshloom


def _sent(trace: Trace, axis: str) -> list[tuple[int, str]]:
    return [(node.get("comm_size"), node.get("dtype")) for node in trace.nodes if node.get("comm_axis") == axis]


def test_twin_equals_ddp_in_the_demo(demo_run: Path, tmp_path: Path) -> None:
    synth(model="gpt2-tiny", plan="dp2", micro_batch=4, gradient_accumulation=1, seq_length=128, objective=None,
          out=tmp_path / "synth")  # fmt: skip
    captured, imagined = read_all(demo_run)[0], read_all(tmp_path / "synth")[0]
    assert len(_sent(captured, "dp")) >= 2
    assert _sent(captured, "dp") == _sent(imagined, "dp")


@pytest.mark.parametrize("accumulation", [3])
def test_gradients_are_reduced_in_the_last_micro_batch_only(
    accumulation: int, tmp_path: Path, meshloom: Meshloom
) -> None:
    options = ["--model", "gpt2-tiny", "--plan", "dp2", "--gradient-accumulation", str(accumulation)]
    run = ["--tokenizer", "bytes", "--data", "sample", "--max-steps", "3", "--trace", "--out", str(tmp_path / "run")]
    result = meshloom("train", *options, *run)
    assert result.returncode == 0, result.stderr
    result = meshloom("synth", *options, "--out", str(tmp_path / "synth"))
    assert result.returncode == 0, result.stderr
    captured, imagined = read_all(tmp_path / "run")[1], read_all(tmp_path / "synth")[1]
    assert sum(size for size, _ in _sent(captured, "dp")) == 463_360 * 4
    assert _sent(captured, "dp") == _sent(imagined, "dp")


@dataclass
class Result:
    """What a model returns."""

    loss: Tensor
    pooled: Tensor | None


class Extra(nn.Module):
    """A model with a layer that its loss does not use, and one that its forward does not."""

    def __init__(self, routed: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.routed = routed
        self.rows, self.used, self.pooler, self.spare = nn.Embedding(50, 8), *(nn.Linear(8, 8) for _ in range(3))

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> Any:
        """Loss and outputs."""
        x = self.used(self.rows(input_ids))
        if self.routed and input_ids.sum() > 0:
            x = self.spare(x)
        # where values decide, DistributedDataParallel looks itself, and takes all that is returned for used
        return Result(loss=x.square().mean(), pooled=None if self.routed else self.pooler(x[:, 0]))


def test_parameters_that_no_gradient_reaches_are_found() -> None:
    example = {"input_ids": torch.zeros(1, 4, dtype=torch.long)}
    example["labels"] = example["input_ids"]
    unused = {"pooler.weight", "pooler.bias", "spare.weight", "spare.bias"}
    model = Extra()
    assert find_unused(model, example) == unused
    assert find_unused(model.to("meta"), {name: x.to("meta") for name, x in example.items()}) == unused
    assert find_unused(Extra(routed=True), example) is None


def _train(folder: str) -> None:
    with rank_context("cpu") as device:
        mesh = make_mesh(Plan.parse("dp2"), device)
        for routed in (False, True):
            ids = torch.arange(8).view(2, 4) * (mesh.rank if routed else 1)  # only one rank's batch takes the other way
            batch = {"input_ids": ids, "labels": ids}
            model = parallelize(Extra(routed), plan=mesh.plan, mesh=mesh, example=batch)
            optimizer = make_optimizer(model, learning_rate=0.1, weight_decay=0.1)
            for _ in range(3):
                train_step(model, optimizer, [batch, batch], mesh=mesh, max_grad_norm=0.0)
            torch.save(model.state_dict(), Path(folder, f"{routed}.{mesh.rank}"))


def test_a_model_with_unused_parameters_trains(tmp_path: Path) -> None:
    run_ranks(_train, str(tmp_path), num_ranks=2, log_dir=tmp_path / "logs")
    for routed in (False, True):
        one, other = (torch.load(tmp_path / f"{routed}.{rank}") for rank in (0, 1))
        assert all(torch.equal(one[name], other[name]) for name in one)
        still = Extra().state_dict()
        assert torch.equal(one["module.pooler.weight"], still["pooler.weight"])
        assert torch.equal(one["module.spare.weight"], still["spare.weight"]) != routed
        assert not torch.equal(one["module.used.weight"], still["used.weight"])
