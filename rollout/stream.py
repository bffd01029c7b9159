"""Completions on their way: requests into an engine, single completions out of it, groups put together again.

A request names its completion by (prompt id, index); what comes back carries the same key, so nothing is counted twice
whichever engine sampled it and however often it was begun.
"""

import threading
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from rollout.sample import Completion, CompletionGroup, FinishReason, Prompt, SamplingParams

Key = tuple[str, int]
"""(prompt id, index of the completion in its group)"""
Work = Prompt | CompletionGroup
"""What to sample: a prompt from the beginning, or a group whose paused completions are to be continued."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """One completion to be sampled, or to be continued."""

    prompt_id: str
    prompt_token_ids: list[int]
    index: int
    seed: int
    so_far: Completion | None = None
    """What a paused completion already has."""

    @property
    def key(self) -> Key:
        return self.prompt_id, self.index

    @property
    def sampled_token_ids(self) -> list[int]:
        """Tokens of the completion that are there already."""
        return self.so_far.token_ids if self.so_far else []


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampled:
    """One completion that has left its engine."""

    prompt_id: str
    index: int
    completion: Completion

    @property
    def key(self) -> Key:
        return self.prompt_id, self.index


def requests_of(work: Work, params: SamplingParams) -> list[Request]:
    """What is still to be sampled of one group."""
    prompt, before = (work, []) if isinstance(work, Prompt) else (work.prompt, work.completions)
    return [
        Request(
            prompt_id=prompt.id,
            prompt_token_ids=prompt.token_ids,
            index=index,
            seed=params.seed_of(prompt.id, index) if so_far is None else so_far.seed,
            so_far=so_far,
        )
        for index, so_far in enumerate(before or [None] * params.num_completions)
        if so_far is None or so_far.finish_reason is FinishReason.PAUSED
    ]


def outcome(
    request: Request, token_ids: list[int], logprobs: list[float], reason: FinishReason, version: int,
    expert_ids: np.ndarray | None = None, kept_ids: Sequence[np.ndarray] = (),
) -> Sampled:  # fmt: skip
    """The request's completion, `token_ids`, `logprobs` and `kept_ids` (what `version` sampled now) behind what it had
    so far.

    `expert_ids` are those of all tokens: a continued completion's context runs again, so nothing is joined here.
    """
    before = request.so_far
    kept_before = before.kept_ids or () if before else ()
    spans = list(before.version_spans) if before else []
    if token_ids and spans and spans[-1][0] == version:
        spans[-1] = (version, spans[-1][1] + len(token_ids))
    elif token_ids:
        spans.append((version, len(token_ids)))
    completion = Completion(
        token_ids=(before.token_ids if before else []) + token_ids,
        logprobs=(before.logprobs if before else []) + logprobs,
        finish_reason=reason,
        version_spans=tuple(spans),
        seed=request.seed,
        expert_ids=expert_ids,
        kept_ids=(*kept_before, *kept_ids) or None,
    )
    return Sampled(prompt_id=request.prompt_id, index=request.index, completion=completion)


def assemble(work: Sequence[Work], params: SamplingParams, finished: Iterable[Sampled]) -> Iterator[CompletionGroup]:
    """Groups as each becomes complete. Raises ValueError if two prompts share an id."""
    prompts: dict[str, Prompt] = {}
    completions: dict[str, list[Completion | None]] = {}
    missing: dict[str, int] = {}
    for one in work:
        prompt = one if isinstance(one, Prompt) else one.prompt
        if prompt.id in prompts:
            raise ValueError(f"prompt id {prompt.id!r} occurs twice; completions are told apart by it")
        prompts[prompt.id] = prompt
        completions[prompt.id] = [None] * params.num_completions if isinstance(one, Prompt) else list(one.completions)
        missing[prompt.id] = len(requests_of(one, params))
    yield from (one for one in work if isinstance(one, CompletionGroup) and one.is_complete)
    for sampled in finished:
        group = completions[sampled.prompt_id]
        group[sampled.index] = sampled.completion
        missing[sampled.prompt_id] -= 1
        if missing[sampled.prompt_id] == 0:
            whole = [completion for completion in group if completion is not None]
            yield CompletionGroup(prompt=prompts[sampled.prompt_id], completions=whole)


class Inbox:
    """Requests on their way to an engine's loop; filled, closed and paused by any thread, emptied by the loop's."""

    def __init__(self, requests: Iterable[Request] = (), stop: threading.Event | None = None) -> None:
        """Setting `stop` pauses a loop that is at work; only `pause` also wakes one that waits."""
        self._waiting = deque(requests)
        self._passing: list[Sampled] = []
        self._changed = threading.Condition()
        self._is_closed = False
        self._stop = stop or threading.Event()

    @property
    def is_paused(self) -> bool:
        """Whether the loop shall give back what it has and end."""
        return self._stop.is_set()

    def put(self, requests: Iterable[Request]) -> None:
        with self._changed:
            self._waiting.extend(requests)
            self._changed.notify()

    def put_first(self, request: Request) -> None:
        with self._changed:
            self._waiting.appendleft(request)
            self._changed.notify()

    def pass_on(self, sampled: Sampled) -> None:
        """For a completion that is whole without the loop, which only gives it out, at once and with its own."""
        with self._changed:
            self._passing.append(sampled)
            self._changed.notify()

    def close(self) -> None:
        """Nothing comes any more."""
        with self._changed:
            self._is_closed = True
            self._changed.notify()

    def pause(self) -> None:
        with self._changed:
            self._stop.set()
            self._changed.notify()

    def take(self, most: int, *, wait: bool) -> list[Request]:
        """Up to `most` requests; with `wait`, none only if the inbox is closed or paused, or something is passing."""
        with self._changed:
            if wait:
                self._changed.wait_for(lambda: self._waiting or self._passing or self._is_closed or self.is_paused)
            if self.is_paused:
                return []
            return [self._waiting.popleft() for _ in range(min(most, len(self._waiting)))]

    def passing(self) -> list[Sampled]:
        """What has been passed on since."""
        with self._changed:
            passing, self._passing = self._passing, []
            return passing

    def drain(self) -> list[Request]:
        """All that is left."""
        with self._changed:
            left = list(self._waiting)
            self._waiting.clear()
            return left
