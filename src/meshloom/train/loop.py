"""Repeat the step: what each rank of a training run does, from the model's first weight to the last report."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import islice
from math import isfinite
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from meshloom.errors import PlanError, RunFailed
from meshloom.model.build import build_model, example_batch, num_parameters
from meshloom.model.config import Objective
from meshloom.model.step import Batch, make_optimizer, train_step
from meshloom.parallel.apply import check_plan, parallelize
from meshloom.parallel.data import data_parallel
from meshloom.parallel.launch import rank_context
from meshloom.parallel.mesh import Mesh, make_mesh
from meshloom.parallel.pipeline import Pipeline
from meshloom.plan import Plan
from meshloom.train.data import Stream, batches
from meshloom.train.metrics import Reporter

# A hook for each rank: given the mesh and the model, it returns what stands around step number s. Capture is one.
AroundStep = Callable[[Mesh, nn.Module], Callable[[int], AbstractContextManager[None]]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What is trained, on what; `batch_size` is that of one rank's micro-batch.

    `stream` is None until the data is tokenised, which comes after every check that is cheaper.
    """

    config: Any
    objective: Objective
    tokenizer: Any
    plan: Plan
    max_steps: int
    batch_size: int
    seq_length: int
    learning_rate: float
    weight_decay: float
    max_grad_norm: float
    seed: int
    stream: Stream | None = None


def check_job(job: Job, available_bytes: int | None) -> int:
    """How many parameters the model has; raises if the plan, the length or the memory cannot be, before any process.

    Memory counts weights, gradients and two states of Adam in float32: 16 bytes a parameter on each rank.
    """
    limit = getattr(job.config, "max_position_embeddings", None)
    if limit is not None and job.seq_length > limit:
        raise PlanError(f"--seq-length {job.seq_length}: expected at most {limit}, the positions that the model has")
    model = build_model(job.config, job.objective, seed=job.seed, device="meta")
    check_plan(model, job.plan, example_batch(job.objective, micro_batch=1, seq_length=8, device="meta"))
    needed = 16 * num_parameters(model) * job.plan.dp
    if available_bytes is not None and needed > available_bytes:
        raise PlanError(
            f"plan {job.plan}: {job.plan.world_size} ranks need about {needed / 1e9:.1f} GB for weights, "
            f"gradients and optimizer, this host has {available_bytes / 1e9:.1f} GB free; use fewer ranks"
        )
    return num_parameters(model)


def train_rank(job: Job, folder: str, device: str, around_step: AroundStep | None, rank_zero_shows: bool) -> None:
    """Train on the calling rank, within an initialised environment of as many ranks as the plan has."""
    with rank_context(device) as chosen:
        mesh = make_mesh(job.plan, chosen)
        inner = _build(job, mesh)
        optimizer = make_optimizer(inner, learning_rate=job.learning_rate, weight_decay=job.weight_decay)
        model = data_parallel(inner, mesh)
        around = (
            around_step(mesh, inner.model if isinstance(inner, Pipeline) else inner)
            if around_step is not None
            else lambda step: nullcontext()
        )
        tokens_per_step = job.plan.dp * job.plan.num_micro_batches * job.batch_size * job.seq_length
        show = rank_zero_shows and mesh.rank == 0
        with Reporter(Path(folder), max_steps=job.max_steps, tokens_per_step=tokens_per_step, show=show) as reporter:
            for step, micro_batches in enumerate(islice(_micro_batches(job, mesh), job.max_steps)):
                context = around(step)
                with context:
                    loss = train_step(model, optimizer, micro_batches, mesh=mesh, max_grad_norm=job.max_grad_norm)
                mean = float(_mean_over_data_parallel(loss, mesh))
                if not isfinite(mean):
                    raise RunFailed(f"step {step + 1}: the loss is {mean} on rank {mesh.rank}; lower --learning-rate")
                reporter.step(step, mean, recorded=not isinstance(context, nullcontext))


def _build(job: Job, mesh: Mesh) -> nn.Module:
    model = build_model(job.config, job.objective, seed=job.seed)
    model.to(mesh.device)
    model = parallelize(
        model, plan=job.plan, mesh=mesh, example=example_batch(job.objective, micro_batch=1, seq_length=8)
    )
    model.to(mesh.device).train()
    # Ranks of one tensor-parallel group draw the same dropout masks, or their copies of the residual would part.
    torch.manual_seed(job.seed + 1 + mesh.index("dp"))
    return model


def _micro_batches(job: Job, mesh: Mesh) -> Iterator[list[Batch]]:
    assert job.stream is not None
    stream = batches(
        job.stream, batch_size=job.batch_size, rank=mesh.index("dp"), num_ranks=mesh.degree("dp"), first_sequence=0
    )
    while True:
        yield [_to(batch, mesh.device) for batch in islice(stream, job.plan.num_micro_batches)]


def _to(batch: Batch, device: torch.device) -> Mapping[str, Tensor]:
    return {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}


def _mean_over_data_parallel(loss: Tensor, mesh: Mesh) -> Tensor:
    group = mesh.groups.get("dp")
    if group is None:
        return loss
    total = loss.clone()
    dist.all_reduce(total, group=group)
    return total / mesh.degree("dp")
