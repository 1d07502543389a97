"""A real S3-compatible server on this machine, and a proxy before it that fails now and then."""

from __future__ import annotations

import contextlib
import http.client
import os
import random
import re
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

import pytest

BUCKET = "bucket"
REGION = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1"}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def s3_environment(port: int) -> dict[str, str]:
    """What a process must have in its environment to find the server."""
    return {**REGION, "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}"}


@contextlib.contextmanager
def s3_server() -> Iterator[int]:
    """Moto's server in a process of its own, with an empty bucket; yields its port."""
    port = free_port()
    process = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={**os.environ, **REGION},
    )
    try:
        deadline = time.monotonic() + 60
        while True:
            try:
                connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
                connection.request("PUT", f"/{BUCKET}")
                if connection.getresponse().status == 200:
                    break
            except OSError:
                if time.monotonic() > deadline or process.poll() is not None:
                    raise
                time.sleep(0.1)
        yield port
    finally:
        process.kill()
        process.wait()


@contextlib.contextmanager
def s3_here(port: int) -> Iterator[None]:
    """This process talks to the server at `port`; connections to another one are forgotten."""
    import fsspec

    with pytest.MonkeyPatch.context() as patch:
        for name, value in s3_environment(port).items():
            patch.setenv(name, value)
        fsspec.get_filesystem_class("s3").clear_instance_cache()
        yield
        fsspec.get_filesystem_class("s3").clear_instance_cache()


class FaultyProxy:
    """Passes requests on to a server, and for a share of them fails instead: 503, a cut connection, or no answer.

    Attributes:
        share: of the requests that go wrong.
        out: requests ("GET /bucket/key?query") in which this pattern is found get 503, always; None: none.
        planned: kinds that the next requests meet, before any is left to chance.
        silence: seconds of no answer, after which the connection is cut.
        given_up: silences that the client did not sit out: its own timeout ended them.
        faults: how often which kind was done.
    """

    def __init__(self, server_port: int, share: float, seed: int, silence: float = 3.0) -> None:
        self.server_port, self.share, self.silence = server_port, share, silence
        self.faults: Counter[str] = Counter()
        self.requests = 0
        self.out: str | None = None
        self.planned: list[str] = []
        self.given_up = 0
        self._rng = random.Random(seed)
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def handle_any(self) -> None:
                proxy.handle(self)

            do_GET = do_PUT = do_HEAD = do_POST = do_DELETE = handle_any  # noqa: N815

            def log_message(self, *args: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.port = self._server.server_port
        Thread(target=self._server.serve_forever, daemon=True).start()

    def handle(self, request: BaseHTTPRequestHandler) -> None:
        self.requests += 1
        fault = None
        if self.planned:
            fault = self.planned.pop()
        elif self._rng.random() < self.share:
            fault = self._rng.choice(["503", "cut before", "cut within", "lost answer", "silence"])
        if fault is not None:
            self.faults[fault] += 1
        body = request.rfile.read(int(request.headers.get("Content-Length") or 0))
        if fault == "503" or (self.out is not None and re.search(self.out, f"{request.command} {request.path}")):
            message = b"<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"
            return self._answer(request, 503, {"Content-Type": "application/xml"}, message)
        if fault == "cut before":
            return self._cut(request)
        if fault == "silence":
            time.sleep(self.silence)
            with contextlib.suppress(BlockingIOError):
                self.given_up += not request.connection.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
            return self._cut(request)
        upstream = http.client.HTTPConnection("127.0.0.1", self.server_port, timeout=60)
        headers = {name: value for name, value in request.headers.items() if name.lower() != "connection"}
        upstream.request(request.command, request.path, body, headers)
        response = upstream.getresponse()
        data = response.read()
        upstream.close()
        if fault == "lost answer":  # done, but nobody is told
            return self._cut(request)
        self._answer(request, response.status, dict(response.getheaders()), data, cut=fault == "cut within")

    def _answer(
        self, request: BaseHTTPRequestHandler, status: int, headers: dict[str, str], data: bytes, cut: bool = False
    ) -> None:
        with contextlib.suppress(OSError):
            request.send_response_only(status)
            for name, value in headers.items():
                if name.lower() not in ("content-length", "connection", "transfer-encoding"):
                    request.send_header(name, value)
            size = headers.get("Content-Length") or headers.get("content-length")
            request.send_header("Content-Length", size if request.command == "HEAD" and size else str(len(data)))
            request.end_headers()
            if request.command != "HEAD":
                request.wfile.write(data[: len(data) // 2] if cut else data)
        if cut:
            self._cut(request)

    def _cut(self, request: BaseHTTPRequestHandler) -> None:
        request.close_connection = True
        with contextlib.suppress(OSError):
            request.connection.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
