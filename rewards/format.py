"""Rewards for the form of a completion; they do not look at whether the answer is right.

Covered: tags that are missing, repeated, out of order or with text around them; prompts that already open `<think>`.
Not covered: what stands between the tags (an empty thinking part passes); tags that decoding drops as special tokens.

Usage: `r1_format.score(Sample(prompt="...", completion="<think>2+2</think> <answer>4</answer>")).value == 1.0`.
"""

from rewards.base import Sample, Score, reward

_TAGS = ("<think>", "</think>", "<answer>", "</answer>")


@reward
def r1_format(sample: Sample) -> Score:
    """1 where the completion is one `<think>..</think>`, then one `<answer>..</answer>` and nothing else; 0 else."""
    text = ("<think>" if sample.think_prefilled else "") + sample.completion
    problem = _format_problem(text.strip())
    return Score(value=float(not problem), info={"reason": problem or "ok"})


def _format_problem(text: str) -> str:
    """Say what is wrong with the form of `text`; empty where nothing is."""
    for tag in _TAGS:
        if (count := text.count(tag)) != 1:
            return f"{tag} occurs {count} times, not once"
    positions = [text.index(tag) for tag in _TAGS]
    if positions != sorted(positions):
        return "the tags are not in the order " + " ".join(_TAGS)
    if not text.startswith("<think>"):
        return "there is text before <think>"
    if text[positions[1] + len("</think>") : positions[2]].strip():
        return "there is text between </think> and <answer>"
    if not text.endswith("</answer>"):
        return "there is text after </answer>"
    return ""
