"""Read PyTorch's host execution trace, schemas 1.0.1 to 1.1.1, into ops that do not know which it was. No torch."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

from meshloom.capture.repair import each, read_json
from meshloom.errors import TraceError

_WANTED = frozenset(("rf_id", "tid", "seq_id", "op_schema"))
_ROOTS = ("[pytorch|", "## process_group")  # nodes that stand for a process, a thread, or facts, not for something run


_INTS = frozenset((int,))
UNKNOWN = -1  # the storage of a tensor of which a file tells the shape only


class TensorRef(msgspec.Struct, frozen=True, gc=False):
    """A tensor of an op: where it lies in its storage (bytes), its shape, its element."""

    storage: int
    begin: int
    end: int
    shape: tuple[int, ...]
    itemsize: int
    dtype: str


class HostOp(msgspec.Struct, kw_only=True, gc=False):
    """One op as the host trace tells it; `thread` is the trace's own number, `inputs` has each argument's tensors.

    `parent` is the trace's id of what encloses it; not always right, see `link`.
    """

    id: int
    parent: int
    rf_id: int
    name: str
    schema: str
    thread: int
    sequence: int
    inputs: list[list[TensorRef]]
    outputs: list[TensorRef]
    scalars: list[Any]


class _Attr(msgspec.Struct, gc=False):
    name: str
    value: Any = None


class _Io(msgspec.Struct, gc=False):
    values: list[Any] = []
    shapes: list[Any] = []
    types: list[Any] = []
    strides: list[Any] = []


class _Node(msgspec.Struct, gc=False):
    """A node of any schema: up to 1.0.1 its facts are fields, later they are attributes."""

    id: int
    name: str
    inputs: _Io | list[Any]
    outputs: _Io | list[Any]
    ctrl_deps: int = -1
    parent: int = -1  # its name up to 1.0.1
    attrs: list[_Attr] = []
    input_shapes: list[Any] = []
    input_types: list[Any] = []
    output_shapes: list[Any] = []
    output_types: list[Any] = []
    rf_id: int = 0
    tid: int = 0
    seq_id: int = -1
    op_schema: str = ""


class _Trace(msgspec.Struct, gc=False):
    schema: str
    nodes: list[msgspec.Raw]


def read_host(path: Path, warnings: list[str]) -> list[HostOp]:
    """The ops of a host trace that ran, in the order of their starts; raises TraceError."""
    what = "a PyTorch execution trace"
    trace = read_json(path, _Trace, what, warnings)
    version = trace.schema.partition("-")[0]
    if version not in ("1.0.1", "1.0.2", "1.0.3", "1.1.0", "1.1.1"):
        raise TraceError(f"{path}: expected schema 1.0.1 to 1.1.1 of PyTorch's execution trace, got {trace.schema!r}")
    ops = []
    for node in each(trace.nodes, _Node, path, what, warnings):
        if node.name.startswith(_ROOTS):
            continue
        try:
            ops.append(_op(node))
        except (TypeError, ValueError, IndexError, AttributeError) as error:
            raise TraceError(
                f"{path}: node {node.id}, {node.name!r}: expected values, shapes, types and attributes as PyTorch "
                f"writes them, got '{error}'"
            ) from error
    ops.sort(key=lambda op: op.rf_id)
    return ops


def _op(node: _Node) -> HostOp:
    if isinstance(node.inputs, list) or isinstance(node.outputs, list):
        inputs = _Io(node.inputs if isinstance(node.inputs, list) else [], node.input_shapes, node.input_types)
        outputs = _Io(node.outputs if isinstance(node.outputs, list) else [], node.output_shapes, node.output_types)
        facts: dict[str, Any] = {
            "rf_id": node.rf_id,
            "tid": node.tid,
            "seq_id": node.seq_id,
            "op_schema": node.op_schema,
        }
    else:
        inputs, outputs = node.inputs, node.outputs
        facts = {attr.name: attr.value for attr in node.attrs if attr.name in _WANTED}
    values, scalars = _arguments(inputs)
    return HostOp(
        id=node.id,
        parent=max(node.ctrl_deps, node.parent),
        rf_id=int(facts.get("rf_id", 0)),
        name=node.name,
        schema=str(facts.get("op_schema", "")),
        thread=int(facts.get("tid", 0)),
        sequence=int(facts.get("seq_id", -1)),
        inputs=values,
        outputs=[ref for refs in _arguments(outputs)[0] for ref in refs],
        scalars=scalars,
    )


def _arguments(io: _Io) -> tuple[list[list[TensorRef]], list[Any]]:
    if not io.values:
        return [], []
    tensors: list[list[TensorRef]] = []
    scalars: list[Any] = []
    for index, value in enumerate(io.values):
        if not isinstance(value, list):
            tensors.append([])
            scalars.append(value)
            continue
        shape = io.shapes[index] if index < len(io.shapes) else []
        if len(value) == 6 and isinstance(value[5], str) and value[4] and isinstance(value[0], int):
            dtype = str(io.types[index])[7:-1] if index < len(io.types) else ""  # Tensor(float)
            tensors.append([_ref(value, shape, io.strides[index] if index < len(io.strides) else [], dtype)])
            scalars.append(None)
            continue
        strides = io.strides[index] if index < len(io.strides) else []
        types = str(io.types[index]) if index < len(io.types) else ""
        refs = list(_refs(value, shape, strides, types))
        tensors.append(refs)
        scalars.append(None if refs else value)
    return tensors, scalars


def _refs(value: Any, shape: Any, strides: Any, types: str) -> Iterator[TensorRef]:
    """The tensors of one argument: itself, or those of its (nested) lists, in their order."""
    if "Tensor" not in types:
        return
    names = [name.partition(")")[0] for name in types.split("Tensor(")[1:]]
    todo, count = [(value, shape, strides)], 0
    while todo:
        value, shape, strides = todo.pop()
        if not isinstance(value, list):
            continue
        if len(value) == 6 and isinstance(value[5], str) and not isinstance(value[0], list):
            dtype = names[min(count, len(names) - 1)] if names else ""
            count += 1
            if value[4]:  # an undefined tensor has elements of no size
                yield _ref(value, shape, strides, dtype)
        else:
            pieces = [list(piece) if isinstance(piece, list) else [] for piece in (shape, strides)]
            padded = [piece + [[]] * (len(value) - len(piece)) for piece in pieces]
            todo += reversed(list(zip(value, *padded)))


def _ref(value: list[Any], shape: Any, strides: Any, dtype: str) -> TensorRef:
    _, storage, offset, num_elements, itemsize, _ = value
    dims = tuple(shape) if type(shape) is list and _INTS.issuperset(map(type, shape)) else (num_elements,)
    extent = num_elements
    if strides and len(strides) == len(dims) and num_elements:
        # the last element's place, and one: 1 + the sum of (dim - 1) · stride
        extent = 1 + sum(map(operator.mul, dims, strides)) - sum(strides)
    begin = offset * itemsize
    return TensorRef(operator.index(storage), begin, begin + extent * itemsize, dims, itemsize, dtype_named(dtype))


def dtype_named(name: str) -> str:
    """What everyone calls the element type that PyTorch's files call `name`."""
    return _DTYPES.get(name, name)


# What the host trace calls element types -> what everyone else does.
_DTYPES = {
    "float": "float32",
    "double": "float64",
    "c10::Half": "float16",
    "c10::BFloat16": "bfloat16",
    "long int": "int64",
    "long": "int64",
    "int": "int32",
    "short int": "int16",
    "signed char": "int8",
    "unsigned char": "uint8",
}


def written(inputs: list[list[TensorRef]], outputs: list[TensorRef], schema: str) -> list[TensorRef]:
    """What the op writes: its outputs, and the arguments that its schema marks with an exclamation mark."""
    changed = {(ref.storage, ref.begin, ref.end): ref for ref in outputs}
    if "!" in schema:
        for argument, refs in zip(_argument_texts(schema), inputs):
            if "!" in argument.split(" ")[0]:
                changed.update({(ref.storage, ref.begin, ref.end): ref for ref in refs})
    return list(changed.values())


def _argument_texts(schema: str) -> list[str]:
    """`aten::add_(Tensor(a!) self, Scalar other) -> …`: the text of each argument."""
    inside = schema.partition("(")[2].rpartition(") -> ")[0]
    return [text for text in inside.replace("*, ", "").split(", ") if text]
