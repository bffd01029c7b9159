"""The filters of rejection sampling, each on cases made by hand, and the choice among what is left."""

from dataclasses import replace
from typing import Any

import pytest

from pipelines.overlap import EvaluationText, Overlap
from pipelines.selection import SelectConfig, select
from pipelines.traces import Source, Trace

SOURCE = Source(model="m", weights="0", temperature=1.0, max_tokens=9, seed=0)
GOOD = Trace(
    id="a/0", prompt_id="a", task="t", template="r1", question="q", prompt="p", completion=" the sum is 4 ",
    finish_reason="stop", tokens=5, reward=1.1, metrics={"exact": 1.0}, source=SOURCE,
)  # fmt: skip


def reason(config: SelectConfig, **changes: Any) -> str | None:
    """Why a trace that differs from a good one is left out; the good one itself must be kept."""
    assert not select([GOOD], config, accuracy="exact", seed=0).reasons
    return select([replace(GOOD, **changes)], config, accuracy="exact", seed=0).reasons.get("a/0")


@pytest.mark.parametrize(
    ("settings", "changes", "expected"),
    [
        ({}, {"finish_reason": "error"}, "failed"),
        ({}, {"finish_reason": "length"}, "truncated"),
        ({"truncated": True}, {"finish_reason": "length"}, None),
        ({}, {"metrics": {}}, "unscored"),
        ({}, {"metrics": {"exact": 0.99}}, "wrong"),
        ({"correct": False}, {"metrics": {"exact": 0.0}}, None),
        ({"min_reward": 1.1}, {"reward": 1.0}, "low_reward"),
        ({"min_reward": 1.1}, {"reward": None}, "low_reward"),
        ({"min_tokens": 5}, {"tokens": 4}, "short"),
        ({"max_tokens": 5}, {"tokens": 6}, "long"),
        ({"code_blocks": False}, {"completion": "so\n```python\nx\n```"}, "code_block"),
        ({}, {"completion": "so\n```python\nx\n```"}, None),
        ({"max_paragraph": 20}, {"completion": "a" * 21 + "\n\nb"}, "long_paragraph"),
        ({"max_paragraph": 20}, {"completion": "a" * 20 + "\n  \n" + "b" * 20}, None),
        ({"language": "en"}, {"completion": "the sum \u7b54\u6848\u662f 4"}, "language"),
        ({"language": "en", "min_language": 0.4}, {"completion": "the sum \u7b54\u6848\u662f 4"}, None),
        ({"language": "en"}, {"completion": "2 + 2 = 4"}, None),
        ({"max_repetition": 0.3}, {"completion": "wait let me see " * 9}, "repetition"),
        ({}, {"completion": "wait let me see " * 9}, None),
    ],
)
def test_every_filter(settings: dict[str, Any], changes: dict[str, Any], expected: str | None) -> None:
    assert reason(SelectConfig(**settings), **changes) == expected


def numbered(*traces: Trace) -> list[Trace]:
    return [replace(trace, id=f"{trace.prompt_id}/{i}") for i, trace in enumerate(traces)]


def test_repeated_completions_of_one_prompt() -> None:
    texts = ("x = -2", "x = 2", "X =  2\n", "x = 2", "x=-2 ")
    traces = numbered(*(replace(GOOD, completion=text) for text in texts))
    traces += [replace(GOOD, id="b/0", prompt_id="b", completion="x = 2")]
    selection = select(traces, SelectConfig(), accuracy="exact", seed=0)
    assert selection.reasons == {"a/2": "near_duplicate", "a/3": "duplicate", "a/4": "near_duplicate"}
    assert [trace.id for trace in selection.kept] == ["a/0", "a/1", "b/0"]


def test_what_an_evaluation_set_holds_is_left_out() -> None:
    overlap = Overlap([EvaluationText(where="e, line 1", text="What is 2 + 2?")], ngram=5)
    traces = numbered(
        replace(GOOD, question="what is 2+2"),
        replace(GOOD, completion="what is 2 2 asked a friend"),
        replace(GOOD, completion="as he said: what is 2 + 2? 4"),
        replace(GOOD, completion="what is 2"),
    )
    overlap4 = Overlap([EvaluationText(where="e, line 1", text="So tell me: what is 2 + 2?")], ngram=4)
    assert select(traces, SelectConfig(), accuracy="exact", seed=0, overlap=overlap).reasons == {"a/0": "contaminated"}
    selection = select(traces, SelectConfig(), accuracy="exact", seed=0, overlap=overlap4)
    assert selection.reasons == dict.fromkeys(("a/1", "a/2"), "contaminated") | {"a/0": "contaminated"}
    assert selection.matches["a/2"].where == "e, line 1" and selection.matches["a/2"].passage == "what is 2 2"


LENGTHS, REWARDS = (7, 3, 9, 3, 5), (1.0, 1.1, 0.5, 1.1, 1.2)
MANY = numbered(
    *(
        replace(GOOD, completion=str(i), tokens=n, reward=r)
        for i, (n, r) in enumerate(zip(LENGTHS, REWARDS, strict=True))
    )
)


@pytest.mark.parametrize(
    ("choice", "expected"), [("first", "01"), ("shortest", "13"), ("longest", "02"), ("best", "14")]
)
def test_the_choice_of_a_few(choice: Any, expected: str) -> None:
    selection = select(MANY, SelectConfig(per_prompt=2, choice=choice), accuracy="exact", seed=0)
    assert "".join(trace.completion for trace in selection.kept) == expected
    assert set(selection.reasons.values()) == {"not_chosen"} and len(selection.reasons) == 3


def test_a_random_choice_depends_on_seed_and_prompt_alone() -> None:
    config = SelectConfig(per_prompt=2, choice="random")
    alone = [select(MANY, config, accuracy="exact", seed=seed).kept for seed in range(30)]
    before = replace(GOOD, id="0/0", prompt_id="0")
    assert select([before, *MANY], config, accuracy="exact", seed=4).kept[1:] == alone[4]
    assert len({tuple(trace.id for trace in kept) for kept in alone}) > 5


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"per_prompt": -1}, "per_prompt must be >= 0, got -1"),
        ({"max_repetition": 1.5}, "shares from 0 to 1"),
        ({"language": "xx"}, "language must be one of"),
    ],
)
def test_wrong_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SelectConfig(**settings)
