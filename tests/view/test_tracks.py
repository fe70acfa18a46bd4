"""Tracks, and the files made of them: nothing lost, slices nest, flows join what met, clocks side by side."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshloom.view.pack import pack
from meshloom.view.perfetto import write_chrome, write_perfetto
from meshloom.view.scene import Scene, scene
from meshloom.view.tracks import nested, side_by_side, tracks
from tests.view.scenes import MS, NASTY, predicted, run_folder, world


def test_a_track_for_each_stream_and_thread() -> None:
    traces = world()
    found = tracks(traces, predicted(traces))
    told = {(track.rank, track.source, track.kind, track.name): len(track) for track in found.tracks}
    assert told == {
        (rank, source, kind, name): count
        for rank in (0, 1)
        for source, kind, name, count in (
            ("measured", "compute", "stream 0", 3), ("measured", "communication", "stream 1", 3),
            ("measured", "host", "thread 7", 6), ("predicted", "compute", "compute", 3),
            ("predicted", "communication", "communication", 3),
        )
    }  # fmt: skip
    assert len(found.flows) == 6, "three collectives, measured and predicted"
    assert all(len(flow.ends) == 2 for flow in found.flows)


def test_clocks_are_put_side_by_side() -> None:
    apart, together = tracks(world(skew_ns=7 * MS)), tracks(world())
    for one, other in zip(apart.tracks, together.tracks):
        assert (one.starts_ns == other.starts_ns).all()
    assert min(track.starts_ns.min() for track in apart.tracks) == 0


def test_scopes_hold_what_starts_within_them() -> None:
    # outer of 10 with 4 of its own before, between and after; inner 1 at 2 (3 long), inner 2 at 6 (3), leaf inside it
    starts, own = np.array([0, 2, 6, 7, 20]), np.array([4, 3, 2, 1, 5])
    whole, lanes = nested(starts, own)
    assert whole.tolist() == [10, 3, 3, 1, 5]
    assert lanes.tolist() == [0, 1, 1, 2, 0]


def test_the_time_of_work_holds_what_lies_inside_it() -> None:
    # a scope of 1 + 1 around work of 10, which holds a scope of 3 with one of 2 inside; then the next scope
    starts, own = np.array([0, 1, 3, 4, 12]), np.array([2, 10, 3, 2, 4])
    whole, lanes = nested(starts, own, [False, True, False, False, False])
    assert whole.tolist() == [12, 10, 5, 2, 4]
    assert lanes.tolist() == [0, 1, 2, 3, 0]


@given(st.lists(st.tuples(st.integers(0, 50), st.integers(1, 20)), max_size=40))
def test_nothing_overlaps_in_a_lane(slices: list[tuple[int, int]]) -> None:
    slices.sort()
    starts = np.array([start for start, _ in slices], dtype=np.int64)
    lengths = np.array([length for _, length in slices], dtype=np.int64)
    for durations, lanes in ((lengths, side_by_side(starts, lengths)), nested(starts, lengths)):
        by_lane: dict[int, int] = defaultdict(int)
        for start, length, lane in zip(starts.tolist(), durations.tolist(), lanes.tolist()):
            assert start >= by_lane[lane]
            by_lane[lane] = start + length
    assert (nested(starts, lengths)[0] >= lengths).all()


def slices_of(path: Path) -> dict[tuple[str, str], list[tuple[str, int, int, int]]]:
    """(process, track) -> name, start, duration, flow of each slice, read with Perfetto's own schema."""
    schema: Any = pytest.importorskip("perfetto.protos.perfetto.trace.perfetto_trace_pb2", reason="needs perfetto")
    trace = schema.Trace.FromString(path.read_bytes())
    names, processes, places = {}, {}, {}
    found: dict[tuple[str, str], list[tuple[str, int, int, int]]] = defaultdict(list)
    waiting: dict[int, list[tuple[str, int, int]]] = defaultdict(list)
    for packet in trace.packet:
        names.update({each.iid: each.name for each in packet.interned_data.event_names})
        if packet.HasField("track_descriptor"):
            described = packet.track_descriptor
            if described.HasField("process"):
                processes[described.uuid] = described.process.process_name
            else:
                places[described.uuid] = processes[described.parent_uuid], described.name
        event = packet.track_event
        if event.type == schema.TrackEvent.TYPE_SLICE_BEGIN:
            flow = event.flow_ids[0] if event.flow_ids else 0
            waiting[event.track_uuid].append((names[event.name_iid], packet.timestamp, flow))
        elif event.type == schema.TrackEvent.TYPE_SLICE_END:
            name, begin, flow = waiting[event.track_uuid].pop()
            found[places[event.track_uuid]].append((name, begin, packet.timestamp - begin, flow))
    assert not any(waiting.values()), "every slice ends"
    return found


