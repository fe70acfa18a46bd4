"""How weights lie for generation: for a product with one row, a CPU reads them faster by columns."""

from __future__ import annotations

import torch
from torch import nn

from meshloom.parallel.linear import CutLinear, RowParallelLinear


@torch.no_grad()
def lay_out_for_one_row(model: nn.Module) -> nn.Module:
    """Let the weights (O, I) of linear layers on a CPU lie as (I, O) in memory; shapes and values stay what they are.

    The product of one row then adds up rows of memory instead of one dot product an output. Layers whose parts are
    summed add their bias within the product from now on, so the model is for inference only; returns it.
    """
    done: set[int] = set()
    for module in model.modules():
        if isinstance(module, RowParallelLinear) and module.leave is None:
            module.add_bias_once()
        weight = module._parameters.get("weight")
        if weight is None or weight.device.type != "cpu" or weight.dim() != 2 or id(weight) in done:
            continue
        if isinstance(module, nn.Linear) or (isinstance(module, CutLinear) and not module.input_major):
            done.add(id(weight))
            weight.data = weight.data.t().contiguous().t()
    return model
