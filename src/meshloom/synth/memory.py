"""Which storages live, and how many bytes they take: who allocates them, and when the last tensor lets go of them.

A storage has one Python object as long as it lives, whichever tensors share it, and that says when it dies.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch


@dataclass(slots=True)
class _Block:
    """Memory that one or more storages of fake tensors stand for."""

    key: int
    num_bytes: int
    held: bool  # it was there before the step
    num_storages: int = 0


class Memory:
    """The storages of a step. `held_bytes` are those that were there before it; `peak_bytes` the most at one time."""

    def __init__(self) -> None:
        self.held_bytes = 0
        self.live_bytes = 0  # beside those
        self.most_bytes = 0
        self._known: dict[int, tuple[weakref.ref[Any], _Block]] = {}
        self._num_blocks = 0
        self._allocated = self._released = 0

    @property
    def peak_bytes(self) -> int:
        """The most bytes that lived at one time, with those that were there before."""
        return self.held_bytes + self.most_bytes

    def hold(self, storage: torch.UntypedStorage) -> int:
        """The storage is there before the step, and stays; returns its key."""
        found = self._known.get(storage._cdata)
        if found is None:
            return self._add(storage, held=True).key
        return found[1].key

    def key(self, storage: torch.UntypedStorage, *, is_read: bool) -> int:
        """The key of the storage. One that is new is allocated now, unless it is read: then it was there before."""
        found = self._known.get(storage._cdata)
        return self._add(storage, held=is_read).key if found is None else found[1].key

    def alias(self, storage: torch.UntypedStorage, of: torch.UntypedStorage) -> None:
        """`storage` stands for the same memory as `of`."""
        found = self._known.get(of._cdata)
        if found is not None and storage._cdata not in self._known:
            self._know(storage, found[1])

    def allocated(self) -> int:
        """Bytes allocated since this was asked last."""
        told, self._allocated = self._allocated, 0
        self.live_bytes += told
        self.most_bytes = max(self.most_bytes, self.live_bytes)
        return told

    def released(self) -> int:
        """Bytes released since this was asked last."""
        told, self._released = self._released, 0
        self.live_bytes -= told
        return told

    def _add(self, storage: torch.UntypedStorage, *, held: bool) -> _Block:
        self._num_blocks += 1
        block = _Block(key=self._num_blocks, num_bytes=storage.nbytes(), held=held)
        if held:
            self.held_bytes += block.num_bytes
        else:
            self._allocated += block.num_bytes
        self._know(storage, block)
        return block

    def _know(self, storage: torch.UntypedStorage, block: _Block) -> None:
        address: Any = storage._cdata
        block.num_storages += 1
        self._known[address] = weakref.ref(storage, partial(self._died, address)), block

    def _died(self, address: int, _: Any) -> None:
        """A storage died: its memory is released with the last that stands for it, if the step allocated it."""
        block = self._known.pop(address)[1]
        block.num_storages -= 1
        if not block.num_storages and not block.held:
            self._released += block.num_bytes
