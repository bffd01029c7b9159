"""From completion groups and their scores to training samples, and what was dropped on the way.

samples, counts = build_samples(groups, scores, temperature=1.0, scale="std", version=3)
"""

from collections.abc import Callable, Sequence

from grpo.advantages import AdvantageScale, group_advantages
from grpo.batch import TrainingSample
from rewards import Rubric, Sample, Score
from rollout.sample import ENVIRONMENT, CompletionGroup, FinishReason

Decode = Callable[[Sequence[Sequence[int]]], list[str]]
"""Token ids of several completions -> their texts."""


def reward_samples(groups: Sequence[CompletionGroup], decode: Decode, step: int) -> list[list[Sample]]:
    """What the rewards see of each completion: all of its text, what an environment wrote in it included. Text that the
    prompt forced on the model counts as the model's.
    """
    texts = iter(decode([completion.token_ids for group in groups for completion in group.completions]))
    return [
        [
            Sample(
                prompt=group.prompt.text.removesuffix(group.prompt.prefill),
                completion=group.prompt.prefill + next(texts),
                completion_ids=tuple(completion.token_ids),
                observations=tuple(decode(completion.observations)),
                finish_reason=completion.finish_reason.value,
                row=group.prompt.row,
                group_id=group.prompt.id,
                index=index,
                step=step,
            )
            for index, completion in enumerate(group.completions)
        ]
        for group in groups
    ]


def score_groups(groups: Sequence[CompletionGroup], rubric: Rubric, decode: Decode, step: int) -> list[list[Score]]:
    """One score per completion, in the groups' order."""
    return rubric.score_groups(reward_samples(groups, decode, step))


def build_samples(
    groups: Sequence[CompletionGroup],
    scores: Sequence[Sequence[Score]],
    *,
    temperature: float,
    scale: AdvantageScale,
    version: int,
) -> tuple[list[TrainingSample], dict[str, float]]:
    """Advantages per group, then one sample per completion that has one.

    Completions that failed, were not scored, or are the only scored one of their group are left out; the counts say how
    many, as shares of all completions, and how many groups have rewards without spread and therefore teach nothing.
    `version` is that of the weights that the step begins with. What an environment wrote is not trained.
    """
    samples: list[TrainingSample] = []
    failed = unscored = flat_groups = 0
    for group, group_scores in zip(groups, scores, strict=True):
        usable = [completion.finish_reason is not FinishReason.ERROR for completion in group.completions]
        rewards = [score.value if ok else None for score, ok in zip(group_scores, usable, strict=True)]
        advantages = group_advantages(rewards, scale=scale)
        failed += usable.count(False)
        unscored += sum(ok and advantage is None for ok, advantage in zip(usable, advantages, strict=True))
        flat_groups += not any(advantages)
        prompt_ids = group.prompt.token_ids
        for completion, advantage in zip(group.completions, advantages, strict=True):
            if advantage is None:
                continue
            lags = [0 if sampler == ENVIRONMENT else version - sampler for sampler in completion.versions]
            samples.append(
                TrainingSample(
                    token_ids=[*prompt_ids, *completion.token_ids],
                    loss_mask=[False] * len(prompt_ids) + [v != ENVIRONMENT for v in completion.versions],
                    sampling_logprobs=[0.0] * len(prompt_ids) + completion.logprobs,
                    advantage=advantage,
                    temperature=temperature,
                    expert_ids=completion.expert_ids,
                    policy_lags=[0] * len(prompt_ids) + lags,
                )
            )
    total = sum(len(group.completions) for group in groups)
    counts = {
        "samples/failed": failed / max(1, total),
        "samples/unscored": unscored / max(1, total),
        "groups/without_spread": flat_groups / max(1, len(groups)),
    }
    return samples, counts
