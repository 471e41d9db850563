"""A hub of models on this machine, for programs that download from one: ``HF_ENDPOINT``."""

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class HubServer(ThreadingHTTPServer):
    """Serves the folder ``root/OWNER/NAME`` as that repository; ``asked`` are files downloaded."""

    daemon_threads = True

    def __init__(self, root: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.root = root
        self.asked: list[str] = []

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: HubServer

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def _answer(self, with_body: bool) -> None:
        path = self.path.partition("?")[0].strip("/")
        if path.startswith("api/models/"):
            self._describe(path, with_body)
            return
        repository, _, rest = path.partition("/resolve/")
        file = self.server.root / repository / rest.partition("/")[2]
        if not file.is_file():
            missing = (
                "EntryNotFound" if (self.server.root / repository).is_dir() else "RepoNotFound"
            )
            self._send(404, b"", {"X-Error-Code": missing}, with_body)
            return
        data = file.read_bytes()
        if with_body:
            self.server.asked.append(file.name)
        headers = {
            "ETag": f'"{hashlib.sha256(data).hexdigest()}"',
            "X-Repo-Commit": COMMIT,
            "Accept-Ranges": "bytes",
        }
        self._send(200, data, headers, with_body)

    def _describe(self, path: str, with_body: bool) -> None:
        repository = "/".join(path.split("/")[2:4])
        folder = self.server.root / repository
        if not folder.is_dir():
            self._send(404, b"", {"X-Error-Code": "RepoNotFound"}, with_body)
            return
        files = [{"rfilename": each.name} for each in sorted(folder.iterdir())]
        found = {"id": repository, "sha": COMMIT, "siblings": files, "tags": [], "private": False}
        body = [] if "/tree/" in path else found
        self._send(200, json.dumps(body).encode(), {"Content-Type": "application/json"}, with_body)

    def _send(self, status: int, data: bytes, headers: dict[str, str], with_body: bool) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(name, value)
        self.end_headers()
        if with_body:
            self.wfile.write(data)

    def log_message(self, format: str, *args: object) -> None:
        """Tests are quiet."""


@contextmanager
def hub_of(root: Path) -> Iterator[HubServer]:
    """A hub that serves the folders below ``root`` until the context ends."""
    with HubServer(root) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()
