"""Trains SAEs on a TransformerLens model.

`python run_train_tlens_saes.py <config.yaml> [--set a.b=c] [--resume DIR]` is `e2e-sae train` with the same arguments.
"""

from collections.abc import Sequence
from pathlib import Path

from e2e_sae.base_config import apply_overrides
from e2e_sae.config import Config
from e2e_sae.errors import UserError
from e2e_sae.train import resume_training, train


def main(
    config_path_or_obj: Path | str | Config | None,
    sweep_config_path: Path | str | None = None,
    *,
    overrides: Sequence[str] = (),
    resume: Path | str | None = None,
) -> Path | None:
    """Trains, or continues a run, and returns the run's folder.

    Args:
        config_path_or_obj: a YAML file or a `Config`; None only with `resume`.
        sweep_config_path: accepted as in the paper's library; a sweep's values come through W&B.
        overrides: `dotted.key=value` each.
        resume: folder of a run to continue.
    """
    del sweep_config_path
    config = config_path_or_obj
    if isinstance(config, Config):
        config = Config.from_dict(apply_overrides(config.to_dict(), overrides)) if overrides else config
    elif config is not None:
        config = Config.from_file(config, overrides)
    elif overrides:
        raise UserError("--set needs a config: a resumed run keeps its own settings")
    if resume is not None:
        return resume_training(resume, config)
    if config is None:
        raise UserError("nothing to train: give a config file, or --resume RUN_DIR")
    return train(config)


if __name__ == "__main__":
    import sys

    from e2e_sae.scripts.cli import main as command_line

    raise SystemExit(command_line(["train", *sys.argv[1:]]))
