"""Numbers to look at. Every function gives `Mean`s by log key; `RunningMeans` adds batches up and divides once.

`m` is `train` or `eval`. Keys under `loss/`, `sparsity/` and the older ones under `performance/` are those of
the paper's library, kept as it computes them; where that misleads, the right quantity stands under a key of
its own (`quality/`, `ce_increase`, `*_next_token_accuracy`).
"""

from collections.abc import Mapping
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from e2e_sae.acts import Mean, Pass
from e2e_sae.lazy import lazy_names
from e2e_sae.losses import LossTerm, MSETerm
from e2e_sae.ops.logits import compare_logits
from e2e_sae.ops.tokens import at_least_float32, counted_rows, counted_sum

Mode = Literal["train", "eval"]
LOG10_EDGES = [-10.0 + 0.25 * i for i in range(41)]
"""Bin edges of the activation-frequency histogram, log10(frequency + 1e-10): from never (-10) to always (0)."""


class RunningMeans:
    """Sums `Mean`s over batches; the one place that divides."""

    def __init__(self) -> None:
        self._sums: dict[str, Float[Tensor, ""]] = {}
        self._counts: dict[str, int] = {}

    @torch.no_grad()
    def update(self, means: Mapping[str, Mean]) -> None:
        """Adds one batch."""
        for key, mean in means.items():
            total = mean.sum.detach().double()
            self._sums[key] = self._sums[key] + total if key in self._sums else total
            self._counts[key] = self._counts.get(key, 0) + mean.count

    def compute(self) -> dict[str, float]:
        """Returns sum / count by key; waits for the device."""
        return {
            key: total.item() / self._counts[key] if self._counts[key] else float("nan")
            for key, total in self._sums.items()
        }


@torch.no_grad()
def sparsity_metrics(spliced: Pass, m: Mode) -> dict[str, Mean]:
    """Returns L_0 (mean number of latents that are not 0) and frac_zeros (share of zeros) of each SAE."""
    means: dict[str, Mean] = {}
    batch = spliced.batch
    for name, acts in spliced.sae_acts.items():
        n_active = (acts.latents != 0).sum(-1).to(torch.float32)
        total = counted_sum(n_active, batch.counted)
        means[f"sparsity/{m}/L_0/{name}"] = Mean(total, batch.n_counted)
        zeros = batch.n_counted - total / acts.latents.shape[-1]
        means[f"sparsity/{m}/frac_zeros/{name}"] = Mean(zeros, batch.n_counted)
    return means


@torch.no_grad()
def output_metrics(clean: Pass, spliced: Pass, m: Mode) -> dict[str, Mean]:
    """Returns what the two sets of logits say; nothing for a run without logits.

    Older keys: `difference_ce_loss` is clean minus spliced (negative when the SAE hurts), `*_top1_accuracy`
    compares a position's prediction with that same position's token. Newer keys: `ce_increase` is spliced minus
    clean, in nats per token; `*_next_token_accuracy` compares with the token that follows.
    """
    if clean.output is None or spliced.output is None:
        return {}
    batch = spliced.batch
    r = compare_logits(clean.output, spliced.output, batch.tokens, batch.counted)
    n, n_next = r.n_tokens, r.n_predictions
    p = f"performance/{m}"
    return {
        f"{p}/orig_model_ce_loss": Mean(r.clean_ce, n_next),
        f"{p}/sae_model_ce_loss": Mean(r.spliced_ce, n_next),
        f"{p}/difference_ce_loss": Mean(r.clean_ce - r.spliced_ce, n_next),
        f"{p}/ce_increase": Mean(r.spliced_ce - r.clean_ce, n_next),
        f"{p}/orig_model_top1_accuracy": Mean(r.clean_same_token, n),
        f"{p}/sae_model_top1_accuracy": Mean(r.spliced_same_token, n),
        f"{p}/difference_top1_accuracy": Mean(r.clean_same_token - r.spliced_same_token, n),
        f"{p}/orig_next_token_accuracy": Mean(r.clean_correct, n_next),
        f"{p}/sae_next_token_accuracy": Mean(r.spliced_correct, n_next),
        f"{p}/orig_vs_sae_top1_consistency": Mean(r.agree, n),
        f"{p}/orig_vs_sae_statistical_distance": Mean(r.total_variation, n),
    }


