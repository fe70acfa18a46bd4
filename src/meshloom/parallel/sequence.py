"""Sequence parallel: between the cut regions each rank holds its part of the sequence, not a copy of all of it.

Korthikanti et al. 2022, section 4.2.2: into a region the parts are gathered, out of it the sums are scattered, which
moves as many bytes as the all-reduce did; norms, dropout and residuals then cost each rank only its tokens. Where the
parts are gathered is found from the model's own forward on fake tensors, and that nothing between the regions brings
tokens together is followed op by op; what cannot be followed is refused.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from meshloom.errors import PlanError
from meshloom.parallel.discover import Follow, depart
from meshloom.parallel.fake import run_fake
from meshloom.parallel.flow import trace_flow
from meshloom.parallel.outside import Outside
from meshloom.parallel.pairs import Pair
from meshloom.parallel.styles import linear_shape
from meshloom.parallel.trail import SEQUENCE, Cut, Trail, Whole

Key = int | str  # which argument: by place or by name


@dataclass(frozen=True, slots=True, kw_only=True)
class SequenceCut:
    """Where a model's sequence is cut, gathered and scattered; every path is that of a module."""

    # first and last layer of each list -> which outputs of the last are gathered; before the first, it is scattered
    borders: Mapping[tuple[str, str], tuple[int, ...]]
    owners: Mapping[str, tuple[Key, ...]]  # arguments that are gathered when the module is called
    columns: Mapping[str, Literal["itself", "owner", "nobody"]]  # who gathers the column's input
    rows: tuple[str, ...]  # whose sums are scattered
    partial: tuple[str, ...]  # whole parameters that meet a part of the tokens: their gradients must be summed
    seen: tuple[tuple[str, tuple[int, ...] | None, Cut | None, str], ...]


def sequence_example(example: Mapping[str, Tensor], degree: int) -> dict[str, Tensor]:
    """A batch like `example`, (1, S) each, of a length that `degree` divides."""
    return {name: value[:, :1].expand(1, 4 * degree) if value.dim() == 2 else value for name, value in example.items()}


def cut_sequence(model: nn.Module, example: Mapping[str, Tensor], pairs: Sequence[Pair]) -> SequenceCut:
    """How the sequence of a model, still whole, can be cut beside `pairs`; raises PlanError with what forbids it."""
    try:
        flow = trace_flow(model, example)
    except PlanError as error:
        raise PlanError(
            f"sequence parallel: {str(error).partition(': ')[2].partition(';')[0]}; leave out sp"
        ) from error
    lists: dict[str, list[str]] = {}
    for path in flow.layers:
        lists.setdefault(path.rpartition(".")[0], []).append(path)
    borders = tuple((paths[0], paths[-1]) for paths in lists.values())
    length = next(value.size(1) for value in example.values() if value.dim() == 2)
    walk = _Walk(model, pairs, borders, length)
    walk.find_owners(example)
    return walk.run(example)


@dataclass(slots=True)
class _Call:
    """A module that is running: its tensor arguments."""

    path: str
    arguments: dict[Key, Tensor]


