"""Presets and closed-form counts against models built on the meta device and against published figures.

A published figure counts as met when it lies within one unit of its last digit: some were rounded, some cut (V2-Lite's
2.4B active parameters are 2.451B).
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from models import DeepseekV3Config, DeepseekV3ForCausalLM, SequenceLayout
from models.checkpoint import save_pretrained
from models.counts import (
    Precision,
    attention_flops,
    cache_bytes_per_token,
    checkpoint_bytes,
    checkpoint_values,
    count_parameters,
    forward_flops,
    training_flops,
)
from models.moe import RoutedExperts
from models.presets import DEEPSEEK_V3, MINI, MOONLIGHT_16B_A3B, PRESETS, TINY, TINY_MLA512, find_config

V2_LITE = replace(
    MOONLIGHT_16B_A3B, vocab_size=102400, intermediate_size=10944, scoring_func="softmax", topk_method="greedy",
    norm_topk_prob=False, routed_scaling_factor=1.0,
)  # fmt: skip


def built(config: DeepseekV3Config) -> int:
    """Parameters of a model without storage."""
    with torch.device("meta"):
        model = DeepseekV3ForCausalLM(config)
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("name", PRESETS)
def test_totals_equal_a_built_model(name: str) -> None:
    config = PRESETS[name]
    counts = count_parameters(config)
    assert counts.total == built(replace(config, num_nextn_predict_layers=0))
    assert counts.total + counts.mtp == built(config)


@pytest.mark.parametrize(
    "change",
    [
        {"tie_word_embeddings": True},
        {"n_shared_experts": 0},
        {"n_shared_experts": 3},
        {"first_k_dense_replace": 2},
        {"q_lora_rank": 24},
        {"scoring_func": "softmax", "topk_method": "greedy"},
        {"num_nextn_predict_layers": 2},
    ],
)
def test_totals_equal_a_built_model_of_other_shape(change: dict[str, Any]) -> None:
    config = replace(TINY, **change)
    counts = count_parameters(config)
    assert counts.total + counts.mtp == built(config)
    if config.tie_word_embeddings:
        assert counts.total == count_parameters(TINY).total - 512 * 64 and counts.head == 0


def within_last_digit(count: int, published: str) -> bool:
    digits = published.removesuffix("B")
    unit = 10.0 ** -len(digits.partition(".")[2])
    return abs(count / 1e9 - float(digits)) < unit


@pytest.mark.parametrize(
    ("config", "quantity", "published"),
    [
        (DEEPSEEK_V3, "total", "671B"),
        (DEEPSEEK_V3, "active", "37B"),
        (DEEPSEEK_V3, "mtp", "11.6B"),  # its card says 11.5B, which leaves out the projection of 0.1B
        (V2_LITE, "total", "15.7B"),
        (V2_LITE, "active", "2.4B"),
        (MOONLIGHT_16B_A3B, "total", "16B"),
        (MOONLIGHT_16B_A3B, "body", "15.29B"),  # its report leaves embeddings and head out
        (MOONLIGHT_16B_A3B, "active_body", "2.24B"),
        (MINI, "total", "0.1B"),
    ],
)
def test_published_parameter_counts(config: DeepseekV3Config, quantity: str, published: str) -> None:
    counts = count_parameters(config)
    count = counts.active - counts.head if quantity == "active_body" else getattr(counts, quantity)
    assert within_last_digit(count, published), f"{count:,} is not {published}"


def test_the_released_fp8_checkpoint_value_for_value() -> None:
    """The numbers of values by type that the hub shows for deepseek-ai/DeepSeek-V3, 684,531,386,000 together."""
    assert checkpoint_values(DEEPSEEK_V3, "fp8") == {
        "bf16": 3_918_786_560, "float8_e4m3fn": 680_571_043_840, "float32": 41_555_600,
    }  # fmt: skip
    assert checkpoint_bytes(DEEPSEEK_V3, "fp8") == 688_574_839_360
    plain = checkpoint_values(DEEPSEEK_V3, "bf16")
    assert plain == {"bf16": 684_489_830_400, "float8_e4m3fn": 0, "float32": 59 * 256}


@pytest.mark.parametrize("precision", ["bf16", "fp8"])
def test_checkpoint_values_equal_a_saved_checkpoint(precision: Precision, tmp_path: Path) -> None:
    """Sizes that are no multiples of a block, two prediction modules, a dense layer."""
    config = replace(
        TINY, hidden_size=160, moe_intermediate_size=136, intermediate_size=200, first_k_dense_replace=1,
        q_lora_rank=40, num_nextn_predict_layers=2,
    )  # fmt: skip
    model = DeepseekV3ForCausalLM(config)
    model.init_weights(0)
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16()
    save_pretrained(model, tmp_path / "saved", fp8="float32" if precision == "fp8" else None)
    found = {"bf16": 0, "float8_e4m3fn": 0, "float32": 0}
    for path in (tmp_path / "saved").glob("*.safetensors"):
        for tensor in load_file(path).values():
            found[str(tensor.dtype).removeprefix("torch.").replace("bfloat16", "bf16")] += tensor.numel()
    assert found == checkpoint_values(config, precision)


def test_cache_bytes() -> None:
    assert cache_bytes_per_token(DEEPSEEK_V3) == 61 * 576 * 2 == 70_272
    assert cache_bytes_per_token(TINY, bytes_per_value=4) == 2 * (32 + 16) * 4


@pytest.mark.parametrize(
    "config",
    [replace(TINY, first_k_dense_replace=2, v_head_dim=24), replace(TINY, q_lora_rank=24, first_k_dense_replace=1)],
    ids=["dense", "experts"],
)
def test_flops_equal_those_torch_counts(config: DeepseekV3Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the kernels that torch can count: attention by plain products over all S positions, one expert at a time."""
    monkeypatch.setattr(RoutedExperts, "forward", RoutedExperts.loop)
    model = DeepseekV3ForCausalLM(config)
    model.init_weights(0)
    length = 32  # attention pads other lengths
    ids_T, layout = torch.arange(length), SequenceLayout.from_lengths([length])
    counter = FlopCounterMode(display=False)
    with counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        model.lm_head(model(ids_T, layout).hidden_TD)
    assert counter.get_total_flops() == length * forward_flops(config, context_length=length)


