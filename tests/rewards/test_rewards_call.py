"""Pins how functions are called: what they take, per sample, batch or group, here, in threads, processes, coroutines.

1. Arguments come by name: the sample, its fields, the row's columns; what is missing is named with what there is.
2. A batch reward is called once, or in pieces of `batch_size`; a group reward once per group; both return lists.
3. A bad entry fails its sample, a bad list or an exception all samples of its call, by the same policies.
4. A deadline holds in worker processes and for coroutines; `timeout_s` chooses the process.
"""

import asyncio
import re
import threading
import time
from functools import partial
from pathlib import Path

import pytest

from rewards import RewardFunction, Sample, Score, ScoreStatus, as_reward, load_reward, reward

ROW = {"answer": "4", "level": 3, "prompt": "of the row"}
SAMPLE = Sample(prompt="2+2?", completion="<think>a</think>4", completion_ids=(7, 8), row=ROW, group_id="g", step=5)
GROUPS = [
    [Sample(prompt="", completion=f"{g}{i}", row={"g": g}, group_id=str(g), index=i) for i in range(2 + g)]
    for g in range(2)
]


def returned_info(function) -> dict:
    score = as_reward(function).score(SAMPLE)
    assert score.status is ScoreStatus.OK, score.info
    return dict(score.info)


def test_arguments_by_name() -> None:
    def plain(
        prompt, completion, completion_ids, finish_reason, truncated, answer_part, thinking, group_id, index, step
    ):
        return Score(value=1.0, info=dict(locals()))

    assert returned_info(plain) == {
        "prompt": "2+2?", "completion": "<think>a</think>4", "completion_ids": (7, 8), "finish_reason": "stop",
        "truncated": False, "answer_part": "4", "thinking": "a", "group_id": "g", "index": 0, "step": 5,
    }  # fmt: skip
    assert returned_info(lambda sample, row: Score(value=1, info={"s": sample, "r": row})) == {"s": SAMPLE, "r": ROW}
    assert returned_info(lambda answer, **rest: Score(value=1, info=rest)) == {"level": 3, "prompt": "of the row"}
    assert returned_info(lambda prompt, **rest: Score(value=1, info=rest)) == {"answer": "4", "level": 3}
    assert returned_info(lambda level=0, other=9: Score(value=1, info={"l": level, "o": other})) == {"l": 3, "o": 9}


def test_a_sample_by_its_type_or_position() -> None:
    def annotated(s: Sample) -> float:
        return s.step

    def quoted(s: "Sample", level: int) -> float:
        return s.step + level

    def positional(s, /) -> float:
        return s.step

    assert [as_reward(f).score(SAMPLE).value for f in (annotated, quoted, positional)] == [5.0, 8.0, 5.0]


def test_bound_arguments_are_not_taken_from_the_row() -> None:
    bound = partial(lambda answer, level: level, level=10)
    assert reward(name="bound")(bound).score(SAMPLE).value == 10.0


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (
            lambda gold: 1,
            "'gold' is neither a field nor a column; fields: sample, prompt, .*columns.*: answer",
        ),
        (lambda completions, **kw: 1, "written for another framework\\? wrap it in from_trl"),
        (lambda solution_str, ground_truth: 1, "wrap it in from_verl"),
        (lambda queries, prompts, labels: 1, "wrap it in from_openrlhf"),
    ],
)
def test_a_missing_column_is_an_error_that_says_what_there_is(function, message: str) -> None:
    score = reward(name="f")(function).score(SAMPLE)
    assert score.status is ScoreStatus.ERROR
    assert re.search(message, score.info["error"]), score.info["error"]
    with pytest.raises(KeyError, match=message):
        reward(name="f", on_error="raise")(function).score(SAMPLE)


def values(function: RewardFunction) -> list:
    return [[score.value for score in group] for group in function.score_groups(GROUPS)]


def test_batches_and_groups() -> None:
    sizes: list[int] = []

    def judge(samples, completion, g) -> list[float]:
        assert [sample.completion for sample in samples] == completion
        sizes.append(len(samples))
        return [10 * a + int(text) for a, text in zip(g, completion, strict=True)]

    whole, pieces, groups = reward(batch=True), reward(batch=True, batch_size=2), reward(group=True)
    for decorate, calls in ((whole, [5]), (pieces, [2, 2, 1]), (groups, [2, 3])):
        sizes.clear()
        assert values(decorate(judge)) == [[0, 1], [20, 21, 22]]
        assert sizes == calls
    assert reward(batch=True)(judge).score(GROUPS[1][2]).value == 22.0


