"""What a step learns from: prompts in their order, sampled by the engines, scored while others are still sampled.

    batch = rollouts.take(step)
    with rollouts.paused():             # no engine samples now
        push_weights(...)
    rollouts.set_version(step + 1)

Beyond waiting for one batch after the other it can: replace groups that teach nothing (dynamic sampling), leave
completions unfinished at the end of a step and continue them in the next (partial rollouts), and sample for the next
steps while the learner works (overlap). With the last two, a completion may hold tokens of several policy versions;
`max_policy_lag` bounds how old the oldest may be.
"""

import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from grpo.curriculum import Curriculum, CurriculumConfig, Solved, count_solved
from rewards import Score
from rollout.pool import EnginePool
from rollout.prompts import PromptSource
from rollout.sample import ENVIRONMENT, Completion, CompletionGroup, FinishReason, Prompt, SamplingParams
from rollout.stream import Work

ScoreGroup = Callable[[CompletionGroup, int], list[Score]]
"""Group and step -> one score per completion."""


@dataclass(frozen=True, kw_only=True)
class RolloutConfig:
    """How the groups of a step come together."""

    max_oversampling: float = 1.0
    """Groups whose rewards have no spread are replaced by those of further prompts, until a step has sampled this many
    times `prompts_per_step` (dynamic sampling, arXiv:2503.14476); 1 replaces none."""
    partial_share: float = 0.0
    """Prompts in the engines beyond `prompts_per_step`, as a share of it. When a step has its groups, the others pause
    and continue in the next step; 0 waits for all."""
    overlap: bool = False
    """Sample the next steps' groups while the learner works. For engines with devices of their own."""
    max_policy_lag: int = 0
    """Versions that the weights of a token's sampling may be older than those that learn from it; 0 is on-policy. What
    would be older is sampled again."""
    curriculum: CurriculumConfig = field(default_factory=CurriculumConfig)
    """Which prompts come next."""

    def __post_init__(self) -> None:
        if not self.max_oversampling >= 1 or not self.partial_share >= 0 or self.max_policy_lag < 0:
            raise ValueError(
                "need max_oversampling >= 1, partial_share >= 0 and max_policy_lag >= 0, got "
                f"{self.max_oversampling}, {self.partial_share} and {self.max_policy_lag}"
            )
        if (self.partial_share or self.overlap) and not self.max_policy_lag:
            raise ValueError("partial_share and overlap train on tokens of older weights: set max_policy_lag >= 1")


@dataclass(frozen=True, kw_only=True, slots=True)
class RolloutState:
    """Where sampling stands between two steps; with the seeds it fixes what comes next."""

    place: int = 0
    """In the endless walk over the prompts: those before it have been begun."""
    carried: tuple[CompletionGroup, ...] = ()
    """Groups begun and not yet learned from, unfinished ones and such as were finished too late."""
    solved: Solved = field(default_factory=dict)
    """How often each prompt was solved, where the curriculum counts it."""

    def to_plain(self) -> dict[str, Any]:
        """For a checkpoint, in numbers, strings and tensors; of a prompt its id."""
        carried = [(group.prompt.id, [_plain_completion(one) for one in group.completions]) for group in self.carried]
        return {"place": self.place, "carried": carried, "solved": dict(self.solved)}

    @classmethod
    def from_plain(cls, plain: dict[str, Any], prompts: PromptSource) -> "RolloutState":
        """Raises ValueError if a prompt is not among `prompts`."""
        by_id = {prompt.id: prompt for prompt in prompts.prompts}
        if lost := [name for name, _ in plain["carried"] if name not in by_id]:
            raise ValueError(f"the checkpoint holds unfinished completions of prompts that the data lacks: {lost[:8]}")
        groups = (
            CompletionGroup(prompt=by_id[name], completions=[_completion(one) for one in completions])
            for name, completions in plain["carried"]
        )
        return cls(place=plain["place"], carried=tuple(groups), solved=plain["solved"])


