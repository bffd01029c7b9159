"""Exact counts from a configuration, without building the model: parameters, FLOPs, cache and checkpoint bytes.

A weight is active for a token whose forward pass multiplies by it: all of attention and norms, the router, the shared
experts, K of E routed experts and the head, but not the embedding, of which one row is looked up. Modules for
multi-token prediction are counted apart. The router's correction bias is a buffer and no parameter.

    count_parameters(config).active
    forward_flops(config, context_length=8192)
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from math import ceil, prod
from typing import Literal

from models.config import DeepseekV3Config

Precision = Literal["bf16", "fp8"]
_FP8_BLOCK = 128


@dataclass(frozen=True, kw_only=True, slots=True)
class Weight:
    """Parameters of one shape."""

    shape: tuple[int, ...]
    copies: int = 1
    """How many of this shape there are."""
    used: int = 1
    """How many of them one token passes through."""
    is_matmul: bool = True
    """False for norms and for the embedding's rows."""
    is_fp8: bool = False
    """Stored in FP8 by DeepSeek's block-quantised checkpoints."""

    @property
    def total(self) -> int:
        return self.copies * prod(self.shape)

    @property
    def active(self) -> int:
        return self.used * prod(self.shape)

    @property
    def num_scales(self) -> int:
        """Scales of all copies when quantised: one per block, the last of a row or column cut short."""
        return self.copies * prod(ceil(size / _FP8_BLOCK) for size in self.shape) if self.is_fp8 else 0


def _norm(size: int) -> Weight:
    return Weight(shape=(size,), is_matmul=False)


def _linear(out_features: int, in_features: int, copies: int = 1, used: int = 1) -> Weight:
    return Weight(shape=(out_features, in_features), copies=copies, used=used, is_fp8=True)


def attention_weights(config: DeepseekV3Config) -> Iterator[Weight]:
    """One layer's latent attention."""
    hidden, heads, latent = config.hidden_size, config.num_attention_heads, config.kv_lora_rank
    if config.q_lora_rank is None:
        yield _linear(heads * config.qk_head_dim, hidden)
    else:
        yield _linear(config.q_lora_rank, hidden)
        yield _norm(config.q_lora_rank)
        yield _linear(heads * config.qk_head_dim, config.q_lora_rank)
    yield _linear(latent + config.qk_rope_head_dim, hidden)
    yield _norm(latent)
    yield _linear(heads * (config.qk_nope_head_dim + config.v_head_dim), latent)
    yield _linear(hidden, heads * config.v_head_dim)


def feed_forward_weights(config: DeepseekV3Config, is_moe: bool) -> Iterator[Weight]:
    """One layer's dense block, or its router and experts."""
    hidden = config.hidden_size
    blocks = [(config.intermediate_size, 1, 1)]  # width, copies, used by a token
    if is_moe:
        yield Weight(shape=(config.n_routed_experts, hidden))
        blocks = [(config.moe_intermediate_size, config.n_routed_experts, config.num_experts_per_tok)]
        if config.n_shared_experts:
            blocks.append((config.n_shared_experts * config.moe_intermediate_size, 1, 1))
    for width, copies, used in blocks:
        yield _linear(width, hidden, 2 * copies, 2 * used)
        yield _linear(hidden, width, copies, used)


def layer_weights(config: DeepseekV3Config, is_moe: bool) -> list[Weight]:
    norms = [_norm(config.hidden_size), _norm(config.hidden_size)]
    return [*attention_weights(config), *feed_forward_weights(config, is_moe), *norms]


def main_weights(config: DeepseekV3Config) -> list[Weight]:
    """All layers and the final norm; neither embedding nor head."""
    layers = [layer_weights(config, config.is_moe_layer(layer)) for layer in range(config.num_hidden_layers)]
    return [*(weight for layer in layers for weight in layer), _norm(config.hidden_size)]


def mtp_weights(config: DeepseekV3Config) -> list[Weight]:
    """All prediction modules: two input norms, their joint projection, an MoE layer, a final norm."""
    hidden = config.hidden_size
    module = [_norm(hidden), _norm(hidden), Weight(shape=(hidden, 2 * hidden)), *layer_weights(config, True)]
    return [*module, _norm(hidden)] * config.num_nextn_predict_layers


