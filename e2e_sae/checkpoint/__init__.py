"""Trained SAEs from disk, whatever wrote them: the format is recognised from the files.

Pure: files in, configs and named tensors out. Nothing here builds a model.
"""

import re
from pathlib import Path

from e2e_sae.base_config import read_yaml
from e2e_sae.checkpoint.legacy import read_legacy_saes
from e2e_sae.checkpoint.records import StoredRun
from e2e_sae.checkpoint.run_dir import CONFIG_FILE, RunDir, read_checkpoint
from e2e_sae.errors import CheckpointError, MissingFileError


def load_run(path: str | Path, config_file: str | Path | None = None) -> StoredRun:
    """Returns the newest checkpoint of a run.

    Args:
        path: a run folder (ours or the paper's library's), one of our `samples_<n>` folders, or a legacy `.pt`.
        config_file: `final_config.yaml`, where it is not in the folder itself.

    Raises:
        MissingFileError: nothing there, or no checkpoint in it.
        CheckpointError: what is there cannot be read.
    """
    path = Path(path).expanduser()
    if not path.exists():
        raise MissingFileError(f"no such run folder or checkpoint: '{path}'")
    if path.is_dir():
        if (path / "checkpoint.json").is_file():
            return read_checkpoint(path)
        for checkpoint in RunDir(path).checkpoints()[:1]:
            return read_checkpoint(checkpoint)
    return _load_legacy(path, Path(config_file) if config_file else None)


def _load_legacy(path: Path, config_file: Path | None) -> StoredRun:
    weights = newest_legacy_file(path) if path.is_dir() else path
    if weights.suffix not in (".pt", ".pth"):
        raise CheckpointError(f"'{weights}' is no checkpoint: expected a run folder, samples_<n>, or a .pt file")
    config_file = config_file or weights.parent / CONFIG_FILE
    config = read_yaml(config_file) if config_file.is_file() else {}
    return StoredRun(weights, read_legacy_saes(weights), None, config, _trailing_number(weights))


def newest_legacy_file(folder: Path) -> Path:
    """Returns the `.pt` with the largest trailing number.

    Raises:
        MissingFileError: there is none.
    """
    files = [path for suffix in ("*.pt", "*.pth") for path in folder.glob(suffix)]
    if not files:
        raise MissingFileError(f"'{folder}' has no checkpoint: expected samples_<n>/ or samples_<n>.pt in it")
    return max(files, key=lambda path: _trailing_number(path) or -1)


def _trailing_number(path: Path) -> int | None:
    match = re.search(r"_(\d+)$", path.stem)
    return int(match[1]) if match else None
