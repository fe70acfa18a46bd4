"""Read JSON files of real runs: gzip, several documents in one file, a truncated tail, names that are not UTF-8.

A repair is told in a warning that says what was done; what cannot be repaired raises TraceError with the byte.
"""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from meshloom.chakra.packed import GZIP, unpack
from meshloom.errors import TraceError

T = TypeVar("T")

# brackets, and strings whole, so that brackets in names do not count
_STRUCTURE = re.compile(r'"(?:[^"\\]|\\.)*"|[{}\[\]]')


def read_json(path: Path, kind: type[T], what: str, warnings: list[str]) -> T:
    """The JSON document in `path` (plain or gzip) as `kind`; what had to be repaired is added to `warnings`.

    Raises TraceError naming the file and what was expected.
    """
    try:
        raw = path.read_bytes()
        if raw[:2] == GZIP:
            raw = unpack(raw)
    except (OSError, EOFError, zlib.error) as error:
        said = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise TraceError(f"{path}: expected {what}, got '{said}'") from error
    try:
        return msgspec.json.decode(raw, type=kind)
    except msgspec.ValidationError as error:
        raise TraceError(f"{path}: expected {what}, got another JSON document: {error}") from error
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        try:
            repaired = msgspec.json.encode(_repair(raw, path, str(error), warnings))
            return msgspec.json.decode(repaired, type=kind)
        except (msgspec.ValidationError, ValueError, OverflowError, RecursionError) as invalid:
            raise TraceError(f"{path}: expected {what}, got another JSON document: {invalid}") from error


def each(raws: Iterable[msgspec.Raw], kind: type[T], path: Path, what: str, warnings: list[str]) -> Iterator[T]:
    """Each entry of a document's list, decoded one by one: a whole list of them takes several times the file's size,
    and longer for that. Raises TraceError naming the file and the entry."""
    decoder, repaired = msgspec.json.Decoder(kind), 0
    for index, raw in enumerate(raws):
        try:
            try:
                yield decoder.decode(raw)
            except UnicodeDecodeError:
                repaired += 1
                yield decoder.decode(bytes(raw).decode("utf-8", errors="replace"))
        except msgspec.ValidationError as error:
            raise TraceError(f"{path}: entry {index}: expected {what}, got another JSON document: {error}") from error
        except (msgspec.DecodeError, RecursionError) as error:
            raise TraceError(f"{path}: entry {index}: expected {what}, got no JSON: {error}") from error
    if repaired:
        warnings.append(f"{path}: bytes that are no UTF-8 were replaced in {repaired} entries")


def _repair(raw: bytes, path: Path, said: str, warnings: list[str]) -> Any:
    text = raw.decode("utf-8", errors="replace")
    if "\ufffd" in text and b"\xef\xbf\xbd" not in raw:
        warnings.append(f"{path}: bytes that are no UTF-8 were replaced in names")
    decoder = json.JSONDecoder(strict=False)  # control characters in names, which PyTorch does not escape
    documents, at = [], 0
    while at < len(text):
        while at < len(text) and text[at].isspace():
            at += 1
        if at == len(text):
            break
        try:
            document, at = decoder.raw_decode(text, at)
        except json.JSONDecodeError as error:
            closed = _closed(text, at)
            if closed is None:
                raise TraceError(
                    f"{path}: byte {error.pos}: expected JSON, {error.msg}; it cannot be repaired"
                ) from error
            document, lost = closed
            at = len(text)
            warnings.append(f"{path}: the file ends in the middle; the last {lost:,} characters were dropped")
        documents.append(document)
    if not documents:
        raise TraceError(f"{path}: expected JSON, the file holds none ({said})")
    if len(documents) > 1:
        # profilers that are started twice append to their file; the fuller document is the recorded one
        sizes = [_num_entries(document) for document in documents]
        warnings.append(
            f"{path}: {len(documents)} JSON documents in one file; the one with {max(sizes):,} entries was taken"
        )
        return documents[sizes.index(max(sizes))]
    return documents[0]


def _num_entries(document: Any) -> int:
    if not isinstance(document, dict):
        return 0
    return max((len(value) for value in document.values() if isinstance(value, list)), default=0)


def _closed(text: str, begin: int) -> tuple[Any, int] | None:
    """The truncated document from `begin`, closed after its last whole entry, and how much was dropped.

    Entries are objects in a list of the outermost object, as in both of PyTorch's files.
    """
    open_brackets: list[str] = []
    whole: tuple[int, str] | None = None
    for match in _STRUCTURE.finditer(text, begin):
        sign = match[0]
        if sign in "{[":
            open_brackets.append("}" if sign == "{" else "]")
        elif sign in "}]":
            if not open_brackets or open_brackets.pop() != sign:
                return None
            if sign == "}" and open_brackets == ["}", "]"]:
                whole = match.end(), "]}"
    if whole is None:
        return None
    end, tail = whole
    try:
        return json.loads(text[begin:end] + tail, strict=False), len(text) - end
    except json.JSONDecodeError:
        return None
