"""Multi-turn: what a completion may call between its turns, and what it looks like then.

The policy writes until a turn ends, the environment answers, the policy goes on behind the answer, and so forth until
the environment says done or the budget is spent. All of it is one completion: `token_ids` has both, `version_spans`
say who wrote what, and only the policy's tokens are trained. Rewards see the whole text, answers included. Sampled
tokens are kept as they are, never decoded and encoded again.

environment_pool.py makes completions call an environment; tools.py is one.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from rollout.sample import ENVIRONMENT, NOTHING_KEPT, Completion, Prompt

Encode = Callable[[str], list[int]]
"""Text -> token ids, without special tokens around them."""
Decode = Callable[[Sequence[Sequence[int]]], list[str]]
"""Token ids of several pieces -> their texts."""


@dataclass(frozen=True)
class Observation:
    """What the environment answers; the policy goes on behind it."""

    text: str
    """At least one token long."""


@dataclass(frozen=True)
class Done:
    """The completion is whole; it ends with finish reason `stop`."""


class Environment(Protocol):
    """What a completion may call. One object serves all completions; what belongs to one of them is in its state."""

    turn_ends: tuple[str, ...]
    """Strings, as decoded, whose last character ends a turn. The stop token always ends one."""

    def start(self, prompt: Prompt) -> Any:
        """State of a new completion."""
        ...

    async def step(self, state: Any, text: str) -> Observation | Done:
        """Answers a turn: `text` is what the policy wrote in it, its end included; may change `state` in place.

        Runs beside the steps of other completions in one event loop, so it must not block: work that does belongs in
        `asyncio.to_thread`. What it raises counts as its own failure, not as the policy's: a mistake of the policy is
        answered with an observation that says so.
        """
        ...


def ending_token_ids(ends: Sequence[str], decode: Decode, vocab_size: int) -> frozenset[int]:
    """Every token that can be the last of one of the strings: it contains the string, or begins with a tail of it.

    A token that is none but looks like one (">" for "</tool>") costs a completion a pause, nothing else. Raises
    ValueError if there is none.
    """
    tails = tuple({end[place:] for end in ends for place in range(len(end))})
    texts = decode([[token] for token in range(vocab_size)])
    found = frozenset(
        token for token, text in enumerate(texts) if text.startswith(tails) or any(end in text for end in ends)
    )
    if ends and not found:
        raise ValueError(f"no token ends {' or '.join(map(repr, ends))} as text; decode must keep what ends a turn")
    return found


def current_turn(completion: Completion) -> list[int]:
    """Tokens since the environment's last answer."""
    versions = completion.versions
    begin = len(versions) - versions[::-1].index(ENVIRONMENT) if ENVIRONMENT in versions else 0
    return completion.token_ids[begin:]


def num_answers(completion: Completion) -> int:
    """How often the environment has answered."""
    return sum(version == ENVIRONMENT for version, _ in completion.version_spans)


def unanswered(completion: Completion) -> Completion:
    """The completion without an answer at its end; with it go the recorded experts, whose rows would be too many."""
    version, size = completion.version_spans[-1]
    if version != ENVIRONMENT:
        return completion
    return replace(
        completion,
        token_ids=completion.token_ids[:-size],
        logprobs=completion.logprobs[:-size],
        version_spans=completion.version_spans[:-1],
        expert_ids=None,
        kept_ids=None if completion.kept_ids is None else completion.kept_ids[:-size],
    )


def observed(completion: Completion, token_ids: list[int]) -> Completion:
    """The completion with the environment's answer behind it."""
    return replace(
        completion,
        token_ids=completion.token_ids + token_ids,
        logprobs=completion.logprobs + [0.0] * len(token_ids),
        version_spans=(*completion.version_spans, (ENVIRONMENT, len(token_ids))),
        kept_ids=None if completion.kept_ids is None else completion.kept_ids + (NOTHING_KEPT,) * len(token_ids),
    )
