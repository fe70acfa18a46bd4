"""Find how a model can be cut over a tensor-parallel group, from its own forward pass; no list of model names.

The forward runs once on fake tensors. The output features of each linear layer are followed through every op, as the
one dim that a cut would divide, until they reach the input features of other linear layers. If every way ends there,
the layers are a pair: column, then row. Where the trail is lost (a residual sum with a whole tensor, a norm over the
cut dim, an op without a rule) the layers stay whole on each rank, and `Discovery.kept` says why.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from meshloom.parallel import owned
from meshloom.parallel.answers import Answers
from meshloom.parallel.fake import run_fake, tensors_among
from meshloom.parallel.flow import find_layers
from meshloom.parallel.outside import Outside, until_each_kind_ran
from meshloom.parallel.pairs import Discovery, Pair
from meshloom.parallel.styles import linear_shape
from meshloom.parallel.trail import RULES, SEQUENCE, Cut, Rule, Trail, Whole, pointwise


def discover(model: nn.Module, example: Mapping[str, Tensor], answers: Answers | None = None) -> Discovery:
    """How `model` can be cut; `example` is a batch of one sequence (B=1), real, meta or fake. The model is unchanged.

    Batch 1, so that a dim that merges batch and heads, as in (B·H, S, D), is seen to begin with heads. A small module
    in which a trail is lost is tried again as one that gathers its features. `answers` are what a forward that decides
    by values is told; raises CannotFollow if it asks and there are none.
    """
    gathers: frozenset[str] = frozenset()
    while True:
        linears = {path: module for path, module in model.named_modules() if linear_shape(module) is not None}
        trail = _followed(model, example, linears, gathers, answers)
        more = gathers | trail.could_gather
        if more == gathers:
            return replace(_pair(trail, linears), answers=answers)
        gathers = more


def _followed(
    model: nn.Module,
    example: Mapping[str, Tensor],
    linears: Mapping[str, nn.Module],
    gathers: frozenset[str],
    answers: Answers | None,
) -> Trail:
    """What a forward tells, and what one in training adds: some take another road then."""
    trail = Trail()
    outside = Outside(trail.inside, linears)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    of_linears = {id(parameter) for module in linears.values() for parameter in module.parameters()}

    def told(real: Tensor, fake: Tensor) -> None:
        trail.told(names[id(real)], fake)
        outside.told(real, fake)
        if id(real) not in of_linears:
            owned.begin(trail, names[id(real)], fake)

    was_training = model.training
    try:
        with _hooked(linears, lambda path, module: (_arrive(trail, path), depart(trail, path))):
            leaves = {
                path: module for path, module in model.named_modules() if _is_leaf(module) and path not in linears
            }
            blocks = {path: model.get_submodule(path) for path in find_layers(model)}
            with (
                _hooked(leaves, lambda path, module: _around_leaf(trail, path, module, path in gathers)),
                _hooked(blocks, lambda path, module: (lambda *_: trail.blocks.append(path), lambda *_: None)),
            ):
                run_fake(model.eval(), example, Follow(trail, outside), answers=answers, told=told)
            with until_each_kind_ran(model, trail.blocks) as kinds, suppress(RuntimeError):
                # where it asks for values in training only, what it did until then
                run_fake(model.train(), example, outside, answers=answers, told=outside.told)
    finally:
        model.train(was_training)
    for path, why in (*outside.found_in(kinds), *_tied(model, linears)):
        trail.lost[path] = trail.tied[path] = why
    trail.seen = [(op, shape, _settled(trail, cut), within) for op, shape, cut, within in trail.seen]
    for candidate in trail.owned.keys() & trail.used_whole:
        trail.lose(trail.owned[candidate], f"{candidate.parameter}, which they meet, is also used whole")
    for path in trail.gets_other:
        trail.lose(trail.gathered.pop(path, ()), f"{path} gets other features at another call")
    return trail


@contextmanager
def _hooked(
    modules: Mapping[str, nn.Module],
    hooks: Callable[[str, nn.Module], tuple[Callable[..., None], Callable[..., None]]],
) -> Iterator[None]:
    """Within this, each module has its hooks: before its forward and after."""
    handles = []
    for path, module in modules.items():
        before, after = hooks(path, module)
        handles += [module.register_forward_pre_hook(before), module.register_forward_hook(after)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _is_leaf(module: nn.Module) -> bool:
    return not module._modules and bool(module._parameters)


def _around_leaf(
    trail: Trail, path: str, module: nn.Module, gathers: bool
) -> tuple[Callable[..., None], Callable[..., None]]:
    if gathers:
        return _gather(trail, path), _part(trail, path, module)
    return _enter(trail, path), _leave(trail, path, module)


def _settled(trail: Trail, cut: Any) -> Cut | None:
    """The cut of what was made of a parameter, now that it is known which dims of parameters are cut."""
    if cut is None or isinstance(cut, Cut):
        return cut
    for candidate, dim in cut.items():
        if candidate in trail.owned:
            return Cut(frozenset(trail.owned[candidate]), dim, 1)
    return None


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


def _enter(trail: Trail, path: str) -> Callable[..., None]:
    def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
        trail.leaf.append(path)

    return hook


def _leave(trail: Trail, path: str, module: nn.Module) -> Callable[..., None]:
    def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        trail.leaf.pop()
        cut = trail.cuts.get(args[0]) if len(args) == 1 and isinstance(args[0], Tensor) else None
        if cut is None or cut.dim != args[0].dim() - 1:
            return
        if not isinstance(output, Tensor) or output.shape != args[0].shape:
            return
        if any(trail.lost_in.get(source) == path for source in cut.sources) and _is_all(trail, cut, args[0]):
            trail.could_gather |= {path}

    return hook


def _is_all(trail: Trail, cut: Cut, x: Tensor) -> bool:
    """Whether x holds a whole block of its sources, so that its parts are those of the ranks in their order."""
    return all(trail.width[source] == x.size(cut.dim) for source in cut.sources)


def _gather(trail: Trail, path: str) -> Callable[..., None]:
    def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
        trail.gathering.append(path)

    return hook


def _part(trail: Trail, path: str, module: nn.Module) -> Callable[..., None]:
    def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        trail.gathering.pop()
        cut = trail.cuts.get(args[0])
        if cut is None or cut.dim != args[0].dim() - 1 or not _is_all(trail, cut, args[0]):
            trail.gets_other.add(path)
            trail.lose(cut.sources if cut else (), f"{path} mixes its features")
            return
        trail.gathered.setdefault(path, set()).update(cut.sources)
        trail.cuts[output] = cut
        for name, _ in module.named_parameters():
            trail.partial.setdefault(f"{path}.{name}", set()).update(cut.sources)

    return hook


class Follow(TorchDispatchMode):
    """Carries each tensor's cut through every op."""

    def __init__(self, trail: Trail, outside: Outside) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.trail, self.outside = trail, outside

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.namespace == "prim":  # which only asks where a tensor lies
            return out
        if self.trail.gathering:
            self._note(func, tree_leaves(out))
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
        self.outside.meet(name, tensors)
        self.trail.note_uniform(func, tensors, results)
        self.trail.meet(name, tensors, results)
        if any(tensor in cuts for tensor in tensors):
            self._carry(func, args, tensors, results)
        elif any(tensor in self.trail.candidates for tensor in tensors):
            owned.spread(self.trail, _rule_of(func), args, tensors, results)
        self._note(func, results)
        return out

    def _note(self, func: Any, results: Sequence[Any]) -> None:
        trail, name = self.trail, func.overloadpacket.__name__
        within = trail.gathering[-1] if trail.gathering else ""
        trail.seen += [
            (name, None if trail.is_uniform(result) else tuple(result.shape), self._cut_of(result), within)
            for result in results
            if isinstance(result, Tensor)
        ]

    def _cut_of(self, tensor: Tensor) -> Any:
        """Its cut, or what may yet turn out to be one."""
        return self.trail.cuts.get(tensor) or self.trail.candidates.get(tensor)

    def _carry(self, func: Any, args: Any, tensors: Sequence[Tensor], results: Sequence[Tensor]) -> None:
        """Hand the cut on to the results, or note that the trail is lost here."""
        cuts, name = self.trail.cuts, func.overloadpacket.__name__
        rule = _rule_of(func)
        after = rule(self.trail, args, tensors, results) if rule is not None else None
        if after is None and rule is not None:
            after = owned.join(self.trail, rule, args, tensors, results)
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


