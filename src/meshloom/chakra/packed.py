"""Unpack gzip, but no decompression bombs: a file of megabytes must not become one of terabytes in memory or time."""

from __future__ import annotations

import io
import zlib
from typing import IO

GZIP = b"\x1f\x8b"
_MOST = 200  # bytes that one packed byte may become; traces and texts are far below, zeros reach 1032
_FREE = 64 << 20  # bytes that any file may become
_STEP = 1 << 18  # packed bytes that are read at a time


def unpack(data: bytes) -> bytes:
    """What the gzip file `data` holds; raises OSError for a bomb, EOFError or zlib.error where it is damaged."""
    return Unpacked(io.BytesIO(data)).readall()


class Unpacked(io.RawIOBase):
    """The bytes that a gzip file holds, for reading in order; raises OSError for one that grows without measure."""

    def __init__(self, packed: IO[bytes]) -> None:
        super().__init__()
        self._packed = packed
        self._inflate = zlib.decompressobj(wbits=31)
        self._fed = self._given = 0
        self._began = False

    def readable(self) -> bool:
        """It is."""
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        """Fill the buffer as far as there are bytes; 0 at the end."""
        while True:
            found = self._some(len(buffer))
            if found is None:
                return 0
            if found:
                buffer[: len(found)] = found
                return len(found)

    def readall(self) -> bytes:
        """All that is left."""
        parts = []
        while (found := self._some(1 << 22)) is not None:
            parts.append(found)
        return b"".join(parts)

    def _some(self, most: int) -> bytes | None:
        """At most `most` bytes, perhaps none yet; None at the end."""
        if self._inflate.eof:  # gzip files may stand one after another
            data = (self._inflate.unused_data or self._more()).lstrip(b"\0")  # some writers fill blocks with zeros
            while not data and (more := self._more()):
                data = more.lstrip(b"\0")
            if not data:
                return None
            self._inflate = zlib.decompressobj(wbits=31)
        else:
            data = self._inflate.unconsumed_tail or self._more()
        if not data and self._began and not self._inflate.eof:
            found = self._inflate.decompress(b"", most)
            if not found and not self._inflate.eof:
                raise EOFError("the packed file ends in the middle")
        else:
            found = self._inflate.decompress(data, most)
        if not data and not self._began:
            raise EOFError("the packed file is empty")
        self._began = True
        self._given += len(found)
        if self._given > _FREE + _MOST * self._fed:
            raise OSError(f"a packed file of {self._fed:,} bytes that unpacks to more than {self._given:,}")
        return found

    def _more(self) -> bytes:
        data = self._packed.read(_STEP)
        self._fed += len(data)
        return data
