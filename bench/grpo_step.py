"""One full GRPO step, ours beside TRL's GRPOTrainer with vLLM in the same process: same weights, prompts and lengths.

    python -m bench.grpo_step --device cuda                                     # Qwen3-0.6B's shape, both systems
    python -m bench.grpo_step --device cuda --shape moe --systems ours          # our MoE/MLA model of equal active size
    python -m bench.grpo_step --shape tiny --prompts 4 --tokens 32              # CPU

Each system runs in a process of its own, one after the other, from the same checkpoint of random weights, which sample
to the full length. A step is everything: generation, rewards, advantages, forward, backward, optimizer, weight sync,
and in ours the measured mismatch and the sync's check. The median of the steps counts, the first two left out.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers

from models import PRESETS, build_model, from_pretrained, save_pretrained
from models.counts import count_parameters
from pipelines.prompting import decoder, load_tokenizer
from pipelines.tokenizer import train_tokenizer

LEARNING_RATE = 1e-6
SENTENCE = "the quick brown fox jumps over the lazy dog and counts to one hundred before it sleeps "


def reward(completion: str) -> float:
    """Something with spread that costs nothing."""
    return len(set(completion)) % 7 / 7


def write_checkpoint(options: argparse.Namespace, folder: Path) -> None:
    dtype, vocabulary = getattr(torch, options.dtype), 512 if options.shape == "tiny" else 151_936
    if options.shape == "moe":
        # 16B-A3B's layers, narrower and fewer: 0.58 billion active parameters, head included, as the dense shape has.
        sizes = replace(PRESETS["16b-a3b"], hidden_size=1024, num_hidden_layers=20, num_attention_heads=8,
                        moe_intermediate_size=704, intermediate_size=5632, n_routed_experts=32)  # fmt: skip
        sizes = sizes.with_vocabulary(vocabulary, bos=None, eos=1, pad=0)
        print(f"moe: {count_parameters(sizes).total:,} parameters, {count_parameters(sizes).active:,} active")
        save_pretrained(build_model(sizes, seed=0, dtype=dtype, device=options.device), folder)
    else:
        sizes = (
            {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
             "num_key_value_heads": 2, "head_dim": 64} if options.shape == "tiny" else
            {"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 16,
             "num_key_value_heads": 8, "head_dim": 128}
        )  # fmt: skip
        config = transformers.Qwen3Config(
            vocab_size=vocabulary, tie_word_embeddings=True, max_position_embeddings=4096, pad_token_id=0,
            eos_token_id=1, bos_token_id=None, **sizes,
        )  # fmt: skip
        torch.manual_seed(0)
        with torch.device(options.device):
            model = transformers.Qwen3ForCausalLM(config).to(dtype)
        model.save_pretrained(folder)
    tokenizer = train_tokenizer([SENTENCE], 300, [])
    tokenizer.save_pretrained(str(folder))


def prompt_texts(options: argparse.Namespace) -> list[str]:
    """About 55 tokens each, all different."""
    return [f"{number} " + SENTENCE * 4 for number in range(options.prompts * (options.steps + 1))]


def run_ours(options: argparse.Namespace, folder: str) -> None:
    from grpo.learner import Learner, LearnerConfig
    from grpo.trainer import GRPOTrainer, TrainerConfig
    from rewards import Rubric
    from rollout.engine import EngineConfig
    from rollout.pool import build_pool
    from rollout.prompts import PromptSource
    from rollout.sample import Prompt

    tokenizer = load_tokenizer(folder)
    encoded = tokenizer(prompt_texts(options), add_special_tokens=False)["input_ids"]
    prompts = [Prompt(id=str(i), text="", token_ids=list(ids)) for i, ids in enumerate(encoded)]
    longest = max(len(prompt.token_ids) for prompt in prompts) + options.tokens
    engine = EngineConfig(
        kind=options.engine, transport="local", dtype=options.dtype, max_model_len=longest,
        max_num_seqs=options.prompts * options.group, gpu_memory_share=options.vllm_memory,
        sleep_while_learning=False,
    )  # fmt: skip
    pool = build_pool(engine, folder)
    model = from_pretrained(folder, dtype=getattr(torch, options.dtype), device=options.device)
    learner_config = LearnerConfig(lr=LEARNING_RATE, token_budget=max(options.token_budget, longest))
    learner = Learner(model, learner_config, total_steps=options.steps)
    config = TrainerConfig(
        steps=options.steps, prompts_per_step=options.prompts, completions_per_prompt=options.group,
        max_tokens=options.tokens, log_groups_every=0, save_every=options.steps + 1, probe_limit=options.probe_limit,
        probe_every=10 if options.device == "cuda" else 1,
    )  # fmt: skip
    seconds: list[float] = []
    last = time.perf_counter()

    def on_step(step: int, metrics: dict[str, float]) -> None:
        nonlocal last
        now = time.perf_counter()
        seconds.append(now - last)
        last = now
        phases = {
            name.removeprefix("seconds/"): round(value, 2) for name, value in metrics.items() if "seconds/" in name
        }
        print(
            f"step {step}: {seconds[-1]:.2f} s {phases} mismatch kl {metrics.get('mismatch/kl_k3', 0):.2e}", flush=True
        )

    with tempfile.TemporaryDirectory() as out:
        rubric = Rubric([reward])
        trainer = GRPOTrainer(config, learner, pool, PromptSource(prompts, 0), rubric, decoder(tokenizer),
                              stop_token_id=1, run_dir=Path(out), on_step=on_step)  # fmt: skip
        trainer.run()
    pool.close()
    finish(seconds)


def run_trl(options: argparse.Namespace, folder: str) -> None:
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    seconds: list[float] = []

    class Clock(transformers.TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.started = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            if options.device == "cuda":
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - self.started)
            print(f"step {len(seconds) - 1}: {seconds[-1]:.2f} s", flush=True)

    on_gpu = options.device == "cuda"
    config = GRPOConfig(
        output_dir=tempfile.mkdtemp(), per_device_train_batch_size=options.trl_batch,
        gradient_accumulation_steps=options.prompts * options.group // options.trl_batch,
        num_generations=options.group, max_completion_length=options.tokens, max_steps=options.steps, beta=0.0,
        learning_rate=LEARNING_RATE, temperature=1.0, bf16=on_gpu, use_cpu=not on_gpu, use_vllm=on_gpu,
        vllm_mode="colocate", vllm_gpu_memory_utilization=options.vllm_memory, gradient_checkpointing=False,
        report_to=[], logging_steps=1, save_strategy="no", disable_tqdm=True,
        model_init_kwargs={"dtype": options.dtype},
    )  # fmt: skip
    trainer = GRPOTrainer(
        folder, args=config, train_dataset=Dataset.from_list([{"prompt": text} for text in prompt_texts(options)]),
        reward_funcs=lambda completions, **_: [reward(completion) for completion in completions],
        processing_class=load_tokenizer(folder), callbacks=[Clock()],
    )  # fmt: skip
    trainer.train()
    finish(seconds)


def finish(seconds: list[float]) -> None:
    """The last line is for the parent."""
    peak = torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else 0.0
    print(json.dumps({"seconds": statistics.median(seconds[2:]), "peak_gib": peak}), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--systems", default="ours,trl")
    parser.add_argument("--shape", choices=("dense", "moe", "tiny"), default="dense")
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--group", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=512, help="completion length")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="")
    parser.add_argument("--engine", default="vllm")
    parser.add_argument("--vllm-memory", type=float, default=0.3, help="share of the GPU's memory for vLLM")
    parser.add_argument("--token-budget", type=int, default=32768, help="ours: tokens in a micro-batch")
    parser.add_argument("--trl-batch", type=int, default=16, help="TRL: completions in a micro-batch")
    parser.add_argument("--probe-limit", type=float, default=0.5, help="of the sync's check; bfloat16 rounds coarsely")
    parser.add_argument("--folder", default="", help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.dtype = options.dtype or ("bfloat16" if options.device == "cuda" else "float32")
    if options.folder:
        (run_ours if options.systems == "ours" else run_trl)(options, options.folder)
        return
    results: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        write_checkpoint(options, Path(folder) / "model")
        for system in options.systems.split(","):
            arguments = [*sys.argv[1:], "--systems", system, "--folder", str(Path(folder) / "model")]
            child = subprocess.Popen(
                [sys.executable, "-m", "bench.grpo_step", *arguments], stdout=subprocess.PIPE, text=True
            )
            assert child.stdout is not None
            lines = []
            for line in child.stdout:
                lines.append(line)
                print(f"{system}: {line}", end="", flush=True)
            if child.wait() == 0:
                results[system] = json.loads(lines[-1])
    sampled = options.prompts * options.group * options.tokens
    print(
        f"{options.shape}, {options.dtype}: {options.prompts} x {options.group} completions of {options.tokens} tokens"
    )
    for system, row in results.items():
        speed = f"{row['seconds']:7.2f} s a step, {sampled / row['seconds']:9,.0f} sampled tokens/s"
        print(f"{system:6} {speed}, peak of PyTorch's memory {row['peak_gib']:.1f} GiB")
    if len(results) == 2:
        print(f"ours / trl: {results['trl']['seconds'] / results['ours']['seconds']:.2f}x")


if __name__ == "__main__":
    main()