def _rule_of(func: Any) -> Rule | None:
    rule = RULES.get(func.overloadpacket.__name__)
    return pointwise if rule is None and torch.Tag.pointwise in func.tags else rule


_OF_A_LINEAR = frozenset(
    ("t", "mm", "addmm", "bmm", "view", "_unsafe_view", "reshape", "transpose", "permute", "expand", "add", "linear")
)


def _rows(trail: Trail, linears: Mapping[str, nn.Module]) -> tuple[dict[str, set[str]], dict[str, str]]:
    """Row -> its columns, and why every other layer is no column. Again and again, as a column falls with any row."""
    lost = dict(trail.lost)
    while True:
        rows: dict[str, set[str]] = {}
        whole: dict[str, str] = {}  # columns of consumers that take them whole
        for consumer, sources in trail.feeds.items():
            if sources & rows.keys():
                whole |= dict.fromkeys(sources, f"it is cut by its input features, so {consumer} gets them whole")
            elif sources & lost.keys() or consumer in trail.tied or _sends_too_much(trail, consumer, linears[consumer]):
                whole |= dict.fromkeys(sources, f"{consumer}, which it feeds, cannot be cut")
            elif sources:
                rows[consumer] = set(sources)
        fallen = {source: why for source, why in whole.items() if source not in lost}
        if not fallen:
            return rows, lost
        lost |= fallen


def _pair(trail: Trail, linears: Mapping[str, nn.Module]) -> Discovery:
    """Columns and rows that serve each other, in order of execution: what is a row already cannot be a column."""
    rows, lost = _rows(trail, linears)
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
    cut_with = {candidate: frozenset(met) for candidate, met in trail.owned.items() if met <= sources}
    return Discovery(
        pairs=tuple(pairs),
        kept=kept,
        partial={
            name: frozenset(met)
            for name, met in trail.partial.items()
            if met & sources and not any(candidate.parameter == name for candidate in cut_with)
        },
        owned=cut_with,
        gathered={path: frozenset(met) for path, met in trail.gathered.items() if met & sources},
        seen=tuple(trail.seen),
    )


def _sends_too_much(trail: Trail, row: str, linear: nn.Module) -> bool:
    """Whether the sum after the row is larger than what its columns must gather already, as of a head's logits."""
    sources = trail.feeds[row]
    shape = linear_shape(linear)
    if shape is None or not any(met & sources for met in trail.gathered.values()):
        return False
    return shape.out_features > 2 * max(trail.width[source] for source in sources)


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
