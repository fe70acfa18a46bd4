"""The real models on real input, as the README shows them: minutes, so only `make test-slow` runs this."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from meshloom.chakra.check import check
from meshloom.chakra.file import read_all
from tests.conftest import Meshloom


@pytest.mark.slow
@pytest.mark.shared
@pytest.mark.parametrize(("model", "num_parameters"), [("gpt2", 124_439_808), ("bert-base-uncased", 109_514_298)])
def test_two_traces_of_the_full_model(
    shared: Path, tmp_path: Path, meshloom: Meshloom, model: str, num_parameters: int
) -> None:
    out = tmp_path / "run"
    result = meshloom("train", "--model", model, "--tokenizer", str(shared / "tokenizers" / model), "--data",
                      str(shared / "squad" / "squad-v1.1-train.rebuilt.json.gz"), "--plan", "dp2", "--max-steps", "3",
                      "--seq-length", "128", "--trace", "--out", str(out))  # fmt: skip
    assert result.returncode == 0, result.stderr
    losses = [json.loads(line)["loss"] for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert losses[-1] < losses[0]
    traces = read_all(out)
    assert list(traces) == [0, 1]
    assert check(traces) == []
    for trace in traces.values():
        sent = [node.get("comm_size") for node in trace.nodes if node.get("comm_axis") == "dp"]
        assert sum(sent) == 4 * num_parameters
