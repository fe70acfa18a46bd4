"""Find a model's config, and a tokenizer: by preset, file, folder or hub id. Configs are HF's own objects."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from tokenizers import AddedToken, Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerFast
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_FOR_MASKED_LM_MAPPING_NAMES
from transformers.utils import logging as transformers_logging

from meshloom.errors import DataError, ModelError, OfflineError, UsageError
from meshloom.model.hub import hub_answers, only_local
from meshloom.model.preset import expected_model, preset_config, preset_tokenizer

Objective = Literal["causal", "masked"]
Attention = Literal["sdpa", "eager", "flash"]

SPECIAL = {
    "eos_token": "<|endoftext|>",
    "pad_token": "[PAD]",
    "cls_token": "[CLS]",
    "sep_token": "[SEP]",
    "mask_token": "[MASK]",
    "unk_token": "[UNK]",
}


def load_config(model: str) -> Any:
    """The HF config of a preset, a config.json, a folder that holds one, or a hub id.

    Raises ModelError, OfflineError.
    """
    fields = preset_config(model)
    if fields is not None:
        return _from_table(fields, model)
    path = Path(model)
    if path.is_dir() and not (path / "config.json").is_file():
        raise ModelError(f"{model}: expected a folder with config.json, found none there")
    if path.is_dir() or path.suffix == ".json":
        file = path / "config.json" if path.is_dir() else path
        try:
            text = file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ModelError(f"{file}: expected a model's config.json, got '{error}'") from error
        return _from_json(text, str(file))
    if "/" in model and (path.parent.is_dir() or model.startswith((".", "/"))):
        raise ModelError(f"{model}: expected a folder with config.json, a config.json or a hub id; no such path")
    with suppress(OSError, ValueError), only_local():
        return AutoConfig.from_pretrained(model, local_files_only=True)
    with hub(f"model {model!r}: {expected_model(model)}", ModelError):
        return AutoConfig.from_pretrained(model)


def _from_json(text: str, where: str) -> Any:
    try:
        table = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{where}: expected JSON, got '{error}'") from error
    if not isinstance(table, dict) or not isinstance(table.get("model_type"), str):
        raise ModelError(f"{where}: expected an HF config, a JSON object with a model_type")
    return _from_table(table, where)


def _from_table(table: dict[str, Any], where: str) -> Any:
    try:
        return AutoConfig.for_model(**table)
    except Exception as error:  # transformers validates with errors of many kinds; all mean: not a config
        raise ModelError(f"{where}: transformers cannot read this config: {_said(error)}") from error


def _said(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def objective_of(config: Any) -> Objective:
    """What the model is trained for: masked if its architecture says so or it has no causal head; raises ModelError."""
    masked = config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES
    causal = config.model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    architectures = getattr(config, "architectures", None) or []
    if masked and (not causal or any(name.endswith(("ForMaskedLM", "ForPreTraining")) for name in architectures)):
        return "masked"
    if causal:
        return "causal"
    raise ModelError(f"model type {config.model_type!r}: expected a causal or masked language model")


def choose_attention(config: Any, attention: Attention) -> None:
    """Let models built from `config` compute attention so; raises UsageError where that cannot be here.

    sdpa is torch's own, which takes flash kernels where a GPU has them; eager is plain products; flash is the package
    flash-attn, which also handles padding without computing on it.
    """
    if attention == "flash" and find_spec("flash_attn") is None:
        raise UsageError(
            "--attention flash: expected the package flash-attn (and an NVIDIA GPU), which is not here; "
            "sdpa takes torch's own flash kernels where there are any"
        )
    config._attn_implementation = {"flash": "flash_attention_2"}.get(attention, attention)


def eos_ids(model: str, config: Any, tokenizer: Any = None) -> frozenset[int]:
    """The tokens that end a text: those of the folder's generation_config.json, else the config's or tokenizer's."""
    file = Path(model) / "generation_config.json"
    given = None
    if file.is_file():
        try:
            given = json.loads(file.read_text(encoding="utf-8")).get("eos_token_id")
        except (OSError, ValueError, AttributeError, RecursionError) as error:
            raise ModelError(f"{file}: expected a JSON object, got '{error}'") from error
    if given is None:
        given = getattr(config, "eos_token_id", None)
    if given is None:
        given = getattr(tokenizer, "eos_token_id", None)
    found = given if isinstance(given, list) else [given]
    return frozenset(token for token in found if isinstance(token, int) and 0 <= token < config.vocab_size)


def load_tokenizer(tokenizer: str, *, download: bool = True) -> Any:
    """The HF tokenizer of a folder, hub id or preset, or the built-in `bytes`; raises DataError, OfflineError.

    Without `download` one that is not on this host yet raises OfflineError.
    """
    if preset_config(tokenizer) is not None and not Path(tokenizer).exists():
        known = preset_tokenizer(tokenizer)
        if known is None:
            raise DataError(
                f"{tokenizer} has no tokenizer of its own: expected --tokenizer with a folder, which "
                "`meshloom tokenizer train` makes, a hub id, or 'bytes'"
            )
        tokenizer = known
    if tokenizer == "bytes":
        return _byte_tokenizer()
    path = Path(tokenizer)
    if path.exists() or tokenizer.startswith((".", "/")):
        try:
            with only_local():
                return AutoTokenizer.from_pretrained(tokenizer)
        except Exception as error:  # a broken tokenizer folder fails in many ways
            raise DataError(
                f"tokenizer {tokenizer}: expected a folder with a tokenizer, got '{_said(error)}'"
            ) from error
    with suppress(OSError, ValueError), only_local():
        return AutoTokenizer.from_pretrained(tokenizer, local_files_only=True)
    if not download:
        raise OfflineError(f"tokenizer {tokenizer!r}: it is not on this host yet")
    with hub(f"tokenizer {tokenizer!r}: expected a folder, a hub id, or 'bytes'", DataError):
        return AutoTokenizer.from_pretrained(tokenizer)


def _byte_tokenizer() -> Any:
    """One token a byte of UTF-8, and the special tokens: needs no files, knows every language."""
    alphabet = sorted(ByteLevel.alphabet())
    tokenizer = Tokenizer(BPE(vocab={letter: index for index, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    tokenizer.decoder = ByteLevelDecoder()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL.values()])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **SPECIAL)


@contextmanager
def hub(expected: str, kind: type[ModelError] | type[DataError]) -> Iterator[None]:
    """Within this, transformers may ask the hub; its failures become one line."""
    if not hub_answers():
        raise OfflineError(f"{expected}; the hub cannot be reached, and nothing of that name is cached")
    level = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        yield
    except (OSError, ValueError, RuntimeError) as error:
        text = str(error)
        unreachable = ("connect", "offline", "Max retries", "resolve", "timed out", "client has been closed")
        if any(word in text for word in unreachable):
            raise OfflineError(f"{expected}; the hub cannot be reached, and nothing of that name is cached") from error
        raise kind(f"{expected}; the hub says: {text.splitlines()[0]}") from error
    finally:
        transformers_logging.set_verbosity(level)
