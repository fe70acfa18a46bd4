"""fp16: the loss scale, steps that overflow, and what a checkpoint keeps of it; and gradients that are not finite."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import GPT2Config, GPT2LMHeadModel

from meshloom.model.scale import LossScale
from meshloom.model.step import found_inf, make_optimizer, train_step
from meshloom.parallel.launch import rank_context
from meshloom.parallel.mesh import make_mesh
from meshloom.plan import Plan
from tests.conftest import Meshloom

SAME = ("train", "--model", "gpt2-tiny", "--tokenizer", "bytes", "--data", "sample", "--seq-length", "32",
        "--gradient-accumulation", "2", "--learning-rate", "2e-3", "--max-steps", "6")  # fmt: skip


def _lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


class Small:
    """A model, its optimizer and a batch, on a world of one."""

    def __init__(self, mesh: Any) -> None:
        torch.manual_seed(0)
        config = GPT2Config(n_layer=1, n_head=2, n_embd=16, vocab_size=32, bos_token_id=0, eos_token_id=0)
        self.mesh, self.model = mesh, GPT2LMHeadModel(config).eval()  # no dropout
        self.optimizer = make_optimizer(self.model, learning_rate=1e-2, weight_decay=0.0)
        ids = torch.randint(32, (2, 8))
        self.batch = {"input_ids": ids, "labels": ids}

    def step(self, precision: Any = "fp32", scale: LossScale | None = None, norm: float = 1.0) -> Any:
        return train_step(
            self.model, self.optimizer, [self.batch], mesh=self.mesh, max_grad_norm=norm, precision=precision,
            scale=scale,
        )  # fmt: skip

    def weights(self) -> list[torch.Tensor]:
        return [parameter.detach().clone() for parameter in self.model.parameters()]


@pytest.fixture
def small() -> Any:
    with rank_context("cpu") as device:
        yield Small(make_mesh(Plan(), device))


def test_a_step_that_overflows_changes_nothing_and_halves_the_scale(small: Small) -> None:
    scale = LossScale(small.mesh.device, value=2.0**120)  # gradients above 2^8 overflow float32, smaller ones fp16
    before = small.weights()
    small.step("fp16", scale)
    assert float(found_inf(small.optimizer)) == 1
    assert float(scale.value) == 2.0**119
    assert all(torch.equal(one, other) for one, other in zip(before, small.weights()))
    for _ in range(120):
        small.step("fp16", scale)
        if not found_inf(small.optimizer):
            break
    assert not all(torch.equal(one, other) for one, other in zip(before, small.weights()))
    assert float(scale.value) < 2.0**60
    steps = {float(state["step"]) for state in small.optimizer.state.values()}
    assert steps == {1.0}, "only steps that changed something count"


def test_fp16_follows_fp32(small: Small) -> None:
    scale = LossScale(small.mesh.device)
    halves = [float(small.step("fp16", scale).loss) for _ in range(5)]
    again = Small(small.mesh)
    wholes = [float(again.step().loss) for _ in range(5)]
    assert halves == pytest.approx(wholes, rel=5e-3)
    assert halves != wholes
    assert wholes[-1] < wholes[0] - 0.1


def test_gradients_that_are_not_finite_end_all_change(small: Small) -> None:
    small.step()
    before = small.weights()
    hook = small.model.lm_head.register_forward_hook(lambda module, args, output: output * torch.nan)
    assert torch.isnan(small.step().loss)
    hook.remove()
    assert torch.isfinite(small.step().loss), "the weights are still good"
    assert all(torch.equal(one, other) for one, other in zip(before, small.weights()))


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_nothing_is_read_from_the_device_in_a_step(small: Small, precision: Any) -> None:
    read = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func.overloadpacket is torch.ops.aten._local_scalar_dense:
                read.append(func)
            return func(*args, **(kwargs or {}))

    scale = LossScale(small.mesh.device) if precision == "fp16" else None
    small.step(precision, scale)
    with Watch():
        small.step(precision, scale)
        assert not read
        float(small.optimizer.state[next(small.model.parameters())]["step"])
        assert read, "the watch sees what is read"


@pytest.fixture(scope="module")
def half(meshloom: Meshloom, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("half") / "run"
    given = ("--plan", "dp1", "--precision", "fp16", "--save-steps", "3", "--out", str(folder))
    result = meshloom(*SAME, *given)
    assert result.returncode == 0, result.stderr
    return folder


@pytest.mark.parametrize("plan", ["tp2", "pp2"])
def test_fp16_on_other_plans(half: Path, tmp_path: Path, meshloom: Meshloom, plan: str) -> None:
    result = meshloom(*SAME, "--plan", plan, "--precision", "fp16", "--out", str(tmp_path / "run"))
    assert result.returncode == 0, result.stderr
    lines, expected = _lines(tmp_path / "run"), _lines(half)
    assert [line["loss"] for line in lines] == pytest.approx([line["loss"] for line in expected], rel=1e-3)
    assert {line["loss_scale"] for line in lines} == {65536.0}


def test_fp16_goes_on_to_the_bit(half: Path, tmp_path: Path, meshloom: Meshloom) -> None:
    checkpoint = tmp_path / "checkpoint-3"
    checkpoint.symlink_to(half / "checkpoints" / "checkpoint-3")
    info = json.loads((checkpoint / "training_info.json").read_text())
    assert info["data"]["loss_scale"] == {"value": 65536.0, "streak": 3}
    given = ("--precision", "fp16", "--resume", str(checkpoint), "--save-steps", "6", "--out", str(tmp_path / "run"))
    result = meshloom(*SAME, *given)
    assert result.returncode == 0, result.stderr
    assert [line["loss"] for line in _lines(tmp_path / "run")] == [line["loss"] for line in _lines(half)[3:]]
    mine, theirs = (load_file(run / "checkpoints/checkpoint-6/model.safetensors") for run in (tmp_path / "run", half))
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)
    info = json.loads((tmp_path / "run/checkpoints/checkpoint-6/training_info.json").read_text())
    assert info["data"]["loss_scale"]["streak"] == 6
