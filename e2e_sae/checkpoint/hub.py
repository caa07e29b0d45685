"""SAEs from the Hugging Face hub, through its own cache and settings (`HF_HOME`, `HF_HUB_OFFLINE`, ...)."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

from e2e_sae.errors import MissingFileError, UserError, did_you_mean

_TRAINING_STATE = ["*/resume.pt", "*/trainer_state.pt"]
"""Large, and of no use for the SAE."""
_N_SHOWN = 40


def download_sae(repo_id: str, name: str, revision: str | None = None) -> Path:
    """Returns the local file or folder of an SAE, for `checkpoint.load_run`.

    Args:
        repo_id: `owner/name` on the hub.
        name: a file `<name>.pt` (with or without the suffix), or a folder.
        revision: branch, tag or commit; None: the main branch.

    Raises:
        MissingFileError: there is no such repository or revision, or it has no such SAE.
        UserError: the hub cannot be reached, and the SAE is not in the cache.
    """
    from huggingface_hub import constants, model_info, snapshot_download

    name = name.strip("/").removesuffix(".pt")
    if not name or ".." in PurePosixPath(name).parts or any(character in name for character in "*?["):
        raise UserError(f"'{name}' is no name of an SAE: expected a file's stem or a folder of '{repo_id}'")
    what = f"'{repo_id}'" + (f" at revision '{revision}'" if revision else "")
    with _told_in_one_line(what, name):
        snapshot = snapshot_download(
            repo_id,
            revision=revision,
            allow_patterns=[f"{name}.pt", f"{name}.yaml", f"{name}/*"],
            ignore_patterns=_TRAINING_STATE,
        )
    for path in (Path(snapshot) / f"{name}.pt", Path(snapshot) / name):
        if path.exists():
            return path
    if constants.HF_HUB_OFFLINE:
        raise UserError(f"'{name}' of {what} is not in the cache, and HF_HUB_OFFLINE is set")
    with _told_in_one_line(what, name):
        files = [file.rfilename for file in model_info(repo_id, revision=revision).siblings or []]
    raise MissingFileError(f"{what} on the hub has no '{name}': {_candidates(files, name)}")


@contextmanager
def _told_in_one_line(what: str, name: str) -> Iterator[None]:
    from huggingface_hub import constants, errors

    try:
        yield
    except errors.RevisionNotFoundError:
        raise MissingFileError(f"no such revision on the hub: {what}") from None
    except errors.GatedRepoError:
        raise UserError(
            f"{what} on the hub is gated: ask for access on its page, then log in (hf auth login)"
        ) from None
    except errors.RepositoryNotFoundError:
        raise MissingFileError(
            f"no such repository on the hub: {what} (a private one needs a login: hf auth login)"
        ) from None
    except errors.LocalEntryNotFoundError as error:
        reason = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else f"the hub cannot be reached: {_short(error)}"
        raise UserError(f"'{name}' of {what} is not in the cache, and {reason}") from None
    except (OSError, ValueError, errors.HTTPError) as error:  # pyright: ignore[reportPrivateImportUsage]
        raise UserError(f"'{name}' of {what} cannot be downloaded: {_short(error)}") from None


def _candidates(files: list[str], name: str) -> str:
    paths = [PurePosixPath(file) for file in files]
    stems = {str(path.with_suffix("")) for path in paths if path.suffix == ".pt"}
    folders = {str(path.parent) for path in paths if path.name in ("cfg.json", "final_config.yaml")}
    found = sorted((stems | folders) - {"."})
    if not found:
        return "it has no SAEs that can be read (<name>.pt, or folders with cfg.json or final_config.yaml)"
    return f"it has {', '.join(found[:_N_SHOWN])}{', ...' if len(found) > _N_SHOWN else ''}.{did_you_mean(name, found)}"


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
