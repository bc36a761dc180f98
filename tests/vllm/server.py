"""vLLM's OpenAI-compatible server in a separate process."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx

API_KEY = "secret"
START_TIMEOUT = 600  # seconds; it takes 50 on two idle cores and 130 on busy ones
STOP_TIMEOUT = 30


@contextmanager
def serve(model: Path, log: Path, *options: str) -> Iterator[str]:
    """Serve a model directory under the name of the directory; stops the server at the end.

    Args:
        model: a directory with a model and its tokenizer.
        log: the file that gets what the server prints.
        options: further options of the server, such as "--api-key", "secret".

    Yields:
        The base URL for OpenAI's client.

    Raises:
        RuntimeError: the server ended or was not ready in time; shows the end of its log.
    """
    port = _free_port()
    # Not the `vllm` command, which needs AVX-512.
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model)]
    command += ["--served-model-name", model.name, "--dtype", "float32", "--enforce-eager"]
    command += ["--max-logprobs", "64", "--host", "127.0.0.1", "--port", str(port), *options]
    # Without the variables of the tests' Triton interpreter and of an engine in this process.
    ours = ("TRITON_INTERPRET", "LOCAL_WORLD_SIZE", "VLLM_")
    environment = {k: v for k, v in os.environ.items() if not k.startswith(ours)}
    environment |= {"VLLM_CPU_KVCACHE_SPACE": "2", "VLLM_NO_USAGE_STATS": "1"}
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,  # so that _stop reaches the engine's process
        )
    try:
        _wait_until_ready(process, f"http://127.0.0.1:{port}/health", log)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        _stop(process)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _wait_until_ready(process: subprocess.Popen, url: str, log: Path) -> None:
    deadline = time.monotonic() + START_TIMEOUT
    while process.poll() is None and time.monotonic() < deadline:
        try:
            if httpx.get(url, timeout=5, trust_env=False).status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.5)
    state = "is not ready" if process.returncode is None else f"exited {process.returncode}"
    tail = "".join(log.read_text(errors="replace").splitlines(keepends=True)[-60:])
    raise RuntimeError(f"vLLM's server {state} after at most {START_TIMEOUT} s; its log:\n{tail}")


def _stop(process: subprocess.Popen) -> None:
    """Terminate the server, then kill what is left of its process group."""
    if process.poll() is None:
        process.send_signal(signal.SIGINT)
        with suppress(subprocess.TimeoutExpired):
            process.wait(STOP_TIMEOUT)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
