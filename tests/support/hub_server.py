"""A Hugging Face hub on this machine, for one repository: what its own client asks for when it plans a download."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

_COMMIT = "0" * 39 + "1"


class Hub(ThreadingHTTPServer):
    """Serves folders as repositories, by id; counts the bytes of files that it sent, by name."""

    def __init__(self, repositories: dict[str, Path]) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repositories = repositories
        self.sent: dict[str, int] = {}

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


@contextlib.contextmanager
def serving(repositories: dict[str, Path]) -> Iterator[Hub]:
    with Hub(repositories) as hub:
        thread = threading.Thread(target=hub.serve_forever)
        thread.start()
        try:
            yield hub
        finally:
            hub.shutdown()
            thread.join()


class _Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        for id, folder in self.server.repositories.items():
            path = self.path.partition("?")[0]
            if path.startswith(f"/api/models/{id}/revision/"):
                return self._json({"id": id, "sha": _COMMIT, "siblings": []})
            if path.startswith(f"/api/models/{id}/tree/"):
                return self._json([_entry(file) for file in sorted(folder.iterdir())])
            if path.startswith(f"/{id}/resolve/"):
                return self._file(folder / path.rpartition("/")[2])
        return self._answer(404, b"", {"X-Error-Code": "RepoNotFound"})

    def _json(self, value: object) -> None:
        self._answer(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _file(self, path: Path) -> None:
        content, size = path.read_bytes(), path.stat().st_size
        byte_range = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        headers = {"X-Repo-Commit": _COMMIT, "ETag": f'"{_digest(path)}"'}
        if byte_range:
            start, stop = int(byte_range[1]), min(size, int(byte_range[2] or size) + 1)
            content, headers["Content-Range"] = content[start:stop], f"bytes {start}-{stop - 1}/{size}"
        if self.command == "GET":
            self.server.sent[path.name] = self.server.sent.get(path.name, 0) + len(content)
        self._answer(206 if byte_range else 200, content, headers)

    def _answer(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing: the output of a test is for what fails."""


def _entry(path: Path) -> dict[str, object]:
    return {"type": "file", "path": path.name, "size": path.stat().st_size, "oid": _digest(path)}


def _digest(path: Path) -> str:
    return hashlib.sha1(path.name.encode()).hexdigest()
