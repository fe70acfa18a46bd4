"""Attributes of Chakra nodes, from Python values to the bytes of an AttributeProto and back.

Most attributes of a trace repeat (the phase, the module, the dtype), so each different one is encoded and decoded
once; numbers, which do not repeat, take a short way of their own.
"""

from __future__ import annotations

from typing import Any

from meshloom.chakra import et_def_pb2 as _generated
from meshloom.chakra.trace import ATTRIBUTES, Kind, Typed

et_def_pb2: Any = _generated  # made at import: type checkers do not see its classes

_MOST_KEPT = 200_000  # different attributes kept; a trace with more starts over
_INT64_TAG, _UINT64_TAG = 9 << 3, 13 << 3  # field numbers of int64_val and uint64_val, wire type varint
_REPEATING = (str, bool, bytes, int)  # equal values of these have equal bytes; 0.0 and -0.0 have not
_ONE_BYTE = [bytes([value]) for value in range(0x80)]
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
    """Call it with a name and a value for the bytes of the AttributeProto; raises ValueError, TypeError if they do not
    fit the attribute's kind."""

    def __init__(self) -> None:
        self._known: dict[Any, bytes] = {}
        self._number_heads: dict[str, bytes] = {}

    def __call__(self, name: str, value: Any) -> bytes:
        kind = type(value)
        if kind is int and value >= 0:
            head = self._number_heads.get(name)
            if head is None:
                head = self._number_heads[name] = _number_head(name, value)
            if head and value < 1 << 63:
                return head + _varint(value)
        if kind not in _REPEATING:
            return _encode(name, value)
        key = name, kind, value
        found = self._known.get(key)
        if found is None:
            if len(self._known) > _MOST_KEPT:
                self._known.clear()
            found = self._known[key] = _encode(name, value)
        return found


def _number_head(name: str, value: int) -> bytes:
    """The bytes before the number of an int64 or uint64 attribute; empty if it is of another kind."""
    kind, many = kind_of(name, value)
    text = name.encode()
    if many or kind not in ("int64", "uint64") or len(text) > 127:
        return b""
    return b"\x0a" + bytes([len(text)]) + text + bytes([_INT64_TAG if kind == "int64" else _UINT64_TAG])


def _varint(value: int) -> bytes:
    if value < 0x80:
        return _ONE_BYTE[value]
    out = []
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


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
    """Call it with the bytes of an AttributeProto for its name and value; an attribute without a value has no name.

    Raises DecodeError where the bytes are none.
    """

    def __init__(self) -> None:
        self._known: dict[bytes, tuple[str, Any]] = {}
        self._number_names: dict[bytes, str] = {}

    def __call__(self, raw: bytes) -> tuple[str, Any]:
        found = self._known.get(raw)
        if found is not None:
            name, value = found
            return (name, list(value)) if type(value) is list else found
        end = 2 + raw[1] + 1 if len(raw) > 2 else 0
        name = self._number_names.get(raw[:end], "")
        if name and end < len(raw):
            value = _read_varint(raw, end)
            if value >= 0:
                return name, value
        found = _decode(raw)
        if _is_number(raw, end) and kind_of(found[0], 0) == (_NUMBER_TAGS[raw[end - 1]], False):
            self._number_names[raw[:end]] = found[0]
            return found
        if len(self._known) > _MOST_KEPT:
            self._known.clear()
        self._known[raw] = found
        return found


def _is_number(raw: bytes, end: int) -> bool:
    """Whether `raw` is a name of under 128 bytes up to `end`, where an int64 or uint64 begins."""
    return len(raw) > end > 3 and raw[0] == 0x0A and raw[1] < 0x80 and raw[end - 1] in _NUMBER_TAGS


def _read_varint(raw: bytes, at: int) -> int:
    """The number that fills the rest of `raw`; -1 if it does not, or is negative as an int64."""
    last = len(raw) - 1
    if at == last and raw[at] < 0x80:
        return raw[at]
    value = shift = 0
    for index in range(at, last + 1):
        byte = raw[index]
        value |= (byte & 0x7F) << shift
        shift += 7
        if byte < 0x80:
            return value if index == last and value < 1 << 63 else -1
    return -1


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
    return attr.name, value if kind_of(attr.name, value) == (kind, many) else Typed(kind, many, value)
