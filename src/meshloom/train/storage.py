"""How `torch.distributed.checkpoint` stores here: safetensors files and an index in JSON, and no pickle anywhere.

DCP plans who writes and reads which part of which tensor; its own files would have to be unpickled to be read, which
runs whatever code a stranger put there. Each tensor is stored as boxes of the whole, so any plan can read what any
other wrote. The weights of all ranks are joined into one `model.safetensors`, which Hugging Face opens.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePath
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    LoadPlanner,
    SavePlan,
    SavePlanner,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter, WriteResult
from torch.futures import Future

from meshloom.errors import FolderError
from meshloom.model.tensorfile import TYPE_NAMES, Entry, write_tensors
from meshloom.parallel.placement import Placed, Run

WEIGHTS = "model.safetensors"
WEIGHT = "model."  # the prefix of the weights among the names of all tensors
_PARTS = "parts"  # where each rank's weights lie until they are joined
_STATE = "state"
_INDEX = f"{_STATE}/index.json"
_VERSION = 1
_TYPES = {name: dtype for dtype, name in TYPE_NAMES.items()}


class Stored:
    """A tensor of this rank as DCP sees it: the boxes of the whole that it fills."""

    def __init__(self, placed: Placed | Run) -> None:
        self.placed = placed

    def __create_write_items__(self, fqn: str, obj: object) -> list[WriteItem]:
        properties = TensorProperties.create_from_tensor(self.placed.tensor)
        size = torch.Size(self.placed.shape)
        return [
            WriteItem(
                index=MetadataIndex(fqn, torch.Size(offsets)),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(chunk=_chunk(offsets, sizes), properties=properties, size=size),
            )
            for offsets, sizes, _ in self.placed.boxes()
        ]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [_chunk(offsets, sizes) for offsets, sizes, _ in self.placed.boxes()]

    def __get_tensor_shard__(self, index: MetadataIndex) -> Tensor:
        return next(part for offsets, _, part in self.placed.boxes() if torch.Size(offsets) == index.offset)


def _chunk(offsets: Sequence[int], sizes: Sequence[int]) -> ChunkStorageMetadata:
    return ChunkStorageMetadata(offsets=torch.Size(offsets), sizes=torch.Size(sizes))


class Saving(DefaultSavePlanner):
    """DCP's planner for what is `Stored`."""

    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    def lookup_object(self, index: MetadataIndex) -> Any:
        """The tensor of one box."""
        return self.state_dict[index.fqn].__get_tensor_shard__(index)


class Loading(DefaultLoadPlanner):
    """DCP's planner for what is `Stored`: the tensors are filled in place."""

    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    def set_up_planner(self, state_dict: Any, metadata: Metadata | None = None, is_coordinator: bool = False) -> None:
        """Know what to fill."""
        self.state_dict, self.metadata, self.is_coordinator = state_dict, metadata, is_coordinator

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        """The tensor of one box."""
        shard: Tensor = self.state_dict[index.fqn].__get_tensor_shard__(index)
        return shard


@dataclass(frozen=True, slots=True, kw_only=True)
class Box:
    """Where one box of a tensor is stored: under `key` in `file`, a path within the checkpoint's folder."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: str
    key: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Known:
    """A tensor of the index."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    boxes: tuple[Box, ...]


Index = Mapping[str, Known]


