"""Completions that call an environment between turns.

Pinned: (1) who wrote which token, by hand; (2) log-probabilities of the policy's tokens are those of one pass over the
whole transcript; (3) samples depend on seeds alone: not on how the engine's batch is filled, nor on tokens that only
look like a turn's end, nor on a pause; (4) budget, `max_turns`, longest sequence; (5) a step that fails or hangs ends
its completion, is counted and told; (6) completions do not wait for each other, and no more steps run at a time than
said; (7) what can end a turn.
"""

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from models import save_pretrained
from rollout.engine import EngineConfig
from rollout.environment import Done, Observation, current_turn, ending_token_ids
from rollout.environment_pool import EnvironmentPool
from rollout.pool import LocalPool, StreamingPool, build_pool
from rollout.probe import ProbeAnswer
from rollout.sample import ENVIRONMENT, Completion, CompletionGroup, FinishReason, Prompt, SamplingParams
from rollout.stream import Inbox, Request, Sampled, outcome
from tests.grpo.test_grpo_gradients import plain_logprobs_of
from tests.models.test_models_parity import CORNERS, sharp_model
from tests.rollout.test_rollout_native_engine import make_prompts

VOCAB, STOP = 97, 96
CONFIG = EngineConfig(kind="native", transport="local", max_model_len=128, max_num_seqs=64)
PARAMS = SamplingParams(num_completions=4, max_tokens=40, stop_token_id=STOP, seed=6)
PROMPTS = make_prompts(6)


def decode(batch: Sequence[Sequence[int]]) -> list[str]:
    """A character for every token; none for the stop token."""
    return ["".join(chr(32 + token) for token in ids if token != STOP) for ids in batch]


def encode(text: str) -> list[int]:
    return [ord(character) - 32 for character in text]


class Counting:
    """Answers the n-th turn of a completion with n and the turn's length, and is done after `rounds` answers."""

    def __init__(self, turn_ends: tuple[str, ...] = tuple("ABCDEFGHIJ"), rounds: int = 99) -> None:
        self.turn_ends, self.rounds = turn_ends, rounds
        self.turns: list[tuple[str, int, str]] = []

    def start(self, prompt: Prompt) -> dict[str, Any]:
        return {"prompt": prompt.id, "number": 0}

    async def step(self, state: dict[str, Any], text: str) -> Observation | Done:
        state["number"] += 1
        self.turns.append((state["prompt"], state["number"], text))
        await self.work(state, text)
        return Done() if state["number"] > self.rounds else Observation(f"[{state['number']}:{len(text)}]")

    async def work(self, state: dict[str, Any], text: str) -> None:
        pass


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("environment") / "model"
    save_pretrained(sharp_model(CORNERS["groups"]), folder)
    return str(folder)


def wrap(pool: StreamingPool, environment: Any, **settings: Any) -> EnvironmentPool:
    return EnvironmentPool(pool, environment, encode, decode, VOCAB, **settings)


def by_prompt(groups: Sequence[CompletionGroup]) -> dict[str, list[Any]]:
    fields = ("token_ids", "version_spans", "finish_reason", "seed")
    found = {g.prompt.id: [[getattr(c, name) for name in fields] for c in g.completions] for g in groups}
    assert len(found) == len(groups), "a group came twice"
    return found


