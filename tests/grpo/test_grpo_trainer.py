"""Pins the training loop, on a tiny model with the native engine and a rule for a reward.

1. The reward rises.
2. A run cut off and continued writes the same numbers and ends with the same bits as one that was not.
3. Engines that keep a stale tensor stop the run with the version at which it showed.
4. A batch does not depend on the order in which groups arrive; minibatches share out each sample once.
5. What is logged is what happened; wrong settings are refused.
"""

import json
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import Tensor

from grpo.advantages import AdvantageConfig, group_advantages
from grpo.batch import TrainingSample
from grpo.learner import Learner
from grpo.learner_config import LearnerConfig
from grpo.metrics import read_metrics
from grpo.objective import ObjectiveConfig
from grpo.step_report import batch_metrics
from grpo.trainer import GRPOTrainer, TrainerConfig
from models import DeepseekV3Config, DeepseekV3ForCausalLM, hf_tensors, load_pretrained, save_pretrained
from rewards import RewardFunction, Rubric, Sample, Score, ScoreStatus
from rollout.engine import EngineConfig, WeightStream
from rollout.pool import EnginePool, LocalPool
from rollout.prompts import PromptSource
from rollout.sample import CompletionGroup, FinishReason, Prompt, SamplingParams
from rollout.stream import Work
from rollout.weight_sync import SyncError
from tests.grpo.test_grpo_samples import make_group

TINY = DeepseekV3Config(
    vocab_size=16,
    hidden_size=32,
    intermediate_size=48,
    moe_intermediate_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    n_routed_experts=4,
    num_experts_per_tok=2,
    kv_lora_rank=16,
    qk_nope_head_dim=8,
    qk_rope_head_dim=8,
    v_head_dim=8,
    first_k_dense_replace=1,
    max_position_embeddings=64,
)
ENGINE = EngineConfig(kind="native", transport="local", max_model_len=32)
PROMPTS = [Prompt(id=f"p{i}", text=f"question {i}", token_ids=[i, 3, 7 + i]) for i in range(6)]
STOP = 15


class StoppedError(Exception):
    """Stands for a crash."""


def even_share(sample: Sample) -> float:
    return sum(token % 2 == 0 for token in sample.completion_ids) / len(sample.completion_ids)


def decode(token_ids: Sequence[Sequence[int]]) -> list[str]:
    return [" ".join(map(str, ids)) for ids in token_ids]


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = DeepseekV3ForCausalLM(TINY)
    model.init_weights(seed=0)
    folder = tmp_path_factory.mktemp("tiny") / "policy"
    save_pretrained(model, folder)
    return folder


def make_trainer(
    policy: Path,
    run_dir: Path,
    *,
    learner: Learner | None = None,
    pool: EnginePool | None = None,
    on_step: Callable[[int, dict[str, float]], None] = lambda step, metrics: None,
    tell: Callable[[str], None] = lambda message: None,
    reward: Callable[[Sample], float | Score | None] | RewardFunction = even_share,
    lr: float = 1e-2,
    **settings: Any,
) -> GRPOTrainer:
    small: dict[str, Any] = {"steps": 6, "prompts_per_step": 3, "completions_per_prompt": 4, "max_tokens": 6}
    config = TrainerConfig(**{**small, "save_every": 2, **settings})
    run_dir.mkdir(exist_ok=True)
    return GRPOTrainer(
        config,
        learner or make_learner(policy, lr=lr),
        pool or LocalPool(ENGINE, str(policy)),
        PromptSource(PROMPTS, seed=0),
        Rubric([reward]),
        decode,
        STOP,
        run_dir,
        on_step,
        tell,
    )


def make_learner(policy: Path, **settings: Any) -> Learner:
    return Learner(load_pretrained(policy), LearnerConfig(token_budget=40, **settings), total_steps=50)


def weights(trainer: GRPOTrainer) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in trainer.learner.named_weights()}


def repeatable(run_dir: Path) -> list[dict[str, float]]:
    """The logged rows without what the clock says."""
    rows = read_metrics(run_dir)
    return [{k: v for k, v in row.items() if not k.startswith(("seconds/", "speed/", "memory/"))} for row in rows]


def stop_at(step: int) -> Callable[[int, dict[str, float]], None]:
    def on_step(finished: int, metrics: dict[str, float]) -> None:
        if finished == step:
            raise StoppedError

    return on_step


