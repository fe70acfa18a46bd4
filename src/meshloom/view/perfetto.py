"""Tracks as files that others open: Perfetto's protobuf, and Chrome's JSON. No torch.

Perfetto's wire format is written by hand (field numbers of `protos/perfetto/trace`, stable by its promise): a process
for each rank and source, a track for each stream, a slice each, flows by id, all times in nanoseconds. Names are
interned, so that a million slices take some 30 bytes each.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from meshloom.chakra.attribute import varint
from meshloom.chakra.file import whole_file
from meshloom.view.tracks import Track, Tracks

_SEQUENCE = 1
_BEGIN, _END = 1, 2  # TrackEvent.Type
_CATEGORIES = {"compute": 1, "communication": 2, "host": 3}
_BOTTLE = 1 << 20  # bytes gathered before they are written


class _Place(NamedTuple):
    process: int
    thread: int
    track: Track
    lane: int


def write_perfetto(tracks: Tracks, path: str | Path) -> Path:
    """Write a Perfetto trace (protobuf) and return the path; raises FolderError."""
    path = Path(path)
    with whole_file(path) as file:
        waiting: list[bytes] = []
        size = 0
        for packet in _packets(tracks):
            waiting += (b"\x0a", varint(len(packet)), packet)  # Trace.packet
            size += len(packet)
            if size > _BOTTLE:
                file.write(b"".join(waiting))
                waiting, size = [], 0
        file.write(b"".join(waiting))
    return path


def _number(field: int, value: int) -> bytes:
    return varint(field << 3) + varint(value)


def _bytes(field: int, value: bytes) -> bytes:
    return varint(field << 3 | 2) + varint(len(value)) + value


def _text(field: int, value: str) -> bytes:
    return _bytes(field, value.encode("utf-8", errors="replace"))


def places(tracks: Tracks) -> Iterator[_Place]:
    """Each lane of each track, with numbers for its process (rank and source) and thread."""
    processes: dict[tuple[str, int], int] = {}
    for track in sorted(tracks.tracks, key=lambda track: (track.source != "measured", track.rank)):
        processes.setdefault((track.source, track.rank), len(processes) + 1)
    thread = 0
    for track in tracks.tracks:
        lanes = 1 if track.kind == "host" else int(track.lanes.max(initial=0)) + 1  # what nests needs one track only
        for lane in range(lanes):
            thread += 1
            yield _Place(processes[track.source, track.rank], thread, track, lane)


def title(track: Track, lane: int) -> str:
    """The track's name: what ran where, measured or predicted."""
    return f"{track.name}{f' ({lane + 1})' if lane else ''}"


def _packets(tracks: Tracks) -> Iterator[bytes]:
    head = _number(10, _SEQUENCE)  # TracePacket.trusted_packet_sequence_id
    # the first packet clears what readers know of the sequence, and brings the names (InternedData.event_names)
    names = b"".join(_bytes(2, _number(1, number + 1) + _text(2, name)) for number, name in enumerate(tracks.names))
    kinds = b"".join(
        _bytes(1, _number(1, number) + _text(2, kind)) for kind, number in _CATEGORIES.items()
    )  # fmt: skip
    yield head + _number(41, 1) + _number(13, 1) + _bytes(12, kinds + names)
    flows = _flow_ids(tracks)
    known: set[int] = set()
    for process, thread, track, lane in places(tracks):
        if process not in known:
            known.add(process)
            told = _number(1, process) + _text(6, f"rank {track.rank} {track.source}")
            yield head + _bytes(60, _number(1, process) + _bytes(3, told))  # TrackDescriptor.process
        uuid = 1_000_000 + thread
        yield head + _bytes(60, _number(1, uuid) + _number(5, process) + _text(2, title(track, lane)))
        yield from _events(head, uuid, track, lane, flows.get(id(track), {}))