def test_flops_grow_with_context_by_attention_alone() -> None:
    short, long = (forward_flops(DEEPSEEK_V3, n) for n in (0, 4096))
    assert short == 2 * (count_parameters(DEEPSEEK_V3).active - 61 * (2 * 7168 + 1536 + 512) - 7168)
    assert long - short == attention_flops(DEEPSEEK_V3, 4096) == 61 * 2 * 128 * (192 + 128) * 4096
    assert training_flops(DEEPSEEK_V3, 4096) == 3 * long


def test_sizes_that_engines_ask_for() -> None:
    for config in (TINY_MLA512, MINI, MOONLIGHT_16B_A3B, DEEPSEEK_V3):
        assert (config.kv_lora_rank, config.qk_rope_head_dim) == (512, 64)
        assert config.hidden_size % 32 == 0 and config.moe_intermediate_size % 8 == 0
    for config in (MINI, MOONLIGHT_16B_A3B, DEEPSEEK_V3):
        assert (config.qk_nope_head_dim, config.v_head_dim) in {(64, 128), (128, 128)}


def test_presets_survive_their_config_file(tmp_path: Path) -> None:
    for config in PRESETS.values():
        (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
        assert find_config(str(tmp_path)) == config


def test_unknown_names_are_refused() -> None:
    with pytest.raises(ValueError, match="unknown model '16b'; presets: tiny, tiny-mla512, mini, 16b-a3b, 671b"):
        find_config("16b")
