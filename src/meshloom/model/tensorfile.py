"""Write safetensors files a tensor at a time, so that no more than one has to be in memory."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from meshloom.errors import FolderError

# the names of https://huggingface.co/docs/safetensors for torch's types
TYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """A tensor to write: `make` gives it when its turn comes, on any device."""

    name: str
    dtype: torch.dtype
    shape: Sequence[int]
    make: Callable[[], Tensor]


def write_tensors(path: Path, entries: Sequence[Entry], metadata: Mapping[str, str] | None = None) -> int:
    """Write a safetensors file and wait until it is on disk; returns its bytes. Raises FolderError."""
    header: dict[str, object] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    at = 0
    for entry in entries:
        end = at + prod(entry.shape) * entry.dtype.itemsize
        header[entry.name] = {
            "dtype": TYPE_NAMES[entry.dtype],
            "shape": list(entry.shape),
            "data_offsets": [at, end],
        }
        at = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    try:
        with path.open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for entry in entries:
                tensor = entry.make().detach().to("cpu").contiguous()
                assert tensor.dtype == entry.dtype, entry.name
                assert tuple(tensor.shape) == tuple(entry.shape), entry.name
                file.write(tensor.reshape(-1).view(torch.uint8).numpy().data)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise FolderError(
            f"{path}: expected to write a file of {len(text) + 8 + at:,} bytes here, got '{error.strerror}'; "
            "make room, or choose another folder"
        ) from error
    return 8 + len(text) + at


def sync_folder(folder: Path) -> None:
    """Wait until the names of the files in the folder are on disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
