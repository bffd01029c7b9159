"""Measures of length, to be logged with weight 0: thinking must pay by the answer, not by itself.

Usage: `thinking_length.score(Sample(prompt="", completion="<think> 3 7 </think> ...")).value == 2.0`.
"""

from rewards.base import Sample, reward


@reward(weight=0.0)
def thinking_length(sample: Sample) -> float:
    """Words between `<think>` and `</think>`; to the end of the completion where the thinking is not closed."""
    text = ("<think>" if sample.think_prefilled else "") + sample.completion
    return float(len(text.partition("<think>")[2].partition("</think>")[0].split()))
