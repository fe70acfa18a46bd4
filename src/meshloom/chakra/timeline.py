"""The noun `Timeline`: when things ran on each rank, measured or predicted, the same type for both. No torch."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import msgspec

from meshloom.chakra.file import whole_file
from meshloom.errors import TraceError

Track = Literal["compute", "communication"]


class Span(msgspec.Struct, frozen=True, array_like=True):
    """One thing that ran on one rank: node `node` of its trace, from `start_ns`, on a track."""

    rank: int
    track: Track
    name: str
    start_ns: int
    duration_ns: int
    node: int
    phase: str = ""
    module: str = ""

    @property
    def end_ns(self) -> int:
        """When it ended."""
        return self.start_ns + self.duration_ns


class Shares(msgspec.Struct, frozen=True, kw_only=True):
    """Where a rank's time went, in nanoseconds; the three sum to the makespan.

    Communication is what computation does not cover ("exposed"); idle is neither.
    """

    rank: int
    compute_ns: int
    exposed_communication_ns: int
    idle_ns: int
    communication_ns: int


class Timeline(msgspec.Struct, frozen=True, kw_only=True):
    """Spans of all ranks, with times counted from the start of the step; `source` is measured or predicted."""

    spans: list[Span]
    source: Literal["measured", "predicted"]
    world_size: int
    makespan_ns: int
    cluster: str = ""

    def ranks(self) -> list[int]:
        """The ranks that have spans, in order."""
        return sorted({span.rank for span in self.spans})

    def shares(self) -> list[Shares]:
        """Where each rank's time went."""
        by_rank: dict[int, list[Span]] = {rank: [] for rank in self.ranks()}
        for span in self.spans:
            by_rank[span.rank].append(span)
        return [_shares(rank, spans, self.makespan_ns) for rank, spans in by_rank.items()]


def _shares(rank: int, spans: list[Span], makespan_ns: int) -> Shares:
    compute = _covered([span for span in spans if span.track == "compute"])
    communication = _covered([span for span in spans if span.track == "communication"])
    busy = _covered(spans)
    return Shares(
        rank=rank,
        compute_ns=compute,
        exposed_communication_ns=busy - compute,
        idle_ns=makespan_ns - busy,
        communication_ns=communication,
    )


def _covered(spans: list[Span]) -> int:
    """How many nanoseconds at least one of the spans covers."""
    covered, reached = 0, None
    for span in sorted(spans, key=lambda span: span.start_ns):
        if reached is None or span.start_ns > reached:
            covered += span.duration_ns
            reached = span.end_ns
        elif span.end_ns > reached:
            covered += span.end_ns - reached
            reached = span.end_ns
    return covered


def write(timeline: Timeline, path: str | Path) -> Path:
    """Write `timeline` as JSON and return the path; raises FolderError."""
    path = Path(path)
    with whole_file(path) as file:
        file.write(msgspec.json.encode(timeline))
    return path


def read(path: str | Path) -> Timeline:
    """The timeline in the JSON file `path`; raises TraceError."""
    try:
        return msgspec.json.decode(Path(path).read_bytes(), type=Timeline)
    except (OSError, ValueError, RecursionError, msgspec.DecodeError) as error:
        raise TraceError(f"{path}: expected a timeline written by `meshloom simulate`, got '{error}'") from error
