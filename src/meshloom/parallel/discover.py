"""Find how a model can be cut over a tensor-parallel group, from its own forward pass; no list of model names.

The forward runs once on fake tensors. The output features of each linear layer are followed through every op, as the
one dim that a cut would divide, until they reach the input features of other linear layers. If every way ends there,
the layers are a pair: column, then row. Where the trail is lost (a residual sum with a whole tensor, a norm over the
cut dim, an op without a rule) the layers stay whole on each rank, and `Discovery.kept` says why.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from meshloom.parallel.embeddings import Vocabulary
from meshloom.parallel.fake import Seen, run_fake, tensors_among
from meshloom.parallel.styles import linear_shape
from meshloom.parallel.trail import RULES, SEQUENCE, Cut, Trail, Whole, pointwise


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """Layers that are cut together: `columns` by output features, `rows` by input features.

    `num_blocks`: into how many equal blocks each column's output is fused; `num_units`: how many units (heads, or
    single features) the degree must divide.
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Discovery:
    """What can be cut, and each linear layer that stays whole with the reason."""

    pairs: tuple[Pair, ...]
    kept: Mapping[str, str]
    partial: tuple[str, ...] = ()  # whole parameters that meet a rank's part only: their gradients must be summed
    seen: tuple[tuple[str, tuple[int, ...] | None, Cut | None], ...] = ()

    vocabulary: Vocabulary | None = None
    sequence: Any = None  # a SequenceCut, if the plan asks for one

    @property
    def cuts_vocabulary(self) -> bool:
        """Whether an embedding or head is cut by rows of the vocabulary."""
        return self.vocabulary is not None and bool(self.vocabulary.embeddings or self.vocabulary.heads)

    def shapes(self, degree: int) -> list[Seen]:
        """What the forward must do on one of `degree` parts: the same, with each cut dim divided.

        Heads that ranks share are repeated less often there, or not at all; what they then meet is held to its shape.
        """
        columns = {SEQUENCE, *(path for pair in self.pairs for path in pair.columns)}
        copied = {path for pair in self.pairs for path in pair.columns if pair.num_copies(path, degree) > 1}
        return [
            Seen(op, None, optional=True)
            if cut and cut.sources <= copied
            else Seen(
                op,
                shape
                and tuple(
                    size // degree if cut and cut.sources <= columns and dim == cut.dim else size
                    for dim, size in enumerate(shape)
                ),
                optional=op == "clone",  # a single head needs none to be contiguous
            )
            for op, shape, cut in self.seen
        ]


def discover(model: nn.Module, example: Mapping[str, Tensor]) -> Discovery:
    """How `model` can be cut; `example` is a batch of one sequence (B=1), real, meta or fake. The model is unchanged.

    Batch 1, so that a dim that merges batch and heads, as in (B·H, S, D), is seen to begin with heads.
    """
    linears = {path: module for path, module in model.named_modules() if linear_shape(module) is not None}
    trail = Trail()
    handles = []
    for path, module in linears.items():
        handles.append(module.register_forward_pre_hook(_arrive(trail, path)))
        handles.append(module.register_forward_hook(depart(trail, path)))
    was_training = model.training
    try:
        model.eval()
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        run_fake(model, example, Follow(trail), told=lambda real, fake: trail.told(names[id(real)], fake))
    finally:
        model.train(was_training)
        for handle in handles:
            handle.remove()
    for path, why in _tied(model, linears):
        trail.lost[path] = why
    return _pair(trail, linears)


def _tied(model: nn.Module, linears: Mapping[str, nn.Module]) -> Iterator[tuple[str, str]]:
    """Linear layers that share a parameter with something that is none, as a head with the embedding."""
    others = {
        id(parameter): path
        for path, module in model.named_modules()
        if path not in linears
        for parameter in module._parameters.values()
        if parameter is not None
    }
    for path, module in linears.items():
        tied = [others[id(parameter)] for parameter in module.parameters() if id(parameter) in others]
        if tied:
            yield path, f"it shares a parameter with {tied[0]}"


def _arrive(trail: Trail, path: str) -> Callable[..., None]:
    def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
        cut = trail.cuts.get(args[0])
        trail.inside.append(path)
        trail.feeds.setdefault(path, set())
        if cut is None:
            return
        if cut.dim != args[0].dim() - 1:
            trail.lose(cut.sources, f"its cut features are not the input features of {path}")
        trail.feeds[path] |= cut.sources

    return hook


def depart(trail: Trail, path: str) -> Callable[..., None]:
    """The hook after a linear layer: its output features are cut."""

    def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        trail.inside.pop()
        shape = linear_shape(module)
        if not isinstance(output, Tensor) or shape is None or output.size(-1) != shape.out_features:
            trail.lose((path,), "it returns something else than a linear layer does")
            return
        width = output.size(-1)
        trail.width.setdefault(path, width)
        trail.num_blocks.setdefault(path, 1)
        trail.num_units[path] = min(width, trail.num_units.get(path, width))
        trail.own_units[path] = min(width, trail.own_units.get(path, width))
        trail.cuts[output] = Cut(frozenset((path,)), output.dim() - 1, width)
        trail.made_of[output] = Whole(frozenset(), True)

    return hook


