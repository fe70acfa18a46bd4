"""Weights from a folder of safetensors files: each rank reads its own slices, and nothing else.

Names may carry the prefix of the base model or not, and tied weights may be there under any of their names. Files of
an older layout, whose tensors transformers fuses or turns as it loads, are loaded whole by transformers itself.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import warnings
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download, try_to_load_from_cache
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

import meshloom
from meshloom.errors import ModelError
from meshloom.model.config import hub
from meshloom.model.preset import preset_config
from meshloom.model.tensorfile import Entry, write_tensors
from meshloom.parallel.mesh import Mesh
from meshloom.parallel.placement import Placed

_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_PICKLED = (
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "model.ckpt.index",
    "tf_model.h5",
    "flax_model.msgpack",
)
_PIECE = 1 << 20  # elements read at a time


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """Where each tensor of a model is stored: its name -> (file, key); empty where transformers must convert."""

    folder: Path
    places: Mapping[str, tuple[Path, str]]


def find_weights(model: str) -> Path | None:
    """The folder with the weights of a folder or hub id; None for a preset, a config.json or a folder without any.

    Raises ModelError if there are none but pickled ones, OfflineError if the hub is needed and out of reach.
    """
    if preset_config(model) is not None or model.endswith(".json"):
        return None
    folder = Path(model)
    if not folder.is_dir():
        cached = [try_to_load_from_cache(model, name) for name in (_SINGLE, _INDEX)]
        found = [Path(path).parent for path in cached if isinstance(path, str)]
        if found:
            return found[0]
        patterns = ["*.safetensors", f"*{_INDEX}", "config.json"]
        with hub(f"weights of {model!r}: expected a preset, a folder or a hub id, or --from-scratch", ModelError):
            folder = Path(snapshot_download(model, allow_patterns=patterns))
    if (folder / _SINGLE).is_file() or (folder / _INDEX).is_file():
        return folder
    for name in _PICKLED:
        if (folder / name).is_file():
            raise ModelError(
                f"{folder / name}: expected {_SINGLE}; what is pickled may run any code when it is loaded: "
                "convert it with transformers' save_pretrained, or give --from-scratch"
            )
    return None


def check_weights(folder: Path, whole: nn.Module) -> Source:
    """Where each tensor of the uncut model `whole` (on any device) is stored.

    Raises ModelError naming the tensor and the file if one is missing or has another shape.
    """
    stored = _stored(folder)
    try:
        by_name = _by_name(stored, whole)
    except _MustConvert:
        return Source(folder=folder, places={})
    names: dict[int, list[str]] = {}
    for name, tensor in _tensors(whole):
        names.setdefault(id(tensor), []).append(name)
    ignored = getattr(whole, "_keys_to_ignore_on_load_missing", None) or []
    places = {}
    for name, tensor in whole.state_dict(keep_vars=True).items():
        first, *_ = alias = names[id(tensor)]
        if name != first:
            continue
        key = next((by_name[one] for one in alias if one in by_name), None)
        if key is None:
            if not isinstance(tensor, nn.Parameter) and any(re.search(pattern, name) for pattern in ignored):
                continue  # a buffer that keeps what it was made with
            raise ModelError(
                f"{folder}: a checkpoint of another architecture: expected a tensor {name}, found none in its "
                f"{len(stored)}; give the model's own, or --from-scratch"
            )
        shape = _shape(stored[key], key)
        if shape != tuple(tensor.shape):
            raise ModelError(
                f"{stored[key]}: a checkpoint of another architecture: expected {name} of shape "
                f"{tuple(tensor.shape)}, got {shape}"
            )
        places[name] = (stored[key], key)
    return Source(folder=folder, places=places)


def fill_from(
    folder: Path, whole: nn.Module, *, mesh: Mesh, cache: Path | None = None
) -> Callable[[Mapping[str, Placed]], None]:
    """What fills a rank's part of the uncut model `whole` (on the meta device) from the files of `folder`.

    With `cache` the part is stored there, and read from there the next time. Raises ModelError.
    """
    source = check_weights(folder, whole)

    def fill(held: Mapping[str, Placed]) -> None:
        cached = None if cache is None else cache / f"{_key(folder, whole, mesh, held)}.safetensors"
        if cached is not None and _read_cache(cached, held):
            return
        if source.places:
            for name, placed in held.items():
                if name in source.places:
                    _read(*source.places[name], placed)
        else:
            _convert(folder, whole, held)
        if cached is not None and mesh.index("dp") == 0:
            _write_cache(cached, held)

    return fill


class _MustConvert(Exception):
    """A tensor is stored in a layout that transformers changes as it loads."""


def _stored(folder: Path) -> dict[str, Path]:
    """Key of each stored tensor -> its file."""
    index = folder / _INDEX
    if index.is_file():
        try:
            named = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            files = {key: folder / file for key, file in named.items()}
            if out := next((file for file in named.values() if "/" in file or "\\" in file or "\0" in file), None):
                raise ValueError(f"a file outside of the folder: {out!r:.80}")
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ModelError(f"{index}: expected a map of tensors to files, got '{error}'") from error
        for file in sorted(set(files.values())):
            with _opened(file) as opened:
                held = set(opened.keys())
            lost = next((key for key, where in files.items() if where == file and key not in held), None)
            if lost is not None:
                raise ModelError(f"{file}: expected a tensor {lost}, which {index.name} promises; download it anew")
        return files
    with _opened(folder / _SINGLE) as opened:
        return dict.fromkeys(opened.keys(), folder / _SINGLE)


def _opened(file: Path) -> Any:
    try:
        return safe_open(file, framework="pt")
    except (OSError, ValueError, SafetensorError) as error:  # ValueError: a name that no disk takes
        raise ModelError(f"{file}: expected a whole safetensors file, got '{error}'") from error


def _shape(file: Path, key: str) -> tuple[int, ...]:
    with _opened(file) as opened:
        return tuple(opened.get_slice(key).get_shape())


def _by_name(stored: Iterable[str], whole: nn.Module) -> dict[str, str]:
    """The name that a tensor has in today's transformers -> its key; raises _MustConvert if a name is not all.

    As transformers' own loading goes: a key is renamed unless only its old name is known, then the prefix is set right.
    """
    transforms = conversion_mapping.get_model_conversion_mapping(whole)
    renamings = [one for one in transforms if isinstance(one, WeightRenaming)]
    converters = [one for one in transforms if isinstance(one, WeightConverter)]
    prefix, known = whole.base_model_prefix, whole.state_dict()
    found = {}
    for key in sorted(stored, key=dot_natural_key):
        name, pattern = rename_source_key(key, renamings, converters, prefix, known)
        if name not in known and key in known:
            name, pattern = rename_source_key(key, [], [], prefix, known)
        if name in known and pattern is not None:
            raise _MustConvert
        found[name] = key
    return found


def _tensors(whole: nn.Module) -> Iterable[tuple[str, Any]]:
    yield from whole.named_parameters(remove_duplicate=False)
    yield from whole.named_buffers(remove_duplicate=False)


def _read(file: Path, key: str, placed: Placed) -> None:
    """Read the boxes of one tensor, some rows at a time. The file is opened anew, so that no more stays mapped."""
    with _opened(file) as opened, torch.no_grad():
        if not placed.shape:
            placed.tensor.copy_(opened.get_tensor(key))
            return
        stored = opened.get_slice(key)
        for offsets, sizes, part in placed.boxes():
            rows = max(1, _PIECE // max(1, prod(sizes[1:])))
            rest = tuple(slice(begin, begin + size) for begin, size in zip(offsets[1:], sizes[1:]))
            for begin in range(0, sizes[0], rows):
                end = min(sizes[0], begin + rows)
                part[begin:end].copy_(stored[(slice(offsets[0] + begin, offsets[0] + end), *rest)])


def _convert(folder: Path, whole: nn.Module, held: Mapping[str, Placed]) -> None:
    """Let transformers load and convert the whole model, and take what is held of it."""
    warnings.warn(
        f"{folder}: its tensors are in an older layout, so each rank loads the whole model and takes its part of it; "
        "save it anew with transformers' save_pretrained to load only parts, or give --shard-cache",
        stacklevel=2,
    )
    loaded, told = type(whole).from_pretrained(  # type: ignore[attr-defined]
        folder, output_loading_info=True, dtype=torch.float32, use_safetensors=True, local_files_only=True
    )
    for what in ("missing_keys", "mismatched_keys"):
        for name in sorted(map(str, told[what])):
            raise ModelError(f"{folder}: a checkpoint of another architecture: {name} is {what.partition('_')[0]}")
    tensors = dict(_tensors(loaded))
    for name, placed in held.items():
        placed.put(tensors[name].detach().to(placed.tensor.dtype).flatten(), 0)


def _key(folder: Path, whole: Any, mesh: Mesh, held: Mapping[str, Placed]) -> str:
    """What a cached part depends on: the files, the architecture, the plan, the place in it, what is held there, and
    our version."""
    files = sorted(path for path in folder.iterdir() if path.name.endswith((".safetensors", _INDEX)))
    facts = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    plan = mesh.plan
    place = [plan.tp, plan.pp, plan.virtual_stages, mesh.index("tp"), mesh.index("pp")]
    shapes = [(name, tuple(parameter.shape)) for name, parameter in whole.named_parameters()]
    parts = sorted((name, tuple(placed.tensor.shape)) for name, placed in held.items())  # styles may say otherwise
    text = json.dumps([meshloom.__version__, str(folder.resolve()), facts, place, type(whole).__name__, shapes, parts])
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _read_cache(path: Path, held: Mapping[str, Placed]) -> bool:
    if not path.is_file():
        return False
    try:
        with safe_open(path, framework="pt") as opened:
            if set(opened.keys()) != set(held):
                raise SafetensorError("other tensors")
            for name, placed in held.items():
                placed.tensor.copy_(opened.get_tensor(name))
    except (OSError, SafetensorError, RuntimeError) as error:
        warnings.warn(f"{path}: cannot be read ({error}), so it is made anew", stacklevel=2)
        return False
    return True


def _write_cache(path: Path, held: Mapping[str, Placed]) -> None:
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    entries = [
        Entry(name=name, dtype=placed.tensor.dtype, shape=placed.tensor.shape, make=placed.tensor.detach)
        for name, placed in held.items()
    ]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_tensors(part, entries)
        part.replace(path)
    finally:
        with suppress(OSError):
            part.unlink(missing_ok=True)
