"""What one pass over the data tells of every latent of an SAE, in memory that does not grow with the data.

Of each latent: how often it is active and how strongly, a histogram of its activations, the places of its greatest
activation (at most one in a row of tokens), and a uniform sample of the places where it is active, which cut by
activation into equal groups shows its quantiles. An activation's size is its absolute value; a latent that several
heads share has at a token the value that is the largest in size.

Shapes: N pages (latents that are looked at), K top places, S sampled ones, all sorted from the largest activation
down. A place is `row * n_ctx + position`; -1 where there are fewer.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from e2e_sae.acts import Position, TokenBatch
from e2e_sae.models.runner import run_clean
from e2e_sae.saes import SAE, in_eval_mode

N_TOP = 20
"""Top contexts of a latent, as in sae-vis."""
N_GROUPS, N_PER_GROUP = 5, 5
"""Groups of equally many activations, as on Neuronpedia, and contexts in each, as in sae-vis."""
LOG10_MIN, LOG10_MAX, BINS_PER_DECADE = -4, 4, 10
"""Bins of the histogram: of equal width in log10(activation); what lies outside is in the first or last one."""
N_BINS = (LOG10_MAX - LOG10_MIN) * BINS_PER_DECADE
MAX_LATENTS_AT_ONCE = 2**27
"""Latents of all tokens that are in memory at a time: 512 MB."""


@dataclass(frozen=True)
class Activity:
    """What one pass found for all latents of an SAE."""

    n_tokens: int
    """Tokens seen (counted ones)."""
    n_active: Int[Tensor, " d_sae"]
    """Of them, those where the latent is active."""
    total: Float[Tensor, " d_sae"]
    """Sum of the sizes of its activations."""
    largest: Float[Tensor, " d_sae"]
    """Size of its largest activation."""
    histogram: Int[Tensor, "d_sae n_bins"]
    """How many activations are in each bin."""
    top: Int[Tensor, "d_sae K"]
    """Places of the greatest activation, each in another row."""
    sample: Int[Tensor, "d_sae S"]
    """Places drawn from all where it is active, all alike likely."""

    @property
    def frequency(self) -> Float[Tensor, " d_sae"]:
        """Share of the tokens where the latent is active."""
        return self.n_active / max(self.n_tokens, 1)

    @property
    def mean(self) -> Float[Tensor, " d_sae"]:
        """Mean size of its activation where it is active; 0 if it never is."""
        return self.total / self.n_active.clamp(min=1)

    @property
    def l0(self) -> float:
        """Active latents per token."""
        return int(self.n_active.sum()) / max(self.n_tokens, 1)

    def tensors(self) -> dict[str, Tensor]:
        """Returns all of it as tensors by name."""
        return {name: torch.as_tensor(value) for name, value in vars(self).items()}

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> "Activity":
        """Returns it from what `tensors` gave."""
        return cls(n_tokens=int(tensors["n_tokens"]), **{k: v for k, v in tensors.items() if k != "n_tokens"})

    def most_active(self, n: int) -> list[int]:
        """Returns the n latents with the largest sum of activations, or all that are ever active, in their order."""
        alive = int((self.n_active > 0).sum())
        return sorted(self.total.topk(min(n, alive)).indices.tolist())


class TokenRows:
    """The rows that a pass has seen, 4 bytes a token: what comes later is looked up here."""

    def __init__(self) -> None:
        self._batches: list[Tensor] = []
        self._counted: list[Tensor] = []
        self._has_uncounted = False

    def add(self, batch: TokenBatch) -> int:
        """Keeps a batch and returns the number of its first row."""
        first = sum(map(len, self._batches))
        self._batches.append(batch.tokens.to("cpu", torch.int32))
        counted = torch.ones_like(batch.tokens, dtype=torch.bool) if batch.counted is None else batch.counted
        self._counted.append(counted.cpu())
        return first

    def joined(self) -> "Rows":
        """Returns all rows."""
        return Rows(torch.cat(self._batches), torch.cat(self._counted))


@dataclass(frozen=True)
class Rows:
    """Token rows on the CPU."""

    tokens: Int[Tensor, "n_rows n_ctx"]
    """Ids, int32."""
    counted: Bool[Tensor, "n_rows n_ctx"]
    """Which count."""

    def batch(self, rows: Int[Tensor, " n"], device: torch.device) -> TokenBatch:
        """Returns some rows as a batch."""
        counted = self.counted[rows]
        all_count = bool(counted.all())
        tokens = self.tokens[rows].long().to(device)
        return TokenBatch(tokens, None if all_count else counted.to(device), int(counted.sum()))


class RunningTop:
    """For each latent the k entries with the greatest keys, of all that were added; the earlier of two equal ones.

    Memory: 20 bytes for each of d_sae x k entries, and as much for what waits to be merged.
    """

    def __init__(self, d_sae: int, k: int, device: torch.device):
        self._keys = torch.full((d_sae, k), -torch.inf, dtype=torch.float64, device=device)
        self._values = torch.zeros(d_sae, k, device=device)
        self._places = torch.full((d_sae, k), -1, dtype=torch.int64, device=device)
        self._waiting: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
        self._n_waiting = 0

    def add(
        self,
        latents: Int[Tensor, " n"],
        keys: Float[Tensor, " n"],
        values: Float[Tensor, " n"],
        places: Int[Tensor, " n"],
    ) -> None:
        """Adds entries: whose they are, what decides, and what is kept with it."""
        keys = keys.double()
        keep = keys > self._keys[latents, -1]
        self._waiting.append((latents[keep], keys[keep], values[keep].float(), places[keep]))
        self._n_waiting += len(self._waiting[-1][0])
        if self._n_waiting > self._keys.numel():
            self._merge()

    def places_by_value(self) -> Int[Tensor, "d_sae k"]:
        """Returns the places that are kept, those with the greatest values first."""
        self._merge()
        empty = self._places < 0
        order = self._values.masked_fill(empty, -torch.inf).argsort(dim=1, descending=True, stable=True)
        return self._places.gather(1, order)

    def _merge(self) -> None:
        d_sae, k = self._keys.shape
        old = self._places >= 0
        stored = (old.nonzero()[:, 0], self._keys[old], self._values[old], self._places[old])
        latents, keys, values, places = (torch.cat(parts) for parts in zip(stored, *self._waiting, strict=True))
        order = keys.argsort(descending=True, stable=True)
        order = order[latents[order].argsort(stable=True)]
        latents = latents[order]
        starts = torch.searchsorted(latents, torch.arange(d_sae, device=latents.device))
        ranks = torch.arange(len(latents), device=latents.device) - starts[latents]
        kept = ranks < k
        at, order = (latents[kept], ranks[kept]), order[kept]
        self._keys[at], self._values[at], self._places[at] = keys[order], values[order], places[order]
        self._waiting, self._n_waiting = [], 0


class ActivityCounter:
    """Collects an `Activity`, batch after batch."""

    def __init__(self, d_sae: int, device: torch.device, seed: int, n_top: int = N_TOP):
        """
        Args:
            d_sae: number of latents.
            device: where latents are.
            seed: of the sample.
            n_top: top places.
        """
        self._seed = seed
        self._n_tokens = 0
        self._n_active = torch.zeros(d_sae, dtype=torch.int64, device=device)
        self._total = torch.zeros(d_sae, dtype=torch.float64, device=device)
        self._largest = torch.zeros(d_sae, device=device)
        self._histogram = torch.zeros(d_sae * N_BINS, dtype=torch.int64, device=device)
        self._top = RunningTop(d_sae, n_top, device)
        self._sample = RunningTop(d_sae, N_GROUPS * N_PER_GROUP, device)

    def update(
        self,
        latents: Float[Tensor, "batch pos d_sae"],
        counted: Bool[Tensor, "batch pos"] | None,
        first_row: int,
    ) -> None:
        """Adds the latents of a batch whose first row has this number."""
        n_rows, n_ctx, d_sae = latents.shape
        sizes = latents.abs()
        if counted is not None:
            sizes = sizes.masked_fill(~counted[..., None], 0.0)
        self._n_tokens += n_rows * n_ctx if counted is None else int(counted.sum())
        tokens, whose = sizes.flatten(0, 1).nonzero().unbind(1)
        values = sizes.flatten(0, 1)[tokens, whose]
        self._n_active += torch.bincount(whose, minlength=d_sae)
        self._total.index_add_(0, whose, values.double())
        self._histogram += torch.bincount(whose * N_BINS + bins(values), minlength=len(self._histogram))
        peaks, at = sizes.max(1)
        self._largest = torch.maximum(self._largest, peaks.amax(0).float())
        rows, active = peaks.nonzero().unbind(1)
        places = (first_row + rows) * n_ctx + at[rows, active]
        self._top.add(active, peaks[rows, active], peaks[rows, active], places)
        places = first_row * n_ctx + tokens
        self._sample.add(whose, random_keys(places, whose, self._seed), values, places)

    def result(self) -> Activity:
        """Returns what was found, on the CPU."""
        counts = (self._n_active, self._total, self._largest, self._histogram.view(-1, N_BINS))
        top, sample = self._top.places_by_value(), self._sample.places_by_value()
        n_active, total, largest, histogram = (x.cpu() for x in counts)
        return Activity(self._n_tokens, n_active, total, largest, histogram, top.cpu(), sample.cpu())


@torch.inference_mode()
def collect_activity(
    lm: nn.Module, saes: Mapping[Position, SAE], batches: Iterable[TokenBatch], seed: int = 0
) -> tuple[dict[str, Activity], Rows]:
    """Returns what each SAE's latents do on the data, by position name, and the data.

    Args:
        lm: the language model, which runs as it is, as far as the last SAE.
        saes: the SAEs, each on the clean activation.
        batches: token rows on the model's device.
        seed: of the samples; they depend on it and the data, not on the size of the batches.

    Raises:
        ValueError: there is no batch.
    """
    counters = {p: ActivityCounter(sae.d_sae, sae.device, seed) for p, sae in saes.items()}
    rows, names = TokenRows(), list(dict.fromkeys(position.read for position in saes))
    with in_eval_mode(saes.values()):
        for batch in batches:
            first = rows.add(batch)
            clean = run_clean(lm, batch, names, want_logits=False)
            for position, sae in saes.items():
                x = clean.at(position.read)
                for start in range(0, len(x), n_at_once := rows_at_once(x.shape[1], sae.d_sae)):
                    some = slice(start, start + n_at_once)
                    counted = None if batch.counted is None else batch.counted[some]
                    counters[position].update(per_token(latents_of(sae, x[some])), counted, first + start)
    return {position.name: counter.result() for position, counter in counters.items()}, rows.joined()


def rows_at_once(n_ctx: int, d_sae: int) -> int:
    """Returns how many rows have at most `MAX_LATENTS_AT_ONCE` latents, at least 1.

    >>> rows_at_once(128, 1024), rows_at_once(1024, 46080)
    (1024, 2)
    """
    return max(1, MAX_LATENTS_AT_ONCE // (n_ctx * d_sae))


def latents_of(sae: SAE, x: Float[Tensor, "batch pos ... d_in"]) -> Float[Tensor, "batch pos ... d_sae"]:
    """Returns an SAE's latents on an activation of the model."""
    return sae.encode(x.to(device=sae.device, dtype=sae.dtype))


