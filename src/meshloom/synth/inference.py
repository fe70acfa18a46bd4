"""Traces of generation on ranks that are not there: the prefill, then a step for each token, on every rank of a plan.

The steps are those that `generate` runs, on fake tensors. Decode steps differ in the length of the cache alone, which
is proven on four of them (`repeat.py`); the others are stamped out.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import meshloom
from meshloom.chakra.build import TraceBuilder
from meshloom.chakra.trace import Node, Trace
from meshloom.errors import PlanError, UsageError
from meshloom.model.build import build_model, example_batch
from meshloom.model.cache import Cache, make_cache
from meshloom.model.layout import lay_out_for_one_row
from meshloom.model.step import DTYPES, Precision, decode_step, prefill_step
from meshloom.model.weights import inner_model
from meshloom.parallel.apply import cut_model, find_cut
from meshloom.parallel.flow import find_layers
from meshloom.parallel.mesh import Mesh, make_mesh
from meshloom.parallel.pairs import Discovery
from meshloom.parallel.pipeline import Pipeline
from meshloom.parallel.stages import Stages, layer_costs
from meshloom.plan import Plan
from meshloom.synth.dispatch import StepWatcher
from meshloom.synth.folder import ROLES_FILE, RoleOfRanks, whole_folder, write_file
from meshloom.synth.generated import Generated
from meshloom.synth.layers import FEWEST, Layers, UnlikeLayers, with_all_layers
from meshloom.synth.parts import NotAlike
from meshloom.synth.reduced import bounds_of, tensor_kinds, unlike_layers, with_layers
from meshloom.synth.repeat import prove, repeated
from meshloom.synth.roles import flow_of, groups_of
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
                before, data = role, role.encoded()
                facts = {**role.attrs(role.ranks[0]), **({"role_size": len(role.ranks)} if roles_only else {})}
                for rank in role.ranks[:1] if roles_only else role.ranks:
                    mine = role.on(rank)
                    if mine is not before:
                        before, data = mine, mine.encoded()
                    total += write_file(part, rank, {**facts, "rank": rank}, np.frombuffer(data, np.uint8))
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
    if stamped:
        try:
            return _roles(step, _given(step, notes, stamped=True), notes, stamped=True)
        except UnlikeLayers as reason:
            notes[:] = [f"every layer is captured by itself: {reason}"]
    return _roles(step, _given(step, notes, stamped=False), notes, stamped=stamped)


class _Given(NamedTuple):
    """The model that is captured, how it is cut, and which of its layers stand for which at each place of pp."""

    config: Any
    cut: tuple[Discovery, Stages | None]
    shapes: dict[str, tuple[int, ...]]  # of the whole parameters
    layers: tuple[Layers, ...]  # none: the model is captured as it is


def _given(step: Inference, notes: list[str], *, stamped: bool) -> _Given:
    """The model itself, or if layers are stamped out and it has many, one of few layers a stage."""
    config, plan = step.config, step.plan
    example = example_batch("causal", micro_batch=1, seq_length=8, device="meta")
    model = build_model(config, "causal", seed=0, device="meta")
    layers: tuple[Layers, ...] = ()
    if stamped and getattr(config, "num_hidden_layers", 0) > FEWEST * plan.pp:
        why = "a plan written by hand may name one layer" if step.styles else unlike_layers(model, config)
        if why:
            notes.append(f"every layer is captured by itself: {why}")
        else:
            layers = _few_layers(config, plan, example)
            config = with_layers(config, layers[-1].captured.stop)
            model = build_model(config, "causal", seed=0, device="meta")
            plan = replace(plan, stage_layers=tuple(len(each.captured) for each in layers))
    found, stages = find_cut(model, plan, example, step.styles)
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    return _Given(config, (found, stages), shapes, layers)


def _few_layers(config: Any, plan: Plan, example: Mapping[str, Tensor]) -> tuple[Layers, ...]:
    """Which layers of each stage are captured, counted among these, and for which of the whole model they stand."""
    few = build_model(with_layers(config, FEWEST), "causal", seed=0, device="meta")
    total = config.num_hidden_layers
    bounds = [0, total]
    if plan.pp > 1:
        bounds = bounds_of(layer_costs(few, flow_of(few, example)), total, plan)
    prefix = find_layers(few)[0].removesuffix("0")
    ends = list(accumulate(min(FEWEST, end - begin) for begin, end in pairwise(bounds)))
    captured = [range(begin, end) for begin, end in pairwise([0, *ends])]
    return tuple(Layers(prefix, *ranges) for ranges in zip(captured, (range(*pair) for pair in pairwise(bounds))))


def _roles(step: Inference, given: _Given, notes: list[str], *, stamped: bool) -> GeneratedRoles:
    """The roles, one pass for each kind of rank; raises UnlikeLayers."""
    plan = step.plan
    roles: list[Generated] = []
    for place in range(plan.pp):
        kinds: tuple[int, ...] = (0,) * plan.tp
        for tensor in range(plan.tp):
            if tensor and kinds[tensor] != tensor:
                continue
            made, told = _one_rank(step, plan.rank(pp=place, tp=tensor), given, stamped, notes)
            kinds = told if not tensor else kinds
            ranks = [plan.rank(pp=place, tp=other) for other in range(plan.tp) if kinds[other] == tensor]
            roles.append(replace(made, ranks=tuple(ranks)))
    return GeneratedRoles(plan=plan, roles=tuple(roles), notes=tuple(dict.fromkeys(notes)))


def _facts(step: Inference) -> dict[str, Any]:
    named = {"model": step.model_name} if step.model_name else {}
    return {"source": "synth", "world_size": step.plan.world_size, "plan": str(step.plan), **named,
            "meshloom_version": meshloom.__version__}  # fmt: skip


def _one_rank(
    step: Inference, rank: int, given: _Given, stamped: bool, notes: list[str]
) -> tuple[Generated, tuple[int, ...]]:
    """What a rank does, and which places of tp run the same."""
    with fake_world(rank, step.plan.world_size):
        mesh = make_mesh(step.plan, torch.device("cpu"))
        with FakeTensorMode(allow_non_fake_inputs=True):
            model = _in_dtype(build_model(given.config, "causal", seed=0), DTYPES[step.precision])
            example = example_batch("causal", micro_batch=1, seq_length=8)
            model = cut_model(model, plan=step.plan, mesh=mesh, example=example, cut=given.cut).eval()
            model = lay_out_for_one_row(model.requires_grad_(False))
            kinds = tensor_kinds(inner_model(model), given.shapes, step.plan)
            if stamped:
                try:
                    return _stamped(step, model, mesh, rank, given), kinds
                except UnlikeLayers:
                    raise
                except NotAlike as reason:
                    notes.append(f"every decode step is captured: {reason}")
            nodes, _, held = _captured(step, model, mesh, rank, range(1, step.num_output_tokens), given)
            return Generated(ranks=(rank,), plan=step.plan, nodes=nodes, held_bytes=held, facts=_facts(step)), kinds


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
    step: Inference, model: nn.Module, mesh: Mesh, rank: int, decode: Sequence[int], given: _Given
) -> tuple[list[Node], list[int], int]:
    """Nodes of the prefill and of some decode steps, where each begins, and the bytes of weights and buffers.

    Decode step k reads the k-th new token; steps that are left out are as if they had been done.
    """
    inner = inner_model(model)
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
    nodes, begins = list(builder.finish().nodes), [begin for _, begin in watcher.marks[1:]]
    if not given.layers:
        return nodes, begins, watcher.memory.held_bytes
    layers = given.layers[mesh.index("pp")]
    missing = step.config.num_hidden_layers - given.config.num_hidden_layers
    held = watcher.memory.held_bytes + _layer_bytes(inner, layers, missing)
    return *with_all_layers(nodes, begins, layers), held


def _layer_bytes(model: nn.Module, layers: Layers, missing: int) -> int:
    """What the layers that were not captured hold: parameters of this stage's, and buffers of all `missing`."""
    one = model.get_submodule(f"{layers.prefix}{layers.captured[0]}")
    more = len(layers.whole) - len(layers.captured)
    # beside its parameters, a cut layer may keep its share of a bias as a plain tensor
    plain = (value for module in one.modules() for value in vars(module).values() if isinstance(value, Tensor))
    return more * _num_bytes([*one.parameters(), *plain]) + missing * _num_bytes(one.buffers())


