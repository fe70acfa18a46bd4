"""Repeat the step: what each rank of a training run does, from the model's first weight to the last report."""

from __future__ import annotations

import resource
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import chain, islice
from math import isfinite
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from meshloom.errors import PlanError, RunFailed
from meshloom.model.build import build_model, example_batch, num_parameters
from meshloom.model.config import Objective
from meshloom.model.pretrained import check_weights, fill_from
from meshloom.model.step import Batch, Precision, StepResult, make_optimizer, train_step
from meshloom.model.weights import Fill, build_part
from meshloom.parallel.apply import check_plan
from meshloom.parallel.data import data_parallel, settle_buckets
from meshloom.parallel.launch import rank_context
from meshloom.parallel.mesh import Mesh, make_mesh
from meshloom.parallel.pipeline import Pipeline
from meshloom.parallel.placement import Placed
from meshloom.plan import Plan
from meshloom.train.checkpoint import Checkpoints, TrainingState, check_architecture
from meshloom.train.data import Stream, batches
from meshloom.train.metrics import Reporter
from meshloom.train.optim import LearningRateSchedule, learning_rate, set_learning_rate
from meshloom.train.runs import is_asked_to_stop

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
    save_steps: int = 0  # 0: never
    keep_last: int | None = None
    save_initial: bool = False
    resume: str | None = None  # the checkpoint to go on from
    weights: str | None = None  # the folder of the weights to begin with, random ones if None
    shard_cache: str | None = None  # where each rank's part of them is kept
    lr_schedule: LearningRateSchedule = "constant"
    warmup_steps: int = 0
    log_steps: int = 1
    precision: Precision = "fp32"

    def rate(self, step: int) -> float:
        """The learning rate of step `step`, counted from 0."""
        return learning_rate(
            self.lr_schedule, step, peak=self.learning_rate, warmup_steps=self.warmup_steps, num_steps=self.max_steps
        )


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
        saves = _checkpoints(job, Path(folder) / "checkpoints", inner, optimizer, mesh)
        begun = saves.load(Path(job.resume)) if job.resume else TrainingState(step=0, plan=job.plan)
        if job.save_steps and job.save_initial and not begun.step:
            saves.export("initial_model")
        model = data_parallel(inner, mesh)
        around = (
            around_step(mesh, inner.model if isinstance(inner, Pipeline) else inner)
            if around_step is not None
            else lambda step: nullcontext()
        )
        _repeat(job, Path(folder), model, optimizer, mesh, around, saves, begun, rank_zero_shows)
        saves.wait()


def _repeat(
    job: Job,
    folder: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    mesh: Mesh,
    around: Callable[[int], AbstractContextManager[None]],
    saves: Checkpoints,
    begun: TrainingState,
    show: bool,
) -> None:
    """Step after step, until all are done or the run is asked to stop."""
    per_step = job.plan.dp * job.plan.num_micro_batches * job.batch_size
    read = begun.data.get("sequences", 0)  # by all ranks, before this step
    steps = _micro_batches(job, mesh, read)
    if begun.step:
        first = next(steps)
        settle_buckets(model, first[0])
        steps = chain([first], steps)
    stream = enumerate(steps, start=begun.step)
    tokens = per_step * job.seq_length
    stores = mesh.rank == 0
    reporter = Reporter(
        folder,
        max_steps=job.max_steps,
        tokens_per_step=tokens,
        store=stores,
        show=stores and show,
        first_step=begun.step,
    )
    with reporter:
        for step, micro_batches in islice(stream, max(0, job.max_steps - begun.step)):
            context = around(step)
            recorded = not isinstance(context, nullcontext)
            if recorded:
                saves.wait()  # its collectives are no part of the step
            rate = job.rate(step)
            set_learning_rate(optimizer, rate)
            with context:
                result = train_step(
                    model, optimizer, micro_batches, mesh=mesh, max_grad_norm=job.max_grad_norm, precision=job.precision
                )
            read += per_step
            done = step + 1
            due = done == job.max_steps or bool(job.save_steps and done % job.save_steps == 0)
            if done % job.log_steps and step != begun.step and not due and not recorded:
                continue  # nothing is read from the device, so that it need not wait for us
            told = _agree(result, mesh, stop=mesh.rank == 0 and is_asked_to_stop(folder))
            if not isfinite(told.loss):  # the weights are lost by now; the newest checkpoint is from before
                raise RunFailed(f"step {done}: the loss is {told.loss} on rank {told.bad_rank}; lower --learning-rate")
            norm = None if result.grad_norm is None else float(result.grad_norm)
            memory = _most_memory(mesh.device)
            reporter.step(step, told.loss, learning_rate=rate, grad_norm=norm, memory_bytes=memory, recorded=recorded)
            if (job.save_steps and due) or told.stop:
                saves.save(done, data={"sequences": read})
            if told.stop:
                break


class _Told(NamedTuple):
    """What all ranks know of a step: the mean loss, the first rank whose loss is no number, whether to end."""

    loss: float
    bad_rank: int
    stop: bool


def _agree(result: StepResult, mesh: Mesh, *, stop: bool) -> _Told:
    """Tell every rank of every rank's loss, and whether rank 0 was asked to end; reads from the device."""
    mine = torch.stack([result.loss.double(), torch.tensor(float(stop), dtype=torch.double, device=mesh.device)])
    everyone = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(everyone, mine)
    losses, stops = torch.stack(everyone).t().tolist()
    bad = [rank for rank, loss in enumerate(losses) if not isfinite(loss)]
    # ranks that differ in tensor and pipeline parallel only have the same loss
    return _Told(sum(losses) / len(losses), bad[0] if bad else -1, any(stops))


def _most_memory(device: torch.device) -> int:
    """The most bytes that this rank held at once: of the device, or of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _checkpoints(job: Job, folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, mesh: Mesh) -> Checkpoints:
    """What saves and loads this run."""
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
    assert job.stream is not None
    stream = batches(
        job.stream,
        batch_size=job.batch_size,
        rank=mesh.index("dp"),
        num_ranks=mesh.degree("dp"),
        first_sequence=read,
    )
    while True:
        yield [_to(batch, mesh.device) for batch in islice(stream, job.plan.num_micro_batches)]


def _to(batch: Batch, device: torch.device) -> Mapping[str, Tensor]:
    return {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}
