"""Run by the tests in a process of its own: real gloo ranks that run the steps of every case, each one recorded."""

from __future__ import annotations

import sys
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn

from meshloom.capture.record import Recorder
from meshloom.generate.engine import generate
from meshloom.generate.sample import Sampling
from meshloom.model.config import objective_of
from meshloom.model.layout import lay_out_for_one_row
from meshloom.model.scale import LossScale
from meshloom.model.step import Batch, make_optimizer, train_step
from meshloom.model.weights import build_part, inner_model
from meshloom.parallel.data import data_parallel
from meshloom.parallel.launch import rank_context, run_ranks
from meshloom.parallel.mesh import Mesh, axis_groups, make_mesh
from tests.agreement.cases import CASES, MICRO_BATCH, NUM_INPUT, NUM_OUTPUT, SEQ_LENGTH, Case

_RECORDED = 2  # the step that is recorded: the first lays buckets and makes states


def run(folder: str, world_size: int) -> None:
    """On each rank: every case that needs as many ranks."""
    with rank_context("cpu") as device:
        for name, case in CASES.items():
            if case.plan.world_size == world_size:
                mesh = make_mesh(case.plan, device)
                (_generate if case.generates else _train)(case, mesh, Path(folder) / name)


def _recorder(folder: Path, model: nn.Module, mesh: Mesh, step: int) -> Recorder:
    return Recorder(folder, step=step, model=inner_model(model), axes=axis_groups(mesh.plan, mesh.rank))


def _train(case: Case, mesh: Mesh, folder: Path) -> None:
    objective = objective_of(case.config)
    options = dict(case.options)
    model = build_part(case.config, objective, mesh=mesh, seed=0).train()
    shared_by = mesh.groups["dp"] if options.pop("zero", 0) else None
    optimizer = make_optimizer(model, learning_rate=1e-3, weight_decay=0.1, shared_by=shared_by)
    around = _recorder(folder, model, mesh, _RECORDED)
    whole = data_parallel(model, mesh)
    scale = LossScale(mesh.device) if options.get("precision") == "fp16" else None
    for step in range(_RECORDED + 1):
        batches = [_batch(objective, mesh, step, number) for number in range(case.plan.num_micro_batches)]
        with around(step):
            train_step(whole, optimizer, batches, mesh=mesh, max_grad_norm=1.0, scale=scale, **options)


def _batch(objective: str, mesh: Mesh, step: int, number: int) -> Batch:
    seed = 100 * step + 10 * number + mesh.index("dp")
    ids = torch.randint(101, (MICRO_BATCH, SEQ_LENGTH), generator=torch.Generator().manual_seed(seed))
    batch = {"input_ids": ids, "labels": ids.clone()}
    if objective == "masked":
        batch["attention_mask"] = torch.ones_like(ids)
        batch["attention_mask"][0, -2:] = 0  # a mask that hides nothing is dropped, which synthesis cannot see
    return batch


def _generate(case: Case, mesh: Mesh, folder: Path) -> None:
    model: Any = build_part(case.config, "causal", mesh=mesh, seed=0).eval()
    lay_out_for_one_row(model.requires_grad_(False))
    prompt = [list(range(3, 3 + NUM_INPUT))]
    records = {
        step: _recorder(folder / name, model, mesh, step) for step, name in ((0, "prefill"), (2, "decode"))
    }  # as the command does

    def around(step: int) -> AbstractContextManager[None]:
        return records[step](step) if step in records else nullcontext()

    for wrapped in (lambda step: nullcontext(), around):  # what only happens the first time is no part of a trace
        generate(model, prompt, mesh=mesh, max_new_tokens=NUM_OUTPUT, sampling=Sampling(), around=wrapped)


if __name__ == "__main__":
    where, count = sys.argv[1], int(sys.argv[2])
    run_ranks(run, where, count, num_ranks=count, log_dir=Path(where) / f"logs{count}")
