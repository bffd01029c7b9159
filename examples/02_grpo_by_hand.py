"""GRPO on one page: a tiny model from random weights learns to count, from a reward alone, in some seconds on one core.

    python examples/02_grpo_by_hand.py

The vocabulary is the ten digits and an end. A prompt is one digit, a completion six more, and the reward is the share
of digits that are one more than the digit before them (9 is followed by 0). Nobody shows the model how to count:
whatever earned more than the other completions of its prompt becomes likelier. `grpo.trainer.GRPOTrainer` is this loop
with metrics, checkpoints and a tokenizer.

Shapes: P prompts, G completions per prompt.
"""

from collections.abc import Sequence
from itertools import pairwise
from tempfile import TemporaryDirectory

from grpo.advantages import group_advantages
from grpo.batch import TrainingSample
from grpo.learner import Learner
from grpo.learner_config import LearnerConfig
from models import DeepseekV3Config, DeepseekV3ForCausalLM, hf_tensors, save_pretrained
from rollout.engine import EngineConfig
from rollout.native_engine import NativeEngine
from rollout.sample import CompletionGroup, Prompt, SamplingParams

STEPS, COMPLETIONS, LENGTH = 20, 16, 6
DIGITS, STOP = range(10), 10

MODEL = DeepseekV3Config(
    vocab_size=11,
    hidden_size=32,
    intermediate_size=64,
    moe_intermediate_size=32,
    num_hidden_layers=1,
    num_attention_heads=2,
    n_routed_experts=4,
    num_experts_per_tok=2,
    kv_lora_rank=16,
    qk_nope_head_dim=8,
    qk_rope_head_dim=8,
    v_head_dim=16,
    max_position_embeddings=32,
    eos_token_id=STOP,
    initializer_range=0.5,
)


def reward(digits: Sequence[int]) -> float:
    """The share of digits that continue the count; the first one is the prompt."""
    return sum(digit == (before + 1) % 10 for before, digit in pairwise(digits)) / LENGTH


def to_samples(group: CompletionGroup, rewards_G: list[float]) -> list[TrainingSample]:
    """What the learner needs of each completion: tokens, which of them to train, how they were sampled, advantage."""
    advantages_G = group_advantages(rewards_G, scale="std")
    prompt = group.prompt.token_ids
    return [
        TrainingSample(
            token_ids=[*prompt, *completion.token_ids],
            loss_mask=[False] * len(prompt) + [True] * len(completion.token_ids),
            sampling_logprobs=[0.0] * len(prompt) + completion.logprobs,
            advantage=advantage,
        )
        for completion, advantage in zip(group.completions, advantages_G, strict=True)
        if advantage is not None
    ]


def main() -> None:
    model = DeepseekV3ForCausalLM(MODEL)
    model.init_weights(seed=0)
    model.lm_head.weight.data *= 0.1  # all digits about equally likely: what is never tried is never rewarded
    with TemporaryDirectory() as folder:
        save_pretrained(model, folder)
        engine = NativeEngine(EngineConfig(kind="native", max_model_len=32), folder)
    learner = Learner(model, LearnerConfig(lr=2e-2), total_steps=STEPS)
    prompts = [Prompt(id=str(digit), text=str(digit), token_ids=[digit]) for digit in DIGITS]

    for step in range(STEPS):
        # 1. Sample G completions of every prompt from the current policy.
        params = SamplingParams(num_completions=COMPLETIONS, max_tokens=LENGTH, stop_token_id=STOP, seed=step)
        groups = engine.generate(prompts, params)
        # 2. Judge each of them.
        rewards_P_G = [[reward([*g.prompt.token_ids, *c.token_ids]) for c in g.completions] for g in groups]
        # 3. Compare within each group, and make what was better than its group likelier.
        samples = [sample for group, rewards_G in zip(groups, rewards_P_G, strict=True)
                   for sample in to_samples(group, rewards_G)]  # fmt: skip
        report = learner.update(samples)
        # 4. Give the engine the new weights.
        engine.load_weights(hf_tensors(model), version=step + 1)

        mean = sum(map(sum, rewards_P_G)) / (len(prompts) * COMPLETIONS)
        print(f"step {step + 1:2}  reward {mean:.3f}  entropy {report['policy/entropy']:.2f}  {'#' * round(40 * mean)}")

    greedy = SamplingParams(max_tokens=LENGTH, stop_token_id=STOP, temperature=0)
    for group in engine.generate(prompts[::3], greedy):
        print(f"{group.prompt.text} -> {' '.join(map(str, group.completions[0].token_ids))}")


if __name__ == "__main__":
    main()
