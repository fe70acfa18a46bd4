"""A function of tensors that does the same each time, but for numbers that count on: recorded twice, then replayed.

A decode step calls hundreds of modules to run a few hundred ops; what it runs differs from the step before only in
where keys and values are written and how many are read. So two steps are recorded as the calls of torch that they make;
numbers that differ by one between them count the steps, all else must be equal. What depends on weights alone is
computed once. The third step is run both ways, and the recording is thrown away unless both give the same. So a forward
that decides by values, or counts in another way, costs three steps and is never wrong.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._C._distributed_c10d import AllreduceOptions, ProcessGroup, ReduceOp, _resolve_process_group
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

_READS_VALUES = frozenset(
    ("item", "tolist", "__bool__", "__int__", "__float__", "__index__", "__contains__", "equal", "allclose",
     "is_nonzero", "nonzero", "unique", "masked_select", "numpy", "__array__", "argwhere")
)  # fmt: skip
_DRAWS = frozenset(("rand", "randn", "randint", "bernoulli", "multinomial", "normal", "rand_like", "randn_like"))
_REDUCE = torch.ops._c10d_functional.all_reduce_.default
_WAIT = torch.ops._c10d_functional.wait_tensor.default
_REDUCTIONS = {"sum": ReduceOp.SUM, "max": ReduceOp.MAX}
_SLOTS = "_c10d_functional"  # ops of this namespace talk to other ranks: never left out


class CannotReplay(Exception):
    """The function does not do the same each time, for the reason that this says."""


class _Slot(NamedTuple):
    """A tensor of a recording, by its number."""

    number: int


class _Counted(NamedTuple):
    """A number that grows by one each time; `value` at the second recording."""

    value: int


@dataclass(slots=True)
class _Call:
    """One call of torch: tensors among its arguments stand as slots."""

    function: Any
    args: Any
    kwargs: Any
    results: tuple[int, ...]
    is_tuple: bool
    writes: bool


class _Recorder(TorchFunctionMode):
    """Sees every call of torch that a function makes."""

    def __init__(self, inputs: Sequence[Tensor]) -> None:
        super().__init__()
        self.numbers: dict[int, int] = {}
        self.tensors: list[Tensor] = []  # kept, so that no other takes its id
        self.calls: list[_Call] = []
        self.known: set[int] = set()  # slots that are inputs or results
        self.num_inputs = len(inputs)
        for tensor in inputs:
            self.known.add(self._number(tensor))

    def _number(self, tensor: Tensor) -> int:
        number = self.numbers.get(id(tensor))
        if number is None:
            number = self.numbers[id(tensor)] = len(self.tensors)
            self.tensors.append(tensor)
        return number

    def noted(self, value: Any) -> Any:
        """The value with slots in the place of tensors."""
        if isinstance(value, Tensor):
            return _Slot(self._number(value))
        if isinstance(value, (tuple, list)):
            return (
                type(value)(map(self.noted, value)) if type(value) in (tuple, list) else tuple(map(self.noted, value))
            )
        if isinstance(value, slice):
            return slice(self.noted(value.start), self.noted(value.stop), self.noted(value.step))
        if isinstance(value, dict):
            return {key: self.noted(item) for key, item in value.items()}
        return value

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name in _READS_VALUES:
            raise CannotReplay(f"it asks for values ({name})")
        if name in _DRAWS:
            raise CannotReplay(f"it draws random numbers ({name})")
        seen = self.noted(args), self.noted(kwargs)
        out = func(*args, **kwargs)
        writes = _writes(func, name, kwargs)
        results = [leaf for leaf in (out if isinstance(out, (tuple, list)) else (out,)) if isinstance(leaf, Tensor)]
        if not results and not writes:
            return out  # it asked for a shape, a device or the like
        if isinstance(out, (tuple, list)) and len(results) != len(out):
            raise CannotReplay(f"{name} returns more than tensors")
        if not writes and isinstance(out, Tensor) and any(out is leaf for leaf in tree_leaves((args, kwargs))):
            return out  # as of a conversion to what it is already
        before = len(self.tensors)
        numbers = tuple(map(self._number, results))
        self.calls.append(_Call(func, *seen, numbers, isinstance(out, (tuple, list)), writes))
        self.known.update(number for number in numbers if number >= before)  # what is older is what it was
        return out


def _writes(func: Any, name: str, kwargs: Any) -> bool:
    """Whether the call changes a tensor that it is given, or speaks with other ranks."""
    if name in ("__setitem__", "copy_") or "out" in kwargs or _SLOTS in str(getattr(func, "_qualified_op_name", func)):
        return True
    schema = getattr(func, "_schema", None)
    if schema is not None:
        return bool(schema.is_mutable)
    in_place = name.endswith("_") and not name.endswith("__")
    return in_place or name in ("__iadd__", "__isub__", "__imul__", "__itruediv__")


class Replay:
    """Calls functions of tensors, which it replays once it knows what they do: call it with one function, always."""

    def __init__(self) -> None:
        self.recordings: list[tuple[_Recorder, Any]] = []
        self.program: Callable[..., Any] | None = None
        self.checked = False
        self.why_not: str | None = None  # why every call is made as it stands
        self.count = 0

    def __call__(self, function: Callable[..., Any], *tensors: Tensor) -> Any:
        """What `function(*tensors)`, a tensor or a list of them, returns."""
        if self.why_not is not None:
            return function(*tensors)
        if self.program is None:
            return self._record(function, tensors)
        self.count += 1
        if self.checked:
            return self.program(self.count, *tensors)
        expected = function(*tensors)
        got = self.program(self.count, *tensors)
        for one, other in zip(tree_leaves(expected), tree_leaves(got), strict=True):
            if one.shape != other.shape or not torch.allclose(one, other, rtol=1e-4, atol=1e-5):
                self._give_up("the recording gives something else")
                break
        self.checked = True
        return expected

    def _record(self, function: Callable[..., Any], tensors: Sequence[Tensor]) -> Any:
        recorder = _Recorder(tensors)
        try:
            with recorder:
                out = function(*tensors)
        except CannotReplay as reason:
            self._give_up(str(reason))
            return function(*tensors)
        self.recordings.append((recorder, recorder.noted(out)))
        if len(self.recordings) == 2:
            try:
                self.program = _program(*self.recordings)
            except CannotReplay as reason:
                self._give_up(str(reason))
            self.recordings.clear()
        return out

    def _give_up(self, why: str) -> None:
        self.why_not, self.program = why, None
        self.recordings.clear()


def _program(first: tuple[_Recorder, Any], second: tuple[_Recorder, Any]) -> Callable[..., Any]:
    """A function of (how often since, inputs) that does what both recordings did."""
    (old, old_out), (new, new_out) = first, second
    if len(old.calls) != len(new.calls):
        raise CannotReplay(f"it made {len(old.calls)} calls, then {len(new.calls)}")
    same = _Same(old, new)
    calls = [
        _Call(
            b.function,
            same.args(a, b),
            same.of(a.kwargs, b.kwargs),
            b.results,
            b.is_tuple,
            b.writes,
        )
        for a, b in zip(old.calls, new.calls)
    ]
    return _compiled(_needed(_folded(calls, new), new_out), new, same.of(old_out, new_out))


class _Same:
    """Holds two recordings to each other."""

    def __init__(self, old: _Recorder, new: _Recorder) -> None:
        self.old, self.new = old, new
        self.pairs: dict[int, int] = {number: number for number in range(old.num_inputs)}

    def args(self, a: _Call, b: _Call) -> Any:
        """The arguments of both calls, where they are the same call; their results are the same from here on."""
        if a.function != b.function or len(a.results) != len(b.results):
            raise CannotReplay(f"it called {a.function}, then {b.function}")
        args = self.of(a.args, b.args)
        self.pairs.update(pair for pair in zip(a.results, b.results) if pair[0] in self.old.known)
        return args

    def of(self, a: Any, b: Any) -> Any:
        """What both are."""
        if isinstance(a, _Slot) and isinstance(b, _Slot):
            return self._slot(a, b)
        if type(a) is not type(b):
            raise CannotReplay(f"it used {a!r}, then {b!r}")
        if isinstance(a, (tuple, list)):
            if len(a) != len(b):
                raise CannotReplay(f"it used {a!r}, then {b!r}")
            return type(a)(map(self.of, a, b))
        if isinstance(a, slice):
            return slice(self.of(a.start, b.start), self.of(a.stop, b.stop), self.of(a.step, b.step))
        if isinstance(a, dict):
            if a.keys() != b.keys():
                raise CannotReplay(f"it used {sorted(a)}, then {sorted(b)}")
            return {key: self.of(a[key], b[key]) for key in a}
        if type(a) is int and b == a + 1:
            return _Counted(b)
        if a is not b and a != b:
            raise CannotReplay(f"it used {a!r}, then {b!r}")
        return b

    def _slot(self, a: _Slot, b: _Slot) -> _Slot:
        paired = self.pairs.get(a.number)
        if paired is None and a.number not in self.old.known and b.number not in self.new.known:
            one, other = self.old.tensors[a.number], self.new.tensors[b.number]
            if one is not other and not (
                one.shape == other.shape and one.dtype == other.dtype and torch.equal(one, other)
            ):
                raise CannotReplay("it used another tensor the second time")
            self.pairs[a.number] = paired = b.number
        if paired != b.number:
            raise CannotReplay("it used another result the second time")
        return b


def _folded(calls: Sequence[_Call], recorder: _Recorder) -> list[_Call]:
    """Without the calls whose results are the same each time: those are taken as they are."""
    written = {
        recorder.tensors[leaf.number].untyped_storage()._cdata
        for call in calls
        if call.writes
        for leaf in tree_leaves((call.args, call.kwargs), is_leaf=_is_slot)
        if isinstance(leaf, _Slot)
    }
    varying = set(range(recorder.num_inputs))
    kept = []
    for call in calls:
        leaves = _leaves(call)
        changes = call.writes or any(
            isinstance(leaf, _Counted)
            or (
                isinstance(leaf, _Slot)
                and (leaf.number in varying or recorder.tensors[leaf.number].untyped_storage()._cdata in written)
            )
            for leaf in leaves
        )
        made = {recorder.tensors[number].untyped_storage()._cdata for number in call.results}
        if changes or made & written:
            varying.update(call.results)
            kept.append(call)
    return kept


def _needed(calls: Sequence[_Call], out: Any) -> list[_Call]:
    """Without the calls whose results nobody uses."""
    used = {leaf.number for leaf in tree_leaves(out, is_leaf=_is_slot) if isinstance(leaf, _Slot)}
    kept = []
    for call in reversed(calls):
        if call.writes or used & set(call.results):
            used.update(leaf.number for leaf in _leaves(call) if isinstance(leaf, _Slot))
            kept.append(call)
    return kept[::-1]


def _is_slot(value: Any) -> bool:
    return isinstance(value, (_Slot, _Counted, slice))


def _leaves(call: _Call) -> list[Any]:
    found = []
    for leaf in tree_leaves((call.args, call.kwargs), is_leaf=_is_slot):
        found += [leaf.start, leaf.stop, leaf.step] if isinstance(leaf, slice) else [leaf]
    return found


def _compiled(calls: Sequence[_Call], recorder: _Recorder, out: Any) -> Callable[..., Any]:
    """The calls as one Python function, straight from the first to the last."""
    names: dict[str, Any] = {}
    made = set(range(recorder.num_inputs))
    alias: dict[int, int] = {}

    def text(value: Any) -> str:
        if isinstance(value, _Slot):
            number = alias.get(value.number, value.number)
            if number not in made:
                names[f"t{number}"] = recorder.tensors[number]
            return f"t{number}"
        if isinstance(value, _Counted):
            return f"n + {value.value}"
        if isinstance(value, (tuple, list)):
            inner = "".join(f"{text(item)}, " for item in value)
            return f"({inner})" if isinstance(value, tuple) else f"[{inner}]"
        if isinstance(value, slice):
            return f"slice({text(value.start)}, {text(value.stop)}, {text(value.step)})"
        if value is None or type(value) in (bool, int, str):
            return repr(value)
        name = f"c{len(names)}"
        names[name] = value
        return name

    names["wait"] = _WAIT
    lines = []
    reduced: set[int] = set()
    for call in calls:
        first = call.args[0] if call.args else None
        if isinstance(first, _Slot) and (call.function == _WAIT or _does_nothing(call)):
            if call.function == _WAIT and first.number not in reduced:
                lines.append(f"    wait({text(first)})\n")
            alias[call.results[0]] = alias.get(first.number, first.number)  # another name of the same tensor
            continue
        if call.function == _REDUCE and call.args[1] in _REDUCTIONS:
            # Without what a functional collective does for compilers, which costs the host more than the sum.
            name = f"g{len(names)}"
            names[name] = partial(_reduce, _resolve_process_group(call.args[2]), _options(call.args[1]))
            lines.append(f"    {name}({text(first)})\n")
            alias[call.results[0]] = alias.get(first.number, first.number) if isinstance(first, _Slot) else -1
            reduced.add(call.results[0])
            continue
        given = [text(item) for item in call.args] + [f"{key}={text(item)}" for key, item in call.kwargs.items()]
        name = f"f{len(names)}"
        names[name] = call.function
        target = ", ".join(f"t{number}" for number in call.results)
        target = f"{target}, = " if call.is_tuple else f"{target} = " if target else ""
        lines.append(f"    {target}{name}({', '.join(given)})\n")
        made.update(call.results)
    inputs = "".join(f", t{number}" for number in range(recorder.num_inputs))
    source = f"def program(n{inputs}):\n{''.join(lines)}    return {text(out)}\n"
    exec(compile(source, "<a recorded step>", "exec"), names)  # nosec B102 # made of our own numbers and names only
    program: Callable[..., Any] = names["program"]
    return program


def _options(reduction: str) -> AllreduceOptions:
    options = AllreduceOptions()
    options.reduceOp = ReduceOp(_REDUCTIONS[reduction])
    return options


def _reduce(group: ProcessGroup, options: AllreduceOptions, x: Tensor) -> None:
    """Reduce x over the group, in its memory."""
    group.allreduce([x], options).wait()


def _does_nothing(call: _Call) -> bool:
    """Whether a call returns what it gets, as dropout does outside of training."""
    if call.function is not functional.dropout or not isinstance(call.args[0], _Slot):
        return False
    bound = inspect.signature(functional.dropout).bind(*call.args, **call.kwargs)
    bound.apply_defaults()
    return not bound.arguments["training"] or bound.arguments["p"] == 0
