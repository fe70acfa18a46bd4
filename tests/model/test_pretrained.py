"""Weights from files: each rank gets its part of what transformers loads, and reads no more than that."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM

from meshloom.errors import ModelError
from meshloom.model import pretrained
from meshloom.model.build import build_model
from meshloom.model.config import objective_of
from meshloom.model.pretrained import check_weights, fill_from, find_weights
from meshloom.model.weights import build_part
from meshloom.parallel.placement import placed_parameters
from meshloom.plan import Plan
from tests.conftest import Meshloom
from tests.model.test_weights import CONFIGS, world

AUTO = {"causal": AutoModelForCausalLM, "masked": AutoModelForMaskedLM}


def _save(config: Any, folder: Path, **options: Any) -> nn.Module:
    """Random weights as transformers saves them."""
    model = build_model(config, objective_of(config), seed=4)
    model.save_pretrained(folder, **options)  # type: ignore[operator]
    return model


def _meta(config: Any) -> nn.Module:
    return build_model(config, objective_of(config), seed=0, device="meta")


@contextmanager
def _loaded(config: Any, folder: Path, plan: Plan, rank: int, **options: Any) -> Iterator[dict[str, Any]]:
    """What a rank holds after loading."""
    with world(plan, rank) as mesh:
        whole = _meta(config)
        fill = fill_from(folder, whole, mesh=mesh, **options)
        model = build_part(config, objective_of(config), mesh=mesh, seed=9, fill=fill)
        shapes = {name: tuple(parameter.shape) for name, parameter in whole.named_parameters()}
        yield placed_parameters(model, mesh, shapes)


def _compare(config: Any, folder: Path, plan: Plan, expected: nn.Module | None = None) -> None:
    objective = objective_of(config)
    whole = expected or AUTO[objective].from_pretrained(folder, dtype=torch.float32)
    found = set()
    for rank in range(plan.world_size):
        with _loaded(config, folder, plan, rank) as held:
            for name, placed in held.items():
                mine = placed.like(torch.full_like(placed.tensor, -7.0))
                mine.put(whole.get_parameter(name).detach().flatten(), 0)
                assert torch.equal(placed.tensor, mine.tensor), name
                found.add(name)
    assert found == {name for name, _ in whole.named_parameters()}


@pytest.mark.parametrize("plan", ["dp1", "tp2", "pp2", "tp2.pp2"])
@pytest.mark.parametrize("family", ["gpt2", "gpt2, untied", "bert", "llama", "llama, tied", "modernbert"])
def test_each_part_is_that_of_the_whole(tmp_path: Path, family: str, plan: str) -> None:
    _save(CONFIGS[family], tmp_path)
    _compare(CONFIGS[family], tmp_path, Plan.parse(plan))


def test_several_files(tmp_path: Path) -> None:
    _save(CONFIGS["llama"], tmp_path, max_shard_size="30KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    _compare(CONFIGS["llama"], tmp_path, Plan.parse("tp2.pp2"))


@pytest.mark.parametrize("family", ["gpt2", "llama, tied"])
def test_the_base_model_alone_and_another_dtype(tmp_path: Path, family: str) -> None:
    model = build_model(CONFIGS[family], "causal", seed=4)
    base = model.base_model.to(torch.bfloat16)  # type: ignore[union-attr, operator]
    base.save_pretrained(tmp_path)
    assert not any(key.startswith(f"{model.base_model_prefix}.") for key in load_file(tmp_path / "model.safetensors"))
    _compare(CONFIGS[family], tmp_path, Plan.parse("tp2"))


def test_tied_weights_under_their_other_name(tmp_path: Path) -> None:
    _save(CONFIGS["gpt2"], tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["lm_head.weight"] = tensors.pop("transformer.wte.weight")
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    _compare(CONFIGS["gpt2"], tmp_path, Plan.parse("pp2"))


def test_old_names_of_a_norm(tmp_path: Path) -> None:
    expected = _save(CONFIGS["bert"], tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    for name, old in (("LayerNorm.weight", "LayerNorm.gamma"), ("LayerNorm.bias", "LayerNorm.beta")):
        tensors = {key.replace(name, old): tensor for key, tensor in tensors.items()}
    assert any("gamma" in key for key in tensors)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    _compare(CONFIGS["bert"], tmp_path, Plan.parse("tp2"), expected)


def test_a_layout_that_transformers_converts(tmp_path: Path) -> None:
    _save(CONFIGS["mixtral"], tmp_path)  # one file tensor for each expert, one parameter for all
    with pytest.warns(UserWarning, match="older layout, so each rank loads the whole model"):
        _compare(CONFIGS["mixtral"], tmp_path, Plan.parse("tp2"))


def test_a_rank_reads_only_its_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = CONFIGS["llama"]
    _save(config, tmp_path)
    num_read = 0

    class Counting:
        def __init__(self, opened: Any) -> None:
            self.opened = opened

        def __enter__(self) -> Counting:
            return self

        def __exit__(self, *_: object) -> None:
            pass

        def __getattr__(self, name: str) -> Any:
            assert name != "get_tensor"
            return getattr(self.opened, name)

        def get_slice(self, key: str) -> Any:
            return CountingSlice(self.opened.get_slice(key))

    class CountingSlice:
        def __init__(self, part: Any) -> None:
            self.part = part

        def get_shape(self) -> Any:
            return self.part.get_shape()

        def __getitem__(self, where: Any) -> torch.Tensor:
            nonlocal num_read
            tensor: torch.Tensor = self.part[where]
            num_read += tensor.numel()
            return tensor

    opened = pretrained._opened
    monkeypatch.setattr(pretrained, "_opened", lambda file: Counting(opened(file)))
    with _loaded(config, tmp_path, Plan(tp=2, pp=2), 3) as held:
        assert num_read == sum(placed.tensor.numel() for placed in held.values())
    assert num_read < 0.4 * sum(parameter.numel() for parameter in _meta(config).parameters())


def test_a_cached_part_is_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, cache, plan = CONFIGS["gpt2"], tmp_path / "cache", Plan(tp=2)
    whole = _save(config, tmp_path / "model")

    def load(rank: int) -> dict[str, torch.Tensor]:
        with _loaded(config, tmp_path / "model", plan, rank, cache=cache) as held:
            return {name: placed.tensor.detach().clone() for name, placed in held.items()}

    first = [load(rank) for rank in range(2)]
    assert len(list(cache.iterdir())) == 2
    with monkeypatch.context() as patch:
        patch.setattr(pretrained, "_read", None)
        again = [load(rank) for rank in range(2)]
    for one, other in zip(first, again):
        assert all(torch.equal(one[name], other[name]) for name in one)
    broken = next(iter(cache.iterdir()))
    broken.write_bytes(broken.read_bytes()[:-9])
    with pytest.warns(UserWarning, match="is made anew"):
        repaired = [load(rank) for rank in range(2)]
    assert all(torch.equal(repaired[0][name], first[0][name]) for name in first[0])
    with torch.no_grad():
        whole.get_parameter("transformer.h.0.mlp.c_fc.weight").add_(1)
    whole.save_pretrained(tmp_path / "model")  # type: ignore[operator]
    file = tmp_path / "model" / "model.safetensors"
    os.utime(file, ns=(0, file.stat().st_mtime_ns + 5))
    changed = load(0)["transformer.h.0.mlp.c_fc.weight"]
    assert torch.equal(changed, first[0]["transformer.h.0.mlp.c_fc.weight"] + 1)


def _drop(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors")


def _turn(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"] = tensors["model.layers.1.mlp.up_proj.weight"].T.contiguous()
    save_file(tensors, folder / "model.safetensors")


def _cut(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])


def _promise(folder: Path) -> None:
    keys = dict.fromkeys([*load_file(folder / "model.safetensors"), "more"], "model.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": keys}))


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (_drop, r"expected a tensor model\.layers\.1\.mlp\.up_proj\.weight, found none in its 20"),
        (_turn, r"model\.safetensors: .*up_proj\.weight of shape \(48, 32\), got \(32, 48\)"),
        (_cut, r"model\.safetensors: expected a whole safetensors file"),
        (_promise, r"expected a tensor more, which model\.safetensors\.index\.json promises"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, spoil: Callable[[Path], None], told: str) -> None:
    _save(CONFIGS["llama"], tmp_path)
    spoil(tmp_path)
    with pytest.raises(ModelError, match=told) as caught:
        check_weights(tmp_path, _meta(CONFIGS["llama"]))
    assert "\n" not in str(caught.value)


def test_where_weights_are(tmp_path: Path) -> None:
    assert find_weights("gpt2-tiny") is None
    assert find_weights(str(tmp_path / "config.json")) is None
    assert find_weights(str(tmp_path)) is None
    torch.save({"a": torch.ones(1)}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"pytorch_model\.bin: expected model\.safetensors; what is pickled may run"):
        find_weights(str(tmp_path))
    _save(CONFIGS["gpt2"], tmp_path)
    assert find_weights(str(tmp_path)) == tmp_path


def test_training_starts_from_them(tmp_path: Path, meshloom: Meshloom) -> None:
    config = CONFIGS["gpt2"].__class__(**{**CONFIGS["gpt2"].to_dict(), "vocab_size": 264})
    _save(config, tmp_path / "model")
    arguments = ("train", "--model", str(tmp_path / "model"), "--tokenizer", "bytes", "--data", "sample",
                 "--plan", "tp2", "--max-steps", "1", "--seq-length", "16", "--save-steps", "1")  # fmt: skip
    expected = load_file(tmp_path / "model" / "model.safetensors")
    for more, same, told in (((), True, "weights of"), (("--from-scratch",), False, "random weights")):
        run = tmp_path / f"run.{same}"
        result = meshloom(*arguments, *more, "--out", str(run))
        assert result.returncode == 0, result.stderr
        assert told in result.stdout
        begun = load_file(run / "checkpoints" / "initial_model" / "model.safetensors")
        name = "transformer.h.0.attn.c_attn.weight"
        assert torch.equal(begun[name], expected[name]) == same
