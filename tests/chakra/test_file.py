"""Chakra files: read back, foreign attributes, the reference package, and broken bytes."""

from __future__ import annotations

import errno
import gzip
import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meshloom import Node, Trace, read, write
from meshloom.chakra.attribute import varint
from meshloom.chakra.file import read_all
from meshloom.chakra.trace import NodeType, Typed
from meshloom.errors import FolderError, TraceError

scalars = st.one_of(st.booleans(), st.integers(-(2**63), 2**64 - 1), st.floats(allow_nan=False), st.text(), st.binary())
typed = st.one_of(
    st.builds(Typed, st.just("uint32"), st.just(False), st.integers(0, 2**32 - 1)),
    st.builds(Typed, st.just("sint64"), st.just(True), st.lists(st.integers(-(2**63), 2**63 - 1))),
    st.builds(Typed, st.just("fixed64"), st.just(False), st.integers(0, 2**64 - 1)),
)
attrs = st.dictionaries(st.text("abcxyz", min_size=1), st.one_of(scalars, typed, st.lists(st.text())), max_size=5)
nodes = st.builds(
    Node,
    id=st.integers(1, 2**64 - 1),  # a node without anything takes no byte, and is taken for damage
    name=st.text(),
    type=st.sampled_from(NodeType),
    data_deps=st.lists(st.integers(0, 2**64 - 1), max_size=4),
    ctrl_deps=st.lists(st.integers(0, 2**64 - 1), max_size=4),
    start_ns=st.integers(0, 2**62),
    duration_ns=st.integers(0, 2**62),
    attrs=attrs,
    inputs=st.one_of(st.none(), st.tuples(st.text(), st.text(), st.text())),
)


@settings(max_examples=60, deadline=None)
@given(st.lists(nodes, max_size=5), attrs, st.booleans())
def test_a_trace_is_read_back_as_it_was(tmp_path_factory: Any, some: list[Node], facts: Any, packed: bool) -> None:
    trace = Trace(nodes=some, attrs=facts)
    path = tmp_path_factory.mktemp("et") / ("rank0.et.gz" if packed else "rank0.et")
    assert read(write(trace, path)) == trace


def test_equal_traces_are_equal_bytes(tmp_path: Path) -> None:
    trace = Trace(nodes=[Node(id=1, name="a", type=NodeType.COMP)], attrs={"rank": 0})
    first, second = (write(trace, tmp_path / name).read_bytes() for name in ("a.et.gz", "b.et.gz"))
    assert first == second


def test_the_reference_package_reads_our_file(demo_run: Path, tmp_path: Path) -> None:
    protolib = pytest.importorskip("chakra.src.third_party.utils.protolib", reason="mlc-chakra is not installed")
    generated = pytest.importorskip("chakra.schema.protobuf.et_def_pb2")
    path = demo_run / "trace" / "rank0.et"
    ours = read(path)
    with protolib.openFileRd(str(path)) as file:
        meta = generated.GlobalMetadata()
        assert protolib.decodeMessage(file, meta)
        theirs = []
        while True:
            node = generated.Node()
            if not protolib.decodeMessage(file, node):
                break
            theirs.append(node)
    assert meta.version == "0.0.4"
    assert [node.id for node in theirs] == [node.id for node in ours.nodes]
    assert [list(node.data_deps) for node in theirs] == [node.data_deps for node in ours.nodes]
    collectives = [node for node in theirs if node.type == generated.COMM_COLL_NODE]
    assert collectives
    for node in collectives:
        told = {attr.name: attr for attr in node.attr}
        assert told["comm_type"].int64_val == generated.ALL_REDUCE
        assert told["comm_size"].int64_val > 0
        assert int(told["pg_name"].string_val) > 0
        assert told["is_cpu_op"].WhichOneof("value") == "bool_val"


def test_the_reference_jsonizer_reads_our_file(demo_run: Path, tmp_path: Path) -> None:
    jsonizer = pytest.importorskip("chakra.src.jsonizer.jsonizer", reason="mlc-chakra is not installed")
    import sys

    out = tmp_path / "rank0.json"
    before = sys.argv
    sys.argv = ["jsonizer", "--input_filename", str(demo_run / "trace/rank0.et"), "--output_filename", str(out)]
    try:
        jsonizer.main()
    finally:
        sys.argv = before
    decoder, text, found = json.JSONDecoder(), out.read_text(), []
    at = 0
    while at < len(text.rstrip()):
        item, at = decoder.raw_decode(text, at + len(text[at:]) - len(text[at:].lstrip()))
        found.append(item)
    assert [item["name"] for item in found[1:]] == [node.name for node in read(demo_run / "trace/rank0.et").nodes]


def _written(tmp_path: Path) -> bytes:
    some = [Node(id=index, name=f"op{index}", type=NodeType.COMP) for index in range(1, 20)]
    return write(Trace(nodes=some, attrs={"rank": 0}), tmp_path / "whole.et").read_bytes()


@pytest.mark.parametrize("keep", [1, 7, 30, -1])
def test_a_truncated_file_is_refused_with_the_byte(tmp_path: Path, keep: int) -> None:
    broken = tmp_path / "broken.et"
    broken.write_bytes(_written(tmp_path)[:keep])
    with pytest.raises(TraceError, match=r"broken\.et: byte \d+: expected"):
        read(broken)


@settings(max_examples=200, deadline=None)
@given(data=st.binary(max_size=300))
def test_any_bytes_give_a_trace_or_our_error(tmp_path_factory: Any, data: bytes) -> None:
    path = tmp_path_factory.mktemp("bytes") / "any.et"
    path.write_bytes(data)
    with suppress(TraceError):
        read(path)


def test_a_bad_gzip_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "bad.et.gz"
    path.write_bytes(gzip.compress(_written(tmp_path))[:-9])
    with pytest.raises(TraceError, match=r"bad\.et\.gz: expected a Chakra trace"):
        read(path)


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(FolderError, match="expected to write here"):
        write(Trace(nodes=[]), tmp_path / "file" / "rank0.et")


def test_a_failed_write_leaves_nothing_under_the_final_name(tmp_path: Path) -> None:
    bad = Node(id=1, name="a", type=NodeType.COMP, attrs={"comm_tag": 2**40})  # an int32 cannot hold it
    with pytest.raises(ValueError, match="range"):
        write(Trace(nodes=[bad]), tmp_path / "rank0.et")
    assert list(tmp_path.iterdir()) == []


def test_ranks_of_a_folder(tmp_path: Path) -> None:
    for rank in (1, 0):
        write(Trace(nodes=[], attrs={"rank": rank}), tmp_path / "trace" / f"rank{rank}.et")
    assert list(read_all(tmp_path)) == [0, 1]
    write(Trace(nodes=[], attrs={"rank": 1}), tmp_path / "trace" / "rank2.et")
    with pytest.raises(TraceError, match="rank 1 was already read"):
        read_all(tmp_path)


@given(st.integers(min_value=0, max_value=(1 << 64) - 1))
def test_varint_is_protobufs_own(value: int) -> None:
    from google.protobuf.internal.encoder import _VarintBytes  # type: ignore[attr-defined]

    assert varint(value) == _VarintBytes(value)


def test_a_full_disk_says_how_much_was_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trace = Trace(nodes=[Node(id=1, name="a", type=NodeType.COMP)])
    size = write(trace, tmp_path / "a.et").stat().st_size

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(FolderError, match=rf"write here a file of {size} bytes, got 'No space left on device'"):
        write(trace, tmp_path / "b.et")
    assert [path.name for path in tmp_path.iterdir()] == ["a.et"]
