"""Random initial weights of this rank's part, equal to the bit to those of the whole model of the same seed.

The model's own initialisation runs once on fake tensors, and every op that it does is noted. Then the ops are done on
real memory in their order, with one generator: what fills a parameter is drawn in pieces, of which the rank keeps its
part and throws the rest away. Tensors that are computed otherwise (buffers, or weights made from other tensors) are
computed whole. So a rank holds its share and a few MB.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from transformers import initialization

from meshloom.parallel.placement import Placed

# torch draws normal numbers 16 at a time, and the last 16 of a tensor anew, so pieces must be multiples of that.
_LANES = 16
_PIECE = 1 << 20  # elements drawn at a time
_MAKES = {"zeros": 0.0, "ones": 1.0, "full": None, "empty": None}  # factories, and what their tensors are filled with
_FILLS = {"normal_", "uniform_", "zero_", "fill_"}
_SCALES = {"mul_", "add_", "sub_", "div_", "clamp_", "erfinv_", "neg_", "abs_"}  # element by element, exact or tested


class CannotRecord(RuntimeError):
    """The initialisation cannot be followed on fake tensors, for the reason that it says."""


@dataclass(frozen=True, slots=True)
class _View:
    """Which elements of which storage a tensor is."""

    storage: int
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    dtype: torch.dtype
    num_stored: int  # elements of the storage

    @property
    def is_contiguous(self) -> bool:
        """Whether its elements follow one another."""
        strides = [prod(self.size[place + 1 :]) for place in range(len(self.size))]
        return all(size == 1 or a == b for size, a, b in zip(self.size, self.stride, strides))

    @property
    def is_whole(self) -> bool:
        """Whether it is all of its storage, in order."""
        return self.is_contiguous and self.offset == 0 and prod(self.size) == self.num_stored


@dataclass(frozen=True, slots=True, kw_only=True)
class _Op:
    """One op of the initialisation: tensors among its arguments stand as views."""

    call: Callable[..., Any]
    name: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    results: Any
    writes: tuple[_View, ...]
    draws: bool

    @property
    def reads(self) -> list[_View]:
        """The tensors that it is given, those that it writes too."""
        return [leaf for leaf in tree_leaves((self.args, self.kwargs)) if isinstance(leaf, _View)]

    @property
    def made(self) -> list[_View]:
        """The tensors that it returns."""
        return [leaf for leaf in tree_leaves(self.results) if isinstance(leaf, _View)]

    @property
    def is_view(self) -> bool:
        """Whether it only looks at storages that were there before."""
        return not self.writes and not {v.storage for v in self.made} - {v.storage for v in self.reads}

    @property
    def is_plain(self) -> bool:
        """Whether it can be done on any part of a tensor by itself."""
        if not self.reads:
            return self.name in _MAKES and all(view.is_whole for view in self.made)
        if len(self.reads) > 1 or not self.writes or any(isinstance(leaf, Tensor) for leaf in tree_leaves(self.args)):
            return False
        (view,) = self.writes
        return (self.name in _FILLS and view.is_contiguous) or (self.name in _SCALES and view.is_whole)

    @property
    def overwrites(self) -> list[_View]:
        """What has no trace of its past after this plain op."""
        return self.made if self.name in _MAKES else [v for v in self.writes if v.is_whole and self.name in _FILLS]


@dataclass(slots=True, kw_only=True)
class Recording:
    """The ops of an initialisation, and the storages of the tensors of the model that it made."""

    ops: list[_Op] = field(default_factory=list)
    storages: dict[int, Any] = field(default_factory=dict)  # kept, so that no other takes its address

    def view(self, tensor: Tensor) -> _View:
        """The tensor as it is now; its data may later be set to another storage."""
        storage = tensor.untyped_storage()
        self.storages[storage._cdata] = storage
        size, stride = tuple(int(n) for n in tensor.shape), tuple(int(n) for n in tensor.stride())
        stored = storage.nbytes() // tensor.element_size()
        return _View(storage._cdata, size, stride, int(tensor.storage_offset()), tensor.dtype, stored)

    def note(self, call: Callable[..., Any], name: str, args: Any, kwargs: Any, **facts: Any) -> None:
        """Add an op."""
        self.ops.append(_Op(call=call, name=name, args=args, kwargs=kwargs, **facts))

    def views(self, tree: Any) -> Any:
        """The tree with views in the place of fake tensors."""
        return tree_map_only(FakeTensor, self.view, tree)


class _Recorder(TorchDispatchMode):
    def __init__(self, recording: Recording) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.recording = recording

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        seen, named = self.recording.views(args), self.recording.views(kwargs)
        out = func(*args, **kwargs)
        if func.namespace != "prim":
            given = [*zip(func._schema.arguments, seen), *((a, named.get(a.name)) for a in func._schema.arguments)]
            writes = [value for argument, value in given if argument.alias_info and argument.alias_info.is_write]
            self.recording.note(
                func,
                func.overloadpacket.__name__,
                seen,
                named,
                results=self.recording.views(out),
                writes=tuple(view for view in writes if isinstance(view, _View)),
                draws=torch.Tag.nondeterministic_seeded in func.tags,
            )
        return out


@contextmanager
def _drawn_until_right(recording: Recording) -> Iterator[None]:
    """Within this, truncated normals are noted as one op: torch draws again until all are within bounds, which cannot
    be seen on fake tensors."""
    functions: dict[str, Any] = initialization.TORCH_INIT_FUNCTIONS
    original = functions["trunc_normal_"]

    def note(tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        view = recording.view(tensor)
        recording.note(
            original, "trunc_normal_", (view, *args), kwargs, results=None, writes=(view,), draws=True
        )  # fmt: skip
        return tensor

    functions["trunc_normal_"] = note
    try:
        yield
    finally:
        functions["trunc_normal_"] = original


def record(build: Callable[[], nn.Module]) -> tuple[nn.Module, Recording]:
    """The model that `build` makes, on fake tensors, and how it was initialised; raises CannotRecord."""
    recording = Recording()
    try:
        with FakeTensorMode(allow_non_fake_inputs=True), _drawn_until_right(recording), _Recorder(recording):
            model = build()
    except RuntimeError as error:
        raise CannotRecord(str(error).splitlines()[0] if str(error) else type(error).__name__) from error
    return model, recording


def replay(
    recording: Recording, parts: Mapping[int, list[Placed]], whole: list[Tensor], *, seed: int
) -> Callable[[Tensor], Tensor]:
    """Fill the `parts` (storage of the recording -> what this rank holds of the parameter that lies there).

    Returns what gives the real tensor for each fake one in `whole`. Draws from torch's default generator, which is left
    as it was.
    """
    state = _Replay(recording, parts, {recording.view(tensor).storage for tensor in whole})
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        for number, op in enumerate(recording.ops[: state.end]):
            state.do(number, op)
    return lambda tensor: state.real(recording.view(tensor))


class _Replay:
    def __init__(self, recording: Recording, parts: Mapping[int, list[Placed]], wanted: set[int]) -> None:
        self.ops, self.parts, self.wanted = recording.ops, parts, wanted
        self.memory: dict[int, torch.UntypedStorage] = {}  # of the storages that are computed whole
        self.touched = [{view.storage for view in (*op.reads, *op.made)} for op in self.ops]
        crooked = [op for op in self.ops if not (op.is_view or op.is_plain)]
        needed = wanted | ({v.storage for op in crooked for v in (*op.reads, *op.made)} & set(parts))
        self.run = self._closure(needed)  # ops that are done whole
        self.draws = bool(parts) or any(self.ops[number].draws for number in self.run)
        if self.draws:  # then every draw must be done, to come to the right numbers
            needed |= {view.storage for op in crooked if op.draws for view in (*op.made, *op.writes)}
            self.run = self._closure(needed)
        self.last = {storage: number for number in sorted(self.run) for storage in self.touched[number]}
        self.begin: dict[int, int] = {}  # storage -> the last op that leaves no trace of what was there before
        for number, op in enumerate(self.ops):
            self.begin |= dict.fromkeys((view.storage for view in op.overwrites), number) if op.is_plain else {}

    def _closure(self, needed: set[int]) -> set[int]:
        """The ops without which the storages cannot be computed."""
        needed, run = set(needed), set()
        for number in reversed(range(len(self.ops))):
            op = self.ops[number]
            if not op.is_view and {view.storage for view in (*op.made, *op.writes)} & needed:
                run.add(number)
                needed |= self.touched[number]
        return run

    @property
    def end(self) -> int:
        """The op after which nothing is missing."""
        held = [number for number, seen in enumerate(self.touched) if seen & set(self.parts)]
        return max([*held, *self.run], default=-1) + 1

    def real(self, view: _View) -> Tensor:
        """The real tensor of a view of a storage that was computed whole."""
        empty = torch.empty(0, dtype=view.dtype)
        return empty.set_(self.memory[view.storage], view.offset, view.size, view.stride)

    def do(self, number: int, op: _Op) -> None:
        """Do op `number`: whole, on the parts that this rank holds, or only its draws."""
        if number in self.run:
            self._do_whole(number, op)
            return
        if op.is_view or not op.is_plain:
            return
        (view,) = op.writes or op.made
        held = self.parts.get(view.storage, []) if number >= self.begin.get(view.storage, 0) else []
        if op.name in _SCALES:
            for part in held:
                op.call(part.tensor, *op.args[1:], **op.kwargs)
        elif op.name in _MAKES:
            value: Any = op.args[1] if op.name == "full" else _MAKES[op.name]
            for part in held if value is not None else ():
                part.tensor.fill_(value)
        elif held or (op.draws and self.draws):
            for begin, piece in _pieces(op, view):
                for part in held:
                    part.put(piece, view.offset + begin)

    def _do_whole(self, number: int, op: _Op) -> None:
        args, kwargs = (tree_map_only(_View, self.real, tree) for tree in (op.args, op.kwargs))
        out = op.call(*args, **kwargs)
        for view, tensor in zip(op.made, [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]):
            self.memory.setdefault(view.storage, tensor.untyped_storage())
        del out, args, kwargs
        for view in (*op.reads, *op.made):
            if self.last[view.storage] == number and view.storage not in self.wanted:
                self._settle(view)

    def _settle(self, view: _View) -> None:
        """Nothing touches the storage any more: keep this rank's part of it."""
        storage = self.memory.pop(view.storage, None)
        if storage is not None:
            for part in self.parts.get(view.storage, ()):
                part.put(torch.empty(0, dtype=part.tensor.dtype).set_(storage), 0)


def _pieces(op: _Op, view: _View) -> Iterator[tuple[int, Tensor]]:
    """What a filling op gives, a piece at a time: (first element, elements)."""
    total = prod(view.size)
    scratch = torch.empty(min(total, _PIECE + _LANES), dtype=view.dtype)
    begin = 0
    while begin < total:
        end = total if total - begin < _PIECE + _LANES else begin + _PIECE
        piece = scratch[: end - begin]
        op.call(piece, *op.args[1:], **op.kwargs)
        yield begin, piece
        begin = end
