"""The loop itself: it reads nothing from the device between its reports; and its benchmark never waits for ever."""

from __future__ import annotations

import importlib.util
import sys
import threading
import traceback
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig

from meshloom.model.config import load_tokenizer
from meshloom.plan import Plan
from meshloom.train.data import make_stream
from meshloom.train.job import Job
from meshloom.train.loop import train_rank
from meshloom.train.shards import tokenise
from meshloom.train.sources import SAMPLE, Reading, find_sources

SMALL = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 300}
FAMILIES = {"causal": "gpt2", "masked": "bert"}


def _in_mask_code() -> bool:
    return any(Path(frame.filename).name == "masking_utils.py" for frame in traceback.extract_stack(limit=16))


def _job(objective: Any, cache: Path) -> Job:
    tokenizer = load_tokenizer("bytes")
    shards = tokenise(find_sources([SAMPLE]), tokenizer, objective, cache=cache, reading=Reading())
    return Job(
        config=AutoConfig.for_model(FAMILIES[objective], **SMALL), objective=objective, tokenizer=tokenizer,
        plan=Plan(), stream=make_stream(shards, [None], tokenizer, objective, seq_length=16, seed=0), max_steps=8,
        batch_size=2, seq_length=16, learning_rate=1e-3, weight_decay=0.1, max_grad_norm=1.0, seed=0, log_steps=4,
    )  # fmt: skip


@pytest.mark.parametrize("objective", ["causal", "masked"])
def test_nothing_is_read_from_the_device_between_reports(
    objective: str, tmp_path: Path, cache_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But for what a model's own forward reads: transformers looks at a mask of padding, whether it hides anything."""
    job = _job(objective, cache_folder)
    now, read = [-1], set()

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func.overloadpacket is torch.ops.aten._local_scalar_dense and not _in_mask_code():
                read.add(now[0])
            return func(*args, **(kwargs or {}))

    def as_list(tensor: Tensor) -> Any:
        read.add(now[0])
        return plain(tensor)

    def around(mesh: Any, model: nn.Module) -> Callable[[int], Any]:
        def at(step: int) -> Any:
            now[0] = step
            return nullcontext()

        return at

    plain = Tensor.tolist
    monkeypatch.setattr(Tensor, "tolist", as_list)
    monkeypatch.setattr(torch, "set_num_threads", lambda number: None)  # other tests fork this process
    with Watch():
        train_rank(job, str(tmp_path), "cpu", around, False)
    assert {3, 7} <= read, "reports are read"
    assert read.isdisjoint({1, 2, 4, 5, 6})


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    path = Path(__file__).resolve().parents[2] / "benchmarks" / "train.py"
    monkeypatch.syspath_prepend(str(path.parent))
    spec = importlib.util.spec_from_file_location("benchmark_of_loops", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    return module


def test_a_loop_that_hangs_ends_the_benchmark(script: ModuleType) -> None:
    freed = threading.Event()

    def stuck(begin: Callable[[], None]) -> None:
        begin()
        freed.wait()

    taking = script.Taking("a loop", stuck, torch.device("cpu"), 0.2)
    with pytest.raises(
        SystemExit, match=r"a loop: expected it to end its step within 0 s \(--limit\); it is at"
    ) as told:
        taking.step()
    assert "freed.wait()" in str(told.value)
    freed.set()


def test_a_loop_that_fails_ends_the_benchmark(script: ModuleType) -> None:
    def broken(begin: Callable[[], None]) -> None:
        begin()
        raise ValueError("no such batch")

    taking = script.Taking("a loop", broken, torch.device("cpu"), 60.0)
    with pytest.raises(SystemExit, match="a loop: failed: ValueError: no such batch"):
        taking.step()
