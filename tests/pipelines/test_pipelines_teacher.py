"""Pins what a teacher adds to a step.

1. The gradient of the sampled tokens' advantages, in expectation over the student's next token, is that of the whole
   distributions' reverse KL: both computed by the learner, summed over all tokens of a small vocabulary.
2. Advantages are reward_weight A - kl_coef (log pi_S - log pi_T), on trained tokens alone.
3. Traces go round in an order of the seed, each once before any again, whatever steps came before.
4. Tokenizers that differ are told with their first difference.
5. A dense student's folder gives its teacher's tokenizer back, also where transformers would take another class.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tokenizers import normalizers
from torch import Tensor
from transformers import LlamaConfig, Qwen2Config, Qwen3Config

from grpo.batch import TrainingSample
from grpo.learner import Learner
from grpo.learner_config import LearnerConfig
from grpo.objective import ObjectiveConfig
from models import DeepseekV3ForCausalLM
from pipelines.prompting import load_tokenizer
from pipelines.teacher import SampledTeacher, WholeTeacher, check_same_tokenizer
from pipelines.tokenizer import train_tokenizer
from tests.grpo.test_grpo_trainer import TINY

V = TINY.vocab_size
CONTEXTS = [[3, 7, 1], [9, 2], [5, 5, 11, 14]]


def model(seed: int, scale: float = 1.0) -> DeepseekV3ForCausalLM:
    made = DeepseekV3ForCausalLM(TINY)
    made.init_weights(seed=seed)
    with torch.no_grad():
        made.lm_head.weight.mul_(scale)  # far from uniform
    return made


def next_logprobs(of: DeepseekV3ForCausalLM, context: list[int]) -> list[float]:
    with torch.no_grad():
        return of.logits(torch.tensor([context]))[0, -1].log_softmax(-1).tolist()


def sample(ids: Sequence[int], logprob: float, **settings: Any) -> TrainingSample:
    last = len(ids) - 1
    return TrainingSample(
        token_ids=ids, loss_mask=[False] * last + [True], sampling_logprobs=[0.0] * last + [logprob], **settings
    )


class ModelPool:
    """Stands for a teacher's engines."""

    def __init__(self, teacher: DeepseekV3ForCausalLM) -> None:
        self.teacher = teacher
        self.calls: list[int] = []

    def score(self, sequences: Sequence[Sequence[int]]) -> list[list[list[float]]]:
        self.calls.append(len(sequences))
        return [
            [
                [next_logprobs(self.teacher, list(ids[:place]))[ids[place]] for place in range(1, len(ids))]
                for ids in sequences
            ]
        ]


def gradient(learner: Learner, samples: Sequence[TrainingSample]) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}

    def keep() -> None:
        for name, parameter in learner.model.named_parameters():
            found[name] = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.clone()

    learner.optimizer = SimpleNamespace(  # type: ignore[assignment]
        zero_grad=lambda set_to_none: [setattr(p, "grad", None) for p in learner.model.parameters()],
        param_groups=[], step=keep,
    )  # fmt: skip
    learner.update(samples)
    return found


def learner_of(student: DeepseekV3ForCausalLM) -> Learner:
    config = LearnerConfig(objective=ObjectiveConfig(loss="reinforce"), grad_clip=torch.inf, token_budget=64)
    return Learner(student, config, total_steps=1)


def test_sampled_advantages_have_the_gradient_of_the_whole_divergence_in_expectation() -> None:
    student, teacher = model(0, 8.0), model(1, 8.0)
    probabilities = {tuple(c): torch.tensor(next_logprobs(student, c)).exp() for c in CONTEXTS}
    every = [sample([*c, a], next_logprobs(student, c)[a], advantage=0.0) for c in CONTEXTS for a in range(V)]
    pool: Any = ModelPool(teacher)
    sampled = SampledTeacher(pool=pool, kl_coef=0.7, reward_weight=0.0, tokens_per_call=100)
    taught, metrics = sampled.teach(every, 0)
    weighted = []
    for one in taught:  # as often as the student samples it
        assert one.token_advantages is not None
        share = V * probabilities[tuple(one.token_ids[:-1])][one.token_ids[-1]].item()
        weighted.append(replace(one, token_advantages=[share * a for a in one.token_advantages]))
    in_expectation = gradient(learner_of(student), weighted)

    learner = learner_of(student)
    whole = WholeTeacher(model=teacher, beta=1.0, kl_coef=0.7, reward_weight=0.0, vocab_size=V)
    whole(learner)
    exact = gradient(learner, [sample([*c, 0], 0.0, advantage=0.0) for c in CONTEXTS])
    assert max(g.norm() for g in exact.values()) > 0.1
    for name, expected in exact.items():
        torch.testing.assert_close(in_expectation[name], expected, atol=2e-5, rtol=1e-4, msg=name)
    assert sum(pool.calls) == len(every) and len(pool.calls) > 1, "in parts"
    assert metrics["distill/divergence"] != 0


