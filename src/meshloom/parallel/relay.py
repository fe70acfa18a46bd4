"""One forward through the stages of a pipeline, without gradients: each stage receives, runs its layers, sends on.

A schedule is for training; a token that is generated passes through the stages one after another.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.profiler import record_function

from meshloom.errors import PlanError
from meshloom.parallel.pipeline import MESSAGE, Pipeline
from meshloom.parallel.vocab import CutLogits

# Calls a function with tensors; it may know another way to what that returns.
Run = Callable[..., Any]


def run_plainly(function: Callable[..., Any], *tensors: Tensor) -> Any:
    """Call the function."""
    return function(*tensors)


def relay(
    pipeline: Pipeline,
    arguments: Callable[[Tensor], Mapping[str, Any]],
    ids: Tensor,
    *,
    finish: Callable[[Tensor | CutLogits], list[Tensor]],
    run: Run = run_plainly,
) -> list[Tensor] | None:
    """What `finish` makes of the model's logits on what `arguments` makes of `ids` (B, S); None but on the last stage.

    Every rank of the pipeline must call this at the same point. Raises PlanError if what a stage sends on has another
    shape than the stage after it can know.
    """
    if pipeline.num_stages != pipeline.num_ranks:
        raise PlanError("pipeline parallel: expected one stage a rank to generate; leave out virtual stages")
    stage = pipeline.index
    shapes = pipeline.shapes({"input_ids": ids}) if pipeline.num_stages > 1 else {}
    inputs = pipeline.crossing[stage] if stage else []
    received = [_receive(pipeline, *shapes[output], place) for place, output in enumerate(inputs)]

    def forward(ids: Tensor, *received: Tensor) -> list[Any]:
        result: list[Any] = pipeline.pass_stage(stage, arguments(ids), dict(zip(inputs, received)))
        return finish(result[0]) if stage == pipeline.num_stages - 1 else result

    made: list[Tensor] = run(forward, ids, *received)
    if stage == pipeline.num_stages - 1:
        return made
    for place, (output, tensor) in enumerate(zip(pipeline.crossing[stage + 1], made, strict=True)):
        if tuple(tensor.shape) != tuple(shapes[output][0]):
            layer = pipeline.flow.layers[output.layer]
            raise PlanError(
                f"pipeline parallel: expected {layer} to return a shape of {tuple(shapes[output][0])} without a cache "
                f"and with one, got {tuple(tensor.shape)}; use pp1"
            )
        _send(pipeline, tensor, place)
    return None


def _receive(pipeline: Pipeline, shape: tuple[int, ...], dtype: torch.dtype, place: int) -> Tensor:
    mesh = pipeline.mesh
    peer = mesh.plan.group("pp", mesh.rank)[pipeline.index - 1]
    floating = next((p.dtype for p in pipeline.parameters() if p.is_floating_point()), dtype)
    tensor = torch.empty(shape, dtype=floating if dtype.is_floating_point else dtype, device=mesh.device)
    with record_function(f"{MESSAGE}{peer}>{mesh.rank}"):
        work = dist.irecv(tensor, src=peer, group=mesh.groups["pp"], tag=place)
    if work is not None:
        work.wait()
    return tensor


def _send(pipeline: Pipeline, tensor: Tensor, place: int) -> None:
    mesh = pipeline.mesh
    peer = mesh.plan.group("pp", mesh.rank)[pipeline.index + 1]
    tensor = tensor.contiguous()
    with record_function(f"{MESSAGE}{mesh.rank}>{peer}"):
        work = dist.isend(tensor, dst=peer, group=mesh.groups["pp"], tag=place)
    if work is not None:
        work.wait()


def whole_or_cut(logits: Tensor, model: Any) -> Tensor | CutLogits:
    """The logits as what they are: this rank's part if the model's head is cut, and nothing had them gathered."""
    head = getattr(model, "cut_head", None)
    if head is None or logits.size(-1) == head.part.size:
        return logits
    return CutLogits(logits, head.part)
