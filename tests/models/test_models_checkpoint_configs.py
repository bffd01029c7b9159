"""Published configurations: each parses, and the model it describes has the published number of parameters.

The dicts hold what the hub's config.json files say, less keys about training and remote code.
"""

import json
from typing import Any

import pytest
import torch

from models import DeepseekV3Config, DeepseekV3ForCausalLM
from models.checkpoint import hf_tensors
from models.fp8 import is_quantized, scale_shape

FP8 = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
COMMON: dict[str, Any] = {
    "attention_bias": False, "attention_dropout": 0.0, "aux_loss_alpha": 0.001, "ep_size": 1, "hidden_act": "silu",
    "initializer_range": 0.02, "kv_lora_rank": 512, "moe_layer_freq": 1, "pretraining_tp": 1, "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64, "rms_norm_eps": 1e-6, "seq_aux": True, "tie_word_embeddings": False, "use_cache": True,
    "torch_dtype": "bfloat16", "v_head_dim": 128, "rope_theta": 10000,
}  # fmt: skip
V2_LITE: dict[str, Any] = COMMON | {
    "architectures": ["DeepseekV2ForCausalLM"], "model_type": "deepseek_v2", "bos_token_id": 100000,
    "eos_token_id": 100001, "first_k_dense_replace": 1, "hidden_size": 2048, "intermediate_size": 10944,
    "max_position_embeddings": 163840, "moe_intermediate_size": 1408, "n_group": 1, "n_routed_experts": 64,
    "n_shared_experts": 2, "norm_topk_prob": False, "num_attention_heads": 16, "num_experts_per_tok": 6,
    "num_hidden_layers": 27, "num_key_value_heads": 16, "q_lora_rank": None, "routed_scaling_factor": 1.0,
    "rope_scaling": {
        "beta_fast": 32, "beta_slow": 1, "factor": 40, "mscale": 0.707, "mscale_all_dim": 0.707,
        "original_max_position_embeddings": 4096, "type": "yarn",
    },
    "scoring_func": "softmax", "topk_group": 1, "topk_method": "greedy", "vocab_size": 102400,
}  # fmt: skip
V2: dict[str, Any] = V2_LITE | {
    "hidden_size": 5120, "intermediate_size": 12288, "moe_intermediate_size": 1536, "n_group": 8,
    "n_routed_experts": 160, "num_attention_heads": 128, "num_hidden_layers": 60, "num_key_value_heads": 128,
    "q_lora_rank": 1536, "routed_scaling_factor": 16.0, "topk_group": 3, "topk_method": "group_limited_greedy",
}  # fmt: skip
V3: dict[str, Any] = COMMON | {
    "architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3", "bos_token_id": 0, "eos_token_id": 1,
    "first_k_dense_replace": 3, "hidden_size": 7168, "intermediate_size": 18432, "max_position_embeddings": 163840,
    "moe_intermediate_size": 2048, "n_group": 8, "n_routed_experts": 256, "n_shared_experts": 1,
    "norm_topk_prob": True, "num_attention_heads": 128, "num_experts_per_tok": 8, "num_hidden_layers": 61,
    "num_key_value_heads": 128, "num_nextn_predict_layers": 1, "q_lora_rank": 1536, "quantization_config": FP8,
    "rope_scaling": {
        "beta_fast": 32, "beta_slow": 1, "factor": 40, "mscale": 1.0, "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 4096, "type": "yarn",
    },
    "routed_scaling_factor": 2.5, "scoring_func": "sigmoid", "topk_group": 4, "topk_method": "noaux_tc",
    "vocab_size": 129280,
}  # fmt: skip
MOONLIGHT: dict[str, Any] = COMMON | {
    "architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3", "bos_token_id": 163584,
    "eos_token_id": 163586, "first_k_dense_replace": 1, "hidden_size": 2048, "intermediate_size": 11264,
    "max_position_embeddings": 8192, "moe_intermediate_size": 1408, "n_group": 1, "n_routed_experts": 64,
    "n_shared_experts": 2, "norm_topk_prob": True, "num_attention_heads": 16, "num_experts_per_tok": 6,
    "num_hidden_layers": 27, "num_key_value_heads": 16, "num_nextn_predict_layers": 0, "q_lora_rank": None,
    "rms_norm_eps": 1e-5, "rope_theta": 50000.0, "routed_scaling_factor": 2.446, "scoring_func": "sigmoid",
    "topk_group": 1, "topk_method": "noaux_tc", "vocab_size": 163840,
}  # fmt: skip
KIMI_K2: dict[str, Any] = V3 | {
    "model_type": "kimi_k2", "bos_token_id": 163584, "eos_token_id": 163585, "first_k_dense_replace": 1,
    "max_position_embeddings": 131072, "n_group": 1, "n_routed_experts": 384, "num_attention_heads": 64,
    "num_key_value_heads": 64, "num_nextn_predict_layers": 0, "rope_theta": 50000.0, "routed_scaling_factor": 2.827,
    "rope_scaling": {
        "beta_fast": 1.0, "beta_slow": 1.0, "factor": 32.0, "mscale": 1.0, "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 4096, "type": "yarn",
    },
    "topk_group": 1, "vocab_size": 163840,
}  # fmt: skip


