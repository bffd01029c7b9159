"""From completion groups and their scores to training samples, and what was dropped on the way.

samples, counts = build_samples(groups, scores, AdvantageConfig(), temperature=1.0, version=3)
"""

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from grpo.advantages import AdvantageConfig, Step, batch_advantages, process_advantages
from grpo.batch import TrainingSample
from rewards import Rubric, Sample, Score
from rollout.sample import ENVIRONMENT, Completion, CompletionGroup, FinishReason, Prompt

Decode = Callable[[Sequence[Sequence[int]]], list[str]]
"""Token ids of several completions -> their texts."""
Penalize = Callable[[Sequence[TrainingSample]], list[float]]
"""What the reward of each sample loses, see `Learner.kl_in_reward`."""
Drafts = Sequence[Sequence[TrainingSample | None]]
"""[P, G] samples whose advantage is not known yet; None where the engine failed."""
Taught = list[list[TrainingSample | None]]
"""[P, G] with their advantages; None also where there is no advantage."""


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
    advantages: AdvantageConfig,
    *,
    temperature: float,
    version: int,
    decode: Decode | None = None,
    train_truncated: bool = True,
    penalize: Penalize | None = None,
) -> tuple[list[TrainingSample], dict[str, float]]:
    """Advantages, then one sample per completion that has one.

    Completions that failed, were not scored, or are the only scored one of their group are left out; the counts say how
    many, as shares of all completions, and how many groups have rewards without spread and therefore teach nothing.
    Without `train_truncated`, completions that reached the token limit count in the baseline of their group and are
    left out then (overlong filtering, arXiv:2503.14476), so they are in no denominator of the loss.

    `version` is that of the weights that the step begins with. What an environment wrote is not trained. `decode` is
    needed for process supervision, where steps end at characters and advantages at tokens.
    """
    drafts_P_G = [
        [
            None if completion.finish_reason is FinishReason.ERROR
            else _draft(group.prompt, completion, temperature, version)
            for completion in group.completions
        ]
        for group in groups
    ]  # fmt: skip
    if advantages.supervision == "process":
        assert decode is not None, "steps end at characters, to find their tokens takes decode"
        taught_P_G = _process(groups, scores, drafts_P_G, advantages, decode)
    else:
        taught_P_G = _outcome(scores, drafts_P_G, advantages, penalize)
    samples: list[TrainingSample] = []
    failed = unscored = truncated = flat_groups = 0
    for group, drafts, taught in zip(groups, drafts_P_G, taught_P_G, strict=True):
        flat_groups += not any(any(s.token_advantages or [s.advantage]) for s in taught if s is not None)
        for completion, draft, sample in zip(group.completions, drafts, taught, strict=True):
            if draft is None:
                failed += 1
            elif sample is None:
                unscored += 1
            elif completion.finish_reason is FinishReason.LENGTH and not train_truncated:
                truncated += 1
            else:
                samples.append(sample)
    total = max(1, sum(len(group.completions) for group in groups))
    counts = {
        "samples/failed": failed / total,
        "samples/unscored": unscored / total,
        "samples/truncated": truncated / total,
        "groups/without_spread": flat_groups / max(1, len(groups)),
    }
    return samples, counts


def _outcome(
    scores: Sequence[Sequence[Score]], drafts_P_G: Drafts, config: AdvantageConfig, penalize: Penalize | None
) -> Taught:
    usable = [draft for drafts in drafts_P_G for draft in drafts if draft is not None]
    penalties = iter(penalize(usable) if penalize else [0.0] * len(usable))
    rewards_P_G: list[list[float | None]] = []
    for group_scores, drafts in zip(scores, drafts_P_G, strict=True):
        taken_off = [None if draft is None else next(penalties) for draft in drafts]
        pairs = zip(group_scores, taken_off, strict=True)
        rewards_P_G.append([None if s.value is None or off is None else s.value - off for s, off in pairs])
    return [
        [
            None if draft is None or advantage is None else replace(draft, advantage=advantage)
            for draft, advantage in zip(drafts, of_group, strict=True)
        ]
        for drafts, of_group in zip(drafts_P_G, batch_advantages(rewards_P_G, config), strict=True)
    ]


def _process(
    groups: Sequence[CompletionGroup],
    scores: Sequence[Sequence[Score]],
    drafts_P_G: Drafts,
    config: AdvantageConfig,
    decode: Decode,
) -> Taught:
    taught_P_G: Taught = []
    for group, group_scores, drafts in zip(groups, scores, drafts_P_G, strict=True):
        steps_G = [
            None if draft is None or score.value is None else _token_steps(group.prompt, completion, score, decode)
            for completion, score, draft in zip(group.completions, group_scores, drafts, strict=True)
        ]
        lengths_G = [len(completion.token_ids) for completion in group.completions]
        of_group = process_advantages(steps_G, lengths_G, scale="std" if config.scale == "std" else "none")
        of_prompt = [0.0] * len(group.prompt.token_ids)
        taught_P_G.append(
            [
                None if draft is None or advantages is None
                else replace(draft, token_advantages=of_prompt + advantages)
                for draft, advantages in zip(drafts, of_group, strict=True)
            ]
        )  # fmt: skip
    return taught_P_G


def _token_steps(prompt: Prompt, completion: Completion, score: Score, decode: Decode) -> list[Step]:
    """A step ends with the first token that completes its text."""
    ids, before = completion.token_ids, len(prompt.prefill)

    def num_characters(num_tokens: int) -> int:
        return before + len(decode([ids[:num_tokens]])[0])

    ends = [bisect_left(range(len(ids)), end, key=num_characters) for end, _ in score.steps]
    return [(end, reward) for end, (_, reward) in zip(ends, score.steps, strict=True)]


def _draft(prompt: Prompt, completion: Completion, temperature: float, version: int) -> TrainingSample:
    """A sample whose advantage is not known yet."""
    of_prompt, kept = len(prompt.token_ids), completion.kept_ids
    lags = [0 if sampler == ENVIRONMENT else version - sampler for sampler in completion.versions]
    return TrainingSample(
        token_ids=[*prompt.token_ids, *completion.token_ids],
        loss_mask=[False] * of_prompt + [v != ENVIRONMENT for v in completion.versions],
        sampling_logprobs=[0.0] * of_prompt + completion.logprobs,
        temperature=temperature,
        expert_ids=completion.expert_ids,
        policy_lags=[0] * of_prompt + lags,
        kept_ids=None if kept is None else np.concatenate(kept),
        kept_counts=None if kept is None else [0] * of_prompt + [len(ids) for ids in kept],
    )
