"""Chakra files of 2023, schemas 0.0.1 to 0.0.3, whose messages today's definition misreads: read, never written.

They name no version. A file is old if its first message is a node (there was no metadata at first), or metadata whose
first field is an attribute where today's has a text. Which of the three it is follows from the nodes' fields: 0.0.1
had no attributes; a text attribute is of type 2 in 0.0.2, of type 3 or 4 in 0.0.3.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from google.protobuf.message import DecodeError

from meshloom.chakra.trace import CommType, Node, NodeType, Trace
from meshloom.chakra.wire import StoredNodes
from meshloom.errors import TraceError

_VARINT, _DOUBLE, _BYTES, _FLOAT = 0, 1, 2, 5  # protobuf's wire types

_TYPES_2 = (  # of 0.0.1 and 0.0.2; 0.0.3 numbered them as today
    NodeType.INVALID,
    NodeType.MEM_LOAD,
    NodeType.MEM_STORE,
    NodeType.COMP,
    NodeType.COMM_SEND,
    NodeType.COMM_RECV,
    NodeType.COMM_COLL,
)
_COLLECTIVES = (
    CommType.ALL_REDUCE,
    CommType.ALL_TO_ALL,
    CommType.ALL_GATHER,
    CommType.REDUCE_SCATTER,
    CommType.BROADCAST,
)
# 0.0.1: field number -> (attribute today, what to take off its number)
_FIELDS_1 = {
    6: ("tensor_size", 0),
    12: ("num_ops", 0),
    13: ("comm_type", 1),  # 0 was "no collective"
    15: ("communicator_id", 0),
    16: ("comm_src", 0),
    17: ("comm_dst", 0),
    18: ("comm_size", 0),
    19: ("comm_tag", 0),
    20: ("comm_priority", 0),
}


class _Field(NamedTuple):
    number: int
    wire: int
    value: Any


def is_old(first: bytes) -> bool:
    """Whether a file whose first message this is follows a schema before 0.0.4."""
    if first[:1] == b"\x08":  # a node's id
        return True
    if first[:1] != b"\x0a":
        return False
    try:
        inside = next(_fields(first)).value
        return [field.number for field in _fields(inside)][:2] == [1, 2]  # name and type of an attribute
    except (IndexError, ValueError, TypeError, StopIteration, struct.error):
        return False


def read_old(bodies: Iterable[bytes], where: str) -> Trace:
    """The trace of the messages of an old file, with today's names and numbers; raises TraceError."""
    attrs: dict[str, Any] = {}
    messages: list[list[_Field]] = []
    for index, body in enumerate(bodies):
        try:
            fields = list(_fields(body))
            if index == 0 and body[:1] == b"\x0a":
                attrs = dict(_attribute(field.value)[:2] for field in fields)
                continue
            messages.append(fields)
        except (IndexError, ValueError, TypeError, struct.error) as error:
            raise TraceError(
                f"{where}: message {index}: expected a node of Chakra 0.0.1 to 0.0.3, it is none"
            ) from error
    version = "0.0.1 to 0.0.3"
    try:
        version = _version(messages) if not attrs else "0.0.3"
        nodes = StoredNodes.of([_node(fields, version) for fields in messages])
    except (IndexError, ValueError, KeyError, TypeError, OverflowError, DecodeError, struct.error) as error:
        raise TraceError(f"{where}: expected a trace of Chakra {version}, got a field of another: {error}") from error
    return Trace(nodes=nodes, attrs={**attrs, "read_from_schema": version})


def _version(messages: list[list[_Field]]) -> str:
    attributes = [field.value for fields in messages for field in fields if field.number == 11 and field.wire == _BYTES]
    if not attributes:
        return "0.0.1"
    kinds = {(kind, wire) for _, _, kind, wire in map(_attribute, attributes)}
    return "0.0.2" if kinds & {(2, _BYTES), (1, _VARINT), (0, _FLOAT)} else "0.0.3"


