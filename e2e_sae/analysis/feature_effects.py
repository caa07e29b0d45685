"""The second look at the data: tokens and activations around chosen places, and what the model loses with a latent.

A latent is ablated by setting it to 0 at all tokens of a row, in the model with its SAE spliced in (and no other one).
Its effect on the row is compared with that model, exactly, not by a gradient:

    KL(spliced || ablated), and the cross-entropy of the next token, ablated minus spliced,

each summed over the row, from the first token on at which the latent is active (before it nothing changes). Over
several rows the effect is the sum divided by the number of tokens at which the latent is active: nats per active token,
what is felt later in the row included.

Shapes: N pages, C contexts of each, A of them ablated (the first), W tokens in a window. Memory: 8 bytes for each of
N x C x W, 12 kB a page, and a batch.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from e2e_sae.acts import Output, Position, TokenBatch
from e2e_sae.analysis.feature_data import Rows, per_token, rows_at_once
from e2e_sae.analysis.feature_lens import written_directions
from e2e_sae.models.prefix import replaying, shared_prefix
from e2e_sae.models.runner import apply_sae, run_clean, run_model
from e2e_sae.models.splicing import splice
from e2e_sae.ops.logits import row_chunks, with_kept_logits
from e2e_sae.progress import progress_bar
from e2e_sae.saes import SAE, in_eval_mode

N_BEFORE, N_AFTER = 24, 8
"""Tokens shown before and after a place: what a latent reacts to comes before."""
WINDOW = torch.arange(-N_BEFORE, N_AFTER + 1)
"""Places of these tokens, from that of the place."""
PART_PLACES = 4096
"""Places whose windows and ablations are kept together: a few seconds' work with a small model, 1 MB."""
N_ABLATED = 10
"""Top contexts in which a latent is ablated."""
N_TOKENS_AT_ONCE = 4096
"""Tokens of ablated rows that are run together."""
CHUNK_ELEMENTS = 2**20
"""Logits compared at a time on a CPU: 4 MB. A step with 2^22 took a quarter longer."""


@dataclass(frozen=True)
class Contexts:
    """Windows of tokens around places, and a latent on them."""

    tokens: Int[Tensor, "N C W"]
    """Ids, int32; -1 outside the row, and in all of a window that has no place."""
    acts: Float[Tensor, "N C W"]
    """Activations."""


@dataclass(frozen=True)
class Effects:
    """What ablating a latent does to the rows of its top contexts: sums over a row, NaN where there is none."""

    kl: Float[Tensor, "N A"]
    """KL(spliced || ablated), nats."""
    ce_increase: Float[Tensor, "N A"]
    """Cross-entropy, ablated minus spliced, nats."""
    n_active: Float[Tensor, "N A"]
    """Tokens at which it was active."""

    @property
    def kl_per_token(self) -> Float[Tensor, " N"]:
        """KL per active token."""
        return self.kl.nansum(1) / self.n_active.nansum(1)

    @property
    def ce_increase_per_token(self) -> Float[Tensor, " N"]:
        """Cross-entropy increase per active token."""
        return self.ce_increase.nansum(1) / self.n_active.nansum(1)


Kept = Callable[[int, Callable[[], Mapping[str, Tensor]]], Mapping[str, Tensor]]
"""Returns the tensors of a part of the places, by its number and what computes them, if they are not known already."""


