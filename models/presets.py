"""Model sizes by name, from one that trains on a CPU core to DeepSeek-V3.

    config = find_config("tiny").with_vocabulary(352, bos=None, eos=1, pad=0)

The vocabulary of the small ones stands for nothing: `with_vocabulary` puts in that of the tokenizer.
"""

from pathlib import Path

from models.config import DeepseekV3Config, RopeParameters

# Sequences of tens of tokens: slow rotations would stand still over them.
_SHORT_ROPE = RopeParameters(rope_theta=100.0)

TINY = DeepseekV3Config(
    vocab_size=512,
    hidden_size=64,
    intermediate_size=128,
    moe_intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    n_routed_experts=8,
    num_experts_per_tok=2,
    kv_lora_rank=32,
    qk_nope_head_dim=16,
    qk_rope_head_dim=16,
    v_head_dim=32,
    max_position_embeddings=2048,
    rope_parameters=_SHORT_ROPE,
    initializer_range=0.3,
)
"""Two MoE layers of eight experts, MLA. Trains on one core."""

TINY_MLA512 = DeepseekV3Config(
    vocab_size=512,
    hidden_size=128,
    intermediate_size=256,
    moe_intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    n_routed_experts=8,
    num_experts_per_tok=2,
    kv_lora_rank=512,
    qk_nope_head_dim=64,
    qk_rope_head_dim=64,
    v_head_dim=64,
    max_position_embeddings=2048,
    rope_parameters=_SHORT_ROPE,
    initializer_range=0.3,
)
"""The smallest that vLLM's CPU kernel for MLA serves: it knows a latent of 512 with 64 rotary dimensions only."""

MINI = DeepseekV3Config(
    vocab_size=32768,
    hidden_size=512,
    intermediate_size=1536,
    moe_intermediate_size=256,
    num_hidden_layers=8,
    num_attention_heads=8,
    n_routed_experts=16,
    num_experts_per_tok=4,
    first_k_dense_replace=1,
    kv_lora_rank=512,
    qk_nope_head_dim=64,
    qk_rope_head_dim=64,
    v_head_dim=128,
    max_position_embeddings=4096,
)
"""About 100M parameters, with the head sizes that vLLM's GPU kernels for MLA accept (64, 64 and 128)."""

MOONLIGHT_16B_A3B = DeepseekV3Config(
    vocab_size=163840,
    hidden_size=2048,
    intermediate_size=11264,
    moe_intermediate_size=1408,
    num_hidden_layers=27,
    num_attention_heads=16,
    n_routed_experts=64,
    num_experts_per_tok=6,
    n_shared_experts=2,
    routed_scaling_factor=2.446,
    first_k_dense_replace=1,
    kv_lora_rank=512,
    qk_nope_head_dim=128,
    qk_rope_head_dim=64,
    v_head_dim=128,
    max_position_embeddings=8192,
    rope_parameters=RopeParameters(rope_theta=50000.0),
    bos_token_id=163584,
    eos_token_id=163585,
)
"""Moonlight-16B-A3B (arXiv:2502.16982): DeepSeek-V3's router at the sizes of DeepSeek-V2-Lite.

The released model has rms_norm_eps 1e-5; this one has 1e-6, see `DeepseekV3Config`.
"""

DEEPSEEK_V3 = DeepseekV3Config(
    vocab_size=129280,
    hidden_size=7168,
    intermediate_size=18432,
    moe_intermediate_size=2048,
    num_hidden_layers=61,
    num_attention_heads=128,
    n_routed_experts=256,
    num_experts_per_tok=8,
    n_group=8,
    topk_group=4,
    routed_scaling_factor=2.5,
    first_k_dense_replace=3,
    num_nextn_predict_layers=1,
    q_lora_rank=1536,
    kv_lora_rank=512,
    qk_nope_head_dim=128,
    qk_rope_head_dim=64,
    v_head_dim=128,
    max_position_embeddings=163840,
    rope_parameters=RopeParameters(rope_type="yarn", factor=40.0, mscale=1.0, mscale_all_dim=1.0),
    bos_token_id=0,
    eos_token_id=1,
)
"""DeepSeek-V3 and R1, 671B (arXiv:2412.19437), with its prediction module."""

PRESETS = {
    "tiny": TINY,
    "tiny-mla512": TINY_MLA512,
    "mini": MINI,
    "16b-a3b": MOONLIGHT_16B_A3B,
    "671b": DEEPSEEK_V3,
}


def find_config(name: str) -> DeepseekV3Config:
    """A preset, or the `config.json` in the folder `name`. Raises ValueError where neither exists."""
    if name in PRESETS:
        return PRESETS[name]
    if not (Path(name) / "config.json").is_file():
        raise ValueError(f"unknown model {name!r}; presets: {', '.join(PRESETS)}; or a folder with a config.json")
    return DeepseekV3Config.load(name)
