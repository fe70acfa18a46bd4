"""Batches: what is in them, and that they do not depend on how many ranks share them."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import pytest
import torch

from meshloom.errors import DataError
from meshloom.model.config import load_config, load_tokenizer
from meshloom.train.data import Document, batches, check_tokenizer, load_squad

SIZES = {"seq_length": 48, "seed": 3}


@pytest.mark.parametrize("objective", ["causal", "masked"])
def test_the_global_batch_does_not_depend_on_the_number_of_ranks(objective: str) -> None:
    documents, tokenizer = load_squad("sample"), load_tokenizer("bytes")

    def stream(rank: int, num_ranks: int, batch_size: int, count: int) -> list[dict[str, torch.Tensor]]:
        made = batches(documents, tokenizer, objective, rank=rank, num_ranks=num_ranks, batch_size=batch_size, **SIZES)
        return [dict(batch) for batch in islice(made, count)]

    whole = stream(0, 1, 4, 30)  # more than an epoch
    parts = [stream(rank, 2, 2, 30) for rank in range(2)]
    for step, batch in enumerate(whole):
        for name, tensor in batch.items():
            joined = torch.stack([parts[row % 2][step][name][row // 2] for row in range(4)])
            assert torch.equal(joined, tensor)


def test_causal_sequences_are_the_packed_text() -> None:
    tokenizer = load_tokenizer("bytes")
    documents = [
        Document(question="누가?", context="한글은 세종대왕이 만든 글자이다."),
        Document(question="a?", context="b"),
    ]
    (batch,) = islice(
        batches(documents, tokenizer, "causal", batch_size=1, rank=0, num_ranks=1, seq_length=20, seed=0), 1
    )
    assert torch.equal(batch["input_ids"], batch["labels"])
    whole = {f"{document.question} {document.context}" for document in documents}
    text = tokenizer.decode(batch["input_ids"][0]).split(tokenizer.eos_token)
    assert any(known.startswith(text[0].rstrip("\ufffd")) for known in whole)


def test_masking_follows_bert() -> None:
    tokenizer = load_tokenizer("bytes")
    documents = load_squad("sample")
    made = batches(documents, tokenizer, "masked", batch_size=64, rank=0, num_ranks=1, seq_length=128, seed=0)
    chosen = masked = kept = total = 0
    for batch in islice(made, 20):
        labels, ids = batch["labels"], batch["input_ids"]
        here = labels != -100
        special = (ids == tokenizer.cls_token_id) | (ids == tokenizer.sep_token_id) | (batch["attention_mask"] == 0)
        assert not (here & special & (ids != tokenizer.mask_token_id) & (labels == ids)).any()
        assert here.any(dim=1).all()
        assert (labels[here] < 256).all(), "only text is predicted, never special tokens"
        chosen += int(here.sum())
        masked += int((ids[here] == tokenizer.mask_token_id).sum())
        kept += int((ids[here] == labels[here]).sum())
        total += int((~special).sum())
    assert chosen / total == pytest.approx(0.15, abs=0.01)
    assert masked / chosen == pytest.approx(0.8, abs=0.02)
    assert kept / chosen == pytest.approx(0.1, abs=0.02)


def test_documents_that_hold_not_one_sequence() -> None:
    made = batches([Document(question="a", context="b")], load_tokenizer("bytes"), "causal", batch_size=1, rank=0,
                   num_ranks=1, seq_length=100, seed=0)  # fmt: skip
    with pytest.raises(DataError, match="at least one sequence of 100 tokens"):
        next(made)


def test_a_vocabulary_that_is_too_large() -> None:
    config = load_config("gpt2-tiny")
    config.vocab_size = 200
    with pytest.raises(DataError, match="at most 200 tokens, which is the model's vocabulary, got 262"):
        check_tokenizer(load_tokenizer("bytes"), config, "causal")


def test_the_sample_is_sound() -> None:
    import json
    from importlib import resources

    table = json.loads((resources.files("meshloom") / "data" / "squad-sample.json").read_text(encoding="utf-8"))
    paragraphs = [paragraph for article in table["data"] for paragraph in article["paragraphs"]]
    assert len(paragraphs) >= 30
    for paragraph in paragraphs:
        for question in paragraph["qas"]:
            for answer in question["answers"]:
                begin = answer["answer_start"]
                assert paragraph["context"][begin : begin + len(answer["text"])] == answer["text"]


@pytest.mark.shared
def test_real_squad_and_the_original_vocabularies(shared: Path) -> None:
    documents = load_squad(str(shared / "squad" / "squad-v1.1-dev.rebuilt.json.gz"))
    assert len(documents) == 10_570
    gpt2 = load_tokenizer(str(shared / "tokenizers" / "gpt2"))
    assert gpt2("Hello world")["input_ids"] == [15496, 995]
    bert = load_tokenizer(str(shared / "tokenizers" / "bert-base-uncased"))
    made = batches(documents, bert, "masked", batch_size=2, rank=0, num_ranks=1, seq_length=64, seed=0)
    batch = next(made)
    assert (batch["input_ids"][:, 0] == 101).all()
    assert ((batch["input_ids"] == 102).sum(1) >= 1).all()
