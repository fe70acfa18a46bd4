"""The step: what training repeats, capture records and synthesis fakes. One function, three uses."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.profiler import record_function

from meshloom.model.cache import Cache
from meshloom.model.config import Objective
from meshloom.model.scale import LossScale
from meshloom.model.weights import inner_model
from meshloom.parallel.apply import clip_gradients
from meshloom.parallel.candidates import broadcast, most_likely
from meshloom.parallel.data import synced_gradients
from meshloom.parallel.mesh import Mesh
from meshloom.parallel.pipeline import Pipeline
from meshloom.parallel.relay import Run, relay, run_plainly, whole_or_cut
from meshloom.parallel.vocab import CutLogits
from meshloom.parallel.zero import Zero

Batch = Mapping[str, Tensor]
Precision = Literal["fp32", "bf16", "fp16"]

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
IGNORED = -100  # the label that the loss of every HF model leaves out
# From the logits of the last position, (B, V) or this rank's part of them, to the next tokens (B,) int64. All ranks of
# the last stage call it, for they may have to gather; what the first tensor rank returns counts.
Choose = Callable[[Tensor | CutLogits], Tensor]

PHASE = "phase:"  # the prefix of the record_function scopes by which traces know a node's phase


@contextmanager
def phase(name: str) -> Iterator[None]:
    """Within this, traces put every op into phase `name`: forward, backward or optimizer."""
    with record_function(PHASE + name):
        yield


class StepResult(NamedTuple):
    """What a step tells, still on the device: the mean loss (), and the norm of the gradients () if it was clipped."""

    loss: Tensor
    grad_norm: Tensor | None


@contextmanager
def _phase_in(precision: Precision, device: torch.device, name: str) -> Iterator[None]:
    """A phase whose forward computes in `precision`; weights, gradients and optimizer stay float32."""
    with (
        phase(name),
        torch.autocast(
            device.type, DTYPES[precision], enabled=precision != "fp32" and name == "forward", cache_enabled=True
        ),
    ):
        yield


def make_optimizer(
    model: nn.Module,
    *,
    learning_rate: float,
    weight_decay: float,
    fused: bool = True,
    shared_by: dist.ProcessGroup | None = None,
) -> torch.optim.Optimizer:
    """AdamW, fused into one op or as several; weight decay on matrices only, not on biases and norms.

    Brown et al. 2020, appendix B. The fused one has `found_inf`, () float32 on the device: while that is 1, its steps
    change nothing. Its states are shared by the ranks of `shared_by` if that is given, as ZeRO-1 does.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    # The learning rate is a number, not a tensor: the fused kernel then needs no copy of it to the device.
    make = partial(torch.optim.AdamW, lr=learning_rate, betas=(0.9, 0.95), fused=fused)
    optimizer: Any = make(groups) if shared_by is None else Zero(groups, group=shared_by, make=make)
    if fused:  # the other takes none
        optimizer.found_inf = torch.zeros((), device=parameters[0].device)
    made: torch.optim.Optimizer = optimizer
    return made


def found_inf(optimizer: torch.optim.Optimizer) -> Tensor | None:
    """Where `train_step` notes that gradients were not finite: () float32, 0 or 1. None if the optimizer knows none."""
    found: Tensor | None = vars(optimizer).get("found_inf")
    return found


def train_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    micro_batches: Sequence[Batch],
    *,
    mesh: Mesh,
    max_grad_norm: float,
    precision: Precision = "fp32",
    scale: LossScale | None = None,
) -> StepResult:
    """One optimizer step on this rank's micro-batches.

    Each micro-batch maps the model's argument names to tensors, (B, S) int64. Gradients add up over micro-batches and
    are averaged over the data-parallel group in the last one only. With bf16 and fp16 the forward runs under autocast;
    fp16 needs `scale` and a fused optimizer, and a step whose gradients overflow changes nothing. Without `scale`,
    gradients whose norm is not finite end all change: this step and those after it leave weights and optimizer as they
    are, on all ranks.
    """
    within: Callable[[str], AbstractContextManager[Any]] = phase
    if precision != "fp32":  # only then, for autocast's own bookkeeping would be seen in every trace
        within = partial(_phase_in, precision, mesh.device)
    seed = None if scale is None else scale.value  # backward begins with it in the place of 1
    losses = [model.run(micro_batches, phase=within, seed=seed)] if isinstance(model, Pipeline) else []
    for index, batch in enumerate(micro_batches if not losses else ()):
        with synced_gradients(model, sync=index == len(micro_batches) - 1):
            with within("forward"):
                loss: Tensor = model(**batch).loss / len(micro_batches)
                # added up on the way, so that each micro-batch does the same however many there are
                losses = [losses[0] + loss.detach() if losses else loss.detach()]
            with within("backward"):
                loss.backward(gradient=seed)
            del loss
    grad_norm = None
    with phase("optimizer"):
        bad = found_inf(optimizer)
        held = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        if scale is not None and bad is not None:
            scale.unscale([parameter.grad for parameter in held if parameter.grad is not None], bad, mesh)
        if max_grad_norm:
            grad_norm = clip_gradients(held, max_grad_norm, mesh)
            if scale is None and bad is not None:
                bad.logical_or_(grad_norm * 0)  # of infinity and of what is no number that is no number, which is true
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if scale is not None and bad is not None:
            scale.update(bad)
    return StepResult(losses[0], grad_norm)


