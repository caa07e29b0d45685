"""The paper's library's import paths. What the functions do is tested in `tests/legacy/`."""

import importlib

import pytest

SCRIPTS = "e2e_sae.scripts"
PATHS = {
    "e2e_sae": ["SAETransformer"],
    "e2e_sae.models.transformers": ["SAETransformer"],
    "e2e_sae.models.sparsifiers": ["SAE", "Codebook"],
    "e2e_sae.models.mlp": ["Layer", "MLP", "MLPMod"],
    "e2e_sae.hooks": ["CacheActs", "SAEActs", "sae_hook", "cache_hook"],
    "e2e_sae.losses": [
        "calc_explained_variance", "_layer_norm_pre", "SparsityLoss", "InToOrigLoss", "OutToOrigLoss", "OutToInLoss",
        "LogitsKLLoss", "LossConfigs", "calc_loss",
    ],
    "e2e_sae.metrics": [
        "topk_accuracy", "top1_consistency", "statistical_distance", "ActFrequencyMetrics", "calc_sparsity_metrics",
        "calc_output_metrics", "collect_act_frequency_metrics",
    ],
    "e2e_sae.loader": ["load_tlens_model", "load_pretrained_saes"],
    "e2e_sae.data": ["DatasetConfig", "tokenize_and_concatenate", "_keep_single_column", "create_data_loader"],
    "e2e_sae.types": ["StrDtype", "TORCH_DTYPES", "Samples", "TorchDtype", "RootPath"],
    "e2e_sae.settings": ["REPO_ROOT"],
    "e2e_sae.utils": [
        "to_numpy", "to_root_path", "save_module", "load_config", "set_seed", "replace_pydantic_model", "filter_names",
        "get_hook_shapes", "get_linear_lr_schedule", "get_cosine_schedule_with_warmup", "init_wandb",
    ],
    "e2e_sae.plotting": ["plot_per_layer_metric", "plot_facet"],
    "e2e_sae.log": ["logger", "setup_logger"],
    f"{SCRIPTS}.train_tlens_saes.run_train_tlens_saes": ["Config", "SAEsConfig", "main", "evaluate"],
    f"{SCRIPTS}.train_tlens.run_train_tlens": ["Config", "HookedTransformerPreConfig", "main"],
}  # fmt: skip
"""Every import path of the paper's library that its users, notebooks and scripts name."""


@pytest.mark.parametrize(("path", "name"), [(path, name) for path, names in PATHS.items() for name in names])
def test_every_legacy_name_is_where_it_was(path: str, name: str):
    assert getattr(importlib.import_module(path), name) is not None


def test_a_name_that_never_was_says_so():
    with pytest.raises(ImportError, match="cannot import name 'calc_los'"):
        exec("from e2e_sae.losses import calc_los")
    with pytest.raises(AttributeError, match="module 'e2e_sae.losses' has no attribute 'calc_los'"):
        _ = importlib.import_module("e2e_sae.losses").calc_los
