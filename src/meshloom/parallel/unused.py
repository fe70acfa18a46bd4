"""Parameters that no gradient reaches: DistributedDataParallel must be told, or it waits for them for ever.

Found by one forward and backward on tensors without data, before training begins.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from meshloom.parallel.fake import dataless_copy, fake_copy, run_fake


def find_unused(model: nn.Module, example: Mapping[str, Tensor]) -> frozenset[str] | None:
    """Names of the parameters that take no part in the loss of `example`, or in its outputs if it has no labels.

    None if the forward decides by values which it uses. The model is unchanged.
    """
    for copied in (dataless_copy, fake_copy):
        try:
            return _without_gradient(copied(model).train(), example)
        except Exception:  # of other people's forwards; if both fail, DDP itself looks in each step, slower but right
            continue
    return None


def _without_gradient(model: nn.Module, example: Mapping[str, Tensor]) -> frozenset[str]:
    unused: set[str] = set()

    def finish(returned: Any) -> None:
        loss = getattr(returned, "loss", None)
        leaves = [loss] if isinstance(loss, Tensor) else tree_leaves(returned)
        ends = [leaf.sum() for leaf in leaves if isinstance(leaf, Tensor) and leaf.requires_grad]
        named = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        grads = torch.autograd.grad(ends, list(named.values()), allow_unused=True) if ends else [None] * len(named)
        unused.update(name for name, grad in zip(named, grads, strict=True) if grad is None)

    run_fake(model, example, result=finish, with_gradients=True)
    return frozenset(unused)
