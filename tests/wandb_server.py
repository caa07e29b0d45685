"""A stand-in for W&B on loopback: the server's side of what the real client says, kept in memory.

Runs (create, resume, log, upload, finish), the public API (find a run, list and download its files, with a key or
without one), and sweeps (create, and an agent that is handed the grid). It can refuse keys, die in the middle of a
run, and send file names that no honest server sends.
"""

import base64
import gzip
import hashlib
import itertools
import json
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, cast
from urllib.parse import quote, unquote, urlsplit

import yaml

KEY = "0123456789" * 4
"""The one key that is accepted."""
ENTITY = "somebody"
"""Whose key it is."""
READS = ("Run", "RunFiles", "RunRecord", "ProjectRuns", "RunSampledHistory")
"""Operations that anybody may ask of a public project."""


@dataclass
class ServedRun:
    """What the server was told about one run."""

    entity: str
    project: str
    id: str
    name: str = ""
    """What people see."""
    sweep: str | None = None
    config: dict[str, Any] = field(default_factory=dict)
    """As the client sends it: {key: {"value": ...}}."""
    history: list[dict[str, Any]] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)
    files: dict[str, bytes] = field(default_factory=dict)
    exit_code: int | None = None
    """None: not finished."""
    n_resumes: int = 0
    """How often a client went on with it."""

    @property
    def path(self) -> str:
        """`entity/project/id`."""
        return f"{self.entity}/{self.project}/{self.id}"

    @property
    def values(self) -> dict[str, Any]:
        """The config as the user wrote it."""
        return {key: item["value"] for key, item in self.config.items() if key != "_wandb"}


@dataclass
class ServedSweep:
    """A grid and how far it has been handed out."""

    name: str
    config: dict[str, Any]
    todo: list[dict[str, Any]]
    """Arguments of the runs still to be started."""


