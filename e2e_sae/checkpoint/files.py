"""Reading and writing files so that nothing is ever half there: write under a temporary name, then rename."""

import errno
import json
import os
import pickle
import shutil
import struct
import warnings
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from e2e_sae.errors import CheckpointError, UserError

UNPICKLING_ERRORS = (
    OSError, RuntimeError, EOFError, ValueError, LookupError, TypeError, AttributeError, struct.error,
)  # fmt: skip
"""What `torch.load` was seen to raise for damaged files (found by flipping bytes), besides `UnpicklingError`."""


def check_is_free(path: Path) -> None:
    """Raises a `UserError` if there is anything at `path` but an empty folder."""
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise UserError(f"'{path}' is there already: name a new or an empty folder")


@contextmanager
def writing_below(folder: Path, name: str) -> Iterator[None]:
    """Turns what goes wrong while folders are made at or below `folder` into a `UserError`, but for a full disk.

    Args:
        folder: that the user named.
        name: of the setting or option.
    """
    try:
        yield
    except (FileExistsError, NotADirectoryError):
        raise UserError(f"{name} '{folder}' is a file, not a folder: choose another {name}") from None
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise UserError(f"{name} '{folder}' cannot be written ({error.strerror}): choose another {name}") from None


def make_out_folder(folder: Path) -> None:
    """Makes the folder that `--out` names, if it is not there.

    Raises:
        UserError: it cannot be made.
    """
    with writing_below(folder, "--out"):
        folder.mkdir(parents=True, exist_ok=True)


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Gives a temporary folder beside `path` to fill, and renames it to `path` if the block succeeds.

    An older folder of that name is replaced. If the block fails, nothing is left behind.
    """
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        for file in temporary.iterdir():
            _flush_to_disk(file)
        if path.exists():
            stale = path.with_name(f".{path.name}.old-{os.getpid()}")
            path.rename(stale)
            temporary.rename(path)
            shutil.rmtree(stale, ignore_errors=True)
        else:
            temporary.rename(path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """Gives a temporary name beside `path` to write to, and renames it to `path` if the block succeeds.

    So there is the old content or the new, never a part. If the block fails, nothing is left behind.
    """
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    try:
        yield temporary
        _flush_to_disk(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Writes a text file at once."""
    with new_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Writes JSON at once."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def read_json(path: Path) -> Any:
    """Returns the JSON in a file.

    Raises:
        CheckpointError: it cannot be read.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"'{path}' is damaged: {error}") from None


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Writes a safetensors file (copies each tensor to the CPU)."""
    save_file({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, path, metadata=metadata)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Returns the tensors of a safetensors file, on the CPU.

    Raises:
        CheckpointError: it cannot be read.
    """
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"'{path}' is damaged or no safetensors file: {error}") from None


def write_pickled(path: Path, value: Any) -> None:
    """Writes a torch file; not at once.

    Raises:
        OSError: the disk is full or cannot be written.
    """
    try:
        torch.save(value, path)
    except RuntimeError as error:
        # torch reports a failed write without the system's error number; the file system still knows it.
        with path.with_name("probe").open("wb") as probe:
            probe.write(b"\0" * (1 << 20))
            probe.flush()
        raise OSError(f"'{path}' could not be written: {str(error).splitlines()[0]}") from error


def read_pickled_tensors(path: Path) -> Any:
    """Returns what a `.pt` file holds, on the CPU, refusing anything but tensors and plain containers.

    Raises:
        CheckpointError: the file is damaged, or would run code when unpickled.
    """
    try:
        with warnings.catch_warnings():
            # Torch warns about files of other pickle versions before it refuses them.
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise CheckpointError(
            f"'{path}' was refused: it is not a file of plain tensors (damaged, or a pickle that would run code)"
        ) from None
    except UNPICKLING_ERRORS as error:
        raise CheckpointError(f"'{path}' is damaged or no torch file: {_first_line(error)}") from None


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """Returns the tensors that a `.pt` file holds by name, on the CPU.

    Raises:
        CheckpointError: the file is damaged, unsafe, or holds something else.
    """
    state = read_pickled_tensors(path)
    if not isinstance(state, dict) or not state or not all(isinstance(v, Tensor) for v in state.values()):
        raise CheckpointError(f"'{path}' holds no state dict of SAEs: expected a mapping from names to tensors")
    return {str(key): tensor for key, tensor in state.items()}


def fingerprint(path: Path) -> dict[str, int]:
    """Returns {size, crc32} of a file."""
    crc = 0
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            crc = zlib.crc32(block, crc)
    return {"size": path.stat().st_size, "crc32": crc}


def _flush_to_disk(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
