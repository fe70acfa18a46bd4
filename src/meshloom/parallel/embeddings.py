"""Find a model's vocabulary: the embeddings and heads that hold one row a token, and whether they can be cut.

Hugging Face models name them (`get_input_embeddings`, `get_output_embeddings`); in others the head is a linear layer
with as many outputs as an embedding has rows. A forward on fake tensors shows whether anything else uses the rows.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from meshloom.parallel.answers import Answers
from meshloom.parallel.fake import run_fake
from meshloom.parallel.styles import linear_shape
from meshloom.parallel.vocab import CutVocabulary, Part


@dataclass(frozen=True, slots=True, kw_only=True)
class Vocabulary:
    """Layers that are cut by rows of the vocabulary: path -> number of rows. Why others stay whole: `kept`.

    An embedding may have more rows than the head, for tokens that are only read.
    """

    embeddings: Mapping[str, int]
    heads: Mapping[str, int]
    kept: Mapping[str, str]
    gathered_for: tuple[str, ...] = ()  # functions of the forward that get the logits whole


def find_vocabulary(
    model: nn.Module, example: Mapping[str, Tensor], taken: Collection[str], answers: Answers | None = None
) -> Vocabulary | None:
    """The vocabulary of `model`, None if it has none; layers of `taken` are cut in another way already.

    `example` is a batch that the forward accepts; labels in it show how the loss uses the logits.
    """
    paths = {id(module): path for path, module in model.named_modules()}
    embedding, head = _named(model) if hasattr(model, "get_output_embeddings") else _by_size(model)
    weights = [module.weight for module in (embedding, head) if module is not None]
    if not weights:
        return None
    kept: dict[str, str] = {}
    embeddings = [
        module
        for module in model.modules()
        if isinstance(module, nn.Embedding) and any(module.weight is weight for weight in weights)
    ]
    heads = [head] if head is not None else []
    for module in [*embeddings, *heads]:
        why = _trouble(module, model, [*embeddings, *heads])
        if why or paths[id(module)] in taken:
            kept[paths[id(module)]] = why or "it is cut with other layers"
    told, gathered_for = _follow(model, example, embeddings, heads, paths, answers)
    kept = {**told, **kept}
    tied = head is not None and any(module.weight is head.weight for module in embeddings)
    if tied and kept:  # what shares its rows stays whole together
        why = next(iter(kept.values()))
        return Vocabulary(embeddings={}, heads={}, kept={paths[id(head)]: why})
    return Vocabulary(
        embeddings={path: module.weight.size(0) for module in embeddings if (path := paths[id(module)]) not in kept},
        heads={path: module.weight.size(0) for module in heads if (path := paths[id(module)]) not in kept},
        kept=kept,
        gathered_for=gathered_for,
    )


def _named(model: Any) -> tuple[Any, Any]:
    """The embedding and the head as the model names them, None where it has none that can be used."""
    found: list[Any] = []
    for name in ("get_input_embeddings", "get_output_embeddings"):
        try:
            found.append(getattr(model, name)())
        except (AttributeError, NotImplementedError, TypeError):
            found.append(None)
    embedding, head = found
    inside = {id(module) for module in model.modules()}
    if not isinstance(embedding, nn.Embedding) or id(embedding) not in inside:
        embedding = None
    shape = linear_shape(head) if isinstance(head, nn.Module) and id(head) in inside else None
    return embedding, None if shape is None or shape.input_major else head


def _by_size(model: nn.Module) -> tuple[Any, Any]:
    """The last linear layer with as many outputs as an embedding has rows, and that embedding."""
    rows = {module.num_embeddings: module for module in model.modules() if isinstance(module, nn.Embedding)}
    heads = [module for module in model.modules() if isinstance(module, nn.Linear) and module.out_features in rows]
    return (rows[heads[-1].out_features], heads[-1]) if heads else (None, None)


def _trouble(module: Any, model: nn.Module, known: list[nn.Module]) -> str:
    """Why the module cannot be cut, by its looks; empty if it can."""
    if isinstance(module, nn.Embedding) and (module.max_norm is not None or module.sparse or module.scale_grad_by_freq):
        return "it norms or scales its rows"
    for path, other in model.named_modules():
        if not any(other is one for one in known) and any(p is module.weight for p in other._parameters.values()):
            return f"it shares its rows with {path}"
    return ""


def _follow(
    model: nn.Module,
    example: Mapping[str, Tensor],
    embeddings: list[Any],
    heads: list[Any],
    paths: Mapping[int, str],
    answers: Answers | None,
) -> tuple[dict[str, str], tuple[str, ...]]:
    """What a forward says against cutting the layers, by path; and which functions get the logits whole."""
    watch = _WatchRows({id(module.weight): paths[id(module)] for module in [*embeddings, *heads]})
    size = int(heads[0].weight.size(0)) if heads else 0
    dry = CutVocabulary(Part(size=size, index=0, degree=1, group=None))
    handles = dry.install_head(model, heads[0]) if heads else []
    for module in [*embeddings, *heads]:
        handles.append(module.register_forward_pre_hook(watch.enter))
        handles.append(module.register_forward_hook(watch.leave))
    was_training = model.training
    try:
        run_fake(model.eval(), example, watch, answers=answers, told=watch.told)
    except RuntimeError as error:
        return {paths[id(module)]: str(error).splitlines()[0] for module in [*embeddings, *heads]}, ()
    finally:
        model.train(was_training)
        for handle in handles:
            handle.remove()
    return watch.trouble, tuple(dict.fromkeys(dry.gathered_for))


class _WatchRows(TorchDispatchMode):
    """Notes who uses the rows outside of their layers, and layers that do more than look rows up."""

    def __init__(self, rows: Mapping[int, str]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.rows = rows
        self.storages: dict[int, str] = {}
        self.inside: list[nn.Module] = []
        self.trouble: dict[str, str] = {}

    def told(self, parameter: Tensor, fake: Tensor) -> None:
        """Note the fake tensor that stands for a parameter."""
        if id(parameter) in self.rows:
            self.storages[fake.untyped_storage()._cdata] = self.rows[id(parameter)]

    def enter(self, module: nn.Module, args: Any) -> None:
        """A hook: an embedding or head begins."""
        self.inside.append(module)

    def leave(self, module: nn.Module, args: Any, output: Any) -> None:
        """A hook: it ends."""
        self.inside.pop()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if func.namespace == "prim":
            return out
        for leaf in tree_leaves((args, kwargs)):
            path = self.storages.get(leaf.untyped_storage()._cdata) if isinstance(leaf, Tensor) else None
            if path is None:
                continue
            if not self.inside:
                self.trouble.setdefault(path, f"its rows are used outside of it, by {name}")
            elif isinstance(self.inside[-1], nn.Embedding) and name != "embedding":
                self.trouble.setdefault(path, f"it does more than look rows up: {name}")
        if self.inside and isinstance(self.inside[-1], nn.Embedding) and name != "embedding":
            rowwise = torch.Tag.pointwise in func.tags or name in ("_to_copy", "view", "detach", "alias", "lift_fresh")
            path = next(iter(self.storages.values()), "")
            if not rowwise:
                self.trouble.setdefault(path, f"the embedding does more than look rows up: {name}")
        return out
