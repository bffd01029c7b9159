"""Model sizes by name, for models that are pretrained from nothing.

config = architecture("tiny", vocab_size=352, eos=1, pad=0)
"""

from pathlib import Path

from models import DeepseekV3Config, RopeParameters

TINY = DeepseekV3Config(
    vocab_size=1,
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
    # Sequences of tens of tokens: slow rotations would stand still over them.
    rope_parameters=RopeParameters(rope_theta=100.0),
    initializer_range=0.3,
)
"""About 320,000 parameters: two MoE layers of eight experts, MLA. Trains on one core."""

ARCHITECTURES = {"tiny": TINY}


def architecture(name: str, *, vocab_size: int, eos: int, pad: int) -> DeepseekV3Config:
    """A named size, or that of a `config.json` in the folder `name`, for a tokenizer's vocabulary."""
    if name not in ARCHITECTURES and not (Path(name) / "config.json").is_file():
        raise ValueError(
            f"unknown architecture {name!r}; known: {', '.join(ARCHITECTURES)}; or a folder with a config.json"
        )
    base = ARCHITECTURES.get(name) or DeepseekV3Config.load(name)
    return base.with_vocabulary(vocab_size, bos=None, eos=eos, pad=pad)
