"""Fields of a node's message whose numbers are all of one width, so that they can be changed where they stand.

A varint may have more bytes than it needs. No torch.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]
Numbers = NDArray[np.int64]

ID, NAME, TYPE, CONTROL, DATA = b"\x08", b"\x12", b"\x18", b"\x22", b"\x2a"  # what comes before each field of a node


def width_for(most: int) -> int:
    """How many bytes numbers need that are less than `most`."""
    return 3 if most < 1 << 21 else 4 if most < 1 << 28 else 5


def wide(value: int, width: int) -> bytes:
    """The number as a varint of `width` bytes."""
    more = [value >> 7 * byte & 0x7F | 0x80 for byte in range(width - 1)]
    return bytes([*more, value >> 7 * (width - 1) & 0x7F])


def wide_all(values: Sequence[int], width: int) -> bytes:
    """The numbers, one after the other."""
    data = np.zeros(len(values) * width, np.uint8)
    fill(data, np.arange(0, len(data), width), np.asarray(values, np.int64), width)
    return data.tobytes()


def fill(data: Bytes, at: Numbers, values: Numbers, width: int) -> None:
    """Write each value as a varint of `width` bytes where it belongs in `data`."""
    for byte in range(width):
        data[at + byte] = values >> 7 * byte & 0x7F | (0x80 if byte < width - 1 else 0)
