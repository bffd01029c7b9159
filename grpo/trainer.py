"""The GRPO loop: sample, score, advantages, update, sync, log, save. `GRPOTrainer.run_step` is the whole algorithm.

GRPOTrainer(config, learner, pool, prompts, rubric, decode, stop_token_id, run_dir).run()
"""

import errno
import logging
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from grpo.advantages import AdvantageConfig
from grpo.batch import TrainingSample
from grpo.checkpoint import checkpoints, find_damage, load_checkpoint, save_checkpoint
from grpo.interruption import interruption
from grpo.learner import Learner
from grpo.learner_group import LearnerGroup
from grpo.metrics import MetricsLogger, Tracker, append_rows, drop_steps
from grpo.minibatches import update_in_minibatches
from grpo.mismatch import MismatchAlarm
from grpo.objective import check_supervision
from grpo.rollouts import RolloutConfig, Rollouts, RolloutState
from grpo.sample_file import sample_path, write_samples
from grpo.samples import Decode, build_samples, score_groups
from grpo.step_guard import StepsSkippedError
from grpo.step_report import Clock, Notes, batch_metrics, group_rows, memory_metrics, no_notes
from models.checkpoint import flush_to_disk, is_disk_full
from rewards import Rubric, Score
from rollout.pool import EnginePool
from rollout.prompts import PromptSource
from rollout.sample import CompletionGroup, SamplingParams
from rollout.weight_sync import probe_sequences, push_weights

_LOG = logging.getLogger(__name__)

OnStep = Callable[[int, dict[str, float]], None]
Teach = Callable[[list[TrainingSample], int], tuple[list[TrainingSample], dict[str, float]]]
"""The samples of a step -> what the step learns from in their place, a teacher's advantages say, and its metrics."""

Inspect = Callable[[Sequence[CompletionGroup], Sequence[TrainingSample]], Callable[[], Notes]]
"""Before an update whose groups are logged: groups and samples -> what is called after it, for notes on the groups."""


