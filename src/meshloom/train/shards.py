"""Tokenised once: documents as token ids in files that are mapped into memory, kept in a cache by what made them.

A shard is a folder: `tokens.bin` (ids of all segments, joined), `ends.npy` (where each segment ends), `index.json`.
Its name is a hash of the content of its files, the tokenizer, the layout and how documents are read. It is made in a
folder of its own and renamed when it is whole; a lock lets one process make it while others of the host wait.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import shutil
from array import array
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import IO, Any, Literal

import msgspec
import numpy as np

from meshloom.errors import DataError, FolderError
from meshloom.model.config import Objective
from meshloom.train.order import permuted
from meshloom.train.readers import holds_pairs, hub_rows, read
from meshloom.train.sources import SAMPLE, Document, File, Pair, Reading, Source, Tally

# text: a segment is a document with the token that ends it.  pairs: question and context take turns, without any.
Layout = Literal["text", "pairs"]
Encode = Callable[[list[str]], list[list[int]]]
Progress = Callable[[str, float], None]  # told what is tokenised, and the share of it that is done

_VERSION = 1  # of this layout: another one makes all of the cache again
_SMALL = 16 << 20  # files of a folder below this are tokenised together
_LARGE = 64 << 20  # files from this on are hashed again only if their time or size changed
_CHUNK = 1 << 19  # characters encoded at a time; what comes of much more falls out of the processor's caches


class Shard(msgspec.Struct, frozen=True, kw_only=True):
    """Tokenised documents on disk, and what came up while they were read."""

    folder: str
    name: str
    layout: Layout
    dtype: str
    num_tokens: int
    num_segments: int
    num_documents: int
    num_empty: int
    num_bad: int
    first_bad: str

    def tokens(self) -> np.ndarray[Any, Any]:
        """All ids, mapped into memory: (num_tokens,)."""
        if not self.num_tokens:
            return np.zeros(0, self.dtype)
        return np.asarray(np.memmap(Path(self.folder) / "tokens.bin", self.dtype, mode="r"))

    def ends(self) -> np.ndarray[Any, Any]:
        """Where each segment ends, mapped into memory: (num_segments,) uint64."""
        return np.asarray(np.load(Path(self.folder) / "ends.npy", mmap_mode="r", allow_pickle=False))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Unit:
    """Files that make one shard, where it goes, and how."""

    name: str
    files: tuple[File, ...]
    folder: Path
    layout: Layout
    end_id: int
    dtype: str


def tokenise(
    sources: Sequence[Source],
    tokenizer: Any,
    objective: Objective,
    *,
    cache: Path,
    reading: Reading,
    bar: Callable[[], AbstractContextManager[Progress]] = lambda: nullcontext(lambda name, share: None),
    run: Callable[[Callable[[], None]], None] = lambda make: make(),
) -> list[list[Shard]]:
    """The shards of each source, from the cache or made now, within a call of `run` if any is to be made.

    Raises DataError for what cannot be read, FolderError if the cache cannot be written.
    """
    units = _units(sources, tokenizer, objective, cache, reading)

    def make() -> None:
        with bar() as progress:
            for unit in chain.from_iterable(units):
                _make(unit, tokenizer, reading, progress)

    if any(_found(unit.folder) is None for unit in chain.from_iterable(units)):
        run(make)
    return [[_whole(unit) for unit in of_one] for of_one in units]


def _units(
    sources: Sequence[Source], tokenizer: Any, objective: Objective, cache: Path, reading: Reading
) -> list[list[_Unit]]:
    end_id = tokenizer.eos_token_id if objective == "causal" else tokenizer.sep_token_id
    maker = _fingerprint(tokenizer)
    dtype = "uint16" if len(tokenizer) <= 1 << 16 else "uint32"
    made = []
    with _writing(cache):
        for source in sources:
            units = []
            for files in _grouped(source.files):
                layout: Layout = "pairs" if objective == "masked" and _has_pairs(files[0], reading) else "text"
                settings = [_VERSION, [_content(file, cache) for file in files], [file.kind for file in files]]
                settings += [maker, layout, end_id, dtype, asdict(reading)]
                key = hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:32]
                name = files[0].name if len(files) == 1 else f"{source.name} ({len(files)} files)"
                units.append(_Unit(name=name, files=files, folder=cache / "tokens" / key, layout=layout, end_id=end_id,
                                   dtype=dtype))  # fmt: skip
            made.append(units)
    return made


def _grouped(files: Sequence[File]) -> Iterator[tuple[File, ...]]:
    """Small files of text together, every other file alone, in their order."""
    together: list[File] = []
    num_bytes = 0
    for file in files:
        small = file.kind in ("jsonl", "text", "parquet") and file.path.stat().st_size < _SMALL
        if together and (not small or num_bytes > _SMALL):
            yield tuple(together)
            together, num_bytes = [], 0
        if small:
            together.append(file)
            num_bytes += file.path.stat().st_size
        else:
            yield (file,)
    if together:
        yield tuple(together)


def _has_pairs(file: File, reading: Reading) -> bool:
    return file.kind == "squad" or (file.kind == "hub" and holds_pairs(hub_rows(file.name), reading))


def _content(file: File, cache: Path) -> str:
    """A hash of what the file holds; that of a large file is remembered by its path, size and time."""
    if file.kind == "hub":
        rows = hub_rows(file.name)
        return " ".join([file.name, *(_hash_of(Path(item["filename"]), cache) for item in rows.cache_files)])
    if file.name == SAMPLE and not file.path.exists():
        return SAMPLE
    return _hash_of(file.path, cache)


def _hash_of(path: Path, cache: Path) -> str:
    try:
        facts = path.stat()
        seen = f"{path.absolute()} {facts.st_size} {facts.st_mtime_ns} {facts.st_ino}"
        note = cache / "hashes" / hashlib.sha256(seen.encode(errors="surrogateescape")).hexdigest()
        if facts.st_size >= _LARGE and note.is_file():
            return note.read_text()
        digest = hashlib.sha256()
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    except OSError as error:
        raise DataError(f"{path}: expected a file that can be read, got '{error.strerror}'") from error
    if facts.st_size >= _LARGE:
        note.parent.mkdir(parents=True, exist_ok=True)
        part = note.with_suffix(f".{os.getpid()}.part")
        part.write_text(digest.hexdigest())
        part.replace(note)
    return digest.hexdigest()


def _fingerprint(tokenizer: Any) -> str:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:  # one of transformers' own in Python
        return f"{type(tokenizer).__name__} {json.dumps(tokenizer.get_vocab(), sort_keys=True)}"
    backend.no_truncation()
    backend.no_padding()
    return hashlib.sha256(backend.to_str().encode()).hexdigest()


def _make(unit: _Unit, tokenizer: Any, reading: Reading, progress: Progress) -> None:
    if _found(unit.folder) is not None:
        return
    with _writing(unit.folder), _locked(unit.folder.with_suffix(".lock")):
        if _found(unit.folder) is not None:  # another process may have made it while this one waited
            return
        part = unit.folder.with_suffix(".part")
        for old in (part, unit.folder):  # what a killed process left, and what is not whole
            shutil.rmtree(old, ignore_errors=True)
        part.mkdir(parents=True)
        try:
            index = _build(unit, _encoder(tokenizer), reading, part, progress)
            (part / "index.json").write_bytes(msgspec.json.encode(index))
            part.rename(unit.folder)
        finally:
            shutil.rmtree(part, ignore_errors=True)


def _whole(unit: _Unit) -> Shard:
    found = _found(unit.folder)
    if found is None:
        raise FolderError(f"{unit.folder}: expected the tokenised data that was just made, it is gone; run again")
    return found


def _found(folder: Path) -> Shard | None:
    """The shard of the cache, if it is there and whole."""
    try:
        index = msgspec.json.decode((folder / "index.json").read_bytes(), type=Shard)
        size = (folder / "tokens.bin").stat().st_size
    except (OSError, msgspec.MsgspecError):
        return None
    whole = size == index.num_tokens * np.dtype(index.dtype).itemsize and (folder / "ends.npy").is_file()
    return msgspec.structs.replace(index, folder=str(folder)) if whole else None


def _build(unit: _Unit, encode: Encode, reading: Reading, part: Path, progress: Progress) -> Shard:
    """Write tokens.bin and ends.npy into `part`."""
    tally = Tally()
    num_tokens = 0
    lengths = array("I")
    with (part / "tokens.bin").open("wb") as file:
        for segments in _encoded(_chunks(_documents(unit, reading, tally, progress)), encode, unit.layout):
            ids = array("I")
            for segment in segments:
                ids.extend(segment)
                if unit.layout == "text":
                    ids.append(unit.end_id)
            ending = unit.layout == "text"
            lengths.extend(len(segment) + ending for segment in segments)
            num_tokens += len(ids)
            file.write(np.array(ids, unit.dtype).data)
        file.flush()
        os.fsync(file.fileno())
    ends = np.cumsum(np.array(lengths, np.int64), dtype=np.int64)
    if unit.layout == "text" and _has_pairs(unit.files[0], reading):
        ends = _shuffled(part / "tokens.bin", unit.dtype, ends)
    np.save(part / "ends.npy", ends.astype(np.uint64))
    progress(unit.name, 1.0)
    return Shard(
        folder=str(unit.folder), name=unit.name, layout=unit.layout, dtype=unit.dtype, num_tokens=num_tokens,
        num_segments=len(lengths), **asdict(tally),
    )  # fmt: skip


def _documents(unit: _Unit, reading: Reading, tally: Tally, progress: Progress) -> Iterator[Document]:
    for number, file in enumerate(unit.files):

        def at(share: float, number: int = number) -> None:
            progress(unit.name, (number + share) / len(unit.files))

        yield from read(file, reading, tally, at)


def _shuffled(tokens: Path, dtype: str, ends: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Put the segments of `tokens` into an order that never changes; returns their new ends.

    Questions about one paragraph follow one another; packed so, a model would read the same paragraph again and again.
    """
    ids = np.fromfile(tokens, dtype)
    order = permuted(np.arange(len(ends), dtype=np.uint64), len(ends), seed=0).astype(np.int64)
    starts = np.concatenate([[0], ends[:-1]]).astype(np.int64)
    with tokens.open("wb") as file:
        file.write(np.concatenate([ids[starts[index] : ends[index]] for index in order]).data)
        file.flush()
        os.fsync(file.fileno())
    return np.cumsum((ends - starts)[order], dtype=np.uint64)


