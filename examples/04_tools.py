"""A completion that calls a tool: a tiny model from random weights learns to use the calculator, in some seconds on one
core.

    python examples/04_tools.py

The model writes digits, + and * and the tags of a tool call; when it has closed a call, the calculator's answer is put
behind it and the model goes on. The reward is for the calculator's answer alone: a number of four digits. So the model
must learn to write a call, then one that has a value, then one that has a large value, and nobody shows it any. What
the calculator wrote is in the transcript, marked `environment`, and is not trained.
"""

import re
from collections.abc import Sequence
from tempfile import TemporaryDirectory

from grpo.advantages import AdvantageConfig
from grpo.learner import Learner
from grpo.learner_config import LearnerConfig
from grpo.samples import build_samples, score_groups
from models import DeepseekV3Config, DeepseekV3ForCausalLM, hf_tensors, save_pretrained
from rewards import Rubric, Sample, reward
from rollout.engine import EngineConfig
from rollout.environment_pool import EnvironmentPool
from rollout.pool import LocalPool
from rollout.sample import ENVIRONMENT, Prompt, SamplingParams
from rollout.tools import Tools, calculator

STEPS, COMPLETIONS, DIGITS = 100, 128, 4
PIECES = [*"0123456789+*", '<tool name="calculator">', "</tool>", "<result>", "</result>", "<error>", "</error>"]
STOP = len(PIECES)
_PIECE = re.compile("|".join(map(re.escape, sorted(PIECES, key=len, reverse=True))))

MODEL = DeepseekV3Config(
    vocab_size=STOP + 1,
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


def encode(text: str) -> list[int]:
    """The calculator's words about an error are no pieces of this vocabulary, and left out."""
    return [PIECES.index(piece) for piece in _PIECE.findall(text)]


def decode(batch: Sequence[Sequence[int]]) -> list[str]:
    return ["".join(PIECES[token] for token in ids if token != STOP) for ids in batch]


@reward
def large_result(sample: Sample) -> float:
    """1 for a result of `DIGITS` digits, less for a shorter one, 0.1 for a call that failed.

    Only `sample.observations` are the calculator's words: a reward that looks for the result in `sample.completion`
    soon teaches the model to write `<result>9999</result>` itself.
    """
    if not sample.observations:
        return 0.0
    result = re.fullmatch(r"<result>(\d+)</result>", sample.observations[0])
    return min(1.0, (1 + len(result[1])) / (1 + DIGITS)) if result else 0.1


def main() -> None:
    model = DeepseekV3ForCausalLM(MODEL)
    model.init_weights(seed=0)
    model.lm_head.weight.data *= 0.1  # all pieces about equally likely: what is never tried is never rewarded
    with TemporaryDirectory() as folder:
        save_pretrained(model, folder)
        engines = LocalPool(EngineConfig(kind="native", transport="local", max_model_len=32), folder)
    pool = EnvironmentPool(engines, Tools({"calculator": calculator}), encode, decode, MODEL.vocab_size, max_turns=2)
    # Adam makes a full step of a tiny gradient: once nearly all answers are right, what is left is noise, and a
    # constant rate of this size can throw the policy away again. So the rate falls, and Adam's memory is short.
    config = LearnerConfig(lr=1e-2, lr_decay="cosine", adam_beta2=0.95)
    learner = Learner(model, config, total_steps=STEPS)
    prompt = Prompt(id="0", text="0", token_ids=encode("0"))
    rubric = Rubric([large_result])

    for step in range(STEPS):
        params = SamplingParams(num_completions=COMPLETIONS, max_tokens=14, stop_token_id=STOP, seed=step)
        groups = list(pool.generate([prompt], params))
        scores = score_groups(groups, rubric, decode, step)
        samples, _ = build_samples(groups, scores, AdvantageConfig(scale="none"), temperature=1.0, version=step)
        learner.update(samples)
        pool.load_weights(hf_tensors(model), version=step + 1)
        mean = sum(score.value or 0.0 for score in scores[0]) / COMPLETIONS
        print(f"step {step + 1:2}  reward {mean:.3f}  {'#' * round(40 * mean)}")

    greedy = SamplingParams(max_tokens=14, stop_token_id=STOP, temperature=0)
    (group,) = pool.generate([prompt], greedy)
    (completion,) = group.completions
    place = 0
    for version, size in completion.version_spans:
        (text,) = decode([completion.token_ids[place : place + size]])
        print(f"{'environment' if version == ENVIRONMENT else 'policy':11}  {text}")
        place += size


if __name__ == "__main__":
    main()
