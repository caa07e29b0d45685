"""A run's folder: our own format.

<save_dir>/<run_name>_<timestamp>/
  final_config.yaml          the config, first thing written, paths absolute
  metrics.jsonl              the log
  samples_<n>/               a checkpoint: whole or not there
    checkpoint.json          model, SAEs, sizes and check sums of the files (records.CheckpointInfo)
    <position>.safetensors   W_enc, b_enc, W_dec, b_dec, and what else the architecture has
    firing.safetensors       how often each latent was active
    resume.pt                optimizer and loop state; kept in the newest two
  summary.json               written when the run is finished
  timing.json                how long it has trained
  wandb_run.json             which W&B run it is, where there is one
  my_file.py                 a copy of the file that an architecture of the user's own is defined in
"""

import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from torch import Tensor

from e2e_sae.base_config import read_yaml
from e2e_sae.checkpoint.files import (
    fingerprint,
    new_folder,
    read_json,
    read_pickled_tensors,
    read_state_dict,
    read_tensors,
    write_json,
    write_pickled,
    write_tensors,
    write_text,
    writing_below,
)
from e2e_sae.checkpoint.legacy import legacy_saes
from e2e_sae.checkpoint.records import FORMAT_VERSION, CheckpointInfo, StoredRun, StoredSAE
from e2e_sae.errors import CheckpointError, MissingFileError, UserError
from e2e_sae.saes import at_hand

CONFIG_FILE = "final_config.yaml"
METRICS_FILE = "metrics.jsonl"
SUMMARY_FILE = "summary.json"
TIMING_FILE = "timing.json"
WANDB_FILE = "wandb_run.json"
_CHECKPOINT = re.compile(r"^samples_(\d+)$")
_MAX_NAME_BYTES = 200
"""File systems allow 255; a time stamp follows."""
N_RESUMABLE = 2
"""How many of the newest checkpoints keep their resume state."""


@dataclass(frozen=True)
class RunDir:
    """The folder of one run."""

    path: Path
    """Absolute."""

    @classmethod
    def create(cls, save_dir: Path, run_name: str, config_yaml: str) -> "RunDir":
        """Makes a folder that did not exist and writes the config into it.

        Raises:
            UserError: `save_dir` cannot be written.
        """
        stem = f"{_file_name(run_name)}_{datetime.now():%Y-%m-%d_%H-%M-%S}"
        with writing_below(save_dir, "save_dir"):
            save_dir.mkdir(parents=True, exist_ok=True)
            for n in range(10_000):
                path = save_dir / (stem if n == 0 else f"{stem}_{n}")
                try:
                    path.mkdir()
                except FileExistsError:
                    continue
                break
            else:
                raise UserError(f"save_dir '{save_dir}' is full of folders named '{stem}': clean it up")
        try:
            write_text(path / CONFIG_FILE, config_yaml)
        except OSError:
            path.rmdir()
            raise
        return cls(path.resolve())

    @classmethod
    def open(cls, path: str | Path) -> "RunDir":
        """Returns an existing run's folder.

        Raises:
            MissingFileError: no such folder, or no config in it.
        """
        folder = Path(path).expanduser().resolve()
        if not folder.is_dir():
            raise MissingFileError(f"no such run folder: '{path}'")
        if not (folder / CONFIG_FILE).is_file():
            raise MissingFileError(f"'{folder}' is no run folder: it has no {CONFIG_FILE}")
        return cls(folder)

    @property
    def config_file(self) -> Path:
        """`final_config.yaml`."""
        return self.path / CONFIG_FILE

    @property
    def metrics_file(self) -> Path:
        """`metrics.jsonl`."""
        return self.path / METRICS_FILE

    @property
    def summary_file(self) -> Path:
        """`summary.json`; there when the run is finished."""
        return self.path / SUMMARY_FILE

    @property
    def wandb_file(self) -> Path:
        """`wandb_run.json`; there when the run has a W&B run."""
        return self.path / WANDB_FILE

    def checkpoints(self) -> list[Path]:
        """Returns the checkpoint folders, newest first."""
        found = [(int(m[1]), p) for p in self.path.iterdir() if p.is_dir() and (m := _CHECKPOINT.match(p.name))]
        return [path for _, path in sorted(found, reverse=True)]

    def save(
        self,
        info: CheckpointInfo,
        saes: Mapping[str, Mapping[str, Tensor]],
        firing: Mapping[str, Tensor],
        resume_state: Any,
    ) -> Path:
        """Writes a checkpoint and drops the resume state of all but the newest two.

        Args:
            info: without `files`, which is filled in here.
            saes: parameters by position name.
            firing: counts by position name.
            resume_state: tensors and plain containers.

        Raises:
            OSError: the disk is full or cannot be written; nothing of the checkpoint is left then.
        """
        path = self.path / f"samples_{info.n_samples}"
        with new_folder(path) as folder:
            for name, tensors in saes.items():
                write_tensors(folder / f"{_key(name)}.safetensors", tensors)
            write_tensors(folder / "firing.safetensors", firing)
            write_pickled(folder / "resume.pt", resume_state)
            files = {file.name: fingerprint(file) for file in sorted(folder.iterdir())}
            write_json(folder / "checkpoint.json", info.model_copy(update={"files": files}).to_dict())
        for old in self.checkpoints()[N_RESUMABLE:]:
            (old / "resume.pt").unlink(missing_ok=True)
        return path

    def go_back_to(self, checkpoint: Path | None) -> None:
        """Removes the checkpoints after this one (None: all), which are damaged, and what a killed process left."""
        for path in self.checkpoints():
            if path == checkpoint:
                break
            shutil.rmtree(path)
        self.summary_file.unlink(missing_ok=True)
        for pattern in (".*.tmp-*", ".*.old-*"):
            for path in self.path.glob(pattern):
                shutil.rmtree(path) if path.is_dir() else path.unlink()


