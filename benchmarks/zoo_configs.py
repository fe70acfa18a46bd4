"""Tiny random models of every language model family that the installed transformers knows: the zoo of our tests.

The config of a family is its class's defaults made small by rules on the names of attributes (`RULES`), so a family
that is new in transformers needs nothing here unless a name says too little; those few stand in `EXCEPTIONS`.
`python benchmarks/zoo_configs.py` builds every family, runs one forward and backward pass in float32 on the CPU and
prints who runs, who does not and why; `--kind` takes one kind, `--json` prints the figures.
"""

from __future__ import annotations

import argparse
import json
import re
import signal
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import torch
import transformers
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, PretrainedConfig
from transformers.models.auto import modeling_auto

Kind = Literal["causal", "masked", "seq2seq"]
AUTO = {
    "causal": (transformers.AutoModelForCausalLM, modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES),
    "masked": (transformers.AutoModelForMaskedLM, modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES),
    "seq2seq": (transformers.AutoModelForSeq2SeqLM, modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES),
}
MOST_PARAMETERS = 20_000_000
SECONDS = 60  # that one family may take
EXPERTS, CHOSEN, POSITIONS, WINDOW = 4, 2, 64, 8


@dataclass(frozen=True, kw_only=True)
class Size:
    """How small: what the rules put into every config."""

    hidden: int = 32
    heads: int = 4
    kv_heads: int = 4
    vocab: int = 96
    layers: int = 4

    @property
    def head(self) -> int:
        return self.hidden // self.heads


