"""`meshloom generate` as a user calls it: from a checkpoint of any plan, with traces, and with a rank that dies."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from meshloom.chakra.check import check
from meshloom.chakra.file import read_all
from tests.conftest import Meshloom

TINY = ("--model", "gpt2-tiny", "--tokenizer", "bytes")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, meshloom: Meshloom) -> Path:
    """A run on tp2 with a checkpoint."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    result = meshloom("train", *TINY, "--data", "sample", "--plan", "tp2", "--max-steps", "4", "--save-steps", "4",
                      "--learning-rate", "0.01", "--no-save-initial", "--out", str(folder))  # fmt: skip
    assert result.returncode == 0, result.stderr
    return folder


def test_a_checkpoint_of_another_plan(trained: Path, meshloom: Meshloom, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("Once upon a time,\n\nThe\n")
    result = meshloom("generate", "--model", str(trained), "--plan", "pp2", "--prompts-file", str(prompts),
                      "--max-new-tokens", "24", "--ignore-eos", "--shard-cache", str(tmp_path / "parts"),
                      "--json")  # fmt: skip
    assert result.returncode == 0, result.stderr
    told = json.loads(result.stdout)
    checkpoint = trained / "checkpoints" / "checkpoint-4"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(checkpoint), AutoTokenizer.from_pretrained(checkpoint)
    for text, tokens, said in zip(("Once upon a time,", "The"), told["tokens"], told["texts"], strict=True):
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        expected = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=24, do_sample=False,
                                  eos_token_id=None, pad_token_id=0)  # fmt: skip
        assert tokens == expected[0, ids.shape[1] :].tolist()
        assert said == tokenizer.decode(tokens, skip_special_tokens=True)
    assert {row["rank"] for row in told["memory"]} == {0, 1}
    assert told["ms_per_token_median"] <= told["ms_per_token_p90"]
    assert len(list((tmp_path / "parts").iterdir())) == 2, "each rank has kept its part"


def test_an_end_token_ends(trained: Path, meshloom: Meshloom) -> None:
    common = ("generate", "--model", str(trained), "--prompt", "Once upon", "--max-new-tokens", "12", "--json")
    whole = json.loads(meshloom(*common, "--ignore-eos").stdout)["tokens"][0]
    ended = json.loads(meshloom(*common, "--eos", str(whole[5]), "--eos", "0").stdout)["tokens"][0]
    assert ended == whole[: whole.index(whole[5]) + 1]


def test_a_config_alone_gives_traces(meshloom: Meshloom, tmp_path: Path) -> None:
    folder = tmp_path / "trace"
    result = meshloom("generate", "--model", "gpt2-tiny", "--random-weights", "--plan", "tp2.pp2",
                      "--num-input-tokens", "16", "--max-new-tokens", "4", "--trace", str(folder),
                      "--visualize-trace")  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert "no faults" in result.stdout
    for name in ("prefill", "decode"):
        traces = read_all(folder / name)
        assert sorted(traces) == [0, 1, 2, 3]
        assert check(traces) == []
        for file in (
            "tensor_trace_graph.png",
            "tensor_trace_graph.json",
            "tensor_comm_graph.png",
            "tensor_trace_chakra.json",
        ):
            assert (folder / name / file).stat().st_size > 1000
        kinds = {node.name for node in traces[2].nodes if node.is_comm}
        assert any("broadcast" in kind for kind in kinds)
        assert any("all_reduce" in kind or "allreduce" in kind for kind in kinds)
        assert not any("gather" in kind for kind in kinds), "the likeliest token is found by one maximum"
        assert "transformer.h.1.attn" in {node.get("module") for node in traces[2].nodes}
    prefill, decode = (read_all(folder / name)[0] for name in ("prefill", "decode"))
    work = [sum(node.get("num_ops", 0) for node in trace.nodes if not node.is_comm) for trace in (prefill, decode)]
    assert work[0] > 8 * work[1], "16 tokens against one"


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_a_rank_that_dies_ends_all_with_the_reason() -> None:
    command = [sys.executable, "-u", "-m", "meshloom.cli", "generate", *TINY, "--random-weights", "--plan", "tp2.pp2",
               "--prompt", "Once", "--prompt", "Twice", "--max-new-tokens", "8", "--ignore-eos",
               "--batch-size", "1"]  # fmt: skip
    command += ["--prompt", "Again"] * 3000
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("[3] "):
                break
        ranks = [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]
        assert len(ranks) == 4
        os.kill(ranks[3], signal.SIGKILL)
        _, said = process.communicate(timeout=30)
        assert process.returncode == 1
        assert "rank 3 was killed" in said
        assert not any(_runs(pid) for pid in ranks)
    finally:
        process.kill()
        process.communicate()


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
