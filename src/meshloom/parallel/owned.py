"""Parameters that a cut reaches: one number a head or feature, such as attention sinks, is cut with what it meets.

Every dim of a parameter is followed through the ops that see nothing but the parameter, as if it were cut. Where the
result meets a cut tensor and the op works only if one of those dims is cut with it, that dim is.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from meshloom.parallel.trail import Candidate, Cut, Rule, Trail


def begin(trail: Trail, name: str, parameter: Tensor) -> None:
    """Follow every dim of a parameter from here."""
    trail.candidates[parameter] = {Candidate(name, dim): dim for dim in range(parameter.dim())}


def spread(trail: Trail, rule: Rule | None, args: Any, tensors: Sequence[Tensor], results: Sequence[Tensor]) -> None:
    """Hand the candidates of a parameter on to the results of an op that sees no cut tensor."""
    followed = [tensor for tensor in tensors if tensor in trail.candidates]
    for tensor in followed:
        for candidate, dim in trail.candidates[tensor].items():
            after = _alone(trail, rule, candidate.parameter, dim, args, tensors, results) if len(followed) == 1 else []
            for result, place in after:
                trail.candidates.setdefault(result, {})[candidate] = place
            if not after:
                trail.used_whole.add(candidate)


def _alone(
    trail: Trail,
    rule: Rule | None,
    name: str,
    dim: int,
    args: Any,
    tensors: Sequence[Tensor],
    results: Sequence[Tensor],
) -> list[tuple[Tensor, int]]:
    """The results that would be cut, and where, if of all tensors only the parameter's were, in this dim."""
    tensor = next(tensor for tensor in tensors if tensor in trail.candidates)
    size = tensor.size(dim)
    shadow = Trail(uniform=trail.uniform, width={name: size})
    shadow.cuts[tensor] = Cut(frozenset((name,)), dim, size)
    after = rule(shadow, args, tensors, results) if rule is not None else None
    places = [(x, cut.dim) for x, cut in zip(results, after or [], strict=False) if cut is not None]
    return [(x, place) for x, place in places if x.size(place) == size]


def join(
    trail: Trail, rule: Rule, args: Any, tensors: Sequence[Tensor], results: Sequence[Tensor]
) -> list[Cut | None] | None:
    """What the op gives if one of its whole tensors, made of one parameter, is cut too; None if that does not help."""
    given = [trail.cuts[tensor] for tensor in tensors if tensor in trail.cuts]
    sources = frozenset().union(*(cut.sources for cut in given))
    num_units = min(cut.num_units for cut in given)
    for tensor in tensors:
        if tensor in trail.cuts:
            continue
        for candidate, dim in trail.candidates.get(tensor, {}).items():
            trail.cuts[tensor] = Cut(sources, dim, num_units)
            after = rule(trail, args, tensors, results)
            if after is not None:
                trail.owned.setdefault(candidate, set()).update(sources)
                return after
            del trail.cuts[tensor]
    return None
