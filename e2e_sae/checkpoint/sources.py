"""A run's newest checkpoint from W&B, into a cache on disk.

<cache>/wandb/<entity>/<project>/<run id>/
  final_config.yaml
  samples_<n>.pt         the SAEs, as the paper's library stores them
  samples_<n>/           what else is known of them (`run_dir.py`), from runs of this library

Names that the server sends are compared with patterns; paths are made from the parts of the patterns alone.
"""

import os
import re
from pathlib import Path

from e2e_sae.checkpoint.run_dir import CONFIG_FILE
from e2e_sae.checkpoint.wandb_api import RemoteFile, ServerAway, WandbPath, WandbServer
from e2e_sae.errors import MissingFileError, UserError
from e2e_sae.log import logger
from e2e_sae.settings import cache_dir, load_env_file

_PART = r"\w[\w .-]*"
_RUN = re.compile(
    rf"(?:https?://[^/]+/)?(?:(?P<entity>{_PART})/)?(?P<project>{_PART})/(?:runs/)?(?P<id>{_PART})(?:/\w*)?(?:[?#].*)?",
    re.A,
)
_CONFIG = re.compile(r"(?:[\w-]+/)*[\w-]*final_config\.yaml", re.A)
_FILE = re.compile(r"samples_(?P<n>\d{1,18})(?:(?P<pt>\.pt)|/(?P<name>checkpoint\.json|[\w-]+\.safetensors))", re.A)


def fetch_wandb_run(run: str) -> Path:
    """Returns the newest checkpoint of a W&B run on disk, for `load_run`; what is in the cache is not fetched again.

    Args:
        run: `entity/project/run_id`, `project/run_id` (`WANDB_ENTITY`, or your own entity), or the run's URL.

    Raises:
        UserError: that names no run, or the key was refused.
        MissingFileError: there is no such run, it has no checkpoint, or W&B cannot be reached and it is not cached.
        RunFailed: a download broke off.
    """
    load_env_file()
    match = _RUN.fullmatch(run.strip())
    if match is None:
        raise UserError(f"'{run}' is no W&B run: expected 'entity/project/run_id', 'project/run_id', or the run's URL")
    entity, project, run_id = match["entity"] or os.environ.get("WANDB_ENTITY") or None, match["project"], match["id"]
    root = cache_dir() / "wandb"
    try:
        server = WandbServer()
        path = WandbPath(_checked(entity or server.default_entity()), project, run_id)
        return _fetch(server, path, root.joinpath(*path))
    except ServerAway as error:
        folders = [root / _checked(entity) / project / run_id] if entity else root.glob(f"*/{project}/{run_id}")
        cached = [checkpoint for folder in folders for checkpoint in _checkpoints_in(folder)[:1]]
        if len(cached) != 1:
            raise MissingFileError(
                f"W&B cannot be reached ({error}), and '{run}' is not in the cache '{root}'"
            ) from None
        logger.warning(f"W&B cannot be reached ({error}): using '{cached[0]}', fetched earlier")
        return cached[0]


def _fetch(server: WandbServer, path: WandbPath, folder: Path) -> Path:
    """Brings a run's folder up to date and returns its newest checkpoint."""
    files = server.files(path)
    configs = [file for file in files if _CONFIG.fullmatch(file.name)]
    by_n: dict[int, dict[str, RemoteFile]] = {}
    for file in files:
        if (match := _FILE.fullmatch(file.name)) is not None:
            n = int(match["n"])
            by_n.setdefault(n, {})[f"samples_{n}.pt" if match["pt"] else f"samples_{n}/{match['name']}"] = file
    whole = {n: found for n, found in by_n.items() if _is_whole(n, set(found))}
    if not configs or not whole:
        raise MissingFileError(
            f"W&B run '{path}' has no {'checkpoint (samples_<n>.pt)' if configs else CONFIG_FILE}: it ended before its "
            "first save, or is a run of something else"
        )
    n = max(whole)
    # In this order a fetch that breaks off leaves nothing that looks whole.
    names = sorted(whole[n], key=lambda name: (name.endswith(".pt"), name.endswith(".json")))
    for name, file in [(CONFIG_FILE, configs[0]), *((name, whole[n][name]) for name in names)]:
        target = folder / name
        if not file.is_same_as(target):
            target.parent.mkdir(parents=True, exist_ok=True)
            logger.info(f"downloading {name} of {path} ({file.size / 1e6:.1f} MB)")
            server.download(file, target)
    return _checkpoints_in(folder)[0]


def _checkpoints_in(folder: Path) -> list[Path]:
    """Returns what `load_run` can load of a cached run, newest first."""
    if not (folder / CONFIG_FILE).is_file():
        return []
    names = {file.relative_to(folder).as_posix() for file in folder.rglob("samples_*/*")}
    names |= {file.name for file in folder.glob("samples_*.pt")}
    numbers = {int(match["n"]) for name in names if (match := _FILE.fullmatch(name))}
    return [
        folder / (f"samples_{n}" if f"samples_{n}/checkpoint.json" in names else f"samples_{n}.pt")
        for n in sorted(numbers, reverse=True)
        if _is_whole(n, names)
    ]


def _is_whole(n: int, names: set[str]) -> bool:
    """Says whether these files hold the SAEs of checkpoint `n`."""
    ours = f"samples_{n}/"
    others = {name for name in names if name.startswith(ours)} - {f"{ours}firing.safetensors", f"{ours}checkpoint.json"}
    return f"samples_{n}.pt" in names or (f"{ours}checkpoint.json" in names and bool(others))


def _checked(entity: str) -> str:
    if not re.fullmatch(_PART, entity, re.A):
        raise UserError(f"'{entity}' is no W&B entity: expected letters, digits, '-', '_' and '.'")
    return entity
