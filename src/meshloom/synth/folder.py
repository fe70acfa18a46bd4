"""A folder of synthesised traces, written as a stream: role by role, each rank's file from the role's bytes.

The folder gets its name only once it is whole; until then, and after an interruption, there is none of that name.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from meshloom.chakra.file import encode_facts
from meshloom.errors import FolderError

ROLES_FILE = "ranks.json"


class RoleOfRanks(msgspec.Struct, frozen=True):
    """An entry of `ranks.json`: the file that these ranks share. Its groups and peers are those of `rank`."""

    file: str
    rank: int
    ranks: list[int]


def check_folder(folder: Path, *, force: bool) -> None:
    """Raise FolderError unless the folder is new, empty, or holds nothing but traces which `force` lets go."""
    if not folder.exists():
        return
    if not folder.is_dir():
        raise FolderError(f"{folder}: expected a new or empty folder, got a file; choose another --out")
    found = sorted(entry.name for entry in folder.iterdir())
    if found and not force:
        raise FolderError(f"{folder}: expected a new or empty folder; choose another --out, or --force replaces it")
    strange = [name for name in found if not _is_ours(name)]
    if strange:
        raise FolderError(f"{folder}: --force replaces traces only, but there is {strange[0]}; choose another --out")


def _is_ours(name: str) -> bool:
    return name == ROLES_FILE or (name.startswith("rank") and name.endswith((".et", ".et.gz")))


def write_file(folder: Path, rank: int, facts: Mapping[str, Any], nodes: NDArray[np.uint8]) -> int:
    """Write `rank<r>.et` of these facts and nodes into the folder; returns its bytes."""
    head = encode_facts(facts)
    with (folder / f"rank{rank}.et").open("wb", buffering=0) as out:
        for piece in (memoryview(head), nodes.data):
            while piece:
                piece = piece[out.write(piece) :]
    return len(head) + nodes.nbytes


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """A folder beside `folder` that takes its name at the end; whatever ends this before leaves nothing."""
    part = folder.with_name(f".{folder.name}.{os.getpid()}.part")
    try:
        part.mkdir(parents=True)
        yield part
        if folder.exists():
            old = folder.with_name(f".{folder.name}.{os.getpid()}.old")
            folder.rename(old)
            part.rename(folder)
            shutil.rmtree(old)
        else:
            part.rename(folder)
    except OSError as error:
        raise FolderError(f"{folder}: expected to write here, got '{error.strerror}'; choose another --out") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)
