"""Configuration of the DeepSeek-V3 model: the keys of a Hugging Face `config.json`, verbatim, and what follows from
them.

Not here: any default that would turn a missing key of a checkpoint into a silently different model.

    config = DeepseekV3Config.load("checkpoint_dir")
"""

import json
import math
import warnings
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

# Keys that change the computation and that this model does not implement: (key, the only value it can run).
_FIXED_KEYS: dict[str, Any] = {
    "attention_bias": False,
    "attention_dropout": 0.0,
    "hidden_act": "silu",
    "moe_layer_freq": 1,
    "rope_interleave": True,
}
_REFUSED_KEYS = {
    "index_topk": "sparse attention (V3.2) is not implemented",
}
MODEL_TYPES = ("deepseek_v3", "deepseek_v2", "kimi_k2")
"""`model_type` of the checkpoints that this model reads."""

ScaleFormat = Literal["float32", "ue8m0"]
"""Scales of FP8 blocks: any number, or powers of two only."""


@dataclass(frozen=True, kw_only=True)
class RopeParameters:
    """Rotary embedding: plain (`default`) or YaRN (arXiv:2309.00071), with the keys of `rope_parameters`."""

    rope_type: str = "default"
    rope_theta: float = 10000.0
    factor: float = 1.0
    original_max_position_embeddings: int = 4096
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 1.0
    mscale_all_dim: float = 0.0

    def __post_init__(self) -> None:
        if self.rope_type not in ("default", "yarn"):
            raise ValueError(f"rope_type must be 'default' or 'yarn', got {self.rope_type!r}")

    def magnitude(self, mscale: float) -> float:
        """YaRN's 0.1 * mscale * ln(factor) + 1; 1 without scaling."""
        if self.rope_type == "default" or self.factor <= 1:
            return 1.0
        return 0.1 * mscale * math.log(self.factor) + 1.0


