"""Repeat the step: what each rank of a training run does, from the model's first weight to the last report."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import chain, islice
from math import isfinite
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from meshloom.errors import PlanError, RunFailed
from meshloom.model.build import build_model, example_batch, num_parameters
from meshloom.model.config import Objective
from meshloom.model.pretrained import check_weights, fill_from
from meshloom.model.step import Batch, make_optimizer, train_step
from meshloom.model.weights import Fill, build_part
from meshloom.parallel.apply import check_plan
from meshloom.parallel.data import data_parallel, settle_buckets
from meshloom.parallel.launch import rank_context
from meshloom.parallel.mesh import Mesh, make_mesh
from meshloom.parallel.pipeline import Pipeline
from meshloom.parallel.placement import Placed
from meshloom.plan import Plan
from meshloom.train.checkpoint import Checkpoints, TrainingState, check_architecture
from meshloom.train.data import Document, batches
from meshloom.train.metrics import Reporter

# A hook for each rank: given the mesh and the model, it returns what stands around step number s. Capture is one.
AroundStep = Callable[[Mesh, nn.Module], Callable[[int], AbstractContextManager[None]]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What is trained, on what; `batch_size` is that of one rank's micro-batch."""

    config: Any
    objective: Objective
    tokenizer: Any
    documents: list[Document]
    plan: Plan
    max_steps: int
    batch_size: int
    seq_length: int
    learning_rate: float
    weight_decay: float
    max_grad_norm: float
    seed: int
    save_steps: int = 0  # 0: never
    keep_last: int | None = None
    save_initial: bool = False
    resume: str | None = None  # the checkpoint to go on from
    weights: str | None = None  # the folder of the weights to begin with, random ones if None
    shard_cache: str | None = None  # where each rank's part of them is kept


def check_job(job: Job, available_bytes: int | None) -> int:
    """How many parameters the model has; raises if the plan, the length or the memory cannot be, before any process.

    Memory counts weights, gradients and two states of Adam in float32: 16 bytes a parameter on each rank.
    """
    limit = getattr(job.config, "max_position_embeddings", None)
    if limit is not None and job.seq_length > limit:
        raise PlanError(f"--seq-length {job.seq_length}: expected at most {limit}, the positions that the model has")
    model = build_model(job.config, job.objective, seed=job.seed, device="meta")
    check_plan(model, job.plan, example_batch(job.objective, micro_batch=1, seq_length=8, device="meta"))
    if job.resume is not None:
        check_architecture(Path(job.resume), model)
    elif job.weights is not None:
        check_weights(Path(job.weights), model)
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
        saved = _checkpoints(job, Path(folder) / "checkpoints", inner, optimizer, mesh)
        begun = saved.load(Path(job.resume)) if saved and job.resume else TrainingState(step=0, plan=job.plan)
        if saved and job.save_initial and not begun.step:
            saved.export("initial_model")
        model = data_parallel(inner, mesh)
        around = (
            around_step(mesh, inner.model if isinstance(inner, Pipeline) else inner)
            if around_step is not None
            else lambda step: nullcontext()
        )
        per_step = job.plan.dp * job.plan.num_micro_batches * job.batch_size
        read = begun.data.get("sequences", 0)  # by all ranks, before this step
        steps = _micro_batches(job, mesh, read)
        if begun.step:
            first = next(steps)
            settle_buckets(model, first[0])
            steps = chain([first], steps)
        stream = enumerate(steps, start=begun.step)
        with Reporter(
            Path(folder),
            max_steps=job.max_steps,
            tokens_per_step=per_step * job.seq_length,
            show=rank_zero_shows and mesh.rank == 0,
            first_step=begun.step,
        ) as reporter:
            for step, micro_batches in islice(stream, max(0, job.max_steps - begun.step)):
                context = around(step)
                recorded = not isinstance(context, nullcontext)
                if saved and recorded:
                    saved.wait()  # its collectives are no part of the step
                with context:
                    loss = train_step(model, optimizer, micro_batches, mesh=mesh, max_grad_norm=job.max_grad_norm)
                mean = float(_mean_over_data_parallel(loss, mesh))
                if not isfinite(mean):
                    raise RunFailed(f"step {step + 1}: the loss is {mean} on rank {mesh.rank}; lower --learning-rate")
                reporter.step(step, mean, recorded=recorded)
                read += per_step
                if saved and job.save_steps and ((step + 1) % job.save_steps == 0 or step + 1 == job.max_steps):
                    saved.save(step + 1, data={"sequences": read})
        if saved:
            saved.wait()


def _checkpoints(
    job: Job, folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, mesh: Mesh
) -> Checkpoints | None:
    """What saves and loads this run, None if it does neither."""
    if not (job.save_steps or job.resume):
        return None
    whole = build_model(job.config, job.objective, seed=job.seed, device="meta")
    return Checkpoints(
        folder,
        whole=whole,
        model=model,
        optimizer=optimizer,
        mesh=mesh,
        tokenizer=job.tokenizer,
        keep=job.keep_last,
    )


def _build(job: Job, mesh: Mesh) -> nn.Module:
    fill: Fill | None = None
    if job.resume is not None:
        fill = _leave  # the checkpoint follows
    elif job.weights is not None:
        whole = build_model(job.config, job.objective, seed=job.seed, device="meta")
        cache = None if job.shard_cache is None else Path(job.shard_cache)
        fill = fill_from(Path(job.weights), whole, mesh=mesh, cache=cache)
    model = build_part(job.config, job.objective, mesh=mesh, seed=job.seed, fill=fill).train()
    # Ranks of one tensor-parallel group draw the same dropout masks, or their copies of the residual would part.
    torch.manual_seed(job.seed + 1 + mesh.index("dp"))
    return model


def _leave(held: Mapping[str, Placed]) -> None:
    """Fill nothing."""


def _micro_batches(job: Job, mesh: Mesh, read: int) -> Iterator[list[Batch]]:
    """This rank's micro-batches of each step, after the first `read` sequences of the stream of all ranks."""
    batch = job.batch_size * mesh.degree("dp")
    if read % batch:
        raise PlanError(
            f"resume: expected batches of all ranks that divide the {read} sequences read so far, got {batch}; "
            "use the batch size and data-parallel degree of before, or others that divide it"
        )
    stream = batches(
        job.documents,
        job.tokenizer,
        job.objective,
        seq_length=job.seq_length,
        batch_size=job.batch_size,
        rank=mesh.index("dp"),
        num_ranks=mesh.degree("dp"),
        seed=job.seed,
    )
    stream = islice(stream, read // batch, None)
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