@pytest.mark.parametrize("minibatches", [1, 2])
def test_reward_rises(minibatches: int, policy: Path, tmp_path: Path) -> None:
    trainer = make_trainer(
        policy, tmp_path, steps=20, prompts_per_step=6, completions_per_prompt=8, minibatches=minibatches
    )
    trainer.run()
    rewards = [row["reward/mean"] for row in read_metrics(tmp_path)]
    assert sum(rewards[:2]) / 2 < 0.65
    assert sum(rewards[-3:]) / 3 > 0.9
    assert trainer.learner.step == 20 * minibatches


@pytest.mark.parametrize(
    ("settings", "reference"),
    [
        ({}, {}),
        ({"minibatches": 2, "temperature": 0.8, "top_p": 0.9}, {"reference_every": 3}),
        ({"advantages": AdvantageConfig(baseline="leave_one_out", scale="none")}, {"kl_in": "reward"}),
    ],
)
def test_continued_run_equals_an_uninterrupted_one(
    settings: dict[str, Any], reference: dict[str, Any], policy: Path, tmp_path: Path
) -> None:
    """Cut off in step 3 of 6, whose row is written but whose checkpoint is not: the newest one is of step 2."""
    objective = ObjectiveConfig(kl_coef=0.05, **reference)
    penalty: dict[str, Any] = {"lr": 1e-2, "lr_decay": "cosine", "objective": objective}
    whole = make_trainer(policy, tmp_path / "whole", learner=make_learner(policy, **penalty), **settings)
    whole.run()
    cut = make_trainer(
        policy, tmp_path / "cut", learner=make_learner(policy, **penalty), on_step=stop_at(3), **settings
    )
    with pytest.raises(StoppedError):
        cut.run()
    assert [row["step"] for row in read_metrics(tmp_path / "cut")] == [0, 1, 2, 3]

    continued = make_trainer(policy, tmp_path / "cut", learner=make_learner(policy, **penalty), **settings)
    assert continued.first_step == 2
    continued.run()
    assert repeatable(tmp_path / "cut") == repeatable(tmp_path / "whole")
    assert [row["step"] for row in repeatable(tmp_path / "whole")] == list(range(6))
    ours, theirs = weights(continued), weights(whole)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_finished_run_has_nothing_left_to_do(policy: Path, tmp_path: Path) -> None:
    make_trainer(policy, tmp_path, steps=3).run()  # save_every=2 does not divide it: the last step saves all the same
    again = make_trainer(policy, tmp_path, steps=3, on_step=stop_at(0))
    assert again.first_step == 3
    again.run()
    assert [row["step"] for row in read_metrics(tmp_path)] == [0, 1, 2]


class StalePool(LocalPool):
    """Goes on with the first weights it was given wherever `is_stale` says so of a tensor's name."""

    def __init__(self, policy: Path, is_stale: Callable[[str], bool]) -> None:
        super().__init__(ENGINE, str(policy))
        self.is_stale = is_stale
        self.first = {name: tensor.clone() for name, tensor in hf_tensors(load_pretrained(policy))}
        self.versions: list[int] = []

    def load_weights(self, weights: WeightStream, version: int) -> None:
        self.versions.append(version)
        super().load_weights(((n, self.first[n] if self.is_stale(n) else tensor) for n, tensor in weights), version)


@pytest.mark.parametrize(
    "part", ["layers.1.mlp.experts.2.down_proj", "layers.1.mlp.experts.0.", "layers.0.", "mlp.gate.weight", "embed"]
)
def test_stale_tensors_stop_the_run(part: str, policy: Path, tmp_path: Path) -> None:
    pool = StalePool(policy, lambda name: part in name)
    trainer = make_trainer(policy, tmp_path, pool=pool)
    with pytest.raises(SyncError, match=r"after the push of version 1, engine 0 scores the probe differently"):
        trainer.run()
    assert pool.versions == [0, 1]
    assert read_metrics(tmp_path) == [], "no row for a step whose weights did not arrive"


def test_stale_pool_that_keeps_nothing_runs(policy: Path, tmp_path: Path) -> None:
    pool = StalePool(policy, lambda name: False)
    make_trainer(policy, tmp_path, pool=pool, steps=2).run()
    assert pool.versions == [0, 1, 2]
    assert all(row["sync/probe_difference"] < 1e-4 for row in read_metrics(tmp_path))