Rule = Callable[[int, Size], int]
# The first pattern that matches the whole name of an attribute, or the standard name it stands for, decides. None and 0
# mean "absent" and stay.
RULES: tuple[tuple[str, Rule], ...] = (
    (r"type_vocab_size|task_type_vocab_size|chunk_size_feed_forward|num_adapter_layers", lambda old, s: old),
    (r".*vocab_size(_base|_per_layer_input)?|encoder_hash_byte_group_vocab|vocab_offset", lambda old, s: s.vocab),
    (r"qk_nope_head_dim|qk_rope_head_dim|rotary_dim", lambda old, s: s.head // 2),
    (r"qk_head_dim|v_head_dim", lambda old, s: s.head),
    (r"hidden_size_per_layer_input|laurel_rank", lambda old, s: s.head),
    (r"d_rel|rel_extent", lambda old, s: s.head),
    (r".*_lora_rank|.*_lowrank", lambda old, s: s.hidden // 2),
    (r"mamba_(d_head|head_?dim)", lambda old, s: 2 * s.head),
    (r".*head_dim|d_kv|d_head|dim_head|attention_head_size|kv_channels", lambda old, s: s.head),
    (r".*(num_key_value_heads|kv_n_heads|num_kv_heads|num_query_groups)", lambda old, s: s.kv_heads),
    (r".*(num_heads|n_heads?|attention_heads(_per_layer)?|mamba_heads|key_heads|value_heads)", lambda old, s: s.heads),
    (
        r".*(intermediate_size(_mlp)?|ffn_dim|ffn_hidden_size)|d_ff|dff|dim_ff|n_inner|d_inner",
        lambda old, s: 2 * s.hidden,
    ),
    (r"feed_forward_size|hidden_dim|mlp_dim|mamba_d_ssm", lambda old, s: 2 * s.hidden),
    (
        r".*(hidden_size(_global)?|embedding_size|embed_dim|projector_(in|out)put_dim|adapter_input_size)",
        lambda old, s: s.hidden,
    ),
    (r"d_model|n_embd|dim|emb_dim|embedding_dim|word_embed_proj_dim|lru_width|d_latents", lambda old, s: s.hidden),
    (
        r"embedding_rank|prediction_head_size|adapter_(in|out)_dim|router_hidden_size|adapter_rank|intra_bottleneck_size",
        lambda old, s: s.hidden,
    ),
    (r"ext_pw_out_channel|nemo_conv_channels|depthwise_separable_out_channel", lambda old, s: s.hidden),
    (r"num_hidden_layers|n_layers?|num_layers|depth|num_layers_per_stack", lambda old, s: s.layers),
    (r".*(encoder|decoder|sparse_encoder|sparse_decoder)_layers", lambda old, s: min(old, s.layers)),
    (r"num_blocks|num_self_attends_per_block", lambda old, s: min(old, s.layers)),
    (r"num_kv_shared_layers", lambda old, s: s.layers // 2 if s.layers >= 4 else 0),
    (r"first_k_dense_replace|num_dense_layers|num_nextn_predict_layers", lambda old, s: 1),
    (r"attn_layer_period|global_attn_every_n_layers|layer_group_size|no_rope_layer_interval", lambda old, s: 2),
    (r"attn_layer_offset", lambda old, s: 1),
    (r"(moe_)?num_(local_)?experts|n_routed_experts", lambda old, s: EXPERTS),
    (r"num_experts_per_tok(en)?|moe_topk|moe_k|moe_top_k|top_k_experts", lambda old, s: min(old, CHOSEN)),
    (r"n_group|num_expert_group|zero_expert_num", lambda old, s: min(old, 2)),
    (r"topk_group", lambda old, s: 1),
    (r".*n_?groups", lambda old, s: min(old, s.kv_heads)),
    (r"(mamba_)?(d_state|state_size)|ssm_state_size", lambda old, s: s.head),
    (r"time_step_rank|mamba_dt_rank", lambda old, s: max(s.hidden // 16, 1)),
    (r"(mamba_)?chunk_size", lambda old, s: min(old, 2 * WINDOW)),
    (r".*(position_embeddings|_positions)|model_max_length|max_seq_len|context_length|n_ctx", lambda old, s: POSITIONS),
    (r"sliding_window(_size)?|attention_window(_size)?|attention_chunk_size|local_attention", lambda old, s: WINDOW),
    (r"(local_|lsh_)attn_chunk_length", lambda old, s: 4),
    (r"num_filters", lambda old, s: 2),
    (r"index_topk|keep_window_size", lambda old, s: WINDOW),
)

# Names whose None the model cannot do without.
NEEDED = ("head_dim", "num_key_value_heads")


def _turns(size: Size, *kinds: str) -> list[str]:
    """Kinds of layers that take turns."""
    return (list(kinds) * size.layers)[: size.layers]


# What no rule can know.
EXCEPTIONS: dict[str, Callable[[Size], dict[str, Any]]] = {
    "bamba": lambda s: {"attn_layer_indices": list(range(1, s.layers, 2))},
    "blt": lambda s: {"use_cache": False},  # the cache asks its config for num_hidden_layers
    "cohere_compass_text": lambda s: {
        "rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}
    },
    "dbrx": lambda s: {"attn_config": {"kv_n_heads": s.kv_heads, "rope_theta": 1e4, "clip_qkv": 8.0}},
    "deepseek_v2": lambda s: {"num_experts_per_tok": CHOSEN},
    "dots1": lambda s: {"n_shared_experts": 1, "n_routed_experts": EXPERTS, "num_experts_per_tok": CHOSEN},
    "dots3_note_text": lambda s: {
        **{f"swa_{name}": s.heads for name in ("num_attention_heads", "num_key_value_heads")},
        **{f"swa_{name}": s.hidden // 2 for name in ("q_lora_rank", "kv_lora_rank")},
        **{"swa_head_dim": s.head, "swa_qk_nope_head_dim": s.head // 2, "swa_v_head_dim": s.head},
    },
    "encoder-decoder": lambda s: {"pad_token_id": 0},
    "esm": lambda s: {"vocab_size": s.vocab, "pad_token_id": 1},
    "esmc": lambda s: {"num_key_value_heads": s.heads},
    "funnel": lambda s: {"block_sizes": (s.layers // 2, s.layers // 2), "block_repeats": [1, 1]},
    "gemma3n_text": lambda s: {"layer_types": _turns(s, "sliding_attention", "full_attention")},  # both in each half
    "gemma4_text": lambda s: {"global_head_dim": 2 * s.head},
    "gemma4_unified_text": lambda s: {"global_head_dim": 2 * s.head},
    "gpt_neo": lambda s: {"attention_types": [[["global", "local"], s.layers // 2]]},
    "granitemoehybrid": lambda s: {"layer_types": _turns(s, "linear_attention", "full_attention")},
    "hrm_text": lambda s: {"num_layers_per_stack": None},  # derived from the number of layers, and changes that
    "lfm2_moe": lambda s: {"layer_types": _turns(s, "conv", "full_attention")},
    "longcat_flash": lambda s: {"head_dim": s.head // 2},
    "mamba2": lambda s: {"head_dim": 2 * s.head},
    "mimo_v2_flash": lambda s: {"num_key_value_heads": s.kv_heads // 2},  # its sliding layers have twice as many
    "qwen4_exp_text": lambda s: {
        **{"indexer_n_heads": s.heads, "indexer_kv_heads": 1, "indexer_head_dim": s.head},
        **{"indexer_budget": WINDOW, "indexer_compress_ratio": 2},
    },
    "recurrent_gemma": lambda s: {"block_types": ("recurrent", "attention")},
    "reformer": lambda s: {"axial_pos_embds": False, "hash_seed": 0},
    "xlstm": lambda s: {"use_cache": False},  # its states' sizes are rounded up to 64, those of its weights are not
    "xmod": lambda s: {"default_language": "en_XX"},
    "zamba": lambda s: {
        **{"layers_block_type": _turns(s, "linear_attention", "hybrid")},
        **{"attention_hidden_size": 2 * s.hidden, "attention_head_dim": 2 * s.head},
    },
}
# What has no language model of its own to run on tokens alone.
REFUSED = {
    "gemma4_assistant": "it reads the keys and values of another model",
    "gemma4_unified_assistant": "it reads the keys and values of another model",
    "git": "its loss needs pixel_values",
    "musicgen": "its decoder reads codes of audio and has a config that no auto class knows",
    "musicgen_melody": "its decoder reads codes of audio and has a config that no auto class knows",
    "voxtral_realtime": "it needs input_features",
}


def families(kind: Kind) -> list[str]:
    """The model types that transformers maps to a model of this kind."""
    return sorted(AUTO[kind][1])


def tiny_config(model_type: str, kind: Kind, size: Size) -> PretrainedConfig:
    """The family's config made small, without dropout. ValueError: it cannot be made, and why."""
    if model_type not in AUTO[kind][1]:
        raise ValueError(f"transformers has no {kind} model of type {model_type!r}")
    if model_type in REFUSED:
        raise ValueError(REFUSED[model_type])
    try:
        config = _shrunk(CONFIG_MAPPING[model_type](), size, {})
    except Exception as error:
        raise ValueError(f"no config: {_line(error)}") from error
    if kind == "causal" and "is_decoder" in vars(config):
        config.is_decoder = True
    if kind == "seq2seq" and getattr(config, "decoder_start_token_id", None) is None:
        config.decoder_start_token_id = 0
    return config


def build(model_type: str, kind: Kind, size: Size, seed: int, *, stirred: bool = True) -> nn.Module:
    """A random model in float32. ValueError: it cannot be made or would be too large, and why.

    `stirred`: random also where transformers starts from all zeros or all ones, since a zero hides what it multiplies.
    """
    config = tiny_config(model_type, kind, size)
    try:
        with torch.device("meta"):
            count = num_parameters(_from_config(config, kind))
    except ImportError as error:
        raise ValueError(_line(error)) from error
    if count > MOST_PARAMETERS:
        raise ValueError(f"{count:,} parameters are more than {MOST_PARAMETERS:,}")
    torch.manual_seed(seed)
    model = _from_config(config, kind)
    if stirred:
        _stir(model)
    return model


def batch(
    model_type: str, kind: Kind, config: PretrainedConfig, seed: int, batch_size: int = 2, seq_length: int = 12
) -> dict[str, Tensor]:
    """Random tokens and labels, none of them special; of masked ones the last row's tail is padding."""
    generator = torch.Generator().manual_seed(seed)
    vocab = vocab_size(config)
    allowed = torch.tensor(sorted(set(range(vocab)) - special_ids(config)))

    def draw() -> Tensor:
        return allowed[torch.randint(len(allowed), (batch_size, seq_length), generator=generator)]

    ids = draw()
    made = {"input_ids": ids, "labels": ids.clone() if kind == "causal" else draw()}
    if kind == "masked":
        made["attention_mask"] = torch.ones_like(ids)
        made["attention_mask"][-1, -max(seq_length // 4, 1) :] = 0
        made["labels"][made["attention_mask"] == 0] = -100
    if model_type == "perceiver":  # it answers for every position that it has
        made["labels"] = nn.functional.pad(made["labels"], (0, config.max_position_embeddings - seq_length), value=-100)
    return made


def num_parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def vocab_size(config: PretrainedConfig) -> int:
    """The smallest vocabulary that its tokens must fit into."""
    sizes = [value for name, value in _numbers(config) if re.fullmatch(r"(src_|tgt_|decoder_)?vocab_size", name)]
    return min(sizes)


def special_ids(config: PretrainedConfig) -> set[int]:
    """Every token id that the config or a config in it names."""
    return {value for name, value in _numbers(config) if _names_tokens(name)}


def _from_config(config: PretrainedConfig, kind: Kind) -> nn.Module:
    return AUTO[kind][0].from_config(config, dtype=torch.float32)


@torch.no_grad()
def _stir(model: nn.Module) -> None:
    """Add a little noise to every parameter whose numbers are all the same."""
    for parameter in model.parameters():
        if parameter.numel() and (parameter == parameter.flatten()[0]).all():
            parameter += 0.05 * torch.randn_like(parameter)


def _shrunk(config: PretrainedConfig, size: Size, ids: dict[int, int]) -> PretrainedConfig:
    """A new config of the same class: what a rule changes is given to its constructor, which derives the rest."""
    changed: dict[str, Any] = {}
    if "kv_lora_rank" in vars(config):  # latent attention has no heads of keys alone
        size = replace(size, kv_heads=size.heads)
    aliases = config.attribute_map or {}
    standard = {name: known for known, name in aliases.items()}
    plain = vars(type(config)())  # a config inside another may have been given more than its class's defaults
    fields = {aliases.get(name, name) for name in config.__dataclass_fields__}
    depth = getattr(config, "num_hidden_layers", None)
    for name, old in vars(config).items():
        if name in fields:
            new = _resized(standard.get(name, name), name, old, size, depth, ids)
            if new is not old or old != plain.get(name):
                changed[name] = new
        if old is None and name in NEEDED:
            changed[name] = _ruled((name,), 1, size)
    changed |= EXCEPTIONS.get(config.model_type, lambda size: {})(size)
    return type(config)(**changed)


def _resized(standard: str, name: str, old: Any, size: Size, depth: int | None, ids: dict[int, int]) -> Any:
    """What an attribute becomes; the very same object where no rule speaks of it."""
    if isinstance(old, PretrainedConfig):
        return _shrunk(old, size, ids)
    if old is None or isinstance(old, bool | str) or old == 0:
        return old
    if isinstance(old, float) and ("drop" in name or "jitter" in name):
        return 0.0
    if _names_tokens(name):
        return _mapped(old, lambda one: one if one < size.vocab else ids.setdefault(one, size.vocab - 1 - len(ids)))
    if name == "rope_parameters":
        return _turned(old, size)
    if isinstance(old, list | tuple):
        return _cut(standard, old, size, depth)
    if isinstance(old, int):
        return _ruled((standard, name), old, size)
    return old


def _ruled(names: tuple[str, ...], old: int, size: Size) -> int:
    for name in names:
        for pattern, rule in RULES:
            if re.fullmatch(pattern, name):
                return rule(old, size)
    return old


def _turned(rope: dict[str, Any], size: Size) -> dict[str, Any]:
    """The same rotation where it turns four of a head's numbers or more, else one that turns just four."""
    if any(isinstance(one, dict) for one in rope.values()):
        made = {kind: _turned(one, size) if isinstance(one, dict) else one for kind, one in rope.items()}
        return rope if all(made[kind] is rope[kind] for kind in rope) else made
    if rope.get("partial_rotary_factor", 1.0) * size.head >= 4 or size.head < 4:
        return rope
    return rope | {"partial_rotary_factor": 4 / size.head}


def _cut(name: str, old: Any, size: Size, depth: int | None) -> Any:
    """A list with an entry a layer, cut to the layers, with every kind of layer in it; or one of layers' numbers."""
    if not all(isinstance(one, int | float | str) for one in old):
        return old
    if re.search(r"_(ids|idxs|indices|indexes|index)$|_layers$", name) and len(old) != depth:
        return type(old)([one for one in old if one < size.layers] or [size.layers - 1][: len(old)])
    if len(old) != depth:
        return old
    resized = [_ruled((name, name), one, size) if type(one) is int else one for one in old]
    kinds = list(dict.fromkeys(resized))
    if set(kinds) - set(resized[: size.layers]):
        resized = kinds * size.layers
    return type(old)(resized[: size.layers])


def _mapped(value: Any, function: Callable[[int], int]) -> Any:
    return type(value)(map(function, value)) if isinstance(value, list | tuple) else function(value)


def _names_tokens(name: str) -> bool:
    return re.search(r"_token_(id|index)$|^(bos|eos|pad|unk|mask)_index$", name) is not None


def _numbers(config: PretrainedConfig) -> Iterator[tuple[str, int]]:
    """Every whole number in a config, in the configs in it and in their lists, with its name."""
    for name, value in vars(config).items():
        if isinstance(value, PretrainedConfig):
            yield from _numbers(value)
        for one in value if isinstance(value, list | tuple) else [value]:
            if type(one) is int:
                yield name, one


def _line(error: BaseException) -> str:
    """An error in one line, without its class where it says anything."""
    return " ".join(str(error).split())[:160] or type(error).__name__


@contextmanager
def _limit(seconds: int) -> Iterator[None]:
    def stop(*_: object) -> None:
        raise TimeoutError(f"took longer than {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def trial(model_type: str, kind: Kind, size: Size) -> dict[str, Any]:
    """Build one family and run it forward and backward: what came of it."""
    row: dict[str, Any] = {"kind": kind, "model_type": model_type, "ok": False, "reason": "", "parameters": 0}
    start = time.perf_counter()
    try:
        with _limit(SECONDS):
            model = build(model_type, kind, size, seed=0)
            row["parameters"] = num_parameters(model)
            loss = model(**batch(model_type, kind, model.config, seed=1)).loss
            loss.backward()
            if not torch.isfinite(loss):
                raise ValueError(f"the loss is {loss.item()}")
        row["ok"] = True
    except Exception as error:
        row["reason"] = f"{type(error).__name__}: {_line(error)}"
    return row | {"seconds": round(time.perf_counter() - start, 2)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kind", choices=get_args(Kind))
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    parser.add_argument("model_types", nargs="*", help="only these families")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    rows = []
    for kind in [options.kind] if options.kind else get_args(Kind):
        for model_type in families(kind):
            if options.model_types and model_type not in options.model_types:
                continue
            rows.append(row := trial(model_type, kind, Size()))
            if not options.json:
                line = f"{kind:8}{model_type:28}{row['parameters']:>12,}  {row['reason'] or 'ok'}"
                print(line, flush=True)
    total, ran = Counter(row["kind"] for row in rows), Counter(row["kind"] for row in rows if row["ok"])
    if options.json:
        print(json.dumps({"rows": rows, "ran": ran, "total": total}, indent=1))
    else:
        for kind in total:
            print(f"{kind}: {ran[kind]} of {total[kind]} run")


if __name__ == "__main__":
    main()
