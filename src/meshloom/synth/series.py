"""The bytes of steps that repeat: a step's nodes encoded once, and for each further one only what is not the same.

Most nodes differ in their numbers alone, which have one width and are changed where they stand; a node whose
attributes or dependencies grow is encoded anew. No torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from meshloom.chakra.attribute import AttributeEncoder, varint
from meshloom.chakra.wire import ATTR_FIELD
from meshloom.synth.repeat import Repeated, Run
from meshloom.synth.wide import CONTROL, DATA, ID, NAME, TYPE, Bytes, Numbers, fill, wide_all


class _Mould(NamedTuple):
    """The nodes of a step that are the same but for numbers: step k has at each `at` the number `offset` + k·`by`."""

    data: Bytes
    at: Numbers
    offset: Numbers
    by: Numbers
    between: list[tuple[int, Repeated]]  # other nodes, and where they belong among these


def encode_steps(lines: Sequence[Repeated], places: range, width: int) -> bytes:
    """The nodes of the steps `places`, as they stand in a file; numbers take `width` bytes."""
    encoder = AttributeEncoder(ATTR_FIELD)
    mould = _mould(lines, width, encoder)
    out: list[bytes | memoryview] = []
    for place in places:
        data = mould.data.copy()
        fill(data, mould.at, mould.offset + place * mould.by, width)
        done = 0
        for at, line in mould.between:
            out += (data.data[done:at], _encoded(line, place, len(lines), width, encoder))
            done = at
        out.append(data.data[done:])
    return b"".join(out)


def _mould(lines: Sequence[Repeated], width: int, encoder: AttributeEncoder) -> _Mould:
    data = bytearray()
    slots: list[tuple[int, int, int]] = []
    between = []
    size = len(lines)
    for line in lines:
        if line.attrs or any(run.grows for run in (*line.data, *line.ctrl)):
            between.append((len(data), line))
            continue
        body = bytearray(ID)
        mine = [(len(body), line.node.id, size)]
        body += bytes(width) + _kind(line)
        for tag, runs in ((CONTROL, line.ctrl), (DATA, line.data)):
            ids = [(other, size * run.moves) for run in runs for other in run.at(0, size)]
            if ids:
                body += tag + varint(len(ids) * width)
                mine += [(len(body) + number * width, *numbers) for number, numbers in enumerate(ids)]
                body += bytes(len(ids) * width)
        body += encoder.all(line.node.attrs)
        data += varint(len(body))
        slots += [(len(data) + at, offset, by) for at, offset, by in mine]
        data += body
    places = np.array(slots, np.int64).reshape(-1, 3)
    return _Mould(np.frombuffer(bytes(data), np.uint8), places[:, 0], places[:, 1], places[:, 2], between)


def _encoded(line: Repeated, place: int, size: int, width: int, encoder: AttributeEncoder) -> bytes:
    """A node of step `place`, after its length."""
    attrs = {**line.node.attrs, **{name: value.at(place) for name, value in line.attrs.items()}}
    body = b"".join(
        (
            ID,
            wide_all([line.node.id + place * size], width),
            _kind(line),
            _needs(CONTROL, line.ctrl, place, size, width),
            _needs(DATA, line.data, place, size, width),
            encoder.all(attrs),
        )
    )
    return varint(len(body)) + body


def _kind(line: Repeated) -> bytes:
    name = line.node.name.encode()
    return NAME + varint(len(name)) + name + TYPE + varint(int(line.node.type))


def _needs(tag: bytes, runs: Sequence[Run], place: int, size: int, width: int) -> bytes:
    ids = [run.at(place, size) for run in runs]
    packed = b"".join(wide_all(each, width) for each in ids)
    return tag + varint(len(packed)) + packed if packed else b""
