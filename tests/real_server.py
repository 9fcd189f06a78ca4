"""A real OpenAI-compatible server for tests: llama.cpp's, in a process of its own that can be killed for real."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass

import httpx

from echelon.llm import ModelStore

__all__ = ["RealServer", "real_server"]

# Ends with the test's process, however that ends: its end of the pipe is closed then.
_CODE = """
import sys, xllamacpp
params = xllamacpp.CommonParams()
params.model.path, params.port = sys.argv[1], int(sys.argv[2])
params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
params.n_parallel, params.n_ctx, params.fit_params, params.cache_ram_mib = 2, 4096, False, 0
params.verbosity = -1
server = xllamacpp.Server(params)
print(server.listening_address, flush=True)
sys.stdin.read()
"""


@dataclass
class RealServer:
    """A server that runs, or was killed.

    Attributes:
        url: its base address, which ends in /v1; process: kill it with `process.kill()`.
    """

    url: str
    process: subprocess.Popen[str]

    @property
    def port(self) -> int:
        """Give it to the next `real_server` to have that at the same address."""
        return httpx.URL(self.url).port or 0

    def kill(self) -> None:
        """SIGKILL, and wait until it is dead."""
        self.process.kill()
        self.process.wait()


@contextlib.contextmanager
def real_server(port: int = 0) -> Iterator[RealServer]:
    """Serve SmolLM2 on this machine's loopback address, with one thread; its GGUF is fetched if the store has none.

    Two prompts are worked on at the same time, with a context of 2048 tokens each. Healthy when the block begins, dead
    when it ends. Starts in about a second.

    Args:
        port: 0 is any that is free.
    """
    command = [sys.executable, "-c", _CODE, str(ModelStore().fetch_gguf("smollm2-135m")), str(port)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        address = process.stdout.readline().strip()
        assert address, f"the server ended with status {process.wait()}"
        limit = time.monotonic() + 240
        # Not through a proxy that the environment may name.
        with httpx.Client(trust_env=False) as client:
            while True:
                with contextlib.suppress(httpx.TransportError):
                    if client.get(f"{address}/health").status_code == 200:
                        break
                assert time.monotonic() < limit, "the server did not become healthy"
                time.sleep(0.05)
        yield RealServer(f"{address}/v1", process)
    finally:
        process.kill()
        process.wait()
        process.stdin.close()
        process.stdout.close()
