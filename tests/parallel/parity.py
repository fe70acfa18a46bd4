"""Run by test_parity.py in a process of its own: a model on two tensor-parallel ranks against itself on one.

Prints a JSON line: for each family the losses and, for each parameter, its worst gradient error relative to the
gradient's own scale.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from transformers import BertConfig, GPT2Config, LlamaConfig, OPTConfig, PretrainedConfig

from meshloom.model.build import build_model
from meshloom.model.config import objective_of
from meshloom.parallel.apply import clip_gradients, parallelize
from meshloom.parallel.launch import rank_context, run_ranks
from meshloom.parallel.mesh import make_mesh
from meshloom.parallel.shard import shard_of
from meshloom.plan import Plan

SMALL = {"vocab_size": 101, "num_hidden_layers": 2, "num_attention_heads": 4}
FAMILIES: dict[str, PretrainedConfig] = {
    "gpt2": GPT2Config(vocab_size=101, n_layer=2, n_head=4, n_embd=32, attn_pdrop=0, resid_pdrop=0, embd_pdrop=0),
    "bert": BertConfig(
        **SMALL, hidden_size=32, intermediate_size=64, attention_probs_dropout_prob=0, hidden_dropout_prob=0,
        architectures=["BertForMaskedLM"],
    ),
    "llama, fewer key-value heads": LlamaConfig(**SMALL, hidden_size=32, intermediate_size=48, num_key_value_heads=2),
    "opt": OPTConfig(**SMALL, hidden_size=32, ffn_dim=64, dropout=0, word_embed_proj_dim=32),
}  # fmt: skip


def compare(out: str, spoil: bool) -> None:
    """On each rank; rank 0 writes what both found."""
    with rank_context("cpu") as device:
        mesh = make_mesh(Plan(tp=2), device)
        found = {}
        for name, config in FAMILIES.items():
            objective = objective_of(config)
            serial = build_model(config, objective, seed=1).double()
            cut = parallelize(build_model(config, objective, seed=1).double(), plan=mesh.plan, mesh=mesh)
            if spoil:
                for parameter in cut.parameters():
                    if shard_of(parameter) is not None:
                        parameter.data *= 1 + 0.1 * mesh.rank
            ids = torch.randint(101, (3, 9), generator=torch.Generator().manual_seed(2))
            losses = [model(input_ids=ids, labels=ids).loss for model in (serial, cut)]
            for loss in losses:
                loss.backward()
            wholes = dict(serial.named_parameters())
            scale = max(float(p.grad.abs().max()) for p in wholes.values() if p.grad is not None)
            errors = {}
            for path, parameter in cut.named_parameters():
                whole, shard = wholes[path].grad, shard_of(parameter)
                mine = whole if shard is None else shard.take(whole, mesh.index("tp"), 2)
                # a gradient that is zero by symmetry (a key's bias) is compared to the model's scale
                own = max(float(mine.abs().max()), 1e-6 * scale)
                errors[path] = float((parameter.grad - mine).abs().max()) / own
            worst = torch.tensor([max(errors.values())], dtype=torch.double)
            torch.distributed.all_reduce(worst, torch.distributed.ReduceOp.MAX)
            norms = [float(clip_gradients(serial, 1e9, mesh)), float(clip_gradients(cut, 1e9, mesh))]
            num_cut = sum(shard_of(parameter) is not None for parameter in cut.parameters())
            found[name] = {"losses": [float(loss) for loss in losses], "worst": float(worst), "norms": norms,
                           "num_cut": num_cut, "num_parameters": len(errors)}  # fmt: skip
        if mesh.rank == 0:
            Path(out).write_text(json.dumps(found))


if __name__ == "__main__":
    run_ranks(compare, sys.argv[1], "--spoil" in sys.argv, num_ranks=2, log_dir=Path(sys.argv[1]).parent / "logs")
