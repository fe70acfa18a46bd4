"""Meshloom: weave any single-device Hugging Face model onto a device mesh, real or imagined.

Five nouns (model config, `Plan`, `Cluster`, `Trace`, `Timeline`), six verbs (train, generate, capture, synth,
simulate, view). Importing this package imports no torch: names are loaded when they are first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from meshloom.capture.record import Recorder, record
    from meshloom.chakra.build import TraceBuilder
    from meshloom.chakra.check import check
    from meshloom.chakra.file import read, write
    from meshloom.chakra.timeline import Timeline
    from meshloom.chakra.trace import Node, Trace
    from meshloom.hardware.cluster import Cluster
    from meshloom.model.step import train_step
    from meshloom.parallel.apply import parallelize
    from meshloom.parallel.mesh import make_mesh
    from meshloom.plan import Plan
    from meshloom.synth.roles import synthesise

_HOME = {
    "Cluster": "meshloom.hardware.cluster",
    "Node": "meshloom.chakra.trace",
    "Plan": "meshloom.plan",
    "Recorder": "meshloom.capture.record",
    "Timeline": "meshloom.chakra.timeline",
    "Trace": "meshloom.chakra.trace",
    "TraceBuilder": "meshloom.chakra.build",
    "check": "meshloom.chakra.check",
    "make_mesh": "meshloom.parallel.mesh",
    "parallelize": "meshloom.parallel.apply",
    "read": "meshloom.chakra.file",
    "record": "meshloom.capture.record",
    "synthesise": "meshloom.synth.roles",
    "train_step": "meshloom.model.step",
    "write": "meshloom.chakra.file",
}

__all__ = [
    "Cluster",
    "Node",
    "Plan",
    "Recorder",
    "Timeline",
    "Trace",
    "TraceBuilder",
    "check",
    "make_mesh",
    "parallelize",
    "read",
    "record",
    "synthesise",
    "train_step",
    "write",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'meshloom' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
