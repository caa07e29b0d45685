from e2e_sae.lazy import lazy_names

__getattr__ = lazy_names(
    __name__,
    {
        "DatasetConfig": "e2e_sae.data.dataset_config",
        "create_data_loader": "e2e_sae.legacy.data",
        "tokenize_and_concatenate": "e2e_sae.legacy.data",
        "_keep_single_column": "e2e_sae.legacy.data",
    },
)
