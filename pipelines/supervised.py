"""Supervised training: next-token loss on marked tokens. The one loop behind `grpo pretrain`, `sft` and `distill`.

    result = train_supervised(model, samples, SupervisedConfig(epochs=2, lr=1e-5), heldout=others, run_dir=out)

The loss is the mean over all trained tokens of a step, however they fall into micro-batches. A run folder gets
metrics.jsonl, tensorboard/ and, if asked, checkpoints/ from which the run goes on, on a CPU bit for bit.
"""

import math
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

from grpo.batch import TrainingSample
from grpo.checkpoint import load_checkpoint, save_checkpoint
from grpo.interruption import interruption
from grpo.metrics import MetricsLogger
from models import CausalLM
from pipelines.console import ProgressBar, console, progress_bar
from pipelines.sample_order import ordered_steps
from pipelines.supervised_config import SupervisedConfig
from pipelines.supervised_learner import SupervisedLearner
from pipelines.token_store import TokenStore

__all__ = ["SupervisedConfig", "SupervisedResult", "train_supervised"]


@dataclass(frozen=True, kw_only=True)
class SupervisedResult:
    """What came out of a run; the weights are in the model."""

    steps: int
    """Optimizer steps done."""
    tokens: int
    """Tokens read in them, prompts included."""
    loss: float
    """Of the last step, nats per trained token."""
    heldout_loss: float | None
    """Of the weights that are kept, nats per trained token; None without held-out samples."""
    best_step: int
    """Steps after which the kept weights stood."""
    stopped_early: bool
    """Whether `patience` ended it."""


def train_supervised(
    model: CausalLM,
    samples: Sequence[TrainingSample] | TokenStore,
    config: SupervisedConfig,
    *,
    heldout: Sequence[TrainingSample] | TokenStore = (),
    run_dir: Path | None = None,
    title: str = "training",
) -> SupervisedResult:
    """Trains `model`, ours or a dense one, in place, where it is and in its dtype; advantages and temperatures of
    samples play no part.

    Raises ValueError for samples and settings that do not go together, FloatingPointError for a gradient that is not
    finite, and SystemExit after Ctrl-C with a run folder, when the state has been saved.
    """
    store, others = _store(samples), _store(heldout)
    if not store.num_trained:
        raise ValueError("no sample has a token to train")
    if (config.patience or config.eval_every) and not len(others):
        raise ValueError("eval_every and patience need held-out samples")
    if (config.save_every or config.resume) and run_dir is None:
        raise ValueError("checkpoints need a run folder")
    return _Run(model, store, others, config, run_dir).train(title)


def _store(samples: Sequence[TrainingSample] | TokenStore) -> TokenStore:
    if isinstance(samples, TokenStore):
        return samples
    return TokenStore.of((sample.token_ids, sample.loss_mask) for sample in samples)


def steps_of(config: SupervisedConfig, store: TokenStore) -> int:
    """Optimizer steps of a run; with `tokens_per_step` an epoch may end within one."""
    if config.steps:
        return config.steps
    per_epoch = len(store) / config.samples_per_step
    if config.tokens_per_step:
        per_epoch = int(store.starts[-1]) / config.tokens_per_step
    return max(1, round(config.epochs * per_epoch))


