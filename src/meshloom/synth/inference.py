"""Traces of generation on ranks that are not there: the prefill, then a step for each token, on every rank of a plan.

The steps are those that `generate` runs, on fake tensors. Decode steps differ in the length of the cache alone, which
is proven on four of them (`repeat.py`); the others are stamped out.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import meshloom
from meshloom.chakra.build import TraceBuilder, group_id
from meshloom.chakra.file import write
from meshloom.chakra.trace import Node, NodeType, Trace
from meshloom.errors import PlanError, UsageError
from meshloom.model.build import build_model, example_batch
from meshloom.model.cache import Cache, make_cache
from meshloom.model.layout import lay_out_for_one_row
from meshloom.model.step import DTYPES, Precision, decode_step, prefill_step
from meshloom.parallel.apply import cut_model, find_cut
from meshloom.parallel.mesh import Mesh, make_mesh
from meshloom.parallel.pipeline import Pipeline
from meshloom.plan import Plan
from meshloom.synth.dispatch import StepWatcher
from meshloom.synth.folder import ROLES_FILE, RoleOfRanks, whole_folder
from meshloom.synth.parts import NotAlike
from meshloom.synth.reduced import tensor_kinds
from meshloom.synth.repeat import prove, repeated
from meshloom.synth.roles import groups_of
from meshloom.synth.world import fake_world

_FILLS = ("zeros", "new_zeros", "zero_", "fill_")  # of the cache's memory
_FIRST, _NUM_PROVEN = 2, 3  # the decode step after the first, of whose like three in a row are captured


@dataclass(frozen=True, slots=True, kw_only=True)
class Inference:
    """`batch_size` prompts of `num_input_tokens`, each continued by `num_output_tokens`; weights are of `precision`."""

    config: Any
    plan: Plan
    batch_size: int
    num_input_tokens: int
    num_output_tokens: int
    precision: Precision = "fp32"
    model_name: str = ""
    styles: Mapping[str, str] = field(default_factory=dict)  # a plan written by hand


@dataclass(frozen=True, slots=True, kw_only=True)
class Generated:
    """What some ranks of a plan run alike: the nodes of the first of them, all steps in a row."""

    ranks: tuple[int, ...]
    plan: Plan
    nodes: list[Node]
    held_bytes: int  # weights
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def num_flops(self) -> int:
        """Floating-point operations of products and attention on each of its ranks."""
        classes = ("gemm", "attention")
        return sum(node.get("num_ops", 0) for node in self.nodes if node.get("op_class") in classes)

    def trace(self, rank: int) -> Trace:
        """The trace of `rank`, one of its ranks."""
        nodes = self.nodes if rank == self.ranks[0] else [self._of(node, rank) for node in self.nodes]
        grown = accumulate(node.get("memory_allocated", 0) - node.get("memory_released", 0) for node in self.nodes)
        peak = self.held_bytes + max(grown, default=0)
        memory = {"memory_held": self.held_bytes, "memory_peak": peak}
        return Trace(nodes=nodes, attrs={**self.facts, "rank": rank, **memory})

    def _of(self, node: Node, rank: int) -> Node:
        """The node as another place of tp has it: its groups along pp, and its messages, are those of that place."""
        if not node.is_comm or (node.type is NodeType.COMM_COLL and node.get("comm_axis") == "tp"):
            return node
        place = self.plan.coordinate(rank)["tp"]

        def beside(other: int) -> int:
            return self.plan.rank(**{**self.plan.coordinate(other), "tp": place})

        attrs = dict(node.attrs)
        for name in ("comm_src", "comm_dst"):
            if name in attrs:
                attrs[name] = beside(attrs[name])
        if "comm_ranks" in attrs:
            attrs["comm_ranks"] = [beside(other) for other in attrs["comm_ranks"]]
            attrs["pg_name"] = group_id(attrs["comm_ranks"], self.plan.world_size)
        return msgspec.structs.replace(node, attrs=attrs)


@dataclass(frozen=True, slots=True, kw_only=True)
class GeneratedRoles:
    """The roles of a plan, ordered by their first rank; `notes` tell what could not be stamped out, and why."""

    plan: Plan
    roles: tuple[Generated, ...]
    notes: tuple[str, ...] = ()

    def traces(self) -> Iterator[tuple[int, Trace]]:
        """(rank, trace) of every rank, role by role."""
        for role in self.roles:
            for rank in role.ranks:
                yield rank, role.trace(rank)

    def write(self, folder: Path, *, roles_only: bool = False) -> int:
        """Write every rank's file, or that of each role's first rank and `ranks.json`; returns how many bytes."""
        total = 0
        with whole_folder(folder) as part:
            for role in self.roles:
                for rank in role.ranks[:1] if roles_only else role.ranks:
                    trace = role.trace(rank)
                    more = {"role_size": len(role.ranks)} if roles_only else {}
                    path = write(Trace(nodes=trace.nodes, attrs={**trace.attrs, **more}), part / f"rank{rank}.et")
                    total += path.stat().st_size
            if roles_only:
                table = [RoleOfRanks(f"rank{role.ranks[0]}.et", role.ranks[0], list(role.ranks)) for role in self.roles]
                (part / ROLES_FILE).write_bytes(msgspec.json.encode(table))
        return total


def synthesise_inference(step: Inference, *, stamped: bool = True) -> GeneratedRoles:
    """The traces of a generation on every rank of its plan; without `stamped` each decode step is captured.

    Raises PlanError if the model cannot take the plan, UsageError if there is no room for so many tokens.
    """
    plan, longest = step.plan, getattr(step.config, "max_position_embeddings", None)
    if plan.dp > 1 or plan.cp > 1 or plan.sequence_parallel:
        raise PlanError(f"plan {plan}: expected tp and pp only, to generate; a replica does what any other does")
    total = step.num_input_tokens + step.num_output_tokens
    if longest is not None and total > longest:
        raise UsageError(f"{total} tokens: expected at most {longest}, the positions that the model has; ask for fewer")
    notes: list[str] = []
    roles: list[Generated] = []
    model = build_model(step.config, "causal", seed=0, device="meta")
    cut = find_cut(model, plan, example_batch("causal", micro_batch=1, seq_length=8, device="meta"), step.styles)
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    for place in range(plan.pp):
        kinds: tuple[int, ...] = (0,) * plan.tp
        for tensor in range(plan.tp):
            if tensor and kinds[tensor] != tensor:
                continue
            rank = plan.rank(pp=place, tp=tensor)
            nodes, held, told = _one_rank(step, rank, cut, shapes, stamped, notes)
            kinds = told if not tensor else kinds
            ranks = [plan.rank(pp=place, tp=other) for other in range(plan.tp) if kinds[other] == tensor]
            roles.append(Generated(ranks=tuple(ranks), plan=plan, nodes=nodes, held_bytes=held, facts=_facts(step)))
    return GeneratedRoles(plan=plan, roles=tuple(roles), notes=tuple(dict.fromkeys(notes)))


def _facts(step: Inference) -> dict[str, Any]:
    named = {"model": step.model_name} if step.model_name else {}
    return {"source": "synth", "world_size": step.plan.world_size, "plan": str(step.plan), **named,
            "meshloom_version": meshloom.__version__}  # fmt: skip


def _one_rank(
    step: Inference, rank: int, cut: Any, shapes: dict[str, tuple[int, ...]], stamped: bool, notes: list[str]
) -> tuple[list[Node], int, tuple[int, ...]]:
    """The nodes of a rank, the bytes of its weights, and which places of tp run the same."""
    with fake_world(rank, step.plan.world_size):
        mesh = make_mesh(step.plan, torch.device("cpu"))
        with FakeTensorMode(allow_non_fake_inputs=True):
            model = _in_dtype(build_model(step.config, "causal", seed=0), DTYPES[step.precision])
            example = example_batch("causal", micro_batch=1, seq_length=8)
            model = cut_model(model, plan=step.plan, mesh=mesh, example=example, cut=cut).eval()
            model = lay_out_for_one_row(model.requires_grad_(False))
            inner = model.model if isinstance(model, Pipeline) else model
            kinds = tensor_kinds(inner, shapes, step.plan)
            if stamped:
                try:
                    return (*_stamped(step, model, mesh, rank), kinds)
                except NotAlike as reason:
                    notes.append(f"every decode step is captured: {reason}")
            nodes, _, held = _captured(step, model, mesh, rank, range(1, step.num_output_tokens))
            return nodes, held, kinds


def _in_dtype(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """The model with floating-point tensors of `dtype`, as `to` makes it, which cannot swap fake tensors."""
    made: dict[int, Tensor] = {}

    def convert(tensor: Tensor) -> Tensor:
        new = tensor.detach().to(dtype) if tensor.is_floating_point() else tensor
        return made.setdefault(id(tensor), nn.Parameter(new) if isinstance(tensor, nn.Parameter) else new)

    for module in model.modules() if dtype != torch.float32 else ():
        holders: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
        for held in holders:
            held.update({name: convert(tensor) for name, tensor in held.items() if tensor is not None})
    return model


def _captured(
    step: Inference, model: nn.Module, mesh: Mesh, rank: int, decode: Sequence[int]
) -> tuple[list[Node], list[int], int]:
    """Nodes of the prefill and of some decode steps, where each begins, and the bytes of weights and buffers.

    Decode step k reads the k-th new token; steps that are left out are as if they had been done.
    """
    inner = model.model if isinstance(model, Pipeline) else model
    ids = torch.zeros(step.batch_size, step.num_input_tokens, dtype=torch.long)
    if isinstance(model, Pipeline):
        for example in (ids, ids[:, :1]):
            model.shapes({"input_ids": example})
    total = step.num_input_tokens + step.num_output_tokens
    cache: Cache = make_cache(model, batch_size=step.batch_size, max_length=total, device=mesh.device)
    builder = TraceBuilder(rank=rank, world_size=step.plan.world_size, source="synth")
    watcher = StepWatcher(builder, groups_of(mesh), {id(module): path for path, module in inner.named_modules()})
    watcher.hold([*model.parameters(), *model.buffers(), ids])
    with watcher.watching():
        tokens = prefill_step(model, ids, mesh=mesh, cache=cache)
        for k in decode:
            missing = step.num_input_tokens + k - 1 - cache.length
            if missing:
                cache.advance(missing)
            tokens = decode_step(model, tokens, mesh=mesh, cache=cache)
    nodes = builder.finish().nodes
    return list(nodes), [begin for _, begin in watcher.marks[1:]], watcher.memory.held_bytes


def _stamped(step: Inference, model: nn.Module, mesh: Mesh, rank: int) -> tuple[list[Node], int]:
    """The nodes of all steps from a few: what they say of the last one is held to it."""
    last = step.num_output_tokens - 1
    few = [*range(1, _FIRST + _NUM_PROVEN), last]
    if last <= few[-2] + 1:
        raise NotAlike(f"there are but {last} of them")
    nodes, begins, held = _captured(step, model, mesh, rank, few)
    ends = [*begins[1:], len(nodes)]
    steps = [nodes[begin:end] for begin, end in zip(begins, ends, strict=True)]
    lines = repeated(steps[1], steps[2])
    fills = frozenset(node.id for node in nodes[: begins[0]] if node.name.rpartition("::")[2] in _FILLS)
    for place, k in enumerate(few[_FIRST:], start=1):
        prove(lines, steps[place + 1], place=place, k=k - _FIRST, fills=fills if k == last else frozenset())
    size = len(lines)
    more = [line.at(k - _FIRST, k - _FIRST, size) for k in range(few[-2] + 1, last + 1) for line in lines]
    return [*nodes[: begins[-1]], *more], held
