"""Optimizer states shared over data parallel, as a checkpoint stores them: under the names of the parameters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from meshloom.parallel.placement import Placed, Run
from meshloom.parallel.zero import Zero
from meshloom.train.storage import Index, Stored


def copied(placed: Placed | Run) -> Stored:
    """The tensor as it is now, in memory of its own on the host."""
    return Stored(placed.like(placed.tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)))


def shared_states(name: str, placed: Placed, shares: Zero) -> dict[str, Stored]:
    """What this rank holds of the states of a parameter; counts are told by the rank of its first element."""
    piece = shares.pieces.get(id(placed.tensor))
    found: dict[str, Stored] = {}
    for key, value in shares.state.get(piece.share, {}).items() if piece is not None else ():
        assert piece is not None
        tensor = value if isinstance(value, Tensor) else torch.tensor(value)
        if tensor.dim():
            flat = tensor[piece.at : piece.at + piece.end - piece.begin]
            found[f"optimizer.{name}.{key}"] = copied(Run(tensor=flat, placed=placed, begin=piece.begin))
        elif piece.begin == 0:
            found[f"optimizer.{name}.{key}"] = copied(Placed.whole(tensor))
    return found


def empty_shared_states(
    held: Mapping[str, Placed], shares: Zero, index: Index, keys: Mapping[str, Sequence[str]]
) -> dict[str, Stored]:
    """Memory for this rank's share of the states in a checkpoint, which the optimizer has from now on."""
    fused = {id(share): bool(group.get("fused")) for group in shares.share_groups for share in group["params"]}
    found = {}
    for name, placed in held.items():
        piece = shares.pieces.get(id(placed.tensor))
        for key in keys.get(name, ()) if piece is not None else ():
            assert piece is not None
            fqn = f"optimizer.{name}.{key}"
            known, states = index[fqn], shares.state[piece.share]
            single = not known.shape and bool(placed.shape)
            if key not in states:  # fused kernels want their counts where they are
                device = piece.share.device if fused[id(piece.share)] or not single else "cpu"
                shape = () if single else tuple(piece.share.shape)
                states[key] = torch.zeros(shape, dtype=known.dtype, device=device)
            if single:
                found[fqn] = Stored(Placed.whole(states[key]))
            else:
                flat = states[key][piece.at : piece.at + piece.end - piece.begin]
                found[fqn] = Stored(Run(tensor=flat, placed=placed, begin=piece.begin))
    return found
