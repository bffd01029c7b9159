"""What stages cost, from configurations alone: samples, tokens, optimizer steps, disk, and an estimate of GPU-hours.

    size = model_size("671b")
    cost = rl_cost(zero_config, size, Lengths(prompt=150, completion=8_000))
    cost.gpu_hours(Machine())

FLOPs: 2 per active weight and token for a forward pass and 6 for forward and backward, plus attention over half the
sequence on average (models/counts.py). Hours: FLOPs / (peak x utilization), for generation and training apart. What
takes time and is not counted: waiting for the longest completion, syncs, rewards, start-up.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import Any

from models.config import MODEL_TYPES
from models.counts import attention_flops, count_parameters, forward_flops
from models.presets import find_config
from pipelines.supervised_config import SupervisedConfig
from pipelines.zero_config import ZeroConfig

_BYTES = {"float32": 4, "bfloat16": 2}
_TEXT_BYTES_PER_TOKEN = 4


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What the GPU-hours assume."""

    peak_tflops: float = 989.0
    """Of one GPU: dense bf16 of an H100 or H800."""
    train_utilization: float = 0.35
    """Share of it in training. DeepSeek-V3 reports 180K H800-hours per trillion tokens (arXiv:2412.19437): 0.35."""
    generate_utilization: float = 0.05
    """Share of it in sampling, which is bound by memory and by the longest completions; an assumption."""

    def __post_init__(self) -> None:
        for name in ("peak_tflops", "train_utilization", "generate_utilization"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be > 0, got {getattr(self, name)}")


@dataclass(frozen=True, kw_only=True)
class Lengths:
    """Mean tokens that a plan assumes."""

    prompt: int = 150
    completion: int = 0
    """0 for half of the longest that the stage allows."""

    def sampled(self, max_tokens: int) -> int:
        return min(self.completion, max_tokens) if self.completion else max(1, max_tokens // 2)


@dataclass(frozen=True, kw_only=True)
class ModelSize:
    """What the arithmetic needs to know of a model."""

    total: int
    """Parameters that are stored."""
    active: int
    """Weights of matrices that one token is multiplied with, head included."""
    attention: int
    """FLOPs of a token's forward pass for each token that it attends to."""

    def forward(self, context: float) -> float:
        """FLOPs of one token that attends to `context` others."""
        return 2 * self.active + self.attention * context


def _dense(billions: float, layers: int, hidden: int) -> ModelSize:
    return ModelSize(total=int(billions * 1e9), active=int(billions * 1e9), attention=4 * layers * hidden)


DENSE = {
    "qwen2.5-1.5b": _dense(1.54, 28, 1536),
    "qwen2.5-7b": _dense(7.62, 28, 3584),
    "qwen2.5-14b": _dense(14.8, 48, 5120),
    "qwen2.5-32b": _dense(32.8, 64, 5120),
    "llama-3.1-8b": _dense(8.03, 32, 4096),
    "llama-3.3-70b": _dense(70.6, 80, 8192),
}
"""The students of DeepSeek-R1's table, embeddings counted as if they were multiplied with."""


def model_size(name: str) -> ModelSize:
    """Of a preset, a folder with a config.json, or a name in `DENSE`. Raises ValueError for what is none of them."""
    if name in DENSE:
        return DENSE[name]
    file = Path(name) / "config.json"
    if file.is_file() and (fields := json.loads(file.read_text())).get("model_type") not in MODEL_TYPES:
        return dense_size(fields)
    config = find_config(name)
    return ModelSize(
        total=count_parameters(config).total, active=forward_flops(config, 0) // 2, attention=attention_flops(config, 1)
    )


def dense_size(fields: Mapping[str, Any]) -> ModelSize:
    """From the config.json of a dense model with gated feed-forward blocks, as Qwen's and Llama's."""
    hidden, layers, heads = fields["hidden_size"], fields["num_hidden_layers"], fields["num_attention_heads"]
    head_dim = fields.get("head_dim") or hidden // heads
    key_values = fields.get("num_key_value_heads", heads)
    attention = 2 * hidden * head_dim * (heads + key_values)
    vocabulary = fields["vocab_size"] * hidden
    active = layers * (attention + 3 * hidden * fields["intermediate_size"]) + vocabulary
    untied = 0 if fields.get("tie_word_embeddings") else vocabulary
    return ModelSize(total=active + untied, active=active, attention=4 * layers * heads * head_dim)


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What one stage reads, samples, trains and writes."""

    prompts: int = 0
    """Prompts, each as often as it is used; rows of a supervised stage."""
    samples: int = 0
    generated: int = 0
    """Tokens that an engine samples."""
    trained: int = 0
    """Tokens with a loss."""
    steps: int = 0
    """Optimizer steps."""
    disk: int = 0
    """Bytes that stay: model, newest checkpoints, traces."""
    generate_flops: float = 0.0
    train_flops: float = 0.0

    def gpu_hours(self, machine: Machine) -> float:
        per_hour = machine.peak_tflops * 1e12 * 3600
        train, generate = (
            self.train_flops / machine.train_utilization,
            self.generate_flops / machine.generate_utilization,
        )
        return (train + generate) / per_hour


def total(costs: list[Cost]) -> Cost:
    names = ("prompts", "samples", "generated", "trained", "steps", "disk", "generate_flops", "train_flops")
    return Cost(**{name: sum(getattr(cost, name) for cost in costs) for name in names})


def generation_flops(size: ModelSize, prompts: int, samples: int, prompt: int, completion: int) -> float:
    """Each prompt is read once for all its completions; the tokens of a completion see the prompt and half of it."""
    reading = prompts * prompt * size.forward((prompt + 1) / 2)
    return reading + samples * completion * size.forward(prompt + (completion + 1) / 2)


def rl_cost(config: ZeroConfig, size: ModelSize, lengths: Lengths) -> Cost:
    """Sampling, updates, and forward passes of the reference and of the old policy where there are any."""
    trainer, objective = config.trainer, config.learner.objective
    prompts = trainer.steps * trainer.prompts_per_step
    samples = trainer.steps * trainer.samples_per_step
    completion = lengths.sampled(trainer.max_tokens)
    length = lengths.prompt + completion
    passes = 3 + (objective.kl_coef > 0) + (trainer.minibatches > 1)  # a backward pass costs two
    copies = 3 + (objective.kl_coef > 0)  # weights, two moments, the reference
    checkpoints = min(trainer.keep_checkpoints, ceil(trainer.steps / trainer.save_every))
    return Cost(
        prompts=prompts,
        samples=samples,
        generated=samples * completion,
        trained=samples * completion,
        steps=trainer.steps * trainer.minibatches,
        disk=size.total * _BYTES[config.dtype] * (1 + checkpoints * copies),
        generate_flops=generation_flops(size, prompts, samples, lengths.prompt, completion),
        train_flops=samples * length * size.forward((length + 1) / 2) * passes,
    )


def supervised_cost(config: SupervisedConfig, size: ModelSize, rows: int, *, length: int, trained: int) -> Cost:
    """`length` tokens in a row, `trained` of them with a loss."""
    per_step = max(1, config.tokens_per_step // length) if config.tokens_per_step else config.samples_per_step
    steps = config.steps or ceil(rows * config.epochs / per_step)
    samples = steps * per_step if config.steps else int(rows * config.epochs)
    # Weights as they are served; a checkpoint has them and two moments in float32, see SupervisedConfig.dtype.
    state = 12 * size.total if config.save_every else 0
    return Cost(
        prompts=rows,
        samples=samples,
        trained=samples * trained,
        steps=steps,
        disk=size.total * _BYTES[config.dtype] + state,
        train_flops=3 * samples * length * size.forward((length + 1) / 2),
    )


def sampling_cost(size: ModelSize, prompts: int, per_prompt: int, *, prompt: int, completion: int) -> Cost:
    """Completions that are kept as text."""
    samples = prompts * per_prompt
    return Cost(
        prompts=prompts,
        samples=samples,
        generated=samples * completion,
        disk=samples * (prompt + completion) * _TEXT_BYTES_PER_TOKEN,
        generate_flops=generation_flops(size, prompts, samples, prompt, completion),
    )
