"""Small models, each with one thing that makes cutting it hard."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

VOCAB, HIDDEN, HEADS = 12, 8, 4


@dataclass
class Output:
    """What a model returns."""

    loss: Tensor


class Block(nn.Module):
    """A residual MLP."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(HIDDEN, width), nn.Linear(width, HIDDEN)

    def forward(self, x: Tensor, **given: Any) -> Tensor:
        return x + self.down(functional.gelu(self.up(x)))


class Model(nn.Module):
    """Embedding, blocks in turn, head, loss; the kinds below change one of these."""

    block: type[nn.Module] = Block

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, HIDDEN)
        self.layers = nn.ModuleList([self.block() for _ in range(2)])
        self.head = nn.Linear(HIDDEN, VOCAB)

    def run(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x

    def forward(self, input_ids: Tensor, labels: Tensor) -> Any:
        logits = self.head(self.run(self.embed(input_ids)))
        return Output(loss=functional.cross_entropy(logits.flatten(0, 1), labels.flatten()))


class NormedBlock(Block):
    """A norm over all features between two layers, as of queries before they are heads."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(16)

    def forward(self, x: Tensor, **given: Any) -> Tensor:
        return x + self.down(self.norm(functional.gelu(self.up(x))))


class Normed(Model):
    block = NormedBlock


class SinkBlock(nn.Module):
    """Attention with one number a head beside the scores."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(HIDDEN, HIDDEN) for _ in range(4))
        self.sinks = nn.Parameter(torch.randn(HEADS))

    def forward(self, x: Tensor, **given: Any) -> Tensor:
        q, k, v = (f(x).view(*x.shape[:2], -1, HIDDEN // HEADS).transpose(1, 2) for f in (self.q, self.k, self.v))
        scores = q @ k.transpose(2, 3)
        sinks = self.sinks.view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        weights = torch.cat([scores, sinks], -1).softmax(-1)[..., :-1]
        return x + self.o((weights @ v).transpose(1, 2).flatten(2))


class Sinks(Model):
    block = SinkBlock


class PenalisedSinkBlock(SinkBlock):
    """Its sinks are needed whole, too."""

    def forward(self, x: Tensor, **given: Any) -> Tensor:
        return super().forward(x) * (1 + 0 * self.sinks.sum())


class PenalisedSinks(Model):
    block = PenalisedSinkBlock


class Experts(nn.Module):
    """Each token goes to the expert that its first feature chooses; some get none."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleDict({f"expert_{number}": Block() for number in range(3)})
        self.capacity: int | None = None

    def forward(self, x: Tensor, **given: Any) -> Tensor:
        if self.capacity is None:  # what a forward finds first stays
            self.capacity = x.numel()
        flat = x.reshape(-1, HIDDEN)
        chosen = (flat[:, 0] > 0).long() + (flat[:, 0] > 0.7).long()
        out = torch.zeros_like(flat)
        for number in torch.unique(chosen):
            (where,) = torch.where(chosen == number)
            out = out.index_add(0, where, self.experts[f"expert_{number}"](flat[where]))
        assert sum(torch.bincount(chosen).tolist()) == len(flat) <= self.capacity
        return out.view_as(x)


class Routed(Model):
    block = Experts


class ShrinkingInside(Block):
    """Keeps the first token and those whose first feature is positive."""

    def forward(self, x: Tensor, **given: Any) -> Tensor:
        out = super().forward(x)
        kept = out.detach()[:, :, 0].sum(0) > 0
        kept[0] = True
        return out[:, kept]


class Pooled(Model):
    """How many tokens its first layer hands on depends on values."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([ShrinkingInside(), Block()])

    def forward(self, input_ids: Tensor, labels: Tensor) -> Any:
        x = self.layers[0](self.embed(input_ids))
        logits = self.head(self.layers[1](x).mean(1))
        return Output(loss=functional.cross_entropy(logits, labels[:, 0]))


class Shared(Model):
    """One layer that runs four times."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Block()])

    def run(self, x: Tensor) -> Tensor:
        for _ in range(4):
            x = self.layers[0](x)
        return x


class GivingBlock(Block):
    """Puts its keys into a dict where there are none yet, and uses those that are there."""

    def forward(self, x: Tensor, *, shared: dict[str, Tensor]) -> Tensor:
        shared.setdefault("keys", self.up(x))
        return x + self.down(functional.gelu(shared["keys"] + self.up(x)))


class Giving(Model):
    block = GivingBlock

    def run(self, x: Tensor) -> Tensor:
        shared: dict[str, Tensor] = {}
        for layer in self.layers:
            x = layer(x, shared=shared)
        return x


class Writing(Model):
    """Changes what layers return in place."""

    def run(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer.forward(x)  # nor does it call the layer as others do
            x *= 0.5
        return x


class Tied(Model):
    """A block before a head that is the embedding: neither may be cut by input features."""

    def __init__(self) -> None:
        super().__init__()
        self.before = nn.Linear(HIDDEN, HIDDEN)
        self.head.weight = self.embed.weight

    def run(self, x: Tensor) -> Tensor:
        return functional.gelu(self.before(super().run(x)))


class PastBlock(Block):
    """In training it uses a layer's weight without the layer."""

    def forward(self, x: Tensor, **given: Any) -> Tensor:
        if not self.training:
            return super().forward(x)
        return x + functional.linear(functional.gelu(self.up(x)), self.down.weight.clamp(-1, 1), self.down.bias)


class Past(Model):
    block = PastBlock


class _Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: nn.Module) -> Tensor:
        return 2 * layer(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return 2 * grads[0], None


class OwnBackward(Model):
    """Its layers run within a backward of its own."""

    def run(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = _Doubled.apply(x, layer)
        return x


class StubbornBlock(Block):
    """Another pair of layers, whose forward has a number that nobody can change."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(HIDDEN, HIDDEN), nn.Linear(HIDDEN, HIDDEN)

    def forward(self, x: Tensor, **given: Any) -> Tensor:
        y = self.first(x).view(*x.shape[:2], HEADS, HIDDEN // HEADS).flatten(2)
        return super().forward(x + self.second(y))


class Stubborn(Model):
    block = StubbornBlock


def make(kind: type[Model], seed: int = 0) -> Model:
    """A model in float64."""
    torch.manual_seed(seed)
    return kind().double()


def batch(seed: int, batch_size: int = 2) -> dict[str, Tensor]:
    """Random tokens and labels."""
    generator = torch.Generator().manual_seed(seed)
    ids, labels = (torch.randint(VOCAB, (batch_size, 6), generator=generator) for _ in range(2))
    return {"input_ids": ids, "labels": labels}