def _chunks(documents: Iterator[Document]) -> Iterator[list[Document]]:
    chunk: list[Document] = []
    size = 0
    for document in documents:
        chunk.append(document)
        size += len(document) if isinstance(document, str) else len(document.question) + len(document.context)
        if size > _CHUNK:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def _encoded(chunks: Iterator[list[Document]], encode: Encode, layout: Layout) -> Iterator[list[list[int]]]:
    """The segments of each chunk, while the next one is read; equal texts of a chunk are encoded once."""
    waiting: list[tuple[list[str], Future[dict[str, list[int]]]]] = []

    def encoded(texts: list[str]) -> dict[str, list[int]]:
        unique = list(dict.fromkeys(texts))
        return dict(zip(unique, encode(unique)))

    with ThreadPoolExecutor(1) as pool:
        for chunk in chunks:
            texts = [text for document in chunk for text in _segments(document, layout)]
            waiting.append((texts, pool.submit(encoded, texts)))
            if len(waiting) == 2:
                texts, future = waiting.pop(0)
                found = future.result()
                yield [found[text] for text in texts]
        for texts, future in waiting:
            found = future.result()
            yield [found[text] for text in texts]


def _segments(document: Document, layout: Layout) -> tuple[str, ...]:
    if isinstance(document, Pair):
        return document if layout == "pairs" else (f"{document.question} {document.context}",)
    return (document,)


def _encoder(tokenizer: Any) -> Encode:
    """Texts to ids without special tokens, on all cores where the tokenizer has a backend in Rust."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return lambda texts: tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    return lambda texts: [item.ids for item in backend.encode_batch_fast(texts, add_special_tokens=False)]


@contextmanager
def _locked(path: Path) -> Iterator[IO[bytes]]:
    """Within this, no other process of the host holds the lock; it ends with the process, however that ends."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield file


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    """Within this, a folder of the cache is written; what the system refuses becomes one line."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise FolderError(
                f"{folder}: the disk is full; expected about 2 bytes for each token (4 for vocabularies above 65,536); "
                "free some, or choose another --cache-dir"
            ) from error
        raise FolderError(
            f"{folder}: expected to keep tokenised data here, got '{error.strerror}'; choose another --cache-dir"
        ) from error
