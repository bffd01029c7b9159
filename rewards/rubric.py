"""Several rewards as one number: weights, gates, and what each part said.

Usage: `Rubric([math_answer, short], gates=[Gate(reward="short", only_if="math_answer")]).score_groups(groups)`.
"""

import logging
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from rewards.base import RawReward, RewardFunction, as_reward
from rewards.sample import Sample, Score, ScoreStatus

_LOG = logging.getLogger("rewards")
_SHOWN_CHARS = 2000


@dataclass(frozen=True, kw_only=True, slots=True)
class Gate:
    """A reward counts only where another one says so; elsewhere its term is 0, or missing where that has no value."""

    reward: str
    """The reward that counts or not."""
    only_if: str
    """The reward that decides."""
    at_least: float = 1.0
    """The value it must reach."""


class Rubric:
    """A weighted sum of rewards."""

    def __init__(self, rewards: Sequence[RewardFunction | RawReward], gates: Sequence[Gate] = ()) -> None:
        self.rewards = tuple(as_reward(function) for function in rewards)
        self.gates = {gate.reward: gate for gate in gates}
        if not self.rewards:
            raise ValueError("a Rubric needs at least one reward, got an empty list")
        names = [function.name for function in self.rewards]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"rewards of a Rubric need unique names, got {', '.join(twice)} twice; pass name=...")
        if len(self.gates) < len(gates):
            raise ValueError("a reward of a Rubric can have one gate; let a reward of your own combine the conditions")
        for gate in gates:
            for name in (gate.reward, gate.only_if):
                if name not in names:
                    raise ValueError(f"a gate names the reward {name!r}; the Rubric has {', '.join(names)}")
        self._reported: set[str] = set()

    def score(self, sample: Sample) -> Score:
        """Score one sample; ValueError if a reward judges whole groups. `score_groups` says what the score is."""
        return self._sum({function.name: function.score(sample) for function in self.rewards})

    def score_groups(self, groups: Sequence[Sequence[Sample]]) -> list[list[Score]]:
        """One score per sample, in the groups' order: the sum of weight * value over rewards with a weight that apply;
        None if none does. Steps are those of the same rewards, times their weights.

        A weighted reward that failed without a value, or whose gate did, makes the sum None: what is left would look
        like a bad sample. Metrics hold each value that applies under the reward's name, before weight and gate, and its
        own metrics under "name/metric"; info holds each reward's info under its name, and parts its whole score. The
        status is the worst of the parts: error, then timeout, then ok. The first failure of each reward is logged.
        """
        by_name = self._score_each(groups)
        for function in self.rewards:
            self._report_first_failure(function.name, groups, by_name[function.name])
        return [
            [self._sum({name: scores[g][i] for name, scores in by_name.items()}) for i in range(len(group))]
            for g, group in enumerate(groups)
        ]

    def _score_each(self, groups: Sequence[Sequence[Sample]]) -> dict[str, list[list[Score]]]:
        """Rewards that wait do so at the same time, and while the others run in this thread."""
        waiting = [function for function in self.rewards if function.waits]
        if not waiting:
            return {function.name: function.score_groups(groups) for function in self.rewards}
        with ThreadPoolExecutor(len(waiting)) as threads:
            futures = {function.name: threads.submit(function.score_groups, groups) for function in waiting}
            here = {f.name: f.score_groups(groups) for f in self.rewards if f.name not in futures}
            return {f.name: futures[f.name].result() if f.name in futures else here[f.name] for f in self.rewards}

    def _sum(self, scores: Mapping[str, Score]) -> Score:
        terms: list[float] = []
        steps: list[tuple[int, float]] = []
        broken = False
        metrics: dict[str, float] = {}
        for function in self.rewards:
            score = scores[function.name]
            if score.value is not None:
                metrics[function.name] = score.value
            metrics.update({f"{function.name}/{metric}": float(number) for metric, number in score.metrics.items()})
            if function.weight == 0:
                continue
            gate = self.gates.get(function.name)
            decider = score if gate is None else scores[gate.only_if]
            if any(part.value is None and part.status.is_failure() for part in (score, decider)):
                broken = True
            elif score.value is not None and decider.value is not None:
                is_open = gate is None or decider.value >= gate.at_least
                terms.append(function.weight * score.value if is_open else 0.0)
                steps += [(end, function.weight * step) for end, step in score.steps] if is_open else []
        statuses = {score.status for score in scores.values()}
        return Score(
            value=sum(terms) if terms and not broken else None,
            metrics=metrics,
            info={name: score.info for name, score in scores.items()},
            status=next(s for s in (ScoreStatus.ERROR, ScoreStatus.TIMEOUT, ScoreStatus.OK) if s in statuses),
            seconds=sum(score.seconds for score in scores.values()),
            parts=dict(scores),
            steps=tuple(sorted(steps)),
        )

    def _report_first_failure(self, name: str, groups: Sequence[Sequence[Sample]], scores: list[list[Score]]) -> None:
        if name in self._reported:
            return
        for group, group_scores in zip(groups, scores, strict=True):
            for sample, score in zip(group, group_scores, strict=True):
                if score.status.is_failure():
                    self._reported.add(name)
                    error = str(score.info.get("error", ""))[-_SHOWN_CHARS:]
                    _LOG.warning(
                        "%s\ncompletion %.300r\nprompt %.300r\nlater failures of reward %r are only counted",
                        error, sample.completion, sample.prompt, name,
                    )  # fmt: skip
                    return


def failure_shares(scores: Sequence[Score]) -> dict[str, float]:
    """How the parts of a rubric's scores went: "name/errors", "name/timeouts" and "name/none" (no value, for whatever
    reason), as shares of the samples.
    """
    shares: dict[str, float] = {}
    for name, parts in _by_part(scores).items():
        shares[f"{name}/errors"] = sum(part.status is ScoreStatus.ERROR for part in parts) / len(parts)
        shares[f"{name}/timeouts"] = sum(part.status is ScoreStatus.TIMEOUT for part in parts) / len(parts)
        shares[f"{name}/none"] = sum(part.value is None for part in parts) / len(parts)
    return shares


def reward_seconds(scores: Sequence[Score]) -> dict[str, float]:
    """Reward name -> time of all its calls together; more than the clock shows where calls ran at the same time."""
    return {name: sum(part.seconds for part in parts) for name, parts in _by_part(scores).items()}


def _by_part(scores: Sequence[Score]) -> dict[str, list[Score]]:
    parts: dict[str, list[Score]] = {}
    for score in scores:
        for name, part in score.parts.items():
            parts.setdefault(name, []).append(part)
    return parts
