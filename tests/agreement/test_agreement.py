"""Synthesised equals captured: what real gloo processes run is what synthesis says that they run, rank by rank."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from meshloom.chakra.check import check
from meshloom.chakra.file import read_all
from meshloom.chakra.trace import Node, Trace
from meshloom.model.config import objective_of
from meshloom.synth.inference import Inference, synthesise_inference
from meshloom.synth.roles import synthesise
from tests.agreement.cases import GENERATION, MICRO_BATCH, NUM_INPUT, NUM_OUTPUT, SEQ_LENGTH, TRAINING, Case
from tests.agreement.likeness import needs, sent, work


@pytest.fixture(scope="session")
def captured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The traces of every case by its name: real ranks, in one start for each number of them."""
    folder = tmp_path_factory.mktemp("captured")
    root = Path(__file__).resolve().parents[2]
    for count in ("2", "4"):
        command = [sys.executable, "-m", "tests.agreement.ranks", str(folder), count]
        result = subprocess.run(
            command, cwd=root, env=dict(os.environ), capture_output=True, text=True, timeout=280, check=False
        )
        assert result.returncode == 0, result.stderr[-3000:]
    return folder


def _agree(real: list[Node], imagined: list[Node], *, kept: bool = False) -> None:
    """`kept`: results of the forward are kept for a layer that is computed again; see docs/synth.md."""
    assert work(real) == work(imagined)
    assert sent(real) == sent(imagined)
    if kept:
        assert [what for what, _ in needs(real)] == [what for what, _ in needs(imagined)]
    else:
        assert needs(real) == needs(imagined)


@pytest.mark.parametrize("name", TRAINING)
def test_a_training_step(name: str, captured: Path) -> None:
    case = TRAINING[name]
    real = read_all(captured / name)
    imagined = synthesise(
        case.config, objective_of(case.config), plan=case.plan, micro_batch=MICRO_BATCH, seq_length=SEQ_LENGTH,
        **case.options,
    )  # fmt: skip
    assert check(real) == []
    assert check(imagined) == []
    assert list(real) == list(imagined) == list(range(case.plan.world_size))
    for rank, trace in real.items():
        _agree(list(trace.nodes), list(imagined[rank].nodes), kept=case.plan.recompute == "selective")
        assert {phase for _, _, _, phase in work(trace.nodes)} == {"forward", "backward", "optimizer"}


def _imagined(case: Case, num_output: int) -> dict[int, Trace]:
    step = Inference(
        config=case.config, plan=case.plan, batch_size=1, num_input_tokens=NUM_INPUT, num_output_tokens=num_output
    )
    return dict(synthesise_inference(step, stamped=False).traces())


@pytest.mark.parametrize("name", GENERATION)
def test_a_prefill_and_a_decode_step(name: str, captured: Path) -> None:
    case = GENERATION[name]
    once, twice, thrice, imagined = (_imagined(case, count) for count in (1, 2, 3, NUM_OUTPUT))
    assert check(imagined) == []
    for mark in ("prefill", "decode"):
        real = read_all(captured / name / mark)
        assert check(real) == []
        for rank, trace in imagined.items():
            ends = [len(fewer[rank].nodes) for fewer in (once, twice, thrice)]
            step = list(trace.nodes)[: ends[0]] if mark == "prefill" else list(trace.nodes)[ends[1] : ends[2]]
            assert step
            _agree(list(real[rank].nodes), step)
