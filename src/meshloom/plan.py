"""How the work is cut: a `Plan`, its text form, and which rank sits where on the mesh. No torch.

Ranks are laid out as Megatron-LM lays them out: tensor parallel varies fastest, then context, data and pipeline,
so that the axis which talks most has its ranks closest together.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from math import prod
from typing import Any, Literal, get_args

from meshloom.errors import PlanError

Axis = Literal["tp", "cp", "dp", "pp"]
Schedule = Literal["gpipe", "1f1b", "interleaved", "zero-bubble"]
Recompute = Literal["none", "selective", "full"]

AXES: tuple[Axis, ...] = get_args(Axis)  # fastest-varying first
_TERM = re.compile(r"(tp|cp|dp|pp)(\d+)")
_EXAMPLE = "write degrees joined by dots, for example tp4.pp2.dp8"


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Degrees of each axis and how a step is cut.

    Raises PlanError where a number cannot be. Rank layout: `rank = ((pp·DP + dp)·CP + cp)·TP + tp`.
    """

    tp: int = 1
    cp: int = 1
    dp: int = 1
    pp: int = 1
    sequence_parallel: bool = False
    schedule: Schedule = "1f1b"
    num_micro_batches: int = 1
    virtual_stages: int = 1  # pipeline stages a rank holds
    recompute: Recompute = "none"
    stage_layers: tuple[int, ...] = ()  # how many layers each stage has, in the order of stages; () is balanced

    def __post_init__(self) -> None:
        for name in (*AXES, "num_micro_batches", "virtual_stages"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise PlanError(f"plan: expected {name} to be a whole number of at least 1, got {value!r}")
        for name, kind in (("schedule", Schedule), ("recompute", Recompute)):
            if getattr(self, name) not in get_args(kind):
                raise PlanError(
                    f"plan: expected {name} to be one of {', '.join(get_args(kind))}, got {getattr(self, name)!r}"
                )

        wanted = self.pp * self.virtual_stages
        if self.stage_layers and (len(self.stage_layers) != wanted or min(self.stage_layers) < 1):
            given = ",".join(map(str, self.stage_layers))
            raise PlanError(f"plan {self}: expected how many layers each of {wanted} stages has, got {given}")

    @classmethod
    def parse(cls, text: str) -> Plan:
        """The plan that `text` spells, such as `tp4.sp.pp2.dp8`; raises PlanError otherwise."""
        degrees: dict[str, Any] = {}
        sequence_parallel = False
        for term in text.strip().lower().split("."):
            if term == "sp":
                sequence_parallel = True
                continue
            match = _TERM.fullmatch(term)
            if match is None:
                raise PlanError(f"plan {text!r}: expected tp, cp, pp or dp with a degree, got {term!r}; {_EXAMPLE}")
            axis, degree = match.groups()
            if axis in degrees:
                raise PlanError(f"plan {text!r}: expected each axis once, got {axis} twice; {_EXAMPLE}")
            if len(degree) > 7:
                raise PlanError(f"plan {text!r}: expected a degree below ten million, got {axis}{degree}")
            degrees[axis] = int(degree)
        return cls(sequence_parallel=sequence_parallel, **degrees)

    @staticmethod
    def parse_stage_layers(text: str | None) -> tuple[int, ...]:
        """The layers of each stage that `text` spells, such as `10,14`, () if it is None; raises PlanError."""
        try:
            return tuple(int(number) for number in text.split(",")) if text is not None else ()
        except ValueError:
            raise PlanError(f"expected how many layers each stage has, such as 10,14, got {text!r}") from None

    def __str__(self) -> str:
        """The text form: axes of degree 1 are left out (`dp1` if nothing is left); `parse` reads it back."""
        terms = [f"{axis}{getattr(self, axis)}" for axis in ("tp", "cp", "pp", "dp") if getattr(self, axis) > 1]
        if self.sequence_parallel:
            terms.insert(1 if self.tp > 1 else 0, "sp")
        return ".".join(terms if terms and terms != ["sp"] else [*terms, "dp1"])

    @property
    def degrees(self) -> dict[Axis, int]:
        """Axis -> degree, fastest-varying axis first."""
        return {axis: getattr(self, axis) for axis in AXES}

    @property
    def world_size(self) -> int:
        """How many ranks the plan needs."""
        return prod(self.degrees.values())

    def coordinate(self, rank: int) -> dict[Axis, int]:
        """Axis -> index of `rank` on it."""
        if not 0 <= rank < self.world_size:
            raise PlanError(f"plan {self}: expected a rank from 0 to {self.world_size - 1}, got {rank}")
        where: dict[Axis, int] = {}
        for axis, degree in self.degrees.items():
            rank, where[axis] = divmod(rank, degree)
        return where

    def rank(self, **coordinate: int) -> int:
        """The rank at `coordinate`; axes left out are 0. The inverse of `coordinate`."""
        rank = 0
        for axis, degree in reversed(self.degrees.items()):
            index = coordinate.pop(axis, 0)
            if not 0 <= index < degree:
                raise PlanError(f"plan {self}: expected {axis} from 0 to {degree - 1}, got {index}")
            rank = rank * degree + index
        if coordinate:
            raise PlanError(f"plan {self}: expected axes {', '.join(AXES)}, got {', '.join(coordinate)}")
        return rank

    def group(self, axis: Axis, rank: int) -> tuple[int, ...]:
        """The ranks that differ from `rank` on `axis` only, in their order on it."""
        where = self.coordinate(rank)
        return tuple(self.rank(**{**where, axis: index}) for index in range(self.degrees[axis]))

    def groups(self, axis: Axis) -> list[tuple[int, ...]]:
        """Every group of `axis`, ordered by its first rank; together they hold each rank once."""
        return [self.group(axis, rank) for rank in range(self.world_size) if self.coordinate(rank)[axis] == 0]

    def with_world_size(self, world_size: int) -> Plan:
        """This plan if it needs exactly `world_size` ranks; raises PlanError naming the numbers if not."""
        if self.world_size != world_size:
            cut = " × ".join(f"{axis}{degree}" for axis, degree in self.degrees.items() if degree > 1) or "dp1"
            rest, left_over = divmod(world_size, self.world_size // self.dp)
            hint = f"; write {replace(self, dp=rest)}" if rest and not left_over else ""
            raise PlanError(f"plan {self}: needs {cut} = {self.world_size} ranks, but {world_size} were started{hint}")
        return self
