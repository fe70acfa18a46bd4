"""Tensors and numbers of PyTorch's files, as costs and traces need them. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from meshloom.capture.host import TensorRef
from meshloom.chakra.cost import Tensor

# NCCL's names of element types in device files -> bytes
ITEMSIZES = {
    "Byte": 1,
    "Char": 1,
    "Bool": 1,
    "Half": 2,
    "BFloat16": 2,
    "Short": 2,
    "Int": 4,
    "Float": 4,
    "Long": 8,
    "Double": 8,
}


def numbers(value: Any) -> list[int]:
    """The ranks in a text such as "[0, 1]", or a list of them."""
    if isinstance(value, list):
        return [int(item) for item in value if isinstance(item, int)]
    return [int(item) for item in str(value or "").strip("[]").split(",") if item.strip().isdecimal()]


def tensor(ref: TensorRef) -> Tensor:
    """Its shape and element size."""
    return Tensor(ref.shape, ref.itemsize)


def num_bytes(refs: Sequence[TensorRef]) -> int:
    """How many bytes the tensors hold together."""
    return sum(tensor(ref).num_bytes for ref in refs)
