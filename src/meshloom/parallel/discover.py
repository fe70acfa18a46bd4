"""Find how a model can be cut over a tensor-parallel group, from its own forward pass; no list of model names.

The forward runs once on fake tensors. The output features of each linear layer are followed through every op, as the
one dim that a cut would divide, until they reach the input features of other linear layers. If every way ends there,
the layers are a pair: column, then row. Where the trail is lost (a residual sum with a whole tensor, a norm over the
cut dim, an op without a rule) the layers stay whole on each rank, and `Discovery.kept` says why.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary

from meshloom.parallel.fake import Seen, run_fake
from meshloom.parallel.styles import linear_shape


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


@dataclass(frozen=True, slots=True)
class _Cut:
    """The dim of a tensor that a cut of the `sources` would divide, and how many units it has there."""

    sources: frozenset[str]
    dim: int
    num_units: int


class _Whole(NamedTuple):
    """A tensor that is whole on every rank: of which parameters alone it was made, or that it is an activation."""

    parameters: frozenset[str]
    is_activation: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Discovery:
    """What can be cut, and each linear layer that stays whole with the reason."""

    pairs: tuple[Pair, ...]
    kept: Mapping[str, str]
    partial: tuple[str, ...] = ()  # whole parameters that meet a rank's part only: their gradients must be summed
    seen: tuple[tuple[str, tuple[int, ...] | None, _Cut | None], ...] = ()

    def shapes(self, degree: int) -> list[Seen]:
        """What the forward must do on one of `degree` parts: the same, with each cut dim divided.

        Heads that ranks share are repeated less often there, or not at all; what they then meet is held to its shape.
        """
        columns = {path for pair in self.pairs for path in pair.columns}
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


@dataclass(slots=True)
class _Trail:
    """Everything learnt while the forward runs."""

    cuts: WeakTensorKeyDictionary = field(default_factory=WeakTensorKeyDictionary)
    width: dict[str, int] = field(default_factory=dict)  # source -> features of one block
    num_blocks: dict[str, int] = field(default_factory=dict)
    num_units: dict[str, int] = field(default_factory=dict)
    own_units: dict[str, int] = field(default_factory=dict)  # before it meets others
    lost: dict[str, str] = field(default_factory=dict)  # source -> why it cannot be cut
    feeds: dict[str, set[str]] = field(default_factory=dict)  # consumer -> sources, in order of execution
    inside: list[str] = field(default_factory=list)  # the linear layers that are running: their own ops are theirs
    seen: list[tuple[str, tuple[int, ...] | None, _Cut | None]] = field(default_factory=list)
    made_of: WeakTensorKeyDictionary = field(default_factory=WeakTensorKeyDictionary)  # tensor -> _Whole
    uniform: dict[int, Any] = field(default_factory=dict)  # storages of constants that are the same everywhere
    partial: dict[str, set[str]] = field(default_factory=dict)  # parameter -> sources whose cut it meets

    def told(self, name: str, fake: Tensor) -> None:
        """Note the fake tensor that stands for a parameter."""
        self.made_of[fake] = _Whole(frozenset((name,)), False)

    def meet(self, op: str, tensors: Sequence[Tensor], results: Sequence[Tensor]) -> None:
        """Note what an op makes of parameters, and what whole tensors it brings together with a cut one.

        Each rank sees a part of what such a tensor meets, so its gradient there is a part too. Those of a parameter can
        be summed; those of an activation would go on into the rest of the model.
        """
        known = [(tensor, self.made_of[tensor]) for tensor in tensors if tensor in self.made_of]
        sources = {source for tensor in tensors if tensor in self.cuts for source in self.cuts[tensor].sources}
        for tensor, made in known if sources else []:
            if tensor in self.cuts:
                continue
            if made.is_activation:
                self.lose(sources, f"{op} brings it together with an activation that is whole on every rank")
            for name in made.parameters:
                self.partial.setdefault(name, set()).update(sources)
        if known:
            parameters = frozenset().union(*(made.parameters for _, made in known))
            is_activation = op == "embedding" or any(made.is_activation for _, made in known)
            for result in results:
                self.made_of[result] = _Whole(frozenset() if is_activation else parameters, is_activation)

    def note_uniform(self, func: Any, tensors: Sequence[Tensor], results: Sequence[Tensor]) -> None:
        """Note constants that are the same everywhere: the forward makes a rank's as large as it needs them."""
        storages = [tensor.untyped_storage() for tensor in (*tensors, *results)]
        if func._schema.is_mutable:  # perhaps only in some places
            for storage in storages:
                self.uniform.pop(storage._cdata, None)
        elif all(self.is_uniform(tensor) for tensor in tensors) and (tensors or func.overloadpacket.__name__ in _FILLS):
            self.uniform.update((storage._cdata, storage) for storage in storages)

    def is_uniform(self, tensor: Tensor) -> bool:
        """Whether it is a constant that is the same everywhere."""
        return tensor.untyped_storage()._cdata in self.uniform

    def lose(self, sources: Iterable[str], why: str) -> None:
        """Note why the sources cannot be cut; the first reason stays."""
        for source in sources:
            self.lost.setdefault(source, why)


