"""The cache of tokenised data: what is in it, what makes it anew, and who makes it."""

from __future__ import annotations

import errno
import itertools
import json
import multiprocessing
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from meshloom.errors import DataError, FolderError, RunFailed
from meshloom.model.config import load_tokenizer
from meshloom.train import shards
from meshloom.train.apart import run_apart
from meshloom.train.shards import Shard, tokenise
from meshloom.train.sources import Reading, find_sources

TEXTS = ["한글은 세종대왕이 만든 글자이다.", "second document", "셋째 🦊"] * 40


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "자료.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return path


class Calls:
    """Counts how often shards had to be made."""

    made = 0

    def __call__(self, make: Callable[[], None]) -> None:
        self.made += 1
        make()


def _tokenise(
    data: Path | str, run: Any = None, tokenizer: Any = None, objective: Any = "causal", **more: Any
) -> Shard:
    cache = more.pop("cache", None) or Path(data).parent / "cache"
    ((shard,),) = tokenise(
        find_sources([str(data)]), tokenizer or load_tokenizer("bytes"), objective, cache=cache,
        reading=Reading(**more), run=run or Calls(),
    )  # fmt: skip
    return shard


def test_documents_are_on_disk_with_their_ends(data: Path) -> None:
    shard, tokenizer = _tokenise(data), load_tokenizer("bytes")
    ids, ends = shard.tokens(), shard.ends()
    assert ids.dtype == np.uint16
    assert len(ends) == shard.num_documents == len(TEXTS)
    begin = 0
    for text, end in zip(TEXTS, ends.tolist()):
        assert ids[end - 1] == tokenizer.eos_token_id
        assert tokenizer.decode(ids[begin : end - 1].tolist()) == text
        begin = end
    assert begin == len(ids) == shard.num_tokens


def test_large_vocabularies_take_four_bytes(data: Path) -> None:
    tokenizer = load_tokenizer("bytes")
    small = _tokenise(data, tokenizer=tokenizer)
    tokenizer.add_tokens([f"<{number}>" for number in range(70_000)] + ["세종대왕"])
    large = _tokenise(data, tokenizer=tokenizer)
    assert large.dtype == "uint32"
    assert large.folder != small.folder
    assert int(large.tokens().max()) > 70_000


def test_pairs_keep_question_and_context_whole(tmp_path: Path) -> None:
    tokenizer = load_tokenizer("bytes")
    shard = _tokenise("sample", objective="masked", cache=tmp_path)
    assert shard.layout == "pairs"
    assert shard.num_segments == 2 * 47
    ends = shard.ends().tolist()
    first = tokenizer.decode(shard.tokens()[: ends[0]].tolist())
    second = tokenizer.decode(shard.tokens()[ends[0] : ends[1]].tolist())
    assert first.endswith("?")
    assert len(second) > len(first)


def test_squad_as_text_does_not_repeat_a_paragraph_at_once(tmp_path: Path) -> None:
    tokenizer = load_tokenizer("bytes")
    shard = _tokenise("sample", cache=tmp_path)
    texts = tokenizer.decode(shard.tokens().tolist()).split(tokenizer.eos_token)[:-1]
    contexts = [text.partition("? ")[2] for text in texts]
    assert len(contexts) == 47
    assert sum(first == second for first, second in itertools.pairwise(contexts)) < 8


def test_what_makes_it_anew(data: Path, tmp_path: Path) -> None:
    calls = Calls()
    first = _tokenise(data, calls)
    assert _tokenise(data, calls) == first
    shutil.copy(data, tmp_path / "copy.jsonl")
    assert _tokenise(tmp_path / "copy.jsonl", calls).folder == first.folder, "content counts, not the name"
    assert calls.made == 1
    _tokenise(data, calls, text_field="text", skip_bad_lines=True)
    _tokenise(data, calls, objective="masked")
    other = load_tokenizer("bytes")
    other.add_tokens(["세종"])
    _tokenise(data, calls, tokenizer=other)
    assert calls.made == 4
    other("x", truncation=True, max_length=2, padding="max_length")
    again = _tokenise(data, calls, tokenizer=other)
    assert calls.made == 4, "what a tokenizer was used for last does not count"
    assert len(again.ends()) == len(TEXTS)
    content = data.read_text()
    data.write_text(content.replace("second", "sec0nd"))
    assert _tokenise(data, calls).folder != first.folder
    assert calls.made == 5


def test_a_large_file_is_hashed_again_only_if_it_changed(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "_LARGE", 1)
    first = _tokenise(data)
    assert len(list((data.parent / "cache" / "hashes").iterdir())) == 1
    assert _tokenise(data).folder == first.folder
    data.write_text(data.read_text() + json.dumps({"text": "more"}) + "\n")
    assert _tokenise(data).num_documents == len(TEXTS) + 1