class Scripted(StreamingPool):
    """Engines that write, as turn n of any completion, `script[n]`; one request at a time, version 7."""

    def __init__(self, *script: str) -> None:
        self.script = [[STOP if c == "$" else ord(c) - 32 for c in turn] for turn in script]

    def stream(
        self,
        groups: Sequence[Sequence[Request]],
        params: SamplingParams,
        stop: threading.Event | None,
        later: Inbox | None = None,
    ) -> Iterator[Sampled]:
        assert later is not None
        waiting = deque(request for group in groups for request in group)
        while True:
            waiting.extend(later.take(99, wait=not waiting))
            passing = later.passing()
            yield from passing
            if not waiting and not passing:
                return
            if not waiting:
                continue
            request = waiting.popleft()
            turn = self.script[sum(v == ENVIRONMENT for v, _ in request.so_far.version_spans) if request.so_far else 0]
            has = request.sampled_token_ids
            tokens = turn[len(current_turn(request.so_far)) if request.so_far else 0 :][: params.max_tokens - len(has)]
            ends = [i for i, token in enumerate(tokens) if token in params.turn_token_ids or token == STOP]
            tokens = tokens[: ends[0] + 1] if ends else tokens
            reason = FinishReason.PAUSED if ends else FinishReason.LENGTH
            reason = FinishReason.STOP if tokens[-1] == STOP else reason
            yield outcome(request, tokens, [-0.5] * len(tokens), reason, version=7)

    def score(self, sequences: object) -> list[list[list[float]]]:
        return [[[1.0]]]

    def load_weights(self, weights: object, version: int) -> None:
        self.version = version

    def probe(self, sequences: object) -> list[ProbeAnswer]:
        return [ProbeAnswer([[1.0]], [], [])]

    def reject_weights(self, reason: str) -> None:
        self.rejected = reason

    def sleep(self) -> None:
        self.awake = set[str]()

    def wake(self, part: str) -> None:
        self.awake.add(part)

    def close(self) -> None:
        self.is_closed = True


def one(pool: EnvironmentPool, **changes: Any) -> Completion:
    params = replace(PARAMS, num_completions=1, **changes)
    (group,) = pool.generate(PROMPTS[:1], params)
    return group.completions[0]


def test_a_transcript_by_hand() -> None:
    environment = Counting(turn_ends=("</t>", "END"), rounds=2)
    completion = one(wrap(Scripted("a>b</t>", "ENDE", "c$"), environment))
    assert decode([completion.token_ids]) == ["a>b</t>[1:7]END[2:3]c"]
    assert completion.version_spans == ((7, 7), (-1, 5), (7, 3), (-1, 5), (7, 2))
    assert completion.versions == [7] * 7 + [-1] * 5 + [7] * 3 + [-1] * 5 + [7] * 2
    assert completion.logprobs == [-0.5] * 7 + [0.0] * 5 + [-0.5] * 3 + [0.0] * 5 + [-0.5] * 2
    assert (completion.finish_reason, completion.newest_version) == (FinishReason.STOP, 7)
    assert environment.turns == [("p0", 1, "a>b</t>"), ("p0", 2, "END"), ("p0", 3, "c")]
    assert completion.environment_state is None


@pytest.mark.parametrize(
    ("script", "settings", "text", "reason"),
    [
        (["a!", "b!", "c$"], {"max_turns": 3}, "a![1:2]b![2:2]c", "stop"),
        (["a!", "b!", "c!"], {"max_turns": 3}, "a![1:2]b![2:2]c!", "length"),
        (["a!", "b$"], {"max_turns": 1}, "a!", "length"),
        (["a$"], {"max_turns": 1}, "a", "stop"),
        (["a$", "b$"], {"max_turns": 2}, "a[1:1]b", "stop"),
        (["a!", "bcdef"], {"max_tokens": 9}, "a![1:2]bc", "length"),
        (["a!", "bc"], {"max_tokens": 8}, "a![1:2]b", "length"),
        (["a!", "bc"], {"max_tokens": 7}, "a!", "length"),
        (["a!", "bc"], {"max_tokens": 2}, "a!", "length"),
        (["a!!"], {"max_tokens": 1}, "a", "length"),
        (["ab$"], {"max_tokens": 3}, "ab", "stop"),
    ],
)
def test_budget_and_turns(script: list[str], settings: dict[str, int], text: str, reason: str) -> None:
    max_tokens = settings.pop("max_tokens", 40)
    environment = Counting(turn_ends=("!",))
    environment.rounds = 2 if "b$" not in script else 1
    completion = one(wrap(Scripted(*script), environment, **settings), max_tokens=max_tokens)
    assert (decode([completion.token_ids])[0], completion.finish_reason.value) == (text, reason)
    asked = [number for _, number, _ in environment.turns]
    assert len(asked) <= settings.get("max_turns", 8) - 1, "the last turn is not answered"
    assert max_tokens != 2 or not asked, "nobody is asked what has no room"


