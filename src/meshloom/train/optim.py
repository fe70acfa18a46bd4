"""The learning rate of each step, as a pure function of its number."""

from __future__ import annotations

from math import cos, pi
from typing import Literal

import torch

LearningRateSchedule = Literal["constant", "linear", "cosine", "wsd"]

_DECAY_SHARE = 0.2  # of wsd's steps, at the end (Hu et al. 2024, MiniCPM: 10 to 20 %)


def learning_rate(
    schedule: LearningRateSchedule, step: int, *, peak: float, warmup_steps: int, num_steps: int, lowest: float = 0.0
) -> float:
    """The learning rate of step `step`, counted from 0, of `num_steps`.

    It climbs from `peak / warmup_steps` to `peak` in `warmup_steps`; then it stays (constant), falls along a line
    (linear) or half a cosine (cosine; Loshchilov & Hutter 2017) to `lowest` times the peak, or stays and falls along a
    line over the last fifth of all steps (wsd: warmup, stable, decay).
    """
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    if schedule == "constant":
        return peak
    begin = warmup_steps if schedule != "wsd" else max(warmup_steps, num_steps - round(_DECAY_SHARE * num_steps))
    if step < begin:
        return peak
    done = min(1.0, (step - begin) / max(1, num_steps - begin))
    left = (1 + cos(pi * done)) / 2 if schedule == "cosine" else 1 - done
    return peak * (lowest + (1 - lowest) * left)


def set_learning_rate(optimizer: torch.optim.Optimizer, value: float) -> None:
    """Let the optimizer's next step take `value`."""
    for group in optimizer.param_groups:
        group["lr"] = value
