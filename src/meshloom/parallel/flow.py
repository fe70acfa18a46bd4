"""What flows between a model's layers: found from its own forward on fake tensors, for any boundary between stages.

The layers are the calls of entries of the outermost module lists, in the order in which the forward makes them; a
model whose layers share their parameters calls one entry several times. Every tensor
carries what it was made of without passing through a layer: outputs of layers, and parameters that stand outside of
layers. So it is known which outputs a later part of the model needs, and which parameters each part of it uses, be it
the embedding that the head shares or an encoder's last norm. Tensors are told apart by their storage, so views and
in-place writes need no special case. Knows nothing of ranks.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from types import FrameType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import TreeSpec, tree_flatten, tree_leaves

from meshloom.errors import PlanError
from meshloom.parallel.answers import Answers
from meshloom.parallel.fake import run_fake


class Output(NamedTuple):
    """Leaf number `leaf` of what layer number `layer` returns, and of what it puts into dicts that it is given."""

    layer: int
    leaf: int


class Place(NamedTuple):
    """An entry of a dict among a layer's arguments, as of keys and values that several layers share."""

    argument: int | str
    key: Any


def held(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Iterator[tuple[Place, Any]]:
    """What the dicts among the arguments hold."""
    arguments: list[tuple[int | str, Any]] = [*enumerate(args), *kwargs.items()]
    for argument, value in arguments:
        if isinstance(value, MutableMapping):
            for key, item in value.items():
                yield Place(argument, key), item


@dataclass(frozen=True, slots=True, kw_only=True)
class Flow:
    """What each part of the model needs. Part i is layer i with what leads to it; the last part is what follows the
    last layer."""

    layers: tuple[str, ...]  # paths, in the order of their calls
    needs: tuple[frozenset[Output], ...]  # part -> outputs of earlier layers
    parameters: tuple[frozenset[str], ...]  # part -> parameters outside of layers, by their first names
    shapes: Mapping[Output, tuple[tuple[int, ...], torch.dtype]]
    returns: tuple[TreeSpec, ...]  # layer -> how (what it returns, what it puts into dicts) is built from leaves
    puts: tuple[tuple[Place, ...], ...]  # layer -> where in its arguments' dicts it puts something
    written: frozenset[Output]  # those that are changed in place
    unreached: tuple[str, ...] = ()  # entries of lists of layers that are not called
    looked_up: tuple[frozenset[str], ...] = ()  # part -> those of `parameters` of which rows were looked up

    def crossing(self, boundary: int) -> list[Output]:
        """The outputs that cross the boundary before layer `boundary`, in order."""
        needed = frozenset().union(*self.needs[boundary:])
        return sorted(output for output in needed if output.layer < boundary)


def find_layers(model: nn.Module) -> list[str]:
    """Paths of the entries of the outermost module lists that hold parameters; which are called is not known yet."""
    found: list[str] = []
    for path, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or any(path.startswith(f"{other}.") for other in found):
            continue
        if len(module) and all(next(entry.parameters(), None) is not None for entry in module):
            found += [f"{path}.{index}" for index in range(len(module))]
    return found


def find_embeddings(model: nn.Module) -> list[tuple[Any, str]]:
    """All embeddings, and the first names of their rows."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    embeddings = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    return [(module, names[id(module.weight)]) for module in embeddings if id(module.weight) in names]


def trace_flow(
    model: nn.Module, example: Mapping[str, Tensor], answers: Answers | None = None, *, training: bool = False
) -> Flow:
    """The flow of a forward of `model` on `example` (only shapes and dtypes count); raises PlanError if there is none.

    A list whose entries are not called once each, one after another, is no list of layers.
    """
    was_training = model.training
    try:
        return _Tracer(model.train(training)).run(example, answers)
    finally:
        model.train(was_training)


@contextmanager
def _watched(
    model: nn.Module, paths: Sequence[str], before: Callable[..., Any], after: Callable[..., None]
) -> Iterator[None]:
    """Within this, `before(path, args, kwargs)` runs before each forward of these modules, and `after` with what it
    gave and the output: hooks would not see who calls `forward` itself."""

    def around(path: str, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        known = before(path, args, kwargs)
        output = forward(*args, **kwargs)
        after(path, args, kwargs, known, output)
        return output

    plain: list[tuple[dict[str, Any], Any]] = []
    for path in dict.fromkeys(paths):
        module = model.get_submodule(path)
        plain.append((vars(module), vars(module).get("forward")))
        vars(module)["forward"] = partial(around, path, module.forward)
    try:
        yield
    finally:
        for attributes, forward in plain:
            del attributes["forward"]
            if forward is not None:
                attributes["forward"] = forward


def _within_function() -> bool:
    """Whether the forward of a torch.autograd.Function is running."""
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        if frame.f_code is torch.autograd.Function.apply.__func__.__code__:  # type: ignore[attr-defined]
            return True
        frame = frame.f_back
    return False


@dataclass(slots=True)
class _Made:
    """What a tensor was made of."""

    outputs: frozenset[Output] = frozenset()
    parameters: frozenset[str] = frozenset()
    inside: frozenset[int] = frozenset()  # layers of which it is neither output nor input, but something between
    looked_up: frozenset[str] = frozenset()  # parameters of which rows were looked up for it

    def __or__(self, other: _Made) -> _Made:
        return _Made(
            self.outputs | other.outputs,
            self.parameters | other.parameters,
            self.inside | other.inside,
            self.looked_up | other.looked_up,
        )


@dataclass(slots=True)
class _Part:
    """What has been consumed by a part of the model."""

    outputs: set[Output] = field(default_factory=set)
    parameters: set[str] = field(default_factory=set)
    looked_up: set[str] = field(default_factory=set)


class _Tracer(TorchDispatchMode):
    """Follows one forward."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.model = model
        self.names = {id(parameter): name for name, parameter in model.named_parameters()}
        self.candidates = find_layers(model)
        self.parameters_of = {
            path: frozenset(self.names[id(parameter)] for parameter in model.get_submodule(path).parameters())
            for path in self.candidates
        }
        self.layers: list[str] = []  # in the order of their calls, so far
        self.made: dict[int, _Made] = {}  # storage -> what it was made of
        self.alive: list[Any] = []  # storages, so that none is used again for another tensor
        self.parts: list[_Part] = []
        self.shapes: dict[Output, tuple[tuple[int, ...], torch.dtype]] = {}
        self.returns: dict[int, TreeSpec] = {}
        self.puts: dict[int, tuple[Place, ...]] = {}
        self.own: frozenset[str] = frozenset()  # parameters of the layer that is running
        self.written: set[Output] = set()
        self.current: int | None = None  # the layer that is running
        self.depth = 0  # calls of layers within one another that run now

    def run(self, example: Mapping[str, Tensor], answers: Answers | None) -> Flow:
        """The flow of a forward on `example`."""
        with _watched(self.model, self.candidates, self._enter, self._leave):
            run_fake(self.model, example, self, answers=answers, told=self._told, result=self._end)
        if len(self.layers) < 2:
            raise PlanError(
                "pipeline parallel: expected a list of layers that run one after another, found none; use pp1"
            )
        return Flow(
            layers=tuple(self.layers),
            needs=tuple(frozenset(part.outputs) for part in self.parts),
            parameters=tuple(frozenset(part.parameters) for part in self.parts),
            shapes=self.shapes,
            returns=tuple(self.returns[index] for index in range(len(self.layers))),
            puts=tuple(self.puts[index] for index in range(len(self.layers))),
            written=frozenset(self.written),
            unreached=tuple(path for path in self.candidates if path not in self.layers),
            looked_up=tuple(frozenset(part.looked_up) for part in self.parts),
        )

    def _told(self, parameter: Tensor, fake: Tensor) -> None:
        self._mark(fake, _Made(parameters=frozenset((self.names[id(parameter)],))))

    def _mark(self, tensor: Tensor, made: _Made) -> None:
        storage = tensor.untyped_storage()
        self.alive.append(storage)
        self.made[storage._cdata] = made

    def _of(self, tensors: Sequence[Any]) -> _Made:
        made = _Made()
        for tensor in tensors:
            if isinstance(tensor, Tensor):
                known = self.made.get(tensor.untyped_storage()._cdata)
                made = made | known if known is not None else made
        return made

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.namespace == "prim":
            return out
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        made, is_write = self._of(tensors), func._schema.is_mutable
        if func is torch.ops.aten.embedding.default:
            made |= _Made(looked_up=self._of(args[:1]).parameters)
        if is_write:
            self.written |= self._of(args[:1]).outputs
        if self.current is not None:
            self._consume(self.current, made)
            made = _Made(inside=frozenset((self.current,)))
        given = {tensor.untyped_storage()._cdata for tensor in tensors}
        for result in tree_leaves(out):
            if not isinstance(result, Tensor):
                continue
            storage = result.untyped_storage()._cdata
            if self.current is None or storage not in given or is_write:  # in a layer, a view of what came into it
                self._mark(result, made | self._of([result]))  # is still what it was
        return out

    def _consume(self, part: int, made: _Made) -> None:
        strangers = made.inside - {part}
        if strangers:
            raise PlanError(
                f"pipeline parallel: {self._name(part)} uses what {self._name(min(strangers))} computes inside, "
                "not what it returns; use pp1"
            )
        self.parts[part].outputs |= made.outputs
        self.parts[part].parameters |= made.parameters - self.own
        self.parts[part].looked_up |= made.looked_up

    def _name(self, part: int) -> str:
        return self.layers[part] if part < len(self.layers) else "the part after the last layer"

    def _enter(self, path: str, args: Any, kwargs: Any) -> dict[Place, Any]:
        if _within_function():  # as of reversible layers, which compute their inputs again from their outputs
            raise PlanError(
                f"pipeline parallel: expected layers whose backward autograd runs, but {path} runs within a "
                "backward of the model's own; use pp1"
            )
        self.depth += 1
        if self.depth == 1:
            self.current = len(self.layers)
            self.layers.append(path)
            self.parts.append(_Part())
            self.own = self.parameters_of[path]
        return dict(held(args, kwargs))

    def _leave(self, path: str, args: Any, kwargs: Any, before: dict[Place, Any], output: Any) -> None:
        self.depth -= 1
        if self.depth:
            return
        index, self.current, self.own = len(self.layers) - 1, None, frozenset()
        puts = {place: value for place, value in held(args, kwargs) if before.get(place) is not value}
        self.puts[index] = tuple(puts)
        leaves, self.returns[index] = tree_flatten((output, list(puts.values())))
        for leaf, value in enumerate(leaves):
            if not isinstance(value, Tensor):
                continue
            known = self.made.get(value.untyped_storage()._cdata, _Made())
            if known.inside == frozenset((index,)) or index not in known.inside:
                self._mark(value, _Made(outputs=frozenset((Output(index, leaf),))))
                self.shapes[Output(index, leaf)] = (tuple(value.shape), value.dtype)

    def _end(self, result: Any) -> None:
        self.parts.append(_Part())
        loss = getattr(result, "loss", None)
        outputs = tree_leaves(dict(result) if isinstance(result, Mapping) else result)
        self._consume(len(self.layers), self._of(outputs if loss is None else [loss]))
