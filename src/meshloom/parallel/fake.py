"""A model's forward on tensors without data: nothing is computed, but every op and shape is seen.

Fake tensors stand for those of any device and say where values are asked for. A model that is on meta already runs as
it is, which is faster, but for what only fake tensors can do: whoever gets an error there asks `fake_copy` for them.
"""

from __future__ import annotations

import copy
import logging
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from meshloom.parallel.answers import NEEDS_DATA, Answers, ByItem, CannotFollow, Tell, learn
from meshloom.parallel.gather import is_gathered
from meshloom.parallel.linear import Border, CutLinear
from meshloom.parallel.styles import linear_shape


class Seen(NamedTuple):
    """What a forward did outside its linear layers: an op, and the shape of one of its results.

    As an expectation, `shape` None stands for any, and what is `optional` may be missing.
    """

    op: str
    shape: tuple[int, ...] | None
    optional: bool = False


def run_fake(
    model: nn.Module,
    example: Mapping[str, Tensor],
    *modes: TorchDispatchMode,
    answers: Answers | None = None,
    told: Callable[[Tensor, Tensor], None] | None = None,
    result: Callable[[Any], None] | None = None,
    with_gradients: bool = False,
) -> None:
    """Run the forward on fake tensors, within `modes`; raises what the forward raises on wrong shapes.

    Where it asks for values, `answers` tells them; raises CannotFollow if they do not. `told` is called with each
    parameter and the fake tensor that stands for it, `result` with what the forward returns.
    """
    # in training, a forward on meta may end at once where one on fake tensors tells more
    plain = answers is None and (with_gradients or not model.training) and _is_plain(model, example)
    first = next(model.parameters())
    is_fake = isinstance(first, FakeTensor)
    mode = first.fake_mode if isinstance(first, FakeTensor) else FakeTensorMode(allow_non_fake_inputs=True)
    with ExitStack() as stack:
        stack.enter_context(torch.set_grad_enabled(with_gradients))
        stack.enter_context(_left_as_it_was(model))
        stack.enter_context(experts_of_known_shape(model))
        stack.enter_context(_conversions_in_place(model))
        if not plain:
            stack.enter_context(mode)
        if answers is not None:
            stack.enter_context(Tell(answers, sys._getframe(), first.device))
        if answers is not None or model.training:  # each mode costs time at every op
            stack.enter_context(ByItem())
        state: dict[str, Tensor] = {}
        if not is_fake and not plain:
            tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
            fakes = {id(tensor): mode.from_tensor(tensor) for tensor in tensors.values()}
            state = {name: fakes[id(tensor)] for name, tensor in tensors.items()}
        batch = dict(example) if plain else {name: _fake_of(value, mode) for name, value in example.items()}
        if told is not None:
            for name, parameter in model.named_parameters():
                told(parameter, state.get(name, parameter))
        for other in modes:
            stack.enter_context(other)
        try:
            returned = torch.func.functional_call(model, state, args=(), kwargs=batch) if state else model(**batch)
        except NEEDS_DATA as error:
            raise CannotFollow(f"its forward decides by the values of tensors ({error})".splitlines()[0]) from error
        if result is not None:
            result(returned)


def tensors_among(values: Iterable[Any]) -> list[Tensor]:
    """The tensors among an op's arguments or results, and in lists of them: ops nest no deeper, so this is all."""
    found: list[Tensor] = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, (list, tuple)):
            found += [item for item in value if isinstance(item, Tensor)]
    return found


def _fake_of(value: Tensor, mode: FakeTensorMode) -> Tensor:
    if not isinstance(value, FakeTensor):
        return mode.from_tensor(value)
    return value if value.fake_mode is mode else torch.empty(value.shape, dtype=value.dtype, device=value.device)


def _is_plain(model: nn.Module, example: Mapping[str, Tensor]) -> bool:
    """Whether all is on meta, and none of it fake."""
    held = (*model.parameters(), *model.buffers(), *example.values())
    return all(tensor.is_meta and not isinstance(tensor, FakeTensor) for tensor in held)


def dataless_copy(model: nn.Module) -> nn.Module:
    """A copy of the model that takes no memory and may be cut: on meta if the model is, else of fake tensors."""
    return _copy(model, nullcontext()) if _is_plain(model, {}) else fake_copy(model)


def fake_copy(model: nn.Module, mode: FakeTensorMode | None = None) -> nn.Module:
    """A copy of the model whose tensors are fake ones on the same devices, of `mode` if that is given."""
    first = next(model.parameters())
    if mode is None:
        mode = first.fake_mode if isinstance(first, FakeTensor) else FakeTensorMode(allow_non_fake_inputs=True)
    return _copy(model, mode)


def _copy(model: nn.Module, mode: AbstractContextManager[Any]) -> nn.Module:
    memo: dict[int, Any] = {}
    with _disable_current_modes():
        for module in model.modules():
            for value in (*module._parameters.values(), *module._buffers.values(), *vars(module).values()):
                if isinstance(value, dist.ProcessGroup):  # shared, not copied
                    memo[id(value)] = value
                elif isinstance(value, Tensor) and id(value) not in memo:
                    with mode:
                        fake = torch.empty(value.shape, dtype=value.dtype, device=value.device)
                    memo[id(value)] = (
                        nn.Parameter(fake, value.requires_grad) if isinstance(value, nn.Parameter) else fake
                    )
        return copy.deepcopy(model, memo)


