"""Which storages live, and how many bytes they take: who allocates them, and when the last tensor lets go of them.

Storages are known by their address, and an address that is used again after its storage died is another storage.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef


@dataclass(slots=True)
class _Block:
    """Memory that one or more storages of fake tensors stand for."""

    key: int
    num_bytes: int
    num_storages: int = 1


class Memory:
    """The storages of a step. `held_bytes` are those that were there before it; `peak_bytes` the most at one time."""

    def __init__(self) -> None:
        self.held_bytes = 0
        self.live_bytes = 0  # beside those
        self.most_bytes = 0
        self._known: dict[int, tuple[StorageWeakRef, _Block]] = {}
        self._held: dict[int, tuple[StorageWeakRef, _Block]] = {}
        self._num_blocks = 0
        self._allocated = 0

    @property
    def peak_bytes(self) -> int:
        """The most bytes that lived at one time, with those that were there before."""
        return self.held_bytes + self.most_bytes

    def hold(self, storage: torch.UntypedStorage) -> int:
        """The storage is there before the step, and stays; returns its key."""
        found = self._find(storage)
        if found is None:
            found = self._block(storage)
            self._held[storage._cdata] = StorageWeakRef(storage), found
            self.held_bytes += found.num_bytes
        return found.key

    def key(self, storage: torch.UntypedStorage, *, is_read: bool) -> int:
        """The key of the storage. One that is new is allocated now, unless it is read: then it was there before."""
        found = self._find(storage)
        if found is not None:
            return found.key
        if is_read:
            return self.hold(storage)
        found = self._block(storage)
        self._known[storage._cdata] = StorageWeakRef(storage), found
        self._allocated += found.num_bytes
        return found.key

    def alias(self, storage: torch.UntypedStorage, of: torch.UntypedStorage) -> None:
        """`storage` stands for the same memory as `of`."""
        block = self._find(of)
        if block is None or self._find(storage) is block:
            return
        block.num_storages += 1
        where = self._held if of._cdata in self._held else self._known
        where[storage._cdata] = StorageWeakRef(storage), block

    def allocated(self) -> int:
        """Bytes allocated since this was asked last."""
        told, self._allocated = self._allocated, 0
        self.live_bytes += told
        self.most_bytes = max(self.most_bytes, self.live_bytes)
        return told

    def released(self) -> int:
        """Bytes released since this was asked last."""
        expired = torch.UntypedStorage._expired  # asked of every storage at every op
        gone = [address for address, (reference, _) in self._known.items() if expired(reference.cdata)]
        told = sum(self._forget(address) for address in gone)
        self.live_bytes -= told
        return told

    def _forget(self, address: int) -> int:
        _, block = self._known.pop(address)
        block.num_storages -= 1
        return 0 if block.num_storages else block.num_bytes

    def _find(self, storage: torch.UntypedStorage) -> _Block | None:
        address: Any = storage._cdata
        for known in (self._known, self._held):
            found = known.get(address)
            if found is not None:
                if not found[0].expired():
                    return found[1]
                if known is self._known:  # its release has not been asked for yet
                    self._late(address)
                else:
                    del known[address]
        return None

    def _late(self, address: int) -> None:
        """The storage died and its address is used again before anybody asked: keep it until then under no address."""
        reference, block = self._known.pop(address)
        self._known[-block.key - (1 << 62)] = reference, block

    def _block(self, storage: torch.UntypedStorage) -> _Block:
        self._num_blocks += 1
        return _Block(key=self._num_blocks, num_bytes=storage.nbytes())
