"""Chakra files: varint-delimited protobuf messages, first `GlobalMetadata`, then one `Node` each; gzip is read too.

Promises that a file under its final name is whole (`whole_file`), that what it does not know survives a round trip,
and that a broken file raises TraceError with the byte where it broke. Does not judge content: that is `check`.
"""

from __future__ import annotations

import gc
import gzip
import os
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from google.protobuf.message import DecodeError

from meshloom.chakra import et_def_pb2 as _generated
from meshloom.chakra.attribute import AttributeDecoder, AttributeEncoder, varint
from meshloom.chakra.trace import Node, NodeType, Trace
from meshloom.errors import FolderError, TraceError

et_def_pb2: Any = _generated  # made at import: type checkers do not see its classes
_TYPES = tuple(NodeType)
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


@contextmanager
def paused_collection() -> Iterator[None]:
    """Within this, Python does not look for garbage: among millions of new objects it finds none, and takes longer
    than all the rest."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def write(trace: Trace, path: str | Path) -> Path:
    """Write `trace` to `path` (gzip if it ends in .gz) and return the path; raises FolderError."""
    path = Path(path)
    with whole_file(path) as file:
        # mtime=0: the same trace gives the same bytes
        stream: Any = gzip.GzipFile(fileobj=file, mode="wb", mtime=0, filename="") if path.suffix == ".gz" else file
        for body in encode(trace):
            stream.write(varint(len(body)))
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
    decoder = AttributeDecoder()
    if not meta.version and not meta.attr and len(first):
        raise TraceError(f"{path}: byte {offset}: expected GlobalMetadata as the first message; not a Chakra trace")
    try:
        with paused_collection():
            nodes = [_decode(_parse(et_def_pb2.RawNode, body, path, offset), decoder) for offset, body in messages]
        attrs = decoder.all(attr.SerializeToString() for attr in meta.attr)
    except DecodeError as error:
        raise TraceError(f"{path}: expected attributes in every node; damaged, or no Chakra trace") from error
    return Trace(nodes=nodes, attrs=attrs, version=meta.version)


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


def encode(trace: Trace) -> Iterable[bytes]:
    """The bytes of each message of the trace's file, GlobalMetadata first."""
    meta = et_def_pb2.GlobalMetadata(version=trace.version)
    encoder = AttributeEncoder()
    meta.attr.extend(et_def_pb2.AttributeProto.FromString(raw) for raw in encoder.all(trace.attrs))
    yield meta.SerializeToString()
    raw_node = et_def_pb2.RawNode
    for node in trace.nodes:
        start_ns, duration_ns = node.start_ns, node.duration_ns
        attrs = encoder.all(node.attrs)
        if start_ns % 1000 or duration_ns % 1000:
            attrs += encoder.all({"start_ns": start_ns, "duration_ns": duration_ns})
        # micros are for others: start rounded down, duration up, so that nothing measured becomes 0
        message = raw_node(
            id=node.id,
            name=node.name,
            type=node.type,
            ctrl_deps=node.ctrl_deps,
            data_deps=node.data_deps,
            start_time_micros=start_ns // 1000,
            duration_micros=-(-duration_ns // 1000),
            attr=attrs,
        )
        if node.inputs is not None:
            message.inputs.values, message.inputs.shapes, message.inputs.types = node.inputs
        if node.outputs is not None:
            message.outputs.values, message.outputs.shapes, message.outputs.types = node.outputs
        yield message.SerializeToString()


def decode(messages: Iterable[bytes]) -> Trace:
    """The trace of the messages that `encode` gives; raises DecodeError."""
    bodies, decoder = iter(messages), AttributeDecoder()
    meta = et_def_pb2.GlobalMetadata.FromString(next(bodies))
    attrs = decoder.all(attr.SerializeToString() for attr in meta.attr)
    nodes = [_decode(et_def_pb2.RawNode.FromString(body), decoder) for body in bodies]
    return Trace(nodes=nodes, attrs=attrs, version=meta.version)


def _decode(message: Any, decoder: AttributeDecoder) -> Node:
    attrs = decoder.all(message.attr)
    start_ns, duration_ns = attrs.pop("start_ns", None), attrs.pop("duration_ns", None)
    kind = message.type
    return Node(
        id=message.id,
        name=message.name,
        type=_TYPES[kind] if 0 <= kind <= 7 else NodeType.INVALID,
        data_deps=message.data_deps[:],
        ctrl_deps=message.ctrl_deps[:],
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
