"""Where interrupted runs go on: alone, or several together from the newest checkpoint that all of them have."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from e2e_sae.checkpoint.run_dir import RunDir, read_checkpoint_info, read_resume_state
from e2e_sae.config import Config
from e2e_sae.errors import CheckpointError, UserError
from e2e_sae.group import flat_settings, group_config
from e2e_sae.log import logger

HARMLESS_KEYS = {
    "wandb_project", "wandb_run_name", "wandb_run_name_prefix", "device", "save_dir", "save_every_n_samples",
    "log_every_n_grad_steps", "eval_every_n_samples", "eval_n_samples", "eval_data",
    "collect_act_frequency_every_n_samples", "act_frequency_n_tokens", "compile",
}  # fmt: skip
"""Keys that may differ when a run is resumed: none of them changes the weights, but for the order of additions
(`device`, `compile`). `autocast` and `tf32` do: they are a run's precision, like `dtype`."""


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

    @property
    def loop_state(self) -> dict[str, int] | None:
        """Where the loop was."""
        return self.state["loop"] if self.state else None


def prepare_resume(paths: Sequence[str | Path], config: Config | None = None) -> list[Resumed]:
    """Finds where interrupted runs go on, and changes nothing yet; those that are finished are left out.

    Args:
        paths: run folders; of several, all go on together.
        config: must not change the mathematics; None: the runs' own. For one run only.

    Raises:
        UserError: there is no such run, the config changes what is computed, or the runs do not go together.
    """
    run_dirs = list(dict.fromkeys(RunDir.open(path) for path in paths))
    configs = [Config.from_file(run_dir.config_file) for run_dir in run_dirs]
    if config is not None:
        if len(run_dirs) > 1:
            raise UserError("a config goes with one resumed run only: several keep their own settings")
        _check_same_mathematics(configs[0], config)
        configs = [config]
    group_config(configs)
    unfinished = [(run_dir, c) for run_dir, c in zip(run_dirs, configs, strict=True) if not _is_finished(run_dir)]
    if not unfinished:
        return []
    name = _newest_checkpoint([run_dir for run_dir, _ in unfinished])
    found: list[Resumed] = []
    for run_dir, own in unfinished:
        checkpoint = None if name is None else run_dir.path / name
        # A whole checkpoint without it is an error, not a reason to go further back or to start over.
        state = None if checkpoint is None else read_resume_state(checkpoint)
        found.append(Resumed(run_dir, own, checkpoint, state))
        if checkpoint is None:
            logger.info(f"'{run_dir.path}' has no whole checkpoint: starting over in the same folder")
    if name is not None:
        logger.info(f"resuming from {name}")
    return found


def _is_finished(run_dir: RunDir) -> bool:
    saved = run_dir.checkpoints()
    if not saved or not run_dir.summary_file.exists():
        return False
    try:
        read_checkpoint_info(saved[0])
    except CheckpointError:
        return False  # told where it is passed over
    logger.info(f"this run is finished: {saved[0]}")
    return True


def _newest_checkpoint(run_dirs: Sequence[RunDir]) -> str | None:
    """Returns the name of the newest checkpoint that every run has whole; None: there is none at all.

    Raises:
        UserError: some have gone on without the others.
    """
    saved = [run_dir.checkpoints() for run_dir in run_dirs]
    if len(run_dirs) > 1:
        # The older ones of a run that went on alone are no place for the others to go on from.
        saved = [[path for path in paths if (path / "resume.pt").exists()] for paths in saved]
    names = [[path.name for path in paths] for paths in saved]
    for name in [name for name in names[0] if all(name in others for others in names)]:
        try:
            for run_dir in run_dirs:
                read_checkpoint_info(run_dir.path / name)
        except CheckpointError as error:
            logger.warning(f"{error}: trying the one before")
            continue
        return name
    # A process that was killed at its first save has left at most one.
    if len(run_dirs) > 1 and max(map(len, names)) > 1:
        newest = ", ".join(found[0] if found else "none" for found in names)
        raise UserError(f"these runs have no checkpoint in common to go on from (newest: {newest}): resume them alone")
    return None


def _check_same_mathematics(old: Config, new: Config) -> None:
    before, after = flat_settings(old.to_dict()), flat_settings(new.to_dict())
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
