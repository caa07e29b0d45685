"""Types that configs share: dtypes by name, and paths that are relative to the config's own folder."""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, PlainSerializer

from e2e_sae.lazy import lazy_names
from e2e_sae.settings import REPO_ROOT

StrDtype = Literal["float32", "float64", "bfloat16", "float16"]
"""A torch dtype by name; `torch_dtype` turns it into the dtype."""


def torch_dtype(name: StrDtype) -> Any:
    """Returns the torch dtype of that name (torch is imported here, so that configs stay light)."""
    import torch

    return getattr(torch, name)


# `info` is pydantic's ValidationInfo, a protocol that runtime type checkers refuse as an annotation.
def path_candidates(given: str | Path, info: Any) -> list[Path]:
    """Returns the places a path in a config may mean: the YAML's folder first, then the working directory."""
    try:
        path = Path(given).expanduser()
    except RuntimeError:
        raise ValueError(f"'{given}' names the home folder of a user who does not exist") from None
    if path.is_absolute():
        return [path]
    base_dir = (info.context or {}).get("base_dir") if info is not None else None
    places = [Path(base_dir) / path] if base_dir is not None else []
    places.append(Path.cwd() / path)
    return list(dict.fromkeys(p.resolve() for p in places))


def _existing_path(given: Path, info: Any) -> Path:
    places = path_candidates(given, info)
    # Configs of the paper's library count from the root of its clone, where they mention a relative path at all.
    in_clone = [REPO_ROOT / given] if (REPO_ROOT / "pyproject.toml").is_file() else []
    for place in places + in_clone:
        if _exists(place):
            return place
    looked = " and ".join(f"'{p}'" for p in places)
    raise ValueError(f"no such file or folder: '{given}' (looked at {looked})")


def _output_path(given: Path, info: Any) -> Path:
    return path_candidates(given, info)[-1]


def _local_or_hub(given: str, info: Any) -> str:
    places = path_candidates(given, info)
    for place in places:
        if _exists(place):
            return str(place)
    # A hub id is at most "owner/name": anything shaped like a path was meant as one.
    looks_local = given.startswith((".", "/", "~")) or given.count("/") > 1 or len(given) > 255
    looks_local = looks_local or Path(given).suffix in {
        ".parquet", ".jsonl", ".json", ".arrow", ".txt", ".u16", ".u32", ".pt", ".yaml",
    }  # fmt: skip
    if looks_local:
        looked = " and ".join(f"'{p}'" for p in places)
        raise ValueError(f"no such file or folder: '{given}' (looked at {looked})")
    return given


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # a name that is too long, a folder that may not be read
        return False


def _as_str(path: Path) -> str:
    return str(path)


def _one_or_many(value: Any) -> Any:
    return [value] if isinstance(value, str | Path) else value


InputPath = Annotated[Path, AfterValidator(_existing_path), PlainSerializer(_as_str)]
"""A path that must exist; stored absolute. Relative to the YAML's folder, then to the working directory."""

OutputPath = Annotated[Path, AfterValidator(_output_path), PlainSerializer(_as_str)]
"""A path to be written, relative to the working directory; stored absolute."""

LocalOrHub = Annotated[str, AfterValidator(_local_or_hub)]
"""An existing local path (stored absolute) or else the name of something on the hub."""

StrOrList = Annotated[list[str], BeforeValidator(_one_or_many)]
"""A list of strings; a single string is wrapped."""

PathOrList = Annotated[list[InputPath], BeforeValidator(_one_or_many)]
"""A list of existing paths; a single path is wrapped."""


__getattr__ = lazy_names(
    __name__, dict.fromkeys(("TORCH_DTYPES", "Samples", "TorchDtype", "RootPath"), "e2e_sae.legacy.types")
)
