"""The learner's step with each prompt computed once for its completions, and with it computed for each of them.

    python -m bench.shared_prompts                                  # CPU, the quickstart's shape
    python -m bench.shared_prompts --prompt 200 --completion 400 --device cuda --preset mini --dtype bfloat16

16 prompts with 16 completions each, of lengths a tenth around the stated ones. The two ways take turns, `--rounds`
times in one process; the median counts. Tokens are those of whole samples in both.
"""

import argparse
import random
import statistics
import time

import torch

from grpo.batch import TrainingSample
from grpo.learner import Learner
from grpo.learner_config import LearnerConfig
from models import build_model, find_config

PROMPTS, COMPLETIONS = 16, 16


def make_samples(prompt: int, completion: int, vocabulary: int) -> list[TrainingSample]:
    rng = random.Random(0)

    def tokens(length: int) -> list[int]:
        return [rng.randrange(vocabulary) for _ in range(max(1, round(length * rng.uniform(0.9, 1.1))))]

    samples = []
    for _ in range(PROMPTS):
        first = tokens(prompt)
        for _ in range(COMPLETIONS):
            ids = [*first, *tokens(completion)]
            mask = [place >= len(first) for place in range(len(ids))]
            samples.append(
                TrainingSample(
                    token_ids=ids, loss_mask=mask, sampling_logprobs=[-6.0] * len(ids), advantage=rng.gauss(0, 1)
                )
            )
    return samples


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="tiny")
    parser.add_argument("--vocabulary", type=int, default=352)
    parser.add_argument("--prompt", type=int, default=23)
    parser.add_argument("--completion", type=int, default=16)
    parser.add_argument("--token-budget", type=int, default=8192)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    torch.set_num_threads(1)
    sizes = find_config(options.preset).with_vocabulary(options.vocabulary, bos=None, eos=1, pad=0)
    model = build_model(sizes, seed=0, dtype=getattr(torch, options.dtype), device=options.device)
    samples = make_samples(options.prompt, options.completion, options.vocabulary)
    learners = {
        name: Learner(
            model, LearnerConfig(lr=0.0, token_budget=options.token_budget, share_prompts=share), total_steps=1
        )
        for name, share in (("once for each completion", False), ("once", True))
    }
    num_tokens = sum(len(sample.token_ids) for sample in samples)
    seconds: dict[str, list[float]] = {name: [] for name in learners}
    losses = {}
    for number in range(options.rounds + 2):
        for name, learner in learners.items():
            started = time.perf_counter()
            losses[name] = learner.update(samples)["policy/loss"]  # a number: the device has finished
            if number >= 2:
                seconds[name].append(time.perf_counter() - started)
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    for name, median in medians.items():
        print(f"prompt computed {name:25} {num_tokens / median:10,.0f} tokens/s   loss {losses[name]:.6f}")
    separate, shared = medians.values()
    print(f"{separate / shared:.2f} times as fast")


if __name__ == "__main__":
    main()
