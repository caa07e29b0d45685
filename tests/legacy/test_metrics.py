"""`e2e_sae.metrics`; [ran] marks what runs of the paper's library gave."""

import math
from pathlib import Path

import pytest
import torch
from torch import nn

from e2e_sae import SAETransformer
from tests.legacy.by_hand import P, Q, by_hand
from tests.tiny_runs import N_CTX, write_rows


def test_top_k_accuracy_compares_a_prediction_with_the_token_it_was_made_at():
    from e2e_sae.metrics import topk_accuracy

    tokens = torch.tensor([[0, 1, 2, 3]])
    next_token = nn.functional.one_hot(torch.tensor([[1, 2, 3, 4]]), 6).float()
    assert topk_accuracy(next_token, tokens) == 0.0  # [ran]: a perfect next-token predictor scores 0
    assert topk_accuracy(nn.functional.one_hot(tokens, 6).float(), tokens) == 1.0
    ranked = torch.tensor([[[0.0, 2.0, 1.0], [3.0, 2.0, 1.0]]])
    assert topk_accuracy(ranked, torch.tensor([[2, 2]]), k=2, per_token=True).tolist() == [[1.0, 0.0]]


def test_consistency_and_distance_by_hand():
    from e2e_sae.metrics import statistical_distance, top1_consistency

    p = torch.tensor([[[0.5, 0.3, 0.2], [0.1, 0.8, 0.1]]])
    q = torch.tensor([[[0.3, 0.5, 0.2], [0.1, 0.8, 0.1]]])
    assert top1_consistency(p.log(), q.log()) == 0.5
    assert top1_consistency(p.log(), q.log(), per_token=True).tolist() == [[0.0, 1.0]]
    assert statistical_distance(p.log(), q.log()).item() == pytest.approx((0.2 + 0.0) / 2)


def test_output_metrics_have_the_legacy_keys_and_sign():
    from e2e_sae.metrics import calc_output_metrics

    tokens = torch.tensor([[0, 1, 2]])
    right = 5.0 * nn.functional.one_hot(torch.tensor([[1, 2, 0]]), 3)
    metrics = calc_output_metrics(tokens, right, torch.zeros(1, 3, 3), train=False)
    ce = -math.log(math.exp(5) / (math.exp(5) + 2))
    assert metrics["performance/eval/orig_model_ce_loss"] == pytest.approx(ce)
    assert metrics["performance/eval/sae_model_ce_loss"] == pytest.approx(math.log(3))
    # Original minus SAE: negative where the SAE hurts.
    assert metrics["performance/eval/difference_ce_loss"] == pytest.approx(ce - math.log(3))
    names = {"orig_model_top1_accuracy", "sae_model_top1_accuracy", "difference_top1_accuracy"}
    names |= {"orig_vs_sae_top1_consistency", "orig_vs_sae_statistical_distance"}
    assert {f"performance/eval/{name}" for name in names} <= metrics.keys()
    assert all(isinstance(value, float) for value in metrics.values())


def test_sparsity_metrics_by_hand():
    from e2e_sae.metrics import calc_sparsity_metrics

    _, new_acts = by_hand()
    assert calc_sparsity_metrics(new_acts) == {
        f"sparsity/train/L_0/{P}": 1.5,
        f"sparsity/train/frac_zeros/{P}": 0.5,
    }


def test_activation_frequencies_by_hand():
    from e2e_sae.metrics import ActFrequencyMetrics

    _, new_acts = by_hand()
    metrics = ActFrequencyMetrics(dict_sizes={P: 3}, device="cpu")
    for _ in range(2):
        metrics.update_dict_el_frequencies(new_acts, batch_tokens=2)
    assert metrics.tokens_used == 4
    assert metrics.dict_el_frequencies[P].tolist() == [0.5, 0.0, 1.0]
    values = metrics.collect_for_logging(log_wandb_histogram=False)
    assert values == {f"sparsity/alive_dict_elements/{P}": 2, f"sparsity/alive_dict_elements_indices/{P}": [0, 2]}
    final = metrics.collect_for_logging(post_training=True)
    assert final[f"sparsity/alive_dict_elements_final/{P}"] == 2
    assert sum(final[f"sparsity/dict_el_frequency_hist/log10/{P}"]["counts"]) == 3
    assert len(metrics.dict_el_frequency_history[P]) == 2


def test_act_frequencies_are_collected_over_the_first_tokens(model: SAETransformer, tmp_path: Path):
    from e2e_sae.data import DatasetConfig, create_data_loader
    from e2e_sae.metrics import collect_act_frequency_metrics

    data = DatasetConfig(dataset_name=str(write_rows(tmp_path / "rows.parquet", 12)), n_ctx=N_CTX)
    found = collect_act_frequency_metrics(
        model, data, batch_size=2, global_seed=3, device="cpu", n_tokens=5 * N_CTX + 1
    )
    # 41 tokens: 5 rows, so 2 batches of 2.
    loader, _ = create_data_loader(data, batch_size=4, global_seed=3)
    tokens = next(iter(loader))["input_ids"]
    _, new_acts = model(tokens, model.raw_sae_positions)
    for name in (P, Q):
        alive = (new_acts[name].c.flatten(0, 1) > 0).any(0).nonzero().flatten().tolist()
        assert found[f"sparsity/alive_dict_elements_indices_final/{name}"] == alive
        assert found[f"sparsity/alive_dict_elements_final/{name}"] == len(alive)
