"""A model on one device, from a folder of its weights, for others to run: as ONNX, or with int8 weights.

Both are done by the libraries that own the formats; where one is missing, the extra that brings it is named.
"""

from __future__ import annotations

import importlib.util
import logging
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from meshloom.errors import MeshloomError, ModelError, UsageError


def export_onnx(folder: Path, out: Path) -> Path:
    """Write `out`/model.onnx: input_ids and attention_mask (batch, sequence) int64 -> logits (batch, sequence, V).

    The whole sequence is computed, without a cache. Raises UsageError where onnx is missing, ModelError where the model
    cannot be loaded or followed.
    """
    _need("onnxscript", "onnx")
    model = _opened(folder)
    batch, sequence = torch.export.Dim("batch"), torch.export.Dim("sequence")
    ids = torch.ones(2, 8, dtype=torch.long)
    sizes = {0: batch, 1: sequence}
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the exporter, on names that it does not use
            program = torch.onnx.export(
                _OnlyLogits(model).eval(),
                (ids, torch.ones_like(ids)),
                dynamo=True,
                dynamic_shapes=(sizes, sizes),
                input_names=["input_ids", "attention_mask"],
                output_names=["logits"],
                verbose=False,
            )
    except Exception as error:  # of an exporter that meets other people's forwards
        said = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(f"{folder}: expected a forward that torch.onnx can follow, but {said}") from error
    assert program is not None
    out.mkdir(parents=True, exist_ok=True)
    program.save(str(out / "model.onnx"), external_data=_bytes(model) > 1 << 30)  # protobuf ends at 2 GiB
    _copy_beside(folder, model, out)
    return out / "model.onnx"


def export_int8(folder: Path, out: Path) -> Path:
    """Write `out`, a Hugging Face folder whose linear layers have int8 weights with a scale a row (torchao).

    Raises UsageError where torchao is missing, ModelError where the model cannot be loaded.
    """
    _need("torchao", "quantize")
    for name in ("torchao", "torch.utils._pytree"):  # on kernels of devices that are not here
        logging.getLogger(name).setLevel(logging.ERROR)
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    model = _opened(folder, quantization_config=TorchAoConfig(Int8WeightOnlyConfig()))
    out.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(out)
    _copy_beside(folder, model, out)
    return out


def export_folder(folder: Path, out: Path) -> Path:
    """Write `out`, a Hugging Face folder with the weights of `folder` and nothing of the training that made them."""
    model = _opened(folder)
    out.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(out)
    _copy_beside(folder, model, out)
    return out


class _OnlyLogits(nn.Module):
    """The model with tensors in and one tensor out."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        logits: Tensor = self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits
        return logits


def _need(module: str, extra: str) -> None:
    if importlib.util.find_spec(module) is None:
        raise UsageError(f"expected {module}, which is not installed; pip install 'meshloom[{extra}]'")


def _opened(folder: Path, **options: Any) -> Any:
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        return AutoModelForCausalLM.from_pretrained(
            folder, local_files_only=True, use_safetensors=True, dtype=torch.float32, **options
        ).eval()
    except MeshloomError:
        raise
    except Exception as error:  # transformers' errors are of many kinds; all mean: not a model of its own
        said = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(f"{folder}: expected a folder with a causal language model, got '{said}'") from error


def _copy_beside(folder: Path, model: Any, out: Path) -> None:
    """The config and the tokenizer, if there is one."""
    model.config.save_pretrained(out)
    if any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json")):
        AutoTokenizer.from_pretrained(folder, local_files_only=True).save_pretrained(out)


def _bytes(model: nn.Module) -> int:
    return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
