"""How weights lie for generation: for a product with one row, a CPU reads them faster by columns."""

from __future__ import annotations

from functools import partial

import torch
from torch import nn
from torch.nn import functional

from meshloom.parallel.linear import CutLinear, RowParallelLinear
from meshloom.parallel.styles import linear_shape


@torch.no_grad()
def lay_out_for_one_row(model: nn.Module) -> nn.Module:
    """Let the weights (O, I) of linear layers on a CPU lie as (I, O) in memory; shapes and values stay what they are.

    The product of one row then adds up rows of memory instead of one dot product an output. Layers whose parts are
    summed add their bias within the product from now on, and HF's Conv1D is called as the linear layer that it is; so
    the model is for inference only, and stays where it is. Returns it.
    """
    done: set[int] = set()
    for module in model.modules():
        weight = module._parameters.get("weight")
        if weight is None:  # also of a layer that another stage runs
            continue
        if isinstance(module, RowParallelLinear) and module.leave is None:
            module.add_bias_once()
        shape = linear_shape(module)
        if shape is not None and shape.input_major:
            vars(module)["forward"] = partial(functional.linear, weight=weight.t(), bias=module._parameters["bias"])
        if weight.device.type != "cpu" or weight.dim() != 2 or id(weight) in done:
            continue
        if isinstance(module, nn.Linear) or (isinstance(module, CutLinear) and not module.input_major):
            done.add(id(weight))
            weight.data = weight.data.t().contiguous().t()
    return model