def read_checkpoint_info(path: Path, *, check: bool = True) -> CheckpointInfo:
    """Returns a checkpoint's `checkpoint.json`, after comparing size and check sum of every file.

    Raises:
        CheckpointError: a file is missing or differs.
        UserError: a newer version of the library wrote it.
    """
    if not (path / "checkpoint.json").is_file():
        raise CheckpointError(f"checkpoint '{path}' is incomplete: it has no checkpoint.json")
    values = read_json(path / "checkpoint.json")
    version = values.get("format_version") if isinstance(values, dict) else None
    if not isinstance(version, int):
        raise CheckpointError(f"checkpoint '{path}' is damaged: checkpoint.json has no format_version")
    if version > FORMAT_VERSION:
        # Not a CheckpointError: it is whole, and resuming must not pass it over for an older one.
        raise UserError(
            f"checkpoint '{path}' has format_version {version}; this version of e2e_sae reads up to "
            f"{FORMAT_VERSION}: install a newer one"
        )
    try:
        info = CheckpointInfo.from_dict(values)
    except UserError as error:
        raise CheckpointError(f"checkpoint '{path}' is damaged: {str(error).splitlines()[0]}") from None
    if not info.saes:
        raise CheckpointError(f"checkpoint '{path}' is damaged: checkpoint.json lists no SAE")
    for name, expected in info.files.items() if check else ():
        if not (path / name).exists() and (name == "resume.pt" or _is_elsewhere(path, name)):
            continue  # dropped when the checkpoint grew old, or its tensors are in the `.pt` beside the folder
        if not (path / name).is_file() or fingerprint(path / name) != expected:
            raise CheckpointError(f"checkpoint '{path}' is damaged: {name} is not what was written")
    return info


def read_checkpoint(path: Path) -> StoredRun:
    """Returns a checkpoint folder of ours.

    Raises:
        CheckpointError: it is damaged.
    """
    info = read_checkpoint_info(path)
    saes: dict[str, StoredSAE] = {}
    uploaded, legacy = path.with_suffix(".pt"), dict[str, StoredSAE]()
    if any(_is_elsewhere(path, file) for file in info.files):
        legacy = legacy_saes(uploaded, read_state_dict(uploaded))
    for name, sae in info.saes.items():
        file = path / f"{_key(name)}.safetensors"
        tensors = legacy[name].tensors if name in legacy and not file.exists() else read_tensors(file)
        architecture = at_hand(sae.architecture, path.parent)
        saes[name] = StoredSAE(sae.model_copy(update={"architecture": architecture}), tensors)
    config_file = path.parent / CONFIG_FILE
    config = read_yaml(config_file) if config_file.is_file() else {}
    return StoredRun(path, saes, info.model, config, info.n_samples)


def read_resume_state(path: Path) -> Any:
    """Returns the resume state of a checkpoint.

    Raises:
        CheckpointError: there is none, or it is damaged.
    """
    if not (path / "resume.pt").is_file():
        raise CheckpointError(
            f"checkpoint '{path}' has no resume state, which only the newest {N_RESUMABLE} of a run keep: it cannot be "
            "gone on with exactly; a new run can begin with its SAEs (saes.pretrained_sae_paths)"
        )
    return read_pickled_tensors(path / "resume.pt")


def _is_elsewhere(checkpoint: Path, name: str) -> bool:
    """Says whether SAEs are in `samples_<n>.pt` instead of this file, as in what is uploaded to W&B."""
    is_tensors = name.endswith(".safetensors") and name != "firing.safetensors"
    return is_tensors and not (checkpoint / name).exists() and checkpoint.with_suffix(".pt").is_file()


def _file_name(run_name: str) -> str:
    """Returns the name without characters that some file system or pattern treats specially, and not too long."""
    plain = re.sub(r"[^\w.,+=@ -]", "_", run_name).lstrip(".") or "run"
    return plain.encode()[:_MAX_NAME_BYTES].decode(errors="ignore")


def _key(name: str) -> str:
    return name.replace(".", "-")
