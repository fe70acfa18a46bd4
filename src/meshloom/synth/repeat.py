"""Steps that repeat but for numbers that grow evenly: from a few of them, any other, once a far one proves it.

A decode step does what the one before did, on keys and values of one token more: the numbers in its nodes are a + b·k
for step k. Each is found from two steps and held to a third and to the last; where one is not met, nothing is guessed.
No torch.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from meshloom.chakra.trace import Node
from meshloom.synth.parts import NotAlike

_NUMBER = re.compile(r"(\d+)")


class Even(NamedTuple):
    """A value that is `first` in step 0 and grows by `by`: numbers, also those in texts and lists."""

    first: Any
    by: Any

    def at(self, k: int) -> Any:
        """The value in step k."""
        if isinstance(self.by, int):
            return self.first + k * self.by
        values = [Even(*pair).at(k) if pair[1] else pair[0] for pair in zip(self.first, self.by, strict=True)]
        return "".join(map(str, values)) if isinstance(self.by, tuple) else values


def even(one: Any, next_one: Any) -> Even | None:
    """How a value grows from one step to the next, None if it does not; raises NotAlike if it changes otherwise."""
    if one == next_one:
        return None
    if type(one) is int and type(next_one) is int:
        return Even(one, next_one - one)
    if isinstance(one, str) and isinstance(next_one, str):
        parts = [[int(part) if part.isdigit() else part for part in _NUMBER.split(text)] for text in (one, next_one)]
        if [part for part in parts[0] if isinstance(part, str)] == [part for part in parts[1] if isinstance(part, str)]:
            grown = even(*parts)
            assert grown is not None  # the texts differ
            return Even(tuple(grown.first), tuple(grown.by))
    if isinstance(one, list) and isinstance(next_one, list) and len(one) == len(next_one):
        steps = [even(*pair) for pair in zip(one, next_one, strict=True)]
        firsts = [step.first if step else value for step, value in zip(steps, one, strict=True)]
        return Even(firsts, [step.by if step else 0 for step in steps])
    raise NotAlike(f"{one!r} becomes {next_one!r}")


class Run(NamedTuple):
    """Ids that are one step apart, such as of the nodes that each wrote a token's key.

    A run that `moves` begins one step later in each step, one that `grows` has one id more.
    """

    begin: int
    length: int
    moves: bool
    grows: bool

    def at(self, place: int, size: int) -> range:
        """The ids, `place` steps of `size` nodes after the first."""
        begin = self.begin + place * size * self.moves
        return range(begin, begin + (self.length + place * self.grows) * size, size)


class Repeated(NamedTuple):
    """A node of a step that repeats, with the ids that it depends on."""

    node: Node
    data: list[Run]
    ctrl: list[Run]
    attrs: dict[str, Even]
    inputs: list[Even | None]
    outputs: list[Even | None]

    def at(self, place: int, k: int, size: int) -> Node:
        """The node as step k has it, if that stands `place` steps after the first one, of `size` nodes each."""
        node = self.node
        return Node(
            id=node.id + place * size,
            name=node.name,
            type=node.type,
            data_deps=[other for run in self.data for other in run.at(place, size)],
            ctrl_deps=[other for run in self.ctrl for other in run.at(place, size)],
            attrs={**node.attrs, **{name: value.at(k) for name, value in self.attrs.items()}} if self.attrs
            else node.attrs,
            inputs=_texts(node.inputs, self.inputs, k),
            outputs=_texts(node.outputs, self.outputs, k),
        )  # fmt: skip


def _texts(texts: tuple[str, str, str] | None, grown: list[Even | None], k: int) -> tuple[str, str, str] | None:
    if texts is None or not grown:
        return texts
    a, b, c = (step.at(k) if step else text for step, text in zip(grown, texts, strict=True))
    return a, b, c


def repeated(step: Sequence[Node], following: Sequence[Node]) -> list[Repeated]:
    """The step's nodes with how they grow, from it and the one that follows; raises NotAlike."""
    if len(step) != len(following):
        raise NotAlike(f"a step of {len(step)} nodes follows one of {len(following)}")
    return [_repeated(one, other, len(step)) for one, other in zip(step, following, strict=True)]


def _repeated(one: Node, other: Node, size: int) -> Repeated:
    if (one.name, one.type, one.attrs.keys()) != (other.name, other.type, other.attrs.keys()):
        raise NotAlike(f"{one.name} becomes {other.name}")
    grown = {name: even(value, other.attrs[name]) for name, value in one.attrs.items()}
    return Repeated(
        node=one,
        data=_deps(one.data_deps, other.data_deps, size),
        ctrl=_deps(one.ctrl_deps, other.ctrl_deps, size),
        attrs={name: value for name, value in grown.items() if value is not None},
        inputs=_grown(one.inputs, other.inputs),
        outputs=_grown(one.outputs, other.outputs),
    )


def _deps(one: Sequence[int], other: Sequence[int], size: int) -> list[Run]:
    runs, others = _runs(one, size), _runs(other, size)
    found = [
        Run(begin, length, next_begin != begin, next_length != length)
        for (begin, length), (next_begin, next_length) in zip(runs, others)
    ]
    if [(run.at(1, size).start, len(run.at(1, size))) for run in found] != others or len(runs) != len(others):
        raise NotAlike(f"dependencies {list(one)} become {list(other)}")
    return found


def _runs(ids: Sequence[int], size: int) -> list[tuple[int, int]]:
    """The ids as (first, how many), of as many as possible that are `size` apart."""
    runs: list[tuple[int, int]] = []
    for each in ids:
        if runs and each == runs[-1][0] + runs[-1][1] * size:
            runs[-1] = (runs[-1][0], runs[-1][1] + 1)
        else:
            runs.append((each, 1))
    return runs


def _grown(one: tuple[str, ...] | None, other: tuple[str, ...] | None) -> list[Even | None]:
    if one is None or other is None:
        if one is not other:
            raise NotAlike("an op has no inputs at another step")
        return []
    found = [even(a, b) for a, b in zip(one, other, strict=True)]
    return found if any(found) else []


def prove(
    lines: Sequence[Repeated], step: Sequence[Node], *, place: int, k: int, fills: frozenset[int] = frozenset()
) -> None:
    """Raise NotAlike unless the captured step is what the lines say of step k, `place` steps after theirs.

    `fills` are the nodes that made what skipped steps would have written: a step after those may depend on them, too.
    """
    if len(lines) != len(step):
        raise NotAlike(f"step {k} has {len(step)} nodes, not {len(lines)}")
    for line, node in zip(lines, step, strict=True):
        said = line.at(place, k, len(lines))
        if said == node:
            continue
        names = [name for name in node.__struct_fields__ if getattr(said, name) != getattr(node, name)]
        if names != ["data_deps"] or not set(said.data_deps) <= set(node.data_deps) <= {*said.data_deps, *fills}:
            raise NotAlike(f"{node.name} of step {k} differs in {', '.join(names)}")
