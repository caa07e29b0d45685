"""`e2e-sae finetune`: an SAE that is there already, trained on for a little on what the model's output needs.

The recipe of Karvonen, "Revisiting End-to-End Sparse Autoencoder Training: A Short Finetune Is All You Need" (arXiv
2503.17272): local MSE and KL, balanced in each batch (`losses.LossConfigs.kl_balance`), a small learning rate that
falls in a line to 0, a few percent of the tokens of the first training. The paper's script has AdamW, whose weight
decay times that rate moves nothing in so few steps; here it is Adam.

What the SAE is (positions, architecture, options, size) and its model come from where it is stored; data and batches
from its run's config, where there is one; the rest are the defaults here. A YAML and `--set` change all but the SAE.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from e2e_sae.base_config import apply_overrides, deep_update, read_yaml
from e2e_sae.checkpoint import load_run
from e2e_sae.checkpoint.files import read_json
from e2e_sae.checkpoint.records import StoredRun
from e2e_sae.checkpoint.run_dir import METRICS_FILE, RunDir
from e2e_sae.checkpoint.sources import fetch_wandb_run
from e2e_sae.config import Config, rename_old_keys
from e2e_sae.errors import MissingFileError, RunFailed, UserError
from e2e_sae.evaluate import evaluate, token_batches
from e2e_sae.log import logger
from e2e_sae.models.lm import load_lm, model_facts
from e2e_sae.models.sae_transformer import SAETransformer
from e2e_sae.precision import computing
from e2e_sae.saes import architecture_of, sae_config
from e2e_sae.setup import load_eval_batches
from e2e_sae.trackers import read_metrics
from e2e_sae.train import train

LR = 5e-5
"""Peak learning rate (arXiv 2503.17272)."""
SHARE = 0.05
"""Length, as a share of the samples that the SAE was trained on: the KL's in the paper's runs from scratch."""
KEPT = (
    "seed", "device", "autocast", "tf32", "compile", "train_data", "eval_data", "eval_n_samples", "batch_size",
    "effective_batch_size", "max_grad_norm", "log_every_n_grad_steps", "collect_act_frequency_every_n_samples",
    "act_frequency_n_tokens", "save_every_n_samples",
)  # fmt: skip
"""Settings that are taken over from the SAE's run."""
_MODEL_KEYS = ("tlens_model_name", "tlens_model_path", "tlens_model_revision", "tlens_model_checkpoint")


class Quality(NamedTuple):
    """What an evaluation says of the SAEs."""

    ce_increase: float
    """Next-token cross-entropy, spliced minus clean, nats per token."""
    l0: dict[str, float]
    """Active latents per token, by position."""

    def __str__(self) -> str:
        return f"CE increase {self.ce_increase:.4f}, L0 {', '.join(f'{l0:.1f}' for l0 in self.l0.values())}"


class FineTuned(NamedTuple):
    """A finished fine-tuning."""

    run_dir: Path
    """Its run's folder."""
    before: Quality
    """Of the SAE as it was."""
    after: Quality
    """Of the SAE as it is."""


def finetune(
    source: str | Path, config_file: str | Path | None = None, overrides: Sequence[str] = (), *, hold_l0: bool = False
) -> FineTuned:
    """Trains a stored SAE on, in a run of its own, and returns what it was and is worth.

    Args:
        source: a run folder or checkpoint of ours, a `.pt` or folder of the paper's library, a SAELens folder, or a W&B
            run (`entity/project/run_id`, `project/run_id`, URL).
        config_file: YAML of settings that go over those of the SAE's run; `train_data` and `eval_data` as a whole.
        overrides: `dotted.key=value` each, which go over both.
        hold_l0: whether the sparsity coefficient is moved so that L0 stays what it is.

    Raises:
        UserError: the SAE, its model or data cannot be had, or the settings do not go together.
        RunFailed: a loss or gradient became non-finite.
        Interrupted: a signal stopped it; `e2e-sae train --resume` goes on.
    """
    run = _open(source)
    config = finetune_config(run, config_file, overrides)
    lm = load_lm(config.lm, config.device)
    before = _measure(run, config, lm)
    logger.info(f"before: {before}")
    if hold_l0:
        config = _holding(config, before.l0)
    run_dir = train(config, lm=lm)
    assert run_dir is not None, "a fine-tuning has a folder"
    after = _final_quality(run_dir)
    logger.info(f"before: {before}")
    logger.info(f"after:  {after}")
    return FineTuned(run_dir, before, after)


