"""Two steps side by side: what was added, removed and changed, what became slower or faster. No torch.

Either two traces or folders, or what was measured of one against what was predicted of it. Counts, times, FLOPs and
bytes are means over the ranks of a side, so that worlds of different size compare.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any, NamedTuple

from meshloom.chakra.summary import comm_kind
from meshloom.errors import TraceError
from meshloom.view.graph import short_name
from meshloom.view.scene import Event, Scene
from meshloom.view.stats import steps_of
from meshloom.view.tracks import Source


class Change(NamedTuple):
    """One kind of op on both sides, a rank: `change` is added, removed, changed, slower, faster or same."""

    change: str
    name: str
    module: str
    phase: str
    count_a: float
    count_b: float
    time_a_ns: float
    time_b_ns: float
    bytes_a: float
    bytes_b: float

    @property
    def added_ns(self) -> float:
        """How much longer it takes on side B."""
        return self.time_b_ns - self.time_a_ns


_SAME = 0.05  # times nearer than this are the same


def diff(a: Scene, b: Scene | None = None) -> dict[str, Any]:
    """What differs between two scenes, or between the measured and the predicted times of one, as plain data.

    `ops` by name, module and phase, `collectives` by kind, axis and size; the largest difference in time first.
    Raises TraceError where one scene alone has not both kinds of times.
    """
    source_a: Source | None = None
    source_b: Source | None = None
    if b is None:
        if a.sources != ["measured", "predicted"]:
            raise TraceError(
                f"{a.name}: expected measured and predicted times, got {' and '.join(a.sources) or 'neither'}"
                "; record a step and run `meshloom simulate`, or name a second trace"
            )
        b, source_a, source_b = a, "measured", "predicted"
    sides = [(scene, source or next(iter(scene.sources), None)) for scene, source in ((a, source_a), (b, source_b))]
    events = [scene.events(source) for scene, source in sides]
    sizes = [max(1, scene.num_ranks) for scene, _ in sides]
    return {
        "a": _side(*sides[0]),
        "b": _side(*sides[1]),
        "ops": [change._asdict() for change in _changes(events, sizes, communication=False)],
        "collectives": [change._asdict() for change in _changes(events, sizes, communication=True)],
    }


def _side(scene: Scene, source: Source | None) -> dict[str, Any]:
    told = steps_of(scene, source) if source else {}
    return {"name": scene.name, "plan": scene.fact("plan"), "num_ranks": scene.num_ranks, "times": source, **told}


def _changes(sides: list[list[Event]], sizes: list[int], *, communication: bool) -> list[Change]:
    table: dict[tuple[str, str, str], list[list[float]]] = defaultdict(lambda: [[0.0] * 3, [0.0] * 3])
    for side, events in enumerate(sides):
        for event in events:
            node = event.node
            if node.is_comm != communication:
                continue
            size = int(node.get("comm_size" if communication else "tensor_size", 0))
            if communication:
                key = f"{comm_kind(node)} {size:,} B", str(node.get("comm_axis", "")), str(node.get("phase") or "")
            else:
                key = short_name(node.name), str(node.get("module", "")), str(node.get("phase") or "")
            row = table[key][side]
            row[0] += 1 / sizes[side]
            row[1] += event.duration_ns / sizes[side]
            row[2] += size / sizes[side]
    changes = [
        Change(_judge(one, other), *key, round(one[0], 6), round(other[0], 6), one[1], other[1], one[2], other[2])
        for key, (one, other) in table.items()
    ]
    return sorted(changes, key=lambda change: (-abs(change.added_ns), change.change == "same", change.name))


def _judge(one: list[float], other: list[float]) -> str:
    if not one[0] or not other[0]:
        return "removed" if one[0] else "added"
    if abs(one[0] - other[0]) > 1e-6 or abs(one[2] - other[2]) > 1e-6 * max(one[2], 1.0):
        return "changed"
    if one[1] and other[1] and abs(other[1] - one[1]) > _SAME * one[1]:
        return "slower" if other[1] > one[1] else "faster"
    return "same"
