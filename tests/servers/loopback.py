"""A threaded HTTP server of one function, which can also break off an answer or never give it."""

import json
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

JSON_TYPE = "application/json"


@dataclass(frozen=True)
class Request:
    """A client's request; `headers` have lower-case names."""

    path: str
    headers: Mapping[str, str]
    content: bytes

    @property
    def body(self) -> dict[str, Any]:
        return json.loads(self.content)


@dataclass(frozen=True)
class Answer:
    """The server's answer. `delay` is in seconds; `cut` closes the connection early."""

    content: bytes
    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)
    kind: str = JSON_TYPE
    delay: float = 0.0
    cut: int | None = None  # bytes of the body to send; -1: not even a status line


def as_json(body: object, status: int = 200, **headers: str) -> Answer:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return Answer(json.dumps(body).encode(), status, named)


class _Server(ThreadingHTTPServer):
    daemon_threads = False  # joined on closing: no thread outlives the context

    def __init__(self, respond: Callable[[Request], Answer], port: int) -> None:
        self.respond = respond
        self.closing = threading.Event()
        super().__init__(("127.0.0.1", port), _Handler)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that has gone away is part of the tests; anything else is shown."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    server: _Server

    def do_POST(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        headers = {name.lower(): value for name, value in self.headers.items()}
        content = self.rfile.read(length)
        if len(content) < length:  # the client was killed while it sent: that is no request
            self.close_connection = True
            return
        answer = self.server.respond(Request(self.path, headers, content))
        self.server.closing.wait(answer.delay)
        if answer.cut == -1:
            return
        self.send_response(answer.status)
        self.send_header("Content-Type", answer.kind)
        self.send_header("Content-Length", str(len(answer.content)))
        for name, value in answer.headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(answer.content[: answer.cut])

    def do_GET(self) -> None:
        self.do_POST()

    def do_PUT(self) -> None:
        self.do_POST()

    def log_message(self, format: str, *args: Any) -> None:
        """Requests are counted by the tests, not printed."""


@contextmanager
def answering(respond: Callable[[Request], Answer], port: int = 0) -> Iterator[str]:
    """`respond` behind HTTP, called from several threads at once; yields the base URL."""
    with _Server(respond, port) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,), name="loopback")
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}/v1"
        finally:
            server.closing.set()
            server.shutdown()
            thread.join()
