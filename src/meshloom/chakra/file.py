"""Chakra files: varint-delimited protobuf messages, first `GlobalMetadata`, then one `Node` each; gzip is read too.

Promises that a file under its final name is whole (`whole_file`), that what it does not know survives a round trip,
and that a broken file raises TraceError with the byte where it broke. Does not judge content: that is `check`.
"""

from __future__ import annotations

import gzip
import os
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from google.protobuf.message import DecodeError

from meshloom.chakra import et_def_pb2 as _generated
from meshloom.chakra.trace import ATTRIBUTES, Kind, Node, NodeType, Trace, Typed
from meshloom.errors import FolderError, TraceError

et_def_pb2: Any = _generated  # made at import: type checkers do not see its classes
_MAX_MESSAGE = 1 << 30  # a length beyond this is a broken file, not a node


@contextmanager
def whole_file(path: Path) -> Iterator[IO[bytes]]:
    """A binary file that gets its name only once it is whole and on disk; raises FolderError if that cannot be."""
    path = Path(path)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with part.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except OSError as error:
        raise FolderError(f"{path}: expected to write here, got '{error.strerror}'; choose another folder") from error
    finally:
        with suppress(OSError):  # what went wrong is told already
            part.unlink(missing_ok=True)


def write(trace: Trace, path: str | Path) -> Path:
    """Write `trace` to `path` (gzip if it ends in .gz) and return the path; raises FolderError."""
    path = Path(path)
    with whole_file(path) as file:
        # mtime=0: the same trace gives the same bytes
        stream: Any = gzip.GzipFile(fileobj=file, mode="wb", mtime=0, filename="") if path.suffix == ".gz" else file
        for message in _encode(trace):
            body = message.SerializeToString()
            stream.write(_varint(len(body)))
            stream.write(body)
        if stream is not file:
            stream.close()
    return path


def read(path: str | Path) -> Trace:
    """The trace in the file `path`; raises TraceError where it is not a Chakra trace."""
    path = Path(path)
    try:
        data = path.read_bytes()
        if data[:2] == b"\x1f\x8b":
            data = gzip.decompress(data)
    except (OSError, EOFError, zlib.error) as error:
        what = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise TraceError(f"{path}: expected a Chakra trace (.et or .et.gz), got '{what}'") from error
    messages = _frames(data, path)
    offset, first = next(messages, (0, b""))
    if not data:
        raise TraceError(f"{path}: expected a Chakra trace (.et or .et.gz), the file is empty")
    meta = _parse(et_def_pb2.GlobalMetadata, first, path, offset)
    if not meta.version and not meta.attr and len(first):
        raise TraceError(f"{path}: byte {offset}: expected GlobalMetadata as the first message; not a Chakra trace")
    nodes = [_decode(_parse(et_def_pb2.Node, body, path, offset)) for offset, body in messages]
    return Trace(nodes=nodes, attrs=_attrs(meta.attr), version=meta.version)


def read_all(where: str | Path) -> dict[int, Trace]:
    """Every rank's trace of a file or folder, by rank; raises TraceError if there is none or a rank comes twice.

    A folder may be a trace folder or a run folder, whose `trace` folder is then meant.
    """
    where = Path(where)
    if where.is_dir():
        folders = [where, where / "trace"]
        files = next((found for folder in folders if (found := sorted(folder.glob("*.et*")))), [])
        if not files:
            raise TraceError(f"{where}: expected a folder with rank<r>.et files (or a run folder), found none")
    else:
        files = [where]
    traces: dict[int, Trace] = {}
    for index, file in enumerate(files):
        trace = read(file)
        rank = int(trace.get("rank", index))
        if rank in traces:
            raise TraceError(f"{file}: expected one trace a rank, but rank {rank} was already read from this folder")
        traces[rank] = trace
    return dict(sorted(traces.items()))


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _frames(data: bytes, path: Path) -> Iterator[tuple[int, bytes]]:
    """(offset, body) of each message."""
    at, end = 0, len(data)
    while at < end:
        start, size, shift = at, 0, 0
        while True:
            if at >= end or shift > 28:
                raise TraceError(
                    f"{path}: byte {start}: expected the length of a message; truncated, or no Chakra trace"
                )
            byte = data[at]
            at += 1
            size |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                break
        if size > _MAX_MESSAGE or at + size > end:
            raise TraceError(
                f"{path}: byte {start}: expected a message of {size} bytes, got {end - at}; "
                "truncated, or no Chakra trace"
            )
        yield at, data[at : at + size]
        at += size


