"""Run by test_record.py on two ranks under torchrun: strategies of others, recorded by `meshloom.record`."""

from __future__ import annotations

import sys

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard

import meshloom


def main(folder: str, what: str) -> None:
    """Two steps, the second recorded."""
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 4))
    if what == "fsdp":
        mesh = dist.device_mesh.init_device_mesh("cpu", (2,))
        for layer in (model[0], model[2], model):
            fully_shard(layer, mesh=mesh)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    pair = dist.new_group([0, 1])
    with meshloom.record(folder, wait=1, warmup=0, model=model) as rec:
        for _ in range(2):
            if what == "fsdp":
                model(torch.randn(2, 8)).sum().backward()
                optimizer.step()
                optimizer.zero_grad()
            else:
                _communicate(rank, pair)
            rec.step()
    dist.destroy_process_group()


def _communicate(rank: int, pair: dist.ProcessGroup | None) -> None:
    """Every kind of communication that gloo has, in an order in which nobody waits for ever."""
    here, there = torch.ones(4, 3), torch.zeros(4, 3)
    if rank == 0:
        dist.send(here, dst=1, tag=5)
        dist.recv(there, src=1, tag=6)
    else:
        dist.recv(there, src=0, tag=5)
        dist.send(here, dst=0, tag=6)
    works = dist.batch_isend_irecv(
        [dist.P2POp(dist.isend, here, 1 - rank, tag=7), dist.P2POp(dist.irecv, there, 1 - rank, tag=7)]
    )
    for work in works:
        work.wait()
    dist.all_to_all_single(there, here, group=pair)
    dist.broadcast(here, src=1)
    dist.all_gather_into_tensor(torch.empty(8, 3), here, group=pair)
    dist.barrier()


if __name__ == "__main__":
    main(*sys.argv[1:])
