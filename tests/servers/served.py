"""`transformers serve` as a real process on the loopback interface."""

import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

READY = 500.0  # seconds until it must answer: only against hangs
PATIENCE = 60.0  # seconds it may take to end


@contextmanager
def served(folder: Path | str, *arguments: str) -> Iterator[str]:
    """The model in `folder` on the CPU; `arguments` are further options of the command.

    Requests name the model by `str(folder)`. Raises RuntimeError with the end of the server's
    log if it stops or is not ready in time.
    """
    port = _free_port()
    command = [str(Path(sys.executable).parent / "transformers"), "serve", str(folder)]
    command += ["--host", "127.0.0.1", "--port", str(port), "--device", "cpu", *arguments]
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        try:
            if not _ready(process, port):
                log.seek(0)
                end = log.read().decode(errors="replace")[-2000:]
                raise RuntimeError(f"transformers serve did not come up: {end}")
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            _end(process)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _ready(process: "subprocess.Popen[bytes]", port: int) -> bool:
    until = time.monotonic() + READY
    while time.monotonic() < until and process.poll() is None:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
                return True
        except (urllib.error.URLError, TimeoutError, ConnectionError):
            time.sleep(0.2)
    return False


def _end(process: "subprocess.Popen[bytes]") -> None:
    process.terminate()
    try:
        process.wait(PATIENCE)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