def test_whole_divergence_is_reported_and_scales_rewards() -> None:
    student, teacher = model(0, 8.0), model(1, 8.0)
    learner = learner_of(student)
    whole = WholeTeacher(model=teacher, beta=1.0, kl_coef=0.5, reward_weight=0.25, vocab_size=V)
    teach = whole(learner)
    samples, _ = teach([sample([*c, 0], 0.0, advantage=2.0) for c in CONTEXTS], 0)
    assert [one.advantage for one in samples] == [0.5] * 3
    expected = []
    for c in CONTEXTS:
        log_p, log_q = (torch.tensor(next_logprobs(of, c)) for of in (student, teacher))
        expected.append((log_p.exp() * (log_p - log_q)).sum())
    report = learner.update(samples)
    assert report["distill/divergence"] == pytest.approx(torch.stack(expected).mean().item(), rel=1e-4)
    assert 0 <= report["distill/agreement"] <= 1


def test_advantages_of_trained_tokens() -> None:
    pool: Any = SimpleNamespace(score=lambda sequences: [[[-1.0, -2.0, -4.0] for _ in sequences]])
    teacher = SampledTeacher(pool=pool, kl_coef=0.5, reward_weight=2.0, tokens_per_call=4)
    one = TrainingSample(
        token_ids=[1, 2, 3, 4], loss_mask=[False, False, True, True], sampling_logprobs=[0.0, 0.0, -1.0, -5.0],
        advantage=3.0,
    )  # fmt: skip
    stepwise = replace(one, token_advantages=[0.0, 0.0, 1.0, -1.0])
    taught, metrics = teacher.teach([one, stepwise], 0)
    assert taught[0].token_advantages == [0.0, 0.0, 6.0 - 0.5 * 1.0, 6.0 + 0.5 * 1.0]
    assert taught[1].token_advantages == [0.0, 0.0, 2.0 - 0.5 * 1.0, -2.0 + 0.5 * 1.0]
    assert metrics["distill/divergence"] == 0.0
    assert teacher.teach([], 0)[0] == []


def test_traces_go_round() -> None:
    student = model(0)
    learner = learner_of(student)
    traces = [sample([*CONTEXTS[0], a], 0.0, advantage=0.0) for a in range(5)]
    whole = WholeTeacher(
        model=student, beta=1.0, kl_coef=1.0, reward_weight=0.0, vocab_size=V, traces=traces, traces_per_step=2
    )
    steps = [[one.token_ids[-1] for one in whole.traces_of(step, learner)] for step in range(10)]
    order = [token for step in steps for token in step]
    epochs = [order[start : start + 5] for start in range(0, 20, 5)]
    assert all(sorted(epoch) == list(range(5)) for epoch in epochs) and len(set(map(tuple, epochs))) > 1
    teach = whole(learner)
    own = sample([*CONTEXTS[1], 4], -1.0, advantage=1.0)
    samples, _ = teach([own], 3)
    assert len(samples) == 3 and [one.token_ids[-1] for one in samples[1:]] == steps[3]
    assert samples[1].sampling_logprobs[-1] == pytest.approx(next_logprobs(student, CONTEXTS[0])[steps[3][0]], abs=1e-5)


def test_tokenizers_that_differ() -> None:
    texts = ["two words and a third", "words of two kinds"]
    student = train_tokenizer(texts, 300, [])
    check_same_tokenizer(student, train_tokenizer(texts, 300, []))
    with pytest.raises(ValueError, match=r"token \d+ is '.+' to the student and '.+' to the teacher"):
        check_same_tokenizer(student, train_tokenizer(["other texts altogether, other words"], 300, []))
    longer = train_tokenizer(texts, 300, [])
    longer.add_tokens(["two words"])
    with pytest.raises(ValueError, match=r"token \d+ is None to the student and 'two words' to the teacher"):
        check_same_tokenizer(student, longer)
    lower = train_tokenizer(texts, 300, [])
    lower.backend_tokenizer.normalizer = normalizers.Lowercase()
    with pytest.raises(ValueError, match=r"normalizer of the student's tokenizer\.json is None"):
        check_same_tokenizer(student, lower)
    ending = train_tokenizer(texts, 300, [])
    ending.eos_token = ending.pad_token
    with pytest.raises(ValueError, match="text ends with"):
        check_same_tokenizer(student, ending)


@pytest.mark.parametrize("config_class", [Qwen2Config, Qwen3Config, LlamaConfig])
def test_a_student_s_folder_gives_its_teacher_s_tokenizer(config_class: Any, tmp_path: Path) -> None:
    teacher = train_tokenizer(["two words and a third", "words of two kinds"], 300, [])
    teacher.save_pretrained(str(tmp_path))
    config_class(vocab_size=len(teacher)).save_pretrained(tmp_path)
    check_same_tokenizer(load_tokenizer(str(tmp_path)), teacher)
