"""Shipped configs: of the size that was published, and told in one line when a name is none of them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from meshloom.errors import DataError, MeshloomError
from meshloom.model.build import build_model, num_parameters
from meshloom.model.config import load_config, load_tokenizer, objective_of
from meshloom.model.preset import expected_model, preset_config, preset_tokenizer, presets

# counts as published with the weights; GPT-2's and BERT's as transformers counts them with their heads
PUBLISHED = {
    "gpt2": 124_439_808, "gpt2-medium": 354_823_168, "gpt2-large": 774_030_080, "gpt2-xl": 1_557_611_200,
    "bert-base-uncased": 109_514_298, "bert-large-uncased": 335_174_458, "gpt3-175b": 174_604_259_328,
    "llama-7b": 6_738_415_616, "llama-13b": 13_015_864_320, "llama-65b": 65_285_660_672,
    "llama-2-70b": 68_976_648_192, "llama-3-8b": 8_030_261_248, "llama-3-70b": 70_553_706_496,
    "llama-3.1-405b": 405_853_388_800, "llama-3.2-1b": 1_235_814_400, "qwen2-7b": 7_615_616_512,
    "qwen2.5-0.5b": 494_032_768, "qwen2.5-14b": 14_770_033_664, "qwen2.5-32b": 32_763_876_352,
    "qwen2.5-72b": 72_706_203_648, "mixtral-8x7b": 46_702_792_704, "mixtral-8x22b": 140_620_634_112,
}  # fmt: skip


def _count(name: str) -> int:
    config = load_config(name)
    return num_parameters(build_model(config, objective_of(config), seed=0, device="meta"))


@pytest.mark.parametrize(("name", "expected"), PUBLISHED.items(), ids=list(PUBLISHED))
def test_a_preset_has_the_published_size(name: str, expected: int) -> None:
    assert _count(name) == expected


@pytest.mark.parametrize(("name", "about"), [("koen-sllm", 120e6), ("koen-sllm-1b", 1e9)])
def test_the_korean_english_models(name: str, about: float) -> None:
    assert _count(name) == pytest.approx(about, rel=0.01)
    config = load_config(name)
    assert config.model_type == "llama"
    assert 1 < config.num_key_value_heads < config.num_attention_heads
    with pytest.raises(DataError, match=r"koen-sllm.* has no tokenizer of its own: expected --tokenizer"):
        load_tokenizer(name)


@pytest.mark.parametrize("name", sorted(presets()))
def test_every_preset_is_a_config_that_transformers_takes(name: str) -> None:
    config = load_config(name)
    fields = preset_config(name)
    assert fields is not None
    assert "tokenizer" not in fields
    assert {key: getattr(config, key) for key in fields if key != "rope_parameters"} == {
        key: value for key, value in fields.items() if key != "rope_parameters"
    }
    assert objective_of(config) == ("masked" if name.startswith("bert") else "causal")


def test_a_tiny_preset_brings_its_tokenizer() -> None:
    assert preset_tokenizer("gpt2-tiny") == "bytes"
    assert load_tokenizer("bert-tiny")("ab")["input_ids"]


def test_a_name_that_is_none_is_told_with_those_close_to_it(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "closest: gpt3-175b" in expected_model("gpt3-175B")
    assert "closest: llama-2-70b" in expected_model("llama2-70b")
    assert "koen-sllm, koen-sllm-1b" in expected_model("zzzz")
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(MeshloomError) as caught:
        load_config("gpt2-xxl")
    assert "expected a preset (closest: gpt2-xl" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_page_lists_them_all() -> None:
    page = Path(__file__).resolve().parents[2] / "docs" / "presets.md"
    rows = [line.split("|")[2] for line in page.read_text(encoding="utf-8").splitlines() if line.startswith("| ")]
    listed = [name for row in rows for name in re.findall(r"`([\w.-]+)`", row)]
    assert sorted(listed) == sorted(presets())
