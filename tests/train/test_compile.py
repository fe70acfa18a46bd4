"""torch.compile and kinds of attention: the same losses, to rounding; and one line where there is no compiler."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig

from meshloom.errors import UsageError
from meshloom.model.build import build_model, flops_per_token
from meshloom.model.config import choose_attention
from meshloom.parallel.compiled import check_compiler
from meshloom.simulate.shape import Shape
from tests.conftest import Meshloom

SAME = ("train", "--model", "gpt2-tiny", "--tokenizer", "bytes", "--data", "sample", "--seq-length", "32",
        "--max-steps", "3", "--eval-fraction", "0.1", "--learning-rate", "2e-3")  # fmt: skip


def _losses(folder: Path) -> list[float]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [*(line["loss"] for line in lines), lines[-1]["eval_loss"]]


@pytest.fixture(scope="module")
def plain(meshloom: Meshloom, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    folder = tmp_path_factory.mktemp("plain") / "run"
    result = meshloom(*SAME, "--out", str(folder))
    assert result.returncode == 0, result.stderr
    return _losses(folder)


def _has_compiler() -> bool:
    try:
        check_compiler("cpu")
    except UsageError:
        return False
    return True


@pytest.mark.skipif(not _has_compiler(), reason="needs a C++ compiler")
@pytest.mark.parametrize("plan", ["pp2", *(pytest.param(plan, marks=pytest.mark.slow) for plan in ("dp1", "tp2"))])
def test_compiled_layers_give_the_same_losses(
    plain: list[float], tmp_path: Path, meshloom: Meshloom, plan: str
) -> None:
    result = meshloom(*SAME, "--plan", plan, "--compile", "--out", str(tmp_path / "run"), timeout=280)
    assert result.returncode == 0, result.stderr
    assert _losses(tmp_path / "run") == pytest.approx(plain, rel=1e-4)


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # torch silences it by a warning that we make an error
def test_layers_go_through_the_compiler() -> None:
    """With a backend that counts graphs and runs them as they are."""
    from meshloom.parallel.compiled import compile_layers

    graphs = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    config = AutoConfig.for_model("gpt2", n_layer=3, n_head=2, n_embd=16, vocab_size=32, eos_token_id=0, bos_token_id=0)
    model = build_model(config, "causal", seed=0).eval()
    ids = torch.arange(8)[None]
    before = model(input_ids=ids).logits
    plain = torch.compile
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "compile", lambda forward: plain(forward, backend=backend))
        compile_layers(model, [f"transformer.h.{number}" for number in range(3)])
    assert torch.equal(model(input_ids=ids).logits, before)
    assert len(graphs) == 1, "layers of a kind are compiled once"


def test_no_compiler_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor import config

    monkeypatch.setattr(config.cpp, "cxx", ("no-such-compiler",))
    from torch._inductor import cpp_builder

    if hasattr(cpp_builder.get_cpp_compiler, "cache_clear"):
        cpp_builder.get_cpp_compiler.cache_clear()
    monkeypatch.setattr(cpp_builder, "cpp_compiler_search", _none_found)
    with pytest.raises(UsageError, match=r"^--compile: expected a C\+\+ compiler"):
        check_compiler("cpu")


def _none_found(search: Any) -> str:
    from torch._inductor.exc import InvalidCxxCompiler

    raise InvalidCxxCompiler


def test_eager_attention_gives_the_same_losses(plain: list[float], tmp_path: Path, meshloom: Meshloom) -> None:
    result = meshloom(*SAME, "--attention", "eager", "--out", str(tmp_path / "run"))
    assert result.returncode == 0, result.stderr
    assert _losses(tmp_path / "run") == pytest.approx(plain, rel=1e-4)
    config = AutoConfig.for_model("gpt2", n_layer=1, n_head=2, n_embd=16, vocab_size=32)
    choose_attention(config, "eager")
    built: Any = build_model(config, "causal", seed=0, device="meta")
    assert built.config._attn_implementation == "eager"


@pytest.mark.parametrize(("layers", "width", "length"), [(12, 768, 1024), (2, 128, 256)])
def test_counted_flops_are_those_of_the_closed_form(layers: int, width: int, length: int) -> None:
    config = AutoConfig.for_model("gpt2", n_layer=layers, n_embd=width, n_head=width // 64)
    shape = Shape(
        num_layers=layers, hidden_size=width, num_heads=width // 64, num_kv_heads=width // 64,
        intermediate_size=4 * width, vocab_size=config.vocab_size,
    )  # fmt: skip
    found = flops_per_token(config, "causal", seq_length=length)
    assert found == pytest.approx(shape.model_flops(length) / length, rel=1e-3)
