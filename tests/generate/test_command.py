"""`meshloom generate` as a user calls it: from a checkpoint of any plan, with traces, and with a rank that dies."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
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
    layers_of_a_stage = 1
    for rank, trace in read_all(folder / "decode").items():
        sums = [node for node in trace.nodes if node.is_comm and node.get("comm_axis") == "tp"]
        # two a layer; one of the embedding on the first stage, and on the last, which holds the same rows for the head
        # and looks none up, one that finds the likeliest token
        assert len(sums) == 2 * layers_of_a_stage + 1, rank
    prefill, decode = (read_all(folder / name)[0] for name in ("prefill", "decode"))
    work = [sum(node.get("num_ops", 0) for node in trace.nodes if not node.is_comm) for trace in (prefill, decode)]
    assert work[0] > 8 * work[1], "16 tokens against one"


def test_ranks_by_hand_give_the_tokens_of_generate(trained: Path, meshloom: Meshloom) -> None:
    common = ["generate", "--model", str(trained), "--prompt", "Once upon", "--max-new-tokens", "12", "--ignore-eos",
              "--json"]  # fmt: skip
    together = json.loads(meshloom(*common, "--plan", "tp2").stdout)["tokens"]
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = str(one.getsockname()[1])
    ranks = []
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    for rank in ("0", "1"):
        command = [sys.executable, "-m", "meshloom.cli", "launch", "--rank", rank, "--plan", "tp2", "--port", port]
        ranks.append(subprocess.Popen([*command, "--", *common], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                                      text=True, env=environment))  # fmt: skip
    try:
        said = [rank.communicate(timeout=240) for rank in ranks]
    finally:
        for rank_ in ranks:
            rank_.kill()
    assert [rank.returncode for rank in ranks] == [0, 0], said
    assert json.loads(said[0][0])["tokens"] == together
    assert said[1][0] == "", "rank 0 tells"


def test_a_tensor_that_is_missing_is_named(trained: Path, meshloom: Meshloom, tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoint"
    shutil.copytree(trained / "checkpoints" / "checkpoint-4", checkpoint)
    tensors = load_file(checkpoint / "model.safetensors")
    lost = next(name for name in sorted(tensors) if name.endswith("h.1.mlp.c_proj.weight"))
    save_file({name: tensor for name, tensor in tensors.items() if name != lost}, checkpoint / "model.safetensors")
    result = meshloom("generate", "--model", str(checkpoint), "--prompt", "Once", "--plan", "tp2")
    assert result.returncode == 2
    assert result.stderr.count("\n") == 1
    assert f"expected a tensor {lost}, found none" in result.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_ctrl_c_ends_all_ranks_and_keeps_what_was_told() -> None:
    process = _many_prompts("tp2")
    try:
        told = _until_third(process)
        ranks = _children(process.pid)
        os.killpg(process.pid, signal.SIGINT)
        _, said = process.communicate(timeout=30)
        assert process.returncode == 130
        assert said.endswith("meshloom: interrupted; everything that was started has been ended\n")
        assert told[-1].startswith("[3] ")
        assert len(ranks) == 2
        assert not any(_runs(pid) for pid in ranks)
    finally:
        process.kill()
        process.communicate()


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_a_rank_that_dies_ends_all_with_the_reason() -> None:
    process = _many_prompts("tp2.pp2")
    try:
        _until_third(process)
        ranks = _children(process.pid)
        assert len(ranks) == 4
        os.kill(ranks[3], signal.SIGKILL)
        _, said = process.communicate(timeout=30)
        assert process.returncode == 1
        assert "rank 3 was killed" in said
        assert not any(_runs(pid) for pid in ranks)
    finally:
        process.kill()
        process.communicate()


def _many_prompts(plan: str) -> subprocess.Popen[str]:
    """A run that goes on for long, one prompt after another."""
    command = [sys.executable, "-u", "-m", "meshloom.cli", "generate", *TINY, "--random-weights", "--plan", plan,
               "--prompt", "Once", "--prompt", "Twice", "--max-new-tokens", "8", "--ignore-eos",
               "--batch-size", "1"]  # fmt: skip
    command += ["--prompt", "Again"] * 3000
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)


def _until_third(process: subprocess.Popen[str]) -> list[str]:
    """What was told until the third prompt was continued."""
    assert process.stdout is not None
    told = []
    for line in process.stdout:
        told.append(line)
        if line.startswith("[3] "):
            break
    return told


def _children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
