"""What is exported computes what the checkpoint does; where a library is missing, its extra is named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from meshloom.errors import UsageError
from meshloom.model import export
from meshloom.model.build import build_model
from tests.generate.ranks import config


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    model: Any = build_model(config("llama"), "causal", seed=1)
    model.save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


def test_a_missing_library_names_its_extra(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"meshloom\[onnx\]"):
        export.export_onnx(saved, tmp_path / "out")
    with pytest.raises(UsageError, match=r"meshloom\[quantize\]"):
        export.export_int8(saved, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_plain_folder(saved: Path, tmp_path: Path) -> None:
    export.export_folder(saved, tmp_path / "out")
    ids = torch.arange(1, 9)[None]
    one, other = (AutoModelForCausalLM.from_pretrained(folder) for folder in (saved, tmp_path / "out"))
    assert torch.equal(one(ids).logits, other(ids).logits)


@pytest.mark.filterwarnings("ignore")
def test_onnx(saved: Path, tmp_path: Path) -> None:
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    file = export.export_onnx(saved, tmp_path / "out")
    ids = torch.randint(2, 100, (3, 5), generator=torch.Generator().manual_seed(0))
    session = runtime.InferenceSession(str(file))
    (logits,) = session.run(None, {"input_ids": ids.numpy(), "attention_mask": torch.ones_like(ids).numpy()})
    expected = AutoModelForCausalLM.from_pretrained(saved)(ids).logits
    torch.testing.assert_close(torch.from_numpy(logits), expected.detach(), rtol=0, atol=1e-5)


@pytest.mark.filterwarnings("ignore")
def test_int8(saved: Path, tmp_path: Path) -> None:
    pytest.importorskip("torchao")
    export.export_int8(saved, tmp_path / "out")
    ids = torch.arange(1, 9)[None]
    one, other = (AutoModelForCausalLM.from_pretrained(folder)(ids).logits for folder in (saved, tmp_path / "out"))
    assert not torch.equal(one, other)
    assert (one - other).abs().max() < 0.05 * one.abs().max()
