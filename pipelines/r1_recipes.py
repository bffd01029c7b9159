"""Recipes of `grpo r1`: `tiny` runs on two CPU cores in minutes, `paper` states DeepSeek-R1's numbers.

grpo r1 --recipe paper --base DeepSeek-V3-Base --dry-run
"""

from dataclasses import replace

from grpo.learner_config import LearnerConfig
from grpo.presets import preset
from grpo.trainer import TrainerConfig
from pipelines.evaluate import EvalConfig
from pipelines.pretrain import PretrainConfig
from pipelines.r1_config import PlanConfig, R1Config
from pipelines.r1_cost import Lengths
from pipelines.r1_data import GeneratedData
from pipelines.sample import SampleConfig
from pipelines.sft import SFTConfig
from pipelines.zero_config import ZeroConfig
from rollout.engine import EngineConfig

_ENGLISH = '0.2*language_consistency(language="en")'
_LONG = 32_768
_ROOM = 34_816
"""Prompt and completion, in tokens."""


def tiny() -> R1Config:
    """The chain in miniature, with data of its own: the ledger thought through in words, and instructions."""
    pretrain = PretrainConfig(data="", out="", steps=350, single_token_templates=("r1",))
    tuned = SFTConfig(
        data="", out="", lr=2e-3, samples_per_step=64, warmup_steps=5, balance_speed=1e-3, save_every=20,
        heldout_share=0.02,
    )  # fmt: skip
    engine = EngineConfig(max_model_len=256, max_num_seqs=256)
    reasoning = ZeroConfig(
        model="", task="ledger", num_prompts=10_000, extra_reward=(_ENGLISH,),
        trainer=TrainerConfig(steps=30, max_tokens=24, save_every=5, completions_per_prompt=8),
        learner=LearnerConfig(lr=3e-4), engine=engine,
    )  # fmt: skip
    scenarios = replace(reasoning, mixture=("2*ledger", "instructions"), trainer=replace(reasoning.trainer, steps=20))
    return R1Config(
        generate=GeneratedData(num_documents=45_000),
        pretrain=pretrain,
        cold_start=replace(tuned, steps=110, lr=3e-3),
        reasoning=reasoning,
        sampling=SampleConfig(
            model="", task="ledger", num_prompts=2_400, completions=2, max_tokens=24, engine=engine
        ),
        mixture=replace(tuned, epochs=4, lr=3e-3),
        scenarios=scenarios,
        student_pretrain=replace(pretrain, architecture="", seed=1),
        distill=replace(tuned, epochs=10, lr=3e-3),
        evaluation=EvalConfig(
            model="", temperature=1.0, max_tokens=24,
            engine=EngineConfig(kind="native", transport="local", max_model_len=256),
        ),
        plan=PlanConfig(student="tiny", lengths=Lengths(prompt=30)),
    )  # fmt: skip


def paper() -> R1Config:
    """DeepSeek-R1's stages with the hyper-parameters that the paper and its supplement state (Nature 645:633).

    Assumed, since they are not stated: the mean length of a completion, the number of cold-start rows ("thousands"),
    the completions per prompt of rejection sampling. Data, base and rewards are yours to name.
    """
    algorithm = preset("r1", max_tokens=_LONG)
    engine = EngineConfig(kind="vllm", dtype="bfloat16", max_model_len=_ROOM, placement="separate", num_engines=64)
    learner = LearnerConfig(lr=3e-6, objective=algorithm.objective, token_budget=_ROOM)
    # 8,192 completions per rollout are learned from in 16 optimizer steps of 32 questions x 16.
    trainer = TrainerConfig(
        prompts_per_step=512, completions_per_prompt=16, minibatches=16, max_tokens=_LONG, temperature=1.0,
        advantages=algorithm.advantages, save_every=25, probe_limit=0.05, mismatch_alarm_kl=1e-2,
    )  # fmt: skip
    reasoning = ZeroConfig(
        model="", dtype="bfloat16", checkpoint_layers=True, extra_reward=('language_consistency(language="en")',),
        trainer=replace(trainer, steps=650), learner=learner, engine=engine,
    )  # fmt: skip
    # 1,700 steps at temperature 0.7.
    scenarios = replace(reasoning, trainer=replace(trainer, steps=106, temperature=0.7))
    tuned = SFTConfig(
        data="", out="", lr=5e-5, final_lr_share=0.1, epochs=2, samples_per_step=128, max_length=_LONG,
        token_budget=_LONG, dtype="bfloat16", checkpoint_layers=True, save_every=1000,
    )  # fmt: skip
    return R1Config(
        cold_start=tuned,
        reasoning=reasoning,
        sampling=SampleConfig(
            model="", num_prompts=150_000, completions=16, max_tokens=_LONG, engine=engine
        ),
        mixture=tuned,
        scenarios=scenarios,
        distill=replace(tuned, lr=8e-5, samples_per_step=64),
        evaluation=EvalConfig(model="", temperature=0.6, max_tokens=_LONG, limit=500, engine=engine),
        plan=PlanConfig(
            architecture="671b", student="qwen2.5-7b", num_cold_start=5_000, num_mixture=804_745, row_tokens=5_355,
            lengths=Lengths(prompt=150, completion=8_000),
        ),
    )  # fmt: skip


DISTILL_LR = {
    "qwen2.5-1.5b": 1e-4,
    "qwen2.5-7b": 8e-5,
    "qwen2.5-14b": 7e-5,
    "qwen2.5-32b": 6e-5,
    "llama-3.1-8b": 5e-5,
    "llama-3.3-70b": 2e-5,
}
"""Peak learning rate of each student in DeepSeek-R1's supplement; cosine to a tenth, batch 64, 2 to 3 epochs."""

R1_RECIPES = {"default": R1Config, "tiny": tiny, "paper": paper}
