"""The noun `Device`: one accelerator, as its data sheet and its measured kernels describe it. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from meshloom.errors import HardwareError
from meshloom.hardware.curves import AttentionCurve, CollectiveCurve, GemmCurve
from meshloom.hardware.table import as_table, from_table, load_table, section

DTYPES = ("float64", "float32", "tfloat32", "bfloat16", "float16", "float8", "int8", "float4")


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """One accelerator; SI units, the unit is in each name.

    `flops_per_second` maps a dtype (float32, bfloat16, …) to its dense peak. `memory_efficiency` is the part of the
    memory bandwidth that long copies and elementwise kernels reach, `kernel_launch_ns` what each kernel costs beside
    its work. `sustained` is the part of a product's measured speed that hours of training keep (clocks under a power
    limit; microbenchmarks run cooler). `gemm`, `attention` and `collectives` hold what was measured.
    """

    name: str
    source: str = ""
    flops_per_second: Mapping[str, float]
    memory_bytes: int
    memory_bytes_per_second: float
    num_multiprocessors: int = 1
    cache_bytes: int = 0
    kernel_launch_ns: int = 0
    memory_efficiency: float = 1.0
    sustained: float = 1.0
    gemm: GemmCurve = field(default_factory=GemmCurve)
    attention: AttentionCurve = field(default_factory=AttentionCurve)
    collectives: Mapping[str, CollectiveCurve] = field(default_factory=dict)

    def peak(self, dtype: str) -> float:
        """Dense FLOP/s for `dtype`; raises HardwareError if the file does not give it."""
        if dtype not in self.flops_per_second:
            known = ", ".join(self.flops_per_second)
            raise HardwareError(
                f"device {self.name}: expected a peak for {dtype}, its file gives {known}; "
                f"add it under [flops_per_second]"
            )
        return self.flops_per_second[dtype]


def load_device(name: str) -> Device:
    """The device of a shipped name (`h100-sxm`, or `h100` for the same) or of a TOML file; raises HardwareError."""
    table, where = load_table(name, "device")
    for dtype, peak in as_table(table.get("flops_per_second", {}), f"{where}: [flops_per_second]").items():
        if dtype not in DTYPES:
            raise HardwareError(f"{where}: expected a dtype of {', '.join(DTYPES)}, got {dtype!r}")
        if peak == 0:
            raise HardwareError(f"{where}: expected a peak above 0 for {dtype}; leave out what the device cannot do")
    if "gemm" in table:
        table["gemm"] = section(GemmCurve, table["gemm"], f"{where}: [gemm]")
    if "attention" in table:
        table["attention"] = section(AttentionCurve, table["attention"], f"{where}: [attention]")
    if "collectives" in table:
        table["collectives"] = {
            op: section(CollectiveCurve, curve, f"{where}: [collectives.{op}]")
            for op, curve in as_table(table["collectives"], f"{where}: [collectives]").items()
        }
    return from_table(Device, table, where)
