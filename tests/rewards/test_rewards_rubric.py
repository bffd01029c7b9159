"""Pins the rubric.

1. The sum of weight * value over what applies; None only where nothing with a weight applies.
2. A part that failed without a value makes the sum None: what is left must not pass for the whole.
3. A shut gate makes a term 0; a gate whose reward does not apply takes the term out.
4. The breakdown is kept, failures are counted per reward, the first one is logged with its sample.
"""

import logging
import time

import pytest

from rewards import Gate, RewardFunction, Rubric, Sample, Score, ScoreStatus, failure_shares, reward, reward_seconds

SAMPLE = Sample(prompt="1+1?", completion="2", row={"answer": "2"}, group_id="p7", index=3, step=11)


def fixed(value: object, name: str = "fixed", weight: float = 1.0) -> RewardFunction:
    return reward(name=name, weight=weight)(lambda sample: value)


def broken(sample: Sample) -> float:
    raise KeyError("no such column")


@pytest.mark.parametrize(
    ("parts", "value"),
    [
        ([(1.0, 1.0), (0.5, 0.2)], 1.1),
        ([(1.0, 1.0), (None, 5.0)], 1.0),
        ([(None, 1.0), (None, 1.0)], None),
        ([(None, 1.0), (7.0, 0.0)], None),
        ([(1.0, 1.0), (7.0, 0.0)], 1.0),
        ([(0.0, 1.0)], 0.0),
        ([(1.0, 1.0), (1.0, -0.5)], 0.5),
    ],
)
def test_rubric_value(parts: list, value: float | None) -> None:
    rubric = Rubric([fixed(part, name=f"r{i}", weight=weight) for i, (part, weight) in enumerate(parts)])
    score = rubric.score(SAMPLE)
    assert score.value == (value if value is None else pytest.approx(value, abs=1e-12))
    present = {f"r{i}": part for i, (part, _) in enumerate(parts) if part is not None}
    assert score.metrics == present  # None leaves the averages, weight 0 does not


def test_rubric_keeps_metrics_info_and_time_apart() -> None:
    rubric = Rubric(
        [
            fixed(Score(value=1.0, metrics={"words": 3}, info={"extracted": "42"}), name="math"),
            fixed(Score(value=None, metrics={"words": 9}), name="judge"),
        ]
    )
    score = rubric.score(SAMPLE)
    assert score.metrics == {"math": 1.0, "math/words": 3.0, "judge/words": 9.0}
    assert score.info == {"math": {"extracted": "42"}, "judge": {}}
    assert score.status is ScoreStatus.OK
    assert score.seconds > 0


def test_rubric_with_a_failing_part() -> None:
    score = Rubric([fixed(1.0), broken]).score(SAMPLE)
    assert (score.value, score.status) == (None, ScoreStatus.ERROR), "what is left must not pass for the whole reward"
    metric_only = reward(weight=0.0, name="broken")(broken)
    score = Rubric([fixed(1.0), metric_only]).score(SAMPLE)
    assert (score.value, score.status) == (1.0, ScoreStatus.ERROR)
    assert "KeyError" in score.info["broken"]["error"]
    assert "broken" not in score.metrics
    timed_out = fixed(Score(value=None, status=ScoreStatus.TIMEOUT), name="slow")
    assert Rubric([timed_out, fixed(1.0)]).score(SAMPLE).status is ScoreStatus.TIMEOUT
    assert Rubric([timed_out, broken]).score(SAMPLE).status is ScoreStatus.ERROR


def test_rubric_refuses_empty_lists_and_equal_names() -> None:
    with pytest.raises(ValueError, match="at least one reward"):
        Rubric([])
    with pytest.raises(ValueError, match="unique names, got fixed twice"):
        Rubric([fixed(1), fixed(2), fixed(3, name="other")])


GATES = [Gate(reward="short", only_if="right")]


@pytest.mark.parametrize(
    ("right", "short", "value"),
    [
        (1.0, 0.5, 1.1),
        (0.0, 0.5, 0.0),
        (0.9, 0.5, 0.9),
        (None, 0.5, None),
        (1.0, None, 1.0),
        (Score(value=None, status=ScoreStatus.ERROR), 0.5, None),
    ],
)
def test_a_gate(right: object, short: object, value: float | None) -> None:
    score = Rubric([fixed(right, "right"), fixed(short, "short", weight=0.2)], GATES).score(SAMPLE)
    assert score.value == (value if value is None else pytest.approx(value, abs=1e-12))
    if short is not None:
        assert score.metrics["short"] == 0.5, "the breakdown is what the reward said, gate or not"