class WandbServer:
    """Use as a context manager; `url` is what `WANDB_BASE_URL` has to be."""

    def __init__(self) -> None:
        self.runs: dict[str, ServedRun] = {}
        """By `entity/project/id`."""
        self.sweeps: dict[str, ServedSweep] = {}
        self.public_projects: set[str] = set()
        """`entity/project` that anybody may read without a key."""
        self.downloads: list[str] = []
        """Names of the files that were fetched."""
        self.unknown: list[str] = []
        """Operations that the client asked for and this server does not know."""
        self.dies_at_upload_of: str | None = None
        """The server goes away when somebody begins to upload this file."""
        self.refuses_uploads = False
        self.is_dead = False
        self.is_stuck = threading.Event()
        """While set, connections are taken and never answered."""
        self._http = _QuietServer(("127.0.0.1", 0), _handler_for(self))
        self._thread = threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)

    @property
    def url(self) -> str:
        """`http://127.0.0.1:<port>`."""
        return f"http://127.0.0.1:{self._http.server_address[1]}"

    def __enter__(self) -> "WandbServer":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.is_stuck.clear()
        self.die()

    def die(self) -> None:
        """Refuses every connection from now on."""
        if not self.is_dead:
            self.is_dead = True
            threading.Thread(target=self._http.shutdown, daemon=True).start()
            self._http.server_close()

    def run(self) -> ServedRun:
        """Returns the only run."""
        (run,) = self.runs.values()
        return run

    def add_run(self, path: str, files: dict[str, bytes]) -> ServedRun:
        """Adds a run as if it had been logged earlier."""
        entity, project, run_id = path.split("/")
        self.runs[path] = ServedRun(entity, project, run_id, files=dict(files), exit_code=0)
        return self.runs[path]

    # --- GraphQL: one method per operation, `_<name>(variables)`; None stands for null ---

    def answer(self, operation: str, variables: dict[str, Any]) -> dict[str, Any] | None:
        """Returns an operation's `data`; None if it is not known."""
        method = getattr(self, f"_{operation}", None)
        if method is None:
            self.unknown.append(operation)
            return None
        return method(variables)

    def _Viewer(self, _: dict[str, Any]) -> dict[str, Any]:
        user = {"id": "1", "entity": ENTITY, "username": ENTITY, "name": ENTITY, "email": "", "flags": "{}"}
        return {"viewer": {**user, "admin": False, "teams": {"edges": []}}}

    _GetViewer = _Viewer
    _GetDefaultEntity = _Viewer

    def _ServerFeaturesQuery(self, _: dict[str, Any]) -> dict[str, Any]:
        return {"serverInfo": {"features": []}}

    def _OrganizationCoreWeaveOrganizationID(self, _: dict[str, Any]) -> dict[str, Any]:
        return {"entity": {"organization": None}}

    def _RunResumeStatus(self, v: dict[str, Any]) -> dict[str, Any]:
        entity = v["entity"] or ENTITY
        run = self.runs.get(f"{entity}/{v['project']}/{v['name']}")
        project = {"id": "1", "name": v["project"], "entity": {"id": "1", "name": entity}}
        if run is None:
            return {"model": {**project, "bucket": None}}
        run.n_resumes += 1
        run.exit_code = None
        tail = [json.dumps(line) for line in run.history[-1:]]
        bucket = {
            **_node(run),
            "logLineCount": 0,
            "historyLineCount": len(run.history),
            "eventsLineCount": 0,
            "historyTail": json.dumps(tail),
            "eventsTail": "[]",
            "notes": None,
            # A run counts as begun once it has told its telemetry.
            "wandbConfig": json.dumps({key: run.config["_wandb"]["value"][key] for key in ("t",)}),
        }
        return {"model": {**project, "bucket": bucket}}

    def _UpsertBucket(self, v: dict[str, Any]) -> dict[str, Any]:
        entity = v["entity"] or ENTITY
        run = self.runs.get(f"{entity}/{v['project']}/{v['name']}")
        is_new = run is None
        if run is None:
            run = ServedRun(entity, v["project"], v["name"])
            self.runs[run.path] = run
        run.name = v.get("displayName") or run.name or run.id
        run.sweep = v.get("sweep") or run.sweep
        if v.get("config"):
            run.config = json.loads(v["config"])
        project = {"id": "1", "name": run.project, "entity": {"id": "1", "name": entity}}
        bucket = {**_node(run), "project": project, "historyLineCount": len(run.history)}
        return {"upsertBucket": {"bucket": bucket, "inserted": is_new}}

    def _CreateRunFiles(self, v: dict[str, Any]) -> dict[str, Any]:
        path = f"{v['entity'] or ENTITY}/{v['project']}/{v['run']}"
        files = [{"name": n, "uploadUrl": f"{self.url}/upload/{path}/{quote(n, safe='')}"} for n in v["files"]]
        return {"createRunFiles": {"runID": path, "uploadHeaders": [], "files": files}}

    def _MarkRunFilesUploaded(self, _: dict[str, Any]) -> dict[str, Any]:
        return {"markRunFilesUploaded": {"success": True}}

    def _RunStoppedStatus(self, _: dict[str, Any]) -> dict[str, Any]:
        return {"project": {"run": {"stopped": False}}}

    def _Run(self, v: dict[str, Any]) -> dict[str, Any]:
        run = self.runs.get(f"{v['entity']}/{v['project']}/{v['name']}")
        return {"project": {"run": run and {"projectId": 1, **_node(run)}}}

    def _RunRecord(self, v: dict[str, Any]) -> dict[str, Any]:
        run = self.runs.get(f"{v['entity']}/{v['project']}/{v['name']}")
        return {"project": {"run": run and _node(run)}}

    def _ProjectRuns(self, v: dict[str, Any]) -> dict[str, Any]:
        runs = [run for run in self.runs.values() if (run.entity, run.project) == (v["entity"], v["project"])]
        if not runs:
            return {"project": None}
        begin = int(v.get("cursor") or 0)
        end = begin + int(v.get("perPage") or 20)
        page = {"endCursor": str(end), "hasNextPage": end < len(runs)}
        return {"project": {"runs": {"edges": [{"node": _node(run)} for run in runs[begin:end]], "pageInfo": page}}}

    def _RunSampledHistory(self, v: dict[str, Any]) -> dict[str, Any]:
        run = self.runs[f"{v['entity']}/{v['project']}/{v['name']}"]
        keys = json.loads(v["specs"][0])["keys"]
        lines = [{key: line[key] for key in keys} for line in run.history if all(key in line for key in keys)]
        return {"project": {"run": {"sampledHistory": [lines]}}}

    def _RunFiles(self, v: dict[str, Any]) -> dict[str, Any]:
        run = self.runs.get(f"{v['entity']}/{v['project']}/{v['name']}")
        if run is None:
            return {"project": {"run": None}}
        begin = int(v.get("fileCursor") or 0)
        end = begin + int(v.get("fileLimit") or 50)
        edges = [{"cursor": "", "node": self._file(run, name)} for name in list(run.files)[begin:end]]
        page = {"endCursor": str(end), "hasNextPage": end < len(run.files)}
        files = {"edges": edges, "pageInfo": page}
        return {"project": {"internalId": "1", "run": {"fileCount": len(run.files), "files": files}}}

    def _file(self, run: ServedRun, name: str) -> dict[str, Any]:
        content = run.files[name]
        url = f"{self.url}/files/{run.path}/{quote(name, safe='')}"
        md5 = base64.b64encode(hashlib.md5(content).digest()).decode()
        info = {"sizeBytes": len(content), "mimetype": "", "updatedAt": "2026-01-01T00:00:00", "md5": md5}
        return {"id": name, "name": name, "url": url, "directUrl": url, **info}

    def _UpsertSweep(self, v: dict[str, Any]) -> dict[str, Any]:
        config = yaml.safe_load(v["config"])
        name = f"sweep{len(self.sweeps)}"
        self.sweeps[name] = ServedSweep(name, config, list(_grid(config["parameters"])))
        project = {"id": "1", "name": v["projectName"], "entity": {"id": "1", "name": v["entityName"] or ENTITY}}
        return {"upsertSweep": {"sweep": {"name": name, "project": project}, "configValidationWarnings": []}}

    def _SweepWithRuns(self, v: dict[str, Any]) -> dict[str, Any]:
        sweep = self.sweeps.get(v["sweep"])
        if sweep is None:
            return {"project": {"sweep": None}}
        config = yaml.safe_dump(sweep.config)
        node = {"id": sweep.name, "name": sweep.name, "method": "grid", "state": "RUNNING", "config": config}
        return {"project": {"sweep": {**node, "runs": {"edges": []}}}}

    def _CreateAgent(self, v: dict[str, Any]) -> dict[str, Any]:
        return {"createAgent": {"agent": {"id": v["sweep"]}}}

    def _Heartbeat(self, v: dict[str, Any]) -> dict[str, Any]:
        sweep = self.sweeps[v["id"]]
        commands: list[dict[str, Any]] = []
        if json.loads(v["runState"]):
            pass  # busy
        elif sweep.todo:
            n = f"{sweep.name}run{len(sweep.todo)}"
            commands = [{"type": "run", "run_id": n, "args": sweep.todo.pop(0), "program": sweep.config["program"]}]
        else:
            commands = [{"type": "exit"}]
        return {"agentHeartbeat": {"agent": {"id": v["id"]}, "commands": json.dumps(commands)}}

    # --- everything else ---

    def stream(self, path: str, body: dict[str, Any]) -> None:
        """Takes what a run logs; lines have a place, so that sending them again changes nothing."""
        run = self.runs[path]
        for name, chunk in body.get("files", {}).items():
            lines = [json.loads(line) for line in chunk["content"]] if name.endswith((".jsonl", ".json")) else []
            if name == "wandb-history.jsonl":
                run.history[chunk["offset"] :] = lines
            elif name == "wandb-summary.json" and lines:
                run.summary = lines[-1]
        if body.get("complete"):
            run.exit_code = body.get("exitcode")

    def may_read(self, key: str | None, project: str) -> bool:
        """Says whether the holder of `key` (None: nobody in particular) may see `entity/project`."""
        return key == KEY or project in self.public_projects


