"""Pipeline schedules as data: for each rank the order of its forward and backward passes. Pure, no torch.

Stage s runs on rank s mod P (P ranks), so with V stages a rank there are P·V stages. A backward pass may be split: the
gradient of the input first (`input`), which the stage before waits for, that of the weights later (`weight`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

from meshloom.errors import PlanError

Kind = Literal["forward", "backward", "input", "weight"]


class Action(NamedTuple):
    """One pass of one micro-batch through one stage."""

    kind: Kind
    stage: int
    micro_batch: int

    def __str__(self) -> str:
        return f"{self.kind[0].upper()}{self.micro_batch}" + (f".{self.stage}" if self.stage else "")


Schedule = list[list[Action]]  # rank -> its actions, in order


def gpipe(num_ranks: int, num_micro_batches: int, num_chunks: int = 1) -> Schedule:
    """All forward passes, then all backward passes (Huang et al. 2019)."""
    schedule: Schedule = []
    for rank in range(num_ranks):
        stages = [chunk * num_ranks + rank for chunk in range(num_chunks)]
        forwards = [Action("forward", stage, mb) for stage in stages for mb in range(num_micro_batches)]
        backwards = [Action("backward", stage, mb) for stage in reversed(stages) for mb in range(num_micro_batches)]
        schedule.append(forwards + backwards)
    return schedule


def one_forward_one_backward(num_ranks: int, num_micro_batches: int, num_chunks: int = 1) -> Schedule:
    """1F1B: a rank holds at most as many micro-batches as there are stages from it on (Narayanan et al. 2021)."""
    if num_chunks > 1:
        return interleaved(num_ranks, num_micro_batches, num_chunks)
    schedule: Schedule = []
    for rank in range(num_ranks):
        warmup = min(num_micro_batches, num_ranks - rank - 1)
        actions = [Action("forward", rank, mb) for mb in range(warmup)]
        for mb in range(num_micro_batches - warmup):
            actions += [Action("forward", rank, warmup + mb), Action("backward", rank, mb)]
        actions += [Action("backward", rank, mb) for mb in range(num_micro_batches - warmup, num_micro_batches)]
        schedule.append(actions)
    return schedule


def interleaved(num_ranks: int, num_micro_batches: int, num_chunks: int = 2) -> Schedule:
    """Interleaved 1F1B: a rank's stages take turns, in groups of P micro-batches (Narayanan et al. 2021, section 2.2).

    Raises PlanError unless the micro-batches fill whole groups.
    """
    if num_micro_batches % num_ranks:
        raise PlanError(
            f"interleaved schedule: expected micro-batches in groups of pp{num_ranks}, got {num_micro_batches}; "
            f"use {num_micro_batches + -num_micro_batches % num_ranks}, or the 1f1b schedule"
        )
    total = num_micro_batches * num_chunks

    def at(rank: int, step: int, *, forward: bool) -> Action:
        chunk, group = step // num_ranks % num_chunks, step // (num_ranks * num_chunks)
        chunk = chunk if forward else num_chunks - 1 - chunk
        micro_batch = group * num_ranks + step % num_ranks
        return Action("forward" if forward else "backward", chunk * num_ranks + rank, micro_batch)

    schedule: Schedule = []
    for rank in range(num_ranks):
        warmup = min(total, 2 * (num_ranks - rank - 1) + (num_chunks - 1) * num_ranks)
        actions = [at(rank, step, forward=True) for step in range(warmup)]
        for step in range(total - warmup):
            actions += [at(rank, warmup + step, forward=True), at(rank, step, forward=False)]
        actions += [at(rank, step, forward=False) for step in range(total - warmup, total)]
        schedule.append(actions)
    return schedule


def zero_bubble(num_ranks: int, num_micro_batches: int, num_chunks: int = 1) -> Schedule:
    """ZB-H1: 1F1B whose weight gradients wait, and fill the time in which a rank had nothing to do (Qi et al. 2023).

    A rank holds at most P micro-batches, as the first rank does in 1F1B.
    """
    if num_chunks > 1:
        raise PlanError(f"zero-bubble schedule: expected one stage a rank, got {num_chunks}")
    schedule: Schedule = []
    for rank in range(num_ranks):
        warmup = min(num_micro_batches, num_ranks - rank - 1)
        actions = [Action("forward", rank, mb) for mb in range(warmup)]
        weights = 0  # how many weight gradients are done
        for mb in range(num_micro_batches):
            if warmup + mb < num_micro_batches:
                actions.append(Action("forward", rank, warmup + mb))
            actions.append(Action("input", rank, mb))
            if mb >= rank:  # later ranks have more to wait for before their first backward than after it
                actions.append(Action("weight", rank, weights))
                weights += 1
        actions += [Action("weight", rank, mb) for mb in range(weights, num_micro_batches)]
        schedule.append(actions)
    return schedule


SCHEDULES: dict[str, Callable[[int, int, int], Schedule]] = {
    "gpipe": gpipe,
    "1f1b": one_forward_one_backward,
    "interleaved": interleaved,
    "zero-bubble": zero_bubble,
}


class Slot(NamedTuple):
    """When an action runs, in units of time."""

    action: Action
    start: int
    end: int


_LENGTHS = {"forward": 1, "backward": 2, "input": 1, "weight": 1}  # a backward pass takes two forward passes


def play(schedule: Sequence[Sequence[Action]]) -> list[list[Slot]]:
    """Rank by rank when each action runs, if a pass takes a unit and messages take none.

    Raises PlanError, naming what waits for ever, where the order is impossible.
    """
    num_stages = 1 + max(action.stage for actions in schedule for action in actions)
    done: dict[tuple[str, int, int], int] = {}
    slots: list[list[Slot]] = [[] for _ in schedule]
    while any(len(slots[rank]) < len(actions) for rank, actions in enumerate(schedule)):
        moved = False
        for rank, actions in enumerate(schedule):
            while len(slots[rank]) < len(actions):
                action = actions[len(slots[rank])]
                needs = [done.get(need) for need in _needs(action, num_stages)]
                if None in needs:
                    break
                free = slots[rank][-1].end if slots[rank] else 0
                start = max([free, *(when for when in needs if when is not None)])
                end = start + _LENGTHS[action.kind]
                slots[rank].append(Slot(action, start, end))
                kind = "input" if action.kind == "backward" else action.kind
                done[kind, action.stage, action.micro_batch] = end
                moved = True
        if not moved:
            rank = next(rank for rank, actions in enumerate(schedule) if len(slots[rank]) < len(actions))
            raise PlanError(f"schedule: rank {rank} waits for ever before {schedule[rank][len(slots[rank])]}")
    return slots


def _needs(action: Action, num_stages: int) -> list[tuple[str, int, int]]:
    """What must be over before the action: the same micro-batch on the stage before or after, or its own first half."""
    kind, stage, mb = action
    if kind == "forward":
        return [("forward", stage - 1, mb)] if stage else []
    if kind == "weight":
        return [("input", stage, mb)]
    return [("forward", stage, mb), *([("input", stage + 1, mb)] if stage + 1 < num_stages else [])]


def bubble(schedule: Sequence[Sequence[Action]]) -> float:
    """The share of all ranks' time in which nothing runs, by `play`; (P - 1)/(M + P - 1) for GPipe and 1F1B."""
    slots = play(schedule)
    makespan = max(row[-1].end for row in slots)
    busy = sum(slot.end - slot.start for row in slots for slot in row)
    return 1 - busy / (makespan * len(slots))


def draw(schedule: Sequence[Sequence[Action]]) -> str:
    """The schedule as text, a line a rank, a column a unit of time."""
    slots = play(schedule)
    width = 1 + max(len(str(slot.action)) for row in slots for slot in row)
    lines = []
    for rank, row in enumerate(slots):
        cells = [" " * width] * max(slot.end for slots_of in slots for slot in slots_of)
        for slot in row:
            cells[slot.start : slot.end] = [str(slot.action).ljust(width)] * (slot.end - slot.start)
        lines.append(f"rank {rank} |" + "".join(cells).rstrip())
    return "\n".join(lines)
