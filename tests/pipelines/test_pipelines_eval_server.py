"""Evaluation of a served model.

Pinned: (1) the completions endpoint gets the exact prompt, the chat endpoint the bare question and the system message;
every completion has a seed of its own; (2) no more requests at a time than allowed; (3) a busy server (429, 503) is
asked again when it says, and that is counted; nothing else is asked again; (4) errors, timeouts, prompts that are too
long and answers that are none become data with their kind, and are in no accuracy; (5) what failed can be sampled
again; (6) a server that is not there, or has another model, is refused before anything is written.
"""

import json
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from pipelines.evaluation.from_server import Server, ServerSampler
from pipelines.evaluation.samples import Drawn
from rollout.sample import Prompt, SamplingParams
from tests.pipelines.conftest import GSM8K, grpo
from tests.pipelines.servers import Answer, ScriptedServer, completion, message

PARAMS = SamplingParams(max_tokens=7, temperature=0.5, top_p=0.9, num_completions=2, stop_token_id=0, seed=3)
OK: dict[str, str] = {}


def prompts(*names: str) -> list[Prompt]:
    return [Prompt(id=name, text=name, token_ids=[], row={}) for name in names]


def sample(
    script: ScriptedServer, names: tuple[str, ...], params: SamplingParams = PARAMS, **server: Any
) -> list[Drawn]:
    with script.running() as url, ServerSampler(Server(url=url, model="toy", **server)) as sampler:
        drawn = list(sampler.sample(prompts(*names), params, stop=("END",)))
    return sorted(drawn, key=lambda one: one.key)


def test_what_is_asked() -> None:
    script = ScriptedServer(lambda path, request, before: (200, OK, completion(f"to {request['prompt']}", "length")))
    drawn = sample(script, ("a", "b"))
    assert [(one.prompt_id, one.index, one.text) for one in drawn] == [
        ("a", 0, "to a"), ("a", 1, "to a"), ("b", 0, "to b"), ("b", 1, "to b"),
    ]  # fmt: skip
    assert {(one.finish_reason, one.tokens, one.failure, one.retries) for one in drawn} == {("length", 4, "", 0)}
    seeds = {request["seed"] for _, request in script.requests}
    assert seeds == {PARAMS.seed_of(name, index) % 2**31 for name in "ab" for index in (0, 1)}
    asked = {"model": "toy", "max_tokens": 7, "temperature": 0.5, "top_p": 0.9, "stop": ["END"]}
    assert all(path == "/v1/completions" and asked.items() <= request.items() for path, request in script.requests)


def test_chat_gets_messages_and_gives_the_thinking_back() -> None:
    script = ScriptedServer(lambda *_: (200, OK, message("5", reasoning_content="2 + 3")))
    [one] = sample(script, ("a",), SamplingParams(max_tokens=7, stop_token_id=0), api="chat", system="Be brief.")
    assert one.text == "<think>2 + 3</think>5"
    [(path, request)] = script.requests
    assert path == "/v1/chat/completions"
    assert request["messages"] == [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "a"}]


def test_requests_at_a_time() -> None:
    full = threading.Barrier(3, timeout=20)  # passes only if three are there at once
    fourth = threading.Event()

    def answer(path: str, request: dict[str, Any], before: int) -> Answer:
        if script.most_at_once > 3:
            fourth.set()
        full.wait()
        fourth.wait(0.3)  # time for a fourth to come, if it may
        return 200, OK, completion("x")

    script = ScriptedServer(answer)
    assert len(sample(script, tuple("abcdef"), concurrency=3)) == 12
    assert script.most_at_once == 3


def test_a_busy_server_is_asked_again_when_it_says() -> None:
    def answer(path: str, request: dict[str, Any], before: int) -> Answer:
        if before < 2:
            return (429, 503)[before], {"Retry-After": "0.2"}, {"error": {"message": "busy"}}
        return 200, OK, completion("x")

    started = time.perf_counter()
    one = sample(ScriptedServer(answer), ("a",))[0]
    assert (one.text, one.retries) == ("x", 2) and time.perf_counter() - started >= 0.4
    always = ScriptedServer(lambda *_: (429, {"Retry-After": "0"}, {"error": {"message": "never"}}))
    assert {(one.failure, one.retries) for one in sample(always, ("a",), max_retries=3)} == {("http_429", 3)}
    assert len(always.requests) == 2 * 4