def learn_answers(model: nn.Module, example: Mapping[str, Tensor]) -> Answers:
    """What a forward on real tensors asks of their values, on the roads that a fake one takes."""

    def run(real: nn.Module, batch: Mapping[str, Tensor]) -> None:
        with _left_as_it_was(real), _kept_weights(real), experts_of_known_shape(real):
            real.eval()(**batch)

    return learn(model, example, run)


@contextmanager
def _left_as_it_was(model: nn.Module) -> Iterator[None]:
    """After this, modules have the attributes that they had: a forward may keep there what it finds, as a capacity."""
    held = [
        attributes
        for module in model.modules()
        for attributes in (vars(module), module._parameters, module._buffers, module._modules)
    ]
    before: list[dict[str, Any]] = [dict(attributes) for attributes in held]
    try:
        yield
    finally:
        for attributes, kept in zip(held, before, strict=True):
            attributes.clear()
            attributes.update(kept)


@contextmanager
def _kept_weights(model: nn.Module) -> Iterator[None]:
    """After this, parameters are of the type that they had: a forward may convert its router for good."""
    before = [(parameter, parameter.data) for parameter in model.parameters()]
    try:
        yield
    finally:
        for parameter, data in before:
            if parameter.dtype != data.dtype:
                parameter.data = data


@contextmanager
def _conversions_in_place(model: nn.Module) -> Iterator[None]:
    """Within this, a forward's `module.to(...)` converts fake parameters, which nn.Module would have to swap."""

    def convert(module: nn.Module, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        for child in module.children() if recurse else ():
            convert(child, fn)
        holders: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
        for held in holders:
            for name, tensor in held.items():
                held[name] = tensor if tensor is None else fn(tensor)
        return module

    modules = [module for module in model.modules() if "_apply" not in vars(module)]
    for module in modules:
        vars(module)["_apply"] = partial(convert, module)
    try:
        yield
    finally:
        for module in modules:
            del vars(module)["_apply"]


@contextmanager
def experts_of_known_shape(model: nn.Module) -> Iterator[None]:
    """Within this, experts run as one batched product: on fake tensors nobody knows how many tokens each would get,
    and the grouped product takes no float32 there."""
    name = "_experts_implementation"
    configs = {id(config): config for module in model.modules() if (config := getattr(module, "config", None))}
    changed = [config for config in configs.values() if getattr(config, name, None) in ("grouped_mm", "eager")]
    before = [getattr(config, name) for config in changed]
    for config in changed:
        setattr(config, name, "batched_mm")
    try:
        yield
    finally:
        for config, value in zip(changed, before):
            setattr(config, name, value)


class _Watch(TorchDispatchMode):
    """Notes the shapes of all results outside linear layers."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.inside = 0
        self.seen: list[Seen] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if not self.inside and func.namespace != "prim":
            results = tensors_among((out,))
            self.seen += [Seen(func.overloadpacket.__name__, tuple(result.shape)) for result in results]
        return out

    def enter(self, *args: Any) -> None:
        """A hook: a linear layer begins."""
        self.inside += 1

    def leave(self, *args: Any) -> None:
        """A hook: it ends."""
        self.inside -= 1


@contextmanager
def _quiet() -> Iterator[None]:
    """Within this, torch does not print the stack of every op that wrong shapes make fail: that is what is tried."""
    log = logging.getLogger("torch._subclasses.fake_tensor")
    before, log.disabled = log.disabled, True
    try:
        yield
    finally:
        log.disabled = before


def trouble_of_part(
    model: nn.Module, example: Mapping[str, Tensor], expected: Sequence[Seen], answers: Answers | None = None
) -> str:
    """Where the forward of a cut model does something else than `expected`, in one line; empty if it does the same.

    That the forward runs is not enough: a view with -1 would make heads of another rank into tokens of this one.
    """
    watch = _Watch()
    handles = []
    for module in model.modules():
        if linear_shape(module) is not None or isinstance(module, (CutLinear, Border)) or is_gathered(module):
            handles += [module.register_forward_pre_hook(watch.enter), module.register_forward_hook(watch.leave)]
    was_training = model.training
    try:
        with _quiet():
            run_fake(model.eval(), example, watch, answers=answers)
    except Exception as error:  # whatever a forward of other people's raises on shapes that it does not expect
        return f"{type(error).__name__}: {error}".splitlines()[0]
    finally:
        model.train(was_training)
        for handle in handles:
            handle.remove()
    return _difference(watch.seen, expected)


def _difference(seen: Sequence[Seen], expected: Sequence[Seen]) -> str:
    """The first of `seen` that cannot be as expected, whichever optional ones are missing; empty if all is well."""
    places = _open_places({0}, expected)
    for got in seen:
        following = {
            place + 1
            for place in places
            if place < len(expected)
            and _plain(expected[place].op) == _plain(got.op)
            and expected[place].shape in (None, got.shape)
        }
        if not following:
            want = expected[max(places)] if max(places) < len(expected) else None
            told = f"expected {want.op} to give {want.shape}" if want else "expected nothing more"
            return f"{got.op} gives {got.shape}, {told}"
        places = _open_places(following, expected)
    return "" if len(expected) in places else f"it ends before {expected[min(places)].op}"


def _plain(op: str) -> str:
    """Views under one name: which of them a reshape becomes depends on whether the sizes are 1."""
    return "view" if op in ("_unsafe_view", "reshape", "_reshape_alias") else op


def _open_places(places: set[int], expected: Sequence[Seen]) -> set[int]:
    """The places, and those that are reached from them by leaving out what is optional."""
    reached = set(places)
    for place in places:
        while place < len(expected) and expected[place].optional:
            place += 1
            reached.add(place)
    return reached