def build(raw: dict[str, Any]) -> DeepseekV3ForCausalLM:
    """Without memory for weights."""
    with torch.device("meta"):
        return DeepseekV3ForCausalLM(DeepseekV3Config.from_dict(raw))


@pytest.mark.filterwarnings("ignore:rms_norm_eps")
@pytest.mark.parametrize(
    ("raw", "billions"),
    [(V2_LITE, 15.7), (V2, 235.7), (V3 | {"num_nextn_predict_layers": 0}, 671.0), (MOONLIGHT, 16.0), (KIMI_K2, 1026.4)],
    ids=["V2-Lite", "V2", "V3", "Moonlight", "Kimi-K2"],
)
def test_published_config_has_the_published_size(raw: dict[str, Any], billions: float) -> None:
    model = build(raw)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    assert round(parameters / 1e9, 1) == billions, f"{parameters:,}"
    biases = [name for name, _ in hf_tensors(model) if name.endswith("e_score_correction_bias")]
    is_v2 = raw["model_type"] == "deepseek_v2"
    assert len(biases) == (0 if is_v2 else raw["num_hidden_layers"] - raw["first_k_dense_replace"])
    written = model.config.to_dict()
    assert written["architectures"] == ["DeepseekV2ForCausalLM" if is_v2 else "DeepseekV3ForCausalLM"]
    assert DeepseekV3Config.from_dict(json.loads(json.dumps(written))) == model.config
    assert "quantization_config" not in written, "what is in memory is not quantised"


def test_names_and_shapes_are_those_of_the_released_v3() -> None:
    """Values by dtype that the hub counts in deepseek-ai/DeepSeek-V3: 684,531,386,000 together."""
    counts = {"F8_E4M3": 0, "F32": 0, "BF16": 0}
    for name, tensor in hf_tensors(build(V3)):
        if is_quantized(name):
            rows, columns = scale_shape(tuple(tensor.shape))
            counts["F8_E4M3"] += tensor.numel()
            counts["F32"] += rows * columns
        else:
            counts["F32" if name.endswith("e_score_correction_bias") else "BF16"] += tensor.numel()
    assert counts == {"F8_E4M3": 680_571_043_840, "F32": 41_555_600, "BF16": 3_918_786_560}


def test_keys_that_may_be_null() -> None:
    config = DeepseekV3Config.from_dict(V2_LITE | {"n_group": None, "topk_group": None, "n_shared_experts": None})
    assert (config.n_group, config.topk_group, config.n_shared_experts) == (1, 1, 0)


def test_v2_without_router_keys_is_what_transformers_takes_it_for() -> None:
    bare = {
        key: value for key, value in V2_LITE.items() if key not in ("scoring_func", "topk_method", "norm_topk_prob")
    }
    assert DeepseekV3Config.from_dict(bare) == DeepseekV3Config.from_dict(V2_LITE)


def test_latent_norms_keep_their_epsilon() -> None:
    """As in transformers; vLLM would use the 1e-5 of Moonlight there too, hence the warning."""
    with pytest.warns(UserWarning, match=r"rms_norm_eps=1e-05.*vLLM"):
        model = build(MOONLIGHT)
    layer: Any = model.model.layers[3]
    assert layer.self_attn.kv_a_layernorm.eps == 1e-6 and layer.input_layernorm.eps == 1e-5 == model.model.norm.eps


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"quant_method": "compressed-tensors"}, "quant_method must be 'fp8', got 'compressed-tensors'"),
        ({"fmt": "e5m2"}, "fmt must be 'e4m3', got 'e5m2'"),
        ({"weight_block_size": [64, 64]}, r"weight_block_size must be \[128, 128\], got \[64, 64\]"),
        ({"weight_block_size": None}, r"weight_block_size must be \[128, 128\], got None"),
        ({"activation_scheme": "static"}, "activation_scheme must be 'dynamic', got 'static'"),
        ({"scale_fmt": "e3m4"}, "scale_fmt must be 'ue8m0', got 'e3m4'"),
    ],
)
def test_other_quantisation_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DeepseekV3Config.from_dict(V3 | {"quantization_config": FP8 | change})


@pytest.mark.parametrize(
    "fmt", [{}, {"scale_fmt": "ue8m0"}, {"scale_fmt": "float", "modules_to_not_convert": ["gate"]}]
)
def test_fp8_is_accepted(fmt: dict[str, Any]) -> None:
    DeepseekV3Config.from_dict(V3 | {"quantization_config": FP8 | fmt})
