"""From a sweep to its runs: each combination merged into the base config, validated, and identified by its settings.

The merging is that of a W&B agent and the paper's library: the combination's nested values over the base config's.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from e2e_sae.base_config import KIND_KEY, apply_overrides, deep_update
from e2e_sae.checkpoint.files import read_json, write_json
from e2e_sae.config import Config, rename_old_keys
from e2e_sae.errors import UserError
from e2e_sae.run_types import run_type
from e2e_sae.sweeps.parameters import Parameter
from e2e_sae.sweeps.search import Point, bayes_point, grid_values, random_point
from e2e_sae.sweeps.sweep_file import Sweep

UNIDENTIFYING_KEYS = {"wandb_project", "wandb_run_name", "wandb_run_name_prefix", "save_dir", "members"}
"""Settings that do not make it another run (or, `members`, that no run of a sweep has)."""

Cost = Callable[["PlannedRun"], float | None]
"""Says what a run cost by the sweep's metric (less is better); None while it is not known."""


class Plan(NamedTuple):
    """The runs of one sweep."""

    sweep: Sweep
    """Which."""
    n_runs: int
    """How many there are at most."""
    runs: Iterator["PlannedRun"]
    """They; bayes makes each when it is asked for."""


class PlannedRun(NamedTuple):
    """One run of a sweep."""

    sweep: str
    """The sweep's name."""
    varied: dict[str, Any]
    """What tells it from the sweep's other runs, by dotted name (`Parameter.telling`)."""
    config: Config
    """The whole of its settings; `save_dir` is not set yet."""
    program: Path
    """The script."""
    is_grid: bool
    """Whether its neighbours are a grid, in which runs can be joined to lines."""

    @property
    def key(self) -> str:
        """A hash of its settings: the same run, whatever sweep it is in and whatever else that varies."""
        values = {k: v for k, v in self.config.to_dict().items() if k not in UNIDENTIFYING_KEYS}
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:10]

    @property
    def type(self) -> str:
        """`local`, `e2e`, `e2e+ds`, ...; of different phases, `local then e2e+local`."""
        return " then ".join(dict.fromkeys(run_type(config.loss) for config in self.config.phase_configs))

    @property
    def label(self) -> str:
        """Its sweep and its varied values, for people."""
        return " ".join([self.sweep, *shown(self.varied)])


def plan_sweep(sweep: Sweep, overrides: Sequence[str], cost: Cost, memory: Path) -> Plan:
    """Returns the runs of a sweep, each once. Those of a grid and of a random sweep are all validated first.

    Args:
        sweep: what to plan.
        overrides: `dotted.key=value` for every run.
        cost: asked by bayes each time that it chooses.
        memory: file in which bayes keeps what it has chosen.

    Raises:
        UserError: an override or a run's settings are wrong.
    """
    _check_overrides(sweep, overrides)
    if sweep.config.method == "bayes":
        _planned(sweep, _at(sweep.parameters, sweep.varied, random_point(sweep.varied, 0)), overrides)
        return Plan(sweep, sweep.n_runs or 0, _bayes_runs(sweep, overrides, cost, memory))
    if sweep.config.method == "grid":
        combinations = list(grid_values(sweep.parameters))[: sweep.n_runs]
    else:
        points = [random_point(sweep.varied, n) for n in range(sweep.n_runs or 0)]
        combinations = [_at(sweep.parameters, sweep.varied, point) for point in points]
    runs = [_planned(sweep, combination, overrides) for combination in combinations]
    unique = {run.key: run for run in runs}
    return Plan(sweep, len(unique), iter(unique.values()))


def shown(varied: Mapping[str, Any]) -> list[str]:
    """Returns varied settings as they are shown. What a mapping is of, if it says so, stands for its name.

    >>> shown({"loss.sparsity.coeff": 1, "saes.sae": {"architecture": "topk", "k": 32}})
    ['sparsity.coeff=1', 'topk k=32']
    >>> shown({"saes.sae": {"k": 32}, "loss.logits_kl": None})
    ['sae.k=32', 'loss.logits_kl=None']
    """
    settings: dict[str, Any] = {}
    for name, value in varied.items():
        is_flat = isinstance(value, Mapping) and value and KIND_KEY not in value
        settings |= {f"{name}.{key}": entry for key, entry in value.items()} if is_flat else {name: value}
    named = short_names(settings).items()
    return [short(v) if isinstance(v, Mapping) and v else f"{name}={short(v)}" for name, v in named]


