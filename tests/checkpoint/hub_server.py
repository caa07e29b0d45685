"""A stand-in for the Hugging Face hub on loopback: what the real client asks for to download a repository's files."""

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = "0" * 39 + "1"


@contextmanager
def hub(repo_id: str, folder: Path) -> Iterator[str]:
    """Serves a folder as the only repository, at revision `main`, and gives the server's address."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            path = self.path.partition("?")[0]
            files = [p for p in sorted(folder.rglob("*")) if p.is_file()]
            names = {str(p.relative_to(folder)): p for p in files}
            api = f"/api/models/{repo_id}"
            if path in (api, f"{api}/revision/main", f"{api}/revision/{COMMIT}"):
                siblings = [{"rfilename": name} for name in names]
                self.answer(json.dumps({"id": repo_id, "sha": COMMIT, "siblings": siblings}).encode())
            elif path.startswith(f"{api}/revision/"):
                self.refuse("RevisionNotFound")
            elif path.startswith(f"{api}/tree/"):
                entries = [
                    {"type": "file", "path": name, "size": p.stat().st_size, "oid": self.digest(p.read_bytes())}
                    for name, p in names.items()
                ]
                self.answer(json.dumps(entries).encode())
            elif (name := path.removeprefix(f"/{repo_id}/resolve/{COMMIT}/")) in names:
                self.answer(names[name].read_bytes())
            else:
                self.refuse("EntryNotFound" if path.startswith(f"/{repo_id}/") else "RepoNotFound")

        do_HEAD = do_GET

        def answer(self, body: bytes) -> None:
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.send_header("ETag", f'"{self.digest(body)}"')
            self.send_header("X-Repo-Commit", COMMIT)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        def refuse(self, code: str) -> None:
            self.send_response(404)
            self.send_header("X-Error-Code", code)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def digest(self, body: bytes) -> str:
            return hashlib.sha1(body).hexdigest()

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
