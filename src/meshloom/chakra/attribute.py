"""Attributes of Chakra nodes, from Python values to the bytes of an AttributeProto and back.

Most attributes of a trace repeat (the phase, the module, the dtype), so each different one is encoded and decoded
once; numbers, which do not repeat, take a short way of their own.
"""

from __future__ import annotations

from collections.abc import Iterable
from math import isfinite
from typing import Any

from google.protobuf.message import DecodeError

from meshloom.chakra import et_def_pb2 as _generated
from meshloom.chakra.trace import ATTRIBUTES, Kind, Typed

et_def_pb2: Any = _generated  # made at import: type checkers do not see its classes

_MOST_KEPT = 200_000  # different attributes kept; a trace with more starts over
_INT64_TAG, _UINT64_TAG = 9 << 3, 13 << 3  # field numbers of int64_val and uint64_val, wire type varint
_REPEATING = (str, bool, bytes, int)  # equal values of these have equal bytes; 0.0 and -0.0 have not
_ONE_BYTE = [bytes([value]) for value in range(0x80)]
# The bytes of 14 bits of a varint: as its end, and as what more follows.
_LAST = [*_ONE_BYTE, *(bytes([value & 0x7F | 0x80, value >> 7]) for value in range(0x80, 0x4000))]
_MORE = [bytes([value & 0x7F | 0x80, value >> 7 | 0x80]) for value in range(0x4000)]
_TEXTS = ("string", "bytes")
_NUMBER_TAGS = {_INT64_TAG: "int64", _UINT64_TAG: "uint64"}


def kind_of(name: str, value: Any) -> tuple[Kind, bool]:
    """The protobuf kind that our dialect gives the attribute, and whether it is a list: by `ATTRIBUTES`, else by the
    Python type."""
    known = ATTRIBUTES.get(name)
    if known is not None:
        return known.kind, known.many
    many = isinstance(value, list)
    sample = value[0] if many and value else value
    if isinstance(sample, bool):
        return "bool", many
    if isinstance(sample, int):
        return "int64" if -(1 << 63) <= sample < 1 << 63 else "uint64", many
    if isinstance(sample, float):
        return "double", many
    if isinstance(sample, bytes):
        return "bytes", many
    return "string", many


class AttributeEncoder:
    """Encodes attributes to the bytes that they are in a message whose field number `field` they are.

    Raises ValueError, TypeError where one does not fit its kind.
    """

    def __init__(self, field: int) -> None:
        self._tag = bytes([field << 3 | 2])
        self._known: dict[Any, bytes] = {}
        self._number_heads: dict[str, bytes] = {}

    def all(self, attrs: dict[str, Any]) -> bytes:
        """The bytes of all attributes, in order."""
        known, heads, tag = self._known, self._number_heads, self._tag
        out: list[bytes] = []
        for name, value in attrs.items():
            kind = type(value)
            if kind is int:
                head = heads.get(name)
                if head is None:
                    head = heads[name] = _number_head(name, value)
                if head and 0 <= value < 1 << 63:
                    number = _LAST[value] if value < 0x4000 else varint(value)
                    out.append(tag + _ONE_BYTE[len(head) + len(number)] + head + number)
                    continue
            if kind not in _REPEATING:
                out.append(self._framed(name, value))
                continue
            key = name, kind, value
            found = known.get(key)
            if found is None:
                if len(known) > _MOST_KEPT:
                    known.clear()
                found = known[key] = self._framed(name, value)
            out.append(found)
        return b"".join(out)

    def _framed(self, name: str, value: Any) -> bytes:
        body = _encode(name, value)
        return self._tag + varint(len(body)) + body


def _number_head(name: str, value: int) -> bytes:
    """The bytes before the number of an int64 or uint64 attribute; empty if it is of another kind."""
    kind, many = kind_of(name, value)
    text = name.encode()
    if many or kind not in ("int64", "uint64") or len(text) > 100:  # the whole has a length of one byte
        return b""
    return b"\x0a" + bytes([len(text)]) + text + bytes([_INT64_TAG if kind == "int64" else _UINT64_TAG])


