"""A vocabulary cut over the tensor-parallel group: embedding, head and cross-entropy. Full logits exist on no rank.

The model's own code computes the loss from the logits of its head. From the head to the end of the forward, a mode
sees every function that gets logits of which this rank holds a part: casts, scalings and reshapes keep them cut,
cross-entropy is computed from the parts (Shoeybi et al. 2019, section 3), and whatever else gets them whole, gathered.
So a model whose loss does something unknown costs memory, and is never wrong.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.weak import WeakTensorKeyDictionary

from meshloom.parallel.linear import all_reduce, leave_region
from meshloom.parallel.shard import Shard

_functional = torch.ops._c10d_functional


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """This rank's entries [begin, end) of a vocabulary of `size`; `degree` ranks share it."""

    size: int
    index: int
    degree: int
    group: dist.ProcessGroup | None  # None: nothing is cut, the forward is only followed

    @property
    def range(self) -> tuple[int, int]:
        """(begin, end) of this rank's entries."""
        return Shard(dim=0).ranges(self.size, self.index, self.degree)[0]

    @property
    def num_entries(self) -> int:
        """How many entries this rank holds."""
        begin, end = self.range
        return end - begin


class _GatherLogits(torch.autograd.Function):
    """Forward: the whole of all parts (…, V/tp) -> (…, V). Backward: this rank's part, since all ranks go on alike."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, part: Part) -> Tensor:
        assert part.group is not None
        ctx.range = part.range
        sizes = [end - begin for begin, end in (Shard(dim=0).ranges(part.size, i, part.degree)[0]
                                                for i in range(part.degree))]  # fmt: skip
        padded = functional.pad(x, (0, max(sizes) - x.size(-1))).contiguous()
        gathered = _functional.all_gather_into_tensor(padded, part.degree, part.group.group_name)
        parts = _functional.wait_tensor(gathered).unflatten(0, (part.degree, -1))
        return torch.cat([parts[i][..., :size] for i, size in enumerate(sizes)], dim=-1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        begin, end = ctx.range
        return grads[0][..., begin:end].contiguous(), None


def gather_logits(x: Tensor, part: Part) -> Tensor:
    """This rank's logits (…, V/tp) -> those of the whole vocabulary (…, V), the same on every rank."""
    if part.group is None:
        return x
    result: Tensor = _GatherLogits.apply(x if x.dim() else x[None], part)  # type: ignore[no-untyped-call]
    return result


