"""`tokenizer train`: folders that HF opens, text that comes back whole, Korean among it."""

from __future__ import annotations

import json
import unicodedata
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meshloom.errors import DataError, UsageError
from meshloom.model.config import load_tokenizer
from meshloom.train.sources import Reading, find_sources
from meshloom.train.vocabulary import SPECIAL, train_tokenizer
from tests.conftest import Meshloom

KOREAN = [
    "한글은 세종대왕이 만든 글자이다. 백성이 쉽게 배우도록 하였다.",
    "나랏말싸미 듕귁에 달아 문자와로 서르 사맛디 아니할쎄",
    "2026년 11월 21일, 값은 12,345원이며 할인율은 7%이다.",
    "우리는 한글을 배우고, 한글로 글을 쓰고, 한글로 생각한다.",
] * 20
UNSEEN = ["궳뷁쀍", "naïve ☃ 🦊", "漢字와 かな", "  두 칸\n\n\t탭 ", "ㅋㅋㅋㅠㅠ", "line\r\nend", "\x00\x7f"]


@pytest.fixture(scope="module", params=["bpe", "unigram"])
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Any]:
    folder = tmp_path_factory.mktemp("어휘")
    data = folder / "말뭉치.jsonl"
    data.write_text("".join(json.dumps({"본문": text}, ensure_ascii=False) + "\n" for text in KOREAN), encoding="utf-8")
    out = folder / "tokenizer"
    size, num_bad = train_tokenizer(
        find_sources([str(data)]), out, vocab_size=400, kind=request.param, reading=Reading(text_field="본문")
    )
    assert num_bad == 0
    assert size == 400 if request.param == "bpe" else 300 < size <= 400, "unigram keeps what is worth its place"
    return request.param, load_tokenizer(str(out))


def test_hf_opens_it(trained: tuple[str, Any]) -> None:
    _, tokenizer = trained
    assert 300 < len(tokenizer) <= 400
    for name, token in SPECIAL.items():
        assert getattr(tokenizer, name) == token
        assert tokenizer.convert_tokens_to_ids(token) < len(SPECIAL)
    assert tokenizer("한글")["input_ids"] == tokenizer("한글", add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("text", [*KOREAN[:4], *UNSEEN])
def test_text_comes_back_whole(trained: tuple[str, Any], text: str) -> None:
    _, tokenizer = trained
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.unk_token_id not in ids
    assert tokenizer.decode(ids) == unicodedata.normalize("NFC", text)


@settings(deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"], exclude_characters="▁"), max_size=40))
def test_any_text_comes_back_whole(trained: tuple[str, Any], text: str) -> None:
    _, tokenizer = trained
    if any(token in text for token in SPECIAL.values()):
        return
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == unicodedata.normalize("NFC", text)


def test_hangul_of_any_system_is_the_same(trained: tuple[str, Any]) -> None:
    _, tokenizer = trained
    text = "세종대왕이 만든 한글"
    assert tokenizer(unicodedata.normalize("NFD", text))["input_ids"] == tokenizer(text)["input_ids"]


def test_digits_stand_alone_and_korean_is_learnt(trained: tuple[str, Any]) -> None:
    kind, tokenizer = trained
    numbers = tokenizer.tokenize("12345")
    assert [token.strip("▁") for token in numbers if token.strip("▁")] == list("12345")
    text = "한글은 세종대왕이 만든 글자이다."
    assert len(tokenizer(text)["input_ids"]) < len(text) < len(text.encode()), kind


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_a_short_text_gives_a_small_vocabulary(tmp_path: Path, kind: Any) -> None:
    (tmp_path / "a.txt").write_text("가나다 가나다 라마바 라마바 가나다")
    size, _ = train_tokenizer(
        find_sources([str(tmp_path / "a.txt")]), tmp_path / "out", vocab_size=5000, kind=kind, reading=Reading()
    )
    assert 262 < size < 300
    assert len(load_tokenizer(str(tmp_path / "out"))) == size


def test_mistakes(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="expected at least 262, the bytes and the 6 special tokens"):
        train_tokenizer(find_sources(["sample"]), tmp_path / "out", vocab_size=261, kind="bpe", reading=Reading())
    (tmp_path / "b.txt").write_text("".join(chr(0xAC00 + number) for number in range(300)))
    with pytest.raises(DataError, match="expected a larger --vocab-size"):
        train_tokenizer(
            find_sources([str(tmp_path / "b.txt")]), tmp_path / "out", vocab_size=500, kind="unigram", reading=Reading()
        )
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n{broken\n')
    with pytest.raises(DataError, match=r"a\.jsonl, line 2"):
        train_tokenizer(
            find_sources([str(tmp_path / "a.jsonl")]), tmp_path / "out", vocab_size=300, kind="bpe", reading=Reading()
        )
    assert not (tmp_path / "out").exists()


def test_the_command_and_training_with_what_it_made(tmp_path: Path, meshloom: Meshloom) -> None:
    data = tmp_path / "말뭉치.txt"
    data.write_text("\n\n".join(KOREAN), encoding="utf-8")
    out = tmp_path / "내 토크나이저"
    made = meshloom("tokenizer", "train", "--data", str(data), "--vocab-size", "300", "--out", str(out), "--json")
    assert made.returncode == 0, made.stderr
    assert json.loads(made.stdout)["vocab_size"] == 300
    arguments = ["train", "--model", "gpt2-tiny", "--data", str(data), "--tokenizer", str(out), "--seq-length", "32"]
    told = meshloom(*arguments, "--max-steps", "2", "--out", str(tmp_path / "run"))
    assert told.returncode == 2
    assert "expected at most 264 tokens, which is the model's vocabulary, got 300" in told.stderr
    assert not (tmp_path / "run").exists()
