"""Random numbers of a rank: what all ranks of a tensor-parallel group hold alike must drop out alike, parts must not.

Outside of cut regions every rank draws the same numbers, so that copies stay copies. Within one, each rank draws its
own, or all parts would share one mask. The seed of a region is made from the state at its beginning, so a recomputed
layer draws what it drew before, and nothing has to be stored in a checkpoint.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

_APART = 0x9E3779B97F4A7C15  # an odd number without pattern: seeds of neighbours have nothing in common


def has_dropout(model: nn.Module) -> bool:
    """Whether any module of the model has a rate above 0 of something that it drops."""
    for module in model.modules():
        rates = [value for name, value in vars(module).items() if isinstance(value, float) and "drop" in name]
        if any(rate > 0 for rate in rates) or (isinstance(module, nn.Dropout) and module.p > 0):
            return True
    return False


class OwnRandom:
    """Switches the generator of this rank's device between the numbers of all and its own, which is the `index`-th."""

    def __init__(self, index: int) -> None:
        self.index = index
        self._seed: int | None = None  # of the region that is running

    def install(self, model: nn.Module, begins: Iterable[nn.Module], ends: Iterable[nn.Module]) -> None:
        """Draw this rank's own numbers from the end of any of `begins` to the beginning of any of `ends`."""
        for module in begins:
            module.register_forward_hook(self._begin)
        for module in ends:
            module.register_forward_pre_hook(self._end)
        # a stage of a pipeline leaves its forward by an exception, perhaps from within
        model.register_forward_hook(self._over, always_call=True)

    def _begin(self, module: nn.Module, args: Any, output: Tensor) -> None:
        if self._seed is not None or not module.training or not _is_real(output):
            return
        generator = _generator(output.device)
        self._seed = zlib.crc32(generator.get_state().numpy().tobytes())
        generator.manual_seed((self._seed + (self.index + 1) * _APART) % 2**63)

    def _end(self, module: nn.Module, args: Any) -> None:
        if self._seed is not None:
            self._go_on(args[0].device)

    def _over(self, module: nn.Module, args: Any, output: Any) -> None:
        if self._seed is not None:
            self._go_on(next(module.parameters()).device)

    def _go_on(self, device: torch.device) -> None:
        assert self._seed is not None
        _generator(device).manual_seed(self._seed)
        self._seed = None


def _is_real(x: Tensor) -> bool:
    return not isinstance(x, FakeTensor) and not x.is_meta and not torch.compiler.is_compiling()


def _generator(device: torch.device) -> torch.Generator:
    if device.type == "cuda":
        return torch.cuda.default_generators[device.index or 0]
    return torch.default_generator
