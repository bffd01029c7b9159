"""Evaluation as a library.

Pinned: (1) accuracy counts scored completions only: neither a failed one nor one whose reward did not apply is right or
wrong, and both are counted, with what the accuracy is if all of them are wrong; (2) a metric is averaged over the
completions that have it; (3) records keep the order of the problems although completions arrive in any, hold all that
is needed to judge the judge, and are judged again to the same; (4) text forced on the model counts as its own; (5)
several completions: avg@n, pass@k and cons@k by hand; (6) extractors side by side, each against its own convention; (7)
the files say what the result says.
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from pipelines.evaluate import EvalResult, evaluate, write_result
from pipelines.evaluation.extractors import EXTRACTORS
from pipelines.evaluation.judge import completions_of, judge, read_records
from pipelines.evaluation.samples import Drawn
from pipelines.evaluation.summary import summarize
from pipelines.statistics import pass_at_k, wilson_interval
from rewards import Rubric, Sample, Score, math_answer, reward
from rollout.pool import LocalPool
from rollout.sample import Completion, FinishReason, Prompt, SamplingParams
from rollout.stream import Request, Sampled

PARAMS = SamplingParams(max_tokens=50, stop_token_id=0, temperature=0)


def encode(text: str) -> list[int]:
    return [ord(character) for character in text]


def decode(batch: Sequence[Sequence[int]]) -> list[str]:
    return ["".join(map(chr, ids)) for ids in batch]


class ScriptedPool(LocalPool):
    """Answers each prompt as told, in reversed order."""

    def __init__(self, answers: dict[str, tuple[str, FinishReason]]) -> None:
        self.answers = answers

    def stream(self, groups: Sequence[Sequence[Request]], params: SamplingParams, *_: object) -> Iterator[Sampled]:
        assert params == PARAMS
        for request in reversed([request for group in groups for request in group]):
            text, reason = self.answers[request.prompt_id]
            ids = encode(text)
            completion = Completion(
                token_ids=ids, logprobs=[-1.0] * len(ids), finish_reason=reason, version_spans=((0, len(ids)),), seed=0
            )
            yield Sampled(prompt_id=request.prompt_id, index=request.index, completion=completion)

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


def run(prompts: list[Prompt]) -> tuple[EvalResult, int]:
    pool = ScriptedPool({name: (text, reason) for name, (_, text, reason) in PROBLEMS.items()})
    done: list[None] = []
    result = evaluate(
        pool, prompts, RUBRIC, decode, PARAMS, accuracy="math_answer", on_sample=lambda: done.append(None)
    )
    return result, len(done)


def test_accuracy_is_of_scored_problems() -> None:
    result, done = run(make_prompts())
    assert done == 8
    assert (result.num_problems, result.num_unscored) == (8, 2), "the failed one, and the one without a gold answer"
    assert result.failures == {"engine": 1}
    assert result.accuracy == 3 / 6 and result.accuracy_of_all == 3 / 8
    assert (result.accuracy_low, result.accuracy_high) == pytest.approx(wilson_interval(3, 6))
    assert result.truncated == 2 / 7, "of what came"
    assert result.tokens_per_s == pytest.approx(sum(len(text) for _, text, _ in PROBLEMS.values()) / result.seconds)


def test_a_metric_is_averaged_over_the_problems_that_have_it() -> None:
    metrics = run(make_prompts())[0].metrics
    assert metrics["math_answer"] == 3 / 6
    assert metrics["math_answer/answered"] == 4 / 6
    # Digits of right, wrong, cut, cut-but-answered, right-again; "silent" has none, which is not the same as 0.
    assert metrics["size"] == pytest.approx((1 + 2 + 1 + 1 + 2) / 5)


def test_records_are_complete_and_in_order() -> None:
    result, _ = run(make_prompts())
    assert [record["prompt_id"] for record in result.records] == list(PROBLEMS)
    assert result.records[1] == {
        "id": "wrong/0",
        "prompt_id": "wrong",
        "index": 0,
        "prompt": "Q wrong",
        "prefill": "",
        "row": {"answer": "5", "n": 1},
        "completion": "<answer>66</answer>",
        "token_ids": encode("<answer>66</answer>"),
        "tokens": 19,
        "finish_reason": "stop",
        "failure": "",
        "error": "",
        "retries": 0,
        "reward": 0.0,
        "metrics": {"math_answer": 0.0, "math_answer/answered": 1.0, "size": 2.0},
        "info": {
            "math_answer": {"extracted": "66", "method": "answer_tag", "reason": "different", "gold": "5"},
            "size": {},
        },
        "status": "ok",
    }
    [failed] = [record for record in result.records if record["failure"]]
    assert (failed["prompt_id"], failed["reward"], failed["metrics"], failed["status"]) == (
        "failed",
        None,
        {},
        "failed",
    )
    assert [record["reward"] for record in result.records if record["prompt_id"] == "no-gold"] == [None]


def test_text_forced_on_the_model_is_scored_with_the_completion() -> None:
    prefill = "<answer>"
    prompt = Prompt(id="p", text=f"Q{prefill}", token_ids=[1], prefill=prefill, row={"answer": "5"})
    pool = ScriptedPool({"p": ("5</answer>", STOP)})
    result = evaluate(pool, [prompt], RUBRIC, decode, PARAMS, accuracy="math_answer")
    assert result.accuracy == 1.0
    assert result.records[0]["info"]["math_answer"]["method"] == "answer_tag"


def test_nothing_scored_is_no_accuracy_but_a_count() -> None:
    result, _ = run([prompt for prompt in make_prompts() if prompt.id in ("failed", "no-gold")])
    assert (result.num_problems, result.num_unscored) == (2, 2)
    assert (result.accuracy_low, result.accuracy_high) == (0.0, 1.0)
    assert result.metrics == {}


def test_files_say_what_the_result_says_and_are_judged_again_to_the_same(tmp_path: Path) -> None:
    result, _ = run(make_prompts("<answer>"))
    folder = tmp_path / "deep" / "out"
    write_result(result, folder)
    assert json.loads((folder / "results.json").read_text()) == result.summary()
    assert "records" not in result.summary()
    records = read_records(folder)
    assert records == result.records
    page = (folder / "report.md").read_text()
    assert "accuracy if all that was not scored is wrong" in page and "| failures | 1 engine |" in page
    prompts, drawn = completions_of(records)
    assert judge(prompts, drawn, RUBRIC, accuracy="math_answer") == result.records


def drawn_of(answers: dict[str, list[str | None]]) -> tuple[list[Prompt], dict[tuple[str, int], Drawn]]:
    """Completions by problem, None for one that failed; the gold answer is 1/2 everywhere."""
    prompts = [Prompt(id=name, text="Q", token_ids=[], row={"answer": "#### 1/2"}) for name in answers]
    drawn = [
        Drawn(prompt_id=name, index=i, failure="timeout") if text is None
        else Drawn(prompt_id=name, index=i, text=text, finish_reason="stop")
        for name, texts in answers.items() for i, text in enumerate(texts)
    ]  # fmt: skip
    return prompts, {one.key: one for one in drawn}


def test_several_completions_by_hand() -> None:
    half, tenths, two = (f"<answer>{answer}</answer>" for answer in (r"\frac12", "0.5", "2"))
    prompts, drawn = drawn_of({"a": [half, tenths, two, "?"], "b": [two, two, half, None], "c": [None] * 4})
    records = judge(prompts, drawn, Rubric([math_answer]), accuracy="math_answer")
    result = summarize(records, accuracy="math_answer", ks=(1, 2, 3, 4))
    assert result.accuracy == pytest.approx((2 / 4 + 1 / 3) / 2), "every problem counts the same"
    assert (result.num_problems, result.num_unscored, result.num_unscored_samples) == (3, 1, 5)
    assert result.accuracy_of_all == pytest.approx((2 / 4 + 1 / 4 + 0) / 3)
    assert result.pass_at["1"].value == pytest.approx(result.accuracy)
    expected = pass_at_k(num_samples=4, num_right=2, k=2), pass_at_k(num_samples=3, num_right=1, k=2)
    assert result.pass_at["2"].value == pytest.approx(sum(expected) / 2)
    assert (result.pass_at["4"].value, result.pass_at["4"].num_problems) == (1.0, 1), "b has 3 scored completions"
    assert result.cons_at["4"].value == 1.0, "a half and five tenths are one answer"
    assert result.cons_at["3"].value == pytest.approx(((1 + 1 + 0.5 + 0.5) / 4 + 0) / 2)


def test_extractors_side_by_side() -> None:
    texts = {
        "hash": "so 3 + 4 = 1,234 #### 1,234",
        "last": "it is 99, no: 1234.",
        "boxed": r"it is \boxed{1234}, since 5 is odd",
        "tag": "<answer>1234.0</answer>",
    }
    prompts = [Prompt(id=name, text="Q", token_ids=[], row={"answer": "6 * 7 #### 1,234"}) for name in texts]
    drawn = [Drawn(prompt_id=name, index=0, text=text, finish_reason="stop") for name, text in texts.items()]
    by_key = {one.key: one for one in drawn}
    records = judge(prompts, by_key, Rubric([math_answer]), accuracy="math_answer", extractors=EXTRACTORS)
    right = {r["prompt_id"]: {name for name, one in r["extractors"].items() if one["right"]} for r in records}
    assert right == {
        "hash": {"strict", "flexible", "default"},
        "last": {"flexible", "default"},
        "boxed": {"boxed", "default"},
        "tag": {"answer", "default"},  # as text, which the first two compare, 1234.0 is another number
    }
    result = summarize(records, accuracy="math_answer")
    assert {name: one.accuracy.value for name, one in result.extractors.items()} == {
        "strict": 1 / 4, "flexible": 2 / 4, "boxed": 1 / 4, "answer": 1 / 4, "default": 1.0,
    }  # fmt: skip
    assert result.extractors["strict"].answered == 1 / 4
    assert result.disagreements["flexible, not strict"] == 1 and result.disagreements["default, not flexible"] == 2
    assert "strict, not flexible" not in result.disagreements
