"""Graphs of steps: what stands in them, in every form, of good traces and of bad ones."""

from __future__ import annotations

import io
import shutil
import xml.etree.ElementTree as ET
from pathlib import Path

import networkx as nx
import pytest
from click.testing import CliRunner
from PIL import Image

from meshloom.chakra.build import Region, TraceBuilder
from meshloom.chakra.check import check
from meshloom.chakra.cost import Cost, Tensor
from meshloom.chakra.file import write
from meshloom.chakra.formats import FORMS, read_any
from meshloom.chakra.trace import CommType, Node, NodeType, Trace
from meshloom.cli.__main__ import _run, cli
from meshloom.errors import UsageError
from meshloom.view.draw import png, svg
from meshloom.view.graph import Choice, contracted, part_of, short_name, step_graph
from meshloom.view.graph_files import checked, read_source, visualize_trace, write_graph, write_part
from meshloom.view.place import in_layers, place

NASTY = "<script>alert(\"x\")</script> & '한국어' \x01"


def step(num_layers: int = 2, *, name: str = "aten::mm") -> Trace:
    """A step of `num_layers` products, each followed by an all-reduce; backward the same way up."""
    builder = TraceBuilder(rank=0, world_size=2, source="synth", model="toy", plan="tp2")
    matrix = Tensor((4, 8), 4)
    for phase, layers in (("forward", range(num_layers)), ("backward", reversed(range(num_layers)))):
        for layer in layers:
            whole = [Region("x", 0, 128)]
            facts = {"phase": phase, "module": f"h.{layer}.mlp", "dtype": "float32"}
            builder.compute(name, cost=Cost(512, 384, "gemm", (1, 4, 8, 8)), inputs=[matrix], outputs=[matrix],
                            reads=whole, writes=whole, **facts)  # fmt: skip
            builder.collective("all_reduce", comm_type=CommType.ALL_REDUCE, ranks=[0, 1], num_bytes=128,
                               output_bytes=128, axis="tp", reads=whole, writes=whole, **facts)  # fmt: skip
    return builder.finish()


def kinds(graph: nx.DiGraph) -> dict[str, int]:
    found: dict[str, int] = {}
    for _, facts in graph.nodes(data=True):
        found[facts["kind"]] = found.get(facts["kind"], 0) + 1
    return found


def test_ops_tensors_and_communication_alternate() -> None:
    graph = step_graph(step())
    assert graph.graph["level"] == "op"
    assert kinds(graph) == {"op": 4, "communication": 4, "tensor": 8}
    assert list(nx.topological_sort(graph)) == ["1", "t1", "2", "t2", "3", "t3", "4", "t4",
                                                "5", "t5", "6", "t6", "7", "t7", "8", "t8"]  # fmt: skip
    assert graph.nodes["t1"]["label"] == "4×8 float32"
    assert graph.nodes["t1"]["bytes"] == 128
    assert graph.nodes["2"]["label"] == "all_reduce (tp)"
    assert graph.edges["t1", "2"]["kind"] == "communication"
    wide = step_graph(step(), choice=Choice(phase="forward"))
    assert kinds(wide)["op"] == 2


def test_a_part_of_a_step() -> None:
    layer = step_graph(step(4), choice=Choice(layers=(1, 2), phase="forward"))
    assert {facts["module"] for _, facts in layer.nodes(data=True)} == {"h.1.mlp", "h.2.mlp"}
    comm = step_graph(step(4), choice=Choice(comm=True))
    assert kinds(comm)["communication"] == 8
    for wrong in (Choice(layers=(9, 9)), Choice(phase="nosuch")):
        with pytest.raises(UsageError, match="expected a part of the step"):
            step_graph(step(), choice=wrong)


def test_what_is_left_out_is_passed_over() -> None:
    assert contracted({1: [], 2: [1], 3: [2], 4: [3, 1]}, {1: None, 4: None}) == {1: [], 4: [1]}
    part = part_of(step(3), Choice(phase="backward"))
    assert len(part.nodes) == 6
    assert check(part) == []


def test_too_many_ops_are_gathered_and_it_says_so() -> None:
    graph = step_graph(step(150))
    assert graph.graph["level"] == "module"
    assert "600 ops are too many to read" in graph.graph["notes"]
    assert sum(facts["num_ops"] for _, facts in graph.nodes(data=True)) == 600
    assert len({facts["module"] for _, facts in graph.nodes(data=True)}) <= 60
    assert step_graph(step(150), collapse="op").graph["level"] == "op"


def test_kernels_without_modules_are_gathered_by_name() -> None:
    name = "void at::native::vectorized_elementwise_kernel<4, at::native::Foo<float> >(int, float)"
    assert short_name(name) == "vectorized_elementwise_kernel"
    assert short_name("aten::mm") == "aten::mm"
    nodes = [Node(id=number, name=name, type=NodeType.COMP, attrs={"op_class": "memory"}) for number in (1, 2)]
    graph = step_graph(Trace(nodes=nodes), collapse="module")
    assert [facts["label"] for _, facts in graph.nodes(data=True)] == ["vectorized_elementwise_kernel"]


@pytest.mark.parametrize("name", ["aten::mm", NASTY])
@pytest.mark.parametrize("form", ["json", "graphml"])
def test_graphs_come_back_as_they_were(tmp_path: Path, form: str, name: str) -> None:
    graph = step_graph(step(name=name))
    path = write_graph(graph, tmp_path / f"graph.{form}", form)
    again = read_source(path)
    assert not isinstance(again, dict)
    assert nx.utils.graphs_equal(graph, again)
    assert svg(again, graphviz=False) == svg(graph, graphviz=False)
    other = nx.read_graphml(path) if form == "graphml" else None
    assert other is None or dict(other.nodes(data=True)) == dict(graph.nodes(data=True))


