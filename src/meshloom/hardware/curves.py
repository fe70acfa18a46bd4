"""What measurements say of a device: the constants of its products, attention kernels and collectives. No torch.

The formulas that use them stand in `meshloom.simulate`; `benchmarks/calibrate.py` fits them to measured kernels.
Defaults describe an ideal device: full efficiency, no start-up.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

Op = Literal["all_reduce", "all_gather", "reduce_scatter", "all_to_all"]


@dataclass(frozen=True, slots=True, kw_only=True)
class GemmCurve:
    """Constants of a matrix product, all of one device.

    `efficiency`: part of the peak inside a tile. `k_ramp`: length along k that filling the pipeline costs.
    `wave_loss`: how much of an unfilled last wave of tiles is lost (0: none, 1: all). `memory_efficiency`: part of the
    memory bandwidth. `cache_bytes_per_second`: from the shared cache to all multiprocessors (0: no limit).
    `start_ns`: before a product begins; `tile_ns`: for each wave of tiles; `split_ns`: for splitting k. `sharpness`:
    exponent with which computing and loading overlap (0: perfectly). `occupancy`: how many times over a full wave
    saturates the memory. `resident`: part of the cache that a working set may take to stay in it between calls;
    `resident_bytes_per_second`: how fast it is loaded then. `throttle`: part of the speed that products of more than a
    millisecond lose. `step_ns`: the least time of 64 elements along k. `tail`: how many times as slow the last results
    are written, with which nothing overlaps. `choice`: how surely a library finds its fastest tile (0: always).
    """

    efficiency: float = 1.0
    k_ramp: float = 0.0
    wave_loss: float = 0.0
    memory_efficiency: float = 1.0
    cache_bytes_per_second: float = 0.0
    start_ns: float = 0.0
    tile_ns: float = 0.0
    split_ns: float = 0.0
    sharpness: float = 0.0
    occupancy: float = 0.0
    resident: float = 0.0
    throttle: float = 0.0
    step_ns: float = 0.0
    resident_bytes_per_second: float = 0.0
    tail: float = 0.0
    choice: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionCurve:
    """Constants of a fused attention kernel, forward.

    `efficiency`: part of the peak for heads of 128 or more; `narrow`: factor on it for heads of 64; `length_ramp`:
    sequence length that start-up costs; `memory_efficiency`: part of the memory bandwidth; `start_ns`: each kernel.
    """

    efficiency: float = 0.6
    narrow: float = 0.7
    length_ramp: float = 200.0
    memory_efficiency: float = 0.5
    start_ns: float = 10_000.0


@dataclass(frozen=True, slots=True, kw_only=True)
class CollectiveCurve:
    """Constants of one collective inside a host, on V bytes and n devices.

    t = start + hop·(n-1) + root·√V + V·(f/wire + 1/local), with f = (n-1)/n, twice that for an all-reduce.
    `root_ns`: ns for each √byte (protocols that change with the size); `wire_bytes_per_second`: through a port;
    `local_bytes_per_second`: reading and reducing on the device (0: no limit). `by_size` gives the wire's bytes a
    second by number of devices, as text, where they share links unevenly (PCIe, NVLink meshes).
    """

    start_ns: float = 0.0
    hop_ns: float = 0.0
    root_ns: float = 0.0
    wire_bytes_per_second: float
    local_bytes_per_second: float = 0.0
    by_size: dict[str, float] = field(default_factory=dict)

    def wire(self, num_devices: int) -> float:
        """Bytes a second through a port in a group of `num_devices`: of the smallest listed size that holds it."""
        for size in sorted(self.by_size, key=int):
            if num_devices <= int(size):
                return self.by_size[size]
        return self.wire_bytes_per_second
