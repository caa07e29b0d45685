"""Measuring spliced models: everything that is logged of a set of batches, and the evaluation on held-out data.

fvu, explained_variance   ratio of sums over the whole set (metrics.VarianceExplained)
ce_recovered_zero         (CE_zero - CE_spliced) / (CE_zero - CE_clean): 1 as good as the clean model, 0 no
                          better than writing zeros at the SAEs' positions
ce_recovered_mean         the same against writing each position's mean over the batch
"""

from collections.abc import Iterable, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import nn

from e2e_sae.acts import Mean, Pass, Position, TokenBatch
from e2e_sae.data.batches import TokenBatches
from e2e_sae.hooks import block_of, is_after_blocks
from e2e_sae.losses import InToOrigLoss, LogitsKLLoss, LossConfigs, LossTerm
from e2e_sae.metrics import (
    FiringCounts,
    Mode,
    RunningMeans,
    VarianceExplained,
    legacy_explained_variances,
    output_metrics,
    sparsity_metrics,
)
from e2e_sae.models.runner import SAEsAt, run_ablated, run_clean, run_spliced
from e2e_sae.models.sae_transformer import SAETransformer
from e2e_sae.ops.logits import next_token_ce
from e2e_sae.progress import progress_bar

ABLATIONS: tuple[Literal["zero", "mean"], ...] = ("zero", "mean")


class Measurements:
    """Collects every metric over batches; `compute` gives numbers by log key."""

    def __init__(self, m: Mode, terms: list[LossTerm], quality_names: Sequence[str]):
        """
        Args:
            m: `train` or `eval`, as in the keys.
            terms: whose explained variances are reported.
            quality_names: hook points of the `quality/` keys.
        """
        self._m: Mode = m
        self._terms = terms
        self._means = RunningMeans()
        self._quality = {name: VarianceExplained() for name in quality_names}
        self._ablated_ce = RunningMeans()

    def update(self, clean: Pass, spliced: Pass, loss_values: dict[str, Mean]) -> None:
        """Adds a batch.

        Args:
            clean: its clean pass.
            spliced: its spliced pass.
            loss_values: as `weighted_loss` gives them.
        """
        self._means.update({f"loss/{self._m}/{key}": mean for key, mean in loss_values.items()})
        self._means.update(sparsity_metrics(spliced, self._m))
        self._means.update(output_metrics(clean, spliced, self._m))
        self._means.update(legacy_explained_variances(self._terms, clean, spliced, self._m))
        for name, quality in self._quality.items():
            at_sae = name in spliced.sae_acts
            prediction = spliced.sae_acts[name].output if at_sae else spliced.acts[name]
            quality.update(prediction.detach(), clean.at(name), spliced.batch.counted)

    def update_ablated(self, model: nn.Module, clean: Pass, positions: Sequence[Position]) -> None:
        """Adds a batch's cross-entropies with the positions ablated: two more runs of the model."""
        batch = clean.batch
        for how in ABLATIONS:
            output = run_ablated(model, clean, positions, how)
            self._ablated_ce.update({how: Mean(*next_token_ce(output, batch.tokens, batch.counted))})

    def compute(self) -> dict[str, float]:
        """Returns all metrics by log key; waits for the device."""
        metrics = self._means.compute()
        for name, quality in self._quality.items():
            fvu = quality.fvu()
            metrics[f"quality/{self._m}/explained_variance/{name}"] = 1 - fvu
            metrics[f"quality/{self._m}/fvu/{name}"] = fvu
        stem = f"performance/{self._m}"
        for how, ablated in self._ablated_ce.compute().items():
            clean, spliced = metrics[f"{stem}/orig_model_ce_loss"], metrics[f"{stem}/sae_model_ce_loss"]
            gap = ablated - clean
            metrics[f"{stem}/ce_recovered_{how}"] = (ablated - spliced) / gap if gap else float("nan")
        return metrics