def test_perfetto_reads_what_ran(tmp_path: Path) -> None:
    traces = world(name=NASTY)
    shown = tracks(traces, predicted(traces))
    found = slices_of(write_perfetto(shown, tmp_path / "timeline.perfetto-trace"))
    assert sum(map(len, found.values())) == shown.num_slices == 36
    assert [(name, start, length) for name, start, length, _ in found["rank 0 measured", "stream 0"]] == [
        (NASTY, MS + layer * 9 * MS // 2, 2 * MS) for layer in range(3)
    ]
    flows = [[flow for *_, flow in found[f"rank {rank} {source}", track]] for source, track in
             (("measured", "stream 1"), ("predicted", "communication")) for rank in (0, 1)]  # fmt: skip
    assert flows[0] == flows[1]
    assert flows[2] == flows[3]
    assert len({*flows[0], *flows[2]}) == 6
    assert 0 not in flows[0]
    outer, inner = sorted(found["rank 1 measured", "thread 7"], key=lambda each: each[1])[:2]
    assert outer[1] <= inner[1]
    assert inner[1] + inner[2] <= outer[1] + outer[2]


def test_chrome_reads_the_same(tmp_path: Path) -> None:
    traces = world()
    shown = tracks(traces, predicted(traces))
    events = json.loads(write_chrome(shown, tmp_path / "timeline.json").read_text())["traceEvents"]
    slices = [event for event in events if event["ph"] == "X"]
    assert len(slices) == shown.num_slices
    assert sum(event["dur"] for event in slices if event["name"] == "mm_kernel") == 2 * 3 * (2000 + 1000)
    steps = defaultdict(list)
    for event in events:
        if event["ph"] in "stf":
            steps[event["id"]].append(event["ph"])
    assert list(steps.values()) == [["s", "f"]] * 6
    assert {event["args"]["name"] for event in events if event["ph"] == "M" and event["name"] == "process_name"} == {
        "rank 0 measured", "rank 1 measured", "rank 0 predicted", "rank 1 predicted"
    }  # fmt: skip


def test_messages_flow_from_send_to_receive(tmp_path: Path) -> None:
    from meshloom.chakra.build import TraceBuilder

    traces = {}
    for rank in (0, 1):
        builder = TraceBuilder(rank=rank, world_size=2, source="capture")
        for number in range(2):
            builder.message("p2p", source=0, destination=1, tag=0, num_bytes=8, start_ns=1 + number * 10, duration_ns=5)
        traces[rank] = builder.finish()
    found = tracks(traces)
    assert [[found.tracks[place].rank for place, _ in flow.ends] for flow in found.flows] == [[0, 1], [0, 1]]
    assert [[row for _, row in flow.ends] for flow in found.flows] == [[0, 0], [1, 1]]


def test_the_page_gets_every_slice(tmp_path: Path) -> None:
    import base64
    import zlib

    shown = scene(run_folder(tmp_path))
    told = pack(shown.tracks, faults=[(0, 3)])
    total = sum(row["count"] for row in told["rows"])
    columns = np.frombuffer(zlib.decompress(base64.b64decode(told["packed"])), dtype="<u4").reshape(4, total)
    assert total == shown.tracks.num_slices
    at = 0
    for row in told["rows"]:
        if (row["rank"], row["source"], row["name"]) == (0, "measured", "stream 0"):
            assert np.cumsum(columns[0][at : at + row["count"]]).tolist() == [MS, MS + 9 * MS // 2, 10 * MS]
            assert columns[1][at : at + row["count"]].tolist() == [2 * MS] * 3
        at += row["count"]
    assert len(told["faults"]) == 2, "node 3 ran measured and predicted"
    long = Scene(name="long", traces=world(num_layers=1, skew_ns=0))
    assert pack(long.tracks)["unit"] == 1
