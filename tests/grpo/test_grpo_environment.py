"""From completions with an environment's answers in them to a gradient.

Pinned: (1) the training sample, by hand; (2) the gradient is that of the policy's tokens alone, given the whole
transcript; (3) rewards see the whole transcript; (4) a trainer learns on such a pool.
"""

from pathlib import Path

import torch

from grpo.advantages import AdvantageConfig
from grpo.batch import TrainingSample
from grpo.learner import Learner
from grpo.learner_config import LearnerConfig
from grpo.samples import build_samples, reward_samples
from grpo.trainer import GRPOTrainer, TrainerConfig
from models import SequenceLayout, save_pretrained
from rewards import Rubric, Sample, Score, reward
from rollout.pool import LocalPool
from rollout.prompts import PromptSource
from rollout.sample import CompletionGroup, Prompt
from tests.grpo.test_grpo_gradients import update_and_capture
from tests.models.test_models_parity import CORNERS, relative_error, sharp_model
from tests.rollout.test_rollout_environment import CONFIG, PARAMS, STOP, VOCAB, Counting, Scripted, decode, wrap
from tests.rollout.test_rollout_native_engine import make_prompts


def scripted_group(*script: str) -> CompletionGroup:
    prompt = Prompt(id="p", text="go", token_ids=[5, 6])
    (group,) = wrap(Scripted(*script), Counting(("!",), rounds=1)).generate([prompt], PARAMS)
    return group


def test_the_sample_by_hand() -> None:
    group = scripted_group("a!", "b$")
    samples, _ = build_samples(
        [group], [[Score(value=float(i)) for i in range(4)]], AdvantageConfig(scale="none"), temperature=1.0, version=9
    )
    assert len(samples) == 4
    assert samples[3] == TrainingSample(
        token_ids=[5, 6, ord("a") - 32, 1, *(ord(c) - 32 for c in "[1:2]b"), STOP],
        loss_mask=[False] * 2 + [True] * 2 + [False] * 5 + [True] * 2,
        sampling_logprobs=[0.0] * 2 + [-0.5] * 2 + [0.0] * 5 + [-0.5] * 2,
        advantage=1.5,
        policy_lags=[0] * 2 + [2] * 2 + [0] * 5 + [2] * 2,
    )
    (seen, *_) = reward_samples([group], decode, step=0)[0]
    assert (seen.prompt, seen.completion, seen.finish_reason) == ("go", "a![1:2]b", "stop")
    assert seen.observations == ("[1:2]",)
    (alone, *_) = reward_samples([scripted_group("[1:2]!", "b$")], decode, step=0)[0]
    assert alone.observations == ("[1:6]",), "not what the policy wrote"


def test_the_gradient_is_that_of_the_policys_tokens(tmp_path: Path) -> None:
    model, twin = sharp_model(CORNERS["groups"]), sharp_model(CORNERS["groups"])
    save_pretrained(model, tmp_path / "model")
    pool = wrap(LocalPool(CONFIG, str(tmp_path / "model")), Counting(rounds=3))
    groups = list(pool.generate(make_prompts(4), PARAMS))
    scores = [[Score(value=float(i % 2)) for i in range(4)] for _ in groups]
    samples, _ = build_samples(groups, scores, AdvantageConfig(scale="none"), temperature=1.0, version=0)
    gradients, report = update_and_capture(Learner(model, LearnerConfig(lr=0.0, grad_clip=1e9), 1), samples)
    assert report["policy/clipped"] == 0

    terms, answered = [], 0
    for group in groups:
        for index, completion in enumerate(group.completions):
            ids_T = torch.tensor(group.prompt.token_ids + completion.token_ids)
            logits_TV = twin.lm_head(twin(ids_T, SequenceLayout.from_lengths([len(ids_T)])).hidden_TD)
            logprobs_TV = logits_TV.log_softmax(-1)
            place = len(group.prompt.token_ids)
            for version, size in completion.version_spans:
                for position in range(place, place + size) if version == 0 else ():
                    # Sampled by the very policy that learns: the ratio is 1, and its gradient the log-probability's.
                    terms.append((index % 2 - 0.5) * logprobs_TV[position - 1, ids_T[position]])
                answered += size if version != 0 else 0
                place += size
    (-torch.stack(terms).mean()).backward()
    assert answered > 100, "the environment wrote too little for its gradient to show"
    for name, parameter in twin.named_parameters():
        assert parameter.grad is not None and relative_error(gradients[name], parameter.grad) < 1e-4, name


def test_a_trainer_takes_such_a_pool(tmp_path: Path) -> None:
    model = sharp_model(CORNERS["groups"])
    save_pretrained(model, tmp_path / "model")
    environment = Counting(rounds=2)
    pool = wrap(LocalPool(CONFIG, str(tmp_path / "model")), environment)

    @reward
    def odd(sample: Sample) -> float:
        assert "[1:" in sample.completion, "rewards see the answers"
        return len(sample.completion) % 2

    seen: list[dict[str, float]] = []
    trainer = GRPOTrainer(
        TrainerConfig(steps=2, prompts_per_step=4, completions_per_prompt=4, max_tokens=30, save_every=2),
        Learner(model, LearnerConfig(lr=1e-3), total_steps=2),
        pool,
        PromptSource(make_prompts(8), seed=0),
        Rubric([odd]),
        decode,
        STOP,
        tmp_path / "run",
        on_step=lambda step, metrics: seen.append(metrics),
    )
    trainer.run()
    assert model.config.vocab_size == VOCAB and len(seen) == 2
    assert 0 < seen[0]["reward/mean"] < 1 and seen[0]["reward/errors"] == 0 and len(environment.turns) > 16
    assert all(0 < metrics["mismatch/abs_max"] < 1e-4 for metrics in seen), "engine and learner differ"
