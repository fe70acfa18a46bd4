"""What a recording knew besides PyTorch's two files. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from meshloom.capture.link import Linked
from meshloom.errors import TraceError


class Notes(msgspec.Struct, frozen=True, kw_only=True):
    """What the recorder knew besides PyTorch's files. `collectives`: (operation, group name), in order."""

    rank: int
    world_size: int
    step: int | None = None
    step_duration_ns: int | None = None
    groups: dict[str, list[int]] = {}
    collectives: list[tuple[str, str]] = []
    axes: dict[str, str] = {}  # ranks joined by commas -> axis of the plan
    composite_ops: list[str] | None = None
    facts: dict[str, Any] = {}

    def axis_of(self, ranks: Sequence[int]) -> str:
        """The axis of the plan along which the ranks lie; empty if none is known."""
        exact = self.axes.get(",".join(map(str, ranks)))
        if exact is not None:
            return exact
        holding = [axis for told, axis in self.axes.items() if set(ranks) <= set(map(int, told.split(",")))]
        return holding[0] if len(holding) == 1 else ""


def read_notes(path: Path) -> Notes:
    """The recorder's notes in `path`; raises TraceError."""
    try:
        notes = msgspec.json.decode(path.read_bytes(), type=Notes)
        if not all(rank.isdecimal() and len(rank) < 20 for told in notes.axes for rank in told.split(",")):
            raise ValueError("an axis whose ranks are no numbers")
        return notes
    except (OSError, ValueError, RecursionError, msgspec.DecodeError) as error:
        raise TraceError(f"{path}: expected the recorder's notes, got '{error}'") from error


def notes_of(linked: Linked, rank: int | None) -> Notes:
    """What the device file tells of rank, world and groups, for files that came without notes."""
    told = linked.device
    known = told.rank if told.rank >= 0 else 0
    return Notes(rank=known if rank is None else rank, world_size=max(1, told.world_size), groups=told.groups)
