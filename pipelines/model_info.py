"""What a model weighs and costs, computed from its configuration alone: no weights are read.

grpo model info 671b
grpo model info runs/zero/model
"""

from dataclasses import dataclass
from pathlib import Path

import torch
import tyro

from models import DeepseekV3Config
from models.auto import read_model_type
from models.config import MODEL_TYPES
from models.counts import (
    cache_bytes_per_token,
    checkpoint_bytes,
    count_parameters,
    forward_flops,
    training_flops,
)
from models.presets import PRESETS, find_config
from pipelines.console import print_table
from pipelines.students import foreign_config

CONTEXTS = (1024, 8192, 32768)

Rows = list[tuple[str, str]]


@dataclass(frozen=True, kw_only=True)
class ModelInfoConfig:
    """`grpo model info`: sizes, costs and kinds of a model."""

    model: tyro.conf.Positional[str] = ""
    """A preset, or a folder with a config.json."""


def format_count(count: float, billion: str = "B") -> str:
    """1234567 -> '1.23M'; FLOPs call a billion G."""
    for limit, unit in ((1e12, "T"), (1e9, billion), (1e6, "M"), (1e3, "k")):
        if count >= limit:
            return f"{count / limit:,.2f}{unit}"
    return f"{count:,.0f}"


def _count(count: int) -> str:
    return f"{count:,} ({format_count(count)})" if count >= 1000 else str(count)


def format_size(num_bytes: float) -> str:
    for limit, unit in ((1 << 40, "TiB"), (1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")):
        if num_bytes >= limit:
            return f"{num_bytes / limit:,.2f} {unit}"
    return f"{num_bytes:,.0f} B"


def _attention(config: DeepseekV3Config) -> Rows:
    rope = config.rope_parameters
    scaling = f"YaRN, factor {rope.factor:g}" if rope.rope_type == "yarn" else "plain"
    latents = f"query {config.q_lora_rank or 'none'}, key-value {config.kv_lora_rank}"
    return [
        ("attention heads", str(config.num_attention_heads)),
        ("MLA latents", latents),
        ("MLA head", f"{config.qk_nope_head_dim} + {config.qk_rope_head_dim} rotary, value {config.v_head_dim}"),
        ("positions", f"{config.max_position_embeddings:,}, theta {rope.rope_theta:g}, {scaling}"),
    ]


def _experts(config: DeepseekV3Config) -> Rows:
    dense = min(config.first_k_dense_replace, config.num_hidden_layers)
    width = f", width {config.intermediate_size:,}" if dense else ""
    rows = [("dense layers", f"{dense} of {config.num_hidden_layers}{width}")]
    if dense == config.num_hidden_layers:
        return rows
    has_groups = config.n_group > 1 and config.topk_method != "greedy"
    return [
        *rows,
        ("experts", f"{config.n_routed_experts} routed, {config.n_shared_experts} shared"),
        ("  per token", f"{config.num_experts_per_tok} routed"),
        ("  width", f"{config.moe_intermediate_size:,}"),
        ("router", f"{config.scoring_func}, {'' if config.has_correction_bias else 'no '}correction bias"),
        ("  groups", f"best {config.topk_group} of {config.n_group}" if has_groups else "none"),
        ("  weights", f"{'sum to 1' if config.norm_topk_prob else 'as scored'}, times {config.routed_scaling_factor}"),
    ]


def _parameters(config: DeepseekV3Config) -> Rows:
    counts, modules = count_parameters(config), config.num_nextn_predict_layers
    return [
        ("parameters", _count(counts.total)),
        ("  active per token, no embedding", _count(counts.active)),
        ("  embedding", _count(counts.embedding)),
        ("  head", "the embedding" if config.tie_word_embeddings else _count(counts.head)),
        ("MTP modules", str(modules) if modules else "none"),
        *([("  parameters, beside the above", _count(counts.mtp))] if modules else []),
    ]


def _costs(config: DeepseekV3Config) -> Rows:
    rows = []
    for context in CONTEXTS:
        value = f"- (positions end at {config.max_position_embeddings:,})"
        if context <= config.max_position_embeddings:
            forward, training = forward_flops(config, context), training_flops(config, context)
            value = f"{format_count(forward, 'G')} forward, {format_count(training, 'G')} training"
        rows.append((f"FLOPs per token, context {context // 1024}k", value))
    cache = cache_bytes_per_token(config)
    return [
        *rows,
        ("KV cache per token, bf16", f"{cache:,} B"),
        ("  per 1k tokens", format_size(1024 * cache)),
        ("checkpoint, bf16", format_size(checkpoint_bytes(config, "bf16"))),
        ("checkpoint, fp8 blocks", format_size(checkpoint_bytes(config, "fp8"))),
    ]


def info_rows(config: DeepseekV3Config) -> Rows:
    """Name and value of everything shown about a model of our architecture."""
    return [
        ("architecture", config.to_dict()["architectures"][0]),
        ("layers", str(config.num_hidden_layers)),
        ("hidden size", f"{config.hidden_size:,}"),
        ("vocabulary", f"{config.vocab_size:,}"),
        *_attention(config),
        *_experts(config),
        *_parameters(config),
        *_costs(config),
    ]


def foreign_rows(folder: str) -> Rows:
    """What can be said of another architecture; its parameters are counted on a model without storage."""
    from transformers import AutoModelForCausalLM  # takes seconds to import

    config = foreign_config(folder)
    text = config.get_text_config()
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    total = sum(parameter.numel() for parameter in model.parameters())
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    names = ("num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads", "vocab_size")
    return [
        ("architecture", f"{type(model).__name__} (transformers)"),
        *((name.removeprefix("num_").replace("_", " "), str(getattr(text, name, "-"))) for name in names),
        ("parameters", _count(total)),
        ("  embedding", _count(embedding.numel())),
        ("  head", "the embedding" if head is embedding else _count(head.numel())),
        ("checkpoint, bf16", format_size(2 * total)),
    ]


def run_model_info(config: ModelInfoConfig) -> None:
    """The whole of `grpo model info`. Raises ValueError for what is neither a preset nor a model's folder."""
    name = config.model
    if not name:
        raise ValueError(f"say which model: a folder with a config.json, or a preset: {', '.join(PRESETS)}")
    path = Path(name) / "config.json"
    is_foreign = name not in PRESETS and path.is_file() and read_model_type(path) not in MODEL_TYPES
    print_table(name, ["", "value"], foreign_rows(name) if is_foreign else info_rows(find_config(name)))
