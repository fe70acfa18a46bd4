"""Batches: what is in them, and that they depend on the number of a sequence alone."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from collections.abc import Callable, Sequence
from importlib import resources
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from meshloom.errors import DataError
from meshloom.model.config import load_config, load_tokenizer
from meshloom.train.data import Sequences, Stream, _cut, batches, check_tokenizer, make_stream
from meshloom.train.shards import tokenise
from meshloom.train.sources import Reading, find_sources

MakeStream = Callable[..., Stream]


@pytest.fixture
def stream(tmp_path: Path) -> MakeStream:
    """A stream of `--data` texts, tokenised into a cache of the test's own."""

    def make(
        *data: str, objective: Any = "causal", tokenizer: Any = None, seq_length: int = 48, seed: int = 3
    ) -> Stream:
        tokenizer = tokenizer or load_tokenizer("bytes")
        sources = find_sources(data)
        shards = tokenise(sources, tokenizer, objective, cache=tmp_path / "cache", reading=Reading())
        weights = [source.weight for source in sources]
        return make_stream(shards, weights, tokenizer, objective, seq_length=seq_length, seed=seed)

    return make


def _lines(path: Path, texts: Sequence[str]) -> str:
    path.write_text("".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts), encoding="utf-8")
    return str(path)


@pytest.mark.parametrize("objective", ["causal", "masked"])
def test_the_global_batch_does_not_depend_on_the_number_of_ranks(stream: MakeStream, objective: str) -> None:
    made = stream("sample", objective=objective)

    def part(rank: int, num_ranks: int, batch_size: int, first: int = 0) -> list[dict[str, torch.Tensor]]:
        every = batches(made, rank=rank, num_ranks=num_ranks, batch_size=batch_size, first_sequence=first)
        return [dict(batch) for batch in islice(every, 120)]

    whole = part(0, 1, 4)
    assert 2 * made.num_sequences < 120 * 4, "more than two epochs"
    parts = [part(rank, 2, 2) for rank in range(2)]
    for step, batch in enumerate(whole):
        for name, tensor in batch.items():
            joined = torch.stack([parts[row % 2][step][name][row // 2] for row in range(4)])
            assert torch.equal(joined, tensor)
            assert tensor.dtype == torch.int64
    # a run that stopped after 37 steps on two ranks, goes on with one, or with four
    for num_ranks in (1, 4):
        again = [part(rank, num_ranks, 4 // num_ranks, first=37 * 4) for rank in range(num_ranks)]
        for step, batch in enumerate(whole[37:]):
            for name, tensor in batch.items():
                rows = [again[row % num_ranks][step][name][row // num_ranks] for row in range(4)]
                assert torch.equal(torch.stack(rows), tensor)


@pytest.mark.parametrize("objective", ["causal", "masked"])
def test_an_epoch_holds_every_sequence_once_and_the_next_in_another_order(
    stream: MakeStream, tmp_path: Path, objective: str
) -> None:
    data = _lines(tmp_path / "한글.jsonl", [f"{number:05d} 가나다" for number in range(5000)])
    made = stream(data, "sample", objective=objective, seq_length=64)
    plain = Sequences(made)

    def content(number: int) -> tuple[int, ...]:
        row = plain.row(number)
        labels = row["labels"]
        ids = row["input_ids"].copy()
        ids[labels != -100] = labels[labels != -100]
        return tuple(ids.tolist())

    epochs = [[content(epoch * made.num_sequences + index) for index in range(made.num_sequences)] for epoch in (0, 1)]
    assert made.num_sequences > 1024, "more than a block of places"
    assert Counter(epochs[0]) == Counter(epochs[1])
    assert max(Counter(epochs[0]).values()) == 1
    same = sum(first == second for first, second in zip(*epochs))
    assert same < 10, "a permutation leaves one place in its place on average"
    other = Sequences(stream(data, "sample", objective=objective, seq_length=64, seed=4))
    assert any((plain.row(index)["input_ids"] != other.row(index)["input_ids"]).any() for index in range(3))


def test_causal_sequences_are_the_whole_text_once(stream: MakeStream, tmp_path: Path) -> None:
    texts = [f"{number}번 문서: 한글은 세종대왕이 만든 글자이다. " + "ㅋ" * (number % 50) for number in range(300)]
    tokenizer = load_tokenizer("bytes")
    made = stream(_lines(tmp_path / "a.jsonl", texts), seq_length=7)
    sequences = Sequences(made)
    rows = [sequences.row(index) for index in range(made.num_sequences)]
    assert all((row["input_ids"] == row["labels"]).all() for row in rows)
    pieces = {tuple(row["input_ids"].tolist()) for row in rows}
    ids = [token for text in texts for token in [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]]
    assert pieces == {tuple(ids[begin : begin + 7]) for begin in range(0, len(ids) - 6, 7)}


def test_text_runs_on_from_shard_to_shard(stream: MakeStream, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = ["가" * 5, "나" * 6, "다" * 7, "라" * 8, "마" * 2]
    folder = tmp_path / "data"
    folder.mkdir()
    for number, text in enumerate(texts):
        _lines(folder / f"{number}.jsonl", [text])
    one = stream(str(folder), seq_length=10)
    monkeypatch.setattr("meshloom.train.shards._SMALL", 0)
    apart = stream(str(folder), seq_length=10)
    assert [len(made.parts[0].shards) for made in (one, apart)] == [1, 5]
    assert one.num_sequences == apart.num_sequences == (28 * 3 + 5) // 10
    for index in range(one.num_sequences):
        assert (Sequences(one).row(index)["input_ids"] == Sequences(apart).row(index)["input_ids"]).all()


def test_shares_decide_how_often_a_source_comes(stream: MakeStream, tmp_path: Path) -> None:
    ko = _lines(tmp_path / "ko.jsonl", ["가" * 100] * 40)
    en = _lines(tmp_path / "en.jsonl", ["a" * 100] * 400)
    made = stream(f"{ko}:0.7", f"{en}:0.3", seq_length=16)
    sequences = Sequences(made)
    rows = [sequences.row(index)["input_ids"] for index in range(1000)]
    letter = load_tokenizer("bytes")("a")["input_ids"][0]
    korean = [bool((row != letter).sum() > 8) for row in rows]
    assert sum(korean) == 700
    for begin in range(0, 1000, 100):
        assert abs(sum(korean[begin : begin + 100]) - 70) <= 1


def test_masking_follows_bert(stream: MakeStream) -> None:
    tokenizer = load_tokenizer("bytes")
    made = batches(stream("sample", objective="masked", seq_length=128), batch_size=64, rank=0, num_ranks=1)
    chosen = masked = kept = total = 0
    for batch in islice(made, 20):
        labels, ids = batch["labels"], batch["input_ids"]
        here = labels != -100
        whole = torch.where(here, labels, ids)
        special = (whole == tokenizer.cls_token_id) | (whole == tokenizer.sep_token_id) | (batch["attention_mask"] == 0)
        assert not (here & special).any()
        assert here.any(dim=1).all()
        assert (labels[here] < 256).all(), "only text is predicted, never special tokens"
        assert (whole[:, 0] == tokenizer.cls_token_id).all()
        assert ((whole == tokenizer.sep_token_id).sum(dim=1) == 2).all()
        assert (ids[batch["attention_mask"] == 0] == tokenizer.pad_token_id).all()
        chosen += int(here.sum())
        masked += int((ids[here] == tokenizer.mask_token_id).sum())
        kept += int((ids[here] == labels[here]).sum())
        total += int((~special).sum())
    assert chosen / total == pytest.approx(0.15, abs=0.01)
    assert masked / chosen == pytest.approx(0.8, abs=0.02)
    assert kept / chosen == pytest.approx(0.1, abs=0.02)


def test_other_text_is_packed_between_cls_and_sep(stream: MakeStream, tmp_path: Path) -> None:
    tokenizer = load_tokenizer("bytes")
    data = _lines(tmp_path / "a.jsonl", ["가나다라", "마바사"] * 50)
    made = stream(data, objective="masked", seq_length=16)
    row = Sequences(made).row(0)
    whole = row["input_ids"].copy()
    whole[row["labels"] != -100] = row["labels"][row["labels"] != -100]
    assert whole[0] == tokenizer.cls_token_id
    assert whole[-1] == tokenizer.sep_token_id
    assert row["attention_mask"].all()
    assert made.num_sequences == 50 * (7 * 3 + 2) // 14


@settings(deadline=None)
@given(st.integers(0, 40), st.integers(0, 40), st.integers(1, 50))
def test_pairs_are_cut_as_hf_cuts_them(first: int, second: int, room: int) -> None:
    tokenizer = load_tokenizer("bytes")
    want = tokenizer("a" * first, "b" * second, truncation=True, max_length=room, add_special_tokens=False)
    letters = tokenizer.decode(want["input_ids"])
    assert _cut(first, second, room) == (letters.count("a"), letters.count("b"))


def test_data_that_holds_not_one_sequence(stream: MakeStream, tmp_path: Path) -> None:
    short, long = _lines(tmp_path / "a.jsonl", ["ab"]), _lines(tmp_path / "b.jsonl", ["ab" * 500])
    with pytest.raises(DataError, match="at least one sequence of 100 tokens"):
        stream(short, seq_length=100)
    with pytest.raises(DataError, match=r"a\.jsonl: expected at least one sequence of 100"):
        stream(f"{short}:1", f"{long}:1", seq_length=100)
    assert stream(short, long, seq_length=100).num_sequences == 10
    with pytest.raises(DataError, match="expected more than 3"):
        stream(long, objective="masked", seq_length=3)


def test_a_vocabulary_that_is_too_large() -> None:
    config = load_config("gpt2-tiny")
    config.vocab_size = 200
    with pytest.raises(DataError, match="at most 200 tokens, which is the model's vocabulary, got 262"):
        check_tokenizer(load_tokenizer("bytes"), config, "causal")


@pytest.mark.parametrize(("objective", "missing"), [("causal", "eos_token"), ("masked", "mask_token")])
def test_a_tokenizer_that_lacks_what_is_needed(objective: str, missing: str) -> None:
    tokenizer = load_tokenizer("bytes")
    setattr(tokenizer, missing, None)
    with pytest.raises(DataError, match=f"expected a {missing}, which a {objective} model needs"):
        check_tokenizer(tokenizer, load_config("gpt2-tiny"), objective)


def test_the_sample_is_sound() -> None:
    table = json.loads((resources.files("meshloom") / "data" / "squad-sample.json").read_text(encoding="utf-8"))
    paragraphs = [paragraph for article in table["data"] for paragraph in article["paragraphs"]]
    assert len(paragraphs) >= 30
    for paragraph in paragraphs:
        for question in paragraph["qas"]:
            for answer in question["answers"]:
                begin = answer["answer_start"]
                assert paragraph["context"][begin : begin + len(answer["text"])] == answer["text"]


@pytest.mark.shared
def test_real_squad_and_the_original_vocabularies(shared: Path, stream: MakeStream) -> None:
    squad = str(shared / "squad" / "squad-v1.1-dev.rebuilt.json.gz")
    gpt2 = load_tokenizer(str(shared / "tokenizers" / "gpt2"))
    assert gpt2("Hello world")["input_ids"] == [15496, 995]
    packed = stream(squad, tokenizer=gpt2, seq_length=256)
    assert packed.num_documents == 10_570
    text = gpt2.decode(Sequences(packed).row(0)["input_ids"])
    assert "<|endoftext|>" in text
    bert = load_tokenizer(str(shared / "tokenizers" / "bert-base-uncased"))
    pairs = stream(squad, tokenizer=bert, objective="masked", seq_length=64)
    assert pairs.num_sequences == 10_570
    table = {
        tuple(bert(question["question"], paragraph["context"], truncation=True, max_length=64, padding="max_length",
                   verbose=False)["input_ids"])
        for article in _squad(squad)["data"][:2]
        for paragraph in article["paragraphs"]
        for question in paragraph["qas"]
    }  # fmt: skip
    found = set()
    rows = Sequences(pairs)
    for index in range(pairs.num_sequences):
        row = rows.row(index)
        whole = row["input_ids"].copy()
        whole[row["labels"] != -100] = row["labels"][row["labels"] != -100]
        found.add(tuple(whole.tolist()))
    assert table <= found, "every pair is what HF's own tokenizer makes of it"


def _squad(path: str) -> Any:
    return json.loads(gzip.decompress(Path(path).read_bytes()))
