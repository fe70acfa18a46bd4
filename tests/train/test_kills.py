"""A run that is killed while it saves never leaves a listed checkpoint that cannot be loaded."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "kill_saves.py"


def test_a_few_kills() -> None:
    """200 of them are `benchmarks/kill_saves.py`."""
    command = [sys.executable, str(SCRIPT), "--kills", "6"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    rows = [line.split("|") for line in result.stdout.splitlines() if line.startswith(("| dp1", "| tp2"))]
    assert [int(row[2]) for row in rows] == [3, 3]
