"""What `discover` finds: layers that are cut together, and how many heads or features of them each rank holds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from meshloom.parallel.answers import Answers
from meshloom.parallel.embeddings import Vocabulary
from meshloom.parallel.fake import Seen
from meshloom.parallel.shard import Share
from meshloom.parallel.trail import SEQUENCE, Candidate, Cut

Counts = tuple[tuple[str, str, int], ...]  # module, attribute, and what it counts on a rank


class NoShare(ValueError):
    """A degree among which the units cannot be divided; says what to use."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """Layers that are cut together: `columns` by output features, `rows` by input features.

    `num_blocks`: into how many equal blocks each column's output is fused; `num_units`: how many units (heads, or
    single features) are never divided.
    """

    columns: Mapping[str, int]  # path -> num_blocks
    rows: tuple[str, ...]
    num_units: int
    width: int  # features of one block
    reason: str
    units: Mapping[str, int]  # column -> how many units it has by itself: key and value may have fewer heads than query

    def num_copies(self, column: str, degree: int) -> int:
        """How many neighbouring ranks share a part of the column, because it has fewer units than there are ranks."""
        units = self.units[column]
        return degree // units if units < degree and degree % units == 0 else 1

    def share(self, degree: int) -> Share:
        """How the units are divided among `degree` ranks; raises NoShare where they cannot be."""
        copied = {units for path, units in self.units.items() if self.num_copies(path, degree) > 1}
        own = {units for path, units in self.units.items() if self.num_copies(path, degree) == 1}
        if own and not any(units % degree for units in own):
            return Share(num_units=degree)  # each rank one of as many equal parts, whatever units those hold
        column = next(iter(self.columns))
        what = "heads" if self.num_units < self.width else "features"
        fewest = min(self.units.values())
        if max(self.units.values()) < degree:
            most = max(self.units.values())
            raise NoShare(f"{column} has {most} {what}, fewer than the ranks of tp{degree}; use tp{most} or less")
        groups, ranks = (fewest, degree // fewest) if copied else (1, degree)
        units = min(own) if copied else self.num_units
        told = f"{column} and what it meets have {' and '.join(map(str, sorted(own | copied)))} {what}"
        if len(copied) > 1 or (fewest < degree and not copied) or any(each % units for each in own) or units % groups:
            raise NoShare(f"{told}, which tp{degree} does not divide; use tp{fewest} or less")
        if units // groups < ranks:
            raise NoShare(f"{told}, too few for tp{degree}; use tp{fewest} or less")
        return Share(num_units=units, num_groups=groups)


@dataclass(frozen=True, slots=True, kw_only=True)
class Discovery:
    """What can be cut, and each linear layer that stays whole with the reason."""

    pairs: tuple[Pair, ...]
    kept: Mapping[str, str]
    # whole parameters that meet a rank's part only, of which columns: their gradients must be summed
    partial: Mapping[str, frozenset[str]] = field(default_factory=dict)
    # small modules that need all features of the columns whose output they get, such as a norm over all heads
    gathered: Mapping[str, frozenset[str]] = field(default_factory=dict)
    owned: Mapping[Candidate, frozenset[str]] = field(
        default_factory=dict
    )  # dims of parameters cut with what they meet
    counts: tuple[Counts, ...] = ()  # of each rank
    answers: Answers | None = None  # of a forward that decides by values
    vocabulary: Vocabulary | None = None
    sequence: Any = None  # a SequenceCut, if the plan asks for one
    # ops: name, shape of a result, its cut, and the gathered module that it is of
    seen: tuple[tuple[str, tuple[int, ...] | None, Cut | None, str], ...] = ()

    @property
    def cuts_vocabulary(self) -> bool:
        """Whether an embedding or head is cut by rows of the vocabulary."""
        return self.vocabulary is not None and bool(self.vocabulary.embeddings or self.vocabulary.heads)

    def only(self, pairs: Sequence[Pair], why: Mapping[str, str]) -> Discovery:
        """The same with these pairs alone; the layers of the others stay whole, for the reason of their first."""
        columns = {path for pair in pairs for path in pair.columns}
        dropped = {
            path: why[next(iter(pair.columns))]
            for pair in self.pairs
            if pair not in pairs
            for path in (*pair.columns, *pair.rows)
        }
        return replace(
            self,
            pairs=tuple(pairs),
            kept={**dropped, **self.kept},
            partial={name: met for name, met in self.partial.items() if met & columns},
            gathered={path: met for path, met in self.gathered.items() if met & columns},
            owned={candidate: met for candidate, met in self.owned.items() if met <= columns},
        )

    def pair_of(self, sources: frozenset[str]) -> Pair:
        """The pair that a cut of the sources belongs to."""
        return next(pair for pair in self.pairs if sources & pair.columns.keys())

    def held(self, index: int, degree: int) -> tuple[int, ...]:
        """How many units of each pair rank `index` of `degree` holds: ranks for which it is equal do alike."""
        return tuple(pair.share(degree).held(index, degree) for pair in self.pairs)

    def shapes(self, index: int, degree: int) -> list[Seen]:
        """What the forward must do on rank `index` of `degree`: the same, with each cut dim divided.

        Heads that ranks share are repeated less often there, or not at all; what they then meet is held to its shape.
        """
        shares = {path: pair.share(degree) for pair in self.pairs for path in pair.columns}
        shares[SEQUENCE] = Share(num_units=degree)
        copied = {path for pair in self.pairs for path in pair.columns if pair.num_copies(path, degree) > 1}

        def local(shape: tuple[int, ...], cut: Cut | None) -> tuple[int, ...]:
            if cut is None or not cut.sources <= shares.keys():
                return shape
            size = shares[min(cut.sources)].of(shape[cut.dim], index, degree)
            return (*shape[: cut.dim], size, *shape[cut.dim + 1 :])

        return [
            Seen(op, None, optional=True)
            if cut and cut.sources <= copied
            # a single head needs no clone to be contiguous
            else Seen(op, shape and local(shape, cut), optional=op == "clone")
            for op, shape, cut, within in self.seen
            if within not in self.gathered
        ]
