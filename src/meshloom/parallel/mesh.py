"""From a `Plan` to process groups: the mesh that this rank sees. Groups are passed on, never global.

Needs torch.distributed to be initialised with as many ranks as the plan has (any backend, the fake one too).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from meshloom.errors import PlanError
from meshloom.plan import AXES, Axis, Plan


@dataclass(frozen=True, slots=True, kw_only=True)
class Mesh:
    """This rank's place in the plan, the device it computes on, and its group on each axis of a degree above 1.

    `back_group` has the ranks of the pipeline's group again: gradients go back through it while activations go
    forward, because NCCL keeps the messages of one group between two ranks in one order.
    """

    plan: Plan
    rank: int
    device: torch.device
    groups: Mapping[Axis, dist.ProcessGroup]
    back_group: dist.ProcessGroup | None = None
    parts: dict[tuple[Axis, tuple[int, ...]], dist.ProcessGroup | None] = field(default_factory=dict)

    def part(self, axis: Axis, places: tuple[int, ...]) -> dist.ProcessGroup | None:
        """The group of the ranks at `places` of this rank's group on `axis`, None if it is not one of them.

        Every rank of the mesh must ask for the same places at the same point: the first time, groups are made.
        """
        if (axis, places) not in self.parts:
            mine = None
            for ranks in self.plan.groups(axis):
                group = dist.new_group([ranks[place] for place in places])
                mine = group if self.rank in [ranks[place] for place in places] else mine
            self.parts[axis, places] = mine
        return self.parts[axis, places]

    def degree(self, axis: Axis) -> int:
        """How many ranks the axis has."""
        return self.plan.degrees[axis]

    def index(self, axis: Axis) -> int:
        """This rank's place on the axis."""
        return self.plan.coordinate(self.rank)[axis]


def make_mesh(plan: Plan | str, device: torch.device | None = None, *, like: DeviceMesh | None = None) -> Mesh:
    """The mesh of the calling rank; raises PlanError if the plan needs another number of ranks than were started.

    `device` is by default the current GPU if the process group is NCCL's, else the CPU. `like` is a mesh of torch's
    whose groups are to serve: its axes named tp, cp, dp and pp, laid out as `Plan` says. Every rank must call this, at
    the same point: it creates process groups.
    """
    if not dist.is_initialized():
        raise PlanError(
            "expected torch.distributed to be initialised, got no process group: start ranks with torchrun, and call "
            "torch.distributed.init_process_group first"
        )
    plan = (Plan.parse(plan) if isinstance(plan, str) else plan).with_world_size(dist.get_world_size())
    if device is None:
        on_gpu = "nccl" in dist.get_backend()
        device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")
    # Slowest axis first, as DeviceMesh lays ranks out; axes of degree 1 need no group.
    axes = [axis for axis in reversed(AXES) if plan.degrees[axis] > 1]
    groups: dict[Axis, dist.ProcessGroup] = {}
    if like is not None:
        _check_like(plan, like, axes)
    if axes:
        device_mesh = like or init_device_mesh(
            device.type, tuple(plan.degrees[axis] for axis in axes), mesh_dim_names=tuple(axes)
        )
        groups = {axis: device_mesh.get_group(axis) for axis in axes}
    back_group = None
    for ranks in plan.groups("pp") if plan.pp > 1 else []:
        group = dist.new_group(list(ranks))
        back_group = group if dist.get_rank() in ranks else back_group
    return Mesh(plan=plan, rank=dist.get_rank(), device=device, groups=groups, back_group=back_group)


def _check_like(plan: Plan, like: DeviceMesh, axes: Sequence[Axis]) -> None:
    """Raise PlanError if the mesh has other axes than the plan, or ranks in other places."""
    names = like.mesh_dim_names or ()
    shape = dict(zip(names, like.mesh.shape, strict=False))
    given = ", ".join(f"{name}{size}" for name, size in shape.items()) or f"no names for {tuple(like.mesh.shape)}"
    if {name: size for name, size in shape.items() if size > 1} != {axis: plan.degrees[axis] for axis in axes}:
        raise PlanError(f"plan {plan}: expected a mesh with axes of these names and degrees, got {given}")
    if like.mesh.flatten().tolist() != list(range(plan.world_size)) or [n for n in names if shape[n] > 1] != [*axes]:
        raise PlanError(
            f"plan {plan}: expected ranks laid out in the order of init_device_mesh with axes {', '.join(axes)}, the "
            f"slowest first, got {given}"
        )


def axis_groups(plan: Plan, rank: int) -> dict[tuple[int, ...], Axis]:
    """The ranks of each group that `rank` belongs to -> the axis; the smaller axis wins where two have equal ranks."""
    return {plan.group(axis, rank): axis for axis in reversed(AXES) if plan.degrees[axis] > 1}
