"""The chain of events that holds a step up, found from times and causes alone: of measured and of predicted steps."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple


class Link(NamedTuple):
    """An event on the critical path, by its number, and how long nothing ran on the path before it."""

    number: int
    waited_ns: int


def critical_path(
    starts: Sequence[int],
    ends: Sequence[int],
    last: int,
    *,
    needs: Callable[[int], Iterable[int]],
    meets: Callable[[int], Sequence[int]],
    clock_ns: int = 0,
) -> list[Link]:
    """The chain of events that ends in `last`, in order of time: each could not start before the one before it ended.

    From the end backwards: of what an event needed (`needs`: its dependencies and what ran before it in its place) the
    one that ended last; where several meet (`meets`: all of them, itself too) it leads on from who came last, within
    `clock_ns`, which is how well the ranks' clocks agree. What it needed and what ended later did not hold it up.
    """
    path: list[Link] = []
    seen: set[int] = set()
    here: int | None = last
    while here is not None and here not in seen:
        members = meets(here)
        latest = max(starts[member] for member in members)
        best: tuple[int, int] | None = None
        for member in members:
            if starts[member] < latest - clock_ns:
                continue
            for needed in needs(member):
                held_up = needed not in seen and starts[needed] <= starts[member] and ends[needed] <= ends[member]
                if held_up and (best is None or ends[needed] > ends[best[0]]):
                    best = needed, member
        previous, there = best if best is not None else (None, here)
        seen.update((here, there))
        path.append(Link(there, max(0, starts[there] - (ends[previous] if previous is not None else 0))))
        here = previous
    return path[::-1]
