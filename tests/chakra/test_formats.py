"""Every form of a trace, there and back; foreign graphs and the reference's JSON."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import networkx as nx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meshloom import Node, Trace, read, write
from meshloom.chakra.formats import FORMS, convert, form_of
from meshloom.chakra.trace import NodeType, Typed
from meshloom.errors import TraceError, UsageError

# XML cannot hold control characters, so GraphML cannot either
text = st.text(st.characters(min_codepoint=32, exclude_categories=("Cs",), exclude_characters="\ufffe\uffff"))
values = st.one_of(st.booleans(), st.integers(-(2**63), 2**64 - 1), text, st.binary(), st.lists(text),
                   st.builds(Typed, st.just("uint32"), st.just(False), st.integers(0, 2**32 - 1)))  # fmt: skip
attrs = st.dictionaries(st.sampled_from(["x", "y", "한글"]), values, max_size=3)


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_there_and_back(tmp_path_factory: Any, data: st.DataObject) -> None:
    nodes = [
        Node(
            id=number,
            name=data.draw(text),
            type=data.draw(st.sampled_from(NodeType)),
            data_deps=data.draw(st.lists(st.integers(1, number - 1), unique=True)) if number > 1 else [],
            ctrl_deps=data.draw(st.lists(st.integers(1, number - 1), unique=True)) if number > 1 else [],
            start_ns=data.draw(st.integers(0, 2**53)),
            duration_ns=data.draw(st.integers(0, 2**53)),
            attrs=data.draw(attrs),
            inputs=data.draw(st.one_of(st.none(), st.tuples(text, text, text))),
        )
        for number in range(1, data.draw(st.integers(0, 4)) + 1)
    ]
    trace = Trace(nodes=nodes, attrs=data.draw(attrs))
    folder = tmp_path_factory.mktemp("forms")
    for ending, form in FORMS.items():
        path = folder / f"trace{ending}"
        assert form.read(form.write(trace, path)) == trace, ending


def test_the_demo_through_every_form(demo_run: Path, tmp_path: Path) -> None:
    source = demo_run / "trace" / "rank0.et"
    at = source
    for ending in (".json", ".graphml", ".node-link.json", ".et.gz", ".et"):
        target = tmp_path / f"rank0{ending}"
        convert(at, target)
        at = target
    assert at.read_bytes() == source.read_bytes()


def test_graphml_opens_in_networkx(demo_run: Path, tmp_path: Path) -> None:
    trace = convert(demo_run / "trace" / "rank0.et", tmp_path / "rank0.graphml")
    graph = nx.read_graphml(tmp_path / "rank0.graphml", node_type=int)
    assert len(graph) == len(trace.nodes)
    assert graph.number_of_edges() == sum(len(node.data_deps) + len(node.ctrl_deps) for node in trace.nodes)
    assert nx.is_directed_acyclic_graph(graph)


def test_the_reference_jsonizers_output_is_read(demo_run: Path, tmp_path: Path, monkeypatch: Any) -> None:
    jsonizer = pytest.importorskip("chakra.src.jsonizer.jsonizer", reason="mlc-chakra is not installed")
    source, out = demo_run / "trace" / "rank0.et", tmp_path / "rank0.json"
    monkeypatch.setattr("sys.argv", ["x", "--input_filename", str(source), "--output_filename", str(out)])
    jsonizer.main()
    ours, theirs = read(source), form_of(out).read(out)
    assert [(node.id, node.name, node.data_deps) for node in theirs.nodes] == [
        (node.id, node.name, node.data_deps) for node in ours.nodes
    ]
    assert [set(node.attrs) for node in theirs.nodes] == [set(node.attrs) for node in ours.nodes]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.json", ""), ("a.json", "[1]"), ("a.json", '{"globalMetadata": 3}'), ("a.json", "{"),
        ("a.node-link.json", "[]"), ("a.node-link.json", '{"nodes": [{"id": 1}], "edges": []}'),
        ("a.graphml", "<graphml"), ("a.graphml", '<!DOCTYPE x [<!ENTITY a "b">]><graphml>&a;</graphml>'),
    ],
)  # fmt: skip
def test_what_is_no_trace_is_refused(tmp_path: Path, name: str, content: str) -> None:
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(TraceError, match=r"a\.(json|node-link\.json|graphml): "):
        convert(path, tmp_path / "out.et")
    assert not (tmp_path / "out.et").exists()


def test_a_name_that_means_no_form(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"a\.txt: expected a name that ends in \.et"):
        convert(tmp_path / "a.txt", tmp_path / "b.et")


def test_floats_keep_their_bits(tmp_path: Path) -> None:
    trace = Trace(nodes=[Node(id=1, name="a", type=NodeType.COMP, attrs={"zero": -0.0, "also": 0.0})])
    zero = read(write(trace, tmp_path / "a.et")).nodes[0]
    assert math.copysign(1, zero.attrs["zero"]) == -1
    assert math.copysign(1, zero.attrs["also"]) == 1