class _Jobs(NamedTuple):
    """Places to look at, by row."""

    rows: Int[Tensor, " n"]
    """Ascending."""
    pages: Int[Tensor, " n"]
    """Which page's."""
    slots: Int[Tensor, " n"]
    """Which of its contexts."""
    positions: Int[Tensor, " n"]
    """Where in the row."""

    @classmethod
    def of(cls, places: Int[Tensor, "N C"], n_ctx: int) -> "_Jobs":
        pages, slots = (places >= 0).nonzero().unbind(1)
        found = places[pages, slots]
        order = found.argsort(stable=True)
        found = found[order]
        return cls(found // n_ctx, pages[order], slots[order], found % n_ctx)

    def parts(self) -> Iterator["_Jobs"]:
        """Yields `PART_PLACES` jobs at a time, or a few more: whole rows."""
        first = 0
        while first < len(self.rows):
            last_row = self.rows[min(first + PART_PLACES, len(self.rows)) - 1]
            end = int(torch.searchsorted(self.rows, last_row, right=True))
            yield _Jobs(*(part[first:end] for part in self))
            first = end

    def by_rows(self, n_rows: int) -> Iterator[tuple[Tensor, "_Jobs"]]:
        """Yields n rows at a time, and the jobs there with rows counted within these."""
        rows, sizes = self.rows.unique_consecutive(return_counts=True)
        ends = sizes.cumsum(0).tolist()
        for first in range(0, len(rows), n_rows):
            last = min(first + n_rows, len(rows))
            jobs = slice(ends[first - 1] if first else 0, ends[last - 1])
            local = torch.arange(last - first).repeat_interleave(sizes[first:last])
            yield rows[first:last], _Jobs(local, self.pages[jobs], self.slots[jobs], self.positions[jobs])


def _computed(_: int, compute: Callable[[], Mapping[str, Tensor]]) -> Mapping[str, Tensor]:
    return compute()


@torch.inference_mode()
def look_closely(
    lm: nn.Module,
    position: Position,
    sae: SAE,
    rows: Rows,
    latents: Int[Tensor, " N"],
    places: Int[Tensor, "N C"],
    batch_size: int = 8,
    n_ablated: int = N_ABLATED,
    kept: Kept = _computed,
) -> tuple[Contexts, Effects]:
    """Returns what is around places, and what ablating does in the rows of the first `n_ablated` of each latent.

    Args:
        lm: the language model.
        position: where the SAE sits.
        sae: the SAE.
        rows: what places count in.
        latents: whose places they are.
        places: `row * n_ctx + position`, -1 for none; the strongest first.
        batch_size: rows at a time, at most.
        n_ablated: places whose rows are run again without the latent.
        kept: keeps what was found part by part; parts do not depend on the size of batches.
    """
    n_ctx = rows.tokens.shape[1]
    shape = (*places.shape, len(WINDOW))
    contexts = Contexts(torch.full(shape, -1, dtype=torch.int32), torch.zeros(shape))
    shape = (len(places), min(n_ablated, places.shape[1]))
    effects = Effects(*(torch.full(shape, torch.nan) for _ in range(3)))
    jobs, seen = _Jobs.of(places, n_ctx), 0
    desc = f"contexts and ablations, {position.name}"
    with in_eval_mode([sae]), progress_bar(total=len(jobs.rows), desc=desc) as bar:
        look = _Look(lm, position, sae, rows, latents, min(batch_size, rows_at_once(n_ctx, sae.d_sae)), shape[1])
        for number, part in enumerate(jobs.parts()):
            found = kept(number, lambda part=part: look.at(part, bar.update))
            seen += len(part.rows)
            bar.update(seen - bar.n)
            contexts.tokens[part.pages, part.slots] = found["tokens"]
            contexts.acts[part.pages, part.slots] = found["acts"]
            ablated = part.slots < shape[1]
            where = part.pages[ablated], part.slots[ablated]
            for store, values in zip(vars(effects).values(), found["effects"], strict=True):
                store[where] = values[ablated]
    return contexts, effects


@dataclass(frozen=True)
class _Look:
    """Looks at places, batches of rows at a time."""

    lm: nn.Module
    position: Position
    sae: SAE
    rows: Rows
    latents: Int[Tensor, " N"]
    batch_size: int
    n_ablated: int

    def at(self, part: _Jobs, on_batch: Callable[[int], object]) -> dict[str, Tensor]:
        """Returns `tokens` and `acts` [places, W] and `effects` [3, places], NaN where nothing is ablated.

        Args:
            part: the places.
            on_batch: is told after each batch of how many.
        """
        tokens, acts, effects = [], [], []
        for which, here in part.by_rows(self.batch_size):
            spliced = _Spliced(self.lm, self.position, self.sae, self.rows.batch(which, self._device))
            for store, found in zip((tokens, acts), self._windows(spliced, which, here), strict=True):
                store.append(found)
            effects.append(self._effects(spliced, here))
            on_batch(len(here.rows))
        return {"tokens": torch.cat(tokens), "acts": torch.cat(acts), "effects": torch.cat(effects, 1)}

    @property
    def _device(self) -> torch.device:
        return next(self.lm.parameters()).device

    @cached_property
    def _directions(self) -> Float[Tensor, "d_sae d_out"]:
        return written_directions(self.sae)

    def _windows(
        self, spliced: "_Spliced", which: Int[Tensor, " n"], here: _Jobs
    ) -> tuple[Int[Tensor, "J W"], Float[Tensor, "J W"]]:
        n_ctx = self.rows.tokens.shape[1]
        at = here.positions[:, None] + WINDOW
        inside = (at >= 0) & (at < n_ctx)
        at = at.clamp(0, n_ctx - 1)
        where = (here.rows[:, None], at, self.latents[here.pages][:, None])
        acts = per_token(spliced.latents)[tuple(index.to(self._device) for index in where)].cpu().float()
        tokens = self.rows.tokens[which][here.rows[:, None], at]
        return tokens.masked_fill(~inside, -1), acts.masked_fill(~inside, 0.0)

    def _effects(self, spliced: "_Spliced", here: _Jobs) -> Float[Tensor, "3 J"]:
        n_ctx = self.rows.tokens.shape[1]
        effects = torch.full((3, len(here.rows)), torch.nan)
        ablated = (here.slots < self.n_ablated).nonzero()[:, 0]
        for some in ablated.split(max(1, N_TOKENS_AT_ONCE // n_ctx)):
            whose = self.latents[here.pages[some]].to(self._device)
            directions = self._directions[whose.to(self._directions.device)]
            found = spliced.without(here.rows[some].to(self._device), whose, directions)
            effects[:, some] = torch.stack([values.float().cpu() for values in found])
        return effects


class _Spliced:
    """A batch in the model with one SAE in it, ready to be run again with a change."""

    def __init__(self, lm: nn.Module, position: Position, sae: SAE, batch: TokenBatch):
        self._lm = lm
        self._batch = batch
        self._write = position.write
        # What comes before the place where the SAE writes stays as it is.
        self._prefix = shared_prefix(lm, [position.write])
        reuse = [[Position(position.write, position.write)]]
        clean = run_clean(lm, batch, list(dict.fromkeys(position)), want_logits=True, reuse=reuse)
        self._outputs = clean.outputs
        acts = apply_sae(sae, clean.at(position.read), clean.at(position.write) if position.is_transcoder else None)
        self.latents = acts.latents
        self._recon = acts.replacement
        self._dtype = clean.at(position.write).dtype
        self._output: Output | None = None

    def without(
        self, rows: Int[Tensor, " J"], latents: Int[Tensor, " J"], directions: Float[Tensor, "J d_out"]
    ) -> tuple[Float[Tensor, " J"], Float[Tensor, " J"], Int[Tensor, " J"]]:
        """Returns KL and cross-entropy increase, summed over the row, and active tokens, of each of J ablations.

        Args:
            rows: of the batch.
            latents: the one that is set to 0.
            directions: what it writes.
        """
        if self._output is None:
            every = torch.arange(len(self._batch.tokens), device=rows.device)
            self._output = with_kept_logits(self._run(every, self._recon))
        acts = self.latents.movedim(-1, 1)[rows, latents]
        change = acts[..., None] * directions.view(len(rows), *[1] * (acts.ndim - 1), -1)
        ablated = self._run(rows, self._recon[rows] - change.to(self._recon.dtype))
        active = acts != 0 if acts.ndim == 2 else (acts != 0).flatten(2).any(2)
        counted = None if self._batch.counted is None else self._batch.counted[rows]
        felt = active.cummax(1).values if counted is None else active.cummax(1).values & counted
        kl, ce_increase = _row_sums(self._output, ablated, self._batch.tokens, rows, felt)
        return kl, ce_increase, (active if counted is None else active & counted).sum(1)

    def _run(self, rows: Int[Tensor, " J"], replacement: Tensor) -> Output:
        """Runs rows of the batch with this written where the SAE writes."""
        batch = TokenBatch.of(self._batch.tokens[rows])
        outputs = {name: _taken(output, rows) for name, output in self._outputs.items()}
        replacement = replacement.to(device=rows.device, dtype=self._dtype)
        with (
            replaying(self._lm, self._prefix, outputs),
            splice(self._lm, [(self._write, lambda _: replacement)]),
        ):
            return run_model(self._lm, batch, [self._write])


def _row_sums(
    spliced: Output,
    ablated: Output,
    tokens: Int[Tensor, "batch pos"],
    rows: Int[Tensor, " J"],
    felt: Bool[Tensor, "J pos"],
) -> tuple[Float[Tensor, " J"], Float[Tensor, " J"]]:
    """Returns KL and cross-entropy increase of each ablated row, over the tokens where anything is felt."""
    n_ctx = tokens.shape[1]
    job, at = felt.nonzero().unbind(1)
    theirs, ours = rows[job] * n_ctx + at, job * n_ctx + at
    following, has_next = tokens.roll(-1, dims=1).flatten()[theirs], at < n_ctx - 1
    sums = torch.zeros(2, len(rows), dtype=torch.float64, device=rows.device)
    for chunk in row_chunks(ablated.at(ours), None if rows.is_cuda else CHUNK_ELEMENTS):
        log_p = F.log_softmax(spliced.at(theirs[chunk]).rows(slice(None)), -1)
        log_q = F.log_softmax(ablated.at(ours[chunk]).rows(slice(None)), -1)
        target = following[chunk, None]
        ce = (log_p.gather(1, target) - log_q.gather(1, target))[:, 0] * has_next[chunk]
        # Where p = 0 the term is 0, even if a model sets the logit to -inf: 0 * inf is left out of the sum.
        kl = log_p.exp().mul_(log_p.sub_(log_q)).nansum(1)
        sums.index_add_(1, job[chunk], torch.stack([kl, ce]).double())
    return sums[0], sums[1]


def _taken(output: Any, rows: Int[Tensor, " J"]) -> Any:
    """Returns rows of what a module returned."""
    if isinstance(output, Tensor):
        return output.index_select(0, rows)
    return tuple(_taken(part, rows) for part in output) if isinstance(output, tuple) else output
