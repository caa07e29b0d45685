"""Subject-verb agreement through an SAE: what is kept, and by how few latents (arXiv 2405.12241, table 7, fig. 24).

Sentences: `agreement_sentences.py`. With z the logits at the last token, and means over the sentences of a template,

    m = mean of z[correct] - z[wrong],        right: the share of sentences with z[correct] > z[wrong]

m(model): the clean model; m(k): an SAE spliced in, of whose latents k are as they are, and all others mean-ablated: set
to their means over the template's sentences, each position with its own mean. The k are those with the largest
|effect|, to first order what ablating the latent alone, at all positions, does to m:

    effect_j = mean over sentences of sum over positions of (mean_j - latent_j) d(z[correct] - z[wrong]) / d latent_j

(the paper ablates every latent in turn; this takes one backward pass instead). What the SAE misses stays out.

    faithfulness   = (m(k) - m(0)) / (m(model) - m(0))          the paper's formula
    share_of_model = m(k) / m(model)                            what its code computes

Table 7 is the last line of each SAE and template (`is_all`): all latents as they are, that is the SAE spliced in. A
model that is right no more often than by chance (half of the time, within two standard errors) has nothing to keep, and
its ratios mean nothing: its cells of the table for readers stay empty, and figures show such templates only where
there are no others.
"""

import hashlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from e2e_sae.acts import Output, Pass, Position, TokenBatch
from e2e_sae.analysis.agreement_sentences import TEMPLATES, Sentences, agreement_sentences
from e2e_sae.analysis.compared import KEYS, Group, compared_groups, opened
from e2e_sae.analysis.item import Analysis, Figure, NotApplicable
from e2e_sae.analysis.looks import for_readers, grid, legend_below, line_panels, lines_of, n_columns, panels_of
from e2e_sae.analysis.study import Study
from e2e_sae.errors import UserError
from e2e_sae.log import logger
from e2e_sae.models.runner import apply_sae, run_changed, run_clean
from e2e_sae.models.tokenizers import require_tokenizer
from e2e_sae.progress import progress_bar
from e2e_sae.saes import SAE

N_KEPT = (0, 1, 2, 3, 5, 7, 10, 15, 20, 30, 50, 70, 100, 150, 200, 300, 500)
"""Numbers of latents kept (the paper: 0 to 99, then every fifth to 495)."""
LATENTS_AT_ONCE = 2**25
"""Sentences are run together as long as their latents are no more than so many: 128 MB in float32."""


class Scores(NamedTuple):
    """Logit differences of one SAE on the sentences of one template."""

    n_kept: Float[Tensor, " k"]
    """Latents left as they are; the last number is that of all that vary over the sentences."""
    kept: Float[Tensor, "k n"]
    """z[correct] - z[wrong] with so many, of each sentence."""
    model: Float[Tensor, " n"]
    """The same of the clean model."""
    effects: Float[Tensor, " d_sae"]
    """First-order effect of ablating each latent alone, on the mean over sentences."""


def differences(output: Output, sentences: Sentences) -> Float[Tensor, " n"]:
    """Returns z[correct] - z[wrong] at the last token of each sentence."""
    n, n_pos = sentences.tokens.shape
    last = torch.arange(n, device=output.hidden.device) * n_pos + n_pos - 1
    logits = output.at(last).logits[0]
    correct, wrong = (logits.gather(1, ids[:, None])[:, 0] for ids in (sentences.correct, sentences.wrong))
    return correct - wrong


class _Chunk:
    """Some sentences, their clean pass, and the model with changed latents on them."""

    def __init__(self, lm: nn.Module, sae: SAE, point: str, sentences: Sentences):
        self._lm, self._sae, self.sentences = lm, sae, sentences
        self._position = Position(point, point)
        batch = TokenBatch.of(sentences.tokens)
        self._clean: Pass = run_clean(lm, batch, [point], reuse=[[self._position]])
        assert self._clean.output is not None
        self.model = differences(self._clean.output, sentences)

    def latents(self) -> Float[Tensor, "n pos ... d_sae"]:
        """Returns the latents of the clean activations."""
        with torch.no_grad():
            return apply_sae(self._sae, self._clean.at(self._position.name)).latents

    def with_latents(self, latents: Float[Tensor, "n pos ... d_sae"]) -> Float[Tensor, " n"]:
        """Returns the logit differences with what the SAE makes of these latents in its place."""

        def replace(activation: Tensor) -> Tensor:
            x = activation.to(self._sae.dtype)
            return (self._sae.decode(latents) + self._sae.skipped(x)).to(activation.dtype)

        return differences(run_changed(self._lm, self._clean, [(self._position, replace)]), self.sentences)