def _flow_ids(tracks: Tracks) -> dict[int, dict[int, int]]:
    found: dict[int, dict[int, int]] = defaultdict(dict)
    for number, flow in enumerate(tracks.flows):
        for place, row in flow.ends:
            found[id(tracks.tracks[place])][row] = number + 1
    return found


def _events(head: bytes, uuid: int, track: Track, lane: int, flows: dict[int, int]) -> Iterator[bytes]:
    category = _CATEGORIES[track.kind]
    sequence = head + _number(13, 2)  # needs the interned names
    common = _number(11, uuid) + _number(3, category)
    end = _bytes(11, _number(9, _END) + _number(11, uuid))
    begin = _number(9, _BEGIN) + common
    for when, row in boundaries(track, lane):
        stamp = sequence + _number(8, when)  # TracePacket.timestamp
        if row < 0:
            yield stamp + end
            continue
        event = begin + _number(10, int(track.names[row]) + 1)
        event += _bytes(4, _text(10, "node") + _number(4, int(track.nodes[row]) & (1 << 63) - 1))
        if row in flows:
            event += varint(47 << 3 | 1) + flows[row].to_bytes(8, "little")  # flow_ids, fixed64
        yield stamp + _bytes(11, event)


def boundaries(track: Track, lane: int) -> Iterator[tuple[int, int]]:
    """(time, row) of each begin and (time, -1) of each end, in an order in which slices nest."""
    starts, ends = track.starts_ns.tolist(), (track.starts_ns + track.durations_ns).tolist()
    open_ends: list[int] = []
    for row, start in enumerate(starts):
        if track.kind != "host" and track.lanes[row] != lane:
            continue
        while open_ends and open_ends[-1] <= start:
            yield open_ends.pop(), -1
        yield start, row
        # an end within another never lies behind it
        open_ends.append(min(ends[row], open_ends[-1]) if open_ends else ends[row])
    while open_ends:
        yield open_ends.pop(), -1


def write_chrome(tracks: Tracks, path: str | Path) -> Path:
    """Write the tracks as Chrome's trace events (JSON, microseconds with three digits) and return the path; raises
    FolderError."""
    path = Path(path)
    with whole_file(path) as file:
        file.write(b'{"displayTimeUnit": "ns", "traceEvents": [\n')
        for index, event in enumerate(_chrome_events(tracks)):
            file.write((b",\n" if index else b"") + event)
        file.write(b"\n]}\n")
    return path


def _chrome_events(tracks: Tracks) -> Iterator[bytes]:
    names = [json.dumps(name) for name in tracks.names]
    flows = _flow_ids(tracks)
    ends_of = {number + 1: len(flow.ends) for number, flow in enumerate(tracks.flows)}
    seen: dict[int, int] = defaultdict(int)
    for process, thread, track, lane in places(tracks):
        who = f'"pid": {process}, "tid": {thread}'
        for what, text in (("process", f"rank {track.rank} {track.source}"), ("thread", title(track, lane))):
            yield f'{{"ph": "M", "name": "{what}_name", {who}, "args": {{"name": {json.dumps(text)}}}}}'.encode()
        mine = flows.get(id(track), {})
        for row in range(len(track)):
            if track.kind != "host" and track.lanes[row] != lane:
                continue
            when, length = track.starts_ns[row] / 1000, track.durations_ns[row] / 1000
            yield (
                f'{{"ph": "X", "name": {names[track.names[row]]}, "cat": "{track.kind}", {who}, "ts": {when:.3f}, '
                f'"dur": {length:.3f}, "args": {{"node": {track.nodes[row]}}}}}'
            ).encode()
            if row in mine:
                number = mine[row]
                seen[number] += 1
                step = "s" if seen[number] == 1 else "f" if seen[number] == ends_of[number] else "t"
                bind = ', "bp": "e"' if step == "f" else ""
                yield (
                    f'{{"ph": "{step}", "id": {number}, "name": "meeting", "cat": "flow"{bind}, {who}, '
                    f'"ts": {when:.3f}}}'
                ).encode()