class _CrossEntropy(torch.autograd.Function):
    """-log softmax at the target, of each row, from logits cut over the vocabulary: (N, V/tp), (N,) -> (N,)."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, target: Tensor, part: Part, ignored: int) -> Tensor:
        assert part.group is not None
        ctx.dtype, name = logits.dtype, part.group.group_name
        work = logits.float() if logits.dtype in (torch.half, torch.bfloat16) else logits
        highest = all_reduce(work.amax(dim=-1), name, "max")
        shifted = work - highest.unsqueeze(-1)
        begin, end = part.range
        known = target != ignored
        mine = known & (target >= begin) & (target < end)
        place = (target - begin).masked_fill(~mine, 0).unsqueeze(-1)
        picked = shifted.gather(-1, place).squeeze(-1).masked_fill(~mine, 0)
        powers = shifted.exp_()
        total, at_target = all_reduce(torch.stack([powers.sum(dim=-1), picked]), name).unbind()
        ctx.save_for_backward(powers, total, place, mine, known)
        return (total.log() - at_target).masked_fill(~known, 0).to(ctx.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        powers, total, place, mine, known = ctx.saved_tensors
        grad = grads[0].to(powers.dtype).masked_fill(~known, 0)
        result = powers * (grad / total).unsqueeze(-1)
        result.scatter_add_(-1, place, (-grad * mine).unsqueeze(-1))
        return result.to(ctx.dtype), None, None, None


class CutLogits:
    """Logits of which this rank holds a part, `local` (…, V/tp); used as a tensor, they are gathered first.

    Every rank of the tensor-parallel group must then use them at the same point.
    """

    def __init__(self, local: Tensor, part: Part) -> None:
        self.local, self.part = local, part

    def whole(self) -> Tensor:
        """(…, V), the same on every rank."""
        return gather_logits(self.local, self.part)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.whole(), name)

    def __getitem__(self, index: Any) -> Tensor:
        return self.whole()[index]

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = tree_map(lambda x: x.whole() if isinstance(x, CutLogits) else x, (args, kwargs or {}))
        return func(*args, **kwargs)


_POINTWISE = frozenset(
    ("float", "double", "half", "bfloat16", "to", "type", "contiguous", "clone", "detach", "mul", "div", "true_divide",
     "tanh", "neg", "add", "sub", "mul_", "div_", "add_", "sub_", "tanh_", "__mul__", "__rmul__", "__truediv__",
     "__add__", "__sub__", "__neg__", "__imul__", "__itruediv__", "__iadd__", "__isub__", "requires_grad_")
)  # fmt: skip
_ASKING = frozenset(
    ("dim", "ndimension", "is_contiguous", "is_floating_point", "is_complex", "get_device", "element_size", "__get__",
     "register_hook", "retain_grad", "__len__", "__bool__")
)  # fmt: skip


class FollowLogits(TorchFunctionMode):
    """Sees every function that gets cut logits, from the head to the end of the forward."""

    def __init__(self, part: Part) -> None:
        super().__init__()
        self.part = part
        self.cut: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
        self.entered = False
        self.gathered_for: list[str] = []  # functions that got the logits whole

    def follow(self, logits: Tensor) -> None:
        """From now on these logits (…, V/tp) are known as cut."""
        if not self.entered:
            self.__enter__()  # type: ignore[no-untyped-call]
            self.entered = True
        self.cut[logits] = True

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor) and leaf in self.cut]
        if not given:
            return func(*args, **kwargs)
        name = func.__name__
        if name == "size" or func == torch.Tensor.shape.__get__:  # type: ignore[attr-defined]
            shape = torch.Size((*given[0].shape[:-1], self.part.size))
            return shape[args[1]] if len(args) > 1 else shape
        if name in _ASKING:
            out = func(*args, **kwargs)
            if not isinstance(out, Tensor):
                return out
        elif self._keeps(name, args, kwargs):
            out = func(*self._local_sizes(name, args), **kwargs)
            if isinstance(out, Tensor):
                self.cut[out] = True
            return out
        elif name == "cross_entropy" and (loss := self._cross_entropy(*args, **kwargs)) is not None:
            return loss
        return self._with_whole(func, name, args, kwargs)

    def _with_whole(self, func: Any, name: str, args: Any, kwargs: Any) -> Any:
        if name in ("__setitem__", "copy_") or (name.endswith("_") and not name.endswith("__")):
            raise RuntimeError(f"its forward changes logits in place ({name})")
        self.gathered_for.append(name)
        whole: dict[int, Tensor] = {}

        def gather(leaf: Any) -> Any:
            if not (isinstance(leaf, Tensor) and leaf in self.cut):
                return leaf
            if id(leaf) not in whole:
                whole[id(leaf)] = gather_logits(leaf, self.part)
            return whole[id(leaf)]

        args, kwargs = tree_map(gather, (args, kwargs))
        return func(*args, **kwargs)

    def _keeps(self, name: str, args: Any, kwargs: Any) -> bool:
        """Whether the function leaves the last dim as it is."""
        first = args[0] if args else None
        if not (isinstance(first, Tensor) and first in self.cut):
            return False
        if name in _POINTWISE:
            others = [leaf for leaf in tree_leaves((args[1:], kwargs)) if isinstance(leaf, Tensor)]
            return all(leaf.numel() == 1 for leaf in others)
        if name in ("view", "reshape", "squeeze", "unsqueeze"):
            sizes = tree_leaves(args[1:])
            if name in ("squeeze", "unsqueeze"):
                return len(sizes) == 1 and isinstance(sizes[0], int) and 0 <= sizes[0] < first.dim() - 1
            return bool(sizes) and not kwargs and sizes[-1] == self.part.size
        if name == "__getitem__":
            index = args[1] if isinstance(args[1], tuple) else (args[1],)
            if any(isinstance(item, (Tensor, list, type(None))) for item in index):
                return False
            after = (
                index[index.index(Ellipsis) + 1 :] if Ellipsis in index else index if len(index) == first.dim() else ()
            )
            return not after or after[-1] == slice(None)
        return False

    def _local_sizes(self, name: str, args: Any) -> Any:
        if name not in ("view", "reshape"):
            return args
        sizes = args[1] if isinstance(args[1], (tuple, list)) else args[1:]
        return (args[0], *sizes[:-1], self.part.num_entries)

    def _cross_entropy(
        self,
        logits: Tensor,
        target: Tensor,
        weight: Tensor | None = None,
        size_average: Any = None,
        ignore_index: int = -100,
        reduce: Any = None,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
    ) -> Tensor | None:
        plain = weight is None and size_average is None and reduce is None and not label_smoothing
        if not plain or logits.dim() != 2 or target.dim() != 1 or logits not in self.cut or target in self.cut:
            return None
        if self.part.group is None:
            return functional.cross_entropy(logits, target, ignore_index=ignore_index, reduction=reduction)
        losses: Tensor = _CrossEntropy.apply(logits, target, self.part, ignore_index)  # type: ignore[no-untyped-call]
        if reduction == "none":
            return losses
        return losses.sum() if reduction == "sum" else losses.sum() / (target != ignore_index).sum()


class CutVocabulary:
    """The hooks by which a model runs with a cut vocabulary: one object an embedding or head."""

    def __init__(self, part: Part) -> None:
        self.part = part
        self.keep_cut = False  # logits that no loss was computed from are returned cut, too
        self.following: list[FollowLogits] = []
        self.gathered_for: list[str] = []  # in all forwards
        self.outside: Tensor | None = None  # which ids of the running call other ranks hold

    def install_embedding(self, embedding: nn.Module) -> list[Any]:
        """Hook an embedding whose rows are cut already; returns the hooks' handles."""
        before = embedding.register_forward_pre_hook(self._before_embedding)
        return [before, embedding.register_forward_hook(self._after_embedding)]

    def install_head(self, model: nn.Module, head: nn.Module) -> list[Any]:
        """Hook a head whose outputs are cut already, and the model that it stands in; returns the hooks' handles."""
        return [
            model.register_forward_pre_hook(self._before_model),
            head.register_forward_hook(self._after_head),
            model.register_forward_hook(self._after_model, always_call=True),
        ]

    def _before_embedding(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        place = args[0] - self.part.range[0]
        within = place.clamp(0, self.part.num_entries - 1)
        self.outside = within != place
        return (within, *args[1:])

    def _after_embedding(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        outside, self.outside = self.outside, None
        assert outside is not None
        if module._parameters.get("weight") is None or getattr(module, "idle", False) or self.part.group is None:
            return output  # a pipeline stage that does not use the embedding, or its rows for the head alone
        return leave_region(output.masked_fill(outside.unsqueeze(-1), 0), self.part.group)

    def _before_model(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        self.following.append(FollowLogits(self.part))

    def _after_head(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        if not self.following:  # the head was called by itself
            return
        self.following[-1].follow(output)

    def _after_model(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        mode = self.following.pop()
        if not mode.entered:
            return None
        mode.__exit__(None, None, None)  # type: ignore[no-untyped-call]
        self.gathered_for += mode.gathered_for
        return hand_out(output, mode, self.keep_cut) if output is not None else None


def hand_out(output: Any, mode: FollowLogits, keep_cut: bool) -> Any:
    """What the model returns: cut logits stay cut beside a loss, and are gathered where there is none."""
    fields = output if isinstance(output, dict) else getattr(output, "__dict__", {})
    has_loss = fields.get("loss") is not None

    def leave(leaf: Any) -> Any:
        if not (isinstance(leaf, Tensor) and leaf in mode.cut) or mode.part.group is None:
            return leaf
        return CutLogits(leaf, mode.part) if has_loss or keep_cut else gather_logits(leaf, mode.part)

    if isinstance(output, Tensor) or not fields:
        return tree_map(leave, output)
    for name, value in list(fields.items()):
        if isinstance(value, Tensor) and value in mode.cut:
            fields[name] = leave(value)
    return output
