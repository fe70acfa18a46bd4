"""`--styles`: a plan written by hand is taken by what trains, synthesises and generates, and changes no number."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from meshloom.chakra.file import read
from meshloom.cli.__main__ import _run
from tests.conftest import Meshloom

WHOLE = '[styles]\n"mlp.c_fc" = "whole"\n"lm_head" = "whole"\n'
TRAIN = ("train", "--model", "gpt2-tiny", "--tokenizer", "bytes", "--data", "sample", "--seq-length", "16",
         "--max-steps", "2", "--device", "cpu")  # fmt: skip
SYNTH = ("synth", "--model", "gpt2-tiny", "--seq-length", "16", "--plan", "tp2")


@pytest.fixture
def styles(tmp_path: Path) -> str:
    path = tmp_path / "styles.toml"
    path.write_text(WHOLE, encoding="utf-8")
    return str(path)


def _losses(folder: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def _collectives(path: Path) -> Counter[str]:
    kinds = (node.attrs.get("comm_type") for node in read(path).nodes)
    return Counter(str(kind) for kind in kinds if kind is not None)


def test_training_and_its_synthesis(tmp_path: Path, meshloom: Meshloom, styles: str) -> None:
    single = meshloom(*TRAIN, "--out", str(tmp_path / "single"))
    assert single.returncode == 0, single.stderr
    cut = meshloom(*TRAIN, "--plan", "tp2", "--styles", styles, "--trace", "--out", str(tmp_path / "cut"))
    assert cut.returncode == 0, cut.stderr
    assert _losses(tmp_path / "cut") == pytest.approx(_losses(tmp_path / "single"), abs=1e-5)
    assert _run([*SYNTH, "--styles", styles, "--out", str(tmp_path / "synth")]) == 0
    assert _run([*SYNTH, "--out", str(tmp_path / "found")]) == 0
    captured = _collectives(next((tmp_path / "cut" / "trace").rglob("rank0.et")))
    assert _collectives(tmp_path / "synth" / "rank0.et") == captured
    assert sum(_collectives(tmp_path / "found" / "rank0.et").values()) > sum(captured.values()) > 0


def test_generation(meshloom: Meshloom, styles: str) -> None:
    given = ("generate", "--model", "gpt2-tiny", "--random-weights", "--num-input-tokens", "8", "--max-new-tokens",
             "6", "--device", "cpu", "--json")  # fmt: skip
    results = [meshloom(*given), meshloom(*given, "--plan", "tp2", "--styles", styles)]
    assert [result.returncode for result in results] == [0, 0], results[1].stderr
    one, other = (json.loads(result.stdout) for result in results)
    assert one["tokens"] == other["tokens"]


@pytest.mark.parametrize("start", [TRAIN, SYNTH[:5], (*SYNTH[:3], "--inference")])
def test_without_tensor_parallel_there_is_nothing_to_say(
    start: tuple[str, ...], styles: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _run([*start, "--plan", "dp1", "--styles", styles, "--out", str(tmp_path / "new")]) == 2
    assert "styles say how tensor parallel cuts" in capsys.readouterr().err


def test_an_entry_that_names_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "styles.toml"
    path.write_text('[styles]\n"layers.*.up" = "whole"\n', encoding="utf-8")
    for start in (TRAIN, SYNTH[:5]):
        assert _run([*start, "--plan", "tp2", "--styles", str(path), "--out", str(tmp_path / "new")]) == 2
        assert "'layers.*.up' matches no module" in capsys.readouterr().err
