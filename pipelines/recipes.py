"""Named recipes: functions that return a whole configuration, of which the command line changes single fields.

grpo zero ledger --model base --trainer.steps 50
"""

from dataclasses import replace

from grpo.learner_config import LearnerConfig
from grpo.objective import ObjectiveConfig
from grpo.trainer import TrainerConfig
from pipelines.pretrain import PretrainConfig
from pipelines.sft import SFTConfig
from pipelines.zero import ZeroConfig
from rollout.engine import EngineConfig


def pretrain_ledger() -> PretrainConfig:
    """The base model of the quickstart, from a corpus of ledger documents."""
    return PretrainConfig(data="", out="runs/ledger-base", single_token_templates=("r1",))


def sft_r1() -> SFTConfig:
    """DeepSeek-R1's cold start and its SFT on 800k samples: 128 samples a step, 5e-5 to a tenth of it, two epochs, up
    to 32,768 tokens (arXiv:2501.12948)."""
    return SFTConfig(
        data="", out="", samples_per_step=128, lr=5e-5, epochs=2, token_budget=32_768, checkpoint_layers=True,
        dtype="bfloat16",
    )  # fmt: skip


def sft_r1_distill() -> SFTConfig:
    """The distilled Qwen 1.5B of DeepSeek-R1: 64 samples a step, 1e-4 to a tenth of it; larger students took less, down
    to 2e-5 for 70B (arXiv:2501.12948)."""
    return replace(sft_r1(), samples_per_step=64, lr=1e-4)


def zero_ledger() -> ZeroConfig:
    """The quickstart's RL: 16 prompts x 16 completions, no KL, an engine for each of two cores."""
    return ZeroConfig(
        model="",
        task="ledger",
        num_prompts=20_000,
        out="runs/ledger-zero",
        trainer=TrainerConfig(steps=100, max_tokens=32, save_every=25),
        learner=LearnerConfig(lr=3e-4),
        engine=EngineConfig(max_model_len=1024, num_engines=2),
    )


def zero_gsm8k() -> ZeroConfig:
    """GSM8K with the settings of DeepSeekMath where it states them (arXiv:2402.03300 section 4.2): lr 1e-6, KL 0.04."""
    return ZeroConfig(
        model="",
        task="gsm8k",
        out="runs/gsm8k-zero",
        trainer=TrainerConfig(steps=1000, prompts_per_step=16, completions_per_prompt=64, max_tokens=1024),
        learner=LearnerConfig(lr=1e-6, objective=ObjectiveConfig(kl_coef=0.04, aggregation="sequence")),
    )


PRETRAIN_RECIPES = {"ledger": pretrain_ledger}
SFT_RECIPES = {"default": lambda: SFTConfig(data="", out=""), "r1": sft_r1, "r1-distill": sft_r1_distill}
ZERO_RECIPES = {"ledger": zero_ledger, "gsm8k": zero_gsm8k}
