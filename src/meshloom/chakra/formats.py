"""Traces in other forms: Chakra JSON, NetworkX node-link JSON, GraphML; there and back without loss.

The form follows from the file's name: `.et`, `.et.gz`, `.node-link.json`, `.json` (Chakra), `.graphml`. Chakra JSON is
one document here; the reference's jsonizer writes its messages one after the other, which is read too.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Iterator
from html import escape
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree.ElementTree import ParseError

import networkx as nx
from google.protobuf import json_format
from google.protobuf.message import DecodeError

from meshloom.chakra import et_def_pb2 as _generated
from meshloom.chakra import file
from meshloom.chakra.attribute import kind_of
from meshloom.chakra.trace import Node, NodeType, Trace, Typed
from meshloom.errors import TraceError, UsageError

et_def_pb2: Any = _generated  # made at import: type checkers do not see its classes
# What a document of another layout ends in: keys, types, ranges, and brackets too deep to follow.
_WRONG = (LookupError, ValueError, TypeError, AttributeError, OverflowError, RecursionError)


class Form(NamedTuple):
    """How a form is read from and written to the file of a path."""

    read: Callable[[Path], Trace]
    write: Callable[[Trace, Path], Path]


def form_of(path: Path) -> Form:
    """The form that the path's name means; raises UsageError."""
    for ending, form in FORMS.items():
        if path.name.endswith(ending):
            return form
    raise UsageError(f"{path}: expected a name that ends in {', '.join(FORMS)}")


def read_any(where: str | Path) -> dict[int, Trace]:
    """The traces of a file or folder by rank, of a file in the form that its name means; raises TraceError."""
    path = Path(where)
    if path.suffix in (".json", ".graphml") and path.is_file():
        trace = form_of(path).read(path)
        return {trace.rank: trace}
    return file.read_all(path)


def convert(source: Path, target: Path, *, version: str | None = None) -> Trace:
    """Read `source`, write `target`, each in the form that its name means, and return the trace; raises TraceError.

    `version` is the version of Chakra that the target names, by default that of the source.
    """
    reader, writer = form_of(source), form_of(target)
    trace = reader.read(source)
    if version is not None:
        trace = Trace(nodes=trace.nodes, attrs=trace.attrs, version=version)
    writer.write(trace, target)
    return trace


# -- Chakra JSON


def _write_json(trace: Trace, path: Path) -> Path:
    bodies = iter(file.encode(trace))
    meta = et_def_pb2.GlobalMetadata.FromString(next(bodies))
    with file.whole_file(path) as out:
        out.write(b'{"globalMetadata": ' + _dumps(json_format.MessageToDict(meta)) + b', "nodes": [')
        for index, body in enumerate(bodies):  # node by node: a large trace never stands in memory twice
            out.write(
                (b",\n" if index else b"\n") + _dumps(json_format.MessageToDict(et_def_pb2.Node.FromString(body)))
            )
        out.write(b"\n]}\n")
    return path


def _dumps(table: Any) -> bytes:
    return json.dumps(table, ensure_ascii=False).encode("utf-8", errors="surrogatepass")


def _read_json(path: Path) -> Trace:
    documents = _documents(path)
    first = documents[0] if documents else None
    if isinstance(first, dict) and isinstance(first.get("workload_graph"), list):
        return _from_workload_graph(first, path)
    if isinstance(first, dict) and "globalMetadata" in first:
        nodes = first.get("nodes", [])
        documents = [first["globalMetadata"], *(nodes if isinstance(nodes, list) else [nodes])]
    try:
        meta = json_format.ParseDict(documents[0], et_def_pb2.GlobalMetadata())
        nodes = [json_format.ParseDict(document, et_def_pb2.Node()) for document in documents[1:]]
        return file.decode([meta.SerializeToString(), *(node.SerializeToString() for node in nodes)])
    except (json_format.ParseError, DecodeError, SystemError, *_WRONG) as error:  # SystemError: protobuf, of surrogates
        raise TraceError(f"{path}: expected Chakra JSON, got {_said(error)}") from error