class Evaluation(NamedTuple):
    """What an evaluation found."""

    metrics: dict[str, float]
    """By log key."""
    firing: FiringCounts
    """How often each latent was active."""

    def log_values(self) -> dict[str, Any]:
        """Returns the metrics with the number of alive latents and the activation-frequency histograms."""
        values: dict[str, Any] = dict(self.metrics)
        for name in self.firing.counts:
            values[f"sparsity/eval/alive_dict_elements/{name}"] = self.firing.n_alive(name)
            values[f"sparsity/eval/dict_el_frequency_hist/log10/{name}"] = self.firing.log10_histogram(name)
        return values


@torch.inference_mode()
def evaluate(
    model: SAETransformer,
    batches: Iterable[TokenBatch],
    loss: LossConfigs,
    n_batches: int | None = None,
) -> Evaluation:
    """Measures the spliced model, all SAEs in, local runs too.

    Without `in_to_orig` in the loss, its legacy keys cover `hook_resid_post` of every block; without `logits_kl`
    the KL is reported all the same.

    Args:
        model: the model and its SAEs; left as it was.
        batches: token rows on the model's device.
        loss: the run's loss, for its hook points and norm.
        n_batches: for the progress bar.

    Raises:
        ValueError: there is no batch.
    """
    lm, saes = model.tlens_model, model.saes_at()
    n_layers: int = lm.cfg.n_layers  # pyright: ignore
    everywhere = [f"blocks.{i}.hook_resid_post" for i in range(n_layers)]
    in_to_orig = loss.in_to_orig or InToOrigLoss(total_coeff=0.0, hook_positions=everywhere)
    kl = loss.logits_kl or LogitsKLLoss(coeff=0.0)
    terms = loss.model_copy(update={"in_to_orig": in_to_orig, "logits_kl": kl}).terms
    quality_names = quality_positions(model.positions, n_layers)
    names = list(dict.fromkeys([*in_to_orig.hook_positions, *quality_names]))
    measurements = Measurements("eval", terms, quality_names)
    firing = FiringCounts({position.name: sae.d_sae for position, sae in saes.items()})
    was_training = model.saes.training
    model.saes.eval()
    try:
        n_seen = 0
        for batch in progress_bar(batches, total=n_batches, desc="evaluating", inner=True):
            clean = run_clean(lm, batch, clean_names(saes, names), reuse=[saes])
            spliced = run_spliced(lm, batch, saes, names, clean)
            values = {key: mean for term in terms for key, mean in term.values(clean, spliced).items()}
            measurements.update(clean, spliced, values)
            measurements.update_ablated(lm, clean, model.positions)
            firing.update(spliced)
            n_seen += 1
    finally:
        model.saes.train(was_training)
    if not n_seen:
        raise ValueError("there is no batch to evaluate on")
    return Evaluation(measurements.compute(), firing)


def quality_positions(positions: Sequence[Position], n_layers: int) -> list[str]:
    """Returns the SAEs' positions and the output of every block from the first SAE's on."""
    names = [position.name for position in positions]
    first = min((n_layers if is_after_blocks(name) else block_of(name) or 0) for name in names)
    return list(dict.fromkeys([*names, *(f"blocks.{i}.hook_resid_post" for i in range(first, n_layers))]))


def clean_names(saes: SAEsAt, names: Sequence[str] = ()) -> list[str]:
    """Returns the hook points that a clean pass must keep for these SAEs and further names."""
    return list(dict.fromkeys([*(name for position in saes for name in position), *names]))


def token_batches(
    source: TokenBatches,
    batch_size: int,
    n_samples: int | None,
    exclude_token_ids: list[int],
    device: torch.device,
    start: int = 0,
) -> Iterable[TokenBatch]:
    """Yields batches from sample `start` on, on the device; whole batches until `n_samples` is reached."""
    seen = start
    for tokens in source.iterate(batch_size, start):
        if n_samples is not None and seen >= n_samples:
            return
        yield TokenBatch.of(tokens, exclude_token_ids, device)
        seen += len(tokens)
