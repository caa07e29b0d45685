"""Finished runs where they are: run folders (ours, or of the paper's library), folders of such, W&B runs and projects.

    runs/2026-.../                             a run folder, or one of its `.pt` files
    runs/                                      every run folder below it
    entity/project                             every run of a W&B project
    entity/project/run_id, or the run's URL    one W&B run

Only configs and logged numbers are read here; of checkpoints, what says which SAEs there are and how large.
"""

import hashlib
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from e2e_sae.base_config import read_yaml
from e2e_sae.checkpoint import load_run, newest_legacy_file
from e2e_sae.checkpoint.files import read_json
from e2e_sae.checkpoint.run_dir import CONFIG_FILE, TIMING_FILE, RunDir, read_checkpoint_info
from e2e_sae.checkpoint.wandb_api import RemoteRun, ServerAway, WandbPath, WandbServer
from e2e_sae.config import rename_old_keys
from e2e_sae.errors import MissingFileError, UserError
from e2e_sae.log import logger
from e2e_sae.progress import progress_bar
from e2e_sae.settings import load_env_file
from e2e_sae.trackers import read_metrics

Number = int | float
GRAD_NORM_FROM = 10_000
"""Samples after which gradient norms count for their mean (the paper's tables 2 and 3)."""
GRAD_NORM_FROM_SHARE = 0.1
"""Of a shorter run: they count after this share of it. (A tenth of 100k samples is the paper's 10k.)"""
GRAD_NORM_POINTS = 2000
"""Of W&B's history, evenly sampled (the paper's)."""
_PART = r"\w[\w .-]*"
_WANDB = re.compile(
    rf"(?P<host>https?://[^/]+/)?(?P<entity>{_PART})/(?P<project>{_PART})"
    rf"(?:/(?:workspace|overview|table|sweeps)\b.*|/(?:runs/)?(?P<id>{_PART})(?:/\w*)?)?/?(?:[?#].*)?",
    re.A,
)
_TIME = re.compile(r"_\d{4}-\d\d-\d\d_\d\d-\d\d-\d\d(?:_\d+)?$")


@dataclass(frozen=True)
class FoundRun:
    """A finished run: its settings, and what it logged last."""

    id: str
    """W&B's; of a run on disk eight letters that its path determines."""
    source: str
    """Folder or file, absolute; or `entity/project/run_id`."""
    name: str
    """What people call it."""
    config: dict[str, Any]
    """As it was written, old keys renamed."""
    metrics: Mapping[str, Any]
    """Last values by log key; empty where none are kept."""
    d_saes: dict[str, tuple[int, int]] = field(default_factory=dict)
    """(d_in, d_sae) by position, as far as checkpoints tell."""
    architectures: dict[str, str] = field(default_factory=dict)
    """By position, likewise."""
    timing: Mapping[str, Any] = field(default_factory=dict)
    """`seconds`, and perhaps `tokens_per_second` and `members`."""
    mean_grad_norm: float = math.nan
    """Mean gradient norm before clipping, without the beginning of the run."""


def find_runs(sources: Sequence[str | Path]) -> list[FoundRun]:
    """Returns the finished runs of all sources, each once; runs that are not finished are counted in one warning.

    Raises:
        UserError: a source is none of these things, has no run of SAEs, or W&B refused the key.
        MissingFileError: there is no such folder or W&B run, or W&B cannot be reached.
    """
    found: dict[str, FoundRun] = {}
    unfinished: list[str] = []
    for source in map(str, sources):
        path = Path(source).expanduser()
        if path.exists():
            runs, others = _on_disk(path)
        else:
            runs, others = _on_wandb(source)
        found.update((run.source, run) for run in runs)
        unfinished += others
    unfinished = list(dict.fromkeys(unfinished))
    if not found:
        raise UserError(f"none of these runs is finished: {_some(unfinished)}")
    if unfinished:
        logger.warning(f"{len(unfinished)} unfinished runs are left out: {_some(unfinished)}")
    return list(found.values())


def mean_grad_norm(points: Sequence[tuple[Number, Number]], n_samples: Number) -> float:
    """Returns the mean over what was logged after the beginning of a run; NaN without any.

    Args:
        points: (samples, gradient norm before clipping).
        n_samples: length of the run.
    """
    first = min(GRAD_NORM_FROM, GRAD_NORM_FROM_SHARE * n_samples)
    norms = [norm for samples, norm in points if samples > first]
    return sum(norms) / len(norms) if norms else math.nan


def _on_disk(path: Path) -> tuple[list[FoundRun], list[str]]:
    """Returns the finished runs at or below a path, and the folders of the unfinished ones."""
    path = path.resolve()
    places = list(_run_folders(path)) if path.is_dir() else [path]
    if not places:
        raise UserError(f"'{path}' holds no run: expected {CONFIG_FILE} in it, or in folders below it")
    finished: list[FoundRun] = []
    unfinished: list[str] = []
    is_one = places == [path]
    for place in places if is_one else progress_bar(places, total=len(places), desc="runs", inner=True):
        config = _config_of(place)
        if "saes" not in config:
            if is_one:
                raise UserError(f"'{place}' is no run of SAEs: its config has no 'saes'")
            continue
        if _is_unfinished(place):
            unfinished.append(str(place))
        else:
            finished.append(_read(place, config))
    if not finished and not unfinished:
        raise UserError(f"'{path}' holds no run of SAEs, only other runs")
    return finished, unfinished


