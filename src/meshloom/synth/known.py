"""What an op gives on fake tensors, made again without asking the op.

That depends on the op, on the shapes, strides, offsets and dtypes of its tensors, on which of them share memory, and on
its other arguments. What it gave once for these is given again: a view looks at the same storage, a changed tensor is
handed back, and what is new has a storage of its own. FakeTensorMode keeps such results, too, but takes ten times as
long to find them and to make a tensor. Ops whose results depend on values are always asked.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from meshloom.parallel.fake import tensors_among

_PLAIN = frozenset(
    (int, float, bool, str, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format, torch.Size)
)
_VIEWS = frozenset((torch.ops.aten.view.default, torch.ops.aten._unsafe_view.default))
_OF_VALUES = (torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape, torch.Tag.inplace_view)


class Result(NamedTuple):
    """How one result of an op comes about: from number `source` of the tensors it was given, or else new."""

    source: int | None
    changed: bool  # the source itself, not a view of it
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    dtype: torch.dtype
    device: torch.device
    attributes: dict[str, Any]  # which a FakeTensor has beside what a tensor has


class Results(NamedTuple):
    """How all results of an op come about; None where it gives none. `kind` is Tensor for one, else the sequence's."""

    kind: Any
    results: tuple[Result | None, ...]

    def make(self, tensors: Sequence[Tensor]) -> Any:
        """The results, if the op is given `tensors`."""
        if self.kind is Tensor:
            assert self.results[0] is not None
            return _make(self.results[0], tensors)
        if self.kind is None:
            return None
        return self.kind([None if result is None else _make(result, tensors) for result in self.results])


def signature(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Hashable, list[Tensor]] | None:
    """What the results of an op depend on, and the tensors it is given; None where that is not all known."""
    parts: list[Any] = [func, torch.get_default_dtype()]
    tensors: list[Tensor] = []
    if not _note(args, parts, tensors):
        return None
    for name, value in kwargs.items():
        parts.append(name)
        if not _note((value,), parts, tensors):
            return None
    if not tensors:
        return None
    if len(tensors) > 1:
        first: dict[int, int] = {}
        parts += [first.setdefault(tensor.untyped_storage()._cdata, place) for place, tensor in enumerate(tensors)]
    return tuple(parts), tensors


def _note(values: Sequence[Any], parts: list[Any], tensors: list[Tensor]) -> bool:
    """Add what of an op's arguments decides its results; whether all of it can be told."""
    for value in values:
        kind = type(value)
        if kind is FakeTensor:
            if value.constant is not None or value.dtype.is_complex:  # complex ones may be conjugated without a copy
                return False
            tensors.append(value)
            parts += (value.shape, value.stride(), value.dtype, value.storage_offset(), value.fake_device)
        elif kind in _PLAIN:
            parts += (kind, value)  # 1, 1.0 and True are equal
        elif kind is list or kind is tuple:
            parts += (kind, len(value))
            if not _note(value, parts, tensors):
                return False
        else:
            return False
    return True


def as_kernels_lay_it(func: Any, args: Sequence[Any], out: Any) -> Any:
    """`out` of an op with the strides that PyTorch's kernel gives it.

    For a view FakeTensorMode has code of its own, whose strides differ along dims of one element. No value lies
    elsewhere, but a product asks for them when it chooses between mm and bmm.
    """
    if func not in _VIEWS or type(out) is not FakeTensor:
        return out
    given = args[0]
    with torch._C._DisableTorchDispatch():
        stride = torch.empty_strided(given.shape, given.stride(), device="meta").view(out.shape).stride()
    return out if stride == out.stride() else _make(_result(out, [given])._replace(stride=stride), [given])


def results_of(func: Any, tensors: Sequence[Tensor], before: Sequence[Any], out: Any) -> Results | None:
    """How to make again what `func` gave for `tensors`, whose shapes were `before`; None if that cannot be."""
    if any(tag in func.tags for tag in _OF_VALUES) or [tensor.shape for tensor in tensors] != before:
        return None
    kind = Tensor if isinstance(out, Tensor) else None if out is None else type(out)
    found = [out] if kind is Tensor else [] if out is None else out
    if kind not in (Tensor, None, list, tuple) or not all(
        result is None or type(result) is FakeTensor for result in found
    ):
        return None
    results = Results(kind, tuple(None if result is None else _result(result, tensors) for result in found))
    pairs = zip(tensors_among((results.make(tensors),)), tensors_among((out,)), strict=True)
    new = [result.untyped_storage()._cdata for result, how in zip(found, results.results) if how and how.source is None]
    return results if all(_alike(*pair) for pair in pairs) and len(set(new)) == len(new) else None


def _result(result: Any, tensors: Sequence[Tensor]) -> Result:
    source = next((place for place, tensor in enumerate(tensors) if tensor is result), None)
    changed = source is not None
    if source is None:
        mine = result.untyped_storage()._cdata
        source = next((place for place, tensor in enumerate(tensors) if tensor.untyped_storage()._cdata == mine), None)
    return Result(
        source, changed, tuple(result.shape), tuple(result.stride()), int(result.storage_offset()), result.dtype,
        result.fake_device, dict(vars(result)),
    )  # fmt: skip


def _make(result: Result, tensors: Sequence[Tensor]) -> Tensor:
    source, changed, shape, stride, offset, dtype, device, attributes = result
    if changed:
        assert source is not None
        return tensors[source]
    # As FakeTensor's own constructor does it; a test holds both together.
    with torch._C._DisableTorchDispatch():
        if source is None:
            data = torch.empty_strided(shape, stride, dtype=dtype, device="meta")
        else:
            data = torch.empty((0,), dtype=dtype, device="meta")
            data.set_(tensors[source].untyped_storage(), offset, shape, stride)
    made: Tensor = Tensor._make_subclass(FakeTensor, data, False, dispatch_device=True, device_for_backend_keys=device)
    torch._C._set_throw_on_mutable_data_ptr(made)
    vars(made).update(attributes)
    return made


def _alike(one: Any, other: Any) -> bool:
    """Whether nobody could tell two fake tensors apart, but for whose memory they look at."""
    return (
        (one.shape, one.stride(), one.dtype, one.storage_offset(), one.requires_grad)
        == (other.shape, other.stride(), other.dtype, other.storage_offset(), other.requires_grad)
        and one.untyped_storage().nbytes() == other.untyped_storage().nbytes()
        and torch._C._dispatch_key_set(one) == torch._C._dispatch_key_set(other)
        and vars(one) == vars(other)
        and other.constant is None
    )
