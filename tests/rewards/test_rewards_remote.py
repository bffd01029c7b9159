"""HTTP rewards against a local server: the JSON form, retries, and every way an answer can be wrong."""

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from rewards import Sample, ScoreStatus, http, load_reward

SAMPLES = [Sample(prompt="p", completion="x" * i, row={"answer": i}, index=i) for i in range(5)]
Answer = Callable[[dict[str, Any], int], tuple[int, bytes | dict[str, Any]]]
"""(request, how many came before) -> status, body."""


class Server:
    """Answers POSTs with whatever `answer` says, and keeps the requests."""

    def __init__(self) -> None:
        self.requests: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.answer: Answer = lambda request, count: (200, {"rewards": [len(text) for text in request["query"]]})
        self.running = self.most_running = 0
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                outer.running += 1
                outer.most_running = max(outer.running, outer.most_running)
                count = len(outer.requests)
                outer.requests.append(request)
                outer.headers.append(dict(self.headers))
                status, body = outer.answer(request, count)
                outer.running -= 1
                if status == 0:
                    self.connection.shutdown(socket.SHUT_RDWR)
                    return
                self.send_response(status)
                self.end_headers()
                self.wfile.write(body if isinstance(body, bytes) else json.dumps(body).encode())

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.server.handle_error = lambda request, client_address: None  # clients that gave up are part of the tests
        self.url = f"http://127.0.0.1:{self.server.server_port}/score"
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr("rewards.remote._FIRST_PAUSE_S", 0.01)
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    server = Server()
    yield server
    server.server.shutdown()
    server.server.server_close()


def test_the_json_form(server: Server) -> None:
    server.answer = lambda request, count: (
        200, {"rewards": [0.5, None], "scores": [1, 0], "extra_logs": {"length": [3, 4]}},
    )  # fmt: skip
    (scores,) = http(server.url, batch_size=2, headers={"X-Key": "k"}).score_groups([SAMPLES[1:3]])
    assert server.requests == [{"query": ["px", "pxx"], "prompts": ["p", "p"], "labels": [1, 2]}]
    assert server.headers[0]["X-Key"] == "k" and server.headers[0]["Content-Type"] == "application/json"
    assert [score.value for score in scores] == [0.5, None]
    assert scores[0].metrics == {"length": 3.0, "score": 1.0, "retries": 0.0}
    assert [score.status for score in scores] == [ScoreStatus.OK] * 2


def test_requests_run_at_the_same_time_in_the_samples_order(server: Server) -> None:
    def slow(request: dict[str, Any], count: int) -> tuple[int, dict[str, Any]]:
        time.sleep(0.1)
        return 200, {"rewards": [len(text) for text in request["query"]]}

    server.answer = slow
    (scores,) = http(server.url, concurrency=3).score_groups([SAMPLES])
    assert [score.value for score in scores] == [1, 2, 3, 4, 5]
    assert len(server.requests) == 5 and 2 <= server.most_running <= 3


@pytest.mark.parametrize("failure", [500, 503, 0])
def test_failures_of_the_server_are_retried_and_counted(server: Server, failure: int) -> None:
    server.answer = lambda request, count: (failure, b"") if count < 2 else (200, {"rewards": [1]})
    score = http(server.url).score(SAMPLES[0])
    assert (score.value, score.metrics["retries"], len(server.requests)) == (1.0, 2.0, 3)


def test_retries_end(server: Server) -> None:
    server.answer = lambda request, count: (502, b"bad gateway")
    score = http(server.url, retries=1).score(SAMPLES[0])
    assert (score.value, score.status, len(server.requests)) == (None, ScoreStatus.ERROR, 2)
    assert "HTTP Error 502: Bad Gateway: bad gateway (after 1 retries)" in score.info["error"]
    assert http(server.url, retries=0, on_error="zero").score(SAMPLES[0]).value == 0.0


@pytest.mark.parametrize(
    ("status", "body", "message"),
    [
        (400, b"no such model", "HTTP Error 400: Bad Request: no such model (after 0 retries)"),
        (200, b"<html>", "answered something that is not JSON: '<html>'"),
        (200, {"reward": [1]}, "'rewards' is missing from the answer; it has reward"),
        (200, {"rewards": [1, 2]}, "'rewards' must have 1 entries, one per sample, got 2"),
        (200, b'{"rewards": [NaN]}', "must be finite, got nan"),
        (200, {"rewards": ["high"]}, "got str: 'high'"),
        (200, b"[]", "'rewards' must have 1 entries"),
    ],
)
def test_what_will_not_pass_is_not_retried(server: Server, status: int, body: Any, message: str) -> None:
    server.answer = lambda request, count: (status, body)
    score = http(server.url, retries=3).score(SAMPLES[0])
    assert score.status is ScoreStatus.ERROR and message in score.info["error"]
    assert len(server.requests) == 1


def test_a_failing_request_fails_its_own_samples(server: Server) -> None:
    server.answer = lambda request, count: (400, b"") if 2 in request["labels"] else (200, {"rewards": [1, 1]})
    (scores,) = http(server.url, batch_size=2).score_groups([SAMPLES[:4]])
    assert [score.value for score in scores] == [1.0, 1.0, None, None]


def test_a_silent_server_is_a_timeout(server: Server) -> None:
    def slow(request: dict[str, Any], count: int) -> tuple[int, dict[str, Any]]:
        time.sleep(1.0)
        return 200, {"rewards": [1]}

    server.answer = slow
    score = http(server.url, timeout_s=0.1, retries=1).score(SAMPLES[0])
    assert score.status is ScoreStatus.TIMEOUT and len(server.requests) == 2


def test_nobody_there() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        score = http(f"http://127.0.0.1:{unused.getsockname()[1]}", retries=0).score(SAMPLES[0])
    assert score.status is ScoreStatus.ERROR and "refused" in score.info["error"]


def test_by_name_and_wrong_settings(server: Server) -> None:
    function = load_reward(f"0.5*http(url='{server.url}', batch_size=4, name='judge')")
    assert (function.name, function.weight, function.score(SAMPLES[2]).value) == ("judge", 0.5, 3.0)
    with pytest.raises(ValueError, match="url must begin with http:// or https://, got 'file:///etc/passwd'"):
        http("file:///etc/passwd")
    with pytest.raises(ValueError, match="retries must be >= 0, got -1"):
        http("http://localhost", retries=-1)
    with pytest.raises(ValueError, match="timeout_s must be > 0, got 0"):
        http("http://localhost", timeout_s=0)
