"""Build a model from its config, with random weights, on any device (meta and fake ones too)."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM
from transformers.utils import logging as transformers_logging

from meshloom.errors import ModelError
from meshloom.model.config import Objective

_HEADS = {"causal": AutoModelForCausalLM, "masked": AutoModelForMaskedLM}


def build_model(config: Any, objective: Objective, *, seed: int, device: torch.device | str = "cpu") -> nn.Module:
    """The model with the head for `objective`, float32, initialised from `seed`; raises ModelError.

    Equal seeds give equal weights on every rank.
    """
    transformers_logging.set_verbosity_error()  # what it has to say about a config is for its maintainers
    torch.manual_seed(seed)
    try:
        with torch.device(device):
            model: nn.Module = _HEADS[objective].from_config(config, dtype=torch.float32)
    except (ValueError, TypeError, AttributeError, ImportError) as error:
        raise ModelError(
            f"{config.model_type}: transformers cannot build the model: {str(error).splitlines()[0]}"
        ) from error
    return ask_no_padding(model)


def ask_no_padding(model: nn.Module) -> nn.Module:
    """Let the model's parts no longer read ids from the device at every step, only to warn of padding without a mask.

    Padding is told by our masks; and tensors without data have nothing to read. Returns the model.
    """
    for module in model.modules():
        if hasattr(type(module), "warn_if_padding_and_no_attention_mask"):
            vars(module)["warn_if_padding_and_no_attention_mask"] = _no_warning
    return model


def _no_warning(*args: Any, **kwargs: Any) -> None:
    """Say nothing."""


def num_parameters(model: nn.Module) -> int:
    """How many parameters the model has; tied ones count once."""
    return sum(parameter.numel() for parameter in model.parameters())


def example_batch(
    objective: Objective, *, micro_batch: int, seq_length: int, device: torch.device | str = "cpu"
) -> Mapping[str, Tensor]:
    """A batch of the shape and dtypes that training feeds for `objective`, filled with zeros: (B, S) int64 each."""
    ids = torch.zeros(micro_batch, seq_length, dtype=torch.long, device=device)
    batch = {"input_ids": ids, "labels": ids.clone()}
    if objective == "masked":
        batch["attention_mask"] = torch.ones_like(ids)
    return batch


def flops_per_token(config: Any, objective: Objective, *, seq_length: int) -> float:
    """FLOPs of one token of a training step, counted on a forward of fake tensors; backward is twice as much.

    The products of the model, attention without its causal half, and no recomputation: what MFU is defined by
    (Chowdhery et al. 2022, appendix B).
    """
    config = copy.deepcopy(config)
    config.use_cache = True  # without it, some forwards look into position ids, which have no values here
    model = build_model(config, objective, seed=0, device="meta")
    batch = example_batch(objective, micro_batch=1, seq_length=seq_length, device="meta")
    with FlopCounterMode(display=False) as counter:
        model(**batch)
    return 3.0 * float(counter.get_total_flops()) / seq_length
