"""Servers for tests: vLLM's own with one of our checkpoints, and a scripted one that misbehaves on demand."""

import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from rollout.engine import EngineConfig
from rollout.vllm_setup import engine_arguments, read_architecture, set_environment

Answer = tuple[int, dict[str, str], Any]
"""Status, headers, and the body: an object for JSON, or bytes as they are."""


@contextmanager
def vllm_server(model: Path, name: str, environment: dict[str, str]) -> Iterator[str]:
    """Address of vLLM's server with a checkpoint, on CPU in float32, for sequences of up to 512 tokens.

    It is started with what rollout/vllm_setup.py finds necessary; plain `vllm serve` on a CPU mis-rotates positions.
    """
    architecture = read_architecture(str(model))
    config = EngineConfig(max_model_len=512)
    before = dict(os.environ)
    try:
        set_environment(config, architecture)
        wanted = {key: value for key, value in os.environ.items() if key not in before}
    finally:
        os.environ.clear()
        os.environ.update(before)
    wanted["VLLM_ENABLE_V1_MULTIPROCESSING"] = "1"  # the server's engine is a process of its own
    arguments = engine_arguments(config, str(model), architecture)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model), "--served-model-name", name,
        "--host", "127.0.0.1", "--port", str(port), "--dtype", "float32", "--enforce-eager", "--max-model-len", "512",
        "--block-size", str(arguments["block_size"]), "--hf-overrides", json.dumps(arguments["hf_overrides"]),
    ]  # fmt: skip
    server = subprocess.Popen(
        command, env={**environment, **wanted, "TORCHDYNAMO_DISABLE": "1"}, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )  # fmt: skip
    assert server.stdout is not None
    said: list[str] = []
    try:
        for line in server.stdout:
            said.append(line)
            if "Application startup complete" in line:
                break
        else:
            raise AssertionError("".join(said[-40:]))
        threading.Thread(target=server.stdout.read, daemon=True).start()  # else it would wait for its output to be read
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        server.terminate()
        server.wait(timeout=60)


class ScriptedServer:
    """Answers requests by a function of (path, request, how often this prompt came before)."""

    def __init__(self, answer: Callable[[str, dict[str, Any], int], Answer]) -> None:
        self.answer = answer
        self.requests: list[tuple[str, dict[str, Any]]] = []
        self.most_at_once = 0
        self._running = 0
        self._lock = threading.Lock()

    def begin(self, path: str, request: dict[str, Any]) -> int:
        with self._lock:
            before = sum(other == request for _, other in self.requests)
            self.requests.append((path, request))
            self._running += 1
            self.most_at_once = max(self.most_at_once, self._running)
        return before

    def end(self) -> None:
        with self._lock:
            self._running -= 1

    @contextmanager
    def running(self) -> Iterator[str]:
        """Its address."""
        scripted = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.reply(200, {}, {"object": "list", "data": [{"id": "toy", "object": "model"}]})

            def do_POST(self) -> None:
                request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                before = scripted.begin(self.path, request)
                answer = scripted.answer(self.path, request, before)
                scripted.end()
                self.reply(*answer)

            def reply(self, status: int, headers: dict[str, str], body: Any) -> None:
                data = body if isinstance(body, bytes) else json.dumps(body).encode()
                try:
                    self.send_response(status)
                    for name, value in {"Content-Type": "application/json", **headers}.items():
                        self.send_header(name, value)
                    self.send_header("Content-Length", str(len(data)))
                    self.end_headers()
                    self.wfile.write(data)
                except BrokenPipeError:
                    return  # the client did not wait

            def log_message(self, format: str, *args: Any) -> None:
                return

        with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
            thread = threading.Thread(target=server.serve_forever, daemon=True)
            thread.start()
            yield f"http://127.0.0.1:{server.server_port}/v1"
            server.shutdown()


def completion(text: str, finish_reason: str = "stop") -> dict[str, Any]:
    """An answer of the completions endpoint."""
    choice = {"index": 0, "text": text, "finish_reason": finish_reason, "logprobs": None}
    usage = {"prompt_tokens": 1, "completion_tokens": len(text), "total_tokens": len(text) + 1}
    return {"id": "x", "object": "text_completion", "created": 0, "model": "toy", "choices": [choice], "usage": usage}


def message(content: str, **more: str) -> dict[str, Any]:
    """An answer of the chat endpoint."""
    choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": content, **more}}
    return {"id": "x", "object": "chat.completion", "created": 0, "model": "toy", "choices": [choice]}