def agreement_scores(lm: nn.Module, sae: SAE, point: str, sentences: Sentences) -> Scores:
    """Returns what an SAE keeps of the agreement in sentences of one template.

    Args:
        lm: the language model.
        sae: spliced in alone.
        point: its hook point.
        sentences: on the model's device.
    """
    n_at_once = max(1, LATENTS_AT_ONCE // (sentences.tokens.shape[1] * sae.d_sae))
    chunks = [_Chunk(lm, sae, point, part) for part in sentences.split(n_at_once)]
    mean, varies = _means(chunks)
    effects = sum((_effects(chunk, mean) for chunk in chunks), torch.zeros(sae.d_sae, device=mean.device))
    order = torch.where(varies, effects.abs(), -1.0).argsort(descending=True)
    n_varying = int(varies.sum())
    n_kept = [n for n in N_KEPT if n < n_varying] + [n_varying]
    rank = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
    kept: list[Tensor] = []
    with torch.no_grad():
        for chunk in chunks:
            latents = chunk.latents()
            kept.append(torch.stack([chunk.with_latents(torch.where(rank < n, latents, mean)) for n in n_kept]))
    model = torch.cat([chunk.model for chunk in chunks])
    return Scores(torch.tensor(n_kept).double(), torch.cat(kept, 1), model, effects / len(model))


def _means(chunks: list[_Chunk]) -> tuple[Float[Tensor, "pos ... d_sae"], Bool[Tensor, " d_sae"]]:
    """Returns the latents' means over sentences, and which of them are not the same in all sentences."""
    total, low, high, n = torch.zeros(0), torch.zeros(0), torch.zeros(0), 0
    for chunk in chunks:
        latents = chunk.latents()
        own = latents.sum(0), latents.amin(0), latents.amax(0)
        total, low, high = (total + own[0], low.minimum(own[1]), high.maximum(own[2])) if n else own
        n += len(latents)
    return total / n, (high > low).flatten(0, -2).any(0)


def _effects(chunk: _Chunk, mean: Float[Tensor, "pos ... d_sae"]) -> Float[Tensor, " d_sae"]:
    """Returns the first-order effects of ablating each latent alone, summed over sentences."""
    latents = chunk.latents().requires_grad_()
    with torch.enable_grad():
        total = chunk.with_latents(latents).sum()
    (slope,) = torch.autograd.grad(total, latents)
    return ((mean - latents.detach()) * slope).flatten(0, -2).sum(0)


def agreement_table(study: Study) -> Any:
    """Returns a line for every SAE, template and number of latents kept.

    Raises:
        NotApplicable: no language model's tokenizer has the words.
    """
    import pandas as pd

    parts: list[Any] = []
    reasons: list[str] = []
    for group in compared_groups(study):
        lm = study.lm(study.stored(group.run_id))
        try:
            by_template = agreement_sentences(require_tokenizer(lm), seed=study.seed)
        except (NotApplicable, UserError) as reason:
            reasons.append(f"{group.model_name}: {reason}")
            continue
        found = _cached_scores(study, group, lm, by_template)
        for n, sae in enumerate(group.saes):
            for template, sentences in by_template.items():
                scores = Scores(*(found[f"{n}/{template}/{name}"] for name in Scores._fields))
                parts.append(_lines(scores, sentences).assign(**sae.keys, template=template))
    if not parts:
        raise NotApplicable("; ".join(dict.fromkeys(reasons)))
    for reason in dict.fromkeys(reasons):
        logger.info(f"agreement: left out, {reason}")
    first = [*KEYS, "template"]
    table = pd.concat(parts, ignore_index=True)
    return table[[*first, *(name for name in table.columns if name not in first)]]


def _cached_scores(
    study: Study, group: Group, lm: nn.Module, by_template: Mapping[str, Sentences]
) -> dict[str, Tensor]:
    def compute() -> dict[str, Tensor]:
        device = next(lm.parameters()).device
        saes = opened(study, group)
        found: dict[str, Tensor] = {}
        for n, sae in enumerate(progress_bar(saes, desc="agreement", inner=True)):
            for template, sentences in by_template.items():
                scores = agreement_scores(lm, sae, group.saes[n].point, sentences.to(device))
                found.update({f"{n}/{template}/{name}": value for name, value in scores._asdict().items()})
        return found

    digest = hashlib.sha256()
    for sentences in by_template.values():
        for ids in (sentences.tokens, sentences.correct, sentences.wrong):
            digest.update(ids.numpy().tobytes())
    return study.cached("agreement", {**group.facts, "data": None, "sentences": digest.hexdigest()}, compute)


def _lines(scores: Scores, sentences: Sentences) -> Any:
    import pandas as pd

    kept, model = scores.kept.double().mean(1), float(scores.model.double().mean())
    return pd.DataFrame(
        {
            "example": sentences.example,
            "n_sentences": len(scores.model),
            "model_difference": model,
            "model_right": float((scores.model > 0).double().mean()),
            "n_kept": scores.n_kept.long(),
            "is_all": [*[False] * (len(kept) - 1), True],
            "difference": kept,
            "right": (scores.kept > 0).double().mean(1),
            "faithfulness": (kept - kept[0]) / (model - kept[0]),
            "share_of_model": kept / model,
        }
    )


def text(table: Any) -> Any:
    """Returns table 7: what share of the model's logit difference is kept with the SAE in, and how often the verb is
    right; the first line of each hook point is the model itself."""
    import pandas as pd

    rows: list[dict[str, Any]] = []
    several = table["model_name"].nunique() > 1
    for _, part in panels_of(table[table["is_all"]]):
        clean = {**part.iloc[0], "label": "(the model itself)"}
        of_model = part.drop_duplicates("template")
        model = of_model.assign(share_of_model=1.0, right=of_model["model_right"])
        rows.append({**for_readers(clean, several), **_cells(model)})
        for keys, lines in part.groupby(list(KEYS), sort=False):
            rows.append({**for_readers(dict(zip(KEYS, keys, strict=True)), several), **_cells(lines)})
    return pd.DataFrame(rows)


def _cells(lines: Any) -> dict[str, float]:
    cells: dict[str, float] = {}
    for line in lines.to_dict("records"):
        kept = line["share_of_model"] if can_agree(line["model_right"], line["n_sentences"]) else float("nan")
        cells[f"{line['template']}: kept (%)"] = 100 * kept
        cells[f"{line['template']}: right (%)"] = 100 * line["right"]
    return cells


def can_agree(right: float, n_sentences: int) -> bool:
    """Returns whether a model is right more often than by chance: over a half by two standard errors."""
    return right > 0.5 + 2 * 0.5 / n_sentences**0.5


def draw_faithfulness(table: Any) -> Any:
    """Draws faithfulness by latents kept, as the paper defines it (fig. 24)."""
    return _by_kept(table, "faithfulness", "faithfulness, (m(k) - m(0)) / (m(model) - m(0))")


def draw_shares(table: Any) -> Any:
    """Draws the share of the model's difference by latents kept, as the paper's code defines faithfulness."""
    return _by_kept(table, "share_of_model", "share of the model's difference, m(k) / m(model)")


def _by_kept(table: Any, column: str, ylabel: str) -> Any:
    able = table[[can_agree(right, n) for right, n in zip(table["model_right"], table["n_sentences"], strict=True)]]
    table = able if len(able) else table
    panels = [
        (f"{title}, {template}\n{_ability(part.iloc[0])}", part)
        for title, here in line_panels(table)
        for template, part in here.groupby("template", sort=False)
    ]
    n_templates = table["template"].nunique()
    figure, axes = grid(len(panels), n_templates if n_templates > 1 else n_columns(len(panels)), 4.2, 3.4)
    for (title, part), ax in zip(panels, axes, strict=True):
        ax.axhline(1, color="black", linewidth=0.8, linestyle="--", label="the model itself")
        for line, look in lines_of(table, part):
            ax.plot(line["n_kept"], line[column], marker="o", markersize=3, **look)
        ax.set_xscale("symlog", linthresh=1)
        ax.set_xlim(left=0)
        ax.set_xlabel("latents kept (the others mean-ablated)")
        ax.set_title(title, fontsize="medium")
    figure.supylabel(ylabel, fontsize="medium")
    legend_below(figure, axes)
    return figure


def _ability(line: Any) -> str:
    able = can_agree(line["model_right"], line["n_sentences"])
    return f"model right in {100 * line['model_right']:.0f} %{'' if able else ': no better than chance'}"


ANALYSES = (
    Analysis(
        "agreement",
        "subject-verb agreement: what is kept with an SAE in, and with few of its latents (table 7, fig. 24)",
        agreement_table,
        [Figure("agreement_faithfulness", draw_faithfulness), Figure("agreement_shares", draw_shares)],
        text,
        {f"{template}: {name} (%)": 1 for template in TEMPLATES for name in ("kept", "right")},
    ),
)
