"""Going on from a checkpoint: to the bit on the same plan, closely on another; and what is done with broken ones."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from meshloom.cli.__main__ import _run
from meshloom.train.checkpoint import newest
from meshloom.train.runs import find_resumed
from tests.conftest import Meshloom

SAME = ("--model", "gpt2-tiny", "--tokenizer", "bytes", "--data", "sample", "--seq-length", "32", "--max-grad-norm",
        "0.5", "--learning-rate", "2e-3", "--max-steps", "6")  # fmt: skip
# the same global batch on each plan
PLANS = {
    "dp1": ("--plan", "dp1", "--batch-size", "4", "--gradient-accumulation", "2"),
    "dp2": ("--plan", "dp2", "--batch-size", "2", "--gradient-accumulation", "2"),
    "dp4": ("--plan", "dp4", "--batch-size", "1", "--gradient-accumulation", "2"),  # sums depend on their order
    "tp2": ("--plan", "tp2", "--batch-size", "4", "--gradient-accumulation", "2"),
    "tp2.pp2": ("--plan", "tp2.pp2", "--batch-size", "4", "--gradient-accumulation", "2"),
}


def _losses(folder: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


class Straight(dict[str, Path]):
    """For each plan a run of six steps that nobody disturbed, with checkpoints after three and six; made when asked."""

    def __init__(self, factory: pytest.TempPathFactory, meshloom: Meshloom) -> None:
        super().__init__()
        self.factory, self.meshloom = factory, meshloom

    def __missing__(self, plan: str) -> Path:
        folder = self.factory.mktemp("straight") / "run"
        result = self.meshloom("train", *SAME, *PLANS[plan], "--save-steps", "3", "--out", str(folder))
        assert result.returncode == 0, result.stderr
        self[plan] = folder
        return folder


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory, meshloom: Meshloom) -> Straight:
    return Straight(tmp_path_factory, meshloom)


@pytest.mark.parametrize("plan", ["dp1", "dp4", "tp2.pp2"])
def test_the_same_plan_goes_on_to_the_bit(
    straight: dict[str, Path], tmp_path: Path, meshloom: Meshloom, plan: str
) -> None:
    before = straight[plan] / "checkpoints"
    run = tmp_path / "run"
    result = meshloom("train", *SAME, *PLANS[plan], "--save-steps", "6", "--resume", str(before / "checkpoint-3"),
                      "--out", str(run))  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert _losses(run) == _losses(straight[plan])[3:]
    for name in ("model.safetensors", *(f"state/{file.name}" for file in (before / "checkpoint-6/state").glob("*.s*"))):
        expected = load_file(before / "checkpoint-6" / name)
        found = load_file(run / "checkpoints" / "checkpoint-6" / name)
        assert expected.keys() == found.keys()
        assert all(torch.equal(expected[key], found[key]) for key in expected), name


@pytest.mark.parametrize(
    ("saved", "plan"), [("tp2.pp2", "dp1"), ("tp2.pp2", "tp2"), ("dp1", "tp2.pp2"), ("dp1", "dp2")]
)
def test_another_plan_goes_on_closely(
    straight: dict[str, Path], tmp_path: Path, meshloom: Meshloom, saved: str, plan: str
) -> None:
    checkpoint = straight[saved] / "checkpoints" / "checkpoint-3"
    result = meshloom("train", *SAME, *PLANS[plan], "--resume", str(checkpoint), "--out", str(tmp_path / "run"))
    assert result.returncode == 0, result.stderr
    losses = _losses(tmp_path / "run")
    assert len(losses) == 3
    assert losses == pytest.approx(_losses(straight["dp1"])[3:], rel=1e-5)


def test_a_killed_rank_and_the_run_goes_on_in_its_folder(
    straight: dict[str, Path], tmp_path: Path, meshloom: Meshloom
) -> None:
    run = tmp_path / "run"
    command = [
        sys.executable,
        "-m",
        "meshloom.cli",
        "train",
        *SAME,
        *PLANS["dp2"],
        "--save-steps",
        "2",
        "--out",
        str(run),
    ]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("step 5/"):
                children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
                os.kill(int(children[-1]), signal.SIGKILL)
                break
        process.communicate(timeout=120)
        assert process.returncode == 1
    result = meshloom("train", *SAME, *PLANS["dp2"], "--save-steps", "2", "--keep-last", "1", "--resume", str(run))
    assert result.returncode == 0, result.stderr
    assert "checkpoints/checkpoint-" in result.stdout
    assert _losses(run) == _losses(straight["dp2"])
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["checkpoint-6", "initial_model"]
    mine, theirs = (load_file(f / "checkpoints/checkpoint-6/model.safetensors") for f in (run, straight["dp2"]))
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("plan", ["dp2", "tp2.pp2"])
def test_hugging_face_opens_it(straight: dict[str, Path], plan: str) -> None:
    checkpoints = straight[plan] / "checkpoints"
    ids = torch.arange(20)[None]
    logits = []
    for name in ("initial_model", "checkpoint-6"):
        model, told = AutoModelForCausalLM.from_pretrained(checkpoints / name, output_loading_info=True)
        assert not any(told.values()), told
        logits.append(model(ids).logits)
        assert AutoTokenizer.from_pretrained(checkpoints / name)("ab")["input_ids"]
    single = AutoModelForCausalLM.from_pretrained(straight["dp1"] / "checkpoints" / "checkpoint-6")
    assert torch.allclose(single(ids).logits, logits[1], atol=1e-3)
    assert not torch.allclose(logits[0], logits[1], atol=1e-1)


def _copy(straight: dict[str, Path], folder: Path) -> Path:
    return Path(shutil.copytree(straight["dp1"], folder / "run"))


@pytest.mark.parametrize("file", ["model.safetensors", "state/rank00000.safetensors", "training_info.json"])
def test_a_truncated_checkpoint_is_told_and_an_older_one_found(
    straight: dict[str, Path], tmp_path: Path, told: Told, file: str
) -> None:
    run = _copy(straight, tmp_path)
    broken = run / "checkpoints" / "checkpoint-6" / file
    broken.write_bytes(broken.read_bytes()[:-40])
    line = told(*SAME[:-1], "7", "--resume", str(run / "checkpoints" / "checkpoint-6"))
    assert f"{file}: expected" in line
    found = find_resumed(str(run), None)
    assert found.checkpoint == run / "checkpoints" / "checkpoint-3"
    assert (found.step, found.folder) == (3, run)
    assert file in found.troubles[0]


def test_a_run_whose_newest_checkpoint_is_broken_goes_on(
    straight: dict[str, Path], tmp_path: Path, meshloom: Meshloom
) -> None:
    run = _copy(straight, tmp_path)
    (run / "checkpoints" / "checkpoint-6" / "model.safetensors").unlink()
    result = meshloom("train", *SAME, *PLANS["dp1"], "--save-steps", "3", "--resume", str(run))
    assert result.returncode == 0, result.stderr
    assert "model.safetensors: expected" in result.stderr
    assert "going on from an older one" in result.stderr
    assert "checkpoint-3, causal" in result.stdout
    assert _losses(run) == _losses(straight["dp1"])
    assert newest(run / "checkpoints") == (run / "checkpoints" / "checkpoint-6", [])


Told = Callable[..., str]


@pytest.fixture
def told(capsys: pytest.CaptureFixture[str]) -> Told:
    """The one line that a mistake is told with, before any process is started."""

    def run(*arguments: str) -> str:
        assert _run(["train", *arguments]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        return line

    return run


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"n_layer": 3}, r"expected transformer\.h\.2\..*, which is not in it"),
        ({"n_layer": 1}, r"it has transformer\.h\.1\..*, which the model has not"),
        ({"n_embd": 64}, r"expected transformer\.wte\.weight of shape \(264, 64\)"),
    ],
)
def test_another_architecture(
    straight: dict[str, Path], tmp_path: Path, told: Told, change: dict[str, int], expected: str
) -> None:
    checkpoint = straight["dp1"] / "checkpoints" / "checkpoint-3"
    config = tmp_path / "config.json"
    config.write_text(json.dumps({**json.loads((checkpoint / "config.json").read_text()), **change}))
    line = told("--model", str(config), *SAME[2:], "--resume", str(checkpoint), "--out", str(tmp_path / "run"))
    assert re.search(f"holds another architecture: .*{expected}", line), line


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("--resume",), "or --out with the run to go on with"),
        (("--resume", "nowhere"), "expected a checkpoint or the folder of a run"),
        (("--keep-last", "2"), "expected --save-steps too"),
        (("--resume", "RUN", "--max-steps", "6"), "expected more than the 6 steps of"),
        (("--resume", "RUN", "--max-steps", "9", "--trace", "--trace-step", "5"), "more than the 6 steps that were"),
    ],
)
def test_mistakes(straight: dict[str, Path], told: Told, arguments: tuple[str, ...], expected: str) -> None:
    given = [str(straight["dp1"]) if argument == "RUN" else argument for argument in arguments]
    assert expected in told(*SAME, *given)


def test_any_batch_goes_on_where_the_last_one_ended(
    straight: dict[str, Path], tmp_path: Path, meshloom: Meshloom
) -> None:
    """The number of a sequence alone decides what it holds, so no batch has to divide what was read."""
    checkpoint = straight["dp1"] / "checkpoints" / "checkpoint-3"
    given = ("--resume", str(checkpoint), "--out", str(tmp_path / "run"), "--batch-size", "5")
    result = meshloom("train", *SAME, *given)
    assert result.returncode == 0, result.stderr
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [3, 4, 5]


def test_resume_with_nothing_there_begins(tmp_path: Path, meshloom: Meshloom) -> None:
    arguments = (*SAME[:-1], "1", "--out", str(tmp_path / "run"), "--resume")
    result = meshloom("train", *arguments)
    assert result.returncode == 0, result.stderr
    assert "random weights" in result.stdout
