"""From a TOML file to a frozen dataclass: units are read off the keys, and what is wrong is told in one line."""

from __future__ import annotations

import sys
from dataclasses import MISSING, fields
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar

from meshloom.errors import HardwareError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

T = TypeVar("T")
_MOST_TEXT = 1 << 20
_DEEPEST = 500
_LARGEST = 1e30  # of any number in a file: what is larger (and infinity) is a slip

# what is divided by: 0 would be a device that never ends
_POSITIVE = ("memory_bytes", "memory_bytes_per_second", "num_multiprocessors", "wire_bytes_per_second")
_SHARES = ("efficiency", "memory_efficiency", "sustained")

# ending of a key in SI -> other endings that mean the same in another unit, and their factor
_UNITS: dict[str, dict[str, float]] = {
    "_bytes_per_second": {
        "_mb_per_second": 1e6, "_gb_per_second": 1e9, "_tb_per_second": 1e12, "_gib_per_second": 2**30,
        "_gbit_per_second": 1e9 / 8,
    },
    "_bytes": {"_kb": 1e3, "_mb": 1e6, "_gb": 1e9, "_kib": 2**10, "_mib": 2**20, "_gib": 2**30},
    "_ns": {"_us": 1e3, "_ms": 1e6, "_s": 1e9},
}  # fmt: skip


def parse_toml(text: str) -> dict[str, Any]:
    """The table of a TOML text; raises ValueError, RecursionError.

    Python's parser takes memory with the square of a key's depth, so that a small file could fill it: such are refused.
    """
    if len(text) > _MOST_TEXT:
        raise ValueError(f"more than {_MOST_TEXT:,} characters")
    for number, line in enumerate(text.splitlines(), start=1):
        if any(part.count(".") > _DEEPEST for part in line.split("=")):
            raise ValueError(f"line {number}: more than {_DEEPEST} dots in a key")
    return tomllib.loads(text)


def load_table(name: str, kind: str) -> tuple[dict[str, Any], str]:
    """The TOML table of a shipped spec or of a file, and where it came from; raises HardwareError."""
    path = Path(name)
    if path.suffix != ".toml":
        folder = resources.files("meshloom.hardware") / "specs"
        there = {spec.name for spec in folder.iterdir()}  # the disk is not asked for the name: names have limits
        name = f"{name}-sxm" if f"{name}.toml" not in there and f"{name}-sxm.toml" in there else name
        if f"{name}.toml" not in there:
            raise HardwareError(f"{kind} {name!r}: expected a TOML file or one of {', '.join(shipped(kind))}")
        return tomllib.loads((folder / f"{name}.toml").read_text(encoding="utf-8")), name
    try:
        return parse_toml(path.read_text(encoding="utf-8")), str(path)
    except (OSError, ValueError, RecursionError) as error:
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


def as_table(value: Any, where: str) -> dict[str, Any]:
    """The value if it is a table; raises HardwareError if not."""
    if not isinstance(value, dict):
        raise HardwareError(f"{where}: expected a table, got {value!r:.60}")
    return value


def section(kind: type[T], table: Any, where: str) -> T:
    """A dataclass from a table inside a file; raises HardwareError if there is something else."""
    if not isinstance(table, dict):
        known = ", ".join(item.name for item in fields(kind))  # type: ignore[arg-type]
        raise HardwareError(f"{where}: expected a table with {known}")
    return from_table(kind, table, where)


def from_table(kind: type[T], table: dict[str, Any], where: str) -> T:
    """A frozen dataclass from a TOML table, in SI units: unknown, missing and ill-typed keys raise HardwareError."""
    known = {item.name: item for item in fields(kind)}  # type: ignore[arg-type]
    table = _all_in_si(table, known, where)
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
        if declared in ("int", "float") and not (number and 0 <= value <= _LARGEST):
            raise HardwareError(f"{where}: expected {name} to be a number of at least 0, got {value!r:.60}")
        if name.startswith(("num_", "group_")) and isinstance(value, float):
            raise HardwareError(f"{where}: expected {name} to be a whole number, got {value!r}")
        if name in _POSITIVE and not value:
            raise HardwareError(f"{where}: expected {name} above 0, got {value!r}")
        if name in _SHARES and not 0 < value <= 1:
            raise HardwareError(
                f"{where}: expected {name} to be a part of the whole, above 0 and at most 1, got {value!r}"
            )
        if declared.startswith(("Mapping[str, float]", "dict[str, float]")):
            _check_numbers(value, f"{where}: [{name}]")
        if declared == "str" and not isinstance(value, str):
            raise HardwareError(f"{where}: expected {name} to be text, got {value!r}")
        if declared == "bool" and not isinstance(value, bool):
            raise HardwareError(f"{where}: expected {name} to be true or false, got {value!r}")
    return kind(**table)


def _all_in_si(table: dict[str, Any], known: dict[str, Any], where: str) -> dict[str, Any]:
    """The table in SI units; raises HardwareError where two keys mean one thing (`memory_bytes` and `memory_gb`)."""
    found: dict[str, Any] = {}
    came_from: dict[str, str] = {}
    for key, value in table.items():
        name, number = _in_si(key, value, known, where)
        if name in found:
            raise HardwareError(f"{where}: expected {came_from[name]} or {key}, which mean the same, got both")
        found[name], came_from[name] = number, key
    return found


def _check_numbers(table: Any, where: str) -> None:
    numbers = table.values() if isinstance(table, dict) else [None]
    for value in numbers:
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 <= value <= _LARGEST:
            raise HardwareError(f"{where}: expected a table of numbers of at least 0, got {value!r:.60}")


def _in_si(key: str, value: Any, known: dict[str, Any], where: str) -> tuple[str, Any]:
    """`memory_gb = 80` is `memory_bytes = 80e9`; a key that is neither raises HardwareError and names the units."""
    if key in known:
        return key, value
    for si, others in _UNITS.items():
        for ending, factor in others.items():
            name = key.removesuffix(ending) + si
            if key.endswith(ending) and name in known:
                number = isinstance(value, (int, float)) and not isinstance(value, bool)
                return name, type(value)(value * factor) if number and abs(value) < _LARGEST else value
    for name in known:
        for si, others in _UNITS.items():
            if name.endswith(si) and key.startswith(name.removesuffix(si) + "_"):
                units = ", ".join(name.removesuffix(si) + ending for ending in others)
                raise HardwareError(f"{where}: {key!r} has an unknown unit; write {name} or one of {units}")
    raise HardwareError(f"{where}: expected keys {', '.join(known)}, got {key!r}")