@dataclass(slots=True)
class _Walk:
    """Two forwards: which arguments of which modules the columns get, and what becomes of the cut sequence."""

    model: nn.Module
    pairs: Sequence[Pair]
    borders: tuple[tuple[str, str], ...]
    length: int
    trail: Trail = field(default_factory=Trail)
    owners: dict[str, set[Key]] = field(default_factory=dict)
    gathered: dict[str, list[Key]] = field(default_factory=dict)
    columns: dict[str, Any] = field(default_factory=dict)
    outputs: dict[tuple[str, str], tuple[int, ...]] = field(default_factory=dict)
    rows: list[str] = field(default_factory=list)

    def find_owners(self, example: Mapping[str, Tensor]) -> None:
        """A column's owner is the innermost module around its pair's columns, if the column gets what that is given."""
        calls: list[_Call] = []
        handles = []
        for pair in self.pairs:
            parent = _common_parent(list(pair.columns))
            owner = self.model.get_submodule(parent)
            if not parent:
                continue

            def enter(module: nn.Module, args: Any, kwargs: Any, parent: str = parent) -> None:
                calls.append(_Call(parent, tensor_arguments(args, kwargs)))

            handles.append(owner.register_forward_pre_hook(enter, with_kwargs=True))
            for path in pair.columns:

                def arrive(module: nn.Module, args: Any, parent: str = parent) -> None:
                    if calls and calls[-1].path == parent:
                        keys = {key for key, value in calls[-1].arguments.items() if value is args[0]}
                        self.owners.setdefault(parent, set()).update(keys)

                handles.append(self.model.get_submodule(path).register_forward_pre_hook(arrive))
        try:
            run_fake(self.model, example)
        finally:
            for handle in handles:
                handle.remove()

    def run(self, example: Mapping[str, Tensor]) -> SequenceCut:
        """Follow the cut sequence; raises PlanError where it is lost."""
        trail = self.trail
        trail.num_units[SEQUENCE] = trail.own_units[SEQUENCE] = trail.width[SEQUENCE] = self.length
        names = {id(parameter): name for name, parameter in self.model.named_parameters()}
        handles = self._hook()
        was_training = self.model.training
        try:
            self.model.eval()
            mode = Follow(trail, Outside((), {}))
            run_fake(self.model, example, mode, told=lambda real, fake: trail.told(names[id(real)], fake))
        finally:
            self.model.train(was_training)
            for handle in handles:
                handle.remove()
        if trail.lost:
            raise PlanError(f"sequence parallel: {next(iter(trail.lost.values()))}; leave out sp")
        partial = {name for name, met in trail.partial.items() if SEQUENCE in met}
        return SequenceCut(
            borders=self.outputs,
            owners={path: tuple(keys) for path, keys in self.gathered.items()},
            columns=self.columns,
            rows=tuple(self.rows),
            partial=tuple(name for name in names.values() if name in partial),
            seen=tuple(trail.seen),
        )

    def _hook(self) -> list[Any]:
        handles: list[Any] = []
        rows = {row: pair for pair in self.pairs for row in pair.rows}
        columns = {path for pair in self.pairs for path in pair.columns}
        for path, keys in self.owners.items():
            owner = self.model.get_submodule(path)
            handles.append(owner.register_forward_pre_hook(self._enter_owner(path, keys), with_kwargs=True))
        for path, module in self.model.named_modules():
            if linear_shape(module) is None:
                continue
            if path in columns:
                handles.append(module.register_forward_pre_hook(self._enter_column(path)))
                handles.append(module.register_forward_hook(depart(self.trail, path)))
            else:
                handles.append(module.register_forward_pre_hook(self._enter_other(path)))
                leave = self._leave_row(path, rows[path]) if path in rows else self._leave_whole(path)
                handles.append(module.register_forward_hook(leave))
        for first, last in self.borders:
            begin = self.model.get_submodule(first)
            handles.append(begin.register_forward_pre_hook(self._scatter(first), with_kwargs=True, prepend=True))
            handles.append(self.model.get_submodule(last).register_forward_hook(self._gather((first, last))))
        return handles

    def _is_cut(self, x: Any) -> bool:
        cut = self.trail.cuts.get(x) if isinstance(x, Tensor) else None
        return cut is not None and SEQUENCE in cut.sources

    def _alias(self, x: Tensor) -> Tensor:
        """x again, as what a border makes of it: no op of the model."""
        self.trail.inside.append("")
        alias = x.view(x.shape)
        self.trail.inside.pop()
        self.trail.made_of[alias] = Whole(frozenset(), True)
        return alias

    def _whole(self, x: Tensor, where: str, *, flat: bool) -> Tensor:
        """x gathered."""
        if self.trail.cuts[x].dim != x.dim() - 2 or (x.dim() < 3 and not flat):
            self.trail.lose((SEQUENCE,), f"{where} gets its tokens in another dim than the last but one")
        return self._alias(x)

    def _enter_owner(self, path: str, keys: set[Key]) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> Any:
            given = tensor_arguments(args, kwargs)
            cut = [key for key in given if key in keys and self._is_cut(given[key])]
            if not cut:
                return None
            self.gathered[path] = cut
            whole = {id(given[key]): self._whole(given[key], path, flat=False) for key in cut}
            for x in whole.values():
                self.trail.entered[x] = path
            return with_arguments(args, kwargs, {key: whole[id(given[key])] for key in cut})

        return hook

    def _enter_column(self, path: str) -> Any:
        pair = next(pair for pair in self.pairs if path in pair.columns)

        def hook(module: nn.Module, args: Any) -> Any:
            x = args[0]
            self.columns[path] = "itself" if self._is_cut(x) else "owner" if x in self.trail.entered else "nobody"
            self.trail.feeds.setdefault(path, set())
            if self.columns[path] == "itself":
                # features are computed token by token, so there the order of the tokens is no matter
                args = (self._whole(x, path, flat=pair.num_units == pair.width), *args[1:])
            self.trail.inside.append(path)
            return args

        return hook

    def _enter_other(self, path: str) -> Any:
        def hook(module: nn.Module, args: Any) -> None:
            if args[0] in self.trail.entered:
                self.trail.lose((SEQUENCE,), f"{path} uses what is gathered for {self.trail.entered[args[0]]}")
            self.trail.inside.append(path)

        return hook

    def _leave_row(self, path: str, pair: Pair) -> Any:
        def hook(module: nn.Module, args: Any, output: Tensor) -> None:
            self.trail.inside.pop()
            if any(self.columns.get(column) in ("itself", "owner") for column in pair.columns):
                self._mark(output, path)
                self.rows.append(path)
                if getattr(module, "bias", None) is not None:
                    self.trail.partial.setdefault(f"{path}.bias", set()).add(SEQUENCE)
            else:
                self.trail.made_of[output] = Whole(frozenset(), True)

        return hook

    def _leave_whole(self, path: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Tensor) -> None:
            self.trail.inside.pop()
            self.trail.made_of[output] = Whole(frozenset(), True)
            if self._is_cut(args[0]):
                self._mark(output, path)
                for name, _ in module.named_parameters():
                    self.trail.partial.setdefault(f"{path}.{name}", set()).add(SEQUENCE)

        return hook

    def _mark(self, x: Tensor, where: str) -> None:
        if x.dim() < 2 or x.size(-2) != self.length:
            self.trail.lose((SEQUENCE,), f"{where} does not give one row a token")
            return
        self.trail.cuts[x] = Cut(frozenset((SEQUENCE,)), x.dim() - 2, self.length)

    def _scatter(self, path: str) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> Any:
            key = hidden_argument(args, kwargs, self.length)
            if key is None:
                self.trail.lose((SEQUENCE,), f"{path} is given no (B, S, H)")
                return None
            x = self._alias(tensor_arguments(args, kwargs)[key])
            self._mark(x, path)
            return with_arguments(args, kwargs, {key: x})

        return hook

    def _gather(self, border: tuple[str, str]) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> Any:
            leaves, spec = tree_flatten(output)
            cut = tuple(place for place, x in enumerate(leaves) if self._is_cut(x))
            if not cut:
                self.trail.lose((SEQUENCE,), f"what {border[1]} returns is not cut")
            self.outputs[border] = cut
            whole = [self._whole(x, border[1], flat=False) if place in cut else x for place, x in enumerate(leaves)]
            return tree_unflatten(whole, spec)

        return hook


def hidden_argument(args: Any, kwargs: Any, length: int | None = None) -> Key | None:
    """The first argument that is (B, S, H) in floating point."""
    for key, value in tensor_arguments(args, kwargs).items():
        if value.is_floating_point() and value.dim() == 3 and length in (None, value.size(1)):
            return key
    return None


def tensor_arguments(args: Any, kwargs: Any) -> dict[Key, Tensor]:
    """The arguments that are tensors, by place or name."""
    return {key: value for key, value in (*enumerate(args), *kwargs.items()) if isinstance(value, Tensor)}


def with_arguments(args: Any, kwargs: Any, changed: Mapping[Key, Tensor]) -> tuple[Any, Any]:
    """The arguments again, some of them changed."""
    return (
        tuple(changed.get(place, value) for place, value in enumerate(args)),
        {name: changed.get(name, value) for name, value in kwargs.items()},
    )


def _common_parent(paths: Sequence[str]) -> str:
    parents = [path.split(".")[:-1] for path in paths]
    depth = 0
    while all(len(parent) > depth and parent[depth] == parents[0][depth] for parent in parents):
        depth += 1
    return ".".join(parents[0][:depth])