class _QuietServer(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Says nothing about connections that the client has broken off."""


def _node(run: ServedRun) -> dict[str, Any]:
    state = {None: "running", 0: "finished"}.get(run.exit_code, "failed")
    return {
        "id": run.path,
        "name": run.id,
        "displayName": run.name,
        "description": None,
        "tags": [],
        "sweepName": run.sweep,
        "state": state,
        "config": json.dumps(run.config),
        "group": None,
        "jobType": None,
        "commit": None,
        "readOnly": False,
        "createdAt": "2026-01-01T00:00:00",
        "heartbeatAt": "2026-01-01T00:00:00",
        "notes": None,
        "systemMetrics": "{}",
        "summaryMetrics": json.dumps(run.summary),
        "historyLineCount": len(run.history),
        "user": {"name": ENTITY, "username": ENTITY},
        "historyKeys": None,
    }


def _grid(parameters: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yields the arguments of each run: {key: {"value": ...}}, nested parameters as mappings."""
    keys = list(parameters)
    for values in itertools.product(*(_choices(parameters[key]) for key in keys)):
        yield {key: {"value": value} for key, value in zip(keys, values, strict=True)}


def _choices(parameter: dict[str, Any]) -> list[Any]:
    if "parameters" in parameter:
        nested = _grid(parameter["parameters"])
        return [{key: item["value"] for key, item in args.items()} for args in nested]
    return parameter["values"] if "values" in parameter else [parameter["value"]]


def _handler_for(server: WandbServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, format: str, *args: Any) -> None:
            pass

        def do_POST(self) -> None:
            body = self._read()
            if self._is_gone():
                return
            place = urlsplit(self.path).path.strip("/").split("/")
            if self._key() not in (None, KEY) and place[0] in ("graphql", "files"):
                self._send(401, {"errors": [{"message": "user is not logged in"}]})
            elif place == ["graphql"]:
                self._graphql(json.loads(body))
            elif place[0] == "files" and place[-1] == "file_stream":
                server.stream("/".join(place[1:4]), json.loads(body))
                self._send(200, {"exitcode": None, "limits": {}})
            else:
                self._send(200, {})  # the client's telemetry

        def do_PUT(self) -> None:
            body = self._read()
            if self._is_gone():
                return
            _, entity, project, run, name = urlsplit(self.path).path.strip("/").split("/", 4)
            if unquote(name) == server.dies_at_upload_of:
                server.die()
                self.close_connection = True
                return
            if server.refuses_uploads:
                self._send(403, {})
                return
            server.runs[f"{entity}/{project}/{run}"].files[unquote(name)] = body
            self._send(200, {})

        def do_GET(self) -> None:
            if self._is_gone():
                return
            _, entity, project, run, name = urlsplit(self.path).path.strip("/").split("/", 4)
            if not server.may_read(self._key(), f"{entity}/{project}"):
                self._send(404, {})
                return
            server.downloads.append(unquote(name))
            self._send(200, server.runs[f"{entity}/{project}/{run}"].files[unquote(name)])

        def _graphql(self, request: dict[str, Any]) -> None:
            match = re.search(r"(?:query|mutation)\s+(\w+)", request["query"])
            operation = match[1] if match else "?"
            variables = cast(dict[str, Any], request.get("variables") or {})
            if self._key() is None and operation not in READS:
                data: dict[str, Any] | None = {"viewer": None}
            elif operation in READS and not server.may_read(
                self._key(), f"{variables['entity']}/{variables['project']}"
            ):
                data = {"project": None}
            else:
                data = server.answer(operation, variables)
            if data is None:
                self._send(400, {"errors": [{"message": f"unknown operation {operation}"}]})
            else:
                self._send(200, {"data": data})

        def _key(self) -> str | None:
            scheme, _, value = self.headers.get("Authorization", "").partition(" ")
            return base64.b64decode(value).decode().partition(":")[2] if scheme == "Basic" else None

        def _is_gone(self) -> bool:
            while server.is_stuck.is_set() and not server.is_dead:
                threading.Event().wait(0.1)
            self.close_connection = self.close_connection or server.is_dead
            return server.is_dead

        def _read(self) -> bytes:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            return gzip.decompress(body) if self.headers.get("Content-Encoding") == "gzip" else body

        def _send(self, status: int, value: Any) -> None:
            body = value if isinstance(value, bytes) else json.dumps(value).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    return Handler