@dataclass(kw_only=True, slots=True)
class Batch:
    """The groups of one step, in the order in which their prompts came."""

    groups: list[CompletionGroup] = field(default_factory=list)
    scores: list[list[Score]] = field(default_factory=list)
    replaced: list[tuple[CompletionGroup, list[Score]]] = field(default_factory=list)
    """Without spread and left out, by dynamic sampling."""
    restarted: int = 0
    """Groups sampled again because their tokens had become too old."""
    score_seconds: float = 0.0
    """For which the rewards worked, beside sampling."""

    @property
    def sampled(self) -> list[CompletionGroup]:
        """All groups that were completed for the step, used or replaced."""
        return self.groups + [group for group, _ in self.replaced]

    @property
    def sampled_scores(self) -> list[list[Score]]:
        return self.scores + [scores for _, scores in self.replaced]


class Rollouts:
    def __init__(
        self,
        config: RolloutConfig,
        pool: EnginePool,
        prompts: PromptSource,
        score: ScoreGroup,
        sampling: Callable[[int], SamplingParams],
        *,
        prompts_per_step: int,
        state: RolloutState,
        first_step: int,
        last_step: int,
    ) -> None:
        """`sampling` gives a step's sampling parameters. Steps are taken from `first_step` to before `last_step`."""
        self.config, self.pool, self.score, self.sampling = config, pool, score, sampling
        self.curriculum = Curriculum(config.curriculum, prompts)
        self.prompts_per_step, self.last_step = prompts_per_step, last_step
        self._state = state
        self._began: deque[RolloutState] = deque()  # the state before each batch that was begun and not yet taken
        self._ahead: deque[Future[Batch]] = deque()
        self._next_step = first_step
        self._version, self._version_changed = first_step, threading.Condition()
        self._may_sample, self._stop, self._sampling = threading.Event(), threading.Event(), threading.Lock()
        self._may_sample.set()
        self._is_closed = False
        self._num_useful, self._score_seconds = 0, 0.0
        self._sampler, self._scorer = ThreadPoolExecutor(1, "sample"), ThreadPoolExecutor(1, "score")

    @property
    def state(self) -> RolloutState:
        """From which a resumed run goes on: what was sampled ahead and not taken is sampled again."""
        return self._began[0] if self._began else self._state

    def set_version(self, version: int) -> None:
        """Says which weights the engines hold now."""
        with self._version_changed:
            self._version = version
            self._version_changed.notify_all()

    def take(self, step: int) -> Batch:
        """The batch of `step`; the steps are taken in order, each once. Raises what sampling or scoring raised."""
        oldest = step - self.config.max_policy_lag
        assert self._version >= oldest, f"step {step} needs weights of version {oldest}, engines hold {self._version}"
        last = min(step + self.config.max_policy_lag, self.last_step - 1) if self.config.overlap else step
        while self._next_step <= last:
            self._ahead.append(self._sampler.submit(self._collect, self._next_step))
            self._next_step += 1
        batch = self._ahead.popleft().result()
        self._began.popleft()
        return batch

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Within the block no engine samples; what was under way continues behind it."""
        self._may_sample.clear()
        self._stop.set()
        with self._sampling:
            yield
        self._may_sample.set()

    def close(self) -> None:
        """Ends the threads; a batch under way is given up."""
        self._is_closed = True
        self.set_version(self._version)
        self._may_sample.set()
        self._stop.set()
        self._sampler.shutdown(cancel_futures=True)
        self._scorer.shutdown(cancel_futures=True)

    def _collect(self, step: int) -> Batch:
        """Samples one batch; runs in a thread of its own, one batch after the other."""
        with self._version_changed:
            oldest = step - self.config.max_policy_lag
            self._version_changed.wait_for(lambda: self._is_closed or self._version >= oldest)
        self._began.append(self._state)
        wanted, place = self.prompts_per_step, self._state.place
        work: list[Work] = [_unless_too_old(group, oldest) for group in self._state.carried]
        batch = Batch(restarted=sum(isinstance(one, Prompt) for one in work))
        in_flight = wanted + round(wanted * self.config.partial_share)
        solved = self._state.solved
        fresh, place = self.curriculum.take(place, max(0, in_flight - len(work)), map(_id_of, work), solved)
        work += fresh
        order = list(map(_id_of, work))
        done, left = self._sample(work, step)
        most = max(len(work), round(wanted * self.config.max_oversampling))
        while self._num_useful < wanted and len(order) < most and not self._is_closed:
            count = min(wanted - self._num_useful, most - len(order))
            fresh, place = self.curriculum.take(place, count, order, solved)
            order += map(_id_of, fresh)
            more, left = self._sample(fresh, step, so_far=self._num_useful)
            done += more
        done.sort(key=lambda one: order.index(one[0].prompt.id))
        useful = [one for one in done if self._is_useful(*one)]
        batch.replaced = [one for one in done if not self._is_useful(*one)]
        batch.groups, batch.scores = [group for group, _ in useful[:wanted]], [scores for _, scores in useful[:wanted]]
        batch.score_seconds, self._score_seconds = self._score_seconds, 0.0
        if self.config.curriculum.counts:
            solved = count_solved(solved, batch.sampled, batch.sampled_scores, self.config.curriculum.solved_at)
        carried = (*(group for group, _ in useful[wanted:]), *left)
        self._state = RolloutState(place=place, carried=carried, solved=solved)
        return batch

    def _sample(
        self, work: Sequence[Work], step: int, so_far: int = 0
    ) -> tuple[list[tuple[CompletionGroup, list[Score]]], list[CompletionGroup]]:
        """Samples and scores until all is complete, or what a step needs: the complete groups and the unfinished ones.
        A pause for new weights ends neither.
        """
        self._num_useful = so_far
        scored: list[tuple[CompletionGroup, Future[list[Score]]]] = []
        left: list[CompletionGroup] = []
        while work and not self._is_closed:
            self._may_sample.wait()
            with self._sampling:
                self._stop.clear()
                if not self._may_sample.is_set() or self._is_closed:
                    self._stop.set()  # asked for between the last two lines
                left = []
                for group in self.pool.generate(work, self.sampling(step), stop=self._stop):
                    if group.is_complete:
                        scored.append((group, self._scorer.submit(self._judge, group, step)))
                    else:
                        left.append(group)
            if left and self._has_enough():
                break
            work = left
        return [(group, future.result()) for group, future in scored], left

    def _judge(self, group: CompletionGroup, step: int) -> list[Score]:
        """Scores a group; the one that completes a step stops the engines."""
        started = time.perf_counter()
        scores = self.score(group, step)
        self._score_seconds += time.perf_counter() - started
        self._num_useful += self._is_useful(group, scores)
        if self._has_enough():
            self._stop.set()
        return scores

    def _has_enough(self) -> bool:
        return self.config.partial_share > 0 and self._num_useful >= self.prompts_per_step

    def _is_useful(self, group: CompletionGroup, scores: Sequence[Score]) -> bool:
        """Whether it can be part of a step; with dynamic sampling, only with rewards that differ."""
        if self.config.max_oversampling == 1:
            return True
        finished = zip(group.completions, scores, strict=True)
        values = {s.value for c, s in finished if s.value is not None and c.finish_reason is not FinishReason.ERROR}
        return len(values) > 1


def _unless_too_old(group: CompletionGroup, oldest_version: int) -> Work:
    """The group, or its prompt to begin anew if a token was sampled by weights before `oldest_version`."""
    spans = [span for completion in group.completions for span in completion.version_spans]
    is_too_old = any(version < oldest_version for version, _ in spans if version != ENVIRONMENT)
    return group.prompt if is_too_old else group


def _id_of(work: Work) -> str:
    return work.id if isinstance(work, Prompt) else work.prompt.id


def _plain_completion(completion: Completion) -> dict[str, Any]:
    if completion.environment_state is not None:  # which no checkpoint can hold: begun anew, from the same seed
        completion = replace(completion, token_ids=[], logprobs=[], version_spans=(), expert_ids=None, kept_ids=None)
    plain = {name: getattr(completion, name) for name in ("token_ids", "logprobs", "version_spans", "seed")}
    experts = completion.expert_ids
    return plain | {
        "finish_reason": completion.finish_reason.value,
        "expert_ids": None if experts is None else torch.from_numpy(experts),
        "kept_ids": None if completion.kept_ids is None else [torch.from_numpy(ids) for ids in completion.kept_ids],
    }


def _completion(plain: dict[str, Any]) -> Completion:
    experts = plain["expert_ids"]
    changed = {
        "finish_reason": FinishReason(plain["finish_reason"]),
        "expert_ids": None if experts is None else experts.numpy(),
        "kept_ids": None if plain["kept_ids"] is None else tuple(ids.numpy() for ids in plain["kept_ids"]),
    }
    return Completion(**(plain | changed))
