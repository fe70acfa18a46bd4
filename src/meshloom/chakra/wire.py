"""Nodes on the wire: from `Node` to the bytes of a Chakra message and back, and many of them in one buffer.

A decoded node takes ten times the memory of its bytes, so a trace that was read, captured or synthesised keeps the
bytes (`StoredNodes`) and decodes a node when it is asked for.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, overload

from google.protobuf.message import DecodeError

from meshloom.chakra import et_def_pb2 as _generated
from meshloom.chakra.attribute import AttributeDecoder, AttributeEncoder, varint
from meshloom.chakra.trace import Node, NodeType
from meshloom.errors import TraceError

et_def_pb2: Any = _generated  # made at import: type checkers do not see its classes
_TYPES = tuple(NodeType)
_LONGEST_NS = 1 << 63  # times are kept in 64 bits
ATTR_FIELD = 10  # the number of Node.attr, the last field of a node


def node_type(number: int) -> NodeType:
    """The type of that number; INVALID if there is none."""
    return _TYPES[number] if 0 <= number < len(_TYPES) else NodeType.INVALID


def encode_node(node: Node, encoder: AttributeEncoder) -> bytes:
    """The bytes of the node's message; `encoder` is one for `ATTR_FIELD`."""
    start_ns, duration_ns = node.start_ns, node.duration_ns
    # micros are for others: start rounded down, duration up, so that nothing measured becomes 0
    message = et_def_pb2.RawNode(
        id=node.id,
        name=node.name,
        type=node.type,
        ctrl_deps=node.ctrl_deps,
        data_deps=node.data_deps,
        start_time_micros=start_ns // 1000,
        duration_micros=-(-duration_ns // 1000),
    )
    if node.inputs is not None:
        message.inputs.values, message.inputs.shapes, message.inputs.types = node.inputs
    if node.outputs is not None:
        message.outputs.values, message.outputs.shapes, message.outputs.types = node.outputs
    attrs = node.attrs
    if start_ns % 1000 or duration_ns % 1000:
        attrs = {**attrs, "start_ns": start_ns, "duration_ns": duration_ns}
    body: bytes = message.SerializeToString() + encoder.all(attrs)
    return body


def decode_node(body: bytes, decoder: AttributeDecoder) -> Node:
    """The node of a message's bytes; raises DecodeError."""
    if not body:  # as of a file of zeros, of which there may be many
        raise DecodeError("a node without anything")
    message = et_def_pb2.RawNode.FromString(body)
    attrs = decoder.all(message.attr)
    start_ns, duration_ns = attrs.pop("start_ns", None), attrs.pop("duration_ns", None)
    if start_ns is None:
        start_ns = message.start_time_micros * 1000
    if duration_ns is None:
        duration_ns = message.duration_micros * 1000
    try:
        if not -_LONGEST_NS <= start_ns < _LONGEST_NS or not -_LONGEST_NS <= duration_ns < _LONGEST_NS:
            raise DecodeError("a time of more than centuries")
    except TypeError as error:  # stored as text, or as a list
        raise DecodeError("a time that is no number") from error
    return Node(
        id=message.id,
        name=message.name,
        type=node_type(message.type),
        data_deps=message.data_deps[:],
        ctrl_deps=message.ctrl_deps[:],
        start_ns=start_ns,
        duration_ns=duration_ns,
        attrs=attrs,
        inputs=_info(message, "inputs"),
        outputs=_info(message, "outputs"),
    )


def _info(message: Any, field: str) -> tuple[str, str, str] | None:
    if not message.HasField(field):
        return None
    info = getattr(message, field)
    return info.values, info.shapes, info.types


class StoredNodes(Sequence[Node]):
    """Nodes as the bytes of their messages, each after its length, as they stand in a file; decoded when asked for.

    Raises TraceError, naming `where` and the byte, for a message that is no node.
    """

    __slots__ = ("_begins", "_data", "_decoder", "_encoder", "_ends", "_passed", "_where")

    def __init__(
        self, data: bytes = b"", places: Iterable[tuple[int, int]] = (), where: str = "", passed: int = 0
    ) -> None:
        self._data: bytes | bytearray = data
        self._begins, self._ends = array("Q"), array("Q")  # of each body
        for begin, end in places:
            self._begins.append(begin)
            self._ends.append(end)
        self._where, self._passed = where, passed  # the file, and how many of its bytes came before `data`
        self._decoder = AttributeDecoder()
        self._encoder = AttributeEncoder(ATTR_FIELD)

    @classmethod
    def of(cls, nodes: Iterable[Node]) -> StoredNodes:
        """The nodes, stored; they themselves if they are."""
        if isinstance(nodes, StoredNodes):
            return nodes
        stored = cls()
        for node in nodes:
            stored.append(node)
        return stored

    def append(self, node: Node) -> None:
        """Add a node at the end."""
        if not isinstance(self._data, bytearray):
            self._data = bytearray(self._data)
        body = encode_node(node, self._encoder)
        self._data += varint(len(body))
        self._begins.append(len(self._data))
        self._data += body
        self._ends.append(len(self._data))

    def framed(self) -> memoryview:
        """The nodes as they stand in a file after its first message."""
        if not self._begins:
            return memoryview(b"")
        begin, end = self._begins[0], self._ends[0]
        return memoryview(self._data)[begin - len(varint(end - begin)) :]

    def bodies(self) -> Iterator[bytes]:
        """The bytes of each node's message."""
        return (self._body(index) for index in range(len(self)))

    def _fault(self, index: int) -> TraceError:
        """What to raise where node number `index` cannot be decoded."""
        byte = self._passed + self._begins[index]
        return TraceError(
            f"{self._where or 'trace'}: byte {byte}: expected a Node message with its attributes; damaged, or no "
            "Chakra trace"
        )

    def __len__(self) -> int:
        return len(self._begins)

    def __iter__(self) -> Iterator[Node]:
        decoder = self._decoder
        for index, body in enumerate(self.bodies()):
            try:
                node = decode_node(body, decoder)
            except DecodeError as error:
                raise self._fault(index) from error
            yield node

    @overload
    def __getitem__(self, index: int) -> Node: ...
    @overload
    def __getitem__(self, index: slice) -> list[Node]: ...
    def __getitem__(self, index: int | slice) -> Node | list[Node]:
        if isinstance(index, slice):
            return [self[place] for place in range(*index.indices(len(self)))]
        index = range(len(self))[index]
        try:
            return decode_node(self._body(index), self._decoder)
        except DecodeError as error:
            raise self._fault(index) from error

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence):
            return NotImplemented
        return len(self) == len(other) and all(mine == theirs for mine, theirs in zip(self, other))

    __hash__ = None  # type: ignore[assignment]  # as a list has none

    def _body(self, index: int) -> bytes:
        return bytes(self._data[self._begins[index] : self._ends[index]])


def frames(data: bytes, where: str, passed: int = 0) -> Iterator[tuple[int, int]]:
    """(begin, end) of each message in `data`, which begins at byte `passed` of a file; raises TraceError where it
    breaks off."""
    at = 0
    for begin, end in whole_frames(data):
        at = end
        yield begin, end
    if at < len(data):
        raise TraceError(
            f"{where}: byte {passed + at}: expected another message or the end of the file, got "
            f"{len(data) - at:,} bytes that are no whole message; truncated, or no Chakra trace"
        )


def whole_frames(data: bytes) -> Iterator[tuple[int, int]]:
    """(begin, end) of each message in `data`, up to one that is not whole."""
    at, end = 0, len(data)
    while at < end:
        size = data[at]
        at += 1
        if size >= 0x80:
            size, shift = size & 0x7F, 7
            while True:
                if at >= end or shift > 28:
                    return
                byte = data[at]
                at += 1
                size |= (byte & 0x7F) << shift
                shift += 7
                if byte < 0x80:
                    break
        if at + size > end:
            return
        yield at, at + size
        at += size
