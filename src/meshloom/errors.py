"""Every error Meshloom raises on purpose.

    MeshloomError                 what the command line prints as one line (exit code 2)
    ├── UsageError                an option or argument that cannot be
    ├── PlanError                 a plan that cannot be, or that the model or the world size cannot take
    ├── ModelError                no such model, or one we cannot build
    ├── DataError                 a dataset that is missing, empty or not what it should be
    ├── TraceError                a trace or a PyTorch profile that cannot be read
    ├── HardwareError             a cluster or device file that cannot be read, or is too small
    ├── FolderError               a folder that cannot be written, or lacks what a run should hold
    ├── OfflineError              the network is needed and not there
    ├── SimulationError           traces that cannot run: a deadlock, a missing rank
    └── RunFailed                 a process of a run died (exit code 1)

A message says what was expected, what came, and what to do, in one line.
"""

from __future__ import annotations


class MeshloomError(Exception):
    """The root: catch this to catch every error that Meshloom raises on purpose."""

    exit_code = 2


class UsageError(MeshloomError):
    """An option or argument that cannot be."""


class PlanError(MeshloomError):
    """A plan that cannot be, or that the model or the world size cannot take."""


class ModelError(MeshloomError):
    """No such model, or one that cannot be built."""


class DataError(MeshloomError):
    """A dataset that is missing, empty or not what it should be."""


class TraceError(MeshloomError):
    """A trace or a PyTorch profile that cannot be read."""


class HardwareError(MeshloomError):
    """A cluster or device file that cannot be read, or is too small."""


class FolderError(MeshloomError):
    """A folder that cannot be written, or lacks what a run should hold."""


class OfflineError(MeshloomError):
    """The network is needed and not there."""


class SimulationError(MeshloomError):
    """Traces that cannot run: a deadlock, a missing rank."""


class RunFailed(MeshloomError):
    """A process of a run died; the message names the rank and where its log lies."""

    exit_code = 1