def vocabulary_matrix(config: DeepseekV3Config) -> int:
    """Size of the embedding, which is that of the head."""
    return config.vocab_size * config.hidden_size


@dataclass(frozen=True, kw_only=True, slots=True)
class ParameterCounts:
    """Parameters of one model."""

    total: int
    """Everything but the prediction modules; a tied head counts once."""
    active: int
    """Multiplied with in one token's forward pass, head included, embedding look-up not."""
    embedding: int
    """Of the input embedding."""
    head: int
    """Of the output head; 0 when it is the embedding."""
    mtp: int
    """Of the prediction modules, without the embedding and head that they share with the main model."""

    @property
    def body(self) -> int:
        """Of the layers and norms alone."""
        return self.total - self.embedding - self.head


def _total(weights: Iterable[Weight]) -> int:
    return sum(weight.total for weight in weights)


def _active(weights: Iterable[Weight], keep: Callable[[Weight], bool] = lambda weight: True) -> int:
    return sum(weight.active for weight in weights if keep(weight))


def count_parameters(config: DeepseekV3Config) -> ParameterCounts:
    body, vocabulary = main_weights(config), vocabulary_matrix(config)
    head = 0 if config.tie_word_embeddings else vocabulary
    return ParameterCounts(
        total=_total(body) + vocabulary + head,
        active=_active(body) + vocabulary,
        embedding=vocabulary,
        head=head,
        mtp=_total(mtp_weights(config)),
    )


def attention_flops(config: DeepseekV3Config, context_length: int) -> int:
    """Scores and weighted values, all layers, of one token that attends to `context_length` tokens (naive form)."""
    per_layer = 2 * config.num_attention_heads * (config.qk_head_dim + config.v_head_dim) * context_length
    return config.num_hidden_layers * per_layer


def forward_flops(config: DeepseekV3Config, context_length: int) -> int:
    """FLOPs of one token's forward pass with logits: 2 per active weight of a matrix, plus attention.

    Attention counts the `context_length` tokens that are attended to; over a causal sequence of S tokens the mean is
    (S + 1) / 2. Norms, activations, rotations, softmax and prediction modules are left out.
    """
    matmuls = _active(main_weights(config), lambda weight: weight.is_matmul) + vocabulary_matrix(config)
    return 2 * matmuls + attention_flops(config, context_length)


def training_flops(config: DeepseekV3Config, context_length: int) -> int:
    """Forward, and a backward pass of twice its cost; no recomputation."""
    return 3 * forward_flops(config, context_length)


def cache_bytes_per_token(config: DeepseekV3Config, bytes_per_value: int = 2) -> int:
    """Latent and shared rotary key of every layer; two bytes per value for bf16."""
    return config.num_hidden_layers * (config.kv_lora_rank + config.qk_rope_head_dim) * bytes_per_value


def checkpoint_values(config: DeepseekV3Config, precision: Precision) -> dict[str, int]:
    """Data type -> values in a checkpoint of that precision, prediction modules included.

    A prediction module's shared embedding and head are written again, as DeepSeek does; in FP8 every block of a
    quantised matrix has a float32 scale, and embedding, head, norms, router and joint projections stay in bf16.
    """
    modules = config.num_nextn_predict_layers
    weights = [*main_weights(config), *mtp_weights(config)]
    num_heads = (0 if config.tie_word_embeddings else 1) + modules
    total = _total(weights) + vocabulary_matrix(config) * (1 + modules + num_heads)
    moe_layers = sum(config.is_moe_layer(layer) for layer in range(config.num_hidden_layers)) + modules
    biases = moe_layers * config.n_routed_experts if config.has_correction_bias else 0
    quantised = _total(weight for weight in weights if weight.is_fp8) if precision == "fp8" else 0
    scales = sum(weight.num_scales for weight in weights) if precision == "fp8" else 0
    return {"bf16": total - quantised, "float8_e4m3fn": quantised, "float32": scales + biases}


def checkpoint_bytes(config: DeepseekV3Config, precision: Precision) -> int:
    size = {"bf16": 2, "float8_e4m3fn": 1, "float32": 4}
    return sum(size[name] * count for name, count in checkpoint_values(config, precision).items())
