"""Numbers about a step against what the small world was made of: closed forms, all of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from meshloom.chakra.build import TraceBuilder
from meshloom.chakra.file import write
from meshloom.chakra.trace import CommType, Trace
from meshloom.cli.__main__ import _run, cli
from meshloom.errors import FolderError, TraceError
from meshloom.view.diff import diff
from meshloom.view.path import critical_path, memory_curve, path_parts, roofline, thinned
from meshloom.view.report import page, report, report_data
from meshloom.view.scene import Scene, folder, scene
from meshloom.view.stats import collectives, layers, matrix, modules, ops, sent_bytes, shares
from tests.view.scenes import MS, NASTY, predicted, run_folder, world


def small(num_ranks: int = 2) -> Scene:
    traces = world(num_ranks)
    return Scene(name="small", traces=traces, predicted=predicted(traces))


def test_time_is_compute_exposed_communication_and_idle() -> None:
    whole, rows, gaps = shares(small().events("measured"))
    assert whole == MS + 3 * 3 * MS + 2 * (3 * MS // 2)  # the clock starts with the first op of the host
    for row in rows:
        assert (row.compute_ns, row.exposed_ns, row.communication_ns) == (6 * MS, 3 * MS, 3 * MS)
        assert row.compute_ns + row.exposed_ns + row.idle_ns == whole
        assert row.num_gaps == 3
    assert {gap.duration_ns for gap in gaps} == {3 * MS // 2, MS}


def test_ops_and_modules() -> None:
    shown = small()
    rows = {row.name: row for row in ops(shown.events("measured"))}
    assert rows["mm_kernel"].num_events == 6
    assert rows["mm_kernel"].time_ns == 12 * MS
    assert rows["mm_kernel"].flops == 6 * 2 * 128**3
    assert "aten::linear" not in rows, "host scopes are no work"
    assert {row.name: row.num_events for row in modules(shown.events())} == {f"h.{layer}.mlp": 4 for layer in range(3)}
    assert [row.name for row in layers(shown.events())] == ["layer 0", "layer 1", "layer 2"]
    assert sum(row.time_ns for row in ops(shown.events("predicted"))) == 2 * 3 * (MS + MS // 2)


def test_collectives_by_the_formula_of_a_ring() -> None:
    (row,) = collectives(small(4).events("measured"))
    assert (row.kind, row.axis, row.group_size, row.num_events, row.num_bytes) == ("all_reduce", "tp", 4, 12, 65536)
    assert row.bus_bytes_per_second == pytest.approx(2 * 3 / 4 * 65536 / 1e-3)
    ranks, table = matrix(small(4))
    assert ranks == [0, 1, 2, 3]
    sent = 3 * 1.5 * 65536
    assert table == [[0, sent, 0, 0], [0, 0, sent, 0], [0, 0, 0, sent], [sent, 0, 0, 0]]


@pytest.mark.parametrize(("kind", "factor"), [(CommType.ALL_GATHER, 3), (CommType.REDUCE_SCATTER, 0.75),
                                              (CommType.ALL_TO_ALL, 0.75), (CommType.BARRIER, 0)])  # fmt: skip
def test_sent_bytes(kind: CommType, factor: float) -> None:
    builder = TraceBuilder(rank=0, world_size=4, source="synth")
    builder.collective("c", comm_type=kind, ranks=range(4), num_bytes=100, output_bytes=100)
    assert sent_bytes(builder.finish().nodes[0]) == 100 * factor


def test_the_critical_path_leads_over_the_slowest_rank() -> None:
    traces = world()
    slow = TraceBuilder(rank=1, world_size=2, source="capture")
    fast = TraceBuilder(rank=0, world_size=2, source="capture")
    from meshloom.chakra.cost import Cost

    for builder, length in ((fast, 1 * MS), (slow, 5 * MS)):
        cost = Cost(10, 10, "gemm")
        builder.compute("work", cost=cost, lane="s", stream=0, start_ns=1, duration_ns=length)
        builder.collective("sum", comm_type=CommType.ALL_REDUCE, ranks=[0, 1], num_bytes=8, output_bytes=8, after=[1],
                           stream=1, start_ns=1 + length, duration_ns=7 * MS - length)  # fmt: skip
        builder.compute("rest", cost=cost, lane="s", after=[2], stream=0, start_ns=1 + 7 * MS, duration_ns=MS)
    shown = Scene(name="skewed", traces={0: fast.finish(), 1: slow.finish()})
    path = critical_path(shown, shown.events())
    assert [(link.event.rank, link.event.node.name) for link in path][:2] == [(1, "work"), (1, "sum")]
    assert path_parts(path) == {"compute": 6 * MS, "communication": 2 * MS, "waiting": 0}
    whole = Scene(name="w", traces=traces)
    parts = path_parts(critical_path(whole, whole.events()))
    assert parts == {"compute": 6 * MS, "communication": 3 * MS, "waiting": 4 * MS}
    assert critical_path(whole, []) == []


def test_nothing_on_the_critical_path_of_a_prediction_waits() -> None:
    from meshloom.chakra.cost import Cost
    from meshloom.hardware.cluster import load_cluster
    from meshloom.simulate.engine import simulate

    traces = {}
    for rank in range(2):  # two stages, three micro-batches there and back
        builder = TraceBuilder(rank=rank, world_size=2, source="synth")
        for tag in range(6):
            work = builder.compute(
                "work", cost=Cost(10**11, 10**8, "gemm", (1, 4096, 4096, 3000)), lane="s", dtype="float16"
            )
            source = (tag + 1) % 2 if tag < 3 else tag % 2
            last = builder.message("p2p", source=source, destination=1 - source, tag=tag, num_bytes=10**7, after=[work])
            builder.compute("rest", cost=Cost(10**9, 10**8, "memory"), lane="s", after=[last])
        traces[rank] = builder.finish()
    timeline = simulate(traces, load_cluster("h100x8"))
    shown = Scene(name="two stages", traces=traces, predicted=timeline)
    path = critical_path(shown, shown.events("predicted"))
    parts = path_parts(path)
    assert parts["waiting"] == 0
    assert parts["compute"] + parts["communication"] == timeline.makespan_ns
    assert parts["communication"] > 0


def test_memory_rises_and_falls_with_results() -> None:
    shown = small()
    curve = memory_curve([event for event in shown.events("measured") if event.rank == 0])
    assert curve[0] == (0, 0)
    assert curve[-1][1] == 0
    assert max(value for _, value in curve) == 2 * 65536, "a product and its sum, each made while the other is read"
    long = [(time, time % 977) for time in range(100_000)]
    assert len(thinned(long)) <= 1501
    assert max(thinned(long), key=lambda point: point[1])[1] == 976


def test_the_roofline_is_flops_over_bytes_and_time() -> None:
    (point,) = roofline(small().events("measured"))
    assert point.intensity == pytest.approx(2 * 128**3 / (3 * 65536))
    assert point.flops_per_second == pytest.approx(2 * 128**3 / 2e-3)


def test_measured_against_predicted() -> None:
    told = diff(small())
    (row,) = [row for row in told["ops"] if row["module"] == "h.0.mlp"]
    assert (row["change"], row["time_a_ns"], row["time_b_ns"]) == ("faster", 2 * MS, MS)
    assert told["collectives"][0]["count_a"] == 3
    with pytest.raises(TraceError, match="expected measured and predicted times"):
        diff(Scene(name="alone", traces=world()))


def test_two_traces_differ_in_what_was_changed() -> None:
    one, other = Scene(name="a", traces=world(2)), Scene(name="b", traces=world(2, num_layers=4, name="other_kernel"))
    changes = {(row["name"], row["module"]): row["change"] for row in diff(one, other)["ops"]}
    assert changes["mm_kernel", "h.0.mlp"] == "removed"
    assert changes["other_kernel", "h.3.mlp"] == "added"
    assert diff(one, other)["collectives"][0]["change"] == "changed"
    same = diff(one, Scene(name="c", traces=world(4)))
    assert {row["change"] for row in same["ops"]} == {"same"}, "means over ranks: worlds of any size compare"


def test_the_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    where = str(run_folder(tmp_path / "run"))
    run = CliRunner()
    told = json.loads(run.invoke(cli, ["stats", where, "--json"]).output)
    assert told["step_ns"] == 13 * MS
    assert told["faults"] == 0
    text = run.invoke(cli, ["stats", where]).output
    assert "46.2%" in text, "six of thirteen milliseconds compute"
    assert "all_reduce" in text
    assert "forward" in run.invoke(cli, ["stats", where, "--stacks"]).output
    assert "faster" in run.invoke(cli, ["diff", where]).output
    assert json.loads(run.invoke(cli, ["diff", where, where, "--json"]).output)["ops"][0]["change"] == "same"
    for form in ("perfetto", "chrome"):
        result = run.invoke(cli, ["view", "timeline", where, "--format", form])
        assert "36 slices, 6 flows, 2 ranks" in result.output
    assert (tmp_path / "run" / "timeline.perfetto-trace").is_file()
    (tmp_path / "empty").mkdir()
    for arguments, said in (
        (["stats", "empty"], "expected rank<r>.et"),
        (["diff", "empty"], "expected rank<r>.et"),
        (["view", "timeline", "empty"], "expected rank<r>.et"),
        (["report", "empty"], "found neither"),
        (["serve", "missing"], "expected a folder of runs"),
        (["stats", where, "--times", "measured", "--top", "0"], "0 is not in the range"),
    ):
        place = [str(tmp_path / part) if part in ("empty", "missing") else part for part in arguments]
        assert _run(place) == 2, arguments
        assert said in capsys.readouterr().err


def test_names_never_leave_the_data(tmp_path: Path) -> None:
    text = page(report_data(folder(run_folder(tmp_path, name=NASTY))))
    data = text.partition('id="data">')[2].partition("</script>")[0]
    assert "<" not in data
    assert any(row[0].startswith("</script>") for row in json.loads(data)["scenes"][0]["ops"]["rows"])
    assert "connect-src" not in text
    assert "default-src 'none'" in text
    assert not any(way in text for way in ('src="http', 'href="http', "@import", "url(http"))


def test_a_run_without_traces_has_its_losses(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 0, "loss": 3.0}\n{"step": 1, "loss": 2.0}\n{"step": 2, "lo')
    assert report_data(folder(tmp_path))["steps"][-1]["loss"] == 2.0, "a line that is still being written waits"
    assert report(tmp_path).is_file()


def test_a_foreign_folder_is_told_what_was_looked_for(tmp_path: Path) -> None:
    with pytest.raises(FolderError, match="found neither"):
        folder(tmp_path)
    with pytest.raises(TraceError, match="expected rank<r>"):
        scene(tmp_path)
    (tmp_path / "rank0.et").write_bytes(b"")
    with pytest.raises(TraceError, match="the file is empty"):
        folder(tmp_path)


def test_one_file_is_enough(tmp_path: Path) -> None:
    file = write(world()[1], tmp_path / "one.et")
    data = report_data(folder(file))
    assert data["scenes"][0]["facts"]["ranks"] == 1
    assert report_data(folder(write(Trace(nodes=[]), tmp_path / "none.et")))["scenes"][0]["timeline"] is None


@pytest.mark.shared
def test_the_megatron_ranks_have_a_page(shared: Path, tmp_path: Path) -> None:
    from meshloom.capture.convert import convert_rank

    source = shared / "traces" / "megatron_gpt8b_tp8_8xA100"
    for rank in (0, 1):
        convert_rank(source / f"host_{rank}.json.gz", source / f"device_{rank}.json.gz", tmp_path / f"rank{rank}.et")
    shown = scene(tmp_path)
    assert shown.tracks.num_slices == sum(1 for each in shown.nodes.values() for node in each if node.duration_ns > 0)
    path = report(tmp_path)
    assert path.stat().st_size < 15_000_000
    whole, rows, _ = shares(shown.events())
    assert [row.compute_ns + row.exposed_ns + row.idle_ns for row in rows] == [whole, whole]
