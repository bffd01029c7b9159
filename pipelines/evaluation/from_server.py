"""Completions of a model that an OpenAI-compatible server offers.

    with ServerSampler(server) as sampler:
        for drawn in sampler.sample(prompts, params, stop=("Question:",)): ...

Covered: the completions endpoint with the exact prompt text, the chat endpoint with messages; a limit of requests at a
time; a time limit for each; a busy server's Retry-After. Whatever else goes wrong is data: a `Drawn` with its kind.
Not covered: streaming, tools, and the server's own truncation of prompts, which is not asked for.
"""

import os
import threading
from collections.abc import Iterator, Sequence
from collections.abc import Set as AbstractSet
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from time import time
from typing import Any, Literal, Self

import openai

from pipelines.evaluation.samples import NO_ROOM, Drawn
from rollout.sample import Prompt, SamplingParams
from rollout.stream import Key

_BUSY = (429, 503)
_SHOWN_CHARS = 500


@dataclass(frozen=True, kw_only=True)
class Server:
    """Where to ask, and how."""

    url: str
    """Address of the API, as `http://host:8000/v1`."""
    model: str
    """Name under which the server offers the model."""
    api: Literal["completions", "chat"] = "completions"
    """Endpoint: `completions` continues the exact text of the prompt, `chat` wraps it as the server does."""
    system: str = ""
    """System message of the chat endpoint, none if empty."""
    concurrency: int = 32
    """Requests at a time."""
    timeout_s: float = 600.0
    """Longest wait for an answer."""
    max_retries: int = 8
    """Times that one request is sent again because the server is busy (429 and 503)."""


class ServerSampler:
    """A connection to a server."""

    def __init__(self, server: Server) -> None:
        """Raises ValueError if the server cannot be reached, or does not offer the model. The key is OPENAI_API_KEY."""
        self._server = server
        self._closing = threading.Event()
        self._client = openai.OpenAI(
            base_url=server.url,
            api_key=os.environ.get("OPENAI_API_KEY", "none"),
            timeout=server.timeout_s,
            max_retries=0,
        )
        try:
            offered = [model.id for model in self._client.models.list()]
        except openai.OpenAIError as error:
            raise ValueError(f"the server {server.url} does not answer ({_message(error)}); is it started?") from error
        if server.model not in offered:
            raise ValueError(f"the server {server.url} offers {', '.join(offered)}, not {server.model!r}")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._closing.set()
        self._client.close()  # requests in flight end

    def sample(
        self,
        prompts: Sequence[Prompt],
        params: SamplingParams,
        *,
        done: AbstractSet[Key] = frozenset(),
        stop: Sequence[str] = (),
    ) -> Iterator[Drawn]:
        """`params.num_completions` of each prompt but those in `done`, as they finish; one request for each."""
        wanted = [
            (prompt, index)
            for prompt in prompts
            for index in range(params.num_completions)
            if (prompt.id, index) not in done
        ]
        with ThreadPoolExecutor(self._server.concurrency) as threads:
            futures = [threads.submit(self._ask, prompt, index, params, stop) for prompt, index in wanted]
            try:
                for future in as_completed(futures):
                    yield future.result()
            finally:
                self._closing.set()
                threads.shutdown(wait=False, cancel_futures=True)
        self._closing.clear()

    def _ask(self, prompt: Prompt, index: int, params: SamplingParams, stop: Sequence[str]) -> Drawn:
        """One completion; asked again while the server says that it is busy."""
        request: dict[str, Any] = {
            "model": self._server.model,
            "max_tokens": params.max_tokens,
            "temperature": params.temperature,
            "top_p": params.top_p,
            # Some servers keep a seed in 32 bits.
            "seed": params.seed_of(prompt.id, index) % 2**31,
            "stop": list(stop) or None,
        }
        if params.top_k:
            request["extra_body"] = {"top_k": params.top_k}
        retries = 0
        while True:
            try:
                return self._read(prompt.id, index, retries, self._send(prompt, request))
            except openai.APIStatusError as error:
                if error.status_code in _BUSY and retries < self._server.max_retries and not self._closing.is_set():
                    self._closing.wait(_seconds_asked_for(error, retries))
                    retries += 1
                    continue
                kind = NO_ROOM if "context length" in str(error) else f"http_{error.status_code}"
                failure = kind, _message(error)
            except openai.APITimeoutError:
                failure = "timeout", f"no answer within {self._server.timeout_s:g} s"
            except openai.APIConnectionError as error:
                failure = "connection", _message(error)
            except openai.APIError as error:  # an answer that is not what the API says
                failure = "bad_answer", _message(error)
            return Drawn(prompt_id=prompt.id, index=index, failure=failure[0], error=failure[1], retries=retries)

    def _send(self, prompt: Prompt, request: dict[str, Any]) -> Any:
        if self._server.api == "completions":
            return self._client.completions.create(prompt=prompt.text, **request)
        system = [{"role": "system", "content": self._server.system}] if self._server.system else []
        messages: Any = [*system, {"role": "user", "content": prompt.text}]
        return self._client.chat.completions.create(messages=messages, **request)

    def _read(self, prompt_id: str, index: int, retries: int, answer: Any) -> Drawn:
        choices = getattr(answer, "choices", None)
        if not choices:
            error = f"no choices in {str(answer)[:_SHOWN_CHARS]!r}"
            return Drawn(prompt_id=prompt_id, index=index, failure="bad_answer", error=error, retries=retries)
        choice = choices[0]
        reason = choice.finish_reason
        known = reason in ("stop", "length")
        return Drawn(
            prompt_id=prompt_id,
            index=index,
            text=choice.text if self._server.api == "completions" else _chat_text(choice.message),
            tokens=answer.usage.completion_tokens if answer.usage else 0,
            finish_reason=reason if known else "error",
            failure="" if known else f"finished_{reason}",
            error="" if known else f"the server ended it with {reason!r}",
            retries=retries,
        )


def _chat_text(message: Any) -> str:
    """What was said, with the thinking that some servers split off put back in front."""
    thinking = getattr(message, "reasoning_content", None) or getattr(message, "reasoning", None)
    return (f"<think>{thinking}</think>" if thinking else "") + (message.content or "")


def _seconds_asked_for(error: openai.APIStatusError, retries: int) -> float:
    """What Retry-After says, seconds or a date; without it 1, 2, 4, ... up to 60 s."""
    asked = error.response.headers.get("retry-after", "")
    try:
        return max(0.0, float(asked))
    except ValueError:
        pass
    try:
        return max(0.0, parsedate_to_datetime(asked).timestamp() - time())
    except ValueError:
        return min(60.0, 2.0**retries)


def _message(error: openai.OpenAIError) -> str:
    cause = f": {error.__cause__}" if error.__cause__ else ""
    return f"{' '.join(str(error).split())}{cause}"[:_SHOWN_CHARS]
