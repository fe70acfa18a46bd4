"""Chakra files: varint-delimited protobuf messages, first `GlobalMetadata`, then one `Node` each; gzip is read too.

Promises that a file under its final name is whole (`whole_file`), that what it does not know survives a round trip,
and that a broken file raises TraceError with the byte where it broke. Does not judge content: that is `check`.
"""

from __future__ import annotations

import gc
import gzip
import io
import os
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from errno import EDQUOT, EFBIG, ENOSPC
from itertools import islice
from pathlib import Path
from typing import IO, Any

from google.protobuf.message import DecodeError

from meshloom.chakra import et_def_pb2 as _generated
from meshloom.chakra.attribute import AttributeDecoder, AttributeEncoder, varint
from meshloom.chakra.old import is_old, read_old
from meshloom.chakra.packed import GZIP, Unpacked, unpack
from meshloom.chakra.trace import SCHEMA_VERSION, Trace
from meshloom.chakra.wire import StoredNodes, decode_node, frames, whole_frames
from meshloom.errors import FolderError, TraceError

et_def_pb2: Any = _generated  # made at import: type checkers do not see its classes
_LARGEST_MESSAGE = 1 << 28  # bytes; what has no end by then is no message
_MOST_AT_ONCE = 1 << 20  # nodes of a part: 16 MB of zeros are 16 million empty ones
_META_ATTR_FIELD = 2  # the number of GlobalMetadata.attr


@contextmanager
def whole_file(path: Path, *, num_bytes: int | None = None) -> Iterator[IO[bytes]]:
    """A binary file that gets its name only once it is whole and on disk; raises FolderError if that cannot be.

    `num_bytes`, where it is known, is what the disk must have room for: a full disk is told with it.
    """
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
        is_full = error.errno in (ENOSPC, EDQUOT, EFBIG)
        size = f" a file of {num_bytes:,} bytes" if num_bytes is not None and is_full else ""
        way_out = "make room, or choose another folder" if is_full else "choose another folder"
        raise FolderError(f"{path}: expected to write here{size}, got '{error.strerror}'; {way_out}") from error
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
    meta, nodes = encode_facts(trace.attrs, trace.version), StoredNodes.of(trace.nodes).framed()
    with whole_file(path, num_bytes=len(meta) + nodes.nbytes) as file:
        # mtime=0: the same trace gives the same bytes
        stream: Any = gzip.GzipFile(fileobj=file, mode="wb", mtime=0, filename="") if path.suffix == ".gz" else file
        stream.write(meta)
        stream.write(nodes)
        if stream is not file:
            stream.close()
    return path


def encode_facts(facts: Mapping[str, Any], version: str = SCHEMA_VERSION) -> bytes:
    """What a file begins with: the first message, after its length."""
    body = _encode_meta(Trace(nodes=[], attrs=dict(facts), version=version))
    return varint(len(body)) + body


def read(path: str | Path) -> Trace:
    """The trace in the file `path`, its nodes decoded when they are asked for.

    Raises TraceError where it is not a Chakra trace; for a damaged node, when that node is asked for.
    """
    path = Path(path)
    try:
        data = path.read_bytes()
        if data[:2] == GZIP:
            data = unpack(data)
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise _unreadable(path, error) from error
    if not data:
        raise _empty(path)
    places = frames(data, str(path))
    begin, end = next(places)
    if is_old(data[begin:end]):
        return read_old((data[begin:end] for begin, end in frames(data, str(path))), str(path))
    meta = _decode_meta(data[begin:end], path)
    return Trace(nodes=StoredNodes(data, places, str(path)), attrs=meta.attrs, version=meta.version)


