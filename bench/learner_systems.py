"""The three systems that bench/learner.py times, each as one function: an optimization step on given samples.

All take the same checkpoint, samples, advantages and precision, average over all completion tokens of the step (DAPO's
rule, arXiv:2503.14476), clip the gradient's norm at 1 and step AdamW. The policy is on-policy, so ratios are 1. The
gradient norm that each reports for its first step tells whether they compute the same thing.
"""

import argparse
import random
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor

GROUP = 8
LEARNING_RATE = 1e-6


@dataclass(frozen=True)
class Given:
    """One sample of the step."""

    prompt: list[int]
    completion: list[int]
    advantage: float


def make_samples(options: argparse.Namespace, vocabulary: int) -> list[Given]:
    """Prompts of 32 to 128 tokens; completions log-normal: median `options.median`, sigma 0.8 (so the mean is 1.4 times
    the median, and 1 in 20 longer than 3.7 times), cut off at `options.longest`. With `--long`, two of that length."""
    rng = random.Random(0)
    lengths = [round(options.median * rng.lognormvariate(0, 0.8)) for _ in range(options.samples)]
    lengths = [options.long - 64] * options.samples if options.long else lengths
    samples = []
    for length in lengths:
        prompt = 64 if options.long else rng.randint(min(32, options.longest // 8), min(128, options.longest // 4))
        length = length if options.long else max(2, min(length, options.longest - prompt))
        tokens = [rng.randrange(2, vocabulary) for _ in range(prompt + length)]
        samples.append(Given(tokens[:prompt], tokens[prompt:], rng.gauss(0, 1)))
    return samples


class Clock:
    """Times steps, waiting for the device before and after; prints each as it ends."""

    def __init__(self, device: str) -> None:
        self.on_gpu, self.seconds = device == "cuda", list[float]()

    def start(self) -> None:
        self._wait()
        self._started = time.perf_counter()

    def stop(self) -> None:
        self._wait()
        self.seconds.append(time.perf_counter() - self._started)
        print(f"step {len(self.seconds) - 1}: {self.seconds[-1]:.3f} s", flush=True)

    def _wait(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize()


def ours(options: argparse.Namespace, folder: str, samples: list[Given], clock: Clock) -> tuple[float, Any]:
    """The gradient norm of the first step, and a function that runs one more step."""
    from grpo.batch import TrainingSample
    from grpo.corrections import CorrectionConfig
    from grpo.learner import Learner, LearnerConfig
    from models import from_pretrained
    from models.auto import checkpoint_layers

    model = from_pretrained(folder, dtype=getattr(torch, options.dtype), device=options.device)
    if options.recompute:
        checkpoint_layers(model)
    longest = max(len(s.prompt) + len(s.completion) for s in samples)
    config = LearnerConfig(
        lr=LEARNING_RATE, grad_clip=1.0, token_budget=max(options.token_budget, longest),
        correction=CorrectionConfig(old_logprobs="learner"),
    )  # fmt: skip
    learner = Learner(model, config, total_steps=options.steps)
    batch = [
        TrainingSample(
            token_ids=s.prompt + s.completion,
            loss_mask=[False] * len(s.prompt) + [True] * len(s.completion),
            sampling_logprobs=[0.0] * (len(s.prompt) + len(s.completion)),
            advantage=s.advantage,
        )
        for s in samples
    ]
    return repeat(options, clock, lambda: learner.update(batch)["policy/grad_norm"])


def repeat(options: argparse.Namespace, clock: Clock, step: Callable[[], float]) -> tuple[float, Callable[[], float]]:
    norm = None
    for _ in range(options.steps):
        clock.start()
        found = step()
        clock.stop()
        norm = found if norm is None else norm
    assert norm is not None
    return norm, step


def plain(options: argparse.Namespace, folder: str, samples: list[Given], clock: Clock) -> tuple[float, Any]:
    """transformers and a loop: micro-batches of right-padded rows, all logits at once, autograd, AdamW."""
    load: Any = transformers.AutoModelForCausalLM.from_pretrained
    model = load(folder, dtype=getattr(torch, options.dtype), **experts(options)).to(options.device)
    model.train()
    if options.recompute:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=LEARNING_RATE, weight_decay=0.0, fused=options.device == "cuda"
    )
    total = sum(len(s.completion) for s in samples)
    size = options.batch

    def step() -> float:
        for start in range(0, len(samples), size):
            rows = samples[start : start + size]
            ids_BS, mask_BS = padded(rows, options.device)
            logits_BSV = model(input_ids=ids_BS, use_cache=False).logits[:, :-1]
            logprobs_BS = -F.cross_entropy(logits_BSV.float().flatten(0, 1), ids_BS[:, 1:].flatten(), reduction="none")
            logprobs_BS = logprobs_BS.view(len(rows), -1)
            advantages_B1 = torch.tensor([s.advantage for s in rows], device=options.device)[:, None]
            ratio_BS = (logprobs_BS - logprobs_BS.detach()).exp()
            clipped_BS = ratio_BS.clamp(0.8, 1.2)
            loss_BS = -torch.minimum(ratio_BS * advantages_B1, clipped_BS * advantages_B1)
            ((loss_BS * mask_BS[:, 1:]).sum() / total).backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return norm.item()

    return repeat(options, clock, step)


def experts(options: argparse.Namespace) -> dict[str, str]:
    """transformers' fastest implementation of experts, where there are any."""
    return {} if options.shape == "dense" else {"experts_implementation": "grouped_mm"}


def padded(rows: list[Given], device: str) -> tuple[Tensor, Tensor]:
    """[B, S] ids, padded on the right, where causality hides it; [B, S] 1.0 on completion tokens."""
    length = max(len(s.prompt) + len(s.completion) for s in rows)
    ids_BS, mask_BS = torch.zeros(len(rows), length, dtype=torch.long), torch.zeros(len(rows), length)
    for row, s in enumerate(rows):
        ids_BS[row, : len(s.prompt) + len(s.completion)] = torch.tensor(s.prompt + s.completion)
        mask_BS[row, len(s.prompt) : len(s.prompt) + len(s.completion)] = 1
    return ids_BS.to(device), mask_BS.to(device)


def trl(options: argparse.Namespace, folder: str, samples: list[Given], clock: Clock) -> tuple[float, None]:
    """TRL's GRPOTrainer, whose generation and scoring are replaced by the given samples; its defaults otherwise."""
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    norms: list[float] = []

    class Steps(transformers.TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            clock.start()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            clock.stop()

        def on_log(self, *_: Any, logs: dict[str, float], **__: Any) -> None:
            norms.extend([logs["grad_norm"]] if "grad_norm" in logs else [])

    class GivenSamples(GRPOTrainer):
        def _generate_and_score_completions(self, inputs: Any) -> dict[str, Any]:
            device = options.device

            def pad(rows: list[Tensor], side: str = "right") -> Tensor:
                return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_side=side).to(device)

            prompts = [torch.tensor(s.prompt) for s in samples]
            completions = [torch.tensor(s.completion) for s in samples]
            total = sum(len(s.completion) for s in samples)
            return {
                "prompt_ids": pad(prompts, "left"),
                "prompt_mask": pad([torch.ones_like(p) for p in prompts], "left"),
                "completion_ids": pad(completions),
                "completion_mask": pad([torch.ones_like(c) for c in completions]),
                "advantages": torch.tensor([s.advantage for s in samples], device=device),
                "num_items_in_batch": torch.tensor(float(total), device=device),
            }  # fmt: skip

    on_gpu = options.device == "cuda"
    config = GRPOConfig(
        output_dir=tempfile.mkdtemp(), per_device_train_batch_size=options.batch,
        gradient_accumulation_steps=len(samples) // options.batch, num_generations=min(GROUP, len(samples)),
        max_steps=options.steps, beta=0.0, learning_rate=LEARNING_RATE, lr_scheduler_type="constant",
        max_grad_norm=1.0, loss_type="dapo", bf16=on_gpu, use_cpu=not on_gpu, gradient_checkpointing=options.recompute,
        report_to=[], logging_steps=1, save_strategy="no", disable_tqdm=True,
        model_init_kwargs={"dtype": options.dtype, **experts(options)},
    )  # fmt: skip
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    trainer = GivenSamples(
        folder, args=config, train_dataset=Dataset.from_list([{"prompt": "none"}] * len(samples) * options.steps),
        reward_funcs=lambda completions, **_: [0.0] * len(completions), processing_class=tokenizer,
        callbacks=[Steps()],
    )  # fmt: skip
    trainer.train()
    return norms[0], None


SYSTEMS = {"ours": ours, "plain": plain, "trl": trl}