def test_gates_that_are_not_trained_on_themselves() -> None:
    short = fixed(0.5, "short")
    assert Rubric([fixed(0.0, "right", weight=0), short], GATES).score(SAMPLE).value == 0.0
    failed = fixed(Score(value=None, status=ScoreStatus.TIMEOUT), "right", weight=0)
    assert Rubric([failed, short], GATES).score(SAMPLE).value is None, "nobody knows whether the gate was open"
    low = Gate(reward="short", only_if="right", at_least=0.5)
    assert Rubric([fixed(0.5, "right"), short], [low]).score(SAMPLE).value == 1.0


def test_gates_must_name_rewards_once() -> None:
    right, short = fixed(1, "right"), fixed(1, "short")
    with pytest.raises(ValueError, match="a gate names the reward 'short'; the Rubric has right"):
        Rubric([right], GATES)
    with pytest.raises(ValueError, match="can have one gate"):
        Rubric([right, short], GATES * 2)


@reward(group=True)
def place(samples: list[Sample]) -> list[float]:
    return [sum(len(other.completion) < len(sample.completion) for other in samples) for sample in samples]


@reward(batch=True)
def count(completion: list[str]) -> list[float]:
    return [float(len(completion))] * len(completion)


def groups_of(*texts: list[str]) -> list[list[Sample]]:
    return [
        [Sample(prompt="", completion=text, group_id=str(g), index=i) for i, text in enumerate(group)]
        for g, group in enumerate(texts)
    ]


def test_groups_and_batches_see_what_they_should() -> None:
    groups = groups_of(["a", "bbb", "cc"], [], ["d", "ee"])
    scores = Rubric([place, count]).score_groups(groups)
    assert [[score.parts["place"].value for score in group] for group in scores] == [[0, 2, 1], [], [0, 1]]
    assert {score.parts["count"].value for group in scores for score in group} == {5.0}
    assert [[score.value for score in group] for group in scores] == [[5, 7, 6], [], [5, 6]]
    assert Rubric([place]).score_groups([]) == []
    with pytest.raises(ValueError, match="'place' judges a whole group; use score_groups"):
        Rubric([place]).score(SAMPLE)


def test_rewards_that_wait_do_so_at_the_same_time() -> None:
    slow = [reward(name=name, max_workers=2)(lambda sample: time.sleep(0.2)) for name in ("one", "two", "three")]
    started = time.perf_counter()
    Rubric([*slow, count]).score_groups(groups_of(["a", "b"]))
    assert time.perf_counter() - started < 0.5


def test_failures_are_counted_per_reward() -> None:
    outcomes = {"a": 1.0, "b": None, "c": float("nan"), "d": Score(value=None, status=ScoreStatus.TIMEOUT)}
    flaky = reward(name="flaky")(lambda completion: outcomes[completion])
    (scores,) = Rubric([flaky, fixed(1.0)]).score_groups(groups_of(list("abcd")))
    assert failure_shares(scores) == {
        "flaky/errors": 0.25, "flaky/timeouts": 0.25, "flaky/none": 0.75,
        "fixed/errors": 0.0, "fixed/timeouts": 0.0, "fixed/none": 0.0,
    }  # fmt: skip
    assert reward_seconds(scores).keys() == {"flaky", "fixed"} and reward_seconds(scores)["flaky"] > 0
    assert failure_shares([Score(value=1.0)]) == {}


def test_the_first_failure_is_logged_with_its_sample(caplog: pytest.LogCaptureFixture) -> None:
    rubric = Rubric([broken])
    with caplog.at_level(logging.WARNING, "rewards"):
        rubric.score_groups(groups_of(["text one", "text two"]))
        rubric.score_groups(groups_of(["text three"]))
    assert len(caplog.records) == 1
    message = caplog.records[0].getMessage()
    for part in ("KeyError: 'no such column'", "reward 'broken' failed on the sample with group_id='0'", "'text one'"):
        assert part in message
