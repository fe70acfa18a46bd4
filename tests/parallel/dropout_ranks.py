"""Run by test_dropout.py in a process of its own: what two tensor-parallel ranks drop, inside regions and outside."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.overrides import TorchFunctionMode
from transformers import BertConfig

from meshloom.model.build import build_model
from meshloom.parallel.apply import parallelize
from meshloom.parallel.launch import rank_context, run_ranks
from meshloom.parallel.mesh import make_mesh
from meshloom.plan import Plan


class _Masks(TorchFunctionMode):
    """Notes what each dropout drops, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.masks: list[torch.Tensor] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is torch.nn.functional.dropout:
            self.masks.append(((out == 0) & (args[0] != 0)).detach())
        return out


def watch(out: str, plan: str) -> None:
    """On each rank; rank 0 writes which masks were equal."""
    config = BertConfig(
        vocab_size=101, num_hidden_layers=2, num_attention_heads=4, hidden_size=32, intermediate_size=64,
        hidden_dropout_prob=0.5, attention_probs_dropout_prob=0.5, architectures=["BertForMaskedLM"],
        attn_implementation="eager",
    )  # fmt: skip
    with rank_context("cpu") as device:
        mesh = make_mesh(Plan.parse(plan), device)
        model = build_model(config, "masked", seed=1)
        model = parallelize(model, plan=mesh.plan, mesh=mesh).train()
        ids = torch.randint(101, (2, 8), generator=torch.Generator().manual_seed(2))
        losses, masks = [], []
        for _ in range(2):
            torch.manual_seed(5)
            with _Masks() as mode:
                losses.append(float(model(input_ids=ids, labels=ids).loss))
            masks.append(mode.masks)
        equal = []
        for first, again in zip(*masks, strict=True):
            parts = [torch.empty_like(first) for _ in range(2)]
            dist.all_gather(parts, first)
            equal.append({"ranks": torch.equal(*parts), "again": torch.equal(first, again), "any": bool(first.any())})
        everyone: list[Any] = [None, None]
        dist.all_gather_object(everyone, losses)
        if mesh.rank == 0:
            Path(out).write_text(json.dumps({"equal": equal, "losses": everyone}))


if __name__ == "__main__":
    _, target, wanted = sys.argv
    run_ranks(watch, target, wanted, num_ranks=2, log_dir=Path(target).parent / "logs")
