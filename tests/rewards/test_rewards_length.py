"""Thinking length: words between the think tags, logged with weight 0."""

import pytest

from rewards import Sample, thinking_length


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
