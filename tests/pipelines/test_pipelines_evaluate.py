"""Evaluation.

Pinned: (1) Wilson's interval against published and hand-computed values; (2) accuracy counts scored problems only:
neither a failed completion nor one whose reward did not apply is right or wrong, and both are counted; (3) a metric is
averaged over the problems that have it; (4) records keep the order of the problems although groups arrive in any, and
hold all that is needed to judge the judge; (5) batching changes nothing; (6) text forced on the model counts as its
own; (7) `results.json` and `records.jsonl` say what the result says.
"""

import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from pipelines.evaluate import EvalResult, evaluate, wilson_interval, write_result
from rewards import Rubric, Sample, Score, math_answer, reward
from rollout.engine import WeightStream
from rollout.pool import LocalPool
from rollout.sample import Completion, CompletionGroup, FinishReason, Prompt, SamplingParams

PARAMS = SamplingParams(max_tokens=50, stop_token_id=0, temperature=0)


@pytest.mark.parametrize(
    ("right", "trials", "low", "high"),
    [
        (0, 10, 0.0, 0.2775),
        (1, 10, 0.0179, 0.4042),
        (5, 10, 0.2366, 0.7634),
        (10, 10, 0.7225, 1.0),
        (15, 148, 0.0624, 0.1605),  # Newcombe, Statistics in Medicine 17 (1998), table I: method 3
        (81, 263, 0.2553, 0.3662),  # the same
        (1, 29, 0.0061, 0.1718),  # the same
        (0, 0, 0.0, 1.0),
    ],
)
def test_wilson_interval_of_the_books(right: int, trials: int, low: float, high: float) -> None:
    assert wilson_interval(right, trials) == pytest.approx((low, high), abs=5e-5)


@pytest.mark.parametrize(("right", "trials"), [(0, 1), (1, 1), (3, 7), (400, 512), (1319, 1319)])
def test_wilson_interval_solves_its_equation(right: int, trials: int) -> None:
    """An end p of the interval is where the share lies z standard deviations of Binomial(n, p) away."""
    share, (low, high) = right / trials, wilson_interval(right, trials)
    assert 0 <= low <= share + 1e-12 and share - 1e-12 <= high <= 1
    for end in (low, high):
        if 1e-9 < end < 1 - 1e-9:
            assert abs(share - end) == pytest.approx(1.959963984540054 * math.sqrt(end * (1 - end) / trials))
    mirrored = wilson_interval(trials - right, trials)
    assert mirrored == pytest.approx((1 - high, 1 - low))


def encode(text: str) -> list[int]:
    return [ord(character) for character in text]


def decode(batch: Sequence[Sequence[int]]) -> list[str]:
    return ["".join(map(chr, ids)) for ids in batch]


class ScriptedPool(LocalPool):
    """Answers each prompt as told, in reversed order."""

    def __init__(self, answers: dict[str, tuple[str, FinishReason]]) -> None:
        self.answers, self.calls = answers, list[list[str]]()

    def generate(self, prompts: Sequence[Prompt], params: SamplingParams) -> Iterator[CompletionGroup]:
        assert params == PARAMS
        self.calls.append([prompt.id for prompt in prompts])
        for prompt in reversed(prompts):
            text, reason = self.answers[prompt.id]
            ids = encode(text)
            completion = Completion(
                token_ids=ids, logprobs=[-1.0] * len(ids), finish_reason=reason, policy_version=0, seed=0
            )
            yield CompletionGroup(prompt=prompt, completions=[completion])

    def score(self, sequences: Sequence[Sequence[int]]) -> list[list[list[float]]]:
        raise NotImplementedError

    def load_weights(self, weights: WeightStream, version: int) -> None:
        raise NotImplementedError

    def close(self) -> None:
        raise NotImplementedError


@reward(weight=0.0)
def size(sample: Sample) -> Score:
    """Applies to answers that hold a digit."""
    digits = [character for character in sample.completion if character.isdigit()]
    return Score(value=float(len(digits)) if digits else None)


RUBRIC = Rubric([math_answer, size])
STOP, LENGTH, ERROR = FinishReason.STOP, FinishReason.LENGTH, FinishReason.ERROR
# id -> (gold answer, completion, why it ended)
PROBLEMS: dict[str, tuple[Any, str, FinishReason]] = {
    "right": ("5", "<answer>5</answer>", STOP),
    "wrong": ("5", "<answer>66</answer>", STOP),
    "silent": ("5", "I do not know", STOP),
    "cut": ("5", "5 and then", LENGTH),
    "cut-but-answered": ("7", "<answer>7</answer> and", LENGTH),
    "failed": ("5", "<answer>5</answer>", ERROR),
    "no-gold": (None, "<answer>5</answer>", STOP),
    "right-again": ("0.5", "<answer>1/2</answer>", STOP),
}


