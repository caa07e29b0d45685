"""W&B runs: what they logged last, and their files, with a key, or without one where they are public.

(`wandb.Api` demands a key even for what anybody may see; the server itself answers the same query without one.)
"""

import base64
import hashlib
import json
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
# Fields as `wandb.Api` asks for them (wandb 0.31, apis/public/runs.py).
RUN_QUERY = """
query RunRecord($project: String!, $entity: String!, $name: String!) {
  project(name: $project, entityName: $entity) {
    run(name: $name) { name displayName state config summaryMetrics }
  }
}
"""
RUNS_QUERY = """
query ProjectRuns($project: String!, $entity: String!, $cursor: String, $perPage: Int = 20) {
  project(name: $project, entityName: $entity) {
    runs(after: $cursor, first: $perPage, order: "+created_at") {
      edges { node { name displayName state config summaryMetrics } }
      pageInfo { endCursor hasNextPage }
    }
  }
}
"""
"""In small pages: a summary of the paper's library holds lists of all alive latents."""
HISTORY_QUERY = """
query RunSampledHistory($project: String!, $entity: String!, $name: String!, $specs: [JSONString!]!) {
  project(name: $project, entityName: $entity) {
    run(name: $name) { sampledHistory(specs: $specs) }
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


class RemoteRun(NamedTuple):
    """One run, as it was left."""

    path: WandbPath
    """Which."""
    name: str
    """What people see."""
    state: str
    """`finished`, `running`, `crashed`, `failed`, `killed`."""
    config: dict[str, Any]
    """Settings, as they were written."""
    summary: dict[str, Any]
    """The last value of every key that was logged."""


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

    def run(self, path: WandbPath) -> RemoteRun:
        """Returns a run.

        Raises:
            MissingFileError: there is no such run, or it may not be seen.
        """
        variables = {"entity": path.entity, "project": path.project, "name": path.id}
        node = (self._query(RUN_QUERY, variables).get("project") or {}).get("run")
        if not node:
            raise MissingFileError(f"W&B has no {self._seen} run '{path}'{self._advice}")
        return _remote_run(path.entity, path.project, node)

    def runs(self, entity: str, project: str) -> Iterator[RemoteRun]:
        """Yields the runs of a project, the oldest first.

        Raises:
            MissingFileError: there is no such project, or it may not be seen.
        """
        cursor: str | None = None
        while True:
            answer = self._query(RUNS_QUERY, {"entity": entity, "project": project, "cursor": cursor}).get("project")
            if not answer:
                raise MissingFileError(f"W&B has no {self._seen} project '{entity}/{project}'{self._advice}")
            for edge in answer["runs"]["edges"]:
                yield _remote_run(entity, project, edge["node"])
            if not answer["runs"]["pageInfo"]["hasNextPage"]:
                return
            cursor = answer["runs"]["pageInfo"]["endCursor"]

    def history(self, path: WandbPath, key: str, n_points: int) -> list[tuple[float, float]]:
        """Returns (step, value) of a logged key, at most so many of them, evenly sampled; none if it was not logged."""
        specs = [json.dumps({"keys": ["_step", key], "samples": n_points})]
        variables = {"entity": path.entity, "project": path.project, "name": path.id, "specs": specs}
        run = (self._query(HISTORY_QUERY, variables).get("project") or {}).get("run") or {}
        points = (run.get("sampledHistory") or [[]])[0]
        return [(float(p["_step"]), float(p[key])) for p in points if isinstance(p.get(key), int | float)]

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
            variables = {"project": path.project, "entity": path.entity, "name": path.id, "fileCursor": cursor}
            run = (self._query(FILES_QUERY, variables).get("project") or {}).get("run")
            if not run:
                raise MissingFileError(f"W&B has no {self._seen} run '{path}'{self._advice}")
            for edge in run["files"]["edges"]:
                node = edge["node"]
                yield RemoteFile(str(node["name"]), str(node["url"]), int(node["sizeBytes"]), node.get("md5"))
            if not run["files"]["pageInfo"]["hasNextPage"]:
                return
            cursor = run["files"]["pageInfo"]["endCursor"]

    @property
    def _seen(self) -> str:
        return "public" if self._api is None else "visible"

    @property
    def _advice(self) -> str:
        return ": a private one needs WANDB_API_KEY in .env, or `wandb login`" if self._api is None else ""

    def _query(self, query: str, variables: Mapping[str, Any]) -> Mapping[str, Any]:
        """Returns the data of an answer, what is not there missing or null.

        Raises:
            UserError: the key was refused.
            ServerAway: there is no such answer.
        """
        auth = ("api", str(self._api.api_key)) if self._api is not None else None
        body = {"query": query, "variables": variables}
        response = self._send("POST", f"{self._base_url}/graphql", json=body, auth=auth)
        if response.status_code in (401, 403):
            raise UserError(f"W&B refused the key ({response.status_code} {response.reason})")
        try:
            answer = response.json()
        except ValueError:
            raise ServerAway(f"{self._base_url} does not answer as W&B does") from None
        return (isinstance(answer, dict) and answer.get("data")) or {}

    def _send(self, method: str, url: str, json: Any = None, auth: tuple[str, str] | None = None) -> requests.Response:
        try:
            return requests.request(method, url, json=json, auth=auth, timeout=TIMEOUT_S)
        except requests.Timeout:
            raise ServerAway(f"no answer from {self._base_url} within {TIMEOUT_S} s") from None
        except requests.RequestException:
            raise ServerAway(f"no connection to {self._base_url}") from None


def _remote_run(entity: str, project: str, node: Mapping[str, Any]) -> RemoteRun:
    config = {key: item["value"] for key, item in _mapping(node["config"]).items() if key != "_wandb"}
    path = WandbPath(entity, project, str(node["name"]))
    name = str(node["displayName"] or node["name"])
    return RemoteRun(path, name, str(node["state"]), config, _mapping(node["summaryMetrics"]))


def _mapping(text: str | None) -> dict[str, Any]:
    """Returns the mapping that W&B sends as JSON text; Python's NaN and Infinity are allowed in it."""
    values = json.loads(text) if text else {}
    return values if isinstance(values, dict) else {}


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(":. ")
