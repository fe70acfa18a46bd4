"""Traces of all ranks from one pass: ranks that run the same thing share it, and only their groups differ."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import msgspec
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from meshloom.chakra.build import TraceBuilder, group_id
from meshloom.chakra.trace import Node, Trace
from meshloom.model.build import build_model, example_batch
from meshloom.model.config import Objective
from meshloom.model.step import make_optimizer, train_step
from meshloom.parallel.apply import check_plan, parallelize
from meshloom.parallel.data import data_parallel
from meshloom.parallel.mesh import Mesh, make_mesh
from meshloom.plan import Plan
from meshloom.synth.dispatch import Group, StepWatcher
from meshloom.synth.world import fake_world


def synthesise(
    config: Any,
    objective: Objective,
    *,
    plan: Plan,
    micro_batch: int,
    seq_length: int,
    max_grad_norm: float = 1.0,
    model_name: str = "",
) -> dict[int, Trace]:
    """The traces of a training step of `config` on every rank of `plan`, by rank; nothing is computed.

    `micro_batch` sequences of `seq_length` tokens a rank and micro-batch. Raises PlanError if the model cannot take
    the plan.
    """
    model = build_model(config, objective, seed=0, device="meta")
    check_plan(model, plan, example_batch(objective, micro_batch=1, seq_length=8, device="meta"))
    # Every rank has the same part of the work until there are pipeline stages: one role.
    trace = _one_rank(
        config,
        objective,
        plan=plan,
        rank=0,
        micro_batch=micro_batch,
        seq_length=seq_length,
        max_grad_norm=max_grad_norm,
        model_name=model_name,
    )
    return {rank: stamp(trace, plan, rank) for rank in range(plan.world_size)}


def _one_rank(
    config: Any,
    objective: Objective,
    *,
    plan: Plan,
    rank: int,
    micro_batch: int,
    seq_length: int,
    max_grad_norm: float,
    model_name: str,
) -> Trace:
    builder = TraceBuilder(
        rank=rank, world_size=plan.world_size, source="synth", plan=str(plan), step=1, model=model_name or None
    )
    with fake_world(rank, plan.world_size):
        mesh = make_mesh(plan, torch.device("cpu"))  # the mesh counts ranks in real tensors
        with FakeTensorMode(allow_non_fake_inputs=True):
            model = parallelize(
                build_model(config, objective, seed=0),
                plan=plan,
                mesh=mesh,
                example=example_batch(objective, micro_batch=1, seq_length=8),
            ).train()
            paths = {id(module): path for path, module in model.named_modules()}
            # The learning rate is no matter here: nothing is computed.
            optimizer = make_optimizer(model, learning_rate=1e-4, weight_decay=0.1)
            model = data_parallel(model, mesh)
            watcher = StepWatcher(builder, _groups(mesh), paths)
            # The first step makes the optimizer's states and learns the order of the gradients; all others
            # are like the second.
            for context in (nullcontext(), watcher.watching()):
                batches = [
                    example_batch(objective, micro_batch=micro_batch, seq_length=seq_length)
                    for _ in range(plan.num_micro_batches)
                ]
                with context:
                    train_step(model, optimizer, batches, mesh=mesh, max_grad_norm=max_grad_norm)
    return builder.finish()


def _groups(mesh: Mesh) -> dict[str, Group]:
    return {group.group_name: Group(mesh.plan.group(axis, mesh.rank), axis) for axis, group in mesh.groups.items()}


def stamp(trace: Trace, plan: Plan, rank: int) -> Trace:
    """`trace` as `rank` would have it: the same nodes, with the groups that this rank belongs to."""
    ids = {axis: plan.group(axis, rank) for axis in plan.degrees}  # each group once
    names = {axis: group_id(ranks, plan.world_size) for axis, ranks in ids.items()}

    def own(node: Node) -> Node:
        axis = node.get("comm_axis")
        if axis is None:
            return node
        attrs = {**node.attrs, "comm_ranks": list(ids[axis]), "pg_name": names[axis]}
        return msgspec.structs.replace(node, attrs=attrs)

    return Trace(nodes=[own(node) for node in trace.nodes], attrs={**trace.attrs, "rank": rank}, version=trace.version)
