"""The step: what training repeats, capture records and synthesis fakes. One function, three uses."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.profiler import record_function

from meshloom.parallel.apply import clip_gradients
from meshloom.parallel.data import synced_gradients
from meshloom.parallel.mesh import Mesh
from meshloom.parallel.pipeline import Pipeline

Batch = Mapping[str, Tensor]
Precision = Literal["fp32", "bf16"]

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
