"""The noun `Job`: what is trained, on what and how; and the checks that come before any process is started."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from math import ceil
from pathlib import Path
from typing import Any

from meshloom.errors import PlanError
from meshloom.model.build import build_model, example_batch, num_parameters
from meshloom.model.config import Objective
from meshloom.model.pretrained import check_weights
from meshloom.model.step import Precision
from meshloom.parallel.apply import check_plan
from meshloom.plan import Plan
from meshloom.train.checkpoint import check_architecture
from meshloom.train.data import Stream
from meshloom.train.evaluate import Evaluation
from meshloom.train.optim import LearningRateSchedule, learning_rate

_SHORT = 100  # a run of so many steps is told step by step


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What is trained, on what; `batch_size` is that of one rank's micro-batch.

    `stream` is None until the data is tokenised, which comes after every check that is cheaper. `peak_flops` are those
    of one device in a second, 0 where it is not known, and then `flops_per_token` is 0 too.
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
    evaluation: Evaluation | None = None
    save_steps: int = 0  # 0: never
    keep_last: int | None = None
    save_initial: bool = False
    resume: str | None = None  # the checkpoint to go on from
    weights: str | None = None  # the folder of the weights to begin with, random ones if None
    shard_cache: str | None = None  # where each rank's part of them is kept
    lr_schedule: LearningRateSchedule = "constant"
    warmup_steps: int = 0
    log_steps: int | None = None  # None: 1, or 10 in a long run
    precision: Precision = "fp32"
    zero: int = 0  # 1: optimizer states are shared over data parallel
    compiled: bool = False
    styles: Mapping[str, str] = field(default_factory=dict)  # a plan written by hand
    wandb: str | None = None  # the project there
    flops_per_token: float = 0.0
    peak_flops: float = 0.0
    timeout_s: float = 1800.0  # how long a rank waits for others in a collective

    def rate(self, step: int) -> float:
        """The learning rate of step `step`, counted from 0."""
        return learning_rate(
            self.lr_schedule, step, peak=self.learning_rate, warmup_steps=self.warmup_steps, num_steps=self.max_steps
        )

    def evaluates(self, done: int) -> bool:
        """Whether there is an evaluation after `done` steps."""
        what = self.evaluation
        return what is not None and (done % what.steps == 0 or done == self.max_steps)

    def saves(self, done: int) -> bool:
        """Whether a checkpoint is saved after `done` steps."""
        return bool(self.save_steps) and (done % self.save_steps == 0 or done == self.max_steps)

    def is_due(self, done: int) -> bool:
        """Whether something is told, evaluated or saved after `done` steps."""
        log_steps = self.log_steps or (1 if self.max_steps <= _SHORT else 10)
        return done % log_steps == 0 or done == self.max_steps or self.saves(done) or self.evaluates(done)

    @property
    def tokens_per_step(self) -> int:
        """Tokens of a step, over all ranks."""
        return self.sequences_per_step * self.seq_length

    @property
    def sequences_per_step(self) -> int:
        """Sequences of a step, over all ranks."""
        return self.plan.dp * self.plan.num_micro_batches * self.batch_size

    def for_epochs(self, epochs: float) -> Job:
        """The job with as many steps as have each sequence come `epochs` times; the last step may read a few more."""
        assert self.stream is not None
        return replace(self, max_steps=max(1, ceil(self.stream.num_sequences * epochs / self.sequences_per_step)))

    def facts(self) -> dict[str, Any]:
        """The numbers and names among what it holds."""
        table = {name: getattr(self, name) for name in self.__slots__}
        kept = {name: value for name, value in table.items() if isinstance(value, (int, float, str))}
        return {**kept, "plan": str(self.plan), "model_type": self.config.model_type}


def check_job(job: Job, available_bytes: int | None) -> int:
    """How many parameters the model has; raises if the plan, the length or the memory cannot be, before any process.

    Memory counts weights, gradients and two states of Adam in float32: 16 bytes a parameter on each rank; under ZeRO-1
    8 on each, and 16 once for the shares of weights, gradients and states.
    """
    if job.zero and job.plan.dp == 1:
        raise PlanError(f"--zero 1: expected a plan of several dp ranks, which share the states, got {job.plan}")
    limit = getattr(job.config, "max_position_embeddings", None)
    if limit is not None and job.seq_length > limit:
        raise PlanError(f"--seq-length {job.seq_length}: expected at most {limit}, the positions that the model has")
    model = build_model(job.config, job.objective, seed=job.seed, device="meta")
    example = example_batch(job.objective, micro_batch=1, seq_length=8, device="meta")
    check_plan(model, job.plan, example, job.styles)
    if job.resume is not None:
        check_architecture(Path(job.resume), model)
    elif job.weights is not None:
        check_weights(Path(job.weights), model)
    needed = num_parameters(model) * (8 * job.plan.dp + 16 if job.zero else 16 * job.plan.dp)
    if available_bytes is not None and needed > available_bytes:
        raise PlanError(
            f"plan {job.plan}: {job.plan.world_size} ranks need about {needed / 1e9:.1f} GB for weights, "
            f"gradients and optimizer, this host has {available_bytes / 1e9:.1f} GB free; use fewer ranks"
        )
    return num_parameters(model)
