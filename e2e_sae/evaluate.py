"""Measuring spliced models: everything that is logged of a set of batches, and the evaluation on held-out data.

fvu, explained_variance   ratio of sums over the whole set (metrics.VarianceExplained)
ce_recovered_zero         (CE_zero - CE_spliced) / (CE_zero - CE_clean): 1 as good as the clean model, 0 no
                          better than writing zeros at the SAEs' positions
ce_recovered_mean         the same against writing each position's mean over the batch
"""

from collections.abc import Generator, Iterable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import nn

from e2e_sae.acts import Mean, Pass, Position, TokenBatch
from e2e_sae.data.batches import TokenBatches
from e2e_sae.data.prefetch import N_AHEAD, DataWait, on_device
from e2e_sae.hooks import block_of, is_after_blocks
from e2e_sae.losses import InToOrigLoss, LogitsKLLoss, LossConfigs, LossTerm, OutToInLoss
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
from e2e_sae.saes import in_eval_mode

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
            prediction = spliced.sae_acts[name].replacement if at_sae else spliced.acts[name]
            quality.update(prediction.detach(), clean.at(name), spliced.batch.counted)

    def update_ablated(self, ce: dict[str, Mean]) -> None:
        """Adds a batch's cross-entropies with the positions ablated, as `ablated_ce` gives them."""
        self._ablated_ce.update(ce)

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


def ablated_ce(model: nn.Module, clean: Pass, positions: Sequence[Position]) -> dict[str, Mean]:
    """Returns a batch's cross-entropy by how the positions are ablated: two more runs of the model."""
    batch = clean.batch
    return {
        how: Mean(*next_token_ce(run_ablated(model, clean, positions, how), batch.tokens, batch.counted))
        for how in ABLATIONS
    }


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


class _Evaluated:
    """A spliced model while it is being evaluated."""

    def __init__(self, model: SAETransformer, loss: LossConfigs):
        self._model = model
        self.saes = model.saes_at()
        n_layers: int = model.tlens_model.cfg.n_layers  # pyright: ignore
        everywhere = [f"blocks.{i}.hook_resid_post" for i in range(n_layers)]
        in_to_orig = loss.in_to_orig or InToOrigLoss(total_coeff=0.0, hook_positions=everywhere)
        kl = (loss.logits_kl or LogitsKLLoss(coeff=0.0)).model_copy(update={"position_fraction": 1.0})
        out_to_in = loss.out_to_in or OutToInLoss(coeff=0.0)
        self._terms = loss.model_copy(update={"in_to_orig": in_to_orig, "out_to_in": out_to_in, "logits_kl": kl}).terms
        quality_names = quality_positions(model.positions, n_layers)
        self._names = list(dict.fromkeys([*in_to_orig.hook_positions, *quality_names]))
        self._measurements = Measurements("eval", self._terms, quality_names)
        self._firing = FiringCounts({position.name: sae.d_sae for position, sae in self.saes.items()})

    @property
    def clean_names(self) -> list[str]:
        """Hook points that it needs from the clean pass."""
        return clean_names(self.saes, self._names)

    def update(self, clean: Pass, ablated: dict[tuple[Position, ...], dict[str, Mean]]) -> None:
        """Adds a batch.

        Args:
            clean: its clean pass.
            ablated: what is known of the batch with positions ablated; what is found out is added.
        """
        lm, positions = self._model.tlens_model, tuple(self.saes)
        spliced = run_spliced(lm, clean.batch, self.saes, self._names, clean)
        values = {key: mean for term in self._terms for key, mean in term.values(clean, spliced).items()}
        self._measurements.update(clean, spliced, values)
        if positions not in ablated:
            ablated[positions] = ablated_ce(lm, clean, positions)
        self._measurements.update_ablated(ablated[positions])
        self._firing.update(spliced)

    def result(self) -> Evaluation:
        """Returns what was found."""
        return Evaluation(self._measurements.compute(), self._firing)


def evaluate(
    model: SAETransformer,
    batches: Iterable[TokenBatch],
    loss: LossConfigs,
    n_batches: int | None = None,
) -> Evaluation:
    """Measures the spliced model, all SAEs in, local runs too.

    Without `in_to_orig` in the loss, its legacy keys cover `hook_resid_post` of every block; without `logits_kl`
    or `out_to_in` these are reported all the same.

    Args:
        model: the model and its SAEs; left as it was.
        batches: token rows on the model's device.
        loss: the run's loss, for its hook points and norm.
        n_batches: for the progress bar.

    Raises:
        ValueError: there is no batch.
    """
    (evaluation,) = evaluate_together([(model, loss)], batches, n_batches)
    return evaluation


@torch.inference_mode()
def evaluate_together(
    models: Sequence[tuple[SAETransformer, LossConfigs]], batches: Iterable[TokenBatch], n_batches: int | None = None
) -> list[Evaluation]:
    """Returns what `evaluate` finds for each of several spliced models of one language model, over one clean pass."""
    lm = models[0][0].tlens_model
    evaluated = [_Evaluated(model, loss) for model, loss in models]
    names = list(dict.fromkeys(name for one in evaluated for name in one.clean_names))
    n_seen = 0
    with in_eval_mode([sae for one in evaluated for sae in one.saes.values()]):
        for batch in progress_bar(batches, total=n_batches, desc="evaluating", inner=True):
            clean = run_clean(lm, batch, names, keep_logits=len(models) > 1, reuse=[one.saes for one in evaluated])
            ablated: dict[tuple[Position, ...], dict[str, Mean]] = {}
            for one in evaluated:
                one.update(clean, ablated)
            n_seen += 1
    if not n_seen:
        raise ValueError("there is no batch to evaluate on")
    return [one.result() for one in evaluated]


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
    wait: DataWait | None = None,
    n_ahead: int = N_AHEAD,
) -> Generator[TokenBatch, None, None]:
    """Yields batches from sample `start` on, on the device; whole batches until `n_samples` is reached.

    They may come from a background thread, which ends with the generator: close it if it is left early.

    Args:
        wait: told how long each batch was waited for.
        n_ahead: batches that the thread keeps ready at most.
    """

    def batches() -> Iterator[TokenBatch]:
        seen = start
        for tokens in source.iterate(batch_size, start):
            if n_samples is not None and seen >= n_samples:
                return
            yield TokenBatch.of(tokens, exclude_token_ids, start=seen)
            seen += len(tokens)

    yield from on_device(batches(), device, wait, n_ahead=n_ahead, are_instant=source.is_in_memory)
