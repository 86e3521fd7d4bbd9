"""A web server on this machine that serves a folder, and fails when it is told to."""

from __future__ import annotations

import contextlib
import html
import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import quote, unquote, urlsplit


class FolderServer:
    """Serves `folder`, with listings and byte ranges.

    Attributes:
        url: of the folder.
        requests: what was asked: method, path and range.
        broken: answer so many requests for files with `status`.
        cut: end so many answers after half of the bytes.
        forbidden: names answered with 403.
        ranges: give parts of files; else always the whole.
        down: hang up on everybody.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.requests: list[tuple[str, str, str | None]] = []
        self.broken = self.cut = 0
        self.status = 503
        self.forbidden: set[str] = set()
        self.ranges, self.down = True, False
        self.url = ""

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        name = unquote(urlsplit(request.path).path).strip("/")
        wanted = request.headers.get("Range")
        self.requests.append((request.command, name, wanted))
        path = self.folder / name
        if self.down:
            request.close_connection = True
            request.connection.shutdown(socket.SHUT_RDWR)
        elif path.is_dir():
            self._list(request, path)
        elif self.broken:
            self.broken -= 1
            self._send(request, self.status, b"busy")
        elif name in self.forbidden:
            self._send(request, 403, b"no")
        elif not path.is_file():
            self._send(request, 404, b"nothing here")
        else:
            self._file(request, path.read_bytes(), wanted)

    def _list(self, request: BaseHTTPRequestHandler, path: Path) -> None:
        if not urlsplit(request.path).path.endswith("/"):
            request.send_response(301)
            request.send_header("Location", request.path + "/")
            request.send_header("Content-Length", "0")
            request.end_headers()
            return
        names = [each.name + ("/" if each.is_dir() else "") for each in sorted(path.iterdir())]
        links = "".join(f'<a href="{html.escape(quote(name))}">{html.escape(name)}</a>' for name in names)
        self._send(request, 200, f'<a href="../">up</a><a href="?C=N;O=D">by name</a>{links}'.encode(), "text/html")

    def _file(self, request: BaseHTTPRequestHandler, content: bytes, wanted: str | None) -> None:
        status, headers = 200, {}
        if wanted and self.ranges:
            first, _, last = wanted.removeprefix("bytes=").partition("-")
            end = min(int(last) + 1 if last else len(content), len(content))
            headers["Content-Range"] = f"bytes {first}-{end - 1}/{len(content)}"
            status, content = 206, content[int(first) : end]
        request.send_response(status)
        for key, value in {"Content-Length": str(len(content)), **headers}.items():
            request.send_header(key, value)
        request.end_headers()
        if request.command == "HEAD":
            return
        if self.cut and len(content) > 1:
            self.cut -= 1
            content = content[: len(content) // 2]
            request.close_connection = True
        request.wfile.write(content)

    def _send(self, request: BaseHTTPRequestHandler, status: int, content: bytes, kind: str = "text/plain") -> None:
        request.send_response(status)
        request.send_header("Content-Type", kind)
        request.send_header("Content-Length", str(len(content)))
        request.end_headers()
        if request.command == "GET":
            request.wfile.write(content)


@contextlib.contextmanager
def serve(folder: Path) -> Iterator[FolderServer]:
    """A server for as long as the block lasts."""
    server = FolderServer(folder)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            server.answer(self)

        def do_HEAD(self) -> None:
            server.answer(self)

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as listening:
        listening.daemon_threads = True
        server.url = f"http://127.0.0.1:{listening.server_address[1]}"
        thread = threading.Thread(target=listening.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        thread.start()
        try:
            yield server
        finally:
            listening.shutdown()
