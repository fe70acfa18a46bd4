"""A timeline as the page holds it: rows of slices that never overlap, as compressed columns. No torch.

Four columns of 32 bits (time since the row's slice before, length, name, node), zlib, base64: a million slices take
some 8 MB. Times are in `unit` ns, which is 1 unless a step is longer than four seconds.
"""

from __future__ import annotations

import base64
import zlib
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from meshloom.view.graph import clean
from meshloom.view.path import Link
from meshloom.view.tracks import Source, Track, Tracks

_LARGEST = (1 << 32) - 1


def pack(
    tracks: Tracks,
    *,
    faults: Iterable[tuple[int, int]] = (),
    path: Sequence[Link] = (),
    path_source: Source | None = None,
) -> dict[str, Any]:
    """The tracks as plain data for the page; `faults` are (rank, node), `path` is marked on the rows of its source."""
    rows: list[dict[str, Any]] = []
    columns: list[list[NDArray[np.int64]]] = [[], [], [], []]
    at: dict[tuple[Source, int, int], tuple[int, int]] = {}  # (source, rank, node) -> (row, slice)
    of_track: dict[tuple[int, int], tuple[int, int]] = {}
    wanted = {*faults, *((link.event.rank, link.event.node.id) for link in path)}
    for place, track in sorted(enumerate(tracks.tracks), key=lambda item: (item[1].rank, item[1].source, item[0])):
        for lane in range(int(track.lanes.max(initial=0)) + 1):
            chosen = np.flatnonzero(track.lanes == lane)
            _row(rows, columns, track, lane, chosen)
            if track.kind != "host":
                of_track.update({(place, int(row)): (len(rows) - 1, index) for index, row in enumerate(chosen)})
            for index, node in enumerate(track.nodes[chosen].tolist() if wanted else ()):
                if (track.rank, node) in wanted:
                    at[track.source, track.rank, node] = len(rows) - 1, index
    unit = _unit(columns)
    body = np.concatenate([_whole(column, unit if place < 2 else 1) for place, column in enumerate(columns)])
    return {
        "rows": rows,
        "names": [clean(name) for name in tracks.names],
        "unit": unit,
        "packed": base64.b64encode(zlib.compress(body.tobytes(), 6)).decode(),
        "flows": [[list(of_track[end]) for end in flow.ends if end in of_track] for flow in tracks.flows],
        "path": [list(at[key]) for link in path
                 if path_source and (key := (path_source, link.event.rank, link.event.node.id)) in at],
        "faults": [list(place) for (_, rank, node), place in at.items() if (rank, node) in set(faults)],
    }  # fmt: skip


def _row(
    rows: list[dict[str, Any]], columns: list[list[NDArray[np.int64]]], track: Track, lane: int,
    chosen: NDArray[np.int64],
) -> None:  # fmt: skip
    starts = track.starts_ns[chosen]
    rows.append({"rank": track.rank, "source": track.source, "kind": track.kind, "name": track.name, "lane": lane,
                 "count": len(chosen)})  # fmt: skip
    columns[0].append(np.diff(starts, prepend=0))
    columns[1].append(track.durations_ns[chosen])
    columns[2].append(track.names[chosen].astype(np.int64))
    columns[3].append(np.minimum(track.nodes[chosen], _LARGEST))


def _unit(columns: list[list[NDArray[np.int64]]]) -> int:
    longest = max((int(part.max(initial=0)) for column in columns[:2] for part in column), default=0)
    return 1 if longest <= _LARGEST else -(-longest // _LARGEST)


def _whole(parts: list[NDArray[np.int64]], unit: int) -> NDArray[np.uint32]:
    whole = np.concatenate(parts) if parts else np.empty(0, dtype=np.int64)
    return (np.maximum(whole, 0) // unit).astype("<u4")
