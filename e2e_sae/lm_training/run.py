"""From an `LMConfig` to a trained model on the disk."""

from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from e2e_sae.data.batches import TokenBatches, load_token_batches, load_tokenizer
from e2e_sae.data.dataset_config import STDLIB_DATASET, DatasetConfig
from e2e_sae.data.sources import Part, TextSource, keep_part, open_source
from e2e_sae.errors import UserError
from e2e_sae.lm_training.config import LMConfig
from e2e_sae.lm_training.loop import LogitsFn, TrainResult, n_rows_per_epoch, train_lm
from e2e_sae.lm_training.output import (
    SAMPLE_PROMPT,
    make_hf_model,
    model_card,
    sample_text,
    save_hf_model,
    save_hooked_model,
    train_tokenizer,
)
from e2e_sae.log import logger
from e2e_sae.seeds import seed_for
from e2e_sae.tracked_run import tracked_run

PILE_10K = "NeelNanda/pile-10k"
"""A hub data set of 10,000 documents."""


class TrainableLM(NamedTuple):
    """A model about to be trained, of either form."""

    model: nn.Module
    logits_of: LogitsFn
    tokenizer: Any
    """None if there is none and the data are tokenised."""
    d_vocab: int
    n_ctx: int
    """The longest context."""


def run_lm_training(config: LMConfig) -> Path:
    """Trains the model and returns the run folder.

    It holds `final_config.yaml`, `metrics.jsonl` and the saved models: `epoch_N/` (Hugging Face) or
    `epoch_N.pt` (TransformerLens).

    Raises:
        UserError: the config, the data or the tokenizer do not fit together.
        RunFailed: the loss is no finite number.
    """
    train_data, eval_data = data_configs(config)
    lm = make_lm(config, train_data)

    def load(data: DatasetConfig, part: Part) -> TokenBatches:
        return load_token_batches(
            data.model_copy(update={"n_epochs": 1}),
            global_seed=config.seed,
            part=part,
            tokenizer=lm.tokenizer,
            d_vocab=lm.d_vocab,
            max_n_ctx=lm.n_ctx,
        )

    batches = load(train_data, "train")
    eval_batches = None if eval_data is None else load(eval_data, "eval" if eval_data is train_data else "all")
    n_rows = n_rows_per_epoch(batches, config.train)
    n_params = sum(p.numel() for p in lm.model.parameters())

    def save(run_dir: Path, epoch: int, result: TrainResult) -> None:
        if config.tlens_config is not None:
            path = run_dir / f"epoch_{epoch}.pt"
            save_hooked_model(path, lm.model)
        else:
            path = run_dir / f"epoch_{epoch}"
            sample = sample_text(lm.logits_of, lm.tokenizer, SAMPLE_PROMPT, n_ctx=train_data.n_ctx, seed=config.seed)
            card = model_card(config, result, n_params=n_params, n_train_rows=n_rows, sample=sample)
            save_hf_model(path, lm.model, lm.tokenizer, config, card=card)
        held_out = "" if result.eval_ce is None else f": held-out cross-entropy {result.eval_ce:.4f} nats/token"
        logger.info(f"epoch {epoch} of {config.train.n_epochs}{held_out} -> {path}")

    with tracked_run(config.train.save_dir, config.run_name, config, config.wandb_project) as run:
        logger.info(f"{n_params:,} parameters, {'?' if n_rows is None else n_rows} rows an epoch -> {run.path}")
        train_lm(
            lm.model,
            lm.logits_of,
            batches,
            eval_batches,
            config.train,
            seed=config.seed,
            log=run.log,
            save=partial(save, run.path),
        )
    return run.path


def make_lm(config: LMConfig, train_data: DatasetConfig) -> TrainableLM:
    """Returns the untrained model; its weights depend on `config.seed` only.

    Args:
        train_data: what a new tokenizer is trained on.
    """
    if config.tlens_config is not None:
        return _make_tlens_lm(config.seed, config.tlens_config, train_data)
    tokenizer = _tokenizer(config, train_data)
    torch.manual_seed(seed_for(config.seed, "lm_init"))
    model = make_hf_model(config.hf_config or {}, tokenizer)

    def logits_of(tokens: Int[Tensor, "batch pos"]) -> Float[Tensor, "batch pos d_vocab"]:
        return model(input_ids=tokens, use_cache=False).logits

    n_ctx: int = model.config.max_position_embeddings
    return TrainableLM(model, logits_of, tokenizer, model.config.vocab_size, n_ctx)


def _make_tlens_lm(seed: int, tlens_config: dict[str, Any], train_data: DatasetConfig) -> TrainableLM:
    from e2e_sae.models.lm_custom import build_custom_lm
    from e2e_sae.models.tlens import quietly, resolve_model_class

    torch.manual_seed(seed_for(seed, "lm_init"))
    with quietly():
        model = build_custom_lm(tlens_config, resolve_model_class("auto"))
    name = tlens_config.get("tokenizer_name")
    needs_one = not train_data.is_tokenized and train_data.tokenizer_name is None
    tokenizer = load_tokenizer(str(name)) if needs_one and name is not None else None
    cfg: Any = model.cfg

    def logits_of(tokens: Int[Tensor, "batch pos"]) -> Float[Tensor, "batch pos d_vocab"]:
        return model(tokens)

    return TrainableLM(model, logits_of, tokenizer, cfg.d_vocab, cfg.n_ctx)


def data_configs(config: LMConfig) -> tuple[DatasetConfig, DatasetConfig | None]:
    """Returns what is trained on and what is evaluated on, the defaults filled in."""
    train = config.train_data
    if train is None and config.tlens_config is not None:
        # The paper's library knows no other data for such a config, and no longer rows.
        n_ctx = min(_model_n_ctx(config), 1024)
        train = DatasetConfig(dataset_name=PILE_10K, is_tokenized=False, streaming=False, n_ctx=n_ctx)
    elif train is None:
        train = DatasetConfig(dataset_name=STDLIB_DATASET, is_tokenized=False, n_ctx=_model_n_ctx(config))
    if config.eval_data is not None:
        return train, config.eval_data
    if train.holdout_fraction is not None:
        return train, train
    if train.dataset_name == STDLIB_DATASET and train.split == "train":
        return train, train.model_copy(update={"split": "eval"})
    return train, None


def _model_n_ctx(config: LMConfig) -> int:
    fields = config.hf_config or config.tlens_config or {}
    for key in ("n_positions", "max_position_embeddings", "n_ctx"):
        if isinstance(fields.get(key), int):
            return fields[key]
    raise UserError("without train_data, the model's config needs n_positions, max_position_embeddings or n_ctx")


def _tokenizer(config: LMConfig, train_data: DatasetConfig) -> Any:
    if config.tokenizer_name is not None:
        return load_tokenizer(config.tokenizer_name)
    assert config.tokenizer is not None, "checked by LMConfig"
    source = open_source(train_data)
    if not isinstance(source, TextSource):
        raise UserError("a tokenizer cannot be trained on tokenised data: set tokenizer_name")
    return train_tokenizer(keep_part(source.read(), "train", train_data.holdout_fraction), config.tokenizer)