def varint(value: int) -> bytes:
    """The number as a varint, of at least 0."""
    if value < 0x4000:
        return _LAST[value]
    out = b""
    while value >= 0x4000:
        out += _MORE[value & 0x3FFF]
        value >>= 14
    return out + _LAST[value]


def _encode(name: str, value: Any) -> bytes:
    kind, many, value = value if isinstance(value, Typed) else (*kind_of(name, value), value)
    attr = et_def_pb2.AttributeProto(name=name)
    if many:
        values = getattr(attr, f"{kind}_list")
        values.SetInParent()  # an empty list is still a list
        values.values.extend(value)
    else:
        setattr(attr, f"{kind}_val", value)
    return bytes(attr.SerializeToString())


class AttributeDecoder:
    """Decodes the bytes of AttributeProtos; raises DecodeError where they are none."""

    def __init__(self) -> None:
        self._known: dict[bytes, tuple[str, Any]] = {}
        self._number_names: dict[bytes, str] = {}

    def all(self, raws: Iterable[bytes]) -> dict[str, Any]:
        """Name -> value; an attribute without a value is left out."""
        known, names = self._known, self._number_names
        attrs: dict[str, Any] = {}
        for raw in raws:
            found = known.get(raw)
            if found is None:
                end = raw[1] + 3 if len(raw) > 2 else 0
                name = names.get(raw[:end])
                if name is not None and (number := _read_varint(raw, end)) >= 0x80:
                    attrs[name] = number
                    continue
                found = self._learn(raw, end)
                if not found[0]:
                    continue
            attrs[found[0]] = found[1]
        return attrs

    def _learn(self, raw: bytes, end: int) -> tuple[str, Any]:
        name, value = found = _decode(raw)
        if _is_number(raw, end) and kind_of(name, 0) == (_NUMBER_TAGS[raw[end - 1]], False):
            self._number_names[raw[:end]] = name
        if name and not isinstance(value, list | Typed):  # each node has lists of its own, which may be changed
            if len(self._known) > _MOST_KEPT:
                self._known.clear()
            self._known[raw] = found
        return found


def _is_number(raw: bytes, end: int) -> bool:
    """Whether `raw` is a name of under 128 bytes up to `end`, where an int64 or uint64 begins."""
    return len(raw) > end > 3 and raw[0] == 0x0A and raw[1] < 0x80 and raw[end - 1] in _NUMBER_TAGS


def _read_varint(raw: bytes, at: int) -> int:
    """The number that fills the rest of `raw`; -1 if it does not, or is negative as an int64."""
    value, shift, last = 0, 0, 7 * (len(raw) - at - 1)
    for byte in raw[at:]:
        if byte < 0x80:
            return value | byte << shift if shift == last <= 56 else -1
        value |= (byte & 0x7F) << shift
        shift += 7
    return -1


def _is_numeric(kind: str, many: bool, value: Any, expected_many: bool) -> bool:
    if many != expected_many or kind in _TEXTS:
        return False
    return kind not in ("double", "float") or all(map(isfinite, value if many else [value]))


def _decode(raw: bytes) -> tuple[str, Any]:
    attr = et_def_pb2.AttributeProto.FromString(raw)
    which = attr.WhichOneof("value")
    if which is None:
        return "", None
    kind, _, shape = which.rpartition("_")
    value = getattr(attr, which)
    many = shape == "list"
    if many:
        value = list(value.values)
    known = ATTRIBUTES.get(attr.name)
    if known is not None and known.kind not in _TEXTS and not _is_numeric(kind, many, value, known.many):
        raise DecodeError(f"{attr.name} as {kind}")  # who reads it would stumble over anything but a number
    return attr.name, value if kind_of(attr.name, value) == (kind, many) else Typed(kind, many, value)
