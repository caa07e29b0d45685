"""Trained SAEs from disk, whatever wrote them: the format is recognised from the files.

Pure: files in, configs and named tensors out. Nothing here builds a model.
"""

import re
from pathlib import Path

from e2e_sae.base_config import read_yaml
from e2e_sae.checkpoint.files import read_state_dict
from e2e_sae.checkpoint.legacy import legacy_saes
from e2e_sae.checkpoint.paper_hub import is_paper_hub_sae, paper_hub_saes
from e2e_sae.checkpoint.records import StoredRun
from e2e_sae.checkpoint.run_dir import CONFIG_FILE, RunDir, read_checkpoint
from e2e_sae.checkpoint.saelens import is_saelens_folder, read_saelens
from e2e_sae.config import rename_old_keys
from e2e_sae.errors import CheckpointError, MissingFileError


def load_run(path: str | Path, config_file: str | Path | None = None) -> StoredRun:
    """Returns the newest checkpoint of a run.

    Args:
        path: a run folder (ours or the paper's library's), one of our `samples_<n>` folders, a `.pt` (legacy, or one of
            `apollo-research/e2e-saes-gpt2`), or a SAELens folder.
        config_file: the run's config, if it is neither `<name>.yaml` nor `final_config.yaml` beside the `.pt`.

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
        if is_saelens_folder(path):
            return read_saelens(path)
        for checkpoint in RunDir(path).checkpoints()[:1]:
            return read_checkpoint(checkpoint)
    return _load_pickled(path, Path(config_file) if config_file else None)


def _load_pickled(path: Path, config_file: Path | None) -> StoredRun:
    weights = newest_legacy_file(path) if path.is_dir() else path
    if weights.suffix not in (".pt", ".pth"):
        raise CheckpointError(f"'{weights}' is no checkpoint: expected a run folder, samples_<n>, or a .pt file")
    own = weights.with_suffix(".yaml")
    config_file = config_file or (own if own.is_file() else weights.parent / CONFIG_FILE)
    config = read_yaml(config_file) if config_file.is_file() else {}
    state = read_state_dict(weights)
    if is_paper_hub_sae(state):
        # The number in its name is a layer; the published ones are the ends of their runs.
        n_samples = rename_old_keys(config).get("n_samples")
        return StoredRun(weights, paper_hub_saes(weights, state, config), None, config, n_samples)
    return StoredRun(weights, legacy_saes(weights, state), None, config, _trailing_number(weights))


def newest_legacy_file(folder: Path) -> Path:
    """Returns the `.pt` with the largest trailing number.

    Raises:
        MissingFileError: there is none.
        CheckpointError: there are several, each with a config of its own: no steps of one run.
    """
    files = [path for suffix in ("*.pt", "*.pth") for path in folder.glob(suffix)]
    if not files:
        raise MissingFileError(f"'{folder}' has no checkpoint: expected samples_<n>/ or samples_<n>.pt in it")
    if len(files) > 1 and all(path.with_suffix(".yaml").is_file() for path in files):
        names = ", ".join(sorted(path.name for path in files))
        raise CheckpointError(f"'{folder}' holds several SAEs ({names}): name one of the files")
    return max(files, key=lambda path: _trailing_number(path) or -1)


def _trailing_number(path: Path) -> int | None:
    match = re.search(r"_(\d+)$", path.stem)
    return int(match[1]) if match else None
