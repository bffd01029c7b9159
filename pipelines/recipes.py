"""Named recipes: functions that return a whole configuration, of which the command line changes single fields.

grpo zero ledger --model base --trainer.steps 50
"""

from grpo.learner_config import LearnerConfig
from grpo.objective import ObjectiveConfig
from grpo.trainer import TrainerConfig
from pipelines.pretrain import PretrainConfig
from pipelines.zero import ZeroConfig
from rollout.engine import EngineConfig


def pretrain_ledger() -> PretrainConfig:
    """The base model of the quickstart, from a corpus of ledger documents."""
    return PretrainConfig(data="", out="runs/ledger-base", single_token_templates=("r1",))


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
ZERO_RECIPES = {"ledger": zero_ledger, "gsm8k": zero_gsm8k}
