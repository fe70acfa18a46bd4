"""A small plan and model that show all that a large one does: its roles without its repetitions.

Middle ranks of a pipeline whose stages hold as many layers run the same thing, if all layers are alike, and so do all
ranks of a data-parallel group. So a pipeline of sixteen is captured as one of three, and sixty-four replicas as two.
That layers are alike is not assumed: their modules, shapes and settings are compared on the whole model without memory.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

from torch import nn

from meshloom.errors import PlanError
from meshloom.parallel.flow import find_layers
from meshloom.parallel.stages import Stages, stage_bounds
from meshloom.plan import Plan
from meshloom.synth.parts import Group, NotAlike


@dataclass(frozen=True, slots=True, kw_only=True)
class Reduced:
    """The plan that is captured in the place of `whole`, and which of its pipeline's places stands for each there."""

    whole: Plan
    plan: Plan
    stands_for: tuple[int, ...]  # place in the whole pipeline -> place in the captured one
    num_layers: tuple[int, ...] | None  # of each captured stage; None: the model is captured as it is
    bounds: tuple[int, ...] = ()  # where the whole pipeline's stages begin
    layers: str = ""  # what the paths of layers have before their numbers

    def module(self, path: str, chunk: int, place: int) -> str:
        """The path of a module in a captured stage as the ranks at `place` of the whole pipeline have it."""
        if self.num_layers is None or not self.layers or not path.startswith(self.layers):
            return path
        number, dot, rest = path.removeprefix(self.layers).partition(".")
        captured = sum(self.num_layers[: chunk * self.plan.pp + self.stands_for[place]])
        moved = int(number) - captured + self.bounds[chunk * self.whole.pp + place]
        return f"{self.layers}{moved}{dot}{rest}"

    def group(self, group: Group, place: int) -> Group:
        """A group of the captured ranks as the ranks at `place` of the whole pipeline have it; raises NotAlike."""
        size, all_of = self.plan.degrees[group.axis], self.whole.degrees[group.axis]
        if size == all_of:
            return group
        if group.places == tuple(range(size)):
            return Group(group.axis, tuple(range(all_of)))
        known = {0: 0, size - 1: all_of - 1, self.stands_for[place]: place}
        if group.axis != "pp" or not set(group.places) <= known.keys():
            raise NotAlike(f"a group of places {group.places} of {group.axis}{size} has no counterpart")
        return Group(group.axis, tuple(known[where] for where in group.places))


def same(plan: Plan) -> Reduced:
    """`plan` itself, captured as it is."""
    return Reduced(whole=plan, plan=plan, stands_for=tuple(range(plan.pp)), num_layers=None)


def few_replicas(plan: Plan) -> Plan:
    """`plan` with at most two data-parallel replicas, which show all that many do."""
    return replace(plan, dp=min(plan.dp, 2))


def unlike_layers(model: nn.Module, config: Any) -> str:
    """Why a model of fewer layers would not show what this one does, in one line; empty if it would."""
    layers = find_layers(model)
    if len(layers) != getattr(config, "num_hidden_layers", None):
        return "its layers are not those that its config counts"
    if len({path.rpartition(".")[0] for path in layers}) > 1:
        return "it has several lists of layers"
    for name, value in vars(config).items():
        if isinstance(value, (list, tuple)) and len(value) == len(layers) and any(item != value[0] for item in value):
            return f"its config's {name} differs from layer to layer"
    first = _settings(model.get_submodule(layers[0]), 0)
    for index, path in enumerate(layers):
        if _settings(model.get_submodule(path), index) != first:
            return f"{path} differs from {layers[0]}"
    return ""


def _settings(layer: nn.Module, index: int) -> list[Any]:
    """The modules of a layer with the shapes of their tensors and their plain settings, but for the layer's number."""
    return [
        (
            path,
            type(module),
            [(name, None if tensor is None else (tensor.shape, tensor.dtype))
             for name, tensor in (*module._parameters.items(), *module._buffers.items())],
            {name: value for name, value in vars(module).items()
             if isinstance(value, (bool, int, float, str, type(None)))
             and not (name.startswith("layer_i") and value == index)},
        )
        for path, module in layer.named_modules()
    ]  # fmt: skip


def with_layers(config: Any, num_layers: int) -> Any:
    """The config of the same model with so many layers."""
    smaller = copy.deepcopy(config)
    total = config.num_hidden_layers
    smaller.num_hidden_layers = num_layers
    for name, value in vars(config).items():
        if isinstance(value, (list, tuple)) and len(value) == total:
            setattr(smaller, name, list(value)[:num_layers])
    return smaller


def bounds_of(costs: Sequence[float], num_layers: int, plan: Plan) -> list[int]:
    """Where the stages of a model of `num_layers` begin and end, from the costs of a smaller one's layers."""
    if num_layers < plan.pp * plan.virtual_stages:
        raise PlanError(
            f"plan {plan}: expected at least {plan.pp * plan.virtual_stages} layers for as many stages, got "
            f"{num_layers}; use a smaller pp"
        )
    return stage_bounds(plan, [*([costs[0]] * (num_layers - 1)), costs[-1]])


def reduce_pipeline(plan: Plan, bounds: Sequence[int]) -> Reduced:
    """`plan` with a pipeline that has the first and last place and one of each kind between, of layers `bounds`."""
    sizes = [end - begin for begin, end in pairwise(bounds)]
    kinds = [tuple(sizes[place :: plan.pp]) for place in range(plan.pp)]
    middle = list(dict.fromkeys(kinds[1:-1]))
    places = 2 + len(middle)
    if places >= plan.pp:
        return same(plan)
    stands_for = (0, *(1 + middle.index(kind) for kind in kinds[1:-1]), places - 1)
    chosen = [stands_for.index(place) for place in range(places)]
    num_layers = [sizes[chunk * plan.pp + place] for chunk in range(plan.virtual_stages) for place in chosen]
    return Reduced(
        whole=plan,
        plan=replace(plan, pp=places, stage_layers=tuple(num_layers) if plan.stage_layers else ()),
        stands_for=stands_for,
        num_layers=tuple(num_layers),
        bounds=tuple(bounds),
    )


def stages_of(stages: Stages, num_layers: Sequence[int]) -> Stages:
    """The same flow, cut so that each stage has so many layers."""
    bounds = [0]
    for count in num_layers:
        bounds.append(bounds[-1] + count)
    return replace(stages, bounds=tuple(bounds))


def tensor_kinds(model: nn.Module, whole_shapes: Mapping[str, Sequence[int]], plan: Plan) -> tuple[int, ...]:
    """For each place on the tensor-parallel axis the first one whose parameters have the same shapes.

    `model` is cut for one of them, `whole_shapes` are those before.
    """
    from meshloom.parallel.shard import shard_of

    known: dict[tuple[tuple[int, ...], ...], int] = {}
    kinds = []
    cut = [(name, shard) for name, p in model.named_parameters() if (shard := shard_of(p)) is not None]
    for place in range(plan.tp):
        shapes = tuple(shard.shape(whole_shapes[name], place, plan.tp) for name, shard in cut)
        kinds.append(known.setdefault(shapes, place))
    return tuple(kinds)
