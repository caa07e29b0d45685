"""From a config to everything a run needs: what members share, then each member; checked before anything is written."""

import shutil
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from e2e_sae.acts import Scales
from e2e_sae.checkpoint import load_run
from e2e_sae.checkpoint.files import read_json, write_json
from e2e_sae.checkpoint.records import StoredModel, StoredSAE
from e2e_sae.checkpoint.run_dir import RunDir, read_checkpoint
from e2e_sae.config import Config
from e2e_sae.data.batches import TokenBatches, load_token_batches, same_rows
from e2e_sae.data_init import Beginner, initialise_from_data
from e2e_sae.errors import UserError
from e2e_sae.evaluate import token_batches
from e2e_sae.group import member_configs
from e2e_sae.guarded_optimizer import check_installed
from e2e_sae.hooks import check_per_token, exact_hook_name, is_later
from e2e_sae.log import logger
from e2e_sae.losses import LossConfigs
from e2e_sae.member import Member
from e2e_sae.models.lm import is_bridge, load_lm, model_facts
from e2e_sae.models.positions import resolve_positions
from e2e_sae.models.sae_transformer import SAETransformer
from e2e_sae.models.stored import changed_options, check_same_model, copy_parameters
from e2e_sae.phases import Phase, plan_phases
from e2e_sae.precision import computing
from e2e_sae.resume import Resumed
from e2e_sae.saes import SAE, own_file
from e2e_sae.saes.scaling import unfold_
from e2e_sae.seeds import evaluation_seed
from e2e_sae.sparsity_control import Stage, sparsity_stages
from e2e_sae.trackers import JsonlTracker, cut_back
from e2e_sae.wandb_tracker import WandbRunId, WandbTracker, start_wandb


@dataclass(frozen=True)
class Parts:
    """What `train` puts together."""

    lm: nn.Module
    members: list[Member]
    train_batches: TokenBatches
    eval_batches: TokenBatches | None
    n_groups: int | None
    device: torch.device

    @property
    def member(self) -> Member:
        """The first member: of a run without `members`, the one there is."""
        return self.members[0]


class _Planned(NamedTuple):
    """A member that has been checked, before anything of it is on disk."""

    config: Config
    model: SAETransformer
    phases: list[Phase]
    stages: list[Stage]
    beginners: list[Beginner]
    """Its SAEs before they are trained; of a resumed run, none."""


def set_up(
    config: Config, resume: Sequence[Resumed] = (), wandb: WandbTracker | None = None, lm: nn.Module | None = None
) -> Parts:
    """Loads the model and the data, builds the SAEs, and only then makes the run folders and starts W&B.

    Args:
        config: what to set up.
        resume: the old runs that go on, one for each member.
        wandb: a W&B run that has been started already.
        lm: the config's language model, if it has been loaded already.

    Raises:
        UserError: anything that the config asks for is not there or does not fit.
    """
    configs = member_configs(config)
    if wandb is not None and len(configs) > 1:
        raise UserError(
            "a run of a W&B sweep cannot have members: `e2e-sae sweep --shared` trains a sweep's runs together"
        )
    shared = configs[0]  # the data seeds are the same in all
    lm = load_lm(shared.lm, shared.device) if lm is None else lm
    train_batches, eval_batches = _load_data(shared, lm)
    n_groups = _plan(shared, train_batches)
    n_samples = None if n_groups is None else shared.n_samples or train_batches.n_samples
    olds = list(resume) or [None] * len(configs)
    planned = [_plan_member(c, lm, n_samples, n_groups, old) for c, old in zip(configs, olds, strict=True)]
    for names in dict.fromkeys(", ".join(map(str, plan.model.positions)) for plan in planned):
        logger.info(f"SAEs at: {names}")
    _initialise_from_data(shared, lm, [one for plan in planned for one in plan.beginners], train_batches)
    members = [_make_member(plan, lm, old) for plan, old in zip(planned, olds, strict=True)]
    for n, member in enumerate(members, start=1):
        if len(members) > 1:
            member.label = f"member {n} of {len(members)}, {member.config.run_name}"
        if member.run_dir is not None:
            logger.info(f"run folder: {member.run_dir.path}")
    # Last: a mistake that is found above leaves no run behind at W&B.
    _start_wandb(members, wandb)
    return Parts(lm, members, train_batches, eval_batches, n_groups, model_facts(lm).device)