def test_engines_get_the_learners_weights_before_the_first_token(policy: Path, tmp_path: Path) -> None:
    """The engine starts from a file of other weights; only the sync makes the first batch on-policy."""
    learner = make_learner(policy, lr=1e-2)
    assert isinstance(learner.model, DeepseekV3ForCausalLM)
    learner.model.init_weights(seed=9)
    make_trainer(policy, tmp_path, learner=learner, steps=1).run()
    assert read_metrics(tmp_path)[0]["mismatch/abs_max"] < 1e-4


class ReversedPool(LocalPool):
    def generate(
        self, work: Sequence[Work], params: SamplingParams, *, stop: threading.Event | None = None
    ) -> Iterator[CompletionGroup]:
        yield from reversed(list(super().generate(work, params, stop=stop)))


def test_arrival_order_does_not_change_the_batch(policy: Path, tmp_path: Path) -> None:
    straight = make_trainer(policy, tmp_path / "straight")
    reverse = make_trainer(policy, tmp_path / "reverse", pool=ReversedPool(ENGINE, str(policy)))
    straight.run()
    reverse.run()
    assert repeatable(tmp_path / "reverse") == repeatable(tmp_path / "straight")
    ours, theirs = weights(reverse), weights(straight)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


class RecordingLearner(Learner):
    """Remembers what each update was given and reported."""

    batches: list[list[TrainingSample]]
    reports: list[dict[str, float]]

    def update(self, samples: Sequence[TrainingSample]) -> dict[str, float]:
        self.batches.append(list(samples))
        self.reports.append(super().update(samples))
        return self.reports[-1]


def make_recorder(policy: Path, *, lr: float = 1e-2) -> RecordingLearner:
    learner = RecordingLearner(load_pretrained(policy), LearnerConfig(lr=lr), total_steps=50)
    learner.batches, learner.reports = [], []
    return learner


def trace(sample: TrainingSample) -> tuple[list[int], list[float], float]:
    return list(sample.token_ids), list(sample.sampling_logprobs), sample.advantage


def test_minibatches_share_out_each_sample_once(policy: Path, tmp_path: Path) -> None:
    whole, shared = make_recorder(policy), make_recorder(policy)
    make_trainer(policy, tmp_path / "whole", learner=whole, steps=1).run()
    make_trainer(policy, tmp_path / "shared", learner=shared, steps=1, minibatches=3).run()
    assert [len(batch) for batch in shared.batches] == [4, 4, 4]
    together = [sample for batch in shared.batches for sample in batch]
    assert together != whole.batches[0], "unshuffled, a minibatch would be one prompt's group"
    assert sorted(map(trace, together)) == sorted(map(trace, whole.batches[0]))


def test_report_is_the_mean_but_mismatch_is_the_first(policy: Path, tmp_path: Path) -> None:
    """Later minibatches are off-policy by design, which says nothing about the engine."""
    learner = make_recorder(policy)
    make_trainer(policy, tmp_path, learner=learner, steps=1, minibatches=3, temperature=0.7).run()
    (row,) = read_metrics(tmp_path)
    assert row["mismatch/abs_max"] == learner.reports[0]["mismatch/abs_max"] < 1e-4
    assert learner.reports[2]["mismatch/abs_max"] > 1e-2
    norms = [report["policy/grad_norm"] for report in learner.reports]
    assert row["policy/grad_norm"] == pytest.approx(sum(norms) / 3, rel=1e-12)


def test_every_step_draws_afresh_from_the_seed(policy: Path, tmp_path: Path) -> None:
    """Same weights and same prompts in every step (lr=0): only the seed can make the completions differ."""

    def sampled(name: str, seed: int) -> list[list[list[int]]]:
        learner = make_recorder(policy, lr=0.0)
        make_trainer(policy, tmp_path / name, learner=learner, steps=2, prompts_per_step=6, seed=seed).run()
        return [sorted(list(sample.token_ids) for sample in batch) for batch in learner.batches]

    first, second = sampled("a", seed=1)
    assert first != second
    assert sampled("b", seed=1) == [first, second]
    assert sampled("c", seed=2)[0] != first


