"""Shipped configs: a TOML file a family in `presets`, Hugging Face's field names, what all sizes share under [shared].

`tokenizer` is no field of the config: it names the tokenizer that goes with it. No torch, no transformers.
"""

from __future__ import annotations

import sys
from difflib import get_close_matches
from importlib import resources
from typing import Any

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

_SHARED, _TOKENIZER = "shared", "tokenizer"


def presets() -> dict[str, dict[str, Any]]:
    """The shipped configs by name, with `tokenizer` among their fields where one goes with them."""
    found: dict[str, dict[str, Any]] = {}
    for file in sorted((resources.files("meshloom.model") / "presets").iterdir(), key=lambda item: item.name):
        if file.name.endswith(".toml"):
            family = tomllib.loads(file.read_text(encoding="utf-8"))
            shared = family.pop(_SHARED, {})
            found |= {name: {**shared, **fields} for name, fields in family.items()}
    return found


def preset_config(name: str) -> dict[str, Any] | None:
    """The fields of the config of a preset, None if there is none of that name."""
    fields = presets().get(name)
    return None if fields is None else {key: value for key, value in fields.items() if key != _TOKENIZER}


def preset_tokenizer(name: str) -> str | None:
    """The folder, hub id or `bytes` that a preset's tokenizer is, None where it has none."""
    told = presets().get(name, {}).get(_TOKENIZER)
    return None if told is None else str(told)


def expected_model(name: str) -> str:
    """What a model may be given as, in words; of the presets those closest to `name`, all if none is close."""
    names = list(presets())
    near = get_close_matches(name.lower(), names, n=3, cutoff=0.6)
    told = f"closest: {', '.join(near)}" if near else ", ".join(names)
    return f"expected a preset ({told}), a config.json, a folder that holds one, or a hub id"