@dataclass(frozen=True, kw_only=True)
class TrainerConfig:
    """The loop's dials."""

    steps: int = 100
    """Rollout batches, each followed by `minibatches` optimizer steps."""
    prompts_per_step: int = 16
    """Different prompts in one rollout batch."""
    completions_per_prompt: int = 16
    """G, the size of a group."""
    minibatches: int = 1
    """Optimizer steps per rollout batch; 1 is strictly on-policy."""
    max_tokens: int = 1024
    """Longest completion."""
    temperature: float = 1.0
    """Of sampling, and of the log-probabilities that are trained."""
    top_k: int = 0
    """Sample from the k most probable tokens only; 0 for all. The learner renormalizes over the same tokens."""
    top_p: float = 1.0
    """Sample from the fewest tokens that together have this probability; 1 for all. As above."""
    advantages: AdvantageConfig = field(default_factory=AdvantageConfig)
    """From rewards to advantages."""
    train_truncated: bool = True
    """Train on completions that reached `max_tokens`. Without, they count in their group's baseline only (overlong
    filtering, arXiv:2503.14476) and in no denominator."""
    save_every: int = 50
    """Steps between checkpoints; the last step always has one."""
    keep_checkpoints: int = 2
    """The newest of them that stay: should the last be damaged, the run goes on from the one before."""
    log_groups_every: int = 10
    """Steps between dumps of a batch's completions with their scores to `groups.jsonl`; 0 for none."""
    dump_samples_every: int = 0
    """Steps between files of what is trained on, in `samples/`, for `grpo replay`; 0 for none."""
    trackers: tuple[Tracker, ...] = ()
    """Where the metrics go beside `metrics.jsonl` and TensorBoard: wandb, trackio."""
    probe_limit: float = 1e-3
    """Largest difference of log-probabilities allowed between learner and engine after a sync."""
    mismatch_alarm_kl: float = 1e-4
    """KL(sampler || learner) per sampled token above which the run says so; 1e-2 for engines in bfloat16."""
    probe_every: int = 1
    """Syncs between two probes; every sync is held against its manifest, and the first is always probed."""
    seed: int = 0
    """Fixes the order of prompts and every sampled token."""
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    """How the groups of a step come together."""

    def __post_init__(self) -> None:
        for name in ("steps", "prompts_per_step", "max_tokens", "save_every", "keep_checkpoints", "probe_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be >= 1, got {getattr(self, name)}")
        if self.completions_per_prompt < 2:
            raise ValueError(
                f"completions_per_prompt must be >= 2 for a group baseline, got {self.completions_per_prompt}"
            )
        if self.minibatches < 1 or self.samples_per_step % self.minibatches:
            raise ValueError(
                f"minibatches={self.minibatches} must divide the {self.samples_per_step} samples of a step"
            )
        for name in ("log_groups_every", "dump_samples_every"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be >= 0, got {getattr(self, name)}")
        for name in ("probe_limit", "mismatch_alarm_kl"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be > 0, got {getattr(self, name)}")
        if self.temperature <= 0:
            raise ValueError(f"temperature must be > 0 to learn from samples, got {self.temperature}")
        if self.top_k < 0 or not 0 < self.top_p <= 1:
            raise ValueError(f"need top_k >= 0 and top_p above 0 and at most 1, got {self.top_k} and {self.top_p}")

    @property
    def samples_per_step(self) -> int:
        return self.prompts_per_step * self.completions_per_prompt

    def arithmetic(self) -> str:
        """The batch arithmetic in one line."""
        updates = f"{self.minibatches} optimizer step" + ("s" if self.minibatches > 1 else "")
        return (
            f"{self.prompts_per_step} prompts x {self.completions_per_prompt} completions = {self.samples_per_step} "
            f"samples = {updates}, {self.steps} times"
        )


class GRPOTrainer:
    """Ties learner, engines, prompts and rewards together and remembers how far it is."""

    def __init__(
        self,
        config: TrainerConfig,
        learner: Learner | LearnerGroup,
        pool: EnginePool,
        prompts: PromptSource,
        rubric: Rubric,
        decode: Decode,
        stop_token_id: int,
        run_dir: Path,
        on_step: OnStep = lambda step, metrics: None,
        tell: Callable[[str], None] = _LOG.warning,
        teach: Teach = lambda samples, step: (samples, {}),
        inspect: Inspect = lambda groups, samples: lambda: no_notes(groups),
    ) -> None:
        """Continues from the newest whole checkpoint in `run_dir` if there is one; `tell` hears of damaged ones."""
        self.config, self.learner, self.pool = config, learner, pool
        self.decode, self.stop_token_id = decode, stop_token_id
        self.run_dir, self.on_step, self.tell, self.teach, self.inspect = run_dir, on_step, tell, teach, inspect
        check_supervision(config.advantages.supervision, learner.config.objective)
        self.first_step, sampled = load_checkpoint(run_dir, learner, tell)
        self.logger = MetricsLogger(run_dir, self.first_step, config.trackers)
        self.groups_path = run_dir / "groups.jsonl"
        drop_steps(self.groups_path, self.first_step)
        self.probe = probe_sequences(prompts.prompts, learner.model.config.vocab_size)
        self.alarm = MismatchAlarm(config.mismatch_alarm_kl, tell)
        self._seconds: dict[str, float] = {}
        self.rollouts = Rollouts(
            config.rollout, pool, prompts,
            lambda group, step: score_groups([group], rubric, decode, step)[0], self.sampling_params,
            prompts_per_step=config.prompts_per_step, first_step=self.first_step, last_step=config.steps,
            state=RolloutState.from_plain(sampled, prompts) if sampled else RolloutState(),
        )  # fmt: skip

    def sampling_params(self, step: int) -> SamplingParams:
        return SamplingParams(
            num_completions=self.config.completions_per_prompt,
            max_tokens=self.config.max_tokens,
            temperature=self.config.temperature,
            top_k=self.config.top_k,
            top_p=self.config.top_p,
            stop_token_id=self.stop_token_id,
            seed=self.config.seed * 1_000_003 + step,
        )

    def run(self) -> int:
        """Steps until `config.steps` are done, or until Ctrl-C: then the step under way is finished and saved.

        Returns the number of finished steps. Raises SyncError if the engines do not hold the learner's weights,
        StepsSkippedError after too many bad gradients, and OSError if the disk is full.
        """
        finished = self.first_step
        try:
            try:
                with interruption(self.tell) as interrupted:
                    self.sync(version=self.first_step, probe_every=1)  # engines start from files, not from the learner
                    while finished < self.config.steps and not interrupted.is_set():
                        self.run_step(finished)
                        finished += 1
                        is_last = finished == self.config.steps or interrupted.is_set()
                        if is_last or finished % self.config.save_every == 0:
                            self.save(finished)
            finally:
                self.close()
        except OSError as error:
            if not is_disk_full(error):
                raise
            whole = [folder.name for folder in checkpoints(self.run_dir) if find_damage(folder) is None]
            kept = f"{whole[-1]} is whole" if whole else "there is no whole checkpoint"
            message = f"the disk is full: {self.run_dir} stops after {finished} steps ({kept}); free space and resume"
            raise OSError(errno.ENOSPC, message) from error
        return finished

    def save(self, finished: int) -> None:
        """Writes a checkpoint; the rows of the steps before it are on disk by then, and survive what it survives."""
        for path in (self.logger.path, self.groups_path):
            if path.exists():
                flush_to_disk(path)
        state = self.rollouts.state.to_plain()
        save_checkpoint(self.run_dir, self.learner, finished, state, self.config.keep_checkpoints)

    def close(self) -> None:
        self.rollouts.close()
        self.logger.close()

    def run_step(self, step: int) -> None:
        with Clock(self._seconds, "rollout"):
            batch = self.rollouts.take(step)
        samples, counts = build_samples(
            batch.groups, batch.scores, self.config.advantages, temperature=self.config.temperature, version=step,
            decode=self.decode, train_truncated=self.config.train_truncated, penalize=self.learner.kl_in_reward,
        )  # fmt: skip
        if not self.config.rollout.overlap:
            self.pool.sleep()  # the sync wakes it
        samples, taught = self.teach(samples, step)
        is_logged = self.config.log_groups_every and step % self.config.log_groups_every == 0
        inspected = self.inspect(batch.sampled, samples) if is_logged else None
        report = self.update(samples, step) | taught
        notes = inspected() if inspected else None
        drift = self.sync(step + 1, self.config.probe_every)
        metrics = batch_metrics(batch.sampled, batch.sampled_scores) | counts | report | self.pool.counters
        metrics |= {"groups/replaced": len(batch.replaced), "groups/restarted": batch.restarted}
        if drift is not None:
            metrics["sync/probe_difference"] = drift
        self._seconds["score"] = batch.score_seconds
        self.log(step, metrics, batch.sampled, batch.sampled_scores, notes)

    def update(self, samples: list[TrainingSample], step: int) -> dict[str, float]:
        """`minibatches` optimizer steps over the shuffled samples, see `grpo/minibatches.py`."""
        with Clock(self._seconds, "learn"):
            if self.config.minibatches > 1 and samples:
                samples = self.learner.with_old_logprobs(samples)
                random.Random(f"{self.config.seed} {step}").shuffle(samples)
            if self.config.dump_samples_every and step % self.config.dump_samples_every == 0:
                write_samples(sample_path(self.run_dir, step), samples, step)
            if not samples:
                return {}
            try:
                report = update_in_minibatches(self.learner, samples, self.config.minibatches)
            except StepsSkippedError as error:
                folder = self.run_dir / "culprits"
                error.culprits.write(folder, error.batch, step)
                message = f"step {step}: {error}. The batch, and what is wrong in it: {folder}"
                raise StepsSkippedError(message, error.culprits, error.batch) from None
            if skipped := report["policy/skipped_steps"]:
                self.tell(f"step {step}: {skipped:.0f} of {self.config.minibatches} optimizer steps skipped")
            return report | self.alarm.check(report)

    def sync(self, version: int, probe_every: int) -> float | None:
        """Gives the engines the learner's weights; what they were sampling goes on with these."""
        weights = self.learner.named_weights()
        with Clock(self._seconds, "sync"):
            if self.config.rollout.overlap:
                # An engine that is replaced while the learner works gets these, not what the learner has by then.
                weights = weights.snapshot()
            with self.rollouts.paused():
                drift = push_weights(
                    self.pool, weights, version, self.probe, self.learner.score, self.config.probe_limit, probe_every
                )
            self.rollouts.set_version(version)
            return drift

    def log(
        self,
        step: int,
        metrics: dict[str, float],
        groups: Sequence[CompletionGroup],
        scores: Sequence[Sequence[Score]],
        notes: Notes | None,
    ) -> None:
        seconds, self._seconds = self._seconds, {}
        sampled = sum(group.num_tokens for group in groups)
        learned = sampled + sum(len(group.prompt.token_ids) * len(group.completions) for group in groups)
        metrics |= memory_metrics() | {f"seconds/{name}": value for name, value in seconds.items()}
        metrics |= {
            "speed/rollout_tokens_per_s": sampled / seconds["rollout"],
            "speed/learn_tokens_per_s": learned / seconds["learn"],
        }
        self.logger.log(step, metrics)
        if notes is not None:
            append_rows(self.groups_path, group_rows(step, groups, scores, self.decode, notes))
        self.on_step(step, metrics)
