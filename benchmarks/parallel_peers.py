"""The contenders of parallel.py: the same Llama cut over ranks by Meshloom, by DTensor, by transformers' own plan and,
as a pipeline, by torch.distributed.pipelining with stages built by hand."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.distributed.configuration_utils import DistributedConfig

from meshloom.parallel.apply import parallelize
from meshloom.parallel.mesh import Mesh
from meshloom.parallel.pipeline import Pipeline

Batch = Mapping[str, Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class Contender:
    """One way to cut the model: `backward` runs forward and backward and returns the loss, a number on each rank."""

    backward: Callable[[], Tensor]
    parameters: Sequence[nn.Parameter]

    def optimizer(self) -> torch.optim.Optimizer:
        """Fused AdamW; DTensors in a group of their own, as its kernel takes no mixture."""
        groups: list[list[nn.Parameter]] = [[], []]
        for parameter in self.parameters:
            groups[isinstance(parameter, DTensor)].append(parameter)
        return torch.optim.AdamW([{"params": group} for group in groups if group], lr=1e-4, fused=True)


def make(config: LlamaConfig, device: torch.device) -> LlamaForCausalLM:
    """The single-device model, with the same weights on every rank."""
    torch.manual_seed(0)
    return LlamaForCausalLM(config).to(device).train()


def _whole_batch(model: nn.Module, batches: Sequence[Batch]) -> Callable[[], Tensor]:
    def backward() -> Tensor:
        total = torch.zeros((), device=batches[0]["input_ids"].device)
        for batch in batches:
            loss = model(**batch).loss / len(batches)
            loss.backward()
            total += loss.detach()
        return total

    return backward


def single(config: LlamaConfig, mesh: Mesh, batches: Sequence[Batch]) -> Contender:
    """Not cut at all."""
    model = make(config, mesh.device)
    return Contender(backward=_whole_batch(model, batches), parameters=list(model.parameters()))


def ours(config: LlamaConfig, mesh: Mesh, batches: Sequence[Batch]) -> Contender:
    """`meshloom.parallelize`."""
    model = parallelize(make(config, mesh.device), plan=mesh.plan, mesh=mesh)
    backward = (lambda: model.run(batches).float()) if isinstance(model, Pipeline) else _whole_batch(model, batches)
    return Contender(backward=backward, parameters=list(model.parameters()))


def _by_dtensor(config: LlamaConfig, mesh: Mesh, batches: Sequence[Batch], more: Mapping[str, Any]) -> Contender:
    model = make(config, mesh.device)
    plan: dict[str, Any] = dict(more)
    for index in range(config.num_hidden_layers):
        columns = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj")
        plan |= {f"model.layers.{index}.{name}": ColwiseParallel() for name in columns}
        plan |= {f"model.layers.{index}.{name}": RowwiseParallel() for name in ("self_attn.o_proj", "mlp.down_proj")}
    parallelize_module(model, init_device_mesh(mesh.device.type, (mesh.plan.tp,)), plan)
    return Contender(backward=_whole_batch(model, batches), parameters=list(model.parameters()))


def dtensor_layers(config: LlamaConfig, mesh: Mesh, batches: Sequence[Batch]) -> Contender:
    """DTensor's `parallelize_module` with a plan by hand, attention and MLP."""
    return _by_dtensor(config, mesh, batches, {})


def dtensor(config: LlamaConfig, mesh: Mesh, batches: Sequence[Batch]) -> Contender:
    """The same with embedding and head cut too, as PyTorch's tutorial does; the logits are gathered for HF's loss."""
    ends = {
        "model.embed_tokens": RowwiseParallel(input_layouts=Replicate(), output_layouts=Replicate()),
        "lm_head": ColwiseParallel(output_layouts=Replicate()),
    }
    return _by_dtensor(config, mesh, batches, ends)


def transformers_plan(config: LlamaConfig, mesh: Mesh, batches: Sequence[Batch]) -> Contender:
    """transformers' `tp_plan="auto"`, by the two functions that `from_pretrained` calls for it: the road over a saved
    folder ends in the same model, but asks for accelerate."""
    wanted = DistributedConfig(tp_size=mesh.plan.tp, tp_plan="auto")
    wanted, _, manager = LlamaForCausalLM.prepare_distribute_model(wanted)
    model = LlamaForCausalLM.maybe_distribute_model(make(config, mesh.device), wanted, manager)
    assert any(isinstance(parameter, DTensor) for parameter in model.parameters()), "it was not cut"
    return Contender(backward=_whole_batch(model, batches), parameters=list(model.parameters()))


class _Stage(nn.Module):
    """A Llama's layers from `begin` to `end`, with the embedding before the first and norm and head after the last."""

    def __init__(self, model: LlamaForCausalLM, begin: int, end: int) -> None:
        super().__init__()
        inner = model.model
        self.rotary = inner.rotary_emb
        self.layers = inner.layers[begin:end]
        self.embed = inner.embed_tokens if begin == 0 else None
        last = end == len(inner.layers)
        self.norm, self.head = (inner.norm, model.lm_head) if last else (None, None)

    def forward(self, x: Tensor) -> Tensor:
        """Token ids (B, S) or hidden states (B, S, H) -> hidden states, or logits (B, S, V)."""
        hidden = x if self.embed is None else self.embed(x)
        positions = torch.arange(hidden.size(1), device=hidden.device).unsqueeze(0)
        rotary = self.rotary(hidden, position_ids=positions)
        for layer in self.layers:
            hidden = layer(hidden, attention_mask=None, position_ids=positions, position_embeddings=rotary)
        return hidden if self.norm is None or self.head is None else self.head(self.norm(hidden))


def _shifted_loss(logits: Tensor, labels: Tensor) -> Tensor:
    return functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


def torch_pipeline(config: LlamaConfig, mesh: Mesh, batches: Sequence[Batch], bound: int) -> Contender:
    """torch.distributed.pipelining: a stage a rank, cut before layer `bound`; the loss is known on the last rank only,
    and is sent to the others as ours is."""
    stage_bounds = [0, bound, config.num_hidden_layers]
    part = _Stage(make(config, mesh.device), stage_bounds[mesh.rank], stage_bounds[mesh.rank + 1])
    stage = PipelineStage(part, mesh.rank, mesh.plan.pp, mesh.device, group=mesh.groups["pp"])
    schedule_class = {"gpipe": ScheduleGPipe, "1f1b": Schedule1F1B}[mesh.plan.schedule]
    schedule = schedule_class(stage, len(batches), loss_fn=_shifted_loss)
    ids = torch.cat([batch["input_ids"] for batch in batches])

    def backward() -> Tensor:
        losses: list[Tensor] = []
        if mesh.rank == 0:
            schedule.step(ids)
        else:
            schedule.step(target=ids, losses=losses)
        mean = torch.stack(losses).mean().detach() if losses else torch.zeros((), device=mesh.device)
        dist.all_reduce(mean, group=mesh.groups["pp"])
        return mean

    return Contender(backward=backward, parameters=list(part.parameters()))
