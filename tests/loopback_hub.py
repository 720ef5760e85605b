"""A small Hugging Face hub on loopback, and its client library started anew with an environment of the test's own.

It answers the two requests that `hf_hub_download` makes: HEAD of a file in a repository, which is answered by headers
and a redirect to another host as for large files, and GET of the file there, in whole or from a byte on.
"""

from __future__ import annotations

import hashlib
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from unittest import mock

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub:
    """The server; a context manager that stops it at the end.

    Attributes:
        files: "owner/name/file" -> content.
        requests: (method, path) of every request so far.
        cut_after: bytes after which the answer to a download ends though more was announced; None: it is whole.
        status: of every answer; 200: as it should be.
    """

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.requests: list[tuple[str, str]] = []
        self.cut_after: int | None = None
        self.status = 200
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)

    @property
    def port(self) -> int:
        return self._server.server_address[1]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> Hub:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Stop the server: from then on connections are refused, as without a network."""
        if self._thread.is_alive():
            self._server.shutdown()
            self._thread.join()
            self._server.server_close()

    @contextmanager
    def client(self, home: Path, **variables: str) -> Iterator[None]:
        """Give the process a huggingface_hub that has not been imported, with `home` as HF_HOME and this server.

        The client reads its environment once, at its import. Its former modules are back at the end.
        """
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
        own = {"HF_HOME": str(home), "HF_ENDPOINT": self.url, "HF_HUB_DISABLE_TELEMETRY": "1", **variables}
        own |= {"NO_PROXY": "127.0.0.1,localhost", "no_proxy": "127.0.0.1,localhost"}
        former = _client_modules()
        with mock.patch.dict(os.environ, {**kept, **own}, clear=True):
            for name in former:
                del sys.modules[name]
            try:
                yield
            finally:
                for name in _client_modules():
                    del sys.modules[name]
                sys.modules.update(former)


def _client_modules() -> dict[str, object]:
    return {name: module for name, module in sys.modules.items() if name.partition(".")[0] == "huggingface_hub"}


class _Handler(BaseHTTPRequestHandler):
    hub: Hub

    def log_message(self, *arguments: object) -> None:
        """Print nothing."""

    def _answer(self, status: int, **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()

    def do_HEAD(self) -> None:
        hub = self.hub
        hub.requests.append(("HEAD", self.path))
        repository, _, file = self.path.removeprefix("/").partition("/resolve/main/")
        content = hub.files.get(f"{repository}/{file}")
        if hub.status != 200:
            self._answer(hub.status, X_Error_Message="No entry\x1b[31m")
        elif content is not None:
            digest = hashlib.sha256(content).hexdigest()
            self._answer(
                302,
                Location=f"http://localhost:{hub.port}/blobs/{digest}",
                Content_Length="0",
                X_Repo_Commit=COMMIT,
                X_Linked_ETag=f'"{digest}"',
                X_Linked_Size=str(len(content)),
            )
        elif any(name.startswith(f"{repository}/") for name in hub.files):
            self._answer(404, X_Error_Code="EntryNotFound", X_Repo_Commit=COMMIT)
        else:
            self._answer(401, X_Error_Code="RepoNotFound", X_Error_Message="Repository not found")

    def do_GET(self) -> None:
        hub = self.hub
        hub.requests.append(("GET", self.path))
        digest = self.path.removeprefix("/blobs/")
        content = next((one for one in hub.files.values() if hashlib.sha256(one).hexdigest() == digest), None)
        if content is None:
            self._answer(404)
            return
        start = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").partition("-")[0])
        self._answer(206 if start else 200, Content_Length=str(len(content) - start))
        end = len(content) if hub.cut_after is None else min(len(content), hub.cut_after)
        self.wfile.write(content[start:end])
