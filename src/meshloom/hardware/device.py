"""The noun `Device`: one accelerator, as its data sheet and a few measured efficiencies describe it. No torch."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar

from meshloom.errors import HardwareError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """One accelerator; SI units, the unit is in each name.

    `flops_per_second` maps a dtype (float32, bfloat16, …) to its dense peak. Efficiencies are the part of a peak that
    large products and long copies reach in practice; `gemm_k_ramp` is the inner dim that a product's start-up costs;
    `gemm_wave_loss` how much of an unfilled last wave of tiles is lost (0: none, 1: all).
    """

    name: str
    source: str = ""
    flops_per_second: Mapping[str, float]
    memory_bytes: int
    memory_bytes_per_second: float
    num_multiprocessors: int = 1
    kernel_launch_ns: int = 0
    gemm_efficiency: float = 1.0
    gemm_k_ramp: float = 0.0
    gemm_wave_loss: float = 0.0
    memory_efficiency: float = 1.0

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
    """The device of a shipped name (such as `h100-sxm`) or of a TOML file; raises HardwareError."""
    return from_table(Device, *load_table(name, "device"))


def load_table(name: str, kind: str) -> tuple[dict[str, Any], str]:
    """The TOML table of a shipped spec or of a file, and where it came from; raises HardwareError."""
    path = Path(name)
    if path.suffix != ".toml":
        spec = resources.files("meshloom.hardware") / "specs" / f"{name}.toml"
        if not spec.is_file():
            raise HardwareError(f"{kind} {name!r}: expected a TOML file or one of {', '.join(shipped(kind))}")
        return tomllib.loads(spec.read_text(encoding="utf-8")), name
    try:
        return tomllib.loads(path.read_text(encoding="utf-8")), str(path)
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        what = error.strerror if isinstance(error, OSError) else str(error)
        raise HardwareError(f"{path}: expected a TOML file that describes a {kind}, got '{what}'") from error


def shipped(kind: str) -> list[str]:
    """Names of the shipped specs of a kind: `device` or `cluster`."""
    folder = resources.files("meshloom.hardware") / "specs"
    is_cluster = {
        spec.name.removesuffix(".toml"): "num_hosts" in tomllib.loads(spec.read_text(encoding="utf-8"))
        for spec in folder.iterdir()
        if spec.name.endswith(".toml")
    }
    return sorted(name for name, cluster in is_cluster.items() if cluster == (kind == "cluster"))


def from_table(kind: type[T], table: dict[str, Any], where: str) -> T:
    """A frozen dataclass from a TOML table: unknown, missing and ill-typed keys raise HardwareError."""
    known = {item.name: item for item in fields(kind)}  # type: ignore[arg-type]
    unknown = [key for key in table if key not in known]
    if unknown:
        raise HardwareError(f"{where}: expected keys {', '.join(known)}, got {unknown[0]!r}")
    missing = [
        name
        for name, item in known.items()
        if name not in table and item.default is MISSING and item.default_factory is MISSING
    ]
    if missing:
        raise HardwareError(f"{where}: expected the key {missing[0]!r}, which is missing")
    for name, value in table.items():
        declared = str(known[name].type)
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if declared in ("int", "float") and not (number and value >= 0):
            raise HardwareError(f"{where}: expected {name} to be a number of at least 0, got {value!r}")
        if declared == "str" and not isinstance(value, str):
            raise HardwareError(f"{where}: expected {name} to be text, got {value!r}")
    return kind(**table)
