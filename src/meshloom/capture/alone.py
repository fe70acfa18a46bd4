"""One of PyTorch's two files without the other: what it tells is enough for a trace, with less in it. No torch.

A device file alone has no storages, so no data dependencies, and shapes only where they were recorded. A host file
alone has no times and no kernels. Warnings say so.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

from meshloom.capture.device import NOTHING, Args, DeviceTrace, HostEvent, read_device
from meshloom.capture.host import UNKNOWN, TensorRef, dtype_named, read_host
from meshloom.capture.link import Linked, Op, linked
from meshloom.capture.repair import read_json
from meshloom.errors import TraceError

_ITEMSIZES = {"float64": 8, "int64": 8, "complex64": 8, "float32": 4, "int32": 4, "float16": 2, "bfloat16": 2,
              "int16": 2, "int8": 1, "uint8": 1, "bool": 1}  # fmt: skip


class _Either(msgspec.Struct, rename={"events": "traceEvents"}):
    events: msgspec.Raw = NOTHING
    nodes: msgspec.Raw = NOTHING


def link_alone(path: Path) -> Linked:
    """What the host trace or the device trace in `path` tells; raises TraceError if it is neither."""
    found = read_json(path, _Either, "a PyTorch execution trace or a Kineto trace", [])
    if found.events != NOTHING:
        return _device(path)
    if found.nodes != NOTHING:
        return _host(path)
    raise TraceError(f"{path}: expected a PyTorch execution trace or a Kineto trace, got another JSON document")


def _device(path: Path) -> Linked:
    warnings: list[str] = []
    told = read_device(path, warnings, keep_args=True)
    ops = [_op(event) for event in told.host]
    if not any(op.inputs for op in ops):
        warnings.append(f"{path}: no shapes were recorded (record_shapes=True does): ops carry no FLOPs and bytes")
    warnings.append(f"{path}: a device file alone names no storages: the trace has no data dependencies")
    return linked(ops, told, warnings)


def _op(event: HostEvent) -> Op:
    assert event.args is not None
    return Op(
        rf_id=max(0, event.rf_id),
        name=event.name,
        schema=event.name if "::" in event.name else "",
        thread=event.thread,
        start_ns=event.start_ns,
        duration_ns=event.duration_ns,
        inputs=_tensors(event.args),
        outputs=[],
        scalars=[],
        sequence=event.sequence,
    )


def _tensors(args: Args) -> list[list[TensorRef]]:
    """Each argument's tensors, from the shapes and element types that the event tells."""
    if NOTHING in (args.input_dims, args.input_types):
        return []
    dims, types = msgspec.json.decode(args.input_dims), msgspec.json.decode(args.input_types)
    return [[_ref(shape, kind)] if _is_tensor(shape, kind) else [] for shape, kind in zip(dims, types)]


def _is_tensor(shape: Any, kind: Any) -> bool:
    return dtype_named(str(kind)) in _ITEMSIZES and isinstance(shape, list) and all(type(dim) is int for dim in shape)


def _ref(shape: list[int], kind: str) -> TensorRef:
    dtype = dtype_named(kind)
    return TensorRef(UNKNOWN, 0, 0, tuple(shape), _ITEMSIZES[dtype], dtype)


def _host(path: Path) -> Linked:
    warnings: list[str] = []
    nodes = read_host(path, warnings)
    warnings.append(f"{path}: a host file alone has no times and no kernels: the trace has neither")
    places = {node.id: index for index, node in enumerate(nodes)}
    ops = [
        Op(
            rf_id=node.rf_id,
            name=node.name,
            schema=node.schema,
            thread=node.thread,
            start_ns=0,
            duration_ns=0,
            inputs=node.inputs,
            outputs=node.outputs,
            scalars=node.scalars,
            sequence=node.sequence,
            parent=places.get(node.parent, -1),
        )
        for node in nodes
    ]
    nothing = DeviceTrace(host=[], launches=[], kernels=[], rank=-1, world_size=0, groups={})
    return Linked(ops=ops, kernels=[], waits=[], device=nothing, warnings=warnings)
