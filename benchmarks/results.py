"""RESULTS.md: each script owns one section, and names date, machine and command in it."""

from __future__ import annotations

import os
import platform
from datetime import date
from pathlib import Path

PATH = Path(__file__).with_name("RESULTS.md")
_HEAD = "# Results\n\nWritten by the scripts in this folder; each part names its machine.\n"


def machine() -> str:
    """The machine in words."""
    model = platform.processor() or platform.machine()
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []:
        if line.startswith("model name"):
            model = line.partition(":")[2].strip()
            break
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1e9
    return (
        f"{os.cpu_count()} cores of {model}, {memory:.0f} GB, {platform.system()}, Python {platform.python_version()}"
    )


def section(title: str, command: str, body: str) -> str:
    """A section of RESULTS.md."""
    return f"## {title}\n\n{date.today()}, {machine()}; `{command}`\n\n{body}\n"


def write_section(text: str) -> None:
    """Put a section into RESULTS.md, in the place of the one of the same title."""
    old = PATH.read_text(encoding="utf-8") if PATH.exists() else _HEAD
    head, *parts = old.split("\n## ")
    sections = {part.partition("\n")[0]: part.strip() for part in parts}
    new = text.removeprefix("## ").strip()
    sections[new.partition("\n")[0]] = new
    PATH.write_text(head.rstrip() + "\n" + "".join(f"\n## {part}\n" for part in sections.values()), encoding="utf-8")
