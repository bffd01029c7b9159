"""Pins what the training loop does about a sampler that is not the learner.

1. The mismatch alarm rings once per crossing and is logged at every step; experts are recorded and counted.
2. In the decoupled form, old log-probabilities are those before a batch's first minibatch.
"""

import threading
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from grpo.corrections import CorrectionConfig
from grpo.learner import Learner
from grpo.learner_config import LearnerConfig
from grpo.metrics import read_metrics
from models import load_pretrained
from rollout.pool import LocalPool
from rollout.sample import CompletionGroup, SamplingParams
from rollout.stream import Work
from tests.grpo.test_grpo_trainer import ENGINE, RecordingLearner, make_trainer
from tests.grpo.test_grpo_trainer import policy as policy


class LouderPool(LocalPool):
    """From the second rollout to the third, says of each token that it was likelier than it was."""

    calls = 0

    def generate(
        self, work: Sequence[Work], params: SamplingParams, *, stop: threading.Event | None = None
    ) -> Iterator[CompletionGroup]:
        self.calls += 1
        shift = 0.2 if self.calls in (2, 3) else 0.0
        for group in super().generate(work, params, stop=stop):
            completions = [replace(c, logprobs=[lp + shift for lp in c.logprobs]) for c in group.completions]
            yield replace(group, completions=completions)


def test_the_alarm_rings_once_and_is_logged(policy: Path, tmp_path: Path) -> None:
    messages: list[str] = []
    pool = LouderPool(ENGINE, str(policy))
    make_trainer(policy, tmp_path, pool=pool, steps=4, minibatches=2, tell=messages.append).run()
    rows = read_metrics(tmp_path)
    assert [row["mismatch/alarm"] for row in rows] == [0, 1, 1, 0]
    assert len(messages) == 1 and "KL(sampler || learner) is 0.019 per token, allowed 0.0001" in messages[0]
    assert all(row["mismatch/rows_without_experts"] == row["mismatch/other_experts"] == 0 for row in rows)


def test_old_logprobs_are_those_before_the_first_minibatch(policy: Path, tmp_path: Path) -> None:
    correction = CorrectionConfig(kind="token_tis", old_logprobs="learner")
    for minibatches in (1, 3):
        learner = RecordingLearner(
            load_pretrained(policy), LearnerConfig(lr=1e-2, correction=correction), total_steps=50
        )
        learner.batches, learner.reports = [], []
        initial = Learner(load_pretrained(policy), LearnerConfig(), total_steps=1)
        make_trainer(policy, tmp_path / str(minibatches), learner=learner, steps=1, minibatches=minibatches).run()
        for sample in (sample for batch in learner.batches for sample in batch):
            if minibatches == 1:
                assert sample.old_logprobs is None, "the update's own pass gives them"
                continue
            (scores,) = initial.score([sample.token_ids])
            assert sample.old_logprobs is not None
            assert sample.old_logprobs[3:] == pytest.approx(scores[2:], abs=1e-4)