def finetune_config(run: StoredRun, config_file: str | Path | None = None, overrides: Sequence[str] = ()) -> Config:
    """Returns the config of the run that trains stored SAEs on; see `finetune`.

    Raises:
        UserError: something that it needs is not known, or the settings do not go together.
    """
    file = None if config_file is None else Path(config_file)
    changes = rename_old_keys({} if file is None else read_yaml(file))
    given = rename_old_keys(apply_overrides(changes, overrides))
    if "saes" in given:
        raise UserError("finetune takes the SAEs as they are stored: leave 'saes' out of the config and of --set")
    old = rename_old_keys(run.config)
    values: dict[str, Any] = {key: old[key] for key in KEPT if old.get(key) is not None}
    if "train_data" in changes:
        values.pop("eval_data", None)  # of other data
    if not given.keys() & set(_MODEL_KEYS[:2]):
        values |= _model_values(run)
    values |= _processing_values(run)
    values |= {"wandb_run_name": f"finetuned_{_name(run)}", "eval_every_n_samples": 0}
    values["loss"] = deep_update(_loss(run, old, given), changes.pop("loss", None) or {})
    values = apply_overrides({**values, **changes}, overrides)
    for key, meaning in (("train_data", "which data to train on"), ("batch_size", "how many sequences go in a batch")):
        if values.get(key) is None:
            raise UserError(
                f"'{run.source}' does not say {meaning}: give '{key}' in --config YAML, with train_data, eval_data "
                "(or train_data.holdout_fraction), batch_size and n_samples"
            )
    if values.get("n_samples") is None:
        values["n_samples"] = _n_samples(run, values)
    values = {**_schedule(values), **values, "saes": _saes_values(run)}
    config = Config.from_dict(values, base_dir=run.source.parent if file is None else file.parent)
    if config.eval_every_n_samples is None or config.save_dir is None:
        raise UserError(
            "finetune measures the SAE at the end and keeps it: leave out save_dir and eval_every_n_samples"
        )
    return config


def _open(source: str | Path) -> StoredRun:
    if Path(source).expanduser().exists():
        return load_run(source)
    try:
        return load_run(fetch_wandb_run(str(source)))
    except (UserError, RunFailed) as error:
        raise MissingFileError(
            f"'{source}' is neither a file or folder nor a W&B run that can be had: {error}"
        ) from None


def _model_values(run: StoredRun) -> dict[str, Any]:
    """Returns which language model the SAEs belong to."""
    model = run.model
    if model is None:
        values = {key: run.config.get(key) for key in _MODEL_KEYS}
    else:
        found = (model.name, model.path, model.revision, model.checkpoint)
        values: dict[str, Any] = dict(zip(_MODEL_KEYS, found, strict=True))
    if not any(values[key] for key in _MODEL_KEYS[:2]):
        raise UserError(
            f"'{run.source}' does not say which language model it belongs to: set tlens_model_name or tlens_model_path"
        )
    path = values["tlens_model_path"]
    if path is not None and (run.source.parent / path).exists():
        values["tlens_model_path"] = str((run.source.parent / path).resolve())  # a legacy run's own folder comes first
    return {key: value for key, value in values.items() if value is not None}


def _processing_values(run: StoredRun) -> dict[str, Any]:
    """Returns how the model's weights are to be processed, and its type, as in the SAEs' training."""
    if run.model is None:
        known = ("tlens_processing", "dtype")
        return {key: run.config[key] for key in known if run.config.get(key) is not None}
    processing = run.model.processing
    return {"dtype": run.model.dtype} | ({} if processing is None else {"tlens_processing": processing.to_dict()})


def _name(run: StoredRun) -> str:
    """Returns what the SAE's run is called."""
    return run.source.parent.name if run.source.name.startswith("samples_") else run.source.stem


def _saes_values(run: StoredRun) -> dict[str, Any]:
    """Returns `saes:` of the config that begins with the stored SAEs."""
    infos = [stored.info for stored in run.saes.values()]
    kinds = [sae_config({**info.options, "architecture": info.architecture}).trained.to_dict() for info in infos]
    for info, kind in zip(infos, kinds, strict=True):
        differing = [key for key in kind.keys() | kinds[0].keys() if kind.get(key) != kinds[0].get(key)]
        if differing:
            raise UserError(
                f"'{run.source}' has SAEs of different kinds ({min(differing)} at {infos[0].write} and at "
                f"{info.write}), and those of one run are of one kind"
            )
    return {
        "sae_positions": [
            info.write if info.read == info.write else {"read": info.read, "write": info.write} for info in infos
        ],
        "d_sae": {info.write: info.d_sae for info in infos},
        "sae": kinds[0],
        "pretrained_sae_paths": [str(run.source.resolve())],
        "retrain_saes": True,
    }


