"""Repeat the step: what each rank of a training run does, from the model's first weight to the last report."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from itertools import chain, islice
from math import isfinite
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from meshloom.errors import RunFailed, UsageError
from meshloom.model.build import build_model
from meshloom.model.pretrained import fill_from
from meshloom.model.scale import LOWEST, LossScale
from meshloom.model.step import DTYPES, Batch, StepResult, found_inf, make_optimizer, train_step
from meshloom.model.weights import Fill, build_part
from meshloom.parallel.compiled import check_compiler
from meshloom.parallel.data import data_parallel, settle_buckets
from meshloom.parallel.launch import rank_context
from meshloom.parallel.mesh import Mesh, make_mesh
from meshloom.parallel.pipeline import Pipeline
from meshloom.parallel.placement import Placed
from meshloom.parallel.waiting import limit_waits
from meshloom.train.checkpoint import Checkpoints, TrainingState
from meshloom.train.data import batches
from meshloom.train.evaluate import Evaluator
from meshloom.train.job import Job
from meshloom.train.metrics import RankLog, Reporter, Told, writing
from meshloom.train.optim import set_learning_rate
from meshloom.train.runs import is_asked_to_stop
from meshloom.train.sinks import EventFile, Sink, WandbRun

# A hook for each rank: given the mesh and the model, it returns what stands around step number s. Capture is one.
AroundStep = Callable[[Mesh, nn.Module], Callable[[int], AbstractContextManager[None]]]


def train_rank(job: Job, folder: str, device: str, around_step: AroundStep | None, rank_zero_shows: bool) -> None:
    """Train on the calling rank, within an initialised environment of as many ranks as the plan has."""
    with rank_context(device) as chosen:
        _check_device(job, chosen)
        mesh = make_mesh(job.plan, chosen)
        training = Training(job, Path(folder), mesh)
        limit_waits(job.timeout_s)
        inner = training.inner
        around = (
            around_step(mesh, inner.model if isinstance(inner, Pipeline) else inner)
            if around_step is not None
            else lambda step: nullcontext()
        )
        try:
            training.repeat(around, show=rank_zero_shows)
        finally:
            training.log.close()


def _check_device(job: Job, device: torch.device) -> None:
    """Raise UsageError for what this device cannot do."""
    if job.compiled:
        check_compiler(device.type)
    if device.type != "cuda" and getattr(job.config, "_attn_implementation", "") == "flash_attention_2":
        raise UsageError(f"--attention flash: expected an NVIDIA GPU, this rank computes on {device}; use sdpa")
    if job.precision != "fp32":
        try:
            with torch.autocast(device.type, DTYPES[job.precision]):
                one = torch.ones(8, 8, device=device)
                torch.mm(one, one)
        except (RuntimeError, ValueError) as error:
            raise UsageError(
                f"--precision {job.precision}: expected a device that computes in it, {device} does not; "
                "use bf16 or fp32"
            ) from error


class Training:
    """A run on this rank: its part of the model, and where it stands between two steps."""

    def __init__(self, job: Job, folder: Path, mesh: Mesh) -> None:
        self.job, self.folder, self.mesh = job, folder, mesh
        self.log = RankLog(folder, mesh.rank)
        self.inner = _build(job, mesh)
        self.optimizer = make_optimizer(
            self.inner, learning_rate=job.learning_rate, weight_decay=job.weight_decay,
            shared_by=mesh.groups.get("dp") if job.zero else None,
        )  # fmt: skip
        self.saves = _checkpoints(job, folder / "checkpoints", self.inner, self.optimizer, mesh)
        self.begun = self.saves.load(Path(job.resume)) if job.resume else TrainingState(step=0, plan=job.plan)
        if job.save_steps and job.save_initial and not self.begun.step:
            self.saves.export("initial_model", step=0)
        self.model = data_parallel(self.inner, mesh)
        self.per_step = job.plan.dp * job.plan.num_micro_batches * job.batch_size  # sequences, of all ranks
        data = self.begun.data
        self.read = int(data.get("sequences", 0))  # by all ranks, before the next step
        self.best = data.get("best_eval_loss")
        self.scale = None
        if job.precision == "fp16":
            self.scale = LossScale(mesh.device, **data.get("loss_scale") or {})
        self.bad_loss = torch.zeros((), device=mesh.device)  # 1 from the first step on whose loss is no number here
        self.evaluator = None
        if job.evaluation is not None:
            self.evaluator = Evaluator(
                job.evaluation, model=self.inner, objective=job.objective, batch_size=job.batch_size, mesh=mesh,
                precision=job.precision,
            )  # fmt: skip
        held = sum(parameter.numel() for parameter in self.inner.parameters())
        self.log.write("begin", rank=mesh.rank, device=str(mesh.device), num_parameters=held, step=self.begun.step)

    def repeat(self, around: Callable[[int], AbstractContextManager[None]], *, show: bool) -> None:
        """Step after step, until all are done or the run is asked to stop."""
        job, mesh, optimizer, begun = self.job, self.mesh, self.optimizer, self.begun.step
        steps = self._micro_batches()
        if begun:
            first = next(steps)
            settle_buckets(self.model, first[0])
            steps = chain([first], steps)
        with self._reporter(show) as reporter:
            for step, micro_batches in islice(enumerate(steps, start=begun), max(0, job.max_steps - begun)):
                context = around(step)
                recorded = not isinstance(context, nullcontext)
                if recorded:
                    self.saves.wait()  # its collectives are no part of the step
                rate = job.rate(step)
                set_learning_rate(optimizer, rate)
                with context:
                    result = train_step(
                        self.model, optimizer, micro_batches, mesh=mesh, max_grad_norm=job.max_grad_norm,
                        precision=job.precision, scale=self.scale,
                    )  # fmt: skip
                self.bad_loss.logical_or_(result.loss * 0)
                self.read += self.per_step
                if not (recorded or step == begun or job.is_due(step + 1)):
                    continue  # nothing is read from the device, so that it need not wait for us
                if self._report(reporter, step, result, rate, recorded):
                    break
        self.saves.wait()
        self.log.write("end")

    def _report(self, reporter: Reporter, step: int, result: StepResult, rate: float, recorded: bool) -> bool:
        """Tell of a step, evaluate and save if it is time; whether the run was asked to end. Reads from the device."""
        job, done = self.job, step + 1
        known = self._agree(result)
        scale = None if self.scale is None else float(self.scale.value)
        if known.bad_rank >= 0 and (scale is None or scale < LOWEST):
            self._fail(known, done)
        eval_loss, eval_ns = None, 0
        if self.evaluator is not None and job.evaluates(done):
            begin = time.perf_counter_ns()
            eval_loss = self.evaluator.loss()
            eval_ns = time.perf_counter_ns() - begin
        norm = None if result.grad_norm is None else float(result.grad_norm)
        told = Told(
            step=step, loss=known.loss, learning_rate=rate, grad_norm=norm, memory_bytes=_most_memory(self.mesh.device),
            recorded=recorded, loss_scale=scale, eval_loss=eval_loss, eval_ns=eval_ns,
        )  # fmt: skip
        reporter.step(told)
        self.log.write("step", step=step, loss=known.mine, memory_bytes=told.memory_bytes)
        if eval_loss is not None and isfinite(eval_loss) and (self.best is None or eval_loss < self.best):
            self.best = eval_loss
            self.saves.export("best_model", wait=False, step=done, eval_loss=eval_loss)
        if job.saves(done) or known.stop:
            self._save(done, self.read)
        return known.stop

    def _save(self, done: int, read: int) -> None:
        data = {"sequences": read, "best_eval_loss": self.best}
        if self.scale is not None:
            data["loss_scale"] = self.scale.state()
        self.saves.save(done, data=data)
        self.log.write("save", step=done)

    def _fail(self, known: _Known, done: int) -> None:
        """Save what was good, if it still is there, and raise RunFailed."""
        what = "the loss is no number" if known.bad_loss else "the gradients are not finite"
        where = f"{what} on rank {known.bad_rank}"
        self.log.write("failed", step=done, reason=where)
        if not self.job.max_grad_norm or self.scale is not None:
            raise RunFailed(
                f"step {done}: {where}; the weights may be lost, so go on from an older checkpoint; "
                "lower --learning-rate"
            )
        counts = [state["step"] for state in self.optimizer.state.values() if "step" in state]
        good = torch.stack([count.double() for count in counts] or [torch.zeros(())]).max().to(self.mesh.device)
        dist.all_reduce(good, op=dist.ReduceOp.MAX)  # the optimizer counts only steps that changed something
        last = int(good)
        if last > self.begun.step and not self.job.saves(last):
            self._save(last, self.read - (done - last) * self.per_step)
            self.saves.wait()
        saved = f"saved as checkpoint-{last}" if last > self.begun.step else f"those after step {last}"
        raise RunFailed(
            f"step {last + 1}: {where}; weights and optimizer are as they were before it, {saved}; "
            "lower --learning-rate, or look at the data there"
        )

    def _agree(self, result: StepResult) -> _Known:
        """Tell every rank of every rank's loss, and whether rank 0 was asked to end; reads from the device."""
        stop = self.mesh.rank == 0 and is_asked_to_stop(self.folder)
        overflow = found_inf(self.optimizer)
        assert overflow is not None  # make_optimizer's is fused
        mine = torch.stack(
            [
                result.loss.double(),
                torch.tensor(float(stop), dtype=torch.double, device=self.mesh.device),
                self.bad_loss.double(),
                overflow.double(),
            ]
        )
        everyone = [mine]
        if (num_ranks := dist.get_world_size()) > 1:  # else there is nobody to wait for, not even a thread of gloo's
            everyone = [torch.empty_like(mine) for _ in range(num_ranks)]
            dist.all_gather(everyone, mine)
        losses, stops, bad_losses, overflows = torch.stack(everyone).t().tolist()
        if self.scale is not None:  # which sees to such steps itself
            self.bad_loss.zero_()
        bad = [rank for rank, flag in enumerate(bad_losses) if flag] or [r for r, flag in enumerate(overflows) if flag]
        # ranks that differ in tensor and pipeline parallel only have the same loss
        return _Known(
            loss=sum(losses) / len(losses), mine=losses[self.mesh.rank], bad_rank=bad[0] if bad else -1,
            bad_loss=any(bad_losses), stop=any(stops),
        )  # fmt: skip

    def _reporter(self, show: bool) -> Reporter:
        job, stores = self.job, self.mesh.rank == 0
        return Reporter(
            self.folder,
            max_steps=job.max_steps,
            tokens_per_step=self.per_step * job.seq_length,
            store=stores,
            show=stores and show,
            first_step=self.begun.step,
            sinks=self._sinks() if stores else (),
            flops_per_token=job.flops_per_token,
            peak_flops=job.peak_flops * job.plan.world_size,
        )

    def _sinks(self) -> list[Sink]:
        with writing(self.folder):
            sinks: list[Sink] = [EventFile(self.folder / "tensorboard", steps_before=self.begun.step)]
        if self.job.wandb is not None:
            sinks.append(WandbRun(self.job.wandb, folder=self.folder, config=self.job.facts()))
        return sinks

    def _micro_batches(self) -> Iterator[list[Batch]]:
        """This rank's micro-batches of each step, after the sequences that were read before."""
        assert self.job.stream is not None
        stream = batches(
            self.job.stream,
            batch_size=self.job.batch_size,
            rank=self.mesh.index("dp"),
            num_ranks=self.mesh.degree("dp"),
            first_sequence=self.read,
        )
        while True:
            yield [_to(batch, self.mesh.device) for batch in islice(stream, self.job.plan.num_micro_batches)]


class _Known(NamedTuple):
    """What all ranks know of a step: the mean loss, this rank's own, the first rank where something was not finite,
    whether that was a loss, and whether to end."""

    loss: float
    mine: float
    bad_rank: int
    bad_loss: bool
    stop: bool


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
    model = build_part(
        job.config, job.objective, mesh=mesh, seed=job.seed, fill=fill, styles=job.styles, compiled=job.compiled
    ).train()
    # Ranks of one tensor-parallel group draw the same dropout masks, or their copies of the residual would part.
    torch.manual_seed(job.seed + 1 + mesh.index("dp"))
    return model


def _leave(held: Mapping[str, Placed]) -> None:
    """Fill nothing."""


def _to(batch: Batch, device: torch.device) -> Mapping[str, Tensor]:
    return {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}