def stream(path: str | Path, *, chunk_bytes: int = 16 << 20) -> Iterator[Trace]:
    """The trace in `path` in parts of about `chunk_bytes`, so that a file of any size fits; raises TraceError.

    Every part has the facts of the file; the first comes at once.
    """
    path = Path(path)
    try:
        with path.open("rb") as plain:
            zipped = plain.read(2) == GZIP
            plain.seek(0)
            file: IO[bytes] = io.BufferedReader(Unpacked(plain)) if zipped else plain
            if is_old(_first(file)):  # they were small
                yield read(path)
                return
            plain.seek(0)
            file = io.BufferedReader(Unpacked(plain)) if zipped else plain
            meta, data, passed = None, b"", 0
            while more := file.read(chunk_bytes):
                data += more
                while places := list(islice(whole_frames(data), _MOST_AT_ONCE)):
                    used = places[-1][1]
                    if meta is None:
                        (begin, end), *places = places
                        meta = _decode_meta(data[begin:end], path)
                    nodes = StoredNodes(data, places, str(path), passed)
                    yield Trace(nodes=nodes, attrs=meta.attrs, version=meta.version)
                    data, passed = data[used:], passed + used
                if len(data) > _LARGEST_MESSAGE:
                    break
            if meta is None and not data:
                raise _empty(path)
            for begin, end in frames(data, str(path), passed):  # only the first message, or one that breaks off
                meta = meta or _decode_meta(data[begin:end], path)
                yield Trace(nodes=[], attrs=meta.attrs, version=meta.version)
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise _unreadable(path, error) from error


def _first(file: IO[bytes]) -> bytes:
    """The first message of the file, or as much of it as there is."""
    data = file.read(1 << 16)
    return next((data[begin:end] for begin, end in whole_frames(data)), b"")


def _unreadable(path: Path, error: Exception) -> TraceError:
    what = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return TraceError(f"{path}: expected a Chakra trace (.et or .et.gz), got '{what}'")


def _empty(path: Path) -> TraceError:
    return TraceError(f"{path}: expected a Chakra trace (.et or .et.gz), the file is empty")


def _decode_meta(body: bytes, path: Path) -> Trace:
    """The facts of the file, without nodes."""
    try:
        meta = et_def_pb2.GlobalMetadata.FromString(body)
        attrs = AttributeDecoder().all(attr.SerializeToString() for attr in meta.attr)
    except DecodeError as error:
        raise TraceError(f"{path}: byte 0: expected a GlobalMetadata message; damaged, or no Chakra trace") from error
    if not meta.version and not meta.attr and body:
        raise TraceError(f"{path}: byte 0: expected GlobalMetadata as the first message; not a Chakra trace")
    return Trace(nodes=[], attrs=attrs, version=meta.version)


def trace_files(where: str | Path) -> list[Path]:
    """The trace file that `where` is, or the files of the folder (or of its `trace` folder); raises TraceError."""
    where = Path(where)
    if not where.is_dir():
        return [where]
    files = next((found for folder in (where, where / "trace") if (found := sorted(folder.glob("*.et*")))), [])
    if not files:
        raise TraceError(f"{where}: expected a folder with rank<r>.et files (or a run folder), found none")
    return files


def read_all(where: str | Path) -> dict[int, Trace]:
    """Every rank's trace of a file or folder, by rank; raises TraceError if there is none or a rank comes twice.

    A folder may be a trace folder or a run folder, whose `trace` folder is then meant.
    """
    files = trace_files(where)
    traces: dict[int, Trace] = {}
    for index, file in enumerate(files):
        trace = read(file)
        rank = trace.get("rank", index)
        if not isinstance(rank, int):
            raise TraceError(f"{file}: expected its rank to be a whole number, got {rank!r}")
        if rank in traces:
            raise TraceError(f"{file}: expected one trace a rank, but rank {rank} was already read from this folder")
        traces[rank] = trace
    return dict(sorted(traces.items()))


def encode(trace: Trace) -> Iterable[bytes]:
    """The bytes of each message of the trace's file, GlobalMetadata first."""
    yield _encode_meta(trace)
    yield from StoredNodes.of(trace.nodes).bodies()


def decode(messages: Iterable[bytes]) -> Trace:
    """The trace of the messages that `encode` gives; raises DecodeError."""
    bodies, decoder = iter(messages), AttributeDecoder()
    meta = et_def_pb2.GlobalMetadata.FromString(next(bodies))
    attrs = decoder.all(attr.SerializeToString() for attr in meta.attr)
    nodes = [decode_node(body, decoder) for body in bodies]
    return Trace(nodes=StoredNodes.of(nodes), attrs=attrs, version=meta.version)


def _encode_meta(trace: Trace) -> bytes:
    meta = et_def_pb2.GlobalMetadata(version=trace.version)
    return bytes(meta.SerializeToString()) + AttributeEncoder(_META_ATTR_FIELD).all(trace.attrs)