BAD: dict[str, Answer] = {
    "http_500": (500, OK, {"error": {"message": "broken"}}),
    "http_400": (400, OK, {"error": {"message": "no such thing"}}),
    "no_room": (400, OK, {"error": {"message": "This model's maximum context length is 512 tokens."}}),
    "bad_answer": (200, OK, {"object": "text_completion", "choices": []}),
    "finished_content_filter": (200, OK, completion("x", "content_filter")),
}


def test_what_goes_wrong_is_data() -> None:
    let_go = threading.Event()

    def answer(path: str, request: dict[str, Any], before: int) -> Answer:
        if request["prompt"] == "timeout":
            let_go.wait(20)
        return BAD.get(request["prompt"], (200, OK, completion("fine")))

    script = ScriptedServer(answer)
    names = (*BAD, "timeout", "fine")
    with script.running() as url, ServerSampler(Server(url=url, model="toy", timeout_s=1.0)) as sampler:
        drawn = {
            one.prompt_id: one for one in sampler.sample(prompts(*names), SamplingParams(max_tokens=7, stop_token_id=0))
        }
        let_go.set()
    assert {name: one.failure for name, one in drawn.items()} == {name: name for name in names} | {"fine": ""}
    assert all(one.error for name, one in drawn.items() if name != "fine")
    assert "broken" in drawn["http_500"].error
    assert len(script.requests) == len(names), "nothing of this is asked twice"


def test_the_command_counts_failures_and_samples_them_again(tmp_path: Path) -> None:
    ill = True

    def answer(path: str, request: dict[str, Any], before: int) -> Answer:
        if ill and "Janet" in request["prompt"]:
            return 500, OK, {"error": {"message": "ill"}}
        return 200, OK, completion("<answer>18</answer>")

    script = ScriptedServer(answer)
    with script.running() as url:
        command = ("eval", "--server", url, "--server-model", "toy", "--data", GSM8K, "--out", tmp_path / "out")
        done = grpo(*command)
        assert done.status == 0, done.err
        result = json.loads((tmp_path / "out" / "results.json").read_text())
        assert (result["num_problems"], result["num_unscored"], result["failures"]) == (8, 1, {"http_500": 1})
        assert result["accuracy"] == 0.0 and "not scored: 1 problems" in done.out
        ill = False
        assert grpo(*command).status == 0 and len(script.requests) == 8, "what is there is not asked for again"
        assert grpo(*command, "--retry-failed").status == 0 and len(script.requests) == 9
    result = json.loads((tmp_path / "out" / "results.json").read_text())
    assert (result["num_unscored"], result["failures"], result["accuracy"]) == (0, {}, 1 / 8)


def test_a_server_that_is_not_there_or_has_another_model(tmp_path: Path) -> None:
    script = ScriptedServer(lambda *_: (200, OK, completion("x")))
    arguments = ("--data", GSM8K, "--out", tmp_path / "out")
    with script.running() as url:
        other = grpo("eval", "--server", url, "--server-model", "other", *arguments)
        assert "offers toy, not 'other'" in other.one_line_error()
    gone = grpo("eval", "--server", url, "--server-model", "toy", *arguments)
    assert "does not answer" in gone.one_line_error() and "is it started?" in gone.one_line_error()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--server", "http://x/v1"), "server and server_model belong together"),
        (("--server", "http://x/v1", "--server-model", "toy", "--model", "m"), "give one of them"),
        (("--model", "m", "--server-api", "chat"), "are for a server"),
        (("--server", "http://x/v1", "--server-model", "t", "--system", "s"), "set --server-api chat"),
        (("--server", "http://x/v1", "--server-model", "t", "--template", "chat"), "set --server-api chat"),
    ],
)
def test_contradictions_are_refused(flags: tuple[str, ...], message: str) -> None:
    assert message in grpo("eval", *flags).one_line_error()
