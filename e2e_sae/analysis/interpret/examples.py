"""Contexts in which latents are active, and some in which they are not: to explain them by, and to test that on.

Evaluation rows are cut into contexts that do not overlap. Rows with an even number are for explaining, the others are
held out for testing:

    top         explaining: the contexts with the greatest activation, greatest first
    activating  held out: of the contexts where the latent is active, one from each of equally many, by activation
    silent      held out: contexts drawn from those where it is never active

`activating` is taken from a uniform sample of `N_SAMPLED` contexts. An activation is its size. Memory does not grow
with the data: per latent there are so many contexts and one number for each token of the vocabulary.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from e2e_sae.acts import Position
from e2e_sae.analysis.activities import data_key
from e2e_sae.analysis.feature_data import latents_of, per_token, random_keys
from e2e_sae.analysis.study import Study
from e2e_sae.errors import UserError
from e2e_sae.models.lm import model_facts
from e2e_sae.models.runner import run_clean
from e2e_sae.models.tokenizers import require_tokenizer
from e2e_sae.saes import SAE, in_eval_mode
from e2e_sae.seeds import seed_for

N_SAMPLED = 200
"""Held-out contexts per latent that quantiles are taken of."""
MIN_CONTEXTS = 10
"""A latent that is drawn at random is active in so many contexts of either half: the paper asks for 20 in all."""
N_TOKENS_NAMED = 10
"""Tokens of the token statistics."""
PRIOR_TOKENS = 5.0
"""Weight of a latent's mean over all tokens in its mean over one token, in tokens: a token that was seen once does not
come first by chance."""
_MAX_LATENTS_AT_ONCE = 2**27
"""Numbers: 512 MB of latents."""


class Context(NamedTuple):
    """A piece of text, and a latent on it."""

    texts: tuple[str, ...]
    """Its tokens."""
    ids: tuple[int, ...]
    """Their ids."""
    acts: tuple[float, ...]
    """The latent's activation on each."""

    @property
    def text(self) -> str:
        """All of it."""
        return "".join(self.texts)


class TokenMean(NamedTuple):
    """A latent on one token of the vocabulary, over the explaining half."""

    id: int
    text: str
    mean: float
    """Mean activation over its occurrences and `PRIOR_TOKENS` more at the latent's mean over all tokens."""
    lift: float
    """`mean` over the latent's mean over all tokens."""


@dataclass(frozen=True)
class LatentExamples:
    """What is known of one latent."""

    latent: int
    top: Sequence[Context]
    activating: Sequence[Context]
    silent: Sequence[Context]
    tokens: Sequence[TokenMean]
    """Those with the greatest mean, greatest first."""


class Wanted(NamedTuple):
    """How many examples, of what."""

    latents: int | tuple[int, ...] = 100
    """How many are drawn at random, or which."""
    n_top: int = 10
    """Contexts to explain a latent by."""
    n_held_out: int = 20
    """Contexts of either kind to test on."""
    n_context: int = 32
    """Tokens in a context (delphi's default)."""


def collect_examples(study: Study, run_id: str, position_name: str, wanted: Wanted) -> list[LatentExamples]:
    """Returns examples of latents of one SAE, by latent; computed once for the same SAE, data and wishes.

    Raises:
        UserError: there are no such latents, or none is active often enough, or the model has no tokenizer.
    """
    key = {**data_key(study, run_id, position_name), "wanted": wanted._asdict(), "drawn": study.seed}
    tensors = study.cached("interpret", key, lambda: _collect(study, run_id, position_name, wanted))
    return _as_records(tensors, require_tokenizer(study.lm(study.stored(run_id))))


def token_texts(tokenizer: Any, ids: Sequence[int]) -> tuple[str, ...]:
    """Returns a text for each token that together are the text of all; part of a character has an empty one."""
    texts: list[str] = []
    shown = ""
    for n in range(1, len(ids) + 1):
        text = tokenizer.decode(list(ids[:n]), clean_up_tokenization_spaces=False)
        is_whole = n == len(ids) or not text.endswith("\ufffd")
        texts.append(text[len(shown) :] if is_whole else "")
        shown = text if is_whole else shown
    return tuple(texts)