def test_the_picture_holds_the_names_escaped() -> None:
    root = ET.fromstring(svg(step_graph(step(name=NASTY)), graphviz=False))
    texts = [element.text or "" for element in root.iter("{http://www.w3.org/2000/svg}text")]
    titles = [element.text or "" for element in root.iter("{http://www.w3.org/2000/svg}title")]
    assert any("한국어" in text for text in titles)
    assert not list(root.iter("{http://www.w3.org/2000/svg}script"))
    assert {"ops", "tensors", "communication"} <= set(texts)


def test_svg_and_png_show_the_same() -> None:
    graph = step_graph(step(2, name="한국어"))
    size = ET.fromstring(svg(graph, graphviz=False)).get("viewBox", "").split()[2:]
    image = Image.open(io.BytesIO(png(graph, graphviz=False)))
    assert [pytest.approx(2 * float(side), abs=2) for side in size] == list(image.size)
    colours = {colour for _, colour in image.convert("RGB").getcolors(1 << 24) or []}
    assert {(0xE8, 0xF5, 0xE9), (0xE3, 0xF2, 0xFD), (0xFF, 0xEB, 0xEE)} <= colours


def test_layers_put_everything_below_what_it_needs() -> None:
    graph = step_graph(step(5))
    placed = in_layers(graph)
    assert all(placed.corners[one][1] < placed.corners[other][1] for one, other in graph.edges)
    corners = sorted(placed.corners.values())
    assert len(set(corners)) == len(graph), "no box lies on another"


@pytest.mark.skipif(shutil.which("dot") is None, reason="Graphviz is not installed")
def test_graphviz_lays_out_the_same_graph() -> None:
    graph = step_graph(step(5))
    placed = place(graph, graphviz=True)
    assert set(placed.corners) == set(graph)
    assert set(placed.ways) == set(graph.edges)
    assert all(placed.corners[one][1] < placed.corners[other][1] for one, other in graph.edges)


def test_faults_are_marked(tmp_path: Path) -> None:
    good = list(step().nodes)
    cycle = [*good, Node(id=20, name="a", type=NodeType.COMP, data_deps=[21, 99]),
             Node(id=21, name="b", type=NodeType.COMP, data_deps=[20])]  # fmt: skip
    trace = Trace(nodes=cycle)
    graph = step_graph(trace, findings=check(trace))
    assert "dangling-dependency" in graph.nodes["20"]["fault"]
    picture = svg(graph, graphviz=False)
    assert "fault found by check" in picture
    assert 'stroke-width="3.5"' in picture
    assert png(graph, graphviz=False)[:4] == b"\x89PNG"


def test_an_empty_trace_is_a_picture_that_says_so() -> None:
    picture = svg(step_graph(Trace(nodes=[])))
    assert "this trace holds no work" in picture
    assert png(step_graph(Trace(nodes=[])))[:4] == b"\x89PNG"


def test_a_trace_of_order_only_is_drawn_by_its_order() -> None:
    nodes = [Node(id=1, name="a", type=NodeType.COMP), Node(id=2, name="b", type=NodeType.COMP, ctrl_deps=[1])]
    graph = step_graph(Trace(nodes=nodes))
    assert graph.edges["1", "2"]["kind"] == "order"
    assert "its order" in graph.graph["notes"]


def test_foreign_graphs_are_refused(tmp_path: Path) -> None:
    graph = step_graph(step())
    graph.nodes["1"]["kind"] = "virus"
    with pytest.raises(Exception, match="expected kind as"):
        checked(graph, tmp_path)


def test_visualize_trace_writes_four_files(tmp_path: Path) -> None:
    paths = visualize_trace(step(), tmp_path)
    assert [path.name for path in paths] == ["tensor_trace_graph.png", "tensor_trace_graph.json",
                                             "tensor_comm_graph.png", "tensor_trace_chakra.json"]  # fmt: skip
    assert list(FORMS[".json"].read(paths[3]).nodes) == list(step().nodes)
    again = read_source(paths[1])
    assert not isinstance(again, dict)
    assert kinds(again)["tensor"] == 8
    lonely = [node for node in step().nodes if not node.is_comm]
    assert len(visualize_trace(Trace(nodes=lonely), tmp_path / "alone")) == 4


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write(step(), tmp_path / "rank0.et")
    run = CliRunner()
    for form in ("svg", "png", "json", "graphml", "dot", "chakra"):
        result = run.invoke(cli, ["view", "graph", str(file), "--format", form, "--phase", "forward"])
        assert result.exit_code == 0, result.output
    names = {path.name for path in tmp_path.iterdir()}
    assert {"graph.svg", "graph.png", "graph.json", "graph.graphml", "graph.dot", "graph.chakra.json"} <= names
    result = run.invoke(cli, ["view", "graph", str(tmp_path / "graph.json"), "--out", str(tmp_path / "again.svg")])
    assert result.exit_code == 0, result.output
    assert (tmp_path / "again.svg").read_text() == (tmp_path / "graph.svg").read_text()
    for arguments, told in (
        (["--rank", "7"], "expected one of 0"),
        (["--layers", "x"], "expected a number or a range"),
        (["--layers", "5-7"], "the trace has layers 0 to 1"),
    ):
        assert _run(["view", "graph", str(tmp_path / "rank0.et"), *arguments]) == 2
        assert told in capsys.readouterr().err


def test_the_chosen_part_as_chakra_json_is_a_trace_that_check_reads(tmp_path: Path) -> None:
    trace = step()
    path = write_part(trace, tmp_path / "part.chakra.json", Choice())
    assert [node.name for node in read_any(path)[0].nodes] == [node.name for node in trace.nodes]
