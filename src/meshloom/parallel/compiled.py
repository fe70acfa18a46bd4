"""torch.compile of a model's layers, each by itself: equal ones are compiled once, what lies between stays as it is."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from meshloom.errors import UsageError
from meshloom.parallel.recompute import without_cache


def compile_layers(model: nn.Module, layers: Sequence[str], *, keep_cache: bool = False) -> None:
    """Let torch.compile make kernels of the forward of `layers`, by path, when they first run.

    Parameters become inputs of what is compiled, so that one kernel serves all layers of a kind.
    """
    if not keep_cache:
        without_cache(model)
    for path in layers:
        layer: Any = model.get_submodule(path)
        layer.forward = _Compiled(layer.forward)


class _Compiled:
    """A forward that is compiled when it first runs; a copy of it, with a model, is the plain forward of the copy."""

    def __init__(self, forward: Callable[..., Any]) -> None:
        self._forward, self._compiled = forward, torch.compile(forward)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._compiled(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return copy.deepcopy(self._forward, memo)


def check_compiler(device_type: str) -> None:
    """Raise UsageError where torch.compile finds no compiler for `device_type`: cpu needs one of C++, cuda Triton."""
    # a second of imports, which only those pay who compile
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler
    from torch.utils._triton import has_triton

    if device_type == "cuda":
        if not has_triton():
            raise UsageError(
                "--compile: expected Triton, which torch.compile needs on GPUs; install it, or leave it out"
            )
        return
    try:
        get_cpp_compiler()
    except InvalidCxxCompiler as error:
        raise UsageError(
            "--compile: expected a C++ compiler, which torch.compile needs on a CPU, found none; "
            "install g++, or leave out --compile"
        ) from error