def discover(model: nn.Module, example: Mapping[str, Tensor]) -> Discovery:
    """How `model` can be cut; `example` is a batch of one sequence (B=1), real, meta or fake. The model is unchanged.

    Batch 1, so that a dim that merges batch and heads, as in (B·H, S, D), is seen to begin with heads.
    """
    linears = {path: module for path, module in model.named_modules() if linear_shape(module) is not None}
    trail = _Trail()
    handles = []
    for path, module in linears.items():
        handles.append(module.register_forward_pre_hook(_arrive(trail, path)))
        handles.append(module.register_forward_hook(_depart(trail, path)))
    was_training = model.training
    try:
        model.eval()
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        run_fake(model, example, _Follow(trail), told=lambda real, fake: trail.told(names[id(real)], fake))
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


def _arrive(trail: _Trail, path: str) -> Callable[..., None]:
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


def _depart(trail: _Trail, path: str) -> Callable[..., None]:
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
        trail.cuts[output] = _Cut(frozenset((path,)), output.dim() - 1, width)
        trail.made_of[output] = _Whole(frozenset(), True)

    return hook


class _Follow(TorchDispatchMode):
    """Carries each tensor's cut through every op."""

    def __init__(self, trail: _Trail) -> None:
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
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        results = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
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
        rule = _RULES.get(name)
        if rule is None and torch.Tag.pointwise in func.tags:
            rule = _pointwise
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


Rule = Callable[[_Trail, tuple[Any, ...], Sequence[Tensor], Sequence[Tensor]], "list[_Cut | None] | None"]


def _pointwise(trail: _Trail, args: Any, tensors: Any, results: Any) -> list[_Cut | None] | None:
    """Every tensor must be cut in the same place, or have a single element there; softmax and reductions likewise."""
    given = [(tensor, trail.cuts[tensor]) for tensor in tensors if tensor in trail.cuts]
    from_right = {tensor.dim() - cut.dim for tensor, cut in given}
    if len(from_right) != 1 or len({tensor.size(cut.dim) for tensor, cut in given}) != 1:
        return None
    place = from_right.pop()
    whole = [tensor for tensor in tensors if tensor not in trail.cuts and not trail.is_uniform(tensor)]
    if any(tensor.dim() >= place and tensor.size(-place) != 1 for tensor in whole):
        return None
    sources = frozenset().union(*(cut.sources for _, cut in given))
    num_units = min(cut.num_units for _, cut in given)
    return [_Cut(sources, result.dim() - place, num_units) if result.dim() >= place else None for result in results]


def _reshape(trail: _Trail, args: Any, tensors: Any, results: Any) -> list[_Cut | None] | None:
    """The cut dim must be outermost among those it is merged with; a split hands the cut to the outermost part."""
    cut, before, after = trail.cuts[tensors[0]], tensors[0].shape, results[0].shape
    for old, new in _matching_dims(before, after):
        if cut.dim not in old:
            continue
        if any(before[dim] != 1 for dim in old if dim < cut.dim):
            return None
        where = next((dim for dim in new if after[dim] != 1), None)
        if where is None:
            return None
        return [_Cut(cut.sources, where, min(cut.num_units, after[where]))]
    return None


