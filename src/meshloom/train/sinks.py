"""Where else a run's numbers go: TensorBoard's event files, which are written here without TensorBoard, and W&B."""

from __future__ import annotations

import socket
import struct
import time
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from meshloom.errors import UsageError

# CRC-32C (Castagnoli), which TFRecord files are framed with: RFC 3720, appendix B.4, reflected
_POLYNOMIAL = 0x82F63B78
_MASK_DELTA = 0xA282EAD8  # of TFRecord: CRCs of CRCs are weak, so they are rotated and moved


class Sink(Protocol):
    """Takes the numbers of a step, by name."""

    def write(self, step: int, numbers: Mapping[str, float]) -> None:
        """Take the numbers of step `step`, counted from 1."""

    def close(self) -> None:
        """Nothing more comes."""


class EventFile:
    """TensorBoard's event file of a run, below `folder`: scalars only.

    A TFRecord file (length, its CRC, data, its CRC) of Event messages: tensorflow/core/util/event.proto.
    """

    def __init__(self, folder: Path, *, steps_before: int = 0) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._table = _crc_table()
        name = f"events.out.tfevents.{time.time_ns():020d}.{socket.gethostname()}"
        self._file = (folder / name).open("wb", buffering=0)
        self._record(_field(3, b"brain.Event:2"))
        if steps_before:  # what was told of later steps is done again
            self._record(_field(2, steps_before + 1) + _field(7, _field(1, 1)))

    def write(self, step: int, numbers: Mapping[str, float]) -> None:
        """Take the numbers of step `step`."""
        values = b"".join(
            _field(1, _field(1, name.encode()) + _field(2, float(value))) for name, value in numbers.items()
        )
        self._record(_field(2, step) + _field(5, values))

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _record(self, event: bytes) -> None:
        data = b"\x09" + struct.pack("<d", time.time()) + event  # field 1, a double: when
        length = struct.pack("<Q", len(data))
        self._file.write(length + self._crc(length) + data + self._crc(data))

    def _crc(self, data: bytes) -> bytes:
        crc = 0xFFFFFFFF
        for byte in data:
            crc = self._table[(crc ^ byte) & 0xFF] ^ (crc >> 8)
        crc ^= 0xFFFFFFFF
        return struct.pack("<I", (((crc >> 15) | (crc << 17)) + _MASK_DELTA) & 0xFFFFFFFF)


class WandbRun:
    """A run of Weights & Biases, whose project is `project`; its own settings decide whether it is on- or offline.

    Raises UsageError where the package `wandb` is missing.
    """

    def __init__(self, project: str, *, folder: Path, config: Mapping[str, Any]) -> None:
        check_wandb()
        import wandb

        self._run: Any = wandb.init(
            project=project, name=folder.name, dir=str(folder), config=dict(config), id=folder.name, resume="allow"
        )

    def write(self, step: int, numbers: Mapping[str, float]) -> None:
        """Take the numbers of step `step`."""
        self._run.log(dict(numbers), step=step)

    def close(self) -> None:
        """End the run there."""
        self._run.finish()


def check_wandb() -> None:
    """Raise UsageError where the package `wandb` is missing."""
    if find_spec("wandb") is None:
        raise UsageError("--wandb: expected the package wandb, which is not here; pip install 'meshloom[wandb]'")


def _crc_table() -> list[int]:
    table = []
    for byte in range(256):
        for _ in range(8):
            byte = (byte >> 1) ^ (_POLYNOMIAL if byte & 1 else 0)
        table.append(byte)
    return table


def _field(number: int, value: bytes | int | float) -> bytes:
    """A field of a protobuf message: bytes, a varint, or a 32-bit float."""
    if isinstance(value, bytes):
        return _varint(number << 3 | 2) + _varint(len(value)) + value
    if isinstance(value, int):
        return _varint(number << 3) + _varint(value)
    return _varint(number << 3 | 5) + struct.pack("<f", value)


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])