class Writer(StorageWriter):
    """Writes a checkpoint into `folder`, which must be given its name by `complete` when all is there.

    `complete` runs on the coordinating rank after everybody has written. `names` are the weights in the order of the
    model. Raises FolderError.
    """

    def __init__(
        self,
        folder: Path,
        *,
        rank: int,
        names: Iterable[str],
        prepare: Callable[[], None],
        complete: Callable[[], None],
    ) -> None:
        super().__init__()
        self.folder, self.rank, self.names = folder, rank, list(names)
        self.prepare, self.complete = prepare, complete

    def reset(self, checkpoint_id: Any = None) -> None:
        """Nothing is kept from one checkpoint to the next."""

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Nothing to do."""

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """The plan as it is."""
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Make the folder, before anybody writes."""
        self.prepare()
        try:
            for name in (_PARTS, _STATE):
                (self.folder / name).mkdir(parents=True)
        except OSError as error:
            raise FolderError(f"{self.folder}: expected to make a folder here, got '{error.strerror}'") from error
        return plans

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write this rank's boxes: weights into one file, all else into another."""
        results = []
        for folder, is_weight in ((_PARTS, True), (_STATE, False)):
            items = [item for item in plan.items if item.index.fqn.startswith(WEIGHT) == is_weight]
            file = f"{folder}/rank{self.rank:05d}.safetensors"
            entries = []
            for item in items:
                assert item.tensor_data is not None
                key = f"{item.index.fqn}@{','.join(map(str, item.index.offset or ()))}"
                sizes, dtype = item.tensor_data.chunk.sizes, item.tensor_data.properties.dtype
                entries.append(Entry(name=key, dtype=dtype, shape=sizes, make=partial(_data, planner, item)))
                size = item.tensor_storage_size() or 0
                results.append(WriteResult(index=item.index, size_in_bytes=size, storage_data=(file, key)))
            if entries:
                write_tensors(self.folder / file, entries)
        done: Future[list[WriteResult]] = Future()
        done.set_result(results)
        return done

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Join the weights, write the index, and give the checkpoint its name."""
        places = {result.index: result.storage_data for rank in results for result in rank}
        index: dict[str, Known] = {}
        for fqn, known in metadata.state_dict_metadata.items():
            assert isinstance(known, TensorStorageMetadata)
            boxes = []
            for chunk in known.chunks:
                file, key = places[MetadataIndex(fqn, chunk.offsets)]
                boxes.append(Box(offsets=tuple(chunk.offsets), sizes=tuple(chunk.sizes), file=file, key=key))
            index[fqn] = Known(dtype=known.properties.dtype, shape=tuple(known.size), boxes=tuple(boxes))
        join(self.folder, {name: index[WEIGHT + name] for name in self.names}, self.folder / WEIGHTS)
        for path in (self.folder / _PARTS).iterdir():
            path.unlink()
        (self.folder / _PARTS).rmdir()
        for name in self.names:
            part = index[WEIGHT + name]
            box = Box(offsets=(0,) * len(part.shape), sizes=part.shape, file=WEIGHTS, key=name)
            index[WEIGHT + name] = Known(dtype=part.dtype, shape=part.shape, boxes=(box,))
        write_index(self.folder, index)
        self.complete()

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        """DCP never has to guess our writer."""
        return False


class Reader(StorageReader):
    """Reads what a `Writer` wrote, only the boxes that a rank needs; raises FolderError."""

    def __init__(self, folder: Path, index: Index) -> None:
        super().__init__()
        self.folder, self.index = folder, index

    def reset(self, checkpoint_id: Any = None) -> None:
        """Nothing is kept from one checkpoint to the next."""

    def read_metadata(self, *args: Any) -> Metadata:
        """What DCP plans by."""
        known: dict[str, Any] = {}
        places: dict[MetadataIndex, Any] = {}
        for fqn, tensor in self.index.items():
            chunks = [_chunk(box.offsets, box.sizes) for box in tensor.boxes]
            properties = TensorProperties(dtype=tensor.dtype)
            known[fqn] = TensorStorageMetadata(properties=properties, size=torch.Size(tensor.shape), chunks=chunks)
            places |= {MetadataIndex(fqn, torch.Size(box.offsets)): box for box in tensor.boxes}
        return Metadata(state_dict_metadata=known, storage_data=places)

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any) -> None:
        """Know where each box lies."""
        self.places = metadata.storage_data

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """The plan as it is."""
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """The plans as they are."""
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Fill the tensors of this rank."""
        by_file: dict[str, list[tuple[Any, Box]]] = {}
        for item in plan.items:
            box = self.places[item.storage_index]
            by_file.setdefault(box.file, []).append((item, box))
        for file, items in sorted(by_file.items()):
            with open_tensors(self.folder / file) as opened:
                for item, box in items:
                    ends = zip(item.storage_offsets, item.lengths)
                    part = slice_of(opened, box.key, [(begin, begin + length) for begin, length in ends])
                    target = planner.resolve_tensor(item).detach()
                    target.copy_(part)
                    planner.commit_tensor(item, target)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        """DCP never has to guess our reader."""
        return False


