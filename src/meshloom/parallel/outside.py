"""Linear layers whose parameters a forward uses by itself, past the layer: a cut one would give it a part only."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
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

    def meet(self, op: str, tensors: Iterable[Any]) -> None:
        """Note whose parameters are among the tensors of an op."""
        for tensor in () if self.running else tensors:
            known = self.storages.get(tensor.untyped_storage()._cdata) if isinstance(tensor, Tensor) else None
            if known is not None:
                self.found.setdefault(known[0], f"{op} uses its parameters past its forward")

    def found_in(self, kinds: Mapping[str, Sequence[str]]) -> Iterator[tuple[str, str]]:
        """The layers that were found, and those in the same places of blocks that are like theirs; each with why."""
        for path, why in self.found.items():
            yield path, why
            for block, others in kinds.items():
                if path.startswith(f"{block}."):
                    yield from ((other + path[len(block) :], why) for other in others)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace != "prim":
            self.meet(func.overloadpacket.__name__, tree_leaves((args, kwargs)))
        return func(*args, **(kwargs or {}))


class _Enough(Exception):
    """Every kind of block has run."""


@contextmanager
def until_each_kind_ran(model: nn.Module, ran: Collection[str]) -> Iterator[dict[str, list[str]]]:
    """Within this a forward ends, and so does the block, when one block of each kind among those that `ran` has; gives
    path of that block -> those that are like it, class and shapes of parameters.

    Blocks are the entries of module lists. That no layer is past its like spares most of a deep model.
    """
    alike: dict[Any, list[str]] = {}
    for path in ran:
        block = model.get_submodule(path)
        shapes = tuple((name, tuple(parameter.shape)) for name, parameter in block.named_parameters())
        alike.setdefault((type(block), shapes), []).append(path)
    kinds = {paths[0]: paths for paths in alike.values()}
    missing = set(kinds)

    def done(path: str) -> None:
        missing.discard(path)
        if not missing:
            raise _Enough

    handles = [
        model.get_submodule(path).register_forward_hook(lambda module, args, output, path=path: done(path))
        for path in kinds
    ]
    try:
        yield kinds
    except _Enough:
        pass
    finally:
        for handle in handles:
            handle.remove()
