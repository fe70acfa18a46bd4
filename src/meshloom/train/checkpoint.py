"""Checkpoints of a run: folders that Hugging Face opens, with all that is needed to go on, on any plan.

    checkpoint-N/   config.json, model.safetensors, the tokenizer's files   what `from_pretrained` opens
                    training_info.json                                      step, plan, place in the data, file sizes
                    state/                                                  optimizer and random states, and an index
    initial_model/  best_model/                                             the same without state/

A checkpoint is written beside its place and renamed when all of it is on disk, so one that is listed is whole. Saving
copies this rank's part to memory and goes on in the background; the next save waits for it.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save

import meshloom
from meshloom.errors import FolderError, MeshloomError, ModelError
from meshloom.model.tensorfile import sync_folder
from meshloom.model.weights import inner_model
from meshloom.parallel.mesh import Mesh
from meshloom.parallel.placement import Placed, placed_parameters
from meshloom.parallel.shard import shard_of
from meshloom.parallel.zero import Zero
from meshloom.plan import Plan
from meshloom.train.shared_states import copied, empty_shared_states, shared_states
from meshloom.train.storage import WEIGHT, Index, Loading, Reader, Saving, Stored, Writer, inside, read_index

_NAME = re.compile(r"checkpoint-(\d+)")
_INFO = "training_info.json"
_VERSION = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingState:
    """Where a run stood: steps done, and what the caller gave to know its place in the data and its learning rate."""

    step: int
    plan: Plan
    data: Mapping[str, Any] = field(default_factory=dict)
    scheduler: Mapping[str, Any] | None = None


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in a folder, oldest first."""
    found = {int(match[1]): path for path in folder.glob("checkpoint-*") if (match := _NAME.fullmatch(path.name))}
    return [found[step] for step in sorted(found)]