@pytest.mark.parametrize("scale", ["std", "none"])
def test_advantages_are_those_of_each_prompt(scale: Literal["std", "none"], policy: Path, tmp_path: Path) -> None:
    learner = make_recorder(policy)
    make_trainer(policy, tmp_path, learner=learner, steps=1, advantages=AdvantageConfig(scale=scale)).run()
    (batch,) = learner.batches
    for group in (batch[0:4], batch[4:8], batch[8:12]):
        assert len({tuple(sample.token_ids[:3]) for sample in group}) == 1
        completions = [sample.token_ids[3:] for sample in group]
        rewards = [sum(token % 2 == 0 for token in ids) / len(ids) for ids in completions]
        assert [sample.advantage for sample in group] == group_advantages(rewards, scale=scale)
    assert any(sample.advantage for sample in batch)


def test_step_without_samples_leaves_the_weights(policy: Path, tmp_path: Path) -> None:
    """No reward applies: nothing to learn, which the row says, and the run goes on."""
    learner = make_recorder(policy)
    trainer = make_trainer(policy, tmp_path, learner=learner, steps=2, reward=lambda sample: None)
    before = weights(trainer)
    trainer.run()
    assert learner.batches == []
    assert all(torch.equal(before[name], tensor) for name, tensor in weights(trainer).items())
    assert [row["samples/unscored"] for row in read_metrics(tmp_path)] == [1.0, 1.0]


def test_groups_file_has_the_batch(policy: Path, tmp_path: Path) -> None:
    make_trainer(policy, tmp_path, steps=3, log_groups_every=2).run()
    records = [json.loads(line) for line in (tmp_path / "groups.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == [0, 0, 0, 2, 2, 2]
    rows = read_metrics(tmp_path)
    for step in (0, 2):
        completions = [c for record in records if record["step"] == step for c in record["completions"]]
        rewards = [completion["reward"] for completion in completions]
        assert sum(rewards) / len(rewards) == pytest.approx(rows[step]["reward/mean"], abs=1e-12)
        for completion in completions:
            tokens = [int(word) for word in completion["text"].split()]
            assert completion["reward"] == pytest.approx(sum(token % 2 == 0 for token in tokens) / len(tokens))
            assert completion["finish_reason"] == ("stop" if tokens[-1] == STOP else "length")
            assert STOP not in tokens[:-1] and (len(tokens) == 6 or tokens[-1] == STOP)
            assert completion["policy_version"] == step


def test_batch_metrics_by_hand() -> None:
    groups = [make_group("p", [2, 4]), make_group("q", [6, 8])]
    groups[1].completions[0] = type(groups[1].completions[0])(
        token_ids=[1] * 6, logprobs=[-0.1] * 6, finish_reason=FinishReason.LENGTH, version_spans=((0, 6),), seed=0
    )
    scores = [
        [Score(value=1.0, metrics={"a": 0.5}), Score(value=None)],
        [Score(value=0.0, metrics={"a": 1.0, "b": 3.0}), Score(value=None, status=ScoreStatus.ERROR)],
    ]
    assert batch_metrics(groups, scores) == {
        "reward/mean": 0.5,
        "reward/a": 0.75,
        "reward/b": 3.0,
        "reward/errors": 0.25,
        "completion/tokens": 5.0,
        "completion/truncated": 0.25,
    }
    nothing = [[Score(value=None)] * 2] * 2
    assert "reward/mean" not in batch_metrics(groups, nothing)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 0}, "steps must be >= 1, got 0"),
        ({"prompts_per_step": 0}, "prompts_per_step must be >= 1, got 0"),
        ({"max_tokens": -1}, "max_tokens must be >= 1, got -1"),
        ({"save_every": 0}, "save_every must be >= 1, got 0"),
        ({"completions_per_prompt": 1}, "completions_per_prompt must be >= 2 for a group baseline, got 1"),
        ({"minibatches": 0}, "minibatches=0 must divide the 256 samples"),
        ({"minibatches": 3}, "minibatches=3 must divide the 256 samples of a step"),
        ({"mismatch_alarm_kl": 0.0}, "mismatch_alarm_kl must be > 0, got 0.0"),
        ({"temperature": 0.0}, "temperature must be > 0 to learn from samples, got 0.0"),
    ],
)
def test_wrong_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainerConfig(**settings)


def test_arithmetic() -> None:
    config = TrainerConfig(steps=7, prompts_per_step=4, completions_per_prompt=6, minibatches=3)
    assert config.arithmetic() == "4 prompts x 6 completions = 24 samples = 3 optimizer steps, 7 times"
    assert (
        "= 24 samples = 1 optimizer step, 7"
        in TrainerConfig(steps=7, prompts_per_step=4, completions_per_prompt=6).arithmetic()
    )