def eval_step(
    model: nn.Module, batch: Batch, *, objective: Objective, mesh: Mesh, precision: Precision = "fp32"
) -> tuple[Tensor, Tensor]:
    """The loss of one batch summed over the tokens that it counts, () float64, and how many those are, () int64.

    `model` is in evaluation mode and not wrapped for data parallel. Nothing is kept for a backward pass.
    """
    labels = batch["labels"]
    counted = ((labels[:, 1:] if objective == "causal" else labels) != IGNORED).sum()
    with torch.no_grad(), _phase_in(precision, mesh.device, "forward"):
        loss: Tensor = model.loss_of(batch) if isinstance(model, Pipeline) else model(**batch).loss
    return loss.double() * counted, counted


def prefill_step(
    model: nn.Module, input_ids: Tensor, *, mesh: Mesh, cache: Cache, choose: Choose = most_likely
) -> Tensor:
    """Feed the prompts `input_ids` (B, S) and return the first new token of each, (B,) int64, the same on every rank.

    Fills `cache`, which `make_cache` made for this model. The last stage's first tensor rank chooses, and tells the
    others.
    """
    return _next_tokens(model, input_ids, mesh, cache, choose, run_plainly)


def decode_step(
    model: nn.Module,
    tokens: Tensor,
    *,
    mesh: Mesh,
    cache: Cache,
    choose: Choose = most_likely,
    run: Run = run_plainly,
) -> Tensor:
    """Feed one token of each sequence, (B,) int64, and return the next ones, as `prefill_step` does.

    `run` calls the forward; a `Replay` that was given to each step before does it without the model's own code.
    """
    return _next_tokens(model, tokens.unsqueeze(1), mesh, cache, choose, run)


@torch.no_grad()
def _next_tokens(model: nn.Module, ids: Tensor, mesh: Mesh, cache: Cache, choose: Choose, run: Run) -> Tensor:
    with phase("forward"):
        inner = inner_model(model)
        head = getattr(inner, "cut_head", None)
        if head is not None:
            head.keep_cut = True  # so that only candidates are gathered, not all logits
        finish = partial(_end_of_forward, choose)
        if isinstance(model, Pipeline):
            made = relay(model, cache.arguments, ids, finish=finish, run=run)
        else:
            made = run(partial(_forward, model, cache, finish), ids)
        cache.advance(ids.shape[1])
        if made is None:  # of another stage than the last
            tokens = torch.zeros(ids.shape[0], dtype=torch.long, device=ids.device)
        else:
            logits = whole_or_cut(made[0], inner)
            tokens = made[1] if len(made) > 1 else choose(logits)
            # what came out of a maximum over the group is the same on all of its ranks
            if "tp" in mesh.groups and not (choose is most_likely and isinstance(logits, CutLogits)):
                tokens = broadcast(tokens, 0, mesh.groups["tp"])
        if "pp" in mesh.groups:
            tokens = broadcast(tokens, mesh.degree("pp") - 1, mesh.groups["pp"])
        return tokens


def _forward(model: nn.Module, cache: Cache, finish: Callable[..., list[Tensor]], ids: Tensor) -> list[Tensor]:
    """What `finish` makes of the logits (B, S or 1, V) of a model in one stage, or of this rank's part of them."""
    return finish(model(**cache.arguments(ids)).logits)


def _end_of_forward(choose: Choose, logits: Tensor | CutLogits) -> list[Tensor]:
    """The logits of the last position, (B, V) or this rank's part, and the tokens (B,) where choosing needs only them.

    What draws has a state, so it cannot be a part of what is replayed.
    """
    part = logits.local[:, -1] if isinstance(logits, CutLogits) else logits[:, -1]
    if choose is not most_likely:
        return [part]
    return [part, most_likely(CutLogits(part, logits.part) if isinstance(logits, CutLogits) else part)]
