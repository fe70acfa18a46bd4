"""What a forward asks of its tensors' values: learnt from one run on real tensors, told again to runs on fake ones.

Some forwards decide by values: how many tokens an expert gets, whether a mask is full. Fake tensors have none. So the
forward runs once on real tensors, and the shapes and numbers that every op gave are noted by the place in the code
that called it; where a later run on fake tensors is stuck, it takes what the same place was given. What is found this
way holds for the values of the example; shapes that depend on other values may differ.
"""

from __future__ import annotations

import copy
import sys
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    UnsupportedFakeTensorException,
)
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

NEEDS_DATA = (DataDependentOutputException, DynamicOutputShapeException, UnsupportedFakeTensorException)
_NOT_THE_MODEL = tuple(str(Path(module).parent) for module in (torch.__file__, __file__))  # whose frames say nothing
_MOST_BYTES = 1 << 30  # of a model without data that is filled to be run

Site = tuple[Any, ...]  # an op, and where in the model's code it was called, outermost last


class CannotFollow(RuntimeError):
    """The forward cannot be run on fake tensors, for the reason that it says."""


class Like(NamedTuple):
    """A tensor's looks."""

    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True, slots=True)
class Answers:
    """What each op gave at each place of its calls, in their order: tensors as their looks, all else as it was."""

    given: Mapping[Site, tuple[Any, ...]]


class Tell(TorchDispatchMode):
    """Within this, an op that fake tensors cannot do gives what it gave on real ones at the same place.

    `frame` is the one that calls the forward. Raises CannotFollow where the place was not reached as often.
    """

    def __init__(self, answers: Answers, frame: FrameType, device: torch.device) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.answers, self.frame, self.device = answers, frame, device
        self.asked: Counter[Site] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        site = _site(func, self.frame)
        number = self.asked[site]
        self.asked[site] += 1
        try:
            return func(*args, **(kwargs or {}))
        except NEEDS_DATA as error:
            known = self.answers.given.get(site, ())
            if number >= len(known):
                raise CannotFollow(
                    f"its forward decides by the values of tensors ({str(error).splitlines()[0]}), and goes another "
                    "way than it did on real ones"
                ) from error
            return tree_map(self._made, known[number], is_leaf=lambda leaf: isinstance(leaf, Like))

    def _made(self, leaf: Any) -> Any:
        return torch.empty(leaf.shape, dtype=leaf.dtype, device=self.device) if isinstance(leaf, Like) else leaf


class _Listen(TorchDispatchMode):
    """Notes what every op gives."""

    def __init__(self, frame: FrameType) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.frame = frame
        self.given: dict[Site, list[Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.given.setdefault(_site(func, self.frame), []).append(tree_map(_looks, out))
        return out


class ByItem(TorchFunctionMode):
    """Within this, numbers leave tensors through an op, one by one, also where they are made into lists or text.

    A single random number is no chance.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.tolist:
            return _listed(args[0])
        if func is torch.rand and args in (([],), ((),), (1,), ([1],), ((1,),)):  # which decides if a layer is dropped
            return torch.full([1] if args[0] else [], 0.5)
        if func is Tensor.__format__ and args[0].dim() == 0:
            return format(args[0].item(), *args[1:])
        return func(*args, **(kwargs or {}))


def learn(
    model: nn.Module, example: Mapping[str, Tensor], run: Callable[[nn.Module, Mapping[str, Tensor]], Any]
) -> Answers:
    """The answers of one forward of `model` on `example`, by `run`, which calls it; the model is unchanged.

    A model without data is copied and filled with noise if it is small. Raises CannotFollow if it is not.
    """
    device = next(model.parameters()).device
    if any(_is_empty(tensor) for tensor in (*model.parameters(), *model.buffers(), *example.values())):
        model, device = _filled(model), torch.device("cpu")
        example = {name: torch.zeros(x.shape, dtype=x.dtype) if _is_empty(x) else x for name, x in example.items()}
    batch = {name: value.detach().clone() for name, value in example.items()}  # some models change their batch
    listen = _Listen(sys._getframe())
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), torch.no_grad(), ByItem(), listen:
        run(model, batch)
    return Answers({site: tuple(given) for site, given in listen.given.items()})


def _site(func: Any, last: FrameType) -> Site:
    """The op and the lines of the model's code that led to it."""
    lines: list[Any] = [func.overloadpacket.__name__]
    frame: FrameType | None = sys._getframe(2)
    while frame is not None and frame is not last:
        if not frame.f_code.co_filename.startswith(_NOT_THE_MODEL):
            lines.append((frame.f_code.co_filename, frame.f_lineno))
        frame = frame.f_back
    return tuple(lines)


def _looks(leaf: Any) -> Any:
    return Like(tuple(leaf.shape), leaf.dtype) if isinstance(leaf, Tensor) else leaf


def _listed(x: Tensor) -> Any:
    return x.item() if x.dim() == 0 else [_listed(row) for row in x]


def _is_empty(tensor: Tensor) -> bool:
    return tensor.is_meta or isinstance(tensor, FakeTensor)


def _filled(model: nn.Module) -> nn.Module:
    size = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    if size > _MOST_BYTES:
        raise CannotFollow(
            f"its forward decides by the values of tensors, and a model without data of {size / 2**30:.1f} GiB is not "
            "filled to see how (1 GiB is the most); load its weights first"
        )
    generator = torch.Generator().manual_seed(0)
    memo: dict[int, Any] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        real = torch.zeros(tensor.shape, dtype=tensor.dtype)
        if real.is_floating_point():
            real.normal_(std=0.02, generator=generator)
        memo[id(tensor)] = nn.Parameter(real) if isinstance(tensor, nn.Parameter) else real
    return copy.deepcopy(model, memo)