def _parse(kind: Any, body: bytes, path: Path, offset: int) -> Any:
    try:
        return kind.FromString(body)
    except DecodeError as error:
        raise TraceError(
            f"{path}: byte {offset}: expected a {kind.DESCRIPTOR.name} message; damaged, or no Chakra trace"
        ) from error


def _encode(trace: Trace) -> Iterable[Any]:
    meta = et_def_pb2.GlobalMetadata(version=trace.version)
    _set_attrs(meta.attr, trace.attrs)
    yield meta
    for node in trace.nodes:
        # micros are for others: start rounded down, duration up, so that nothing measured becomes 0
        message = et_def_pb2.Node(
            id=node.id,
            name=node.name,
            type=int(node.type),
            ctrl_deps=node.ctrl_deps,
            data_deps=node.data_deps,
            start_time_micros=node.start_ns // 1000,
            duration_micros=-(-node.duration_ns // 1000),
        )
        for field, info in (("inputs", node.inputs), ("outputs", node.outputs)):
            if info is not None:
                io = getattr(message, field)
                io.values, io.shapes, io.types = info
        if node.start_ns % 1000 or node.duration_ns % 1000:
            _set_attrs(message.attr, {"start_ns": node.start_ns, "duration_ns": node.duration_ns})
        _set_attrs(message.attr, node.attrs)
        yield message


def _set_attrs(field: Any, attrs: dict[str, Any]) -> None:
    for name, value in attrs.items():
        kind, many, value = value if isinstance(value, Typed) else (*_kind_of(name, value), value)
        attr = field.add(name=name)
        if many:
            # SetInParent: an empty list is still a list
            values = getattr(attr, f"{kind}_list")
            values.SetInParent()
            values.values.extend(value)
        else:
            setattr(attr, f"{kind}_val", value)


def _kind_of(name: str, value: Any) -> tuple[Kind, bool]:
    """The protobuf kind that our dialect gives the attribute: by `ATTRIBUTES`, else by the Python type."""
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


def _attrs(field: Any) -> dict[str, Any]:
    attrs: dict[str, Any] = {}
    for attr in field:
        which = attr.WhichOneof("value")
        if which is None:
            continue
        kind, _, shape = which.rpartition("_")
        value = getattr(attr, which)
        many = shape == "list"
        if many:
            value = list(value.values)
        attrs[attr.name] = value if _kind_of(attr.name, value) == (kind, many) else Typed(kind, many, value)
    return attrs


def _decode(message: Any) -> Node:
    attrs = _attrs(message.attr)
    start_ns, duration_ns = attrs.pop("start_ns", None), attrs.pop("duration_ns", None)
    return Node(
        id=message.id,
        name=message.name,
        type=NodeType(message.type) if 0 <= message.type <= 7 else NodeType.INVALID,
        data_deps=list(message.data_deps),
        ctrl_deps=list(message.ctrl_deps),
        start_ns=message.start_time_micros * 1000 if start_ns is None else start_ns,
        duration_ns=message.duration_micros * 1000 if duration_ns is None else duration_ns,
        attrs=attrs,
        inputs=_info(message, "inputs"),
        outputs=_info(message, "outputs"),
    )


def _info(message: Any, field: str) -> tuple[str, str, str] | None:
    if not message.HasField(field):
        return None
    info = getattr(message, field)
    return info.values, info.shapes, info.types
