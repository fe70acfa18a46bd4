"""Plans written by hand, and those that Hugging Face models ship: a pattern of module paths -> how it is to be cut.

What is found needs no such plan. One written by hand overrules it where it keeps layers whole, and is held to its word
where it cuts them: what cannot be proven is refused with the reason, and so is an entry that names nothing. The plan
that a model ships (`tp_plan`, in transformers' style names) is laid beside what was found, and differences are told.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from meshloom.errors import PlanError
from meshloom.hardware.table import parse_toml
from meshloom.parallel.pairs import Discovery
from meshloom.plan import Plan

# What each name asks for: ours, and transformers' for the same. Whether an output is gathered or an input split follows
# from the layers around; it is no style of its own here.
_ASKS = {
    "column": ("column", "colwise", "colwise_rep", "colwise_gather_output", "packed_colwise"),
    "row": ("row", "rowwise", "rowwise_rep", "rowwise_split_input", "packed_rowwise"),
    "vocabulary": ("vocabulary", "embedding_rowwise"),
    "whole": ("whole", "replicate", "replicated_with_grad_allreduce", "mla_kv_a_proj", "all_reduce",
              "embedding_colwise", "sequence_parallel"),
    "experts": ("moe_tp_experts", "moe_identity_expert", "grouped_gemm", "ep_router", "ep_dispatch_experts",
                "local_params"),
}  # fmt: skip
STYLE_NAMES: dict[str, str] = {name: asked for asked, names in _ASKS.items() for name in names}
_GIVES = {"column": ("column", "vocabulary"), "row": ("row",), "vocabulary": ("vocabulary",)}


def read_styles(path: Path) -> dict[str, str]:
    """The `[styles]` table of a TOML file: pattern -> style, such as `"layers.*.mlp.up_proj" = "column"`.

    Raises PlanError if the file is no such table or holds an unknown style.
    """
    try:
        table = parse_toml(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        told = error.strerror if isinstance(error, OSError) else error
        raise PlanError(f"{path}: expected a TOML file with a table [styles], got '{told}'") from error
    styles = table.get("styles")
    if not isinstance(styles, dict) or not all(isinstance(style, str) for style in styles.values()) or len(table) > 1:
        raise PlanError(f'{path}: expected one table [styles] of lines like "layers.*.mlp.up_proj" = "column"')
    check_names(styles)
    return styles


def check_names(styles: Mapping[str, str]) -> None:
    """Raises PlanError if a style is none of `STYLE_NAMES`."""
    for pattern, style in styles.items():
        if style not in STYLE_NAMES:
            known = ", ".join(("column", "row", "vocabulary", "whole"))
            raise PlanError(f"styles: {pattern!r} has the unknown style {style!r}; use {known}, or transformers' names")


def matching(pattern: str, paths: Iterable[str]) -> list[str]:
    """The paths that a pattern names: `*` stands for one name, and the path may begin before it."""
    matches = re.compile(r"(?:.*\.)?" + "[^.]+".join(map(re.escape, pattern.split("*"))))
    return [path for path in paths if matches.fullmatch(path)]


def apply_styles(model: nn.Module, found: Discovery, styles: Mapping[str, str], plan: Plan) -> Discovery:
    """What was found, held to a plan written by hand; what no entry names stays as found.

    Raises PlanError naming the entry that matches no module, or that asks for a cut which was not found possible.
    """
    check_names(styles)
    modules = [path for path, _ in model.named_modules() if path]
    whole: dict[str, str] = {}
    for pattern, style in styles.items():
        paths = matching(pattern, modules)
        if not paths and not matching(pattern, (name for name, _ in model.named_parameters())):
            raise PlanError(f"plan {plan}: styles: {pattern!r} matches no module of {type(model).__name__}; remove it")
        if STYLE_NAMES[style] == "whole":
            whole |= dict.fromkeys(paths, f"{pattern!r} is written {style}")
            continue
        for path in paths or [pattern]:
            _hold(found, pattern, style, path, plan)
    pairs = [pair for pair in found.pairs if not whole.keys() & {*pair.columns, *pair.rows}]
    why = {
        column: next(whole[path] for path in (*pair.columns, *pair.rows) if path in whole)
        for pair in found.pairs
        if pair not in pairs
        for column in pair.columns
    }
    found = found.only(pairs, why)
    vocabulary = found.vocabulary
    if vocabulary is not None and (said := whole.keys() & {*vocabulary.embeddings, *vocabulary.heads}):
        kept = dict.fromkeys((*vocabulary.embeddings, *vocabulary.heads), whole[min(said)])
        vocabulary = replace(vocabulary, embeddings={}, heads={}, kept={**vocabulary.kept, **kept})
    return replace(found, vocabulary=vocabulary)


def _hold(found: Discovery, pattern: str, style: str, path: str, plan: Plan) -> None:
    """Raises PlanError if what was found does not cut the layer as it is written."""
    styles, kept = styles_found(found)
    asked = STYLE_NAMES[style]
    if styles.get(path) in _GIVES.get(asked, ()):
        return
    if path in styles:
        why = f"it is cut by {styles[path]}"
    else:
        why = kept.get(path, "expert weights are kept whole" if asked == "experts" else "it is no linear layer")
    raise PlanError(
        f"plan {plan}: styles: {pattern!r} asks to cut {path} ({style}), but {why}; write whole or remove it"
    )


def styles_found(found: Discovery) -> tuple[dict[str, str], dict[str, str]]:
    """The style of each layer that is cut, and the reason of each that is whole."""
    styles: dict[str, str] = {}
    kept = dict(found.kept)
    for pair in found.pairs:
        styles |= {**dict.fromkeys(pair.columns, "column"), **dict.fromkeys(pair.rows, "row")}
    if found.vocabulary is not None:
        kept |= found.vocabulary.kept
        styles |= dict.fromkeys((*found.vocabulary.embeddings, *found.vocabulary.heads), "vocabulary")
    return styles, {path: why for path, why in kept.items() if path not in styles}


def shipped_styles(model: nn.Module) -> dict[str, str]:
    """The plan that the model ships, empty if it has none."""
    shipped: Any = getattr(model, "tp_plan", None)
    return dict(shipped) if isinstance(shipped, Mapping) else {}


def differences(model: nn.Module, found: Discovery) -> tuple[int, dict[str, str]]:
    """How many entries of the shipped plan do as was found, and what each of the others is here instead."""
    styles, kept = styles_found(found)
    names = [path for path, _ in model.named_modules() if path]
    parameters = [name for name, _ in model.named_parameters()]
    agree, differ = 0, {}
    for pattern, style in shipped_styles(model).items():
        asked = STYLE_NAMES.get(style, style)
        paths = matching(pattern, names) or matching(pattern, parameters)
        other = [path for path in paths if not (styles.get(path) in _GIVES.get(asked, ()) or
                                                (asked == "whole" and path not in styles))]  # fmt: skip
        if other:
            here = f"cut by {styles[other[0]]}" if other[0] in styles else "whole"
            why = kept.get(
                other[0], "expert weights are kept whole" if other[0] in parameters or asked == "experts" else ""
            )
            differ[pattern] = f"{style} there, {here} here{f': {why}' if why else ''}"
        elif paths:
            agree += 1
    return agree, differ
