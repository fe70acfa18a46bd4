"""Recompute changes what is kept, never what comes out."""

from __future__ import annotations

import copy
from collections import Counter
from typing import Any, get_args

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import GPT2Config, LlamaConfig

from meshloom.model.build import build_model
from meshloom.parallel.flow import find_layers
from meshloom.parallel.recompute import recompute
from meshloom.plan import Recompute

CONFIGS: dict[str, Any] = {
    "gpt2": GPT2Config(vocab_size=101, n_layer=3, n_head=4, n_embd=32, attn_implementation="eager"),
    "llama": LlamaConfig(vocab_size=101, num_hidden_layers=3, num_attention_heads=4, hidden_size=32,
                         intermediate_size=64),
}  # fmt: skip


def _run(family: str, mode: Recompute) -> tuple[list[torch.Tensor], int]:
    """All gradients, and how many bytes autograd kept for backward."""
    model = build_model(copy.deepcopy(CONFIGS[family]), "causal", seed=1).train()
    recompute(model, find_layers(model), mode)
    ids = torch.randint(101, (2, 16), generator=torch.Generator().manual_seed(2))
    kept: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    torch.manual_seed(3)  # dropout must be drawn alike when it is drawn again
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    return gradients, sum(size for place, size in kept.items() if place not in weights)


@pytest.mark.parametrize("family", CONFIGS)
def test_gradients_are_the_same(family: str) -> None:
    plain, _ = _run(family, "none")
    for mode in ("selective", "full"):
        again, _ = _run(family, mode)
        for one, other in zip(plain, again, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-6 * float(one.abs().max()))


def test_less_is_kept() -> None:
    """Seen from outside of the layers, whose inputs alone are kept by `full`."""
    _, none = _run("gpt2", "none")
    _, full = _run("gpt2", "full")
    assert full < none / 2


class _Products(TorchDispatchMode):
    """Counts products with weights, and those of activations."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def test_selective_repeats_attention_and_no_linear_layer() -> None:
    counts = {}
    for mode in get_args(Recompute):
        with _Products() as seen:
            _run("gpt2", mode)
        counts[mode] = seen.count
    assert counts["selective"]["addmm"] == counts["none"]["addmm"] == 12, "four linear layers in each of three"
    assert counts["full"]["addmm"] == 24
    assert counts["none"]["_softmax"] == 3
    assert counts["selective"]["_softmax"] == counts["full"]["_softmax"] == 6