def test_columns_that_only_some_rows_have_are_none() -> None:
    samples = [Sample(prompt="", completion="", row=row) for row in ({"a": 1}, {"b": 2})]
    seen = {}
    reward(batch=True)(lambda a, c=0, **rest: seen.update(a=a, c=c, **rest) or [1, 1]).score_groups([samples])
    assert seen == {"a": [1, None], "c": 0, "b": [None, 2]}


class Listed(list):
    """Stands for an array: a sequence that is no plain list."""


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        ([1.0], "a reward of 5 samples returns 5 entries, got 1"),
        (1.0, "a reward of many samples returns a list, got float: 1.0"),
        ("12345", "got str"),
        (None, "got NoneType"),
        ({1, 2}, "got 2"),
    ],
)
def test_a_list_that_does_not_fit_fails_the_whole_call(returned: object, message: str) -> None:
    function = reward(name="judge", batch=True)(lambda samples: returned)
    for group in function.score_groups(GROUPS):
        for i, score in enumerate(group):
            assert (score.value, score.status) == (None, ScoreStatus.ERROR)
            assert message in score.info["error"] and f"index={i}" in score.info["error"]


def test_a_bad_entry_fails_its_sample_only() -> None:
    function = reward(name="j", batch=True, on_error="zero")(lambda samples: Listed([1, float("nan"), None, True, "x"]))
    scores = [score for group in function.score_groups(GROUPS) for score in group]
    assert [score.value for score in scores] == [1.0, 0.0, None, 1.0, 0.0]
    assert [score.status.value for score in scores] == ["ok", "error", "ok", "ok", "error"]
    assert "must be finite, got nan" in scores[1].info["error"] and "group_id='0', index=1" in scores[1].info["error"]


def test_one_group_that_raises_leaves_the_other() -> None:
    def picky(samples, g) -> list[float]:
        return [1 / value for value in g]

    assert values(reward(group=True)(picky)) == [[None, None], [1.0, 1.0, 1.0]]
    with pytest.raises(ZeroDivisionError) as caught:
        reward(group=True, on_error="raise")(picky).score_groups(GROUPS)
    assert "reward 'picky' failed on the sample with group_id='0', index=0" in caught.value.__notes__[0]


def test_exit_is_an_error_and_not_the_end() -> None:
    score = as_reward(lambda sample: exit(0)).score(SAMPLE)
    assert score.status is ScoreStatus.ERROR and "SystemExit" in score.info["error"]


def test_threads() -> None:
    meeting = threading.Barrier(3, timeout=5)
    function = reward(max_workers=3)(lambda sample: meeting.wait() >= 0)
    assert {score.value for score in function.score_groups([GROUPS[1]])[0]} == {1.0}


async def patient(completion: str) -> float:
    await asyncio.sleep(30 if completion == "11" else 0.1)
    if completion == "12":
        raise RuntimeError("judge is down")
    return 1.0


def test_coroutines_run_at_the_same_time_with_deadlines() -> None:
    started = time.perf_counter()
    scores = reward(timeout_s=0.5)(patient).score_groups([*GROUPS] * 5)
    assert time.perf_counter() - started < 3
    assert [score.status.value for score in scores[1]] == ["ok", "timeout", "error"]
    assert "took longer than 0.5 s" in scores[1][1].info["error"] and "judge is down" in scores[1][2].info["error"]
    assert [score.value for score in scores[8]] == [1.0, 1.0]
    assert 0.09 < scores[0][0].seconds < 2


def test_coroutines_share_a_loop_also_from_a_running_loop() -> None:
    loops = set()

    async def remember(sample: Sample) -> float:
        loops.add(id(asyncio.get_running_loop()))
        return 1.0

    async def training_step() -> float | None:
        return as_reward(remember).score(SAMPLE).value

    assert asyncio.run(training_step()) == as_reward(remember).score(SAMPLE).value == 1.0
    assert len(loops) == 1


