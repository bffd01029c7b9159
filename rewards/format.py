"""Rewards for the form of a completion; they do not look at whether the answer is right.

Covered: tags that are missing, repeated, out of order or with text around them; prompts that already open `<think>`;
thinking without a word, where that is asked for.
Not covered: what else stands between the tags; tags that decoding drops as special tokens.

Usage: `r1_format.score(Sample(prompt="...", completion="<think>2+2</think> <answer>4</answer>")).value == 1.0`.
"""

from functools import partial

from rewards.base import RewardFunction, Sample, Score, reward

_TAGS = ("<think>", "</think>", "<answer>", "</answer>")
_OPEN_R1_TAGS = ("<think>\n", "\n</think>\n", "\n<answer>\n", "\n</answer>")


def tagged_format(*, name: str = "r1_format", weight: float = 1.0, allow_empty_thinking: bool = True) -> RewardFunction:
    """Make a reward that is 1 where the completion is one `<think>..</think>`, then one `<answer>..</answer>` and
    nothing else, and 0 else: the template of DeepSeek-R1-Zero (table 1, arXiv:2501.12948).

    `allow_empty_thinking=False` asks for a letter or digit between the think tags. Where the prompt ends in `<think>`,
    the completion must not repeat it.
    """
    return reward(name=name, weight=weight)(partial(_score_format, allow_empty_thinking=allow_empty_thinking))


def _score_format(sample: Sample, allow_empty_thinking: bool) -> Score:
    text = ("<think>" if sample.think_prefilled else "") + sample.completion
    problem = _format_problem(text.strip())
    if not problem and not allow_empty_thinking and not any(map(str.isalnum, sample.thinking)):
        problem = "the thinking is empty"
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


r1_format = tagged_format()
r1_format_thinking = tagged_format(name="r1_format_thinking", allow_empty_thinking=False)


@reward
def tag_count(sample: Sample) -> float:
    r"""0.25 for each of `<think>\n`, `\n</think>\n`, `\n<answer>\n`, `\n</answer>` that occurs exactly once: open-r1's
    `tag_count_reward`, a softer form of the format reward. A prompt that opens `<think>` counts with what follows it.
    """
    opened = sample.prompt[sample.prompt.rindex("<think>") :] if sample.think_prefilled else ""
    text = opened + sample.completion
    return sum(0.25 for tag in _OPEN_R1_TAGS if text.count(tag) == 1)
