"""Plans written by hand are held to their word; those that models ship are laid beside what was found."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from meshloom.errors import PlanError
from meshloom.parallel.apply import find_cut
from meshloom.parallel.explain import explain
from meshloom.parallel.pairs import Discovery
from meshloom.parallel.written import STYLE_NAMES, differences, matching, read_styles
from meshloom.plan import Plan

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64, "vocab_size": 96}


def _model(family: str = "llama", **other: int) -> torch.nn.Module:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **SMALL, **other))


def _cut(styles: dict[str, str], plan: str = "tp2") -> Discovery:
    example = {"input_ids": torch.zeros(1, 8, dtype=torch.long, device="meta")}
    return find_cut(_model(), Plan.parse(plan), example, styles)[0]


def _styles(found: Discovery) -> dict[str, str]:
    return {decision.module: decision.style for decision in explain(found, 2)}


def test_what_is_written_whole_stays_whole_with_all_that_it_feeds() -> None:
    found = _cut({"layers.*.mlp.up_proj": "whole", "lm_head": "replicate"})
    styles = _styles(found)
    for layer in (0, 1):
        assert {styles[f"model.layers.{layer}.mlp.{name}_proj"] for name in ("up", "gate", "down")} == {"whole"}
        assert styles[f"model.layers.{layer}.self_attn.q_proj"] == "column"
    assert styles["lm_head"] == styles["model.embed_tokens"] == "whole"
    reasons = {decision.module: decision.reason for decision in explain(found)}
    assert reasons["model.layers.1.mlp.gate_proj"] == "'layers.*.mlp.up_proj' is written whole"


def test_what_transformers_ships_may_be_written() -> None:
    shipped = _model().tp_plan
    assert len(shipped) >= 8
    assert _styles(_cut(dict(shipped))) == _styles(_cut({}))


@pytest.mark.parametrize(
    ("styles", "told"),
    [
        ({"layers.*.mlp.up": "column"}, r"'layers\.\*\.mlp\.up' matches no module of LlamaForCausalLM"),
        ({"layers.*.mlp.up_proj": "sideways"}, "unknown style 'sideways'"),
        (
            {"layers.*.mlp.up_proj": "row"},
            r"asks to cut model\.layers\.0\.mlp\.up_proj \(row\), but it is cut by column",
        ),
        ({"layers.*.input_layernorm": "column"}, "it is no linear layer"),
        (
            {"layers.*.self_attn.q_proj": "whole", "layers.*.mlp.*": "whole", "lm_head": "whole"},
            "expected layers that can",
        ),
    ],
)
def test_an_entry_that_cannot_be_is_refused(styles: dict[str, str], told: str) -> None:
    with pytest.raises(PlanError, match=told):
        _cut(styles)


@pytest.mark.parametrize(
    "text", ["styles = 3", "[styles]\na = 1", "[other]\na = 'column'", "[styles", "[styles]\na = 'x'"]
)
def test_a_file_that_is_no_plan(tmp_path: Path, text: str) -> None:
    path = tmp_path / "styles.toml"
    path.write_text(text)
    with pytest.raises(PlanError):
        read_styles(path)
    path.write_text('[styles]\n"layers.*.mlp.up_proj" = "colwise"\n')
    assert read_styles(path) == {"layers.*.mlp.up_proj": "colwise"}


def test_a_star_is_one_name_and_the_path_may_begin_before() -> None:
    paths = ["model.layers.0.mlp.up", "model.layers.0.mlp.group.up", "model.layers.10.mlp.up", "other_layers.0.mlp.up"]
    assert matching("layers.*.mlp.up", paths) == [paths[0], paths[2]]
    assert matching("model.layers.0.mlp.up", paths) == [paths[0]]


def test_what_a_model_ships_is_laid_beside_what_was_found() -> None:
    example = {"input_ids": torch.zeros(1, 8, dtype=torch.long, device="meta")}
    llama = _model()
    assert differences(llama, find_cut(llama, Plan.parse("tp2"), example)[0]) == (len(llama.tp_plan), {})
    mixtral = _model("mixtral", num_key_value_heads=4, num_local_experts=2)
    agree, differ = differences(mixtral, find_cut(mixtral, Plan.parse("tp2"), example)[0])
    assert agree >= 5
    assert differ["model.layers.*.mlp.experts.down_proj"] == "rowwise there, whole here: expert weights are kept whole"


def test_every_style_that_transformers_knows_has_a_meaning() -> None:
    from transformers.integrations.tensor_parallel import ALL_PARALLEL_STYLES

    assert set(ALL_PARALLEL_STYLES.keys()) <= set(STYLE_NAMES)
