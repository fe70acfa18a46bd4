"""The step: what training repeats, capture records and synthesis fakes. One function, three uses."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.profiler import record_function

from meshloom.model.cache import Cache
from meshloom.model.weights import inner_model
from meshloom.parallel.apply import clip_gradients
from meshloom.parallel.candidates import broadcast, most_likely
from meshloom.parallel.data import synced_gradients
from meshloom.parallel.mesh import Mesh
from meshloom.parallel.pipeline import Pipeline
from meshloom.parallel.relay import Run, relay, run_plainly, whole_or_cut
from meshloom.parallel.vocab import CutLogits

Batch = Mapping[str, Tensor]
Precision = Literal["fp32", "bf16"]
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
            device.type, torch.bfloat16, enabled=precision == "bf16" and name == "forward", cache_enabled=True
        ),
    ):
        yield


def make_optimizer(
    model: nn.Module, *, learning_rate: float, weight_decay: float, fused: bool = True
) -> torch.optim.Optimizer:
    """AdamW, fused into one op or as several; weight decay on matrices only, not on biases and norms.

    Brown et al. 2020, appendix B.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    # The learning rate is a number, not a tensor: the fused kernel then needs no copy of it to the device.
    return torch.optim.AdamW(
        [group for group in groups if group["params"]], lr=learning_rate, betas=(0.9, 0.95), fused=fused
    )


def train_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    micro_batches: Sequence[Batch],
    *,
    mesh: Mesh,
    max_grad_norm: float,
    precision: Precision = "fp32",
) -> StepResult:
    """One optimizer step on this rank's micro-batches.

    Each micro-batch maps the model's argument names to tensors, (B, S) int64. Gradients add up over micro-batches and
    are averaged over the data-parallel group in the last one only. With bf16 the forward runs under autocast.
    """
    within: Callable[[str], AbstractContextManager[Any]] = phase
    if precision != "fp32":  # only then, for autocast's own bookkeeping would be seen in every trace
        within = partial(_phase_in, precision, mesh.device)
    losses = [model.run(micro_batches, phase=within)] if isinstance(model, Pipeline) else []
    for index, batch in enumerate(micro_batches if not losses else ()):
        with synced_gradients(model, sync=index == len(micro_batches) - 1):
            with within("forward"):
                loss: Tensor = model(**batch).loss / len(micro_batches)
                # added up on the way, so that each micro-batch does the same however many there are
                losses = [losses[0] + loss.detach() if losses else loss.detach()]
            with within("backward"):
                loss.backward()
            del loss
    grad_norm = None
    with phase("optimizer"):
        if max_grad_norm:
            grad_norm = clip_gradients(model, max_grad_norm, mesh)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return StepResult(losses[0], grad_norm)


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
        if isinstance(model, Pipeline):
            logits = relay(model, cache.arguments, ids, run=run)
        else:
            logits = whole_or_cut(run(partial(_forward, model, cache), ids), inner)
        cache.advance(ids.shape[1])
        tokens = torch.zeros(ids.shape[0], dtype=torch.long, device=ids.device)
        if logits is not None:
            chosen = choose(_last(logits))
            tokens = chosen if mesh.index("tp") == 0 else tokens
        if "tp" in mesh.groups and mesh.index("pp") == mesh.degree("pp") - 1:
            tokens = broadcast(tokens, 0, mesh.groups["tp"])
        if "pp" in mesh.groups:
            tokens = broadcast(tokens, mesh.degree("pp") - 1, mesh.groups["pp"])
        return tokens


def _forward(model: nn.Module, cache: Cache, ids: Tensor) -> Tensor:
    """The logits (B, S or 1, V) of a model in one stage, or this rank's part of them."""
    logits: Tensor | CutLogits = model(**cache.arguments(ids)).logits
    return logits.local if isinstance(logits, CutLogits) else logits


def _last(logits: Tensor | CutLogits) -> Tensor | CutLogits:
    """The logits of the last position: (B, S, V) -> (B, V)."""
    if isinstance(logits, CutLogits):
        return CutLogits(logits.local[:, -1], logits.part)
    return logits[:, -1]
