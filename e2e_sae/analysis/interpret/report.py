"""What came of each latent, and the files that say so: lines, tables, the figure, and a summary for readers."""

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from e2e_sae.analysis.interpret.compare import differences, draw_violins, mean_scores, table_4
from e2e_sae.analysis.interpret.examples import LatentExamples
from e2e_sae.analysis.interpret.questions import marked, strong_tokens
from e2e_sae.analysis.interpret.scores import Score
from e2e_sae.analysis.produce import save_figure, write_table
from e2e_sae.analysis.texts import as_latex, as_markdown
from e2e_sae.checkpoint.files import write_text

Status = Literal["explained", "no answer", "not active"]
"""`no answer`: none that could be read. `not active`: in one half of the data, so that it cannot be explained or
tested."""
N_CONTEXTS_SHOWN = 3
"""Contexts of a latent beside its explanation."""
N_LATENTS_SHOWN = 5
"""Latents of each SAE in the summary, from either end of the order by score."""


class StudiedLatent(NamedTuple):
    """One latent of one SAE under study."""

    sae: dict[str, Any]
    """The SAE's columns in the results: `label`, unique among them, and what it is."""
    examples: LatentExamples


class Interpretation(NamedTuple):
    """What came of one latent."""

    studied: StudiedLatent
    status: Status
    explanation: str | None
    scores: list[Score]


def write_results(found: Sequence[Interpretation], explainer: str, scored_by: str, out: Path, seed: int) -> list[Path]:
    """Writes the results and returns the files.

    Args:
        found: one for each latent.
        explainer: what explained them.
        scored_by: what scored them.
        out: folder.
        seed: of the bootstrap.
    """
    files = [out / "explanations.jsonl"]
    write_text(files[0], "".join(_line(one, explainer) for one in found))
    scores = scores_table(found, explainer, scored_by)
    files.append(write_table(scores, out / "scores.csv"))
    parts = [f"# Latents explained by {explainer}, scored by {scored_by}\n", _counts(found)]
    if not scores.empty:
        means = mean_scores(scores)
        parts += ["## Mean scores, with their 95 % intervals\n", as_markdown(means, {})]
        files += save_figure(draw_violins, scores, out / "scores")
        parts.append("![Scores of latents](scores.png)\n")
        if scores["label"].nunique() > 1:
            compared = differences(scores, seed)
            shown = table_4(compared)
            files.append(write_table(compared, out / "differences.csv"))
            for suffix, text in (("md", as_markdown), ("tex", as_latex)):
                files.append(out / f"differences.{suffix}")
                write_text(files[-1], text(shown, {"mean": 2}))
            parts += ["## Differences of mean scores\n", as_markdown(shown, {"mean": 2})]
        parts.append(_latents_at_both_ends(found))
    files.append(out / "summary.md")
    write_text(files[-1], "\n".join(parts))
    return files


def scores_table(found: Sequence[Interpretation], explainer: str, scored_by: str) -> Any:
    """Returns the table of scores (pandas), one row for each latent and score."""
    import pandas as pd

    return pd.DataFrame(
        [
            {**one.studied.sae, "latent": one.studied.examples.latent}
            | {"explainer": explainer, "scored_by": scored_by, **score._asdict()}
            for one in found
            for score in one.scores
        ]
    )


def _line(one: Interpretation, explainer: str) -> str:
    examples = one.studied.examples
    contexts = [marked(context, strong_tokens(context)) for context in examples.top[:N_CONTEXTS_SHOWN]]
    values = {**one.studied.sae, "latent": examples.latent, "explainer": explainer, "status": one.status}
    return json.dumps({**values, "explanation": one.explanation, "contexts": contexts}, ensure_ascii=False) + "\n"


def _counts(found: Sequence[Interpretation]) -> str:
    """Returns how many latents of each SAE were explained, as Markdown."""
    import pandas as pd

    counts: dict[str, Counter[str]] = {}
    for one in found:
        counts.setdefault(one.studied.sae["label"], Counter())[one.status] += 1
    statuses: tuple[Status, ...] = ("explained", "no answer", "not active")
    rows = [{"label": label, **{status: of[status] for status in statuses}} for label, of in counts.items()]
    return as_markdown(pd.DataFrame(rows), {})


def _latents_at_both_ends(found: Sequence[Interpretation]) -> str:
    """Returns, as Markdown, the latents of each SAE whose first score is the highest and the lowest."""
    import pandas as pd

    parts: list[str] = []
    for label in dict.fromkeys(one.studied.sae["label"] for one in found):
        scored = [one for one in found if one.studied.sae["label"] == label and one.scores]
        scored = [one for one in scored if one.scores[0].score == one.scores[0].score]
        scored.sort(key=lambda one: -one.scores[0].score)
        ends = scored[:N_LATENTS_SHOWN] + scored[max(N_LATENTS_SHOWN, len(scored) - N_LATENTS_SHOWN) :]
        if not ends:
            continue
        first = ends[0].scores[0]
        rows = [
            {"latent": one.studied.examples.latent}
            | {first.measure: round(one.scores[0].score, 2), "explanation": one.explanation}
            for one in ends
        ]
        parts.append(f"## {label}: best and worst by {first.scorer}\n\n" + as_markdown(pd.DataFrame(rows), {}))
    return "\n".join(parts)