def _node(fields: list[_Field], version: str) -> Node:
    facts: dict[int, Any] = {field.number: field.value for field in fields}
    kind = int(facts.get(3, 0))
    attrs: dict[str, Any] = {}
    if version == "0.0.1":
        attrs = {name: facts[number] - off for number, (name, off) in _FIELDS_1.items() if number in facts}
        if kind != 6:
            attrs.pop("comm_type", None)
        dims = [bool(field.value) for field in fields if field.number == 14]
        attrs |= {"involved_dim": dims} if dims else {}
        duration_micros = int(facts.get(7, 0))
        inputs = outputs = None
    else:
        attrs = dict(_attribute(field.value)[:2] for field in fields if field.number == 11)
        duration_micros = int(attrs.pop("runtime", 0))
        texts = [bytes(facts[number]).decode() if number in facts else "" for number in range(5, 11)]
        inputs = (texts[0], texts[1], texts[2]) if any(texts[:3]) else None
        outputs = (texts[3], texts[4], texts[5]) if any(texts[3:]) else None
    if "comm_type" in attrs:
        attrs["comm_type"] = int(_COLLECTIVES[attrs["comm_type"]])
    return Node(
        id=facts.get(1, 0),
        name=bytes(facts[2]).decode(),
        type=NodeType(kind) if version == "0.0.3" else _TYPES_2[kind],
        data_deps=_parents(fields),
        duration_ns=duration_micros * 1000,
        attrs=attrs,
        inputs=inputs,
        outputs=outputs,
    )


def _parents(fields: list[_Field]) -> list[int]:
    parents: list[int] = []
    for field in fields:
        if field.number == 4:
            parents += _varints(field.value) if field.wire == _BYTES else [field.value]
    return parents


def _attribute(body: bytes) -> tuple[str, Any, int, int]:
    """Name, value, type number and wire type of an attribute."""
    fields = list(_fields(body))
    name, kind = bytes(fields[0].value).decode(), int(fields[1].value)
    values = [field for field in fields[2:] if not (field.number == 3 and field.wire == _BYTES)]  # 3 is a comment
    if not values:
        return name, 0, kind, _VARINT
    number, wire = values[0].number, values[0].wire
    plain = [_plain(field, is_bool=kind == 0) for field in values]
    # where the three schemas put their lists: from 7 in 0.0.2, from 8 or 9 in 0.0.3
    many = number >= 9 or (number == 8 and wire != _BYTES) or (number == 7 and wire == _FLOAT)
    return name, plain if many else plain[0], kind, wire


def _plain(field: _Field, *, is_bool: bool) -> Any:
    if field.wire == _BYTES:
        return bytes(field.value).decode()
    if field.wire == _VARINT and is_bool:
        return bool(field.value)
    return field.value - (1 << 64) if field.wire == _VARINT and field.value >= 1 << 63 else field.value


def _fields(body: bytes) -> Iterator[_Field]:
    """The fields of a message, whatever it is."""
    at = 0
    while at < len(body):
        tag, at = _varint(body, at)
        wire = tag & 7
        value: Any
        if wire == _VARINT:
            value, at = _varint(body, at)
        elif wire == _BYTES:
            size, at = _varint(body, at)
            value, at = body[at : at + size], at + size
            if at > len(body):
                raise ValueError("a text that is longer than its message")
        elif wire in (_FLOAT, _DOUBLE):
            size = 4 if wire == _FLOAT else 8
            value, at = struct.unpack_from("<f" if wire == _FLOAT else "<d", body, at)[0], at + size
        else:
            raise ValueError(f"wire type {wire}")
        yield _Field(tag >> 3, wire, value)


def _varint(body: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = body[at]
        at += 1
        if shift > 63:
            raise ValueError("a number of more than 64 bits")
        value |= (byte & 0x7F) << shift
        shift += 7
        if byte < 0x80:
            return value, at


def _varints(body: bytes) -> list[int]:
    values, at = [], 0
    while at < len(body):
        value, at = _varint(body, at)
        values.append(value)
    return values