def newest(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint that can be read, None if there is none, and what is wrong with those after it."""
    troubles: list[str] = []
    for path in reversed(checkpoints(folder)):
        try:
            check_checkpoint(path)
            return path, troubles
        except MeshloomError as error:
            troubles.append(str(error))
    return None, troubles


def check_checkpoint(path: Path) -> TrainingState:
    """Where the run stood at a checkpoint; raises FolderError naming the file that is missing or not whole."""
    info = path / _INFO
    try:
        table = json.loads(info.read_text(encoding="utf-8"))
        if table["version"] != _VERSION:
            raise FolderError(f"{info}: expected version {_VERSION}, got {table['version']}; use the Meshloom it is of")
        for name, size in table["files"].items():
            inside(name)
            held = (path / name).stat().st_size if (path / name).is_file() else 0
            if held != size:
                raise FolderError(f"{path / name}: expected {size:,} bytes, found {held:,}; the checkpoint is broken")
        read_index(path)
        state = TrainingState(
            step=table["step"], plan=Plan.parse(table["plan"]), data=table["data"], scheduler=table["scheduler"]
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise FolderError(f"{info}: expected the facts of a checkpoint, got '{error}'") from error
    return state


def check_architecture(path: Path, whole: nn.Module) -> None:
    """Raise ModelError naming the tensor if the weights of a checkpoint are not those of the uncut model `whole`."""
    index = read_index(path)
    shapes = {name: tuple(tensor.shape) for name, tensor in whole.state_dict().items()}
    for name in _names(whole):
        held = index.get(WEIGHT + name)
        if held is None:
            raise ModelError(f"{path}: holds another architecture: expected {name}, which is not in it")
        if held.shape != shapes[name]:
            raise ModelError(
                f"{path}: holds another architecture: expected {name} of shape {shapes[name]}, got {held.shape}"
            )
    for fqn in index:
        name = fqn.removeprefix(WEIGHT)
        if fqn.startswith(WEIGHT) and name not in shapes:
            raise ModelError(f"{path}: holds another architecture: it has {name}, which the model has not")


class Checkpoints:
    """Saves and loads this rank's part of a run below `folder`.

    `whole` is the uncut model on the meta device, by whose names and shapes everything is stored. Every rank of the
    mesh must make it, and call its methods, at the same point.
    """

    def __init__(
        self,
        folder: Path,
        *,
        whole: nn.Module,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | None,
        mesh: Mesh,
        tokenizer: Any = None,
        keep: int | None = None,
    ) -> None:
        self.folder, self.whole, self.mesh, self.tokenizer, self.keep = folder, whole, mesh, tokenizer, keep
        self.inner, self.optimizer = inner_model(model), optimizer
        self.shares = optimizer if isinstance(optimizer, Zero) else None
        shapes = {name: tuple(parameter.shape) for name, parameter in whole.named_parameters()}
        self.held = placed_parameters(model, mesh, shapes)
        self.names = _names(whole)
        # of its own, so that what is saved in the background meets no collective of training
        self.group = dist.new_group(backend="gloo") if mesh.plan.world_size > 1 else None
        self.background = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self.pending: Future[Any] | None = None
        if mesh.rank == 0:
            _tidy(folder)

    def save(
        self, step: int, *, data: Mapping[str, Any], scheduler: Mapping[str, Any] | None = None, wait: bool = False
    ) -> None:
        """Save `checkpoint-<step>`, in the background unless `wait`; raises what the save before it failed with."""
        self.wait()
        facts = {"step": step, "data": dict(data), "scheduler": scheduler}
        items = {**self._weights(), **self._optimizer_state(), **self._random_state()}
        self._start(self.folder / f"checkpoint-{step}", items, facts, is_checkpoint=True)
        if wait:
            self.wait()

    def export(self, name: str, *, wait: bool = True, **facts: Any) -> None:
        """Write the weights as `name`, a folder that Hugging Face opens, with `facts` in its training_info.json."""
        self.wait()
        self._start(self.folder / name, self._weights(), facts, is_checkpoint=False)
        if wait:
            self.wait()

    def wait(self) -> None:
        """Wait until what is being saved is on disk; raises FolderError if it could not be, and leaves none of it."""
        pending, self.pending = self.pending, None
        if pending is not None:
            try:
                pending.result()
            except CheckpointException as error:
                if self.mesh.rank == 0:
                    for part in self.folder.glob(".*.part"):
                        shutil.rmtree(part, ignore_errors=True)
                raise _cause(error, f"{self.folder}: expected to save a checkpoint here") from error

    def load(self, path: Path) -> TrainingState:
        """Fill the model, the optimizer and the random states from a checkpoint of any plan.

        Raises FolderError if it cannot be read, ModelError if it is of another architecture.
        """
        state, index = check_checkpoint(path), read_index(path)
        check_architecture(path, self.whole)
        items = {WEIGHT + name: Stored(placed.like(placed.tensor.detach())) for name, placed in self.held.items()}
        buffers = {WEIGHT + name: buffer for name, buffer in self._buffers().items()}
        items |= {name: Stored(Placed.whole(buffer)) for name, buffer in buffers.items()}
        items |= self._empty_optimizer_state(index)
        random = self._empty_random_state(index, state)
        items |= {name: Stored(Placed.whole(tensor)) for name, tensor in random.items()}
        try:
            dcp_load(items, storage_reader=Reader(path, index), planner=Loading(), process_group=self.group)
        except CheckpointException as error:
            raise _cause(error, f"{path}: expected a checkpoint") from error
        for name, tensor in random.items():
            torch.cuda.set_rng_state(tensor) if name.endswith(".cuda") else torch.set_rng_state(tensor)
        return state

    # -- what is saved

    def _weights(self) -> dict[str, Stored]:
        places = {name: place for place, name in enumerate(self.names)}
        mine = {name: placed for name, placed in self.held.items() if self._is_mine(placed.tensor, places[name])}
        found = {WEIGHT + name: copied(placed) for name, placed in mine.items()}
        return found | {WEIGHT + name: copied(Placed.whole(buffer)) for name, buffer in self._buffers().items()}

    def _optimizer_state(self) -> dict[str, Stored]:
        states = {} if self.optimizer is None else self.optimizer.state
        found: dict[str, Stored] = {}
        for place, name in enumerate(self.names):
            placed = self.held.get(name)
            if placed is None or not self._is_mine(placed.tensor, place, shared=self.shares is not None):
                continue
            if self.shares is not None:
                found |= shared_states(name, placed, self.shares)
                continue
            for key, value in states.get(placed.tensor, {}).items():
                tensor = value if isinstance(value, Tensor) else torch.tensor(value)
                alike = tensor.shape == placed.tensor.shape and tensor.dim()
                found[f"optimizer.{name}.{key}"] = copied(placed.like(tensor) if alike else Placed.whole(tensor))
        return found

    def _random_state(self) -> dict[str, Stored]:
        states = {"cpu": torch.get_rng_state()}
        if self.mesh.device.type == "cuda":
            states["cuda"] = torch.cuda.get_rng_state()
        return {f"random.{self.mesh.rank}.{kind}": copied(Placed.whole(state)) for kind, state in states.items()}

    def _is_mine(self, parameter: Tensor, place: int, *, shared: bool = False) -> bool:
        """Whether this rank saves the parameter: one of those that hold the same part, in turn.

        What is `shared` over data parallel is another part on each of its ranks.
        """
        if getattr(parameter, "counted_elsewhere", False):
            return False
        dp, mine = (1, 0) if shared else (self.mesh.degree("dp"), self.mesh.index("dp"))
        shard, tp = shard_of(parameter), self.mesh.degree("tp")
        if shard is None:
            return place % (dp * tp) == mine * tp + self.mesh.index("tp")
        return self.mesh.index("tp") % shard.num_copies == 0 and place % dp == mine

    def _buffers(self) -> dict[str, Tensor]:
        """The persistent buffers that this rank's layers use."""
        found = {}
        parameters = [name for name, _ in self.whole.named_parameters()]
        for name in _persistent_buffers(self.whole):
            path = name
            while path and not any(other.startswith(f"{path}.") for other in parameters):
                path = path.rpartition(".")[0]
            beside = [other for other in parameters if not path or other.startswith(f"{path}.")]
            if any(other in self.held for other in beside):
                found[name] = self.inner.get_buffer(name)
        return found

    # -- how it is saved

    def _start(
        self, target: Path, items: Mapping[str, Stored], facts: Mapping[str, Any], *, is_checkpoint: bool
    ) -> None:
        part = target.with_name(f".{target.name}.part")

        def prepare() -> None:
            shutil.rmtree(part, ignore_errors=True)  # of a run that was killed

        def complete() -> None:
            self._describe(part, facts, is_checkpoint)
            _rename(part, target)
            if is_checkpoint and self.keep:
                for old in checkpoints(self.folder)[: -self.keep]:
                    _remove(old)

        writer = Writer(part, rank=self.mesh.rank, names=self.names, prepare=prepare, complete=complete)
        self.pending = self.background.submit(
            dcp_save, dict(items), storage_writer=writer, planner=Saving(), process_group=self.group
        )

    def _describe(self, part: Path, facts: Mapping[str, Any], is_checkpoint: bool) -> None:
        """Write what is no tensor, last of all the sizes of the files, and wait until everything is on disk."""
        config: Any = self.inner.config
        config.architectures = [type(self.inner).__name__]
        config.save_pretrained(part)
        generation: Any = getattr(self.inner, "generation_config", None)
        if generation is not None:
            generation.save_pretrained(part)
        if self.tokenizer is not None:
            self.tokenizer.save_pretrained(part)
        if not is_checkpoint:
            shutil.rmtree(part / "state")
        files = sorted(path for path in part.rglob("*") if path.is_file())
        sizes = {str(path.relative_to(part)): path.stat().st_size for path in files}
        table = {"version": _VERSION, "meshloom": meshloom.__version__, "plan": str(self.mesh.plan)}
        text = json.dumps({**table, **facts, "files": sizes}, indent=2)
        (part / _INFO).write_text(text, encoding="utf-8")
        for path in [*files, part / _INFO]:
            _sync(path)
        for folder in [part, *(path for path in part.rglob("*") if path.is_dir())]:
            sync_folder(folder)

    # -- what is loaded

    def _empty_optimizer_state(self, index: Index) -> dict[str, Stored]:
        if self.optimizer is None:
            return {}
        groups = {id(parameter): group for group in self.optimizer.param_groups for parameter in group["params"]}
        keys: dict[str, list[str]] = {}
        for fqn in index:
            if fqn.startswith("optimizer."):
                name, _, key = fqn.removeprefix("optimizer.").rpartition(".")
                keys.setdefault(name, []).append(key)
        if self.shares is not None:
            return empty_shared_states(self.held, self.shares, index, keys)
        found = {}
        for name, placed in self.held.items():
            group = groups.get(id(placed.tensor), {})
            for key in keys.get(name, ()) if group else ():
                fqn = f"optimizer.{name}.{key}"
                known = index[fqn]
                if known.shape == placed.shape and known.shape:
                    tensor = torch.empty_like(placed.tensor, dtype=known.dtype, requires_grad=False)
                    found[fqn] = Stored(placed.like(tensor))
                else:
                    on_device = group.get("fused") or group.get("capturable")  # where such kernels want their counts
                    device = placed.tensor.device if on_device else "cpu"
                    tensor = torch.empty(known.shape, dtype=known.dtype, device=device)
                    found[fqn] = Stored(Placed.whole(tensor))
                self.optimizer.state[placed.tensor][key] = tensor
        return found

    def _empty_random_state(self, index: Index, state: TrainingState) -> dict[str, Tensor]:
        """The random states of the rank that stood where this one stands; of none where there was none."""
        old, mesh = state.plan, self.mesh
        where = {axis: mesh.index(axis) for axis in ("pp", "dp", "tp")}
        if where["dp"] >= old.dp:
            return {}  # it goes on from its seed
        rank = old.rank(dp=where["dp"], pp=where["pp"] % old.pp, tp=where["tp"] % old.tp)
        kinds = ["cpu", *(["cuda"] if mesh.device.type == "cuda" else [])]
        names = [name for kind in kinds if (name := f"random.{rank}.{kind}") in index]
        return {name: torch.empty(index[name].shape, dtype=torch.uint8) for name in names}


def _names(model: nn.Module) -> list[str]:
    """The names of all that is saved of a model; what stands in several places has its first."""
    return [*(name for name, _ in model.named_parameters()), *_persistent_buffers(model)]


def _persistent_buffers(model: nn.Module) -> list[str]:
    """The names of the buffers that are saved with the weights."""
    return [
        f"{path}.{name}" if path else name
        for path, module in model.named_modules()
        for name, buffer in module._buffers.items()
        if buffer is not None and name not in module._non_persistent_buffers_set
    ]


def _cause(error: CheckpointException, what: str) -> MeshloomError:
    """What went wrong on the first rank where something did."""
    rank, (cause, _) = min(error.failures.items())
    if isinstance(cause, MeshloomError):
        return cause
    said = str(cause).splitlines()[0] if str(cause) else type(cause).__name__
    return FolderError(f"{what}, got '{said}' on rank {rank}")


def _rename(part: Path, target: Path) -> None:
    """Give a folder its name; one that had it before goes, but not before the new one is there."""
    old = target.with_name(f".{target.name}.old")
    if target.exists():
        shutil.rmtree(old, ignore_errors=True)
        target.rename(old)
    part.rename(target)
    sync_folder(target.parent)
    shutil.rmtree(old, ignore_errors=True)


def _tidy(folder: Path) -> None:
    """Remove what a run left that was killed while it saved; a model that was to be replaced gets its name back."""
    for old in folder.glob(".*.old"):
        target = old.with_name(old.name.removeprefix(".").removesuffix(".old"))
        if not target.exists():
            old.rename(target)
    for left in [path for kind in ("part", "gone", "old") for path in folder.glob(f".*.{kind}")]:
        shutil.rmtree(left, ignore_errors=True)


def _remove(path: Path) -> None:
    """Remove a checkpoint, which is first no longer listed."""
    gone = path.with_name(f".{path.name}.gone")
    shutil.rmtree(gone, ignore_errors=True)
    path.rename(gone)
    shutil.rmtree(gone, ignore_errors=True)


def _sync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