def _from_workload_graph(table: dict[str, Any], path: Path) -> Trace:
    """The JSON that Chakra's feeder reads: ids, types, dependencies, run times in microseconds, plain attributes."""
    known = {"Id", "Name", "NodeType", "ctrlDeps", "ctrl_deps", "data_deps", "runtime"}
    try:
        for node in table["workload_graph"]:
            if not isinstance(node.get("runtime", 0), int | float):  # a text would be repeated
                raise TypeError(f"runtime as a number, but {node['runtime']!r:.40}")
        nodes = [
            Node(
                id=node["Id"],
                name=node["Name"],
                type=NodeType(node["NodeType"]),
                ctrl_deps=node.get("ctrlDeps", node.get("ctrl_deps", [])),
                data_deps=node.get("data_deps", []),
                duration_ns=round(1000 * node.get("runtime", 0)),
                attrs={name: value for name, value in node.items() if name not in known},
            )
            for node in table["workload_graph"]
        ]
        attrs = {name: value for name, value in table.items() if name != "workload_graph"}
        return _stored(Trace(nodes=nodes, attrs=attrs))
    except (DecodeError, *_WRONG) as error:
        raise TraceError(f"{path}: expected the JSON of Chakra's feeder, got a node without {_said(error)}") from error


def _stored(trace: Trace) -> Trace:
    """The trace with its nodes as they stand in files, which shows that they can; raises one of `_WRONG`."""
    return file.decode(file.encode(trace))


def _said(error: Exception) -> str:
    return f"'{(str(error).splitlines() or [type(error).__name__])[0][:200]}'"


def _documents(path: Path) -> list[Any]:
    text, decoder, found, at = _text(path), json.JSONDecoder(), [], 0
    while at < len(text):
        if text[at].isspace():
            at += 1
            continue
        try:
            document, at = decoder.raw_decode(text, at)
        except json.JSONDecodeError as error:
            raise TraceError(f"{path}: byte {error.pos}: expected JSON, {error.msg}") from error
        except (ValueError, RecursionError) as error:  # a number of thousands of digits, thousands of brackets
            raise TraceError(f"{path}: byte {at}: expected JSON, got {_said(error)}") from error
        found.append(document)
    return found


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise TraceError(f"{path}: expected a trace as text, got '{error}'") from error


# -- graphs


def _node_facts(node: Node) -> dict[str, Any]:
    return {
        "name": node.name,
        "type": node.type.name,
        "start_ns": node.start_ns,
        "duration_ns": node.duration_ns,
        "attrs": _pack(node.attrs),
        "io": json.dumps([node.inputs, node.outputs]),
    }


def _edges(trace: Trace) -> Iterator[tuple[int, int, str, int, int]]:
    """(what is needed, what needs it, kind, place in its list, number among the edges of the two)."""
    for node in trace.nodes:
        keys: dict[int, int] = {}
        for kind, dependencies in (("data", node.data_deps), ("control", node.ctrl_deps)):
            for place, dependency in enumerate(dependencies):
                key = keys.get(dependency, 0)
                keys[dependency] = key + 1
                yield dependency, node.id, kind, place, key


def from_graph(graph: Any, where: str) -> Trace:
    """The trace of a graph that a writer of this module made; raises TraceError where it is another graph.

    An edge goes from what is needed to what needs it, its `kind` is data or control. Nodes carry name, type, start_ns,
    duration_ns and, as JSON text, all attributes with their protobuf kinds.
    """
    deps: dict[tuple[Any, str], list[tuple[int, Any]]] = {}
    nodes = []
    try:
        for source, target, facts in graph.edges(data=True):
            deps.setdefault((target, str(facts.get("kind"))), []).append((int(facts.get("place", 0)), source))
        for key, facts in graph.nodes(data=True):
            inputs, outputs = (tuple(info) if info is not None else None for info in json.loads(facts["io"]))
            nodes.append(
                Node(
                    id=int(key),
                    name=facts["name"],
                    type=NodeType[facts["type"]],
                    data_deps=[int(dep) for _, dep in sorted(deps.get((key, "data"), []))],
                    ctrl_deps=[int(dep) for _, dep in sorted(deps.get((key, "control"), []))],
                    start_ns=int(facts["start_ns"]),
                    duration_ns=int(facts["duration_ns"]),
                    attrs=_unpack(facts["attrs"]),
                    inputs=inputs,
                    outputs=outputs,
                )
            )
        attrs, version = _unpack(graph.graph["attrs"]), str(graph.graph["version"])
        return _stored(Trace(nodes=nodes, attrs=attrs, version=version))
    except (DecodeError, *_WRONG) as error:
        raise TraceError(
            f"{where}: expected a graph that `meshloom convert` wrote, got one without {_said(error)}"
        ) from error


