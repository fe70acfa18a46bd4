"""Run by test_parity.py in a process of its own: a model on tensor-parallel ranks against itself on one.

Prints a JSON line: for each family the losses and, for each parameter, its worst gradient error relative to the
gradient's own scale.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import BertConfig, GPT2Config, LlamaConfig, Olmo2Config, OPTConfig, PretrainedConfig

from meshloom.model.build import build_model
from meshloom.model.config import objective_of
from meshloom.parallel.apply import clip_gradients, parallelize
from meshloom.parallel.certify import InDouble
from meshloom.parallel.launch import rank_context, run_ranks
from meshloom.parallel.mesh import make_mesh
from meshloom.parallel.shard import shard_of
from meshloom.plan import Plan, Recompute

UNEVEN = {"vocab_size": 101, "num_hidden_layers": 2, "num_attention_heads": 6, "hidden_size": 48}
SMALL = {"vocab_size": 101, "num_hidden_layers": 2, "num_attention_heads": 4}
FAMILIES: dict[str, PretrainedConfig | None] = {
    "gpt2": GPT2Config(vocab_size=101, n_layer=2, n_head=4, n_embd=32, attn_pdrop=0, resid_pdrop=0, embd_pdrop=0),
    "bert": BertConfig(
        **SMALL, hidden_size=32, intermediate_size=64, attention_probs_dropout_prob=0, hidden_dropout_prob=0,
        architectures=["BertForMaskedLM"],
    ),
    "llama, fewer key-value heads": LlamaConfig(**SMALL, hidden_size=32, intermediate_size=48, num_key_value_heads=2),
    "opt": OPTConfig(**SMALL, hidden_size=32, ffn_dim=64, dropout=0, word_embed_proj_dim=32),
    "plain": None,
    "gpt2, uneven": GPT2Config(
        vocab_size=101, n_layer=2, n_head=6, n_embd=48, attn_pdrop=0, resid_pdrop=0, embd_pdrop=0, n_inner=37
    ),
    "llama, uneven": LlamaConfig(**UNEVEN, intermediate_size=33, num_key_value_heads=3),
    "olmo2, uneven": Olmo2Config(**UNEVEN, intermediate_size=33, num_key_value_heads=3),
    "llama, uneven groups": LlamaConfig(**UNEVEN, intermediate_size=33, num_key_value_heads=2),
}  # fmt: skip


class Plain(nn.Module):
    """A model written by hand whose loss does what no rule keeps cut: it gets the logits whole."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.rows, self.head = nn.Embedding(101, 32, padding_idx=100), nn.Linear(32, 101)
        self.up, self.down = nn.Linear(32, 64), nn.Linear(64, 32)

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> Any:
        """Loss and logits."""
        x = self.rows(input_ids)
        logits = self.head(x + self.down(self.up(x).relu())) * 0.5
        loss = None
        if labels is not None:
            flat = logits.view(-1, logits.size(-1))
            smooth = functional.cross_entropy(flat, labels.view(-1), label_smoothing=0.1)
            loss = smooth + flat[2:5].logsumexp(dim=-1).mean() + functional.cross_entropy(flat, labels.view(-1))
        return SimpleNamespace(loss=loss, logits=logits)


class _Sizes(TorchDispatchMode):
    """Notes the sizes of all dims of all results."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen: set[int] = set()
        self.normed: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.seen |= {size for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor) for size in leaf.shape}
        if func.overloadpacket.__name__ in ("native_layer_norm", "rsqrt"):
            self.normed |= {out[0].size(1)} if isinstance(out, tuple) else {out.size(1)}
        return out


def compare(out: str, plan: str, spoil: bool, families: list[str]) -> None:
    """On each rank; rank 0 writes what both found."""
    with rank_context("cpu") as device:
        text, _, mode = plan.partition("+")
        mesh = make_mesh(replace(Plan.parse(text), recompute=cast(Recompute, mode or "none")), device)
        found = {}
        for name in families or FAMILIES:
            config = FAMILIES[name]
            serial, cut = (Plain() if config is None else build_model(config, objective_of(config), seed=1)
                           for _ in range(2))  # fmt: skip
            serial, cut = serial.double(), parallelize(cut.double(), plan=mesh.plan, mesh=mesh)
            if spoil:
                for parameter in cut.parameters():
                    if shard_of(parameter) is not None:
                        parameter.data *= 1 + 0.1 * mesh.rank
            ids = torch.randint(101, (3, 10), generator=torch.Generator().manual_seed(2))
            with InDouble(), torch.no_grad():
                logits = [model(input_ids=ids).logits for model in (serial, cut)]
                logits.append(cut(input_ids=ids, labels=ids).logits.whole())
            with InDouble():
                losses = [serial(input_ids=ids, labels=ids).loss]
                losses[0].backward()
                with _Sizes() as sizes:
                    losses.append(cut(input_ids=ids, labels=ids).loss)
                    losses[1].backward()
            wholes = dict(serial.named_parameters())
            scale = max(float(p.grad.abs().max()) for p in wholes.values() if p.grad is not None)
            errors = {}
            for path, parameter in cut.named_parameters():
                whole, shard = wholes[path].grad, shard_of(parameter)
                mine = whole if shard is None else shard.take(whole, mesh.index("tp"), mesh.plan.tp)
                # a gradient that is zero by symmetry (a key's bias) is compared to the model's scale
                own = max(float(mine.abs().max()), 1e-6 * scale)
                errors[path] = float((parameter.grad - mine).abs().max()) / own
            worst = torch.tensor([max(errors.values())], dtype=torch.double)
            torch.distributed.all_reduce(worst, torch.distributed.ReduceOp.MAX)
            norms = [float(clip_gradients(model.parameters(), 1e9, mesh)) for model in (serial, cut)]
            num_cut = sum(shard_of(parameter) is not None for parameter in cut.parameters())
            differ = max(float((other - logits[0]).abs().max()) for other in logits[1:])
            found[name] = {"logits": differ, "saw_whole_vocabulary": 101 in sizes.seen,
                           "saw_part_of_sequence": 5 in sizes.normed,
                           "losses": [float(loss) for loss in losses], "worst": float(worst), "norms": norms,
                           "num_cut": num_cut, "num_parameters": len(errors)}  # fmt: skip
        if mesh.rank == 0:
            Path(out).write_text(json.dumps(found))


if __name__ == "__main__":
    target, plan, *rest = sys.argv[1:]
    families = [name for name in rest if name != "--spoil"]
    run_ranks(
        compare, target, plan, "--spoil" in rest, families,
        num_ranks=Plan.parse(plan.partition("+")[0]).world_size, log_dir=Path(target).parent / "logs",
    )  # fmt: skip