@dataclass(frozen=True, kw_only=True)
class DeepseekV3Config:
    """Sizes and switches of one model. Field names are those of `config.json`; sizes count elements."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    """Width of a dense layer's feed-forward block."""
    moe_intermediate_size: int
    """Width of one routed expert; the shared expert is `n_shared_experts` times as wide."""
    num_hidden_layers: int
    num_attention_heads: int
    n_routed_experts: int
    num_experts_per_tok: int
    n_shared_experts: int = 1
    n_group: int = 1
    """Expert groups; the router first keeps the best `topk_group` of them, then picks experts inside."""
    topk_group: int = 1
    norm_topk_prob: bool = True
    routed_scaling_factor: float = 1.0
    scoring_func: Literal["sigmoid", "softmax"] = "sigmoid"
    """V3 scores each expert on its own; V2 lets them compete."""
    topk_method: Literal["noaux_tc", "group_limited_greedy", "greedy"] = "noaux_tc"
    """`noaux_tc` (V3): correction bias, a group's score is the sum of its best two. The others (V2) have no bias:
    `group_limited_greedy` ranks groups by their best expert, `greedy` ignores groups."""
    num_nextn_predict_layers: int = 0
    """Multi-token-prediction modules behind the last layer."""
    first_k_dense_replace: int = 0
    """The first k layers have a dense feed-forward block instead of experts."""
    q_lora_rank: int | None = None
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    rms_norm_eps: float = 1e-6
    max_position_embeddings: int = 4096
    rope_parameters: RopeParameters = field(default_factory=RopeParameters)
    tie_word_embeddings: bool = False
    initializer_range: float = 0.02
    bos_token_id: int | None = None
    eos_token_id: int | None = None
    pad_token_id: int | None = None

    def __post_init__(self) -> None:
        if self.n_routed_experts % self.n_group:
            raise ValueError(
                f"n_routed_experts must be a multiple of n_group, got {self.n_routed_experts} and {self.n_group}"
            )
        per_group = self.n_routed_experts // self.n_group
        if self.n_group > 1 and per_group < 2 and self.has_correction_bias:
            raise ValueError(
                f"a group needs at least 2 experts (its score is the sum of its best two), got {per_group}"
            )
        if not 1 <= self.topk_group <= self.n_group:
            raise ValueError(f"topk_group must be between 1 and n_group={self.n_group}, got {self.topk_group}")
        if self.num_experts_per_tok > per_group * self.topk_group:
            raise ValueError(
                f"num_experts_per_tok={self.num_experts_per_tok} exceeds the {per_group * self.topk_group} experts "
                f"that {self.topk_group} of {self.n_group} groups hold"
            )
        if self.n_shared_experts < 0:
            raise ValueError(f"n_shared_experts must be >= 0, got {self.n_shared_experts}")
        if self.scoring_func == "softmax" and self.topk_method == "noaux_tc":
            raise ValueError("scoring_func='softmax' has no correction bias: topk_method must not be 'noaux_tc'")
        if self.qk_rope_head_dim % 2:
            raise ValueError(f"qk_rope_head_dim must be even (rotation acts on pairs), got {self.qk_rope_head_dim}")
        if self.rms_norm_eps != self.latent_norm_eps:
            warnings.warn(
                f"rms_norm_eps={self.rms_norm_eps}: the two latent norms of attention keep {self.latent_norm_eps}, as "
                "in transformers; vLLM uses rms_norm_eps there too, so its outputs differ slightly",
                stacklevel=2,
            )

    @property
    def latent_norm_eps(self) -> float:
        """Of `q_a_layernorm` and `kv_a_layernorm`, which DeepSeek's code and transformers build with the default."""
        return 1e-6

    @property
    def qk_head_dim(self) -> int:
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def softmax_scale(self) -> float:
        """(qk_head_dim)^-1/2, times the squared YaRN magnitude when `mscale_all_dim` is set."""
        rope = self.rope_parameters
        magnitude = rope.magnitude(rope.mscale_all_dim) if rope.mscale_all_dim else 1.0
        return self.qk_head_dim**-0.5 * magnitude**2

    @property
    def has_correction_bias(self) -> bool:
        return self.topk_method == "noaux_tc"

    def is_moe_layer(self, layer: int) -> bool:
        return layer >= self.first_k_dense_replace

    def to_dict(self) -> dict[str, Any]:
        """The content of `config.json`, with the keys that vLLM and transformers need to build the same model."""
        own = asdict(self)
        rope = self.rope_parameters
        if rope.rope_type == "default":
            own["rope_parameters"] = {"rope_type": "default", "rope_theta": rope.rope_theta}
        return (
            own
            | _FIXED_KEYS
            | {
                "architectures": ["DeepseekV3ForCausalLM" if self.has_correction_bias else "DeepseekV2ForCausalLM"],
                "model_type": "deepseek_v3" if self.has_correction_bias else "deepseek_v2",
                "num_key_value_heads": self.num_attention_heads,
                "head_dim": self.qk_rope_head_dim,
                "ep_size": 1,
                # vLLM computes router logits in the model's dtype without this key, transformers always in float32.
                "moe_router_dtype": "float32",
            }
        )

    @classmethod
    def from_dict(cls, raw: dict[str, Any], source: str = "config.json") -> "DeepseekV3Config":
        """Reads `config.json` content. Raises ValueError for another architecture or a feature not implemented."""
        if raw.get("model_type") not in MODEL_TYPES:
            raise ValueError(f"{source}: model_type must be one of {MODEL_TYPES}, got {raw.get('model_type')!r}")
        for key, value in _FIXED_KEYS.items():
            if raw.get(key, value) != value:
                raise ValueError(f"{source}: {key} must be {value!r} for this model, got {raw[key]!r}")
        for key, why in _REFUSED_KEYS.items():
            if raw.get(key) is not None:
                raise ValueError(f"{source}: has {key}: {why}")
        fp8_scale_format(raw, source)
        if raw["model_type"] == "deepseek_v2":
            raw = {"scoring_func": "softmax", "topk_method": "greedy", "norm_topk_prob": False} | raw
        # Some files say null for "no groups" and "no shared expert".
        absent = {"n_group": 1, "topk_group": 1, "n_shared_experts": 0, "num_nextn_predict_layers": 0}
        raw = raw | {key: value for key, value in absent.items() if key in raw and raw[key] is None}
        known = {f.name for f in fields(cls)}
        values = {key: value for key, value in raw.items() if key in known}
        values["rope_parameters"] = _read_rope(raw, source)
        try:
            return cls(**values)
        except TypeError as error:  # a required key is absent; the dataclass names it
            raise ValueError(f"{source}: {error}") from None

    @classmethod
    def load(cls, folder: str | Path) -> "DeepseekV3Config":
        path = Path(folder) / "config.json"
        if not path.is_file():
            raise FileNotFoundError(f"{path} not found: give the folder of a Hugging Face checkpoint")
        try:
            raw = json.loads(path.read_text())
        except ValueError as error:
            raise ValueError(f"{path}: not JSON: {error}") from None
        return cls.from_dict(raw, source=str(path))

    def with_vocabulary(self, vocab_size: int, *, bos: int | None, eos: int, pad: int) -> "DeepseekV3Config":
        """The same model for another tokenizer."""
        return replace(self, vocab_size=vocab_size, bos_token_id=bos, eos_token_id=eos, pad_token_id=pad)


def fp8_scale_format(raw: dict[str, Any], source: str = "config.json") -> ScaleFormat | None:
    """How the weights of a checkpoint are scaled, None unless they are FP8. Raises ValueError for another format."""
    quantization = raw.get("quantization_config")
    if quantization is None:
        return None
    known = {
        "quant_method": ["fp8"],
        "fmt": ["e4m3", None],
        "activation_scheme": ["dynamic", None],
        "weight_block_size": [[128, 128]],
        "scale_fmt": ["ue8m0", "float", "float32", None],
    }
    for key, values in known.items():
        if quantization.get(key) not in values:
            raise ValueError(
                f"{source}: quantization_config.{key} must be {values[0]!r}, got {quantization.get(key)!r}: only FP8 "
                "(e4m3) in blocks of 128 x 128 is read; take the unquantised checkpoint or dequantise it elsewhere"
            )
    return "ue8m0" if quantization.get("scale_fmt") == "ue8m0" else "float32"


def _read_rope(raw: dict[str, Any], source: str) -> RopeParameters:
    """`rope_parameters` of transformers 5, or the older pair `rope_theta` and `rope_scaling`."""
    rope = dict(raw.get("rope_parameters") or raw.get("rope_scaling") or {})
    rope.setdefault("rope_theta", raw.get("rope_theta", 10000.0))
    rope["rope_type"] = rope.pop("type", None) or rope.get("rope_type", "default")
    known = {f.name for f in fields(RopeParameters)}
    if unknown := sorted(set(rope) - known):
        raise ValueError(f"{source}: unknown rope parameters {unknown}; known: {sorted(known)}")
    return RopeParameters(**rope)
