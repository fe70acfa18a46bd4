"""Layers that repeat within a pass: from a model of a few, the nodes of one of many, once two in a row prove alike.

Seen from its layer, a node depends on nodes of its own layer, of the one before, of the first or the last, or on what
runs before all layers, in this pass or in one so many passes before. Layers that read alike in this way are the same,
wherever they stand. What runs after the layers counts to the last. No torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Literal, NamedTuple

import msgspec

from meshloom.chakra.trace import Node
from meshloom.synth.parts import NotAlike

FEWEST = 5  # layers that show all that differs: the first two, two in a row that must be alike, and the last
_ALIKE = 2  # the first of those two
_BEFORE = -1  # what runs before all layers

Place = Literal["before", "first", "last"] | int  # or so many layers back


class UnlikeLayers(NotAlike):
    """Layers of a pass do not repeat, for the reason that the message gives: each must be captured."""


class Layers(NamedTuple):
    """The layers that were captured, and those that they stand for; their paths begin with `prefix`."""

    prefix: str
    captured: range
    whole: range

    def number(self, node: Node) -> int | None:
        """Which of the captured layers the node belongs to, from 0; None if to none."""
        module = node.attrs.get("module", "")
        if not module.startswith(self.prefix):
            return None
        return int(module.removeprefix(self.prefix).partition(".")[0]) - self.captured.start

    def standing(self, layer: int) -> int:
        """The captured layer that is the same as number `layer` of the whole."""
        return len(self.captured) - 1 if layer == len(self.whole) - 1 else min(layer, _ALIKE)

    def module(self, path: str, layer: int) -> str:
        """The path of a module of number `layer` of the whole, from that of a captured layer."""
        if not path.startswith(self.prefix):
            return path
        _, dot, rest = path.removeprefix(self.prefix).partition(".")
        return f"{self.prefix}{self.whole.start + layer}{dot}{rest}"


class _Source(NamedTuple):
    """A node that another needs, as the other sees it: so many passes before, in which layer, and its number there."""

    passes: int
    place: Place
    number: int


class _Line(NamedTuple):
    """A node as its layer sees it; `node` has no id, no dependencies, and the module path of layer 0."""

    node: Node
    data: list[_Source]
    ctrl: list[_Source]


def with_all_layers(nodes: Sequence[Node], begins: Sequence[int], layers: Layers) -> tuple[list[Node], list[int]]:
    """The nodes of all layers, and where each pass after the first begins, from those of the captured ones.

    Every pass goes through the layers in order. Raises UnlikeLayers where one does not, or two are not alike.
    """
    if len(layers.captured) == len(layers.whole):
        return [_renamed(node, layers) for node in nodes], list(begins)
    bounds = [0, *begins, len(nodes)]
    spans = [_spans(nodes, begin, end, layers) for begin, end in pairwise(bounds)]
    owner = [
        (number, layer)
        for number, span in enumerate(spans)
        for layer, (begin, end) in enumerate(pairwise(span), start=_BEFORE)
        for _ in range(end - begin)
    ]
    sizes: list[int] = []  # of each pass
    placed: list[list[int]] = []  # the first node of each of its layers
    for span in spans:
        parts = [layers.standing(layer) if layer >= 0 else layer for layer in range(_BEFORE, len(layers.whole))]
        lengths = [span[part + 2] - span[part + 1] for part in parts]
        placed.append([sum(sizes) + before for before in accumulate(lengths, initial=0)])
        sizes.append(sum(lengths))
    lines = [_line(node, index, owner, spans, layers) for index, node in enumerate(nodes)]
    _prove(lines, spans)
    made: list[Node] = []
    for number, span in enumerate(spans):
        for layer in range(_BEFORE, len(layers.whole)):
            part = layers.standing(layer) if layer >= 0 else layer
            for line in lines[span[part + 1] : span[part + 2]]:
                made.append(_node(line, len(made) + 1, number, layer, placed, layers))
    return made, list(accumulate(sizes))[:-1]


def _renamed(node: Node, layers: Layers) -> Node:
    number = layers.number(node)
    if number is None or layers.captured == layers.whole:
        return node
    return msgspec.structs.replace(node, attrs={**node.attrs, "module": layers.module(node.attrs["module"], number)})


def _spans(nodes: Sequence[Node], begin: int, end: int, layers: Layers) -> list[int]:
    """Where a pass begins, where each of its layers does, and where it ends."""
    span = [begin]
    for index in range(begin, end):
        number = layers.number(nodes[index])
        if number is None or number == len(span) - 2:
            continue
        if number != len(span) - 1:
            raise UnlikeLayers(
                f"{nodes[index].attrs['module']} runs after layer {len(span) - 2 + layers.captured.start}"
            )
        span.append(index)
    if len(span) != len(layers.captured) + 1:
        raise UnlikeLayers(f"a pass through {len(span) - 1} layers, not {len(layers.captured)}")
    return [*span, end]


def _line(
    node: Node, index: int, owner: Sequence[tuple[int, int]], spans: Sequence[Sequence[int]], layers: Layers
) -> _Line:
    mine, layer = owner[index]

    def sources(needs: Sequence[int]) -> list[_Source]:
        found = []
        for needed in needs:  # ids count from 1
            other, where = owner[needed - 1]
            place = _place(layer, where, len(layers.captured) - 1)
            found.append(_Source(mine - other, place, needed - 1 - spans[other][where + 1]))
        return found

    attrs = {**node.attrs, "module": layers.module(node.attrs.get("module", ""), 0)}
    bare = msgspec.structs.replace(node, id=0, data_deps=[], ctrl_deps=[], attrs=attrs)
    return _Line(bare, sources(node.data_deps), sources(node.ctrl_deps))


def _place(layer: int, other: int, last: int) -> Place:
    """Where layer `other` stands, seen from `layer`, in a way that holds for any number of layers."""
    if other == _BEFORE:
        return "before"
    if layer >= 0 and other in (layer, layer - 1):
        return layer - other
    if other == last:
        return "last"
    if other == 0:
        return "first"
    raise UnlikeLayers(f"layer {layer} needs what layer {other} did" if layer >= 0 else f"a pass needs layer {other}")


def _prove(lines: Sequence[_Line], spans: Sequence[Sequence[int]]) -> None:
    for span in spans:
        begin, middle, end = span[_ALIKE + 1 : _ALIKE + 4]
        one, other = lines[begin:middle], lines[middle:end]
        if one != other:
            names = [b.node.name for a, b in zip(one, other) if a != b]
            told = f"{names[0]} differs" if names else f"{len(other)} nodes follow {len(one)}"
            raise UnlikeLayers(f"layer {_ALIKE + 1} is not as layer {_ALIKE}: {told}")


def _node(line: _Line, name: int, number: int, layer: int, placed: Sequence[Sequence[int]], layers: Layers) -> Node:
    def ids(sources: Sequence[_Source]) -> list[int]:
        return [placed[number - passes][_layer(place, layer, layers) + 1] + at + 1 for passes, place, at in sources]

    attrs = line.node.attrs
    module = layers.module(attrs["module"], layer)
    attrs = {key: module if key == "module" else value for key, value in attrs.items() if key != "module" or module}
    return msgspec.structs.replace(line.node, id=name, data_deps=ids(line.data), ctrl_deps=ids(line.ctrl), attrs=attrs)


def _layer(place: Place, mine: int, layers: Layers) -> int:
    if isinstance(place, int):
        return mine - place
    return {"before": _BEFORE, "first": 0, "last": len(layers.whole) - 1}[place]
