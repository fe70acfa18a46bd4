"""Linear layers whose parameters a forward uses by itself, past the layer: a cut one would give it a part only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Outside(TorchDispatchMode):
    """Finds them while forwards run; `running` are the linear layers that run now."""

    def __init__(self, running: Sequence[str], linears: Mapping[str, nn.Module]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.running = running
        self.owners = {id(parameter): path for path, module in linears.items() for parameter in module.parameters()}
        self.storages: dict[int, tuple[str, Any]] = {}  # the second keeps the number from being used again
        self.found: dict[str, str] = {}

    def told(self, real: Tensor, fake: Tensor) -> None:
        """Note the fake tensor that stands for a parameter."""
        if id(real) in self.owners:
            storage = fake.untyped_storage()
            self.storages[storage._cdata] = self.owners[id(real)], storage

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not self.running and func.namespace != "prim":
            for leaf in tree_leaves((args, kwargs)):
                known = self.storages.get(leaf.untyped_storage()._cdata) if isinstance(leaf, Tensor) else None
                if known is not None:
                    told = f"{func.overloadpacket.__name__} uses its parameters past its forward"
                    self.found.setdefault(known[0], told)
        return func(*args, **(kwargs or {}))
