"""A matrix of trainings: what is done is skipped, a failure does not end the others, the shipped one is whole."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click
import pytest

from meshloom.cli.experiments import expand, read_table
from meshloom.errors import UsageError
from tests.conftest import Meshloom

MATRIX = """
out = "found"
[options]
data = "sample"
tokenizer = "bytes"
max-steps = 2
seq-length = 16
trace = true
[matrix]
model = ["gpt2-tiny", "bert-tiny"]
plan = ["dp1", "dp2", "pp3"]
"""


def test_a_matrix_goes_on_and_skips(meshloom: Meshloom, tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text(MATRIX)
    first = meshloom("experiments", "mine.toml", "--json", cwd=tmp_path)
    assert first.returncode == 1, first.stderr
    told = {result["name"]: result for result in json.loads(first.stdout)}
    assert {name: result["state"] for name, result in told.items()} == {
        f"{model}.{plan}": "failed" if plan == "pp3" else "done"
        for model in ("gpt2-tiny", "bert-tiny") for plan in ("dp1", "dp2", "pp3")
    }  # fmt: skip
    assert "expected at least 3 layers" in told["gpt2-tiny.pp3"]["reason"]
    two = told["bert-tiny.dp2"]
    assert (two["num_traces"], two["num_faults"]) == (2, 0)
    trace = tmp_path / "found" / "bert-tiny.dp2" / "trace"
    for rank in (0, 1):
        for kind in ("host.json", "device.json", "et", "ops.txt"):
            assert (trace / f"rank{rank}.{kind}").stat().st_size
    stamps = {path: path.stat().st_mtime_ns for path in tmp_path.glob("found/*.dp*/metrics.jsonl")}
    assert len(stamps) == 4
    second = meshloom("experiments", "mine.toml", cwd=tmp_path)
    assert second.returncode == 1
    assert "1/6 gpt2-tiny.dp1 … skipped" in second.stdout
    assert "3/6 gpt2-tiny.pp3 … failed" in second.stdout
    assert {path: path.stat().st_mtime_ns for path in stamps} == stamps
    other = meshloom("experiments", "mine.toml", "--set", "max-steps=3", "--json", cwd=tmp_path)
    reasons = [result["reason"] for result in json.loads(other.stdout) if not result["name"].endswith("pp3")]
    assert all("holds a run of other options" in reason for reason in reasons)


def _cells(table: dict[str, Any], **options: Any) -> list[tuple[str, str]]:
    asked = {"tiny": False, "settings": (), "out": None, **options}
    return [(cell.name, " ".join(cell.arguments)) for cell in expand(table, **asked)]


@pytest.mark.parametrize("tiny", [False, True])
def test_the_shipped_one_is_gpt2_and_bert_on_1_2_and_8_ranks_with_traces(tiny: bool) -> None:
    cells = dict(_cells(read_table(None), tiny=tiny))
    models = ["gpt2-tiny", "bert-tiny"] if tiny else ["gpt2", "bert-base-uncased"]
    assert list(cells) == [f"{model}.{plan}" for model in models for plan in ("dp1", "dp2", "dp8")]
    assert all("--trace" in arguments.split() for arguments in cells.values())


def test_what_is_set_wins_and_takes_its_axis() -> None:
    table = {"options": {"data": ["a", "b"], "trace": True}, "matrix": {"model": ["x", "y/z.json"], "seed": [0, 1]}}
    assert _cells(table, settings=("seed=7", "trace=false"))[1] == ("z", "--model y/z.json --data a --data b --seed 7")
    assert [name for name, _ in _cells(table)] == ["x.0", "x.1", "z.0", "z.1"]


@pytest.mark.parametrize(
    ("table", "told"),
    [
        ({"matrix": {"plan": ["dp1"]}}, "expected a model"),
        ({"matrix": {"model": "gpt2"}}, "to be a list of values"),
        ({"options": {"model": "gpt2", "out": "x"}}, "got 'out'"),
        ({"options": {"model": "gpt2"}, "more": 1}, "got 'more'"),
        ({"options": {"model": "gpt2", "max-steps": 0}}, "0 is not in the range"),
        ({"matrix": {"model": ["a/x", "b/x.json"], "plan": ["dp1"]}}, None),
        ({"matrix": {"model": ["x.json", "b/x.json"]}}, "two are called x"),
    ],
)
def test_mistakes(table: dict[str, Any], told: str | None) -> None:
    if told is None:
        assert [name for name, _ in _cells(table)] == ["a-x.dp1", "x.dp1"]
        return
    with pytest.raises((UsageError, click.UsageError)) as caught:
        _cells(table)
    assert told in str(getattr(caught.value, "message", caught.value))
