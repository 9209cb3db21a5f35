"""`transformers serve` and `vllm serve` as real processes on the loopback interface."""

import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
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
    program = str(Path(sys.executable).parent / "transformers")
    with running([program, "serve", str(folder), "--device", "cpu", *arguments]) as (url, _):
        yield url


@contextmanager
def served_by_vllm(
    program: str, folder: Path, *arguments: str, biased: bool = True, port: int | None = None
) -> Iterator[tuple[str, "subprocess.Popen[bytes]"]]:
    """A calibrated export on the CPU, `biased` or plain, and the process of the server.

    Requests name the model by `str(folder)`. Raises RuntimeError as `served` does.
    """
    command = [program, "serve", str(folder), "--dtype", "float32", "--enforce-eager"]
    command += ["--max-logprobs", "200", "--max-model-len", "1024", "--generation-config", "vllm"]
    command += [*(["--logits-processors", "dcr_logits:Calibrated"] if biased else []), *arguments]
    apart = {"PYTHONPATH": str(folder), "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"}
    with running(command, os.environ | apart, port) as found:
        yield found


@contextmanager
def running(
    command: list[str], environment: Mapping[str, str] | None = None, port: int | None = None
) -> Iterator[tuple[str, "subprocess.Popen[bytes]"]]:
    """The address and the process of a server, which is told host and port."""
    port = port or free_port()
    whole = [*command, "--host", "127.0.0.1", "--port", str(port)]
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            whole, stdout=log, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )
        try:
            if not _ready(process, port):
                log.seek(0)
                end = log.read().decode(errors="replace")[-2000:]
                raise RuntimeError(f"{' '.join(command[:2])} did not come up: {end}")
            yield f"http://127.0.0.1:{port}/v1", process
        finally:
            _end(process)


def free_port() -> int:
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
