"""The arithmetic of `grpo r1 --dry-run`.

1. samples, tokens, steps, disk and FLOPs of each kind of stage, against numbers worked out by hand
2. DeepSeek-V3's own figure for training, and R1-Zero's GPU-hours by order of magnitude
3. the recipe `paper` holds the paper's hyper-parameters, and its plan their products
4. a dry run prints every stage and writes nothing
"""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from transformers import AutoConfig, AutoModelForCausalLM

from grpo.learner_config import LearnerConfig
from grpo.objective import ObjectiveConfig
from grpo.trainer import TrainerConfig
from models.counts import training_flops
from models.presets import find_config
from pipelines.r1_cost import (
    Cost,
    Lengths,
    Machine,
    ModelSize,
    model_size,
    rl_cost,
    sampling_cost,
    supervised_cost,
)
from pipelines.r1_plan import stage_costs
from pipelines.r1_recipes import paper, tiny
from pipelines.sft import SFTConfig
from pipelines.zero import ZeroConfig
from rollout.engine import EngineConfig
from tests.pipelines.conftest import grpo

QWEN = {
    "model_type": "qwen2", "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "tie_word_embeddings": False, "vocab_size": 128,
}  # fmt: skip
SIZE = ModelSize(total=1000, active=100, attention=2)


def test_rl_by_hand():
    config = ZeroConfig(
        model="", data="x", trainer=TrainerConfig(
            steps=5, prompts_per_step=2, completions_per_prompt=4, minibatches=2, max_tokens=9, save_every=2
        ),
        learner=LearnerConfig(objective=ObjectiveConfig(kl_coef=0.1)), engine=EngineConfig(max_model_len=64),
    )  # fmt: skip
    cost = rl_cost(config, SIZE, Lengths(prompt=3, completion=7))
    assert (cost.prompts, cost.samples, cost.steps) == (5 * 2, 5 * 2 * 4, 5 * 2)
    assert cost.generated == cost.trained == 40 * 7
    # Prompts: 10 of 3 tokens, which see 2 on average. Completions: 40 of 7 tokens, which see 3 + 4.
    assert cost.generate_flops == 10 * 3 * (200 + 2 * 2) + 40 * 7 * (200 + 2 * 7)
    # 10 tokens that see 5.5 on average; forward, backward (2), old policy, reference.
    assert cost.train_flops == 5 * 40 * 10 * (200 + 2 * 5.5)
    # model/, and two checkpoints of weights, two moments and the reference, float32.
    assert cost.disk == 1000 * 4 * (1 + 2 * 4)
    plain = replace(config, trainer=replace(config.trainer, minibatches=1), learner=LearnerConfig())
    assert rl_cost(plain, SIZE, Lengths(prompt=3, completion=7)).train_flops == 3 * 40 * 10 * (200 + 2 * 5.5)


def test_supervised_and_sampling_by_hand():
    config = SFTConfig(data="", out="", epochs=2, samples_per_step=8, save_every=5)
    cost = supervised_cost(config, SIZE, rows=30, length=10, trained=6)
    assert (cost.prompts, cost.samples, cost.steps, cost.trained) == (30, 60, 8, 360)
    assert cost.train_flops == 3 * 60 * 10 * (200 + 2 * 5.5)
    assert cost.disk == 1000 * 4 + 1000 * 12
    by_steps = supervised_cost(replace(config, steps=3, save_every=0), SIZE, rows=30, length=10, trained=6)
    assert (by_steps.samples, by_steps.steps, by_steps.disk) == (24, 3, 4000)
    assert supervised_cost(replace(config, tokens_per_step=45), SIZE, rows=30, length=10, trained=6).steps == 15
    sampled = sampling_cost(SIZE, 10, 4, prompt=3, completion=7)
    assert (sampled.samples, sampled.generated, sampled.disk) == (40, 280, 40 * 10 * 4)
    assert Lengths().sampled(9) == 4 and Lengths(completion=50).sampled(9) == 9