def _num_bytes(tensors: Iterable[Tensor]) -> int:
    storages = {tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


def _stamped(step: Inference, model: nn.Module, mesh: Mesh, rank: int, given: _Given) -> Generated:
    """All steps from a few: what these say of the last one is held to it."""
    last = step.num_output_tokens - 1
    few = [*range(1, _FIRST + _NUM_PROVEN), last]
    if last <= few[-2] + 1:
        raise NotAlike(f"there are but {last} of them")
    nodes, begins, held = _captured(step, model, mesh, rank, few, given)
    ends = [*begins[1:], len(nodes)]
    steps = [nodes[begin:end] for begin, end in zip(begins, ends, strict=True)]
    lines = repeated(steps[1], steps[2])
    fills = frozenset(node.id for node in nodes[: begins[0]] if node.name.rpartition("::")[2] in _FILLS)
    for place, k in enumerate(few[_FIRST:], start=1):
        prove(lines, steps[place + 1], place=place, k=k - _FIRST, fills=fills if k == last else frozenset())
    return Generated(
        ranks=(rank,),
        plan=step.plan,
        nodes=nodes[: begins[-1]],
        lines=lines,
        places=range(few[-2] + 1 - _FIRST, last + 1 - _FIRST),
        held_bytes=held,
        facts=_facts(step),
    )