class _Kept:
    """Per latent, the `n` contexts with the greatest keys, greatest first; of equal ones the earlier first."""

    def __init__(self, n_latents: int, n: int, n_context: int, device: torch.device):
        self.keys = torch.full((n_latents, n), -torch.inf, device=device)
        self.ids = torch.zeros((n_latents, n, n_context), dtype=torch.int64, device=device)
        self.acts = torch.zeros((n_latents, n, n_context), device=device)

    def add(
        self,
        keys: Float[Tensor, "n_latents n_new"],
        ids: Int[Tensor, "n_new n_context"],
        acts: Float[Tensor, "n_latents n_new n_context"],
    ) -> None:
        """Adds contexts; a key of minus infinity is never kept."""
        n_latents, n = self.keys.shape
        ordered, order = torch.cat([self.keys, keys], 1).sort(dim=1, descending=True, stable=True)
        self.keys, chosen = ordered[:, :n], order[:, :n]
        of_each = torch.arange(n_latents, device=chosen.device)[:, None]
        self.ids = torch.cat([self.ids, ids.expand(n_latents, -1, -1)], 1)[of_each, chosen]
        self.acts = torch.cat([self.acts, acts], 1)[of_each, chosen]

    def tensors(self, name: str) -> dict[str, Tensor]:
        """Returns what is kept, and how many contexts of each latent are."""
        n_kept = torch.isfinite(self.keys).sum(1)
        return {f"{name}_ids": self.ids.int(), f"{name}_acts": self.acts, f"{name}_n": n_kept}


class _Rows(NamedTuple):
    """Contexts of some rows."""

    start: int
    """Number of the first context."""
    is_held_out: Tensor
    """[n_contexts]."""
    ids: Int[Tensor, "n_contexts n_context"]
    acts: Float[Tensor, "n_contexts n_context d_sae"]
    counted: Tensor
    """[n_contexts, n_context]: whether a token counts; activations on others are 0."""


