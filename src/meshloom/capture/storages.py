"""Which life of a storage a tensor belongs to. No torch.

PyTorch's files know a storage by its address, and allocators use addresses again: what stands there now did not come
from what stood there before. An op that returns memory of its own begins a new life of it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from meshloom.capture.host import UNKNOWN, TensorRef
from meshloom.capture.link import Op
from meshloom.chakra.build import Region

_LIFE = 1 << 40  # more than a file has storages
_NUMBER_DTYPES = ("float64", "int64", "bool")  # what PyTorch makes of Python numbers


class Storages:
    """The life that each storage has now."""

    def __init__(self, ops: Iterable[Op]) -> None:
        self._keys: dict[int, int] = {}
        self._single: dict[int, str | None] = {}  # storage -> dtype of a tensor () that an op made of this life of it
        self._written = {ref.storage for op in ops for ref in op.outputs if op.schema}

    def begin(self, op: Op) -> None:
        """The op returns; memory that is its own, not an argument's, begins a life."""
        if not op.schema:
            return
        returned = op.schema.rpartition(" -> ")[2]
        if "Tensor" in returned and "(" not in returned.lstrip("("):  # unlike views and what is changed in place
            given = {ref.storage for refs in op.inputs for ref in refs}
            for storage in {ref.storage for ref in op.outputs} - given:
                self._keys[storage] = self._keys.get(storage, storage) + _LIFE
                self._single[storage] = None
        for ref in op.outputs:
            if not ref.shape:
                self._single[ref.storage] = ref.dtype

    def is_number(self, ref: TensorRef) -> bool:
        """Whether this is no tensor, but one of Python's numbers, which reach an op as tensors () that no op made."""
        if ref.shape or ref.dtype not in _NUMBER_DTYPES:
            return False
        if ref.storage not in self._single:
            return ref.storage not in self._written
        return self._single[ref.storage] != ref.dtype

    def regions(self, refs: Sequence[TensorRef]) -> list[Region]:
        """The bytes that the tensors are now, where the file names their storages."""
        keys = self._keys
        return [
            Region(keys.get(ref.storage, ref.storage), ref.begin, ref.end) for ref in refs if ref.storage != UNKNOWN
        ]
