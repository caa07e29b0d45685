"""`e2e_sae.metrics` of the paper's library. Its numbers are kept; what misleads is said where it is computed."""

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from e2e_sae.acts import Mean, Output, Pass, TokenBatch
from e2e_sae.data.batches import load_token_batches
from e2e_sae.data.dataset_config import DatasetConfig
from e2e_sae.evaluate import token_batches
from e2e_sae.legacy.passes import NewActs, spliced_pass
from e2e_sae.metrics import FiringCounts, output_metrics, sparsity_metrics
from e2e_sae.models.lm import model_facts
from e2e_sae.models.runner import run_spliced
from e2e_sae.models.sae_transformer import SAETransformer


def topk_accuracy(
    logits: Float[Tensor, "batch pos vocab"], tokens: Int[Tensor, "batch pos"], k: int = 1, per_token: bool = False
) -> Float[Tensor, "*batch_pos"]:
    """Returns the share of tokens that are among the k best predictions made *at* them (not for them).

    Args:
        per_token: return 0 or 1 for each token instead.
    """
    hits = (logits.topk(k, dim=-1).indices == tokens[..., None]).any(-1).float()
    return hits if per_token else hits.mean()


def top1_consistency(
    orig_model_logits: Float[Tensor, "batch pos vocab"],
    sae_model_logits: Float[Tensor, "batch pos vocab"],
    per_token: bool = False,
) -> Float[Tensor, "*batch_pos"]:
    """Returns the share of tokens at which both outputs rank the same token first (0 or 1 each with `per_token`)."""
    return topk_accuracy(sae_model_logits, orig_model_logits.argmax(-1), per_token=per_token)


def statistical_distance(
    orig_model_logits: Float[Tensor, "batch pos vocab"], sae_model_logits: Float[Tensor, "batch pos vocab"]
) -> Float[Tensor, ""]:
    """Returns the mean over tokens of 0.5 * sum_v |p_v - q_v|."""
    key = "performance/eval/orig_vs_sae_statistical_distance"
    tokens = orig_model_logits.argmax(-1)
    return output_metrics(_logits(tokens, orig_model_logits), _logits(tokens, sae_model_logits), "eval")[key].value


def calc_sparsity_metrics(new_acts: NewActs, train: bool = True) -> dict[str, float]:
    """Returns `sparsity/{train|eval}/{L_0|frac_zeros}/{hook name}`."""
    return _floats(sparsity_metrics(spliced_pass(new_acts), "train" if train else "eval"))


def calc_output_metrics(
    tokens: Int[Tensor, "batch pos"],
    orig_logits: Float[Tensor, "batch pos vocab"],
    new_logits: Float[Tensor, "batch pos vocab"],
    train: bool = True,
) -> dict[str, float]:
    """Returns `performance/{train|eval}/...`; see `metrics.output_metrics`."""
    m = "train" if train else "eval"
    return _floats(output_metrics(_logits(tokens, orig_logits), _logits(tokens, new_logits), m))


class ActFrequencyMetrics:
    """How often each dictionary element is active, for the log.

    Attributes:
        dict_el_frequency_history: by hook name, the frequencies of every collection so far.
    """

    def __init__(self, dict_sizes: Mapping[str, int], device: torch.device | str):
        self._firing = FiringCounts(dict_sizes)
        self._device = device
        self.dict_el_frequency_history: dict[str, list[Float[Tensor, " d_sae"]]] = {name: [] for name in dict_sizes}

    @property
    def tokens_used(self) -> int:
        """Tokens counted."""
        return self._firing.n_tokens

    @property
    def dict_el_frequencies(self) -> dict[str, Float[Tensor, " d_sae"]]:
        """By hook name, the share of the tokens at which each element was active."""
        return {name: self._firing.frequencies(name).to(self._device, torch.float32) for name in self._firing.counts}

    def update_dict_el_frequencies(self, new_acts: NewActs, batch_tokens: int) -> None:
        """Adds a batch of `batch_tokens` tokens."""
        del batch_tokens  # known from the activations
        self.add(spliced_pass({name: new_acts[name] for name in self._firing.counts}))

    def add(self, spliced: Pass) -> None:
        """Adds the counted tokens of a batch."""
        self._firing.update(spliced)

    def collect_for_logging(self, log_wandb_histogram: bool = True, post_training: bool = False) -> dict[str, Any]:
        """Returns the number and the indices of the elements that were active.

        Args:
            log_wandb_histogram: add histograms of log10(frequency), {edges, counts}, the form of `metrics.jsonl`.
            post_training: put `_final` into the keys.
        """
        final = "_final" if post_training else ""
        values: dict[str, Any] = {}
        for name, frequencies in self.dict_el_frequencies.items():
            self.dict_el_frequency_history[name].append(frequencies)
            values[f"sparsity/alive_dict_elements{final}/{name}"] = self._firing.n_alive(name)
            values[f"sparsity/alive_dict_elements_indices{final}/{name}"] = frequencies.nonzero().flatten().tolist()
            if log_wandb_histogram:
                values[f"sparsity/dict_el_frequency_hist/log10/{name}"] = self._firing.log10_histogram(name)
        return values


@torch.inference_mode()
def collect_act_frequency_metrics(
    model: SAETransformer,
    data_config: DatasetConfig,
    batch_size: int,
    global_seed: int,
    device: torch.device | str,
    n_tokens: int,
) -> dict[str, Any]:
    """Returns which dictionary elements are alive in the first `n_tokens` tokens (whole batches, at least one).

    Args:
        global_seed: shuffle seed if the data have none of their own.
    """
    facts = model_facts(model.tlens_model)
    batches = load_token_batches(
        data_config,
        global_seed=global_seed,
        tokenizer=getattr(model.tlens_model, "tokenizer", None),
        d_vocab=facts.d_vocab,
        max_n_ctx=facts.n_ctx,
    )
    n_samples = max(1, n_tokens // data_config.n_ctx // batch_size) * batch_size
    saes = model.saes_at()
    metrics = ActFrequencyMetrics({position.name: sae.d_sae for position, sae in saes.items()}, device)
    excluded = data_config.exclude_token_ids
    for batch in token_batches(batches, batch_size, n_samples, excluded, facts.device):
        metrics.add(run_spliced(model.tlens_model, batch, saes))
    return metrics.collect_for_logging(log_wandb_histogram=False, post_training=True)


def _logits(tokens: Int[Tensor, "batch pos"], logits: Float[Tensor, "batch pos vocab"]) -> Pass:
    return Pass(TokenBatch(tokens, None, tokens.numel()), output=Output(logits))


def _floats(means: Mapping[str, Mean]) -> dict[str, float]:
    return {key: mean.value.item() for key, mean in means.items()}