def _loss(run: StoredRun, old: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Returns KL and MSE, balanced, with the sparsity penalty that the SAEs were trained with.

    Args:
        run: the SAEs.
        old: settings of their run, under today's names.
        given: what the user says.
    """
    loss = old.get("loss") or {}
    for phase in (old.get("phases") or [])[-1:]:
        loss = deep_update(loss, phase.get("loss") or {})
    sparsity = {key: value for key, value in (loss.get("sparsity") or {}).items() if value is not None}
    sparsity.pop("warmup_samples", None)
    if "final_coeff" in sparsity:
        sparsity["coeff"] = sparsity.pop("final_coeff")
    if "target_l0" in sparsity:
        sparsity["coeff"] = _last_coeff(run) or sparsity["coeff"]
    asked = ((given.get("loss") or {}).get("sparsity") or {}).get("coeff")
    info = next(iter(run.saes.values())).info
    options = sae_config({**info.options, "architecture": info.architecture})
    if not sparsity and asked is None and architecture_of(info.architecture).is_penalty_needed(options):
        raise UserError(
            f"'{run.source}' does not say how strongly sparsity was penalised: give loss.sparsity.coeff, in our unit "
            "(the L1 norm divided by d_in); with --hold-l0 it is where the search starts"
        )
    mse = (loss.get("out_to_in") or {}).get("coeff") or 1.0
    return {
        "sparsity": sparsity or {"coeff": 0.0},
        "out_to_in": {"coeff": mse},
        "logits_kl": {"coeff": 1.0},
        "kl_balance": "mse",
    }


def _last_coeff(run: StoredRun) -> float | None:
    """Returns the sparsity coefficient that a run with `target_l0` ended with; None if that is not known."""
    file = run.source.parent / METRICS_FILE
    lines = read_metrics(file) if file.is_file() else []
    found = [value for key, value in (lines[-1] if lines else {}).items() if key.startswith("sparsity/coeff/")]
    return sum(found) / len(found) if found else None


def _n_samples(run: StoredRun, values: Mapping[str, Any]) -> int:
    """Returns `SHARE` of the samples that the SAEs were trained on, in whole steps."""
    per_step = values.get("effective_batch_size") or values["batch_size"]
    if run.n_samples is None or not isinstance(per_step, int):
        raise UserError(f"'{run.source}' does not say how long it was trained: give n_samples")
    n_samples = math.ceil(SHARE * run.n_samples / per_step) * per_step
    logger.info(f"n_samples: {n_samples}, {SHARE:.0%} of the {run.n_samples} that the SAE was trained on")
    return n_samples


def _schedule(values: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the learning rate and how it falls in a line to 0, for what is not given."""
    n_samples, n_warmup = values["n_samples"], values.get("warmup_samples", 0)
    is_line = values.get("lr_schedule", "linear") == "linear"
    falls = is_line and isinstance(n_samples, int) and isinstance(n_warmup, int)
    return {
        "lr": LR,
        "lr_schedule": "linear",
        "min_lr_factor": 0.0,
        **({"cooldown_samples": max(0, n_samples - n_warmup)} if falls else {}),
    }


def _holding(config: Config, l0: Mapping[str, float]) -> Config:
    """Returns the config with what L0 is now as its target."""
    if len(l0) > 1:
        raise UserError(f"--hold-l0 goes with one SAE, here are {len(l0)}: set loss.sparsity.target_l0")
    (target,) = l0.values()
    values = deep_update(config.to_dict(), {"loss": {"sparsity": {"target_l0": target, "final_coeff": None}}})
    return Config.from_dict(values)


def _measure(run: StoredRun, config: Config, lm: nn.Module) -> Quality:
    """Returns what the SAEs are worth as they are stored."""
    model, batches = SAETransformer.from_run(run, lm), load_eval_batches(config, lm)
    assert batches is not None, "there are evaluation data"
    data, device = config.eval_data or config.train_data, model_facts(lm).device
    n_samples = config.eval_n_samples or batches.n_samples
    tokens = token_batches(batches, config.batch_size, n_samples, data.exclude_token_ids, device)
    n_batches = None if n_samples is None else -(-n_samples // config.batch_size)
    with computing(config.arithmetic, device):
        return _quality(evaluate(model, tokens, config.final_loss, n_batches).metrics)


def _final_quality(run_dir: Path) -> Quality:
    return _quality(read_json(RunDir.open(run_dir).summary_file))


def _quality(metrics: Mapping[str, Any]) -> Quality:
    stem = "sparsity/eval/L_0/"
    l0 = {key.removeprefix(stem): value for key, value in metrics.items() if key.startswith(stem)}
    return Quality(metrics["performance/eval/ce_increase"], l0)
