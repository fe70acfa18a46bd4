"""The same run on other plans: the losses of every step stay those of one rank, so gradients, clipping and the
optimizer do the same."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.conftest import Meshloom


def _losses(meshloom: Meshloom, folder: Path, *arguments: str) -> list[float]:
    same = ["--model", "gpt2-tiny", "--tokenizer", "bytes", "--data", "sample", "--gradient-accumulation", "4",
            "--seq-length", "32", "--max-steps", "6", "--max-grad-norm", "0.5"]  # fmt: skip
    result = meshloom("train", *same, *arguments, "--out", str(folder))
    assert result.returncode == 0, result.stderr
    return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def single(meshloom: Meshloom, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    return _losses(meshloom, tmp_path_factory.mktemp("single") / "run", "--plan", "dp1")


@pytest.mark.parametrize("arguments", [["pp2"], ["pp2", "--schedule", "zero-bubble"], ["tp2.pp2"], ["tp2"], ["tp2.sp"]])
def test_the_losses_are_those_of_one_rank(
    single: list[float], tmp_path: Path, meshloom: Meshloom, arguments: list[str]
) -> None:
    losses = _losses(meshloom, tmp_path / "run", "--plan", *arguments)
    assert losses == pytest.approx(single, rel=2e-5)
    assert single[-1] < single[0] - 0.3
