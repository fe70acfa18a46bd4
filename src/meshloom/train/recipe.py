"""A recipe of sources to one mixed corpus: normalised, filtered, without duplicates, by ratios of bytes, split.

Deterministic: the hash of a text and the recipe's seed decide which documents are taken and where they stand. All text
that passes the filters is held in memory.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import unicodedata
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from meshloom.chakra.file import whole_file
from meshloom.errors import DataError, FolderError
from meshloom.hardware.table import parse_toml
from meshloom.train.readers import read
from meshloom.train.sources import Document, Reading, Source, Tally, find_sources

# why a document is not written, in the order of the tests
REASONS = ("bad line", "empty", "too short", "too long", "equal", "similar", "over ratio")
_SHINGLE = 8  # characters; Korean has no words that whitespace would tell apart, and English does not mind
_NUM_HASHES = 128
_MISSES = (0.05, 0.95)  # what a false pair costs, which only has to be looked at, and a missed one

Progress = Callable[[str, float], None]


class Ingredient(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A [[source]] of a recipe: what a `--data` names, and its share of the bytes that are written."""

    data: str
    ratio: float
    name: str = ""
    text_field: str = "text"


class Recipe(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A recipe as its TOML says it; `near` is the Jaccard similarity from which on documents count as similar."""

    source: list[Ingredient]
    megabytes: float | None = None
    min_characters: int = 1
    max_characters: int | None = None
    near: float | None = None
    validation: float = 0.0
    seed: int = 0
    skip_bad_lines: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class _Text:
    text: str
    key: bytes  # orders documents, and tells equal ones
    source: int
    num_bytes: int


def load_recipe(path: Path) -> Recipe:
    """The recipe of a TOML file, its sources found; paths in it are relative to its folder.  Raises DataError."""
    try:
        table = parse_toml(path.read_text(encoding="utf-8"))
        recipe = msgspec.convert(table, Recipe)
    except OSError as error:
        raise DataError(f"{path}: expected a recipe (TOML), got '{error.strerror}'") from error
    except (ValueError, RecursionError, msgspec.ValidationError) as error:  # of TOML, of UTF-8, of what stands in it
        raise DataError(f"{path}: expected a recipe with [[source]] tables of data and ratio, got '{error}'") from error
    for wrong, what in (
        (not recipe.source, "at least one [[source]]"),
        (any(not 0 < item.ratio < 1e9 for item in recipe.source), "a ratio above 0 for each source"),
        (not 0 <= recipe.validation < 1, "validation from 0 to below 1, the share that is split off"),
        (recipe.near is not None and not 0 < recipe.near < 1, "near between 0 and 1"),
        (recipe.megabytes is not None and not recipe.megabytes > 0, "megabytes above 0"),
    ):
        if wrong:
            raise DataError(f"{path}: expected {what}")
    sources = [msgspec.structs.replace(item, data=_beside(path, item.data)) for item in recipe.source]
    return msgspec.structs.replace(recipe, source=sources)


def _beside(recipe: Path, data: str) -> str:
    near = recipe.parent / data
    try:
        return str(near) if near.exists() or "." in near.name else data
    except (OSError, ValueError) as error:  # longer than names may be
        raise DataError(f"{recipe}: expected data to name a file, got {data!r:.60}") from error


def mix(
    recipe: Recipe, out: Path, *, force: bool = False, progress: Progress = lambda name, share: None
) -> dict[str, Any]:
    """Write `out`, its validation split and its report; returns the report: per source what was dropped and why.

    Raises DataError for what cannot be read or leaves nothing, FolderError if the files exist or cannot be written.
    """
    files = _targets(recipe, out, force=force)
    names = [item.name or Path(item.data).name for item in recipe.source]
    dropped = [dict.fromkeys(REASONS, 0) for _ in names]
    read_in_all = [0] * len(names)
    kept: list[list[_Text]] = []
    known: set[bytes] = set()
    for index, item in enumerate(recipe.source):
        (source,) = find_sources([item.data])
        of_one = []
        for text in _texts(source, item, recipe, dropped[index], progress):
            found = _judge(text, index, recipe, known, dropped[index])
            if found is not None:
                of_one.append(found)
        read_in_all[index] = len(of_one) + sum(dropped[index].values())
        kept.append(of_one)
    if recipe.near is not None:
        kept = _without_similar(kept, recipe, dropped, progress)
    chosen = _by_ratio(kept, recipe, names, dropped)
    written = _write(chosen, files, recipe, names)
    report = {
        "reasons": [*REASONS],
        "sources": [
            {
                "source": name,
                "read": read_in_all[index],
                "dropped": dropped[index],
                "documents": sum(text.source == index for text in chosen),
                "bytes": sum(text.num_bytes for text in chosen if text.source == index),
            }
            for index, name in enumerate(names)
        ],
        "files": written,
        "recipe": msgspec.to_builtins(recipe),
    }
    with _lines_of(files["report"]) as file:
        file.write(json.dumps(report, ensure_ascii=False, indent=1).encode())
    return report


def _targets(recipe: Recipe, out: Path, *, force: bool) -> dict[str, Path]:
    end = next((end for end in (".jsonl.gz", ".jsonl") if out.name.endswith(end)), None)
    if end is None:
        raise DataError(f"{out}: expected a name that ends in .jsonl or .jsonl.gz")
    stem = out.name.removesuffix(end)
    files = {"train": out, "report": out.with_name(f"{stem}.report.json")}
    if recipe.validation:
        files["validation"] = out.with_name(f"{stem}.validation{end}")
    there = [str(path) for path in files.values() if path.exists()]
    if there and not force:
        raise FolderError(f"{there[0]}: expected a file that is not there yet; choose another --out, or give --force")
    return files


def _texts(
    source: Source, item: Ingredient, recipe: Recipe, dropped: dict[str, int], progress: Progress
) -> Iterator[str]:
    """The texts of a source in order; of questions about one paragraph, the paragraph once."""
    reading = Reading(text_field=item.text_field, skip_bad_lines=recipe.skip_bad_lines)
    tally = Tally()
    last = None
    for file in source.files:

        def at(share: float, name: str = file.name) -> None:
            progress(name, share)

        for document in read(file, reading, tally, at):
            text = _text_of(document)
            if not isinstance(document, str) and text == last:
                continue
            last = text
            yield text
        at(1.0)
    dropped["bad line"] += tally.num_bad
    dropped["empty"] += tally.num_empty


def _text_of(document: Document) -> str:
    return document if isinstance(document, str) else document.context


def _judge(text: str, source: int, recipe: Recipe, known: set[bytes], dropped: dict[str, int]) -> _Text | None:
    """The text in NFC without space around it, or None if it is dropped, and counted."""
    text = unicodedata.normalize("NFC", text).strip()
    key = hashlib.sha256(f"{recipe.seed}\n{text}".encode()).digest()
    if len(text) < recipe.min_characters:
        dropped["too short"] += 1
    elif recipe.max_characters is not None and len(text) > recipe.max_characters:
        dropped["too long"] += 1
    elif key in known:
        dropped["equal"] += 1
    else:
        known.add(key)
        return _Text(text=text, key=key, source=source, num_bytes=len(text.encode()))
    return None


def _without_similar(
    kept: list[list[_Text]], recipe: Recipe, dropped: list[dict[str, int]], progress: Progress
) -> list[list[_Text]]:
    """Drop documents that resemble an earlier one, found by MinHash (Broder 1997) and bands of it (LSH)."""
    try:
        from datasketch import MinHash, MinHashLSH
    except ImportError as error:
        raise DataError(
            "near: expected the package datasketch, which finds similar documents; install meshloom[data], or remove "
            "near from the recipe"
        ) from error
    index = MinHashLSH(threshold=recipe.near, num_perm=_NUM_HASHES, weights=_MISSES)
    num_texts = sum(map(len, kept))
    left: list[list[_Text]] = []
    done = 0
    texts: dict[bytes, str] = {}
    for of_one in kept:
        stays = []
        for text in of_one:
            done += 1
            progress("similar documents", done / num_texts)
            shingles = _shingles(text.text)
            signature = MinHash(num_perm=_NUM_HASHES, seed=1, hashfunc=int)
            signature.update_batch(shingles.tolist())
            # bands bring up pairs below the threshold too, so that the shingles themselves decide
            if any(_jaccard(shingles, _shingles(texts[key])) >= (recipe.near or 0) for key in index.query(signature)):
                dropped[text.source]["similar"] += 1
                continue
            index.insert(text.key, signature)
            texts[text.key] = text.text
            stays.append(text)
        left.append(stays)
    return left


def _shingles(text: str) -> NDArray[np.uint64]:
    """A hash of 32 bits for each run of characters, lower case, with whitespace as one space; each once."""
    plain = " ".join(text.lower().split())
    codes = np.frombuffer(plain.encode("utf-32-le"), np.uint32).astype(np.uint64)
    if len(codes) <= _SHINGLE:
        codes = np.pad(codes, (0, _SHINGLE + 1 - len(codes)))
    hashed = np.zeros(len(codes) - _SHINGLE + 1, np.uint64)
    for place in range(_SHINGLE):
        hashed = (hashed ^ codes[place : place + len(hashed)]) * np.uint64(0x9E37_79B9_7F4A_7C15)
        hashed ^= hashed >> np.uint64(29)
    return np.unique(hashed >> np.uint64(32))


def _jaccard(first: NDArray[np.uint64], second: NDArray[np.uint64]) -> float:
    shared = len(np.intersect1d(first, second, assume_unique=True))
    return shared / (len(first) + len(second) - shared)


def _by_ratio(kept: list[list[_Text]], recipe: Recipe, names: list[str], dropped: list[dict[str, int]]) -> list[_Text]:
    """What is written, in its order: of each source as many bytes as its ratio allows.

    The total is the recipe's, or as much as the source allows that runs out first.
    """
    ratios = [item.ratio / sum(item.ratio for item in recipe.source) for item in recipe.source]
    sizes = [sum(text.num_bytes for text in of_one) for of_one in kept]
    for name, size in zip(names, sizes):
        if not size:
            raise DataError(f"{name}: expected a document that passes the recipe's filters, none does; relax them")
    most = min(size / ratio for size, ratio in zip(sizes, ratios))
    total = most if recipe.megabytes is None else recipe.megabytes * 1e6
    if total > most * (1 + 1e-9):
        short = min(range(len(names)), key=lambda index: sizes[index] / ratios[index])
        raise DataError(
            f"{names[short]}: expected {total * ratios[short] / 1e6:.1f} MB for its ratio, got "
            f"{sizes[short] / 1e6:.1f} MB; ask for at most {most / 1e6:.1f} megabytes, or lower its ratio"
        )
    chosen = []
    for of_one, ratio, counts in zip(kept, ratios, dropped):
        budget = total * ratio * (1 + 1e-9)
        for text in sorted(of_one, key=lambda text: text.key):
            budget -= text.num_bytes
            if budget >= 0:
                chosen.append(text)
            else:
                budget += text.num_bytes
                counts["over ratio"] += 1
    return sorted(chosen, key=lambda text: text.key[::-1])


def _write(chosen: list[_Text], files: dict[str, Path], recipe: Recipe, names: list[str]) -> list[dict[str, Any]]:
    """Write the splits; a document belongs to validation by its hash, so a larger mix keeps what it held back."""
    counts = {name: {"file": str(path), "documents": 0, "bytes": 0} for name, path in files.items() if name != "report"}
    with ExitStack() as stack:
        opened = {name: stack.enter_context(_lines_of(files[name])) for name in counts}
        for text in chosen:
            held_back = int.from_bytes(text.key[8:16], "big") / 2**64 < recipe.validation
            split = "validation" if held_back else "train"
            row = {"text": text.text, "source": names[text.source]}
            opened[split].write(msgspec.json.encode(row) + b"\n")
            counts[split]["documents"] += 1  # type: ignore[operator]
            counts[split]["bytes"] += text.num_bytes  # type: ignore[operator]
    return list(counts.values())


@contextmanager
def _lines_of(path: Path) -> Iterator[IO[bytes]]:
    """A file that is there when it is whole; packed by gzip, without a time in it, if its name says so."""
    with whole_file(path) as raw:
        if path.suffix != ".gz":
            yield raw
            return
        with gzip.GzipFile("", "wb", 6, raw, mtime=0) as packed, io.BufferedWriter(packed, 1 << 20) as file:
            yield file
