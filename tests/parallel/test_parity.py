"""Parallel equals serial: loss, every gradient, and the gradient norm, in float64 on two gloo ranks."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).with_name("parity.py")
FAMILIES = (
    "gpt2", "bert", "llama, fewer key-value heads", "opt", "plain", "gpt2, uneven", "llama, uneven", "olmo2, uneven",
    "llama, uneven groups",
)  # fmt: skip
WITH_SEQUENCE = tuple(name for name in FAMILIES if name not in ("plain", "olmo2, uneven"))  # no layers; a norm gathers
ON_FOUR = ("gpt2, uneven", "llama, uneven groups")


def _run(folder: Path, plan: str, *arguments: str) -> dict[str, Any]:
    out = folder / "found.json"
    command = [sys.executable, str(SCRIPT), str(out), plan, *arguments]
    result = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    found: dict[str, Any] = json.loads(out.read_text())
    return found


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return _run(tmp_path_factory.mktemp("parity"), "tp2")


@pytest.fixture(scope="module")
def found_with_sequence(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return _run(tmp_path_factory.mktemp("parity"), "tp2.sp", *WITH_SEQUENCE)


@pytest.fixture(scope="module")
def found_on_four(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return _run(tmp_path_factory.mktemp("parity"), "tp4", *ON_FOUR)


@pytest.mark.parametrize("family", FAMILIES)
def test_tensor_parallel_equals_serial(found: dict[str, Any], family: str) -> None:
    _equals_serial(found[family], family)


@pytest.mark.parametrize("family", WITH_SEQUENCE)
def test_sequence_parallel_equals_serial(found_with_sequence: dict[str, Any], family: str) -> None:
    told = found_with_sequence[family]
    _equals_serial(told, family)
    assert told["saw_part_of_sequence"], "norms and residuals see half of the ten tokens"


@pytest.mark.parametrize("plan", ["tp2+selective", "tp2.sp+selective", "tp2+full"])
def test_recomputed_layers_equal_serial(tmp_path: Path, plan: str) -> None:
    families = ("gpt2", "llama, fewer key-value heads")
    found = _run(tmp_path, plan, *families)
    for family in families:
        _equals_serial(found[family], family)


def _equals_serial(told: dict[str, Any], family: str) -> None:
    serial, cut = told["losses"]
    assert abs(cut - serial) <= 1e-12 * serial
    assert told["worst"] <= 1e-11
    assert told["norms"][1] == pytest.approx(told["norms"][0], rel=1e-12)
    assert told["num_cut"] >= (8 if family != "plain" else 5), "two layers of attention and MLP are cut"
    assert told["logits"] <= 1e-12


@pytest.mark.parametrize("family", FAMILIES)
def test_no_rank_holds_all_logits(found: dict[str, Any], family: str) -> None:
    """The vocabulary has 101 tokens, a number that nothing else has; two ranks hold 51 and 50 of them."""
    gathers = family == "plain"  # for label smoothing
    assert found[family]["saw_whole_vocabulary"] == gathers


@pytest.mark.parametrize("family", ON_FOUR)
def test_heads_that_the_degree_does_not_divide(found_on_four: dict[str, Any], family: str) -> None:
    """Six heads on four ranks: two of them hold two; with two key-value heads, each pair of ranks shares one."""
    _equals_serial(found_on_four[family], family)


def test_the_comparison_sees_a_wrong_shard(tmp_path: Path) -> None:
    told = _run(tmp_path, "tp2", "--spoil", *FAMILIES[:5])
    assert all(family["worst"] > 1e-4 for family in told.values())
