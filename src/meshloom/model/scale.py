"""The loss scale of fp16: a power of two that keeps small gradients from vanishing; steps that overflow do not count.

It lives on the device and nothing of it is read in a step; all ranks of a mesh skip the same steps.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from meshloom.parallel.mesh import Mesh

INITIAL = 65536.0
_GROWTH, _BACKOFF, _INTERVAL = 2.0, 0.5, 2000  # as Micikevicius et al. 2018, section 3.2, and torch's GradScaler
LOWEST = 1.0  # below this it is not the scale that makes gradients overflow


class LossScale:
    """What the loss is multiplied with, () float32, and how many steps went well since it last changed, () int32."""

    def __init__(self, device: torch.device, *, value: float = INITIAL, streak: int = 0) -> None:
        self.value = torch.tensor(value, device=device)
        self._streak = torch.tensor(streak, dtype=torch.int32, device=device)

    def unscale(self, gradients: Sequence[Tensor], found_inf: Tensor, mesh: Mesh) -> None:
        """Divide gradients in place; `found_inf`, () float32, becomes 1 on all ranks if one is not finite on any.

        Data-parallel ranks hold the same sums by now, so only ranks that hold other parts of the model are asked.
        """
        found_inf.zero_()
        if gradients:
            torch._amp_foreach_non_finite_check_and_unscale_(list(gradients), found_inf, self.value.reciprocal())
        for axis in ("tp", "pp"):
            if axis in mesh.groups:
                dist.all_reduce(found_inf, op=dist.ReduceOp.MAX, group=mesh.groups[axis])

    def update(self, found_inf: Tensor) -> None:
        """Halve after a step that overflowed; double after 2000 that did not."""
        torch._amp_update_scale_(self.value, self._streak, found_inf, _GROWTH, _BACKOFF, _INTERVAL)

    def state(self) -> dict[str, float]:
        """What a checkpoint keeps; reads from the device."""
        return {"value": float(self.value), "streak": int(self._streak)}
