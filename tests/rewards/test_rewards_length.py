"""Length rewards against numbers worked out by hand from the papers' formulas."""

import pytest

from rewards import (
    RewardFunction,
    Sample,
    Score,
    ScoreStatus,
    cosine_length,
    kimi_length,
    reward,
    soft_overlong,
    thinking_length,
    truncation_penalty,
)


def of_length(tokens: int, right: object = True) -> Sample:
    return Sample(prompt="", completion="x" * tokens, completion_ids=(1,) * tokens, row={"right": right})


@reward
def judge(right: object) -> object:
    return right


@pytest.mark.parametrize(
    ("prompt", "completion", "words"),
    [
        ("q", " <think> 3 7 9 </think> <answer> 9 </answer>", 3.0),
        ("q", "<think></think><answer>9</answer>", 0.0),
        ("q", "<answer> 9 </answer>", 0.0),
        ("q", "<think> cut off here", 3.0),
        ("q <think>", " 3 7 </think> 9", 2.0),
        ("q", "<think> a </think> <think> b c </think>", 1.0),
    ],
)
def test_words_between_the_tags(prompt: str, completion: str, words: float) -> None:
    assert thinking_length.score(Sample(prompt=prompt, completion=completion)).value == words


def test_it_is_a_metric_not_a_reward() -> None:
    assert thinking_length.weight == 0.0


@pytest.mark.parametrize(
    ("tokens", "value"),
    [(0, 0.0), (80, 0.0), (81, -0.05), (85, -0.25), (90, -0.5), (99, -0.95), (100, -1.0), (101, -1.0), (500, -1.0)],
)
def test_soft_overlong(tokens: int, value: float) -> None:
    assert soft_overlong(max_length=100, buffer=20).score(of_length(tokens)).value == pytest.approx(value, abs=1e-12)


@pytest.mark.parametrize(("tokens", "value"), [(16384, 0.0), (18432, -0.5), (20480, -1.0)])
def test_soft_overlong_with_the_papers_numbers(tokens: int, value: float) -> None:
    assert soft_overlong(max_length=20480, buffer=4096).score(of_length(tokens)).value == value


@pytest.mark.parametrize(
    ("tokens", "right", "value"),
    [
        (0, True, 1.0),
        (50, True, 0.75),
        (100, True, 0.5),
        (150, True, 0.5),  # open-r1, which does not clamp, would give 0.75
        (25, True, 0.5 + 0.25 * (1 + 0.5**0.5)),
        (0, False, -1.0),
        (50, False, -0.75),
        (100, False, -0.5),
        (25, False, -0.5 - 0.25 * (1 + 0.5**0.5)),
        (50, None, None),
    ],
)
def test_cosine(tokens: int, right: bool | None, value: float | None) -> None:
    score = cosine_length(judge=judge, max_length=100).score(of_length(tokens, right))
    assert score.value == (value if value is None else pytest.approx(value, abs=1e-12))


def test_cosine_with_the_papers_values() -> None:
    paper = cosine_length(judge=judge, max_length=100, correct=(2, 1), wrong=(-10, 0), beyond=-10)
    values = [paper.score(of_length(tokens, right)).value for tokens in (0, 50, 100, 101) for right in (True, False)]
    assert values == pytest.approx([2, -10, 1.5, -5, 1, 0, -10, -10], abs=1e-12)


def values(function: RewardFunction, lengths: list[int], right: list[object]) -> list[float | None]:
    group = [of_length(*pair) for pair in zip(lengths, right, strict=True)]
    return [score.value for score in function.score_groups([group])[0]]


def test_kimi() -> None:
    kimi = kimi_length(judge=judge)
    assert values(kimi, [10, 20, 30, 50], [1, 1, 1, 1]) == [0.5, 0.25, 0.0, -0.5]
    assert values(kimi, [10, 20, 30, 50], [0, 0, 1, 0]) == [0.0, 0.0, 0.0, -0.5]
    assert values(kimi, [7, 7], [1, 0]) == [0.0, 0.0]
    assert values(kimi, [7], [1]) == [0.0]
    assert values(kimi, [10, 20, 50], [1, None, 1]) == [0.5, None, -0.5]
    failed = Sample(prompt="", completion="", finish_reason="error", row={"right": 1})
    (scores,) = kimi.score_groups([[failed, of_length(10), of_length(20)]])
    assert [score.value for score in scores] == [None, 0.5, -0.5]


def test_a_judge_that_fails_fails_the_length_reward() -> None:
    timed_out = Score(value=None, status=ScoreStatus.TIMEOUT, info={"error": "late"})
    score = cosine_length(judge=judge, max_length=9).score(of_length(3, timed_out))
    assert (score.value, score.status, score.info) == (None, ScoreStatus.TIMEOUT, {"judge": {"error": "late"}})
    (scores,) = kimi_length(judge=judge).score_groups([[of_length(3, 1.0), of_length(5, "no number")]])
    assert [score.status for score in scores] == [ScoreStatus.OK, ScoreStatus.ERROR]


def test_truncation() -> None:
    for finish_reason, value in (("stop", 0.0), ("length", -0.5), ("abort", 0.0)):
        sample = Sample(prompt="", completion="", finish_reason=finish_reason)
        assert truncation_penalty(penalty=-0.5).score(sample).value == value


def test_units() -> None:
    sample = Sample(prompt="", completion="four words of text", completion_ids=(1, 2, 3, 4, 5))
    found = [soft_overlong(max_length=20, buffer=20, unit=unit).score(sample).value for unit in
             ("tokens", "words", "characters")]  # type: ignore[arg-type]  # fmt: skip
    assert found == [-0.25, -0.2, -0.9]
    score = soft_overlong(max_length=20, buffer=20).score(Sample(prompt="", completion="no ids"))
    assert score.status is ScoreStatus.ERROR and "no completion_ids; measure in unit='words'" in score.info["error"]


@pytest.mark.parametrize("settings", [{"buffer": 0}, {"buffer": 21}, {"buffer": 5, "unit": "lines"}])
def test_wrong_settings(settings: dict) -> None:
    with pytest.raises(ValueError, match="must be"):
        soft_overlong(max_length=20, **settings)
    with pytest.raises(ValueError, match="max_length must be >= 1, got 0"):
        cosine_length(judge=judge, max_length=0)
