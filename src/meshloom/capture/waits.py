"""Which streams wait for which collectives, where the device file does not tell it. No torch.

The driver's own words on waits (Kineto's `cuda_sync` events) are off unless a profiler asks for them. PyTorch's NCCL
groups note every collective and every wait for one, with its number, as `record_param_comms`: a collective begins after
what its thread had launched before it, and what its thread launches after a wait begins after the collective. A thread
that changes its stream in between is found by the measured times: nothing that began earlier is said to have waited.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from meshloom.capture.device import Kernel
from meshloom.capture.link import Op

PARAMS = "record_param_comms"


class _Done(NamedTuple):
    node: int
    end_ns: int


class NotedWaits:
    """The collectives and waits that a rank has noted so far, in the order of the host."""

    def __init__(self) -> None:
        self._issued: dict[tuple[int | None, str], list[_Done]] = {}  # collective -> its kernels
        self._waiting: dict[int, list[_Done]] = {}  # thread -> what its next kernel waits for
        self._last: dict[int, _Done] = {}  # thread -> its last kernel that computes

    def note(self, op: Op) -> None:
        """Take note of a host op, which may be a wait."""
        if op.name == PARAMS and "wait" in op.scalars and (key := _key(op)) in self._issued:
            self._waiting.setdefault(op.thread, []).extend(self._issued.pop(key))

    def before(self, thread: int, kernel: Kernel, *, communicates: bool) -> list[int]:
        """The nodes that the kernel, launched by `thread`, waits for."""
        if communicates:
            last = self._last.get(thread)
            found = [last] if last is not None else []
        else:
            found = self._waiting.pop(thread, [])
        return [each.node for each in found if each.end_ns <= kernel.start_ns]

    def ran(self, thread: int, kernel: Kernel, node: int, params: Op | None, *, communicates: bool) -> None:
        """Take note of a kernel; `params` is the note of the collective that it belongs to."""
        done = _Done(node, kernel.start_ns + kernel.duration_ns)
        if not communicates:
            self._last[thread] = done
        elif params is not None:
            self._issued.setdefault(_key(params), []).append(done)


def _key(op: Op) -> tuple[int | None, str]:
    """The collective's number, bare or in a pair with whether it is a message, and its group where that has a name."""
    firsts: list[Any] = [value[0] if isinstance(value, (list, tuple)) and value else value for value in op.scalars]
    number = next((first for first in firsts if isinstance(first, int) and not isinstance(first, bool)), None)
    name = next((first for first, value in zip(firsts, op.scalars) if isinstance(first, str) and value != first), "")
    return number, name
