"""What is logged of a step's completions: means over the batch, and rows that a person can read."""

import resource
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from grpo.samples import Decode
from rewards import Score, failure_shares, reward_seconds
from rollout.sample import CompletionGroup, FinishReason

Notes = Sequence[tuple[dict[str, Any], Sequence[dict[str, Any]]]]
"""What the row of each group says beside the rest, and that of each of its completions."""
_RSS_UNITS_PER_GIB = 2**30 if sys.platform == "darwin" else 2**20  # bytes there, KiB elsewhere


def no_notes(groups: Sequence[CompletionGroup]) -> Notes:
    return [({}, [{} for _ in group.completions]) for group in groups]


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


def memory_metrics() -> dict[str, float]:
    """GiB: the most that this process has ever held; with CUDA, the most its tensors took since the last call."""
    metrics = {"memory/peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / _RSS_UNITS_PER_GIB}
    if torch.cuda.is_initialized():
        metrics["memory/gpu_peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
        torch.cuda.reset_peak_memory_stats()
    return metrics


def group_rows(
    step: int, groups: Sequence[CompletionGroup], scores: Sequence[Sequence[Score]], decode: Decode, notes: Notes
) -> Iterator[dict[str, Any]]:
    """One row per group: the prompt, and each completion's text, reward, metrics, details and finish reason; and the
    notes."""
    for group, group_scores, (of_group, of_completions) in zip(groups, scores, notes, strict=True):
        texts = decode([completion.token_ids for completion in group.completions])
        completions = [
            {
                "text": text,
                "reward": score.value,
                "status": score.status,
                "metrics": dict(score.metrics),
                "info": dict(score.info),
                "finish_reason": completion.finish_reason,
                "policy_version": completion.oldest_version,
                "num_tokens": len(completion.token_ids),
                **note,
            }
            for text, completion, score, note in zip(
                texts, group.completions, group_scores, of_completions, strict=True
            )
        ]
        row = {"step": step, "prompt_id": group.prompt.id, "prompt": group.prompt.text, "completions": completions}
        yield row | of_group


class Clock:
    """Adds the wall time of a `with` block to `seconds[name]`."""

    def __init__(self, seconds: dict[str, float], name: str) -> None:
        self._seconds, self._name = seconds, name

    def __enter__(self) -> None:
        self._start = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self._seconds[self._name] = self._seconds.get(self._name, 0.0) + time.perf_counter() - self._start
