"""Where text comes from: SQuAD, JSONL, text, Parquet, hub datasets, folders of them. Documents are read, not kept.

A source is what one `--data` names. Reading gives documents in the order of the file; a line that cannot be read is an
error that names file and line, or is counted if bad lines may be skipped.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import Literal, NamedTuple

from meshloom.errors import DataError, UsageError

SAMPLE = "sample"  # the name of the dataset that Meshloom ships
Kind = Literal["squad", "jsonl", "text", "parquet", "hub"]

# the end of a file's name -> how it is read
_ENDS: dict[str, Kind] = {
    ".json": "squad",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".txt": "text",
    ".parquet": "parquet",
}
_EXPECTED = (
    "expected a file that ends in .json (SQuAD), .jsonl, .txt or .parquet (the first three also with .gz), a folder of "
    "such files, 'squad' or another hub id such as owner/name, or 'sample' for what Meshloom ships"
)
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(@[\w.-]+)?")
_SHARE = re.compile(r"(.+):(\d*\.?\d+(?:[eE][+-]?\d+)?)")


class Pair(NamedTuple):
    """A question and the paragraph that answers it."""

    question: str
    context: str


Document = str | Pair


@dataclass(frozen=True, slots=True, kw_only=True)
class File:
    """One file that holds documents, or the id of a hub dataset."""

    name: str
    kind: Kind

    @property
    def path(self) -> Path:
        """Where it lies; not for hub datasets and the sample."""
        return Path(self.name)


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """What one `--data` names: its files in order, and its share of the sequences if shares were given."""

    name: str
    files: tuple[File, ...]
    weight: float | None = None
    left_out: tuple[str, ...] = ()


@dataclass(slots=True, kw_only=True)
class Tally:
    """What came up while documents were read; filled by whoever reads."""

    num_documents: int = 0
    num_empty: int = 0
    num_bad: int = 0
    first_bad: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """How documents are read: the field that holds the text, and whether bad lines are counted or raised."""

    text_field: str = "text"
    skip_bad_lines: bool = False


def find_sources(data: Sequence[str]) -> list[Source]:
    """The sources of `PATH`, `PATH:SHARE`, hub ids and `sample`; all have shares or none has.

    Raises DataError for what is not there, UsageError for shares that cannot be.
    """
    found = [_source(*_share_of(text)) for text in data]
    if not found:
        raise UsageError("--data: expected at least one source")
    without = [source.name for source in found if source.weight is None]
    if without and len(without) < len(found):
        raise UsageError(
            f"--data {without[0]}: expected a share with every --data or with none; write it as {without[0]}:0.5"
        )
    return found


def _share_of(text: str) -> tuple[str, float | None]:
    match = _SHARE.fullmatch(text)
    if match is None or Path(text).exists():
        return text, None
    share = float(match[2])
    if share <= 0 or not isfinite(share):
        raise UsageError(f"--data {text}: expected a share above 0, got {match[2]}")
    return match[1], share


def _source(name: str, weight: float | None) -> Source:
    path = Path(name)
    if name == SAMPLE and not path.exists():
        return Source(name=name, files=(File(name=name, kind="squad"),), weight=weight)
    if path.is_dir():
        return _folder(path, weight)
    kind = _kind(path)
    if path.exists():
        if kind is None:
            raise DataError(f"{name}: {_EXPECTED}; rename it or convert it")
        return Source(name=name, files=(File(name=name, kind=kind),), weight=weight)
    is_hub_id = _HUB_ID.fullmatch(name) and kind is None and not name.startswith(".") and not path.parent.is_dir()
    if name == "squad" or is_hub_id:
        return Source(name=name, files=(File(name=name, kind="hub"),), weight=weight)
    raise DataError(f"{name}: {_EXPECTED}; there is no such file")


def _folder(folder: Path, weight: float | None) -> Source:
    below = sorted(path for path in folder.rglob("*") if path.is_file())
    seen = [path for path in below if not any(part.startswith(".") for part in path.relative_to(folder).parts)]
    files = tuple(File(name=str(path), kind=kind) for path in seen if (kind := _kind(path)) is not None)
    left_out = tuple(str(path.relative_to(folder)) for path in seen if _kind(path) is None)
    if not files:
        holds = f"it holds {', '.join(left_out[:3])}" if left_out else "it is empty"
        raise DataError(f"{folder}: expected a folder with .json, .jsonl, .txt or .parquet files; {holds}")
    return Source(name=str(folder), files=files, weight=weight, left_out=left_out)


def _kind(path: Path) -> Kind | None:
    name = path.name.lower().removesuffix(".gz")
    return next((kind for end, kind in _ENDS.items() if name.endswith(end)), None)
