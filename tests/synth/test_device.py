"""`synth --device`: whether the fullest rank fits."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from meshloom.chakra.file import read_all
from meshloom.cli.__main__ import cli
from meshloom.errors import HardwareError
from meshloom.hardware.device import load_device


@pytest.mark.parametrize("kind", [["--inference", "--num-input-tokens", "8"], ["--seq-length", "16"]])
def test_the_fullest_rank_is_held_against_the_device(kind: list[str], tmp_path: Path) -> None:
    small = (Path(__file__).resolve().parents[2] / "src/meshloom/hardware/specs/h100-sxm.toml").read_text()
    lines = ["memory_bytes = 1000" if line.startswith("memory_bytes ") else line for line in small.splitlines()]
    assert lines != small.splitlines()
    (tmp_path / "small.toml").write_text("\n".join(lines))
    for device, fits in (("h100", True), (str(tmp_path / "small.toml"), False)):
        out = tmp_path / f"fits-{fits}"
        asked = ["synth", "--model", "gpt2-tiny", "--plan", "pp2", *kind, "--device", device, "--out", str(out)]
        told = json.loads(CliRunner().invoke(cli, [*asked, "--json"], catch_exceptions=False).stdout)
        assert told["fits"] is fits
        assert told["peak_bytes"] == max(trace.attrs["memory_peak"] for trace in read_all(out).values())
        plain = CliRunner().invoke(cli, [*asked, "--force"], catch_exceptions=False).output
        assert ("which fits into" if fits else "DOES NOT FIT") in plain


def test_a_chip_without_its_form_is_the_usual_one() -> None:
    assert load_device("h100") == load_device("h100-sxm")
    with pytest.raises(HardwareError, match="a100-40gb-pcie"):
        load_device("a100")
