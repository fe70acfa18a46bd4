"""What each op does to a cut dim: a table from op to the rule that carries the cut on, or says that its trail is lost.

A `Trail` is everything learnt while a forward runs on fake tensors; `discover` reads it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any, NamedTuple

from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

SEQUENCE = "the sequence"  # the source of the cut that sequence parallel makes


@dataclass(frozen=True, slots=True)
class Cut:
    """The dim of a tensor that a cut of the `sources` would divide, and how many units it has there."""

    sources: frozenset[str]
    dim: int
    num_units: int


class Whole(NamedTuple):
    """A tensor that is whole on every rank: of which parameters alone it was made, or that it is an activation."""

    parameters: frozenset[str]
    is_activation: bool


class Candidate(NamedTuple):
    """A dim of a parameter that could be cut."""

    parameter: str
    dim: int


@dataclass(slots=True)
class Trail:
    """Everything learnt while the forward runs."""

    cuts: WeakTensorKeyDictionary = field(default_factory=WeakTensorKeyDictionary)
    width: dict[str, int] = field(default_factory=dict)  # source -> features of one block
    num_blocks: dict[str, int] = field(default_factory=dict)
    num_units: dict[str, int] = field(default_factory=dict)
    own_units: dict[str, int] = field(default_factory=dict)  # before it meets others
    lost: dict[str, str] = field(default_factory=dict)  # source -> why it cannot be cut
    tied: dict[str, str] = field(default_factory=dict)  # linear layers that share a parameter with something else
    feeds: dict[str, set[str]] = field(default_factory=dict)  # consumer -> sources, in order of execution
    inside: list[str] = field(default_factory=list)  # the linear layers that are running: their own ops are theirs
    seen: list[tuple[str, tuple[int, ...] | None, Any, str]] = field(default_factory=list)
    made_of: WeakTensorKeyDictionary = field(default_factory=WeakTensorKeyDictionary)  # tensor -> Whole
    uniform: dict[int, Any] = field(default_factory=dict)  # storages of constants that are the same everywhere
    partial: dict[str, set[str]] = field(default_factory=dict)  # parameter -> sources whose cut it meets
    entered: WeakTensorKeyDictionary = field(default_factory=WeakTensorKeyDictionary)  # gathered, for columns alone
    candidates: WeakTensorKeyDictionary = field(default_factory=WeakTensorKeyDictionary)  # tensor -> Candidate -> dim
    owned: dict[Candidate, set[str]] = field(default_factory=dict)  # those that are cut with the sources they meet
    used_whole: set[Candidate] = field(default_factory=set)  # those that some op needs whole
    blocks: list[str] = field(default_factory=list)  # entries of lists of modules that have run
    leaf: list[str] = field(default_factory=list)  # the modules without children that are running
    lost_in: dict[str, str] = field(default_factory=dict)  # source -> the leaf module in which its trail was lost
    could_gather: frozenset[str] = frozenset()  # leaf modules that lost a trail, and get and give the same features
    gathering: list[str] = field(default_factory=list)  # those that are running
    gets_other: set[str] = field(default_factory=set)  # those that get something else at some call
    gathered: dict[str, set[str]] = field(default_factory=dict)  # leaf module -> sources that it gets gathered

    def told(self, name: str, fake: Tensor) -> None:
        """Note the fake tensor that stands for a parameter."""
        self.made_of[fake] = Whole(frozenset((name,)), False)

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
                self.made_of[result] = Whole(frozenset() if is_activation else parameters, is_activation)

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
            if self.leaf and source not in self.lost:
                self.lost_in[source] = self.leaf[-1]
            self.lost.setdefault(source, why)


Rule = Callable[[Trail, tuple[Any, ...], Sequence[Tensor], Sequence[Tensor]], "list[Cut | None] | None"]


def pointwise(trail: Trail, args: Any, tensors: Any, results: Any) -> list[Cut | None] | None:
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
    return [Cut(sources, result.dim() - place, num_units) if result.dim() >= place else None for result in results]


def _reshape(trail: Trail, args: Any, tensors: Any, results: Any) -> list[Cut | None] | None:
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
        return [Cut(cut.sources, where, min(cut.num_units, after[where]))]
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


def _permute(trail: Trail, args: Any, tensors: Any, results: Any) -> list[Cut | None] | None:
    cut, num_dims = trail.cuts[tensors[0]], tensors[0].dim()
    if len(args) == 1:  # t
        order = list(reversed(range(num_dims)))
    elif isinstance(args[1], (list, tuple)):  # permute
        order = [dim % num_dims for dim in args[1]]
    else:  # transpose
        order = list(range(num_dims))
        a, b = args[1] % num_dims, args[2] % num_dims
        order[a], order[b] = order[b], order[a]
    return [Cut(cut.sources, order.index(cut.dim), cut.num_units)]


def _split(trail: Trail, args: Any, tensors: Any, results: Any) -> list[Cut | None] | None:
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
    return [Cut(cut.sources, cut.dim, parts[0])] * len(parts)


def _same_place(trail: Trail, args: Any, tensors: Any, results: Any) -> list[Cut | None] | None:
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
    return [Cut(sources, cut.dim, cut.num_units)] * len(results)


def _not_over(dim_arg: int) -> Rule:
    """Softmax and the like: allowed over any dim but the cut one."""

    def rule(trail: Trail, args: Any, tensors: Any, results: Any) -> list[Cut | None] | None:
        cut, num_dims = trail.cuts[tensors[0]], tensors[0].dim()
        dims = args[dim_arg] if len(args) > dim_arg else None
        over = [dim % num_dims for dim in ([dims] if isinstance(dims, int) else dims or [])]
        if not over or cut.dim in over:
            return None
        kept = results[0].dim() == num_dims
        place = cut.dim if kept else cut.dim - sum(dim < cut.dim for dim in over)
        return [Cut(cut.sources, place, cut.num_units)] * len(results)

    return rule


def _attention(trail: Trail, args: Any, tensors: Any, results: Any) -> list[Cut | None] | None:
    """Query, key, value (B, H, S, D): all cut by heads, or not at all."""
    given = [trail.cuts.get(tensor) for tensor in tensors[:3]]
    cuts = [cut for cut in given if cut is not None and cut.dim == 1]
    if len(cuts) != 3:
        return None
    sources = frozenset().union(*(cut.sources for cut in cuts))
    num_units = min(cut.num_units for cut in cuts)
    # the log-sum-exp beside the output is (B, H, S); seeds and offsets are not cut
    heads = tensors[0].size(1)
    return [Cut(sources, 1, num_units) if x.dim() >= 3 and x.size(1) == heads else None for x in results]


def _batched_product(trail: Trail, args: Any, tensors: Any, results: Any) -> list[Cut | None] | None:
    """(H, S, K) x (H, K, T): cut by the batch dim on both sides."""
    cuts = [trail.cuts.get(tensor) for tensor in tensors[-2:]]
    both = [cut for cut in cuts if cut is not None and cut.dim == 0]
    if len(both) != 2:
        return None
    return [Cut(both[0].sources | both[1].sources, 0, min(cut.num_units for cut in both))]


_FILLS = frozenset(("zeros", "ones", "full"))


def _layer_norm(trail: Trail, args: Any, tensors: Any, results: Any) -> list[Cut | None] | None:
    """A norm over the last dims, as many as args[1] has, leaves the others apart."""
    cut = trail.cuts.get(tensors[0])
    if cut is None or cut.dim >= tensors[0].dim() - len(args[1]):
        return None
    return [cut] * len(results)


RULES: dict[str, Rule] = {
    **dict.fromkeys(("native_layer_norm", "_fused_rms_norm"), _layer_norm),
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
    **dict.fromkeys(
        ("_softmax", "_log_softmax", "mean", "sum", "_safe_softmax", "logsumexp", "max", "min", "amax", "amin"),
        _not_over(1),
    ),
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
