"""Copies drop out alike on every rank, parts each in their own way, and one seed gives one result."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("dropout_ranks.py")


@pytest.mark.parametrize("plan", ["tp2", "tp2.sp"])
def test_masks(plan: str, tmp_path: Path) -> None:
    out = tmp_path / "found.json"
    command = [sys.executable, str(SCRIPT), str(out), plan]
    result = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    found = json.loads(out.read_text())
    embedding, *layers = found["equal"]  # then, for each layer: attention's weights, its output, the MLP's output
    assert embedding == {"ranks": True, "again": True, "any": True}
    assert len(layers) == 6
    for place, told in enumerate(layers):
        is_part = place % 3 == 0 or plan == "tp2.sp"
        assert told == {"ranks": not is_part, "again": True, "any": True}, place
    (mine, again), others = found["losses"]
    assert mine == again
    assert others == [mine, again], "copies have not parted"