def _data(planner: SavePlanner, item: WriteItem) -> Tensor:
    tensor = planner.resolve_data(item)
    assert isinstance(tensor, Tensor)
    return tensor


def open_tensors(path: Path) -> Any:
    """A safetensors file, opened; raises FolderError if it is missing, truncated or none."""
    try:
        return safe_open(path, framework="pt")
    except (OSError, SafetensorError) as error:
        raise FolderError(f"{path}: expected a whole safetensors file, got '{error}'") from error


def slice_of(opened: Any, key: str, ranges: Sequence[tuple[int, int]]) -> Tensor:
    """The elements from begin to end of each dim of a tensor in an opened file."""
    if not ranges:
        whole: Tensor = opened.get_tensor(key)
        return whole
    part: Tensor = opened.get_slice(key)[tuple(slice(begin, end) for begin, end in ranges)]
    return part


def join(folder: Path, tensors: Index, path: Path) -> None:
    """Write whole tensors into one safetensors file, by their names in `tensors`, one tensor in memory at a time."""
    files = {box.file: open_tensors(folder / box.file) for known in tensors.values() for box in known.boxes}

    def make(known: Known) -> Tensor:
        whole = torch.empty(known.shape, dtype=known.dtype)
        for box in known.boxes:
            part = whole
            for dim, (begin, size) in enumerate(zip(box.offsets, box.sizes)):
                part = part.narrow(dim, begin, size)
            part.copy_(files[box.file].get_tensor(box.key))
        return whole

    entries = [
        Entry(name=name, dtype=known.dtype, shape=known.shape, make=partial(make, known))
        for name, known in tensors.items()
    ]
    write_tensors(path, entries)


def write_index(folder: Path, index: Index) -> None:
    """Write the index of all tensors."""
    tensors = {
        fqn: {
            "dtype": TYPE_NAMES[known.dtype],
            "shape": known.shape,
            "boxes": [[box.offsets, box.sizes, box.file, box.key] for box in known.boxes],
        }
        for fqn, known in index.items()
    }
    (folder / _INDEX).write_text(json.dumps({"version": _VERSION, "tensors": tensors}), encoding="utf-8")


def inside(name: str) -> str:
    """The name of a file that a folder lists; raises ValueError if it leads out of the folder."""
    path = PurePath(name)
    if path.is_absolute() or ".." in path.parts or "\0" in name:
        raise ValueError(f"a file outside of the folder: {name!r:.80}")
    return name


def _whole(sizes: Sequence[Any]) -> tuple[int, ...]:
    if not all(isinstance(size, int) and 0 <= size < 1 << 48 for size in sizes):
        raise ValueError(f"sizes {sizes!r:.80}")
    return tuple(sizes)


def read_index(folder: Path) -> Index:
    """The index of a checkpoint; raises FolderError if it is missing or not what it should be."""
    path = folder / _INDEX
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
        if table["version"] != _VERSION:
            raise FolderError(f"{path}: expected version {_VERSION}, got {table['version']}; use the Meshloom it is of")
        return {
            fqn: Known(
                dtype=_TYPES[known["dtype"]],
                shape=_whole(known["shape"]),
                boxes=tuple(
                    Box(offsets=_whole(offsets), sizes=_whole(sizes), file=inside(file), key=str(key))
                    for offsets, sizes, file, key in known["boxes"]
                ),
            )
            for fqn, known in table["tensors"].items()
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise FolderError(f"{path}: expected the index of a checkpoint, got '{error}'") from error
