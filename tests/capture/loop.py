"""Run by test_record.py in a process of its own: a plain torch script that records itself."""

from __future__ import annotations

import os
import signal
import sys

import torch
from torch import nn

import meshloom


def main(folder: str, how: str) -> None:
    """Six steps of a small model, the fourth and fifth recorded."""
    model = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 4))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with meshloom.record(folder, wait=1, warmup=2, active=2, separate=how == "separate", stacks=True) as rec:
        for step in range(6):
            model(torch.randn(2, 8)).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
            if step == 4 and how == "raise":
                raise RuntimeError("on purpose")
            if step == 4 and how == "sigterm":
                os.kill(os.getpid(), signal.SIGTERM)
            rec.step()


if __name__ == "__main__":
    main(*sys.argv[1:])