@pytest.mark.parametrize("num_drafts", [0, 1])
def test_logprobs_are_those_of_one_pass_over_the_transcript(num_drafts: int, tmp_path: Path) -> None:
    environment, answers = Counting(rounds=3), 0
    model = sharp_model(replace(CORNERS["groups"], num_nextn_predict_layers=num_drafts))
    save_pretrained(model, tmp_path / "model")
    engines = LocalPool(replace(CONFIG, num_speculative_tokens=num_drafts), str(tmp_path / "model"))
    groups = list(wrap(engines, environment).generate(PROMPTS, PARAMS))
    assert sorted(group.prompt.id for group in groups) == [prompt.id for prompt in PROMPTS]
    for group in groups:
        for completion in group.completions:
            whole = plain_logprobs_of(model, group.prompt.token_ids + completion.token_ids, 1.0)
            expected = whole[len(group.prompt.token_ids) :]
            for version, recorded, true in zip(completion.versions, completion.logprobs, expected, strict=True):
                assert recorded == 0.0 if version == ENVIRONMENT else abs(recorded - true) < 1e-4
            answers += sum(version == ENVIRONMENT for version, _ in completion.version_spans)
            assert len(completion.token_ids) <= PARAMS.max_tokens
    assert answers > 24 and len({number for _, number, _ in environment.turns}) == 4


@pytest.fixture(scope="module")
def expected(checkpoint: str) -> dict[str, list[Any]]:
    groups = list(wrap(LocalPool(CONFIG, checkpoint), Counting(rounds=3)).generate(PROMPTS, PARAMS))
    assert {c.finish_reason for g in groups for c in g.completions} == {FinishReason.STOP, FinishReason.LENGTH}
    return by_prompt(groups)


def test_samples_do_not_depend_on_the_batch(checkpoint: str, expected: dict[str, list[Any]]) -> None:
    narrow = wrap(LocalPool(replace(CONFIG, max_num_seqs=3), checkpoint), Counting(rounds=3), max_concurrent_steps=1)
    assert by_prompt(list(narrow.generate(PROMPTS, PARAMS))) == expected


@pytest.mark.slow
def test_samples_do_not_depend_on_the_number_of_engines(checkpoint: str, expected: dict[str, list[Any]]) -> None:
    engines = build_pool(replace(CONFIG, transport="ray", num_engines=2, max_num_seqs=5), checkpoint)
    pool = wrap(engines, Counting(rounds=3))
    try:
        assert by_prompt(list(pool.generate(PROMPTS, PARAMS))) == expected
        assert by_prompt(pause_and_continue(pool)) == expected
        assert pool.counters["engine/restarts"] == 0
    finally:
        pool.close()


def test_what_only_looks_like_an_end_changes_nothing(checkpoint: str) -> None:
    engines = LocalPool(CONFIG, checkpoint)
    environment = Counting(turn_ends=tuple(f"never{c}" for c in "ABCDEFGHIJ"))
    pool = wrap(engines, environment, max_turns=1)
    plain = list(engines.generate(PROMPTS, PARAMS))
    assert len(pool.turn_token_ids) == 10
    assert any(t in pool.turn_token_ids for g in plain for c in g.completions for t in c.token_ids[:-1])
    found, expected = by_prompt(list(pool.generate(PROMPTS, PARAMS))), by_prompt(plain)
    assert found.keys() == expected.keys()
    pairs = [pair for prompt in expected for pair in zip(found[prompt], expected[prompt], strict=True)]
    # A completion that went on was computed in another batch, so its sums round otherwise, and a draw may lie between.
    assert sum(ours != theirs for ours, theirs in pairs) <= 1 < len(pairs) / 10