@dataclass(frozen=True)
class _SAEOnData:
    """An SAE, its language model, and the study's rows."""

    study: Study
    run_id: str
    lm: nn.Module
    position: Position
    sae: SAE
    n_context: int
    """Tokens in a context, at most a row's."""

    @torch.inference_mode()
    def contexts(self, desc: str) -> Iterator[_Rows]:
        """Yields the rows as contexts with the activation of every latent, as many rows at a time as fit."""
        for batch in self.study.batches(self.run_id, desc=desc):
            x = run_clean(self.lm, batch, [self.position.read], want_logits=False).at(self.position.read)
            n_rows = max(1, _MAX_LATENTS_AT_ONCE // (self.sae.d_sae * x[0, ..., 0].numel()))
            n_of_row = batch.tokens.shape[1] // self.n_context
            counted = torch.ones_like(batch.tokens, dtype=torch.bool) if batch.counted is None else batch.counted
            for first in range(0, len(x), n_rows):
                some = slice(first, first + n_rows), slice(n_of_row * self.n_context)
                with in_eval_mode([self.sae]):
                    acts = per_token(latents_of(self.sae, x[some])).abs() * counted[some][..., None]
                numbers = torch.arange(batch.start + first, batch.start + first + len(acts), device=acts.device)
                yield _Rows(
                    start=(batch.start + first) * n_of_row,
                    is_held_out=(numbers % 2 == 1).repeat_interleave(n_of_row),
                    ids=batch.tokens[some].reshape(-1, self.n_context),
                    acts=acts.reshape(-1, self.n_context, self.sae.d_sae),
                    counted=counted[some].reshape(-1, self.n_context),
                )


def _collect(study: Study, run_id: str, position_name: str, wanted: Wanted) -> Mapping[str, Tensor]:
    """Goes over the data, twice where latents are to be drawn among those that are active often enough."""
    model, config = study.open(run_id), study.config(study.stored(run_id))
    ((position, sae),) = model.saes_at([position_name]).items()
    n_context = min(wanted.n_context, (config.eval_data or config.train_data).n_ctx)
    on_data = _SAEOnData(study, run_id, model.tlens_model, position, sae, n_context)
    latents = _chosen_latents(on_data, wanted).to(sae.device)
    n_latents, device = len(latents), sae.device
    top = _Kept(n_latents, wanted.n_top, n_context, device)
    active = _Kept(n_latents, max(N_SAMPLED, wanted.n_held_out), n_context, device)
    silent = _Kept(n_latents, wanted.n_held_out, n_context, device)
    sums = torch.zeros((n_latents, model_facts(model.tlens_model).d_vocab), device=device)
    n_tokens = torch.zeros(sums.shape[1], device=device)
    for rows in on_data.contexts("examples"):
        acts = rows.acts[..., latents].permute(2, 0, 1).float()
        greatest, held_out = acts.amax(-1), rows.is_held_out
        random = _random_keys(rows, latents, study.seed)
        top.add(_where(greatest, ~held_out & (greatest > 0)), rows.ids, acts)
        active.add(_where(random, held_out & (greatest > 0)), rows.ids, acts)
        silent.add(_where(random, held_out & (greatest == 0)), rows.ids, acts)
        explaining = rows.counted & ~held_out[:, None]
        sums.index_add_(1, rows.ids[explaining], acts[:, explaining])
        n_tokens.index_add_(0, rows.ids[explaining], torch.ones_like(rows.ids[explaining], dtype=n_tokens.dtype))
    return {
        "latents": latents,
        **top.tensors("top"),
        **_quantiles(active, wanted.n_held_out).tensors("activating"),
        **silent.tensors("silent"),
        **_token_means(sums, n_tokens),
    }


def _chosen_latents(on_data: _SAEOnData, wanted: Wanted) -> Int[Tensor, " n_latents"]:
    where, d_sae = f"the SAE at {on_data.position} of '{on_data.run_id}'", on_data.sae.d_sae
    if isinstance(wanted.latents, tuple):
        unknown = [latent for latent in wanted.latents if not 0 <= latent < d_sae]
        if unknown:
            raise UserError(f"{where} has latents 0 to {d_sae - 1}, not {unknown}")
        return torch.tensor(sorted(set(wanted.latents)))
    n_contexts = torch.zeros((2, d_sae), dtype=torch.int64)
    for rows in on_data.contexts("counting"):
        fires = (rows.acts > 0).any(1)
        for half in (0, 1):
            n_contexts[half] += fires[rows.is_held_out == bool(half)].sum(0).cpu()
    often = torch.nonzero((n_contexts >= MIN_CONTEXTS).all(0)).flatten()
    if not len(often):
        raise UserError(
            f"no latent of {where} is active in {MIN_CONTEXTS} contexts of either half of {on_data.study.n_samples} "
            "rows: look at more (--n-samples)"
        )
    generator = torch.Generator().manual_seed(seed_for(on_data.study.seed, "latents", on_data.position.name))
    return often[torch.randperm(len(often), generator=generator)[: wanted.latents]].sort().values


def _random_keys(rows: _Rows, latents: Int[Tensor, " n_latents"], seed: int) -> Float[Tensor, "n_latents n"]:
    """Returns numbers that depend on the seed, the latent and the context alone, not on the size of batches."""
    numbers = torch.arange(rows.start, rows.start + len(rows.ids), device=latents.device)
    of_each = numbers.repeat(len(latents)), latents.repeat_interleave(len(numbers))
    return random_keys(*of_each, seed).view(len(latents), -1).float()


def _where(keys: Float[Tensor, "n_latents n"], wanted: Tensor) -> Float[Tensor, "n_latents n"]:
    return keys.masked_fill(~wanted, -torch.inf)


def _quantiles(sample: _Kept, n: int) -> _Kept:
    """Returns the middle one of each of `n` equal parts of a sample, ordered by activation, strongest first."""
    n_latents, _, n_context = sample.acts.shape
    chosen = _Kept(n_latents, n, n_context, sample.acts.device)
    greatest = sample.acts.amax(-1)
    for latent in range(n_latents):
        n_there = int(torch.isfinite(sample.keys[latent]).sum())
        order = greatest[latent, :n_there].argsort(descending=True, stable=True)
        n_taken = min(n, n_there)
        taken = order[[int((i + 0.5) * n_there / n_taken) for i in range(n_taken)]]
        chosen.keys[latent, :n_taken] = greatest[latent, taken]
        chosen.ids[latent, :n_taken] = sample.ids[latent, taken]
        chosen.acts[latent, :n_taken] = sample.acts[latent, taken]
    return chosen


def _token_means(sums: Float[Tensor, "n_latents d_vocab"], n_tokens: Float[Tensor, " d_vocab"]) -> dict[str, Tensor]:
    """Returns each latent's tokens of greatest mean activation, among those that occur."""
    overall = sums.sum(1, keepdim=True) / n_tokens.sum()
    means = (sums + PRIOR_TOKENS * overall) / (n_tokens + PRIOR_TOKENS)
    means = means.masked_fill(n_tokens == 0, -torch.inf)
    n = min(N_TOKENS_NAMED, int((n_tokens > 0).sum()))
    best, ids = means.topk(n, dim=1)
    return {"token_ids": ids.int(), "token_means": best, "token_lifts": best / overall}


def _as_records(tensors: Mapping[str, Tensor], tokenizer: Any) -> list[LatentExamples]:
    def contexts(name: str, i: int) -> list[Context]:
        n = int(tensors[f"{name}_n"][i])
        ids, acts = tensors[f"{name}_ids"][i, :n].tolist(), tensors[f"{name}_acts"][i, :n].tolist()
        return [Context(token_texts(tokenizer, row), tuple(row), tuple(a)) for row, a in zip(ids, acts, strict=True)]

    def token_means(i: int) -> list[TokenMean]:
        columns = [tensors[f"token_{name}"][i].tolist() for name in ("ids", "means", "lifts")]
        return [TokenMean(id, tokenizer.decode([id]), mean, lift) for id, mean, lift in zip(*columns, strict=True)]

    return [
        LatentExamples(latent, contexts("top", i), contexts("activating", i), contexts("silent", i), token_means(i))
        for i, latent in enumerate(tensors["latents"].tolist())
    ]