def per_token(latents: Float[Tensor, "batch pos ... d_sae"]) -> Float[Tensor, "batch pos d_sae"]:
    """Returns one value per token and latent: of several heads', the one that is the largest in size."""
    if latents.ndim == 3:
        return latents
    heads = latents.flatten(2, -2)
    return heads.gather(2, heads.abs().argmax(2, keepdim=True)).squeeze(2)


def bins(sizes: Float[Tensor, " n"]) -> Int[Tensor, " n"]:
    """Returns the bin of each activation: floor((log10(size) - LOG10_MIN) BINS_PER_DECADE), within the bins there are.

    >>> bins(torch.tensor([1e-9, 1e-4, 1.0, 9.99, 1e9])).tolist()
    [0, 0, 40, 49, 79]
    """
    scaled = (sizes.double().log10() - LOG10_MIN) * BINS_PER_DECADE
    # Sizes are float32: a power of ten may lie a little below itself.
    return (scaled + 1e-6).floor().clamp(0, N_BINS - 1).long()


def random_keys(places: Int[Tensor, " n"], latents: Int[Tensor, " n"], seed: int) -> Float[Tensor, " n"]:
    """Returns a number in [0, 1) for each place and latent: the same in each run, and without a pattern.

    SplitMix64's finaliser (Steele, Lea and Flood 2014, "Fast splittable pseudorandom number generators", with the
    constants of Stafford's Mix13) of a sum of odd multiples.
    """
    x = places * _signed(0x9E3779B97F4A7C15) + latents * _signed(0xD1B54A32D192ED03)
    x = x + _signed(seed * 0x2545F4914F6CDD1D % 2**64)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x = (x ^ _shifted(x, shift)) * _signed(factor)
    x = x ^ _shifted(x, 31)
    return _shifted(x, 11).double() / 2**53


def _shifted(x: Int[Tensor, " n"], n: int) -> Int[Tensor, " n"]:
    """Returns x >> n of the bits as they are, where torch's would repeat the sign."""
    return (x >> n) & (2 ** (64 - n) - 1)


def _signed(x: int) -> Any:
    return x - 2**64 if x >= 2**63 else x