def short_names(values: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the mapping with the last two parts of each dotted name, where that is clear.

    >>> short_names({"loss.sparsity.coeff": 1, "lr": 2})
    {'sparsity.coeff': 1, 'lr': 2}
    """
    short = {name: ".".join(name.split(".")[-2:]).removeprefix("saes.") for name in values}
    return dict(values) if len(set(short.values())) < len(short) else {short[k]: v for k, v in values.items()}


def short(value: Any) -> str:
    """Returns a value as it is shown: 4 digits of a number, the items of a list or of a mapping joined.

    >>> short([{"k": 32, "architecture": "topk"}, 0.123456])
    'topk k=32+0.1235'
    """
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list):
        return "+".join(map(short, value))
    if isinstance(value, Mapping) and value:
        kind = [str(value[KIND_KEY])] if KIND_KEY in value else []
        return " ".join([*kind, *(f"{key}={short(entry)}" for key, entry in value.items() if key != KIND_KEY)])
    return str(value)


def _planned(sweep: Sweep, combination: Iterable[Any], overrides: Sequence[str]) -> PlannedRun:
    chosen = dict(zip([p.path for p in sweep.parameters], combination, strict=True))
    values: dict[str, Any] = {}
    for path, value in chosen.items():
        nested: Any = value
        for part in reversed(path):
            nested = {part: nested}
        values = deep_update(values, nested)
    varied = {p.name: p.telling(chosen[p.path]) for p in sweep.varied}
    try:
        # Today's names on both sides: else an old key in the sweep would lose to the base's new one.
        merged = deep_update(rename_old_keys(sweep.base), rename_old_keys(values))
        merged = apply_overrides({**merged, "wandb_project": None, "save_dir": None}, overrides)
        config = Config.from_dict(merged, base_dir=sweep.base_file.parent)
        if config.members is not None:
            raise UserError("a run of a sweep has no members: sweep over what they change, with --shared")
    except UserError as error:
        which = ", ".join(f"{k}={short(v)}" for k, v in varied.items()) or "the one run"
        raise UserError(
            f"sweep '{sweep.file}', run with {which}, on '{sweep.base_file.name}': {str(error).splitlines()[0]}"
        ) from None
    return PlannedRun(sweep.name, varied, config, sweep.program, sweep.config.method == "grid")


def _check_overrides(sweep: Sweep, overrides: Sequence[str]) -> None:
    for override in overrides:
        key = override.partition("=")[0].strip()
        if key == "save_dir":
            raise UserError("--set save_dir: the runs of a sweep lie in its folder, which --out names")
        for p in sweep.varied:
            if f"{p.name}.".startswith(f"{key}.") or f"{key}.".startswith(f"{p.name}."):
                raise UserError(f"--set {override}: sweep '{sweep.file}' varies '{p.name}': take it out of one of them")


def _at(parameters: Sequence[Parameter], varied: Sequence[Parameter], point: Point) -> list[Any]:
    coordinates = dict(zip([p.path for p in varied], point, strict=True))
    return [p.at(coordinates.get(p.path, 0.5)) for p in parameters]


def _bayes_runs(sweep: Sweep, overrides: Sequence[str], cost: Cost, memory: Path) -> Iterator[PlannedRun]:
    """Yields each run when it is asked for: the choice is made from what is known then, and is kept."""
    varied = sweep.varied
    space = json.dumps([sweep.config.parameters, str(sweep.config.metric)], sort_keys=True, default=str)
    points: list[Point] = []
    if memory.exists() and (known := read_json(memory))["space"] == space:
        points = known["points"]
    runs: list[PlannedRun] = []
    for n in range(sweep.n_runs or 0):
        if n == len(points):
            points.append(bayes_point(varied, points, [cost(run) for run in runs], n))
            write_json(memory, {"space": space, "points": points})
        run = _planned(sweep, _at(sweep.parameters, varied, points[n]), overrides)
        runs.append(run)
        if run.key not in [earlier.key for earlier in runs[:-1]]:
            yield run
