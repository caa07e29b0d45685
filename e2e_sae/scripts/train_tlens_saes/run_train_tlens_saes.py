"""Trains SAEs on a TransformerLens model.

`python run_train_tlens_saes.py <config.yaml> [--set a.b=c] [--resume DIR]` is `e2e-sae train` with the same arguments.

Started by a `wandb agent`, it puts the values that the sweep has chosen over those of the config.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from e2e_sae.base_config import apply_overrides, deep_update, read_yaml
from e2e_sae.config import Config, rename_old_keys
from e2e_sae.errors import UserError
from e2e_sae.lazy import lazy_names
from e2e_sae.train import resume_training, train
from e2e_sae.wandb_tracker import is_started_by_sweep_agent, join_sweep


def main(
    config_path_or_obj: Path | str | Config | None,
    sweep_config_path: Path | str | None = None,
    *,
    overrides: Sequence[str] = (),
    resume: Path | str | Sequence[Path | str] | None = None,
) -> Path | None:
    """Trains, or continues a run, and returns the run's folder (with `members`, the first one's).

    Args:
        config_path_or_obj: a YAML file or a `Config`; None only with `resume`.
        sweep_config_path: accepted as in the paper's library; a sweep's values come through W&B.
        overrides: `dotted.key=value` each.
        resume: folder of a run to continue, or the folders of members that go on together.
    """
    del sweep_config_path
    given = config_path_or_obj
    if given is None and overrides:
        raise UserError("--set needs a config: a resumed run keeps its own settings")
    if resume is not None:
        return resume_training(resume, None if given is None else _config(given, overrides))
    if given is None:
        raise UserError("nothing to train: give a config file, or --resume RUN_DIR")
    if not is_started_by_sweep_agent():
        return train(_config(given, overrides))
    tracker = join_sweep()
    try:
        return train(_config(given, overrides, tracker.sweep_values), wandb=tracker)
    except BaseException:
        tracker.close(failed=True)  # where `train` has not done so
        raise


def _config(
    given: Path | str | Config, overrides: Sequence[str], sweep_values: Mapping[str, Any] | None = None
) -> Config:
    """Returns the given config with the overrides in it, and over both the values of a sweep."""
    if isinstance(given, Config):
        values, base_dir = given.to_dict(), None
    else:
        values, base_dir = read_yaml(Path(given)), Path(given).parent
    values = apply_overrides(values, overrides)
    if sweep_values:
        # Today's names on both sides: else an old key in the sweep would lose to the config's new one.
        values = deep_update(rename_old_keys(values), rename_old_keys(sweep_values))
    return Config.from_dict(values, base_dir=base_dir)


__getattr__ = lazy_names(__name__, {"SAEsConfig": "e2e_sae.config", "evaluate": "e2e_sae.legacy.evaluate"})


if __name__ == "__main__":
    import sys

    from e2e_sae.scripts.cli import main as command_line

    arguments = sys.argv[1:]
    if len(arguments) == 2 and not any(argument.startswith("-") for argument in arguments):
        arguments.pop()  # the paper's library takes a sweep file here; its values come through the agent
    raise SystemExit(command_line(["train", *arguments]))
