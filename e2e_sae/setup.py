"""From a config to everything a run needs, checked before anything is written; and where an old run goes on."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from e2e_sae.checkpoint import load_run
from e2e_sae.checkpoint.files import read_json, write_json
from e2e_sae.checkpoint.records import StoredModel
from e2e_sae.checkpoint.run_dir import RunDir, read_checkpoint, read_checkpoint_info, read_resume_state
from e2e_sae.config import Config
from e2e_sae.data.batches import TokenBatches, load_token_batches, same_rows
from e2e_sae.errors import CheckpointError, UserError
from e2e_sae.hooks import check_per_token, exact_hook_name, is_later, resolve_hook_names
from e2e_sae.log import logger
from e2e_sae.member import Member
from e2e_sae.models.lm import is_bridge, load_lm, model_facts
from e2e_sae.models.sae_transformer import SAETransformer
from e2e_sae.models.stored import check_same_model, copy_parameters
from e2e_sae.optim import make_schedule
from e2e_sae.trackers import JsonlTracker, cut_back
from e2e_sae.wandb_tracker import WandbRunId, WandbTracker, start_wandb

HARMLESS_KEYS = {
    "wandb_project", "wandb_run_name", "wandb_run_name_prefix", "device", "save_dir", "save_every_n_samples",
    "log_every_n_grad_steps", "eval_every_n_samples", "eval_n_samples", "eval_data",
    "collect_act_frequency_every_n_samples", "act_frequency_n_tokens",
}  # fmt: skip
"""Keys that may differ when a run is resumed: none of them changes the weights."""


@dataclass(frozen=True)
class Resumed:
    """An old run, and where it goes on."""

    run_dir: RunDir
    """Its folder."""
    config: Config
    """The config to go on with."""
    checkpoint: Path | None
    """The newest whole checkpoint; None: start over."""
    state: dict[str, Any] | None
    """What it saved of the loop, the optimizer and the statistics."""
    is_finished: bool = False
    """Whether there is nothing left to do."""

    @property
    def loop_state(self) -> dict[str, int] | None:
        """Where the loop was."""
        return self.state["loop"] if self.state else None


@dataclass(frozen=True)
class Parts:
    """What `train` puts together."""

    lm: nn.Module
    member: Member
    train_batches: TokenBatches
    eval_batches: TokenBatches | None
    n_groups: int | None
    device: torch.device


def set_up(config: Config, resume: Resumed | None = None, wandb: WandbTracker | None = None) -> Parts:
    """Loads the model and the data, builds the SAEs, and only then makes the run's folder and starts W&B.

    Args:
        config: what to set up.
        resume: the old run that goes on.
        wandb: a W&B run that has been started already.

    Raises:
        UserError: anything that the config asks for is not there or does not fit.
    """
    lm = load_lm(config.lm, config.device)
    facts = model_facts(lm)
    train_batches, eval_batches = _load_data(config, lm)
    n_groups = _plan(config, train_batches)
    n_samples = None if n_groups is None else config.n_samples or train_batches.n_samples
    schedule = make_schedule(
        config.lr_schedule,
        n_samples=n_samples,
        effective_batch_size=config.samples_per_step,
        warmup_samples=config.warmup_samples,
        cooldown_samples=config.cooldown_samples,
        min_factor=config.min_lr_factor,
    )
    names = resolve_hook_names(lm, config.saes.sae_positions)
    logger.info(f"SAEs at: {', '.join(names)}")
    config = _with_exact_downstream(config, lm, names)
    model = SAETransformer(lm, names, config.saes.dict_size_to_input_ratio, seed=config.seed)
    model.saes.to(facts.device)
    if config.saes.pretrained_sae_paths:
        _load_pretrained(model, config.saes.pretrained_sae_paths, config.saes.retrain_saes)
    if resume is not None and resume.checkpoint is not None:
        run = read_checkpoint(resume.checkpoint)
        check_same_model(run, lm)
        for name, stored in run.saes.items():
            (sae,) = model.saes_at([name]).values()
            copy_parameters(sae, stored, resume.checkpoint)
    # After loading, which takes over a stored float64.
    model.saes.to(torch.float64 if config.dtype == "float64" else torch.float32)
    run_dir = _open_run_dir(config, resume)
    member = Member(config, model, schedule, run_dir, _stored_model(config, lm))
    if resume is not None and resume.state is not None:
        member.load_state(resume.state)
    if run_dir is not None:
        logger.info(f"run folder: {run_dir.path}")
        member.trackers.append(JsonlTracker(run_dir.metrics_file))
    # Last: a mistake that is found above leaves no run behind at W&B.
    wandb = wandb or _start_wandb(config, run_dir)
    if wandb is not None:
        wandb.describe(config.run_name, config)
        if run_dir is not None:
            write_json(run_dir.wandb_file, wandb.run_id.to_dict())
        member.trackers.append(wandb)
    return Parts(lm, member, train_batches, eval_batches, n_groups, facts.device)


def prepare_resume(path: str | Path, config: Config | None = None) -> Resumed:
    """Finds where an interrupted run goes on, and changes nothing yet; see `train.resume_training`."""
    run_dir = RunDir.open(path)
    own = Config.from_file(run_dir.config_file)
    if config is not None:
        _check_same_mathematics(own, config)
    config = config or own
    for checkpoint in run_dir.checkpoints():
        try:
            read_checkpoint_info(checkpoint)
        except CheckpointError as error:
            logger.warning(f"{error}: trying the one before")
            continue
        if run_dir.summary_file.exists() and checkpoint == run_dir.checkpoints()[0]:
            logger.info(f"this run is finished: {checkpoint}")
            return Resumed(run_dir, config, checkpoint, None, is_finished=True)
        # A whole checkpoint without it is an error, not a reason to go further back or to start over.
        state = read_resume_state(checkpoint)
        logger.info(f"resuming from {checkpoint.name}")
        return Resumed(run_dir, config, checkpoint, state)
    logger.info(f"'{run_dir.path}' has no whole checkpoint: starting over in the same folder")
    return Resumed(run_dir, config, None, None)


def load_eval_batches(config: Config, lm: nn.Module) -> TokenBatches | None:
    """Returns the rows that a config evaluates on; None if it names none."""
    if config.eval_data is None and config.train_data.holdout_fraction is None:
        return None
    facts = model_facts(lm)
    return load_token_batches(
        config.eval_data or config.train_data,
        # The paper's library's evaluation seed.
        global_seed=config.seed + 42,
        part="all" if config.eval_data else "eval",
        tokenizer=getattr(lm, "tokenizer", None),
        d_vocab=facts.d_vocab,
        max_n_ctx=facts.n_ctx,
    )


def _load_data(config: Config, lm: nn.Module) -> tuple[TokenBatches, TokenBatches | None]:
    facts = model_facts(lm)
    train_batches = load_token_batches(
        config.train_data,
        global_seed=config.seed,
        part="all" if config.train_data.holdout_fraction is None else "train",
        tokenizer=getattr(lm, "tokenizer", None),
        d_vocab=facts.d_vocab,
        max_n_ctx=facts.n_ctx,
    )
    wants_evaluation = config.eval_every_n_samples is not None
    eval_batches = load_eval_batches(config, lm) if wants_evaluation else None
    if wants_evaluation and config.eval_data and same_rows(config.train_data, config.eval_data):
        logger.warning(
            "train_data and eval_data read the same rows: the evaluation is not on held-out data "
            "(train_data.holdout_fraction keeps a part back)"
        )
    return train_batches, eval_batches


def _plan(config: Config, batches: TokenBatches) -> int | None:
    """Returns the number of optimizer steps; None if the data's length is not known and none is given."""
    known, wanted = batches.n_samples, config.n_samples
    if known is not None and wanted is not None and wanted > known:
        raise UserError(
            f"n_samples={wanted} is more than the {known} rows of train_data (n_epochs={config.train_data.n_epochs}): "
            "lower n_samples or raise train_data.n_epochs"
        )
    n_samples = wanted if wanted is not None else known
    if n_samples is None:
        return None
    n_batches = -(-n_samples // config.batch_size)
    n_groups, n_dropped = divmod(n_batches, config.n_accumulation)
    if n_groups == 0:
        raise UserError(
            f"n_samples={n_samples} is less than one optimizer step of {config.samples_per_step} samples: "
            "raise n_samples or lower effective_batch_size"
        )
    if n_dropped:
        logger.info(
            f"the last {n_dropped} of {n_batches} batches make no whole optimizer step of {config.n_accumulation} "
            "batches: dropped"
        )
    return n_groups


def _with_exact_downstream(config: Config, lm: nn.Module, sae_names: Sequence[str]) -> Config:
    """Checks `in_to_orig.hook_positions` and gives them their canonical names."""
    in_to_orig = config.loss.in_to_orig
    if in_to_orig is None:
        return config
    names = list(dict.fromkeys(exact_hook_name(lm, name) for name in in_to_orig.hook_positions))
    check_per_token(lm, names)
    # The SAEs' names are in the order of the computation.
    unreached = [name for name in names if not is_later(name, sae_names[0])]
    if len(unreached) == len(names):
        raise UserError(
            f"loss.in_to_orig.hook_positions {unreached} do not come after the first SAE ({sae_names[0]}): it cannot "
            "change them, name later points"
        )
    if unreached:
        logger.warning(
            f"loss.in_to_orig.hook_positions {unreached} do not come after the first SAE ({sae_names[0]}): their loss "
            "is always 0 and they take a share of total_coeff; leave them out"
        )
    loss = config.loss.model_copy(update={"in_to_orig": in_to_orig.model_copy(update={"hook_positions": names})})
    return config.model_copy(update={"loss": loss})


def _load_pretrained(model: SAETransformer, paths: Sequence[Path], retrain: bool) -> None:
    """Replaces initial SAEs by stored ones; later files win. Without `retrain`, what was loaded is frozen."""
    found: set[str] = set()
    for path in paths:
        run = load_run(path)
        check_same_model(run, model.tlens_model)
        names = [name for name in run.saes if name in model.raw_sae_positions]
        if not names:
            raise UserError(
                f"'{path}' has SAEs at {list(run.saes)}, none of them at this run's positions {model.raw_sae_positions}"
            )
        unused = [name for name in run.saes if name not in names]
        if unused:
            logger.info(f"'{path}' also has SAEs at {', '.join(unused)}, where this run has none: left out")
        for name in names:
            (sae,) = model.saes_at([name]).values()
            copy_parameters(sae, run.saes[name], path)
            sae.requires_grad_(retrain)
        found.update(names)
    if not retrain and found == set(model.raw_sae_positions):
        raise UserError(
            "nothing is left to train: every SAE comes from saes.pretrained_sae_paths and saes.retrain_saes is false"
        )


def _open_run_dir(config: Config, resume: Resumed | None) -> RunDir | None:
    if resume is not None:
        resume.run_dir.go_back_to(resume.checkpoint)
        cut_back(resume.run_dir.metrics_file, resume.loop_state["n_samples"] if resume.loop_state else 0)
        return resume.run_dir
    if config.save_dir is None:
        return None
    return RunDir.create(config.save_dir, config.run_name, config.to_yaml())


def _start_wandb(config: Config, run_dir: RunDir | None) -> WandbTracker | None:
    """Starts W&B if the config asks for it; a resumed run goes on in the W&B run that it began."""
    if config.wandb_project is None:
        return None
    known = None
    if run_dir is not None and run_dir.wandb_file.exists():
        known = WandbRunId.from_dict(read_json(run_dir.wandb_file))
    return start_wandb(config.wandb_project, known)


def _stored_model(config: Config, lm: nn.Module) -> StoredModel:
    facts = model_facts(lm)
    path = config.tlens_model_path
    as_stored = path is not None and path.is_file()
    return StoredModel(
        name=config.tlens_model_name,
        path=None if path is None else str(path),
        revision=config.tlens_model_revision,
        checkpoint=config.tlens_model_checkpoint,
        model_class="bridge" if is_bridge(lm) else "hooked",
        processing=None if as_stored else config.tlens_processing,
        dtype=config.dtype,
        d_model=facts.d_model,
        n_layers=facts.n_layers,
        d_vocab=facts.d_vocab,
    )


def _check_same_mathematics(old: Config, new: Config) -> None:
    before, after = _flat(old.to_dict()), _flat(new.to_dict())
    changed = [
        f"{key}: {before.get(key)!r} -> {after.get(key)!r}"
        for key in sorted(before.keys() | after.keys())
        if key.split(".")[0] not in HARMLESS_KEYS and before.get(key) != after.get(key)
    ]
    if changed:
        raise UserError(
            f"cannot resume with a config that changes what is computed ({'; '.join(changed)}): "
            "start a new run, or resume without a config"
        )


def _flat(values: Any, prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat
