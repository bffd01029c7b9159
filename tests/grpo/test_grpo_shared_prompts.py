"""A prompt that is computed once for its completions changes no gradient and no measured number."""

import random
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from torch import Tensor

from grpo.batch import TrainingSample
from grpo.learner import Learner
from grpo.learner_config import LearnerConfig
from grpo.objective import ObjectiveConfig
from grpo.packing import pack_for_ranks
from models import CausalLM, TransformersCausalLM
from tests.models.test_models_auto import CONFIGS, reference_model
from tests.models.test_models_parity import CORNERS, relative_error, sharp_model

EXPERT_LAYERS, EXPERTS, CHOSEN = 2, 16, 4


def groups(*, with_experts: bool) -> list[TrainingSample]:
    """Three prompts of four completions, shuffled, one prompt the beginning of another; experts as one sampler would
    record them, the same for the same tokens."""
    rng = random.Random(0)
    prompts = [[5, 6, 7, 8, 9], [5, 6, 7], [11] * 9]
    samples = []
    for prompt in prompts:
        for _ in range(4):
            ids = [*prompt, *(rng.randrange(90) for _ in range(rng.randint(1, 9)))]
            draw = [random.Random(str(ids[: place + 1])) for place in range(len(ids) - 1)]
            chosen = [[r.sample(range(EXPERTS), CHOSEN) for _ in range(EXPERT_LAYERS)] for r in draw]
            samples.append(
                TrainingSample(
                    token_ids=ids,
                    loss_mask=[False] * len(prompt) + [True] * (len(ids) - len(prompt)),
                    sampling_logprobs=[-rng.random() - 3 for _ in ids],
                    advantage=rng.gauss(0, 1),
                    expert_ids=np.array(chosen, np.uint8) if with_experts else None,
                )
            )
    rng.shuffle(samples)
    return samples


def step(model: CausalLM, samples: Sequence[TrainingSample], token_budget: int, share: bool) -> tuple[dict, dict]:
    gradients: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        parameter.register_hook(lambda grad, name=name: gradients.update({name: gradients.get(name, 0) + grad}))
    objective = ObjectiveConfig(loss="gspo", clip_low=0.9, clip_high=9.0, kl_coef=0.1, entropy_coef=0.01)
    config = LearnerConfig(lr=0.0, objective=objective, token_budget=token_budget, share_prompts=share)
    return gradients, Learner(model, config, total_steps=1).update(samples)


@pytest.mark.parametrize("token_budget", [1000, 40])
@pytest.mark.parametrize("kind", ["experts", "recorded experts", "qwen3"])
def test_the_gradient_is_the_same(kind: str, token_budget: int) -> None:
    def model() -> CausalLM:
        if kind == "qwen3":
            return TransformersCausalLM(reference_model(CONFIGS[kind]()))
        return sharp_model(CORNERS["v3_like"])

    samples = groups(with_experts=kind == "recorded experts")
    wanted, reported = step(model(), samples, token_budget, share=False)
    found, report = step(model(), samples, token_budget, share=True)
    assert wanted.keys() == found.keys() and wanted
    for name, gradient in wanted.items():
        assert relative_error(found[name], gradient) < 1e-5, name
    assert report.keys() == reported.keys()
    for name in report:
        assert report[name] == pytest.approx(reported[name], rel=1e-4, abs=1e-6), name


def test_a_prompt_is_computed_once_in_each_micro_batch() -> None:
    samples = groups(with_experts=False)
    whole = sum(len(sample.token_ids) for sample in samples)
    ((batch,),) = pack_for_ranks(samples, 1000, "token", num_ranks=1, quadratic_at=1, share_prompts=True)
    assert len(batch.ids_T) == whole - 3 * (5 + 3 + 9)
    (batches,) = pack_for_ranks(samples, 40, "token", num_ranks=1, quadratic_at=1, share_prompts=True)
    assert max(sum(batch.layout.lengths) for batch in batches) <= 40 < whole
    prompts = [{samples[place].prompt_ids for place in batch.samples_N.tolist()} for batch in batches]
    assert sum(map(len, prompts)) <= len(batches) + 2, "samples of a prompt come together"


def test_sliding_windows_share_nothing() -> None:
    """transformers' own attention tells sequences apart by their positions."""
    model = TransformersCausalLM(reference_model(CONFIGS["qwen2_window"]()))
    assert not model.shares_beginnings
    samples = groups(with_experts=False)
    assert step(model, samples, 1000, share=True)[1]["policy/grad_norm"] > 0
    batch = pack_for_ranks(samples, 1000, "token", num_ranks=1, quadratic_at=1, share_prompts=True)[0][0]
    with pytest.raises(AssertionError, match="sees no shared tokens"):
        model(batch.ids_T, replace(batch, layout=batch.layout).layout)