@pytest.mark.parametrize("damage", ["tokens.bin", "index.json", "ends.npy", "cut"])
def test_what_is_not_whole_is_made_again(data: Path, damage: str) -> None:
    calls = Calls()
    shard = _tokenise(data, calls)
    folder = Path(shard.folder)
    if damage == "cut":
        os.truncate(folder / "tokens.bin", 100)
    else:
        (folder / damage).unlink()
    part = folder.with_suffix(".part")
    part.mkdir()
    (part / "tokens.bin").write_bytes(b"what a killed process left")
    again = _tokenise(data, calls)
    assert calls.made == 2
    assert len(again.tokens()) == shard.num_tokens
    assert not part.exists()


def test_bad_lines_are_told_from_the_cache_too(data: Path) -> None:
    data.write_text(data.read_text() + "{broken\n")
    with pytest.raises(DataError, match=f"line {len(TEXTS) + 1}"):
        _tokenise(data)
    assert not list((data.parent / "cache" / "tokens").glob("*/")), "nothing half made is left"
    for _ in range(2):
        shard = _tokenise(data, skip_bad_lines=True)
        assert shard.num_bad == 1
        assert f"line {len(TEXTS) + 1}" in shard.first_bad


def test_a_full_disk_is_one_line(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(FolderError, match="the disk is full; expected about 2 bytes for each token"):
        _tokenise(data)
    assert not list((data.parent / "cache" / "tokens").glob("*.part"))


def test_a_cache_that_cannot_be_written(data: Path) -> None:
    (data.parent / "file").write_text("")
    with pytest.raises(FolderError, match="choose another --cache-dir"):
        _tokenise(data, cache=data.parent / "file" / "cache")


def _one_of_many(data: Path, told: Any) -> None:
    """Count how often this process builds, while others ask for the same."""
    made = []
    build = shards._build

    def counted(*arguments: Any) -> Shard:
        made.append(1)
        return build(*arguments)

    shards._build = counted
    shard = _tokenise(data)
    told.put((len(made), shard.num_tokens, int(shard.tokens().sum())))


def test_one_process_makes_it_while_others_wait(data: Path) -> None:
    context = multiprocessing.get_context("fork")
    told = context.Queue()
    several = [context.Process(target=_one_of_many, args=(data, told)) for _ in range(4)]
    for process in several:
        process.start()
    answers = [told.get(timeout=120) for _ in several]
    for process in several:
        process.join()
    assert sum(made for made, *_ in answers) == 1
    assert len({tuple(what) for _, *what in answers}) == 1


def test_a_tokenizer_in_python_gives_the_same(data: Path) -> None:
    class Slow:
        def __init__(self) -> None:
            self._inner = load_tokenizer("bytes")
            self.eos_token_id = self._inner.eos_token_id

        def __len__(self) -> int:
            return len(self._inner)

        def get_vocab(self) -> Any:
            return self._inner.get_vocab()

        def __call__(self, texts: list[str], **options: Any) -> Any:
            return self._inner(texts, **options)

    fast, slow = _tokenise(data), _tokenise(data, tokenizer=Slow())
    assert fast.folder != slow.folder
    assert (fast.tokens() == slow.tokens()).all()


def test_progress_ends_at_one(data: Path) -> None:
    seen: list[tuple[str, float]] = []

    @contextmanager
    def bar() -> Iterator[Any]:
        yield lambda name, share: seen.append((name, share))

    tokenise(
        find_sources([str(data)]),
        load_tokenizer("bytes"),
        "causal",
        cache=data.parent / "c",
        reading=Reading(),
        bar=bar,
    )
    assert seen[-1] == (str(data), 1.0)


def test_a_process_apart(tmp_path: Path) -> None:
    def fail() -> None:
        raise DataError("자료: expected something else")

    def crash() -> None:
        raise ZeroDivisionError("no")

    def die() -> None:
        os.kill(os.getpid(), 9)

    run_apart(lambda: (tmp_path / "done").touch())
    assert (tmp_path / "done").exists()
    with pytest.raises(DataError, match="자료: expected something else"):
        run_apart(fail)
    with pytest.raises(RunFailed, match="ZeroDivisionError: no"):
        run_apart(crash)
    with pytest.raises(RunFailed, match="SIGKILL"):
        run_apart(die)
    before = os.getpid()
    run_apart(lambda: (tmp_path / "pid").write_text(str(os.getpid())))  # type: ignore[arg-type, return-value]
    assert (tmp_path / "pid").read_text() != str(before)
