"""Evaluation: exact on any plan and batch, without a trace in training; the best model is the one that is kept."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, BertConfig, BertForMaskedLM

from meshloom.model.config import load_tokenizer
from meshloom.parallel.launch import rank_context
from meshloom.parallel.mesh import make_mesh
from meshloom.plan import Plan
from meshloom.train.data import Sequences, Stream, hold_out, make_stream
from meshloom.train.evaluate import Evaluation, Evaluator
from meshloom.train.shards import tokenise
from meshloom.train.sources import SAMPLE, Reading, find_sources
from tests.conftest import Meshloom

SAME = ("train", "--model", "gpt2-tiny", "--tokenizer", "bytes", "--data", "sample", "--gradient-accumulation", "2",
        "--seq-length", "32", "--max-steps", "5", "--learning-rate", "2e-3")  # fmt: skip
HELD = ("--eval-fraction", "0.1", "--eval-steps", "2")


def _lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def _stream(cache: Path, objective: Any, length: int = 32) -> Stream:
    sources, tokenizer = find_sources([SAMPLE]), load_tokenizer("bytes")
    shards = tokenise(sources, tokenizer, objective, cache=cache, reading=Reading(text_field="text"))
    return make_stream(shards, [None], tokenizer, objective, seq_length=length, seed=0)


@pytest.fixture(scope="module")
def single(meshloom: Meshloom, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("single") / "run"
    result = meshloom(*SAME, *HELD, "--plan", "dp1", "--out", str(folder))
    assert result.returncode == 0, result.stderr
    assert "evaluation on 30 sequences, 960 tokens, every 2 steps and at the end" in result.stdout
    assert "eval loss" in result.stdout.splitlines()[-1]
    return folder


@pytest.mark.parametrize(("plan", "batch"), [("dp2", "2"), ("tp2.pp2", "4"), ("tp2.sp", "4"), ("pp2", "4")])
def test_the_eval_loss_is_that_of_one_rank(
    single: Path, tmp_path: Path, meshloom: Meshloom, plan: str, batch: str
) -> None:
    result = meshloom(*SAME, *HELD, "--plan", plan, "--batch-size", batch, "--out", str(tmp_path / "run"))
    assert result.returncode == 0, result.stderr
    expected = {line["step"]: line["eval_loss"] for line in _lines(single) if "eval_loss" in line}
    found = {line["step"]: line["eval_loss"] for line in _lines(tmp_path / "run") if "eval_loss" in line}
    assert list(expected) == [1, 3, 4]
    assert found == pytest.approx(expected, rel=2e-5)


def test_evaluation_leaves_no_trace_in_training(single: Path, tmp_path: Path, meshloom: Meshloom) -> None:
    rare = ("--eval-fraction", "0.1", "--eval-steps", "5", "--plan", "dp1")
    result = meshloom(*SAME, *rare, "--out", str(tmp_path / "run"))
    assert result.returncode == 0, result.stderr
    assert [line["loss"] for line in _lines(tmp_path / "run")] == [line["loss"] for line in _lines(single)]


def test_the_best_model_has_the_best_loss(single: Path, tmp_path: Path) -> None:
    best = single / "checkpoints" / "best_model"
    told = json.loads((best / "training_info.json").read_text())
    lines = {line["step"] + 1: line["eval_loss"] for line in _lines(single) if "eval_loss" in line}
    assert (told["step"], told["eval_loss"]) == min(lines.items(), key=lambda item: item[1])
    _, held = hold_out(_stream(tmp_path, "causal"), 0.1)
    sequences = Sequences(held)
    model = AutoModelForCausalLM.from_pretrained(best).eval()
    total = 0.0
    with torch.no_grad():
        for number in range(len(sequences)):
            ids = torch.from_numpy(sequences.once(number)["input_ids"])[None]
            logits = model(input_ids=ids).logits[0, :-1].double()
            total += float(nn.functional.cross_entropy(logits, ids[0, 1:], reduction="mean"))
    assert total / len(sequences) == pytest.approx(told["eval_loss"], rel=1e-5)


@pytest.mark.parametrize("batch_size", [1, 7, 64])
def test_tokens_weigh_alike_whatever_the_batch(tmp_path: Path, batch_size: int) -> None:
    """Masked sequences have unequal numbers of labels, so a mean of means would be another number."""
    stream = _stream(tmp_path, "masked", length=64)
    torch.manual_seed(0)
    model = BertForMaskedLM(
        BertConfig(vocab_size=264, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64)
    )
    model.train()
    sequences = Sequences(stream)
    losses, means = [], []
    with torch.no_grad():
        model.eval()
        for number in range(len(sequences)):
            row = {name: torch.from_numpy(value)[None] for name, value in sequences.once(number).items()}
            logits = model(input_ids=row["input_ids"], attention_mask=row["attention_mask"]).logits[0].double()
            of_one = nn.functional.cross_entropy(logits, row["labels"][0], reduction="none", ignore_index=-100)
            losses.append(of_one[row["labels"][0] != -100])
            means.append(losses[-1].mean())
        model.train()
    expected = float(torch.cat(losses).mean())
    with rank_context("cpu") as device:
        evaluator = Evaluator(
            Evaluation(stream=stream, steps=1), model=model, objective="masked", batch_size=batch_size,
            mesh=make_mesh(Plan(), device), precision="fp32",
        )  # fmt: skip
        found = evaluator.loss()
    assert found == pytest.approx(expected, rel=1e-6)
    assert abs(float(torch.stack(means).mean()) - expected) > 1e-5 * expected
    assert model.training


@pytest.mark.parametrize("objective", ["causal", "masked"])
def test_what_is_held_out_is_not_trained_on(tmp_path: Path, objective: Any) -> None:
    stream = _stream(tmp_path, objective)
    in_all = Sequences(stream)
    kept, held = (Sequences(part) for part in hold_out(stream, 0.25))

    def rows(sequences: Sequences) -> set[bytes]:
        reader = sequences._readers[0]  # before masking, which draws by number
        return {reader.row(number)["input_ids"].tobytes() for number in range(len(sequences))}

    assert len(kept) + len(held) == len(in_all)
    assert len(held) == round(len(in_all) / 4)
    assert rows(kept) | rows(held) == rows(in_all)
    assert not rows(kept) & rows(held)
    epoch = {kept.row(number)["input_ids"].tobytes() for number in range(2 * len(kept))}
    assert objective == "masked" or epoch == rows(kept)


def test_epochs_are_told_in_tokens_and_have_each_sequence_once(tmp_path: Path, meshloom: Meshloom) -> None:
    given = ("train", "--model", "gpt2-tiny", "--tokenizer", "bytes", "--data", "sample", "--seq-length", "128",
             "--batch-size", "8", "--plan", "dp2", "--train", "--out", str(tmp_path / "run"))  # fmt: skip
    result = meshloom(*given)
    assert result.returncode == 0, result.stderr
    # 75 sequences, 16 a step
    assert "1 epoch of 9,600 tokens (75 sequences): 5 steps of 2,048 tokens, 10,240 in all" in result.stdout
    assert len(_lines(tmp_path / "run")) == 5
    assert json.loads((tmp_path / "run" / "run.json").read_text())["command"]["max_steps"] == 5
