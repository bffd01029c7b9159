"""Pins the R1 format reward: all or nothing, each tag once, in order, with nothing around; and the softer tag count."""

import pytest

from rewards import Sample, r1_format, r1_format_thinking, tag_count

GOOD = "<think>2+2</think> <answer>4</answer>"


@pytest.mark.parametrize(
    ("completion", "reason"),
    [
        (GOOD, "ok"),
        (f"\n {GOOD}\n", "ok"),
        ("<think>\na\n\nb\n</think>\n<answer>\n4\n</answer>", "ok"),
        ("<think>a < b > c</think><answer>x</answer>", "ok"),
        ("", "<think> occurs 0 times, not once"),
        ("4", "<think> occurs 0 times, not once"),
        ("<answer>4</answer>", "<think> occurs 0 times, not once"),
        ("<think>2+2 <answer>4</answer>", "</think> occurs 0 times, not once"),
        ("<think>2+2</think> 4", "<answer> occurs 0 times, not once"),
        ("<think>2+2</think> <answer>4", "</answer> occurs 0 times, not once"),
        ("<Think>2+2</Think> <answer>4</answer>", "<think> occurs 0 times, not once"),
        (GOOD * 2, "<think> occurs 2 times, not once"),
        ("<think>1<think>2</think> <answer>4</answer>", "<think> occurs 2 times, not once"),
        (f"{GOOD} <answer>5</answer>", "<answer> occurs 2 times, not once"),
        ("<think>a</think> <answer>4</answer></answer>", "</answer> occurs 2 times, not once"),
        ("<answer>4</answer> <think>a</think>", "the tags are not in the order <think> </think> <answer> </answer>"),
        ("<think>a <answer>4</answer></think>", "the tags are not in the order <think> </think> <answer> </answer>"),
        ("</think>a<think><answer>4</answer>", "the tags are not in the order <think> </think> <answer> </answer>"),
        (f"Sure! {GOOD}", "there is text before <think>"),
        ("<think>a</think> so <answer>4</answer>", "there is text between </think> and <answer>"),
        (f"{GOOD}\ntext", "there is text after </answer>"),
        (f"{GOOD}\x00", "there is text after </answer>"),
    ],
)
def test_format(completion: str, reason: str) -> None:
    score = r1_format.score(Sample(prompt="2+2?", completion=completion))
    assert (score.value, score.info["reason"]) == (float(reason == "ok"), reason)


@pytest.mark.parametrize(
    ("completion", "value"),
    [
        ("2+2</think> <answer>4</answer>", 1.0),
        (GOOD, 0.0),
        ("2+2 <answer>4</answer>", 0.0),
    ],
)
def test_prompt_that_opens_the_thinking(completion: str, value: float) -> None:
    assert r1_format.score(Sample(prompt="2+2? Assistant: <think>\n", completion=completion)).value == value


def test_long_text_costs_linear_time() -> None:
    for piece in ["<think>", "<think></think><answer></answer>", "<", " "]:
        assert r1_format.score(Sample(prompt="", completion=piece * (200_000 // len(piece)))).value == 0.0


@pytest.mark.parametrize(
    ("prompt", "completion", "value"),
    [
        ("", GOOD, 1.0),
        ("", "<think></think> <answer>4</answer>", 0.0),
        ("", "<think> .\n- </think> <answer>4</answer>", 0.0),
        ("A: <think>", "</think> <answer>4</answer>", 0.0),
        ("A: <think>", "2</think> <answer>4</answer>", 1.0),
        ("", "2+2", 0.0),
    ],
)
def test_empty_thinking_can_be_refused(prompt: str, completion: str, value: float) -> None:
    sample = Sample(prompt=prompt, completion=completion)
    assert r1_format_thinking.score(sample).value == value
    if "</think> <answer>" in completion:
        assert r1_format.score(sample).value == 1.0


@pytest.mark.parametrize(
    ("prompt", "completion", "value"),
    [
        ("", "<think>\na\n</think>\n<answer>\n4\n</answer>", 1.0),
        ("", "<think>a</think><answer>4</answer>", 0.0),
        ("", "<think>\na\n</think>\n4", 0.5),
        ("", "<think>\n<think>\na\n</think>\n<answer>\n4\n</answer>", 0.75),
        ("", "\n</answer> text", 0.25),
        ("", "", 0.0),
        ("Assistant: <think>\n", "a\n</think>\n<answer>\n4\n</answer>", 1.0),
        ("Assistant: <think>", "\na\n</think>\n<answer>\n4\n</answer>", 1.0),
        ("Assistant: <think>\n", "<think>\na\n</think>\n<answer>\n4\n</answer>", 0.75),
    ],
)
def test_tag_count(prompt: str, completion: str, value: float) -> None:
    assert tag_count.score(Sample(prompt=prompt, completion=completion)).value == value