def load_eval_batches(config: Config, lm: nn.Module) -> TokenBatches | None:
    """Returns the rows that a config evaluates on; None if it names none."""
    if config.eval_data is None and config.train_data.holdout_fraction is None:
        return None
    facts = model_facts(lm)
    return load_token_batches(
        config.eval_data or config.train_data,
        global_seed=evaluation_seed(config.seed),
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


def _initialise_from_data(config: Config, lm: nn.Module, beginners: Sequence[Beginner], batches: TokenBatches) -> None:
    device, excluded = model_facts(lm).device, config.train_data.exclude_token_ids
    with (
        computing(config.arithmetic, device),
        closing(token_batches(batches, config.batch_size, None, excluded, device)) as first,
    ):
        initialise_from_data(lm, beginners, first)


def _with_exact_downstream(loss: LossConfigs, lm: nn.Module, sae_names: Sequence[str]) -> LossConfigs:
    """Checks `in_to_orig.hook_positions` and gives them their canonical names."""
    in_to_orig = loss.in_to_orig
    if in_to_orig is None:
        return loss
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
    return loss.model_copy(update={"in_to_orig": in_to_orig.model_copy(update={"hook_positions": names})})


def _load_pretrained(model: SAETransformer, paths: Sequence[Path], retrain: bool) -> set[str]:
    """Replaces initial SAEs by stored ones and returns their names; later files win. Without `retrain`, what was loaded
    is frozen."""
    found: set[str] = set()
    for path in paths:
        run = load_run(path)
        check_same_model(run, model.tlens_model)
        names = [name for name, stored in run.saes.items() if stored.info.position in model.positions]
        if not names:
            theirs = [str(stored.info.position) for stored in run.saes.values()]
            ours = [str(position) for position in model.positions]
            raise UserError(f"'{path}' has SAEs at {theirs}, none of them at this run's positions {ours}")
        unused = [name for name in run.saes if name not in names]
        if unused:
            logger.info(f"'{path}' also has SAEs at {', '.join(unused)}, where this run has none: left out")
        for name in names:
            (sae,) = model.saes_at([name]).values()
            copy_parameters(sae, run.saes[name], path)
            _check_options(sae, run.saes[name], path, retrain)
            sae.requires_grad_(retrain)
        found.update(names)
    if not retrain and found == set(model.raw_sae_positions):
        raise UserError(
            "nothing is left to train: every SAE comes from saes.pretrained_sae_paths and saes.retrain_saes is false"
        )
    return found


def _check_options(sae: SAE, stored: StoredSAE, path: Path, retrain: bool) -> None:
    """Says if an SAE is not to compute what it computed where it was stored, which only one that trains on may."""
    changed = changed_options(sae, stored)
    what = ", ".join(f"{key}: {before} -> {now}" for key, (before, now) in changed.items())
    if changed and not retrain:
        raise UserError(
            f"the SAE at {stored.info.write} in '{path}' has other options ({what}): set them in saes.sae as they "
            "were, or let it train on with saes.retrain_saes: true"
        )
    if changed:
        logger.info(f"the SAE at {stored.info.write} in '{path}' trains on with other options ({what})")


def _plan_member(
    config: Config, lm: nn.Module, n_samples: int | None, n_steps: int | None, resume: Resumed | None
) -> _Planned:
    """Builds a member's SAEs, with what is stored of them."""
    check_installed(config.optimizer)
    if n_samples is not None and resume is None:
        config.saes.sae.check_length(n_samples)
    phases = plan_phases(config, n_samples, n_steps)
    positions = resolve_positions(lm, config.saes.sae_positions)
    names = [position.name for position in positions]
    phases = [phase._replace(loss=_with_exact_downstream(phase.loss, lm, names)) for phase in phases]
    if config.phases is None:
        config = config.model_copy(update={"loss": phases[0].loss})
    saes = config.saes
    model = SAETransformer(
        lm, positions, saes.dict_size_to_input_ratio, d_sae=saes.d_sae, seed=config.seed, sae=saes.sae
    )
    model.saes.to(model_facts(lm).device)
    pretrained: set[str] = set()
    if saes.pretrained_sae_paths:
        pretrained = _load_pretrained(model, saes.pretrained_sae_paths, saes.retrain_saes)
    if resume is not None and resume.checkpoint is not None:
        run = read_checkpoint(resume.checkpoint)
        check_same_model(run, lm)
        for name, stored in run.saes.items():
            (sae,) = model.saes_at([name]).values()
            copy_parameters(sae, stored, resume.checkpoint)
            unfold_(sae, Scales(*stored.info.scales))
    # After loading, which takes over a stored float64.
    model.saes.to(torch.float64 if config.dtype == "float64" else torch.float32)
    d_saes = {
        position.name: sae.d_sae
        for position, sae in model.saes_at().items()
        if any(parameter.requires_grad for parameter in sae.parameters())
    }
    stages = sparsity_stages([(phase.first_step, phase.loss.sparsity) for phase in phases], d_saes, n_steps)
    beginners = [
        Beginner(position, sae, position.name not in pretrained)
        for position, sae in model.saes_at().items()
        if (resume is None or resume.checkpoint is None) and any(p.requires_grad for p in sae.parameters())
    ]
    return _Planned(config, model, phases, stages, beginners)


def _make_member(plan: _Planned, lm: nn.Module, resume: Resumed | None) -> Member:
    """Opens a member's run folder."""
    config = plan.config
    run_dir = _open_run_dir(config, resume)
    member = Member(config, plan.model, plan.phases, plan.stages, run_dir, _stored_model(config, lm))
    if resume is not None and resume.state is not None:
        member.load_state(resume.state)
    if run_dir is not None:
        member.trackers.append(JsonlTracker(run_dir.metrics_file))
    return member


def _open_run_dir(config: Config, resume: Resumed | None) -> RunDir | None:
    if resume is not None:
        resume.run_dir.go_back_to(resume.checkpoint)
        cut_back(resume.run_dir.metrics_file, resume.loop_state["n_samples"] if resume.loop_state else 0)
        return resume.run_dir
    if config.save_dir is None:
        return None
    run_dir = RunDir.create(config.save_dir, config.run_name, config.to_yaml())
    own = own_file(config.saes.sae.architecture)
    if own is not None:
        shutil.copyfile(own, run_dir.path / own.name)
    return run_dir


def _start_wandb(members: Sequence[Member], started: WandbTracker | None) -> None:
    """Gives every member its W&B run if the config asks for it; a resumed one goes on in the W&B run that it began."""
    for member in members:
        config, run_dir, known, tracker = member.config, member.run_dir, None, started
        if tracker is None and config.wandb_project is not None:
            if run_dir is not None and run_dir.wandb_file.exists():
                known = WandbRunId.from_dict(read_json(run_dir.wandb_file))
            tracker = start_wandb(config.wandb_project, known, beside_others=member is not members[0])
        if tracker is None:
            return  # whatever kept it away would keep the others' away as well
        tracker.describe(config.run_name, config)
        if run_dir is not None:
            write_json(run_dir.wandb_file, tracker.run_id.to_dict())
        member.trackers.append(tracker)


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