def pause_and_continue(pool: EnvironmentPool) -> list[CompletionGroup]:
    """Stopped when the environment has answered some turns, then continued, a few times."""
    work: Any = PROMPTS
    environment: Any = pool.environment
    is_paused = False
    for _ in range(6):
        stop, limit = threading.Event(), len(environment.turns) + 9

        async def work_and_stop(state: Any, text: str, stop: Any = stop, limit: int = limit) -> None:
            if len(environment.turns) >= limit:
                stop.set()
            await asyncio.sleep(0.01)  # so that there are steps under way

        environment.work = work_and_stop
        work = list(pool.generate(work, PARAMS, stop=stop))
        assert sorted(group.prompt.id for group in work) == [prompt.id for prompt in PROMPTS]
        waiting = [c for g in work for c in g.completions if c.finish_reason is FinishReason.PAUSED]
        is_paused |= bool(waiting)
        assert all(c.environment_state["number"] >= len(c.version_spans) // 2 for c in waiting)
    del environment.work
    assert is_paused, "nothing was paused"
    return list(pool.generate(work, PARAMS))


def test_paused_and_continued(checkpoint: str, expected: dict[str, list[Any]]) -> None:
    environment = Counting(rounds=3)
    assert by_prompt(pause_and_continue(wrap(LocalPool(CONFIG, checkpoint), environment))) == expected
    assert len(environment.turns) == len({turn for turn in environment.turns}), "a turn was answered twice"


def test_the_longest_sequence_bounds_a_completion(checkpoint: str) -> None:
    pool, dropped = wrap(LocalPool(replace(CONFIG, max_model_len=30), checkpoint), Counting()), 0
    for group in pool.generate(PROMPTS, replace(PARAMS, max_tokens=100)):
        for completion in group.completions:
            left = 30 - len(group.prompt.token_ids) - len(completion.token_ids)
            assert left == 0 or (0 < left <= 6 and completion.token_ids[-1] in pool.turn_token_ids | {STOP})
            assert completion.finish_reason is FinishReason.LENGTH and completion.versions[-1] == 0
            dropped += left > 0
    assert dropped


class Troubled(Counting):
    """Fails, hangs, hangs and will not be canceled, or answers nothing, by the number of the prompt."""

    async def work(self, state: dict[str, Any], text: str) -> None:
        match state["prompt"]:
            case "p0":
                raise ConnectionError("the shop is closed")
            case "p1":
                await asyncio.Event().wait()
            case "p2":
                with pytest.raises(asyncio.CancelledError):
                    await asyncio.Event().wait()
                await asyncio.sleep(0.3)
            case "p3":
                raise asyncio.CancelledError

    async def step(self, state: dict[str, Any], text: str) -> Observation | Done:
        answer = await super().step(state, text)
        return Observation("") if state["prompt"] == "p4" else answer


def test_a_failing_step_ends_its_completion(caplog: pytest.LogCaptureFixture) -> None:
    pool = wrap(Scripted("ab!", "c$"), Troubled(turn_ends=("!",), rounds=1), step_timeout_s=0.1)
    started = time.perf_counter()
    with caplog.at_level(logging.WARNING):
        groups = {group.prompt.id: group for group in pool.generate(PROMPTS, PARAMS)}
    for name in ("p0", "p1", "p2", "p3", "p4"):
        assert {c.finish_reason for c in groups[name].completions} == {FinishReason.ERROR}, name
        assert {decode([c.token_ids])[0] for c in groups[name].completions} == {"ab!"}
    assert {decode([c.token_ids])[0] for c in groups["p5"].completions} == {"ab![1:3]c"}
    assert time.perf_counter() - started < 5
    assert pool.counters == {"environment/steps": 28, "environment/failed": 12, "environment/timeouts": 8}
    assert caplog.text.count("the shop is closed") >= 4 and caplog.text.count("over 0.1 s for a turn of ('p1', ") == 4
    assert "an observation of no tokens" in caplog.text


class Waiting(Counting):
    """Waits in each step as it is told, by prompt; counts the steps that run at a time."""

    running = most = 0

    def __init__(self, wait: Callable[[str], Awaitable[Any]], **settings: Any) -> None:
        super().__init__(("!",), **settings)
        self.wait = wait

    async def work(self, state: dict[str, Any], text: str) -> None:
        self.running += 1
        self.most = max(self.most, self.running)
        try:
            await self.wait(state["prompt"])
        finally:
            self.running -= 1


def test_completions_do_not_wait_for_each_other() -> None:
    release = threading.Event()
    environment = Waiting(lambda name: asyncio.to_thread(release.wait, 30 if name == "p0" else 0), rounds=2)
    seen = []
    for group in wrap(Scripted("a!", "b!", "c$"), environment).generate(PROMPTS, PARAMS):
        seen.append(group.prompt.id)
        if len(seen) == len(PROMPTS) - 1:
            assert "p0" not in seen
            assert [number for name, number, _ in environment.turns if name == "p0"] == [1] * 4
            release.set()
    assert seen[-1] == "p0" and len(seen) == 6


@pytest.mark.parametrize("limit", [3, 50])
def test_many_steps_run_side_by_side(limit: int) -> None:
    prompts = [replace(PROMPTS[0], id=f"q{i}") for i in range(30)]
    environment = Waiting(lambda name: asyncio.sleep(0.01), rounds=2)
    pool = wrap(Scripted("a!", "b!", "c$"), environment, max_concurrent_steps=limit)
    groups = list(pool.generate(prompts, PARAMS))
    assert len(groups) == 30 and environment.running == 0
    assert environment.most == limit
    assert {decode([c.token_ids])[0] for g in groups for c in g.completions} == {"a![1:2]b![2:2]c"}


def test_an_abandoned_call_ends_its_steps() -> None:
    before = threading.active_count()
    environment = Waiting(lambda name: asyncio.sleep(60 if name == "p1" else 0), rounds=1)
    stream = wrap(Scripted("a!", "c$"), environment).generate(PROMPTS[:2], PARAMS)
    assert next(stream).prompt.id == "p0"
    started = time.perf_counter()
    stream.close()  # type: ignore[attr-defined]
    assert threading.active_count() == before and time.perf_counter() - started < 10
    assert environment.running == 0, "a step goes on"


def test_what_can_end_a_turn() -> None:
    texts = ["</tool>", ">", ">\n", "ol>x", "/tool", " >", "tool", "x</tool>y", "<", "", "->"]

    def decode_pieces(batch: Sequence[Sequence[int]]) -> list[str]:
        return ["".join(texts[token] for token in ids) for ids in batch]

    assert ending_token_ids(["</tool>"], decode_pieces, len(texts)) == {0, 1, 2, 3, 7}
    assert ending_token_ids([], decode_pieces, len(texts)) == frozenset()
    with pytest.raises(ValueError, match="no token ends '</z' or 'q' as text"):
        ending_token_ids(["</z", "q"], decode_pieces, len(texts))


def test_the_pool_is_one_of_engines(tmp_path: Path) -> None:
    inner = Scripted("a$")
    pool = wrap(inner, Counting())
    pool.load_weights([], 4)
    pool.close()
    assert pool.score([[1]]) == [[[1.0]]] and inner.version == 4 and inner.is_closed
    assert list(pool.generate([], PARAMS)) == []
    with pytest.raises(ValueError, match="got 0, 16 and 60"):
        wrap(inner, Counting(), max_turns=0)
