"""Pins the contract of samples, scores and rewards. How calls are made: test_rewards_call.py.

1. A reward returns float, int, bool, None or Score; anything else, NaN and inf are refused and named.
2. A failing reward is data (status ERROR, the traceback in info), except with on_error="raise".
3. Wrong set-ups (names, weights, signatures, empty lists) fail when they are made, not at the first sample.
"""

import dataclasses
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import pytest

from rewards import RewardFunction, Sample, Score, ScoreStatus, as_reward, reward

SAMPLE = Sample(prompt="1+1?", completion="2", row={"answer": "2"}, group_id="p7", index=3, step=11)


def fixed(value: object, name: str = "fixed", weight: float = 1.0) -> RewardFunction:
    return reward(name=name, weight=weight)(lambda sample: value)  # type: ignore[arg-type, return-value]


def broken(sample: Sample) -> float:
    raise KeyError("no such column")


@pytest.mark.parametrize(
    ("completion", "expected"),
    [
        ("42", "42"),
        ("<think>1</think> 42", " 42"),
        ("<think>1</think>2</think>3", "3"),
        ("<think>unfinished", "<think>unfinished"),
        ("done</think>", ""),
    ],
)
def test_answer_part(completion: str, expected: str) -> None:
    assert Sample(prompt="", completion=completion).answer_part == expected


def test_sample_states() -> None:
    assert Sample(prompt="", completion="", finish_reason="length").truncated
    assert not SAMPLE.truncated
    assert Sample(prompt="Assistant: <think>\n", completion="").think_prefilled
    assert not SAMPLE.think_prefilled
    with pytest.raises(ValueError, match="finish_reason must be one of stop, length, abort, error, got 'eos'"):
        Sample(prompt="", completion="", finish_reason="eos")
    with pytest.raises(dataclasses.FrozenInstanceError):
        SAMPLE.prompt = "other"  # type: ignore[misc]


@pytest.mark.parametrize(
    ("returned", "value"),
    [(0.5, 0.5), (2, 2.0), (True, 1.0), (False, 0.0), (None, None), (Fraction(1, 4), 0.25), (Score(value=1), 1.0)],
)
def test_accepted_returns(returned: object, value: float | None) -> None:
    score = fixed(returned).score(SAMPLE)
    assert score.value == value
    assert score.value is None or type(score.value) is float
    assert score.status is ScoreStatus.OK
    assert not score.status.is_failure()
    assert score.seconds > 0


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (float("nan"), "must be finite, got nan"),
        (float("inf"), "must be finite, got inf"),
        (10**400, "OverflowError"),
        ("1.0", "got str: '1.0'"),
        ([1.0], "got list: [1.0]"),
        (1j, "got complex"),
    ],
)
def test_refused_returns_name_function_and_sample(returned: object, message: str) -> None:
    score = fixed(returned, name="judge").score(SAMPLE)
    assert (score.value, score.status) == (None, ScoreStatus.ERROR)
    assert message in score.info["error"]
    assert "reward 'judge' failed on the sample with group_id='p7', index=3, step=11" in score.info["error"]


@pytest.mark.parametrize("number", [float("nan"), float("-inf"), "1"])
def test_score_refuses_bad_numbers(number: object) -> None:
    with pytest.raises((ValueError, TypeError), match="the value of a Score must be"):
        Score(value=number)  # type: ignore[arg-type]
    with pytest.raises((ValueError, TypeError), match="metric 'length' of a Score must be"):
        Score(value=0.0, metrics={"length": number})  # type: ignore[dict-item]


@pytest.mark.parametrize(("on_error", "value"), [("skip", None), ("zero", 0.0)])
def test_exception_becomes_data(on_error: str, value: float | None) -> None:
    score = reward(on_error=on_error)(broken).score(SAMPLE)  # type: ignore[arg-type]
    assert (score.value, score.status) == (value, ScoreStatus.ERROR)
    assert score.status.is_failure()
    assert "Traceback" in score.info["error"]
    assert "KeyError: 'no such column'" in score.info["error"]
    assert score.seconds > 0


def test_on_error_raise_raises_and_names_the_sample() -> None:
    with pytest.raises(KeyError) as caught:
        reward(on_error="raise")(broken).score(SAMPLE)
    assert caught.value.__notes__ == ["reward 'broken' failed on the sample with group_id='p7', index=3, step=11"]
    with pytest.raises(ValueError, match="finite"):
        reward(on_error="raise")(lambda sample: float("nan")).score(SAMPLE)


def test_default_policy_is_skip_with_weight_one() -> None:
    assert (as_reward(broken).on_error, as_reward(broken).weight) == ("skip", 1.0)


def test_keyboard_interrupt_is_not_swallowed() -> None:
    def interrupted(sample: Sample) -> float:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        as_reward(interrupted).score(SAMPLE)


def test_decorator_bare_and_with_arguments() -> None:
    @reward
    def bare(sample: Sample) -> float:
        return 1.0

    @reward(weight=0.25, name="shown", on_error="zero")
    def full(sample: Sample) -> float:
        return 2.0

    assert (bare.name, bare.weight, bare.on_error) == ("bare", 1.0, "skip")
    assert (full.name, full.weight, full.on_error) == ("shown", 0.25, "zero")
    assert full(SAMPLE) == 2.0
    assert as_reward(full) is full


def test_call_is_the_raw_function() -> None:
    with pytest.raises(KeyError):
        reward(broken)(SAMPLE)


@pytest.mark.parametrize("kwargs", [{"name": ""}, {"name": "a/b"}, {"weight": float("nan")}, {"on_error": "ignore"}])
def test_wrong_settings_are_refused(kwargs: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(kwargs))):
        reward(**kwargs)(broken)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda: 1.0, r"takes nothing of the sample; its signature is \(\); name a parameter 'sample', 'prompt'"),
        (lambda *args: 1.0, "takes nothing of the sample"),
        (lambda samples: 1.0, "takes 'samples', but without batch=True or group=True it takes 'sample'"),
        (lambda a, b, /: 1.0, "positional-only parameters"),
        (Score, "must be a function, got <class"),
        (3, "must be a function, got 3"),
    ],
)
def test_wrong_functions_are_refused(function: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        as_reward(function)  # type: ignore[arg-type]


def test_package_imports_only_the_standard_library() -> None:
    code = (
        "import sys; before = set(sys.modules); import rewards;"
        "print({m.partition('.')[0] for m in set(sys.modules) - before} - set(sys.stdlib_module_names))"
    )
    root = Path(__file__).parents[2]
    result = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "{'rewards'}"