@torch.no_grad()
def legacy_explained_variances(terms: list[LossTerm], clean: Pass, spliced: Pass, m: Mode) -> dict[str, Mean]:
    """Returns the explained variances of the paper's library for every MSE term.

    Per token 1 - ||prediction - target||^2 / ||target - mean over the batch's tokens||^2, then the mean and the
    (unbiased) standard deviation over tokens; `_ln`: both layer-normed first. A mean of ratios: heavy-tailed, and
    dependent on the batch size. For `out_to_in` the target is the SAE's *output*. See `VarianceExplained`.
    """
    means: dict[str, Mean] = {}
    for term in terms:
        if not isinstance(term, MSETerm):
            continue
        for name, (prediction, target) in term.pairs(clean, spliced).items():
            x = counted_rows(at_least_float32(prediction), spliced.batch.counted)
            a = counted_rows(at_least_float32(target), spliced.batch.counted)
            stem = f"loss/{m}/{term.name}/explained_variance"
            n = spliced.batch.n_counted
            for ln, (x_ln, a_ln) in {"": (x, a), "_ln": (layer_norm(x), layer_norm(a))}.items():
                ratios = explained_variance_ratios(x_ln, a_ln)
                # Weighted by tokens, as the paper's library averages its batches.
                means[f"{stem}{ln}/{name}"] = Mean(ratios.mean() * n, n)
                std = ratios.std() if len(ratios) > 1 else ratios.new_tensor(float("nan"))
                means[f"{stem}{ln}_std/{name}"] = Mean(std * n, n)
    return means


def explained_variance_ratios(
    prediction: Float[Tensor, "rows d"], target: Float[Tensor, "rows d"]
) -> Float[Tensor, " rows"]:
    """Returns 1 - ||prediction - target||^2 / ||target - mean(target)||^2 for each row."""
    residual = (prediction - target).square().sum(-1)
    return 1 - residual / (target - target.mean(0)).square().sum(-1)


def layer_norm(x: Float[Tensor, "*tokens d"]) -> Float[Tensor, "*tokens d"]:
    """Returns each vector with mean 0 and variance 1 over its width."""
    return F.layer_norm(x, x.shape[-1:], eps=1e-5)


class VarianceExplained:
    """fvu = sum ||prediction - target||^2 / sum ||target - mean target||^2, and explained variance = 1 - fvu.

    Both sums, and the mean, are over all counted tokens of all batches seen: a ratio of sums, which does not
    depend on the batch size. Sums are kept in float64, shifted by the first batch's mean so that a large common
    offset does not cancel digits.
    """

    def __init__(self) -> None:
        self._count = 0
        self._shift: Tensor | None = None
        self._error = torch.zeros((), dtype=torch.float64)
        self._squares = torch.zeros((), dtype=torch.float64)
        self._sums: Tensor | None = None

    @torch.no_grad()
    def update(
        self,
        prediction: Float[Tensor, "batch pos *rest d"],
        target: Float[Tensor, "batch pos *rest d"],
        counted: Bool[Tensor, "batch pos"] | None = None,
    ) -> None:
        """Adds one batch."""
        x = counted_rows(prediction, counted).double()
        a = counted_rows(target, counted).double()
        if not len(a):
            return
        if self._shift is None or self._sums is None:
            self._shift, self._sums = a.mean(0), torch.zeros_like(a[0])
            self._error, self._squares = self._error.to(a.device), self._squares.to(a.device)
        self._error = self._error + (x - a).square().sum()
        shifted = a - self._shift
        self._sums = self._sums + shifted.sum(0)
        self._squares = self._squares + shifted.square().sum()
        self._count += len(a)

    def fvu(self) -> float:
        """Returns the fraction of variance unexplained; NaN before any token or without variance."""
        if self._sums is None:
            return float("nan")
        variance = self._squares - self._sums.square().sum() / self._count
        return (self._error / variance).item() if variance > 0 else float("nan")