def make_prompts(prefill: str = "") -> list[Prompt]:
    return [
        Prompt(id=name, text=f"Q {name}{prefill}", token_ids=[1], prefill=prefill, row={"answer": gold, "n": number})
        for number, (name, (gold, _, _)) in enumerate(PROBLEMS.items())
    ]


def run(prompts: list[Prompt], batch_size: int = 256) -> tuple[EvalResult, ScriptedPool, list[int]]:
    pool = ScriptedPool({name: (text, reason) for name, (_, text, reason) in PROBLEMS.items()})
    done: list[int] = []
    result = evaluate(
        pool, prompts, RUBRIC, decode, PARAMS, accuracy="math_answer", batch_size=batch_size, on_batch=done.append
    )
    return result, pool, done


def test_accuracy_is_of_scored_problems() -> None:
    result, _, _ = run(make_prompts())
    assert (result.num_problems, result.num_unscored) == (8, 2), "the failed one, and the one without a gold answer"
    assert result.accuracy == 3 / 6
    assert (result.accuracy_low, result.accuracy_high) == wilson_interval(3, 6)
    assert result.truncated == 2 / 8
    assert result.tokens_per_s == pytest.approx(sum(len(text) for _, text, _ in PROBLEMS.values()) / result.seconds)


def test_a_metric_is_averaged_over_the_problems_that_have_it() -> None:
    metrics = run(make_prompts())[0].metrics
    assert metrics["math_answer"] == 3 / 6
    assert metrics["math_answer/answered"] == 4 / 6
    # Digits of right, wrong, cut, cut-but-answered, right-again; "silent" has none, which is not the same as 0.
    assert metrics["size"] == pytest.approx((1 + 2 + 1 + 1 + 2) / 5)


def test_records_are_complete_and_in_order() -> None:
    result, _, _ = run(make_prompts())
    assert [record["id"] for record in result.records] == list(PROBLEMS)
    record = result.records[1]
    assert record == {
        "id": "wrong",
        "prompt": "Q wrong",
        "row": {"answer": "5", "n": 1},
        "completion": "<answer>66</answer>",
        "finish_reason": "stop",
        "value": 0.0,
        "metrics": {"math_answer": 0.0, "math_answer/answered": 1.0, "size": 2.0},
        "info": {
            "math_answer": {"extracted": "66", "method": "answer_tag", "reason": "different", "gold": "5"},
            "size": {},
        },
        "status": "ok",
    }
    assert [record["finish_reason"] for record in result.records if record["id"] == "failed"] == ["error"]
    assert [record["value"] for record in result.records if record["id"] == "no-gold"] == [None]


def without_time(result: EvalResult) -> dict[str, Any]:
    return {name: value for name, value in result.summary().items() if name not in ("seconds", "tokens_per_s")}


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_batching_changes_nothing(batch_size: int) -> None:
    whole, _, _ = run(make_prompts())
    result, pool, done = run(make_prompts(), batch_size)
    assert without_time(result) == without_time(whole) and result.records == whole.records
    assert [name for call in pool.calls for name in call] == list(PROBLEMS)
    assert max(map(len, pool.calls)) == batch_size and done == list(map(len, pool.calls))


def test_text_forced_on_the_model_is_scored_with_the_completion() -> None:
    prefill = "<answer>"
    prompt = Prompt(id="p", text=f"Q{prefill}", token_ids=[1], prefill=prefill, row={"answer": "5"})
    pool = ScriptedPool({"p": ("5</answer>", STOP)})
    result = evaluate(pool, [prompt], RUBRIC, decode, PARAMS, accuracy="math_answer")
    assert result.accuracy == 1.0
    assert result.records[0]["info"]["math_answer"]["method"] == "answer_tag"


def test_nothing_scored_is_no_accuracy_but_a_count() -> None:
    result, _, _ = run([prompt for prompt in make_prompts() if prompt.id in ("failed", "no-gold")])
    assert (result.num_problems, result.num_unscored) == (2, 2)
    assert (result.accuracy_low, result.accuracy_high) == (0.0, 1.0)
    assert result.metrics == {}


def test_several_completions_per_problem_are_refused() -> None:
    params = SamplingParams(max_tokens=5, stop_token_id=0, num_completions=2)
    with pytest.raises(AssertionError, match="one completion per problem"):
        evaluate(ScriptedPool({}), make_prompts(), RUBRIC, decode, params, accuracy="math_answer")


def test_files_say_what_the_result_says(tmp_path: Path) -> None:
    result, _, _ = run(make_prompts())
    write_result(result, tmp_path / "deep" / "out")
    folder = tmp_path / "deep" / "out"
    assert json.loads((folder / "results.json").read_text()) == result.summary()
    lines = (folder / "records.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == result.records
    assert set(result.summary()) >= {"accuracy", "accuracy_low", "accuracy_high", "num_problems", "num_unscored"}
    assert "records" not in result.summary()
