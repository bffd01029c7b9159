"""What `groups.jsonl` says of advantages, of the single tokens of a step's first groups, and of experts: notes that
a viewer may color completions by.

    trainer = GRPOTrainer(..., inspect=TokenReport.for_run(learner, decode, num_groups=4))
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from grpo.batch import TrainingSample
from grpo.learner import Learner
from grpo.learner_group import LearnerGroup
from grpo.samples import Decode
from grpo.step_report import Notes
from grpo.trainer import Inspect
from rollout.router_replay import is_recorded
from rollout.sample import CompletionGroup


class TokenReport:
    """Of one step: which sample each completion became, and the learner's log-probabilities before the update."""

    def __init__(
        self,
        learner: Learner | LearnerGroup,
        decode: Decode,
        groups: Sequence[CompletionGroup],
        samples: Sequence[TrainingSample],
        num_groups: int,
    ) -> None:
        """Takes two forward passes over the samples of the first `num_groups` groups, the second in `notes`."""
        self._learner, self._decode, self._groups = learner, decode, groups
        self._samples = matched(groups, samples)
        self._watched = {place: sample for place, sample in self._samples.items() if place[0] < num_groups}
        self._before = self._logprobs()

    @classmethod
    def for_run(cls, learner: Learner | LearnerGroup, decode: Decode, num_groups: int) -> Inspect:
        """What a trainer calls before each update whose groups are logged."""
        return lambda groups, samples: cls(learner, decode, groups, samples, num_groups).notes

    def notes(self) -> Notes:
        """To be called after the update. A group gets `experts`, see `expert_load`, where the engine recorded them; a
        completion `advantage`, None where nothing was learned from it or its tokens differ in it; one of the first
        groups' also `tokens`, see `_of_tokens`."""
        after = self._logprobs()
        num_experts = getattr(self._learner.model.config, "n_routed_experts", 0)
        notes = []
        for at, group in enumerate(self._groups):
            load = expert_load(group, num_experts)
            of_completions = []
            for index in range(len(group.completions)):
                sample = self._samples.get((at, index))
                is_one = sample is not None and sample.token_advantages is None
                note: dict[str, Any] = {"advantage": sample.advantage if sample is not None and is_one else None}
                if sample is not None and (at, index) in self._watched:
                    note["tokens"] = self._of_tokens(sample, self._before[at, index], after[at, index])
                of_completions.append(note)
            notes.append(({"experts": load} if load else {}, of_completions))
        return notes

    def _logprobs(self) -> dict[tuple[int, int], list[float]]:
        logprobs = self._learner.logprobs_of(list(self._watched.values())) if self._watched else []
        return dict(zip(self._watched, logprobs, strict=True))

    def _of_tokens(self, sample: TrainingSample, before: list[float], after: list[float]) -> dict[str, list[Any]]:
        """Lists over a completion's tokens: `text`; and to four digits, None for what an environment wrote, `logprob`,
        the engine's; `difference`, what the learner's was beyond it before the update; `ratio`, of the learner's
        probability after the update to the engine's; `advantage`, where tokens differ in it."""
        start = sample.loss_mask.index(True)  # the policy writes the first token of every completion
        sampled = np.array(sample.sampling_logprobs[start:])
        numbers = {
            "logprob": sampled,
            "difference": np.array(before[start:]) - sampled,
            "ratio": np.exp(np.array(after[start:]) - sampled),
        }
        if sample.token_advantages is not None:
            numbers["advantage"] = np.array(sample.token_advantages[start:])
        return {"text": token_texts(sample.token_ids[start:], self._decode)} | {
            name: [
                float(f"{value:.4g}") if is_trained else None
                for value, is_trained in zip(values, sample.loss_mask[start:], strict=True)
            ]
            for name, values in numbers.items()
        }


def matched(
    groups: Sequence[CompletionGroup], samples: Sequence[TrainingSample]
) -> dict[tuple[int, int], TrainingSample]:
    """(group, completion) -> the sample made of it. Samples stand in the order of their completions, of which some have
    none; equal tokens next to each other are not told apart."""
    found: dict[tuple[int, int], TrainingSample] = {}
    for at, group in enumerate(groups):
        for index, completion in enumerate(group.completions):
            ids, place = [*group.prompt.token_ids, *completion.token_ids], len(found)
            if place < len(samples) and list(samples[place].token_ids) == ids:
                found[at, index] = samples[place]
    return found


def token_texts(ids: Sequence[int], decode: Decode) -> list[str]:
    """The text that each token adds; "" for one that ends within a character, which a later one then adds whole."""
    texts, start, seen = [], 0, 0
    for end in range(1, len(ids) + 1):
        before, now = decode([ids[start:seen], ids[start:end]])
        is_cut = now.endswith("\ufffd") and end < len(ids)
        texts.append("" if is_cut else now[len(before) :])
        if not is_cut:
            start, seen = seen, end
    return texts


def expert_load(group: CompletionGroup, num_experts: int) -> list[list[int]]:
    """[layers with experts, E] how often a token of the group went to each expert, as the engine recorded it; the
    prompt counts with each completion. [] without a recording."""
    recorded = [completion.expert_ids for completion in group.completions if completion.expert_ids is not None]
    load = []
    for layer in range(recorded[0].shape[1] if recorded else 0):
        ids = np.concatenate([ids[:, layer][is_recorded(ids)[:, layer]].ravel() for ids in recorded])
        load.append(np.bincount(ids, minlength=num_experts).tolist())
    return load
