"""Activation recompute: what backward needs of a layer is computed again, not kept (Chen et al. 2016).

`full` keeps the input of each layer. `selective` keeps what linear layers give and computes all else again: the core of
attention and the pointwise ops, which cost memory but little work (Korthikanti et al. 2022, section 5). Layers are
found by structure; cut layers' collectives are kept by `selective`, so that it adds no communication.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from meshloom.plan import Recompute

# What is kept by `selective`: products with weights, and what was communicated. A sum that took the memory of a product
# must not be taken again: the product that was kept is that sum already.
_KEPT = frozenset((
    "mm", "addmm", "_scaled_mm", "all_reduce", "all_reduce_", "all_gather_into_tensor", "reduce_scatter_tensor",
    "wait_tensor",
))  # fmt: skip


def recompute(model: nn.Module, layers: Sequence[str], mode: Recompute) -> None:
    """Let the `layers` of `model`, by path, compute again in backward what `mode` does not keep.

    They get no cache of keys and values, which a layer that runs twice would fill twice. The model keeps its own:
    forwards without one look into position ids for packed sequences, and so wait for the device in every step.
    """
    if mode == "none":
        return
    context: Any = partial(create_selective_checkpoint_contexts, _keep) if mode == "selective" else None
    for path in layers:
        layer = model.get_submodule(path)
        layer.forward = partial(_forward, layer.forward, context)


def without_cache(model: nn.Module) -> None:
    """Let the forward keep no keys and values for a next one."""
    configs = {id(config): config for module in model.modules() if (config := getattr(module, "config", None))}
    for config in configs.values():
        if getattr(config, "use_cache", False):
            config.use_cache = False


def _forward(forward: Callable[..., Any], context: Any, *args: Any, **kwargs: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    more = {} if context is None else {"context_fn": context}
    args = tuple(None if _is_cache(value) else value for value in args)
    kwargs = {name: None if _is_cache(value) else value for name, value in kwargs.items()}
    return checkpoint(forward, *args, use_reentrant=False, **more, **kwargs)


def _is_cache(value: Any) -> bool:
    """Whether the argument is what transformers calls a cache, which this room does not import."""
    return any(kind.__name__ == "Cache" for kind in type(value).__mro__)


def _keep(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    name = op.overloadpacket.__name__ if hasattr(op, "overloadpacket") else ""
    return CheckpointPolicy.MUST_SAVE if name in _KEPT else CheckpointPolicy.PREFER_RECOMPUTE