def test_hours_are_flops_by_peak_and_utilization():
    machine = Machine(peak_tflops=100, train_utilization=0.5, generate_utilization=0.1)
    cost = Cost(train_flops=50e12 * 3600, generate_flops=10e12 * 7200)
    assert cost.gpu_hours(machine) == pytest.approx(1 + 2)


def test_sizes_are_those_of_the_models(tmp_path: Path):
    assert model_size("671b").total == pytest.approx(671e9, rel=1e-3)
    size, config = model_size("tiny"), find_config("tiny")
    assert 3 * size.forward(100) == training_flops(config, 100)
    (tmp_path / "config.json").write_text(json.dumps(QWEN))
    reference = AutoModelForCausalLM.from_config(AutoConfig.for_model(**QWEN))
    matrices = sum(p.numel() for p in reference.parameters() if p.ndim == 2)
    dense = model_size(str(tmp_path))
    assert (dense.total, dense.active) == (matrices, matrices - reference.get_input_embeddings().weight.numel())
    assert model_size("qwen2.5-7b").active == 7.62e9


def test_published_figures():
    # 180K H800-hours per trillion tokens of pretraining, in sequences of 4,096 (arXiv:2412.19437 section 1).
    hours = Cost(train_flops=1e12 * 3 * model_size("671b").forward(2048)).gpu_hours(Machine())
    assert hours == pytest.approx(180e3, rel=0.15)
    # R1-Zero: 10,400 steps of 512 samples, 101K H800-hours (supplement of Nature 645:633).
    recipe = paper()
    cost = rl_cost(recipe.reasoning, model_size("671b"), recipe.plan.lengths)
    assert (cost.steps, cost.samples) == (10_400, 10_400 * 512)
    assert 101e3 / 3 < cost.gpu_hours(recipe.plan.machine) < 101e3 * 3


def test_the_paper_recipe_is_the_paper():
    recipe = paper()
    for stage, temperature, steps in ((recipe.reasoning, 1.0, 10_400), (recipe.scenarios, 0.7, 1_700)):
        trainer, objective = stage.trainer, stage.learner.objective
        assert stage.learner.lr == 3e-6 and trainer.temperature == temperature
        assert (objective.kl_coef, objective.clip_high, objective.reference_every) == (0.001, 10, 400)
        assert trainer.completions_per_prompt == 16 and trainer.samples_per_step == 8192
        assert trainer.samples_per_step / trainer.minibatches == 32 * 16
        assert trainer.steps * trainer.minibatches == pytest.approx(steps, abs=16)
        assert trainer.max_tokens == 32_768
    for tuned in (recipe.cold_start, recipe.mixture):
        assert (tuned.lr, tuned.lr * tuned.final_lr_share, tuned.lr_decay) == (5e-5, pytest.approx(5e-6), "cosine")
        assert tuned.samples_per_step == 128 and 2 <= tuned.epochs <= 3
    assert (recipe.distill.lr, recipe.distill.samples_per_step) == (8e-5, 64)


def test_evaluation_counts_every_completion():
    once, often = (
        stage_costs(replace(tiny(), evaluation=replace(tiny().evaluation, num_samples=count)), ["eval-base"])
        for count in (1, 16)
    )
    assert often["eval-base"].generated == 16 * once["eval-base"].generated > 0


def test_a_dry_run_prints_the_plan_and_writes_nothing(tmp_path: Path):
    out = tmp_path / "run"
    outcome = grpo("r1", "--recipe", "tiny", "--dry-run", "--out", out)
    assert outcome.status == 0, outcome
    lines = {line.split()[0]: line.split()[1:] for line in outcome.out.splitlines() if line}
    trainer = tiny().reasoning.trainer
    prompts, samples = trainer.steps * trainer.prompts_per_step, trainer.steps * trainer.samples_per_step
    assert lines["reasoning"][:2] == [str(prompts), f"{samples / 1000:.2f}k"]
    assert "scenarios: runs, never ran" in outcome.out and "GPU-hours, at 989 TFLOPS" in outcome.out
    assert not out.exists()