def test_at_most_max_workers_coroutines() -> None:
    running: list[int] = [0, 0]

    async def count(sample: Sample) -> float:
        running[0] += 1
        running[1] = max(running)
        await asyncio.sleep(0.01)
        running[0] -= 1
        return 1.0

    reward(max_workers=2)(count).score_groups(GROUPS)
    assert running == [0, 2]


def test_a_coroutine_that_holds_up_the_loop_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rewards.call._LOOP_GRACE_S", 0.1)

    async def rude(sample: Sample) -> float:
        time.sleep(1.0)
        return 1.0

    score = reward(timeout_s=0.1)(rude).score(SAMPLE)
    assert score.status is ScoreStatus.TIMEOUT and "held up" in score.info["error"]

    async def polite(sample: Sample) -> float:
        return 1.0

    assert reward(timeout_s=0.5)(polite).score(SAMPLE).value == 1.0


ISOLATED = """
import time, os
from rewards import Sample, Score, reward

@reward(timeout_s=0.5, max_workers=2, name="shown", weight=0.3)
def exact(completion: str, answer: str, **row):
    if completion == "hang":
        while True:
            pass
    if completion == "die":
        os._exit(1)
    if completion == "raise":
        raise ValueError("my own")
    return Score(value=completion == answer, info={"pid": os.getpid()})

@reward(timeout_s=5, group=True)
def longest(samples):
    return [len(sample.completion) for sample in samples]

@reward(timeout_s=0.5, isolate=True)
async def rude(sample: Sample):
    time.sleep(60)
"""


@pytest.fixture
def isolated(tmp_path: Path) -> Path:
    path = tmp_path / "mine.py"
    path.write_text(ISOLATED)
    return path


def test_isolated_rewards(isolated: Path) -> None:
    exact = load_reward(f"{isolated}:exact")
    texts = ["4", "hang", "5", "die", "raise", "4"]
    started = time.perf_counter()
    (scores,) = exact.score_groups([[Sample(prompt="", completion=text, row={"answer": "4"}) for text in texts]])
    assert time.perf_counter() - started < 5
    assert [score.value for score in scores] == [1.0, None, 0.0, None, None, 1.0]
    assert [score.status.value for score in scores] == ["ok", "timeout", "ok", "error", "error", "ok"]
    assert scores[0].info["pid"] != scores[1].info
    assert "took longer than 0.5 s; the worker was killed" in scores[1].info["error"]
    assert "the worker died" in scores[3].info["error"] and "ValueError: my own" in scores[4].info["error"]
    assert load_reward(f"{isolated}:longest").score_groups([[*GROUPS[0]]])[0][1].value == 2.0
    assert load_reward(f"{isolated}:rude").score(SAMPLE).status is ScoreStatus.TIMEOUT


def test_isolated_failures_can_raise(isolated: Path) -> None:
    isolated.write_text(ISOLATED.replace("timeout_s=0.5,", "timeout_s=0.5, on_error='raise',"))
    exact = load_reward(f"{isolated}:exact")
    for text, kind, message in (("hang", TimeoutError, "killed"), ("raise", RuntimeError, "my own")):
        with pytest.raises(kind, match=message):
            exact.score(Sample(prompt="", completion=text, row={"answer": "4"}))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"timeout_s": 5}, "is a lambda and cannot be sent to a worker process; define it .*, or leave out timeout_s"),
        ({"timeout_s": 0}, "timeout_s of reward 'f' must be > 0, got 0"),
        ({"isolate": True}, "isolate=True without a deadline; pass timeout_s"),
        ({"timeout_s": 5, "isolate": False}, "needs a process that can be killed; leave out isolate=False"),
        ({"batch": True, "group": True}, "both batch=True and group=True"),
        ({"batch_size": 4}, "batch_size of reward 'f' needs batch=True"),
        ({"max_workers": 0}, "max_workers of reward 'f' must be >= 1, got 0"),
        ({"memory_limit_mib": 100}, "needs isolation"),
        ({"batch": True}, "takes 'sample', but a batch or group takes 'samples'"),
    ],
)
def test_settings_that_contradict_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        reward(name="f", **settings)(lambda sample: 1.0)
