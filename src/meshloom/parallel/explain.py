"""The story of how a model is cut: a decision for every linear layer, with its reason."""

from __future__ import annotations

from dataclasses import dataclass

from meshloom.parallel.embeddings import Vocabulary
from meshloom.parallel.pairs import Discovery, Pair


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """What becomes of one linear layer, and why: style is column, row or whole."""

    module: str
    style: str
    reason: str


def explain(found: Discovery, degree: int = 1) -> list[Decision]:
    """One decision a linear layer; with the `degree` also what each rank holds, where that differs."""
    decisions = []
    for pair in found.pairs:
        reason = pair.reason + _uneven(pair, degree)
        decisions += [Decision(module=path, style="column", reason=reason) for path in pair.columns]
        decisions += [Decision(module=path, style="row", reason=reason) for path in pair.rows]
    kept = dict(found.kept)
    if found.vocabulary is not None:
        kept |= found.vocabulary.kept
        for path in (*found.vocabulary.embeddings, *found.vocabulary.heads):
            kept.pop(path, None)
            decisions.append(Decision(module=path, style="vocabulary", reason=_why_rows(found.vocabulary, path)))
    return decisions + [Decision(module=path, style="whole", reason=why) for path, why in kept.items()]


def _why_rows(vocabulary: Vocabulary, path: str) -> str:
    if path in vocabulary.embeddings:
        return f"each of its {vocabulary.embeddings[path]} rows serves one token; the ranks' rows are summed"
    served = f"each of its {vocabulary.heads[path]} outputs serves one token"
    if vocabulary.gathered_for:
        return f"{served}; gathered for {vocabulary.gathered_for[0]}"
    return f"{served}; they stay cut until the loss"


def _uneven(pair: Pair, degree: int) -> str:
    share = pair.share(degree)
    held = [share.held(index, degree) for index in range(degree)]
    if len(set(held)) == 1:
        return ""
    what = "heads" if pair.num_units < pair.width else "features"
    return f"; of {share.num_units} {what} the ranks hold {', '.join(map(str, held))}"
