"""What a collective is: by the names that c10d, the host trace and NCCL's kernels give it. No torch."""

from __future__ import annotations

from meshloom.chakra.trace import CommType

# c10d op -> (what it is, index of the argument with this rank's input, of the one with its output)
C10D: dict[str, tuple[CommType, int, int]] = {
    "allreduce_": (CommType.ALL_REDUCE, 0, 0),
    "allreduce_coalesced_": (CommType.ALL_REDUCE, 0, 0),
    "broadcast_": (CommType.BROADCAST, 0, 0),
    "reduce_": (CommType.REDUCE, 0, 0),
    "allgather_": (CommType.ALL_GATHER, 1, 0),
    "_allgather_base_": (CommType.ALL_GATHER, 1, 0),
    "allgather_into_tensor_coalesced_": (CommType.ALL_GATHER, 1, 0),
    "reduce_scatter_": (CommType.REDUCE_SCATTER, 1, 0),
    "_reduce_scatter_base_": (CommType.REDUCE_SCATTER, 1, 0),
    "reduce_scatter_tensor_coalesced_": (CommType.REDUCE_SCATTER, 1, 0),
    "alltoall_": (CommType.ALL_TO_ALL, 1, 0),
    "alltoall_base_": (CommType.ALL_TO_ALL, 1, 0),
    "gather_": (CommType.GATHER, 1, 0),
    "scatter_": (CommType.SCATTER, 1, 0),
    "barrier": (CommType.BARRIER, 0, 0),
}

# What NCCL's kernels, their annotations and record_param_comms call them, without underscores and case; the first
# that a name contains counts.
_NAMES: tuple[tuple[str, CommType], ...] = (
    ("reducescatter", CommType.REDUCE_SCATTER),
    ("allreduce", CommType.ALL_REDUCE),
    ("allgather", CommType.ALL_GATHER),
    ("alltoall", CommType.ALL_TO_ALL),
    ("broadcast", CommType.BROADCAST),
    ("barrier", CommType.BARRIER),
    ("scatter", CommType.SCATTER),
    ("gather", CommType.GATHER),
    ("reduce", CommType.REDUCE),
)

_REDUCTIONS = (("avg", "avg"), ("sum", "sum"), ("prod", "product"), ("minmax", "min"), ("max", "max"), ("min", "min"))


def collective_named(*names: str) -> CommType | None:
    """The collective that the first telling name means; None if none tells."""
    for name in names:
        plain = name.lower().replace("_", "")
        for part, kind in _NAMES:
            if part in plain:
                return kind
    return None


def reduction_named(kernel: str) -> str:
    """The reduction in a kernel's name, such as ncclDevKernel_AllReduce_Sum_f16_RING_LL; empty if it names none."""
    plain = kernel.lower().partition("(")[0]
    return next((reduction for part, reduction in _REDUCTIONS if f"_{part}" in plain), "")


def is_communication(kernel: str) -> bool:
    """Whether a kernel is NCCL's or RCCL's."""
    return kernel.startswith(("ncclDevKernel", "ncclKernel", "ncclSymk", "rcclKernel"))
