"""A dry run tells what a run would be, and touches nothing; what is recorded can be chosen."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest

from meshloom.chakra.file import read_all
from meshloom.cli.__main__ import _run
from meshloom.cli.estimate import spec_of
from meshloom.hardware.table import shipped
from tests.conftest import Meshloom

TRAIN = ("train", "--model", "gpt2-tiny", "--data", "sample", "--seq-length", "32")


def _dry(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert _run([*arguments, "--dry-run"]) == 0
    return capsys.readouterr().out


def test_nothing_is_touched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MESHLOOM_CACHE_DIR", str(tmp_path / "cache"))
    told = _dry(capsys, *TRAIN, "--plan", "dp2", "--max-steps", "3", "--out", "run", "--device", "cpu")
    assert list(tmp_path.iterdir()) == []
    (line,) = (line for line in told.splitlines() if line.startswith("command: "))
    words = shlex.split(line.removeprefix("command: "))
    assert words[:2] == ["meshloom", "train"]
    assert dict(zip(words[2::2], words[3::2])) == {
        "--model": "gpt2-tiny", "--data": "sample", "--seq-length": "32", "--plan": "dp2", "--max-steps": "3",
        "--out": "run", "--device": "cpu",
    }  # fmt: skip
    assert "463,360 parameters, plan dp2 on 2 ranks, weights: random" in told
    assert "3 steps of 8 sequences a step, 256 tokens: 768 tokens in all" in told
    assert "memory of the fullest rank: " in told
    assert "step time: " in told


def test_the_commands_of_hosts_are_those_that_run(capsys: pytest.CaptureFixture[str]) -> None:
    where = ("--nnodes", "2", "--rdzv-endpoint", "node0", "--out", "a run", "--save-steps", "2", "--max-restarts", "1")
    told = json.loads(_dry(capsys, *TRAIN, "--plan", "tp2.dp2", *where, "--json"))
    assert [line.split("--max-restarts")[1] for line in told["commands"]] == [
        f" 1 --out 'a run' --nnodes 2 --rdzv-endpoint node0:29400 --node-rank {rank}" for rank in (0, 1)
    ]
    assert told["num_hosts"] == 2


@pytest.mark.parametrize(
    ("model", "plan", "bytes_of_weights"),
    [("gpt2", "dp2", 4 * 124_439_808), ("gpt3-175b", "tp8.pp8", 4 * 174_604_259_328 / 64),
     ("llama-3-70b", "tp8.pp4", 4 * 70_553_706_496 / 32)],
)  # fmt: skip
def test_memory_is_that_of_the_closed_form(
    capsys: pytest.CaptureFixture[str], model: str, plan: str, bytes_of_weights: float
) -> None:
    """The fullest rank holds its share of the weights, and up to a sixth more where stages are not even."""
    arguments = ("train", "--model", model, "--tokenizer", "bytes", "--data", "sample", "--plan", plan, "--device",
                 "cpu", "--gradient-accumulation", "8")  # fmt: skip
    memory = json.loads(_dry(capsys, *arguments, "--json"))["estimate"]["memory_bytes"]
    assert 0.98 < memory["weights"] / bytes_of_weights < 1.17
    assert memory["gradients"] == memory["weights"]
    assert memory["optimizer"] == pytest.approx(2 * memory["weights"], abs=2)
    assert memory["reserved"] > 4 * memory["weights"]


def test_it_is_estimated_for_the_hardware_that_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("train", "--model", "llama-3-8b", "--tokenizer", "bytes", "--data", "sample", "--plan", "tp4.dp2",
                 "--precision", "bf16", "--batch-size", "2", "--seq-length", "4096", "--json")  # fmt: skip
    told = {spec: json.loads(_dry(capsys, *arguments, "--hardware", spec))["estimate"] for spec in ("h100-sxm", "h200")}
    assert told["h100-sxm"]["device_memory_bytes"] < told["h200"]["device_memory_bytes"]
    assert told["h100-sxm"]["cluster"].startswith("1 × 8 ")
    assert all(0.1 < item["mfu"] < 0.9 for item in told.values())


def test_what_the_closed_form_does_not_know_is_said(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 300}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "deepseek_v3", "kv_lora_rank": 16, **sizes}))
    arguments = ("train", "--model", str(tmp_path), "--tokenizer", "bytes", "--data", "sample", "--plan", "dp2")
    assert "multi-head latent attention (kv_lora_rank), which the closed form does not know" in _dry(capsys, *arguments)


def test_nothing_is_downloaded(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*args: object, **kwargs: object) -> None:
        raise AssertionError("a dry run asked the hub")

    monkeypatch.setattr("meshloom.model.config.hub", never)
    told = _dry(capsys, "train", "--model", "llama-2-7b", "--data", "sample", "--plan", "tp8", "--device", "cpu")
    assert "6,738,415,616 parameters, plan tp8 on 8 ranks" in told
    assert "tokenizer: not on this host yet" in told


def test_a_mistake_is_told_as_in_a_real_run(capsys: pytest.CaptureFixture[str]) -> None:
    assert _run([*TRAIN, "--plan", "pp3", "--dry-run"]) == 2
    assert "expected at least 3 layers" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "spec"),
    [("NVIDIA H100 80GB HBM3", "h100-sxm"), ("NVIDIA H100 PCIe", "h100-pcie"), ("NVIDIA H200", "h200"),
     ("NVIDIA A100-SXM4-40GB", "a100-40gb-sxm"), ("NVIDIA A100-SXM4-80GB", "a100-80gb-sxm"),
     ("NVIDIA A100 80GB PCIe", "a100-80gb-pcie"), ("Tesla V100-SXM2-16GB", "v100-sxm"), ("NVIDIA B200", "b200"),
     ("NVIDIA GeForce RTX 4090", "rtx4090"), ("NVIDIA T4", None)],
)  # fmt: skip
def test_a_device_is_known_by_its_name(name: str, spec: str | None) -> None:
    assert spec_of(name) == spec
    assert spec is None or spec in shipped("device")


def test_wait_warmup_and_active_choose_the_steps(meshloom: Meshloom, tmp_path: Path) -> None:
    trace = ("--trace", "--trace-wait", "1", "--trace-warmup", "2", "--trace-active", "2")
    result = meshloom(*TRAIN, "--max-steps", "6", "--plan", "dp2", *trace, "--out", str(tmp_path / "run"))
    assert result.returncode == 0, result.stderr
    traces = read_all(tmp_path / "run" / "trace")
    assert list(traces) == [0, 1]
    assert {(trace.get("step"), trace.get("num_steps")) for trace in traces.values()} == {(3, 2)}
    steps = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [step["recorded"] for step in steps] == [False, True, True, True, True, False]
    for rank in (0, 1):
        names = {path.name for path in (tmp_path / "run" / "trace").glob(f"rank{rank}.*")}
        assert names == {f"rank{rank}.{kind}" for kind in ("host.json", "device.json", "notes.json", "et", "ops.txt")}
        table = (tmp_path / "run" / "trace" / f"rank{rank}.ops.txt").read_text().splitlines()
        times = [float(line.split()[0]) for line in table[2:] if "everything else" not in line]
        assert times == sorted(times, reverse=True)
        shares = [float(line.split()[1].removesuffix("%")) for line in table[2:]]
        assert sum(shares) == pytest.approx(100, abs=3)
        assert any(line.endswith("aten::addmm") for line in table)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--trace-step", "2", "--trace-wait", "1"), "expected it, or --trace-wait"),
        (("--max-steps", "3", "--trace-wait", "3"), "expected fewer steps than --max-steps, 3"),
    ],
)
def test_mistakes(arguments: tuple[str, ...], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert _run([*TRAIN, "--trace", *arguments]) == 2
    assert told in capsys.readouterr().err
