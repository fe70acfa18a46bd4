"""A decode step as one CUDA graph: launched whole, so that the host no longer bounds how fast kernels follow."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_WARM = 2  # calls as they stand first: libraries make their workspaces


class Graphed:
    """Calls a function of tensors, which is captured at its third call: call it with one function, always.

    The function must have the same shapes and memory each time, as with a `fixed` cache, and may ask for no values.
    """

    def __init__(self) -> None:
        self.count = 0
        self.graph: torch.cuda.CUDAGraph | None = None
        self.inputs: list[Tensor] = []
        self.output: Any = None

    def __call__(self, function: Callable[..., Any], *tensors: Tensor) -> Any:
        """What `function(*tensors)` returns; it lies in the graph's memory, and the next call writes over it."""
        self.count += 1
        if self.count <= _WARM:
            return function(*tensors)
        if self.graph is None:
            self.inputs = [tensor.clone() for tensor in tensors]
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self.output = function(*self.inputs)
        for mine, given in zip(self.inputs, tensors, strict=True):
            mine.copy_(given)
        self.graph.replay()
        return self.output