def _matching_dims(before: Sequence[int], after: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """The smallest runs of dims of `before` and `after` that hold the same elements."""
    runs: list[tuple[list[int], list[int]]] = []
    i = j = 0
    while i < len(before) or j < len(after):
        old, new = [i] if i < len(before) else [], [j] if j < len(after) else []
        i, j = i + 1, j + 1
        while prod(before[dim] for dim in old) != prod(after[dim] for dim in new):
            if prod(before[dim] for dim in old) < prod(after[dim] for dim in new) and i < len(before):
                old.append(i)
                i += 1
            elif j < len(after):
                new.append(j)
                j += 1
            else:
                return []
        runs.append((old, new))
    return runs


def _permute(trail: _Trail, args: Any, tensors: Any, results: Any) -> list[_Cut | None] | None:
    cut, num_dims = trail.cuts[tensors[0]], tensors[0].dim()
    if len(args) == 1:  # t
        order = list(reversed(range(num_dims)))
    elif isinstance(args[1], (list, tuple)):  # permute
        order = [dim % num_dims for dim in args[1]]
    else:  # transpose
        order = list(range(num_dims))
        a, b = args[1] % num_dims, args[2] % num_dims
        order[a], order[b] = order[b], order[a]
    return [_Cut(cut.sources, order.index(cut.dim), cut.num_units)]


def _split(trail: _Trail, args: Any, tensors: Any, results: Any) -> list[_Cut | None] | None:
    """Equal parts of a fused output are its blocks; a split of any other dim changes nothing."""
    cut = trail.cuts[tensors[0]]
    whole, parts = tensors[0].size(cut.dim), [result.size(cut.dim) for result in results]
    if parts == [whole] * len(parts):
        return [cut] * len(parts)
    if len(set(parts)) != 1 or any(trail.width[source] != whole for source in cut.sources):
        return None
    for source in cut.sources:
        trail.num_blocks[source] = len(parts)
        trail.width[source] = parts[0]
    return [_Cut(cut.sources, cut.dim, parts[0])] * len(parts)


def _same_place(trail: _Trail, args: Any, tensors: Any, results: Any) -> list[_Cut | None] | None:
    """Ops that work on other dims only: the cut dim keeps its place and its size. Empty caches join nothing."""
    tensors = [tensor for tensor in tensors if tensor.numel()]
    cuts = {trail.cuts.get(tensor) for tensor in tensors}
    if len({cut and (cut.dim, cut.num_units) for cut in cuts}) != 1:
        return None
    cut = trail.cuts[tensors[0]]
    sources = frozenset().union(*(cut.sources for cut in cuts if cut is not None))
    whole = tensors[0].size(cut.dim)
    if any(result.dim() != tensors[0].dim() or result.size(cut.dim) != whole for result in results):
        return None
    return [_Cut(sources, cut.dim, cut.num_units)] * len(results)


def _not_over(dim_arg: int) -> Rule:
    """Softmax and the like: allowed over any dim but the cut one."""

    def rule(trail: _Trail, args: Any, tensors: Any, results: Any) -> list[_Cut | None] | None:
        cut, num_dims = trail.cuts[tensors[0]], tensors[0].dim()
        dims = args[dim_arg] if len(args) > dim_arg else None
        over = [dims] if isinstance(dims, int) else dims
        if not over or cut.dim in [dim % num_dims for dim in over] or results[0].dim() != num_dims:
            return None
        return [cut]

    return rule


def _attention(trail: _Trail, args: Any, tensors: Any, results: Any) -> list[_Cut | None] | None:
    """Query, key, value (B, H, S, D): all cut by heads, or not at all."""
    given = [trail.cuts.get(tensor) for tensor in tensors[:3]]
    cuts = [cut for cut in given if cut is not None and cut.dim == 1]
    if len(cuts) != 3:
        return None
    sources = frozenset().union(*(cut.sources for cut in cuts))
    num_units = min(cut.num_units for cut in cuts)
    # the log-sum-exp beside the output is (B, H, S); seeds and offsets are not cut
    heads = tensors[0].size(1)
    return [_Cut(sources, 1, num_units) if x.dim() >= 3 and x.size(1) == heads else None for x in results]


def _batched_product(trail: _Trail, args: Any, tensors: Any, results: Any) -> list[_Cut | None] | None:
    """(H, S, K) x (H, K, T): cut by the batch dim on both sides."""
    cuts = [trail.cuts.get(tensor) for tensor in tensors[-2:]]
    both = [cut for cut in cuts if cut is not None and cut.dim == 0]
    if len(both) != 2:
        return None
    return [_Cut(both[0].sources | both[1].sources, 0, min(cut.num_units for cut in both))]


_OF_A_LINEAR = frozenset(
    ("t", "mm", "addmm", "bmm", "view", "_unsafe_view", "reshape", "transpose", "permute", "expand", "add", "linear")
)
_FILLS = frozenset(("zeros", "ones", "full"))
_RULES: dict[str, Rule] = {
    **dict.fromkeys(("view", "_unsafe_view", "reshape", "unsqueeze", "squeeze", "_reshape_alias"), _reshape),
    **dict.fromkeys(("t", "transpose", "permute"), _permute),
    **dict.fromkeys(("split", "split_with_sizes", "chunk"), _split),
    **dict.fromkeys(
        (
            "clone",
            "contiguous",
            "_to_copy",
            "detach",
            "alias",
            "native_dropout",
            "slice",
            "expand",
            "cat",
            "copy_",
            "lift_fresh",
        ),
        _same_place,
    ),
    **dict.fromkeys(("_softmax", "_log_softmax", "mean", "sum", "_safe_softmax"), _not_over(1)),
    **dict.fromkeys(
        (
            "_scaled_dot_product_flash_attention_for_cpu",
            "_scaled_dot_product_flash_attention",
            "_scaled_dot_product_efficient_attention",
            "_scaled_dot_product_cudnn_attention",
            "_scaled_dot_product_attention_math",
        ),
        _attention,
    ),
    **dict.fromkeys(("bmm", "baddbmm"), _batched_product),
}


def _pair(trail: _Trail, linears: Mapping[str, nn.Module]) -> Discovery:
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