class Follow(TorchDispatchMode):
    """Carries each tensor's cut through every op."""

    def __init__(self, trail: Trail) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.trail = trail

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.namespace == "prim":  # which only asks where a tensor lies
            return out
        if self.trail.inside:
            if func.overloadpacket.__name__ not in _OF_A_LINEAR:
                told = f"its forward does more than a linear layer's: {func.overloadpacket.__name__}"
                self.trail.lose(self.trail.inside, told)
            return out
        cuts, name = self.trail.cuts, func.overloadpacket.__name__
        tensors = tensors_among((*args, *(kwargs or {}).values()))
        results = tensors_among((out,))
        for tensor in tensors if self.trail.entered else ():
            if tensor in self.trail.entered:
                self.trail.lose((SEQUENCE,), f"{name} uses what is gathered for {self.trail.entered[tensor]}")
        self.trail.note_uniform(func, tensors, results)
        self.trail.meet(name, tensors, results)
        if any(tensor in cuts for tensor in tensors):
            self._carry(func, args, tensors, results)
        self.trail.seen += [
            (name, None if self.trail.is_uniform(result) else tuple(result.shape), cuts.get(result))
            for result in results
        ]
        return out

    def _carry(self, func: Any, args: Any, tensors: Sequence[Tensor], results: Sequence[Tensor]) -> None:
        """Hand the cut on to the results, or note that the trail is lost here."""
        cuts, name = self.trail.cuts, func.overloadpacket.__name__
        rule = RULES.get(name)
        if rule is None and torch.Tag.pointwise in func.tags:
            rule = pointwise
        after = rule(self.trail, args, tensors, results) if rule is not None else None
        if after is None:
            given = [cuts[tensor] for tensor in tensors if tensor in cuts]
            self.trail.lose((source for cut in given for source in cut.sources), f"{name} mixes its features")
            return
        for result, cut in zip(results, after, strict=True):
            if cut is not None:
                cuts[result] = cut
                for source in cut.sources:
                    self.trail.num_units[source] = min(self.trail.num_units[source], cut.num_units)
                    if len(cut.sources) == 1:
                        self.trail.own_units[source] = min(self.trail.own_units[source], cut.num_units)


_OF_A_LINEAR = frozenset(
    ("t", "mm", "addmm", "bmm", "view", "_unsafe_view", "reshape", "transpose", "permute", "expand", "add", "linear")
)


def _pair(trail: Trail, linears: Mapping[str, nn.Module]) -> Discovery:
    """Columns and rows that serve each other, in order of execution: what is a row already cannot be a column."""
    lost = dict(trail.lost)
    rows: dict[str, set[str]] = {}
    for consumer, sources in trail.feeds.items():
        if sources and not sources & rows.keys():
            rows[consumer] = set(sources)
        else:
            for source in sources:
                lost.setdefault(source, f"it is cut by its input features, so {consumer} gets them whole")
    while True:  # a pair falls with any of its members, and takes those along that share one
        fallen = {row for row, sources in rows.items() if sources & lost.keys()}
        if not fallen:
            break
        for row in fallen:
            for source in rows.pop(row):
                lost.setdefault(source, f"{row}, which it feeds, cannot be cut")
    pairs = []
    for sources_of, members in _joined(rows):
        columns = {source: trail.num_blocks[source] for source in trail.feeds if source in sources_of}
        num_units = min(trail.num_units[source] for source in columns)
        width = next(trail.width[source] for source in columns)
        reason = f"all output features of {', '.join(columns)} end in the input features of {', '.join(members)}"
        units = {source: trail.own_units[source] for source in columns}
        pairs.append(Pair(columns=columns, rows=members, num_units=num_units, width=width, reason=reason, units=units))
    cut = {path for pair in pairs for path in (*pair.columns, *pair.rows)}
    kept = {
        path: lost.get(
            path,
            "its output features feed no other linear layer"
            if path in trail.feeds
            else "the forward pass does not reach it",
        )
        for path in linears
        if path not in cut
    }
    sources = {path for pair in pairs for path in pair.columns}
    partial = tuple(name for name, met in trail.partial.items() if met & sources)
    return Discovery(pairs=tuple(pairs), kept=kept, partial=partial, seen=tuple(trail.seen))


def _joined(rows: Mapping[str, set[str]]) -> list[tuple[set[str], tuple[str, ...]]]:
    """Rows that share a column form one pair."""
    joined: list[tuple[set[str], tuple[str, ...]]] = []
    for row, sources in rows.items():
        together = [group for group in joined if group[0] & sources]
        joined = [group for group in joined if not group[0] & sources]
        joined.append(
            (
                sources.union(*(group[0] for group in together)),
                (*(member for group in together for member in group[1]), row),
            )
        )
    return joined
