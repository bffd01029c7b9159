"""What is logged of a step's completions: means over the batch, and rows that a person can read."""

from collections.abc import Iterator, Sequence
from typing import Any

from grpo.samples import Decode
from rewards import Score, failure_shares, reward_seconds
from rollout.sample import CompletionGroup, FinishReason


def batch_metrics(groups: Sequence[CompletionGroup], scores: Sequence[Sequence[Score]]) -> dict[str, float]:
    """Means over a batch: reward, each reward function's own value, metrics and failures, lengths, finish reasons.

    Completions that the engine could not finish take no part in the rewards' means.
    """
    completions = [completion for group in groups for completion in group.completions]
    scored = zip(completions, (score for of_group in scores for score in of_group), strict=True)
    flat = [score for completion, score in scored if completion.finish_reason is not FinishReason.ERROR]
    values = [score.value for score in flat if score.value is not None]
    named: dict[str, list[float]] = {}
    for score in flat:
        for name, value in score.metrics.items():
            named.setdefault(f"reward/{name}", []).append(value)
    truncated = sum(completion.finish_reason is FinishReason.LENGTH for completion in completions)
    return {
        **({"reward/mean": sum(values) / len(values)} if values else {}),
        **{name: sum(of_name) / len(of_name) for name, of_name in named.items()},
        **{f"reward/{name}": share for name, share in failure_shares(flat).items()},
        **{f"seconds/reward/{name}": seconds for name, seconds in reward_seconds(flat).items()},
        "reward/errors": sum(score.status.is_failure() for score in flat) / max(1, len(flat)),
        "completion/tokens": sum(len(completion.token_ids) for completion in completions) / len(completions),
        "completion/truncated": truncated / len(completions),
    }


def group_rows(
    step: int, groups: Sequence[CompletionGroup], scores: Sequence[Sequence[Score]], decode: Decode
) -> Iterator[dict[str, Any]]:
    """One row per group: the prompt, and each completion's text, reward, metrics, details and finish reason."""
    for group, group_scores in zip(groups, scores, strict=True):
        texts = decode([completion.token_ids for completion in group.completions])
        completions = [
            {
                "text": text,
                "reward": score.value,
                "metrics": dict(score.metrics),
                "info": dict(score.info),
                "finish_reason": completion.finish_reason,
                "policy_version": completion.oldest_version,
            }
            for text, completion, score in zip(texts, group.completions, group_scores, strict=True)
        ]
        yield {"step": step, "prompt_id": group.prompt.id, "prompt": group.prompt.text, "completions": completions}
