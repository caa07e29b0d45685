"""The files of a W&B run: listed and downloaded, with a key through `wandb.Api`, without one where the run is public.

(`wandb.Api` demands a key even for what anybody may see; the server itself answers the same query without one.)
"""

import base64
import hashlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar
from urllib.parse import urlsplit

import requests

from e2e_sae.checkpoint.files import new_file
from e2e_sae.errors import MissingFileError, RunFailed, UserError
from e2e_sae.wandb_session import end_wandb_service, quiet_wandb, wandb_errors

TIMEOUT_S = 20
"""For the server to answer, or to go on with a download."""
FILES_QUERY = """
query RunFiles($project: String!, $entity: String!, $name: String!, $fileCursor: String, $fileLimit: Int = 200) {
  project(name: $project, entityName: $entity) {
    run(name: $name) {
      files(after: $fileCursor, first: $fileLimit) {
        edges { node { name url sizeBytes md5 } }
        pageInfo { endCursor hasNextPage }
      }
    }
  }
}
"""
AnswerT = TypeVar("AnswerT")


class WandbPath(NamedTuple):
    """Which run."""

    entity: str
    """User or team."""
    project: str
    """Project."""
    id: str
    """The run's id (not its name)."""

    def __str__(self) -> str:
        return "/".join(self)


class RemoteFile(NamedTuple):
    """One file of a run."""

    name: str
    """As the server says it: never to be used as a path."""
    url: str
    """Where it is."""
    size: int
    """Bytes."""
    md5: str | None
    """Base64; None where the server does not know."""

    def is_same_as(self, path: Path) -> bool:
        """Says whether a local file has this content, as far as the server tells it."""
        if not path.is_file() or path.stat().st_size != self.size:
            return False
        if not self.md5:
            return True
        with path.open("rb") as content:
            return base64.b64encode(hashlib.file_digest(content, "md5").digest()).decode() == self.md5


class ServerAway(Exception):
    """W&B cannot be reached."""


class WandbServer:
    """W&B, as whoever the environment or `wandb login` says we are, or as nobody."""

    def __init__(self) -> None:
        """
        Raises:
            UserError: the key was refused.
            ServerAway: W&B cannot be reached.
        """
        from wandb.errors import UsageError

        wandb = self._ask(quiet_wandb)
        self._base_url: str = wandb.setup().settings.base_url
        # First, because `wandb` itself does not give up at once.
        self._send("HEAD", self._base_url)
        try:
            self._api: Any = self._ask(lambda: wandb.Api(timeout=TIMEOUT_S))
        except UsageError:  # no key
            self._api = None

    def default_entity(self) -> str:
        """Returns the entity of the key's owner.

        Raises:
            UserError: there is none.
        """
        entity = self._api and self._ask(lambda: self._api.default_entity)
        if not entity:
            raise UserError("whose run? expected 'entity/project/run_id' (or WANDB_ENTITY, or a W&B key, in .env)")
        return str(entity)

    def files(self, path: WandbPath) -> list[RemoteFile]:
        """Returns the files of a run.

        Raises:
            MissingFileError: there is no such run, or it may not be seen.
        """
        if self._api is None:
            return list(self._public_files(path))
        try:
            files = self._ask(lambda: list(self._api.run(str(path)).files()))
        except LookupError:
            raise MissingFileError(f"W&B has no run '{path}', or your key may not see it") from None
        return [RemoteFile(str(f.name), str(f.url), int(f.size), f.md5) for f in files]

    def download(self, file: RemoteFile, target: Path) -> None:
        """Writes a file at once, checked against what was announced.

        Raises:
            RunFailed: it broke off, or is something else.
        """
        # The key is for W&B itself, not for the storage that it may send us to.
        is_own = urlsplit(file.url).netloc == urlsplit(self._base_url).netloc
        auth = ("api", self._api.api_key) if is_own and self._api is not None and self._api.api_key else None
        try:
            with (
                new_file(target) as temporary,
                requests.get(file.url, auth=auth, stream=True, timeout=TIMEOUT_S) as response,
            ):
                response.raise_for_status()
                with temporary.open("wb") as out:
                    for block in response.iter_content(1 << 20):
                        out.write(block)
                if not file.is_same_as(temporary):
                    raise RunFailed(f"the download of {target.name} from W&B is not what was announced: try again")
        except requests.RequestException as error:
            raise RunFailed(f"the download of {target.name} from W&B broke off: {_first_line(error)}") from None

    def _ask(self, question: Callable[[], AnswerT]) -> AnswerT:
        """Returns the answer of the `wandb` package.

        Raises:
            UsageError: there is no key.
            UserError: the key was refused.
            LookupError: there is no such thing.
            ServerAway: everything else.
        """
        from wandb.errors import UsageError

        try:
            return question()
        except UsageError:
            raise
        except (*wandb_errors(), ValueError) as error:
            text = _first_line(error)
            if "Could not find" in text or "404" in text:
                raise LookupError(text) from None
            if any(words in text for words in ("not logged in", "permission", "API key must")):
                raise UserError(f"W&B refused the key: {text}") from None
            end_wandb_service()  # it would go on trying
            raise ServerAway(text) from None

    def _public_files(self, path: WandbPath) -> Iterator[RemoteFile]:
        cursor: str | None = None
        while True:
            run = (self._query(path, cursor).get("project") or {}).get("run")
            if not run:
                raise MissingFileError(
                    f"W&B has no public run '{path}': a private one needs WANDB_API_KEY in .env, or `wandb login`"
                )
            for edge in run["files"]["edges"]:
                node = edge["node"]
                yield RemoteFile(str(node["name"]), str(node["url"]), int(node["sizeBytes"]), node.get("md5"))
            if not run["files"]["pageInfo"]["hasNextPage"]:
                return
            cursor = run["files"]["pageInfo"]["endCursor"]

    def _query(self, path: WandbPath, cursor: str | None) -> Mapping[str, Any]:
        variables = {"entity": path.entity, "project": path.project, "name": path.id, "fileCursor": cursor}
        body = {"query": FILES_QUERY, "variables": variables}
        try:
            answer = self._send("POST", f"{self._base_url}/graphql", json=body).json()
        except ValueError:
            raise ServerAway(f"{self._base_url} does not answer as W&B does") from None
        return (isinstance(answer, dict) and answer.get("data")) or {}

    def _send(self, method: str, url: str, json: Any = None) -> requests.Response:
        try:
            return requests.request(method, url, json=json, timeout=TIMEOUT_S)
        except requests.Timeout:
            raise ServerAway(f"no answer from {self._base_url} within {TIMEOUT_S} s") from None
        except requests.RequestException:
            raise ServerAway(f"no connection to {self._base_url}") from None


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(":. ")
