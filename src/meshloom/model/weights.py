"""This rank's part of a model, from its first moment: cut while it takes no memory, then given weights of its own."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from meshloom.model.build import build_model, example_batch
from meshloom.model.config import Objective
from meshloom.model.initial import CannotRecord, Recording, record, replay
from meshloom.parallel.apply import cut_model
from meshloom.parallel.mesh import Mesh
from meshloom.parallel.pipeline import Pipeline
from meshloom.parallel.placement import Placed, placed_parameters

Fill = Callable[[Mapping[str, Placed]], None]


def build_part(
    config: Any,
    objective: Objective,
    *,
    mesh: Mesh,
    seed: int,
    fill: Fill | None = None,
    styles: Mapping[str, str] | None = None,
    compiled: bool = False,
) -> nn.Module:
    """This rank's part of the model that `build_model` makes of the same seed, on the mesh's device.

    `fill` may give the parameters and saved buffers other values, such as those of a file; then none are drawn. A rank
    never holds more than its part and one tensor; only where an initialisation cannot be followed, which is warned of,
    it holds the whole model for a moment. `styles` is a plan written by hand, as `parallelize` takes it;
    `compiled` layers go through torch.compile. Every rank of the mesh must call this at the same point. Raises
    ModelError, PlanError.
    """
    model = build_model(config, objective, seed=seed, device="meta")
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    example = example_batch(objective, micro_batch=1, seq_length=8, device="meta")
    cut = cut_model(model, plan=mesh.plan, mesh=mesh, example=example, styles=styles, compiled=compiled)
    held = {
        name: placed.like(torch.empty(placed.tensor.shape, dtype=placed.tensor.dtype, device=mesh.device))
        for name, placed in placed_parameters(cut, mesh, shapes).items()
    }
    inner = inner_model(cut)
    try:
        fake, recording = record(lambda: build_model(config, objective, seed=seed))
        real = _replayed(inner, fake, recording, {} if fill else held, seed)
    except CannotRecord as reason:
        warnings.warn(
            f"{config.model_type}: each rank builds the whole model and takes its part of it, because its "
            f"initialisation cannot be followed: {reason}",
            stacklevel=2,
        )
        fake = build_model(config, objective, seed=seed)
        real = Tensor.detach
        for name, placed in held.items():
            placed.put(fake.get_parameter(name).detach().flatten(), 0)
    for module, attribute, tensor in _others(inner, fake):
        # None: what a forward keeps for the next one, and our own forwards while we cut left there
        value = None if tensor is None else real(tensor).to(mesh.device)
        if attribute in module._buffers:
            module._buffers[attribute] = value
        else:
            setattr(module, attribute, value)
    if fill is not None:
        saved = inner.state_dict(keep_vars=True)
        buffers = {name: Placed.whole(buffer) for name, buffer in inner.named_buffers() if name in saved}
        fill({**held, **buffers})
    for name, parameter in list(inner.named_parameters()):
        _give_memory(parameter, held[name].tensor)
    for module, attribute, hollow in _hollows(inner, fake):
        empty = torch.zeros((), dtype=hollow.dtype, device=mesh.device)
        module.__dict__[attribute] = empty.expand(hollow.shape)
    return cut


def inner_model(model: nn.Module) -> nn.Module:
    """The Hugging Face model within a pipeline; itself otherwise."""
    inner = model.model if isinstance(model, Pipeline) else model
    assert isinstance(inner, nn.Module)
    return inner


def _replayed(
    inner: nn.Module, fake: nn.Module, recording: Recording, held: Mapping[str, Placed], seed: int
) -> Callable[[Tensor], Tensor]:
    """Draw what is held; returns what gives the real tensor for a fake buffer."""
    parts: dict[int, list[Placed]] = {}
    for name, placed in held.items():
        view = recording.view(fake.get_parameter(name))
        if not view.is_whole:
            raise CannotRecord(f"{name} is a part of another tensor")
        parts.setdefault(view.storage, []).append(placed)
    others = [tensor for _, _, tensor in _others(inner, fake) if tensor is not None]
    return replay(recording, parts, others, seed=seed)


def _others(inner: nn.Module, whole: nn.Module) -> Iterator[tuple[nn.Module, str, Tensor | None]]:
    """The tensors of the cut model that are no parameters: (module, attribute, that of the whole model if any)."""
    theirs = dict(whole.named_modules(remove_duplicate=False))
    for path, module in inner.named_modules():
        for name, value in [*module._buffers.items(), *vars(module).items()]:
            if isinstance(value, Tensor) and path in theirs and name not in theirs[path]._parameters:
                yield module, name, getattr(theirs[path], name, None)


def _hollows(inner: nn.Module, whole: nn.Module) -> Iterator[tuple[nn.Module, str, Tensor]]:
    """What stands in the place of parameters that other ranks hold: (module, attribute, tensor)."""
    theirs = dict(whole.named_modules(remove_duplicate=False))
    for path, module in inner.named_modules():
        for name, value in list(vars(module).items()):
            if isinstance(value, Tensor) and path in theirs and name in theirs[path]._parameters:
                yield module, name, value


def _give_memory(parameter: nn.Parameter, memory: Tensor) -> None:
    """Turn a parameter without memory into one with, while it stays the same object with all that hangs on it."""
    attributes, hooks, needs_gradient = dict(vars(parameter)), parameter._backward_hooks, parameter.requires_grad
    torch.utils.swap_tensors(parameter, nn.Parameter(memory, requires_grad=needs_gradient))
    vars(parameter).update(attributes)
    parameter._backward_hooks = hooks  # set anew, for autograd knows hooks by the memory
