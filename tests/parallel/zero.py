"""Run by test_zero.py in a process of its own: ZeRO-1 beside the plain optimizer on the same data-parallel ranks.

In float64, three steps each; then what a checkpoint of the shared states holds. Rank 0 writes the distances as JSON.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from meshloom.model.build import build_model
from meshloom.model.step import make_optimizer, train_step
from meshloom.parallel.apply import cut_model
from meshloom.parallel.certify import InDouble
from meshloom.parallel.data import data_parallel
from meshloom.parallel.launch import rank_context, run_ranks
from meshloom.parallel.mesh import Mesh, make_mesh
from meshloom.plan import Plan
from meshloom.train.checkpoint import Checkpoints
from tests.synth.steps import config

_STEPS = 3


def compare(out: str, plan: str) -> None:
    """On each rank: the same steps with and without; and each's checkpoint, read by the other."""
    with rank_context("cpu") as device:
        mesh = make_mesh(Plan.parse(plan), device)
        found: dict[str, Any] = {}
        for family in ("gpt2", "llama"):
            plain, shared = (_Run(family, mesh, zero=zero, folder=Path(out).parent) for zero in (False, True))
            for number in range(_STEPS):
                norms = [float(run.step(number)) for run in (plain, shared)]
            held = [sum(value.numel() for state in run.optimizer.state.values() for value in state.values())
                    for run in (plain, shared)]  # fmt: skip
            found[family] = {"weights": _worst(plain, shared), "norms": norms, "states": held}
            for run, name in ((plain, "plain"), (shared, "shared")):
                run.saves.save(_STEPS, data={"name": name}, wait=True)
            crossed = [_Run(family, mesh, zero=zero, folder=Path(out).parent, seed=5) for zero in (False, True)]
            for run, other in zip(crossed, (shared, plain)):
                run.saves.load(other.saves.folder / f"checkpoint-{_STEPS}")
            for run in (plain, *crossed):
                run.step(_STEPS)
            found[family]["crossed"] = [_worst(plain, run) for run in crossed]
        if mesh.rank == 0:
            Path(out).write_text(json.dumps(found))


class _Run:
    def __init__(self, family: str, mesh: Mesh, *, zero: bool, folder: Path, seed: int = 1) -> None:
        made = config(family, 2, attention_dropout=0.0) if family == "llama" else config(family, 2)
        for name in ("attn_pdrop", "resid_pdrop", "embd_pdrop"):
            if hasattr(made, name):
                setattr(made, name, 0.0)
        whole = build_model(made, "causal", seed=seed, device="meta")
        cut = cut_model(build_model(made, "causal", seed=seed).double(), plan=mesh.plan, mesh=mesh).train()
        self.mesh, self.cut = mesh, cut
        group = mesh.groups["dp"] if zero else None
        self.optimizer = make_optimizer(cut, learning_rate=1e-2, weight_decay=0.1, shared_by=group)
        self.saves = Checkpoints(
            folder / f"{family}.{zero}.{seed}", whole=whole, model=cut, optimizer=self.optimizer, mesh=mesh
        )
        self.model: nn.Module = data_parallel(cut, mesh)

    def step(self, number: int) -> Tensor:
        """One step on this rank's batch; the norm of the gradients."""
        generator = torch.Generator().manual_seed(10 * number + self.mesh.index("dp"))
        ids = torch.randint(101, (2, 12), generator=generator)
        with InDouble():
            norm = train_step(
                self.model, self.optimizer, [{"input_ids": ids, "labels": ids}], mesh=self.mesh, max_grad_norm=0.3
            ).grad_norm
        assert norm is not None
        return norm


def _worst(one: _Run, other: _Run) -> float:
    """How far apart the weights of two runs are on any rank, relative to their own scale."""
    pairs = zip(one.cut.parameters(), other.cut.parameters(), strict=True)
    worst = torch.stack([(a - b).detach().abs().max() / a.detach().abs().max() for a, b in pairs]).max()
    dist.all_reduce(worst, dist.ReduceOp.MAX)
    return float(worst)


if __name__ == "__main__":
    target, text = sys.argv[1:]
    run_ranks(compare, target, text, num_ranks=Plan.parse(text).world_size, log_dir=Path(target).parent / "logs")
