"""Which of the pairs fit on a rank: the numbers of its own by which a forward reshapes must count the rank's part.

Tried on a copy of the model on fake tensors, before the model itself is touched.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import combinations, takewhile
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from meshloom.errors import PlanError
from meshloom.parallel.fake import dataless_copy, trouble_of_part
from meshloom.parallel.mesh import Mesh
from meshloom.parallel.pairs import Counts, Discovery, Pair
from meshloom.plan import Plan

_MOST_LEFT_OUT = 2  # numbers of a module that are equal to a count by chance; each more doubles the tries

Cutter = Callable[[nn.Module, Discovery, Mesh], None]


def fit(model: nn.Module, found: Discovery, example: Mapping[str, Tensor], plan: Plan, cut: Cutter) -> Discovery:
    """What of `found` the forward of a rank's part can take, with its counts; `cut` cuts a model in place.

    If all pairs together do not fit, those that are alike are tried alone, then together again; what does not fit stays
    whole. Raises PlanError if nothing fits.
    """
    trouble, counts = _trouble(model, found, example, plan, cut)
    if not trouble:
        return replace(found, counts=counts)
    alike: dict[Any, list[Pair]] = {}
    for pair in found.pairs:
        alike.setdefault(tuple(re.sub(r"\d+", "#", path) for path in (*pair.columns, *pair.rows)), []).append(pair)
    good: list[Pair] = []
    why: dict[str, str] = {}
    best = counts
    for pairs in alike.values() if len(alike) > 1 else ():
        told, fitting = _trouble(model, found.only([*good, *pairs], why_of(found, "")), example, plan, cut)
        if told:
            why |= {column: f"its part does not fit into the forward: {told}" for p in pairs for column in p.columns}
        else:
            good, best = [*good, *pairs], fitting
    if not good:
        raise PlanError(f"plan {plan}: the model's forward does not run on a rank's part: {trouble}; use tp1")
    return replace(found.only(good, why), counts=best)


def why_of(found: Discovery, reason: str) -> dict[str, str]:
    """One reason for every column."""
    return {column: reason for pair in found.pairs for column in pair.columns}


def _trouble(
    model: nn.Module, found: Discovery, example: Mapping[str, Tensor], plan: Plan, cut: Cutter
) -> tuple[str, tuple[Counts, ...]]:
    """What the forward of a rank's part does otherwise than it must, empty if nothing; and the counts of every rank.

    Ranks that hold equally many units do alike: one of them is tried.
    """
    tried: dict[tuple[int, ...], Counts] = {}
    for index in range(plan.tp):
        held = found.held(index, plan.tp)
        if held in tried:
            continue
        part = dataless_copy(model)
        cut(part, found, _mesh_of_one(plan, index))
        told = trouble_of_part(part, example, found.shapes(index, plan.tp), found.answers)
        told, counts = _fit_counts(part, found, example, index, plan.tp, told) if told else ("", ())
        if told:
            return told, ()
        tried[held] = counts
    return "", tuple(tried[found.held(index, plan.tp)] for index in range(plan.tp))


def _mesh_of_one(plan: Plan, index: int) -> Mesh:
    """The mesh of one rank without processes: on fake tensors nothing is sent."""
    group: Any = SimpleNamespace(group_name="none", size=lambda: plan.tp)
    alone = Plan(tp=plan.tp)
    parts: Any = _Always(group)
    return Mesh(plan=alone, rank=index, device=torch.device("meta"), groups={"tp": group}, parts=parts)


class _Always(dict[Any, Any]):
    """The same group whichever ranks are asked for."""

    def __init__(self, group: Any) -> None:
        super().__init__()
        self.group = group

    def __contains__(self, key: object) -> bool:
        return True

    def __getitem__(self, key: Any) -> Any:
        return self.group


def _fit_counts(
    part: nn.Module, found: Discovery, example: Mapping[str, Tensor], index: int, degree: int, trouble: str
) -> tuple[str, Counts]:
    """The forward reshapes or splits by numbers of its own, which must now count this rank's part.

    All that equal a count of heads or features are tried first; where that is too many, because a number is equal by
    chance, fewer. What is right is decided by the shapes of the whole forward. Returns the trouble if nothing fits.
    """
    places = [
        (path, owner, name, getattr(owner, name), value)
        for pair in found.pairs
        for path, owner in _owners(part, [*pair.columns, *pair.rows])
        for name, value in _counts(owner, pair, index, degree).items()
    ]
    names = sorted({name for _, _, name, _, _ in places})
    expected = found.shapes(index, degree)
    for left_out in range(min(len(names), _MOST_LEFT_OUT + 1)):
        for kept in combinations(names, len(names) - left_out):
            for _, owner, name, before, after in places:
                setattr(owner, name, after if name in kept else before)
            told = trouble_of_part(part, example, expected, found.answers)
            if not told:
                return "", tuple((path, name, after) for path, _, name, _, after in places if name in kept)
            trouble = trouble if left_out else told  # what all of them give says most
    return trouble, ()


def _owners(model: nn.Module, paths: list[str]) -> list[tuple[str, nn.Module]]:
    """The innermost module that holds all the layers of a pair, and those between it and the layers."""
    parents = [path.split(".")[:-1] for path in paths]
    depth = len(list(takewhile(lambda names: len(set(names)) == 1, zip(*parents))))
    between = {".".join(parent[:end]) for parent in parents for end in range(depth, len(parent) + 1)}
    return [(path, model.get_submodule(path)) for path in sorted(between)]


def _counts(owner: nn.Module, pair: Pair, index: int, degree: int) -> dict[str, int]:
    """The owner's own numbers that count cut heads or features, with what they are on a rank: its forward reshapes and
    splits by them. Where ranks share heads, so do the number of those and how often they are repeated.

    The size of a single head is never cut, whatever number it happens to equal.
    """
    most = max(pair.units.values())
    head_size = pair.width // most
    share = pair.share(degree)
    divided: dict[int, int] = {}
    for path, units in pair.units.items():
        if pair.num_copies(path, degree) > 1:
            divided |= {most // units: share.of(most, index, degree), units: 1, units * head_size: head_size}
    own = {units for path, units in pair.units.items() if pair.num_copies(path, degree) == 1 and units < pair.width}
    divided |= {units: share.of(units, index, degree) for units in sorted(own)}
    divided |= {pair.width: share.of(pair.width, index, degree)}
    numbers = {name: value for name, value in vars(owner).items() if type(value) is int and value in divided}
    return {
        name: divided[value]
        for name, value in numbers.items()
        if value != head_size or not name.endswith(("head_dim", "head_size"))
    }
