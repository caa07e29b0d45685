"""A sweep's YAML as `wandb sweep` takes it, with the base config and the program that it names."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import PositiveInt

from e2e_sae.base_config import BaseConfig, read_yaml
from e2e_sae.errors import MissingFileError, UserError
from e2e_sae.log import logger
from e2e_sae.settings import REPO_ROOT
from e2e_sae.sweeps.parameters import Number, Parameter, read_parameters


class MetricConfig(BaseConfig):
    """What the sweep is to make better."""

    name: str
    """A log key."""
    goal: Literal["minimize", "maximize"] = "minimize"
    """Which way is better."""
    target: Number | None = None
    """W&B stops a sweep that reaches it; ignored here."""


class SweepConfig(BaseConfig):
    """The keys of https://docs.wandb.ai/guides/sweeps/sweep-config-keys."""

    program: str
    """The script."""
    method: Literal["grid", "random", "bayes"]
    """How values are chosen."""
    parameters: dict[str, Any]
    """What varies."""
    command: list[str] | None = None
    """How W&B starts the program; the base config is its argument that ends in .yaml."""
    metric: MetricConfig | None = None
    """What bayes improves."""
    run_cap: PositiveInt | None = None
    """Runs at most."""
    name: str | None = None
    """For W&B."""
    description: str | None = None
    """For W&B."""
    project: str | None = None
    """For W&B."""
    entity: str | None = None
    """For W&B."""
    early_terminate: dict[str, Any] | None = None
    """Ignored here."""


@dataclass(frozen=True)
class Sweep:
    """A sweep file that has been read, with what it names."""

    file: Path
    """The YAML."""
    config: SweepConfig
    """What it says."""
    parameters: list[Parameter]
    """Every setting in it, in W&B's order."""
    program: Path
    """The script that each run starts."""
    base_file: Path
    """The base config."""
    base: dict[str, Any]
    """What that says."""
    n_runs: int | None
    """Runs at most; None: the whole grid."""

    @property
    def name(self) -> str:
        """Names the sweep in tables and folders: the file's name without its ending."""
        return self.file.stem

    @property
    def varied(self) -> list[Parameter]:
        """The settings that differ between runs."""
        return [p for p in self.parameters if not p.is_constant and (self.config.method != "grid" or len(p.grid()) > 1)]


def read_sweep(path: str | Path, count: int | None = None) -> Sweep:
    """Reads and checks a sweep file.

    Args:
        path: the YAML.
        count: runs at most, as `wandb agent --count`.

    Raises:
        MissingFileError: it, its program or its base config is not there.
        UserError: it is malformed.
    """
    file = Path(path)
    values = read_yaml(file)
    try:
        config = SweepConfig.from_dict(values)
        parameters = read_parameters(config.parameters)
        if config.method == "grid":
            for parameter in parameters:
                parameter.grid()
    except UserError as error:
        raise UserError(f"sweep '{path}': {str(error).splitlines()[0]}") from None
    limits = [n for n in (config.run_cap, count) if n is not None]
    if not limits and config.method != "grid":
        raise UserError(f"sweep '{path}': method {config.method} goes on for ever: set run_cap, or give --count N")
    if config.method == "bayes" and config.metric is None:
        raise UserError(f"sweep '{path}': method bayes needs a metric, e.g. {{name: loss/eval/logits_kl}}")
    if config.early_terminate is not None:
        logger.info(f"note: early_terminate in '{path}' is for W&B; here every run goes to its end")
    base_file = _find(_base_argument(config, path), "base config", file)
    return Sweep(
        file=file,
        config=config,
        parameters=parameters,
        program=_find(config.program, "program", file),
        base_file=base_file,
        base=read_yaml(base_file),
        n_runs=min(limits, default=None),
    )


def _base_argument(config: SweepConfig, path: str | Path) -> str:
    named = [arg for arg in config.command or [] if arg.endswith((".yaml", ".yml")) and arg != config.program]
    if len(named) != 1:
        what = f"{len(named)} YAML files ({', '.join(named)})" if named else "no YAML file"
        raise UserError(
            f"sweep '{path}': its command names {what}, expected the one base config, e.g. "
            "command: [${env}, ${interpreter}, ${program}, base.yaml]"
        )
    return named[0]


def _find(name: str, what: str, sweep_file: Path) -> Path:
    """Returns an absolute path: from the sweep file's folder, the working directory, then any folder above the file
    (the repository's root, mostly, from where W&B's agents are started), then the package's own root."""
    folder = sweep_file.resolve().parent
    places: Sequence[Path] = [folder, Path.cwd(), *folder.parents, REPO_ROOT]
    for place in places:
        if (place / name).is_file():
            return (place / name).resolve()
    raise MissingFileError(
        f"sweep '{sweep_file}': its {what} '{name}' does not exist (looked in '{places[0]}' and the folders above it, "
        f"'{places[1]}' and '{REPO_ROOT}')"
    )