class FiringCounts:
    """How many tokens each latent of each SAE was active (not 0) at, exactly."""

    def __init__(self, d_saes: Mapping[str, int]):
        self.counts: dict[str, Int[Tensor, " d_sae"]] = {
            name: torch.zeros(d_sae, dtype=torch.int64) for name, d_sae in d_saes.items()
        }
        """By position name."""
        self.n_tokens = 0
        """Counted tokens seen."""

    @torch.no_grad()
    def update(self, spliced: Pass) -> None:
        """Adds one batch. At a per-head hook point a token counts once for every head."""
        counted = spliced.batch.counted
        for name, acts in spliced.sae_acts.items():
            fired = acts.latents != 0
            if counted is not None:  # not an index: that would wait for the device
                fired &= counted.reshape(*counted.shape, *[1] * (fired.ndim - 2)).to(fired.device)
            n_fired = fired.reshape(-1, fired.shape[-1]).sum(0)
            self.counts[name] = n_fired + self.counts[name].to(fired.device) if self.n_tokens else n_fired
        self.n_tokens += spliced.batch.n_counted

    def n_alive(self, name: str) -> int:
        """Returns how many latents were active at least once."""
        return int((self.counts[name] > 0).sum())

    def frequencies(self, name: str) -> Float[Tensor, " d_sae"]:
        """Returns the share of tokens at which each latent was active."""
        return self.counts[name].double() / max(1, self.n_tokens)

    def log10_histogram(self, name: str) -> dict[str, list[float] | list[int]]:
        """Returns {edges, counts} of log10(frequency + 1e-10) over latents, in bins of `LOG10_EDGES`."""
        logs = (self.frequencies(name) + 1e-10).log10().cpu().clamp(LOG10_EDGES[0], LOG10_EDGES[-1])
        bins = torch.bucketize(logs, torch.tensor(LOG10_EDGES, dtype=logs.dtype), right=True) - 1
        counts = torch.bincount(bins.clamp_max(len(LOG10_EDGES) - 2), minlength=len(LOG10_EDGES) - 1)
        return {"edges": LOG10_EDGES, "counts": counts.tolist()}

    def log_values(self) -> dict[str, object]:
        """Returns number alive and histogram of each SAE by log key."""
        values: dict[str, object] = {}
        for name in self.counts:
            values[f"sparsity/alive_dict_elements/{name}"] = self.n_alive(name)
            values[f"sparsity/dict_el_frequency_hist/log10/{name}"] = self.log10_histogram(name)
        return values


class FiringWindow:
    """Counts firing over windows of at least `n_tokens` tokens.

    As in the paper's library: a window opens at the first batch, and again when `every_n_samples` samples have
    passed since the last one was closed.
    """

    def __init__(self, d_saes: Mapping[str, int], *, every_n_samples: int, n_tokens: int):
        self._d_saes = dict(d_saes)
        self._every, self._n_tokens = every_n_samples, n_tokens
        self._closed_at: int | None = None
        self._open: FiringCounts | None = None
        self._whole: FiringCounts | None = None
        self._pending = False

    @property
    def latest(self) -> FiringCounts:
        """The newest whole window, or else the one under way."""
        return self._whole or self._open or FiringCounts(self._d_saes)

    def update(self, spliced: Pass, n_samples: int) -> None:
        """Adds a batch; `n_samples` is the cumulative number with it."""
        if not self._every:
            return
        n_before = n_samples - len(spliced.batch.tokens)
        if self._open is None and (self._closed_at is None or n_before - self._closed_at >= self._every):
            self._open = FiringCounts(self._d_saes)
        if self._open is None:
            return
        self._open.update(spliced)
        if self._open.n_tokens >= self._n_tokens:
            self._whole, self._open, self._closed_at, self._pending = self._open, None, n_samples, True

    def take_closed(self) -> FiringCounts | None:
        """Returns the window that has closed since the last call, if one has."""
        is_new, self._pending = self._pending, False
        return self._whole if is_new else None

    def state(self) -> dict[str, object]:
        """Returns tensors and numbers for `load_state`."""
        return {
            "closed_at": self._closed_at,
            "pending": self._pending,
            "open": self._open and {"counts": self._open.counts, "n_tokens": self._open.n_tokens},
            "whole": self._whole and {"counts": self._whole.counts, "n_tokens": self._whole.n_tokens},
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Continues from `state`."""
        self._closed_at, self._pending = state["closed_at"], state["pending"]
        self._open, self._whole = self._counts(state["open"]), self._counts(state["whole"])

    def _counts(self, state: Mapping[str, Any] | None) -> FiringCounts | None:
        if state is None:
            return None
        counts = FiringCounts(self._d_saes)
        counts.counts, counts.n_tokens = dict(state["counts"]), state["n_tokens"]
        return counts


__getattr__ = lazy_names(
    __name__,
    dict.fromkeys(
        (
            "topk_accuracy",
            "top1_consistency",
            "statistical_distance",
            "ActFrequencyMetrics",
            "calc_sparsity_metrics",
            "calc_output_metrics",
            "collect_act_frequency_metrics",
        ),
        "e2e_sae.legacy.metrics",
    ),
)
