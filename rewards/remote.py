"""Rewards computed by a server: a reward model, a judge, a service of your own.

The JSON form is OpenRLHF's, so a server written for its `remote_rm_url` works. For the samples of one request:

    POST url   {"query": ["<prompt><completion>", ...], "prompts": ["...", ...], "labels": [<row[label]>, ...]}
    200        {"rewards": [1.0, ...], "scores": [1.0, ...], "extra_logs": {"name": [0.5, ...]}}

Every list has one entry per sample. "rewards" holds numbers, or null where the reward does not apply; "scores" and
"extra_logs" are optional and become metrics.

Covered: retries after connection errors, missed deadlines and 5xx answers, with growing pauses, counted in the metric
"retries"; anything else (4xx, malformed JSON, wrong lengths) is an error of its samples at once, by `on_error`.
Not covered: authentication beyond fixed `headers`, redirects to another host, streaming.

Usage: `load_reward("http(url='http://127.0.0.1:5000/score')")`, or `http(url, batch_size=16, concurrency=4)`.
"""

import json
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from http.client import HTTPException
from typing import Any

from rewards.adapters import openrlhf_request, openrlhf_scores
from rewards.base import OnError, RewardFunction, Sample, Score, reward

_FIRST_PAUSE_S = 0.5
_MAX_ANSWER_BYTES = 64 * 2**20
_SHOWN_BYTES = 200


def http(
    url: str,
    *,
    name: str = "http",
    weight: float = 1.0,
    timeout_s: float = 60.0,
    retries: int = 2,
    concurrency: int = 8,
    batch_size: int = 1,
    label: str = "answer",
    headers: Mapping[str, str] | None = None,
    on_error: OnError = "skip",
) -> RewardFunction:
    """Make a reward that asks a server, `batch_size` samples in a request and `concurrency` requests at a time.

    `timeout_s` bounds each attempt: connecting, and then every wait for data.
    """
    if not url.startswith(("http://", "https://")):
        raise ValueError(f"url must begin with http:// or https://, got {url!r}")
    if retries < 0:
        raise ValueError(f"retries must be >= 0, got {retries}")
    if not timeout_s > 0:
        raise ValueError(f"timeout_s must be > 0, got {timeout_s}")
    ask = partial(
        _ask, url=url, timeout_s=timeout_s, retries=retries, label=label, headers=tuple((headers or {}).items())
    )
    return reward(
        name=name, weight=weight, on_error=on_error, batch=True, batch_size=batch_size, max_workers=concurrency
    )(ask)


def _ask(
    samples: list[Sample], url: str, timeout_s: float, retries: int, label: str, headers: tuple[tuple[str, str], ...]
) -> list[Score]:
    body = json.dumps(openrlhf_request(samples, label)).encode()
    for attempt in range(retries + 1):
        request = urllib.request.Request(url, data=body, headers={"Content-Type": "application/json", **dict(headers)})
        try:
            answer = _post(request, timeout_s)
            break
        except OSError as error:
            if attempt == retries or not _may_pass(error):
                raise _named(error, url, attempt) from None
            time.sleep(_FIRST_PAUSE_S * 2**attempt)
    scores = openrlhf_scores(_parsed(answer, url), len(samples))
    return [replace(score, metrics={**score.metrics, "retries": float(attempt)}) for score in scores]


def _post(request: urllib.request.Request, timeout_s: float) -> bytes:
    """Send and read the whole answer; what the network does wrong is an OSError."""
    deadline = time.monotonic() + timeout_s
    answer = b""
    try:
        with urllib.request.urlopen(request, timeout=timeout_s) as response:
            while chunk := response.read1(2**20):
                answer += chunk
                if time.monotonic() > deadline:
                    raise TimeoutError(f"no whole answer within {timeout_s:g} s")
                if len(answer) > _MAX_ANSWER_BYTES:
                    raise ValueError(f"{request.full_url} sent more than {_MAX_ANSWER_BYTES} bytes")
    except HTTPException as error:
        raise ConnectionError(f"{type(error).__name__}: {error}") from error
    return answer


def _may_pass(error: OSError) -> bool:
    """Whether another attempt may succeed: not after a 4xx, which says that the request is wrong."""
    return not isinstance(error, urllib.error.HTTPError) or error.code >= 500


def _named(error: OSError, url: str, retried: int) -> Exception:
    """The same kind of error, with what a reader of the log needs."""
    detail = ""
    if isinstance(error, urllib.error.HTTPError):
        detail = f": {error.read(_SHOWN_BYTES).decode(errors='replace')}"
    text = f"{url}: {error}{detail} (after {retried} retries)"
    is_late = isinstance(error, TimeoutError) or isinstance(getattr(error, "reason", None), TimeoutError)
    return TimeoutError(text) if is_late else ConnectionError(text)


def _parsed(answer: bytes, url: str) -> Any:
    try:
        return json.loads(answer)
    except ValueError:
        shown = answer[:_SHOWN_BYTES].decode(errors="replace")
        raise ValueError(f"{url} answered something that is not JSON: {shown!r}") from None
