"""How long an op takes on a device. No torch.

Simplifications are listed in docs/simulate.md: kernels of a rank run one after another, nothing is fused.
"""

from __future__ import annotations

from math import ceil

from meshloom.chakra.trace import Node
from meshloom.hardware.device import Device

_TILE = (128, 256)  # output tile of the common GEMM kernels of recent NVIDIA devices
_LIKE = {"float32": "float32", "float64": "float64", "bfloat16": "bfloat16", "float16": "float16"}


def duration_ns(node: Node, device: Device) -> int:
    """How long `device` takes for a compute node; 0 for host scopes, which devices never see.

    Roofline (Williams et al. 2009) with a kernel's launch on top. Products add a start-up of `gemm_k_ramp` along k and
    the loss of an unfilled last wave: t = max(2mnk / (peak·e·u) · (1 + k0/k), bytes / (bandwidth·e_m)) + launch with
    u = 1 - w·(1 - waves/⌈waves⌉).
    """
    op_class = node.get("op_class", "memory")
    if op_class == "host":
        return 0
    num_bytes, flops = int(node.get("tensor_size", 0)), int(node.get("num_ops", 0))
    memory_s = num_bytes / (device.memory_bytes_per_second * device.memory_efficiency)
    compute_s = 0.0
    if op_class in ("gemm", "attention"):
        peak = device.peak(_LIKE.get(node.get("dtype", "float32"), "float32"))
        compute_s = flops / (peak * device.gemm_efficiency * _utilisation(node, device))
        gemm = node.get("gemm")
        if gemm:
            compute_s *= 1 + device.gemm_k_ramp / max(1, gemm[3])
    return round(max(compute_s, memory_s) * 1e9) + device.kernel_launch_ns


def _utilisation(node: Node, device: Device) -> float:
    gemm = node.get("gemm")
    if not gemm:
        return 1.0
    batch, m, n, _ = gemm
    waves: float = max(1, batch * ceil(m / _TILE[0]) * ceil(n / _TILE[1])) / device.num_multiprocessors
    return 1 - device.gemm_wave_loss * (1 - waves / ceil(waves))