def _run_folders(folder: Path) -> Iterator[Path]:
    if (folder / CONFIG_FILE).is_file():
        yield folder
        return
    for child in sorted(folder.iterdir()):
        if child.is_dir() and not child.is_symlink() and not child.name.startswith("."):
            yield from _run_folders(child)


def _config_of(place: Path) -> dict[str, Any]:
    if place.is_dir():
        return rename_old_keys(read_yaml(place / CONFIG_FILE))
    if place.suffix not in (".pt", ".pth"):
        raise UserError(f"'{place}' is no run: expected a run folder, a folder of such, or a .pt file")
    own = place.with_suffix(".yaml")
    return rename_old_keys(read_yaml(own if own.is_file() else place.parent / CONFIG_FILE))


def _is_unfinished(place: Path) -> bool:
    """Says whether a folder is of a run that is under way or broken off. The paper's library marks no end."""
    if place.is_file() or RunDir(place).summary_file.is_file():
        return False
    has_weights = bool(RunDir(place).checkpoints()) or any(place.glob("samples_*.pt"))
    return RunDir(place).metrics_file.is_file() or not has_weights


def _read(place: Path, config: dict[str, Any]) -> FoundRun:
    name = _TIME.sub("", place.stem if place.is_file() else place.name)
    sizes, architectures = _saes_in(place)
    run_dir, run_id = RunDir(place), hashlib.sha256(str(place).encode()).hexdigest()[:8]
    if place.is_file() or not run_dir.summary_file.is_file():
        return FoundRun(run_id, str(place), name, config, {}, sizes, architectures)
    summary = read_json(run_dir.summary_file)
    lines = read_metrics(run_dir.metrics_file) if run_dir.metrics_file.is_file() else []
    norms = [(line["samples"], line["grad_norm"]) for line in lines if line.get("grad_norm") is not None]
    timing = read_json(place / TIMING_FILE) if (place / TIMING_FILE).is_file() else {}
    norm = mean_grad_norm(norms, summary.get("samples", 0))
    return FoundRun(run_id, str(place), name, config, summary, sizes, architectures, timing, norm)


def _saes_in(place: Path) -> tuple[dict[str, tuple[int, int]], dict[str, str]]:
    """Returns (d_in, d_sae) and the architecture of each SAE of the newest checkpoint."""
    for checkpoint in RunDir(place).checkpoints()[:1] if place.is_dir() else ():
        saes = read_checkpoint_info(checkpoint, check=False).saes
        break
    else:
        saes = {name: stored.info for name, stored in load_run(_weights(place)).saes.items()}
    sizes = {name: (sae.d_in, sae.d_sae) for name, sae in saes.items()}
    return sizes, {name: sae.architecture for name, sae in saes.items()}


def _weights(place: Path) -> Path:
    return newest_legacy_file(place) if place.is_dir() else place


def _on_wandb(source: str) -> tuple[list[FoundRun], list[str]]:
    """Returns the finished runs that a W&B name stands for, and the names of the others."""
    match = _WANDB.fullmatch(source.strip())
    if match is None or source.startswith((".", "~", "/")):
        raise MissingFileError(
            f"'{source}' is no folder, and no W&B run or project: expected a path that exists, 'entity/project', "
            "'entity/project/run_id', or a W&B URL"
        )
    entity, project, run_id = match["entity"], match["project"], match["id"]
    load_env_file()
    try:
        server = WandbServer()
        if run_id is not None:
            remote = [server.run(WandbPath(entity, project, run_id))]
        else:
            remote = list(progress_bar(server.runs(entity, project), desc=f"runs of {entity}/{project}", inner=True))
        remote = [run for run in remote if "saes" in rename_old_keys(run.config)]
        finished = [run for run in remote if run.state == "finished"]
        runs = [_from_wandb(server, run) for run in progress_bar(finished, desc="gradient norms", inner=True)]
    except ServerAway as error:
        raise MissingFileError(f"W&B cannot be reached ({error}); there is no folder '{source}' either") from None
    except MissingFileError as error:
        raise MissingFileError(f"{error}; there is no folder '{source}' either") from None
    if not remote:
        raise UserError(f"W&B's '{source}' holds no run of SAEs: no config with 'saes'")
    return runs, [f"{run.path} ({run.state})" for run in remote if run.state != "finished"]


def _from_wandb(server: WandbServer, run: RemoteRun) -> FoundRun:
    config = rename_old_keys(run.config)
    seconds = run.summary.get("_runtime")
    timing = {} if seconds is None else {"seconds": seconds}
    norm = _norm(server, run)
    return FoundRun(run.path.id, str(run.path), run.name, config, run.summary, timing=timing, mean_grad_norm=norm)


def _norm(server: WandbServer, run: RemoteRun) -> float:
    """Returns the mean gradient norm; the authors' runs have it in their summary."""
    known = run.summary.get("mean_grad_norm")
    if isinstance(known, int | float):
        return float(known)
    if "grad_norm" not in run.summary:
        return math.nan
    points = server.history(run.path, "grad_norm", GRAD_NORM_POINTS)
    n_samples = rename_old_keys(run.config).get("n_samples") or max((step for step, _ in points), default=0)
    return mean_grad_norm(points, n_samples)


def _some(names: Sequence[str], n: int = 3) -> str:
    return ", ".join(names[:n]) + (f", and {len(names) - n} more" if len(names) > n else "")