class _Run:
    """One run: its place, its best weights, and what is said about it."""

    def __init__(
        self, model: CausalLM, store: TokenStore, heldout: TokenStore, config: SupervisedConfig, run_dir: Path | None
    ) -> None:
        self.store, self.heldout, self.config, self.run_dir = store, heldout, config, run_dir
        self.total = steps_of(config, store)
        self.learner = SupervisedLearner(model, config, self.total)
        self.tokens, self.loss = 0, math.nan
        self.heldout_loss: float | None = None
        self.best_step, self.misses = 0, 0

    def train(self, title: str) -> SupervisedResult:
        config = self.config
        first = self._resume() if config.resume else 0
        logger = None if self.run_dir is None else MetricsLogger(self.run_dir, resume_from=first)
        order = ordered_steps(
            self.store.lengths, samples_per_step=config.samples_per_step, tokens_per_step=config.tokens_per_step,
            seed=config.seed, curriculum_steps=round(config.curriculum_share * self.total),
        )  # fmt: skip
        for _ in range(first):
            next(order)
        stoppable = nullcontext() if self.run_dir is None else interruption(console.print)
        with stoppable as asked, progress_bar(title, self.total) as bar:
            if first:
                bar.advance("resumed", steps=first)
            elif len(self.heldout):
                console.print(f"held-out loss before training: {self._judge(0)['loss/heldout']:.4f}")
            started, before = time.perf_counter(), self.tokens
            for step in range(first, self.total):
                if self._is_over:
                    break
                metrics = self.learner.update(self.store, next(order))
                self.tokens += int(metrics["data/tokens"])
                self.loss = metrics["loss/train"]
                metrics["speed/tokens_per_s"] = (self.tokens - before) / (time.perf_counter() - started)
                if len(self.heldout) and self._evaluates_after(step + 1):
                    metrics |= self._judge(step + 1)
                self._tell(bar, step, metrics, logger)
                stop = asked is not None and asked.is_set()
                if stop or (config.save_every and (step + 1) % config.save_every == 0):
                    self._save(step + 1)
                if stop:
                    console.print(f"stopped and saved after {step + 1} of {self.total} steps; --resume continues")
                    raise SystemExit(130)
        if logger is not None:
            logger.close()
        return self._result()

    @property
    def _is_over(self) -> bool:
        return bool(self.config.patience) and self.misses >= self.config.patience

    def _evaluates_after(self, steps: int) -> bool:
        return steps == self.total or (bool(self.config.eval_every) and steps % self.config.eval_every == 0)

    def _judge(self, steps: int) -> dict[str, float]:
        """The held-out loss; remembers the weights if it is the best so far and the best are to be kept."""
        loss = self.learner.loss(self.heldout)
        is_best = self.heldout_loss is None or loss < self.heldout_loss
        if is_best or not self.config.patience:
            self.heldout_loss, self.best_step, self.misses = loss, steps, 0
            if self.config.patience:
                self.learner.remember()
        else:
            self.misses += 1
        return {"loss/heldout": loss, "loss/heldout_perplexity": math.exp(min(loss, 700.0))}

    def _tell(self, bar: ProgressBar, step: int, metrics: dict[str, float], logger: MetricsLogger | None) -> None:
        shown: list[tuple[str, str, Callable[[float], str]]] = [
            ("loss", "loss/train", lambda x: f"{x:.3f}"),
            ("held out", "loss/heldout", lambda x: f"{x:.3f}"),
            ("experts in use", "moe/experts_used", lambda x: f"{x:.0%}"),
            ("tokens/s", "speed/tokens_per_s", lambda x: f"{x:,.0f}"),
        ]
        known = metrics if self.heldout_loss is None else {"loss/heldout": self.heldout_loss} | metrics
        bar.advance("  ".join(f"{name} {write(known[key])}" for name, key, write in shown if key in known))
        if logger is not None:
            logger.log(step, metrics)

    def _save(self, steps: int) -> None:
        assert self.run_dir is not None
        place = {
            "tokens": self.tokens, "loss": self.loss, "heldout_loss": self.heldout_loss, "best_step": self.best_step,
            "misses": self.misses,
        }  # fmt: skip
        save_checkpoint(self.run_dir, self.learner, steps, place)

    def _resume(self) -> int:
        """Steps that were finished."""
        assert self.run_dir is not None
        steps, place = load_checkpoint(self.run_dir, self.learner, console.print)
        if place is None:
            console.print("there is no checkpoint yet: the run begins again from step 0")
            return 0
        self.tokens, self.loss, self.heldout_loss = place["tokens"], place["loss"], place["heldout_loss"]
        self.best_step, self.misses = place["best_step"], place["misses"]
        return steps

    def _result(self) -> SupervisedResult:
        if self.config.patience and self.best_step != self.learner.step:
            self.learner.recall()
            console.print(f"the weights after step {self.best_step} are kept, held-out loss {self.heldout_loss:.4f}")
        return SupervisedResult(
            steps=self.learner.step, tokens=self.tokens, loss=self.loss, heldout_loss=self.heldout_loss,
            best_step=self.best_step if self.config.patience else self.learner.step,
            stopped_early=self.learner.step < self.total,
        )  # fmt: skip