def _pack(attrs: dict[str, Any]) -> str:
    def packed(name: str, value: Any) -> list[Any]:
        kind, many, plain = value if isinstance(value, Typed) else (*kind_of(name, value), value)
        if kind == "bytes":
            plain = [base64.b64encode(item).decode() for item in plain] if many else base64.b64encode(plain).decode()
        return [kind, many, plain]

    return json.dumps({name: packed(name, value) for name, value in attrs.items()})


def _unpack(text: str) -> dict[str, Any]:
    attrs: dict[str, Any] = {}
    for name, (kind, many, plain) in json.loads(text).items():
        value = plain
        if kind == "bytes":
            value = [base64.b64decode(item) for item in plain] if many else base64.b64decode(plain)
        attrs[name] = value if kind_of(name, value) == (kind, many) else Typed(kind, many, value)
    return attrs


def _write_node_link(trace: Trace, path: Path) -> Path:
    facts = {"version": trace.version, "attrs": _pack(trace.attrs)}
    with file.whole_file(path) as out:  # node by node, as everywhere here: the graph never stands in memory
        out.write(b'{"directed": true, "multigraph": true, "graph": ' + _dumps(facts) + b', "nodes": [')
        for index, node in enumerate(trace.nodes):
            out.write((b",\n" if index else b"\n") + _dumps({**_node_facts(node), "id": node.id}))
        out.write(b'\n], "edges": [')
        for index, (source, target, kind, place, key) in enumerate(_edges(trace)):
            edge = {"kind": kind, "place": place, "source": source, "target": target, "key": key}
            out.write((b",\n" if index else b"\n") + _dumps(edge))
        out.write(b"\n]}\n")
    return path


def _read_node_link(path: Path) -> Trace:
    try:
        graph = nx.node_link_graph(json.loads(_text(path)), edges="edges")
    except (nx.NetworkXException, *_WRONG) as error:
        raise TraceError(f"{path}: expected NetworkX node-link JSON, got '{error}'") from error
    return from_graph(graph, str(path))


_GRAPHML = {  # what stands at nodes, edges and the graph: name -> type in XML
    "node": {"name": "string", "type": "string", "start_ns": "long", "duration_ns": "long", "attrs": "string",
             "io": "string"},
    "edge": {"kind": "string", "place": "long"},
    "graph": {"version": "string", "attrs": "string"},
}  # fmt: skip


def _write_graphml(trace: Trace, path: Path) -> Path:
    def data(where: str, facts: dict[str, Any]) -> str:
        return "".join(f'<data key="{where}.{name}">{_xml(str(facts[name]))}</data>' for name in _GRAPHML[where])

    with file.whole_file(path) as out:
        out.write(b'<?xml version="1.0" encoding="utf-8"?>\n<graphml xmlns="http://graphml.graphdrawing.org/xmlns">\n')
        for where, names in _GRAPHML.items():
            for name, xml_type in names.items():
                key = f'<key id="{where}.{name}" for="{where}" attr.name="{name}" attr.type="{xml_type}"/>\n'
                out.write(key.encode())
        facts = {"version": trace.version, "attrs": _pack(trace.attrs)}
        out.write(f'<graph edgedefault="directed">{data("graph", facts)}\n'.encode())
        for node in trace.nodes:
            out.write(f'<node id="{node.id}">{data("node", _node_facts(node))}</node>\n'.encode())
        for source, target, kind, place, number in _edges(trace):
            inside = data("edge", {"kind": kind, "place": place})
            out.write(f'<edge source="{source}" target="{target}" id="{number}">{inside}</edge>\n'.encode())
        out.write(b"</graph>\n</graphml>\n")
    return path


def _xml(text: str) -> str:
    """The text as XML has it; it has no control characters."""
    return "".join(sign if sign >= " " or sign in "\t\n" else "\ufffd" for sign in escape(text))


def _read_graphml(path: Path) -> Trace:
    text = _text(path)
    if "<!DOCTYPE" in text or "<!ENTITY" in text:
        raise TraceError(f"{path}: expected GraphML without a document type: entities of strangers are not expanded")
    try:
        graph = nx.parse_graphml(text, force_multigraph=True)
    except (ParseError, nx.NetworkXException, StopIteration, *_WRONG) as error:
        raise TraceError(f"{path}: expected GraphML, got '{error}'") from error
    return from_graph(graph, str(path))


FORMS: dict[str, Form] = {
    ".et": Form(file.read, file.write),
    ".et.gz": Form(file.read, file.write),
    ".node-link.json": Form(_read_node_link, _write_node_link),
    ".json": Form(_read_json, _write_json),
    ".graphml": Form(_read_graphml, _write_graphml),
}
