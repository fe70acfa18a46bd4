"""ZeRO-1 changes no weight: parity with the plain optimizer, and checkpoints that either reads of the other."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from meshloom.parallel.placement import Placed, Run


@pytest.mark.parametrize("plan", ["dp2", "tp2.dp2"])
def test_weights_are_those_of_the_plain_optimizer(plan: str, tmp_path: Path) -> None:
    """To the rounding of float64 (2.2e-16, times the few additions of a step in another order)."""
    root = Path(__file__).resolve().parents[2]
    command = [sys.executable, "-m", "tests.parallel.zero", str(tmp_path / "found.json"), plan]
    result = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=240, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    told: dict[str, Any] = json.loads((tmp_path / "found.json").read_text())
    for found in told.values():
        assert found["weights"] < 1e-13
        assert found["norms"][0] == pytest.approx(found["norms"][1], rel=1e-13)
        assert found["norms"][0] > 0.3, "clipping took part"
        assert max(found["crossed"]) < 1e-13
        assert found["states"][1] < 0.52 * found["states"][0]


def test_runs_fill_the_whole_and_nothing_twice() -> None:
    """Shares of a part that is cut in three blocks, each cut into runs at places that fit no row."""
    whole = torch.zeros(4, 12, 5)
    ranges = ((1, 3), (5, 7), (9, 11))
    part = Placed(tensor=torch.empty(4, 6, 5), shape=(4, 12, 5), dim=1, ranges=ranges)
    numbers = torch.arange(1.0, 121.0)
    for begin, end in ((0, 1), (1, 17), (17, 63), (63, 119), (119, 120)):
        for offsets, sizes, piece in Run(tensor=numbers[begin:end], placed=part, begin=begin).boxes():
            place = whole[tuple(slice(at, at + size) for at, size in zip(offsets, sizes))]
            assert torch.equal(place, torch.zeros_like(place))
            place.copy_(piece)
    held = torch.cat([whole[:, low:high] for low, high in ranges], dim=1)
    assert torch.equal(held, numbers.view(4, 6, 5))
    assert whole.count_nonzero() == 120
