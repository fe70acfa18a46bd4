"""The script that holds plans to one another and a killed run to an undisturbed one, at its smallest."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "parity.py"


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_a_few_steps() -> None:
    """50 of them on SQuAD are `benchmarks/parity.py`."""
    command = [sys.executable, str(SCRIPT), "--steps", "8", "--seq-length", "16"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)
    assert result.returncode == 0, result.stdout + result.stderr[-3000:]
    assert "are equal to the bit" in result.stdout
    assert len(re.findall(r"^\| (dp|tp|pp)\d", result.stdout, re.M)) == 5


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_a_distance_is_seen() -> None:
    command = [sys.executable, str(SCRIPT), "--steps", "4", "--seq-length", "16", "--tolerance", "1e-12"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)
    assert result.returncode == 1, result.stdout
